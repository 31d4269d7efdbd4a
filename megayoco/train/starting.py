"""Starting weights of a run that does not start from its seed: `model.init_from`.

They go the way of a checkpoint: every rank reads what it holds, one tensor at a time, into its fp32 master weights, at
any layout and ZeRO stage.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch import Tensor

from megayoco.config import ModelConfig, RunConfig, load_config, model_config_to_dict
from megayoco.convert.formats import read_weights
from megayoco.convert.weights import Weights
from megayoco.data.tokenizer import Tokenizer
from megayoco.errors import UserError
from megayoco.parallel.shards import Shard

FREE = ("preset", "rope_theta")
"""Fields in which the run may differ from the weights it starts with: a longer context has another rotary base."""
MEMORY = ("memory_layers", "memory_window")
"""So may these in the LLaMA pattern: memory attention has the parameters of full attention."""


def load_run(path: str, overrides: list[str]) -> RunConfig:
    """The config of a run; the shape of `model.init_from` fills what is not given. Raises UserError."""

    def shape_of(folder: str) -> dict[str, Any]:
        try:
            return model_config_to_dict(read_start(folder).model)
        except UserError as error:
            raise UserError(
                f"{error} A run that has begun goes on without it: give the config.yaml of its output_dir."
            ) from error

    return load_config(path, overrides, shape_of=shape_of)


def read_start(folder: str) -> Weights:
    """What `model.init_from` names, no tensor read yet. Raises UserError that begins with the key."""
    try:
        return read_weights(Path(folder))
    except UserError as error:
        raise UserError(f"model.init_from: {error}") from error


def check_start(weights: Weights, model: ModelConfig) -> None:
    """Raises UserError unless the weights are of this model. (That they are those of their own config is checked.)"""
    free = (*FREE, *MEMORY) if model.pattern == "llama" else FREE
    given, asked = model_config_to_dict(weights.model), model_config_to_dict(_resolved(model))
    for key, value in model_config_to_dict(_resolved(weights.model)).items():
        if key not in free and asked[key] != value:
            raise UserError(
                f"model.{key} is {asked[key]!r}, in model.init_from {model.init_from} it is {given[key]!r}. Leave the"
                " shape out of the config: it is taken from there."
            )


def _resolved(model: ModelConfig) -> ModelConfig:
    """Defaults spelled out, so that two ways of saying one shape are equal."""
    if model.pattern != "yoco":
        return dataclasses.replace(model, preset=None, kv_heads=model.num_kv_heads)
    return dataclasses.replace(
        model,
        preset=None,
        kv_heads=model.num_kv_heads,
        self_heads=model.num_self_heads,
        self_layers=model.num_self_layers,
    )


def start_lines(weights: Weights, model: ModelConfig, tokenizer: Tokenizer) -> list[str]:
    """What a run starts with, for people; and what they should know of the tokenizer."""
    facts = weights.facts
    seen = f", after {facts['tokens']:,} tokens" if isinstance(facts.get("tokens"), int) else ""
    lines = [f"from {model.init_from}{seen}"]
    theirs = weights.tokenizer
    if theirs is not None and theirs.identity() != tokenizer.identity():
        lines.append(
            f"these weights come with the tokenizer {theirs.type} of {theirs.vocab_size:,} ids, the data is of"
            f" {tokenizer.type} with {tokenizer.vocab_size:,}: make sure that they give a text the same ids"
        )
    return lines


class StartingState:
    """Weights as the state that `restore` takes (train/holdings.py): an optimizer that has made no step."""

    optimizer_step = None

    def __init__(self, weights: Weights) -> None:
        self._tensors = weights.tensors
        self._held: tuple[str, Tensor] | None = None

    def read(self, name: str, kind: str, shard: Shard, begin: int = 0, length: int | None = None) -> Tensor:
        """Elements `begin` .. `begin + length` of the flattened shard, fp32 on the CPU."""
        if self._held is None or self._held[0] != name:
            self._held = None  # one tensor at a time
            self._held = (name, self._tensors[name])
        part = shard.cut(self._held[1]).float().flatten()[begin:]
        return part if length is None else part[:length]
