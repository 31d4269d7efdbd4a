"""What a decoded token costs behind a long memory: memory attention beside the released code's way and a plain LLaMA.

    python benchmarks/memory_decode.py [--lengths 4096 65536 262144] [--clock wall] [--threads 2] [--output FILE.json]

Three subjects of one shape, one sequence, random weights:

    memory          a LongLLaMA, its memory read where it lies
    concatenated    the same weights, but every memory layer joins memory and window to one tensor for every token, as
                    the released code of LongLLaMA does; its logits are found equal first
    LLaMA           full attention in all layers

Each point runs in a process of its own. The context behind M tokens is made of random keys and values, not by reading a
text, which would change no cost. After a few tokens that load kernels and make room, --steps tokens are decoded:

    growth          bytes by which the resident set rises above what it was before these tokens, at its peak
    milliseconds    per token: median, quartiles, extremes
    cache           bytes of all keys and values

On a machine that others use as well, --clock cpu with --threads 1 counts what the one thread computes.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import gc
import importlib.metadata
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from inference import CLOCKS
from long_context_memory import resident
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from train_step import machine, summary

import megayoco.parallel  # noqa: F401  (before the layers: it keeps megatron-core quiet)
from megayoco.config import ModelConfig
from megayoco.layers import memory_attention as layer
from megayoco.model.decoder import build_decoder
from megayoco.model.inference import DecoderContext, InferenceModel, cache_bytes
from megayoco.model.window_options import WindowOptions
from megayoco.ops.key_value_cache import KeyValueCache
from megayoco.ops.key_values import KeyValues
from megayoco.ops.memory_attention import Segment

SHAPE: dict[str, Any] = dict(pattern="llama", dim=512, hidden_dim=1376, heads=8, kv_heads=2, layers=8, vocab_size=256)
WINDOW, MEMORY_LAYERS = 512, (2, 5)
SUBJECTS = ("memory", "concatenated", "LLaMA")
WARM_UP = 4
"""Tokens before those that are measured."""
_BLOCK = 4096
TOLERANCE = 1e-4
"""Largest difference of the logits of `concatenated`, relative to the largest of `memory`."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--lengths", type=int, nargs="+", default=[4096, 65536, 262144], help="tokens in the memory")
    add("--steps", type=int, default=24, help="tokens that are decoded for a point")
    add("--threads", type=int, default=os.cpu_count())
    add("--clock", default="wall", choices=list(CLOCKS), help="cpu: seconds of one thread")
    add("--output", type=Path, help="write the result as JSON, and the curves as PNG beside it")
    add("--job", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.job is not None:
        print(json.dumps(point(options.job["subject"], options.job["length"], options.steps, options.clock)))
        return
    if min(options.lengths) < WINDOW or options.steps < 2:
        parser.error(f"--lengths must be at least {WINDOW}, --steps 2")
    if options.clock == "cpu" and options.threads > 1:
        parser.error("--clock cpu counts what one thread computes: it needs --threads 1")
    result = {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", *sys.argv]),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "numpy")},
        "machine": machine(options.threads) | {"load before": round(os.getloadavg()[0], 1)},
        "clock": options.clock,
        "shape": {**SHAPE, "memory_layers": MEMORY_LAYERS, "memory_window": WINDOW},
        "largest relative difference of the logits, concatenated to memory": compare_logits(),
        "lengths": {},
    }
    for length in sorted(options.lengths):
        points = {name: in_fresh_process(name, length, options) for name in SUBJECTS}
        result["lengths"][str(length)] = points
        for name, found in points.items():
            print(f"{length:>9,} {name:13} {line_of(found)}", flush=True)
        if options.output:
            options.output.write_text(json.dumps(result, indent=2) + "\n")
            draw(result, options.output.with_suffix(".png"))


def build(subject: str) -> InferenceModel:
    """With random weights, always the same."""
    memory = {} if subject == "LLaMA" else {"memory_layers": MEMORY_LAYERS, "memory_window": WINDOW}
    model = ModelConfig(**SHAPE, **memory)
    windows = WindowOptions().resolved(model)
    return InferenceModel.of(build_decoder(model, None, seed=1).eval(), windows=windows)


def context_of(model: InferenceModel, length: int, reserve: int) -> DecoderContext:
    """Random keys and values of `length` tokens, always the same."""
    generator = torch.Generator().manual_seed(0)
    heads, head_dim = model.config.num_kv_heads, model.config.head_dim

    def some(count: int) -> KeyValues:
        return KeyValues(*(torch.randn(1, count, heads, head_dim, generator=generator) for _ in range(2)))

    empty, layers = model.empty_context(reserve=length + reserve), []
    rule = model.windows.eviction(model.config)
    for context in empty.layers:
        if isinstance(context, KeyValueCache):
            for start in range(0, length, _BLOCK):
                context = context.combine(some(min(_BLOCK, length - start)))
        else:
            assert rule is not None
            context = some(length - rule.begin(length))
        layers.append(context)
    return empty._replace(length=length, layers=tuple(layers))


def concatenated(
    q: Tensor,
    q_local: Tensor,
    rotated: Tensor,
    context: KeyValueCache | KeyValues,
    segments: Sequence[Segment],
    scale: float,
) -> Tensor:
    """`memory_attention_over_context` of one token, which joins its memory and its window."""
    ((_, local, memory, _, _),) = segments
    key, value = context.part(0, context.tokens) if isinstance(context, KeyValueCache) else context
    keys = torch.cat([key[:, memory], rotated[:, rotated.shape[1] - (local.stop - local.start) :]], 1)
    values = torch.cat([value[:, memory], value[:, local]], 1)
    heads = (x.transpose(1, 2) for x in (q, keys, values))
    return scaled_dot_product_attention(*heads, scale=scale, enable_gqa=True).transpose(1, 2)


def choose(subject: str) -> None:
    """The attention of memory layers in this process."""
    ours = layer.memory_attention_over_context
    layer.memory_attention_over_context = concatenated if subject == "concatenated" else ours


def compare_logits() -> float:
    """Raises RuntimeError unless `concatenated` is the same function as `memory`."""
    model = build("memory")
    context, ours = context_of(model, 2 * WINDOW + 7, 8), layer.memory_attention_over_context
    found = []
    for subject in ("memory", "concatenated"):
        choose(subject)
        found.append(model.advance(torch.tensor([[3]]), context)[0])
    layer.memory_attention_over_context = ours
    difference = float((found[1] - found[0]).abs().max() / found[0].abs().max())
    if not difference <= TOLERANCE:
        raise RuntimeError(f"the logits of `concatenated` differ from those of `memory` by {difference:.1e}")
    return difference


def point(subject: str, length: int, steps: int, clock: str) -> dict[str, Any]:
    """In this process: what tokens behind `length` others add to the memory in use, and how long they take."""
    choose(subject)
    model = build(subject)
    context = context_of(model, length, WARM_UP + steps)
    token, now, seconds = 3, CLOCKS[clock], []

    def step() -> None:
        nonlocal context, token
        logits, context = model.advance(torch.tensor([[token]]), context)
        token = int(logits[0, -1].argmax())

    for _ in range(WARM_UP):
        step()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    for _ in range(steps):
        start = now()
        step()
        seconds.append(now() - start)
    return {
        "growth_bytes": resident("VmHWM") - before,
        "milliseconds": summary([1000 * x for x in seconds]),
        "cache_bytes": cache_bytes(context),
    }


def in_fresh_process(subject: str, length: int, options: argparse.Namespace) -> dict[str, Any]:
    """`point` in a process of its own, in which freed blocks of 256 KiB and more go back at once."""
    command = [sys.executable, "-W", "ignore", __file__, "--threads", str(options.threads)]
    command += ["--steps", str(options.steps), "--clock", options.clock]
    command += ["--job", json.dumps({"subject": subject, "length": length})]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**18)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def line_of(found: dict[str, Any]) -> str:
    """A point in words."""
    times = found["milliseconds"]
    return (
        f"{times['median']:.1f} ms per token ({times['quartile1']:.1f} to {times['quartile3']:.1f}),"
        f" growth {found['growth_bytes'] / 2**20:.1f} MiB, cache {found['cache_bytes'] / 2**20:.1f} MiB"
    )


def draw(result: dict[str, Any], path: Path) -> None:
    """Time and growth over the length, on logarithmic axes."""
    from matplotlib.figure import Figure

    panels = {
        "milliseconds per token": lambda found: found["milliseconds"]["median"],
        "peak memory that decoding adds, MiB": lambda found: max(found["growth_bytes"], 2**16) / 2**20,
        "keys and values, MiB": lambda found: found["cache_bytes"] / 2**20,
    }
    figure = Figure(figsize=(12, 4), layout="constrained")
    lengths = [int(length) for length in result["lengths"]]
    for axes, (label, value) in zip(figure.subplots(1, len(panels)).flat, panels.items(), strict=True):
        for name, style in zip(SUBJECTS, ("o-", "s--", "^-"), strict=True):
            axes.plot(lengths, [value(points[name]) for points in result["lengths"].values()], style, label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("tokens in the memory")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize="small")
    shape = result["shape"]
    figure.suptitle(
        f"{shape['layers']} layers of {shape['dim']}, memory in {len(shape['memory_layers'])},"
        f" {result['machine']['threads']} thread(s), {result['clock']} clock"
    )
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
