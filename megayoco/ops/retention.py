"""Gated retention: attention without softmax whose memory is one faded matrix per head.

Shapes: B batch, T tokens of the chunk handed in, H heads, K key dim, V value dim (K in YOCO);
        inside, tokens are cut into pieces of C tokens: M pieces of one group, N = B x H rows of a piece.
Left context: RetentionState(state (B, H, K, V), log_decay (B, H)), fp32 or float64, decoding included: in bf16 a decay
above 0.998 rounds to 1 and never fades.

Three forms of one function: `gated_retention` made of matrix products for training and prefill,
`gated_retention_recurrent` for a few tokens, `gated_retention_naive` as the reference of both.

Source: YOCO, arXiv 2405.05254, equations 5-8, without the output norm and gate.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Tokens of a piece, by measurement. In smaller ones the products between pieces, which grow with the key dim, weigh
# more; in larger ones the (C x C) fades.
CHUNKS_CPU = (64, 128)
CHUNK = 256

# What the temporaries of one group of pieces may take: on CPU they should stay in the cache.
GROUP_BYTES_CPU = 4 * 2**20
GROUP_BYTES = 512 * 2**20

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
    if tokens == 0 or (tokens <= RECURRENT_TOKENS and chunk is None):
        return gated_retention_recurrent(q, k, v, log_decay, left, first_token=first_token)
    if chunk is None:
        chunk = CHUNKS_CPU[q.shape[3] > 128] if q.device.type == "cpu" else CHUNK
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


def retention_state(k: Tensor, v: Tensor, log_decay: Tensor, *, first_token: Tensor | None = None) -> RetentionState:
    """The context after a chunk that nothing precedes: what `gated_retention` returns beside y from an empty `left`,
    for one matrix product in place of five.

    Arguments as there. Differentiable in k, v and log_decay, once; keeps only its inputs for backward.
    """
    _check(log_decay)
    state = _ChunkState.apply(k, v, log_decay, first_token)
    return RetentionState(state, _own_log_decay(log_decay, first_token))


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
    return left.log_decay + _own_log_decay(log_decay, first_token)


def _own_log_decay(log_decay: Tensor, first_token: Tensor | None) -> Tensor:
    total = log_decay.sum(1)
    if first_token is not None and first_token.shape[1]:
        total = total.masked_fill(first_token[:, -1:] >= 0, -torch.inf)
    return total


class _Group:
    """Some pieces of consecutive tokens, in GEMM layout, and every fade between them.

    Shapes: M pieces, N rows (one head of one sequence), C tokens. Exponents are <= 0 wherever they are used; the others
    are set to -inf before exp, since a mask multiplied in afterwards would give inf * 0. Documents are told apart by
    the numbers of their first tokens, never by infinite decays, whose differences are NaN.

    Attributes:
        fade: (M, N, C, C) from a key to a query of the same piece.
        from_left: (M, N, C, 1) from the start of a piece to its tokens; 0 if their document began inside.
        to_right: (M, N, C, 1) from a token to the end of its piece; 0 if another document begins between.
        across: (M, N, 1, 1) from the start of a piece to its end; 0 if a document begins inside.
    """

    def __init__(self, log_decay: Tensor, first_token: Tensor | None, start: int, chunk: int) -> None:
        batch_size, tokens, heads = log_decay.shape
        self.chunk = chunk
        self.pieces = -(-tokens // chunk)
        self.padding = self.pieces * chunk - tokens
        # Below the clamp a decay is 0 after exp; its true size would only cost the cumulative sum its last digits.
        log_decay = log_decay.clamp(min=-128 if log_decay.dtype == torch.float32 else -1024)
        log_decay = F.pad(log_decay, (0, 0, 0, self.padding))  # tokens with key 0 and decay 1 change nothing
        c = self._split(log_decay).permute(1, 0, 3, 2).flatten(1, 2).cumsum(-1)
        total = c[..., -1:]
        hidden = torch.ones(chunk, chunk, dtype=torch.bool, device=c.device).triu_(1)
        from_left, to_right, across = c.exp(), (total - c).exp_(), total.exp()
        if first_token is not None:
            t = torch.arange(chunk, device=c.device)
            starts = start + chunk * torch.arange(self.pieces, device=c.device)
            last = first_token[:, -1:].expand(-1, self.padding)
            # relative to the piece, one row per head
            first = self._split(torch.cat([first_token, last], 1)).transpose(0, 1) - starts[:, None, None]
            first = first.repeat_interleave(heads, 1)
            hidden = hidden | (t < first[..., None])
            from_left.masked_fill_(first >= 0, 0)
            to_right.masked_fill_(t < first[..., -1:], 0)
            across.masked_fill_(first[..., -1:] >= 0, 0)
        self.fade = (c[..., :, None] - c[..., None, :]).masked_fill_(hidden, -torch.inf).exp_()
        self.from_left, self.to_right, self.across = from_left[..., None], to_right[..., None], across[..., None]

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (self.pieces, self.chunk))

    def load(self, x: Tensor) -> Tensor:
        """(B, T, H, K) of any float dtype -> (M, N, C, K) in the fades' dtype, zeros behind the last token."""
        x = self._split(F.pad(x, (0, 0, 0, 0, 0, self.padding)) if self.padding else x).permute(1, 0, 3, 2, 4)
        return self.fade.new_empty(x.shape).copy_(x).flatten(1, 2)

    def store(self, x: Tensor, out: Tensor) -> None:
        """The inverse: the real tokens of (M, N, C, K) into out (B, T, H, K)."""
        x = x.unflatten(1, (out.shape[0], out.shape[2])).permute(1, 0, 3, 2, 4)
        if self.padding:
            out.copy_(x.flatten(1, 2)[:, : out.shape[1]])
        else:
            self._split(out).copy_(x)

    def states(self, k: Tensor, v: Tensor, state: Tensor) -> Tensor:
        """(M + 1, N, K, V): the state before every piece and after the last one; state (N, K, V) comes first."""
        states = state.new_empty(self.pieces + 1, *state.shape)
        states[0] = state
        _product((k * self.to_right).transpose(-1, -2), v, out=states[1:])
        # The only loop: one faded addition per piece, little beside the products that made its summands.
        for n in range(self.pieces):
            states[n + 1].addcmul_(self.across[n], states[n])
        return states

    def state_gradients(self, q: Tensor, dy: Tensor, last: Tensor) -> Tensor:
        """The adjoint of `states` and of reading them: (M + 1, N, K, V), whose last (N, K, V) is given."""
        gradients = last.new_empty(self.pieces + 1, *last.shape)
        gradients[-1] = last
        _product((q * self.from_left).transpose(-1, -2), dy, out=gradients[:-1])
        for n in reversed(range(self.pieces)):
            gradients[n].addcmul_(self.across[n], gradients[n + 1])
        return gradients


def _product(a: Tensor, b: Tensor, out: Tensor | None = None, add: bool = False) -> Tensor:
    """a @ b over (M, N, ., .), into or onto `out`, without copies of what a view can say."""
    if out is None:
        out = a.new_empty(*a.shape[:-1], b.shape[-1])
    rows = out.flatten(0, 1)
    rows.baddbmm_(a.flatten(0, 1), b.flatten(0, 1), beta=1 if add else 0)
    return out


def _group_tokens(q: Tensor, v: Tensor, chunk: int, itemsize: int) -> int:
    batch_size, _, heads, key_dim = q.shape
    budget = GROUP_BYTES_CPU if q.device.type == "cpu" else GROUP_BYTES
    piece_bytes = batch_size * heads * (2 * chunk * chunk + 2 * key_dim * v.shape[-1]) * itemsize
    return chunk * max(1, budget // piece_bytes)


class _ChunkedRetention(torch.autograd.Function):
    """(q, k, v, log_decay, state, first_token, chunk) -> (y, state), group by group of pieces.

    With S the states before the pieces, G their gradients and P = (q k^T) * fade inside a piece:
        y = P v + (q * from_left) S;   S_next = across S + (k * to_right)^T v
    Forward keeps its inputs and one state per group; backward makes the rest again. A log-decay's gradient is the sum
    of value times gradient over all that it fades. With c the sum of log-decays inside a piece, the terms of a query
    carry +c of its token, those of a key -c of its own, and the state after a piece carries the total:
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
        size = _group_tokens(q, v, chunk, log_decay.element_size())
        y = torch.empty_like(v, dtype=q.dtype, memory_format=torch.contiguous_format)
        current, befores = state.flatten(0, 1), []
        for start in range(0, q.shape[1], size):
            part = slice(start, start + size)
            befores.append(current)
            group = _Group(log_decay[:, part], None if first_token is None else first_token[:, part], start, chunk)
            q_, k_, v_ = (group.load(x[:, part]) for x in (q, k, v))
            states = group.states(k_, v_, current)
            y_ = _product(_product(q_, k_.transpose(-1, -2)).mul_(group.fade), v_)
            group.store(_product(q_.mul_(group.from_left), states[:-1], out=y_, add=True), y[:, part])
            current = states[-1].clone()  # lets go of the others
        ctx.save_for_backward(q, k, v, log_decay, first_token, *befores)
        ctx.chunk, ctx.size = chunk, size
        return y, current.view_as(state)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, log_decay, first_token, *befores = ctx.saved_tensors
        outputs = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, log_decay[..., None])]
        last = dstate.flatten(0, 1)
        for index in reversed(range(len(befores))):
            part = slice(index * ctx.size, (index + 1) * ctx.size)
            starts = None if first_token is None else first_token[:, part]
            group = _Group(log_decay[:, part], starts, part.start, ctx.chunk)
            q_, k_, v_, dy_ = (group.load(x[:, part]) for x in (q, k, v, dy))
            states = group.states(k_, v_, befores[index])
            gradients = group.state_gradients(q_, dy_, last)
            before, after = states[:-1], gradients[1:]
            scores = _product(q_, k_.transpose(-1, -2)).mul_(group.fade)
            dv_ = _product(scores.transpose(-1, -2), dy_)
            _product(k_ * group.to_right, after, out=dv_, add=True)
            dscores = _product(dy_, v_.transpose(-1, -2)).mul_(group.fade)
            # the factors of rows are applied to the results: then the products read q, k, dy and v as they are
            dq_ = _product(dy_, before.transpose(-1, -2)).mul_(group.from_left)
            _product(dscores, k_, out=dq_, add=True)
            dk_ = _product(v_, after.transpose(-1, -2)).mul_(group.to_right)
            _product(dscores.transpose(-1, -2), q_, out=dk_, add=True)
            dc = (q_.mul_(dq_).sub_(k_.mul_(dk_))).sum(-1, keepdim=True)
            total = (states[1:] * after).sum((-1, -2), keepdim=True)
            da = dc.flip(-2).cumsum(-2).flip(-2) + total
            for x, out in zip((dq_, dk_, dv_, da), outputs, strict=True):
                group.store(x, out[:, part])
            last = gradients[0]
        dq, dk, dv, dlog_decay = outputs
        return dq, dk, dv, dlog_decay.squeeze(-1), last.reshape(dstate.shape), None, None


class _ChunkState(torch.autograd.Function):
    """(k, v, log_decay, first_token) -> sum of w_t k_t^T v_t with w_t the fade from token t to the end of the chunk.

    A log-decay fades all tokens before its own, so its gradient is the sum of k . dk over those.
    """

    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, log_decay: Tensor, first_token: Tensor | None) -> Tensor:
        fade = _fade_to_end(log_decay, first_token)
        B, T, H, K = k.shape
        state = fade.new_zeros(B, H, K, v.shape[-1])
        for part in _token_slices(k, v, fade):
            state += (k[:, part] * fade[:, part]).permute(0, 2, 3, 1) @ v[:, part].to(fade.dtype).transpose(1, 2)
        ctx.save_for_backward(k, v, log_decay, first_token)
        return state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dstate: Tensor) -> tuple[Tensor | None, ...]:
        k, v, log_decay, first_token = ctx.saved_tensors
        fade = _fade_to_end(log_decay, first_token)
        dk, dv = torch.empty_like(k), torch.empty_like(v)
        onto = torch.empty_like(log_decay)
        for part in _token_slices(k, v, fade):
            k_, v_ = (x[:, part].to(fade.dtype).transpose(1, 2) for x in (k, v))
            dk_ = (v_ @ dstate.transpose(-1, -2)).transpose(1, 2) * fade[:, part]
            dk[:, part] = dk_
            dv[:, part] = (k_ @ dstate).transpose(1, 2) * fade[:, part]
            onto[:, part] = (k_.transpose(1, 2) * dk_).sum(-1)
        return dk, dv, F.pad(onto, (0, 0, 1, 0))[:, :-1].cumsum(1), None


def _fade_to_end(log_decay: Tensor, first_token: Tensor | None) -> Tensor:
    """(B, T, H, 1) from each token to the end of the chunk; 0 if another document begins between."""
    later = log_decay.flip(1).cumsum(1).flip(1)  # from the end, where the sums that matter are small
    fade = F.pad(later, (0, 0, 0, 1))[:, 1:].exp()
    if first_token is not None and first_token.shape[1]:
        t = torch.arange(log_decay.shape[1], device=log_decay.device)
        fade = fade.masked_fill((t < first_token[:, -1:])[..., None], 0)
    return fade[..., None]


def _token_slices(k: Tensor, v: Tensor, fade: Tensor) -> list[slice]:
    """The chunk cut so that the wide copies of one slice stay small."""
    budget = GROUP_BYTES_CPU if k.device.type == "cpu" else GROUP_BYTES
    B, T, H, K = k.shape
    size = max(1, budget // (2 * B * H * (K + v.shape[-1]) * fade.element_size()))
    return [slice(start, min(start + size, T)) for start in range(0, T, size)]
