#!/usr/bin/env python
"""Compare how tokenizers encode a text, side by side.

    python tools/tokenizer_report.py --input corpus.jsonl --tokenizer TiktokenTokenizer:ranks.tiktoken \\
        --tokenizer HuggingFaceTokenizer:llama/tokenizer.json,eod_token=</s> --tokenizer ByteTokenizer

A tokenizer is TYPE, TYPE:MODEL or TYPE:MODEL,OPTION=VALUE. The input is what tools/preprocess_data.py reads.

tokens / character and tokens / byte are over all text together: fewer is better, and makes a fixed number of tokens
hold more text. A sample is a document. Fallback tokens stand for a part of a character, or for one that the vocabulary
lacks: where their share is high, the vocabulary does not know the script. Ids that are never produced are rows of the
embedding that such text does not train. Speed is of one process, and depends on the machine.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from megayoco.data.command import ProgressReport, dashed, run_command
from megayoco.data.encode import read_documents
from megayoco.data.files import write_text_atomically
from megayoco.data.inputs import find_inputs
from megayoco.data.tokenizer import Tokenizer, build_tokenizer
from megayoco.data.tokenizer.report import Measurement, measure
from megayoco.errors import UserError


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="FILE", help="files, folders, patterns, or - for stdin")
    add("--json-keys", nargs="+", default=["text"], metavar="KEY", help="keys that hold text (text)")
    add("--tokenizer", action="append", required=True, metavar="TYPE[:MODEL]", help="a tokenizer; may be repeated")
    add("--max-mb", type=float, metavar="N", help="stop after N million characters (all)")
    add("--examples", type=int, default=10, metavar="N", help="ids never produced that are listed (10)")
    add("--json", metavar="FILE", help="also write the report as JSON")
    args = parser.parse_args(dashed(arguments))
    if args.max_mb is not None and args.max_mb <= 0:
        raise UserError(f"--max-mb must be above 0, got {args.max_mb}")

    tokenizers = [parse_tokenizer(text) for text in args.tokenizer]
    inputs = find_inputs(args.input)
    for note in inputs.notes:
        print(f"note: {note}", file=sys.stderr)
    measurements: list[Measurement] = []
    progress = ProgressReport("measuring", 1.0, lambda _: f"{characters(measurements) / 1e6:.1f} M characters", 50)
    try:
        documents = at_most(read_documents(inputs.sources, args.json_keys), args.max_mb)
        for step, measurements in enumerate(measure(tokenizers, documents), 1):
            progress.update(min(characters(measurements) / ((args.max_mb or inputs.size / 1e6) * 1e6 + 1), 1), step)
    finally:
        progress.close()
    summaries = [measurement.summary(args.examples) for measurement in measurements]
    if args.json is not None:
        write_text_atomically(args.json, json.dumps(summaries, indent=2, ensure_ascii=False) + "\n")
    print_report(args.tokenizer, summaries)


def parse_tokenizer(text: str) -> Tokenizer:
    """The tokenizer of TYPE[:MODEL][,OPTION=VALUE]. Raises UserError if there is none."""
    name, *pairs = text.split(",")
    kind, _, model = name.partition(":")
    if any("=" not in pair for pair in pairs):
        raise UserError(f"--tokenizer {text}: expected TYPE:MODEL,OPTION=VALUE, for example eod_token=</s>")
    try:
        return build_tokenizer(kind, model or None, dict(pair.split("=", 1) for pair in pairs))
    except UserError as error:
        raise UserError(f"--tokenizer {text}: {error}") from error


def at_most(documents: Iterator[tuple[str, str]], millions: float | None) -> Iterator[tuple[str, str]]:
    """The documents until they hold so many million characters."""
    left = float("inf") if millions is None else millions * 1e6
    for place, text in documents:
        yield place, text
        left -= len(text)
        if left <= 0:
            return


def characters(measurements: Sequence[Measurement]) -> int:
    return measurements[0].characters if measurements else 0


def print_report(names: Sequence[str], summaries: Sequence[dict[str, Any]]) -> None:
    """One column per tokenizer, one row per measure."""
    first = summaries[0]
    print(f"{first['documents']:,} documents, {first['characters']:,} characters, {first['bytes']:,} bytes")
    table = Table()
    table.add_column("", no_wrap=True)
    for name in names:
        kind, _, model = name.partition(":")
        table.add_column(f"{kind}\n{os.path.basename(model)}", justify="right", overflow="fold")
    rows: list[tuple[str, Any]] = [
        ("ids", lambda s: f"{s['tokenizer']['vocab_size']:,}"),
        ("tokens", lambda s: f"{s['tokens']:,}"),
        ("tokens / character", lambda s: f"{s['tokens_per_character']:.4f}"),
        ("tokens / byte", lambda s: f"{s['tokens_per_byte']:.4f}"),
        ("tokens / sample, mean", lambda s: f"{s['tokens_per_sample']['mean']:,.1f}"),
        ("median", lambda s: f"{s['tokens_per_sample']['median']:,.0f}"),
        ("95 %", lambda s: f"{s['tokens_per_sample']['p95']:,.0f}"),
        ("max", lambda s: f"{s['tokens_per_sample']['max']:,}"),
        ("fallback tokens", lambda s: f"{s['fallback_share']:.2%}"),
        ("ids never produced", lambda s: f"{s['never_produced']['count']:,} of {s['never_produced']['of']:,}"),
        ("such as", lambda s: " ".join(repr(token) for token in s["never_produced"]["examples"].values())),
        ("MB/s, one process", lambda s: f"{s['megabytes_per_second']:.1f}"),
    ]
    for label, value in rows:
        table.add_row(label, *(value(summary) for summary in summaries))
    Console().print(table, markup=False)


if __name__ == "__main__":
    sys.exit(run_command(main))
