"""Runs of several folders, packs and records files in one report, table or comparison."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis import blocks, comparison, findings, joined, packing, records, recordsfile, runs
from analysis.differences import Difference, RowRuns, cost_ratio, difference
from analysis.findings import Finding
from analysis.joined import Source
from analysis.question import Question
from analysis.report.page import NoRuns, Options, report
from benchmarks.cli import compare
from benchmarks.cli.arguments import CompareCommand
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
    """Half the runs of each row and a pack of the rest, or half of the rows joined by --with."""
    whole = folder(tmp_path / "whole", "none", "mixup", SAFLEX)
    one, other = tmp_path / "one", tmp_path / "other"
    for place, each in enumerate(runs.folders(whole)):
        shutil.copytree(each, (one, other)[place % 2] / each.name)
    report(Options(whole, tmp_path / "a", ["csv"]))
    rest = packed(other, tmp_path / "rest.tar.zst")
    report(Options(one, tmp_path / "b", ["csv"], others=[rest]))
    report(Options(one, tmp_path / "c", ["csv"], others=[other]))
    expected = tables_in(tmp_path / "a")
    assert len(expected) == 5 and SAFLEX in expected["differences.csv"]
    for name in "bc":
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
    assert auc.population is None and auc.untested.endswith("test rows are not paired")


def test_a_records_file_beside_ones_own_runs(tmp_path: Path) -> None:
    """Published rows without a run of them: the table is that of one folder."""
    theirs = folder(tmp_path / "theirs", "none", "mixup")
    report(Options(theirs, tmp_path / "page", ["csv"]))
    own = folder(tmp_path / "own", SAFLEX)
    both = tmp_path / "both"
    for each in (*runs.folders(theirs), *runs.folders(own)):
        shutil.copytree(each, both / each.name)
    for each in (own, both):
        (each / "study.yaml").write_text(f"question: Does it help?\nfamily: ['{SAFLEX}']\n")
    file = tmp_path / "page" / "records.parquet"
    report(Options(own, tmp_path / "a", ["csv", "md"], beside=[file]))
    report(Options(both, tmp_path / "b", ["csv"]))
    found, expected = tables_in(tmp_path / "a"), tables_in(tmp_path / "b")
    assert found["accuracy.csv"] == expected["accuracy.csv"]
    assert found["differences.csv"] == expected["differences.csv"]
    page = (tmp_path / "a" / "report.md").read_text()
    assert "From records.parquet" in page and "8 runs of mixup, none" in page


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


def findings_of(own: Path, *others: Path, asked: Question | None = None) -> dict[str, Finding]:
    """By rows, the findings of a folder beside others."""
    found = records.scan(own)[0]
    with joined.opened(others) as sources:
        more, _ = joined.beside(found, sources)
    (block,) = blocks.split([*found, *more])
    return {each.row: each for each in findings.findings(block, asked or Question())}


@pytest.mark.parametrize("family", [(), (("mixup", "none"), (SAFLEX, ""))])
def test_joined_rows_change_nothing_about_ours(
    tmp_path: Path, family: tuple[tuple[str, str], ...]
) -> None:
    """Rows of the same names from another device, release and version of a method, more rows, and
    controls: our findings, p-values and verdicts stay."""
    asked = Question(family=family)
    own = folder(tmp_path / "own", "none", "mixup", SAFLEX)
    gpu = folder(tmp_path / "gpu", "none", "mixup", "cutmix", "crop", device="cuda")
    make_run(gpu, "none", 9, device="cuda", recorded=declared("none"))
    old = tmp_path / "old"
    for seed in range(6):
        make_run(old, SAFLEX, seed, recorded=declared(SAFLEX),
                 versions={"trainer": 1, "model": 1, "saflex": 1})  # fmt: skip
        make_run(old, SAFLEX, seed, recorded=declared(SAFLEX), meta_fraction=0.4)
    alone = findings_of(own, asked=asked)
    assert alone and all(each.verdict != "not tested" for each in alone.values())
    assert findings_of(own, gpu, old, asked=asked) == alone


def test_rows_of_one_name_are_told_apart(tmp_path: Path) -> None:
    own = folder(tmp_path / "own", "none", SAFLEX)
    gpu, cpu = tmp_path / "gpu", tmp_path / "cpu"
    folder(gpu, "none", "mixup", device="cuda")
    make_run(gpu, "none", 9, device="cuda", recorded=declared("none"))
    folder(cpu, "mixup")
    with joined.opened([gpu, cpu]) as sources:
        more, told = joined.beside(records.scan(own)[0], sources)
    (block,) = blocks.split([*records.scan(own)[0], *more])
    names = [entry.row for entry in block.entries]
    assert names == ["none", "mixup", "mixup {from gpu}", "none {from gpu}", SAFLEX]
    assert block.baseline(block.by_name[SAFLEX]) == "mixup"
    assert block.baseline(block.by_name["mixup {from gpu}"]) == "none {from gpu}"
    assert block.baseline(block.by_name["mixup"]) == "none"
    column = block.columns[0]
    assert len(column.rows["none"].records) == len(SEEDS)
    assert math.isnan(cost_ratio(column.rows["mixup {from gpu}"], column.rows["none"]))
    assert told[0].endswith("9 runs of mixup, none; 4 seeds in common with ours.")


def test_no_seed_in_common_is_said(tmp_path: Path) -> None:
    own = folder(tmp_path / "own", "none")
    for seed in range(10, 13):
        make_run(tmp_path / "other", "mixup", seed)
    with joined.opened([tmp_path / "other"]) as sources:
        _, told = joined.beside(records.scan(own)[0], sources)
    assert told[0].endswith("3 runs of mixup; no seed in common with ours, so nothing is paired.")


def test_other_test_images_are_not_paired(tmp_path: Path) -> None:
    own, other = folder(tmp_path / "own", "none"), folder(tmp_path / "other", "mixup")
    for each in runs.folders(other):
        rewrite(each, test_targets=runs.read_arrays(each / "predictions.npz")["test_targets"][::-1])
    with joined.opened([other]) as sources:
        more, _ = joined.beside(records.scan(own)[0], sources)
    ours, theirs = RowRuns("none", "none", tuple(records.scan(own)[0])), RowRuns("m", "", (*more,))
    made = difference(theirs, ours, "accuracy")
    assert made is not None and made.population is None and made.training is not None
    assert made.untested == "the test rows of other are others, so they are not paired"


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
    assert told[0] == (
        "2 runs in several places: one with a result, or with scores on corrupted images, is used, "
        "else the first."
    )
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
        broken: "expected a records.parquet of this or an older augbench report",
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
        (SAFLEX, 4), ("none", 4), ("mixup", 4),
    ]  # fmt: skip
    assert told == [
        "From theirs.tar.zst (a machine, augbench 0.1.0): 8 runs of mixup, none; 4 seeds in common "
        "with ours."
    ]
    (line,) = (each for each in text.splitlines() if each.startswith(SAFLEX))
    base = difference(rows[0], rows[2], "accuracy")
    assert base is not None and f"{base.estimate:+.2f}" in line and "not tested" not in line


def test_our_seeds_of_a_row_stay_ours(tmp_path: Path) -> None:
    """Of a row that is ours already, runs of others make a row of their own."""
    own = RowRuns("none", "none", tuple(records.scan(folder(tmp_path / "own", "none"))[0]))
    for seed in (3, 4):
        make_run(tmp_path / "more", "none", seed, recorded=declared("none"))
    with joined.opened([tmp_path / "more"]) as sources:
        rows, _ = joined.rows_beside([own], sources)
    assert rows[0] == own
    assert [(row.name, sorted(row.by_seed())) for row in rows[1:]] == [("none {from more}", [3, 4])]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (("none",), "nothing: all of its runs that can be compared are among these."),
        ((), "nothing: it has no finished run that could be shown."),
    ],
)
def test_nothing_to_join(tmp_path: Path, rows: tuple[str, ...], said: str) -> None:
    own = folder(tmp_path / "own", "none")
    other = folder(tmp_path / "other", *rows)
    make_run(other, "cutmix", status="failed", reason="diverged")
    with joined.opened([other]) as sources:
        more, told = joined.beside(records.scan(own)[0], sources)
    assert not more and told == [f"From other {said}"]


def test_failed_runs_of_joined_rows_are_told(tmp_path: Path) -> None:
    own, other = folder(tmp_path / "own", "none"), folder(tmp_path / "other", "mixup")
    make_run(other, "mixup", 7, status="failed", reason="diverged")
    with joined.opened([other]) as sources:
        _, told = joined.beside(records.scan(own)[0], sources)
    assert told[1] == "1 run of these rows in other failed."


def test_a_folder_without_a_name_and_two_of_one_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "ab":
        folder(tmp_path / name / "runs", "none")
    monkeypatch.chdir(tmp_path / "a" / "runs")
    with joined.opened([Path(), Path("../../b/runs"), Path("../runs")]) as sources:
        assert [each.name for each in sources] == ["runs 1", "runs 2"]


def test_our_runs_all_failed(tmp_path: Path) -> None:
    other = folder(tmp_path / "other", "none", "mixup")
    for seed in SEEDS:
        make_run(tmp_path / "own", "none", seed, status="failed", reason="diverged")
    with pytest.raises(NoRuns):
        report(Options(tmp_path / "own", tmp_path / "out", ["md"], beside=[other]))
    own = records.scan(tmp_path / "own")[0]
    with joined.opened([other]) as sources:
        rows, _ = joined.rows_beside([RowRuns("none", "none", tuple(own))], sources)
    assert "mixup" in comparison.as_text(rows)


def test_a_comparison_without_damaged_runs_of_others(tmp_path: Path) -> None:
    own, other = folder(tmp_path / "own", "mixup"), folder(tmp_path / "other", "none")
    victim = next(runs.folders(other))
    (victim / "predictions.npz").write_bytes(b"x" * (victim / "predictions.npz").stat().st_size)
    with joined.opened([other]) as sources:
        row = RowRuns("mixup", "none", tuple(records.scan(own)[0]))
        rows, told = joined.rows_beside([row], sources)
        text = compare._text(CompareCommand(), rows, told)
    assert "not tested" not in text and f"{victim.name}: predictions.npz cannot be read" in text


def test_a_report_of_joined_rows_records_its_own_runs(tmp_path: Path) -> None:
    own, other = folder(tmp_path / "own", "none"), folder(tmp_path / "other", "mixup")
    report(Options(own, tmp_path / "out", ["md"], beside=[other]))
    found = recordsfile.read(tmp_path / "out" / "records.parquet")
    assert {each.run.method for each in found} == {"none"}
    page = (tmp_path / "out" / "report.md").read_text()
    assert "--methods none --seeds 4" in page
