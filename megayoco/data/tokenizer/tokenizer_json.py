"""Reading tokenizer.json and its neighbours: what they hold, and what of it decides the ids of a text."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megayoco.data.files import read_json_object
from megayoco.data.tokenizer.ranks import END_OF_DOCUMENT
from megayoco.errors import UserError

_CONFIGS = ("special_tokens_map.json", "tokenizer_config.json")


def read_tokenizer_json(model: str | None, options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The content of a tokenizer.json, and the configs beside it in one.

    Args:
        model: tokenizer.json, or a folder with it or with vocab.json and merges.txt; None to take these from options.
        options: vocab_file and merge_file.

    Raises:
        UserError: a file is missing or broken.
    """
    if model is None:
        return gpt2_content(options.get("vocab_file"), options.get("merge_file")), {"eos_token": END_OF_DOCUMENT}
    folder = model if os.path.isdir(model) else os.path.dirname(model)
    path = os.path.join(model, "tokenizer.json") if os.path.isdir(model) else model
    config: dict[str, Any] = {}
    for name in _CONFIGS:
        if os.path.exists(os.path.join(folder, name)):
            config |= read_json_object(os.path.join(folder, name), remedy="Copy the tokenizer again.")
    vocab_file, merge_file = os.path.join(folder, "vocab.json"), os.path.join(folder, "merges.txt")
    if not os.path.exists(path) and os.path.exists(vocab_file):
        return gpt2_content(vocab_file, merge_file), {"eos_token": END_OF_DOCUMENT} | config
    content = read_json_object(path, remedy="Give a tokenizer.json, or a folder that holds one.")
    if not isinstance(content.get("model"), dict):
        raise UserError(f"{path} has no `model`: it is no tokenizer.json of the tokenizers library.")
    return content, config


def gpt2_content(vocab_file: str | None, merge_file: str | None) -> dict[str, Any]:
    """tokenizer.json of a vocabulary in GPT-2's two files. <|endoftext|> in it is a special token.

    Raises:
        UserError: one of the files is missing or broken.
    """
    if vocab_file is None or merge_file is None:
        raise UserError("A GPT-2 vocabulary needs both --vocab-file (vocab.json) and --merge-file (merges.txt).")
    vocabulary = read_json_object(vocab_file, remedy="Give the vocab.json of a GPT-2 vocabulary.")
    if not all(isinstance(number, int) for number in vocabulary.values()):
        raise UserError(f"{vocab_file} does not map tokens to ids. Give the vocab.json of a GPT-2 vocabulary.")
    try:
        lines = Path(merge_file).read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise UserError(
            f"cannot read {merge_file}: {error.strerror}. Give the merges.txt beside vocab.json."
        ) from error
    except UnicodeDecodeError:
        raise UserError(f"{merge_file} is not UTF-8. Give the merges.txt beside vocab.json.") from None
    merges = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        pair = line.split()
        if len(pair) != 2 or not {*pair, pair[0] + pair[1]} <= vocabulary.keys():
            raise UserError(f"{merge_file}, line {number}: {line[:40]!r} is no merge of two tokens of {vocab_file}.")
        merges.append(pair)
    added = []
    if END_OF_DOCUMENT in vocabulary:
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        added = [{"id": vocabulary[END_OF_DOCUMENT], "content": END_OF_DOCUMENT, **flags, "special": True}]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": merges},
    }


def fingerprint(content: Mapping[str, Any]) -> Iterable[bytes]:
    """What decides the ids of a text, in one spelling: older files leave defaults out and spell merges as "A B"."""
    model = {key: value for key, value in content["model"].items() if value not in (None, False, "")}
    if "merges" in model:
        model["merges"] = split_merges(model["merges"])
    added = sorted(content.get("added_tokens") or (), key=lambda token: token["id"])
    for part in (model, added, _without_defaults(content.get("normalizer"))):
        yield json.dumps(part, sort_keys=True).encode()
    yield json.dumps(_without_defaults(content.get("pre_tokenizer")), sort_keys=True).encode()


def split_merges(merges: Sequence[Any]) -> list[tuple[str, str]]:
    """The pairs of a list of merges, which older files spell as "A B"."""
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in merges)
    return [(first, second) for first, second in pairs]


def token_name(value: Any) -> str | None:
    """The name of a token in a config: a string, or an object with `content`."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _without_defaults(part: Any) -> Any:
    """A normalizer or pre-tokenizer without what decides no id: trim_offsets, and a Sequence of nothing."""
    if isinstance(part, dict):
        if part.get("type") == "Sequence" and not any(isinstance(value, list) and value for value in part.values()):
            return None
        return {key: _without_defaults(value) for key, value in part.items() if key != "trim_offsets"}
    return [_without_defaults(item) for item in part] if isinstance(part, list) else part
