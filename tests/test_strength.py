"""EntAugment and SRA: strengths in float64 by hand, operations against Pillow, their controls."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from torch import Tensor

import methods
from analysis.runs import Run, Training
from benchmarks.contract import Bench, Case, bench, check, pass_state, splits
from benchmarks.training.tasks import MultiClass, MultiLabel
from benchmarks.training.trainer import fit
from methods.base import Batch, Spec
from methods.randaugment import OPERATIONS, Drawn
from methods.strength import (
    AdaptiveStrength,
    Exchange,
    agreement,
    exchanged,
    normalised_entropy,
)
from tests.test_randaugment import (
    levels,
    made,
    of_pillow,
    pillow_op,
    to_pillow,
    torchvision_setting,
    unit,
)

ENT = "entaugment(warmup=0)"
CONTROLS = ("shuffled_strengths", "mean_strength")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def ready(name: str, channels: int = 3) -> Bench:
    return bench(lambda: methods.build(name), Case(channels))


def adaptive(desk: Bench) -> AdaptiveStrength:
    return next(part for part in desk.method.parts() if isinstance(part, AdaptiveStrength))


def visited(desk: Bench, batch: Batch, logits: Tensor) -> None:
    """The end of a step: the trainer asks for the losses."""
    desk.method.losses(logits, batch, desk.ctx)


def steps_in(desk: Bench, batch: Batch, step: int = 1, epoch: int = 0) -> tuple[Drawn, Batch]:
    """What a call applied to the rows of a batch, and its result."""
    seen: list[Drawn] = []
    part = adaptive(desk)
    usual = part.applied

    def spy(x: Tensor, drawn: Drawn) -> Tensor:
        seen.append(drawn)
        return usual(x, drawn)

    part.applied = spy  # type: ignore[method-assign]
    out = desk.augment(batch, epoch=epoch, step=step)
    part.applied = usual  # type: ignore[method-assign]
    return seen[0], out


class TestStrengths:
    @pytest.mark.parametrize("classes", [2, 3, 10])
    def test_entropy_is_scipys(self, classes: int) -> None:
        logits = 4 * torch.randn(50, classes, dtype=torch.float64)
        p = scipy.special.softmax(logits.numpy(), axis=1)
        expected = scipy.stats.entropy(p, axis=1) / math.log(classes)
        np.testing.assert_allclose(normalised_entropy(logits).numpy(), expected, rtol=0, atol=1e-12)
        sure = torch.tensor([[0.0] * (classes - 1) + [1e4], [3.0] * classes])
        np.testing.assert_allclose(normalised_entropy(sure), [0, 1], atol=1e-6)

    @pytest.mark.parametrize("classes", [2, 3, 10])
    @pytest.mark.parametrize("exponent", [0.5, 2.0])
    def test_agreement_is_the_formula_for_hard_and_soft_labels(
        self, classes: int, exponent: float
    ) -> None:
        logits = 3 * torch.randn(20, classes, dtype=torch.float64)
        y = torch.rand(20, classes, dtype=torch.float64).softmax(dim=1)
        y[:10] = torch.eye(classes, dtype=torch.float64)[torch.randint(classes, (10,))]
        got = agreement(logits, y, exponent)
        for row in range(20):
            p = scipy.special.softmax(logits[row].numpy())
            cosine = p @ y[row].numpy() / np.linalg.norm(p) / np.linalg.norm(y[row].numpy())
            assert float(got[row]) == pytest.approx(cosine ** (exponent / math.log(classes)))
        flat = agreement(torch.zeros(1, classes, dtype=torch.float64), y[:1], exponent)
        assert float(flat) == pytest.approx(math.exp(-exponent / 2)), "whatever K is"

    def test_a_network_that_has_diverged_gives_a_step_all_the_same(self) -> None:
        desk = ready(ENT)
        batch = desk.batch()
        visited(desk, batch, torch.full((len(batch.x), 3), math.nan))
        assert bool((steps_in(desk, batch)[0].magnitude == 1).all())
        desk = ready("sra")
        with torch.no_grad():
            for parameter in desk.ctx.model.parameters():
                parameter.fill_(math.nan)
        assert bool((steps_in(desk, desk.batch())[0].magnitude == 0).all())


class TestEntAugment:
    def test_a_row_has_the_strength_of_its_last_visit(self) -> None:
        desk = ready(ENT)
        batch, other = desk.batch(step=0), desk.batch(rows=4, step=1)
        assert bool((steps_in(desk, batch)[0].magnitude == 1).all()), "not visited: strength 0"
        expected = np.zeros(desk.ctx.spec.rows)
        for seen in (batch, other):
            logits = 2 * torch.randn(len(seen.x), 3)
            visited(desk, seen, logits)
            p = scipy.special.softmax(logits.double().numpy(), axis=1)
            expected[seen.index] = 1 - scipy.stats.entropy(p, axis=1) / math.log(3)
        stored = desk.method.learned()["strength"]
        known = torch.zeros(len(expected), dtype=torch.bool)
        known[torch.cat([batch.index, other.index])] = True
        assert bool((stored[~known] == -1).all())
        np.testing.assert_allclose(stored[known], expected[known], atol=1e-6)
        now = [min(int(30 * value) + 1, 30) for value in expected[batch.index]]
        drawn, _ = steps_in(desk, batch)
        assert drawn.magnitude.tolist() == [now] and len(set(now)) > 3

    def test_each_row_equals_pillow_with_the_step_of_its_strength(self) -> None:
        images = np.tile(made(3, 8, 8), (4, 1, 1, 1))[:20]
        desk = ready(ENT)
        batch = replace(desk.batch(20), x=unit(images), y=torch.eye(3)[torch.arange(20) % 3])
        visited(desk, batch, 3 * torch.randn(20, 3))
        drawn, out = steps_in(desk, batch)
        for row, (code, step, negative) in enumerate(zip(*(p[0].tolist() for p in drawn))):  # noqa: B905
            picture = to_pillow(images[row])
            if OPERATIONS[code] != "identity":
                setting = torchvision_setting("rand", code, step, negative, (8, 8))
                picture = pillow_op(picture, code, setting)
            assert np.array_equal(levels(out.x[row]), of_pillow(picture)), OPERATIONS[code]

    def test_the_warm_up_is_trivial_augment(self) -> None:
        desk = ready("entaugment(warmup=2)")
        other = ready("trivialaugment(space=standard)")
        batch = desk.batch()
        visited(desk, batch, torch.randn(len(batch.x), 3))
        for epoch in (0, 1, 2):
            same = torch.equal(desk.augment(batch, epoch).x, other.augment(batch, epoch).x)
            assert same == (epoch < 2)

    def test_rows_from_elsewhere_stay_as_they_are_and_are_not_remembered(self) -> None:
        desk = ready("entaugment(warmup=1)")
        batch = desk.batch(elsewhere=5)
        for epoch in (0, 1):
            visited(desk, batch, 5 * torch.randn(len(batch.x), 3))
            out = desk.augment(batch, epoch)
            assert torch.equal(out.x[-5:], batch.x[-5:])
            assert not torch.equal(out.x[:-5], batch.x[:-5])
        stored = desk.method.learned()["strength"]
        assert int((stored >= 0).sum()) == len(batch.x) - 5
        assert float(adaptive(desk).get_buffer("strength")[-1]) == -1

    def test_entloss_and_its_gradient(self) -> None:
        logits = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
        desk = ready("entaugment(entloss=0.7)")
        batch = desk.batch(8)
        batch = replace(batch, y=batch.y.double())

        def expected(z: Tensor) -> Tensor:
            p = z.softmax(dim=1)
            entropy = -(p * p.log()).sum(dim=1) / math.log(3)
            return -(batch.y * p.log()).sum(dim=1) + 0.7 * entropy

        losses = desk.method.losses(logits, batch, desk.ctx)
        torch.testing.assert_close(losses, expected(logits))
        (ours,) = torch.autograd.grad(losses.sum(), logits)
        z = logits.detach()
        for row, k in itertools.product(range(8), range(3)):
            shift = torch.zeros_like(z)
            shift[row, k] = 1e-5
            slope = (expected(z + shift) - expected(z - shift))[row] / 2e-5
            assert float(ours[row, k]) == pytest.approx(float(slope), abs=1e-8)
        plain = ready("entaugment")
        plain.method.losses(logits, batch, plain.ctx)
        alone = plain.method.losses(logits, batch, plain.ctx)
        torch.testing.assert_close(alone, desk.ctx.task.losses(logits, batch.y))

    def test_the_loss_of_an_upstream_stays(self) -> None:
        desk, gce = ready("entaugment(upstream=gce)"), ready("gce")
        batch, logits = desk.batch(8), torch.randn(8, 3)
        ours = desk.method.losses(logits, batch, desk.ctx)
        assert torch.equal(ours, gce.method.losses(logits, batch, gce.ctx))

    def test_strengths_survive_a_checkpoint(self) -> None:
        one, other = ready(ENT), ready(ENT)
        batch = one.batch()
        visited(one, batch, 3 * torch.randn(len(batch.x), 3))
        before = other.augment(batch, step=5)
        pass_state(one.method, other.method)
        assert torch.equal(one.augment(batch, step=5).x, other.augment(batch, step=5).x)
        assert not torch.equal(before.x, other.augment(batch, step=5).x)


class TestSra:
    def test_batches_alternate_between_random_steps_and_the_networks(self) -> None:
        desk = ready("sra(n=3)")
        batch = desk.batch()
        for step in (0, 2, 4):
            drawn, _ = steps_in(desk, batch, step)
            assert not torch.equal(drawn.magnitude[0], drawn.magnitude[1])
        assert bool((desk.method.learned()["strength"] == -1).all())
        for step in (1, 3):
            drawn, _ = steps_in(desk, batch, step)
            assert drawn.magnitude.shape == drawn.codes.shape == (3, len(batch.x))
            assert torch.equal(drawn.magnitude[0], drawn.magnitude[1])
            assert torch.equal(drawn.magnitude[0], drawn.magnitude[2])

    def test_the_strength_is_that_of_the_rows_before_the_operations(self) -> None:
        desk = ready("sra(upstream=flip, exponent=1.5)")
        desk.ctx.model.double()
        batch = desk.batch()
        batch = replace(batch, x=batch.x.double(), y=batch.y.double())
        before = {name: each.clone() for name, each in desk.ctx.model.state_dict().items()}
        drawn, out = steps_in(desk, batch)
        for name, each in desk.ctx.model.state_dict().items():
            assert torch.equal(each, before[name]), name
        flipped = ready("flip").augment(batch, step=1)
        with torch.no_grad():
            logits = desk.ctx.model(flipped.x)  # in training mode: statistics of the batch
        expected = agreement(logits, batch.y, 1.5)
        assert drawn.magnitude[0].tolist() == [round(30 * float(s)) for s in expected]
        stored = desk.method.learned()["strength"][batch.index]
        torch.testing.assert_close(stored, expected.float())
        assert not torch.equal(out.x, flipped.x)

    def test_operations_and_signs_are_those_of_randaugment(self) -> None:
        method = methods.build("sra(n=2)")
        assert isinstance(method, AdaptiveStrength)
        drawn = method.draw(20_000)
        assert set(drawn.codes.unique().tolist()) == {*range(15)} - {OPERATIONS.index("invert")}
        for part, kinds in ((drawn.magnitude, 31), (drawn.negative, 2)):
            counts = torch.bincount(part.flatten(), minlength=kinds).numpy()
            assert scipy.stats.chisquare(counts).pvalue > 0.001


class TestExchange:
    STEPS = torch.tensor([3, 7, 7, 30, 0, 11])
    TAKEN = torch.tensor([True, False, True, True, False, True])

    def test_shuffling_is_a_uniform_permutation_of_the_rows_taken(self) -> None:
        torch.manual_seed(0)
        steps, taken = torch.tensor([0, 9, 1, 2]), torch.tensor([True, False, True, True])
        seen = Counter(
            tuple(exchanged(steps, taken, "shuffled")[taken].tolist()) for _ in range(3000)
        )
        assert set(seen) == set(itertools.permutations((0, 1, 2)))
        assert scipy.stats.chisquare(list(seen.values())).pvalue > 0.001
        assert sorted(exchanged(self.STEPS, self.TAKEN, "shuffled").tolist()) == sorted(
            self.STEPS.tolist()
        )

    def test_the_mean_is_one_step_and_is_kept_in_expectation(self) -> None:
        torch.manual_seed(0)
        drawn = torch.stack([exchanged(self.STEPS, self.TAKEN, "mean") for _ in range(3000)])
        assert bool((drawn == drawn[:, :1]).all())
        found = drawn[:, 0].double()
        assert set(found.tolist()) == {12, 13}
        assert abs(float(found.mean()) - (3 + 7 + 30 + 11) / 4) < 4 * float(found.std()) / 3000**0.5

    @pytest.mark.parametrize("step", [0, 17, 30])
    @pytest.mark.parametrize("exchange", ["none", "shuffled", "mean"])
    def test_equal_steps_stay(self, step: int, exchange: Exchange) -> None:
        steps = torch.full((9,), step)
        for _ in range(50):
            assert torch.equal(exchanged(steps, torch.ones(9, dtype=torch.bool), exchange), steps)

    def test_none_may_be_taken(self) -> None:
        none = torch.zeros(6, dtype=torch.bool)
        assert exchanged(self.STEPS, none, "mean").tolist() == [0] * 6
        assert len(exchanged(self.STEPS, none, "shuffled")) == 6


class TestControls:
    @pytest.mark.parametrize("name", [ENT, "sra", "sra(upstream=crop)", "crop+sra"])
    def test_operations_stay_and_strengths_move(self, name: str) -> None:
        rows = {"own": name, **dict(zip(CONTROLS, methods.controls_of(name), strict=True))}
        found: dict[str, Drawn] = {}
        for key, row in rows.items():
            desk = ready(row)
            batch = desk.batch()
            visited(desk, batch, 3 * torch.randn(len(batch.x), 3, generator=fixed()))
            found[key], out = steps_in(desk, batch)
            assert out.y is batch.y and out.w is batch.w
        own = found.pop("own")
        assert len(own.magnitude.unique()) > 3
        for drawn in found.values():
            assert torch.equal(drawn.codes, own.codes)
            assert torch.equal(drawn.negative, own.negative)
            assert not torch.equal(drawn.magnitude, own.magnitude)
        shuffled, mean = (found[key].magnitude[0] for key in CONTROLS)
        assert torch.equal(shuffled.sort().values, own.magnitude[0].sort().values)
        assert len(mean.unique()) == 1
        assert abs(float(mean[0]) - float(own.magnitude[0].double().mean())) < 1

    @pytest.mark.parametrize("control", CONTROLS)
    @pytest.mark.parametrize("name", ["entaugment(warmup=0)", "sra(exponent=1000.0)"])
    def test_links_after_it_draw_the_same(self, control: str, name: str) -> None:
        """With equal strengths there is nothing to exchange, and crops are the same too."""
        found = []
        for row in (f"{name}+crop", f"{control}(upstream={name})+crop"):
            desk = ready(row)
            batch = desk.batch()
            visited(desk, batch, torch.zeros(len(batch.x), 3))
            found.append(desk.augment(batch, 1, 7).x)
        assert torch.equal(*found)

    @pytest.mark.parametrize("control", CONTROLS)
    @pytest.mark.parametrize("name", ["entaugment(warmup=1)", "sra"])
    def test_random_steps_stay_as_they_are(self, control: str, name: str) -> None:
        one, other = ready(name), ready(f"{control}(upstream={name})")
        for desk in (one, other):
            visited(desk, desk.batch(), 3 * torch.randn(len(desk.batch().x), 3, generator=fixed()))
        batch = one.batch()
        assert torch.equal(one.augment(batch, 0, 2).x, other.augment(batch, 0, 2).x)
        assert not torch.equal(one.augment(batch, 1, 7).x, other.augment(batch, 1, 7).x)

    @pytest.mark.parametrize("control", CONTROLS)
    def test_strengths_are_exchanged_among_training_rows_alone(self, control: str) -> None:
        one, other = ready(ENT), ready(f"{control}(upstream={ENT})")
        batch = one.batch(elsewhere=4)
        for desk in (one, other):
            visited(desk, batch, 3 * torch.randn(len(batch.x), 3, generator=fixed()))
        own, theirs = (steps_in(desk, batch)[0].magnitude[0, :-4] for desk in (one, other))
        assert float(theirs.double().mean()) == pytest.approx(float(own.double().mean()), abs=1)
        assert torch.equal(one.augment(batch).x[-4:], other.augment(batch).x[-4:])

    @pytest.mark.parametrize("control", CONTROLS)
    def test_what_has_no_strengths_is_refused(self, control: str) -> None:
        spec = Spec(rows=9, classes=3, shape=(1, 8, 8))
        for row in (control, f"{control}(upstream=trivialaugment)", f"{control}(upstream=saflex)"):
            reason = methods.build(row).supports(MultiClass(), spec)
            assert reason.startswith(f"{control} needs upstream=, a method whose strengths follow")

    def test_only_the_upstream_of_a_control_is_changed(self) -> None:
        assert [
            adaptive(ready(name)).exchange for name in ("sra", *methods.controls_of("sra"))
        ] == [
            "none",
            "shuffled",
            "mean",
        ]


def fixed() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def test_each_epoch_tells_the_strengths_over_rows() -> None:
    desk = ready(ENT)
    desk.ctx.forget()
    desk.begin_epoch(0)
    assert desk.ctx.take_log() == {}, "no row has been visited"
    batch = desk.batch()
    visited(desk, batch, 3 * torch.randn(len(batch.x), 3))
    desk.begin_epoch(1)
    values = desk.method.learned()["strength"][batch.index].double().numpy()
    told = desk.ctx.take_log()
    assert told["strength_mean"] == pytest.approx(values.mean())
    assert told["strength_sd"] == pytest.approx(values.std(ddof=1), rel=1e-5)


@pytest.mark.parametrize("name", ["entaugment(warmup=1)", "sra"])
def test_a_run_stores_the_strengths_of_rows_and_logs_them(name: str) -> None:
    method = methods.build(name)
    run = Run(
        benchmark="contract", data="c", model="small_cnn(width=0.25)", method=name,
        training=Training(epochs=4, batch_size=8),
    )  # fmt: skip
    made = splits(Case(1), meta=False)
    fitted = fit(run, made, method)
    strength = method.learned()["strength"]
    assert len(strength) == len(made.train)
    seen = strength >= 0
    assert bool((strength <= 1).all()) and bool((strength[~seen] == -1).all())
    # SRA asks about half of the batches: in two epochs of five steps, five of ten.
    assert float(seen.double().mean()) > (0.99 if name.startswith("ent") else 0.5)
    assert float(strength[seen].std()) > 0
    lines = [line for line in fitted.state.metric_lines if "strength_mean" in line]
    assert len(lines) == 3, "from the second epoch on"


@pytest.mark.parametrize(
    "name", [ENT, "sra", *(f"{c}(upstream={n})" for c in CONTROLS for n in (ENT, "sra"))]
)
def test_no_step_waits_for_the_device(name: str) -> None:
    assert check("waits", lambda: methods.build(name), Case(3)) == ""


def test_other_data_and_upstreams_are_refused_with_a_reason() -> None:
    image, task = Spec(9, 3, (3, 8, 8)), MultiClass()
    for name in ("entaugment", "sra"):
        method = methods.build(name)
        assert method.supports(task, image) == ""
        assert "one label per row" in method.supports(MultiLabel(), image)
        assert "vectors" in method.supports(task, Spec(9, 3, (5,), kind="vector"))
        assert "4 channels" in method.supports(task, Spec(9, 3, (4, 8, 8)))
        early = methods.build(f"{name}(upstream=self_distil)").supports(task, image)
        assert early.startswith(f"{name} works on rows before this step's forward pass, which its")
        assert "square" in methods.build(f"{name}(upstream=rotate90)").supports(
            task, Spec(9, 3, (3, 8, 9))
        )
    mixed = methods.build("entaugment(upstream=crop+mixup)").supports(task, image)
    assert mixed.endswith("its upstream mixes rows")
    assert methods.build("sra(upstream=mixup)").supports(task, image) == ""


@pytest.mark.parametrize(
    "chain", ["mixup+entaugment", "entaugment+crop+mixup", "crop+entaugment+cutmix"]
)
def test_a_chain_that_mixes_the_rows_of_entaugment_is_refused(chain: str) -> None:
    with pytest.raises(methods.NamingError, match=r"entaugment remembers .* mixes rows"):
        methods.build(chain)
    methods.build("entaugment+crop+flip+random_erasing")
    methods.build("crop+mixup+sra")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("entaugment(warmup=-1)", "warmup: expected 0 or more epochs, got -1"),
        ("entaugment(entloss=-0.1)", "entloss: expected a weight of 0 or more, got -0.1"),
        ("sra(n=0)", "n: expected 1 operation or more, got 0"),
        ("sra(exponent=0.0)", "exponent: expected a number above 0, got 0.0"),
    ],
)
def test_arguments_out_of_range_are_refused(name: str, told: str) -> None:
    with pytest.raises(methods.NamingError, match=told):
        methods.build(name)


def test_captions_say_what_upstream_and_method_did() -> None:
    desk = ready("sra(upstream=flip)")
    assert desk.method.captions() == []
    batch = desk.batch()
    desk.augment(batch, step=1)
    told = desk.method.captions()
    assert len(told) == len(batch.x)
    assert any(each.startswith("mirrored, ") for each in told)
