"""What a report says of studies that have not ended, of damage, and of gains without a control."""

import csv
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis import blocks, findings, records, runs
from analysis.blocks import Block
from analysis.differences import difference
from analysis.question import Question
from analysis.report import figures, plots, results, sentences, tables
from analysis.report.page import TABLES, Options, report
from analysis.report.plots import Front
from tests.made import make_run
from tests.test_blocks import SAFLEX
from tests.test_report import search_row, swept

SHUFFLED = f"shuffled_weights(upstream={SAFLEX})"


def only(root: Path) -> Block:
    (block,) = blocks.split(records.scan(root)[0])
    return block


def told_of(root: Path) -> list[str]:
    """What is said of the controls, the family being every method."""
    block = only(root)
    return sentences.controls(block, findings.findings(block, Question()), 0.5, "controls")[0]


def page(out: Path) -> str:
    return (out / "report.md").read_text(encoding="utf-8").replace("\\", "")


@pytest.mark.usefixtures("undrawn")
def test_a_study_that_has_not_ended_is_an_interim_look(tmp_path: Path) -> None:
    root, out = tmp_path / "runs", tmp_path / "out"
    made = [make_run(root, method, seed) for method in ("none", "mixup") for seed in range(4)]
    planned = [*(each.name for each in made), "0" * 16]
    swept(root, "mine", f"margin: 1\nruns: {json.dumps(planned)}\n")
    (made[0] / "result.json").unlink()
    hurt = made[1] / "predictions.npz"
    hurt.write_bytes(hurt.read_bytes()[::-1])
    report(Options(root, out, ["md"], study="mine"))
    assert "Interim: 2 of the study's 9 runs have no result yet." in page(out)
    shutil.rmtree(made[0])
    make_run(root, "none", 0)
    swept(root, "whole", f"margin: 1\nruns: {json.dumps(planned[:-1])}\n")
    report(Options(root, out, ["md"], study="whole"))
    assert "interim" not in page(out), "what was damaged has ended"


def test_a_comparison_over_data_sets_tells_its_seeds(tmp_path: Path) -> None:
    for name, count in (("digits", 4), ("breastmnist", 2)):
        for seed in range(count):
            for method, skill in (("none", 0.2), ("mixup", 3.0)):
                make_run(tmp_path, method, seed, skill, benchmark=name)
    block = only(tmp_path)
    (over,), reason = findings.overall(block, findings.findings(block, Question()), 0.5)
    assert sorted(over.seeds) == [2, 4]
    assert "mean of 2 data sets (n = 2 to 4)" in sentences.overall(over, 0.5)
    table = tables.overall_table(block, [over], reason, "overall")
    assert dict(zip(table.head, [c.text for c in table.groups[0].rows[0]], strict=True))["n"] == (
        "2 to 4"
    )


def test_a_gain_without_a_control_that_could_explain_it_is_still_a_gain(tmp_path: Path) -> None:
    for seed in range(6):
        make_run(tmp_path, "mixup", seed, 0.2, test_rows=150)
        make_run(tmp_path, SAFLEX, seed, 2.0, test_rows=150)
        make_run(tmp_path, SHUFFLED, seed, status="failed", reason="so")
        for method in ("lpa3(upstream=mixup)", "norm_noise(upstream=lpa3(upstream=mixup))"):
            make_run(tmp_path, method, seed, 0.2, test_rows=150)
    assert told_of(tmp_path) == [
        f"digits: {SAFLEX} gains over mixup (after Holm, few seeds); a row without its learning "
        "has no result, so this does not show that learning helps."
    ]


def test_dirty_meta_rows_explain_no_gain_however_rows_are_cut(tmp_path: Path) -> None:
    clean, dirty = "digits(noise=0.4)", "digits(meta_noise=0.4, noise=0.4)"
    for seed in range(6):
        make_run(tmp_path, "mixup", seed, 0.2, benchmark=clean, test_rows=150)
        for fraction in (0.1, 0.3):
            for name, skill in ((clean, 2.0), (dirty, 1.0)):
                make_run(tmp_path, SAFLEX, seed, skill, benchmark=name, test_rows=150,
                         meta_fraction=fraction, meta=9)  # fmt: skip
    told = told_of(tmp_path)
    assert len(told) == 2 and not any("@dirty" in each for each in told)
    assert all("a row without its learning has no result" in each for each in told)


def test_a_control_that_is_right_on_the_same_images_leaves_no_gain(tmp_path: Path) -> None:
    for seed in range(6):
        make_run(tmp_path, "mixup", seed, 0.2, test_rows=150)
        one, other = (
            make_run(tmp_path, name, seed, 2.0, test_rows=150) for name in (SAFLEX, SHUFFLED)
        )
        for name in ("predictions.npz", "result.json"):
            shutil.copy(one / name, other / name)
    assert told_of(tmp_path) == [
        f"digits: {SAFLEX} gains over mixup (after Holm, few seeds); the control {SHUFFLED} is "
        "correct on the same test rows for every seed, so the gain is not due to the method.",
        f"digits: {SAFLEX} gains over mixup (after Holm, few seeds); a row without its learning "
        "has no result, so this does not show that learning helps. (Few seeds.)",
    ]


def test_without_the_upstream_on_all_labels_a_gain_is_over_it_on_the_same_ones(
    tmp_path: Path,
) -> None:
    for seed in range(10):
        make_run(tmp_path, "mixup", seed, 0.2, test_rows=150, control="train")
        for name in (SAFLEX, f"frozen(upstream={SAFLEX})"):
            make_run(tmp_path, name, seed, 2.0, test_rows=150)
    told, block = told_of(tmp_path), only(tmp_path)
    assert tables.ratio(block, block.columns[0], block.by_name[SAFLEX]) == 1
    assert len(told) == 2
    assert all(f"{SAFLEX} gains over mixup@train" in each for each in told)
    assert f"the control frozen(upstream={SAFLEX})" in told[0]
    assert "the control mixup@train" not in " ".join(told)


@pytest.mark.parametrize("oracle", [False, True])
@pytest.mark.parametrize("hurt", [False, True])
def test_rows_of_an_equal_budget_stay_where_the_run_they_were_measured_on_is_lost(
    oracle: bool, hurt: bool, tmp_path: Path
) -> None:
    costly = [make_run(tmp_path, SAFLEX, k, cost=3.0, oracle_test=oracle) for k in range(4)]
    # A budget is always measured on the run without test metrics.
    of = replace(runs.read_run(costly[0])[0], oracle_test=False).id
    for seed in range(4):
        for method in ("none", "mixup"):
            make_run(tmp_path, method, seed, oracle_test=oracle)
        make_run(tmp_path, "mixup", seed, budget=f"passes of {SAFLEX}", epochs=9,
                 recorded={"of": of}, oracle_test=oracle)  # fmt: skip
    if hurt:
        (costly[0] / "result.json").unlink()
    assert f"mixup [passes of {SAFLEX}]" in only(tmp_path).by_name


@pytest.mark.parametrize("kind", ["csv", "tex", "md", "html"])
def test_a_search_without_any_row_on_fresh_seeds_is_reported(kind: str, tmp_path: Path) -> None:
    for seed in range(2):
        make_run(tmp_path, "mixup", seed, recorded={"searched": {}})
    swept(tmp_path, "tuned", "margin: 1\n")
    row = search_row("mixup", stopped=True)
    (tmp_path / "studies" / "tuned" / "search.json").write_text(json.dumps([row]))
    for path in report(Options(tmp_path, tmp_path / "out", [kind])):
        assert path.exists()
    assert (tmp_path / "out" / "tables" / f"search-tuned.{kind}").exists() == (kind in "csv tex")


@pytest.mark.usefixtures("undrawn")
def test_a_file_name_that_is_no_utf_8_is_written_as_text(tmp_path: Path) -> None:
    make_run(tmp_path, "none")
    make_run(tmp_path, "mixup", status="failed", reason="no file /data/b\udce9b.npz")
    report(Options(tmp_path, tmp_path / "out"))
    assert "/data/b[U+DCE9]b.npz" in page(tmp_path / "out")


def reversed_file(name: str) -> Callable[[Path], object]:
    """Damage that leaves the size, which is all that result.json knows."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[::-1])


def changed_predictions(change: Callable[[dict], object]) -> Callable[[Path], object]:
    def hurt(folder: Path) -> None:
        arrays = runs.read_arrays(folder / "predictions.npz")
        change(arrays)
        np.savez(folder / "predictions.npz", **arrays)  # type: ignore[arg-type]
        result = json.loads((folder / "result.json").read_text())
        result["files"]["predictions.npz"] = (folder / "predictions.npz").stat().st_size
        (folder / "result.json").write_text(json.dumps(result))

    return hurt


def changed_run(folder: Path) -> None:
    cell = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**cell, "recorded": None}))


@pytest.mark.parametrize(
    ("hurt", "reason"),
    [
        *(
            (reversed_file(name), f"{name} cannot be read")
            for name in ("metrics.jsonl", "timing.jsonl", "learned.npz", "corruption.npz",
                         "samples.npz")
        ),
        (
            changed_predictions(lambda a: a["test_last_logits"].__setitem__((0, 0), np.nan)),
            "logits that are not finite",
        ),
        (
            changed_predictions(lambda a: a.update(test_targets=a["test_targets"][1:])),
            "60, 3), 59 targets",
        ),
        (changed_predictions(lambda a: a.pop("test_last_logits")), "test_last_logits"),
        (changed_run, "recorded is not an object"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("undrawn")
def test_a_run_with_any_damaged_file_is_told_and_stops_nothing(
    hurt: Callable[[Path], object], reason: str, tmp_path: Path
) -> None:
    for seed in range(4):
        make_run(tmp_path, "none", seed)
    made, *_ = (make_run(tmp_path, SAFLEX, seed, 2.0, learned=True) for seed in range(4))
    hurt(made)
    report(Options(tmp_path, tmp_path / "out", ["md"]))
    text = page(tmp_path / "out")
    assert "8 runs: 7 done, 1 unfinished, damaged or copied." in text
    (line,) = (line for line in text.splitlines() if "no result" in line and made.name in line)
    assert reason in line


def test_numbers_of_folds_are_said_to_be_of_folds(tmp_path: Path) -> None:
    for seed in range(10):
        for method, skill in (("none", 0.2), ("mixup", 1.5)):
            make_run(tmp_path, method, seed, skill, benchmark="breastmnist(folds=5)", folds=5)
        make_run(tmp_path, "none", seed)
    block = only(tmp_path)
    found = findings.findings(block, Question())
    (note,) = tables.folds_note(block.columns)
    assert note.startswith("breastmnist(folds=5): repeated cross-validation")
    assert note in sentences.selection(block)
    assert note in results.main_table(block, "accuracy", "accuracy", False, "last").notes
    told = figures.MAKERS["differences"](
        figures._Drawing(block, found, 0.5), [tmp_path / "differences.png"]
    )
    assert told is not None and note in told[1]
    assert not tables.folds_note([each for each in block.columns if each.name == "digits"])


def test_what_a_method_adds_is_drawn_against_what_its_upstream_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skills = {"none": 1.0, "crop": 3.0, "mixup": 0.3, "flip": 1.5}
    for seed in range(4):
        for upstream, skill in skills.items():
            make_run(tmp_path, upstream, seed, skill, control="train")
        for upstream in list(skills)[1:]:
            make_run(tmp_path, f"saflex(upstream={upstream})", seed, 1.0, meta=9)
        make_run(tmp_path, "l2rw(upstream=crop)", seed, 1.0, meta=9)
    drawn: dict[str, plots.Mark] = {}

    def gains(panels: Any, names: list[str], *_: Any) -> None:
        assert names == ["saflex(upstream=U)"], "l2rw has a single upstream"
        drawn.update({mark.upstream: mark for _, marks in panels for mark in marks})

    monkeypatch.setattr(figures.plots, "gains", gains)
    block = only(tmp_path)
    told = figures.MAKERS["upstreams"](figures._Drawing(block, [], 0.5), [])
    assert told is not None
    (column,) = block.columns
    for upstream in list(skills)[1:]:
        (letter,) = (key for key in "abc" if f"{key}: {upstream}" in told[1])
        over = difference(column.rows[f"{upstream}@train"], column.rows["none@train"], "accuracy")
        added = difference(
            column.rows[f"saflex(upstream={upstream})"],
            column.rows[f"{upstream}@train"],
            "accuracy",
        )
        assert over is not None and added is not None
        assert (drawn[letter].x.estimate, drawn[letter].y.estimate) == (
            over.estimate, added.estimate,
        )  # fmt: skip
    assert (drawn["a"].x.estimate > 0) == (drawn["a"].y.estimate < 0)


def test_what_no_row_beats_is_drawn_however_many_rows_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path, "none", skill=0.1, cost=1.0)
    for number in range(figures.MOST + 5):
        make_run(tmp_path, f"crop(pad={number})", skill=3.0, cost=10.0 + number)
    fronts: list[Front] = []
    monkeypatch.setattr(figures.plots, "fronts", lambda panels, *_: fronts.extend(panels))
    monkeypatch.setattr(figures.plots, "curves", lambda *_: None)
    block = only(tmp_path)
    drawing = figures._Drawing(block, [], 0.5)
    told = figures.MAKERS["cost"](drawing, [])
    assert told is not None and f"{figures.MOST} of {figures.MOST + 6} rows are drawn" in told[1]
    (front,) = fronts
    drawn = [point.name for point in front.points]
    assert len(drawn) == figures.MOST and "none" in drawn
    points = {
        entry.name: (
            block.columns[0].rows[entry.name].records[0].result["cost"]["charged_seconds"],
            findings.scores(block.columns[0].rows[entry.name], "accuracy")[0],
        )
        for entry in block.compared
    }
    best = {
        name
        for name, (cost, score) in points.items()
        if not any(c <= cost and s >= score and (c, s) != (cost, score) for c, s in points.values())
    }
    assert {front.points[place].name for place in front.best} == best
    assert "none" in [entry.name for entry in drawing.shown()[0]]


def test_a_row_without_a_selected_epoch_takes_it_from_no_other(tmp_path: Path) -> None:
    reason = "the method changes the network after the last epoch"
    for seed in range(4):
        make_run(tmp_path, "none", seed, selected=True)
        chosen = {"selection": {"offered": False, "reason": reason}}
        make_run(tmp_path, "head_refit", seed, result=chosen)
        make_run(tmp_path, "none", seed, benchmark="breastmnist", result=chosen)
    block = only(tmp_path)
    where = "breastmnist, digits (head_refit)"
    told = f"The epoch with the best select AUC is not available on {where}: {reason}."
    assert told in sentences.selection(block)
    report(Options(tmp_path, tmp_path / "out", ["csv"]))
    with (tmp_path / "out" / "tables" / "selected.csv").open(newline="") as file:
        rows = [row[1:3] for row in csv.reader(file)][1:]
    assert rows == [["none", "4"]]


def test_a_data_set_on_which_every_run_failed_stays_in_the_table(tmp_path: Path) -> None:
    for seed in range(4):
        make_run(tmp_path, "none", seed)
        make_run(tmp_path, "none", seed, benchmark="breastmnist", status="failed", reason="lost")
    report(Options(tmp_path, tmp_path / "out", ["csv"]))
    with (tmp_path / "out" / "tables" / "accuracy.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["breastmnist, % ↑"] == "n/a"
    assert row["digits, % ↑"] != "n/a"


@pytest.mark.usefixtures("undrawn")
def test_a_second_report_leaves_no_table_or_figure_of_the_first(tmp_path: Path) -> None:
    root, out = tmp_path / "runs", tmp_path / "out"
    for seed in range(4):
        for name in ("digits", "breastmnist"):
            for method, skill in (("none", 0.2), ("mixup", 1.5)):
                make_run(root, method, seed, skill, benchmark=name, selected=True)
    report(Options(root, out))
    written = {path.stem for path in (out / "tables").iterdir()}
    assert {"overall", "selected"} < written <= set(TABLES)
    (out / "tables" / "mine.csv").write_text("kept")
    shutil.rmtree(root)
    make_run(root, "none")
    report(Options(root, out))
    assert {path.stem for path in (out / "tables").iterdir()} == {
        "accuracy", "auc", "cost", "versions", "mine",
    }  # fmt: skip
    named = re.findall(r"\(figures/(\w+)\.png\)", page(out))
    assert {path.stem for path in (out / "figures").iterdir()} == set(named)
    kept = (out / "tables" / "cost.csv").read_text()
    report(Options(root, out, ["tex", "md"]))
    assert (out / "tables" / "cost.csv").read_text() == kept, "other formats are left alone"


def test_a_table_as_csv_has_its_title(tmp_path: Path) -> None:
    make_run(tmp_path)
    report(Options(tmp_path, tmp_path / "out", ["csv"]))
    tables = tmp_path / "out" / "tables"
    texts = [(tables / f"{name}.csv").read_text(encoding="utf-8") for name in ("accuracy", "auc")]
    heads = [next(csv.reader(text.splitlines()))[1] for text in texts]
    assert heads == [
        f"Test {name}, %, mean ± standard deviation over n seeds; last epoch"
        for name in ("accuracy", "AUC")
    ]


def test_labels_of_rows_that_were_never_seen_count_in_no_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_run(tmp_path, SAFLEX, learned=True, benchmark="digits(noise=0.2)")
    arrays = runs.read_arrays(made / "learned.npz")
    unseen = np.arange(3)
    arrays["seen"][unseen] = 0
    arrays["label"][unseen] = 0
    np.savez(made / "learned.npz", **arrays)  # type: ignore[arg-type]
    result = json.loads((made / "result.json").read_text())
    result["files"]["learned.npz"] = (made / "learned.npz").stat().st_size
    (made / "result.json").write_text(json.dumps(result))
    shares: list[np.ndarray] = []
    monkeypatch.setattr(figures.plots, "maps", lambda tables, *_, **__: shares.append(tables[0][2]))
    figures.MAKERS["labels"](figures._Drawing(only(tmp_path), [], 0.5), [])
    assert np.allclose(shares[0].sum(axis=1), 1)


def test_letters_that_would_overlap_are_one_text() -> None:
    places = {"a": 3.0, "b": 6.8, "d": -16.7, "e": 7.2, "c": 8.5}
    told = list(plots._together(places, 0.75))
    assert [text for _, text in told] == ["d", "a", "b, e", "c"]
    assert told[2][0] == pytest.approx(7.0)
