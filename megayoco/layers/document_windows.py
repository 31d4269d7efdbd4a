"""Memory attention of whole sequences that hold several documents, which do not see one another.

Shapes: B batch, N tokens, D model dim, W window; g key-value heads of this tensor rank, K head dim.
Windows: index // W, counted from the first token of the sequence, whatever begins there: padding in front of an example
        moves its text over the borders of windows, as in the released code for tuning LongLLaMA (arXiv 2307.03170).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from torch import Tensor

from megayoco.layers.context import KeyValues, Positions
from megayoco.ops.memory_attention import NOTHING, Segment, memory_attention
from megayoco.parallel.collectives import sum_gradient

if TYPE_CHECKING:
    from megayoco.layers.memory_attention import MemoryAttention


def has_documents(positions: Positions) -> bool:
    """Whether a row holds more than one document."""
    return positions.start is not None and bool((positions.start > 0).any())


def attend_documents(mixer: MemoryAttention, x: Tensor, positions: Positions, left: Any) -> tuple[Tensor, KeyValues]:
    """(x (B, N, D), positions, empty left) -> (y, right), as `MemoryAttention.forward`.

    Raises:
        ValueError: not the whole of each sequence, or cross-batch training, which joins sequences.
    """
    if not isinstance(left, KeyValues) or left.key.shape[1] or not positions.consecutive:
        raise ValueError("memory attention takes sequences of several documents as a whole: no context before them")
    if mixer.cross_batch is not None and mixer.training:
        raise ValueError("cross-batch training joins sequences: it cannot keep documents apart")
    positions.once("begins at 0", lambda: _check(positions))
    W, x = mixer.memory_window, sum_gradient(x, mixer.group)
    places = positions.once(("in windows", W), lambda: Positions(positions.index % W))
    q_BNhK = mixer.rotary(mixer.q_proj(x), places)
    k_BNgK, v_BNgK = (proj(x).unflatten(-1, (-1, mixer.head_dim)) for proj in (mixer.k_proj, mixer.v_proj))
    rotated = mixer.rotary(k_BNgK.flatten(2), places)
    segments = positions.once(
        ("documents", W, mixer.remembers), lambda: _segments(positions, W, remembers=mixer.remembers)
    )
    key = k_BNgK if mixer.remembers else None
    y_BNhK = memory_attention(q_BNhK, rotated, key, v_BNgK, segments, mixer.head_dim**-0.5)
    return mixer.out_proj(y_BNhK.flatten(2)), KeyValues(k_BNgK, v_BNgK)


def document_segments(
    begins: Sequence[int], length: int, window: int, *, remembers: bool, batch: slice = slice(None)
) -> list[Segment]:
    """The segments of a sequence of several documents.

    Args:
        begins: index of the first token of each document, ascending from 0.
        length: N.
        window: W; windows begin at the indices 0, W, 2 W, ...
        remembers: whether a query sees the windows of its document before its own.
        batch: the entries of the batch that this holds for.
    """
    segments = []
    for first, end in pairwise([*begins, length]):
        begin = first
        while begin < end:
            stop = min((begin // window + 1) * window, end)
            own, memory = slice(begin, stop), slice(first, begin)
            segments.append(Segment(own, own, memory if remembers and begin > first else NOTHING, batch))
            begin = stop
    return segments


def _segments(positions: Positions, window: int, *, remembers: bool) -> list[Segment]:
    assert positions.start is not None
    N, segments = positions.index.shape[-1], []
    for row, start in enumerate(positions.start):
        begins = start.unique_consecutive().tolist()
        segments += document_segments(begins, N, window, remembers=remembers, batch=slice(row, row + 1))
    return segments


def _check(positions: Positions) -> bool:
    assert positions.start is not None
    if positions.index.dim() != 1 or int(positions.index[0]) or bool((positions.start[:, 0] != 0).any()):
        raise ValueError("memory attention takes sequences of several documents from their first token on")
    return True
