"""Which runs are outdated: later runs made the same row with another version of its code.

A row is what decides a number but for the seed and ``Run.versions``. Its newest version is that of
the run that ended last; where none has ended, that of the run that was begun last. A row that has
no run of the newest code on a data set keeps its runs there: they have not been replaced.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from analysis.records import Record, Unread
from analysis.runs import Run, field_names

ROW = tuple(name for name in field_names(Run) if name not in ("seed", "versions", "training"))
"""Fields of a run that tell rows apart, their training aside."""


class Newest(NamedTuple):
    """The runs of a folder without the outdated ones."""

    found: list[Record]
    unread: list[Unread]
    note: str
    """how many runs of which rows are left out; empty where none is"""


class _Made(NamedTuple):
    folder: Path
    row: tuple[object, ...]
    version: tuple[object, ...]
    ended: bool
    when: tuple[float, float]


def newest(found: Sequence[Record], unread: Sequence[Unread], keep_all: bool = False) -> Newest:
    """The runs of the newest version of each row, or all of them."""
    old = set() if keep_all else outdated(found, unread)
    left = Counter(
        each.run.row for each in (*found, *unread) if each.run is not None and each.folder in old
    )
    note = ""
    if left:
        rows = ", ".join(f"{row} ({count})" for row, count in sorted(left.items()))
        note = (
            f"{left.total()} run(s) of older versions are left out: {rows}. "
            "--all-versions shows them."
        )
    return Newest(
        [each for each in found if each.folder not in old],
        [each for each in unread if each.folder not in old],
        note,
    )


def outdated(found: Sequence[Record], unread: Sequence[Unread]) -> set[Path]:
    """The directories of the runs that a newer version of their row has replaced."""
    epochs = {each.run.id: each.run.training.epochs for each in found}
    made = [_ended(each, epochs) for each in found]
    made += [_unended(each, each.run) for each in unread if each.run is not None]
    latest: dict[tuple[object, ...], _Made] = {}
    for each in sorted(made, key=lambda each: (each.ended, each.when)):
        latest[each.row] = each
    return {
        each.folder
        for each in made
        if each.version != latest[each.row].version and each.when <= latest[each.row].when
    }


def _ended(record: Record, epochs: dict[str, int]) -> _Made:
    run, file = record.run, record.folder / "result.json"
    # The epochs of an equal budget follow from the version of the method whose budget it is.
    budget = None if run.budget == "steps" else epochs.get(record.recorded.get("of") or "")
    changed = file.stat().st_mtime
    try:
        when = datetime.fromisoformat(record.result["finished"]).timestamp()
    except (KeyError, TypeError, ValueError):  # not recorded
        when = changed
    return _made(run, record.folder, budget, True, (when, changed))


def _unended(unread: Unread, run: Run) -> _Made:
    begun = (unread.folder / "run.json").stat().st_mtime
    return _made(run, unread.folder, None, False, (begun, begun))


def _made(
    run: Run, folder: Path, budget: int | None, ended: bool, when: tuple[float, float]
) -> _Made:
    row = tuple(getattr(run, name) for name in ROW)
    training, versions = run.training, tuple(sorted(run.versions.items()))
    if budget is None:
        return _Made(folder, (*row, training), (*versions,), ended, when)
    base = replace(training, epochs=budget)
    return _Made(folder, (*row, base), (*versions, training.epochs), ended, when)
