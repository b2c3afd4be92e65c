"""The only reader of study files: from YAML to typed values, with errors that name the line."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from methods.naming import NamingError, nearest

Keys = tuple[str | int, ...]
"""A path of keys and list indices from the top of a file."""
Kind = TypeVar("Kind")


class StudyError(NamingError):
    """A study file that cannot be used; names the file, the line, and what is allowed there."""


class _Loader(yaml.SafeLoader):
    """Plain YAML without Python objects."""


MERGE, TEXT = "tag:yaml.org,2002:merge", "tag:yaml.org,2002:str"


def _check_keys(node: yaml.Node | None, seen: set[int], above: tuple[int, ...] = ()) -> None:
    """Reject keys that are not strings or are given twice, and anchors that contain themselves."""
    if node is None or isinstance(node, yaml.ScalarNode):
        return
    if id(node) in above:
        raise yaml.constructor.ConstructorError(
            None, None, "an anchor contains itself", node.start_mark
        )
    if id(node) in seen:
        return
    seen.add(id(node))
    keys: set[str] = set()
    for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
        if key.tag not in (TEXT, MERGE):
            got = key.value if isinstance(key, yaml.ScalarNode) else f"a {key.id}"
            text = f"expected a string as a key (put it in quotes), got {got}"
            raise yaml.constructor.ConstructorError(None, None, text, key.start_mark)
        if key.value in keys and key.tag == TEXT:
            text = f"the key {key.value!r} is given twice"
            raise yaml.constructor.ConstructorError(None, None, text, key.start_mark)
        keys.add(key.value)
    for each in node.value:
        inner = each[1] if isinstance(node, yaml.MappingNode) else each
        _check_keys(inner, seen, (*above, id(node)))


@dataclass(frozen=True)
class StudyFile:
    """The content of a file with the lines of its keys, for errors."""

    path: Path
    content: dict[str, Any]
    node: yaml.MappingNode
    repeated: tuple[str, ...] = ()
    """keys that may be given at the top for every block"""
    given: dict[tuple[str, ...], str] = field(default_factory=dict)
    """keys whose values were overridden, with the setting that did so"""

    def made(self, kind: type[Kind], content: Any, where: Keys = ()) -> Kind:
        """A typed object from a part of the content.

        Raises:
            StudyError: a key is not known, or a value is not allowed.
        """
        try:
            made = TypeAdapter(kind).validate_python(content)
            self._check_flags(content, made, where)
            return made
        except NamingError as error:
            raise StudyError(f"study {self.path}: {error}") from error
        except ValidationError as error:
            first = error.errors()[0]
            path = (*where, *first["loc"])
            if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
                known = _fields(kind, first["loc"][:-1])
                raise self.unknown(path, known) from error
            text = first["msg"].removeprefix("Value error, ")
            key, colon, rest = text.partition(": ")  # a check of the whole object names its key
            if colon and key in (*_fields(kind, first["loc"]), *self.repeated):
                path, text = (*path, key), rest
            raise self.error(path, text, first["input"]) from error

    def _check_flags(self, content: dict[str, Any], made: Any, where: Keys) -> None:
        """Reject true where a number is expected: pydantic would convert it to 1."""
        for key, value in content.items():
            read = getattr(made, key)
            if isinstance(value, bool) and not isinstance(read, bool):
                raise self.error((*where, key), "expected a number", value)
            if isinstance(value, dict) and is_dataclass(read):
                self._check_flags(value, read, (*where, key))

    def unknown(self, path: Keys, known: Iterable[str]) -> StudyError:
        """The error for an unknown key."""
        listed = sorted(known)
        name = str(path[-1])
        return StudyError(
            f"study {self.path}{self.line(path)}: unknown key {name!r}{nearest(name, listed)} "
            f"(known: {', '.join(listed)})"
        )

    def error(self, path: Keys, text: str, got: Any = None) -> StudyError:
        """The error for a value at a path of the file."""
        key = ".".join(str(part) for part in path if not isinstance(part, int))
        shown = f", got {got!r}" if isinstance(got, str | int | float | bool | list) else ""
        shown = "" if ", got " in text else shown
        return StudyError(
            f"study {self.path}{self.line(path)}: {key + ': ' if key else ''}{text}{shown}"
        )

    def line(self, path: Keys) -> str:
        """``, line 12``: the line of the deepest part of the path that is in the file."""
        told = tuple(map(str, path))
        for setting_path, setting in self.given.items():
            inner = (
                told[2:] if told[:1] == ("blocks",) and setting_path[0] in self.repeated else told
            )
            if setting_path == inner[: len(setting_path)]:
                return f", --set {setting}"
        node: yaml.Node = self.node
        mark = node.start_mark
        for place, part in enumerate(path):
            found = _inner(node, part)
            if found is None and place >= 2 and path[0] == "blocks":  # given at the top of the file
                return self.line(path[place:])
            if found is None:
                break
            mark, node = found
        return f", line {mark.line + 1}"


def read(path: Path) -> StudyFile:
    """The file; its keys are checked to be unique strings.

    Raises:
        StudyError: it cannot be read, or is not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        there = sorted(each.name for each in path.parent.glob("*.y*ml"))
        hint = f" (there is: {', '.join(there)})" if there else ""
        raise StudyError(f"study {path}: {error.strerror}{hint}") from error
    except UnicodeDecodeError as error:
        raise StudyError(f"study {path}: expected UTF-8 text, {error.reason}") from error
    try:
        node = yaml.compose(text, Loader=_Loader)
        _check_keys(node, set())
        content = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise StudyError(f"study {path}{where}: {error.problem}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise StudyError(f"study {path}: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict) or not isinstance(node, yaml.MappingNode):
        raise StudyError(f"study {path}: expected a mapping such as methods: [none, mixup]")
    return StudyFile(path, content, node)


def value_of(text: str) -> Any:
    """The value of a text in YAML.

    Raises:
        StudyError: it cannot be read.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise StudyError("the value cannot be read as YAML") from error


def _inner(node: yaml.Node, part: str | int) -> tuple[yaml.Mark, yaml.Node] | None:
    if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
        return node.value[part].start_mark, node.value[part]
    if isinstance(node, yaml.MappingNode):
        merged = []
        for key, value in node.value:
            if key.value == str(part):
                return key.start_mark, value
            if key.tag == MERGE:
                merged += value.value if isinstance(value, yaml.SequenceNode) else [value]
        return next(filter(None, (_inner(each, part) for each in merged)), None)
    return None


def _fields(kind: type, path: Keys) -> tuple[str, ...]:
    """The known keys at a path below a dataclass."""
    for part in path:
        hint = get_type_hints(kind).get(str(part)) if is_dataclass(kind) else None
        inner = [each for each in (hint, *get_args(hint)) if is_dataclass(each)]
        kind = inner[0] if inner else kind  # type: ignore[assignment]
    return tuple(each.name for each in fields(kind))  # type: ignore[arg-type]
