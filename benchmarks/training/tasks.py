"""Losses and labels for each kind of task."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


class MultiClass:
    """One of K labels per row; also binary and ordinal sets, as in MedMNIST's protocol."""

    def losses(self, logits: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy of each row (B,), in nats; affine in ``y`` (B, K)."""
        return -(y * F.log_softmax(logits, dim=1)).sum(dim=1)

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


def task_of(kind: str) -> MultiClass | MultiLabel:
    """The task of a MedMNIST task word such as "binary-class" or "multi-label"."""
    return MultiLabel() if kind == "multi-label" else MultiClass()
