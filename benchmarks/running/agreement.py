"""Whether a training step on this machine's device agrees with float64 on the CPU."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional as F

from benchmarks.training import models
from benchmarks.training.precision import tf32
from methods.base import Spec

MODEL = "resnet18(width=0.5, activation=celu)"
"""With relu a single activation near zero, rounded to the other side, changes a whole gradient."""
ROWS, CLASSES, SHAPE = 16, 9, (3, 28, 28)
LIMIT = 1e-4
"""Float32 on a CPU is at 2e-6; TF32, which rounds inputs to 10 bits, is at 2e-3."""


class Agreement(NamedTuple):
    """How far a step's numbers are from those in float64 on the CPU, relative to these."""

    loss: float
    gradient: float
    """the norm of the difference over the norm, of all parameters at once"""

    @property
    def right(self) -> bool:
        """Whether both are within the limit; nan is not."""
        return self.loss <= LIMIT and self.gradient <= LIMIT


def look(device: torch.device) -> Agreement:
    """Compare loss and gradient of one step in float32 on a device with float64 on the CPU.

    Both begin from the same weights and images. The global generator is left as it was.

    Raises:
        RuntimeError: the device cannot do it, such as a card that this torch has no code for.
    """
    exact_loss, exact = _step(torch.device("cpu"), torch.float64)
    loss, gradient = _step(device, torch.float32)
    return Agreement(
        abs(loss - exact_loss) / abs(exact_loss), float((gradient - exact).norm() / exact.norm())
    )


def _step(device: torch.device, dtype: torch.dtype) -> tuple[float, torch.Tensor]:
    """Loss and gradient, float64 on the CPU, of a step whose convolutions do not take TF32."""
    rng = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = models.build(MODEL, Spec(ROWS, CLASSES, SHAPE)).to(device, dtype)
    x = torch.rand(ROWS, *SHAPE, generator=rng).to(device, dtype)
    y = (torch.arange(ROWS) % CLASSES).to(device)
    with tf32(False):
        loss = F.cross_entropy(network(x), y)
        loss.backward()
    parts = [
        each.grad.flatten().cpu().double() for each in network.parameters() if each.grad is not None
    ]
    return float(loss.detach().cpu()), torch.cat(parts)
