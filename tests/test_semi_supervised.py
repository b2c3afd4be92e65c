"""Learning from unlabelled rows, against the formulas in float64, and what the rows may tell."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

import methods
from analysis.runs import Run, Training
from benchmarks.cli.common import benchmark_of
from benchmarks.contract import ROWS, Bench, Case, bench, network_for, set_up, splits, splits_for
from benchmarks.data import splits as data
from benchmarks.data.carving import NotApplicable
from benchmarks.data.dataset import Arrays
from benchmarks.data.download import DataError
from benchmarks.data.names import canonical, parse_benchmark
from benchmarks.data.ondisk import OnDisk
from benchmarks.data.splits import Protocol, Splits, make_splits
from benchmarks.studies.cells import Cell, Row, make_cell
from benchmarks.training.context import TrainingContext
from benchmarks.training.tasks import MultiClass, MultiLabel
from benchmarks.training.trainer import Fitted, fit
from methods.base import Batch, Context, Method, Spec
from methods.learner import learner_of
from methods.lpa3 import Lpa3
from methods.naming import NamingError
from methods.semi_supervised import FixMatch, MeanTeacher, MixMatch, guess, ramp, sharpened
from tests.made import inputs_of, same_state

IMAGES = Case(1)
CPU = torch.device("cpu")


class Dimmed(Method):
    """Multiplies inputs by a factor, the next one at each call."""

    def __init__(self, *factors: float) -> None:
        super().__init__()
        self.factors, self.calls = factors, 0

    def augment(self, batch: Batch, ctx: Context) -> Batch:
        factor = self.factors[self.calls % len(self.factors)]
        self.calls += 1
        return replace(batch, x=batch.x * factor)


def doubled(made: Splits) -> Splits:
    """The same rows in float64."""
    parts = {
        name: None if (rows := getattr(made, name)) is None
        else replace(rows, x=cast("Tensor", rows.x).double(), y=rows.y.double())
        for name in ("train", "unlabelled", "select", "test")
    }  # fmt: skip
    return replace(made, **parts)


def exact(method: Method) -> Bench:
    """A method, set up on rows and with a network in float64; weights of rows are powers of 2."""
    made = set_up(method, doubled(splits_for(method, IMAGES)), network_for(IMAGES), IMAGES)
    made.ctx.model.double()
    return made


def equal(found: Tensor, expected: Tensor) -> None:
    """To the rounding of float64."""
    assert found.dtype == expected.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def predicted(model: nn.Module, x: Tensor) -> Tensor:
    """Probabilities with the statistics of this batch, of a copy."""
    with torch.no_grad():
        return copy.deepcopy(model)(x).softmax(dim=1)


def drawn(made: Bench, rows: int, epoch: int = 0) -> Batch:
    """The unlabelled rows that the method draws at the first step of an epoch."""
    assert made.ctx.unlabelled is not None
    made.ctx.epoch, made.ctx.step = epoch, 0
    made.ctx.enter("augment")
    return made.ctx.unlabelled.draw(rows)


class TestFixMatch:
    @pytest.mark.parametrize(("above", "weight"), [(16, 1.0), (9, 0.75), (0, 1.0)])
    def test_the_loss_is_that_of_the_paper(self, above: int, weight: float) -> None:
        """Eq. 3 and 4: the mean is over all unlabelled rows, also those below the threshold."""
        # The weak change of the rows for the guess, of those for the strong view, of labelled ones.
        weak, strong = Dimmed(0.9, 0.8, 0.7), Dimmed(0.3)
        made = exact(FixMatch(upstream=weak, strong=strong, mu=2, weight=weight))
        batch, rows, model = made.batch(), drawn(made, 16), made.ctx.model
        q = predicted(model, 0.9 * rows.x)
        certain = q.max(dim=1).values.sort().values
        between = torch.cat([certain[:1] - 1e-3, certain.unfold(0, 2, 1).mean(dim=1)])
        threshold = float(between[16 - above]) if above else 1.0
        cast("FixMatch", made.method).threshold = threshold
        out = made.augment(batch)
        found = out.w.double() @ made.method.losses(model(out.x), out, made.ctx)
        log_p = model(torch.cat([0.7 * batch.x, 0.3 * 0.8 * rows.x])).log_softmax(dim=1)
        loss = -(batch.y * log_p[:8]).sum() / 8
        for place, row in enumerate(q.tolist()):
            if max(row) >= threshold:
                loss = loss - weight / 16 * log_p[8 + place, row.index(max(row))]
        equal(found, loss)
        sure = q.max(dim=1).values >= threshold
        assert int(sure.sum()) == int((out.w[8:] > 0).sum()) == above
        assert torch.equal(out.index[8:], torch.where(sure, rows.index, -1))
        assert int(rows.index.min()) >= ROWS

    def test_the_control_trains_on_the_view_that_was_seen(self) -> None:
        text = "pseudo_label(upstream=fixmatch(upstream=gaussian_noise, threshold=0.0, mu=2))"
        one, other = (
            bench(lambda name=name: methods.build(name), IMAGES) for name in (text, text[22:-1])
        )
        a, b = one.augment(one.batch()), other.augment(other.batch())
        assert torch.equal(a.x[:8], b.x[:8]) and torch.equal(a.y, b.y) and torch.equal(a.w, b.w)
        assert not torch.equal(a.x[8:], b.x[8:])
        weak = a.x[8:]
        assert torch.equal(guess(one.ctx.model, weak).argmax(dim=1), a.y[8:].argmax(dim=1))

    def test_rows_of_an_attack_are_those_of_lpa3_on_the_weak_views(self) -> None:
        text = (
            "fixmatch(mu=2, threshold=0.0, attack_threshold=0.0, attack=lpa3(warmup=0, ratio=1.0))"
        )
        made = bench(lambda: methods.build(text), IMAGES)
        rows = drawn(made, 16)
        out = made.augment(made.batch())
        assert len(out) == 8 + 16 + 16 and out.index[24:].tolist() == [-1] * 16
        assert torch.equal(out.y[24:], out.y[8:24]), "the predicted classes"
        assert float(out.w[24:].sum()) == pytest.approx(1.0)
        moved = out.x[24:] - rows.x
        assert bool((moved.flatten(1).norm(dim=1) > 0).all())
        noise = bench(lambda: methods.build(f"norm_noise(upstream={text})"), IMAGES)
        other = noise.augment(noise.batch())
        theirs = other.x[24:] - rows.x
        assert torch.equal(other.x[:8], out.x[:8]) and not torch.equal(theirs, moved)
        torch.testing.assert_close(
            theirs.flatten(1).norm(dim=1), moved.flatten(1).norm(dim=1), rtol=0.3, atol=1e-3
        )

    def test_unsure_rows_are_attacked_without_weight(self) -> None:
        text = "fixmatch(mu=2, attack_threshold=1.0, attack=lpa3(warmup=0, ratio=0.5))"
        out = (made := bench(lambda: methods.build(text), IMAGES)).augment(made.batch())
        assert len(out) == 8 + 16 + 8 and float(out.w[8:].sum()) == 0

    def test_sure_rows_are_attacked_first_and_then_the_least_consistent(self) -> None:
        """Of two visits with other rows in between, against the divergence of the predictions."""
        text = "fixmatch(mu=2, threshold=0.0, attack=lpa3(warmup=0, ratio=0.25), attack_sure=true)"
        made = bench(lambda: methods.build(text), IMAGES)
        method, model = cast("FixMatch", made.method), made.ctx.model
        rows = drawn(made, 16)
        before = torch.randn(made.ctx.spec.rows, 3)
        attack = cast("Lpa3", method.attack)
        attack.get_buffer("before").copy_(before)
        attack.get_buffer("visited").fill_(True)
        q = guess(model, rows.x)
        method.attack_threshold = float(q.max(dim=1).values.sort().values[-10])
        sure = q.max(dim=1).values >= method.attack_threshold
        old = before[rows.index].softmax(dim=1)
        moved = (q * (q.log() - old.log())).sum(dim=1)
        expected = moved.where(sure, -1.0).argsort(descending=True)[:4].sort().values
        out = made.augment(made.batch())
        assert len(out) == 8 + 16 + 4 and int(sure.sum()) == 10
        assert torch.equal(out.y[24:], F.one_hot(q.argmax(dim=1), 3)[expected].float())
        near = (out.x[24:, None] - rows.x[None]).flatten(2).norm(dim=2).argmin(dim=1)
        assert torch.equal(near, expected)
        torch.testing.assert_close(out.w[24:], torch.full((4,), 10 / 16 / 4))

    def test_a_second_set_of_norms_serves_the_attacked_rows(self) -> None:
        text = "fixmatch(mu=2, attack_threshold=0.0, attack=lpa3(warmup=0, auxiliary_norm=true))"
        made = bench(lambda: methods.build(text), IMAGES)
        assert "auxiliary_norm" in made.method.requires() and made.method.hands(made.ctx.spec)
        out = made.augment(made.batch())
        assert out.logits is not None and len(out.logits) == len(out) == 8 + 16 + 8

    @pytest.mark.parametrize(
        ("text", "told"),
        [
            ("fixmatch(strong=mixup)", "strong: expected a method that changes each row by itself"),
            ("fixmatch(upstream=balanced)", "upstream: expected a method that changes each row"),
            ("fixmatch(strong=saflex)", "learns nothing, such as .* got saflex"),
            ("fixmatch(strong=gce)", "got gce"),
            ("fixmatch(strong=crop+sra)", "strong: expected a method .* got sra"),
            ("mixmatch(upstream=entaugment)", "upstream: expected a method .* got entaugment"),
            ("fixmatch(strong=soft_augmentation)", "strong: .* leaves labels and weights alone"),
            ("fixmatch(attack=crop)", "attack: expected lpa3 without an upstream, .* got crop"),
            ("fixmatch(attack=lpa3(upstream=crop))", "attack: expected lpa3 without an upstream"),
            ("fixmatch(attack_sure=true)", "attack_sure: expected attack=lpa3"),
            ("fixmatch(mu=0)", "mu: expected 1 or more, got 0"),
            ("fixmatch(threshold=1.5)", r"threshold: expected a probability in \[0, 1\], got 1.5"),
            ("fixmatch(weight=-1.0)", "weight: expected a number of 0 or more"),
            ("mixmatch(temperature=0.0)", "temperature: expected a number above 0"),
            ("mixmatch(mu=0)", "mu: expected 1 or more"),
            ("mean_teacher(keep=1.0)", r"keep: expected a share in \[0, 1\)"),
            ("mean_teacher(weight=-1.0)", "weight: expected a number of 0 or more"),
            ("saflex(upstream=mean_teacher)", "takes the steps of a run itself"),
        ],
    )
    def test_arguments_that_are_refused(self, text: str, told: str) -> None:
        with pytest.raises(NamingError, match=told):
            methods.build(text)

    def test_what_they_do_not_take_is_said(self) -> None:
        spec = Spec(rows=9, classes=3, shape=(1, 8, 8))
        vector = Spec(rows=9, classes=3, shape=(5,), kind="vector")
        for name in ("fixmatch", "mixmatch", "mean_teacher"):
            assert methods.build(name).supports(MultiClass(), spec) == ""
            assert "one label per row" in methods.build(name).supports(MultiLabel(), spec)
            with pytest.raises(NotApplicable, match=f"{name} needs unlabelled rows"):
                fit(a_run(name), splits(IMAGES, False), methods.build(name))
        assert "randaugment needs images" in methods.build("fixmatch").supports(
            MultiClass(), vector
        )
        assert methods.build("fixmatch(strong=gaussian_noise)").supports(MultiClass(), spec) == ""
        said = methods.build("pseudo_label(upstream=crop)").supports(MultiClass(), spec)
        assert said.startswith("pseudo_label needs upstream=fixmatch")
        said = methods.build("norm_noise(upstream=fixmatch)").supports(MultiClass(), spec)
        assert said.startswith("norm_noise needs upstream=lpa3")


def a_run(name: str, **training: Any) -> Run:
    settings = {"epochs": 3, "batch_size": 8, **training}
    return Run(
        benchmark="test", data="", model=str(network_for(IMAGES)), method=name,
        training=Training(**settings),
    )  # fmt: skip


def test_sharpening_is_that_of_the_formula_and_survives_zeros() -> None:
    p = torch.tensor([[0.5, 0.3, 0.2], [1.0, 0.0, 0.0]], dtype=torch.float64)
    expected = p.square() / p.square().sum(dim=1, keepdim=True)
    torch.testing.assert_close(sharpened(p, 0.5), expected, rtol=1e-12, atol=1e-12)


class TestMixMatch:
    def test_rows_targets_and_loss_are_those_of_the_paper(self) -> None:
        made = exact(MixMatch(upstream=Dimmed(0.9, 0.8, 0.7), mu=2, weight=30.0))
        batch, rows = made.batch(), drawn(made, 16, epoch=3)
        out = made.augment(batch, epoch=3)
        assert len(out) == 8 + 2 * 16 and float(out.w[8:].sum()) == 1
        model = made.ctx.model
        q = (predicted(model, 0.8 * rows.x) + predicted(model, 0.7 * rows.x)) / 2
        q = q.square() / q.square().sum(dim=1, keepdim=True)
        x = torch.cat([0.9 * batch.x, 0.8 * rows.x, 0.7 * rows.x])
        y = torch.cat([batch.y, q, q])
        for place in range(len(out)):  # a mixture of its row and another one, mostly its own
            fits = []
            for other in range(len(out)):
                apart = x[other] - x[place]
                if other == place:
                    share = 0.0
                else:
                    share = float(((out.x[place] - x[place]) * apart).sum() / apart.square().sum())
                target = y[place] + share * (y[other] - y[place])
                fits.append(
                    0 <= share <= 0.5
                    and torch.allclose(out.x[place], x[place] + share * apart, 1e-12, 1e-13)
                    and torch.allclose(out.y[place], target, 1e-12, 1e-13)
                )
            assert any(fits), place
        assert out.logits is not None
        found = made.method.losses(out.logits, out, made.ctx)
        p = predicted(model, out.x)
        own = -(out.y[:8] * p[:8].log()).sum(dim=1)
        theirs = 30.0 * (p[8:] - out.y[8:]).square().sum(dim=1) / 3
        equal(found.detach(), torch.cat([own, theirs]))

    def test_the_weight_rises(self) -> None:
        made = bench(lambda: methods.build("mixmatch"), IMAGES, epochs=8)
        for epoch, linear, curved in (
            (0, 0.0, np.exp(-5)),
            (1, 0.5, np.exp(-1.25)),
            (2, 1, 1),
            (7, 1, 1),
        ):
            made.ctx.epoch = epoch
            assert ramp(made.ctx, linear=True) == pytest.approx(linear)
            assert ramp(made.ctx, linear=False) == pytest.approx(curved)


def test_a_step_of_mean_teacher_is_that_of_the_formula() -> None:
    """Parameters after a step of gradient descent, and the teacher's, in a copy by hand."""
    made = doubled(splits(IMAGES, False, unlabelled=True))
    method = MeanTeacher(upstream=Dimmed(0.9, 0.8, 0.7, 0.6), mu=2, keep=0.9, weight=20.0)
    plain = bench(lambda: methods.build("none"), IMAGES)
    ctx = TrainingContext.of_splits(
        model := plain.ctx.model.double(),
        torch.optim.SGD(model.parameters(), lr=0.1),
        MultiClass(), made, epochs=4, seed=0,
    )  # fmt: skip
    learner = learner_of(method)
    ctx.epoch = 3
    learner.setup(ctx)
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    teacher = next(iter(learner.networks()))
    batch = ctx.train.rows(torch.arange(8))
    ctx.enter("augment")
    assert ctx.unlabelled is not None
    rows = ctx.unlabelled.draw(16)
    by_hand = copy.deepcopy(model)
    goal = copy.deepcopy(teacher)(torch.cat([0.7 * batch.x, 0.6 * rows.x])).softmax(dim=1).detach()
    z = by_hand(torch.cat([0.9 * batch.x, 0.8 * rows.x]))
    loss = F.cross_entropy(z[:8], batch.y) + 20 * F.mse_loss(z.softmax(dim=1), goal)
    loss.backward()
    ctx.enter("step")
    found, _ = learner.step(batch, ctx)
    equal(found, loss.detach())
    for (name, after), hand, mean in zip(
        model.named_parameters(), by_hand.parameters(), teacher.parameters(), strict=True
    ):
        assert hand.grad is not None
        equal(after.detach(), before[name] - 0.1 * hand.grad)
        equal(mean.detach(), 0.9 * before[name] + 0.1 * after.detach())
    assert learner.predictor(ctx) is teacher


@pytest.mark.parametrize(
    "name", ["fixmatch(mu=2, threshold=0.5)", "mixmatch", "mean_teacher(keep=0.9, mu=2)"]
)
def test_a_run_counts_its_passes_and_learns(name: str) -> None:
    method = methods.build(name)
    run = a_run(name, steps_per_epoch=10, learning_rate=0.01)
    fitted = fit(run, splits_for(method, IMAGES), method)
    passes = {"fix": 3 + 2 + 3, "mix": 3 + 2 + 3, "mea": 3 + 3 + 3}[name[:3]]
    assert fitted.result["cost"]["passes_per_row"] == pytest.approx(passes)
    assert fitted.result["metrics"]["last"]["test"]["nll"] < 0.5, "a guess: ln 3 = 1.1"


@pytest.mark.parametrize(
    ("attack", "ratio", "choosing", "each", "limit"),
    [
        ("lpa3(warmup=0, ratio=0.9)", 0.9, 7, 1 + 5 * 3 + 2, 6.3),
        ("lpa3(warmup=0, ratio=0.2), attack_sure=true", 0.2, 0, 1 + 5 * 3 + 2, 2.2),
        ("lpa3(preset=fast, warmup=0, ratio=0.35), attack_sure=true", 0.35, 0, 1 + 3 * 2 + 3, 2.2),
        ("lpa3(preset=strict, warmup=0, ratio=0.5)", 0.5, 7, 5 * 2 + 3, 3.4),
    ],
)
def test_a_step_with_an_attack_has_the_passes_of_the_formula(
    attack: str, ratio: float, choosing: int, each: int, limit: float
) -> None:
    """A step of FixMatch has 15 forward and 8 backward passes of the labelled batch."""
    name = f"fixmatch(attack={attack})"
    method = methods.build(name)
    run = a_run(name, steps_per_epoch=2, epochs=1, batch_size=2)
    fitted = fit(run, splits_for(method, IMAGES), method)
    expected = 23 + choosing + round(14 * ratio) / 2 * each
    assert fitted.result["cost"]["passes_per_row"] == pytest.approx(expected)
    whole = 23 + choosing + 7 * ratio * each  # in a batch whose share is a whole number of rows
    assert method.costs["published"] == pytest.approx(whole / 2, abs=0.051)
    assert whole / 23 < limit


def images(rows: int = 40, classes: int = 3) -> Arrays:
    rng = np.random.default_rng(0)
    labels = [np.arange(count) % classes for count in (rows * classes, 12, 12)]
    pixels = [rng.integers(0, 256, (len(each), 8, 8, 1), dtype=np.uint8) for each in labels]
    return Arrays(
        name="made", kind="multi-class", classes=tuple("abc"), train_x=pixels[0],
        train_y=labels[0], val_x=pixels[1], val_y=labels[1], test_x=pixels[2], test_y=labels[2],
        checksum="", verified=True, caveats=(), source="", notes=(),
    )  # fmt: skip


def cut(arrays: Arrays, text: str = "digits(labelled=2)", seed: int = 0, **more: Any) -> Splits:
    return make_splits(
        arrays, parse_benchmark(text), Protocol(), needs_meta=more.pop("needs_meta", False),
        seed=seed, device=CPU, **more,
    )  # fmt: skip


class TestLabelled:
    def test_a_few_rows_of_each_class_have_labels(self) -> None:
        made = cut(images())
        assert len(made.train) == made.pool == 6 and made.unlabelled is not None
        assert made.train.y.sum(dim=0).tolist() == [2, 2, 2]
        assert len(made.unlabelled) == 114 and made.spec.rows == 120
        assert len(made.select) == 6 and made.select.y.sum(dim=0).tolist() == [2, 2, 2]
        seen = torch.cat([inputs_of(made.train), inputs_of(made.unlabelled)])
        assert len(torch.unique(seen, dim=0)) == 120, "no row is both"
        assert made.notes[-1].startswith("6 labelled rows, 114 unlabelled; the select split is cut")
        assert len(made.test) == 12

    def test_a_select_split_with_more_rows_than_the_pool_is_called_out(self) -> None:
        said = "the select split has 4 rows of a class of which the pool has 3"
        assert cut(images(), "digits(rows_per_class=3)").notes[-1].startswith(said)
        assert cut(images(), "digits(rows_per_class=4)").notes == ()
        assert cut(images(), "digits(rows_per_class=6, labelled=2)").notes[0].startswith("6 label")
        assert cut(images(2), "digits").notes == (), "all labels that there are"

    def test_meta_rows_are_the_labelled_rows_and_nobody_has_more(self) -> None:
        plain, meta = cut(images()), cut(images(), needs_meta=True)
        assert meta.meta is meta.train
        for control in ("train", "train+meta", "meta"):
            other = cut(images(), needs_meta=False, control=control)
            assert torch.equal(inputs_of(other.train), inputs_of(plain.train))
        assert torch.equal(inputs_of(meta.train), inputs_of(plain.train))
        other = cut(images(), seed=1)
        assert not torch.equal(inputs_of(other.train), inputs_of(plain.train))

    def test_labels_of_the_others_are_out_of_reach(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """With the same rows labelled, results are equal whatever the labels of the others are."""
        chosen = np.arange(6)
        monkeypatch.setattr(data, "_few", lambda labels, *_: chosen[: len(labels)])
        arrays = images()
        poisoned = arrays.train_y.copy()
        poisoned[6:] = 2 - poisoned[6:]
        assert not np.array_equal(poisoned, arrays.train_y)
        names = (
            "fixmatch(threshold=0.0)", "mixmatch", "mean_teacher",
            "fixmatch(mu=2, threshold=0.0, attack_threshold=0.0, attack=lpa3(warmup=0))",
            "saflex(upstream=fixmatch(mu=2, threshold=0.0))",
        )  # fmt: skip
        fitted: list[Fitted] = []
        for labels in (arrays.train_y, poisoned):
            for name in names:
                method = methods.build(name)
                given = replace(arrays, train_y=labels)
                made = cut(given, needs_meta="meta" in method.requires())
                assert made.unlabelled is not None and not bool(made.unlabelled.y.any())
                fitted.append(fit(a_run(name), made, method))
        for one, other in zip(fitted[:5], fitted[5:], strict=True):
            assert one.state.metric_lines == other.state.metric_lines
            same_state(one.method, other.method)
        attacked, refined = (each.method.state_dict() for each in fitted[3:5])
        assert bool(attacked["attack.visited"][6:].any()) and bool(refined["seen"][6:].any())

    @pytest.mark.parametrize(
        ("text", "error", "told"),
        [
            ("digits(labelled=40)", NotApplicable, "labelled=40: a class has 40 rows"),
            ("digits(labelled=2, noise=0.1)", NamingError, "expected none of noise"),
            ("digits(labelled=-1)", NamingError, "labelled: expected"),
        ],
    )
    def test_what_cannot_be_is_said(self, text: str, error: type[Exception], told: str) -> None:
        with pytest.raises(error, match=told):
            cut(images(), text)

    def test_protocols_with_meta_rows_of_their_own_are_refused(self) -> None:
        for protocol in (Protocol(name="paper"), Protocol(crossfit=2)):
            with pytest.raises(NotApplicable, match="labelled: meta rows are the labelled rows"):
                make_splits(
                    images(), parse_benchmark("digits(labelled=2)"), protocol, needs_meta=True,
                    seed=0, device=CPU,
                )  # fmt: skip


class TestUnlabelledImagesOfOnesOwn:
    @pytest.fixture
    def made(self, tmp_path: Path) -> tuple[Path, np.ndarray]:
        """A flat folder of 12 grey images, and one in a folder below, which means no class."""
        folder, pixels = (
            tmp_path / "more, of them",
            np.random.default_rng(1).integers(0, 256, (13, 28, 28)),
        )
        (folder / "sub").mkdir(parents=True)
        for number, image in enumerate(pixels.astype(np.uint8)):
            name = f"{number:02}.png" if number < 12 else "sub/x.png"
            Image.fromarray(image).save(folder / name)
        (folder / "notes.txt").write_text("about them")
        return folder, pixels

    @pytest.mark.parametrize("memory", [4.0, 1e-9], ids=["memory", "disk"])
    def test_rows_of_a_folder(
        self, made: tuple[Path, np.ndarray], tmp_path: Path, memory: float
    ) -> None:
        folder, pixels = made
        benchmark = parse_benchmark(f'digits(unlabelled="folder:{folder}")')
        plain = data.arrays_of(parse_benchmark("digits"), tmp_path)
        arrays = data.arrays_of(benchmark, tmp_path, memory_gib=memory)
        assert arrays.checksum.startswith(f"{plain.checksum}+unlabelled:")
        assert isinstance(arrays.unlabelled_x, OnDisk) == (memory < 1)
        found = make_splits(arrays, benchmark, Protocol(), needs_meta=True, seed=0, device=CPU)
        assert len(found.train) + len(found.meta or ()) == found.pool == len(plain.train_y)
        assert found.unlabelled is not None and not bool(found.unlabelled.y.any())
        assert found.spec.rows == len(found.train) + 13
        seen = (inputs_of(found.unlabelled)[:, 0] * 255).round().int()
        assert np.array_equal(seen.numpy(), pixels), "in the order of their names"
        few = parse_benchmark(f'digits(labelled=4, unlabelled="folder:{folder}")')
        cut = make_splits(arrays, few, Protocol(), needs_meta=False, seed=0, device=CPU)
        assert len(cut.train) == 40 and len(cut.unlabelled or ()) == 13
        assert any("13 unlabelled images from folder:more, of them" in n for n in cut.notes)
        assert any("text files among the images are left out" in n for n in cut.notes)

    def test_the_id_has_their_bytes_and_the_recorded_path_finds_them(
        self, made: tuple[Path, np.ndarray], tmp_path: Path
    ) -> None:
        folder, _ = made
        benchmark = parse_benchmark(f"digits(unlabelled='folder:{folder}')")
        assert canonical(benchmark) == "digits(unlabelled='folder:more, of them')"

        def cell(checksum: str) -> Cell:
            row = Row("none")
            return make_cell(
                row, benchmark, "small_cnn", Training(), Protocol(), 0, checksum=checksum
            )

        before = data.arrays_of(benchmark, tmp_path).checksum
        one = cell(before)
        assert benchmark_of(one.run, one.recorded) == benchmark
        Image.fromarray(np.zeros((28, 28), np.uint8)).save(folder / "00.png")
        assert data.arrays_of(benchmark, tmp_path).checksum != before

    def test_a_file_and_test_images_in_it(self, tmp_path: Path) -> None:
        digits = data.arrays_of(parse_benchmark("digits"), tmp_path)
        np.savez(tmp_path / "some.npz", images=digits.test_x[:5], labels=np.full(5, 77.5))
        arrays = data.arrays_of(
            parse_benchmark(f"digits(unlabelled='npz:{tmp_path}/some.npz')"), tmp_path
        )
        assert arrays.unlabelled_x is not None and len(arrays.unlabelled_x) == 5
        (caveat,) = set(arrays.caveats) - set(digits.caveats)
        assert caveat.startswith("5 of ") and "test images are among the unlabelled" in caveat

    @pytest.mark.parametrize(
        ("shape", "told"),
        [
            ((3, 9, 8), "unlabelled images are 9 x 8, expected 28 x 28, as those of digits"),
            ((3, 28, 28, 3), "are in colour, and those of digits are grey: convert them, or write"),
        ],
    )
    def test_images_that_do_not_fit(
        self, tmp_path: Path, shape: tuple[int, ...], told: str
    ) -> None:
        np.savez(tmp_path / "some.npz", images=np.zeros(shape, np.uint8))
        text = f"digits(unlabelled='npz:{tmp_path}/some.npz')"
        with pytest.raises(DataError, match=told):
            data.arrays_of(parse_benchmark(text), tmp_path)
        if len(shape) == 4:
            benchmark = parse_benchmark(text.replace("(", "(as_rgb=true, ", 1))
            arrays = data.arrays_of(benchmark, tmp_path)
            found = make_splits(arrays, benchmark, Protocol(), needs_meta=False, seed=0, device=CPU)
            assert found.unlabelled is not None
            assert inputs_of(found.unlabelled).shape == (3, 3, 28, 28)

    @pytest.mark.parametrize(
        ("text", "told"),
        [
            ("digits(unlabelled=folder)", "unlabelled: expected 'folder:DIR' or 'npz:FILE' in"),
            ("digits(unlabelled='csv:a.csv')", "unlabelled: expected 'folder:DIR' or 'npz:FILE'"),
            ("arrhythmia(unlabelled='npz:a.npz')", "unlabelled: expected none, because its rows"),
        ],
    )
    def test_names_that_are_refused(self, text: str, told: str) -> None:
        with pytest.raises(NamingError, match=told):
            parse_benchmark(text)


class TestWeightsOverFixMatch:
    def test_shuffled_weights_know_unlabelled_rows(self) -> None:
        """They get weights of theirs, labelled rows too; what is not trained on stays at 0."""
        chain = "l2rw(upstream=fixmatch(threshold=0.53, mu=3))"
        own, other = (
            bench(lambda text=text: methods.build(text), IMAGES)
            for text in (chain, f"shuffled_weights(upstream={chain})")
        )
        moved = {"labelled": False, "unlabelled": False}
        some_left_out = False
        for step in range(6):
            out, shuffled = (
                each.augment(each.batch(step=step), step=step) for each in (own, other)
            )
            assert torch.equal(out.index, shuffled.index)
            groups = {
                "labelled": (out.index >= 0) & (out.index < ROWS),
                "unlabelled": out.index >= ROWS,
            }
            for name, group in groups.items():
                pairs = (each.w[group].sort().values for each in (out, shuffled))
                assert torch.equal(*pairs), name
                moved[name] |= not torch.equal(out.w[group], shuffled.w[group])
            rest = ~(groups["labelled"] | groups["unlabelled"])
            assert not shuffled.w[rest].any()
            some_left_out |= bool(rest.any())
        assert moved == {"labelled": True, "unlabelled": True}
        assert some_left_out

    def test_saflex_on_the_added_rows_alone(self) -> None:
        """Without rules that look at the whole batch, those rows are as where all are scored."""
        upstream = "fixmatch(threshold=0.0, mu=3)"
        made = [
            bench(lambda text=text: methods.build(text), IMAGES)
            for text in (
                f"saflex(clean_fraction=0.0, labels=argmax, weights=one, upstream={upstream})",
                f"saflex(clean_fraction=0.0, labels=argmax, weights=one, only_added=true, "
                f"upstream={upstream})",
                f"saflex(clean_fraction=0.0, labels=keep, only_added=true, upstream={upstream})",
            )
        ]
        whole, labels, weights = (each.augment(each.batch()) for each in made)
        plain = bench(lambda: methods.build(upstream), IMAGES)
        given = plain.augment(plain.batch())
        rows = len(plain.batch())
        assert not torch.equal(whole.y[:rows], given.y[:rows])
        for out in (labels, weights):
            assert torch.equal(out.x, given.x)
            assert torch.equal(out.y[:rows], given.y[:rows])
            assert torch.equal(out.w[:rows], given.w[:rows])
        assert torch.equal(labels.y[rows:], whole.y[rows:])
        assert not torch.equal(labels.y[rows:], given.y[rows:])
        assert torch.equal(weights.y[rows:], given.y[rows:])
        assert not torch.equal(weights.w[rows:], given.w[rows:])
        torch.testing.assert_close(weights.w[rows:].sum(), given.w[rows:].sum())
        seen = made[1].method.learned()["seen"]
        assert not seen[:ROWS].any() and seen[ROWS:].any()

    def test_saflex_where_nothing_is_added_changes_nothing(self) -> None:
        made = bench(
            lambda: methods.build("saflex(clean_fraction=0.0, only_added=true, upstream=flip)"),
            IMAGES,
        )
        plain = bench(lambda: methods.build("flip"), IMAGES)
        out, given = (each.augment(each.batch()) for each in (made, plain))
        for field in ("x", "y", "w", "index"):
            assert torch.equal(getattr(out, field), getattr(given, field)), field
        with pytest.raises(ValueError, match="only_added: expected an upstream that adds rows"):
            methods.build("saflex(only_added=true)")

    def test_rows_below_the_threshold_do_not_count_as_learned(self) -> None:
        """What learns nothing has moved nothing, though most rows of a step have weight 0."""
        made = bench(
            lambda: methods.build("frozen(upstream=saflex(clean_fraction=0.0, upstream=fixmatch))"),
            IMAGES,
        )
        left_out = 0
        for step in range(6):
            out = made.augment(made.batch(step=step), step=step)
            left_out += int((out.w == 0).sum())
            assert torch.equal(out.w == 0, out.index < 0)
        assert left_out
        assert made.method.learning() == {"weight": 0.0, "label": 0.0}
        assert set(made.method.learned()["weight"].tolist()) <= {0.0, 1.0}
