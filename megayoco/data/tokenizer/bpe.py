"""TiktokenTokenizer: byte-level BPE by tiktoken, from a local rank file or a named encoding."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

from megayoco.data.tokenizer.base import REPLACEMENT, Tokenizer, encodable
from megayoco.data.tokenizer.ranks import END_OF_DOCUMENT, format_ranks, load_ranks, load_sidecar, write_rank_file
from megayoco.errors import UserError


class TiktokenTokenizer(Tokenizer):
    """Byte-level BPE by tiktoken, from a local rank file or a named encoding such as cl100k_base.

    A rank file holds one `BASE64 RANK` per line. FILE.json beside it may give `pattern` and `special_tokens`
    (name -> id); without it the pattern is CL100K_PATTERN and <|endoftext|> the first id after the ranks.

    Options:
        special_tokens: list of names that take the ids after the last one, in this order.
        eod_token: the special token that ends a document, <|endoftext|> if not given.
    """

    type = "TiktokenTokenizer"

    def __init__(self, model: str, options: Mapping[str, Any] | None = None):
        self.model, self.options = model, dict(options or {})
        ranks, pattern, specials = read_vocabulary(model)
        for name in self.options.get("special_tokens", ()):
            if name in specials:
                raise UserError(f"{model}: the special token {name!r} exists already. Leave it out of the new ones.")
            specials[name] = max(*ranks.values(), *specials.values(), -1) + 1
        eod_token = self.options.get("eod_token", END_OF_DOCUMENT)
        if eod_token not in specials:
            raise UserError(
                f"{model}: the tokenizer has no special token {eod_token}, which ends documents. It has"
                f" {', '.join(specials) or 'none'}: name one by --eod-token."
            )
        self.special_tokens, self.eod = specials, specials[eod_token]
        self.encoding = tiktoken_encoding(model, ranks, pattern, specials)
        self.vocab_size = self.encoding.n_vocab

    def _encode_batch(self, texts: Sequence[str], allow_special: bool) -> tuple[np.ndarray, np.ndarray]:
        return encode_texts(self.encoding, texts, allow_special)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        parts = []
        for i in ids:
            try:
                parts.append(self.encoding.decode_single_token_bytes(i))
            except KeyError:  # a padding row of the model's vocabulary, or a gap between the special tokens
                parts.append(REPLACEMENT)
        return b"".join(parts)

    def _fingerprint(self) -> Iterable[bytes]:
        yield self.encoding._pat_str.encode()
        yield json.dumps(self.encoding._special_tokens, sort_keys=True).encode()
        yield format_ranks(self.encoding._mergeable_ranks)
        if self.eod != self.encoding._special_tokens.get(END_OF_DOCUMENT):
            yield b"eod %d" % self.eod

    def _save_model(self, folder: Path) -> tuple[str, dict[str, Any]]:
        name = "ranks.tiktoken"
        write_rank_file(
            folder / name, self.encoding._mergeable_ranks, self.encoding._pat_str, self.encoding._special_tokens
        )
        # the added special tokens are in the file by now
        return name, {key: value for key, value in self.options.items() if key != "special_tokens"}


def read_vocabulary(model: str) -> tuple[dict[bytes, int], str, dict[str, int]]:
    """Ranks, pattern and special tokens of a rank file with its sidecar, or of an encoding of tiktoken.

    Raises:
        UserError: neither of the two, broken, or not to be downloaded.
    """
    if os.path.exists(model):
        ranks = load_ranks(model)
        return ranks, *load_sidecar(model, ranks)
    named = _named_encoding(model)
    return named._mergeable_ranks, named._pat_str, dict(named._special_tokens)


def tiktoken_encoding(
    model: str, ranks: dict[bytes, int], pattern: str, special_tokens: dict[str, int]
) -> tiktoken.Encoding:
    """tiktoken's engine for a vocabulary. Raises UserError, naming `model`, if tiktoken refuses it."""
    try:
        return tiktoken.Encoding(
            Path(model).name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_tokens
        )
    except ValueError as error:  # the pattern is no regular expression
        raise UserError(f"{model}.json: tiktoken refuses its pattern: {error}") from error
    except OverflowError as error:
        raise UserError(f"{model}: a rank or the id of a special token is too large for tiktoken") from error


def encode_texts(
    encoding: tiktoken.Encoding, texts: Sequence[str], allow_special: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Ids of all texts one after the other (n,) uint32, and the number of ids of each (len(texts),) int64."""
    allowed: Any = "all" if allow_special else set()
    parts = [
        encoding.encode_to_numpy(encodable(text), allowed_special=allowed, disallowed_special=()) for text in texts
    ]
    tokens = np.concatenate(parts) if parts else np.zeros(0, np.uint32)
    return tokens, np.array([len(part) for part in parts], np.int64)


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
