"""Reads a study file and applies the settings of the command."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import methods
from analysis import runs, studyfile
from analysis.question import as_name
from analysis.runs import Training
from analysis.studyfile import Keys, StudyError, StudyFile
from benchmarks.studies import cells
from benchmarks.studies.plan import checks
from benchmarks.studies.schema import (
    OF_STUDY,
    PRODUCT,
    SPELLED,
    WHOLE,
    Block,
    Study,
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


def load(path: Path, settings: Sequence[str] = (), tier: str = WHOLE) -> Study:
    """The study in a file, overridden by ``settings`` such as ``training.epochs=5``.

    Raises:
        StudyError: an unreadable file, an unknown key, or an invalid value.
        NamingError: the tier is unknown or empty.
    """
    read = studyfile.read(path)
    content = read.content
    given: dict[tuple[str, ...], str] = {}
    for setting in settings:
        keys, value = _setting(setting)
        for place in _places(content, keys[0]):
            content = _put(content, (*place, *keys), value, setting)
        given[keys] = setting
    file = _File(path, content, read.node, PRODUCT, given)
    made = file.typed()
    for place, block in enumerate(made.blocks):
        file.checked(block, ("blocks", place) if "blocks" in content else ())
        if made.tune is not None:
            file.searched(made.tune, block)
    for extra in ("wandb", "mlflow"):
        if getattr(made, extra) is not None and importlib.util.find_spec(extra) is None:
            text = f"it is not installed: pip install 'augbench[{extra}]', or leave it out"
            raise file.error((extra,), text)
    if not settings:  # they may have replaced rows that a tier names
        file.check_tiers(made)
    return made.of_tier(tier)


def _setting(text: str) -> tuple[tuple[str, ...], Any]:
    key, sign, value = text.partition("=")
    keys = tuple(part.strip() for part in key.split("."))
    if not sign or not all(keys):
        raise StudyError(f"--set {text}: expected key=value, such as training.epochs=5")
    try:
        return keys, studyfile.value_of(value)
    except StudyError as error:
        raise StudyError(f"--set {text}: {error}") from error


def _places(content: dict[str, Any], key: str) -> list[tuple[str, ...]]:
    """Where a key is set: at the top, and in each block that would override it."""
    blocks = content.get("blocks") if key in PRODUCT else None
    listed = blocks if isinstance(blocks, list) else []
    held = [place for place, block in enumerate(listed) if isinstance(block, dict) and key in block]
    return [(), *(("blocks", str(place)) for place in held)]


def _put(content: Any, keys: tuple[str, ...], value: Any, setting: str) -> Any:
    """A copy of a mapping or list with the value set; YAML anchors may share the original."""
    if not keys:
        return value
    key, *rest = keys
    if isinstance(content, list):
        if not key.isdigit() or int(key) >= len(content):
            raise StudyError(
                f"--set {setting}: expected a number from 0 to {len(content) - 1} instead of "
                f"{key!r}, because the file has a list of {len(content)} there"
            )
        place = int(key)
        inner = _put(content[place], tuple(rest), value, setting)
        return [*content[:place], inner, *content[place + 1 :]]
    held = content if isinstance(content, dict) else {}
    if key.isdigit():
        raise StudyError(
            f"--set {setting}: expected a key, got {key}, as the file has no list there"
        )
    return {**held, key: _put(held.get(key), tuple(rest), value, setting)}


@dataclass(frozen=True)
class _File(StudyFile):
    """A study file as a sweep reads it."""

    def typed(self) -> Study:
        content = self.content
        own = content.get("name", as_name(self.path.stem))
        product = {key: value for key, value in content.items() if key in PRODUCT}
        rest = {key: value for key, value in content.items() if key not in PRODUCT}
        unknown = [key for key in rest if key not in OF_STUDY and key != "name"]
        if unknown:
            raise self.unknown((str(unknown[0]),), (*PRODUCT, *OF_STUDY))
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
            self.made(Block, block, path) for block, path in zip(blocks, where, strict=True)
        )
        return self.made(Study, {**rest, "name": own, "blocks": made}, ())

    def _mapping(self, content: dict[str, Any], where: Keys, key: str) -> dict[str, Any]:
        found = content.get(key, {})
        if not isinstance(found, dict):
            raise self.error((*where, key), "expected a mapping", found)
        return found

    def checked(self, block: Block, where: Keys) -> None:
        """Refuse errors that only the rest of augbench can detect."""
        known = runs.field_names(Training)
        for key in block.training:
            if key not in known:
                raise self.unknown((*where, "training", key), known)
        flags = {key for key in known if isinstance(getattr(Training(), key), bool)}
        for key, value in block.training.items():
            if isinstance(value, bool) and key not in flags:
                raise self.error((*where, "training", key), "expected a number", value)
        for key, check in checks(block):
            try:
                check()
            except methods.Unavailable:  # no error: its row in the table gives the reason
                continue
            except ValueError as error:
                raise StudyError(f"study {self.path}{self.line((*where, key))}: {error}") from None

    def check_tiers(self, made: Study) -> None:
        """Refuse a tier with a name that no block has."""
        for name, tier in made.tiers.items():
            for key in SPELLED:
                try:
                    found = tier.unknown(key, made.blocks)
                except NamingError as error:
                    raise self.error(("tiers", name, key), str(error)) from error
                if found:
                    got, known = found
                    text = f"expected a name from a block of the file, got {got!r}"
                    raise self.error(("tiers", name, key), text + nearest(got, known))

    def searched(self, tune: Tune, block: Block) -> None:
        """Refuse a space that no row can search."""
        known = runs.field_names(Training)
        for key, space in tune.common.items():
            where = ("tune", "common", key)
            if key not in known:
                raise self.unknown(where, known)
            if key == "epochs":
                raise self.error(where, "expected none, because all trials have equal passes")
            try:
                for value in parameter(key, space).grid():
                    cells.training_of(block.preset, {**block.training, key: value})
            except NamingError as error:
                raise self.error(where, _less(str(error), key)) from error
        for name, spaces in tune.spaces.items():
            where = ("tune", "spaces", name)
            if not methods.known(name):
                raise self.unknown(where, methods.registry())
            try:
                takes = arguments_of(methods.load(name))
            except methods.Unavailable:  # its row in the table gives the reason
                continue
            for key, space in spaces.items():
                if key not in takes:
                    raise self.unknown((*where, key), takes)
                try:
                    for value in parameter(key, space).grid():
                        convert(from_yaml(value), takes[key].annotation, key)
                except NamingError as error:
                    raise self.error((*where, key), _less(str(error), key)) from error


def _less(text: str, key: str) -> str:
    """An error without the key, which the position in the file already shows."""
    return text.removeprefix("tune: ").removeprefix(f"{key}: ")
