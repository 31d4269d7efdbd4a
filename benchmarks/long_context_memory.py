"""Memory and time of a long sequence on a CPU: bands against the plain step, with and without checkpointing.

    python benchmarks/long_context_memory.py [--model yoco-tiny] [--tokens 32768] [--bands 16] [--output FILE]

Memory: one step of each form in a fresh process. Reported is the growth of the resident set from just before the step
(weights and gradients allocated, kernels warm) to its peak, as Linux counts it (VmHWM): once with glibc's allocator as
it comes, which keeps freed blocks of up to 32 MiB for later, and once told to return them (MALLOC_MMAP_THRESHOLD_), so
that what is resident is what is held. Growth with the sequence: the same at once, twice and four times as many tokens
in chunks of constant size, blocks returned; the slope between the ends, in bytes per token, stands beside that of
the formula (megayoco/train/activations.py).

Time: in one process, every form in turn, round after round, so that whatever else the machine does hits all alike;
medians of the seconds and of the per-round ratios to the plain step. Among the forms is one step in bands with 1 % of
the tokens carrying loss. Memory does not mind what else a machine does, time does: --part and --mixers measure a part
alone, and replace it in a file that has the rest.
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
COMPARED = ("plain", "plain with checkpointing", "bands")
"""Forms whose memory is also measured with glibc's allocator as it comes."""
TARGETS = {
    "bands / plain, memory held": 1 / 8,
    "bands / plain, memory resident": 1 / 8,
    "bands / plain with checkpointing, memory held": 1 / 3,
    "bands / plain with checkpointing, memory resident": 1 / 3,
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
    parser.add_argument("--rounds", type=int, default=5, help="of the timing")
    parser.add_argument("--part", choices=["memory", "time"], help="measure this alone")
    parser.add_argument("--mixers", nargs="+", default=list(MIXERS), choices=MIXERS)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, help="write the result as JSON as well")
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.job is not None:
        print(json.dumps(memory_of_a_step(**options.job)))
        return
    shape = {"model": options.model, "tokens": options.tokens, "bands": options.bands, "dtype": "fp32"}
    result: dict[str, Any] = {"shape": shape}
    if options.output and options.output.exists():
        earlier = json.loads(options.output.read_text())
        result = earlier if earlier["shape"] == shape else result
    result["versions"] = {name: importlib.metadata.version(name) for name in ("torch", "numpy")}
    for part, measure in (("memory", measure_memory), ("time", measure_time)):
        if options.part in (None, part):
            for mixer in options.mixers:
                result.setdefault(part, {})[mixer] = {
                    "date": datetime.date.today().isoformat(),
                    "command": shlex.join(["python", *sys.argv]),
                    "machine": machine(options.threads),
                    **measure(mixer, options),
                }
                if options.output:  # after each: they take half an hour
                    options.output.write_text(json.dumps({**result, "targets": TARGETS}, indent=2) + "\n")
    report(result)


def forms_of(tokens: int, bands: int) -> dict[str, dict[str, Any]]:
    """The steps that are compared."""
    return {
        "plain": dict(tokens=tokens),
        "plain with checkpointing": dict(tokens=tokens, checkpointing=True),
        "bands": dict(tokens=tokens, bands=bands),
        "bands with checkpointing": dict(tokens=tokens, bands=bands, checkpointing=True),
        "bands in split order": dict(tokens=tokens, bands=bands, order="split"),
        "bands with 1 % of the loss": dict(tokens=tokens, bands=bands, share=SPARSE),
    }


def measure_memory(mixer: str, options: argparse.Namespace) -> dict[str, Any]:
    """Of every form, and the growth with the sequence, for one mixer of the self half."""
    model, N, n = options.model, options.tokens, options.bands
    memory = {}
    for name, form in forms_of(N, n).items():
        job = dict(model=model, mixer=mixer, **form)
        memory[name] = in_fresh_process(options, True, **job)
        if name in COMPARED:
            memory[name]["resident"] = in_fresh_process(options, False, **job)["held"]
        print(f"{mixer}, {name}: {text(memory[name])}", flush=True)
    growth = []
    for times in options.growth:
        form = dict(tokens=times * N, bands=times * n)
        job = dict(model=model, mixer=mixer, **form)
        once = memory["bands"] if times == 1 else in_fresh_process(options, True, **job)
        growth.append({**form, **once})
        print(f"{mixer}, {times * N:,} tokens in {times * n} bands: {text(once)}", flush=True)
    found: dict[str, Any] = {"memory": memory, "growth": growth}
    ratios = {
        f"bands / {other}, memory {kind}": memory["bands"][kind] / memory[other][kind]
        for other in ("plain", "plain with checkpointing")
        for kind in ("held", "resident")
    }
    if len(growth) > 1:
        slopes = {
            kind: (growth[-1][kind] - growth[0][kind]) / (growth[-1]["tokens"] - growth[0]["tokens"])
            for kind in ("held", "formula")
        }
        found["bytes_per_token"] = slopes
        ratios["slope / formula"] = slopes["held"] / slopes["formula"]
    found["ratios"] = ratios
    return found


def measure_time(mixer: str, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of the forms in turn, for one mixer of the self half."""
    forms = forms_of(options.tokens, options.bands)
    names = ["plain", "plain with checkpointing", "bands", "bands with 1 % of the loss"]
    seconds = time_in_turns(options.model, mixer, {name: forms[name] for name in names}, options.rounds)
    ratios = {}
    for name, other in (
        ("bands", "plain"),
        ("bands", "plain with checkpointing"),
        ("bands with 1 % of the loss", "bands"),
    ):
        pairs = zip(seconds[name], seconds[other], strict=True)
        ratios[f"{name} / {other}, time"] = statistics.median(a / b for a, b in pairs)
    return {"seconds": {name: summary(values) for name, values in seconds.items()}, "ratios": ratios}


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
    """In this process: bytes that the resident set grows by in one step, and the estimate."""
    step = make_step(model, mixer, **form)
    step(min(4096, form["tokens"]), min(form.get("bands", 1), 4))  # kernels and libraries are loaded
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    step()
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
    return {"held": resident("VmHWM") - before, "formula": round(formula)}


def resident(field: str) -> int:
    """Bytes of this process by a field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status: this benchmark needs Linux")


def in_fresh_process(options: argparse.Namespace, returned: bool, **job: Any) -> dict[str, Any]:
    """`memory_of_a_step` in a process of its own; `returned`: freed blocks of 256 KiB and more go back at once."""
    command = [sys.executable, "-W", "ignore", __file__, "--threads", str(options.threads), "--job", json.dumps(job)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**18)} if returned else dict(os.environ)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
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
    words = f"{memory['held'] / 2**20:,.0f} MiB held (formula {memory['formula'] / 2**20:,.0f})"
    return words + (f", {memory['resident'] / 2**20:,.0f} resident" if "resident" in memory else "")


def report(result: dict[str, Any]) -> None:
    """The result as text, beside the targets."""
    print(f"\n{result['shape']}")
    for part in ("memory", "time"):
        for mixer, found in result.get(part, {}).items():
            for name, memory in found.get("memory", {}).items():
                print(f"{mixer:10} {name:28} {text(memory)}")
            if "bytes_per_token" in found:
                slopes = found["bytes_per_token"]
                print(f"{mixer:10} bytes per token: {slopes['held']:,.0f}, by the formula {slopes['formula']:,.0f}")
            for name, values in found.get("seconds", {}).items():
                print(f"{mixer:10} {name:28} {values['median']:.1f} s ({values['min']:.1f} to {values['max']:.1f})")
            for name, ratio in found["ratios"].items():
                bounds = [f"{key[len(name) :]} {bound:.3f}" for key, bound in TARGETS.items() if key.startswith(name)]
                print(f"{mixer:10} {name:50} {ratio:.3f}  target{';'.join(bounds)}")


if __name__ == "__main__":
    main()
