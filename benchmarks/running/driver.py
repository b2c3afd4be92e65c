"""The jobs of a round: which are left, and what became of the others. For any executor.

An executor takes a job with ``offer`` under a name of its own, and tells by that name what happens
to it. What is done stands in the runs' directories, and is looked up there: other processes may
work on the same results folder. A run that another one holds goes to the end of the queue.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from analysis import runs
from analysis.numbers import count
from analysis.runs import Status
from benchmarks.data.splits import stored
from benchmarks.running import disk
from benchmarks.running.capacity import Capacity
from benchmarks.running.curves import curves_of
from benchmarks.running.display import Display
from benchmarks.running.problems import GOES_ON, Problem
from benchmarks.running.timelimit import Limit
from benchmarks.studies import search
from benchmarks.studies.cells import Cell
from benchmarks.studies.costs import costs_in
from benchmarks.studies.ledger import UNFINISHED, Ledger
from benchmarks.studies.plan import label
from benchmarks.studies.rounds import Job, Round
from benchmarks.studies.schema import Study

Outcomes = dict[str, Status | Problem]
"""How each run ended, by its id."""
HELD_SECONDS = 1.0
"""Between two looks at a run that another process holds."""
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
        limit: Limit,
    ) -> None:
        self.ledger, self.stopping, self._limit = ledger, stopping, limit
        self.jobs = [job for job in work.jobs if any(ledger.to_do(cell) for cell in job.cells)]
        left = [cell for job in self.jobs for cell in job.cells if ledger.to_do(cell)]
        self._costs = costs_in(ledger.root, capacity.device)
        self.display = Display(
            {cell.run.id: cell for cell in left},
            {cell.run.id: ledger.epochs(cell) for cell in left},
            capacity.workers,
            self._costs,
        )
        self.outcomes: Outcomes = {}
        self._ladder, self._curves = work.ladder, curves_of(study, ledger.root)
        self._waiting = deque(range(len(self.jobs)))
        self._offered: dict[str, tuple[int, set[str]]] = {}
        """the job's place, and the ids of its runs that are to be done"""
        self._running: set[str] = set()
        self._lost: dict[int, int] = {}
        self._left = {cell.run.id for cell in left}
        self._held: dict[int, float] = {}
        """places of jobs of which another process holds a run: when to look again"""
        self._refused: dict[str, str] = {}
        """the run that another process held when a worker came to it"""
        self._no_data: dict[tuple[object, ...], Problem] = {}
        """data sets that are not available"""
        self._shares = 0 < capacity.gpu < 1
        self._alone: set[int] = set()
        """places of jobs that did not fit on a GPU together with others"""
        self._full: set[str] = set()
        """the names of such jobs until they come back"""
        self._failed = {
            cell.run.id: self._written(cell)
            for cell in left
            if ledger.status(cell).state == "failed"
        }
        """of runs whose failure is ours to retry: when they failed, by id"""

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

    def has(self, name: str) -> bool:
        """Whether a job is handed out under this name."""
        return name in self._offered

    def offer(self, name: str) -> dict[str, Any] | None:
        """The next job: its place in ``jobs``, its runs to do, those that failed before, whether
        other runs share its GPU, and what a logger may show of it. None: nothing is left, or other
        processes hold all that is, or a run must be alone.

        A run that cannot finish an epoch before the time limit is dropped.
        """
        if any(place in self._alone for place, _ in self._offered.values()):
            return None
        place = self._next()
        if place is None:
            return None
        job = self.jobs[place]
        run = job.first.run
        left = {cell.run.id for cell in job.cells if self._to_do(cell)}
        self._offered[name] = place, left
        return {
            "job": place,
            "runs": sorted(left),
            "again": sorted(left & self._failed.keys()),
            "shares": self._shares and place not in self._alone,
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
        self.display.started(self._shown(name))

    def reported(self, name: str, told: dict[str, Any]) -> None:
        """A run goes on, or ends."""
        job = self._job(name)
        for note in told.get("notes", ()):
            self.display.note(note)
        if "held" in told:
            self._refused[name] = told["held"]
        if "no_memory" in told:
            self._full.add(name)
            self._alone.add(self._offered[name][0])
            text = f"retrying alone after: {told['no_memory']}"
            self.display.note(f"{label(job.first)}: {text}")
        if "problem" in told:
            self._problem(name, Problem(told["problem"]))
        if "no_data" in told:
            asked = job.first.benchmark
            problem = Problem(told["no_data"], data=asked.path or asked.name)
            self._problem(name, self._no_data.setdefault(stored(asked), problem))
        if "epoch" in told:
            self.display.reached(self._shown(name), told["epoch"])
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
            try:
                disk.conclude(cell.run, cell.recorded, self.ledger.root, "stopped", reason)
            except runs.Held:
                self._refused[name] = cell.run.id
        return False

    def ended(self, name: str, death: str = "") -> None:
        """The worker returned, or ended with its machine: the runs' directories say how.

        ``death`` says why the worker's process is gone, where that may be the run's own fault.
        """
        shown = self._shown(name)
        place, left = self._offered.pop(name)
        self._running.discard(name)
        held = self._refused.pop(name, "")
        full = name in self._full and not death
        self._full.discard(name)
        if self.stopping():
            return
        job, again = self.jobs[place], False
        cells = [c for c in job.cells if c.run.id in left and c.run.id not in self.outcomes]
        if held and not death:  # the next look tells what became of it
            again = True
            cells = [c for c in cells if c.run.id != held and not self._pending(c)]
            self._hold(place)
        elif full:
            again = True
            cells = [c for c in cells if not self._pending(c)]
        elif not death and any(map(self._pending, cells)):
            self._lost[place] = self._lost.get(place, 0) + 1
            again = self._lost[place] <= LOST_WORKERS
            death = "" if again else "its worker was lost too often"
        for cell in cells:
            again |= self._conclude(cell, death)
        if again:
            self.display.paused(shown)
            self._waiting.append(place)

    def _next(self) -> int | None:
        """The first job that no other process works on; what others have ended is told."""
        holders = {}
        for _ in range(len(self._waiting)):
            place = self._waiting.popleft()
            job = self.jobs[place]
            alone = place in self._alone and bool(self._offered)
            if alone or time.monotonic() < self._held.get(place, 0.0):
                self._waiting.append(place)
                continue
            self._held.pop(place, None)
            left = [cell for cell in job.cells if self._to_do(cell)]
            if left and not self._in_time(left[0]):
                self.display.note(
                    "Not started: runs that cannot finish an epoch before the time limit"
                )
                continue
            holder = next(filter(None, (runs.holder_of(self.ledger.folder(c)) for c in left)), "")
            if holder:
                self._hold(place)
                self._waiting.append(place)
                holders[place] = holder
                continue
            for cell in job.cells:  # read once more: its holder may just have ended it
                if cell.run.id in self._left - self.outcomes.keys() and not self._to_do(cell):
                    self._tell(cell, self.ledger.status(cell))
            problem = self._no_data.get(stored(job.first.benchmark))
            if problem is not None:  # each of these runs would try to download it again
                for cell in filter(self._to_do, job.cells):
                    self._tell(cell, problem)
                continue
            self._rank(job)
            if any(map(self._to_do, job.cells)):
                self._count_held()
                return place
        self._count_held()
        if not self._offered:
            for place, holder in holders.items():
                self.display.note(f"{label(self.jobs[place].first)}: waiting, held by {holder}")
        return None

    def _in_time(self, cell: Cell) -> bool:
        """Whether the run can finish one epoch, and so write a checkpoint, before the limit."""
        seconds = self._costs.of(cell.run, cell.run.training.epochs - 1)
        return seconds is None or self._limit.allows(seconds)

    def _rank(self, job: Job) -> None:
        """A trial that was carried out elsewhere competes at the rungs that it reached."""
        if self._ladder is None:
            return
        folders = [self.ledger.folder(cell) for cell in job.cells]
        for rung in job.rungs:
            if min(len(search.lines_of(folder)) for folder in folders) >= rung:
                score = search.score_at(folders, rung, job.metric)
                self._ladder.seen(job.group, rung, job.trial, score)

    def _hold(self, place: int) -> None:
        self._held[place] = time.monotonic() + HELD_SECONDS

    def _count_held(self) -> None:
        held = {cell.run.id for place in self._held for cell in self.jobs[place].cells}
        self.display.held = len(held & (self._left - self.outcomes.keys()))

    def _to_do(self, cell: Cell) -> bool:
        """Whether the run is left to us: a failure is retried by the process that saw it."""
        if cell.run.id in self.outcomes or cell.run.id not in self._left:
            return False
        if self.ledger.status(cell).state == "failed":
            return self._written(cell) == self._failed.get(cell.run.id)
        return self.ledger.to_do(cell)

    def _job(self, name: str) -> Job:
        return self.jobs[self._offered[name][0]]

    def _shown(self, name: str) -> Cell:
        """The run that stands for a job in the display: the first that was still to be done."""
        left = self._offered[name][1]
        return next(cell for cell in self._job(name).cells if cell.run.id in left)

    def _written(self, cell: Cell) -> int:
        """When the result of a run was written."""
        try:
            return (self.ledger.folder(cell) / "result.json").stat().st_mtime_ns
        except FileNotFoundError:  # another process has just begun it anew
            return 0

    def _pending(self, cell: Cell) -> bool:
        """Whether the run has not ended, or its failure is the one that it was handed out with."""
        state = self.ledger.status(cell).state
        if state == "failed" and cell.run.id in self._failed:
            return self._written(cell) == self._failed[cell.run.id]
        return state in UNFINISHED

    def _problem(self, name: str, problem: Problem) -> None:
        """It could not be done for a reason that is not the run's; nothing is recorded."""
        left = self._offered[name][1]
        for cell in self._job(name).cells:
            if cell.run.id in left and self._pending(cell):
                self._tell(cell, problem)

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
                if status.state == "failed":
                    self._failed[cell.run.id] = self._written(cell)
                return True
        if status.state in UNFINISHED:
            text = f"{death} (tried {count(len(self.ledger.failures(cell)), 'time')})"
            try:
                status = disk.conclude(cell.run, cell.recorded, self.ledger.root, "failed", text)
            except runs.Held:  # another process has taken it up
                return True
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
    cells = [cell for job in work.jobs for cell in job.cells]
    count = kept(cells, ledger)
    return f"stopped; {'1 run has' if count == 1 else f'{count} runs have'} a checkpoint"


def kept(cells: Sequence[Cell], ledger: Ledger) -> int:
    """How many of these runs have a checkpoint."""
    return sum(ledger.status(cell).state == "interrupted" for cell in cells)
