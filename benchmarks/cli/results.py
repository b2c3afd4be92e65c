"""The tables of a study, read back from its results folder."""

from __future__ import annotations

from pathlib import Path

from analysis import differences
from benchmarks.running.driver import Outcomes
from benchmarks.running.problems import Problem
from benchmarks.studies import cells
from benchmarks.studies.cells import Row
from benchmarks.studies.plan import Experiment
from benchmarks.studies.rounds import Work


def problems_of(outcomes: Outcomes) -> dict[str, str]:
    """Why runs could not be executed, by id."""
    return {name: each.text for name, each in outcomes.items() if isinstance(each, Problem)}


def tables_of(
    work: Work, problems: dict[str, str]
) -> list[tuple[Experiment, list[differences.RowRuns]]]:
    """Each table with a wanted run, and its rows, including those whose plug-in is unavailable."""
    asked = {cell.run.id for cell in work.cells()}
    shown = []
    for place, experiment in enumerate(work.plan.experiments):
        rows = [*experiment.rows, *work.extra.get(place, [])]
        read = [_row(experiment, row, work.root, problems, asked) for row in rows]
        read = [each for each in read if each.records or each.reasons]
        if read:
            for name, reason in experiment.missing:  # the others are compared with the first row
                absent = differences.RowRuns(name, "none", (), (reason,))
                read.insert(experiment.block.methods.index(name), absent)
            shown.append((experiment, read))
    return shown


def _row(
    experiment: Experiment, row: Row, root: Path, problems: dict[str, str], asked: set[str]
) -> differences.RowRuns:
    made = [cell for cell in experiment.cells([row]) if cell.run.id in asked]
    name = row.name if row.dirty else (made[0].run.row if made else row.method)
    upstream = cells.upstream_of(row.method)
    return differences.read_row(name, upstream, [cell.run for cell in made], root, problems)
