"""What a training step keeps between forward and backward: bytes on one rank, item by item.

Counted are the tensors that the code makes, so a change of what a layer saves is a change here; tests compare with
measured peaks. Not counted: fragmentation, the libraries' own workspaces, buffers of collectives.

Shapes: B sequences of a micro-batch, T tokens of this rank at a time, N tokens of the sequence, P ranks that share it,
        n bands, C = N / (P n) tokens of a chunk, R rows of the cross half at a time, D model dim, F feed-forward dim,
        H heads, G key-value heads, K head dim, V vocabulary, W window, t tensor ranks, w bytes of a number, and
        a = max(w, 4) of a sum or a state.

A layer keeps for each token (numbers of w bytes; its input x is the residual stream, its output the next one's x):

    residual, norms     4 D           x, norm(x); x + mixer, norm of it. On a GPU 2 D more: the norm before its weight
    feed-forward        4 F/t         gate, silu(gate), up, their product
    retention           8 D/t         q, k, v, output, its norm, g, silu(g), their product
    window              4 D/t         q, k, v, output; before them the W-1 keys and values of the left context
    full                2 D/t + 2 GK/t   the same; with P > 1 the keys and values of all N tokens
    memory              2 D/t + 3 GK/t   q, output; keys, rotated keys, values; with P > 1 the keys and values of all N
                                         tokens, in cross-batch training this rank's behind them and another replica's
                                         before them
    block               2 D/t + 2 GK/t   the same without memory: rotated keys, values
    cross               2 D/t         q, output
    shared_kv           D + 2 GK/t    norm, keys, values

and further fp32 numbers: log-sum-exps, gates and norms of heads (a few H/t), YOCO's complex rotary factors (K per
rotated tensor, once for the batch), one retention state B H K^2 / t per group of pieces. A checkpointed layer keeps x;
one at a time has all of the above again.

The largest moment of a plain step is either the loss, with every layer's tensors and the head's, or the feed-forward of
the last layer going backward, which makes D + 2 F/t more per token than it has let go of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

from megayoco.config import CrossBatchConfig, ModelConfig
from megayoco.model.bands import ROWS, ROWS_CPU
from megayoco.ops import cross_entropy, retention
from megayoco.ops.attention_store import KEYS_PER_SLICE, KEYS_PER_SLICE_CUDA
from megayoco.ops.memory_attention import windows_before

SELF_LAYERS = ("retention", "window", "full", "memory", "block")


@dataclass(frozen=True, kw_only=True)
class Work:
    """All that the activations of a micro-batch depend on."""

    model: ModelConfig
    batch: int
    """B."""
    length: int
    """N."""
    width: int
    """w, bytes of a number of the compute dtype."""
    tensor: int = 1
    """t."""
    sequence: int = 1
    """P."""
    bands: int = 1
    """n."""
    order: str = "fused"
    checkpointing: bool = False
    gpu: bool = False
    cross_batch: CrossBatchConfig | None = None
    replicas: int = 1
    """Data-parallel ranks, which hand on negatives."""

    @property
    def wide(self) -> int:
        """a, bytes of a number that is summed over chunks: fp32 or wider."""
        return max(self.width, 4)

    @property
    def tokens(self) -> int:
        """Tokens of a sequence that this rank owns."""
        return self.length // self.sequence

    @property
    def chunk(self) -> int:
        """C."""
        return self.tokens // self.bands

    @property
    def kv_dim(self) -> int:
        """Numbers of a shared key on one tensor rank: heads fewer than ranks are replicated."""
        return max(self.model.num_kv_heads // self.tensor, 1) * self.model.head_dim

    @property
    def memory_kv_dim(self) -> int:
        """Numbers of a key of memory attention on one tensor rank."""
        heads, kv_heads = self.model.memory_heads
        return max(kv_heads // self.tensor, 1) * (self.model.dim // heads)

    @property
    def negatives(self) -> int:
        """Tokens of other replicas that a memory layer gets: those of the replica that gets most."""
        cross, window = self.cross_batch, self.model.memory_window
        if cross is None or cross.negatives != "neighbour" or window is None:
            return 0
        asked = windows_before(self.length // window, cross.range, cross.stepping) * window
        return min(asked, (self.replicas - 1) * self.batch * self.length)


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes of a step at its largest moment, by what they are."""

    layers: float = 0.0
    """Graph of the layers; with bands of one chunk's self half."""
    rows: float = 0.0
    """Bands: graph of one block of rows of the cross half."""
    loss: float = 0.0
    """Head: hidden states and their gradient, one chunk of logits, the gradient of its weight."""
    shared: float = 0.0
    """Shared keys and values where they lie outside the layers' graph: gathered, or in the store of the bands."""
    shared_gradients: float = 0.0
    """Their gradients."""
    contexts: float = 0.0
    """Left contexts at the borders of the bands."""
    hidden: float = 0.0
    """Hidden states between the halves (`band_order: split`), inputs and outputs of pipeline stages, token ids."""
    passing: float = 0.0
    """What the backward pass makes and drops at that moment."""
    gradient_sums: float = 0.0
    """Bands: gradients of the parameters summed over chunks in a bytes each, and one half's gradients of a chunk."""

    @property
    def total(self) -> float:
        """All of them."""
        return sum(getattr(self, item.name) for item in fields(self))


@dataclass(frozen=True)
class StageBlocks:
    """The blocks of one pipeline stage, from `embedding` over entries of `layer_pattern()` to `head`."""

    kinds: Sequence[str]
    in_flight: int = 1
    """Micro-batches that have gone forward and not yet backward, at most."""
    shared_in: bool = False
    """Whether the shared keys and values come from an earlier stage."""
    shared_out: bool = False
    """Whether they go on to a later one."""
    self_half: list[str] = field(init=False)
    cross: list[str] = field(init=False)

    def __post_init__(self) -> None:
        own = [kind for kind in self.kinds if kind in SELF_LAYERS or kind == "shared_kv"]
        object.__setattr__(self, "self_half", own)
        object.__setattr__(self, "cross", [kind for kind in self.kinds if kind == "cross"])

    @property
    def has_head(self) -> bool:
        return "head" in self.kinds


def whole_model(model: ModelConfig) -> StageBlocks:
    """All blocks on one rank."""
    return StageBlocks(["embedding", *model.layer_pattern(), "head"])


# -- one block ---------------------------------------------------------------------------------------------------------


def block_bytes(work: Work, kind: str, tokens: int) -> float:
    """What one block keeps of T = `tokens` tokens of every sequence, its input x included (not that of shared_kv: the
    layer behind it has the same)."""
    model, w, t = work.model, work.width, work.tensor
    D, B = model.dim, work.batch
    rows = B * tokens
    norm = rows * ((2 if work.gpu else 1) * D * w + 4)
    if kind == "shared_kv":
        return norm + rows * 2 * work.kv_dim * w + _rotary_bytes(work, tokens, model.head_dim, 1)
    kept = 2 * (norm + rows * D * w) + rows * 4 * model.hidden_dim / t * w
    if kind == "retention":
        H = model.num_self_heads / t
        kept += rows * (8 * D / t * w + 5 * H * 4) + _rotary_bytes(work, tokens, model.self_head_dim, 2)
        return kept + retention_states(work, tokens)
    if kind == "window":
        reach = min((model.window or 1) - 1, work.length - tokens)
        H = model.num_self_heads / t
        kept += rows * (4 * D / t * w + H * 4) + B * reach * 2 * D / t * w
        return kept + _rotary_bytes(work, tokens, model.self_head_dim, 2)
    if kind in ("memory", "block"):
        H = model.memory_heads[0] / t
        keys = 2 * _remembered(work, tokens) if kind == "memory" else rows
        kept += rows * (2 * D / t * w + H * 4) + (keys + rows) * work.memory_kv_dim * w
        return kept + _rotary_bytes(work, tokens, model.dim // model.memory_heads[0], 2)
    H = model.heads / t
    kept += rows * (2 * D / t * w + H * 4) + _rotary_bytes(work, tokens, model.head_dim, 1)
    if kind == "full":
        kept += B * tokens * work.sequence * 2 * work.kv_dim * w
    return kept


def _remembered(work: Work, tokens: int) -> int:
    """Tokens of which a memory layer keeps raw keys and values: all ranks', in cross-batch training with its own behind
    them, and those of another replica."""
    own = work.batch * tokens
    again = work.sequence > 1 and work.cross_batch is not None
    return own * work.sequence + (own if again else 0) + work.negatives


def _rotary_bytes(work: Work, tokens: int, head_dim: int, tensors: int) -> float:
    # the complex factors of neighbouring channels are made for each tensor; half-split layers share their tables
    return tensors * tokens * head_dim * 4 if work.model.rotary_layout == "interleaved" else 0.0


def retention_states(work: Work, tokens: int) -> float:
    """States that one retention layer keeps: one per group of pieces, and with P > 1 those of all ranks."""
    groups = -(-tokens // _group_tokens(work))
    return (groups + (work.sequence + 2 if work.sequence > 1 else 0)) * context_bytes(work, "retention")


def _piece(work: Work) -> int:
    return retention.CHUNK if work.gpu else retention.CHUNKS_CPU[work.model.self_head_dim > 128]


def _group_tokens(work: Work) -> int:
    C, K, H = _piece(work), work.model.self_head_dim, work.model.num_self_heads / work.tensor
    budget = retention.GROUP_BYTES if work.gpu else retention.GROUP_BYTES_CPU
    return C * max(1, int(budget // (work.batch * H * (2 * C * C + 2 * K * K) * work.wide)))


def context_bytes(work: Work, kind: str) -> float:
    """The left context of one self-decoder layer on one rank: a retention state; W-1 keys and values; nothing else."""
    model, B, t = work.model, work.batch, work.tensor
    if kind == "retention":
        return B * model.num_self_heads / t * (model.self_head_dim**2 + 1) * work.wide
    if kind == "window":
        return B * _carried(work) * 2 * model.dim / t * work.width
    return 0.0


def _carried(work: Work) -> int:
    """Tokens of a window's context that a rank keeps between bands: its own as far as a later band asks for them, as in
    parallel/sequence.py."""
    C, reach = work.chunk, (work.model.window or 1) - 1
    hops = -(-reach // C)
    if hops == 0:
        return 0
    chunks = -(-hops // work.sequence)
    farthest = (chunks - 1) * work.sequence + 1 == hops
    return (chunks - 1) * C + (reach - (hops - 1) * C if farthest else C)


def backward_bytes(work: Work, tokens: int) -> float:
    """What a layer's feed-forward makes on its way back, beyond what it lets go of: the gradients of its output, of
    silu(gate), up and their product, less that product."""
    return work.batch * tokens * (work.model.dim + 2 * work.model.hidden_dim / work.tensor) * work.width


def mixer_backward_bytes(work: Work, kind: str, tokens: int) -> float:
    """The same of a mixer, beyond what its layer's feed-forward let go of before; below zero where that was more."""
    model, B, w, t = work.model, work.batch, work.width, work.tensor
    D, rows = model.dim, B * tokens
    freed = rows * ((3 if work.gpu else 2) * D + 4 * model.hidden_dim / t) * w
    made = rows * (D + D / t) * w  # the gradients of the layer's input so far and of the mixer's output
    if kind == "retention":
        # what stands between its output and the layer's is done with; dq, dk, dv; and one group of pieces in a bytes:
        # q, k, v, dy, their gradients and a product, fades, scores and their gradient, states and theirs
        freed += rows * 5 * D / t * w
        made += rows * (D + 3 * D / t) * w
        C, K, H = _piece(work), model.self_head_dim, model.num_self_heads / t
        pieces = -(-min(_group_tokens(work), tokens) // C)
        return made + pieces * B * H * (3 * C * C + 8 * C * K + 2 * K * K) * work.wide - freed
    # dq in fp32 and in w bytes; dk and dv, on a GPU for every query head
    made += rows * D / t * (work.wide + w)
    if kind in ("memory", "block"):
        return made + _memory_backward_bytes(work, kind, tokens) - freed
    keys = tokens * work.sequence
    if kind == "cross" and work.bands > 1:  # the rows see all that stands left of them, a slice at a time
        keys = min(work.length, KEYS_PER_SLICE_CUDA if work.gpu else KEYS_PER_SLICE)
    elif kind == "window" and not work.gpu:
        keys = min(keys, KEYS_PER_SLICE)
    made += B * keys * 2 * (D / t if work.gpu else work.kv_dim) * w
    if kind == "full" and work.sequence > 1:
        made += B * keys * 2 * work.kv_dim * 2 * work.wide
    return made - freed


def _memory_backward_bytes(work: Work, kind: str, tokens: int) -> float:
    """The sums of the gradients of keys, rotated keys and values, and what one part of them is made of: dq and the
    gradients of its keys, at most those of a slice of the memory."""
    model, B, t = work.model, work.batch, work.tensor
    window = min(model.memory_window or 1, tokens)
    keys = window
    if kind == "memory":
        keys = max(window, min(tokens - window, KEYS_PER_SLICE_CUDA if work.gpu else KEYS_PER_SLICE))
    part = B * window * model.dim / t * (work.wide + 2 * work.width)
    part += B * keys * 2 * (model.dim / t if work.gpu else work.memory_kv_dim) * work.width
    sums = 2 * _remembered(work, tokens) if kind == "memory" else B * tokens
    made = (B * tokens + sums) * work.memory_kv_dim * work.wide + part
    if kind == "block" or work.sequence == 1:
        return made
    # then on their way to the other ranks: as they are, filled up to all tokens, and one of them once more in a bytes
    return max(made, B * tokens * work.sequence * work.memory_kv_dim * (4 * work.width + work.wide))


def loss_bytes(work: Work, tokens: int) -> float:
    """Head: x, its norm, the gradient of that, logits of one chunk of rows, the gradient of the weight."""
    model, w = work.model, work.width
    v, D, rows = model.vocab_size / work.tensor, model.dim, work.batch * tokens
    if work.gpu:
        chunk = max(1, int(cross_entropy.CHUNK_BYTES // (4 * v)))
    else:
        chunk = max(1, min(int(cross_entropy.CHUNK_BYTES_CPU // (4 * v)), cross_entropy.CHUNK_TOKENS_CPU))
    logits = min(rows, chunk) * v * (work.wide + (w if w < 4 else 0))
    # the GPU's matrix product with fp32 sums has no in-place form
    weight = v * D * work.wide * (2 if work.gpu and w < 4 else 1)
    return rows * (4 if work.gpu else 3) * D * w + logits + weight


# -- the shared keys and values ----------------------------------------------------------------------------------------


def shared_bytes(work: Work) -> float:
    """K and V of the whole sequence: 2 B N G K / t numbers of w bytes."""
    return work.batch * work.length * 2 * work.kv_dim * work.width


def shared_gradient_bytes(work: Work) -> float:
    """dK and dV of the whole sequence in fp32: 2 B N G K / t numbers of a bytes."""
    return work.batch * work.length * 2 * work.kv_dim * work.wide


def boundary_bytes(work: Work, blocks: StageBlocks) -> float:
    """Left contexts of all self layers before each of the n bands. A window has none before the first band and grows to
    its full size over the first few."""
    total = 0.0
    for kind in blocks.self_half:
        whole = context_bytes(work, kind)
        if kind == "window":
            carried = max(_carried(work), 1)
            total += whole * sum(min(band * work.chunk, carried) for band in range(work.bands)) / carried
        else:
            total += whole * work.bands
    return total


# -- a whole stage -----------------------------------------------------------------------------------------------------


def step_activations(work: Work, blocks: StageBlocks, parameters: tuple[float, float] = (0.0, 0.0)) -> Activations:
    """The largest moment of a step on the rank that holds `blocks`.

    Args:
        parameters: numbers of this rank's parameters in front of the cross layers, and in them with the head; a walk
            over bands keeps the sums of their gradients.
    """
    if work.bands > 1:
        return _banded(work, blocks, parameters)
    return _checkpointed(work, blocks) if work.checkpointing else _plain(work, blocks)


def _plain(work: Work, blocks: StageBlocks) -> Activations:
    T, kinds = work.tokens, [*blocks.self_half, *blocks.cross]
    layers = sum(block_bytes(work, kind, T) for kind in kinds) * blocks.in_flight
    loss = loss_bytes(work, T) if blocks.has_head else 0.0
    last = kinds[-1] if kinds else None
    passing = 0.0
    if last is not None:
        passing = max(backward_bytes(work, T), mixer_backward_bytes(work, last, T))
    shared, gradients = _gathered(work, blocks)
    return Activations(
        layers=layers,
        shared=shared * blocks.in_flight,
        shared_gradients=gradients,
        hidden=_flow(work, blocks),
        **_larger(loss, passing),
    )


def _checkpointed(work: Work, blocks: StageBlocks) -> Activations:
    T, model = work.tokens, work.model
    x = work.batch * T * model.dim * work.width
    layers = [kind for kind in [*blocks.self_half, *blocks.cross] if kind != "shared_kv"]
    made = work.batch * T * 2 * work.kv_dim * work.width if "shared_kv" in blocks.self_half else 0.0
    kept = (len(layers) * x + made) * blocks.in_flight
    largest = 0.0
    for number, kind in enumerate(layers):
        again = block_bytes(work, kind, T) - x
        # the layers behind it are done with; the shared gradients are under way as long as cross layers are
        done = (len(layers) - 1 - number) * x
        gradients = made if kind == "cross" and done else 0.0
        passing = max(backward_bytes(work, T), mixer_backward_bytes(work, kind, T))
        largest = max(largest, again + passing + gradients - done)
    loss = loss_bytes(work, T) if blocks.has_head else 0.0
    shared, gradients = _gathered(work, blocks)
    return Activations(
        layers=kept,
        shared=shared * blocks.in_flight,
        shared_gradients=gradients,
        hidden=_flow(work, blocks),
        **_larger(loss, largest),
    )


def _larger(loss: float, passing: float) -> dict[str, float]:
    return {"loss": loss} if loss > passing else {"passing": passing}


def _gathered(work: Work, blocks: StageBlocks) -> tuple[float, float]:
    """Keys and values of other ranks, and their gradients: those of a layer in fp32 and in w bytes, and their sum."""
    if work.sequence == 1 or not blocks.cross:
        return 0.0, 0.0
    return shared_bytes(work), shared_gradient_bytes(work) + 2 * shared_bytes(work)


def _flow(work: Work, blocks: StageBlocks) -> float:
    """Token ids, targets and document starts; with several stages what came in and what goes out."""
    ids = work.batch * work.tokens * 24.0
    received = 0.0 if "embedding" in blocks.kinds else wire_bytes(work, blocks.shared_in)
    sent = 0.0 if blocks.has_head else wire_bytes(work, blocks.shared_out)
    return ids + (received + sent) * blocks.in_flight


def wire_bytes(work: Work, shared: bool) -> float:
    """What goes from stage to stage for a micro-batch: hidden states, and the shared keys and values where they do."""
    return work.batch * work.tokens * (work.model.dim + (2 * work.kv_dim if shared else 0)) * work.width


def _banded(work: Work, blocks: StageBlocks, parameters: tuple[float, float]) -> Activations:
    """A walk over bands (model/bands.py): what stays for all of it, and the largest of its moments: a block of rows of
    the cross half on top of the self half's graph, or that graph going backward, each at its beginning or its end."""
    C, w, D, B = work.chunk, work.width, work.model.dim, work.batch
    R = min(ROWS if work.gpu else ROWS_CPU, C)
    cross, own = blocks.cross, blocks.self_half
    store = shared_bytes(work) if cross else 0.0
    gradients = shared_gradient_bytes(work) if cross else 0.0
    contexts = boundary_bytes(work, blocks)
    walks = 1 if blocks.has_head else blocks.in_flight
    chunk = B * C * D * w
    # the hidden states between the halves close the graph of the self half
    graph, back = (_checkpointed_half if work.checkpointing else _half)(work, own)
    graph += chunk
    rows = sum(block_bytes(work, kind, R) for kind in cross)
    loss = loss_bytes(work, R) if blocks.has_head else B * R * D * w
    last = cross[-1:] if cross else []
    passing = max([0.0, backward_bytes(work, R), *(mixer_backward_bytes(work, kind, R) for kind in last)])
    split = work.order == "split" and blocks.has_head
    # their gradient; in split order they are kept for all bands and replaced by it
    hidden = _flow(work, blocks) + chunk * (work.bands + 1 if split else 1)
    weight = work.model.vocab_size / work.tensor * D * w if blocks.has_head else 0.0
    below = 0.0 if split else graph
    # at the end of a half's backward its graph is gone, and the gradients of all its parameters are there
    before, behind = (work.width * count for count in parameters)
    moments = [
        {"layers": below, "rows": rows, "loss": loss},
        {"layers": below, "rows": rows, "passing": passing, "gradient_sums": weight},
        {"layers": below, "rows": rows / max(len(cross), 1), "gradient_sums": behind},
        {"layers": graph, "passing": back},
        {"layers": graph / max(len(own), 1), "gradient_sums": before},
    ]
    largest = max(moments, key=lambda moment: sum(moment.values()))
    largest["gradient_sums"] = largest.get("gradient_sums", 0.0) + work.wide * sum(parameters)
    return Activations(
        shared=store * walks, shared_gradients=gradients, contexts=contexts * walks, hidden=hidden, **largest
    )


def _half(work: Work, kinds: Sequence[str]) -> tuple[float, float]:
    """The graph of a chunk's self half, and what its backward makes on top."""
    back = [mixer_backward_bytes(work, kind, work.chunk) for kind in kinds if kind != "shared_kv"]
    return sum(block_bytes(work, kind, work.chunk) for kind in kinds), max([backward_bytes(work, work.chunk), *back])


def _checkpointed_half(work: Work, kinds: Sequence[str]) -> tuple[float, float]:
    """The same where layers keep their input and their right context."""
    x = work.batch * work.chunk * work.model.dim * work.width
    kept = sum(x + context_bytes(work, kind) for kind in kinds if kind != "shared_kv")
    if "shared_kv" in kinds:
        kept += work.batch * work.chunk * 2 * work.kv_dim * work.width
    back = 0.0
    for done, kind in enumerate(reversed([kind for kind in kinds if kind != "shared_kv"])):
        passing = max(backward_bytes(work, work.chunk), mixer_backward_bytes(work, kind, work.chunk))
        back = max(back, block_bytes(work, kind, work.chunk) - x + passing - done * x)
    return kept, back
