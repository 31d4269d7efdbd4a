"""The sequence axis: ranks that share every sequence, and what they tell each other about what lies left of a chunk.

A sequence of N tokens is cut into n bands of P chunks of C tokens; rank r of P owns chunk b P + r of every band b. The
model is a fold over bands (model/bands.py; with one band the only step of the fold is the whole sequence) of an
exclusive scan over ranks, which is here: what stands left of this rank's chunk follows from the *carry*, what is known
of the bands before, and from the other ranks' part of this band.

    window      halo     the last W-1 keys and values, from as many left neighbours as hold them
    retention   prefix   one all-gather of (state, log-decay), combined locally
    shared keys gather   every rank's keys and values, once for all cross layers; full and memory attention: once per
                         layer

Replicas whose micro-batches are laid end to end (cross-batch training of memory layers) are such an axis too, with
windows of samples in place of tokens of one sequence: `before` is the halo without a carry.

Each has its adjoint: gradients travel back to the ranks whose tokens were read, and are summed there in fp32. The
collectives of a layer are the same, in the same order, on all ranks, forward and backward: nothing is left out because
a rank happens to have no use for it, or the others would wait for ever.

Shapes: B batch, C tokens of this rank's chunk, S tokens carried, g key-value heads and h heads of this tensor rank,
        K head dim, P ranks.
Source: LASP-2, arXiv 2502.07563 (the all-gather of states); Llama 3, arXiv 2407.21783, section 3.3.2 (the all-gather of
        keys and values).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megayoco.ops.key_values import KeyValues
from megayoco.ops.retention import RetentionState, combine
from megayoco.parallel.topology import Topology
from megayoco.traffic import TRAFFIC


@dataclass(frozen=True)
class SequenceAxis:
    """This rank's place among the ranks that share a sequence; None stands for a rank that has all of it."""

    group: dist.ProcessGroup
    rank: int
    ranks: int

    @staticmethod
    def of(topology: Topology) -> SequenceAxis | None:
        """The axis of a layout; None where one rank has the whole sequence."""
        if topology.sequence == 1:
            return None
        return SequenceAxis(topology.sequence_group, topology.sequence_rank, topology.sequence)

    @staticmethod
    def of_replicas(topology: Topology) -> SequenceAxis | None:
        """The replicas of this rank's place, whose micro-batches follow one another; None where there is one."""
        if topology.data == 1:
            return None
        return SequenceAxis(topology.data_group, topology.data_rank, topology.data)

    def halo(self, carry: KeyValues, local: KeyValues, reach: int) -> tuple[KeyValues, KeyValues]:
        """The last keys and values before this rank's chunk. Collective, point to point.

        Args:
            carry: (B, S, g, K) of this rank's own chunks of earlier bands, as this function returned it for the band
                before; empty before the first band. S is the same on all ranks.
            local: (B, C, g, K) of this rank's chunk, C the same on all ranks.
            reach: how many tokens are asked for, W - 1.

        Returns:
            `left`, the last `reach` tokens before the chunk or as many as the sequence has there, and the carry for the
            next band: this rank's own tokens as far as a later band can ask for them. Differentiable in both arguments;
            every rank must use `left` in a way that reaches backward, even where it is empty.
        """
        B, C, g, K = local.key.shape
        tail = local.last(reach)
        key, value = _Halo.apply(_Reach(self, carry.key.shape[1], C, reach), *carry, *tail)  # type: ignore[no-untyped-call]
        return KeyValues(key, value), carry.combine(local).last(self._kept(C, reach))

    def before(self, local: KeyValues, reach: int, kind: str) -> KeyValues:
        """The last `reach` keys and values before this rank's chunk, or as many as there are, where no band came
        before. Arguments, gradients and duties as of `halo`; `kind` is the purpose that the bytes are counted under."""
        B, C, g, K = local.key.shape
        none = KeyValues.empty(B, g, K, local.key.dtype, local.key.device)
        plan = _Reach(self, 0, C, reach, kind)
        return KeyValues(*_Halo.apply(plan, *none, *local.last(reach)))  # type: ignore[no-untyped-call]

    def prefix(self, carry: RetentionState, local: RetentionState) -> tuple[RetentionState, RetentionState]:
        """The state before this rank's chunk. Collective: one all-gather.

        Args:
            carry: state (B, h, K, K) and log-decay (B, h) of the bands before, the same on every rank, as this function
                returned it for the band before; the empty state before the first band.
            local: the same of this rank's chunk alone, from an empty state.

        Returns:
            The state before the chunk and the one after the whole band, which is the next carry. Differentiable in both
            arguments. The gradient of a carry is this rank's part: the parts of all ranks meet in the adjoint of the
            all-gather that made it.
        """
        left, left_decay, right, right_decay = _Prefix.apply(self, *carry, *local)  # type: ignore[no-untyped-call]
        return RetentionState(left, left_decay), RetentionState(right, right_decay)

    def gather(self, local: KeyValues, kind: str = "kv") -> KeyValues:
        """All ranks' chunks (B, P C, g, K) in order. Collective; backward sums the gradients in fp32 or wider and gives
        each rank those of its chunk. `kind` is the purpose that the bytes are counted under."""
        return KeyValues(*_Gather.apply(self, kind, *local))  # type: ignore[no-untyped-call]

    def gather_seen(self, local: KeyValues, kind: str = "shared_kv") -> KeyValues:
        """`gather`, cut at the end of this rank's chunk: what its queries may see of the band."""
        return self.gather(local, kind).first((self.rank + 1) * local.key.shape[1])

    def gather_into(self, local: KeyValues, key: Tensor, value: Tensor, kind: str = "shared_kv") -> Pending:
        """Starts to write all ranks' chunks into `key` and `value` (B, P C, g, K), which may be slices of larger
        tensors. Without gradient. Collective; `wait` on what is returned before reading them."""
        pending = Pending()
        for own, out in ((local.key, key), (local.value, value)):
            self._start_gather(f"sequence/{kind}", own.detach(), out, pending)
        return pending

    def reduce_scatter(self, dkey: Tensor, dvalue: Tensor, kind: str = "shared_kv_gradient") -> tuple[Tensor, Tensor]:
        """The adjoint of `gather_into`: this rank's part of the gradients (B, P C, g, K) of a band's keys and values ->
        the sums over ranks (B, C, g, K) for its own chunk, in fp32 or wider. Collective."""
        name = f"sequence/{kind}"
        return self._sum_own(name, dkey), self._sum_own(name, dvalue)

    def _kept(self, length: int, reach: int) -> int:
        """Tokens of its own that a rank keeps for later bands: as many as the last rank's are asked for."""
        hops = -(-reach // length)
        if hops == 0:
            return 0
        chunks = -(-hops // self.ranks)
        # the oldest of them is asked for as a whole, unless it is the farthest that anyone reaches
        farthest = (chunks - 1) * self.ranks + 1 == hops
        return (chunks - 1) * length + (reach - (hops - 1) * length if farthest else length)

    def _start_gather(self, name: str, own: Tensor, out: Tensor, pending: Pending) -> None:
        TRAFFIC.all_gather(name, own, self.ranks)
        own = own.contiguous()
        # the collective puts chunks one behind the other, which is their order in `out` only for a batch of one
        direct = out.is_contiguous() and out.shape[0] == 1
        target = out if direct else out.new_empty(self.ranks, *own.shape)
        work = dist.all_gather_into_tensor(target.view(-1), own.view(-1), group=self.group, async_op=True)
        pending.add(work, own, None if direct else (out.unflatten(1, (self.ranks, -1)), target.transpose(0, 1)))

    def _sum_own(self, name: str, gradient: Tensor) -> Tensor:
        """(B, P C, ...) -> (B, C, ...), summed over ranks in fp32 or wider."""
        parts = gradient.unflatten(1, (self.ranks, -1)).transpose(0, 1)
        return self._reduce_scatter(name, parts)

    def _reduce_scatter(self, name: str, parts: Tensor) -> Tensor:
        """(P, ...) -> (...), part r of the sum over ranks on rank r, in fp32 or wider."""
        wide = torch.promote_types(parts.dtype, torch.float32)
        parts = parts.to(wide).contiguous()
        own = parts.new_empty(parts.shape[1:])
        TRAFFIC.reduce_scatter(name, own, self.ranks)
        dist.reduce_scatter_tensor(own.view(-1), parts.view(-1), group=self.group)
        return own


class Pending:
    """Collectives under way: what they read is kept until `wait`, which also puts their results in place."""

    def __init__(self) -> None:
        self._steps: list[tuple[dist.Work, Tensor, tuple[Tensor, Tensor] | None]] = []

    def add(self, work: Any, read: Tensor, placing: tuple[Tensor, Tensor] | None) -> None:
        """`placing`: a copy from the second tensor into the first once the work is done."""
        self._steps.append((work, read, placing))

    def wait(self) -> None:
        """Return when the results may be read (on a GPU: by what is launched from now on)."""
        for work, _, placing in self._steps:
            work.wait()
            if placing is not None:
                placing[0].copy_(placing[1])
        self._steps = []


class _Gather(torch.autograd.Function):
    """(key, value) (B, C, g, K) -> (B, P C, g, K)."""

    @staticmethod
    def forward(ctx: Any, axis: SequenceAxis, kind: str, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        ctx.axis, ctx.kind, ctx.dtype = axis, kind, key.dtype
        B, C, g, K = key.shape
        out = key.new_empty(B, axis.ranks * C, g, K), value.new_empty(B, axis.ranks * C, g, K)
        axis.gather_into(KeyValues(key, value), *out, kind=kind).wait()
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dkey: Tensor, dvalue: Tensor) -> tuple[Tensor | None, ...]:
        dkey, dvalue = ctx.axis.reduce_scatter(dkey, dvalue, kind=f"{ctx.kind}_gradient")
        return None, None, dkey.to(ctx.dtype), dvalue.to(ctx.dtype)


class _Prefix(torch.autograd.Function):
    """All-gather of the chunks' states, then their combination before this rank's chunk and after the last one."""

    @staticmethod
    def forward(
        ctx: Any, axis: SequenceAxis, carry: Tensor, carry_decay: Tensor, state: Tensor, decay: Tensor
    ) -> tuple[Tensor, ...]:
        # one message: (B, h, K K + 1)
        own = torch.cat([state.flatten(2), decay[..., None]], -1)
        gathered = own.new_empty(axis.ranks, *own.shape)
        TRAFFIC.all_gather("sequence/state", own, axis.ranks)
        dist.all_gather_into_tensor(gathered.view(-1), own.view(-1), group=axis.group)
        ctx.save_for_backward(carry, carry_decay, gathered)
        ctx.axis = axis
        left, right = _scan(RetentionState(carry, carry_decay), gathered, axis.rank)
        # an output must not be an input itself: rank 0 has the carry on its left
        return tuple(x.clone() if x is carry or x is carry_decay else x for x in (*left, *right))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        # the combinations are few and small: computed again rather than kept
        carry, carry_decay, gathered = (x.detach().requires_grad_() for x in ctx.saved_tensors)
        with torch.enable_grad():
            left, right = _scan(RetentionState(carry, carry_decay), gathered, ctx.axis.rank)
        dcarry, dcarry_decay, dgathered = torch.autograd.grad(
            [*left, *right], [carry, carry_decay, gathered], gradients
        )
        down = ctx.axis._reduce_scatter("sequence/state_gradient", dgathered)
        return None, dcarry, dcarry_decay, down[..., :-1].unflatten(-1, carry.shape[2:]), down[..., -1]


def _scan(carry: RetentionState, gathered: Tensor, rank: int) -> tuple[RetentionState, RetentionState]:
    """The states before chunk `rank` and after the last one; gathered (P, B, h, K K + 1)."""
    left = carry
    for number, part in enumerate(gathered):
        if number == rank:
            left = carry
        carry = combine(carry, RetentionState(part[..., :-1].unflatten(-1, carry.state.shape[2:]), part[..., -1]))
    return left, carry


@dataclass(frozen=True)
class _Reach:
    """Which tokens go where in a halo.

    Hop j takes from the rank j places to the left, of a chunk `bands(receiver, j)` bands back (0: of this band).
    """

    axis: SequenceAxis
    carried: int
    length: int
    reach: int
    kind: str = "sequence/halo"
    """The purpose that the bytes are counted under."""

    @property
    def hops(self) -> int:
        """The farthest chunk to the left that is asked for; what the carries do not reach need not be visited."""
        most = self.axis.ranks * (-(-self.carried // self.length) + 1)
        return min(-(-self.reach // self.length), most)

    def bands(self, receiver: int, hop: int) -> int:
        """How many bands back the chunk `hop` chunks left of the receiver's stands."""
        return -((receiver - hop) // self.axis.ranks)

    def tokens(self, receiver: int, hop: int) -> int:
        """How many tokens the receiver gets of that chunk; none where the sequence begins right of it."""
        bands = self.bands(receiver, hop)
        there = self.length if bands == 0 else self.carried - (bands - 1) * self.length
        return max(min(self.length, self.reach - (hop - 1) * self.length, there), 0)

    def source(self, receiver: int, hop: int) -> tuple[bool, slice]:
        """Where the sender has them: whether in its carry (else in its chunk), and at which tokens from the end."""
        bands = self.bands(receiver, hop)
        end = -max(bands - 1, 0) * self.length
        return bands > 0, slice(end - self.tokens(receiver, hop), end or None)


class _Halo(torch.autograd.Function):
    """(carry, tail of the chunk) -> the tokens left of the chunk; keys and values travel in one message per hop."""

    @staticmethod
    def forward(
        ctx: Any, plan: _Reach, carry_key: Tensor, carry_value: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.plan, ctx.carry_shape, ctx.shape, ctx.dtype = plan, carry_key.shape, key.shape, key.dtype
        own = {True: (carry_key, carry_value), False: (key, value)}
        outgoing = {}
        for hop, receiver in _receivers(plan):
            carried, at = plan.source(receiver, hop)
            outgoing[hop] = torch.stack([x[:, at] for x in own[carried]])
        B, _, g, K = key.shape
        incoming = {hop: key.new_empty(2, B, plan.tokens(plan.axis.rank, hop), g, K) for hop, _ in _senders(plan)}
        _exchange(plan.axis, plan.kind, outgoing, incoming, step=1)
        # hops count to the left: the farthest comes first
        pieces = [incoming[hop] for hop in sorted(incoming, reverse=True)]
        left = torch.cat(pieces, 2) if pieces else key.new_empty(2, B, 0, g, K)
        return left[0], left[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dkey: Tensor, dvalue: Tensor) -> tuple[Tensor | None, ...]:
        plan: _Reach = ctx.plan
        dleft = torch.stack([dkey, dvalue])
        outgoing, end = {}, dleft.shape[2]
        for hop, _ in _senders(plan):
            start = end - plan.tokens(plan.axis.rank, hop)
            outgoing[hop] = dleft[:, :, start:end].contiguous()
            end = start
        B, _, g, K = ctx.shape
        incoming = {hop: dleft.new_empty(2, B, plan.tokens(to, hop), g, K) for hop, to in _receivers(plan)}
        _exchange(plan.axis, f"{plan.kind}_gradient", outgoing, incoming, step=-1)
        # several ranks may have read the same token
        wide = torch.promote_types(ctx.dtype, torch.float32)
        sums = {
            True: dleft.new_zeros((2, *ctx.carry_shape), dtype=wide),
            False: dleft.new_zeros((2, *ctx.shape), dtype=wide),
        }
        for hop, receiver in _receivers(plan):
            carried, at = plan.source(receiver, hop)
            sums[carried][:, :, at] += incoming[hop]
        return None, *(x for carried in (True, False) for x in sums[carried].to(ctx.dtype))


def _receivers(plan: _Reach) -> list[tuple[int, int]]:
    """(hop, rank) of everyone who gets tokens of this rank, itself included, nearest first."""
    found = [(hop, (plan.axis.rank + hop) % plan.axis.ranks) for hop in range(1, plan.hops + 1)]
    return [(hop, rank) for hop, rank in found if plan.tokens(rank, hop)]


def _senders(plan: _Reach) -> list[tuple[int, int]]:
    """(hop, rank) of everyone whose tokens this rank gets, nearest first."""
    found = [(hop, (plan.axis.rank - hop) % plan.axis.ranks) for hop in range(1, plan.hops + 1)]
    return [(hop, rank) for hop, rank in found if plan.tokens(plan.axis.rank, hop)]


def _exchange(
    axis: SequenceAxis, name: str, outgoing: dict[int, Tensor], incoming: dict[int, Tensor], step: int
) -> None:
    """Sends outgoing[hop] to the rank `hop` places to the right (step 1) or left (-1), fills incoming[hop] from the
    rank as far on the other side. Between two ranks messages match by their order, ascending in hops on both."""
    operations = []
    for hop in sorted(outgoing.keys() | incoming.keys()):
        to, source = (axis.rank + step * hop) % axis.ranks, (axis.rank - step * hop) % axis.ranks
        if to == axis.rank:
            if hop in incoming:
                incoming[hop].copy_(outgoing[hop])
            continue
        if hop in outgoing:
            TRAFFIC.message(name, outgoing[hop])
            operations.append(dist.P2POp(dist.isend, outgoing[hop], group=axis.group, group_peer=to))
        if hop in incoming:
            operations.append(dist.P2POp(dist.irecv, incoming[hop], group=axis.group, group_peer=source))
    if operations:
        for work in dist.batch_isend_irecv(operations):
            work.wait()


def own_chunks(x: Tensor, rank: int, ranks: int, bands: int) -> Tensor:
    """This rank's chunks of whole sequences, band after band: (B, N) -> (B, N / ranks). N divides by ranks x bands."""
    return x.unflatten(1, (bands, ranks, -1))[:, :, rank].flatten(1).contiguous()
