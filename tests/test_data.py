"""Splits, corruptions, streams and the training order, against their definitions by brute force."""

from __future__ import annotations

import itertools
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from analysis.tasks import TASKS
from benchmarks.data.carving import NotApplicable, carve
from benchmarks.data.catalogue import CATALOGUE, Kind
from benchmarks.data.dataset import Arrays
from benchmarks.data.download import DataError
from benchmarks.data.names import (
    Benchmark,
    canonical,
    check_seeds,
    parse_benchmark,
)
from benchmarks.data.seeding import (
    generator,
    preserved,
    seed_global,
    seed_of,
)
from benchmarks.data.splits import Control, Protocol, Splits, make_splits
from benchmarks.data.streams import Rows, RowStream, chunks, permutation, training_order
from benchmarks.training.tasks import MultiClass, MultiLabel, task_of
from methods.naming import NamingError

CPU = torch.device("cpu")
CONTROLS: tuple[Control, ...] = get_args(Control)
COUNTS = (40, 30, 25, 60, 50)
"""Training rows of each class."""


def arrays(
    counts: tuple[int, ...] = COUNTS,
    *,
    channels: int = 1,
    multi_label: bool = False,
    floats: bool = False,
    kind: Kind = "multi-class",
) -> Arrays:
    """Small random images, no two of them alike, in mixed order."""
    rng = np.random.default_rng(len(counts))
    pieces: dict[str, Any] = {}
    for split, sizes in (("train", counts), ("val", (8,) * len(counts)), ("test", counts[::-1])):
        y = rng.permutation(np.repeat(np.arange(len(sizes)), sizes)).astype(np.int64)
        shape = (len(y), 6, 5) if channels == 1 else (len(y), 6, 5, channels)
        x = rng.integers(0, 256, shape, dtype=np.uint8)
        if floats:
            x = rng.random(shape, dtype=np.float32)
        if multi_label:
            shares = np.linspace(0.1, 0.5, len(sizes))
            y = (rng.random((len(y), len(sizes))) < shares).astype(np.uint8)
            kind = "multi-label"
        pieces |= {f"{split}_x": x, f"{split}_y": y}
    return Arrays(
        name="own",
        kind=kind,
        classes=tuple(f"class {k}" for k in range(len(counts))),
        checksum="0" * 32,
        verified=True,
        caveats=("a caveat",),
        source="here",
        notes=("a note",),
        **pieces,
    )


def splits(
    source: Arrays | None = None,
    *,
    protocol: Protocol | None = None,
    needs_meta: bool = False,
    seed: int = 0,
    control: Control = "all",
    **changes: Any,
) -> Splits:
    return make_splits(
        source or arrays(),
        Benchmark(name="own", **changes),
        protocol or Protocol(),
        needs_meta=needs_meta,
        seed=seed,
        device=CPU,
        control=control,
    )


def content(rows: Rows) -> list[bytes]:
    """What each row shows: its identity."""
    return [row.numpy().tobytes() for row in rows.inputs(torch.arange(len(rows)))]


def content_of(images: np.ndarray) -> list[bytes]:
    """The same of stored images."""
    return [each.tobytes() for each in images.astype(np.float32) / 255]


def truth(source: Arrays) -> dict[bytes, int]:
    """The stored class of every image by its content."""
    found = {}
    for x, y in ((source.train_x, source.train_y), (source.val_x, source.val_y)):
        stored = torch.from_numpy(x)[:, None].float() / 255
        found |= {row.numpy().tobytes(): int(k) for row, k in zip(stored, y, strict=True)}
    return found


def labels_of(rows: Rows) -> np.ndarray:
    """The classes of one-hot targets, which they must be."""
    assert torch.equal(rows.y.sum(1), torch.ones(len(rows)))
    assert torch.equal(rows.y.max(1).values, torch.ones(len(rows)))
    return rows.y.argmax(1).numpy()


def same_rows(one: Rows, other: Rows) -> bool:
    return content(one) == content(other) and torch.equal(one.y, other.y)


class TestEqualProtocol:
    def test_every_row_of_a_table_gets_its_part_of_one_pool(self) -> None:
        source = arrays()
        baseline = splits(source)
        method = splits(source, needs_meta=True)
        assert baseline.meta is None
        assert method.meta is not None
        pool = set(content(baseline.train))
        assert len(pool) == len(baseline.train) == sum(COUNTS)
        train, meta = content(method.train), content(method.meta)
        assert set(train) | set(meta) == pool
        assert not set(train) & set(meta)
        assert len(train) + len(meta) == len(pool)
        assert same_rows(splits(source, control="train").train, method.train)
        assert same_rows(splits(source, control="meta").train, method.meta)
        assert set(content(splits(source, control="train+meta").train)) == pool

    @pytest.mark.parametrize("needs_meta", [False, True])
    @pytest.mark.parametrize("control", CONTROLS)
    @pytest.mark.parametrize("name", ["equal", "paper"])
    def test_no_row_is_in_two_splits(self, name: Any, control: Control, needs_meta: bool) -> None:
        source = arrays()
        found = splits(source, protocol=Protocol(name=name), control=control, needs_meta=needs_meta)
        assert content(found.select) == [
            (torch.from_numpy(x)[None].float() / 255).numpy().tobytes() for x in source.val_x
        ]
        assert labels_of(found.select).tolist() == source.val_y.tolist()
        assert labels_of(found.test).tolist() == source.test_y.tolist()
        train, select, test = map(content, (found.train, found.select, found.test))
        for one, other in itertools.combinations([train, select, test], 2):
            shared = set(one) & set(other)
            # The paper protocol trains on the validation split, and says so.
            assert not shared or (name == "paper" and found.select_trained)
        assert not set(test) & set(train) | set(test) & set(select)
        assert found.select_trained == (
            name == "paper" and (needs_meta or control in ("train+meta", "meta"))
        )
        for rows in (found.train, found.meta):
            if rows is not None:
                assert len(set(content(rows))) == len(rows)
                known = truth(source)
                assert [known[each] for each in content(rows)] == labels_of(rows).tolist()

    @pytest.mark.parametrize("corruption", [{}, {"noise": 0.3, "imbalance": 2.0}])
    @pytest.mark.parametrize("name", ["equal", "paper"])
    def test_the_pool_and_so_the_steps_are_those_of_every_row(
        self, name: Any, corruption: dict[str, Any]
    ) -> None:
        found = {
            splits(
                protocol=Protocol(name=name), needs_meta=needs_meta, control=control, **corruption
            ).pool
            for needs_meta in (False, True)
            for control in CONTROLS
        }
        assert len(found) == 1
        if not corruption:
            assert found == {sum(COUNTS)}

    def test_the_meta_rows_are_the_asked_share_of_each_class(self) -> None:
        for fraction in (0.15, 0.2, 0.5):
            found = splits(needs_meta=True, protocol=Protocol(meta_fraction=fraction))
            assert found.meta is not None
            counts = np.bincount(labels_of(found.meta), minlength=5)
            assert counts.tolist() == [max(5, round(fraction * n)) for n in COUNTS]

    def test_the_same_seed_gives_the_same_split_and_another_seed_another(self) -> None:
        source = arrays()
        one, same, other = (splits(source, needs_meta=True, seed=seed) for seed in (1, 1, 2))
        assert one.meta is not None
        assert same.meta is not None
        assert other.meta is not None
        assert same_rows(one.train, same.train)
        assert same_rows(one.meta, same.meta)
        assert set(content(one.meta)) != set(content(other.meta))
        assert same_rows(one.select, other.select)
        assert same_rows(one.test, other.test)

    def test_too_few_rows_are_a_reason_for_those_who_need_meta_rows_only(self) -> None:
        source = arrays((40, 9, 30))
        for kwargs in ({"needs_meta": True}, {"control": "train"}, {"control": "meta"}):
            with pytest.raises(NotApplicable, match="class 1 has 9 rows"):
                splits(source, **kwargs)  # type: ignore[arg-type]
        assert len(splits(source).train) == 79
        assert len(splits(source, control="train+meta").train) == 79
        assert len(splits(source, needs_meta=True, protocol=Protocol(name="paper")).train) == 79

    def test_what_travels_with_the_data(self) -> None:
        found = splits()
        assert found.caveats == ("a caveat",)
        assert found.notes == ("a note",)
        assert found.kind == "multi-class"
        assert found.classes == arrays().classes
        assert found.corruption is None
        assert found.corrupted is None
        assert not found.folds


class TestPaperProtocol:
    def test_meta_is_the_whole_validation_split(self) -> None:
        source, protocol = arrays(), Protocol(name="paper")
        method = splits(source, protocol=protocol, needs_meta=True)
        assert method.meta is not None
        assert same_rows(method.meta, method.select)
        assert same_rows(splits(source, protocol=protocol).train, method.train)
        assert same_rows(splits(source, protocol=protocol, control="train").train, method.train)
        assert len(method.train) == sum(COUNTS)
        both = splits(source, protocol=protocol, control="train+meta").train
        assert content(both) == content(method.train) + content(method.meta)
        assert torch.equal(both.y, torch.cat([method.train.y, method.meta.y]))
        assert same_rows(splits(source, protocol=protocol, control="meta").train, method.meta)

    def test_meta_noise_leaves_the_select_split_clean(self) -> None:
        source = arrays()
        found = splits(source, protocol=Protocol(name="paper"), needs_meta=True, meta_noise=0.8)
        assert found.meta is not None
        assert labels_of(found.select).tolist() == source.val_y.tolist()
        assert content(found.meta) == content(found.select)
        changed = (labels_of(found.meta) != source.val_y).sum()
        assert 0 < changed <= round(0.8 * len(source.val_y))
        assert labels_of(found.train).tolist() == source.train_y.tolist()


class TestProtocol:
    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"meta_fraction": 0.0}, "meta_fraction: expected .* got 0.0"),
            ({"meta_fraction": 1.0}, "meta_fraction: expected .* got 1.0"),
            ({"crossfit": 0}, "crossfit: expected .* got 0"),
            ({"crossfit": 2, "name": "paper"}, "crossfit"),
        ],
    )
    def test_refuses(self, arguments: dict[str, Any], words: str) -> None:
        with pytest.raises(ValueError, match=words):
            Protocol(**arguments)


class TestCarve:
    def brute(self, counts: list[int], fraction: float) -> list[int] | None:
        taken = [max(5, round(fraction * n)) for n in counts]
        return taken if all(n - t >= 5 for n, t in zip(counts, taken, strict=True)) else None

    @pytest.mark.parametrize("fraction", [0.05, 0.2, 0.5, 0.7, 0.9])
    @pytest.mark.parametrize("counts", [[10, 10], [9, 20], [100, 50, 17], [16, 400, 12, 25]])
    def test_by_the_definition(self, counts: list[int], fraction: float) -> None:
        strata = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
        train, meta, reason = carve(strata, fraction, seed=3)
        assert np.array_equal(np.sort(np.concatenate([train, meta])), np.arange(len(strata)))
        taken = self.brute(counts, fraction)
        if taken is None:
            assert len(meta) == 0
            assert "at least 5 rows" in reason
        else:
            assert reason == ""
            assert np.bincount(strata[meta], minlength=len(counts)).tolist() == taken

    def test_every_row_is_as_likely(self) -> None:
        strata = np.repeat([0, 1], [12, 18])
        seen = np.zeros(30)
        for seed in range(400):
            seen[carve(strata, 0.4, seed)[1]] += 1
        assert scipy.stats.chisquare(seen[:12]).pvalue > 1e-3
        assert scipy.stats.chisquare(seen[12:]).pvalue > 1e-3

    def test_rows_of_several_labels_are_carved_by_their_rarest(self) -> None:
        source = arrays(multi_label=True)
        found = splits(source, needs_meta=True)
        assert found.meta is not None
        whole, part = source.train_y.mean(0), found.meta.y.numpy().mean(0)
        assert np.abs(whole - part).max() < 0.1
        assert found.meta.y.shape[1] == 5
        assert torch.equal(found.select.y, torch.from_numpy(source.val_y).float())


class TestStrata:
    def test_one_label_is_its_own(self) -> None:
        assert TASKS["multi-class"].strata(np.array([2, 0, 1]), 3).tolist() == [2, 0, 1]

    def test_several_labels_by_brute_force(self) -> None:
        rng = np.random.default_rng(0)
        y = (rng.random((200, 4)) < [0.5, 0.05, 0.3, 0.1]).astype(np.uint8)
        counts = y.sum(0)
        assert len(set(counts)) == 4
        for row, stratum in zip(y, TASKS["multi-label"].strata(y, 4), strict=True):
            present = np.flatnonzero(row)
            assert stratum == (min(present, key=lambda k: counts[k]) if len(present) else 4)


class TestCrossfit:
    PROTOCOL = Protocol(crossfit=3)

    def test_folds_are_a_stratified_partition(self) -> None:
        found = splits(needs_meta=True, protocol=self.PROTOCOL)
        assert len(found.folds) == 3
        joined = torch.cat(found.folds)
        assert torch.equal(joined.sort().values, torch.arange(sum(COUNTS)))
        sizes = [len(fold) for fold in found.folds]
        assert max(sizes) - min(sizes) <= 1
        for fold in found.folds:
            counts = np.bincount(labels_of(found.train)[fold.numpy()], minlength=5)
            assert all(abs(c - n / 3) < 1 for c, n in zip(counts, COUNTS, strict=True))

    def test_every_row_trains_and_is_meta_but_never_in_the_same_epoch(self) -> None:
        found = splits(needs_meta=True, protocol=self.PROTOCOL)
        rows = len(found.train)
        trained = np.zeros((3, rows), int)
        for epoch in range(9):
            order = training_order(rows, found.folds, 16, 40, epoch, seed=0, keep="train")
            drawn = torch.cat(order)
            meta = found.folds[epoch % 3]
            assert not np.isin(drawn, meta).any()
            trained[epoch % 3] += np.bincount(drawn, minlength=rows)
            only = training_order(rows, found.folds, 16, 40, epoch, seed=0, keep="meta")
            assert set(torch.cat(only).tolist()) == set(meta.tolist())
        for number, fold in enumerate(found.folds):
            assert (trained[number][fold] == 0).all()
            others = np.delete(trained[number], fold)
            # 120 batches in the epochs of a fold, ten or more passes over the other rows.
            assert others.min() >= 10
            assert others.max() - others.min() <= 1

    def test_a_control_row_holds_the_same_rows_out(self) -> None:
        source = arrays()
        method = splits(source, needs_meta=True, protocol=self.PROTOCOL)
        assert method.meta is not None
        assert same_rows(method.meta, method.train)
        for control in ("train", "meta"):
            row = splits(source, protocol=self.PROTOCOL, control=control)
            assert same_rows(row.train, method.train)
            assert all(torch.equal(a, b) for a, b in zip(row.folds, method.folds, strict=True))
        for control in ("all", "train+meta"):
            row = splits(source, protocol=self.PROTOCOL, control=control)
            assert not row.folds
            assert same_rows(row.train, method.train)

    def test_folds_are_those_of_the_seed(self) -> None:
        one, same, other = (
            splits(needs_meta=True, protocol=self.PROTOCOL, seed=seed).folds for seed in (1, 1, 2)
        )
        assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
        assert not torch.equal(one[0], other[0])

    def test_reasons(self) -> None:
        with pytest.raises(
            NotApplicable, match="crossfit=6 needs 30 rows per class, 5 in each fold; one has 29"
        ):
            splits(arrays((60, 29)), needs_meta=True, protocol=Protocol(crossfit=6))
        with pytest.raises(NotApplicable, match="clean"):
            splits(needs_meta=True, protocol=self.PROTOCOL, noise=0.1)


class TestImbalance:
    @pytest.mark.parametrize("ratio", [1.5, 2.0, 10.0, 100.0, 1000.0])
    @pytest.mark.parametrize("counts", [COUNTS, (30, 50), (30, 20, 40, 30)])
    def test_half_by_the_recipe(self, counts: tuple[int, ...], ratio: float) -> None:
        """Classes below K/2 stay; of the others floor(L / ratio) rows stay, all together."""
        source = arrays(counts)
        before = splits(source, control="train")
        after = splits(source, control="train", imbalance=ratio)
        half = len(counts) / 2
        stay = [c for c, k in zip(content(before.train), labels_of(before.train)) if k < half]  # noqa: B905
        rest = [c for c, k in zip(content(before.train), labels_of(before.train)) if k >= half]  # noqa: B905
        kept = content(after.train)
        assert [each for each in kept if each in set(stay)] == stay
        others = [each for each in kept if each not in set(stay)]
        assert set(others) <= set(rest)
        assert len(others) == min(len(rest), math.floor(len(stay) / ratio))
        assert len(set(kept)) == len(kept)

    def test_half_draws_uniformly_over_the_second_half(self) -> None:
        """Class 1 of 3 lies below 3 / 2, so that the second half is class 2 alone."""
        source, seen = arrays((60, 20, 60)), np.zeros(48)
        for seed in range(200):
            whole = splits(source, control="train", seed=seed).train
            cut = splits(source, control="train", seed=seed, imbalance=4.0).train
            assert np.bincount(labels_of(cut)).tolist() == [48, 15, (48 + 15) // 4]
            rare = np.array(content(whole), dtype=object)[labels_of(whole) == 2]
            seen += np.isin(rare, content(cut))
        assert seen.sum() == 200 * 15
        assert scipy.stats.chisquare(seen).pvalue > 1e-3

    def test_half_is_not_stratified(self) -> None:
        """Rows of the second half are drawn without regard to class: hypergeometric counts."""
        source = arrays((60, 20, 60, 20))
        drawn = []
        for seed in range(300):
            found = labels_of(splits(source, imbalance=4.0, control="train", seed=seed).train)
            drawn.append(int((found == 3).sum()))
            assert (found >= 2).sum() == (48 + 15) // 4
        law = scipy.stats.hypergeom(48 + 15, 15, (48 + 15) // 4)
        assert abs(np.mean(drawn) - law.mean()) < 4 * law.std() / math.sqrt(300)
        assert 0.7 < np.std(drawn) / law.std() < 1.3

    @pytest.mark.parametrize("ratio", [1.5, 3.0, 50.0])
    def test_stratified_cuts_each_class(self, ratio: float) -> None:
        source = arrays()
        before = labels_of(splits(source, control="train").train)
        found = splits(source, control="train", imbalance=ratio, imbalance_kind="stratified")
        counts, old = (np.bincount(each, minlength=5) for each in (labels_of(found.train), before))
        expected = [n if k < 2.5 else max(1, int(n // ratio)) for k, n in enumerate(old)]
        assert counts.tolist() == expected

    @pytest.mark.parametrize("kind", ["half", "stratified"])
    def test_meta_rows_are_not_cut(self, kind: Any) -> None:
        source = arrays()
        clean, cut = (
            splits(source, needs_meta=True, imbalance=ratio, imbalance_kind=kind).meta
            for ratio in (1.0, 10.0)
        )
        assert clean is not None
        assert cut is not None
        assert same_rows(clean, cut)


class TestNoise:
    def test_symmetric_draws_a_label_from_all_for_the_asked_share(self) -> None:
        source = arrays((400,) * 5)
        for share in (0.1, 0.5, 1.0):
            found = splits(source, control="train", noise=share)
            clean = splits(source, control="train")
            assert content(found.train) == content(clean.train)
            before, after = labels_of(clean.train), labels_of(found.train)
            rows = len(before)
            changed = (before != after).sum()
            redrawn = round(share * rows)
            assert changed <= redrawn
            # The true label is drawn too, one time in K.
            assert scipy.stats.binomtest(int(changed), redrawn, 4 / 5).pvalue > 1e-3
            table = np.zeros((5, 5))
            np.add.at(table, (before, after), 1)
            off = table[~np.eye(5, dtype=bool)]
            assert scipy.stats.chisquare(off).pvalue > 1e-3

    @pytest.mark.parametrize("share", [0.2, 0.45])
    def test_pair_moves_to_the_next_class(self, share: float) -> None:
        source = arrays()
        found = splits(source, control="train", noise=share, noise_kind="pair")
        before = labels_of(splits(source, control="train").train)
        after = labels_of(found.train)
        for label in range(5):
            of = after[before == label]
            assert set(of) <= {label, (label + 1) % 5}
            assert (of != label).sum() == round(share * len(of))

    @pytest.mark.parametrize("kind", ["symmetric", "pair"])
    def test_meta_rows_have_their_own_share(self, kind: Any) -> None:
        source = arrays((200,) * 4)
        clean = splits(source, needs_meta=True).meta
        assert clean is not None
        for share, low, high in ((0.0, 0, 0), (0.4, 0.2, 0.4)):
            found = splits(
                source, needs_meta=True, noise=0.6, noise_kind=kind, meta_noise=share
            ).meta
            assert found is not None
            assert content(found) == content(clean)
            changed = (labels_of(found) != labels_of(clean)).mean()
            assert low <= changed <= high

    def test_seeds_differ_and_repeat(self) -> None:
        one, same, other = (
            labels_of(splits(control="train", noise=0.5, seed=seed).train) for seed in (1, 1, 2)
        )
        assert np.array_equal(one, same)
        assert not np.array_equal(one, other)


CORRUPTIONS: list[dict[str, Any]] = [
    {"noise": 0.4},
    {"imbalance": 3.0},
    {"noise": 0.4, "imbalance": 3.0, "noise_kind": "pair", "imbalance_kind": "stratified"},
    {"noise": 0.3, "meta_noise": 0.5},
    {"meta_noise": 0.5},
    {"imbalance": 1000.0},
]


class TestCorruption:
    @pytest.mark.parametrize("changes", CORRUPTIONS)
    @pytest.mark.parametrize("name", ["equal", "paper"])
    def test_is_identical_for_every_method_and_recorded(
        self, name: Any, changes: dict[str, Any]
    ) -> None:
        source = arrays()
        known = truth(source)
        given: dict[bytes, int] = {}
        records = []
        for needs_meta, control in itertools.product((False, True), CONTROLS):
            found = splits(
                source,
                protocol=Protocol(name=name),
                needs_meta=needs_meta,
                control=control,
                seed=4,
                **changes,
            )
            records.append(found.corruption)
            shown, labels = content(found.train), labels_of(found.train)
            for each, label in zip(shown, labels, strict=True):
                assert given.setdefault(each, label) == label, "the same row, another label"
            # The record names exactly the rows whose label is not the stored one.
            wrong = [k for k, each in enumerate(shown) if known[each] != labels[k]]
            assert found.corrupted is not None
            assert sorted(found.corrupted["rows"].tolist()) == wrong
            for row, before, after in zip(
                *(found.corrupted[key] for key in ("rows", "before", "after")), strict=True
            ):
                assert known[shown[row]] == before
                assert labels[row] == after
        assert all(record == records[0] for record in records)

    @pytest.mark.parametrize("changes", CORRUPTIONS)
    def test_the_record_holds_the_effective_amounts(self, changes: dict[str, Any]) -> None:
        source = arrays()
        found = splits(source, needs_meta=True, **changes)
        record = found.corruption
        assert record is not None
        assert found.meta is not None
        known = truth(source)
        clean = np.array([known[each] for each in content(found.train)])
        assert record["rows"] == len(found.train)
        assert record["noise_requested"] == changes.get("noise", 0.0)
        assert record["noise_effective"] == np.mean(clean != labels_of(found.train))
        counts = np.bincount(clean, minlength=5).tolist()
        assert record["rows_of_each_class_before_noise"] == counts
        meta = np.array([known[each] for each in content(found.meta)])
        assert record["meta_noise_requested"] == changes.get("meta_noise", 0.0)
        assert record["meta_noise_effective"] == np.mean(meta != labels_of(found.meta))

    def test_the_record_tells_seeds_and_amounts_apart(self) -> None:
        found = [
            splits(noise=noise, seed=seed).corruption
            for noise, seed in ((0.4, 0), (0.4, 1), (0.5, 0))
        ]
        assert all(each is not None for each in found)
        assert len({cast("dict[str, Any]", each)["rows_md5"] for each in found}) == 3

    @pytest.mark.parametrize("changes", [{"noise": 0.1}, {"imbalance": 2.0}, {"meta_noise": 0.1}])
    def test_several_labels_a_row_are_refused(self, changes: dict[str, Any]) -> None:
        with pytest.raises(NotApplicable, match="not defined for multi-label data"):
            splits(arrays(multi_label=True), **changes)

    def test_nothing_of_the_source_is_changed(self) -> None:
        source = arrays()
        before = {f.name: np.copy(getattr(source, f.name)) for f in fields(source)}
        splits(source, needs_meta=True, noise=0.5, imbalance=2.0, meta_noise=0.5)
        for name, value in before.items():
            assert np.array_equal(getattr(source, name), value)


class TestRowsPerClass:
    def test_takes_so_many_of_each_and_the_same_for_every_seed(self) -> None:
        source = arrays()
        found = [splits(source, rows_per_class=12, seed=seed) for seed in (0, 1)]
        assert set(content(found[0].train)) == set(content(found[1].train))
        assert np.bincount(labels_of(found[0].train)).tolist() == [12] * 5
        assert set(content(found[0].train)) <= set(content(splits(source).train))
        assert found[0].pool == 60
        assert len(found[0].select) == 40

    def test_meta_rows_come_out_of_them(self) -> None:
        source = arrays()
        found = splits(source, rows_per_class=12, needs_meta=True)
        assert found.meta is not None
        assert np.bincount(labels_of(found.meta)).tolist() == [5] * 5
        whole = set(content(splits(source, rows_per_class=12).train))
        assert set(content(found.train)) | set(content(found.meta)) == whole

    def test_reasons(self) -> None:
        with pytest.raises(NotApplicable, match="rows_per_class=26: class 2 has 25 rows"):
            splits(rows_per_class=26)
        with pytest.raises(NotApplicable, match="not defined for multi-label data"):
            splits(arrays(multi_label=True), rows_per_class=5)


class TestInputs:
    @pytest.mark.parametrize("channels", [1, 3])
    @pytest.mark.parametrize("as_rgb", [False, True])
    @pytest.mark.parametrize("floats", [False, True])
    def test_become_floats_from_zero_to_one(
        self, channels: int, as_rgb: bool, floats: bool
    ) -> None:
        source = arrays(channels=channels, floats=floats)
        found = splits(source, as_rgb=as_rgb)
        index = torch.tensor([3, 0, 7])
        x = found.select.inputs(index)
        assert x.dtype == torch.float32
        shown = 3 if as_rgb else channels
        assert x.shape == (3, shown, 6, 5)
        stored = source.val_x[index.numpy()].reshape(3, 6, 5, channels).astype(np.float64)
        expected = stored if floats else stored / 255
        for channel in range(shown):
            own = expected[..., channel if channels == 3 else 0]
            assert np.allclose(x[:, channel].numpy(), own, rtol=0, atol=1e-7)
        assert found.spec.shape == (shown, 6, 5)
        assert found.spec.rows == len(found.train)
        assert found.spec.classes == 5
        assert found.spec.kind == "image"
        for rows in (found.train, found.test):
            assert rows.inputs(index).shape == (3, shown, 6, 5)

    def test_all_of_uint8_lies_in_the_unit_interval(self) -> None:
        x = torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1)
        rows = Rows(x, torch.arange(256), torch.zeros(256, 2), 1)
        got = rows.inputs(torch.arange(256)).flatten()
        assert got[0] == 0
        assert got[-1] == 1
        assert (got.diff() > 0).all()

    @pytest.mark.parametrize("channels", [1, 3])
    def test_memory_mapped_images_are_the_same(self, channels: int, tmp_path: Path) -> None:
        source = arrays(channels=channels)
        mapped = {}
        for name in ("train_x", "val_x", "test_x"):
            np.save(tmp_path / f"{name}.npy", getattr(source, name))
            mapped[name] = np.load(tmp_path / f"{name}.npy", mmap_mode="c")
        for protocol in (Protocol(), Protocol(name="paper")):
            one, other = (
                splits(each, needs_meta=True, protocol=protocol)
                for each in (source, replace(source, **mapped))
            )
            assert other.meta is not None
            assert one.meta is not None
            for a, b in zip(
                (one.train, one.meta, one.select, one.test),
                (other.train, other.meta, other.select, other.test),
                strict=True,
            ):
                assert same_rows(a, b)

    def test_a_batch_is_no_view_of_the_data(self) -> None:
        source = arrays(floats=True)
        found = splits(source)
        found.train.inputs(torch.arange(4)).zero_()
        assert found.train.inputs(torch.arange(4)).min() > 0


class TestChunks:
    @pytest.mark.parametrize("size", range(1, 9))
    @pytest.mark.parametrize("rows", range(1, 30))
    def test_by_the_definition(self, rows: int, size: int) -> None:
        found = chunks(rows, size)
        covered = [row for start, end in found for row in range(start, end)]
        assert covered == list(range(rows))
        sizes = [end - start for start, end in found]
        whole, left = divmod(rows, size)
        expected = [size] * whole + ([left] if left else [])
        if left == 1 and whole:  # a single left-over row joins the batch before
            expected = [*expected[:-2], size + 1]
        assert sizes == expected


class TestTrainingOrder:
    def sequence(
        self, rows: int, batch: int, steps: int, epochs: int, seed: int = 0
    ) -> list[Tensor]:
        return [
            each
            for epoch in range(epochs)
            for each in training_order(rows, (), batch, steps, epoch, seed, "train")
        ]

    @pytest.mark.parametrize(("rows", "batch"), [(23, 5), (21, 5), (20, 5), (4, 8), (9, 8)])
    @pytest.mark.parametrize("steps", [1, 3, 4, 7, 12])
    def test_passes_follow_one_another_wherever_an_epoch_ends(
        self, rows: int, batch: int, steps: int
    ) -> None:
        pieces = [end - start for start, end in chunks(rows, batch)]
        found = self.sequence(rows, batch, steps, epochs=9)
        assert len(found) == 9 * steps
        passes = [found[k : k + len(pieces)] for k in range(0, len(found), len(pieces))]
        for each in passes:
            assert [len(b) for b in each] == pieces[: len(each)]
            drawn = torch.cat(each).tolist()
            assert len(set(drawn)) == len(drawn)
            if len(each) == len(pieces):
                assert sorted(drawn) == list(range(rows))
        full = [torch.cat(each).tolist() for each in passes if len(each) == len(pieces)]
        if rows > 8:
            assert len({tuple(each) for each in full}) == len(full), "each pass in a new order"

    @pytest.mark.parametrize(("rows", "batch"), [(23, 5), (20, 5), (4, 9), (1, 4), (9, 8)])
    @pytest.mark.parametrize("steps", [1, 3, 7])
    def test_full_batches_run_on_into_the_next_pass(
        self, rows: int, batch: int, steps: int
    ) -> None:
        found = [
            each
            for epoch in range(9)
            for each in training_order(rows, (), batch, steps, epoch, 0, "train", full=True)
        ]
        assert [len(each) for each in found] == [batch] * 9 * steps
        passes = torch.cat(found).split(rows)
        assert all(len(set(each.tolist())) == len(each) for each in passes)
        if rows > 8:
            whole = {tuple(each.tolist()) for each in passes if len(each) == rows}
            assert len(whole) == 9 * steps * batch // rows, "each pass in a new order"

    def test_an_epoch_of_the_whole_pool_is_one_pass(self) -> None:
        steps = len(chunks(205, 16))
        for epoch in range(3):
            order = torch.cat(training_order(205, (), 16, steps, epoch, 0, "train"))
            assert torch.equal(order.sort().values, torch.arange(205))

    def test_a_subset_sees_each_of_its_rows_equally_often(self) -> None:
        """A run with fewer rows than the pool takes as many steps, and passes more often."""
        found = splits(needs_meta=True)
        steps = len(chunks(found.pool, 16))
        rows = len(found.train)
        pieces = len(chunks(rows, 16))
        assert pieces < steps
        drawn = torch.cat(self.sequence(rows, 16, steps, epochs=pieces))
        assert (torch.bincount(drawn, minlength=rows) == steps).all()

    def test_is_a_function_of_seed_and_epoch_only(self) -> None:
        one = training_order(50, (), 8, 7, 3, 1, "train")
        torch.manual_seed(99)
        np.random.default_rng(0).random()
        again = training_order(50, (), 8, 7, 3, 1, "meta")
        assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
        for other in (
            training_order(50, (), 8, 7, 3, 2, "train"),
            training_order(50, (), 8, 7, 4, 1, "train"),
        ):
            assert not torch.equal(torch.cat(one), torch.cat(other))

    def test_methods_on_the_same_rows_see_the_same_batches(self) -> None:
        source = arrays()

        def seen(epochs: int, **kwargs: Any) -> list[list[bytes]]:
            found = splits(source, seed=5, **kwargs)
            shown = content(found.train)
            steps = len(chunks(found.pool, 16))
            return [
                [shown[k] for k in each]
                for epoch in range(epochs)
                for each in training_order(
                    len(found.train), found.folds, 16, steps, epoch, 5, "train"
                )
            ]

        assert seen(3) == seen(3)
        assert seen(3, needs_meta=True) == seen(3, control="train")
        assert seen(3) != seen(3, needs_meta=True)
        assert len(seen(3)) == len(seen(3, needs_meta=True)) == len(seen(3, control="meta"))

    def test_every_order_is_as_likely(self) -> None:
        places = np.zeros((5, 5))
        for seed in range(500):
            order = torch.cat(training_order(5, (), 2, 2, 0, seed, "train"))
            places[order.numpy(), np.arange(5)] += 1
        assert scipy.stats.chisquare(places.ravel()).pvalue > 1e-3


def stream(rows: int = 40, seed: int = 0, name: str = "train", **kwargs: Any) -> RowStream:
    """Row k shows k / rows; its class goes round."""
    x = (torch.arange(rows).float() / rows).view(rows, 1, 1, 1)
    y = torch.eye(4)[torch.arange(rows) % 4]
    return RowStream(Rows(x, torch.arange(rows), y, 1), seed, name, **kwargs)


class TestRowStream:
    def test_a_batch_holds_the_rows_that_it_names(self) -> None:
        found = stream()
        for batch in (
            found.rows(torch.tensor([7, 3, 3])),
            found.draw(6),
            found.draw(7, stratified=True),
            *found.batches(9),
        ):
            n = len(batch.index)
            assert batch.index.dtype == torch.int64
            assert torch.equal(batch.x.flatten(), batch.index.float() / 40)
            assert torch.equal(batch.y.argmax(1), batch.index % 4)
            assert torch.equal(batch.w, torch.full((n,), 1 / n))
            assert batch.logits is None
        assert len(found) == 40
        assert torch.equal(found.targets.argmax(1), torch.arange(40) % 4)

    def test_the_kth_draw_is_a_function_of_seed_name_place_and_k(self) -> None:
        def draws(seed: int = 0, name: str = "train", place: Any = (1, 2, "augment")) -> list[Any]:
            found = stream(seed=seed, name=name)
            found.draw(3)  # what ran in another call does not matter
            found.move_to(*place)
            return [tuple(found.draw(10).index.tolist()) for _ in range(3)]

        first = draws()
        assert first == draws()
        assert len(set(first)) == 3, "draws of one call differ"
        for other in (
            draws(seed=1),
            draws(name="meta"),
            draws(place=(1, 3, "augment")),
            draws(place=(2, 2, "augment")),
            draws(place=(1, 2, "begin_epoch")),
        ):
            assert not set(first) & set(other)

    def test_a_draw_does_not_hang_on_the_global_generators_nor_move_them(self) -> None:
        found = stream()
        torch.manual_seed(1)
        before = torch.get_rng_state()
        state = np.random.get_state()[1].tolist()  # type: ignore[union-attr]  # noqa: NPY002
        first = [found.draw(5), found.draw(6, stratified=True), *found.batches(7)]
        assert torch.equal(torch.get_rng_state(), before)
        assert np.random.get_state()[1].tolist() == state  # type: ignore[union-attr]  # noqa: NPY002
        torch.manual_seed(2)
        found.move_to()
        again = [found.draw(5), found.draw(6, stratified=True), *found.batches(7)]
        for one, other in zip(first, again, strict=True):
            assert torch.equal(one.index, other.index)

    @pytest.mark.parametrize("stratified", [False, True])
    def test_without_replacement_and_all_rows_where_there_are_fewer(self, stratified: bool) -> None:
        found = stream()
        for n in (1, 13, 39, 40, 41, 1000):
            index = found.draw(n, stratified=stratified).index.tolist()
            assert len(index) == len(set(index)) == min(n, 40)

    @pytest.mark.parametrize("stratified", [False, True])
    def test_every_row_is_as_likely(self, stratified: bool) -> None:
        found = stream()
        seen = np.zeros(40)
        for _ in range(300):
            seen[found.draw(12, stratified=stratified).index.numpy()] += 1
        # Without replacement, counts vary less than a chi-square says: its lower tail is no fault.
        assert scipy.stats.chisquare(seen).pvalue > 1e-3

    @pytest.mark.parametrize("n", [1, 4, 7, 20, 33, 69])
    def test_stratified_counts_are_largest_remainders(self, n: int) -> None:
        sizes = np.array([40, 17, 9, 4])
        labels = torch.from_numpy(np.random.default_rng(0).permutation(np.repeat(range(4), sizes)))
        y = torch.eye(4)[labels]
        found = RowStream(Rows(torch.rand(70, 1, 2, 2), torch.arange(70), y, 1), 0, "meta")
        for _ in range(3):
            index = found.draw(n, stratified=True).index
            assert len(set(index.tolist())) == n
            got = np.bincount(labels[index].numpy(), minlength=4)
            # No other counts that add up to n lie nearer to the exact shares.
            exact = sizes * n / 70
            distance = np.abs(got - exact).max()
            assert got.sum() == n
            assert distance < 1
            best = min(
                np.abs(np.array(each) - exact).sum()
                for each in itertools.product(
                    *(range(math.floor(e), math.floor(e) + 2) for e in exact)
                )
                if sum(each) == n
            )
            assert np.abs(got - exact).sum() == pytest.approx(best)

    def test_stratified_by_the_rarest_of_several_labels(self) -> None:
        y = torch.zeros(40, 3)
        y[:20, 0], y[:10, 1], y[:5, 2] = 1, 1, 1
        rows = Rows(torch.rand(40, 1, 2, 2), torch.arange(40), y, 1)
        found = RowStream(rows, 0, "meta", kind="multi-label")
        index = found.draw(8, stratified=True).index
        strata = np.digitize(index.numpy(), [5, 10, 20])
        assert np.bincount(strata).tolist() == [1, 1, 2, 4]

    @pytest.mark.parametrize(("rows", "n"), [(40, 7), (40, 13), (40, 40), (40, 64), (40, 1)])
    def test_batches_are_one_shuffled_pass(self, rows: int, n: int) -> None:
        found = stream(rows)
        first, second = list(found.batches(n)), list(found.batches(n))
        assert [len(b.index) for b in first] == [end - start for start, end in chunks(rows, n)]
        one, other = (torch.cat([b.index for b in each]) for each in (first, second))
        assert torch.equal(one.sort().values, torch.arange(rows))
        assert not torch.equal(one, torch.arange(rows))
        assert not torch.equal(one, other)

    def test_only_active_rows_are_drawn(self) -> None:
        active = torch.tensor([1, 5, 6, 10, 30, 31, 39])
        found = stream()
        found.active = active
        assert len(found) == 7
        assert len(found.targets) == 40
        for batch in (found.draw(40), found.draw(40, stratified=True), *found.batches(40)):
            assert torch.equal(batch.index.sort().values, active)
            assert torch.equal(batch.x.flatten(), batch.index.float() / 40)
        for n in (1, 3, 6):
            index = found.draw(n, stratified=True).index
            assert len(index) == n
            assert set(index.tolist()) <= set(active.tolist())
        found.active = torch.tensor([2])
        assert found.draw(3).index.tolist() == [2]

    def test_rows_outside_the_training_split_have_no_index(self) -> None:
        inside, outside = stream(), stream(in_training=False)
        one, other = inside.draw(9), outside.draw(9)
        assert torch.equal(one.x, other.x) and torch.equal(one.y, other.y)
        assert one.index.min() >= 0 and other.index.tolist() == [-1] * 9

    def test_a_stratified_draw_is_not_sorted_by_class(self) -> None:
        classes = stream().draw(24, stratified=True).y.argmax(dim=1)
        assert torch.bincount(classes).tolist() == [6, 6, 6, 6]
        assert (classes.diff() < 0).any() and (classes.diff() > 0).any()


class TestSeeding:
    def test_a_seed_is_a_function_of_all_its_parts(self) -> None:
        seeds = [
            seed_of(*parts)
            for parts in itertools.product((0, 1, 10), ("a", "b"), (0, 1, 10), (0, 1))
        ]
        assert len(set(seeds)) == len(seeds)
        assert all(0 <= seed < 2**63 for seed in seeds)
        assert seed_of(1, "a") == seed_of(1, "a")

    def test_is_the_same_on_every_machine(self) -> None:
        """Raised versions aside, a published run must find its draws again."""
        import hashlib

        digest = hashlib.blake2b(b"3/order/0/7", digest_size=8).digest()
        assert seed_of(3, "order", 0, 7) == int.from_bytes(digest, "little") // 2

    def test_generators_are_their_own(self) -> None:
        before = torch.get_rng_state()
        one, same = (torch.rand(4, generator=generator(1, "x")) for _ in range(2))
        assert torch.equal(one, same)
        assert torch.equal(permutation(9, 1, "x"), permutation(9, 1, "x"))
        assert not torch.equal(permutation(9, 1, "x"), permutation(9, 1, "y"))
        assert torch.equal(torch.get_rng_state(), before)

    def test_the_global_generator_is_seeded_and_preserved(self) -> None:
        seed_global(CPU, 0, "augment", 1)
        first = torch.rand(3)
        with preserved(CPU):
            torch.manual_seed(5)
            torch.rand(100)
        rest = torch.rand(3)
        seed_global(CPU, 0, "augment", 1)
        assert torch.equal(torch.rand(6), torch.cat([first, rest]))
        with pytest.raises(KeyError), preserved(CPU):
            torch.rand(100)
            raise KeyError
        third = torch.rand(3)
        seed_global(CPU, 0, "augment", 1)
        torch.rand(6)
        assert torch.equal(torch.rand(3), third)


class TestTasks:
    def test_cross_entropy_by_hand_and_affine_in_the_targets(self) -> None:
        torch.manual_seed(0)
        z = 5 * torch.randn(20, 6, dtype=torch.float64)
        y, other = (torch.softmax(torch.randn(20, 6, dtype=torch.float64), 1) for _ in range(2))
        task = MultiClass()
        p = z.exp() / z.exp().sum(1, keepdim=True)
        assert torch.allclose(task.losses(z, y), -(y * p.log()).sum(1), rtol=1e-12)
        mixed = task.losses(z, 0.3 * y + 0.7 * other)
        assert torch.allclose(mixed, 0.3 * task.losses(z, y) + 0.7 * task.losses(z, other))
        labels = torch.arange(20) % 6
        plain = torch.nn.functional.cross_entropy(z, labels, reduction="none")
        assert torch.allclose(task.losses(z, torch.eye(6, dtype=torch.float64)[labels]), plain)

    def test_binary_cross_entropy_is_a_mean_over_labels(self) -> None:
        torch.manual_seed(0)
        z = 5 * torch.randn(20, 6, dtype=torch.float64)
        y, other = (torch.rand(20, 6, dtype=torch.float64) for _ in range(2))
        task = MultiLabel()
        p = 1 / (1 + (-z).exp())
        expected = -(y * p.log() + (1 - y) * (1 - p).log()).mean(1)
        assert torch.allclose(task.losses(z, y), expected, rtol=1e-10)
        mixed = task.losses(z, 0.3 * y + 0.7 * other)
        assert torch.allclose(mixed, 0.3 * task.losses(z, y) + 0.7 * task.losses(z, other))

    @pytest.mark.parametrize("task", [MultiClass(), MultiLabel()])
    def test_losses_are_finite_at_extreme_logits(self, task: Any) -> None:
        z = torch.tensor([[1e4, -1e4], [-1e4, 1e4]], requires_grad=True)
        losses = task.losses(z, torch.tensor([[0.0, 1.0], [0.0, 1.0]]))
        losses.sum().backward()
        assert losses.isfinite().all()
        assert z.grad is not None
        assert z.grad.isfinite().all()

    def test_labels_are_legal_targets(self) -> None:
        scores = torch.tensor([[2.0, 0.0, -1.0]], dtype=torch.float64)
        for temperature in (0.5, 1.0, 3.0):
            e = (scores / temperature).exp()
            assert torch.allclose(MultiClass().labels(scores, temperature), e / e.sum())
            assert torch.allclose(MultiLabel().labels(scores, temperature), e / (1 + e))

    @pytest.mark.parametrize("kind", get_args(Kind))
    def test_every_kind_has_its_task(self, kind: Kind) -> None:
        assert isinstance(task_of(kind), MultiLabel) == (kind == "multi-label")
        assert isinstance(task_of(kind), MultiClass) == (kind != "multi-label")


class TestBenchmarkNames:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("digits", "digits"),
            (" digits() ", "digits"),
            ("pneumoniamnist(size=28, noise=0.0)", "pneumoniamnist"),
            (
                "pneumoniamnist(size=64, as_rgb=True, noise=0.4, imbalance=10)",
                "pneumoniamnist(as_rgb=true, imbalance=10.0, noise=0.4, size=64)",
            ),
            ("digits(noise_kind='pair', noise=1)", "digits(noise=1.0, noise_kind=pair)"),
            ("cifar10", "cifar10"),
            ("cifar10(size=32)", "cifar10"),
            ("cifar10(size=28)", "cifar10"),
            ("digits(rows_per_class=20)", "digits(rows_per_class=20)"),
            ("npz:/tmp/a.npz", "npz"),
            ("npz:/tmp/a.npz(meta_noise=0.2)", "npz(meta_noise=0.2)"),
            ("folder:/tmp/images(size=64)", "folder(size=64)"),
        ],
    )
    def test_canonical(self, text: str, expected: str) -> None:
        found = parse_benchmark(text)
        assert canonical(found) == expected
        if not found.path:
            again = parse_benchmark(expected)
            assert canonical(again) == expected
            assert again == found

    @pytest.mark.parametrize("name", CATALOGUE)
    def test_every_data_set_at_every_size(self, name: str) -> None:
        assert canonical(parse_benchmark(name)) == name
        texts = {canonical(parse_benchmark(f"{name}(size={s})")) for s in CATALOGUE[name].sizes}
        assert len(texts) == len(CATALOGUE[name].sizes)
        assert name in texts

    @pytest.mark.parametrize(
        ("text", "path", "changes"),
        [
            ("npz:/a/b.npz", "/a/b.npz", {}),
            ("npz:/a/b.npz()", "/a/b.npz", {}),
            ("npz:/a/b.npz(noise=0.4, as_rgb=true)", "/a/b.npz", {"noise": 0.4, "as_rgb": True}),
            ("npz:/a/b.npz (noise=0.4)", "/a/b.npz", {"noise": 0.4}),
            ("npz:/a b/c (1).npz", "/a b/c (1).npz", {}),
            ("npz:/a (1)/c.npz(imbalance=2)", "/a (1)/c.npz", {"imbalance": 2.0}),
            ("npz:/a/x+y,z.npz", "/a/x+y,z.npz", {}),
            ("folder:/a/(b)", "/a/(b)", {}),
            ("folder:/a/b/(size=64)", "/a/b", {"size": 64}),
        ],
    )
    def test_a_path_may_have_arguments_behind_it(
        self, text: str, path: str, changes: dict[str, Any]
    ) -> None:
        found = parse_benchmark(text)
        kind = text.partition(":")[0]
        assert found == Benchmark(name=kind, path=path, **changes)
        assert path not in canonical(found)

    def test_a_path_is_made_absolute(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", "/home/somebody")
        assert parse_benchmark("npz:a.npz").path == str(tmp_path / "a.npz")
        assert parse_benchmark("npz:~/a.npz").path == "/home/somebody/a.npz"

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("digitz", ["unknown benchmark 'digitz'", "did you mean 'digits'?", "npz:FILE"]),
            ("npz:", ["path after npz:"]),
            ("folder:(size=28)", ["path after folder:"]),
            ("digits+cifar10", ["not a chain"]),
            ("digits(nois=0.1)", ["benchmark 'digits'", "'nois'", "did you mean 'noise'?"]),
            ("npz:/a.npz(nois=0.1)", ["benchmark 'npz'", "did you mean 'noise'?"]),
            ("digits(path=x)", ["no argument 'path'"]),
            ("digits(size=32)", ["size: expected one of 28", "got 32"]),
            ("pneumoniamnist(size=30)", ["size: expected one of 28, 64, 128, 224", "got 30"]),
            ("cifar10(size=64)", ["size: expected one of 32", "got 64"]),
            ("folder:/a(size=4)", ["size: expected a number from 8", "got 4"]),
            ("digits(noise=1.1)", ["noise: expected a number from 0 to 1", "got 1.1"]),
            ("digits(noise=-0.1)", ["noise: expected a number from 0 to 1", "got -0.1"]),
            ("digits(meta_noise=2)", ["meta_noise: expected a number from 0 to 1", "got 2"]),
            ("digits(imbalance=0.5)", ["imbalance: expected a number from 1", "got 0.5"]),
            ("digits(rows_per_class=-1)", ["rows_per_class: expected a number from 0", "got -1"]),
            ("digits(noise_kind=odd)", ["noise_kind: expected symmetric or pair", "got odd"]),
            ("digits(imbalance_kind=odd)", ["imbalance_kind: expected half or", "got odd"]),
            ("digits(as_rgb=3)", ["as_rgb: expected true or false", "got 3"]),
        ],
    )
    def test_an_error_names_the_field_what_was_got_and_what_is_allowed(
        self, text: str, words: list[str]
    ) -> None:
        with pytest.raises(NamingError) as caught:
            parse_benchmark(text)
        assert all(word in str(caught.value) for word in words), caught.value

    @pytest.mark.parametrize("text", ["digits(name=x)", "digits(path='x')"])
    def test_name_and_path_are_no_arguments(self, text: str) -> None:
        with pytest.raises(NamingError, match=r"no argument .* \(it takes size, as_rgb, folds"):
            parse_benchmark(text)


def test_from_arrays_in_three_lines() -> None:
    rng = np.random.default_rng(0)
    pair = rng.integers(0, 256, (60, 8, 8), dtype=np.uint8), np.arange(60) % 3
    found = Splits.from_arrays(pair, pair, pair, meta_fraction=0.25)
    assert (len(found.train), len(found.select), len(found.test)) == (45, 60, 60)
    assert found.meta is not None and len(found.meta) == 15
    assert found.spec.classes == 3 and found.spec.shape == (1, 8, 8)
    with pytest.raises(DataError, match="expected equal numbers"):
        Splits.from_arrays((pair[0], pair[1][:-1]), pair, pair)


@pytest.mark.parametrize("multi_label", [False, True])
def test_folds_test_every_stored_row_once_a_repeat_and_leave_a_tenth_to_select(
    multi_label: bool,
) -> None:
    source = arrays(multi_label=multi_label)
    stored = [source.train_x, source.val_x, source.test_x]
    every = sorted(content_of(np.concatenate(stored)))
    for repeat in range(2):
        tested: list[bytes] = []
        for seed in range(5 * repeat, 5 * repeat + 5):
            made = splits(source, folds=5, seed=seed)
            parts = [content(each) for each in (made.train, made.select, made.test)]
            assert sorted(each for part in parts for each in part) == every
            assert len(made.test) == pytest.approx(len(every) / 5, abs=1)
            assert len(made.select) == pytest.approx(len(every) / 10, abs=5)
            assert made.caveats[0].startswith("repeated stratified 5-fold cross-validation")
            tested += parts[2]
        assert sorted(tested) == every
    first, again = (content(splits(source, folds=5, seed=seed).test) for seed in (0, 5))
    assert set(first) != set(again)


def test_folds_keep_classes_and_labels() -> None:
    source = arrays()
    known = {
        image: label
        for x, y in (
            (source.train_x, source.train_y),
            (source.val_x, source.val_y),
            (source.test_x, source.test_y),
        )
        for image, label in zip(content_of(x), y, strict=True)
    }
    every = np.bincount(list(known.values()))
    for seed in range(5):
        made = splits(source, folds=5, seed=seed, needs_meta=True)
        assert made.meta is not None
        for part in (made.train, made.meta, made.select, made.test):
            assert [known[each] for each in content(part)] == part.y.argmax(1).tolist()
        tested = np.bincount(made.test.y.argmax(1).numpy())
        assert (abs(tested - every / 5) < 1).all()


def test_folds_of_a_class_with_too_few_rows_say_so() -> None:
    source = arrays((40, 2))
    with pytest.raises(NotApplicable, match=r"folds=11 needs 55 rows per class.*one has 50"):
        splits(source, folds=11)


def test_repeats_are_whole() -> None:
    benchmark = parse_benchmark("breastmnist(folds=5)")
    check_seeds(benchmark, range(10))
    check_seeds(benchmark, range(15, 20))
    check_seeds(parse_benchmark("breastmnist"), range(3))
    for seeds in (range(3), range(2, 7), [0, 0, 1, 2, 3]):
        with pytest.raises(NamingError, match="expected seeds in whole repeats of 5"):
            check_seeds(benchmark, seeds)
    with pytest.raises(NamingError, match="folds: expected a number from 2 to 20, got 1"):
        parse_benchmark("breastmnist(folds=1)")
    with pytest.raises(NamingError, match="keep images of one patient, scan or slide"):
        parse_benchmark("organamnist(folds=5)")


def test_rows_that_were_corrupted_are_found_in_the_stored_data_over_folds() -> None:
    source = arrays()
    stored = content_of(np.concatenate([source.train_x, source.val_x, source.test_x]))
    made = splits(source, folds=5, noise=0.4, seed=3)
    assert made.corrupted is not None
    where = made.corrupted["stored_rows"]
    assert [stored[row] for row in where] == content(made.train)
