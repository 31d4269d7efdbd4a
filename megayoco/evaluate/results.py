"""The folder of an evaluation's results, which an interrupted evaluation goes on with.

    settings.json   what was evaluated, and how: what is in the folder belongs to it
    samples.jsonl   one line per prompt or document, in the order they were done
    results.json    summary, table, options, model, versions, date, command
    table.csv       the table
    *.png           pictures of it

Files but samples.jsonl appear whole or not at all.
"""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megayoco import __version__
from megayoco.convert.folder import strangers
from megayoco.data.files import read_json_object, write_text_atomically
from megayoco.errors import UserError
from megayoco.evaluate.subject import Subject

SETTINGS, SAMPLES, RESULTS, TABLE = "settings.json", "samples.jsonl", "results.json", "table.csv"
SPEED_ONLY = ("prefill_chunk",)
"""Options that change no result: they may differ when an evaluation is resumed."""
_OURS = (SETTINGS, RESULTS, TABLE, "samples*.jsonl", "*.png", "*.tmp-*", ".*.png.*")
_PACKAGES = ("torch", "numpy", "deepspeed", "megatron-core")


def settings_of(name: str, options: Any, subject: Subject, **more: Any) -> dict[str, Any]:
    """What decides the results of an evaluation, JSON-able: its name, options, the model and `more`."""
    kept = {key: value for key, value in asdict(options).items() if key not in SPEED_ONLY}
    settings = {"evaluation": name, "options": kept, "model": dict(subject.identity), **more}
    return json.loads(json.dumps(settings))  # type: ignore[no-any-return]  # as it will be read back


def check(path: Path, overwrite: bool) -> None:
    """Look at a folder before the work begins.

    Args:
        path: the folder, which need not exist.
        overwrite: whether the results in it are to be deleted.

    Raises:
        UserError: it is a file, or holds no results, or something besides them that would be in the way.
    """
    if not path.exists():
        return
    if not path.is_dir():
        raise UserError(f"--output {path} is a file. Name a folder.")
    names = sorted(os.listdir(path))
    if names and SETTINGS not in names:
        raise UserError(f"--output {path} is not empty and holds no results of an evaluation. Name another folder.")
    if overwrite and (strange := strangers(names, _OURS)):
        raise UserError(
            f"--output {path} holds {strange[0]}, which is none of its results. Move it, or name another folder."
        )


def clear(path: Path) -> None:
    """Delete the results in a folder, for `--overwrite`. Raises UserError as `check` does."""
    check(path, overwrite=True)
    # the settings last: without them the rest would be nobody's
    for name in sorted(os.listdir(path) if path.exists() else [], key=SETTINGS.__eq__):
        (path / name).unlink()


class ResultsFolder:
    """One folder of results.

    Args:
        path: the folder; made when it is opened.
        settings: what decides the results; those in the folder must have the same.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self._settings = dict(settings)

    def open(self) -> dict[str, dict[str, Any]]:
        """Make the folder, or check that it is of the same evaluation; returns the records in it by their keys.

        Raises:
            UserError: it holds other results, or something else, or cannot be written.
        """
        check(self.path, overwrite=False)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--output {self.path} cannot be made: {error.strerror}. Name another folder.") from error
        if any(self.path.iterdir()):
            self._check_settings()
            return self._read()
        write_text_atomically(self.path / SETTINGS, json.dumps(self._settings, indent=2) + "\n")
        return {}

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Keep records. Raises UserError if they cannot be written."""
        if not records:
            return
        try:
            with open(self.path / SAMPLES, "a", encoding="utf-8") as file:
                file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
        except OSError as error:
            raise UserError(f"cannot write {self.path / SAMPLES}: {error.strerror}") from error

    def finish(
        self, summary: Mapping[str, float], table: Sequence[Mapping[str, Any]], subject: Subject, notes: Sequence[str]
    ) -> None:
        """Write table.csv, then results.json: where it is, all is there. Raises UserError if they cannot be written."""
        results = {
            **self._settings,
            "summary": dict(summary),
            "table": list(table),
            "notes": list(notes),
            "command": subject.command,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": machine(),
            "versions": versions(),
        }
        write_text_atomically(self.path / TABLE, as_csv(table))
        write_text_atomically(self.path / RESULTS, json.dumps(results, indent=2, ensure_ascii=False) + "\n")

    def _check_settings(self) -> None:
        found = read_json_object(self.path / SETTINGS, remedy="Give --overwrite to begin again.")
        if difference := first_difference(found, self._settings):
            raise UserError(
                f"--output {self.path} holds results of another evaluation: {difference}. Name another folder, or give"
                " --overwrite."
            )

    def _read(self) -> dict[str, dict[str, Any]]:
        path = self.path / SAMPLES
        if not path.exists():
            return {}
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):  # the last line was cut when the evaluation was killed
            os.truncate(path, whole)
        records = {}
        for number, line in enumerate(data[:whole].splitlines(), 1):
            try:
                record = json.loads(line)
                records[record["key"]] = record
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path}, line {number}, is damaged. Give --overwrite to begin again.") from error
        return records


def first_difference(there: Any, here: Any, name: str = "") -> str | None:
    """Where two JSON values differ first, in words; None if they are equal."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in [*here, *(key for key in there if key not in here)]:
            inner = f"{name}.{key}" if name else str(key)
            if difference := first_difference(there.get(key), here.get(key), inner):
                return difference
        return None
    return None if there == here else f"{name} is {_shown(there)} there and {_shown(here)} here"


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def machine() -> dict[str, Any]:
    """What the evaluation ran on."""
    import torch  # late: this file serves the command line before anything slow

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"system": platform.system(), "processor": platform.machine(), "cpus": os.cpu_count(), "gpu": gpu}


def versions() -> dict[str, str]:
    """Of Python, this package and those that results may depend on."""
    return {"python": sys.version.split()[0], "megayoco": __version__} | {name: version(name) for name in _PACKAGES}


def as_csv(table: Sequence[Mapping[str, Any]]) -> str:
    """The rows with a line of their keys above them."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(table[0]) if table else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()
