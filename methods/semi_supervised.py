"""Learning from rows without labels: FixMatch, with LP-A3 in it, MixMatch and Mean Teacher."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from methods.base import (
    ANYTHING,
    Batch,
    Chain,
    Context,
    Method,
    Spec,
    Task,
    named,
    overrides,
)
from methods.branches import on_branch
from methods.classic import RandomErasing, SoftAugmentation
from methods.functional import beta, buffers_kept, joined, per_row, stacked, widened
from methods.learner import Learner, follow
from methods.lpa3 import Lpa3
from methods.randaugment import RandAugment

ONE_LABEL = ANYTHING - {"labels"}
VIEWS = 2
"""Weak views of an unlabelled row; MixMatch averages the predictions for them."""
LOG_EVERY = 25
"""steps"""
RAMP = 0.25
"""The share of a run in which the weight of unlabelled rows rises."""


def each_row_alone(argument: str, method: Method | None) -> Method | None:
    """The method, if it changes each row by itself, without the network, and learns nothing.

    Raises:
        ValueError: it does more.
    """
    if method is None:
        return None
    parts = list(method.parts())
    more = any(
        part.mixes_rows or part.comes_first or part.hands_logits or part.before_forward
        for part in parts
    )
    if more or method.requires() or overrides(method, "losses"):
        raise ValueError(
            f"{argument}: expected a method that changes each row by itself and learns nothing, "
            f"such as crop+flip or randaugment, got {named(parts[-1])}"
        )
    return method


def view(method: Method | None, batch: Batch, ctx: Context) -> Batch:
    """The batch after a method that may be none."""
    return batch if method is None else method.augment(batch, ctx)


def unlabelled_rows(name: str, ctx: Context, rows: int) -> Batch:
    """So many unlabelled rows, drawn without replacement; all of them if there are fewer.

    Raises:
        ValueError: the context has none.
    """
    if ctx.unlabelled is None:
        raise ValueError(f"{name} learns from unlabelled rows, but the context has none")
    return ctx.unlabelled.draw(rows)


@torch.no_grad()
def seen(model: nn.Module, x: Tensor) -> Tensor:
    """Logits (B, K) as a training step sees them; running statistics stay as they are."""
    with buffers_kept(model):
        return widened(model(x))


def guess(model: nn.Module, x: Tensor) -> Tensor:
    """Probabilities (B, K), likewise."""
    return seen(model, x).softmax(dim=1)


def sharpened(p: Tensor, temperature: float) -> Tensor:
    """p_k^(1/T) / sum_j p_j^(1/T), (B, K) (MixMatch, Eq. 7)."""
    return (p.clamp_min(torch.finfo(p.dtype).tiny).log() / temperature).softmax(dim=1)


class FixMatch(Method):
    """Learn from unlabelled rows: a strong change keeps the class that a weak one surely shows.

    A step has B labelled rows x and ``mu`` B unlabelled rows u, drawn afresh. ``upstream`` is the
    weak change, and q the network's probabilities for upstream(u), without a gradient:

        loss = mean_x H(y, p(upstream(x)))
               + weight * mean_u 1[max q >= threshold] H(argmax q, p(strong(upstream(u))))

    (Eq. 3 and 4). ``strong`` changes a second weak view; without it, it is
    randaugment+random_erasing. The batch holds the labelled rows, then the unlabelled ones, which
    have indices of their own, so that a method over this one can keep state for each of them; rows
    below the threshold have weight 0 and index -1. Averaged weights, as published, are ``ema`` of
    the training.

    ``attack``, an lpa3, adds a third term (LP-A3, section 5.2): the rows that it makes of
    upstream(u), with label argmax q, where max q >= ``attack_threshold``; its ``weight`` multiplies
    the term. Most of the cost is that of the attack. ``attack_sure`` saves passes: lpa3 chooses its
    share of the weak rows by q, without a pass of its own, and rows above ``attack_threshold``
    before all others, so that a smaller ``ratio`` reaches them.

    **Deviations.** From the authors' code (C), google-research/fixmatch at bb377cb; the reasons
    stand in docs/methods/semi_supervised.md. ``strong`` is CTAugment or RandAugment, then Cutout,
    in C. Weak views have a forward pass of their own, in float32, whose batch statistics do not
    enter the running ones (C: one pass for all rows). Unlabelled rows are drawn afresh at each step
    from those without a label (C: passes over all rows, labelled ones too). Optimiser, schedule,
    weight decay and averaged weights are those of the training (C: SGD at .03, Nesterov momentum
    .9, cos(7 pi t / 16); .0005, on kernels alone; .999). The term of the attack is a mean over the
    attacked rows that pass ``attack_threshold``, times the share of all weak rows that do (LP-A3's
    code: of the attacked ones). From LP-A3's paper and code, with ``attack_sure``: they choose by
    time consistency among all rows, sure or not, and there it is that of the second set of norms.
    """

    kinds = ONE_LABEL
    needs = frozenset({"unlabelled"})
    before_forward = True
    controls = ("pseudo_label(upstream={self})",)
    extras = frozenset({"attack", "attack_sure", "attack_threshold"})
    costs: Mapping[str, float] = {"published": 11.6}
    source = "Sohn et al., FixMatch, NeurIPS 2020, arXiv:2001.07685"
    space: ClassVar = {
        "threshold": ("uniform", 0.8, 0.99),
        "weight": ("loguniform", 0.3, 3.0),
    }
    same_view: bool = False
    """Train on the weak view whose class was predicted; set by the control pseudo_label."""

    def __init__(
        self,
        *,
        upstream: Method | None = None,
        strong: Method | None = None,
        attack: Method | None = None,
        mu: int = 7,
        threshold: float = 0.95,
        attack_threshold: float = 0.9,
        attack_sure: bool = False,
        weight: float = 1.0,
    ) -> None:
        super().__init__(each_row_alone("upstream", upstream))
        if mu < 1:
            raise ValueError(f"mu: expected 1 or more, got {mu}")
        for name, value in (("threshold", threshold), ("attack_threshold", attack_threshold)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name}: expected a probability in [0, 1], got {value}")
        if not weight >= 0:
            raise ValueError(f"weight: expected a number of 0 or more, got {weight}")
        if attack is not None and (not isinstance(attack, Lpa3) or attack.upstream is not None):
            raise ValueError(
                f"attack: expected lpa3 without an upstream, such as lpa3(ratio=0.9), got "
                f"{named(attack)}"
            )
        self.mu, self.threshold, self.weight = mu, threshold, weight
        if attack_sure and attack is None:
            raise ValueError("attack_sure: expected attack=lpa3(...) with it, got none")
        self.attack_threshold, self.attack = attack_threshold, attack
        self.attack_sure = attack_sure
        given = each_row_alone("strong", strong)
        if given is not None and any(isinstance(part, SoftAugmentation) for part in given.parts()):
            raise ValueError(
                "strong: expected a method that leaves labels and weights alone, such as "
                "randaugment, got soft_augmentation"
            )
        self.strong = Chain([RandAugment(), RandomErasing()]) if given is None else given
        if attack is not None:
            self.hands_logits = attack.auxiliary_norm
            passes = 2 + 3 * mu + mu * attack.passes(chooses=not attack_sure)
            self.costs = {"published": round(passes / 2, 1)}
            if not attack_sure:
                self.waits = "lpa3 looks up which unlabelled rows have state"
            self.controls = ("norm_noise(upstream={self})", *self.controls)

    @property
    def _inner(self) -> list[Method]:
        """What it runs on unlabelled rows, beside the upstream."""
        return [self.strong, *([] if self.attack is None else [self.attack])]

    def parts(self) -> Iterator[Method]:
        """The upstream's, those of the methods that it runs on unlabelled rows, and itself."""
        if self.upstream is not None:
            yield from self.upstream.parts()
        for method in self._inner:
            yield from method.parts()
        yield self

    def requires(self) -> frozenset[str]:
        """Unlabelled rows, and what the attack needs."""
        return super().requires().union(*(method.requires() for method in self._inner))

    def supports(self, task: Task, spec: Spec) -> str:
        """One label per row, and what all its parts work on."""
        if self.attack is not None and any(spec.categories):
            return "fixmatch(attack) needs inputs that can be attacked, but columns are categories"
        inner = (method.supports(task, spec) for method in self._inner)
        return super().supports(task, spec) or next(filter(None, inner), "")

    def fits(self, model: nn.Module) -> str:
        """The first reason from any part."""
        inner = (method.fits(model) for method in self._inner)
        return super().fits(model) or next(filter(None, inner), "")

    def setup(self, ctx: Context) -> None:
        """Set up all parts."""
        super().setup(ctx)
        for method in self._inner:
            method.setup(ctx)

    def begin_epoch(self, ctx: Context) -> None:
        """Begin the epoch in all parts."""
        super().begin_epoch(ctx)
        for method in self._inner:
            method.begin_epoch(ctx)

    def augment(self, batch: Batch, ctx: Context) -> Batch:
        """The labelled rows, the unlabelled ones with predicted classes, then attacked ones."""
        drawn = unlabelled_rows("fixmatch", ctx, self.mu * len(batch))
        weak = view(self.upstream, drawn, ctx)
        logits = seen(ctx.model, weak.x)
        certainty, best = logits.softmax(dim=1).max(dim=1)
        y = F.one_hot(best, ctx.spec.classes).to(batch.y.dtype)
        sure = (certainty >= self.threshold).to(batch.w.dtype)
        strong = self.strong.augment(view(self.upstream, drawn, ctx), ctx)
        rows = replace(
            weak if self.same_view else strong,
            y=y,
            w=self.weight * sure * drawn.w,
            index=torch.where(sure > 0, drawn.index, -1),
        )
        out = joined(view(self.upstream, batch, ctx), rows)
        if ctx.step % LOG_EVERY == 0:
            with ctx.uncharged():
                ctx.log(sure=float(sure.mean()))
        if self.attack is None:
            return out
        attack = cast("Lpa3", self.attack)
        kept = (certainty >= self.attack_threshold).to(batch.w.dtype)
        rows = replace(weak, y=y, w=kept * drawn.w)
        made = attack.attacked(rows, ctx, logits if self.attack_sure else None)
        if not attack.auxiliary_norm:
            return joined(out, made)
        trained = ctx.forward(out.x)
        if len(made):
            with on_branch(ctx.model, 1):
                trained = torch.cat([trained, ctx.model(made.x)])
        return replace(joined(out, made), logits=trained)


class PseudoLabel(Method):
    """Train on the weak view of an unlabelled row with the class predicted for that same view.

    ``upstream`` is fixmatch with the settings to control for; its passes are the same. Where it
    beats this row, holding the predictions for two views together helps, not the label alone.

    **Deviations.** Lee has no threshold, and a weight of the unlabelled rows that rises with time:
    here both are those of ``upstream``, as is ``mu``, because a control may differ in one thing
    only. For the same reason the class is that of a pass of its own, with the statistics of the
    unlabelled rows alone, where a pass that is trained on would give it too.
    """

    kinds = ANYTHING
    control = True
    source = "Lee, Pseudo-Label, ICML workshop on challenges in representation learning, 2013"

    def __init__(self, *, upstream: Method | None = None) -> None:
        super().__init__(upstream)
        if isinstance(upstream, FixMatch):
            upstream.same_view = True

    def supports(self, task: Task, spec: Spec) -> str:
        """Only fixmatch."""
        if not isinstance(self.upstream, FixMatch):
            return "pseudo_label needs upstream=fixmatch, or fixmatch(...) with its own settings"
        return super().supports(task, spec)

    def augment(self, batch: Batch, ctx: Context) -> Batch:
        """The upstream's batch."""
        return self.upstream.augment(batch, ctx) if self.upstream is not None else batch


class MixMatch(Method):
    """Mix labelled rows and unlabelled ones, whose targets are the network's sharpened guesses.

    A step has B labelled rows and ``mu`` B unlabelled ones, each of them in two views of
    ``upstream``. The guess for an unlabelled row is the mean of the network's probabilities for its
    views, sharpened with ``temperature`` T: p_k^(1/T) / sum_j p_j^(1/T) (Eq. 6 and 7). Every row is
    mixed with a random one of all rows, x' = l x + (1 - l) x_other, and targets alike, l the larger
    of a draw of Beta(``alpha``, ``alpha``) and its complement (Eq. 8 to 11). The loss of labelled
    rows is the cross-entropy, that of unlabelled ones ``weight`` / K times the squared distance
    of probabilities and targets (Eq. 3 to 5); ``weight`` rises linearly in the first quarter of the
    epochs.

    **Deviations.** From the paper: the weight's rise is over 16,000 steps there. From the authors'
    code, google-research/mixmatch at 77bf67d: all mixed rows have one forward pass (there: one for
    each B of them, of which the first gives the running statistics); unlabelled rows are drawn
    afresh at each step; the optimiser, weight decay and averaged weights are the training's.
    """

    kinds = frozenset({"image", "vector"})
    needs = frozenset({"unlabelled"})
    before_forward = True
    mixes_rows = True
    hands_logits = True  # whoever came after it could not tell its labelled rows apart
    costs: Mapping[str, float] = {"published": 3.7}
    source = "Berthelot et al., MixMatch, NeurIPS 2019, arXiv:1905.02249"
    space: ClassVar = {
        "weight": ("loguniform", 10.0, 150.0),
        "alpha": ("uniform", 0.3, 1.0),
    }

    def __init__(
        self,
        *,
        upstream: Method | None = None,
        mu: int = 1,
        temperature: float = 0.5,
        alpha: float = 0.75,
        weight: float = 100.0,
    ) -> None:
        super().__init__(each_row_alone("upstream", upstream))
        if mu < 1:
            raise ValueError(f"mu: expected 1 or more, got {mu}")
        for name, value in (("temperature", temperature), ("alpha", alpha)):
            if not value > 0:
                raise ValueError(f"{name}: expected a number above 0, got {value}")
        if not weight >= 0:
            raise ValueError(f"weight: expected a number of 0 or more, got {weight}")
        self.mu, self.temperature, self.alpha, self.weight = mu, temperature, alpha, weight
        self._labelled = 0

    def augment(self, batch: Batch, ctx: Context) -> Batch:
        """The mixed labelled rows, then the mixed views of unlabelled ones."""
        drawn = unlabelled_rows("mixmatch", ctx, self.mu * len(batch))
        own = view(self.upstream, batch, ctx)
        views = [view(self.upstream, drawn, ctx) for _ in range(VIEWS)]
        guesses = torch.stack([guess(ctx.model, each.x) for each in views]).mean(dim=0)
        y = sharpened(guesses, self.temperature).to(batch.y.dtype)
        pooled = own
        for each in views:
            pooled = joined(pooled, replace(each, y=y, w=drawn.w / VIEWS))
        order = torch.randperm(len(pooled), device=pooled.w.device)
        share = beta(self.alpha, len(pooled), pooled.w)
        share = torch.maximum(share, 1 - share)
        x = per_row(share, pooled.x) * pooled.x + per_row(1 - share, pooled.x) * pooled.x[order]
        mixed = share[:, None] * pooled.y + (1 - share)[:, None] * pooled.y[order]
        self._labelled = len(own)
        return replace(pooled, x=x, y=mixed, logits=ctx.forward(x))

    def losses(self, logits: Tensor, batch: Batch, ctx: Context) -> Tensor:
        """Cross-entropy of labelled rows, the weighted squared distance of unlabelled ones."""
        count = self._labelled
        own = ctx.task.losses(logits[:count], batch.y[:count])
        apart = (logits[count:].softmax(dim=1) - batch.y[count:]).square().mean(dim=1)
        return torch.cat([own, self.weight * ramp(ctx, linear=True) * apart])


def ramp(ctx: Context, *, linear: bool) -> float:
    """The share of the weight of unlabelled rows in this epoch: it rises to 1.

    Linear, or exp(-5 (1 - t)^2) with t from 0 to 1 (Mean Teacher, appendix B.1).
    """
    done = min(1.0, ctx.epoch / max(1.0, RAMP * ctx.epochs))
    return done if linear else math.exp(-5 * (1 - done) ** 2)


class MeanTeacher(Learner):
    """Learn from unlabelled rows what a network of averaged weights predicts for them.

    A step has B labelled rows and ``mu`` B unlabelled ones, each in two views of ``upstream``: one
    for the network being trained, and one for the teacher, whose parameters are running means of
    the trained ones, which keep the share ``keep`` at each step. On all rows the squared distance
    of the two networks' probabilities, the mean over the classes, is added to the loss of the
    labelled rows with the factor ``weight``, which rises as exp(-5 (1 - t)^2) in the first quarter
    of the epochs. The predictions are the teacher's.

    **Deviations.** From the paper: the rise is over 40,000 of 150,000 steps there; dropout and
    noise on the inputs are those of the network and of ``upstream``, if any. From the authors'
    code, CuriousAI/mean-teacher at bd4313d: ``keep`` is constant (there lower at first), the loss
    of the labelled rows is their mean (there their sum divided by all rows), the teacher's running
    statistics are the network's, ``weight`` is the same however few labels there are, and the
    optimiser is the training's. ``ema`` of the training has no effect.
    """

    kinds = ONE_LABEL
    needs = frozenset({"unlabelled"})
    costs: Mapping[str, float] = {"published": 9.6}
    source = "Tarvainen and Valpola, Mean teachers, NeurIPS 2017, arXiv:1703.01780"
    space: ClassVar = {"weight": ("loguniform", 10.0, 300.0)}

    def __init__(
        self,
        *,
        upstream: Method | None = None,
        mu: int = 7,
        keep: float = 0.999,
        weight: float = 100.0,
    ) -> None:
        super().__init__(each_row_alone("upstream", upstream))
        if mu < 1:
            raise ValueError(f"mu: expected 1 or more, got {mu}")
        if not 0 <= keep < 1:
            raise ValueError(f"keep: expected a share in [0, 1), got {keep}")
        if not weight >= 0:
            raise ValueError(f"weight: expected a number of 0 or more, got {weight}")
        self.keep, self.weight = keep, weight
        self.views = Views(self.upstream, mu)
        self.teacher: nn.Module | None = None

    def setup(self, ctx: Context) -> None:
        """Set up the upstream, and the teacher as a copy of the network."""
        super().setup(ctx)
        self.teacher = copy.deepcopy(ctx.model).requires_grad_(False)

    def networks(self) -> Iterator[nn.Module]:
        """The teacher."""
        if self.teacher is not None:
            yield self.teacher

    def step(self, batch: Batch, ctx: Context) -> tuple[Tensor, Batch]:
        """A step on both losses; then the teacher follows."""
        teacher, rows = cast("nn.Module", self.teacher), len(batch)
        out = ctx.applied(self.views, batch)
        with torch.no_grad():
            goal = widened(teacher(self.views.other)).softmax(dim=1)
        logits = ctx.forward(out.x)
        apart = (logits.softmax(dim=1) - goal).square().mean(dim=1)
        own = ctx.task.losses(logits[:rows], out.y[:rows])
        even = torch.full_like(apart, 1 / len(apart))
        factor = self.weight * ramp(ctx, linear=False)
        loss = ctx.update(torch.cat([own, factor * apart]), torch.cat([out.w[:rows], even]))
        follow(teacher, ctx.model, self.keep)
        return loss, out

    def predictor(self, ctx: Context) -> nn.Module:
        """The teacher."""
        return ctx.model if self.teacher is None else self.teacher


class Views(Method):
    """Labelled and unlabelled rows in a view for training; ``other`` has a second view of each."""

    kinds = ONE_LABEL
    needs = frozenset({"unlabelled"})

    def __init__(self, upstream: Method | None, mu: int) -> None:
        super().__init__(upstream)
        self.mu = mu
        self.other = torch.zeros(0)

    def augment(self, batch: Batch, ctx: Context) -> Batch:
        """The labelled rows, then ``mu`` times as many unlabelled ones, without labels."""
        drawn = unlabelled_rows("mean_teacher", ctx, self.mu * len(batch))
        given = [batch, replace(drawn, y=torch.full_like(drawn.y, 1 / ctx.spec.classes))]
        one, other = ([view(self.upstream, each, ctx) for each in given] for _ in range(2))
        self.other = stacked([each.x for each in other])
        return joined(one[0], replace(one[1], w=torch.zeros_like(drawn.w)))
