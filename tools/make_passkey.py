#!/usr/bin/env python
"""Write documents that teach a model to find the pass key: sentences that repeat, a number in them, questions about it.

    python tools/make_passkey.py --output passkey.jsonl --documents 20000 --characters 512

In the words of `python -m megayoco.evaluate passkey` (Landmark Attention, arXiv 2305.16300; LongLLaMA,
arXiv 2307.03170), but with more of what can be looked up: each document states its key more than once and asks for it
more than once, a question at the end. Every document has exactly --characters characters, each a token of
ByteTokenizer: documents of the training length, prepared without --append-eod, fill one sample each. One JSON object
per line, with a text. The same arguments always give the same file.
"""

import argparse
import json
import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path

from megayoco.data.command import dashed, positive_int, run_command
from megayoco.errors import UserError
from megayoco.evaluate.passkey import INSTRUCTION, LARGEST_KEY, QUESTION, filler, key_line

WITH_INSTRUCTION = 0.3
"""Share of the documents that begin with the instruction, where it fits."""
SHORTEST = 128
"""Characters that hold a key and a question about it."""


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--output", required=True, metavar="FILE", help="the JSONL file to write")
    add("--documents", type=positive_int, required=True, metavar="N", help="how many documents")
    add("--characters", type=positive_int, required=True, metavar="N", help="characters of each")
    add("--longest-filler", type=positive_int, default=90, metavar="N", help="characters between two lines (90)")
    add("--without-key", action="store_true", help="filler alone: what a memory is to pass over")
    add("--seed", type=int, default=1234, metavar="N", help="number that all choices follow from (1234)")
    add("--overwrite", action="store_true", help="replace an existing file")
    args = parser.parse_args(dashed(arguments))
    output = Path(args.output)
    if args.characters < SHORTEST:
        raise UserError(f"--characters {args.characters} has no room for a key and a question: give {SHORTEST} or more")
    if output.is_dir():
        raise UserError(f"{output} is a folder. Name a file for --output.")
    if output.exists() and not args.overwrite:
        raise UserError(f"{output} exists. Choose another --output, or give --overwrite to replace it.")
    generator, make = random.Random(args.seed), make_filler if args.without_key else make_document
    temporary = output.with_name(f"{output.name}.tmp-{os.getpid()}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            for _ in range(args.documents):
                text = make(generator, args.characters, args.longest_filler)
                file.write(json.dumps({"text": text}) + "\n")
        os.replace(temporary, output)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)
    print(f"{output}: {args.documents:,} documents of {args.characters:,} characters")


def make_document(generator: random.Random, characters: int, longest_filler: int) -> str:
    """Filler, the key, then more filler, the key again and questions in any order, a question last."""
    # keys of any number of digits alike: short ones are rare among numbers, and would be copied on past their end
    key = generator.randint(1, min(10 ** generator.randint(1, 5), LARGEST_KEY))
    line, asked = f"{key_line(key)}\n", f"{QUESTION} {key}.\n"
    last = asked * generator.randint(1, 2)
    if characters < 2 * SHORTEST:
        last = asked
    room = characters - len(line) - len(last)
    parts = [line]
    if generator.random() < WITH_INSTRUCTION and len(INSTRUCTION) < room:
        parts.insert(0, f"{INSTRUCTION}\n")
        room -= len(parts[0])
    at = len(parts) - 1  # before the first statement of the key there is only filler
    while True:
        kind = generator.random()
        piece = f"{filler(generator.randint(1, longest_filler))}\n" if kind < 0.4 else line if kind < 0.6 else asked
        if len(piece) > room:
            break
        room -= len(piece)
        if kind < 0.4 and generator.random() < 0.3:
            parts.insert(at, piece)
        else:
            parts.append(piece)
    if room:
        parts.insert(at, f"{filler(room - 1)}\n")
    return "".join(parts) + last


def make_filler(generator: random.Random, characters: int, longest_filler: int) -> str:
    """Lines of filler, half of them as long as the evaluation's."""
    text = ""
    while len(text) < characters:
        text += f"{filler(generator.choice((characters, generator.randint(1, longest_filler))))}\n"
    return text[:characters]


if __name__ == "__main__":
    sys.exit(run_command(main))
