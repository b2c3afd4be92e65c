"""The command line, ``augbench``: each command imports what it needs only when called."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import traceback
from importlib.metadata import version
from io import TextIOWrapper
from typing import Any

import tyro
from tyro.conf import DisallowNone, FlagCreatePairsOff, OmitArgPrefixes

from benchmarks.cli.arguments import (
    Command,
    CompareCommand,
    DataCommand,
    DoctorCommand,
    GenerateCommand,
    ListCommand,
    PackCommand,
    PlanCommand,
    PolicyCommand,
    PredictCommand,
    ReportCommand,
    RunCommand,
    RunsCommand,
    ShowCommand,
    SweepCommand,
    TableCommand,
    UnpackCommand,
    UsageError,
)
from benchmarks.running import timelimit
from benchmarks.running.codes import FAILURE, INTERRUPTED, OUT_OF_TIME, USAGE
from benchmarks.running.timelimit import OutOfTime
from methods.naming import NamingError

AGAIN = (
    ReportCommand,
    TableCommand,
    PlanCommand,
    RunsCommand,
    PackCommand,
    UnpackCommand,
    DoctorCommand,
    GenerateCommand,
    PolicyCommand,
)
"""Commands that start over when repeated."""


def main() -> None:
    """Entry point of ``augbench``, ``python -m augbench`` and ``python -m benchmarks``."""
    timelimit.block()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # tables have characters that some terminals lack
    try:
        try:
            sys.exit(run(sys.argv[1:]))
        finally:
            print(end="", flush=True)
    except BrokenPipeError:
        # The reader of our output is gone (| head); Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(FAILURE)


def read(arguments: list[str]) -> Any:
    """Parse a command line.

    Raises:
        SystemExit: help was requested, or the arguments are invalid (code 2).
    """
    return tyro.cli(
        Command,  # type: ignore[arg-type]
        prog="augbench",
        description="Compare learnable augmentation methods under equal conditions. "
        "--version on its own prints the version. Exit codes: 0 success, 1 something failed, "
        "2 wrong usage, 3 time limit reached, 130 interrupted.",
        args=arguments,
        config=(OmitArgPrefixes, FlagCreatePairsOff, DisallowNone),
    )


def run(arguments: list[str]) -> int:
    """Run a command line; return 0, 1 (something failed), 2 (usage), 3 (time limit reached) or 130
    (interrupted).

    Raises:
        SystemExit: help was requested, or the arguments are invalid (code 2).
        BrokenPipeError: the reader of the output is gone.
    """
    if arguments == ["--version"]:
        print(f"augbench {version('augbench')}")
        return 0
    command = read(arguments)
    if isinstance(command, ListCommand):
        from benchmarks.cli import listing

        shown, available = listing.lines(command.check)
        print("\n".join(shown))
        return 0 if available or not command.check else FAILURE
    if isinstance(command, SweepCommand) and (command.list or command.init is not None):
        try:
            told = _about_studies(command)
        except (NamingError, UsageError, OSError) as error:
            print(f"augbench: {error}", file=sys.stderr)
            return FAILURE if isinstance(error, OSError) else USAGE
        print("\n".join(told))
        return 0
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C does
    try:
        return _carry_out(command)
    except KeyboardInterrupt as stop:
        again = shlex.join(["augbench", *arguments])
        if isinstance(command, AGAIN) and not str(stop):
            said = f"stopped. Start again with: {again}"
        else:
            kept = str(stop) or "stopped; finished work is kept"
            said = f"{kept}. Resume with: {again}"
        print(f"\naugbench: {said}", file=sys.stderr)
        return OUT_OF_TIME if isinstance(stop, OutOfTime) else INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, before)


def _about_studies(command: SweepCommand) -> list[str]:
    """Handle ``augbench sweep`` with --list or --init; return the lines to print.

    Raises:
        NamingError, UsageError: a study is given as well, or the new file cannot be written.
    """
    from benchmarks.studies import shipped

    if command.file is not None or (command.list and command.init is not None):
        raise UsageError("sweep: expected a study, --list or --init FILE, and only one of them")
    if command.init is None:
        return shipped.lines()
    shipped.write_new(command.init)
    again = shlex.join(["augbench", "sweep", str(command.init), "--dry-run"])
    return [f"{command.init}: a study to edit. To see what it would run: {again}"]


def _carry_out(
    command: RunCommand
    | CompareCommand
    | SweepCommand
    | PredictCommand
    | PolicyCommand
    | ShowCommand
    | GenerateCommand
    | DataCommand
    | DoctorCommand
    | ReportCommand
    | TableCommand
    | PlanCommand
    | RunsCommand
    | PackCommand
    | UnpackCommand,
) -> int:
    if isinstance(command, ReportCommand | PlanCommand):
        from benchmarks.cli import report

        return report.carry_out(command)
    if isinstance(command, TableCommand):
        from benchmarks.cli import table

        return table.carry_out(command)
    if isinstance(command, RunsCommand):
        from benchmarks.cli import runs

        return runs.carry_out(command)
    if isinstance(command, PackCommand | UnpackCommand):
        from benchmarks.cli import pack

        return pack.carry_out(command)
    from benchmarks.cli import common  # loads torch, which neither --help nor list needs

    try:
        match command:
            case RunCommand():
                from benchmarks.cli import run

                return run.carry_out(command)
            case CompareCommand():
                from benchmarks.cli import compare

                return compare.carry_out(command)
            case SweepCommand():
                from benchmarks.cli import sweep

                return sweep.carry_out(command)
            case PredictCommand():
                from benchmarks.cli import predict

                return predict.carry_out(command)
            case PolicyCommand():
                from benchmarks.cli import policy

                return policy.carry_out(command)
            case ShowCommand():
                from benchmarks.cli import show

                return show.carry_out(command)
            case GenerateCommand():
                from benchmarks.cli import generate

                return generate.carry_out(command)
            case DataCommand():
                from benchmarks.cli import data

                return data.carry_out(command)
            case DoctorCommand():
                from benchmarks.cli import doctor

                return doctor.carry_out(command)
    except BrokenPipeError:
        raise
    except Exception as error:
        code, text = common.explain(error)
        if not text:
            raise
        if command.debug:
            traceback.print_exc()
        print(f"augbench: {text}", file=sys.stderr)
        return code


if __name__ == "__main__":
    main()
