"""Which runs are outdated, because later runs made the same row with another version of its code.

A row is everything that determines its numbers except the seed and ``Run.versions``. Its newest
version is that of the run that ended last or, if none has ended, of the run that was started last.
A row without a run of the newest code on a data set keeps its runs there: nothing replaced them.
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
    """how many runs of which rows are left out; empty if none are"""


class _Made(NamedTuple):
    folder: Path
    row: tuple[object, ...]
    version: tuple[object, ...]
    ended: bool
    when: tuple[float, float]


def newest(
    found: Sequence[Record],
    unread: Sequence[Unread],
    keep_all: bool = False,
    option: str = "--all-versions",
) -> Newest:
    """The runs of the newest version of each row, or all runs; ``option`` is how to get them."""
    old = set() if keep_all else outdated(found, unread)
    left = Counter(
        each.run.row for each in (*found, *unread) if each.run is not None and each.folder in old
    )
    note = ""
    if left:
        rows = ", ".join(f"{row} ({count})" for row, count in sorted(left.items()))
        note = f"Runs of older versions are left out: {rows}. {option} shows them."
    return Newest(
        [each for each in found if each.folder not in old],
        [each for each in unread if each.folder not in old],
        note,
    )


def outdated(found: Sequence[Record], unread: Sequence[Unread]) -> set[Path]:
    """The directories of the runs that are superseded by a newer version of their row."""
    epochs = {each.run.id: each.run.training.epochs for each in found}
    made = [_made(each, each.run, epochs, each.result.get("finished", "")) for each in found]
    made += [_made(each, each.run, epochs) for each in unread if each.run is not None]
    latest: dict[tuple[object, ...], _Made] = {}
    for each in sorted(made, key=lambda each: (each.ended, each.when)):
        latest[each.row] = each
    return {
        each.folder
        for each in made
        if each.version != latest[each.row].version and each.when <= latest[each.row].when
    }


def _made(
    record: Record | Unread, run: Run, epochs: dict[str, int], finished: str | None = None
) -> _Made:
    """``finished`` is the time in the result of a run that has ended; it may be empty."""
    ended = finished is not None
    changed = _changed(record.folder / ("result.json" if ended else "run.json"))
    try:
        when = datetime.fromisoformat(finished or "").timestamp()
    except (TypeError, ValueError):  # not recorded
        when = changed
    row = tuple(getattr(run, name) for name in ROW)
    training, version = run.training, tuple(sorted(run.versions.items()))
    base = None if run.budget == "steps" else epochs.get(record.recorded.get("of") or "")
    if base is not None:  # an equal budget depends on the version of the method that sets it
        training, version = replace(training, epochs=base), (*version, training.epochs)
    return _Made(record.folder, (*row, training), version, ended, (when, changed))


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except (FileNotFoundError, NotADirectoryError):  # deleted meanwhile, or in a records file
        return 0.0
