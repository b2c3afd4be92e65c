"""Implicit differentiation at a linear head: how the meta loss answers to the training loss.

The training loss of a batch is sum_i c_i l(W h_i; s_i) + decay / 2 |W|^2, l the Kullback-Leibler
divergence from target to prediction or the mean of both directions. At its minimum W*(lambda), the
gradient of the meta loss is - v^T H^-1 d2L / dW dlambda (implicit function theorem; AutoDO, Eq. 5),
v the meta gradient and H the curvature of L. Everything here is in closed form: no graph is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

TOLERATED = 1e-5
"""Growth of the terms of a series that counts as rounding."""


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


class DivergenceError(ValueError):
    """A Neumann series that does not converge; the message tells the step that would."""


def largest_eigenvalue(head: Head, steps: int = 30) -> Tensor:
    """Largest eigenvalue of H in magnitude by power iteration, a little below it.

    The start is drawn from the global generator.
    """
    v = torch.randn(head.log_p.shape[1], head.h.shape[1], dtype=head.h.dtype, device=head.h.device)
    value = v.new_zeros(())
    for _ in range(steps):
        v = head.product(v / v.norm().clamp_min(torch.finfo(v.dtype).tiny))
        value = v.norm()
    return value


class Series(NamedTuple):
    """A Neumann series and how its terms end."""

    solved: Tensor
    """(K, D)"""
    growth: Tensor
    """Norm of the last term over that of the one before: at most 1 where the series converges."""


def series(head: Head, v: Tensor, terms: int, step: float | Tensor) -> Series:
    """step * sum_{j=0..terms} (1 - step H)^j v; tends to H^-1 v for a step below 2 / lambda_max.

    Source: Lorraine et al., Optimizing Millions of Hyperparameters, AISTATS 2020, Eq. 7.
    """
    total, growth = v, torch.ones_like(v[0, 0])
    for _ in range(terms):
        before, v = v, v - step * head.product(v)
        growth = v.norm() / before.norm().clamp_min(torch.finfo(v.dtype).tiny)
        total = total + v
    return Series(step * total, growth)


def refuse_divergence(step: float, largest: float, growth: float = 1.0) -> None:
    """Raise where the Neumann series with this step does not converge.

    Raises:
        DivergenceError: step * largest is 2 or more.
        IndefiniteError: its terms grow although the step is short enough.
    """
    if step * largest >= 2:
        raise DivergenceError(
            f"the Neumann series diverges: lambda_max is {largest:.4g} and the step {step:.4g}; "
            f"the largest step that converges is {2 / largest:.4g} "
            f"(step=auto takes {1 / (1.2 * largest):.4g})"
        )
    if growth > 1 + TOLERATED:
        raise IndefiniteError(
            f"the Neumann series diverges: its terms grow by {growth:.6g} although the step "
            f"{step:.4g} is below 2 / lambda_max (lambda_max {largest:.4g}), so the curvature has "
            "a negative eigenvalue; use curvature=gauss_newton, or a larger damping"
        )


def conjugate_gradients(
    head: Head, v: Tensor, tolerance: float, limit: int = 1000
) -> tuple[Tensor, int]:
    """H^-1 v by conjugate gradients to a relative residual of ``tolerance``, and the iterations.

    Raises:
        IndefiniteError: a direction of negative curvature was met.
    """
    x, r = torch.zeros_like(v), v
    d, squared = r, (r * r).sum()
    goal = tolerance**2 * squared
    for iteration in range(limit):
        if squared <= goal:
            return x, iteration
        product = head.product(d)
        curvature = (d * product).sum()
        if curvature <= 0:
            raise IndefiniteError(
                f"the curvature is not positive definite (d.Hd = {float(curvature):.3g} at "
                f"iteration {iteration + 1}); use curvature=gauss_newton, or a larger damping"
            )
        along = squared / curvature
        x, r = x + along * d, r - along * product
        before, squared = squared, (r * r).sum()
        d = r + squared / before * d
    return x, limit


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
