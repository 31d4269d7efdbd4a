"""Data paths: which datasets a run reads and with which weights, in Megatron's grammar.

    data path  = prefix | [prefix, ...] | [weight, prefix, weight, prefix, ...] | [{prefix, weight}, ...] | blend file
                 (the entries of the last list may have min_document_length too)
    blend file = a list as above in .yaml, .yml or .json; {train: LIST, valid: LIST, test: LIST} with such lists, or
                 strings with blanks between the words (Megatron's --per-split-data-args-path); or a .txt file of words
                 (its --data-args-path)

In a list of words, an even number of them is weight-prefix pairs if every word in weight position is a number, and
prefixes if none is. Where Megatron would read a number as a prefix or stop with an assertion, this is an error that
shows how the list was read.

A relative prefix in a blend file is looked for beside the file first, then in the working directory.
"""

import dataclasses
import json
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from megayoco.errors import UserError

log = logging.getLogger(__name__)

Section = TypeVar("Section")
_FILES = (".yaml", ".yml", ".json", ".txt")
_PARTS = ("train", "valid", "test")
_WHOLE = ""  # stands for the part of a file without parts, which is a list for whoever names it


@dataclass(frozen=True)
class Source:
    """One dataset of a blend; weight None means: as many samples as it holds, relative to the others; min_length None:
    what holds for all datasets."""

    prefix: str
    weight: float | None
    min_length: int | None = None


def parse_blend(value: Any, key: str) -> list[Source]:
    """The datasets of a data path; sources of weight 0 are left out.

    Args:
        value: a prefix, or a list of prefixes, of weights and prefixes, or of objects with prefix and weight.
        key: what the user calls it, for messages, for example data.train.

    Raises:
        UserError: a number in place of a prefix, a negative or NaN weight, all weights 0, weights for some datasets
            only, a prefix given twice.
    """
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, Sequence) or not value:
        raise UserError(f"{key} must be a prefix or a list of prefixes, got {value!r}")
    if all(isinstance(item, str | int | float) for item in value):
        sources = _from_words(list(value), key)
    else:
        sources = [_from_entry(item, key) for item in value]
    for source in sources:
        if source.weight is not None and not (0 <= source.weight < math.inf):
            raise UserError(f"{key}: the weight of {source.prefix} is {source.weight}, but must be a number >= 0")
    if all(source.weight == 0 for source in sources):
        raise UserError(f"{key}: all weights are 0, so nothing would be read. Give one dataset a positive weight.")
    without = [source.prefix for source in sources if source.weight is None]
    if 0 < len(without) < len(sources):
        raise UserError(f"{key}: {without[0]} has no weight, but others have. Give each of them a weight, or none.")
    seen: dict[str, str] = {}
    for source in sources:
        place = os.path.realpath(source.prefix)
        if place in seen:
            raise UserError(f"{key}: {source.prefix} is given twice. Give it once, with the sum of the weights.")
        seen[place] = source.prefix
    return [source for source in sources if source.weight != 0]


def expand_blend_files(data: Section, key: str) -> Section:
    """A data section of a config with the content of the blend files that it names in their place.

    Args:
        data: a dataclass with the fields train, valid and split.
        key: what the user calls it, for messages: data, or phases.0.data.

    Returns:
        `data` with lists for files. A file for `train` that has parts for validation too replaces an absent `valid`; if
        it says that there is none, `split` no longer cuts the training data.

    Raises:
        UserError: a file is missing, is no YAML or JSON, or holds no such list.
    """
    values: Any = data
    changes: dict[str, Any] = {}
    if is_blend_file(values.train):
        parts = _read_blend_file(values.train, f"{key}.train")
        changes["train"] = parts.get(_WHOLE, parts.get("train"))
        if not changes["train"]:
            raise UserError(f"{key}.train: {values.train} names no datasets to train on. Add a list `train`.")
        if values.valid is None and "valid" in parts:
            changes.update({"valid": parts["valid"]} if parts["valid"] else {"split": "1,0,0"})
    if is_blend_file(values.valid):
        parts = _read_blend_file(values.valid, f"{key}.valid")
        changes["valid"] = parts.get(_WHOLE, parts.get("valid"))
        if not changes["valid"]:
            raise UserError(f"{key}.valid: {values.valid} names no datasets to validate on. Add a list `valid`.")
    return dataclasses.replace(values, **changes)  # type: ignore[no-any-return]


def is_blend_file(value: Any) -> bool:
    """Whether a data path names a blend file: by its ending, unless a dataset has that prefix."""
    return isinstance(value, str) and value.endswith(_FILES) and not os.path.exists(f"{value}.idx")


def strip_suffix(prefix: str) -> str:
    """The prefix of a pair; a final .bin or .idx is removed with a note."""
    for suffix in (".bin", ".idx"):
        if prefix.endswith(suffix):
            log.info("reading %s as the prefix %s", prefix, prefix[: -len(suffix)])
            return prefix[: -len(suffix)]
    return prefix


def _from_words(words: list[Any], key: str) -> list[Source]:
    numbers = [_number(word) for word in words]
    if len(words) % 2 == 0 and all(n is not None for n in numbers[::2]):
        # a prefix may itself read as a number, as in Megatron: position decides
        return [Source(strip_suffix(str(p)), n) for n, p in zip(numbers[::2], words[1::2], strict=True)]
    for word, number in zip(words, numbers, strict=True):
        if number is not None:
            raise UserError(
                f"{key}: {word!r} stands where a prefix is expected. The {len(words)} words were read as prefixes,"
                " because only an even number of words, every first of two a number, is weights and prefixes."
            )
    return [Source(strip_suffix(str(word)), None) for word in words]


def _from_entry(item: Any, key: str) -> Source:
    values = item if isinstance(item, dict) else getattr(item, "__dict__", {})
    prefix, weight, least = (values.get(name) for name in ("prefix", "weight", "min_document_length"))
    number = weight is None or (isinstance(weight, int | float) and not isinstance(weight, bool))
    number = number and (least is None or (isinstance(least, int) and not isinstance(least, bool) and least >= 0))
    if set(values) - {"prefix", "weight", "min_document_length"} or not isinstance(prefix, str) or not number:
        raise UserError(
            f"{key}: expected {{prefix: PATH, weight: NUMBER}}, or min_document_length: TOKENS too, got {item!r}"
        )
    return Source(strip_suffix(prefix), None if weight is None else float(weight), least)


def _read_blend_file(path: str, key: str) -> dict[str, list[dict[str, Any]]]:
    """The lists of a blend file, as entries of prefix and weight: of each part, or one that has no parts."""
    content = _parsed(path, key)
    where = f"{key}, {path}"
    if not isinstance(content, dict):
        content = {_WHOLE: content}
    elif unknown := [name for name in content if name not in _PARTS]:
        raise UserError(f"{where}: unknown part {unknown[0]!r}. The parts of a blend file are {', '.join(_PARTS)}.")
    parts = {}
    for name, words in content.items():
        words = words.split() if isinstance(words, str) else words
        sources = parse_blend(words, where) if words else []
        parts[name] = [_entry(source, path) for source in sources]
    return parts


def _entry(source: Source, path: str) -> dict[str, Any]:
    entry: dict[str, Any] = {"prefix": _beside(source.prefix, path), "weight": source.weight}
    return entry if source.min_length is None else {**entry, "min_document_length": source.min_length}


def _parsed(path: str, key: str) -> Any:
    """Content of a blend file: a string, a list or a dict."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        if path.endswith(".txt"):
            return text
        if path.endswith(".json"):
            return json.loads(text)
    except OSError as error:
        raise UserError(
            f"{key}: {path} is taken for a blend file by its ending, but cannot be read: {error.strerror}. Check the"
            " path."
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{key}: {path} is not UTF-8 text (byte {error.start}).") from error
    except ValueError as error:
        raise UserError(f"{key}: {path} is not JSON: {error}.") from error
    except RecursionError as error:
        raise UserError(f"{key}: {path} is nested too deeply to be a blend file.") from error
    from megayoco.config.loader import read_yaml  # late: the data tools work without the config

    return read_yaml(path)


def _beside(prefix: str, path: str) -> str:
    """A prefix in a blend file, as seen from the working directory."""
    beside = os.path.join(os.path.dirname(path), prefix)  # an absolute prefix stays as it is
    return beside if any(os.path.exists(f"{beside}.{kind}") for kind in ("idx", "bin")) else prefix


def _number(word: Any) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None
