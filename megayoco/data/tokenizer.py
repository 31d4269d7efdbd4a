"""Tokenizers behind one small interface: text to token ids and back, without torch.

A tokenizer knows its vocabulary size (ids run from 0 to vocab_size - 1), the id that ends a document (`eod`), and its
identity: a hash of everything that decides which ids a text becomes. Strings that look like special tokens are plain
text in every `encode`: no document can write control tokens.
"""

import base64
import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

from megayoco.errors import UserError

CL100K_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
"""How text is cut into words before merging, if the sidecar of a rank file does not say otherwise."""

END_OF_DOCUMENT = "<|endoftext|>"
TOKENIZER_TYPES = ("TiktokenTokenizer", "ByteTokenizer")
_SAVED_NAME = "megayoco_tokenizer.json"


class Tokenizer(ABC):
    """Text to token ids and back.

    Attributes:
        vocab_size: number of ids, special tokens included; every id is below it.
        eod: the id that ends a document.
        model: rank file or encoding name that it was built from, None if it needs none.
    """

    type: str
    vocab_size: int
    eod: int
    model: str | None = None

    @abstractmethod
    def encode_array(self, text: str) -> np.ndarray:
        """Token ids of `text` (n,), unsigned integers; special-token strings are plain text."""

    @abstractmethod
    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of these ids, which may end inside a UTF-8 character; ids without a token give U+FFFD."""

    @abstractmethod
    def _fingerprint(self) -> Iterable[bytes]:
        """Everything that decides the ids of a text, for the identity's hash."""

    @abstractmethod
    def _save_model(self, folder: Path) -> str | None:
        """Write the files that rebuild this tokenizer into `folder`; returns the model's file name there."""

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; special-token strings are plain text."""
        return self.encode_array(text).tolist()

    def decode(self, ids: Iterable[int]) -> str:
        """Text of these ids; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def identity(self) -> dict[str, Any]:
        """type, sha256, vocab_size and eod: equal for tokenizers that give every text the same ids."""
        digest = hashlib.sha256()
        for part in self._fingerprint():
            digest.update(len(part).to_bytes(8, "little") + part)
        return {"type": self.type, "sha256": digest.hexdigest(), "vocab_size": self.vocab_size, "eod": self.eod}

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write all that `from_dir` needs, so that the folder can be moved without the original rank file."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        saved = {**self.identity(), "model": self._save_model(folder)}
        write_text_atomically(folder / _SAVED_NAME, json.dumps(saved, indent=2) + "\n")

    @staticmethod
    def from_dir(folder: str | os.PathLike[str]) -> "Tokenizer":
        """The tokenizer that `save` wrote into `folder`.

        Raises:
            UserError: there is none, or its files were changed since.
        """
        path = Path(folder) / _SAVED_NAME
        saved = read_json_object(path, remedy="Give a folder that a training run or an export wrote.")
        model = saved.get("model")
        tokenizer = build_tokenizer(str(saved.get("type")), None if model is None else str(Path(folder) / str(model)))
        if tokenizer.identity()["sha256"] != saved.get("sha256"):
            raise UserError(
                f"{path} describes another tokenizer than the files beside it. Copy the whole folder again."
            )
        return tokenizer


class ByteTokenizer(Tokenizer):
    """One token per UTF-8 byte, 256 is end of document: for tests and demonstrations."""

    type = "ByteTokenizer"
    vocab_size = 257
    eod = 256

    def encode_array(self, text: str) -> np.ndarray:
        return np.frombuffer(_encodable(text).encode("utf-8"), np.uint8)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(bytes([i]) if i < 256 else b"" if i == self.eod else "\ufffd".encode() for i in ids)

    def _fingerprint(self) -> Iterable[bytes]:
        return [b"bytes, 256 ends a document"]

    def _save_model(self, folder: Path) -> None:
        return None


class TiktokenTokenizer(Tokenizer):
    """Byte-level BPE by tiktoken, from a local rank file or a named encoding such as cl100k_base.

    A rank file holds one `BASE64 RANK` per line. FILE.json beside it may give `pattern` and `special_tokens`
    (name -> id); without it the pattern is CL100K_PATTERN and <|endoftext|> the first id after the ranks.
    """

    type = "TiktokenTokenizer"

    def __init__(self, model: str):
        self.model = model
        if os.path.exists(model):
            ranks = load_ranks(model)
            pattern, specials = _load_sidecar(model, ranks)
            try:
                encoding = tiktoken.Encoding(
                    Path(model).name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials
                )
            except ValueError as error:  # the pattern is no regular expression
                raise UserError(f"{model}.json: tiktoken refuses its pattern: {error}") from error
            except OverflowError as error:
                raise UserError(f"{model}: a rank or the id of a special token is too large for tiktoken") from error
        else:
            encoding = _named_encoding(model)
        self.encoding = encoding
        self.vocab_size = encoding.n_vocab
        if END_OF_DOCUMENT not in encoding._special_tokens:
            raise UserError(f"{model}: the tokenizer has no special token {END_OF_DOCUMENT}, which ends documents")
        self.eod = encoding._special_tokens[END_OF_DOCUMENT]

    def encode_array(self, text: str) -> np.ndarray:
        try:
            return self.encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:  # a lone surrogate, which JSON can spell and UTF-8 cannot
            return self.encoding.encode_to_numpy(_encodable(text), disallowed_special=())

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        parts = []
        for i in ids:
            try:
                parts.append(self.encoding.decode_single_token_bytes(i))
            except KeyError:  # a padding row of the model's vocabulary, or a gap between the special tokens
                parts.append("\ufffd".encode())
        return b"".join(parts)

    def _fingerprint(self) -> Iterable[bytes]:
        yield self.encoding._pat_str.encode()
        yield json.dumps(self.encoding._special_tokens, sort_keys=True).encode()
        yield format_ranks(self.encoding._mergeable_ranks)

    def _save_model(self, folder: Path) -> str:
        name = "ranks.tiktoken"
        write_rank_file(
            folder / name, self.encoding._mergeable_ranks, self.encoding._pat_str, self.encoding._special_tokens
        )
        return name


def build_tokenizer(tokenizer_type: str, model: str | None = None) -> Tokenizer:
    """A tokenizer by its type.

    Args:
        tokenizer_type: TiktokenTokenizer or ByteTokenizer.
        model: a rank file or the name of an encoding, for TiktokenTokenizer.

    Raises:
        UserError: unknown type, missing or broken model.
    """
    if tokenizer_type == "ByteTokenizer":
        return ByteTokenizer()
    if tokenizer_type == "TiktokenTokenizer":
        if model is None:
            raise UserError(
                "TiktokenTokenizer needs a model: --tokenizer-model (data.tokenizer_model in a run's config) must name"
                " a rank file, as tools/train_tokenizer.py writes it, or an encoding such as cl100k_base."
            )
        return TiktokenTokenizer(model)
    raise UserError(f"unknown tokenizer type {tokenizer_type!r}. Known types: {', '.join(TOKENIZER_TYPES)}.")


def load_ranks(path: str | os.PathLike[str]) -> dict[bytes, int]:
    """Token bytes -> rank from a tiktoken rank file. tiktoken's own loader would cache a local file by its name.

    Raises:
        UserError: unreadable, a line that is not `BASE64 RANK`, a rank or token given twice, a single byte missing.
    """
    ranks: dict[bytes, int] = {}
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"cannot read the rank file {path}: {error.strerror}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            entry = base64.b64decode(token, validate=True), int(rank)
        except ValueError:
            raise UserError(
                f"{path}, line {number}: expected a token in base64 and its rank, got {line[:40]!r}. A rank file is"
                " written by tools/train_tokenizer.py or comes with a tiktoken encoding."
            ) from None
        if entry[0] in ranks or entry[1] < 0:
            raise UserError(f"{path}, line {number}: the token occurs twice, or its rank is negative.")
        ranks[entry[0]] = entry[1]
    if len(set(ranks.values())) != len(ranks):
        raise UserError(f"{path}: two tokens share one rank. Write the file again with tools/train_tokenizer.py.")
    missing = sum(bytes([i]) not in ranks for i in range(256))
    if missing:
        raise UserError(
            f"{path}: {missing} of the 256 single bytes have no rank, so some text could not be encoded. It is cut"
            " short or no byte-level vocabulary: write it again with tools/train_tokenizer.py."
        )
    return ranks


def format_ranks(ranks: dict[bytes, int]) -> bytes:
    """The content of a tiktoken rank file, in the order of the ranks."""
    items = sorted(ranks.items(), key=lambda item: item[1])
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in items)


def write_rank_file(
    path: str | os.PathLike[str], ranks: dict[bytes, int], pattern: str, special_tokens: dict[str, int]
) -> None:
    """Write a rank file and its sidecar PATH.json, the rank file last."""
    sidecar = {"pattern": pattern, "special_tokens": special_tokens}
    write_text_atomically(f"{path}.json", json.dumps(sidecar, indent=2, ensure_ascii=False) + "\n")
    write_text_atomically(path, format_ranks(ranks).decode("ascii"))


def write_text_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Write to a temporary name in the same folder and rename, so that no half-written file is ever visible."""
    temporary = f"{path}.tmp-{os.getpid()}"
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    finally:
        Path(temporary).unlink(missing_ok=True)


def read_json_object(path: str | os.PathLike[str], remedy: str) -> dict[str, Any]:
    """A JSON object from a file. Raises UserError, ending with `remedy`, if there is none."""
    try:
        value = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}. {remedy}") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}. {remedy}") from error
    except RecursionError as error:
        raise UserError(f"{path} is nested too deeply. {remedy}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object, got {type(value).__name__}. {remedy}")
    return value


def _load_sidecar(model: str, ranks: dict[bytes, int]) -> tuple[str, dict[str, int]]:
    path = f"{model}.json"
    first_free = max(ranks.values()) + 1
    if not os.path.exists(path):
        return CL100K_PATTERN, {END_OF_DOCUMENT: first_free}
    sidecar = read_json_object(path, remedy="Repair it, or remove it to use the defaults.")
    pattern, specials = sidecar.get("pattern", CL100K_PATTERN), sidecar.get("special_tokens")
    if specials is None:
        specials = {END_OF_DOCUMENT: first_free}
    if not isinstance(pattern, str) or not isinstance(specials, dict):
        raise UserError(f"{path}: pattern must be a string and special_tokens an object of name and id")
    used: set[int] = set(ranks.values())
    for name, number in specials.items():
        if not isinstance(number, int) or number < 0 or number in used:
            raise UserError(f"{path}: special token {name!r} has id {number!r}, which must be a free integer")
        used.add(number)
    return pattern, specials


def _named_encoding(name: str) -> tiktoken.Encoding:
    names: Sequence[str] = tiktoken.list_encoding_names()
    if name not in names:
        raise UserError(
            f"tokenizer model {name!r} is neither a file nor an encoding of tiktoken ({', '.join(sorted(names))})."
            " Give the path of a rank file."
        )
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:  # tiktoken downloads it: whatever the network library raises
        raise UserError(
            f"tiktoken could not download the encoding {name} ({type(error).__name__}). Without network, give a local"
            " rank file, or set TIKTOKEN_CACHE_DIR to a folder that holds it."
        ) from error


def _encodable(text: str) -> str:
    """The same text with lone surrogates replaced by U+FFFD, pairs joined, as tiktoken does."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
