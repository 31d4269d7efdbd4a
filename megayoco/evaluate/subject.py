"""What is known of the model that is evaluated: for the results, and to tell those of one model from another's."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from megayoco.config import model_config_to_dict

if TYPE_CHECKING:
    from megayoco.convert.weights import Weights


@dataclass(frozen=True)
class Subject:
    """What is known of a model besides the model."""

    identity: Mapping[str, Any] = field(default_factory=dict)
    """What tells its weights from others, JSON-able; goes into the results."""
    trained_length: int | None = None
    """Tokens of the longest sequences that it was trained on; None: not known."""
    command: str | None = None
    """The command line, for the results."""


def describe(weights: Weights, command: str | None = None, **more: str) -> Subject:
    """What is known of weights on disk, and `more` of how they run."""
    length = weights.facts.get("sequence_length")
    identity = {
        "config": model_config_to_dict(weights.model),
        "facts": weights.facts,
        "norms_sha256": norms_hash(weights),
        "tokenizer_sha256": None if weights.tokenizer is None else weights.tokenizer.identity()["sha256"],
        **more,
    }
    return Subject(identity, length if isinstance(length, int) else None, command)


def norms_hash(weights: Weights) -> str:
    """A hash of the weights of all norms: few numbers, which every training step changes."""
    digest = hashlib.sha256()
    for name in sorted(weights.tensors):
        if len(weights.tensors.shape(name)) == 1:
            values = weights.tensors[name].detach().cpu().double()
            digest.update(name.encode() + values.numpy().tobytes())
    return digest.hexdigest()
