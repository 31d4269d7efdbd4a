"""The trained weights as one folder for generation and conversion: whole tensors under canonical names.

One parameter at a time travels to rank 0 and to disk: no process ever holds a second copy of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megayoco.config import RunConfig
from megayoco.convert.export import tensor_shapes, write_export
from megayoco.model.parameters import Gatherer, canonical_parameters, shards_of
from megayoco.parallel.agreement import all_ranks_agree
from megayoco.train.engine import Engine
from megayoco.train.phases import trained_model, training_facts


class _Gathered(Mapping[str, Tensor]):
    """The model's full tensors by canonical name, on rank 0. Asking for one is collective: every rank asks for all of
    them in the same order, each once."""

    def __init__(self, engine: Engine, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = shapes
        self._parameters = canonical_parameters(engine.module)
        self._partitioned = engine.config["zero_optimization"]["stage"] == 3
        topology = engine.topology
        self._speaks = topology.data_rank == topology.sequence_rank == 0
        dtypes = {name: parameter.dtype for name, parameter in self._parameters.items()}
        self._gather = Gatherer(shards_of(engine.module), dtypes, topology) if self._speaks else None
        self._left = list(shapes)

    def __getitem__(self, name: str) -> Tensor:
        full = self._take(name)
        if full is None:
            raise KeyError(name)
        return full

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Full shape of a parameter."""
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """What the model computes in."""
        assert self._gather is not None
        return self._gather.dtype(name)

    def take_part_in_the_rest(self) -> None:
        """Ask for all that is left: what ranks but the first do, and the first one when it cannot go on."""
        for name in list(self._left):
            self._take(name)

    def _take(self, name: str) -> Tensor | None:
        if not self._left or self._left[0] != name:
            raise RuntimeError(f"{name} is asked for out of turn: every rank gathers in one order")
        self._left.pop(0)
        parameter = self._parameters.get(name)
        with self._whole(parameter):
            return self._gather(name, parameter) if self._gather is not None else None

    def _whole(self, parameter: Any) -> Any:
        if not self._partitioned:
            return nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters([parameter])


def export(engine: Engine, run: RunConfig, step: int, tokenizer: Any, directory: Path) -> None:
    """Gather the weights of all ranks and write them on rank 0. Collective.

    The model's config carries the rotary base of the phase that `step` finished steps have reached.

    Raises:
        AgreedError: the folder holds something else, or cannot be written.
    """
    model = trained_model(run, step)
    tensors = _Gathered(engine, tensor_shapes(model))
    with all_ranks_agree():  # also waits for the file
        try:
            if engine.topology.rank == 0:
                write_export(directory, model, tensors, tokenizer, facts=training_facts(run, step))
        finally:
            tensors.take_part_in_the_rest()
