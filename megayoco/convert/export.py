"""The export: a model's weights as one folder, whole tensors under canonical names, for generation and conversion.

    DIRECTORY/model.safetensors  every parameter once, in the dtype it was trained in; a tied head is absent
    DIRECTORY/config.json        format, version, model (every field of ModelConfig), facts (step, tokens seen, ...)
    DIRECTORY/tokenizer/         what Tokenizer.from_dir reads, and tokenizer.json for transformers if there can be one

The folder does not depend on the parallel layout of the run, holds no pickle, and can be moved.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megayoco.config import ModelConfig, model_config_from_dict, model_config_to_dict
from megayoco.data.files import read_json_object, write_text_atomically
from megayoco.data.tokenizer import Tokenizer
from megayoco.data.tokenizer.export import write_for_transformers
from megayoco.errors import UserError

logger = logging.getLogger(__name__)

FORMAT = "megayoco"
VERSION = 1
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
TOKENIZER_FOLDER = "tokenizer"
_ENTRIES = {WEIGHTS_FILE, CONFIG_FILE, TOKENIZER_FOLDER}
_HEAD = "lm_head.weight"


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

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header alone."""
        return tuple(self._file.get_slice(name).get_shape())


class Export(NamedTuple):
    """What a folder written by `write_export` holds."""

    model: ModelConfig
    tensors: StoredTensors
    """Full tensors by canonical name, read when asked for."""
    tokenizer: Tokenizer
    facts: dict[str, Any]
    """What the writer noted about the weights."""


def tensor_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Full shape of every parameter of a model by canonical name; a tied head stands under the embedding's alone.

    Arithmetic, not a built model: layers need seconds to import, and inside a parallel run they only come in shards.
    """
    D, hidden, kv = model.dim, model.hidden_dim, model.num_kv_heads * model.head_dim
    square = (D, D)
    mixers = {
        "retention": {**dict.fromkeys("q k v g out".split(), square), "gt": (model.num_self_heads, D)},
        "window": dict.fromkeys("q k v out".split(), square),
        "full": {"q": square, "k": (kv, D), "v": (kv, D), "out": square},
        "cross": {"q": square, "out": square},
    }
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (model.vocab_size, D), "norm.weight": (D,)}
    if not model.tie_embeddings:
        shapes[_HEAD] = (model.vocab_size, D)
    pattern = model.layer_pattern()
    if "shared_kv" in pattern:
        shapes |= {
            "shared_kv.norm.weight": (D,),
            "shared_kv.k_proj.weight": (kv, D),
            "shared_kv.v_proj.weight": (kv, D),
        }
    for i, kind in enumerate(kind for kind in pattern if kind != "shared_kv"):
        layer = {f"mixer.{name}_proj": shape for name, shape in mixers[kind].items()}
        layer |= {"ffn.gate_proj": (hidden, D), "ffn.up_proj": (hidden, D), "ffn.down_proj": (D, hidden)}
        shapes |= {f"layers.{i}.{name}.weight": shape for name, shape in layer.items()}
        shapes |= {f"layers.{i}.{name}.weight": (D,) for name in ("mixer_norm", "ffn_norm")}
    return shapes


def write_export(
    directory: str | os.PathLike[str],
    model: ModelConfig,
    tensors: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    *,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Write an export; it appears complete or not at all, and replaces an older export of ours.

    Args:
        directory: the folder to write; its parents are made.
        model: the shape of the weights; `rope_theta` is the base they were trained with last.
        tensors: full tensors by canonical name, on any device, of any dtype.
        tokenizer: the one that the model's tokens come from.
        facts: what else is worth knowing of the weights, JSON-able: step, tokens seen, loss.

    Raises:
        ValueError: the tensors are not those of `model`.
        UserError: `directory` holds something else, or cannot be written.
    """
    shapes = tensor_shapes(model)
    given = {name: tuple(tensors[name].shape) for name in tensors if not (model.tie_embeddings and name == _HEAD)}
    if given != shapes:
        wrong = sorted(name for name in {*shapes, *given} if shapes.get(name) != given.get(name))
        raise ValueError(
            f"the tensors do not fit the model, first {wrong[0]}: {given.get(wrong[0])}, not {shapes.get(wrong[0])}"
        )
    target = Path(directory)
    check_replaceable(target)
    partial, replaced = (target.with_name(f".{target.name}.{suffix}") for suffix in ("partial", "replaced"))
    config = {
        "format": FORMAT,
        "version": VERSION,
        "model": model_config_to_dict(model),
        "facts": dict(facts or {}),
    }
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        # transformers refuses a file without this entry
        contiguous = {name: tensors[name].detach().contiguous() for name in shapes}
        save_file(contiguous, partial / WEIGHTS_FILE, metadata={"format": "pt"})
        tokenizer.save(partial / TOKENIZER_FOLDER)
        try:
            write_for_transformers(tokenizer, partial / TOKENIZER_FOLDER)
        except UserError as error:  # its own files are there: nothing of ours needs those of transformers
            logger.warning("%s: the tokenizer has no files for transformers. %s", target, error)
        write_text_atomically(partial / CONFIG_FILE, json.dumps(config, indent=2) + "\n")
        _flush(partial / WEIGHTS_FILE)
        # a folder cannot replace a full one in one step: the older export goes only when the new one is on disk
        shutil.rmtree(replaced, ignore_errors=True)
        if target.exists():
            target.rename(replaced)
        partial.rename(target)
        shutil.rmtree(replaced, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"the export {target} cannot be written: {reason}. Make room, or make it writable.") from error


def read_export(directory: str | os.PathLike[str]) -> Export:
    """What an export holds, its tensors checked by name and shape, none of them read yet.

    Raises:
        UserError: not an export of ours, of a later version, incomplete, damaged, or its parts do not fit.
    """
    folder = Path(directory)
    path = folder / CONFIG_FILE
    config = read_json_object(path, remedy="Give the folder of an export, or a run directory that has one.")
    if config.get("format") != FORMAT:
        raise UserError(f"{path} does not describe an export of MegaYOCO. Give a folder that a training run wrote.")
    if config.get("version") != VERSION:
        raise UserError(f"{path} has version {config.get('version')!r}, this release reads {VERSION}. Export again.")
    if not isinstance(config.get("model"), dict):
        raise UserError(f"{path} has no section `model`. Export again.")
    model = model_config_from_dict(config["model"], f"{path}, model")
    tokenizer = Tokenizer.from_dir(folder / TOKENIZER_FOLDER)
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size:,} ids, the model's vocabulary {model.vocab_size:,}. "
            "They belong to two runs: copy the whole folder again."
        )
    tensors = StoredTensors(folder / WEIGHTS_FILE)
    _check_tensors(tensors, tensor_shapes(model))
    facts = config.get("facts")
    return Export(model, tensors, tokenizer, facts if isinstance(facts, dict) else {})


def is_export(directory: Path) -> bool:
    """Whether a folder has the config of an export, complete or not."""
    try:
        config = json.loads((directory / CONFIG_FILE).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("format") == FORMAT


def _check_tensors(tensors: StoredTensors, shapes: Mapping[str, tuple[int, ...]]) -> None:
    remedy = "Weights and config belong to two models: copy the whole folder again, or export again."
    for what, names in (
        ("lacks the tensor", shapes.keys() - tensors.keys()),
        ("holds what the model lacks,", tensors.keys() - shapes.keys()),
    ):
        if names:
            first = min(names)
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"{tensors.path} {what} {first}{more}. {remedy}")
    for name, shape in shapes.items():
        if tensors.shape(name) != shape:
            raise UserError(
                f"{tensors.path}: {name} has shape {tensors.shape(name)}, {CONFIG_FILE} asks for {shape}. {remedy}"
            )


def check_replaceable(target: Path) -> None:
    """Raises UserError unless `target` is absent, an empty folder, or an export with nothing else in it."""
    if not target.exists():
        return
    if not target.is_dir():
        raise UserError(f"{target} is a file, where the export's folder should go. Move it away, or choose another.")
    found = {path.name for path in target.iterdir()}
    if found and not is_export(target):
        raise UserError(f"{target} is not empty and not an export of ours. Move it away, or choose another folder.")
    if found - _ENTRIES:
        raise UserError(
            f"{target} holds an export and {min(found - _ENTRIES)}, which replacing it would delete. Move that away."
        )


def _flush(path: Path) -> None:
    """On disk before the folder gets its name."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
