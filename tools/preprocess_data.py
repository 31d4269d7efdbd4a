#!/usr/bin/env python
"""Turn text into Megatron's indexed datasets: PREFIX_KEY_document.bin and .idx, with a .meta.json beside them.

    python tools/preprocess_data.py --input corpus.jsonl --output-prefix data/corpus \\
        --tokenizer-type TiktokenTokenizer --tokenizer-model ranks.tiktoken --append-eod --workers 2

Input is JSON lines, plain, gzip or zstd, with the text under each of --json-keys; Parquet; text files, one document
each; folders of these; folders of Hugging Face datasets; patterns; or - for stdin. The flags have Megatron's names,
with dashes or underscores. Every document is written whole, in the order of the input, whatever the number of workers.
Empty documents are counted and not written. What looks like a special token in a document is plain text.

The first record that cannot be used ends the run with its file and line and exit code 2; --on-error skip leaves such
records out, counts them and lists them in PREFIX_skipped.jsonl. The output grows in the folder PREFIX.partial and gets
its names at the end. After an interruption the same command with --resume goes on, and the result is the same to the
byte as without the interruption.

The data layout of the official YOCO code becomes one dataset per source and a blend file PREFIX_blend.yaml:

    python tools/preprocess_data.py --yoco-data DATA --output-prefix data/mix --tokenizer-type YocoTiktokenTokenizer \\
        --tokenizer-model cl100k_base --append-eod --workers 8
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from megayoco.data.command import ProgressReport, dashed, positive_int, run_command
from megayoco.data.encode import Task, Totals
from megayoco.data.inputs import FORMATS, find_inputs
from megayoco.data.prepare import preprocess
from megayoco.data.tokenizer import add_tokenizer_arguments, tokenizer_from_arguments
from megayoco.errors import UserError

# what the tools of the Megatron family have and this one has not
REFUSED = {
    "--split-sentences": "a document is one sequence here; nothing in this project reads sentences",
    "--lang": "it belongs to --split-sentences, which is not supported",
    "--ftfy": "repair the text before; it is written as it is",
    "--find-optimal-num-workers": "give --workers the number of cores",
    "--workers-to-check": "give --workers the number of cores",
    "--max-documents": "cut the input instead, for example by head -n N and --input -",
    "--vocab-size": "the tokenizer knows its vocabulary size",
    "--tiktoken-pattern": "it stands in the file RANKS.json beside a rank file",
    "--tiktoken-num-special-tokens": "name them by --tokenizer-special-tokens, or in the file beside a rank file",
    "--seq-length": "documents are not cut; the sequence length is a setting of training",
    "--ds-drop-unfinished": "nothing is cut or dropped",
}
UNNEEDED = {
    "--keep-newlines": "newlines are always kept",
    "--keep-sequential-samples": "the order of the input is always kept",
    "--partitions": "the work is divided among --workers without partitions",
    "--num-docs": "the progress is counted in bytes of the input",
}


class Parser(argparse.ArgumentParser):
    """Says of flags that other tools of the family have why they are not here."""

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments:"):
            for flag in message.split():
                if flag.partition("=")[0] in REFUSED:
                    message = f"{flag} is not supported: {REFUSED[flag.partition('=')[0]]}. Leave it out."
                    break
            else:
                message += ". See --help for the flags there are."
        super().error(message)


def build_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    source = parser.add_argument_group("input").add_mutually_exclusive_group(required=True)
    source.add_argument("--input", nargs="+", metavar="PATH", help="files, folders, patterns, or - for stdin")
    source.add_argument("--yoco-data", metavar="DIR", help="a folder with json/train.json, as the official YOCO code")
    add = parser.add_argument
    add("--input-format", default="auto", choices=("auto", *FORMATS), help="of all inputs (auto: by content and name)")
    add("--json-keys", "--jsonl-keys", nargs="+", metavar="KEY", help="keys or columns to encode, one pair each (text)")
    add("--yoco-split", metavar="NAME", help="the split of --yoco-data: json/NAME.json (train)")
    add_tokenizer_arguments(parser)
    add("--append-eod", action="store_true", help="end every document with the end-of-document token")
    add("--allow-special", action="store_true", help="strings of special tokens in documents become these tokens")
    add("--output-prefix", required=True, metavar="PREFIX", help="writes PREFIX_KEY_document.{bin,idx,meta.json}")
    add("--overwrite", action="store_true", help="replace existing output, or begin an unfinished run again")
    add("--resume", action="store_true", help="go on with an unfinished run of this prefix, if there is one")
    add("--on-error", default="stop", choices=("stop", "skip"), help="what to do about unusable records (stop)")
    add("--max-document-mb", type=positive_int, default=128, metavar="MB", help="longest record that is read (128)")
    add("--workers", type=positive_int, default=1, metavar="N", help="processes that encode (1)")
    add("--log-interval", type=positive_int, default=1000, metavar="N", help="documents between two log lines (1000)")
    add("--dataset-impl", choices=("mmap",), help="accepted for compatibility: there is only this one")
    for flag, reason in UNNEEDED.items():
        options: dict[str, Any] = {"type": int} if flag in ("--partitions", "--num-docs") else {"action": "store_true"}
        add(flag, help=f"accepted for compatibility: {reason}", **options)
    return parser


def main(arguments: Sequence[str]) -> None:
    args = build_parser().parse_args(dashed(arguments))
    kind, model, options = tokenizer_from_arguments(args)
    keys = tuple(dict.fromkeys(args.json_keys or ["text"]))
    task = Task(
        kind,
        model,
        options,
        fields={key: (key,) for key in keys},
        append_eod=args.append_eod,
        allow_special=args.allow_special,
        skip=args.on_error == "skip",
        max_document_bytes=args.max_document_mb * 10**6,
    )
    run: dict[str, Any] = dict(workers=args.workers, overwrite=args.overwrite, resume=args.resume)
    if args.yoco_data is not None:
        _prepare_yoco(args, task, run)
        return
    if args.yoco_split is not None:
        raise UserError("--yoco-split belongs to --yoco-data, which is not given")
    inputs = find_inputs(args.input, args.input_format)
    for note in inputs.notes:
        print(f"note: {note}", file=sys.stderr)
    if len(inputs.sources) > 1:
        print(f"reading {inputs.described()} files, {inputs.size / 1e6:,.1f} MB", file=sys.stderr)
    progress = Progress(inputs.size, args.log_interval)
    try:
        totals = preprocess(inputs.sources, args.output_prefix, task, report=progress.report, **run)
    finally:
        progress.close()
    progress.summarize({f"{args.output_prefix}_{key}_document": (key, totals) for key in keys})
    _tell_skipped(args.output_prefix, totals)


def _prepare_yoco(args: argparse.Namespace, task: Task, run: Mapping[str, Any]) -> None:
    from megayoco.data.yoco_layout import prepare_layout, read_layout

    for flag, value in (("--json-keys", args.json_keys), ("--input-format", args.input_format != "auto")):
        if value:
            raise UserError(f"{flag} does not go with --yoco-data, whose layout decides it. Leave it out.")
    sources = read_layout(args.yoco_data, args.yoco_split or "train")
    progress = Progress(sum(source.inputs.size for source in sources), args.log_interval)
    try:
        done = prepare_layout(sources, args.output_prefix, task, report=progress.report, **run)
    finally:
        progress.close()
    progress.summarize({prefix: ("text", totals) for prefix, totals in done.items()})
    for (_, totals), source in zip(done.items(), sources, strict=True):
        _tell_skipped(f"{args.output_prefix}_{source.name}", totals)
    print(f"{args.output_prefix}_blend.yaml: {len(sources)} sources, for data.train")


class Progress:
    """The progress bar, and the counts behind it."""

    def __init__(self, size: int, interval: int):
        self._now = (0, 0, 0)  # documents, bytes of text, tokens
        self._before: tuple[int, int, int] | None = None  # what a resumed run found, which is none of its speed
        self._bar = ProgressReport("encoding", size, self._describe, interval)

    def report(self, totals: Totals) -> None:
        self._now = totals.records, totals.text_bytes, totals.tokens
        if self._before is None:
            self._before = self._now
        self._bar.update(totals.read, totals.records)

    def _describe(self, seconds: float) -> str:
        before = self._before or (0, 0, 0)
        rates = [(now - then) / max(seconds, 1e-9) for now, then in zip(self._now, before, strict=True)]
        speed = f"{rates[0]:,.0f} documents/s, {rates[1] / 1e6:.2f} MB/s, {rates[2]:,.0f} tokens/s"
        return f"{self._now[0]:,} documents, {speed}"

    def close(self) -> None:
        self._bar.close()

    def summarize(self, pairs: Mapping[str, tuple[str, Totals]]) -> None:
        for prefix, (key, totals) in pairs.items():
            count = totals.keys[key]
            print(
                f"{prefix}: {count.documents:,} documents, {count.tokens:,} tokens, {count.text_bytes:,} bytes of text"
                f" ({count.text_bytes / max(count.tokens, 1):.2f} per token),"
                f" {count.empty_documents:,} empty documents left out"
            )
        print(f"in {self._bar.seconds:.1f} s: {self._describe(self._bar.seconds)}")


def _tell_skipped(prefix: str, totals: Totals) -> None:
    if totals.skipped:
        print(f"warning: {totals.skipped:,} records were skipped; {prefix}_skipped.jsonl lists them", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run_command(main))
