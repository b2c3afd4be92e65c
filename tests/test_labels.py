"""Smoothing, resampling and robust losses against their formulas."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from torch.nn import functional as F

import methods
from benchmarks.training.context import OwnLoop, own_loop
from benchmarks.training.tasks import MultiLabel
from methods.base import Batch, Spec
from methods.labels import Balanced, GeneralisedCrossEntropy, LabelSmoothing, LogitAdjustment

COUNTS = (80, 15, 5)


def context(multi_label: bool = False) -> OwnLoop:
    """100 rows in three classes of 80, 15 and 5; row k holds the value k / 100."""
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor(COUNTS))
    x = (torch.arange(100).float() / 100).view(-1, 1, 1, 1)
    y = F.one_hot(labels, 3).float()
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(1, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return own_loop(model, optimizer, classes=3, train=[(x, y)], multi_label=multi_label)


def batch(ctx: OwnLoop, rows: int = 8) -> Batch:
    x = torch.rand(rows, 1, 1, 1)
    return ctx.batch(x, torch.arange(rows) % 3)


@pytest.mark.parametrize("eps", [0.0, 0.1, 1.0])
def test_smoothing_equals_the_library(eps: float) -> None:
    ctx = context()
    drawn = batch(ctx)
    out = LabelSmoothing(eps=eps).augment(drawn, ctx)
    logits = torch.randn(8, 3)
    expected = F.cross_entropy(logits, drawn.y.argmax(1), label_smoothing=eps, reduction="none")
    torch.testing.assert_close(ctx.task.losses(logits, out.y), expected)


def test_smoothing_of_several_labels_goes_to_a_half() -> None:
    ctx = context(multi_label=True)
    drawn = replace(batch(ctx), y=torch.tensor([[1.0, 0.0, 1.0]] * 8))
    out = LabelSmoothing(eps=0.2).augment(drawn, ctx)
    torch.testing.assert_close(out.y, torch.tensor([[0.9, 0.1, 0.9]] * 8))


def test_balanced_draws_classes_equally_and_rows_of_a_class_equally() -> None:
    ctx, method = context(), Balanced()
    method.begin_epoch(ctx)
    torch.manual_seed(0)
    drawn = torch.cat([method.augment(batch(ctx, 50), ctx).index for _ in range(120)])
    classes = np.digitize(drawn.numpy(), np.cumsum(COUNTS)[:2])
    assert stats.chisquare(np.bincount(classes, minlength=3)).pvalue > 0.001
    for number, (start, count) in enumerate(zip((0, 80, 95), COUNTS, strict=True)):
        inside = drawn[torch.from_numpy(classes == number)] - start
        assert stats.chisquare(torch.bincount(inside, minlength=count).numpy()).pvalue > 0.001


def test_balanced_rows_are_the_training_rows_that_their_index_names() -> None:
    ctx, method = context(), Balanced()
    method.begin_epoch(ctx)
    out = method.augment(batch(ctx), ctx)
    torch.testing.assert_close(out.x.flatten(), out.index.float() / 100)
    assert torch.equal(out.y, ctx.train.targets[out.index])
    assert float(out.w.sum()) == pytest.approx(1)


def test_balanced_never_draws_what_crossfit_holds_out() -> None:
    ctx, method = context(), Balanced()
    ctx.train.active = torch.cat(
        [torch.arange(0, 40), torch.arange(82, 90), torch.tensor([96, 99])]
    )
    method.begin_epoch(ctx)
    drawn = torch.cat([method.augment(batch(ctx, 50), ctx).index for _ in range(40)])
    assert set(drawn.tolist()) == set(ctx.train.active.tolist())
    classes = np.digitize(drawn.numpy(), np.cumsum(COUNTS)[:2])
    assert stats.chisquare(np.bincount(classes, minlength=3)).pvalue > 0.001


def test_balanced_comes_first_in_a_chain() -> None:
    with pytest.raises(methods.NamingError, match="must be the first link"):
        methods.build("flip+balanced")
    assert methods.canonical("balanced+flip") == "balanced+flip"
    methods.build("balanced+flip")


def test_logit_adjustment_shifts_by_the_log_of_the_class_shares() -> None:
    ctx, method = context(), LogitAdjustment(tau=1.5)
    method.setup(ctx)
    drawn, logits = batch(ctx), torch.randn(8, 3)
    shifted = logits + 1.5 * torch.tensor([0.8, 0.15, 0.05]).log()
    expected = F.cross_entropy(shifted, drawn.y.argmax(1), reduction="none")
    torch.testing.assert_close(method.losses(logits, drawn, ctx), expected)


def test_logit_adjustment_makes_the_balanced_rule_optimal() -> None:
    """With logits log p(x | k), adjusted probabilities are the posterior of the training."""
    ctx, method = context(), LogitAdjustment()
    method.setup(ctx)
    likelihood = torch.rand(8, 3)
    posterior = likelihood * torch.tensor([0.8, 0.15, 0.05])
    posterior /= posterior.sum(1, keepdim=True)
    for label in range(3):
        drawn = replace(batch(ctx), y=F.one_hot(torch.full((8,), label), 3).float())
        loss = method.losses(likelihood.log(), drawn, ctx)
        torch.testing.assert_close(loss, -posterior[:, label].log())


@pytest.mark.parametrize("q", [0.1, 0.7, 1.0])
def test_gce_equals_its_formula_and_its_gradient(q: float) -> None:
    ctx, method = context(), GeneralisedCrossEntropy(q=q)
    drawn = batch(ctx)
    drawn = replace(drawn, y=drawn.y.double())
    logits = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    p = logits.softmax(1).gather(1, drawn.y.argmax(1, keepdim=True))[:, 0]
    losses = method.losses(logits, drawn, ctx)
    torch.testing.assert_close(losses, (1 - p**q) / q)
    # Zhang and Sabuncu, section 3.3: the gradient is that of cross-entropy times p^q.
    ours = torch.autograd.grad(losses.sum(), logits, retain_graph=True)[0]
    plain = torch.autograd.grad(ctx.task.losses(logits, drawn.y).sum(), logits)[0]
    torch.testing.assert_close(ours, plain * (p**q)[:, None].detach())


def test_gce_limits_are_cross_entropy_and_absolute_error() -> None:
    ctx = context()
    drawn = batch(ctx)
    drawn = replace(drawn, y=drawn.y.double())
    logits = torch.randn(8, 3, dtype=torch.float64)
    near = GeneralisedCrossEntropy(q=1e-6).losses(logits, drawn, ctx)
    torch.testing.assert_close(near, ctx.task.losses(logits, drawn.y), rtol=1e-4, atol=1e-5)
    absolute = (logits.softmax(1) - drawn.y).abs().sum(1) / 2
    torch.testing.assert_close(GeneralisedCrossEntropy(q=1.0).losses(logits, drawn, ctx), absolute)


def test_gce_keeps_its_precision_for_small_q() -> None:
    ctx = context()
    drawn, logits = batch(ctx), torch.randn(8, 3)
    for q in (1e-3, 1e-6, 1e-8):
        ours = GeneralisedCrossEntropy(q=q).losses(logits, drawn, ctx).double()
        logp = (logits.double().log_softmax(1) * drawn.y).sum(1)
        torch.testing.assert_close(ours, -torch.expm1(q * logp) / q, rtol=1e-5, atol=1e-6)


def test_gce_is_affine_in_soft_targets_and_finite_at_the_edge() -> None:
    ctx, method = context(), GeneralisedCrossEntropy()
    one, other = torch.rand(8, 3), torch.rand(8, 3)
    drawn = batch(ctx)
    logits = torch.randn(8, 3)
    parts = [method.losses(logits, replace(drawn, y=y), ctx) for y in (one, other)]
    mixed = method.losses(logits, replace(drawn, y=0.3 * one + 0.7 * other), ctx)
    torch.testing.assert_close(mixed, 0.3 * parts[0] + 0.7 * parts[1])
    extreme = torch.tensor([[1e4, -1e4, 0.0]] * 8, requires_grad=True)
    method.losses(extreme, drawn, ctx).sum().backward()
    assert extreme.grad is not None and bool(torch.isfinite(extreme.grad).all())


@pytest.mark.parametrize("method", [Balanced(), LogitAdjustment(), GeneralisedCrossEntropy()])
def test_several_labels_are_refused_with_the_reason(method: Balanced) -> None:
    spec = Spec(rows=10, classes=3, shape=(1, 8, 8))
    assert "one label per row" in method.supports(MultiLabel(), spec)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (LabelSmoothing, {"eps": 1.1}),
        (LogitAdjustment, {"tau": -1.0}),
        (GeneralisedCrossEntropy, {"q": 0.0}),
    ],
)
def test_values_that_cannot_be_are_refused(kind: type, value: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(value))}: expected"):
        kind(**value)
