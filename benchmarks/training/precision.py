"""The arithmetic of a run: the training step in the run's precision, everything else in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

Precision = Literal["float32", "tf32", "bfloat16", "float16"]
LOW = {"bfloat16": torch.bfloat16, "float16": torch.float16}
GROWTH = 2000
"""Steps without overflow after which the scale of a float16 loss doubles, torch's default."""


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Allow or forbid TF32 in convolutions and matrix products on a GPU.

    TF32 rounds their inputs to 10 bits of mantissa. torch allows it in convolutions by default,
    which makes the small differences from which SAFLEX computes its scores useless.
    """
    switches: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = allowed
    try:
        yield
    finally:
        for switch, was in zip(switches, before, strict=True):
            switch.allow_tf32 = was


class Arithmetic:
    """The precision of forward, backward and update of a training step."""

    def __init__(self, precision: Precision, device: torch.device) -> None:
        self.precision: Precision = precision
        self._device, self._switches = device, device.type == "cuda"
        # A gradient below 6e-8 is zero in float16; scaled up, it is not.
        self._scaler = GradScaler(
            device.type, growth_interval=GROWTH, enabled=precision == "float16"
        )

    @property
    def is_float32(self) -> bool:
        """Whether the network called by itself equals the training forward to rounding."""
        return self.precision == "float32"

    def forward(self) -> AbstractContextManager[Any]:
        """Inside, the network computes in the run's precision."""
        if self.precision in LOW:
            return torch.autocast(self._device.type, LOW[self.precision])
        return tf32(True) if self.precision == "tf32" else nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Backpropagate a loss of shape ()."""
        with tf32(self.precision == "tf32") if self._switches else nullcontext():
            self._scaler.scale(loss).backward()

    def update(self, optimizer: Optimizer) -> float:
        """Take the optimiser's step; 1.0 if it was skipped because float16 gradients overflowed."""
        if self.precision != "float16":
            optimizer.step()
            return 0.0
        before = self._scaler.get_scale()
        self._scaler.step(optimizer)
        self._scaler.update()
        return float(self._scaler.get_scale() < before)

    def state_dict(self) -> dict[str, Any]:
        """The scale of the loss; empty unless the run is float16."""
        return self._scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the scale of the loss."""
        if state:
            self._scaler.load_state_dict(state)


def automatic() -> Precision:
    """The fastest precision of this machine.

    bfloat16 on CUDA GPUs of compute capability 8.0 or higher, float16 on older ones, which only
    emulate bfloat16, and float32 without CUDA.
    """
    if not torch.cuda.is_available():
        return "float32"
    return "bfloat16" if torch.cuda.get_device_capability() >= (8, 0) else "float16"
