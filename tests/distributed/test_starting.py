"""`model.init_from`: weights of another model become the start of a run, at any layout and ZeRO stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megayoco.convert.formats import read_weights, write_weights
from tests.distributed.runs import Layout, exported, run
from tests.workers import Workers

ONE = Layout(1, micro_batch=8)


@pytest.fixture(scope="module")
def trained(workers: Workers, text: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`trained(model)`: the folder of a short run, made once each."""
    made: dict[str, Path] = {}

    def make(model: str) -> Path:
        if model not in made:
            made[model] = tmp_path_factory.mktemp("trained")
            run(workers, made[model], text, model, ONE, 3)
        return made[model]

    return make


def start(workers: Workers, directory: Path, text: str, layout: Layout, model: dict[str, Any], **more: Any) -> Any:
    """One step with a rate so small that fp32 weights stay what they were; returns its metrics and the weights."""
    metrics = run(workers, directory, text, model, layout, 1, learning_rate=1e-30, **more)
    return metrics[0], exported(directory)


CASES = [
    ("yoco-retention", "hf", Layout(4, tensor=2, pipeline=2)),
    ("yoco-window", "yoco", Layout(4, tensor=2, zero=3)),
    ("llama", "llama", Layout(4, tensor=4)),
    ("yoco-tied", "megayoco", Layout(4, pipeline=2, zero=1)),
]


@pytest.mark.parametrize(("model", "format", "layout"), CASES, ids=str)
def test_a_run_starts_with_the_weights_of_a_folder(
    workers: Workers, trained: Any, text: str, tmp_path: Path, model: str, format: str, layout: Layout
) -> None:
    """No shape in the config: it is that of the weights."""
    source = trained(model)
    write_weights(tmp_path / "folder", format, read_weights(source / "run" / "export"))
    first, weights = start(workers, tmp_path, text, layout, {"init_from": str(tmp_path / "folder")})
    expected = exported(source)
    assert weights.keys() == expected.keys()
    for name, values in expected.items():
        assert np.array_equal(weights[name], values), name
    (tmp_path / "one").mkdir()
    one, _ = start(workers, tmp_path / "one", text, ONE, {"init_from": str(source / "run")})  # its newest checkpoint
    assert first["loss"] == pytest.approx(one["loss"], rel=1e-6)


def test_master_weights_are_not_rounded_to_bf16(workers: Workers, trained: Any, text: str, tmp_path: Path) -> None:
    source = trained("yoco-tied")
    model = {"init_from": str(source / "run")}
    start(workers, tmp_path, text, Layout(2, zero=2), model, ds_config={"bf16": {"enabled": True}})
    masters, expected = read_weights(tmp_path / "run", "megayoco").tensors, exported(source)
    assert all(torch.equal(masters[name], torch.tensor(expected[name])) for name in expected)
