"""Progress of many runs: a line for each that ends, and the state of all of them."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import methods
from analysis import metrics
from analysis.runs import Status
from benchmarks.running.problems import Problem
from benchmarks.studies import costs
from benchmarks.studies.cells import Cell
from benchmarks.studies.costs import Costs
from benchmarks.studies.plan import label

EVERY_SECONDS = 30.0
"""Seconds between two progress lines without a terminal."""


class Display:
    """A line for each run that ends; on a terminal also a line that changes."""

    def __init__(
        self, left: Mapping[str, Cell], done: Mapping[str, int], workers: int, known: Costs
    ) -> None:
        """``left`` are the runs to do by id, of some of which so many epochs are ``done``."""
        from tqdm import tqdm  # noqa: PLC0415 - only where runs are left to do

        self._tqdm, self._count, self._workers, self._costs = tqdm, len(left), workers, known
        self._ended: Counter[str] = Counter()
        self._running: dict[str, tuple[Cell, float]] = {}
        self._left, self._done = dict(left), dict(done)
        self._reached: dict[str, list[tuple[int, float]]] = {}
        """of runs at work: the first and the last epoch that was told, and when"""
        self.held = 0
        """runs that other processes work on"""
        self._busy = 0.0
        self._noted: set[str] = set()
        self._start = self._last = time.monotonic()
        self._bar = tqdm(
            total=len(left),
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
            bar_format="{percentage:3.0f}%|{bar}| {desc}",
        )
        self._show()

    def started(self, cell: Cell) -> None:
        """A worker has taken the run."""
        self._running[cell.run.id] = cell, time.monotonic()
        self._show()

    def reached(self, cell: Cell, epoch: int) -> None:
        """So many epochs of the run are done."""
        told = self._reached.setdefault(cell.run.id, [])
        told[1:] = [(epoch, time.monotonic())]

    def paused(self, cell: Cell) -> None:
        """No worker has the run any more, and it is to go on."""
        self._stop(cell)

    def again(self, cell: Cell, reason: str) -> None:
        """The run failed and is tried once more."""
        self.note(f"{label(cell)}: retrying after: {reason}")

    def ended(self, cell: Cell, outcome: Status | Problem, result: dict[str, Any] | None) -> None:
        """The run ended, one way or the other."""
        self._stop(cell)
        self._left.pop(cell.run.id, None)
        state = "not done" if isinstance(outcome, Problem) else outcome.state
        self._ended[state] += 1
        text = outcome.text if isinstance(outcome, Problem) else outcome.reason
        if state == "done" and result is not None:
            self._costs.saw(cell.run, result)
            cost, scores = result["cost"], result["metrics"]["last"]["select"]
            seconds = cost["charged_seconds"] + cost["evaluation_seconds"]
            name, shown = metrics.selecting(result["data"]["kind"])
            text = f"{seconds:.1f} s, select {shown} {_number(scores.get(name))}"
        number = sum(self._ended.values())
        mark = ", " if state == "done" else ": "
        line = f"[{number}/{self._count}] {label(cell)}: {state}{mark if text else ''}{text}"
        if isinstance(outcome, Problem) and outcome.data:  # the same for all: noted once
            line = f"{outcome.data}: not available, its runs are left out: {text}"
        self.note(line)
        self._bar.update(1)
        self._show()

    def tick(self) -> None:
        """Time has passed."""
        self._show()

    def note(self, text: str) -> None:
        """Print it once, above what changes."""
        if text not in self._noted:
            self._noted.add(text)
            self._tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        """End the line that changes."""
        self._bar.close()

    def where(self) -> str:
        """Runs by state; the time left; how much of the workers' time was used."""
        now = time.monotonic()
        elapsed = max(now - self._start, 1e-9)
        failed = self._ended["failed"] + self._ended["not done"]
        counts = [f"{sum(self._ended.values()) - failed} done", f"{len(self._running)} running"]
        counts += [f"{failed} failed"] if failed else []
        waiting = len(self._left) - len(self._running) - self.held
        counts += [f"{self.held} held by other processes"] if self.held else []
        counts += [f"{waiting} waiting"] if waiting > 0 else []
        counts += [self._remaining(now)] if self._left else []
        busy = self._busy + sum(now - since for _, since in self._running.values())
        return ", ".join([*counts, f"{100 * busy / elapsed / self._workers:.0f} % busy"])

    def _stop(self, cell: Cell) -> None:
        self._reached.pop(cell.run.id, None)
        _, since = self._running.pop(cell.run.id, (cell, None))
        if since is not None:  # of a trial's runs the first stands for all
            self._busy += time.monotonic() - since

    def _remaining(self, now: float) -> str:
        foreseen = {name: self._foreseen(cell) for name, cell in self._left.items()}
        known = {name: seconds for name, seconds in foreseen.items() if seconds is not None}
        if not known:
            return "time left unknown"
        rest = {
            name: max(seconds - (now - self._running.get(name, (None, now))[1]), 0.0)
            for name, seconds in known.items()
        }
        seconds = max(sum(rest.values()) / self._workers, *rest.values())
        if len(known) < len(foreseen):
            return f"at least {duration(seconds)} left"
        return f"about {duration(seconds)} left" if seconds >= 1 else "finishing"

    def _foreseen(self, cell: Cell) -> float | None:
        """Seconds of a run: by those on its data and network that ended, else by the pace of those
        at work; None: unknown."""
        done = self._done.get(cell.run.id, 0)
        known = self._costs.of(cell.run, done)
        if known is not None:
            return known
        paces = []
        for name, told in self._reached.items():
            (begin, first), (last, then) = told[0], told[-1]
            other = self._left[name].run
            steps = methods.cost(other.method)
            if last > begin and steps and costs.alike(other) == costs.alike(cell.run):
                paces.append((then - first) / (last - begin) / steps)
        if not paces:
            return None
        epochs = cell.run.training.epochs - done
        return sum(paces) / len(paces) * methods.cost(cell.run.method) * epochs

    def _show(self) -> None:
        self._bar.set_description_str(self.where())
        now = time.monotonic()
        if not sys.stderr.isatty() and now - self._last > EVERY_SECONDS:
            self._last = now
            self._tqdm.write(self.where(), file=sys.stderr)


def duration(seconds: float) -> str:
    """``40 s``, ``12 min``, ``3.5 h`` or ``2.1 d``."""
    for limit, unit, size in ((90, "s", 1), (5400, "min", 60), (172800, "h", 3600)):
        if seconds < limit:
            digits = 1 if unit == "h" else 0
            return f"{seconds / size:.{digits}f} {unit}"
    return f"{seconds / 86400:.1f} d"


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4f}"
