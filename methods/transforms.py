"""Augmentations as modules from tensor to tensor, for a training loop that is not augbench's.

Each image of a batch has its own draw, and the batch is computed at once, on the device where it
lies. Images are (B, C, H, W), or a single (C, H, W), of one or three channels: uint8, or floating
point in [0, 1]. The result has the same shape and dtype. uint8 is converted to float32 and rounded
back. No gradient reaches the images.

The modules are the methods of the same names: with the same seed they draw the same. They draw from
torch's global generators, so ``torch.manual_seed`` and the workers of a ``DataLoader`` seed them,
and augment in training and in eval mode alike. ``torch.compile`` keeps a module as one operator of
its graph.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from methods import build, canonical
from methods.base import Batch, Context, Method
from methods.naming import call_of, render
from methods.randaugment import Interpolation
from methods.strength import AdaptiveStrength, normalised_entropy, steps_of


class _Named(nn.Module):
    """A method that changes the images alone, as a module."""

    def __init__(self, name: str, **arguments: Any) -> None:
        super().__init__()
        self.name = canonical(render(call_of(name, arguments)))
        _method(self.name)  # refuses wrong arguments now

    def extra_repr(self) -> str:
        """The method's name."""
        return self.name


class _Rows(_Named):
    """One that needs nothing but the images."""

    def forward(self, x: Tensor) -> Tensor:
        """The augmented images, in shape and dtype as ``x`` (B, C, H, W) or (C, H, W).

        Raises:
            TypeError: ``x`` is neither uint8 nor floating point.
            ValueError: its shape is another, or (checked on a CPU) its values are not in [0, 1].
        """
        x = x.detach()
        check(x)
        return torch.ops.augbench.augment(x, self.name, torch.rand(0))


class RandAugment(_Rows):
    """``n`` operations for each image, drawn uniformly, with magnitude ``m`` of 30.

    ``ops`` and ``interpolation`` as in the method ``randaugment``.
    """

    def __init__(
        self,
        *,
        n: int = 2,
        m: int = 9,
        ops: Literal["all", "colour"] = "all",
        interpolation: Interpolation = "nearest",
    ) -> None:
        super().__init__("randaugment", n=n, m=m, ops=ops, interpolation=interpolation)


class TrivialAugment(_Rows):
    """One operation for each image, drawn uniformly, with a uniform magnitude."""

    def __init__(
        self,
        *,
        space: Literal["wide", "standard"] = "wide",
        interpolation: Interpolation = "nearest",
    ) -> None:
        super().__init__("trivialaugment", space=space, interpolation=interpolation)


class AutoAugment(_Rows):
    """One of the pairs of operations of a policy for each image."""

    def __init__(
        self, *, policy: str = "cifar10", interpolation: Interpolation = "nearest"
    ) -> None:
        super().__init__("autoaugment", policy=policy, interpolation=interpolation)


class EntAugment(_Named):
    """One operation for each image, drawn uniformly, as strong as the network was sure of it.

    ``space`` and ``interpolation`` as in the method ``entaugment``. Keep ``strengths`` of each
    image's logits from one visit to the next; 0 before the first.
    """

    def __init__(
        self,
        *,
        space: Literal["standard", "wide"] = "standard",
        interpolation: Interpolation = "nearest",
    ) -> None:
        super().__init__("entaugment", space=space, interpolation=interpolation)

    def forward(self, x: Tensor, strength: Tensor) -> Tensor:
        """The augmented images (B, C, H, W), with strengths (B,) from 0 to 1.

        Raises:
            TypeError: ``x`` is neither uint8 nor floating point.
            ValueError: a shape is another, or (checked on a CPU) values are not in [0, 1].
        """
        x = x.detach()
        check(x)
        if strength.shape != x.shape[:-3]:
            raise ValueError(
                f"expected a strength for each image, {tuple(x.shape[:-3])}, got "
                f"{tuple(strength.shape)}"
            )
        steps = steps_of(strength.detach().clamp(0, 1)).view(-1)
        return torch.ops.augbench.augment(x, self.name, torch.rand(0), steps)


def strengths(logits: Tensor) -> Tensor:
    """EntAugment's strengths (B,) of images with logits (B, K): 1 - H(p) / log K, p = softmax.

    Where the network has diverged they are 0.
    """
    return (1 - normalised_entropy(logits.detach())).nan_to_num(0.0)


class Crop(_Rows):
    """Pad by ``pad`` pixels and cut out a window of the original size at a random position."""

    def __init__(self, *, pad: int = 4, mode: Literal["zeros", "reflect"] = "zeros") -> None:
        super().__init__("crop", pad=pad, mode=mode)


def check(x: Tensor) -> None:
    """Refuse what is not one image or a batch of images.

    Raises:
        TypeError: it is neither uint8 nor floating point.
        ValueError: its shape is another, or (checked on a CPU) its values are not in [0, 1].
    """
    if x.dtype != torch.uint8 and not x.is_floating_point():
        raise TypeError(f"expected images of uint8 or floating point, got {x.dtype}")
    if x.dim() not in (3, 4) or x.shape[-3] not in (1, 3):
        raise ValueError(
            "expected (B, C, H, W) or (C, H, W) with 1 or 3 channels, got "
            f"{tuple(x.shape)}; channels come first"
        )
    if x.is_floating_point() and x.is_cpu and x.numel() and not torch.compiler.is_compiling():
        low, high = (float(each) for each in x.aminmax())
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"expected values in [0, 1], got {low:g} to {high:g}; augment before you normalise"
            )


@cache
def _method(name: str) -> Method:
    return build(name)


@torch.library.custom_op(
    "augbench::augment", mutates_args=(), tags=[torch.Tag.nondeterministic_seeded]
)
def _augment(x: Tensor, name: str, drawn: Tensor, steps: Tensor | None = None) -> Tensor:
    # ``drawn`` is empty, from torch.rand: a compiler merges two calls with equal inputs, whatever
    # the operator's tags say, but never two draws.
    images = x if x.dim() == 4 else x[None]
    wide = images.dtype in (torch.float32, torch.float64)
    values = images if wide else images.float()
    if x.dtype == torch.uint8:
        values = values / 255
    method = _method(name)
    if isinstance(method, AdaptiveStrength) and steps is not None:
        own = method.draw(len(values))._replace(magnitude=steps.expand(method.n, -1))
        out = method.applied(values, own)
    else:
        rows = torch.full((len(images),), -1, device=x.device)
        w = values.new_full((len(images),), 1 / max(1, len(images)))
        batch = Batch(values, values.new_zeros(len(images), 1), w, rows)
        out = method.augment(batch, cast("Context", None)).x  # it reads nothing of a run
    if x.dtype == torch.uint8:
        out = (out * 255).round()
    return out.to(x.dtype).view(x.shape).contiguous()


@_augment.register_fake
def _(x: Tensor, name: str, drawn: Tensor, steps: Tensor | None = None) -> Tensor:
    return x.new_empty(x.shape)
