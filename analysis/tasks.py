"""What predictions mean in each kind of task: the half of a task that needs no torch.

``benchmarks/training/tasks.py`` has the other half, its losses, under the same name. Nothing else
knows a task by its name: code asks ``task_named`` and uses what it returns.
"""

from __future__ import annotations

import difflib
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from analysis import measures
from analysis.measures import Bools, Floats

Ints = NDArray[np.intp]

RARE = 0.4
"""A class with a smaller part of its even share, 1/K of the rows, is rare."""


class Scoring:
    """One of K classes per row: stored labels are int (N,), the class with the highest
    probability is predicted, of tied ones the first.

    The arrays z, p, ``predicted`` and ``truth`` are (N, K): logits, probabilities and two of bools.
    """

    name: ClassVar[str] = "multi-class"
    selects: ClassVar[str] = "auc"
    """the metric on the select split by which epochs and settings are chosen; higher is better"""
    leads: ClassVar[tuple[str, str]] = ("accuracy", "auc")
    """the metric of differences, verdicts and figures: usually, and on a table with a rare class"""
    exclusive: ClassVar[bool] = True
    """whether each row has exactly one class"""
    columns: ClassVar[tuple[int, float]] = (2, np.inf)
    """how few and how many columns logits may have"""

    def labels(self, targets: NDArray) -> NDArray:
        """Targets (N, K), hard or soft, in the form in which they are stored: int64 (N,)."""
        return targets.argmax(axis=1)

    def strata(self, labels: NDArray, classes: int) -> NDArray:
        """(N,) int: the groups of rows that a stratified draw keeps in their shares."""
        return labels

    def counts(self, labels: NDArray, classes: int) -> NDArray:
        """(K,) rows of each class."""
        return np.bincount(labels, minlength=classes)

    def leading(self, labels: NDArray, classes: int) -> str:
        """The metric that leads on a table whose test rows have these labels."""
        even = len(labels) / (classes if self.exclusive else 2)
        return self.leads[bool(self.counts(labels, classes).min() < RARE * even)]

    def truth(self, labels: ArrayLike, rows: int, classes: int) -> Bools:
        """Stored labels, one True per row.

        Raises:
            ValueError: labels that do not fit (rows, classes), or are not whole numbers in range.
        """
        y = _checked(np.asarray(labels), (rows,), classes - 1, self.name)
        return y[:, None] == np.arange(classes)

    def probabilities(self, z: Floats) -> Floats:
        """softmax over the classes."""
        e = np.exp(z - z.max(axis=1, keepdims=True))
        return e / e.sum(axis=1, keepdims=True)

    def predicted(self, p: Floats) -> Bools:
        """One True per row."""
        return p.argmax(axis=1)[:, None] == np.arange(p.shape[1])

    def right(self, predicted: Bools, truth: Bools) -> Floats:
        """(N,) share of each row that is predicted correctly: here 0 or 1."""
        return np.asarray((predicted & truth).any(axis=1), dtype=np.float64)

    def balanced(self, predicted: Bools, truth: Bools) -> float:
        """Mean recall of the classes that have rows."""
        return float(np.nanmean(measures.recalls(predicted, truth)))

    def balanced_values(self, predicted: Bools, truth: Bools) -> Floats:
        """(N,) values whose mean is ``balanced``: of K classes with rows, n_k of the N in class k,
        a row of class k that is predicted correctly counts N / (K n_k)."""
        rows = truth.sum(axis=0)
        right, own = self.right(predicted, truth), rows[truth.argmax(axis=1)]
        return right * len(truth) / ((rows > 0).sum() * own)

    def nll(self, z: Floats, truth: Bools) -> float:
        """Mean over rows of -log p of the class, in nats."""
        shifted = z - z.max(axis=1, keepdims=True)
        rest = np.exp(shifted)
        # log1p of the others, not log of the sum, which rounds to 1 where the top p does
        rest[np.arange(len(z)), z.argmax(axis=1)] = 0
        return float((np.log1p(rest.sum(axis=1)) - shifted[truth]).mean())

    def brier(self, p: Floats, truth: Bools) -> float:
        """Mean over rows of the squared error summed over classes."""
        return float(((p - truth) ** 2).sum(axis=1).mean())

    def confidence(self, p: Floats, predicted: Bools, truth: Bools) -> list[tuple[Floats, NDArray]]:
        """Pairs of (N,): the probability of what is predicted, and whether that is correct."""
        return [(p.max(axis=1), self.right(predicted, truth))]

    def rankings(self, p: Floats, truth: Bools) -> tuple[Floats, Bools]:
        """(N, C) scores and positives: the columns over which ranking metrics are averaged."""
        return p, truth

    def asked(self, columns: NDArray) -> NDArray:
        """Of the classes' values (K, ...) those over which f1 and its like are averaged."""
        return columns

    def pairs(self, predicted: Bools, truth: Bools) -> list[tuple[NDArray, NDArray]]:
        """Pairs of labels (N,), given and predicted, over which a correlation is averaged."""
        return [(truth.argmax(axis=1), predicted.argmax(axis=1))]

    def own(self, p: Floats, predicted: Bools, truth: Bools) -> dict[str, float]:
        """Metrics that only this task has."""
        return {}


class Binary(Scoring):
    """Two classes per row, the second one the positive: it is predicted above 0.5."""

    name = "binary-class"
    columns = (2, 2)

    def predicted(self, p: Floats) -> Bools:
        """Class 1 if its probability is above 0.5."""
        return (p[:, 1] > 0.5)[:, None] == np.arange(2)

    def rankings(self, p: Floats, truth: Bools) -> tuple[Floats, Bools]:
        """Those of the last class."""
        return p[:, -1:], truth[:, -1:]

    def asked(self, columns: NDArray) -> NDArray:
        """That of class 1."""
        return columns[1:]

    def own(self, p: Floats, predicted: Bools, truth: Bools) -> dict[str, float]:
        """The sensitivity at a specificity of 95 %."""
        found = measures.sensitivity_at_95_specificity(p[:, -1], truth[:, -1])
        return {"sensitivity_at_95_specificity": found}


class Ordinal(Scoring):
    """Ordered classes, trained and predicted as classes without an order (MedMNIST's protocol)."""

    name = "ordinal-regression"

    def own(self, p: Floats, predicted: Bools, truth: Bools) -> dict[str, float]:
        """Cohen's kappa with quadratic weights."""
        classes = predicted.argmax(axis=1), truth.argmax(axis=1)
        return {"quadratic_kappa": measures.quadratic_kappa(*classes)}


class MultiLabel(Scoring):
    """K yes-or-no labels per row: stored as uint8 (N, K), each predicted above 0.5."""

    name = "multi-label"
    exclusive = False
    columns = (1, np.inf)

    def labels(self, targets: NDArray) -> NDArray:
        """uint8 (N, K)."""
        return targets.astype(np.uint8)

    def strata(self, labels: NDArray, classes: int) -> NDArray:
        """The rarest label that a row has, K for none."""
        order = np.argsort(labels.sum(axis=0), kind="stable")
        strata = np.full(len(labels), classes)
        for label in order[::-1]:
            strata[labels[:, label] > 0] = label
        return strata

    def counts(self, labels: NDArray, classes: int) -> NDArray:
        """(K,) rows that have each label."""
        return labels.sum(axis=0)

    def truth(self, labels: ArrayLike, rows: int, classes: int) -> Bools:
        """Stored labels, a True for each label of a row."""
        return _checked(np.asarray(labels), (rows, classes), 1, self.name) == 1

    def probabilities(self, z: Floats) -> Floats:
        """A sigmoid per label."""
        small = np.exp(-np.abs(z))
        return np.where(z >= 0, 1.0, small) / (1 + small)

    def predicted(self, p: Floats) -> Bools:
        """Each label above 0.5."""
        return p > 0.5

    def right(self, predicted: Bools, truth: Bools) -> Floats:
        """Share of the row's labels."""
        return np.asarray((predicted == truth).mean(axis=1), dtype=np.float64)

    def balanced(self, predicted: Bools, truth: Bools) -> float:
        """Mean over labels of the mean of sensitivity and specificity, or the one that exists."""
        both = [measures.recalls(predicted, truth), measures.recalls(~predicted, ~truth)]
        return float(np.nanmean(both, axis=0).mean())

    def balanced_values(self, predicted: Bools, truth: Bools) -> Floats:
        """The mean over labels, each with two classes."""
        positive = truth.sum(axis=0)
        own = np.where(truth, positive, len(truth) - positive)
        classes = (positive > 0).astype(int) + (positive < len(truth))
        return ((predicted == truth) * len(truth) / (classes * own)).mean(axis=1)

    def nll(self, z: Floats, truth: Bools) -> float:
        """Mean binary cross-entropy over rows and labels, in nats."""
        return float(np.logaddexp(0, np.where(truth, -z, z)).mean())

    def brier(self, p: Floats, truth: Bools) -> float:
        """Mean over rows and labels of the squared error."""
        return float(((p - truth) ** 2).mean())

    def confidence(self, p: Floats, predicted: Bools, truth: Bools) -> list[tuple[Floats, NDArray]]:
        """A pair for each label."""
        return list(zip(np.maximum(p, 1 - p).T, (predicted == truth).T, strict=True))

    def pairs(self, predicted: Bools, truth: Bools) -> list[tuple[NDArray, NDArray]]:
        """A pair for each label."""
        return list(zip(truth.T, predicted.T, strict=True))


TASKS: dict[str, Scoring] = {
    each.name: each for each in (Scoring(), Binary(), Ordinal(), MultiLabel())
}


def task_named(name: str) -> Scoring:
    """The numpy half of a task.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in TASKS:
        close = difflib.get_close_matches(name, TASKS, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"kind {name!r}: expected one of {', '.join(TASKS)}{hint}")
    return TASKS[name]


def _checked(y: NDArray, expected: tuple[int, ...], top: int, name: str) -> NDArray:
    if y.shape != expected:
        raise ValueError(f"targets have shape {y.shape}, expected {expected} for {name}")
    if bad := int((~((y >= 0) & (y <= top) & (y == np.floor(y)))).sum()):
        raise ValueError(f"{bad} of {y.size} targets are not integers from 0 to {top}")
    return y
