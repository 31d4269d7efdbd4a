"""How many bytes a step sends: the counts of megayoco/traffic.py from the shapes alone, and those of DeepSpeed.

Counted for one rank and one micro-batch, by the names of megayoco/traffic.py. Bytes are those that the usual algorithms
put on the wire: an all-gather of n bytes per rank over P ranks n (P - 1), a reduce-scatter to n bytes the same, an
all-reduce of n bytes 2 n (P - 1) / P.

Shapes and letters: those of megayoco/train/activations.py; x = B T D w, one hidden state of this rank's tokens.

    tensor/output       x forward for the embedding and for mixer and feed-forward of every layer
    tensor/gradient     x backward for mixer and feed-forward, for shared_kv and for the head
    tensor/loss         three fp32 numbers per token
    tensor/weight_gradient   key-value projections that several ranks share
    sequence/halo       the W-1 last keys and values, per window layer and band; as much back
    sequence/state      a state per head, retention layer and band; as much back
    sequence/kv         keys and values of a full-attention or memory layer; their gradients back in fp32
    sequence/shared_kv  the shared keys and values, once per stage that has cross layers; their gradients back in fp32
    pipeline/...        hidden states, shared keys and values, four columns for document starts
    data/negatives      keys and values of a memory layer for the next replica (`cross_batch`); as much back
    data/...            per step, DeepSpeed's: gradients of this rank's parameters, and parameters after the update

Forward parts count as often as they run: recomputed layers twice (the sum of their feed-forward once), the self half of
a walk over n bands 2 - 1/n times, all of a walk in a stage without the head twice.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from megayoco.train.activations import SELF_LAYERS, StageBlocks, Work, wire_bytes

_DOCUMENT_COLUMNS = 4


def forward_runs(work: Work, blocks: StageBlocks, kind: str) -> float:
    """How often a block's forward runs in a step, recomputation by checkpointing not included."""
    if work.bands == 1 or kind == "head":
        return 1.0
    if not blocks.has_head:
        return 2.0
    if kind == "cross":
        return 1.0
    return 2.0 if work.order == "split" else 2.0 - 1 / work.bands


def is_recomputed(work: Work, kind: str) -> bool:
    """Whether checkpointing runs a layer's forward once more: with bands only in the self half."""
    return work.checkpointing and kind in (*SELF_LAYERS, *(() if work.bands > 1 else ("cross",)))


def micro_batch_volume(work: Work, blocks: StageBlocks, documents: bool = False) -> dict[str, float]:
    """Bytes that one rank of a stage sends for one micro-batch, by `group/purpose`; of the ranks of a sequence the one
    that sends most."""
    sent: defaultdict[str, float] = defaultdict(float)
    for kind in blocks.kinds:
        runs = forward_runs(work, blocks, kind)
        again = 1.0 if is_recomputed(work, kind) else 0.0
        if work.tensor > 1:
            _add_tensor(sent, work, kind, runs, again)
        if work.sequence > 1:
            _add_sequence(sent, work, kind, runs + again)
        if kind == "memory" and work.negatives:
            negatives = work.negatives * 2 * work.memory_kv_dim * work.width
            sent["data/negatives"] += (runs + again) * negatives
            sent["data/negatives_gradient"] += negatives
    if work.sequence > 1 and blocks.cross:
        own = work.batch * work.tokens * 2 * work.kv_dim * (work.sequence - 1)
        sent["sequence/shared_kv"] += own * work.width
        sent["sequence/shared_kv_gradient"] += own * work.wide
    columns = work.batch * work.tokens * _DOCUMENT_COLUMNS * work.width if documents else 0.0
    if not blocks.has_head:
        sent["pipeline/activations"] += wire_bytes(work, blocks.shared_out) + columns
    if "embedding" not in blocks.kinds:
        sent["pipeline/gradient"] += wire_bytes(work, blocks.shared_in) + columns
    return {name: count for name, count in sorted(sent.items()) if count}


def _add_tensor(sent: defaultdict[str, float], work: Work, kind: str, runs: float, again: float) -> None:
    ring = 2 * (work.tensor - 1) / work.tensor
    x = work.batch * work.tokens * work.model.dim * work.width * ring
    if kind == "embedding":
        sent["tensor/output"] += runs * x
    elif kind == "head":
        sent["tensor/gradient"] += x
        sent["tensor/loss"] += 3 * work.batch * work.tokens * work.wide * ring
    elif kind == "shared_kv":
        sent["tensor/gradient"] += x
    else:
        sent["tensor/output"] += (2 * runs + again) * x
        sent["tensor/gradient"] += 2 * x
    remembers = kind in ("memory", "block")
    kv_heads = work.model.memory_heads[1] if remembers else work.model.num_kv_heads
    replicas = work.tensor // kv_heads
    if (remembers or kind in ("shared_kv", "full")) and replicas > 1:
        weights = 2 * (work.memory_kv_dim if remembers else work.kv_dim) * work.model.dim * work.width
        sent["tensor/weight_gradient"] += work.bands * weights * 2 * (replicas - 1) / replicas


def _add_sequence(sent: defaultdict[str, float], work: Work, kind: str, runs: float) -> None:
    model, B, t, P = work.model, work.batch, work.tensor, work.sequence
    if kind == "window":
        reach, C = (model.window or 1) - 1, work.chunk
        hops = [min(C, reach - hop * C) for hop in range(-(-reach // C)) if (hop + 1) % P]
        if work.bands == 1:
            hops = hops[: P - 1]  # nothing goes on to a next band
        halo = B * sum(hops) * 2 * model.dim / t * work.width * work.bands
        sent["sequence/halo"] += runs * halo
        sent["sequence/halo_gradient"] += halo
    elif kind == "retention":
        H, K = model.num_self_heads / t, model.self_head_dim
        state = B * H * (K * K + 1) * work.wide * (P - 1) * work.bands
        sent["sequence/state"] += runs * state
        sent["sequence/state_gradient"] += state
    elif kind in ("full", "memory"):
        own = B * work.tokens * 2 * (work.memory_kv_dim if kind == "memory" else work.kv_dim) * (P - 1)
        sent["sequence/kv"] += runs * own * work.width
        sent["sequence/kv_gradient"] += own * work.wide


def step_volume(
    parameters: float, replicas: int, micro_batches: int, ds_config: dict[str, Any], width: int
) -> dict[str, float]:
    """Bytes that DeepSpeed sends per step over the ranks that hold the same parameters.

    Args:
        parameters: of this rank, before ZeRO cuts them.
        replicas: data x sequence.
        width: bytes of a number of the compute dtype.

    ZeRO 0 and 1 sum gradients once per step, 2 and 3 for every micro-batch; 1 and 2 send updated parameters to all, 3
    gathers them before forward and before backward of every micro-batch.
    """
    if replicas == 1:
        return {}
    level = ds_config.get("zero_optimization", {}).get("stage", 0)
    others = (replicas - 1) / replicas
    named = {"fp32": 4, "fp16": 2, "bf16": 2}.get(ds_config.get("communication_data_type") or "", width)
    times = micro_batches if level >= 2 else 1
    # DeepSpeed joins the reductions to the owners of a bucket's parts to one all-reduce
    sent = {"data/gradients": times * (1 if level == 3 else 2) * parameters * named * others}
    if level >= 1:
        sent["data/parameters"] = (2 * micro_batches if level == 3 else 1) * parameters * width * others
    return sent
