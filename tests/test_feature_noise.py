"""ISDA and BSDA against their formulas, written out, in float64."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import methods
from analysis.runs import Run, Training
from benchmarks.contract import Case, bench, pass_state, splits
from benchmarks.training.context import OwnLoop, own_loop
from benchmarks.training.tasks import MultiClass, MultiLabel
from benchmarks.training.trainer import fit
from methods.base import Batch, Method, Model, Spec
from methods.feature_noise import Bsda, Isda, estimate, initial

WIDTH, CLASSES, ROWS = 5, 3, 12


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(9, WIDTH)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [F.relu(self.linear(x.flatten(1)))]


class Tiny(Model):
    """One layer with relu, so that some entries of the embedding are 0, and a head."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        self.trunk, self.head = Layer(), nn.Linear(WIDTH, classes)
        self.double()

    def embed(self, features: list[Tensor]) -> Tensor:
        return features[0]

    def embedding(self, batch: Batch) -> Tensor:
        return self.embed(self.features(batch.x))


class Desk:
    """A method that is set up with a tiny network, and steps of the training loop."""

    def __init__(self, text: str, multi_label: bool = False, classes: int = CLASSES) -> None:
        torch.manual_seed(0)
        self.model, self.method = Tiny(classes), methods.build(text)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.5)
        drawn = batch(0, classes)
        self.ctx: OwnLoop = own_loop(
            self.model,
            self.optimizer,
            classes=classes,
            train=[(drawn.x, drawn.y)],
            epochs=4,
            multi_label=multi_label,
        )
        self.method.setup(self.ctx)
        self.method.begin_epoch(self.ctx)

    def augment(self, drawn: Batch, step: int = 0, epoch: int = 3) -> Batch:
        self.ctx.epoch, self.ctx.step = epoch, step
        self.ctx.enter("augment")
        return self.method.augment(drawn, self.ctx)

    def losses(self, drawn: Batch, step: int = 0, epoch: int = 3) -> Tensor:
        out = self.augment(drawn, step, epoch)
        assert out.logits is not None
        return self.method.losses(out.logits, out, self.ctx)

    def step(self, drawn: Batch, step: int = 0, epoch: int = 3) -> None:
        loss = drawn.w @ self.losses(drawn, step, epoch)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def buffer(self, name: str) -> Tensor:
        (own,) = (p for p in self.method.parts() if isinstance(p, Isda | Bsda))
        return own.get_buffer(name)


def batch(number: int, classes: int = CLASSES, soft: bool = False) -> Batch:
    """Rows in float64 with weights that differ."""
    rng = torch.Generator().manual_seed(number)
    labels = torch.randint(classes, (ROWS,), generator=rng)
    y = F.one_hot(labels, classes).double()
    if soft:
        y = 0.6 * y + 0.4 * torch.rand(ROWS, classes, generator=rng).double().softmax(dim=1)
    w = torch.rand(ROWS, generator=rng).double() + 0.5
    x = torch.rand(ROWS, 1, 3, 3, generator=rng).double() + labels[:, None, None, None] / 3
    return Batch(x, y, w / w.sum(), torch.full((ROWS,), -1))


def even(number: int, classes: int = CLASSES) -> Batch:
    return replace(batch(number, classes), w=torch.full((ROWS,), 1 / ROWS).double())


def moments(embeddings: list[Tensor], targets: list[Tensor], k: int) -> np.ndarray:
    """numpy's covariance of all embeddings, each counted as often as it belongs to class k."""
    a, y = torch.cat(embeddings).numpy(), torch.cat(targets).numpy()
    return np.cov(a.T, aweights=y[:, k], ddof=0)


def gaussian(values: Callable[[Tensor], Tensor], variance: Tensor) -> Tensor:
    """The exact mean of a smooth function of a normal variable, by Gauss-Hermite quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    at = values(torch.from_numpy(nodes) * variance.sqrt())
    return torch.from_numpy(weights) @ at / math.sqrt(2 * math.pi)


class TestIsda:
    @pytest.mark.parametrize("soft", [False, True])
    def test_covariances_are_those_of_everything_seen(self, soft: bool) -> None:
        """While the network changes from step to step."""
        desk, embeddings, targets = Desk("isda"), [], []
        for number in range(5):
            drawn = batch(number, soft=soft)
            embeddings.append(desk.model.embedding(drawn).detach())
            targets.append(drawn.y)
            desk.step(drawn, number)
        for k in range(CLASSES):
            expected = torch.from_numpy(moments(embeddings, targets, k))
            torch.testing.assert_close(desk.buffer("covariance")[k], expected)
        torch.testing.assert_close(desk.buffer("count"), torch.cat(targets).sum(dim=0))
        found = desk.method.learned()
        expected = torch.stack([each.trace() for each in desk.buffer("covariance")])
        torch.testing.assert_close(found["covariance_trace"], expected)

    def test_a_class_that_is_not_in_the_batch_keeps_its_covariance(self) -> None:
        desk = Desk("isda")
        desk.augment(batch(0))
        before = desk.buffer("covariance").clone()
        drawn = batch(1)
        other = torch.zeros_like(drawn.y)
        other[:, 1] = 1
        desk.augment(replace(drawn, y=other))
        assert torch.equal(desk.buffer("covariance")[[0, 2]], before[[0, 2]])
        assert not torch.allclose(desk.buffer("covariance")[1], before[1])

    @pytest.mark.parametrize("control", [False, True])
    def test_the_loss_is_the_bound_that_jensens_inequality_gives(self, control: bool) -> None:
        """log sum_j of the exact mean of exp(z_j - z_y) under the noise of class y."""
        desk = Desk("isotropic_noise(upstream=isda)" if control else "isda(strength=2)")
        for number in range(3):
            desk.step(batch(number), number)
        drawn = batch(9)
        losses, logits = desk.losses(drawn), desk.model(drawn.x)
        weights, factor = desk.model.head.weight, (0.5 if control else 2) * 3 / 4
        for row, label in enumerate(drawn.y.argmax(dim=1)):
            sigma = desk.buffer("covariance")[label]
            if control:
                sigma = torch.eye(WIDTH).double() * sigma.trace() / WIDTH
            total = torch.zeros(()).double()
            for j in range(CLASSES):
                between = weights[j] - weights[label]
                gap = logits[row, j] - logits[row, label]
                variance = factor * between @ sigma @ between
                total = total + gaussian(lambda g, gap=gap: (gap + g).exp(), variance)
            torch.testing.assert_close(losses[row], total.log())

    def test_with_two_classes_the_exact_mean_is_below_the_bound(self) -> None:
        desk = Desk("isda(strength=2)", classes=2)
        for number in range(3):
            desk.step(batch(number, 2), number)
        drawn = batch(9, 2)
        losses, logits = desk.losses(drawn), desk.model(drawn.x)
        weights = desk.model.head.weight
        between = weights[1] - weights[0]
        for row, label in enumerate(drawn.y.argmax(dim=1)):
            gap = logits[row, 1 - label] - logits[row, label]
            variance = 2 * 3 / 4 * between @ desk.buffer("covariance")[label] @ between
            mean = gaussian(lambda g, gap=gap: F.softplus(gap + g), variance)
            assert F.softplus(gap) < mean < losses[row]

    def test_gradients_are_those_of_the_formula_written_out(self) -> None:
        desk = Desk("isda")
        for number in range(3):
            desk.step(batch(number), number)
        drawn = batch(9)
        desk.optimizer.zero_grad()
        other = copy.deepcopy(desk.model)
        (drawn.w @ desk.losses(drawn)).backward()
        sigma = desk.buffer("covariance")
        loss = torch.zeros(()).double()
        for row, label in enumerate(drawn.y.argmax(dim=1)):
            z = other(drawn.x)[row]
            for_class = []
            for j in range(CLASSES):
                between = other.head.weight[j] - other.head.weight[label]
                for_class.append(z[j] + 0.5 * 3 / 4 / 2 * between @ sigma[label] @ between)
            loss = loss + drawn.w[row] * F.cross_entropy(torch.stack(for_class), label)
        loss.backward()
        for one, two in zip(desk.model.parameters(), other.parameters(), strict=True):
            assert one.grad is not None and float(one.grad.abs().max()) > 1e-3
            torch.testing.assert_close(one.grad, two.grad)

    def test_a_soft_target_has_the_expected_loss_of_its_classes(self) -> None:
        desk, drawn = Desk("isda"), batch(9, soft=True)
        desk.augment(batch(0))
        out = desk.augment(drawn)
        assert out.logits is not None
        each = [
            desk.method.losses(out.logits, replace(out, y=hard.expand(ROWS, -1)), desk.ctx)
            for hard in torch.eye(CLASSES).double()
        ]
        expected = (drawn.y * torch.stack(each, dim=1)).sum(dim=1)
        torch.testing.assert_close(desk.method.losses(out.logits, out, desk.ctx), expected)

    def test_the_noise_grows_with_the_epoch_from_none(self) -> None:
        desk, drawn = Desk("isda"), batch(0)
        plain = F.cross_entropy(desk.model(drawn.x), drawn.y, reduction="none")
        losses = [desk.losses(drawn, epoch=epoch) for epoch in range(4)]
        torch.testing.assert_close(losses[0], plain)
        for one, two in pairwise(losses):
            assert bool((two > one).all())

    def test_the_control_has_noise_of_the_same_size_and_sees_the_same(self) -> None:
        """With covariances that are multiples of the identity nothing is left to tell apart."""
        one, two = Desk("isda"), Desk("isotropic_noise(upstream=isda)")
        drawn = batch(0)
        apart = (one.losses(drawn) - two.losses(drawn)).detach()
        assert float(apart.abs().max()) > 1e-4
        assert torch.equal(one.buffer("covariance"), two.buffer("covariance"))
        for desk in (one, two):
            traces = torch.tensor([1.0, 2.0, 3.0]).double()[:, None, None]
            desk.buffer("covariance").copy_(torch.eye(WIDTH).double() * traces)
        logits = one.model(drawn.x)
        torch.testing.assert_close(
            one.method.losses(logits, drawn, one.ctx), two.method.losses(logits, drawn, two.ctx)
        )


class Reference(nn.Module):
    """The estimator from torch's own layers."""

    def __init__(self, parameters: Tensor) -> None:
        super().__init__()
        self.linear = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(5))
        self.norm = nn.ModuleList(nn.BatchNorm1d(WIDTH) for _ in range(4))
        self.double()
        with torch.no_grad():
            rest = parameters.clone()
            for layer in (*self.linear, *self.norm):
                for own in (layer.weight, layer.bias):
                    own.copy_(rest[: own.numel()].view_as(own))  # type: ignore[arg-type, operator]
                    rest = rest[own.numel() :]  # type: ignore[operator, misc]
        assert not len(rest)

    def flat(self) -> Tensor:
        layers = (*self.linear, *self.norm)
        return torch.cat([p.detach().flatten() for each in layers for p in each.parameters()])

    def block(self, h: Tensor, layer: int) -> Tensor:
        return F.gelu(self.norm[layer](self.linear[layer](h)))

    def log_variance(self, a: Tensor) -> Tensor:
        return self.linear[4](self.block(self.block(a, 0), 1))

    def decode(self, m: Tensor) -> Tensor:
        return self.block(self.block(m, 2), 3)


def joint(
    model: Tiny, reference: Reference, drawn: Batch, draws: int, alpha: float, control: bool
) -> Tensor:
    """The loss as the authors' code has it: means over rows and draws, a sum of divergences."""
    noise = torch.randn(draws, ROWS, WIDTH, dtype=torch.float64)
    kept = (torch.rand(draws, ROWS, WIDTH, dtype=torch.float64) >= 0.8).double()
    a, labels = model.embedding(drawn), drawn.y.argmax(dim=1)
    log_variance = reference.log_variance(a)
    m = (log_variance / 2).exp().repeat(draws, 1) * noise.flatten(0, 1)
    move = kept.flatten(0, 1) * m / 0.2 * (a != 0).repeat(draws, 1)
    if control:
        size = (log_variance.exp() * (a != 0)).sum(dim=1) / 0.2 / WIDTH
        # A row of zeros has no noise, and the root no gradient there.
        move = size.clamp_min(1e-300).sqrt()[:, None].repeat(draws, 1) * noise.flatten(0, 1)
    copies = a.repeat(draws, 1) + move
    divergence = -0.5 * torch.sum(1 + log_variance - log_variance.exp())
    decoded = reference.decode(m)
    added = (
        F.cross_entropy(model.head(copies), labels.repeat(draws))
        + 8e-4 * divergence
        + F.mse_loss(decoded, a.repeat(draws, 1)) / 2
    )
    return F.cross_entropy(model(drawn.x), labels) + alpha * added


class TestBsda:
    @pytest.mark.parametrize("control", [False, True])
    def test_training_is_that_of_one_loss_of_network_and_estimator(self, control: bool) -> None:
        """Four joint steps, SGD for the network and torch's AdamW for the estimator."""
        inner = "bsda(draws=3, weight=0.7)"
        desk = Desk(f"isotropic_noise(upstream={inner})" if control else inner)
        model, reference = copy.deepcopy(desk.model), Reference(desk.buffer("estimator"))
        both: list[torch.optim.Optimizer] = [
            torch.optim.SGD(model.parameters(), lr=0.5),
            torch.optim.AdamW(reference.parameters(), lr=1e-3, weight_decay=1e-3),
        ]
        start, moved = desk.buffer("estimator").clone(), 0.0
        for number in range(4):
            drawn, epoch = even(number), number % 3 + 1
            desk.step(drawn, number, epoch)
            desk.ctx.enter("augment")  # seeds as before the method's own draws
            loss = joint(model, reference, drawn, 3, 0.7 * min(1, epoch / 2), control)
            for each in both:
                each.zero_grad()
            loss.backward()
            for each in both:
                each.step()
            moved = float((desk.buffer("estimator") - start).abs().max())
        assert moved > 1e-3
        torch.testing.assert_close(desk.buffer("estimator"), reference.flat())
        for one, two in zip(desk.model.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(one, two)

    def test_the_loss_is_that_of_the_rows_own_logits_in_the_first_epoch(self) -> None:
        desk, drawn = Desk("bsda"), batch(0)
        plain = F.cross_entropy(desk.model(drawn.x), drawn.y, reduction="none")
        torch.testing.assert_close(desk.losses(drawn, epoch=0), plain)

    def test_weights_weigh_what_is_added_to_a_row(self) -> None:
        """So the estimator's first gradient is the weighted mean of those of single rows."""
        drawn, gradients, losses = batch(0), [], []
        for w in (drawn.w, *torch.eye(ROWS).double()):
            desk = Desk("bsda")
            losses.append(desk.losses(replace(drawn, w=w)))
            gradients.append(desk.buffer("first"))
        assert all(torch.equal(each, losses[0]) for each in losses)
        torch.testing.assert_close(gradients[0], drawn.w @ torch.stack(gradients[1:]))
        assert not torch.allclose(gradients[1], gradients[2])

    def test_noise_has_the_size_and_the_control_the_same_in_all_directions(self) -> None:
        """Exact for the expectation; its mean over many draws as a check of the draws."""
        torch.manual_seed(0)
        one, two = Bsda(draws=20_000), Bsda(draws=20_000)
        two.isotropic = True
        a = torch.rand(2, WIDTH).double() + 0.1
        a[0, 1] = a[1, 2] = a[1, 4] = 0
        noise = torch.randn(20_000, 2, WIDTH).double()
        seen = estimate(4 * initial(WIDTH).double(), a, noise)
        kept = torch.rand_like(noise) >= 0.8
        shaped, round_ = (m._moves(a, seen, noise, kept) for m in (one, two))
        assert (shaped[:, a == 0] == 0).all() and (round_[:, a == 0] != 0).all()
        expected = (seen.sigma.square() * (a != 0)) / 0.2
        for found, exact in (
            (shaped.square().mean(dim=0), expected),
            (round_.square().mean(dim=0), expected.mean(dim=1, keepdim=True).expand_as(a)),
        ):
            # The variance of a square is at most 3 / 0.2 - 1 times its mean squared: 5 errors.
            assert bool(((found - exact).abs() <= 5 * exact * math.sqrt(14 / 20_000)).all())
        scaled = round_ / noise
        torch.testing.assert_close(scaled[0].square().sum(dim=1), expected.sum(dim=1))
        assert float(seen.sigma.std(dim=1).min()) > 0.1

    def test_the_frozen_estimator_stays_and_everything_else_is_the_same(self) -> None:
        one, two = Desk("bsda"), Desk("frozen(upstream=bsda)")
        start, drawn = one.buffer("estimator").clone(), batch(0)
        assert torch.equal(one.losses(drawn), two.losses(drawn))
        assert torch.equal(two.buffer("estimator"), start)
        assert not torch.equal(one.buffer("estimator"), start)
        assert not torch.equal(one.losses(drawn, 1), two.losses(drawn, 1))

    def test_several_labels_a_row(self) -> None:
        desk, drawn = Desk("bsda(draws=2, kl=0, reconstruction=0)", multi_label=True), batch(0)
        y = torch.rand(ROWS, CLASSES).double().round()
        out = desk.augment(replace(drawn, y=y))
        assert out.logits is not None
        desk.ctx.enter("augment")
        noise = torch.randn(2, ROWS, WIDTH, dtype=torch.float64)
        kept = torch.rand_like(noise) >= 0.8
        a = desk.model.embedding(drawn)
        seen = estimate(Desk("bsda").buffer("estimator"), a, noise)
        copies = a + kept * seen.magnitudes * 5 * (a != 0)
        each = [F.binary_cross_entropy_with_logits(desk.model.head(c), y, reduction="none")
                for c in copies]  # fmt: skip
        plain = F.binary_cross_entropy_with_logits(out.logits, y, reduction="none")
        expected = plain.mean(dim=1) + 0.5 * torch.stack(each).mean(dim=(0, 2))
        torch.testing.assert_close(desk.method.losses(out.logits, out, desk.ctx), expected)

    def test_a_batch_of_one_row(self) -> None:
        desk, drawn = Desk("bsda"), batch(0)
        one = Batch(drawn.x[:1], drawn.y[:1], torch.ones(1).double(), drawn.index[:1])
        assert bool(torch.isfinite(desk.losses(one)).all())
        assert bool(torch.isfinite(desk.buffer("estimator")).all())

    def test_sigma_is_the_mean_over_the_rows_of_the_last_epoch(self) -> None:
        desk = Desk("frozen(upstream=bsda)")
        desk.augment(batch(7))
        desk.method.begin_epoch(desk.ctx)
        sigmas, start = [], desk.buffer("estimator")
        for number in range(2):
            desk.augment(batch(number), number)
            a = desk.model.embedding(batch(number))
            sigmas.append(estimate(start, a, torch.zeros(1, *a.shape).double()).sigma.detach())
        torch.testing.assert_close(desk.method.learned()["sigma"], torch.cat(sigmas).mean(dim=0))

    def test_losses_belong_to_the_batch_that_augment_returned_last(self) -> None:
        desk, drawn = Desk("bsda"), batch(0)
        first, second = desk.augment(drawn), desk.augment(drawn, 1)
        assert first.logits is not None and second.logits is not None
        desk.method.losses(second.logits, second, desk.ctx)
        with pytest.raises(RuntimeError, match="augment returned last"):
            desk.method.losses(first.logits, first, desk.ctx)
        desk.method.finish(desk.ctx)
        with pytest.raises(RuntimeError, match="augment returned last"):
            desk.method.losses(second.logits, second, desk.ctx)


ROWS_OF_TESTS = (
    "isda", "bsda(draws=2)", "isotropic_noise(upstream=isda)", "frozen(upstream=bsda(draws=2))",
    "isotropic_noise(upstream=bsda(draws=2, upstream=mixup))",
)  # fmt: skip


@pytest.mark.parametrize("text", ROWS_OF_TESTS)
def test_the_state_makes_the_next_steps_the_same(text: str) -> None:
    one = bench(lambda: methods.build(text), Case(1))
    other = bench(lambda: methods.build(text), Case(1))
    found = []
    for step in range(3):
        one.augment(one.batch(step=step), epoch=2, step=step)
    other.ctx.model.load_state_dict(one.ctx.model.state_dict())
    pass_state(one.method, other.method)
    for ready in (one, other):
        ready.begin_epoch(3)
        out = ready.augment(ready.batch(step=9), epoch=3, step=9)
        assert out.logits is not None
        found.append((ready.method.losses(out.logits, out, ready.ctx), ready.method.state_dict()))
    assert torch.equal(found[0][0], found[1][0])
    for name, value in found[0][1].items():
        assert torch.equal(value, found[1][1][name])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("isda(upstream=gce)", "isda needs the task's loss, but its upstream"),
        ("bsda(upstream=crop+logit_adjustment)", "bsda needs the task's loss, but its upstream"),
        ("isda(upstream=self_distil)", "isda works on rows before this step's forward pass, which"),
        ("bsda(upstream=saflex)", "bsda works on rows before this step's forward pass, which"),
        ("isotropic_noise", "isotropic_noise needs upstream=isda or upstream=bsda"),
        ("isotropic_noise(upstream=crop)", "isotropic_noise needs upstream=isda"),
        ("frozen(upstream=isda)", "frozen needs upstream="),
        ("isda(upstream=mixup)", ""),
        ("bsda(upstream=balanced+crop)", ""),
        ("isotropic_noise(upstream=bsda(upstream=lpa3))", ""),
        ("frozen(upstream=bsda)", ""),
    ],
)
def test_what_they_take(text: str, reason: str) -> None:
    spec = Spec(rows=9, classes=3, shape=(1, 8, 8))
    found = methods.build(text).supports(MultiClass(), spec)
    assert found.startswith(reason) and bool(found) == bool(reason)
    several = methods.build("isda").supports(MultiLabel(), spec)
    assert several.startswith("isda needs one label per row")
    assert methods.build("bsda").supports(MultiLabel(), spec) == ""


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Isda(strength=-1), "strength: expected 0 or more, got -1"),
        (lambda: Bsda(draws=0), "draws: expected 1 or more, got 0"),
        (lambda: Bsda(drop=1), r"drop: expected a number in \[0, 1\), got 1"),
        (lambda: Bsda(kl=-1), "kl: expected 0 or more, got -1"),
        (lambda: Bsda(weight=math.nan), "weight: expected 0 or more, got nan"),
    ],
)
def test_arguments_that_are_refused(make: Callable[[], Method], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


class Twice(Tiny):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + super().forward(x)


def test_networks_that_are_refused() -> None:
    desk = Desk("isda")
    desk.ctx.model = cast("Any", nn.Linear(3, 3))
    with pytest.raises(TypeError, match="whose head is accessible"):
        desk.method.setup(desk.ctx)
    model = Twice()
    ctx = own_loop(model, desk.optimizer, classes=CLASSES, train=[(batch(0).x, batch(0).y)])
    with pytest.raises(RuntimeError, match="called its head 2 times in a step, expected 1"):
        desk.method.augment(batch(0), ctx)
    assert type(model.head) is nn.Linear


def test_under_bfloat16_the_noise_is_float32() -> None:
    for text in ("isda", "bsda(draws=2)"):
        training = Training(epochs=2, batch_size=16, precision="bfloat16")
        run = Run(benchmark="so", data="", model="small_cnn(width=0.25)", method="so",
                  training=training)  # fmt: skip
        method = methods.build(text)
        found = fit(run, splits(Case(1), meta=False), method)
        assert all(each.dtype == torch.float32 for each in method.learned().values())
        assert np.isfinite(found.predictions["test_last_logits"]).all()
