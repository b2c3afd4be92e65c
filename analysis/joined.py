"""Runs from several places in one report or table: results folders, packs and records files.

Runs are either pooled, as if they had been made in one folder, or joined: then they are shown
beside a folder's own runs where the two can be compared, and nothing else of them is.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from analysis import blocks, packing, records, recordsfile, runs, versions
from analysis.differences import RowRuns
from analysis.numbers import count
from analysis.records import Record, Unread

RECORDS = ".parquet"
DATA_SET = "data set "
MOST = 5
"""Names that a sentence lists; of more it gives the number."""


class Source(NamedTuple):
    """The runs of one place."""

    path: Path
    found: list[Record]
    unread: list[Unread]


@contextmanager
def opened(paths: Sequence[Path]) -> Iterator[list[Source]]:
    """The runs of results folders, packs and records files; packs are unpacked for the meantime.

    Raises:
        OSError: a path does not exist or is none of these; PackError where a pack is damaged.
    """
    with tempfile.TemporaryDirectory(prefix="augbench-") as temporary:
        yield [
            _source(path.expanduser(), Path(temporary) / str(place))
            for place, path in enumerate(paths)
        ]


def _source(path: Path, temporary: Path) -> Source:
    if path.is_dir():
        return Source(path, *records.scan(path))
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: expected a results folder, a pack or a records.parquet, found nothing"
        )
    if path.suffix == RECORDS:
        return Source(path, recordsfile.read(path), [])
    temporary.mkdir()
    packing.extract(packing.packs([path])[0], temporary)
    return Source(path, *records.scan(temporary))


def pooled(sources: Sequence[Source]) -> tuple[list[Record], list[Unread], list[str]]:
    """Every run once, what has no result, and remarks on runs that are in several places.

    A run with metrics takes precedence over one without, then the place named first.
    """
    kept: dict[str, Record] = {}
    twice: list[str] = []
    differ: list[str] = []
    for source in sources:
        for record in source.found:
            name = record.run.id
            if name not in kept:
                kept[name] = record
                continue
            other = kept[name]
            twice.append(name)
            if record.done and other.done and not _agree(record, other):
                differ.append(f"{record.run.row}, seed {record.run.seed} ({name})")
            if record.done and not other.done:
                kept[name] = record
    told = []
    if twice:
        told.append(f"{count(len(set(twice)), 'run')} in several places: the first is used.")
    if differ:
        told.append(f"Their results differ: {_listed(differ)}.")
    unread = [
        each
        for source in sources
        for each in source.unread
        if each.run is None or each.run.id not in kept
    ]
    return list(kept.values()), unread, told


def _agree(one: Record, other: Record) -> bool:
    first, second = (runs.to_json(each.result["metrics"]) for each in (one, other))
    return first == second


def beside(
    own: Sequence[Record],
    sources: Sequence[Source],
    all_versions: bool = False,
    wanted: Callable[[Record], bool] = lambda record: True,
) -> tuple[list[Record], list[str]]:
    """The runs of the sources that can be compared with our own, and in words what was joined.

    A run is joined if one of ours is on the same data set with the same data, network, protocol,
    training and code of the trainer; it may come from another device and release. Runs that are
    among ours are left out silently.
    """
    ours = [each for each in own if not each.searched]
    places = _places(ours)
    known = {each.run.id for each in ours}
    joined: list[Record] = []
    told: list[str] = []
    for source in sources:
        plain = [e for e in source.found if e.done and not e.searched and wanted(e)]
        found, _, older = versions.newest(plain, source.unread, all_versions)
        theirs = _places(found)
        kept, left = [], Counter[str]()
        for record in found:
            reason = _unlike(theirs[record.run.id], places.values())
            if reason:
                left[reason] += 1
            elif record.run.id not in known:
                known.add(record.run.id)
                kept.append(replace(record, origin=source.path.name))
        joined += kept
        told += _told(source, kept, left, ours, older)
    return joined, told


def rows_beside(
    rows: Sequence[RowRuns], sources: Sequence[Source]
) -> tuple[list[RowRuns], list[str]]:
    """The rows of a table on one data set with those of the sources, and what was joined.

    Control rows are joined only to rows of the same name. Seeds of a row that is there already are
    added to it if they come from the same device and release, else left out.
    """
    own = [record for row in rows for record in row.records]
    made = {row.name: row for row in rows}

    def wanted(record: Record) -> bool:
        return record.facts.kind != "control" or record.run.row in made

    more, told = beside(own, sources, wanted=wanted) if own else ([], [])
    more.sort(key=lambda each: (bool(each.facts.wraps), each.run.row, each.run.seed))
    apart = dict[str, None]()
    for record in more:
        name = record.run.row
        there = made.get(name)
        if there is None or not there.records:
            made[name] = RowRuns(name, record.facts.upstream, (record,))
        elif blocks.machine_of(there.records[0]) == blocks.machine_of(record):
            made[name] = replace(there, records=(*there.records, record))
        else:
            apart[name] = None
    if apart:
        told.append(f"Shown without runs from another device or release: {_listed(list(apart))}.")
    return list(made.values()), told


class _Place(NamedTuple):
    """What two runs must share to be compared, from what is told first."""

    data_set: str
    data: str
    shared: tuple[tuple[str, str], ...]
    training: runs.Training


def _places(found: Sequence[Record]) -> dict[str, _Place]:
    steps = [each for each in found if each.run.budget == "steps"]
    by_id = {each.run.id: each for each in found}
    return {
        each.run.id: _Place(
            blocks.column_of(each),
            each.run.data,
            blocks.shared_by(each),
            blocks.base_training(each, steps, by_id),
        )
        for each in found
    }


def _unlike(place: _Place, others: Iterable[_Place]) -> str:
    """What sets a run apart from all of ours; empty if nothing does."""
    left = [each for each in others if each.data_set == place.data_set]
    if not left:
        return f"{DATA_SET}{place.data_set}"
    left = [each for each in left if each.data == place.data]
    if not left:
        return f"other data under the name {place.data_set}"
    for number, (name, value) in enumerate(place.shared):
        left = [each for each in left if each.shared[number] == (name, value)]
        if not left:
            return f"{name} {value}"
    return "" if any(each.training == place.training for each in left) else "another training"


def _told(
    source: Source,
    kept: Sequence[Record],
    left: Counter[str],
    ours: Sequence[Record],
    older: str,
) -> list[str]:
    name, told = source.path.name, []
    if kept:
        rows = sorted({each.run.row for each in kept})
        seeds = {each.run.seed for each in kept} & {each.run.seed for each in ours}
        machines = {
            f"{each.result['device']['name']}, augbench {each.result['versions']['augbench']}"
            for each in kept
        }
        how = "paired with ours by seed and test image"
        if any(each.filed for each in kept):
            how = "paired with ours by seed, in accuracy at the last epoch also by test image"
        told.append(
            f"From {name} ({'; '.join(sorted(machines))}): {count(len(kept), 'run')} of "
            f"{_listed(rows)}; "
            + (f"{how} for {count(len(seeds), 'seed')}." if seeds else "no seed in common, so "
               "nothing is paired with ours.")
        )  # fmt: skip
    elif not left:
        told.append(f"From {name}: all of its runs are among these.")
    if kept:  # of data sets that are not of interest
        left = Counter({each: n for each, n in left.items() if not each.startswith(DATA_SET)})
    if left:
        reasons = [f"{reason} ({number})" for reason, number in left.most_common()]
        told.append(f"Not from {name}, because no run here has the same: {_listed(reasons, '; ')}.")
    return [*told, f"{name}: {older}"] if older else told


def _listed(names: Sequence[str], between: str = ", ") -> str:
    shown = between.join(names[:MOST])
    return shown if len(names) <= MOST else f"{shown} and {len(names) - MOST} more"
