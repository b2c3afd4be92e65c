"""Code of a user's own, named ``py:tests.pipelines:...``: a method, and transforms of images."""

import random
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from methods.base import Batch, Context, Method


class Mine(Method):
    """Darken each image with probability ``p``."""

    def __init__(self, *, p: float = 0.5) -> None:
        super().__init__()
        self.p = p

    def augment(self, batch: Batch, ctx: Context) -> Batch:
        dark = torch.rand(len(batch.x), device=batch.x.device) < self.p
        return replace(batch, x=batch.x * torch.where(dark, 0.5, 1.0)[:, None, None, None])


def turned(image: Image.Image) -> Image.Image:
    """Of one image, from the generator of ``random``."""
    return image.rotate(random.uniform(-20, 20))


def shifted(x: Tensor) -> Tensor:
    """Of a batch, from torch's."""
    if x.dim() != 4:
        raise ValueError("expected a batch")
    return x.roll(int(torch.randint(-2, 3, ())), dims=-1)


class Composed:
    """As a transform of albumentations: generators of its own, images by their keyword."""

    def set_random_state(self, generator: np.random.Generator, python: random.Random) -> None:
        self.generator, self.python = generator, python

    def __call__(self, *, image: np.ndarray) -> dict[str, np.ndarray]:
        if self.python.random() < 0.5:
            image = image[:, ::-1]
        noise = self.generator.integers(-20, 21, image.shape)
        return {"image": (image.astype(int) + noise).clip(0, 255).astype(np.uint8)}


composed = Composed()
OWN = (
    "py:tests.pipelines:Mine(p=0.3)",
    "wrap(call=py:tests.pipelines:turned)",
    "wrap(call=py:tests.pipelines:shifted)",
    "wrap(call=py:tests.pipelines:composed)",
)
