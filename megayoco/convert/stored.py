"""Tensors in files, each read when asked for: safetensors and torch's own files, whole or in shards.

Nothing in a file can run code: torch's files go through its restricted unpickler.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megayoco.convert.names import listed
from megayoco.convert.weights import LazyTensors
from megayoco.convert.writing import INDEX_FILE, SINGLE_FILE
from megayoco.data.files import read_json_object
from megayoco.errors import UserError

_TORCH_FILE, _TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_AGAIN = "Copy the whole folder again."
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_INERT_MODULES = ("argparse", "omegaconf", "fairseq")
_INERT_TYPES = {"typing.Any", "builtins.dict", "builtins.list", "builtins.int", "builtins.float", "builtins.str"}


def open_weights(folder: Path) -> tuple[Path, LazyTensors]:
    """The weights of a folder in the layout of Hugging Face, and the file that stands for them in messages.

    Raises:
        UserError: there are none, files are missing or damaged, or disagree with their index.
    """
    for file in (SINGLE_FILE, INDEX_FILE, _TORCH_FILE, _TORCH_INDEX):
        path = folder / file
        if not path.exists():
            continue
        if file == SINGLE_FILE:
            return path, StoredTensors(path)
        if file == _TORCH_FILE:
            return path, PickledTensors(path)
        return path, _Sharded(path)
    raise UserError(
        f"{folder} holds no weights: there is no {SINGLE_FILE}, {INDEX_FILE}, {_TORCH_FILE} or {_TORCH_INDEX}. {_AGAIN}"
    )


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a safetensors file by name, each read when asked for. A tensor belongs to who asked for it.

    Raises:
        UserError: no such file, not safetensors, or shorter than its header says.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise UserError(
                f"{path} is damaged or no safetensors file ({error}). Copy it again, or export again."
            ) from error
        except OSError as error:
            reason = error.strerror or "no such file"  # safetensors leaves strerror empty
            raise UserError(f"cannot read {path}: {reason}. Copy the whole folder, or export again.") from error
        self._names = list(self._file.keys())
        self._known = set(self._names)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._known:
            raise KeyError(name)
        return self._file.get_tensor(name)  # type: ignore[no-any-return]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header alone."""
        return tuple(self._file.get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor, from the header alone. Raises UserError for one that weights do not have."""
        kind = self._file.get_slice(name).get_dtype()
        if kind not in _DTYPES:
            raise UserError(f"{self.path}: {name} has dtype {kind}; quantised weights cannot be converted.")
        return _DTYPES[kind]


class PickledTensors(Mapping[str, Tensor]):
    """The tensors of a file of `torch.save`, mapped, not loaded.

    Args:
        path: the file, whose content is a mapping of names to tensors.
        content: that mapping, where the file holds more than it.

    Raises:
        UserError: no such file, damaged, or it holds more than tensors.
    """

    def __init__(self, path: Path, content: Mapping[str, Any] | None = None) -> None:
        self.path = path
        found = load_restricted(path) if content is None else content
        if not isinstance(found, Mapping):
            raise UserError(f"{path} holds a {type(found).__name__}, not tensors by name. Give another file.")
        if strange := [str(name) for name, value in found.items() if not isinstance(value, Tensor)]:
            raise UserError(f"{path} holds more than tensors: {listed(strange)}. Give a file with weights alone.")
        self._tensors = dict(found)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor."""
        return self._tensors[name].dtype

    def are_one(self, first: str, second: str) -> bool:
        """Whether two names are one tensor, as tied weights are after `torch.save`."""
        a, b = self._tensors[first], self._tensors[second]
        return a.shape == b.shape and a.stride() == b.stride() and a.data_ptr() == b.data_ptr()


class _Sharded(Mapping[str, Tensor]):
    """The tensors of several files, by an index that must agree with them."""

    def __init__(self, index: Path) -> None:
        weight_map = read_json_object(index, _AGAIN).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise UserError(f"{index} has no `weight_map` of names to files. {_AGAIN}")
        files = sorted(set(weight_map.values()))
        if strange := [file for file in files if Path(file).name != file]:
            raise UserError(f"{index} names {strange[0]}, which is no file of its folder. {_AGAIN}")
        if absent := [file for file in files if not (index.parent / file).exists()]:
            raise UserError(f"{index} names files that are not there: {listed(absent)}. {_AGAIN}")
        self._parts: dict[str, LazyTensors] = {}
        for file in files:
            path = index.parent / file
            part: LazyTensors = StoredTensors(path) if index.name == INDEX_FILE else PickledTensors(path)
            expected = {name for name, place in weight_map.items() if place == file}
            if expected != set(part.keys()):
                raise UserError(
                    f"{path} and {index.name} disagree on the tensors {listed(expected ^ set(part.keys()))}. {_AGAIN}"
                )
            self._parts |= dict.fromkeys(part.keys(), part)

    def __getitem__(self, name: str) -> Tensor:
        return self._parts[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from its file's header."""
        return self._parts[name].shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor, from its file's header."""
        return self._parts[name].dtype(name)


class _Inert:
    """Stands for an object of a class that is not needed: takes whatever it is made of, and does nothing with it."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def load_restricted(path: Path) -> Any:
    """The content of a file of `torch.save`, its tensors mapped, on the CPU.

    Settings that training scripts store beside their weights (argparse, omegaconf, fairseq) come as inert objects; no
    code of these packages, or of any other, runs.

    Raises:
        UserError: no such file, damaged, or it asks for code beyond that.
    """
    try:
        with path.open("rb") as file:
            if file.read(2) != b"PK":
                raise UserError(
                    f"{path} is no file that torch.save has written since torch 1.6, or it is damaged. Copy it again,"
                    " or load and save it with a newer torch."
                )
        asked = set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        inert = {name for name in asked if name.partition(".")[0] in _INERT_MODULES or name in _INERT_TYPES}
        if asked - inert:
            raise UserError(
                f"{path} holds code besides tensors: {listed(asked - inert)}. It was not loaded, as it could do"
                " anything. Ask its author for the state dict alone, or for safetensors."
            )
        with torch.serialization.safe_globals([(_Inert, name) for name in sorted(inert)]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}. {_AGAIN}") from error
    except (RuntimeError, ValueError, pickle.UnpicklingError, EOFError, KeyError, AttributeError) as error:
        reason = str(error).strip().split("\n")[0].split(". ")[0]
        raise UserError(f"{path} is damaged or no file of torch.save ({reason}). Copy it again.") from error
