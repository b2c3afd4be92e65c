"""Classic remedies for bad labels and rare classes: smoothing, resampling and custom losses."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from methods.base import ANYTHING, Batch, Context, Method


class LabelSmoothing(Method):
    """Soften targets: (1 - eps) y + eps / K; with several labels per row towards 1/2."""

    kinds = ANYTHING
    source = "Szegedy et al., Rethinking the Inception Architecture, CVPR 2016, arXiv:1512.00567"

    def __init__(self, *, eps: float = 0.1) -> None:
        super().__init__()
        if not 0 <= eps <= 1:
            raise ValueError(f"eps: expected a number in [0, 1], got {eps}")
        self.eps = eps

    def augment(self, batch: Batch, ctx: Context) -> Batch:
        """Move targets towards the task's most uncertain target."""
        uncertain = ctx.task.labels(torch.zeros_like(batch.y), 1.0)
        return replace(batch, y=(1 - self.eps) * batch.y + self.eps * uncertain)


class Balanced(Method):
    """Redraw each batch so that all classes are equally frequent in expectation.

    Rows are drawn with replacement, first a class, then a row of it; the trainer's own batch only
    sets the number of rows.
    """

    comes_first = True
    kinds = ANYTHING - {"labels"}
    source = "Kang et al., Decoupling Representation and Classifier, ICLR 2020, arXiv:1910.09217"

    def begin_epoch(self, ctx: Context) -> None:
        """Set the probability of each row that may be drawn: 1 / (K n) in a class with n rows."""
        super().begin_epoch(ctx)
        targets = ctx.train.targets[ctx.train.index]
        counts = targets.sum(dim=0)
        shares = targets / counts.clamp_min(1e-12)
        self.register_buffer("chance", shares.sum(dim=1), persistent=False)

    def augment(self, batch: Batch, ctx: Context) -> Batch:
        """Draw as many rows as the batch has, with its weights."""
        chance = self.get_buffer("chance")
        place = torch.multinomial(chance, len(batch), replacement=True)
        return replace(ctx.train.rows(ctx.train.index[place]), w=batch.w)


class LogitAdjustment(Method):
    """Cross-entropy on logits plus tau times the log of the class shares.

    The network then learns the balanced classifier (Eq. 10).
    """

    kinds = ANYTHING - {"labels"}
    source = "Menon et al., Long-Tail Learning via Logit Adjustment, ICLR 2021, arXiv:2007.07314"

    def __init__(self, *, tau: float = 1.0) -> None:
        super().__init__()
        if tau < 0:
            raise ValueError(f"tau: expected a number of 0 or more, got {tau}")
        self.tau = tau

    def setup(self, ctx: Context) -> None:
        """Compute the log of each class's share of the training rows."""
        super().setup(ctx)
        shares = ctx.train.targets.mean(dim=0)
        self.register_buffer("log_prior", shares.clamp_min(1e-12).log(), persistent=False)

    def augment(self, batch: Batch, ctx: Context) -> Batch:
        """The batch itself."""
        return batch

    def losses(self, logits: Tensor, batch: Batch, ctx: Context) -> Tensor:
        """The task's loss (B,) on the adjusted logits."""
        return ctx.task.losses(logits + self.tau * self.get_buffer("log_prior"), batch.y)


class GeneralisedCrossEntropy(Method):
    """Loss (1 - p^q) / q: between cross-entropy (q -> 0) and absolute error (q = 1).

    For a soft target the loss is averaged over its classes, so that it stays affine in ``y``.
    """

    kinds = ANYTHING - {"labels"}
    source = "Zhang and Sabuncu, Generalized Cross Entropy Loss, NeurIPS 2018, arXiv:1805.07836"

    def __init__(self, *, q: float = 0.7) -> None:
        super().__init__()
        if not 0 < q <= 1:
            raise ValueError(f"q: expected a number in (0, 1], got {q}")
        self.q = q

    def augment(self, batch: Batch, ctx: Context) -> Batch:
        """The batch itself."""
        return batch

    def losses(self, logits: Tensor, batch: Batch, ctx: Context) -> Tensor:
        """sum_k y_k (1 - p_k^q) / q per row (B,) (Eq. 6)."""
        lost = -torch.expm1(self.q * F.log_softmax(logits, dim=1))  # 1 - p^q, exact for small q
        return (batch.y * lost).sum(dim=1) / self.q
