"""Whole parameters under ZeRO 3, for code that uses them outside of DeepSpeed's hooks; without ZeRO 3, nothing."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def whole_parameters(parameters: Sequence[nn.Parameter], modules: Sequence[nn.Module]) -> Iterator[None]:
    """Under ZeRO 3: all these parameters gathered once, and the modules free of DeepSpeed's hooks, which would
    cut them again after each call and expect the same calls on every rank. Otherwise nothing."""
    away = _gather_away(parameters)
    if away is None:
        yield
        return
    hooked = [module for root in modules for module in root.modules()]
    hooks = [(module._forward_pre_hooks, module._forward_hooks) for module in hooked]
    try:
        for module in hooked:
            module._forward_pre_hooks, module._forward_hooks = OrderedDict(), OrderedDict()
        yield
    finally:
        for module, (before, after) in zip(hooked, hooks, strict=True):
            module._forward_pre_hooks, module._forward_hooks = before, after
        _cut_again(away)


def whole_until_the_end_of_backward(parameters: Sequence[nn.Parameter]) -> None:
    """Under ZeRO 3 a parameter must be whole when autograd hands it a gradient."""
    away = _gather_away(parameters)
    if away:
        torch.autograd.Variable._execution_engine.queue_callback(lambda: _cut_again(away))  # type: ignore[attr-defined]


def _gather_away(parameters: Sequence[nn.Parameter]) -> list[Any] | None:
    """Gathers the parameters that ZeRO 3 has cut; returns those, None without ZeRO 3. Collective."""
    cut: list[Any] = [p for p in parameters if hasattr(p, "ds_id")]
    if not cut:
        return None
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    away = [p for p in cut if p.ds_status != ZeroParamStatus.AVAILABLE]
    if away:
        away[0].all_gather(param_list=away)
    return away


def _cut_again(away: list[Any]) -> None:
    if away:
        away[0].partition(param_list=away)
