"""What a study asks, written before its first run and stored with its runs.

Question, family, margin and prediction are keys of a study file, whether a person wrote it for
``augbench sweep`` or the sweep stored it with the runs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator
from pydantic.dataclasses import dataclass as checked

from analysis import labels, studyfile
from analysis.numbers import count
from analysis.records import Record, Unread
from analysis.runs import CONFIG, field_names, folders, row_name, row_parts
from analysis.studyfile import StudyError
from methods.naming import Call, Links, NamingError, call_of, nearest, parse, render, written_out

FILE = "study.yaml"
STUDIES = "studies"
"""Folder beside the runs, with a folder for each study that was swept there."""
OVER = " over "
OR = " or "
"""Between rows of which the one with the best select AUC is the base."""
MARGIN = 0.5


def _comparisons(value: tuple[str, ...]) -> tuple[str, ...]:
    for entry in value:
        comparison(entry)
    return value


def _distinct(value: dict[str, str]) -> dict[str, str]:
    for name, label in value.items():
        if not label.strip():
            raise ValueError(f"expected a label for {name}, got none")
        if OR in label or OVER in label:
            raise ValueError(f"expected a label without {OR!r} and {OVER!r}, got {label!r}")
    labels.check(((label.strip(), name) for name, label in value.items()), where="")
    return {name.strip(): label.strip() for name, label in value.items()}


Family = Annotated[tuple[str, ...], BeforeValidator(written_out), AfterValidator(_comparisons)]
ByName = Annotated[dict[str, str], AfterValidator(_distinct)]


@checked(frozen=True, kw_only=True, config=CONFIG)
class Asked:
    """What a study asks: these keys of its file."""

    question: str = ""
    family: Family = ()
    """comparisons tested together: a row (against its own base), ``row over base``, or ``row over
    one or other``, against the one with the better select AUC"""
    margin: float = MARGIN
    """points of accuracy within which two rows count as equal"""
    prediction: str = ""
    """written before the first run"""
    labels: ByName = field(default_factory=dict)
    """short names of rows and benchmarks, for tables and figures"""

    def __post_init__(self) -> None:
        if not 0 <= self.margin < math.inf:
            raise ValueError(f"margin: expected points of 0 or more, got {self.margin:g}")


@dataclass(frozen=True)
class Prediction:
    """A prediction as a sweep found it in the study's file."""

    text: str
    written: str
    """day on which it was found there"""
    runs: int
    """of the study that were done by then"""

    @property
    def when(self) -> str:
        """``on 2026-11-20, before the first run``."""
        done = f"after {count(self.runs, 'run')}" if self.runs else "before the first run"
        return f"on {self.written}, {done}"


@checked(frozen=True, kw_only=True, config=CONFIG)
class _Kept(Asked):
    """The content of the file that a sweep stores with its runs."""

    predictions: tuple[Prediction, ...] = ()
    runs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Question:
    """Question, family of comparisons, margin and prediction of a study."""

    text: str = ""
    family: tuple[tuple[str, str], ...] = ()
    """(row, the row that it is compared with; empty: its own base); empty: every method"""
    margin: float = MARGIN
    """points within which two rows count as equal"""
    prediction: str = ""
    """if there are several, the first"""
    source: str = ""
    """name of the file; empty if there is none"""
    runs: frozenset[str] = frozenset()
    """ids of the study's own runs; empty: all in the folder"""
    predictions: tuple[Prediction, ...] = ()
    """the prediction with its date, and later versions"""
    labels: Mapping[str, str] = field(default_factory=dict)
    """short names of rows and data sets, by the names that runs have"""

    @property
    def predicted(self) -> str:
        """The prediction, with when it was written and whether it was changed, if known."""
        if not self.predictions:
            return self.prediction
        first, *later = self.predictions
        told = [f"{first.text} (written {first.when})"]
        return " ".join(told + [f"Changed {each.when}, to: {each.text}" for each in later])

    def own(
        self, found: Sequence[Record], unread: Sequence[Unread]
    ) -> tuple[list[Record], list[Unread]]:
        """The study's own runs among those in a folder."""
        return (
            [each for each in found if not self.runs or each.run.id in self.runs],
            [each for each in unread if not self.runs or each.folder.name in self.runs],
        )

    def missing(self, found: Sequence[Record], unread: Sequence[Unread]) -> int:
        """How many of the study's own runs have no result yet, started or not."""
        ended = {each.run.id for each in found}
        damaged = {each.folder.name for each in unread if (each.folder / "result.json").exists()}
        return len(self.runs - ended - damaged)


def names(root: Path) -> list[str]:
    """The studies that were swept into a folder of runs."""
    return sorted(path.parent.name for path in root.glob(f"{STUDIES}/*/{FILE}"))


def covers(root: Path, asked: Question, options: str) -> str:
    """A note if runs of studies are mixed with others, and how to choose; may be empty."""
    swept = names(root)
    if not swept or asked.runs:
        return ""
    return (
        f"All runs in the folder are included, whether they belong to a study "
        f"({', '.join(swept)}) or not. To choose: {options}."
    )


def as_name(stem: str) -> str:
    """A study's name from the name of its file."""
    return re.sub(r"[^\w.-]+", "-", stem).lstrip("-.") or "study"


def name_in(path: Path) -> str:
    """The name of the study in a study file.

    Raises:
        StudyError: the file cannot be read, or the name is not a string.
    """
    file = studyfile.read(path)
    name = file.content.get("name", as_name(path.stem))
    if not isinstance(name, str):
        raise file.error(("name",), "expected a string", name)
    return name


def read(root: Path, study: str = "") -> Question:
    """The question of the runs in a folder; without a study file the default question.

    For a ``study`` that was swept there, it is that study's, with its own runs. Otherwise it comes
    from the file ``study.yaml`` beside the runs, or from the only study that was swept there, if
    there are no other runs.
    The keys question, family, margin and prediction are read. An entry of the family is a row,
    to be compared with its own base, or ``row over base``.

    Raises:
        StudyError: the file cannot be read, or a value has the wrong type.
    """
    swept = names(root)
    if study and study not in swept:
        raise StudyError(
            f"study: no study {study!r} in {root}{nearest(study, swept)} "
            f"(there are: {', '.join(swept) or 'none'})"
        )
    own = root / FILE
    if own.is_file() and not study:
        path = own
    elif study or len(swept) == 1:
        path = root / STUDIES / (study or swept[0]) / FILE
    else:
        return Question()
    file = studyfile.read(path)
    known = field_names(_Kept)
    kept = file.made(_Kept, {key: file.content[key] for key in known if key in file.content})
    ids = frozenset(kept.runs) if path != own else frozenset[str]()
    if ids and not study and not ids.issuperset(folder.name for folder in folders(root)):
        return Question()  # the question is not about the other runs
    first = kept.predictions[0].text if kept.predictions else kept.prediction
    return Question(
        text=kept.question.strip(),
        family=tuple(map(comparison, kept.family)),
        margin=kept.margin,
        prediction=first.strip(),
        predictions=kept.predictions,
        labels={as_written(name): label for name, label in kept.labels.items()},
        source=str(path.relative_to(root)),
        runs=ids,
    )


def comparison(entry: str) -> tuple[str, str]:
    """Row and base of an entry of a family; the base is empty if it is the row's own.

    Several rows joined by "or" are a base chosen on the select split.

    Raises:
        NamingError: one of them is not a name.
    """
    row, over, base = entry.partition(OVER)
    return written(row), OR.join(map(written, base.split(OR))) if over else ""


def as_written(name: str) -> str:
    """The name that runs have for a row or benchmark; text that is not a name is unchanged."""
    try:
        return written(name)
    except NamingError:
        return name


def written(row: str) -> str:
    """A row's name as runs have it: ``saflex(preset=stable, upstream=mixup)@train``, or with an
    equal budget ``none [passes of saflex]``.

    Spaces and the order of arguments do not matter; defaults and presets are not known here.
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
