"""Contexts are monoids, and a fold of a mixer over any split of a sequence is one pass: values and every gradient.

Sequence parallelism, training in bands, prefill and decoding are all such folds; the drawn cases have documents, a
context before the first token, chunks of one token, and windows longer and shorter than a chunk or a document. Cross
attention makes no context: its left one is the shared keys and values up to the chunk's end.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megayoco.config import ModelConfig
from megayoco.layers.context import Positions
from megayoco.layers.linear import Builder
from megayoco.model.bands import Bands
from megayoco.model.blocks import MIXERS, build_layer
from megayoco.ops.key_values import KeyValues
from megayoco.ops.retention import RetentionState, combine

B, HEADS, DIM, WINDOW = 2, 2, 4, 4
MODEL = ModelConfig(
    dim=HEADS * DIM,
    layers=2,
    hidden_dim=4,
    heads=HEADS,
    vocab_size=4,
    self_mixer="window",
    window=WINDOW,
    memory_layers=(0,),
    memory_window=WINDOW,
)
KINDS = ("retention", "window", "full", "memory", "block", "shared_kv", "cross")


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mixer(kind: str) -> Any:
    builder = Builder(seed=1, dtype=torch.float64)
    if kind == "shared_kv":
        return build_layer(MODEL, MODEL.layer_pattern().index("shared_kv"), builder)
    return MIXERS[kind](MODEL, "mixer", builder)


@dataclass(frozen=True)
class Sequence:
    """A sequence, what precedes it, and how it is cut."""

    before: int
    """Tokens before it that the left context stands for."""
    lengths: tuple[int, ...]
    """Tokens of each chunk."""
    borders: tuple[tuple[int, ...], ...] | None
    """Where documents begin, per row, counted from the first token that the context stands for; None: one document."""

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    def starts(self) -> Tensor | None:
        if self.borders is None:
            return None
        starts = torch.zeros(B, self.tokens, dtype=torch.int64)
        for row, borders in zip(starts, self.borders, strict=True):
            for border in sorted(borders):
                row[max(border - self.before, 0) :] = border
        return starts

    def left(self, kind: str, seed: int) -> Any:
        """A context of the tokens before, a leaf."""
        if kind == "retention":
            parts = [random(seed, B, HEADS, DIM, DIM), -random(seed + 1, B, HEADS).abs()]
            return RetentionState(*(x.requires_grad_() for x in parts))
        kept = {"window": min(self.before, WINDOW - 1), "block": self.before % WINDOW}.get(kind, self.before)
        kept += self.tokens if kind == "cross" else 0
        return KeyValues(*(random(seed + i, B, kept, HEADS, DIM).requires_grad_() for i in range(2)))


@st.composite
def sequences(draw: st.DrawFn) -> Sequence:
    lengths = draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    before = draw(st.integers(0, 6))
    border = st.integers(0, before + sum(lengths) - 1)
    borders = draw(st.none() | st.tuples(*[st.lists(border, max_size=3).map(tuple)] * B))
    return Sequence(before, tuple(lengths), borders)


def fold(kind: str, module: Any, sequence: Sequence, lengths: tuple[int, ...]) -> list[Tensor]:
    """Outputs, right context and every gradient of a fold over chunks of these lengths."""
    x, starts = random(7, B, sequence.tokens, MODEL.dim).requires_grad_(), sequence.starts()
    starts = None if kind in ("memory", "block") else starts  # they have no borders
    left = context = sequence.left(kind, 8)
    outputs, first = [], 0
    for length in lengths:
        at = slice(first, first + length)
        start = None if starts is None else starts[:, at]
        positions = Positions.of_chunk(sequence.before + first, length, x.device, start)
        first += length
        if kind == "cross":
            context = left.first(sequence.before + first)
        y, context = module(x[:, at], positions, context)
        outputs.append(y)
    y = torch.cat(outputs, 1)
    results = [y, *context]
    # border-crossing decays are infinite: as values they must agree, and they have no gradient
    loss = sum((random(20 + i, *r.shape) * r.masked_fill(r.isinf(), 0)).sum() for i, r in enumerate(results))
    leaves = [x, *left, *module.parameters()]
    return [*results, *torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)]


@pytest.mark.parametrize("kind", KINDS)
def test_fold_over_any_split_is_one_pass(kind: str) -> None:
    module = mixer(kind)

    @settings(max_examples=40, deadline=None)
    @given(sequences())
    def check(sequence: Sequence) -> None:
        whole = fold(kind, module, sequence, (sequence.tokens,))
        for got, expected in zip(fold(kind, module, sequence, sequence.lengths), whole, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)

    check()


def test_positions_count_beyond_two_to_the_31() -> None:
    far = 2**31 - 2
    positions = Positions.of_chunk(
        far, 5, torch.device("cpu"), torch.tensor([[far - 3, far - 3, far + 2, far + 2, far + 4]])
    )
    assert positions.index.tolist() == [far, far + 1, far + 2, far + 3, far + 4]
    first = positions.first_in_chunk()
    assert first is not None and first.tolist() == [[-3, -3, 2, 2, 4]]
    visible = positions.first_visible(2)
    assert visible is not None and visible.tolist() == [[0, 0, 4, 4, 6]]
    some = positions.rows(torch.tensor([[0, 3]]))
    assert some.index.tolist() == [[far, far + 3]] and some.start is not None
    assert some.start.tolist() == [[far - 3, far + 2]]
    assert Bands(2**12).offset(2**12 - 1, 2**20) == (2**12 - 1) * 2**20


def combine_any(a: Any, b: Any, window: int | None) -> Any:
    if isinstance(a, RetentionState):
        return combine(a, b)
    both = a.combine(b)
    return both if window is None else both.last(window - 1)


@pytest.mark.parametrize(("kind", "window"), [("retention", None), ("full", None), ("window", 1), ("window", WINDOW)])
def test_combine_is_associative_with_an_empty_element(kind: str, window: int | None) -> None:
    empty = mixer(kind).empty_context(B, torch.float64, torch.device("cpu"))

    @settings(max_examples=40, deadline=None)
    @given(st.lists(st.integers(0, 5), min_size=3, max_size=5), st.sets(st.integers(0, 4)), st.data())
    def check(lengths: list[int], borders: set[int], data: st.DataObject) -> None:
        contexts: list[Any] = []
        for i, length in enumerate(lengths):
            if kind == "retention":
                decay = -random(2 * i, B, HEADS).abs()
                decay = torch.full_like(decay, -torch.inf) if i in borders else decay  # a document begins in this chunk
                contexts.append(RetentionState(random(2 * i + 1, B, HEADS, DIM, DIM).requires_grad_(), decay))
            else:
                tokens = KeyValues(*(random(2 * i + j, B, length, HEADS, DIM).requires_grad_() for j in range(2)))
                contexts.append(tokens if window is None else tokens.last(window - 1))
        at = data.draw(st.integers(1, len(contexts) - 1))

        def joined(parts: list[Any]) -> Any:
            return reduce(lambda a, b: combine_any(a, b, window), parts)

        expected = joined(contexts)
        leaves = [x for context in contexts for x in context if x.requires_grad]
        groupings = [
            combine_any(joined(contexts[:at]), joined(contexts[at:]), window),
            combine_any(contexts[0], joined(contexts[1:]), window),
            combine_any(empty, expected, window),
            combine_any(expected, empty, window),
        ]
        for got in groupings:
            for pair in zip(with_gradients(got, leaves), with_gradients(expected, leaves), strict=True):
                torch.testing.assert_close(*pair, rtol=1e-12, atol=1e-13)

    check()


def with_gradients(context: Any, leaves: list[Tensor]) -> list[Tensor]:
    weighted = [(random(50 + i, *x.shape) * x).sum() for i, x in enumerate(context) if x.requires_grad]
    if not weighted:  # nothing remembered
        return [*context, *map(torch.zeros_like, leaves)]
    gradients = torch.autograd.grad(sum(weighted), leaves, retain_graph=True, allow_unused=True, materialize_grads=True)  # type: ignore[arg-type]
    return [*context, *gradients]


@pytest.mark.parametrize("gate", [3.5, 5.0])
def test_a_bfloat16_state_does_not_drift_in_4096_decoded_tokens(gate):
    """Above a gate of 3.45 a decay in bf16 would round to 1 and never fade: outputs would be off by up to 140 %."""
    model = ModelConfig(dim=128, layers=2, hidden_dim=4, heads=2, vocab_size=4)
    exact, narrow = (
        MIXERS["retention"](model, "mixer", Builder(seed=1, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16)
    )
    before, decoded = 1024, 4096
    x = torch.randn(1, before + decoded, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[..., 0] = 1
    with torch.no_grad():
        narrow.gt_proj.weight.zero_()[:, 0] = gate
        for parameter, source in zip(exact.parameters(), narrow.parameters(), strict=True):
            parameter.copy_(source)
        cpu = torch.device("cpu")
        whole = Positions.of_chunk(0, before + decoded, cpu)
        expected, state = exact(x.float(), whole, exact.empty_context(1, torch.float32, cpu))
        _, context = narrow(
            x[:, :before], Positions.of_chunk(0, before, cpu), narrow.empty_context(1, torch.bfloat16, cpu)
        )
        outputs = []
        for token in range(before, before + decoded):
            y, context = narrow(x[:, token : token + 1], Positions.of_chunk(token, 1, cpu), context)
            outputs.append(y)
    got = torch.cat(outputs, 1).float()
    assert float((got - expected[:, before:]).norm() / expected[:, before:].norm()) < 0.01
    assert float((context.state - state.state).norm() / state.state.norm()) < 0.01
