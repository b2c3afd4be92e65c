"""The executor on Ray, of our own or one that is joined."""

from __future__ import annotations

import importlib
import logging
import os
import pickle
import secrets
import shutil
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from benchmarks.running import flag
from benchmarks.running.capacity import Capacity
from benchmarks.running.disk import Options
from benchmarks.running.driver import Outcomes, stopped
from benchmarks.running.on_ray import joined, own, tune
from benchmarks.running.on_ray.carried import carry
from benchmarks.running.on_ray.joined import CLIENT
from benchmarks.running.on_ray.tune import Task
from benchmarks.running.signals import heard
from benchmarks.running.timelimit import Limit
from benchmarks.studies.cells import Cell
from benchmarks.studies.ledger import Ledger
from benchmarks.studies.rounds import Round
from benchmarks.studies.schema import Study


class OnRay:
    """A Ray that carries out rounds of jobs, from ``opened`` on."""

    def __init__(
        self,
        ray: ModuleType,
        there: Capacity,
        root: Path,
        options: Options,
        flag: Path,
        own: Path,
        limit: Limit,
    ) -> None:
        self.capacity = there
        self._ray, self._root, self._options = ray, root, options
        self._flag, self._folder, self._limit = flag, own, limit

    def carry_out(self, work: Round, ledger: Ledger, study: Study) -> Outcomes:
        """Do the jobs that are left; the outcome of each run by its id.

        Once the time limit is reached, the runs that are left have none.

        Raises:
            KeyboardInterrupt: after SIGINT or SIGTERM, when the workers have stopped.
        """
        folder = self._folder / f"round-{secrets.token_hex(4)}"
        task = Task(
            work, ledger, self._options, study, self.capacity, self._flag, folder, self._limit
        )

        def stop() -> None:
            flag.write(self._flag, flag.STOP)

        with heard(stop) as asked, self._limit.watched(stop):
            if self.capacity.address.startswith(CLIENT):  # there Tune's driver runs on the cluster
                there = self._ray.remote(carry(tune.carry_out, self.capacity.address))
                there = there.options(num_cpus=0, max_retries=0)
                outcomes = self._ray.get(there.remote(packed=pickle.dumps((task,))))
            else:
                outcomes = tune.carry_out(task)
            if asked():
                raise KeyboardInterrupt(stopped(work, ledger))
        return outcomes


@contextmanager
def opened(
    study: Study,
    root: Path,
    options: Options,
    address: str,
    workers: int | None,
    wanted: list[Cell],
    limit: Limit,
) -> Iterator[OnRay]:
    """A Ray of our own, or a running one that is joined; of our own nothing is left behind.

    Raises:
        StudyError: no machine has what one run takes.
        DataError: data or results folder cannot be used on a machine.
    """
    joins = bool(address)
    before = dict(os.environ)
    with ExitStack() as stack:
        stack.callback(_restore_environment, before)
        os.environ.update(tune.SETTINGS)
        if joins:
            folder = root / f".tune-{secrets.token_hex(4)}"  # every machine must see it
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
        else:
            folder = own.prepared(stack)
        raised = stack.enter_context(flag.raised(root))
        ray = importlib.import_module("ray")
        tune.loggers(study)  # what they refuse is told before Ray starts
        stack.callback(ray.shutdown)
        _silence()
        handler = signal.getsignal(signal.SIGTERM)
        if joins:
            there = joined.join(ray, address, study, workers)
        else:
            there = own.start(ray, folder, study, workers)
            stack.enter_context(own.watched())
        signal.signal(signal.SIGTERM, handler)  # Ray sets its own, that ends without a word
        if joins:
            joined.check_machines(ray, root, raised, options, wanted)
        options = replace(options, device=there.device)
        yield OnRay(ray, there, root, options, raised, folder, limit)


def _restore_environment(before: dict[str, str]) -> None:
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


def _silence() -> None:
    """Ray prints the deaths of workers on standard output, where our tables go."""
    for name in ("ray", "ray.tune", "ray.data"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    worker = importlib.import_module("ray._private.worker")
    vars(worker)["print_to_stdstream"] = lambda *_, **__: None
