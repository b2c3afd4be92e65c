"""What ``import augbench`` offers beside classes: the commands, as functions with DataFrames."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from analysis import question, versions
from analysis import records as reading
from benchmarks.cli.arguments import (
    CompareCommand,
    ReportCommand,
    SweepCommand,
    TableCommand,
    UsageError,
)
from methods.naming import unknown

if TYPE_CHECKING:
    from pandas import DataFrame

OF_COMMANDS = ("debug", "dry_run", "init", "list")
"""Options that make sense on a command line alone."""
FIRST = ["benchmark", "model", "protocol", "row", "seed", "id", "status", "reason"]
"""Columns of a table of runs, before its metrics."""
AnyCommand = TypeVar("AnyCommand", CompareCommand, ReportCommand, SweepCommand, TableCommand)


def compare(
    benchmark: str = "digits",
    methods: str | Iterable[str] = "none,crop,mixup,cutmix",
    **options: Any,
) -> DataFrame:
    """Compare methods over seeds, as ``augbench compare`` does; what is done is not done again.

    ``options`` are those of the command with _ for -: ``epochs=20, seeds=10, jobs=2, out="runs"``;
    ``methods`` is a list of rows or one text with commas. Prints the table of the command.

    Returns a line for each run of the comparison that has ended, as ``records(..., each="run")``: a
    run that failed has its ``reason`` and no metrics, one that could not be carried out (a full
    disk) has no line and stands below the table.

    In a script, call it below ``if __name__ == "__main__":``, as all that starts processes.

    Raises:
        UsageError, NamingError: of ValueError; the message says what is expected.
        DataError: data that are missing or cannot be used.
    """
    from benchmarks.cli import compare as comparing  # noqa: PLC0415 - loads torch

    listed = [methods] if isinstance(methods, str) else list(methods)
    if not all(isinstance(each, str) for each in listed):
        raise UsageError(f"methods: expected names of rows such as 'crop+mixup', got {listed!r}")
    methods = ",".join(listed)
    command = _command(CompareCommand, {"benchmark": benchmark, "methods": methods, **options})
    _, rows = comparing.compare(command)
    return _lines([record for row in rows for record in row.records], "run")


def sweep(study: str | Path, **options: Any) -> DataFrame:
    """Carry out a study file, or a shipped study by its name, as ``augbench sweep`` does.

    ``options`` are those of the command with _ for -, as ``tier="paper", out="runs"``; in place
    of ``--set`` stands ``settings=["seeds=1", "training.epochs=5"]``. Prints the command's tables.

    Returns a line for each run of the study that has ended, as ``records(..., each="run")``.

    Raises:
        StudyError, UsageError, NamingError: of ValueError; the message says what is expected.
        DataError: data or results folder cannot be used.
    """
    from benchmarks.cli import sweep  # noqa: PLC0415 - loads torch
    from benchmarks.studies import loading, shipped  # noqa: PLC0415

    settings = options.pop("settings", ())
    settings = [settings] if isinstance(settings, str) else list(settings)
    command = _command(SweepCommand, {"file": study, "settings": (tuple(settings),), **options})
    sweep.carry_out(command)
    asked = loading.load(shipped.find(Path(study)), settings, command.tier)
    root = (command.out or asked.out).expanduser()
    found, _ = question.read(root, asked.name).own(*reading.scan(root))
    return _lines(found, "run")


def records(
    *folders: str | Path, each: Literal["metric", "run"] = "metric", all_versions: bool = False
) -> DataFrame:
    """The runs that lie in results folders, each run once.

    A row that was run with several versions of its code is given in the newest, as reports show it;
    ``all_versions`` gives all of them, told apart by ``code``.

    ``each="metric"`` gives a line for each metric of each run, as ``records.parquet`` of a report:
    ``when`` (last, selected), ``split`` (select, test), ``metric``, ``class`` (of a recall, else
    -1) and ``value``, beside what the run is and what it cost. ``each="run"`` gives a line for each
    run: ``benchmark``, ``model``, ``protocol``, ``row``, ``seed``, ``id``, ``status``, ``reason``,
    its test metrics at the last epoch (``accuracy``, ``auc``, ...), then all else.

    A folder without a result that can be read, and runs of older versions that are left out, are
    told on standard error.

    Raises:
        UsageError: a folder does not exist, or none of them holds a run with a result.
    """
    if each not in ("metric", "run"):
        raise UsageError(f"each: expected metric or run, got {each!r}")
    if not all(isinstance(folder, str | Path) for folder in folders):
        raise UsageError(f"records: expected paths of results folders, got {folders!r}")
    found: dict[str, reading.Record] = {}
    for folder in map(Path, folders):
        if not folder.expanduser().is_dir():
            raise UsageError(f"records: expected a results folder, got {folder}")
        ended, unread = reading.scan(folder.expanduser())
        for one in ended:
            found.setdefault(one.run.id, one)
        for left in unread:
            print(f"left out: {left.folder}: {left.reason}", file=sys.stderr)
    if not found:
        shown = ", ".join(map(str, folders)) or "none"
        raise UsageError(f"records: expected folders that hold runs with results, got {shown}")
    kept, _, older = versions.newest(list(found.values()), (), all_versions, "all_versions=True")
    if older:
        print(older, file=sys.stderr)
    return _lines(kept, each)


def report(runs: str | Path, out: str | Path = "report", **options: Any) -> Path:
    """Write the page on a results folder, as ``augbench report`` does; the path of the page.

    ``options`` are ``study``, ``published``, ``format``, ``recompute`` and ``all_versions``.

    Raises:
        UsageError, StudyError, NoRuns: of ValueError; the message says what is expected.
    """
    from benchmarks.cli import report  # noqa: PLC0415 - loads matplotlib

    return report.write(_command(ReportCommand, {"runs": runs, "out": out, **options}))[0]


def table(runs: str | Path, **options: Any) -> DataFrame:
    """The numbers of a table of chosen rows, benchmarks and metrics, as ``augbench table`` has it.

    ``options`` are those of the command with _ for -: ``rows="none=No Aug, mixup"``,
    ``benchmarks="blood,derma"``, ``metrics="accuracy,auc"``; ``rows`` and ``benchmarks`` may be
    lists of names, or dictionaries of names and labels. ``out`` also writes the table into a file.

    Returns a line for each row, in columns (benchmark, metric, statistic) with the statistics
    ``mean``, ``sd`` and ``n``: over seeds, in per cent where the table has them so.

    Raises:
        UsageError, NamingError, NoRuns: of ValueError; the message says what is expected.
    """
    from benchmarks.cli import table as tabulating  # noqa: PLC0415 - not for the help

    for name in ("rows", "benchmarks"):
        if isinstance(given := options.get(name), Mapping):
            options[name] = ", ".join(f'{key}="{label}"' for key, label in given.items())
        elif given is not None and not isinstance(given, str):
            options[name] = ", ".join(given)
    return tabulating.numbers(_command(TableCommand, {"runs": runs, **options}))


def _command(kind: type[AnyCommand], options: Mapping[str, Any]) -> AnyCommand:
    """A command of the command line, its values checked as there."""
    from pydantic import TypeAdapter, ValidationError  # noqa: PLC0415 - not for the help

    known = [field.name for field in fields(kind) if field.name not in OF_COMMANDS]
    for name in options:
        if name not in known:
            raise unknown("option", name, known)
    try:
        return TypeAdapter(kind).validate_python(dict(options))
    except ValidationError as error:
        wrong = error.errors()[0]
        where = ".".join(map(str, wrong["loc"][:1]))
        raise UsageError(f"{where}: {wrong['msg']}, got {wrong['input']!r}") from error


def _lines(found: Iterable[reading.Record], each: str) -> DataFrame:
    import pandas as pd  # noqa: PLC0415 - takes half a second

    own = list({record.run.id: record for record in found}.values())
    if not own:  # nothing has ended
        return pd.DataFrame(columns=pd.Index(FIRST))
    long = reading.frame(own)
    if each == "metric":
        return long
    cell = long.columns[: list(long.columns).index("when")]
    runs = long.drop_duplicates("id")[cell].reset_index(drop=True)
    for name in runs.select_dtypes("category"):  # which groupby would count where none is left
        runs[name] = runs[name].astype(str)
    last = long[(long["when"] == "last") & (long["split"] == "test") & (long["class"] == -1)]
    wide = last.pivot(index="id", columns="metric", values="value")
    wide.columns = list(map(str, wide.columns))
    wide.index = wide.index.astype(str)
    made = runs.merge(wide, how="left", left_on="id", right_index=True, validate="one_to_one")
    first = [*FIRST, *wide.columns]
    return made.reindex(columns=[*first, *(name for name in cell if name not in FIRST)])
