"""Linear layers and embedding over the tensor-parallel ranks: megatron-core's, with three differences.

- They initialise the full matrix from a seed made of the run's seed and the parameter's canonical name and keep their
  slice: weights depend neither on the tensor-parallel degree nor on the pipeline cut.
- Every parameter carries its canonical name and its `Shard`.
- One rank needs no collectives: there they are plain `F.linear` and `F.embedding`, which are faster and need no
  process group.

Shapes: B batch, T tokens, D model dim, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from torch import Tensor, nn

from megayoco.ops.norm import rms_norm
from megayoco.parallel.collectives import sum_gradient
from megayoco.parallel.sequence import SequenceAxis
from megayoco.parallel.shards import Shard, column_shard, fill, mark, row_shard, whole
from megayoco.parallel.topology import Topology
from megayoco.traffic import TRAFFIC


@dataclass(frozen=True)
class Init:
    """How a matrix starts: `normal` (value = standard deviation), `uniform` (+-value) or `ones`."""

    kind: str
    value: float = 0.0

    def __call__(self, tensor: Tensor, generator: torch.Generator) -> None:
        if self.kind == "normal":
            tensor.normal_(0.0, self.value, generator=generator)
        elif self.kind == "uniform":
            tensor.uniform_(-self.value, self.value, generator=generator)
        elif self.kind == "ones":
            tensor.fill_(1.0)
        else:
            raise ValueError(f"unknown initialisation {self.kind!r}")


def xavier_uniform(rows: int, columns: int, gain: float) -> Init:
    """Glorot's uniform of the full (rows, columns) matrix."""
    return Init("uniform", gain * math.sqrt(6.0 / (rows + columns)))


def fan_in_uniform(columns: int) -> Init:
    """`kaiming_uniform(a=sqrt(5))`: uniform within 1/sqrt(fan_in), PyTorch's default for linear layers."""
    return Init("uniform", 1.0 / math.sqrt(columns))


@dataclass(frozen=True)
class Builder:
    """What every layer needs to make its parameters: the tensor-parallel place, seed and dtype."""

    seed: int = 0
    dtype: torch.dtype = torch.float32
    rank: int = 0
    ranks: int = 1
    group: dist.ProcessGroup | None = None
    kv_replica_group: dist.ProcessGroup | None = None
    sequence: SequenceAxis | None = None
    """The ranks that share every sequence; None where one rank has all of it."""
    replicas: SequenceAxis | None = None
    """The replicas of this rank's place, in the order of their micro-batches; None where there is one."""

    @staticmethod
    def of(topology: Topology | None, seed: int, dtype: torch.dtype) -> Builder:
        """The builder of a rank; without topology, of a model that one process holds alone."""
        if topology is None:
            return Builder(seed, dtype)
        return Builder(
            seed,
            dtype,
            topology.tensor_rank,
            topology.tensor,
            topology.tensor_group,
            topology.kv_replica_group,
            SequenceAxis.of(topology),
            SequenceAxis.of_replicas(topology),
        )

    def megatron(self) -> ModelParallelConfig:
        """megatron-core allocates where torch's default device says and leaves the values to us."""
        return ModelParallelConfig(
            tensor_model_parallel_size=self.ranks,
            use_cpu_initialization=True,
            perform_initialization=False,
            params_dtype=self.dtype,
        )

    def finish(self, parameter: nn.Parameter, name: str, shard: Shard, init: Init) -> None:
        """Marks the parameter and fills it with its slice of the initial matrix. Nothing to fill on the meta device."""
        mark(parameter, name, shard)
        if parameter.is_meta:
            return
        seed = int.from_bytes(hashlib.sha256(f"{self.seed}/{name}".encode()).digest()[:8], "little") >> 1
        # always fp32 on the CPU: the same numbers for every dtype, device and layout; float(), because under ZeRO 3
        # DeepSpeed makes torch.empty give the run's 16 bits whatever dtype is asked for
        full = torch.empty(shard.full, dtype=torch.float32, device="cpu").float()
        init(full, torch.Generator().manual_seed(seed))
        fill(parameter, full)


def _unused_init(_: Tensor) -> None:
    raise AssertionError("megatron-core was told not to initialise")


class ColumnLinear(ColumnParallelLinear):
    """(..., columns) -> (..., rows / ranks), rows of the weight cut over the tensor ranks.

    The input must have passed `sum_gradient(x, group)` once for all the projections that share it: one all-reduce in
    backward in place of one per projection.
    """

    def __init__(self, columns: int, rows: int, name: str, init: Init, builder: Builder) -> None:
        super().__init__(
            columns,
            rows,
            config=builder.megatron(),
            init_method=_unused_init,
            bias=False,
            disable_grad_reduce=True,
            tp_group=builder.group,
        )
        self.ranks = builder.ranks
        builder.finish(self.weight, f"{name}.weight", row_shard(rows, columns, builder.rank, builder.ranks), init)

    def forward(self, x: Tensor) -> Tensor:
        if self.ranks == 1:
            return F.linear(x, self.weight)
        return super().forward(x)[0]


class KeyValueLinear(ColumnParallelLinear):
    """Projection to G key or value heads of K: each rank holds G / ranks heads, or shares one head with neighbours.

    With fewer heads than ranks, a head's weight lives on ranks / G neighbouring ranks. Each serves only its own query
    heads, so each holds a part of the weight's gradient: the parts are summed over the replicas.
    """

    def __init__(self, columns: int, heads: int, head_dim: int, name: str, init: Init, builder: Builder) -> None:
        local_heads = max(heads // builder.ranks, 1)
        super().__init__(
            columns,
            local_heads * head_dim * builder.ranks,
            config=builder.megatron(),
            init_method=_unused_init,
            bias=False,
            disable_grad_reduce=True,
            tp_group=builder.group,
        )
        self.ranks = builder.ranks
        replicas = max(builder.ranks // heads, 1)
        # window layers have as many key-value heads as query heads: never replicated, whatever the cross half does
        self.replica_group = builder.kv_replica_group if replicas > 1 else None
        first = builder.rank * heads // builder.ranks
        shard = Shard(
            (heads * head_dim, columns),
            0,
            first * head_dim,
            (first + local_heads) * head_dim,
            counted=builder.rank % replicas == 0,
        )
        builder.finish(self.weight, f"{name}.weight", shard, init)

    def forward(self, x: Tensor) -> Tensor:
        if self.ranks == 1:
            return F.linear(x, self.weight)
        return super().forward(x, weight=sum_gradient(self.weight, self.replica_group, "tensor/weight_gradient"))[0]


class RowLinear(RowParallelLinear):
    """(..., columns / ranks) -> (..., rows), columns of the weight cut over the tensor ranks, outputs summed."""

    def __init__(self, columns: int, rows: int, name: str, init: Init, builder: Builder) -> None:
        super().__init__(
            columns,
            rows,
            config=builder.megatron(),
            init_method=_unused_init,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=False,
            tp_group=builder.group,
        )
        self.ranks = builder.ranks
        builder.finish(self.weight, f"{name}.weight", column_shard(rows, columns, builder.rank, builder.ranks), init)

    def forward(self, x: Tensor) -> Tensor:
        if self.ranks == 1:
            return F.linear(x, self.weight)
        y: Tensor = super().forward(x)[0]
        TRAFFIC.all_reduce("tensor/output", y, self.ranks)
        return y


class Embedding(VocabParallelEmbedding):
    """(B, T) int64 -> (B, T, D), rows cut over the tensor ranks, multiplied by `scale`."""

    def __init__(self, vocab: int, dim: int, scale: float, name: str, init: Init, builder: Builder) -> None:
        super().__init__(vocab, dim, init_method=_unused_init, config=builder.megatron(), tp_group=builder.group)
        self.ranks = builder.ranks
        self.scale = scale
        builder.finish(self.weight, f"{name}.weight", row_shard(vocab, dim, builder.rank, builder.ranks), init)

    def forward(self, tokens: Tensor) -> Tensor:
        if self.ranks == 1:
            x = F.embedding(tokens, self.weight)
        else:
            x = super().forward(tokens)
            TRAFFIC.all_reduce("tensor/output", x, self.ranks)
        return x if self.scale == 1.0 else x * self.scale


class RMSNorm(nn.Module):
    """Root-mean-square norm with a weight of D, whole on every rank; statistics in fp32."""

    def __init__(self, dim: int, eps: float, name: str, builder: Builder) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim, dtype=builder.dtype))
        builder.finish(self.weight, f"{name}.weight", whole((dim,), builder.rank), Init("ones"))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)
