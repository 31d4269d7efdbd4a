"""Pairs as others write them: documents of several or no sequences, any integer type, modes."""

import importlib.util
from pathlib import Path

import numpy as np

from megayoco.data.indexed import read_index

ROOT = Path(__file__).parents[2]


def load_tool(name: str):
    """The module of a script in tools/."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def megatron_pair(prefix, documents: list[list[list[int]]], dtype=np.uint16, modes: bool = False) -> str:
    """Documents, lists of sequences, lists of ids, written by megatron-core's builder."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype, multimodal=modes)
    for document in documents:
        for number, sequence in enumerate(document):
            builder.add_item(torch.tensor(sequence, dtype=torch.int64), number % 2)
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def documents_of(prefix) -> list[list[list[int]]]:
    """The documents of a pair as lists of sequences, read by `read_index`."""
    index = read_index(str(prefix))
    tokens = np.fromfile(f"{prefix}.bin", index.dtype)
    sequences = (
        [part.tolist() for part in np.split(tokens, np.cumsum(index.lengths)[:-1])] if len(index.lengths) else []
    )
    return [sequences[a:b] for a, b in zip(index.documents[:-1], index.documents[1:], strict=True)]


def files_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
