"""Datasets that megatron-core's own builder wrote: inspected, merged and trained on as they are."""

import numpy as np
import pytest

from megayoco.data.command import run_command
from megayoco.data.tokenizer import build_tokenizer
from tests.tools.datasets import documents_of, load_tool, megatron_pair
from tests.train.test_train import TEXT, config, metrics, prefix, train  # noqa: F401 (fixtures)

inspect_dataset, merge_datasets = load_tool("inspect_dataset"), load_tool("merge_datasets")


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_a_pair_of_megatron_is_inspected_merged_and_trained_on(train, tmp_path, capsys, dtype):  # noqa: F811
    """Two documents of several sequences each, one empty document, no end-of-document token, no meta file."""
    tokenizer = build_tokenizer("ByteTokenizer")
    halves = [[tokenizer.encode(TEXT[:2000]), tokenizer.encode(TEXT[2000:])], []], [[tokenizer.encode(TEXT[3:])]]
    parts = [megatron_pair(tmp_path / name, part, dtype) for name, part in zip("ab", halves, strict=True)]
    merged = str(tmp_path / "all")
    assert run_command(merge_datasets.main, ["--input", *parts, "--output-prefix", merged]) == 0
    assert documents_of(merged) == halves[0] + halves[1]
    flags = ["--tokenizer-type", "ByteTokenizer", "--samples", "1", "--check"]
    assert run_command(inspect_dataset.main, [merged, *flags]) == 0
    assert "3 sequences in 3 documents" not in capsys.readouterr().out
    data = [f"data.train={merged}", "data.tokenizer_type=ByteTokenizer", "data.split=100,0,0", "validation.interval=0"]
    result = train(tmp_path / "run", *data, "checkpoint.interval=0", "checkpoint.export=never")
    assert result.code == 0, result.err
    losses = [row["loss"] for row in metrics(tmp_path / "run") if "loss" in row]
    assert len(losses) == 10
    assert losses[-1] < losses[0] - 0.5
