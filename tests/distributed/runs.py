"""Runs of the real trainer in the pool of workers, and the layouts that tests compare."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.torch import load_file

from tests.workers import Workers

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


def write_config(
    directory: Path,
    text: str,
    model: str | dict[str, Any],
    layout: Layout,
    steps: int,
    ds_config: dict[str, Any] | None,
    learning_rate: float = 0.01,
    **sections: Any,
) -> None:
    """run.yaml and ds.json of a run of `steps` steps, its output in `directory`/run."""
    config = {
        "model": MODELS[model] if isinstance(model, str) else model,
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
                "steps": steps,
                "batch_size": 8,
                "micro_batch_size": layout.micro_batch,
                "learning_rate": learning_rate,
                "warmup_steps": 2,
            }
        ],
        "validation": {"batches": 2},
        "logging": {"interval": 1, "tensorboard": False},
        "output_dir": str(directory / "run"),
        **sections,
    }
    (directory / "run.yaml").write_text(yaml.safe_dump(config))
    (directory / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": layout.zero}, **(ds_config or {})}))


def train(config: str, ds_config: str, resume: str | None) -> None:
    """One rank of `python -m megayoco.train`."""
    from megayoco.parallel.launch import choose_device, read_launch
    from megayoco.train.loop import Trainer
    from megayoco.train.session import Request, Session

    launch = read_launch(os.environ)
    request = Request(config, ds_config, (), resume=resume, overwrite=False)
    Trainer(Session(request, launch, choose_device(launch, os.environ))).train()


def run(
    workers: Workers,
    directory: Path,
    text: str,
    model: str | dict[str, Any],
    layout: Layout,
    steps: int,
    ds_config: dict[str, Any] | None = None,
    resume: str | None = None,
    **sections: Any,
) -> list[dict[str, Any]]:
    """Trains in `directory` and returns the lines of its metrics."""
    write_config(directory, text, model, layout, steps, ds_config, **sections)
    workers.run(train, str(directory / "run.yaml"), str(directory / "ds.json"), resume, world=layout.world)
    return [json.loads(line) for line in (directory / "run" / "metrics.jsonl").read_text().splitlines()]


def exported(directory: Path) -> dict[str, np.ndarray]:
    """The weights that a run has exported, in fp32."""
    weights = load_file(directory / "run" / "export" / "model.safetensors")
    return {name: weight.float().numpy() for name, weight in weights.items()}
