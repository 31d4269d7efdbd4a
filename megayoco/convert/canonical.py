"""The format `megayoco`: exports of ours (export.py), and the training checkpoints they come from (training.py)."""

from __future__ import annotations

from pathlib import Path

from megayoco.config import ModelConfig
from megayoco.convert.checkpoints import NOTE, saved_steps
from megayoco.convert.export import check_tokenizer, is_export, read_export, write_export
from megayoco.convert.names import check_tensors, tensor_shapes
from megayoco.convert.weights import Weights
from megayoco.data.tokenizer import Tokenizer

EXPORT_FOLDER = "export"
"""Where a run directory has its export."""


def is_ours(path: Path) -> bool:
    """Whether there is anything to read: an export, a training checkpoint, or a run directory with either."""
    return _has_checkpoint(path) or is_export(path) or is_export(path / EXPORT_FOLDER)


def read(path: Path, tokenizer: Tokenizer | None = None) -> Weights:
    """The newest checkpoint of a run directory, or the checkpoint or export that `path` is; fp32 where it is a
    checkpoint. `tokenizer` in place of its own.

    Raises:
        UserError: none of these, incomplete or damaged.
    """
    if _has_checkpoint(path):
        # brings megatron-core along, which takes seconds
        from megayoco.convert.training import read_training_checkpoint

        weights = read_training_checkpoint(path)
        check_tensors(path, weights.tensors, tensor_shapes(weights.model), NOTE)
        check_tokenizer(path, weights.tokenizer, weights.model)
    elif is_export(path / EXPORT_FOLDER) and not is_export(path):
        weights = read_export(path / EXPORT_FOLDER)
    else:
        weights = read_export(path)
    if tokenizer is not None:
        check_tokenizer(path, tokenizer, weights.model)
        weights = weights._replace(tokenizer=tokenizer)
    return weights


def check_writable(model: ModelConfig) -> None:
    """Every model can be exported."""


def write(directory: Path, weights: Weights, shard_bytes: int) -> None:
    """Write an export.

    Raises:
        UserError: something cannot be written.
    """
    model, tensors, tokenizer, facts = weights
    write_export(directory, model, tensors, tokenizer, facts=facts, shard_bytes=shard_bytes)


def _has_checkpoint(path: Path) -> bool:
    return (path / NOTE).is_file() or bool(saved_steps(path)) or bool(saved_steps(path / "checkpoints"))
