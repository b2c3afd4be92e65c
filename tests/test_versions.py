"""Which runs are outdated, and that reports and plans leave them out."""

import os
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import augbench
from analysis import records, versions
from benchmarks.cli.main import run as cli
from tests.made import make_run

OLD = {"trainer": 1, "model": 1, "mine.Mine": 111}
NEW = {"trainer": 1, "model": 1, "mine.Mine": 222}
NEWER = {"trainer": 1, "model": 1, "mine.Mine": 333}
MINE = "py:mine:Mine"


def at(hour: int) -> dict[str, str]:
    return {"finished": f"2026-10-01T{hour:02}:00:00+0000"}


def kept(root: Path, keep_all: bool = False) -> list[tuple[str, int, int]]:
    """Row, seed and version of the runs that are left, ended or not."""
    found, unread, _ = versions.newest(*records.scan(root), keep_all)
    cells = [each.run for each in (*found, *unread) if each.run is not None]
    return sorted((run.row, run.seed, run.versions.get("mine.Mine", 0)) for run in cells)


def begun(folder: Path) -> None:
    (folder / "result.json").unlink()


def test_the_version_of_the_run_that_ended_last_is_the_newest(tmp_path: Path) -> None:
    """By the time in the result: a copy of a folder has another one on disk."""
    for seed in range(3):
        make_run(tmp_path, "none", seed, result=at(1))
        make_run(tmp_path, MINE, seed, versions=NEW, result=at(2 + seed))
        late = make_run(tmp_path, MINE, seed + 1, versions=OLD, result=at(1 + seed))
        os.utime(late / "result.json", (2e9, 2e9))
    none = [("none", seed, 0) for seed in range(3)]
    assert kept(tmp_path) == [*none, *((MINE, seed, 222) for seed in range(3))]
    assert len(kept(tmp_path, keep_all=True)) == 9
    # Going back to the older code and making one run more makes it the newest again.
    make_run(tmp_path, MINE, 9, versions=OLD, result=at(9))
    assert kept(tmp_path) == [*none, *((MINE, seed, 111) for seed in (1, 2, 3, 9))]
    note = versions.newest(*records.scan(tmp_path)).note
    assert note == (f"Runs of older versions are left out: {MINE} (3). --all-versions shows them.")


def test_runs_without_a_time_go_by_their_files(tmp_path: Path) -> None:
    for hour, code in ((3, OLD), (2, NEW)):
        folder = make_run(tmp_path, MINE, versions=code)
        os.utime(folder / "result.json", (hour, hour))
    assert kept(tmp_path) == [(MINE, 0, 111)]


def test_failed_runs_count_as_the_tables_of_compare_show_them(tmp_path: Path) -> None:
    make_run(tmp_path, MINE, versions=OLD)
    failed = make_run(tmp_path, MINE, versions=NEW, status="failed", reason="so")
    os.utime(failed / "result.json", (4e9, 4e9))
    assert kept(tmp_path) == [(MINE, 0, 222)]


@pytest.mark.parametrize(
    "other",
    [
        {"benchmark": "digits(noise=0.4)"},
        {"data": "another"},
        {"model": "resnet18"},
        {"control": "train"},
        {"protocol": "paper"},
        {"meta_fraction": 0.3},
        {"epochs": 4},
        {"threads": 2},
        {"oracle_test": True},
    ],
    ids=str,
)
def test_only_runs_of_the_same_row_and_setting_are_replaced(
    other: dict[str, Any], tmp_path: Path
) -> None:
    make_run(tmp_path, MINE, versions=OLD, result=at(1))
    make_run(tmp_path, MINE, versions=NEW, result=at(2), **other)
    assert len(kept(tmp_path)) == 2


def test_runs_that_have_not_ended(tmp_path: Path) -> None:
    """What was begun with newer code replaces nothing before one of its runs has ended."""
    for seed in range(3):
        make_run(tmp_path, MINE, seed, versions=OLD, result=at(1))
    given_up = make_run(tmp_path, MINE, 3, versions=OLD)
    going_on = make_run(tmp_path, MINE, 0, versions=NEW)
    for folder, when in ((given_up, 1.0), (going_on, 4e9)):
        begun(folder)
        os.utime(folder / "run.json", (when, when))
    old = [(MINE, seed, 111) for seed in range(4)]
    assert kept(tmp_path) == sorted([*old, (MINE, 0, 222)])
    make_run(tmp_path, MINE, 1, versions=NEW, result=at(2))
    assert kept(tmp_path) == [(MINE, 0, 222), (MINE, 1, 222)]
    later = make_run(tmp_path, MINE, 5, versions=NEWER)
    begun(later)
    os.utime(later / "run.json", (4e9, 4e9))
    assert kept(tmp_path)[-1] == (MINE, 5, 333)


def test_where_none_has_ended_the_last_that_was_begun_is_the_newest(tmp_path: Path) -> None:
    for when, code in ((2.0, NEW), (1.0, OLD)):
        folder = make_run(tmp_path, MINE, versions=code)
        begun(folder)
        os.utime(folder / "run.json", (when, when))
    assert kept(tmp_path) == [(MINE, 0, 222)]


def test_an_equal_budget_has_the_version_of_the_method_whose_budget_it_is(tmp_path: Path) -> None:
    for hour, code, epochs in ((1, OLD, 7), (2, NEW, 9)):
        of = make_run(tmp_path, MINE, versions=code, result=at(hour)).name
        beside: dict[str, Any] = {"recorded": {"of": of}, "result": at(hour)}
        make_run(tmp_path, "none", epochs=epochs, budget=f"passes of {MINE}", **beside)
    found, _, _ = versions.newest(*records.scan(tmp_path))
    assert sorted((each.run.row, each.run.training.epochs) for each in found) == [
        (f"none [passes of {MINE}]", 9),
        (MINE, 3),
    ]


def test_report_and_plan_show_the_newest_unless_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = tmp_path / "runs", tmp_path / "report"
    for seed in range(4):
        make_run(root, "none", seed, result=at(1))
        make_run(root, "mixup", seed, versions=OLD, result=at(2))
        make_run(root, "mixup", seed, versions=NEW, result=at(3))
    make_run(root, "mixup", 4, versions=OLD, status="failed", reason="an old failure")
    failed = root.glob("*/result.json")
    os.utime(next(path for path in failed if "an old failure" in path.read_text()), (1, 1))
    page = out / "report.md"
    command = ["report", str(root), "--out", str(out), "--format", "md"]
    assert cli(command) == 0
    told = page.read_text().replace("\\", "")
    assert "Runs of older versions are left out: mixup (5). --all-versions shows them." in told
    assert "8 runs: 8 done." in told
    assert "{version" not in told and "an old failure" not in told
    assert len(set(pd.read_parquet(out / "records.parquet")["id"])) == 8
    assert cli([*command, "--all-versions"]) == 0
    told = page.read_text().replace("\\", "")
    assert "mixup {version of mine.Mine 111}" in told and "an old failure" in told
    assert "13 runs: 12 done, 1 failed." in told and "left out: mixup" not in told
    assert f"augbench report {root} --out {out} --all-versions" in told
    capsys.readouterr()
    assert cli(["plan", str(root)]) == 0
    shown = capsys.readouterr().out
    assert "older versions are left out: mixup (5)" in shown and "{version" not in shown
    assert cli(["plan", str(root), "--all-versions"]) == 0
    shown = capsys.readouterr().out
    assert "{version of mine.Mine 111}" in shown and "older versions" not in shown


def test_data_frames_hold_the_newest_unless_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for hour, code in ((1, OLD), (2, NEW)):
        make_run(tmp_path / str(hour), MINE, versions=code, result=at(hour))
    folders = (tmp_path / "1", tmp_path / "2")
    (code,) = augbench.records(*folders, each="run")["code"]
    assert "222" in code
    told = f"Runs of older versions are left out: {MINE} (1). all_versions=True shows them.\n"
    assert capsys.readouterr().err == told
    assert len(augbench.records(*folders, each="run", all_versions=True)) == 2
    assert capsys.readouterr().err == ""
