"""Cross attention: every layer of the cross-decoder reads the keys and values that the shared-KV layer made once.

Shapes: B batch, T tokens of the chunk, S tokens so far (the chunk's included), D model dim,
        H query heads, G key-value heads, K head dim; h and g count the heads of one tensor rank.
Left context: KeyValues, both (B, S, g, K). An argument, never an attribute: checkpointing and pipeline stages must see
        every tensor that carries a gradient. Or, in training by bands, the KeyValueStore of the whole sequence up to
        the chunk's last token, which sums its own gradients; then the positions may be any rows of the chunk. Inference
        keeps them in a KeyValueCache.
Source: YOCO, arXiv 2405.05254, "Cross-Decoder".
"""

from __future__ import annotations

from torch import Tensor, nn

from megayoco.layers.context import KeyValues, Positions, Rotary
from megayoco.layers.linear import Builder, ColumnLinear, Init, RowLinear
from megayoco.ops.attention import causal_attention
from megayoco.ops.attention_store import KeyValueStore, attention_over_store, plan_queries
from megayoco.ops.key_value_cache import KeyValueCache, attention_over_cache
from megayoco.parallel.collectives import sum_gradient


class CrossAttention(nn.Module):
    """(x, positions, left) -> (y, right). Adds no keys of its own, so right is left."""

    def __init__(self, dim: int, heads: int, rotary: Rotary, name: str, init: Init, builder: Builder) -> None:
        super().__init__()
        self.head_dim = dim // heads
        self.rotary = rotary
        self.group = builder.group
        self.q_proj = ColumnLinear(dim, dim, f"{name}.q_proj", init, builder)
        self.out_proj = RowLinear(dim, dim, f"{name}.out_proj", init, builder)

    def forward(
        self, x: Tensor, positions: Positions, left: KeyValues | KeyValueStore | KeyValueCache
    ) -> tuple[Tensor, KeyValues | KeyValueStore | KeyValueCache]:
        x = sum_gradient(x, self.group)
        q_BThK = self.rotary(self.q_proj(x), positions)
        scale = self.head_dim**-0.5
        if isinstance(left, KeyValueStore):
            # the store begins with the sequence: a key's number is its global index
            index = None if positions.consecutive else positions.index
            plan = positions.once(
                ("plan", left.tokens), lambda: plan_queries(x.shape[1], left.tokens, index, positions.start)
            )
            y_BThK = attention_over_store(
                q_BThK, left, scale=scale, query_index=index, first_key=positions.start, plan=plan
            )
        elif isinstance(left, KeyValueCache):
            first_key = positions.first_visible(left.tokens - x.shape[1])
            y_BThK = attention_over_cache(q_BThK, left, scale=scale, first_key=first_key)
        else:
            # the keys hold the chunk's own tokens too
            first_key = positions.first_visible(left.key.shape[1] - x.shape[1])
            y_BThK = causal_attention(q_BThK, left.key, left.value, scale=scale, first_key=first_key)
        return self.out_proj(y_BThK.flatten(2)), left
