"""A round of jobs under Ray Tune: our searcher, scheduler, stopper and callback.

Ray says which worker does what; what is done stands on disk, and nowhere else. So every job is a
trial of its own that reads its directories, and Tune's own checkpoints and restoring are not used.
"""

from __future__ import annotations

import importlib
import math
import os
import pickle
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from analysis.studyfile import StudyError
from benchmarks.running import flag
from benchmarks.running.capacity import Capacity
from benchmarks.running.disk import Options
from benchmarks.running.driver import Driver, Outcomes
from benchmarks.running.local import GRACE_SECONDS
from benchmarks.running.on_ray.carried import carry
from benchmarks.running.timelimit import Limit
from benchmarks.running.worker import work
from benchmarks.studies.ledger import Ledger
from benchmarks.studies.rounds import Job, Round
from benchmarks.studies.schema import Study
from benchmarks.training import machine
from benchmarks.training.errors import Interrupted, first_line
from benchmarks.training.progress import Gone

LOST_MACHINE = (
    "node died",
    "node failure",
    "node was terminated",
    "node is dead",
    "nodediederror",
    "temporarily unavailable",
)
"""How Ray says that a worker went with its machine, or cannot be reached any more."""
SETTINGS = {
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # uv run: would pack the current folder, data and all
    "RAY_worker_niceness": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",
    "TUNE_WARN_THRESHOLD_S": "1000000",
}


@dataclass(frozen=True)
class Task:
    """A round as Tune's driver needs it."""

    work: Round
    ledger: Ledger
    options: Options
    study: Study
    capacity: Capacity
    flag: Path
    folder: Path
    """for Tune's own files"""
    limit: Limit


@dataclass(frozen=True)
class Place:
    """What a worker must know beside its job; none of it changes a number."""

    jobs: tuple[Job, ...]
    root: Path
    options: Options
    flag: Path


def carry_out(task: Task) -> Outcomes:
    """Tune's driver: hands the jobs to workers until none is left or the flag says stop."""
    from ray import tune  # noqa: PLC0415 - takes a second

    os.environ.update(SETTINGS)
    there, root = task.capacity, task.ledger.root
    # A trial that waits keeps the worker of one that ends, which takes seconds to start.
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(2 * there.workers)
    lowered = flag.lowered(task.flag)
    driver = Driver(task.work, task.ledger, task.study, there, lowered, task.limit)
    place = Place(tuple(driver.jobs), root, task.options, task.flag)
    trial = tune.with_parameters(carry(_trial, there.address), packed=pickle.dumps((place,)))
    tuner = tune.Tuner(
        tune.with_resources(trial, {"cpu": there.cpus, "gpu": there.gpu}),
        tune_config=tune.TuneConfig(
            search_alg=_offering(driver, there.workers if there.address else 2 * there.workers),
            scheduler=_halving(driver),
            num_samples=-1,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=task.folder.name,
            storage_path=str(task.folder.parent),
            callbacks=[_watching(driver), *loggers(task.study)],
            stop=_ending(driver),
            failure_config=tune.FailureConfig(max_failures=0),
            verbose=0,
        ),
    )
    try:
        tuner.fit()
    finally:
        driver.display.close()
    return driver.outcomes


def _trial(config: dict[str, Any], place: Place) -> None:
    """A worker does one job; Tune runs it in a thread of a process that does many."""
    from ray import tune  # noqa: PLC0415

    def report(told: dict[str, Any]) -> None:
        try:
            tune.report(told)
        except SystemExit as error:  # how Tune ends the thread of a trial
            raise Gone from error

    ends = flag.lowered(place.flag)
    job, wanted, again = place.jobs[config["job"]], config["runs"], config["again"]
    options = replace(place.options, shares_gpu=config["shares"])
    try:
        work(job, wanted, again, place.root, options, ends, report)
    except Interrupted:
        pass
    except Gone:  # if it returned, Tune would report once more and wait, and lose the next trial
        sys.exit(0)
    if not machine.gpu_works():  # Tune gives the next job to another process then
        raise RuntimeError("its GPU ended in an error")


def _offering(driver: Driver, most: int) -> Any:
    """Tune's searcher: hands out jobs, so many at once."""
    from ray.tune.search import Searcher  # noqa: PLC0415

    class Offering(Searcher):
        def suggest(self, trial_id: str) -> Any:
            if driver.over:
                return Searcher.FINISHED
            return driver.offer(trial_id) if driver.offered < most else None

        def on_trial_complete(
            self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
        ) -> None:
            pass

        def save(self, checkpoint_path: str) -> None:
            pass

        def restore(self, checkpoint_path: str) -> None:
            pass

    return Offering(metric="epoch", mode="max")


def _halving(driver: Driver) -> Any:
    """Tune's scheduler: first come, first served; at a rung the ladder decides."""
    from ray.tune.schedulers import FIFOScheduler, TrialScheduler  # noqa: PLC0415

    class Halving(FIFOScheduler):
        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
            going = driver.goes_on(trial.trial_id, result)
            return TrialScheduler.CONTINUE if going else TrialScheduler.STOP

    return Halving()


def _watching(driver: Driver) -> Any:
    """Tune's callback: tells the driver what becomes of trials, in place of Tune's own lines."""
    from ray.tune.progress_reporter import TrialProgressCallback  # noqa: PLC0415

    class Watching(TrialProgressCallback):
        def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
            for trial in trials:  # Tune does not say so where a worker cannot be used again
                if trial.is_finished() and driver.has(trial.trial_id):
                    driver.ended(trial.trial_id)
            driver.display.tick()

        def on_trial_start(
            self, iteration: int, trials: list[Any], trial: Any, **info: Any
        ) -> None:
            driver.started(trial.trial_id)

        def on_trial_result(
            self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
        ) -> None:
            driver.reported(trial.trial_id, result)

        def on_trial_complete(
            self, iteration: int, trials: list[Any], trial: Any, **info: Any
        ) -> None:
            driver.ended(trial.trial_id)

        def on_trial_error(
            self, iteration: int, trials: list[Any], trial: Any, **info: Any
        ) -> None:
            path = Path(trial.error_file or "")
            text, machine = death(path.read_text(encoding="utf-8") if path.is_file() else "")
            driver.ended(trial.trial_id, "" if machine else text)

    return Watching()


def _ending(driver: Driver) -> Any:
    """Tune's stopper: after Ctrl-C, once the workers have stopped or had their time."""
    from ray.tune import Stopper  # noqa: PLC0415

    class Ending(Stopper):
        since = math.inf

        def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
            return False

        def stop_all(self) -> bool:
            if not driver.stopping():
                return False
            self.since = min(self.since, time.monotonic())
            return driver.idle or time.monotonic() - self.since > GRACE_SECONDS

    return Ending()


def death(text: str) -> tuple[str, bool]:
    """Why a worker is gone, from what Ray wrote of it, and whether its whole machine is."""
    lower = text.lower()
    if any(sign in lower for sign in LOST_MACHINE):
        return "its machine was lost", True
    if "memory pressure" in lower or "outofmemoryerror" in lower:
        return "its process was ended because memory ran out, use fewer workers", False
    if "worker died" in lower or "actordiederror" in lower or "actor died" in lower:
        return "its process was ended from outside; out of memory?", False
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "its process ended without a message", False


def loggers(study: Study) -> list[Any]:
    """Ray's own callbacks that the file names.

    Raises:
        StudyError: one of them does not take what the file gives it.
    """
    found = []
    for extra, package, name in (
        ("wandb", "ray.air.integrations.wandb", "WandbLoggerCallback"),
        ("mlflow", "ray.air.integrations.mlflow", "MLflowLoggerCallback"),
    ):
        arguments = getattr(study, extra)
        if arguments is not None:
            try:
                found.append(getattr(importlib.import_module(package), name)(**arguments))
            except (TypeError, ValueError, RuntimeError) as error:
                raise StudyError(f"{extra}: {first_line(error)}") from error
    return found
