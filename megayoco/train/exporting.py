"""The trained weights as one folder for generation and conversion: whole tensors under canonical names."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from megayoco.config import RunConfig
from megayoco.convert.export import write_export
from megayoco.model.parameters import canonical_parameters, gather_canonical, shards_of
from megayoco.train.agreement import all_ranks_agree
from megayoco.train.engine import Engine
from megayoco.train.phases import Timeline


def export(engine: Engine, run: RunConfig, step: int, tokenizer: Any, directory: Path) -> None:
    """Gather the weights of all ranks and write them on rank 0. Collective.

    The model's config carries the rotary base of the phase that `step` finished steps have reached.

    Raises:
        AgreedError: the folder holds something else, or cannot be written.
    """
    import deepspeed

    partitioned = engine.config["zero_optimization"]["stage"] == 3
    topology = engine.topology
    speaks = topology.data_rank == 0 and topology.sequence_rank == 0
    local = {}
    for name, parameter in canonical_parameters(engine.module).items():
        # one at a time: under ZeRO 3 the whole model need not fit on a device
        with deepspeed.zero.GatheredParameters([parameter]) if partitioned else nullcontext():
            if speaks:
                local[name] = parameter.detach().to("cpu", copy=True)
    if speaks:
        tensors = gather_canonical(local, shards_of(engine.module), topology)
    with all_ranks_agree():  # also waits for the file
        if topology.rank == 0:
            position = Timeline.of(run).position(step)
            last = position.phase - (position.phase_step == 0 and position.phase > 0)
            model = dataclasses.replace(run.model, rope_theta=run.phase_rope_theta(last))
            facts = {"step": step, "tokens": position.tokens, "seed": run.seed}
            write_export(directory, model, tensors, tokenizer, facts=facts)
