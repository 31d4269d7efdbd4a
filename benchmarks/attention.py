"""Attention over a store of keys and values: its speed by shape, the choice of slices and blocks, and the alternatives.

    python benchmarks/attention.py [--heads 4 --kv-heads 2 --head-dim 64] [--keys 32768] [--rounds 3] [--output FILE]

Four questions, each answered by forms that take turns in every round, so that whatever else the machine does hits all
alike; on a CPU, seconds are those of the processor, summed over threads. `forward` is without a graph; `both` is
forward and backward, which adds the gradients of keys and values into the store. Rates count the visible (query, key)
pairs: 4 H K operations each forward, 10 H K backward.

rectangles  the last 512, 2048, 4096 tokens as queries over 4096 and --keys tokens, against what plain autograd offers:
            causal_attention (gradients of keys and values of full length, made anew) and torch's SDPA, which wants a
            mask of queries x keys for this alignment; the largest tensor that each of them makes
slices      4096 queries over 16384 tokens: how many keys the backward takes at a time
rows        the same queries in blocks of fewer: what the cross half loses by small blocks
compaction  some of the last 4096 tokens as queries: seconds against all of them, for sizes of the masked blocks
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from train_step import machine, summary

from megayoco.ops import attention_parts
from megayoco.ops.attention import causal_attention
from megayoco.ops.attention_store import KEYS_PER_SLICE, KeyValueStore, attention_over_store

QUERIES, KEYS = 4096, 16384


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--keys", type=int, default=32768)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="write the result as JSON as well")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result = {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine(options.threads),
        "torch": torch.__version__,
        "device": options.device,
        "heads": [options.heads, options.kv_heads, options.head_dim],
        "keys_per_slice, unless said": KEYS_PER_SLICE,
        "rounds": options.rounds,
    }
    for question in (rectangles, slices, rows, compaction):
        result[question.__name__] = question(options)
        print(f"\n{question.__name__}")
        for line in result[question.__name__]:
            print("   ", "  ".join(f"{name} {value}" for name, value in line.items()), flush=True)
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")


class Work:
    """Random queries, their output's gradient, and a store, and the forms that compute with them."""

    def __init__(
        self, options: argparse.Namespace, queries: int, keys: int, dtype: torch.dtype = torch.float32
    ) -> None:
        torch.manual_seed(0)
        H, G, K = options.heads, options.kv_heads, options.head_dim
        self.device, self.scale = torch.device(options.device), K**-0.5
        self.q, self.dout = (torch.randn(1, queries, H, K, device=self.device).to(dtype) for _ in range(2))
        self.store = KeyValueStore.allocate(1, keys, G, K, dtype, self.device)
        self.store.key.normal_()
        self.store.value.normal_()
        self.pairs = queries * (keys - queries) + queries * (queries + 1) // 2

    def ours(self, backward: bool = True, block: int | None = None, **how: Any) -> Callable[[], None]:
        """attention_over_store, in blocks of queries."""
        queries, keys = self.q.shape[1], self.store.tokens

        def run() -> None:
            for start in range(0, queries, block or queries):
                end = min(start + (block or queries), queries)
                q, dout = self.q[:, start:end], self.dout[:, start:end]
                store = self.store.upto(keys - queries + end) if "query_index" not in how else self.store
                self._run(lambda q: attention_over_store(q, store, scale=self.scale, **how), backward, q, dout)  # noqa: B023

        return run

    def plain(self, backward: bool = True) -> Callable[[], None]:
        """causal_attention, whose gradients of keys and values are added to the store's afterwards."""
        return self._with_gradients(lambda q, k, v: causal_attention(q, k, v, scale=self.scale), backward)

    def sdpa(self, backward: bool = True) -> Callable[[], None]:
        """torch's own attention, with the mask that says which tokens the queries are."""
        T, S = self.q.shape[1], self.store.tokens
        mask = torch.ones(T, S, dtype=torch.bool, device=self.device).tril(S - T)

        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            heads = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(*heads, attn_mask=mask, scale=self.scale, enable_gqa=True).transpose(
                1, 2
            )

        return self._with_gradients(attention, backward)

    def _with_gradients(
        self, attention: Callable[[Tensor, Tensor, Tensor], Tensor], backward: bool
    ) -> Callable[[], None]:
        store = self.store

        def run() -> None:
            key, value = (x.detach().requires_grad_(backward) for x in (store.key, store.value))
            self._run(lambda q: attention(q, key, value), backward, self.q, self.dout)
            if backward:
                assert store.dkey is not None and store.dvalue is not None
                store.dkey += key.grad
                store.dvalue += value.grad

        return run

    def _run(self, attention: Callable[[Tensor], Tensor], backward: bool, q: Tensor, dout: Tensor) -> None:
        with torch.set_grad_enabled(backward):
            out = attention(q.detach().requires_grad_(backward))
            if backward:
                out.backward(dout)
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def rate(self, seconds: float, backward: bool) -> float:
        """GFLOP/s of the visible pairs."""
        H, K = self.q.shape[2:]
        return round(self.pairs * H * K * (14 if backward else 4) / seconds / 1e9, 1)


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that an operator makes in memory of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        made = [x.untyped_storage() for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.bytes = max([self.bytes, *(x.nbytes() for x in made if x.data_ptr() not in given)])
        return result


def seconds_of(forms: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every form in every round; the order turns."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    names, seconds = list(forms), {name: [] for name in forms}  # type: ignore[var-annotated]
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            start = clock()
            forms[name]()
            seconds[name].append(clock() - start)
    return seconds


def median(values: list[float]) -> float:
    return summary(values)["median"]


def table(name: str, seconds: dict[str, list[float]], work: Work) -> list[dict[str, Any]]:
    """One line for every size."""
    return [{name: int(x), "seconds": median(s), "GFLOP/s": work.rate(median(s), True)} for x, s in seconds.items()]


def rectangles(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every shape in both dtypes."""
    lines = []
    for dtype in (torch.float32, torch.bfloat16):
        for keys in (4096, options.keys):
            for queries in (512, 2048, QUERIES):
                work = Work(options, queries, keys, dtype)
                forms = {"store": work.ours, "causal_attention": work.plain, "sdpa, mask": work.sdpa}
                for backward in (False, True):
                    largest = {}
                    for name, form in forms.items():
                        with Largest() as record:
                            form(backward)()
                        largest[name] = record.bytes
                    seconds = seconds_of({name: form(backward) for name, form in forms.items()}, options.rounds)
                    for name, values in seconds.items():
                        lines.append(
                            {
                                "dtype": str(dtype).removeprefix("torch."),
                                "queries": queries,
                                "keys": keys,
                                "form": name,
                                "pass": "both" if backward else "forward",
                                "seconds": median(values),
                                "GFLOP/s": work.rate(median(values), backward),
                                "largest MiB": round(largest[name] / 2**20, 1),
                            }
                        )
    return lines


def slices(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Keys of a slice of the backward."""
    work = Work(options, QUERIES, KEYS)
    sizes = (512, 1024, 2048, 4096, 8192, 16384)
    seconds = seconds_of({str(x): work.ours(keys_per_slice=x) for x in sizes}, options.rounds)
    return [
        {"keys_per_slice": int(x), "seconds": median(s), "GFLOP/s": work.rate(median(s), True)}
        for x, s in seconds.items()
    ]


def rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Queries of a block."""
    work = Work(options, QUERIES, KEYS)
    seconds = seconds_of({str(x): work.ours(block=x) for x in (128, 256, 512, 1024, 2048, 4096)}, options.rounds)
    return table("rows", seconds, work)


def compaction(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Shares of the last tokens as queries, by the rows of a masked block; seconds against all of them as a square."""
    whole = Work(options, QUERIES, KEYS)
    generator = torch.Generator().manual_seed(1)
    lines, before = [], attention_parts.MASKED_ROWS
    for share in (1.0, 0.4, 0.1, 0.01):
        chosen = torch.rand(QUERIES, generator=generator) < share
        index = (torch.arange(KEYS - QUERIES, KEYS)[chosen])[None].to(options.device)
        work = Work(options, index.shape[1], KEYS)

        def blocks_of(size: int, form: Callable[[], None]) -> Callable[[], None]:
            def run() -> None:
                attention_parts.MASKED_ROWS = size
                form()
                attention_parts.MASKED_ROWS = before

            return run

        forms = {str(size): blocks_of(size, work.ours(query_index=index)) for size in (64, 128, 256, 512)}
        seconds = seconds_of({"all": whole.ours(), **forms}, options.rounds)
        for size in forms:
            ratio = summary([a / b for a, b in zip(seconds[size], seconds["all"], strict=True)])
            lines.append(
                {
                    "share": share,
                    "rows": index.shape[1],
                    "masked rows": int(size),
                    "seconds": median(seconds[size]),
                    "of all rows": ratio["median"],
                }
            )
    return lines


if __name__ == "__main__":
    main()
