"""The real trainer, from config file to exported weights: ten steps of every layout equal those of one process."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file

from megayoco.data.indexed_writer import IndexedWriter
from megayoco.data.tokenizer import build_tokenizer
from tests.workers import Workers

STEPS = 10
SHAPE: dict[str, Any] = dict(dim=32, layers=4, hidden_dim=48, heads=4, kv_heads=2, vocab_size=320)
MODELS: dict[str, dict[str, Any]] = {
    "yoco-retention": dict(SHAPE, self_heads=4),
    "yoco-window": dict(SHAPE, self_heads=4, self_mixer="window", window=9),
    "llama": dict(SHAPE, pattern="llama"),
    "yoco-tied": dict(SHAPE, self_heads=4, tie_embeddings=True),
}


@dataclass(frozen=True)
class Layout:
    world: int
    tensor: int = 1
    pipeline: int = 1
    sequence: int = 1
    bands: int = 1
    zero: int = 0
    micro_batch: int = 2
    checkpointing: bool = False

    def __str__(self) -> str:
        return (
            f"t{self.tensor}-p{self.pipeline}-s{self.sequence}-world{self.world}-zero{self.zero}-micro{self.micro_batch}"
            + (f"-bands{self.bands}" * (self.bands > 1))
            + ("-checkpointing" * self.checkpointing)
        )


LAYOUTS = {
    "yoco-retention": [
        Layout(2, tensor=2),
        Layout(4, tensor=4, micro_batch=4),
        Layout(2, zero=0),
        Layout(2, zero=1, micro_batch=1),
        Layout(2, zero=2),
        Layout(2, zero=3, checkpointing=True),
        Layout(2, pipeline=2),
        Layout(4, pipeline=4, micro_batch=1),
        Layout(4, tensor=2, pipeline=2),
        Layout(4, tensor=2, zero=2),
        Layout(4, pipeline=2, zero=1),
        Layout(4, sequence=2, zero=2),
        Layout(4, sequence=2, zero=3, bands=4),
        Layout(4, tensor=2, sequence=2, zero=1, bands=8, micro_batch=4),
    ],
    "yoco-window": [
        Layout(4, tensor=4),
        Layout(4, tensor=2, pipeline=2, zero=1),
        Layout(2, zero=3),
        Layout(4, sequence=4, micro_batch=4),
        Layout(4, sequence=2, pipeline=2, zero=1),
        Layout(4, sequence=2, pipeline=2, zero=1, bands=2, checkpointing=True),
    ],
    "llama": [
        Layout(4, sequence=2, zero=3, checkpointing=True),
        Layout(4, tensor=4),
        Layout(4, tensor=2, pipeline=2, zero=1),
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


def train(config: str, ds_config: str) -> None:
    """One rank of `python -m megayoco.train`."""
    from megayoco.parallel.launch import choose_device, read_launch
    from megayoco.train.loop import Trainer
    from megayoco.train.session import Request, Session

    launch = read_launch(os.environ)
    request = Request(config, ds_config, (), resume=False, overwrite=False)
    Trainer(Session(request, launch, choose_device(launch, os.environ))).train()


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """This test's own source as a byte-level dataset of many documents."""
    prefix = str(tmp_path_factory.mktemp("data") / "text_document")
    tokenizer = build_tokenizer("ByteTokenizer")
    documents = [paragraph for paragraph in Path(__file__).read_text().split("\n\n") if paragraph]
    with IndexedWriter(prefix, tokenizer.vocab_size) as writer:
        for document in documents:
            ids = [*tokenizer.encode(document), tokenizer.eod]
            writer.add(np.array(ids, writer.dtype), np.array([len(ids)]))
        writer.finish({"tokenizer": tokenizer.identity()})
    return prefix


def run(
    workers: Workers, directory: Path, text: str, model: str, layout: Layout, ds_config: dict[str, Any] | None = None
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """Metrics of every step and the exported weights."""
    config = {
        "model": MODELS[model],
        "parallel": {
            "tensor": layout.tensor,
            "pipeline": layout.pipeline,
            "sequence": layout.sequence,
            "bands": layout.bands,
            "activation_checkpointing": layout.checkpointing,
        },
        "data": {
            "train": text,
            "split": "90,10,0",
            "tokenizer_type": "ByteTokenizer",
            "document_mask": True,
        },
        # clipping bites at every step; eps above the rounding of the smallest gradients, whose sign it would decide
        "optimizer": {"gradient_clipping": 0.5, "eps": 1e-4},
        "phases": [
            {
                "sequence_length": 32,
                "steps": STEPS,
                "batch_size": 8,
                "micro_batch_size": layout.micro_batch,
                "learning_rate": 0.01,
                "warmup_steps": 2,
            }
        ],
        "validation": {"batches": 2},
        "logging": {"interval": 1, "tensorboard": False},
        "output_dir": str(directory / "run"),
    }
    (directory / "run.yaml").write_text(yaml.safe_dump(config))
    (directory / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": layout.zero}, **(ds_config or {})}))
    workers.run(train, str(directory / "run.yaml"), str(directory / "ds.json"), world=layout.world)
    lines = (directory / "run" / "metrics.jsonl").read_text().splitlines()
    weights = load_file(directory / "run" / "export" / "model.safetensors")
    return [json.loads(line) for line in lines], {name: weight.float().numpy() for name, weight in weights.items()}


@pytest.fixture(scope="session")
def one_process(workers: Workers, text: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {
        model: run(workers, tmp_path_factory.mktemp(model), text, model, Layout(1, micro_batch=8)) for model in MODELS
    }


@pytest.mark.parametrize(
    ("model", "layout"), [(model, layout) for model, layouts in LAYOUTS.items() for layout in layouts], ids=str
)
def test_ten_steps_equal_one_process(
    workers: Workers, one_process: dict[str, Any], text: str, tmp_path: Path, model: str, layout: Layout
) -> None:
    metrics, weights = run(workers, tmp_path, text, model, layout)
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


BF16 = [  # the last entry: what gradients of the micro-batches are summed in
    ("yoco-retention", Layout(2, zero=1), "fp32"),
    ("yoco-window", Layout(4, tensor=2, zero=2), "fp32"),
    ("llama", Layout(2, zero=3, checkpointing=True), "fp32"),
    ("yoco-retention", Layout(2, pipeline=2, zero=1), "fp32"),
    ("yoco-window", Layout(4, tensor=2, pipeline=2, zero=1), "fp32"),
    ("yoco-tied", Layout(2, pipeline=2, zero=1), "fp32"),
    ("yoco-retention", Layout(4, tensor=2, zero=1), "bf16"),
    ("yoco-retention", Layout(4, sequence=4, zero=2), "fp32"),
    ("yoco-window", Layout(2, sequence=2, zero=1), "bf16"),
    ("yoco-tied", Layout(4, sequence=2, pipeline=2, zero=1, bands=4), "fp32"),
    ("yoco-window", Layout(4, tensor=2, pipeline=2, zero=1), "bf16"),
]


@pytest.mark.parametrize(("model", "layout", "sums"), BF16, ids=str)
def test_bf16_follows_fp32_of_one_process(
    workers: Workers, one_process: dict[str, Any], text: str, tmp_path: Path, model: str, layout: Layout, sums: str
) -> None:
    """To the rounding of bf16: a stage or a shard left out of the gradient shows in its norm at once."""
    metrics, _ = run(
        workers, tmp_path, text, model, layout, {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": sums}}
    )
    steps, expected = ([line for line in lines if "loss" in line] for lines in (metrics, one_process[model][0]))
    for got, wanted in zip(steps, expected, strict=True):
        assert got["loss"] == pytest.approx(wanted["loss"], rel=5e-3), got["step"]
        assert got["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=5e-2), got["step"]
