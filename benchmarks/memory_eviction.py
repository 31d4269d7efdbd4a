"""Which tokens should leave a full window in generation: the loss of a small LongLLaMA by the rule of its windows.

    python benchmarks/memory_eviction.py [--steps 360] [--threads 1] [--state FILE.pt] [--output FILE.json]

Trains a byte-level model of the LLaMA pattern with memory layers on English prose (the reference texts that come with
Python), on sequences of several windows, in the windows of training. Then it reads passages of the same texts that it
was not trained on with every rule of `WindowOptions`. Reported is the mean loss (nats per byte) of all bytes, and of
those behind the first window, with the difference to the windows of training and its standard error over the passages.
With --state, training is kept in a file now and then, and the same command goes on from it.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import math
import pydoc_data.topics
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from train_step import machine

import megayoco.parallel  # noqa: F401  (before the layers: it keeps megatron-core quiet)
from megayoco.config import CrossBatchConfig, ModelConfig
from megayoco.generate.scoring import score
from megayoco.model.decoder import Decoder, build_decoder
from megayoco.model.inference import InferenceModel
from megayoco.model.window_options import WindowOptions

WINDOW = 64
MODEL = ModelConfig(
    pattern="llama",
    dim=128,
    hidden_dim=344,
    heads=4,
    layers=4,
    vocab_size=256,
    memory_layers=(2,),
    memory_window=WINDOW,
)
BATCH, LENGTH = 8, 8 * WINDOW
LEARNING_RATE, WARM_UP = 2e-3, 20
HELD_OUT = 0.1
"""Share of the text, its end, that passages to read are from."""
RULES: dict[str, WindowOptions] = {
    "e = W": WindowOptions(),
    **{f"e = {name}": WindowOptions(evicted=count) for name, count in (("W/2", 32), ("W/4", 16), ("W/8", 8), ("1", 1))},
    **{f"lc = {name}": WindowOptions(last_context=count) for name, count in (("W", 64), ("W/2", 32))},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--steps", type=int, default=360)
    add("--passages", type=int, default=48)
    add("--passage-bytes", type=int, default=16 * WINDOW + 1)
    add("--cross-batch", type=int, default=0, help="windows of other texts and its own that a window sees in training")
    add("--threads", type=int, default=1)
    add("--state", type=Path, help="where training is kept, and goes on from")
    add("--output", type=Path, help="write the result as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    training, held_out = texts()
    decoder, losses = trained(training, options)
    result = {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", *sys.argv]),
        "versions": {"torch": importlib.metadata.version("torch")},
        "machine": machine(options.threads),
        "window": WINDOW,
        "training loss of the last 20 steps": round(sum(losses[-20:]) / 20, 4),
        "rules": measured(decoder, held_out, options),
    }
    for name, row in result["rules"].items():
        print(f"{name:10} " + ", ".join(f"{key} {value:.4f}" for key, value in row.items()))
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")


def texts() -> tuple[Tensor, Tensor]:
    """Bytes to train on and to read."""
    pages = pydoc_data.topics.topics
    data = torch.tensor(list("\n\n".join(pages[name] for name in sorted(pages)).encode()), dtype=torch.int64)
    cut = int(len(data) * (1 - HELD_OUT))
    return data[:cut], data[cut:]


def trained(data: Tensor, options: argparse.Namespace) -> tuple[Decoder, list[float]]:
    """The model, and its loss at every step."""
    decoder = build_decoder(MODEL, None, seed=1)
    if options.cross_batch:
        decoder.set_cross_batch(CrossBatchConfig(range=options.cross_batch))
    optimizer = torch.optim.AdamW(decoder.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    generator, start = torch.Generator().manual_seed(0), time.perf_counter()
    losses: list[float] = []
    if options.state and options.state.exists():
        state = torch.load(options.state)
        decoder.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        losses = state["losses"]
    for step in range(len(losses), options.steps):
        rate = min((step + 1) / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * step / options.steps))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * rate
        begins = torch.randint(0, len(data) - LENGTH - 1, (BATCH,), generator=generator)
        rows = torch.stack([data[begin : begin + LENGTH + 1] for begin in begins])
        loss, count = decoder(rows[:, :-1], rows[:, 1:])
        optimizer.zero_grad()
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach() / count))
        if len(losses) % 20 == 0:
            print(f"{len(losses)} steps: loss {losses[-1]:.3f}, {time.perf_counter() - start:.0f} s", flush=True)
            if options.state:
                state = {"model": decoder.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save({**state, "generator": generator.get_state(), "losses": losses}, options.state)
    return decoder.eval(), losses


def measured(decoder: Decoder, data: Tensor, options: argparse.Namespace) -> dict[str, Any]:
    """Of every rule the losses over passages of equal distance."""
    size = options.passage_bytes
    starts = torch.linspace(0, len(data) - size, options.passages).long().tolist()
    rows, grid = {}, torch.empty(0)
    for name, rule in RULES.items():
        model = InferenceModel.of(decoder, windows=rule)
        losses = torch.stack([score(model, data[start : start + size].tolist()).losses for start in starts])
        later = losses[:, WINDOW:].mean(1)
        grid = later if rule == WindowOptions() else grid
        difference = later - grid
        rows[name] = {
            "loss": round(float(losses.mean()), 4),
            "behind the first window": round(float(later.mean()), 4),
            "less than e = W by": round(-float(difference.mean()), 4),
            "standard error": round(float(difference.std() / len(starts) ** 0.5), 4),
        }
    return rows


if __name__ == "__main__":
    main()
