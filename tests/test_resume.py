"""A run that is killed and started again ends bit for bit as an undisturbed one (by SIGKILL).

Those that SIGINT and SIGTERM stop, and directories that were cut short, stand in test_cli.py.
"""

import contextlib
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

SETTING = [
    *("run", "--benchmark", "digits", "--model", "small_cnn(width=0.25)"),
    *("--epochs", "12", "--device", "cpu"),
]


def only_folder(out: Path) -> Path:
    (folder,) = runs.folders(out)
    return folder


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    assert main.run([*SETTING, "--out", str(out)]) == 0
    return only_folder(out)


def test_a_wall_clock_that_jumps_changes_no_number(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = itertools.count(2e9, -3600)  # an hour back at each look
    monkeypatch.setattr(time, "time", lambda: next(now))
    assert main.run([*SETTING, "--out", str(tmp_path)]) == 0
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


def test_killed_and_started_again(
    undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks", *SETTING, "--out", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_checkpoint(tmp_path, process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    folder = only_folder(tmp_path)
    assert runs.status_of(folder).state == "interrupted"

    assert main.run([*SETTING, "--out", str(tmp_path)]) == 0
    assert "resuming after epoch" in capsys.readouterr().err
    for name in ("metrics.jsonl", "predictions.npz"):
        assert (folder / name).read_bytes() == (undisturbed / name).read_bytes(), name
    result = json.loads((folder / "result.json").read_text())
    assert result["resumed"] == 1
    left = {path.name for path in folder.iterdir()}
    assert left == {path.name for path in undisturbed.iterdir()}, "nothing is left behind"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_run_is_not_lost_with_the_log_that_it_writes(undisturbed: Path, tmp_path: Path) -> None:
    full = Path("/dev/full").open("w")  # noqa: SIM115 - closing it raises
    with contextlib.redirect_stderr(full):
        assert main.run([*SETTING, "--out", str(tmp_path)]) == 0
        print("no room", file=sys.stderr)
        with pytest.raises(OSError, match="No space left"):
            full.flush()
    with contextlib.suppress(OSError):
        full.close()
    name = "predictions.npz"
    assert (only_folder(tmp_path) / name).read_bytes() == (undisturbed / name).read_bytes()


def test_done_is_not_done_again(undisturbed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in undisturbed.iterdir()}
    assert main.run([*SETTING, "--out", str(undisturbed.parent)]) == 0
    assert "last epoch, test: accuracy" in capsys.readouterr().out
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
