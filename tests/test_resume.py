"""A run that is killed and started again ends bit for bit as an undisturbed one (by SIGKILL)."""

import itertools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from analysis import metrics, runs
from benchmarks.cli import main

pytestmark = pytest.mark.alone

SETTING = ["--benchmark", "digits", "--model", "small_cnn", "--epochs", "6", "--device", "cpu"]


def start(out: Path, *extra: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks", "run", *SETTING, "--out", str(out), *extra],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def only_folder(out: Path) -> Path:
    (folder,) = runs.folders(out)
    return folder


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    process = start(out)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return only_folder(out)


def test_a_wall_clock_that_jumps_changes_no_number(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = itertools.count(2e9, -3600)  # an hour back at each look
    monkeypatch.setattr(time, "time", lambda: next(now))
    assert main.run(["run", *SETTING, "--out", str(tmp_path)]) == 0
    folder = only_folder(tmp_path)
    for name in ("metrics.jsonl", "run.json"):
        assert (folder / name).read_bytes() == (undisturbed / name).read_bytes()
    for line in runs.read_lines(folder / "timing.jsonl"):
        assert all(seconds >= 0 for seconds in line["phases"].values())
        assert 0 < line["charged_seconds"] < 600 and 0 < line["evaluation_seconds"] < 600


def wait_for_checkpoint(out: Path, process: subprocess.Popen[str]) -> None:
    limit = time.monotonic() + 120
    while not list(out.glob("*/checkpoint.pt")):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < limit
        time.sleep(0.01)


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_and_started_again(kill: signal.Signals, undisturbed: Path, tmp_path: Path) -> None:
    process = start(tmp_path)
    wait_for_checkpoint(tmp_path, process)
    process.send_signal(kill)
    _, errors = process.communicate(timeout=60)
    if kill == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 130, errors
        assert "The same command goes on from there" in errors
    folder = only_folder(tmp_path)
    assert runs.status_of(folder).state == "interrupted"

    again = start(tmp_path)
    _, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors
    assert "going on after epoch" in errors
    for name in ("metrics.jsonl", "predictions.npz"):
        assert (folder / name).read_bytes() == (undisturbed / name).read_bytes(), name
    result = json.loads((folder / "result.json").read_text())
    assert result["resumed"] == 1
    left = {path.name for path in folder.iterdir()}
    assert left == {path.name for path in undisturbed.iterdir()}, "nothing is left behind"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_run_is_not_lost_with_the_log_that_it_writes(undisturbed: Path, tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "benchmarks", "run", *SETTING, "--out", str(tmp_path)]
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=full, timeout=300, check=False)
    folder = only_folder(tmp_path)
    assert runs.status_of(folder).state == "done"
    name = "predictions.npz"
    assert (folder / name).read_bytes() == (undisturbed / name).read_bytes()


def test_done_is_not_done_again(undisturbed: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in undisturbed.iterdir()}
    process = start(undisturbed.parent)
    shown, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "last epoch, test: accuracy" in shown
    assert before == {path.name: path.stat().st_mtime_ns for path in undisturbed.iterdir()}


def test_metrics_follow_from_predictions(undisturbed: Path) -> None:
    result = runs.with_nan(runs.read_result(undisturbed))
    stored = runs.read_arrays(undisturbed / "predictions.npz")
    for split in ("select", "test"):
        again = metrics.evaluate(
            stored[f"{split}_last_logits"], stored[f"{split}_targets"], result["data"]["kind"]
        )
        for name, value in result["metrics"]["last"][split].items():
            np.testing.assert_allclose(again[name], value, atol=1e-6, equal_nan=True)


def test_a_directory_cut_short_is_redone(undisturbed: Path, tmp_path: Path) -> None:
    copy = tmp_path / undisturbed.name
    subprocess.run(["cp", "-r", str(undisturbed), str(copy)], check=True)
    path = copy / "predictions.npz"
    path.write_bytes(path.read_bytes()[:-100])
    process = start(tmp_path)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert path.read_bytes() == (undisturbed / "predictions.npz").read_bytes()
