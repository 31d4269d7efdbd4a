"""The interface of every tokenizer, and the one that needs no library."""

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megayoco.data.files import write_text_atomically
from megayoco.errors import UserError

SAVED_NAME = "megayoco_tokenizer.json"
REPLACEMENT = "\ufffd".encode()


class EncodingError(UserError):
    """A text that a tokenizer cannot encode; `document` is its place among the texts of the call."""

    def __init__(self, message: str, document: int = 0):
        super().__init__(message)
        self.document = document


class Tokenizer(ABC):
    """Text to token ids and back. Strings that look like special tokens are plain text unless the caller allows them.

    Attributes:
        type: the name that `build_tokenizer` knows it by.
        vocab_size: number of ids, special tokens included; every id is below it.
        eod: the id that ends a document.
        bos: the id that begins a text for models that want one, None if there is none; `encode` never adds it.
        model: file, folder or encoding name that it was built from, None if it needs none.
        options: what `build_tokenizer` needs besides type and model, JSON-able.
    """

    type: str
    vocab_size: int
    eod: int
    bos: int | None = None
    model: str | None = None
    options: Mapping[str, Any] = {}

    @abstractmethod
    def _encode_batch(self, texts: Sequence[str], allow_special: bool) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts one after the other (n,), unsigned, and the number of ids of each (len(texts),) int64."""

    @abstractmethod
    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of these ids, which may end inside a UTF-8 character; ids without a token give U+FFFD."""

    @abstractmethod
    def vocabulary(self) -> dict[int, bytes]:
        """The ids that plain text can give, with their bytes."""

    @abstractmethod
    def _fingerprint(self) -> Iterable[bytes]:
        """Everything that decides the ids of a text and of its end, for the identity's hash."""

    @abstractmethod
    def _save_model(self, folder: Path) -> tuple[str | None, dict[str, Any]]:
        """Write what rebuilds this tokenizer into `folder`; returns model, relative to it, and options to do so."""

    def encode_documents(
        self, texts: Sequence[str], *, append_eod: bool = False, allow_special: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of many documents, in one call of the engine, which releases the GIL.

        Args:
            texts: the documents; lone surrogates in them become U+FFFD.
            append_eod: end every document that is not empty with `eod`.
            allow_special: strings of special tokens in the texts become these tokens, instead of plain text.

        Returns:
            tokens (n,), unsigned integers: all documents one after the other; lengths (len(texts),) int64, the eod
            included. An empty text has length 0 and no eod.

        Raises:
            EncodingError: a text that the engine cannot encode, with its place in `texts`.
        """
        tokens, lengths = self._encode_batch(texts, allow_special)
        if append_eod:
            written = lengths > 0
            ends = lengths.cumsum()
            tokens = np.insert(tokens.astype(np.uint32, copy=False), ends[written], self.eod)
            lengths = lengths + written
        return tokens, lengths

    def encode_array(self, text: str) -> np.ndarray:
        """Token ids of `text` (n,), unsigned integers; special-token strings are plain text."""
        return self._encode_batch([text], False)[0]

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; special-token strings are plain text."""
        return self.encode_array(text).tolist()

    def decode(self, ids: Iterable[int]) -> str:
        """Text of these ids; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def fallback_ids(self) -> set[int]:
        """The ids of `vocabulary` that stand for a part of a character, or for one the vocabulary lacks."""
        return {number for number, token in self.vocabulary().items() if not _is_utf8(token)}

    def identity(self) -> dict[str, Any]:
        """type, sha256, vocab_size and eod: equal for tokenizers that give every text the same ids."""
        digest = hashlib.sha256()
        for part in self._fingerprint():
            digest.update(len(part).to_bytes(8, "little") + part)
        return {"type": self.type, "sha256": digest.hexdigest(), "vocab_size": self.vocab_size, "eod": self.eod}

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write all that `from_dir` needs, so that the folder can be moved without the original files."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        model, options = self._save_model(folder)
        saved = {**self.identity(), "model": model, "options": options}
        write_text_atomically(folder / SAVED_NAME, json.dumps(saved, indent=2) + "\n")

    @staticmethod
    def from_dir(folder: str | os.PathLike[str]) -> "Tokenizer":
        """The tokenizer that `save` wrote into `folder`.

        Raises:
            UserError: there is none, or its files were changed since.
        """
        from megayoco.data.tokenizer.build import load_saved

        return load_saved(Path(folder))


class ByteTokenizer(Tokenizer):
    """One token per UTF-8 byte, 256 is end of document: for tests and demonstrations."""

    type = "ByteTokenizer"
    vocab_size = 257
    eod = 256

    def _encode_batch(self, texts: Sequence[str], allow_special: bool) -> tuple[np.ndarray, np.ndarray]:
        encoded = [encodable(text).encode("utf-8") for text in texts]
        return np.frombuffer(b"".join(encoded), np.uint8), np.array([len(text) for text in encoded], np.int64)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(bytes([i]) if i < 256 else b"" if i == self.eod else REPLACEMENT for i in ids)

    def vocabulary(self) -> dict[int, bytes]:
        return {i: bytes([i]) for i in range(256)}

    def _fingerprint(self) -> Iterable[bytes]:
        return [b"bytes, 256 ends a document"]

    def _save_model(self, folder: Path) -> tuple[None, dict[str, Any]]:
        return None, {}


def _is_utf8(token: bytes) -> bool:
    try:
        token.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def encodable(text: str) -> str:
    """The same text with lone surrogates replaced by U+FFFD, pairs joined, as tiktoken does."""
    if text.isascii():
        return text
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
