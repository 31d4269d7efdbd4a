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


def gather_canonical(
    tensors: Mapping[str, Tensor], shards: Mapping[str, Shard], topology: Topology | None
) -> dict[str, Tensor]:
    """Joins this rank's slices of each tensor (parameters, gradients, moments) into the full ones.

    Collective over the model group; one tensor travels at a time. Returns the full tensors, on the CPU, on the model
    group's first rank (which has data rank 0 in one group); an empty dictionary on the others.

    Args:
        tensors: local slices by canonical name; every rank passes those it has.
        shards: where each slice lies, by the same names.
    """
    if topology is None or dist.get_world_size(topology.model_group) == 1:
        return {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    group = topology.model_group
    ranks = dist.get_process_group_ranks(group)
    is_root = topology.rank == ranks[0]
    listings: list[dict[str, tuple[Shard, torch.dtype]]] = [{} for _ in ranks]
    dist.all_gather_object(listings, {name: (shards[name], tensors[name].dtype) for name in tensors}, group=group)
    device = _device_of(group)
    full: dict[str, Tensor] = {}
    for source, listing in zip(ranks, listings, strict=True):
        for name, (shard, dtype) in listing.items():
            # ranks that hold the same slice: the first one speaks; a copy on another stage (tied head) is skipped
            if shard.dim is None and name in _earlier(listings, ranks, source):
                continue
            if is_root:
                part = torch.empty(shard.local, dtype=dtype, device=device)
                if source == topology.rank:
                    part.copy_(tensors[name])
                else:
                    dist.recv(part, src=source, group=group)
                if name not in full:
                    full[name] = torch.empty(shard.full, dtype=dtype)
                shard.cut(full[name]).copy_(part)
            elif topology.rank == source:
                dist.send(tensors[name].detach().to(device).contiguous(), dst=ranks[0], group=group)
    return full


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


def _earlier(listings: list[dict[str, tuple[Shard, torch.dtype]]], ranks: list[int], source: int) -> set[str]:
    return {name for rank, listing in zip(ranks, listings, strict=True) if rank < source for name in listing}


def _is_stage(module: nn.Module) -> bool:
    return hasattr(module, "stage_borders")


def _device_of(group: dist.ProcessGroup) -> torch.device:
    if dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
