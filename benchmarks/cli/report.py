"""``augbench report`` and ``augbench plan``; needs neither torch nor ray."""

from __future__ import annotations

import math
import sys
import traceback
from pathlib import Path

from analysis import plan, question, records, versions
from analysis.metrics import MEASURES
from analysis.report.page import FORMATS, NoRuns, Options, report
from analysis.table import wrapped
from benchmarks.cli.arguments import (
    PlanCommand,
    ReportCommand,
    UsageError,
)
from benchmarks.running.codes import FAILURE, USAGE
from benchmarks.studies import shipped
from methods.naming import NamingError, split, unknown


def carry_out(command: ReportCommand | PlanCommand) -> int:
    """Run the command; return the exit code."""
    try:
        return _report(command) if isinstance(command, ReportCommand) else _plan(command)
    except (NamingError, UsageError, NoRuns, OSError) as error:
        if command.debug:
            traceback.print_exc()
        print(f"augbench: {error}", file=sys.stderr)
        return FAILURE if isinstance(error, OSError) else USAGE


def _report(command: ReportCommand) -> int:
    print(*write(command), sep="\n")
    return 0


def write(command: ReportCommand) -> list[Path]:
    """Write the report; return the files that a reader opens, the page first.

    Raises:
        UsageError, NoRuns: an invalid value; a folder without results.
        StudyError: the study file cannot be used.
    """
    wanted = [each.strip() for each in command.format.split(",") if each.strip()]
    unknown = [each for each in wanted if each not in FORMATS]
    if unknown or not wanted:
        raise UsageError(f"format: expected some of {', '.join(FORMATS)}, got {command.format!r}")
    if not command.runs:
        raise UsageError("runs: expected a results folder, got none")
    root, *others = (each.expanduser() for each in command.runs)
    out = command.out.expanduser()
    if not root.is_dir():
        raise UsageError(f"runs: expected a results folder, got {root}")
    if out.exists() and not out.is_dir():
        raise UsageError(f"out: expected a folder, got the file {command.out}")
    return report(
        Options(
            root,
            out,
            wanted,
            published=command.published,
            recompute=command.recompute,
            study=command.study,
            all_versions=command.all_versions,
            others=others,
            beside=[each.expanduser() for each in command.beside],
            metrics=metrics_in(command.metrics),
        )
    )


def metrics_in(text: str) -> list[str]:
    """Names of metrics separated by commas.

    Raises:
        NamingError: an unknown one.
    """
    wanted = list(dict.fromkeys(split(text)))
    for name in wanted:
        if name not in MEASURES:
            raise unknown("metric", name, MEASURES)
    return wanted


def _plan(command: PlanCommand) -> int:
    if not 0 < command.detect < math.inf:
        raise UsageError(f"detect: expected points above 0, got {command.detect}")
    if not 0 < command.power < 1:
        raise UsageError(f"power: expected a number in (0, 1), got {command.power}")
    root, study = command.runs.expanduser(), command.study
    root = shipped.find(root) if root.name in shipped.names() else root
    if root.is_file():
        if study:
            raise UsageError("study: expected no --study with a study file")
        root, study = command.out.expanduser(), question.name_in(root)
    if not root.is_dir():
        raise UsageError(f"runs: expected a results folder or a study file, got {root}")
    asked = question.read(root, study)
    found, _, older = versions.newest(*asked.own(*records.scan(root)), command.all_versions)
    plain = [record for record in found if not record.searched]
    if not any(record.done for record in plain):
        raise NoRuns(f"{root}: expected finished runs, to estimate variances from")
    wanted = split(command.benchmarks)
    print(plan.plan(plain, asked, command.detect, command.power, wanted))
    mixed = "" if wanted else question.covers(root, asked, "--study NAME, --benchmarks")
    for remark in filter(None, (older, mixed)):
        print(f"\n{wrapped(remark)}")
    return 0
