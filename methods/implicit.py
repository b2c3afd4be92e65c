"""Implicit differentiation at a linear head: how the meta loss depends on the training loss.

The training loss of a batch is sum_i c_i l(W h_i; s_i) + decay / 2 |W|^2, l the Kullback-Leibler
divergence from target to prediction or the mean of both directions. At its minimum W*(lambda), the
gradient of the meta loss is - v^T H^-1 d2L / dW dlambda (implicit function theorem; AutoDO, Eq. 5),
v the meta gradient and H the curvature of L. Everything here is in closed form, without a graph.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

LANCZOS = 30
"""Products with H per estimate of its extreme eigenvalues."""
NEGATIVE = 1e-4
"""An eigenvalue below minus this share of the largest is negative, not just rounding error."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Head:
    """The training loss of a batch as a function of the head's weights (K, D)."""

    h: Tensor
    """(B, D) inputs of the head."""
    c: Tensor
    """(B,) coefficient per row, 0 or more."""
    log_p: Tensor
    """(B, K) logarithm of the predictions softmax(W h)."""
    log_s: Tensor
    """(B, K) logarithm of the targets; finite."""
    symmetric: bool = True
    gauss_newton: bool = True
    """Use diag(p) - p p^T, which is positive semi-definite, instead of the loss's own curvature."""
    decay: float = 0.0
    """L2 penalty on W, plus any damping."""

    @cached_property
    def p(self) -> Tensor:
        """(B, K) predictions."""
        return self.log_p.exp()

    @cached_property
    def s(self) -> Tensor:
        """(B, K) targets."""
        return self.log_s.exp()

    def residual(self) -> Tensor:
        """(B, K) gradient of each row's loss with respect to its logits."""
        plain = self.p - self.s
        if not self.symmetric:
            return plain
        a = self.log_p - self.log_s
        return (plain + self.p * (a - (self.p * a).sum(1, keepdim=True))) / 2

    def curve(self, u: Tensor) -> Tensor:
        """(B, K) curvature of each row's loss in its logits, times ``u`` (B, K)."""
        dp = _fisher(self.p, u)
        if self.gauss_newton or not self.symmetric:
            return dp
        return self.exact_curve(dp)

    def exact_curve(self, dp: Tensor) -> Tensor:
        """The symmetric loss's own curvature times u, from ``dp`` (B, K) = (diag(p) - p p^T) u."""
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
    """The curvature is negative in some direction, so no minimum is near."""


class SingularError(RuntimeError):
    """The curvature is zero in some direction, so the system cannot be solved."""


class DivergenceError(ValueError):
    """The Neumann series does not converge; the message gives the largest step that would."""


class Extremes(NamedTuple):
    """The two ends of a spectrum, each () in the dtype of the head."""

    smallest: Tensor
    """not below the smallest eigenvalue"""
    largest: Tensor
    """not below the largest one, unless the start has no component along its direction"""


@torch.no_grad()
def extreme_eigenvalues(head: Head, q: Tensor | None = None, steps: int = LANCZOS) -> Extremes:
    """Smallest and largest eigenvalue of H by Lanczos iterations with full orthogonalisation.

    The norm of its residual is added to the largest, which makes it a tight upper bound: the
    estimate alone is never above the true value. The start ``q`` (K, D) is by default
    drawn from the global generator.

    Source: Golub and Van Loan, Matrix Computations, 4th edition, section 10.1.
    """
    shape = head.log_p.shape[1], head.h.shape[1]
    steps = min(steps, shape[0] * shape[1])
    q = (lanczos_start(head) if q is None else q).flatten()
    tiny = torch.finfo(q.dtype).tiny
    basis = q.new_zeros(steps, len(q))
    diagonal, beside = q.new_zeros(steps), q.new_zeros(steps)
    for k in range(steps):
        for _ in range(2):  # twice, as a remainder of pure rounding error is not orthogonal
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


def lanczos_start(head: Head) -> Tensor:
    """(K, D) drawn from the global generator."""
    shape = head.log_p.shape[1], head.h.shape[1]
    return torch.randn(shape, dtype=head.h.dtype, device=head.h.device)


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
    """Raise if the Neumann series with this step does not converge for any number of terms.

    Raises:
        IndefiniteError: the smallest eigenvalue is negative, so no step converges.
        DivergenceError: step * largest is 2 or more, or an eigenvalue is not finite.
    """
    if not (math.isfinite(smallest) and math.isfinite(largest)):
        raise DivergenceError(
            f"the curvature is not finite (lambda_max {largest:.4g}): the network has diverged"
        )
    if smallest < -NEGATIVE * max(largest, -smallest):
        raise IndefiniteError(
            f"the Neumann series diverges with any step (step {step:.4g}, lambda_max "
            f"{largest:.4g}): the curvature has a negative eigenvalue, {smallest:.4g}; use "
            f"curvature=gauss_newton or a damping above {-smallest:.4g}"
        )
    if step * largest >= 2:
        raise DivergenceError(
            f"the Neumann series diverges: lambda_max is {largest:.4g} and the step {step:.4g}; "
            f"the largest step that converges is {2 / largest:.4g} "
            f"(step=auto uses {1 / (1.2 * largest):.4g})"
        )


def conjugate_gradients(
    head: Head, v: Tensor, tolerance: float, limit: int = 1000
) -> tuple[Tensor, int]:
    """H^-1 v by conjugate gradients to a relative residual of ``tolerance``, and the iterations.

    Raises:
        IndefiniteError: a search direction has negative curvature.
        SingularError: one has no curvature, or ``limit`` iterations do not reach the tolerance.
    """
    x, r = torch.zeros_like(v), v
    d, squared = r, (r * r).sum()
    start, goal = squared, tolerance**2 * squared
    steepest, rounding = torch.zeros_like(squared), 4 * torch.finfo(v.dtype).eps
    if squared <= goal:
        return x, 0
    for iteration in range(limit):
        product = head.product(d)
        along = (d * product).sum()
        curvature = along / (d * d).sum()
        steepest = torch.maximum(steepest, curvature.abs())
        x, r = x + squared / along * d, r - squared / along * product
        before, squared = squared, (r * r).sum()
        d = r + squared / before * d
        negative, curved = curvature < -NEGATIVE * steepest, curvature > rounding * steepest
        # Read together, as each look waits for the device.
        negative, curved, done = torch.stack([negative, curved, squared <= goal]).tolist()
        if negative:
            raise IndefiniteError(
                f"the curvature is negative in one direction ({float(curvature):.3g} at iteration "
                f"{iteration + 1}); use curvature=gauss_newton or a larger damping"
            )
        if not curved:
            raise SingularError(
                f"the curvature is singular ({float(curvature):.3g} in one direction at iteration "
                f"{iteration + 1}, {float(steepest):.3g} in another), so conjugate gradients have "
                f"no solution: set a damping, such as {0.01 * float(steepest):.2g}"
            )
        if done:
            return x, iteration + 1
    raise SingularError(
        f"conjugate gradients have a relative residual of "
        f"{math.sqrt(float(squared / start)):.2g} after {limit} iterations, expected "
        f"{tolerance:g}: the curvature is nearly singular; set a larger damping, such as "
        f"{0.01 * float(steepest):.2g}"
    )


class Answers(NamedTuple):
    """Gradients of the meta loss with respect to the terms of a batch's training loss."""

    coefficients: Tensor
    """(B,)"""
    targets: Tensor
    """(B, K) with respect to t, where the target is s = softmax(t)."""
    inputs: Tensor
    """(B, D) with respect to h."""


def answers(head: Head, weights: Tensor, solved: Tensor) -> Answers:
    """The hypergradients for the head's weights (K, D) and ``solved`` = H^-1 v (K, D).

    They are minus the derivative of <dL/dW, solved>. The one for h uses the loss's own curvature,
    whichever curvature was inverted.
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
