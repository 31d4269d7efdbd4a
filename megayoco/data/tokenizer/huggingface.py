"""HuggingFaceTokenizer: tokenizer.json, or vocab.json with merges.txt, with the ids of the tokenizers library."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from megayoco.data.files import write_text_atomically
from megayoco.data.tokenizer.base import REPLACEMENT, EncodingError, Tokenizer, encodable
from megayoco.data.tokenizer.byte_level import NotEqual, byte_of_character, tiktoken_engine
from megayoco.data.tokenizer.engine import TiktokenEngine
from megayoco.data.tokenizer.tokenizer_json import fingerprint, read_tokenizer_json, token_name
from megayoco.errors import UserError

ENGINES = ("auto", "tokenizers")

_COMPARED_CHARACTERS = 200_000


def load_huggingface(model: str | None, options: Mapping[str, Any]) -> Tokenizer:
    """A HuggingFaceTokenizer, or a SentencePieceTokenizer where `model` holds only a SentencePiece model.

    Raises:
        UserError: no tokenizer there, broken files, no end-of-document token.
    """
    if model is not None:
        held = set(os.listdir(model)) if os.path.isdir(model) else {os.path.basename(model)}
        if not held & {"tokenizer.json", "vocab.json"} and any(name.endswith(".model") for name in held):
            from megayoco.data.tokenizer.pieces import SentencePieceTokenizer

            return SentencePieceTokenizer(model, {key: options[key] for key in options if key == "eod_token"})
    return HuggingFaceTokenizer(model, options)


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer of the tokenizers library, without the special tokens that its post-processor would add to a text.

    A byte-level BPE is encoded by tiktoken where that is proven to give the same ids (byte_level.py); the first texts
    are encoded both ways even so, and must agree.

    Args:
        model: tokenizer.json, or a folder with it or with vocab.json and merges.txt, and with tokenizer_config.json.

    Options:
        eod_token: the token that ends a document; the eos_token of tokenizer_config.json if not given.
        vocab_file, merge_file: vocab.json and merges.txt of a GPT-2 vocabulary, in place of a model.
        engine: `tokenizers` never uses tiktoken; `auto` (the default) uses it where it may.

    Attributes:
        content: tokenizer.json.
        config: tokenizer_config.json and special_tokens_map.json beside it, in one.
        slow_because: why tiktoken does not encode, None if it does.
    """

    type = "HuggingFaceTokenizer"

    def __init__(self, model: str | None, options: Mapping[str, Any] | None = None):
        self.model, self.options = model, dict(options or {})
        self.content, self.config = read_tokenizer_json(model, self.options)
        self._name = model or str(self.options["vocab_file"])
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(self.content))
        except Exception as error:  # the library raises a bare Exception
            raise UserError(f"{self._name}: the tokenizers library refuses it: {error}. Copy it again.") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        added = self.content.get("added_tokens") or ()
        self.special_tokens = {token["content"]: token["id"] for token in added if token.get("special")}
        self._added = {token["id"] for token in added}
        # tokenizers takes them out of every text, before it cuts the rest
        self._always_tokens = [token["content"] for token in added if not token.get("special")]

        eod_token = self.options.get("eod_token") or token_name(self.config.get("eos_token"))
        if eod_token not in vocabulary:
            which = "does not say which token ends documents" if eod_token is None else f"has no token {eod_token}"
            raise UserError(
                f"{self._name} {which}. Name one by --eod-token; its special"
                f" tokens are {', '.join(self.special_tokens) or 'none'}."
            )
        self.eod = vocabulary[eod_token]
        self.bos = vocabulary.get(token_name(self.config.get("bos_token")) or "")

        decoder = json.dumps(self.content.get("decoder"), ensure_ascii=False)
        self._byte_of = byte_of_character() if '"ByteLevel"' in decoder else None
        self._blank = "\u2581" in decoder  # spelled by this character, as in SentencePiece

        self._fast: tuple[TiktokenEngine, np.ndarray] | None = None
        self.slow_because: str | None = None
        self._compared = False
        engine = self.options.get("engine", "auto")
        if engine not in ENGINES:
            raise UserError(f"unknown tokenizer engine {engine!r}. There are {' and '.join(ENGINES)}.")
        try:
            if engine == "tokenizers":
                raise NotEqual("the engine tokenizers was asked for")
            self._fast = tiktoken_engine(self.content, self._name)
        except NotEqual as reason:
            self.slow_because = str(reason)

    def _encode_batch(self, texts: Sequence[str], allow_special: bool) -> tuple[np.ndarray, np.ndarray]:
        texts = [encodable(text) for text in texts]
        if self._fast is None or allow_special:
            return self._encode_slowly(texts, allow_special)
        if not self._compared:
            self._compare(texts)
        return self._encode_fast(texts)

    def _encode_slowly(self, texts: Sequence[str], allow_special: bool) -> tuple[np.ndarray, np.ndarray]:
        self._tokenizer.encode_special_tokens = not allow_special
        try:
            encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception as error:  # the library raises a bare Exception
            if len(texts) == 1:
                raise EncodingError(f"{self._name}: the tokenizers library cannot encode a text: {error}") from error
            return self._one_by_one(texts, allow_special)
        parts = [np.array(one.ids, np.uint32) for one in encoded]
        return _joined(parts)

    def _one_by_one(self, texts: Sequence[str], allow_special: bool) -> tuple[np.ndarray, np.ndarray]:
        parts = []
        for number, text in enumerate(texts):
            try:
                parts.append(self._encode_slowly([text], allow_special)[0])
            except EncodingError as error:
                raise EncodingError(str(error), number) from error
        return _joined(parts)

    def _encode_fast(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        assert self._fast is not None
        engine, ids = self._fast
        normalizer = self._tokenizer.normalizer
        normal = texts
        if normalizer is not None:
            normal = [text if text.isascii() else normalizer.normalize_str(text) for text in texts]
        odd = [
            number
            for number, (text, raw) in enumerate(zip(normal, texts, strict=True))
            if any(token in text or token in raw for token in self._always_tokens)
        ]
        if not odd:
            try:
                tokens, lengths = engine.encode(normal, False)
            except EncodingError:  # more than tiktoken can do, or a pattern that leaves text between its matches
                return self._encode_slowly(texts, False)
            return ids[tokens], lengths
        slow = set(odd)
        fast = [number for number in range(len(texts)) if number not in slow]
        parts: list[np.ndarray] = [np.zeros(0, np.uint32)] * len(texts)
        for numbers, (tokens, lengths) in (
            (odd, self._encode_slowly([texts[number] for number in odd], False)),
            (fast, self._encode_fast([texts[number] for number in fast])),
        ):
            for number, part in zip(numbers, np.split(tokens, lengths.cumsum())[:-1], strict=True):
                parts[number] = part
        return _joined(parts)

    def _compare(self, texts: Sequence[str]) -> None:
        """Raises RuntimeError if the two engines disagree on the first texts."""
        sample, characters = [], 0
        for text in texts:
            sample.append(text[: _COMPARED_CHARACTERS - characters])
            characters += len(sample[-1])
        sample = [text for text in sample if text]
        self._compared = bool(sample)
        if sample and not all(map(np.array_equal, self._encode_fast(sample), self._encode_slowly(sample, False))):
            raise RuntimeError(
                f"{self._name}: tiktoken and tokenizers give different ids, though they were proven equal. This is a"
                " bug of MegaYOCO, please report it; --tokenizer-engine tokenizers goes on without tiktoken."
            )

    def special_names(self) -> dict[str, str]:
        """Names of the end-of-document token and of the others that its config names, under transformers' keys."""
        keys = ("bos_token", "pad_token", "unk_token")
        names = {key: name for key in keys if (name := token_name(self.config.get(key))) is not None}
        return names | {"eos_token": str(self._tokenizer.id_to_token(self.eod))}

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(map(self._bytes_of, ids))

    def _bytes_of(self, number: int) -> bytes:
        token = self._tokenizer.id_to_token(number) if number < self.vocab_size else None
        if token is None:
            return REPLACEMENT
        if number in self._added:
            return token.encode()
        if self._byte_of is not None:
            return bytes(self._byte_of[c] for c in token) if self._byte_of.keys() >= set(token) else token.encode()
        if self.content["model"].get("byte_fallback") and len(token) == 6 and token.startswith("<0x"):
            return bytes([int(token[3:5], 16)])
        if self._blank:
            return token.replace("\u2581", " ").encode()
        return self._tokenizer.decode([number], skip_special_tokens=False).encode()

    def vocabulary(self) -> dict[int, bytes]:
        special = set(self.special_tokens.values())
        numbers = self._tokenizer.get_vocab(with_added_tokens=True).values()
        return {number: self._bytes_of(number) for number in sorted(set(numbers) - special)}

    def fallback_ids(self) -> set[int]:
        ids = super().fallback_ids()
        model = self.content["model"]
        names = [f"<0x{i:02X}>" for i in range(256)] if model.get("byte_fallback") else []
        numbers = map(self._tokenizer.token_to_id, (*names, model.get("unk_token") or ""))
        return ids | {number for number in numbers if number is not None}

    def _fingerprint(self) -> Iterable[bytes]:
        yield from fingerprint(self.content)
        yield b"eod %d" % self.eod

    def _save_model(self, folder: Path) -> tuple[str, dict[str, Any]]:
        name = "tokenizer.json"
        write_text_atomically(folder / name, json.dumps(self.content, ensure_ascii=False) + "\n")
        return name, {"eod_token": self._tokenizer.id_to_token(self.eod)}


def _joined(parts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.concatenate([*parts, np.zeros(0, np.uint32)])
    return tokens, np.array([len(part) for part in parts], np.int64)
