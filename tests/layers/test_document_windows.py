"""Memory attention of sequences with several documents, such as padding in front, against dense scores and a mask."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megayoco.config import CrossBatchConfig, ModelConfig
from megayoco.layers.context import Positions
from megayoco.layers.linear import Builder
from megayoco.layers.memory_attention import MemoryAttention
from megayoco.model.blocks import MIXERS
from megayoco.model.decoder import build_decoder
from megayoco.model.parameters import canonical_parameters
from tests.layers.memory_reference import rotate

SHAPE: dict[str, Any] = dict(dim=16, hidden_dim=12, heads=4, kv_heads=2, vocab_size=24, layers=3, pattern="llama")
MODEL = ModelConfig(**SHAPE, memory_layers=(1,), memory_window=4)
CPU, W = torch.device("cpu"), 4


def in_windows(x: Tensor) -> Tensor:
    """(B, N, H, K), each window rotated from place 0 on."""
    windows = [torch.cat([rotate(part[None], 1e4) for part in window]) for window in x.split(W, 1)]
    return torch.cat(windows, 1)


def dense(mixer: MemoryAttention, x: Tensor, starts: Tensor) -> Tensor:
    """Query i meets key j of its own document: of its window rotated, of earlier windows as it is."""
    (B, N), K = x.shape[:2], mixer.head_dim
    q, k, v = ((x @ proj.weight.T).view(B, N, -1, K) for proj in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], 2) for t in (k, v))
    i, j = torch.arange(N)[:, None], torch.arange(N)[None]
    same = (starts[:, :, None] == starts[:, None, :])[:, None]
    local = same & (i // W == j // W) & (j <= i)
    memory = same & (j // W < i // W) & torch.tensor(mixer.remembers)
    q, rotated = in_windows(q), in_windows(k)
    near, far = (torch.einsum("bihk,bjhk->bhij", q, keys) for keys in (rotated, k))
    scores = (torch.where(local, near, far) / math.sqrt(K)).masked_fill(~(local | memory), -torch.inf)
    y = torch.einsum("bhij,bjhk->bihk", scores.softmax(-1), v)
    return y.flatten(2) @ mixer.out_proj.weight.T


def starts_of(rows: list[list[int]], length: int) -> Tensor:
    """Where the document of each token begins, from where documents begin."""
    return torch.tensor([[max(b for b in begins if b <= i) for i in range(length)] for begins in rows])


def compare(got: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", ["memory", "block"])
@pytest.mark.parametrize(
    ("rows", "length"),
    [
        ([[0, 5], [0, 8], [0, 1]], 16),  # padding in front that ends in a window, at its border, after one token
        ([[0], [0, 15], [0, 3]], 16),  # none, and an example of one token
        ([[0, 2, 3, 11], [0, 4, 8]], 14),  # documents
    ],
)
def test_documents_do_not_see_one_another_in_one_grid_of_windows(kind: str, rows: list[list[int]], length: int) -> None:
    mixer: Any = MIXERS[kind](MODEL, "mixer", Builder(seed=1, dtype=torch.float64))
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter *= 12
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(len(rows), length, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    x.requires_grad_()
    starts = starts_of(rows, length)
    positions = Positions.of_chunk(0, length, CPU, starts)
    empty = mixer.empty_context(len(rows), torch.float64, CPU)
    results = []
    for y in (mixer(x, positions, empty)[0], dense(mixer, x, starts)):
        results.append([y, *torch.autograd.grad((y * weight).sum(), [x, *mixer.parameters()])])
    compare(*results)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_stands_in_front_of_an_example_is_not_seen(checkpointing: bool) -> None:
    """Loss and gradients of padded rows do not depend on the ids of the padding, and of rows padded by whole windows
    not on the padding at all."""
    model = build_decoder(MODEL, None, dtype=torch.float64, activation_checkpointing=checkpointing)
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(1, 24, (3, 12), generator=generator)
    padding = [3, 4, 8]
    targets = tokens.roll(-1, 1)
    for row, p in enumerate(padding):
        targets[row, :p], targets[row, -1] = -100, -100
    starts = starts_of([[0, p] for p in padding], 12)

    def of(*batches: tuple[Tensor, ...]) -> list[Tensor]:
        loss = torch.stack([model(*batch)[0] for batch in batches]).sum()
        parameters = canonical_parameters(model)
        return [loss, *torch.autograd.grad(loss, [parameters[name] for name in sorted(parameters)])]

    filled = tokens.clone()
    for row, p in enumerate(padding):
        filled[row, :p] = 0
    compare(of((tokens, targets, starts)), of((filled, targets, starts)))
    alone = [(tokens[r : r + 1, p:], targets[r : r + 1, p:]) for r, p in ((1, 4), (2, 8))]
    compare(of((tokens[1:], targets[1:], starts[1:])), of(*alone))
    moved = of((tokens[:1], targets[:1], starts[:1]))[0]
    straight = of((tokens[:1, 3:], targets[:1, 3:]))[0]
    assert moved.item() != pytest.approx(straight.item(), rel=1e-9)  # other windows: the purpose of random padding


def test_what_cannot_be_is_refused() -> None:
    mixer: Any = MIXERS["memory"](MODEL, "mixer", Builder(seed=1, dtype=torch.float64))
    x, starts = torch.zeros(1, 8, 16, dtype=torch.float64), starts_of([[0, 3]], 8)
    empty = mixer.empty_context(1, torch.float64, CPU)
    right = mixer(x, Positions.of_chunk(0, 8, CPU), empty)[1]
    with pytest.raises(ValueError, match="no context before them"):
        mixer(x, Positions.of_chunk(0, 8, CPU, starts), right)
    with pytest.raises(ValueError, match="from their first token on"):
        mixer(x, Positions.of_chunk(8, 8, CPU, starts + 8), empty)
    mixer.cross_batch = CrossBatchConfig(range=1)
    with pytest.raises(ValueError, match="cannot keep documents apart"):
        mixer(x, Positions.of_chunk(0, 8, CPU, starts), empty)
