"""Keys and values that grow during inference, and attention over them.

Shapes: B batch, T tokens of the chunk, S tokens so far (the chunk's included), H query heads, g key-value heads of this
        tensor rank, K head dim.
Memory: room for the tokens announced by `reserve`, then twice what is needed whenever the room is full, so appending
        costs O(1) copies per token; never the longest length that a model could read. Tokens that `last` has dropped
        give their room back when the others are copied next: about half of the room at most is theirs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from megayoco.ops.attention import causal_attention
from megayoco.ops.attention_tiles import Tile, tile_forward
from megayoco.ops.backends import attention_backend
from megayoco.ops.key_value_storage import STORAGES as STORAGES
from megayoco.ops.key_value_storage import Buffer, Place
from megayoco.ops.key_values import KeyValues

if TYPE_CHECKING:
    from megayoco.ops.memory_search import Search

_BLOCK = 4096
"""Tokens of a narrow cache, or of one on another device, that are brought to the queries at a time."""
_LONG_BLOCK = 1 << 16
"""Tokens of other keys that a single query is compared with at a time."""
_MASKED_ROWS = 256
"""Queries whose masked scores against one block exist at a time."""
_ROUND = 64
"""Room is a multiple of so many tokens."""


@dataclass(frozen=True)
class _Settings:
    """What a cache and its continuations have in common."""

    dtype: torch.dtype
    device: torch.device
    place: Place
    reserve: int
    search: Search | None


class KeyValueCache:
    """A context of attention that sees everything: the tokens so far, as a value.

    `combine` gives a longer cache and leaves this one valid. The newest cache of a buffer appends in place; one that
    has been continued already is copied first, so several continuations of one prefix never see each other. Tokens that
    were loaded (`over`) are never copied: all continuations share them.
    """

    def __init__(
        self, buffer: Buffer, tokens: int, settings: _Settings, base: Buffer | None = None, dropped: int = 0
    ) -> None:
        self._base = base
        self._begin = 0 if base is None else base.filled
        self._buffer = buffer
        self._dropped = dropped  # places in front of the tokens, in the base first
        self._settings = settings
        self.tokens = tokens

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
        place: Place | None = None,
        search: Search | None = None,
    ) -> KeyValueCache:
        """No token yet.

        Args:
            batch_size, heads, head_dim: B, g, K.
            dtype: of the keys and values that will come, and of the queries.
            device: of the queries.
            storage: a dtype of `STORAGES` to keep them in; None: `dtype`.
            reserve: tokens to make room for at once, when the first come.
            place: where they lie; None: on `device`.
            search: how memory attention chooses among the remembered keys; None: it reads all of them.
        """
        settings = _Settings(dtype, device, place or Place(device), reserve, search)
        buffer = Buffer.allocate((batch_size, heads, 0, head_dim), storage or dtype, settings.place)
        return KeyValueCache(buffer, 0, settings)

    def over(self, base: Buffer) -> KeyValueCache:
        """The tokens of `base`, which is only read, in place of this cache's none.

        Raises:
            ValueError: this cache has tokens, or keeps them in another shape, dtype or place.
        """
        own, given = ((x.shape[:2], x.shape[3], x.dtype, x.device) for x in (self._buffer.key, base.key))
        if self.tokens or own != given:
            raise ValueError(f"keys {given} do not fit a cache of {self.tokens} tokens, {own}")
        return KeyValueCache(self._buffer, base.filled, self._settings, base)

    @property
    def dtype(self) -> torch.dtype:
        """What keys and values are computed in, whatever they are stored in."""
        return self._settings.dtype

    @property
    def device(self) -> torch.device:
        """Where they are computed with, wherever they lie."""
        return self._settings.device

    @property
    def place(self) -> Place:
        """Where they lie."""
        return self._settings.place

    @property
    def search(self) -> Search | None:
        """How memory attention chooses among the remembered keys; None: it reads all of them."""
        return self._settings.search

    @property
    def batch_size(self) -> int:
        """B."""
        return self._buffer.key.shape[0]

    @property
    def heads(self) -> int:
        """g."""
        return self._buffer.key.shape[1]

    @property
    def storage(self) -> torch.dtype:
        """What keys and values are stored in."""
        return self._buffer.key.dtype

    @property
    def is_narrow(self) -> bool:
        """Whether values are stored in fewer bits than they are computed in."""
        return self._buffer.key_scale is not None

    @property
    def is_one_view(self) -> bool:
        """Whether all keys are one tensor on the device of the queries, in their dtype."""
        return len(self.spans(0, self.tokens)) == 1 and not self._in_blocks

    @property
    def bytes(self) -> int:
        """Bytes that the tokens so far take, without the room for more."""
        return sum(
            x[:, :, first:last].numel() * x.element_size()
            for buffer, first, last, _ in self.spans(0, self.tokens)
            for x in buffer.tensors()
        )

    @property
    def key(self) -> Tensor:
        """(B, S, g, K), as they came; a view where `is_one_view`."""
        return self._wide(0, self.tokens)[0].transpose(1, 2)

    @property
    def value(self) -> Tensor:
        """(B, S, g, K); a view where `is_one_view`."""
        return self._wide(0, self.tokens)[1].transpose(1, 2)

    def part(self, start: int, end: int) -> KeyValues:
        """The tokens number start .. end - 1, both (B, end - start, g, K) in the compute dtype on the queries' device;
        views where the stored numbers are that already."""
        key, value = self._wide(start, end)
        return KeyValues(key.transpose(1, 2), value.transpose(1, 2))

    def pieces(self, start: int, end: int) -> Iterator[KeyValues]:
        """The same one after the other: views as long as they can be, else never more than 4096 tokens."""
        step = _BLOCK if self._in_blocks else max(end - start, 1)
        return (self.part(first, last) for first, last in self._blocks(start, end, step))

    def key_blocks(self, start: int, end: int, step: int, batch: slice) -> Iterator[tuple[int, Tensor]]:
        """The keys number start .. end - 1 of some rows, at most `step` at a time: the number of the first, and
        (B', g, n, K) as in `part`."""
        for begin, stop in self._blocks(start, end, step):
            for buffer, first, last, offset in self.spans(begin, stop):
                yield first + offset, buffer.keys(first, last, self.dtype, batch).to(self.device)

    def gather(self, numbers: Tensor, batch: slice = slice(None)) -> KeyValues:
        """The tokens (B', g, n) int64 of the rows `batch`, both (B', g, n, K) in the compute dtype on the queries'
        device. A copy, of these alone."""
        numbers = numbers.to(self._buffer.key.device) + self._dropped
        if self._base is None:
            found = self._buffer.gather(numbers, batch, self.dtype)
        elif self._dropped + self.tokens == self._begin:
            found = self._base.gather(numbers, batch, self.dtype)
        else:
            old = self._base.gather(numbers.clamp(max=self._begin - 1), batch, self.dtype)
            new = self._buffer.gather((numbers - self._begin).clamp(min=0), batch, self.dtype)
            is_old = (numbers < self._begin)[..., None]
            found = torch.where(is_old, old[0], new[0]), torch.where(is_old, old[1], new[1])
        return KeyValues(*(x.to(self.device) for x in found))

    def spans(self, start: int, end: int) -> list[tuple[Buffer, int, int, int]]:
        """Where the tokens number start .. end - 1 lie, in their order: (buffer, its tokens first .. last - 1, what has
        to be added to their numbers there)."""
        found: list[tuple[Buffer, int, int, int]] = []
        begin, dropped = self._begin, self._dropped
        start, end = start + dropped, end + dropped
        if self._base is not None and start < begin:
            found.append((self._base, start, min(end, begin), -dropped))
        if end > begin or not found:
            found.append((self._buffer, max(start - begin, 0), max(end - begin, 0), begin - dropped))
        return found

    def combine(self, right: KeyValues) -> KeyValueCache:
        """These tokens, then `right`'s, both (B, T, g, K)."""
        own, count = self._own, right.key.shape[1]
        if self._buffer.filled != own or self._buffer.capacity < own + count:
            return self._moved(count).combine(right)
        self._buffer.write(own, right.key, right.value)
        return KeyValueCache(self._buffer, self.tokens + count, self._settings, self._base, self._dropped)

    def last(self, count: int) -> KeyValueCache:
        """The last `count` tokens, or all where there are fewer; nothing is copied."""
        tokens = min(self.tokens, count)
        dropped = self._dropped + self.tokens - tokens
        if dropped >= self._begin:
            return KeyValueCache(self._buffer, tokens, self._settings, None, dropped - self._begin)
        return KeyValueCache(self._buffer, tokens, self._settings, self._base, dropped)

    @property
    def _own(self) -> int:
        """Places of the buffer up to the last token."""
        return self._dropped + self.tokens - self._begin

    def _moved(self, count: int) -> KeyValueCache:
        """The same in a buffer of its own, with room for `count` more tokens; what was dropped stays behind."""
        gone = self._dropped if self._base is None else 0
        needed = self._own - gone + count
        capacity, reserve = self._buffer.capacity, self._settings.reserve
        if gone:
            capacity = 2 * needed
        elif needed > capacity:
            capacity = max(2 * needed if self._own else needed, reserve if needed <= reserve else 0)
        buffer = self._buffer.copy(self._own, -(-capacity // _ROUND) * _ROUND, self.place, gone)
        return KeyValueCache(buffer, self.tokens, self._settings, self._base, self._dropped - gone)

    @property
    def _in_blocks(self) -> bool:
        """Whether reading makes a copy: of a narrow cache, or of one on another device than the queries'."""
        return self.is_narrow or self.place.device != self.device

    def _blocks(self, start: int, end: int, step: int) -> Iterator[tuple[int, int]]:
        """The numbers start .. end - 1 cut where the tokens lie apart, and to `step`."""
        for _, first, last, offset in self.spans(start, end):
            for begin in range(first, last, step):
                yield begin + offset, min(begin + step, last) + offset

    def _wide(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values (B, g, end - start, K) in the compute dtype, on the queries' device."""
        parts = [
            tuple(read(first, last, self.dtype).to(self.device) for read in (buffer.keys, buffer.values))
            for buffer, first, last, _ in self.spans(start, end)
        ]
        if len(parts) == 1:
            key, value = parts[0]
            return key, value
        key, value = (torch.cat(x, 2) for x in zip(*parts, strict=True))
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
    if not cache.is_one_view:
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
    step = _LONG_BLOCK if T == 1 and not cache._in_blocks else _BLOCK
    for start, end in cache._blocks(0, S, step):
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
