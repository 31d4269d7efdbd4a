"""What a step costs and how well the hardware is used.

Model FLOP utilisation (MFU) = FLOPs that the model needs / (seconds x peak of all processes). The model's FLOPs are
counted per mixer in `megayoco.model.flops`: forward once, backward twice the forward; recomputation by activation
checkpointing is not counted, so it lowers the figure.
"""

from __future__ import annotations

import re
import resource
import sys
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megayoco.config import ModelConfig
from megayoco.model.flops import flops_per_sequence

# FLOPs per second of dense matrix products, in units of 1e12, from the makers' data sheets: bf16 and fp16, then fp32
# without TF32. The longest name that occurs in the device's name counts.
PEAK_TFLOPS = {
    "B200": (2250.0, 80.0),
    "B100": (1750.0, 60.0),
    "GB200": (2500.0, 80.0),
    "H200": (989.5, 67.0),
    "GH200": (989.5, 67.0),
    "H100": (989.5, 67.0),
    "H100 PCIe": (756.5, 51.0),
    "H100 NVL": (835.5, 60.0),
    "H800": (989.5, 67.0),
    "H20": (148.0, 44.0),
    "A100": (312.0, 19.5),
    "A800": (312.0, 19.5),
    "A40": (149.7, 37.4),
    "A10": (125.0, 31.2),
    "A6000": (154.8, 38.7),
    "L40S": (362.0, 91.6),
    "L40": (181.0, 90.5),
    "L4": (121.0, 30.3),
    "V100": (125.0, 15.7),
    "T4": (65.0, 8.1),
    "RTX 4090": (165.2, 82.6),
    "RTX 3090": (71.0, 35.6),
    "MI355X": (2516.0, 157.3),
    "MI325X": (1307.4, 163.4),
    "MI300X": (1307.4, 163.4),
    "MI300A": (980.6, 122.6),
    "MI250X": (383.0, 95.7),
    "MI250": (362.1, 90.5),
}


@dataclass(frozen=True)
class Peak:
    """The most FLOPs per second that all processes together can do in the run's precision."""

    flops_per_second: float
    source: str
    """Where the figure is from, for the start of the run."""


def peak_from_table(device_name: str, precision: str) -> float | None:
    """FLOPs per second of one device by its name, or None where the table has no such device."""
    spaced = device_name.replace("-", " ")
    names = [name for name in PEAK_TFLOPS if re.search(rf"\b{name}\b", spaced)]
    if not names:
        return None
    half, single = PEAK_TFLOPS[max(names, key=len)]
    return (single if precision == "fp32" else half) * 1e12


def measured_matmul(device: torch.device, dtype: torch.dtype, seconds: float = 0.2) -> float:
    """FLOPs per second of a square matrix product on this device, the mean over about `seconds`.

    The mean, not the best: where processes share cores the best is what one of them does while the others wait.
    """
    size = 512 if device.type == "cpu" else 8192
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    torch.matmul(a, b)
    _synchronize(device)
    products, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        torch.matmul(a, b)
        _synchronize(device)
        products += 1
    return products * 2 * size**3 / (time.perf_counter() - start)


def find_peak(device: torch.device, precision: str) -> Peak:
    """The peak of the whole world. Collective: without a table entry every rank measures at the same time (0.6 s)."""
    world = dist.get_world_size()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = peak_from_table(name, precision)
        if known is not None:
            return Peak(known * world, f"{known / 1e12:.0f} TFLOP/s per {name}, {precision}, from the device table")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    best = 0.0
    # the best of three, since other work on the machine only slows it down
    for _ in range(3):
        dist.barrier()
        # fp64: an fp32 sum of 1e14 over many ranks would lose digits, and gloo has no other reason to care
        total = torch.tensor(measured_matmul(device, dtype), dtype=torch.float64, device=device)
        dist.all_reduce(total)
        best = max(best, total.item())
    return Peak(best, f"{best / 1e12:.3g} TFLOP/s over all processes, {precision}, measured at start")


def model_flops_per_step(model: ModelConfig, sequence_length: int, batch_size: int) -> float:
    """FLOPs that one optimizer step needs: forward and twice as much for backward, over `batch_size` sequences."""
    return 3.0 * batch_size * flops_per_sequence(model, sequence_length)


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory this process has held so far: on the GPU where there is one, else resident in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # kilobytes on Linux, bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@dataclass
class IntervalClock:
    """Time since the last report, split into the engine's part (forward, backward, optimizer) and the trainer's own."""

    started: float = 0.0
    engine_seconds: float = 0.0
    excluded_seconds: float = 0.0
    """Validation and checkpoints: work that was asked for, neither step nor overhead."""
    steps: int = 0
    tokens: int = 0
    flops: float = 0.0

    def reset(self) -> None:
        """Start a new interval now."""
        self.started = time.perf_counter()
        self.engine_seconds = self.excluded_seconds = self.flops = 0.0
        self.steps = self.tokens = 0

    def add_step(self, engine_seconds: float, tokens: int, flops: float) -> None:
        """Count one step."""
        self.steps += 1
        self.engine_seconds += engine_seconds
        self.tokens += tokens
        self.flops += flops

    def rates(self, peak: Peak, now: float | None = None) -> dict[str, float]:
        """Figures of the interval: seconds_per_step, tokens_per_second, mfu, overhead (share of the time, 0..1).

        mfu counts one document per sequence and a target in every row (model/flops.py): with document_mask, or few
        targets, it comes out too high.
        """
        seconds = (time.perf_counter() if now is None else now) - self.started - self.excluded_seconds
        return {
            "seconds_per_step": seconds / self.steps,
            "tokens_per_second": self.tokens / seconds,
            "mfu": self.flops / (seconds * peak.flops_per_second),
            "overhead": max(0.0, 1 - self.engine_seconds / seconds),
        }


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
