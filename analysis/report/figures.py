"""Figures from the rows of a comparison and from the blocks of a report."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from analysis import metrics, robustness
from analysis.blocks import (
    CORRUPTIONS,
    Block,
    Column,
    Entry,
)
from analysis.differences import RowRuns, difference
from analysis.exchange import LEVELS, Worth, worth
from analysis.facts import NONE, call_in
from analysis.findings import Finding, mean_ranks, of_rows, scores
from analysis.labels import labelled
from analysis.metrics import HEADLINE, MEASURES
from analysis.numbers import POINTS, starting
from analysis.question import MARGIN, OR
from analysis.records import Record, leading
from analysis.report import plots
from analysis.report.plots import (
    Band,
    Bar,
    Curve,
    Front,
    Mark,
    Panel,
    Point,
    Shares,
    Span,
    Stack,
    forest,
)
from analysis.report.tables import folds_note, patients_note, variants
from analysis.stats import INFERENCE_SEEDS, Interval
from analysis.tasks import task_named
from methods.naming import call_of, render

LONG = 12
"""Length from which an upstream's name is written as U."""
MOST = 14
"""The largest number of rows in a readable line plot."""
BINS = 10
"""Confidence bins in a reliability diagram."""
UPSTREAMS = 3
"""Fewest upstreams over which what a method adds is drawn."""
FEW_ROWS = 5
"""A confidence bin with fewer rows is not drawn."""
MOST_CLASSES = 20
IMAGES = 4
"""Axes of images, (N, H, W, C); rows of a table have two."""
LABELLED = ("train", "meta")
"""Rows that cost a label."""
MANY = f", or with more than {plots.BANDS} rows"


@dataclass(frozen=True)
class Figure:
    """A drawn figure: its files, and what it shows in words."""

    name: str
    title: str
    caption: str
    paths: tuple[Path, ...]


def draw_forest(rows: Sequence[RowRuns], path: Path, when: str = "last") -> None:
    """Draw the leading metric of rows on one benchmark, and the differences in their table.

    A long upstream that several rows share is called U; rows whose method declares a label are
    shown with it.

    Raises:
        ValueError: no run has ended with a result.
    """
    against = {each.row: each.difference for each in of_rows(rows, MARGIN, when)} if rows else {}
    given, rows = rows, labelled(rows, {})
    done = [record for row in rows for record in row.records if record.done]
    if not done:
        raise ValueError("no run has ended with a result")
    leads = leading(done)
    upstream = common_upstream(rows)
    names = [row.name.replace(upstream, "U") if upstream else row.name for row in rows]
    bars = []
    for row, one, name in zip(rows, given, names, strict=True):
        found = against.get(one.name)
        bars.append(
            Bar(
                name=name,
                values=scores(row, leads, when),
                difference=math.nan if found is None else found.estimate,
                training=_ends(found.training) if found is not None else None,
                population=_ends(found.population) if found is not None else None,
            )
        )
    run = done[0].run
    seeds = len({record.run.seed for record in done})
    forest(
        bars,
        title=f"{run.benchmark}, {run.model}, {run.training.epochs} epochs, protocol "
        f"{run.protocol}, {seeds} seeds",
        note=f"U = {upstream}" if upstream else "",
        axis_name=_axis(leads),
        path=path,
    )


def _axis(metric: str) -> str:
    return f"test {MEASURES[metric].name}, %"


def common_upstream(rows: Sequence[RowRuns]) -> str:
    """The long upstream that occurs in most of the names, or an empty string."""
    names = [row.name for row in rows]
    counts = {
        row.upstream: sum(row.upstream in name for name in names)
        for row in rows
        if len(row.upstream) >= LONG
    }
    best = max(counts, key=lambda upstream: counts[upstream], default="")
    return best if counts.get(best, 0) > 1 else ""


def _ends(interval: Interval | None) -> tuple[float, float] | None:
    return None if interval is None else (interval.low, interval.high)


def draw_all(
    block: Block, found: Sequence[Finding], margin: float, folder: Path, suffixes: Sequence[str]
) -> list[Figure]:
    """Every figure for which a block has data, in the order of a report."""
    made = []
    for name, maker in MAKERS.items():
        paths = tuple(folder / f"{name}{suffix}" for suffix in suffixes)
        told = maker(_Drawing(block, found, margin), paths)
        if told is not None:
            made.append(Figure(name, *told, paths))
        for column in block.columns:
            column.forget()
    return made


@dataclass(frozen=True)
class _Drawing:
    """What the figures of a block are drawn from."""

    block: Block
    found: Sequence[Finding]
    margin: float

    @property
    def columns(self) -> list[Column]:
        return [column for column in self.block.columns if column.done]

    @property
    def measure(self) -> str:
        """The name of the leading metric."""
        return MEASURES[self.block.leads].name

    @property
    def axis(self) -> str:
        """The name of an axis that shows it."""
        return _axis(self.block.leads)

    def of(self, column: Column, name: str) -> list[float]:
        """The leading metric of each seed of a row, in points."""
        return scores(column.rows[name], self.block.leads)

    def shown(self, kept: Container[str] = ()) -> tuple[list[Entry], str]:
        """Rows for a line plot, without controls, and a note on those left out.

        ``none`` goes first, then the rows to keep, then those with the best leading metric.
        """
        there = {
            entry: mean for entry in self.block.compared if (mean := self._mean(entry)) is not None
        }
        if len(there) <= MOST:
            return list(there), ""
        wanted = sorted(there, key=lambda e: (e.row != NONE, e.name not in kept, -there[e]))[:MOST]
        what = "none, those that no other row beats in both, then" if kept else "none, then"
        return (
            [entry for entry in there if entry in wanted],
            f" {MOST} of {len(there)} rows are drawn: {what} those with the highest "
            f"{self.measure}.",
        )

    def _mean(self, entry: Entry) -> float | None:
        """Mean score minus that of all rows, over the data sets with results, if any."""
        own = [
            float(np.mean(values)) - self._middle[column.name]
            for column in self.columns
            if (values := self.of(column, entry.name))
        ]
        return float(np.mean(own)) if own else None

    @cached_property
    def _middle(self) -> dict[str, float]:
        """Mean score over the rows of each data set."""
        return {
            column.name: float(
                np.mean([np.mean(v) for name in column.rows if (v := self.of(column, name))])
            )
            for column in self.columns
        }

    def short(self, names: Sequence[str]) -> tuple[list[str], str]:
        """Names with the long upstream that most of them share written as U, and what U is."""
        rows = [RowRuns(each.name, each.facts.upstream, ()) for each in self.block.entries]
        upstream = common_upstream(rows)
        if not upstream:
            return list(names), ""
        return [name.replace(upstream, "U") for name in names], f" U = {upstream}."


INTERVALS = "thin: population (other seeds and test data), thick: training (other seeds)"
Paths = Sequence[Path]
Told = tuple[str, str] | None
"""Title and caption of a figure; None if there is nothing to draw."""


def _differences(drawing: _Drawing, paths: Paths) -> Told:
    names = {f"{f.row} over {f.base}": "" for f in drawing.found}
    short, note = drawing.short(list(names))
    names = dict(zip(names, short, strict=True))
    shown = [f for column in drawing.columns for f in drawing.found if f.column == column.name]
    if not draw_differences(shown, names, drawing.margin, drawing.measure, paths):
        return None
    few = all(each.difference is None or each.difference.population is None for each in shown)
    told = f"fewer than {INFERENCE_SEEDS} seeds: no interval is drawn" if few else INTERVALS
    cut = " ".join(["", *folds_note(drawing.columns), *patients_note(drawing.columns)])
    return f"Paired differences in test {drawing.measure}", (
        f"Diamond: mean difference, paired by seed; 95 % intervals, {told}.{cut} Grey: the margin "
        f"of {drawing.margin:g} points.{note}"
    )


def draw_differences(
    found: Sequence[Finding], names: Mapping[str, str], margin: float, measure: str, paths: Paths
) -> bool:
    """Draw one panel for each data set; whether there was a difference to draw.

    ``names`` is how each comparison, "row over base", is written, in the order of the lines.
    """
    panels = []
    for column in dict.fromkeys(each.column for each in found):
        of = {f"{f.row} over {f.base}": f.difference for f in found if f.column == column}
        spans = [
            None
            if (made := of.get(name)) is None
            else Span(made.estimate, _ends(made.training), _ends(made.population))
            for name in names
        ]
        if any(spans):
            panels.append((column, spans))
    if panels:
        plots.intervals(panels, list(names.values()), margin, f"points of {measure}", paths)
    return bool(panels)


def _upstreams(drawing: _Drawing, paths: Paths) -> Told:
    """What a method adds to each of its upstreams, on the same labelled rows."""
    panels, letters = [], dict[str, str]()
    for column in drawing.columns:
        made: dict[str, list[Mark]] = {}
        for entry in drawing.block.entries:
            upstream = entry.facts.upstream
            if not entry.facts.wraps or upstream == NONE:
                continue
            suffix = "@train" if entry.facts.needs_meta else ""
            base = drawing.block.beside(entry, upstream + suffix)
            none = drawing.block.beside(entry, NONE + suffix)
            spans = [
                _span(column, *pair, drawing.block.leads)
                for pair in ((base, none), (entry.name, base))
            ]
            if spans[0] is None or spans[1] is None:
                continue
            letter = letters.setdefault(upstream, chr(ord("a") + len(letters) % 26))
            series = entry.row.replace(f"upstream={upstream}", "upstream=U")
            made.setdefault(series, []).append(Mark(series, letter, spans[0], spans[1]))
        marks = [mark for own in made.values() if len(own) >= UPSTREAMS for mark in own]
        if marks:
            panels.append((column.name, marks))
    if not panels:
        return None
    names = list(dict.fromkeys(mark.name for _, marks in panels for mark in marks))
    axes = "upstream U over none, points", "row over its upstream, points"
    plots.gains(panels, names, axes, paths)
    told = ", ".join(f"{letter}: {upstream}" for upstream, letter in letters.items())
    return "What a method adds to an upstream, against what the upstream does", (
        f"Mean paired differences in test {drawing.measure} with 95 % intervals (population, or "
        "training where there is none); for methods that learn from meta rows on the same training "
        f"rows (@train). On the dotted line a row gives back all that its upstream costs. {told}."
    )


def _span(column: Column, row: str, base: str, metric: str) -> Span | None:
    if not (row and base) or row == base:
        return None
    made = difference(column.rows[row], column.rows[base], metric)
    if made is None:
        return None
    return Span(made.estimate, _ends(made.training), _ends(made.population))


def _cost_front(drawing: _Drawing, paths: Paths) -> Told:
    fronts = []
    for column in drawing.columns:
        points = []
        for entry in drawing.block.compared:
            values = drawing.of(column, entry.name)
            records = column.rows[entry.name].by_seed().values()
            if values:
                seconds = np.mean([each.result["cost"]["charged_seconds"] for each in records])
                sd = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
                points.append(Point(entry.name, float(seconds), float(np.mean(values)), sd))
        if points:
            fronts.append((column.name, points, [points[each].name for each in pareto(points)]))
    if not fronts:
        return None
    # The grey line is computed from all rows; its rows are kept before merely good ones.
    entries, left_out = drawing.shown(frozenset().union(*(best for _, _, best in fronts)))
    names, note = drawing.short([entry.name for entry in entries])
    renamed = dict(zip([entry.name for entry in entries], names, strict=True))
    panels = []
    for heading, points, best in fronts:
        drawn = [each for each in points if each.name in renamed]
        there = [each.name for each in drawn]
        front = [there.index(name) for name in best if name in there]
        panels.append(
            Front(heading, [each._replace(name=renamed[each.name]) for each in drawn], front)
        )
    plots.fronts(panels, names, ("charged seconds per run", drawing.axis), paths)
    return f"{starting(drawing.measure)} against charged time", (
        "Mean over seeds; whiskers: one standard deviation over seeds (none with one seed). Grey "
        f"line: rows that no other row beats in both.{left_out}{note}"
    )


def pareto(points: Sequence[Point]) -> list[int]:
    """Indices of the points for which no other is as cheap and better, by increasing cost."""
    order = sorted(range(len(points)), key=lambda each: (points[each].x, -points[each].y))
    front: list[int] = []
    for each in order:
        if not front or points[each].y > points[front[-1]].y:
            front.append(each)
    return front


def _learning(drawing: _Drawing, paths: Paths) -> Told:
    entries, left_out = drawing.shown()
    names, note = drawing.short([entry.name for entry in entries])
    panels = []
    for column in drawing.columns:
        by_epoch, by_time = [], []
        for entry, name in zip(entries, names, strict=True):
            paths_of_seeds = [_path(each) for each in column.rows[entry.name].by_seed().values()]
            kept = [each for each in paths_of_seeds if each is not None]
            if not kept:
                continue
            epochs = min(len(values) for values, _ in kept)
            values = np.array([each[:epochs] for each, _ in kept])
            seconds = np.array([each[:epochs] for _, each in kept]).mean(axis=0)
            middle = values.mean(axis=0)
            sd = values.std(axis=0, ddof=1) if len(values) > 1 else np.zeros(epochs)
            low, high = (middle - sd).tolist(), np.minimum(middle + sd, 1).tolist()
            by_epoch.append(Curve(name, list(range(1, epochs + 1)), middle.tolist(), low, high))
            by_time.append(Curve(name, seconds.tolist(), middle.tolist(), low, high))
        if by_epoch:
            chosen = f"select {column.done[0].selecting[1]}"
            panels.append(Panel(column.name, "epoch", chosen, by_epoch))
            panels.append(Panel(column.name, "charged seconds", chosen, by_time))
    if not panels:
        return None
    plots.curves(panels, names, paths)
    return "Learning curves", (
        "Select split after each epoch, against epochs and against charged time; band: "
        f"one standard deviation over seeds (none with one seed{MANY}).{left_out}{note}"
    )


def _path(record: Record) -> tuple[list[float], list[float]] | None:
    """The metric that selects and charged seconds up to each epoch; None if undefined."""
    times = record.lines_of("timing.jsonl")
    name = record.selecting[0]
    values = [float(line["select"][name]) for line in record.lines if "select" in line]
    seconds = np.cumsum([line["charged_seconds"] for line in times]).tolist()
    if not values or len(values) != len(seconds) or any(map(math.isnan, values)):
        return None
    return values, seconds


def _ranks(drawing: _Drawing, paths: Paths) -> Told:
    found = mean_ranks(drawing.block, drawing.block.leads)
    if found is None or len(found[0]) < 3:
        return None
    names, ranks, sets = found
    shown, note = drawing.short(names)
    title = f"{len(names)} rows over {sets} data sets"
    plots.critical_difference(
        shown, ranks.mean.tolist(), ranks.critical_difference, ranks.groups, title, paths
    )
    return "Mean ranks with the critical difference", (
        f"Ranks of mean test {drawing.measure} over {sets} data sets; Nemenyi, 5 %. With few data "
        f"sets the critical difference is wide.{note}"
    )


def _recall(drawing: _Drawing, paths: Paths) -> Told:
    labels = list(dict.fromkeys((each.row, each.base) for each in drawing.found))
    tables = []
    for column in drawing.columns:
        classes = column.done[0].result["data"]["classes"]
        if len(classes) > MOST_CLASSES:
            continue
        values = np.full((len(labels), len(classes)), math.nan)
        for place, (row, base) in enumerate(labels):
            ours, theirs = column.rows[row].by_seed(), column.row(base).by_seed()
            seeds = ours.keys() & theirs.keys()
            if seeds:
                changes = [_recalls(ours[seed]) - _recalls(theirs[seed]) for seed in seeds]
                values[place] = POINTS * np.mean(changes, axis=0)
        if not np.isnan(values).all():
            tables.append((column.name, classes, values))
    if not tables:
        return None
    names, note = drawing.short([f"{row} over {base}" for row, base in labels])
    plots.maps(tables, names, paths)
    return "Change in recall, class by class", (
        "Points of test recall that a row gains (purple) or loses (orange) over its base, mean "
        f"over paired seeds; no interval is given for a single class.{note}"
    )


def _recalls(record: Any) -> np.ndarray:
    values = record.result["metrics"]["last"]["test"]["recall"]
    return np.array([math.nan if value is None else value for value in values], dtype=float)


def _calibration(drawing: _Drawing, paths: Paths) -> Told:
    entries, left_out = drawing.shown()
    names, note = drawing.short([entry.name for entry in entries])
    panels = []
    for column in drawing.columns:
        if not task_named(column.done[0].kind).exclusive:
            continue
        made = []
        for entry, name in zip(entries, names, strict=True):
            records = [e for e in column.rows[entry.name].by_seed().values() if not e.filed]
            if records:
                made.append(_reliability(name, records))
            column.forget()
        panels.append(Panel(column.name, "confidence", "share correct", made, diagonal=True))
    if not panels:
        return None
    plots.curves(panels, names, paths)
    return "Calibration", (
        "Share of correct predictions against confidence (the probability of the predicted class) "
        f"in ten bins, over all seeds; bins with fewer than {FEW_ROWS} rows are left out. Below "
        f"the grey line, a network is overconfident.{left_out}{note}"
    )


def _reliability(name: str, records: Sequence[Any]) -> Curve:
    tops, rights = [], []
    for record in records:
        logits = record.predictions["test_last_logits"]
        tops.append(metrics.probabilities(logits, record.kind).max(axis=1))
        rights.append(record.item_values("accuracy"))
    top, right = np.concatenate(tops), np.concatenate(rights)
    bins = np.minimum((top * BINS).astype(int), BINS - 1)
    kept = [each for each in range(BINS) if (bins == each).sum() >= FEW_ROWS]
    x = [float(top[bins == each].mean()) for each in kept]
    y = [float(right[bins == each].mean()) for each in kept]
    return Curve(name, x, y, y, y)


def _phases(drawing: _Drawing, paths: Paths) -> Told:
    entries = [
        entry
        for entry in drawing.block.entries
        if any(column.rows[entry.name].by_seed() for column in drawing.columns)
    ]
    panels = []
    for column in drawing.columns:
        costs = [
            [each.result["cost"] for each in column.rows[entry.name].by_seed().values()]
            for entry in entries
        ]
        phases = list(dict.fromkeys(key for of in costs for cost in of for key in cost["phases"]))
        parts = {
            phase: [
                float(np.median([cost["phases"].get(phase, 0) / cost["epochs"] for cost in of]))
                if of
                else math.nan
                for of in costs
            ]
            for phase in phases
        }
        panels.append(Stack(column.name, parts))
    if not panels:
        return None
    names, note = drawing.short([entry.name for entry in entries])
    plots.stacks(panels, names, "charged seconds per epoch", paths)
    return "Where the time goes", f"Charged seconds per epoch by phase, medians over seeds.{note}"


def _robustness(drawing: _Drawing, paths: Paths) -> Told:
    entries, left_out = drawing.shown()
    names, note = drawing.short([entry.name for entry in entries])
    panels = []
    for heading, parameter, levels in corrupted(drawing.columns):
        made = []
        for entry, name in zip(entries, names, strict=True):
            of = [(level, drawing.of(column, entry.name)) for level, column in levels]
            curve = _curve(name, [(level, values) for level, values in of if values])
            if curve is not None:
                made.append(curve)
        if made:
            panels.append(Panel(heading, parameter, drawing.axis, made))
    if not panels:
        return None
    plots.curves(panels, names, paths)
    return "Robustness to corrupted labels and classes", (
        f"Mean test {drawing.measure} against the share of wrong labels or the imbalance of "
        "classes; band: "
        f"one standard deviation over seeds (none with one seed{MANY}).{left_out}{note}"
    )


def _corruptions(drawing: _Drawing, paths: Paths) -> Told:
    entries, left_out = drawing.shown()
    shown, note = drawing.short([entry.name for entry in entries])
    panels = []
    for column in drawing.columns:
        rows = robustness.narrowed([column.rows[entry.name] for entry in entries])
        kinds = list(dict.fromkeys(each for row in rows for each in robustness.corruptions(row)))
        if kinds:
            values = [[1 - robustness.mean_error(row, each) for each in kinds] for row in rows]
            panels.append((column.name, [each.replace("_", " ") for each in kinds], values))
    if not panels:
        return None
    plots.maps([(name, kinds, np.array(values)) for name, kinds, values in panels],
               shown, paths, shares=True)  # fmt: skip
    return "Balanced accuracy under each corruption", (
        "Mean over seeds and severities of the balanced accuracy (1 minus the balanced error) on "
        f"test images, clean and under each corruption; fgsm is an attack.{left_out}{note}"
    )


def _severities(drawing: _Drawing, paths: Paths) -> Told:
    entries, left_out = drawing.shown()
    names, note = drawing.short([entry.name for entry in entries])
    panels = []
    for column in drawing.columns:
        made = []
        rows = robustness.narrowed([column.rows[entry.name] for entry in entries])
        for row, name in zip(rows, names, strict=True):
            own = map(robustness.by_severity, robustness.evaluated(row))
            points = [(float(place), each) for place, each in enumerate(zip(*own, strict=True))]
            if points and (curve := _curve(name, points)) is not None:
                made.append(curve)
        if made:
            panels.append(Panel(column.name, "severity (0: clean)", "test accuracy, %", made))
    if not panels:
        return None
    plots.curves(panels, names, paths)
    return "Accuracy by severity of corruption", (
        "Test accuracy on clean images and at each severity, mean over corruptions and seeds; "
        f"band: one standard deviation over seeds (none with one seed{MANY}).{left_out}{note}"
    )


def corrupted(columns: Sequence[Column]) -> Iterator[tuple[str, str, list[tuple[float, Column]]]]:
    """Data sets that differ only in one corruption: heading, its name, and a column per level."""
    for parameter in CORRUPTIONS:
        for heading, levels in _levels(columns, parameter, 0 if parameter == "noise" else 1):
            yield heading, parameter, levels


def _levels(
    columns: Sequence[Column], parameter: str, default: float
) -> Iterator[tuple[str, list[tuple[float, Column]]]]:
    """Data sets that differ only in an argument: a heading, and a column per value."""
    names = {column.key: column.name for column in columns}
    groups: dict[str, list[tuple[float, Column]]] = {}
    for column in columns:
        call = call_in(column.benchmark)
        if call is None:
            continue
        given = dict(call.arguments)
        level = given.pop(parameter, default)
        rest = render(call_of(call.name, given))
        # The name of a user's own data set contains its file before the arguments.
        written = column.benchmark.removeprefix(call.name)
        kept = rest.removeprefix(call.name)
        own = column.key.replace(written, kept) if written else column.key
        if isinstance(level, int | float):
            groups.setdefault(names.get(own, own), []).append((float(level), column))
    for heading, levels in groups.items():
        if len(levels) > 1:
            yield heading, sorted(levels, key=lambda each: each[0])


def _exchange(drawing: _Drawing, paths: Paths) -> Told:
    """What each row is worth in labelled rows of its base."""
    panels, names, leads = [], [], drawing.block.leads
    pairs = list(dict.fromkeys((each.row, each.base) for each in drawing.found))
    for heading, levels in _levels(drawing.columns, "rows_per_class", 0):
        lines, columns = {}, [column for _, column in levels]
        for row, base in pairs:
            line = [] if OR in base else _worth(columns, row, base, leads)
            if line:
                lines[f"{row} over {base}"] = line
        if lines:
            panels.append((heading, lines))
            names += [name for name in lines if name not in names]
    if not panels or len(names) > MOST:
        return None
    shown, note = drawing.short(names)
    renamed = dict(zip(names, shown, strict=True))
    plots.exchange(
        [(heading, {renamed[name]: line for name, line in of.items()}) for heading, of in panels],
        shown,
        ("labelled rows", "labelled rows that its base needs for as much"),
        paths,
    )
    as_good, values = f"has the {drawing.measure} that a row has", "values"
    if drawing.block.leads == HEADLINE:
        as_good, values = "is as accurate as a row is", "accuracies"
    return "What a row is worth in labelled rows", (
        f"With how many labelled rows its base {as_good} with those on the x axis, "
        f"by the base's own {values} (isotonic, linear in the logarithm between them), to which "
        "the difference is added. On the grey line the row is worth no label. Bars: 95 % interval "
        "of the difference (population, or training where there is none), with the base's curve "
        "taken as measured. Triangles: beyond the numbers of rows that the base was trained on."
        + note
    )


def _worth(columns: Sequence[Column], row: str, base: str, metric: str) -> list[Worth]:
    """By rising numbers of labelled rows; empty if the base was trained with too few numbers, or
    if the row has other numbers of labelled rows than the base."""
    known = []
    for column in columns:
        records = list(column.rows[base].by_seed().values())
        if records:
            rows = {_labelled(each) for each in records}
            if len(rows | {_labelled(e) for e in column.rows[row].by_seed().values()}) > 1:
                return []
            mean = float(np.mean(scores(column.rows[base], metric)))
            known.append((float(rows.pop()), mean, column, float(len(records))))
    known.sort(key=lambda each: each[0])
    rows, means, places, weights = zip(*known, strict=True) if known else ((), (), (), ())
    if len(set(rows)) < max(LEVELS, len(rows)):
        return []
    gains = []
    for column in places:
        span = _span(column, row, base, metric)
        gains.append(None if span is None else (span.estimate, span.population or span.training))
        column.forget()
    return worth(rows, means, gains, weights)


def _labelled(record: Record) -> int:
    return sum(record.result["data"]["rows"][part] for part in LABELLED)


def _curve(name: str, points: Sequence[tuple[float, Sequence[float]]]) -> Curve | None:
    """Mean and one standard deviation of the scores at each x; None if there are none."""
    if not points:
        return None
    middle = [float(np.mean(values)) for _, values in points]
    sd = [float(np.std(values, ddof=1)) if len(values) > 1 else 0.0 for _, values in points]
    low = [m - s for m, s in zip(middle, sd, strict=True)]
    high = [m + s for m, s in zip(middle, sd, strict=True)]
    return Curve(name, [place for place, _ in points], middle, low, high)


def _sensitivity(drawing: _Drawing, paths: Paths) -> Told:
    panels, names = [], []
    for (method, upstream), rows in variants(drawing.block).items():
        for argument in dict.fromkeys(key for _, given in rows for key in given):
            lines: dict[str, list[tuple[str, Entry]]] = {}
            for entry, given in rows:
                rest = {key: value for key, value in given.items() if key != argument}
                told = ", ".join(f"{key}={value}" for key, value in rest.items())
                label = f"{method}({told})" if told else method
                lines.setdefault(label, []).append((given.get(argument, "default"), entry))
            lines = {label: points for label, points in lines.items() if len(points) > 1}
            if not lines:
                continue
            ticks = sorted({value for of in lines.values() for value, _ in of}, key=_rising)
            names += [label for label in lines if label not in names]
            over = drawing.short([upstream])[0][0]
            for column in drawing.columns:
                made = []
                for label, points in lines.items():
                    ordered = sorted(points, key=lambda each: ticks.index(each[0]))
                    of = [(ticks.index(v), drawing.of(column, e.name)) for v, e in ordered]
                    curve = _curve(
                        label, [(float(place), values) for place, values in of if values]
                    )
                    if curve is not None:
                        made.append(curve)
                heading = f"{column.name}, {method} over {over}"
                panels.append(Panel(heading, argument, drawing.axis, made, ticks))
    panels = [panel for panel in panels if panel.curves][:MOST]
    if not panels or len(names) > 2 * MOST:
        return None
    plots.curves(panels, names, paths)
    return "Sensitivity to hyper-parameters", (
        f"Mean test {drawing.measure} of rows that differ only in one argument; default: the "
        "argument is not given. Band: one standard deviation over seeds. A value chosen here was "
        f"chosen on the test split.{drawing.short(['U'])[1]}"
    )


def _rising(value: str) -> tuple[int, float, str]:
    """Sort key: default first, then numbers by size, then words."""
    try:
        return 1, float(value), value
    except ValueError:
        return (0, 0.0, value) if value == "default" else (2, 0.0, value)


def _weights(drawing: _Drawing, paths: Paths) -> Told:
    panels = []
    for column, entry, arrays in _learned(drawing, "weight"):
        samples: dict[str, list[np.ndarray]] = {}
        for learned, wrong in arrays:
            seen = learned["seen"] > 0
            if not wrong:
                samples.setdefault("rows", []).append(learned["weight"][seen])
            else:
                mislabelled = np.isin(np.arange(len(seen)), wrong["rows"])
                samples.setdefault("correct label", []).append(
                    learned["weight"][seen & ~mislabelled]
                )
                samples.setdefault("wrong label", []).append(learned["weight"][seen & mislabelled])
        joined = {name: np.concatenate(parts) for name, parts in samples.items()}
        name = drawing.short([entry.name])[0][0]
        kept = {name: values for name, values in joined.items() if len(values)}
        panels.append(Shares(f"{column.name}, {name}", "learned weight (1: unchanged)", kept))
    panels = [panel for panel in panels if panel.samples][:MOST]
    if not panels:
        return None
    plots.histograms(panels, paths)
    return "What was learned: weights", (
        "Distribution of the learned weights of training rows, over all seeds; each histogram is "
        "normalised on its own." + drawing.short(["U"])[1]
    )


def _labels(drawing: _Drawing, paths: Paths) -> Told:
    tables, classes = [], []
    for column, entry, arrays in _learned(drawing, "label"):
        own = column.done[0].result["data"]["classes"]
        if len(own) > MOST_CLASSES or (classes and own != classes):
            continue
        known = [(learned, wrong) for learned, wrong in arrays if wrong]
        if not known:
            continue
        kept = [learned["seen"][wrong["rows"]] > 0 for learned, wrong in known]
        labels = np.concatenate(
            [each["label"][wrong["rows"]][k] for (each, wrong), k in zip(known, kept, strict=True)]
        )
        true = np.concatenate(
            [wrong["before"][k] for (_, wrong), k in zip(known, kept, strict=True)]
        )
        shares = [
            labels[true == each].mean(axis=0) if (true == each).any() else np.zeros(len(own))
            for each in range(len(own))
        ]
        classes = own
        name = drawing.short([entry.name])[0][0]
        tables.append((f"{column.name}, {name}", own, np.array(shares)))
    tables = tables[:MOST]
    if not tables:
        return None
    plots.maps(tables, classes, paths, shares=True)
    return "What was learned: labels", (
        "Mean learned label (columns) of the training rows whose label was corrupted, by their "
        "true class (rows); corrected labels lie on the diagonal." + drawing.short(["U"])[1]
    )


def _samples(drawing: _Drawing, paths: Paths) -> Told:
    """Only for the first data set: augmentation looks alike on the others."""
    column, bands = drawing.columns[0], []
    for entry in drawing.shown()[0]:
        stored = (r.arrays("samples.npz") for r in column.rows[entry.name].by_seed().values())
        arrays = next((each for each in stored if each), None)
        if arrays is None or entry.row == NONE or arrays["drawn"].ndim != IMAGES:
            continue
        pairs = np.stack([arrays["drawn"], arrays["trained"]], axis=1) / 255
        captions = ["drawn", "trained on"] * len(pairs)
        name = drawing.short([entry.name])[0][0]
        bands.append(Band(name, pairs.reshape(-1, *pairs.shape[2:]), captions))
    if not bands:
        return None
    plots.sample_bands(bands, f"{column.name}: training images", paths)
    return "What was learned: augmented images", (
        "For each row, the first training images of the last epoch of one seed, as drawn and as "
        "trained on; for a method that adds images, the added images next to those that they were "
        f"made from.{drawing.short(['U'])[1]}"
    )


Arrays = dict[str, np.ndarray]


def _learned(
    drawing: _Drawing, name: str
) -> Iterator[tuple[Column, Entry, list[tuple[Arrays, Arrays]]]]:
    """What rows learned and the corrupted labels (empty if there are none), a pair per seed."""
    for column in drawing.columns:
        for entry in drawing.block.entries:
            found = []
            for record in column.rows[entry.name].by_seed().values():
                learned = record.arrays("learned.npz")
                if name in learned:
                    learned.setdefault("seen", np.ones(len(learned[name]), int))
                    found.append((learned, record.arrays("corruption.npz")))
            if found:
                yield column, entry, found


MAKERS: dict[str, Callable[[_Drawing, Paths], Told]] = {
    "differences": _differences,
    "upstreams": _upstreams,
    "cost": _cost_front,
    "learning": _learning,
    "ranks": _ranks,
    "recall": _recall,
    "calibration": _calibration,
    "phases": _phases,
    "robustness": _robustness,
    "corruptions": _corruptions,
    "severities": _severities,
    "exchange": _exchange,
    "sensitivity": _sensitivity,
    "weights": _weights,
    "labels": _labels,
    "samples": _samples,
}
"""Figures by the names of their files, in the order of a report."""
