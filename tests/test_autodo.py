"""AutoDO against brute force: hypergradients by double backward, in float64, and its warp."""

from __future__ import annotations

import copy
import io
import json
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import scipy.ndimage
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional as F

import methods
from analysis import metrics, runs
from analysis.runs import Run, Training
from benchmarks.contract import Case, splits
from benchmarks.data.names import parse_benchmark
from benchmarks.data.splits import Protocol, Splits
from benchmarks.data.streams import RowStream, rows_from_tensors
from benchmarks.running.disk import Options, execute
from benchmarks.studies import cells
from benchmarks.training import models
from benchmarks.training.context import TrainingContext
from benchmarks.training.tasks import MultiClass, MultiLabel
from benchmarks.training.trainer import Fitted, fit
from methods import autodo as module
from methods import build
from methods.autodo import OPERATIONS, RANGES, AutoDO, RowStates, _matrix, _told
from methods.base import Batch, Context, Method, Model, Spec
from methods.functional import affine_warp, frozen, mode
from methods.implicit import (
    DivergenceError,
    Head,
    IndefiniteError,
    SingularError,
    series,
)
from methods.naming import NamingError

ROWS, META, CLASSES, EDGE, DECAY, RATE = 20, 12, 3, 8, 0.01, 0.05
LARGE = 8.0
IMAGES = Spec(rows=ROWS, classes=CLASSES, shape=(1, EDGE, EDGE))


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def one_hot(labels: Tensor) -> Tensor:
    return F.one_hot(labels, CLASSES).double()


def autodo(*arguments: str) -> str:
    """The name with these arguments, empty ones left out."""
    told = ", ".join(filter(None, arguments))
    return f"autodo({told})" if told else "autodo"


class Exact(RowStream):
    """Rows whose weights 1/B have the type of their targets."""

    def rows(self, index: Tensor) -> Batch:
        batch = super().rows(index)
        return replace(batch, w=torch.full_like(batch.y[:, 0], 1 / len(index)))


class Desk:
    """AutoDO in front of a network with BatchNorm in float64, called as the trainer calls it."""

    def __init__(
        self,
        text: str = "autodo",
        upstream: Method | None = None,
        *,
        dtype: torch.dtype = torch.float64,
        groups: Callable[[Model], list[dict[str, Any]]] | None = None,
        epochs: int = 4,
        start: int = 1,
    ) -> None:
        begin = f"start={start}" if start else ""
        method = build(autodo(text.partition("(")[2][:-1], begin))
        assert isinstance(method, AutoDO)
        method.upstream = upstream or method.upstream
        self.method = method
        torch.manual_seed(0)
        built = models.build("small_cnn(width=0.25, activation=celu)", IMAGES).to(dtype)
        self.model = cast("Model", built)
        rng = torch.Generator().manual_seed(1)
        labels = torch.arange(ROWS + META) % CLASSES
        x = torch.rand(ROWS + META, 1, EDGE, EDGE, generator=rng).to(dtype) * 0.6
        x[torch.arange(ROWS + META), :, labels] += 0.4
        y = one_hot(labels).to(dtype)
        self.meta_x, self.meta_y = x[ROWS:], y[ROWS:]
        self.ctx = TrainingContext(
            self.model,
            torch.optim.SGD(
                groups(self.model) if groups else self.model.parameters(),
                lr=0.1,
                weight_decay=DECAY,
            ),
            MultiClass(),
            IMAGES,
            Exact(rows_from_tensors(x[:ROWS], y[:ROWS]), 0, "train"),
            RowStream(rows_from_tensors(self.meta_x, self.meta_y), 0, "meta", False),
            batch_size=256,
            epochs=epochs,
            seed=0,
            device=torch.device("cpu"),
        )
        with torch.no_grad():  # statistics and weights of a network that has learned a little
            self.model.train()(x)
            norm = cast("Any", self.model.trunk).stages[-1][1]
            norm.weight.mul_(LARGE)  # so that the curvature is more than the weight decay
            self.model.head.weight.mul_(0.3).add_(
                random(*self.model.head.weight.shape, seed=2, dtype=dtype), alpha=0.1
            )
        self.ctx.enter("setup")
        self.method.setup(self.ctx)
        self.outer(0)

    def outer(self, epoch: int = 1) -> None:
        self.ctx.epoch, self.ctx.step = epoch, 10 * epoch
        self.ctx.enter("begin_epoch")
        self.method.begin_epoch(self.ctx)

    def batch(self, rows: int = 8, elsewhere: int = 0) -> Batch:
        """The first rows, the last ``elsewhere`` of them with index -1; weights differ."""
        batch = self.ctx.train.rows(torch.arange(rows))
        index = batch.index.clone()
        if elsewhere:
            index[-elsewhere:] = -1
        w = random(rows, seed=5).abs() + 0.1
        return replace(batch, index=index, w=(w / w.sum()).to(batch.x.dtype))

    def augment(self, batch: Batch, step: int = 0) -> Batch:
        self.ctx.step = step
        self.ctx.enter("augment")
        return self.method.augment(batch, self.ctx)

    def scatter(self, seed: int = 7) -> Desk:
        """Hyper-parameters that differ from row to row."""
        for name, part in states(self.method).items():
            place = NAMES.index(name)
            part.values.add_(random(*part.values.shape, seed=seed + place))
        return self


NAMES = ["chance", "spread", "omega", "soft"]


def states(method: AutoDO) -> dict[str, RowStates]:
    """Of the parts that are on."""
    children = dict(method.named_children())
    return {name: cast("RowStates", children[name]) for name in NAMES if name in children}


@dataclass(frozen=True, eq=False)
class Visit:
    """What one step of ``RowStates`` was called with."""

    states: RowStates
    index: Tensor
    gradient: Tensor
    now: int
    rate: float


@pytest.fixture
def visits(monkeypatch: pytest.MonkeyPatch) -> list[Visit]:
    """Every step of the outer optimiser, in order; the steps are done."""
    found: list[Visit] = []
    real = RowStates.visit

    def visit(self: RowStates, index: Tensor, gradient: Tensor, now: Tensor, rate: float) -> None:
        found.append(Visit(self, index.clone(), gradient.clone(), int(now), rate))
        real(self, index, gradient, now, rate)

    monkeypatch.setattr(RowStates, "visit", visit)
    return found


@pytest.fixture
def heads(monkeypatch: pytest.MonkeyPatch) -> list[Head]:
    """The head problem of every outer step, in order."""
    found: list[Head] = []
    real = module.answers

    def answers(head: Head, weights: Tensor, solved: Tensor) -> Any:
        found.append(head)
        return real(head, weights, solved)

    monkeypatch.setattr(module, "answers", answers)
    return found


class Weightless(Method):
    """Gives no weight to any row."""

    def augment(self, batch: Batch, ctx: Context) -> Batch:
        return replace(batch, w=torch.zeros_like(batch.w))


class Foreign(Method):
    """Says of every other row of a batch that it is from elsewhere."""

    def augment(self, batch: Batch, ctx: Context) -> Batch:
        index = batch.index.clone()
        index[1::2] = -1
        return replace(batch, index=index)


def order(method: AutoDO, visit: Visit) -> int:
    return [visit.states is part for part in states(method).values()].index(True)


class Negative(Method):
    """Turns images to their negative."""

    def augment(self, batch: Batch, ctx: Context) -> Batch:
        return replace(batch, x=1 - batch.x)


def warp_by_torch(x: Tensor, amounts: Tensor) -> Tensor:
    """The same warp by ``affine_grid``, from elementary matrices about the centre."""
    angle, right, down, shear_x, shear_y, log_x, log_y = amounts.unbind(dim=1)
    one, zero = torch.ones_like(angle), torch.zeros_like(angle)

    def two(*each: Tensor) -> Tensor:
        return torch.stack(each, dim=1).view(-1, 2, 2)

    turn = two(angle.cos(), -angle.sin(), angle.sin(), angle.cos())
    shear, scale = two(one, shear_x, shear_y, one), two(log_x.exp(), zero, zero, log_y.exp())
    half = torch.tensor([x.shape[-1] / 2, x.shape[-2] / 2], dtype=amounts.dtype)
    linear = (turn @ shear @ scale) * half / half[:, None]
    theta = torch.cat([linear, 2 * torch.stack([right, down], dim=1)[..., None]], dim=2)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid.to(x.dtype), align_corners=False)


def kl(log_p: Tensor, log_s: Tensor, symmetric: bool) -> Tensor:
    one = (log_s.exp() * (log_s - log_p)).sum(dim=1)
    return (one + (log_p.exp() * (log_p - log_s)).sum(dim=1)) / 2 if symmetric else one


def brute_force(
    desk: Desk, index: Tensor, text: str, known: Tensor | None = None
) -> dict[str, Tensor]:
    """d/dlambda of -<dL/dW, H^-1 v> for rows ``index``, everything by torch's own derivatives.

    At the first outer step of an epoch, with the draws of that place. Rows that are not ``known``
    have no hyper-parameters.
    """
    known = torch.ones(len(index), dtype=torch.bool) if known is None else known
    method, model, count = desk.method, copy.deepcopy(desk.model).eval(), len(index)
    shared, symmetric = "shared=true" in text, "symmetric=never" not in text
    rows = desk.ctx.train.rows(index)
    x, y = (1 - rows.x if isinstance(method.upstream, Negative) else rows.x), rows.y
    policy = torch.zeros_like(index) if shared else index
    leaves = {
        name: part.values[policy if name in NAMES[:2] else index].clone().requires_grad_()
        for name, part in states(method).items()
    }
    desk.ctx.enter("begin_epoch")
    meta_x, meta_y = desk.meta_x, desk.meta_y
    if "meta_rows=5" in text:
        batch = next(desk.ctx.meta.batches(512))  # type: ignore[union-attr]
        some = torch.randperm(META)[:5]
        meta_x, meta_y = batch.x[some], batch.y[some]
    if "augment=false" not in text:
        u = torch.rand(count, 7, dtype=torch.float64)
        soft = torch.sigmoid(leaves["chance"] + torch.log(u / (1 - u)))
        bit = (soft > 0.5).double() - soft.detach() + soft
        normal = torch.randn(count, 7, dtype=torch.float64)
        amounts = (
            bit
            * torch.sigmoid(leaves["spread"])
            * normal
            * torch.tensor(RANGES, dtype=torch.float64)
        )
        x = torch.where(known.view(-1, 1, 1, 1), warp_by_torch(x, amounts), x)
    weight = torch.ones(count, dtype=torch.float64)
    if "weight=false" not in text:
        weight = torch.where(known, torch.log2(1 + leaves["omega"][:, 0].exp()), 1.0)
    c = weight / weight.sum()
    log_s = (0.9 * y + 0.1 / CLASSES).log()
    if "label=false" not in text:
        log_s = torch.where(known[:, None], leaves["soft"].log_softmax(dim=1), log_s)
    h = model.embed(model.features(x))
    start = model.head.weight.detach()

    def loss(w: Tensor, h: Tensor, both: bool = symmetric) -> Tensor:
        log_p = F.log_softmax(h @ w.view_as(start).T + model.head.bias, dim=1)
        return c @ kl(log_p, log_s, both) + DECAY / 2 * w.square().sum()

    w = start.flatten().requires_grad_()
    v = torch.autograd.grad(F.cross_entropy(model(meta_x), meta_y), model.head.weight)[0].flatten()
    damping = 0.05 if "damping=0.05" in text else 0.0
    # The Gauss-Newton matrix is the Hessian of the forward divergence, whatever its targets.
    both = symmetric and "curvature=hessian" in text
    with torch.no_grad():
        curve: Any = torch.autograd.functional.hessian(lambda w: loss(w, h.detach(), both), w)
        curve = curve + damping * torch.eye(len(curve), dtype=torch.float64)
    solved = v
    if "solver=cg" in text:
        solved = torch.linalg.solve(curve, v)
    elif "solver=identity" not in text:
        step, terms = (0.2, 9) if "step=0.2, terms=9" in text else (0.01, 5)
        part = solved = step * v
        for _ in range(terms):
            part = part - step * curve @ part
            solved = solved + part
    (slope,) = torch.autograd.grad(loss(w, h), w, create_graph=True)
    found = torch.autograd.grad(-slope @ solved, list(leaves.values()), allow_unused=True)
    return {name: each for name, each in zip(leaves, found, strict=True) if each is not None}


WAYS = [
    "solver=identity",
    "solver=identity, weight=false",
    "solver=identity, label=false",
    "solver=identity, augment=false",
    "solver=identity, symmetric=never",
    "solver=identity, shared=true",
    "solver=identity, meta_rows=5",
    "weight=false, label=false",
    "augment=false, label=false",
    "augment=false, weight=false, symmetric=never",
    "",
    "step=0.2, terms=9",
    "curvature=hessian, step=0.2, terms=9",
    "damping=0.05, step=0.2, terms=9",
    "symmetric=never, curvature=hessian, step=0.2, terms=9",
    "solver=cg, damping=0.05, tolerance=1e-11",
    "solver=cg, damping=0.05, tolerance=1e-11, shared=true, symmetric=never",
]


class TestBruteForce:
    @pytest.mark.parametrize("upstream", [None, Negative()], ids=["", "negative"])
    @pytest.mark.parametrize("text", WAYS)
    def test_an_outer_step_takes_the_hypergradient(
        self, text: str, upstream: Method | None, visits: list[Visit]
    ) -> None:
        """Of weights that sum to 1, soft labels and warps; and goes down it."""
        rows = "" if "meta_rows" in text else "meta_rows=full"
        desk = Desk(autodo(text, rows), upstream).scatter()
        before = copy.deepcopy(desk.method)
        desk.outer()
        got = {
            name: visit
            for visit in visits
            for name, part in states(desk.method).items()
            if visit.states is part
        }
        assert len(visits) == len(got)
        desk.ctx.enter("begin_epoch")
        (batch,) = desk.ctx.train.batches(256)
        after, desk.method = desk.method, before
        wanted = brute_force(desk, batch.index, text)
        off = {part for part in ("augment", "weight", "label") if f"{part}=false" in text}
        names = {"augment": ["chance", "spread"], "weight": ["omega"], "label": ["soft"]}
        on = [each for part, listed in names.items() if part not in off for each in listed]
        assert set(got) == set(wanted) == set(on)
        for name, visit in got.items():
            true = wanted[name]
            if "shared=true" in text and name in names["augment"]:
                assert visit.index.tolist() == [0]
                true = true.sum(dim=0, keepdim=True)
            assert true.norm() > 1e-6
            error = float((visit.gradient - true).norm() / true.norm())
            assert error < 1e-9
            moved = getattr(after, name).values - getattr(before, name).values
            place, clear = moved[visit.index], true.abs() > 1e-6 * true.abs().max()
            assert torch.equal(place.sign()[clear], -true.sign()[clear])
        assert list(states(after)) == on, "what is not learned takes no room"

    @pytest.mark.parametrize("text", ["", "shared=true", "solver=identity, symmetric=never"])
    def test_rows_from_elsewhere_count_as_they_are(self, text: str, visits: list[Visit]) -> None:
        """Among the others: as given, with their smoothed label, and nothing of them is learned."""
        desk = Desk(autodo(text, "meta_rows=full"), Foreign()).scatter()
        before = copy.deepcopy(desk.method)
        desk.outer()
        desk.ctx.enter("begin_epoch")
        (batch,) = desk.ctx.train.batches(256)
        after, desk.method = desk.method, before
        known = torch.arange(ROWS) % 2 == 0
        wanted = brute_force(desk, batch.index, text, known)
        assert len(visits) == len(wanted) == 4
        for visit, (name, part) in zip(
            sorted(visits, key=lambda visit: order(after, visit)),
            states(after).items(),
            strict=True,
        ):
            assert visit.states is part
            true = wanted[name]
            if "shared=true" in text and name in NAMES[:2]:
                true = true.sum(dim=0, keepdim=True)
            else:
                assert torch.equal(visit.index, batch.index[known])
                true = true[known]
            assert float((visit.gradient - true).norm() / true.norm()) < 1e-9

    @pytest.mark.parametrize("text", ["", "preset=exact"])
    def test_what_is_logged_is_so(self, text: str, heads: list[Head]) -> None:
        desk = Desk(autodo(text)).scatter()
        desk.ctx.take_log()
        desk.outer()
        (head,), told = heads, desk.ctx.take_log()
        size = CLASSES * head.h.shape[1]
        unit = torch.eye(size, dtype=torch.float64).view(-1, CLASSES, head.h.shape[1])
        curve = torch.stack([head.product(each).flatten() for each in unit])
        largest = float(torch.linalg.eigvalsh(curve)[-1])
        assert told["lambda_max"] == pytest.approx(largest, rel=1e-3)
        desk.model.eval()
        z = desk.model.head(desk.model.embed(desk.model.features(desk.meta_x)))
        v = torch.autograd.grad(F.cross_entropy(z, desk.meta_y), desk.model.head.weight)[0]
        if text:
            assert told["residual"] <= 1e-4
            assert 1 <= told["cg_iterations"] <= size
            solved = torch.linalg.solve(curve, v.flatten()).view_as(v)
        else:
            solved = series(head, v, 5, 0.01)
            rest = float((head.product(solved) - v).norm() / v.norm())
            assert told["residual"] == pytest.approx(rest)
            assert "cg_iterations" not in told
        cosine = float(F.cosine_similarity(solved.flatten(), v.flatten(), dim=0))
        assert told["cosine_with_identity"] == pytest.approx(cosine, rel=1e-4)
        labels = desk.method.soft.values.argmax(dim=1)
        changed = (labels != desk.ctx.train.targets.argmax(dim=1)).double().mean()
        assert 0 < told["labels_changed"] < 1
        assert told["labels_changed"] == pytest.approx(float(changed))

    def test_it_is_logged_once_a_phase(self, monkeypatch: pytest.MonkeyPatch) -> None:
        desk, told = Desk("autodo(outer_batch=6)"), []
        monkeypatch.setattr(desk.ctx, "log", lambda **scalars: told.extend(scalars))
        desk.outer()
        assert sorted(told) == [
            "cosine_with_identity", "labels_changed", "lambda_max", "outer_steps", "residual"
        ]  # fmt: skip

    def test_what_is_logged_moves_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Looking for its eigenvalues draws too, and is put back."""
        one, other = Desk("autodo(outer_batch=6)"), Desk("autodo(outer_batch=6)")
        real = AutoDO._solved
        one.outer()
        monkeypatch.setattr(
            AutoDO, "_solved", lambda self, head, v, ctx, log: real(self, head, v, ctx, False)
        )
        other.outer()
        for name, each in one.method.learned().items():
            assert torch.equal(other.method.learned()[name], each)

    def test_the_weight_decay_is_that_of_the_head_s_group(self, heads: list[Head]) -> None:
        def groups(model: Model) -> list[dict[str, Any]]:
            rest = [each for each in model.parameters() if each is not model.head.weight]
            return [{"params": rest}, {"params": [model.head.weight], "weight_decay": 0.3}]

        Desk("autodo(damping=0.2)", groups=groups).outer()
        Desk("autodo").outer()
        assert [head.decay for head in heads] == [0.5, DECAY]

    def test_the_network_is_left_alone(self) -> None:
        desk = Desk("autodo(outer_batch=6)")
        next(desk.model.parameters()).requires_grad_(False)
        desk.model.trunk.eval()
        before = copy.deepcopy(desk.model.state_dict())
        flags = [each.requires_grad for each in desk.model.parameters()]
        modes = [each.training for each in desk.model.modules()]
        assert True in modes and False in modes
        desk.outer()
        assert all(torch.equal(each, before[n]) for n, each in desk.model.state_dict().items())
        assert [each.requires_grad for each in desk.model.parameters()] == flags
        assert [each.training for each in desk.model.modules()] == modes
        assert all(each.grad is None for each in desk.model.parameters())


ROW_UPSTREAMS = ["", "label_smoothing", "soft_augmentation", "randaugment"]


class TestSameLoss:
    @pytest.mark.parametrize("upstream", ROW_UPSTREAMS)
    @pytest.mark.parametrize(
        "text",
        ["", "label=false", "weight=false", "symmetric=never", "symmetric=when_soft",
         "label=false, symmetric=never", "label=false, symmetric=when_soft"],
    )  # fmt: skip
    def test_the_loss_that_is_differentiated_is_the_one_that_is_trained_on(
        self, text: str, upstream: str, heads: list[Head]
    ) -> None:
        """Its gradient in the head, of equal draws, by the trainer's way and by the outer step's.

        Rows of the outer step go through the upstream too.
        """
        over = f"upstream={upstream}" if upstream else ""
        desk = Desk(autodo(text, "meta_rows=full", over)).scatter()
        before = copy.deepcopy(desk.method)
        desk.outer()
        ours = (heads[0].c[:, None] * heads[0].residual()).T @ heads[0].h
        desk.ctx.enter("begin_epoch")
        (batch,) = desk.ctx.train.batches(256)
        with mode(desk.model, training=False):
            out = before.augment(batch, desk.ctx)
            loss = out.w @ before.losses(desk.model(out.x), out, desk.ctx)
        (wanted,) = torch.autograd.grad(loss, desk.model.head.weight)
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-7)

    @pytest.mark.parametrize("upstream", ROW_UPSTREAMS)
    def test_a_row_is_visited_once_in_an_outer_step(
        self, upstream: str, visits: list[Visit]
    ) -> None:
        """A row handed twice would have one of its steps lost."""
        desk = Desk(f"autodo(upstream={upstream})" if upstream else "autodo")
        desk.outer()
        assert visits
        for visit in visits:
            assert len(visit.index.unique()) == len(visit.index)

    def test_rows_from_elsewhere_move_nothing(self) -> None:
        """An upstream may add rows with index -1, which is no row."""

        class Adds(Method):
            def augment(self, batch: Batch, ctx: Context) -> Batch:
                return replace(batch, index=torch.full_like(batch.index, -1))

        desk = Desk("autodo", Adds())
        before = {name: each.clone() for name, each in desk.method.state_dict().items()}
        desk.outer()
        for name in ("chance", "spread", "omega", "soft"):
            key = f"{name}.values"
            assert torch.equal(desk.method.state_dict()[key], before[key]), name


class TestOuterPhase:
    def test_it_passes_once_over_the_rows_in_batches(self, visits: list[Visit]) -> None:
        desk = Desk("autodo(augment=false, label=false, outer_batch=8)")
        desk.outer()
        assert [len(visit.index) for visit in visits] == [8, 8, 4]
        assert sorted(torch.cat([visit.index for visit in visits]).tolist()) == list(range(ROWS))
        assert [visit.now for visit in visits] == [1, 2, 3]
        desk.outer(2)
        assert [visit.now for visit in visits[3:]] == [4, 5, 6]
        assert visits[3].index.tolist() != visits[0].index.tolist()

    @pytest.mark.parametrize(
        ("start", "epochs", "first"),
        [
            *[(0.25, 4, 1), (0.25, 8, 2), (0.3, 5, 2), (0.99, 4, 4)],  # shares
            *[(0, 4, 0), (1, 4, 1), (3, 4, 3), (7, 4, 4)],  # epochs
        ],
    )
    def test_it_begins_at_a_share_of_the_epochs_or_at_an_epoch(
        self, start: int | float, epochs: int, first: int, visits: list[Visit]
    ) -> None:
        visits.clear()
        desk = Desk(f"autodo(augment=false, start={start})", epochs=epochs, start=0)
        for epoch in range(epochs):
            before = len(visits)
            desk.outer(epoch)
            assert (len(visits) > before) is (epoch >= first)

    def test_names_keep_an_epoch_and_a_share_apart(self) -> None:
        for text in ("autodo(start=1)", "autodo(start=0)", "autodo(start=0.5)"):
            assert methods.canonical(text) == text
            assert type(cast("AutoDO", build(text)).start) is (float if "." in text else int)
        with pytest.raises(ValueError, match="of epochs, such as 1, got True"):
            AutoDO(start=True)

    def test_an_outer_batch_is_as_large_as_a_training_batch(self, visits: list[Visit]) -> None:
        for text, size in (("autodo", 4), ("autodo(outer_batch=6)", 6)):
            desk = Desk(text)
            desk.ctx.batch_size = 4
            visits.clear()
            desk.outer()
            assert max(len(each.index) for each in visits) == size

    def test_the_rate_falls_by_a_cosine_to_a_thousandth(self, visits: list[Visit]) -> None:
        desk = Desk("autodo(augment=false, weight=false, learning_rate=0.2)", start=2, epochs=12)
        for epoch in range(12):
            desk.outer(epoch)
        rates = [visit.rate for visit in visits]
        least = 0.2 / 1000
        wanted = [least + (0.2 - least) * (1 + math.cos(math.pi * k / 10)) / 2 for k in range(10)]
        assert rates == pytest.approx(wanted, rel=1e-12)
        assert rates[0] == 0.2 and rates[5] == pytest.approx(0.1001)

    def test_meta_features_are_those_of_the_frozen_network(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        desk = Desk()
        monkeypatch.setattr(module, "CHUNK", 5)
        desk.model.eval()
        h, y = desk.method.meta_features(desk.model, desk.ctx)
        with torch.no_grad():
            wanted = desk.model.embed(desk.model.features(desk.meta_x))
        assert not h.requires_grad
        pairs = [(wanted, desk.meta_y), (h, y)]
        told = [torch.cat(each, dim=1) for each in pairs]
        one, other = (each[each[:, 0].argsort()] for each in told)  # as rows in any order
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("augment", [True, False])
    def test_each_row_goes_once_through_the_trunk(self, augment: bool) -> None:
        """Meta rows forward; training rows forward, and backward where warps are learned."""
        desk = Desk(f"autodo(augment={str(augment).lower()}, outer_batch=4)")
        desk.ctx.counter.take()
        desk.outer()
        assert desk.ctx.counter.take() == (ROWS + META, ROWS if augment else 0)

    def test_features_made_once_a_phase_are_exact_in_every_step(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The gradient of each step is that of features made anew at that step."""
        desk, seen = Desk("autodo(meta_rows=full, outer_batch=4)"), []
        real = AutoDO._outer_step

        def step(self: AutoDO, model: Any, ctx: Any, batch: Any, v: Tensor, *rest: Any) -> None:
            real(self, model, ctx, batch, v, *rest)
            with frozen(model):
                w = model.head.weight.detach().requires_grad_()
                h = model.embed(model.features(desk.meta_x))
                z = h @ w.T + model.head.bias
                (new,) = torch.autograd.grad(F.cross_entropy(z, desk.meta_y), w)
            seen.append(float((v - new).norm() / new.norm()))

        monkeypatch.setattr(AutoDO, "_outer_step", step)
        desk.outer()
        assert len(seen) == 5 and max(seen) < 1e-12

    def test_full_is_all_meta_rows_and_a_number_a_draw_of_each_step(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sizes: list[list[int]] = []
        real = module._head_gradient

        def gradient(model: Any, h: Tensor, y: Tensor) -> Tensor:
            sizes[-1].append(len(h))
            vectors.append(real(model, h, y))
            return vectors[-1]

        monkeypatch.setattr(module, "_head_gradient", gradient)
        found = []
        for rows in ("full", "5", "12", "99"):
            sizes.append([])
            vectors: list[Tensor] = []
            Desk(f"autodo(meta_rows={rows}, outer_batch=8)").outer()
            found.append(vectors)
        assert sizes == [[META], [5] * 3, [META] * 3, [META] * 3]
        for vectors in found[2:]:
            for each in vectors:
                torch.testing.assert_close(each, found[0][0], rtol=1e-10, atol=1e-14)
        assert not torch.allclose(found[1][0], found[1][1])

    def test_without_meta_rows_it_says_what_is_missing(self) -> None:
        desk = Desk()
        desk.ctx.meta = None
        with pytest.raises(
            ValueError, match="autodo learns from meta rows, but the context has none"
        ):
            desk.outer()

    def test_shared_has_one_policy_for_all_rows(self, visits: list[Visit]) -> None:
        desk = Desk("autodo(shared=true, outer_batch=8)")
        learned = desk.method.learned()
        assert learned["probability"].shape == learned["magnitude"].shape == (1, 7)
        assert learned["weight"].shape == (ROWS,) and learned["label"].shape == (ROWS, CLASSES)
        desk.outer()
        policies = [visit for visit in visits if visit.gradient.shape[1] == 7]
        assert [visit.index.tolist() for visit in policies] == [[0]] * 6
        assert len([v for v in visits if v.states is desk.method.omega]) == 3
        desk.method.chance.values[:] = 40.0
        desk.augment(desk.batch())
        assert bool((desk.method._drawn != 0).all())


class TestStates:
    def test_lazy_steps_are_those_of_a_dense_rmsprop(self) -> None:
        """50 epochs of random visits, to 1e-12; of rows not visited the gradient is zero."""
        rows, rng = 40, torch.Generator().manual_seed(0)
        start = random(rows, 3, seed=1)
        dense = nn.Parameter(start.clone())
        optimizer = torch.optim.RMSprop([dense], lr=RATE, alpha=0.99, eps=1e-8)
        lazy, now = RowStates(start.clone()), torch.zeros((), dtype=torch.int64)
        visited: set[int] = set()
        for epoch in range(50):
            rate = RATE * (1 + math.cos(epoch / 20))
            optimizer.param_groups[0]["lr"] = rate
            order = torch.randperm(rows, generator=rng)
            for index in order[: 5 + 7 * (epoch % 5)].split(6):
                gradient = random(len(index), 3, seed=1000 * epoch + int(index[0]))
                gradient = gradient * 10.0 ** float(random(1, seed=epoch))
                gradient[0, 0] = 0
                dense.grad = torch.zeros_like(dense)
                dense.grad[index] = gradient
                optimizer.step()
                now.add_(1)
                lazy.visit(index, gradient, now, rate)
                assert float((lazy.values - dense.detach()).abs().max()) < 1e-12
                visited = set(index.tolist())
        assert now > 100 and len(visited) < rows
        assert float((lazy.values - start).abs().min()) > 1e-3

    def test_a_corrected_mean_square_is_the_weighted_mean_of_a_row_s_own_squares(self) -> None:
        """Against all past gradients of each row, to 1e-12, at visits now and then."""
        rows, rng = 12, torch.Generator().manual_seed(0)
        start = random(rows, 2, seed=1)
        dense, states = start.clone(), RowStates(start.clone(), corrected=True)
        past: dict[int, list[tuple[int, Tensor]]] = {row: [] for row in range(rows)}
        for now in range(1, 200):
            index = torch.randperm(rows, generator=rng)[: 1 + now % 5]
            index = index[index != 3] if now < 150 else index  # a row that comes late
            gradient = random(len(index), 2, seed=now) * 10.0 ** float(random(1, seed=1000 + now))
            states.visit(index, gradient, torch.tensor(now), RATE)
            for row, own in zip(index.tolist(), gradient, strict=True):
                past[row].append((now, own))
                ages = torch.tensor([now - then for then, _ in past[row]])
                weights = 0.99 ** ages.double()
                squares = torch.stack([each.square() for _, each in past[row]])
                mean = (weights / weights.sum()) @ squares
                dense[row] -= RATE * own / (mean.sqrt() + 1e-8)
            assert float((states.values - dense).abs().max()) < 1e-12
        assert min(map(len, past.values())) > 5 and past[3][0][0] >= 150

    def test_a_corrected_first_step_is_one_learning_rate_whenever_it_comes(self) -> None:
        states = RowStates(torch.zeros(2, 1).double(), corrected=True)
        for row, now in ((0, 1), (1, 500)):
            states.visit(torch.tensor([row]), random(1, 1, seed=now).abs(), torch.tensor(now), 0.1)
        torch.testing.assert_close(states.values, torch.full((2, 1), -0.1).double())

    def test_a_row_never_visited_stays_as_it_was(self) -> None:
        states = RowStates(random(4, 2, seed=0))
        before = states.values.clone()
        index = torch.tensor([2, 0])
        states.visit(index, torch.ones(2, 2).double(), torch.tensor(9), 0.1)
        assert torch.equal(states.values[[1, 3]], before[[1, 3]])
        assert states.last.tolist() == [9, 0, 9, 0]
        first = 0.1 / (math.sqrt(1 - 0.99) + 1e-8)  # whatever its size, the first step is 10 rates
        torch.testing.assert_close(states.values[index], before[index] - first)

    @pytest.mark.parametrize("text", ["", "preset=exact", "shared=true", "solver=identity"])
    def test_they_survive_a_checkpoint(self, text: str) -> None:
        one = Desk(autodo(text, "outer_batch=7"))
        for epoch in (1, 2):
            one.outer(epoch)
        file = io.BytesIO()
        torch.save(one.method.state_dict(), file)
        file.seek(0)
        other = Desk(autodo(text, "outer_batch=7"))
        other.method.load_state_dict(torch.load(file, weights_only=True))
        for desk in (one, other):
            desk.outer(3)
        for name, each in one.method.state_dict().items():
            assert torch.equal(other.method.state_dict()[name], each), name
        moved = one.method.learned()["weight"] - 1
        assert float(moved.abs().min()) > 0
        out = [desk.augment(desk.batch()) for desk in (one, other)]
        for name in ("x", "y", "w"):
            assert torch.equal(getattr(out[0], name), getattr(out[1], name))


class TestStart:
    """Without an outer phase."""

    @pytest.mark.parametrize("smoothing", [0.1, 0.05])
    @pytest.mark.parametrize("label", [True, False])
    @pytest.mark.parametrize("symmetric", ["always", "when_soft", "never"])
    def test_the_loss_is_the_smoothed_label_s_divergence(
        self, symmetric: str, label: bool, smoothing: float
    ) -> None:
        """KL(s||p), its mean with KL(p||s), or, not symmetric and without labels, cross-entropy."""
        text = f"symmetric={symmetric}, label={str(label).lower()}, smoothing={smoothing}"
        desk = Desk(f"autodo({text})", start=99)
        for epoch in range(4):
            desk.outer(epoch)
        batch = desk.batch(elsewhere=2)
        out = desk.augment(batch)
        z = 2 * random(8, CLASSES, seed=3)
        found = desk.method.losses(z, out, desk.ctx)
        p, s = z.softmax(dim=1), (1 - smoothing) * batch.y + smoothing / CLASSES
        both = symmetric == "always" or (symmetric == "when_soft" and label)
        forward, back = (s * (s / p).log()).sum(dim=1), (p * (p / s).log()).sum(dim=1)
        wanted = (forward + back) / 2 if both else forward
        if not both and not label:
            wanted = F.cross_entropy(z, batch.y, reduction="none")
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)

    def test_the_forward_divergence_is_the_cross_entropy_but_for_a_constant(self) -> None:
        desk = Desk("autodo(symmetric=never)", start=99)
        out, z = desk.augment(desk.batch()), random(8, CLASSES, seed=3)
        found = desk.method.losses(z, out, desk.ctx)
        hard = F.cross_entropy(z, desk.batch().y, label_smoothing=0.1, reduction="none")
        entropy = hard - found
        torch.testing.assert_close(entropy, entropy[:1].expand(8), rtol=1e-12, atol=1e-14)

    def test_weights_are_one(self) -> None:
        desk = Desk(start=99)
        desk.outer(3)
        batch = desk.batch(elsewhere=2)
        torch.testing.assert_close(desk.augment(batch).w, batch.w, rtol=1e-14, atol=0)
        torch.testing.assert_close(desk.method.learned()["weight"], torch.ones(ROWS).double())

    def test_without_warps_images_stay_bit_for_bit(self) -> None:
        desk = Desk("autodo(augment=false)", start=99)
        batch = desk.batch()
        assert torch.equal(desk.augment(batch).x, batch.x)
        assert desk.method.captions() == []

    def test_how_far_learning_went_is_the_median_distance_from_the_start(self) -> None:
        desk = Desk("autodo(outer_batch=6)", start=1)
        names = ("outer_steps", "probability", "magnitude", "weight", "label")
        assert desk.method.learning() == pytest.approx(dict.fromkeys(names, 0), abs=1e-12)
        before = {name: each.clone() for name, each in desk.method.learned().items()}
        for epoch in (1, 2, 3):  # a warp that is not drawn has no gradient
            desk.outer(epoch)
        found, after = desk.method.learning(), desk.method.learned()
        assert found.pop("outer_steps") == 3 * -(-ROWS // 6)
        for name, told in found.items():
            moved = (after[name] - before[name]).abs().numpy()
            moved = moved.sum(axis=1) / 2 if name == "label" else moved.ravel()
            count = len(moved)
            lower, upper = np.sort(moved)[[(count - 1) // 2, count // 2]]
            assert lower - 1e-12 <= told <= upper + 1e-12 and told > 1e-3, name
        assert Desk("autodo(augment=false, label=false)").method.learning().keys() == {
            "outer_steps", "weight"
        }  # fmt: skip

    def test_what_is_learned_starts_as_the_docstring_says(self) -> None:
        desk = Desk(start=99)
        learned = desk.method.learned()
        assert {name: tuple(each.shape) for name, each in learned.items()} == {
            "probability": (ROWS, 7),
            "magnitude": (ROWS, 7),
            "weight": (ROWS,),
            "label": (ROWS, CLASSES),
        }
        torch.testing.assert_close(learned["probability"], torch.full((ROWS, 7), 0.25).double())
        torch.testing.assert_close(learned["magnitude"], torch.full((ROWS, 7), 0.5).double())
        wanted = 0.9 * desk.ctx.train.targets + 0.1 / CLASSES
        torch.testing.assert_close(learned["label"], wanted)

    @pytest.mark.parametrize(
        ("off", "names"),
        [
            ("augment", {"weight", "label"}),
            ("weight", {"probability", "magnitude", "label"}),
            ("label", {"probability", "magnitude", "weight"}),
        ],
    )
    def test_a_part_that_is_off_is_not_among_what_is_learned(
        self, off: str, names: set[str]
    ) -> None:
        desk = Desk(f"autodo({off}=false)", start=99)
        assert set(desk.method.learned()) == names

    def test_what_an_upstream_learned_is_there_too(self) -> None:
        class Learner(Negative):
            def learned(self) -> dict[str, Tensor]:
                return {"policy": torch.ones(2)}

        assert "policy" in Desk("autodo", Learner()).method.learned()


class TestAugment:
    def test_rows_have_their_soft_label_and_the_total_weight_stays(self) -> None:
        desk = Desk().scatter()
        batch = desk.batch()
        out = desk.augment(batch)
        learned = desk.method.learned()
        torch.testing.assert_close(out.y, learned["label"][:8])
        ratio = out.w / (batch.w * learned["weight"][:8])
        torch.testing.assert_close(ratio, ratio[:1].expand(8))
        torch.testing.assert_close(out.w.sum(), batch.w.sum())
        assert float(out.w.min()) > 0

    def test_rows_from_elsewhere_keep_image_label_and_weight(self) -> None:
        """Their weight but for the common factor that keeps the total."""
        desk = Desk().scatter()
        desk.method.chance.values[:] = 40.0
        batch = desk.batch(elsewhere=3)
        out = desk.augment(batch)
        torch.testing.assert_close(out.x[5:], batch.x[5:], rtol=1e-12, atol=1e-12)
        assert float((out.x[:5] - batch.x[:5]).abs().amax(dim=(1, 2, 3)).min()) > 0.01
        assert torch.equal(out.y[5:], batch.y[5:])
        factor = desk.method.learned()["weight"][:5]
        known = out.w[:5] / (batch.w[:5] * factor)
        common = torch.cat([known, out.w[5:] / batch.w[5:]])
        torch.testing.assert_close(common, common[:1].expand(8))
        assert desk.method.captions()[5:] == ["", "", ""]

    @pytest.mark.parametrize("value", [0.0, 1.0])
    def test_a_draw_at_either_end_gives_finite_gradients(
        self, value: float, monkeypatch: pytest.MonkeyPatch, visits: list[Visit]
    ) -> None:
        monkeypatch.setattr(torch, "rand_like", lambda like: torch.full_like(like, value))
        for dtype in (torch.float32, torch.float64):
            desk = Desk(dtype=dtype)
            desk.outer()
            assert bool(desk.augment(desk.batch()).x.isfinite().all())
        assert len(visits) == 8
        assert all(bool(visit.gradient.isfinite().all()) for visit in visits)

    def test_the_upstream_comes_first(self) -> None:
        desk = Desk("autodo(augment=false)", Negative())
        batch = desk.batch()
        assert torch.equal(desk.augment(batch).x, 1 - batch.x)

    def test_the_outer_phase_has_the_upstream_s_rows_too(self, heads: list[Head]) -> None:
        for upstream in (None, Negative()):
            Desk("autodo(augment=false)", upstream).outer()
        assert not torch.allclose(heads[0].h, heads[1].h)

    def test_an_upstream_that_hands_over_logits_unannounced_is_refused(self) -> None:
        class Sly(Method):
            def augment(self, batch: Batch, ctx: Context) -> Batch:
                return replace(batch, logits=ctx.forward(batch.x))

        desk = Desk("autodo", Sly())
        with pytest.raises(
            ValueError, match="the upstream of autodo has already run this step's forward pass"
        ):
            desk.augment(desk.batch())

    @pytest.mark.parametrize("logit", [math.log(1 / 3), 0.0, 2.0])
    def test_each_warp_is_drawn_with_its_chance(self, logit: float) -> None:
        """7 x 8,000 draws: 0.25 at the start; of half the range as standard deviation."""
        desk = Desk(start=99)
        assert float(desk.method.chance.values[0, 0]) == pytest.approx(math.log(1 / 3))
        desk.method.chance.values[:] = logit
        drawn = []
        for step in range(400):
            desk.augment(desk.ctx.train.rows(torch.arange(ROWS)), step)
            drawn.append(desk.method._drawn)
        amounts = torch.cat(drawn)
        share = (amounts != 0).double().mean(dim=0)
        chance = 1 / (1 + math.exp(-logit))
        assert len(share) == len(OPERATIONS)
        assert float((share - chance).abs().max()) < 4.5 * math.sqrt(chance * (1 - chance) / 8000)
        for place, reach in enumerate(RANGES):
            values = amounts[amounts[:, place] != 0, place]
            assert float(values.std()) == pytest.approx(reach / 2, rel=0.07)
            assert abs(float(values.mean())) < 0.1 * reach
        told = [set(text.split(", ")) for text in desk.method.captions()]
        assert {len(each - {""}) for each in told} == set(
            (desk.method._drawn != 0).sum(dim=1).tolist()
        )

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("logit", [-200.0, -40.0, 40.0, 200.0])
    def test_gradients_are_finite_where_probabilities_are_0_and_1(
        self, logit: float, dtype: torch.dtype
    ) -> None:
        """To machine precision; of chance and magnitude."""
        desk = Desk(dtype=dtype)
        batch = desk.ctx.train.rows(torch.arange(ROWS))
        for spread in (-200.0, -40.0, 0.0, 40.0, 200.0):
            leaves = [
                torch.full((ROWS, 7), each, dtype=dtype, requires_grad=True)
                for each in (logit, spread)
            ]
            known = torch.ones(ROWS, dtype=torch.bool)
            x = desk.method._warped(batch.x, leaves[0], leaves[1], known)
            assert x.dtype == dtype
            found = torch.autograd.grad(x.square().sum(), leaves)
            assert all(bool(torch.isfinite(each).all()) for each in (x.detach(), *found))
            reach = float(leaves[1].detach().sigmoid().min())
            assert bool((desk.method._drawn != 0).all()) is (logit > 0 and reach > 0)
        desk.method.chance.values[:], desk.method.spread.values[:] = logit, -logit
        desk.outer()
        assert all(bool(each.isfinite().all()) for each in desk.method.learned().values())

    def test_the_control_shuffles_its_weights(self) -> None:
        one = Desk().scatter()
        batch = one.batch()
        plain = one.augment(batch)
        control = build("shuffled_weights(upstream=autodo)")
        control.upstream = one.method
        one.ctx.enter("augment")
        out = control.augment(batch, one.ctx)
        assert torch.equal(out.x, plain.x) and torch.equal(out.y, plain.y)
        assert not torch.equal(out.w, plain.w)
        assert torch.equal(out.w.sort().values, plain.w.sort().values)
        z = random(8, CLASSES, seed=3)
        losses = one.method.losses(z, plain, one.ctx)
        assert torch.equal(control.losses(z, out, one.ctx), losses)
        assert control.supports(MultiClass(), IMAGES) == ""


def blob(height: int, width: int, row: float, column: float) -> Tensor:
    """(1, 1, H, W) a normal bump at a place in pixels, its edges far away."""
    down = (torch.arange(height).double() + 0.5 - row) ** 2
    right = (torch.arange(width).double() + 0.5 - column) ** 2
    return torch.exp(-(down[:, None] + right[None]) / 4.5)[None, None]


def place_of(x: Tensor) -> tuple[float, float]:
    """Row and column of the centre of mass, in pixels."""
    mass, (height, width) = x[0, 0] / x.sum(), x.shape[-2:]
    return (
        float(mass.sum(dim=1) @ (torch.arange(height).double() + 0.5)),
        float(mass.sum(dim=0) @ (torch.arange(width).double() + 0.5)),
    )


def amounts(**named: float) -> Tensor:
    values = torch.zeros(1, 7, dtype=torch.float64)
    for name, value in named.items():
        values[0, OPERATIONS.index(name)] = value
    return values


def warped(x: Tensor, values: Tensor) -> Tensor:
    return affine_warp(x, _matrix(values, *x.shape[-2:]), "bilinear")


SIZES = [(40, 40), (24, 48), (48, 30), (33, 41)]


@pytest.mark.parametrize(("height", "width"), SIZES)
class TestMatrix:
    def test_nothing_is_the_identity(self, height: int, width: int) -> None:
        wanted = torch.eye(3, dtype=torch.float64)[None, :2]
        torch.testing.assert_close(_matrix(amounts(), height, width), wanted, rtol=0, atol=1e-14)
        x = torch.rand(1, 2, height, width, dtype=torch.float64)
        torch.testing.assert_close(warped(x, amounts()), x, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("name", ["rotate", "shear_x", "shear_y", "scale_x", "scale_y"])
    def test_the_centre_stays(self, name: str, height: int, width: int) -> None:
        middle = torch.tensor([width / 2, height / 2, 1], dtype=torch.float64)
        for value in (-0.4, 0.3, 1.0):
            found = _matrix(amounts(**{name: value}), height, width)[0] @ middle
            torch.testing.assert_close(found, middle[:2], rtol=1e-13, atol=1e-13)
        x = blob(height, width, height / 2, width / 2)
        moved = place_of(warped(x, amounts(**{name: 0.4})))
        assert moved == pytest.approx((height / 2, width / 2), abs=0.02)

    def test_a_translation_is_a_share_of_width_or_height(self, height: int, width: int) -> None:
        """The window moves right and down, and the image left and up."""
        x = blob(height, width, height * 0.6, width * 0.6)
        row, column = place_of(x)
        across = place_of(warped(x, amounts(translate_x=0.25)))
        assert across == pytest.approx((row, column - 0.25 * width), abs=0.02)
        down = place_of(warped(x, amounts(translate_y=0.25)))
        assert down == pytest.approx((row - 0.25 * height, column), abs=0.02)

    def test_a_scale_is_the_exponential(self, height: int, width: int) -> None:
        x = blob(height, width, height * 0.6, width * 0.35)
        log = math.log(1.25)
        row, column = place_of(warped(x, amounts(scale_x=log)))
        away = width * 0.35 - width / 2
        assert (row, column - width / 2) == pytest.approx((height * 0.6, away / 1.25), abs=0.05)
        row, column = place_of(warped(x, amounts(scale_y=-log)))
        away = height * 0.6 - height / 2
        assert (row - height / 2, column) == pytest.approx((away * 1.25, width * 0.35), abs=0.05)

    def test_a_rotation_turns_by_its_angle(self, height: int, width: int) -> None:
        """The image counter-clockwise, in pixels also where it is not square."""
        for degrees in (30, -50):
            angle = math.radians(degrees)
            x = blob(height, width, height / 2, width / 2 + 6)  # to the right of the centre
            row, column = place_of(warped(x, amounts(rotate=angle)))
            wanted = height / 2 - 6 * math.sin(angle), width / 2 + 6 * math.cos(angle)
            assert (row, column) == pytest.approx(wanted, abs=0.05)

    def test_a_shear_moves_by_the_distance_from_the_axis(self, height: int, width: int) -> None:
        x = blob(height, width, height / 2 + 5, width / 2)
        row, column = place_of(warped(x, amounts(shear_x=0.4)))
        assert (row, column) == pytest.approx((height / 2 + 5, width / 2 - 2), abs=0.05)
        x = blob(height, width, height / 2, width / 2 + 5)
        row, column = place_of(warped(x, amounts(shear_y=0.4)))
        assert (row, column) == pytest.approx((height / 2 - 2, width / 2 + 5), abs=0.05)

    def test_it_is_torch_s_grid_and_scipy_s_transform(self, height: int, width: int) -> None:
        x = torch.rand(6, 2, height, width, dtype=torch.float64)
        values = 0.3 * random(6, 7, seed=height)
        ours = warped(x, values)
        torch.testing.assert_close(ours, warp_by_torch(x, values), rtol=1e-10, atol=1e-10)
        for image, matrix, other in zip(x, _matrix(values, height, width), ours, strict=True):
            turn = matrix[:, :2].flip(0).flip(1).numpy()  # rows first
            shift = matrix[:, 2].flip(0).numpy() + turn @ [0.5, 0.5] - 0.5
            transform: Any = scipy.ndimage.affine_transform
            wanted = transform(image[0].numpy(), turn, shift, order=1, mode="grid-constant")
            np.testing.assert_allclose(other[0].numpy(), wanted, rtol=1e-9, atol=1e-9)


def test_captions_tell_the_warp() -> None:
    assert _told([0.0] * 7) == ""
    values = [math.radians(-12), 0.25, -0.1, 0.2, -0.05, math.log(2), -math.log(1.25)]
    assert _told(values) == (
        "rotate -12°, shift x -25%, shift y +10%, shear x +0.20, shear y -0.05, "
        "scale x 0.50, scale y 1.25"
    )
    assert _told([0.009] * 7) == ""
    desk = Desk()
    desk.method.chance.values[:] = -200.0
    desk.method.chance.values[:, 0] = 200.0
    desk.augment(desk.batch(5))
    told = desk.method.captions()
    assert len(told) == 5 and len(set(told)) > 1
    assert all(text.startswith("rotate ") and "," not in text for text in told)
    degrees = [float(text.removeprefix("rotate ").removesuffix("°")) for text in told]
    wanted = [math.degrees(each) for each in desk.method._drawn[:, 0].tolist()]
    assert degrees == pytest.approx(wanted, abs=0.51)


def test_captions_tell_what_becomes_of_the_image() -> None:
    """To the right and down, counter-clockwise and larger are positive."""
    x = torch.zeros(1, 1, 40, 40, dtype=torch.float64)
    x[..., 18:22, 26:30] = 1.0  # right of the centre
    rows, columns = torch.meshgrid(torch.arange(40.0), torch.arange(40.0), indexing="ij")

    def place(operation: str, amount: float) -> tuple[str, float, float]:
        values = [0.0] * 7
        values[OPERATIONS.index(operation)] = amount
        image = warped(x, torch.tensor([values], dtype=torch.float64))[0, 0]
        total = image.sum()
        right, down = (image * columns).sum() / total, (image * rows).sum() / total
        return _told(values), float(right) - 19.5, float(down) - 19.5

    told, right, down = place("translate_x", 0.2)
    assert told == "shift x -20%" and (right, down) == pytest.approx((8 - 8, 0), abs=1e-6)
    told, right, down = place("translate_y", -0.25)
    assert told == "shift y +25%" and (right, down) == pytest.approx((8, 10), abs=1e-6)
    told, right, down = place("rotate", math.radians(30))
    assert told == "rotate +30°" and right == pytest.approx(8 * math.cos(math.pi / 6), abs=0.05)
    assert down == pytest.approx(-4, abs=0.05), "up, as an image is drawn"
    told, right, down = place("scale_x", -math.log(1.5))
    assert told == "scale x 1.50" and (right, down) == pytest.approx((12, 0), abs=0.05)


def test_captions_of_the_upstream_are_told_too() -> None:
    """What runs first is told first, and alone where no warp is learned."""
    for text in ("autodo(upstream=flip(p=1))", "autodo(augment=false, upstream=flip(p=1))"):
        desk = Desk(text)
        desk.augment(desk.batch(5))
        told = desk.method.captions()
        assert len(told) == 5
        assert all(each.startswith("mirrored") for each in told)


OWN_LOSS = "autodo needs the task's loss, but its upstream has a loss of its own"
AFTER_FORWARD = (
    "autodo works on rows before this step's forward pass, which its upstream has already run"
)
IN_TRAINING = (
    "autodo also runs its upstream in the outer phase, where the network is frozen, but its "
    "upstream needs the network in training"
)


class TestSupports:
    @pytest.mark.parametrize(
        ("upstream", "reason"),
        [
            ("mixup", "autodo learns hyper-parameters per row, but its upstream mixes rows"),
            ("balanced+crop", "autodo visits every row once, but its upstream draws its own rows"),
            ("flip+cutmix", "autodo learns hyper-parameters per row, but its upstream mixes rows"),
            ("gce", OWN_LOSS),
            (
                "crop+logit_adjustment",
                OWN_LOSS,
            ),
            (
                "autodo",
                IN_TRAINING,
            ),
            (
                "saflex",
                AFTER_FORWARD,
            ),
            (
                "l2rw(upstream=crop)",
                AFTER_FORWARD,
            ),
        ],
    )
    def test_an_upstream_that_does_not_fit_is_refused(self, upstream: str, reason: str) -> None:
        assert build(f"autodo(upstream={upstream})").supports(MultiClass(), IMAGES) == reason

    @pytest.mark.parametrize("upstream", ["none", "randaugment", "crop+flip", "label_smoothing"])
    def test_others_are_taken(self, upstream: str) -> None:
        assert build(f"autodo(upstream={upstream})").supports(MultiClass(), IMAGES) == ""

    def test_several_labels_a_row_are_refused(self) -> None:
        reason = build("autodo").supports(MultiLabel(), IMAGES)
        assert reason == "autodo needs one label per row, but these have several"

    def test_what_an_upstream_does_not_support_is_told(self) -> None:
        spec = Spec(rows=9, classes=3, shape=(1, 8, 6))
        assert "square" in build("autodo(upstream=rotate90)").supports(MultiClass(), spec)

    def test_it_needs_images_features_and_meta_rows(self) -> None:
        assert build("autodo").requires() == {"meta", "features"}
        vectors = Spec(rows=9, classes=3, shape=(5,), kind="vector")
        reason = build("autodo").supports(MultiClass(), vectors)
        assert reason == "autodo needs images, but the data are vectors"

    @pytest.mark.parametrize(
        ("argument", "message"),
        [
            ("start=-1", "start: expected an epoch of 0 or more, got -1"),
            ("start=1.0", "write start=1 for an epoch or a share below 1"),
            ("start=7.5", "start: expected a share of the epochs below 1, such as 0.25, or .*7.5"),
            ("start=0.0", "start: expected a share of the epochs .* got 0.0"),
            ("start=true", "start: expected a whole number or a number, got true"),
            ("tolerance=0", "tolerance: expected a number above 0, got 0.0"),
            ("learning_rate=0", "learning_rate: expected a number above 0, got 0.0"),
            ("step=0", "step: expected a number above 0, got 0.0"),
            ("step=-0.1", "step: expected a number above 0, got -0.1"),
            ("step=large", "step: expected a number or auto, got large"),
            ("damping=-0.1", "damping: expected 0 or more, got -0.1"),
            ("terms=-1", "terms: expected 0 or more, got -1"),
            ("terms=1.5", "terms: expected a whole number, got 1.5"),
            ("smoothing=0", r"smoothing: expected a number in \(0, 1\), got 0.0"),
            ("smoothing=1", r"smoothing: expected a number in \(0, 1\), got 1.0"),
            ("outer_batch=1", "outer_batch: expected 2 or more rows, got 1"),
            ("outer_batch=all", "outer_batch: expected a whole number or batch, got all"),
            ("meta_rows=1", "meta_rows: expected 2 or more rows, got 1"),
            ("meta_rows=half", "meta_rows: expected a whole number or full, got half"),
            ("augment=false, weight=false, label=false", "at least one must be true"),
            ("solver=lu", "solver: expected neumann or cg or identity, got lu"),
            ("curvature=fisher", "curvature: expected gauss_newton or hessian, got fisher"),
            ("symmetric=true", "symmetric: expected always or when_soft or never, got true"),
            ("force=2", "force: expected true or false, got 2"),
            ("shared=2", "shared: expected true or false, got 2"),
            ("upstream=3", "upstream: expected a method such as .* got 3"),
            ("gamma=1", "has no argument 'gamma'"),
            ("preset=slow", "unknown preset 'slow'"),
        ],
    )
    def test_an_argument_out_of_range_is_told_with_what_is_allowed(
        self, argument: str, message: str
    ) -> None:
        with pytest.raises(NamingError, match=message):
            build(f"autodo({argument})")

    def test_the_bare_name_is_the_published_setting(self) -> None:
        bare = cast("AutoDO", build("autodo"))
        assert (bare.solver, bare.terms, bare.step, bare.damping) == ("neumann", 5, 0.01, 0)
        assert (bare.learning_rate, bare.start, bare.smoothing) == (0.05, 0.25, 0.1)
        assert (bare.gauss_newton, bare.symmetric, bare.shared) == (True, True, False)
        assert methods.canonical("autodo(preset=published)") == "autodo"
        exact = cast("AutoDO", build("autodo(preset=exact)"))
        assert (exact.solver, exact.damping, exact.meta_rows) == ("cg", 0.01, "full")
        assert exact.gauss_newton and exact.tolerance == 1e-4
        assert (exact.bias_correction, exact.learning_rate) == (True, 0.2)
        assert not bare.bias_correction and bare.outer_batch == exact.outer_batch == "batch"
        assert "2103.05863" in methods.summary("autodo").source


def without_decay(model: Model) -> list[dict[str, Any]]:
    return [{"params": [*model.parameters()], "weight_decay": 0.0}]


def largest(head: Head) -> float:
    """By a dense decomposition."""
    shape = CLASSES, head.h.shape[1]
    unit = torch.eye(shape[0] * shape[1], dtype=head.h.dtype).view(-1, *shape)
    curve = torch.stack([head.product(each).flatten() for each in unit])
    return float(torch.linalg.eigvalsh(curve)[-1])


def saturated(desk: Desk) -> Desk:
    """With predictions of 0 and 1 to machine precision."""
    with torch.no_grad():
        desk.model.head.weight.zero_()
        desk.model.head.bias.copy_(torch.tensor([400.0, 0.0, -400.0]))
    return desk


class TestGuards:
    def test_a_step_that_diverges_is_refused(self) -> None:
        desk = Desk("autodo(step=1000)").scatter()
        before = copy.deepcopy(desk.method.state_dict())
        with pytest.raises(DivergenceError, match="the Neumann series diverges: lambda_max is"):
            desk.outer()
        for name in ("chance", "spread", "omega", "soft"):
            key = f"{name}.values"
            assert torch.equal(desk.method.state_dict()[key], before[key])

    @pytest.mark.parametrize(("times", "told"), [(2.2, 1.0), (1.8, 0.0)])
    def test_force_goes_on_warns_once_and_logs_it(
        self, times: float, told: float, heads: list[Head]
    ) -> None:
        Desk("autodo(solver=identity)").scatter().outer()
        step = times / largest(heads[0])
        desk = Desk(f"autodo(step={step}, force=true)").scatter()
        desk.ctx.take_log()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2 if told else 1):
                desk.outer()
        texts = [str(each.message) for each in caught]
        assert len(texts) == told
        assert all(
            "lambda_max is" in text and "force=true continues anyway" in text for text in texts
        )
        assert desk.ctx.take_log()["series_diverges"] == told
        assert all(bool(each.isfinite().all()) for each in desk.method.learned().values())
        if told:
            with pytest.raises(DivergenceError):
                Desk(f"autodo(step={step})").scatter().outer()

    def test_auto_is_one_over_the_largest_eigenvalue_with_a_margin(
        self, monkeypatch: pytest.MonkeyPatch, heads: list[Head]
    ) -> None:
        steps: list[float] = []

        def spy(head: Head, v: Tensor, terms: int, step: float) -> Tensor:
            steps.append(step)
            assert terms == 30
            return series(head, v, terms, step)

        monkeypatch.setattr(module, "series", spy)
        desk = Desk("autodo(step=auto, terms=30)").scatter()
        desk.ctx.take_log()
        desk.outer()
        assert steps[0] == pytest.approx(1 / 1.2 / largest(heads[0]), rel=1e-3)
        assert desk.ctx.take_log()["residual"] < 1

    def test_a_step_that_is_given_is_kept_where_no_curvature_is_left(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        steps: list[float] = []
        monkeypatch.setattr(module, "series", lambda head, v, terms, step: steps.append(step) or v)
        for text, wanted in (("", 0.01), ("step=auto", 1 / 1.2 / torch.finfo(torch.float32).eps)):
            saturated(Desk(autodo(text), dtype=torch.float32, groups=without_decay)).outer()
            assert steps[-1] == pytest.approx(wanted)

    @pytest.mark.parametrize("text", ["", "force=true", "solver=cg", "solver=identity"])
    def test_a_network_that_is_no_number_is_told_and_spoils_nothing(self, text: str) -> None:
        desk = Desk(autodo(text)).scatter()
        with torch.no_grad():
            desk.model.head.weight[0, 0] = math.nan
        before = copy.deepcopy(desk.method.state_dict())
        with pytest.raises((DivergenceError, SingularError), match=r"not finite|nan"):
            desk.outer()
        assert torch.equal(desk.method.state_dict()["soft.values"], before["soft.values"])

    def test_auto_stays_finite_where_no_curvature_is_left(self) -> None:
        """Predictions of 0 and 1 to machine precision, without weight decay."""
        desk = Desk("autodo(step=auto)", dtype=torch.float32, groups=without_decay)
        saturated(desk).outer()
        assert all(bool(each.isfinite().all()) for each in desk.method.learned().values())

    def test_an_indefinite_curvature_is_refused(self, heads: list[Head]) -> None:
        """Of predictions that are sure and contradict targets; damping or Gauss-Newton helps."""
        ways = {
            "solver=identity, curvature=hessian": True,
            "solver=cg, curvature=hessian": False,
            "solver=cg, curvature=hessian, damping=5": True,
            "solver=cg": True,
        }
        for text, works in ways.items():
            desk = Desk(autodo(text)).scatter()
            with torch.no_grad():
                desk.model.head.weight.mul_(10)
            if works:
                desk.outer()
            else:
                with pytest.raises(IndefiniteError, match="use curvature=gauss_newton or a la"):
                    desk.outer()
        unit = torch.eye(heads[0].h.shape[1] * CLASSES, dtype=torch.float64)
        unit = unit.view(-1, CLASSES, heads[0].h.shape[1])
        curve = torch.stack([heads[0].product(each).flatten() for each in unit])
        assert -5 < float(torch.linalg.eigvalsh(curve)[0]) < -0.001

    @pytest.mark.parametrize("step", ["0.01", "auto"])
    @pytest.mark.parametrize("terms", [6, 500])
    def test_a_series_over_an_indefinite_curvature_is_refused_too(
        self, step: str, terms: int
    ) -> None:
        """It grows along the negative direction at every step, the more terms the more."""
        given = "" if step == "0.01" else f"step={step}"
        desk = Desk(autodo("curvature=hessian", f"terms={terms}", given)).scatter()
        with torch.no_grad():
            desk.model.head.weight.mul_(10)
        with pytest.raises(IndefiniteError, match="a negative eigenvalue"):
            desk.outer()

    def test_conjugate_gradients_without_decay_or_damping_ask_for_some(self) -> None:
        """In float32, where a batch leaves directions without curvature."""
        desk = Desk("autodo(solver=cg, outer_batch=5)", dtype=torch.float32, groups=without_decay)
        with pytest.raises(SingularError, match="set a damping, such as"):
            desk.outer()
        desk = Desk("autodo(preset=exact)", dtype=torch.float32, groups=without_decay)
        desk.ctx.take_log()
        desk.outer()
        assert desk.ctx.take_log()["residual"] < 2e-4

    def test_a_batch_without_weight_moves_nothing_by_its_weights(self) -> None:
        """Of an upstream that gives weight 0 to all, or where all learned weights underflow."""
        for upstream, omega in ((Weightless(), 0.0), (None, -300.0)):
            desk = Desk("autodo", upstream, dtype=torch.float32)
            desk.method.omega.values.fill_(omega)
            desk.outer()
            assert all(bool(each.isfinite().all()) for each in desk.method.learned().values())
            batch = desk.batch(6)
            out = desk.augment(batch)
            wanted = torch.zeros(6) if upstream else batch.w
            torch.testing.assert_close(out.w, wanted)

    def test_what_arguments_leave_without_effect_is_refused(self) -> None:
        for text in (
            "shared=true, augment=false", "solver=cg, terms=9", "solver=cg, step=auto",
            "preset=exact, force=true", "tolerance=0.1", "solver=identity, tolerance=0.1",
        ):  # fmt: skip
            with pytest.raises(NamingError, match="it has no effect with"):
                build(f"autodo({text})")


def a_run(method: str, seed: int = 0, **training: Any) -> Run:
    settings: dict[str, Any] = {"epochs": 3, "batch_size": 8, **training}
    return Run(
        benchmark="test", data="", model="small_cnn(width=0.25)", method=method, seed=seed,
        training=Training(**settings),
    )  # fmt: skip


@pytest.mark.parametrize("text", ["", "preset=exact", "shared=true, upstream=randaugment"])
@pytest.mark.parametrize("killed_at", [2, 7])
def test_killed_in_an_outer_phase_it_redoes_that_epoch(
    text: str, killed_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Epochs 2 and 3 begin with five outer steps each; the end is the same bit for bit."""
    name = autodo(text, "start=1", "outer_batch=8")
    made = splits(Case(1), True)

    def done(folder: Path | None) -> Fitted:
        return fit(a_run(name), made, build(name), folder=folder)

    class Killed(BaseException):
        """Not an Exception, so that nothing on the way can swallow it."""

    whole, real, steps = done(None), AutoDO._outer_step, iter(range(10**6))

    def dies(self: AutoDO, *arguments: Any) -> None:
        if next(steps) == killed_at:
            raise Killed
        real(self, *arguments)

    monkeypatch.setattr(AutoDO, "_outer_step", dies)
    with pytest.raises(Killed):
        done(tmp_path)
    monkeypatch.setattr(AutoDO, "_outer_step", real)
    again = done(tmp_path)
    assert next(steps) == killed_at + 1
    assert again.state.resumed == 1
    assert again.state.metric_lines == whole.state.metric_lines
    for key, array in whole.predictions.items():
        assert np.array_equal(array, again.predictions[key]), key
    for key, value in whole.method.state_dict().items():
        assert torch.equal(value, again.method.state_dict()[key]), key


def flipped(rows: int = 200, meta: int = 60) -> tuple[Splits, np.ndarray, np.ndarray]:
    """Stripes that tell the class, 40 % of the training labels another one; meta rows clean."""
    rng = np.random.default_rng(0)
    count = rows + meta + 60
    labels = np.arange(count) % CLASSES
    images = rng.random((count, 1, EDGE, EDGE)).astype(np.float32) * 0.6
    images[np.arange(count), :, labels] += 0.4
    given = labels.copy()
    wrong = rng.permutation(rows)[: int(0.4 * rows)]
    given[wrong] = (labels[wrong] + rng.integers(1, CLASSES, len(wrong))) % CLASSES
    parts = [
        rows_from_tensors(
            torch.from_numpy(images[a:b]), F.one_hot(torch.from_numpy(given[a:b]), CLASSES).float()
        )
        for a, b in [(0, rows), (rows, rows + meta), (rows + meta, count), (rows + meta, count)]
    ]
    made = Splits(
        train=parts[0], meta=parts[1], select=parts[2], test=parts[3], kind="multi-class",
        classes=("a", "b", "c"), pool=rows,
    )  # fmt: skip
    return made, given[:rows], labels[:rows]


@pytest.mark.parametrize("text", ["augment=false", "preset=exact, augment=false", "label=false"])
def test_flipped_rows_come_to_weigh_less(text: str) -> None:
    """After twelve outer phases; a wrong sign would put the curve's area below a half."""
    made, given, clean = flipped()
    method = build(f"autodo({text}, start=3, outer_batch=50)")
    fit(a_run("autodo", epochs=15, batch_size=32), made, method)
    learned = {name: each.numpy() for name, each in method.learned().items()}
    found = metrics.detection(learned, given, clean)
    assert found["weight_auc"] > 0.6
    weight = learned["weight"]
    assert weight[given != clean].mean() < weight[given == clean].mean()
    if "label" in learned:
        share = learned["label"][np.arange(len(clean)), clean]
        before = 0.1 / CLASSES
        assert share[given != clean].mean() > 1.2 * before


class TestDetection:
    def test_by_hand(self) -> None:
        given, clean = np.array([0, 1, 2, 0, 1, 1]), np.array([0, 1, 2, 1, 0, 2])
        weight = np.array([1.0, 0.5, 2.0, 0.5, 0.1, 3.0])  # of the wrong ones 0.5, 0.1 and 3
        label = np.eye(3)[[0, 1, 0, 1, 1, 2]]  # row 2 spoiled, rows 3 and 5 corrected
        found = metrics.detection({"weight": weight, "label": label}, given, clean)
        # pairs (wrong, right) where the wrong one weighs less, ties half: 2.5 + 3 + 0 of 9
        assert found == pytest.approx({"weight_auc": 5.5 / 9, "corrected": 2 / 3, "spoiled": 1 / 3})
        seen = np.array([1, 1, 0, 4, 0, 2])
        found = metrics.detection({"weight": weight, "label": label, "seen": seen}, given, clean)
        assert found == pytest.approx({"weight_auc": 1.5 / 4, "corrected": 1.0, "spoiled": 0.0})

    def test_the_area_is_sklearn_s(self) -> None:
        rng = np.random.default_rng(0)
        for ties in (False, True):
            given, clean = rng.integers(0, 4, (2, 300))
            weight = rng.random(300).astype(np.float32)
            weight = weight.round(1) if ties else weight
            found = metrics.detection({"weight": weight}, given, clean)
            assert found == pytest.approx({"weight_auc": roc_auc_score(given != clean, -weight)})

    def test_what_was_not_learned_is_not_told(self) -> None:
        given, clean = np.array([0, 1]), np.array([1, 1])
        assert metrics.detection({"probability": np.ones((2, 7))}, given, clean) == {}
        assert set(metrics.detection({"label": np.eye(2)}, given, clean)) == {
            "corrected",
            "spoiled",
        }

    def test_nan_where_there_is_no_row(self) -> None:
        given = np.array([0, 1, 0])
        learned = {"weight": np.arange(3.0), "label": np.eye(2)[given]}
        found = metrics.detection(learned, given, given)
        assert math.isnan(found["weight_auc"]) and math.isnan(found["corrected"])
        assert found["spoiled"] == 0
        found = metrics.detection(learned, given, 1 - given)
        assert math.isnan(found["weight_auc"]) and math.isnan(found["spoiled"])
        assert found["corrected"] == 0


@pytest.fixture(scope="module")
def npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng, made = np.random.default_rng(0), {}
    for split, count in (("train", 80), ("val", 40), ("test", 40)):
        made[f"{split}_images"] = rng.integers(0, 256, (count, 12, 12)).astype(np.uint8)
        made[f"{split}_labels"] = rng.permutation(np.arange(count) % 4)
    path = tmp_path_factory.mktemp("data") / "small.npz"
    np.savez(path, **made)
    return path


def carry_out(npz: Path, out: Path, method: str, noise: str = "") -> Path:
    """The directory of a run of the method."""
    benchmark = parse_benchmark(f"npz:{npz}{noise}")
    cell = cells.make_cell(
        cells.parse_row(method, Protocol()),
        benchmark,
        cells.model_name("small_cnn", 0.25),
        cells.training_of("medmnist", {"epochs": 3, "batch_size": 16}),
        Protocol(),
        0,
        checksum="",
        preset="medmnist",
    )
    out.mkdir(exist_ok=True)
    execute(cell.run, cell.recorded, out, Options(), benchmark)
    return runs.folder_of(out, cell.run)


class TestRuns:
    @pytest.mark.parametrize("method", ["autodo(start=1)", "saflex"])
    def test_a_corrupted_run_tells_how_well_the_rows_are_found(
        self, method: str, npz: Path, tmp_path: Path
    ) -> None:
        """Once more from the files: labels as stored and as corrupted."""
        folder = carry_out(npz, tmp_path, method, "(noise=0.4)")
        result = json.loads((folder / "result.json").read_text())
        assert result["status"] == "done", result.get("traceback")
        with np.load(folder / "learned.npz") as file:
            learned = dict(file)
        with np.load(folder / "corruption.npz") as file:
            corrupted = dict(file)
        with np.load(npz) as file:
            stored = np.concatenate([file["train_labels"], file["val_labels"]])
        clean = stored[corrupted["stored_rows"]]
        wrong = np.zeros(len(clean), bool)
        wrong[corrupted["rows"]] = True
        assert np.array_equal(clean[corrupted["rows"]], corrupted["before"])
        assert 0.2 < wrong.mean() < 0.4
        seen = learned.get("seen", np.ones(len(clean))) > 0
        right = learned["label"].argmax(axis=1) == clean
        assert len(learned["weight"]) == len(clean)
        wanted = {
            "weight_auc": roc_auc_score(wrong[seen], -learned["weight"][seen]),
            "corrected": right[wrong & seen].mean(),
            "spoiled": 1 - right[~wrong & seen].mean(),
        }
        assert result["detection"] == pytest.approx(wanted)

    def test_without_corruption_or_without_learning_there_is_nothing_to_tell(
        self, npz: Path, tmp_path: Path
    ) -> None:
        for method, noise in (("autodo(start=1)", ""), ("none", "(noise=0.4)")):
            folder = carry_out(npz, tmp_path, method, noise)
            assert "detection" not in json.loads((folder / "result.json").read_text())

    def test_a_series_that_diverges_fails_the_run(self, npz: Path, tmp_path: Path) -> None:
        folder = carry_out(npz, tmp_path, "autodo(start=1, step=1000)")
        result = json.loads((folder / "result.json").read_text())
        assert result["status"] == "failed"
        told = result["reason"]
        assert told.startswith("DivergenceError: the Neumann series diverges: lambda_max is ")
        assert "and the step 1000; the largest step that converges is " in told
        largest = float(told.partition("lambda_max is ")[2].partition(" ")[0])
        limit = float(told.partition("converges is ")[2].partition(" ")[0])
        assert limit == pytest.approx(2 / largest, rel=1e-3)

    def test_unless_it_is_forced(self, npz: Path, tmp_path: Path) -> None:
        with pytest.warns(RuntimeWarning, match="force=true continues anyway"):
            folder = carry_out(npz, tmp_path, "autodo(start=1, step=1000, force=true)")
        assert json.loads((folder / "result.json").read_text())["status"] == "done"
        lines = [json.loads(each) for each in (folder / "metrics.jsonl").read_text().splitlines()]
        logs = [line["log"] for line in lines]
        assert (
            logs[0] == {"outer_steps": 0.0} and logs[2]["outer_steps"] > logs[1]["outer_steps"] > 0
        )
        assert [log["series_diverges"] for log in logs[1:]] == [1.0, 1.0]
        for log in logs[1:]:
            assert {"lambda_max", "residual", "cosine_with_identity", "labels_changed"} <= set(log)
