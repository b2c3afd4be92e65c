"""Contents of tables that ``augbench compare`` and reports have in common."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from analysis.differences import Difference, RowRuns
from analysis.numbers import MISSING, POINTS, bounds, mean_sd, median, number, signed
from analysis.records import ATTACK, DETECTION, Record
from analysis.runs import with_nan
from analysis.tasks import task_named

DETECTED = ("n", "AUC by weight ↑", "corrected, % ↑", "spoiled, % ↓")
ATTACKS = ("n", "selected, %", "margin kept, %", "prediction kept, %", "unmoved, %", "harder, %",
           "distance", "of noise")  # fmt: skip

LEARNED = {"outer_steps": "outer steps", "probability": "probability, %",
           "magnitude": "magnitude, %", "weight": "weight, %", "label": "label, %"}  # fmt: skip
"""What result.json says of learning, with the headings of its columns."""
POLICY = ("probability", "magnitude")
HARDLY = 0.05
"""A policy hardly learned if its probabilities and magnitudes moved less, as shares of their range,
in the median."""


def learning(row: RowRuns) -> dict[str, float]:
    """How far a row's learning went, medians over seeds; empty if it learns or says nothing."""
    found = [each.result.get("learning") or {} for each in row.by_seed().values()]
    return {
        name: median([each[name] for each in found if name in each])
        for name in LEARNED
        if any(name in each for each in found)
    }


def hardly_learned(row: RowRuns) -> bool:
    """Whether a learned policy hardly moved; not said of control rows, which need not learn."""
    moved = [value for name, value in learning(row).items() if name in POLICY]
    control = any(record.facts.kind == "control" for record in row.records)
    return bool(moved) and max(moved) < HARDLY and not control


def hardly_told(row: str, where: str = "there") -> str:
    """That a row hardly learned, so that a difference is not one of learning."""
    return (
        f"{row} hardly learned {where} (probabilities and magnitudes moved by less than "
        f"{POINTS * HARDLY:g} % of their range in the median), so this says nothing about a "
        "learned policy."
    )


def learning_cells(row: RowRuns) -> list[str]:
    """How far a row's learning went, in the columns ``LEARNED`` and a reading; may be empty."""
    told = learning(row)
    if not told:
        return []
    shares = [number(POINTS * told.get(name, math.nan), 1) for name in list(LEARNED)[1:]]
    steps = number(told.get("outer_steps", math.nan), 0)
    return [steps, *shares, "hardly learned" if hardly_learned(row) else ""]


def learning_told(row: RowRuns) -> str:
    """How far a row's learning went, in a line; empty if it learns or says nothing."""
    told = learning(row)
    steps = told.pop("outer_steps", math.nan)
    moved = [f"{name} {number(POINTS * value, 1)} %" for name, value in told.items()]
    parts = [f"{steps:g} outer steps"] if not math.isnan(steps) else []
    parts += [f"moved in the median by {', '.join(moved)} of its range"] if moved else []
    verdict = ": hardly learned" if hardly_learned(row) else ""
    return f"{row.name}: {'; '.join(parts)}{verdict}." if parts else ""


def difference_cells(made: Difference | None) -> list[object]:
    """Seeds, difference, both intervals and the detectable difference."""
    if made is None:
        return [0, *[MISSING] * 4]
    intervals = [bounds(made.training), bounds(made.population)]
    return [made.seeds, signed(made.estimate), *intervals, number(made.detectable, 2)]


def detected(row: RowRuns, digits: int) -> list[object]:
    """How well a row identified corrupted labels, in the columns ``DETECTED``; may be empty."""
    records = [each for each in row.by_seed().values() if each.result.get("detection")]
    if not records:
        return []
    auc, *shares = ([each.detection(name) for each in records] for name in DETECTION)
    told = [mean_sd([POINTS * value for value in values], digits) for values in shares]
    return [len(records), mean_sd(auc, 3), *told]


def cost(row: RowRuns, name: str, digits: int) -> str:
    """A cost, as the median over seeds."""
    costs = [record.result["cost"] for record in row.by_seed().values()]
    return number(median([each[name] for each in costs if each.get(name) is not None]), digits)


def attacks(row: RowRuns) -> list[str]:
    """Statistics of a row's attacked examples, in the columns ``ATTACKS``; empty without any."""
    records = [each for each in row.by_seed().values() if not math.isnan(each.logged(ATTACK[0]))]
    if not records:
        return []
    means = [float(np.mean([each.logged(name) for each in records])) for name in ATTACK]
    shares, distances = means[:5], means[5:]
    told = [number(POINTS * value, 1) for value in shares]
    return [str(len(records)), *told, *(number(value, 3) for value in distances)]


def patients_told(record: Record) -> list[str]:
    """How known patients affect the intervals; empty if none are known, and with folds."""
    if not record.patients or record.folds:
        return []
    if record.patients == 1:
        return ["all test images are from one patient, so there is no population interval"]
    rows = record.result["data"]["rows"]["test"]
    return [
        f"the {rows} test images are from {record.patients} patients; images of one patient are "
        "not independent, so the population interval counts patients"
    ]


def one_class(rows: Iterable[RowRuns]) -> list[str]:
    """Rows with runs that predict one class for every test row, so that scores say little."""
    told = []
    for row in rows:
        runs = list(row.by_seed().values())
        alike = sum(map(_predicts_one_class, runs))
        if alike:
            told.append(
                f"{row.name}: {alike} of {len(runs)} runs predict one class for every test row"
            )
    return told


def _predicts_one_class(record: Record) -> bool:
    """True if the recall of one class is 1 and that of all others 0, with several in the test."""
    known = with_nan(record.result["metrics"]["last"]["test"]["recall"])
    recalls = sorted(each for each in known if not math.isnan(each))
    single = task_named(record.kind).exclusive and len(recalls) > 1
    return single and recalls == [0] * (len(recalls) - 1) + [1]


def budgets(rows: Iterable[RowRuns]) -> list[str]:
    """How long each row with an equal budget trained, and how the budget was measured."""
    lines = []
    for row in rows:
        record = next((each for each in row.records if each.done), None)
        if record is not None and record.run.budget != "steps":
            detail = record.recorded.get("budget")
            epochs = f"{record.run.training.epochs} epochs"
            lines.append(f"{row.name}: {epochs}, {detail}." if detail else f"{row.name}: {epochs}.")
    return lines
