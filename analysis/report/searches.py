"""Results of searches for hyper-parameters, from the ``search.json`` that a sweep writes."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from analysis import findings, question
from analysis.blocks import bases
from analysis.contents import difference_cells, hardly_learned
from analysis.differences import RowRuns, difference
from analysis.findings import Finding
from analysis.metrics import MEASURES
from analysis.numbers import POINTS, mean_sd, number, signed
from analysis.question import STUDIES, Question
from analysis.records import Record, leading
from analysis.report import plots, sentences
from analysis.report.figures import INTERVALS, Figure, draw_differences
from analysis.report.plots import Curve, Panel
from analysis.report.tables import differences_table
from analysis.studyfile import StudyError
from analysis.table import Group, Table, cells

FILE = "search.json"
PREFIX = "search-"
"""of the names of its tables and figures"""
MISSING = "–"
Row = Mapping[str, Any]
"""A row of a table as the sweep wrote it."""


@dataclass(frozen=True)
class Search:
    """The searches of one study, with the same number of trials for every row of its tables."""

    study: str
    rows: Sequence[Row]

    @property
    def metric(self) -> str:
        """The metric that chose, as it is printed."""
        return MEASURES[self.rows[0]["metric"]].name

    @property
    def tables(self) -> dict[str, list[Row]]:
        """The rows of each table."""
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            found.setdefault(row["table"], []).append(row)
        return found


def read(root: Path, study: str = "") -> list[Search]:
    """The searches of the runs in a folder, or of one study.

    Raises:
        StudyError: a file was not written by a sweep of this version.
    """
    found = []
    for path in sorted(root.glob(f"{STUDIES}/{study or '*'}/{FILE}")):
        try:
            search = Search(path.parent.name, json.loads(path.read_text("utf-8")))
            if search.rows:
                tables(search)  # so that an error about missing fields names the file
                found.append(search)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise StudyError(f"{path}: not a search of this version ({error!r})") from error
    return found


def tables(search: Search) -> list[Table]:
    """What was chosen, and how well it does on seeds that the search has not used."""
    chosen = Table(
        f"{PREFIX}{search.study}",
        f"Search {search.study}: hyper-parameters chosen by select {search.metric}",
        ("", "trials", "stopped early", "failed", "chosen", f"select {search.metric} ↑",
         "regret, points ↓", "passes"),
        tuple(
            Group(table, tuple(cells(_chosen(row)) for row in rows))
            for table, rows in search.tables.items()
        ),
    )  # fmt: skip
    fresh = Table(
        f"{PREFIX}{search.study}-fresh",
        f"Search {search.study}: test {search.metric} against the row as written, fresh seeds, in "
        "points, paired by seed",
        ("", "n", "difference", "training 95 % CI", "population 95 % CI"),
        tuple(
            Group(table, tuple(cells(line) for row in rows for line in _fresh(row)))
            for table, rows in search.tables.items()
        ),
        ("Intervals are not corrected for the number of rows.",),
    )
    return [chosen, fresh]


class Compared(NamedTuple):
    """The chosen settings on fresh seeds, in the metric that leads."""

    tables: list[Table]
    """each against its row as written, and the study's comparisons between chosen ones; none if the
    search was written by a version that did not record these runs"""
    pairs: list[Finding]
    """these comparisons"""
    measure: str = ""


def compared(search: Search, found: Sequence[Record], asked: Question) -> Compared:
    """Compare the chosen settings on fresh seeds."""
    known = {record.run.id: record for record in found}
    groups, pairs, metrics = [], list[Finding](), list[str]()
    for name, rows in search.tables.items():
        chosen, lines = dict[str, RowRuns](), []
        for row in rows:
            ours, theirs = (
                RowRuns(row["row"], "", tuple(known[id] for id in row.get(key, ()) if id in known))
                for key in ("chosen", "written")
            )
            if not any(record.done for record in ours.records):
                continue
            metrics.append(leading(ours.records))
            chosen[question.as_written(ours.name)] = ours
            lines.append(_against(ours, theirs, metrics[-1]))
        if lines:
            groups.append(Group(name, tuple(map(cells, lines))))
        for row, base in _pairs(chosen, asked):
            made = difference(chosen[row], chosen[base], leading(chosen[row].records))
            hardly = hardly_learned(chosen[row])
            pairs.append(Finding(chosen[row].name, chosen[base].name, name, made, hardly=hardly))
        for record in known.values():
            record.forget()
    if not groups:
        return Compared([], [])
    measure = " or ".join(dict.fromkeys(MEASURES[metric].name for metric in metrics))
    title = f"Search {search.study}: test {measure} with fresh seeds, last epoch"
    head = ("", "n", "as written", "chosen", "difference, points", "training 95 % CI",
            "population 95 % CI")  # fmt: skip
    notes = (
        "Mean ± standard deviation over seeds, in percent. Intervals are not corrected for the "
        "number of rows.",
    )
    tables = [Table(f"{PREFIX}{search.study}-scores", title, head, tuple(groups), notes)]
    judged = findings.judged(pairs, asked.margin)
    if judged:
        made = differences_table(judged, _of_pairs(search), asked.margin, metrics[0])
        title = f"Search {search.study}: differences in test {measure} between chosen settings"
        tables.append(replace(made, title=f"{title}, fresh seeds, last epoch"))
    return Compared(tables, judged, measure)


def _of_pairs(search: Search) -> str:
    return f"{PREFIX}{search.study}-differences"


def _against(ours: RowRuns, theirs: RowRuns, metric: str) -> list[object]:
    """A chosen setting beside the row as written."""
    digits = MEASURES[metric].digits
    means = [mean_sd(findings.scores(row, metric), digits) for row in (theirs, ours)]
    if ours.records == theirs.records:
        return [ours.name, len(ours.by_seed()), *means, "the row as written won", MISSING, MISSING]
    told = difference_cells(difference(ours, theirs, metric))
    return [ours.name, told[0], *means, *told[1:4]]


def _pairs(chosen: Mapping[str, RowRuns], asked: Question) -> list[tuple[str, str]]:
    """The comparisons of the study, or those of every row with its base, as far as there are
    runs."""
    made = []
    for row, base in asked.family or [(name, "") for name in chosen]:
        if row in chosen:
            known = [base] if base else map(question.as_written, bases(row))
            made += [(row, each) for each in known if each in chosen and each != row][:1]
    return list(dict.fromkeys(made))


def _chosen(row: Row) -> list[object]:
    trials = row["trials"]
    states = Counter(each["state"] for each in trials)
    best = next((each for each in trials if each["number"] == row["winner"]), None)
    return [
        row["row"],
        len(trials),
        states["stopped"],
        states["failed"],
        "nothing: some trials are unfinished, or none is complete"
        if best is None
        else sentences.settings(best["values"]),
        "n/a" if best is None else number(_known(best["select"]), 4),
        number(POINTS * _known(row["regret"]), 2),
        f"{row['passes']:,}",
    ]


def _known(value: float | None) -> float:
    return math.nan if value is None else value


def _fresh(row: Row) -> list[list[object]]:
    found: list[list[object]] = []
    for each in row["fresh"]:
        ends = [
            f"{signed(each[name][0])} to {signed(each[name][1])}" if name in each else MISSING
            for name in ("training", "population")
        ]
        given = each["difference"]
        difference = "n/a" if given is None else signed(given)
        if "seeds" not in each and given is not None:
            difference = "the row as written won"
        found.append([f"{row['row']}: {each['what']}", each.get("seeds", 0), difference, *ends])
    return found


def draw_compared(
    search: Search, made: Compared, margin: float, folder: Path, suffixes: Sequence[str]
) -> Figure | None:
    """The comparisons between chosen settings; None if there are none."""
    name = _of_pairs(search)
    paths = tuple(folder / f"{name}{suffix}" for suffix in suffixes)
    names = {text: text for each in made.pairs if (text := f"{each.row} over {each.base}")}
    if not draw_differences(made.pairs, names, margin, made.measure, paths):
        return None
    return Figure(
        name,
        f"Paired differences in test {made.measure} between chosen settings, search {search.study}",
        f"Fresh seeds. Diamond: mean difference; 95 % intervals, {INTERVALS}. Grey: the margin of "
        f"{margin:g} points.",
        paths,
    )


def draw(search: Search, folder: Path, suffixes: Sequence[str]) -> Figure:
    """The expected score for each number of trials, on select and on test."""
    name = f"{PREFIX}{search.study}"
    paths = tuple(folder / f"{name}{suffix}" for suffix in suffixes)
    names = list(dict.fromkeys(row["row"] for row in search.rows))
    plots.curves(_panels(search), names, paths)
    return Figure(
        name,
        f"Score against number of trials, search {search.study}",
        f"Mean {search.metric} of the trial that the select split chooses among this many trials, "
        "over all subsets with a trial that was not stopped (Dodge et al., EMNLP 2019, without "
        "replacement). Left: on the select split; right: on the test split.",
        paths,
    )


def _panels(search: Search) -> list[Panel]:
    """Two for each table: select and test."""
    panels = []
    for table, rows in search.tables.items():
        for split in ("select", "test"):
            curves = []
            for row in rows:
                x = [float(each["trials"]) for each in row["expected"]]
                y = [_known(each[split]) for each in row["expected"]]
                if x:
                    curves.append(Curve(row["row"], x, y, y, y))
            panels.append(Panel(table, "trials", f"{split} {search.metric}", curves))
    return panels
