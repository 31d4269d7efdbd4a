"""The data loader against megatron-core's datasets, and its share of a training step.

    python benchmarks/loader.py [--documents 10000000] [--sequence-length 4096] [--samples 4000] [--output FILE]

Two synthetic pairs hold the documents (log-normal lengths; the tokens are a hole in the file, so that reading costs no
disk), blended 0.7 to 0.3. Theirs is `BlendedMegatronDatasetBuilder` over `GPTDataset` for one epoch of samples, ours
`build_datasets` and `Batches`. Each is measured in a fresh process: seconds to build the indices, seconds to open them
again from the cache, bytes of the cache, peak memory beyond that of the imports, and sequences per second from random
places of the files, as in training, in a second pass over the same ones.

The share of a training step is what the training loop waits for data, with the prefetching thread beside a real model,
and what a step's data cost without a thread, both over the seconds of a step.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import resource
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

WEIGHTS = (0.7, 0.3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=10_000_000, help="of both pairs together")
    parser.add_argument("--mean-length", type=int, default=500, help="tokens of a document")
    parser.add_argument("--sequence-length", type=int, default=4096)
    parser.add_argument("--samples", type=int, default=4000, help="how many are read")
    parser.add_argument("--model", default="llama-tiny", help="preset whose training step is timed")
    parser.add_argument("--steps", type=int, default=20, help="training steps that are timed")
    parser.add_argument("--folder", help="where the pairs are written; default: a temporary folder")
    parser.add_argument("--output", type=Path, help="write the result as JSON as well")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # one contender, in a process of its own
    options = parser.parse_args()
    if options.part:
        print(json.dumps({"ours": ours, "theirs": theirs, "step": training_step}[options.part](options)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        options.folder = folder
        tokens = sum(write_pair(prefix, options, number) for number, prefix in enumerate(prefixes(folder)))
        result = {
            "date": datetime.date.today().isoformat(),
            "command": shlex.join(["python", *sys.argv]),
            "machine": machine(),
            "versions": {name: importlib.metadata.version(name) for name in ("numpy", "torch", "megatron-core")},
            "data": {"documents": options.documents, "tokens": tokens, "sequence_length": options.sequence_length},
            "megayoco": measured("ours", options),
            "megatron-core": measured("theirs", options),
            "share_of_a_step": measured("step", options),
        }
    report(result)
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")


def prefixes(folder: str) -> list[str]:
    return [f"{folder}/{name}_text_document" for name in ("large", "small")]


def write_pair(prefix: str, options: argparse.Namespace, number: int) -> int:
    """A pair of WEIGHTS[number] of the documents; returns its tokens."""
    S = int(options.documents * WEIGHTS[number])
    generator = np.random.default_rng(number)
    lengths = np.maximum(generator.lognormal(np.log(options.mean_length) - 0.72, 1.2, S), 1).astype(np.int32)
    offsets = 2 * (np.cumsum(lengths, dtype=np.int64) - lengths)
    with open(f"{prefix}.idx", "wb") as file:
        from megayoco.data.indexed import HEADER, MAGIC

        file.write(HEADER.pack(MAGIC, 1, 8, S, S + 1))
        for numbers in (lengths, offsets, np.arange(S + 1, dtype=np.int64)):
            numbers.tofile(file)
    tokens = int(lengths.sum(dtype=np.int64))
    with open(f"{prefix}.bin", "wb") as file:
        file.truncate(2 * tokens)
    return tokens


def measured(part: str, options: argparse.Namespace) -> dict[str, Any]:
    """What `--part` prints, from a process of its own."""
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in vars(options).items() if value is not None]
    arguments = [a for a in arguments if not a.startswith("--output")]
    command = [sys.executable, "-W", "ignore", __file__, *arguments, f"--part={part}"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def our_datasets(options: argparse.Namespace) -> Any:
    from megayoco.config import DataConfig
    from megayoco.data.datasets import build_datasets

    large, small = prefixes(options.folder)
    data = DataConfig(train=[WEIGHTS[0], large, WEIGHTS[1], small], split="1,0,0", cache_dir=f"{options.folder}/ours")
    return build_datasets(data, sequence_length=options.sequence_length, seed=1, vocab_size=50_000)


def ours(options: argparse.Namespace) -> dict[str, Any]:
    """build_datasets and Batches."""
    from megayoco.data.batches import Batches
    from megayoco.data.datasets import build_datasets

    assert build_datasets  # imported before the clock starts
    before = peak_bytes()
    build, _ = timed(lambda: our_datasets(options))
    peak = peak_bytes() - before
    reopen, datasets = timed(lambda: our_datasets(options))
    batches = Batches(
        datasets.train, batch_size=10, micro_batch_size=10, data_rank=0, data_size=1, document_mask=True, prefetch=0
    )
    steps = options.samples // 10
    for _ in range(steps):
        batches.next_step()
    batches.consumed_samples = 0  # the same samples again: the page cache holds them now, for both
    read, _ = timed(lambda: [batches.next_step() for _ in range(steps)])
    return numbers(build, reopen, peak, read, options, "ours")


def theirs(options: argparse.Namespace) -> dict[str, Any]:
    """The builder and the datasets that Megatron's training scripts use, and torch's collation."""
    import torch
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    class Tokenizer:
        """What the config asks of one."""

        vocab_size, eod, pad, unique_identifiers = 50_000, 49_999, 49_998, {"kind": "none"}

    tokens = sum(os.path.getsize(f"{prefix}.bin") // 2 for prefix in prefixes(options.folder))

    def build_theirs() -> Any:
        config = GPTDatasetConfig(
            random_seed=1,
            sequence_length=options.sequence_length,
            blend=(prefixes(options.folder), list(WEIGHTS)),
            split="1,0,0",
            path_to_cache=f"{options.folder}/theirs",
            tokenizer=Tokenizer(),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        sizes = [tokens // options.sequence_length, 0, 0]
        return BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()[0]

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    before = peak_bytes()
    build, _ = timed(build_theirs)
    peak = peak_bytes() - before
    reopen, dataset = timed(build_theirs)

    def read_all() -> None:
        for first in range(0, options.samples, 10):
            torch.utils.data.default_collate([dataset[first + i] for i in range(10)])

    read_all()
    read, _ = timed(read_all)
    return numbers(build, reopen, peak, read, options, "theirs")


def training_step(options: argparse.Namespace) -> dict[str, Any]:
    """A model's step with and without the loader's cost."""
    import torch

    from megayoco.config import ModelConfig
    from megayoco.data.batches import Batches
    from megayoco.model.decoder import build_decoder

    decoder = build_decoder(ModelConfig(preset=options.model), None)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-4, fused=True)
    layout = dict(batch_size=2, micro_batch_size=1, data_rank=0, data_size=1, document_mask=True)
    train = our_datasets(options).train
    batches = Batches(train, **layout)
    waits, steps = [], []
    for number in range(options.steps + 1):
        begin = time.perf_counter()
        micro_batches = batches.next_step()
        waited = time.perf_counter() - begin
        optimizer.zero_grad()
        for micro_batch in micro_batches:
            loss_sum, count = decoder(*micro_batch)
            (loss_sum / count).backward()
        optimizer.step()
        if number:  # the first one starts the thread
            waits.append(waited)
            steps.append(time.perf_counter() - begin)
    batches.close()
    direct = Batches(train, **layout, prefetch=0)
    costs = [timed(direct.next_step)[0] for _ in range(50)]
    step = statistics.median(steps)
    return {
        "model": options.model,
        "tokens_per_step": 2 * options.sequence_length,
        "seconds_per_step": round(step, 4),
        "waited_share": round(statistics.median(waits) / step, 6),
        "waited_share_at_most": round(max(waits) / step, 6),
        "cost_without_thread_share": round(statistics.median(costs) / step, 6),
    }


def timed(function: Any) -> tuple[float, Any]:
    begin = time.perf_counter()
    result = function()
    return time.perf_counter() - begin, result


def numbers(
    build: float, reopen: float, peak: int, read: float, options: argparse.Namespace, cache: str
) -> dict[str, Any]:
    files = [path for path in Path(options.folder, cache).rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    shutil.rmtree(Path(options.folder, cache)) if cache == "theirs" else None  # the step still uses ours
    return {
        "build_seconds": round(build, 2),
        "open_again_seconds": round(reopen, 3),
        "build_peak_bytes": peak,
        "cache_bytes": size,
        "sequences_per_second": round(options.samples / read, 1),
    }


def machine() -> dict[str, Any]:
    """Processor, cores and how busy they were."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].split(":", 1)[1].strip() if lines else name
    load = round(os.getloadavg()[0], 1)  # what else it does hits both, but not in the same seconds
    return {"processor": name, "cores": os.cpu_count(), "python": platform.python_version(), "load_at_start": load}


def report(result: dict[str, Any]) -> None:
    """The result as text."""
    print(f"{result['data']} on {result['machine']}")
    for name in ("megayoco", "megatron-core"):
        values = result[name]
        print(
            f"{name:14} build {values['build_seconds']:.2f} s, open again {values['open_again_seconds']:.3f} s,"
            f" peak {values['build_peak_bytes'] / 2**20:,.0f} MiB, cache {values['cache_bytes'] / 2**20:,.0f} MiB,"
            f" {values['sequences_per_second']:,.0f} sequences/s"
        )
    step = result["share_of_a_step"]
    print(
        f"a step of {step['model']} ({step['tokens_per_step']} tokens) takes {step['seconds_per_step']:.3f} s: waiting"
        f" for data {step['waited_share']:.3%} of it (at most {step['waited_share_at_most']:.3%}), preparing it without"
        f" a thread {step['cost_without_thread_share']:.3%}"
    )


if __name__ == "__main__":
    main()
