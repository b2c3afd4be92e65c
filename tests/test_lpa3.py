"""LP-A3: what an attack keeps, changes and costs, against other ways to say the same."""

from __future__ import annotations

import copy
import io
import json
import math
import os
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pytest
import scipy.special
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from analysis.runs import Run, Training
from benchmarks.contract import (
    BATCH,
    CASES,
    Case,
    bench,
    splits,
)
from benchmarks.data.names import parse_benchmark
from benchmarks.data.splits import Protocol, Splits, arrays_of, make_splits
from benchmarks.training import models
from benchmarks.training.context import TrainingContext, own_loop
from benchmarks.training.schedule import make_optimizer
from benchmarks.training.tasks import MultiClass, task_of
from benchmarks.training.trainer import Fitted, fit
from methods import build, lpa3
from methods.base import Batch, Model, Spec
from methods.branches import BranchedNorm
from methods.functional import buffers_kept, noised, perceptual, row_norms
from methods.lpa3 import (
    GUARD,
    NOISE,
    Lpa3,
    Reference,
    Rules,
    attack,
    divergence,
    judge,
    likelihood,
    look,
    lowest,
    objective,
    predicted,
)
from methods.naming import NamingError
from tests.test_saflex import Problem, effects

SPEC = Spec(rows=16, classes=4, shape=(1, 12, 12))
STRICT = Rules(radius=0.02, lagrange=100.0, best=True)


def network(activation: str = "celu", spec: Spec = SPEC, seed: int = 0) -> Model:
    """In float64, with running statistics that some batches have moved, in eval mode."""
    torch.manual_seed(seed)
    model = models.build(f"small_cnn(width=0.125, activation={activation})", spec).double()
    for _ in range(20):
        model(torch.rand(16, *spec.shape, dtype=torch.float64))
    return cast("Model", model.eval())


def images(rows: int, seed: int = 1, spec: Spec = SPEC) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, *spec.shape, generator=generator, dtype=torch.float64)


def targets(rows: int, classes: int = 4) -> Tensor:
    return F.one_hot(torch.arange(rows) % classes, classes).double()


def started(x: Tensor, seed: int = 2) -> Tensor:
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
    return (x + NOISE * (2 * noise - 1)).clamp(0, 1)


@torch.no_grad()
def reference(model: Model, x: Tensor, y: Tensor, one: bool = True) -> Reference:
    seen = look(model, x)
    return Reference(seen.phi, y, likelihood(seen.logits, y, one), seen.logits)


def attacked(
    model: Model, x: Tensor, y: Tensor, rules: Rules, *, one: bool = True, spec: Spec = SPEC
) -> Tensor:
    return attack(
        partial(look, model), x, started(x), reference(model, x, y, one), rules, one, spec
    )


@torch.no_grad()
def distances(model: Model, x: Tensor, other: Tensor) -> Tensor:
    return row_norms(look(model, x).phi - look(model, other).phi)


class TestSchedule:
    def test_is_that_of_the_released_code(self) -> None:
        shares, multipliers = zip(*Rules(steps=5, lagrange=2.0).schedule(), strict=True)
        assert shares == pytest.approx([1, 0.630957, 0.398107, 0.251189, 0.158489], rel=1e-5)
        expected = [0.1, 0.158489, 0.251189, 0.398107, 0.630957]
        assert [each / 2 for each in multipliers] == pytest.approx(expected, rel=1e-5)

    def test_of_no_steps_is_empty_and_the_start_comes_back(self) -> None:
        model, x, y = network(), images(4), targets(4)
        assert Rules(steps=0).schedule() == []
        assert torch.equal(attacked(model, x, y, Rules(steps=0)), started(x))


def stages(seed: int, rows: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (rows, 8, 6, 6), (rows, 16, 3, 3), (rows, 5)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]


def distance(one: list[Tensor], other: list[Tensor]) -> Tensor:
    return row_norms(perceptual(one) - perceptual(other))


class TestPerceptualDistance:
    def test_is_that_of_cosines_place_by_place(self) -> None:
        one, other = stages(0), stages(1)
        square = torch.zeros(3, dtype=torch.float64)
        for a, b in zip(one, other, strict=True):
            cosine = (
                F.cosine_similarity(a.flatten(2), b.flatten(2), dim=1, eps=0)
                if (a.dim() == 4)
                else F.cosine_similarity(a, b, dim=1, eps=0)[:, None]
            )
            square += (2 - 2 * cosine).mean(dim=1)
        torch.testing.assert_close(distance(one, other), square.sqrt(), rtol=1e-9, atol=1e-9)

    def test_is_symmetric_and_zero_to_itself(self) -> None:
        one, other = stages(0), stages(1)
        assert torch.equal(distance(one, one), torch.zeros(3, dtype=torch.float64))
        assert torch.equal(distance(one, other), distance(other, one))

    def test_reaches_its_bound_at_opposite_features(self) -> None:
        one = stages(0)
        far = distance(one, [-each for each in one])
        torch.testing.assert_close(far, torch.full_like(far, 2 * math.sqrt(3)))
        assert bool((distance(one, stages(1)) < far).all())

    def test_does_not_see_the_length_of_a_channel_vector(self) -> None:
        one, other = stages(0), stages(1)
        scaled = [each * torch.rand(each[:, :1].shape, dtype=each.dtype) * 9 for each in one]
        torch.testing.assert_close(distance(scaled, other), distance(one, other))

    def test_has_a_finite_gradient_where_all_channels_are_zero(self) -> None:
        one = [each.clone() for each in stages(0)]
        one[0][:, :, 2, 2] = 0
        one[2][1] = 0
        for each in one:
            each.requires_grad_()
        for other in (stages(1), [each.detach() for each in one]):
            gradients = torch.autograd.grad(distance(one, other).sum(), one)
            assert all(bool(each.isfinite().all()) for each in gradients)

    def test_does_not_depend_on_the_number_of_places(self) -> None:
        one, other = stages(0), stages(1)
        wide, far = (each.repeat_interleave(2, dim=2) for each in (one[0], other[0]))
        torch.testing.assert_close(distance([wide], [far]), distance(one[:1], other[:1]))


class TestObjective:
    @pytest.mark.parametrize("one", [True, False])
    @pytest.mark.parametrize("margin", [0.0, 100.0])
    def test_gradient_is_that_of_central_differences(self, one: bool, margin: float) -> None:
        """With a margin that is exceeded and with one that is not."""
        model, x = network(), images(3)
        y = targets(3) if one else (images(3, seed=5).flatten(1)[:, :4] > 0.5).double()
        known = reference(model, x, y, one)
        rough = started(x) + 0.2 * (images(3, seed=9) - 0.5)

        def value(at: Tensor) -> Tensor:
            return objective(judge(look(model, at), known, margin, one), 0.7)

        judged = judge(look(model, rough), known, margin, one)
        active = bool((judged.excess > 0).any())
        assert active == (margin == 0)
        at = rough.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(value(at).sum(), at)
        for seed in range(4):
            direction = torch.randn(
                x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype
            )
            with torch.no_grad():
                change = value(rough + 1e-5 * direction) - value(rough - 1e-5 * direction)
            slope = (gradient * direction).flatten(1).sum(dim=1)
            torch.testing.assert_close(slope, change / 2e-5, rtol=1e-6, atol=1e-8)

    def test_is_written_as_in_the_paper_but_for_the_sign_of_the_distance(self) -> None:
        model, x, y = network(), images(5), targets(5)
        other = started(x) + 0.3 * (images(5, seed=9) - 0.5)
        found = objective(judge(look(model, other), reference(model, x, y), 0.002, True), 0.7)
        logs = [F.log_softmax(model(each), dim=1)[y.bool()] for each in (x, other)]
        hinge = (logs[0] - logs[1] - 0.002).clamp_min(0)
        assert bool((hinge > 0).any())
        torch.testing.assert_close(found, 0.7 * hinge - distances(model, x, other))

    def test_of_several_labels_every_one_has_its_constraint(self) -> None:
        logits = torch.tensor([[2.0, -1.0, 0.5], [0.1, 0.2, -3.0]], dtype=torch.float64)
        y = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
        expected = -F.binary_cross_entropy_with_logits(logits, y, reduction="none")
        torch.testing.assert_close(likelihood(logits, y, one=False), expected)
        moved = logits + torch.tensor([[0.0, 0.0, -1.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
        phi = torch.zeros(2, 3, dtype=torch.float64)
        known = Reference(phi, y, expected, logits)
        judged = judge(lpa3.Seen(phi, moved), known, 0.1, False)
        assert (judged.excess > 0).tolist() == [[False, False, True], [False, False, False]]
        assert judged.same.tolist() == [False, True]

    def test_a_soft_target_counts_its_classes(self) -> None:
        logits, y = images(4).flatten(1)[:, :3], torch.tensor([[0.3, 0.7, 0.0]] * 4).double()
        expected = -MultiClass().losses(logits, y)
        torch.testing.assert_close(likelihood(logits, y, one=True)[:, 0], expected)


class Linear(Model):
    """One channel of features, and logits that hardly bend."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.trunk = nn.ModuleList()
        self.scale = nn.Parameter(torch.rand(2, 1, 12, 12))
        self.head = nn.Linear(144, 4)
        with torch.no_grad():
            self.head.weight.mul_(0.5)

    def features(self, x: Tensor) -> list[Tensor]:
        return [torch.cat([x * self.scale[0], x * self.scale[1] + 0.1], dim=1), x]

    def embed(self, features: list[Tensor]) -> Tensor:
        return features[-1].flatten(1)


class TestStep:
    def test_changes_the_log_likelihood_by_the_margin(self) -> None:
        """To first order, on a network where that is nearly all; the guard takes its share."""
        model = Linear().double()
        x, y = 0.4 + 0.2 * images(6), targets(6)
        rules = Rules(steps=1, margin=1e-4)
        start = started(x)
        out = attacked(model, x, y, rules)
        with torch.no_grad():
            logs = [F.log_softmax(model(each), dim=1)[y.bool()] for each in (start, out)]
        change, moved = (logs[1] - logs[0]).abs(), row_norms(out - start)
        slope = change / moved
        torch.testing.assert_close(change, 1e-4 * slope / (slope + GUARD), rtol=0.02, atol=0)
        assert float(slope.median()) > 3 * GUARD

    def test_with_a_radius_is_as_long_as_the_radius_says(self) -> None:
        x, y = 0.4 + 0.2 * images(6), targets(6)
        for share in (1, 10**-0.5):
            steps = 1 if share == 1 else 2
            rules = Rules(steps=steps, radius=0.01)
            out = [attacked(network(), x, y, replace_steps(rules, k)) for k in (steps - 1, steps)]
            length = row_norms(out[1] - out[0])
            torch.testing.assert_close(length, torch.full_like(length, 0.01 * 12 * share))

    def test_goes_away_from_the_row(self) -> None:
        model, x, y = network(), images(8), targets(8)
        out = attacked(model, x, y, Rules(radius=0.02, lagrange=0.0))
        noise = noised(x, row_norms(out - x), 0, 1)
        assert bool((distances(model, x, out) > 1.2 * distances(model, x, noise)).all())

    @pytest.mark.parametrize("rules", [Rules(), STRICT])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_stays_finite_where_the_softmax_does_not(self, rules: Rules, dtype: Any) -> None:
        model, x = network().to(dtype), images(6).to(dtype)
        with torch.no_grad():
            spread = model(x).std()
            model.head.weight.mul_(120 / spread)
            model.head.bias.mul_(120 / spread)
        assert float(model(x).detach().abs().max()) > 120
        for y in (targets(6), 1 - targets(6)):
            out = attacked(model, x, (y / y.sum(dim=1, keepdim=True)).to(dtype), rules)
            assert bool(out.isfinite().all())
            assert float(out.min()) >= 0 and float(out.max()) <= 1

    @pytest.mark.parametrize("channels", [1, 3])
    def test_stays_in_the_range_exactly(self, channels: int) -> None:
        spec = Spec(rows=16, classes=4, shape=(channels, 12, 12))
        model = network(spec=spec)
        x = images(6, spec=spec).round()  # black and white: every step would leave
        for rules in (Rules(radius=0.1), Rules(margin=1.0), STRICT):
            out = attacked(model, x, targets(6), rules, spec=spec)
            assert float(out.min()) == 0 and float(out.max()) == 1
            assert not torch.equal(out, x)

    def test_of_a_row_does_not_depend_on_the_others(self) -> None:
        model, x, y = network(), images(8), targets(8)
        start = started(x)
        for rules in (Rules(steps=1), Rules(steps=5, radius=0.02), STRICT):
            whole = attack(
                partial(look, model), x, start, reference(model, x, y), rules, True, SPEC
            )
            part = attack(
                partial(look, model), x[:3], start[:3], reference(model, x[:3], y[:3]), rules,
                True, SPEC,
            )  # fmt: skip
            torch.testing.assert_close(whole[:3], part, rtol=0, atol=1e-10)


def replace_steps(rules: Rules, count: int) -> Rules:
    """The first ``count`` steps of these rules' schedule."""

    class Some(Rules):
        def schedule(self) -> list[tuple[float, float]]:
            return rules.schedule()[:count]

    return Some(steps=rules.steps, radius=rules.radius, margin=rules.margin)


def test_a_radius_of_nothing_leaves_the_start() -> None:
    model, x, y = network(), images(4), targets(4)
    out = attacked(model, x, y, Rules(radius=1e-12))
    torch.testing.assert_close(out, started(x), rtol=0, atol=1e-10)


class TestBestIterate:
    def test_is_the_farthest_feasible_one_of_all(self) -> None:
        """Every iterate, the first and the last included, is looked at by the test itself."""
        model, x, y = network(), images(16), targets(16)
        rules = Rules(radius=0.05, lagrange=1.0, margin=0.01, best=True)
        known, seen = reference(model, x, y), []

        def see(at: Tensor) -> lpa3.Seen:
            seen.append(at.detach().clone())
            return look(model, at)

        out = attack(see, x, started(x), known, rules, True, SPEC)
        assert len(seen) == 6 and torch.equal(seen[0], started(x))
        expected, kinds = x.clone(), set()
        for row in range(16):
            best, choice = 0.0, -1
            for place, iterate in enumerate(seen):
                with torch.no_grad():
                    logits = model(iterate[row : row + 1])
                    log_p = float(F.log_softmax(logits, dim=1) @ y[row])
                    same = bool(logits.argmax() == model(x[row : row + 1]).argmax())
                    far = float(distances(model, x, iterate)[row])
                if float(known.likelihood[row]) - log_p <= 0.01 - 1e-5 and same and far > best:
                    best, choice = far, place
            kinds.add(choice)
            if choice >= 0:
                expected[row] = seen[choice][row]
        assert torch.equal(out, expected)
        assert {5} < kinds, "the last iterate, and an earlier one, are the best of some row"

    def test_is_not_a_later_one_that_has_come_back(self) -> None:
        x, seen = images(2), []
        heights = [1.0, 3.0, 2.0, 1.5, 2.5, 0.5]

        def see(at: Tensor) -> lpa3.Seen:
            phi = heights[len(seen)] + 1e-3 * at.flatten(1).sum(dim=1, keepdim=True)
            seen.append(at.detach().clone())
            return lpa3.Seen(phi, torch.zeros(2, 4, dtype=x.dtype))

        known = Reference(
            torch.zeros(2, 1, dtype=x.dtype),
            targets(2),
            likelihood(torch.zeros(2, 4, dtype=x.dtype), targets(2), True),
            torch.zeros(2, 4, dtype=x.dtype),
        )
        out = attack(see, x, started(x), known, STRICT, True, SPEC)
        assert len(seen) == 6 and torch.equal(out, seen[1]) and not torch.equal(out, seen[2])

    def test_without_a_feasible_one_is_the_row_itself(self) -> None:
        model, x, y = network(), images(8), targets(8)
        known = reference(model, x, y)
        higher = known._replace(likelihood=known.likelihood + 1.0)  # no iterate can keep that
        out = attack(partial(look, model), x, started(x), higher, STRICT, True, SPEC)
        assert torch.equal(out, x)


# --- trained networks ---------------------------------------------------------------------------


class Trained(NamedTuple):
    """A network and the rows it was trained on, both in float32."""

    model: Model
    splits: Splits
    fitted: Fitted


DATA = os.environ.get("AUGBENCH_DATA")
SETS = ["digits(rows_per_class=40)", "pneumoniamnist(rows_per_class=150)"]
UNDER = "lpa3(preset=fast, warmup=4)"
NETWORKS = [(SETS[0], "none"), (SETS[0], UNDER), (SETS[1], "none")]
ROWS = 64
"""Training rows that are attacked and judged."""


@cache
def trained(benchmark: str, method: str, seed: int = 0) -> Trained:
    parsed = parse_benchmark(benchmark)
    root = Path(DATA or "")
    if not benchmark.startswith("digits"):
        file = root / "medmnist" / "pneumoniamnist.npz"
        if DATA is None or not file.exists():
            pytest.skip(f"{file} is needed: set AUGBENCH_DATA")
    arrays = arrays_of(parsed, root)
    made = make_splits(
        arrays, parsed, Protocol(), needs_meta=False, seed=seed, device=torch.device("cpu")
    )
    tiny = benchmark.startswith("digits")
    run = Run(
        benchmark=benchmark,
        data="",
        model="small_cnn(width=0.5)" if tiny else "resnet18(width=0.125)",
        method=method,
        seed=seed,
        training=Training(epochs=12 if tiny else 5, batch_size=32, learning_rate=0.003),
    )
    fitted = fit(run, made, build(method))
    return Trained(cast("Model", fitted.model), made, fitted)


def on_all_rows(found: Trained, method: str, epoch: int = 0) -> tuple[Batch, Batch, dict[str, Any]]:
    """Rows as drawn and as augmented, all attacked, with what was logged."""
    model = found.model.train()
    ctx = TrainingContext.of_splits(
        model, make_optimizer(model, Training()), task_of("multi-class"), found.splits,
        epochs=9, seed=0,
    )  # fmt: skip
    made = build(method)
    ctx.enter("setup")
    made.setup(ctx)
    ctx.epoch = epoch
    ctx.enter("begin_epoch")
    made.begin_epoch(ctx)
    batch = ctx.train.rows(torch.arange(ROWS))
    ctx.enter("augment")
    out = made.augment(batch, ctx)
    ctx.counter.close()
    return batch, out, ctx.take_log()


class Kept(NamedTuple):
    """What the test itself finds of attacked rows, in float64 and eval mode."""

    fallen: Tensor
    same: Tensor
    distance: Tensor
    noise: Tensor


@torch.no_grad()
def judged_apart(model: Model, x: Tensor, far: Tensor, y: Tensor) -> Kept:
    other = cast("Model", copy.deepcopy(model).double().eval())
    x, far = x.double(), far.double()
    logits, now = other(x), other(far)
    fallen = ((F.log_softmax(logits, 1) - F.log_softmax(now, 1)) * y).sum(dim=1)
    torch.manual_seed(0)
    noise = noised(x, row_norms(far - x), 0, 1)
    torch.testing.assert_close(row_norms(noise - x), row_norms(far - x), rtol=1e-6, atol=1e-6)
    return Kept(
        fallen,
        logits.argmax(1) == now.argmax(1),
        distances(other, x, far),
        distances(other, x, noise),
    )


class Evaluated(NamedTuple):
    """An attack on a trained network: what it says of itself, and what the test finds."""

    log: dict[str, Any]
    kept: Kept
    moved: Tensor
    start: Tensor


@cache
def evaluated(benchmark: str, method: str, preset: str) -> Evaluated:
    found = trained(benchmark, method)
    batch, out, log = on_all_rows(found, f"lpa3(preset={preset}, ratio=1.0, warmup=0)")
    far, model = out.x[ROWS:], cast("Model", copy.deepcopy(found.model).double().eval())
    x = batch.x.double()
    kept = judged_apart(found.model, batch.x, far, batch.y)
    return Evaluated(log, kept, row_norms(far - batch.x) > 0, distances(model, x, started(x)))


class TestTrained:
    @pytest.mark.parametrize("preset", ["strict", "fast"])
    @pytest.mark.parametrize(("benchmark", "method"), NETWORKS)
    def test_strict_keeps_margin_and_prediction_of_every_row(
        self, benchmark: str, method: str, preset: str
    ) -> None:
        log, kept, moved, _ = evaluated(benchmark, method, preset)
        assert float(kept.fallen.max()) <= 0.002 + 1e-6
        assert bool(kept.same.all())
        assert log["attack_margin_kept"] == log["attack_prediction_kept"] == 1
        assert log["attack_unmoved"] == pytest.approx(1 - float(moved.float().mean()))
        assert log["attack_unmoved"] < 0.05

    @pytest.mark.parametrize(("benchmark", "method"), NETWORKS)
    def test_strict_goes_further_than_noise_of_its_norm(self, benchmark: str, method: str) -> None:
        log, kept, _, start = evaluated(benchmark, method, "strict")
        assert float((kept.distance > kept.noise).double().mean()) >= 0.95
        assert float(kept.distance.mean()) > 1.2 * float(kept.noise.mean())
        assert float(kept.distance.mean()) >= 5 * float(start.mean())
        assert log["attack_distance"] == pytest.approx(float(kept.distance.mean()), rel=1e-4)
        assert log["attack_noise_distance"] == pytest.approx(float(kept.noise.mean()), rel=0.02)

    @pytest.mark.parametrize(("benchmark", "method"), NETWORKS)
    def test_without_the_best_iterate_most_rows_stay_near_the_margin(
        self, benchmark: str, method: str
    ) -> None:
        """What the steps do by themselves, before the filter; steps of half a unit's norm."""
        found = trained(benchmark, method)
        text = f"preset=strict, label=predicted, iterate=last, margin=0.02, radius={0.5 / 28}"
        batch, out, log = on_all_rows(found, f"lpa3({text}, ratio=1.0, warmup=0)")
        with torch.no_grad():
            own = predicted(found.model.eval()(batch.x), one=True)
        kept = judged_apart(found.model, batch.x, out.x[ROWS:], own)
        within = [float((kept.fallen <= times * 0.02).double().mean()) for times in (1, 3)]
        assert within[0] >= 0.8 and within[1] >= 0.98 and float(kept.same.double().mean()) >= 0.98
        assert log["attack_margin_kept"] == pytest.approx(within[0], abs=1.1 / ROWS)
        assert float(kept.same.double().mean()) == log["attack_prediction_kept"]

    def test_a_wider_margin_lets_rows_go_further(self) -> None:
        found = trained(SETS[0], "none")
        means = [
            on_all_rows(found, f"lpa3(preset=strict, iterate=last, ratio=1.0, warmup=0, {text})")[
                2
            ]["attack_distance"]
            for text in ("margin=0.002", "margin=0.3", "margin=9.0")
        ]
        assert all(b > a - 0.05 for a, b in pairwise(means))
        assert means[-1] > means[0] + 0.05

    def test_no_multiplier_and_no_margin_are_the_same_ascent(self) -> None:
        found = trained(SETS[0], "none")
        model = cast("Model", copy.deepcopy(found.model).double().eval())
        spec = found.splits.spec
        x, y = found.splits.train.inputs(torch.arange(32)).double(), found.splits.train.y[:32]
        one, other, held = (
            attacked(model, x, y.double(), rules, spec=spec)
            for rules in (
                Rules(radius=0.02, lagrange=0.0),
                Rules(radius=0.02, margin=math.inf),
                Rules(radius=0.02, margin=0.0, lagrange=100.0),
            )
        )
        assert torch.equal(one, other)
        assert float(distances(model, x, one).mean()) > float(distances(model, x, held).mean())

    @pytest.mark.parametrize("benchmark", SETS)
    def test_paper_reports_what_it_does_not_keep(self, benchmark: str) -> None:
        """Its figures are those that the test finds, in the attack's own batch statistics."""
        found = trained(benchmark, "none")
        batch, out, log = on_all_rows(found, "lpa3(ratio=1.0, warmup=0)")
        far = out.x[ROWS:]
        other = copy.deepcopy(found.model).train()
        with torch.no_grad():
            logits, now = other(batch.x), other(far)
        fallen = ((F.log_softmax(logits, 1) - F.log_softmax(now, 1)) * batch.y).sum(dim=1)
        held = float((fallen <= 0.002 + 1e-6).float().mean())
        assert log["attack_margin_kept"] == pytest.approx(held, abs=1.1 / ROWS)
        same = float((logits.argmax(1) == now.argmax(1)).float().mean())
        assert log["attack_prediction_kept"] == pytest.approx(same, abs=1e-6)
        assert held < 1, "the released rule leaves the margin for some rows"
        norms = row_norms(far - batch.x)
        assert log["attack_norm_50"] == pytest.approx(float(norms.quantile(0.5)), rel=1e-4)
        assert log["attack_norm_95"] == pytest.approx(float(norms.quantile(0.95)), rel=1e-4)
        assert log["attack_norm_05"] <= log["attack_norm_50"] <= log["attack_norm_95"]

    @pytest.mark.parametrize("benchmark", SETS)
    def test_fewer_rows_of_strict_than_of_paper_are_harder_than_their_clean_rows(
        self, benchmark: str
    ) -> None:
        """The constraint has one side: strict mostly ends on the other."""
        log, kept, _, _ = evaluated(benchmark, "none", "strict")
        share = float((kept.fallen > 0).double().mean())
        assert log["attack_harder"] == pytest.approx(share, abs=0.05)
        assert log["attack_fall"] == pytest.approx(float(kept.fallen.mean()), abs=1e-4)
        assert float(kept.fallen.mean()) < 0
        paper = on_all_rows(trained(benchmark, "none"), "lpa3(ratio=1.0, warmup=0)")[2]
        assert share < 0.5 < paper["attack_harder"]

    def test_a_smaller_multiplier_goes_less_far(self) -> None:
        log = evaluated(SETS[1], "none", "strict").log
        text = "lpa3(preset=strict, lagrange=1.0, ratio=1.0, warmup=0)"
        less = on_all_rows(trained(SETS[1], "none"), text)[2]
        assert less["attack_distance"] < 0.75 * log["attack_distance"]

    @pytest.mark.slow
    def test_harder_and_farther_over_six_networks(self) -> None:
        """What docs/methods/lpa3.md says of PneumoniaMNIST, as shares and mean distances."""
        texts = ("preset=strict", "preset=strict, lagrange=1.0", "preset=paper")
        logs = [
            [
                on_all_rows(trained(SETS[1], "none", seed), f"lpa3({text}, ratio=1.0, warmup=0)")[2]
                for text in texts
            ]
            for seed in range(6)
        ]
        harder, distance = (
            np.array([[log[name] for log in row] for row in logs])
            for name in ("attack_harder", "attack_distance")
        )
        strict, less, paper = harder.mean(axis=0)
        assert 0.2 < strict < 0.4 < less < 0.6 < paper < 0.9
        assert (harder[:, 2] > harder[:, 0] + 0.1).all()
        assert (distance[:, 1] < 0.75 * distance[:, 0]).all()

    def test_every_epoch_tells_what_it_did(self) -> None:
        lines = [json.loads(each) for each in trained(*NETWORKS[1]).fitted.state.metric_lines]
        logs = [line["log"] for line in lines]
        assert logs[:4] == [{"attack_selected": 0}] * 4
        for log in logs[4:]:
            assert log["attack_selected"] == pytest.approx(0.5, abs=0.02)
            assert log["attack_forwards"] == pytest.approx(1 + 0.5 * 4, abs=0.1)
            assert log["attack_margin_kept"] == log["attack_prediction_kept"] == 1


class TestFrozen:
    """The network stands still, whatever happens."""

    @staticmethod
    def _state(model: nn.Module) -> list[Any]:
        return [
            [
                *(each.clone() for each in model.state_dict().values()),
                *(each.grad.clone() for each in model.parameters() if each.grad is not None),
            ],
            [each.requires_grad for each in model.parameters()],
            [each.training for each in model.modules()],
            [name for name, _ in model.named_buffers()],
        ]

    @pytest.mark.parametrize("preset", ["paper", "strict"])
    def test_equals_an_attack_that_computes_all_gradients(
        self, preset: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As the released code does: a backward pass that fills the gradients of the weights."""
        found = []
        for free in (False, True):
            ready = bench(lambda: build(f"lpa3(preset={preset}, warmup=0)"), Case(3))
            if free:
                monkeypatch.setattr(lpa3, "frozen", lambda model: nullcontext())
                monkeypatch.setattr(torch.autograd, "grad", _backward)
            found.append(ready.augment(ready.batch()).x)
            trunk = cast("Model", ready.ctx.model).trunk
            filled = [each.grad is not None for each in trunk.parameters()]
            assert all(filled) if free else not any(filled)
        assert len(found[0]) == BATCH + BATCH // 2
        assert torch.equal(*found)

    @pytest.mark.parametrize("text", ["", "preset=strict", "preset=fast", "auxiliary_norm=true"])
    @pytest.mark.parametrize("after", [1, 2, 4])
    def test_is_left_as_it_was_when_the_attack_raises(self, text: str, after: int) -> None:
        name = f"lpa3({', '.join(filter(None, [text, 'warmup=0']))})"
        ready = bench(lambda: build(name), Case(1))
        model, calls = cast("Model", ready.ctx.model), []
        held, *others = model.parameters()
        held.requires_grad_(False)
        others[0].grad = torch.ones_like(others[0])
        before = self._state(model)

        def broken(*_: object) -> None:
            calls.append(1)
            if len(calls) == after:
                raise RuntimeError("broken")

        handle = model.trunk.register_forward_hook(broken)
        with pytest.raises(RuntimeError, match="broken"):
            ready.augment(ready.batch())
        handle.remove()
        _same(before, self._state(model))
        branches = [each.branch for each in model.modules() if hasattr(each, "branch")]
        assert not any(branches)

    @pytest.mark.parametrize("preset", ["paper", "strict", "fast"])
    def test_no_forward_of_the_attack_tracks_a_weight(self, preset: str) -> None:
        ready = bench(lambda: build(f"lpa3(preset={preset}, warmup=0)"), Case(1))
        model, asked = cast("Model", ready.ctx.model), []
        modes: list[bool] = []
        model.trunk.register_forward_hook(
            lambda *_: asked.append(any(each.requires_grad for each in model.parameters()))
        )
        model.trunk.register_forward_hook(
            lambda *_: modes.extend(each.training for each in model.modules())
        )
        before = self._state(model)
        batch = ready.batch()
        out = ready.augment(batch)
        assert asked and not any(asked)
        assert set(modes) == {preset == "paper"}, "the others ask for running statistics"
        _same(before, self._state(model))
        assert not out.x.requires_grad and out.x.dtype == batch.x.dtype
        assert torch.equal(out.x[:BATCH], batch.x)


def _backward(outputs: Tensor, inputs: Tensor) -> tuple[Tensor]:
    """As torch.autograd.grad, by a backward pass to every leaf."""
    outputs.backward()
    assert inputs.grad is not None
    return (inputs.grad,)


def _same(before: list[Any], after: list[Any]) -> None:
    assert len(before[0]) == len(after[0])
    for one, other in zip(before[0], after[0], strict=True):
        assert torch.equal(one, other)
    assert before[1:] == after[1:]


# --- selection ----------------------------------------------------------------------------------


class TestSelection:
    @pytest.mark.parametrize("ratio", [0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0])
    def test_takes_exactly_the_share_also_where_all_are_equal(self, ratio: float) -> None:
        for n in range(1, 12):
            tied = torch.zeros(n)
            assert lowest(tied, ratio).tolist() == list(range(round(ratio * n)))
            values = torch.randn(n, generator=torch.Generator().manual_seed(n))
            chosen = lowest(values, ratio)
            assert len(chosen) == round(ratio * n)
            assert set(chosen.tolist()) == set(np.argsort(values.numpy())[: len(chosen)].tolist())
            assert chosen.tolist() == sorted(chosen.tolist())

    def test_of_ties_the_first_ones(self) -> None:
        values = torch.tensor([0.0, -math.inf, 0.0, 0.0, -1.0, 0.0])
        assert lowest(values, 4 / 6).tolist() == [0, 1, 2, 4]

    def test_divergence_is_that_of_scipy_over_the_classes(self) -> None:
        now, before = images(5).flatten(1)[:, :6] * 9, images(5, seed=7).flatten(1)[:, :6] * 9
        p, q = (scipy.special.softmax(each.numpy(), axis=1) for each in (now, before))
        expected = scipy.special.rel_entr(p, q).sum(axis=1) / 6
        np.testing.assert_allclose(divergence(now, before, True).numpy(), expected, rtol=1e-10)
        p, q = (scipy.special.expit(each.numpy()) for each in (now, before))
        yes, no = scipy.special.rel_entr(p, q), scipy.special.rel_entr(1 - p, 1 - q)
        found = divergence(now, before, False).numpy()
        np.testing.assert_allclose(found, (yes + no).mean(axis=1), rtol=1e-8)

    @pytest.mark.parametrize("one", [True, False])
    def test_divergence_is_zero_to_itself_and_finite_at_the_ends(self, one: bool) -> None:
        sharp = torch.tensor([[500.0, -500.0, 0.0], [0.0, 1.0, 2.0]])
        assert torch.equal(divergence(sharp, sharp, one), torch.zeros(2))
        assert bool(divergence(sharp, -sharp, one).isfinite().all())
        assert bool((divergence(sharp, -sharp, one) > 0).all())

    @pytest.mark.parametrize("preset", ["paper", "strict"])
    def test_takes_the_rows_whose_prediction_has_changed_most(self, preset: str) -> None:
        ready = bench(lambda: build(f"lpa3(preset={preset}, ratio=0.25, warmup=0)"), Case(1))
        method, batch = cast("Lpa3", ready.method), ready.batch()
        first = ready.augment(batch)
        assert torch.equal(first.y[BATCH:], batch.y[:2]), "ties: the first"
        turned = batch.index[torch.tensor([3, 6])]
        method.get_buffer("before")[turned] += torch.tensor([40.0, 0.0, -40.0])
        second = ready.augment(batch, epoch=1, step=9)
        assert torch.equal(method.added().origin, batch.x[[3, 6]])
        assert torch.equal(second.y[BATCH:], batch.y[[3, 6]])
        # An average that forgets 99 %.
        value = method.get_buffer("consistency")[turned]
        assert bool((value < -1).all())
        third = method.get_buffer("consistency").clone()
        ready.augment(batch, epoch=2, step=18)
        again = method.get_buffer("consistency")[turned]
        torch.testing.assert_close(again, 0.01 * third[turned], rtol=1e-3, atol=1e-5)

    def test_rows_without_a_visit_come_first(self) -> None:
        ready = bench(lambda: build("lpa3(preset=strict, ratio=0.5, warmup=0)"), Case(1))
        method, batch = cast("Lpa3", ready.method), ready.batch()
        method.get_buffer("visited")[batch.index[:4]] = True
        ready.augment(batch)
        assert torch.equal(method.added().origin, batch.x[4:])

    @pytest.mark.parametrize("ratio", [0.25, 1.0])
    def test_rows_from_elsewhere_are_not_attacked(self, ratio: float) -> None:
        ready = bench(lambda: build(f"lpa3(preset=fast, ratio={ratio}, warmup=0)"), Case(1))
        method, batch = cast("Lpa3", ready.method), ready.batch(elsewhere=4)
        out = ready.augment(batch)
        assert len(out.x) - BATCH == round(4 * ratio)
        assert torch.equal(method.added().origin, batch.x[: round(4 * ratio)])
        assert not bool(method.get_buffer("visited")[-1:].any()) or ratio == 1

    @pytest.mark.parametrize("ratio", [0.25, 0.5, 1.0])
    def test_state_survives_and_the_same_rows_are_chosen(self, ratio: float) -> None:
        make = partial(build, f"lpa3(preset=fast, ratio={ratio}, warmup=0)")
        one = bench(make, Case(1))
        for step in range(5):
            one.augment(one.batch(step=step), step=step)
        fresh = bench(make, Case(1))
        file = io.BytesIO()
        torch.save(one.method.state_dict(), file)
        file.seek(0)
        other = bench(make, Case(1))
        other.method.load_state_dict(torch.load(file, weights_only=True))
        found = []
        for each in (one, other, fresh):
            with torch.no_grad():  # predictions move, and not all rows' alike
                cast("Model", each.ctx.model).head.weight.mul_(-9)
            found.append(each.augment(each.batch(step=3), epoch=1, step=30).x)
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2]) == (ratio == 1)

    def test_a_single_row_under_batch_statistics_is_left_alone(self) -> None:
        ready = bench(lambda: build("lpa3(warmup=0)"), Case(1))
        assert len(ready.augment(ready.batch(2)).x) == 2
        assert len(ready.augment(ready.batch(4), step=1).x) == 6


# --- the batch, its cost and what training makes of it ------------------------------------------


class TestBatch:
    @pytest.mark.parametrize("case", [each for each in CASES if each.inputs != "pair"], ids=str)
    def test_attacked_rows_follow_with_their_share(self, case: Case) -> None:
        ready = bench(lambda: build("lpa3(preset=strict, ratio=0.5, weight=0.3, warmup=0)"), case)
        batch = ready.batch()
        out = ready.augment(batch)
        assert torch.equal(out.x[:BATCH], batch.x) and torch.equal(out.y[:BATCH], batch.y)
        assert torch.equal(out.w[:BATCH], batch.w)
        assert torch.equal(out.index[:BATCH], batch.index)
        torch.testing.assert_close(out.w[BATCH:], torch.full((4,), 0.3 / 4))
        assert out.index[BATCH:].tolist() == [-1] * 4
        added = cast("Lpa3", ready.method).added()
        assert torch.equal(added.x, out.x[BATCH:]) and torch.equal(added.y, out.y[BATCH:])
        places = [int((batch.x == row).flatten(1).all(dim=1).nonzero()) for row in added.origin]
        assert torch.equal(out.y[BATCH:], batch.y[places])

    @pytest.mark.parametrize(
        ("text", "weight"),
        [
            ("preset=paper", 1.0),  # Algorithm 1, line 5
            ("preset=strict, ratio=0.25", 1.0),
            ("preset=strict, weight=0.4", 0.4),
        ],
    )
    def test_the_gradient_is_that_of_two_mean_losses(self, text: str, weight: float) -> None:
        ready = bench(lambda: build(f"lpa3({text}, warmup=0)"), Case(1))
        batch = ready.batch()
        out = ready.augment(batch)
        attacked = cast("Lpa3", ready.method).added().y.argmax(dim=1)
        model = ready.ctx.model.eval()
        names = list(dict(model.named_parameters()))
        labels = batch.y.argmax(dim=1)
        whole = torch.autograd.grad(
            out.w @ ready.method.losses(model(out.x), out, ready.ctx), list(model.parameters())
        )
        loss = F.cross_entropy(model(batch.x), labels)
        loss = loss + weight * F.cross_entropy(model(out.x[BATCH:]), attacked)
        parts = torch.autograd.grad(loss, list(model.parameters()))
        for name, one, other in zip(names, whole, parts, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6, msg=name)

    def test_code_has_the_sum_of_the_authors_script(self) -> None:
        """CE(clean) + 0.5 * the mean over the whole batch of the attacked rows' CE, masked."""
        ready = bench(lambda: build("lpa3(preset=code, warmup=0)"), Case(1))
        batch = ready.batch()
        out = ready.augment(batch)
        assert out.logits is not None
        losses = F.cross_entropy(out.logits, out.y.argmax(dim=1), reduction="none")
        expected = losses[:BATCH].mean() + 0.5 * losses[BATCH:].sum() / BATCH
        torch.testing.assert_close(out.w @ losses, expected)

    @pytest.mark.parametrize("text", ["ratio=0.0, warmup=0", "warmup=2", "warmup=7, ratio=1.0"])
    @pytest.mark.parametrize("preset", ["paper", "strict"])
    def test_without_an_attack_a_run_is_plain_training(self, text: str, preset: str) -> None:
        plain, other = short("none"), short(f"lpa3(preset={preset}, {text})")
        for name, value in plain.model.state_dict().items():
            assert torch.equal(value, other.model.state_dict()[name])
        lines = [json.loads(line) for line in other.state.metric_lines]
        for line in lines:
            assert line["rows"]["forward"] == line["rows"]["backward"] == line["rows"]["drawn"]
            assert line["log"] == {"attack_selected": 0}

    def test_the_warm_up_is_plain_training_and_what_follows_is_not(self) -> None:
        plain, other = short("none"), short("lpa3(warmup=1)")
        first = [json.loads(each.state.metric_lines[0]) for each in (plain, other)]
        assert first[0]["train_loss"] == first[1]["train_loss"]
        assert first[0]["select"] == first[1]["select"]
        lines = [json.loads(line)["rows"] for line in other.state.metric_lines]
        assert lines[0]["trained"] == lines[0]["drawn"] == lines[0]["forward"]
        assert lines[1]["trained"] == 1.5 * lines[1]["drawn"]
        moved = [
            not torch.equal(a, b)
            for a, b in zip(
                plain.model.state_dict().values(), other.model.state_dict().values(), strict=True
            )
        ]
        assert any(moved)  # fmt: skip

    @pytest.mark.parametrize(
        ("text", "forward", "backward"),
        [
            ("ratio=1.0", 1 + 2 * 5, 5),
            ("ratio=1.0, steps=3", 1 + 2 * 3, 3),
            ("ratio=0.5", 1 + 0.5 * (1 + 2 * 5), 0.5 * 5),
            ("preset=strict, ratio=1.0", 1 + 5 + 1, 5),
            ("preset=strict, ratio=0.5", 1 + 0.5 * (5 + 1), 0.5 * 5),
            ("preset=fast, ratio=0.5", 1 + 0.5 * (3 + 1), 0.5 * 3),
            ("auxiliary_norm=true, ratio=1.0", 1 + 2 * 5 + 2, 5),
        ],
    )
    def test_passes_are_as_many_as_they_must(
        self, text: str, forward: float, backward: float
    ) -> None:
        """The look for the log is not counted; handing over logits is, once for each row."""
        ready = bench(lambda: build(f"lpa3({text}, warmup=0)"), Case(1))
        ready.ctx.forget()
        ready.augment(ready.batch())
        assert ready.ctx.counter.take() == (forward * BATCH, backward * BATCH)

    def test_the_look_is_taken_now_and_then_and_not_charged(self) -> None:
        ready = bench(lambda: build("lpa3(preset=fast, warmup=0)"), Case(1))
        method = cast("Lpa3", ready.method)
        looks = []
        for step in range(method.audit_every + 2):
            ready.augment(ready.batch(), step=step)
            looks.append("attack_distance" in ready.ctx.take_log())
        assert [place for place, told in enumerate(looks) if told] == [0, method.audit_every]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("preset=strict, auxiliary_norm=true", "expected statistics=batch with it"),
            ("iterate=best", "set statistics=running"),
        ],
    )
    def test_what_the_statistics_of_a_batch_do_not_allow(self, text: str, message: str) -> None:
        with pytest.raises(NamingError, match=message):
            build(f"lpa3({text})")

    def test_with_a_second_set_of_norms_attacked_rows_come_with_its_logits(self) -> None:
        ready = bench(lambda: build("lpa3(auxiliary_norm=true, warmup=0)"), Case(1))
        model = cast("Any", ready.ctx.model)
        for module in model.modules():
            if isinstance(module, BranchedNorm):
                nn.init.uniform_(module.auxiliary.weight)
        out = ready.augment(ready.batch())
        with torch.no_grad(), buffers_kept(model):
            expected = torch.cat([model(out.x[:BATCH]), model(out.x[BATCH:], branch=1)])
        assert out.logits is not None and out.logits.requires_grad
        torch.testing.assert_close(out.logits.detach(), expected)

    @pytest.mark.parametrize(
        "text",
        [
            "crop+lpa3(auxiliary_norm=true)",
            "head_refit(upstream=lpa3(auxiliary_norm=true))",
            "head_refit(upstream=crop+lpa3(auxiliary_norm=true))",
            "norm_noise(upstream=lpa3(auxiliary_norm=true))",
        ],
    )
    def test_the_second_set_is_asked_for_through_what_holds_it(self, text: str) -> None:
        assert {"auxiliary_norm", "features"} <= build(text).requires()
        fitted = short_with_meta(text.replace("true", "true, warmup=1"))
        assert fitted.result["auxiliary_norm"]
        assert json.loads(fitted.state.metric_lines[-1])["log"]["attack_selected"] > 0

    @pytest.mark.parametrize(
        ("model", "text", "error", "message"),
        [
            (nn.Sequential(nn.Flatten(), nn.Linear(144, 4)), "lpa3", TypeError, "got Sequential"),
            (network(), "lpa3(auxiliary_norm=true)", ValueError, "add a second one with"),
        ],
    )
    def test_in_a_loop_of_ones_own_what_the_network_lacks_is_told_before_it(
        self, model: nn.Module, text: str, error: type[Exception], message: str
    ) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        rows = [(torch.rand(8, 1, 12, 12), torch.arange(8) % 4)]
        ctx = own_loop(model, optimizer, classes=4, train=rows)
        with pytest.raises(error, match=message):
            build(text).setup(ctx)

    def test_the_label_is_the_own_prediction_or_the_target(self) -> None:
        """A margin of 0 that is held fast: the likelihood of that label alone must not fall."""
        for label in ("target", "predicted"):
            settings = "margin=0.0, radius=0.3, ratio=1.0, warmup=0"
            make = partial(build, f"lpa3(preset=strict, label={label}, {settings})")
            ready = bench(make, Case(1))
            model, batch = cast("Model", ready.ctx.model), ready.batch()
            out = ready.augment(batch)
            model.eval()
            with torch.no_grad():
                logits, now = model(batch.x), model(out.x[BATCH:])
            own = predicted(logits, True)
            assert not torch.equal(own, batch.y)
            fallen = [
                ((F.log_softmax(logits, 1) - F.log_softmax(now, 1)) * y).sum(dim=1).max()
                for y in (batch.y, own)
            ]
            kept = fallen[0 if label == "target" else 1]
            assert float(kept) <= 1e-6
            assert float(max(fallen)) > 1e-3, "the other label is not held"

    def test_strict_keeps_every_one_of_several_labels(self) -> None:
        ready = bench(
            lambda: build("lpa3(preset=strict, ratio=1.0, warmup=0)"), Case(1, "multi-label")
        )
        model, batch = ready.ctx.model, ready.batch()
        out = ready.augment(batch)
        model.eval()
        with torch.no_grad():
            losses = [
                F.binary_cross_entropy_with_logits(model(x), batch.y, reduction="none")
                for x in (batch.x, out.x[BATCH:])
            ]
            signs = [model(x) > 0 for x in (batch.x, out.x[BATCH:])]
        assert float((losses[1] - losses[0]).max()) <= 0.002 + 1e-6
        assert torch.equal(*signs)
        assert float(row_norms(out.x[BATCH:] - batch.x).median()) > 0.01

    def test_under_bfloat16_margins_are_checked_in_float32(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        kinds, real = set(), lpa3.judge

        def spy(seen: lpa3.Seen, *rest: Any) -> lpa3.Judged:
            judged = real(seen, *rest)
            kinds.update({seen.logits.dtype, judged.excess.dtype})
            return judged

        monkeypatch.setattr(lpa3, "judge", spy)
        fitted = short("lpa3(preset=strict, warmup=0)", precision="bfloat16")
        assert kinds == {torch.float32}
        log = json.loads(fitted.state.metric_lines[-1])["log"]
        assert log["attack_margin_kept"] == log["attack_prediction_kept"] == 1


def short(method: str, **training: Any) -> Fitted:
    run = Run(
        benchmark="contract",
        data="",
        model="small_cnn(width=0.25)",
        method=method,
        training=Training(epochs=2, batch_size=12, **training),
    )
    return fit(run, splits(Case(1), False), build(method))


# --- warm start ---------------------------------------------------------------------------------


class TestRefresh:
    MAKE = staticmethod(partial(build, "lpa3(preset=strict, ratio=1.0, refresh=2, warmup=0)"))

    def test_goes_on_from_the_stored_perturbation_by_the_last_steps(self) -> None:
        ready = bench(self.MAKE, Case(1))
        batch = ready.batch()
        first = ready.augment(batch).x[BATCH:]
        seen: list[Tensor] = []
        cast("Model", ready.ctx.model).trunk.register_forward_hook(
            lambda _, inputs, __: seen.append(inputs[0].detach().clone())
        )
        ready.ctx.forget()
        second = ready.augment(batch, epoch=1, step=9).x[BATCH:]
        assert ready.ctx.counter.take() == ((1 + 2 + 1) * BATCH, 2 * BATCH)
        moved = row_norms(first - batch.x) > 0
        assert bool(moved.any())
        torch.testing.assert_close(seen[1][moved], first[moved], rtol=0, atol=1e-3)
        assert not torch.equal(first, second)
        ready.ctx.forget()
        ready.augment(batch, epoch=2, step=18)
        assert ready.ctx.counter.take() == ((1 + 5 + 1) * BATCH, 5 * BATCH), "made anew"

    def test_new_rows_among_stored_ones_are_attacked_from_the_start(self) -> None:
        ready = bench(self.MAKE, Case(1))
        one = ready.batch()
        ready.augment(one)
        fresh = [row for row in range(36) if row not in one.index.tolist()][:3]
        index = torch.cat([one.index[:5], torch.tensor(fresh)])
        ready.ctx.forget()
        out = ready.augment(ready.ctx.train.rows(index), epoch=1, step=9)
        counted = ready.ctx.counter.take()[1]
        made = cast("Lpa3", ready.method).get_buffer("made")
        assert made[index[5:]].tolist() == [1, 1, 1]
        assert counted == 5 * 2 + 3 * 5
        assert len(out.x) == 16

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("lpa3(refresh=2)", "set statistics=running"),
            ("lpa3(refresh=0)", "refresh: expected 1 or more epochs, got 0"),
            ("crop+lpa3(preset=fast, refresh=2)", "must be the first link"),
            ("lpa3(ratio=1.5)", "ratio: expected a number in [0, 1], got 1.5"),
            ("lpa3(weight=0)", "weight: expected a number above 0, got 0"),
            ("lpa3(warmup=-1)", "warmup: expected 0 or more epochs, got -1"),
            ("lpa3(radius=0)", "radius: expected a number above 0, got 0"),
            ("lpa3(steps=-1)", "steps: expected 0 or more, got -1"),
            ("lpa3(margin=-0.1)", "margin: expected 0 or more, got -0.1"),
            ("lpa3(lagrange=-1)", "lagrange: expected 0 or more, got -1"),
        ],
    )
    def test_what_cannot_be_is_refused(self, text: str, said: str) -> None:
        with pytest.raises(NamingError) as caught:
            build(text)
        assert said in str(caught.value)


class TestUpstreams:
    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("lpa3(upstream=crop)", ""),
            ("lpa3(upstream=mixup)", "its upstream mixes rows: set ratio=1"),
            ("lpa3(upstream=mixup, ratio=1.0)", ""),
            ("lpa3(upstream=crop, preset=fast, refresh=2)", "its upstream may change the pixels"),
            ("lpa3(upstream=self_distil)", "its upstream has already run"),
            ("lpa3(upstream=lpa3)", ""),
            ("norm_noise", "needs upstream=lpa3"),
            ("norm_noise(upstream=crop)", "needs upstream=lpa3"),
            ("norm_noise(upstream=lpa3(preset=code))", ""),
            (
                "saflex(upstream=lpa3(auxiliary_norm=true))",
                "which its upstream has already run",
            ),
        ],
    )
    def test_are_taken_or_refused_with_the_reason(self, text: str, reason: str) -> None:
        said = build(text).supports(MultiClass(), SPEC)
        assert reason in said and bool(said) == bool(reason)

    def test_over_mixup_the_soft_target_is_kept(self) -> None:
        text = "lpa3(preset=strict, ratio=1.0, upstream=mixup(alpha=1.0), warmup=0)"
        ready = bench(lambda: build(text), Case(1))
        model, batch = ready.ctx.model, ready.batch()
        out = ready.augment(batch)
        assert bool(((out.y > 0.05) & (out.y < 0.95)).any())
        assert torch.equal(out.y[:BATCH], out.y[BATCH:])
        model.eval()
        with torch.no_grad():
            losses = [MultiClass().losses(model(x), out.y[:BATCH]) for x in out.x.split(BATCH)]
        assert float((losses[1] - losses[0]).max()) <= 0.002 + 1e-6

    @pytest.mark.parametrize("outer", ["random_label", "lpa3(warmup=0)"])
    def test_other_methods_take_its_batch(self, outer: str) -> None:
        name = outer.partition("(")[0]
        inner = "upstream=lpa3(preset=fast, warmup=0)"
        text = f"{name}({inner})" if name == outer else f"{name}(warmup=0, {inner})"
        fitted = short_with_meta(text)
        rows = json.loads(fitted.state.metric_lines[-1])["rows"]
        # Half of what random_label hands on, which is half a batch; all rows and half of them.
        share = 1.25 if outer == "random_label" else 1.5 * 1.5
        assert rows["trained"] == pytest.approx(share * rows["drawn"], rel=0.12)

    def test_autodo_does_not_take_it(self) -> None:
        spec = Spec(rows=8, classes=3, shape=(1, 12, 12))
        for text in ("autodo(upstream=lpa3)", "autodo(upstream=crop+lpa3(ratio=1.0))"):
            told = build(text).supports(MultiClass(), spec)
            assert "its upstream needs the network in training" in told

    @pytest.mark.parametrize(
        "text", ["mixup+lpa3", "crop+mixup+lpa3", "cutmix+crop+lpa3(preset=strict)"]
    )
    def test_a_chain_that_mixes_rows_before_it_is_refused(self, text: str) -> None:
        with pytest.raises(
            ValueError, match="lpa3 remembers the network's prediction for each row"
        ):
            build(text)

    @pytest.mark.parametrize("text", ["mixup+lpa3(ratio=1.0)", "crop+lpa3", "lpa3+mixup"])
    def test_other_chains_are_not(self, text: str) -> None:
        assert "features" in build(text).requires()

    @pytest.mark.parametrize("ratio", [0.25, 1.0])
    def test_attacked_rows_weigh_as_their_rows_do_and_together_what_the_clean_do(
        self, ratio: float
    ) -> None:
        settings = f"preset=fast, ratio={ratio}, weight=0.5, warmup=0"
        ready = bench(lambda: build(f"lpa3({settings}, upstream=soft_augmentation)"), Case(1))
        batch = ready.batch()
        out = ready.augment(batch)
        assert float(out.w[:BATCH].std()) > 0
        torch.testing.assert_close(out.w[BATCH:].sum(), 0.5 * out.w[:BATCH].sum())
        origin = cast("Lpa3", ready.method).added().origin
        places = [int((out.x[:BATCH] == row).flatten(1).all(dim=1).nonzero()) for row in origin]
        shares = out.w[BATCH:] / out.w[places]
        torch.testing.assert_close(shares, shares[:1].expand(len(places)))

    def test_rows_from_elsewhere_and_rows_without_weight_give_none(self) -> None:
        ready = bench(lambda: build("lpa3(preset=fast, ratio=1.0, warmup=0)"), Case(1))
        batch = ready.batch(elsewhere=4)
        out = ready.augment(batch)
        torch.testing.assert_close(out.w[BATCH:], batch.w[:4])
        none = ready.augment(replace(batch, w=(batch.index < 0).to(batch.w.dtype)), step=1)
        assert torch.equal(none.w[BATCH:], torch.zeros(4)), "their rows weigh nothing"


def short_with_meta(method: str) -> Fitted:
    made = build(method)
    run = Run(
        benchmark="contract",
        data="",
        model="small_cnn(width=0.25)",
        method=method,
        training=Training(epochs=2, batch_size=12),
    )
    return fit(run, splits(Case(1), "meta" in made.requires()), made)


class TestUnderSaflex:
    @pytest.mark.parametrize(
        ("clean", "text"),
        [(0.0, "preset=strict, ratio=1.0"), (0.25, "statistics=running, ratio=0.5")],
    )
    def test_every_added_row_gets_the_label_of_the_lowest_meta_loss(
        self, clean: float, text: str
    ) -> None:
        """Exact SGD steps row by row, label by label, over the batch that SAFLEX hands on."""
        spec, rows = Spec(rows=12, classes=4, shape=(1, 6, 6)), 12
        torch.manual_seed(0)
        model = cast("Model", models.build("mlp(width=0.125, activation=celu)", spec).double())
        x, meta = images(rows, spec=spec), images(30, seed=8, spec=spec)
        teacher = torch.randn(36, 4, dtype=torch.float64)
        y, meta_y = (
            F.one_hot((each.flatten(1) @ teacher).argmax(dim=1), 4).double() for each in (x, meta)
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ctx = own_loop(model, optimizer, classes=4, train=[(x, y)], meta=[(meta, meta_y)])
        inner = f"upstream=lpa3({text}, warmup=0)"
        method = build(f"saflex(labels=argmax, clean_fraction={clean}, meta_batch=full, {inner})")
        method.setup(ctx)
        ctx.begin_epoch(0)
        method.begin_epoch(ctx)
        out = method.augment(ctx.batch(x, y, torch.arange(rows)), ctx)
        refined = len(out.x) - round(clean * rows)
        assert refined > (1 - clean) * rows, "attacked rows are among those whose label is chosen"
        given = Problem(out.x[:refined], out.y[:refined], meta, meta_y)
        candidates = torch.eye(4, dtype=torch.float64).expand(refined, -1, -1)
        exact = effects(model, given, candidates, MultiClass())
        assert torch.equal(out.y[:refined].argmax(dim=1), exact.argmin(dim=1))
        added = method.added()
        assert added is not None and float(row_norms(added.x - added.origin).min()) > 0

    def test_its_batch_holds_refined_attacked_rows(self) -> None:
        text = "saflex(clean_fraction=0.0, derivative=difference, upstream=lpa3(warmup=0))"
        ready = bench(lambda: build(text), Case(1))
        batch = ready.batch()
        out = ready.augment(batch)
        assert len(out.x) == BATCH + BATCH // 2 and out.logits is not None
        assert float(out.w.sum()) == pytest.approx(2, rel=1e-5)
        added = ready.method.added()
        assert added is not None and torch.equal(out.x[BATCH:], added.x)


class TestNormNoise:
    def test_has_the_rows_and_norms_of_the_attack_and_no_more(self) -> None:
        inner = "lpa3(preset=strict, ratio=0.5, warmup=0)"
        one = bench(lambda: build(inner), Case(3))
        other = bench(lambda: build(f"norm_noise(upstream={inner})"), Case(3))
        batch = one.batch()
        attack_, noise = one.augment(batch), other.augment(batch)
        for part in ("y", "w", "index"):
            assert torch.equal(getattr(attack_, part), getattr(noise, part))
        assert torch.equal(noise.x[:BATCH], batch.x)
        origin = cast("Lpa3", one.method).added().origin
        norms = [row_norms(each.x[BATCH:] - origin) for each in (attack_, noise)]
        torch.testing.assert_close(norms[0], norms[1], rtol=1e-4, atol=1e-6)
        assert float(norms[0].max()) > 0
        assert float(noise.x.min()) >= 0 and float(noise.x.max()) <= 1
        added = other.method.added()
        assert added is not None and torch.equal(added.x, noise.x[BATCH:])
        delta = [(each.x[BATCH:] - origin).flatten(1) for each in (attack_, noise)]
        assert float(F.cosine_similarity(delta[0], delta[1]).abs().max()) < 0.4

    def test_has_the_second_set_of_norms_of_the_attack(self) -> None:
        inner = "lpa3(preset=code, warmup=0)"
        one = bench(lambda: build(inner), Case(3))
        other = bench(lambda: build(f"norm_noise(upstream={inner})"), Case(3))
        attack_, noise = one.augment(one.batch()), other.augment(other.batch())
        assert attack_.logits is not None and noise.logits is not None
        torch.testing.assert_close(noise.logits[:BATCH], attack_.logits[:BATCH])
        assert not torch.equal(noise.x[BATCH:], attack_.x[BATCH:])
        assert torch.equal(noise.w, attack_.w)
        model = cast("Any", other.ctx.model)
        with torch.no_grad(), buffers_kept(model):
            expected = model(noise.x[BATCH:], branch=1)
        torch.testing.assert_close(noise.logits[BATCH:].detach(), expected)

    @pytest.mark.parametrize("norm", [0.0, 0.01, 1.0, 4.0])
    def test_noise_has_the_norm_within_the_range(self, norm: float) -> None:
        x = images(5).round()  # half of all directions leave the range at once
        torch.manual_seed(0)
        noisy = noised(x, torch.full((5,), norm, dtype=x.dtype), 0.0, 1.0)
        expected = torch.full((5,), norm, dtype=x.dtype)
        torch.testing.assert_close(row_norms(noisy - x), expected, rtol=1e-6, atol=1e-9)
        assert float(noisy.min()) >= 0 and float(noisy.max()) <= 1

    def test_a_norm_beyond_reach_is_met_as_far_as_it_can(self) -> None:
        x = images(3)
        noisy = noised(x, torch.full((3,), 99.0, dtype=x.dtype), 0.0, 1.0)
        at_end = ((noisy == 0) | (noisy == 1)).double().mean()
        assert float(at_end) > 0.999

    def test_the_log_is_that_of_the_noise(self) -> None:
        inner = "lpa3(preset=strict, ratio=1.0, radius=0.2, warmup=0)"
        logs = []
        for text in (inner, f"norm_noise(upstream={inner})"):
            ready = bench(lambda text=text: build(text), Case(3))
            ready.augment(ready.batch())
            logs.append(ready.ctx.take_log())
        attack_, noise = logs
        assert attack_["attack_margin_kept"] == 1
        assert noise["attack_margin_kept"] < 1, "noise of this size is not kept within it"
        assert noise["attack_norm_50"] == pytest.approx(attack_["attack_norm_50"], rel=1e-4)
        assert noise["attack_distance"] != pytest.approx(attack_["attack_distance"], rel=0.01)

    def test_leaves_the_warm_up_alone(self) -> None:
        ready = bench(lambda: build("norm_noise(upstream=lpa3(warmup=1))"), Case(1))
        batch = ready.batch()
        assert ready.augment(batch) is batch
