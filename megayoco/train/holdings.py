"""Where DeepSpeed keeps what a rank holds of every parameter: fp32 master weights and Adam's running means.

Without ZeRO these are the parameters themselves and their own state; ZeRO 1 to 3 and the bf16 optimizer keep flat
buffers, of which a parameter's share is a run of elements. `holdings` lists these runs on this rank, and where
`save_checkpoint` puts them; `layout_of` makes the description that convert/training.py reads, and `restore` fills the
runs from any such description. This is the one file that knows these parts of DeepSpeed (0.19).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megayoco.convert.training import KINDS, TrainingState
from megayoco.errors import UserError
from megayoco.parallel.agreement import all_ranks_agree
from megayoco.parallel.shards import name_of, shard_of
from megayoco.train.engine import Engine
from megayoco.train.starting import StartingState

MOMENTS = KINDS[1:]
Place = list[Any]
"""Name of a file, and the keys that lead to a tensor in it."""


class Holding(NamedTuple):
    """A run of elements of one parameter on this rank."""

    parameter: nn.Parameter
    begin: int
    """First element, in the flattened shard of this tensor rank."""
    length: int
    key: Tensor
    """Flat or shaped tensor that holds the master weights, and under which the optimizer keeps its state."""
    offset: int
    """First element in the flattened `key`."""
    group: int
    """Number of the buffer in DeepSpeed's lists; of the parameter, without ZeRO."""

    @property
    def master(self) -> Tensor:
        """The fp32 master weights, a view (length,)."""
        return self.key.detach().view(-1).narrow(0, self.offset, self.length)

    @property
    def working(self) -> Tensor:
        """The same elements of the parameter that the model computes with."""
        if hasattr(self.parameter, "ds_tensor"):  # ZeRO 3: the rank's part alone
            return self.parameter.ds_tensor.detach().view(-1)[: self.length]
        return self.parameter.detach().view(-1)[self.begin : self.begin + self.length]


def holdings(engine: Engine) -> list[Holding]:
    """What this rank's optimizer holds, the parameters in its order."""
    return [holding for holding in _runs(engine.deepspeed) if holding.length]


def _runs(engine: Any) -> Iterator[Holding]:
    optimizer = engine.optimizer
    if engine.zero_optimization_partition_weights():  # ZeRO 3
        for number, group in enumerate(optimizer.fp16_groups):
            rank = optimizer._get_sub_group_partition_rank(number)
            for parameter in group:
                _, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
                length = max(min(size, parameter.ds_numel - rank * size), 0)  # the last part is padded
                flat = optimizer.fp32_partitioned_groups_flat[number]
                yield Holding(parameter, rank * size, length, flat, offset, number)
    elif optimizer is engine.basic_optimizer:  # fp32 without ZeRO
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for number, parameter in enumerate(parameters):
            yield Holding(parameter, 0, parameter.numel(), parameter, 0, number)
    else:  # ZeRO 1, 2, or the optimizer of bf16 with fp32 sums
        flat_groups = _flat_groups(optimizer)
        for number, group in enumerate(_working_groups(optimizer)):
            for parameter in group:
                place: Any = getattr(parameter, "_hp_mapping", None)
                if place is not None:  # else all of it lies on other ranks
                    own, flat = place.lp_fragment_address, place.hp_fragment_address
                    yield Holding(parameter, own.start, own.numel, flat_groups[number], flat.start, number)


def _flat_groups(optimizer: Any) -> list[Tensor]:
    name = "fp32_groups_flat_partition" if hasattr(optimizer, "fp32_groups_flat_partition") else None
    return getattr(optimizer, name or "single_partition_of_fp32_groups")  # type: ignore[no-any-return]


def _working_groups(optimizer: Any) -> list[list[nn.Parameter]]:
    return getattr(optimizer, "bf16_groups", None) or optimizer.bit16_groups  # type: ignore[no-any-return]


def layout_of(engine: Engine) -> dict[str, Any]:
    """Where `save_checkpoint` puts every parameter, as layout.json says it. Collective; whole on rank 0 only.

    Raises:
        AgreedError: on every rank, a weight is not finite: such a checkpoint would be worth nothing.
        RuntimeError: the master weights are not where they are looked for.
    """
    with all_ranks_agree():
        own = _own_layout(engine)
    world = dist.get_world_size()
    parts: list[Any] = [None] * world
    dist.gather_object(own, parts if dist.get_rank() == 0 else None)
    layout: dict[str, Any] = {"optimizer_step": own["optimizer_step"], "files": [], "sources": [], "parameters": {}}
    files: dict[str, int] = {}
    for part in parts if dist.get_rank() == 0 else []:
        first = len(layout["sources"])
        for places in part["sources"]:
            numbered = {kind: [files.setdefault(file, len(files)), *keys] for kind, (file, *keys) in places.items()}
            layout["sources"].append(numbered)
        for name, (shape, pieces) in part["parameters"].items():
            entry = layout["parameters"].setdefault(name, {"shape": shape, "pieces": []})
            entry["pieces"] += [[first + source, *rest] for source, *rest in pieces]
    layout["files"] = list(files)
    return layout


def _own_layout(engine: Engine) -> dict[str, Any]:
    """This rank's part: what it holds and no other rank tells of."""
    optimizer, topology = engine.deepspeed.basic_optimizer, engine.topology
    replicated = engine.deepspeed.optimizer is optimizer  # without ZeRO, the first data rank alone is saved
    speaks = not replicated or topology.data_rank == topology.sequence_rank == 0
    sources: dict[int, int] = {}
    part: dict[str, Any] = {"optimizer_step": None, "sources": [], "parameters": {}}
    for holding in holdings(engine):
        if not holding.master.isfinite().all():
            raise UserError(
                f"{name_of(holding.parameter)} is not finite after this update, so nothing is saved; the last"
                " checkpoint is from before it. Lower the learning rate, warm up for longer, or check the data; then go"
                " on with --resume."
            )
        if not torch.equal(holding.master.to(holding.working), holding.working):
            raise RuntimeError(f"the master weights of {name_of(holding.parameter)} are not where they should be")
        state = optimizer.state.get(holding.key) or {}
        if "step" in state:
            part["optimizer_step"] = int(state["step"])
        shard = shard_of(holding.parameter)
        # not counted: replicas of key-value heads on tensor ranks, and of a tied head on the last stage
        if not (speaks and shard.counted):
            continue
        if holding.group not in sources:
            sources[holding.group] = len(sources)
            part["sources"].append(_places(engine, holding, bool(state)))
        dim = -1 if shard.dim is None else shard.dim
        piece = [sources[holding.group], holding.offset, dim, shard.start, shard.stop, holding.begin, holding.length]
        part["parameters"].setdefault(name_of(holding.parameter), (list(shard.full), []))[1].append(piece)
    return part


def _places(engine: Engine, holding: Holding, has_moments: bool) -> dict[str, Place]:
    """Where DeepSpeed saves the tensors that a holding lies in, by kind."""
    deepspeed, number = engine.deepspeed, holding.group
    if deepspeed.optimizer is deepspeed.basic_optimizer:
        file = Path(deepspeed._get_ckpt_name("", "")).name
        weight = _module_place(deepspeed.module, holding.parameter, file)
        moments: Place = [file, "optimizer", "state", number]
    else:
        zero3 = deepspeed.zero_optimization_partition_weights()
        state: Place = [Path(deepspeed._get_zero_ckpt_name("", "")).name, "optimizer_state_dict"]
        weight = [*state, "fp32_flat_groups" if zero3 else "single_partition_of_fp32_groups", number]
        moments = [*state, "optimizer_state_dict" if zero3 else "base_optimizer_state", "state", number]
    return {"weight": weight, **({kind: [*moments, kind] for kind in MOMENTS} if has_moments else {})}


def _module_place(module: nn.Module, parameter: nn.Parameter, file: str) -> Place:
    """Where the parameter itself is saved: in the module's state, or in the file of its layer of the pipeline."""
    layers = getattr(module, "forward_funcs", None)
    if layers is None:
        names = {id(other): name for name, other in reversed(list(module.named_parameters()))}
        return [file, "module", names[id(parameter)]]
    for number, layer in enumerate(layers):
        for name, other in layer.named_parameters() if isinstance(layer, nn.Module) else ():
            if other is parameter:
                return [Path(module.ckpt_layer_path("", number)).name, name]  # type: ignore[operator]
    raise RuntimeError(f"{name_of(parameter)} is in no layer of its stage")


@torch.no_grad()
def restore(engine: Engine, state: TrainingState | StartingState) -> None:
    """Fill this rank's part of the model and of the optimizer. Collective.

    Raises:
        UserError: on every rank, the checkpoint does not hold what the model has.
    """
    deepspeed = engine.deepspeed
    zero3 = deepspeed.zero_optimization_partition_weights()
    if zero3:
        deepspeed.optimizer.checkpoint_event_prologue()
    with all_ranks_agree():
        for holding in holdings(engine):
            where = (name_of(holding.parameter), shard_of(holding.parameter), holding.begin, holding.length)
            holding.master.copy_(_read(state, "weight", where))
            if state.optimizer_step is not None:
                moments = _moments(deepspeed.basic_optimizer, holding.key, state.optimizer_step)
                for kind in MOMENTS:
                    moments[kind].view(-1).narrow(0, holding.offset, holding.length).copy_(_read(state, kind, where))
    if zero3:
        _refresh_zero3(deepspeed.optimizer)
        deepspeed.optimizer.checkpoint_event_epilogue()
    elif deepspeed.optimizer is not deepspeed.basic_optimizer:
        deepspeed.optimizer.update_lp_params()


def _read(state: TrainingState | StartingState, kind: str, where: tuple[Any, ...]) -> Tensor:
    name, shard, begin, count = where
    return state.read(name, kind, shard, begin, count)


def _moments(optimizer: torch.optim.Optimizer, key: Tensor, step: int) -> dict[str, Any]:
    """Adam's state of a tensor, made as its first step would make it, after so many steps."""
    state: dict[str, Any] = optimizer.state[key]
    if not state:
        counts_in_tensors = isinstance(optimizer, torch.optim.AdamW)  # DeepSpeed's counts in an int
        state["step"] = torch.tensor(float(step), device=key.device) if counts_in_tensors else step
        for kind in MOMENTS:
            state[kind] = torch.zeros_like(key, memory_format=torch.preserve_format)
    return state


def _refresh_zero3(optimizer: Any) -> None:
    """The parts that the model computes with, from the master weights."""
    for number, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
        working = optimizer.fp16_partitioned_groups_flat[number]
        working.data.copy_(flat.data)
        parts = optimizer.unflatten(working, optimizer.fp16_partitioned_groups[number])
        for part, values in zip(optimizer.fp16_partitioned_groups[number], parts, strict=True):
            part.data = values.data
