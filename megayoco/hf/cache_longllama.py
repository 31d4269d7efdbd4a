"""The cache of LongLLaMA: a local context of every layer, and the memory of those that have one.

Self-contained: it ships inside the model's folder and imports torch, transformers and the configuration beside it.

Shapes: B batch, T new tokens, n tokens of the local context, M tokens of memory, H heads, K head dim.
Keys: none of them is rotated.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from .configuration_longllama import LongLlamaConfig

LARGEST_PART = 2**15
"""Tokens of memory that are allocated at a time at the most, unless more come at once."""

HIDDEN = torch.finfo(torch.float32).min
"""What the mask of the released code adds to the score of padding."""


class Piece(NamedTuple):
    """Some tokens of a layer's memory."""

    key: Tensor
    """(B, H, M, K) in mem_dtype, without rotation."""
    value: Tensor
    """(B, H, M, K) in mem_dtype."""
    visible: Tensor | None
    """(B, M) bool, False at padding; None: there is none."""


class MemoryPart:
    """Room for tokens of memory, written once and never moved."""

    def __init__(self, key: Tensor, value: Tensor, visible: Tensor | None, capacity: int) -> None:
        """Takes the first tokens as in `Piece`; with their number as capacity it holds these very tensors."""
        self.length, self.capacity = key.shape[2], capacity
        self.visible = visible
        self.key, self.value = key, value
        if capacity > self.length:
            self.key, self.value = (x.new_empty(*x.shape[:2], capacity, x.shape[3]) for x in (key, value))
            self.key[:, :, : self.length], self.value[:, :, : self.length] = key, value

    def append(self, key: Tensor, value: Tensor, visible: Tensor | None) -> None:
        end = self.length + key.shape[2]
        self.key[:, :, self.length : end], self.value[:, :, self.length : end] = key, value
        if visible is not None or self.visible is not None:
            both = (self.visible, self.length), (visible, key.shape[2])
            rows, device = len(key), key.device
            self.visible = torch.cat(
                [torch.ones(rows, n, dtype=torch.bool, device=device) if part is None else part for part, n in both], 1
            )
        self.length = end

    def select(self, rows: Tensor) -> None:
        self.key, self.value = select_rows(self.key, rows), select_rows(self.value, rows)
        self.visible = None if self.visible is None else select_rows(self.visible, rows)

    def piece(self) -> Piece:
        return Piece(self.key[:, :, : self.length], self.value[:, :, : self.length], self.visible)


def select_rows(x: Tensor, rows: Tensor) -> Tensor:
    """x[rows], also for the 8-bit types that torch does not index."""
    rows = rows.to(x.device)
    if x.is_floating_point() and x.element_size() == 1:
        return x.view(torch.uint8).index_select(0, rows).view(x.dtype)
    return x.index_select(0, rows)


class LongLlamaCacheLayer(CacheLayerMixin):
    """Of one layer: keys and values (B, H, n, K) of the local context, not rotated, and the memory if it has one."""

    is_sliding = False
    supports_early_init = False

    def __init__(self, memory_dtype: torch.dtype | None) -> None:
        """memory_dtype: None for a layer without memory."""
        super().__init__()
        self.memory_dtype = memory_dtype
        self.parts: list[MemoryPart] = []

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends keys and values (B, H, T, K) to the local context; all of it."""
        if self.keys is not None and self.values is not None:
            key_states = torch.cat([self.keys, key_states], 2)
            value_states = torch.cat([self.values, value_states], 2)
        self.keys, self.values, self.is_initialized = key_states, value_states, True
        return key_states, value_states

    def remember(self, key: Tensor, value: Tensor, visible: Tensor | None) -> None:
        """Appends (B, H, T, K) to the memory, in its dtype. Nothing that is there already moves.

        Args:
            key, value: not rotated.
            visible: (B, T) bool, False at padding; None: there is none.
        """
        if self.memory_dtype is None:
            return
        key, value = key.to(self.memory_dtype), value.to(self.memory_dtype)
        if visible is not None and bool(visible.all()):
            visible = None
        tokens = key.shape[2]
        differentiable = key.requires_grad or value.requires_grad  # what a graph holds is not written to again
        last = self.parts[-1] if self.parts and not differentiable else None
        if last is not None and last.length + tokens <= last.capacity:
            last.append(key, value, visible)
            return
        capacity = tokens if differentiable else max(tokens, min(self.remembered, LARGEST_PART))
        self.parts.append(MemoryPart(key, value, visible, capacity))

    def flush(self, visible: Tensor | None) -> None:
        """The whole local context leaves: into memory if there is one. visible: (B, n) bool."""
        if self.keys is not None and self.values is not None:
            self.remember(self.keys, self.values, visible)
        self.keys = self.values = None

    @property
    def remembered(self) -> int:
        """Tokens of the memory."""
        return sum(part.length for part in self.parts)

    def pieces(self) -> tuple[Piece, ...]:
        """The memory as it is now; what is appended later does not change it."""
        return tuple(part.piece() for part in self.parts)

    def select(self, rows: Tensor) -> None:
        """Keeps these rows of the batch, in this order."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = select_rows(self.keys, rows), select_rows(self.values, rows)
        for part in self.parts:
            part.select(rows)

    def get_seq_length(self) -> int:
        """Tokens of the local context and of the memory."""
        return (0 if self.keys is None else self.keys.shape[2]) + self.remembered

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (0 if self.keys is None else self.keys.shape[2]) + query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name in earlier versions

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized, self.parts = False, []


class LongLlamaCache(Cache):
    """What a LongLLaMA keeps of the tokens that it has read; a call with it changes it.

    Attributes:
        positions: (B, n) int64, of the local context; None: it is empty.
        seen: tokens read so far, those that were dropped included.
    """

    layers: list[LongLlamaCacheLayer]  # type: ignore[assignment]

    def __init__(self, config: LongLlamaConfig) -> None:
        dtype = getattr(torch, config.mem_dtype)
        numbers = range(config.num_hidden_layers)
        super().__init__(layers=[LongLlamaCacheLayer(dtype if i in config.mem_layers else None) for i in numbers])
        self.positions: Tensor | None = None
        self.seen = 0

    @property
    def local_tokens(self) -> int:
        """n."""
        return 0 if self.positions is None else self.positions.shape[1]

    @classmethod
    def from_legacy_cache(cls, past: Sequence[Sequence[Tensor]], config: LongLlamaConfig) -> "LongLlamaCache":
        """The cache of six tensors per layer, as the released code returns them.

        Args:
            past: per layer local keys, values (B, H, n, K) and positions (B, 1, n, 1), memory keys, values
                (B, H, M, K) and additive mask (B, 1, M, 1), none of the keys rotated; what is absent has no tokens.

        Raises:
            ValueError: another number of layers or tensors, or memory of a layer that has none.
        """
        if len(past) != config.num_hidden_layers or any(len(layer) != 6 for layer in past):
            raise ValueError(f"past_key_values must have six tensors for each of {config.num_hidden_layers} layers")
        cache = cls(config)
        for number, (layer, (key, value, positions, *memory)) in enumerate(zip(cache.layers, past, strict=True)):
            if key.shape[2]:
                layer.update(key, value)
                cache.positions = positions[:, 0, :, 0].long()
            if memory[0].shape[2]:
                if layer.memory_dtype is None:
                    raise ValueError(f"past_key_values has memory for layer {number}, which has none in this model")
                layer.remember(memory[0], memory[1], memory[2][:, 0, :, 0] == 0)
        cache.seen = max(layer.get_seq_length() for layer in cache.layers)
        return cache

    def to_legacy_cache(self) -> tuple[tuple[Tensor, ...], ...]:
        """Six tensors per layer, as `from_legacy_cache` takes them; memory is copied."""
        return tuple(self._legacy_layer(layer, self.batch_rows or 0) for layer in self.layers)

    def _legacy_layer(self, layer: LongLlamaCacheLayer, rows: int) -> tuple[Tensor, ...]:
        pieces = layer.pieces()
        local = memory = (torch.empty(rows, 0, 0, 0),) * 3
        if layer.keys is not None and layer.values is not None and self.positions is not None:
            local = (layer.keys, layer.values, self.positions[:, None, :, None])
        if pieces:
            masks = []
            for piece in pieces:
                mask = torch.zeros(rows, piece.key.shape[2], device=piece.key.device)
                masks.append(mask if piece.visible is None else mask.masked_fill(~piece.visible, HIDDEN))
            keys, values = [piece.key for piece in pieces], [piece.value for piece in pieces]
            memory = (torch.cat(keys, 2), torch.cat(values, 2), torch.cat(masks, 1)[:, None, :, None])
        return (*local, *memory)

    def flush(self, visible: Tensor | None) -> None:
        """The whole local context leaves: into memory where there is one. visible: (B, n) bool."""
        for layer in self.layers:
            layer.flush(visible)
        self.positions = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read so far."""
        return self.seen

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Takes these rows of the batch; copies the memory unless all stay in place."""
        if self.batch_rows == len(beam_idx) and torch.equal(beam_idx.cpu(), torch.arange(len(beam_idx))):
            return
        for layer in self.layers:
            layer.select(beam_idx)
        self.positions = None if self.positions is None else select_rows(self.positions, beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """The same."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row of the batch `repeats` times."""
        self.reorder_cache(torch.arange(self.batch_rows or 0).repeat_interleave(repeats))

    @property
    def batch_rows(self) -> int | None:
        """B; None: nothing is stored."""
        for layer in self.layers:
            if layer.keys is not None:
                return int(layer.keys.shape[0])
            if layer.parts:
                return int(layer.parts[0].key.shape[0])
        return None

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError("a LongLLaMA cache cannot be rolled back: what left the local context is not put back")

    def activate_past_recording(self) -> None:
        raise ValueError(
            "a LongLLaMA cache cannot be rolled back: assisted and prompt-lookup decoding are not possible"
        )

    def reset(self) -> None:
        """Forgets everything."""
        super().reset()
        self.positions, self.seen = None, 0
