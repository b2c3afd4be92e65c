"""Processes that train at the same time, and what they reach: how many runs should share a GPU."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

import augbench
from benchmarks.training.errors import first_line
from benchmarks.training.machine import peak_memory, reset_peak_memory
from benchmarks.training.precision import tf32

LATE = "out of time"


class NotMeasured(RuntimeError):
    """Why something has no number."""


class Steps(Protocol):
    """What can be trained step by step."""

    rows: int
    """of a step"""
    batches: int
    """steps of an epoch"""

    def epoch(self) -> None:
        """Take the steps."""
        ...

    def phases(self) -> dict[str, float]:
        """Charged seconds by phase since the last call; waits for the device."""
        ...


Make = Callable[[str], Steps]
"""Makes the steps on a device; it is pickled."""


@dataclass
class Rate:
    """What one process reached."""

    images_per_second: float
    """images of training rows that it went through, by the wall clock"""
    step_seconds: float
    """median over epochs"""
    memory_mib: float
    """peak that torch allocated on the GPU; on a CPU the process's"""
    used_mib: float
    """of the whole GPU, by all that use it; nan on a CPU"""
    total_mib: float = float("nan")
    """of the whole GPU; nan on a CPU"""
    phases: dict[str, float] = field(default_factory=dict)
    """charged seconds of a step"""


class Trainer:
    """What a process does: prepare some steps, then measure them."""

    def __init__(self, device: str) -> None:
        self.device, self.steps = device, None

    def prepare(self, make: Make) -> None:
        """Make them and take the first, which allocate, tune and compile."""
        self.steps = None
        if self.device == "cuda":
            torch.cuda.empty_cache()
        reset_peak_memory(torch.device(self.device))
        self.steps = make(self.device)
        self.steps.epoch()
        self.steps.phases()

    def measure(self, start: float, seconds: float) -> Rate:
        """Train from a time on (``time.time``) for so many seconds, at least an epoch."""
        assert self.steps is not None
        time.sleep(max(0.0, start - time.time()))
        taken, charged = [], []
        begun = last = time.perf_counter()
        while not taken or last - begun < seconds:
            self.steps.epoch()
            charged.append(self.steps.phases())  # waits for the device
            now = time.perf_counter()
            taken.append(now - last)
            last = now
        used = total = float("nan")
        if self.device == "cuda":
            free, total = (each / 2**20 for each in torch.cuda.mem_get_info())
            used = total - free
        names, batches = charged[0], self.steps.batches
        return Rate(
            batches * self.steps.rows * len(taken) / (last - begun),
            statistics.median(taken) / batches,
            peak_memory(torch.device(self.device)),
            used,
            total,
            {name: statistics.median(each[name] for each in charged) / batches for name in names},
        )


def serve(connection: Any, packed: bytes) -> None:
    """Do what is asked, one call of a ``Trainer`` after the other, until nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that asks decides
    device, variables, make = pickle.loads(packed)
    os.environ.update(variables)
    torch.set_num_threads(1)
    trainer = make(device)
    with tf32(False), suppress(EOFError, OSError):  # float32 means it, as in a run
        while True:
            name, arguments = connection.recv()
            try:
                answer = "done", getattr(trainer, name)(*arguments)
            except (Exception, SystemExit) as error:  # a network of the user's own may do anything
                answer = "failed", first_line(error)
            connection.send(answer)


class Worker:
    """A process that trains."""

    def __init__(
        self, device: str, variables: Mapping[str, str], make: Any, loaded: Sequence[str]
    ) -> None:
        # forked from a process that has loaded torch, so that 16 begin in the time of one
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(loaded))
        self.connection, theirs = context.Pipe()
        given = (__name__, serve.__name__, theirs, pickle.dumps((device, dict(variables), make)))
        self.process = context.Process(target=augbench.call, args=given, daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, name: str, *arguments: Any) -> None:
        """Begin a call."""
        with suppress(OSError):  # it died: its answer says so
            self.connection.send((name, arguments))

    def answer(self, until: float) -> Any:
        """What the call returned.

        Raises:
            NotMeasured: it failed, the process died, or the time (``time.monotonic``) is over.
        """
        try:
            if not self.connection.poll(max(0.0, until - time.monotonic())):
                self.close()
                raise NotMeasured(LATE)
            state, value = self.connection.recv()
        except (EOFError, OSError):
            self.close()
            raise NotMeasured("the process died") from None
        if state == "failed":
            raise NotMeasured(value)
        return value

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.join()
        self.connection.close()


class Together:
    """Processes that are kept from one measurement to the next."""

    def __init__(
        self,
        device: str,
        variables: Mapping[str, str] | None = None,
        trainer: Callable[[str], Trainer] = Trainer,
        loaded: Sequence[str] = ("torch",),
    ) -> None:
        """``variables`` of the environment are theirs; ``loaded`` are modules imported once."""
        self.variables: Mapping[str, str] = variables or {}
        self.workers: list[Worker] = []
        self._given = device, trainer, loaded

    def rates(self, make: Make, count: int, seconds: float, until: float) -> list[Rate]:
        """What so many processes reach at once, each measured for so many seconds.

        Raises:
            NotMeasured: one of them failed, or the time (``time.monotonic``) is over.
        """
        device, trainer, loaded = self._given
        while len(self.workers) < count:
            self.workers.append(Worker(device, self.variables, trainer, loaded))
        chosen = self.workers[:count]
        for worker in chosen:
            worker.ask("prepare", make)
        self._answers(chosen, until)
        start = time.time() + (0.05 if count > 1 else 0.0)
        for worker in chosen:
            worker.ask("measure", start, seconds)
        return self._answers(chosen, until)

    def _answers(self, chosen: Sequence[Worker], until: float) -> list[Any]:
        """Of all of them, also where one has failed: the next answer is to the next question."""
        found, problem = [], None
        for worker in chosen:
            try:
                found.append(worker.answer(until))
            except NotMeasured as reason:
                problem = reason
        if problem is not None:
            self.workers = [each for each in self.workers if each.process.is_alive()]
            raise problem
        return found

    def close(self) -> None:
        """End them."""
        for worker in self.workers:
            worker.close()
        self.workers = []
