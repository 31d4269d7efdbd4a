"""Gated retention: attention without softmax whose memory is one faded matrix per head.

Shapes: B batch, T tokens of the chunk handed in, H heads, K key dim, V value dim (K in YOCO);
        inside, tokens are cut into pieces of C tokens: N = B x H rows, M pieces of one group.
Left context: RetentionState(state (B, H, K, V), log_decay (B, H)), fp32 or float64, decoding included: in bf16 a decay
above 0.998 rounds to 1 and never fades.

Three forms of one function: `gated_retention` for training and prefill (matrix products only), `gated_retention_recurrent`
for a few tokens, `gated_retention_naive` as the reference of both.

Source: YOCO, arXiv 2405.05254, equations 5-8, without the output norm and gate.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Tokens of a piece. Below, the products between pieces cost more; above, the (C x C) fades do.
CHUNK_CPU = 64
CHUNK = 256

# What the temporaries of one group of pieces may take; the group's length follows from it.
GROUP_BYTES_CPU = 16 * 2**20
GROUP_BYTES = 512 * 2**20
# The product that joins the pieces of a group grows with the square of their number.
GROUP_PIECES = 32

# Up to here the recurrence is faster than setting up pieces.
RECURRENT_TOKENS = 2


class RetentionState(NamedTuple):
    """All tokens up to here, as the next token needs them."""

    state: Tensor
    """(B, H, K, V) fp32 or float64: sum of key^T value of every visible token, faded by the later decays."""

    log_decay: Tensor
    """(B, H) same dtype: sum of the log-decays since the sequence's start; -inf once a document border was passed."""


def empty_state(
    batch_size: int,
    heads: int,
    head_dim: int,
    *,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> RetentionState:
    """The context before the first token: zeros, and the neutral element of `combine`."""
    state = torch.zeros(batch_size, heads, head_dim, value_dim or head_dim, dtype=dtype, device=device)
    return RetentionState(state, torch.zeros(batch_size, heads, dtype=dtype, device=device))


def combine(a: RetentionState, b: RetentionState) -> RetentionState:
    """The state after chunk a followed by chunk b, each computed from an empty left context. Associative.

    A document border inside b (log_decay -inf) drops all of a.
    """
    return RetentionState(b.log_decay.exp()[..., None, None] * a.state + b.state, a.log_decay + b.log_decay)


def gated_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    left: RetentionState,
    *,
    first_token: Tensor | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, RetentionState]:
    """Gated retention of one chunk: attention without softmax, older tokens faded by the later decays.

    Args:
        q, k: (B, T, H, K), one dtype; rotary and the 1/sqrt(K) of the keys already applied. Any T, zero included.
        v: (B, T, H, V), the same dtype.
        log_decay: (B, T, H), fp32 or float64, finite, <= 0; token t fades everything before it by its exp.
        left: state (B, H, K, V) and log_decay (B, H) of all tokens before the chunk, zeros at a document's start.
        first_token: (B, T) int64, number within the chunk of the first token of this token's document, so it never
            decreases along T. Below 0 the document began before the chunk and `left` is visible; otherwise
            neither `left` nor the tokens before that number are. None: one document throughout.
        chunk: tokens of the pieces that T is cut into; None: what is fastest on the device.

    Returns:
        y (B, T, H, V) in q's dtype, and the context after the last token in log_decay's dtype. Its log_decay is
        -inf where a document began inside the chunk. Both are differentiable in q, k, v, log_decay and left, once.

    Raises:
        ValueError: log_decay is narrower than fp32, or chunk is not positive.

    Keeps its inputs and one state per group of pieces for backward, which computes the rest again.
    """
    _check(log_decay, chunk)
    tokens = q.shape[1]
    if tokens <= RECURRENT_TOKENS and chunk is None:
        return gated_retention_recurrent(q, k, v, log_decay, left, first_token=first_token)
    if chunk is None:
        chunk = CHUNK_CPU if q.device.type == "cpu" else CHUNK
    state = left.state.to(log_decay.dtype)
    y, state = _ChunkedRetention.apply(q, k, v, log_decay, state, first_token, min(chunk, tokens))
    return y, RetentionState(state, _total_log_decay(log_decay, left, first_token))


def gated_retention_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    left: RetentionState,
    *,
    first_token: Tensor | None = None,
) -> tuple[Tensor, RetentionState]:
    """`gated_retention` one token at a time: for decoding. Same arguments, results and errors."""
    _check(log_decay)
    dtype = q.dtype
    q, k, v = (x.to(log_decay.dtype) for x in (q, k, v))
    fade = log_decay.exp()
    if first_token is not None:
        starts = first_token == torch.arange(q.shape[1], device=q.device)
        fade = fade.masked_fill(starts[..., None], 0)
    state, outputs = left.state.to(log_decay.dtype), []
    for t in range(q.shape[1]):
        state = fade[:, t, :, None, None] * state + k[:, t, :, :, None] * v[:, t, :, None]
        outputs.append((q[:, t, :, None] @ state).squeeze(2))
    y = torch.stack(outputs, 1) if outputs else torch.zeros_like(v)
    return y.to(dtype), RetentionState(state, _total_log_decay(log_decay, left, first_token))


def gated_retention_naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    left: RetentionState,
    *,
    first_token: Tensor | None = None,
) -> tuple[Tensor, RetentionState]:
    """The same, as the recurrence is written: the reference of every other form."""
    batch_size, tokens, heads, _ = q.shape
    state, total, y = left.state.to(log_decay.dtype), left.log_decay, []
    for t in range(tokens):
        state = log_decay[:, t, :, None, None].exp() * state
        total = total + log_decay[:, t]
        if first_token is not None:
            starts = (first_token[:, t] == t)[:, None].expand(batch_size, heads)
            state = state.masked_fill(starts[..., None, None], 0)
            total = total.masked_fill(starts, -torch.inf)
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t].to(state.dtype), v[:, t].to(state.dtype))
        y.append(torch.einsum("bhk,bhkv->bhv", q[:, t].to(state.dtype), state).to(q.dtype))
    return torch.stack(y, 1) if y else v.clone(), RetentionState(state, total)


def _check(log_decay: Tensor, chunk: int | None = None) -> None:
    if log_decay.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"log_decay must be fp32 or float64, got {log_decay.dtype}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1 token, got {chunk}")


def _total_log_decay(log_decay: Tensor, left: RetentionState, first_token: Tensor | None) -> Tensor:
    total = left.log_decay + log_decay.sum(1)
    if first_token is not None and first_token.shape[1]:
        total = total.masked_fill(first_token[:, -1:] >= 0, -torch.inf)
    return total


class _Group:
    """Some pieces of consecutive tokens, in GEMM layout, and every fade between them.

    Shapes: N rows (one head of one sequence), M pieces, C tokens. Exponents are <= 0 wherever they are used; the others
    are set to -inf before exp, since a mask multiplied in afterwards would give inf * 0. Decays of different documents
    are never compared: masks come from document numbers.
    """

    def __init__(self, log_decay: Tensor, first_token: Tensor | None, start: int, chunk: int) -> None:
        batch_size, tokens, heads = log_decay.shape
        self.chunk = chunk
        self.pieces = M = -(-tokens // chunk)
        padding = M * chunk - tokens
        a_BHT = log_decay.transpose(1, 2)
        if padding:  # tokens with key 0 and decay 1 change nothing
            a_BHT = torch.nn.functional.pad(a_BHT, (0, padding))
        c = a_BHT.reshape(batch_size * heads, M, chunk).cumsum(-1)
        A = c[..., -1]
        # b_n: log-decay from the group's start to the start of piece n; restarts with every group, so it stays small
        b = torch.nn.functional.pad(A.cumsum(-1), (1, 0))
        fade = c[..., :, None] - c[..., None, :]
        joint = b[:, :, None] - b[:, None, :]
        future = torch.ones(chunk, chunk, dtype=torch.bool, device=c.device).triu_(1)
        later = torch.ones(M + 1, M + 1, dtype=torch.bool, device=c.device).triu_(1)
        self.from_left, self.to_right = c.exp(), (A[..., None] - c).exp()
        if first_token is not None:
            f = first_token - start
            if padding:
                f = torch.cat([f, f[:, -1:].expand(-1, padding)], 1)
            t = torch.arange(chunk, device=c.device)
            # relative to the piece, one row per head
            f = f.view(batch_size, M, chunk) - chunk * torch.arange(M, device=c.device)[:, None]
            f = f[:, None].expand(-1, heads, -1, -1).flatten(0, 1)
            future = future | (t < f[..., None])
            self.from_left = self.from_left.masked_fill(f >= 0, 0)
            self.to_right = self.to_right.masked_fill(t < f[..., -1:], 0)
            borders = torch.nn.functional.pad((f[..., -1] >= 0).cumsum(-1), (1, 0))
            later = later | (borders[:, :, None] != borders[:, None, :])
        self.fade = fade.masked_fill_(future, -torch.inf).exp_()
        self.joint = joint.masked_fill_(later, -torch.inf).exp_()

    def load(self, x: Tensor) -> Tensor:
        """(B, T, H, K) of any float dtype -> (N, M, C, K) in the fades' dtype, zeros behind the last token."""
        batch_size, tokens, heads, dim = x.shape
        length = self.pieces * self.chunk
        out = self.fade.new_empty(batch_size, heads, length, dim)
        out[:, :, :tokens] = x.transpose(1, 2)
        out[:, :, tokens:] = 0
        return out.view(batch_size * heads, self.pieces, self.chunk, dim)

    @staticmethod
    def store(x: Tensor, out: Tensor) -> None:
        """The inverse: the real tokens of (N, M, C, K) into out (B, T, H, K)."""
        batch_size, tokens, heads, dim = out.shape
        out.copy_(x.view(batch_size, heads, -1, dim)[:, :, :tokens].transpose(1, 2))

    def states(self, k: Tensor, v: Tensor, state: Tensor) -> Tensor:
        """(N, M + 1, K, V): the state before every piece and after the last one; state is (N, K, V)."""
        added = (k * self.to_right[..., None]).transpose(-1, -2) @ v
        return self._join(self.joint, torch.cat([state[:, None], added], 1))

    def state_gradients(self, read: Tensor, last: Tensor) -> Tensor:
        """The adjoint of `states`: read (N, M, K, V) enters before each piece, last (N, K, V) after all."""
        return self._join(self.joint.transpose(-1, -2), torch.cat([read, last[:, None]], 1))

    @staticmethod
    def _join(weights: Tensor, x: Tensor) -> Tensor:
        return (weights @ x.flatten(2)).view_as(x)


def _group_tokens(q: Tensor, v: Tensor, chunk: int, itemsize: int) -> int:
    batch_size, tokens, heads, key_dim = q.shape
    budget = GROUP_BYTES_CPU if q.device.type == "cpu" else GROUP_BYTES
    piece_bytes = batch_size * heads * (3 * chunk * chunk + 3 * key_dim * v.shape[-1]) * itemsize
    return chunk * max(1, min(budget // piece_bytes, GROUP_PIECES, -(-tokens // chunk)))


class _ChunkedRetention(torch.autograd.Function):
    """(q, k, v, log_decay, state, first_token, chunk) -> (y, state), group by group of pieces.

    With S the states before the pieces, G their gradients and P = (q k^T) * fade inside a piece:
        y = P v + (q * from_left) S;   S_next = exp(A) S + (k * to_right)^T v
    The gradient of a log-decay is the sum, over everything that it fades, of value times gradient. A query's terms carry
    +c of its token, a key's -c of its own, and the state after a piece carries the piece's total:
        d log_decay_t = <S_next, G_next> + sum over i >= t of (q_i . dq_i - k_i . dk_i)
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        state: Tensor,
        first_token: Tensor | None,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        tokens = q.shape[1]
        size = _group_tokens(q, v, chunk, log_decay.element_size())
        y = torch.empty_like(v, dtype=q.dtype, memory_format=torch.contiguous_format)
        current, befores = state.flatten(0, 1), []
        for start in range(0, tokens, size):
            part = slice(start, start + size)
            befores.append(current)
            group = _Group(log_decay[:, part], None if first_token is None else first_token[:, part], start, chunk)
            q_, k_, v_ = group.load(q[:, part]), group.load(k[:, part]), group.load(v[:, part])
            states = group.states(k_, v_, current)
            y_ = (q_ @ k_.transpose(-1, -2)).mul_(group.fade) @ v_
            y_ += q_.mul_(group.from_left[..., None]) @ states[:, :-1]
            group.store(y_, y[:, part])
            current = states[:, -1].clone()
        ctx.save_for_backward(q, k, v, log_decay, first_token, *befores)
        ctx.chunk, ctx.size = chunk, size
        return y, current.view_as(state)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, log_decay, first_token, *befores = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        dlog_decay = torch.empty_like(log_decay)
        last = dstate.flatten(0, 1)
        for index in reversed(range(len(befores))):
            part = slice(index * ctx.size, (index + 1) * ctx.size)
            starts = None if first_token is None else first_token[:, part]
            group = _Group(log_decay[:, part], starts, part.start, ctx.chunk)
            q_, k_, v_, dy_ = (group.load(x[:, part]) for x in (q, k, v, dy))
            states = group.states(k_, v_, befores[index])
            from_left, to_right = group.from_left[..., None], group.to_right[..., None]
            read = (q_ * from_left).transpose(-1, -2) @ dy_
            gradients = group.state_gradients(read, last)
            after = gradients[:, 1:]
            scores = (q_ @ k_.transpose(-1, -2)).mul_(group.fade)
            dv_ = scores.transpose(-1, -2) @ dy_ + (k_ * to_right) @ after
            dscores = (dy_ @ v_.transpose(-1, -2)).mul_(group.fade)
            dq_ = dscores @ k_ + (dy_ @ states[:, :-1].transpose(-1, -2)).mul_(from_left)
            dk_ = dscores.transpose(-1, -2) @ q_ + (v_ @ after.transpose(-1, -2)).mul_(to_right)
            dc = (q_ * dq_).sum(-1) - (k_ * dk_).sum(-1)
            da = dc.flip(-1).cumsum(-1).flip(-1) + (states[:, 1:] * after).sum((-1, -2))[..., None]
            for x, out in ((dq_, dq), (dk_, dk), (dv_, dv), (da[..., None], dlog_decay[..., None])):
                group.store(x, out[:, part])
            last = gradients[:, 0]
        return dq, dk, dv, dlog_decay, last.reshape(dstate.shape), None, None
