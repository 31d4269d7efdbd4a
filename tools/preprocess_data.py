#!/usr/bin/env python
"""Turn text into Megatron's indexed datasets: PREFIX_KEY_document.bin and .idx, with a .meta.json beside them.

    python tools/preprocess_data.py --input corpus.jsonl --output-prefix data/corpus \\
        --tokenizer-type TiktokenTokenizer --tokenizer-model ranks.tiktoken --append-eod --workers 2

The flags have Megatron's names, with dashes or underscores. Input is JSON lines, plain or gzip: one object per line,
with the text under each of --json-keys. Empty documents are counted and not written. What looks like a special token
in a document is plain text. The first mistake in the input ends the run with its file and line and exit code 2; then,
and after an interruption, no file of the dataset is left that looks finished.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from megayoco.data.command import ProgressReport, dashed, positive_int, run_command
from megayoco.data.prepare import Task, Totals, find_inputs, preprocess
from megayoco.data.tokenizer import TOKENIZER_TYPES


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="FILE", help="JSONL files, plain or gzip, or patterns of them")
    add("--json-keys", nargs="+", default=["text"], metavar="KEY", help="keys to encode, one dataset each (text)")
    add("--output-prefix", required=True, metavar="PREFIX", help="writes PREFIX_KEY_document.{bin,idx,meta.json}")
    add("--tokenizer-type", required=True, choices=TOKENIZER_TYPES)
    add("--tokenizer-model", metavar="MODEL", help="rank file, or the name of a tiktoken encoding such as cl100k_base")
    add("--append-eod", action="store_true", help="end every document with the end-of-document token")
    add("--workers", type=positive_int, default=1, metavar="N", help="processes that encode (1)")
    add("--log-interval", type=positive_int, default=1000, metavar="N", help="documents between two log lines (1000)")
    add("--overwrite", action="store_true", help="replace existing output")
    return parser


def main(arguments: Sequence[str]) -> None:
    args = build_parser().parse_args(dashed(arguments))
    task = Task(args.tokenizer_type, args.tokenizer_model, tuple(dict.fromkeys(args.json_keys)), args.append_eod)
    inputs = find_inputs(args.input)
    latest = Totals(size=0)

    def describe(seconds: float) -> str:
        text = sum(count.text_bytes for count in latest.keys.values())
        tokens = sum(count.tokens for count in latest.keys.values())
        rates = [latest.lines / seconds, text / 1e6 / seconds, tokens / seconds] if seconds > 0 else [0.0, 0.0, 0.0]
        return f"{latest.lines:,} documents, {rates[0]:,.0f} documents/s, {rates[1]:.2f} MB/s, {rates[2]:,.0f} tokens/s"

    def report(totals: Totals) -> None:
        nonlocal latest
        latest = totals
        progress.update(totals.read, totals.lines)

    size = sum(os.path.getsize(path) for path in inputs)
    progress = ProgressReport("encoding", size, describe, args.log_interval)
    try:
        totals = preprocess(
            inputs, args.output_prefix, task, workers=args.workers, overwrite=args.overwrite, report=report
        )
    finally:
        progress.close()
    for key, count in totals.keys.items():
        print(
            f"{args.output_prefix}_{key}_document: {count.documents:,} documents, {count.tokens:,} tokens,"
            f" {count.text_bytes:,} bytes of text ({count.text_bytes / count.tokens:.2f} per token),"
            f" {count.empty_documents:,} empty documents left out"
        )
    print(f"in {progress.seconds:.1f} s: {describe(progress.seconds)}")


if __name__ == "__main__":
    sys.exit(run_command(main))
