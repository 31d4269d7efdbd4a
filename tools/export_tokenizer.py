#!/usr/bin/env python
"""Write a tokenizer as files that transformers loads, with the same ids for every text.

    python tools/export_tokenizer.py --tokenizer-model ranks.tiktoken --output tokenizer

    from transformers import AutoTokenizer
    AutoTokenizer.from_pretrained("tokenizer")

Writes OUTPUT/tokenizer.json and tokenizer_config.json, after it has compared both tokenizers on text in many scripts.
The token that ends documents becomes the eos_token. transformers turns names of special tokens in a text into these
tokens, unless called with split_special_tokens=True; in prepared data they are plain text.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megayoco.data.command import dashed, run_command
from megayoco.data.tokenizer import add_tokenizer_arguments, build_tokenizer, tokenizer_from_arguments
from megayoco.data.tokenizer.export import FILES, write_for_transformers
from megayoco.errors import UserError


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the files")
    parser.add_argument("--overwrite", action="store_true", help="replace the files of an older export")
    add_tokenizer_arguments(parser, required=False)
    parser.set_defaults(tokenizer_type="TiktokenTokenizer")
    args = parser.parse_args(dashed(arguments))

    tokenizer = build_tokenizer(*tokenizer_from_arguments(args))
    folder = Path(args.output)
    for name in FILES:
        if (folder / name).exists() and not args.overwrite:
            raise UserError(f"{folder / name} exists. Choose another --output, or give --overwrite to replace it.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}") from error
    write_for_transformers(tokenizer, folder)
    print(
        f"{folder}: {tokenizer.vocab_size:,} ids, of which {tokenizer.eod} ends a document;"
        f" model.vocab_size >= {tokenizer.vocab_size}"
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
