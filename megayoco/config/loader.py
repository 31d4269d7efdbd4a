"""YAML files and dotted overrides to a RunConfig and back. Every error names the file and line, or the override."""

import dataclasses
import difflib
import json
import math
import os
import re
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from megayoco.config.model import ModelConfig
from megayoco.config.run import RunConfig
from megayoco.errors import UserError

Keys = tuple[str | int, ...]
"""Where a value lies: ("phases", 0, "steps") is phases.0.steps."""

_FLOAT = re.compile(
    r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
)


class _Loader(yaml.SafeLoader):
    """YAML with the numbers of its version 1.2: 1e-5 is a number, 010 is ten, `no` is text and 1:30 is too."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's own attribute, replaced per class)


for _tag, _pattern, _first in (
    ("null", re.compile(r"~$|null$|Null$|NULL$|$"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"true$|True$|TRUE$|false$|False$|FALSE$"), list("tTfF")),
    ("int", re.compile(r"[-+]?[0-9][0-9_]*$"), list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, _first)


class _Source:
    """The values of one YAML file with overrides applied, and where each came from."""

    def __init__(self, path: str | os.PathLike[str]):
        self.name = os.fspath(path)
        self.places: dict[Keys, str] = {(): self.name}

    def read(self) -> Any:
        """Values of the file as plain Python. Raises UserError: missing, no YAML, duplicate keys, other tags."""
        try:
            text = Path(self.name).read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"{self.name} cannot be read: {error.strerror}. Check the path of the config.") from None
        except UnicodeDecodeError as error:
            raise UserError(f"{self.name} is not UTF-8 text (byte {error.start}).") from None
        try:
            node = yaml.compose(text, Loader=_Loader)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = f", line {mark.line + 1}" if mark else ""
            raise UserError(f"{self.name}{line}: not valid YAML: {error.problem}") from None
        except yaml.YAMLError as error:
            raise UserError(f"{self.name} is not valid YAML: {error}") from None
        return {} if node is None else self._plain(node, (), ())

    def _plain(self, node: yaml.Node, keys: Keys, parents: tuple[yaml.Node, ...]) -> Any:
        place = f"{self.name}, line {node.start_mark.line + 1}"
        self.places.setdefault(keys, place)
        if any(node is parent for parent in parents):
            raise UserError(f"{place}: {dotted(keys)} contains itself. Remove the alias.")
        parents = (*parents, node)
        if isinstance(node, yaml.MappingNode):
            mapping: dict[str, Any] = {}
            for key_node, value_node in node.value:
                place = f"{self.name}, line {key_node.start_mark.line + 1}"
                if not isinstance(key_node, yaml.ScalarNode):
                    raise UserError(f"{place}: a key must be plain text.")
                inner = (*keys, key_node.value)
                if key_node.value in mapping:
                    first = self.places[inner].rpartition(" ")[2]
                    raise UserError(f"{place}: {dotted(inner)} is given twice, first in line {first}. Remove one.")
                self.places[inner] = place
                mapping[key_node.value] = self._plain(value_node, inner, parents)
            return mapping
        if isinstance(node, yaml.SequenceNode):
            return [self._plain(item, (*keys, number), parents) for number, item in enumerate(node.value)]
        return _scalar(node, place)

    def override(self, values: Any, argument: str) -> None:
        """Apply one `a.b.0.c=value` to `values` in place. Raises UserError that names the override."""
        place = f"override '{argument}'"
        dotted_key, equals, text = argument.partition("=")
        names = dotted_key.split(".")
        if not equals or not all(names):
            raise UserError(f"{place}: an override must look like section.key=value, for example parallel.tensor=2.")
        try:
            node = yaml.compose(text, Loader=_Loader)
        except yaml.YAMLError:
            raise UserError(f"{place}: the value is not valid YAML. Put it in quotes.") from None
        target: Any = values
        keys: Keys = ()
        for depth, name in enumerate(names):
            last = depth == len(names) - 1
            key: str | int = name
            if isinstance(target, list):
                if not name.isdecimal() or int(name) >= len(target):
                    raise UserError(
                        f"{place}: {dotted(keys)} is a list of {len(target)}, its entries are 0 to {len(target) - 1}."
                    )
                key = int(name)
            elif not isinstance(target, dict):
                raise UserError(f"{place}: {dotted(keys)} holds a value, not keys.")
            keys = (*keys, key)
            if last:
                for old in [old for old in self.places if old[: len(keys)] == keys]:
                    del self.places[old]
                self.places[keys] = place
                inner = _Source.__new__(_Source)
                inner.name, inner.places = place, {}
                target[key] = None if node is None else inner._plain(node, keys, ())
                self.places.update(dict.fromkeys(inner.places, place))
            else:
                if isinstance(target, dict) and target.get(key) is None:
                    target[key] = {}
                    self.places[keys] = place
                target = target[key]

    def place(self, keys: Keys) -> str:
        """Where the value at `keys`, or else the innermost section that should hold it, was given."""
        while keys not in self.places:
            keys = keys[:-1]
        return self.places[keys]


def _scalar(node: yaml.Node, place: str) -> Any:
    kind, text = node.tag.rpartition(":")[2], node.value
    if kind == "str":
        if "\0" in text:
            raise UserError(f"{place}: the text {text!r} holds a NUL character. Remove it.")
        return text
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    try:
        if kind == "int":
            return int(text)
        if kind == "float":
            text = text.lower().replace("_", "")
            return float(text.replace(".inf", "inf").replace(".nan", "nan"))
    except ValueError:
        pass
    raise UserError(f"{place}: {text!r} is not a value of kind {node.tag}.")


def dotted(keys: Keys) -> str:
    """phases.0.steps for ("phases", 0, "steps")."""
    return ".".join(str(key) for key in keys) or "the file"


def load_config(
    path: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    shape_of: Callable[[str], dict[str, Any]] | None = None,
) -> RunConfig:
    """Read a run's YAML file and apply overrides such as `phases.0.steps=20` (values are YAML) in order.

    Args:
        path: the file.
        overrides: each `key=value`.
        shape_of: the fields of the model in a folder, for `model.init_from`. None: they must be given.

    Raises:
        UserError: unreadable or malformed file; unknown, missing, duplicate or ill-typed key; value out of range.
            The message names file and line or the override, and for an unknown key the nearest valid one.
    """
    source = _Source(path)
    try:
        values = source.read()
        if not isinstance(values, dict):
            raise UserError(f"{source.name} must hold keys and values, for example `seed: 1`.")
        for argument in overrides:
            source.override(values, argument)
    except RecursionError:
        raise UserError(f"{source.name}, or an override of it, is nested too deeply to be a run's config.") from None
    for field in dataclasses.fields(RunConfig):
        if dataclasses.is_dataclass(field.type) and values.get(field.name, 0) is None:
            values[field.name] = {}  # a section whose keys are all commented out
    model = values.get("model")
    if shape_of is not None and isinstance(model, dict) and "preset" not in model:
        start = model.get("init_from")
        values["model"] = {**shape_of(start), **model} if isinstance(start, str) else model
    return _validated(RunConfig, values, source)


def read_yaml(path: str | os.PathLike[str]) -> Any:
    """A YAML file as text, numbers, lists and mappings, by the rules of a run's config. UserError names the line."""
    try:
        return _Source(path).read()
    except RecursionError:
        raise UserError(f"{os.fspath(path)} is nested too deeply.") from None


def _validated(cls: type[Any], values: Any, source: _Source) -> Any:
    try:
        # JSON is the mode in which strict fields still take lists and mappings for tuples and sections
        return TypeAdapter(cls).validate_json(json.dumps(values))
    except ValidationError as error:
        problems = error.errors(include_url=False)
    # an unknown key first: a misspelt one also makes the right one missing
    problems.sort(key=lambda problem: problem["type"] != "unexpected_keyword_argument")
    raise UserError(_message(cls, problems, source))


def _message(cls: type[Any], problems: Sequence[Any], source: _Source) -> str:
    """About the first of the problems."""
    problem = problems[0]
    keys: Keys = problem["loc"]
    kind, context, value = problem["type"], problem.get("ctx", {}), problem["input"]
    if kind == "unexpected_keyword_argument":
        text = f"unknown key {dotted(keys)}. {_suggestion(cls, keys)}"
    elif kind == "missing":
        text = f"{dotted(keys)} is required{_preset_hint(keys)}."
    elif kind == "refused":
        if not keys or keys[-1] != context["field"]:
            keys = (*keys, context["field"])
        text = f"{dotted(keys)} {context['message']}."
    else:
        alternatives = [problem]
        if keys and isinstance(keys[-1], str) and _section(cls, keys[:-1]) is None:
            # a value that may be of several kinds has a problem with each, whose name stands behind the key
            keys = keys[:-1]
            alternatives = [other for other in problems if other["loc"][:-1] == keys]
        needs = [_requirement(other["type"], other.get("ctx", {}), other["msg"]) for other in alternatives]
        text = f"{dotted(keys)} {' or '.join([needs[0], *(x.removeprefix('must be ') for x in needs[1:])])}"
        text += f", got {_shown(value)}."
    return f"{source.place(keys)}: {text}"


def _requirement(kind: str, context: dict[str, Any], fallback: str) -> str:
    if kind in ("int_type", "int_from_float"):
        return "must be an integer"
    if kind in ("float_type", "finite_number"):
        return "must be a finite number"
    if kind == "bool_type":
        return "must be true or false"
    if kind == "string_type":
        return "must be text"
    if kind in ("list_type", "tuple_type"):
        return "must be a list"
    if kind in ("dataclass_type", "dataclass_exact_type"):
        return "must hold keys and values"
    if kind == "literal_error":
        several = " or " in context["expected"]
        return f"must be {'one of ' if several else ''}{context['expected']}"
    if kind == "too_short":
        return f"must have at least {context['min_length']} entry"
    if kind == "string_too_short":
        return "must not be empty"
    bounds = {"greater_than": "greater than", "greater_than_equal": "at least", "less_than": "less than"}
    if kind in bounds:
        return f"must be {bounds[kind]} {next(iter(context.values()))}"
    return f"is wrong ({fallback})"


def _shown(value: Any) -> str:
    if isinstance(value, float) and math.isfinite(value) and value.is_integer():
        return f"{value!r} (write {int(value)})"
    if value is None:
        return "nothing"
    return repr(value)


def _preset_hint(keys: Keys) -> str:
    return ", unless model.preset names a shape" if keys[:1] == ("model",) else ""


def _section(cls: type[Any], keys: Keys) -> type[Any] | None:
    """The dataclass that lies at `keys` below `cls`."""
    for key in keys:
        if isinstance(key, str):
            hints = typing.get_type_hints(cls)
            if key not in hints:
                return None
            found = [kind for kind in _leaves(hints[key]) if dataclasses.is_dataclass(kind)]
            if not found:
                return None
            cls = typing.cast(type[Any], found[0])
    return cls


def _leaves(hint: Any) -> list[Any]:
    arguments = typing.get_args(hint)
    return [leaf for argument in arguments for leaf in _leaves(argument)] if arguments else [hint]


def _suggestion(cls: type[Any], keys: Keys) -> str:
    """Did you mean ...? The nearest key of the same section, else the same key of another section, else all keys."""
    section = _section(cls, keys[:-1])
    own = [field.name for field in dataclasses.fields(section)] if section else []
    name = str(keys[-1])
    if nearest := difflib.get_close_matches(name, own, 1, 0.7):
        return f"Did you mean {dotted((*keys[:-1], nearest[0]))}?"
    every = _all_keys(cls, ())
    if same := [found for found in every if found[-1] == name]:
        return f"Did you mean {dotted(same[0])}?"
    return f"Valid keys here: {', '.join(own)}."


def _all_keys(cls: type[Any], prefix: Keys) -> list[Keys]:
    found: list[Keys] = []
    for name, hint in typing.get_type_hints(cls).items():
        found.append((*prefix, name))
        inner = _section(cls, (name,))
        if inner is not None:
            number: Keys = (0,) if "list" in str(hint) else ()
            found += _all_keys(inner, (*prefix, name, *number))
    return found


def save_config(config: RunConfig, path: str | os.PathLike[str]) -> None:
    """Write the resolved config as YAML; `load_config` of it gives an equal one. Replaces `path` in one step."""
    text = yaml.dump(_plain(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{target} cannot be written: {error.strerror}. Choose another output_dir.") from None


class _Dumper(yaml.SafeDumper):
    """Quotes the texts that this module's loader would read as numbers."""

    yaml_implicit_resolvers: dict[str, Any] = {  # noqa: RUF012 (PyYAML's own attribute, replaced per class)
        first: [
            *yaml.SafeDumper.yaml_implicit_resolvers.get(first, []),
            *_Loader.yaml_implicit_resolvers.get(first, []),
        ]
        for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *_Loader.yaml_implicit_resolvers}
    }


def _plain(value: Any) -> Any:
    """Dataclasses and tuples as the mappings and lists of YAML and JSON."""
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def model_config_to_dict(model: ModelConfig) -> dict[str, Any]:
    """Every field of `model` that is of its shape, as text, numbers and None, for YAML and JSON."""
    values = typing.cast(dict[str, Any], _plain(model))
    del values["init_from"]
    return values


def model_config_from_dict(values: dict[str, Any], name: str = "model") -> ModelConfig:
    """The ModelConfig with these fields, absent ones at their defaults. Raises UserError that begins with `name`."""
    source = _Source(name)
    return typing.cast(ModelConfig, _validated(ModelConfig, values, source))
