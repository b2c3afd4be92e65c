"""How many runs share a GPU, on a card that is emulated; MPS with a control program that is."""

import importlib
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from analysis import runs
from analysis.runs import Run, Training
from benchmarks.cli import common, compare, hours, main
from benchmarks.running import capacity, executors, firstlook, local, mps, sharing, together
from benchmarks.running.capacity import Capacity
from benchmarks.running.disk import Options
from benchmarks.running.driver import Driver
from benchmarks.running.sharing import Reached
from benchmarks.running.timelimit import Limit
from benchmarks.running.together import NotMeasured, Rate, Together, Trainer
from benchmarks.studies import loading
from benchmarks.studies.plan import Plan
from benchmarks.training.errors import out_of_memory
from benchmarks.training.trainer import threads
from tests import sweeping

SMALL = """\
models: small_cnn(width=0.25)
methods: [none, flip]
seeds: 8
training: {epochs: 1}
tensorboard: false
"""


class Card:
    """Emulated: how fast so many runs train together, and how many its memory holds."""

    def __init__(self, rates: dict[int, float], step: float = 500.0, used: float = 1500.0) -> None:
        self.rates, self.step, self.used, self.asked = rates, step, used, list[int]()

    def __call__(self, count: int) -> Reached:
        self.asked.append(count)
        if count not in self.rates:
            raise NotMeasured("OutOfMemoryError: CUDA out of memory")
        used = self.used + (count - 1) * (self.step + 600)
        return Reached(self.rates[count], self.step, used, 80000.0)


@pytest.mark.parametrize(
    ("rates", "most", "expected", "asked"),
    [
        ({1: 20, 2: 38, 4: 60, 8: 70, 16: 71}, 16, 8, [1, 2, 4, 8, 16]),
        ({1: 20, 2: 21}, 16, 1, [1, 2]),
        ({1: 20, 2: 38, 4: 60, 6: 70}, 6, 6, [1, 2, 4, 6]),
        ({1: 20, 2: 38, 4: 60}, 16, 4, [1, 2, 4, 8]),
        ({1: 20}, 1, 1, [1]),
        ({1: 20, 2: 22.1, 4: 24.4, 8: 26.6}, 16, 4, [1, 2, 4, 8]),
    ],
    ids=["no gain", "alone", "cores", "memory is full", "one core", "a tenth, and less"],
)
def test_more_runs_share_a_gpu_while_that_trains_faster(
    rates: dict[int, float], most: int, expected: int, asked: list[int]
) -> None:
    card = Card(rates)
    count, found = sharing.best(card, most)
    assert (count, card.asked) == (expected, asked)
    assert set(found) == set(asked) & set(rates)


def test_no_more_runs_are_tried_than_a_method_leaves_memory_for() -> None:
    """A run takes four plain steps of 500 MiB, 1,024 MiB besides, and its images."""
    rates = {count: 20.0 * count for count in (1, 2, 4, 8, 11, 16)}
    assert sharing.fits(Card(rates)(1), 0.0) == 1 + 77000 // 3024
    assert sharing.best(Card(rates), 16)[0] == 16
    assert sharing.best(Card(rates), 16, data_mib=4096.0)[0] == 1 + 72904 // 7120 == 11
    assert sharing.best(Card(rates, used=79000.0), 16)[0] == 1, "others use the card"


def test_what_was_measured_is_kept_by_setting(tmp_path: Path) -> None:
    file, card = tmp_path / sharing.FILE, Card({1: 20, 2: 38, 4: 39})
    first = sharing.best(sharing.remembered(card, file, "one"), 4)
    again = Card({})
    assert sharing.best(sharing.remembered(again, file, "one"), 4) == first
    assert again.asked == []
    other = Card({1: 20, 2: 21})
    assert sharing.best(sharing.remembered(other, file, "another"), 4)[0] == 1
    assert other.asked == [1, 2]
    for text in ("{", "[]", '{"one": {"1": {"speed": 1}}}'):
        file.write_text(text)
        assert sharing.best(sharing.remembered(card, file, "one"), 4) == first
    closed = tmp_path / "absent" / sharing.FILE
    assert sharing.best(sharing.remembered(card, closed, "one"), 4) == first


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Card:
    """A machine with 16 cores and a GPU, whose processes are emulated."""
    card = Card({1: 20000, 2: 38000, 4: 62000, 8: 64000})

    def rates(_: Any, make: Any, count: int, *__: float) -> list[Rate]:
        found = card(count)
        each = Rate(found.images_per_second / count, 0.1, found.step_mib, found.used_mib, 80000.0)
        return [each] * count

    monkeypatch.setattr(Together, "rates", rates)
    monkeypatch.setattr(sharing, "_card", lambda: "a card")
    monkeypatch.setattr(capacity, "cores", lambda: 16)
    monkeypatch.setattr(capacity, "gpus", lambda: 1)
    monkeypatch.setenv("PATH", "/nonexistent")
    return card


def carried_out(
    verb: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *more: str
) -> tuple[list[Capacity], list[str]]:
    """A command with no worker: what its executor had, and the folder of MPS in its environment."""
    there, pipes = list[Capacity](), list[str]()

    def nothing(self: Any, *_: Any) -> dict[str, Any]:
        there.append(self.capacity)
        pipes.append(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", ""))
        return {}

    monkeypatch.setattr(local.Processes, "carry_out", nothing)
    monkeypatch.setattr(common, "device_of", lambda _: "cuda")
    monkeypatch.setattr(compare, "device_of", lambda _: "cuda")
    sweeping.prepare(folder)
    given = ["--data", str(folder), "--out", str(folder / "runs"), *more]
    if verb == "sweep":
        path = sweeping.study(folder, SMALL)
        main.run(["sweep", str(path), "--executor", "local", *given])
    else:
        given += ["--benchmark", f"npz:{folder / 'small.npz'}", "--methods", "none,flip"]
        main.run(["compare", "--model", "mlp", "--epochs", "1", "--seeds", "8", *given])
    return there, pipes


@pytest.mark.parametrize("verb", ["compare", "sweep"])
def test_a_gpu_is_filled_unless_something_else_is_said(
    verb: str,
    gpu: Card,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (there,), _ = carried_out(verb, tmp_path, monkeypatch)
    assert (there.workers, there.gpu, there.device) == (4, 0.25, "cuda")
    assert gpu.asked == [1, 2, 4, 8]
    told = capsys.readouterr().err
    assert (
        "4 runs share a GPU, time-sliced: nvidia-cuda-mps-control is not installed. Measured "
        "images/s: 20,000 for 1 run, 38,000 for 2 runs, 62,000 for 4 runs, 64,000 for 8 runs.\n"
    ) in told
    assert ", 4 at a time" in told
    key = "a card, 16 cores, time-sliced: "
    (kept,) = json.loads((tmp_path / sharing.FILE).read_text())
    assert kept.startswith(key)

    carried_out(verb, tmp_path, monkeypatch)
    assert gpu.asked == [1, 2, 4, 8], "nothing is measured twice"
    at_once = "--jobs" if verb == "compare" else "--workers"
    (there,), _ = carried_out(verb, tmp_path, monkeypatch, at_once, "3")
    assert (there.workers, there.gpu) == (3, 1 / 3)
    assert "Runs that share a GPU are time-sliced: " in capsys.readouterr().err
    if verb == "sweep":
        path = sweeping.study(tmp_path, SMALL)
        given = ["--executor", "local", "--dry-run", "--data", str(tmp_path)]
        assert main.run(["sweep", str(path), *given]) == 0
        assert "\n4 at a time on this machine\n" in capsys.readouterr().out
        shares = list[float]()
        with monkeypatch.context() as patch:
            patch.setattr(hours, "_seconds", lambda *given: shares.append(given[-1]) or (8.0, {}))
            main.run(["sweep", str(path), *given])
        assert shares == [pytest.approx(3.1 / 4)], "4 train 3.1 times the images of one"
        plan = Plan(loading.load(path), tmp_path)
        wanted = plan.experiments[0].cells()
        assert sharing.known(plan, wanted, 4.0, None) == (4, 3.1)
        assert sharing.known(plan, wanted, 4.0, 2) is None, "nothing is to be measured"
        (tmp_path / sharing.FILE).rename(tmp_path / "kept.json")
        assert sharing.known(plan, wanted, 4.0, None) is None
        (tmp_path / "kept.json").rename(tmp_path / sharing.FILE)
        for setting, share in (("trials_per_gpu=2", 0.5), ("gpus=1", 1.0), ("gpus=0", 0.0)):
            given = ["--set", f"resources.{setting}"]
            (there,), _ = carried_out(verb, tmp_path, monkeypatch, *given)
            assert there.gpu == share
    assert gpu.asked == [1, 2, 4, 8]


def test_runs_that_share_a_gpu_are_under_an_mps_of_the_sweep(
    gpu: Card,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log = control(tmp_path, monkeypatch)
    monkeypatch.delenv("CUDA_MPS_PIPE_DIRECTORY", raising=False)
    (there,), (pipe,) = carried_out("sweep", tmp_path, monkeypatch)
    assert there.workers == 4 and "4 runs share a GPU, under MPS." in capsys.readouterr().err
    assert [each[2] for each in asked(log)] == ["get_server_list", "", "quit"]
    assert asked(log)[1][0] == pipe and not Path(pipe).exists()
    assert "CUDA_MPS_PIPE_DIRECTORY" not in os.environ

    gpu.rates = {1: 20000.0, 2: 20001.0}
    (tmp_path / sharing.FILE).unlink()
    (there,), pipes = carried_out("sweep", tmp_path, monkeypatch)
    assert there.workers == 1 and pipes == [""], "not where nothing is shared"
    assert "Each run gets its own GPU. Measured images/s: " in capsys.readouterr().err
    assert asked(log)[-1][2] == "quit"

    gpu.rates = {}
    (tmp_path / sharing.FILE).unlink()
    (there,), pipes = carried_out("sweep", tmp_path, monkeypatch)
    assert there.workers == 1 and pipes == [""]
    assert "should share a GPU: OutOfMemoryError: CUDA out of" in capsys.readouterr().err


def test_plain_steps_of_a_run_are_measured() -> None:
    training = Training(batch_size=8)
    run = Run(benchmark="x", data="", model="mlp", method="mixup(alpha=0.2)", training=training)
    trainer = Trainer("cpu")
    with threads(1):
        trainer.prepare(pickle.loads(pickle.dumps(sharing.Plainly(run, (3, 8, 8), 4))))
        found = Reached.of([trainer.measure(0.0, 0.0)] * 2)
    assert found.images_per_second > 0 and found.step_mib > 0


# --- a run that does not fit beside others --------------------------------------------------------

HUNGRY = """
import torch
from torch import nn

FAILS, TRIED = [], []


class Hungry(nn.Module):
    def __init__(self, spec):
        super().__init__()
        self.head = nn.Linear(spec.shape[0] * spec.shape[1] * spec.shape[2], spec.classes)
        TRIED.append("hungry")
        self.steps = 0

    def forward(self, x):
        if self.training:
            self.steps += 1
            if self.steps > 60 and FAILS:
                FAILS.pop()
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return self.head(x.flatten(1))


class Modest(Hungry):
    def forward(self, x):
        TRIED[-1] = "modest"
        return self.head(x.flatten(1))
"""
PAIR = """\
models: ["py:hungry:Hungry", "py:hungry:Modest"]
methods: none
seeds: 1
training: {epochs: 3, batch_size: 8}
retries: 0
tensorboard: false
"""


class Emulated:
    """Two runs share a GPU, carried out here one after the other."""

    capacity = Capacity("", 2, 1.0, 0.5, 1)
    limit = Limit()
    carry_out = sweeping.carry_out_here

    def __init__(self, options: Options) -> None:
        self._options = replace(options, device="cpu")


@pytest.fixture
def hungry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A network that lacks memory in its third epoch; a study of it stands in the folder."""
    sweeping.prepare(tmp_path)
    (tmp_path / "hungry.py").write_text(HUNGRY)
    sweeping.study(tmp_path, PAIR, "pair.yaml")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "hungry", raising=False)
    monkeypatch.setattr(firstlook, "look", lambda *_, **__: None)
    monkeypatch.setattr(executors.Where, "opened", lambda *given: nullcontext(Emulated(given[3])))
    made = importlib.import_module("hungry")
    yield made
    sys.modules.pop("hungry", None)


@pytest.mark.parametrize("lacks", [1, 9])
def test_a_run_that_does_not_fit_beside_others_is_tried_again_alone(
    lacks: int, hungry: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once the others are done, from its checkpoint; alone it fails for good."""
    hungry.FAILS.extend([None] * lacks)
    hungry.TRIED.clear()
    code = main.run(["sweep", "pair.yaml", "--executor", "local", "--out", "out"])
    out, told = tmp_path / "out", capsys.readouterr().err
    states = sweeping.statuses(out)
    assert states.pop("py:hungry:Modest none 0") == "done"
    assert list(states.values()) == ["done" if lacks == 1 else "failed"]
    assert code == (0 if lacks == 1 else 1)
    assert told.count("retrying alone after: OutOfMemoryError: CUDA out of memory. Tried") == 1
    assert hungry.TRIED[-3:] == ["hungry", "modest", "hungry"]
    kept = [json.loads((each / "result.json").read_text()) for each in runs.folders(out)]
    if lacks == 1:
        assert sorted(each["resumed"] for each in kept) == [0, 1]
        assert not list(out.rglob("failures.jsonl"))
    else:
        (failed,) = [each for each in kept if each["status"] == "failed"]
        assert failed["reason"].startswith("OutOfMemoryError: CUDA out of memory")


def test_nothing_is_begun_beside_a_run_that_must_be_alone(
    hungry: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached = []

    def carry_out(self: Any, round_: Any, ledger: Any, study: Any) -> Any:
        driver = Driver(round_, ledger, study, self.capacity, lambda: False, Limit())
        first, second = driver.offer("first"), driver.offer("second")
        assert first and second and first["shares"] and second["shares"]
        driver.started("first")
        driver.reported("first", {"no_memory": "OutOfMemoryError"})
        driver.ended("first")
        assert driver.offer("third") is None and not driver.over, "the second is at work"
        driver.started("second")
        driver.ended("second", "it died")
        third = driver.offer("third")
        assert third and third["job"] == first["job"] and not third["shares"]
        driver.started("third")
        driver.ended("third", "it died")
        assert driver.over
        driver.display.close()
        reached.append(True)
        return driver.outcomes

    monkeypatch.setattr(Emulated, "carry_out", carry_out)
    main.run(["sweep", "pair.yaml", "--executor", "local", "--out", "out"])
    assert reached


def test_idle_workers_end_before_a_run_that_must_be_alone(tmp_path: Path) -> None:
    there = local.Processes(Emulated.capacity, tmp_path, Options(), Limit())
    pairs = [multiprocessing.Pipe() for _ in range(2)]
    processes: list[Any] = [mock.Mock() for _ in pairs]
    there._workers = [
        local._Worker(process, pair[0], place)
        for place, (process, pair) in enumerate(zip(processes, pairs, strict=True))
    ]
    driver = mock.Mock()
    driver.offer.side_effect = [
        {"job": 0, "runs": ["x"], "again": [], "shares": False},
        None,
    ]
    driver.jobs = ["job"]
    there._give(driver)
    assert [each.job for each in there._workers] == ["0"]
    assert pairs[0][1].recv() == ("job", ["x"], [], False)
    processes[1].join.assert_called()
    with pytest.raises(EOFError):
        pairs[1][1].recv()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_what_says_that_memory_is_short(error: RuntimeError, expected: bool) -> None:
    assert out_of_memory(error) is expected
    try:
        raise ValueError("a method of one's own") from error
    except ValueError as caught:
        assert out_of_memory(caught) is expected


# --- MPS ------------------------------------------------------------------------------------------

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
    log, folder = control(tmp_path, monkeypatch), tmp_path
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
    monkeypatch.setattr("signal.signal", lambda *_: None)
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
