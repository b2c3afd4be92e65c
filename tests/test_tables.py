"""The comparison's numbers against hand-worked cases, and what it says beside them."""

import csv
import re
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats as scipy_stats

from analysis import comparison, findings, metrics, records
from analysis.comparison import as_text
from analysis.differences import RowRuns, advised, cost_ratio, difference
from analysis.records import ATTACK, Record
from analysis.runs import Run
from analysis.stats import population_interval

RUN = Run(benchmark="b", data="", model="small_cnn", method="none")
TARGETS = np.arange(60) % 3


class Made(Record):
    """A record whose predictions are given, not read."""

    made: np.ndarray

    @cached_property
    def predictions(self) -> dict[str, np.ndarray]:
        return {"test_last_logits": self.made, "test_targets": TARGETS}


def record(method: str, seed: int, skill: float, **changes: Any) -> Record:
    rng = np.random.default_rng([seed, round(100 * skill)])
    logits = rng.normal(size=(60, 3)) + skill * np.eye(3)[TARGETS]
    scores = metrics.evaluate(logits, TARGETS, "multi-class")
    result: dict[str, Any] = {
        "status": "done",
        "metrics": {"last": {"test": scores, "select": scores}},
        "cost": {"seconds_per_epoch": 1.0 + skill, "passes_per_row": 2.0},
        "data": {
            "kind": "multi-class",
            "classes": ["a", "b", "c"],
            "rows": {"select": 30, "test": 60},
            "caveats": ["the same lesion in train and test"],
            "notes": [],
            "verified": True,
            "corruption": None,
        },
        "parameters": 1234,
        "device": {"name": "a machine"},
        **changes,
    }
    run = replace(RUN, method=method, seed=seed)
    made = Made(run, {"preset": "medmnist"}, result, Path())
    object.__setattr__(made, "made", logits)
    return made


def row(method: str, seeds: int, skill: float) -> RowRuns:
    records = tuple(record(method, seed, skill) for seed in range(seeds))
    return RowRuns(method, "none", records)


def test_difference_is_the_mean_over_paired_seeds_with_the_t_interval() -> None:
    base, ours = row("none", 6, 0.5), row("mixup", 6, 1.5)
    for metric in ("accuracy", "auc"):
        found = difference(ours, base, metric)
        assert found is not None and found.training is not None
        one = [100 * r.metric(metric) for r in ours.records]
        other = [100 * r.metric(metric) for r in base.records]
        truth = scipy_stats.ttest_rel(one, other).confidence_interval()
        assert found.estimate == pytest.approx(np.mean(one) - np.mean(other))
        assert (found.training.low, found.training.high) == pytest.approx((truth.low, truth.high))


def test_population_interval_pairs_by_image_within_classes() -> None:
    base, ours = row("none", 5, 0.5), row("mixup", 5, 1.5)
    found = difference(ours, base, "accuracy")
    right = [
        [(r.predictions["test_last_logits"].argmax(1) == TARGETS) for r in each.records]
        for each in (ours, base)
    ]
    truth = population_interval(100 * (np.array(right[0]) * 1.0 - np.array(right[1])), TARGETS)
    assert found is not None and found.population is not None
    assert found.population == truth
    assert found.population.high - found.population.low >= found.training.high - found.training.low  # type: ignore[union-attr]


def test_equal_predictions_tell_nothing_of_what_could_be_found() -> None:
    base = row("none", 5, 0.5)
    found = difference(RowRuns("mixup", "none", base.records), base, "accuracy")
    assert found is not None and found.estimate == 0
    assert np.isnan(found.detectable)


def test_a_comparison_where_auc_leads_is_of_auc() -> None:
    def led(method: str, skill: float) -> RowRuns:
        made = row(method, 4, skill)
        for each in made.records:
            each.result["data"]["leads"] = "auc"
        return made

    rows = [led("none", 0.5), led("mixup", 1.5)]
    (found,) = findings.of_rows(rows, 0.5)
    assert found.difference == difference(rows[1], rows[0], "auc") and found.p < 0.05
    text = as_text(rows, verbose=True)
    assert "Leading    AUC, because a class is rare: of K classes it has less than 0.4/K" in text
    assert "difference: points of AUC over none" in text and "accuracy, %" in text
    shown = [
        f"{100 * np.mean([each.metric(name) for each in rows[1].records]):.2f}"
        for name in ("auc", "auprc", "balanced_accuracy")
    ]
    assert [cell.split()[0] for cell in line_of(text, "mixup")[2:5]] == shown
    assert "Differences in test AUC" in text and "Differences in test balanced accuracy" in text
    assert "Differences in test accuracy" not in text and "in test AUPRC" not in text
    assert max(map(len, text.splitlines())) <= 100
    assert "Leading" not in as_text([row("none", 4, 0.5), row("mixup", 4, 1.5)])


def test_only_seeds_of_both_rows_are_paired() -> None:
    base, ours = row("none", 6, 0.5), row("mixup", 4, 1.5)
    found = difference(ours, base, "accuracy")
    assert found is not None and found.seeds == 4
    fewer = difference(ours, RowRuns("none", "none", base.records[:4]), "accuracy")
    assert found == fewer


@pytest.mark.parametrize(("seeds", "shown"), [(1, False), (2, False), (3, True), (4, True)])
def test_intervals_and_verdicts_start_at_three_seeds(seeds: int, shown: bool) -> None:
    rows = [row("none", seeds, 0.5), row("mixup", seeds, 1.5)]
    found = difference(rows[1], rows[0], "accuracy")
    assert found is not None
    assert (found.training is not None) == (found.population is not None) == shown
    text = as_text(rows)
    assert ("intervals need at least 3" in text) != shown
    assert ("not tested" in text) != shown and ("better (few seeds)" in text) == shown
    assert ("[" in line_of(text, "mixup")[4]) == shown


def line_of(text: str, name: str) -> list[str]:
    """The cells of a row of the printed table, without those that are empty."""
    line = next(line for line in text.splitlines() if re.match(rf"{re.escape(name)}  ", line))
    return re.split(r" {2,}", line)


def test_the_printed_table_has_the_numbers_of_the_records_and_the_leading_interval() -> None:
    rows = [row("none", 12, 0.5), row("mixup", 12, 1.5), row("crop", 12, 0.51)]
    text = as_text(rows)
    for each in rows:
        name, count, accuracy, auc, *rest, cost = line_of(text, each.name)
        assert (name, count) == (each.name, "12")
        for cell, metric in ((accuracy, "accuracy"), (auc, "auc")):
            values = [100 * record.metric(metric) for record in each.records]
            assert cell == f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"
        assert cost == f"{cost_ratio(each, rows[0]):.2f}"
        found = difference(each, rows[0], "accuracy")
        if each is rows[0]:
            assert rest == []
            continue
        assert found is not None and found.population is not None
        assert rest[0] == (
            f"{found.estimate:+.2f} [{found.population.low:+.2f}, {found.population.high:+.2f}]"
        )
    (mixup, crop) = findings.of_rows(rows, 0.5)
    assert line_of(text, "mixup")[5] == mixup.told == "better"
    assert line_of(text, "crop")[5] == crop.told == "undecided"
    assert mixup.p == pytest.approx(2 * mixup.difference.variances.p_zero(), rel=1e-6)  # type: ignore[union-attr]


SAFLEX = "saflex(preset=stable, upstream=randaugment)"


@pytest.mark.parametrize("seeds", [2, 4, 10])
def test_a_table_of_long_names_fits_a_terminal_and_says_what_it_is_in_three_lines(
    seeds: int,
) -> None:
    names = ["none", "randaugment", SAFLEX, "none@train", f"none [passes of {SAFLEX}]"]
    rows = [row(name, seeds, 0.5 + place) for place, name in enumerate(names)]
    long = [replace(row, upstream="randaugment") if row.name == SAFLEX else row for row in rows]
    text = as_text(long)
    assert max(map(len, text.splitlines())) <= 100
    table = text.partition("Test scores")[2]
    assert "  upstream=randaugment)" in table and "none [passes of" in table
    notes = table.partition("difference: ")[2].splitlines()
    assert len(notes) == 3 and all(len(line) <= 100 for line in notes)
    assert notes[0] == (
        "points of accuracy over the upstream (or none); 95 % CI: other seeds and test data."
    )


def test_each_row_is_set_beside_its_own_base() -> None:
    names = ["none", "randaugment", SAFLEX, "none@train", f"none [passes of {SAFLEX}]"]
    rows = [row(name, 4, 0.5 + place) for place, name in enumerate(names)]
    found = {each.row: each for each in findings.of_rows(rows, 0.5)}
    assert {name: each.base for name, each in found.items()} == {
        "randaugment": "none", SAFLEX: "randaugment", "none@train": "none", names[4]: "none",
    }  # fmt: skip
    assert not any(each.fallback for each in found.values())
    for name, base in (("randaugment", 0), (SAFLEX, 1)):
        assert found[name].difference == difference(rows[names.index(name)], rows[base], "accuracy")
    # Without none the first row that has no base takes its place.
    (one, other) = findings.of_rows([rows[2], rows[1], row("crop", 4, 1.0)], 0.5)
    assert (one.row, one.base, one.fallback) == (SAFLEX, "randaugment", False)
    assert (other.row, other.base, other.fallback) == ("crop", "randaugment", True)
    text = as_text([row("crop", 4, 1.0), rows[1], rows[2]])
    assert "difference: points of accuracy over the upstream (or crop);" in text
    assert "over randaugment; 95 %" in as_text([rows[1], row("crop", 4, 1.0)])


def test_a_margin_decides_what_is_equivalent() -> None:
    rows = [row("none", 4, 3.0), row("mixup", 4, 3.1)]
    assert line_of(as_text(rows, margin=20), "mixup")[5] == "equivalent (few seeds)"
    assert "equivalent: within 20 points" in as_text(rows, margin=20)
    assert line_of(as_text(rows), "mixup")[5] != "equivalent (few seeds)"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (SAFLEX, "saflex(preset=stable,\n  upstream=randaugment)"),
        (f"none [passes of {SAFLEX}]",
         "none [passes of\n  saflex(preset=stable,\n  upstream=randaugment)]"),
        ("crop(pad=4)+flip+mixup(alpha=0.2)", "crop(pad=4)+flip+\n  mixup(alpha=0.2)"),
        ("a" * 40, "a" * 40),
    ],
)  # fmt: skip
def test_a_long_name_is_broken_where_a_reader_would(name: str, expected: str) -> None:
    assert comparison.folded(name, 24) == expected


def test_more_stands_in_the_verbose_tables_alone() -> None:
    rows = [row("none", 10, 0.5), row("mixup", 10, 1.5)]
    brief, full = as_text(rows), as_text(rows, verbose=True)
    for told in ("detectable", "training 95 % CI", "ECE", "passes/row", "s/epoch", "select AUC"):
        assert told not in brief and told in full
    assert full.startswith(brief)
    assert "mixup over none" in full and "Differences in test AUC" in full


def test_cost_ratio_is_the_median_over_paired_seeds() -> None:
    base, ours = row("none", 3, 0.5), row("mixup", 3, 2.0)
    assert cost_ratio(ours, base) == pytest.approx(3.0 / 1.5)


def test_undefined_metric_is_not_averaged() -> None:
    bad = record("mixup", 0, 1.0)
    bad.result["metrics"]["last"]["test"]["auc"] = None
    rows = [row("none", 1, 0.5), RowRuns("mixup", "none", (bad,))]
    assert difference(rows[1], rows[0], "auc") is None
    assert "n/a" in as_text(rows)


def test_failed_runs_are_shown_once_with_their_reason() -> None:
    failed = tuple(
        record("mixup", seed, 1.0, status="failed", reason="loss is nan at epoch 1")
        for seed in range(3)
    )
    text = as_text([row("none", 3, 0.5), RowRuns("mixup", "none", failed)])
    assert text.count("loss is nan at epoch 1") == 1
    assert "mixup: failed, seed 0: loss is nan at epoch 1 (and 2 more seeds)" in text


def test_what_a_reader_must_know_stands_below() -> None:
    rows = [row("none", 10, 0.5), row("mixup", 10, 1.5)]
    rows[0].records[0].result["data"]["verified"] = False
    text = as_text(rows)
    assert "Caveat     the same lesion in train and test\n" in text
    assert "for every test row" not in text
    assert "UNVERIFIED DATA" in text
    assert "Seeds      10; 30 are recommended for 60 test rows\n" in text
    assert "last epoch" in text and "equal steps" in text
    assert "a machine" in text


def test_heading_tells_what_differs_from_the_preset() -> None:
    made = record("none", 0, 0.5)
    training = replace(made.run.training, weight_decay=0.3, precision="bfloat16")
    changed = replace(made, run=replace(made.run, training=training))
    object.__setattr__(changed, "made", made.predictions["test_last_logits"])
    text = " ".join(as_text([RowRuns("none", "none", (changed,))]).split())
    assert "preset medmnist, weight_decay 0.3, precision bfloat16" in text


def test_a_select_auc_of_rows_that_were_trained_on_is_not_shown() -> None:
    rows = [row("none", 2, 0.5), row("head_refit", 2, 1.5)]
    for each in rows[1].records:
        each.result["data"]["select_trained"] = True
    lines = as_text(rows, verbose=True).partition("select AUC")[2].splitlines()
    assert "trained on it" in next(line for line in lines if line.startswith("head_refit"))


def test_nothing_done_is_said() -> None:
    text = as_text([RowRuns("none", "none", (), ("not done, seed 0: no room",))])
    assert text.startswith("No run") and "no room" in text


def test_selected_epoch_where_it_is_not_offered() -> None:
    text = as_text([row("none", 4, 0.5), row("mixup", 4, 1.5)], "selected")
    assert "best epoch on select" in text and "n/a" in text


def test_what_became_of_attacked_rows_is_told_of_the_rows_that_attack() -> None:
    rows = [row("none", 3, 0.5), row("lpa3", 3, 0.6), row("lpa3(warmup=9)", 3, 0.7)]
    assert "Attacked rows" not in as_text(rows, verbose=True)
    attacked = dict.fromkeys(ATTACK, 0.5) | {"attack_prediction_kept": 0.875}
    for number, each in enumerate(rows[1].records):  # the first epoch is a warm-up
        later = attacked | {"attack_distance": 0.25 * number}
        each.__dict__["lines"] = [{"log": {"attack_selected": 0.0}}, {"log": later}]
    for each in rows[2].records:
        each.__dict__["lines"] = [{"log": {"attack_selected": 0.0}}] * 2
    lines = as_text(rows, verbose=True).split("Attacked rows")[1].splitlines()
    found = [re.split(r"  +", line) for line in lines if line.startswith("lpa3")][:2]
    assert found[0] == ["lpa3", "3", "25.0", "50.0", "87.5", "50.0", "50.0", "0.250", "0.500"]
    assert found[1] == ["lpa3(warmup=9)", "3", "0.0", *["n/a"] * 6]
    text = records.to_csv((each.name, each.records) for each in rows)
    kept = [line["attack_prediction_kept"] for line in csv.DictReader(text.splitlines())]
    assert kept == ["", "", "", "0.875", "0.875", "0.875", "", "", ""]


def test_a_cost_ratio_needs_the_upstream_in_the_table() -> None:
    upstream = replace(row("saflex(upstream=crop)", 4, 1.5), upstream="crop")
    shown = as_text([row("none", 4, 0.5), upstream])
    assert line_of(shown, "saflex(upstream=crop)")[-1] == "n/a"


def test_the_calibration_error_stands_beside_accuracy() -> None:
    rows = [row("none", 3, 0.5)]
    shown = as_text(rows, verbose=True).partition("test ECE")[2]
    line = next(line for line in shown.splitlines() if line.startswith("none"))
    ece = [each.metric("ece") for each in rows[0].records]
    assert f"{np.mean(ece):.3f} ± {np.std(ece, ddof=1):.3f}" in line


def test_how_wrong_labels_were_found_is_told_of_the_rows_that_learned() -> None:
    rows = [row("none", 3, 0.5), row("autodo", 3, 0.6), row("l2rw", 3, 0.7)]
    assert "Wrong labels found" not in as_text(rows, verbose=True)
    for seed, each in enumerate(rows[1].records):
        auc = 0.7 + 0.1 * seed
        each.result["detection"] = {"weight_auc": auc, "corrected": 0.02, "spoiled": 0.0}
    rows[2].records[0].result["detection"] = {"weight_auc": 0.9}
    lines = as_text(rows, verbose=True).split("Wrong labels found")[1].splitlines()
    found = [re.split(r"  +", line) for line in lines[3:6]]
    assert found[0] == ["autodo", "3", "0.800 ± 0.100", "2.00 ± 0.00", "0.00 ± 0.00"]
    assert found[1] == ["l2rw", "1", "0.900", "n/a", "n/a"] and found[2] == [""]


def folded(method: str, seeds: int, skill: float) -> RowRuns:
    made = row(method, seeds, skill)
    for each in made.records:
        each.result["data"] |= {"folds": 5, "rows": {"select": 30, "test": 60}}
    return made


def test_over_folds_the_interval_is_that_of_repeated_cross_validation() -> None:
    base, ours = folded("none", 10, 0.5), folded("mixup", 10, 1.5)
    made = difference(ours, base, "accuracy")
    assert made is not None and made.training is None and made.population is not None
    values = [
        100 * (one.metric("accuracy") - other.metric("accuracy"))
        for one, other in zip(ours.records, base.records, strict=True)
    ]
    # 60 rows test and 30 select, so that 4 x 60 - 30 = 210 train
    se = np.std(values, ddof=1) * np.sqrt(1 / 10 + 60 / 210)
    low, high = scipy_stats.t.interval(0.95, 9, np.mean(values), se)
    assert (made.population.low, made.population.high) == pytest.approx((low, high))
    assert "95 % CI: repeated 5-fold cross-validation." in as_text([base, ours])
    shown = " ".join(as_text([base, ours], verbose=True).split())
    assert "Seed s tests on fold s mod 5" in shown and "detectable: the smallest" in shown


def test_a_repeat_that_is_not_whole_has_no_interval() -> None:
    base, ours = folded("none", 10, 0.5), folded("mixup", 10, 1.5)
    made = difference(replace(ours, records=ours.records[:9]), base, "accuracy")
    assert made is not None and made.population is None and made.variances is None
    assert made.seeds == 9 and np.isnan(made.detectable)
    shown = as_text([base, replace(ours, records=ours.records[:9])])
    assert "mixup: not tested, because a repeat of the 5 folds is incomplete" in shown
    assert "Seeds      9; 30 are recommended for 60 test rows" in shown


def test_seeds_that_are_advised_are_whole_repeats() -> None:
    assert (advised(60), advised(897)) == (30, 10)
    assert [advised(360, folds) for folds in (3, 4, 5, 7)] == [30, 32, 30, 35]


def test_runs_that_predict_one_class_alone_are_told() -> None:
    """Which a mean of 73 % hides where 73 % of the images are of that class."""
    rows = [row("none", 3, 0.5), row("mixup", 3, 1.5)]
    for seed, column in ((0, 2), (1, 0)):
        logits = np.tile(10 * np.eye(3)[column], (60, 1))
        scores = metrics.evaluate(logits, TARGETS, "multi-class")
        rows[0].records[seed].result["metrics"]["last"]["test"] = scores
    text = as_text(rows)
    assert "Caveat     none: 2 of 3 runs predict one class for every test row\n" in text
    assert "mixup: " not in text
    one_in_test = metrics.evaluate(logits, np.zeros(60, int), "multi-class")
    rows[0].records[0].result["metrics"]["last"]["test"] = one_in_test
    assert "none: 1 of 3 runs predict" in as_text(rows), "no other class was there to predict"
