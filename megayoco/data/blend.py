"""Data paths: which datasets a run reads and with which weights, in Megatron's grammar.

    data path = prefix | [prefix, ...] | [weight, prefix, weight, prefix, ...] | [{prefix, weight}, ...]

In a list of words, an even number of them is weight-prefix pairs if every word in weight position is a number, and
prefixes if none is. Where Megatron would read a number as a prefix or stop with an assertion, this is an error that
shows how the list was read.
"""

import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megayoco.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """One dataset of a blend; weight None means: as many samples as it holds, relative to the others."""

    prefix: str
    weight: float | None


def parse_blend(value: Any, key: str) -> list[Source]:
    """The datasets of a data path; sources of weight 0 are left out.

    Args:
        value: a prefix, or a list of prefixes, of weights and prefixes, or of objects with prefix and weight.
        key: what the user calls it, for messages, for example data.train.

    Raises:
        UserError: a number in place of a prefix, a negative or NaN weight, all weights 0, a prefix given twice.
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
    seen: dict[str, str] = {}
    for source in sources:
        place = os.path.realpath(source.prefix)
        if place in seen:
            raise UserError(f"{key}: {source.prefix} is given twice. Give it once, with the sum of the weights.")
        seen[place] = source.prefix
    return [source for source in sources if source.weight != 0]


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
    if isinstance(item, dict):
        unknown = set(item) - {"prefix", "weight"}
        prefix, weight = item.get("prefix"), item.get("weight", 1.0)
    else:
        unknown = set()
        prefix, weight = getattr(item, "prefix", None), getattr(item, "weight", 1.0)
    if unknown or not isinstance(prefix, str) or isinstance(weight, bool) or not isinstance(weight, int | float):
        raise UserError(f"{key}: expected {{prefix: PATH, weight: NUMBER}}, got {item!r}")
    return Source(strip_suffix(prefix), float(weight))


def _number(word: Any) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None
