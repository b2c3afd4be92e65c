"""What a worker does with a job, wherever it runs; each executor has a way of its own to tell."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from analysis import runs
from benchmarks.data.download import DataError
from benchmarks.running import disk
from benchmarks.running.disk import Options
from benchmarks.running.problems import said
from benchmarks.studies import search
from benchmarks.studies.cells import Cell
from benchmarks.studies.rounds import Job
from benchmarks.training import machine
from benchmarks.training.errors import Interrupted, NoMemory
from benchmarks.training.progress import Silent
from methods import own
from methods.naming import NamingError

REPORT_SECONDS = 1.0
"""Between two reports of a run: each may wait for the driver."""
Report = Callable[[dict[str, Any]], None]
"""Tells the driver: ``epoch`` and its scores, ``notes``, a ``problem``, that there is ``no_data``
and why, the run that is ``held`` by another process, that there was ``no_memory`` on a GPU that is
shared, or a ``rung`` reached, of which the driver may say that the job ends there (``Gone``)."""


def work(
    job: Job,
    wanted: Collection[str],
    again: Collection[str],
    root: Path,
    options: Options,
    ends: Callable[[], bool],
    report: Report,
) -> None:
    """Do those runs of a job whose ids are wanted: whole ones, or from rung to rung.

    Those named in ``again`` failed before and are retried. The job ends at a run that another
    process works on.

    Raises:
        Interrupted: a signal, or ``ends``, said to stop; checkpoints are written.
        Gone: the driver is gone, or has ended the job.
    """
    cells = [cell for cell in job.cells if cell.run.id in wanted]
    folders = [runs.folder_of(root, cell.run) for cell in job.cells]
    try:
        with own.kept(options.code):
            for until in (*job.rungs, 0):
                if until and min(len(search.lines_of(folder)) for folder in folders) > until:
                    continue  # it has earned its way on before
                for cell in list(cells):
                    if ends():
                        return
                    retry = cell.run.id in again
                    given = replace(options, retry_failed=retry, wait=False)
                    if not _leg(cell, root, given, until, ends, report):
                        return
                    if runs.status_of(runs.folder_of(root, cell.run)).state == "failed":
                        cells.remove(cell)  # the driver says whether it is tried again
                        if not machine.gpu_works():
                            return  # nor would the other runs of the job
                if until:
                    score = search.score_at(folders, until, job.metric)
                    report({"epoch": until, "rung": until, "score": score})
    except DataError as error:
        report({"no_data": str(error)})
    except (NamingError, OSError) as error:
        report({"problem": said(error)})


def _leg(
    cell: Cell,
    root: Path,
    options: Options,
    until: int,
    ends: Callable[[], bool],
    report: Report,
) -> bool:
    """Train a run to its end, or to a rung, where it waits on disk; False: another process works
    on it, or has just failed at it, or it shares a GPU without enough memory; the driver is told.
    """
    folder = runs.folder_of(root, cell.run)
    status = runs.status_of(folder)
    if status.state == "failed" and not options.retry_failed:
        report({"held": cell.run.id})
        return False
    if until and status.state == "interrupted":
        reached = len(search.lines_of(folder))
        if reached >= until and (folder / "checkpoint.pt").exists():
            return True
    told = Told(report, until)
    try:
        disk.execute(
            cell.run,
            cell.recorded,
            root,
            options,
            cell.benchmark,
            told,
            lambda: told.arrived or ends(),
        )
    except Interrupted:
        if not told.arrived:
            raise
    except runs.Held:
        report({"held": cell.run.id})
        return False
    except NoMemory as error:
        report({"no_memory": str(error)})
        return False
    told.over(runs.read_result(folder))
    return True


class Told(Silent):
    """Progress of a run in a worker: an epoch now and then, and the end, to the driver."""

    def __init__(self, report: Report, until: int) -> None:
        self._report, self._until, self._done = report, until, 0
        self._last = time.monotonic()
        self._kept: dict[str, Any] = {}
        """of the last epoch, where it is not told yet"""

    @property
    def arrived(self) -> bool:
        """Whether the rung is reached."""
        return bool(self._until) and self._done >= self._until

    def begin(
        self, name: str, epochs: int, done: int, rows: int, selecting: tuple[str, str], unit: str
    ) -> None:
        """The run stands here."""
        self._done = done

    def epoch(self, number: int, line: dict[str, Any]) -> None:
        """Tell the driver, but not more than once a second: the run may wait for its answer."""
        self._done = number
        scores = {f"select_{name}": value for name, value in line["select"].items()}
        self._kept = {"epoch": number, "train_loss": line["train_loss"], **scores}
        now = time.monotonic()
        if now - self._last >= REPORT_SECONDS:
            self._last = now
            self._tell()

    def note(self, text: str) -> None:
        """Tell it at once: the run may wait, or have no other epoch."""
        self._tell(notes=[text])

    def over(self, result: dict[str, Any] | None) -> None:
        """Tell the last epoch and, of a run that is done, its metrics on test."""
        done = result is not None and result["status"] == "done"
        scores = result["metrics"]["last"]["test"] if result is not None and done else {}
        final = {f"test_{name}": value for name, value in scores.items()}
        if self._kept or final:
            self._tell(**({"epoch": self._done} | final))

    def _tell(self, **more: Any) -> None:
        told, self._kept = {**self._kept, **more}, {}
        self._report(told)
