"""Safetensors files written as the tensors come: headers first, then one tensor after the other.

    FOLDER/model.safetensors                        if all tensors fit one shard
    FOLDER/model-00001-of-0000N.safetensors ...     if not, with model.safetensors.index.json

A file: uint64 length of the header, the header in JSON (name -> dtype, shape, offsets behind the header), the data.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megayoco.convert.folder import check_room
from megayoco.convert.weights import LazyTensors
from megayoco.data.files import write_text_atomically

SHARD_BYTES = 5_000_000_000
"""Usual size of a shard on the Hugging Face hub."""

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int64: "I64",
    torch.int8: "I8",
    torch.uint8: "U8",
}
"""What safetensors calls the dtypes that are written."""


def write_safetensors(folder: Path, tensors: LazyTensors, *, shard_bytes: int = SHARD_BYTES) -> list[str]:
    """Write all tensors into `folder`, each asked for once, in the order of their names in `tensors`.

    Args:
        folder: exists.
        tensors: on any device; each must come with the shape and dtype that were told of it.
        shard_bytes: the most data in one file, unless a single tensor is larger.

    Returns:
        Names of the files written.

    Raises:
        UserError: the disk has not enough room, told before anything is written.
        ValueError: a tensor comes with another shape or dtype than told.
        OSError: writing failed; what was written stays.
    """
    sizes = {name: math.prod(tensors.shape(name)) * tensors.dtype(name).itemsize for name in tensors}
    check_room(folder, sum(sizes.values()), f"the weights of {folder.name.strip('.').removesuffix('.partial')}")
    shards: list[list[str]] = []
    filled = 0
    for name, size in sizes.items():
        if not shards or filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    if len(shards) == 1:
        _write_file(folder / SINGLE_FILE, tensors, shards[0])
        return [SINGLE_FILE]
    files = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for file, names in zip(files, shards, strict=True):
        _write_file(folder / file, tensors, names)
    parameters = sum(math.prod(tensors.shape(name)) for name in tensors)
    index = {
        "metadata": {"total_parameters": parameters, "total_size": sum(sizes.values())},
        "weight_map": {name: file for file, names in zip(files, shards, strict=True) for name in names},
    }
    write_text_atomically(folder / INDEX_FILE, json.dumps(index, indent=2) + "\n")
    return [*files, INDEX_FILE]


def _write_file(path: Path, tensors: LazyTensors, names: Sequence[str]) -> None:
    def entry(name: str) -> Entry:
        return Entry(tensors.shape(name), tensors.dtype(name), lambda: [tensor_bytes(name, tensors)])

    # transformers refuses a file without this entry
    write_file(path, {name: entry(name) for name in names}, {"format": "pt"})


class Entry(NamedTuple):
    """A tensor of a file that is still to be written."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Callable[[], Iterable[memoryview]]
    """Asked for once, when the tensor is written: its bytes in C order, in pieces of any size."""


def write_file(path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> None:
    """One safetensors file, written in the order of its entries.

    Its data is laid out widest dtype first, else in the order of the entries, so that every tensor is aligned in a
    mapped file.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    begins, end = {}, 0
    for name, (shape, dtype, _) in sorted(entries.items(), key=lambda item: -item[1].dtype.itemsize):
        begins[name], end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [begins[name], end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, entry in entries.items():
            file.seek(8 + len(text) + begins[name])
            for piece in entry.pieces():
                file.write(piece)


def tensor_bytes(name: str, tensors: LazyTensors) -> memoryview:
    """The bytes of a tensor in C order. Raises ValueError if it comes with another shape or dtype than told."""
    tensor: Tensor = tensors[name].detach()
    for what, told, found in (
        ("shape", tensors.shape(name), tuple(tensor.shape)),
        ("dtype", tensors.dtype(name), tensor.dtype),
    ):
        if told != found:
            raise ValueError(f"{name} comes with {what} {found}, not {told}")
    return tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data
