"""What one rank will need, before anything is allocated: a run that cannot fit fails in seconds, not at step one.

An estimate from below (no fragmentation, no communication buffers): what it refuses cannot run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from megayoco.config import RunConfig
from megayoco.dsconfig import precision
from megayoco.errors import UserError
from megayoco.parallel.topology import Topology

GIB = 1024**3


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that the fullest rank holds at once, on the device unless offloaded."""

    weights: float
    gradients: float
    optimizer: float
    """Moments, and the fp32 copy of the weights where there is one."""
    activations: float
    """Kept between forward and backward, of the phase that needs most."""
    host: float
    """Main memory that offloaded states need."""

    @property
    def device(self) -> float:
        """All that lies on the device."""
        return self.weights + self.gradients + self.optimizer + self.activations

    def describe(self) -> str:
        """One line for the start of a run."""
        parts = [("weights", self.weights), ("gradients", self.gradients), ("optimizer", self.optimizer)]
        parts += [("activations", self.activations)]
        text = f"at least {_size(self.device)} per process: " + ", ".join(f"{n} {_size(b)}" for n, b in parts)
        return text + (f"; {_size(self.host)} offloaded to main memory" if self.host else "")


def estimate_memory(run: RunConfig, ds_config: dict[str, Any], topology: Topology) -> MemoryEstimate:
    """The need of the fullest rank of this layout."""
    zero = ds_config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    shards = topology.data * topology.sequence
    fp32 = precision(ds_config) == "fp32"
    width = 4 if fp32 else 2
    counts = run.model.parameter_count()
    ends = 2 if run.model.tie_embeddings and topology.pipeline > 1 else 1
    # the fullest stage holds at least an even share of everything, and at least the embedding or the head
    local = max(counts["total"] / topology.pipeline, counts["embedding"] * ends / 2 if topology.pipeline > 1 else 0)
    local /= topology.tensor
    weights = local * width / (shards if stage == 3 else 1)
    gradient_width = 4 if ds_config.get("data_types", {}).get("grad_accum_dtype") == "fp32" else width
    gradients = local * gradient_width / (shards if stage >= 2 else 1)
    master = 0 if fp32 and stage == 0 else 4
    optimizer = local * (master + 8) / (shards if stage >= 1 else 1)
    host = 0.0
    if (zero.get("offload_optimizer") or {}).get("device", "none") != "none":
        host, optimizer = host + optimizer, 0.0
    if (zero.get("offload_param") or {}).get("device", "none") != "none":
        host, weights = host + weights, 0.0
    activations = max(_activations(run, phase, topology, width) for phase in range(len(run.phases)))
    return MemoryEstimate(weights, gradients, optimizer, activations, host)


def _activations(run: RunConfig, phase_number: int, topology: Topology, width: int) -> float:
    phase, model, tensor = run.phases[phase_number], run.model, topology.tensor
    tokens = phase.micro_batch_size * phase.sequence_length / topology.sequence
    # residual, normed input and their twins at the feed-forward; then query, key, value, output; gate, up and product
    layer = 4 * model.dim + (4 * model.dim + 3 * model.hidden_dim) / tensor
    layers = model.layers / topology.pipeline
    kept = layers * model.dim + layer if run.parallel.activation_checkpointing else layers * layer
    # 1F1B: the first stage has one micro-batch under way for each stage
    in_flight = min(topology.pipeline, phase.micro_batches(topology.data))
    return tokens * kept * width * in_flight + _gathered(run, phase_number, topology, width)


def _gathered(run: RunConfig, phase_number: int, topology: Topology, width: int) -> float:
    """Keys and values of whole sequences on a sequence axis: once for all cross layers with their gradients, else of
    every full layer (of one at a time where activations are computed again)."""
    if topology.sequence == 1:
        return 0.0
    phase, model = run.phases[phase_number], run.model
    pairs = (
        2.0 if model.pattern == "yoco" or run.parallel.activation_checkpointing else model.layers / topology.pipeline
    )
    heads = max(model.num_kv_heads // topology.tensor, 1)
    return phase.micro_batch_size * phase.sequence_length * pairs * 2 * heads * model.head_dim * width


def available_memory(device: torch.device, local_size: int) -> tuple[float, str]:
    """Bytes that one process may use on its device, and what they are called in a message."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return float(total), f"{torch.cuda.get_device_name(device)} has {_size(total)} ({_size(free)} free now)"
    host = available_host_memory()
    share = host / local_size
    processes = "process has" if local_size == 1 else f"of {local_size} processes on this machine has"
    return share, f"this machine has {_size(host)} free, so each {processes} {_size(share)}"


def available_host_memory() -> float:
    """Free main memory in bytes, within the limit of a container if there is one."""
    free = float(psutil.virtual_memory().available)
    for limit_file, used_file in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            limit, used = (Path(name).read_text().strip() for name in (limit_file, used_file))
            if limit != "max":
                free = min(free, max(0.0, float(limit) - float(used)))
        except (OSError, ValueError):
            continue
    return free


def check_memory(estimate: MemoryEstimate, device: torch.device, local_size: int) -> None:
    """Raises UserError if the estimate exceeds what this rank's device, or the machine for offloaded states, has."""
    capacity, words = available_memory(device, local_size)
    need = estimate.device + (estimate.host if device.type == "cpu" else 0.0)
    remedy = (
        "Use more processes with parallel.tensor or parallel.pipeline, a higher ZeRO stage, "
        "parallel.activation_checkpointing=true, a smaller micro_batch_size or a smaller model."
    )
    if need > capacity:
        raise UserError(f"The run needs {estimate.describe()}; {words}. {remedy}")
    if device.type != "cpu" and estimate.host > available_host_memory() / local_size:
        raise UserError(
            f"The run offloads {_size(estimate.host)} per process to main memory; each of {local_size} processes "
            f"on this machine has {_size(available_host_memory() / local_size)}. {remedy}"
        )


def _size(count: float) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / 1024**2:.1f} MiB"
