"""YAML as a recipe may use it: plain data with positions, exact decimals, no duplicate keys, no objects."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from recipes.errors import UserError

M = TypeVar("M", bound=BaseModel)
Key = tuple[str | int, ...]
"""Where a value sits: the keys and list positions from the top of the file."""

_PLAIN_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("map", "seq", "str", "int", "float", "bool", "null")}
_FLOAT_WITHOUT_POINT = re.compile(r"[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$")


@dataclass
class YamlFile:
    """One parsed file."""

    path: Path
    data: dict[str, Any]
    lines: dict[Key, int] = field(default_factory=dict)
    """The line, from 1, of every key."""


def read_yaml(path: Path) -> YamlFile:
    """Reads a file whose top level is a mapping; decimals become `Decimal`, so that 0.60 stays exact.

    Raises:
        UserError: the file is missing, empty or not YAML; a key occurs twice; a tag, an alias or a list on top.
    """
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except FileNotFoundError:
        raise UserError("there is no such file", _neighbours(path), path) from None
    except IsADirectoryError:
        raise UserError("this is a folder", "name a YAML file in it", path) from None
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 text (byte {error.start})", "save the file as UTF-8", path) from None
    except yaml.YAMLError as error:
        raise _syntax_error(path, error) from None
    if node is None:
        raise UserError("the file is empty", "write the keys that docs/formats.md lists", path)
    if not isinstance(node, yaml.MappingNode):
        raise UserError("the top level is not a mapping", "write `key: value` lines", path, f"line {_line(node)}")
    file = YamlFile(path, {})
    file.data = _Builder(file).mapping(node, ())
    return file


def _neighbours(path: Path) -> str:
    folder = next((p for p in path.parents if p.is_dir()), Path())
    found = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))[:8]
    return f"{folder} holds: {', '.join(found) or 'nothing'}; name one of these, or make the file"


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _syntax_error(path: Path, error: yaml.YAMLError) -> UserError:
    mark = getattr(error, "problem_mark", None)
    where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else None
    problem = getattr(error, "problem", None) or str(error)
    return UserError(f"not valid YAML: {problem}", "check the indentation and the quotes there", path, where)


class _Builder:
    """Turns nodes into plain data and notes their lines."""

    def __init__(self, file: YamlFile) -> None:
        self.file = file
        self.seen: set[int] = set()

    def error(self, node: yaml.Node, found: str, fix: str) -> UserError:
        return UserError(found, fix, self.file.path, f"line {_line(node)}")

    def value(self, node: yaml.Node, key: Key) -> Any:
        if node.tag not in _PLAIN_TAGS:
            if node.tag == "tag:yaml.org,2002:timestamp":
                return node.value
            tag = node.tag.replace("tag:yaml.org,2002:", "!!")
            raise self.error(node, f"the tag {tag} would build an object", "write plain values only")
        if id(node) in self.seen:
            raise self.error(node, "an alias (`*name`) repeats another value", "write the value out")
        self.seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, key)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, (*key, i)) for i, item in enumerate(node.value)]
        return self.scalar(node)

    def mapping(self, node: yaml.MappingNode, key: Key) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for name_node, value_node in node.value:
            name = name_node.value
            if not isinstance(name, str):
                raise self.error(name_node, "a key that is not a word", "write `key: value` lines")
            if name in result:
                found = f"the key '{name}' occurs twice (first in line {self.file.lines[(*key, name)]})"
                raise self.error(name_node, found, "keep one of them")
            self.file.lines[(*key, name)] = _line(name_node)
            result[name] = self.value(value_node, (*key, name))
        return result

    def scalar(self, node: yaml.ScalarNode) -> Any:
        text = str(node.value).replace("_", "")
        kind = node.tag.rsplit(":", 1)[1]
        if kind == "str" and node.style is None and _FLOAT_WITHOUT_POINT.match(node.value):
            return Decimal(text)  # YAML 1.1 takes 5e-4 for a string
        if kind == "float":
            if not re.match(r"[-+]?[0-9.]", text) or ":" in text or not any(c.isdigit() for c in text):
                raise self.error(node, f"{node.value} is not a finite number", "write a decimal number")
            return Decimal(text)
        if kind == "int":
            if not re.fullmatch(r"[-+]?(0|[1-9][0-9]*)", text):
                raise self.error(node, f"the number {node.value} is not decimal", "write it with digits 0-9 only")
            return int(text)
        if kind == "bool":
            return text.lower() in ("true", "yes", "on")
        return None if kind == "null" else node.value


Places = dict[Key, tuple[Path, int | None]]
"""The file and line of every key, the empty key standing for the whole file."""


def places_of(file: YamlFile) -> Places:
    return {(): (file.path, None), **{key: (file.path, line) for key, line in file.lines.items()}}


def typed_error(places: Places, key: Key, found: str, fix: str) -> UserError:
    """An error at `key`, with the line of the nearest key above that has one."""
    near = next(key[:n] for n in range(len(key), -1, -1) if key[:n] in places)
    file, line = places[near]
    name = ".".join(str(part) for part in key)
    return UserError(found, fix, f"{file}:{line}" if line else file, name or None)


def typed(kind: type[M], raw: dict[str, Any], places: Places) -> M:
    """`raw` as a `kind`, or a UserError for the first thing that does not fit."""
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        # A misspelt key is both unknown and missing: the first says more.
        first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        key = tuple(first["loc"])
        raise typed_error(places, key, *_explain(kind, key, first)) from None


_SHAPES = {
    "tuple_type": "write a list, such as [one, two]", "dict_type": "write a mapping: `key: value` lines",
    "model_type": "write a mapping: `key: value` lines", "string_type": "write one word",
}  # fmt: skip
"""What to write instead, by pydantic's types of errors that say it in a programmer's words."""


def _explain(kind: type[Any], key: Key, error: Any) -> tuple[str, str]:
    """What was found and what to write instead, for one of pydantic's errors."""
    if error["type"] == "extra_forbidden":
        known = _fields_at(kind, key[:-1])
        near = difflib.get_close_matches(str(key[-1]), known, 1, cutoff=0.5)
        return f"the key '{key[-1]}' is unknown", f"write '{near[0]}'" if near else f"write one of {', '.join(known)}"
    if error["type"] == "missing":
        return f"the key '{key[-1]}' is missing", "add it (docs/formats.md says what it means)"
    fix = _SHAPES.get(error["type"]) or (
        str(error["ctx"]["error"]) if error["type"] == "value_error" else _sentence(error["msg"])
    )
    return f"found {_shown(error['input'])}", fix


def _sentence(text: str) -> str:
    return text[:1].lower() + text[1:].replace("Input should", "the value should")


def _shown(value: object) -> str:
    text = f"'{value}'" if isinstance(value, str) else "nothing" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _fields_at(kind: Any, key: Key) -> list[str]:
    """The known keys of the model that sits at `key` below `kind`."""
    for part in key:
        field = getattr(kind, "model_fields", {}).get(part)
        kind = field.annotation if field else kind
        args = [a for a in getattr(kind, "__args__", ()) if isinstance(a, type) and issubclass(a, BaseModel)]
        kind = args[-1] if args else kind
    return list(getattr(kind, "model_fields", {}))
