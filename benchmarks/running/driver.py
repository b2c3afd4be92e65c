"""The jobs of a round: which are left, and what became of the others. For any executor.

An executor takes a job with ``offer`` under a name of its own, and tells by that name what happens
to it. What is done stands in the runs' directories, and is looked up there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from analysis import runs
from analysis.runs import Status
from benchmarks.running import disk
from benchmarks.running.capacity import Capacity
from benchmarks.running.curves import curves_of
from benchmarks.running.display import Display
from benchmarks.running.problems import GOES_ON, Problem
from benchmarks.studies.cells import Cell
from benchmarks.studies.costs import costs_in
from benchmarks.studies.ledger import UNFINISHED, Ledger
from benchmarks.studies.rounds import Job, Round
from benchmarks.studies.schema import Study

Outcomes = dict[str, Status | Problem]
"""How each run ended, by its id."""
LOST_WORKERS = 10
"""How often a run may lose its worker through no fault of its own before that counts as one."""


class Driver:
    """The jobs of a round: which wait, which are handed out, and how their runs ended."""

    def __init__(
        self,
        work: Round,
        ledger: Ledger,
        study: Study,
        capacity: Capacity,
        stopping: Callable[[], bool],
    ) -> None:
        self.ledger, self.stopping = ledger, stopping
        self.jobs = [job for job in work.jobs if any(ledger.to_do(cell) for cell in job.cells)]
        left = [cell for job in self.jobs for cell in job.cells if ledger.to_do(cell)]
        self.display = Display(
            {cell.run.id: cell for cell in left},
            {cell.run.id: ledger.epochs(cell) for cell in left},
            capacity.workers,
            costs_in(ledger.root, capacity.device),
        )
        self.outcomes: Outcomes = {}
        self._ladder, self._curves = work.ladder, curves_of(study, ledger.root)
        self._waiting = deque(range(len(self.jobs)))
        self._offered: dict[str, tuple[int, set[str]]] = {}
        """the job's place, and the ids of its runs that are to be done"""
        self._running: set[str] = set()
        self._lost: dict[int, int] = {}
        self._failed: dict[str, int] = {}
        """of runs that had failed when they were handed out: when, by id"""

    @property
    def over(self) -> bool:
        """Whether nothing is left to offer or to come back."""
        return self.stopping() or not (self._waiting or self._offered)

    @property
    def idle(self) -> bool:
        """Whether no worker is at work."""
        return not self._running

    @property
    def offered(self) -> int:
        """Jobs that are handed out."""
        return len(self._offered)

    def offer(self, name: str) -> dict[str, Any] | None:
        """The next job: its place in ``jobs``, its runs to do, and what a logger may show of it."""
        if not self._waiting:
            return None
        place = self._waiting.popleft()
        job = self.jobs[place]
        run = job.first.run
        left = {cell.run.id for cell in job.cells if self.ledger.to_do(cell)}
        self._offered[name] = place, left
        for cell in job.cells:
            if self.ledger.status(cell).state == "failed":
                self._failed[cell.run.id] = self._written(cell)
        return {
            "job": place,
            "runs": sorted(left),
            "benchmark": run.benchmark,
            "model": run.model,
            "protocol": run.protocol,
            "row": run.row,
            "seed": run.seed,
            **asdict(run.training),  # type: ignore[call-overload]
        }

    def started(self, name: str) -> None:
        """A worker begins."""
        self._running.add(name)
        self.display.started(self._job(name).first)

    def reported(self, name: str, told: dict[str, Any]) -> None:
        """A run goes on, or ends."""
        job = self._job(name)
        for note in told.get("notes", ()):
            self.display.note(note)
        if "problem" in told:
            self._problem(name, told["problem"])
        if "epoch" in told:
            self.display.reached(job.first, told["epoch"])
            if self._curves is not None:
                self._curves.extend(job.cells)
        self.display.tick()

    def goes_on(self, name: str, told: dict[str, Any]) -> bool:
        """Whether a trial of a search earned its way past a rung; else its runs are ended."""
        if self._ladder is None or "rung" not in told:
            return True
        job = self._job(name)
        rung, score = told["rung"], told["score"]
        self._ladder.seen(job.group, rung, job.trial, score)
        if self._ladder.goes_on(job.group, rung, job.trial):
            return True
        for cell in job.cells:
            reason = f"rung {rung}: select {job.metric} {score:.4f} is not among the best there"
            disk.conclude(cell.run, cell.recorded, self.ledger.root, "stopped", reason)
        return False

    def ended(self, name: str, death: str = "") -> None:
        """The worker returned, or ended with its machine: the runs' directories say how.

        ``death`` says why the worker's process is gone, where that may be the run's own fault.
        """
        place, left = self._offered.pop(name)
        self._running.discard(name)
        if self.stopping():
            return
        job, again = self.jobs[place], False
        cells = [c for c in job.cells if c.run.id in left and c.run.id not in self.outcomes]
        if not death and any(map(self._pending, cells)):
            self._lost[place] = self._lost.get(place, 0) + 1
            again = self._lost[place] <= LOST_WORKERS
            death = "" if again else "its worker was lost too often"
        for cell in cells:
            again |= self._conclude(cell, death)
        if again:
            self.display.paused(job.first)
            self._waiting.append(place)

    def _job(self, name: str) -> Job:
        return self.jobs[self._offered[name][0]]

    def _written(self, cell: Cell) -> int:
        """When the result of a run was written."""
        return (self.ledger.folder(cell) / "result.json").stat().st_mtime_ns

    def _pending(self, cell: Cell) -> bool:
        """Whether the run has not ended, or its failure is the one that it was handed out with."""
        state = self.ledger.status(cell).state
        if state == "failed" and cell.run.id in self._failed:
            return self._written(cell) == self._failed[cell.run.id]
        return state in UNFINISHED

    def _problem(self, name: str, text: str) -> None:
        """It could not be done for a reason that is not the run's; nothing is recorded."""
        left = self._offered[name][1]
        for cell in self._job(name).cells:
            if cell.run.id in left and self._pending(cell):
                self._tell(cell, Problem(text))

    def _conclude(self, cell: Cell, death: str) -> bool:
        """Tell how a run ended that no worker has any more; whether it is tried once more."""
        status = self.ledger.status(cell)
        pending = self._pending(cell)
        if pending:
            if not death:
                return True
            if not self.ledger.retries:  # nobody knows whether it is the run's fault
                self._tell(cell, Problem(f"{death}; {GOES_ON}"))
                return False
        if pending or status.state == "failed":
            reason = death if pending else status.reason
            self.ledger.failed(cell, reason)
            if self.ledger.tries_left(cell):
                self.display.again(cell, reason)
                return True
        if status.state in UNFINISHED:
            text = f"{death} (tried {len(self.ledger.failures(cell))} time(s))"
            status = disk.conclude(cell.run, cell.recorded, self.ledger.root, "failed", text)
        self._tell(cell, status)
        return False

    def _tell(self, cell: Cell, outcome: Status | Problem) -> None:
        self.outcomes[cell.run.id] = outcome
        done = not isinstance(outcome, Problem) and outcome.state == "done"
        if self._curves is not None and done:
            self._curves.finish(cell)
        result = runs.read_result(self.ledger.folder(cell)) if done else None
        self.display.ended(cell, outcome, result)


def stopped(work: Round, ledger: Ledger) -> str:
    """What is said of a round that was stopped."""
    kept = sum(
        ledger.status(cell).state == "interrupted" for job in work.jobs for cell in job.cells
    )
    return f"stopped; {kept} run(s) have a checkpoint"
