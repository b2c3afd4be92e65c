"""A sweep on Ray: what is done, what fails and why, nothing done twice, nothing left behind."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest

from analysis import question, runs
from analysis.runs import Status
from analysis.studyfile import StudyError
from benchmarks.cli import arguments, main
from benchmarks.cli.sweep import where_of
from benchmarks.data import download
from benchmarks.running import capacity, cleanup, disk, flag, local, worker
from benchmarks.running.capacity import Capacity
from benchmarks.running.disk import Options
from benchmarks.running.display import Display, duration
from benchmarks.running.driver import Driver
from benchmarks.running.executors import Where
from benchmarks.running.on_ray import executor, joined, own, tune
from benchmarks.running.problems import Problem
from benchmarks.running.timelimit import Limit
from benchmarks.studies import loading, schema
from benchmarks.studies.cells import Cell
from benchmarks.studies.costs import Costs
from benchmarks.studies.ledger import FAILURES, Ledger
from benchmarks.studies.plan import Plan
from benchmarks.studies.rounds import Job, Round
from benchmarks.studies.search import Ladder
from tests import sweeping

MODELS = "[small_cnn(width=0.25), 'py:broken:raising', 'py:broken:nan', 'py:broken:killed']"
TEXT = f"""\
question: Does one run that fails leave the others alone?
models: {MODELS}
methods: none
seeds: 1
training: {{epochs: 3}}
workers: 2
retries: 1
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sweeping.prepare(tmp_path_factory.mktemp("sweep"))


@pytest.fixture(scope="module")
def temporary() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ab", dir="/tmp") as name:
        yield Path(name)


@pytest.fixture(scope="module")
def swept(place: Path, temporary: Path) -> tuple[int, str, str]:
    """A sweep of four runs, of which one raises, one ends in nan and one kills its worker."""
    path, out = sweeping.study(place, TEXT), place / "runs"
    process = sweeping.start(path, out, place, BROKEN="1", TMPDIR=str(temporary))
    return sweeping.finish(process)


@pytest.fixture(scope="module")
def healthy(place: Path) -> schema.Study:
    path = sweeping.study(place, TEXT.replace(MODELS, "small_cnn(width=0.25)"), "healthy.yaml")
    return loading.load(path)


def test_what_fails_is_named_and_the_others_finish(
    place: Path, swept: tuple[int, str, str]
) -> None:
    code, _, errors = swept
    assert code == 1
    assert sweeping.statuses(place / "runs") == {
        "small_cnn(width=0.25) none 0": "done",
        "py:broken:raising none 0": "failed",
        "py:broken:nan none 0": "failed",
        "py:broken:killed none 0": "failed",
    }
    named = [line for line in errors.splitlines() if line.startswith("not done: ")]
    assert len(named) == 3
    reasons = {line.split(", ")[1]: line for line in named}
    assert "RuntimeError: a network of one's own" in reasons["py:broken:raising"]
    assert "loss is nan" in reasons["py:broken:nan"]
    assert "ended from outside; out of memory?" in reasons["py:broken:killed"]
    assert "tried 2 times" in reasons["py:broken:killed"]
    assert "--retry-failed" in errors
    for folder in runs.folders(place / "runs"):
        lines = folder / FAILURES
        wanted = 0 if runs.status_of(folder).state == "done" else 2
        assert len(lines.read_text().splitlines() if lines.exists() else []) == wanted


def test_what_data_of_ones_own_hold_is_told_before_the_first_run(
    swept: tuple[int, str, str],
) -> None:
    errors = swept[2]
    assert errors.count("exact duplicates between splits: none") == 1
    assert errors.index("Data: npz:") < errors.index("Runs: 4 to do")


def test_nothing_is_left_behind(place: Path, temporary: Path, swept: tuple[int, str, str]) -> None:
    assert sweeping.left_behind(place / "runs", temporary) == []


def test_only_the_table_is_on_standard_output(swept: tuple[int, str, str]) -> None:
    shown = swept[1]
    assert shown.startswith("Study      some")
    assert "Model      small_cnn(width=0.25)" in shown
    assert "ray" not in shown.lower().replace("array", "")


def test_curves_are_written(place: Path, swept: tuple[int, str, str]) -> None:
    folder = place / "runs" / "studies" / "some" / "tensorboard"
    assert len(list(folder.glob("*/events.out.tfevents.*"))) == 1


def test_the_study_is_left_beside_its_runs(place: Path, swept: tuple[int, str, str]) -> None:
    asked = question.read(place / "runs", "some")
    assert asked.runs == {folder.name for folder in runs.folders(place / "runs")}
    assert asked.text == "Does one run that fails leave the others alone?"


def test_the_bits_are_those_of_one_process(
    place: Path, swept: tuple[int, str, str], healthy: schema.Study, tmp_path: Path
) -> None:
    (experiment,) = Plan(healthy, place).experiments
    (cell,) = experiment.cells()
    disk.execute(cell.run, cell.recorded, tmp_path, Options(data_root=place), cell.benchmark)
    ours, theirs = sweeping.numbers(place / "runs"), sweeping.numbers(tmp_path)
    assert ours[cell.run.id] == theirs[cell.run.id]


def test_compare_after_a_sweep_trains_nothing(
    place: Path,
    swept: tuple[int, str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def never(*arguments: Any) -> dict[str, Any]:
        raise AssertionError("a run was started")

    monkeypatch.setattr(local.Processes, "carry_out", never)
    code = main.run(
        ["compare", "--benchmark", f"npz:{place / 'small.npz'}", "--model", "small_cnn",
         "--width", "0.25", "--methods", "none", "--seeds", "1", "--epochs", "3",
         "--out", str(place / "runs"), "--device", "cpu"]
    )  # fmt: skip
    assert code == 0
    assert "small_cnn(width=0.25)" in capsys.readouterr().out


def test_again_nothing_is_trained_and_failures_stay_told(
    place: Path,
    swept: tuple[int, str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def never(*arguments: Any) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(executor, "opened", never)
    monkeypatch.syspath_prepend(str(place))
    out = place / "runs"
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert main.run(["sweep", str(place / "some.yaml"), "--out", str(out)]) == 1
    assert capsys.readouterr().err.count("not done: ") == 3
    after = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert after == before
    dry = ["sweep", str(place / "some.yaml"), "--out", str(out), "--dry-run", "--retry-failed"]
    assert main.run(dry) == 0
    assert "4 runs: 1 done, 3 failed; 3 to do" in capsys.readouterr().out


def test_retry_failed_does_just_them(
    place: Path,
    temporary: Path,
    swept: tuple[int, str, str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On the other executor: what one has left to do another does."""
    out = place / "runs"
    done = next(each for each in runs.folders(out) if runs.status_of(each).state == "done")
    before = (done / "result.json").stat().st_mtime_ns
    monkeypatch.syspath_prepend(str(place))
    monkeypatch.setattr(local.Processes, "carry_out", sweeping.carry_out_here)
    given = ["sweep", str(place / "some.yaml"), "--retry-failed", "--executor", "local"]
    assert main.run([*given, "--out", str(out)]) == 0
    assert "Runs: 3 to do, 1 done" in capsys.readouterr().err
    assert set(sweeping.statuses(out).values()) == {"done"}
    assert (done / "result.json").stat().st_mtime_ns == before
    assert sweeping.left_behind(out, temporary) == []


# What needs no Ray


def driver_of(
    jobs: list[Job],
    root: Path,
    healthy: schema.Study,
    retries: int = 1,
    ladder: Ladder | None = None,
    limit: Limit | None = None,
) -> Driver:
    """A driver of these jobs, without an executor."""
    quiet = replace(healthy, tensorboard=False)
    there = Capacity("", 2, 1.0, 0.0, 1)
    ledger, limit = Ledger(root, retries), limit or Limit()
    return Driver(Round(jobs, ladder), ledger, quiet, there, lambda: False, limit)


def display(*wanted: Cell, done: int = 0, workers: int = 1, costs: Costs | None = None) -> Display:
    epochs = {cell.run.id: done for cell in wanted}
    return Display({cell.run.id: cell for cell in wanted}, epochs, workers, costs or Costs())


@pytest.fixture
def job(healthy: schema.Study, place: Path) -> Job:
    (experiment,) = Plan(healthy, place).experiments
    return Job(tuple(experiment.cells()))


def test_a_worker_that_dies_is_replaced_as_often_as_the_file_says(
    job: Job, healthy: schema.Study, tmp_path: Path
) -> None:
    driver = driver_of([job], tmp_path, healthy, retries=2)
    for attempt in range(3):
        assert not driver.over
        assert driver.offer(f"t{attempt}") is not None
        driver.started(f"t{attempt}")
        driver.ended(f"t{attempt}", "killed")
    assert driver.over
    outcome = driver.outcomes[job.first.run.id]
    assert isinstance(outcome, Status)
    assert outcome.state == "failed"
    assert "tried 3 times" in outcome.reason
    assert len(driver.ledger.failures(job.first)) == 3


def test_a_machine_that_dies_is_not_the_runs_fault(
    job: Job, healthy: schema.Study, tmp_path: Path
) -> None:
    driver = driver_of([job], tmp_path, healthy, retries=0)
    for attempt in range(5):
        assert driver.offer(f"t{attempt}") is not None
        driver.ended(f"t{attempt}")
    assert not driver.over
    assert driver.ledger.failures(job.first) == []


def test_a_problem_is_told_and_not_recorded(
    job: Job, healthy: schema.Study, tmp_path: Path
) -> None:
    driver = driver_of([job], tmp_path, healthy)
    driver.offer("t")
    driver.started("t")
    driver.reported("t", {"problem": "the disk is full"})
    driver.ended("t")
    assert driver.outcomes == {job.first.run.id: Problem("the disk is full")}
    assert driver.over
    assert not list(tmp_path.glob("*/result.json"))


def test_data_that_cannot_be_had_are_asked_for_once(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = []

    def offline(request: Any, timeout: float) -> None:
        asked.append(request.full_url)
        raise OSError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    monkeypatch.setattr(download, "BACKOFF", 0.0)
    monkeypatch.setattr(local.Processes, "carry_out", sweeping.carry_out_here)
    path, out = tmp_path / "some.yaml", tmp_path / "runs"
    names = ["retinamnist(rows_per_class=20)", "retinamnist", f"npz:{place / 'small.npz'}"]
    path.write_text(
        f"benchmarks: {json.dumps(names)}\nmodels: small_cnn(width=0.25)\n"
        "methods: [none, flip]\nseeds: 2\ntraining: {epochs: 1}\ntensorboard: false\n"
    )
    given = ["sweep", str(path), "--executor", "local", "--workers", "1", "--out", str(out)]
    assert main.run([*given, "--data", str(tmp_path)]) == 1
    shown = capsys.readouterr()
    assert len(asked) == 5, "the attempts of one run"
    assert "retinamnist" not in shown.out
    told = [line for line in shown.err.splitlines() if "could not be downloaded" in line]
    assert [line.partition(": retinamnist.npz ")[0] for line in told] == [
        "retinamnist: not available, its runs are left out",
        "not done: retinamnist, 8 runs",
    ]
    states = [runs.status_of(each).state for each in runs.folders(out)]
    assert states.count("done") == 4
    assert set(states) == {"done", "new"}, "the same command does the others"


def test_what_stops_a_retry_is_not_told_as_the_failure_before(
    job: Job, healthy: schema.Study, tmp_path: Path
) -> None:
    disk.conclude(job.first.run, job.first.recorded, tmp_path, "failed", "the failure before")
    quiet, there = replace(healthy, tensorboard=False), Capacity("", 1, 1.0, 0.0, 1)
    for tell, expected in (
        (lambda driver: driver.reported("t", {"problem": "the disk is full"}), "the disk is full"),
        (lambda driver: driver.ended("t", "killed"), "killed; rerun the same command"),
    ):
        ledger = Ledger(tmp_path, retries=0, retry_failed=True)
        driver = Driver(Round([job]), ledger, quiet, there, lambda: False, Limit())
        assert driver.offer("t") is not None
        driver.started("t")
        tell(driver)
        outcome = driver.outcomes[job.first.run.id]
        assert isinstance(outcome, Problem) and outcome.text.startswith(expected)
        assert ledger.failures(job.first) == []


def test_a_trial_that_is_pruned_is_ended_on_disk(
    job: Job, healthy: schema.Study, tmp_path: Path
) -> None:
    ladder = Ladder(2)
    ladder.seen("row", 1, 7, 0.9)
    trial = replace(job, trial=1, group="row", rungs=(1,))
    driver = driver_of([trial], tmp_path, healthy, ladder=ladder)
    driver.offer("t")
    driver.started("t")
    assert driver.goes_on("t", {"epoch": 1})
    assert not driver.goes_on("t", {"epoch": 1, "rung": 1, "score": 0.5})
    driver.ended("t")
    status = driver.ledger.status(job.first)
    assert status.state == "stopped"
    assert status.reason.startswith("rung 1: ")
    assert not driver.ledger.to_do(job.first)


@pytest.mark.parametrize(
    ("text", "reason", "machine"),
    [
        ("Failure # 1\nray.exceptions.ActorDiedError: The actor died", "outside", False),
        ("ray.exceptions.OutOfMemoryError: Task was killed due to the node running low on memory",
         "memory ran out", False),
        ("The actor died because its node died. ...", "machine was lost", True),
        ("The actor is temporarily unavailable: RpcError: Socket closed", "machine was lost", True),
        ("Traceback\n  File x\nValueError: no such thing\n", "ValueError: no such thing", False),
        ("", "without a message", False),
    ],
)  # fmt: skip
def test_why_a_worker_is_gone(text: str, reason: str, machine: bool) -> None:
    told, whole = tune.death(text)
    assert reason in told
    assert whole is machine


def test_a_run_ends_with_the_flag_of_its_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flag, "LOOK_SECONDS", 0.0)
    with flag.raised(tmp_path) as raised:
        ends = flag.lowered(raised)
        assert not ends()
        flag.write(raised, flag.STOP)
        assert ends()
    assert not raised.exists()
    assert flag.lowered(raised)(), "a sweep that is gone has no flag"


def test_the_flag_of_a_dead_sweep_is_removed_and_that_of_a_living_one_is_not(
    tmp_path: Path,
) -> None:
    dead = tmp_path / ".sweep-dead"
    dead.write_text("go")
    with flag.raised(tmp_path) as living:
        assert not dead.exists()
        with flag.raised(tmp_path):
            assert living.exists()


def test_what_one_run_takes(healthy: schema.Study) -> None:
    def with_(**resources: Any) -> schema.Study:
        return replace(healthy, resources=schema.Resources(**resources))

    assert capacity.takes(healthy, gpus=0) == (1.0, 0.0)
    assert capacity.takes(healthy, gpus=1) == (1.0, 1.0)
    assert capacity.takes(with_(gpus=0), gpus=1) == (1.0, 0.0)
    assert capacity.takes(with_(trials_per_gpu=4, cpus=2), gpus=1, workers=8) == (2.0, 0.25)
    for auto in (healthy, with_(trials_per_gpu="auto")):
        assert capacity.takes(auto, gpus=2) == (1.0, 1.0), "until it is measured"
        assert capacity.takes(auto, gpus=2, workers=5) == (1.0, 1 / 3)
    assert capacity.takes(with_(trials_per_gpu="auto"), gpus=0) == (1.0, 1.0), "it needs one"


def test_more_than_this_machine_has_is_refused_before_ray_starts(
    healthy: schema.Study, tmp_path: Path
) -> None:
    for resources, part in (({"cpus": 4096}, "4096 cores"), ({"gpus": 64}, "64 GPU")):
        asked = replace(healthy, resources=schema.Resources(**resources))
        ray: Any = None
        for workers in (None, 1):
            with pytest.raises(StudyError, match=part):
                own.start(ray, tmp_path, asked, workers)


def test_a_results_folder_that_is_another_one_there_is_told(tmp_path: Path) -> None:
    with flag.raised(tmp_path) as raised:
        assert joined.check_here(str(tmp_path), raised.name, Options(), []) == []
        other = tmp_path / "elsewhere"
        other.mkdir()
        (text,) = joined.check_here(str(other), raised.name, Options(), [])
    assert "storage that all machines share" in text


class FakeRay:
    """What a sweep asks Ray for at its start."""

    def __init__(self, address: str = "127.0.0.1", error: Exception | None = None) -> None:
        self.address, self.error = address, error

    def init(self, **arguments: Any) -> Any:
        if self.error is not None:
            raise self.error
        return types.SimpleNamespace(dashboard_url="127.0.0.1:8265")

    def nodes(self) -> list[dict[str, Any]]:
        has = {"CPU": 2.0}
        return [{"NodeManagerAddress": self.address, "Alive": True, "Resources": has}]


def test_a_ray_that_others_may_reach_is_refused(healthy: schema.Study, tmp_path: Path) -> None:
    ray: Any = FakeRay()
    assert own.start(ray, tmp_path, healthy, 1).workers == 1
    ray = FakeRay("10.0.0.7")
    with pytest.raises(StudyError, match=r"listens on 10\.0\.0\.7 instead of 127\.0\.0\.1"):
        own.start(ray, tmp_path, healthy, 1)


def test_a_dashboard_says_where_it_is_and_what_it_needs(
    healthy: schema.Study,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ray: Any = FakeRay()
    asked = replace(healthy, dashboard=True)
    monkeypatch.setitem(sys.modules, "ray.dashboard.optional_deps", None)
    with pytest.raises(StudyError, match=r"dashboard: .* pip install 'ray\[default\]'"):
        own.start(ray, tmp_path, asked, 1)
    there = types.ModuleType("ray.dashboard.optional_deps")
    monkeypatch.setitem(sys.modules, "ray.dashboard.optional_deps", there)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    own.start(ray, tmp_path, asked, 1)
    assert "Dashboard: http://127.0.0.1:8265, token secret" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "part"),
    [
        (ImportError("No module named 'grpc'"), r"pip install 'augbench\[client\]'"),
        (ConnectionError("refused"), r"no Ray cluster answers at ray://x:1 .*refused"),
    ],
)
def test_a_cluster_that_cannot_be_joined_says_why(
    healthy: schema.Study, error: Exception, part: str
) -> None:
    ray: Any = FakeRay(error=error)
    with pytest.raises(StudyError, match=part):
        joined.join(ray, "ray://x:1", healthy, None)


def test_the_address_is_that_of_the_command_else_of_the_environment_else_of_the_file(
    healthy: schema.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = replace(healthy, address="of-the-file")
    command = arguments.SweepCommand(file=Path("x"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert where_of(command, asked).address == "of-the-file"
    monkeypatch.setenv("RAY_ADDRESS", "of-the-environment")
    assert where_of(command, asked).address == "of-the-environment"
    command.address = "local"
    assert where_of(command, asked).address == ""
    here = replace(command, executor="local", address="")
    assert where_of(here, asked) == Where("local", "", 2), "which joins no cluster"
    with pytest.raises(StudyError, match="executor: expected ray for the address x, got"):
        where_of(replace(here, address="x"), asked)
    with pytest.raises(StudyError, match="wandb: expected --executor ray"):
        where_of(here, replace(asked, wandb={"project": "mine"}))


def test_callbacks_get_what_the_file_says_before_ray_starts(
    healthy: schema.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[dict[str, Any]] = []

    class Callback:
        def __init__(self, *, project: str) -> None:
            given.append({"project": project})

    fake = types.ModuleType("ray.air.integrations.wandb")
    vars(fake)["WandbLoggerCallback"] = Callback
    monkeypatch.setitem(sys.modules, "ray.air.integrations.wandb", fake)
    assert len(tune.loggers(replace(healthy, wandb={"project": "mine"}))) == 1
    assert given == [{"project": "mine"}]
    with pytest.raises(StudyError, match=r"wandb: TypeError: .*'projekt'"):
        tune.loggers(replace(healthy, wandb={"projekt": "mine"}))
    assert tune.loggers(healthy) == []


def line(epoch: int) -> dict[str, Any]:
    return {"epoch": epoch, "train_loss": 1.0 / epoch, "select": {"auc": epoch / 10}}


def test_the_last_epoch_and_the_test_metrics_are_told() -> None:
    told: list[dict[str, Any]] = []
    progress = worker.Told(told.append, 0)
    for epoch in (1, 2, 3):
        progress.epoch(epoch, line(epoch))
    progress.note("at once")
    assert told == [{"epoch": 3, "train_loss": 1 / 3, "select_auc": 0.3, "notes": ["at once"]}]
    progress.epoch(4, line(4))
    progress.over({"status": "done", "metrics": {"last": {"test": {"auc": 0.7}}}})
    assert told[1:] == [{"epoch": 4, "train_loss": 0.25, "select_auc": 0.4, "test_auc": 0.7}]
    progress.over({"status": "skipped"})
    assert len(told) == 2, "nothing new"


def test_a_worker_comes_back_from_a_run_that_is_held_elsewhere(
    job: Job, place: Path, tmp_path: Path
) -> None:
    told: list[dict[str, Any]] = []
    name, folder = job.first.run.id, runs.folder_of(tmp_path, job.first.run)

    def work(*again: str) -> None:
        told.clear()
        options = Options(data_root=place)
        worker.work(job, [name], again, tmp_path, options, lambda: False, told.append)

    with runs.locked(folder):
        work()
    assert told == [{"held": name}]
    disk.conclude(job.first.run, job.first.recorded, tmp_path, "failed", "elsewhere, just now")
    work()
    assert told == [{"held": name}], "a failure that this sweep has not seen is not its to retry"
    work(name)
    assert told[-1]["epoch"] == 3
    assert "test_auc" in told[-1]
    assert runs.status_of(folder).state == "done"


def seeds_of(healthy: schema.Study, place: Path, count: int) -> list[Job]:
    seeds = tuple(range(count))
    asked = replace(healthy, blocks=(replace(healthy.blocks[0], seeds=seeds),))
    (experiment,) = Plan(asked, place).experiments
    return [Job((cell,)) for cell in experiment.cells()]


def test_runs_that_are_held_elsewhere_go_to_the_end_of_the_queue(
    healthy: schema.Study,
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("benchmarks.running.driver.HELD_SECONDS", 0.0)
    jobs = seeds_of(healthy, place, 3)
    driver = driver_of(jobs, tmp_path, healthy)
    first, second, third = (job.first for job in jobs)

    def end(name: str, cell: Cell, state: Literal["failed", "stopped"]) -> None:
        driver.started(name)
        disk.conclude(cell.run, cell.recorded, tmp_path, state, "tested")
        driver.ended(name)

    with runs.locked(runs.folder_of(tmp_path, first.run)):
        offered = driver.offer("a")
        assert offered is not None and offered["runs"] == [second.run.id]
        assert "1 held by other processes" in driver.display.where()
        driver.started("a")
        driver.reported("a", {"held": second.run.id})  # another took it before the worker came
        driver.ended("a")
        assert driver.ledger.failures(second) == [] and driver._lost == {}
        offered = driver.offer("b")
        assert offered is not None and offered["runs"] == [third.run.id]
        end("b", third, "stopped")
        with runs.locked(runs.folder_of(tmp_path, second.run)):
            assert driver.offer("c") is None and not driver.over
            assert "2 held by other processes" in driver.display.where()
            shown = capsys.readouterr().err
            assert f"none, seed 0: waiting, held by process {os.getpid()} on " in shown
        disk.conclude(second.run, second.recorded, tmp_path, "failed", "elsewhere")
        assert driver.offer("d") is None and not driver.over
        outcome = driver.outcomes[second.run.id]
        assert isinstance(outcome, Status) and outcome.reason == "elsewhere"
        assert driver.ledger.failures(second) == [], "the other process counts it"
    offered = driver.offer("e")
    assert offered is not None and offered["runs"] == [first.run.id]
    assert "held by" not in driver.display.where()
    end("e", first, "stopped")
    assert driver.over and len(driver.outcomes) == 3


def test_a_run_that_another_process_takes_from_a_dead_worker_is_not_ended(
    healthy: schema.Study, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.running.driver.HELD_SECONDS", 0.0)
    (job,) = seeds_of(healthy, place, 1)
    ladder = Ladder(2)
    ladder.seen("row", 1, 7, 0.9)
    trial = replace(job, trial=1, group="row", rungs=(1,))
    for retries, single, driven in ((1, job, None), (0, trial, ladder)):
        driver = driver_of([single], tmp_path, healthy, retries=retries, ladder=driven)
        driver.ledger.failures(job.first)
        assert driver.offer("a") is not None
        driver.started("a")
        with runs.locked(runs.folder_of(tmp_path, job.first.run)):
            if driven is None:
                driver.ledger.failed(job.first, "before")  # so that no try is left
                driver.ended("a", "killed")
            else:
                assert not driver.goes_on("a", {"epoch": 1, "rung": 1, "score": 0.5})
                driver.ended("a")
            assert not driver.over and driver.offer("b") is None
        assert driver.outcomes == {}
        assert driver.offer("c") is not None


def test_each_run_of_a_trial_shows_its_own_seconds(
    job: Job, healthy: schema.Study, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (experiment,) = Plan(
        replace(healthy, blocks=(replace(healthy.blocks[0], seeds=(0, 1)),)), place
    ).experiments
    one, other = experiment.cells()
    board = display(one, other)
    board.started(one)
    cost = {"charged_seconds": 20.0, "evaluation_seconds": 4.0, "epochs": 3}
    result = {
        "cost": cost,
        "metrics": {"last": {"select": {"auc": 0.5}}},
        "device": {"type": "cpu"},
        "data": {"kind": "multi-class"},
    }
    for cell in (one, other):
        board.ended(cell, Status("done"), result)
    shown = capsys.readouterr().err
    assert shown.count("done, 24.0 s, select AUC 0.5") == 2


def test_a_trial_whose_first_run_has_ended_goes_on(
    healthy: schema.Study, place: Path, tmp_path: Path
) -> None:
    """As after an interruption between the runs of a trial."""
    ended, left = (job.first for job in seeds_of(healthy, place, 2))
    disk.conclude(ended.run, ended.recorded, tmp_path, "stopped", "tested")
    trial = Job((ended, left), trial=1, group="row")
    driver = driver_of([trial], tmp_path, healthy)
    assert driver.offer("t") is not None
    driver.started("t")
    for epoch in (1, 2):
        driver.reported("t", {"epoch": epoch})
    assert "1 running" in driver.display.where()
    disk.conclude(left.run, left.recorded, tmp_path, "stopped", "tested")
    driver.ended("t")
    assert driver.display.where().startswith("1 done, 0 running, ")


def test_temporary_files_lie_where_sockets_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("x" * 60)))
    folder = cleanup.private_folder()
    try:
        assert len(str(folder)) < 45
        assert folder.stat().st_mode & 0o077 == 0, "closed to others"
    finally:
        folder.rmdir()


def sleeper(folder: Path) -> subprocess.Popen[bytes]:
    """A process with a file below the folder open."""
    code = (
        "import sys, time; file = open(sys.argv[1], 'w'); print('x', flush=True); time.sleep(600)"
    )
    arguments = [sys.executable, "-c", code, str(folder / "log")]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.read(1)
    return process


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_a_killed_driver_is_cleaned_up_after(tmp_path: Path) -> None:
    folder = tmp_path / "private"
    folder.mkdir()
    stays, goes = sleeper(tmp_path), sleeper(folder)
    code = (
        "import os, signal, sys; from pathlib import Path; from benchmarks.running import cleanup\n"
        "with cleanup.outlived(Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)"
    )
    driver = subprocess.run([sys.executable, "-c", code, str(folder)], check=False)
    assert driver.returncode == -signal.SIGKILL
    assert goes.wait(timeout=20) == -signal.SIGKILL
    limit = time.monotonic() + 20
    while folder.exists():
        assert time.monotonic() < limit
        time.sleep(0.02)
    assert stays.poll() is None
    stays.kill()
    stays.wait()
    for process in (stays, goes):
        assert process.stdout is not None
        process.stdout.close()


def test_cleaning_spares_the_driver(tmp_path: Path) -> None:
    folder = tmp_path / "private"
    folder.mkdir()
    with (folder / "log").open("w"):
        cleanup.clean(folder, spared=os.getpid())
    assert not folder.exists()


def test_folders_of_dead_sweeps_are_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(prefix="ab", dir="/tmp") as name:
        monkeypatch.setattr(tempfile, "tempdir", name)
        dead, living = (Path(name) / f"augbench-{each}" for each in ("dead", "living"))
        for folder in (dead, living):
            folder.mkdir()
            (folder / "owner").touch()
        with flag.held(living / "owner"):
            own.remove_stale()
        assert not dead.exists()
        assert living.exists()


def test_durations_in_words() -> None:
    told = [duration(seconds) for seconds in (5, 89, 600, 7200, 400000)]
    assert told == ["5 s", "89 s", "10 min", "2.0 h", "4.6 d"]


def test_of_an_interrupted_run_only_the_rest_is_left(job: Job) -> None:
    costs = Costs()
    cost = {"charged_seconds": 300.0, "evaluation_seconds": 0.0, "epochs": 3}
    costs.saw(job.first.run, {"cost": cost})
    board = display(job.first, done=2, costs=costs)
    assert "1 waiting, about 2 min left" in board.where()


def test_where_the_sweep_stands(job: Job) -> None:
    board = display(job.first, workers=2)
    assert board.where().startswith("0 done, 0 running, 1 waiting, time left unknown, ")
    board.started(job.first)
    assert board.where().startswith("0 done, 1 running, time left unknown, ")
    board.ended(job.first, Status("failed", "why"), None)
    assert re.fullmatch(r"0 done, 0 running, 1 failed, \d+ % busy", board.where())


def test_the_time_left_is_that_of_each_data_set(job: Job) -> None:
    """A small set tells nothing of a large one; what is not known yet is at least not counted."""
    large, other = (
        replace(job.first, run=replace(job.first.run, benchmark=name)) for name in ("a", "b")
    )
    costs = Costs()
    board = display(job.first, large, other, workers=2, costs=costs)
    board.started(job.first)
    cost = {"charged_seconds": 0.3, "evaluation_seconds": 0.0, "epochs": 3}
    costs.saw(job.first.run, {"cost": cost})
    board.ended(job.first, Status("failed", "why"), None)
    assert "2 waiting, time left unknown, " in board.where()
    costs.saw(large.run, {"cost": {**cost, "charged_seconds": 600.0}})
    assert "2 waiting, at least 10 min left, " in board.where()
    costs.saw(other.run, {"cost": {**cost, "charged_seconds": 60.0}})
    assert "2 waiting, about 10 min left, " in board.where(), "no sooner than the longest run"


def test_a_run_that_takes_longer_than_foreseen_is_finishing(job: Job) -> None:
    costs = Costs()
    costs.saw(job.first.run, {"cost": {"charged_seconds": 0.0, "evaluation_seconds": 0.0,
                                       "epochs": 3}})  # fmt: skip
    board = display(job.first, costs=costs)
    board.started(job.first)
    assert board.where().startswith("0 done, 1 running, finishing, ")


def test_a_record_of_failures_that_was_cut_short_counts_as_none(job: Job, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, retries=1)
    ledger.failed(job.first, "once")
    assert ledger.failures(job.first) == ["once"]
    path = ledger.folder(job.first) / FAILURES
    path.write_text(json.dumps({"reason": "x"})[:-3])
    assert ledger.failures(job.first) == []
