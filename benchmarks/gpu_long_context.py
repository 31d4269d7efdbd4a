"""Long sequences on one GPU: time, use of the hardware and memory by length, and the longest sequence that fits.

    python benchmarks/gpu_long_context.py --deepspeed-config ds_configs/zero1_bf16.json [--model yoco-3b]
        [--tokens 65536 262144 524288] [--chunk 8192] [--longest 8388608] [--output FILE]

Whole optimizer steps of the real engine, one sequence each, for both mixers of the self half:

    bands         chunks of --chunk tokens (model/bands.py), checkpointed inside with --recompute
    checkpointed  the plain step with activation checkpointing, what one does without bands

--longest N looks for the longest sequence up to N that fits, by doubling and halving, with targets in the last chunk
only: at the moment when that chunk's cross half runs, all of the sequence's keys, values, their gradients and boundary
contexts are there as in a whole step, but the time is linear. A whole step of that length follows where it is expected
to take at most --most-seconds; no other point runs longer than that either, by the last one's time and operations.

A point that runs out of memory, or whose process ends, is recorded as such, and the next one gets a new process.
Without a GPU everything runs on the CPU, where peaks are those of the resident set: of use to try the script out.

Model FLOP utilisation: operations by megayoco/model/flops.py (causal pairs once, backward twice the forward, nothing
that runs again) over seconds and the peak of the table in megayoco/train/metrics.py, or of a measured product.
Attention: the last 4096 tokens as queries over all others, by every backend that is here; counted as in attention.py.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.metadata
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any

import attention as attention_benchmark
import torch
from long_context_memory import MIXERS, config, resident, summary
from train_step import machine

from megayoco.config import DataConfig, ParallelConfig, PhaseConfig, RunConfig
from megayoco.model.flops import training_flops_per_sequence
from megayoco.ops import backends

QUERIES = 4096
Point = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="yoco-3b", help="preset of the YOCO pattern")
    add("--deepspeed-config", help="precision, ZeRO, offloading; without it fp32")
    add("--tokens", type=int, nargs="*", default=[65536, 262144, 524288], help="lengths, multiples of the chunk")
    add("--chunk", type=int, default=8192, help="tokens of a chunk")
    add("--recompute", action="store_true", help="activation checkpointing inside chunks")
    add("--longest", type=int, default=0, help="look for the longest length up to this; 0: do not")
    add("--unit", type=int, default=65536, help="what the longest length is a multiple of, itself one of the chunk")
    add("--mixers", nargs="+", default=list(MIXERS), choices=MIXERS, help="of the self half")
    add("--rounds", type=int, default=2, help="steps of every point")
    add("--most-seconds", type=float, default=1800.0, help="a step that is expected to take longer is left out")
    add("--attention-tokens", type=int, nargs="*", default=[65536, 524288], help="keys of the attention rates")
    add("--output", type=Path, help="write the result as JSON as well, after every point")
    add("--job", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job is not None:
        serve(options.job)
        return
    for flag, lengths in (("tokens", options.tokens), ("unit", [options.unit])):
        if wrong := [length for length in lengths if length % options.chunk]:
            parser.error(f"--{flag} {wrong[0]} is no multiple of --chunk {options.chunk}")
    names = ("torch", "deepspeed", "megatron-core", "numpy")
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine(torch.get_num_threads()) | {"device": device_name()},
        "versions": {name: importlib.metadata.version(name) for name in names} | {"cuda": torch.version.cuda},
        "model": options.model,
        "chunk": options.chunk,
        "recompute in chunks": options.recompute,
        "deepspeed config": Path(options.deepspeed_config).read_text() if options.deepspeed_config else None,
        "convention": "operations: causal pairs once, backward twice the forward, nothing recomputed; peak as given",
        "points": [],
        "attention": [],
    }

    def save() -> None:
        if options.output:
            options.output.write_text(json.dumps(result, indent=2) + "\n")

    for mixer in options.mixers:
        with Worker({"kind": "steps", "mixer": mixer, **given(options)}) as worker:
            Sweep(worker, mixer, options, result["points"], save).run()
    for name in backends.CUDA_BACKENDS if torch.cuda.is_available() else backends.CPU_BACKENDS:
        if not backends.is_installed(backends.PACKAGES.get(name, "torch")):
            continue
        with Worker({"kind": "attention", **given(options)}, {backends.VARIABLE: name}) as worker:
            for keys in options.attention_tokens:
                line = {"backend": name, "keys": keys} | worker.ask({"keys": keys})
                result["attention"].append(line)
                print(line, flush=True)
                save()
    report(result)


def given(options: argparse.Namespace) -> dict[str, Any]:
    """What a worker needs to know."""
    return {"model": options.model, "deepspeed_config": options.deepspeed_config}


def device_name() -> str:
    if not torch.cuda.is_available():
        return "CPU"
    return f"{torch.cuda.get_device_name()}, {torch.cuda.get_device_properties(0).total_memory / 2**30:.1f} GiB"


# -- which points ------------------------------------------------------------------------------------------------------


class Sweep:
    """The points of one mixer, shortest first."""

    def __init__(self, worker: Worker, mixer: str, options: argparse.Namespace, points: list[Point], save: Any) -> None:
        self.worker, self.mixer, self.options, self.points, self.save = worker, mixer, options, points, save
        self.model = config(options.model, mixer)
        self.rates: dict[str, float] = {}
        """Operations per second of each form's last step."""

    def run(self) -> None:
        """Measure all of them."""
        for form in ("bands", "checkpointed"):
            for tokens in sorted(self.options.tokens):
                if "failed" in self.point(form, tokens):
                    break  # longer ones fail too
        if self.options.longest:
            tokens = self.longest()
            if tokens and tokens not in self.options.tokens:
                self.point("bands", tokens, rounds=1)

    def longest(self) -> int:
        """The most tokens whose step fits, to a multiple of the unit."""
        unit = self.options.unit
        fits, fails, tokens = 0, None, max(self.options.tokens, default=unit) // unit * unit or unit
        while tokens <= self.options.longest:
            if "failed" in self.point("bands", tokens, rounds=1, targets="last chunk"):
                fails = tokens
                break
            fits, tokens = tokens, 2 * tokens
        if fails is None:
            fails = self.options.longest // unit * unit + unit
        while fails - fits > max(unit, fits // 32):
            middle = (fits + fails) // 2 // unit * unit
            if "failed" in self.point("bands", middle, rounds=1, targets="last chunk"):
                fails = middle
            else:
                fits = middle
        return fits

    def point(self, form: str, tokens: int, rounds: int | None = None, targets: str = "all") -> Point:
        """Measure one point and record it."""
        chunked = form == "bands"
        point: Point = {
            "mixer": self.mixer,
            "form": form,
            "tokens": tokens,
            "bands": tokens // self.options.chunk if chunked else 1,
            "checkpointing": self.options.recompute or not chunked,
            "targets": targets,
        }
        needed = training_flops_per_sequence(self.model, tokens)
        expected = needed / self.rates[form] if form in self.rates else 0.0
        if targets == "all" and expected > self.options.most_seconds:
            point["failed"] = f"left out: a step would take about {expected:,.0f} s"
        else:
            point |= self.worker.ask({**point, "rounds": rounds or self.options.rounds})
        if targets == "all" and "seconds" in point:
            seconds = point["seconds"]["median"]
            self.rates[form] = needed / seconds
            point["tokens_per_second"] = round(tokens / seconds, 1)
            point["model_flop_utilisation"] = round(needed / seconds / point["peak_flops_per_second"], 4)
        self.points.append(point)
        print(text(point), flush=True)
        self.save()
        return point


# -- processes ---------------------------------------------------------------------------------------------------------


class Worker:
    """A process that answers questions, one JSON object a line; a new one after it failed."""

    def __init__(self, job: dict[str, Any], environment: dict[str, str] | None = None) -> None:
        self.job, self.environment = job, environment or {}
        self.process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()

    def ask(self, question: Point) -> Point:
        """The answer; {"failed": why} where there is none."""
        if self.process is None:
            command = [sys.executable, "-W", "ignore", __file__, "--job", json.dumps(self.job)]
            pipe = subprocess.PIPE
            self.process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, text=True, env={**os.environ, **self.environment}
            )
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        found = json.loads(answer) if answer else {"failed": f"the process ended with {self.process.wait()}"}
        if "failed" in found:
            self.stop()
        return found  # type: ignore[no-any-return]

    def stop(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def serve(job: dict[str, Any]) -> None:
    """In a worker: answers on what was stdout; what libraries print there goes to stderr."""
    answers: IO[str] = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    measure = Steps(job) if job["kind"] == "steps" else AttentionRates(job)
    for line in sys.stdin:
        try:
            found = measure(json.loads(line))
        except (RuntimeError, MemoryError) as error:
            # OutOfMemoryError of a GPU is a RuntimeError too, what the CPU's allocator raises is nothing else
            words = str(error) or type(error).__name__
            found = {"failed": words.splitlines()[0]}
            if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in words:
                found["out_of_memory"] = True
        answers.write(json.dumps(found) + "\n")
        answers.flush()


class Steps:
    """Optimizer steps of the real engine."""

    def __init__(self, job: dict[str, Any]) -> None:
        from megayoco.dsconfig import load_deepspeed_config, precision
        from megayoco.parallel.launch import start_distributed
        from megayoco.parallel.topology import build_topology
        from megayoco.train.engine import Engine
        from megayoco.train.metrics import find_peak

        _, self.device = start_distributed()
        model = config(job["model"], job["mixer"])
        run = RunConfig(
            model=model,
            parallel=ParallelConfig(),
            data=DataConfig(train="unused"),
            phases=[PhaseConfig(sequence_length=4096, steps=1, batch_size=1, learning_rate=1e-4)],
            output_dir=tempfile.gettempdir(),
        )
        ds_config = load_deepspeed_config(job["deepspeed_config"], run, 1, self.device)
        self.vocabulary = model.vocab_size
        self.engine = Engine(run, ds_config, build_topology(run.parallel, model), self.device)
        self.engine.begin_phase(0)
        self.peak = find_peak(self.device, precision(ds_config))
        # kernels are chosen and loaded, optimizer states are there
        self.step({"tokens": 1024, "bands": 2, "checkpointing": False, "targets": "all"})

    def __call__(self, point: Point) -> Point:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        Path("/proc/self/clear_refs").write_text("5")  # the peak of the resident set starts anew
        seconds = []
        for _ in range(point["rounds"]):
            start = time.perf_counter()
            loss = self.step(point)
            seconds.append(time.perf_counter() - start)
        found = {
            "seconds": summary(seconds),
            "loss": round(loss, 4),
            "peak_host_bytes": resident("VmHWM"),
            "peak_flops_per_second": self.peak.flops_per_second,
            "peak_source": self.peak.source,
        }
        if self.device.type == "cuda":
            found["peak_device_bytes"] = torch.cuda.max_memory_allocated()
            found["peak_device_bytes_reserved"] = torch.cuda.max_memory_reserved()
        return found

    def step(self, point: Point) -> float:
        """One step; the loss is read, so it has ended."""
        from megayoco.data.batches import MicroBatch

        module = self.engine.module
        module.activation_checkpointing = point["checkpointing"]
        module.set_bands(point["bands"])
        ids = torch.randint(0, self.vocabulary, (1, point["tokens"]))
        targets = ids.roll(-1, 1)
        if point["targets"] == "last chunk":
            targets[:, : -(point["tokens"] // point["bands"])] = -100
        return float(self.engine.train_step([MicroBatch(ids, targets, None)], 1e-4).loss)


class AttentionRates:
    """Attention over a store by the backend that MEGAYOCO_ATTENTION names."""

    def __init__(self, job: dict[str, Any]) -> None:
        model = config(job["model"], MIXERS[0])
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        self.shape = {"heads": model.heads, "kv_heads": model.num_kv_heads, "head_dim": model.head_dim}

    def __call__(self, point: Point) -> Point:
        options = argparse.Namespace(**self.shape, device=self.device)
        work = attention_benchmark.Work(options, min(QUERIES, point["keys"]), point["keys"], self.dtype)
        found: Point = {"serves": backends.attention_backend(work.q, None), "dtype": str(self.dtype)}
        for name, backward in (("forward", False), ("both", True)):
            form = work.ours(backward)
            form()
            seconds = attention_benchmark.seconds_of({name: form}, 3)[name]
            found[f"{name}, GFLOP/s"] = work.rate(summary(seconds)["median"], backward)
        return found


# -- words -------------------------------------------------------------------------------------------------------------


def text(point: Point) -> str:
    """One point in words."""
    words = f"{point['mixer']:10}{point['form']:13}{point['tokens']:>10,} tokens"
    words += f" in {point['bands']} bands" if point["form"] == "bands" else ""
    words += ", targets in the last chunk only" if point["targets"] != "all" else ""
    if "failed" in point:
        return f"{words}: {'OUT OF MEMORY, ' * ('out_of_memory' in point)}{point['failed']}"
    words += f": {point['seconds']['median']:.2f} s"
    if "tokens_per_second" in point:
        words += f", {point['tokens_per_second']:,.0f} tokens/s, MFU {point['model_flop_utilisation']:.1%}"
    if "peak_device_bytes" in point:
        words += f", {point['peak_device_bytes'] / 2**30:.2f} GiB of the GPU"
    return f"{words}, {point['peak_host_bytes'] / 2**30:.2f} GiB of main memory"


def report(result: dict[str, Any]) -> None:
    """The result as text."""
    print(f"\n{result['model']} on {result['machine']['device']}")
    for point in result["points"]:
        print(text(point))
    for line in result["attention"]:
        print("  ".join(f"{name} {value}" for name, value in line.items()))


if __name__ == "__main__":
    main()
