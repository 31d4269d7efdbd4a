#!/usr/bin/env python
"""Say what indexed datasets hold, and whether they are whole.

    python tools/inspect_dataset.py data/corpus_text_document
    python tools/inspect_dataset.py data/corpus_text_document --check --samples 3 --png lengths.png
    python tools/inspect_dataset.py data --check --json

Shows documents, tokens, tokenizer, the lengths of the sequences (a document is one sequence, unless it was split into
sentences) and, by --samples, text. The index is always read as a whole; --check reads every token too: ids that are no
ids of the tokenizer, documents that do not end as they should, and a meta file that says something else are found.
Damage is printed and ends the run with exit code 2. Memory stays small whatever the size.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from megayoco.data.command import ProgressReport, dashed, positive_int, run_command
from megayoco.data.inspect import Excerpt, Summary, inspect_pair
from megayoco.data.lengths import Lengths
from megayoco.data.merge import describe
from megayoco.data.pair import find_pairs
from megayoco.data.tokenizer import Tokenizer, add_tokenizer_arguments, build_tokenizer, tokenizer_from_arguments
from megayoco.errors import UserError


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("prefixes", nargs="+", metavar="PREFIX", help="datasets, or a folder of them")
    add("--check", action="store_true", help="read every token, not only a few of some documents")
    add("--vocab-size", type=positive_int, metavar="N", help="ids must be below N (the tokenizer's vocabulary)")
    add("--samples", type=positive_int, default=0, metavar="N", help="show the beginning and end of N sequences (0)")
    add("--sample-tokens", type=positive_int, default=64, metavar="N", help="tokens shown of a beginning (64)")
    add("--seed", type=int, default=0, help="draws the samples (0)")
    add("--png", metavar="FILE", help="draw the lengths; needs matplotlib")
    add("--json", action="store_true", help="print one JSON list instead of tables")
    add_tokenizer_arguments(parser, required=False)
    return parser


def main(arguments: Sequence[str]) -> None:
    args = build_parser().parse_args(dashed(arguments))
    tokenizer = None
    if args.tokenizer_type is not None:
        tokenizer = build_tokenizer(*tokenizer_from_arguments(args))
    prefixes, leftovers = find_pairs(args.prefixes)
    summaries = []
    for prefix in prefixes:
        summaries.append(inspect(prefix, args, tokenizer))
        if not args.json:
            print_summary(summaries[-1])
    if args.json:
        print(json.dumps([summary.as_json() for summary in summaries], indent=2))
    elif len(summaries) > 1:
        print(f"{len(summaries)} datasets: {_totals(summaries)}")
    for path in leftovers:
        print(f"note: {path} is of a run that has not finished", file=sys.stderr)
    if args.png is not None:
        draw_lengths(summaries, args.png)
    damaged = [summary for summary in summaries if summary.damage]
    if damaged:
        others = sum(len(summary.damage) for summary in damaged) - 1
        more = f" (and {others} more)" if others else ""
        raise UserError(f"{len(damaged)} of {len(summaries)} datasets damaged. {damaged[0].damage[0]}{more}")


def inspect(prefix: str, args: argparse.Namespace, tokenizer: Tokenizer | None) -> Summary:
    """One dataset, with a progress bar if every token is read."""
    billions = 0.0
    progress: ProgressReport | None = None

    def report(done: int, total: int) -> None:
        nonlocal progress, billions
        if progress is None:
            progress = ProgressReport(prefix, 1.0, lambda seconds: f"{billions:.2f} billion tokens", 1000)
        billions = done / 1e9
        progress.update(done / max(total, 1), done // 1_000_000)

    try:
        return inspect_pair(
            prefix,
            check=args.check,
            tokenizer=tokenizer,
            vocab_size=args.vocab_size,
            samples=args.samples,
            excerpt_tokens=args.sample_tokens,
            seed=args.seed,
            report=report,
        )
    finally:
        if progress is not None:
            progress.close()


def print_summary(summary: Summary) -> None:
    """A dataset as text, the histogram as a table."""
    print(summary.prefix)
    for name, text in _rows(summary):
        print(f"  {name:<12}{text}")
    if summary.lengths is not None and summary.lengths.bins:
        Console().print(histogram(summary.lengths, _unit(summary)))
    for one in summary.excerpts:
        print_excerpt(one, _unit(summary))
    for text in summary.notes:
        print(f"  note: {text}")
    for text in summary.damage:
        print(f"  DAMAGE: {text}")
    print()


def _rows(summary: Summary) -> list[tuple[str, str]]:
    rows = []
    meta = summary.meta or {}
    if summary.tokens is not None:
        documents = f"{summary.documents:,}"
        if summary.empty_documents:
            documents += f", {summary.empty_documents:,} of them empty"
        if summary.sequences != summary.documents:
            documents += f", in {summary.sequences:,} sequences"
        tokens = f"{summary.tokens:,} {summary.dtype}, {_size(summary.bin_bytes)}"
        rows += [("documents", documents), ("tokens", tokens)]
    if meta.get("tokenizer"):
        rows.append(("tokenizer", f"{describe(meta['tokenizer'])}, end of document {meta['tokenizer'].get('eod')}"))
    if "text_bytes" in meta and summary.tokens:
        per_token = meta["text_bytes"] / summary.tokens
        left_out = f", {meta['empty_documents']:,} empty documents left out" if meta.get("empty_documents") else ""
        rows.append(("text", f"{_size(meta['text_bytes'])}, {per_token:.2f} bytes per token{left_out}"))
    if "sources" in meta:
        rows.append(("inputs", f"{len(meta['sources']):,}, key {meta.get('key', '?')}"))
    content = summary.content
    if content is not None and content.tokens:
        seen = "all tokens read" if content.whole else f"{content.tokens:,} tokens sampled, --check reads all"
        rows.append(("ids", f"{content.low} to {content.high} ({seen})"))
        if content.ends_with_eod is not None:
            rows.append(("endings", f"{content.ends_with_eod:,} of {content.ends:,} with the end of document"))
    if summary.lengths is not None and summary.lengths.quantiles:
        quantiles = ", ".join(f"{name} {value:,}" for name, value in summary.lengths.quantiles.items())
        rows += [
            ("lengths", f"mean {summary.lengths.mean:,.1f}, {quantiles}"),
            ("", f"half of the tokens are in {_unit(summary)} of {summary.lengths.half_of_tokens:,} tokens or more"),
        ]
    return rows


def histogram(lengths: Lengths, unit: str) -> Table:
    """Sequences and tokens by powers of two of the length."""
    table = Table("tokens", unit, "share", "of tokens", "", box=None, padding=(0, 0, 0, 2))
    for column in table.columns[:4]:
        column.justify, column.no_wrap = "right", True
    sequences, tokens = (sum(getattr(b, name) for b in lengths.bins) for name in ("sequences", "tokens"))
    largest = max(b.sequences for b in lengths.bins)
    for one in filter(lambda one: one.sequences, lengths.bins):
        table.add_row(
            f"{one.low:,}" if one.low == one.high else f"{one.low:,}-{one.high:,}",
            f"{one.sequences:,}",
            f"{one.sequences / sequences:.1%}",
            f"{one.tokens / max(tokens, 1):.1%}",
            "█" * round(24 * one.sequences / largest) or "▏",
        )
    return table


def print_excerpt(one: Excerpt, unit: str) -> None:
    """Text as Python would spell it, so that no control character reaches the terminal; without tokenizer the ids."""
    left_out = one.length - len(one.head) - len(one.tail)
    head, tail = (
        (repr(one.head_text), repr(one.tail_text)) if one.head_text is not None else (str(one.head), str(one.tail))
    )
    print(f"  {unit[:-1]} {one.sequence:,} of {one.length:,} tokens: {head}")
    if one.tail:
        print(f"    ... {left_out:,} tokens ... {tail}" if left_out else f"    {tail}")


def draw_lengths(summaries: Sequence[Summary], path: str) -> None:
    """Shares of sequences and of tokens over the length, one line per dataset, as PNG.

    Raises:
        UserError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("--png needs matplotlib. Install it: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = [s for s in summaries if s.lengths is not None and s.lengths.bins]
    if not drawn:
        raise UserError(f"{path} was not drawn: no dataset has lengths that can be read")
    low = min(s.lengths.bins[0].low for s in drawn if s.lengths)
    high = max(s.lengths.bins[-1].high for s in drawn if s.lengths)
    powers = range(low.bit_length(), high.bit_length() + 1)
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.5), sharex=True, layout="constrained")
    for axis, name in zip(axes, ("sequences", "tokens"), strict=True):
        for summary in drawn:
            assert summary.lengths is not None
            counts = {b.high.bit_length(): getattr(b, name) for b in summary.lengths.bins}
            total = max(sum(counts.values()), 1)
            shares = [100 * counts.get(power, 0) / total for power in powers]
            label = f"{os.path.basename(summary.prefix)} ({total:,} {name})"
            axis.stairs(shares, [p - 0.5 for p in (*powers, powers[-1] + 1)], fill=len(drawn) == 1, label=label)
        axis.set_xlabel("tokens of a sequence, at least")
        axis.set_ylabel(f"% of {name}")
        axis.set_xticks(list(powers), [f"{1 << power >> 1:,}" for power in powers], rotation=45, ha="right")
        axis.legend(fontsize="small")
    try:
        figure.savefig(path, format="png", dpi=120)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    finally:
        pyplot.close(figure)
    print(f"{path}: lengths of {len(drawn)} datasets", file=sys.stderr)


def _unit(summary: Summary) -> str:
    return "documents" if summary.sequences == summary.documents else "sequences"


def _totals(summaries: Sequence[Summary]) -> str:
    documents, tokens = (sum(getattr(s, name) or 0 for s in summaries) for name in ("documents", "tokens"))
    return f"{documents:,} documents, {tokens:,} tokens, {_size(sum(s.bin_bytes or 0 for s in summaries))}"


def _size(count: int | None) -> str:
    number = float(count or 0)
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if number < 1000 or unit == "TB":
            break
        number /= 1000
    return f"{number:,.0f} {unit}" if unit == "bytes" else f"{number:,.1f} {unit}"


if __name__ == "__main__":
    sys.exit(run_command(main))
