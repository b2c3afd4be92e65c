"""Shares of a study for machines that share no folder."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import methods
from analysis import runs
from benchmarks.cli import main
from benchmarks.running import local
from benchmarks.studies import loading, rounds
from benchmarks.studies.plan import Plan, chosen
from benchmarks.studies.rounds import Work
from benchmarks.studies.shards import Shard
from tests import sweeping

STUDY = """\
models: small_cnn(width=0.25)
methods: [none, flip]
seeds: 2
training: {epochs: 1}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sweeping.prepare(tmp_path_factory.mktemp("shards"))


@pytest.mark.parametrize("rows", ["none, flip", "none, flip, crop, mixup"])
@pytest.mark.parametrize("seeds", [1, 4, 9])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_every_run_is_in_one_shard_and_every_row_in_all(
    rows: str, seeds: int, count: int, place: Path, tmp_path: Path
) -> None:
    text = f"models: small_cnn(width=0.25)\nmethods: [{rows}]\nseeds: {seeds}\n"
    study = loading.load(sweeping.study(place, text, "some.yaml"))
    plan = Plan(study, place)
    shards = [Shard(number, count) for number in range(1, count + 1)]
    found = [Work(plan, tmp_path, chosen(""), each).cells() for each in shards]
    ids = [cell.run.id for cells in found for cell in cells]
    assert Counter(ids) == Counter(cell.run.id for cell in Work(plan, tmp_path, chosen("")).cells())
    for cells in found:
        of_row = Counter(cell.run.row for cell in cells)
        if seeds >= count:
            assert len(of_row) == len(rows.split(", "))
            assert max(of_row.values()) - min(of_row.values()) <= 1
    if seeds % count == 0:
        assert len({len(cells) for cells in found}) == 1


def test_two_machines_do_a_share_each_and_one_folder_has_all_of_it(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = sweeping.study(place, STUDY + "tensorboard: false\n", "shared.yaml")
    given = ["sweep", str(path), "--executor", "local", "--workers", "1", "--out"]
    monkeypatch.setattr(local.Processes, "carry_out", sweeping.carry_out_here)
    done, folders = [], [tmp_path / "one", tmp_path / "two"]
    for number, out in enumerate(folders, start=1):
        more = ["--shard", f"{number}/2"]
        assert main.run([*given, str(out), *more, "--dry-run"]) == 0
        assert "2 runs: 2 new; 2 to do" in capsys.readouterr().out
        assert main.run([*given, str(out), *more]) == 0
        shown = capsys.readouterr().out
        assert f"Shard {number} of 2: 2 runs. To combine the shards, pack" in shown
        assert "Model" not in shown, "no table"
        done.append({folder.name for folder in runs.folders(out)})
        assert main.run(["pack", str(out), f"{out}.tar.zst"]) == 0
    assert len(done[0]) == len(done[1]) == 2 and not done[0] & done[1]
    for out in folders:
        assert main.run(["unpack", f"{out}.tar.zst", "--into", str(tmp_path / "all")]) == 0

    def never(*_: Any) -> None:
        raise AssertionError("a run was started")

    monkeypatch.setattr(local.Processes, "carry_out", never)
    capsys.readouterr()
    assert main.run([*given, str(tmp_path / "all")]) == 0
    shown = capsys.readouterr()
    assert "4 done" in shown.err and "Model      small_cnn(width=0.25)" in shown.out


@pytest.mark.parametrize("text", ["0/8", "9/8", "3", "3/", "-1/8", "a/b", "1/0", "1.5/2"])
def test_a_shard_that_there_is_not(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["compare", "--out", str(tmp_path / "runs"), f"--shard={text}"]
    assert main.run(given) == 2
    assert f"shard: expected I/N with I from 1 to N, such as 3/8, got '{text}'" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("tune: {trials: 2, seeds: 2}\n", "shard: expected a study without tune"),
        ("same: passes\n", "shard: expected a study without equal-budget rows (same)"),
    ],
)
def test_a_study_whose_runs_depend_on_others_has_no_shards(
    more: str,
    said: str,
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rounds, "check_search", lambda *_, **__: None)  # its data are too few
    text = STUDY if more.startswith("same") else STUDY.replace("seeds: 2\n", "")
    path = sweeping.study(place, text + more, "later.yaml")
    given = ["sweep", str(path), "--out", str(tmp_path / "runs"), "--shard", "1/2"]
    assert main.run(given) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_a_row_that_only_other_machines_have_is_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machines would not agree which run belongs to whom."""
    entry = methods.Entry("no_such_module:Method", "plug-in")
    monkeypatch.setitem(methods.registry(), "absent", entry)
    given = ["compare", "--benchmark", f"npz:{place / 'small.npz'}", "--methods", "none,absent"]
    assert main.run([*given, "--out", str(tmp_path / "runs"), "--shard", "1/2"]) == 2
    assert "shard: expected rows that are available on every machine, absent is not on this" in (
        capsys.readouterr().err
    )


def test_a_shard_of_a_comparison_has_no_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["compare", "--shard", "1/2", "--figure", str(tmp_path / "a.png")]
    assert main.run([*given, "--out", str(tmp_path / "runs")]) == 2
    assert "figure: expected no --shard" in capsys.readouterr().err
