"""Which records become examples: rules about the texts of a record."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from megayoco.config.tuning import FilterRule
from megayoco.data.tokenizer import Tokenizer
from megayoco.errors import UserError


class _Missing(Exception):
    """A list has no element of the number that a path asks for."""


def passes(record: dict[str, Any], rules: Sequence[FilterRule], tokenizer: Tokenizer, place: str) -> bool:
    """Whether a record passes all rules. One that lacks a list element that a path names by its number does not.

    Raises:
        UserError: a path leads to no field, or to something that is no text.
    """
    return all(_passes(record, rule, tokenizer, place) for rule in rules)


def _passes(record: dict[str, Any], rule: FilterRule, tokenizer: Tokenizer, place: str) -> bool:
    try:
        texts = list(_texts(record, rule.steps, place))
    except _Missing:
        return False
    if rule.matches is not None:
        pattern = re.compile(rule.matches, re.DOTALL)  # kept by the library
        results = (pattern.match(text) is not None for text in texts)
        return any(results) if rule.over == "any" else all(results)
    by_tokens = rule.tokens_below is not None or rule.tokens_above is not None
    lengths = [len(tokenizer.encode_array(text)) if by_tokens else len(text) for text in texts]
    if rule.over == "sum":
        lengths = [sum(lengths)]
    below, above = (
        (rule.tokens_below, rule.tokens_above) if by_tokens else (rule.characters_below, rule.characters_above)
    )
    passed = (length < below if below is not None else length > (above or 0) for length in lengths)
    return any(passed) if rule.over == "any" else all(passed)


def _texts(value: Any, steps: Sequence[str | int], place: str, so_far: tuple[str | int, ...] = ()) -> Iterator[str]:
    """The texts that a path leads to."""
    if not steps:
        if not isinstance(value, str):
            raise _other_kind(place, "text", so_far, value)
        yield value
        return
    step, rest = steps[0], steps[1:]
    path = (*so_far, step)
    if isinstance(step, int) or step == "*":
        if not isinstance(value, list):
            raise _other_kind(place, "a list", so_far, value)
        if step == "*":
            for element in value:
                yield from _texts(element, rest, place, path)
            return
        assert isinstance(step, int)
        if not -len(value) <= step < len(value):
            raise _Missing
        yield from _texts(value[step], rest, place, path)
        return
    if not isinstance(value, dict) or step not in value:
        there = ", ".join(map(repr, value)) if isinstance(value, dict) else type(value).__name__
        raise UserError(f"{place}: no field {step!r} for the filter of {_shown(path)}, only {there}. Correct its path.")
    yield from _texts(value[step], rest, place, path)


def _other_kind(place: str, wanted: str, path: Sequence[str | int], value: Any) -> UserError:
    return UserError(
        f"{place}: a filter wants {wanted} at {_shown(path)}, there is {type(value).__name__}. Correct its path, or"
        " repair the record."
    )


def _shown(path: Sequence[str | int]) -> str:
    return ".".join(map(str, path)) or "the record"
