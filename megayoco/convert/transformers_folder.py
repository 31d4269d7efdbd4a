"""What all folders for transformers share: reading their config and tokenizer, writing everything but the names."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megayoco.config import ModelConfig
from megayoco.convert.card import model_card
from megayoco.convert.export import TOKENIZER_FOLDER, check_tokenizer
from megayoco.convert.folder import whole_folder
from megayoco.convert.names import EMBEDDING, check_tensors, tensor_shapes
from megayoco.convert.stored import open_weights
from megayoco.convert.weights import LazyTensors, Renamed, Weights
from megayoco.convert.writing import write_safetensors
from megayoco.data.files import read_json_object, write_text_atomically
from megayoco.data.tokenizer import Tokenizer, build_tokenizer
from megayoco.data.tokenizer.base import SAVED_NAME
from megayoco.data.tokenizer.export import write_for_transformers
from megayoco.errors import UserError

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
LM_HEAD = "lm_head.weight"
FACTS = "training_facts"
"""Key of config.json for what we know of the training; transformers keeps keys that it does not know."""

_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")


class HubConfig:
    """A config.json, or a section of one, whose values are asked for by key and kind.

    Attributes:
        where: file and section, for messages.
        values: what is there.
    """

    def __init__(self, where: str, values: Mapping[str, Any]) -> None:
        self.where, self.values = where, values

    @classmethod
    def of(cls, folder: Path) -> HubConfig:
        """The config of a folder. Raises UserError if there is none, or it is not JSON."""
        path = folder / CONFIG_FILE
        return cls(str(path), read_json_object(path, "Give a folder in the layout of Hugging Face."))

    def section(self, key: str) -> HubConfig:
        """The values under a key. Raises UserError if there are none."""
        values = self.values.get(key)
        if not isinstance(values, dict):
            raise UserError(f"{self.where} has no section {key}. Copy it again.")
        return HubConfig(f"{self.where}, {key}", values)

    def require_type(self, model_type: str, architecture: str) -> None:
        """Raises UserError unless the config is of this model type and architecture."""
        architectures = self.values.get("architectures") or [architecture]
        if self.values.get("model_type") != model_type or architectures != [architecture]:
            raise UserError(
                f"{self.where} describes {self.values.get('model_type')!r}, architectures {architectures}; only"
                f" {architecture} can be read here. Give the folder of such a model, or another --from."
            )

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive integer; without default the key must be there."""
        return self._number(key, default, int)

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number; without default the key must be there."""
        return float(self._number(key, default, (int, float)))

    def refuse(self, key: str, allowed: Iterable[Any], why: str) -> None:
        """Raises UserError if the key is there with a value that is not allowed."""
        if key in self.values and self.values[key] not in tuple(allowed):
            raise UserError(f"{self.where}: {key} is {json.dumps(self.values[key])}; {why}.")

    def recorded_facts(self) -> dict[str, Any]:
        """What the folder's writer knew of the training."""
        facts = self.values.get(FACTS)
        return dict(facts) if isinstance(facts, dict) else {}

    def facts(self) -> dict[str, Any]:
        """What is known of the training, its length by max_position_embeddings if by nothing else."""
        found = self.recorded_facts()
        longest = self.values.get("max_position_embeddings")
        if isinstance(longest, int):
            found.setdefault("sequence_length", longest)
        return found

    def _number(self, key: str, default: Any, kind: Any) -> Any:
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise UserError(f"{self.where} has no {key}. Copy it again.")
        if isinstance(value, bool) or not isinstance(value, kind) or not value > 0:
            raise UserError(f"{self.where}: {key} must be a positive number, got {json.dumps(value)}.")
        return value


def find_tokenizer(folder: Path, model: ModelConfig, given: Tokenizer | None) -> Tokenizer | None:
    """The given tokenizer, else that of a folder: ours where there is one, else that of transformers, else None.

    Raises:
        UserError: its files are broken, do not say which token ends a document, or it has more ids than the model.
    """
    tokenizer = _saved_tokenizer(folder) if given is None else given
    check_tokenizer(folder, tokenizer, model)
    return tokenizer


def _saved_tokenizer(folder: Path) -> Tokenizer | None:
    for place in (folder / TOKENIZER_FOLDER, folder):
        if (place / SAVED_NAME).exists():
            return Tokenizer.from_dir(place)
    if any((folder / name).exists() for name in _TOKENIZER_FILES):
        return build_tokenizer("HuggingFaceTokenizer", str(folder))
    return None


def open_hub_weights(
    folder: Path, model: ModelConfig, names: Mapping[str, str], ignored: Callable[[str], bool] | None = None
) -> LazyTensors:
    """The weights of a folder under the format's names, compared with the model's.

    Args:
        folder: with weights in the layout of Hugging Face.
        model: what its config describes.
        names: canonical name -> the format's.
        ignored: tells names of tensors that are no parameters.

    Raises:
        UserError: weights are missing, left over, of another shape, damaged; a tied head is stored and differs.
    """
    weights_file, tensors = open_weights(folder)
    left_out = {name for name in tensors if ignored is not None and ignored(name)}
    head, embedding = LM_HEAD, names[EMBEDDING]
    if model.tie_embeddings and head in tensors and embedding in tensors:
        if not torch.equal(tensors[embedding], tensors[head]):
            raise UserError(
                f"{weights_file}: {head} differs from {embedding}, though {CONFIG_FILE} ties them"
                " (tie_word_embeddings). Correct the one or the other."
            )
        left_out.add(head)
    kept = Renamed(tensors, {name: name for name in tensors if name not in left_out})
    shapes = {names[name]: shape for name, shape in tensor_shapes(model).items()}
    check_tensors(weights_file, kept, shapes, CONFIG_FILE)
    return kept


def write_hub_folder(
    directory: Path,
    config: Mapping[str, Any],
    weights: Weights,
    tensors: LazyTensors,
    *,
    shard_bytes: int,
    code: Sequence[Path] = (),
    example: str = "",
) -> None:
    """Write a folder for transformers: config, weights, generation config, tokenizer, model card, code.

    Args:
        directory: the folder to make; an older one is replaced when the new one is complete.
        config: of config.json, without dtype, ids of special tokens and facts.
        weights: the model, for its tokenizer and what the card tells.
        tensors: the tensors under the names of the format.
        shard_bytes: the most data in one file.
        code: Python files to copy.
        example: lines of Python that load the model from FOLDER, for the card.

    Raises:
        UserError: something cannot be written.
    """
    model, tokenizer = weights.model, weights.tokenizer
    dtypes = {tensors.dtype(name) for name in tensors}
    widest = max(dtypes, key=lambda dtype: dtype.itemsize)
    with whole_folder(directory, "the model") as folder:
        write_safetensors(folder, tensors, shard_bytes=shard_bytes)
        ids: dict[str, int | None] = {}
        if tokenizer is not None:
            tokenizer.save(folder / TOKENIZER_FOLDER)
            try:
                write_for_transformers(tokenizer, folder)
            except UserError as error:  # ours is there, so the weights are still of use
                logger.warning("%s: the tokenizer has no files for transformers. %s", directory, error)
            ids = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eod, "pad_token_id": _pad_id(folder)}
        longest = weights.facts.get("sequence_length")
        complete = {
            **({} if longest is None else {"max_position_embeddings": longest}),
            **config,
            **ids,
            "dtype": str(widest).removeprefix("torch."),
            FACTS: weights.facts,
        }
        _write_json(folder / CONFIG_FILE, complete)
        if tokenizer is not None:
            # batches need some padding; the config's own id would cost the embedding of this token its gradient
            pad = tokenizer.eod if ids["pad_token_id"] is None else ids["pad_token_id"]
            _write_json(folder / "generation_config.json", {**ids, "pad_token_id": pad})
        for file in code:
            shutil.copyfile(file, folder / file.name)
        card = model_card(model, weights.facts, widest, directory.name, bool(code), example)
        write_text_atomically(folder / "README.md", card)


def _pad_id(folder: Path) -> int | None:
    """Id of the padding token that the tokenizer's files name."""
    config, content = folder / "tokenizer_config.json", folder / "tokenizer.json"
    if not config.exists() or not content.exists():
        return None
    pad = json.loads(config.read_bytes()).get("pad_token")
    name = pad.get("content") if isinstance(pad, dict) else pad
    return next(
        (token["id"] for token in json.loads(content.read_bytes())["added_tokens"] if token["content"] == name), None
    )


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    write_text_atomically(path, json.dumps(values, indent=2) + "\n")
