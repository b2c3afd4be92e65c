"""SAFLEX against brute force: exact steps row by row, label by label, in float64."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple, cast

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import methods
from analysis.runs import Run, Training
from benchmarks.contract import (
    BATCH,
    META_ROWS,
    ROWS,
    Case,
    splits,
)
from benchmarks.data.streams import RowStream, rows_from_tensors
from benchmarks.training import models, trainer
from benchmarks.training.context import TrainingContext, own_loop
from benchmarks.training.tasks import MultiClass, MultiLabel
from benchmarks.training.trainer import Fitted, fit
from methods import build
from methods.base import Batch, Context, Method, Spec, Task
from methods.functional import directional
from methods.learner import learner_of
from methods.naming import NamingError
from methods.saflex import (
    Rules,
    Saflex,
    Scores,
    Tail,
    adam_diagonal,
    refine,
    refine_pairs,
    score,
)

INPUTS, LABELS, COUNT = 6, 5, 24
STEP = 1e-4
"""Learning rate of the exact steps."""
Parameters = dict[str, Tensor]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def one_hot(labels: Tensor, classes: int = LABELS) -> Tensor:
    return F.one_hot(labels, classes).double()


class Problem(NamedTuple):
    """Rows that a network is trained on, and meta rows, both in float64."""

    x: Tensor
    y: Tensor
    meta_x: Tensor
    meta_y: Tensor


def problem(seed: int, rows: int = COUNT, several: bool = False) -> Problem:
    """Labels that a linear teacher gives, with noise; ``several`` yes-or-no labels a row."""
    count = rows + 40
    x = random(count, INPUTS, seed=seed)
    scores = x @ random(INPUTS, LABELS, seed=seed + 1) + random(count, LABELS, seed=seed + 2)
    y = (scores > 0).double() if several else one_hot(scores.argmax(dim=1))
    return Problem(x[:rows], y[:rows], x[rows:], y[rows:])


def mlp(activation: str = "tanh", seed: int = 0) -> nn.Sequential:
    """Two hidden layers of sixteen."""
    torch.manual_seed(seed)
    act = {"tanh": nn.Tanh, "relu": nn.ReLU}[activation]
    layers = nn.Linear(INPUTS, 16), act(), nn.Linear(16, 16), act(), nn.Linear(16, LABELS)
    return nn.Sequential(*layers).double()


def mean_loss(task: Task, logits: Tensor, y: Tensor) -> Tensor:
    """The task's mean loss, written once more."""
    if isinstance(task, MultiLabel):
        return F.binary_cross_entropy_with_logits(logits, y)
    return -(y * logits.log_softmax(dim=1)).sum(dim=1).mean()


def warmed(model: nn.Module, data: Problem, task: Task, steps: int, rate: float = 0.01) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        mean_loss(task, model(data.x), data.y).backward()
        optimizer.step()
    optimizer.zero_grad()


def gradient(loss: Tensor, model: nn.Module, graph: bool = False) -> Parameters:
    """By parameter name; with ``graph`` it can be differentiated again."""
    named = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), retain_graph=True, create_graph=graph)
    return dict(zip(named, found, strict=True))


def meta_gradient(model: nn.Module, data: Problem, task: Task) -> Parameters:
    """By a plain backward pass of a copy, whose buffers may move."""
    other = copy.deepcopy(model)
    return gradient(mean_loss(task, other(data.meta_x), data.meta_y), other)


def effects(model: nn.Module, data: Problem, targets: Tensor, task: Task) -> Tensor:
    """(B, C) exact change of the meta loss by one SGD step on row i alone with target (i, c)."""
    named = dict(model.named_parameters())
    with torch.no_grad():
        start = mean_loss(task, model(data.meta_x), data.meta_y)
    rows = []
    for x, candidates in zip(data.x, targets, strict=True):
        logits, changes = model(x[None]), []
        for y in candidates:
            step = gradient(mean_loss(task, logits, y[None]), model)
            moved = {name: each.detach() - STEP * step[name] for name, each in named.items()}
            with torch.no_grad():
                end = mean_loss(task, functional_call(model, moved, (data.meta_x,)), data.meta_y)
            changes.append(end - start)
        rows.append(torch.stack(changes))
    return torch.stack(rows)


def scored(model: nn.Module, data: Problem, task: Task) -> tuple[Tensor, Tensor, Scores]:
    """Logits, their slope and the scores of all rows along the exact meta gradient."""
    logits, slope = directional(model, data.x, meta_gradient(model, data, task))
    return logits, slope, score(task, logits, slope, data.y)


STAGES = (0, 30, 300)
SEEDS = range(6)


class Census(NamedTuple):
    """What exact steps say of every row of several networks at one stage of training."""

    best: Tensor
    """(N,) whether S picks the label of the lowest meta loss"""
    printed: Tensor
    """(N,) whether the sign printed in the paper does"""
    kept: Tensor
    """(N,) whether the weight rule is the sign of the exact change with the row's own label"""
    chance: Tensor
    """(N,) whether the row's own label is the best one"""


@cache
def census(activation: str, steps: int) -> Census:
    task, found = MultiClass(), []
    for seed in SEEDS:
        data, model = problem(10 * seed), mlp(activation, seed)
        warmed(model, data, task, steps)
        candidates = torch.eye(LABELS, dtype=torch.float64).expand(COUNT, -1, -1)
        exact = effects(model, data, candidates, task)
        logits, _, scores = scored(model, data, task)
        pick = refine(Rules(labels="argmax"), task, scores, data.y, data.y[:, 0], logits)
        assert torch.equal(pick.y.argmax(dim=1), scores.labels.argmax(dim=1))
        rule = refine(Rules(labels="keep"), task, scores, data.y, data.y[:, 0], logits)
        own = data.y.argmax(dim=1)
        change = exact.gather(1, own[:, None])[:, 0]
        lowest = exact.argmin(dim=1)
        # Eq. 8 and Algorithm 1 take the argmax of Pi = J g, which is the argmax of -S.
        printed = (-scores.labels).argmax(dim=1)
        found.append(
            Census(
                pick.y.argmax(dim=1) == lowest,
                printed == lowest,
                (rule.factor == 1) == (change <= 0),
                own == lowest,
            )
        )
    return Census(*(torch.cat(each) for each in zip(*found, strict=True)))


def share(told: list[Tensor]) -> float:
    return float(torch.cat(told).double().mean())


EVERY = [(activation, steps) for activation in ("tanh", "relu") for steps in STAGES]


class TestBruteForce:
    @pytest.mark.parametrize("activation", ["tanh", "relu"])
    def test_at_the_start_every_row_gets_the_label_of_the_lowest_meta_loss(
        self, activation: str
    ) -> None:
        assert bool(census(activation, 0).best.all())

    def test_pooled_over_stages_and_networks_it_does_in_99_of_100(self) -> None:
        assert share([census(*each).best for each in EVERY]) >= 0.99
        assert share([census(*each).chance for each in EVERY]) < 0.5

    @pytest.mark.parametrize("each", EVERY, ids=str)
    def test_and_in_97_of_100_at_every_single_stage(self, each: tuple[str, int]) -> None:
        assert share([census(*each).best]) >= 0.97

    def test_the_printed_sign_does_in_fewer_than_2_of_100(self) -> None:
        assert share([census(*each).printed for each in EVERY]) < 0.02

    def test_the_weight_rule_is_the_sign_of_the_exact_change(self) -> None:
        """With the row's own label, which an optimal label would make a vacuous question."""
        kept = [census(*each).kept for each in EVERY]
        assert share(kept) >= 0.95
        assert min(float(each.double().mean()) for each in kept) >= 0.93

    @pytest.mark.parametrize("labels", ["keep", "argmax", "prox", "gumbel"])
    @pytest.mark.parametrize("several", [False, True])
    def test_of_a_batch_the_fall_is_the_rate_times_weight_times_gain(
        self, labels: Any, several: bool
    ) -> None:
        """For the refined targets and weights, by an exact step of 1e-6 to 1e-4 relative."""
        task: Task = MultiLabel() if several else MultiClass()
        for seed in range(3):
            data, model = problem(seed, several=several), mlp("tanh", seed)
            warmed(model, data, task, 30)
            logits, _, scores = scored(model, data, task)
            w = random(COUNT, seed=seed + 9).abs()
            torch.manual_seed(seed)
            rules = Rules(labels=labels, weights="relu" if seed else "step", scale="std")
            new = refine(rules, task, scores, data.y, w, logits)
            predicted = -1e-6 * float(new.w @ new.gain)
            actual = change_by_step(model, data, new.w, new.y, task, 1e-6)
            assert actual == pytest.approx(predicted, rel=1e-4)
            assert predicted < 0


def change_by_step(
    model: nn.Module, data: Problem, w: Tensor, y: Tensor, task: Task, rate: float
) -> float:
    """Exact change of the meta loss by an SGD step on w @ losses; copies' buffers move."""
    other = copy.deepcopy(model)
    losses = task.losses(other(data.x), y)
    step = gradient(w @ losses, other)
    ends = []
    for factor in (0, rate):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for name, each in moved.named_parameters():
                each.sub_(factor * step[name])
            ends.append(mean_loss(task, moved(data.meta_x), data.meta_y))
    return float(ends[1] - ends[0])


class TestBatchNorm:
    @pytest.mark.parametrize("several", [False, True])
    @pytest.mark.parametrize("steps", [0, 5])
    @pytest.mark.parametrize(("activation", "rate"), [("celu", 1e-6), ("relu", 1e-8)])
    def test_of_a_resnet_in_train_mode_predicted_is_actual(
        self, activation: str, rate: float, steps: int, several: bool
    ) -> None:
        """Rows share their statistics, so that only the step of the whole batch is a truth.

        At 1e-6 some units of the narrow network with relu pass their kink.
        """
        torch.manual_seed(steps)
        task: Task = MultiLabel() if several else MultiClass()
        spec = Spec(rows=8, classes=3, shape=(1, 12, 12))
        model = models.build(f"resnet18(width=0.125, activation={activation})", spec)
        model = model.double().train()
        x = torch.rand(20, 1, 12, 12, dtype=torch.float64)
        y = one_hot(torch.arange(20) % 3, 3)
        data = Problem(x[:8], y[:8], x[8:], y[8:])
        warmed(model, data, task, steps, rate=1e-3)
        logits, _, scores = scored(model, data, task)
        w = torch.rand(8, dtype=torch.float64)
        for rules in (Rules(labels="keep", weights="one"), Rules(labels="prox", weights="relu")):
            new = refine(rules, task, scores, data.y, w / w.sum(), logits)
            predicted = -float(new.w @ new.gain)
            actual = change_by_step(model, data, new.w, new.y, task, rate) / rate
            assert abs(predicted) > 1e-3
            assert actual == pytest.approx(predicted, rel=1e-4)


def rank_correlation(one: Tensor, other: np.ndarray) -> float:
    told: Any = scipy.stats.spearmanr(one.numpy().ravel(), other.ravel())
    return float(told.statistic)


class UnderAdam(NamedTuple):
    """Spearman's correlation of foreseen and true effects: preconditioned, and plain."""

    relabel: tuple[float, float]
    drop: tuple[float, float]


@cache
def under_adam(seed: int) -> UnderAdam:
    """Each row of a batch is relabelled, or dropped, before one real step of Adam.

    Model and optimiser are copies of those that 60 steps on batches of 32 rows have made.
    """
    task, data, model = MultiClass(), problem(50 + seed, rows=256), mlp("tanh", seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    w = torch.full((32,), 1 / 32, dtype=torch.float64)

    def loss_of(model: nn.Module, rows: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return w @ F.cross_entropy(model(data.x[rows]), y, reduction="none")

    for step in range(60):
        rows = torch.randperm(256, generator=torch.Generator().manual_seed(step))[:32]
        optimizer.zero_grad()
        loss_of(model, rows, w, data.y[rows]).backward()
        optimizer.step()
    optimizer.zero_grad()
    rows = torch.arange(32)

    def after(w: Tensor, y: Tensor) -> float:
        other = copy.deepcopy(model)
        own = torch.optim.Adam(other.parameters(), lr=1e-3)
        own.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        loss_of(other, rows, w, y).backward()
        own.step()
        with torch.no_grad():
            return float(F.cross_entropy(other(data.meta_x), data.meta_y))

    own = data.y[:32]
    start = after(w, own)
    relabel, drop = np.zeros((32, LABELS)), np.zeros(32)
    for row in range(32):
        for label in range(LABELS):
            y = own.clone()
            y[row] = one_hot(torch.tensor(label))
            relabel[row, label] = start - after(w, y)
        drop[row] = after(w * (rows != row), own) - start
    plain, diagonal = meta_gradient(model, data, task), adam_diagonal(optimizer)
    named = dict(model.named_parameters())
    shaped = {name: each * diagonal[named[name]] for name, each in plain.items()}
    found = []
    for tangent in (shaped, plain):
        scores = score(task, *directional(model, data.x[:32], tangent), own)
        gained = scores.labels - scores.gain[:, None]
        pairs = (gained, relabel), (scores.gain, drop)
        found.append([rank_correlation(*pair) for pair in pairs])
    one, other = zip(*found, strict=True)
    return UnderAdam(cast("Any", one), cast("Any", other))


class TestAdam:
    @pytest.mark.parametrize("what", ["relabel", "drop"])
    def test_preconditioned_scores_rank_as_the_true_effects(self, what: str) -> None:
        found = [getattr(under_adam(seed), what) for seed in range(4)]
        assert min(preconditioned for preconditioned, _ in found) > 0.97

    @pytest.mark.parametrize("what", ["relabel", "drop"])
    def test_without_preconditioning_they_rank_worse(self, what: str) -> None:
        for seed in range(4):
            preconditioned, plain = getattr(under_adam(seed), what)
            assert plain < preconditioned

    @pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
    def test_the_diagonal_is_what_a_step_multiplies_its_gradient_by(self, kind: Any) -> None:
        """One over the root of the second moments, corrected for their start at 0, plus eps."""
        parameter = nn.Parameter(random(7, seed=0))
        optimizer = kind([parameter], lr=0.01, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1)
        assert adam_diagonal(optimizer) == {}
        for seed in range(5):
            parameter.grad = random(7, seed=seed + 1)
            optimizer.step()
        state = optimizer.state[parameter]
        mean_square = state["exp_avg_sq"] / (1 - 0.95**5)
        torch.testing.assert_close(
            adam_diagonal(optimizer)[parameter], 1 / (mean_square.sqrt() + 1e-3), rtol=1e-6, atol=0
        )

    def test_an_optimiser_without_second_moments_has_no_diagonal(self) -> None:
        parameter = nn.Parameter(random(7, seed=0))
        optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
        parameter.grad = random(7, seed=1)
        optimizer.step()
        assert adam_diagonal(optimizer) == {}


class TestScore:
    @pytest.mark.parametrize("each", EVERY, ids=str)
    def test_scores_average_to_zero_under_the_network_and_reach_above_it(
        self, each: tuple[str, int]
    ) -> None:
        activation, steps = each
        data, model = problem(0), mlp(activation)
        warmed(model, data, MultiClass(), steps)
        logits, slope, scores = scored(model, data, MultiClass())
        p = logits.softmax(dim=1)
        size = float(scores.labels.abs().max())
        assert float((p * scores.labels).sum(dim=1).abs().max()) < 1e-13 * size
        assert float(scores.labels.max(dim=1).values.min()) >= -1e-14 * size
        by_hand = -(slope - (p * slope).sum(dim=1, keepdim=True))
        torch.testing.assert_close(scores.labels, by_hand, rtol=1e-12, atol=1e-13 * size)
        torch.testing.assert_close(scores.gain, (by_hand * data.y).sum(dim=1))
        assert not scores.labels.requires_grad and not scores.gain.requires_grad

    @pytest.mark.parametrize("several", [False, True])
    def test_the_gain_is_the_derivative_of_the_rows_own_loss(self, several: bool) -> None:
        """For soft targets too, and S is what another target would add to it."""
        task: Task = MultiLabel() if several else MultiClass()
        data, model = problem(1, several=several), mlp("relu")
        g = meta_gradient(model, data, task)
        logits, slope = directional(model, data.x, g)
        for y in (data.y, random(COUNT, LABELS, seed=3).softmax(dim=1)):
            scores = score(task, logits, slope, y)
            other = random(COUNT, LABELS, seed=4).softmax(dim=1)
            moved = score(task, logits, slope, other)
            torch.testing.assert_close(moved.labels, scores.labels)
            torch.testing.assert_close(
                moved.gain, scores.gain + ((other - y) * scores.labels).sum(dim=1)
            )
            for row in range(0, COUNT, 5):
                loss = mean_loss(task, model(data.x[row : row + 1]), y[row : row + 1])
                own = gradient(loss, model)
                wanted = sum(float((own[name] * g[name]).sum()) for name in g)
                assert float(scores.gain[row]) == pytest.approx(wanted, rel=1e-10)


class TestMultiLabel:
    @pytest.mark.parametrize("steps", STAGES)
    def test_a_label_moves_to_1_where_that_lowers_the_meta_loss(self, steps: int) -> None:
        """S_k = -dz_k / K, against exact steps with every single label at 0 and at 1."""
        task, agree, printed, rule = MultiLabel(), [], [], []
        for seed in range(3):
            data, model = problem(7 * seed, several=True), mlp("relu" if seed else "tanh", seed)
            warmed(model, data, task, steps)
            both = []
            for value in (0.0, 1.0):
                targets = data.y[:, None].repeat(1, LABELS, 1)
                targets.diagonal(dim1=1, dim2=2).fill_(value)
                both.append(effects(model, data, targets, task))
            better = both[1] < both[0]
            logits, slope, scores = scored(model, data, task)
            torch.testing.assert_close(scores.labels, -slope / LABELS)
            w = torch.ones(COUNT, dtype=torch.float64)
            new = refine(Rules(labels="argmax"), task, scores, data.y, w, logits)
            assert torch.equal(new.y, (scores.labels > 0).double())
            agree.append((new.y == 1) == better)
            printed.append((scores.labels < 0) == better)
            change = effects(model, data, data.y[:, None], task)[:, 0]
            kept = refine(Rules(labels="keep"), task, scores, data.y, w, logits)
            rule.append((kept.factor == 1) == (change <= 0))
        assert share(agree) >= (0.99 if steps else 1)
        assert share(printed) < 0.02
        assert share(rule) >= 0.95


class Towers(nn.Module):
    """Similarities of images and texts, divided by a temperature that is learned."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.image = nn.Sequential(nn.Linear(INPUTS, 16), nn.Tanh(), nn.Linear(16, 8)).double()
        self.text = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 8)).double()
        self.scale = nn.Parameter(torch.tensor(1.2, dtype=torch.float64))  # -log temperature

    def forward(self, x: list[Tensor]) -> Tensor:
        image, text = F.normalize(self.image(x[0])), F.normalize(self.text(x[1]))
        return image @ text.T * self.scale.exp()


class Pairing(NamedTuple):
    """A contrastive problem: eight pairs of which some share a text, and meta pairs."""

    model: Towers
    inputs: list[Tensor]
    text: Tensor
    meta: list[Tensor]
    same: Tensor
    """(B, B) 1 where two pairs share their text"""

    def meta_loss(self, moved: Mapping[str, Tensor] | None = None) -> Tensor:
        z = functional_call(self.model, dict(moved or {}), (self.meta,))
        target = torch.arange(len(z))
        return F.cross_entropy(z, target) + F.cross_entropy(z.T, target)

    def after(self, loss: Tensor, rate: float) -> float:
        """The meta loss after one exact SGD step on ``loss``."""
        step = gradient(loss, self.model)
        named = dict(self.model.named_parameters())
        with torch.no_grad():
            return float(self.meta_loss({n: each - rate * step[n] for n, each in named.items()}))

    def slope(self) -> tuple[Tensor, Tensor]:
        return directional(self.model, self.inputs, gradient(self.meta_loss(), self.model))


def pairing(seed: int, steps: int) -> Pairing:
    model, text = Towers(seed), torch.tensor([0, 1, 2, 0, 3, 4, 2, 0])
    bank = random(6, 4, seed=seed + 1)
    inputs = [random(8, INPUTS, seed=seed + 2), bank[text]]
    meta_text = random(7, 4, seed=seed + 3)
    mixing = random(4, INPUTS, seed=seed + 4)
    inputs[0] = inputs[0] + inputs[1] @ mixing
    meta = [random(7, INPUTS, seed=seed + 5) + meta_text @ mixing, meta_text]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        z = model(inputs)
        target = torch.arange(8)
        (F.cross_entropy(z, target) + F.cross_entropy(z.T, target)).backward()
        optimizer.step()
    optimizer.zero_grad()
    same = (text[:, None] == text).double()
    return Pairing(model, inputs, text, meta, same)


class TestContrastive:
    @pytest.mark.parametrize("steps", [0, 60])
    def test_rows_and_columns_get_the_text_of_the_lowest_meta_loss(self, steps: int) -> None:
        task = MultiClass()
        picks: dict[str, list[Tensor]] = {"rows": [], "columns": []}
        rules: dict[str, list[Tensor]] = {"rows": [], "columns": []}
        for seed in range(4):
            made = pairing(10 * seed, steps)
            w = torch.ones(8, dtype=torch.float64)
            logits, slope = made.slope()
            best = refine_pairs(Rules(labels="argmax"), task, logits, slope, made.text, w)
            own = refine_pairs(Rules(labels="keep"), task, logits, slope, made.text, w)
            groups = [made.same[made.text == number][0] for number in made.text.unique()]
            shared = torch.stack([group / group.sum() for group in groups])
            z, start = made.model(made.inputs), float(made.meta_loss().detach())
            for name, side in (("rows", z), ("columns", z.T)):
                for row in range(8):
                    found = [
                        made.after(-(target * side[row].log_softmax(0)).sum(), STEP)
                        for target in shared
                    ]
                    wanted = shared[int(np.argmin(found))]
                    same = torch.allclose(getattr(best, name).y[row], wanted)
                    picks[name].append(torch.tensor([same]))
                    falls = found[int(made.text[row])] <= start
                    factor = getattr(own, name).factor[row]
                    rules[name].append(torch.tensor([float(falls) == float(factor)]))
        for name in ("rows", "columns"):
            assert share(picks[name]) >= (0.99 if steps else 1), name
            assert share(rules[name]) >= 0.95, name

    @pytest.mark.parametrize("labels", ["keep", "argmax", "prox", "gumbel"])
    def test_its_loss_falls_as_the_gains_say(self, labels: Any) -> None:
        """The refined loss of the docstring, by an exact step of 1e-7 to 1e-4 relative."""
        task, w = MultiClass(), random(8, seed=1).abs()
        for steps in (0, 60):
            made = pairing(3, steps)
            logits, slope = made.slope()
            torch.manual_seed(0)
            rules = Rules(labels=labels, weights="relu" if steps else "step")
            rows, columns = refine_pairs(rules, task, logits, slope, made.text, w)
            z = made.model(made.inputs)
            loss = rows.w @ task.losses(z, rows.y) + columns.w @ task.losses(z.T, columns.y)
            predicted = -1e-7 * float(rows.w @ rows.gain + columns.w @ columns.gain)
            actual = made.after(loss, 1e-7) - float(made.meta_loss().detach())
            assert actual == pytest.approx(predicted, rel=1e-4)
            torch.testing.assert_close(rows.w.sum(), w.sum())
            torch.testing.assert_close(columns.w.sum(), w.sum())

    @pytest.mark.parametrize("labels", ["keep", "argmax", "prox", "gumbel"])
    def test_equal_texts_get_equal_mass(self, labels: Any) -> None:
        made = pairing(5, 20)
        logits, slope = made.slope()
        w = torch.ones(8, dtype=torch.float64)
        rules = Rules(labels=labels, tau=1.0)
        for part in refine_pairs(rules, MultiClass(), logits, slope, made.text, w):
            torch.testing.assert_close(part.y.sum(dim=1), w)
            for one, other in ((0, 3), (0, 7), (2, 6)):
                torch.testing.assert_close(part.y[:, one], part.y[:, other])
            if labels == "keep":
                torch.testing.assert_close(part.y, made.same / made.same.sum(dim=1, keepdim=True))


def drawn(rules: Rules, task: Task, s: Tensor, y: Tensor, seed: int = 0) -> Tensor:
    """Targets that the rules give to scores (B, K); the logits are those of a fixed draw."""
    torch.manual_seed(seed)
    logits = random(*s.shape, seed=99)
    scores = Scores(s, (s * y).sum(dim=1))
    return refine(rules, task, scores, y, torch.ones_like(y[:, 0]), logits).y


class TestLabels:
    @pytest.mark.parametrize("beta", [0.0, 1.5])
    @pytest.mark.parametrize("tau", [0.01, 1.0])
    def test_gumbel_samples_softmax_of_score_and_label_whatever_tau(
        self, beta: float, tau: float
    ) -> None:
        s, y = random(1, 4, seed=2), torch.tensor([[0.0, 0.0, 1.0, 0.0]]).double()
        many = 40000
        rules = Rules(beta=beta, tau=tau)
        out = drawn(rules, MultiClass(), s.expand(many, -1), y.expand(many, -1))
        torch.testing.assert_close(out.sum(dim=1), torch.ones(many, dtype=torch.float64))
        counts = torch.bincount(out.argmax(dim=1), minlength=4).numpy()
        wanted = many * torch.softmax(s[0] + beta * y[0], 0).numpy()
        assert scipy.stats.chisquare(counts, wanted).pvalue > 1e-3
        if tau < 0.1:
            assert float(out.max(dim=1).values.mean()) > 0.98
        else:
            assert float(out.max(dim=1).values.mean()) < 0.8

    @pytest.mark.parametrize("beta", [0.0, 1.5])
    @pytest.mark.parametrize("tau", [0.01, 1.0])
    def test_gumbel_decides_each_of_several_labels_by_a_sigmoid(
        self, beta: float, tau: float
    ) -> None:
        s, y = random(1, 4, seed=5), torch.tensor([[0.0, 1.0, 1.0, 0.0]]).double()
        many = 40000
        rules = Rules(beta=beta, tau=tau)
        out = drawn(rules, MultiLabel(), s.expand(many, -1), y.expand(many, -1))
        p = torch.sigmoid(16 * s[0] + beta * (2 * y[0] - 1))
        for label in range(4):
            ones = int((out[:, label] > 0.5).sum())
            assert scipy.stats.binomtest(ones, many, float(p[label])).pvalue > 1e-3
        flips = np.corrcoef((out > 0.5).double().numpy().T)
        assert float(np.abs(flips - np.eye(4)).max()) < 0.03

    def test_prox_trades_distance_to_the_smoothed_label_against_score(self) -> None:
        """It minimises KL(y || q) - eta S.y on the simplex, q = (1 - eps) y + eps p."""
        y = torch.cat([one_hot(torch.tensor([0, 3, 1])), random(3, LABELS, seed=1).softmax(dim=1)])
        s, p = 2 * random(6, LABELS, seed=6), random(6, LABELS, seed=99).softmax(dim=1)
        out = drawn(Rules(labels="prox", eps=0.2, eta=0.7), MultiClass(), s, y)
        for found, own, gain, start in zip(
            out.numpy(), y.numpy(), s.numpy(), p.numpy(), strict=True
        ):
            q = 0.8 * own + 0.2 * start

            def cost(free: np.ndarray, q: np.ndarray = q, gain: np.ndarray = gain) -> float:
                point = np.exp(free - free.max())
                point /= point.sum()
                return float((point * np.log(point / q)).sum() - 0.7 * gain @ point)

            best = scipy.optimize.minimize(cost, np.zeros(LABELS), method="BFGS", tol=1e-10)
            wanted = np.exp(best.x - best.x.max())
            np.testing.assert_allclose(found, wanted / wanted.sum(), atol=1e-5)
            assert cost(np.log(found)) <= best.fun + 1e-12

    @pytest.mark.parametrize("count", [1, 4])
    @pytest.mark.parametrize("beta", [0.0, 1.5])
    def test_the_share_of_labels_kept_does_not_depend_on_their_number(
        self, beta: float, count: int
    ) -> None:
        """A label's own derivative decides, not its share of the mean losses.

        Derivatives of size 2: with the networks of this file, of five labels, their median is 0.02
        untrained, 0.8 after 50 steps and 3.5 after 200.
        """
        many, y = 20000, (random(20000, count, seed=1) > 0).double()
        along = 2.0 * (2 * y - 1) + random(many, count, seed=2)  # mostly for the own label
        signs, given = (2 * y - 1).numpy(), along.numpy()
        share = {
            "gumbel": scipy.special.expit(signs * given + beta).mean(),
            "argmax": (signs * given + beta > 0).mean(),
        }
        prior = np.where(y.numpy() > 0, 1, 0) * 0.7 + 0.3 * scipy.special.expit(
            random(many, count, seed=99).numpy()
        )
        moved = scipy.special.expit(scipy.special.logit(prior) + 0.5 * given)
        share["prox"] = ((moved > 0.5) == (y.numpy() > 0)).mean()
        for labels, wanted in share.items():
            rules = Rules(labels=cast("Any", labels), beta=beta)
            out = drawn(rules, MultiLabel(), along / count**2, y)
            kept = float(((out > 0.5) == (y > 0)).double().mean())
            assert kept == pytest.approx(wanted, abs=0.02 if labels == "gumbel" else 1e-9)
            assert kept > 0.75

    @pytest.mark.parametrize("count", [4, 14])
    def test_equal_labels_are_decided_as_one_label_is(self, count: int) -> None:
        """A linear network with ``count`` equal labels, its meta gradient by autograd."""
        x, meta = random(8, 5, seed=1), random(30, 5, seed=2)
        w, right = random(5, 1, seed=3), (random(30, 1, seed=4) > 0).double()
        found = []
        for labels in (1, count):
            weights = w.repeat(1, labels).requires_grad_()
            loss = MultiLabel().losses(meta @ weights, right.repeat(1, labels)).mean()
            (gradient,) = torch.autograd.grad(loss, weights)
            z, y = (x @ weights).detach(), (x[:, :1] > 0).double().repeat(1, labels)
            scores = score(MultiLabel(), z, x @ gradient, y)
            out = refine(Rules(labels="prox"), MultiLabel(), scores, y, torch.ones(8).double(), z)
            found.append(out.y[:, :1])
        torch.testing.assert_close(*found, rtol=0, atol=1e-12)

    def test_prox_of_several_labels_does_so_for_each(self) -> None:
        y = (random(6, 4, seed=1) > 0).double()
        s, p = 2 * random(6, 4, seed=6), random(6, 4, seed=99).sigmoid()
        out = drawn(Rules(labels="prox", eps=0.2, eta=0.7), MultiLabel(), s, y)
        for found, own, gain, start in zip(
            out.flatten(), y.flatten(), s.flatten(), p.flatten(), strict=True
        ):
            q, eta = float(0.8 * own + 0.2 * start), 0.7 * float(gain)
            best = scipy.optimize.minimize_scalar(
                lambda a, q=q, eta=16 * eta: a * np.log(a / q) + (1 - a) * np.log((1 - a) / (1 - q))
                - eta * a,
                bounds=(1e-12, 1 - 1e-12), method="bounded", options={"xatol": 1e-10},
            )  # fmt: skip
            assert float(found) == pytest.approx(float(cast("Any", best).x), abs=1e-6)

    @pytest.mark.parametrize("task", [MultiClass(), MultiLabel()])
    def test_prox_at_its_ends(self, task: Task) -> None:
        y, s = one_hot(torch.arange(5) % LABELS), random(5, LABELS, seed=6)
        p = task.labels(random(5, LABELS, seed=99), 1.0)
        still = drawn(Rules(labels="prox", eps=1.0, eta=0.0), task, s, y)
        torch.testing.assert_close(still, p)
        stiff = drawn(Rules(labels="prox", eps=0.0, eta=0.5), task, s, y)
        torch.testing.assert_close(stiff, y)
        assert bool(torch.isfinite(stiff).all())

    def test_argmax_takes_score_plus_beta_for_the_label(self) -> None:
        s = torch.tensor([[0.0, 1.0, 0.9], [0.0, 1.0, 0.9]]).double()
        y = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]).double()
        out = drawn(Rules(labels="argmax", beta=0.2), MultiClass(), s, y)
        assert out.tolist() == [[0, 0, 1], [0, 1, 0]]
        several = torch.tensor([[-0.1, -0.3, 0.1, 0.3]]).double() / 16
        kept = torch.tensor([[1.0, 1.0, 0.0, 0.0]]).double()
        out = drawn(Rules(labels="argmax", beta=0.2), MultiLabel(), several, kept)
        assert out.tolist() == [[1, 0, 0, 1]]

    @pytest.mark.parametrize("task", [MultiClass(), MultiLabel()])
    @pytest.mark.parametrize("labels", ["argmax", "prox", "gumbel"])
    def test_scale_divides_scores_by_their_size(self, labels: Any, task: Task) -> None:
        y, s = one_hot(torch.arange(5) % LABELS), 7 * random(5, LABELS, seed=6)
        sizes = {"std": s.flatten().std(), "max": s.abs().max(), "none": torch.tensor(1.0)}
        for scale, size in sizes.items():
            rules = Rules(labels=labels, beta=0.5, tau=0.5, scale=cast("Any", scale))
            by_hand = replace(rules, scale="none")
            # Divided by their own size, scores are decided on as they are: not K^2 times them.
            again = LABELS**2 if isinstance(task, MultiLabel) and scale != "none" else 1
            expected = drawn(by_hand, task, s / size / again, y)
            torch.testing.assert_close(drawn(rules, task, s, y), expected)
            nothing = drawn(rules, task, torch.zeros_like(s), y)
            assert bool(torch.isfinite(nothing).all())

    def test_kept_labels_are_the_very_same(self) -> None:
        y = random(5, LABELS, seed=1).softmax(dim=1)
        assert drawn(Rules(labels="keep"), MultiClass(), random(5, LABELS, seed=6), y) is y


class TestWeights:
    def gains(self, task: Task, rules: Rules, shift: float = 0.0) -> tuple[Any, Tensor, Tensor]:
        y = one_hot(torch.arange(9) % LABELS)
        s, w = random(9, LABELS, seed=6) + shift, random(9, seed=7).abs()
        gain = (s * y).sum(dim=1)
        torch.manual_seed(0)
        return refine(rules, task, Scores(s, gain), y, w, random(9, LABELS, seed=1)), gain, w

    @pytest.mark.parametrize("task", [MultiClass(), MultiLabel()])
    @pytest.mark.parametrize("weights", ["step", "relu", "one"])
    @pytest.mark.parametrize("labels", ["gumbel", "argmax", "keep", "prox"])
    def test_every_rule_keeps_the_total(self, labels: Any, weights: Any, task: Task) -> None:
        for shift in (-0.5, 0.5):
            rules = Rules(labels=labels, weights=weights)
            out, _, w = self.gains(task, rules, shift)
            torch.testing.assert_close(out.w.sum(), w.sum())
            assert float(out.w.min()) >= 0
            ratio = (out.w / (w * out.factor))[out.factor > 0]
            torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))
            raw, _, _ = self.gains(task, replace(rules, renormalise=False), shift)
            torch.testing.assert_close(raw.w, w * raw.factor)

    def test_factors_are_step_relu_and_one_of_the_gain(self) -> None:
        for weights in ("step", "relu", "one"):
            rules = Rules(labels="keep", weights=weights)
            out, gain, _ = self.gains(MultiClass(), rules)
            assert 0 < int((gain > 0).sum()) < 9
            wanted = {
                "step": (gain >= 0).double(),
                "relu": gain.clamp(min=0),
                "one": torch.ones(9, dtype=torch.float64),
            }
            assert torch.equal(out.factor, wanted[weights])
            assert torch.equal(out.gain, gain)

    def test_a_gain_of_zero_counts_in(self) -> None:
        y, zero = one_hot(torch.arange(3)), torch.zeros(3, LABELS).double()
        w = torch.ones(3).double()
        out = refine(Rules(labels="keep"), MultiClass(), Scores(zero, zero[:, 0]), y, w, zero)
        assert out.factor.tolist() == [1, 1, 1]

    @pytest.mark.parametrize("weights", ["step", "relu"])
    def test_where_no_row_gains_weights_stay_as_they_were(self, weights: Any) -> None:
        rules = Rules(labels="keep", weights=weights)
        out, gain, w = self.gains(MultiClass(), rules, -9.0)
        assert float(gain.max()) < 0 and float(out.factor.max()) == 0
        assert torch.equal(out.w, w)
        raw, _, w = self.gains(MultiClass(), replace(rules, renormalise=False), -9.0)
        assert torch.equal(raw.w, torch.zeros_like(w))

    def test_one_keeps_weights_bit_for_bit(self) -> None:
        out, _, w = self.gains(MultiClass(), Rules(labels="gumbel", weights="one"))
        assert torch.equal(out.w, w)

    def test_a_batch_without_weight_stays_without(self) -> None:
        y, s = one_hot(torch.arange(3)), random(3, LABELS, seed=1)
        none = torch.zeros(3).double()
        out = refine(Rules(), MultiClass(), Scores(s, (s * y).sum(dim=1)), y, none, s)
        assert torch.equal(out.w, none)


EDGE = 8
IMAGES = Spec(rows=20, classes=3, shape=(1, EDGE, EDGE))


class Spy(Method):
    """Records the batches that reach it, and turns images to their negative."""

    def __init__(self) -> None:
        super().__init__()
        self.got: list[Batch] = []

    def augment(self, batch: Batch, ctx: Context) -> Batch:
        self.got.append(batch)
        return replace(batch, x=1 - batch.x)


class Draws(RowStream):
    """Meta rows that record what was drawn of them."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.drawn: list[Batch] = []
        self.stratified: list[bool] = []

    def draw(self, n: int, stratified: bool = False) -> Batch:
        self.drawn.append(super().draw(n, stratified))
        self.stratified.append(stratified)
        return self.drawn[-1]


def network(seed: int = 0) -> nn.Module:
    """Three stages with BatchNorm, in float64 and in train mode."""
    torch.manual_seed(seed)
    return models.build("small_cnn(width=0.25)", IMAGES).double().train()


def image_problem(several: bool = False) -> Problem:
    rng = torch.Generator().manual_seed(1)
    labels = torch.arange(32) % 3
    x = torch.rand(32, 1, EDGE, EDGE, generator=rng, dtype=torch.float64) * 0.6
    x[torch.arange(32), :, labels] += 0.4
    y = (torch.rand(32, 3, generator=rng) > 0.5).double() if several else one_hot(labels, 3)
    return Problem(x[:20], y[:20], x[20:], y[20:])


class Desk:
    """A method in front of a network, called as the trainer calls it."""

    def __init__(
        self,
        method: Method,
        model: nn.Module,
        data: Problem | None = None,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        task: Task | None = None,
        **kwargs: Any,
    ) -> None:
        data = data or image_problem()
        self.method, self.model, self.data = method, model, data
        self.task = task or MultiClass()
        rows = rows_from_tensors(data.x, data.y)
        spec = Spec(rows=len(data.x), classes=data.y.shape[1], shape=tuple(data.x.shape[1:]))
        self.meta = Draws(rows_from_tensors(data.meta_x, data.meta_y), 0, "meta", False)
        self.ctx = TrainingContext(
            model,
            optimizer or torch.optim.SGD(model.parameters(), lr=0.1),
            self.task,
            spec,
            RowStream(rows, 0, "train"),
            self.meta,
            batch_size=256,
            epochs=4,
            seed=0,
            device=torch.device("cpu"),
            **kwargs,
        )
        self.ctx.enter("setup")
        method.setup(self.ctx)
        self.begin_epoch()

    def begin_epoch(self, epoch: int = 0) -> None:
        self.ctx.epoch = epoch
        self.ctx.enter("begin_epoch")
        self.method.begin_epoch(self.ctx)

    def batch(self, index: Tensor | None = None, dtype: torch.dtype = torch.float64) -> Batch:
        """Rows of the training split with weights that differ."""
        index = torch.arange(8) if index is None else index
        w = random(len(index), seed=5).abs() + 0.1
        return replace(self.ctx.train.rows(index), w=(w / w.sum()).to(dtype))

    def augment(self, batch: Batch, step: int = 0) -> Batch:
        self.ctx.step = step
        self.ctx.enter("augment")
        return self.method.augment(batch, self.ctx)


def saflex(text: str, upstream: Method | None = None) -> Saflex:
    """Built by name, and set over an upstream that has no name."""
    method = build(text)
    assert isinstance(method, Saflex)
    method.upstream = upstream
    return method


def row_slopes(
    model: nn.Module, x: Tensor, y: Tensor, tangent: Parameters, task: Task
) -> tuple[Tensor, Tensor]:
    """Derivatives along a direction, by backward passes alone: of losses (B,) and logits (B, K)."""
    other = copy.deepcopy(model)
    z = other(x)
    found = []
    for value in (task.losses(z, y), z):
        u = torch.zeros_like(value, requires_grad=True)
        pulled = gradient(value @ u if u.dim() == 1 else (value * u).sum(), other, graph=True)
        total = torch.stack([(pulled[name] * each).sum() for name, each in tangent.items()]).sum()
        found.append(torch.autograd.grad(total, u, retain_graph=True)[0])
    return found[0], found[1]


def secant(model: nn.Module, x: Tensor, tangent: Parameters) -> Tensor:
    """(z(theta + c v / |v|) - z(theta)) |v| / c with c = 0.001."""
    norm = torch.cat([each.flatten() for each in tangent.values()]).norm()
    ends = []
    for by in (0.001 / norm, 0.0):
        other = copy.deepcopy(model)
        with torch.no_grad():
            for name, each in other.named_parameters():
                if name in tangent:
                    each.add_(by * tangent[name])
            ends.append(other(x))
    return (ends[0] - ends[1]) * norm / 0.001


GAINS = "labels=keep, weights=relu, renormalise=false, meta_batch=full"
"""Weights are then the incoming ones times the gains where these are positive."""


class TestAugment:
    @pytest.mark.parametrize("several", [False, True])
    @pytest.mark.parametrize("stages", [None, 0, 1, 2])
    @pytest.mark.parametrize("precondition", [False, True])
    @pytest.mark.parametrize("derivative", ["dual", "difference"])
    def test_weights_are_the_gains_of_an_independent_account(
        self, derivative: str, precondition: bool, stages: int | None, several: bool
    ) -> None:
        """Meta gradient, Adam's diagonal, stages and BatchNorm over clean rows too, all by hand."""
        task: Task = MultiLabel() if several else MultiClass()
        data, model = image_problem(several), network()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.8, 0.9))
        for _ in range(3):
            optimizer.zero_grad()
            mean_loss(task, model(data.x[8:]), data.y[8:]).backward()
            optimizer.step()
        spy = Spy()
        text = f"saflex({GAINS}, clean_fraction=0.25, derivative={derivative}"
        text += f", precondition={str(precondition).lower()}, stages={stages})".lower()
        desk = Desk(saflex(text, spy), model, data, optimizer=optimizer, task=task)
        batch = desk.batch()
        tangent = meta_gradient(model, data, task)
        if precondition:
            for name, each in model.named_parameters():
                square = optimizer.state[each]["exp_avg_sq"] / (1 - 0.9**3)
                tangent[name] = tangent[name] / (square.sqrt() + 1e-8)
        if stages is not None:
            ends = tuple(f"trunk.stages.{3 - back}." for back in range(1, stages + 1))
            tangent = {n: each for n, each in tangent.items() if n.startswith(("head.", *ends))}
        x = torch.cat([1 - batch.x[:6], batch.x[6:]])
        gain, _ = row_slopes(model, x, batch.y, tangent, task)
        if derivative == "difference":
            z = copy.deepcopy(model)(x).detach()
            p = z.softmax(dim=1) if not several else z.sigmoid() / 3
            part = p - batch.y / (3 if several else 1)
            gain = (part * secant(model, x, tangent)).sum(dim=1)
        out = desk.augment(batch)
        assert torch.equal(out.x, x)
        wanted = torch.cat([batch.w[:6] * gain[:6].clamp(min=0), batch.w[6:]])
        assert 0 < int((gain[:6] > 0).sum()) < 6
        torch.testing.assert_close(out.w, wanted, rtol=1e-6, atol=1e-9)
        assert torch.equal(out.y, batch.y)

    @pytest.mark.parametrize("derivative", ["dual", "difference"])
    def test_argmax_is_minus_the_centred_slope_of_the_logits(self, derivative: str) -> None:
        model, data = network(), image_problem()
        desk = Desk(
            saflex(f"saflex(labels=argmax, meta_batch=full, clean_fraction=0, "
                   f"derivative={derivative})"), model, data,
        )  # fmt: skip
        batch = desk.batch()
        _, slope = row_slopes(
            model, batch.x, batch.y, meta_gradient(model, data, desk.task), desk.task
        )
        assert torch.equal(desk.augment(batch).y.argmax(dim=1), slope.argmin(dim=1))

    def test_frozen_parameters_take_no_part(self) -> None:
        model, data = network(), image_problem()
        first = next(iter(model.named_parameters()))[0]
        dict(model.named_parameters())[first].requires_grad_(False)
        desk = Desk(saflex(f"saflex({GAINS}, clean_fraction=0)"), model, data)
        copied = copy.deepcopy(model)
        for each in copied.parameters():
            each.requires_grad_(True)
        tangent = meta_gradient(copied, data, desk.task)
        del tangent[first]
        batch = desk.batch()
        gain, _ = row_slopes(copied, batch.x, batch.y, tangent, desk.task)
        torch.testing.assert_close(desk.augment(batch).w, batch.w * gain.clamp(min=0))

    def test_a_large_meta_batch_goes_through_in_parts(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Without BatchNorm the parts add up to the whole."""
        found = []
        for rows in (512, 7):
            monkeypatch.setattr("methods.saflex.CHUNK", rows)
            desk = Desk(saflex(f"saflex({GAINS}, clean_fraction=0)"), mlp(), problem(0))
            found.append(desk.augment(desk.batch()).w)
        torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-12)

    @pytest.mark.parametrize("refresh", [1, 3])
    @pytest.mark.parametrize("epochs", [1, 2])
    def test_a_meta_gradient_lasts_for_refresh_steps_of_an_epoch(
        self, refresh: int, epochs: int
    ) -> None:
        model, data = network(), image_problem()
        method = saflex(f"saflex({GAINS}, clean_fraction=0, refresh={refresh})")
        desk, step = Desk(method, model, data), 0
        for epoch in range(epochs):
            desk.begin_epoch(epoch)
            tangent: Parameters = {}
            for place in range(5):
                if place % refresh == 0:
                    tangent = meta_gradient(model, data, desk.task)
                batch = desk.batch(torch.arange(8) + place)
                gain, _ = row_slopes(model, batch.x, batch.y, tangent, desk.task)
                out = desk.augment(batch, step)
                torch.testing.assert_close(out.w, batch.w * gain.clamp(min=0))
                with torch.no_grad():
                    for each in model.parameters():
                        each.add_(random(*each.shape, seed=step), alpha=0.05)
                step += 1

    @pytest.mark.parametrize(
        ("meta_batch", "rows"), [("0.25", 2), ("1", 8), ("1.2", 10), ("0.01", 2), ("full", 12)]
    )
    @pytest.mark.parametrize("stratified", [False, True])
    def test_a_meta_batch_counts_in_training_batches(
        self, meta_batch: str, rows: int, stratified: bool
    ) -> None:
        text = f"saflex(meta_batch={meta_batch}, stratified={str(stratified).lower()})"
        desk = Desk(saflex(text), network())
        desk.augment(desk.batch())
        first = desk.meta.drawn[0]
        assert len(first.x) == rows
        if meta_batch != "full":
            assert desk.meta.stratified[0] == stratified
            counts = first.y.sum(dim=0)
            assert not stratified or float(counts.max() - counts.min()) <= 1

    def test_the_training_batch_decides_not_the_rows_that_pass_the_upstream(self) -> None:
        desk = Desk(saflex("saflex(clean_fraction=0.5)"), network())
        desk.augment(desk.batch())
        assert len(desk.meta.drawn[0].x) == 8

    def test_presets_are_what_their_names_stand_for(self) -> None:
        wanted = {
            "published": {},
            "stable": dict(Saflex.presets["stable"]),
            "fast": dict(Saflex.presets["stable"]) | {"stages": 1},
        }
        assert list(Saflex.presets) == list(wanted)
        for preset, arguments in wanted.items():
            one, other = saflex(f"saflex(preset={preset})"), Saflex(**arguments)
            assert one.rules == other.rules
            for name in ("clean_fraction", "meta_batch", "stratified", "refresh", "precondition",
                         "derivative", "stages"):  # fmt: skip
                assert getattr(one, name) == getattr(other, name)
        bare = saflex("saflex")
        assert bare.rules == Rules(labels="gumbel", weights="step", beta=0, tau=0.01, scale="none",
                                   renormalise=True)  # fmt: skip
        assert (bare.clean_fraction, bare.meta_batch, bare.refresh) == (0.5, 1.0, 1)
        assert (bare.derivative, bare.precondition, bare.stages) == ("dual", False, None)
        stable = saflex("saflex(preset=stable)")
        assert stable.rules == Rules(labels="prox", eps=0.3, eta=0.5, scale="std", weights="step")
        assert (stable.clean_fraction, stable.meta_batch, stable.refresh) == (0, 2.0, 4)
        assert (stable.stratified, stable.precondition) == (True, True)
        assert (stable.derivative, stable.stages) == ("difference", None)


class TestLookAhead:
    def test_l2rw_is_the_gradient_by_the_weights_after_a_virtual_step(self) -> None:
        """Ren et al. 2018, Algorithm 1: relu(-d meta loss / d eps) at eps = 0, normalised."""
        for seed in range(3):
            model, data = network(seed), image_problem()
            desk = Desk(build("l2rw(meta_batch=full)"), model, data)
            batch = desk.batch()
            w = torch.full((8,), 1 / 8, dtype=torch.float64)
            wrong = torch.cat([batch.y[:4].roll(1, dims=1), batch.y[4:]])
            batch = replace(batch, w=w, y=wrong)
            other = copy.deepcopy(model)
            named = dict(other.named_parameters())
            eps = torch.zeros(8, dtype=torch.float64, requires_grad=True)
            losses = F.cross_entropy(other(batch.x), batch.y.argmax(dim=1), reduction="none")
            virtual = gradient(eps @ losses, other, graph=True)
            moved = {name: each - 0.1 * virtual[name] for name, each in named.items()}
            logits = functional_call(other, moved, (data.meta_x,))
            ahead = F.cross_entropy(logits, data.meta_y.argmax(dim=1))
            (slope,) = torch.autograd.grad(ahead, eps)
            wanted = (-slope).clamp(min=0)
            assert 0 < int((wanted > 0).sum()) < 8
            out = desk.augment(batch)
            torch.testing.assert_close(out.w, wanted / wanted.sum(), rtol=1e-8, atol=1e-14)
            assert torch.equal(out.y, batch.y)


class TestCleanRows:
    @pytest.mark.parametrize("labels", ["gumbel", "argmax", "prox"])
    @pytest.mark.parametrize("weights", ["step", "relu"])
    @pytest.mark.parametrize("derivative", ["dual", "difference"])
    def test_pass_by_the_upstream_bit_for_bit(
        self, labels: str, weights: str, derivative: str
    ) -> None:
        spy = Spy()
        text = f"saflex(labels={labels}, weights={weights}, derivative={derivative})"
        desk = Desk(saflex(text, spy), network())
        batch = desk.batch()
        copied = copy.deepcopy(batch)
        out = desk.augment(batch)
        (got,) = spy.got
        for name in ("x", "y", "w", "index"):
            assert torch.equal(getattr(batch, name), getattr(copied, name))
            assert torch.equal(getattr(got, name), getattr(batch, name)[:4])
            assert torch.equal(getattr(out, name)[4:], getattr(batch, name)[4:])
        assert torch.equal(out.x[:4], 1 - batch.x[:4])
        assert not torch.equal(out.y[:4], batch.y[:4])
        torch.testing.assert_close(out.w[:4].sum(), batch.w[:4].sum())
        learned = desk.method.learned()["seen"]
        assert learned.tolist() == [1] * 4 + [0] * 16

    @pytest.mark.parametrize(
        ("clean_fraction", "rows", "first"),
        [(0, 8, 8), (0.5, 8, 4), (0.35, 8, 5), (0.99, 8, 1), (0.5, 2, 1), (0.9, 1, 1)],
    )
    def test_their_share_is_rounded_and_one_row_is_scored_at_least(
        self, clean_fraction: float, rows: int, first: int
    ) -> None:
        spy = Spy()
        desk = Desk(saflex(f"saflex(clean_fraction={clean_fraction})", spy), network())
        out = desk.augment(desk.batch(torch.arange(rows)))
        assert len(out.x) == rows
        assert len(spy.got[0].x) == first == desk.method.weighted(rows)

    def test_rows_that_an_upstream_adds_are_scored_too(self) -> None:
        class Twice(Method):
            def augment(self, batch: Batch, ctx: Context) -> Batch:
                parts = {n: torch.cat([getattr(batch, n)] * 2) for n in ("x", "y", "index")}
                return Batch(**parts, w=torch.cat([batch.w, batch.w]) / 2)

        desk = Desk(saflex("saflex(labels=argmax, clean_fraction=0.5)", Twice()), network())
        batch = desk.batch()
        out = desk.augment(batch)
        assert len(out.x) == 12
        assert torch.equal(out.x[8:], batch.x[4:]) and torch.equal(out.w[8:], batch.w[4:])
        torch.testing.assert_close(out.w.sum(), batch.w.sum())

    @pytest.mark.parametrize("upstream", ["none", "mixup", "soft_augmentation", "balanced", "crop"])
    @pytest.mark.parametrize("clean_fraction", [0, 0.5])
    def test_the_total_weight_stays_over_every_upstream(
        self, upstream: str, clean_fraction: float
    ) -> None:
        method = build(f"saflex(upstream={upstream}, clean_fraction={clean_fraction})")
        desk = Desk(method, network().float(), Problem(*(e.float() for e in image_problem())))
        out = desk.augment(desk.batch(dtype=torch.float32))
        assert float(out.w.sum()) == pytest.approx(1, rel=1e-5)


class Dropping(nn.Module):
    """Two hidden layers with dropout, in float64."""

    def __init__(self, p: float = 0.4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.p = mlp(), p

    def forward(self, x: Tensor) -> Tensor:
        return self.body[4](F.dropout(self.body[:4](x), self.p, self.training))


class TestDropout:
    @pytest.mark.parametrize("derivative", ["dual", "difference"])
    def test_slopes_are_of_the_masks_that_the_step_trains_with(self, derivative: str) -> None:
        """Meta gradient and training forward are drawn by hand where the trainer draws them."""
        model, data = Dropping(), problem(0)
        text = f"saflex({GAINS}, clean_fraction=0, derivative={derivative})"
        desk = Desk(saflex(text), model, data)
        desk.ctx.enter("augment")
        meta = desk.meta.draw(40)
        tangent = gradient(mean_loss(desk.task, model(meta.x), meta.y), model)
        batch = desk.batch()
        with desk.ctx.replay():
            losses = desk.task.losses(model(batch.x), batch.y)
        u = torch.zeros(8, dtype=torch.float64, requires_grad=True)
        pulled = gradient(losses @ u, model, graph=True)
        total = torch.stack([(pulled[name] * tangent[name]).sum() for name in tangent]).sum()
        gain = torch.autograd.grad(total, u)[0]
        out = desk.augment(batch)
        near = 1e-9 if derivative == "dual" else 0.03
        torch.testing.assert_close(
            out.w, batch.w * gain.clamp(min=0), rtol=near, atol=near * float(gain.abs().max()) / 8
        )
        if derivative == "difference":
            assert out.logits is not None
            with desk.ctx.replay():
                torch.testing.assert_close(out.logits, model(batch.x))

    def test_difference_is_dual_to_the_error_of_its_step(self) -> None:
        found = []
        for derivative in ("dual", "difference"):
            text = f"saflex({GAINS}, clean_fraction=0.25, derivative={derivative})"
            desk = Desk(saflex(text), Dropping(), problem(0))
            found.append([desk.augment(desk.batch(), step).w for step in range(4)])
        one, other = (torch.stack(each) for each in found)
        assert float((one - other).norm()) < 0.02 * float(one.norm())
        assert float((one[0] - one[1]).norm()) > 0.02 * float(one[0].norm())

    def test_replay_is_where_the_forward_begins_and_leaves_no_trace(self) -> None:
        model = Dropping()
        desk = Desk(saflex("saflex"), model, problem(0))
        desk.ctx.enter("augment")
        torch.rand(3)
        before = torch.get_rng_state()
        with desk.ctx.replay():
            again = model(desk.data.x)
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(desk.ctx.forward(desk.data.x), again)
        with pytest.raises(KeyError), desk.ctx.replay():
            raise KeyError
        assert not torch.equal(model(desk.data.x), again)


def fitted(
    method: Method, model: Callable[[Spec], nn.Module] | None = None, **training: Any
) -> Fitted:
    settings = Training(**{"epochs": 2, "batch_size": BATCH, **training})
    run = Run(benchmark="test", data="", model="small_cnn(width=0.25)", method="own",
              training=settings)  # fmt: skip
    return fit(run, splits(Case(1), "meta" in method.requires()), method, model=model)


def lines(done: Fitted) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.state.metric_lines]


def numbers(done: Fitted) -> list[dict[str, Any]]:
    """The lines but for what is counted and logged, which may differ."""
    return [
        {name: value for name, value in line.items() if name not in ("rows", "log")}
        for line in lines(done)
    ]


@cache
def alone(upstream: str) -> Fitted:
    return fitted(build(upstream))


class Dropped(nn.Module):
    """Convolution, BatchNorm and dropout."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(spec.shape[0], 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()),
            *(nn.Dropout(0.3), nn.Linear(144, spec.classes)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class TestTrainer:
    @pytest.mark.parametrize("stages", ["none", "0", "1"])
    @pytest.mark.parametrize("refresh", [1, 4])
    @pytest.mark.parametrize("derivative", ["dual", "difference"])
    def test_with_weights_one_and_labels_kept_a_run_is_the_upstreams(
        self, derivative: str, refresh: int, stages: str
    ) -> None:
        """Every line and every logit, bit for bit."""
        plain = alone("mixup")
        same = fitted(
            build(
                f"saflex(upstream=mixup, weights=one, labels=keep, clean_fraction=0, "
                f"derivative={derivative}, refresh={refresh}, stages={stages})"
            )
        )
        assert numbers(same) == numbers(plain)
        for name, array in plain.predictions.items():
            assert np.array_equal(same.predictions[name], array), name

    @pytest.mark.parametrize("derivative", ["dual", "difference"])
    def test_also_where_dropout_draws_masks(self, derivative: str) -> None:
        text = f"saflex(weights=one, labels=keep, clean_fraction=0, derivative={derivative})"
        one, other = fitted(build("none"), Dropped), fitted(build(text), Dropped)
        assert numbers(one) == numbers(other)

    @pytest.mark.parametrize("clean_fraction", [0, 0.5])
    @pytest.mark.parametrize("stages", ["none", "0", "1"])
    @pytest.mark.parametrize("derivative", ["dual", "difference"])
    def test_buffers_move_once_a_step(
        self, derivative: str, stages: str, clean_fraction: float
    ) -> None:
        """As by the plain forward of the same rows, also where this step looks at itself."""
        made, found = splits(Case(1), True), []
        text = f"saflex(derivative={derivative}, stages={stages}, clean_fraction={clean_fraction})"
        for name in ("none", text):
            torch.manual_seed(0)
            model = models.build("small_cnn(width=0.25)", made.spec)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
            method = build(name)
            ctx = TrainingContext.of_splits(model, optimizer, MultiClass(), made, epochs=1, seed=0)
            model.train()
            ctx.enter("setup")
            method.setup(ctx)
            ctx.enter("begin_epoch")
            method.begin_epoch(ctx)
            for step in range(3):
                trainer.train_step(learner_of(method), ctx, made.train, torch.arange(8) + 8 * step)
                ctx.step += 1
            found.append({key: each.clone() for key, each in model.named_buffers()})
        assert found[0].keys() == found[1].keys()
        for key, each in found[0].items():
            assert torch.equal(found[1][key], each), key
        moved = [int(each) for key, each in found[1].items() if "num_batches" in key]
        assert moved == [3, 3, 3]

    @pytest.mark.parametrize(
        ("arguments", "per_row", "meta"),
        [
            ("derivative=dual", 2, 36),
            ("derivative=difference", 1, 36),
            ("derivative=difference, clean_fraction=0", 1, 36),
            ("derivative=dual, clean_fraction=0.75", 2, 36),
            ("derivative=difference, labels=keep, weights=relu, scale=max", 1, 36),
            ("derivative=dual, meta_batch=0.25", 2, 10),
            ("derivative=difference, meta_batch=2", 1, 4 * 16 + 8),
            ("derivative=difference, meta_batch=full", 1, 5 * META_ROWS),
            ("derivative=difference, meta_batch=full, refresh=2", 1, 3 * META_ROWS),
            ("derivative=difference, refresh=4, precondition=true", 1, 8 + 4),
            ("derivative=dual, refresh=4, stratified=true", 2, 8 + 4),
            ("derivative=difference, refresh=5", 1, 8),
        ],
    )
    def test_passes_are_those_of_the_step_the_slope_and_the_meta_rows(
        self, arguments: str, per_row: int, meta: int
    ) -> None:
        """Of 36 rows in batches of 8, 8, 8, 8 and 4; a tangent counts as a backward pass."""
        forward, backward = (1, 1) if per_row == 1 else (2, 2)
        for line in lines(fitted(build(f"saflex(upstream=flip, {arguments})"))):
            counted = line["rows"]
            assert counted["drawn"] == counted["trained"] == ROWS
            extra = 1 if per_row == 1 else 0  # the shifted forward
            assert counted["forward"] == ROWS * (forward + extra) + meta
            assert counted["backward"] == ROWS * backward + meta

    def test_a_plain_run_passes_once_each_way(self) -> None:
        for line in lines(alone("mixup")):
            assert line["rows"]["forward"] == line["rows"]["backward"] == ROWS

    @pytest.mark.parametrize("stages", [0, 1])
    @pytest.mark.parametrize("derivative", ["dual", "difference"])
    def test_the_last_stages_alone_cost_no_further_pass_of_the_trunk(
        self, derivative: str, stages: int
    ) -> None:
        text = f"saflex(derivative={derivative}, stages={stages}, refresh=5)"
        for line in lines(fitted(build(text))):
            counted = line["rows"]
            assert counted["forward"] == ROWS + 8
            # Where no stage takes part, the meta gradient does not enter the trunk.
            assert counted["backward"] == ROWS + (8 if stages else 0)

    def test_clean_rows_change_no_count(self) -> None:
        counts = [
            lines(fitted(build(f"saflex(clean_fraction={each})")))[0]["rows"]
            for each in (0, 0.3, 0.9)
        ]
        assert counts[0] == counts[1] == counts[2]

    @pytest.mark.parametrize("preset", ["stable", "fast"])
    def test_presets_cost_what_they_claim(self, preset: str) -> None:
        for line in lines(fitted(build(f"saflex(preset={preset}, upstream=flip)"))):
            counted = line["rows"]
            slope = ROWS if preset == "stable" else 0
            assert counted["forward"] == ROWS + slope + 16 + 8
            assert counted["backward"] == ROWS + 16 + 8


class TestStages:
    def test_the_tail_is_the_network_from_its_stages_on(self) -> None:
        model = cast("Any", network())
        x = image_problem().x
        features = copy.deepcopy(model).features(x)
        for stages in (0, 1, 2):
            tail = Tail(copy.deepcopy(model), stages)
            torch.testing.assert_close(tail(features), copy.deepcopy(model)(x))
            wanted = [f"trunk.stages.{2 - back}." for back in range(stages)]
            assert {name for name, _ in model.named_parameters()
                    if name.startswith(("head.", *wanted))} == set(tail.own())  # fmt: skip

    def test_what_lies_behind_the_trunk_belongs_to_every_tail(self) -> None:
        model = cast("Any", models.build("wrn28_10(width=0.1)", IMAGES))
        own = Tail(model, 0).own()
        assert own == [n for n, _ in model.named_parameters() if not n.startswith("trunk.")]
        assert any(name.startswith("last.") for name in own)

    @pytest.mark.parametrize("stages", [3, 4])
    def test_the_whole_network_is_refused(self, stages: int) -> None:
        with pytest.raises(ValueError, match=f"fewer than the 3 of the network, got {stages}"):
            Desk(saflex(f"saflex(stages={stages})"), network())

    def test_they_need_a_network_that_can_be_opened(self) -> None:
        assert build("saflex(stages=0)").requires() == {"meta", "features"}
        assert build("saflex").requires() == {"meta"}


KEYS = {
    "labels_kept",
    "weights_above_0",
    "label_entropy",
    "gain",
    "meta_change_by_scores",
    "preconditioned",
    "dual_unsupported",
    "difference_apart",
    "meta_gradient_cosine",
    "meta_change_predicted",
    "meta_change",
}


class TestAudit:
    @pytest.mark.parametrize("arguments", ["labels=gumbel", "preset=stable", "preset=fast"])
    @pytest.mark.parametrize("case", [Case(1), Case(1, "multi-label")], ids=str)
    def test_every_epoch_has_every_key(self, arguments: str, case: Case) -> None:
        settings = Training(epochs=2, batch_size=BATCH)
        run = Run(benchmark="test", data="", model="small_cnn(width=0.25)", method="own",
                  training=settings)  # fmt: skip
        done = fit(run, splits(case, True), build(f"saflex({arguments})"))
        for line in lines(done):
            assert set(line["log"]) == KEYS
            assert all(np.isfinite(value) for value in line["log"].values())
            assert 0 <= line["log"]["labels_kept"] <= 1
            assert 0 <= line["log"]["weights_above_0"] <= 1
            assert -1 <= line["log"]["meta_gradient_cosine"] <= 1
            assert line["log"]["dual_unsupported"] == line["log"]["difference_apart"] == 0

    @pytest.mark.parametrize("model", [None, Dropped])
    @pytest.mark.parametrize("derivative", ["dual", "difference"])
    def test_it_changes_nothing_and_is_not_charged(
        self, derivative: str, model: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found = []
        text = f"saflex(upstream=mixup, labels=gumbel, derivative={derivative})"
        for every in (1, 2, 10**9, 0):
            monkeypatch.setattr(Saflex, "audit_every", every or 10**9)
            if not every:
                monkeypatch.setattr(Saflex, "_audit", lambda *arguments: None)
            done = fitted(build(text), model)
            assert bool(lines(done)[0]["log"]) == (every > 0)
            found.append(done)
        for other in found[1:]:
            assert numbers(other) == numbers(found[0])
            assert [line["rows"] for line in lines(other)] == [
                line["rows"] for line in lines(found[0])
            ]
            for name, array in found[0].predictions.items():
                assert np.array_equal(other.predictions[name], array), name

    @pytest.mark.parametrize("derivative", ["dual", "difference"])
    def test_what_comes_after_it_in_a_step_draws_as_without(
        self, derivative: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found = []
        for audited in (True, False):
            if not audited:
                monkeypatch.setattr(Saflex, "_audit", lambda *arguments: None)
            desk = Desk(saflex(f"saflex(derivative={derivative})"), Dropping(), problem(0))
            for step in range(2):  # it looks at the first step, and back on it in the second
                desk.augment(desk.batch(), step)
                found.append(torch.rand(3))
        assert torch.equal(found[0], found[2])
        assert torch.equal(found[1], found[3])

    def test_numbers_are_those_of_the_batch(self) -> None:
        """By hand from the batch that comes out; of the gain, from an independent account."""
        model, data = network(), image_problem()
        text = "saflex(meta_batch=full, clean_fraction=0.25, labels=prox, eta=2)"
        desk = Desk(saflex(text), model, data)
        batch = desk.batch()
        tangent = meta_gradient(model, data, desk.task)
        out = desk.augment(batch)
        y, old = out.y[:6], batch.y[:6]
        _, slope = row_slopes(model, batch.x, batch.y, tangent, desk.task)
        z = copy.deepcopy(model)(batch.x).detach()
        s = -(slope - (z.softmax(dim=1) * slope).sum(dim=1, keepdim=True))[:6]
        told = desk.ctx.take_log()
        kept = (y.argmax(dim=1) == old.argmax(dim=1)).double().mean()
        assert told["labels_kept"] == pytest.approx(float(kept))
        assert told["weights_above_0"] == pytest.approx(float((out.w[:6] > 0).double().mean()))
        entropy = -(y * y.log()).sum(dim=1).mean()
        assert told["label_entropy"] == pytest.approx(float(entropy), rel=1e-6)
        assert told["gain"] == pytest.approx(float((s * y).sum(dim=1).mean()), rel=1e-6)

    def test_the_cosine_is_of_two_halves_of_meta_rows(self) -> None:
        model, data = mlp(), problem(0)
        desk = Desk(saflex("saflex(meta_batch=full)"), model, data)
        desk.augment(desk.batch())
        meta = desk.meta.drawn[1]
        halves = []
        for start in (0, 1):
            loss = mean_loss(desk.task, model(meta.x[start::2]), meta.y[start::2])
            halves.append(torch.cat([each.flatten() for each in gradient(loss, model).values()]))
        wanted = torch.cosine_similarity(*halves, dim=0)
        told = desk.ctx.take_log()["meta_gradient_cosine"]
        assert told == pytest.approx(float(wanted), rel=1e-6)

    @pytest.mark.parametrize("derivative", ["dual", "difference"])
    def test_foreseen_and_true_change_of_the_meta_loss(self, derivative: str) -> None:
        """Of a small step both are the exact change; of a large one they part."""
        for rate, near in ((1e-5, 1e-3), (0.3, None)):
            model, data = network(), image_problem()
            optimizer = torch.optim.SGD(model.parameters(), lr=rate)
            text = f"saflex(meta_batch=full, derivative={derivative})"
            desk = Desk(saflex(text), model, data, optimizer=optimizer)
            before = copy.deepcopy(model)
            out = desk.augment(desk.batch())
            logits = desk.ctx.forward(out.x) if out.logits is None else out.logits
            (out.w @ desk.task.losses(logits, out.y)).backward()
            optimizer.step()
            desk.ctx.take_log()
            with torch.no_grad():
                ends = [
                    float(mean_loss(desk.task, copy.deepcopy(each)(data.meta_x), data.meta_y))
                    for each in (model, before)
                ]
            g = meta_gradient(before, data, desk.task)
            named = dict(before.named_parameters())
            predicted = sum(
                float((g[name] * (each.detach() - named[name].detach())).sum())
                for name, each in model.named_parameters()
            )
            optimizer.zero_grad()
            desk.augment(desk.batch(), step=1)
            told = desk.ctx.take_log()
            assert told["meta_change"] == pytest.approx(ends[0] - ends[1], rel=1e-6)
            assert told["meta_change_predicted"] == pytest.approx(predicted, rel=1e-6)
            if near is not None:
                assert told["meta_change"] == pytest.approx(predicted, rel=near)
            else:
                assert told["meta_change"] != pytest.approx(predicted, rel=0.05)

    def test_a_step_is_looked_back_on_once(self) -> None:
        desk = Desk(saflex("saflex"), network())
        told = []
        for step in range(4):
            desk.augment(desk.batch(), step)
            told.append(set(desk.ctx.take_log()))
        assert told == [KEYS - {"meta_change", "meta_change_predicted"},
                        {"meta_change", "meta_change_predicted"}, set(), set()]  # fmt: skip

    def test_the_scores_foresee_a_step_of_sgd(self) -> None:
        """Of a whole batch, all meta rows and a small rate: how far the meta loss falls."""
        desk = Desk(saflex("saflex(meta_batch=full, clean_fraction=0, labels=argmax)"), network())
        rate = 1e-5
        desk.ctx.optimizer = torch.optim.SGD(desk.ctx.model.parameters(), lr=rate)
        out = desk.augment(desk.batch())
        foreseen = desk.ctx.take_log()["meta_change_by_scores"]
        logits = desk.ctx.forward(out.x) if out.logits is None else out.logits
        (out.w @ desk.method.losses(logits, out, desk.ctx)).backward()
        desk.ctx.optimizer.step()
        desk.augment(desk.batch(), step=1)
        assert desk.ctx.take_log()["meta_change"] == pytest.approx(foreseen, rel=1e-2)

    def test_dropout_draws_the_same_masks_before_and_after(self) -> None:
        """Else the change of the meta loss would be that of the masks: here nothing moves."""
        desk = Desk(saflex("saflex(meta_batch=full)"), Dropping(), problem(0))
        desk.augment(desk.batch())
        desk.ctx.take_log()
        desk.augment(desk.batch(), step=1)
        assert desk.ctx.take_log() == {"meta_change": 0, "meta_change_predicted": 0}


class Identity(torch.autograd.Function):
    """Its input, without a forward-mode derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        return grad_outputs[0]


class WithoutForwardMode(nn.Module):
    """BatchNorm and dropout, then something that forward-mode differentiation does not know."""

    def __init__(self, attention: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.head = nn.BatchNorm2d(1), nn.Linear(EDGE, 3)
        self.attention = attention
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.norm(x), 0.2, self.training)
        if self.attention:
            x = F.scaled_dot_product_attention(x, x, x)
        else:
            x = cast("Tensor", Identity.apply(x))
        return self.head(x.mean(dim=(1, 2)))


class Wrapped(nn.Module):
    """What ``torch.compile`` would make of a network, but for the speed."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class TestFallbacks:
    @pytest.mark.parametrize("attention", [False, True])
    def test_without_forward_mode_dual_becomes_a_difference(self, attention: bool) -> None:
        outs, logs = [], []
        for derivative in ("dual", "difference"):
            text = f"saflex({GAINS}, clean_fraction=0.25, derivative={derivative})"
            desk = Desk(saflex(text), WithoutForwardMode(attention))
            outs.append([desk.augment(desk.batch(), step) for step in range(3)])
            logs.append(desk.ctx.take_log())
        for one, other in zip(*outs, strict=True):
            assert torch.equal(one.w, other.w)
            assert one.logits is not None and other.logits is not None
            assert torch.equal(one.logits, other.logits)
        assert [each["dual_unsupported"] for each in logs] == [1, 0]
        weights = torch.stack([one.w for one in outs[0]])
        assert float(weights.max()) > 0

    def test_under_bfloat16_the_slope_is_taken_in_float32_beside_the_forward(self) -> None:
        """The same weights as a float32 run has, and no logits to hand over."""
        data = Problem(*(each.float() for each in image_problem()))
        for derivative in ("dual", "difference"):
            found = []
            for bfloat16 in (False, True):
                text = f"saflex({GAINS}, clean_fraction=0.25, derivative={derivative})"
                desk = Desk(
                    saflex(text),
                    network().float(),
                    data,
                    precision="bfloat16" if bfloat16 else "float32",
                )
                out = desk.augment(desk.batch(dtype=torch.float32))
                assert (out.logits is None) == (bfloat16 or derivative == "dual")
                found.append(out.w)
                assert desk.ctx.take_log()["difference_apart"] == float(bfloat16)
                if out.logits is None:
                    desk.ctx.forward(out.x)  # it was not asked for before
            torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-4)
            assert float(found[0][:6].max()) > 0

    @pytest.mark.parametrize("stages", ["none", "0", "1"])
    @pytest.mark.parametrize("derivative", ["dual", "difference"])
    def test_a_compiled_network_is_not_asked_for_its_forward(
        self, derivative: str, stages: str
    ) -> None:
        found = []
        for compiled in (False, True):
            model = network()
            text = f"saflex({GAINS}, clean_fraction=0.25, derivative={derivative}, stages={stages})"
            desk = Desk(saflex(text), model, compiled=Wrapped(model) if compiled else None)
            before = {name: each.clone() for name, each in model.named_buffers()}
            out = desk.augment(desk.batch())
            if compiled:
                assert out.logits is None
                for name, each in model.named_buffers():
                    assert torch.equal(each, before[name])
                desk.ctx.forward(out.x)
            found.append(out.w)
        torch.testing.assert_close(found[1], found[0])

    @pytest.mark.parametrize("stages", ["0", "1"])
    def test_its_early_stages_run_with_the_masks_of_its_forward(self, stages: str) -> None:
        """Dropout in a stage before the last ones: as in a network that is not compiled."""
        found = []
        for compiled in (False, True):
            model = cast("Any", network())
            model.trunk.stages[1].append(nn.Dropout(0.3))
            text = f"saflex({GAINS}, clean_fraction=0.25, stages={stages})"
            desk = Desk(saflex(text), model, compiled=Wrapped(model) if compiled else None)
            found.append([desk.augment(desk.batch(), step).w for step in range(2)])
        torch.testing.assert_close(found[1], found[0])
        assert not torch.allclose(found[0][0], found[0][1])

    @pytest.mark.parametrize("derivative", ["dual", "difference"])
    def test_a_bfloat16_run_says_so_and_pays_for_it(self, derivative: str) -> None:
        text = f"saflex(derivative={derivative}, refresh=5)"
        done = fitted(build(text), precision="bfloat16")
        for line in lines(done):
            assert line["log"]["difference_apart"] == 1
            assert line["rows"]["forward"] == ROWS * (2 if derivative == "dual" else 3) + 8
            assert np.isfinite(line["train_loss"])


class TestLearned:
    def test_means_are_those_of_an_account_by_hand(self) -> None:
        desk = Desk(
            saflex("saflex(labels=prox, eta=3, weights=relu, clean_fraction=0.25)"), network()
        )
        seen = np.zeros(20)
        weight, label = np.zeros(20), np.zeros((20, 3))
        for step in range(6):
            index = torch.randperm(20, generator=torch.Generator().manual_seed(step))[:8]
            index[1] = index[0]  # a row that is drawn twice
            batch = desk.batch(index)
            known = index.clone()
            known[2:4] = -1
            out = desk.augment(replace(batch, index=known), step)
            for place in (0, 1, 4, 5):
                row = int(index[place])
                seen[row] += 1
                weight[row] += float(out.w[place] / batch.w[place])
                label[row] += out.y[place].numpy()
        learned = {name: each.numpy() for name, each in desk.method.learned().items()}
        assert set(learned) == {"weight", "label", "seen"}
        np.testing.assert_array_equal(learned["seen"], seen)
        some = np.maximum(seen, 1)
        np.testing.assert_allclose(learned["weight"], weight / some, rtol=1e-5)
        np.testing.assert_allclose(learned["label"], label / some[:, None], rtol=1e-5, atol=1e-7)
        assert seen.min() == 0 and seen.max() > 1

    def test_rows_that_stay_as_they_are_have_weight_1(self) -> None:
        desk = Desk(saflex("saflex(labels=keep, weights=one, clean_fraction=0)"), network())
        batch = desk.batch()
        desk.augment(batch)
        learned = desk.method.learned()
        assert learned["weight"][:8].tolist() == [1] * 8
        torch.testing.assert_close(learned["label"][:8].double(), batch.y)

    def test_they_survive_a_checkpoint(self) -> None:
        one = Desk(saflex("saflex"), network())
        for step in range(3):
            one.augment(one.batch(torch.arange(8) + step), step)
        file = io.BytesIO()
        torch.save(one.method.state_dict(), file)
        file.seek(0)
        other = Desk(saflex("saflex"), network())
        other.method.load_state_dict(torch.load(file, weights_only=True))
        for name, each in one.method.learned().items():
            assert torch.equal(other.method.learned()[name], each)
        assert float(one.method.learned()["seen"].sum()) == 12

    def test_what_an_upstream_learned_is_there_too(self) -> None:
        class Learner(Spy):
            def learned(self) -> dict[str, Tensor]:
                return {"policy": torch.ones(2)}

        desk = Desk(saflex("saflex", Learner()), network())
        assert set(desk.method.learned()) == {"weight", "label", "seen", "policy"}


OWN_LOSS = "needs the task's loss, but its upstream has a loss of its own"
AFTER_FORWARD = "works on rows before this step's forward pass, which its upstream has already run"


class TestRefusals:
    @pytest.mark.parametrize(
        ("upstream", "reason"),
        [
            ("gce", OWN_LOSS),
            ("logit_adjustment", OWN_LOSS),
            ("crop+gce", OWN_LOSS),
            ("saflex", AFTER_FORWARD),
            ("l2rw(upstream=crop)", AFTER_FORWARD),
            ("crop+lpa3(preset=code)", AFTER_FORWARD),
        ],
    )
    def test_an_upstream_that_cannot_be_refined_is_refused(
        self, upstream: str, reason: str
    ) -> None:
        for text in (f"saflex(upstream={upstream})", f"l2rw(upstream={upstream})"):
            assert reason in build(text).supports(MultiClass(), IMAGES)

    @pytest.mark.parametrize(
        "upstream", ["none", "mixup", "randaugment", "crop+flip", "balanced", "label_smoothing"]
    )
    def test_others_are_taken(self, upstream: str) -> None:
        assert build(f"saflex(upstream={upstream})").supports(MultiClass(), IMAGES) == ""

    def test_what_an_upstream_does_not_support_is_told(self) -> None:
        reason = build("saflex(upstream=balanced)").supports(MultiLabel(), IMAGES)
        assert reason == "balanced needs one label per row, but these have several"

    def test_an_upstream_that_hands_over_logits_unannounced_is_refused(self) -> None:
        class Sly(Method):
            def augment(self, batch: Batch, ctx: Context) -> Batch:
                return replace(batch, logits=ctx.forward(batch.x))

        method = saflex("saflex", Sly())
        assert method.supports(MultiClass(), IMAGES) == ""
        desk = Desk(method, network())
        with pytest.raises(
            ValueError, match="the upstream of saflex has already run this step's forward pass"
        ):
            desk.augment(desk.batch())

    def test_without_meta_rows_it_says_what_is_missing(self) -> None:
        model = mlp().float()
        data = problem(0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        rows = [(data.x.float(), data.y.argmax(dim=1))]
        ctx = own_loop(model, optimizer, classes=LABELS, train=rows)
        method = build("saflex")
        method.setup(ctx)
        method.begin_epoch(ctx)
        with pytest.raises(
            ValueError, match="saflex learns from meta rows, but the context has none"
        ):
            method.augment(ctx.batch(*rows[0]), ctx)

    @pytest.mark.parametrize(
        ("argument", "message"),
        [
            ("labels=soft", "labels: expected gumbel or argmax or keep or prox, got soft"),
            ("weights=two", "weights: expected step or relu or one, got two"),
            ("scale=mean", "scale: expected none or std or max, got mean"),
            ("derivative=jvp", "derivative: expected dual or difference, got jvp"),
            ("tau=0", "tau: expected a number above 0, got 0.0"),
            ("tau=-1", "tau: expected a number above 0, got -1.0"),
            ("eps=1.1", r"eps: expected a number in \[0, 1\], got 1.1"),
            ("eps=-0.1", r"eps: expected a number in \[0, 1\], got -0.1"),
            ("beta=-1", "beta: expected 0 or more, got -1.0"),
            ("eta=-1", "eta: expected 0 or more, got -1.0"),
            ("renormalise=2", "renormalise: expected true or false, got 2"),
            ("stratified=2", "stratified: expected true or false, got 2"),
            ("precondition=2", "precondition: expected true or false, got 2"),
            ("clean_fraction=1", r"clean_fraction: expected a number in \[0, 1\), got 1.0"),
            ("clean_fraction=-0.1", r"clean_fraction: expected a number in \[0, 1\), got -0.1"),
            ("meta_batch=0", "meta_batch: expected full or a multiple of the training batch"),
            ("meta_batch=17", "meta_batch: .* above 0 and up to 16, such as 2, got 17"),
            ("meta_batch=half", "meta_batch: expected a number or full, got half"),
            ("refresh=0", "refresh: expected 1 or more steps, got 0"),
            ("refresh=1.5", "refresh: expected a whole number, got 1.5"),
            ("stages=-1", r"stages: expected 0 \(the head alone\) or more, got -1"),
            ("stages=all", "stages: expected a whole number or none, got all"),
            ("upstream=3", "upstream: expected a method such as .* got 3"),
            ("gamma=1", "has no argument 'gamma'"),
            ("preset=slow", "unknown preset 'slow'"),
        ],
    )
    def test_an_argument_out_of_range_is_told_with_what_is_allowed(
        self, argument: str, message: str
    ) -> None:
        with pytest.raises(NamingError, match=message):
            build(f"saflex({argument})")

    def test_it_is_listed_with_its_source(self) -> None:
        told = methods.summary("saflex")
        assert "2410.02512" in told.source and told.first_line
        assert methods.summary("l2rw").first_line


def test_the_networks_of_the_later_stages_have_learned_something() -> None:
    data, task = problem(0), MultiClass()
    for activation in ("tanh", "relu"):
        losses = []
        for steps in STAGES:
            model = mlp(activation)
            warmed(model, data, task, steps)
            with torch.no_grad():
                losses.append(float(mean_loss(task, model(data.x), data.y)))
        assert losses[0] > 1.2 > losses[1] > 0.3 > losses[2]


class TestEdges:
    def test_what_no_row_has_reached_does_not_precondition(self) -> None:
        """A pixel that is black in every row has v = 0, and 1 / eps would drown the rest."""
        parameter = nn.Parameter(torch.ones(3))
        optimizer = torch.optim.Adam([parameter])
        (parameter * torch.tensor([1.0, 0.0, -2.0])).sum().backward()
        optimizer.step()
        diagonal = adam_diagonal(optimizer)[parameter]
        assert diagonal[1] == 0
        torch.testing.assert_close(diagonal[[0, 2]], torch.tensor([1.0, 0.5]))

    def test_tiny_gains_give_finite_weights(self) -> None:
        w = torch.full((3,), 1 / 64)
        scores = Scores(torch.zeros(3, 2), torch.tensor([1e-42, 0.0, -1.0]))
        y = torch.eye(2)[[0, 1, 0]]
        rules = Rules(labels="keep", weights="relu")
        found = refine(rules, MultiClass(), scores, y, w, torch.zeros(3, 2)).w
        torch.testing.assert_close(found, torch.tensor([3 / 64, 0.0, 0.0]))

    @pytest.mark.parametrize("text", ["crop+saflex", "saflex+mixup", "mixup+head_refit"])
    def test_a_chain_with_a_learning_link_is_refused_with_the_way_out(self, text: str) -> None:
        with pytest.raises(
            NamingError, match=r"cannot be in a chain: write \w+\(upstream=\.\.\.\)"
        ):
            build(text)

    def test_a_link_that_uses_the_forward_comes_last(self) -> None:
        build("crop+lpa3(preset=code)")
        with pytest.raises(NamingError, match="must be the last link"):
            build("lpa3(preset=code)+crop")

    def test_a_wrapper_works_on_the_rows_of_what_it_wraps(self) -> None:
        inner = "head_refit(upstream=saflex)"
        assert build(inner).weighted(10) == 5
        assert build(f"shuffled_weights(upstream={inner})").weighted(10) == 5
        assert build(inner).hands_logits

    def test_shuffling_needs_learned_weights(self) -> None:
        spec = Spec(10, 3, (1, 8, 8))
        for upstream in ("", "upstream=randaugment"):
            reason = build(f"shuffled_weights({upstream})").supports(MultiClass(), spec)
            assert "learns weights" in reason
