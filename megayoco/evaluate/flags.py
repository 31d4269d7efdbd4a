"""Command-line flags from the fields of an options dataclass, and the dataclass from what they were given."""

from __future__ import annotations

import argparse
import types
import typing
from dataclasses import fields
from typing import Any, Literal, TypeVar

from pydantic import ValidationError

from megayoco.errors import UserError

Options = TypeVar("Options")


def flag_of(field: str) -> str:
    """--max-new-tokens for max_new_tokens."""
    return "--" + field.replace("_", "-")


def add_flags(parser: argparse.ArgumentParser, options: type[Any]) -> None:
    """One flag per field, named like it; a field's docstring is its help."""
    hints = typing.get_type_hints(options)
    group = parser.add_argument_group("options of the evaluation")
    for field in fields(options):
        text = " ".join(description(options, field.name).replace("`", "").split()).replace("%", "%%")
        default = options.__pydantic_fields__[field.name].get_default(call_default_factory=False)
        if isinstance(default, (int, float, str)) and not isinstance(default, bool) and "Default:" not in text:
            text += f" Default: {default}."
        _add_flag(group, flag_of(field.name), hints[field.name], text)


def description(options: type[Any], field: str) -> str:
    """The docstring of a field, also of an inherited one."""
    for kind in options.__mro__:
        found = getattr(kind, "__pydantic_fields__", {}).get(field)
        if found is not None and found.description:
            return str(found.description)
    return ""


def options_from(options: type[Options], arguments: argparse.Namespace) -> Options:
    """The dataclass with the values of the flags that were given.

    Raises:
        UserError: a value out of range, or values that contradict each other; names the flag.
    """
    names = [field.name for field in fields(options)]  # type: ignore[arg-type]
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    try:
        return options(**given)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
    context = problem.get("ctx", {})
    field = str(context["field"] if problem["type"] == "refused" else problem["loc"][0])
    text = context["message"] if problem["type"] == "refused" else problem["msg"][0].lower() + problem["msg"][1:]
    got = "" if problem["type"] == "refused" else f", got {problem['input']}"
    raise UserError(f"{flag_of(field)} {text.removeprefix('input ')}{got}.")


def _add_flag(group: Any, flag: str, hint: Any, text: str) -> None:
    kind, several = _plain(hint)
    if kind is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
    elif typing.get_origin(kind) is Literal:
        group.add_argument(flag, choices=typing.get_args(kind), help=text)
    else:
        metavar = {int: "N", float: "X"}.get(kind, "TEXT")
        group.add_argument(flag, type=kind, nargs="+" if several else None, metavar=metavar, help=text)


def _plain(hint: Any) -> tuple[Any, bool]:
    """(type of one value, whether a list of them) of a field's type."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is list:
        return _plain(typing.get_args(hint)[0])[0], True
    return hint, False
