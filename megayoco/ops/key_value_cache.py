"""Keys and values that grow during inference, and attention over them.

Shapes: B batch, T tokens of the chunk, S tokens so far (the chunk's included), H query heads, g key-value heads of this
        tensor rank, K head dim.
Memory: room for the tokens announced by `reserve`, then twice what is needed whenever the room is full, so appending
        costs O(1) copies per token; never the longest length that a model could read. Tokens that `last` has dropped
        give their room back when the others are copied next: half of the room at most is theirs.
Source: the narrow storage is symmetric, with one fp32 scale per token and head, as KIVI (arXiv 2402.02750) does for
        values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megayoco.ops.attention import causal_attention
from megayoco.ops.attention_tiles import Tile, tile_forward
from megayoco.ops.backends import attention_backend
from megayoco.ops.key_values import KeyValues

STORAGES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
"""Narrow dtypes of a cache, by the names that users give."""

_LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
_BLOCK = 4096
"""Tokens of a narrow cache that are widened at a time."""
_MASKED_ROWS = 256
"""Queries whose masked scores against one block exist at a time."""
_ROUND = 64
"""Room is a multiple of so many tokens."""


@dataclass(eq=False)
class _Buffer:
    """Room for (B, g, capacity, K): a head's tokens are neighbours, which decoding reads twice as fast."""

    key: Tensor
    value: Tensor
    key_scale: Tensor | None
    """(B, g, capacity, 1) fp32 for narrow storage."""
    value_scale: Tensor | None
    filled: int = 0
    """Places written; only a cache that ends here may append in place."""

    def tensors(self) -> list[Tensor]:
        return [x for x in (self.key, self.value, self.key_scale, self.value_scale) if x is not None]


class KeyValueCache:
    """A context of attention that sees everything: the tokens so far, as a value.

    `combine` gives a longer cache and leaves this one valid. The newest cache of a buffer appends in place; one that
    has been continued already is copied first, so several continuations of one prefix never see each other.
    """

    def __init__(self, buffer: _Buffer, tokens: int, dtype: torch.dtype, reserve: int = 0, dropped: int = 0) -> None:
        self._buffer = buffer
        self._reserve = reserve
        self._dropped = dropped  # places of the buffer in front of the tokens
        self.tokens = tokens
        self.dtype = dtype
        """What keys and values are computed in, whatever they are stored in."""

    @staticmethod
    def empty(
        batch_size: int,
        heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        storage: torch.dtype | None = None,
        reserve: int = 0,
    ) -> KeyValueCache:
        """No token yet.

        Args:
            batch_size, heads, head_dim: B, g, K.
            dtype: of the keys and values that will come, and of the queries.
            device: where they lie.
            storage: a dtype of `STORAGES` to keep them in; None: `dtype`.
            reserve: tokens to make room for at once, when the first come.
        """
        buffer = _allocate((batch_size, heads, 0, head_dim), storage or dtype, device)
        return KeyValueCache(buffer, 0, dtype, reserve)

    @property
    def is_narrow(self) -> bool:
        """Whether values are stored in fewer bits than they are computed in."""
        return self._buffer.key_scale is not None

    @property
    def bytes(self) -> int:
        """Bytes that the tokens so far take, without the room for more."""
        return sum(x[:, :, self._places()].numel() * x.element_size() for x in self._buffer.tensors())

    @property
    def key(self) -> Tensor:
        """(B, S, g, K), as they came; a view unless the storage is narrow."""
        return self._wide(0, self.tokens)[0].transpose(1, 2)

    @property
    def value(self) -> Tensor:
        """(B, S, g, K); a view unless the storage is narrow."""
        return self._wide(0, self.tokens)[1].transpose(1, 2)

    def part(self, start: int, end: int) -> KeyValues:
        """The tokens number start .. end - 1, both (B, end - start, g, K) in the compute dtype; views unless the
        storage is narrow."""
        key, value = self._wide(start, end)
        return KeyValues(key.transpose(1, 2), value.transpose(1, 2))

    def pieces(self, start: int, end: int) -> Iterator[KeyValues]:
        """The same one after the other: at once where they are views, else never more than 4096 tokens."""
        step = _BLOCK if self.is_narrow else max(end - start, 1)
        return (self.part(first, min(first + step, end)) for first in range(start, end, step))

    def combine(self, right: KeyValues) -> KeyValueCache:
        """These tokens, then `right`'s, both (B, T, g, K)."""
        count = self.tokens + right.key.shape[1]
        buffer, dropped = self._buffer, self._dropped
        if buffer.filled != dropped + self.tokens or buffer.key.shape[2] < dropped + count:
            buffer, dropped = self._copy(count), 0
        new = slice(dropped + self.tokens, dropped + count)
        for target, scale, x in (
            (buffer.key, buffer.key_scale, right.key),
            (buffer.value, buffer.value_scale, right.value),
        ):
            x = x.transpose(1, 2)
            if scale is not None:
                largest = _LARGEST[target.dtype]
                unit = x.float().abs().amax(-1, keepdim=True).clamp_(min=1e-12) / largest
                scale[:, :, new] = unit
                x = (x.float() / unit).clamp_(-largest, largest)
                x = x.round_() if target.dtype == torch.int8 else x
            target[:, :, new] = x.to(target.dtype)
        buffer.filled = dropped + count
        return KeyValueCache(buffer, count, self.dtype, self._reserve, dropped)

    def last(self, count: int) -> KeyValueCache:
        """The last `count` tokens, or all where there are fewer; nothing is copied."""
        dropped = max(self.tokens - count, 0)
        tokens = self.tokens - dropped
        return KeyValueCache(self._buffer, tokens, self.dtype, self._reserve, self._dropped + dropped)

    def _places(self) -> slice:
        """Where the tokens are in the buffer."""
        return slice(self._dropped, self._dropped + self.tokens)

    def _copy(self, count: int) -> _Buffer:
        """The tokens so far in a buffer with room for `count`, and more."""
        old = self._buffer
        B, g, capacity, K = old.key.shape
        if self._dropped:
            capacity = 2 * count
        elif count > capacity:
            capacity = max(2 * count if self.tokens else count, self._reserve if count <= self._reserve else 0)
        buffer = _allocate((B, g, -(-capacity // _ROUND) * _ROUND, K), old.key.dtype, old.key.device)
        for target, source in zip(buffer.tensors(), old.tensors(), strict=True):
            target[:, :, : self.tokens] = source[:, :, self._places()]
        return buffer

    def _wide(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values (B, g, end - start, K) in the compute dtype."""
        buffer, start, end = self._buffer, self._dropped + start, self._dropped + end
        key, value = buffer.key[:, :, start:end], buffer.value[:, :, start:end]
        if buffer.key_scale is None or buffer.value_scale is None:
            return key, value
        scales = buffer.key_scale[:, :, start:end], buffer.value_scale[:, :, start:end]
        key, value = ((x.float() * scale).to(self.dtype) for x, scale in zip((key, value), scales, strict=True))
        return key, value


def attention_over_cache(q: Tensor, cache: KeyValueCache, *, scale: float, first_key: Tensor | None = None) -> Tensor:
    """Softmax attention of the last T of the S cached tokens. Without gradient.

    Args:
        q: (B, T, H, K) in the cache's compute dtype, rotary applied; query head h reads head h // (H // g).
        cache: its last T tokens are the queries' own.
        scale: factor of the scores, usually K ** -0.5.
        first_key: (B, T) int64, number of the earliest token that each query may see. None: token 0.

    Returns:
        (B, T, H, K) in q's dtype. A narrow cache is widened in blocks: never more than 4096 tokens of it at once.
    """
    if cache.is_narrow:
        return _attention_in_blocks(q, cache, scale, first_key)
    key, value = cache._wide(0, cache.tokens)
    if q.shape[1] > 1:
        return causal_attention(q, key.transpose(1, 2), value.transpose(1, 2), scale=scale, first_key=first_key)
    mask = None
    if first_key is not None:
        mask = (torch.arange(cache.tokens, device=q.device) >= first_key)[:, None, None]
    # one query per head: the heads of a group are rows that see the same keys, no key is repeated for them
    rows = q.reshape(q.shape[0], key.shape[1], -1, q.shape[3])
    return F.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scale).reshape(q.shape)


def _attention_in_blocks(q: Tensor, cache: KeyValueCache, scale: float, first_key: Tensor | None) -> Tensor:
    """Block after block of keys, merged by log-sum-exp (FlashAttention-2, arXiv 2307.08691)."""
    T, S = q.shape[1], cache.tokens
    index = torch.arange(S - T, S, device=q.device).expand(q.shape[0], T)
    open_from = 0 if first_key is None else int(first_key.max())
    backend = attention_backend(q, None)
    out: Tensor | None = None
    lse = torch.empty(0)
    for start in range(0, S, _BLOCK):
        end = min(start + _BLOCK, S)
        key, value = cache._wide(start, end)
        if start >= open_from and end <= S - T + 1:
            part, part_lse = tile_forward(q, key.transpose(1, 2), value.transpose(1, 2), Tile(scale), backend)
            part, part_lse = part.to(torch.promote_types(q.dtype, torch.float32)), part_lse.transpose(1, 2)[..., None]
        else:
            rows = [slice(r, r + _MASKED_ROWS) for r in range(0, T, _MASKED_ROWS)]
            parts = [_masked(q[:, r], key, value, start, index[:, r], first_key, r, scale) for r in rows]
            part, part_lse = (torch.cat([p[i] for p in parts], 1) for i in range(2))
        if out is None:
            out, lse = part, part_lse
            continue
        merged = torch.logaddexp(lse, part_lse)
        # a row that has seen no key yet has -inf on both sides
        weights = ((x - merged).exp().nan_to_num_(0) for x in (lse, part_lse))
        out = sum(weight * x for weight, x in zip(weights, (out, part), strict=True))  # type: ignore[assignment]
        lse = merged
    assert out is not None
    return out.to(q.dtype)


def _masked(
    q: Tensor,
    key: Tensor,
    value: Tensor,
    start: int,
    index: Tensor,
    first_key: Tensor | None,
    rows: slice,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(out (B, R, H, K), lse (B, R, H, 1)), fp32 or wider, of some rows against the keys from number `start` on."""
    wide = torch.promote_types(q.dtype, torch.float32)
    B, R, H, K = q.shape
    number = torch.arange(start, start + key.shape[2], device=q.device)
    hidden = number > index[..., None]
    if first_key is not None:
        hidden = hidden | (number < first_key[:, rows, None])
    grouped = q.to(wide).reshape(B, R, key.shape[1], -1, K)
    scores = torch.einsum("brghk,bgsk->brghs", grouped, key.to(wide)) * scale
    scores = scores.masked_fill(hidden[:, :, None, None], -torch.inf)
    lse = scores.logsumexp(-1, keepdim=True)
    p = (scores - lse).exp().nan_to_num_(0)
    out = torch.einsum("brghs,bgsk->brghk", p, value.to(wide))
    return out.reshape(B, R, H, K), lse.reshape(B, R, H, 1)


def _allocate(shape: tuple[int, int, int, int], storage: torch.dtype, device: torch.device) -> _Buffer:
    narrow = storage in _LARGEST
    key, value = (torch.empty(shape, dtype=storage, device=device) for _ in range(2))
    key_scale, value_scale = (torch.empty((*shape[:3], 1), device=device) if narrow else None for _ in range(2))
    return _Buffer(key, value, key_scale, value_scale)
