"""The executor on this machine: processes that each do one job after the other. Needs no ray."""

from __future__ import annotations

import gc
import math
import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import augbench
from benchmarks.running import capacity, timelimit
from benchmarks.running.capacity import Capacity
from benchmarks.running.problems import said
from benchmarks.running.signals import heard
from benchmarks.running.timelimit import Limit
from benchmarks.studies.ledger import Ledger
from benchmarks.studies.rounds import Round
from benchmarks.studies.schema import Study
from benchmarks.training.errors import Interrupted
from benchmarks.training.progress import Gone

if TYPE_CHECKING:
    from benchmarks.running.disk import Options
    from benchmarks.running.driver import Driver, Outcomes

GRACE_SECONDS = 60
"""How long an interrupted worker may take to reach its next step and write its checkpoint."""
LOOK_SECONDS = 1.0
"""Between two looks at the clock, and at runs that other processes hold, while no worker says
anything."""
DISMISS_SECONDS = 10.0
"""How long a worker without a job may take to end."""
GPUS = "CUDA_VISIBLE_DEVICES"
OVER, STOPPED = "over", "stopped"
"""What a worker says after a job: that it waits for the next one, or that it ends."""


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    place: int
    job: str = ""
    """the name under which the driver has handed out what it does; empty: nothing"""
    stopping: bool = False


class Processes:
    """Workers of this machine, kept from round to round: the start of one takes seconds."""

    def __init__(self, there: Capacity, root: Path, options: Options, limit: Limit) -> None:
        self.capacity, self.limit = there, limit
        self._root, self._options = root, options
        self._workers: list[_Worker] = []
        self._count = 0
        self._context = multiprocessing.get_context("spawn")

    def carry_out(self, work: Round, ledger: Ledger, study: Study) -> Outcomes:
        """Do the jobs that are left; the outcome of each run by its id.

        A worker that dies takes no other run with it: another takes its place. Once the time limit
        is reached, the runs that are left have no outcome.

        Raises:
            KeyboardInterrupt: after SIGINT or SIGTERM, when the workers have stopped.
        """
        from benchmarks.running.driver import Driver, stopped  # noqa: PLC0415 - imports torch

        with heard(self._stop) as asked:

            def stopping() -> bool:
                return asked() or self.limit.reached()

            driver = Driver(work, ledger, study, self.capacity, stopping, self.limit)
            try:
                while not driver.over:
                    self._give(driver)
                    ready = wait([each.connection for each in self._workers], LOOK_SECONDS)
                    driver.display.tick()
                    for worker in [each for each in self._workers if each.connection in ready]:
                        self._hear(worker, driver)
                if stopping():
                    if not asked():
                        timelimit.tell()
                    self._stop()  # also who was just being started
                    limit = time.monotonic() + GRACE_SECONDS
                    for worker in self._workers:
                        worker.process.join(max(0.0, limit - time.monotonic()))
                    if asked():
                        raise KeyboardInterrupt(stopped(work, ledger))
            finally:
                driver.display.close()
        return driver.outcomes

    def close(self) -> None:
        """End the workers: those without a job end by themselves once nobody listens."""
        for worker in self._workers:
            worker.connection.close()
        for worker in self._workers:
            worker.process.join(1)
            if worker.process.is_alive():
                worker.process.kill()
            worker.process.join()
        self._workers = []

    def _give(self, driver: Driver) -> None:
        """A job for every worker that has none, as long as there are some."""
        while True:
            free = next(
                (each for each in self._workers if not each.job and each.process.is_alive()), None
            )
            if free is None and len(self._workers) >= self.capacity.workers:
                return
            name = str(self._count)
            offered = driver.offer(name)
            if offered is None:
                return
            self._count += 1
            if 0 < self.capacity.gpu < 1 and not offered["shares"]:
                self._dismiss(free)
            worker = free or self._start()
            worker.job = name
            driver.started(name)
            with suppress(BrokenPipeError, ConnectionResetError):  # it died: seen when it is heard
                job = driver.jobs[offered["job"]]
                given = job, offered["runs"], offered["again"], offered["shares"]
                worker.connection.send(given)

    def _dismiss(self, kept: _Worker | None) -> None:
        """End workers that wait for a job: what they keep of a GPU's memory is free then."""
        for worker in [each for each in self._workers if each is not kept and not each.job]:
            self._workers.remove(worker)
            worker.connection.close()
            worker.process.join(DISMISS_SECONDS)
            worker.process.kill()
            worker.process.join()

    def _hear(self, worker: _Worker, driver: Driver) -> None:
        try:
            told = worker.connection.recv()
        except (EOFError, OSError):  # also in the middle of a message
            self._workers.remove(worker)
            worker.connection.close()
            worker.process.join()
            if worker.job:
                driver.ended(worker.job, _death(worker.process.exitcode))
            return
        if told in (OVER, STOPPED):
            driver.ended(worker.job)
            worker.job = ""
            if told == STOPPED:
                self._workers.remove(worker)
                worker.connection.close()
                worker.process.join()
            return
        driver.reported(worker.job, told)
        if "rung" in told:
            going = driver.goes_on(worker.job, told)
            with suppress(BrokenPipeError, ConnectionResetError):  # it died: seen when it is heard
                worker.connection.send(going)

    def _start(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        taken = {each.place for each in self._workers}
        place = next(each for each in range(self.capacity.workers) if each not in taken)
        # Packed, so that a worker imports nothing of ours before augbench finds it.
        given = (__name__, serve.__name__, theirs, self._root, pickle.dumps(self._options))
        process = self._context.Process(target=augbench.call, args=given, daemon=False)
        resource_tracker.ensure_running()  # its start unblocks SIGINT: not within what follows
        # Ctrl-C reaches the whole foreground group; the parent alone decides, and sends SIGTERM.
        # What is blocked here stays blocked in the worker, from its first import on.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            with _seeing(gpu_of(place, self.capacity)):
                process.start()
            theirs.close()
            self._workers.append(_Worker(process, ours, place))
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        return self._workers[-1]

    def _stop(self) -> None:
        """Let the workers write their checkpoints and end; a second signal would not let them."""
        for worker in self._workers:
            if not worker.stopping:
                worker.stopping = True
                worker.process.terminate()


@contextmanager
def opened(
    study: Study, root: Path, options: Options, workers: int | None, limit: Limit
) -> Iterator[Processes]:
    """Workers on this machine; of them nothing is left behind.

    Raises:
        StudyError: this machine has not what one run takes.
    """
    there = capacity.here(study, workers)
    made = Processes(there, root, replace(options, device=options.device or there.device), limit)
    try:
        yield made
    finally:
        made.close()


def serve(connection: Connection, root: Path, packed: bytes) -> None:
    """A worker's life: a job in, reports and a word of its end out, until the parent closes."""
    from benchmarks.running.worker import work  # noqa: PLC0415 - imports torch
    from benchmarks.training import machine  # noqa: PLC0415

    options = pickle.loads(packed)
    gc.freeze()  # each run collects garbage first, which takes 0.2 s with all that is imported

    def report(told: dict[str, Any]) -> None:
        try:
            connection.send(told)
            going = connection.recv() if "rung" in told else True
        except (EOFError, OSError) as error:
            raise Gone from error
        if not going:
            raise Gone

    with suppress(EOFError, BrokenPipeError, ConnectionResetError, Gone):
        while True:
            job, wanted, again, shares = connection.recv()
            given = replace(options, shares_gpu=shares)
            end = OVER
            try:
                work(job, wanted, again, root, given, lambda: False, report)
            except Gone:
                pass  # ended at a rung; or the parent is gone, which recv tells
            except Interrupted:
                end = STOPPED
            except Exception as error:  # nothing that a run does comes here
                report({"problem": said(error)})
            if not machine.gpu_works():
                end = STOPPED  # another process takes the next job
            connection.send(end)
            if end == STOPPED:
                return


def gpu_of(place: int, there: Capacity) -> int | None:
    """The (first) GPU, counted from 0, of the worker in this place; None where it has none."""
    if not there.gpu:
        return None
    return place // int(1 / there.gpu + 1e-9) if there.gpu < 1 else place * math.ceil(there.gpu)


@contextmanager
def _seeing(gpu: int | None) -> Iterator[None]:
    """A process that is started within sees this GPU alone."""
    if gpu is None:
        yield
        return
    before = os.environ.get(GPUS)
    there = before.split(",") if before else []
    os.environ[GPUS] = there[gpu] if gpu < len(there) else str(gpu)
    try:
        yield
    finally:
        if before is None:
            del os.environ[GPUS]
        else:
            os.environ[GPUS] = before


def _death(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        hint = "; out of memory?" if name == "SIGKILL" else ""
        return f"its process was ended by {name}{hint}"
    return f"its process ended with exit code {code}"
