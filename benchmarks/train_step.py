"""One training step against transformers, alternately in one run; and the trainer's own overhead.

    python benchmarks/train_step.py [--model llama-tiny] [--sequence-length 1024] [--batch-size 4] [--rounds 20]

Ours is the real engine (DeepSpeed included) on one process; theirs is `LlamaForCausalLM` of the same shape with
torch.optim.AdamW and gradient clipping, in its default form and with `fused=True`. Each round runs one step of each, in
an order that turns, so that whatever else the machine does hits all alike. Reported are the medians of the seconds per
step, and the median and quartiles of the per-round ratios ours / theirs.

The trainer's overhead is what a step costs beyond forward, backward, clipping and optimizer: that of the engine is the
ratio of its step to the same module in a bare loop, in the same rounds; that of the loop around it (data, schedule,
metrics, logging) is what a short real run of the trainer writes as `overhead` into its metrics.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megayoco.config import DataConfig, ModelConfig, OptimizerConfig, PhaseConfig, RunConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llama-tiny", help="preset of the LLaMA pattern")
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=4, help="sequences per step, one micro-batch")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, help="write the result as JSON as well")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = ModelConfig(preset=options.model)
    if model.pattern != "llama":
        parser.error(f"{options.model} is not of the LLaMA pattern: transformers has nothing to compare it with")
    tokens = torch.randint(0, model.vocab_size, (options.batch_size, options.sequence_length + 1))
    steps = {
        "megayoco": our_step(model, tokens),
        "megayoco, bare loop": bare_step(model, tokens),
        "transformers": transformers_step(model, tokens, fused=False),
        "transformers, fused AdamW": transformers_step(model, tokens, fused=True),
    }
    seconds = measure(steps, options.rounds)
    result = {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine(options.threads),
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("torch", "transformers", "deepspeed", "megatron-core", "numpy")
        },
        "shape": {
            "model": options.model,
            "parameters": model.parameter_count()["total"],
            "tokens": [options.batch_size, options.sequence_length],
            "dtype": "fp32",
        },
        "rounds": options.rounds,
        "seconds_per_step": {name: summary(values) for name, values in seconds.items()},
        "ratio": {
            f"megayoco / {name}": summary([a / b for a, b in zip(seconds["megayoco"], values, strict=True)])
            for name, values in seconds.items()
            if name != "megayoco"
        },
        "overhead_of_the_loop": summary(loop_overhead(options)),
    }
    report(result)
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")


def our_step(model: ModelConfig, tokens: torch.Tensor) -> Callable[[], float]:
    """The trainer's engine on one process, fp32, ZeRO 0."""
    from megayoco.data.batches import MicroBatch
    from megayoco.dsconfig import load_deepspeed_config
    from megayoco.parallel.launch import start_distributed
    from megayoco.parallel.topology import build_topology
    from megayoco.train.engine import Engine

    os.environ["MEGAYOCO_THREADS"] = str(torch.get_num_threads())
    _, device = start_distributed()
    batch_size, length = tokens.shape[0], tokens.shape[1] - 1
    run = RunConfig(
        model=model,
        data=DataConfig(train="unused"),
        optimizer=OptimizerConfig(),
        phases=[
            PhaseConfig(
                sequence_length=length, steps=1, batch_size=batch_size, micro_batch_size=batch_size, learning_rate=1e-3
            )
        ],
        output_dir=tempfile.gettempdir(),
    )
    engine = Engine(run, load_deepspeed_config(None, run, 1, device), build_topology(run.parallel, model), device)
    engine.begin_phase(0)
    batch = MicroBatch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), None)
    return lambda: engine.train_step([batch], 1e-3).loss


def bare_step(model: ModelConfig, tokens: torch.Tensor) -> Callable[[], float]:
    """The same module as ours without engine: forward, backward, clipping, optimizer and nothing else."""
    from megayoco.model.decoder import build_decoder

    decoder = build_decoder(model, None)
    settings = OptimizerConfig()
    optimizer = torch.optim.AdamW(
        decoder.parameters(), lr=1e-3, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
    )
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step() -> float:
        optimizer.zero_grad()
        loss_sum, count = decoder(inputs, targets)
        (loss_sum / count).backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), settings.gradient_clipping)
        optimizer.step()
        return float(loss_sum.detach())

    return step


def loop_overhead(options: argparse.Namespace) -> list[float]:
    """The share of every step that a real run of the trainer spends outside the engine's step."""
    import numpy as np

    from megayoco.data.indexed_writer import IndexedWriter
    from megayoco.data.tokenizer import build_tokenizer
    from megayoco.train.__main__ import main as train

    tokenizer = build_tokenizer("ByteTokenizer")
    with tempfile.TemporaryDirectory() as folder:
        prefix = f"{folder}/bytes_document"
        tokens = options.rounds * options.batch_size * options.sequence_length + 10_000
        with IndexedWriter(prefix, tokenizer.vocab_size) as writer:
            ids = np.random.default_rng(0).integers(0, 256, tokens).astype(writer.dtype)
            writer.add(ids, np.array([len(ids)]))
            writer.finish({"tokenizer": tokenizer.identity()})
        config = Path(folder) / "run.yaml"
        config.write_text(
            f"model: {{preset: {options.model}}}\n"
            f"data: {{train: {prefix}, split: '100,0,0', tokenizer_type: ByteTokenizer}}\n"
            f"phases: [{{sequence_length: {options.sequence_length}, steps: {options.rounds},"
            f" batch_size: {options.batch_size}, micro_batch_size: {options.batch_size}, learning_rate: 1.0e-3}}]\n"
            f"checkpoint: {{export: never}}\noutput_dir: {folder}/run\n"
        )
        torch.distributed.destroy_process_group()  # our_step started one; the trainer starts its own
        if train(["--config", str(config)]):
            raise SystemExit("the trainer did not run")
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    # the first step also opens the data
    return [json.loads(line)["overhead"] for line in lines if "overhead" in line][1:]


def transformers_step(model: ModelConfig, tokens: torch.Tensor, fused: bool) -> Callable[[], float]:
    """The loop that a user of transformers writes: loss from labels, backward, clip, AdamW."""
    from transformers import LlamaConfig, LlamaForCausalLM

    network = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=model.vocab_size,
            hidden_size=model.dim,
            intermediate_size=model.hidden_dim,
            num_hidden_layers=model.layers,
            num_attention_heads=model.heads,
            num_key_value_heads=model.num_kv_heads,
            rms_norm_eps=model.norm_eps,
            max_position_embeddings=tokens.shape[1],
            tie_word_embeddings=model.tie_embeddings,
            use_cache=False,
        )
    )
    network.train()
    settings: dict[str, Any] = {"fused": True} if fused else {}
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, **settings)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step() -> float:
        optimizer.zero_grad()
        # the targets are shifted already: the same number of loss rows as ours
        loss = network(input_ids=inputs, labels=inputs, shift_labels=targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        return float(loss.detach())

    return step


def measure(steps: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every step, after two warm-up rounds; the order turns from round to round."""
    names = list(steps)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-2, rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            start = time.perf_counter()
            steps[name]()
            if number >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def summary(values: list[float]) -> dict[str, float]:
    """Median, quartiles, extremes."""
    first, middle, third = statistics.quantiles(values, n=4)
    numbers = {"median": middle, "quartile1": first, "quartile3": third, "min": min(values), "max": max(values)}
    return {name: round(value, 4) for name, value in numbers.items()}


def machine(threads: int) -> dict[str, Any]:
    """Processor and threads."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].split(":", 1)[1].strip() if lines else name
    return {"processor": name, "cores": os.cpu_count(), "threads": threads, "python": platform.python_version()}


def report(result: dict[str, Any]) -> None:
    """The result as text."""
    print(f"{result['shape']} on {result['machine']}")
    for name, values in result["seconds_per_step"].items():
        print(f"{name:28} {values['median']:.3f} s per step ({values['quartile1']:.3f} to {values['quartile3']:.3f})")
    for name, values in result["ratio"].items():
        print(f"{name:42} {values['median']:.3f} ({values['quartile1']:.3f} to {values['quartile3']:.3f})")
    values = result["overhead_of_the_loop"]
    print(
        f"{'overhead of the loop around the engine':42} {values['median']:.2%} of a step (at most {values['max']:.2%})"
    )


if __name__ == "__main__":
    main()
