"""Who is whose neighbour, written out; no processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megayoco.config import ModelConfig, ParallelConfig
from megayoco.errors import UserError
from megayoco.parallel.topology import Topology, build_topology, destroy_topology

MODEL = ModelConfig(dim=64, layers=8, hidden_dim=64, heads=8, kv_heads=2, vocab_size=64)


@contextmanager
def fake_rank(rank: int, world: int, model: ModelConfig = MODEL, **sizes: int) -> Iterator[Topology]:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield build_topology(ParallelConfig(**sizes), model)
    finally:
        destroy_topology()
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("rank", "tensor", "data", "pipeline", "model_group"),
    [
        (0, [0, 1], [0, 2], [0, 4], [0, 1, 4, 5]),
        (3, [2, 3], [1, 3], [3, 7], [2, 3, 6, 7]),
        (6, [6, 7], [4, 6], [2, 6], [2, 3, 6, 7]),
    ],
)
def test_tensor_is_fastest_and_pipeline_slowest(rank, tensor, data, pipeline, model_group):
    with fake_rank(rank, 8, tensor=2, pipeline=2) as topology:
        assert (topology.tensor, topology.data, topology.pipeline) == (2, 2, 2)
        assert dist.get_process_group_ranks(topology.tensor_group) == tensor
        assert dist.get_process_group_ranks(topology.data_group) == data
        assert dist.get_process_group_ranks(topology.gradient_group) == data
        assert dist.get_process_group_ranks(topology.pipeline_group) == pipeline
        assert dist.get_process_group_ranks(topology.model_group) == model_group
        assert (topology.tensor_rank, topology.data_rank, topology.pipeline_rank) == (
            tensor.index(rank),
            data.index(rank),
            pipeline.index(rank),
        )
        assert topology.is_first_stage == (rank < 4)
        assert topology.mpu().get_data_parallel_rank() == data.index(rank)
        assert topology.kv_replica_group is None


@pytest.mark.parametrize(("rank", "expected"), [(1, [0, 1, 2, 3]), (6, [4, 5, 6, 7]), (13, [12, 13, 14, 15])])
def test_neighbours_share_a_key_value_head(rank, expected):
    with fake_rank(rank, 16, tensor=8) as topology:  # two heads on eight ranks
        assert topology.kv_replica_group is not None
        assert dist.get_process_group_ranks(topology.kv_replica_group) == expected


@pytest.mark.parametrize(
    ("world", "sizes", "message"),
    [
        (6, {"tensor": 4}, r"6 processes .* 4"),
        (8, {"tensor": 8, "pipeline": 3}, r"8 processes .* 24"),
        (3, {"tensor": 3}, r"heads"),
        (6, {"sequence": 4}, r"6 processes .* sequence 4 .* 4"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(world, sizes, message):
    with pytest.raises(UserError, match=message), fake_rank(0, world, **sizes):
        pass


def test_every_layout_of_eight_agrees_with_both_libraries():
    """build_topology compares its coordinates with megatron-core's and DeepSpeed's on every rank."""
    layouts: list[dict[str, int]] = [{"tensor": 8}, {"pipeline": 8}, {"tensor": 2, "pipeline": 4}, {}]
    layouts += [{"tensor": 4, "pipeline": 2}, {"sequence": 8}, {"sequence": 2, "tensor": 2, "pipeline": 2}]
    for sizes in layouts:
        for rank in range(8):
            with fake_rank(rank, 8, **sizes) as topology:
                assert topology.rank == rank


def test_ranks_of_a_sequence_lie_between_tensor_and_data():
    with fake_rank(6, 16, tensor=2, sequence=2, pipeline=2) as topology:
        assert (topology.tensor_rank, topology.sequence_rank, topology.data_rank, topology.pipeline_rank) == (
            0,
            1,
            1,
            0,
        )
        assert dist.get_process_group_ranks(topology.sequence_group) == [4, 6]
        assert dist.get_process_group_ranks(topology.data_group) == [2, 6]
        assert dist.get_process_group_ranks(topology.gradient_group) == [0, 2, 4, 6]
