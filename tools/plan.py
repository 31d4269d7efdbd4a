#!/usr/bin/env python
"""What a run will need and how fast it may be, before there is a GPU: memory, bytes sent, operations, time.

    python tools/plan.py --config examples/extend_context_1m_64gpu.yaml --deepspeed_config ds_configs/zero2_bf16.json \\
        --gpus 64 --gpu-memory 80 --interconnect 400 [parallel.sequence=16 ...] [--search] [--json FILE]

Prints, for every phase, what one rank holds and sends, the seconds of a step by cause, and the model FLOP utilisation;
megayoco/train/planning.py says how each is counted. Memory estimates of activations were within 10 % of measured peaks
on CPU; times rest on the efficiencies assumed, which are flags and are printed. --search tries every layout of the GPUs
(tensor, pipeline, sequence, ZeRO, checkpointing, and bands phase by phase) and lists the ten fastest that fit.
Bandwidths are those of one GPU. A run that does not fit is still printed, and ends with an error and exit code 2.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megayoco.data.command import dashed, positive_int, run_command
from megayoco.errors import UserError

if TYPE_CHECKING:
    from megayoco.config import RunConfig
    from megayoco.train.planning import Cluster, PhasePlan, Plan, SearchResult

SHOWN = 10


def positive(text: str) -> float:
    """A number above 0, for argparse."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return number


def share(text: str) -> float:
    """A number above 0 and at most 1, for argparse."""
    number = positive(text)
    if number > 1:
        raise argparse.ArgumentTypeError(f"must be at most 1, got {text!r}")
    return number


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="the run, as for python -m megayoco.train")
    add("--deepspeed-config", metavar="FILE", help="precision and ZeRO; without it fp32 and ZeRO 0")
    add("--gpus", type=positive_int, required=True, metavar="N", help="GPUs of the run")
    add("--gpu-memory", type=positive, default=80.0, metavar="GIB", help="memory of a GPU (80)")
    add("--gpus-per-node", type=positive_int, default=8, metavar="N", help="GPUs of a node (8)")
    add("--intra-node", type=positive, default=900.0, metavar="GB/S",
        help="links inside a node as they are sold, both ways together (900, NVLink 4)")  # fmt: skip
    add("--interconnect", type=positive, default=400.0, metavar="GBIT/S",
        help="network between nodes, one way (400)")  # fmt: skip
    add("--host-link", type=positive, default=50.0, metavar="GB/S", help="to main memory, for offloading (50)")
    add("--peak-tflops", type=positive, metavar="T",
        help="dense peak in the run's format (an H100's: 989.5 in bf16 and fp16, 67 in fp32)")  # fmt: skip
    add("--matmul-efficiency", type=share, default=0.65, metavar="E", help="share of the peak in products (0.65)")
    add("--attention-efficiency", type=share, default=0.5, metavar="E", help="the same in attention (0.5)")
    add("--network-efficiency", type=share, default=0.7, metavar="E", help="share of the bandwidths reached (0.7)")
    add("--memory-share", type=share, default=0.85, metavar="S", help="share of the memory that may be filled (0.85)")
    add("--search", action="store_true", help="try all layouts and list the fastest that fit")
    add("--json", metavar="FILE", help="write everything as JSON as well")
    add("overrides", nargs="*", metavar="KEY=VALUE", help="of the run's config, such as parallel.tensor=2")
    return parser


def main(arguments: Sequence[str]) -> None:
    options = build_parser().parse_intermixed_args(dashed(arguments))
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed is asked about its config only
    # late: they take seconds, and the help text and wrong flags need none of them
    from megayoco.config.parallel import check_bands
    from megayoco.dsconfig import load_deepspeed_config, precision
    from megayoco.train.engine import engine_config
    from megayoco.train.metrics import PEAK_TFLOPS
    from megayoco.train.planning import Axes, check_batches, plan_run, search_layouts
    from megayoco.train.starting import load_run

    run = load_run(options.config, options.overrides)
    for number in range(len(run.phases)):
        check_bands(run.phase_bands(number), run.model, f"phases.{number}.bands")
    parallel = run.parallel
    if options.search:  # any layout will do to read the DeepSpeed config by
        parallel = dataclasses.replace(parallel, tensor=1, pipeline=1, sequence=1)
        data = 1
    else:
        parallel.validate(run.model, options.gpus)
        data = parallel.data(options.gpus)
    check_batches(run, data)
    read_for = dataclasses.replace(run, parallel=parallel)
    ds_config = engine_config(load_deepspeed_config(options.deepspeed_config, read_for, data, "cuda"))
    kind = precision(ds_config)
    cluster = make_cluster(options, PEAK_TFLOPS["H100"][1 if kind == "fp32" else 0])
    result: dict[str, Any] = {"cluster": dataclasses.asdict(cluster)}
    print_head(run, cluster, kind)
    problem = None
    if options.search:
        found = search_layouts(run, ds_config, cluster)
        print_search(found)
        if not found.plans:
            problem = f"None of {found.tried} layouts fits."
        result["search"] = {
            "tried": found.tried,
            "dropped": dict(found.dropped),
            "plans": [plan_values(plan) for plan in found.plans[:SHOWN]],
        }
    else:
        axes = Axes(parallel.tensor, parallel.pipeline, parallel.sequence, data)
        plan = plan_run(run, ds_config, axes, cluster)
        print_plan(plan, cluster)
        result["plan"] = plan_values(plan)
        if not plan.fits:
            phases = ", ".join(phase.label for phase in plan.phases if not phase.fits)
            problem = f"Phase {phases} does not fit into {cluster.memory_share:.0%} of the memory."
    if options.json:
        try:
            Path(options.json).write_text(json.dumps(result, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"--json {options.json} cannot be written: {error.strerror}.") from None
    if problem is not None:
        raise UserError(f"{problem} {remedy(run, options.search)}")


def remedy(run: "RunConfig", searched: bool) -> str:
    """What helps a run that does not fit."""
    bands = " parallel.bands=auto," if not searched and run.model.pattern == "yoco" else ""
    return (
        f"Use{'' if searched else ' --search,'}{bands} more GPUs, offloading (ds_configs/), a smaller micro_batch_size"
        " or shorter sequences."
    )


def make_cluster(options: argparse.Namespace, peak_tflops: float) -> "Cluster":
    """The flags in bytes, operations and seconds; `peak_tflops` where no flag says otherwise."""
    from megayoco.train.planning import Cluster

    return Cluster(
        gpus=options.gpus,
        gpu_memory=options.gpu_memory * 2**30,
        gpus_per_node=min(options.gpus_per_node, options.gpus),
        intra_node=options.intra_node / 2 * 1e9,
        interconnect=options.interconnect / 8 * 1e9,
        host_link=options.host_link * 1e9,
        peak=(options.peak_tflops or peak_tflops) * 1e12,
        matmul_efficiency=options.matmul_efficiency,
        attention_efficiency=options.attention_efficiency,
        network_efficiency=options.network_efficiency,
        memory_share=options.memory_share,
    )


def print_head(run: "RunConfig", cluster: "Cluster", precision: str) -> None:
    """The run, the cluster, and what is assumed of it."""
    c = cluster
    print(
        f"run      {run.model.pattern}, {run.model.parameter_count()['total']:,} parameters, {precision},"
        f" on {c.gpus} GPUs of {c.gpu_memory / 2**30:g} GiB, {c.gpus_per_node} per node"
    )
    print(
        f"assumed  {c.peak / 1e12:g} TFLOP/s peak, {c.matmul_efficiency:.0%} of it in products,"
        f" {c.attention_efficiency:.0%} in attention; a GPU sends {c.intra_node / 1e9:g} GB/s in its node and"
        f" {c.interconnect / 1e9:g} GB/s to others, {c.network_efficiency:.0%} of it reached"
    )


def print_plan(plan: "Plan", cluster: "Cluster") -> None:
    """One column per phase."""
    print(f"layout   {describe(plan)}\n")
    phases = plan.phases
    table = [["", *(phase.label for phase in phases)]]

    def row(name: str, texts: list[str]) -> None:
        table.append([name, *texts])

    def sizes(name: str, values: list[float], always: bool = False) -> None:
        if always or any(value >= 2**20 for value in values):
            row(f"  {name}", [f"{value / 2**30:.2f}" for value in values])

    row("tokens of a sequence", [f"{phase.sequence_length:,}" for phase in phases])
    row("bands, tokens of a chunk", [f"{phase.bands}, {phase.chunk:,}" for phase in phases])
    row("micro-batches per step", [str(phase.micro_batches) for phase in phases])
    row("memory of the fullest rank, GiB", [""] * len(phases))
    memories = [phase.memory for phase in phases]
    for name in ("weights", "gradients", "optimizer"):
        sizes(name, [getattr(memory, name) for memory in memories], always=True)
    for name, parts in (
        ("activations", ("layers", "rows", "loss", "hidden", "passing")),
        ("shared keys, values", ("shared", "shared_gradients")),
        ("boundary contexts", ("contexts",)),
        ("gradient sums", ("gradient_sums",)),
    ):
        values = [sum(getattr(memory.parts, part) for part in parts) for memory in memories]
        sizes(name, values, always=name == "activations")
    for name, title in (("gathered", "gathered parameters"), ("buckets", "DeepSpeed's buckets")):
        sizes(title, [getattr(memory, name) for memory in memories])
    sizes("together", [memory.device for memory in memories], always=True)
    sizes("in main memory", [memory.host for memory in memories])
    limit = cluster.memory_share * cluster.gpu_memory
    row(f"  fits into {limit / 2**30:.1f}", ["yes" if phase.fits else "NO" for phase in phases])
    row("sent per rank and step, GiB", [""] * len(phases))
    for name in sorted({name for phase in phases for name in phase.sent}):
        row(f"  {name}", [f"{phase.sent.get(name, 0) / 2**30:.3f}" for phase in phases])
    row("TFLOP per GPU and step", [""] * len(phases))
    for name, flops in (
        ("of the model", [phase.model_flops / 1e12 for phase in phases]),
        ("executed", [phase.executed_flops / 1e12 for phase in phases]),
    ):
        row(f"  {name}", [f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in flops])
    row("seconds per step", [f"{phase.seconds_per_step:.2f}" for phase in phases])
    for name in phases[0].seconds:
        values = [phase.seconds[name] for phase in phases]
        if any(value >= 0.005 for value in values):
            row(f"  {name}", [f"{value:.2f}" for value in values])
    hidden = [phase.hidden_seconds for phase in phases]
    if any(value >= 0.005 for value in hidden):
        row("data, behind the computation", [f"{value:.2f}" for value in hidden])
    row("model FLOP utilisation", [f"{phase.mfu:.1%}" for phase in phases])
    row("tokens per second", [f"{phase.tokens_per_second:,.0f}" for phase in phases])
    row("steps", [f"{phase.steps:,}" for phase in phases])
    row("days", [f"{phase.total_seconds / 86400:,.1f}" for phase in phases])
    print_table(table)


def print_search(found: "SearchResult") -> None:
    """The fastest layouts, and why others are not among them."""
    print(f"tried    {found.tried} layouts, {len(found.plans)} fit")
    for reason, count in found.dropped.most_common():
        print(f"         {count:4} dropped: {reason}")
    if not found.plans:
        return
    labels = [phase.label for phase in found.plans[0].phases]
    several = len(labels) > 1
    table = [
        ["", "tensor", "pipeline", "sequence", "data", "ZeRO", "recompute", "bands", "GiB", "s/step", "MFU", "days"]
    ]
    for number, plan in enumerate(found.plans[:SHOWN], 1):
        axes, phases = plan.axes, plan.phases
        table.append(
            [
                str(number),
                *map(str, (axes.tensor, axes.pipeline, axes.sequence, axes.data, plan.zero)),
                "yes" if plan.checkpointing else "no",
                "/".join(str(phase.bands) for phase in phases),
                f"{max(phase.memory.device for phase in phases) / 2**30:.1f}",
                "/".join(f"{phase.seconds_per_step:.3g}" for phase in phases),
                "/".join(f"{phase.mfu:.0%}" for phase in phases),
                f"{plan.total_seconds / 86400:,.2f}",
            ]
        )
    print(f"\nfastest over all phases{' (' + ' / '.join(labels) + ')' if several else ''}; memory of the fullest")
    print_table(table)
    best = found.plans[0]
    print(f"\nthe first one: {overrides(best)}; zero_optimization.stage {best.zero}")


def overrides(plan: "Plan") -> str:
    """A plan as overrides of the run's config."""
    axes = plan.axes
    texts = [f"parallel.{name}={getattr(axes, name)}" for name in ("tensor", "pipeline", "sequence")]
    texts.append(f"parallel.activation_checkpointing={str(plan.checkpointing).lower()}")
    texts += [f"phases.{number}.bands={phase.bands}" for number, phase in enumerate(plan.phases)]
    return " ".join(texts)


def describe(plan: "Plan") -> str:
    """The layout in words."""
    return f"{plan.axes}, ZeRO {plan.zero}" + (", activation checkpointing" if plan.checkpointing else "")


def plan_values(plan: "Plan") -> dict[str, Any]:
    """A plan for JSON."""
    return {**dataclasses.asdict(plan), "overrides": overrides(plan), "phases": [phase_values(p) for p in plan.phases]}


def phase_values(phase: "PhasePlan") -> dict[str, Any]:
    """A phase for JSON."""
    return {**dataclasses.asdict(phase), "memory": {**dataclasses.asdict(phase.memory), "device": phase.memory.device}}


def print_table(table: list[list[str]]) -> None:
    """Columns aligned, the first to the left."""
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    for row in table:
        cells = [text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True)]
        print("  ".join([row[0].ljust(widths[0]), *cells]).rstrip())


if __name__ == "__main__":
    sys.exit(run_command(main))
