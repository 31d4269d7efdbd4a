"""The command line of generation."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from megayoco.errors import UserError

if TYPE_CHECKING:
    from megayoco.generate.opening import Placement
    from megayoco.generate.sampling import Sampling
    from megayoco.model.window_options import WindowOptions

_DRAWING = ("temperature", "top_k", "top_p", "min_p")
_COUNTS = ("max_new_tokens", "prefill_chunk", "tensor", "pipeline", "sequence", "memory_top_k")
_CHOICES = (*_DRAWING, "repetition_penalty", "repetition_window", "seed", "greedy", "stop", "max_new_tokens")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. See python -m megayoco.generate --help.")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line.

    Raises:
        UserError: flags that are unknown, out of range, or contradict each other.
    """
    options = _parser().parse_args(arguments)
    for name in _COUNTS:
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}.")
    if options.greedy and any(getattr(options, name) is not None for name in _DRAWING):
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in _DRAWING)
        raise UserError(f"--greedy draws nothing: leave out {flags}, or leave out --greedy.")
    if "" in options.stop:
        raise UserError("--stop '' would end every text before it begins. Give it a character.")
    if options.chat_format is not None and not options.chat:
        raise UserError(f"--chat-format {options.chat_format} says how to chat: give --chat, too, or leave it out.")
    if options.chat_format is not None:
        from megayoco.generate.chat_format import check_format

        check_format(options.chat_format)
    window_options(options)
    _check_memory(options)
    if options.max_new_tokens is None:
        options.max_new_tokens = 512 if options.chat else 64
    return options


def _check_memory(options: argparse.Namespace) -> None:
    """Raises UserError for flags of the memory that contradict each other, or name a file that is not there."""
    if (options.sequence or 1) > 1:
        for name in ("memory_top_k", "memory_capacity", "memory", "save_memory"):
            if getattr(options, name) is not None:
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} cannot be used with a memory that --sequence shares. Leave one of them out.")
    if options.memory_search is not None and options.memory_top_k is None:
        raise UserError("--memory-search says how to find the best keys: give their number by --memory-top-k, too.")
    if options.memory_device is not None and options.memory_directory is not None:
        raise UserError("--memory-directory keeps the memory on the CPU already: leave out --memory-device.")
    if options.memory is not None:
        from megayoco.generate.finding import saved_files

        if not saved_files(Path(options.memory)):
            raise UserError(f"--memory {options.memory} is no file. Make it with --save-memory.")
    if options.save_memory is None:
        return
    if options.chat:
        raise UserError("--save-memory reads a text: give it by --prompt or --prompt-file, a chat is not saved.")
    if unused := [name for name in _CHOICES if getattr(options, name) not in (None, False, [])]:
        flag = unused[0].replace("_", "-")
        raise UserError(f"--{flag} is about new text, and --save-memory writes none. Leave one of them out.")
    if Path(options.save_memory).is_dir():
        raise UserError(f"--save-memory {options.save_memory!r} is a folder. Give the name of a file.")
    if Path(options.save_memory).exists():
        raise UserError(f"--save-memory {options.save_memory} exists. Delete it, or give another name.")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m megayoco.generate",
        description="Continue a prompt with a trained model, or chat with it.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="a run directory, or the folder of a model")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="repeated before its continuation; '' starts a new document")
    prompt.add_argument(
        "--prompt-file", metavar="FILE", help="UTF-8 text, - is standard input; only its continuation is written"
    )
    prompt.add_argument(
        "--chat", action="store_true", help="answer turns from the terminal, or the lines of standard input"
    )
    parser.add_argument(
        "--chat-format",
        metavar="NAME",
        help="plain, longllama, or the file of a Jinja chat template; the model's template unless told, else plain",
    )
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="64 unless told, 512 of each answer in a chat")
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="ends the continuation before this text; can be given several times",
    )
    choice = parser.add_argument_group("choice of the next token, in this order")
    choice.add_argument(
        "--repetition-penalty", type=float, metavar="R", help="above 1 makes tokens rarer that were there before"
    )
    choice.add_argument("--repetition-window", type=int, metavar="N", help="penalise those of the last N tokens only")
    choice.add_argument("--temperature", type=float, metavar="T", help="0.8 unless told; 0 is greedy")
    choice.add_argument("--top-k", type=int, metavar="K", help="draw among the K most likely tokens")
    choice.add_argument("--top-p", type=float, metavar="P", help="draw among those that hold this share of probability")
    choice.add_argument(
        "--min-p", type=float, metavar="P", help="draw among those at least P times as likely as the first"
    )
    choice.add_argument("--seed", type=int, metavar="S", help="the same seed gives the same text")
    choice.add_argument("--greedy", action="store_true", help="always the most likely token")
    place = parser.add_argument_group("the model in memory")
    place.add_argument("--prefill-chunk", type=int, default=2048, metavar="N", help="prompt tokens read at once: 2048")
    place.add_argument("--dtype", choices=("float32", "bfloat16"), help="float32 on a CPU, bfloat16 on a GPU")
    place.add_argument(
        "--kv-dtype",
        choices=("model", "int8", "fp8"),
        default="model",
        help="what the growing keys and values are kept in: --dtype unless told",
    )
    place.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1; a GPU where there is one")
    place.add_argument("--tensor", type=int, metavar="N", help="processes that share each layer: all that are started")
    place.add_argument("--pipeline", type=int, metavar="N", help="processes that share the stack of layers: 1")
    place.add_argument(
        "--sequence", type=int, metavar="N", help="processes that keep the memory of memory layers together: 1"
    )
    memory = parser.add_argument_group("memory")
    add = memory.add_argument
    add("--save-memory", metavar="FILE", help="only read the prompt, and write what the model remembers of it")
    add("--memory", metavar="FILE", help="go on behind the text of an earlier --save-memory")
    add("--memory-top-k", type=int, metavar="K", help="queries of memory layers read their K best keys: all of them")
    add("--memory-search", choices=("exact", "faiss-flat", "faiss-hnsw"), help="how these are found: exact")
    add("--memory-directory", metavar="DIR", help="keep the keys and values of memory layers in files there")
    add("--memory-device", choices=("cpu",), help="keep them in the memory of the CPU, the model on a GPU")
    add_window_flags(memory, "half of the window unless told")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # launchers add it
    return parser


def add_window_flags(group: Any, default: str) -> None:
    """How memory layers cut a long text into windows, and how much they remember, as flags of an argument group.

    default: the eviction unless told, in words.
    """

    def add(flag: str, text: str) -> None:
        group.add_argument(flag, type=int, metavar="TOKENS", help=text)

    add("--memory-eviction", f"oldest tokens that leave a full window of a model with memory layers: {default}")
    add("--last-context", "in place of it, LongLLaMA's own way: a prompt's last TOKENS are a window of their own")
    add("--memory-capacity", "memory layers remember the latest so many in front of the window: all unless told")


def window_options(options: argparse.Namespace) -> WindowOptions:
    """What the memory flags say. Raises UserError for values that cannot be with any model."""
    from megayoco.model.window_options import WindowOptions

    return WindowOptions(
        evicted=options.memory_eviction, last_context=options.last_context, capacity=options.memory_capacity
    )


def sampling(options: argparse.Namespace) -> Sampling:
    """How tokens are chosen. Raises UserError for values out of range."""
    from megayoco.generate.sampling import Sampling

    return Sampling(
        temperature=0.0 if options.greedy else 0.8 if options.temperature is None else options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        repetition_window=options.repetition_window,
        seed=options.seed,
    )


def placement(options: argparse.Namespace) -> Placement:
    """Where the model goes."""
    from megayoco.generate.opening import Placement

    return Placement(
        device=options.device,
        dtype=options.dtype,
        tensor=options.tensor,
        pipeline=options.pipeline or 1,
        sequence=options.sequence or 1,
        storage=None if options.kv_dtype == "model" else options.kv_dtype,
        windows=window_options(options),
        default_eviction=True,
        memory_top_k=options.memory_top_k,
        memory_search=options.memory_search,
        memory_directory=options.memory_directory,
        memory_device=options.memory_device,
    )


def read_prompt(options: argparse.Namespace) -> str:
    """The prompt's text, from the command line, a file or standard input.

    Raises:
        UserError: it cannot be read, or is not UTF-8.
    """
    if options.prompt_file is None:
        return str(options.prompt)
    try:
        raw = sys.stdin.buffer.read() if options.prompt_file == "-" else Path(options.prompt_file).read_bytes()
        return raw.decode("utf-8")
    except OSError as error:
        raise UserError(f"--prompt-file {options.prompt_file} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"--prompt-file {options.prompt_file} is not UTF-8 (byte {error.start}). Convert it first."
        ) from error
