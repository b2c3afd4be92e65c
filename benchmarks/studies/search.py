"""Hyper-parameter search: trials, which of them continue at a rung, the winner. Needs no ray."""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import methods
from analysis import runs
from analysis.runs import Training
from benchmarks.data.seeding import seed_of
from benchmarks.studies.cells import Cell, Row, plain
from benchmarks.studies.plan import Experiment
from benchmarks.studies.schema import Asha, Tune
from benchmarks.studies.space import Parameter, parameter, short
from methods.naming import Call, Links, NamingError, Value, call_of, parse, render
from methods.naming import parameters as arguments_of

SMALL_SELECT_SEEDS = 3
"""The fewest seeds that a trial's score may average if select is small."""
FIRST_SEED = 1000
"""Trials use seeds from here on, so those from 0 on are fresh for the winner and the default."""


def parameters(row: Row, training: Training, tune: Tune) -> tuple[Parameter, ...]:
    """What a row searches: the common space, and those of the methods along its chain."""
    rate = training.learning_rate
    common: dict[str, Any] = {
        "learning_rate": ("loguniform", rate / 10, rate * 10),
        "weight_decay": ("loguniform", 1e-6, 1e-2),
        **tune.common,
    }
    found = {key: parameter(key, space) for key, space in common.items()}
    for call in _calls(parse(row.method)):
        own = tune.spaces.get(call.name, type(methods.build(render(call))).space)
        takes = arguments_of(methods.load(call.name))
        for argument, space in own.items():
            if argument in takes:  # a preset may leave out some of a method's space
                key = f"{call.name}.{argument}"
                found[key] = parameter(key, space)
    return tuple(found.values())


def _calls(expression: Call | Links) -> list[Call]:
    listed = expression.calls if isinstance(expression, Links) else (expression,)
    found = []
    for call in listed:
        found.append(call)
        inner = dict(call.arguments).get("upstream")  # a bare word elsewhere is not a method
        if isinstance(inner, Call | Links):
            found += _calls(inner)
    return found


def applied(row: Row, training: Training, values: Mapping[str, Any]) -> tuple[Row, Training]:
    """The row and the training with these values applied."""
    own: dict[str, dict[str, Any]] = {}
    common = {}
    for key, value in values.items():
        name, dot, argument = key.rpartition(".")  # the name of a user's module may have dots too
        if dot:
            own.setdefault(name, {})[argument] = value
        else:
            common[argument] = value
    expression = _with(parse(row.method), own)
    try:
        changed = Training(**{**asdict(training), **common})  # type: ignore[call-overload]
    except ValueError as error:
        raise NamingError(f"tune: {plain(error)}") from error
    return replace(row, method=methods.canonical(render(expression))), changed


def _with(expression: Value, own: Mapping[str, Mapping[str, Any]]) -> Any:
    if isinstance(expression, Links):
        return Links(tuple(_with(call, own) for call in expression.calls))
    if isinstance(expression, Call):
        inner = {name: _with(value, own) for name, value in expression.arguments}
        given = {name: _value(value) for name, value in own.get(expression.name, {}).items()}
        return call_of(expression.name, {**inner, **given})
    return expression


def _value(value: Any) -> Any:
    return tuple(_value(each) for each in value) if isinstance(value, list | tuple) else value


@dataclass(frozen=True)
class Trial:
    """One setting of a row, run once for each seed of the search."""

    number: int
    """0 is the row as written"""
    values: Mapping[str, Any]
    cells: tuple[Cell, ...]


Values = Mapping[str, Any]


def grid_size(row: Row, training: Training, tune: Tune) -> int:
    """Points of a row's grid."""
    return math.prod(len(each.grid()) for each in parameters(row, training, tune))


def listed(row: Row, training: Training, tune: Tune) -> list[Values]:
    """The settings of a random search or a grid, which depend only on the file.

    The first is the row as written. A parameter has the same value in the k-th random trial of
    every row that has it, so that rows differ in their own parameters only.
    """
    space = parameters(row, training, tune)
    settings: list[Values] = [{}]
    if tune.search == "random":
        for number in range(1, tune.trials):
            settings.append(
                {each.key: each.draw(_rng(tune.seed, number, each.key)) for each in space}
            )
        return settings
    points = itertools.product(*(each.grid() for each in space))
    grid = [dict(zip((each.key for each in space), point, strict=True)) for point in points]
    # If the grid has more points than there are trials, a random subset is used.
    order = _rng(tune.seed, 0, "grid").permutation(len(grid))
    return settings + [grid[place] for place in sorted(order[: tune.trials - 1])]


def _rng(seed: int, number: int, key: str) -> np.random.Generator:
    return np.random.default_rng(seed_of(seed, "search", number, key))


def asked(
    row: Row,
    training: Training,
    tune: Tune,
    seen: Sequence[tuple[Values, float | None]],
    count: int,
) -> list[Values]:
    """The next settings that Optuna proposes, given the scores of the trials before them.

    A pruned or failed trial has no score. The proposals depend on these scores and on the file,
    not on the order in which runs end, so they are the same after a restart.
    """
    optuna = importlib.import_module("optuna")  # an optional dependency
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    space = {each.key: _distribution(each, optuna) for each in parameters(row, training, tune)}
    sampler = optuna.samplers.TPESampler(seed=seed_of(tune.seed, row.method, len(seen)) % 2**32)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for values, score in seen:
        if len(values) < len(space):  # the row as written has no value for what it leaves out
            continue
        encoded = {key: _encoded(value) for key, value in values.items()}
        failed = score is None or math.isnan(score)
        state = optuna.trial.TrialState.FAIL if failed else optuna.trial.TrialState.COMPLETE
        study.add_trial(
            optuna.trial.create_trial(
                params=encoded,
                distributions=space,
                value=None if failed else score,
                state=state,
            )
        )
    options = {each.key: each for each in parameters(row, training, tune)}
    found = []
    for _ in range(count):
        drawn = study.ask(space).params
        found.append({key: _decoded(options[key], value) for key, value in drawn.items()})
    return found


def _distribution(each: Parameter, optuna: Any) -> Any:
    if each.kind == "choice":
        return optuna.distributions.CategoricalDistribution([_encoded(v) for v in each.values])
    low, high = each.values
    if each.kind == "int":
        return optuna.distributions.IntDistribution(low, high)
    return optuna.distributions.FloatDistribution(low, high, log=each.kind == "loguniform")


def _encoded(value: Any) -> Any:
    """Optuna takes only scalars, so a list becomes text."""
    return repr(value) if isinstance(value, list | tuple) else value


def _decoded(each: Parameter, value: Any) -> Any:
    if each.kind == "choice":
        return next(option for option in each.values if _encoded(option) == value)
    return short(value) if isinstance(value, float) else value


def trial_of(experiment: Experiment, row: Row, number: int, values: Values, tune: Tune) -> Trial:
    """The runs of one setting."""
    seeds = range(FIRST_SEED, FIRST_SEED + tune.seeds)
    # Also for the row as written: which of its runs survive halving is not random.
    return Trial(number, dict(values), tuple(_cells(experiment, row, values, seeds, searched=True)))


def finals(experiment: Experiment, row: Row, values: Values, tune: Tune) -> list[Cell]:
    """The runs of a setting on seeds that the search has not seen."""
    return _cells(experiment, row, values, range(tune.final_seeds), searched=bool(values))


def _cells(
    experiment: Experiment, row: Row, values: Values, seeds: Iterable[int], searched: bool
) -> list[Cell]:
    """The runs of a setting; those of a search are marked, to keep them out of plain tables."""
    make = experiment.of(*applied(row, experiment.training, values))
    made = [make(seed) for seed in seeds]
    if not searched:
        return made
    return [replace(each, recorded={**each.recorded, "searched": dict(values)}) for each in made]


def refused(rows: int, rarest: int, protocol: str, tune: Tune) -> str:
    """Why hyper-parameters cannot be chosen on this select split; empty if they can."""
    from benchmarks.training.evaluation import MIN_SELECT_CLASS, MIN_SELECT_ROWS  # noqa: PLC0415 - torch

    if protocol == "paper":
        return (
            "under the protocol paper the select rows are meta rows too, so they cannot choose "
            "hyper-parameters: search under protocol equal"
        )
    small = rows < MIN_SELECT_ROWS or rarest < MIN_SELECT_CLASS
    if small and tune.seeds < SMALL_SELECT_SEEDS:
        return (
            f"the select split is small, with {rows} rows and {rarest} of its rarest class (below "
            f"{MIN_SELECT_ROWS} or {MIN_SELECT_CLASS}): one run's score is mostly noise, so set "
            f"tune.seeds to {SMALL_SELECT_SEEDS} or more, got {tune.seeds}"
        )
    return ""


def rungs(asha: Asha | None, epochs: int) -> tuple[int, ...]:
    """The epochs after which only the best trials continue."""
    if asha is None:
        return ()
    found, at = [], asha.grace
    while at < epochs:
        found.append(at)
        at *= asha.factor
    return tuple(found)


class Ladder:
    """Asynchronous successive halving: a trial continues past a rung if it is among the best there.

    Source: Li et al., A System for Massively Parallel Hyperparameter Tuning, MLSys 2020, in the
    form that stops a trial at once instead of letting it wait.
    """

    def __init__(self, factor: int) -> None:
        self._factor = factor
        self._scores: dict[tuple[str, int], dict[int, float]] = {}

    def seen(self, group: str, rung: int, trial: int, score: float) -> None:
        """Record the score of a row's trial at a rung; nan ranks below all others."""
        worst = -math.inf if math.isnan(score) else score
        self._scores.setdefault((group, rung), {})[trial] = worst

    def goes_on(self, group: str, rung: int, trial: int) -> bool:
        """Whether a trial is among the best 1/factor seen at this rung so far."""
        scores = self._scores[group, rung]
        own = scores[trial]
        better = sum(score > own for score in scores.values())
        return math.isfinite(own) and better < math.ceil(len(scores) / self._factor)


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl so far; empty if there is no such file."""
    try:
        return runs.read_lines(folder / "metrics.jsonl")
    except (OSError, ValueError):
        return []


def score_at(folders: Iterable[Path], epoch: int, metric: str) -> float:
    """Mean over seeds of a select metric after ``epoch`` epochs; nan if a run has not reached it.

    Test metrics are not read, even if a run records them.
    """
    scores = []
    for folder in folders:
        lines = lines_of(folder)
        scores.append(lines[epoch - 1]["select"][metric] if len(lines) >= epoch else math.nan)
    return float(np.mean(scores)) if scores else math.nan


@dataclass(frozen=True)
class Outcome:
    """How a trial ended."""

    number: int
    values: Values
    state: str
    """done, stopped, failed, skipped, or new (not ended)"""
    rung: int
    """epochs after which it was stopped; 0 if it was not"""
    score: float
    """on select after the last epoch that it trained, mean over seeds"""
    passes: int
    """forward and backward passes of rows, over all seeds"""
    test: float
    """the same metric on test, only recorded, never used to choose; nan unless done"""

    @property
    def complete(self) -> bool:
        """Whether it may win."""
        return self.state == "done" and not math.isnan(self.score)


def outcome(trial: Trial, root: Path, metric: str) -> Outcome:
    """Read a trial from disk."""
    folders = [runs.folder_of(root, cell.run) for cell in trial.cells]
    states = [runs.status_of(folder) for folder in folders]
    lines = [lines_of(folder) for folder in folders]
    reached = min(len(each) for each in lines)
    state = next(
        (s.state for s in states if s.state in ("failed", "skipped", "stopped")),
        "done" if all(s.state == "done" for s in states) else "new",
    )
    test = math.nan
    if state == "done":
        results = [runs.with_nan(runs.read_result(folder)) for folder in folders]
        test = float(np.mean([each["metrics"]["last"]["test"][metric] for each in results]))
    return Outcome(
        number=trial.number,
        values=trial.values,
        state=state,
        rung=reached if state == "stopped" else 0,
        score=score_at(folders, reached, metric) if reached else math.nan,
        passes=sum(
            line["rows"]["forward"] + line["rows"]["backward"] for each in lines for line in each
        ),
        test=test,
    )


def winner(outcomes: Iterable[Outcome]) -> Outcome | None:
    """The complete trial with the best select score, the first of equals; None if there is none."""
    complete = [each for each in outcomes if each.complete]
    return max(complete, key=lambda each: (each.score, -each.number)) if complete else None


def within(outcomes: Sequence[Outcome], passes: int) -> list[Outcome]:
    """The first trials that together cost at most ``passes``, but at least one."""
    spent, kept = 0, list(outcomes[:1])
    spent = kept[0].passes if kept else 0
    for each in outcomes[1:]:
        spent += each.passes
        if spent > passes:
            break
        kept.append(each)
    return kept


def regret(outcomes: Sequence[Outcome]) -> float:
    """Test score lost by choosing on select: that of the best trial on test minus the winner's.

    In the unit of the metric, over complete trials; nan with fewer than two: nothing was chosen.
    """
    complete = [each for each in outcomes if each.complete]
    chosen = winner(complete)
    if chosen is None or len(complete) < 2:
        return math.nan
    return max(each.test for each in complete) - chosen.test


def expected(outcomes: Sequence[Outcome]) -> list[dict[str, float]]:
    """For each number of trials n: the mean select and test score of the winner of n of them.

    Over all subsets of n trials, without replacement. A trial that did not complete cannot win,
    and a subset without any complete one is left out; ``share`` is the fraction kept.

    Source: Dodge et al., Show Your Work, EMNLP 2019, in the form without replacement.
    """
    ranked = sorted(
        (each for each in outcomes if each.complete), key=lambda each: (each.score, -each.number)
    )
    total, found = len(outcomes), []
    lost = total - len(ranked)
    for n in range(1, total + 1):
        # the winner is the i-th of the ranking if the other n - 1 rank below it
        weights = np.array(
            [math.comb(lost + place, n - 1) / math.comb(total, n) for place in range(len(ranked))]
        )
        share = float(weights.sum())
        if share > 0:
            found.append(
                {
                    "trials": n,
                    "share": share,
                    "select": float(weights @ [each.score for each in ranked]) / share,
                    "test": float(weights @ [each.test for each in ranked]) / share,
                }
            )
    return found
