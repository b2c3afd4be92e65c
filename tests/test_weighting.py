"""Meta-Weight-Net and LiLAW against brute force and closed forms, in float64."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import methods
from benchmarks import contract
from benchmarks.contract import Case
from benchmarks.data.streams import RowStream, rows_from_tensors
from benchmarks.training.context import TrainingContext
from benchmarks.training.precision import Precision
from benchmarks.training.tasks import MultiClass, MultiLabel
from benchmarks.training.trainer import train_step
from methods.base import Batch, Spec
from methods.learner import learner_of
from methods.saflex import adam_diagonal
from methods.weighting import CURVE, MetaWeightNet, difficulty

CLASSES, ROWS, META, BATCH = 3, 24, 18, 10
RATES = (0.3, 0.05)
"""Learning rates of the network's trunk and of its last layer: long steps."""


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def targets(rows: int, several: bool = False) -> Tensor:
    if several:
        return (random(rows, CLASSES, seed=5) > 0).double()
    return F.one_hot(torch.arange(rows) % CLASSES, CLASSES).double()


def network() -> nn.Sequential:
    """Convolutions with batch normalisation, smooth, on 6 x 6 pixels."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 5, 3)]
    layers += [nn.BatchNorm2d(5), nn.Softplus(), nn.Flatten(), nn.Linear(5 * 4, CLASSES)]
    return nn.Sequential(*layers).double()


class Desk:
    """A method beside a network, rows and an optimiser that is never stepped."""

    def __init__(
        self,
        name: str,
        *,
        several: bool = False,
        adam: bool = False,
        model: nn.Module | None = None,
        precision: Precision = "float32",
    ) -> None:
        self.method = methods.build(name)
        self.model = (network() if model is None else model).train()
        *trunk, head = [each for each in self.model.children() if list(each.parameters())]
        groups: list[dict[str, Any]] = [
            {"params": [p for each in trunk for p in each.parameters()], "lr": RATES[0]},
            {"params": list(head.parameters()), "lr": RATES[1]},
        ]
        optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=0.1)
        if adam:
            optimizer = torch.optim.Adam(groups)
        like = next(self.model.parameters())
        x = random(ROWS + META, 1, 6, 6, seed=1).to(like.dtype)
        y = targets(ROWS + META, several).to(like.dtype)
        self.ctx = TrainingContext(
            self.model,
            optimizer,
            MultiLabel() if several else MultiClass(),
            Spec(rows=ROWS, classes=CLASSES, shape=(1, 6, 6)),
            RowStream(rows_from_tensors(x[:ROWS], y[:ROWS]), 0, "train"),
            RowStream(rows_from_tensors(x[ROWS:], y[ROWS:]), 0, "meta", False),
            epochs=4,
            batch_size=BATCH,
            seed=0,
            device=torch.device("cpu"),
            precision=precision,
        )
        self.meta_x, self.meta_y = x[ROWS:], y[ROWS:]
        if adam:  # which has second moments after a step; the network stays where it is
            before = copy.deepcopy(self.model.state_dict())
            self.ctx.task.losses(self.model(x), y).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            self.model.load_state_dict(before)
        self.ctx.enter("setup")
        self.method.setup(self.ctx)
        self.method.begin_epoch(self.ctx)

    def batch(self, weights: bool = False) -> Batch:
        """The first rows; with soft targets and uneven weights if asked for."""
        batch = self.ctx.train.rows(torch.arange(BATCH))
        batch = replace(batch, w=batch.w.to(batch.y.dtype))
        if not weights:
            return batch
        soft = 0.8 * batch.y + 0.2 * batch.y.roll(1, 0)
        return replace(batch, y=soft, w=random(BATCH, seed=3).abs().to(batch.w) / BATCH)

    def augment(self, batch: Batch, step: int = 0, epoch: int = 0) -> Batch:
        self.ctx.epoch, self.ctx.step = epoch, step
        self.ctx.enter("augment")
        return self.method.augment(batch, self.ctx)

    def train(self, batch: Batch) -> None:
        """A step of the trainer."""
        self.ctx.enter("augment")
        out = self.method.augment(batch, self.ctx)
        logits = self.ctx.forward(out.x) if out.logits is None else out.logits
        self.ctx.optimizer.zero_grad()
        (out.w @ self.method.losses(logits, out, self.ctx)).backward()
        self.ctx.optimizer.step()


def meta_weight_net(name: str, **given: Any) -> tuple[Desk, MetaWeightNet]:
    desk = Desk(name, **given)
    return desk, cast("MetaWeightNet", desk.method)


def unrolled(
    desk: Desk, net: nn.Module, batch: Batch, *, ahead: bool = True, precondition: bool = False
) -> list[Tensor]:
    """dM / dTheta by differentiating through the step, with second-order graphs."""
    model, task = desk.model, desk.ctx.task
    buffers = {name: each.clone() for name, each in model.named_buffers()}
    own = dict(model.named_parameters())
    losses = task.losses(functional_call(model, {**own, **buffers}, (batch.x,)), batch.y)
    value = net(losses.detach())
    v = batch.w * value * batch.w.sum() / (batch.w * value).sum()
    gradients = torch.autograd.grad((v * losses).sum(), list(own.values()), create_graph=True)
    diagonal = adam_diagonal(desk.ctx.optimizer) if precondition else {}
    stepped = {}
    for (name, each), gradient in zip(own.items(), gradients, strict=True):
        rate = RATES[name.startswith("7")] * diagonal.get(cast("nn.Parameter", each), 1.0)
        step = rate * gradient
        # Without looking ahead the meta gradient is that of the network where it is.
        stepped[name] = each - step if ahead else each.detach() - (step - step.detach())
    logits = functional_call(model, {**stepped, **buffers}, (desk.meta_x,))
    meta = task.losses(logits, desk.meta_y).mean()
    return list(torch.autograd.grad(meta, list(net.parameters())))


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([each.flatten() for each in tensors])


def theta_of(module: nn.Module) -> Tensor:
    return flat([each.detach() for each in module.parameters()])


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def gradient_of(method: MetaWeightNet) -> Tensor:
    """What the last step of V went down."""
    return flat([cast("Tensor", each.grad) for each in method.net.parameters()])


class TestMetaWeightNet:
    @pytest.mark.parametrize("several", [False, True])
    @pytest.mark.parametrize("precondition", [False, True])
    def test_the_look_ahead_gradient_is_exact(self, several: bool, precondition: bool) -> None:
        told = f"hidden=7, learning_rate=0.0, meta_batch=full, precondition={precondition}"
        desk, method = meta_weight_net(
            f"meta_weight_net({told})", several=several, adam=precondition
        )
        batch = desk.batch(weights=True)
        true = flat(unrolled(desk, method.net, batch, precondition=precondition))
        here = flat(unrolled(desk, method.net, batch, ahead=False, precondition=precondition))
        desk.augment(batch)
        assert apart(gradient_of(method), true) < 1e-8
        assert apart(here, true) > 0.01, "else this test sees no look-ahead"

    def test_a_difference_is_near(self) -> None:
        told = "hidden=7, learning_rate=0.0, meta_batch=full, derivative=difference"
        desk, method = meta_weight_net(f"meta_weight_net({told})")
        batch = desk.batch(weights=True)
        true = flat(unrolled(desk, method.net, batch))
        desk.augment(batch)
        assert 1e-8 < apart(gradient_of(method), true) < 0.01

    def test_steps_are_those_of_adam_and_weights_those_after_them(self) -> None:
        rate, decay = 0.02, 0.3
        told = f"hidden=5, learning_rate={rate}, weight_decay={decay}, meta_batch=full"
        desk, method = meta_weight_net(f"meta_weight_net({told})")
        net, batch = copy.deepcopy(method.net), desk.batch(weights=True)
        first, second = torch.zeros(16).double(), torch.zeros(16).double()
        for step in range(1, 4):
            theta = theta_of(net)
            slope = flat(unrolled(desk, net, batch)) + decay * theta
            first = 0.9 * first + 0.1 * slope
            second = 0.999 * second + 0.001 * slope.square()
            root = (second / (1 - 0.999**step)).sqrt() + 1e-8
            nn.utils.vector_to_parameters(
                theta - rate * first / (1 - 0.9**step) / root, net.parameters()
            )
            with torch.no_grad():
                buffers = {name: each.clone() for name, each in desk.model.named_buffers()}
                logits = functional_call(desk.model, buffers, (batch.x,))
                value = batch.w * net(desk.ctx.task.losses(logits, batch.y))
            out = desk.augment(batch, step)
            assert apart(theta_of(method.net), theta_of(net)) < 1e-8
            torch.testing.assert_close(out.w, value * batch.w.sum() / value.sum())
            assert out.logits is not None and out.logits.requires_grad

    def test_running_statistics_move_as_by_the_training_forward(self) -> None:
        desk, _ = meta_weight_net("meta_weight_net(meta_batch=full)")
        batch, other = desk.batch(), network().train()
        other(batch.x)
        desk.augment(batch)
        for name, buffer in desk.model.named_buffers():
            assert torch.equal(buffer, other.get_buffer(name)), name

    def test_rows_that_no_group_of_the_optimiser_trains_do_not_move(self) -> None:
        """A frozen layer, and a parameter that the optimiser lacks."""
        desk, method = meta_weight_net("meta_weight_net(hidden=4, learning_rate=0.0)")
        batch = desk.batch()
        desk.augment(batch)
        before = gradient_of(method).clone()
        for parameter in list(desk.model.parameters())[:2]:
            parameter.requires_grad_(False)
        del desk.ctx.optimizer.param_groups[1]
        desk.augment(batch)
        assert bool(torch.isfinite(gradient_of(method)).all())
        assert apart(gradient_of(method), before) > 0.01

    def test_frozen_is_a_net_that_never_steps(self) -> None:
        frozen = Desk("frozen(upstream=meta_weight_net(hidden=9))")
        still = Desk("meta_weight_net(hidden=9, learning_rate=0.0)")
        moves = Desk("meta_weight_net(hidden=9, learning_rate=0.1)")
        outs = [[d.augment(d.batch(), step) for step in range(3)] for d in (frozen, still, moves)]
        for one, other, moved in zip(*outs, strict=True):
            assert torch.equal(one.w, other.w) and not torch.equal(one.w, moved.w)
            assert float(one.w.std()) > 1e-4, "an untrained net is not constant"
        assert frozen.method.learning() == still.method.learning() == {"weight": 0.0}
        assert moves.method.learning()["weight"] > 0.01

    def test_what_it_learned(self) -> None:
        desk, method = meta_weight_net("meta_weight_net(hidden=9, learning_rate=0.05)")
        batch = desk.batch(weights=True)
        shares = [desk.augment(batch, step).w / batch.w for step in range(4)]
        elsewhere = replace(batch, index=torch.full_like(batch.index, -1))
        desk.augment(elsewhere, 4)
        found = method.learned()
        assert found["seen"].tolist() == [4.0] * BATCH + [0.0] * (ROWS - BATCH)
        mean = torch.stack(shares).mean(dim=0).float()
        torch.testing.assert_close(found["weight"][:BATCH], mean)
        assert (found["weight"][BATCH:] == 0).all()
        grid = found["curve_loss"]
        assert grid[0] == CURVE[0] and grid[-1] == CURVE[1] and len(grid) == CURVE[2]
        for net, curve in ((method.net, "curve_weight"), (method.start, "curve_start")):
            one, two = (cast("nn.Linear", net.layers[place]) for place in (0, 2))
            hidden = (grid[:, None] * one.weight[:, 0] + one.bias).clamp_min(0)
            value = torch.sigmoid(hidden @ two.weight[0] + two.bias)
            torch.testing.assert_close(found[curve], value.detach())
        assert float((found["curve_weight"] - found["curve_start"]).abs().max()) > 0.05

    def test_the_log(self) -> None:
        desk, method = meta_weight_net("meta_weight_net(meta_batch=full, learning_rate=0.0)")
        batch = desk.batch()
        desk.augment(batch)
        told = desk.ctx.take_log()
        assert told["meta_gradient"] == pytest.approx(float(gradient_of(method).norm()))
        assert told["decay_gradient"] == pytest.approx(1e-4 * float(theta_of(method.net).norm()))
        ends = torch.tensor([0, math.log(CLASSES)]).double()
        names = ("weight_at_loss_0", "weight_at_loss_of_a_guess")
        assert [told[name] for name in names] == pytest.approx(method.net(ends).detach().tolist())

    def test_under_bfloat16_it_learns_in_float32_beside_the_forward(self) -> None:
        told = "meta_weight_net(hidden=9, learning_rate=0.05)"
        desks = [
            Desk(told, model=network().float(), precision=precision)
            for precision in ("float32", "bfloat16")
        ]
        exact, beside = (desk.augment(desk.batch()) for desk in desks)
        torch.testing.assert_close(exact.w, beside.w)
        assert exact.logits is not None and beside.logits is None

    def test_without_forward_mode_dual_becomes_a_difference(self) -> None:
        found = []
        for derivative in ("dual", "difference"):
            model = nn.Sequential(*network(), Untold(), nn.Linear(CLASSES, CLASSES).double())
            torch.manual_seed(0)
            told = f"meta_weight_net(hidden=9, learning_rate=0.05, derivative={derivative})"
            desk = Desk(told, model=model)
            found.append([desk.augment(desk.batch(), step).w for step in range(2)])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other)

    def test_it_finds_wrong_labels(self) -> None:
        """Two blobs, a third of the labels wrong, clean meta rows: weights fall with the loss."""
        x, clean = blobs(160, seed=1)
        y = torch.where((torch.arange(160) % 3 == 0)[:, None], clean.flip(1), clean)
        meta_x, meta_y = blobs(40, seed=2)
        model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).double()
        ctx = TrainingContext(
            model,
            torch.optim.SGD(model.parameters(), lr=0.5),
            MultiClass(),
            Spec(rows=160, classes=2, shape=(1, 2, 2)),
            RowStream(rows_from_tensors(x, y), 0, "train"),
            RowStream(rows_from_tensors(meta_x, meta_y), 0, "meta", False),
            epochs=1, batch_size=40, seed=0, device=torch.device("cpu"),
        )  # fmt: skip
        method = methods.build("meta_weight_net(learning_rate=0.01)")
        ctx.enter("setup")
        method.setup(ctx)
        for step in range(120):
            ctx.step = step
            index = torch.arange(40) + step % 4 * 40
            train_step(learner_of(method), ctx, rows_from_tensors(x, y), index)
        found = method.learned()["weight"]
        wrong = torch.arange(160) % 3 == 0
        assert float(found[~wrong].mean()) > 1.1 and float(found[wrong].mean()) < 0.8


class _Untold(torch.autograd.Function):
    """Its input, without a forward-mode derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        return grad_outputs[0]


class Untold(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return cast("Tensor", _Untold.apply(x))


def blobs(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    label = torch.arange(rows) // 2 % 2
    x = random(rows, 1, 2, 2, seed=seed) + (2.0 * label - 1)[:, None, None, None]
    return x, F.one_hot(label, 2).double()


def logits_of(s: list[float]) -> Tensor:
    return torch.tensor([s], dtype=torch.float64).log()


def by_hand(label: float, largest: float, alpha: float, beta: float, delta: float) -> float:
    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    return (
        sigmoid(alpha * label - largest)
        + sigmoid(-(beta * label - largest))
        + math.exp(-((delta * label - largest) ** 2) / 2)
    )


START = (10.0, 2.0, 6.0)


class TestLilaw:
    @pytest.mark.parametrize(
        ("s", "label", "largest"),
        [([0.9, 0.1], 0.9, 0.9), ([0.1, 0.9], 0.1, 0.9), ([0.5, 0.5], 0.5, 0.5)],
    )
    def test_the_weight_is_that_of_the_formula(
        self, s: list[float], label: float, largest: float
    ) -> None:
        y = torch.tensor([[1.0, 0.0]]).double()
        for scalars in (START, (3.0, 1.5, -2.0)):
            value = difficulty(logits_of(s), y, torch.tensor(scalars).double())
            assert float(value) == pytest.approx(by_hand(label, largest, *scalars), rel=1e-12)

    def test_what_no_scalar_changes(self) -> None:
        """A row where the network is sure of another label weighs 1 + exp(-1/2), whatever they are;
        one where it is sure of the label weighs less at the start."""
        y = torch.tensor([[1.0, 0.0]]).double()
        sure, wrong = torch.tensor([[60.0, 0.0]]).double(), torch.tensor([[0.0, 60.0]]).double()
        for scalars in (START, (1.0, 9.0, 3.0)):
            value = difficulty(wrong, y, torch.tensor(scalars).double())
            assert float(value) == pytest.approx(1 + math.exp(-0.5))
        assert float(difficulty(sure, y, torch.tensor(START).double())) == pytest.approx(
            1.2688, abs=1e-4
        )

    def test_a_step_of_the_scalars(self) -> None:
        """Closed form: the means of l dW / dalpha and so on, and the weight decay."""
        rate, decay = 0.5, 0.1
        told = f"learning_rate={rate}, weight_decay={decay}, meta_batch=full, warmup=0"
        desk = Desk(f"lilaw({told})")
        desk.augment(desk.batch(), 0)
        assert desk.method.learned()["scalars"].tolist() == list(START), "weighs first"
        with torch.no_grad():
            logits = copy.deepcopy(desk.model)(desk.meta_x)
        s, y = logits.softmax(dim=1), desk.meta_y
        label, largest, loss = (s * y).sum(1), s.amax(1), -(y * s.log()).sum(1)
        alpha, beta, delta = START
        easy, hard = torch.sigmoid(alpha * label - largest), torch.sigmoid(largest - beta * label)
        gap = delta * label - largest
        slopes = (
            loss * easy * (1 - easy) * label,
            -loss * hard * (1 - hard) * label,
            -loss * gap * (-gap.square() / 2).exp() * label,
        )
        desk.augment(desk.batch(), 1)
        expected = [
            a - rate * (float(g.mean()) + decay * a) for a, g in zip(START, slopes, strict=True)
        ]
        assert desk.method.learned()["scalars"].tolist() == pytest.approx(expected, rel=1e-10)

    def test_alpha_falls_and_beta_rises_whatever_the_meta_rows_are(self) -> None:
        for seed in range(20):
            logits, labels = 3 * random(30, CLASSES, seed=seed), targets(30).roll(seed, 1)
            scalars = (4 * random(3, seed=seed + 50)).requires_grad_()
            losses = MultiClass().losses(logits, labels)
            loss = (difficulty(logits, labels, scalars) * losses).mean()
            (slope,) = torch.autograd.grad(loss, scalars)
            assert slope[0] > 0 > slope[1]

    @pytest.mark.parametrize("through", [True, False])
    def test_the_gradient_of_the_step(self, through: bool) -> None:
        """That of the mean of W l times a constant, with W constant or not."""
        desk = Desk(f"lilaw(warmup=0, through={through})")
        batch = desk.batch(weights=True)
        out = desk.augment(batch)
        assert out.logits is not None and not out.w.requires_grad
        found = desk.method.losses(out.logits, out, desk.ctx)
        plain = desk.ctx.task.losses(out.logits, batch.y)
        torch.testing.assert_close(found, plain)
        (gradient,) = torch.autograd.grad(out.w @ found, out.logits)
        z = out.logits.detach().requires_grad_()
        factor = difficulty(z, batch.y, torch.tensor(START).double())
        total = batch.w.sum() / (batch.w * factor.detach()).sum()
        weighed = (factor if through else factor.detach()) * desk.ctx.task.losses(z, batch.y)
        (expected,) = torch.autograd.grad(total * (batch.w @ weighed), z)
        torch.testing.assert_close(gradient, expected)
        torch.testing.assert_close(out.w, total * batch.w * factor.detach())

    def test_a_run_is_the_published_loop(self) -> None:
        """Epoch 0 plain; then a weighted step, a step of the scalars on meta rows, and so on."""
        told = "learning_rate=0.3, weight_decay=0.01, meta_batch=full, through=true"
        desk, other = Desk(f"lilaw({told})"), network().train()
        optimizer = torch.optim.SGD(other.parameters(), lr=0.2)
        desk.ctx.optimizer = torch.optim.SGD(desk.model.parameters(), lr=0.2)
        scalars = torch.tensor(START).double().requires_grad_()
        task, rows = MultiClass(), desk.ctx.train
        for epoch in range(3):
            desk.ctx.epoch = epoch
            desk.method.begin_epoch(desk.ctx)
            for step in range(2):
                desk.ctx.step = 2 * epoch + step
                index = torch.arange(BATCH) + step * BATCH
                batch = rows.rows(index)
                batch = replace(batch, w=batch.w.double())
                desk.train(batch)
                logits = other(batch.x)
                losses = task.losses(logits, batch.y)
                if epoch:
                    factor = difficulty(logits, batch.y, scalars.detach())
                    losses = factor * losses / factor.detach().mean()
                optimizer.zero_grad()
                losses.mean().backward()
                optimizer.step()
                last = epoch == 2 and step == 1
                if epoch and not last:  # the harness updates before the next step
                    with torch.no_grad():
                        logits = copy.deepcopy(other)(desk.meta_x)
                    weighed = difficulty(logits, desk.meta_y, scalars)
                    loss = (weighed * task.losses(logits, desk.meta_y)).mean()
                    (slope,) = torch.autograd.grad(loss, scalars)
                    scalars = (scalars - 0.3 * (slope + 0.01 * scalars)).detach().requires_grad_()
        torch.testing.assert_close(desk.method.learned()["scalars"], scalars.detach())
        # The trainer's batches weigh 1 / B in float32.
        torch.testing.assert_close(
            flat(list(desk.model.parameters())),
            flat(list(other.parameters())),
            rtol=1e-6,
            atol=1e-8,
        )

    def test_frozen_has_scalars_that_never_step(self) -> None:
        frozen = Desk("frozen(upstream=lilaw(warmup=0))")
        still = Desk("lilaw(warmup=0, learning_rate=0.0)")
        moves = Desk("lilaw(warmup=0, learning_rate=50.0)")
        outs = [[d.augment(d.batch(), step) for step in range(3)] for d in (frozen, still, moves)]
        for step, (one, other, moved) in enumerate(zip(*outs, strict=True)):
            assert torch.equal(one.w, other.w)
            assert torch.equal(one.w, moved.w) == (step == 0)
        assert frozen.method.learning() == still.method.learning() == {"weight": 0.0}
        assert moves.method.learning()["weight"] > 0.01
        assert frozen.method.learned()["scalars"].tolist() == list(START)

    def test_the_warmup_is_plain(self) -> None:
        desk = Desk("lilaw(warmup=2)")
        batch = desk.batch()
        for epoch in range(2):
            assert desk.augment(batch, epoch, epoch) is batch
        assert desk.method.learning() == {} and not desk.method.learned()["seen"].any()
        assert not torch.equal(desk.augment(batch, 2, 2).w, batch.w)

    def test_several_labels_are_refused(self) -> None:
        reason = methods.build("lilaw").supports(MultiLabel(), Spec(9, CLASSES, (1, 6, 6)))
        assert reason == "lilaw needs one label per row, but these have several"


@pytest.mark.parametrize("name", ["meta_weight_net", "lilaw"])
class TestBoth:
    @pytest.mark.parametrize(
        ("upstream", "said"),
        [("gce", "its upstream has a loss of its own"), ("saflex", "has already run")],
    )
    def test_upstreams_that_cannot_be_weighed(self, name: str, upstream: str, said: str) -> None:
        method = methods.build(f"{name}(upstream={upstream})")
        assert said in method.supports(MultiClass(), Spec(9, CLASSES, (1, 6, 6)))

    @pytest.mark.parametrize(
        ("argument", "said"),
        [
            ("learning_rate=-1.0", "learning_rate: expected 0 or more, got -1.0"),
            ("weight_decay=-1.0", "weight_decay: expected 0 or more"),
            ("meta_batch=17", "meta_batch: expected full or a multiple"),
        ],
    )
    def test_arguments_that_are_refused(self, name: str, argument: str, said: str) -> None:
        with pytest.raises(methods.NamingError, match=said):
            methods.build(f"{name}({argument})")

    def test_it_needs_meta_rows(self, name: str) -> None:
        desk = Desk(f"{name}" if name == "meta_weight_net" else "lilaw(warmup=0)")
        desk.augment(desk.batch())
        desk.ctx.meta = None
        with pytest.raises(ValueError, match=f"{name} learns from meta rows, but the context has"):
            desk.augment(desk.batch(), 1)

    def test_all_that_it_learned_comes_back(self, name: str) -> None:
        told = "meta_weight_net" if name == "meta_weight_net" else "lilaw(warmup=0)"
        one, other = (contract.bench(lambda: methods.build(told), Case(1)) for _ in range(2))
        for step in range(3):
            one.augment(one.batch(step=step), step=step)
        contract.pass_state(one.method, other.method)
        before, after = one.method.learned(), other.method.learned()
        assert before.keys() == after.keys() and float(before["seen"].sum()) == 24
        assert all(torch.equal(before[each], after[each]) for each in before)
        assert one.method.learning() == other.method.learning()


@pytest.mark.parametrize(
    ("argument", "said"),
    [("meta_weight_net(hidden=0)", "hidden: expected 1 or more"), ("lilaw(warmup=-1)", "warmup: ")],
)
def test_own_arguments_that_are_refused(argument: str, said: str) -> None:
    with pytest.raises(methods.NamingError, match=said):
        methods.build(argument)
