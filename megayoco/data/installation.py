"""Real text that every machine has: the sources and documentation of the Python installation, without network.

Documents are the sources and text files of the standard library and the documentation strings of the built-in modules,
then the same files of the installed packages. Each of the two groups is shuffled with a fixed seed, so any prefix is
mixed, and one installation gives the same documents in the same order, up to what a process has made of its built-in
modules.
"""

import importlib
import inspect
import os
import random
import site
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SUFFIXES = (".py", ".pyi", ".rst", ".txt", ".md")
# tables of numbers, binary test data, compiled files, and packages that are not the standard library
SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages", "encodings", "cjkencodings", "lib-dynload"}
MAX_FILE_BYTES = 500_000
SEED = 1234


def all_documents() -> Iterator[tuple[str, str]]:
    """(source, text) of every document, mixed within the standard library and within the packages."""
    library = [Path(sysconfig.get_path("stdlib"))]
    yield from _mixed([*_files(library, "stdlib"), *_built_in_modules()])
    packages = [Path(p) for p in {*site.getsitepackages(), sysconfig.get_path("purelib")} if os.path.isdir(p)]
    yield from _mixed(list(_files(packages, "packages")))


def library_files() -> Iterator[tuple[str, str]]:
    """(source, text) of the files of the standard library, mixed: the same text in every process of an installation,
    while the built-in modules document what a process has made of them."""
    yield from _mixed(list(_files([Path(sysconfig.get_path("stdlib"))], "stdlib")))


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
