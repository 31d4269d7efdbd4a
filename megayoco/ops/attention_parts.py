"""Attention cut into rectangles of scores: which ones, and their forward and backward one after the other.

Shapes: B batch, R queries (rows), S keys, H query heads, G key-value heads, K head dim, W window.
        Row r of batch entry b sees the keys first_key[b, r] .. index[b, r]; both ascend along r.
Parts:  every visible (row, key) lies in exactly one part, and every row of a part sees a key of it: kernels disagree
        about rows that see none. Parts that share rows are merged by their log-sum-exp; the backward of every part is
        given the *merged* output and log-sum-exp, which makes its share of dq, dk and dv exact. So the backward may cut
        the parts further than the forward did, which bounds its temporaries. The order of the parts is fixed.
Source: FlashAttention-2, arXiv 2307.08691.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megayoco.ops.attention_tiles import Tile, tile_backward, tile_forward

MASKED_ROWS = 128
"""Rows of a part that needs a mask: smaller parts cost calls, larger ones compute more masked scores."""
MASKED_KEYS = 2048
"""Keys that a part with a mask may span (unless a window asks for more): its mask must not grow with the sequence."""
CUDNN_KEYS = 1 << 16
"""Keys of a part in cuDNN's forward, which plans every new shape: slices of one length, long beside a merge's cost."""


class Part(NamedTuple):
    """A rectangle of scores: some rows against some keys."""

    rows: slice
    keys: slice
    kind: str
    """"all": no mask. "causal": bottom-right. "masked": a mask from the rows' indices, the window and documents."""

    batch: slice = slice(None)
    merge: bool = False
    """An earlier part has written these rows; the two are merged by their log-sum-exp."""


@dataclass(frozen=True)
class Rows:
    """Where the queries stand among the S keys."""

    keys: int
    """S."""

    index: Tensor | None = None
    """(B, R) int64, the last key that each row sees. None: the rows are the last R keys."""

    first_key: Tensor | None = None
    """(B, R) int64, the first key that each row sees, at most its index. None: key 0."""


def plan_parts(queries: int, rows: Rows) -> list[Part]:
    """The parts of R = `queries` rows without a window. Waits for the device where there are indices or documents."""
    R, S = queries, rows.keys
    if rows.index is None and rows.first_key is None:
        square = Part(slice(0, R), slice(S - R, S), "causal")
        return [square, Part(slice(0, R), slice(0, S - R), "all", merge=True)] if S > R else [square]
    index, first_key = (None if x is None else x.cpu() for x in (rows.index, rows.first_key))
    _check_rows(index, first_key, queries, S)
    if all(x is None or bool((x == x[:1]).all()) for x in (index, first_key)):
        entries = [(0, slice(None))]  # one plan serves the whole batch
    else:
        given = index if index is not None else first_key
        assert given is not None
        entries = [(b, slice(b, b + 1)) for b in range(given.shape[0])]
    parts: list[Part] = []
    for b, batch in entries:
        last = range(S - R, S) if index is None else index[b].tolist()
        first = torch.zeros(R, dtype=torch.int64) if first_key is None else first_key[b]
        parts += [part._replace(batch=batch) for part in _documents(last, first)]
    return parts


def _check_rows(index: Tensor | None, first_key: Tensor | None, queries: int, keys: int) -> None:
    """The values of the indices, on the CPU."""
    last = torch.arange(keys - queries, keys)[None] if index is None else index
    if index is not None and (bool((index.diff(dim=1) < 0).any()) or int(index.min()) < 0 or int(index.max()) >= keys):
        raise ValueError(f"the indices of queries must not descend and must lie in 0 .. {keys - 1}")
    if first_key is not None:
        if bool((first_key.diff(dim=1) < 0).any()) or int(first_key.min()) < 0:
            raise ValueError("the first keys of queries must not descend and must be at least 0")
        if bool((first_key > last).any()):
            raise ValueError("a query's first key must not lie behind its own")


def _documents(index: Sequence[int], first_key: Tensor) -> list[Part]:
    """Every document by itself; documents of few rows that lie close share masked parts, to save calls."""
    parts: list[Part] = []
    starts, lengths = (x.tolist() for x in first_key.unique_consecutive(return_counts=True))
    row, shared, shared_key = 0, 0, 0  # the document at hand; first row and key of the short documents collected so far
    for start, length in zip(starts, lengths, strict=True):
        end = row + length
        short = length < MASKED_ROWS and index[end - 1] - start < MASKED_KEYS
        if shared < row and (not short or end - shared > MASKED_ROWS or index[end - 1] - shared_key >= MASKED_KEYS):
            parts.append(Part(slice(shared, row), slice(shared_key, index[row - 1] + 1), "masked"))
            shared = row
        if not short:
            parts += _staircase(index, row, end, start)
            shared = end
        elif shared == row:
            shared_key = start
        row = end
    if shared < row:
        parts.append(Part(slice(shared, row), slice(shared_key, index[row - 1] + 1), "masked"))
    return parts


def _staircase(index: Sequence[int], row: int, end: int, key: int, merge: bool = False) -> list[Part]:
    """Rows row .. end-1, of which each sees the keys from `key` to its own index.

    First the rectangle that all of them see, as tall as can be; then what is left, as a causal square where the rows
    are neighbours, under a mask where it is small, else by halves.
    """
    rows, lowest, highest = slice(row, end), index[row], index[end - 1]
    if lowest == highest:
        return [Part(rows, slice(key, highest + 1), "all", merge=merge)]
    neighbours = highest - lowest == end - row - 1 and all(index[i + 1] - index[i] == 1 for i in range(row, end - 1))
    parts: list[Part] = []
    if (neighbours and lowest > key) or lowest - key >= MASKED_ROWS:
        parts.append(Part(rows, slice(key, lowest), "all", merge=merge))
        key, merge = lowest, True
    if neighbours:
        parts.append(Part(rows, slice(key, highest + 1), "causal", merge=merge))
    elif end - row <= MASKED_ROWS and highest - key < MASKED_KEYS:
        parts.append(Part(rows, slice(key, highest + 1), "masked", merge=merge))
    else:
        middle = (row + end) // 2
        parts += _staircase(index, row, middle, key, merge) + _staircase(index, middle, end, key, merge)
    return parts


def window_parts(queries: int, rows: Rows, window: int) -> list[Part]:
    """The parts of the last R = `queries` keys with a window: blocks of rows against all keys that one of them sees."""
    # a block of n rows computes n + window - 1 keys for each: large enough for the kernel, small beside the window
    block = min(max(window // 4, MASKED_ROWS // 2), 2 * MASKED_ROWS)
    first_key = None if rows.first_key is None else rows.first_key.amin(0).cpu()
    offset, parts = rows.keys - queries, []
    for row in range(0, queries, block):
        end = min(row + block, queries)
        key = max(offset + row - window + 1, 0)
        if first_key is not None:
            key = max(key, int(first_key[row:end].min()))
        parts.append(Part(slice(row, end), slice(key, offset + end), "masked"))
    return parts


def cut_parts(parts: list[Part], most_rows: int | None, most_keys: int | None) -> list[Part]:
    """The same scores in parts of at most so many rows and keys, but for masked parts and causal ones that are not
    square."""
    cut: list[Part] = []
    for part in parts:
        rows, keys = part.rows, part.keys
        R, S = rows.stop - rows.start, keys.stop - keys.start
        step_rows, step_keys = min(most_rows or R, R), min(most_keys or S, S)
        fits = step_rows == R and step_keys == S
        if fits or part.kind == "masked" or (part.kind == "causal" and R != S):
            cut.append(part)
        elif part.kind == "all":
            for row in range(rows.start, rows.stop, step_rows):
                for key in range(keys.start, keys.stop, step_keys):
                    at = slice(row, min(row + step_rows, rows.stop)), slice(key, min(key + step_keys, keys.stop))
                    cut.append(Part(*at, "all", part.batch, part.merge or key > keys.start))
        else:
            step = min(step_rows, step_keys)
            for i in range(0, R, step):
                end = min(i + step, R)
                square = slice(rows.start + i, rows.start + end), slice(keys.start + i, keys.start + end)
                cut.append(Part(*square, "causal", part.batch, part.merge or i > 0))
                below = Part(slice(rows.start + end, rows.stop), square[1], "all", part.batch, part.merge or i > 0)
                if end < R:
                    cut += cut_parts([below], most_rows, most_keys)
    return cut


def forward_by_parts(
    q: Tensor, k: Tensor, v: Tensor, rows: Rows, *, scale: float, window: int | None, parts: list[Part], backend: str
) -> tuple[Tensor, Tensor]:
    """(out (B, R, H, K) in q's dtype, lse (B, H, R) in fp32 or wider), merged in fp32 or wider."""
    B, R, H, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    parts = cut_parts(parts, *_limits(backend, CUDNN_KEYS if "cudnn" in backend else None))
    if len(parts) == 1:  # then it holds every row
        tile = _tile(parts[0], R, rows, scale, window, q)
        keys = parts[0].keys
        out, lse = tile_forward(q, k[:, keys], v[:, keys], tile, backend)
        return out, lse.to(wide)
    out_dtype = wide if any(part.merge for part in parts) else q.dtype
    out = torch.empty(q.shape, dtype=out_dtype, device=q.device)
    lse_BHR = torch.empty((B, H, R), dtype=wide, device=q.device)
    for part in parts:
        at, at_keys = (part.batch, part.rows), (part.batch, part.keys)
        tile = _tile(part, R, rows, scale, window, q)
        out_part, lse = tile_forward(q[at], k[at_keys], v[at_keys], tile, backend)
        lse = lse.to(wide)
        if part.merge:
            before = lse_BHR[part.batch, :, part.rows]
            merged = torch.logaddexp(before, lse)
            weight, weight_part = ((x - merged).exp().transpose(1, 2)[..., None] for x in (before, lse))
            out[at] *= weight
            out[at] += weight_part * out_part
            lse = merged
        else:
            out[at] = out_part
        lse_BHR[part.batch, :, part.rows] = lse
    return out.to(q.dtype), lse_BHR


def backward_by_parts(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dk: Tensor,
    dv: Tensor,
    rows: Rows,
    *,
    scale: float,
    window: int | None,
    parts: list[Part],
    backend: str,
    keys_per_slice: int | None = None,
) -> Tensor:
    """Returns dq (B, R, H, K) in q's dtype; *adds* to dk and dv (B, S, G, K), fp32 or wider.

    out and lse are those of forward_by_parts. Unmasked parts are cut to keys_per_slice: so long are the gradients of
    keys and values that exist at a time.
    """
    R = q.shape[1]
    parts = cut_parts(parts, *_limits(backend, keys_per_slice))
    # parts overlap, and bf16 sums of many parts would lose digits
    dq = torch.zeros(q.shape, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    for part in parts:
        at, at_keys = (part.batch, part.rows), (part.batch, part.keys)
        tile = _tile(part, R, rows, scale, window, q)
        lse_part = lse[part.batch, :, part.rows]
        dq_part, dk_part, dv_part = tile_backward(
            dout[at], q[at], k[at_keys], v[at_keys], out[at], lse_part, tile, backend
        )
        dq[at] += dq_part
        dk[at_keys] += dk_part
        dv[at_keys] += dv_part
        del dq_part, dk_part, dv_part  # or two slices' gradients would exist at a time
    return dq.to(q.dtype)


def dense_heads(x: Tensor) -> Tensor:
    """x with the elements of a head as neighbours: kernels read it so without asking for strides (those of the gradient
    of a sum are 0)."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _limits(backend: str, keys: int | None) -> tuple[int | None, int | None]:
    """Rows and keys of a part, None for any number."""
    if backend == "math":  # it writes its scores down
        return MASKED_ROWS, min(keys or MASKED_KEYS, MASKED_KEYS)
    return None, keys


def _tile(part: Part, queries: int, rows: Rows, scale: float, window: int | None, like: Tensor) -> Tile:
    if part.kind != "masked":
        causal = part.kind == "causal"
        return Tile(scale, causal, window if causal else None)
    if rows.index is None:
        offset = rows.keys - queries
        index = torch.arange(offset + part.rows.start, offset + part.rows.stop, device=like.device)[None, None, :, None]
    else:
        index = rows.index[part.batch, None, part.rows, None]
    key = torch.arange(part.keys.start, part.keys.stop, device=like.device)
    hidden = key > index
    if window is not None:
        hidden |= key <= index - window
    if rows.first_key is not None:
        hidden = hidden | (key < rows.first_key[part.batch, None, part.rows, None])
    mask = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(hidden, -torch.inf)
    return Tile(scale, mask=mask)
