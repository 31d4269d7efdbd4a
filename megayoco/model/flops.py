"""Floating-point operations of a model, counted per mixer: the numerator of model FLOP utilisation.

Conventions. A product of an (m, k) and a (k, n) matrix is 2 m n k. Only matrix products count: norms, softmax, rotary,
gates and the embedding lookup do not. Only what the model needs counts: of causal attention the visible pairs of query
and key, not the masked half that some kernels compute; no second forward pass, neither of activation checkpointing nor
of a walk over bands. Counted is a sequence that is one document with a target in every row. Borders inside it
(`document_mask`) hide pairs, and a walk over bands leaves out rows without target; neither is taken off, so there the
utilisation comes out too high, and figures of different data do not compare. Cross-batch training of memory layers
exchanges windows of the sample for those of others; counted is the sample by itself. Backward needs two products for
each one of forward, so a training step is 3 x forward.

Per sequence of N tokens (D dim, F hidden_dim, V vocabulary, G kv heads, K head dim, W window, H_s self heads,
K_s = D / H_s; pairs(n) = n (n + 1) / 2; first, last: tokens of the first and last of the chunks of RETENTION_CHUNK):

    feed-forward         6 D F N                               three matrices
    full attention       (4 D D + 4 D G K) N + 4 D pairs(N)    q, out; k, v; then q k and p v of every visible pair
    window attention     8 D D N + 4 D P                       P = pairs(N) - pairs(N - W): a query sees at most W keys
    memory attention     (4 D D + 4 D G_m K_m) N + 4 D pairs(N)   G_m, K_m: kv heads, head dim of memory layers
    inside windows       the same with P in place of pairs(N): P = pairs within each window of `memory_window`
    retention            (10 D D + 2 D H_s) N + 4 D P          q, k, v, g, out; decay; P = pairs within each chunk
                         + 2 D K_s (N - first) + 2 D K_s (N - last)
                                                               the state is read by all but the first chunk and
                                                               written by all but the last
    shared keys, values  4 D G K N
    cross attention      4 D D N + 4 D pairs(N)                q, out
    head                 2 D V N
"""

from megayoco.config import ModelConfig

RETENTION_CHUNK = 256
"""Tokens per chunk in the count of retention: the official kernel's. A constant, so that the count is the model's and
not the implementation's."""


def visible_pairs(sequence_length: int, window: int | None = None) -> int:
    """Pairs of a query and a key that it sees, itself included: causal, and at most `window` keys per query."""
    pairs = sequence_length * (sequence_length + 1) // 2
    beyond = 0 if window is None else max(sequence_length - window, 0)
    return pairs - beyond * (beyond + 1) // 2


def block_pairs(sequence_length: int, block: int | None) -> int:
    """Pairs of a query and a key that it sees, itself included, where every `block` tokens are by themselves."""
    if block is None:
        return visible_pairs(sequence_length)
    whole, rest = divmod(sequence_length, block)
    return whole * visible_pairs(block) + visible_pairs(rest)


def forward_flops(model: ModelConfig, sequence_length: int) -> dict[str, int]:
    """Operations of one forward pass over one sequence, by part: the layer kinds present, feed_forward, head."""
    pattern = model.layer_pattern()
    parts = {kind: pattern.count(kind) * _mixer(model, kind, sequence_length) for kind in dict.fromkeys(pattern)}
    parts["feed_forward"] = model.layers * _feed_forward(model, sequence_length)
    parts["head"] = _head(model, sequence_length)
    return parts


def block_flops(model: ModelConfig, sequence_length: int) -> list[int]:
    """The same, block by block in stack order: embedding (0), every entry of `layer_pattern()`, head."""
    layers = [
        _mixer(model, kind, sequence_length) + (kind != "shared_kv") * _feed_forward(model, sequence_length)
        for kind in model.layer_pattern()
    ]
    return [0, *layers, _head(model, sequence_length)]


def flops_per_sequence(model: ModelConfig, sequence_length: int) -> int:
    """Operations of one forward pass over one sequence."""
    return sum(forward_flops(model, sequence_length).values())


def training_flops_per_sequence(model: ModelConfig, sequence_length: int) -> int:
    """Operations of forward and backward over one sequence: backward is twice forward."""
    return 3 * flops_per_sequence(model, sequence_length)


def _mixer(model: ModelConfig, kind: str, N: int) -> int:
    D, kv_dim = model.dim, model.num_kv_heads * model.head_dim
    if kind == "retention":
        return _retention(model, N)
    if kind == "window":
        return 8 * D * D * N + 4 * D * visible_pairs(N, model.window)
    if kind == "shared_kv":
        return 4 * D * kv_dim * N
    if kind == "cross":
        return 4 * D * D * N + 4 * D * visible_pairs(N)
    if kind == "full":
        return (4 * D * D + 4 * D * kv_dim) * N + 4 * D * visible_pairs(N)
    if kind in ("memory", "block"):
        pairs = visible_pairs(N) if kind == "memory" else block_pairs(N, model.memory_window)
        return (4 * D * D + 4 * D * model.memory_kv_dim) * N + 4 * D * pairs
    raise ValueError(f"no operation count for the layer kind {kind!r}")


def _feed_forward(model: ModelConfig, N: int) -> int:
    return 6 * model.dim * model.hidden_dim * N


def _head(model: ModelConfig, N: int) -> int:
    return 2 * model.dim * model.vocab_size * N


def _retention(model: ModelConfig, N: int) -> int:
    D, C = model.dim, RETENTION_CHUNK
    pairs = block_pairs(N, C)
    first, last = min(N, C), N % C or min(N, C)
    projections = (10 * D * D + 2 * D * model.num_self_heads) * N
    return projections + 4 * D * pairs + 2 * D * model.self_head_dim * (2 * N - first - last)
