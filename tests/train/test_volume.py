"""The bytes that a plan expects a step to send are those that a step counts."""

from __future__ import annotations

import types
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megayoco.config import CrossBatchConfig, DataConfig, PhaseConfig, RunConfig
from megayoco.train.memory import phase_work, stage_blocks
from megayoco.train.volume import micro_batch_volume, step_volume
from tests.distributed.steps import VOCAB, Case, model_config, parallel_step
from tests.workers import Workers

TOKENS, ROWS = 48, 8
FAR = CrossBatchConfig(range=40, stepping=False, negatives="neighbour")
CASES = [
    ("yoco-retention", Case(world=4, tensor=4)),
    ("yoco-retention", Case(world=4, tensor=2, sequence=2, bands=4, micro_batch=8, checkpointing=True)),
    ("yoco-window", Case(world=2, sequence=2, bands=4, order="split")),
    ("yoco-wide", Case(world=4, sequence=4, micro_batch=1)),
    ("llama", Case(world=4, tensor=2, sequence=2, checkpointing=True)),
    ("yoco-retention", Case(world=4, pipeline=2, sequence=2, bands=4)),
    ("longllama", Case(world=4, tensor=4, documents=False)),
    ("longllama", Case(world=4, tensor=2, sequence=2, checkpointing=True, documents=False)),
    (
        "longllama",
        Case(world=4, sequence=2, documents=False, cross_batch=CrossBatchConfig(range=9, negatives="neighbour")),
    ),
    ("yoco-memory", Case(world=4, checkpointing=True, micro_batch=1, documents=False, cross_batch=FAR)),
]


def counted_step(model: str, case: Case, batch: tuple[Tensor, ...]) -> dict[str, int]:
    """What this rank sends in one step."""
    from megayoco.traffic import TRAFFIC

    TRAFFIC.take()
    parallel_step(model, case, batch)
    return TRAFFIC.take()


@pytest.mark.parametrize(("model", "case"), CASES, ids=str)
def test_volume_of_a_step(workers: Workers, model: str, case: Case) -> None:
    ids = torch.randint(0, VOCAB, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    batch = ids, ids.roll(-1, 1), torch.arange(TOKENS).expand(ROWS, -1) // 10 * 10
    counted = workers.run(counted_step, model, case, batch, world=case.world)
    data = case.data
    layout = types.SimpleNamespace(tensor=case.tensor, sequence=case.sequence, pipeline=case.pipeline, data=data)
    run = RunConfig(
        model=model_config(model),
        parallel=case.parallel,
        data=DataConfig(train="x"),
        phases=[
            PhaseConfig(
                sequence_length=TOKENS,
                steps=1,
                batch_size=ROWS,
                micro_batch_size=case.micro_batch,
                learning_rate=1.0,
                cross_batch=case.cross_batch,
            )
        ],
        output_dir="x",
    )
    work = replace(
        phase_work(run, 0, layout, 8, case.bands, gpu=False), checkpointing=case.checkpointing, order=case.order
    )
    ranks = case.world // case.pipeline
    for number, stage in enumerate(stage_blocks(run, 0, layout)):
        micro = micro_batch_volume(work, stage, case.documents)
        expected = {name: round(count * run.phases[0].micro_batches(data)) for name, count in micro.items()}
        # of the ranks of a sequence those at its end have fewer neighbours to serve
        most: dict[str, int] = {}
        for own in counted[number * ranks : (number + 1) * ranks]:
            most = {name: max(most.get(name, 0), own.get(name, 0)) for name in {*most, *own}}
        assert most == expected


def test_volume_of_gradients_by_zero_stage() -> None:
    def sent(stage: int, **config: Any) -> dict[str, float]:
        return dict(step_volume(1000.0, 4, 8, {"zero_optimization": {"stage": stage}, **config}, 2))

    assert sent(0) == {"data/gradients": 2 * 1000 * 2 * 3 / 4}
    assert sent(1) == {"data/gradients": 2 * 1000 * 2 * 3 / 4, "data/parameters": 1000 * 2 * 3 / 4}
    assert sent(2) == {"data/gradients": 8 * 2 * 1000 * 2 * 3 / 4, "data/parameters": 1000 * 2 * 3 / 4}
    assert sent(3) == {"data/gradients": 8 * 1000 * 2 * 3 / 4, "data/parameters": 16 * 1000 * 2 * 3 / 4}
    assert sent(1, communication_data_type="fp32")["data/gradients"] == 2 * 1000 * 4 * 3 / 4
    assert not step_volume(1000.0, 1, 8, {"zero_optimization": {"stage": 2}}, 2)
