"""Memory and time of a long sequence on a CPU: bands against the plain step, with and without checkpointing.

    python benchmarks/long_context_memory.py [--model yoco-tiny] [--tokens 32768] [--bands 16] [--output FILE]

Memory: one step of each form in a fresh process. Reported is the growth of the resident set from just before the step
(weights and gradients allocated, kernels warm) to its peak, as Linux counts it (VmHWM). Growth with the sequence: the
same at once, twice and four times as many tokens in chunks of constant size; the slope between the ends, in bytes per
token, stands beside that of the formula (megayoco/train/activations.py).

Time: in one process, every form in turn, round after round, so that whatever else the machine does hits all alike;
medians of the seconds and of the per-round ratios to the plain step. Among the forms is one step in bands with 1 % of
the tokens carrying loss.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import gc
import importlib.metadata
import json
import os
import random
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from train_step import machine

from megayoco.config import ModelConfig
from megayoco.model.decoder import build_decoder
from megayoco.train.activations import Work, step_activations, whole_model

MIXERS = ("retention", "window")
SPARSE = 0.01
TARGETS = {
    "bands / plain, memory": 1 / 8,
    "bands / plain with checkpointing, memory": 1 / 3,
    "slope / formula, at most": 1.15,
    "slope / formula, at least": 0.85,
    "bands / plain, time": 1.10,
    "bands / plain with checkpointing, time": 1.0,
    "bands with 1 % of the loss / bands, time": 1 / 3,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="yoco-tiny", help="preset of the YOCO pattern")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--bands", type=int, default=16)
    parser.add_argument("--growth", type=int, nargs="*", default=[1, 2, 4], help="multiples of --tokens")
    parser.add_argument("--rounds", type=int, default=3, help="of the timing; 0: none")
    parser.add_argument("--mixers", nargs="+", default=list(MIXERS), choices=MIXERS)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, help="write the result as JSON as well")
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.job is not None:
        print(json.dumps(memory_of_a_step(**options.job)))
        return
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine(options.threads),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "numpy")},
        "shape": {"model": options.model, "tokens": options.tokens, "bands": options.bands, "dtype": "fp32"},
        "mixers": {mixer: measure(mixer, options) for mixer in options.mixers},
    }
    result["targets"] = TARGETS
    report(result)
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")


def measure(mixer: str, options: argparse.Namespace) -> dict[str, Any]:
    """Everything for one mixer of the self half."""
    model, N, n = options.model, options.tokens, options.bands
    forms: dict[str, dict[str, Any]] = {
        "plain": dict(tokens=N),
        "plain with checkpointing": dict(tokens=N, checkpointing=True),
        "bands": dict(tokens=N, bands=n),
        "bands with checkpointing": dict(tokens=N, bands=n, checkpointing=True),
        "bands in split order": dict(tokens=N, bands=n, order="split"),
    }
    memory = {}
    for name, form in forms.items():
        memory[name] = in_fresh_process(options, model=model, mixer=mixer, **form)
        print(f"{mixer}, {name}: {text(memory[name])}", flush=True)
    growth = []
    for times in options.growth:
        form = dict(tokens=times * N, bands=times * n)
        once = memory["bands"] if times == 1 else in_fresh_process(options, model=model, mixer=mixer, **form)
        growth.append({**form, **once})
        print(f"{mixer}, {times * N:,} tokens in {times * n} bands: {text(once)}", flush=True)
    found: dict[str, Any] = {"memory": memory, "growth": growth}
    ratios = {
        f"bands / {other}, memory": memory["bands"]["growth"] / memory[other]["growth"]
        for other in ("plain", "plain with checkpointing")
    }
    if len(growth) > 1:
        slopes = {
            kind: (growth[-1][kind] - growth[0][kind]) / (growth[-1]["tokens"] - growth[0]["tokens"])
            for kind in ("growth", "formula")
        }
        found["bytes_per_token"] = slopes
        ratios["slope / formula"] = slopes["growth"] / slopes["formula"]
    if options.rounds:
        timed = {name: forms[name] for name in ("plain", "plain with checkpointing", "bands")}
        timed["bands with 1 % of the loss"] = dict(forms["bands"], share=SPARSE)
        seconds = time_in_turns(model, mixer, timed, options.rounds)
        found["seconds"] = {name: summary(values) for name, values in seconds.items()}
        for name, other in (
            ("bands", "plain"),
            ("bands", "plain with checkpointing"),
            ("bands with 1 % of the loss", "bands"),
        ):
            pairs = zip(seconds[name], seconds[other], strict=True)
            ratios[f"{name} / {other}, time"] = statistics.median(a / b for a, b in pairs)
    found["ratios"] = ratios
    return found


def make_step(
    model: str,
    mixer: str,
    tokens: int,
    bands: int = 1,
    checkpointing: bool = False,
    order: str = "fused",
    share: float = 1.0,
) -> Callable[..., None]:
    """A function that runs one training step of this form, without optimizer; `step(tokens, bands)`: another size."""
    torch.manual_seed(0)
    decoder = build_decoder(config(model, mixer), None, activation_checkpointing=checkpointing).train()
    for parameter in decoder.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def step(length: int = tokens, count: int = bands) -> None:
        decoder.set_bands(count, order)
        ids = torch.randint(0, decoder.config.vocab_size, (1, length))
        targets = ids.roll(-1, 1)
        if share < 1:
            keep = torch.tensor(random.Random(0).sample(range(length), max(1, int(share * length))))
            targets = torch.full_like(ids, -100).index_copy(1, keep, targets[:, keep])
        loss, count = decoder(ids, targets)
        (loss / count).backward()

    return step


def config(model: str, mixer: str) -> ModelConfig:
    """The preset with one mixer."""
    return ModelConfig(preset=model, self_mixer=mixer)  # type: ignore[arg-type]


def memory_of_a_step(model: str, mixer: str, **form: Any) -> dict[str, Any]:
    """In this process: bytes that the resident set grows by in one step, the estimate, and the seconds it took."""
    step = make_step(model, mixer, **form)
    step(min(4096, form["tokens"]), min(form.get("bands", 1), 4))  # kernels and libraries are loaded
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    start = time.perf_counter()
    step()
    seconds = time.perf_counter() - start
    shape = config(model, mixer)
    decoder = build_decoder(shape, None)
    stage = decoder.stage()
    sizes = [float(sum(p.numel() for p in part)) for part in (stage.self_parameters(), stage.cross_parameters())]
    work = Work(
        model=shape,
        batch=1,
        length=form["tokens"],
        width=4,
        bands=form.get("bands", 1),
        order=form.get("order", "fused"),
        checkpointing=form.get("checkpointing", False),
    )
    formula = step_activations(work, whole_model(shape), (sizes[0], sizes[1])).total
    return {"growth": resident("VmHWM") - before, "formula": round(formula), "seconds": round(seconds, 2)}


def resident(field: str) -> int:
    """Bytes of this process by a field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status: this benchmark needs Linux")


def in_fresh_process(options: argparse.Namespace, **job: Any) -> dict[str, Any]:
    """`memory_of_a_step` in a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__, "--threads", str(options.threads), "--job", json.dumps(job)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def time_in_turns(model: str, mixer: str, forms: dict[str, dict[str, Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every form's steps; the order turns from round to round."""
    steps = {name: make_step(model, mixer, **form) for name, form in forms.items()}
    for name, step in steps.items():
        step(512, min(forms[name].get("bands", 1), 4))
    names = list(steps)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            start = time.perf_counter()
            steps[name]()
            seconds[name].append(time.perf_counter() - start)
            print(f"{mixer}, {name}: {seconds[name][-1]:.1f} s", flush=True)
    return seconds


def summary(values: list[float]) -> dict[str, float]:
    """Median and extremes."""
    return {"median": round(statistics.median(values), 3), "min": round(min(values), 3), "max": round(max(values), 3)}


def text(memory: dict[str, Any]) -> str:
    """One measurement in words."""
    grown, formula = memory["growth"] / 2**20, memory["formula"] / 2**20
    return f"{grown:,.0f} MiB (formula {formula:,.0f}), {memory['seconds']} s"


def report(result: dict[str, Any]) -> None:
    """The result as text, beside the targets."""
    print(f"\n{result['shape']} on {result['machine']}")
    for mixer, found in result["mixers"].items():
        for name, memory in found["memory"].items():
            print(f"{mixer:10} {name:28} {text(memory)}")
        if "bytes_per_token" in found:
            slopes = found["bytes_per_token"]
            print(f"{mixer:10} bytes per token: {slopes['growth']:,.0f}, by the formula {slopes['formula']:,.0f}")
        for name, values in found.get("seconds", {}).items():
            print(f"{mixer:10} {name:28} {values['median']:.1f} s ({values['min']:.1f} to {values['max']:.1f})")
        for name, ratio in found["ratios"].items():
            bounds = [f"{key} {bound:.3f}" for key, bound in result["targets"].items() if key.startswith(name)]
            print(f"{mixer:10} {name:50} {ratio:.3f}  target: {'; '.join(bounds)}")


if __name__ == "__main__":
    main()
