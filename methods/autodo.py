"""AutoDO: a learned warp, weight and soft label per training row, by implicit differentiation."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import AdamW

from methods.base import ANYTHING, IMAGES, Batch, Context, Method, Model, Spec, Task
from methods.functional import (
    affine_warp,
    frozen,
    mode,
    reweighted,
    sent,
    surely_known,
)
from methods.implicit import (
    DivergenceError,
    Head,
    IndefiniteError,
    answers,
    conjugate_gradients,
    extreme_eigenvalues,
    lanczos_start,
    refuse_divergence,
    series,
)

OPERATIONS = ("rotate", "translate_x", "translate_y", "shear_x", "shear_y", "scale_x", "scale_y")
RANGES = (math.radians(30), 0.45, 0.45, 0.3, 0.3, math.log(1.5), math.log(1.5))
"""Values at magnitude 1: angle, shares of width and height, matrix entries, logarithms."""
CHUNK = 512
"""Meta rows per forward pass."""


class AutoDO(Method):
    """Learn augmentation, weight and soft label of each training row from meta rows.

    For row i it learns a probability and a magnitude of each of seven warps (rotation about the
    centre, translation, shear and scale along both axes), a weight 1.44 softplus(omega_i) and a
    soft label softmax(t_i) (``augment``, ``weight``, ``label`` switch these parts on; ``shared``
    learns one set of warps for all rows). The network trains on the warped rows with the
    Kullback-Leibler divergence from soft label to prediction, or with ``symmetric`` the mean of
    both directions.

    From epoch ``start`` on (a share of the epochs such as 0.25, or a whole number of epochs) an
    outer phase precedes each epoch (the log counts its steps as ``outer_steps``). With the network
    frozen in eval mode, it passes once over the training rows in batches of ``outer_batch`` rows
    (``batch``: as many as a training batch) and updates their hyper-parameters by RMSprop with the
    learning rate ``learning_rate`` (cosine schedule) down the hypergradient
    - v^T H^-1 d2L / dtheta dlambda (Eq. 5), theta the head's weights, v the meta gradient over
    ``meta_rows`` rows or ``full``. ``solver``: ``neumann`` with ``terms`` and ``step`` (or
    ``auto``, from the largest eigenvalue), ``cg`` to a relative residual of ``tolerance``,
    ``identity`` (DARTS). ``curvature``: ``gauss_newton``, or the ``hessian`` of the loss, which may
    be indefinite. Both include ``damping`` and the optimiser's weight decay if it is a penalty (not
    AdamW's). A series that diverges is an error, or with ``force`` a warning and an entry in the
    log. With a number as ``step`` this check, which the paper lacks, is not charged.

    Rows that the upstream adds (index -1) stay unchanged; a learned label replaces whatever the
    upstream does to the label.

    ``bias_correction`` divides RMSprop's mean square of a row's gradients by the sum of the weights
    that they have in it. Without it the mean starts at 0: a row's first step is ten times the
    learning rate, whatever the gradient, and later ones are shorter.

    ``preset=exact`` solves by conjugate gradients, uses the meta gradient over all meta rows, and
    corrects RMSprop. Its learning rate is then 0.2, because one of 0.05 hardly moves a short run:
    in 150 outer steps on 150 digits the median probability moves by 0.07 and magnitude by 0.09 of
    their range, with 0.05 by 0.02 each; without correction by 0.10 and 0.12, most of it in the
    first step. Neither paper nor code corrects it.

    **Deviations.** From the paper (P) and its authors' code at commit ad80c5c (C): weights keep the
    total of a batch, and the hypergradient accounts for it; one warp about the image's centre, in
    shares of its size, with logarithmic scale along each axis (P has one scale), black outside, and
    without C's upsampling to four times the size; no operations besides (P has RandAugment's, C its
    colour operations: ``upstream=randaugment(ops=colour)``); sigma is the standard deviation over
    the full ``RANGES`` (C; P has a variance and a further M/10); initial probability 0.25 (P; C has
    0.2) and magnitude 0.5; soft labels start from ``smoothing`` 0.1 (P; C has 0.05); Gauss-Newton
    curvature instead of the Hessian (in expectation P's Fisher information); the factor ``step``
    before the sum is kept; the weight decay is part of H (P; C omits it); the loss is symmetric
    whatever is learned, with hard labels smoothed (with ``symmetric=when_soft`` they have
    cross-entropy, as in C); meta rows are not augmented (P; C augments them); the outer learning
    rate has no warm-up and falls to a thousandth.
    """

    source = "Gudovskiy et al., AutoDO, CVPR 2021, arXiv:2103.05863"
    version = 3
    operations = OPERATIONS
    needs = frozenset({"meta", "features"})
    before_forward = task_loss = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "published": {},
        "exact": {
            "solver": "cg",
            "damping": 0.01,
            "meta_rows": "full",
            "bias_correction": True,
            "learning_rate": 0.2,
        },
    }
    costs: Mapping[str, float] = {"published": 1.9, "exact": 1.8}
    space: ClassVar[Mapping[str, Any]] = {
        "learning_rate": ("loguniform", 0.005, 0.2),
        "start": ("uniform", 0.1, 0.6),
        "damping": ("loguniform", 0.001, 1.0),
    }

    def __init__(
        self,
        *,
        upstream: Method | None = None,
        augment: bool = True,
        weight: bool = True,
        label: bool = True,
        shared: bool = False,
        start: int | float = 0.25,
        solver: Literal["neumann", "cg", "identity"] = "neumann",
        terms: int = 5,
        step: float | Literal["auto"] = 0.01,
        force: bool = False,
        damping: float = 0.0,
        tolerance: float = 1e-4,
        curvature: Literal["gauss_newton", "hessian"] = "gauss_newton",
        meta_rows: int | Literal["full"] = 256,
        outer_batch: int | Literal["batch"] = "batch",
        learning_rate: float = 0.05,
        bias_correction: bool = False,
        smoothing: float = 0.1,
        symmetric: Literal["always", "when_soft", "never"] = "always",
    ) -> None:
        super().__init__(upstream)
        _check_start(start)
        positive = {"tolerance": tolerance, "learning_rate": learning_rate}
        if not isinstance(step, str):
            positive["step"] = step
        for name, value in positive.items():
            if value <= 0:
                raise ValueError(f"{name}: expected a number above 0, got {value}")
        if damping < 0:
            raise ValueError(f"damping: expected 0 or more, got {damping}")
        if terms < 0:
            raise ValueError(f"terms: expected 0 or more, got {terms}")
        if not 0 < smoothing < 1:
            raise ValueError(f"smoothing: expected a number in (0, 1), got {smoothing}")
        for name, rows in (("outer_batch", outer_batch), ("meta_rows", meta_rows)):
            if not isinstance(rows, str) and rows < 2:
                raise ValueError(f"{name}: expected 2 or more rows, got {rows}")
        if not (augment or weight or label):
            raise ValueError("augment, weight, label: at least one must be true")
        series_only = "" if solver == "neumann" else f"solver={solver}"
        for name, given, beside in (
            ("shared", shared, "" if augment else "augment=false"),
            ("terms", terms != 5, series_only),
            ("step", step != 0.01, series_only),
            ("force", force, series_only),
            ("tolerance", tolerance != 1e-4, "" if solver == "cg" else f"solver={solver}"),
        ):
            if given and beside:
                raise ValueError(f"{name}: it has no effect with {beside}; leave it out")
        self.parts_on = {"augment": augment, "weight": weight, "label": label}
        self.kinds = (IMAGES if augment else ANYTHING) - {"labels"}
        self.shared, self.start = shared, start
        self.solver, self.terms, self.step, self.force = solver, terms, step, force
        self.damping, self.tolerance = damping, tolerance
        self.gauss_newton = curvature == "gauss_newton"
        self.meta_rows, self.outer_batch = meta_rows, outer_batch
        self.learning_rate, self.smoothing = learning_rate, smoothing
        self.bias_correction = bias_correction
        self.symmetric = symmetric == "always" or (symmetric == "when_soft" and label)
        beginning = {
            **self.parts_on,
            "shared": shared,
            "smoothing": smoothing,
            "symmetric": symmetric,
        }
        told = ", ".join(f"{name}={value}" for name, value in beginning.items())
        self.controls = (
            f"frozen(upstream=autodo({told}, upstream={{upstream}}))",
            *(("shuffled_weights(upstream={self})",) if weight else ()),
            f"head_refit(upstream=frozen(upstream=autodo({told}, upstream={{upstream}})))",
        )
        self._drawn = torch.zeros(0, len(OPERATIONS))
        self._given = torch.zeros(0, 0)
        self._warned = False

    def supports(self, task: Task, spec: Spec) -> str:
        """Images with one label per row; an upstream that keeps rows apart."""
        if self.upstream is not None and self.upstream.mixes_rows:
            return "autodo learns hyper-parameters per row, but its upstream mixes rows"
        if self.upstream is not None and any(each.comes_first for each in self.upstream.parts()):
            return "autodo visits every row once, but its upstream draws its own rows"
        if self.upstream is not None and "features" in self.upstream.requires():
            return (
                "autodo also runs its upstream in the outer phase, where the network is frozen, "
                "but its upstream needs the network in training"
            )
        return super().supports(task, spec)

    def setup(self, ctx: Context) -> None:
        """Allocate the hyper-parameters of each row at their initial values."""
        super().setup(ctx)
        rows, like = ctx.spec.rows, ctx.train.targets
        self._given = like
        if self.parts_on["augment"]:
            policies, quarter = 1 if self.shared else rows, math.log(0.25 / 0.75)
            self.chance = self._states(like.new_full((policies, len(OPERATIONS)), quarter))
            self.spread = self._states(like.new_zeros(policies, len(OPERATIONS)))
        if self.parts_on["weight"]:
            self.omega = self._states(like.new_zeros(rows, 1))
        if self.parts_on["label"]:
            self.soft = self._states(self._smoothed(like).log())
        self.register_buffer("outer_steps", torch.zeros((), dtype=torch.int64, device=like.device))

    def begin_epoch(self, ctx: Context) -> None:
        """From epoch ``start`` on, one pass of outer steps over the training rows."""
        super().begin_epoch(ctx)
        # 0.07 of 100 epochs is a little above 7 in floating point.
        share = math.ceil(self.start * ctx.epochs - 1e-9)
        first = self.start if isinstance(self.start, int) else share
        if ctx.epoch >= first and not self.frozen:
            model = cast("Model", ctx.model)
            left = (ctx.epoch - first) / max(1, ctx.epochs - first)
            rate = self.learning_rate * (0.001 + 0.999 * (1 + math.cos(math.pi * left)) / 2)
            with mode(model, training=False), frozen(model):
                self._outer_phase(model, ctx, rate)
        ctx.log(outer_steps=int(self.get_buffer("outer_steps")))

    def augment(self, batch: Batch, ctx: Context) -> Batch:
        """Warped rows with their soft labels and weights; added rows (index -1) unchanged."""
        if self.upstream is not None:
            batch = self.upstream.augment(batch, ctx)
        if batch.logits is not None:
            raise ValueError("the upstream of autodo has already run this step's forward pass")
        known, place = batch.index >= 0, batch.index.clamp_min(0)
        x, y, w = batch.x, batch.y, batch.w
        if self.parts_on["augment"]:
            policy = torch.zeros_like(place) if self.shared else place
            x = self._warped(x, self.chance.values[policy], self.spread.values[policy], known)
        if self.parts_on["label"]:
            y = torch.where(known[:, None], self.soft.values[place].softmax(dim=1).to(y.dtype), y)
        if self.parts_on["weight"]:
            w = reweighted(w, self._factors(place, known).to(w.dtype))
        return replace(batch, x=x, y=y, w=w)

    def losses(self, logits: Tensor, batch: Batch, ctx: Context) -> Tensor:
        """KL(s||p) per row (B,), or its mean with KL(p||s); hard targets are smoothed first."""
        if not (self.symmetric or self.parts_on["label"]):
            return ctx.task.losses(logits, batch.y)
        s = self._smoothed(batch.y)
        if self.parts_on["label"]:
            s = torch.where((batch.index < 0)[:, None], s, batch.y)
        log_p, log_s = logits.log_softmax(dim=1), _log(s)
        losses = (s * (log_s - log_p)).sum(dim=1)
        if self.symmetric:
            losses = (losses + (log_p.exp() * (log_p - log_s)).sum(dim=1)) / 2
        return losses

    def captions(self) -> list[str]:
        """What the upstream did to each row of the last batch, then the row's warp."""
        before = super().captions()
        if not self.parts_on["augment"]:
            return before
        own = captions(self._drawn)
        if not before:
            return own
        return [", ".join(filter(None, texts)) for texts in zip(before, own, strict=True)]

    def learned(self) -> dict[str, Tensor]:
        """Per training row: weight (1: unchanged), label, each warp's probability and magnitude."""
        found = super().learned()
        if self.parts_on["augment"]:
            found["probability"] = self.chance.values.sigmoid()
            found["magnitude"] = self.spread.values.sigmoid()
        if self.parts_on["weight"]:
            found["weight"] = _factor(self.omega.values[:, 0])
        if self.parts_on["label"]:
            found["label"] = self.soft.values.softmax(dim=1)
        return found

    def as_policy(self, learned: Mapping[str, Any]) -> dict[str, Any]:
        """A sub-policy of the seven warps, for each class or for all."""
        if not learned:
            return {}
        pairs = zip(learned["probability"].tolist(), learned["magnitude"].tolist(), strict=True)
        parts = [
            {"sub_policies": [[list(each) for each in zip(OPERATIONS, *pair, strict=True)]]}
            for pair in pairs
        ]
        return {"ranges": "autodo", **(parts[0] if len(parts) == 1 else {"classes": parts})}

    def learning(self) -> dict[str, float]:
        """Outer steps, and the median distance of what is learned from its start.

        Over rows and warps for probability and magnitude, from 0 to 1; over rows for the weight,
        relative to its start of 1, and the label, as the total variation distance.
        """
        own = AutoDO.learned(self)
        found = {"outer_steps": float(self.get_buffer("outer_steps"))}
        for name, first in (("probability", 0.25), ("magnitude", 0.5), ("weight", 1.0)):
            if name in own:
                found[name] = float((own[name] - first).abs().median())
        if "label" in own:
            distance = (own["label"] - self._smoothed(self._given)).abs().sum(dim=1) / 2
            found["label"] = float(distance.median())
        return {**super().learning(), **found}

    def _factors(self, place: Tensor, known: Tensor) -> Tensor:
        """(B,) factor on each row's weight; 1 for added rows."""
        return torch.where(known, _factor(self.omega.values[place, 0]), 1.0)

    def _states(self, values: Tensor) -> RowStates:
        return RowStates(values, self.bias_correction)

    def _smoothed(self, y: Tensor) -> Tensor:
        return (1 - self.smoothing) * y + self.smoothing / y.shape[1]

    def _warped(self, x: Tensor, chance: Tensor, spread: Tensor, known: Tensor) -> Tensor:
        """Rows (B, C, H, W) under a warp drawn from their policy, differentiable in the policy."""
        uniform = torch.rand_like(chance).clamp(1e-6, 1 - 1e-6)
        soft = (chance + uniform.log() - (-uniform).log1p()).sigmoid()  # two-class Gumbel-softmax
        bit = (soft > 0.5).to(soft.dtype) + soft - soft.detach()
        amounts = bit * spread.sigmoid() * torch.randn_like(spread) * _ranges(spread)
        amounts = amounts * known[:, None]
        self._drawn = amounts.detach()
        return affine_warp(x, _matrix(amounts, *x.shape[-2:]), "bilinear")

    def _outer_phase(self, model: Model, ctx: Context, rate: float) -> None:
        h, y = self.meta_features(model, ctx)
        v: Tensor | None = None
        size = ctx.batch_size if isinstance(self.outer_batch, str) else self.outer_batch
        for number, batch in enumerate(ctx.train.batches(max(2, size))):
            if not isinstance(self.meta_rows, str):
                some = torch.randperm(len(h), device=h.device)[: self.meta_rows]
                v = _head_gradient(model, h[some], y[some])
            elif v is None:  # the network is frozen, so once per phase
                v = _head_gradient(model, h, y)
            self._outer_step(model, ctx, batch, v, rate, number)
        if self.parts_on["label"]:
            changed = self.soft.values.argmax(dim=1) != ctx.train.targets.argmax(dim=1)
            ctx.log(labels_changed=float(changed.float().mean()))

    @torch.no_grad()
    def meta_features(self, model: Model, ctx: Context) -> tuple[Tensor, Tensor]:
        """The head's inputs for all meta rows (M, D) and their targets; exact while frozen."""
        if ctx.meta is None:
            raise ValueError("autodo learns from meta rows, but the context has none")
        parts = [(_embedded(model, batch.x), batch.y) for batch in ctx.meta.batches(CHUNK)]
        return torch.cat([h for h, _ in parts]), torch.cat([y for _, y in parts])

    def _outer_step(
        self, model: Model, ctx: Context, batch: Batch, v: Tensor, rate: float, number: int
    ) -> None:
        """Update the hyper-parameters of a batch's rows along the negative hypergradient."""
        drawn = batch.index
        if self.upstream is not None:
            batch = self.upstream.augment(batch, ctx)
        known = batch.index >= 0
        # A mask waits for the device, which is told how many rows it leaves.
        own = slice(None) if surely_known(batch.index, drawn) else known
        place = batch.index.clamp_min(0)
        policy = torch.zeros_like(place) if self.shared else place
        leaves: list[Tensor] = []
        if self.parts_on["augment"]:
            leaves = [
                part.values[policy].detach().requires_grad_() for part in (self.chance, self.spread)
            ]
            with torch.enable_grad():
                h = _embedded(model, self._warped(batch.x, leaves[0], leaves[1], known))
        else:
            with torch.no_grad():
                h = _embedded(model, batch.x)
        c = batch.w
        if self.parts_on["weight"]:
            c = reweighted(c, self._factors(place, known))
        held = h.detach()
        head = Head(
            h=held,
            c=c,
            log_p=model.head(held).log_softmax(dim=1),
            log_s=self._log_targets(batch.y, place, known),
            symmetric=self.symmetric,
            gauss_newton=self.gauss_newton,
            decay=_decay(ctx, model) + self.damping,
        )
        found = answers(head, model.head.weight, self._solved(head, v, ctx, log=number == 0))
        self.get_buffer("outer_steps").add_(1)
        now = self.get_buffer("outer_steps")
        rows = place[own]
        if self.parts_on["weight"]:
            # For c = w f (sum w / sum w f): dc_i / df_j = c_i (1_ij / f_i - c_j / (f_j sum c))
            total = c.sum()
            mean = (c * found.coefficients).sum() / torch.where(total > 0, total, 1.0)
            slope = c * (found.coefficients - mean) * _relative_slope(self.omega.values[place, 0])
            self.omega.visit(rows, slope[own, None], now, rate)
        if self.parts_on["label"]:
            self.soft.visit(rows, found.targets[own], now, rate)
        if leaves:
            gradients = torch.autograd.grad(h, leaves, found.inputs)
            for part, gradient in zip((self.chance, self.spread), gradients, strict=True):
                if self.shared:
                    part.visit(policy[:1], gradient.sum(dim=0, keepdim=True), now, rate)
                else:
                    part.visit(rows, gradient[own], now, rate)

    def _log_targets(self, y: Tensor, place: Tensor, known: Tensor) -> Tensor:
        """(B, K) logarithm of the targets that ``losses`` uses."""
        if not (self.symmetric or self.parts_on["label"]):
            return _log(y)
        smoothed = _log(self._smoothed(y))
        if not self.parts_on["label"]:
            return smoothed
        return torch.where(known[:, None], self.soft.values[place].log_softmax(dim=1), smoothed)

    def _solved(self, head: Head, v: Tensor, ctx: Context, log: bool) -> Tensor:
        """H^-1 v (K, D) from the chosen solver.

        Raises:
            DivergenceError, IndefiniteError: the series diverges, or the result is not finite.
            SingularError: conjugate gradients find no solution.
        """
        largest: float | None = None
        if self.solver == "identity":
            solved = v
        elif self.solver == "cg":
            solved, iterations = conjugate_gradients(head, v, self.tolerance)
            if log:
                ctx.log(cg_iterations=iterations)
        else:
            start = lanczos_start(head)
            # With a fixed step the estimate only guards against divergence.
            with ctx.uncharged() if not isinstance(self.step, str) else nullcontext():
                ends: list[float] = torch.stack(extreme_eigenvalues(head, start)).tolist()
            smallest, largest = ends
            # For a saturated head the curvature is pure rounding error.
            least = torch.finfo(v.dtype).eps
            step = 1 / (1.2 * max(largest, least)) if isinstance(self.step, str) else self.step
            self._guard(step, smallest, largest, ctx)
            solved = series(head, v, self.terms, step)
        if not bool(solved.isfinite().all()):
            raise DivergenceError(
                f"the hypergradient is not finite after {ctx.epoch} epochs (solver={self.solver}): "
                "either the network or the series has diverged"
            )
        if log:
            with ctx.uncharged():
                rest = head.product(solved) - v
                if largest is None:
                    largest = float(extreme_eigenvalues(head).largest)
                ctx.log(
                    lambda_max=largest,
                    residual=float(rest.norm() / v.norm()),
                    cosine_with_identity=float(
                        F.cosine_similarity(solved.flatten(), v.flatten(), dim=0)
                    ),
                )
        return solved

    def _guard(self, step: float, smallest: float, largest: float, ctx: Context) -> None:
        """Refuse a series that diverges, or with ``force`` warn once and log it."""
        try:
            refuse_divergence(step, smallest, largest)
            diverges = False
        except (DivergenceError, IndefiniteError) as reason:
            if not (self.force and math.isfinite(largest)):
                raise
            diverges = True
            if not self._warned:
                warnings.warn(
                    f"{reason}; force=true continues anyway", RuntimeWarning, stacklevel=2
                )
                self._warned = True
        if self.force:
            ctx.log(series_diverges=float(diverges))


class Warp(Method):
    """AutoDO's seven warps at one fixed strength for all images.

    Each applies with probability ``p``, by a normally distributed amount whose standard deviation
    is the share ``magnitude`` of its range. The defaults are AutoDO's start.
    """

    source = "Gudovskiy et al., AutoDO, CVPR 2021, arXiv:2103.05863"
    kinds = IMAGES

    def __init__(self, *, p: float = 0.25, magnitude: float = 0.5) -> None:
        super().__init__()
        for name, value in (("p", p), ("magnitude", magnitude)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name}: expected a number in [0, 1], got {value}")
        self.p, self.magnitude = p, magnitude

    def augment(self, batch: Batch, ctx: Context) -> Batch:
        """The warped rows (B, C, H, W)."""
        return replace(batch, x=warped(batch.x, self.p, self.magnitude)[0])


def warped(
    x: Tensor, probability: Tensor | float, magnitude: Tensor | float
) -> tuple[Tensor, Tensor]:
    """Images (B, C, H, W) under drawn warps, and the amounts (B, 7) of the warps.

    ``probability`` and ``magnitude`` are those of all warps, or (B, 7) in the order of
    ``OPERATIONS``.
    """
    draws = x.new_empty(len(x), len(OPERATIONS)).uniform_()
    bit = draws > 1 - probability
    amounts = bit * magnitude * torch.randn_like(draws) * _ranges(draws)
    return affine_warp(x, _matrix(amounts, *x.shape[-2:]), "bilinear"), amounts


def captions(amounts: Tensor) -> list[str]:
    """What each row's warp (B, 7) does to the image, in words."""
    return [_told(each) for each in amounts.tolist()]


def _ranges(like: Tensor) -> Tensor:
    """(7,) the value of each warp at magnitude 1."""
    return sent(torch.tensor(RANGES, dtype=like.dtype), like.device)


class RowStates(torch.nn.Module):
    """One or more values per row, and the state of the RMSprop that updates them.

    Equal to a dense RMSprop over all rows: for a row without a gradient only the mean square
    decays, which is caught up at its next visit. With ``corrected`` the mean square is divided by
    the sum of the weights that the row's own gradients have in it, and is a weighted mean of their
    squares: a row's first step is one learning rate, not ten.
    """

    values: Tensor
    square: Tensor
    mass: Tensor
    last: Tensor

    def __init__(self, values: Tensor, corrected: bool = False) -> None:
        super().__init__()
        self.corrected = corrected
        self.register_buffer("values", values)
        self.register_buffer("square", torch.zeros_like(values))
        self.register_buffer("mass", values.new_zeros(len(values), 1))
        last = torch.zeros(len(values), dtype=torch.int64, device=values.device)
        self.register_buffer("last", last)

    @torch.no_grad()
    def visit(
        self, index: Tensor, gradient: Tensor, now: Tensor, rate: float, decay: float = 0.99
    ) -> None:
        """Update the rows ``index`` (B,), each once, at step ``now``, counted from 1."""
        gradient = gradient.to(self.values.dtype)
        away = (now - self.last[index])[:, None].to(self.square.dtype)
        kept = decay**away
        square = self.square[index] * kept + (1 - decay) * gradient.square()
        mass = self.mass[index] * kept + (1 - decay)
        mean = square / mass if self.corrected else square
        self.values[index] -= rate * gradient / (mean.sqrt() + 1e-8)
        self.square[index] = square
        self.mass[index] = mass
        self.last[index] = now


def _check_start(start: int | float) -> None:
    """Refuse what is neither a share of the epochs nor a number of epochs.

    Raises:
        ValueError: says which of the two to write.
    """
    if isinstance(start, int) and not isinstance(start, bool):
        if start < 0:
            raise ValueError(f"start: expected an epoch of 0 or more, got {start}")
    elif not (isinstance(start, float) and 0 < start < 1):
        raise ValueError(
            "start: expected a share of the epochs below 1, such as 0.25, or a whole number of "
            f"epochs, such as 1, got {start}; write start=1 for an epoch or a share below 1"
        )


def _factor(omega: Tensor) -> Tensor:
    """Weight of a row: softplus(omega) / ln 2, which is 1 at omega = 0."""
    return F.softplus(omega) / math.log(2)


def _relative_slope(omega: Tensor) -> Tensor:
    """Derivative of log ``_factor``, which tends to 1 as the factor tends to 0."""
    tiny = torch.finfo(omega.dtype).tiny
    factor = F.softplus(omega)
    return torch.where(factor > tiny, omega.sigmoid() / factor.clamp_min(tiny), 1.0)


def _log(s: Tensor) -> Tensor:
    return s.clamp_min(torch.finfo(s.dtype).tiny).log()


def _embedded(model: Model, x: Tensor) -> Tensor:
    return model.embed(model.features(x))


@torch.no_grad()
def _head_gradient(model: Model, h: Tensor, y: Tensor) -> Tensor:
    """(K, D) gradient of the mean cross-entropy with respect to the head's weights."""
    return (model.head(h).softmax(dim=1) - y).T @ h / len(h)


def _decay(ctx: Context, model: Model) -> float:
    """The optimiser's penalty on the head; AdamW's weight decay is not a penalty."""
    for group in ctx.optimizer.param_groups:
        decoupled = isinstance(ctx.optimizer, AdamW) or group.get("decoupled_weight_decay", False)
        if any(each is model.head.weight for each in group["params"]) and not decoupled:
            return float(group.get("weight_decay", 0.0))
    return 0.0


def _matrix(amounts: Tensor, height: int, width: int) -> Tensor:
    """(B, 2, 3) from output to input positions, in pixels, about the centre."""
    angle, right, down, shear_x, shear_y, log_x, log_y = amounts.unbind(dim=1)
    cos, sin = angle.cos(), angle.sin()
    # rotation times shear times scale
    xx = (cos - sin * shear_y) * log_x.exp()
    xy = (cos * shear_x - sin) * log_y.exp()
    yx = (sin + cos * shear_y) * log_x.exp()
    yy = (sin * shear_x + cos) * log_y.exp()
    middle_x, middle_y = width / 2, height / 2
    x = middle_x + right * width - xx * middle_x - xy * middle_y
    y = middle_y + down * height - yx * middle_x - yy * middle_y
    return torch.stack([torch.stack([xx, xy, x], 1), torch.stack([yx, yy, y], 1)], dim=1)


def _told(amounts: list[float]) -> str:
    """What a warp does to the image, in words, without negligible parts."""
    angle, right, down, shear_x, shear_y, log_x, log_y = amounts
    parts = [
        (angle, f"rotate {math.degrees(angle):+.0f}°"),
        (right, f"shift x {-right:+.0%}"),
        (down, f"shift y {-down:+.0%}"),
        (shear_x, f"shear x {shear_x:+.2f}"),
        (shear_y, f"shear y {shear_y:+.2f}"),
        (log_x, f"scale x {math.exp(-log_x):.2f}"),
        (log_y, f"scale y {math.exp(-log_y):.2f}"),
    ]
    return ", ".join(text for value, text in parts if abs(value) > 0.01)
