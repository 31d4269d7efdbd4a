"""The real trainer, from config file to exported weights: ten steps of every layout equal those of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed.runs import MODELS, SHAPE, Layout, exported, run
from tests.workers import Workers

STEPS = 10
RATE = 3e-3
"""At three times this rate the rounding of bf16 changes the course of ten steps."""

LAYOUTS = {
    "yoco-retention": [
        Layout(2, tensor=2),
        Layout(4, tensor=4, micro_batch=4),
        Layout(2, zero=0),
        Layout(2, zero=1, micro_batch=1),
        Layout(2, zero=2),
        Layout(2, zero=3, checkpointing=True),
        Layout(2, pipeline=2),
        Layout(4, pipeline=4),
        Layout(4, tensor=2, pipeline=2, micro_batch=4),
        Layout(4, tensor=2, zero=2),
        Layout(4, pipeline=2, zero=1),
        Layout(4, sequence=2, zero=2),
        Layout(4, sequence=2, zero=3, bands=2),
        Layout(4, tensor=2, sequence=2, zero=1, bands=4, micro_batch=8),
    ],
    "yoco-window": [
        Layout(4, tensor=4, micro_batch=4),
        Layout(4, tensor=2, pipeline=2, zero=1, micro_batch=4),
        Layout(2, zero=3),
        Layout(4, sequence=4, micro_batch=4),
        Layout(4, sequence=2, pipeline=2, zero=1),
        Layout(4, sequence=2, pipeline=2, zero=1, bands=2, micro_batch=4, checkpointing=True),
    ],
    "llama": [
        Layout(4, sequence=2, zero=3, checkpointing=True),
        Layout(4, tensor=4, micro_batch=4),
        Layout(4, tensor=2, pipeline=2, zero=1, micro_batch=4),
        Layout(2, zero=3),
    ],
}


# what the first of 4 ranks sends in one step of 2 micro-batches of 4 sequences, chunks of 8 tokens, in fp32
NUMBERS = 2 * 4 * 8 * 4
BYTES = {
    ("yoco-window", Layout(4, sequence=4, micro_batch=4)): {
        "sequence/halo": NUMBERS * 2 * 2 * 32,  # keys and values of 2 layers, to the next rank
        "sequence/shared_kv": NUMBERS * 3 * 2 * 16,  # once for both cross layers, to 3 ranks
        "sequence/shared_kv_gradient": NUMBERS * 3 * 2 * 16,
    }
}


def run_and_export(
    workers: Workers, directory: Path, text: str, model: str, layout: Layout, ds_config: dict[str, Any] | None = None
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """Metrics of every step and the exported weights."""
    return run(workers, directory, text, model, layout, STEPS, ds_config, learning_rate=RATE), exported(directory)


@pytest.fixture(scope="session")
def one_process(workers: Workers, text: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {
        model: run_and_export(workers, tmp_path_factory.mktemp(model), text, model, Layout(1, micro_batch=8))
        for model in MODELS
    }


@pytest.mark.parametrize(
    ("model", "layout"), [(model, layout) for model, layouts in LAYOUTS.items() for layout in layouts], ids=str
)
def test_ten_steps_equal_one_process(
    workers: Workers, one_process: dict[str, Any], text: str, tmp_path: Path, model: str, layout: Layout
) -> None:
    metrics, weights = run_and_export(workers, tmp_path, text, model, layout)
    expected_metrics, expected_weights = one_process[model]
    steps = [line for line in metrics if "loss" in line]
    expected_steps = [line for line in expected_metrics if "loss" in line]
    assert len(steps) == len(expected_steps) == STEPS
    for got, expected in zip(steps, expected_steps, strict=True):
        assert got["loss"] == pytest.approx(expected["loss"], rel=1e-5), got["step"]
        assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4), got["step"]
        assert expected["grad_norm"] > 0.5  # clipping was at work
    if (model, layout) in BYTES:
        assert steps[0]["bytes_sent"] == steps[-1]["bytes_sent"] == BYTES[model, layout]
    validation = [line["validation_loss"] for line in metrics if "validation_loss" in line]
    expected_validation = [line["validation_loss"] for line in expected_metrics if "validation_loss" in line]
    assert len(validation) == 1
    assert validation == pytest.approx(expected_validation, rel=1e-5)
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.1  # it learns
    assert weights.keys() == expected_weights.keys()
    for name, expected in expected_weights.items():
        assert np.abs(weights[name] - expected).max() < 1e-5, name


OTHER_LOSSES: dict[str, tuple[dict[str, Any], dict[str, Any], Layout, Layout]] = {
    # model, phase, a layout and the one process that it equals
    "negatives of the neighbour": (
        dict(SHAPE, pattern="llama", memory_layers=[1], memory_window=8),
        {"cross_batch": {"range": 6, "negatives": "neighbour"}},
        Layout(2, zero=2, checkpointing=True),
        Layout(1, micro_batch=4),
    ),
    "mean over rows": (MODELS["yoco-tied"], {"loss": "row_mean"}, Layout(4, sequence=2, pipeline=2), Layout(1)),
}


@pytest.mark.parametrize("name", OTHER_LOSSES)
def test_other_losses_equal_one_process(workers: Workers, text: str, tmp_path: Path, name: str) -> None:
    """Two micro-batches a step: whose negatives are whose follows from how samples are dealt to ranks."""
    model, loss, *layouts = OTHER_LOSSES[name]
    found = []
    for number, (layout, special) in enumerate([(layouts[0], loss), (layouts[1], loss), (layouts[1], {})]):
        sections = {
            "phases": [
                {
                    "sequence_length": 64,
                    "steps": 2,
                    "batch_size": 8,
                    "micro_batch_size": layout.micro_batch,
                    "learning_rate": RATE,
                    **special,
                }
            ],
            "data": {
                "train": text,
                "split": "100,0,0",
                "tokenizer_type": "ByteTokenizer",
                "document_mask": "memory_layers" not in model,
            },
        }
        directory = tmp_path / str(number)
        directory.mkdir()
        lines = run(workers, directory, text, model, layout, 2, **sections)
        found.append([number for line in lines for number in (line["loss"], line["grad_norm"])])
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[1] != pytest.approx(found[2], rel=1e-4)  # it is another loss than the usual one


BF16 = [  # the last entry: what gradients of the micro-batches are summed in
    ("yoco-retention", Layout(2, zero=1), "fp32"),
    ("yoco-window", Layout(4, tensor=2, zero=2), "fp32"),
    ("llama", Layout(2, zero=3, checkpointing=True), "fp32"),
    ("yoco-retention", Layout(2, pipeline=2, zero=1), "fp32"),
    ("yoco-window", Layout(4, tensor=2, pipeline=2, zero=1, micro_batch=4), "fp32"),
    ("yoco-tied", Layout(2, pipeline=2, zero=1), "fp32"),
    ("yoco-retention", Layout(4, tensor=2, zero=1), "bf16"),
    ("yoco-retention", Layout(4, sequence=4, zero=2, micro_batch=4), "fp32"),
    ("yoco-window", Layout(2, sequence=2, zero=1), "bf16"),
    ("yoco-tied", Layout(4, sequence=2, pipeline=2, zero=1, bands=2, micro_batch=4), "fp32"),
    ("yoco-window", Layout(4, tensor=2, pipeline=2, zero=1), "bf16"),
]


@pytest.mark.parametrize(("model", "layout", "sums"), BF16, ids=str)
def test_bf16_follows_fp32_of_one_process(
    workers: Workers, one_process: dict[str, Any], text: str, tmp_path: Path, model: str, layout: Layout, sums: str
) -> None:
    """To the rounding of bf16: a stage or a shard left out of the gradient shows in its norm at once."""
    metrics, _ = run_and_export(
        workers, tmp_path, text, model, layout, {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": sums}}
    )
    steps, expected = ([line for line in lines if "loss" in line] for lines in (metrics, one_process[model][0]))
    for got, wanted in zip(steps, expected, strict=True):
        assert got["loss"] == pytest.approx(wanted["loss"], rel=5e-3), got["step"]
        assert got["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=5e-2), got["step"]
