"""Flip, crop, mixup and cutmix row by row against slow references; chains; head_refit's optimum."""

from __future__ import annotations

import itertools
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.data.seeding import seed_global
from benchmarks.data.streams import Rows, RowStream
from benchmarks.training.tasks import MultiClass, MultiLabel
from methods import build
from methods.base import Batch, Chain, Context, Method, Model, Spec, Task, overrides
from methods.classic import Crop, CutMix, Flip, Mixup, Rotate90
from methods.controls import DECAYS, HeadRefit, chosen_decay, refit

NO_CONTEXT: Any = None
"""Classic augmentations look at nothing but the batch."""

NAMES = ["none", "flip", "crop", "crop(mode=reflect, pad=3)", "mixup", "cutmix", "crop+flip+mixup"]


def batch_of(
    rows: int, channels: int = 1, height: int = 6, width: int = 6, classes: int = 0
) -> Batch:
    """Pixels that are all different and above 0, in float64; each row is a class of its own."""
    generator = torch.Generator().manual_seed(rows + channels)
    count = rows * channels * height * width
    x = (torch.randperm(count, generator=generator) + 1).double() / count
    y = torch.eye(rows, dtype=torch.float64)
    if classes:
        labels = torch.randint(classes, (rows,), generator=generator)
        y = torch.eye(classes, dtype=torch.float64)[labels]
    w = torch.rand(rows, generator=generator)
    index = torch.randperm(rows, generator=generator)
    index[::3] = -1
    return Batch(x=x.view(rows, channels, height, width), y=y, w=w, index=index)


def run(method: Method, batch: Batch, seed: int = 0) -> Batch:
    torch.manual_seed(seed)
    return method.augment(batch, NO_CONTEXT)


def uniform(counts: np.ndarray) -> float:
    return float(scipy.stats.chisquare(counts).pvalue)


def independent(one: np.ndarray, other: np.ndarray) -> float:
    table = np.zeros((int(one.max()) + 1, int(other.max()) + 1))
    np.add.at(table, (one, other), 1)
    expected = scipy.stats.contingency.expected_freq(table)
    squares = float(((table - expected) ** 2 / expected).sum())
    return float(scipy.stats.chi2.sf(squares, (table.shape[0] - 1) * (table.shape[1] - 1)))


class TestEveryOne:
    @pytest.mark.parametrize("channels", [1, 3])
    @pytest.mark.parametrize("name", NAMES)
    def test_changes_nothing_in_place_and_keeps_what_is_not_its_own(
        self, name: str, channels: int
    ) -> None:
        batch = batch_of(32, channels, 8, 10, classes=4)
        before = {f.name: getattr(batch, f.name) for f in fields(batch)}
        copies = {name: value.clone() for name, value in before.items() if value is not None}
        out = run(build(name), batch)
        for key, value in before.items():
            assert getattr(batch, key) is value
            if value is not None:
                assert torch.equal(value, copies[key])
        assert torch.equal(out.w, batch.w)
        assert torch.equal(out.index, batch.index)
        assert out.logits is None
        assert out.x.shape == batch.x.shape
        assert out.y.shape == batch.y.shape
        assert (out.x.dtype, out.y.dtype) == (batch.x.dtype, batch.y.dtype)
        assert out.x.min() >= 0
        assert out.x.max() <= 1

    @pytest.mark.parametrize("name", NAMES)
    def test_is_a_function_of_the_global_seed(self, name: str) -> None:
        batch = batch_of(64, 3, classes=4)
        device = torch.device("cpu")
        seed_global(device, 0, "augment", 1, 2)
        first = build(name).augment(batch, NO_CONTEXT)
        torch.rand(7)
        seed_global(device, 0, "augment", 1, 2)
        again = build(name).augment(batch, NO_CONTEXT)
        seed_global(device, 0, "augment", 1, 3)
        later = build(name).augment(batch, NO_CONTEXT)
        assert torch.equal(first.x, again.x)
        assert torch.equal(first.y, again.y)
        assert torch.equal(first.x, later.x) == (name == "none")

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_rows_of_y_stay_on_the_simplex(self, name: str, dtype: torch.dtype) -> None:
        batch = batch_of(500, classes=7)
        y = torch.softmax(torch.randn(500, 7, dtype=dtype), 1)
        for targets in (batch.y.to(dtype), y):
            out = run(build(name), replace(batch, x=batch.x.to(dtype), y=targets))
            assert out.y.dtype == dtype
            assert out.y.min() >= 0
            assert (out.y.sum(1) - 1).abs().max() < 8 * torch.finfo(dtype).eps

    @pytest.mark.parametrize("name", NAMES)
    def test_several_labels_a_row_stay_in_the_unit_interval(self, name: str) -> None:
        batch = batch_of(500)
        y = (torch.rand(500, 5, generator=torch.Generator().manual_seed(0)) < 0.4).float()
        out = run(build(name), replace(batch, x=batch.x.float(), y=y))
        assert out.y.min() >= 0
        assert out.y.max() <= 1
        if "mix" not in name:
            assert torch.equal(out.y, y)

    @pytest.mark.parametrize("name", NAMES)
    def test_one_row_is_enough(self, name: str) -> None:
        batch = batch_of(1, 3, 8, 8)
        out = run(build(name), batch)
        assert out.x.shape == batch.x.shape
        assert torch.allclose(out.y, batch.y, atol=1e-15)

    @pytest.mark.parametrize("name", ["flip", "crop", "crop(mode=reflect)", "cutmix"])
    def test_images_are_asked_for(self, name: str) -> None:
        vector = Spec(rows=10, classes=2, shape=(5,), kind="vector")
        assert "needs images, but the data are vectors" in build(name).supports(
            MultiClass(), vector
        )
        assert build(f"none+{name}").supports(MultiClass(), vector)
        assert not build("mixup").supports(MultiClass(), vector)
        image = Spec(rows=10, classes=2, shape=(1, 28, 28))
        assert build(name).supports(MultiClass(), image) == ""

    def test_mixup_takes_vectors(self) -> None:
        batch = batch_of(50)
        flat = replace(batch, x=batch.x.flatten(1))
        assert torch.equal(run(Mixup(), flat).x, run(Mixup(), batch).x.flatten(1))


class TestFlip:
    def flipped(self, out: Tensor, x: Tensor) -> np.ndarray:
        """Which rows are mirrored; every row is one or the other, in all channels."""
        found = []
        for row, original in zip(out.numpy(), x.numpy(), strict=True):
            mirrored = original[:, :, ::-1]
            assert np.array_equal(row, original) != np.array_equal(row, mirrored)
            found.append(np.array_equal(row, mirrored))
        return np.array(found)

    @pytest.mark.parametrize("channels", [1, 3])
    @pytest.mark.parametrize("p", [0.0, 0.25, 0.5, 1.0])
    def test_each_row_with_its_probability(self, p: float, channels: int) -> None:
        batch = batch_of(4000, channels, 2, 5)
        out = run(Flip(p=p), batch)
        assert torch.equal(out.y, batch.y)
        found = self.flipped(out.x, batch.x)
        assert scipy.stats.binomtest(int(found.sum()), 4000, p).pvalue > 1e-3
        if 0 < p < 1:
            assert independent(found[:-1].astype(int), found[1:].astype(int)) > 1e-3


class TestRotate90:
    def turned(self, out: Tensor, x: Tensor) -> np.ndarray:
        """(rows,) quarter turns of each row; every row is exactly one of the four."""
        same = [torch.rot90(x, k, (2, 3)).eq(out).flatten(1).all(dim=1) for k in range(4)]
        matches = torch.stack(same)
        assert (matches.sum(dim=0) == 1).all(), "a row is none of the turns, or several"
        return matches.int().argmax(dim=0).numpy()

    @pytest.mark.parametrize("channels", [1, 3])
    def test_every_turn_is_as_likely_and_rows_are_independent(self, channels: int) -> None:
        batch = batch_of(4000, channels, 3, 3)
        out = run(Rotate90(), replace(batch, y=batch.w[:, None]))
        found = self.turned(out.x, batch.x)
        counts = np.bincount(found, minlength=4)
        assert counts.min() > 0
        assert uniform(counts) > 1e-3
        assert independent(found[:-1], found[1:]) > 1e-3

    @pytest.mark.parametrize("channels", [1, 3])
    def test_only_the_inputs_change_and_not_in_place(self, channels: int) -> None:
        batch = batch_of(40, channels, 5, 5, classes=4)
        copies = {f.name: getattr(batch, f.name) for f in fields(batch) if f.name != "logits"}
        copies = {name: value.clone() for name, value in copies.items()}
        out = run(build("rotate90"), batch)
        assert not torch.equal(out.x, batch.x)
        assert out.x.dtype == batch.x.dtype
        assert torch.equal(batch.x, copies["x"])
        for name in ("y", "w", "index"):
            assert torch.equal(getattr(batch, name), copies[name])
            assert torch.equal(getattr(out, name), copies[name])
        assert out.logits is None

    def test_is_a_function_of_the_global_seed(self) -> None:
        batch = batch_of(40)
        first, again, later = (run(Rotate90(), batch, seed).x for seed in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, later)

    def test_captions_tell_the_turn_of_each_row(self) -> None:
        method, batch = Rotate90(), batch_of(40)
        assert method.captions() == []
        found = self.turned(run(method, batch).x, batch.x)
        texts = ["", "turned 90°", "turned 180°", "turned 270°"]
        assert method.captions() == [texts[turns] for turns in found]
        assert set(method.captions()) == set(texts)

    def test_square_images_are_asked_for(self) -> None:
        for method in (Rotate90(), build("none+rotate90"), build("rotate90+flip")):
            for shape in ((1, 28, 28), (3, 8, 8)):
                spec = Spec(rows=10, classes=2, shape=shape)
                assert method.supports(MultiClass(), spec) == ""
            wide = Spec(rows=10, classes=2, shape=(3, 28, 32))
            reason = method.supports(MultiClass(), wide)
            assert reason == "rotate90 needs square images, but the images have size (28, 32)"
            vector = Spec(rows=10, classes=2, shape=(5,), kind="vector")
            reason = method.supports(MultiClass(), vector)
            assert reason == "rotate90 needs images, but the data are vectors"


class TestCrop:
    def offsets(self, out: Tensor, x: Tensor, pad: int, mode: Any) -> np.ndarray:
        """(rows, 2) place of each row's window among all (2 pad + 1)^2, found by search."""
        height, width = x.shape[2:]
        edges = [(0, 0), (0, 0), (pad, pad), (pad, pad)]
        padded = np.pad(x.numpy(), edges, mode=mode)
        found = np.full((len(x), 2), -1)
        matches = np.zeros(len(x), int)
        for down, right in itertools.product(range(2 * pad + 1), repeat=2):
            window = padded[:, :, down : down + height, right : right + width]
            same = (window == out.numpy()).all(axis=(1, 2, 3))
            found[same], matches = (down, right), matches + same
        assert (matches == 1).all(), "a row is none of the windows, or not told from another"
        return found

    @pytest.mark.parametrize(
        ("name", "pad", "mode", "channels"),
        [
            ("crop", 4, "constant", 1),
            ("crop", 4, "constant", 3),
            ("crop(mode=reflect, pad=4)", 4, "reflect", 1),
            ("crop(pad=1)", 1, "constant", 3),
        ],
    )
    def test_every_window_is_as_likely_and_rows_are_independent(
        self, name: str, pad: int, mode: str, channels: int
    ) -> None:
        places = 2 * pad + 1
        batch = batch_of(40 * 81, channels, 6, 7)
        out = run(build(name), replace(batch, y=batch.w[:, None]))
        found = self.offsets(out.x, batch.x, pad, mode)
        down, right = found.T
        counts = np.bincount(down * places + right, minlength=places**2)
        assert len(counts) == places**2
        assert counts.min() > 0
        assert uniform(counts) > 1e-3
        assert independent(down[:-1], down[1:]) > 1e-3
        assert independent(right[:-1], right[1:]) > 1e-3
        assert independent(down, right) > 1e-3

    def test_reflection_needs_more_pixels_than_it_pads(self) -> None:
        crop = Crop(pad=4, mode="reflect")
        for size, fits in ((4, False), (5, True)):
            spec = Spec(rows=1, classes=2, shape=(1, 9, size))
            assert (crop.supports(MultiClass(), spec) == "") == fits
        run(crop, batch_of(2, 1, 9, 5))
        with pytest.raises(ValueError, match=r"above 4 pixels, got \(9, 4\)"):
            run(crop, batch_of(2, 1, 9, 4))


class TestMixup:
    def shares(self, out: Batch, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """(rows,) partner and share of each row, read off its targets; x must agree with them."""
        y, x = out.y.numpy(), batch.x.numpy()
        rows = len(y)
        partners, shares = np.empty(rows, int), np.empty(rows)
        for row in range(rows):
            others = np.flatnonzero(np.delete(y[row], row))
            assert len(others) <= 1
            partner = row if not len(others) else int(others[0] + (others[0] >= row))
            share = y[row, row]
            expected = share * x[row] + (1 - share) * x[partner] if partner != row else x[row]
            assert np.allclose(out.x[row].numpy(), expected, rtol=0, atol=1e-14)
            partners[row], shares[row] = partner, share if partner != row else np.nan
        return partners, shares

    @pytest.mark.parametrize(("alpha", "channels"), [(0.2, 1), (1.0, 3), (4.0, 1)])
    def test_shares_are_beta_and_partners_a_permutation(self, alpha: float, channels: int) -> None:
        batch = batch_of(1500, channels, 2, 2)
        partners, shares = self.shares(run(Mixup(alpha=alpha), batch), batch)
        assert sorted(partners) == list(range(1500))
        assert np.count_nonzero(partners == np.arange(1500)) < 10
        drawn = shares[~np.isnan(shares)]
        assert len(np.unique(drawn[(drawn > 1e-3) & (drawn < 0.999)])) > 800, "one draw a row"
        assert scipy.stats.kstest(drawn, scipy.stats.beta(alpha, alpha).cdf).pvalue > 1e-3
        above = (drawn > 0.5).astype(int)
        assert independent(above[:-1], above[1:]) > 1e-3

    def test_inputs_and_targets_mix_by_the_same_share(self) -> None:
        """Also where several rows are of one class, and in float32."""
        batch = batch_of(300, 3, classes=4)
        batch = replace(batch, x=batch.x.float(), y=batch.y.float())
        torch.manual_seed(5)
        partner = torch.randperm(300)
        concentration = torch.full((300,), 0.7)
        share = torch.distributions.Beta(concentration, concentration).sample()
        out = run(Mixup(alpha=0.7), batch, seed=5)
        for row in range(300):
            r, other = share[row], partner[row]
            assert torch.allclose(out.x[row], r * batch.x[row] + (1 - r) * batch.x[other])
            assert torch.allclose(out.y[row], r * batch.y[row] + (1 - r) * batch.y[other])

    @pytest.mark.parametrize("alpha", [1e-3, 0.05, 1e4])
    def test_extreme_shares_are_finite(self, alpha: float) -> None:
        batch = batch_of(500, classes=3)
        for method in (Mixup(alpha=alpha), CutMix(alpha=alpha)):
            out = run(method, replace(batch, x=batch.x.float(), y=batch.y.float()))
            assert out.x.isfinite().all()
            assert (out.y.sum(1) - 1).abs().max() < 1e-6


class TestCutMix:
    def rectangles(self, out: Batch, batch: Batch) -> np.ndarray:
        """(rows, 4) top, left, height and width of what was pasted; 0 where it was nothing.

        Pixels are all different, so that each of the output tells where it came from.
        """
        rows, channels, height, width = batch.x.shape
        values, order = np.sort(batch.x.numpy().ravel()), np.argsort(batch.x.numpy().ravel())
        came_from = order[np.searchsorted(values, out.x.numpy().ravel())]
        donor, place = np.divmod(came_from.reshape(out.x.shape), channels * height * width)
        expected = np.arange(channels * height * width).reshape(1, channels, height, width)
        assert (place == expected).all(), "a pixel has moved or is no pixel of any row"
        found = np.zeros((rows, 4), int)
        for row in range(rows):
            mask = donor[row] != row
            assert (mask == mask[:1]).all(), "channels are pasted together"
            mask = mask[0]
            others = np.unique(donor[row][:, mask])
            assert len(others) <= 1, "one partner a row"
            down, right = mask.any(axis=1), mask.any(axis=0)
            assert np.array_equal(mask, np.outer(down, right))
            for line in (down, right):
                places = np.flatnonzero(line)
                assert not len(places) or np.ptp(places) + 1 == len(places), "not a rectangle"
            share = np.zeros(rows)
            share[others] = mask.mean()
            share[row] += 1 - mask.mean()
            assert np.allclose(out.y[row].numpy(), share, rtol=0, atol=1e-15)
            if mask.any():
                found[row] = down.argmax(), right.argmax(), down.sum(), right.sum()
        return found

    @pytest.mark.parametrize(
        ("alpha", "channels", "height", "width"),
        [(1.0, 1, 8, 8), (1.0, 3, 6, 11), (0.3, 1, 7, 5)],
    )
    def test_a_rectangle_is_pasted_and_targets_mix_by_its_area(
        self, alpha: float, channels: int, height: int, width: int
    ) -> None:
        batch = batch_of(600, channels, height, width)
        found = self.rectangles(run(CutMix(alpha=alpha), batch), batch)
        assert len(np.unique(found, axis=0)) > 50, "one rectangle a row"

    def test_sides_and_places_have_the_distribution_of_the_paper(self) -> None:
        """Sides sqrt(1 - r) with r ~ U(0, 1), whole pixels, around a uniform centre, cut off."""
        size, rows = 8, 3000
        batch = batch_of(rows, 1, size, size)
        found = self.rectangles(run(CutMix(alpha=1.0), batch), batch)
        expected: dict[tuple[int, int], float] = {}
        for side in range(size):  # P(side = s) = P(s <= size sqrt(u) < s + 1)
            chance = ((side + 1) ** 2 - side**2) / size**2
            for tops in itertools.product(range(size), repeat=2):
                spans = []
                for centre in tops:
                    start = centre - side // 2
                    spans.append(max(0, min(size, start + side) - max(0, start)))
                key = (spans[0], spans[1]) if all(spans) else (0, 0)
                expected[key] = expected.get(key, 0) + chance / size**2
        keys = sorted(expected)
        seen = dict.fromkeys(keys, 0)
        for key in map(tuple, found[:, 2:].tolist()):
            seen[key] += 1  # a pair of sides that cannot be raises
        # A row that is its own partner shows no rectangle, whatever was pasted.
        observed = np.array([seen[key] for key in keys], dtype=float)
        chances = np.array([expected[key] for key in keys])
        assert chances.sum() == pytest.approx(1)
        assert (chances * rows).min() >= 5
        assert scipy.stats.chisquare(observed, chances * rows).pvalue > 1e-3
        inner = found[(found[:, 2] == 2) & (found[:, 3] == 2)]
        assert independent(inner[:, 0], inner[:, 1]) > 1e-3


class Recorder(Method):
    """Adds ``add`` to the inputs and writes down every call."""

    def __init__(self, log: list[str], name: str, add: float = 0.0, times: float = 1.0) -> None:
        super().__init__()
        self.log, self.name, self.add, self.times = log, name, add, times
        self.hands_logits = False
        self.reason = ""

    def supports(self, task: Any, spec: Spec) -> str:
        self.log.append(f"{self.name}.supports")
        return self.reason

    def setup(self, ctx: Context) -> None:
        self.log.append(f"{self.name}.setup")

    def begin_epoch(self, ctx: Context) -> None:
        self.log.append(f"{self.name}.begin_epoch")

    def finish(self, ctx: Context) -> None:
        self.log.append(f"{self.name}.finish")

    def augment(self, batch: Batch, ctx: Context) -> Batch:
        self.log.append(f"{self.name}.augment")
        x = batch.x * self.times + self.add
        return replace(batch, x=x, logits=batch.y if self.hands_logits else batch.logits)


class OwnLoss(Recorder):
    """A recorder with a loss of its own."""

    def losses(self, logits: Tensor, batch: Batch, ctx: Context) -> Tensor:
        self.log.append(f"{self.name}.losses")
        return logits.sum(1) * 0 + 7


class Above(Method):
    """A method that leaves everything to its upstream."""

    needs = frozenset({"meta"})

    def augment(self, batch: Batch, ctx: Context) -> Batch:
        return self.upstream.augment(batch, ctx) if self.upstream is not None else batch


class AboveWithoutMeta(Above):
    """The same as a link of a chain may be."""

    needs = frozenset()


class TestComposition:
    def test_links_run_in_order_at_every_hook(self) -> None:
        log: list[str] = []
        chain = Chain([Recorder(log, "a", add=1), Recorder(log, "b", times=2)])
        batch = batch_of(4)
        above = Above(chain)
        assert above.supports(MultiClass(), Spec(rows=4, classes=4, shape=(1, 6, 6))) == ""
        above.setup(NO_CONTEXT)
        above.begin_epoch(NO_CONTEXT)
        out = above.augment(batch, NO_CONTEXT)
        above.finish(NO_CONTEXT)
        hooks = ("supports", "setup", "begin_epoch", "augment", "finish")
        assert log == [f"{name}.{hook}" for hook in hooks for name in ("a", "b")]
        assert torch.equal(out.x, (batch.x + 1) * 2)

    def test_the_first_reason_is_given(self) -> None:
        links = [Recorder([], name) for name in "abc"]
        links[1].reason, links[2].reason = "b cannot", "c cannot"
        spec = Spec(rows=4, classes=4, shape=(1, 6, 6))
        assert Above(Chain(list(links))).supports(MultiClass(), spec) == "b cannot"

    def test_losses_are_those_of_the_one_link_that_has_its_own(self) -> None:
        ctx: Any = SimpleNamespace(task=MultiClass())
        batch, logits = batch_of(4, classes=3), torch.randn(4, 3).double()
        plain = -(batch.y * torch.log(logits.exp() / logits.exp().sum(1, keepdim=True))).sum(1)
        for links, own in (
            ([Recorder([], "a"), Recorder([], "b")], False),
            ([OwnLoss([], "a"), Recorder([], "b")], True),
            ([Recorder([], "a"), OwnLoss([], "b")], True),
            ([Recorder([], "a"), AboveWithoutMeta(OwnLoss([], "b"))], True),
            ([Recorder([], "a"), Chain([OwnLoss([], "b"), Recorder([], "c")])], True),
        ):
            for method in (Chain(list(links)), Above(Chain(list(links)))):
                got = method.losses(logits, batch, ctx)
                assert torch.allclose(got, torch.full((4,), 7.0).double() if own else plain)
                assert overrides(method, "losses") == own

    def test_two_losses_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"\['ownloss', 'above'\]"):
            Chain([OwnLoss([], "a"), Recorder([], "b"), Above(OwnLoss([], "c"))])

    def test_one_link_is_no_chain(self) -> None:
        with pytest.raises(ValueError, match="at least two links"):
            Chain([Recorder([], "a")])

    def test_only_the_last_link_may_hand_over_logits(self) -> None:
        first, last = Recorder([], "a"), Recorder([], "b")
        chain = Chain([first, last])
        last.hands_logits = True
        batch = batch_of(4)
        assert chain.augment(batch, NO_CONTEXT).logits is batch.y
        first.hands_logits = True
        with pytest.raises(ValueError, match="only the last link"):
            chain.augment(batch, NO_CONTEXT)

    def test_parts_needs_and_mixing_are_told_along_the_chain(self) -> None:
        method = build("head_refit(upstream=crop+mixup)")
        assert [type(part).__name__ for part in method.parts()] == ["Crop", "Mixup", "HeadRefit"]
        assert method.requires() == {"meta", "features"}
        assert method.mixes_rows
        assert build("crop+cutmix").mixes_rows
        assert not build("head_refit(upstream=crop+flip)").mixes_rows
        assert Above(build("crop+flip")).requires() == {"meta"}
        assert overrides(method, "finish")
        assert not overrides(build("crop+mixup"), "finish")
        assert not overrides(method, "losses")


class Small(Model):
    """Two features of a stage, BatchNorm in the trunk, in float64 so that nothing is rounded."""

    def __init__(self, classes: int, width: int = 6) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Flatten(), nn.Linear(16, width), nn.BatchNorm1d(width))
        self.head = nn.Linear(width, classes)
        self.double()

    def features(self, x: Tensor) -> list[Tensor]:
        return [self.trunk(x.double())]

    def embed(self, features: list[Tensor]) -> Tensor:
        return features[-1].tanh()


def meta_rows(rows: int, classes: int, multi_label: bool) -> Rows:
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(rows, 1, 4, 4, generator=generator)
    y = torch.eye(classes)[torch.randint(classes, (rows,), generator=generator)]
    if multi_label:
        y = (torch.rand(rows, classes, generator=generator) < 0.3).float()
    return Rows(x, torch.arange(rows), y, 1)


def objective(
    inputs: np.ndarray, targets: np.ndarray, decay: float, multi_label: bool, start: np.ndarray
) -> Any:
    """Mean loss + decay / 2 |(W, b) - start|^2 and its gradient, in one vector, by hand."""
    rows, width = inputs.shape
    classes = targets.shape[1]

    def value(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weight, bias = flat[: classes * width].reshape(classes, width), flat[classes * width :]
        z = inputs @ weight.T + bias
        if multi_label:
            losses = (np.logaddexp(0, z) - targets * z).mean(axis=1)
            slope = (1 / (1 + np.exp(-z)) - targets) / classes
        else:
            total = np.log(np.exp(z).sum(axis=1, keepdims=True))
            losses = (targets * (total - z)).sum(axis=1)
            slope = np.exp(z - total) - targets
        gradient = np.concatenate([(slope.T @ inputs / rows).ravel(), slope.mean(axis=0)])
        moved = flat - start
        return losses.mean() + decay / 2 * (moved**2).sum(), gradient + decay * moved

    return value


def refit_context(model: nn.Module, rows: Rows, task: Task) -> tuple[Any, dict[str, float]]:
    """What head_refit sees of a run, and what it logs."""
    told: dict[str, float] = {}
    meta = RowStream(rows, 0, "meta")
    return SimpleNamespace(model=model, meta=meta, task=task, log=told.update), told


class TestHeadRefit:
    @pytest.mark.parametrize("multi_label", [False, True])
    @pytest.mark.parametrize("decay", [1e-3, 0.1])
    def test_the_head_is_the_optimum_and_the_trunk_is_untouched(
        self, decay: float, multi_label: bool
    ) -> None:
        torch.manual_seed(0)
        classes = 4
        model = Small(classes)
        with torch.no_grad():
            model(torch.rand(50, 1, 4, 4))  # BatchNorm has seen something
        model.train()
        norm = model.get_submodule("trunk.2").eval()
        next(model.parameters()).requires_grad_(False)
        rows = meta_rows(300, classes, multi_label)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        flags = [(p.requires_grad, p.grad) for p in model.parameters()]
        task = MultiLabel() if multi_label else MultiClass()
        ctx, told = refit_context(model, rows, task)
        HeadRefit(weight_decay=decay).finish(ctx)
        assert told == {"head_refit_decay": decay}

        after = model.state_dict()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed == {"head.weight", "head.bias"}
        assert [(p.requires_grad, p.grad) for p in model.parameters()] == flags
        assert [m for m in model.modules() if not m.training] == [norm]

        model.eval()
        with torch.no_grad():
            inputs = model.embed(model.features(rows.inputs(torch.arange(len(rows))))).numpy()
        start = np.concatenate([before[f"head.{part}"].ravel() for part in ("weight", "bias")])
        value = objective(inputs, rows.y.double().numpy(), decay, multi_label, start)
        weight, bias = (p.detach().numpy() for p in (model.head.weight, model.head.bias))
        flat = np.concatenate([weight.ravel(), bias])
        assert scipy.optimize.check_grad(lambda v: value(v)[0], lambda v: value(v)[1], flat) < 1e-6
        reached, gradient = value(flat)
        assert np.abs(gradient).max() < 1e-6
        best = scipy.optimize.minimize(
            value, np.zeros_like(flat), jac=True, method="BFGS", options={"gtol": 1e-10}
        )
        assert np.abs(best.jac).max() < 1e-8
        assert reached == pytest.approx(best.fun, abs=1e-10)
        other = best.x[: weight.size].reshape(weight.shape)
        assert np.allclose(weight, other, rtol=0, atol=1e-4)
        assert np.allclose(bias, best.x[weight.size :], rtol=0, atol=1e-4)

    @pytest.mark.parametrize("multi_label", [False, True])
    def test_the_decay_is_that_of_the_lowest_cross_validated_loss(self, multi_label: bool) -> None:
        """Each fold's optimum by scipy; the trained head itself, the largest decay, loses here."""
        rows, task = meta_rows(43, 3, multi_label), MultiLabel() if multi_label else MultiClass()
        x = rows.inputs(torch.arange(len(rows))).flatten(1).double().numpy()[:, :3]
        y = rows.y.double().numpy()
        x = np.c_[x, np.ones(43)]
        start = np.linspace(-2, 2, 12).reshape(3, 4)
        order = sorted(range(43), key=lambda row: y[row].tolist())  # stable: label by label
        expected = []
        for decay in DECAYS:
            total = 0.0
            for fold in range(5):
                out = order[fold::5]
                kept = np.setdiff1d(np.arange(43), out)
                flat = np.concatenate([start[:, :3].ravel(), start[:, 3]])
                value = objective(x[kept, :3], y[kept], decay, multi_label, flat)
                best = scipy.optimize.minimize(
                    value, flat, jac=True, method="BFGS", options={"gtol": 1e-8}
                ).x
                logits = torch.from_numpy(x[out, :3] @ best[:9].reshape(3, 3).T + best[9:])
                total += float(task.losses(logits, torch.from_numpy(y[out])).sum())
            expected.append(total)
        inputs, targets, head = (torch.from_numpy(each) for each in (x, y, start))
        found = chosen_decay(task, inputs, targets, head, 200)
        assert found == DECAYS[int(np.argmin(expected))]
        assert min(expected) < 0.99 * expected[0]

    def test_a_head_that_is_already_right_hardly_changes(self) -> None:
        """Labels drawn from its own predictions: what the largest decay is there for."""
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(20_060, 12, generator=generator, dtype=torch.float64)
        head = torch.randn(4, 12, generator=generator, dtype=torch.float64)
        drawn = torch.multinomial((x @ head.T).softmax(dim=1), 1, generator=generator)[:, 0]
        y, task = F.one_hot(drawn, 4).double(), MultiClass()
        chosen = chosen_decay(task, x[:60], y[:60], head, 200)
        loss = {
            decay: float(
                task.losses(
                    x[60:] @ refit(task, x[:60], y[:60], head, head, decay, 200).T, y[60:]
                ).mean()
            )
            for decay in (chosen, 1e-3)
        }
        right = float(task.losses(x[60:] @ head.T, y[60:]).mean())
        assert loss[chosen] < 1.02 * right
        assert loss[1e-3] > 1.2 * right, "which a small decay would spoil"

    def test_the_largest_decay_leaves_the_head_as_it_is(self) -> None:
        torch.manual_seed(0)
        model = Small(3)
        before = {name: value.clone() for name, value in model.head.state_dict().items()}
        ctx, _ = refit_context(model, meta_rows(60, 3, False), MultiClass())
        HeadRefit(weight_decay=DECAYS[0]).finish(ctx)
        torch.testing.assert_close(model.head.state_dict(), before, rtol=0, atol=2e-6)

    def test_the_upstream_augments_and_finishes_first(self) -> None:
        log: list[str] = []
        torch.manual_seed(0)
        model = Small(3)
        ctx, _ = refit_context(model, meta_rows(60, 3, False), MultiClass())

        class Moves(Recorder):
            def finish(self, ctx: Context) -> None:
                super().finish(ctx)
                with torch.no_grad():
                    model.head.weight.zero_()

        method = HeadRefit(upstream=Moves(log, "a", add=1))
        batch = batch_of(4)
        assert torch.equal(method.augment(batch, NO_CONTEXT).x, batch.x + 1)
        method.finish(ctx)
        assert log == ["a.augment", "a.finish"]
        assert model.head.weight.abs().max() > 0
        assert HeadRefit().augment(batch, NO_CONTEXT) is batch

    def test_without_meta_rows_or_stages_it_says_what_it_needs(self) -> None:
        rows = RowStream(meta_rows(20, 3, False), 0, "meta")
        for model, meta in ((Small(3), None), (nn.Linear(2, 2), rows)):
            ctx: Any = SimpleNamespace(model=model, meta=meta, task=MultiClass())
            with pytest.raises(TypeError, match=r"needs a methods\.base\.Model and meta rows"):
                HeadRefit().finish(ctx)
