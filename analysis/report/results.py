"""Rows by data sets with their scores: the main tables of a report, and the table of a paper."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from analysis import robustness
from analysis.blocks import Block, Column, Entry
from analysis.contents import one_class
from analysis.findings import Best, best, mean_ranks, scores
from analysis.labels import legend
from analysis.metrics import MEASURES, ON_CORRUPTED, to_test
from analysis.numbers import MISSING, count, counted, listed, mean_sd, number
from analysis.report import published
from analysis.report.tables import folds_note, patients_note, ratio
from analysis.runs import Training, field_names
from analysis.stats import FEW_SEEDS, INFERENCE_SEEDS
from analysis.table import Group, Mark, Table, TableCell, cells

if TYPE_CHECKING:
    from pandas import DataFrame

Lines = Sequence[tuple[TableCell, ...]]
NO_TEST = (
    "Published numbers come from networks of full width with their own training and epoch "
    "selection, so they are not tested against ours."
)
TRANSFER = "Control rows show where a gain comes from; some train on other labelled data."


class Place(NamedTuple):
    """A column of scores: one metric on one data set."""

    column: Column
    metric: str


@dataclass(frozen=True)
class Scores:
    """The scores of a block as table cells, each with its mark."""

    block: Block
    metrics: Sequence[str]
    when: str
    """last, or selected"""

    @classmethod
    def of(cls, block: Block, metrics: Sequence[str], when: str) -> Scores:
        """Of a block; with metrics on corrupted images, each data set on one set of corruptions."""
        robust = bool(set(ON_CORRUPTED) & set(metrics))
        return cls(robustness.of_block(block) if robust else block, metrics, when)

    @cached_property
    def places(self) -> list[Place]:
        """The columns: the data sets, and for each the metrics."""
        return [Place(column, name) for column in self.block.columns for name in self.metrics]

    @cached_property
    def tops(self) -> dict[tuple[str, str], Best]:
        """The best row of each column, by data set and metric; never a control."""
        names = [entry.name for entry in self.block.compared]
        if self.when != "last" or len(names) < 2:
            return {}
        found = {}
        for column, metric in self.places:
            found[column.name, metric] = best(column, names, metric)
            column.forget()
        return found

    @cached_property
    def counts(self) -> dict[tuple[str, str], int]:
        """The number of seeds, by data set and row."""
        leads = self.block.leads
        return {
            (column.name, entry.name): len(scores(column.rows[entry.name], leads, self.when))
            for column in self.block.columns
            for entry in self.block.entries
        }

    def seeds(self, entry: Entry) -> list[int]:
        """The number of seeds of a row on each data set."""
        return [self.counts[column.name, entry.name] for column in self.block.columns]

    def values(self, entry: Entry) -> list[TableCell]:
        """Mean and standard deviation of a row in each column."""
        made = []
        for column, metric in self.places:
            found = scores(column.rows[entry.name], metric, self.when)
            text = mean_sd(found, MEASURES[metric].digits)
            usual = max(self.counts[column.name, each.name] for each in self.block.entries)
            if found and len(found) < usual:
                text += f" (n = {len(found)})"
            made.append(TableCell(text, self._mark(column, metric, entry.name)))
        return made

    def _mark(self, column: Column, metric: str, name: str) -> Mark:
        found = self.tops.get((column.name, metric))
        if found is None or self.counts.get((column.name, found.top), 0) < INFERENCE_SEEDS:
            return ""
        return "best" if name == found.top else "tied" if name in found.tied else ""

    def average(self, entry: Entry, metric: str) -> str:
        """The mean over data sets of a row's means; n/a if it lacks a result on one of them."""
        found = [scores(each.rows[entry.name], metric, self.when) for each in self.block.columns]
        if not all(found):
            return MISSING
        means = [float(np.mean(values)) for values in found]
        return number(float(np.mean(means)), MEASURES[metric].digits)

    def published(self, only: Sequence[Entry] | None) -> tuple[Lines, list[str]]:
        """Rows of published numbers with their notes; with ``only``, for these methods."""
        rows: dict[str, dict[str, list[published.Printed | None]]] = {}
        notes, nothing = [], [None] * len(self.block.columns)
        for metric in self.metrics:
            printed = published.beside(self.block, metric, only)
            notes += published.notes(printed)
            for label, values in printed:
                rows.setdefault(label, {})[metric] = values
        body = [
            cells([label, *(
                _printed(of.get(metric, nothing)[place])
                for place in range(len(nothing)) for metric in self.metrics
            )])
            for label, of in rows.items()
        ]  # fmt: skip
        if body:
            return body, [*dict.fromkeys(notes), NO_TEST]
        what = " or ".join(MEASURES[metric].name for metric in self.metrics)
        of = "" if only is None else " for these rows"
        return [], [f"No published {what}{of} with this network on these data sets."]

    def marks_note(self) -> list[str]:
        """What bold and italics mean, and where they are not used."""
        told = {key: top for key, top in self.tops.items() if top.top}
        if not told:
            return []
        enough = {
            key for key, top in told.items() if self.counts[key[0], top.top] >= INFERENCE_SEEDS
        }
        notes, lines = [], []
        lower = any(MEASURES[metric].lower for metric in self.metrics)
        best_of = "best" if lower else "highest"
        testing = to_test(self.block.leads)
        if enough:
            controls = ", without control rows" if self.block.controls else ""
            tested = (
                "; italics (tied): not significantly different from it (population interval, 5 %, "
                "corrected for all pairs of rows of this table)"
            )
            notes.append(
                f"Bold (best): the {best_of} mean of a column{controls}"
                f"{tested if testing & set(self.metrics) else ''}."
            )
            fewest = min(self.counts[name, told[name, metric].top] for name, metric in enough)
            if fewest < FEW_SEEDS and testing & set(self.metrics):
                notes.append(f"Few seeds: with fewer than {FEW_SEEDS}, italics are less reliable.")
            untested = [MEASURES[each].name for each in self.metrics if each not in testing]
            if untested:
                notes.append(f"Not tested, so nothing is in italics: {', '.join(untested)}.")
        few = {key: top.top for key, top in told.items() if key not in enough}
        none = list(dict.fromkeys(name for name, _ in few if not self._enough(name)))
        if none:
            notes.append(
                f"No row has {INFERENCE_SEEDS} seeds, so nothing is tested or marked: "
                f"{', '.join(none)}."
            )
        ahead = [
            f"{name}{self._of(metric)}: {top} (n = {self.counts[name, top]})"
            for (name, metric), top in few.items()
            if self._enough(name)
        ]
        if ahead:
            notes.append(
                f"Nothing is marked in a column if a row with fewer than {INFERENCE_SEEDS} seeds "
                f"has the {best_of} mean: {'; '.join(ahead)}."
            )
        for (name, metric), top in told.items():
            if top.untested and (name, metric) in enough:
                lines.append(f"{self._untested(name, top)} on {name}{self._of(metric)}")
        if lines:
            notes.append(
                "Not tested against the best row, because they have fewer than "
                f"{INFERENCE_SEEDS} seeds in common with it, only one test patient or no complete "
                f"repeat of folds: {'; '.join(lines)}."
            )
        return notes

    def corruptions_note(self) -> list[str]:
        """The set of corruptions of each data set; empty without a metric on corrupted images."""
        if not set(ON_CORRUPTED) & set(self.metrics):
            return []
        told = [
            f"{column.name}: {', '.join(robustness.sets_of(column.rows.values())) or 'none'}"
            for column in self.block.columns
        ]
        return [
            f"Corruptions of the test images: {'; '.join(told)}. Metrics on them are means over "
            "severities and corruptions (docs/corruptions.md)."
        ]

    def _of(self, metric: str) -> str:
        return f" ({MEASURES[metric].name})" if len(self.metrics) > 1 else ""

    def _enough(self, column: str) -> bool:
        """Whether a row that may be marked has enough seeds for a test."""
        there = (self.counts[column, entry.name] for entry in self.block.compared)
        return max(there) >= INFERENCE_SEEDS

    def _untested(self, column: str, found: Best) -> str:
        there = {e.name for e in self.block.compared if self.counts[column, e.name]}
        every = found.untested == there - {found.top}
        return "every other row" if every else ", ".join(sorted(found.untested))


def _printed(value: published.Printed | None) -> str:
    if value is None:
        return MISSING
    return f"{value.mean:.2f}" + ("" if math.isnan(value.std) else f" ± {value.std:.2f}")


def _epoch(when: str) -> str:
    return "last epoch" if when == "last" else "epoch with the best select AUC"


def main_table(block: Block, metric: str, name: str, with_published: bool, when: str) -> Table:
    """Methods by data sets: mean and standard deviation over seeds, in points, and the cost."""
    made, measure = Scores.of(block, [metric], when), MEASURES[metric]
    block = made.block

    def lines(entries: Sequence[Entry]) -> Lines:
        # Rows without any result are shown for the last epoch only.
        kept = [entry for entry in entries if when == "last" or any(made.seeds(entry))]
        return [
            cells([entry.name, counted(made.seeds(entry)), *made.values(entry), costs(entry)])
            for entry in kept
        ]

    def costs(entry: Entry) -> str:
        known = [each for c in block.columns if not math.isnan(each := ratio(block, c, entry))]
        return number(float(np.median(known)), 2) if known else MISSING

    groups = [Group("", tuple(lines(block.compared)))]
    if controls := lines(block.controls):
        groups.append(Group("Control rows", tuple(controls)))
    notes = _main_notes(made, metric)
    if with_published:
        body, told = made.published(None)
        notes += told
        if body:
            empty = TableCell("")
            shown = tuple((label, empty, *values, empty) for label, *values in body)
            groups.append(Group("Published numbers, not ours", shown))
    unit = ", %" if measure.percent else ""
    arrow = "↓" if measure.lower else "↑"
    head = ["", "n", *(f"{each.name}{unit} {arrow}" for each in block.columns), "cost ratio ↓"]
    return Table(
        name,
        f"Test {measure.name}{unit}, mean ± standard deviation over n seeds; {_epoch(when)}",
        tuple(head),
        tuple(groups),
        tuple(notes),
    )


def _main_notes(made: Scores, metric: str) -> list[str]:
    columns = made.block.columns
    notes = made.marks_note()
    found = [
        f"{column.name} {_told(top)}"
        for column in columns
        if (top := made.tops.get((column.name, metric))) is not None and top.detectable
    ]
    if found:
        notes.append(
            "Detectable (smallest true difference from the best row of the column that one "
            f"comparison would find with 80 % power), in points: {', '.join(found)}."
        )
    notes += made.corruptions_note()
    return [*notes, *folds_note(columns), *patients_note(columns)]


def _told(top: Best) -> str:
    low, high = (number(end(top.detectable), 2) for end in (min, max))
    return low if low == high else f"{low} to {high}"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a paper's table shows besides the scores."""

    caption: str = ""
    label: str = ""
    average: bool = False
    rank: bool = False
    published: bool = False
    only: bool = False
    """published rows only for the methods in the table"""
    legend: bool = True
    """list the full names behind labels"""


def paper_table(
    block: Block, metrics: Sequence[str], name: str, when: str, options: Options
) -> Table:
    """The rows and data sets of a block in their order, with the metrics for each data set."""
    made = Scores.of(block, metrics, when)
    block = made.block
    arrows = {each: f"{'↓' if MEASURES[each].lower else '↑'}" for each in metrics}
    several = len(metrics) > 1
    head, above = [""], [""]
    for column, metric in made.places:
        head.append(f"{MEASURES[metric].name if several else column.name} {arrows[metric]}")
        above.append(column.name if several else "")
    more: list[Callable[[Entry], str]] = []
    notes = made.marks_note()
    if options.average:
        head += [
            f"{MEASURES[each].name if several else 'average'} {arrows[each]}" for each in metrics
        ]
        above += ["average" if several else ""] * len(metrics)
        more += [lambda entry, each=each: made.average(entry, each) for each in metrics]
        notes.append(
            "average: over the data sets of this table; sizes and corruptions of one set count "
            "separately."
        )
    if options.rank:
        head += [f"{MEASURES[each].name if several else 'mean rank'} ↓" for each in metrics]
        above += ["mean rank" if several else ""] * len(metrics)
        ranks = {each: _ranks(block, each) if when == "last" else {} for each in metrics}
        more += [lambda entry, each=each: ranks[each].get(entry.name, MISSING) for each in metrics]
        notes.append(_rank_note(block, ranks))
    body = [
        (TableCell(entry.name), *made.values(entry), *(TableCell(cell(entry)) for cell in more))
        for entry in block.entries
    ]
    groups = [Group("", tuple(body))]
    if options.published:
        printed, told = made.published(block.entries if options.only else None)
        notes += told
        if printed:
            empty = (TableCell(""),) * len(more)
            groups.append(
                Group("Published numbers, not ours", tuple((*row, *empty) for row in printed))
            )
    if any(entry.control for entry in block.entries):
        notes.append(TRANSFER)
    notes += made.corruptions_note()
    notes += [*folds_note(block.columns), *patients_note(block.columns)]
    if when == "last":
        notes += [
            f"{column.name}, {text}."
            for column in block.columns
            for text in one_class(column.rows[entry.name] for entry in block.entries)
        ]
    notes += _training_note(block.columns)
    if options.legend:
        names = [(entry.name, entry.row) for entry in block.entries]
        notes += legend([*names, *((column.name, column.key) for column in block.columns)])
    return Table(
        name,
        options.caption or _caption(made),
        tuple(head),
        tuple(groups),
        tuple(notes),
        tuple(above) if several else (),
        options.label,
    )


def _caption(made: Scores) -> str:
    setting = made.block.setting
    measures = [MEASURES[each] for each in made.metrics]
    names = [f"{each.name} (%)" if each.percent else each.name for each in measures]
    what = listed(names)
    counts = [each for entry in made.block.entries for each in made.seeds(entry) if each]
    seeds = "one seed" if set(counts) == {1} else (
        f"mean ± standard deviation over {counted(counts)} seeds"
    )  # fmt: skip
    network = f"{setting['model']}, protocol {setting['protocol']}"
    epochs = _by_set(made.block.columns, lambda training: count(training.epochs, "epoch"))
    return f"Test {what}: {seeds}; {network}, {epochs}, {_epoch(made.when)}."


def _by_set(columns: Sequence[Column], told: Callable[[Training], str]) -> str:
    """A text about the training; if it differs between data sets, each with its data sets."""
    found: dict[str, list[str]] = {}
    for column in columns:
        found.setdefault(told(column.training), []).append(column.name)
    if len(found) == 1:
        return next(iter(found))
    return ", ".join(f"{text} ({', '.join(names)})" for text, names in found.items())


def _training_note(columns: Sequence[Column]) -> list[str]:
    """How the training differs between data sets, apart from its epochs; may be empty."""
    fields = {
        name: _by_set(columns, lambda training, name=name: str(getattr(training, name)))
        for name in field_names(Training)
        if name != "epochs" and len({getattr(each.training, name) for each in columns}) > 1
    }
    told = "; ".join(f"{name} {values}" for name, values in fields.items())
    return [f"Training differs between data sets: {told}."] if told else []


def _ranks(block: Block, metric: str) -> dict[str, str]:
    found = mean_ranks(block, metric)
    if found is None:
        return {}
    names, ranks, _ = found
    return {name: number(float(each), 2) for name, each in zip(names, ranks.mean, strict=True)}


def _rank_note(block: Block, ranks: Mapping[str, Mapping[str, str]]) -> str:
    if not any(ranks.values()):
        return (
            f"There is no mean rank: it needs two rows with {INFERENCE_SEEDS} seeds on each data "
            "set at the last epoch, and two data sets (views, sizes and corruptions of one set "
            "count as one)."
        )
    left = [
        each.name for each in block.entries if any(each.name not in of for of in ranks.values())
    ]
    told = f" Too few seeds, or controls: {', '.join(left)}." if left else ""
    return (
        f"mean rank: over data sets, 1 is best, among the rows with {INFERENCE_SEEDS} seeds on "
        f"each (views, sizes and corruptions of one set count as one).{told}"
    )


def frame(block: Block, metrics: Sequence[str], when: str) -> DataFrame:
    """The numbers of a table, one line per row: mean, sd and n of each metric on each data set.

    Scores are in per cent if they are in tables; sd is nan with one seed.
    """
    import pandas as pd  # noqa: PLC0415 - takes half a second

    columns: dict[tuple[str, str, str], list[float]] = {}
    for column, metric in Scores.of(block, metrics, when).places:
        own = [scores(column.rows[entry.name], metric, when) for entry in block.entries]
        key = column.name, metric
        columns[*key, "mean"] = [float(np.mean(v)) if v else math.nan for v in own]
        columns[*key, "sd"] = [float(np.std(v, ddof=1)) if len(v) > 1 else math.nan for v in own]
        columns[*key, "n"] = [len(v) for v in own]
    made = pd.DataFrame(columns, index=pd.Index([e.name for e in block.entries], name="row"))
    made.columns.names = ["benchmark", "metric", "statistic"]
    return made
