"""HuggingFaceTokenizer: tokenizer.json, or vocab.json with merges.txt, by the tokenizers library."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from megayoco.data.files import read_json_object, write_text_atomically
from megayoco.data.tokenizer.base import REPLACEMENT, Tokenizer, encodable
from megayoco.errors import UserError


def load_huggingface(model: str | None, options: Mapping[str, Any]) -> Tokenizer:
    """A HuggingFaceTokenizer, or a SentencePieceTokenizer where `model` holds only a SentencePiece model.

    Raises:
        UserError: no tokenizer there, broken files, no end-of-document token.
    """
    if model is not None:
        folder = os.path.isdir(model)
        only_pieces = os.path.exists(os.path.join(model, "tokenizer.model")) and not any(
            os.path.exists(os.path.join(model, name)) for name in ("tokenizer.json", "vocab.json")
        )
        if (folder and only_pieces) or (not folder and model.endswith(".model")):
            from megayoco.data.tokenizer.pieces import SentencePieceTokenizer

            return SentencePieceTokenizer(model, options)
    return HuggingFaceTokenizer(model, options)


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer of the tokenizers library, without the special tokens that its post-processor would add.

    Options:
        eod_token: the token that ends a document; the eos_token of tokenizer_config.json if not given.
        vocab_file, merge_file: vocab.json and merges.txt of a GPT-2 vocabulary, in place of a model.
    """

    type = "HuggingFaceTokenizer"

    def __init__(self, model: str | None, options: Mapping[str, Any] | None = None):
        self.model, self.options = model, dict(options or {})
        self._content, config = _read(model, self.options)
        where = model or self.options["vocab_file"]
        try:
            self._engine = tokenizers.Tokenizer.from_str(json.dumps(self._content))
        except Exception as error:  # the library raises a bare Exception
            raise UserError(f"{where}: the tokenizers library refuses it: {error}") from error
        self._engine.no_padding()
        self._engine.no_truncation()
        vocabulary = self._engine.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        eod_token = self.options.get("eod_token") or _token_name(config.get("eos_token"))
        if eod_token not in vocabulary:
            specials = [t["content"] for t in self._content.get("added_tokens", ()) if t.get("special")]
            raise UserError(
                f"{where} does not say which token ends documents, or lacks it ({eod_token}). Name one by --eod-token;"
                f" its special tokens are {', '.join(specials) or 'none'}."
            )
        self.eod = vocabulary[eod_token]
        self.bos = vocabulary.get(_token_name(config.get("bos_token")) or "")

    def _encode_batch(self, texts: Sequence[str], allow_special: bool) -> tuple[np.ndarray, np.ndarray]:
        self._engine.encode_special_tokens = not allow_special
        encoded = self._engine.encode_batch_fast([encodable(text) for text in texts], add_special_tokens=False)
        parts = [np.array(one.ids, np.uint32) for one in encoded]
        tokens = np.concatenate(parts) if parts else np.zeros(0, np.uint32)
        return tokens, np.array([len(part) for part in parts], np.int64)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        known = [i if self._engine.id_to_token(i) is not None else None for i in ids]
        parts, run = [], []
        for i in [*known, None]:
            if i is not None:
                run.append(i)
                continue
            if run:
                parts.append(self._engine.decode(run, skip_special_tokens=False).encode())
            parts.append(REPLACEMENT)
            run = []
        return b"".join(parts[:-1])

    def _fingerprint(self) -> Iterable[bytes]:
        for part in ("normalizer", "pre_tokenizer", "model", "added_tokens"):
            yield json.dumps(self._content.get(part), sort_keys=True).encode()
        yield b"eod %d" % self.eod

    def _save_model(self, folder: Path) -> tuple[str, dict[str, Any]]:
        name = "tokenizer.json"
        write_text_atomically(folder / name, json.dumps(self._content, ensure_ascii=False) + "\n")
        return name, {"eod_token": self._engine.id_to_token(self.eod)}


def _read(model: str | None, options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The content of tokenizer.json, and of the configs beside it, joined."""
    vocab_file, merge_file = options.get("vocab_file"), options.get("merge_file")
    if model is not None:
        folder, path = (
            (model, os.path.join(model, "tokenizer.json")) if os.path.isdir(model) else (os.path.dirname(model), model)
        )
        config: dict[str, Any] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if os.path.exists(os.path.join(folder, name)):
                config |= read_json_object(os.path.join(folder, name), remedy="Copy the tokenizer again.")
        if not os.path.exists(path) and os.path.exists(os.path.join(model, "vocab.json")):
            vocab_file, merge_file = os.path.join(model, "vocab.json"), os.path.join(model, "merges.txt")
        else:
            return read_json_object(path, remedy="Give a tokenizer.json, or a folder that holds one."), config
    else:
        config = {}
    if vocab_file is None or merge_file is None:
        raise UserError("A GPT-2 vocabulary needs both --vocab-file (vocab.json) and --merge-file (merges.txt).")
    vocabulary = read_json_object(vocab_file, remedy="Give the vocab.json of a GPT-2 vocabulary.")
    try:
        lines = Path(merge_file).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {merge_file}: {error}. Give the merges.txt of a GPT-2 vocabulary.") from error
    merges = [line.rstrip("\r") for line in lines if line.strip() and not line.startswith("#version")]
    engine = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab=vocabulary, merges=[(line.split(" ")[0], line.split(" ")[-1]) for line in merges])
    )
    engine.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = tokenizers.decoders.ByteLevel()
    eos = "<|endoftext|>"
    if eos in vocabulary:
        engine.add_special_tokens([eos])
        config.setdefault("eos_token", eos)
    return json.loads(engine.to_str()), config


def _token_name(value: Any) -> str | None:
    """The name of a token in a config: a string, or an object with `content`."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None
