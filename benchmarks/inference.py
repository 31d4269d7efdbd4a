"""What a long prompt costs: cache, prefill, first token, decoding and memory of YOCO beside plain decoders.

    python benchmarks/inference.py [--model yoco-tiny] [--lengths 1024 4096 16384 65536] [--longest 1048576]
        [--device cpu] [--dtype float32] [--output FILE.json]

In turn, over the same random tokens, one sequence at a time: YOCO with retention and with a window, our LLaMA of the
same shape, and transformers' `LlamaForCausalLM` (sdpa, DynamicCache) with that LLaMA's weights, once its logits are
found equal. All tokens of a prompt but the last are read without logits, by ours in chunks, by transformers in one call
(or in chunks by --transformers-chunk); the last one gives the first new token.

    prefill         seconds to read the prompt but its last token
    first token     seconds from the prompt to the first new token
    decode          new tokens per second behind the prompt, without the first
    request         new tokens per second of a request for --request of them, prompt included: the throughput of YOCO,
                    arXiv 2405.05254, section 4.4. Follows from the two before.
    cache           bytes of all keys, values and states, measured and by the formula
    peak            bytes that reading the prompt and a few steps add to weights and libraries

Time: in one process, round after round in an order that turns, so that whatever else the machine does hits all alike;
medians, quartiles, and medians of the per-round ratios. Every round of decoding starts behind the same prompt. On a
machine that others use as well, --clock cpu with --threads 1 counts the seconds that the one thread computes.
Memory: each point in a fresh process; on a CPU the growth of the resident set to its peak (VmHWM), freed blocks given
back at once, on a GPU what torch allocates. --longest: one prompt of YOCO alone; its `resident` is the peak of the
whole process, Python, libraries and weights included.

A length that is measured again replaces that length in FILE.json, if the setting is the same. FILE.png shows the
curves.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
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
from inference_subjects import LLAMA, SUBJECTS, TRANSFORMERS, YOCO, Setting, Subject, build, cache_formula, config_of
from long_context_memory import resident
from train_step import machine, summary

from megayoco.generate.generation import PREFILL_CHUNK

TARGETS = {
    "prefill, LLaMA / YOCO, at 65,536 tokens, at least": 10,
    "cache, LLaMA / YOCO without its constant part, at least": "layers - 1",
    "decode, YOCO / LLaMA, at 65,536 tokens, at least": 2,
    "resident with 1,048,576 tokens, less than": 4 * 2**30,
}
MEMORY_STEPS = 8
"""New tokens of a memory measurement."""
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
WARM_UP = 300
"""Tokens that load kernels and libraries."""
LOGITS_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
"""Largest difference of transformers' logits from ours, relative to the largest of ours."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default="yoco-tiny", help="preset of the YOCO pattern")
    add("--baseline", help="preset of the LLaMA pattern; default: that beside --model")
    add("--layers", type=int, help="in place of those of the presets")
    add("--self-layers", type=int, help="layers of YOCO's self-decoder; default: half of them")
    add("--lengths", type=int, nargs="*", default=[1024, 4096, 16384, 65536], help="prompt tokens of a comparison")
    add("--longest", type=int, default=0, help="prompt tokens of YOCO alone; 0: none")
    add("--rounds", type=int, default=3, help="of every length, at least")
    add("--seconds", type=float, default=10.0, help="go on with rounds of a length for so long, up to 50")
    add("--new-tokens", type=int, default=32, help="decoded in a round")
    add("--request", type=int, default=1024, help="new tokens of the request whose throughput is derived")
    add("--chunk", type=int, default=PREFILL_CHUNK, help="prompt tokens per call of ours")
    add("--transformers-chunk", type=int, default=0, help="the same for transformers; 0: the whole prompt")
    add("--device", default="cpu", help="cpu, cuda or cuda:1")
    add("--dtype", default="float32", choices=list(LOGITS_TOLERANCE))
    add("--threads", type=int, default=os.cpu_count())
    add(
        "--clock", default="wall", choices=list(CLOCKS), help="cpu: seconds of one thread, while others use the machine"
    )
    add("--output", type=Path, help="write the result as JSON, and the curves as PNG beside it, after every length")
    add("--job", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.job is not None:
        job = options.job
        print(json.dumps(memory_of(job["subject"], job["length"], job["request"], Setting(**job["setting"]))))
        return
    if options.rounds < 1 or options.new_tokens < 2:
        parser.error("--rounds must be at least 1, --new-tokens 2")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: torch sees no GPU here. Say --device cpu.")
    setting = Setting(
        model=options.model,
        baseline=options.baseline or options.model.replace("yoco", "llama"),
        layers=options.layers,
        self_layers=options.self_layers,
        device=options.device,
        dtype=options.dtype,
        chunk=options.chunk,
        transformers_chunk=options.transformers_chunk,
        clock=options.clock,
    )
    if options.clock == "cpu" and (options.threads > 1 or options.device != "cpu"):
        parser.error("--clock cpu counts what one thread computes: it needs --threads 1 and --device cpu")
    shortest = max(WARM_UP, config_of(YOCO[1], setting).window or 0)
    if too_short := [length for length in (*options.lengths, options.longest) if 0 < length < shortest]:
        parser.error(f"a prompt of {too_short[0]} tokens is too short: here at least {shortest}")
    report(measure(setting, options))


def measure(setting: Setting, options: argparse.Namespace) -> dict[str, Any]:
    """All lengths, and what an earlier run has left in the file."""
    result: dict[str, Any] = {
        "setting": dataclasses.asdict(setting),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "numpy")},
        "parameters": {name: config_of(name, setting).parameter_count()["total"] for name in SUBJECTS},
        "cache_formula": {name: formula_of(name, setting) for name in SUBJECTS},
        "lengths": {},
        "longest": {},
    }
    if options.output and options.output.exists():
        earlier = json.loads(options.output.read_text())
        if earlier["setting"] == result["setting"]:
            result |= {part: earlier[part] for part in ("lengths", "longest")}
    subjects = {name: build(name, setting) for name in SUBJECTS} if options.lengths else {}
    if subjects:
        result["largest relative difference of the logits, transformers to ours"] = compare_logits(subjects, setting)
    for length in sorted(options.lengths):
        load = os.getloadavg()[0]
        found = compare(subjects, length, setting, options)
        result["lengths"][str(length)] = circumstances(setting, options, load) | found
        result["lengths"] = dict(sorted(result["lengths"].items(), key=lambda item: int(item[0])))
        save(result, options.output)
    if options.longest:
        load = os.getloadavg()[0]
        found = {name: in_fresh_process(name, options.longest, setting, options) for name in YOCO}
        result["longest"] = circumstances(setting, options, load) | {"tokens": options.longest, "points": found}
        save(result, options.output)
    return result


def circumstances(setting: Setting, options: argparse.Namespace, load: float) -> dict[str, Any]:
    """When, where and how something was measured."""
    device = torch.cuda.get_device_name() if setting.device.startswith("cuda") else "CPU"
    return {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine(options.threads) | {"device": device, "load before": round(load, 1)},
    }


def formula_of(subject: str, setting: Setting) -> dict[str, int]:
    width = getattr(torch, setting.dtype).itemsize
    per_token, constant = cache_formula(config_of(subject, setting), width)
    return {"bytes_per_token": per_token, "constant_bytes": constant}


def cache_by_formula(subject: str, tokens: int, setting: Setting) -> int:
    formula = formula_of(subject, setting)
    return formula["constant_bytes"] + formula["bytes_per_token"] * tokens


def compare_logits(subjects: dict[str, Subject], setting: Setting) -> float:
    """Raises RuntimeError unless transformers' LLaMA is the same function as ours."""
    tokens = prompt_of(WARM_UP, setting)
    ours, theirs = (subjects[name].logits(tokens).float() for name in (LLAMA, TRANSFORMERS))
    difference = float((ours - theirs).abs().max() / ours.abs().max())
    if not difference <= LOGITS_TOLERANCE[setting.dtype]:
        raise RuntimeError(f"transformers' logits differ from ours by {difference:.1e} of the largest")
    return difference


def prompt_of(length: int, setting: Setting) -> list[int]:
    """Random tokens, always the same."""
    vocabulary = config_of(LLAMA, setting).vocab_size
    return random.Random(0).choices(range(vocabulary), k=length)


def compare(subjects: dict[str, Subject], length: int, setting: Setting, options: argparse.Namespace) -> dict[str, Any]:
    """Time and memory of every subject at one length."""
    tokens, reserve = prompt_of(length, setting), length + options.new_tokens
    memories: dict[str, Any] = {}
    prefills: dict[str, list[float]] = {name: [] for name in subjects}
    firsts: dict[str, list[float]] = {name: [] for name in subjects}
    steps: dict[str, list[float]] = {name: [] for name in subjects}

    def read(name: str) -> None:
        memories.pop(name, None)
        seconds, memories[name] = timed(setting, lambda: subjects[name].read(tokens[:-1], reserve))
        more, _ = timed(setting, lambda: subjects[name].next(tokens[-1], subjects[name].branch(memories[name])))
        prefills[name].append(seconds)
        firsts[name].append(seconds + more)
        print(f"{length:,} tokens, {name}: read in {seconds:.2f} s", flush=True)

    def decode(name: str) -> None:
        subject = subjects[name]
        # the first step may copy the prompt's memory, which another round will want
        token, memory = subject.next(tokens[-1], subject.branch(memories[name]))
        seconds, _ = timed(setting, lambda: follow(subject, token, memory, options.new_tokens - 1))
        steps[name].append(seconds / (options.new_tokens - 1))

    in_turns(list(subjects), read, options)
    in_turns(list(subjects), decode, options)
    cached = {name: subject.cache_bytes(memories[name]) for name, subject in subjects.items()}
    memories.clear()
    points = {}
    for name in subjects:
        first, step = statistics.median(firsts[name]), statistics.median(steps[name])
        points[name] = {
            "prefill_seconds": spread(prefills[name]),
            "first_token_seconds": spread(firsts[name]),
            "decode_tokens_per_second": spread([1 / seconds for seconds in steps[name]]),
            "request_tokens_per_second": request_rate(options.request, first, step),
            "cache_bytes": cached[name],
            "cache_bytes_by_formula": cache_by_formula(name, length - 1, setting),
            "peak_bytes": in_fresh_process(name, length, setting, options)["peak_bytes"],
        }
        print(f"{length:,} tokens, {name}: {line_of(points[name])}", flush=True)
    ratios = {
        f"{other} / {name}": {
            "prefill": median_ratio(prefills[other], prefills[name]),
            "first token": median_ratio(firsts[other], firsts[name]),
            "decode": median_ratio(steps[other], steps[name]),
            "request": points[name]["request_tokens_per_second"] / points[other]["request_tokens_per_second"],
            "cache": cached[other] / cached[name],
            "cache, without the constant part": cached[other]
            / (cached[name] - formula_of(name, setting)["constant_bytes"]),
            "peak": points[other]["peak_bytes"] / points[name]["peak_bytes"],
        }
        for other in (LLAMA, TRANSFORMERS)
        for name in SUBJECTS
        if name != other and name != TRANSFORMERS
    }
    rounds = {"prefill": len(prefills[LLAMA]), "decode": len(steps[LLAMA]), "new tokens": options.new_tokens}
    rounded = {pair: {what: round(value, 3) for what, value in row.items()} for pair, row in ratios.items()}
    return {"rounds": rounds, "request tokens": options.request, "points": points, "ratios": rounded}


def follow(subject: Subject, token: int, memory: Any, count: int) -> tuple[int, Any]:
    """So many steps."""
    for _ in range(count):
        token, memory = subject.next(token, memory)
    return token, memory


def request_rate(tokens: int, first: float, step: float) -> float:
    """New tokens per second of a whole request; seconds to its first token, and of every further one."""
    return round(tokens / (first + (tokens - 1) * step), 4)


def in_turns(names: list[str], run: Callable[[str], None], options: argparse.Namespace) -> None:
    """One round after another, in an order that turns."""
    start = time.perf_counter()
    for number in range(50):
        if number >= options.rounds and time.perf_counter() - start > options.seconds:
            return
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            run(name)


def timed(setting: Setting, action: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds until the device is done, and what came of it."""
    gc.collect()
    on_gpu, now = setting.device.startswith("cuda"), CLOCKS[setting.clock]
    if on_gpu:
        torch.cuda.synchronize(setting.device)
    start = now()
    made = action()
    if on_gpu:
        torch.cuda.synchronize(setting.device)
    return now() - start, made


def spread(values: list[float]) -> dict[str, float]:
    """Median, quartiles and extremes; of a single round only itself."""
    return summary(values) if len(values) > 1 else {"median": round(values[0], 4)}


def median_ratio(above: list[float], below: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def memory_of(name: str, length: int, request: int, setting: Setting) -> dict[str, Any]:
    """In this process: what reading a prompt and a few steps add to the memory in use, and how long they take."""
    subject = build(name, setting)
    tokens = prompt_of(length, setting)
    subject.next(1, subject.branch(subject.read(tokens[:WARM_UP], WARM_UP + 1)))
    gc.collect()
    on_gpu = setting.device.startswith("cuda")
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(setting.device)
        before = torch.cuda.memory_allocated(setting.device)
    else:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        earlier, before = resident("VmHWM"), resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    prefill_seconds, memory = timed(setting, lambda: subject.read(tokens[:-1], length + MEMORY_STEPS))
    first, (token, memory) = timed(setting, lambda: subject.next(tokens[-1], memory))
    seconds, (_, memory) = timed(setting, lambda: follow(subject, token, memory, MEMORY_STEPS - 1))
    step = seconds / (MEMORY_STEPS - 1)
    peak = torch.cuda.max_memory_allocated(setting.device) if on_gpu else resident("VmHWM")
    return {
        "peak_bytes": peak - before,
        "resident_bytes": peak if on_gpu else max(peak, earlier),
        "cache_bytes": subject.cache_bytes(memory),
        "cache_bytes_by_formula": cache_by_formula(name, length + MEMORY_STEPS - 1, setting),
        "prefill_seconds": round(prefill_seconds, 2),
        "first_token_seconds": round(prefill_seconds + first, 2),
        "decode_tokens_per_second": round(1 / step, 2),
        "request_tokens_per_second": request_rate(request, prefill_seconds + first, step),
    }


def in_fresh_process(name: str, length: int, setting: Setting, options: argparse.Namespace) -> dict[str, Any]:
    """`memory_of` in a process of its own, in which freed blocks of 256 KiB and more go back at once."""
    setting_ = dataclasses.asdict(setting)
    job = json.dumps({"subject": name, "length": length, "request": options.request, "setting": setting_})
    command = [sys.executable, "-W", "ignore", __file__, "--threads", str(options.threads), "--job", job]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**18)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def save(result: dict[str, Any], path: Path | None) -> None:
    """The JSON and the picture."""
    if path is None:
        return
    path.write_text(json.dumps({**result, "targets": TARGETS}, indent=2) + "\n")
    draw(result, path.with_suffix(".png"))


def draw(result: dict[str, Any], path: Path) -> None:
    """Memory, prefill time and throughput over the length, on logarithmic axes."""
    from matplotlib.figure import Figure

    panels: list[tuple[str, str, Callable[[dict[str, Any]], float]]] = [
        ("peak memory beyond the weights, MiB", "memory", lambda point: point["peak_bytes"] / 2**20),
        ("seconds", "prefill", lambda point: middle(point["prefill_seconds"])),
        (
            "new tokens per second",
            "decoding behind the prompt",
            lambda point: middle(point["decode_tokens_per_second"]),
        ),
        ("new tokens per second", "request, prompt included", lambda point: point["request_tokens_per_second"]),
    ]
    figure = Figure(figsize=(10, 7.5), layout="constrained")
    for axes, (label, title, value) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        for name, style in zip(SUBJECTS, ("o-", "s--", "^-", "v--"), strict=True):
            points = {int(length): found["points"][name] for length, found in result["lengths"].items()}
            if result["longest"] and name in result["longest"]["points"]:
                points.setdefault(result["longest"]["tokens"], result["longest"]["points"][name])
            lengths = sorted(points)
            axes.plot(lengths, [value(points[length]) for length in lengths], style, label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("prompt, tokens")
        axes.set_ylabel(label)
        axes.set_title(title, fontsize="medium")
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize="small")
    setting = result["setting"]
    figure.suptitle(f"{setting['model']} and {setting['baseline']}, {setting['device']}, {setting['dtype']}")
    figure.savefig(path, dpi=110)


def middle(value: Any) -> float:
    """The median of a summary; of a single measurement itself."""
    return float(value["median"] if isinstance(value, dict) else value)


def line_of(point: dict[str, Any]) -> str:
    """A point in words."""
    return (
        f"prefill {middle(point['prefill_seconds']):.2f} s, first token {middle(point['first_token_seconds']):.2f} s,"
        f" decode {middle(point['decode_tokens_per_second']):.1f} tokens/s,"
        f" request {point['request_tokens_per_second']:.2f} tokens/s,"
        f" cache {point['cache_bytes'] / 2**20:.1f} MiB, peak {point['peak_bytes'] / 2**20:.1f} MiB"
    )


def report(result: dict[str, Any]) -> None:
    """The result as text, beside the targets."""
    print(f"\n{result['setting']}")
    for name, formula in result["cache_formula"].items():
        print(f"{name:22} cache {formula['bytes_per_token']:,} bytes per token, {formula['constant_bytes']:,} constant")
    for length, found in result["lengths"].items():
        for name, point in found["points"].items():
            print(f"{int(length):>9,} {name:22} {line_of(point)}")
        for pair, ratios in found["ratios"].items():
            print(f"{int(length):>9,} {pair:42} " + ", ".join(f"{what} {value:.2f}" for what, value in ratios.items()))
    for name, point in result["longest"].get("points", {}).items():
        whole = f"whole process {point['resident_bytes'] / 2**20:,.0f} MiB"
        print(f"{result['longest']['tokens']:>9,} {name:22} {line_of(point)}, {whole}")
    print(f"targets: {TARGETS}")


if __name__ == "__main__":
    main()
