"""SAFLEX: weights and soft labels of augmented rows, refined by the gradient on meta rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from methods.base import ANYTHING, Batch, Context, Method, Model, Task, exclusive
from methods.functional import (
    buffers_of,
    check_meta_batch,
    clean_share,
    directional,
    evaluate,
    joined,
    meta_rows,
    parted,
    reweighted,
    rows_of,
    unclean,
)

Labels = Literal["gumbel", "argmax", "keep", "prox"]
Weights = Literal["step", "relu", "one"]
Scale = Literal["none", "std", "max"]
CHUNK = 512
"""Meta rows per forward pass."""
STABLE = {
    "clean_fraction": 0.0,
    "derivative": "difference",
    "labels": "prox",
    "meta_batch": 2.0,
    "precondition": True,
    "refresh": 4,
    "scale": "std",
    "stratified": True,
}


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How scores become labels and weights."""

    labels: Labels = "gumbel"
    weights: Weights = "step"
    beta: float = 0.0
    tau: float = 0.01
    scale: Scale = "none"
    eps: float = 0.3
    eta: float = 0.5
    renormalise: bool = True

    def __post_init__(self) -> None:
        if self.tau <= 0:
            raise ValueError(f"tau: expected a number above 0, got {self.tau}")
        if not 0 <= self.eps <= 1:
            raise ValueError(f"eps: expected a number in [0, 1], got {self.eps}")
        for name in ("beta", "eta"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected 0 or more, got {getattr(self, name)}")


class Scores(NamedTuple):
    """First-order gain of each row for a step along minus the meta gradient."""

    labels: Tensor
    """(B, K) S: derivative of the gain with respect to the target."""
    gain: Tensor
    """(B,) of the row with its current target."""


class Refined(NamedTuple):
    """Refined targets and weights of a batch."""

    y: Tensor
    """(B, K)"""
    w: Tensor
    """(B,)"""
    gain: Tensor
    """(B,) of the row with its new target."""
    factor: Tensor
    """(B,) before renormalisation: 0 or 1 under ``step``."""


def score(task: Task, logits: Tensor, slope: Tensor, y: Tensor) -> Scores:
    """Scores of a batch from its logits (B, K) and their derivative (B, K) along the meta gradient.

    The gain of a row is the derivative of its own loss along the meta gradient g: the meta loss
    falls by learning rate times weight times gain. As losses are affine in the target, so is the
    gain, and S is its slope: - J g with J the Jacobian of log-softmax for MultiClass, where the
    gain is S.y (Eq. 7 with its minus sign); - dz_k / K for MultiLabel.
    """
    with torch.enable_grad():
        z, target = logits.detach().requires_grad_(), y.detach().requires_grad_()
        (residual,) = torch.autograd.grad(task.losses(z, target).sum(), z, create_graph=True)
        gain = (residual * slope.detach()).sum(dim=1)
        (labels,) = torch.autograd.grad(gain.sum(), target)
    return Scores(labels, gain.detach())


def refine(
    rules: Rules, task: Task, scores: Scores, y: Tensor, w: Tensor, logits: Tensor
) -> Refined:
    """New targets (B, K) and weights (B,) of a batch from its scores (Algorithm 1 and variants).

    Only ``prox`` uses ``logits`` (B, K). ``renormalise`` keeps the total of the weights; if every
    factor is 0, the weights stay unchanged.
    """
    one = exclusive(task)
    y_new = _labels(rules, task, scores.labels, y, logits, one)
    gain = scores.gain + ((y_new - y) * scores.labels).sum(dim=1)
    if rules.weights == "step":
        factor = (gain >= 0).to(w.dtype)
    elif rules.weights == "relu":
        factor = gain.clamp_min(0).to(w.dtype)
    else:
        factor = torch.ones_like(w)
    weighed = reweighted(w, factor) if rules.renormalise else w * factor
    return Refined(y_new, weighed, gain, factor)


def _labels(rules: Rules, task: Task, raw: Tensor, y: Tensor, logits: Tensor, one: bool) -> Tensor:
    """New targets (B, K); with several labels per row, each entry is decided on its own.

    An entry is then a choice between two classes: beta counts for or against it, and its noise is
    logistic, the difference of two Gumbel variables. As the training and the
    meta loss are means over K labels, its own score is K^2 S, that of their sums: noise, beta and
    prior do not shrink with the number of labels either.
    """
    if rules.labels == "keep":
        return y
    scaled = _scaled(raw if one else y.shape[1] ** 2 * raw, rules.scale)
    if rules.labels == "prox":
        q = (1 - rules.eps) * y + rules.eps * task.labels(logits.detach(), 1.0)
        q = q.clamp_min(torch.finfo(q.dtype).tiny)
        prior = q.log() if one else q.log() - (1 - q).clamp_min(torch.finfo(q.dtype).tiny).log()
        return task.labels(prior + rules.eta * scaled, 1.0)
    scaled = scaled + rules.beta * (y if one else 2 * y - 1)
    if rules.labels == "gumbel":
        noise = _gumbel(scaled) if one else _gumbel(scaled) - _gumbel(scaled)
        return task.labels(scaled + noise, rules.tau)
    if one:
        return torch.zeros_like(y).scatter_(1, scaled.argmax(dim=1, keepdim=True), 1.0)
    return (scaled > 0).to(y.dtype)


def _scaled(raw: Tensor, scale: Scale) -> Tensor:
    if scale == "none":
        return raw
    size = raw.std() if scale == "std" else raw.abs().max()
    return raw / size.clamp_min(torch.finfo(raw.dtype).tiny)


def _gumbel(like: Tensor) -> Tensor:
    wait = torch.empty_like(like).exponential_()
    return -wait.clamp_min(torch.finfo(like.dtype).tiny).log()


class Pairs(NamedTuple):
    """Refined rows and columns of a contrastive batch: images over texts, texts over images."""

    rows: Refined
    columns: Refined


def refine_pairs(
    rules: Rules, task: Task, logits: Tensor, slope: Tensor, text: Tensor, w: Tensor
) -> Pairs:
    """Targets and weights of a contrastive batch, for images and for texts (Eq. 13-14).

    ``logits`` (B, B) are image-text similarities divided by the temperature, ``slope`` their
    derivative along the meta gradient, ``text`` (B,) identifies the texts: equal ones share target
    and score. The refined loss is w @ losses(logits, y) + u @ losses(logits.T, y') with ``task``
    MultiClass; ``w`` (B,) are the previous weights of both terms.

    **Deviations.** The paper writes out only the first term (Eq. 14), as an example; the index of
    its denominator is read as that of the sum. ``gumbel`` draws noise per pair, so a text that
    several pairs share is more likely.
    """
    same = (text[:, None] == text[None, :]).to(logits.dtype)
    shared = same / same.sum(dim=1, keepdim=True)
    parts = []
    for z, dz in ((logits, slope), (logits.T, slope.T)):
        scores = score(task, z, dz, shared)
        scores = Scores(scores.labels @ shared, scores.gain)
        refined = refine(rules, task, scores, shared, w, z)
        parts.append(refined._replace(y=refined.y @ shared))
    return Pairs(*parts)


def unsuited(model: Model, stages: int) -> str:
    """The reason why the last ``stages`` stages cannot be run alone, or an empty string."""
    count = len(model.pieces())
    if not stages or stages < count:
        return ""
    if count:
        return f"stages: expected fewer than the {count} of the network, got {stages}"
    return (
        f"stages: expected 0, got {stages}, because the stages of the network are not chains of "
        "modules that run alone"
    )


class Tail(nn.Module):
    """The end of a network: its last ``stages`` stages and the head, applied to stage outputs."""

    def __init__(self, model: Model, stages: int) -> None:
        super().__init__()
        self.model = model
        reason = unsuited(model, stages)
        if reason:
            raise ValueError(reason)
        self._first = len(model.pieces()) - stages
        self._stages = stages

    def own(self) -> list[str]:
        """The network's names of the parameters in this part."""
        last = {id(each) for stage in self._last() for each in stage.parameters()}
        return [
            name
            for name, each in self.model.named_parameters()
            if not name.startswith("trunk.") or id(each) in last
        ]

    def forward(self, features: list[Tensor]) -> Tensor:
        """Logits (B, K) from all stage outputs; the last stages are recomputed."""
        if self._stages:
            features = features[: -self._stages]
            for stage in self._last():
                features = [*features, stage(features[-1])]
        return self.model.head(self.model.embed(features))

    def _last(self) -> list[nn.Module]:
        return self.model.pieces()[self._first :] if self._stages else []


class Saflex(Method):
    """Weights and soft labels of an upstream's rows, refined by the gradient on meta rows.

    Before each step let g be the gradient of the mean loss over a batch of meta rows. Row i with
    logits z_i has scores S_i = - J_i g, J_i the Jacobian of log-softmax(z_i): a small SGD step with
    target y_i and weight w_i lowers the meta loss by the learning rate times w_i S_i.y_i. The
    scores give a new target (``labels``), and the gain S_i.y_i with this target gives a factor on
    the weight (``weights``); the total weight stays the same.

    ``labels``: ``gumbel`` softmax((S + beta y + Gumbel noise) / tau), Algorithm 1; ``argmax`` of
    S + beta y, Theorem 1; ``keep``; ``prox`` proportional to q exp(eta S), q = (1 - eps) y + eps p
    with the network's own p. ``weights``: ``step`` is 1 if the gain is 0 or more, else 0; ``relu``
    is the gain if positive, else 0; ``one``. With several labels per row, each is decided on its
    own by K^2 S, as both losses are means over labels. ``scale`` divides S by its standard
    deviation or largest magnitude over the batch. A share ``clean_fraction`` of a batch bypasses
    the upstream and is not scored (Eq. 3 trains on both). ``meta_batch`` is in training batches (2:
    twice as many rows), or ``full``; ``stratified`` draws it with the class shares; its gradient is
    used for ``refresh`` steps. ``precondition`` multiplies g by 1 / (sqrt(v) + eps), v Adam's
    second moments, if the optimiser has them. ``derivative``: ``dual`` is exact, ``difference``
    reuses the training forward pass. ``stages`` uses only the head and this many of the last stages
    (0: the head). With ``only_added`` it scores only the rows that the upstream adds to a batch,
    such as the unlabelled ones of fixmatch; the others keep target and weight.

    ``preset=stable`` is our variant, not the paper's; ``preset=fast`` is the same on the last
    stage.

    **Deviations.** Eq. 8 and Algorithm 1 lack the minus that Eq. 7 has: the printed sign picks the
    label that raises the meta loss most. Scores use log-softmax; "softmax applied on outputs" is
    not the loss being trained. If all factors are 0, weights stay unchanged. The meta gradient uses
    the batch statistics of the meta rows, as training uses its own, in float32 and with dropout on;
    running statistics do not change.
    """

    kinds = ANYTHING
    before_forward = task_loss = True
    source = "Ding et al., SAFLEX, ICLR 2024, arXiv:2410.02512"
    needs = frozenset({"meta"})
    version = 4
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "published": {},
        "stable": STABLE,
        "fast": {**STABLE, "stages": 1},
    }
    costs: Mapping[str, float] = {"published": 3.0, "stable": 1.9, "fast": 1.4}
    space: ClassVar[Mapping[str, Any]] = {
        "labels": ("choice", ["gumbel", "keep", "prox"]),
        "beta": ("uniform", 0.0, 4.0),
        "meta_batch": ("choice", [0.25, 1.0, 2.0, 4.0]),
        "refresh": ("choice", [1, 2, 4]),
        "precondition": ("choice", [False, True]),
        "clean_fraction": ("choice", [0.0, 0.5]),
    }
    hands_logits = True
    audit_every = 25
    """Interval of the logged diagnostics, in steps; each epoch starts with one."""

    def __init__(
        self,
        *,
        upstream: Method | None = None,
        labels: Labels = "gumbel",
        weights: Weights = "step",
        beta: float = 0.0,
        tau: float = 0.01,
        scale: Scale = "none",
        eps: float = 0.3,
        eta: float = 0.5,
        renormalise: bool = True,
        clean_fraction: float = 0.5,
        meta_batch: float | Literal["full"] = 1.0,
        stratified: bool = False,
        refresh: int = 1,
        precondition: bool = False,
        derivative: Literal["dual", "difference"] = "dual",
        stages: int | None = None,
        only_added: bool = False,
    ) -> None:
        super().__init__(upstream)
        if only_added and upstream is None:
            raise ValueError(
                "only_added: expected an upstream that adds rows, such as fixmatch, got none"
            )
        if refresh < 1:
            raise ValueError(f"refresh: expected 1 or more steps, got {refresh}")
        if stages is not None and stages < 0:
            raise ValueError(f"stages: expected 0 (the head alone) or more, got {stages}")
        self.rules = Rules(
            labels=labels,
            weights=weights,
            beta=beta,
            tau=tau,
            scale=scale,
            eps=eps,
            eta=eta,
            renormalise=renormalise,
        )
        self.clean_fraction = clean_share(clean_fraction)
        self.meta_batch = check_meta_batch(meta_batch)
        self.stratified, self.refresh = stratified, refresh
        self.precondition, self.derivative = precondition, derivative
        self.stages, self.only_added = stages, only_added
        self.controls = tuple(self._controls())
        self._tangent: dict[str, Tensor] = {}
        self._steps = 0  # of this epoch
        self._foreseen: _Foreseen | None = None
        self._unsupported = False
        self._distance = 2
        self._names: list[str] = []

    def _controls(self) -> Iterator[str]:
        """What takes away the learning of both, of weights, and of labels."""
        rules, clean = self.rules, self.clean_fraction
        frozen = f"frozen(upstream=saflex(clean_fraction={clean}, upstream={{upstream}}))"
        yield frozen
        if rules.weights != "one":
            yield "shuffled_weights(upstream={self})"
        if self.only_added:  # what follows changes the labels of the other rows too
            return
        if rules.labels in ("gumbel", "argmax"):
            yield f"random_label(clean_fraction={clean}, upstream={{upstream}})"
        elif rules.labels == "prox":
            yield f"self_distil(clean_fraction={clean}, eps={rules.eps}, upstream={{upstream}})"
        yield f"head_refit(upstream={frozen})"

    def requires(self) -> frozenset[str]:
        """Meta rows; with ``stages`` a network whose stages are accessible."""
        return super().requires() | ({"features"} if self.stages is not None else set())

    def fits(self, model: nn.Module) -> str:
        """With ``stages`` a network that has more of them, each a chain of modules."""
        if self.stages and isinstance(model, Model):
            reason = unsuited(model, self.stages)
            if reason:
                return f"{reason}: set stages=0, which uses the head alone, or leave it out"
        return super().fits(model)

    def setup(self, ctx: Context) -> None:
        """Allocate the running means of each row."""
        super().setup(ctx)
        rows, device = ctx.spec.rows, ctx.train.targets.device
        self.register_buffer("seen", torch.zeros(rows, device=device))
        self.register_buffer("weight_sum", torch.zeros(rows, device=device))
        self.register_buffer("label_sum", torch.zeros(rows, ctx.spec.classes, device=device))
        self.register_buffer("given_sum", torch.zeros(rows, ctx.spec.classes, device=device))
        self._distance = 2 if exclusive(ctx.task) else ctx.spec.classes
        names = [name for name, each in ctx.model.named_parameters() if each.requires_grad]
        if self.stages is not None and not isinstance(ctx.model, Model):
            raise TypeError("stages: expected a methods.base.Model, whose stages are accessible")
        if self.stages is not None:
            own = set(Tail(cast("Model", ctx.model), self.stages).own())
            names = [name for name in names if name in own]
        self._names = names

    def begin_epoch(self, ctx: Context) -> None:
        """Drop the meta gradient."""
        super().begin_epoch(ctx)
        self._tangent, self._steps, self._foreseen = {}, 0, None

    def weighted(self, rows: int) -> int:
        """All but the clean rows."""
        return unclean(rows, self.clean_fraction)

    def augment(self, batch: Batch, ctx: Context) -> Batch:
        """The upstream's rows with new targets and weights, then the unchanged clean rows."""
        part, clean = parted(batch, self.weighted(len(batch)))
        first = len(part) if self.only_added else 0
        if self.upstream is not None:
            part = self.upstream.augment(part, ctx)
        if part.logits is not None:
            raise ValueError("the upstream of saflex has already run this step's forward pass")
        whole = joined(part, clean)
        part = rows_of(part, slice(first, None))
        if self.frozen or not len(part):
            self._remember(part, part.y, part.w)
            return whole
        if self._steps % self.refresh == 0:
            self._tangent = self._direction(len(batch), ctx)
        given, logits, slope = self._slope(whole.x, ctx)
        own = slice(first, first + len(part))
        scores = score(ctx.task, logits[own], slope[own], part.y)
        refined = refine(self.rules, ctx.task, scores, part.y, part.w, logits[own])
        self._remember(part, refined.y, refined.w)
        if self._steps % self.audit_every == 0:
            with ctx.uncharged():
                self._audit(part, refined, len(batch), ctx)
        elif self._foreseen is not None:
            with ctx.uncharged():
                self._look_back(self._foreseen, ctx)
            self._foreseen = None
        self._steps += 1
        y, w = whole.y.clone(), whole.w.clone()
        y[own], w[own] = refined.y, refined.w
        return replace(whole, y=y, w=w, logits=given)

    def get_extra_state(self) -> dict[str, bool]:
        """State that a resumed run must not determine again."""
        return {"unsupported": self._unsupported}

    def set_extra_state(self, state: dict[str, bool]) -> None:
        """Restore it."""
        self._unsupported = state["unsupported"]

    def learned(self) -> dict[str, Tensor]:
        """Per training row: running means of weight (1: unchanged) and label, and their count."""
        seen = self.get_buffer("seen")
        count = seen.clamp_min(1)
        means = {
            "weight": self.get_buffer("weight_sum") / count,
            "label": self.get_buffer("label_sum") / count[:, None],
            "seen": seen,
        }
        return {**super().learned(), **means}

    def learning(self) -> dict[str, float]:
        """The median over rows of how far the mean weight is from 1, and the label from the given.

        The distance of labels is the total variation; with several labels a row, the mean absolute
        difference.
        """
        seen = self.get_buffer("seen")
        was = seen > 0
        if not bool(was.any()):
            return super().learning()
        count = seen[was]
        weight = (self.get_buffer("weight_sum")[was] / count - 1).abs()
        change = (self.get_buffer("label_sum") - self.get_buffer("given_sum"))[was].abs()
        label = change.sum(dim=1) / self._distance / count
        found = {"weight": float(weight.median()), "label": float(label.median())}
        return {**super().learning(), **found}

    def _slope(self, x: Tensor, ctx: Context) -> tuple[Tensor | None, Tensor, Tensor]:
        """Logits to return, logits (B, K), and their derivative (B, K) along the tangent."""
        given: Tensor | None = None
        network, inputs, tangent = ctx.model, x, self._tangent
        if self.stages is not None:
            given, inputs = self._features(x, cast("Model", ctx.model), ctx)
            network = Tail(cast("Model", ctx.model), self.stages)
            tangent = {f"model.{name}": part for name, part in tangent.items()}
        if self.derivative == "dual" and not self._unsupported:
            try:
                with ctx.replay():
                    return given, *directional(network, inputs, tangent, how="dual")
            except NotImplementedError:  # an operator without forward-mode differentiation
                self._unsupported = True
        # A difference to bfloat16 logits would be rounding error, and dropout masks in a tail would
        # differ from those of the forward pass.
        primal = buffers = None
        if self.stages is None and ctx.repeatable:
            buffers = buffers_of(network)
            given = ctx.forward(x)
            primal = given.detach()
        with ctx.replay():
            slope = directional(
                network, inputs, tangent, how="difference", primal=primal, buffers=buffers
            )
        return given, *slope

    def _features(
        self, x: Tensor, model: Model, ctx: Context
    ) -> tuple[Tensor | None, list[Tensor]]:
        """Logits to return, and the stage outputs of the training forward pass."""
        if not ctx.repeatable:
            with ctx.replay(), torch.no_grad():
                return None, cast("list[Tensor]", evaluate(model.trunk, {}, x))
        held: list[Tensor] = []
        hook = model.trunk.register_forward_hook(
            lambda _, __, outputs: held.extend(cast("list[Tensor]", outputs))
        )
        try:
            given = ctx.forward(x)
        finally:
            hook.remove()
        return given, [each.detach() for each in held]

    def _meta(self, rows: int, ctx: Context) -> Batch:
        """A batch of meta rows for training batches of ``rows`` rows."""
        return meta_rows("saflex", ctx, self.meta_batch, rows, self.stratified)

    def _direction(self, rows: int, ctx: Context) -> dict[str, Tensor]:
        """The meta gradient by parameter name, preconditioned if ``precondition`` is set."""
        _, gradient = self._gradient(self._meta(rows, ctx), ctx)
        if not self.precondition:
            return gradient
        diagonal = adam_diagonal(ctx.optimizer)
        named = dict(ctx.model.named_parameters())
        return {
            name: part * diagonal[named[name]] if named[name] in diagonal else part
            for name, part in gradient.items()
        }

    def _gradient(self, batch: Batch, ctx: Context) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss of meta rows and its gradient by parameter name."""
        chosen = dict(_chosen(ctx.model, self._names))
        loss = batch.w.new_zeros(())
        sums = {name: torch.zeros_like(each) for name, each in chosen.items()}
        with torch.enable_grad():
            for part in self._losses(batch, ctx):
                found = torch.autograd.grad(part, list(chosen.values()), allow_unused=True)
                loss = loss + part.detach()
                for name, gradient in zip(chosen, found, strict=True):
                    if gradient is not None:
                        sums[name] += gradient
        return loss, sums

    def _losses(self, batch: Batch, ctx: Context) -> Iterator[Tensor]:
        """The mean loss of meta rows, in parts small enough for memory."""
        own = set(self._names)
        others = {n: each.detach() for n, each in ctx.model.named_parameters() if n not in own}
        parts = -(-len(batch) // CHUNK)
        for rows in torch.arange(len(batch), device="cpu").chunk(parts):
            some = rows_of(batch, slice(int(rows[0]), int(rows[-1]) + 1))
            logits = evaluate(ctx.model, others, some.x)
            yield ctx.task.losses(logits, some.y).sum() / len(batch)

    def _remember(self, part: Batch, y: Tensor, w: Tensor) -> None:
        """Update the running means; added rows (index -1) do not count."""
        known = (part.index >= 0).float()
        place = part.index.clamp_min(0)
        share = w / torch.where(part.w > 0, part.w, torch.ones_like(part.w))
        self.get_buffer("seen").index_add_(0, place, known)
        self.get_buffer("weight_sum").index_add_(0, place, known * share.float())
        self.get_buffer("label_sum").index_add_(0, place, known[:, None] * y.float())
        self.get_buffer("given_sum").index_add_(0, place, known[:, None] * part.y.float())

    def _audit(self, part: Batch, refined: Refined, rows: int, ctx: Context) -> None:
        """Log what the method does to this batch, and predict the step's effect on meta rows."""
        one, y = exclusive(ctx.task), refined.y
        if one:
            kept = (y.argmax(dim=1) == part.y.argmax(dim=1)).float().mean()
            entropy = torch.special.entr(y).sum(dim=1).mean()
        else:
            kept = ((y > 0.5) == (part.y > 0.5)).float().mean()
            entropy = (torch.special.entr(y) + torch.special.entr(1 - y)).mean()
        meta = self._meta(rows, ctx)
        torch.manual_seed(0)  # for the same dropout masks in _look_back
        loss, gradient = self._gradient(meta, ctx)
        diagonal = adam_diagonal(ctx.optimizer)
        rate = ctx.optimizer.param_groups[0]["lr"]
        told = {
            "labels_kept": kept,
            "weights_above_0": (refined.w > 0).float().mean(),
            "label_entropy": entropy,
            "gain": refined.gain.mean(),
            # exact for a small SGD step; with precondition for Adam's, except for its momentum
            "meta_change_by_scores": -rate * (refined.w * refined.gain).sum(),
            "preconditioned": torch.tensor(float(self.precondition and bool(diagonal))),
            "dual_unsupported": torch.tensor(float(self._unsupported)),
            "difference_apart": torch.tensor(float(not ctx.repeatable)),
        }
        if len(meta) >= 4:
            halves = [
                torch.cat([each.flatten() for each in self._gradient(half, ctx)[1].values()])
                for half in (rows_of(meta, slice(0, None, 2)), rows_of(meta, slice(1, None, 2)))
            ]
            told["meta_gradient_cosine"] = torch.cosine_similarity(*halves, dim=0)
        ctx.log(**{name: float(value) for name, value in told.items()})
        before = {name: each.detach().clone() for name, each in _chosen(ctx.model, self._names)}
        self._foreseen = _Foreseen(meta, loss, gradient, before)

    def _look_back(self, foreseen: _Foreseen, ctx: Context) -> None:
        """Log the last step's change of the meta loss, to first order and as measured."""
        moved = {
            name: each.detach() - foreseen.parameters[name]
            for name, each in _chosen(ctx.model, self._names)
        }
        parts = [(foreseen.gradient[name] * step).sum() for name, step in moved.items()]
        torch.manual_seed(0)
        with torch.no_grad():
            loss = torch.stack(list(self._losses(foreseen.meta, ctx))).sum()
        ctx.log(
            meta_change_predicted=float(torch.stack(parts).sum()),
            meta_change=float(loss - foreseen.loss),
        )


class _Foreseen(NamedTuple):
    """What is needed to measure a step's effect on the meta loss."""

    meta: Batch
    loss: Tensor
    gradient: dict[str, Tensor]
    parameters: dict[str, Tensor]


def _chosen(model: nn.Module, names: list[str]) -> list[tuple[str, nn.Parameter]]:
    named = dict(model.named_parameters())
    return [(name, named[name]) for name in names]


def adam_diagonal(optimizer: Optimizer) -> dict[nn.Parameter, Tensor]:
    """1 / (sqrt(v / (1 - beta2^t)) + eps) by parameter: how Adam's step responds to a gradient.

    It is 0 where v is 0: weights that no training row has ever affected (such as that of a pixel
    that is always black) would have a factor of 1 / eps and outweigh everything else. Parameters
    without a step so far, or without second moments, are left out.
    """
    found: dict[nn.Parameter, Tensor] = {}
    every = cast("Any", torch)  # one launch for all parameters; torch's stubs lack these functions
    for group in optimizer.param_groups:
        alike: dict[float, list[nn.Parameter]] = {}  # by step, which is on the CPU
        for parameter in group["params"]:
            state: Mapping[str, Tensor] = optimizer.state.get(parameter, {})
            if "exp_avg_sq" in state:
                left = float(1 - group["betas"][1] ** state["step"])
                alike.setdefault(left, []).append(parameter)
        for left, parameters in alike.items():
            moments = [optimizer.state[parameter]["exp_avg_sq"] for parameter in parameters]
            v = every._foreach_div(moments, left)
            below = every._foreach_add(every._foreach_sqrt(v), group["eps"])
            parts: list[Tensor] = every._foreach_div(every._foreach_sign(v), below)
            found.update(zip(parameters, parts, strict=True))
    return found


def l2rw(
    *,
    upstream: Method | None = None,
    meta_batch: float | Literal["full"] = 1.0,
    clean_fraction: float = 0.0,
    derivative: Literal["dual", "difference"] = "dual",
) -> Saflex:
    """Learning to reweight: keep the label; the weight is the gain if positive, else 0.

    That is SAFLEX with ``labels=keep`` and ``weights=relu``: one look-ahead SGD step, to first
    order, which is exact for this rule.

    **Deviations.** If no row has a positive gain, weights stay unchanged; in the paper all are 0.

    Source: Ren et al., Learning to Reweight Examples, ICML 2018, arXiv:1803.09050
    """
    method = Saflex(
        upstream=upstream,
        labels="keep",
        weights="relu",
        meta_batch=meta_batch,
        clean_fraction=clean_fraction,
        derivative=derivative,
    )
    method.costs = {"published": 3.2}
    return method
