"""Tables of scores on corrupted test images, for a comparison and for a report."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from analysis.blocks import Block
from analysis.contents import difference_cells
from analysis.corrupted import ATTACK, KEY, SETS, clean_error, mean, set_of, table_of
from analysis.differences import Difference, RowRuns, difference
from analysis.findings import Finding, judged
from analysis.metrics import MEASURES
from analysis.numbers import MISSING, POINTS, count, estimated, mean_sd, p_value
from analysis.records import Record
from analysis.table import Table, table

SCORES = {
    "accuracy": "clean",
    "corrupted_accuracy": "corrupted",
    "corrupted_auc": "AUC",
    "corrupted_balanced_error": "BE ↓",
    "relative_balanced_error": "rBE ↓",
    "attacked_accuracy": "FGSM",
}
"""Metrics of the tables, and their names there."""
BRIEF = ("accuracy", "corrupted_accuracy", "corrupted_balanced_error", "attacked_accuracy")
JUDGED = "corrupted_accuracy"
"""The metric of the verdicts: the only one with p-values, whose comparisons are one family."""
FURTHER = ("corrupted_balanced_error", "attacked_accuracy")
"""Metrics whose differences a report shows with their intervals alone."""
CLEAN = "clean"


def narrowed(rows: Sequence[RowRuns]) -> list[RowRuns]:
    """The rows on one set of corruptions in one version, that of most runs: tables mix none.

    Of equally many runs, the first of ``SETS`` and the newest version.
    """
    counts = Counter(
        (name, each["version"])
        for row in rows
        for record in row.by_seed().values()
        for name, each in record.result.get(KEY, {}).items()
    )
    if not counts:
        return list(rows)
    name, version = max(counts, key=lambda each: (counts[each], -SETS.index(each[0]), each[1]))

    def only(record: Record) -> Record:
        if KEY not in record.result:
            return record
        found = record.result[KEY].get(name)
        kept = {name: found} if found is not None and found["version"] == version else {}
        return replace(record, result={**record.result, KEY: kept})

    return [replace(row, records=tuple(map(only, row.records))) for row in rows]


def of_block(block: Block) -> Block:
    """The block with the runs on each data set narrowed."""
    columns = [
        replace(column, rows=dict(zip(column.rows, narrowed([*column.rows.values()]), strict=True)))
        for column in block.columns
    ]
    return replace(block, columns=tuple(columns))


def _by_column(rows: Sequence[tuple[str, RowRuns]]) -> list[tuple[str, RowRuns]]:
    """Rows of several data sets, those of each narrowed, in their order."""
    made: dict[str, list[RowRuns]] = {}
    for column, row in rows:
        made.setdefault(column, []).append(row)
    done = {column: iter(narrowed(own)) for column, own in made.items()}
    return [(column, next(done[column])) for column, _ in rows]


def evaluated(row: RowRuns) -> list[Record]:
    """The runs of a row that were evaluated on corrupted images."""
    return [each for each in row.by_seed().values() if set_of(each.result)]


def sets_of(rows: Iterable[RowRuns]) -> list[str]:
    """The sets of corruptions that rows were evaluated on."""
    return sorted({set_of(each.result) for row in rows for each in evaluated(row)})


def compared(row: RowRuns, base: RowRuns, name: str) -> Difference | None:
    """A difference of a metric of ``ON_CORRUPTED``; None if they have no such runs in common, or
    other corruptions."""
    row, base = narrowed([row, base])
    kinds = {tuple(table_of(each.result)) for one in (row, base) for each in evaluated(one)}
    same = len(kinds) == 1 and len(sets_of([row, base])) == 1
    return difference(row, base, name) if same else None


def score_cells(row: RowRuns, names: Iterable[str], digits: int) -> list[str]:
    """Number of seeds, and metrics in per cent."""
    runs = evaluated(row)
    cells = ([POINTS * each.metric(name) for each in runs] for name in names)
    return [str(len(runs)), *(mean_sd(each, digits) if each else MISSING for each in cells)]


Pair = tuple[Finding, RowRuns, RowRuns]
"""A comparison of clean accuracy, and the rows that it compares."""


def on_corrupted(pairs: Sequence[Pair], margin: float) -> list[Finding | None]:
    """The same comparisons of accuracy on corrupted images, tested as a family of their own; None
    where the two rows have no such runs to compare."""
    made = [
        Finding(
            each.row,
            each.base,
            each.column,
            compared(row, base, JUDGED),
            fallback=each.fallback,
            hardly=each.hardly,
            chosen=each.chosen,
        )
        for each, row, base in pairs
    ]
    return [each if each.difference is not None else None for each in judged(made, margin)]


def brief_table(rows: Sequence[RowRuns], found: Sequence[Finding], margin: float) -> Table | None:
    """What ``augbench compare`` prints below its scores; None if no run was evaluated.

    ``found`` are the comparisons of clean accuracy.
    """
    rows = narrowed(rows)
    sets, named = sets_of(rows), {row.name: row for row in rows}
    if not sets:
        return None
    pairs = [(each, named[each.row], named[each.base]) for each in found]
    judged_on = on_corrupted(pairs, margin)
    against = {each.row: one for each, one in zip(found, judged_on, strict=True)}
    body = []
    for row in rows:
        made, told = against.get(row.name), ["", ""] if row.name not in against else [MISSING] * 2
        if made is not None and made.difference is not None:
            ends = estimated(made.difference.estimate, made.difference.interval)
            told = [ends, made.told]
        body.append([row.name, *score_cells(row, BRIEF, 1), *told])
    head = ["", "n", *(SCORES[name] for name in BRIEF), "difference [95 % CI]", "verdict"]
    title = f"Corrupted test images ({', '.join(sets)}), last epoch, in per cent"
    return table("corrupted", title, head, body, [NOTE, *family_note(judged_on, margin)])


NOTE = (
    "corrupted: accuracy; BE: balanced error; both are means over severities and corruptions; "
    "FGSM: accuracy under attack; difference: of corrupted accuracy. Limits: docs/corruptions.md."
)


def family_note(found: Sequence[Finding | None], margin: float) -> list[str]:
    """What the verdicts are corrected over; empty if there is none."""
    tested = sum(each is not None and not math.isnan(each.p) for each in found)
    if not tested:
        return []
    return [
        "p-values and verdicts: of corrupted accuracy alone, with Holm's correction over "
        f"{count(tested, 'tested comparison')}, a family apart from that of clean accuracy; "
        f"intervals are not corrected. Equivalent: within the margin of {margin:g} points."
    ]


def scores_table(rows: Sequence[tuple[str, RowRuns]], name: str) -> Table | None:
    """Each row on each data set; None if no run was evaluated."""
    rows = _by_column(rows)
    sets = sets_of(row for _, row in rows)
    body = [
        [row.name, f"{column} ({sets_of([row])[0]})" if len(sets) > 1 else column,
         *score_cells(row, SCORES, 2)]
        for column, row in rows
        if evaluated(row)
    ]  # fmt: skip
    title = f"Scores on corrupted test images ({', '.join(sets)}), last epoch, in per cent"
    return table(name, title, ["", "data set", "n", *SCORES.values()], body) if body else None


def differences_table(pairs: Sequence[Pair], margin: float, name: str) -> Table | None:
    """Each comparison of clean accuracy on corrupted images: both intervals, and for corrupted
    accuracy the test and its verdict; None if no two rows were evaluated."""
    found, body = on_corrupted(pairs, margin), []
    for each, (_, row, base) in zip(found, pairs, strict=True):
        if each is None:
            continue
        made = {name: compared(row, base, name) for name in FURTHER}
        for metric, one in {JUDGED: each.difference, **made}.items():
            *told, detectable = difference_cells(one)
            judged_so = (p_value(each.p), each.told) if metric == JUDGED else ("", "")
            label = [f"{each.row} over {each.base}", each.column, MEASURES[metric].name]
            body.append([*label, *told, judged_so[0], detectable, judged_so[1]])
    head = ["", "data set", "metric", "n", "difference, points", "training 95 % CI",
            "population 95 % CI", "p (Holm)", "detectable", "verdict"]  # fmt: skip
    title = "Differences on corrupted test images, in points, paired by seed and image"
    return table(name, title, head, body, family_note(found, margin)) if body else None


def kinds_table(rows: Sequence[tuple[str, RowRuns]], name: str) -> Table | None:
    """The balanced error under each corruption, over severities; None if no run was evaluated."""
    there = [(column, row) for column, row in _by_column(rows) if evaluated(row)]
    names = list(dict.fromkeys(each for _, row in there for each in corruptions(row)))
    if not names:
        return None
    body = []
    for corruption in names:
        cells = [
            mean_sd([POINTS * error(each, corruption) for each in evaluated(row)], 1)
            for _, row in there
        ]
        body.append([corruption.replace("_", " "), *cells])
    several = len({column for column, _ in there}) > 1
    head = [f"{row.name}, {column}" if several else row.name for column, row in there]
    return table(name, "Balanced error under each corruption, in per cent ↓", ["", *head], body)


def corruptions(row: RowRuns) -> list[str]:
    """``clean`` and the corruptions of a row; empty if it was not evaluated."""
    runs = evaluated(row)
    return [CLEAN, *table_of(runs[0].result)] if runs else []


def error(record: Record, corruption: str) -> float:
    """The balanced error of a run under a corruption, over its severities, or on clean images."""
    if corruption == CLEAN:
        return clean_error(record.result)
    return mean(record.result, corruption, "balanced_error")


def by_severity(record: Record) -> list[float]:
    """The accuracy on clean images, and at each severity over the corruptions, in per cent."""
    found = [scores["accuracy"] for name, scores in table_of(record.result).items()
             if name != ATTACK]  # fmt: skip
    clean = record.metric("accuracy")
    return [POINTS * clean, *(POINTS * np.mean(found, axis=0)).tolist()] if found else []


def mean_error(row: RowRuns, corruption: str) -> float:
    """The mean over seeds of ``error``; nan if the row lacks the corruption."""
    runs = [each for each in evaluated(row) if corruption in corruptions(row)]
    return float(np.mean([error(each, corruption) for each in runs])) if runs else math.nan
