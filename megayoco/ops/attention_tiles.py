"""One rectangle of attention scores, forward and backward, with the log-sum-exp of every row as in- and output.

Shapes: q, out (B, T, H, K); k, v (B, S, G, K); lse (B, H, T) in fp32 (float64 for float64 inputs), natural log.
The backward takes out and lse as arguments: given those of a larger softmax, it returns this rectangle's exact share.
Backends: "cpu_flash", torch's CPU kernel: squares, rectangles and added masks; "torch_flash", torch's CUDA kernel for
          fp16 and bf16: causal bottom-right and windows by itself, no masks; "math", matrix products, everything.
"""

from __future__ import annotations

import torch
from torch import Tensor

aten = torch.ops.aten


def tile_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool,
    window: int | None,
    mask: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(out in q's dtype, lse) of a rectangle in which every row sees a key.

    causal is aligned bottom-right; with cpu_flash it is for squares only. window is applied by torch_flash to causal
    rectangles; otherwise it is part of mask, (1 or B, 1, T, S), which is added to the scores.
    """
    if backend == "cpu_flash":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
        return out.transpose(1, 2), lse
    if backend == "torch_flash" and mask is None:
        out, lse, *_ = aten._flash_attention_forward(
            q, k, v, None, None, q.shape[1], k.shape[1], 0.0, causal, False, scale=scale,
            **_flash_window(causal, window),
        )  # fmt: skip
        return out, lse
    _, scores = _scores(q, k, scale, causal, mask)
    lse = scores.logsumexp(-1)
    out = (scores - lse[..., None]).exp_() @ _by_group(v, v.shape[2])
    return out.flatten(1, 2).transpose(1, 2).to(q.dtype), lse.flatten(1, 2)


def tile_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
    window: int | None,
    mask: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of the rectangle in the layouts of q, k, v; dk and dv summed over the query heads of each group."""
    if backend == "cpu_flash":
        heads = (x.transpose(1, 2) for x in (dout, q, k, v, out))
        gradients = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *heads, lse, 0.0, causal, attn_mask=mask, scale=scale
        )
        dq, dk, dv = (x.transpose(1, 2) for x in gradients)
        return dq, dk, dv
    if backend == "torch_flash" and mask is None:
        no_dropout = q.new_empty(2, dtype=torch.uint64)  # state of a random generator that is not used
        dq, dk, dv = aten._flash_attention_backward(
            dout.contiguous(), q, k, v, out.contiguous(), lse.contiguous(), None, None, q.shape[1], k.shape[1], 0.0,
            causal, no_dropout, no_dropout, scale=scale, **_flash_window(causal, window),
        )  # fmt: skip
        return dq, dk, dv
    q_BGRTK, scores = _scores(q, k, scale, causal, mask)
    G = k.shape[2]
    p_BGRTS = (scores - lse.reshape(scores.shape[:-1])[..., None]).exp_()
    dout_, out_ = _by_group(dout, G), _by_group(out, G)
    dv = torch.einsum("bgrts,bgrtk->bsgk", p_BGRTS, dout_)
    dp = dout_ @ _by_group(v, G).transpose(-1, -2)
    ds = p_BGRTS * (dp - (dout_ * out_).sum(-1, keepdim=True)) * scale
    dq = (ds @ _by_group(k, G)).flatten(1, 2).transpose(1, 2)
    dk = torch.einsum("bgrts,bgrtk->bsgk", ds, q_BGRTK)
    return dq, dk, dv


def _flash_window(causal: bool, window: int | None) -> dict[str, int | None]:
    # flash counts the tokens left of the query, a window of W tokens counts the query too
    if not causal or window is None:
        return {"window_size_left": None, "window_size_right": None}
    return {"window_size_left": window - 1, "window_size_right": 0}


def _by_group(x: Tensor, groups: int) -> Tensor:
    """(B, tokens, heads, K) to (B, groups, heads / groups, tokens, K) in fp32 or wider."""
    B, tokens, heads, K = x.shape
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x.transpose(1, 2).reshape(B, groups, heads // groups, tokens, K)


def _scores(q: Tensor, k: Tensor, scale: float, causal: bool, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """q by group and the scores (B, G, H / G, T, S), both fp32 or wider."""
    T, S, G = q.shape[1], k.shape[1], k.shape[2]
    q_BGRTK = _by_group(q, G)
    scores = q_BGRTK @ _by_group(k, G).transpose(-1, -2) * scale
    if causal:
        future = torch.ones(T, S, dtype=torch.bool, device=q.device).triu(1 + S - T)
        scores.masked_fill_(future, -torch.inf)
    if mask is not None:
        scores += mask[:, :, None]
    return q_BGRTK, scores
