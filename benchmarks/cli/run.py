"""``augbench run``: one cell, and its metrics."""

from __future__ import annotations

import sys
from pathlib import Path

from analysis import runs
from benchmarks.cli import arguments
from benchmarks.cli.common import (
    Maker,
    metric,
    options_of,
    protocol_of,
)
from benchmarks.data.names import (
    parse_benchmark,
)
from benchmarks.running import disk
from benchmarks.running.codes import FAILURE
from benchmarks.studies import cells
from benchmarks.training import errors, progress


def carry_out(command: arguments.RunCommand) -> int:
    """Do the run unless it is done, and print its metrics; the exit code."""
    options = options_of(command)
    benchmark = parse_benchmark(command.benchmark)
    row = cells.parse_row(command.method, protocol_of(command))
    maker = Maker(command, benchmark, options)
    cell = maker.cell(row, command.seed)
    root = command.out.expanduser().absolute()
    root.mkdir(parents=True, exist_ok=True)
    if runs.status_of(runs.folder_of(root, cell.run)).state == "new":
        maker.tell()
    try:
        status = disk.execute(
            cell.run, cell.recorded, root, options, benchmark, progress.for_terminal()
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
        print(f"selected epoch: not offered, {result['selection']['reason']}")
    cost = result["cost"]
    print(
        f"cost: {cost['charged_seconds']:.1f} s charged, {cost['seconds_per_epoch']:.2f} s an "
        f"epoch, {cost['passes_per_row']:.2f} passes a row, {cost['memory_mib']:.0f} MiB"
    )
    print(_shown(folder))
    return 0


def _shown(folder: Path) -> str:
    here = Path.cwd()
    return f"results: {folder.relative_to(here) if folder.is_relative_to(here) else folder}"
