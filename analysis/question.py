"""What a study asks, written before its first run and kept beside its runs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from methods.naming import NamingError, from_mapping, parse, render, split

FILES = ("study.yaml", "study.yml", "study.json")
OVER = " over "
MARGIN = 0.5


class QuestionError(ValueError):
    """A study file that cannot be used; the message names it and what is expected."""


@dataclass(frozen=True)
class Question:
    """Question, family of comparisons, margin and prediction of a study."""

    text: str = ""
    family: tuple[tuple[str, str], ...] = ()
    """(row, the row that it is compared with; empty: its own baseline); empty: every method"""
    margin: float = MARGIN
    """points within which two rows count as equal"""
    prediction: str = ""
    source: str = ""
    """name of the file; empty where there is none"""


def read(root: Path) -> Question:
    """The question in the study file of a folder of runs; the default one where there is none.

    The keys question, family, margin and prediction are read, all others are somebody else's. An
    entry of the family is a row, or ``row over base``.

    Raises:
        QuestionError: the file cannot be read, or a value is of the wrong kind.
    """
    there = [root / name for name in FILES if (root / name).is_file()]
    if not there:
        return Question()
    path = there[0]
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise QuestionError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from error
    if not isinstance(content, Mapping):
        raise QuestionError(f"{path}: expected a mapping with question, family, margin, prediction")
    return Question(
        text=_text(path, content, "question"),
        family=tuple(_pair(path, entry) for entry in _entries(path, content)),
        margin=_margin(path, content.get("margin", MARGIN)),
        prediction=_text(path, content, "prediction"),
        source=path.name,
    )


def _text(path: Path, content: Mapping[str, Any], name: str) -> str:
    value = content.get(name, "")
    if not isinstance(value, str):
        raise QuestionError(f"{path}: {name}: expected a text, got {value!r}")
    return value.strip()


def _margin(path: Path, value: Any) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value < math.inf:
        raise QuestionError(f"{path}: margin: expected points of 0 or more, got {value!r}")
    return float(value)


def _entries(path: Path, content: Mapping[str, Any]) -> list[str]:
    value = content.get("family", [])
    listed = split(value) if isinstance(value, str) else value
    if not isinstance(listed, list) or not all(isinstance(each, str | dict) for each in listed):
        raise QuestionError(f"{path}: family: expected a list of rows, got {value!r}")
    try:
        return [each if isinstance(each, str) else render(from_mapping(each)) for each in listed]
    except NamingError as error:
        raise QuestionError(f"{path}: family: {error}") from error


def _pair(path: Path, entry: str) -> tuple[str, str]:
    row, over, base = entry.partition(OVER)
    try:
        return written(row), written(base) if over else ""
    except NamingError as error:
        raise QuestionError(f"{path}: family: {error}") from error


def written(row: str) -> str:
    """A row's name with the spacing that runs have: ``saflex(upstream=mixup)@train``."""
    name, at, control = row.strip().partition("@")
    return render(parse(name)) + at + control.strip()
