"""Operation counts against hand arithmetic, and against the pairs counted one by one."""

import pytest

from megayoco.config import ModelConfig
from megayoco.model import flops
from megayoco.model.flops import (
    block_flops,
    block_pairs,
    flops_per_sequence,
    forward_flops,
    training_flops_per_sequence,
    visible_pairs,
)

SHAPE = {"dim": 8, "layers": 3, "hidden_dim": 12, "heads": 4, "kv_heads": 2, "vocab_size": 10}


@pytest.mark.parametrize("window", [None, 1, 3, 7, 8, 100])
@pytest.mark.parametrize("length", [1, 2, 7, 8])
def test_visible_pairs_counted_one_by_one(length, window):
    seen = [(i, j) for i in range(length) for j in range(i + 1) if window is None or j > i - window]
    assert visible_pairs(length, window) == len(seen)


def test_llama_by_hand():
    # 5 tokens, 15 visible pairs; q, out 8 x 8, k, v 8 x 4; every visible pair is one product of 8 in q k and in p v
    mixer = 5 * 2 * (2 * 64 + 2 * 32) + 15 * 2 * (8 + 8)
    assert forward_flops(ModelConfig(**SHAPE, pattern="llama"), 5) == {
        "full": 3 * mixer,
        "feed_forward": 3 * 5 * 2 * 3 * 8 * 12,
        "head": 5 * 2 * 8 * 10,
    }


def test_yoco_with_window_by_hand():
    # queries see 1, 2, 2, 2, 2 keys
    model = ModelConfig(**SHAPE, self_mixer="window", window=2, self_layers=2)
    assert forward_flops(model, 5) == {
        "window": 2 * (5 * 2 * 4 * 64 + 9 * 2 * (8 + 8)),
        "shared_kv": 5 * 2 * 2 * 32,
        "cross": 5 * 2 * 2 * 64 + 15 * 2 * (8 + 8),
        "feed_forward": 3 * 5 * 2 * 3 * 8 * 12,
        "head": 5 * 2 * 8 * 10,
    }


def test_memory_and_windows_by_hand():
    # 5 tokens in windows of 2: the memory layer sees all 15 pairs, the others 3 + 3 + 1
    parts = forward_flops(ModelConfig(**SHAPE, pattern="llama", memory_layers=(1,), memory_window=2), 5)
    projections = 5 * 2 * (2 * 64 + 2 * 32)
    assert parts["memory"] == projections + 15 * 2 * (8 + 8)
    assert parts["block"] == 2 * (projections + 7 * 2 * (8 + 8))
    assert block_flops(ModelConfig(**SHAPE, pattern="llama", memory_layers=(1,), memory_window=2), 5)[2] == (
        parts["memory"] + parts["feed_forward"] // 3
    )
    # in a self-decoder with its own heads: as many key-value heads as query heads
    yoco = ModelConfig(**SHAPE, self_heads=2, self_layers=2, memory_layers=(1,), memory_window=2)
    assert forward_flops(yoco, 5)["memory"] == 5 * 2 * 4 * 64 + 15 * 2 * (8 + 8)


@pytest.mark.parametrize(("length", "block", "pairs"), [(6, 3, 12), (7, 3, 13), (2, 3, 3), (4, 1, 4)])
def test_pairs_within_blocks_counted_one_by_one(length, block, pairs):
    assert block_pairs(length, block) == pairs
    assert pairs == sum(i // block == j // block for i in range(length) for j in range(i + 1))


@pytest.mark.parametrize(
    ("length", "pairs", "reads", "writes"),
    [
        (3, 6, 0, 0),  # one ragged chunk: nothing crosses a border
        (4, 10, 0, 0),
        (5, 11, 1, 4),
        (10, 23, 6, 8),  # chunks of 4, 4 and 2
        (12, 30, 8, 8),
    ],
)
def test_retention_by_hand(monkeypatch, length, pairs, reads, writes):
    monkeypatch.setattr(flops, "RETENTION_CHUNK", 4)
    model = ModelConfig(**SHAPE, self_heads=2)
    projections = length * 2 * (5 * 64 + 8 * 2)
    state = (reads + writes) * 2 * 2 * 4 * 4  # two heads with a state of 4 x 4
    assert forward_flops(model, length)["retention"] == projections + pairs * 2 * (8 + 8) + state


def test_a_step_is_three_forward_passes():
    model = ModelConfig(preset="yoco-tiny")
    assert flops_per_sequence(model, 300) == sum(forward_flops(model, 300).values())
    assert training_flops_per_sequence(model, 300) == 3 * flops_per_sequence(model, 300)


def test_short_sequences_cost_two_operations_per_weight_and_token():
    model = ModelConfig(preset="llama-3b")
    matrices = model.parameter_count()["total"] - model.vocab_size * model.dim  # the embedding is a lookup
    assert flops_per_sequence(model, 1) == pytest.approx(2 * matrices, rel=1e-3)
