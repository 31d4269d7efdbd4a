"""The sequence axis against one process: what each rank finds left of its chunk, and the gradients that travel back."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from megayoco.config import ModelConfig, ParallelConfig
from megayoco.ops.key_values import KeyValues
from megayoco.ops.retention import RetentionState, combine, empty_state
from megayoco.parallel.sequence import SequenceAxis, own_chunks
from megayoco.parallel.topology import build_topology
from megayoco.traffic import TRAFFIC
from tests.workers import Workers

B, HEADS, DIM = 2, 2, 3
MODEL = ModelConfig(dim=8, layers=2, hidden_dim=8, heads=2, vocab_size=8)

# ranks, bands, tokens of a chunk, reach: within a neighbour, exactly one, several hops, more than a whole band, more
# than the sequence, and nothing at all
HALOS = [
    (ranks, bands, *chunk)
    for ranks, bands in ((2, 1), (2, 3), (4, 1), (4, 2), (3, 4))
    for chunk in ((5, 2), (4, 4), (3, 5), (2, 7), (1, 3), (2, 40), (3, 0))
]
WORLDS = (2, 3, 4)


def whole(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def axis_of(ranks: int) -> SequenceAxis:
    axis = SequenceAxis.of(build_topology(ParallelConfig(sequence=ranks), MODEL))
    assert axis is not None
    return axis


def chunks_of(axis: SequenceAxis, bands: int, x: Tensor) -> list[Tensor]:
    """This rank's chunk of every band of (B, N, ...)."""
    return list(x.unflatten(1, (bands, axis.ranks, -1))[:, :, axis.rank].unbind(1))


def halos(ranks: int, cases: list[tuple[int, ...]]) -> list[Any]:
    axis, results = axis_of(ranks), []
    for _, bands, length, reach in cases:
        N = bands * ranks * length
        x = whole(0, B, N, 2, HEADS, DIM)
        own = [chunk.clone().requires_grad_() for chunk in chunks_of(axis, bands, x)]
        carry = KeyValues.empty(B, HEADS, DIM, torch.float64, torch.device("cpu"))
        lefts, sizes, loss = [], [], torch.zeros((), dtype=torch.float64)
        for band, chunk in enumerate(own):
            left, carry = axis.halo(carry, KeyValues(*chunk.unbind(2)), reach)
            seen = torch.stack(left, 2)
            # a weight of its own for every pair of reader and token; transposed: the gradient is not contiguous
            weight = whole(1 + band * ranks + axis.rank, HEADS, DIM, 2, B, N).permute(3, 4, 2, 0, 1)
            loss = loss + (seen * weight[:, : seen.shape[1]]).sum()
            lefts.append(seen.detach())
            sizes.append(carry.key.shape[1])
        gradients = torch.autograd.grad(loss, own)
        results.append((lefts, sizes, gradients))
    return results


@pytest.mark.parametrize("ranks", WORLDS)
def test_halo_is_what_stands_left_of_the_chunk_and_gradients_return_to_their_tokens(
    workers: Workers, ranks: int
) -> None:
    cases = [case for case in HALOS if case[0] == ranks]
    results = workers.run(halos, ranks, cases, world=ranks)
    for number, (_, bands, length, reach) in enumerate(cases):
        N = bands * ranks * length
        x = whole(0, B, N, 2, HEADS, DIM).requires_grad_()
        loss = torch.zeros((), dtype=torch.float64)
        expected = {}
        for chunk in range(bands * ranks):
            start = chunk * length
            left = x[:, max(start - reach, 0) : start]
            weight = whole(1 + chunk, HEADS, DIM, 2, B, N).permute(3, 4, 2, 0, 1)
            loss = loss + (left * weight[:, : left.shape[1]]).sum()
            expected[divmod(chunk, ranks)] = left.detach()
        (gradient,) = torch.autograd.grad(loss, x)
        sizes = [results[rank][number][1] for rank in range(ranks)]
        assert all(other == sizes[0] for other in sizes), "carries differ in size"
        assert all(size <= reach for size in sizes[0]), "a carry keeps more than anyone may ask for"
        for (band, rank), left in expected.items():
            lefts, _, gradients = results[rank][number]
            torch.testing.assert_close(lefts[band], left, rtol=0, atol=0)
            start = (band * ranks + rank) * length
            torch.testing.assert_close(gradients[band], gradient[:, start : start + length], rtol=1e-13, atol=1e-13)


def states(seed: int, chunks: int) -> tuple[Tensor, Tensor]:
    """States (B, chunks, h, K, K) and log-decays (B, chunks, h) of chunks, some with a document border inside."""
    decay = -whole(seed + 1, B, chunks, HEADS).abs()
    decay[0, 1] = decay[1, 2] = -torch.inf
    return whole(seed, B, chunks, HEADS, DIM, DIM), decay


def prefixes(ranks: int, bands: int) -> Any:
    axis = axis_of(ranks)
    state, decay = states(0, ranks * bands)
    own = [(s.clone().requires_grad_(), d.clone().requires_grad_()) for s, d in zip(
        (x.squeeze(1) for x in chunks_of(axis, bands, state)),
        (x.squeeze(1) for x in chunks_of(axis, bands, decay)), strict=True
    )]  # fmt: skip
    carry = empty_state(B, HEADS, DIM, dtype=torch.float64)
    lefts, loss = [], torch.zeros((), dtype=torch.float64)
    for band, local in enumerate(own):
        left, carry = axis.prefix(carry, RetentionState(*local))
        loss = loss + (left.state * whole(9 + band * ranks + axis.rank, B, HEADS, DIM, DIM)).sum()
        lefts.append(left.state.detach())
    gradients = torch.autograd.grad(loss, [x for local in own for x in local])
    return lefts, carry.state.detach(), [*zip(gradients[::2], gradients[1::2], strict=True)]


@pytest.mark.parametrize(("ranks", "bands"), [(2, 2), (2, 3), (4, 1), (4, 2), (3, 3)])
def test_prefix_is_the_state_before_the_chunk_and_gradients_of_all_later_ones_return(
    workers: Workers, ranks: int, bands: int
) -> None:
    """A gradient of a replicated carry is one rank's part: counted twice or not at all, several bands show it."""
    results = workers.run(prefixes, ranks, bands, world=ranks)
    state, decay = states(0, ranks * bands)
    leaves = [
        (state[:, c].clone().requires_grad_(), decay[:, c].clone().requires_grad_()) for c in range(ranks * bands)
    ]
    left, loss = empty_state(B, HEADS, DIM, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for chunk, leaf in enumerate(leaves):
        band, rank = divmod(chunk, ranks)
        torch.testing.assert_close(results[rank][0][band], left.state.detach(), rtol=1e-13, atol=1e-13)
        loss = loss + (left.state * whole(9 + chunk, B, HEADS, DIM, DIM)).sum()
        left = combine(left, RetentionState(*leaf))
    gradients = torch.autograd.grad(loss, [x for leaf in leaves for x in leaf], allow_unused=True)
    for rank in range(ranks):
        torch.testing.assert_close(results[rank][1], left.state.detach(), rtol=1e-13, atol=1e-13)
    for chunk in range(ranks * bands):
        band, rank = divmod(chunk, ranks)
        for got, expected in zip(results[rank][2][band], gradients[2 * chunk : 2 * chunk + 2], strict=True):
            expected = torch.zeros_like(got) if expected is None else expected
            torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)


def gathers(ranks: int, batch: int, dtype: torch.dtype) -> Any:
    axis, C = axis_of(ranks), 5
    x = whole(0, batch, ranks * C, 2, HEADS, DIM, dtype=dtype)
    (own,) = chunks_of(axis, 1, x)
    own = own.clone().requires_grad_()
    TRAFFIC.take()
    out = axis.gather(KeyValues(*own.unbind(2)), "kv")
    weight = whole(1 + axis.rank, HEADS, DIM, batch, ranks * C, 2, dtype=dtype).permute(2, 3, 4, 0, 1)
    (torch.stack(out, 2) * weight).sum().backward()
    counted = TRAFFIC.take()
    # the same for a walk over bands: into slices of larger tensors, and back
    store = [torch.full((batch, 3 * ranks * C, HEADS, DIM), torch.nan, dtype=dtype) for _ in range(2)]
    band = slice(ranks * C, 2 * ranks * C)
    axis.gather_into(KeyValues(*own.unbind(2)), *(part[:, band] for part in store)).wait()
    sums = axis.reduce_scatter(*weight.unbind(2))
    return torch.stack(out, 2).detach(), own.grad, torch.stack(store, 2), torch.stack(sums, 2), counted


@pytest.mark.parametrize(
    ("ranks", "batch", "dtype"), [(2, 1, torch.float64), (4, 2, torch.bfloat16), (3, 1, torch.bfloat16)]
)
def test_gather_is_all_chunks_in_order_and_its_adjoint_sums_in_fp32(
    workers: Workers, ranks: int, batch: int, dtype: torch.dtype
) -> None:
    C = 5
    x = whole(0, batch, ranks * C, 2, HEADS, DIM, dtype=dtype)
    weights = [
        whole(1 + rank, HEADS, DIM, batch, ranks * C, 2, dtype=dtype).permute(2, 3, 4, 0, 1) for rank in range(ranks)
    ]
    wide = torch.promote_types(dtype, torch.float32)
    total = sum(weight.to(wide) for weight in weights)
    assert isinstance(total, Tensor)
    for rank, (out, gradient, store, sums, counted) in enumerate(
        workers.run(gathers, ranks, batch, dtype, world=ranks)
    ):
        own = slice(rank * C, (rank + 1) * C)
        assert torch.equal(out, x)
        assert sums.dtype == wide
        torch.testing.assert_close(sums, total[:, own], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(gradient, total[:, own].to(dtype), rtol=1e-6, atol=1e-6)
        assert torch.equal(store[:, ranks * C : 2 * ranks * C], x)
        assert store[:, : ranks * C].isnan().all()
        assert store[:, 2 * ranks * C :].isnan().all()
        size = (ranks - 1) * 2 * batch * C * HEADS * DIM
        assert counted == {"sequence/kv": size * x.element_size(), "sequence/kv_gradient": size * total.element_size()}


def test_own_chunks_of_all_ranks_and_bands_are_the_sequence() -> None:
    x = torch.arange(2 * 24).view(2, 24)
    for ranks, bands in itertools.product((1, 2, 3), (1, 2, 4)):
        chunks = [own_chunks(x, rank, ranks, bands).unflatten(1, (bands, -1)) for rank in range(ranks)]
        assert torch.equal(torch.stack(chunks, 2).flatten(1), x)
        assert all(chunk.is_contiguous() for chunk in chunks)
