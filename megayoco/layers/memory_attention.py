"""Memory attention (LongLLaMA): a causal window, and a memory of everything before it, in one softmax.

Shapes: B batch, T tokens of the chunk, S tokens so far (the chunk's included), D model dim, H query heads, G key-value
        heads, K head dim, W window; h and g count the heads of one tensor rank.
Windows: index // W in training, counted from a row's first token; in inference what `Positions.windows` says. A query
        sees the tokens of its window up to itself, keys rotated by their places in the window, and with a memory all
        tokens (or the last so many) in front of the window, keys not rotated; the query is rotated by its place in the
        window for both.
Left context: KeyValues, both (B, S - T, g, K), keys *not* rotated. With a memory of all tokens so far (or the last so
        many), which inference keeps in a KeyValueCache; without, of those of the window that the chunk begins in.
Sequence axis: chunks are whole windows. Attention inside windows then asks nobody for anything; with a memory the keys
        and values of all ranks are gathered.
Source: Focused Transformer, arXiv 2307.03170, and the released code of LongLLaMA.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megayoco.config import CrossBatchConfig
from megayoco.layers.context import KeyValues, Positions, Rotary
from megayoco.layers.document_windows import attend_documents, has_documents
from megayoco.layers.linear import Builder, ColumnLinear, Init, KeyValueLinear, RowLinear
from megayoco.ops.key_value_cache import KeyValueCache
from megayoco.ops.memory_attention import (
    Segment,
    cross_batch_segments,
    memory_attention,
    memory_attention_over_context,
    window_segments,
    windows_before,
)
from megayoco.ops.shared_memory import SharedMemory
from megayoco.ops.windows import Eviction, Windows
from megayoco.parallel.collectives import sum_gradient

Context = KeyValues | KeyValueCache | SharedMemory
"""What stands left of a chunk."""


class MemoryAttention(nn.Module):
    """(x, positions, left) -> (y, right), with `remembers` False the same without memory: attention inside windows.

    Rows that begin with padding (a document of its own in front of the row's) count windows from their first token.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int,
        memory_window: int,
        remembers: bool,
        rotary: Rotary,
        name: str,
        init: Init,
        builder: Builder,
    ) -> None:
        super().__init__()
        self.head_dim = dim // heads
        self.local_kv_heads = max(kv_heads // builder.ranks, 1)
        self.memory_window = memory_window
        self.remembers = remembers
        self.window = None if remembers else memory_window
        """Tokens that a context never exceeds; None: it grows."""
        self.rotary = rotary
        self.group = builder.group
        self.sequence = builder.sequence if remembers else None
        self.replicas = builder.replicas
        self.cross_batch: CrossBatchConfig | None = None
        """What the memory is in training (module.training); None: the windows before in the same sequence."""
        self.q_proj = ColumnLinear(dim, dim, f"{name}.q_proj", init, builder)
        self.k_proj = KeyValueLinear(dim, kv_heads, self.head_dim, f"{name}.k_proj", init, builder)
        self.v_proj = KeyValueLinear(dim, kv_heads, self.head_dim, f"{name}.v_proj", init, builder)
        self.out_proj = RowLinear(dim, dim, f"{name}.out_proj", init, builder)

    def empty_context(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> KeyValues:
        """The context of a sequence's first chunk."""
        return KeyValues.empty(batch_size, self.local_kv_heads, self.head_dim, dtype, device)

    def forward(self, x: Tensor, positions: Positions, left: Context) -> tuple[Tensor, Context]:
        """Raises ValueError for documents that are no padding, gaps between the tokens, or a context that lacks some;
        with cross-batch training for anything but whole sequences that are multiples of W."""
        if positions.once("several documents", lambda: has_documents(positions)):
            return attend_documents(self, x, positions, left)
        positions.once("begins with padding at most", lambda: _check(positions))
        x = sum_gradient(x, self.group)
        q_BTD = self.q_proj(x)
        k_BTgK, v_BTgK = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.k_proj, self.v_proj))
        own = KeyValues(k_BTgK, v_BTgK)
        if self.cross_batch is not None and self.training and isinstance(left, KeyValues):
            y_BThK = self._across_batch(q_BTD, own, positions, left, self.cross_batch)
            return self.out_proj(y_BThK.flatten(2)), own
        seen = self._seen(left, own)
        windows = self._windows(positions)
        y_BThK = self._attend(q_BTD, seen, positions, windows)
        right: Context = seen
        if not self.remembers or windows.capacity is not None:
            assert not isinstance(seen, SharedMemory)  # it has no capacity
            right = seen.last(windows.needed(self.remembers))
        return self.out_proj(y_BThK.flatten(2)), right

    def _windows(self, positions: Positions) -> Windows:
        """Of the chunk: those of its positions, or the grid."""
        W, T = self.memory_window, positions.index.shape[-1]

        def make() -> Windows:
            rule = positions.windows or Eviction(window=W, evicted=W)
            firsts: Any = positions.index[..., 0].tolist()
            return rule.windows([firsts] if isinstance(firsts, int) else firsts, T)

        return positions.once(("windows", W), make)

    def _attend(self, q_BTD: Tensor, seen: Context, positions: Positions, windows: Windows) -> Tensor:
        T, W, scale = q_BTD.shape[1], self.memory_window, self.head_dim**-0.5
        S = seen.key.shape[1] if isinstance(seen, KeyValues) else seen.tokens
        segments = positions.once(("segments", W, self.remembers, S), lambda: _segments(windows, T, S, self.remembers))
        first = min(segment.local.start for segment in segments)
        places = positions.once(("places", W, S - first), lambda: _Places.of(windows, T, S - first, positions))
        local_BThK = self.rotary(q_BTD, places.local)
        if isinstance(seen, KeyValues) and positions.windows is None:
            rotated = self.rotary(seen.key[:, first:].flatten(2), places.keys)
            key = seen.key if self.remembers else None
            return memory_attention(local_BThK, rotated, key, seen.value, segments, scale)
        key = seen.key[:, first:] if isinstance(seen, KeyValues) else seen.part(first, S).key
        rotated = self.rotary(key.flatten(2), places.keys)
        twice = self.remembers and places.queries is not places.local
        q_BThK = self.rotary(q_BTD, places.queries) if twice else local_BThK
        return memory_attention_over_context(q_BThK, local_BThK, rotated, seen, segments, scale)

    def _seen(self, left: Context, own: KeyValues) -> Context:
        """What the chunk may attend to, its own keys and values last."""
        if self.sequence is None:
            return left.combine(own)
        if not isinstance(left, KeyValues) or left.key.shape[1]:
            raise ValueError("a shared sequence with memory attention is taken at once: no context before it")
        return self.sequence.gather_seen(own, "kv")

    def _across_batch(
        self,
        q_BTD: Tensor,
        own: KeyValues,
        positions: Positions,
        left: KeyValues,
        cross_batch: CrossBatchConfig,
    ) -> Tensor:
        """Cross-batch training: the sequences of the micro-batch as one, laid end to end; with negatives of the
        neighbouring replica behind its last windows."""
        (B, T), W, axis = q_BTD.shape[:2], self.memory_window, self.sequence
        rank, ranks = (0, 1) if axis is None else (axis.rank, axis.ranks)
        positions.once(("whole", left.key.shape[1]), lambda: _check_whole(positions, left, rank * T))
        places = positions.once(("grid", W), lambda: Positions(positions.index % W))
        q_BThK = self.rotary(q_BTD, places)
        rotated = self.rotary(own.key.flatten(2), places)
        memory = _end_to_end(own if axis is None else axis.gather(own))
        before = 0
        if self.replicas is not None and cross_batch.negatives == "neighbour":
            reach = windows_before(T * ranks // W, cross_batch.range, cross_batch.stepping) * W
            negatives = self.replicas.before(memory, reach, "data/negatives")
            before, memory = negatives.key.shape[1] // W, negatives.followed_by(memory)
        if axis is not None:  # the local keys are the last ones, and this rank's windows lie apart
            memory = memory.combine(_end_to_end(own))
        segments = positions.once(
            ("cross batch", B, W, cross_batch),
            lambda: cross_batch_segments(
                B, T * ranks, W, cross_batch.range, cross_batch.stepping, before=before, rank=rank, ranks=ranks
            ),
        )
        q, rotated = (x.reshape(1, B * T, *x.shape[2:]) for x in (q_BThK, rotated))
        return memory_attention(q, rotated, *memory, segments, self.head_dim**-0.5).view_as(q_BThK)


def _check_whole(positions: Positions, left: KeyValues, first: int) -> bool:
    if left.key.shape[1] or int(positions.index.min()) != first:
        raise ValueError("cross-batch training takes whole sequences: no context, and no padding, before them")
    return True


def _end_to_end(x: KeyValues) -> KeyValues:
    """(B, N, g, K) -> (1, B N, g, K)."""
    return KeyValues(*(part.reshape(1, -1, *part.shape[2:]) for part in x))


def _check(positions: Positions) -> bool:
    if not positions.consecutive:
        raise ValueError("memory attention needs all tokens of a chunk, one after the other")
    if positions.start is not None and bool((positions.start > 0).any()):
        raise ValueError("memory attention has no document borders: data.document_mask cannot be used with it")
    return True


def _segments(windows: Windows, queries: int, keys: int, remembers: bool) -> list[Segment]:
    """Of all rows; neighbours with the same windows share theirs."""
    if len(windows.rows) == 1:
        return window_segments(windows, 0, queries, keys, remembers=remembers)
    segments, row, rows = [], 0, windows.rows
    while row < len(rows):
        end = row + 1
        while end < len(rows) and rows[end] == rows[row]:
            end += 1
        segments += window_segments(windows, row, queries, keys, remembers=remembers, batch=slice(row, end))
        row = end
    return segments


class _Places(NamedTuple):
    """What queries and local keys are rotated by."""

    queries: Positions
    """The places in their windows."""
    local: Positions
    """The same for local keys; another origin where windows overlap."""
    keys: Positions

    @staticmethod
    def of(windows: Windows, queries: int, keys: int, positions: Positions) -> _Places:
        """Those of the chunk's queries and of the last `keys` keys, which end with its own."""
        own, local, key_places = [], [], []
        for spans in windows.rows:
            first, origin = spans[0].start, spans[0].begin
            index = torch.arange(first - (keys - queries), first + queries)
            lengths = torch.tensor([span.stop - span.start for span in spans])
            begins = torch.tensor([span.begin for span in spans]).repeat_interleave(lengths)
            places = index[-queries:] - begins
            own.append(places)
            if windows.overlap:
                local.append(index[-queries:] - origin)
                key_places.append(index - origin)
            else:
                key_places.append(torch.cat([index[: keys - queries] - origin, places]))
        # of two angles only the difference counts, which must not depend on where the chunk begins
        dtype = torch.float64 if windows.overlap else torch.int64

        def made(rows: list[Tensor]) -> Positions:
            shape = (len(rows), -1) if positions.index.dim() == 2 else (-1,)
            return Positions(torch.stack(rows).view(shape).to(positions.index.device, dtype))

        found = made(own)
        several = windows.overlap and any(len(spans) > 1 for spans in windows.rows)
        return _Places(found, made(local) if several else found, made(key_places))
