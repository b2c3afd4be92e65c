"""Which runs can be compared in one table: blocks of one setting, a column for each data set."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from analysis import labels
from analysis.differences import RowRuns
from analysis.facts import NONE, ROW, Facts, call_in, column_key, put_around, undirty
from analysis.labels import VARIANT, Labels
from analysis.question import OR, Question
from analysis.records import Record, leading
from analysis.runs import Training, field_names, row_parts

CORRUPTIONS = ("noise", "imbalance")
CUT: Mapping[str, float] = {"meta_fraction": 0.2, "crossfit": 1}
"""How meta rows are cut from the pool, with the values of runs without meta rows."""
LEADS = "leading metric"


@dataclass(frozen=True)
class Entry:
    """A row of a block's tables: one method, the same on every data set."""

    name: str
    """its name in tables: the label, or else ``row``"""
    row: str
    """the name that its runs have, and in braces how it differs from other rows of that name"""
    method: str
    facts: Facts
    origin: str = ""
    """where its runs were joined from; empty for ours"""

    @property
    def control(self) -> bool:
        """Whether it is a control row."""
        return self.facts.kind == "control"


@dataclass(frozen=True)
class Column:
    """The runs of a block on one data set, row by row."""

    name: str
    """its name in tables: the label, or else ``key``"""
    key: str
    """the benchmark, for a user's own data with the name of the file"""
    benchmark: str
    training: Training
    rows: Mapping[str, RowRuns]
    """by the names of the entries"""

    @property
    def records(self) -> list[Record]:
        """Every run that has ended, whatever its status."""
        return [record for row in self.rows.values() for record in row.records]

    @property
    def done(self) -> list[Record]:
        """The runs with metrics."""
        return [record for record in self.records if record.done]

    @property
    def leads(self) -> str:
        """The metric of differences, verdicts and figures."""
        return leading(self.records)

    def row(self, name: str) -> RowRuns:
        """The runs of a row; of several joined by "or", those of the best on the select split.

        The best has the highest mean select score (AUC) at the last epoch, of equal ones the first.
        """
        if name in self.rows or OR not in name:
            return self.rows[name]
        return max((self.rows[each] for each in name.split(OR)), key=_on_select)

    def forget(self) -> None:
        """Free the memory of predictions."""
        for record in self.records:
            record.forget()


@dataclass(frozen=True)
class Block:
    """Runs of one network under one protocol on one kind of machine: the content of one table."""

    setting: Mapping[str, str]
    """what all runs share"""
    entries: tuple[Entry, ...]
    """rows in the order of the tables: upstreams, methods, controls"""
    columns: tuple[Column, ...]

    @property
    def leads(self) -> str:
        """The metric of differences, verdicts and figures, the same on all data sets."""
        return self.setting[LEADS]

    @cached_property
    def by_name(self) -> dict[str, Entry]:
        """The rows by name."""
        return {entry.name: entry for entry in self.entries}

    @property
    def compared(self) -> list[Entry]:
        """The rows that are not controls."""
        return [entry for entry in self.entries if not entry.control]

    @property
    def controls(self) -> list[Entry]:
        """The control rows."""
        return [entry for entry in self.entries if entry.control]

    @property
    def done(self) -> list[Record]:
        """The runs with metrics."""
        return [record for column in self.columns for record in column.done]

    def baseline(self, entry: Entry) -> str:
        """The row that a row is compared with; empty if there is none.

        For a method its upstream alone, for an upstream ``none``.
        """
        there = (self.beside(entry, row) for row in entry.facts.bases)
        return next((name for name in there if name and name != entry.name), "")

    def alone(self, entry: Entry) -> str:
        """The row of a method's upstream alone, on all labelled rows or without the meta rows
        (@train, as many steps); empty if neither was run."""
        upstream = entry.facts.upstream
        return self.beside(entry, upstream) or self.beside(entry, f"{upstream}@train")

    def beside(self, entry: Entry, row: str) -> str:
        """The name of the row to compare an entry with, in the entry's own variant if that exists,
        and of joined rows one of the same origin first; empty if there is no such row."""
        own = [each for each in self.entries if each.origin == entry.origin]
        rows = (f"{row}{VARIANT}{variant(entry.row)}", row, _joined(row, entry.origin))
        for entries in (own, self.entries):
            known = {bare(each.row): each.name for each in reversed(entries) if each.origin}
            known |= {each.row: each.name for each in entries}
            if found := next((known[each] for each in rows if each in known), ""):
                return found
        return ""

    def controls_of(self, entry: Entry) -> list[str]:
        """The control rows of a method: those that take its learning away, its upstream on other
        labelled rows or with an equal budget, and itself with dirty meta rows. A chain is a method
        if one of its links names controls.
        """
        named = {each.name for each in self.without_learning(entry).values() if each}
        if entry.facts.wraps or entry.facts.needs_meta or entry.facts.controls:
            named |= {each.name for each in self.controls if _controls(each, entry)}
        return [each.name for each in self.entries if each.name in named]

    def without_learning(self, entry: Entry) -> dict[str, Entry | None]:
        """The control rows that a method names, by their rows; None where a row has no runs. The
        first takes all of its learning away, the others a part."""
        rows = {row: self.beside(entry, row) for row in entry.facts.controls}
        return {row: self.by_name[name] if name else None for row, name in rows.items()}

    def contrast(self, row: str, base: str) -> list[tuple[str, str]]:
        """Each variant of a row with its base; without ``base``, with its own baseline.

        Empty if one of the two has no runs.
        """
        made = []
        for entry in self.entries:
            if row in (entry.row, bare(entry.row)) and not entry.origin:
                named = [self.beside(entry, each) for each in base.split(OR)] if base else []
                own = OR.join(named) if all(named) else ""
                made.append((entry.name, own if base else self.baseline(entry)))
        return [(one, other) for one, other in made if other and other != one]

    def contrasts(self, question: Question) -> list[tuple[str, str]]:
        """The comparisons of the study that this block can make, or those of every method.

        Rows that were joined are what ours are compared with; they are not compared themselves.
        """
        asked = question.family or [(each.row, "") for each in self.compared if not each.origin]
        made = [pair for row, base in asked for pair in self.contrast(row, base)]
        # A comparison that a family names twice is tested once.
        return list(dict.fromkeys(made))

    def chosen(
        self, rows: Sequence[tuple[Entry, str]], columns: Sequence[tuple[Column, str]]
    ) -> Block:
        """Only these rows and data sets, in this order and under these names.

        Raises:
            NamingError: two rows, or two data sets, have the same name.
        """
        labels.check((name, entry.row) for entry, name in rows)
        labels.check((name, column.key) for column, name in columns)
        made = [
            replace(
                column,
                name=name,
                rows={new: replace(column.rows[entry.name], name=new) for entry, new in rows},
            )
            for column, name in columns
        ]
        entries = tuple(replace(entry, name=name) for entry, name in rows)
        return Block(self.setting, entries, tuple(made))


def _on_select(row: RowRuns) -> float:
    values = [each.metric(each.selecting[0], "select") for each in row.by_seed().values()]
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else -math.inf


def _controls(control: Entry, entry: Entry) -> bool:
    """Whether it controls a method that does not name it."""
    if len({variant(control.row), variant(entry.row)} - {""}) > 1:
        return False
    facts, upstream = control.facts, entry.facts.upstream
    if facts.budget_of:
        return facts.budget_of == entry.method
    if facts.dirty:
        return control.method == entry.method
    if row_parts(bare(control.row))[1]:
        return control.method == upstream and entry.facts.needs_meta
    # What wraps an upstream, or sets aside meta rows that the method does not need, is a control of
    # another method on it: random_label(upstream=sra) of saflex(upstream=sra).
    own = bool(entry.facts.wraps or entry.facts.needs_meta)
    return own and facts.wraps == entry.method and facts.needs_meta <= entry.facts.needs_meta


def split(records: Iterable[Record], given: Labels | None = None) -> list[Block]:
    """Blocks whose runs may be compared, in the order of their settings.

    ``given`` are labels in addition to those that methods declare.

    Runs of another network, protocol, thread count, device type or code form another block, and so
    do data sets on which another metric leads. The training may differ between data sets, but if
    one data set was trained in two ways, each way is a block. Runs joined from elsewhere
    (``Record.origin``) go with the others, whatever device and release they come from; their rows
    stay apart from ours, and change neither the names of ours nor what these are compared with.

    Raises:
        NamingError: two rows or data sets of a block have the same label.
    """
    records = list(records)
    given = given or {}
    known = labels.all_labels(records, given)
    # Of a run that was joined too, ours.
    by_id = {record.run.id: record for record in sorted(records, key=lambda each: not each.origin)}
    groups: dict[tuple[tuple[str, str], ...], list[Record]] = {}
    sets: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        sets.setdefault((column_of(record), record.run.data), []).append(record)
    leads = {name: leading(members) for name, members in sets.items()}
    for record in records:
        led = LEADS, leads[column_of(record), record.run.data]
        groups.setdefault((*shared_by(record), led), []).append(record)
    found = []
    for shared, members in groups.items():
        for machine, same in _by_machine(members).items():
            for part in _by_training(same, by_id):
                block = _block({**dict(shared), **dict(machine)}, part)
                rows = [(entry, labels.label_of(entry.row, known)) for entry in block.entries]
                columns = [(column, given.get(column.key, column.key)) for column in block.columns]
                found.append(block.chosen(rows, columns))
    return sorted(found, key=lambda block: (tuple(block.setting.values()), _first(block)))


def _first(block: Block) -> str:
    return str(block.columns[0].training)


def shared_by(record: Record) -> tuple[tuple[str, str], ...]:
    """What all runs of a block share, their machine and training aside, with its name."""
    run = record.run
    versions = {name: str(run.versions.get(name, "?")) for name in ("trainer", "model")}
    return (
        ("model", run.model),
        ("protocol", run.protocol),
        ("threads", str(run.threads)),
        ("version of the trainer", versions["trainer"]),
        ("version of the network", versions["model"]),
        ("test metrics each epoch", "yes" if run.oracle_test else "no"),
    )


def _by_machine(records: Sequence[Record]) -> dict[tuple[tuple[str, str], ...], list[Record]]:
    """By device type and release; failed runs, which record neither, go to the largest group."""
    told = [(machine_of(each), each) for each in records if not each.origin]
    joined = [each for each in records if each.origin]
    known = Counter(machine for machine, record in told if record.done)
    usual = known.most_common(1)[0][0] if known else (("device", "unknown"), ("augbench", "?"))
    found: dict[tuple[tuple[str, str], ...], list[Record]] = {}
    for machine, record in told:
        found.setdefault(machine if record.done else usual, []).append(record)
    return {machine: [*own, *joined] for machine, own in found.items()}


def machine_of(record: Record) -> tuple[tuple[str, str], ...]:
    """Device type and release of a run that is done, with their names."""
    device, libraries = record.result.get("device", {}), record.result.get("versions", {})
    return (
        ("device", str(device.get("type", "unknown"))),
        ("augbench", str(libraries.get("augbench", "?"))),
    )


def _by_training(
    records: Sequence[Record], by_id: Mapping[str, Record]
) -> list[list[tuple[str, Training, Record]]]:
    """Lists of (column, training, record) in which each column has one training."""
    steps = [each for each in records if each.run.budget == "steps"]
    placed = [(column_of(each), base_training(each, steps, by_id), each) for each in records]
    ways: dict[str, list[Training]] = {}
    for column, training, _ in placed:
        if training not in ways.setdefault(column, []):
            ways[column].append(training)
    if max(map(len, ways.values())) == 1:
        return [placed]
    every = list(dict.fromkeys(str(training) for _, training, _ in placed))
    return [[each for each in placed if str(each[1]) == training] for training in every]


def base_training(record: Record, steps: Sequence[Record], by_id: Mapping[str, Record]) -> Training:
    """The training; for a row with an equal budget, that of the row whose budget it has.

    If the run that the budget was measured on is missing, it is that of the same method with
    another seed, or of all other rows of the data set, if these agree.
    """
    run = record.run
    if run.budget == "steps":
        return run.training
    of = by_id.get(record.recorded.get("of") or "")
    if of is not None:
        return replace(run.training, epochs=of.run.training.epochs)
    there = [each for each in steps if column_of(each) == column_of(record)]
    costly = [each for each in there if each.run.method == record.facts.budget_of]
    for kept in (costly, there):
        trainings = {each.run.training for each in kept}
        if len(trainings) == 1:
            return replace(run.training, epochs=trainings.pop().epochs)
    return run.training


def column_of(record: Record) -> str:
    """The benchmark, with the name of a user's own file; dirty meta rows do not matter."""
    return column_key(undirty(record.run.benchmark)[0], record.recorded.get("path"))


def _block(setting: Mapping[str, str], placed: Sequence[tuple[str, Training, Record]]) -> Block:
    names = _names([record for _, _, record in placed])
    several = _checksums(placed)
    columns: dict[str, list[tuple[str, Training, Record]]] = {}
    for name, training, record in placed:
        own = f"{name} [data {record.run.data[:8]}]" if name in several else name
        columns.setdefault(own, []).append((names[_key(record)], training, record))
    members: dict[str, list[Record]] = {}
    for name, _, record in (each for part in columns.values() for each in part):
        members.setdefault(name, []).append(record)
    entries = sorted(
        (_entry(name, own) for name, own in members.items()),
        key=lambda entry: (entry.control, bool(entry.facts.wraps), entry.row != NONE, entry.row),
    )
    made = []
    for name, part in sorted(columns.items()):
        rows = {}
        for entry in entries:
            own = [record for row, _, record in part if row == entry.name]
            own.sort(key=lambda record: record.run.seed)
            rows[entry.name] = RowRuns(entry.name, entry.facts.upstream, tuple(own))
        benchmark = undirty(part[0][2].run.benchmark)[0]
        made.append(Column(name, name, benchmark, part[0][1], rows))
    return Block(setting, tuple(entries), tuple(made))


def _checksums(placed: Sequence[tuple[str, Training, Record]]) -> set[str]:
    """Names of columns whose data differ."""
    found: dict[str, set[str]] = {}
    for name, _, record in placed:
        found.setdefault(name, set()).add(record.run.data)
    return {name for name, sums in found.items() if len(sums) > 1}


Key = tuple[str, str]
"""Origin and id of a run."""


def _key(record: Record) -> Key:
    return record.origin, record.run.id


def _names(records: Sequence[Record]) -> dict[Key, str]:
    """The row of each run; joined rows of a name that another row has get their origin added."""
    origins = list(dict.fromkeys(sorted(each.origin for each in records)))
    names: dict[Key, str] = {}
    for origin in origins:
        taken = {*names.values(), *map(bare, names.values())}
        for key, name in _names_of([each for each in records if each.origin == origin]).items():
            names[key] = _joined(name, origin) if bare(name) in taken else name
    return names


def _joined(row: str, origin: str) -> str:
    """The name of a row with its origin."""
    plain, _, apart = row.partition(VARIANT)
    told = f"{apart.removesuffix('}')}, " if apart else ""
    return f"{plain}{VARIANT}{told}from {origin}}}"


def _names_of(records: Sequence[Record]) -> dict[Key, str]:
    """The row of each run; rows of one name get what sets them apart added to the name."""
    variants: dict[str, dict[str, list[dict[str, str]]]] = {}
    epochs: dict[tuple[str, str], set[int]] = {}
    cut = {_row(record) for record in records if _is_cut(record)}
    own_of = {each.run.id: _variant(each, _row(each) in cut) for each in records}
    for record in records:
        row, own = _row(record), own_of[record.run.id]
        variants.setdefault(row, {}).setdefault(json.dumps(own), []).append(own)
        epochs.setdefault((row, column_of(record)), set()).add(record.run.training.epochs)
    # An equal budget may be another number of epochs on each data set.
    several = {row for (row, _), own in epochs.items() if len(own) > 1}
    names: dict[Key, str] = {}
    for record in records:
        row, own = _row(record), own_of[record.run.id]
        others = [each[0] for each in variants[row].values()]
        differ = [
            key
            for key in own
            if own[key] != ANY and len({other.get(key) for other in others} - {ANY}) > 1
        ]
        differ = [key for key in differ if key != "epochs" or row in several]
        told = ", ".join(f"{key} {own[key]}" for key in differ)
        names[_key(record)] = f"{row}{VARIANT}{told}}}" if told else row
    return names


def _row(record: Record) -> str:
    return record.run.row + ("@dirty" if record.facts.dirty else "")


ANY = ""
"""The value of a field that does not affect a run's numbers."""


def _is_cut(record: Record) -> bool:
    """Whether the pool was certainly cut; corruption aside, this is the same for a whole row."""
    run, rows = record.run, record.result.get("data", {}).get("rows", {})
    told = not _corrupts(record) and any(getattr(run, name) != CUT[name] for name in CUT)
    return told or run.control != "all" or rows.get("meta", 0) > 0


def _corrupts(record: Record) -> bool:
    call = call_in(record.run.benchmark)
    return call is not None and any(name in CORRUPTIONS for name, _ in call.arguments)


def _variant(record: Record, cut: bool) -> dict[str, str]:
    """What may differ between runs of one row name, apart from what a block shares."""
    run = record.run
    # Without meta rows the whole pool is used, however it is cut; corruptions come after the cut.
    matters = cut or _corrupts(record)
    parts = {name: v for name, v in run.versions.items() if name not in ("trainer", "model")}
    epochs = {"epochs": str(run.training.epochs)} if run.budget != "steps" else {}
    return {
        **{name: f"{getattr(run, name):g}" if matters else ANY for name in CUT},
        **{f"version of {name}": str(version) for name, version in sorted(parts.items())},
        **epochs,
    }


def _entry(name: str, records: Sequence[Record]) -> Entry:
    """The row of these runs; runs that recorded their own facts take precedence."""
    first = next((each for each in records if ROW in each.recorded), records[0])
    meta = any(each.facts.needs_meta for each in records)
    facts = replace(first.facts, needs_meta=meta)
    return Entry(name, name, first.run.method, facts, first.origin)


def bare(name: str) -> str:
    """The name of a row without its variant in braces."""
    return name.partition(VARIANT)[0]


def variant(name: str) -> str:
    """What sets a row apart from others of its name; may be empty."""
    return name.partition(VARIANT)[2]


def bases(method: str) -> tuple[str, ...]:
    """What a method is compared with if no base is named (``Facts.bases``)."""
    wraps, upstream = put_around(method)
    return (wraps, upstream, NONE) if wraps else (NONE,)


def trained_apart(blocks: Iterable[Block]) -> list[str]:
    """Fields of the training in which blocks differ on a data set that they share."""
    trainings: dict[str, list[Training]] = {}
    for column in (column for block in blocks for column in block.columns):
        trainings.setdefault(column.name, []).append(column.training)
    return [
        name
        for name in field_names(Training)
        if any(len({getattr(each, name) for each in own}) > 1 for own in trainings.values())
    ]
