"""AdamW with decay on matrices only, and the gradient norm and clipping that DeepSpeed leaves to us."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megayoco.config import OptimizerConfig
from megayoco.parallel.shards import name_of, shard_of
from megayoco.parallel.topology import Topology


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """This rank's parameters: matrices with decay, everything else (norms) without. Empty groups are left out."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    # by the full shape: under ZeRO 3 the local tensor is flat
    matrices = [p for p in parameters if len(shard_of(p).full) >= 2 and "norm" not in name_of(p)]
    chosen = {id(parameter) for parameter in matrices}
    others = [parameter for parameter in parameters if id(parameter) not in chosen]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(
    groups: list[dict[str, Any]], config: OptimizerConfig, ds_config: dict[str, Any], device: torch.device
) -> tuple[torch.optim.Optimizer, str]:
    """AdamW over the groups, and what it is called at the start of a run. The learning rate is set before every step.

    With optimizer states offloaded from a GPU it is DeepSpeed's CPU Adam where its op can be built on every rank
    (collective then), else torch's, which `ds_config` is changed to allow.
    """
    settings: dict[str, Any] = {"lr": 0.0, "betas": config.betas, "eps": config.eps}
    if _offloads(ds_config):
        ds_config["zero_force_ds_cpu_optimizer"] = False
        if device.type != "cpu" and _everywhere(_can_build_cpu_adam(), device):
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            return DeepSpeedCPUAdam(groups, adamw_mode=True, **settings), "AdamW (DeepSpeed, on the CPU)"
    return torch.optim.AdamW(groups, fused=True, **settings), "AdamW (torch, fused)"


def _offloads(ds_config: Mapping[str, Any]) -> bool:
    zero = ds_config.get("zero_optimization", {})
    return (zero.get("offload_optimizer") or {}).get("device", "none") != "none"


def _can_build_cpu_adam() -> bool:
    try:
        from deepspeed.ops.op_builder import CPUAdamBuilder

        builder = CPUAdamBuilder()
        if not builder.is_compatible(verbose=False):
            return False
        builder.load(verbose=False)
    except Exception:  # whatever a compiler may raise; torch's AdamW does the same work
        return False
    return True


def _everywhere(here: bool, device: torch.device) -> bool:
    flag = torch.tensor(int(here), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag.item())


class NormAndClip:
    """Gradient norm and clipping just before the update, for fp32 without ZeRO: DeepSpeed clips there too, but does
    not say what the norm was, and computes none without clipping.

    Registered on the optimizer; `norm` then holds the norm of the last step's whole gradient (0-d, fp32).
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], maximum: float, topology: Topology
    ) -> None:
        self._parameters = list(parameters)
        self._maximum = maximum
        self._group = topology.model_group if topology.tensor * topology.pipeline > 1 else None
        self.norm: Tensor | None = None
        optimizer.register_step_pre_hook(self._before_step)

    @torch.no_grad()
    def _before_step(self, *_: Any) -> None:
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        counted = [p.grad for p in self._parameters if p.grad is not None and shard_of(p).counted]
        square = torch.zeros((), device=gradients[0].device)
        if counted:
            square = torch.stack(torch._foreach_norm(counted)).float().square().sum()
        if self._group is not None:
            dist.all_reduce(square, group=self._group)
        self.norm = square.sqrt()
        if self._maximum > 0:
            torch._foreach_mul_(gradients, (self._maximum / (self.norm + 1e-6)).clamp(max=1.0))


@torch.no_grad()
def reset_state(optimizer: torch.optim.Optimizer) -> None:
    """Forget the running means of Adam, in place: sharded or flattened, they are set to zero where they lie."""
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor):
                value.zero_()
            elif name == "step":
                state[name] = 0
    for group in optimizer.param_groups:
        if "step" in group:  # where Adam counts per group
            group["step"] = 0
