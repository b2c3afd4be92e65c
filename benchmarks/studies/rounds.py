"""The rounds of a study: jobs, searches, equal budgets. Needs no ray."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis import runs
from analysis.studyfile import StudyError
from analysis.tasks import task_named
from benchmarks.data import splits
from benchmarks.data.catalogue import CATALOGUE
from benchmarks.data.sources import locate
from benchmarks.studies import cells, search
from benchmarks.studies.cells import Cell, Row
from benchmarks.studies.plan import Experiment, Plan
from benchmarks.studies.schema import Tune
from benchmarks.studies.search import (
    Ladder,
    Outcome,
    Trial,
    Values,
)
from benchmarks.studies.shards import Shard


@dataclass(frozen=True)
class Job:
    """A unit of work for a worker: a run, or the runs of one trial from rung to rung."""

    cells: tuple[Cell, ...]
    trial: int = 0
    group: str = ""
    """the row whose trials compete"""
    rungs: tuple[int, ...] = ()
    metric: str = "auc"

    @property
    def first(self) -> Cell:
        """The run that stands for the job."""
        return self.cells[0]


@dataclass(frozen=True)
class Round:
    """Jobs that may run in parallel."""

    jobs: list[Job]
    ladder: Ladder | None = None


class RowSearch:
    """The search of one row of one table."""

    def __init__(self, experiment: Experiment, row: Row, tune: Tune) -> None:
        self.experiment, self.row, self.tune = experiment, row, tune
        self.rungs = search.rungs(tune.asha, experiment.training.epochs)
        self.name = f"{experiment.name}, {row.name}"
        self.trials: list[Trial] = []

    def grow(self, root: Path) -> bool:
        """Add the trials that are known by now; return whether there were any."""
        tune, have = self.tune, len(self.trials)
        if tune.search != "optuna":
            settings = search.listed(self.row, self.experiment.training, tune)[have:]
        elif not have:
            settings: list[Values] = [{}]
            settings += self._asked([], min(tune.batch, tune.trials) - 1)
        else:
            ended = self.outcomes(root)
            if any(each.state == "new" for each in ended):
                return False
            seen = [(each.values, each.score if each.complete else None) for each in ended]
            settings = self._asked(seen, min(tune.batch, tune.trials - have))
        for values in settings:
            made = search.trial_of(self.experiment, self.row, len(self.trials), values, tune)
            self.trials.append(made)
        return bool(settings)

    @property
    def unnamed(self) -> int:
        """The number of trials still to be proposed, once others have ended."""
        return self.tune.trials - len(self.trials)

    def ended(self, outcomes: Sequence[Outcome]) -> bool:
        """Whether every trial of the search has ended, so that there is a winner."""
        return not self.unnamed and all(each.state != "new" for each in outcomes)

    def _asked(self, seen: list[tuple[Values, float | None]], count: int) -> list[Values]:
        if count < 1:
            return []
        return search.asked(self.row, self.experiment.training, self.tune, seen, count)

    def outcomes(self, root: Path) -> list[Outcome]:
        """How each trial ended, read from disk."""
        return [search.outcome(trial, root, self.tune.metric) for trial in self.trials]

    def jobs(self) -> list[Job]:
        """Every trial as a job."""
        return [
            Job(trial.cells, trial.number, self.name, self.rungs, self.tune.metric)
            for trial in self.trials
        ]


def check_search(plan: Plan, tune: Tune, fetch: bool = True) -> None:
    """Refuse a search whose choice would be noise, or whose rows or extra are unavailable.

    Without ``fetch``, data sets that are not on this machine are skipped.

    Raises:
        StudyError: names the table and what to do.
    """
    if tune.search == "grid":
        _check_grid(plan, tune)
    if tune.search == "optuna":
        try:
            importlib.import_module("optuna")
        except ImportError as error:
            raise StudyError(
                "tune.search: optuna is not installed: pip install 'augbench[optuna]', or use "
                "search: random"
            ) from error
    for experiment in plan.experiments:
        study = plan.study
        entry = CATALOGUE.get(experiment.benchmark.name)
        size = experiment.benchmark.size
        if not fetch and entry is not None and None in locate(entry, size, plan.data_root):
            continue
        arrays = splits.arrays_of(
            experiment.benchmark, plan.data_root, study.allow_unverified, study.memory_gib
        )
        labels, classes = arrays.val_y, len(arrays.classes)
        counts = task_named(arrays.kind).counts(labels, classes)
        reason = search.refused(len(labels), int(counts.min()), experiment.protocol.name, tune)
        if reason:
            raise StudyError(f"tune: {experiment.name}: {reason}")


def _check_grid(plan: Plan, tune: Tune) -> None:
    """Every row gets the same number of trials: the row as written, and points of its grid."""
    sizes = {
        f"{experiment.name}, {row.name}": search.grid_size(row, experiment.training, tune)
        for experiment in plan.experiments
        for row in experiment.rows
    }
    smallest = min(sizes, key=lambda name: sizes[name], default="")
    most = sizes.get(smallest, tune.trials) + 1
    if tune.trials > most:
        raise StudyError(
            f"tune.trials: expected {most} or less, because all rows get the same number of trials "
            f"and the grid of {smallest} has {most - 1} points besides the row as written, got "
            f"{tune.trials}; [choice, ...] gives a parameter more points"
        )


class Work:
    """The runs of a study, in rounds: later rounds depend on the results of earlier ones."""

    def __init__(
        self,
        plan: Plan,
        root: Path,
        only: Callable[[Cell], bool],
        shard: Shard | None = None,
    ) -> None:
        self.plan, self.root, self._only = plan, root, only
        tune = plan.study.tune
        self.searches = [
            RowSearch(experiment, row, tune)
            for experiment in plan.experiments
            for row in experiment.rows
            if tune
        ]
        self.extra: dict[int, list[Row]] = {}
        """equal-budget rows, by the index of their table"""
        if shard is not None:
            shard.check(plan)
            own = {cell.run.id for cell in shard.of_cells(self.cells())}
            self._only = lambda cell: cell.run.id in own

    def rounds(self) -> Iterator[Round]:
        """Jobs, including finished ones, which the executor skips."""
        if self.searches:
            yield from self._searching()
            return
        first = [cell for experiment in self.plan.experiments for cell in experiment.cells()]
        yield Round(self._jobs(first))
        more = self._equal_budgets()
        if more:
            yield Round(self._jobs(more))

    def foresee(self) -> None:
        """Name every run that follows from the file and the results folder, without running any."""
        for each in self.searches:
            while each.grow(self.root):
                pass
        if not self.searches:
            self._equal_budgets()

    def unnamed(self) -> list[Cell]:
        """A stand-in of equal length for each run of the trials still to be proposed."""
        return [
            cell
            for each in self.searches
            for cell in each.trials[0].cells * each.unnamed
            if self._only(cell)
        ]

    def _equal_budgets(self) -> list[Cell]:
        """The equal-budget runs whose budget is known from finished runs."""
        asked = any(experiment.block.same for experiment in self.plan.experiments)
        taken = cells.equal_budgets_in(self.root) if asked else ()
        found: list[Cell] = []
        for place, experiment in enumerate(self.plan.experiments):
            if not experiment.block.same:
                continue
            plain = experiment.cells([row for row in experiment.rows if not row.dirty])
            self.extra[place] = [
                row
                for kind in experiment.block.same
                for row in cells.equal_budget_rows(plain, self.root, kind, taken)
            ]
            found += experiment.cells(self.extra[place])
        return found

    def _searching(self) -> Iterator[Round]:
        grown = True
        while grown:
            self.foresee()
            jobs = [job for each in self.searches for job in each.jobs()]
            yield Round([job for job in jobs if self._only(job.first)], self._ladder())
            grown = any(each.grow(self.root) for each in self.searches)  # foresee adds the others
        yield Round(self._jobs(self._finals(ended=True)))

    def outcomes(self) -> list[list[Outcome]]:
        """How each trial of each search ended, read from disk."""
        return [each.outcomes(self.root) for each in self.searches]

    def budgets(self, outcomes: Sequence[Sequence[Outcome]]) -> list[int | None]:
        """For each search, the passes of the cheapest search of its table: the equal budget there.

        None until every search of the table has ended.
        """
        found: list[int | None] = []
        for experiment in (each.experiment for each in self.searches):
            pairs = zip(self.searches, outcomes, strict=True)
            beside = [(each, own) for each, own in pairs if each.experiment is experiment]
            spent = [sum(one.passes for one in own) for _, own in beside]
            ended = all(each.ended(own) for each, own in beside)
            # a skipped row takes none
            found.append(min(filter(None, spent), default=None) if ended else None)
        return found

    def _finals(self, ended: bool = False) -> list[Cell]:
        """The runs on fresh seeds that are known by now, or only those of ended searches."""
        outcomes = self.outcomes()
        budgets = self.budgets(outcomes)
        return [
            cell
            for each, own, budget in zip(self.searches, outcomes, budgets, strict=True)
            if not ended or each.ended(own)
            for values in finalists(each, own, budget)
            for cell in search.finals(each.experiment, each.row, values, each.tune)
        ]

    def _jobs(self, wanted: Sequence[Cell]) -> list[Job]:
        return [Job((cell,)) for cell in self._in_order(wanted) if self._only(cell)]

    def _in_order(self, cells: Sequence[Cell]) -> list[Cell]:
        """Each run once, every table's first seed before any second one; or so within a benchmark.

        So an interrupted sweep leaves tables whose rows have the same seeds.
        """
        once = {cell.run.id: cell for cell in cells}
        ordered = sorted(once.values(), key=lambda cell: cell.run.seed)
        if self.plan.study.order == "benchmarks":
            found = dict.fromkeys(each.benchmark for each in self.plan.experiments)
            places = {benchmark: place for place, benchmark in enumerate(found)}
            ordered.sort(key=lambda cell: places[cell.benchmark])
        return ordered

    def _ladder(self) -> Ladder | None:
        tune = self.plan.study.tune
        if tune is None or tune.asha is None:
            return None
        ladder = Ladder(tune.asha.factor)
        for each in self.searches:
            for trial in each.trials:
                folders = [runs.folder_of(self.root, cell.run) for cell in trial.cells]
                reached = min(len(search.lines_of(folder)) for folder in folders)
                for rung in each.rungs:
                    if rung <= reached:
                        score = search.score_at(folders, rung, tune.metric)
                        ladder.seen(each.name, rung, trial.number, score)
        return ladder

    def whole(self) -> list[Cell]:
        """Every run of the study that is known by now."""
        if self.searches:
            trials = [
                cell for each in self.searches for trial in each.trials for cell in trial.cells
            ]
            return list({cell.run.id: cell for cell in [*trials, *self._finals()]}.values())
        wanted = [cell for experiment in self.plan.experiments for cell in experiment.cells()]
        wanted += [
            cell
            for place, rows in self.extra.items()
            for cell in self.plan.experiments[place].cells(rows)
        ]
        return self._in_order(wanted)

    def cells(self) -> list[Cell]:
        """The selected runs among ``whole``."""
        return [cell for cell in self.whole() if self._only(cell)]


def finalists(each: RowSearch, outcomes: Sequence[Outcome], passes: int | None) -> list[Values]:
    """The settings that run on fresh seeds: as written, the winner, and the one at equal passes.

    A search that has not ended has no winner yet.
    """
    found: list[Values] = [{}]
    if not each.ended(outcomes):
        return found
    cheap = [] if passes is None else search.within(outcomes, passes)
    for among in (outcomes, cheap):
        best = search.winner(among)
        if best is not None and best.values not in found:
            found.append(best.values)
    return found


def record(each: RowSearch, outcomes: Sequence[Outcome], budget: int | None) -> dict[str, Any]:
    """What the search of one row found, for search.json."""
    best = search.winner(outcomes) if each.ended(outcomes) else None
    cheap = None if budget is None else search.winner(search.within(outcomes, budget))
    return {
        "table": each.experiment.name,
        "row": each.row.name,
        "metric": each.tune.metric,
        "seeds": [cell.run.seed for cell in each.trials[0].cells] if each.trials else [],
        "trials": [
            {
                "number": one.number,
                "values": dict(one.values),
                "runs": [cell.run.id for cell in trial.cells],
                "state": one.state,
                "rung": one.rung,
                "select": one.score,
                "test": one.test,
                "passes": one.passes,
            }
            for one, trial in zip(outcomes, each.trials, strict=True)
        ],
        "passes": sum(one.passes for one in outcomes),
        "equal_passes": budget,
        "winner": None if best is None else best.number,
        "winner_at_equal_passes": None if cheap is None else cheap.number,
        "regret": math.nan if best is None else search.regret(outcomes),
        "expected": search.expected(outcomes),
        "written": _ids(each, {}),
        "chosen": [] if best is None else _ids(each, best.values),
    }


def _ids(each: RowSearch, values: Values) -> list[str]:
    """The runs of a setting on fresh seeds."""
    return [cell.run.id for cell in search.finals(each.experiment, each.row, values, each.tune)]
