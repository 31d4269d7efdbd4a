"""The data layout of the official YOCO code, turned into one indexed pair per source and a blend file.

    DATA/json/train.json   [{"name": "CC", "weight": 0.5}, {"name": "Code", "weight": 0.2, "source": [FILE, ...]}, ...]
                           or a count in place of every weight
    DATA/json/CC.json      [FILE, ...]: the shards of a source without an inline list; relative to DATA, or absolute
    DATA/shard/CC/0.jsonl  one object per line, its text under `text`, else `content`, else the list of lines
                           `raw_content_lines`

The official loader cuts documents into pieces, drops long ones and discards the rest of every sample and file. Here
every document is one sequence, whole, with its newlines; packing into samples carries over documents and files.
"""

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from megayoco.data.encode import JOINED_LINES, Task, Totals
from megayoco.data.files import write_text_atomically
from megayoco.data.inputs import Inputs, find_inputs
from megayoco.data.prepare import preprocess
from megayoco.errors import UserError

FIELDS = {"text": ("text", "content", JOINED_LINES)}


@dataclass(frozen=True)
class YocoSource:
    """One source of a split: its name, its weight or count, and its files."""

    name: str
    weight: float
    inputs: Inputs


def read_layout(folder: str, split: str = "train") -> list[YocoSource]:
    """The sources of FOLDER/json/SPLIT.json.

    Raises:
        UserError: a file is missing or not of this layout; a name, weight or file that cannot be used.
    """
    listing = os.path.join(folder, "json", f"{split}.json")
    if not os.path.isdir(folder):
        raise UserError(f"--yoco-data {folder} is no folder")
    entries = _read_list(listing, f"The folder has the splits: {_splits(folder)}. Choose one by --yoco-split.")
    sources: list[YocoSource] = []
    kinds = set()
    for number, entry in enumerate(entries, 1):
        place = f"{listing}, entry {number}"
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise UserError(f'{place}: expected an object with a "name", got {json.dumps(entry)[:60]}')
        name = entry["name"]
        if not name or "/" in name or name.startswith("."):
            raise UserError(f"{place}: the name {name!r} cannot be part of a file name")
        if any(name == source.name for source in sources):
            raise UserError(f"{place}: the name {name!r} occurs twice")
        kind = "weight" if entry.get("weight") is not None else "count"
        weight = entry.get(kind)
        number_like = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not number_like or not (math.isfinite(float(weight)) and float(weight) >= 0):  # type: ignore[arg-type]
            raise UserError(f"{place}, {name}: weight or count must be a number of at least 0, got {weight!r}")
        kinds.add(kind)
        files = entry.get("source")
        if files is None:
            files = _read_list(os.path.join(folder, "json", f"{name}.json"), f"It must list the files of {name}.")
        if not files or not isinstance(files, list) or not all(isinstance(path, str) for path in files):
            raise UserError(f"{place}, {name}: expected a list of files, got {json.dumps(files)[:60]}")
        paths = [os.path.join(folder, path) for path in files]  # join keeps absolute paths
        missing = [path for path in paths if not os.path.isfile(path)]
        if missing:
            more = f" ({len(missing):,} of {len(paths):,} files are missing)" if len(missing) > 1 else ""
            raise UserError(f"{place}, {name}: {missing[0]} does not exist{more}")
        sources.append(YocoSource(name, float(weight), find_inputs(paths, "jsonl")))  # type: ignore[arg-type]
    if len(kinds) > 1:
        raise UserError(f"{listing}: some entries have a weight, others only a count. Give all of them the same.")
    if not any(source.weight for source in sources):
        raise UserError(f"{listing}: no entry has a weight or count above 0")
    return sources


def prepare_layout(
    sources: list[YocoSource],
    output_prefix: str,
    task: Task,
    *,
    overwrite: bool = False,
    resume: bool = False,
    report: Callable[[Totals], None] = lambda totals: None,
    **options: Any,
) -> dict[str, Totals]:
    """Write PREFIX_NAME_text_document for every source, and PREFIX_blend.yaml, which data.train can name.

    Args:
        task: its fields are replaced by those of the layout.
        report: called with the totals of all sources together.
        options: further arguments of `preprocess`.

    Returns:
        The counts of each pair, by its prefix.

    Raises:
        UserError: what `preprocess` raises; the blend file exists.
    """
    blend = Path(f"{output_prefix}_blend.yaml")
    if blend.exists() and not (overwrite or resume):
        raise UserError(f"{blend} exists. Choose another output prefix, or give --overwrite to replace it.")
    task = replace(task, fields=FIELDS)
    together = Totals(sum(source.inputs.size for source in sources))
    done: dict[str, Totals] = {}
    for source in sources:

        def report_all(now: Totals) -> None:
            parts = [*done.values(), now]
            together.read, together.records, together.skipped = (
                sum(getattr(part, name) for part in parts) for name in ("read", "records", "skipped")
            )
            together.keys = {f"{i} {key}": count for i, part in enumerate(parts) for key, count in part.keys.items()}
            report(together)

        prefix = f"{output_prefix}_{source.name}"
        totals = preprocess(
            source.inputs.sources, prefix, task, overwrite=overwrite, resume=resume, report=report_all, **options
        )
        done[f"{prefix}_text_document"] = totals
    entries = [
        {"prefix": os.path.basename(prefix), "weight": source.weight}
        for prefix, source in zip(done, sources, strict=True)
    ]
    write_text_atomically(blend, yaml.safe_dump(entries, sort_keys=False, allow_unicode=True))
    return done


def _read_list(path: str, remedy: str) -> list[Any]:
    try:
        value = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}. {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}. {remedy}") from error
    if not isinstance(value, list) or not value:
        raise UserError(f"{path} must hold a JSON list that is not empty. {remedy}")
    return value


def _splits(folder: str) -> str:
    try:
        names = sorted(path.stem for path in Path(folder, "json").glob("*.json"))
    except OSError:
        names = []
    return ", ".join(names) or "none, it has no json folder"
