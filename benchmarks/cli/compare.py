"""``augbench compare``: a study of one block, and its tables."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress

from analysis import comparison, differences, joined, records, runs
from analysis.joined import Source
from analysis.table import wrapped
from benchmarks.cli import arguments, results
from benchmarks.cli.arguments import UsageError
from benchmarks.cli.common import (
    FIGURES,
    check_saved,
    device_of,
    options_of,
    read_data,
    study_of,
)
from benchmarks.data.download import DataError
from benchmarks.running import executors, firstlook
from benchmarks.running.codes import FAILURE
from benchmarks.running.executors import Where
from benchmarks.running.timelimit import limit_of
from benchmarks.studies.cells import Cell
from benchmarks.studies.ledger import Ledger
from benchmarks.studies.plan import Plan
from benchmarks.studies.rounds import Work
from benchmarks.studies.shards import Shard
from methods import own
from methods.naming import NamingError, split


def carry_out(command: arguments.CompareCommand) -> int:
    """Run and print the comparison; return the exit code."""
    return compare(command)[0]


@own.kept()
def compare(command: arguments.CompareCommand) -> tuple[int, list[differences.RowRuns]]:
    """Run and print the comparison; return the exit code, and its rows with their finished runs."""
    if command.beside and command.shard:
        raise UsageError("with: expected no --shard, which prints no table")
    with joined.opened(command.beside) as sources:  # read before hours of runs, not after them
        return _compare(command, sources)


def _compare(
    command: arguments.CompareCommand, sources: Sequence[Source]
) -> tuple[int, list[differences.RowRuns]]:
    options, where = options_of(command), _where(command)
    _check(command)
    study = study_of(
        command,
        command.methods,
        command.seeds,
        controls=command.controls,
        same=() if command.same is None else command.same,
    )
    if command.figure is not None and len(study.blocks[0].benchmarks) > 1:
        raise UsageError(f"figure: expected one benchmark, got {len(study.blocks[0].benchmarks)}")
    for path in filter(None, (command.records, command.figure)):
        path.parent.mkdir(parents=True, exist_ok=True)  # before hours of runs, not after them
    root = command.out.expanduser().absolute()
    plan = Plan(study, options.data_root)
    if not any(experiment.rows for experiment in plan.experiments):
        raise UsageError("; ".join(reason for _, reason in plan.experiments[0].missing))
    if command.save_model:
        check_saved([row.method for each in plan.experiments for row in each.rows])
    ledger = Ledger(root, study.retries, command.retry_failed, command.save_model)
    shard = Shard.of(command.shard)
    work = Work(plan, root, lambda cell: True, shard)

    def begin(wanted: Sequence[Cell]) -> None:
        read_data(wanted, ledger, options)
        firstlook.look(wanted, ledger, options, options.device)
        root.mkdir(parents=True, exist_ok=True)

    there = root.exists()
    try:
        outcomes = executors.carry_out(work, ledger, options, where, begin)
    except (NamingError, DataError):  # nothing could be run
        if not there:
            with suppress(OSError):  # it holds something, or was not made
                root.rmdir()
        raise
    if command.same is not None and not any(work.extra.values()):
        print(
            f"No row exceeds its upstream by an epoch of {command.same}, so no row of equal "
            f"budget is added.",
            file=sys.stderr,
        )
    problems = results.problems_of(outcomes)
    rows = [read for _, read in results.tables_of(work, problems)]
    kept = [row for read in rows for row in read]
    if shard is None:
        shown = [joined.rows_beside(read, sources) for read in rows]
        print("\n\n\n".join(_text(command, *each) for each in shown))
        print(f"\nResults: {root}")
        _write(command, kept, [row for read, _ in shown for row in read])
    else:
        print(f"{shard.told(len(work.cells()))}\n\nResults: {root}")
        _write(command, kept, kept)
    failed = any(each.result["status"] == "failed" for row in kept for each in row.records)
    missing = any(experiment.missing for experiment in plan.experiments)
    return FAILURE if problems or failed or missing else 0, kept


def _check(command: arguments.CompareCommand) -> None:
    if command.records is not None and command.records.suffix != ".csv":
        raise UsageError(f"records: expected a name ending in .csv, got {command.records}")
    if command.figure is not None and command.figure.suffix not in FIGURES:
        raise UsageError(f"figure: expected a name in .png, .pdf or .svg, got {command.figure}")
    if command.figure is not None and command.shard:
        raise UsageError("figure: expected no --shard, which has no differences to plot")
    if not split(command.methods):
        raise UsageError("methods: expected names separated by commas, got none")
    if command.seeds is not None and command.seeds < 1:
        raise UsageError(f"seeds: expected 1 or more, got {command.seeds}")
    if command.jobs is not None and command.jobs < 1:
        raise UsageError(f"jobs: expected 1 or more, got {command.jobs}")


def _where(command: arguments.CompareCommand) -> Where:
    address = os.environ.get("RAY_ADDRESS", "") if command.executor == "ray" else ""
    jobs = command.jobs
    if jobs is None and device_of(command.device) == "mps":  # not counted by capacity
        jobs = 1
    limit = limit_of(command.time_limit)
    return Where(command.executor, "" if address == "local" else address, jobs, limit)


def _text(
    command: arguments.CompareCommand, rows: Sequence[differences.RowRuns], told: Sequence[str]
) -> str:
    """The table, and what was joined; joined runs with damaged predictions are left out."""
    try:
        table = comparison.as_text(rows, command.selection, verbose=command.verbose)
    except records.Damaged as damaged:
        whole = [joined.without(row, damaged.folder) for row in rows]
        if whole == list(rows):
            raise
        left = f"Left out of what was joined: {damaged.folder.name}: {damaged.reason}."
        return _text(command, [row for row in whole if row.records or row.reasons], [*told, left])
    return "\n\n".join([table, *map(wrapped, told)])


def _write(
    command: arguments.CompareCommand,
    rows: Sequence[differences.RowRuns],
    shown: Sequence[differences.RowRuns],
) -> None:
    """Write the files that the command asks for: records of our ``rows``, a figure of all."""
    if command.records is not None:
        text = records.to_csv((row.name, row.records) for row in rows)
        runs.write_text(command.records, text)
        print(f"Records: {command.records}")
    if command.figure is not None and any(each.done for row in rows for each in row.records):
        from analysis.report import figures  # noqa: PLC0415 - loads matplotlib

        figures.draw_forest(shown, command.figure, command.selection)
        print(f"Figure: {command.figure}")
