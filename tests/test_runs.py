"""Runs on disk: ids, status, atomic files, locks."""

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import time
from dataclasses import asdict, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import IO, Any

import pytest

from analysis import runs
from analysis.runs import (
    Held,
    Run,
    Status,
    Training,
)

RUN = Run(benchmark="digits", data="abc", model="small_cnn", method="none")


def finish(folder: Path, **files: bytes) -> None:
    """A run directory as the trainer leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text("{}")
    for name, content in files.items():
        (folder / name).write_bytes(content)
    sizes = {name: len(content) for name, content in files.items()}
    result = {"status": "done", "files": sizes, "metrics": {"auc": float("nan")}}
    runs.write_text(folder / "result.json", runs.to_json(result))


def test_id_is_a_function_of_every_field() -> None:
    changes = {
        "benchmark": "digits(noise=0.4)",
        "data": "abd",
        "model": "resnet18",
        "method": "mixup",
        "control": "train",
        "protocol": "paper",
        "meta_fraction": 0.3,
        "crossfit": 5,
        "training": Training(epochs=99),
        "seed": 1,
        "threads": 2,
        "budget": "passes of saflex",
        "oracle_test": True,
        "versions": {"trainer": 2},
    }
    assert set(changes) == set(runs.field_names(Run))
    ids = {replace(RUN, **{name: value}).id for name, value in changes.items()}  # type: ignore[arg-type]
    assert len(ids | {RUN.id}) == len(changes) + 1


def test_id_is_stable() -> None:
    """A change here means that all results of all users are computed anew: raise VERSION then."""
    assert RUN.id == "7fd381d9284dcd0f"


def test_run_json_round_trip(tmp_path: Path) -> None:
    run = replace(RUN, training=replace(Training(), milestones=(0.3, 0.6), optimizer="sgd"))
    text = {"run": json.loads(json.dumps(asdict(run))), "recorded": {"path": "x"}}
    (tmp_path / "run.json").write_text(json.dumps(text))
    read, recorded = runs.read_run(tmp_path)
    assert read == run and read.id == run.id and recorded == {"path": "x"}


def test_unknown_field_in_run_json_is_refused(tmp_path: Path) -> None:
    cell = {**json.loads(json.dumps(asdict(RUN))), "later": 1}
    (tmp_path / "run.json").write_text(json.dumps({"run": cell, "recorded": {}}))
    with pytest.raises((ValueError, TypeError), match="later"):
        runs.read_run(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("batch_size", 1),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
        ("weight_decay", -1.0),
        ("momentum", 1.0),
        ("milestones", (0.5, 1.5)),
        ("warmup_epochs", 100),
        ("optimizer", "adma"),
        ("epochs", "many"),
    ],
)
def test_training_refuses_what_cannot_be(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        Training(**{field: value})  # type: ignore[arg-type]


def test_status(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert runs.status_of(folder) == Status("new")
    folder.mkdir()
    (folder / "checkpoint.pt").write_bytes(b"x")
    assert runs.status_of(folder) == Status("interrupted")
    finish(folder, **{"metrics.jsonl": b"{}\n"})
    assert runs.status_of(folder) == Status("done")


@pytest.mark.parametrize("cut", ["metrics.jsonl", "predictions.npz", "result.json", "run.json"])
@pytest.mark.parametrize("how", ["shorter", "gone"])
def test_what_was_cut_short_is_not_done(tmp_path: Path, cut: str, how: str) -> None:
    finish(tmp_path, **{"metrics.jsonl": b'{"epoch": 1}\n', "predictions.npz": b"PK-----"})
    path = tmp_path / cut
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-3])
    assert runs.read_result(tmp_path) is None
    assert runs.status_of(tmp_path).state != "done"


def test_json_has_no_nan_and_reads_back_as_nan() -> None:
    text = runs.to_json({"a": [1.5, float("nan")], "b": {"c": float("inf")}, "d": 0.1})
    assert json.loads(text) == {"a": [1.5, None], "b": {"c": None}, "d": 0.1}
    back = runs.with_nan(json.loads(text))
    assert back["a"][1] != back["a"][1] and back["d"] == 0.1


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    runs.write_text(path, "old")

    def full(file: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        runs.write_atomically(path, full)
    assert path.read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["result.json"]


def _hold(folder: Path, ready: object, seconds: float) -> None:
    with runs.locked(folder):
        ready.set()  # type: ignore[attr-defined]
        time.sleep(seconds)


def test_a_file_that_two_processes_write_at_once_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"

    def write(file: IO[bytes]) -> None:
        file.write(b"one")
        runs.write_text(path, "the other", shared=True)

    runs.write_atomically(path, write, shared=True)
    assert path.read_bytes() == b"one" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_where_files_cannot_be_locked_runs_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    assert runs.locks_hold(tmp_path)

    def refuse(file: Any, how: int) -> None:
        raise OSError(code, "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert not runs.locks_hold(tmp_path) and not list(tmp_path.iterdir())
    with runs.locked(tmp_path):
        assert runs.holder_of(tmp_path) == ""
    code = errno.EIO
    with pytest.raises(OSError, match="no locks"), runs.locked(tmp_path):
        pass


def holder_of(folder: Path, seconds: float) -> BaseProcess:
    """Another process that holds the folder's lock."""
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    holder = context.Process(target=_hold, args=(folder, ready, seconds))
    holder.start()
    assert ready.wait(30)
    return holder


def test_one_works_the_other_says_who_or_waits(tmp_path: Path) -> None:
    holder = holder_of(tmp_path, 1.0)
    with pytest.raises(Held, match=f"held by process {holder.pid} on "), runs.locked(tmp_path):
        pass
    told: list[str] = []
    with runs.locked(tmp_path, told.append):
        assert told and f"process {holder.pid}" in told[0]
    holder.join()
    assert not (tmp_path / "lock").exists()


def test_a_lock_is_of_the_file_that_is_there_now(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with path.open("w") as file:
        assert runs.is_at(file, path)
        path.unlink()
        assert not runs.is_at(file, path)
        path.touch()
        assert not runs.is_at(file, path), "another file of the same name"


def test_the_lock_of_a_dead_process_is_free(tmp_path: Path) -> None:
    holder = holder_of(tmp_path, 60.0)
    assert holder.pid is not None
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    assert (tmp_path / "lock").exists(), "the file stays, the lock does not"
    with runs.locked(tmp_path):
        pass
    assert not (tmp_path / "lock").exists()
