"""The runs of examples/ at their real parallel sizes: loaded, checked, and built on the meta device rank by rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megayoco.config import RunConfig, load_config
from megayoco.dsconfig import load_deepspeed_config
from megayoco.layers.linear import Builder
from megayoco.model.decoder import build_decoder
from megayoco.model.pipeline import split_stages, stage_specs
from megayoco.parallel.shards import shard_of
from megayoco.parallel.topology import Topology, build_topology, destroy_topology

ROOT = Path(__file__).parent.parent
RUNS = [
    ("pretrain_yoco_3b_8gpu.yaml", 8, "zero2_bf16.json"),
    ("pretrain_yoco_3b_64gpu.yaml", 64, "pipeline_zero1_bf16.json"),
    ("extend_context_1m_8gpu.yaml", 8, "zero2_bf16.json"),
    ("extend_context_1m_64gpu.yaml", 64, "zero2_bf16.json"),
    ("long_context_cpu.yaml", 4, "cpu.json"),
    ("quickstart.yaml", 4, "cpu.json"),
    ("needle_tiny.yaml", 2, "cpu.json"),
    ("longllama_tiny.yaml", 2, "cpu.json"),
    ("finetune_longllama_3b.yaml", 8, "zero2_bf16.json"),
]


@contextmanager
def fake_world(run: RunConfig, world: int, rank: int) -> Iterator[Topology]:
    """This process as one rank of a world whose collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield build_topology(run.parallel, run.model)
    finally:
        destroy_topology()
        dist.destroy_process_group()


def test_every_example_run_is_listed_here():
    assert {path.name for path in (ROOT / "examples").glob("*.yaml")} == {name for name, _, _ in RUNS}


@pytest.mark.parametrize(("name", "world", "ds_config"), RUNS)
def test_example_builds_at_its_real_size(name, world, ds_config):
    overrides = {
        "quickstart.yaml": ["parallel.tensor=2", "parallel.pipeline=2"],
        "long_context_cpu.yaml": ["parallel.sequence=4", "parallel.bands=4"],
    }.get(name, [])
    run = load_config(ROOT / "examples" / name, overrides)
    data = run.parallel.data(world)
    load_deepspeed_config(ROOT / "ds_configs" / ds_config, run, data, torch.device("cuda"))
    counted = 0
    for rank in range(world):
        with fake_world(run, world, rank) as topology:
            assert topology.data == data
            if topology.data_rank > 0 or topology.sequence_rank > 0:
                continue  # replicas of a rank already built
            counted += sum(_numel(p) for p in build_on_meta(run, topology))
    assert counted == run.model.parameter_count()["total"]


def build_on_meta(run: RunConfig, topology: Topology) -> list[torch.nn.Parameter]:
    with torch.device("meta"):
        if topology.pipeline == 1:
            return list(build_decoder(run.model, topology).parameters())
        borders = split_stages(run.model, topology.pipeline, run.phases[0].sequence_length)
        specs = stage_specs(run.model, Builder.of(topology, 0, torch.float32), borders, False, False)
        mine = specs[borders[topology.pipeline_rank] : borders[topology.pipeline_rank + 1]]
        return [parameter for spec in mine for parameter in spec.build().parameters()]


def _numel(parameter: torch.nn.Parameter) -> int:
    return parameter.numel() if shard_of(parameter).counted else 0
