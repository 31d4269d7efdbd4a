"""Data of the tasks in this folder. lm-eval loads this file by its path, so it imports nothing of the package."""

import json
from pathlib import Path
from typing import Any

import datasets


def load(file: str, shots: int = 0, **metadata: Any) -> dict[str, datasets.Dataset]:
    """The documents of a JSONL file beside this one: the first `shots` are examples, the others are the test.

    Args:
        file: name of the file.
        shots: documents that few-shot prompts may show.
        metadata: what lm-eval hands to every task; not used here.
    """
    lines = (Path(__file__).parent / file).read_text(encoding="utf-8").splitlines()
    documents = [json.loads(line) for line in lines]
    splits = {"test": documents[shots:], "examples": documents[:shots]}
    return {name: datasets.Dataset.from_list(rows) for name, rows in splits.items() if rows}
