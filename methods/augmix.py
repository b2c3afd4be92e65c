"""AugMix: views that mix chains of operations, and a loss that holds their predictions together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from methods.base import ANYTHING, IMAGES, Added, Batch, Context, Method, Spec, Task, exclusive
from methods.functional import per_row, rows_of, sent
from methods.randaugment import (
    AUTOCONTRAST,
    EQUALIZE,
    IDENTITY,
    POSTERIZE,
    ROTATE,
    SHEAR_X,
    SHEAR_Y,
    SOLARIZE,
    TRANSLATE_X,
    TRANSLATE_Y,
    captions,
    geometry,
    no_picture,
    perform,
    schedule,
)

OPERATIONS = (
    AUTOCONTRAST, EQUALIZE, POSTERIZE, ROTATE, SOLARIZE, SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y,
)  # fmt: skip
"""Those of the authors that do not overlap with the corruptions of ImageNet-C."""
DEEPEST = 3
"""Operations of the longest chain of random depth."""
VIEWS = 2
"""Mixed views beside the row itself."""


class Mixtures(NamedTuple):
    """Chains of operations of each row and their weights in its view, on the CPU."""

    codes: Tensor
    """(depth, width, B) int64"""
    settings: Tensor
    """(depth, width, B) float64"""
    share: Tensor
    """(width, B) weight of each chain; the rest of 1 is the row's own"""


def settings_of(codes: Tensor, level: Tensor, negative: Tensor, height: int, width: int) -> Tensor:
    """Settings (*S), float64, of operations with these levels from 0 to 10 and signs, all (*S)."""

    def whole(largest: float) -> Tensor:
        return (level * largest / 10).trunc()

    sign = 1 - 2 * negative.double()
    by_code = {
        ROTATE: sign * whole(30),
        SHEAR_X: sign * level * 0.3 / 10,
        SHEAR_Y: sign * level * 0.3 / 10,
        TRANSLATE_X: sign * whole(width / 3),
        TRANSLATE_Y: sign * whole(height / 3),
        POSTERIZE: 4 - whole(4),
        SOLARIZE: 256 - whole(256),
    }
    made = torch.zeros_like(level)
    for code, setting in by_code.items():
        made = torch.where(codes == code, setting, made)
    return made


def mixed(x: Tensor, mixtures: Mixtures) -> Tensor:
    """A view (B, C, H, W) of each of the images ``x``: its chains and itself, mixed."""
    share = sent(mixtures.share.to(x.dtype), x.device)
    view = per_row(1 - share.sum(dim=0), x) * x
    for chain, part in enumerate(share):
        codes, settings = mixtures.codes[:, chain], mixtures.settings[:, chain]
        stages = schedule(codes, settings, geometry(codes, settings, *x.shape[-2:]))
        view = view + per_row(part, x) * perform(x, stages, "bilinear")
    return view


def divergence(logits: Tensor, one: bool) -> Tensor:
    """(B,) Jensen-Shannon divergence of the predictions from ``logits`` (V, B, K), in nats.

    It is the mean Kullback-Leibler divergence of the V distributions from their mean. With several
    labels per row it is that of each label's two probabilities, averaged over the labels.
    """
    if one:
        log_p = logits.log_softmax(dim=2)
    else:
        log_p = torch.stack([F.logsigmoid(logits), F.logsigmoid(-logits)], dim=3)
    log_mean = log_p.logsumexp(dim=0) - math.log(len(logits))
    found = (log_p.exp() * (log_p - log_mean)).sum(dim=-1).mean(dim=0)
    return found if one else found.mean(dim=1)


class AugMix(Method):
    """Add two mixed views of each row, with a loss for views that are predicted differently.

    A view is (1 - m) x + m (w_1 c_1(x) + ... + w_k c_k(x)): k = ``width`` chains c of operations,
    w from Dirichlet(``alpha``, ...), m from Beta(``alpha``, ``alpha``), all drawn per view. A chain
    has ``depth`` operations, ``random``: 1 to 3, drawn uniformly from ``OPERATIONS``, each with a
    level of its own, uniform from 0.1 to ``severity`` of 10, and a random sign. Of level 10 are: a
    rotation by 30 degrees (in whole degrees), a shear of 0.3, a translation by a third of the edge
    (in whole pixels), 0 bits in posterize (4 at level 0) and solarize from level 0 on.

    With ``jsd`` the batch holds the B rows of the upstream and two views of each (index -1), and

        loss = sum_i w_i (L(x_i, y_i) + lambda JS(p(x_i); p(view 1 of x_i); p(view 2 of x_i)))

    with lambda = ``weight``, L the task's loss (or the upstream's) and JS the Jensen-Shannon
    divergence: a view has the weight of its row and lambda / 2 times the row's JS as its loss. With
    several labels per row, JS is the mean over the labels, as L is. Without ``jsd`` one view
    replaces the row, and the loss is L.

    **Deviations.** From the paper (P) and its authors' code at commit a43b785 (C). The settings are
    those of C's CIFAR script; its ImageNet script has severity 1. C applies each operation to a
    uint8 image; here, operations equal Pillow's up to the border, but consecutive geometric ones
    are one bilinear warp, which fades to black at the border, where Pillow repeats the last
    pixel. Rows are mixed in [0, 1]; C mixes normalised rows, which is the same as normalisation is
    affine and the weights sum to 1. JS is computed from logarithms; C bounds the mean probability
    by 1e-7 from below. Several labels per row are ours.
    """

    source = "Hendrycks et al., AugMix, ICLR 2020, arXiv:1912.02781"
    kinds = IMAGES
    before_forward = True
    costs: Mapping[str, float] = {"published": 3.2}
    space: ClassVar[Mapping[str, Any]] = {
        "severity": ("uniform", 1.0, 10.0),
        "weight": ("loguniform", 1.0, 30.0),
    }
    one_chain: bool
    """Replace each view with its first chain; set by the control one_chain."""
    apart: bool
    """Give views the row's own loss; set by the control no_consistency."""

    def __init__(
        self,
        *,
        upstream: Method | None = None,
        severity: float = 3.0,
        width: int = 3,
        depth: int | Literal["random"] = "random",
        alpha: float = 1.0,
        jsd: bool = True,
        weight: float = 12.0,
    ) -> None:
        super().__init__(upstream)
        if not 0.1 < severity <= 10:
            raise ValueError(f"severity: expected a number above 0.1, at most 10, got {severity}")
        if width < 1:
            raise ValueError(f"width: expected 1 chain or more, got {width}")
        if not isinstance(depth, str) and depth < 1:
            raise ValueError(f"depth: expected random, or 1 operation or more, got {depth}")
        if not alpha > 0:
            raise ValueError(f"alpha: expected a number above 0, got {alpha}")
        if not weight >= 0:
            raise ValueError(f"weight: expected a number of 0 or more, got {weight}")
        self.severity, self.width, self.depth = severity, width, depth
        self.alpha, self.jsd, self.weight = alpha, jsd, weight
        self.one_chain = self.apart = False
        # Whoever came after it could tear a row's views apart.
        self.hands_logits = self.hands_logits or jsd
        self.controls = ("one_chain(upstream={self})",)
        if jsd:
            self.controls = ("no_consistency(upstream={self})", *self.controls)
        else:
            self.costs = {}
        self._last: Mixtures | None = None
        self._added = Added(*torch.zeros(3, 0))

    def supports(self, task: Task, spec: Spec) -> str:
        """Grey or RGB images, and an upstream that leaves the forward pass to augmix."""
        return super().supports(task, spec) or no_picture("augmix", spec)

    def draw(self, rows: int, height: int, width: int) -> Mixtures:
        """Mixtures for ``rows`` images of this size, from the CPU's global generator."""
        most = DEEPEST if isinstance(self.depth, str) else self.depth
        shape = (most, self.width, rows)
        drawn = torch.randint(len(OPERATIONS), shape, device="cpu")
        codes = torch.tensor(OPERATIONS, device="cpu")[drawn]
        uniform = torch.rand(shape, dtype=torch.float64, device="cpu")
        level = 0.1 + (self.severity - 0.1) * uniform
        negative = torch.randint(2, shape, device="cpu")
        if isinstance(self.depth, str):
            depth = torch.randint(1, DEEPEST + 1, shape[1:], device="cpu")
            place = torch.arange(most, device="cpu")[:, None, None]
            codes = codes.masked_fill(place >= depth, IDENTITY)
        alpha = torch.full((rows, self.width), self.alpha, dtype=torch.float64, device="cpu")
        share = torch.distributions.Dirichlet(alpha).sample().T
        kept = torch.distributions.Beta(alpha[:, 0], alpha[:, 0]).sample()
        settings = settings_of(codes, level, negative, height, width)
        if self.one_chain:
            return Mixtures(codes[:, :1], settings[:, :1], torch.ones_like(share[:1]))
        return Mixtures(codes, settings, kept * share)

    def augment(self, batch: Batch, ctx: Context) -> Batch:
        """The upstream's rows and two views of each; without ``jsd`` one view of each."""
        if self.upstream is not None:
            batch = self.upstream.augment(batch, ctx)
        if batch.logits is not None:
            raise ValueError("the upstream of augmix has already run this step's forward pass")
        x = torch.cat([batch.x] * VIEWS) if self.jsd else batch.x
        self._last = self.draw(len(x), *x.shape[-2:])
        views = mixed(x, self._last)
        if not self.jsd:
            return replace(batch, x=views)
        y = torch.cat([batch.y] * VIEWS)
        self._added = Added(x, views, y)
        index = batch.index.new_full((len(x),), -1)
        x = torch.cat([batch.x, views])
        return Batch(
            x,
            torch.cat([batch.y, y]),
            torch.cat([batch.w] * (1 + VIEWS)),
            torch.cat([batch.index, index]),
            ctx.forward(x),
        )

    def losses(self, logits: Tensor, batch: Batch, ctx: Context) -> Tensor:
        """Loss of each row, and of each view its share of the row's divergence."""
        if not self.jsd or self.apart:
            return super().losses(logits, batch, ctx)
        rows = len(logits) // (1 + VIEWS)
        own = super().losses(logits[:rows], rows_of(batch, slice(rows)), ctx)
        apart = divergence(logits.unflatten(0, (1 + VIEWS, rows)), exclusive(ctx.task))
        return torch.cat([own, *[self.weight / VIEWS * apart] * VIEWS])

    def captions(self) -> list[str]:
        """The upstream's, and how each row of the last batch was mixed; with ``jsd`` none."""
        if self._last is None or self.jsd:
            return []
        codes, settings, share = self._last
        chains = [captions(codes[:, i], settings[:, i]) for i in range(len(share))]
        own = [
            " + ".join(f"{part:.2f} ({text})" for part, text in zip(parts, texts, strict=True))
            for parts, texts in zip(share.T.tolist(), zip(*chains, strict=True), strict=True)
        ]
        before = super().captions() or [""] * len(own)
        return [", ".join(filter(None, pair)) for pair in zip(before, own, strict=True)]

    def added(self) -> Added | None:
        """The views of the last batch, and the rows that they are of; None without ``jsd``."""
        return self._added if self.jsd else super().added()


class NoConsistency(Method):
    """Train on the views of augmix as on any rows: their own loss, not their divergence.

    Rows, views, weights, draws and passes are those of ``upstream``. Besides losing the divergence,
    views gain a labelled cross-entropy, which augmix never gives them: where augmix beats this row,
    holding predictions together helps more than training on the views as labelled rows.
    """

    kinds = ANYTHING
    control = True

    def __init__(self, *, upstream: Method | None = None) -> None:
        super().__init__(upstream)
        if isinstance(upstream, AugMix):
            upstream.apart = True

    def supports(self, task: Task, spec: Spec) -> str:
        """Only augmix with its consistency loss."""
        if not isinstance(self.upstream, AugMix) or not self.upstream.jsd:
            return "no_consistency needs upstream=augmix, or augmix(...) with its settings and jsd"
        return super().supports(task, spec)

    def augment(self, batch: Batch, ctx: Context) -> Batch:
        """The upstream's batch."""
        return self.upstream.augment(batch, ctx) if self.upstream is not None else batch


class OneChain(Method):
    """Make each view of augmix from its first chain alone, neither mixed with others nor the row.

    The row's own share of a view falls too, from a mean of one half to 0, so views are stronger:
    where augmix beats this row, mixing helps, or weaker views do. The draws are the same.
    """

    kinds = ANYTHING
    control = True

    def __init__(self, *, upstream: Method | None = None) -> None:
        super().__init__(upstream)
        if isinstance(upstream, AugMix):
            upstream.one_chain = True

    def supports(self, task: Task, spec: Spec) -> str:
        """Only augmix."""
        if not isinstance(self.upstream, AugMix):
            return "one_chain needs upstream=augmix, or augmix(...) with its own settings"
        return super().supports(task, spec)

    def augment(self, batch: Batch, ctx: Context) -> Batch:
        """The upstream's batch."""
        return self.upstream.augment(batch, ctx) if self.upstream is not None else batch
