"""What a study asks, written before its first run and kept beside its runs.

Question, family, margin and prediction are the same keys of the same study file, whether a person
wrote it for ``augbench sweep`` or the sweep left it beside the runs.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from analysis.records import Record, Unread
from analysis.runs import folders, row_name, row_parts
from methods.naming import Call, Links, NamingError, call_of, nearest, parse, render, written_out

FILES = ("study.yaml", "study.yml", "study.json")
STUDIES = "studies"
"""Folder beside the runs: of each study that was swept there, a folder of its name."""
OVER = " over "
MARGIN = 0.5


class QuestionError(ValueError):
    """A study file that cannot be used; the message names it and what is expected."""


@dataclass(frozen=True)
class Prediction:
    """A prediction as a sweep has found it in the study's file."""

    text: str
    written: str
    """day on which it was found there"""
    runs: int
    """of the study, that were done then"""

    @property
    def when(self) -> str:
        """``on 2026-11-20, before the first run``."""
        done = f"after {self.runs} run(s)" if self.runs else "before the first run"
        return f"on {self.written}, {done}"


@dataclass(frozen=True)
class Question:
    """Question, family of comparisons, margin and prediction of a study."""

    text: str = ""
    family: tuple[tuple[str, str], ...] = ()
    """(row, the row that it is compared with; empty: its own baseline); empty: every method"""
    margin: float = MARGIN
    """points within which two rows count as equal"""
    prediction: str = ""
    """of several the first"""
    source: str = ""
    """name of the file; empty where there is none"""
    runs: frozenset[str] = frozenset()
    """ids of the runs that are the study's own; empty: all that are there"""
    predictions: tuple[Prediction, ...] = ()
    """the prediction with its date, and what the file said later"""

    @property
    def predicted(self) -> str:
        """The prediction, with what is known of when it was written and whether it was changed."""
        if not self.predictions:
            return self.prediction
        first, *later = self.predictions
        told = [f"{first.text} (written {first.when})"]
        return " ".join(told + [f"Changed {each.when}, to: {each.text}" for each in later])

    def own(
        self, found: Sequence[Record], unread: Sequence[Unread]
    ) -> tuple[list[Record], list[Unread]]:
        """Of the runs in a folder those that are the study's own."""
        return (
            [each for each in found if not self.runs or each.run.id in self.runs],
            [each for each in unread if not self.runs or each.folder.name in self.runs],
        )

    def missing(self, found: Sequence[Record], unread: Sequence[Unread]) -> int:
        """How many of the study's own runs have no result yet, begun or not."""
        ended = {each.run.id for each in found}
        damaged = {each.folder.name for each in unread if (each.folder / "result.json").exists()}
        return len(self.runs - ended - damaged)


def names(root: Path) -> list[str]:
    """The studies that were swept into a folder of runs."""
    return sorted(path.parent.name for path in root.glob(f"{STUDIES}/*/{FILES[0]}"))


def as_name(stem: str) -> str:
    """A study's name from that of its file."""
    return re.sub(r"[^\w.-]+", "-", stem).lstrip("-.") or "study"


def name_in(path: Path) -> str:
    """The name of the study in a study file.

    Raises:
        QuestionError: the file cannot be read, or the name is no text.
    """
    return _text(path, _content(path), "name") or as_name(path.stem)


def read(root: Path, study: str = "") -> Question:
    """What the runs in a folder ask; without a study file the default question.

    Of a ``study`` that was swept there it is that study's, with the runs that are its own. Else it
    is that of the file ``study.yaml`` beside the runs, or of the only study that was swept there,
    if no other runs are there.
    The keys question, family, margin and prediction are read. An entry of the family is a row,
    which is meant against its own baseline, or ``row over base``.

    Raises:
        QuestionError: the file cannot be read, or a value is of the wrong kind.
    """
    swept = names(root)
    if study and study not in swept:
        raise QuestionError(
            f"study: no study {study!r} was swept into {root}{nearest(study, swept)} "
            f"(there are: {', '.join(swept) or 'none'})"
        )
    own = [root / name for name in FILES if (root / name).is_file()]
    if own and not study:
        path = own[0]
    elif study or len(swept) == 1:
        path = root / STUDIES / (study or swept[0]) / FILES[0]
    else:
        return Question()
    content = _content(path)
    ids = _ids(path, content) if not own or study else frozenset()
    if ids and not study and not ids.issuperset(folder.name for folder in folders(root)):
        return Question()  # what is asked of some runs is not asked of the others
    predictions = _predictions(path, content)
    return Question(
        text=_text(path, content, "question"),
        family=tuple(_pair(path, entry) for entry in _entries(path, content)),
        margin=_margin(path, content.get("margin", MARGIN)),
        prediction=predictions[0].text if predictions else _text(path, content, "prediction"),
        predictions=predictions,
        source=str(path.relative_to(root)),
        runs=ids,
    )


def _content(path: Path) -> Mapping[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise QuestionError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from error
    if not isinstance(content, Mapping):
        raise QuestionError(f"{path}: expected a mapping with question, family, margin, prediction")
    return content


def _text(path: Path, content: Mapping[str, Any], name: str) -> str:
    value = content.get(name, "")
    if not isinstance(value, str):
        raise QuestionError(f"{path}: {name}: expected a text, got {value!r}")
    return value.strip()


def _predictions(path: Path, content: Mapping[str, Any]) -> tuple[Prediction, ...]:
    try:
        found = tuple(Prediction(**each) for each in content.get("predictions", ()))
        if all(isinstance(each.text, str) and each.runs >= 0 for each in found):
            return found
    except TypeError:
        pass
    raise QuestionError(f"{path}: predictions: expected those that a sweep has written there")


def _margin(path: Path, value: Any) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value < math.inf:
        raise QuestionError(f"{path}: margin: expected points of 0 or more, got {value!r}")
    return float(value)


def _entries(path: Path, content: Mapping[str, Any]) -> tuple[str, ...]:
    try:
        return written_out(content.get("family", []))
    except NamingError as error:
        raise QuestionError(f"{path}: family: {error}") from error


def _ids(path: Path, content: Mapping[str, Any]) -> frozenset[str]:
    value = content.get("runs", [])
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise QuestionError(f"{path}: runs: expected a list of ids, got {value!r}")
    return frozenset(value)


def _pair(path: Path, entry: str) -> tuple[str, str]:
    try:
        return comparison(entry)
    except NamingError as error:
        raise QuestionError(f"{path}: family: {error}") from error


def comparison(entry: str) -> tuple[str, str]:
    """Row and base of an entry of a family; the base is empty where the row's own is meant.

    Raises:
        NamingError: one of them is no name.
    """
    row, over, base = entry.partition(OVER)
    return written(row), written(base) if over else ""


def written(row: str) -> str:
    """A row's name as runs have it: ``saflex(preset=stable, upstream=mixup)@train``, or with an
    equal budget ``none [passes of saflex]``.

    Spaces and the order of arguments do not count; what is a default or a preset is not known here.
    """
    method, control, budget = row_parts(row)
    kind, of, costly = budget.partition(" of ")
    budget = kind + of + (render(_in_order(parse(costly))) if costly else "")
    return row_name(render(_in_order(parse(method))), control, budget)


def _in_order(value: Any) -> Any:
    if isinstance(value, Links):
        return Links(tuple(_in_order(call) for call in value.calls))
    if isinstance(value, Call):
        return call_of(value.name, {name: _in_order(each) for name, each in value.arguments})
    return value
