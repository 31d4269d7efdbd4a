"""Byte-level BPE of the tokenizers library through tiktoken's engine, which is several times faster, with the same ids.

Both cut text by a regular expression and merge bytes inside each piece, lowest first, leftmost of equals. tokenizers
knows a list of merges; tiktoken merges two neighbours whenever their bytes are a token. The ids are equal for every
text if (merges.py explains last merges)

1. every token that tiktoken's way of merging makes has its last merge in the list of merges,
2. these last merges stand in the list in the order of the ranks that tiktoken is given, and
3. the expression means the same to Oniguruma (tokenizers) and to fancy-regex (tiktoken), with the same Unicode tables.

Then the two take the same first step on any text: neighbours whose bytes are a token are a last merge, which the list
holds, and no other pair of the list ever stands side by side; the order is the same. And so every further step.
`tiktoken_engine` proves the three for a given tokenizer.json, or says why not.
"""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import tiktoken
from tokenizers import Regex, pre_tokenizers

from megayoco.data.tokenizer.engine import TiktokenEngine
from megayoco.data.tokenizer.merges import last_merge, last_merges
from megayoco.data.tokenizer.patterns import DIGITS_GPT2_PATTERN, GPT2_PATTERN, means_the_same
from megayoco.data.tokenizer.tokenizer_json import split_merges
from megayoco.errors import UserError

# one letter and one number, where there are, that came with each version of Unicode from 9 to 17
_NEW_LETTERS = (
    "\U0001e900\U0002ceb0\U00010d00\U00010fe0\U00030000\U00010570\U00011f04\U00031350\U0002ebf0\U000105c0\U000323b0"
)
_NEW_NUMBERS = "\U00011c5a\U00010d30\U0001e140\U00011950\U00016ac0\U00011f50\U00010d40\U00011de0"

_NORMALIZERS = ("NFC", "NFD", "NFKC", "NFKD")  # all leave ASCII as it is


class NotEqual(Exception):
    """The two engines may give different ids; the message says why."""


def tiktoken_engine(content: Mapping[str, Any], name: str) -> tuple[TiktokenEngine, np.ndarray]:
    """tiktoken's engine for a tokenizer.json, and its ids (n,) uint32 -> those of tokenizer.json.

    It has no special tokens, normalizes nothing, and knows no added tokens: that is the caller's work.

    Args:
        content: tokenizer.json.
        name: its name in errors.

    Raises:
        NotEqual: the ids may differ for some text.
    """
    pattern = _pattern(content.get("pre_tokenizer"))
    if not means_the_same(pattern):
        raise NotEqual("the two engines may read its regular expression differently")
    normalizer = content.get("normalizer")
    if (
        normalizer
        and normalizer.get("type") not in _NORMALIZERS
        and normalizer != {"type": "Sequence", "normalizers": []}
    ):
        raise NotEqual(f"it has a normalizer, {normalizer.get('type')}")
    if not _same_unicode():
        raise NotEqual("the installed tokenizers and tiktoken know different versions of Unicode")
    tokens, ids = _ranked_tokens(content["model"])
    try:
        return TiktokenEngine(name, {token: rank for rank, token in enumerate(tokens)}, pattern, {}), ids
    except UserError as error:
        raise NotEqual("tiktoken refuses its regular expression") from error


def byte_of_character() -> dict[str, int]:
    """GPT-2's table: printable bytes are spelled as themselves, the others by characters from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + number): byte for number, byte in enumerate(others)}


def _pattern(pre_tokenizer: Mapping[str, Any] | None) -> str:
    steps = [pre_tokenizer or {}]
    if steps[0].get("type") == "Sequence":
        steps = steps[0]["pretokenizers"]
    kinds = [step.get("type") for step in steps]
    if kinds[-1:] != ["ByteLevel"] or steps[-1].get("add_prefix_space", True):
        raise NotEqual("it is not byte-level, or puts a space before the text")
    own_pattern = steps[-1].get("use_regex", True)
    if kinds == ["ByteLevel"] and own_pattern:
        return GPT2_PATTERN
    if kinds == ["Digits", "ByteLevel"] and own_pattern and steps[0].get("individual_digits"):
        return DIGITS_GPT2_PATTERN
    if kinds == ["Split", "ByteLevel"] and not own_pattern:
        split, pattern = steps[0], steps[0].get("pattern", {})
        if split.get("behavior") == "Isolated" and not split.get("invert") and list(pattern) == ["Regex"]:
            return pattern["Regex"]
    raise NotEqual(f"it cuts text by {' and '.join(map(str, kinds))}, which is no single regular expression")


def _ranked_tokens(model: Mapping[str, Any]) -> tuple[list[bytes], np.ndarray]:
    """Tokens in the order of tiktoken's ranks, and their ids (n,) uint32; the rules 1 and 2 hold for them."""
    if model.get("type") != "BPE":
        raise NotEqual(f"its model is {model.get('type')}, not BPE")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise NotEqual(f"it has {key}")
    byte_of, vocabulary = byte_of_character(), model["vocab"]
    bytes_of = {}
    for token in vocabulary:
        with suppress(KeyError):  # what is not made of bytes, no text has
            bytes_of[token] = bytes([byte_of[c] for c in token])
    if not byte_of.keys() <= vocabulary.keys():
        raise NotEqual("single bytes are missing in its vocabulary")
    merges = split_merges(model["merges"])
    if len(set(merges)) != len(merges):
        raise NotEqual("a merge occurs twice")
    spelled = [*byte_of, *dict.fromkeys(a + b for a, b in merges)]  # bytes, then tokens by their first merge
    if not bytes_of.keys() >= set(spelled):
        raise NotEqual("a merge makes something else than bytes")
    place = {token: rank for rank, token in enumerate(spelled)}
    # the others have a part that nothing makes
    merges = [(a, b) for a, b in merges if a in place and b in place]
    whole = [token for token in bytes_of if token not in place and token] if model.get("ignore_merges") else []
    tokens = [bytes_of[token] for token in (*spelled, *whole)]
    pairs = np.array([(place[a], place[b]) for a, b in merges], np.int64).reshape(-1, 2)
    found = last_merges(tokens, pairs, np.array([place[a + b] for a, b in merges], np.int64))

    ranks = {token: rank for rank, token in enumerate(tokens)}
    for rank in np.flatnonzero(found[256:] < 0) + 256:
        parts = last_merge(tokens[rank], ranks)
        if len(parts) == 2:
            row = np.flatnonzero((pairs == [ranks[part] for part in parts]).all(1))
            if not len(row):
                raise NotEqual(
                    f"tiktoken would make the token {tokens[rank]!r} of two that the list of merges does not name"
                )
            found[rank] = row[0]
    made = found[256 : len(spelled)]
    if (np.diff(made[made >= 0]) < 0).any():
        raise NotEqual("its merges are not in the order of the tokens that they make")
    if not model.get("ignore_merges"):
        # tiktoken looks a whole piece up before it merges: it must not know what merging does not make
        tokens = [token for rank, token in enumerate(tokens) if found[rank] >= 0 or rank < 256]
    id_of = {bytes_of[token]: number for token, number in vocabulary.items() if token in bytes_of}
    return tokens, np.array([id_of[token] for token in tokens], np.uint32)


def _same_unicode() -> bool:
    """Whether both libraries know the same letters and numbers."""
    text = " ".join(_NEW_LETTERS + _NEW_NUMBERS)
    for category in (r"\p{L}", r"\p{N}"):
        ours = tiktoken.Encoding(
            "unicode", pat_str=category, mergeable_ranks={bytes([i]): i for i in range(256)}, special_tokens={}
        )
        kept = ours.decode(ours.encode_ordinary(text))
        rest = pre_tokenizers.Split(Regex(category), "removed").pre_tokenize_str(text)
        if sorted(kept + "".join(piece for piece, _ in rest)) != sorted(text):
            return False
    return True
