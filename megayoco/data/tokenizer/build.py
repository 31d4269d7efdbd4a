"""A tokenizer by its type, and the command-line flags that name one. No tokenizer library is imported before use."""

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megayoco.data.files import read_json_object
from megayoco.data.tokenizer.base import SAVED_NAME, ByteTokenizer, Tokenizer
from megayoco.errors import UserError

TOKENIZER_TYPES = (
    "TiktokenTokenizer",
    "YocoTiktokenTokenizer",
    "HuggingFaceTokenizer",
    "SentencePieceTokenizer",
    "ByteTokenizer",
)
ALIASES = {
    "TikTokenizer": "TiktokenTokenizer",
    "HFTokenizer": "HuggingFaceTokenizer",
    "GPT2BPETokenizer": "HuggingFaceTokenizer",
    "GPTSentencePieceTokenizer": "SentencePieceTokenizer",
    "Llama2Tokenizer": "SentencePieceTokenizer",
    "SPMTokenizer": "SentencePieceTokenizer",
}
"""Names of the Megatron family that mean one of ours."""

_FILES = ("vocab_file", "merge_file")
_OPTIONS: dict[str, tuple[str, ...]] = {
    "TiktokenTokenizer": ("special_tokens", "eod_token", "pattern", "num_special_tokens", "vocab_size"),
    "YocoTiktokenTokenizer": (),
    "HuggingFaceTokenizer": ("eod_token", "engine", *_FILES),
    "SentencePieceTokenizer": ("eod_token",),
    "ByteTokenizer": (),
}
_FLAGS = {
    "special_tokens": "--tokenizer-special-tokens",
    "engine": "--tokenizer-engine",
    "pattern": "--tiktoken-pattern",
    "num_special_tokens": "--tiktoken-num-special-tokens",
}
_MODEL_MEANS = {
    "TiktokenTokenizer": "a rank file, as tools/train_tokenizer.py writes it, or an encoding such as cl100k_base",
    "YocoTiktokenTokenizer": "a rank file, or cl100k_base",
    "HuggingFaceTokenizer": "a tokenizer.json, or a folder that holds one",
    "SentencePieceTokenizer": "a SentencePiece file such as tokenizer.model, or a folder that holds one",
}


def build_tokenizer(
    tokenizer_type: str, model: str | None = None, options: Mapping[str, Any] | None = None
) -> Tokenizer:
    """A tokenizer by its type.

    Args:
        tokenizer_type: one of TOKENIZER_TYPES, or a name of the Megatron family that means one of them (ALIASES).
        model: file, folder or name of the vocabulary; ByteTokenizer needs none.
        options: what the type's class lists under Options.

    Raises:
        UserError: unknown type or option, missing or broken model.
    """
    kind = canonical_type(tokenizer_type)
    options = {key: value for key, value in dict(options or {}).items() if value not in (None, [], ())}
    for name in options:
        if name not in _OPTIONS[kind]:
            flag = _FLAGS.get(name, "--" + name.replace("_", "-"))
            raise UserError(
                f"{kind} takes no {flag} (option {name}). Its options are: {', '.join(_OPTIONS[kind]) or 'none'}."
            )
        if not _fits(name, options[name]):
            raise UserError(f"{kind}: the option {name} has the value {options[name]!r}, which is none for it.")
    if kind == "ByteTokenizer":
        return ByteTokenizer()
    if model is None and not (kind == "HuggingFaceTokenizer" and "vocab_file" in options):
        raise UserError(
            f"{kind} needs a model: --tokenizer-model (data.tokenizer_model in a run's config) must name"
            f" {_MODEL_MEANS[kind]}."
        )
    if kind == "HuggingFaceTokenizer":
        from megayoco.data.tokenizer.huggingface import load_huggingface

        return load_huggingface(model, options)
    assert model is not None
    if kind == "SentencePieceTokenizer":
        from megayoco.data.tokenizer.pieces import SentencePieceTokenizer

        return SentencePieceTokenizer(model, options)
    if kind == "YocoTiktokenTokenizer":
        from megayoco.data.tokenizer.yoco import YocoTiktokenTokenizer

        return YocoTiktokenTokenizer(model)
    from megayoco.data.tokenizer.bpe import TiktokenTokenizer

    return TiktokenTokenizer(model, options)


def _fits(name: str, value: Any) -> bool:
    if name == "special_tokens":
        return isinstance(value, (list, tuple)) and all(isinstance(token, str) for token in value)
    if name in ("num_special_tokens", "vocab_size"):
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, str)


def canonical_type(tokenizer_type: str) -> str:
    """Our name of a tokenizer type. Raises UserError if it is unknown."""
    kind = ALIASES.get(tokenizer_type, tokenizer_type)
    if kind not in TOKENIZER_TYPES:
        known = ", ".join((*TOKENIZER_TYPES, *ALIASES))
        raise UserError(f"unknown tokenizer type {tokenizer_type!r}. Known types: {known}.")
    return kind


def add_tokenizer_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add the flags that name a tokenizer, under Megatron's names. See `tokenizer_from_arguments`."""
    group = parser.add_argument_group("tokenizer")
    add = group.add_argument
    add(
        "--tokenizer-type",
        required=required,
        metavar="TYPE",
        help=f"{', '.join(TOKENIZER_TYPES)}; also {', '.join(ALIASES)}",
    )
    add("--tokenizer-model", metavar="MODEL", help="file or folder of the vocabulary, or a tiktoken encoding's name")
    add("--vocab-file", metavar="FILE", help="vocab.json of GPT2BPETokenizer, tokenizer.json of HFTokenizer")
    add("--merge-file", metavar="FILE", help="merges.txt of GPT2BPETokenizer")
    add(
        "--tokenizer-special-tokens",
        nargs="+",
        metavar="NAME",
        help="special tokens to add after the last id of a TiktokenTokenizer",
    )
    add("--tiktoken-pattern", metavar="PATTERN", help="v1, v2 or an expression, for Megatron's TikTokenizer files (v2)")
    add("--tiktoken-num-special-tokens", type=int, metavar="N", help="ids before the ranks in such a file (1000)")
    add("--tokenizer-engine", metavar="NAME", help="`tokenizers`: never encode a tokenizer.json by tiktoken (auto)")
    add("--eod-token", metavar="NAME", help="the special token that ends documents, where the model does not tell")


def tokenizer_from_arguments(args: argparse.Namespace) -> tuple[str, str | None, dict[str, Any]]:
    """type, model and options for `build_tokenizer` from the flags of `add_tokenizer_arguments`.

    Raises:
        UserError: unknown type, or flags that do not go together.
    """
    kind, model = canonical_type(args.tokenizer_type), args.tokenizer_model
    options = {
        "vocab_file": args.vocab_file,
        "merge_file": args.merge_file,
        "special_tokens": args.tokenizer_special_tokens,
        "eod_token": args.eod_token,
        "pattern": args.tiktoken_pattern,
        "num_special_tokens": args.tiktoken_num_special_tokens,
        "engine": args.tokenizer_engine,
    }
    if model is None and args.merge_file is None and args.vocab_file is not None:
        # gpt-neox and Megatron-DeepSpeed name the whole vocabulary by --vocab-file
        model, options["vocab_file"] = args.vocab_file, None
    return kind, model, {key: value for key, value in options.items() if value is not None}


def describe_tokenizer(tokenizer: Tokenizer, folder: str | os.PathLike[str]) -> dict[str, Any]:
    """identity, model and options as JSON for a file in `folder`: paths are relative to it, so both can move."""

    def relative(path: Any) -> Any:
        if isinstance(path, str) and os.path.exists(path):
            return os.path.relpath(os.path.realpath(path), os.path.realpath(folder))
        return path

    kept = ((key, value) for key, value in tokenizer.options.items() if key != "engine")  # it decides no ids
    options = {key: relative(value) if key in _FILES else value for key, value in kept}
    return {**tokenizer.identity(), "model": relative(tokenizer.model), "options": options}


def build_described(
    description: Mapping[str, Any], folder: str | os.PathLike[str], model: str | None = None
) -> Tokenizer:
    """The tokenizer of a `describe_tokenizer` that lies in `folder`; `model`, if given, replaces the described one.

    The caller compares identities.

    Raises:
        UserError: unknown type or option, missing or broken model.
    """

    def found(path: Any) -> Any:
        there = os.path.join(folder, path) if isinstance(path, str) else ""
        return there if there and os.path.exists(there) else path

    saved = description.get("options")
    options = {key: found(v) if key in _FILES else v for key, v in (saved if isinstance(saved, dict) else {}).items()}
    if model is None:
        model = description.get("model")
        model = None if model is None else found(str(model))
    return build_tokenizer(str(description.get("type")), model, options)


def load_saved(folder: Path) -> Tokenizer:
    """See Tokenizer.from_dir."""
    path = folder / SAVED_NAME
    saved = read_json_object(path, remedy="Give a folder that a training run or an export wrote.")
    model = saved.get("model")
    saved["model"] = None if model is None else str(folder / str(model))
    tokenizer = build_described(saved, folder)
    if tokenizer.identity()["sha256"] != saved.get("sha256"):
        raise UserError(f"{path} describes another tokenizer than the files beside it. Copy the whole folder again.")
    return tokenizer
