"""``augbench runs``: what it lists, chooses and deletes."""

import contextlib
import csv
import io
import json
import os
import shutil
import threading
from pathlib import Path

import pytest

from analysis import inventory, records, runs
from benchmarks.cli.main import run as cli
from benchmarks.running.codes import FAILURE, INTERRUPTED, USAGE
from benchmarks.studies.ledger import unfinished
from methods.naming import NamingError
from tests.made import make_run

MINE = "py:mine:Mine"
SAFLEX = "saflex(preset=stable, upstream=randaugment)"
BUDGET = f"passes of {SAFLEX}"
VERSIONS = {"trainer": 1, "model": 1}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with a run of every state but running, with what is no run beside them."""
    root = tmp_path / "runs"
    for seed in (0, 1, 2, 5):
        make_run(root, "none", seed)
    make_run(root, SAFLEX, status="failed", reason="no\nmemory")
    make_run(root, "none", budget=BUDGET, status="skipped", reason="so")
    make_run(root, "none", 7, epochs=9, status="stopped", recorded={"searched": {"x": 0.2}})
    make_run(root, "mixup", model="resnet18", benchmark="npz", recorded={"path": "/a/scans.npz"})
    for hour, code in enumerate((1, 2)):
        time = {"finished": f"2026-10-01T0{hour}:00:00+0000"}
        make_run(root, MINE, versions={**VERSIONS, "Mine": code}, result=time)
    (make_run(root, "crop", 1, epochs=2) / "result.json").unlink()
    make_run(root, "crop", 2, epochs=4)
    (make_run(root, "flip") / "predictions.npz").write_text("cut short")
    shutil.copytree(make_run(root, "cutmix"), root / "backup")
    for name in ("0123456789abcdef", "notes"):
        (root / name).mkdir()
        (root / name / "run.json").write_text("{}")
    (root / "report").mkdir()
    (root / "report" / "report.html").write_text("a page")
    (root / "study.yaml").write_text("question: which\n")
    return root


def listed(
    capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, list[dict[str, str]]]:
    """The lines of the CSV by the names of their columns, with the exit code."""
    capsys.readouterr()
    code = cli(["runs", *map(str, arguments), "--format", "csv"])
    return code, list(csv.DictReader(io.StringIO(capsys.readouterr().out)))


def chosen(root: Path, *where: str) -> list[str]:
    """Row and seed of the runs that are meant."""
    found = inventory.choice(where).of(inventory.items(root))
    return sorted(f"{each.field('row')} {each.field('seed')}" for each in found)


def answer(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """A terminal at which somebody types this."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdin", Terminal(text))


def folder_of(root: Path, *where: str) -> Path:
    """The only run that is meant."""
    (one,) = inventory.choice(where).of(inventory.items(root))
    return one.folder


def test_a_line_for_runs_that_differ_in_seed_alone(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with runs.locked(folder_of(root, "row=crop,seed=2")):
        code, lines = listed(capsys, root)
    assert code == 0
    columns = ("benchmark", "row", "setting", "state", "version", "runs", "seeds")
    budget = f"none [{BUDGET}]"
    assert [tuple(line[name] for name in columns) for line in lines] == [
        ("?", "?", "", "unreadable", "newest", "2", ""),
        ("digits", "(trials of a search)", "", "stopped", "newest", "1", "7"),
        ("digits", "crop", "epochs 2", "interrupted", "newest", "1", "1"),
        ("digits", "crop", "epochs 4", "running", "newest", "1", "2"),
        ("digits", "cutmix", "", "copy", "newest", "1", "0"),
        ("digits", "cutmix", "", "done", "newest", "1", "0"),
        ("digits", "flip", "", "unreadable", "newest", "1", "0"),
        ("digits", "none", "", "done", "newest", "4", "0-2, 5"),
        ("digits", budget, "", "skipped", "newest", "1", "0"),
        ("digits", MINE, "", "done", "newest", "1", "0"),
        ("digits", MINE, "", "done", "outdated", "1", "0"),
        ("digits", SAFLEX, "", "failed", "newest", "1", "0"),
        ("npz:scans.npz", "mixup", "", "done", "newest", "1", "0"),
    ]
    none = [
        path for path in root.glob("*/*") if path.parent.name in _ids(root, "row=none,state=done")
    ]
    assert lines[7]["size"] == str(sum(path.stat().st_size for path in none))


def _ids(root: Path, *where: str) -> set[str]:
    return {each.id for each in inventory.choice(where).of(inventory.items(root))}


def test_a_line_for_each_run_in_every_format(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, lines = listed(capsys, root, "--each")
    assert len(lines) == 17
    assert {line["id"] for line in lines} == {path.parent.name for path in root.glob("*/run.json")}
    (failed,) = [line for line in lines if line["state"] == "failed"]
    assert (failed["row"], failed["reason"]) == (SAFLEX, "no\nmemory")
    assert cli(["runs", str(root), "--each", "--format", "json"]) == 0
    same = json.loads(capsys.readouterr().out)
    texts = [{k: "" if v is None else str(v) for k, v in line.items()} for line in same]
    assert texts == lines
    assert cli(["runs", str(root), "--each"]) == 0
    shown = capsys.readouterr().out
    assert "no memory" in shown and all(line["id"] in shown for line in lines)
    assert shown.splitlines()[-1].endswith(
        "9 done, 1 failed, 1 skipped, 1 stopped, 1 interrupted, 3 unreadable, 1 copy"
    )


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (["state=failed"], [f"{SAFLEX} 0"]),
        (["row=none"], ["none 0", "none 1", "none 2", "none 5", "none 7"]),
        (["row=none,seed=1,seed=5"], ["none 1", "none 5"]),
        (["row=none", "seed=1", "state=failed"], []),
        (["row=saflex(upstream=randaugment,preset=stable)"], [f"{SAFLEX} 0"]),
        (["row=py:*"], [f"{MINE} 0"] * 2),
        (["row=py:*", "version=outdated"], [f"{MINE} 0"]),
        (["row=none [*]"], [f"none [{BUDGET}] 0"]),
        (["row=?lip,state=unreadable"], ["flip 0"]),
        (["model=resnet*"], ["mixup 0"]),
        (["benchmark=npz:scans.npz"], ["mixup 0"]),
        (["searched=yes"], ["none 7"]),
        (["state=interrupted", "state=stopped"], ["crop 1", "none 7"]),
        (["id=notes"], ["? ?"]),
        (["state=copy"], ["cutmix 0"]),
        (["older=1h"], []),
    ],
    ids=str,
)
def test_where(where: list[str], expected: list[str], root: Path) -> None:
    assert chosen(root, *where) == expected


def test_older_is_the_time_since_the_last_change(root: Path) -> None:
    folder = folder_of(root, "row=none,seed=5")
    for path in folder.iterdir():
        os.utime(path, (0, path.stat().st_mtime - 2 * 3600))
    assert chosen(root, "older=1h") == ["none 5"]
    assert chosen(root, "older=0.5h,older=121m") == []
    (folder / "result.json").touch()
    assert chosen(root, "older=1h") == []


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("stat=failed", "unknown key 'stat'; did you mean 'state'? (known: benchmark, id, model, "),
        ("failed", "unknown key 'failed'"),
        ("state=broken", "unknown state 'broken' (known: copy, done, failed, "),
        ("version=2", "unknown version '2' (known: newest, outdated)"),
        ("row=", "expected row=VALUE, got 'row='"),
        ("row", "expected row=VALUE, got 'row'"),
        ("older=30", "such as 30d (m, h, d, w), got '30'"),
    ],
)
def test_conditions_that_cannot_be(
    where: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(NamingError) as error:
        inventory.choice([where])
    assert message in str(error.value)
    assert cli(["runs", str(tmp_path), "--where", where]) == USAGE
    assert message in capsys.readouterr().err


def test_what_is_said_where_there_is_nothing(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(["runs", str(root), "--where", "benchmark=digit"]) == 0
    assert (
        f"None of the 17 runs in {root} matches: no run has the benchmark digit; did you mean "
        "'digits'? (there are: ?; digits; npz:scans.npz)"
    ) in capsys.readouterr().out
    assert cli(["runs", str(root), "--where", "row=none,seed=0,state=failed"]) == 0
    assert f"None of the 17 runs in {root} matches.\n" == capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    assert cli(["runs", str(tmp_path / "empty")]) == 0
    assert capsys.readouterr().out == f"No runs in {tmp_path / 'empty'}.\n"
    assert cli(["runs", str(tmp_path / "none")]) == USAGE
    assert "expected a results folder, got" in capsys.readouterr().err


def contents(root: Path) -> dict[str, int]:
    return {str(path.relative_to(root)): path.stat().st_size for path in root.rglob("*")}


def test_deletes_what_is_chosen_once_it_is_agreed_to(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["runs", str(root), "--where", "row=none,seed=1,seed=2", "--delete"]
    before, going = contents(root), _ids(root, "row=none,seed=1,seed=2")
    size = sum(each for path, each in before.items() if Path(path).name != path
               and path.split("/")[0] in going)  # fmt: skip
    for text in ("\n", "n\n", "no\n", ""):
        answer(monkeypatch, text)
        assert cli(command) == 0
        shown = capsys.readouterr()
        assert f"Delete 2 runs, {size / 1000:.3g} kB? [y/N] Nothing deleted." in shown.err
        assert "2 runs, " in shown.out
        assert contents(root) == before
    answer(monkeypatch, "y\n")
    assert cli(command) == 0
    assert f"Deleted 2 runs, {size / 1000:.3g} kB." in capsys.readouterr().err
    left = {path: size for path, size in before.items() if path.split("/")[0] not in going}
    assert contents(root) == left and len(left) < len(before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--delete"], "expected --where with the runs"),
        (["--delete", "--yes"], "expected --where with the runs"),
        (["--where", "row=*", "--delete"], "expected a terminal for the confirmation, or --yes"),
        (["--where", "row=*", "--yes"], "yes: expected --delete with it"),
    ],
)
def test_refuses_to_delete(
    arguments: list[str],
    message: str,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    before = contents(root)
    assert cli(["runs", str(root), *arguments]) == USAGE
    assert message in capsys.readouterr().err and contents(root) == before


def test_never_deletes_what_is_in_use_or_may_be_no_run(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "elsewhere").symlink_to(make_run(root.parent / "other", "lpa3"))
    used = folder_of(root, "row=none,seed=5")
    with runs.locked(used):
        assert cli(["runs", str(root), "--where", "id=*", "--delete", "--yes"]) == FAILURE
    told = capsys.readouterr().err
    assert f"not deleted: {used.name}: in use by process {os.getpid()} on " in told
    assert "not deleted: notes: it may not be a run" in told
    assert "not deleted: elsewhere: a symbolic link" in told
    assert "Deleted 15 runs, " in told
    assert sorted(path.name for path in root.iterdir()) == sorted(
        [used.name, "notes", "elsewhere", "report", "study.yaml"]
    )
    assert runs.status_of(used).state == "done" and list((root / "elsewhere").iterdir())
    assert cli(["runs", str(root), "--where", "row=none", "--delete", "--yes"]) == 0
    assert not used.exists()


def test_a_run_that_has_changed_or_holds_folders_is_left(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of(root, "state=failed")
    (folder_of(root, "row=flip") / "mine").mkdir()
    before = contents(root)

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

        def readline(self, *_: object) -> str:
            (folder / "result.json").write_text("{}")  # another process ends the run anew
            return "y\n"

    monkeypatch.setattr("sys.stdin", Terminal())
    where = ["--where", "state=failed,state=unreadable", "--where", "row=saflex*,row=flip"]
    assert cli(["runs", str(root), *where, "--delete"]) == FAILURE
    told = capsys.readouterr().err
    assert f"not deleted: {folder.name}: {folder} has changed in the meantime" in told
    assert "expected only files, got the directory " in told and "Deleted 0 runs, 0 B." in told
    assert contents(root) == {**before, f"{folder.name}/result.json": 2}


@pytest.mark.parametrize("files", range(8))
def test_a_deletion_cut_short_leaves_a_run_that_is_made_or_deleted_again(
    files: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(tmp_path, "none", 1, learned=True)
    (folder / "checkpoint.pt").touch()
    assert len(list(folder.iterdir())) == 8 and runs.status_of(folder).state == "done"
    deleted, unlink = 0, Path.unlink

    def stops(path: Path, missing_ok: bool = False) -> None:
        nonlocal deleted
        if path.name != "lock":
            if deleted == files:
                raise KeyboardInterrupt
            deleted += 1
        unlink(path, missing_ok)

    command = ["runs", str(tmp_path), "--where", "row=none", "--delete", "--yes"]
    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", stops)
        assert cli(command) == INTERRUPTED
    assert "stopped; deleted 0 runs, 0 B of 1 run, " in capsys.readouterr().err
    status = runs.status_of(folder)
    assert (status.state == "done") == (files == 0)
    assert unfinished(status, folder) == (files > 0), "a sweep makes it"
    found, unread = records.scan(tmp_path)
    assert len(found) == (files == 0) and len(unread) == (files > 0)
    assert cli([*command[:3], "row=none,state=interrupted,state=done", *command[4:]]) == 0
    assert list(tmp_path.iterdir()) == []


def test_studies_whose_runs_are_deleted_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trials = [make_run(tmp_path, "mixup", n, recorded={"searched": {"x": n}}) for n in range(3)]
    make_run(tmp_path, "none")
    study = tmp_path / "studies" / "some"
    study.mkdir(parents=True)
    listed = "".join(f"- {each.name}\n" for each in trials[:2])
    (study / "study.yaml").write_text(f"question: which\nruns:\n{listed}")
    (study / "search.json").write_text("[]")
    assert cli(["runs", str(tmp_path), "--where", "searched=yes", "--delete", "--yes"]) == 0
    assert (
        "2 of them belong to the study some: its next sweep runs them again; the result of its "
        f"search stays in {study / 'search.json'}"
    ) in capsys.readouterr().err
    assert (study / "search.json").exists() and len(list(study.iterdir())) == 2
    assert cli(["runs", str(tmp_path), "--where", "row=none", "--delete", "--yes"]) == 0
    assert "belong" not in capsys.readouterr().err


def test_who_waits_for_a_run_that_is_deleted_makes_it_anew(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "none")
    waits, had = threading.Event(), threading.Event()

    def work() -> None:
        with runs.locked(folder, lambda _: waits.set()):
            assert [path.name for path in folder.iterdir()] == ["lock"]
            had.set()

    worker = threading.Thread(target=work)
    with runs.locked(folder):
        worker.start()
        assert waits.wait(30)
        shutil.rmtree(folder)
    worker.join(30)
    assert had.is_set()


def test_a_full_disk_can_be_cleaned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(tmp_path, "none")

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    assert cli(["runs", str(tmp_path), "--where", "row=none", "--delete", "--yes"]) == 0
    assert not folder.exists() and "Deleted 1 run, " in capsys.readouterr().err


def test_only_a_living_process_holds_a_run(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "none")
    assert runs.holder_of(folder) == ""
    (folder / "lock").write_text("process 1 on a machine that was switched off")
    assert runs.holder_of(folder) == ""
    with runs.locked(folder):
        assert runs.holder_of(folder).startswith(f"process {os.getpid()} on ")
    assert runs.holder_of(folder) == "" and not (folder / "lock").exists()


def test_files_that_go_while_they_are_listed_do_not_count(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone, scandir = folder_of(root, "row=none,seed=5"), os.scandir

    def deleting(path: Path) -> object:
        found = list(scandir(path))
        if path == gone:
            (gone / "metrics.jsonl").unlink(missing_ok=True)
        return contextlib.nullcontext(found)

    size = runs.extent_of(gone).size - (gone / "metrics.jsonl").stat().st_size
    monkeypatch.setattr(os, "scandir", deleting)
    assert runs.extent_of(gone).size == size
    assert runs.extent_of(root / "deleted") == (0, 0.0)


def test_a_reader_that_has_gone_is_no_error(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object, **__: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", gone)
    with pytest.raises(BrokenPipeError):
        cli(["runs", str(root)])
