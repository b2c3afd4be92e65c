"""Images of one patient: on one side of every cut, and one unit of the population interval."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from analysis import blocks, findings, plan, runs
from analysis.comparison import as_text
from analysis.differences import RowRuns, difference
from analysis.numbers import POINTS
from analysis.question import Question
from analysis.records import Damaged, Record, read
from analysis.report import results, sentences
from analysis.runs import Run, Training
from analysis.stats import Crossed, crossed
from benchmarks.data.carving import NotApplicable, carve
from benchmarks.data.dataset import Arrays, from_arrays
from benchmarks.data.download import DataError
from benchmarks.data.names import Benchmark
from benchmarks.data.splits import Protocol, Splits, make_splits
from benchmarks.data.streams import Rows
from benchmarks.running.disk import Options, execute
from tests.made import make_run

CPU = torch.device("cpu")
SHARES = {"train": 24, "val": 6, "test": 6}
"""Patients of each split."""


def patients(
    counts: dict[str, int] | None = None, images: int = 6, spanning: bool = False, edge: int = 6
) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], tuple[np.ndarray, ...]]:
    """Images and labels of each split, and whose they are; no two images are alike.

    Each patient has a texture of their own, a class that is a coin (or, spanning, images of both
    classes), and from half to one and a half times as many images.
    """
    rng = np.random.default_rng(3)
    splits, groups, number = {}, [], 0
    for split, count in (counts or SHARES).items():
        x, y, g = [], [], []
        for place in range(count):
            texture = rng.normal(128, 50, (edge, edge))
            for image in range(images + rng.integers(-images // 2, images // 2 + 1)):
                x.append(np.clip(texture + rng.normal(0, 10, (edge, edge)), 0, 255))
                y.append(image % 2 if spanning else place % 2)
                g.append(number)
            number += 1
        order = rng.permutation(len(x))
        splits[split] = (np.stack(x).astype(np.uint8)[order], np.array(y)[order])
        groups.append(np.array(g)[order])
    return splits, tuple(groups)


def stored(known: bool = True, **changes: Any) -> Arrays:
    """The arrays of such a set, with or without its patients."""
    made, groups = patients(**changes)
    three = groups[0], groups[1], groups[2]
    return from_arrays("own", *made.values(), groups=three if known else None)


def splits_of(
    source: Arrays,
    protocol: Protocol | None = None,
    seed: int = 0,
    needs_meta: bool = True,
    **changes: Any,
) -> Splits:
    return make_splits(
        source,
        Benchmark(name="own", **changes),
        protocol or Protocol(),
        needs_meta=needs_meta,
        seed=seed,
        device=CPU,
    )


def whose(source: Arrays, rows: Rows) -> set[int]:
    """The patients of some rows, found by their images, of which no two are alike."""
    groups = (source.train_groups, source.val_groups, source.test_groups)
    assert all(each is not None for each in groups)
    images = (source.train_x, source.val_x, source.test_x)
    of = {
        image.tobytes(): int(group)
        for x, own in zip(images, groups, strict=True)
        for image, group in zip(x, own, strict=True)  # type: ignore[arg-type]
    }
    shown = (rows.inputs(torch.arange(len(rows))) * 255).round().to(torch.uint8)
    return {of[image.numpy().tobytes()] for image in shown[:, 0]}


def disjoint(*sides: set[int]) -> bool:
    return len(set().union(*sides)) == sum(map(len, sides))


@pytest.mark.parametrize("spanning", [False, True])
@pytest.mark.parametrize(
    ("protocol", "changes"),
    [
        (Protocol(), {}),
        (Protocol(meta_fraction=0.4), {"rows_per_class": 60}),
        (Protocol(), {"noise": 0.3, "imbalance": 2}),
        (Protocol(name="paper"), {}),
        (Protocol(), {"folds": 3}),
        (Protocol(name="paper"), {"folds": 3}),
    ],
)
def test_no_patient_is_on_two_sides(
    protocol: Protocol, changes: dict[str, Any], spanning: bool
) -> None:
    source = stored(spanning=spanning)
    for seed in range(6):
        made = splits_of(source, protocol, seed, **changes)
        assert made.meta is not None and made.groups is not None
        train, meta, select, test = (
            whose(source, rows) for rows in (made.train, made.meta, made.select, made.test)
        )
        assert disjoint(train, select, test) and disjoint(train, meta, test)
        if protocol.name == "paper":
            assert meta == select
        else:
            assert disjoint(train, meta, select, test)
            sizes = np.bincount(made.meta.y.argmax(1).numpy())
            assert sizes.min() >= 5
        counts = [len(each) for each in (train, meta, select, test)]
        assert list(made.groups.values()) == counts
        assert list(made.groups) == ["train", "meta", "select", "test"]
        assert made.test_groups is not None and len(made.test_groups) == len(made.test)
        assert len(np.unique(made.test_groups)) == counts[3]


def test_without_patients_these_cuts_would_split_them() -> None:
    """The tests above can fail: what knows nothing of patients does split them."""
    source = stored()
    blind = replace(source, train_groups=None, val_groups=None, test_groups=None)
    for folds in (0, 3):
        made = splits_of(blind, folds=folds)
        assert made.meta is not None and made.groups is None and made.test_groups is None
        sides = [whose(source, rows) for rows in (made.train, made.meta)]
        assert not disjoint(*sides)


def test_meta_patients_are_near_the_fraction_and_those_of_the_seed() -> None:
    source = stored(counts={"train": 40, "val": 4, "test": 4})
    assert source.train_groups is not None
    found = []
    for seed in (0, 0, *range(1, 9)):
        train, meta, reason = carve(source.train_y, 0.25, seed, groups=source.train_groups)
        assert reason == "" and np.array_equal(
            np.sort([*train, *meta]), np.arange(len(train) + len(meta))
        )
        assert len(meta) / len(source.train_y) == pytest.approx(0.25, abs=0.03)
        classes = np.bincount(source.train_y[meta]) / np.bincount(source.train_y)
        assert classes == pytest.approx(0.25, abs=0.06)
        found.append(frozenset(source.train_groups[meta].tolist()))
    assert found[0] == found[1] and len(set(found)) == 9
    # each patient is meta for some seed, be they of many images or of few
    many = [carve(source.train_y, 0.25, seed, groups=source.train_groups)[1] for seed in range(60)]
    ever = set(source.train_groups[np.concatenate(many)].tolist())
    assert ever == set(source.train_groups.tolist())


def test_a_rare_class_gives_its_five_rows_where_its_patients_allow_it() -> None:
    y = np.repeat([0, 1], [300, 24])
    groups = np.concatenate([np.arange(300) // 5, 100 + np.arange(24) // 3])
    for seed in range(10):
        train, meta, reason = carve(y, 0.1, seed, groups=groups)
        assert reason == ""
        assert (y[meta] == 1).sum() >= 5 and (y[train] == 1).sum() >= 5
        assert not set(groups[meta]) & set(groups[train])


@pytest.mark.parametrize(
    ("protocol", "changes", "message"),
    [
        (
            Protocol(),
            {},
            r"the meta split takes 0.2 of each class, at least 5 rows, and leaves at least 5 to "
            r"train on, whole patients only; class 1 has 40 rows of 1 patient",
        ),
        (
            Protocol(crossfit=3),
            {},
            r"crossfit=3 needs 5 rows of each class in each fold, whole patients only; class 1 has "
            r"40 rows of 1 patient, which leaves 0 in one fold",
        ),
        (Protocol(), {"folds": 5}, r"folds=5 needs .* whole patients only; class 1 has 50 rows of"),
        (Protocol(crossfit=20), {}, r"whole patients only; got 11 patients"),
    ],
)
def test_too_few_patients_say_so(protocol: Protocol, changes: dict[str, Any], message: str) -> None:
    x = np.random.default_rng(0).integers(0, 256, (90, 6, 6), dtype=np.uint8)
    y, own = np.repeat([0, 1], [50, 40]), np.repeat([*range(10), 10], [5] * 10 + [40])
    pair = x[:60], np.repeat([0, 1], [55, 5])
    groups = own, 20 + np.repeat([0, 1], [55, 5]), 30 + np.repeat([0, 1], [55, 5])
    source = from_arrays("own", (x, y), pair, pair, groups)
    with pytest.raises(NotApplicable, match=message):
        splits_of(source, protocol, **changes)
    if protocol == Protocol() and not changes:  # the row that needs no meta rows has them all
        assert len(splits_of(source, needs_meta=False).train) == 90


def test_crossfit_keeps_patients_in_one_fold() -> None:
    source = stored()
    for seed in range(4):
        made = splits_of(source, Protocol(crossfit=3), seed)
        assert len(made.folds) == 3
        rows = torch.cat(made.folds)
        assert sorted(rows.tolist()) == list(range(len(made.train)))
        sides = [whose(source, replace(made.train, where=made.train.where[f], y=made.train.y[f]))
                 for f in made.folds]  # fmt: skip
        assert disjoint(*sides) and sum(map(len, sides)) == 24
        for fold in made.folds:
            assert len(fold) == pytest.approx(len(made.train) / 3, abs=6)
            assert np.bincount(made.train.y[fold].argmax(1).numpy()).min() >= 5
        assert made.groups == {"train": 24, "meta": 24, "select": 6, "test": 6}


def test_folds_test_each_patient_once_a_repeat_and_repeats_differ() -> None:
    source = stored()
    repeats = []
    for repeat in range(3):
        made = [splits_of(source, seed=3 * repeat + fold, folds=3) for fold in range(3)]
        tested = [whose(source, each.test) for each in made]
        assert disjoint(*tested) and len(set().union(*tested)) == 36
        for each in made:
            every = len(each.train) + len(each.select) + len(each.test)
            assert each.meta is not None
            assert len(each.select) / (every + len(each.meta)) == pytest.approx(1 / 12, abs=0.03)
            assert each.caveats[0].endswith("published ones; patients kept together")
        repeats.append({frozenset(side) for side in tested})
    assert repeats[0] != repeats[1] != repeats[2]
    blind = splits_of(stored(known=False), folds=3)
    assert blind.caveats[0].endswith("images of one patient may be on both sides")


def test_folds_leave_what_was_wrong_with_the_given_splits_behind() -> None:
    made, groups = patients()
    shared = groups[0], groups[1], np.where(groups[2] == groups[2][0], groups[0][0], groups[2])
    source = from_arrays("own", *made.values(), groups=shared)
    assert any("1 patient has images in train and test" in each for each in source.caveats)
    caveats = splits_of(source, folds=3).caveats
    assert not any("in train and test" in each for each in caveats)


def test_arrays_of_ones_own_with_patients() -> None:
    made, groups = patients()
    first, second, third = (np.array([f"P{each:03}" for each in own]) for own in groups)
    found = Splits.from_arrays(*made.values(), groups=(first, second, third), meta_fraction=0.25)
    assert found.groups is not None and found.groups["test"] == 6
    assert found.groups["train"] + found.groups["meta"] == 24
    assert Splits.from_arrays(*made.values(), meta_fraction=0.25).groups is None
    with pytest.raises(DataError, match="expected equal numbers"):
        Splits.from_arrays(*made.values(), groups=(second, first, third))


# ------------------------------------------------------------------------------ results and tables


def run_of(name: str, source: Arrays, folder: Path, epochs: int = 1, **fields: Any) -> Record:
    """A run of the tiny network on these arrays, as it lies on disk."""
    files: dict[str, np.ndarray] = {}
    for split in ("train", "val", "test"):
        files[f"{split}_images"] = getattr(source, f"{split}_x")
        files[f"{split}_labels"] = getattr(source, f"{split}_y")
        if (groups := getattr(source, f"{split}_groups")) is not None:
            files[f"{split}_groups"] = groups
    np.savez(folder / f"{name}.npz", **files)  # type: ignore[arg-type]
    benchmark = Benchmark(name="npz", path=str(folder / f"{name}.npz"))
    training = replace(Training(), epochs=epochs, batch_size=16, **fields)
    run = Run(
        benchmark="npz",
        data=name,
        model="small_cnn(width=0.25)",
        method="none",
        seed=0,
        training=training,
        versions={},
    )
    status = execute(run, {}, folder / "runs", Options(data_root=folder), benchmark)
    assert status.state == "done", status
    (record,) = read([runs.folder_of(folder / "runs", run)])
    return record


def test_a_run_says_how_many_patients_and_whose_the_test_rows_are(tmp_path: Path) -> None:
    source = stored(edge=28)
    record = run_of("known", source, tmp_path)
    assert record.result["data"]["groups"] == {"train": 24, "meta": 0, "select": 6, "test": 6}
    assert source.test_groups is not None
    assert np.array_equal(record.predictions["test_groups"], source.test_groups)
    assert record.predictions["test_groups"].dtype == np.int64 and record.patients == 6
    assert "select_groups" not in record.predictions
    blind = run_of("blind", stored(known=False, edge=28), tmp_path)
    assert "groups" not in blind.result["data"] and "test_groups" not in blind.predictions
    assert blind.patients == 0


@pytest.mark.parametrize("known", [True, False])
def test_patients_that_decide_the_class_are_learned_by_heart_only_where_they_are_split(
    tmp_path: Path, known: bool
) -> None:
    """Each patient has a texture of their own and a class that is a coin."""
    made, groups = patients({"train": 60}, images=8, edge=28)
    (x, y), (own,) = made["train"], groups
    if known:  # whole patients in each split
        sides = [np.flatnonzero(own < 32), np.flatnonzero((own >= 32) & (own < 40)),
                 np.flatnonzero(own >= 40)]  # fmt: skip
    else:
        sides = np.array_split(np.random.default_rng(0).permutation(len(x)), [250, 310])
    pieces = [(x[side], y[side]) for side in sides]
    named = (own[sides[0]], own[sides[1]], own[sides[2]])
    source = from_arrays("own", *pieces, groups=named if known else None)
    record = run_of("set", source, tmp_path, epochs=15)
    accuracy = record.metric("accuracy")
    assert accuracy < 0.75 if known else accuracy > 0.95


def rows_with_patients(
    root: Path,
    groups: np.ndarray | None,
    seeds: int = 6,
    methods: tuple[str, ...] = ("none", "mixup"),
) -> list[RowRuns]:
    """Made runs of a test split whose rows are of these patients."""
    rows = []
    for place, method in enumerate(methods):
        folders = [make_run(root, method, seed, 1 + place) for seed in range(seeds)]
        for folder in folders:
            if groups is not None:
                with_groups(folder, groups)
        rows.append(RowRuns(method, "none", tuple(read(folders))))
    return rows


def with_groups(folder: Path, groups: np.ndarray) -> None:
    """The run as if these were the patients of its test rows; mixup fails on every second one."""
    arrays = {**runs.read_arrays(folder / "predictions.npz"), "test_groups": groups}
    if "mixup" in (folder / "run.json").read_text() and len(groups) == 60:
        arrays["test_last_logits"][groups % 2 == 1] *= -1
    np.savez(folder / "predictions.npz", **arrays)  # type: ignore[arg-type]
    result = json.loads((folder / "result.json").read_text())
    count = len(np.unique(groups))
    result["data"]["groups"] = {"train": 9, "meta": 0, "select": 4, "test": count}
    result["files"]["predictions.npz"] = (folder / "predictions.npz").stat().st_size
    (folder / "result.json").write_text(json.dumps(result))


GROUPS = np.arange(60) // 3 % 12


@pytest.mark.parametrize("metric", ["accuracy", "auc"])
def test_the_population_interval_of_a_table_is_that_of_patients(
    tmp_path: Path, metric: str
) -> None:
    base, row = rows_with_patients(tmp_path, GROUPS)
    made = difference(row, base, metric)
    assert made is not None and made.patients == 12
    pairs = list(zip(row.records, base.records, strict=True))
    values = np.stack(
        [ours.item_values(metric) - theirs.item_values(metric) for ours, theirs in pairs]
    )
    targets = base.records[0].predictions["test_targets"]
    want = crossed(POINTS * values, targets, clusters=GROUPS)
    assert made.variances == want and made.population == want.interval()
    without = crossed(POINTS * values, targets)
    assert without.df_item != want.df_item
    assert made.training is not None and made.training.estimate == pytest.approx(made.estimate)


def test_a_table_says_once_that_patients_are_the_units(tmp_path: Path) -> None:
    rows = rows_with_patients(tmp_path / "known", GROUPS)
    text = " ".join(as_text(rows, verbose=True).split())
    assert "95 % CI: other seeds and patients." in text
    assert text.count("the 60 test images are from 12 patients") == 1
    blind = " ".join(as_text(rows_with_patients(tmp_path / "blind", None)).split())
    assert "95 % CI: other seeds and test data." in blind and "patient" not in blind


def block_of(rows: list[RowRuns]) -> blocks.Block:
    (block,) = blocks.split([record for row in rows for record in row.records])
    return block


def test_a_report_and_a_plan_speak_of_patients(tmp_path: Path) -> None:
    rows = rows_with_patients(tmp_path, GROUPS)
    block = block_of(rows)
    assert block.columns[0].done[0].patients == 12
    main = results.main_table(block, "accuracy", "accuracy", False, "last")
    told = "digits: the 60 test images are from 12 patients; images of one patient are not indep"
    assert [note for note in main.notes if note.startswith(told)]
    found = findings.findings(block, Question())
    (variances,) = (each.difference.variances for each in found if each.difference)
    assert isinstance(variances, Crossed) and variances.clusters == 12
    many = plan.images_needed(variances, 0.5, 0.8, 0.95)
    rest = variances.item - variances.residual
    assert many == pytest.approx(12 * rest * ((1.959964 + 0.841621) / 0.5) ** 2, abs=1)
    text = " ".join(plan.plan(list(block.done), Question(), 0.5, 0.8).split())
    assert f" {many} patients (has 12)" in text
    assert "the choice of test data (of patients, where known)" in text


def test_one_test_patient_gives_no_population_interval_and_the_reason(tmp_path: Path) -> None:
    rows = rows_with_patients(tmp_path, np.zeros(60, np.int64))
    made = difference(rows[1], rows[0], "accuracy")
    assert made is not None and made.population is None and made.variances is None
    assert made.training is not None
    text = " ".join(as_text(rows).split())
    assert "all test images are from one patient, so there is no population interval" in text
    ends = f"[{made.training.low:+.2f}, {made.training.high:+.2f}]"
    assert f"{made.estimate:+.2f} {ends} not tested" in text
    assert "95 % CI: other seeds only." in text
    block = block_of(rows)
    (found,) = findings.findings(block, Question())
    assert found.verdict == "not tested"
    assert sentences.finding(found, 0.5, 1).endswith(
        "over 6 seeds; not tested, because all test images are from one patient."
    )
    text = plan.plan(list(block.done), Question(), 0.5, 0.8)
    assert "(of at least two patients, if known)." in text


def test_patients_that_do_not_fit_the_test_rows_are_damage(tmp_path: Path) -> None:
    rows = rows_with_patients(tmp_path, np.zeros(59, np.int64), seeds=1)
    with pytest.raises(Damaged, match=r"test: groups \(59,\), 60 targets"):
        _ = rows[0].records[0].predictions
