"""Small datasets for the tests of data."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from megayoco.data.indexed_writer import IndexedWriter


@pytest.fixture
def write_pair(tmp_path):
    """write_pair(name, documents, vocab_size=1000) -> prefix."""

    def write(name: str, documents: list[list[int]], vocab_size: int = 1000, meta: dict | None = None) -> str:
        prefix = str(tmp_path / name)
        with IndexedWriter(prefix, vocab_size, overwrite=True) as writer:
            for document in documents:
                writer.add(np.array(document, writer.dtype), np.array([len(document)]))
            writer.finish(meta or {})
        if meta is None:
            Path(f"{prefix}.meta.json").unlink()
        return prefix

    return write


@pytest.fixture
def numbered(write_pair):
    """numbered(name, lengths): documents of the tokens 0, 1, 2, ... through the whole file, so a token is a place."""

    def write(name: str, lengths: list[int], first: int = 0) -> str:
        ends = first + np.cumsum([0, *lengths])
        return write_pair(name, [list(range(a, b)) for a, b in pairwise(ends.tolist())], 60_000)

    return write
