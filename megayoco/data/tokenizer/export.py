"""tokenizer.json of a tokenizer, as `transformers` loads it: the same ids for every text, checked before it is written.

A rank file becomes merges: every token is made by its last merge (merges.py), in the order of the ranks. Special
tokens are part of the vocabulary, so that they keep ids with gaps before them. In transformers a special token's name
in a text becomes the token, unless `split_special_tokens=True` is given; here it is plain text.

transformers makes a tokenizer of its own from a SentencePiece model, which differs from the sentencepiece library in
texts that begin with a space.
"""

import json
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from megayoco.data.files import write_text_atomically
from megayoco.data.tokenizer.base import ByteTokenizer, Tokenizer
from megayoco.data.tokenizer.bpe import TiktokenTokenizer
from megayoco.data.tokenizer.byte_level import byte_of_character
from megayoco.data.tokenizer.engine import TiktokenEngine
from megayoco.data.tokenizer.huggingface import HuggingFaceTokenizer
from megayoco.data.tokenizer.merges import last_merge, last_merges
from megayoco.data.tokenizer.patterns import for_oniguruma
from megayoco.data.tokenizer.pieces import SentencePieceTokenizer
from megayoco.data.tokenizer.ranks import END_OF_DOCUMENT
from megayoco.data.tokenizer.yoco import SYMBOLS, YocoTiktokenTokenizer
from megayoco.errors import UserError

FILES = ("tokenizer.json", "tokenizer_config.json")

_SAMPLES = (
    "1234567 12 3.14 1,000,000 x1y22z333 ٣٤٥ ⅷ²",
    "  two  three   \t\ttabs\n\n\nlines\r\n\r\n end   ",
    "I'll we've DON'T it's you'RE 'S ’s ſ'ſ",
    "日本語のテキスト、中文 한국어 ไทย हिन्दी",
    "naïve e\u0301 \u0301 Ωmega ﬀ ß İstanbul",
    "👩‍👩‍👧 🙂🏽 \u200d\ufeff\x00\x7f\u2028\u3000",
    "def f(x):\n    return {'a': x**2}  # comment\n",
    "https://example.org/a_b?c=d&e=%20f#g !!!...???",
    "a" * 300 + " " * 300 + "\n" * 30,
)


def write_for_transformers(tokenizer: Tokenizer, folder: str | os.PathLike[str]) -> None:
    """Write tokenizer.json and tokenizer_config.json into `folder`; of a SentencePiece model, its file and the config.

    Raises:
        UserError: the pattern has no equal in the tokenizers library, or the files cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {"clean_up_tokenization_spaces": False, "tokenizer_class": "PreTrainedTokenizerFast"}
    if isinstance(tokenizer, SentencePieceTokenizer):
        tokenizer.save(folder)
        config |= {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": False, "add_eos_token": False}
        config |= tokenizer.special_names()
    else:
        content, names = _content(tokenizer)
        config |= names
        _verify(tokenizer, content)
        write_text_atomically(folder / FILES[0], json.dumps(content, ensure_ascii=False) + "\n")
    write_text_atomically(folder / FILES[1], json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def _content(tokenizer: Tokenizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """tokenizer.json, and what its config adds: names of the special tokens that have a use."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        content = tokenizer.content | {"truncation": None, "padding": None}
        return content, tokenizer.config | tokenizer.special_names()
    if isinstance(tokenizer, YocoTiktokenTokenizer):
        symbols = {name: number for number, name in enumerate(SYMBOLS)}
        content = _byte_level(tokenizer.engine, len(SYMBOLS), symbols)
        return content, dict(zip(("bos_token", "pad_token", "eos_token", "unk_token"), SYMBOLS, strict=True))
    if isinstance(tokenizer, TiktokenTokenizer):
        name = next(name for name, number in tokenizer.engine.special_tokens.items() if number == tokenizer.eod)
        return _byte_level(tokenizer.engine, 0, {}), {"eos_token": name}
    if isinstance(tokenizer, ByteTokenizer):
        bytes_alone = TiktokenEngine("bytes", {bytes([i]): i for i in range(256)}, r"\s|\S", {END_OF_DOCUMENT: 256})
        return _byte_level(bytes_alone, 0, {}), {"eos_token": END_OF_DOCUMENT}
    raise UserError(f"{tokenizer.type} has no form that transformers loads.")


def _byte_level(engine: TiktokenEngine, shift: int, symbols: Mapping[str, int]) -> dict[str, Any]:
    """tokenizer.json for tiktoken's engine, its ids `shift` higher, and the special tokens `symbols` besides."""
    pattern = for_oniguruma(engine.pattern)
    if pattern is None:
        raise UserError(
            f"{engine.model}: its pattern {engine.pattern} uses what the tokenizers library may understand otherwise."
            " Give the vocabulary a pattern such as cl100k's, with which it was trained."
        )
    character_of = {byte: character for character, byte in byte_of_character().items()}

    def spelled(token: bytes) -> str:
        return "".join(character_of[byte] for byte in token)

    merges, complete = _merges(engine.ranks)
    specials = dict(symbols) | {name: number + shift for name, number in engine.special_tokens.items()}
    vocabulary = {spelled(token): number + shift for token, number in engine.ranks.items()} | specials
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": number, "content": name, **flags, "special": True}
            for name, number in sorted(specials.items(), key=lambda item: item[1])
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level | {"add_prefix_space": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            # tiktoken looks a whole word up before it merges: that matters where merging does not make a token
            "ignore_merges": not complete,
            "vocab": vocabulary,
            "merges": [[spelled(first), spelled(second)] for first, second in merges],
        },
    }


def _merges(ranks: dict[bytes, int]) -> tuple[list[tuple[bytes, bytes]], bool]:
    """The last merge of every token that merging makes, in the order of the ranks, and whether it makes all."""
    tokens = sorted(ranks, key=lambda token: (len(token) > 1, ranks[token]))
    place = {token: number for number, token in enumerate(tokens)}
    ways = [
        (first, second, product)
        for token, product in place.items()
        for cut in range(1, len(token))
        if (first := place.get(token[:cut])) is not None and (second := place.get(token[cut:])) is not None
    ]
    table = np.array(ways, np.int64).reshape(-1, 3)
    merges, complete = [], True
    for token, row in zip(tokens[256:], last_merges(tokens, table[:, :2], table[:, 2])[256:], strict=True):
        parts = last_merge(token, place) if row < 0 else [tokens[number] for number in ways[row][:2]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
        else:
            complete = False
    return merges, complete


def _verify(tokenizer: Tokenizer, content: dict[str, Any]) -> None:
    """Raises UserError if tokenizer.json encodes a sample text otherwise."""
    engine = tokenizers.Tokenizer.from_str(json.dumps(content))
    engine.encode_special_tokens = True
    engine.no_truncation()
    engine.no_padding()
    generator = random.Random(0)
    everything = [*range(0xD800), *range(0xE000, 0x110000)]
    texts = [*_SAMPLES, "".join(f"a{token['content']} b" for token in content.get("added_tokens") or ())]
    texts += ["".join(map(chr, generator.choices(everything, k=40))) for _ in range(200)]
    texts += ["".join(generator.choices("".join(_SAMPLES), k=80)) for _ in range(500)]
    for text, found in zip(texts, engine.encode_batch_fast(texts, add_special_tokens=False), strict=True):
        if tokenizer.encode(text) != found.ids:
            raise UserError(
                f"{tokenizer.model}: tokenizer.json would encode {text[:60]!r} otherwise; it was not written."
            )
