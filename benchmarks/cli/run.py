"""``augbench run``: runs a study of one cell in this process and prints its metrics."""

from __future__ import annotations

import sys
from pathlib import Path

from analysis import corrupted, metrics, runs
from benchmarks.cli import arguments
from benchmarks.cli.arguments import UsageError
from benchmarks.cli.common import (
    check_saved,
    metric,
    options_of,
    protocol_of,
    read_data,
    study_of,
)
from benchmarks.running import disk, firstlook
from benchmarks.running.codes import FAILURE
from benchmarks.studies import cells
from benchmarks.studies.ledger import Ledger
from benchmarks.studies.plan import Plan
from benchmarks.training import errors, progress
from methods import own


@own.kept()
def carry_out(command: arguments.RunCommand) -> int:
    """Do the run unless it is done, and print its metrics; return the exit code."""
    options = options_of(command)
    if command.seed < 0:
        raise UsageError(f"seed: expected 0 or more, got {command.seed}")
    row = cells.parse_row(command.method, protocol_of(command))
    study = study_of(command, command.method, (command.seed,), whole=False)
    if command.save_model:
        check_saved([row.method])
    experiments = Plan(study, options.data_root, whole=False).experiments
    if len(experiments) != 1:
        raise UsageError(
            f"run: expected one benchmark and one model, got {len(experiments)} tables"
        )
    (cell,) = experiments[0].cells([row])
    root = command.out.expanduser().absolute()
    ledger = Ledger(root, study.retries, command.retry_failed, command.save_model)
    ledger.begin([cell])
    status = ledger.status(cell)
    if ledger.to_do(cell, status):
        read_data([cell], ledger, options)
        firstlook.look([cell], ledger, options, options.device)
        root.mkdir(parents=True, exist_ok=True)
        try:
            status = disk.execute(
                cell.run, cell.recorded, root, options, cell.benchmark, progress.for_terminal()
            )
        except errors.Interrupted as stop:
            raise KeyboardInterrupt(str(stop)) from stop
    folder = runs.folder_of(root, cell.run)
    print(f"{cell.run.benchmark}, {cell.run.model}, {cell.run.row}, seed {cell.run.seed}")
    if status.state != "done":
        print(f"{status.state}: {status.reason}\n{_shown(folder)}")
        if command.debug and status.state == "failed":
            print((runs.read_result(folder) or {})["traceback"], file=sys.stderr)
        return FAILURE if status.state == "failed" else 0
    result = runs.with_nan(runs.read_result(folder))
    for when, scores in result["metrics"].items():
        for part, values in scores.items():
            text = ", ".join(metric(name, value) for name, value in values.items())
            print(f"{when} epoch, {part}: {text}")
    if not result["selection"]["offered"]:
        print(f"selected epoch: not available, {result['selection']['reason']}")
    if name := corrupted.set_of(result):
        told = (metric(key, corrupted.value(result, key)) for key in metrics.ON_CORRUPTED)
        print(f"last epoch, test under {name}: {', '.join(told)}")
    cost = result["cost"]
    print(
        f"cost: {cost['charged_seconds']:.1f} s charged, {cost['seconds_per_epoch']:.2f} s per "
        f"epoch, {cost['passes_per_row']:.2f} passes per row, {cost['memory_mib']:.0f} MiB"
    )
    print(_shown(folder))
    return 0


def _shown(folder: Path) -> str:
    here = Path.cwd()
    return f"results: {folder.relative_to(here) if folder.is_relative_to(here) else folder}"
