"""Causal attention of some queries over a store of keys and values that collects its own gradients.

The cross-decoder's layers all read one pair of keys and values. Chunked training keeps that pair, without a graph, next
to its gradient in fp32; each chunk's backward adds to it in place. The store is no input of the graph, so autograd
never makes a gradient of its length, let alone one per layer.

Shapes: B batch, R queries (all, some or none of a chunk's tokens), N tokens of the sequence, S tokens of the store at
        hand, H query heads, g key-value heads of this tensor rank, K head dim.
Memory: beyond the store, a forward needs O(R H K), a backward that and the gradients of one slice of keys; on CUDA
        flash kernels widen the latter to H heads. Nothing has the store's length.
Order:  slices are visited in a fixed order, so sums over them are bit-equal from run to run wherever the kernels are:
        on CPU always; on CUDA dq needs torch.use_deterministic_algorithms.
Source: YOCO, arXiv 2405.05254, "Cross-Decoder"; FlashAttention-2, arXiv 2307.08691.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megayoco.ops.attention_parts import (
    Part,
    Rows,
    backward_by_parts,
    dense_heads,
    forward_by_parts,
    plan_parts,
)
from megayoco.ops.backends import attention_backend

KEYS_PER_SLICE, KEYS_PER_SLICE_CUDA = 4096, 16384
"""Keys whose gradients a backward holds at once: few beside any store, enough to keep a kernel busy. On CPUs 1024 to
16384 are equal within 7 %; on CUDA more are needed to fill the device, and no shorter slice has been measured."""


@dataclass(eq=False)
class KeyValueStore:
    """Shared keys and values, and the sums of their gradients. Its owner writes the former and reads the latter.

    Args:
        key, value: (B, N, g, K) in the compute dtype, keys rotated; they must not require grad.
        dkey, dvalue: (B, N, g, K), fp32 or, for float64 keys, float64; None where no backward will follow.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or key or value require grad.
    """

    key: Tensor
    value: Tensor
    dkey: Tensor | None = None
    dvalue: Tensor | None = None

    def __post_init__(self) -> None:
        tensors = [x for x in (self.key, self.value, self.dkey, self.dvalue) if x is not None]
        if self.key.dim() != 4 or any(x.shape != self.key.shape for x in tensors):
            raise ValueError(f"all tensors of a store are (B, N, g, K), got {[tuple(x.shape) for x in tensors]}")
        if any(x.device != self.key.device for x in tensors):
            raise ValueError(f"a store lies on one device, got {[str(x.device) for x in tensors]}")
        if not self.key.dtype == self.value.dtype or not self.key.is_floating_point():
            raise ValueError(
                f"keys and values must have one floating-point dtype, got {self.key.dtype}, {self.value.dtype}"
            )
        if (self.dkey is None) != (self.dvalue is None):
            raise ValueError("a store has the gradients of both keys and values, or of neither")
        if any(x.dtype != gradient_dtype(self.key.dtype) for x in tensors[2:]):
            raise ValueError(f"gradients of {self.key.dtype} keys are summed in {gradient_dtype(self.key.dtype)}")
        if any(x.shape[3] > 1 and x.stride(3) != 1 for x in tensors):
            raise ValueError("the elements of a head must lie next to each other")
        if self.key.requires_grad or self.value.requires_grad:
            raise ValueError("keys and values of a store must not require grad: their gradients go to dkey and dvalue")

    @staticmethod
    def allocate(
        batch_size: int,
        tokens: int,
        heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        gradients: bool = True,
    ) -> KeyValueStore:
        """A store of `tokens` = N tokens: keys and values uninitialised, gradients (if wanted) zero."""
        shape = (batch_size, tokens, heads, head_dim)
        store = KeyValueStore(*(torch.empty(shape, dtype=dtype, device=device) for _ in range(2)))
        if gradients:
            store.allocate_gradients()
        return store

    def allocate_gradients(self) -> None:
        """Gradients of zero, in place of any before."""
        self.dkey, self.dvalue = (torch.zeros_like(self.key, dtype=gradient_dtype(self.key.dtype)) for _ in range(2))

    @property
    def tokens(self) -> int:
        """N."""
        return self.key.shape[1]

    def between(self, start: int, end: int) -> KeyValueStore:
        """The tokens start .. end-1. Shares memory: what is written to or added into the part is in the whole."""
        if not 0 <= start <= end <= self.tokens:
            raise ValueError(f"tokens {start} to {end} of a store of {self.tokens}")
        # without a graph, so that views made inside a training step are not tracked
        parts = (x if x is None else x.detach()[:, start:end] for x in (self.key, self.value, self.dkey, self.dvalue))
        return KeyValueStore(*parts)  # type: ignore[arg-type]

    def upto(self, end: int) -> KeyValueStore:
        """The first `end` tokens; shares memory."""
        return self.between(0, end)


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """What gradients of keys and values are summed in: fp32, or float64 for float64. A bf16 sum over 64 chunks would be
    off by 1 %."""
    return torch.promote_types(dtype, torch.float32)


def attention_over_store(
    q: Tensor,
    store: KeyValueStore,
    *,
    scale: float,
    query_index: Tensor | None = None,
    first_key: Tensor | None = None,
    keys_per_slice: int | None = None,
    plan: list[Part] | None = None,
) -> Tensor:
    """Softmax attention of R queries over a store; its backward returns dq and adds into store.dkey and store.dvalue.

    Args:
        q: (B, R, H, K) in the store's dtype, rotary applied; R may be 0.
        store: S tokens; query head h reads key-value head h // (H // g). Must not be written to between forward and
            backward; its gradients are complete when every backward over it has run.
        scale: factor of the scores, usually K ** -0.5.
        query_index: (B, R) int64 in 0 .. S-1, not descending along R: the token of the store that each query is, and
            the last that it sees. Any subset of tokens; queries that pad a batch entry may repeat an index. None: the
            queries are the last R tokens.
        first_key: (B, R) int64, not descending: the earliest token each query may see (its document's start), at most
            the query's own. None: token 0.
        keys_per_slice: keys whose gradients the backward holds at once; None chooses.
        plan: what plan_queries gave for the same queries, so that layers share it.

    Returns:
        (B, R, H, K) in q's dtype. Scores, softmax and merging are fp32 or wider. Not twice differentiable.

    Raises:
        ValueError: shapes, dtypes, devices or indices disagree; or grad mode is on and the store's gradients would be
            lost: it has no buffers, or q does not require grad.
    """
    _check(q, store, query_index, first_key, keys_per_slice)
    rows = Rows(store.tokens, query_index, first_key)
    parts = plan_queries(q.shape[1], store.tokens, query_index, first_key) if plan is None else plan
    backend = attention_backend(q, None)
    if not torch.is_grad_enabled():
        return _forward(q, store, rows, scale, parts, backend)[1]
    keys_per_slice = keys_per_slice or (KEYS_PER_SLICE_CUDA if q.is_cuda else KEYS_PER_SLICE)
    return _StoreAttention.apply(q, store, rows, scale, parts, keys_per_slice, backend)  # type: ignore[no-any-return, no-untyped-call]


def plan_queries(
    queries: int, tokens: int, query_index: Tensor | None = None, first_key: Tensor | None = None
) -> list[Part]:
    """How attention_over_store cuts the work of R = `queries` queries over `tokens` = S tokens of a store.

    With indices or documents it reads them, and waits for a GPU to have them: layers that ask the same should share it.
    """
    return plan_parts(queries, Rows(tokens, query_index, first_key)) if queries else []


def attention_over_store_naive(
    q: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    query_index: Tensor | None = None,
    first_key: Tensor | None = None,
) -> Tensor:
    """The same over plain keys and values (B, S, g, K), with a dense (B, H, R, S) mask: differentiable in all three."""
    (_, R, H, _), (_, S, G, _) = q.shape, key.shape
    index = torch.arange(S - R, S, device=q.device)[None] if query_index is None else query_index
    first = torch.zeros_like(index) if first_key is None else first_key
    token = torch.arange(S, device=q.device)
    visible = (first[..., None] <= token) & (token <= index[..., None])
    wide = torch.promote_types(q.dtype, torch.float32)
    k, v = (x.to(wide).repeat_interleave(H // G, dim=2) for x in (key, value))
    scores_BHRS = torch.einsum("brhk,bshk->bhrs", q.to(wide), k) * scale
    p_BHRS = scores_BHRS.masked_fill(~visible[:, None], -torch.inf).softmax(-1)
    return torch.einsum("bhrs,bshk->brhk", p_BHRS, v).to(q.dtype)


def _forward(
    q: Tensor, store: KeyValueStore, rows: Rows, scale: float, parts: list[Part], backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """q as kernels read it, the output, and the log-sum-exp (B, H, R)."""
    q = dense_heads(q)
    return q, *forward_by_parts(
        q, store.key, store.value, rows, scale=scale, window=None, parts=parts, backend=backend
    )  # fmt: skip


class _StoreAttention(torch.autograd.Function):
    """Saves q, the output and the log-sum-exp of every row; keys and values stay in the store."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        store: KeyValueStore,
        rows: Rows,
        scale: float,
        parts: list[Part],
        keys_per_slice: int,
        backend: str,
    ) -> Tensor:
        q, out, lse = _forward(q, store, rows, scale, parts, backend)
        ctx.save_for_backward(q, out, lse)
        ctx.options = store, rows, scale, parts, keys_per_slice, backend
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, out, lse = ctx.saved_tensors
        store, rows, scale, parts, keys_per_slice, backend = ctx.options
        dq = backward_by_parts(
            dense_heads(dout), q, store.key, store.value, out, lse, store.dkey, store.dvalue, rows, scale=scale,
            window=None, parts=parts, backend=backend, keys_per_slice=keys_per_slice,
        )  # fmt: skip
        return dq, None, None, None, None, None, None


def _check(
    q: Tensor, store: KeyValueStore, query_index: Tensor | None, first_key: Tensor | None, keys_per_slice: int | None
) -> None:
    if q.dim() != 4 or (q.shape[0], q.shape[3]) != (store.key.shape[0], store.key.shape[3]):
        raise ValueError(f"q is (B, R, H, K), the store (B, S, g, K); got {tuple(q.shape)}, {tuple(store.key.shape)}")
    (B, R, H, _), (_, S, G, _) = q.shape, store.key.shape
    if H % G:
        raise ValueError(f"{H} query heads cannot share {G} key-value heads: no multiple")
    if q.dtype != store.key.dtype or q.device != store.key.device:
        raise ValueError(f"q is {q.dtype} on {q.device}, the store {store.key.dtype} on {store.key.device}")
    for name, x in (("query_index", query_index), ("first_key", first_key)):
        if x is not None and (x.shape != (B, R) or x.dtype != torch.int64):
            raise ValueError(f"{name} must be int64 ({B}, {R}), got {x.dtype} {tuple(x.shape)}")
    if query_index is None and R > S:
        raise ValueError(f"the {R} queries are the last of the {S} tokens: R <= S, or give query_index")
    if keys_per_slice is not None and keys_per_slice < 1:
        raise ValueError(f"keys_per_slice must be at least 1, got {keys_per_slice}")
    if torch.is_grad_enabled() and store.dkey is None:
        raise ValueError("the store has no buffers for gradients: allocate them, or compute under torch.no_grad()")
    if torch.is_grad_enabled() and not q.requires_grad:
        raise ValueError("q does not require grad, so the store would get none: make it, or use torch.no_grad()")
