"""Augmentation whose strength follows the network's output on each row: EntAugment and SRA.

Operations and signs are drawn on the CPU, as in ``randaugment``. Strengths are computed where the
network is, from 0 (none) to 1, and become steps from 0 to 30 of the operations' magnitudes; they
are never read, so nothing waits for the device. Rows are on the device, operations on the CPU.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from methods.base import ANYTHING, IMAGES, Batch, Context, Method, Spec, Task
from methods.functional import buffers_kept, per_row
from methods.randaugment import PUBLISHED, STANDARD, WIDE, Drawn, Interpolation, PerRow

STEPS = 30
"""The largest step of a magnitude; 0 is the smallest."""
UNSEEN = -1.0
"""The strength of a row that the network has not been asked about."""
Exchange = Literal["none", "shuffled", "mean"]


class AdaptiveStrength(PerRow):
    """Operations drawn uniformly for each row, with a strength that follows the network."""

    kinds = IMAGES - {"labels"}
    before_forward = True
    controls = ("shuffled_strengths(upstream={self})", "mean_strength(upstream={self})")
    exchange: Exchange
    """What the rows of a batch get instead of their own strengths; set by the controls."""

    def __init__(
        self,
        upstream: Method | None,
        n: int,
        space: Literal["standard", "wide"],
        interpolation: Interpolation,
    ) -> None:
        magnitudes = {"standard": STANDARD, "wide": WIDE}[space]
        super().__init__(magnitudes, STEPS + 1, interpolation, upstream)
        self.n = n
        self.ops = torch.tensor(PUBLISHED, device="cpu")
        self.exchange = "none"

    @abstractmethod
    def steps(self, batch: Batch, ctx: Context) -> Tensor | None:
        """Steps of the rows (B,) int64, as the network has it; None if they are drawn at random."""

    def setup(self, ctx: Context) -> None:
        """Allocate a strength for each training row, and one for all rows from elsewhere."""
        super().setup(ctx)
        unseen = torch.full((ctx.spec.rows + 1,), UNSEEN, device=ctx.train.targets.device)
        self.register_buffer("strength", unseen)

    def begin_epoch(self, ctx: Context) -> None:
        """Log the mean and the standard deviation of the strengths over the training rows."""
        super().begin_epoch(ctx)
        known = self.learned()["strength"]
        known = known[known > UNSEEN]
        if len(known) > 1:
            ctx.log(strength_mean=float(known.mean()), strength_sd=float(known.std()))

    def draw(self, rows: int) -> Drawn:
        """Operations, steps and signs."""
        codes = self.ops[torch.randint(len(self.ops), (self.n, rows), device="cpu")]
        magnitude = torch.randint(STEPS + 1, (self.n, rows), device="cpu")
        negative = torch.randint(2, (self.n, rows), device="cpu")
        return Drawn(codes, magnitude, negative)

    def augment(self, batch: Batch, ctx: Context) -> Batch:
        """Apply each row's operations; targets stay. No gradient reaches the incoming images."""
        if self.upstream is not None:
            batch = self.upstream.augment(batch, ctx)
        if batch.logits is not None:
            raise ValueError("the upstream has already run this step's forward pass")
        drawn, steps = self.draw(len(batch)), self.steps(batch, ctx)
        taken = batch.index >= 0 if self.one_row else torch.ones_like(batch.index, dtype=torch.bool)
        if steps is not None:
            steps = exchanged(steps, taken, self.exchange)
            drawn = drawn._replace(magnitude=steps.expand(self.n, -1))
        x = self.applied(batch.x, drawn)
        return replace(batch, x=torch.where(per_row(taken, x), x, batch.x) if self.one_row else x)

    def remember(self, index: Tensor, strength: Tensor) -> Tensor:
        """Store and return the strengths (B,) of the rows ``index`` (B,), limited to 0 to 1.

        Where the network has diverged they are 0: a step must be one of the tables'.
        """
        stored = self.get_buffer("strength")
        strength = strength.nan_to_num(0.0).clamp(0, 1).to(stored.dtype)
        stored[index] = strength
        stored[-1:].fill_(UNSEEN)  # where all rows from elsewhere (-1) were written
        return strength

    def captions(self) -> list[str]:
        """What the upstream did to each row of the last batch, then the row's operations."""
        own = super().captions()
        before = self.upstream.captions() if self.upstream is not None else []
        if not before:
            return own
        return [", ".join(filter(None, texts)) for texts in zip(before, own, strict=True)]

    def learned(self) -> dict[str, Tensor]:
        """The last ``strength`` of each training row, from 0 to 1; -1 if it has none yet."""
        return {**super().learned(), "strength": self.get_buffer("strength")[:-1]}


def exchanged(steps: Tensor, taken: Tensor, exchange: Exchange) -> Tensor:
    """Steps (B,) with those of the rows ``taken`` (B,) exchanged among them.

    ``shuffled`` is a random permutation. ``mean`` is their mean, rounded up with the probability of
    its fraction, the same for all: the expectation is the mean.
    """
    # Drawn in any case, so that the links of a chain that come after draw the same.
    uniform = torch.rand(len(steps) + 1, device=steps.device)
    if exchange == "mean":
        own = taken.to(torch.float32)
        mean = (steps * own).sum() / own.sum().clamp_min(1)
        return (mean + uniform[-1]).floor().clamp_max(STEPS).long().expand_as(steps)
    if exchange == "shuffled":
        # Two orders of the rows in which those taken come first: as they are, and at random.
        kept = taken.logical_not().to(torch.float32)
        order = kept.argsort(stable=True)
        chance = (kept + uniform[:-1]).argsort()
        return torch.empty_like(steps).scatter_(0, order, steps[chance])
    return steps


class EntAugment(AdaptiveStrength):
    """Apply one operation to each image: the surer the network was of it last time, the stronger.

    The strength of a row is 1 - H(p) / log K, with p = softmax of the logits (K) of the row as it
    was last trained on, augmentation included, and H its entropy. The operation is one of
    RandAugment's 14, drawn uniformly, with the step min(floor(30 strength) + 1, 30) of its
    magnitude and a random sign.

    In the first ``warmup`` epochs steps are drawn uniformly from 0 to 30: trivialaugment. Without a
    warm-up a row has strength 0 at its first visit. ``entloss`` is the weight of EntLoss, H(p) /
    log K, which is added to each row's loss. ``space`` "standard" is RandAugment's, "wide"
    TrivialAugment's. Rows from elsewhere (index -1) stay as they are.

    **Deviations.** The details are those of the authors' code at commit 9f1e4e1 (C), as only the
    abstract of the paper was accessible. Magnitudes are torchvision's: 0 changes nothing. In C the
    factors of color, contrast, brightness and sharpness go from 0.1 at step 0 to 1.9 at step 30
    without a sign, so that a weak step of brightness is nearly black and a middle one changes
    nothing; posterize keeps 4 bits at step 0 and none at step 30; translations reach 10 pixels. C
    trains 11 epochs at random steps, of 30 levels (0 to 29 of 29; here 0 to 30 of 30), and crops,
    flips and cuts out afterwards: ``entaugment+crop+flip+random_erasing``. C's script for EntLoss
    draws random steps throughout.
    """

    source = "Yang et al., EntAugment, ECCV 2024, arXiv:2409.06290"
    one_row = True
    space: ClassVar[Mapping[str, Any]] = {
        "warmup": ("choice", [0, 10]),
        "entloss": ("choice", [0.0, 1.0]),
    }

    def __init__(
        self,
        *,
        upstream: Method | None = None,
        warmup: int = 10,
        entloss: float = 0.0,
        space: Literal["standard", "wide"] = "standard",
        interpolation: Interpolation = "nearest",
    ) -> None:
        super().__init__(upstream, 1, space, interpolation)
        if warmup < 0:
            raise ValueError(f"warmup: expected 0 or more epochs, got {warmup}")
        if entloss < 0:
            raise ValueError(f"entloss: expected a weight of 0 or more, got {entloss}")
        self.warmup, self.entloss = warmup, entloss

    def supports(self, task: Task, spec: Spec) -> str:
        """An upstream that keeps rows apart."""
        if self.mixes_rows:
            return (
                "entaugment remembers the network's output on each row, but its upstream mixes rows"
            )
        return super().supports(task, spec)

    def steps(self, batch: Batch, ctx: Context) -> Tensor | None:
        """From the strength at the last visit; at random during the warm-up."""
        if ctx.epoch < self.warmup:
            return None
        return steps_of(self.get_buffer("strength")[batch.index].clamp_min(0))

    def losses(self, logits: Tensor, batch: Batch, ctx: Context) -> Tensor:
        """The loss (B,) of the upstream or the task, plus EntLoss; remembers the strengths."""
        entropy = normalised_entropy(logits)
        self.remember(batch.index, 1 - entropy.detach())
        losses = super().losses(logits, batch, ctx)
        return losses + self.entloss * entropy if self.entloss else losses


def steps_of(strength: Tensor) -> Tensor:
    """EntAugment's steps (B,) int64, from 1 to 30, of strengths (B,) from 0 to 1."""
    return (STEPS * strength).floor().add(1).clamp_max(STEPS).long()


def normalised_entropy(logits: Tensor) -> Tensor:
    """Entropy (B,) of softmax(logits (B, K)), divided by log K: from 0 to 1."""
    log_p = logits.log_softmax(dim=1)
    return -(log_p.exp() * log_p).sum(dim=1) / math.log(logits.shape[1])


class Sra(AdaptiveStrength):
    """RandAugment that, in every second batch, is stronger on images whose label the network fits.

    Batches alternate. In the first, third, ... of a run each operation of a row has a random step
    from 0 to 30 ("exploration"); in the others ("refinement") all ``n`` have the row's strength

        cos(p, y)^(exponent / log K),   p = softmax of the logits (K) before the operations,

    at the nearest step. The logits are those of an extra forward pass in training mode, whose
    running statistics are discarded. A uniform p gives e^(-exponent / 2) whatever K is; the paper
    calls ``exponent`` epsilon. Operations are RandAugment's 14, drawn uniformly, with random signs.

    **Deviations.** The details are those of the authors' code at commits cd3f8d1 and 785c3b1 (C),
    as only the abstract of the paper and a review of an earlier version were accessible. C splits
    a batch of twice the size into two, with an update each: here these are two steps of the
    trainer. In C the extra pass updates the running statistics of batch normalisation, and
    magnitudes are not rounded to steps. C interpolates warps bilinearly (``interpolation``) and
    crops and flips before (``upstream=crop+flip``), and cuts out afterwards.
    """

    source = "Xiao et al., Sample-aware RandAugment, IJCV 2025, arXiv:2508.08004"
    costs: Mapping[str, float] = {"published": 1.2}
    space: ClassVar[Mapping[str, Any]] = {
        "n": ("choice", [1, 2, 3]),
        "exponent": ("uniform", 0.5, 4.0),
    }

    def __init__(
        self,
        *,
        upstream: Method | None = None,
        n: int = 2,
        exponent: float = 2.0,
        interpolation: Interpolation = "nearest",
    ) -> None:
        super().__init__(upstream, n, "standard", interpolation)
        if n < 1:
            raise ValueError(f"n: expected 1 operation or more, got {n}")
        if not exponent > 0:
            raise ValueError(f"exponent: expected a number above 0, got {exponent}")
        self.exponent = exponent

    def steps(self, batch: Batch, ctx: Context) -> Tensor | None:
        """In every second step of training, from the network's current output."""
        if ctx.step % 2 == 0:
            return None
        with torch.no_grad(), buffers_kept(ctx.model):
            logits = ctx.model(batch.x)
        strength = self.remember(batch.index, agreement(logits, batch.y, self.exponent))
        return (STEPS * strength).round().long()


def agreement(logits: Tensor, y: Tensor, exponent: float) -> Tensor:
    """cos(softmax(logits), y)^(exponent / log K) for rows (B, K), from 0 to 1."""
    cosine = F.cosine_similarity(logits.softmax(dim=1), y.to(logits.dtype), dim=1)
    return cosine ** (exponent / math.log(logits.shape[1]))


class Exchanged(Method):
    """A control that exchanges the strengths of its upstream within each batch."""

    kinds = ANYTHING
    control = True
    name: ClassVar[str]
    exchange: ClassVar[Exchange]

    def __init__(self, *, upstream: Method | None = None) -> None:
        super().__init__(upstream)
        for part in self._adaptive():
            part.exchange = self.exchange

    def _adaptive(self) -> Iterator[AdaptiveStrength]:
        parts = self.upstream.parts() if self.upstream is not None else iter(())
        return (part for part in parts if isinstance(part, AdaptiveStrength))

    def supports(self, task: Task, spec: Spec) -> str:
        """Any method whose strengths follow the network."""
        if next(self._adaptive(), None) is None:
            return (
                f"{self.name} needs upstream=, a method whose strengths follow the network, such "
                f"as {self.name}(upstream=entaugment)"
            )
        return super().supports(task, spec)

    def augment(self, batch: Batch, ctx: Context) -> Batch:
        """The upstream's batch."""
        return self.upstream.augment(batch, ctx) if self.upstream is not None else batch


class ShuffledStrengths(Exchanged):
    """Shuffle the strengths of ``upstream`` (entaugment, sra) among the rows of each batch.

    It keeps everything but which row has which strength: their distribution, and how it follows the
    network during training. Where the method beats this row, adapting to each row helps. Operations
    and signs are those of the method; steps that it draws at random stay as they are.
    """

    name, exchange = "shuffled_strengths", "shuffled"


class MeanStrength(Exchanged):
    """Give all rows of a batch the mean of the strengths of ``upstream`` (entaugment, sra).

    The mean of the rows' steps is rounded at random, so that its expectation is kept, to one step
    for the whole batch. It also takes away that strengths differ, which alone may help. Operations
    and signs are those of the method; steps that it draws at random stay as they are.
    """

    name, exchange = "mean_strength", "mean"
