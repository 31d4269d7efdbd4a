"""The blocks of a model with a cache: chunks of any size go in, logits or losses of the wanted positions come out.

Positions that want no logits stop before the cross-decoder: its layers read only the shared keys and values, which
depend on the self-decoder alone, so leaving early is exact (YOCO, arXiv 2405.05254, section 2.3).

The same code runs a whole model, a tensor shard, or a stage of a pipeline, over weights that were loaded for it or over
the modules of a live training run. Every rank of a replica makes the same calls with the same tokens, and gets the same
results. Between stages travel the hidden states, of all tokens before the shared keys and values and of the wanted ones
after, and the chunk's own keys and values, of which every stage with cross layers keeps its own cache.

Shapes: B batch, T tokens of the chunk, R wanted positions, the last of the chunk, D model dim, V vocabulary,
        g key-value heads of this tensor rank, K head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megayoco.config import ModelConfig
from megayoco.layers.context import KeyValues, Positions
from megayoco.model.bands import Stage
from megayoco.model.window_options import WindowOptions
from megayoco.ops.key_value_cache import KeyValueCache
from megayoco.ops.key_value_storage import Place
from megayoco.ops.memory_search import Search
from megayoco.ops.shared_memory import SharedMemory
from megayoco.ops.windows import PromptWindows, WindowRule

if TYPE_CHECKING:
    from megayoco.model.decoder import Decoder
    from megayoco.model.pipeline import PipelineDecoder
    from megayoco.parallel.topology import Topology


class DecoderContext(NamedTuple):
    """Everything the model remembers of the tokens so far: a value, which stays valid when it is continued."""

    length: int
    """Tokens so far, padding included."""
    layers: tuple[Any, ...]
    """One context per layer of this rank with a memory of its own, in stack order; the shared keys and values last."""
    padding: Tensor | None = None
    """(B,) int64: how many tokens at the start of each row are padding. None: none."""
    prompts: PromptWindows | None = None
    """Of models whose windows depend on how long a prompt is; None: of all others."""

    @property
    def is_announced(self) -> bool:
        """Whether the next tokens belong to a prompt that was announced."""
        return self.prompts is not None and self.prompts.waiting > 0

    def announce(self, count: int) -> DecoderContext:
        """The same, knowing that the next `count` tokens are one prompt, whatever chunks they come in; tokens that
        nobody announced are a prompt of their own in each call. Raises ValueError while announced ones are missing."""
        if self.prompts is None or count == 0:
            return self
        return self._replace(prompts=self.prompts.announce(self.length, count))


@dataclass(frozen=True)
class MemoryOptions:
    """What layers with memory attention do with their memory; the other layers' keys and values are as ever."""

    search: Search | None = None
    """How the remembered keys of a query are chosen; None: all of them."""

    place: Place | None = None
    """Where they lie; None: on the device of the model."""

    shared: bool = False
    """Whether the ranks of the topology's sequence axis keep them together, each a part; then they are one replica."""


class InferenceModel:
    """What one rank runs of a model.

    Args:
        stage: the blocks of this rank, in evaluation mode.
        config: the whole model.
        topology: groups of this rank; None: the process holds the whole model alone.
        begins: number of the first of the stage's blocks in [embedding, layer pattern ..., head].
        storage: narrow dtype to keep growing keys and values in (`key_value_cache.STORAGES`); None: the model's.
        memory: of the layers with memory attention.
        windows: how they and the layers beside them cut a text into windows, and how much they remember; None: windows
            as in training, and everything.

    Raises:
        ValueError: the mixers are built for a sequence axis of several ranks; a memory cannot be shared so, or the
            model has none.
    """

    def __init__(
        self,
        stage: Stage,
        config: ModelConfig,
        *,
        topology: Topology | None = None,
        begins: int = 0,
        storage: torch.dtype | None = None,
        memory: MemoryOptions | None = None,
        windows: WindowOptions | None = None,
    ) -> None:
        if any(getattr(layer.mixer, "sequence", None) is not None for layer in stage.self_layers):
            raise ValueError("inference shares no sequence over ranks: detach the sequence axis first")
        self.stage, self.config, self.topology = stage, config, topology
        self.storage = storage
        self.memory, self.windows = memory or MemoryOptions(), windows or WindowOptions()
        if self.memory != MemoryOptions() and not config.memory_layers:
            raise ValueError("options of a memory were given, and the model has no memory layers")
        self._rule: WindowRule | None = self.windows.eviction(config)
        if self.memory.shared and (
            topology is None or topology.data > 1 or self.memory.search or self.windows.capacity
        ):
            raise ValueError("a memory is shared by the ranks of one replica, without search, and without capacity")
        weight = stage.parameters()[0]
        self.device, self.dtype = weight.device, weight.dtype
        pattern = config.layer_pattern()
        self._shared_at = pattern.index("shared_kv") + 1 if "shared_kv" in pattern else None
        self._begins = begins
        self._ends = begins + len(stage.modules())
        self._blocks = len(pattern) + 2
        self._last_cross = self._blocks - 1 if self._shared_at is not None else 0
        self._sending: list[tuple[dist.Work, Tensor]] = []

    @staticmethod
    def of(
        module: Decoder | PipelineDecoder,
        topology: Topology | None = None,
        storage: torch.dtype | None = None,
        memory: MemoryOptions | None = None,
        windows: WindowOptions | None = None,
    ) -> InferenceModel:
        """Over the blocks that this rank has of a model."""
        begins = module.first_block
        return InferenceModel(
            module.stage(),
            module.config,
            topology=topology,
            begins=begins,
            storage=storage,
            memory=memory,
            windows=windows,
        )

    @property
    def replica(self) -> int:
        """Number of the copy of the model that this rank belongs to."""
        at = self.topology
        return 0 if at is None or self.memory.shared else at.data_rank * at.sequence + at.sequence_rank

    @property
    def replicas(self) -> int:
        """Independent copies of the model among the processes; each may work on other prompts."""
        at = self.topology
        return 1 if at is None or self.memory.shared else at.data * at.sequence

    @property
    def is_lead(self) -> bool:
        """Whether this rank is the first of its replica, the one that writes."""
        at = self.topology
        if at is None:
            return True
        return at.tensor_rank == 0 and at.pipeline_rank == 0 and not (self.memory.shared and at.sequence_rank)

    def empty_context(
        self, batch_size: int = 1, *, padding: Sequence[int] | None = None, reserve: int = 0
    ) -> DecoderContext:
        """What the model remembers before the first token.

        Args:
            batch_size: B, rows.
            padding: tokens at the start of each row that only fill it up: nothing that follows sees them. None: none.
            reserve: tokens to make room for at once; more are welcome, and cost copies.
        """
        layers = [self._empty(owner, batch_size, reserve) for owner in self._owners()]
        if self._receives_shared:
            layers.append(self._shared_cache(batch_size, reserve))
        pads = None
        if padding is not None and any(padding):
            if len(padding) != batch_size:
                raise ValueError(f"padding of {len(padding)} rows for a batch of {batch_size}")
            pads = torch.tensor(list(padding), dtype=torch.int64, device=self.device)
        return DecoderContext(0, tuple(layers), pads, self.windows.prompts(self.config))

    @torch.inference_mode()
    def absorb(self, tokens: Tensor, context: DecoderContext) -> DecoderContext:
        """Reads tokens (B, T) without asking for logits."""
        return self._run(tokens, context, 0)[1]

    @torch.inference_mode()
    def advance(
        self, tokens: Tensor, context: DecoderContext, *, last_only: bool = True
    ) -> tuple[Tensor, DecoderContext]:
        """Reads tokens (B, T) and gives logits (B, 1, V) after the last of them, or (B, T, V) after each."""
        rows = 1 if last_only else tokens.shape[1]
        x, right = self._run(tokens, context, rows)
        head = self.stage.head
        shape = (tokens.shape[0], rows, self.config.vocab_size)
        logits = None if head is None else head(x, None)
        return self._from_last_stage(logits, shape, self.dtype), right

    @torch.inference_mode()
    def losses(self, tokens: Tensor, targets: Tensor, context: DecoderContext) -> tuple[Tensor, Tensor, DecoderContext]:
        """Reads tokens (B, T) and compares what follows the last R of them with targets.

        Args:
            tokens: (B, T) int64.
            targets: (B, R) int64, R <= T: the token after each of the last R.
            context: what came before.

        Returns:
            -log p of each target (B, R) fp32 (float64 for a float64 model), whether it was the most likely token
            (B, R) bool, and the context after the chunk. Logits exist for few positions at a time.
        """
        rows = targets.shape[1]
        x, right = self._run(tokens, context, rows)
        head, shape = self.stage.head, tuple(targets.shape)
        wide = torch.promote_types(self.dtype, torch.float32)
        both = None
        if head is not None:
            losses, greedy = head.token_losses(x, targets)
            both = torch.stack([losses, greedy.to(losses.dtype)])
        both = self._from_last_stage(both, (2, *shape), wide)
        return both[0], both[1] > 0, right

    def agree(self, value: Any) -> Any:
        """The value of the replica's lead, on all its ranks: for what a user typed, or a random seed."""
        if self.topology is None:
            return value
        group: Any = self.topology.model_group
        if self.memory.shared:
            group = dist.group.WORLD  # all ranks are one replica
        if group.size() == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, dist.get_process_group_ranks(group)[0], group=group, device=self.device)
        return values[0]

    # The way of a chunk

    def _run(self, tokens: Tensor, context: DecoderContext, rows: int) -> tuple[Tensor, DecoderContext]:
        """The hidden states (B, rows, D) behind this stage's last block, and the context after the chunk."""
        stage, (B, T) = self.stage, tokens.shape
        if len(context.layers) != len(self._owners()) + self._receives_shared:
            raise ValueError(f"a context of {len(context.layers)} layers is not one of this model")
        if not 0 <= rows <= T or T == 0:
            raise ValueError(f"{rows} wanted positions of a chunk of {T} tokens")
        positions, prompts = self._positions(context, T)
        x, own = self._receive(tokens, rows)
        rights = []
        for layer, left in zip(stage.self_layers, context.layers, strict=False):
            x, right = layer(x, positions, left)
            rights.append(right)
        shared = None
        if stage.shared_kv is not None:
            x, own = stage.shared_kv(x, positions, self._no_keys(B))
        if own is not None:
            shared = context.layers[-1].combine(own)
            rights.append(shared)
        wanted = positions if rows == T else positions.last(rows) if rows else None
        if self._ends > self._wanted_from and x.shape[1] > rows:
            x = x[:, T - rows :]
        if rows:
            for layer in stage.cross_layers:
                x, _ = layer(x, wanted, shared)
        self._send(x, own, rows)
        return x, DecoderContext(context.length + T, tuple(rights), context.padding, prompts)

    def _positions(self, context: DecoderContext, length: int) -> tuple[Positions, PromptWindows | None]:
        """Those of the chunk, and what windows depend on behind it."""
        windows, prompts = self._rule, context.prompts
        if prompts is not None:
            windows, prompts = prompts.take(context.length, length)
        index = torch.arange(context.length, context.length + length, device=self.device)
        if context.padding is None:
            return Positions(index, windows=windows), prompts
        index = index - context.padding[:, None]
        # padding is a document of its own in front of the row's
        return Positions(index, torch.where(index < 0, -context.padding[:, None], 0), windows=windows), prompts

    @property
    def _wanted_from(self) -> int:
        """Number of the first block behind which only wanted positions go on."""
        return self._blocks - 2 if self._shared_at is None else self._shared_at

    @property
    def _receives_shared(self) -> bool:
        return self._shared_at is not None and self._shared_at < self._begins < self._last_cross

    def _owners(self) -> list[Any]:
        """The modules of this stage that have a context, in the order of `DecoderContext.layers`."""
        owners: list[Any] = [layer.mixer for layer in self.stage.self_layers]
        return owners if self.stage.shared_kv is None else [*owners, self.stage.shared_kv]

    def _empty(self, owner: Any, batch_size: int, reserve: int) -> Any:
        empty = owner.empty_context(batch_size, self.dtype, self.device)
        if not isinstance(empty, KeyValues) or getattr(owner, "window", None) is not None:
            return empty
        _, _, heads, head_dim = empty.key.shape
        memory = MemoryOptions()
        if getattr(owner, "remembers", False):
            memory, reserve = self.memory, self.windows.room(self.config, reserve)
        if memory.shared:
            return self._shared_memory(batch_size, heads, head_dim, reserve)
        return self._cache(batch_size, heads, head_dim, reserve, memory)

    def _shared_memory(self, batch_size: int, heads: int, head_dim: int, reserve: int) -> SharedMemory:
        """No token yet."""
        at, window = self.topology, self.config.memory_window
        assert at is not None and window is not None
        share = self._cache(batch_size, heads, head_dim, -(-reserve // at.sequence), self.memory)
        recent = self._cache(batch_size, heads, head_dim, min(reserve, 2 * window), MemoryOptions())
        return SharedMemory(share, recent, window, at.sequence_group, at.sequence_rank, at.sequence)

    def _shared_cache(self, batch_size: int, reserve: int) -> KeyValueCache:
        return self._cache(batch_size, self._shared_heads, self.config.head_dim, reserve, MemoryOptions())

    def _cache(self, batch_size: int, heads: int, head_dim: int, reserve: int, memory: MemoryOptions) -> KeyValueCache:
        return KeyValueCache.empty(
            batch_size,
            heads,
            head_dim,
            self.dtype,
            self.device,
            storage=self.storage,
            reserve=reserve,
            place=memory.place,
            search=memory.search,
        )

    @property
    def _shared_heads(self) -> int:
        """g of the shared keys and values."""
        return max(self.config.num_kv_heads // (1 if self.topology is None else self.topology.tensor), 1)

    def _no_keys(self, batch_size: int) -> KeyValues:
        return KeyValues.empty(batch_size, self._shared_heads, self.config.head_dim, self.dtype, self.device)

    # Between the stages of a pipeline

    def _receive(self, tokens: Tensor, rows: int) -> tuple[Any, KeyValues | None]:
        """What this stage begins with: hidden states, and the chunk's shared keys and values once they are made."""
        if self.stage.embed is not None:
            return self.stage.embed(tokens), None
        (B, T), D = tokens.shape, self.config.dim
        x = torch.empty(B, self._rows_before(self._begins, T, rows), D, dtype=self.dtype, device=self.device)
        if x.shape[1]:
            dist.recv(x, self._neighbour(-1))
        if not self._receives_shared:
            return x, None
        packed = torch.empty(2, B, T, self._shared_heads, self.config.head_dim, dtype=self.dtype, device=self.device)
        dist.recv(packed, self._neighbour(-1))
        return x, KeyValues(*packed.unbind())

    def _send(self, x: Tensor, own: KeyValues | None, rows: int) -> None:
        if self.stage.head is not None:
            return
        for work, _ in self._sending:
            work.wait()
        parts = [x] if x.shape[1] else []
        if own is not None and self._ends < self._last_cross:
            parts.append(torch.stack([own.key, own.value]))
        parts = [part.contiguous() for part in parts]
        # kept until they have arrived; the next chunk is computed meanwhile
        self._sending = [(_isend(part, self._neighbour(1)), part) for part in parts]

    def _rows_before(self, block: int, tokens: int, rows: int) -> int:
        """Positions whose hidden states cross the border in front of a block."""
        return rows if block > self._wanted_from else tokens

    def _neighbour(self, step: int) -> int:
        assert self.topology is not None
        return self.topology.rank + step * (self.topology.world_size // self.topology.pipeline)

    def _from_last_stage(self, tensor: Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The tensor that the last stage has, on every stage."""
        at = self.topology
        if at is None or at.pipeline == 1:
            assert tensor is not None
            return tensor
        if tensor is None:
            tensor = torch.empty(*shape, dtype=dtype, device=self.device)
        dist.broadcast(tensor, dist.get_process_group_ranks(at.pipeline_group)[-1], group=at.pipeline_group)
        return tensor


def _isend(tensor: Tensor, to: int) -> dist.Work:
    work = dist.isend(tensor, to)
    assert work is not None
    return work


def cache_bytes(context: DecoderContext) -> int:
    """Bytes of everything that a context remembers on this rank: keys, values and states of all its layers."""
    return sum(_bytes(layer) for layer in context.layers)


def _bytes(value: Any) -> int:
    if isinstance(value, KeyValueCache | SharedMemory):
        return value.bytes
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(_bytes(part) for part in value)
