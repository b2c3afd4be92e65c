"""What the comparisons of a block find: differences, tests within the family, verdicts."""

from __future__ import annotations

import math
import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np

from analysis import stats
from analysis.blocks import Block, Column, bases
from analysis.contents import hardly_learned
from analysis.differences import Difference, RowRuns, difference
from analysis.facts import NONE
from analysis.metrics import MEASURES, to_test
from analysis.numbers import POINTS
from analysis.question import Question
from analysis.records import leading
from analysis.stats import ALPHA, INFERENCE_SEEDS, Interval

Verdict = Literal["better", "worse", "equivalent", "undecided", "not tested"]
SAME_SCANS = ("organamnist", "organcmnist", "organsmnist")
"""Views of the same scans: one data set wherever data sets are counted."""


@dataclass(frozen=True)
class Finding:
    """A row against its base on one data set, in points."""

    row: str
    base: str
    column: str
    difference: Difference | None
    """None where they share no seed with a result"""
    p: float = math.nan
    """of no difference, population, adjusted by Holm over the family; nan where not tested"""
    p_equivalent: float = math.nan
    """of a difference beyond the margin, be it in either direction, adjusted likewise"""
    p_within: float = math.nan
    """of a difference within the margin, adjusted likewise"""
    verdict: Verdict = "not tested"
    fallback: bool = False
    """whether the row's own base is missing, and another row takes its place"""
    hardly: bool = False
    """whether the row hardly learned there, so that the difference is not one of learning"""
    chosen: str = ""
    """the row that the base is there, if it was chosen on the select split"""

    @property
    def told(self) -> str:
        """The verdict in a word, marked if there are few seeds."""
        few = self.verdict != "not tested" and self.difference is not None and self.difference.few
        return f"{self.verdict} (few seeds)" if few else self.verdict


@dataclass(frozen=True)
class Overall:
    """A row against its base over the data sets of a block, in points."""

    row: str
    base: str
    sets: int
    """number of data sets on which both have a result; views of the same scans count as one"""
    seeds: tuple[int, ...]
    """how many on each"""
    estimate: float
    interval: Interval | None
    """for these data sets, other seeds and images; None if one of them was not tested"""
    wins: int
    ties: int
    losses: int
    improvement: float
    """chance that a seed of the row scores above a seed of its base, mean over data sets"""
    p: float
    """Wilcoxon over data sets, adjusted by Holm; nan where it cannot reach .05"""


def findings(block: Block, question: Question) -> list[Finding]:
    """Every comparison of the family on every data set, with the verdicts of the whole family."""
    pairs = block.contrasts(question)
    found = []
    for column in block.columns:
        for row, base in pairs:
            other = column.row(base)
            made = difference(column.rows[row], other, block.leads)
            hardly = hardly_learned(column.rows[row])
            chosen = "" if other.name == base else other.name
            found.append(Finding(row, base, column.name, made, hardly=hardly, chosen=chosen))
        column.forget()
    return judged(found, question.margin)


def of_rows(rows: Sequence[RowRuns], margin: float, when: str = "last") -> list[Finding]:
    """The rows of a table on one data set, each against its base, as a family; without those that
    were joined, which are only what ours are compared with.

    The base is what a row wraps, and for an upstream ``none``. If that is not in the table, it is
    the first row without a base in the table. ``none`` has no base.
    """
    names = {row.name: row for row in rows}
    own = {row.name: _own_base(row, names) for row in rows}
    first = next(name for name, base in own.items() if not base)
    leads = leading(record for row in rows for record in row.records)
    found = []
    for row in rows:
        base = own[row.name] or first
        if row.name not in (base, NONE) and not row.origin:
            made = difference(row, names[base], leads, when)
            column = next((each.run.benchmark for each in row.records), "")
            found.append(Finding(row.name, base, column, made, fallback=not own[row.name]))
    return judged(found, margin)


def _own_base(row: RowRuns, there: Container[str]) -> str:
    known = row.records[0].facts.bases if row.records else bases(row.name)
    return next((name for name in known if name in there and name != row.name), "")


def judged(found: Sequence[Finding], margin: float) -> list[Finding]:
    """The findings with p-values adjusted over all that can be tested, and their verdicts.

    better, worse: different from 0 after Holm. equivalent: within the margin after Holm, be it
    different from 0 or not. undecided: neither. not tested: what ``Difference.untested`` says.
    """
    tested = [
        (place, each.difference.variances)
        for place, each in enumerate(found)
        if each.difference is not None
        and each.difference.population is not None
        and each.difference.variances is not None
    ]
    differ = stats.holm([variances.p_zero() for _, variances in tested])
    same = stats.holm([variances.p_equivalent(margin) for _, variances in tested])
    beyond = stats.holm(
        [variances.excluded(abs(variances.estimate) - margin) for _, variances in tested]
    )
    result = list(found)
    for (place, variances), p, p_same, p_beyond in zip(tested, differ, same, beyond, strict=True):
        each = found[place]
        verdict: Verdict = "undecided"
        if p_same <= ALPHA:
            verdict = "equivalent"
        elif p <= ALPHA:
            verdict = "better" if variances.estimate > 0 else "worse"
        result[place] = replace(
            each, p=float(p), p_equivalent=float(p_same), p_within=float(p_beyond), verdict=verdict
        )
    return result


def overall(block: Block, found: Sequence[Finding], margin: float) -> tuple[list[Overall], str]:
    """The comparisons over at least two data sets, and why there is no test over them, if so."""
    pairs = list(dict.fromkeys((each.row, each.base) for each in found))
    columns = {column.name: column for column in block.columns}
    data_sets = {name: data_set(column.key) for name, column in columns.items()}
    groups = {
        pair: _grouped([each for each in found if (each.row, each.base) == pair], data_sets)
        for pair in pairs
    }
    groups = {pair: kept for pair, kept in groups.items() if len(kept) > 1}
    if not groups:
        return [], "the comparisons share fewer than two data sets"
    sets = {tuple(data_sets[group[0].column] for group in kept) for kept in groups.values()}
    tested, reason = np.empty(0), "the comparisons are not on the same data sets"
    if any(_interval(kept) is None for kept in groups.values()):
        reason = (
            f"some comparison is not tested (fewer than {INFERENCE_SEEDS} seeds, an incomplete "
            "repeat of folds, only one test patient, or equal predictions)"
        )
    elif len(sets) == 1:
        values = [[_mean(group) for group in kept] for kept in groups.values()]
        tested, reason = stats.wilcoxon_holm(values)
    made = []
    for place, ((row, base), kept) in enumerate(groups.items()):
        estimates = [_mean(group) for group in kept]
        wins, ties, losses = stats.win_tie_loss(estimates, margin)
        chances = [
            np.mean([_improvement(columns[each.column], each, block.leads) for each in group])
            for group in kept
        ]
        made.append(
            Overall(
                row,
                base,
                len(kept),
                _seeds(kept),
                float(np.mean(estimates)),
                _interval(kept),
                wins,
                ties,
                losses,
                float(np.mean(chances)),
                float(tested[place]) if len(tested) else math.nan,
            )
        )
    return made, reason


def _grouped(found: Sequence[Finding], data_sets: Mapping[str, str]) -> list[list[Finding]]:
    """Findings of one comparison by data set, which is told of each column."""
    groups: dict[str, list[Finding]] = {}
    for each in found:
        if each.difference is not None:
            groups.setdefault(data_sets[each.column], []).append(each)
    return list(groups.values())


def data_set(column: str) -> str:
    """What a column's key counts as: sizes and corruptions of one set share test images."""
    name, data = re.fullmatch(r"(.*?)( \[data \w+\])?", column, re.DOTALL).groups()  # type: ignore[union-attr]
    base = re.sub(r"\([^()]*\)$", "", name)
    if base in SAME_SCANS:
        return "organs"
    # A user's files of the same name may be different data sets.
    return base + (data or "") if ":" in base else base


def _seeds(groups: Sequence[Sequence[Finding]]) -> tuple[int, ...]:
    return tuple(each.difference.seeds for g in groups for each in g if each.difference)


def _mean(group: Sequence[Finding]) -> float:
    return float(np.mean([each.difference.estimate for each in group if each.difference]))


def _interval(groups: Sequence[Sequence[Finding]]) -> Interval | None:
    listed = [[each.difference.population for each in g if each.difference] for g in groups]
    known = [[interval for interval in group if interval is not None] for group in listed]
    if list(map(len, known)) != list(map(len, listed)):
        return None
    return stats.mean_interval(known)


def _improvement(column: Column, found: Finding, metric: str) -> float:
    ours, theirs = (scores(column.row(name), metric) for name in (found.row, found.base))
    return stats.probability_of_improvement(ours, theirs)


def scores(row: RowRuns, metric: str, when: str = "last") -> list[float]:
    """A metric for each seed for which it is defined; if it is a percentage, in points."""
    scale = POINTS if MEASURES[metric].percent else 1
    values = [scale * each.metric(metric, when=when) for each in row.by_seed().values()]
    return [value for value in values if not math.isnan(value)]


class Best(NamedTuple):
    """The row with the best mean of a column (empty if none has a result), and the others."""

    top: str
    tied: frozenset[str]
    """not significantly different from it, corrected for every pair of tested rows of the column,
    because the same numbers decide which row is the best"""
    untested: frozenset[str]
    """fewer than three seeds in common with it, or only one test patient"""
    detectable: tuple[float, ...] = ()
    """for each tested row, the smallest difference from the best that would have been found"""


def best(column: Column, names: Sequence[str], metric: str) -> Best:
    """The row with the best mean, the rows tied with it, and those not tested.

    Metrics without a known spread are not tested.
    """
    means = {name: scores(column.rows[name], metric) for name in names}
    means = {name: values for name, values in means.items() if values}
    if not means:
        return Best("", frozenset(), frozenset())
    sign = -1 if MEASURES[metric].lower else 1
    top = max(means, key=lambda name: sign * float(np.mean(means[name])))
    if metric not in to_test(column.leads):
        return Best(top, frozenset(), frozenset())
    others = [name for name in means if name != top]
    made = {name: difference(column.rows[name], column.rows[top], metric) for name in others}
    tested = {
        name: each.variances.p_zero()
        for name, each in made.items()
        if each is not None and each.variances is not None and each.seeds >= INFERENCE_SEEDS
    }
    pairs = math.comb(len(tested) + 1, 2)
    tied = frozenset(name for name, p in tested.items() if pairs * p > ALPHA)
    found = (each.detectable for name in tested if (each := made[name]) is not None)
    detectable = tuple(value for value in found if not math.isnan(value))
    return Best(top, tied, frozenset(others) - tested.keys(), detectable)


def mean_ranks(block: Block, metric: str) -> tuple[tuple[str, ...], stats.Ranks, int] | None:
    """Names and ranks of the rows with three seeds on each data set, and the number of sets."""
    sign = -1 if MEASURES[metric].lower else 1
    columns = [column for column in block.columns if column.done]
    found = {
        entry.name: [scores(column.rows[entry.name], metric) for column in columns]
        for entry in block.compared
    }
    whole = {
        name: [sign * float(np.mean(values)) for values in listed]
        for name, listed in found.items()
        if all(len(values) >= INFERENCE_SEEDS for values in listed)
    }
    groups: dict[str, list[int]] = {}
    for place, column in enumerate(columns):
        groups.setdefault(data_set(column.key), []).append(place)
    if len(whole) < 2 or len(groups) < 2:
        return None
    merged = [
        [float(np.mean([values[place] for place in places])) for places in groups.values()]
        for values in whole.values()
    ]
    return tuple(whole), stats.ranks(merged), len(groups)
