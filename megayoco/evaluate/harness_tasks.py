"""From names to tasks of lm-eval: its own, those of folders that the user names, and the small ones beside this file.

Importing this module imports lm-eval, which takes seconds: harness.py does it when an evaluation runs.
"""

from __future__ import annotations

import difflib
import itertools
import json
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from megayoco.config.evaluation import HarnessOptions
from megayoco.data.tokenizer import Tokenizer
from megayoco.data.tokenizer.export import write_for_transformers
from megayoco.errors import UserError

BUNDLED = Path(__file__).parent / "tasks"


@dataclass(frozen=True)
class Tasks:
    """What `simple_evaluate` takes."""

    roots: list[Task | Group]
    """Each task once, alone or in its group."""
    manager: TaskManager
    documents: Counter[str]
    """How many documents are asked, by the method of the model that is asked them."""


def load_tasks(options: HarnessOptions, tokenizer: Tokenizer) -> Tasks:
    """The tasks that the options name, with their data.

    Raises:
        UserError: a name is unknown or given twice, a folder is missing, a task cannot be loaded, or it wants what a
            language model in a library cannot do.
    """
    wanted = [name for text in options.tasks for name in text.split(",") if name]
    folders = [BUNDLED, *(Path(folder) for folder in options.include_path or ())]
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"include_path {folder} is no folder. Name the folder of your task files (YAML).")
    with tempfile.TemporaryDirectory() as place:
        metadata = _with_tokenizer(_metadata(options.metadata), tokenizer, Path(place))
        manager = TaskManager(include_path=folders, include_defaults=False, metadata=metadata)
        found = {one: manager.match_tasks([one]) for one in wanted}
        ours = {*manager.all_subtasks, *manager.all_tags}
        if not all(names and ours.issuperset(names) for names in found.values()):
            # reads ten thousand files, which takes seconds
            manager = TaskManager(include_path=folders, metadata=metadata)
            found = {one: names or _matching(one, manager) for one, names in found.items()}
        names = dict.fromkeys(itertools.chain.from_iterable(map(sorted, found.values())))
        roots = _distinct({name: _load(name, manager) for name in names})
    documents: Counter[str] = Counter()
    for root in roots:
        for task in root.get_all_tasks() if isinstance(root, Group) else [root]:
            _check(task)
            count = len(task.eval_docs)
            kind = "loglikelihood" if task.OUTPUT_TYPE == "multiple_choice" else str(task.OUTPUT_TYPE)
            documents[kind] += count if options.limit is None else min(options.limit, count)
    return Tasks(roots, manager, documents)


def _metadata(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(f"metadata {text!r} is not JSON: {error}.") from error
    if not isinstance(value, dict):
        raise UserError(f'metadata {text!r} is no JSON object. Write it like {{"max_seq_lengths": [4096]}}.')
    return value


def _matching(wanted: str, manager: TaskManager) -> list[str]:
    """Names of tasks, groups and tags: the wanted one, or those that its pattern fits."""
    found = manager.match_tasks([wanted])
    if not found:
        near = difflib.get_close_matches(wanted, manager.all_tasks, 3)
        meant = f"Did you mean {' or '.join(near)}?" if near else "megayoco_basics is one that is always there."
        raise UserError(f"lm-eval has no task {wanted!r}, nor has include_path. {meant}")
    return list(found)


def _load(name: str, manager: TaskManager) -> list[Task | Group]:
    """The tasks and groups that a name stands for, without those inside of others."""
    try:
        loaded = manager.load([name])
    except UserError:
        raise
    except Exception as error:  # a task is anybody's code and data from anywhere
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"task {name} cannot be loaded: {type(error).__name__}: {reason}. Its data may have to be downloaded first,"
            " or it needs a package of its own."
        ) from error
    groups = loaded.get("groups", {})
    inside = {child for group in groups.values() for child in group.child_names}
    return [item for key, item in [*groups.items(), *loaded["tasks"].items()] if key not in inside]


def _distinct(loaded: dict[str, list[Task | Group]]) -> list[Task | Group]:
    """All of them, in the order of their names. Raises UserError if a task would be evaluated twice."""
    source: dict[str, str] = {}
    for name, items in loaded.items():
        for item in items:
            for task in item.get_all_tasks() if isinstance(item, Group) else [item]:
                if task.task_name in source:
                    raise UserError(
                        f"task {task.task_name} is named twice, by {source[task.task_name]} and by {name}. Leave one"
                        " out."
                    )
                source[task.task_name] = name
    return [item for items in loaded.values() for item in items]


def _check(task: Task) -> None:
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"task {task.task_name} shows pictures or sounds, which a language model cannot read.")
    if getattr(task, "UNSAFE_CODE", False):
        raise UserError(
            f"task {task.task_name} runs the code that a model writes, on this machine. It is not run here."
        )


def _with_tokenizer(metadata: dict[str, Any], tokenizer: Tokenizer, folder: Path) -> dict[str, Any]:
    """Tasks that make data of a given length count tokens by transformers' tokenizer in a folder."""
    if {"tokenizer", "pretrained"} & metadata.keys():
        return metadata
    try:
        write_for_transformers(tokenizer, folder)
    except UserError:
        return metadata  # few tasks ask for it, and they say so
    return {**metadata, "tokenizer": str(folder)}
