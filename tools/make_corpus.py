#!/usr/bin/env python
"""Write a corpus of real text from the Python installation itself; needs no network.

    python tools/make_corpus.py --output corpus.jsonl [--max-mb 20]

Documents are the sources and text files of the standard library and the documentation strings of the built-in modules,
then, if that is not enough, the same files of the installed packages. One JSON object per line: text and source. Each
of the two groups is shuffled with a fixed seed, so any prefix is mixed, and one installation always gives one corpus.
"""

import argparse
import hashlib
import importlib
import inspect
import json
import os
import random
import site
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from megayoco.data.command import ProgressReport, dashed, run_command
from megayoco.errors import UserError

SUFFIXES = (".py", ".pyi", ".rst", ".txt", ".md")
# tables of numbers, binary test data, compiled files, and packages that are not the standard library
SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages", "encodings", "cjkencodings", "lib-dynload"}
MAX_FILE_BYTES = 500_000
SEED = 1234


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


def all_documents() -> Iterator[tuple[str, str]]:
    """(source, text) of every document, mixed within the standard library and within the packages."""
    library = [Path(sysconfig.get_path("stdlib"))]
    yield from _mixed([*_files(library, "stdlib"), *_built_in_modules()])
    packages = [Path(p) for p in {*site.getsitepackages(), sysconfig.get_path("purelib")} if os.path.isdir(p)]
    yield from _mixed(list(_files(packages, "packages")))


def cut(text: str, limit: int) -> str:
    """At most `limit` bytes of the text, whole lines of it."""
    if len(text.encode()) <= limit:
        return text
    kept = text.encode()[: max(limit, 0)].decode("utf-8", "ignore")
    return kept[: kept.rfind("\n") + 1]


def read_text(path: Path) -> str:
    """The text of a file, empty if it is not UTF-8 text of a usual size."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            return ""
        text = path.read_bytes().decode("utf-8").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError):
        return ""
    return "" if "\0" in text or not text.strip() else text


def _mixed(entries: list[tuple[str, Path | None]]) -> Iterator[tuple[str, str]]:
    random.Random(SEED).shuffle(entries)
    for source, path in entries:
        text = read_text(path) if path is not None else module_documentation(source.partition(":")[2])
        if text:
            yield source, text


def _files(roots: list[Path], group: str) -> list[tuple[str, Path | None]]:
    found: dict[str, Path | None] = {}
    for root in sorted(roots):
        for folder, folders, names in os.walk(root):
            folders[:] = sorted(name for name in folders if name not in SKIPPED_FOLDERS)
            for name in sorted(names):
                if name.endswith(SUFFIXES):
                    path = Path(folder, name)
                    found.setdefault(f"{group}/{path.relative_to(root).as_posix()}", path)
    return list(found.items())


def _built_in_modules() -> list[tuple[str, Path | None]]:
    return [(f"module:{name}", None) for name in sorted(sys.builtin_module_names) if not name.startswith("_test")]


def module_documentation(name: str) -> str:
    """The documentation strings of a module without source: its own, and those of what it holds."""
    module = importlib.import_module(name)
    parts = [f"{name}\n\n{module.__doc__ or ''}"]
    for member, value in sorted(vars(module).items()):
        if member.startswith("__") or not (callable(value) or inspect.isclass(value)):
            continue
        parts.append(f"{name}.{member}\n\n{inspect.getdoc(value) or ''}")
        if inspect.isclass(value):
            methods = sorted(vars(value).items())
            parts += [f"{name}.{member}.{m}\n\n{d}" for m, f in methods if (d := inspect.getdoc(f)) and m[0] != "_"]
    return "\n\n\n".join(part.strip() for part in parts) + "\n"


if __name__ == "__main__":
    sys.exit(run_command(main))
