"""Meta-Weight-Net and LiLAW: row weights as a learned function of how the network does on a row."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from methods.base import ANYTHING, Batch, Context, Method
from methods.functional import (
    buffers_of,
    check_meta_batch,
    directional,
    evaluate,
    meta_rows,
    reweighted,
)
from methods.saflex import adam_diagonal, score

AUDIT_EVERY = 25
"""Interval of the logged diagnostics, in steps; each epoch starts with one."""
CURVE = (0.0, 10.0, 101)
"""First loss, last loss and number of points of the curve in learned.npz, in nats."""


class WeightNet(nn.Module):
    """The weight of a row as a function of its loss: (B,) losses to (B,) values in (0, 1)."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(1, hidden), nn.ReLU(), nn.Linear(hidden, 1), nn.Sigmoid()
        )

    def forward(self, losses: Tensor) -> Tensor:
        """V(loss) for each loss."""
        return self.layers(losses[:, None])[:, 0]


class RowMeans(nn.Module):
    """Running means over the steps of each row's weight, and of what it would be at the start."""

    def __init__(self, rows: int, device: torch.device) -> None:
        super().__init__()
        for name in ("seen", "weight", "start"):
            self.register_buffer(name, torch.zeros(rows, device=device))

    def add(self, batch: Batch, w: Tensor, start: Tensor) -> None:
        """Weights (B,) and starting weights (B,), relative to those of ``batch``; -1 rows do not
        count."""
        known = (batch.index >= 0).float()
        place = batch.index.clamp_min(0)
        given = torch.where(batch.w > 0, batch.w, torch.ones_like(batch.w))
        self.get_buffer("seen").index_add_(0, place, known)
        for name, each in (("weight", w), ("start", start)):
            self.get_buffer(name).index_add_(0, place, known * (each / given).float())

    def learned(self) -> dict[str, Tensor]:
        """Mean weight of each row (1: unchanged), and in how many steps it was weighed."""
        seen = self.get_buffer("seen")
        return {"weight": self.get_buffer("weight") / seen.clamp_min(1), "seen": seen}

    def learning(self) -> dict[str, float]:
        """The median over rows of how far the mean weight is from that of the starting function."""
        seen = self.get_buffer("seen")
        was = seen > 0
        if not bool(was.any()):
            return {}
        moved = (self.get_buffer("weight") - self.get_buffer("start")).abs()[was] / seen[was]
        return {"weight": float(moved.median())}


class MetaWeightNet(Method):
    """Row weights by a small network from loss to weight, learned by looking one step ahead.

    V is a network of one hidden layer (1, ``hidden``, 1; ReLU, sigmoid) from the loss of a row to a
    value in (0, 1). Weights keep the total of a batch: v_i = w_i V(l_i) sum(w) / sum(w V(l)), l_i
    the loss of row i as a constant. Before each step, let theta' = theta - alpha sum_i v_i grad l_i
    be the network's weights after a plain SGD step with the optimiser's learning rate alpha, and M
    the mean loss over a batch of meta rows at theta'. The parameters of V take a step of Adam
    (``learning_rate``, ``weight_decay``; betas 0.9 and 0.999) down

    dM / dTheta = - alpha sum_i (dv_i / dTheta) <grad M(theta'), grad l_i(theta)>,

    which is exact: all inner products are one derivative of the losses along grad M(theta'), so it
    needs neither gradients per row nor a second-order graph. Then the batch gets the weights of the
    new V. ``precondition`` (ours) takes both steps as Adam does: each coordinate of the gradients
    times 1 / (sqrt(v) + eps), v Adam's second moments, if the optimiser has them. ``derivative``:
    ``dual`` is exact, ``difference`` one more forward pass. ``meta_batch`` is in training batches
    (2: twice as many rows), or ``full``; ``stratified`` draws it with the class shares. The meta
    loss uses the batch statistics of the meta rows, as training uses its own, in float32 and with
    dropout on; running statistics do not change.

    **Deviations.** From its authors' code at commit 3f1800f (MW-Net.py): weights keep the total of
    a batch in both steps, and the gradient accounts for it (their earlier script and the one for
    imbalance divide by the sum of V; MW-Net.py takes the mean of V(l) l); l is of the training
    step's own forward pass, which they run twice; alpha is the optimiser's learning rate, of which
    they keep a copy. As there, the look-ahead step has neither momentum nor weight decay, whatever
    the optimiser.
    """

    kinds = ANYTHING
    before_forward = task_loss = True
    source = "Shu et al., Meta-Weight-Net, NeurIPS 2019, arXiv:1902.07379"
    needs = frozenset({"meta"})
    hands_logits = True
    costs: Mapping[str, float] = {"published": 3.9}
    space: ClassVar[Mapping[str, Any]] = {
        "learning_rate": ("loguniform", 1e-4, 1e-2),
        "meta_batch": ("choice", [0.25, 1.0, 2.0, 4.0]),
        "precondition": ("choice", [False, True]),
    }

    def __init__(
        self,
        *,
        upstream: Method | None = None,
        hidden: int = 100,
        learning_rate: float = 1e-3,
        weight_decay: float = 1e-4,
        meta_batch: float | Literal["full"] = 1.0,
        stratified: bool = False,
        precondition: bool = False,
        derivative: Literal["dual", "difference"] = "dual",
    ) -> None:
        super().__init__(upstream)
        if hidden < 1:
            raise ValueError(f"hidden: expected 1 or more units, got {hidden}")
        _check_rates(learning_rate, weight_decay)
        self.hidden, self.learning_rate, self.weight_decay = hidden, learning_rate, weight_decay
        self.meta_batch, self.stratified = check_meta_batch(meta_batch), stratified
        self.precondition, self.derivative = precondition, derivative
        frozen = f"frozen(upstream=meta_weight_net(hidden={hidden}, upstream={{upstream}}))"
        self.controls = (
            frozen,
            "shuffled_weights(upstream={self})",
            f"head_refit(upstream={frozen})",
        )
        self._steps = 0  # of this epoch
        self._unsupported = False

    def setup(self, ctx: Context) -> None:
        """Draw V at random, and keep a copy of it as it starts."""
        super().setup(ctx)
        like = ctx.train.targets
        self.net = WeightNet(self.hidden).to(like.device, like.dtype)
        self.start = copy.deepcopy(self.net).requires_grad_(False)
        self.optimizer = torch.optim.Adam(
            self.net.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay
        )
        self.means = RowMeans(ctx.spec.rows, like.device)

    def begin_epoch(self, ctx: Context) -> None:
        """Count the steps of the epoch from 0."""
        super().begin_epoch(ctx)
        self._steps = 0

    def augment(self, batch: Batch, ctx: Context) -> Batch:
        """The upstream's rows with weights by V, after a step of V."""
        rows = len(batch)
        if self.upstream is not None:
            batch = self.upstream.augment(batch, ctx)
        if batch.logits is not None:
            raise ValueError(
                "the upstream of meta_weight_net has already run this step's forward pass"
            )
        differs = self.derivative == "difference" or self._unsupported
        before = buffers_of(ctx.model) if differs else None
        given, logits = _forward(batch.x, ctx)
        losses = ctx.task.losses(logits, batch.y)
        told: dict[str, Tensor] = {}
        if not self.frozen:
            meta = meta_rows("meta_weight_net", ctx, self.meta_batch, rows, self.stratified)
            told = self._learn(batch, logits, losses, before, meta, ctx)
        with torch.no_grad():
            w = reweighted(batch.w, self.net(losses))
            self.means.add(batch, w, reweighted(batch.w, self.start(losses)))
        if self._steps % AUDIT_EVERY == 0:
            with ctx.uncharged():
                self._audit(batch, w, told, ctx)
        self._steps += 1
        return replace(batch, w=w, logits=given)

    def get_extra_state(self) -> dict[str, Any]:
        """The optimiser of V, and what a resumed run must not determine again."""
        return {"optimizer": self.optimizer.state_dict(), "unsupported": self._unsupported}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore it."""
        self.optimizer.load_state_dict(state["optimizer"])
        self._unsupported = state["unsupported"]

    def learned(self) -> dict[str, Tensor]:
        """Per training row: mean weight (1: unchanged) and count; V on a grid, now and at first.

        ``curve_weight`` and ``curve_start`` (101,) are V(``curve_loss``), in (0, 1), before they
        are scaled to the total of a batch.
        """
        like = next(self.net.parameters())
        low, high, points = CURVE
        grid = torch.linspace(low, high, points, dtype=like.dtype, device=like.device)
        with torch.no_grad():
            curves = {"curve_weight": self.net(grid), "curve_start": self.start(grid)}
        return {**super().learned(), **self.means.learned(), "curve_loss": grid, **curves}

    def learning(self) -> dict[str, float]:
        """The median over rows of how far the mean weight is from that of V as it started."""
        return {**super().learning(), **self.means.learning()}

    def _learn(
        self,
        batch: Batch,
        logits: Tensor,
        losses: Tensor,
        before: dict[str, Tensor] | None,
        meta: Batch,
        ctx: Context,
    ) -> dict[str, Tensor]:
        """A step of Adam on V; the meta loss, and the norm of its gradient in V's parameters."""
        weights = list(self.net.parameters())
        with torch.enable_grad():
            v = reweighted(batch.w, self.net(losses.detach()))
            loss, ahead = look_ahead(v.detach() @ losses, meta, ctx, self.precondition)
            slope = self._slope(batch.x, logits.detach(), before, ahead, ctx)
            gain = score(ctx.task, logits, slope, batch.y).gain
            gradients = torch.autograd.grad(-(v @ gain), weights)
        for parameter, gradient in zip(weights, gradients, strict=True):
            parameter.grad = gradient
        self.optimizer.step()
        norm = torch.stack([each.square().sum() for each in gradients]).sum().sqrt()
        return {"meta_loss": loss, "meta_gradient": norm}

    def _slope(
        self,
        x: Tensor,
        logits: Tensor,
        before: dict[str, Tensor] | None,
        tangent: dict[str, Tensor],
        ctx: Context,
    ) -> Tensor:
        """The derivative (B, K) of the logits along a direction of the network's weights."""
        if self.derivative == "dual" and not self._unsupported:
            try:
                with ctx.replay():
                    return directional(ctx.model, x, tangent, how="dual")[1]
            except NotImplementedError:  # an operator without forward-mode differentiation
                self._unsupported = True
        with ctx.replay():
            return directional(
                ctx.model, x, tangent, how="difference", primal=logits, buffers=before
            )[1]

    def _audit(self, batch: Batch, w: Tensor, told: dict[str, Tensor], ctx: Context) -> None:
        """Log V at losses 0 and log K (that of a guess), the spread of weights, and the step.

        Beside the norm of the meta gradient stands that of the weight decay's.
        """
        guess = math.log(ctx.spec.classes)
        ends = torch.linspace(0, guess, 2, dtype=w.dtype, device=w.device)
        with torch.no_grad():
            low, high = self.net(ends).tolist()
        share = w / torch.where(batch.w > 0, batch.w, torch.ones_like(batch.w))
        flat = torch.cat([each.detach().flatten() for each in self.net.parameters()])
        ctx.log(
            weight_at_loss_0=low,
            weight_at_loss_of_a_guess=high,
            weight_spread=float(share.std()),
            decay_gradient=self.weight_decay * float(flat.norm()),
            dual_unsupported=float(self._unsupported),
            **{name: float(value) for name, value in told.items()},
        )


class Lilaw(Method):
    """Row weights by three learned scalars, for easy, moderate and hard rows.

    With s the network's softmax output for a row, s_y = s.y the probability of its label and m the
    largest of s, its weight is W = sigmoid(alpha s_y - m) + sigmoid(m - beta s_y)
    + exp(-(delta s_y - m)^2 / 2): the first term is for rows whose label the network predicts, the
    second for rows where it is sure of another one, the third for those between. The scalars start
    at ``alpha``, ``beta`` and ``delta``. After each step they take one step of gradient descent
    (``learning_rate``, ``weight_decay``) down the mean of W l over a batch of meta rows at the
    network's new weights, with s and the loss l constant: no look-ahead. The meta rows may have
    wrong labels. Weights are 1, and the scalars rest, in the first ``warmup`` epochs.

    The step of the network minimises the mean of W l. With ``through`` its gradient also passes
    through W, which depends on the network's output; without, W is a constant. ``meta_batch`` is in
    training batches (2: twice as many rows), or ``full``; ``stratified`` draws it with the class
    shares. Its s and l use the batch statistics of the meta rows, as training uses its own, and
    dropout; running statistics do not change.

    **Deviations.** From the first author's code (moturuab/C2D, train_clothing1m.py at commit
    a1afff9): W is scaled so that a batch keeps its total weight; there alpha is kept at 1 or more
    and delta at beta or more, and the network is in eval mode on the meta batch (in an earlier
    repository it is not). The paper itself could not be read for this: see the method's page.
    """

    kinds = ANYTHING - {"labels"}
    before_forward = task_loss = True
    source = "Moturu et al., LiLAW, arXiv:2509.20786"
    needs = frozenset({"meta"})
    hands_logits = True
    costs: Mapping[str, float] = {"published": 1.4}
    space: ClassVar[Mapping[str, Any]] = {
        "alpha": ("uniform", 2.0, 20.0),
        "beta": ("uniform", 1.0, 10.0),
        "delta": ("uniform", 1.0, 10.0),
        "learning_rate": ("loguniform", 1e-3, 1e-1),
    }

    def __init__(
        self,
        *,
        upstream: Method | None = None,
        alpha: float = 10.0,
        beta: float = 2.0,
        delta: float = 6.0,
        learning_rate: float = 0.005,
        weight_decay: float = 1e-4,
        warmup: int = 1,
        through: bool = True,
        meta_batch: float | Literal["full"] = 1.0,
        stratified: bool = False,
    ) -> None:
        super().__init__(upstream)
        _check_rates(learning_rate, weight_decay)
        if warmup < 0:
            raise ValueError(f"warmup: expected 0 or more epochs, got {warmup}")
        self.first = (alpha, beta, delta)
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.warmup, self.through = warmup, through
        self.meta_batch, self.stratified = check_meta_batch(meta_batch), stratified
        frozen = (
            f"frozen(upstream=lilaw(alpha={alpha}, beta={beta}, delta={delta}, warmup={warmup}, "
            f"through={through}, upstream={{upstream}}))"
        )
        self.controls = (
            frozen,
            "shuffled_weights(upstream={self})",
            f"head_refit(upstream={frozen})",
        )
        self._steps = 0  # of this epoch

    def setup(self, ctx: Context) -> None:
        """Start the scalars."""
        super().setup(ctx)
        like = ctx.train.targets
        self.register_buffer("scalars", like.new_tensor(self.first))
        self.register_buffer("start", like.new_tensor(self.first))
        self.means = RowMeans(ctx.spec.rows, like.device)

    def begin_epoch(self, ctx: Context) -> None:
        """Count the steps of the epoch from 0."""
        super().begin_epoch(ctx)
        self._steps = 0

    def augment(self, batch: Batch, ctx: Context) -> Batch:
        """The upstream's rows with their weights, after the step of the scalars that is due."""
        rows = len(batch)
        if self.upstream is not None:
            batch = self.upstream.augment(batch, ctx)
        if batch.logits is not None:
            raise ValueError("the upstream of lilaw has already run this step's forward pass")
        if ctx.epoch < self.warmup:
            return batch
        told: dict[str, Tensor] = {}
        # The first weighted step comes before the first step of the scalars.
        if not self.frozen and (ctx.epoch > self.warmup or self._steps):
            told = self._learn(meta_rows("lilaw", ctx, self.meta_batch, rows, self.stratified), ctx)
        logits = ctx.forward(batch.x)
        with torch.no_grad():
            factor = difficulty(logits, batch.y, self.get_buffer("scalars"))
            first = difficulty(logits, batch.y, self.get_buffer("start"))
            w = reweighted(batch.w, factor)
            self.means.add(batch, w, reweighted(batch.w, first))
        if self._steps % AUDIT_EVERY == 0:
            with ctx.uncharged():
                self._audit(factor, told, ctx)
        self._steps += 1
        return replace(batch, w=w, logits=logits)

    def losses(self, logits: Tensor, batch: Batch, ctx: Context) -> Tensor:
        """The task's loss per row (B,); with ``through`` its gradient is that of W l, over W."""
        losses = super().losses(logits, batch, ctx)
        if not self.through or ctx.epoch < self.warmup:
            return losses
        factor = difficulty(logits, batch.y, self.get_buffer("scalars"))
        return losses * (factor / factor.detach())

    def learned(self) -> dict[str, Tensor]:
        """Per training row: mean weight (1: unchanged) and count; ``scalars`` (3,) alpha, beta,
        delta."""
        own = {**self.means.learned(), "scalars": self.get_buffer("scalars")}
        return {**super().learned(), **own}

    def learning(self) -> dict[str, float]:
        """The median over rows of how far the mean weight is from that of the first scalars."""
        return {**super().learning(), **self.means.learning()}

    def _learn(self, meta: Batch, ctx: Context) -> dict[str, Tensor]:
        """A step of gradient descent on the scalars; the weighted loss of the meta rows."""
        with torch.no_grad():
            logits = evaluate(ctx.model, {}, meta.x)
            losses = ctx.task.losses(logits, meta.y)
        with torch.enable_grad():
            scalars = self.get_buffer("scalars").detach().requires_grad_()
            loss = (difficulty(logits, meta.y, scalars) * losses).mean()
            (gradient,) = torch.autograd.grad(loss, scalars)
        scalars = scalars.detach()
        self.scalars = scalars - self.learning_rate * (gradient + self.weight_decay * scalars)
        return {"meta_loss": loss.detach()}

    def _audit(self, factor: Tensor, told: dict[str, Tensor], ctx: Context) -> None:
        """Log the scalars and the weights of a batch, before they are scaled to its total."""
        alpha, beta, delta = self.get_buffer("scalars").tolist()
        ctx.log(
            alpha=alpha,
            beta=beta,
            delta=delta,
            weight_mean=float(factor.mean()),
            weight_spread=float(factor.std() / factor.mean()),
            **{name: float(value) for name, value in told.items()},
        )


def difficulty(logits: Tensor, y: Tensor, scalars: Tensor) -> Tensor:
    """LiLAW's weight of each row (B,), from logits (B, K), targets (B, K) and scalars (3,)."""
    s = logits.softmax(dim=1)
    label, largest = (s * y).sum(dim=1), s.amax(dim=1)
    alpha, beta, delta = scalars.unbind()
    easy, hard = torch.sigmoid(alpha * label - largest), torch.sigmoid(largest - beta * label)
    return easy + hard + torch.exp(-((delta * label - largest).square()) / 2)


def look_ahead(
    loss: Tensor, meta: Batch, ctx: Context, precondition: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """Meta loss after one step down ``loss``, and its gradient times the step's rates, by name.

    The rate of a parameter is its learning rate in the optimiser (0 where it has none), with
    ``precondition`` times that of Adam. The graph of ``loss`` is kept; the network does not change.
    """
    found = ctx.optimizer.param_groups
    rates: dict[nn.Parameter, Any] = {each: g["lr"] for g in found for each in g["params"]}
    if precondition:
        for parameter, diagonal in adam_diagonal(ctx.optimizer).items():
            rates[parameter] = rates[parameter] * diagonal
    named = ctx.model.named_parameters()
    own = {name: each for name, each in named if each.requires_grad and each in rates}
    step = torch.autograd.grad(loss, list(own.values()), retain_graph=True, allow_unused=True)
    ahead: dict[str, Tensor] = {}
    for (name, each), gradient in zip(own.items(), step, strict=True):
        moved = each.detach() if gradient is None else each.detach() - rates[each] * gradient
        ahead[name] = moved.requires_grad_()
    meta_loss = ctx.task.losses(evaluate(ctx.model, ahead, meta.x), meta.y).mean()
    gradients = torch.autograd.grad(meta_loss, list(ahead.values()), allow_unused=True)
    tangent = {
        name: torch.zeros_like(each) if gradient is None else rates[each] * gradient
        for (name, each), gradient in zip(own.items(), gradients, strict=True)
    }
    return meta_loss.detach(), tangent


def _forward(x: Tensor, ctx: Context) -> tuple[Tensor | None, Tensor]:
    """Logits to return, and logits (B, K) with graph to learn from.

    Under autocast or ``torch.compile`` these are of another pass in float32, as are the meta rows'.
    """
    if ctx.repeatable:
        logits = ctx.forward(x)
        return logits, logits
    with ctx.replay():
        return None, evaluate(ctx.model, {}, x)


def _check_rates(learning_rate: float, weight_decay: float) -> None:
    for name, value in (("learning_rate", learning_rate), ("weight_decay", weight_decay)):
        if value < 0:
            raise ValueError(f"{name}: expected 0 or more, got {value}")
