"""EasyLM's LLaMA, with the memory layers of FoT continued pre-training: a stream of tensors, and a config in JSON.

    FOLDER/streaming_params    one msgpack record per tensor: (names of the path to it, bytes), nothing around them
    FOLDER/llama_config.json   fields of LLaMAConfig there, for `--load_llama_config=json::...`

The bytes of a tensor are what flax's `to_bytes` makes of an array: a msgpack extension of type 1 around another msgpack
message (shape, dtype name, data in C order); above 1 GiB a map of such extensions over the flat array. Kernels there
are (in, out), and the rotary embedding turns interleaved pairs: matrices are transposed, and rows of q and k change
places. Nothing is unpickled: `metadata.pkl`, where EasyLM puts the config of a run, is not read.

A train state (`streaming_train_state`) is read too, its parameters alone.
Source: EasyLM's StreamingCheckpointer and LLaMAConfig, in the version of long_llama; flax.serialization.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgpack  # type: ignore[import-untyped]
import torch
from torch import Tensor

from megayoco.config import ModelConfig, model_config_from_dict
from megayoco.convert.export import TOKENIZER_FOLDER, check_tokenizer
from megayoco.convert.folder import check_room, whole_folder
from megayoco.convert.longllama import refuse_grouped_heads
from megayoco.convert.names import check_tensors, foreign_names, tensor_shapes
from megayoco.convert.rotary_rows import to_half_split, to_interleaved
from megayoco.convert.transformers_folder import FACTS, HubConfig
from megayoco.convert.weights import LazyTensors, Renamed, Weights
from megayoco.convert.writing import tensor_bytes
from megayoco.data.files import read_json_object, write_text_atomically
from megayoco.data.tokenizer import Tokenizer
from megayoco.errors import UserError

WEIGHTS_FILE, CONFIG_FILE = "streaming_params", "llama_config.json"

_OUTSIDE = {"embed_tokens": "transformer.wte.embedding", "norm": "transformer.ln_f.kernel", "lm_head": "lm_head.kernel"}
_INSIDE = {
    "mixer_norm": "attention_norm.kernel",
    "mixer.q_proj": "attention.wq.kernel",
    "mixer.k_proj": "attention.wk.kernel",
    "mixer.v_proj": "attention.wv.kernel",
    "mixer.out_proj": "attention.wo.kernel",
    "ffn_norm": "ffn_norm.kernel",
    "ffn.gate_proj": "feed_forward.w1.kernel",
    "ffn.up_proj": "feed_forward.w3.kernel",
    "ffn.down_proj": "feed_forward.w2.kernel",
}
_TRAIN_STATE = "streaming_train_state"
_ROOTS = ("transformer", "lm_head")

_ARRAY = 1
"""Type of flax's msgpack extension for arrays."""
_CHUNKED = "__msgpack_chunked_array__"
_CHUNK_BYTES = 2**30
"""Larger arrays are cut, as flax does it."""
_MOST_BYTES = 2**32 - 2**16
"""A bit less than the longest byte string of msgpack."""
_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
_AGAIN = "Copy it again."


def recognises(path: Path) -> bool:
    """Whether a folder, or a file in it, is of this format, complete or not."""
    return (path / CONFIG_FILE if path.is_dir() else path.with_name(CONFIG_FILE)).is_file()


def names(model: ModelConfig) -> dict[str, str]:
    """Canonical name -> the path in the parameter tree, with dots."""
    own = foreign_names(model, _OUTSIDE, _INSIDE, "transformer.h.{}".format)
    return {name: foreign.removesuffix(".weight") for name, foreign in own.items()}


def read(path: Path, tokenizer: Tokenizer | None = None) -> Weights:
    """The model of a folder with a stream of tensors and llama_config.json, or of such a stream with that beside it.

    The tokenizer is that of the folder `tokenizer` beside them, if it is ours; `tokenizer` goes before it.

    Raises:
        UserError: incomplete, damaged, or weights and config do not fit.
    """
    file = _stream(path) if path.is_dir() else path
    config = HubConfig(
        str(file.with_name(CONFIG_FILE)),
        read_json_object(
            file.with_name(CONFIG_FILE),
            "Write the fields of EasyLM's LLaMAConfig there (vocab_size, hidden_size, ..., mem_layers, rope_theta):"
            " its own metadata.pkl is not read, as a pickle can run code.",
        ),
    )
    model = _model(config)
    own = names(model)
    tensors = StreamedTensors(file)
    shapes = {own[name]: shape for name, shape in tensor_shapes(model).items()}
    kernels = _kernels(own)
    check_tensors(file, tensors, {n: s[::-1] if n in kernels else s for n, s in shapes.items()}, CONFIG_FILE)
    turned = dict.fromkeys(_turned(model), partial(to_half_split, heads=model.heads))
    saved = file.parent / TOKENIZER_FOLDER
    if tokenizer is None and saved.is_dir():
        tokenizer = Tokenizer.from_dir(saved)
    check_tokenizer(file.parent, tokenizer, model)
    facts = config.recorded_facts()
    if not model.memory_layers and isinstance(config.values.get("max_sequence_length"), int):
        facts.setdefault("sequence_length", config.values["max_sequence_length"])
    return Weights(model, Renamed(_Transposed(tensors, kernels), own, turned), tokenizer, facts)


def check_writable(model: ModelConfig) -> None:
    """Raises UserError if the format cannot express the model."""
    if model.pattern != "llama":
        raise UserError(f"EasyLM's LLaMA has no pattern {model.pattern}. Write it by --to megayoco.")
    refuse_grouped_heads(model, "EasyLM's LLaMA")


def write(directory: Path, weights: Weights, shard_bytes: int) -> None:
    """Write the stream, llama_config.json and our tokenizer's folder; the format has no shards.

    Raises:
        UserError: the format cannot express the model or a tensor is too large for it, or something cannot be written.
    """
    model, tokenizer = weights.model, weights.tokenizer
    check_writable(model)
    own = names(model)
    turned = {own[name]: partial(to_interleaved, heads=model.heads) for name in _turned(model)}
    renamed = Renamed(weights.tensors, {foreign: name for name, foreign in own.items()}, turned)
    tensors = _Transposed(renamed, _kernels(own))
    sizes = {name: math.prod(tensors.shape(name)) * tensors.dtype(name).itemsize for name in tensors}
    largest = max(sizes, key=lambda name: sizes[name])
    if sizes[largest] > _MOST_BYTES:
        raise UserError(
            f"{largest} has {sizes[largest]:,} bytes, and a record of EasyLM holds 4 GiB. Choose --dtype bfloat16."
        )
    with whole_folder(directory, "the model") as folder:
        check_room(folder, sum(sizes.values()), f"the weights of {directory.name}")
        packer = msgpack.Packer()
        with (folder / WEIGHTS_FILE).open("wb") as stream:
            for name in tensors:
                stream.write(packer.pack((name.split("."), _array_bytes(name, tensors))))
        write_text_atomically(folder / CONFIG_FILE, json.dumps(_config(weights), indent=2) + "\n")
        if tokenizer is not None:
            tokenizer.save(folder / TOKENIZER_FOLDER)


def _config(weights: Weights) -> dict[str, Any]:
    model, tokenizer, facts = weights.model, weights.tokenizer, weights.facts
    length = model.memory_window or facts.get("sequence_length")
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.dim,
        "intermediate_size": model.hidden_dim,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        **({} if length is None else {"max_sequence_length": length}),
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "tie_word_embeddings": model.tie_embeddings,
        "mem_layers": list(model.memory_layers),
        # an option of training there: without it the memory layers are plain layers
        "cross_batch_range": 0,
        "cross_batch_stepping": True,
        "dataset_packing": 1,
        **({} if tokenizer is None else {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eod}),
        FACTS: facts,
    }


def _model(config: HubConfig) -> ModelConfig:
    heads = config.integer("num_attention_heads")
    config.refuse("num_key_value_heads", (heads, None), "our reader knows a key-value head for every head")
    config.refuse("hidden_act", ("silu", None), "our feed-forward is SwiGLU, with silu")
    config.refuse("rope_scaling", (None,), "ours has a plain base, rope_theta")
    layers = config.values.get("mem_layers") or []
    if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
        raise UserError(f"{config.where}: mem_layers must be a list of numbers of layers, got {layers!r}.")
    memory = {"memory_layers": layers, "memory_window": config.integer("max_sequence_length", 2048)} if layers else {}
    return model_config_from_dict(
        {
            "pattern": "llama",
            "dim": config.integer("hidden_size"),
            "layers": config.integer("num_hidden_layers"),
            "hidden_dim": config.integer("intermediate_size"),
            "heads": heads,
            "vocab_size": config.integer("vocab_size"),
            "rope_theta": config.number("rope_theta", 10000.0),
            "norm_eps": config.number("rms_norm_eps", 1e-6),
            "tie_embeddings": bool(config.values.get("tie_word_embeddings", False)),
            **memory,
        },
        config.where,
    )


def _stream(folder: Path) -> Path:
    """The file of tensors in a folder: that without a step, or the only one."""
    found = sorted(path for path in folder.glob("streaming_*") if path.name.startswith((WEIGHTS_FILE, _TRAIN_STATE)))
    for name in (WEIGHTS_FILE, _TRAIN_STATE):
        if folder / name in found:
            return folder / name
    if len(found) == 1:
        return found[0]
    if not found:
        raise UserError(f"{folder} holds no {WEIGHTS_FILE}. Copy the whole folder again.")
    raise UserError(f"{folder} holds {', '.join(path.name for path in found)}. Give the path of one of them.")


def _kernels(own: Mapping[str, str]) -> set[str]:
    """Names of the matrices that are (in, out) there."""
    return {foreign for name, foreign in own.items() if name.endswith("_proj.weight") or name == "lm_head.weight"}


def _turned(model: ModelConfig) -> list[str]:
    """Canonical names of the matrices whose rows change places."""
    return [f"layers.{i}.mixer.{name}_proj.weight" for i in range(model.layers) for name in "qk"]


class _Transposed(Mapping[str, Tensor]):
    """Tensors of `source`, some of them, by name, with rows for columns."""

    def __init__(self, source: LazyTensors, names: Collection[str]) -> None:
        self._source, self._names = source, names

    def __getitem__(self, name: str) -> Tensor:
        return self._source[name].T.contiguous() if name in self._names else self._source[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._source)

    def __len__(self) -> int:
        return len(self._source)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        shape = self._source.shape(name)
        return shape[::-1] if name in self._names else shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor."""
        return self._source.dtype(name)


class _Place(NamedTuple):
    """Where the record of a tensor lies in a file, and what it is."""

    begin: int
    end: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class StreamedTensors(Mapping[str, Tensor]):
    """The parameters of a stream by their path, with dots and without leading `params`; each read when asked for.

    The file is gone through once at first, which the format needs to find anything.

    Raises:
        UserError: no such file, damaged, or it holds something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._places: dict[str, _Place] = {}
        try:
            with path.open("rb") as file:
                unpacker = msgpack.Unpacker(file, raw=True, max_buffer_size=0)
                while (begin := unpacker.tell()) < path.stat().st_size:
                    key, value = _record(unpacker.unpack())
                    if (name := _parameter(key)) is not None:
                        tensor = _array(value, f"{path}: {name}")
                        self._places[name] = _Place(begin, unpacker.tell(), tuple(tensor.shape), tensor.dtype)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}. {_AGAIN}") from error
        except (msgpack.UnpackException, ValueError, TypeError, RuntimeError) as error:
            reason = str(error) or "it ends in the middle of a tensor"
            raise UserError(f"{path} is damaged or no stream of EasyLM ({reason}). {_AGAIN}") from error

    def __getitem__(self, name: str) -> Tensor:
        place = self._places[name]
        with self.path.open("rb") as file:
            file.seek(place.begin)
            record = file.read(place.end - place.begin)
        return _array(_record(msgpack.unpackb(record, raw=True))[1], f"{self.path}: {name}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._places[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor."""
        return self._places[name].dtype


def _record(record: Any) -> tuple[list[str], bytes]:
    if not isinstance(record, list) or len(record) != 2 or not isinstance(record[1], bytes):
        raise ValueError("a record is no pair of path and bytes")
    return [part.decode() for part in record[0]], record[1]


def _parameter(key: list[str]) -> str | None:
    """Dotted path of a parameter; None for what else a train state holds."""
    while key and key[0] == "params":
        key = key[1:]
    return ".".join(key) if key and key[0] in _ROOTS else None


def _array(value: bytes, where: str) -> Tensor:
    """What flax's `from_bytes` makes of it."""
    content = msgpack.unpackb(value, raw=True, ext_hook=partial(_extension, where=where))
    if isinstance(content, Tensor):
        return content
    if isinstance(content, dict) and _CHUNKED.encode() in content:
        shape, chunks = content[b"shape"], content[b"chunks"]
        flat = torch.cat([chunks[str(i).encode()] for i in range(len(chunks))])
        return flat.view([shape[str(i).encode()] for i in range(len(shape))])
    raise ValueError("a record holds no array")


def _extension(code: int, data: bytes, where: str) -> Tensor:
    if code != _ARRAY:
        raise ValueError(f"a record holds an extension of type {code}")
    shape, name, content = msgpack.unpackb(data, raw=True)
    dtype = _DTYPES.get(name.decode())
    if dtype is None:
        raise UserError(f"{where} has dtype {name.decode()}, which weights do not have. Save it in a float type.")
    return torch.frombuffer(bytearray(content), dtype=dtype).view(shape)


def _array_bytes(name: str, tensors: LazyTensors) -> bytes:
    """What flax's `to_bytes` makes of a tensor."""
    shape, dtype = tensors.shape(name), tensors.dtype(name)
    content = tensor_bytes(name, tensors)
    if len(content) <= _CHUNK_BYTES:
        return msgpack.packb(_packed_array(shape, dtype, content))  # type: ignore[no-any-return]
    chunk = _CHUNK_BYTES // dtype.itemsize * dtype.itemsize
    pieces = [content[begin : begin + chunk] for begin in range(0, len(content), chunk)]
    return msgpack.packb(
        {
            _CHUNKED: True,
            "shape": {str(i): size for i, size in enumerate(shape)},
            "chunks": {
                str(i): _packed_array((len(piece) // dtype.itemsize,), dtype, piece) for i, piece in enumerate(pieces)
            },
        }
    )


def _packed_array(shape: tuple[int, ...], dtype: torch.dtype, content: memoryview) -> msgpack.ExtType:
    name = next(name for name, known in _DTYPES.items() if known == dtype)
    return msgpack.ExtType(_ARRAY, msgpack.packb((shape, name, content)))
