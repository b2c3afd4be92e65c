"""Two executors behind one interface: the same study on processes of this machine and on Ray."""

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from analysis import runs
from analysis.studyfile import StudyError
from benchmarks.cli import main
from benchmarks.running import capacity, executors, local
from benchmarks.running.capacity import Capacity
from benchmarks.running.disk import Options
from benchmarks.running.on_ray import tune
from benchmarks.running.timelimit import Limit
from benchmarks.studies.schema import Block, Resources, Study
from tests import sweeping

SEARCH = """\
models: small_cnn(width=0.25)
methods: [none, flip]
training: {epochs: 4}
workers: 2
tensorboard: false
tune:
  trials: 3
  seeds: 3
  final_seeds: 1
  asha: {grace: 1, factor: 2}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sweeping.prepare(tmp_path_factory.mktemp("executors"))


def test_a_search_with_halving_on_processes(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = sweeping.study(place, SEARCH, "search.yaml"), tmp_path / "runs"
    given = ["sweep", str(path), "--executor", "local", "--out", str(out)]
    assert main.run(given) == 0
    shown = capsys.readouterr()
    assert shown.out.count("  chosen: trial ") == 2 and "stopped" in shown.out
    states = list(sweeping.statuses(out).values())
    assert set(states) == {"done", "stopped"}, "each trial ended at a rung or at its end"
    kept = json.loads((out / "studies" / "search" / "search.json").read_text())
    for row in kept:
        rungs = {each["rung"] for each in row["trials"] if each["state"] == "stopped"}
        assert rungs and rungs <= {1, 2}
    assert not list(out.rglob("lock")) and not list(out.rglob("checkpoint.pt"))

    before = {each: each.stat().st_mtime_ns for each in out.glob("*/result.json")}
    assert main.run(given) == 0
    assert "Runs:" not in capsys.readouterr().err.replace("Runs: ", "", 1), "nothing is to do"
    assert before == {each: each.stat().st_mtime_ns for each in out.glob("*/result.json")}


def test_compare_on_ray_makes_the_runs_of_processes(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray in a process of its own, as it reads its settings once; the other runs here."""
    given = [
        "compare", "--model", "small_cnn(width=0.25)", "--benchmark", f"npz:{place / 'small.npz'}",
        "--methods", "none,flip", "--seeds", "1", "--epochs", "2", "--device", "cpu", "--jobs", "1",
    ]  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(local.Processes, "carry_out", sweeping.carry_out_here)
        assert main.run([*given, "--out", str(tmp_path / "local")]) == 0
    here = capsys.readouterr()
    given += ["--executor", "ray", "--out", str(tmp_path / "ray")]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *given],
        env=sweeping.environment(place),
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    tables = {}
    for executor, told, table in (("local", here.err, here.out), ("ray", done.stderr, done.stdout)):
        assert told.count("seed 0: done, ") == 2
        tables[executor] = [line[:70] for line in table.splitlines()[:12]]
    assert tables["local"] == tables["ray"]
    assert sweeping.numbers(tmp_path / "local") == sweeping.numbers(tmp_path / "ray")
    assert len(list(runs.folders(tmp_path / "ray"))) == 2


@pytest.mark.parametrize(
    ("address", "workers", "warned"), [("", 4, 1), ("", 2, 0), ("ray://elsewhere:10001", 4, 0)]
)
@pytest.mark.parametrize("verb", ["compare", "sweep"])
def test_more_threads_than_cores_are_warned_of_once(
    verb: str,
    address: str,
    workers: int,
    warned: int,
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of this machine alone, whatever carries out the runs here."""
    there = Capacity(address, workers, 1.0, 0.0, 1)

    class Idle:
        capacity = there

        def carry_out(self, *_: Any) -> dict[str, Any]:
            return {}

    monkeypatch.setattr(executors.Where, "opened", lambda *_: nullcontext(Idle()))
    monkeypatch.setattr(capacity, "cores", lambda: 2)
    if verb == "compare":
        given = ["--model", "small_cnn(width=0.25)", "--benchmark", f"npz:{place / 'small.npz'}"]
        given += ["--methods", "none,flip", "--seeds", "2", "--epochs", "2", "--device", "cpu"]
    else:
        given = [str(sweeping.study(place, SEARCH, "crowded.yaml")), "--executor", "local"]
    main.run([verb, *given, "--out", str(tmp_path / "runs")])
    told = capsys.readouterr().err
    assert told.count("Warning: 4 runs at a time with 1 thread each use 4 cores") == warned
    assert "Runs: " in told and told.count("Warning") == warned


@pytest.mark.parametrize("hold", [True, False])
def test_a_sweep_says_where_file_locks_do_not_work(
    hold: bool,
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before its first run, and goes on."""
    out, told = tmp_path / "runs", ""

    class Idle:
        capacity = Capacity("", 1, 1.0, 0.0, 1)

        def carry_out(self, *_: Any) -> dict[str, Any]:
            nonlocal told
            told = capsys.readouterr().err
            return {}

    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(executors.Where, "opened", lambda *_: nullcontext(Idle()))
    if not hold:
        monkeypatch.setattr(fcntl, "flock", no_locks)
    path = sweeping.study(place, SEARCH, "locks.yaml")
    main.run(["sweep", str(path), "--executor", "local", "--out", str(out)])
    assert (f"{out}: file locks do not work on this file system" in told) is not hold
    assert "Runs: " in told


@pytest.mark.parametrize(
    ("gpu", "workers", "expected"),
    [
        (0.0, 2, [None, None]),
        (1.0, 3, [0, 1, 2]),
        (0.25, 8, [0, 0, 0, 0, 1, 1, 1, 1]),
        (1 / 3, 4, [0, 0, 0, 1]),
        (0.4, 4, [0, 0, 1, 1]),
        (2.0, 2, [0, 2]),
    ],
)
def test_which_gpu_a_worker_sees(gpu: float, workers: int, expected: list[int | None]) -> None:
    there = Capacity("", workers, 1.0, gpu, 1)
    assert [local.gpu_of(place, there) for place in range(workers)] == expected


def test_a_worker_sees_its_gpu_among_those_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(local.GPUS, "5,7")
    with local._seeing(1):
        assert os.environ[local.GPUS] == "7"
    assert os.environ[local.GPUS] == "5,7"
    monkeypatch.delenv(local.GPUS)
    with local._seeing(1):
        assert os.environ[local.GPUS] == "1"
    assert local.GPUS not in os.environ
    with local._seeing(None):
        assert local.GPUS not in os.environ


def test_a_worker_that_dies_at_a_rung_ends_nothing_else(tmp_path: Path) -> None:
    ours, theirs = multiprocessing.Pipe()
    theirs.send({"epoch": 1, "rung": 1, "score": 0.5})
    theirs.close()
    there = local.Processes(Capacity("", 1, 1.0, 0.0, 1), tmp_path, Options(), Limit())
    dead: Any = mock.Mock(exitcode=-9)
    there._workers = [local._Worker(dead, ours, 0, job="0")]
    driver = mock.Mock()
    driver.goes_on.return_value = True
    there._hear(there._workers[0], driver)
    there._hear(there._workers[0], driver)
    driver.ended.assert_called_once_with("0", "its process was ended by SIGKILL; out of memory?")
    assert there._workers == []


def test_a_trial_that_ray_ends_at_a_rung_ends_its_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it returned, Tune would report for it, wait, and lose the next trial of the worker."""

    def ends(told: dict[str, Any]) -> None:
        sys.exit(0)

    def reports(job: object, wanted: object, again: object, *others: Any) -> None:
        others[-1]({"rung": 1})

    monkeypatch.setattr("ray.tune.report", ends)
    monkeypatch.setattr(tune, "work", reports)
    place: Any = mock.Mock(jobs=["a job"], root=tmp_path, options=Options(), flag=tmp_path / "flag")
    with pytest.raises(SystemExit):
        tune._trial({"job": 0, "runs": [], "again": [], "shares": False}, place)


def test_a_trial_that_ray_drops_without_a_word_is_offered_again() -> None:
    driver = mock.Mock()
    driver.has.side_effect = lambda name: name != "known"
    trials = [
        mock.Mock(trial_id=name, is_finished=mock.Mock(return_value=over))
        for name, over in (("known", True), ("dropped", True), ("at work", False))
    ]
    tune._watching(driver).on_step_end(0, trials)
    driver.ended.assert_called_once_with("dropped")


def test_more_runs_than_cores_may_share_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "cores", lambda: 2)
    monkeypatch.setattr(capacity, "gpus", lambda: 1)
    asked = Study(
        name="x",
        blocks=(Block(benchmarks="digits", methods="none"),),  # type: ignore[arg-type]
        resources=Resources(trials_per_gpu=4),
    )
    assert capacity.here(asked, 4).workers == 4
    assert capacity.here(asked, None).workers == 2
    with pytest.raises(
        StudyError,
        match=r"at most 4, because each run takes 0\.25 GPU and this machine has 1, got 5",
    ):
        capacity.here(asked, 5)


HAND = """\
import os, sys, time
from pathlib import Path
from benchmarks.cli import main
from benchmarks.running import disk, local
from tests import sweeping

folder, real = Path(sys.argv[1]), disk._conclude

def conclude(where, result):
    with (folder / f"log-{os.getpid()}").open("a") as file:
        file.write(where.name + chr(10))
    return real(where, result)

disk._conclude, local.Processes.carry_out = conclude, sweeping.carry_out_here
(folder / f"ready-{os.getpid()}").touch()
while not (folder / "go").exists():
    time.sleep(0.02)
sys.exit(main.run(sys.argv[2:]))
"""


@pytest.mark.slow
def test_four_processes_share_a_folder_and_those_that_live_do_what_the_killed_leave(
    place: Path, tmp_path: Path
) -> None:
    text = "models: small_cnn(width=0.5)\nmethods: [none, flip]\nseeds: 6\n"
    text += "training: {epochs: 8}\nworkers: 1\ntensorboard: false\n"
    path, out = sweeping.study(place, text, "shared.yaml"), tmp_path / "runs"
    given = ["sweep", str(path), "--executor", "local", "--out", str(out)]
    hands = {}
    try:
        for _ in range(4):
            hand = subprocess.Popen(
                [sys.executable, "-c", HAND, str(tmp_path), *given],
                env=sweeping.environment(place),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            hands[hand.pid] = hand
        while len(list(tmp_path.glob("ready-*"))) < 4:
            assert all(hand.poll() is None for hand in hands.values())
            time.sleep(0.05)
        (tmp_path / "go").touch()
        killed: set[int] = set()
        while len(killed) < 2:  # each in the midst of a run
            assert all(hand.poll() is None for pid, hand in hands.items() if pid not in killed)
            for folder in runs.folders(out) if out.is_dir() else ():
                words = runs.holder_of(folder).split()
                pid = int(words[1]) if words and words[0] == "process" else 0
                if pid in hands.keys() - killed and len(killed) < 2:
                    os.kill(pid, signal.SIGKILL)
                    killed.add(pid)
            time.sleep(0.01)
        for pid, hand in hands.items():
            errors = hand.communicate()[1]
            assert hand.returncode == (-signal.SIGKILL if pid in killed else 0), errors
            assert pid in killed or errors.count(": done, ") == 12, errors
    finally:
        for hand in hands.values():
            hand.kill()
            hand.wait()
    assert len(sweeping.statuses(out)) == 12 and set(sweeping.statuses(out).values()) == {"done"}
    logs = {int(log.name[4:]): log.read_text().split() for log in tmp_path.glob("log-*")}
    ended = [name for pid in hands.keys() - killed for name in logs[pid]]
    for pid in killed & logs.keys():  # which may have died while it wrote its last result
        ended += [name for name in logs[pid] if name != logs[pid][-1] or name not in ended]
    assert len(ended) == len(set(ended)) == 12, "each run was carried out once"
    assert all(logs[pid] for pid in hands.keys() - killed), "both who lived had work"
    assert not list(out.rglob("lock")) and not list(out.rglob("checkpoint.pt"))


def test_a_process_whose_gpu_is_in_error_takes_no_other_run_with_it(
    place: Path, tmp_path: Path
) -> None:
    text = "models: ['py:broken:poisoning', small_cnn(width=0.25)]\nmethods: none\nseeds: 2\n"
    text += "training: {epochs: 1}\nworkers: 1\nretries: 0\ntensorboard: false\n"
    path, out = sweeping.study(place, text, "poisoned.yaml"), tmp_path / "runs"
    code, _, errors = sweeping.finish(
        sweeping.start(path, out, place, "--executor", "local", BROKEN="1")
    )
    assert code == 1, errors
    assert sweeping.statuses(out) == {
        f"{model} none {seed}": state
        for seed in (0, 1)
        for model, state in (("py:broken:poisoning", "failed"), ("small_cnn(width=0.25)", "done"))
    }
    assert errors.count("device-side assert triggered") >= 2
