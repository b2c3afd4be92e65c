"""Rows of runs and the differences between them, with intervals over other seeds and images."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from analysis.numbers import POINTS, median
from analysis.records import Record, read
from analysis.runs import Run, folder_of
from analysis.stats import (
    FEW_SEEDS,
    INFERENCE_SEEDS,
    Estimated,
    Interval,
    crossed,
    resampled,
    smallest_detectable,
    training_interval,
)

SMALL_TEST, SMALL_TEST_SEEDS, SEEDS = 500, 30, 10


@dataclass(frozen=True)
class Difference:
    """A row against the first one, in points, paired by seed."""

    estimate: float
    seeds: int
    training: Interval | None
    """None with fewer than three seeds; with folds, which have no fixed test split; and if the
    difference is the same for all seeds, so that there is no variance"""
    population: Interval | None
    """with folds, that of Nadeau and Bengio; None with fewer than three seeds, if a repeat of the
    folds is incomplete, if all predictions are equal, so that there is no variance, and with only
    one test patient"""
    detectable: float
    """Smallest difference found with 80 % power, population; nan if no variance is known."""
    variances: Estimated | None = None
    """behind the population interval; None with one seed, and with only one test patient"""
    folds: int = 0
    patients: int = 0
    """of the test split, whose images are not independent; 0 if unknown"""
    unpaired: str = ""
    """why test images are not paired; empty if they are"""

    @property
    def interval(self) -> Interval | None:
        """The interval to show if there is room for one: population, else training."""
        return self.population or self.training

    @property
    def few(self) -> bool:
        """Whether a verdict is marked "few seeds"."""
        return self.seeds < FEW_SEEDS

    @property
    def untested(self) -> str:
        """Why there is no population interval; empty if there is one."""
        if self.population is not None or self.unpaired:
            return self.unpaired
        if self.variances is not None and not self.variances.se > 0:
            return "their predictions are identical or differ by a constant"
        if self.seeds < INFERENCE_SEEDS:
            return f"there are fewer than {INFERENCE_SEEDS} seeds"
        if self.patients == 1:
            return "all test images are from one patient"
        return f"a repeat of the {self.folds} folds is incomplete"


@dataclass(frozen=True)
class RowRuns:
    """All runs of one row of a table."""

    name: str
    upstream: str
    """the row that cost ratios refer to"""
    records: tuple[Record, ...]
    reasons: tuple[str, ...] = ()
    """why runs of this row are missing"""

    @property
    def origin(self) -> str:
        """Where its runs were joined from; empty for ours."""
        return self.records[0].origin if self.records else ""

    def by_seed(self) -> dict[int, Record]:
        """The runs with metrics."""
        return {record.run.seed: record for record in self.records if record.done}


def read_row(
    name: str, upstream: str, wanted: Sequence[Run], root: Path, problems: Mapping[str, str]
) -> RowRuns:
    """The row of these runs, as far as they have ended; ``problems`` says by id why not."""
    missing = (run for run in wanted if run.id in problems)
    reasons = (f"not done, seed {run.seed}: {problems[run.id]}" for run in missing)
    found = read([folder_of(root, run) for run in wanted])
    return RowRuns(name, upstream, tuple(found), tuple(reasons))


def difference(row: RowRuns, base: RowRuns, metric: str, when: str = "last") -> Difference | None:
    """``row`` minus ``base`` in points, over the seeds that both have; None if there are none.

    The population interval generalises to other seeds and other test data, or other patients
    if these are known; the training interval to other seeds on these data.
    """
    ours, theirs = row.by_seed(), base.by_seed()
    seeds = [
        seed
        for seed in sorted(ours.keys() & theirs.keys())
        if not math.isnan(ours[seed].metric(metric, when=when))
        and not math.isnan(theirs[seed].metric(metric, when=when))
    ]
    if not seeds:
        return None
    per_seed = np.array(
        [ours[s].metric(metric, when=when) - theirs[s].metric(metric, when=when) for s in seeds]
    )
    estimate = POINTS * float(per_seed.mean())
    first = ours[seeds[0]]
    blank = Difference(estimate, len(seeds), None, None, math.nan, patients=first.patients)
    if len(seeds) < 2:
        return blank
    folds = first.folds
    blank = replace(blank, folds=folds)
    if folds and set(Counter(seed // folds for seed in seeds).values()) != {folds}:
        return blank
    training = None
    if not folds and len(seeds) >= INFERENCE_SEEDS:
        training = training_interval(POINTS * per_seed)
        training = training if training.se > 0 else None
    if folds:
        cuts = [ours[s].result["data"]["rows"] for s in (seeds if first.patients else seeds[:1])]
        test, select = (float(np.mean([cut[name] for cut in cuts])) for name in ("test", "select"))
        variances = resampled(POINTS * per_seed, folds, test / ((folds - 1) * test - select))
    elif first.patients == 1:
        return replace(blank, training=training)
    elif unpaired := _unpaired([each[s] for s in seeds for each in (ours, theirs)], metric, when):
        return replace(blank, training=training, unpaired=unpaired)
    else:
        targets = first.targets
        items = np.stack(
            [ours[s].item_values(metric, when) - theirs[s].item_values(metric, when) for s in seeds]
        )
        variances = crossed(
            POINTS * items,
            targets if targets.ndim == 1 else None,
            clusters=first.groups,
        )
    population = variances.interval()
    if not population.se > 0:
        return replace(blank, variances=variances)
    detectable = smallest_detectable(population.se, population.df)
    made = replace(blank, variances=variances, detectable=detectable)
    if len(seeds) < INFERENCE_SEEDS:
        return made
    return replace(made, training=training, population=population)


def _unpaired(records: Sequence[Record], metric: str, when: str) -> str:
    """Why the test rows of these runs cannot be paired; empty if they can."""
    if any(not each.compares(metric, when) for each in records):
        return f"{_from(records)} has no predictions for it, so test rows are not paired"
    if any(not np.array_equal(each.targets, records[0].targets) for each in records[1:]):
        return f"the test rows of {_from(records)} are others, so they are not paired"
    return ""


def _from(records: Sequence[Record]) -> str:
    return next((each.origin for each in records if each.origin), "a run")


def cost_ratio(row: RowRuns, base: RowRuns) -> float:
    """Charged seconds per epoch as a ratio to ``base``, median over seeds.

    For a row with an equal budget, which has its own number of epochs, of whole runs. Nan if the
    two ran on different hardware, and one of them was joined.
    """
    ours, theirs = row.by_seed(), base.by_seed()
    own = any(record.run.budget != "steps" for record in ours.values())
    key = "charged_seconds" if own else "seconds_per_epoch"
    ratios = [
        ours[s].result["cost"][key] / theirs[s].result["cost"][key]
        for s in ours.keys() & theirs.keys()
        if _same_machine(ours[s], theirs[s])
    ]
    return median(ratios)


def _same_machine(one: Record, other: Record) -> bool:
    """Whether times can be compared; among runs that were not joined, tables say what ran where."""
    if not (one.origin or other.origin):
        return True
    return one.result["device"] == other.result["device"]


def advised(test_rows: int, folds: int = 0) -> int:
    """The recommended number of seeds for a number of test rows; with folds, whole repeats."""
    count = SMALL_TEST_SEEDS if folds or test_rows < SMALL_TEST else SEEDS
    return -(-count // folds) * folds if folds else count
