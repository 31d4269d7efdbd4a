"""Which rank does what: the only file that knows rank numbers. Everything else is handed process groups.

World = pipeline x data x sequence x tensor, tensor fastest. These are megatron-core's default order (`tp-cp-ep-dp-pp`,
its context-parallel axis being our sequence axis) and DeepSpeed's PipeModelDataParallelTopology with its data axis
equal to our data x sequence: `build_topology` checks that both libraries see the same ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from megatron.core import parallel_state

from megayoco.config import ModelConfig, ParallelConfig
from megayoco.errors import UserError


@dataclass(frozen=True)
class Topology:
    """The process groups and coordinates of one rank. A group of size 1 is a real group, never None."""

    tensor: int
    """Ranks that share each matrix."""
    sequence: int
    """Ranks that share each sequence."""
    data: int
    """Replicas that see different sequences."""
    pipeline: int
    """Stages that share the stack of layers."""
    rank: int
    """This process among all."""
    tensor_group: dist.ProcessGroup
    sequence_group: dist.ProcessGroup
    data_group: dist.ProcessGroup
    gradient_group: dist.ProcessGroup
    """Ranks that hold the same parameters: data x sequence. Gradients are summed over it."""
    pipeline_group: dist.ProcessGroup
    model_group: dist.ProcessGroup
    """Ranks that together hold one copy of the model: pipeline x tensor."""
    kv_replica_group: dist.ProcessGroup | None = None
    """Neighbouring tensor ranks that hold the same key-value head; None where every rank has heads of its own."""

    @property
    def world_size(self) -> int:
        return self.pipeline * self.data * self.sequence * self.tensor

    @property
    def tensor_rank(self) -> int:
        return self.rank % self.tensor

    @property
    def sequence_rank(self) -> int:
        return self.rank // self.tensor % self.sequence

    @property
    def data_rank(self) -> int:
        return self.rank // (self.tensor * self.sequence) % self.data

    @property
    def pipeline_rank(self) -> int:
        return self.rank // (self.tensor * self.sequence * self.data)

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline - 1

    def describe(self) -> str:
        """The layout in words, for the start of a run."""
        return (
            f"pipeline {self.pipeline} x data {self.data} x sequence {self.sequence} x tensor {self.tensor}"
            f" = {self.world_size} processes"
        )

    def mpu(self) -> ModelParallelUnit:
        """The view of this topology that `deepspeed.initialize(mpu=...)` asks for (without pipeline)."""
        return ModelParallelUnit(self)


class ModelParallelUnit:
    """DeepSpeed's `mpu` interface. "Model parallel" means tensor parallel there when no pipeline module is used."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._topology.tensor_group

    def get_model_parallel_rank(self) -> int:
        return self._topology.tensor_rank

    def get_model_parallel_world_size(self) -> int:
        return self._topology.tensor

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._topology.gradient_group

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self._topology.gradient_group)

    def get_data_parallel_rank(self) -> int:
        return self._topology.data_rank * self._topology.sequence + self._topology.sequence_rank

    def get_data_parallel_world_size(self) -> int:
        return self._topology.data * self._topology.sequence


def build_topology(parallel: ParallelConfig, model: ModelConfig) -> Topology:
    """Makes the process groups of a layout. Collective: every rank of the started process group calls it.

    Args:
        parallel: sizes of the axes; the data axis is what they leave over.
        model: needed for the groups of ranks that share a key-value head.

    Raises:
        UserError: the world size does not factor, or the model does not divide (the message shows the arithmetic).
    """
    world_size, rank = dist.get_world_size(), dist.get_rank()
    data = parallel.data(world_size)
    parallel.validate(model, world_size)
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        context_parallel_size=parallel.sequence,
        create_gloo_process_groups=False,
    )
    topology = Topology(
        tensor=parallel.tensor,
        sequence=parallel.sequence,
        data=data,
        pipeline=parallel.pipeline,
        rank=rank,
        tensor_group=parallel_state.get_tensor_model_parallel_group(),
        sequence_group=parallel_state.get_context_parallel_group(),
        data_group=parallel_state.get_data_parallel_group(),
        gradient_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        pipeline_group=parallel_state.get_pipeline_model_parallel_group(),
        model_group=parallel_state.get_model_parallel_group(),
        kv_replica_group=_kv_replica_group(model.num_kv_heads, parallel.tensor, world_size, rank),
    )
    _check_coordinates(topology)
    return topology


def destroy_topology() -> None:
    """Forgets every group that megatron-core and DeepSpeed keep in module state, so that another layout can follow."""
    from deepspeed.utils import groups

    parallel_state.destroy_model_parallel()
    groups.mpu = None
    for name in ("_WORLD_GROUP", "_ZERO_PARAM_INTRA_PARALLEL_GROUP", "mesh_device"):
        if hasattr(groups, name):
            setattr(groups, name, None)


def pipeline_topology(topology: Topology):  # type: ignore[no-untyped-def]  # DeepSpeed is untyped
    """The same layout in DeepSpeed's terms: axes pipe, data (= data x sequence), model."""
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    return PipeModelDataParallelTopology(
        num_pp=topology.pipeline, num_mp=topology.tensor, num_dp=topology.data * topology.sequence
    )


def _kv_replica_group(kv_heads: int, tensor: int, world_size: int, rank: int) -> dist.ProcessGroup | None:
    replicas = tensor // kv_heads
    if replicas <= 1:
        return None
    mine = None
    for start in range(0, world_size, replicas):
        ranks = list(range(start, start + replicas))
        group = dist.new_group(ranks)  # collective: every rank makes every group
        if rank in ranks:
            mine = group
    return mine


def _check_coordinates(topology: Topology) -> None:
    """Our arithmetic, megatron-core's groups and DeepSpeed's grid must name the same neighbours."""
    coordinates = pipeline_topology(topology).get_coord(topology.rank)
    ours = (
        topology.pipeline_rank,
        topology.data_rank * topology.sequence + topology.sequence_rank,
        topology.tensor_rank,
    )
    megatron = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(with_context_parallel=True),
        parallel_state.get_tensor_model_parallel_rank(),
    )
    if not ours == megatron == (coordinates.pipe, coordinates.data, coordinates.model):
        raise UserError(
            f"rank {topology.rank} is {ours} (pipeline, data x sequence, tensor) here but {megatron} in megatron-core"
            f" and {tuple(coordinates)} in DeepSpeed. Use the tested versions of constraints.txt."
        )
