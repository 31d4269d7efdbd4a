#!/usr/bin/env python
"""Write a corpus of real text from the Python installation itself; needs no network.

    python tools/make_corpus.py --output corpus.jsonl [--max-mb 20]

Documents are the sources and text files of the standard library and the documentation strings of the built-in modules,
then, if that is not enough, the same files of the installed packages. One JSON object per line: text and source. Each
of the two groups is shuffled with a fixed seed, so any prefix is mixed, and one installation gives one corpus.
"""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megayoco.data.command import ProgressReport, dashed, run_command
from megayoco.data.installation import all_documents
from megayoco.errors import UserError


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output", required=True, metavar="FILE", help="the JSONL file to write")
    parser.add_argument("--max-mb", type=float, default=20.0, metavar="MB", help="megabytes of text at most (20)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    args = parser.parse_args(dashed(arguments))
    if not 0 < args.max_mb < float("inf"):
        raise UserError(f"--max-mb must be above 0, got {args.max_mb}")
    output = Path(args.output)
    if output.is_dir():
        raise UserError(f"{output} is a folder. Name a file for --output.")
    if output.exists() and not args.overwrite:
        raise UserError(f"{output} exists. Choose another --output, or give --overwrite to replace it.")
    write_corpus(output, int(args.max_mb * 1e6))


def write_corpus(output: Path, max_bytes: int) -> None:
    """Write documents until max_bytes of text are reached; the last one is cut at the limit, at the end of a line."""
    temporary = output.with_name(f"{output.name}.tmp-{os.getpid()}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}") from error
    documents = written = 0
    progress = ProgressReport("corpus", max_bytes, lambda s: f"{documents:,} documents, {written / 1e6:.1f} MB", 1000)
    seen: set[bytes] = set()
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            for source, text in all_documents():
                digest = hashlib.sha256(text.encode()).digest()
                if digest in seen:  # the same licence, the same empty __init__
                    continue
                seen.add(digest)
                text = cut(text, max_bytes - written)
                if text:
                    file.write(json.dumps({"text": text, "source": source}, ensure_ascii=False) + "\n")
                    documents, written = documents + 1, written + len(text.encode())
                    progress.update(written, documents)
                if not text or written >= max_bytes:
                    break
        os.replace(temporary, output)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}") from error
    finally:
        progress.close()
        temporary.unlink(missing_ok=True)
    print(f"{output}: {documents:,} documents, {written:,} bytes of text")
    if written < 0.99 * max_bytes:
        print(
            f"note: this installation holds {written / 1e6:.1f} MB of text, {max_bytes / 1e6:.1f} MB were asked for",
            file=sys.stderr,
        )


def cut(text: str, limit: int) -> str:
    """At most `limit` bytes of the text, whole lines of it."""
    if len(text.encode()) <= limit:
        return text
    kept = text.encode()[: max(limit, 0)].decode("utf-8", "ignore")
    return kept[: kept.rfind("\n") + 1]


if __name__ == "__main__":
    sys.exit(run_command(main))
