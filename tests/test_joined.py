"""Runs of several folders, packs and records files in one report, table or comparison."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis import blocks, comparison, joined, packing, records, recordsfile, runs
from analysis.differences import Difference, RowRuns, difference
from analysis.joined import Source
from analysis.report.page import Options, report
from benchmarks.cli.main import run as main
from tests.made import declared, make_run

SAFLEX = "saflex(upstream=mixup)"
SEEDS = range(4)


def folder(root: Path, *methods: str, device: str = "cpu", **changes: Any) -> Path:
    """A results folder with some seeds of these methods."""
    for place, method in enumerate(methods):
        for seed in SEEDS:
            made = declared(method)
            make_run(root, method, seed, 0.5 + place, device=device, recorded=made, **changes)
    return root


def rewrite(run: Path, **changes: np.ndarray) -> None:
    """Change arrays of a run's predictions, as if it had written them."""
    arrays = runs.read_arrays(run / "predictions.npz") | changes
    np.savez(run / "predictions.npz", **arrays)  # type: ignore[arg-type]
    result = json.loads((run / "result.json").read_text())
    result["files"]["predictions.npz"] = (run / "predictions.npz").stat().st_size
    (run / "result.json").write_text(json.dumps(result))


def packed(root: Path, out: Path) -> Path:
    packing.pack(packing.members(root, list(runs.folders(root)), ()), out)
    return out


def tables_in(out: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in (out / "tables").rglob("*.csv")}


def test_parts_of_a_folder_give_the_report_of_the_whole(tmp_path: Path) -> None:
    """Half a folder and a pack of the rest: the same tables, and the same verdicts."""
    whole = folder(tmp_path / "whole", "none", "mixup", SAFLEX)
    one, other = tmp_path / "one", tmp_path / "other"
    for place, each in enumerate(runs.folders(whole)):
        shutil.copytree(each, (one, other)[place % 2] / each.name)
    report(Options(whole, tmp_path / "a", ["csv"]))
    rest = packed(other, tmp_path / "rest.tar.zst")
    report(Options(one, tmp_path / "b", ["csv"], others=[rest]))
    report(Options(one, tmp_path / "c", ["csv"], others=[other]))
    report(Options(one, tmp_path / "d", ["csv"], beside=[rest]))
    expected = tables_in(tmp_path / "a")
    assert len(expected) == 5 and SAFLEX in expected["differences.csv"]
    for name in "bcd":
        assert tables_in(tmp_path / name) == expected, name


def test_a_records_file_pairs_accuracy_by_image(tmp_path: Path) -> None:
    """The intervals of accuracy are those of the predictions; AUC has the training interval."""
    root = folder(tmp_path / "runs", "none", "mixup")
    report(Options(root, tmp_path / "out", ["csv"]))
    file = tmp_path / "out" / "records.parquet"
    stored, _ = records.scan(root)
    read = recordsfile.read(file)
    assert {each.run.id for each in read} == {each.run.id for each in stored}

    def over(found: list[records.Record], metric: str) -> Difference | None:
        row, base = (
            RowRuns(name, "none", tuple(e for e in found if e.run.method == name))
            for name in ("mixup", "none")
        )
        return difference(row, base, metric)

    exact = over(stored, "accuracy")
    assert exact is not None and exact.population is not None
    assert over(read, "accuracy") == exact
    mixed = [e if e.run.method == "none" else r for e, r in zip(stored, read, strict=True)]
    assert over(mixed, "accuracy") == exact
    auc, whole = over(read, "auc"), over(stored, "auc")
    assert auc is not None and whole is not None
    assert (auc.estimate, auc.training) == (whole.estimate, whole.training)
    assert auc.population is None and auc.untested.endswith("test images are not paired")


def test_a_records_file_beside_ones_own_runs(tmp_path: Path) -> None:
    """Published rows without a run of them: the table is that of one folder."""
    theirs = folder(tmp_path / "theirs", "none", "mixup")
    report(Options(theirs, tmp_path / "page", ["csv"]))
    own = folder(tmp_path / "own", SAFLEX)
    both = tmp_path / "both"
    for each in (*runs.folders(theirs), *runs.folders(own)):
        shutil.copytree(each, both / each.name)
    file = tmp_path / "page" / "records.parquet"
    report(Options(own, tmp_path / "a", ["csv", "md"], beside=[file]))
    report(Options(both, tmp_path / "b", ["csv"]))
    found, expected = tables_in(tmp_path / "a"), tables_in(tmp_path / "b")
    assert found["accuracy.csv"] == expected["accuracy.csv"]
    assert found["differences.csv"] == expected["differences.csv"]
    page = (tmp_path / "a" / "report.md").read_text()
    assert "From records.parquet" in page and "8 runs of mixup, none" in page
    again = recordsfile.read(tmp_path / "a" / "records.parquet")
    assert sum(each.items is not None for each in again) == 12, "joined rows can be joined again"


def test_groups_come_back_from_a_records_file(tmp_path: Path) -> None:
    root = folder(tmp_path / "runs", "none")
    for each in runs.folders(root):
        rewrite(each, test_groups=np.arange(60) // 3)
    found = records.read(runs.folders(root))
    recordsfile.write(found, tmp_path / "records.parquet")
    for one, other in zip(found, recordsfile.read(tmp_path / "records.parquet"), strict=True):
        assert other.items is not None and other.groups is not None and one.groups is not None
        assert np.array_equal(other.groups, one.groups)
        assert np.array_equal(other.targets, one.targets)
        assert np.array_equal(other.item_values("accuracy"), one.item_values("accuracy"))
        assert other.metric("auc") == one.metric("auc")
        assert other.metric("f1") == one.metric("f1") > 0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"benchmark": "digits(noise=0.4)"}, "data set digits(noise=0.4) (4)"),
        ({"data": "other"}, "other data under the name digits (4)"),
        ({"model": "mlp"}, "model mlp (4)"),
        ({"protocol": "paper"}, "protocol paper (4)"),
        ({"epochs": 5}, "another training (4)"),
        ({"versions": {"trainer": 2, "model": 1}}, "version of the trainer 2 (4)"),
    ],
)
def test_what_cannot_be_compared_is_not_joined(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    own = folder(tmp_path / "own", "none")
    other = folder(tmp_path / "other", "mixup", **changes)
    with joined.opened([other]) as sources:
        kept, told = joined.beside(records.scan(own)[0], sources)
    assert not kept
    assert told == [f"Not from other, because no run here has the same: {reason}."]


def test_rows_from_another_device_are_told_apart(tmp_path: Path) -> None:
    own = folder(tmp_path / "own", "none", SAFLEX)
    other = folder(tmp_path / "other", "none", "mixup", device="cuda")
    make_run(other, "none", 9, device="cuda", recorded=declared("none"))
    with joined.opened([other]) as sources:
        more, told = joined.beside(records.scan(own)[0], sources)
    (block,) = blocks.split([*records.scan(own)[0], *more])
    names = [entry.row for entry in block.entries]
    assert names == ["mixup", "none {device cpu}", "none {device cuda}", SAFLEX]
    column = block.columns[0]
    saflex = block.by_name[SAFLEX]
    assert block.baseline(saflex) == "mixup"
    made = difference(column.rows[SAFLEX], column.rows["mixup"], "accuracy")
    assert made is not None and made.population is not None
    assert "paired with ours by seed and test image for 4 seeds" in told[0]


def test_no_seed_in_common_is_said(tmp_path: Path) -> None:
    own = folder(tmp_path / "own", "none")
    for seed in range(10, 13):
        make_run(tmp_path / "other", "mixup", seed)
    with joined.opened([tmp_path / "other"]) as sources:
        _, told = joined.beside(records.scan(own)[0], sources)
    assert told[0].endswith("3 runs of mixup; no seed in common, so nothing is paired with ours.")


def test_other_test_images_are_not_paired(tmp_path: Path) -> None:
    own, other = folder(tmp_path / "own", "none"), folder(tmp_path / "other", "mixup")
    for each in runs.folders(other):
        rewrite(each, test_targets=runs.read_arrays(each / "predictions.npz")["test_targets"][::-1])
    with joined.opened([other]) as sources:
        more, _ = joined.beside(records.scan(own)[0], sources)
    ours, theirs = RowRuns("none", "none", tuple(records.scan(own)[0])), RowRuns("m", "", (*more,))
    made = difference(theirs, ours, "accuracy")
    assert made is not None and made.population is None and made.training is not None
    assert made.untested == "the test images of other are others, so they are not paired"


def test_runs_in_several_places(tmp_path: Path) -> None:
    """A finished run takes precedence over a failed one; two results that differ are named."""
    one, other = tmp_path / "one", tmp_path / "other"
    make_run(one, "none", 0, status="failed", reason="disk full")
    make_run(one, "none", 1)
    make_run(other, "none", 0)
    make_run(other, "none", 1, skill=2.0)
    make_run(other, "none", 2)
    sources = [Source(path, *records.scan(path)) for path in (one, other)]
    found, unread, told = joined.pooled(sources)
    assert sorted((each.run.seed, each.folder.parent.name) for each in found) == [
        (0, "other"), (1, "one"), (2, "other"),
    ]  # fmt: skip
    assert not unread
    assert told[0] == "2 runs in several places: the first is used."
    assert told[1].startswith("Their results differ: none, seed 1 (")


def test_files_that_cannot_be_joined(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder(tmp_path / "runs", "none")
    old = tmp_path / "old.parquet"
    pd.DataFrame({"id": ["a"]}).to_parquet(old)
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 not really")
    text = tmp_path / "notes.txt"
    text.write_text("no pack")
    wanted = {
        tmp_path / "absent": "found nothing",
        old: "without the column 'run'",
        broken: "expected a records.parquet of augbench report",
        text: "damaged, truncated or not a pack",
    }
    for path, words in wanted.items():
        out = tmp_path / "out"
        assert main(["report", str(root), "--out", str(out), "--with", str(path)]) == 1
        error = capsys.readouterr().err
        assert words in error and str(path) in error, error
        assert "Traceback" not in error
    assert main(["report", "--out", str(tmp_path / "out")]) == 2
    assert "expected a results folder, got none" in capsys.readouterr().err


def test_more_metrics_in_report_and_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = folder(tmp_path / "runs", "none", "mixup")
    out = tmp_path / "out"
    assert main(["report", str(root), "--out", str(out), "--metrics", "f1,mcc"]) == 0
    capsys.readouterr()
    first = records.scan(root)[0]
    means = {
        name: np.mean([each.metric(name) for each in first if each.run.method == "mixup"])
        for name in ("f1", "mcc")
    }
    assert f"{100 * means['f1']:.2f} ±" in (out / "tables" / "f1.csv").read_text()
    assert f"{means['mcc']:.3f} ±" in (out / "tables" / "mcc.csv").read_text()
    assert main(["table", str(root), "--metrics", "accuracy,f1,specificity"]) == 0
    assert f"{100 * means['f1']:.2f} ±" in capsys.readouterr().out
    assert main(["report", str(root), "--out", str(out), "--metrics", "f2"]) == 2
    assert "unknown metric 'f2'" in capsys.readouterr().err


def test_a_damaged_pack_member_is_left_out_of_the_report(tmp_path: Path) -> None:
    own, other = folder(tmp_path / "own", "none"), folder(tmp_path / "other", "mixup")
    victim = next(runs.folders(other))
    (victim / "predictions.npz").write_bytes(b"x" * (victim / "predictions.npz").stat().st_size)
    result = json.loads((victim / "result.json").read_text())
    assert result["status"] == "done"
    report(Options(own, tmp_path / "out", ["md"], beside=[other]))
    page = (tmp_path / "out" / "report.md").read_text()
    assert "predictions.npz cannot be read" in page and "mixup" in page


def test_a_comparison_beside_published_rows(tmp_path: Path) -> None:
    """One row was run; its base comes from a pack. Controls of others are not shown."""
    theirs = folder(tmp_path / "theirs", "none", "mixup", f"frozen(upstream={SAFLEX})")
    make_run(theirs, "none", 0, benchmark="breastmnist", recorded=declared("none"))
    own = records.scan(folder(tmp_path / "own", SAFLEX))[0]
    with joined.opened([packed(theirs, tmp_path / "theirs.tar.zst")]) as sources:
        rows, told = joined.rows_beside([RowRuns(SAFLEX, "mixup", tuple(own))], sources)
        text = comparison.as_text(rows)
    assert [(row.name, len(row.records)) for row in rows] == [
        (SAFLEX, 4), ("mixup", 4), ("none", 4),
    ]  # fmt: skip
    assert told == [
        "From theirs.tar.zst (a machine, augbench 0.1.0): 8 runs of mixup, none; paired with ours "
        "by seed and test image for 4 seeds."
    ]
    (line,) = (each for each in text.splitlines() if each.startswith(SAFLEX))
    base = difference(rows[0], rows[1], "accuracy")
    assert base is not None and f"{base.estimate:+.2f}" in line and "not tested" not in line


def test_seeds_of_others_are_added_to_a_row_of_the_same_machine(tmp_path: Path) -> None:
    own = RowRuns("none", "none", tuple(records.scan(folder(tmp_path / "own", "none"))[0]))
    for seed, device in ((4, "cpu"), (5, "cuda")):
        make_run(tmp_path / device, "none", seed, device=device, recorded=declared("none"))
    for device, seeds, said in (
        ("cpu", 5, []),
        ("cuda", 4, ["Shown without runs from another device or release: none."]),
    ):
        with joined.opened([tmp_path / device]) as sources:
            (row,), told = joined.rows_beside([own], sources)
        assert len(row.records) == seeds and told[1:] == said
