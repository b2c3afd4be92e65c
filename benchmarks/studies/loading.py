"""A study file: YAML to a typed study; an error names the line."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

import methods
from analysis import runs
from analysis.question import as_name
from analysis.runs import Training
from benchmarks.studies import cells
from benchmarks.studies.plan import checks
from benchmarks.studies.schema import (
    OF_STUDY,
    PRODUCT,
    Asha,
    Block,
    Resources,
    Study,
    StudyError,
    Tune,
)
from benchmarks.studies.space import parameter
from methods.naming import (
    NamingError,
    convert,
    from_yaml,
    nearest,
)
from methods.naming import parameters as arguments_of

Keys = tuple[str | int, ...]
"""Keys and places from the top of a file."""


class _Loader(yaml.SafeLoader):
    """Plain YAML, nothing of Python's."""


MERGE, TEXT = "tag:yaml.org,2002:merge", "tag:yaml.org,2002:str"


def _check_keys(node: yaml.Node | None, seen: set[int], above: tuple[int, ...] = ()) -> None:
    """Refuse a key that is no text or is given twice, and an anchor that holds itself."""
    if node is None or isinstance(node, yaml.ScalarNode):
        return
    if id(node) in above:
        raise yaml.constructor.ConstructorError(
            None, None, "an anchor holds itself", node.start_mark
        )
    if id(node) in seen:
        return
    seen.add(id(node))
    keys: set[str] = set()
    for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
        if key.tag not in (TEXT, MERGE):
            got = key.value if isinstance(key, yaml.ScalarNode) else f"a {key.id}"
            text = f"expected a text as a key, in quotes where it reads as more, got {got}"
            raise yaml.constructor.ConstructorError(None, None, text, key.start_mark)
        if key.value in keys and key.tag == TEXT:
            text = f"the key {key.value!r} is given twice"
            raise yaml.constructor.ConstructorError(None, None, text, key.start_mark)
        keys.add(key.value)
    for each in node.value:
        inner = each[1] if isinstance(node, yaml.MappingNode) else each
        _check_keys(inner, seen, (*above, id(node)))


def load(path: Path, settings: Sequence[str] = ()) -> Study:
    """The study in a file, with ``settings`` such as ``training.epochs=5`` put over it.

    Raises:
        StudyError: it cannot be read, a key is not known, or a value is not allowed.
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
    given: dict[tuple[str, ...], str] = {}
    for setting in settings:
        keys, value = _setting(setting)
        for place in _places(content, keys[0]):
            content = _put(content, (*place, *keys), value, setting)
        given[keys] = setting
    file = _File(path, node, given)
    made = file.typed(content)
    for place, block in enumerate(made.blocks):
        file.checked(block, ("blocks", place) if "blocks" in content else ())
        if made.tune is not None:
            file.searched(made.tune, block)
    for extra in ("wandb", "mlflow"):
        if getattr(made, extra) is not None and importlib.util.find_spec(extra) is None:
            text = f"it is not installed: pip install 'augbench[{extra}]', or leave it out"
            raise file.error((extra,), text)
    return made


def _setting(text: str) -> tuple[tuple[str, ...], Any]:
    key, sign, value = text.partition("=")
    keys = tuple(part.strip() for part in key.split("."))
    if not sign or not all(keys):
        raise StudyError(f"--set {text}: expected key=value, such as training.epochs=5")
    try:
        return keys, yaml.load(value, Loader=_Loader)
    except yaml.YAMLError as error:
        raise StudyError(f"--set {text}: the value cannot be read as YAML") from error


def _places(content: dict[str, Any], key: str) -> list[tuple[str, ...]]:
    """Where a key is set: at the top, and in each block that would else go before that."""
    blocks = content.get("blocks") if key in PRODUCT else None
    listed = blocks if isinstance(blocks, list) else []
    held = [place for place, block in enumerate(listed) if isinstance(block, dict) and key in block]
    return [(), *(("blocks", str(place)) for place in held)]


def _put(content: Any, keys: tuple[str, ...], value: Any, setting: str) -> Any:
    """A copy of a mapping or a list, with the value put in; anchors may share the original."""
    if not keys:
        return value
    key, *rest = keys
    if isinstance(content, list):
        if not key.isdigit() or int(key) >= len(content):
            raise StudyError(
                f"--set {setting}: expected a number from 0 to {len(content) - 1} in the place of "
                f"{key!r}, as the file has a list of {len(content)} there"
            )
        place = int(key)
        inner = _put(content[place], tuple(rest), value, setting)
        return [*content[:place], inner, *content[place + 1 :]]
    held = content if isinstance(content, dict) else {}
    if key.isdigit():
        raise StudyError(f"--set {setting}: the file has no list in which {key} could be a place")
    return {**held, key: _put(held.get(key), tuple(rest), value, setting)}


@dataclass(frozen=True, config={"arbitrary_types_allowed": True})
class _File:
    """A file with the lines of its keys, for errors."""

    path: Path
    node: yaml.MappingNode
    given: dict[tuple[str, ...], str]

    def typed(self, content: dict[str, Any]) -> Study:
        own = content.get("name", as_name(self.path.stem))
        product = {key: value for key, value in content.items() if key in PRODUCT}
        rest = {key: value for key, value in content.items() if key not in PRODUCT}
        unknown = [key for key in rest if key not in OF_STUDY and key != "name"]
        if unknown:
            raise self._unknown((str(unknown[0]),), (*PRODUCT, *OF_STUDY))
        listed = rest.pop("blocks", None)
        if listed is not None and (not isinstance(listed, list) or not listed):
            raise self.error(("blocks",), "expected a list of blocks", listed)
        where: list[Keys] = [()]
        blocks = [product]
        if listed is not None:
            where = [("blocks", place) for place in range(len(listed))]
            blocks = []
            for place, block in enumerate(listed):
                if not isinstance(block, dict):
                    raise self.error(("blocks", place), "expected a mapping", block)
                own_training = self._mapping(block, ("blocks", place), "training")
                training = {**self._mapping(product, (), "training"), **own_training}
                blocks.append({**product, **block, "training": training})
        made = tuple(
            self._made(Block, block, path) for block, path in zip(blocks, where, strict=True)
        )
        return self._made(Study, {**rest, "name": own, "blocks": made}, ())

    def _mapping(self, content: dict[str, Any], where: Keys, key: str) -> dict[str, Any]:
        found = content.get(key, {})
        if not isinstance(found, dict):
            raise self.error((*where, key), "expected a mapping", found)
        return found

    def _made(self, kind: type, content: Any, where: Keys) -> Any:
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
                raise self._unknown(path, known) from error
            text = first["msg"].removeprefix("Value error, ")
            key, colon, rest = text.partition(": ")  # a check of the whole names its key itself
            if colon and key in (*_fields(kind, first["loc"]), *(PRODUCT if kind is Study else ())):
                path, text = (*path, key), rest
            raise self.error(path, text, first["input"]) from error

    def _check_flags(self, content: dict[str, Any], made: Any, where: Keys) -> None:
        """Refuse true where a number is meant: pydantic would take it for 1."""
        for key, value in content.items():
            read = getattr(made, key)
            if isinstance(value, bool) and not isinstance(read, bool):
                raise self.error((*where, key), "expected a number", value)
            if isinstance(value, dict) and is_dataclass(read):
                self._check_flags(value, read, (*where, key))

    def checked(self, block: Block, where: Keys) -> None:
        """Refuse what only the rest of augbench can tell to be wrong."""
        known = runs.field_names(Training)
        for key in block.training:
            if key not in known:
                raise self._unknown((*where, "training", key), known)
        flags = {key for key in known if isinstance(getattr(Training(), key), bool)}
        for key, value in block.training.items():
            if isinstance(value, bool) and key not in flags:
                raise self.error((*where, "training", key), "expected a number", value)
        for key, check in checks(block):
            try:
                check()
            except methods.Unavailable:  # a row of the table that says why, not a slip
                continue
            except ValueError as error:
                raise StudyError(f"study {self.path}{self._line((*where, key))}: {error}") from None

    def searched(self, tune: Tune, block: Block) -> None:
        """Refuse a space that no row can search."""
        known = runs.field_names(Training)
        for key, space in tune.common.items():
            where = ("tune", "common", key)
            if key not in known:
                raise self._unknown(where, known)
            if key == "epochs":
                raise self.error(where, "expected none, as every trial has equal passes")
            try:
                for value in parameter(key, space).grid():
                    cells.training_of(block.preset, {**block.training, key: value})
            except NamingError as error:
                raise self.error(where, _less(str(error), key)) from error
        for name, spaces in tune.spaces.items():
            where = ("tune", "spaces", name)
            if name not in methods.registry():
                raise self._unknown(where, methods.registry())
            try:
                takes = arguments_of(methods.load(name))
            except methods.Unavailable:  # a row of the table that says why
                continue
            for key, space in spaces.items():
                if key not in takes:
                    raise self._unknown((*where, key), takes)
                try:
                    for value in parameter(key, space).grid():
                        convert(from_yaml(value), takes[key].annotation, key)
                except NamingError as error:
                    raise self.error((*where, key), _less(str(error), key)) from error

    def _unknown(self, path: Keys, known: Iterable[str]) -> StudyError:
        listed = sorted(known)
        name = str(path[-1])
        return StudyError(
            f"study {self.path}{self._line(path)}: unknown key {name!r}{nearest(name, listed)} "
            f"(known: {', '.join(listed)})"
        )

    def error(self, path: Keys, text: str, got: Any = None) -> StudyError:
        """What is wrong at a place of the file."""
        key = ".".join(str(part) for part in path if not isinstance(part, int))
        shown = f", got {got!r}" if isinstance(got, str | int | float | bool | list) else ""
        shown = "" if ", got " in text else shown
        return StudyError(
            f"study {self.path}{self._line(path)}: {key + ': ' if key else ''}{text}{shown}"
        )

    def _line(self, path: Keys) -> str:
        """``, line 12``: of the deepest part of the path that the file has."""
        told = tuple(map(str, path))
        for setting_path, setting in self.given.items():
            inner = told[2:] if told[:1] == ("blocks",) and setting_path[0] in PRODUCT else told
            if setting_path == inner[: len(setting_path)]:
                return f", --set {setting}"
        node: yaml.Node = self.node
        mark = node.start_mark
        for place, part in enumerate(path):
            found = _inner(node, part)
            if found is None and place >= 2 and path[0] == "blocks":  # told at the top of the file
                return self._line(path[place:])
            if found is None:
                break
            mark, node = found
        return f", line {mark.line + 1}"


def _less(text: str, key: str) -> str:
    """An error without the key, which the place in the file tells."""
    return text.removeprefix("tune: ").removeprefix(f"{key}: ")


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
    """The keys that are known at a place below a dataclass."""
    inner = {"resources": Resources, "tune": Tune, "asha": Asha}
    named = [part for part in path if part in inner]
    return runs.field_names(inner[str(named[-1])] if named else kind)
