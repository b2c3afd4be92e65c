"""LP-A3: hard positives, as far from their row as label preservation allows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from methods.base import Added, Batch, Context, Method, Model, Spec, Task, exclusive
from methods.branches import has_branches, on_branch
from methods.folding import Pair, foldable, folded
from methods.functional import (
    buffers_kept,
    frozen,
    joined,
    mode,
    noised,
    per_row,
    perceptual,
    row_norms,
    surely_known,
)

NOISE, SHIFT, GUARD = 0.005, 0.05, 2e-4
"""Half-width of an attack's starting noise, shift of the finite difference and guard of its
quotient: the released code's 0.01, 0.1 and 1e-4 in units of [0, 1], as its normalised images have
twice the range (MedMNIST's own normalisation)."""
FLAT = 1e-8
"""Added to the norm of a gradient, which may be 0."""
ROUNDING = 1e-5
"""Subtracted from the margin that an iterate must keep, so that it also keeps it in a forward pass
that sums in another order."""
SLACK = 1e-6
"""Excess that the log counts as zero."""
FADE = 0.01
"""Share of a row's time consistency that remains after its next visit."""
STRICT = {
    "statistics": "running",
    "radius": 0.02,
    "iterate": "best",
    "lagrange": 100.0,
}


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How far an attack goes, and when an iterate is good enough."""

    margin: float = 0.002
    steps: int = 5
    lagrange: float = 1.0
    radius: float | None = None
    best: bool = False

    def __post_init__(self) -> None:
        for name in ("margin", "steps", "lagrange"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: expected 0 or more, got {getattr(self, name)}")
        if self.radius is not None and not self.radius > 0:
            raise ValueError(f"radius: expected a number above 0, got {self.radius}")
        if self.radius is None and not math.isfinite(self.margin):
            raise ValueError(
                f"margin: expected a finite number where no radius is set, got {self.margin}"
            )

    def schedule(self) -> list[tuple[float, float]]:
        """Per step: its length relative to the first step, 10^(-k/N), and the multiplier."""
        shares = [0.1 ** (k / self.steps) for k in range(self.steps)]
        return [(share, self.lagrange * 0.1 / share) for share in shares]


class Seen(NamedTuple):
    """The network's outputs for rows."""

    phi: Tensor
    """(B, D) perceptual embedding"""
    logits: Tensor
    """(B, K)"""


class Reference(NamedTuple):
    """What an attack must preserve for each row, and what it moves away from."""

    phi: Tensor
    """(B, D)"""
    y: Tensor
    """(B, K) the label to keep"""
    likelihood: Tensor
    """(B, M) log-likelihood of each of its labels"""
    logits: Tensor
    """(B, K)"""


class Judged(NamedTuple):
    """How rows compare with their reference."""

    distance: Tensor
    """(B,) perceptual"""
    excess: Tensor
    """(B, M) fall of the log-likelihood beyond the margin; 0 or less within it"""
    same: Tensor
    """(B,) whether the prediction equals that of the reference"""


def look(model: Model, x: Tensor) -> Seen:
    """The outputs of ``model`` for rows (B, *S), in its current mode and branch."""
    features = model.features(x)
    return Seen(perceptual(features), logits_of(model, features))


def logits_of(model: Model, features: list[Tensor]) -> Tensor:
    """(B, K) from the stage outputs."""
    return model.head(model.embed(features))


def likelihood(logits: Tensor, y: Tensor, one: bool) -> Tensor:
    """(B, M) log-likelihood of targets (B, K): of the single label (M = 1), or of each of K.

    For a soft target it is the weighted mean over its classes, which is minus the cross-entropy.
    """
    if one:
        return (y * logits.log_softmax(dim=1)).sum(dim=1, keepdim=True)
    return y * F.logsigmoid(logits) + (1 - y) * F.logsigmoid(-logits)


def predicted(logits: Tensor, one: bool) -> Tensor:
    """(B, K) the most likely target, as zeros and ones."""
    if one:
        return F.one_hot(logits.argmax(dim=1), logits.shape[1]).to(logits.dtype)
    return (logits > 0).to(logits.dtype)


def judge(seen: Seen, reference: Reference, margin: float, one: bool) -> Judged:
    """Distance, excess, and whether the prediction is unchanged."""
    fallen = reference.likelihood - likelihood(seen.logits, reference.y, one)
    same = (predicted(seen.logits, one) == predicted(reference.logits, one)).all(dim=1)
    return Judged(row_norms(seen.phi - reference.phi), fallen - margin, same)


def objective(judged: Judged, multiplier: float) -> Tensor:
    """(B,) minus the distance, plus the multiplier times the excess summed over labels (Eq. 5)."""
    return multiplier * judged.excess.clamp_min(0).sum(dim=1) - judged.distance


def attack(
    see: Callable[[Tensor], Seen],
    x: Tensor,
    start: Tensor,
    reference: Reference,
    rules: Rules,
    one: bool,
    spec: Spec,
    *,
    first: int = 0,
) -> Tensor:
    """Hard positives (B, *S) of rows ``x``, starting at ``start`` with step number ``first``.

    Each step descends the objective's normalised gradient in the row's own pixels. It changes the
    log-likelihood by the margin times its share, to first order (by a finite difference over a
    shift of ``SHIFT``), or with ``radius`` has the length radius sqrt(values) times its share. The
    result is the last iterate; with ``best`` it is the farthest iterate, ``start`` included, that
    keeps margin and prediction, or the row itself if none does.
    """
    now, kept = start, x
    farthest = torch.full_like(reference.likelihood[:, 0], -1.0)

    def keep(candidate: Tensor, judged: Judged) -> None:
        nonlocal kept, farthest
        holds = (judged.excess <= -ROUNDING).all(dim=1) & judged.same
        better = holds & (judged.distance > farthest)
        kept = torch.where(per_row(better, x), candidate, kept)
        farthest = torch.where(better, judged.distance, farthest)

    for share, multiplier in rules.schedule()[first:]:
        now = now.detach().requires_grad_()
        with torch.enable_grad():
            judged = judge(see(now), reference, rules.margin, one)
            # A sum, so that no row's gradient depends on the number of rows.
            (gradient,) = torch.autograd.grad(objective(judged, multiplier).sum(), now)
        with torch.no_grad():
            if rules.best:
                keep(now, Judged(*(each.detach() for each in judged)))
            direction = gradient / per_row(row_norms(gradient) + FLAT, x)
            if rules.radius is not None:
                length = torch.full_like(farthest, share * rules.radius * math.sqrt(x[0].numel()))
            else:
                shifted = judge(see(now - SHIFT * direction), reference, rules.margin, one)
                change = (shifted.excess - judged.excess).abs().amax(dim=1) / SHIFT
                length = share * rules.margin / (change + GUARD)
            now = (now - per_row(length, x) * direction).clamp(spec.low, spec.high)
    now = now.detach()
    if not rules.best:
        return now
    with torch.no_grad():
        keep(now, judge(see(now), reference, rules.margin, one))
    return kept.detach()


def divergence(now: Tensor, before: Tensor, one: bool) -> Tensor:
    """(B,) Kullback-Leibler divergence from predictions ``before`` to ``now``, both logits (B, K),
    divided by K.
    """
    if one:
        log_p, log_q = now.log_softmax(dim=1), before.log_softmax(dim=1)
        return (log_p.exp() * (log_p - log_q)).mean(dim=1)
    yes = now.sigmoid() * (F.logsigmoid(now) - F.logsigmoid(before))
    no = (-now).sigmoid() * (F.logsigmoid(-now) - F.logsigmoid(-before))
    return (yes + no).mean(dim=1)


def lowest(consistency: Tensor, ratio: float) -> Tensor:
    """Sorted positions of the round(ratio n) lowest values of (n,); on ties the first ones."""
    order = consistency.argsort(stable=True)
    return order[: round(ratio * len(order))].sort().values


class Lpa3(Method):
    """Add hard positives to each batch: far from their row for the network, with the same label.

    From x' = x plus a little noise, ``steps`` steps of gradient descent on the pixels minimise

        - ||phi(x') - phi(x)|| + lambda_k max(0, log p(y|x) - log p(y|x') - margin)

    (Eq. 5), phi the outputs of the network's stages, channels normalised (Eq. 3), lambda_k the
    multiplier ``lagrange`` times 0.1^(1 - k / steps). The network is frozen: gradients are computed
    for the pixels only. The label y is the row's ``target`` or the network's ``predicted`` one, as
    set by ``label``. With several labels per row, each label has its own constraint.

    From epoch ``warmup`` on, the share ``ratio`` of a batch with the lowest time consistency is
    attacked: minus the Kullback-Leibler divergence from a row's prediction at its last visit to
    the current one, averaged with a decay of 99 % per visit; rows without an earlier visit come
    first. Added rows (index -1) are not attacked. The attacked rows follow the clean rows, with the
    target of their row. Their mean loss is added to that of the clean rows with the factor
    ``weight``, however many they are: 1 in Algorithm 1, line 5. Both means are weighted where rows
    have weights, an attacked row in proportion to its row.

    ``radius`` is the length of the first step, in [0, 1], divided by the square root of the number
    of values; without it, steps are calibrated in log-likelihood. ``statistics``: batch
    normalisation uses those of the ``batch`` of attacked rows or the ``running`` ones, with which
    rows are independent. ``iterate``: the ``last`` one, or the ``best`` that keeps margin and
    prediction, else the row itself. ``refresh`` k: attack afresh every k epochs, and in between
    continue from the stored perturbation with the last two fifths of the steps, at least one.
    ``auxiliary_norm``: attacked rows use a second set of normalisation layers, in the attack and in
    training. ``fold``: fold running statistics into the convolutions during the attack, which is
    faster and equal up to rounding. Where a table has categories, the embedded rows are attacked
    (``Model.entered``): these are no inputs, so the batch has the logits of the attacked rows, and
    as inputs those of their rows.

    The bare name is ``preset=paper``: Algorithm 1, which keeps the row's own label and adds the
    attacked rows' loss in full. ``preset=code`` has the settings of the authors' supervised
    CIFAR-10 script: the predicted label, a second set of norms, and a ``weight`` of 0.25, as the
    script halves the loss of the selected half of a batch and divides it by the whole batch.
    ``preset=strict`` is our variant of ``paper``: it keeps margin and prediction for every row;
    ``preset=fast`` is the same with three steps, folded. As in Eq. 5 the constraint is one-sided:
    the network may be more certain of an attacked row's label than of the clean row's, and with
    ``strict`` it mostly is, as its steps overshoot on the way back from the margin.

    **Deviations.** From the paper (P) and its authors' code (C: LPA3 at commit 7059ca3 and, for
    supervised training, the first author's other repositories). What P's main text leaves open
    (margin, step lengths, ratio, warm-up) is as in C's supervised CIFAR-10 script, as no settings
    for MedMNIST are available; P searches the margin (section 5.1). Eq. 4 and 5
    print the distance with a plus, the text and C maximise it. Reference and attack see the same
    rows (in C the reference's batch statistics come from more rows). The attack leaves the running
    statistics unchanged (in C it updates those of the second set). ``log_softmax``; a sum over
    rows, not their mean; noise, shift and guard in units of [0, 1]; no gradient for the weights.
    The lowest rows of each batch are selected, exactly round(ratio n) and before the attack (P; C
    uses a threshold from the previous epoch and attacks all rows); no attack during the warm-up (C
    attacks and discards the result).
    """

    kinds = frozenset({"image", "vector", "categories", "labels"})
    before_forward = True
    source = "Yang et al., Adversarial Auto-Augment with Label Preservation, NeurIPS 2022, arXiv:2211.00824"  # noqa: E501
    version = 2
    needs = frozenset({"features", "stages"})
    controls = ("norm_noise(upstream={self})",)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "code": {"label": "predicted", "weight": 0.25, "auxiliary_norm": True},
        "strict": STRICT,
        "fast": {**STRICT, "steps": 3, "fold": True},
    }
    costs: Mapping[str, float] = {"paper": 4.4, "code": 4.4, "strict": 3.5, "fast": 2.7}
    space: ClassVar[Mapping[str, Any]] = {
        "margin": ("loguniform", 0.001, 0.1),
        "ratio": ("choice", [0.3, 0.5, 1.0]),
        "weight": ("uniform", 0.25, 1.0),
    }
    noise_instead: bool
    """Replace attacks with noise of the same norm; set by the control norm_noise."""
    audit_every = 25
    """Interval of the logged diagnostics, in steps with an attack; each epoch starts with one."""

    def __init__(
        self,
        *,
        upstream: Method | None = None,
        margin: float = 0.002,
        steps: int = 5,
        lagrange: float = 1.0,
        ratio: float = 0.5,
        warmup: int = 5,
        weight: float = 1.0,
        label: Literal["target", "predicted"] = "target",
        radius: float | None = None,
        statistics: Literal["batch", "running"] = "batch",
        iterate: Literal["last", "best"] = "last",
        refresh: int = 1,
        auxiliary_norm: bool = False,
        fold: bool = False,
    ) -> None:
        super().__init__(upstream)
        if not 0 <= ratio <= 1:
            raise ValueError(f"ratio: expected a number in [0, 1], got {ratio}")
        if warmup < 0:
            raise ValueError(f"warmup: expected 0 or more epochs, got {warmup}")
        if not weight > 0:
            raise ValueError(f"weight: expected a number above 0, got {weight}")
        if refresh < 1:
            raise ValueError(f"refresh: expected 1 or more epochs, got {refresh}")
        if auxiliary_norm and statistics == "running":
            raise ValueError(
                "auxiliary_norm: expected statistics=batch with it, got running: the second set of "
                "norms has no running statistics before it is trained"
            )
        if iterate == "best" and statistics == "batch":
            raise ValueError(
                "iterate: best combines rows from different steps, whose batch statistics differ "
                "from those in training: set statistics=running"
            )
        if refresh > 1 and statistics == "batch":
            raise ValueError(
                f"refresh: {refresh} splits a batch into rows with and without a perturbation, "
                "which must not depend on each other: set statistics=running"
            )
        if fold and statistics == "batch":
            raise ValueError(
                "fold: batch statistics differ from attack to attack: set statistics=running"
            )
        self.rules = Rules(
            margin=margin, steps=steps, lagrange=lagrange, radius=radius, best=iterate == "best"
        )
        self.ratio, self.warmup, self.weight, self.label = ratio, warmup, weight, label
        self.running, self.refresh, self.fold = statistics == "running", refresh, fold
        self.hands_logits = self.auxiliary_norm = auxiliary_norm
        self.comes_first, self.one_row = refresh > 1, 0 < ratio < 1
        self.noise_instead = False
        if refresh > 1:
            self.waits = "the number of rows with a stored perturbation determines shapes"
        self._enters = False
        self._attacks = self._looked = 0
        self._pairs: list[Pair] = []
        self._added, self._entered = Added(*torch.zeros(3, 0)), torch.zeros(0)

    def requires(self) -> frozenset[str]:
        """Images and the network's stages; with ``auxiliary_norm`` a second set of norms."""
        return super().requires() | ({"auxiliary_norm"} if self.auxiliary_norm else set())

    def supports(self, task: Task, spec: Spec) -> str:
        """Any upstream that leaves the forward pass to lpa3 and does not mix remembered rows."""
        if self.upstream is not None and self.refresh > 1:
            return (
                "lpa3(refresh) stores perturbations of the original pixels, but its upstream may "
                "change the pixels from epoch to epoch"
            )
        if self.refresh > 1 and any(spec.categories):
            return (
                "lpa3(refresh) stores perturbations, but the embeddings of categories, which it "
                "perturbs, change while they are trained"
            )
        if self.mixes_rows and self.one_row:
            return (
                "lpa3 compares a row's prediction with that of its last visit, but its upstream "
                "mixes rows: set ratio=1"
            )
        return super().supports(task, spec)

    def hands(self, spec: Spec) -> bool:
        """With a second set of norms, and where embeddings are attacked."""
        return super().hands(spec) or any(spec.categories)

    def setup(self, ctx: Context) -> None:
        """Allocate the memory for each row, and find the layers that can be folded.

        Raises:
            TypeError: the network is not a Model, so its stages are not accessible.
            ValueError: it lacks the second set of norms that ``auxiliary_norm`` needs.
        """
        if not isinstance(ctx.model, Model):
            raise TypeError(
                f"lpa3: expected a methods.base.Model, whose stages are accessible, got "
                f"{type(ctx.model).__name__}"
            )
        if self.auxiliary_norm and not has_branches(ctx.model):
            raise ValueError(
                "auxiliary_norm: the network has only one set of norms; add a second one with "
                "methods.branches.add_branch"
            )
        super().setup(ctx)
        self._enters = any(ctx.spec.categories)
        rows, device = ctx.spec.rows, ctx.train.targets.device
        if self.fold:
            with ctx.uncharged():  # traced without data
                self._pairs = foldable(ctx.model)
        self.register_buffer("visited", torch.zeros(rows, dtype=torch.bool, device=device))
        self.register_buffer("consistency", torch.zeros(rows, device=device))
        self.register_buffer("before", torch.zeros(rows, ctx.spec.classes, device=device))
        if self.refresh > 1:
            made = torch.full((rows,), -1, dtype=torch.int64, device=device)
            kept = torch.zeros(rows, *ctx.spec.shape, dtype=torch.float16, device=device)
            self.register_buffer("made", made)
            self.register_buffer("perturbation", kept)

    def begin_epoch(self, ctx: Context) -> None:
        """Reset the epoch's count of attacks."""
        super().begin_epoch(ctx)
        self._attacks = 0

    def augment(self, batch: Batch, ctx: Context) -> Batch:
        """The upstream's rows, then the attacked ones."""
        if self.upstream is not None:
            batch = self.upstream.augment(batch, ctx)
        if batch.logits is not None:
            raise ValueError("the upstream of lpa3 has already run this step's forward pass")
        made = self.attacked(batch, ctx)
        if not len(made):
            return batch
        out = joined(batch, made)
        if not self.hands(ctx.spec):
            return out
        if not self.auxiliary_norm:
            clean = cast("Model", ctx.model).entered(batch.x)
            return replace(out, logits=ctx.forward(torch.cat([clean, self._entered])))
        logits = ctx.forward(batch.x)
        with on_branch(ctx.model, 1):
            return replace(out, logits=torch.cat([logits, ctx.model(made.x)]))

    def attacked(self, batch: Batch, ctx: Context, logits: Tensor | None = None) -> Batch:
        """The attacked rows alone, with the targets of their rows; may be none.

        Where embedded rows are attacked, the inputs are those of their rows. With ``logits``
        (B, K), which the network has already given for the rows, all of which have state, the
        share ``ratio`` is chosen by these, without another pass, and rows of weight 0 come last.
        """
        places, x = self._positives(batch, ctx, logits)
        y, self._entered = batch.y[places], x
        made = batch.x[places] if self._enters else x
        self._added = Added(batch.x[places], made, y)
        ctx.log(attack_selected=len(places) / len(batch))
        index = torch.full_like(places, -1)
        return Batch(made, y, self._weights(batch, places), index)

    def added(self) -> Added:
        """The attacked rows of the last batch."""
        return self._added

    def passes(self, *, chooses: bool = True) -> float:
        """Forward plus backward passes of a row of the batch: those of the attack, and training.

        Without ``chooses`` the rows are chosen by logits that are there already.
        """
        each = 2 if self.rules.radius is not None else 3
        whole = chooses and self.ratio < 1
        reference = not (whole and self.running)
        attacked = reference + self.rules.steps * each + self.rules.best + 2
        return whole + self.ratio * attacked

    def _weights(self, batch: Batch, places: Tensor) -> Tensor:
        """(n,) weights of attacked rows, in proportion to those of their rows; 0 if all are 0.

        They add up to ``weight`` times the total weight of the rows that the trainer drew.
        """
        clean, own = (batch.w * (batch.index >= 0)).sum(), batch.w[places]
        return self.weight * clean * own / own.sum().clamp_min(torch.finfo(own.dtype).tiny)

    def _positives(
        self, batch: Batch, ctx: Context, logits: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Positions (n,) of the attacked rows in the batch, and the rows after the attack."""
        if logits is not None or surely_known(batch.index, ctx.drawn):
            known = torch.arange(len(batch), device=batch.x.device)
        else:  # how many are known decides shapes, which waits for the device
            known = (batch.index >= 0).nonzero()[:, 0]
        if ctx.epoch < self.warmup or self.ratio == 0 or len(known) < self._least:
            return known[:0], batch.x[:0]
        model = cast("Model", ctx.model)
        self._looked = 0
        with self._still(model):
            places, reference = self._choose(model, batch, known, ctx, logits)
            if reference is None:
                return known[:0], batch.x[:0]
            x, index = batch.x[places], batch.index[places]
            x = model.entered(x) if self._enters else x
            attacked = self._attacked(model, x, index, reference, ctx)
            if self.noise_instead:
                norms = row_norms(attacked - x)
                attacked = noised(x, norms, ctx.spec.low, ctx.spec.high)
            ctx.log(attack_forwards=self._looked / len(batch))
            if self._attacks % self.audit_every == 0:
                with ctx.uncharged():
                    self._audit(model, x, attacked, reference, ctx)
        self._attacks += 1
        return places, attacked

    @property
    def _least(self) -> int:
        """Fewest rows that an attack needs: a single row has no batch statistics."""
        return 1 if self.running else 2

    @contextmanager
    def _still(self, model: Model) -> Iterator[None]:
        """Freeze the network for an attack, with the norms that the attack uses."""
        with frozen(model), buffers_kept(model), on_branch(model, int(self.auxiliary_norm)):
            if not self.running:
                yield
                return
            with mode(model, training=False), folded(model, self._pairs):
                yield

    def _look(self, model: Model, x: Tensor) -> Seen:
        """The network's outputs for rows, which are counted."""
        self._looked += len(x)
        return look(model, x)

    def _choose(
        self, model: Model, batch: Batch, known: Tensor, ctx: Context, given: Tensor | None
    ) -> tuple[Tensor, Reference | None]:
        """Positions of the rows to attack, and their reference; None if there are too few."""
        places, features = known, None
        with torch.no_grad():
            if self.ratio < 1 and given is not None:
                consistency = self._consistency(batch.index, given, ctx)
                places = lowest(consistency.where(batch.w > 0, math.inf), self.ratio)
            elif self.ratio < 1:
                self._looked += len(known)
                features = model.features(batch.x[known])
                logits = logits_of(model, features)
                chosen = lowest(self._consistency(batch.index[known], logits, ctx), self.ratio)
                places, features = known[chosen], [each[chosen] for each in features]
            if len(places) < self._least:
                return places[:0], None
            if features is None or not self.running:
                # Batch statistics of the attacked rows alone, as in the attack.
                seen = self._look(model, batch.x[places])
            else:
                seen = Seen(perceptual(features), logits_of(model, features))
        one = exclusive(ctx.task)
        y = predicted(seen.logits, one) if self.label == "predicted" else batch.y[places]
        return places, Reference(seen.phi, y, likelihood(seen.logits, y, one), seen.logits)

    def _consistency(self, index: Tensor, logits: Tensor, ctx: Context) -> Tensor:
        """Time consistency (n,) of rows from their current predictions, which are stored."""
        visited, before = self.get_buffer("visited"), self.get_buffer("before")
        known, now = visited[index], logits.to(before.dtype)
        moved = divergence(now, before[index], exclusive(ctx.task))
        value = FADE * self.get_buffer("consistency")[index] - (1 - FADE) * moved
        self.get_buffer("consistency")[index] = torch.where(known, value, 0.0)
        before[index], visited[index] = now, True
        return torch.where(known, value, -math.inf)

    def _attacked(
        self, model: Model, x: Tensor, index: Tensor, reference: Reference, ctx: Context
    ) -> Tensor:
        """Attack the training rows with this ``index`` (n,), whose inputs are ``x`` (n, *S)."""
        see, one, spec = partial(self._look, model), exclusive(ctx.task), ctx.spec
        start = (x + NOISE * (2 * torch.rand_like(x) - 1)).clamp(spec.low, spec.high)
        if self.refresh == 1:
            return attack(see, x, start, reference, self.rules, one, spec)
        made, kept = self.get_buffer("made"), self.get_buffer("perturbation")
        warm = (made[index] >= 0) & (ctx.epoch - made[index] < self.refresh)
        stored = (x + kept[index].to(x.dtype)).clamp(spec.low, spec.high)
        start = torch.where(per_row(warm, x), stored, start)
        late = min(round(0.6 * self.rules.steps), max(0, self.rules.steps - 1))
        out = torch.empty_like(x)
        for rows, first in ((~warm, 0), (warm, late)):
            if bool(rows.any()):
                own = Reference(*(each[rows] for each in reference))
                out[rows] = attack(
                    see, x[rows], start[rows], own, self.rules, one, spec, first=first
                )
        kept[index] = (out - x).to(kept.dtype)
        # An unchanged row has no perturbation to continue from.
        age = torch.where(warm, made[index], ctx.epoch)
        made[index] = torch.where(row_norms(out - x) > 0, age, -1)
        return out

    @torch.no_grad()
    def _audit(
        self, model: Model, x: Tensor, attacked: Tensor, reference: Reference, ctx: Context
    ) -> None:
        """Log how far attacked rows are, compared with noise of equal norm, and what they keep."""
        one, margin, spec = exclusive(ctx.task), self.rules.margin, ctx.spec
        seen = look(model, attacked)
        judged = judge(seen, reference, margin, one)
        fallen = reference.likelihood - likelihood(seen.logits, reference.y, one)
        norms = row_norms(attacked - x)
        noisy = noised(x, norms, spec.low, spec.high)
        noise = judge(look(model, noisy), reference, margin, one).distance
        told = {
            "attack_margin_kept": (judged.excess <= SLACK).all(dim=1).to(x.dtype).mean(),
            "attack_prediction_kept": judged.same.to(x.dtype).mean(),
            "attack_unmoved": (norms == 0).to(x.dtype).mean(),
            "attack_fall": fallen.amax(dim=1).mean(),
            "attack_harder": (fallen > 0).any(dim=1).to(x.dtype).mean(),
            "attack_distance": judged.distance.mean(),
            "attack_noise_distance": noise.mean(),
            "attack_beats_noise": (judged.distance > noise).to(x.dtype).mean(),
        }
        if self.fold:
            ctx.log(attack_folded=len(self._pairs))
        for share in (0.05, 0.5, 0.95):
            told[f"attack_norm_{round(100 * share):02d}"] = norms.quantile(share)
        ctx.log(**{name: float(value) for name, value in told.items()})
