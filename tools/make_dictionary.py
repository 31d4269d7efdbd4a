#!/usr/bin/env python
"""Write documents for dictionary lookup: definitions of random keys, then questions about them.

    python tools/make_dictionary.py --output dictionary.jsonl --documents 20000 --tokens 512 --keys 1 32

Half of a document defines, half asks (`python -m megayoco.evaluate dictionary --help`; Focused Transformer,
arXiv 2307.03170, section 4.1). A document with few keys repeats them, so most of it can be looked up: that is where a
model learns to. Every document has exactly --tokens symbols, each a token of ByteTokenizer: documents of
the training length, prepared without --append-eod, fill one sample each. One JSON object per line, with a text. The
same arguments always give the same file.
"""

import argparse
import json
import math
import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path

from megayoco.data.command import dashed, positive_int, run_command
from megayoco.errors import UserError
from megayoco.evaluate.dictionary import Shape, dictionary


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--output", required=True, metavar="FILE", help="the JSONL file to write")
    add("--documents", type=positive_int, required=True, metavar="N", help="how many documents")
    add("--tokens", type=positive_int, required=True, metavar="N", help="symbols of each")
    add("--question-tokens", type=positive_int, metavar="N", help="the last symbols, which ask (half of --tokens)")
    add("--key-tokens", type=positive_int, default=3, metavar="N", help="symbols of a key (3)")
    add("--value-tokens", type=positive_int, default=3, metavar="N", help="symbols of a value (3)")
    add(
        "--keys",
        type=positive_int,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="different keys of a document, small numbers as likely as large ones on a logarithmic scale (all differ)",
    )
    add("--seed", type=int, default=1234, metavar="N", help="number that all choices follow from (1234)")
    add("--overwrite", action="store_true", help="replace an existing file")
    args = parser.parse_args(dashed(arguments))
    output = Path(args.output)
    if output.is_dir():
        raise UserError(f"{output} is a folder. Name a file for --output.")
    if output.exists() and not args.overwrite:
        raise UserError(f"{output} exists. Choose another --output, or give --overwrite to replace it.")
    if args.keys and args.keys[0] > args.keys[1]:
        raise UserError(f"--keys {args.keys[0]} {args.keys[1]} must ascend")
    questions = args.question_tokens or args.tokens // 2
    shape, generator = Shape(args.key_tokens, args.value_tokens), random.Random(args.seed)
    temporary = output.with_name(f"{output.name}.tmp-{os.getpid()}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            for _ in range(args.documents):
                keys = args.keys and round(math.exp(generator.uniform(*map(math.log, args.keys))))
                text = dictionary(generator, args.tokens, questions, shape, keys)
                file.write(json.dumps({"text": text}) + "\n")
        os.replace(temporary, output)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)
    print(f"{output}: {args.documents:,} documents of {args.tokens:,} tokens")


if __name__ == "__main__":
    sys.exit(run_command(main))
