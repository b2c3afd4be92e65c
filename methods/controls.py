"""Controls: rows that show whether a gain is due to the method itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from methods.base import ANYTHING, Batch, Context, Method, Model, Spec, Task, exclusive
from methods.functional import (
    clean_share,
    frozen,
    joined,
    mode,
    parted,
    stacked,
    unclean,
)
from methods.lpa3 import Lpa3
from methods.semi_supervised import FixMatch

DECAYS = (1e6, 100.0, 10.0, 1.0, 0.1, 0.01, 1e-3)
"""Weight decays that HeadRefit chooses from; the first keeps the head as it was trained."""
FOLDS = 5


class HeadRefit(Method):
    """Train with the upstream, then refit the last layer on the meta rows.

    A method that beats this row gains more than clean labels for the head alone can give. The refit
    starts from the trained head and minimises the mean loss over the meta rows plus
    ``weight_decay / 2`` times the squared distance of weights and biases from the trained ones, by
    L-BFGS in float64 on features in eval mode. ``chosen``: the weight decay of ``DECAYS`` with the
    lowest loss in a cross-validation over the meta rows (5 folds, stratified by label; of equal
    losses the largest decay). The largest leaves the head as it is, so rows that it has not seen
    are not expected to lose. The log has the decay as ``head_refit_decay``.
    """

    kinds = ANYTHING
    source = "Kirichenko et al., Last Layer Re-Training, ICLR 2023, arXiv:2204.02937"
    control = True
    version = 2
    needs = frozenset({"meta", "features"})

    def __init__(
        self,
        *,
        upstream: Method | None = None,
        weight_decay: float | Literal["chosen"] = "chosen",
        steps: int = 200,
    ) -> None:
        super().__init__(upstream)
        if not isinstance(weight_decay, str) and weight_decay < 0:
            raise ValueError(f"weight_decay: expected a number of 0 or more, got {weight_decay}")
        if steps < 1:
            raise ValueError(f"steps: expected a whole number above 0, got {steps}")
        self.weight_decay, self.steps = weight_decay, steps

    def augment(self, batch: Batch, ctx: Context) -> Batch:
        """The upstream's batch."""
        return self.upstream.augment(batch, ctx) if self.upstream is not None else batch

    def finish(self, ctx: Context) -> None:
        """Refit the head; the trunk and its buffers stay as they are."""
        super().finish(ctx)
        model, meta = ctx.model, ctx.meta
        if not isinstance(model, Model) or meta is None:
            raise TypeError("head_refit needs a methods.base.Model and meta rows")
        with mode(model, training=False), frozen(model), torch.no_grad():
            parts = [(model.embed(model.features(batch.x)), batch.y) for batch in meta.batches(256)]
        # On the CPU: the problem is small, and not every device has float64.
        inputs = torch.cat([features for features, _ in parts]).cpu().double()
        targets = torch.cat([y for _, y in parts]).cpu().double()
        trained = torch.cat([model.head.weight.detach(), model.head.bias.detach()[:, None]], dim=1)
        trained = trained.cpu().double()
        inputs = F.pad(inputs, (0, 1), value=1.0)  # the biases are weights of a constant
        decay = self.weight_decay
        if isinstance(decay, str):
            decay = chosen_decay(ctx.task, inputs, targets, trained, self.steps)
        ctx.log(head_refit_decay=decay)
        head = refit(ctx.task, inputs, targets, trained, trained, decay, self.steps)
        with torch.no_grad():
            model.head.weight.copy_(head[:, :-1])
            model.head.bias.copy_(head[:, -1])


def refit(
    task: Task,
    inputs: Tensor,
    targets: Tensor,
    trained: Tensor,
    start: Tensor,
    decay: float,
    steps: int,
) -> Tensor:
    """(K, D) head for ``inputs`` (n, D) and ``targets`` (n, K), by L-BFGS from ``start`` (K, D).

    It minimises the mean loss plus decay / 2 times its squared distance from ``trained`` (K, D).
    """
    head = start.clone().requires_grad_()
    solver = torch.optim.LBFGS(
        [head],
        max_iter=steps,
        tolerance_grad=1e-8,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        solver.zero_grad()
        loss = task.losses(inputs @ head.T, targets).mean()
        loss = loss + decay / 2 * (head - trained).square().sum()
        loss.backward()
        return loss

    solver.step(closure)
    return head.detach()


def chosen_decay(task: Task, inputs: Tensor, targets: Tensor, trained: Tensor, steps: int) -> float:
    """The decay with the lowest cross-validated loss over the rows of ``inputs`` (n, D)."""
    label = torch.unique(targets, dim=0, return_inverse=True)[1]
    fold = torch.empty_like(label)
    fold[label.argsort(stable=True)] = torch.arange(len(label)) % FOLDS  # dealt out label by label
    losses = [0.0] * len(DECAYS)
    for out in fold.unique():
        kept, head = fold != out, trained
        for place, decay in enumerate(DECAYS):
            # From the optimum for a larger decay, which is near.
            head = refit(task, inputs[kept], targets[kept], trained, head, decay, steps)
            losses[place] += float(task.losses(inputs[~kept] @ head.T, targets[~kept]).sum())
    return DECAYS[losses.index(min(losses))]


class Frozen(Method):
    """Keep ``upstream``, a method that learns, at its start: the method without its learning.

    AutoDO keeps its initial probabilities, magnitudes, weights and soft labels; SAFLEX keeps the
    labels and weights that its own upstream made, and its share of clean rows; Meta-Weight-Net its
    random network, and LiLAW its first scalars, from which weights follow as before; AdaAug and
    MADAug their random policy network. Meta rows are set aside all the same, so it trains on the
    rows that the method trains on.
    """

    kinds = ANYTHING
    control = True

    def __init__(self, *, upstream: Method | None = None) -> None:
        super().__init__(upstream)
        if upstream is not None:
            upstream.frozen = True

    def supports(self, task: Task, spec: Spec) -> str:
        """Any method that names this control among its own."""
        own = () if self.upstream is None else self.upstream.controls
        if not any(name.startswith("frozen(") for name in own):
            return "frozen needs upstream=, a method that learns, such as frozen(upstream=autodo)"
        return super().supports(task, spec)

    def augment(self, batch: Batch, ctx: Context) -> Batch:
        """The upstream's batch, which learns nothing."""
        return self.upstream.augment(batch, ctx) if self.upstream is not None else batch


class RandomLabel(Method):
    """Draw the labels of the upstream's rows at random: what learned labels must beat.

    As in SAFLEX, a share ``clean_fraction`` of each batch bypasses the upstream and keeps its
    labels; the rest only adds noise. Meta rows are set aside, as SAFLEX does, and not used.
    """

    kinds = ANYTHING
    before_forward = True
    control = True
    needs = frozenset({"meta"})
    version = 2

    def __init__(self, *, upstream: Method | None = None, clean_fraction: float = 0.5) -> None:
        super().__init__(upstream)
        self.clean_fraction = clean_share(clean_fraction)

    def weighted(self, rows: int) -> int:
        """All but the clean rows."""
        return unclean(rows, self.clean_fraction)

    def augment(self, batch: Batch, ctx: Context) -> Batch:
        """One of K labels, uniformly; with several labels per row, each with probability 1/2."""
        part, clean = parted(batch, self.weighted(len(batch)))
        part = self.upstream.augment(part, ctx) if self.upstream is not None else part
        if exclusive(ctx.task):
            drawn = torch.randint(ctx.spec.classes, (len(part), 1), device=part.y.device)
            y = torch.zeros_like(part.y).scatter_(1, drawn, 1.0)
        else:
            y = (torch.rand_like(part.y) < 0.5).to(part.y.dtype)
        return joined(replace(part, y=y), clean)


class SelfDistil(Method):
    """Soften the labels of the upstream's rows with the network's own p: (1 - eps) y + eps p.

    Where SAFLEX beats this row, it gains more than soft labels alone give. Meta rows are set aside,
    as SAFLEX does, and not used.
    """

    kinds = ANYTHING
    before_forward = True
    control = True
    needs = frozenset({"meta"})
    version = 2
    hands_logits = True

    def __init__(
        self,
        *,
        upstream: Method | None = None,
        eps: float = 0.3,
        clean_fraction: float = 0.5,
    ) -> None:
        super().__init__(upstream)
        if not 0 <= eps <= 1:
            raise ValueError(f"eps: expected a number in [0, 1], got {eps}")
        self.eps, self.clean_fraction = eps, clean_share(clean_fraction)

    def weighted(self, rows: int) -> int:
        """All but the clean rows."""
        return unclean(rows, self.clean_fraction)

    def augment(self, batch: Batch, ctx: Context) -> Batch:
        """Clean rows keep their labels; p has no gradient."""
        part, clean = parted(batch, self.weighted(len(batch)))
        part = self.upstream.augment(part, ctx) if self.upstream is not None else part
        x = stacked([part.x, clean.x])
        logits = ctx.forward(x)
        own = ctx.task.labels(logits[: len(part)].detach(), 1.0)
        soft = replace(part, y=(1 - self.eps) * part.y + self.eps * own)
        return replace(joined(soft, clean), x=x, logits=logits)


class ShuffledWeights(Method):
    """Shuffle the weights that ``upstream`` learned among its rows.

    Where the method beats this row, the gain comes from which row has which weight, not from giving
    fewer rows more weight. Targets stay with their rows, and so do the weights of rows that are
    clean, added or not trained on. Unlabelled rows share their weights among themselves, as they
    start with others than labelled rows.
    """

    kinds = ANYTHING
    control = True

    def __init__(self, *, upstream: Method | None = None) -> None:
        super().__init__(upstream)

    def supports(self, task: Task, spec: Spec) -> str:
        """Any method that learns row weights."""
        if self.upstream is None or "meta" not in self.upstream.requires():
            return "shuffled_weights needs upstream=, a method that learns weights"
        return super().supports(task, spec)

    def augment(self, batch: Batch, ctx: Context) -> Batch:
        """Permute the weights, after all draws of the method."""
        if self.upstream is None:
            return batch
        out = self.upstream.augment(batch, ctx)
        clean = len(batch) - self.upstream.weighted(len(batch))
        own = len(out) - clean
        shuffled = torch.randperm(own, device=out.w.device)
        group = _group(out.index[:own], ctx)
        # Rows in the order of their groups, shuffled within each and as they are.
        mixed, plain = shuffled[group[shuffled].argsort(stable=True)], group.argsort(stable=True)
        w = out.w.clone()
        w[plain] = torch.where(group[plain] < OTHER, out.w[mixed], out.w[plain])
        return replace(out, w=w)


OTHER = 2
"""Group of rows without state."""


def _group(index: Tensor, ctx: Context) -> Tensor:
    """(B,) 0 for rows with a label of their own, 1 for unlabelled ones, ``OTHER`` for the rest."""
    first = len(ctx.train.targets)
    end = first if ctx.unlabelled is None else first + len(ctx.unlabelled.targets)
    unlabelled = (index >= first) & (index < end)
    return torch.where(index < 0, OTHER, unlabelled.long())


def attack_of(method: Method | None) -> Lpa3 | None:
    """lpa3 itself, or that in fixmatch; None if it is another method."""
    attack = method.attack if isinstance(method, FixMatch) else method
    return attack if isinstance(attack, Lpa3) else None


class NormNoise(Method):
    """Replace the attacks of ``upstream`` with uniform noise of the same norm, row by row.

    ``upstream`` is lpa3 with the settings to control for: it still selects and attacks the rows.
    Where it beats this row, it gains more than noise of this size on these rows can give.
    """

    kinds = ANYTHING
    control = True

    def __init__(self, *, upstream: Method | None = None) -> None:
        super().__init__(upstream)
        attack = attack_of(upstream)
        if attack is not None:
            attack.noise_instead = True

    def supports(self, task: Task, spec: Spec) -> str:
        """Only lpa3, and fixmatch with it."""
        if attack_of(self.upstream) is None:
            return (
                "norm_noise needs upstream=lpa3, or lpa3(...) with its own settings and upstream, "
                "such as norm_noise(upstream=lpa3(upstream=crop))"
            )
        return super().supports(task, spec)

    def augment(self, batch: Batch, ctx: Context) -> Batch:
        """The upstream's batch, in which the added rows are noise."""
        return self.upstream.augment(batch, ctx) if self.upstream is not None else batch
