"""The common form of a model's weights: every format is read into it and written from it.

Tensors are read, and transformed, one at a time when asked for: no conversion holds a whole model in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, KeysView, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from megayoco.config import ModelConfig
from megayoco.data.tokenizer import Tokenizer
from megayoco.errors import UserError


class LazyTensors(Protocol):
    """A mapping of full tensors by name that tells their shapes and dtypes without reading them."""

    def __getitem__(self, name: str) -> Tensor: ...

    def __iter__(self) -> Iterator[str]: ...

    def __len__(self) -> int: ...

    def __contains__(self, name: object) -> bool: ...

    def keys(self) -> KeysView[str]:
        """Names of all tensors."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor."""


class Weights(NamedTuple):
    """A model as it lies on disk, whatever the format."""

    model: ModelConfig
    """The shape; `rope_theta` is the base that the weights were trained with last."""
    tensors: LazyTensors
    """Full tensors by canonical name, read when asked for."""
    tokenizer: Tokenizer | None
    """None where the folder has none."""
    facts: dict[str, Any]
    """What is known of the training: step, tokens, sequence_length (the longest trained, in tokens), loss, ..."""


class HeldTensors(dict[str, Tensor]):
    """Tensors in memory as `LazyTensors`."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor."""
        return self[name].dtype


class Renamed(Mapping[str, Tensor]):
    """Tensors of `source` under other names, some transformed as they are read.

    Args:
        source: where the tensors are.
        names: new name -> name in `source`.
        transforms: new name -> function of the tensor that keeps shape and dtype.
    """

    def __init__(
        self,
        source: LazyTensors,
        names: Mapping[str, str],
        transforms: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    ) -> None:
        self._source, self._names, self._transforms = source, names, transforms or {}

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._source[self._names[name]]
        return self._transforms[name](tensor) if name in self._transforms else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._source.shape(self._names[name])

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor."""
        return self._source.dtype(self._names[name])


class Cast(Mapping[str, Tensor]):
    """Tensors of `source`, rounded to one dtype as they are read.

    Raises:
        UserError: on reading a tensor with finite values that the dtype has no number for.
    """

    def __init__(self, source: LazyTensors, dtype: torch.dtype) -> None:
        self._source, self._dtype = source, dtype

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._source[name]
        rounded = tensor.to(self._dtype)
        largest = torch.finfo(self._dtype).max
        if largest < torch.finfo(tensor.dtype).max and not _same_finite(tensor, rounded):
            raise UserError(
                f"{name} has values up to {_largest_finite(tensor):.3g}, more than the {largest:.3g} that"
                f" {str(self._dtype).removeprefix('torch.')} can hold. Choose --dtype bfloat16 or float32."
            )
        return rounded

    def __iter__(self) -> Iterator[str]:
        return iter(self._source)

    def __len__(self) -> int:
        return len(self._source)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._source.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that all are rounded to."""
        return self._dtype


def _same_finite(before: Tensor, after: Tensor) -> bool:
    return bool(torch.equal(before.isfinite(), after.isfinite()))


def _largest_finite(tensor: Tensor) -> float:
    return float(tensor[tensor.isfinite()].abs().max())
