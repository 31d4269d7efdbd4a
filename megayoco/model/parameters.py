"""Parameters by canonical name, in every layout: listing, gathering to full tensors, loading from them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megayoco.errors import UserError
from megayoco.parallel.shards import Shard, fill, name_of, shard_of
from megayoco.parallel.topology import Topology


def canonical_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """This rank's parameters under names that do not depend on the layout (`layers.3.mixer.q_proj.weight`)."""
    return {name_of(parameter): parameter for parameter in module.parameters()}


def count_parameters(module: nn.Module, topology: Topology | None = None) -> int:
    """Parameters of the whole model, each counted once. Collective over the model group if there is a topology."""
    local = 0
    for parameter in module.parameters():
        shard = shard_of(parameter)
        if shard.counted:
            # under ZeRO 3 the parameter itself is empty, its shard is not
            local += torch.Size(shard.local).numel()
    if topology is None:
        return local
    total = torch.tensor(local, dtype=torch.int64, device=_device_of(topology.model_group))
    dist.all_reduce(total, group=topology.model_group)
    return int(total)


class Gatherer:
    """Joins the ranks' slices of one tensor at a time (parameters, gradients, moments) into full ones, on the CPU of
    the model group's first rank, which has data rank 0 in one group. Construction and every call are collective over
    the model group.

    Args:
        shards: where each slice of this rank lies, by canonical name.
        dtypes: of the slices, by the same names.
        topology: None: this process has everything.
    """

    def __init__(
        self, shards: Mapping[str, Shard], dtypes: Mapping[str, torch.dtype], topology: Topology | None
    ) -> None:
        own = {name: (shards[name], dtypes[name]) for name in shards}
        self._group = None if topology is None else topology.model_group
        self._rank, self._ranks = 0, [0]
        listings: list[dict[str, tuple[Shard, torch.dtype]]] = [own]
        if self._group is not None and dist.get_world_size(self._group) > 1:
            assert topology is not None
            self._rank, self._ranks = topology.rank, dist.get_process_group_ranks(self._group)
            listings = [{} for _ in self._ranks]
            dist.all_gather_object(listings, own, group=self._group)
        self._sources: dict[str, list[tuple[int, Shard, torch.dtype]]] = {}
        for source, listing in zip(self._ranks, listings, strict=True):
            for name, (shard, dtype) in listing.items():
                before = self._sources.setdefault(name, [])
                # ranks that hold the same slice: the first one speaks; a copy on another stage (tied head) is skipped
                if all((shard.dim, shard.start) != (other.dim, other.start) for _, other, _ in before):
                    before.append((source, shard, dtype))

    def names(self) -> list[str]:
        """All tensors of all ranks, the lower ranks' first."""
        return list(self._sources)

    def dtype(self, name: str) -> torch.dtype:
        """Of the slices of a tensor."""
        return self._sources[name][0][2]

    def __call__(self, name: str, slice_: Tensor | None) -> Tensor | None:
        """The full tensor on the first rank, None on the others, which pass their slice of it, or None without one."""
        sources = self._sources[name]
        if len(self._ranks) == 1:
            assert slice_ is not None
            return slice_.detach().to("cpu", copy=True)
        root, device = self._ranks[0], _device_of(self._group)
        full: Tensor | None = None
        for source, shard, dtype in sources:
            if self._rank == root:
                part = slice_.detach() if source == root and slice_ is not None else None
                if part is None:
                    part = torch.empty(shard.local, dtype=dtype, device=device)
                    dist.recv(part, src=source, group=self._group)
                if full is None:
                    full = torch.empty(shard.full, dtype=dtype)
                shard.cut(full).copy_(part)
            elif self._rank == source:
                assert slice_ is not None
                dist.send(slice_.detach().to(device).contiguous(), dst=root, group=self._group)
        return full


def gather_canonical(
    tensors: Mapping[str, Tensor], shards: Mapping[str, Shard], topology: Topology | None
) -> dict[str, Tensor]:
    """All full tensors at once: see `Gatherer`. An empty dictionary on the ranks that get none. Collective."""
    gather = Gatherer(shards, {name: tensor.dtype for name, tensor in tensors.items()}, topology)
    full = {name: gather(name, tensors.get(name)) for name in gather.names()}
    return {name: tensor for name, tensor in full.items() if tensor is not None}


def load_canonical(module: nn.Module, tensors: Mapping[str, Tensor], source: str = "the weights") -> None:
    """Fills this rank's parameters from full tensors by canonical name, cutting each to its shard.

    Raises:
        UserError: a tensor is missing, has another shape, or (one process holding the whole model) is not used.
    """
    parameters = canonical_parameters(module)
    missing = sorted(set(parameters) - set(tensors))
    if missing:
        raise UserError(f"{source} lacks {len(missing)} tensors of the model, the first is {missing[0]}")
    for name, parameter in parameters.items():
        shard = shard_of(parameter)
        if tuple(tensors[name].shape) != shard.full:
            raise UserError(f"{source}: {name} has shape {tuple(tensors[name].shape)}, the model wants {shard.full}")
        fill(parameter, tensors[name])
    whole_model = all(tuple(parameter.shape) == shard_of(parameter).full for parameter in parameters.values())
    unused = sorted(set(tensors) - set(parameters))
    if whole_model and unused and not _is_stage(module):
        raise UserError(f"{source} holds {len(unused)} tensors that the model lacks, the first is {unused[0]}")


def shards_of(module: nn.Module) -> dict[str, Shard]:
    """The shards of this rank's parameters by canonical name."""
    return {name: shard_of(parameter) for name, parameter in canonical_parameters(module).items()}


def _is_stage(module: nn.Module) -> bool:
    return hasattr(module, "stage_borders")


def _device_of(group: dist.ProcessGroup | None) -> torch.device:
    if dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
