"""Losses and labels for each kind of task: the half of a task that needs torch.

``analysis/tasks.py`` has the other half, metrics and stored labels, under the same name.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from methods.base import Task


class MultiClass:
    """One of K labels per row; also binary and ordinal sets, as in MedMNIST's protocol."""

    def losses(self, logits: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy of each row (B,), in nats; affine in ``y`` (B, K)."""
        return F.cross_entropy(logits, y, reduction="none")

    def labels(self, scores: Tensor, temperature: float = 1.0) -> Tensor:
        """softmax(scores / temperature): rows on the simplex."""
        return torch.softmax(scores / temperature, dim=1)


class MultiLabel:
    """K yes-or-no labels per row (ChestMNIST)."""

    def losses(self, logits: Tensor, y: Tensor) -> Tensor:
        """Binary cross-entropy averaged over the labels (B,), in nats; affine in ``y`` (B, K)."""
        return F.binary_cross_entropy_with_logits(logits, y, reduction="none").mean(dim=1)

    def labels(self, scores: Tensor, temperature: float = 1.0) -> Tensor:
        """sigmoid(scores / temperature): values in [0, 1]."""
        return torch.sigmoid(scores / temperature)


TASKS: dict[str, Task] = {
    "multi-class": MultiClass(),
    "binary-class": MultiClass(),
    "ordinal-regression": MultiClass(),
    "multi-label": MultiLabel(),
}


def task_of(kind: str) -> Task:
    """The torch half of a task, by the name that data sets give it."""
    return TASKS[kind]
