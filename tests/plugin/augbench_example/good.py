"""A method of a third party, in one file."""

from dataclasses import replace

import torch

from augbench import Batch, Context, Method


class Brighten(Method):
    """Raise the brightness of each image by its own random amount."""

    source = "a test of augbench"

    def __init__(self, *, strength: float = 0.2) -> None:
        super().__init__()
        self.strength = strength

    def augment(self, batch: Batch, ctx: Context) -> Batch:
        """x + strength * u with u uniform in [0, 1], cut off at 1."""
        amount = self.strength * torch.rand(len(batch.x), 1, 1, 1, device=batch.x.device)
        return replace(batch, x=(batch.x + amount).clamp(max=1))
