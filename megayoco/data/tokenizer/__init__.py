"""Tokenizers behind one small interface: text to token ids and back, without torch.

A tokenizer knows its vocabulary size (ids run from 0 to vocab_size - 1), the id that ends a document (`eod`), and its
identity: a hash of everything that decides which ids a text becomes. Strings that look like special tokens are plain
text unless a caller allows them: no document can write control tokens by accident.

    base.py         the interface Tokenizer; ByteTokenizer
    build.py        build_tokenizer by type, model and options; the command-line flags that give them
    ranks.py        rank files of tiktoken, read and written
    bpe.py          TiktokenTokenizer
    yoco.py         YocoTiktokenTokenizer, the official id layout of YOCO
    engine.py       tiktoken for batches of documents; long_text.py: what exceeds its limits
    megatron_json.py    vocabularies of Megatron's TikTokenizer
    huggingface.py  HuggingFaceTokenizer: tokenizer.json, or vocab.json with merges.txt (tokenizer_json.py reads them)
    byte_level.py   when tiktoken encodes a tokenizer.json; merges.py and patterns.py: what the proof rests on
    pieces.py       SentencePieceTokenizer
    export.py       tokenizer.json of any of them
    report.py       how well tokenizers fit a text

A tokenizer library is imported when a tokenizer of its kind is built.
"""

from typing import Any

from megayoco.data.tokenizer.base import ByteTokenizer, Tokenizer
from megayoco.data.tokenizer.build import (
    ALIASES,
    TOKENIZER_TYPES,
    add_tokenizer_arguments,
    build_described,
    build_tokenizer,
    describe_tokenizer,
    tokenizer_from_arguments,
)
from megayoco.data.tokenizer.ranks import (
    CL100K_PATTERN,
    END_OF_DOCUMENT,
    format_ranks,
    load_ranks,
    write_rank_file,
)

__all__ = [
    "ALIASES",
    "CL100K_PATTERN",
    "END_OF_DOCUMENT",
    "TOKENIZER_TYPES",
    "ByteTokenizer",
    "HuggingFaceTokenizer",
    "SentencePieceTokenizer",
    "TiktokenTokenizer",
    "Tokenizer",
    "YocoTiktokenTokenizer",
    "add_tokenizer_arguments",
    "build_described",
    "build_tokenizer",
    "describe_tokenizer",
    "format_ranks",
    "load_ranks",
    "tokenizer_from_arguments",
    "write_rank_file",
]

_LAZY = {
    "TiktokenTokenizer": "bpe",
    "YocoTiktokenTokenizer": "yoco",
    "HuggingFaceTokenizer": "huggingface",
    "SentencePieceTokenizer": "pieces",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
