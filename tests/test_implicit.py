"""Hypergradients at a linear head: closed forms, finite differences of re-solved problems, guards.

The inner problem of the finite differences is written with torch's own functions, and its minimum
found by Newton steps on torch's own derivatives.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, vmap
from torch.nn import functional as F

from methods.autodo import _matrix
from methods.functional import affine_warp
from methods.implicit import (
    DivergenceError,
    Head,
    IndefiniteError,
    SingularError,
    answers,
    conjugate_gradients,
    extreme_eigenvalues,
    refuse_divergence,
    series,
)

CLASSES, INPUTS, ROWS, META, HEIGHT, WIDTH = 3, 8, 48, 60, 6, 8
DECAYS = (1e-1, 1e-2, 1e-3)
EACH = [(symmetric, decay) for symmetric in (False, True) for decay in DECAYS]
STEP = 1e-6
"""Of the central differences; the warp has kinks where a place crosses the centre of a pixel."""
TERMS = {(False, 1e-1): 50, (False, 1e-2): 150, (False, 1e-3): 500, (True, 1e-2): 300}
"""To a cosine above 0.99 at step 1 / lambda_max, of the notes; 30, 160, 430 and 180 here."""


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def row_losses(logits: Tensor, t: Tensor, symmetric: bool) -> Tensor:
    """KL from softmax(t) to the prediction, or its mean with the other direction."""
    log_p, log_s = F.log_softmax(logits, dim=-1), F.log_softmax(t, dim=-1)
    one = F.kl_div(log_p, log_s, reduction="none", log_target=True).sum(dim=-1)
    other = F.kl_div(log_s, log_p, reduction="none", log_target=True).sum(dim=-1)
    return (one + other) / 2 if symmetric else one


def inner_loss(w: Tensor, h: Tensor, c: Tensor, t: Tensor, decay: float, symmetric: bool) -> Tensor:
    logits = h @ w.view(-1, h.shape[-1]).T
    return c @ row_losses(logits, t, symmetric) + decay / 2 * w.square().sum()


def head_of(weights: Tensor, h: Tensor, c: Tensor, t: Tensor, decay: float, **flags: Any) -> Head:
    return Head(
        h=h, c=c, log_p=F.log_softmax(h @ weights.T, dim=1), log_s=F.log_softmax(t, dim=1),
        decay=decay, **flags,
    )  # fmt: skip


def dense(head: Head) -> Tensor:
    """(KD, KD) the matrix that ``product`` multiplies by."""
    shape = head.log_p.shape[1], head.h.shape[1]
    unit = torch.eye(math.prod(shape), dtype=head.h.dtype).view(-1, *shape)
    return torch.stack([head.product(each).flatten() for each in unit])


def relative(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def share_of_rows(omega: Tensor) -> Tensor:
    """Coefficients (..., N): softplus weights, made to sum to 1."""
    weight = F.softplus(omega)
    return weight / weight.sum(dim=-1, keepdim=True)


class Task(NamedTuple):
    """Training rows with noisy labels that a warp moves before a fixed trunk, and meta rows."""

    x: Tensor
    omega: Tensor
    t: Tensor
    amounts: Tensor
    trunk: Callable[[Tensor], Tensor]
    meta_h: Tensor
    meta_y: Tensor

    def embedded(self, amounts: Tensor, x: Tensor) -> Tensor:
        return self.trunk(affine_warp(x, _matrix(amounts, HEIGHT, WIDTH), "bilinear"))


@cache
def made() -> Task:
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    labels = torch.randint(0, CLASSES, (ROWS + META,), generator=rng)
    x = torch.rand(ROWS + META, 1, HEIGHT, WIDTH, generator=rng, dtype=torch.float64) * 0.5
    x[torch.arange(ROWS + META), 0, labels, :4] += 0.8
    first, second = normal(6, 1, 3, 3), normal(INPUTS, 6, 3, 3) / 3

    def trunk(x: Tensor) -> Tensor:
        return 1.3 * F.celu(F.conv2d(F.celu(F.conv2d(x - 0.5, first)), second)).mean(dim=(2, 3))

    given = labels[:ROWS].clone()
    wrong = torch.rand(ROWS, generator=rng) < 0.25
    given[wrong] = torch.randint(0, CLASSES, (ROWS,), generator=rng)[wrong]
    smoothed = 0.9 * F.one_hot(given, CLASSES).double() + 0.1 / CLASSES
    return Task(
        x[:ROWS],
        0.7 * normal(ROWS),
        smoothed.log() + 0.3 * normal(ROWS, CLASSES),
        0.2 * normal(ROWS, 7),
        trunk,
        trunk(x[ROWS:]),
        F.one_hot(labels[ROWS:], CLASSES).double(),
    )


def meta_loss(task: Task, w: Tensor) -> Tensor:
    logits = task.meta_h @ w.view(*w.shape[:-1], CLASSES, INPUTS).transpose(-1, -2)
    return -(task.meta_y * F.log_softmax(logits, dim=-1)).sum(dim=-1).mean(dim=-1)


def minimum(
    h: Tensor, c: Tensor, t: Tensor, decay: float, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """(KD,) by Newton from the minimum of the forward loss, which is convex; and the Hessian."""
    w = torch.zeros(CLASSES * INPUTS, dtype=torch.float64)
    for flag in (False, symmetric):
        for _ in range(100):
            slope = grad(inner_loss)(w, h, c, t, decay, flag)
            if slope.norm() < 1e-14:
                break
            w = w - torch.linalg.solve(hessian(inner_loss)(w, h, c, t, decay, flag), slope)
    return w, hessian(inner_loss)(w, h, c, t, decay, symmetric)


class Solved(NamedTuple):
    """A problem at its minimum, and the true hypergradients."""

    weights: Tensor
    head: Head
    v: Tensor
    curve: Tensor
    """(KD, KD) torch's own Hessian"""
    differences: list[Tensor]
    """Of the meta loss in omega (N,), t (N * K,) and amounts (N * 7,), re-solved at each."""

    def found(self, solved: Tensor) -> list[Tensor]:
        """The same by ``answers``, through the coefficients and through the trunk."""
        task = made()
        omega, amounts = (each.clone().requires_grad_() for each in (task.omega, task.amounts))
        ours = answers(self.head, self.weights, solved)
        h, c = task.embedded(amounts, task.x), share_of_rows(omega)
        weight = torch.autograd.grad(c, omega, ours.coefficients)[0]
        warp = torch.autograd.grad(h, amounts, ours.inputs)[0]
        return [weight, ours.targets.flatten(), warp.flatten()]

    def cosines(self, solved: Tensor) -> list[float]:
        pairs = zip(self.found(solved), self.differences, strict=True)
        return [float(F.cosine_similarity(one, other, dim=0)) for one, other in pairs]


@cache
def solved(symmetric: bool, decay: float) -> Solved:
    task = made()
    h, c = task.embedded(task.amounts, task.x), share_of_rows(task.omega)
    w, curve = minimum(h, c, task.t, decay, symmetric)
    slopes = vmap(lambda w, h, c, t: grad(inner_loss)(w, h, c, t, decay, symmetric))
    inverse = torch.linalg.inv(curve)

    def differences(leaf: Tensor, change: Callable[[Tensor], Any]) -> Tensor:
        count = leaf.numel()
        shifts = STEP * torch.eye(count, dtype=torch.float64)
        shifts = torch.cat([shifts, -shifts]).view(-1, *leaf.shape)
        moved = [each.expand(2 * count, *each.shape) for each in (h, c, task.t)]
        place, value = change(shifts)
        moved[place] = value
        again = w.expand(2 * count, -1)
        for _ in range(5):  # Newton's steps, all with the Hessian of the undisturbed minimum
            again = again - slopes(again, *moved) @ inverse
        assert float(slopes(again, *moved).norm(dim=1).max()) < 1e-12
        up, down = meta_loss(task, again).split(count)
        return (up - down) / (2 * STEP)

    def warped(shifts: Tensor) -> tuple[int, Tensor]:
        rows = torch.arange(len(shifts)) % (ROWS * 7) // 7  # of which one amount is shifted
        each = torch.arange(len(shifts))
        features = h.expand(len(shifts), -1, -1).clone()
        features[each, rows] = task.embedded((task.amounts + shifts)[each, rows], task.x[rows])
        return 0, features

    found = [
        differences(task.omega, lambda shifts: (1, share_of_rows(task.omega + shifts))),
        differences(task.t, lambda shifts: (2, task.t + shifts)),
        differences(task.amounts, warped),
    ]
    weights = w.view(CLASSES, INPUTS)
    head = head_of(weights, h, c, task.t, decay, symmetric=symmetric, gauss_newton=False)
    v = grad(lambda w: meta_loss(task, w))(w).view(CLASSES, INPUTS)
    return Solved(weights, head, v, curve, found)


@pytest.mark.parametrize(("symmetric", "decay"), EACH)
class TestFiniteDifferences:
    def test_an_exact_solve_gives_the_hypergradient(self, symmetric: bool, decay: float) -> None:
        """Of weight, soft label and warp, relative error below 1e-5 (below 1e-6 measured)."""
        problem = solved(symmetric, decay)
        ours = dense(problem.head)
        assert relative(ours, problem.curve) < 1e-10
        exact = torch.linalg.solve(ours, problem.v.flatten()).view_as(problem.v)
        for one, true in zip(problem.found(exact), problem.differences, strict=True):
            assert true.norm() > 1e-3
            assert relative(one, true) < 1e-6

    def test_so_do_conjugate_gradients(self, symmetric: bool, decay: float) -> None:
        problem = solved(symmetric, decay)
        assert float(torch.linalg.eigvalsh(problem.curve)[0]) > 0
        found, iterations = conjugate_gradients(problem.head, problem.v, 1e-8)
        assert iterations <= CLASSES * INPUTS
        for one, true in zip(problem.found(found), problem.differences, strict=True):
            assert relative(one, true) < 1e-5

    def test_the_series_needs_the_terms_that_the_notes_give(
        self, symmetric: bool, decay: float
    ) -> None:
        problem = solved(symmetric, decay)
        largest = float(torch.linalg.eigvalsh(problem.curve)[-1])

        def worst(terms: int) -> float:
            return min(problem.cosines(series(problem.head, problem.v, terms, 1 / largest)))

        told = TERMS.get((symmetric, decay), 500)
        assert worst(told + told // 2) > 0.99
        if (symmetric, decay) in TERMS:
            assert worst(told // 3) < 0.99

    def test_the_published_series_is_the_identity_s_direction(
        self, symmetric: bool, decay: float
    ) -> None:
        """T = 5 at 0.01, and neither is the hypergradient."""
        problem = solved(symmetric, decay)
        identity = problem.cosines(problem.v)
        published = problem.cosines(series(problem.head, problem.v, 5, 0.01))
        for one, other in zip(published, identity, strict=True):
            assert abs(one - other) < 0.1
            assert other < 0.9


def some_head(seed: int, **flags: Any) -> tuple[Tensor, Head, dict[str, Tensor]]:
    """Weights, a head that they did not minimise, and what it was made from."""
    rows, classes, inputs = 7, 4, 5
    made = {
        "h": random(rows, inputs, seed=seed),
        "c": random(rows, seed=seed + 1).square(),
        "t": 2 * random(rows, classes, seed=seed + 2),
    }
    weights = 1.5 * random(classes, inputs, seed=seed + 3)
    return weights, head_of(weights, **made, decay=0.03, **flags), made


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("seed", range(0, 50, 10))
class TestClosedForms:
    def test_residual_and_curve_are_derivatives_in_the_logits(
        self, seed: int, symmetric: bool
    ) -> None:
        weights, head, made = some_head(seed, symmetric=symmetric, gauss_newton=False)
        u = random(7, 4, seed=seed + 4)

        def loss(logits: Tensor, t: Tensor) -> Tensor:
            return row_losses(logits, t, symmetric)

        logits = made["h"] @ weights.T
        assert relative(head.residual(), vmap(grad(loss))(logits, made["t"])) < 1e-10
        curve = torch.einsum("bkl,bl->bk", vmap(hessian(loss))(logits, made["t"]), u)
        assert relative(head.curve(u), curve) < 1e-10

    def test_the_product_is_a_double_backward(self, seed: int, symmetric: bool) -> None:
        weights, head, made = some_head(seed, symmetric=symmetric, gauss_newton=False)
        v = random(4, 5, seed=seed + 4)
        w = weights.flatten().requires_grad_()
        loss = inner_loss(w, made["h"], made["c"], made["t"], 0.03, symmetric)
        (slope,) = torch.autograd.grad(loss, w, create_graph=True)
        (product,) = torch.autograd.grad(slope @ v.flatten(), w)
        assert relative(head.product(v).flatten(), product) < 1e-10

    def test_gauss_newton_is_that_of_an_explicit_jacobian(self, seed: int, symmetric: bool) -> None:
        """sum_i c_i J_i^T (diag(p) - p p^T) J_i + decay, J_i by autograd: positive for both."""
        weights, head, made = some_head(seed, symmetric=symmetric)
        jacobian = torch.func.jacrev(lambda w: made["h"] @ w.view(4, 5).T)(weights.flatten())
        p = F.softmax(made["h"] @ weights.T, dim=1)
        middle = torch.diag_embed(p) - p[:, :, None] * p[:, None]
        matrix = torch.einsum("b,bka,bkl,blc->ac", made["c"], jacobian, middle, jacobian)
        matrix += 0.03 * torch.eye(20, dtype=torch.float64)
        assert relative(dense(head), matrix) < 1e-10
        assert float(torch.linalg.eigvalsh(matrix)[0]) >= 0.03 - 1e-12

    @pytest.mark.parametrize("gauss_newton", [False, True])
    def test_answers_are_a_double_backward(
        self, seed: int, symmetric: bool, gauss_newton: bool
    ) -> None:
        """Whatever curvature was inverted."""
        weights, head, made = some_head(seed, symmetric=symmetric, gauss_newton=gauss_newton)
        v = random(4, 5, seed=seed + 4)
        leaves = {name: each.requires_grad_() for name, each in made.items()}
        w = weights.flatten().requires_grad_()
        loss = inner_loss(w, leaves["h"], leaves["c"], leaves["t"], 0.03, symmetric)
        (slope,) = torch.autograd.grad(loss, w, create_graph=True)
        wanted = torch.autograd.grad(-slope @ v.flatten(), [leaves[name] for name in "cth"])
        for one, other in zip(answers(head, weights, v), wanted, strict=True):
            assert relative(one.detach(), other) < 1e-10


def random_head(seed: int, dtype: torch.dtype = torch.float64) -> Head:
    """Of features scaled by 0.1 to 10, peaked predictions or flat, and rows that weigh or not."""
    rng = np.random.default_rng(seed)
    rows, classes, inputs = (int(rng.integers(2, high)) for high in (40, 7, 9))
    scale = 10 ** rng.uniform(-1, 1)
    h = scale * random(rows, inputs, seed=seed)
    if seed % 2:
        h = h.abs()  # as after a ReLU: one direction has most of the curvature
    c = random(rows, seed=seed + 1000).square()
    logits = 10 ** rng.uniform(-1, 1) * random(rows, classes, seed=seed + 2000)
    parts = h, c / c.sum(), F.log_softmax(logits, dim=1), F.log_softmax(logits.flip(0), dim=1)
    h, c, log_p, log_s = (each.to(dtype) for each in parts)
    return Head(h=h, c=c, log_p=log_p, log_s=log_s, decay=float(rng.choice([0, 1e-3, 0.1])))


def ends_of(head: Head, seed: int) -> tuple[float, float]:
    torch.manual_seed(seed)
    ends = extreme_eigenvalues(head)
    return float(ends.smallest), float(ends.largest)


class TestExtremeEigenvalues:
    def test_the_largest_is_a_tight_bound(self) -> None:
        """Over 200 heads: never below, and hardly above."""
        shares = []
        for seed in range(200):
            head = random_head(seed)
            values = np.linalg.eigvalsh(dense(head).numpy())
            smallest, largest = ends_of(head, seed)
            shares.append(largest / values[-1])
            assert smallest >= values[0] - 1e-12 * values[-1]
        assert min(shares) > 1 - 1e-12 and max(shares) < 1.001

    def test_so_it_is_in_single_precision(self) -> None:
        for seed in range(200):
            largest = float(torch.linalg.eigvalsh(dense(random_head(seed)))[-1])
            _, found = ends_of(random_head(seed, torch.float32), seed)
            assert found == pytest.approx(largest, rel=1e-3)

    def test_a_negative_end_is_found(self) -> None:
        """Of the symmetric loss's own curvature, which has one far from its targets."""
        met = 0
        for seed in range(200):
            head = replace(random_head(seed), gauss_newton=False)
            values = np.linalg.eigvalsh(dense(head).numpy())
            smallest, largest = ends_of(head, seed)
            assert smallest >= values[0] - 1e-9 * abs(values).max()
            assert largest >= values[-1] - 1e-9 * abs(values).max()
            if values[0] < -1e-3 * values[-1]:
                met += 1
                assert smallest < 0.8 * values[0]
        assert met > 50

    @pytest.mark.parametrize(("classes", "inputs"), [(2, 1), (3, 2), (4, 5)])
    def test_of_few_weights_they_are_exact(self, classes: int, inputs: int) -> None:
        """Fewer dimensions than iterations."""
        logits = random(9, classes, seed=3)
        log_p = F.log_softmax(logits, dim=1)
        head = Head(
            h=random(9, inputs, seed=1), c=torch.ones(9).double(), log_p=log_p, log_s=log_p.flip(1),
            gauss_newton=False, decay=0.1,
        )  # fmt: skip
        values = np.linalg.eigvalsh(dense(head).numpy())
        assert ends_of(head, 0) == pytest.approx((values[0], values[-1]), rel=1e-6)


class TestSeries:
    def test_it_is_the_sum_of_powers(self) -> None:
        _, head, _ = some_head(0)
        v, step, matrix = random(4, 5, seed=9), 0.07, dense(some_head(0)[1])
        for terms in (0, 1, 5, 20):
            power, total = v.flatten(), torch.zeros(20, dtype=torch.float64)
            for _ in range(terms + 1):
                total = total + step * power
                power = power - step * matrix @ power
            found = series(head, v, terms, step)
            torch.testing.assert_close(found.flatten(), total, rtol=1e-12, atol=1e-12)

    def test_it_tends_to_the_solution(self) -> None:
        _, head, _ = some_head(0)
        v, matrix = random(4, 5, seed=9), dense(some_head(0)[1])
        wanted = torch.linalg.solve(matrix, v.flatten())
        step = 1 / float(torch.linalg.eigvalsh(matrix)[-1])
        assert relative(series(head, v, 5000, step).flatten(), wanted) < 1e-9


class TestDivergence:
    def test_a_step_above_the_limit_is_refused_with_what_would_do(self) -> None:
        largest = 3.217
        with pytest.raises(DivergenceError) as caught:
            refuse_divergence(2.1 / largest, 0.0, largest)
        told = str(caught.value)
        assert "lambda_max is 3.217" in told
        assert f"the step {2.1 / largest:.4g}" in told
        assert f"the largest step that converges is {2 / largest:.4g}" in told
        assert f"step=auto uses {1 / 1.2 / largest:.4g}" in told
        assert isinstance(caught.value, ValueError)

    def test_below_it_is_taken_and_at_it_is_not(self) -> None:
        """Over 200 heads, of which no more is known than an outer step knows."""
        for seed in range(200):
            head = random_head(seed)
            largest = float(torch.linalg.eigvalsh(dense(head))[-1])
            ends = ends_of(head, seed)
            refuse_divergence(1.9 / largest, *ends)
            for times in (2.0, 2.1):
                with pytest.raises(DivergenceError):
                    refuse_divergence(times * (1 + 1e-9) / largest, *ends)
        refuse_divergence(0.5, 0.0, 0.0)

    def test_an_indefinite_curvature_is_refused_with_every_step(self) -> None:
        met = 0
        for seed in range(200):
            head = replace(random_head(seed), gauss_newton=False)
            values = torch.linalg.eigvalsh(dense(head))
            if values[0] < -0.01 * values.abs().max():
                met += 1
                with pytest.raises(IndefiniteError, match=r"a negative eigenvalue, -.* damping"):
                    refuse_divergence(1e-9, *ends_of(head, seed))
        assert met > 50

    @pytest.mark.parametrize("ends", [(math.nan, math.nan), (0.0, math.inf), (math.nan, 1.0)])
    def test_a_curvature_that_is_no_number_is_refused(self, ends: tuple[float, float]) -> None:
        with pytest.raises(DivergenceError, match="the curvature is not finite"):
            refuse_divergence(0.01, *ends)

    @pytest.mark.parametrize(("times", "converges"), [(1.9, True), (2.1, False)])
    def test_the_limit_is_where_the_series_turns(self, times: float, converges: bool) -> None:
        for seed in range(5):
            _, head, _ = some_head(seed)
            v, matrix = random(4, 5, seed=9), dense(head)
            step = times / float(torch.linalg.eigvalsh(matrix)[-1])
            solution = torch.linalg.solve(matrix, v.flatten())
            few, many = (
                relative(series(head, v, terms, step).flatten(), solution) for terms in (200, 400)
            )
            assert (many < few) is converges
            assert (many > 1e6) is not converges

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_auto_never_diverges(self, dtype: torch.dtype) -> None:
        """Over 200 heads: |1 - step lambda| is at most 1 for every eigenvalue."""
        scales = []
        for seed in range(200):
            head = random_head(seed, dtype)
            scales.append(float(head.h.abs().max()))
            torch.manual_seed(seed)
            step = 1 / (1.2 * float(extreme_eigenvalues(head).largest))
            values = torch.linalg.eigvalsh(dense(random_head(seed)))
            assert float((1 - step * values).abs().max()) <= 1 + 1e-6
            if seed % 10 == 0:
                v = random(head.log_p.shape[1], head.h.shape[1], seed=seed).to(dtype)
                rest = head.product(series(head, v, 300, step)) - v
                assert float(rest.norm() / v.norm()) <= 1 + 1e-4
        assert min(scales) < 0.3 and max(scales) > 20


def indefinite() -> tuple[Tensor, Head, dict[str, Tensor]]:
    """The symmetric loss far from its targets."""
    return some_head(10, symmetric=True, gauss_newton=False)


class TestConjugateGradients:
    @pytest.mark.parametrize("tolerance", [1e-2, 1e-4, 1e-8])
    def test_the_relative_residual_is_the_tolerance_s(self, tolerance: float) -> None:
        used = []
        for seed in range(10):
            _, head, _ = some_head(seed)
            v, matrix = random(4, 5, seed=seed + 50), dense(head)
            found, iterations = conjugate_gradients(head, v, tolerance)
            used.append(iterations)
            rest = float((matrix @ found.flatten() - v.flatten()).norm() / v.norm())
            assert rest <= tolerance * (1 + 1e-6)
        assert 0 < max(used) <= 22

    def test_a_looser_tolerance_takes_fewer_iterations(self) -> None:
        _, head, _ = some_head(0)
        counts = [
            conjugate_gradients(head, random(4, 5, seed=9), each)[1] for each in (0.1, 1e-3, 1e-9)
        ]
        assert counts[0] < counts[1] < counts[2]

    def test_a_residual_that_is_not_reached_is_told(self) -> None:
        _, head, _ = some_head(0)
        v = random(4, 5, seed=9)
        with pytest.raises(SingularError, match=r"residual of 0\.\d+ after 3 iterations, expected"):
            conjugate_gradients(head, v, 1e-12, limit=3)
        _, iterations = conjugate_gradients(head, v, 1e-4)
        assert conjugate_gradients(head, v, 1e-4, limit=iterations)[1] == iterations

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_a_singular_curvature_is_refused_and_its_advice_helps(self, dtype: torch.dtype) -> None:
        """Fewer rows than features, and no decay."""
        for seed in range(20):
            logits = random(4, 3, seed=seed).to(dtype)
            parts = random(4, 30, seed=seed + 50).to(dtype), torch.full((4,), 0.25, dtype=dtype)
            log_p = F.log_softmax(logits, dim=1)
            head = Head(h=parts[0], c=parts[1], log_p=log_p, log_s=log_p.flip(1))
            v = random(3, 30, seed=seed + 100).to(dtype)
            with pytest.raises(SingularError) as caught:
                conjugate_gradients(head, v, 1e-4)
            told = str(caught.value)
            assert "the curvature is singular" in told and "gauss_newton" not in told
            damping = float(told.rsplit("such as ", 1)[1])
            damped = replace(head, decay=damping)
            found, _ = conjugate_gradients(damped, v, 1e-4)
            # In single precision the residual of the recursion leaves the true one.
            bound = 1.01e-4 if dtype == torch.float64 else 1e-3
            assert relative(damped.product(found), v) < bound

    def test_nothing_to_solve_is_solved(self) -> None:
        _, head, _ = some_head(0)
        found, iterations = conjugate_gradients(head, torch.zeros(4, 5).double(), 1e-4)
        assert iterations == 0 and not found.any()

    def test_an_indefinite_curvature_is_refused_with_advice(self) -> None:
        weights, head, made = indefinite()
        values = torch.linalg.eigvalsh(dense(head))
        assert float(values[0]) < -0.1
        v = random(4, 5, seed=9)
        with pytest.raises(IndefiniteError) as caught:
            conjugate_gradients(head, v, 1e-8)
        told = str(caught.value)
        assert "the curvature is negative in one direction (-" in told
        assert "use curvature=gauss_newton or a larger damping" in told
        damped = head_of(weights, **made, decay=0.03 - 1.1 * float(values[0]), gauss_newton=False)
        for head in (damped, head_of(weights, **made, decay=0.03)):  # what it advises helps
            found, _ = conjugate_gradients(head, v, 1e-8)
            assert relative(head.product(found), v) < 1e-7

    def test_one_never_meets_a_negative_direction_with_gauss_newton(self) -> None:
        """Over 100 heads that are no minimum, decay 0.001 to 0.1."""
        for seed in range(100):
            head = random_head(seed)
            if head.decay:
                v = random(head.log_p.shape[1], head.h.shape[1], seed=seed)
                found, _ = conjugate_gradients(head, v, 1e-6)
                assert relative(head.product(found), v) < 1e-5
