"""Write text with a trained model: python -m megayoco.generate --model RUN_OR_MODEL_DIR --prompt TEXT.

The text goes to stdout as it comes, the counts and rates that follow it to stderr.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from megayoco.errors import UserError

if TYPE_CHECKING:
    import torch

    from megayoco.generate.generation import Generation


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. See python -m megayoco.generate --help.")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = _Parser(
        prog="python -m megayoco.generate", description="Continue a prompt with a trained model.", allow_abbrev=False
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="a run directory, or the folder of a model")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="repeated before its continuation; '' starts a new document")
    prompt.add_argument("--prompt-file", metavar="FILE", help="UTF-8 text; only its continuation is written")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="64 unless told")
    parser.add_argument("--temperature", type=float, metavar="T", help="0.8 unless told; 0 is greedy")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw among the K most likely tokens")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw among those that hold this share of probability")
    parser.add_argument("--seed", type=int, metavar="S", help="the same seed gives the same text")
    parser.add_argument("--greedy", action="store_true", help="always the most likely token")
    parser.add_argument("--prefill-chunk", type=int, default=2048, metavar="N", help="prompt tokens read at once: 2048")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1; a GPU where there is one")
    options = parser.parse_args(arguments)
    for flag in ("max_new_tokens", "prefill_chunk"):
        if getattr(options, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')} must be at least 1, got {getattr(options, flag)}.")
    if options.greedy and (options.temperature, options.top_k, options.top_p) != (None, None, None):
        raise UserError("--greedy draws nothing: leave out --temperature, --top-k and --top-p, or leave out --greedy.")
    return options


def choose_device(name: str | None) -> torch.device:
    """The device by its name; None: a GPU where torch sees one (unless DS_ACCELERATOR=cpu), else the CPU."""
    import torch

    if name is None:
        usable = os.environ.get("DS_ACCELERATOR", "cuda") == "cuda" and torch.cuda.is_available()
        return torch.device("cuda" if usable else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name} is no device of torch. Say cpu, cuda or cuda:1.") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: torch sees {torch.cuda.device_count()} GPUs here. Say --device cpu.")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name} is not supported. Say cpu, cuda or cuda:1.")
    return device


def read_prompt(options: argparse.Namespace) -> str:
    """The prompt's text, from the command line or a file."""
    if options.prompt_file is None:
        return str(options.prompt)
    try:
        return Path(options.prompt_file).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--prompt-file {options.prompt_file} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"--prompt-file {options.prompt_file} is not UTF-8 (byte {error.start}). Convert it first."
        ) from error


def summary(generation: Generation) -> str:
    """One line of counts, rates and the size of the cache."""
    from megayoco.model.inference import cache_bytes

    prompt, new = generation.prompt_tokens, generation.new_tokens
    prefill = prompt / generation.prefill_seconds
    # the first new token belongs to the prompt's time: it comes with the last prompt token
    decode = f"{(new - 1) / generation.decode_seconds:,.1f} tokens/s" if new > 1 else "none"
    return (
        f"prompt {prompt:,} tokens, new {new:,} tokens, prefill {prefill:,.1f} tokens/s, decode {decode},"
        f" cache {cache_bytes(generation.context):,} bytes"
    )


def run(options: argparse.Namespace) -> None:
    """Load, generate, write."""
    text = read_prompt(options)
    # late imports: help and mistakes on the command line need no torch
    from megayoco.generate.finding import read_model
    from megayoco.generate.sampling import Sampling

    temperature = 0.0 if options.greedy else 0.8 if options.temperature is None else options.temperature
    sampling = Sampling(temperature=temperature, top_k=options.top_k, top_p=options.top_p, seed=options.seed)
    device = choose_device(options.device)
    weights, tokenizer = read_model(options.model)

    import torch

    # slow: the layers bring megatron-core along. This package first, which keeps it quiet.
    import megayoco.parallel  # noqa: F401
    from megayoco.generate.generation import generate
    from megayoco.generate.loading import load_weights
    from megayoco.generate.text import TERMINAL_SAFE, TextStream

    dtype = getattr(torch, options.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    model = load_weights(weights, dtype=dtype, device=device)
    generation = generate(
        model,
        tokenizer.encode(text) or [tokenizer.eod],
        options.max_new_tokens,
        sampling,
        stop=(tokenizer.eod,),
        prefill_chunk=options.prefill_chunk,
        vocab_size=tokenizer.vocab_size,
    )
    if isinstance(sys.stdout, io.TextIOWrapper):
        # whatever the locale says; a lone surrogate of the command line's becomes "?"
        sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    table = TERMINAL_SAFE if sys.stdout.isatty() else {}
    if options.prompt:
        print(options.prompt.translate(table), end="", flush=True)
    stream = TextStream(tokenizer)
    try:
        for token in generation:
            if token != tokenizer.eod:
                print(stream.push(token).translate(table), end="", flush=True)
    except KeyboardInterrupt:
        if generation.new_tokens == 0:
            raise
    print(stream.finish(), flush=True)
    print(summary(generation), file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 2 for what the user has to change, 130 when interrupted before the first token."""
    try:
        run(parse(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # who read the text has enough; Python's own flush at exit must not complain either
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
