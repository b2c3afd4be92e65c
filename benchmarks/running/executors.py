"""The rounds of a study on an executor: processes of this machine, or Ray, here or on a cluster."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Protocol

from analysis import runs
from analysis.numbers import count
from analysis.studyfile import StudyError
from benchmarks.running import capacity, local, sharing
from benchmarks.running.capacity import Capacity
from benchmarks.running.disk import Options
from benchmarks.running.driver import Outcomes, kept
from benchmarks.running.timelimit import Limit, OutOfTime
from benchmarks.studies.cells import Cell
from benchmarks.studies.ledger import Ledger
from benchmarks.studies.rounds import Round, Work
from benchmarks.studies.schema import Study
from methods import own

Name = Literal["local", "ray"]


class Executor(Protocol):
    """Carries out rounds of jobs."""

    @property
    def capacity(self) -> Capacity:
        """Where it carries them out."""
        ...

    def carry_out(self, work: Round, ledger: Ledger, study: Study) -> Outcomes:
        """Do the jobs that are left; the outcome of each run by its id.

        Once the time limit is reached, the runs that are left have none.

        Raises:
            KeyboardInterrupt: after SIGINT or SIGTERM, when the workers have stopped.
        """
        ...


@dataclass(frozen=True)
class Where:
    """Which executor, and how many runs at a time."""

    executor: Name
    address: str = ""
    """of the Ray to join; empty: one of our own"""
    workers: int | None = None
    """as many as fit unless given"""
    limit: Limit = field(default_factory=Limit)
    """no run is begun that cannot finish an epoch before it"""

    def opened(
        self, study: Study, ledger: Ledger, options: Options, wanted: list[Cell]
    ) -> AbstractContextManager[Executor]:
        """The executor, which is there as long as the block runs.

        Raises:
            StudyError: no machine has what one run takes.
            DataError: data or results folder cannot be used on a machine.
        """
        if self.executor == "local":
            return local.opened(study, ledger.root, options, self.workers, self.limit)
        from benchmarks.running.on_ray import executor  # noqa: PLC0415 - Ray, where it is needed

        return executor.opened(
            study, ledger.root, options, self.address, self.workers, wanted, self.limit
        )


def check(study: Study, where: Where) -> None:
    """Refuse what an executor cannot do.

    Raises:
        StudyError: processes of this machine know no cluster, and none of Ray's callbacks.
    """
    if where.executor == "ray":
        return
    if where.address:
        raise StudyError(f"executor: expected ray for the address {where.address}, got local")
    for name in ("dashboard", "wandb", "mlflow"):
        if getattr(study, name):
            raise StudyError(f"{name}: expected --executor ray, which has it, got local")


def _check_locks(root: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    if not runs.locks_hold(root):
        print(
            f"{root}: file locks do not work on this file system; do not run another command on "
            "this folder at the same time",
            file=sys.stderr,
        )


def carry_out(
    work: Work,
    ledger: Ledger,
    options: Options,
    where: Where,
    begin: Callable[[Sequence[Cell]], None],
) -> Outcomes:
    """Carry out the rounds of a study; an executor is opened where something is to be done.

    ``begin`` is called with the runs of the first such round, before any of them starts.

    Raises:
        KeyboardInterrupt: after SIGINT or SIGTERM, when the workers have stopped.
        OutOfTime: the time limit was reached, or no run that is left can finish an epoch before it.
    """
    study = work.plan.study
    options = replace(options, code=own.sources(work.plan.own_names()))
    outcomes: Outcomes = {}
    with ExitStack() as stack:
        executor: Executor | None = None
        for each in work.rounds():
            wanted = [cell for job in each.jobs for cell in job.cells]
            ledger.begin(wanted)
            left = [cell for cell in wanted if ledger.to_do(cell)]
            if not left:
                continue
            if where.limit.reached():
                raise _out_of_time(left, ledger)
            opens = executor is None
            if executor is None:
                if where.limit.until < math.inf:
                    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(where.limit.until))
                    print(f"Time limit: runs stop at {at}", file=sys.stderr)
                begin(wanted)
                _check_locks(ledger.root)
                patience = min(sharing.PATIENCE_SECONDS, where.limit.left() / 5)
                packed = sharing.shared(
                    work.plan,
                    left,
                    options.memory_gib,
                    where.workers,
                    bool(where.address),
                    patience,
                )
                study = stack.enter_context(packed)
                executor = stack.enter_context(where.opened(study, ledger, options, wanted))
            there = executor.capacity
            on = f" on {count(there.machines, 'machine')}" if there.address else ""
            if opens and not there.address:
                threads = max(block.threads for block in study.blocks)
                if text := capacity.crowded(min(there.workers, len(left)), threads):
                    print(f"Warning: {text}", file=sys.stderr)
            print(
                f"Runs: {len(left)} to do, {len(wanted) - len(left)} done, {there.workers} at a "
                f"time{on}",
                file=sys.stderr,
            )
            outcomes |= executor.carry_out(each, ledger, study)
            rest = [cell for cell in left if cell.run.id not in outcomes]
            if rest and where.limit.given:
                raise _out_of_time(rest, ledger)
    return outcomes


def _out_of_time(left: Sequence[Cell], ledger: Ledger) -> OutOfTime:
    return OutOfTime(
        f"time limit reached; {count(len(left), 'run')} left, {kept(left, ledger)} with a "
        "checkpoint"
    )
