"""Bytes that one rank of a sequence receives in one training step: ours, counted, against ring attention and Ulysses.

    python benchmarks/communication.py [--ranks 4] [--sequence-length 8192] [--bands 4] [--output FILE]

Ours runs: one step in `ranks` processes over gloo, at several depths, and the counters of megayoco/traffic.py tell what
went over the sequence axis. On this axis every byte that one rank sends another receives, and all ranks send the same
amount but for the ends of the halo, so the mean over ranks of what is sent is what a rank receives. The other two are
formulas for the same shape, of attention layers only, activations in the same dtype, for the cross-decoder's layers
(all of which see the whole sequence):

    ring      forward: the keys and values of all other ranks pass by, 2 (P-1)/P N G K b;
              backward: they pass by again, and their gradients travel with them in fp32: (b + 4) / b times as much more
    Ulysses   forward: all-to-all of q, k, v and of the output; backward: the same of their gradients:
              2 (P-1)/P N/P (2 H K + 2 max(G, P) K) b (fewer key-value heads than ranks are replicated)

b bytes per element of the activations, fp32 here, so that ring attention's gradients weigh as much as its keys.
Source: Ring Attention, arXiv 2310.01889; DeepSpeed-Ulysses, arXiv 2309.14509.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import shlex
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from train_step import machine

from megayoco.config import ModelConfig, ParallelConfig
from megayoco.traffic import TRAFFIC

DEPTHS = (4, 8, 16)
ELEMENT = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=4, help="P")
    parser.add_argument("--sequence-length", type=int, default=8192, help="N")
    parser.add_argument("--bands", type=int, default=4)
    parser.add_argument("--output", type=Path, help="write the result as JSON as well")
    options = parser.parse_args()
    rows = []
    for mixer in ("retention", "window"):
        for layers in DEPTHS:
            model = shape(mixer, layers)
            counted = one_step(model, options)
            rows.append(row(model, counted, options.ranks, options.sequence_length))
    result = {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine(1),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "megatron-core", "deepspeed")},
        "shape": f"N {options.sequence_length}, P {options.ranks}, bands {options.bands}, D 256, H 4, G 2, K 64, fp32",
        "rows": rows,
    }
    report(result)
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")


def shape(mixer: str, layers: int) -> ModelConfig:
    """Half of the layers are cross layers."""
    own: dict[str, Any] = {"self_mixer": "window", "window": 128} if mixer == "window" else {"self_mixer": "retention"}
    return ModelConfig(dim=256, layers=layers, hidden_dim=256, heads=4, kv_heads=2, self_heads=4, vocab_size=512, **own)


def one_step(model: ModelConfig, options: argparse.Namespace) -> dict[str, float]:
    """Bytes per rank and step by purpose, the mean over ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        arguments = (options.ranks, port, model, options.sequence_length, options.bands, folder)
        mp.spawn(_rank, arguments, nprocs=options.ranks)
        parts = [json.loads(path.read_text()) for path in Path(folder).iterdir()]
    names = sorted({name for part in parts for name in part})
    return {name: sum(part.get(name, 0) for part in parts) / options.ranks for name in names}


def _rank(rank: int, ranks: int, port: int, model: ModelConfig, length: int, bands: int, folder: str) -> None:
    from megayoco.model.decoder import build_decoder
    from megayoco.parallel.sequence import own_chunks
    from megayoco.parallel.topology import build_topology

    torch.set_num_threads(1)
    os.environ["DS_ACCELERATOR"] = "cpu"
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    decoder = build_decoder(model, build_topology(ParallelConfig(sequence=ranks), model))
    decoder.set_bands(bands)
    tokens = torch.randint(0, model.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    own = [own_chunks(x, rank, ranks, bands) for x in (tokens, tokens.roll(-1, 1))]
    TRAFFIC.take()
    decoder(*own)[0].backward()
    (Path(folder) / str(rank)).write_text(json.dumps(TRAFFIC.take()))
    dist.barrier()
    dist.destroy_process_group()


def row(model: ModelConfig, counted: dict[str, float], ranks: int, length: int) -> dict[str, Any]:
    """One line of the result, in MiB."""
    cross = model.layer_pattern().count("cross")
    head_dim, share = model.head_dim, (ranks - 1) / ranks
    keys_values = 2 * length * model.num_kv_heads * head_dim
    ring = cross * share * keys_values * (ELEMENT + ELEMENT + 4)
    heads = 2 * model.heads + 2 * max(model.num_kv_heads, ranks)
    ulysses = cross * 2 * share * length / ranks * heads * head_dim * ELEMENT
    shared = sum(size for name, size in counted.items() if "shared_kv" in name)
    size = {
        "ours, cross-decoder": shared,
        "ours, self-decoder": sum(counted.values()) - shared,
        "ring attention, cross-decoder": ring,
        "Ulysses, cross-decoder": ulysses,
    }
    return {
        "self_mixer": model.self_mixer,
        "layers": model.layers,
        "MiB_received_per_rank": {name: round(value / 2**20, 3) for name, value in size.items()},
        "by_purpose_MiB": {name: round(value / 2**20, 3) for name, value in counted.items()},
    }


def report(result: dict[str, Any]) -> None:
    """The result as text."""
    print(f"MiB received per rank and step: {result['shape']}")
    names = list(result["rows"][0]["MiB_received_per_rank"])
    print(f"{'self mixer':12}{'layers':>8}" + "".join(f"{name:>32}" for name in names))
    for line in result["rows"]:
        sizes = line["MiB_received_per_rank"]
        print(f"{line['self_mixer']:12}{line['layers']:>8}" + "".join(f"{sizes[name]:>32.2f}" for name in names))


if __name__ == "__main__":
    main()
