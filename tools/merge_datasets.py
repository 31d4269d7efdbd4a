#!/usr/bin/env python
"""Put indexed datasets one after the other into one: OUTPUT_PREFIX.bin, .idx and .meta.json.

    python tools/merge_datasets.py --input data/part-1_text_document data/part-2_text_document \\
        --output-prefix data/all_text_document
    python tools/merge_datasets.py --input data/parts --output-prefix data/all_text_document

--input takes prefixes, and folders, of which every pair is merged, in the order of the file names. The documents keep
their order and their borders. Datasets made with different tokenizers are refused, and so are damaged ones and folders
in which a run has left something unfinished. Memory stays small whatever the size. Before the end, and after an error,
there is no file that looks finished.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from megayoco.data.command import ProgressReport, dashed, run_command
from megayoco.data.merge import merge_pairs
from megayoco.data.pair import find_pairs
from megayoco.errors import UserError


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="PREFIX", help="datasets to merge, or a folder of them")
    add("--output-prefix", required=True, metavar="PREFIX", help="writes PREFIX.{bin,idx,meta.json}")
    add("--overwrite", action="store_true", help="replace an existing dataset")
    add(
        "--assume-same-tokenizer",
        action="store_true",
        help="merge although the meta files name different tokenizers, or only some name one",
    )
    return parser


def main(arguments: Sequence[str]) -> None:
    args = build_parser().parse_args(dashed(arguments))
    prefixes, leftovers = find_pairs(args.input)
    own = f"{os.path.realpath(args.output_prefix)}."  # of an earlier try of the same command, about to be replaced
    leftovers = [path for path in leftovers if not os.path.realpath(path).startswith(own)]
    if leftovers:
        raise UserError(
            f"{leftovers[0]} is of a run that has not finished, so its dataset would be missing. Finish or remove it,"
            " or name the prefixes to merge instead of the folder."
        )
    megabytes = 0.0

    def describe(seconds: float) -> str:
        return f"{megabytes:,.0f} million tokens, {megabytes / seconds if seconds else 0:,.0f} million/s"

    def report(done: int, total: int) -> None:
        nonlocal megabytes
        megabytes = done / 1e6
        progress.update(done / max(total, 1), int(megabytes))

    progress = ProgressReport("merging", 1.0, describe, 1000)
    try:
        merged = merge_pairs(
            prefixes,
            args.output_prefix,
            overwrite=args.overwrite,
            assume_same_tokenizer=args.assume_same_tokenizer,
            report=report,
        )
    finally:
        progress.close()
    print(
        f"{args.output_prefix}: {merged.num_documents:,} documents, {merged.num_tokens:,} tokens, {merged.dtype},"
        f" of {len(prefixes)} datasets in this order: {', '.join(prefixes)}"
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
