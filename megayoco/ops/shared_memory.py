"""The memory of a memory layer in inference, kept by several ranks together: each has a share of the tokens.

All ranks read the same tokens, in the same calls. Blocks of tokens go to the ranks in turn; the tokens that a window
may still need, the latest, every rank keeps besides. A query of any rank asks all shares: each rank attends to its own,
and the results (out, log-sum-exp) travel, (K + 1) numbers for a query and head whatever the memory holds. All ranks
merge them in the same order, so their tokens stay the same to the last bit.

A memory is a set, whose keys carry no position: nothing needs to know in which order the shares are read.

Shapes: B batch, R queries, S tokens so far, H query heads, g key-value heads of this tensor rank, K head dim, W window,
        P ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from megayoco.ops.attention_parts import Part, Rows, forward_by_parts
from megayoco.ops.backends import attention_backend
from megayoco.ops.key_value_cache import KeyValueCache
from megayoco.ops.key_values import KeyValues
from megayoco.traffic import TRAFFIC

_BLOCK = 64
"""Tokens that a rank takes at a time, at most a window."""


@dataclass(frozen=True)
class SharedMemory:
    """A context of memory attention, as a value: `combine` gives a longer one and leaves this one valid."""

    share: KeyValueCache
    """This rank's tokens."""
    recent: KeyValueCache
    """The latest tokens, at least W where there are as many."""
    window: int
    """W."""
    group: dist.ProcessGroup
    rank: int
    ranks: int
    tokens: int = 0
    """S."""

    @property
    def bytes(self) -> int:
        """Bytes that this rank's tokens take, the latest among them twice."""
        return self.share.bytes + self.recent.bytes

    def combine(self, right: KeyValues) -> SharedMemory:
        """These tokens, then `right`'s, both (B, T, g, K), which every rank gives."""
        count = right.key.shape[1]
        numbers = torch.arange(self.tokens, self.tokens + count, device=right.key.device)
        own = numbers // self._block % self.ranks == self.rank
        return replace(
            self,
            share=self.share.combine(KeyValues(right.key[:, own], right.value[:, own])),
            recent=self.recent.last(self.window).combine(right),
            tokens=self.tokens + count,
        )

    def part(self, start: int, end: int) -> KeyValues:
        """The tokens number start .. end - 1, both (B, end - start, g, K). Raises ValueError for older ones than every
        rank keeps."""
        first = self.tokens - self.recent.tokens
        if start < first:
            raise ValueError(f"token {start} lies in the memory that ranks share: the latest ones begin with {first}")
        return self.recent.part(start - first, end - first)

    def attend(self, q: Tensor, batch: slice, keys: slice, scale: float) -> tuple[Tensor, Tensor]:
        """Attention of queries to remembered tokens. Collective: one all-gather.

        Args:
            q: (B', R, H, K), the same on every rank.
            batch: the rows that q has.
            keys: numbers of the tokens that all of the queries see.
            scale: factor of the scores.

        Returns:
            (B', R, H, K) and the log-sum-exp (B', H, R), both fp32 or wider and equal on all ranks.
        """
        B, R, H, K = q.shape
        wide = torch.promote_types(q.dtype, torch.float32)
        outs = [torch.zeros((B, R, H, K), dtype=wide, device=q.device)]
        lses = [torch.full((B, H, R), -torch.inf, dtype=wide, device=q.device)]
        backend = attention_backend(q, None)
        for key, value in self.share.pieces(self._number(keys.start), self._number(keys.stop)):
            if key.shape[1] == 0:
                continue
            parts = [Part(slice(0, R), slice(0, key.shape[1]), "all")]
            out, lse = forward_by_parts(
                q, key[batch], value[batch], Rows(key.shape[1]), parts=parts, scale=scale, window=None, backend=backend
            )
            outs.append(out.to(wide))
            lses.append(lse)
        out, lse = _merged(torch.stack(outs), torch.stack(lses))
        own = torch.cat([out, lse.transpose(1, 2)[..., None]], -1)
        TRAFFIC.all_gather("sequence/memory", own, self.ranks)
        gathered = own.new_empty(self.ranks, *own.shape)
        dist.all_gather_into_tensor(gathered.view(-1), own.view(-1), group=self.group)
        return _merged(gathered[..., :-1], gathered[..., -1].transpose(2, 3))

    @property
    def _block(self) -> int:
        return min(_BLOCK, self.window)

    def _number(self, token: int) -> int:
        """How many of the tokens before `token` are this rank's."""
        rounds, rest = divmod(token, self._block * self.ranks)
        return rounds * self._block + min(max(rest - self.rank * self._block, 0), self._block)


def _merged(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Softmaxes over different keys, outs (n, B, R, H, K) and lses (n, B, H, R), as one over all; -inf: no key."""
    lse = lses.logsumexp(0)
    # nobody has a key: the weights are those of zeros
    weights = (lses - lse).exp().nan_to_num_(0).transpose(2, 3)[..., None]
    return (weights * outs).sum(0), lse
