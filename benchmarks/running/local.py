"""Many runs at once on one machine: processes that each do one run after the other."""

from __future__ import annotations

import errno
import multiprocessing
import pickle
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import augbench
from analysis.runs import Status
from benchmarks.studies.cells import Cell
from benchmarks.training.progress import Gone

if TYPE_CHECKING:
    from benchmarks.running.disk import Options

GRACE_SECONDS = 60
"""How long an interrupted worker may take to reach its next step and write its checkpoint."""
GOES_ON = "the same command goes on from its checkpoint"
NO_ROOM = "free some space, then the same command goes on from the last checkpoint"
IN_THE_WAY = "a folder is needed there, and a file is in its way"
CLOSED = "choose another folder with --out"
HINTS = {
    errno.ENOSPC: NO_ROOM,
    errno.EDQUOT: NO_ROOM,
    errno.EEXIST: IN_THE_WAY,
    errno.ENOTDIR: IN_THE_WAY,
    errno.EACCES: CLOSED,
    errno.EPERM: CLOSED,
    errno.EROFS: CLOSED,
}


@dataclass(frozen=True)
class Problem:
    """A run that could not be carried out for a reason that is not its own; nothing is recorded."""

    text: str


class Watcher(Protocol):
    """Who is told what the runs do."""

    def note(self, text: str) -> None:
        """Something the user should know."""
        ...

    def moved(self, cell: Cell, epochs: float) -> None:
        """A run went on by so many epochs."""
        ...

    def ended(self, cell: Cell, outcome: Status | Problem) -> None:
        """A run ended."""
        ...


class _Remote:
    """Progress of a run in a worker, sent to the parent; a vanished parent ends the worker."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._images = connection, 1

    def begin(self, name: str, epochs: int, done: int, images: int) -> None:
        self._images = images
        self._send("moved", float(done))

    def advance(self, images: int, loss: float) -> None:
        self._send("moved", images / self._images)

    def epoch(self, number: int, line: dict[str, Any]) -> None:
        pass

    def note(self, text: str) -> None:
        self._send("note", text)

    def end(self) -> None:
        pass

    def _send(self, event: str, content: float | str) -> None:
        try:
            self._connection.send((event, content))
        except OSError as error:
            raise Gone from error


def _work(connection: Connection, root: Path, packed: bytes) -> None:
    """A worker's life: a cell in, events and an outcome out, until the parent closes."""
    from benchmarks.running.disk import execute  # noqa: PLC0415 - imports torch
    from benchmarks.training.errors import Interrupted  # noqa: PLC0415

    options = pickle.loads(packed)
    try:
        while True:
            cell = connection.recv()
            try:
                status = execute(
                    cell.run, cell.recorded, root, options, cell.benchmark, _Remote(connection)
                )
                connection.send(("ended", status))
            except Interrupted:
                connection.send(("interrupted", None))
                return
            except Gone:
                return
            except Exception as error:  # reported by the parent, run by run
                connection.send(("ended", Problem(said(error))))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def said(error: Exception) -> str:
    """An error in words for a user: of one of the system's also the file and what to do."""
    if isinstance(error, OSError) and error.strerror:
        hint = f"; {HINTS[error.errno]}" if error.errno in HINTS else ""
        return f"{error.filename or 'output'}: {error.strerror}{hint}"
    return str(error).strip() or type(error).__name__


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    cell: Cell | None = None


class Stopped(KeyboardInterrupt):
    """SIGINT or SIGTERM reached the parent; the workers have written their checkpoints."""


def run_all(
    cells: Sequence[Cell], root: Path, options: Options, jobs: int, watcher: Watcher
) -> dict[str, Status | Problem]:
    """Carry out the cells, ``jobs`` at a time; the outcome of each by its run's id.

    A worker that dies takes no other run with it: its run is reported as a problem and another
    worker takes its place.

    Raises:
        Stopped: after KeyboardInterrupt, when every worker has stopped.
    """
    left = list(cells)[::-1]
    outcomes: dict[str, Status | Problem] = {}
    context = multiprocessing.get_context("spawn")
    everyone: list[_Worker] = []
    workers: list[_Worker] = []

    def start() -> None:
        ours, theirs = context.Pipe()
        # Packed, so that a worker imports nothing of ours before augbench finds it.
        given = (__name__, _work.__name__, theirs, root, pickle.dumps(options))
        process = context.Process(target=augbench.call, args=given, daemon=False)
        # Ctrl-C reaches the whole foreground group; the parent alone decides, and sends SIGTERM.
        # What is blocked here stays blocked in the worker, from its first import on.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process.start()
            theirs.close()
            workers.append(_Worker(process, ours))
            everyone.append(workers[-1])
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        give(workers[-1])

    def give(worker: _Worker) -> None:
        worker.cell = left.pop() if left else None
        if worker.cell is not None:
            with suppress(BrokenPipeError, ConnectionResetError):  # it died: seen at its next event
                worker.connection.send(worker.cell)
        else:
            worker.connection.close()
            workers.remove(worker)

    def end(worker: _Worker, outcome: Status | Problem) -> None:
        if worker.cell is not None:
            outcomes[worker.cell.run.id] = outcome
            watcher.ended(worker.cell, outcome)

    resource_tracker.ensure_running()  # its start unblocks SIGINT, so it must not be within ours
    try:
        for _ in range(min(jobs, len(left))):
            start()
        while workers:
            ready = wait([worker.connection for worker in workers])
            for worker in [each for each in workers if each.connection in ready]:
                try:
                    event, content = worker.connection.recv()
                except (EOFError, ConnectionResetError):
                    workers.remove(worker)
                    worker.process.join()
                    end(worker, Problem(_death(worker.process.exitcode)))
                    if left:
                        start()
                    continue
                if event == "ended":
                    end(worker, content)
                    give(worker)
                elif event == "interrupted":
                    end(worker, Problem(f"its process was told to stop; {GOES_ON}"))
                    worker.cell = None
                elif event == "moved" and worker.cell is not None:
                    watcher.moved(worker.cell, content)
                elif event == "note":
                    watcher.note(content)
    except KeyboardInterrupt:
        for worker in workers:
            worker.process.terminate()
        limit = time.monotonic() + GRACE_SECONDS
        for worker in workers:
            worker.process.join(max(0.0, limit - time.monotonic()))
        raise Stopped from None
    finally:
        for worker in everyone:
            if not worker.connection.closed:
                worker.connection.close()
            worker.process.join(1)
            if worker.process.is_alive() and worker in workers:
                worker.process.kill()
            worker.process.join()
    return outcomes


def _death(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        hint = "; out of memory?" if name == "SIGKILL" else ""
        return f"its process was ended by {name}{hint}; {GOES_ON}"
    return f"its process ended with exit code {code}"


class Reporter:
    """A line for each run that ends; on a terminal also one bar over all epochs."""

    def __init__(self, epochs: int, count: int) -> None:
        from tqdm import tqdm  # noqa: PLC0415 - only where runs are left to do

        self._tqdm, self._count, self._ended = tqdm, count, 0
        self._noted: set[str] = set()
        self._terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=epochs,
            unit="epoch",
            dynamic_ncols=True,
            disable=not self._terminal,
            bar_format="{percentage:3.0f}%|{bar}| {n:.1f}/{total} epochs, {remaining} left"
            "{postfix}",
        )
        self._start = self._last = time.monotonic()
        self._epochs, self._moved = epochs, 0.0

    def note(self, text: str) -> None:
        """Print it above the bar, but only once: many runs have the same to say of their data."""
        if text not in self._noted:
            self._noted.add(text)
            self._tqdm.write(text, file=sys.stderr)

    def moved(self, cell: Cell, epochs: float) -> None:
        """Move the bar; without a terminal a line every half minute."""
        self._moved += epochs
        self._bar.set_postfix_str(f"{cell.run.row} seed {cell.run.seed}", refresh=False)
        self._bar.update(epochs)
        now = time.monotonic()
        if not self._terminal and now - self._last > 30 and self._moved:
            self._last = now
            left = (now - self._start) / self._moved * (self._epochs - self._moved)
            self.note(f"{self._moved:.0f} of {self._epochs} epochs, about {left:.0f} s left")

    def ended(self, cell: Cell, outcome: Status | Problem) -> None:
        """Print how the run ended."""
        self._ended += 1
        if isinstance(outcome, Problem):
            text = f"not done: {outcome.text}"
        else:
            text = f"{outcome.state}{': ' if outcome.reason else ''}{outcome.reason}"
        run = cell.run
        self.note(
            f"[{self._ended}/{self._count}] {run.benchmark}, {run.row}, seed {run.seed}: {text}"
        )

    def close(self) -> None:
        """Close the bar."""
        self._bar.close()
