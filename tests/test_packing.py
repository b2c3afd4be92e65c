"""How many runs share a GPU, on a card that is emulated; MPS with a control program that is."""

import multiprocessing
import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.running import mps, together
from benchmarks.running.together import Trainer

CONTROL = """#!/bin/sh
read asked
echo "$CUDA_MPS_PIPE_DIRECTORY|$1|$asked|$CUDA_VISIBLE_DEVICES" >> {log}
case "$1$asked" in
  get_server_list) {answers} ;;
  *) exit {code} ;;
esac
"""


def control(
    folder: Path, monkeypatch: pytest.MonkeyPatch, code: int = 0, runs: bool = False
) -> Path:
    """A control program on PATH; the file in which it notes what it is asked."""
    log, program = folder / "log", folder / mps.PROGRAM
    program.write_text(CONTROL.format(log=log, code=code, answers="exit 0" if runs else "exit 1"))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setattr(mps, "problem_under", lambda _: "")
    return log


def asked(log: Path) -> list[list[str]]:
    return [line.split("|") for line in log.read_text().splitlines()]


def test_a_control_daemon_is_started_and_stopped_in_its_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = control(tmp_path, monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(KeyboardInterrupt), mps.started() as variables:
        folder = Path(variables["CUDA_MPS_PIPE_DIRECTORY"])
        assert folder.is_dir() and folder.stat().st_mode & 0o077 == 0
        assert variables["CUDA_MPS_LOG_DIRECTORY"] == str(folder)
        raise KeyboardInterrupt
    assert not folder.exists()
    looked, *calls = asked(log)
    assert looked[2] == "get_server_list" and looked[0] != str(folder)
    assert calls == [[str(folder), "-d", "", ""], [str(folder), "", "quit", ""]]


def test_a_control_daemon_that_runs_already_is_neither_started_nor_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = control(tmp_path, monkeypatch, runs=True)
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", "/elsewhere")
    with mps.started() as variables:
        assert variables == {}
    assert asked(log) == [["/elsewhere", "", "get_server_list", ""]]


def test_without_mps_it_is_said_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(mps.NoMPS, match="is not installed"), mps.started():
        pass
    control(tmp_path, monkeypatch, code=1)
    with pytest.raises(mps.NoMPS, match="MPS did not start: CalledProcessError"), mps.started():
        pass
    log = control(tmp_path, monkeypatch)
    monkeypatch.setattr(mps, "problem_under", lambda _: "CUDA error")
    with (
        pytest.raises(mps.NoMPS, match="could not use the GPU under it: CUDA error"),
        mps.started(),
    ):
        pass
    assert asked(log)[-1][2] == "quit"


def test_what_a_process_cannot_do_under_mps_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mps, "TRIED", "import os; raise SystemExit(os.environ['SOME'])")
    assert mps.problem_under({"SOME": "no device"}) == "no device"
    monkeypatch.setattr(mps, "TRIED", "")
    assert mps.problem_under({}) == ""


def test_a_control_daemon_ends_with_a_process_that_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    control(tmp_path, monkeypatch)
    code = (
        "import os, signal; from benchmarks.running import mps; mps.problem_under = lambda _: ''\n"
        "with mps.started() as given:\n"
        "    print(given['CUDA_MPS_PIPE_DIRECTORY'], flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    folder = Path(done.stdout.strip())
    limit = time.monotonic() + 30
    while folder.exists():
        assert time.monotonic() < limit
        time.sleep(0.05)


SWITCHES: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)


class Looks(Trainer):
    def prepare(self, make: Any) -> None:
        self.found = [bool(each.allow_tf32) for each in SWITCHES]

    def told(self) -> list[bool]:
        return self.found


def test_processes_compute_without_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's default is TF32 in convolutions, also for what is called float32."""
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(together.signal, "signal", lambda *_: None)
    ours, theirs = multiprocessing.Pipe()
    given = pickle.dumps(("cpu", {}, Looks))
    thread = threading.Thread(target=together.serve, args=(theirs, given))
    thread.start()
    ours.send(("prepare", (None,)))
    ours.send(("told", ()))
    assert [ours.recv(), ours.recv()] == [("done", None), ("done", [False, False])]
    ours.close()
    thread.join()
    assert torch.backends.cudnn.allow_tf32
