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

from analysis import blocks, corrupted, packing, records, recordsfile, runs, versions
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
    name: str = ""
    """how tables call it"""


@contextmanager
def opened(paths: Sequence[Path]) -> Iterator[list[Source]]:
    """The runs of results folders, packs and records files; packs are unpacked for the meantime.

    Raises:
        OSError: a path does not exist or is none of these; PackError where a pack is damaged.
    """
    with tempfile.TemporaryDirectory(prefix="augbench-") as temporary:
        places = list(dict.fromkeys(path.expanduser().resolve() for path in paths))
        names = [path.name for path in places]
        yield [
            _source(path, Path(temporary) / str(number))._replace(
                name=path.name if names.count(path.name) == 1 else f"{path.name} {number}"
            )
            for number, path in enumerate(places, start=1)
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
            if (record.done, _extras(record)) > (other.done, _extras(other)):
                kept[name] = record
    told = []
    if twice:
        told.append(
            f"{count(len(set(twice)), 'run')} in several places: one with a result, or with "
            "scores on corrupted images, is used, else the first."
        )
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
    """Whether two runs have equal metrics, as far as both have them."""
    first, second = one.result["metrics"], other.result["metrics"]
    return all(
        runs.to_json(value) == runs.to_json(there[name])
        for when in first.keys() & second.keys()
        for split in first[when].keys() & second[when].keys()
        for there in (second[when][split],)
        for name, value in first[when][split].items()
        if name in there
    )


def _extras(record: Record) -> int:
    """The number of sets of corruptions that it was evaluated on."""
    return len(record.result.get(corrupted.KEY, {}))


def beside(
    own: Sequence[Record],
    sources: Sequence[Source],
    all_versions: bool = False,
    wanted: Callable[[Record], bool] = lambda record: True,
) -> tuple[list[Record], list[str]]:
    """The runs of the sources that can be compared with our own, and in words what was joined.

    A run is joined if one of ours is on the same data set with the same data, network, protocol,
    training and code of the trainer; it may come from another device and release. Rows whose runs
    are all among ours, with the same results, are left out.
    """
    ours = [each for each in own if not each.searched]
    places = _places(ours)
    joined: list[Record] = []
    told: list[str] = []
    for source in sources:
        plain = [each for each in source.found if not each.searched and wanted(each)]
        found, _, older = versions.newest(plain, source.unread, all_versions)
        done = [each for each in found if each.done]
        theirs = _places(done, ours)
        kept: list[Record] = []
        left = Counter[str]()
        for record in done:
            reason = _unlike(theirs[record.run.id], places.values())
            if not reason and record.run.budget.startswith("time"):
                reason = "a time that was measured elsewhere"
            if reason:
                left[reason] += 1
            else:
                kept.append(replace(record, origin=source.name))
        new = _new(kept, ours)
        joined += new
        ended = {each.run.row for each in found if not each.done} & {each.run.row for each in new}
        failed = sum(not each.done and each.run.row in ended for each in found)
        told += _told(source, kept, new, left, ours, failed)
        told += [f"{source.name}: {older}"] if older else []
    return joined, told


def _new(kept: Sequence[Record], ours: Sequence[Record]) -> list[Record]:
    """Without the rows that hold nothing but runs of ours, with the same results."""
    known = {each.run.id: each for each in ours if each.done}
    rows: dict[tuple[str, str], list[Record]] = {}
    for record in kept:
        rows.setdefault((blocks.column_of(record), record.run.row), []).append(record)
    return [
        record
        for members in rows.values()
        if not all(_adds_nothing(each, known.get(each.run.id)) for each in members)
        for record in members
    ]


def _adds_nothing(record: Record, own: Record | None) -> bool:
    return own is not None and _agree(record, own) and _extras(record) <= _extras(own)


def rows_beside(
    rows: Sequence[RowRuns], sources: Sequence[Source]
) -> tuple[list[RowRuns], list[str]]:
    """The rows of a table on one data set with those of the sources, and what was joined.

    Control rows are joined only if ours have one of the same name.
    """
    own = [record for row in rows for record in row.records]
    names = {row.name for row in rows}

    def wanted(record: Record) -> bool:
        return record.facts.kind != "control" or record.run.row in names

    if not own or not sources:
        return list(rows), []
    more, told = beside(own, sources, wanted=wanted)
    if not more:
        return list(rows), told
    made = blocks.split([*own, *more])[0]
    column = made.columns[0]
    joined = [
        replace(column.rows[entry.name], upstream=made.beside(entry, entry.facts.upstream))
        for entry in made.entries
        if entry.origin
    ]
    return [*rows, *joined], told


def without(row: RowRuns, folder: Path) -> RowRuns:
    """A joined row without the run of a folder; a row of ours as it is."""
    if not row.origin:
        return row
    return replace(row, records=tuple(each for each in row.records if each.folder != folder))


class _Place(NamedTuple):
    """What two runs must share to be compared, from what is told first."""

    data_set: str
    data: str
    shared: tuple[tuple[str, str], ...]
    training: runs.Training


def _places(found: Sequence[Record], others: Sequence[Record] = ()) -> dict[str, _Place]:
    """``others`` may be what the budget of a run was measured on."""
    steps = [each for each in found if each.run.budget == "steps"]
    by_id = {each.run.id: each for each in (*others, *found)}
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
    new: Sequence[Record],
    left: Counter[str],
    ours: Sequence[Record],
    failed: int,
) -> list[str]:
    """What was joined from a source, and what was not."""
    name, told = source.name, []
    if new:
        rows = sorted({each.run.row for each in new})
        pairs = {(blocks.column_of(each), each.run.seed) for each in ours if each.done}
        seeds = {e.run.seed for e in new if (blocks.column_of(e), e.run.seed) in pairs}
        machines = {
            f"{each.result['device']['name']}, augbench {each.result['versions']['augbench']}"
            for each in new
        }
        paired = (
            f"{count(len(seeds), 'seed')} in common with ours"
            if seeds
            else "no seed in common with ours, so nothing is paired"
        )
        told.append(
            f"From {name} ({'; '.join(sorted(machines))}): {count(len(new), 'run')} of "
            f"{_listed(rows)}; {paired}."
        )
        if failed:
            told.append(f"{count(failed, 'run')} of these rows in {name} failed.")
        known = {each.run.row: each.run.versions for each in ours}
        other = sorted({e.run.row for e in new if known.get(e.run.row, e.run.versions)
                        != e.run.versions})  # fmt: skip
        if other:
            told.append(f"In {name} with another version of their code: {_listed(other)}.")
    elif kept:
        told.append(f"From {name} nothing: all of its runs that can be compared are among these.")
    elif not left:
        told.append(f"From {name} nothing: it has no finished run that could be shown.")
    if new:  # of data sets that are not of interest
        left = Counter({each: n for each, n in left.items() if not each.startswith(DATA_SET)})
    if left:
        reasons = [f"{reason} ({number})" for reason, number in left.most_common()]
        told.append(f"Not from {name}, because no run here has the same: {_listed(reasons, '; ')}.")
    return told


def _listed(names: Sequence[str], between: str = ", ") -> str:
    shown = between.join(names[:MOST])
    return shown if len(names) <= MOST else f"{shown} and {len(names) - MOST} more"
