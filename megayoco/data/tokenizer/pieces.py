"""SentencePieceTokenizer: tokenizer.model files, as of LLaMA and OpenLLaMA, by the sentencepiece library."""

import hashlib
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megayoco.data.tokenizer.base import REPLACEMENT, Tokenizer, encodable
from megayoco.errors import UserError

_SPACE = "\u2581"


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model; its ids are those of the sentencepiece library, without <s> or </s> around a text.

    This is `LlamaTokenizer(legacy=True)` on text without special tokens: a space is put before the text where the model
    was trained so. Control symbols in a text are plain text.

    Options:
        eod_token: the piece that ends a document, the model's end-of-sentence piece if not given.
    """

    type = "SentencePieceTokenizer"

    def __init__(self, model: str, options: Mapping[str, Any] | None = None):
        import sentencepiece

        self.model, self.options = model, dict(options or {})
        self.path = os.path.join(model, "tokenizer.model") if os.path.isdir(model) else model
        try:
            self._proto = Path(self.path).read_bytes()
        except OSError as error:
            raise UserError(f"cannot read the SentencePiece model {self.path}: {error.strerror}") from error
        try:
            self._engine = sentencepiece.SentencePieceProcessor(model_proto=self._proto)
        except RuntimeError as error:
            raise UserError(f"{self.path} is no SentencePiece model, or it is damaged. Copy it again.") from error
        engine = self._engine
        self.vocab_size = engine.get_piece_size()
        self.bos = engine.bos_id() if engine.bos_id() >= 0 else None
        eod_token = self.options.get("eod_token")
        self.eod = engine.eos_id() if eod_token is None else engine.piece_to_id(eod_token)
        if self.eod < 0 or (eod_token is not None and engine.id_to_piece(self.eod) != eod_token):
            raise UserError(f"{self.path} has no piece that ends documents. Name one by --eod-token.")

    def _encode_batch(self, texts: Sequence[str], allow_special: bool) -> tuple[np.ndarray, np.ndarray]:
        if allow_special:
            raise UserError("SentencePiece models encode no special tokens in text: leave out --allow-special.")
        parts = self._engine.encode([encodable(text) for text in texts], num_threads=1)
        lengths = np.array([len(part) for part in parts], np.int64)
        tokens = np.fromiter((i for part in parts for i in part), np.uint32, int(lengths.sum()))
        return tokens, lengths

    def special_names(self) -> dict[str, str]:
        """Names of the end-of-document token and of the model's others, under transformers' keys."""
        engine = self._engine
        numbers = {"bos_token": engine.bos_id(), "unk_token": engine.unk_id(), "pad_token": engine.pad_id()}
        names = {key: engine.id_to_piece(number) for key, number in numbers.items() if number >= 0}
        return names | {"eos_token": engine.id_to_piece(self.eod)}

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of these ids, as pieces: the space that `encode` puts before a text stays."""
        parts, engine = [], self._engine
        for i in ids:
            if i >= self.vocab_size or engine.is_unknown(i):
                parts.append(REPLACEMENT)
            elif engine.is_byte(i):
                parts.append(bytes([int(engine.id_to_piece(i)[1:-1], 16)]))
            elif not engine.is_control(i):
                parts.append(engine.id_to_piece(i).replace(_SPACE, " ").encode())
        return b"".join(parts)

    def vocabulary(self) -> dict[int, bytes]:
        engine = self._engine
        numbers = (i for i in range(self.vocab_size) if not engine.is_control(i) and not engine.is_unused(i))
        return {i: self.decode_bytes([i]) for i in numbers}

    def fallback_ids(self) -> set[int]:
        engine = self._engine
        return {i for i in range(self.vocab_size) if engine.is_byte(i) or engine.is_unknown(i)}

    def _fingerprint(self) -> Iterable[bytes]:
        yield hashlib.sha256(self._proto).digest()
        yield b"eod %d" % self.eod

    def _save_model(self, folder: Path) -> tuple[str, dict[str, Any]]:
        shutil.copyfile(self.path, folder / "tokenizer.model")
        return "tokenizer.model", dict(self.options)
