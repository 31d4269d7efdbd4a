"""What kNN memory costs and finds: attention of one decoded token over a large memory, dense and over its k best keys.

    python benchmarks/memory_search.py [--lengths 4096 65536 262144] [--subjects ...] [--output FILE.json]

One layer with memory attention, one sequence, fp32, on the CPU. In turn:

    dense           every remembered key, as attention reads it
    exact           the k best keys of each query head, found by matrix products and top-k
    exact in files  the same, keys and values in mapped files (--memory-directory)
    faiss-flat      the k best keys by Faiss, exact, from its copy of the keys
    faiss-hnsw      by Faiss's graph, approximate

    seconds per token   median of --tokens tokens; the layer's attention alone, local window included
    index seconds       until the first search can answer: what a prompt of this length costs once
    anonymous           bytes that keys, values, index and search add to the process, without mapped files
    mapped              bytes of mapped files that the process has touched; the system may take them back
    recall              share of the k best keys that were found
    mass                share of the dense attention weight on the memory that lies on what was found

Keys and values are random. Queries are of two kinds: `random`, whose weights are spread over the whole memory, the
hardest case for a graph; and `planted`, each close to a key, as those of a model that looks something up. Every point
runs in a fresh process with one thread; --clock cpu counts the seconds that it computes, for a machine that others use.
A point that is measured again replaces the one in FILE.json, if the setting is the same.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.metadata
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from inference import CLOCKS
from long_context_memory import resident
from torch import Tensor
from train_step import machine, summary

from megayoco.ops.key_value_cache import KeyValueCache
from megayoco.ops.key_value_storage import Place
from megayoco.ops.key_values import KeyValues
from megayoco.ops.memory_attention import Segment, memory_attention_over_context
from megayoco.ops.memory_search import Search, nearest

SUBJECTS = {
    "dense": None,
    "exact": "exact",
    "exact in files": "exact",
    "faiss-flat": "faiss-flat",
    "faiss-hnsw": "faiss-hnsw",
}
CPU = torch.device("cpu")
CHUNK = 4096
"""Tokens that come at a time."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--lengths", type=int, nargs="+", default=[4096, 65536, 262144], help="tokens of the memory")
    add("--subjects", nargs="+", default=list(SUBJECTS), choices=list(SUBJECTS), help="default: all")
    add("--heads", type=int, default=8, help="query heads")
    add("--kv-heads", type=int, default=2)
    add("--head-dim", type=int, default=64)
    add("--window", type=int, default=512, help="local keys of the token")
    add("--top-k", type=int, default=128, help="keys per query and head; 128 in the paper")
    add("--tokens", type=int, default=20, help="decoded tokens per point")
    add("--clock", default="wall", choices=list(CLOCKS))
    add("--output", type=Path, help="write the result as JSON, after every point")
    add("--job", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    setting = {name: getattr(options, name) for name in ("heads", "kv_heads", "head_dim", "window", "top_k", "clock")}
    if options.job is not None:
        print(json.dumps(measure(options.job["subject"], options.job["length"], options.tokens, setting)))
        return
    result: dict[str, Any] = {"setting": setting, "machine": machine(1), "points": {}}
    result["versions"] = {name: importlib.metadata.version(name) for name in ("torch", "faiss-cpu", "numpy")}
    if options.output and options.output.exists():
        earlier = json.loads(options.output.read_text())
        if earlier["setting"] == setting:
            result["points"] = earlier["points"]
    for length in options.lengths:
        points = result["points"].setdefault(str(length), {})
        for subject in options.subjects:
            points[subject] = {
                "date": datetime.date.today().isoformat(),
                "command": shlex.join(["python", *sys.argv]),
                **in_fresh_process(subject, length, options),
            }
            print(f"{length:>8,} {subject:15} {line_of(points[subject])}", flush=True)
            if options.output:
                options.output.write_text(json.dumps(result, indent=2) + "\n")


def in_fresh_process(subject: str, length: int, options: argparse.Namespace) -> dict[str, Any]:
    """`measure` in a process of its own, in which freed blocks of 256 KiB and more go back at once."""
    flags = ["heads", "kv_heads", "head_dim", "window", "top_k", "tokens", "clock"]
    given = [part for name in flags for part in (f"--{name.replace('_', '-')}", str(getattr(options, name)))]
    job = json.dumps({"subject": subject, "length": length})
    command = [sys.executable, "-W", "ignore", __file__, *given, "--job", job]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**18), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def measure(subject: str, length: int, tokens: int, setting: dict[str, Any]) -> dict[str, Any]:
    """One point, in this process."""
    now, backend = CLOCKS[setting["clock"]], SUBJECTS[subject]
    search = None if backend is None else Search(setting["top_k"], backend)
    with tempfile.TemporaryDirectory() as folder:
        place = Place(CPU, Path(folder)) if subject == "exact in files" else None
        decode(remember(1024, place, search, setting), 1024, queries(1024, 2, "random", setting), setting)  # libraries
        gc.collect()
        before, mapped = resident("RssAnon"), resident("RssFile")
        cache = remember(length, place, search, setting)
        start = now()
        decode(cache, length, queries(length, 1, "random", setting), setting)
        index = now() - start
        seconds = []
        for q in queries(length, tokens, "random", setting).split(1, 1):
            start = now()
            decode(cache, length, q, setting)
            seconds.append(now() - start)
        found = {"anonymous_bytes": resident("RssAnon") - before, "mapped_bytes": resident("RssFile") - mapped}
    step = statistics.median(seconds)
    quality = {kind: quality_of(cache, length, queries(length, 8, kind, setting), setting) for kind in KINDS}
    return {
        "seconds_per_token": summary_of(seconds),
        "index_seconds": round(max(index - step, 0), 3),
        "key_value_bytes": cache.bytes,
        **found,
        "quality": quality,
    }


def summary_of(values: list[float]) -> dict[str, float]:
    """Median, quartiles and extremes in milliseconds' digits."""
    return {name: round(value / 1000, 7) for name, value in summary([1000 * value for value in values]).items()}


def remember(length: int, place: Place | None, search: Search | None, setting: dict[str, Any]) -> KeyValueCache:
    """A memory of so many random tokens, and a local window."""
    heads, dim = setting["kv_heads"], setting["head_dim"]
    total = length + setting["window"]
    cache = KeyValueCache.empty(1, heads, dim, torch.float32, CPU, reserve=total, place=place, search=search)
    for start in range(0, total, CHUNK):
        cache = cache.combine(tokens_of(start, min(CHUNK, total - start), setting))
    return cache


def tokens_of(start: int, count: int, setting: dict[str, Any]) -> KeyValues:
    """Keys and values of the chunk that begins at a multiple of CHUNK, always the same."""
    generator = torch.Generator().manual_seed(start)
    shape = (1, CHUNK, setting["kv_heads"], setting["head_dim"])
    key, value = (torch.randn(shape, generator=generator)[:, :count] for _ in range(2))
    return KeyValues(key, value)


KINDS = ("random", "planted")


def queries(length: int, count: int, kind: str, setting: dict[str, Any]) -> Tensor:
    """(1, count, heads, head dim): random, or each a remembered key with noise of half its size, twice as long."""
    heads, kv_heads, dim = setting["heads"], setting["kv_heads"], setting["head_dim"]
    generator = torch.Generator().manual_seed(length + 1)
    noise = torch.randn(1, count, heads, dim, generator=generator)
    if kind == "random":
        return noise
    for t in range(count):
        for head in range(heads):
            at = int(torch.randint(length, (), generator=generator))
            chunk = tokens_of(at // CHUNK * CHUNK, CHUNK, setting)
            noise[0, t, head] = 2 * (chunk.key[0, at % CHUNK, head // (heads // kv_heads)] + noise[0, t, head] / 2)
    return noise


def decode(cache: KeyValueCache, length: int, q: Tensor, setting: dict[str, Any]) -> Tensor:
    """The attention of tokens that see the whole memory and the whole window."""
    local = cache.part(length, cache.tokens).key
    rows, keys = slice(0, q.shape[1]), slice(length, cache.tokens)
    segments = [Segment(slice(t, t + 1), keys, slice(0, length)) for t in range(rows.stop)]
    return memory_attention_over_context(q, q, local, cache, segments, setting["head_dim"] ** -0.5)


def quality_of(cache: KeyValueCache, length: int, q: Tensor, setting: dict[str, Any]) -> dict[str, float]:
    """Recall, and the share of the dense weights, of what the search finds; the dense memory itself has all."""
    k, groups = min(setting["top_k"], length), setting["kv_heads"]
    recalls, masses = [], []
    for one in q.split(1, 1):
        rows = one.transpose(1, 2).reshape(1, groups, -1, setting["head_dim"])
        scores = rows @ cache.part(0, length).key.transpose(1, 2).transpose(-1, -2)
        weights = (scores * setting["head_dim"] ** -0.5).softmax(-1)
        found = torch.zeros(scores.shape, dtype=torch.bool)
        if cache.search is None:
            found.fill_(True)
        else:
            numbers = nearest(rows, cache, slice(0, length), k)
            found.scatter_(-1, numbers.clamp(min=0), True)
        recalls.append(float(found.gather(-1, scores.topk(k).indices).float().mean()))
        masses.append(float((weights * found).sum(-1).mean()))
    return {"recall": round(statistics.mean(recalls), 4), "mass": round(statistics.mean(masses), 4)}


def line_of(point: dict[str, Any]) -> str:
    """A point in words."""
    found = ", ".join(f"{kind}: recall {x['recall']:.3f}, mass {x['mass']:.3f}" for kind, x in point["quality"].items())
    return (
        f"{1000 * point['seconds_per_token']['median']:9.3f} ms per token, index {point['index_seconds']:7.2f} s,"
        f" anonymous {point['anonymous_bytes'] / 2**20:7.1f} MiB, mapped {point['mapped_bytes'] / 2**20:7.1f} MiB,"
        f" {found}"
    )


if __name__ == "__main__":
    main()
