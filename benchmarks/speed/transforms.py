"""Images per second beside torchvision v2 and kornia: python -m benchmarks.speed.transforms"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import kornia
import numpy as np
import torch
import tyro
from tabulate import tabulate
from torch import Tensor

from benchmarks.speed.randaugment import clock, images
from benchmarks.training.imagenet import import_torchvision
from benchmarks.training.machine import describe_device
from methods import transforms


@dataclass
class Arguments:
    """Smooth images with some noise."""

    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    """where the batches are"""
    threads: int = 1
    """CPU threads"""
    sizes: tuple[int, ...] = (28, 64, 224)
    """pixels of an edge"""
    batch_size: int = 128
    """images per batch"""
    repeats: int = 12
    """calls of each, in turn; the mean is printed, because a batch's operations are random"""


Call = Callable[[Tensor], Tensor]


def rivals() -> Mapping[str, tuple[Call, Call, Call]]:
    """By name: ours, torchvision's (which draws once a call), and kornia's (whose operations are
    drawn once a call)."""
    import_torchvision()
    from torchvision.transforms import v2  # noqa: PLC0415 - the wheel may be for another torch

    auto: Any = kornia.augmentation.auto
    return {
        "RandAugment": (transforms.RandAugment(), v2.RandAugment(), auto.RandAugment(n=2, m=9)),
        "TrivialAugment": (
            transforms.TrivialAugment(),
            v2.TrivialAugmentWide(),
            auto.TrivialAugment(),
        ),
        "AutoAugment": (
            transforms.AutoAugment(),
            v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10),
            auto.AutoAugment("cifar10"),
        ),
    }


def rates(calls: Sequence[tuple[Call, Tensor]], repeats: int) -> list[float]:
    """Images per second of calls on their images, in turn; nan of one that fails."""
    taken: list[list[float]] = [[] for _ in calls]
    for number in range(repeats + 2):
        for (call, x), seconds in zip(calls, taken, strict=True):
            try:
                one = clock(x.device)(lambda call=call, x=x: call(x))
            except (RuntimeError, ValueError, TypeError):
                one = float("nan")
            if number >= 2:  # the first calls allocate
                seconds.append(one)
    return [len(x) / float(np.mean(seconds)) for (_, x), seconds in zip(calls, taken, strict=True)]


def one_by_one(call: Call) -> Call:
    """The call for each image."""
    return lambda x: torch.stack([call(each) for each in x])


def main() -> None:
    """Print the table."""
    arguments = tyro.cli(Arguments, description=__doc__)
    warnings.simplefilter("ignore")  # kornia's own
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    body = []
    for size in arguments.sizes:
        for channels in (1, 3):
            values = images(arguments.batch_size, channels, size).to(device)
            levels = (values * 255).to(torch.uint8)
            for name, (ours, once, batched) in rivals().items():
                calls = [(ours, levels), (one_by_one(once), levels), (once, levels)]
                calls += [(batched, values)]
                found = rates(calls, arguments.repeats)
                shown = ["" if np.isnan(each) else f"{each:,.0f}" for each in found]
                ratio = f"{found[0] / found[1]:.1f}"
                body.append([name, f"{size}x{size}x{channels}", *shown[:2], ratio, *shown[2:]])
    print(
        f"{time.strftime('%Y-%m-%d')}, batch {arguments.batch_size}, {arguments.threads} "
        f"thread(s), {describe_device(device)['name']}, torch {torch.__version__}, "
        f"n = {arguments.repeats}, means"
    )
    headers = ["", "images", "ours", "v2, image by image", "ratio", "v2, one draw a batch"]
    headers.append("kornia, operations once a batch")
    columns = ("left", "left", *["right"] * 5)
    print(tabulate(body, headers=headers, colalign=columns, disable_numparse=True))
    print("Images per second. Ours and v2 on uint8, kornia on float32; empty: it failed.")


if __name__ == "__main__":
    main()
