"""What the distributed tests share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megayoco.data.indexed_writer import IndexedWriter
from megayoco.data.tokenizer import build_tokenizer


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A frozen source file as a byte-level dataset of many documents: what the runs learn depends on it."""
    prefix = str(tmp_path_factory.mktemp("data") / "text_document")
    tokenizer = build_tokenizer("ByteTokenizer")
    source = Path(__file__).with_name("text.txt").read_text()
    documents = [paragraph for paragraph in source.split("\n\n") if paragraph]
    with IndexedWriter(prefix, tokenizer.vocab_size) as writer:
        for document in documents:
            ids = [*tokenizer.encode(document), tokenizer.eod]
            writer.add(np.array(ids, writer.dtype), np.array([len(ids)]))
        writer.finish({"tokenizer": tokenizer.identity()})
    return prefix
