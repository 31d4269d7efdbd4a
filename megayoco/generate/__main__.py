"""Write text with a trained model: python -m megayoco.generate --model RUN_OR_MODEL_DIR --prompt TEXT, or --chat; alone
or under any launcher.

The text goes to stdout as it comes, the counts and rates that follow it to stderr.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from megayoco.errors import UserError
from megayoco.generate.options import parse, placement, read_prompt, sampling

if TYPE_CHECKING:
    from megayoco.generate.generation import Generation
    from megayoco.generate.opening import Opened
    from megayoco.generate.sampling import Sampling
    from megayoco.model.inference import DecoderContext


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


def trained_length(facts: dict[str, Any]) -> int | None:
    """The longest sequences that a model was trained on, in tokens; None: nobody knows."""
    length = facts.get("sequence_length")
    return length if isinstance(length, int) else None


def length_warning(facts: dict[str, Any], prompt_tokens: int, new_tokens: int) -> str | None:
    """What to say of a text that may grow longer than all that the model was trained on; None: nothing."""
    trained = trained_length(facts)
    if trained is None or prompt_tokens + new_tokens <= trained:
        return None
    return (
        f"warning: {prompt_tokens:,} tokens of the prompt and up to {new_tokens:,} new ones exceed the {trained:,} that"
        " the model was trained to read: expect worse text beyond them."
    )


def run(options: argparse.Namespace, chosen: Sampling, prompt: str | None) -> None:
    """Load, generate, write.

    Args:
        options: the command line.
        chosen: how tokens are chosen.
        prompt: the text; None in a chat, and on ranks that the first one tells.
    """
    from megayoco.generate.opening import open_model

    opened = open_model(options.model, placement(options))
    if options.save_memory is not None:
        _remember(opened, options, opened.model.agree(prompt))
    elif options.chat:
        _chat(opened, options, chosen)
    else:
        _continue(opened, options, chosen, opened.model.agree(prompt))


def _continue(opened: Opened, options: argparse.Namespace, chosen: Sampling, text: str) -> None:
    from megayoco.generate.generation import generate
    from megayoco.generate.stopping import StopStrings

    write, report = _outlets(opened)
    tokenizer = opened.tokenizer
    tokens, (context, before) = _prompt(opened, options, text), _memory(opened, options)
    if warning := length_warning(opened.facts, _length(context) + len(tokens), options.max_new_tokens):
        report(warning)
    generation = generate(
        opened.model,
        tokens,
        options.max_new_tokens,
        chosen,
        stop=(tokenizer.eod,),
        prefill_chunk=options.prefill_chunk,
        vocab_size=tokenizer.vocab_size,
        context=context,
        history=before,
    )
    if options.prompt:
        write(options.prompt)
    shown = StopStrings(tokenizer, options.stop)
    try:
        for token in generation:
            if token != tokenizer.eod:
                write(shown.push(token))
            if shown.stopped is not None:
                break
    except KeyboardInterrupt:
        if generation.new_tokens == 0 or opened.model.topology is not None:
            raise
    write(shown.finish() + "\n")
    report(summary(generation))


def _memory(opened: Opened, options: argparse.Namespace) -> tuple[DecoderContext | None, tuple[int, ...]]:
    """What was read before the prompt, and its tokens."""
    if options.memory is None:
        return None, ()
    from megayoco.generate.memory_files import load_memory

    return load_memory(options.memory, opened.model)


def _length(context: DecoderContext | None) -> int:
    return 0 if context is None else context.length


def _prompt(opened: Opened, options: argparse.Namespace, text: str) -> list[int]:
    """The tokens of a text, at least one."""
    tokens = opened.tokenizer.encode(text)
    if options.memory is not None and not tokens:
        raise UserError("an empty prompt has no token to go on from behind --memory. Give it a character.")
    if options.save_memory is not None and not tokens:
        raise UserError("an empty prompt leaves nothing to remember to --save-memory. Give it a text.")
    return tokens or [opened.tokenizer.eod]


def _remember(opened: Opened, options: argparse.Namespace, text: str) -> None:
    """Reads a text, and writes what is remembered of it."""
    from megayoco.generate.generation import prefill
    from megayoco.generate.memory_files import check_target, save_memory
    from megayoco.model.inference import cache_bytes

    _, report = _outlets(opened)
    check_target(options.save_memory, opened.model)
    tokens, (context, before) = _prompt(opened, options, text), _memory(opened, options)
    if warning := length_warning(opened.facts, _length(context) + len(tokens), 0):
        report(warning)
    start = time.perf_counter()
    context = prefill(opened.model, tokens, chunk=options.prefill_chunk, context=context)
    seconds = time.perf_counter() - start
    save_memory(options.save_memory, context, opened.model, [*before, *tokens])
    report(
        f"read {len(tokens):,} tokens at {len(tokens) / seconds:,.1f} tokens/s; {options.save_memory} remembers"
        f" {context.length:,} tokens in {cache_bytes(context):,} bytes"
    )


def _chat(opened: Opened, options: argparse.Namespace, chosen: Sampling) -> None:
    from megayoco.generate.chat import Conversation, converse
    from megayoco.generate.chat_format import choose_format
    from megayoco.generate.finding import find_model
    from megayoco.generate.text import turn_reader

    write, report = _outlets(opened)
    read = turn_reader() if opened.rank == 0 else lambda: None
    conversation = Conversation(
        opened.model,
        opened.tokenizer,
        choose_format(options.chat_format, find_model(options.model), opened.tokenizer),
        chosen,
        options.max_new_tokens,
        stops=options.stop,
        prefill_chunk=options.prefill_chunk,
        # ranks would be interrupted at different tokens
        interruptible=opened.model.topology is None,
        memory=_memory(opened, options),
    )
    converse(
        conversation,
        lambda: opened.model.agree(read()),
        write,
        report,
        trained_length(opened.facts),
    )


def _outlets(opened: Opened) -> tuple[Callable[[str], None], Callable[[str], None]]:
    """Where the text and where lines about it go: nowhere on ranks but the first."""
    from megayoco.generate.text import terminal_writer

    if opened.rank != 0:
        return (lambda text: None), (lambda line: None)
    return terminal_writer(), lambda line: print(line, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 if another process ended, 2 for what the user has to change, 130 when interrupted
    before the first token."""
    # as torchrun and deepspeed say it: to ask all launchers takes imports of seconds, and a mistake is told at once
    rank = os.environ.get("RANK", "0")
    try:
        options = parse(arguments)
        chosen = sampling(options)
        prompt = None if options.chat or rank != "0" else read_prompt(options)
    except UserError as error:  # the same on all ranks
        if rank == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        return 130
    try:
        run(options, chosen, prompt)
    except UserError as error:
        from megayoco.parallel.agreement import AgreedError

        if rank == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        elif not isinstance(error, AgreedError):
            print(f"error (rank {rank}): {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # who read the text has enough; Python's own flush at exit must not complain either
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except RuntimeError as error:
        # a traceback here would bury the one line of the process that ended first
        if not re.search("Connection (closed|reset) by peer|remote process exited", str(error)):
            raise
        print(f"error (rank {rank}): another process has ended; its message says why.", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    try:
        code = main()
    except KeyboardInterrupt:  # while torch was imported
        code = 130
    except Exception:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # a rank that waits for threads or peers would keep the launcher from ending the others
    os._exit(code)
