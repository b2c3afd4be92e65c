"""``augbench compare``: rows over seeds on one machine, and their table."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import methods
from analysis import comparison, records, runs
from benchmarks.cli import arguments
from benchmarks.cli.arguments import UsageError
from benchmarks.cli.common import (
    FIGURES,
    Maker,
    options_of,
    protocol_of,
)
from benchmarks.data.names import (
    check_seeds,
    names_in,
    parse_benchmark,
)
from benchmarks.data.splits import Protocol
from benchmarks.running import capacity, local
from benchmarks.running.codes import FAILURE
from benchmarks.running.disk import Options
from benchmarks.studies import cells
from benchmarks.studies.cells import Row
from methods.naming import split


def carry_out(command: arguments.CompareCommand) -> int:
    """Do and print the comparison; the exit code."""
    return compare(command)[0]


def compare(command: arguments.CompareCommand) -> tuple[int, list[comparison.Row]]:
    """Do and print the comparison; the exit code, and its rows with what has ended of them."""
    options = options_of(command)
    root = command.out.expanduser().absolute()
    if command.records is not None and command.records.suffix != ".csv":
        raise UsageError(f"records: expected a name that ends in .csv, got {command.records}")
    if command.figure is not None and command.figure.suffix not in FIGURES:
        raise UsageError(f"figure: expected a name in .png, .pdf or .svg, got {command.figure}")
    names = split(command.methods)
    if not names:
        raise UsageError("methods: expected names separated by commas, got none")
    if command.seeds is not None and command.seeds < 1:
        raise UsageError(f"seeds: expected 1 or more, got {command.seeds}")
    if command.jobs is not None and command.jobs < 1:
        raise UsageError(f"jobs: expected 1 or more, got {command.jobs}")
    protocol = protocol_of(command)
    rows, missing = _rows(names, protocol)
    benchmarks = [parse_benchmark(name) for name in names_in(command.benchmark)]
    if not benchmarks:
        raise UsageError("benchmark: expected a name, got none")
    if command.figure is not None and len(benchmarks) > 1:
        raise UsageError(f"figure: expected one benchmark, got {len(benchmarks)}")
    for path in filter(None, (command.records, command.figure)):
        path.parent.mkdir(parents=True, exist_ok=True)  # before hours of runs, not after them
    makers = [Maker(command, benchmark, options) for benchmark in benchmarks]
    root.mkdir(parents=True, exist_ok=True)
    code, shown = 0, []
    kept: list[comparison.Row] = []
    for maker in makers:
        default = comparison.advised(maker.test_rows, maker.benchmark.folds)
        seeds = range(command.seeds if command.seeds is not None else default)
        check_seeds(maker.benchmark, seeds)
        asked = list(rows)
        if command.controls or protocol.name == "paper":  # there they are compulsory (design, 2)
            asked += cells.control_rows(rows, maker.benchmark, protocol)
        problems = _do(maker, asked, seeds, root, options, command)
        if command.same is not None:
            plain = [maker.cell(row, seed) for row in asked if not row.dirty for seed in seeds]
            extra = cells.equal_budget_rows(plain, root, command.same)
            problems |= _do(maker, extra, seeds, root, options, command)
            if not extra:
                print(
                    f"No row costs so much more {command.same} than its upstream that it makes an "
                    "epoch: none is added.",
                    file=sys.stderr,
                )
            asked += extra
        read = [_table_row(maker, row, seeds, root, problems) for row in asked]
        for place, row in missing:
            read.insert(place, row)
        shown.append(comparison.comparison(read, command.selection))
        kept += read
        failed = any(r.result["status"] == "failed" for row in read for r in row.records)
        code = FAILURE if problems or failed or missing else code
    print("\n\n\n".join(shown))
    print(f"\nResults: {root}")
    if command.records is not None:
        text = records.to_csv((row.name, row.records) for row in kept)
        runs.write_text(command.records, text)
        print(f"Records: {command.records}")
    if command.figure is not None and any(each.done for row in kept for each in row.records):
        from analysis.report import figures  # noqa: PLC0415 - loads matplotlib

        figures.draw_forest(kept, command.figure, command.selection)
        print(f"Figure: {command.figure}")
    return code, kept


def _rows(
    names: Sequence[str], protocol: Protocol
) -> tuple[list[Row], list[tuple[int, comparison.Row]]]:
    """The rows, and with their places those whose plug-in cannot be had, with the reason."""
    rows: list[Row] = []
    missing = []
    for place, name in enumerate(dict.fromkeys(names)):
        try:
            rows.append(cells.parse_row(name, protocol))
        except methods.Unavailable as reason:
            missing.append((place, comparison.Row(name, "none", (), (str(reason),))))
    if not rows:
        raise UsageError("; ".join(row.reasons[0] for _, row in missing))
    return list(dict.fromkeys(rows)), missing


def _do(
    maker: Maker,
    rows: Sequence[Row],
    seeds: range,
    root: Path,
    options: Options,
    command: arguments.CompareCommand,
) -> dict[str, str]:
    """Do what is not done; why runs could not be carried out, by id."""
    wanted = [maker.cell(row, seed) for seed in seeds for row in rows]
    states = ("new", "interrupted", *(("failed",) if options.retry_failed else ()))
    left = [
        cell for cell in wanted if runs.status_of(runs.folder_of(root, cell.run)).state in states
    ]
    if not left:
        return {}
    jobs = command.jobs
    if jobs is None:
        jobs = max(1, capacity.cores() // command.threads) if options.device == "cpu" else 1
    done = len(wanted) - len(left)
    if not done:  # who has runs of these data has read it
        maker.tell()
    print(f"Runs: {len(left)} to do, {done} done, {jobs} at a time", file=sys.stderr)
    reporter = local.Reporter(sum(cell.run.training.epochs for cell in left), len(left))
    try:
        outcomes = local.run_all(left, root, options, jobs, reporter)
    finally:
        reporter.close()
    return {
        name: outcome.text
        for name, outcome in outcomes.items()
        if isinstance(outcome, local.Problem)
    }


def _table_row(
    maker: Maker, row: Row, seeds: range, root: Path, problems: dict[str, str]
) -> comparison.Row:
    wanted = [maker.cell(row, seed) for seed in seeds]
    name = wanted[0].run.row + (f"@{cells.DIRTY}" if row.dirty else "")
    upstream = cells.upstream_of(row.method)
    return comparison.row_of(name, upstream, [cell.run for cell in wanted], root, problems)
