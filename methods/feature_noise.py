"""ISDA and BSDA: Gaussian noise on the input of the head instead of changes to the image."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from methods.base import ANYTHING, Batch, Context, Method, Model, Spec, Task

BETAS, EPS, WEIGHT_DECAY = (0.9, 0.999), 1e-8, 1e-3
"""Of the estimator's AdamW: torch's defaults, and the weight decay of the authors' script."""
LINEAR, NORMS = 5, 4
"""Layers of the estimator: two with a normalisation and one for the log-variance, two to decode."""


class FeatureNoise(Method, ABC):
    """A method that puts noise on the embedding, the input of the network's linear head."""

    kinds = ANYTHING
    before_forward = task_loss = True
    needs = frozenset({"features"})
    hands_logits = True
    isotropic: bool = False
    """Whether the noise has the same variance in all directions, at the same expected squared norm
    per row; set by the control ``isotropic_noise``."""

    def setup(self, ctx: Context) -> None:
        """Check that the head is accessible."""
        head_of(ctx)
        super().setup(ctx)


def head_of(ctx: Context) -> nn.Linear:
    """The network's head."""
    return _model(ctx).head


def _model(ctx: Context) -> Model:
    """The network.

    Raises:
        TypeError: it is not a Model, so its head is not accessible.
    """
    if not isinstance(ctx.model, Model):
        raise TypeError(
            f"noise on the embedding: expected a methods.base.Model, whose head is accessible, got "
            f"{type(ctx.model).__name__}"
        )
    return ctx.model


class _Tap(nn.Module):
    """A head that keeps its inputs.

    Not a hook: torch.compile may take the code that it compiled for an equal network without one.
    """

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.head = head
        self.inputs: list[Tensor] = []

    def forward(self, a: Tensor) -> Tensor:
        """Logits (B, K)."""
        self.inputs.append(a)
        return self.head(a)


def embedded(x: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
    """Embedding (B, D) and logits (B, K) of this step's forward pass, both with graph.

    Raises:
        RuntimeError: the network did not call its head exactly once.
    """
    model = _model(ctx)
    head, tap = model.head, _Tap(model.head)
    model.head = cast("nn.Linear", tap)
    try:
        logits = ctx.forward(x)
    finally:
        model.head = head
    if len(tap.inputs) != 1:
        raise RuntimeError(
            f"the network called its head {len(tap.inputs)} times in a step, expected 1"
        )
    return tap.inputs[0].to(logits.dtype), logits


class Isda(FeatureNoise):
    """Implicit noise on the embedding with the covariance of the row's class, in closed form.

    Row i with embedding a_i, logits z_i and class y is trained on the limit of infinitely many
    copies a_i + N(0, lambda Sigma_y), by an upper bound of their mean cross-entropy (Jensen's
    inequality):

        log sum_j exp(z_ij - z_iy + lambda / 2 (w_j - w_y)^T Sigma_y (w_j - w_y)),

    w_j the head's weights (D,) of class j. Sigma_y (D, D) is the covariance of the embeddings of
    class y, over all training rows and steps so far, this step's included: every visit counts the
    same, however old. It has no gradient; the head's weights have. lambda is ``strength`` t / T in
    epoch t of T, counted from 0.

    With a soft target the loss is the expectation for a class drawn from it, and row i counts y_ik
    times for the covariance of class k; for one-hot targets this is the paper's. If the upstream
    mixes rows, the covariances contain the way from class to class.

    **Deviations.** None known from the authors' code at commit 46d208e, on one-hot targets: it
    computes the quadratic term per row instead of per class.
    """

    kinds = ANYTHING - {"labels"}
    source = (
        "Wang et al., Implicit Semantic Data Augmentation for Deep Networks, NeurIPS 2019, "
        "arXiv:1909.12220"
    )
    controls = ("isotropic_noise(upstream={self})",)
    space: ClassVar[Mapping[str, Any]] = {"strength": ("loguniform", 0.1, 10.0)}

    def __init__(self, *, upstream: Method | None = None, strength: float = 0.5) -> None:
        super().__init__(upstream)
        if not strength >= 0:
            raise ValueError(f"strength: expected 0 or more, got {strength}")
        self.strength = strength

    def setup(self, ctx: Context) -> None:
        """Allocate count, mean and covariance of each class: K D^2 numbers."""
        super().setup(ctx)
        head = head_of(ctx)
        classes, width = head.weight.shape
        self.register_buffer("count", head.weight.new_zeros(classes))
        self.register_buffer("mean", head.weight.new_zeros(classes, width))
        self.register_buffer("covariance", head.weight.new_zeros(classes, width, width))

    def begin_epoch(self, ctx: Context) -> None:
        """Log the strength of this epoch, and the traces of the covariances so far."""
        super().begin_epoch(ctx)
        with ctx.uncharged():
            ctx.log(strength=self._strength(ctx), covariance_trace=float(self._traces().mean()))

    def augment(self, batch: Batch, ctx: Context) -> Batch:
        """The upstream's batch with its logits; its embeddings are added to the covariances."""
        if self.upstream is not None:
            batch = self.upstream.augment(batch, ctx)
        a, logits = embedded(batch.x, ctx)
        with torch.no_grad():
            self._add(a, batch.y.to(a.dtype))
        return replace(batch, logits=logits)

    def losses(self, logits: Tensor, batch: Batch, ctx: Context) -> Tensor:
        """The bound (B,)."""
        shift = self._strength(ctx) / 2 * self._variances(head_of(ctx).weight)
        # Entry (i, k, j): the logit of class j if row i has label k.
        log_p = F.log_softmax(logits[:, None, :] + shift, dim=2).diagonal(dim1=1, dim2=2)
        return -(batch.y * log_p).sum(dim=1)

    def learned(self) -> dict[str, Tensor]:
        """Per class the trace of its covariance, and how many embeddings it is from."""
        found = {"covariance_trace": self._traces(), "count": self.get_buffer("count")}
        return {**super().learned(), **found}

    def _strength(self, ctx: Context) -> float:
        return self.strength * ctx.epoch / ctx.epochs

    def _traces(self) -> Tensor:
        return self.get_buffer("covariance").diagonal(dim1=1, dim2=2).sum(dim=1)

    def _variances(self, weights: Tensor) -> Tensor:
        """(K, K) the variance of z_j - z_k under the noise of class k, at entry (k, j)."""
        between = weights[None, :, :] - weights[:, None, :]
        if self.isotropic:
            share = self._traces() / weights.shape[1]
            return share[:, None] * between.square().sum(dim=2)
        return (between @ self.get_buffer("covariance") * between).sum(dim=2)

    def _add(self, a: Tensor, y: Tensor) -> None:
        """Update count, mean and covariance of each class by embeddings (B, D), weights (B, K)."""
        count, mean, covariance = (
            self.get_buffer(name) for name in ("count", "mean", "covariance")
        )
        here = y.sum(dim=0)
        of_rows = y.T / here.clamp_min(torch.finfo(y.dtype).tiny)[:, None]
        centre = of_rows @ a
        apart = of_rows.sqrt()[:, :, None] * (a[None] - centre[:, None])  # (K, B, D)
        count += here
        share = torch.where(count > 0, here / count, torch.zeros_like(here))[:, None]
        moved = centre - mean
        between = share * (1 - share) * moved
        covariance.mul_(1 - share[:, :, None])
        covariance.baddbmm_(apart.mT, share[:, :, None] * apart)
        covariance.baddbmm_(between[:, :, None], moved[:, None, :])
        mean += share * moved


class _Held(NamedTuple):
    """What ``losses`` needs of the step."""

    logits: Tensor
    """(B, K) those that ``augment`` returned"""
    added: Tensor
    """(B,) with graph: what is added to the loss of each row"""


class Bsda(FeatureNoise):
    """Noise on the embedding whose size an estimator chooses per row and dimension.

    The estimator maps the embedding a (B, D) to the log-variance of magnitudes m = sigma(a) e, e
    standard normal. Of ``draws`` draws of m per row, each makes a copy

        a' = a + d m [a != 0],

    where each entry of d is 1 / (1 - drop) with probability 1 - drop, else 0, and zeros of the
    embedding stay zero. The loss of a row is that of its own logits plus alpha times

        mean loss of its copies + kl n KL(N(0, sigma^2), N(0, 1)) + reconstruction |a - a''|^2 / 2D,

    the KL divergence summed over dimensions, n the rows of the batch (the code's sum over rows),
    a'' decoded from m by a second part of the estimator, averaged over draws. alpha is ``weight``
    min(1, t / floor(T / 2)) in epoch t of T, counted from 0. All gradients reach the network,
    through the estimator too. Encoder and decoder have two layers each (linear, batch
    normalisation, GELU), all of width D, and the log-variance is linear in the encoder's output.
    The estimator is trained beside the network: by AdamW with ``learning_rate`` and a weight decay
    of 1e-3, on the gradient of the same loss at the same weights.

    **Deviations.** From the authors' code (commits e15c356 and d90d7f9; of the paper only abstract
    and introduction were at hand): there one AdamW trains network and estimator, its learning rate
    raised by 10 % after each of the first four epochs; here the estimator's is constant. There a
    loss is the mean over rows, here rows have weights. There a run stops when the validation AUC
    has not improved for eleven epochs, and the best epoch is reported; here every run has its full
    number of epochs, and the headline is the last one.
    """

    costs: Mapping[str, float] = {"published": 1.1}
    source = (
        "Zhu et al., BSDA: Bayesian Random Semantic Data Augmentation, Sensors 2024, "
        "arXiv:2403.06138"
    )
    controls = ("frozen(upstream={self})", "isotropic_noise(upstream={self})")
    space: ClassVar[Mapping[str, Any]] = {
        "drop": ("uniform", 0.5, 0.95),
        "weight": ("uniform", 0.1, 1.0),
    }

    def __init__(
        self,
        *,
        upstream: Method | None = None,
        draws: int = 10,
        drop: float = 0.8,
        weight: float = 0.5,
        kl: float = 8e-4,
        reconstruction: float = 1.0,
        learning_rate: float = 1e-3,
    ) -> None:
        super().__init__(upstream)
        if draws < 1:
            raise ValueError(f"draws: expected 1 or more, got {draws}")
        if not 0 <= drop < 1:
            raise ValueError(f"drop: expected a number in [0, 1), got {drop}")
        for name, value in (
            ("weight", weight),
            ("kl", kl),
            ("reconstruction", reconstruction),
            ("learning_rate", learning_rate),
        ):
            if not value >= 0:
                raise ValueError(f"{name}: expected 0 or more, got {value}")
        self.draws, self.drop, self.weight = draws, drop, weight
        self.kl, self.reconstruction, self.learning_rate = kl, reconstruction, learning_rate
        self._held: _Held | None = None
        self._told = False

    def setup(self, ctx: Context) -> None:
        """Draw the estimator's weights as torch initialises its layers; allocate AdamW's state."""
        super().setup(ctx)
        like = head_of(ctx).weight
        start = initial(like.shape[1]).to(like)
        self.register_buffer("estimator", start)
        self.register_buffer("first", torch.zeros_like(start))
        self.register_buffer("second", torch.zeros_like(start))
        self.register_buffer("updates", like.new_zeros(()))
        self.register_buffer("sigma_sum", like.new_zeros(like.shape[1]))
        self.register_buffer("sigma_rows", like.new_zeros(()))

    def begin_epoch(self, ctx: Context) -> None:
        """Start the means of sigma anew."""
        super().begin_epoch(ctx)
        self._held, self._told = None, False
        self.get_buffer("sigma_sum").zero_()
        self.get_buffer("sigma_rows").zero_()

    def augment(self, batch: Batch, ctx: Context) -> Batch:
        """The upstream's batch with its logits; the estimator takes its step."""
        self._held = None
        if self.upstream is not None:
            batch = self.upstream.augment(batch, ctx)
        head = head_of(ctx)
        shape = self.draws, len(batch), head.in_features
        # Before the forward pass, which seeds the generators anew.
        noise = torch.randn(shape, dtype=head.weight.dtype, device=batch.w.device)
        kept = torch.rand_like(noise) >= self.drop
        a, logits = embedded(batch.x, ctx)
        # A copy, as the update below must not change what the step's backward pass reads.
        parameters = self.get_buffer("estimator").clone().requires_grad_()
        with torch.enable_grad():
            seen = estimate(parameters, a, noise)
            copies = a + self._moves(a, seen, noise, kept)
            alpha = self._alpha(ctx)
            parts = self._parts(seen, copies, a, batch.y, head, ctx)
            added = alpha * torch.stack(list(parts.values())).sum(dim=0)
            (gradient,) = torch.autograd.grad(batch.w @ added, parameters, retain_graph=True)
        with torch.no_grad():
            if not self.frozen:
                self._update(gradient)
            self.get_buffer("sigma_sum").add_(seen.sigma.sum(dim=0))
            self.get_buffer("sigma_rows").add_(len(a))
        if not self._told:
            self._told = True
            with ctx.uncharged():
                means = {name: float(each.detach().mean()) for name, each in parts.items()}
                sigma = seen.sigma.detach()
                ctx.log(alpha=alpha, sigma=float(sigma.mean()), **means)
        self._held = _Held(logits, added)
        return replace(batch, logits=logits)

    def losses(self, logits: Tensor, batch: Batch, ctx: Context) -> Tensor:
        """The task's loss (B,) and what ``augment`` adds to it.

        Raises:
            RuntimeError: the logits are not those of the batch that ``augment`` returned last.
        """
        if self._held is None or self._held.logits is not logits:
            raise RuntimeError(
                "bsda.losses: expected the logits of the batch that augment returned last, got "
                "others"
            )
        return ctx.task.losses(logits, batch.y) + self._held.added

    def finish(self, ctx: Context) -> None:
        """Drop what the last step held."""
        super().finish(ctx)
        self._held = None

    def learned(self) -> dict[str, Tensor]:
        """Sigma per dimension (D,), the mean over the rows of the last epoch."""
        rows = self.get_buffer("sigma_rows").clamp_min(1)
        return {**super().learned(), "sigma": self.get_buffer("sigma_sum") / rows}

    def _alpha(self, ctx: Context) -> float:
        return self.weight * min(1.0, ctx.epoch / max(1, ctx.epochs // 2))

    def _moves(self, a: Tensor, seen: Estimate, noise: Tensor, kept: Tensor) -> Tensor:
        """(draws, B, D) what is added to the embedding."""
        free = (a != 0).to(a.dtype)
        if self.isotropic:
            square = (free * seen.sigma.square()).mean(dim=1, keepdim=True) / (1 - self.drop)
            # At 0 the root has no gradient.
            return square.clamp_min(torch.finfo(a.dtype).tiny).sqrt() * noise
        return kept * free * seen.magnitudes / (1 - self.drop)

    def _parts(
        self, seen: Estimate, copies: Tensor, a: Tensor, y: Tensor, head: nn.Linear, ctx: Context
    ) -> dict[str, Tensor]:
        """The terms (B,) that are added to the loss of each row, before alpha."""
        logits = F.linear(copies.flatten(0, 1), head.weight, head.bias)
        of_copies = ctx.task.losses(logits, y.repeat(self.draws, 1))
        divergence = (seen.sigma.square() - 1 - seen.log_variance).sum(dim=1) / 2
        error = (a - seen.decoded).square().mean(dim=(0, 2)) / 2
        return {
            "loss_of_copies": of_copies.view(self.draws, -1).mean(dim=0),
            "kl": self.kl * len(a) * divergence,
            "reconstruction": self.reconstruction * error,
        }

    def _update(self, gradient: Tensor) -> None:
        """AdamW's step (Loshchilov and Hutter 2019)."""
        estimator, first, second, updates = (
            self.get_buffer(name) for name in ("estimator", "first", "second", "updates")
        )
        updates += 1
        first.lerp_(gradient, 1 - BETAS[0])
        second.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        below = (second / (1 - BETAS[1] ** updates)).sqrt() + EPS
        estimator.mul_(1 - self.learning_rate * WEIGHT_DECAY)
        estimator.sub_(self.learning_rate / (1 - BETAS[0] ** updates) * first / below)


class Estimate(NamedTuple):
    """What the estimator makes of embeddings (B, D)."""

    log_variance: Tensor
    """(B, D)"""
    sigma: Tensor
    """(B, D) the standard deviation of the magnitudes"""
    magnitudes: Tensor
    """(draws, B, D)"""
    decoded: Tensor
    """(draws, B, D) the embedding, reconstructed from the magnitudes"""


def initial(width: int) -> Tensor:
    """(P,) new parameters: those of the linear layers as torch draws them, then of the norms."""
    linear = [nn.Linear(width, width) for _ in range(LINEAR)]
    norms = torch.stack([torch.ones(width), torch.zeros(width)]).flatten().repeat(NORMS)
    drawn = [each.detach().flatten() for layer in linear for each in (layer.weight, layer.bias)]
    return torch.cat([*drawn, norms])


def estimate(parameters: Tensor, a: Tensor, noise: Tensor) -> Estimate:
    """The estimator's outputs for embeddings ``a`` (B, D) and ``noise`` (draws, B, D)."""
    width = a.shape[1]
    middle = LINEAR * width * (width + 1)
    linear = parameters[:middle].view(LINEAR, -1)
    weights, biases = linear[:, : width * width].view(LINEAR, width, width), linear[:, -width:]
    norms = parameters[middle:].view(NORMS, 2, width)

    def blocks(h: Tensor, *layers: int) -> Tensor:
        for layer in layers:
            h = F.linear(h, weights[layer], biases[layer])
            scale, offset = norms[layer]
            # By hand, as F.batch_norm raises for a batch of one row.
            apart = h - h.mean(dim=0)
            h = apart * (apart.square().mean(dim=0) + 1e-5).rsqrt() * scale + offset
            h = F.gelu(h)
        return h

    log_variance = F.linear(blocks(a, 0, 1), weights[4], biases[4])
    sigma = (log_variance / 2).exp()
    magnitudes = sigma * noise
    return Estimate(
        log_variance,
        sigma,
        magnitudes,
        blocks(magnitudes.flatten(0, 1), 2, 3).view_as(noise),
    )


class IsotropicNoise(Method):
    """Give the noise of ``upstream`` the same variance in all directions, at the same size.

    ``upstream`` is isda or bsda with the settings to control for. The expected squared norm of a
    row's noise stays the same: for isda the variance in each direction is lambda tr(Sigma_y) / D,
    for bsda 1 / (1 - drop) times the mean over dimensions of sigma^2 [a != 0], without a mask.
    Where the method beats this row, it gains more than noise of this size can give.
    """

    kinds = ANYTHING
    control = True

    def __init__(self, *, upstream: Method | None = None) -> None:
        super().__init__(upstream)
        if isinstance(upstream, FeatureNoise):
            upstream.isotropic = True

    def supports(self, task: Task, spec: Spec) -> str:
        """Only isda and bsda."""
        if not isinstance(self.upstream, FeatureNoise):
            return (
                "isotropic_noise needs upstream=isda or upstream=bsda, with their own settings and "
                "upstream, such as isotropic_noise(upstream=isda(upstream=crop))"
            )
        return super().supports(task, spec)

    def augment(self, batch: Batch, ctx: Context) -> Batch:
        """The upstream's batch."""
        return self.upstream.augment(batch, ctx) if self.upstream is not None else batch
