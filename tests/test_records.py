"""Run directories read back: into records, into one long frame, and in time."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis import records, runs
from tests.made import make_run


def test_every_run_is_in_the_frame_with_its_metrics_or_its_reason(tmp_path: Path) -> None:
    done = make_run(tmp_path, "none", selected=True)
    make_run(tmp_path, "mixup", status="failed", reason="loss is nan at epoch 1")
    make_run(tmp_path, "crop", status="skipped", reason="no <meta> rows")
    found, unread = records.scan(tmp_path)
    frame = records.frame(found)
    assert not unread and set(frame["status"]) == {"done", "failed", "skipped"}
    (place,) = np.flatnonzero(frame["row"] == "mixup")
    failed = frame.iloc[int(place)]
    assert failed["reason"] == "loss is nan at epoch 1" and np.isnan(failed["value"])
    own = frame[frame["id"] == done.name].set_index(["when", "split", "metric", "class"])["value"]
    stored = json.loads((done / "result.json").read_text())["metrics"]
    for when in ("last", "selected"):
        for split in ("select", "test"):
            for name, value in stored[when][split].items():
                values = value if isinstance(value, list) else [value]
                first = 0 if isinstance(value, list) else -1
                got = [own[when, split, name, first + k] for k in range(len(values))]
                assert got == values, (when, split, name)
    assert len(own) == sum(
        len(v) if isinstance(v, list) else 1 for w in stored.values() for s in w.values()
        for v in s.values()
    )  # fmt: skip


def test_the_frame_comes_back_from_parquet(tmp_path: Path) -> None:
    for seed in range(3):
        make_run(tmp_path, "mixup(alpha=0.2)", seed)
    frame = records.frame(records.scan(tmp_path)[0])
    frame.to_parquet(tmp_path / "records.parquet")
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "records.parquet"), frame)


def test_recomputed_metrics_come_from_the_logits(tmp_path: Path) -> None:
    folder = make_run(tmp_path, selected=True)
    (one,), _ = records.scan(tmp_path)
    changed = json.loads((folder / "result.json").read_text())
    right = changed["metrics"]["last"]["test"]["accuracy"]
    changed["metrics"]["last"]["test"]["accuracy"] = 0.123
    (folder / "result.json").write_text(json.dumps(changed))
    (other,), _ = records.scan(tmp_path)
    assert other.metric("accuracy") == 0.123
    again = records.recomputed(other)
    assert again.metric("accuracy") == right == one.metric("accuracy")
    assert again.result["metrics"] == runs.with_nan(one.result["metrics"])
    failed = records.Record(one.run, {}, {"status": "failed"}, folder)
    assert records.recomputed(failed) is failed


def test_what_cannot_be_read_is_listed_with_its_reason(tmp_path: Path) -> None:
    running = make_run(tmp_path, "none")
    (running / "result.json").unlink()
    lines = (running / "metrics.jsonl").read_text().splitlines(keepends=True)
    (running / "metrics.jsonl").write_text("".join(lines[:2]) + lines[2][:20])
    cut = make_run(tmp_path, "crop")
    (cut / "predictions.npz").write_bytes(b"")
    strange = make_run(tmp_path, "mixup")
    cell = json.loads((strange / "run.json").read_text())
    cell["run"]["a_field_of_tomorrow"] = 1
    (strange / "run.json").write_text(json.dumps(cell))
    broken = make_run(tmp_path, "cutmix")
    (broken / "run.json").write_text("{")
    kept = make_run(tmp_path, "flip")
    found, unread = records.scan(tmp_path)
    assert [record.folder for record in found] == [kept]
    reasons = {each.folder: each.reason for each in unread}
    assert reasons[running] == "unfinished (2 of 3 epochs)"
    assert all("is incomplete" in reasons[each] for each in (cut, broken))
    assert "not a run of this version" in reasons[strange]
    cells = {each.folder: each.run and each.run.row for each in unread}
    assert cells == {running: "none", cut: "crop", strange: None, broken: None}


@pytest.mark.parametrize(
    ("change", "missing"),
    [
        (lambda result: result.pop("status"), "status"),
        (lambda result: result.update(status="finished"), "status"),
        (lambda result: result.pop("cost"), "cost.epochs"),
        (lambda result: result["cost"].pop("passes_per_row"), "cost.passes_per_row"),
        (lambda result: result.update(metrics=[]), "metrics.last.test.accuracy"),
        (lambda result: result["data"].pop("rows"), "data.rows.select"),
    ],
)
def test_a_result_of_another_form_is_listed_with_what_it_lacks(
    change: Callable[[dict], object], missing: str, tmp_path: Path
) -> None:
    kept = make_run(tmp_path, "none")
    strange = make_run(tmp_path, "mixup")
    result = json.loads((strange / "result.json").read_text())
    change(result)
    (strange / "result.json").write_text(json.dumps(result))
    found, unread = records.scan(tmp_path)
    assert [record.folder for record in found] == [kept]
    (one,) = unread
    assert one.folder == strange and f"({missing} is missing)" in one.reason


def test_a_run_counts_once_however_often_its_folder_was_copied(tmp_path: Path) -> None:
    first, second = (make_run(tmp_path, "none", seed) for seed in (0, 1))
    shutil.copytree(first, tmp_path / f"0 {first.name} (copy)")  # sorted before its original
    shutil.copytree(second, tmp_path / f"{second.name}-backup")
    cut = shutil.copytree(second, tmp_path / f"{second.name}-running")
    (cut / "result.json").unlink()
    found, unread = records.scan(tmp_path)
    assert {record.folder for record in found} == {first, second}
    assert {each.folder.name: each.reason for each in unread} == {
        f"0 {first.name} (copy)": f"a copy of {first.name}",
        f"{second.name}-backup": f"a copy of {second.name}",
        f"{second.name}-running": f"a copy of {second.name}",
    }


def test_a_run_whose_folder_was_renamed_counts_once(tmp_path: Path) -> None:
    renamed = make_run(tmp_path, "none").rename(tmp_path / "the best run")
    shutil.copytree(renamed, tmp_path / "the best run again")
    found, unread = records.scan(tmp_path)
    assert [record.folder for record in found] == [renamed]
    assert [each.reason for each in unread] == ["a copy of the best run"]


def test_damaged_predictions_are_told_with_their_file(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    path = folder / "predictions.npz"
    path.write_bytes(bytes(path.stat().st_size))
    ((one,), _) = records.scan(tmp_path)
    with pytest.raises(OSError, match=r"predictions\.npz cannot be read .*; repeat the run"):
        _ = one.predictions


def test_predictions_can_be_let_go(tmp_path: Path) -> None:
    make_run(tmp_path)
    (one,), _ = records.scan(tmp_path)
    first = one.predictions
    assert one.predictions is first
    one.forget()
    assert one.predictions is not first
    assert all(np.array_equal(one.predictions[name], first[name]) for name in first)


@pytest.mark.slow
def test_ten_thousand_runs_are_read_in_20_seconds_and_a_gigabyte(tmp_path: Path) -> None:
    one = make_run(tmp_path / "one")
    cell = (one / "run.json").read_text()
    for number in range(10_000):
        folder = tmp_path / "many" / f"{number:016x}"
        folder.mkdir(parents=True)
        for path in one.iterdir():
            if path.name != "run.json":
                (folder / path.name).hardlink_to(path)
        own = cell.replace('"seed": 0', f'"seed": {number}')
        (folder / "run.json").write_text(own)
    code = (
        "import resource, sys, time; from pathlib import Path; start = time.process_time();"
        "from analysis import records;"
        "found, _ = records.scan(Path(sys.argv[1])); frame = records.frame(found);"
        "frame.to_parquet(sys.argv[2]);"
        "print(len(found), frame['seed'].nunique(), time.process_time() - start,"
        " resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
    )
    out = tmp_path / "records.parquet"
    shown = subprocess.check_output([sys.executable, "-c", code, tmp_path / "many", out], text=True)
    count, seeds, seconds, mebibytes = map(float, shown.split())
    assert count == seeds == 10_000
    assert seconds < 20 and mebibytes < 1024, shown
