"""Implicit differentiation at a linear head: how the meta loss answers to the training loss.

The training loss of a batch is sum_i c_i l(W h_i; s_i) + decay / 2 |W|^2, l the Kullback-Leibler
divergence from target to prediction or the mean of both directions. At its minimum W*(lambda), the
gradient of the meta loss is - v^T H^-1 d2L / dW dlambda (implicit function theorem; AutoDO, Eq. 5),
v the meta gradient and H the curvature of L. Everything here is in closed form: no graph is kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

LANCZOS = 30
"""Products with H that an estimate of its extreme eigenvalues takes."""
NEGATIVE = 1e-4
"""Below minus this share of the largest eigenvalue one counts as negative, not as rounding."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Head:
    """The training loss of a batch as a function of the head's weights (K, D)."""

    h: Tensor
    """(B, D) what the head reads."""
    c: Tensor
    """(B,) coefficient of each row, 0 or more."""
    log_p: Tensor
    """(B, K) logarithm of the predictions softmax(W h)."""
    log_s: Tensor
    """(B, K) logarithm of the targets; finite."""
    symmetric: bool = True
    gauss_newton: bool = True
    """Curvature by diag(p) - p p^T, which is positive semi-definite, in place of the loss's own."""
    decay: float = 0.0
    """L2 penalty on W, and whatever damping is wanted."""

    @cached_property
    def p(self) -> Tensor:
        """(B, K) predictions."""
        return self.log_p.exp()

    @cached_property
    def s(self) -> Tensor:
        """(B, K) targets."""
        return self.log_s.exp()

    def residual(self) -> Tensor:
        """(B, K) gradient of each row's loss in its logits."""
        plain = self.p - self.s
        if not self.symmetric:
            return plain
        a = self.log_p - self.log_s
        return (plain + self.p * (a - (self.p * a).sum(1, keepdim=True))) / 2

    def curve(self, u: Tensor) -> Tensor:
        """(B, K) each row's curvature in its logits times ``u`` (B, K)."""
        dp = _fisher(self.p, u)
        if self.gauss_newton or not self.symmetric:
            return dp
        return self.exact_curve(dp)

    def exact_curve(self, dp: Tensor) -> Tensor:
        """The symmetric loss's own curvature, from diag(p) - p p^T times u, ``dp`` (B, K)."""
        a = self.log_p - self.log_s
        mean = (self.p * a).sum(1, keepdim=True)
        return (dp * (a - mean + 2) - self.p * (dp * a).sum(1, keepdim=True)) / 2

    def product(self, weights: Tensor) -> Tensor:
        """H times ``weights`` (K, D)."""
        rows = self.c[:, None] * self.curve(self.h @ weights.T)
        return rows.T @ self.h + self.decay * weights


def _fisher(p: Tensor, u: Tensor) -> Tensor:
    return p * (u - (p * u).sum(1, keepdim=True))


class IndefiniteError(RuntimeError):
    """The curvature has a negative direction, so that no minimum is near."""


class SingularError(RuntimeError):
    """The curvature has directions without any, in which nothing can be solved."""


class DivergenceError(ValueError):
    """A Neumann series that does not converge; the message tells the step that would."""


class Extremes(NamedTuple):
    """The two ends of a spectrum, each () in the dtype of the head."""

    smallest: Tensor
    """not below the smallest eigenvalue"""
    largest: Tensor
    """not below the largest one, but for what the start has nothing of"""


@torch.no_grad()
def extreme_eigenvalues(head: Head, steps: int = LANCZOS) -> Extremes:
    """Smallest and largest eigenvalue of H by Lanczos iterations with full orthogonalisation.

    The largest is given with the norm of its residual on top, so that it is a bound, and tight:
    the estimate itself is never above it. The start is drawn from the global generator.

    Source: Golub and Van Loan, Matrix Computations, 4th edition, section 10.1.
    """
    shape = head.log_p.shape[1], head.h.shape[1]
    steps = min(steps, shape[0] * shape[1])
    q = torch.randn(shape, dtype=head.h.dtype, device=head.h.device).flatten()
    tiny = torch.finfo(q.dtype).tiny
    basis = q.new_zeros(steps, len(q))
    diagonal, beside = q.new_zeros(steps), q.new_zeros(steps)
    for k in range(steps):
        for _ in range(2):  # also where nothing but rounding was left, whose direction is new
            q = q / q.norm().clamp_min(tiny)
            q = q - basis[:k].T @ (basis[:k] @ q)
        basis[k] = q = q / q.norm().clamp_min(tiny)
        q = head.product(q.view(shape)).flatten()
        diagonal[k] = basis[k] @ q
        q = q - basis[: k + 1].T @ (basis[: k + 1] @ q)
        beside[k] = q.norm()
    between = beside[:-1].diag(1)
    values, vectors = torch.linalg.eigh(diagonal.diag() + between + between.T)
    return Extremes(values[0], values[-1] + beside[-1] * vectors[-1, -1].abs())


def series(head: Head, v: Tensor, terms: int, step: float | Tensor) -> Tensor:
    """step * sum_{j=0..terms} (1 - step H)^j v (K, D); tends to H^-1 v for a step below
    2 / lambda_max.

    Source: Lorraine et al., Optimizing Millions of Hyperparameters, AISTATS 2020, Eq. 7.
    """
    total = v
    for _ in range(terms):
        v = v - step * head.product(v)
        total = total + v
    return step * total


def refuse_divergence(step: float, smallest: float, largest: float) -> None:
    """Raise where the Neumann series with this step does not converge, however many its terms.

    Raises:
        IndefiniteError: the smallest eigenvalue is negative, so that no step converges.
        DivergenceError: step * largest is 2 or more, or an eigenvalue is no number.
    """
    if not (math.isfinite(smallest) and math.isfinite(largest)):
        raise DivergenceError(
            f"the curvature is not finite (lambda_max {largest:.4g}): the network has diverged"
        )
    if smallest < -NEGATIVE * max(largest, -smallest):
        raise IndefiniteError(
            f"the Neumann series diverges with every step (the step is {step:.4g}, lambda_max "
            f"{largest:.4g}): the curvature has a negative eigenvalue, {smallest:.4g}; use "
            f"curvature=gauss_newton, or a damping above {-smallest:.4g}"
        )
    if step * largest >= 2:
        raise DivergenceError(
            f"the Neumann series diverges: lambda_max is {largest:.4g} and the step {step:.4g}; "
            f"the largest step that converges is {2 / largest:.4g} "
            f"(step=auto takes {1 / (1.2 * largest):.4g})"
        )


def conjugate_gradients(
    head: Head, v: Tensor, tolerance: float, limit: int = 1000
) -> tuple[Tensor, int]:
    """H^-1 v by conjugate gradients to a relative residual of ``tolerance``, and the iterations.

    Raises:
        IndefiniteError: a direction of negative curvature was met.
        SingularError: one without curvature, or the residual is not reached within ``limit``.
    """
    x, r = torch.zeros_like(v), v
    d, squared = r, (r * r).sum()
    start, goal = squared, tolerance**2 * squared
    steepest, rounding = torch.zeros_like(squared), 4 * torch.finfo(v.dtype).eps
    for iteration in range(limit):
        if squared <= goal:
            return x, iteration
        product = head.product(d)
        along = (d * product).sum()
        curvature = along / (d * d).sum()
        steepest = torch.maximum(steepest, curvature.abs())
        if curvature < -NEGATIVE * steepest:
            raise IndefiniteError(
                f"the curvature has a negative direction ({float(curvature):.3g} at iteration "
                f"{iteration + 1}); use curvature=gauss_newton, or a larger damping"
            )
        if not curvature > rounding * steepest:
            raise SingularError(
                f"the curvature is singular ({float(curvature):.3g} in a direction at iteration "
                f"{iteration + 1}, {float(steepest):.3g} in another), so conjugate gradients have "
                f"no solution: give a damping, such as {0.01 * float(steepest):.2g}"
            )
        x, r = x + squared / along * d, r - squared / along * product
        before, squared = squared, (r * r).sum()
        d = r + squared / before * d
    if squared <= goal:
        return x, limit
    raise SingularError(
        f"conjugate gradients stand at a relative residual of "
        f"{math.sqrt(float(squared / start)):.2g} after {limit} iterations, expected "
        f"{tolerance:g}: the curvature is nearly singular; give a larger damping, such as "
        f"{0.01 * float(steepest):.2g}"
    )


class Answers(NamedTuple):
    """Gradient of the meta loss with respect to what the training loss of a batch holds."""

    coefficients: Tensor
    """(B,)"""
    targets: Tensor
    """(B, K) with respect to t, where the target is s = softmax(t)."""
    inputs: Tensor
    """(B, D) with respect to h."""


def answers(head: Head, weights: Tensor, solved: Tensor) -> Answers:
    """The hypergradients for the head's weights (K, D) and ``solved`` = H^-1 v (K, D).

    They are minus the derivative of <dL/dW, solved>. ``curve`` of the loss itself enters the one
    for h, whatever curvature was inverted.
    """
    u = head.h @ solved.T
    residual = head.residual()
    spread = _fisher(head.s, u)
    dp = _fisher(head.p, u)
    exact = dp
    if head.symmetric:
        spread = (spread + dp) / 2
        exact = head.exact_curve(dp)
    inputs = head.c[:, None] * (residual @ solved + exact @ weights)
    return Answers(-(residual * u).sum(1), head.c[:, None] * spread, -inputs)
