"""One rectangle of attention scores, forward and backward, with the log-sum-exp of every row as in- and output.

Shapes: everything is (B, heads, tokens, K) here; lse is (B, H, T) in fp32 (float64 for float64 inputs), natural log.
The backward takes out and lse as arguments: given those of a larger softmax, it returns this rectangle's exact share.
"""

from __future__ import annotations

import torch
from torch import Tensor


def tile_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(out (B, H, T, K) in q's dtype, lse (B, H, T)). causal only for squares; no row may be without a visible key."""
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=mask, scale=scale
        )
        return out, lse
    q_BGRTK, scores = _scores(q, k, scale, causal, mask)
    lse = scores.logsumexp(-1)
    out = (scores - lse[..., None]).exp_() @ v.to(scores.dtype)[:, :, None]
    return out.flatten(1, 2).to(q.dtype), lse.flatten(1, 2)


def tile_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of the rectangle, dk and dv summed over the query heads of each key-value head."""
    if q.device.type == "cpu":
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale
        )
        return dq, dk, dv
    q_BGRTK, scores = _scores(q, k, scale, causal, mask)
    wide, groups = scores.dtype, (k.shape[1], -1)
    p = (scores - lse.unflatten(1, groups)[..., None]).exp_()
    dout_, out_ = (x.unflatten(1, groups).to(wide) for x in (dout, out))
    dv = torch.einsum("bgrts,bgrtk->bgsk", p, dout_)
    dp = dout_ @ v.to(wide)[:, :, None].transpose(-1, -2)
    ds = p * (dp - (dout_ * out_).sum(-1, keepdim=True)) * scale
    dq = (ds @ k.to(wide)[:, :, None]).flatten(1, 2)
    dk = torch.einsum("bgrts,bgrtk->bgsk", ds, q_BGRTK)
    return dq, dk, dv


def _scores(q: Tensor, k: Tensor, scale: float, causal: bool, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    q_BGRTK = q.unflatten(1, (k.shape[1], -1)).to(wide)
    scores = q_BGRTK @ k.to(wide)[:, :, None].transpose(-1, -2) * scale
    if causal:
        future = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
        scores.masked_fill_(future, -torch.inf)
    if mask is not None:
        scores += mask[:, :, None]
    return q_BGRTK, scores
