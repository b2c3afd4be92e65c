"""The functions of ``import augbench``: the commands, returning DataFrames."""

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
"""Options that make sense only on the command line."""
FIRST = ["benchmark", "model", "protocol", "row", "seed", "id", "status", "reason"]
"""Columns of a table of runs that come before its metrics."""
AnyCommand = TypeVar("AnyCommand", CompareCommand, ReportCommand, SweepCommand, TableCommand)


def compare(
    benchmark: str = "digits",
    methods: str | Iterable[str] = "none,crop,mixup,cutmix",
    **options: Any,
) -> DataFrame:
    """Compare methods over seeds, as ``augbench compare`` does; finished runs are reused.

    ``options`` are those of the command, with _ for -: ``epochs=20, seeds=10, jobs=2, out="runs"``;
    ``methods`` is a list of rows, or one string with commas. Prints the table of the command.

    Returns one line per finished run of the comparison, as ``records(..., each="run")`` does. A
    failed run has a ``reason`` and no metrics; a run that could not be executed (a full disk) has
    no line and is listed below the table.

    In a script, call it under ``if __name__ == "__main__":``, because it starts processes.

    Raises:
        UsageError, NamingError: subclasses of ValueError; the message says what is expected.
        DataError: the data are missing or cannot be used.
        KeyboardInterrupt: interrupted, or the time limit is reached; the same call resumes.
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
    """Run a study file, or a shipped study by its name, as ``augbench sweep`` does.

    ``options`` are those of the command, with _ for -: ``tier="paper", out="runs"``; for ``--set``,
    pass ``settings=["seeds=1", "training.epochs=5"]``. Prints the command's tables.

    Returns one line per finished run of the study, as ``records(..., each="run")`` does.

    Raises:
        StudyError, UsageError, NamingError: subclasses of ValueError; the message says what is
            expected.
        DataError: the data or the results folder cannot be used.
        KeyboardInterrupt: interrupted, or the time limit is reached; the same call resumes.
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
    """Read the runs of results folders, each run once.

    Of a row that was run with several versions of its code, the newest is returned, as in reports;
    ``all_versions`` returns all of them, which differ in ``code``.

    ``each="metric"`` returns one line per metric of each run, as in a report's ``records.parquet``:
    ``when`` (last, selected), ``split`` (select, test), ``metric``, ``class`` (for a recall, else
    -1) and ``value``, with the run's settings and cost. ``each="run"`` returns one line per run:
    ``benchmark``, ``model``, ``protocol``, ``row``, ``seed``, ``id``, ``status``, ``reason``,
    its test metrics at the last epoch (``accuracy``, ``auc``, ...), then everything else.

    Folders without a readable result, and runs of older versions that are left out, are reported on
    standard error.

    Raises:
        UsageError: a folder does not exist, or none contains a run with a result.
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
        raise UsageError(f"records: expected folders with finished runs, got {shown}")
    kept, _, older = versions.newest(list(found.values()), (), all_versions, "all_versions=True")
    if older:
        print(older, file=sys.stderr)
    return _lines(kept, each)


def report(
    runs: str | Path | Iterable[str | Path], out: str | Path = "report", **options: Any
) -> Path:
    """Write the report on a results folder, as ``augbench report`` does; return the page's path.

    ``runs`` may be several folders or packs. ``options`` are ``study``, ``published``, ``metrics``,
    ``format``, ``recompute``, ``all_versions``, and ``beside`` for ``--with``.

    Raises:
        UsageError, StudyError, NoRuns: subclasses of ValueError; the message says what is expected.
        OSError: a pack or records file cannot be read.
    """
    from benchmarks.cli import report  # noqa: PLC0415 - loads matplotlib

    folders = [runs] if isinstance(runs, str | Path) else list(runs)
    return report.write(_command(ReportCommand, {"runs": folders, "out": out, **options}))[0]


def table(runs: str | Path, **options: Any) -> DataFrame:
    """Make a table of chosen rows, benchmarks and metrics, as ``augbench table`` does.

    ``options`` are those of the command, with _ for - and ``beside`` for ``--with``:
    ``rows="none=No Aug, mixup"``,
    ``benchmarks="blood,derma"``, ``metrics="accuracy,auc"``; ``rows`` and ``benchmarks`` may be
    lists of names, or dictionaries of names and labels. ``out`` also writes the table to a file.

    Returns one line per row, with columns (benchmark, metric, statistic); the statistics over seeds
    are ``mean``, ``sd`` and ``n``, in per cent where the table shows per cent.

    Raises:
        UsageError, NamingError, NoRuns: subclasses of ValueError; the message says what is
            expected.
    """
    from benchmarks.cli import table as tabulating  # noqa: PLC0415 - not for the help

    for name in ("rows", "benchmarks"):
        if isinstance(given := options.get(name), Mapping):
            options[name] = ", ".join(f'{key}="{label}"' for key, label in given.items())
        elif given is not None and not isinstance(given, str):
            options[name] = ", ".join(given)
    return tabulating.numbers(_command(TableCommand, {"runs": runs, **options}))


def _command(kind: type[AnyCommand], options: Mapping[str, Any]) -> AnyCommand:
    """Make a command, with its values checked as on the command line."""
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
    if not own:  # no run has finished
        return pd.DataFrame(columns=pd.Index(FIRST))
    long = reading.frame(own)
    if each == "metric":
        return long
    cell = long.columns[: list(long.columns).index("when")]
    runs = long.drop_duplicates("id")[cell].reset_index(drop=True)
    for name in runs.select_dtypes("category"):  # groupby would count unused categories
        runs[name] = runs[name].astype(str)
    last = long[(long["when"] == "last") & (long["split"] == "test") & (long["class"] == -1)]
    wide = last.pivot(index="id", columns="metric", values="value")
    wide.columns = list(map(str, wide.columns))
    wide.index = wide.index.astype(str)
    made = runs.merge(wide, how="left", left_on="id", right_index=True, validate="one_to_one")
    first = [*FIRST, *wide.columns]
    return made.reindex(columns=[*first, *(name for name in cell if name not in FIRST)])
