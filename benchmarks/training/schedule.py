"""The optimiser and its learning rate."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim import Optimizer

from analysis.runs import Training


def make_optimizer(model: nn.Module, training: Training) -> Optimizer:
    """The optimiser that ``training`` names, over all parameters."""
    rate, decay = training.learning_rate, training.weight_decay
    if training.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), lr=rate, weight_decay=decay)
    if training.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay)
    momentum = training.momentum
    return torch.optim.SGD(
        model.parameters(), lr=rate, weight_decay=decay, momentum=momentum, nesterov=momentum > 0
    )


def learning_rate(training: Training, epoch: int) -> float:
    """The rate of an epoch, counted from 0.

    ``multistep`` multiplies by ``gamma`` at each milestone; ``cosine`` falls to a thousandth; a
    warm-up first rises linearly from a tenth to the value of the schedule at its end.
    """
    if epoch < training.warmup_epochs:
        goal = _scheduled(training, training.warmup_epochs)
        start = training.learning_rate / 10
        return start + (goal - start) * epoch / training.warmup_epochs
    return _scheduled(training, epoch)


def _scheduled(training: Training, epoch: int) -> float:
    rate, epochs = training.learning_rate, training.epochs
    if training.schedule == "multistep":
        passed = sum(epoch >= milestone * epochs for milestone in training.milestones)
        return rate * training.gamma**passed
    if training.schedule == "cosine":
        floor = rate / 1000
        return floor + (rate - floor) * (1 + math.cos(math.pi * epoch / epochs)) / 2
    return rate
