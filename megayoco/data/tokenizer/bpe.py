"""TiktokenTokenizer: byte-level BPE by tiktoken, from a local rank file or a named encoding."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

from megayoco.data.tokenizer.base import Tokenizer
from megayoco.data.tokenizer.engine import TiktokenEngine
from megayoco.data.tokenizer.megatron_json import read_megatron_vocabulary
from megayoco.data.tokenizer.ranks import END_OF_DOCUMENT, load_ranks, load_sidecar, write_rank_file
from megayoco.errors import UserError

_MEGATRON_OPTIONS = {"pattern", "num_special_tokens", "vocab_size"}


class TiktokenTokenizer(Tokenizer):
    """Byte-level BPE by tiktoken, from a local rank file or a named encoding such as cl100k_base.

    A rank file holds one `BASE64 RANK` per line. FILE.json beside it may give `pattern` and `special_tokens`
    (name -> id); without it the pattern is CL100K_PATTERN and <|endoftext|> the first id after the ranks. A file whose
    name ends in .json is a vocabulary of Megatron's TikTokenizer (megatron_json.py).

    Options:
        special_tokens: list of names that take the ids after the last one, in this order.
        eod_token: the special token that ends a document, <|endoftext|> if not given.
        pattern, num_special_tokens, vocab_size: of a vocabulary of Megatron's, as its flags --tiktoken-pattern,
            --tiktoken-num-special-tokens and --vocab-size; special_tokens are then all that have a name.
    """

    type = "TiktokenTokenizer"

    def __init__(self, model: str, options: Mapping[str, Any] | None = None):
        self.model, self.options = model, dict(options or {})
        end = END_OF_DOCUMENT
        if model.endswith(".json") and os.path.exists(model):
            end = "</s>"
            ranks, pattern, specials = read_megatron_vocabulary(model, self.options)
            self.bos = specials["<s>"]
        else:
            ranks, pattern, specials = read_vocabulary(model)
            for name in _MEGATRON_OPTIONS & self.options.keys():
                raise UserError(f"{model}: the option {name} is for vocabularies of Megatron's TikTokenizer (.json).")
            for name in self.options.get("special_tokens", ()):
                if name in specials:
                    raise UserError(f"{model}: the special token {name!r} exists already. Leave it out.")
                specials[name] = max(*ranks.values(), *specials.values(), -1) + 1
        eod_token = self.options.get("eod_token", end)
        if eod_token not in specials:
            raise UserError(
                f"{model}: the tokenizer has no special token {eod_token}, which ends documents. It has"
                f" {', '.join(specials) or 'none'}: name one by --eod-token."
            )
        self.eod = specials[eod_token]
        self.engine = TiktokenEngine(model, ranks, pattern, specials)
        self.vocab_size = self.engine.size

    def _encode_batch(self, texts: Sequence[str], allow_special: bool) -> tuple[np.ndarray, np.ndarray]:
        return self.engine.encode(texts, allow_special)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(map(self.engine.bytes_of, ids))

    def vocabulary(self) -> dict[int, bytes]:
        return {number: token for token, number in self.engine.ranks.items()}

    def _fingerprint(self) -> Iterable[bytes]:
        yield from self.engine.fingerprint()
        if self.eod != self.engine.special_tokens.get(END_OF_DOCUMENT):
            yield b"eod %d" % self.eod

    def _save_model(self, folder: Path) -> tuple[str, dict[str, Any]]:
        name, engine = "ranks.tiktoken", self.engine
        write_rank_file(folder / name, engine.ranks, engine.pattern, engine.special_tokens)
        # all other options are in the file by now
        return name, {"eod_token": next(token for token, i in engine.special_tokens.items() if i == self.eod)}


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
