"""Images per second against Pillow and kornia: python -m benchmarks.speed.randaugment"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import kornia
import numpy as np
import PIL
import torch
import tyro
from PIL import Image
from tabulate import tabulate
from torch import Tensor

from benchmarks.training import models
from benchmarks.training.imagenet import import_torchvision
from benchmarks.training.machine import describe_device
from methods.base import Batch, Spec
from methods.randaugment import RandAugment

NO_CONTEXT: Any = None
PILLOW_IMAGES = 128


@dataclass
class Arguments:
    """Smooth images with some noise; on a GPU, Pillow still runs on the CPU."""

    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    """where the batches are"""
    threads: tuple[int, ...] = (1, 2)
    """CPU threads, one table part each; Pillow's rate is that of one process times the threads"""
    batches: tuple[int, ...] = (128, 512)
    """rows of a batch"""
    repeats: int = 60
    """calls of each, in turn; the mean is printed, because a batch's operations are random"""
    step: bool = True
    """also the share of a plain ResNet-18 (width 1) training step, batch 128, 28x28x3"""


Clock = Callable[[Callable[[], object]], float]


def clock(device: torch.device) -> Clock:
    """Seconds of a call, by the device's own events where it has them."""
    if device.type != "cuda":

        def on_cpu(call: Callable[[], object]) -> float:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start

        return on_cpu

    def on_cuda(call: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1000

    return on_cuda


def images(rows: int, channels: int, size: int) -> Tensor:
    """(rows, channels, size, size) of whole levels: blurred noise, so that histograms are full."""
    rng = torch.Generator().manual_seed(0)
    rough = torch.rand(rows, channels, 7, 7, generator=rng)
    smooth = torch.nn.functional.interpolate(rough, (size, size), mode="bilinear")
    noise = 0.1 * torch.rand(smooth.shape, generator=rng)
    return ((0.9 * smooth + noise) * 255).round() / 255


def batch_of(x: Tensor) -> Batch:
    """A batch of these images; its other contents do not matter here."""
    rows = torch.arange(len(x), device=x.device)
    return Batch(x, torch.zeros(len(x), 2, device=x.device), rows / len(x), rows)


def pillow(x: Tensor, repeats: int) -> float:
    """Images per second of torchvision's RandAugment, from Pillow images to tensors."""
    import_torchvision()
    from torchvision.transforms import RandAugment as Theirs  # noqa: PLC0415
    from torchvision.transforms.functional import to_tensor  # noqa: PLC0415

    levels = (x[:PILLOW_IMAGES] * 255).round().byte().permute(0, 2, 3, 1).squeeze(-1).numpy()
    pictures = [Image.fromarray(np.ascontiguousarray(picture)) for picture in levels]
    theirs, on_cpu = Theirs(num_ops=2, magnitude=9), clock(torch.device("cpu"))
    seconds = [
        on_cpu(lambda: torch.stack([to_tensor(theirs(picture)) for picture in pictures]))
        for _ in range(max(repeats // 4, 3))
    ]
    return len(pictures) / float(np.mean(seconds[1:]))


def measure(x: Tensor, repeats: int, timed: Clock) -> tuple[float, float, int]:
    """Seconds of ours and of kornia's, and the number of kornia's failures."""
    ours, batch = RandAugment(n=2, m=9), batch_of(x)
    theirs = kornia.augmentation.auto.RandAugment(n=2, m=9).to(x.device)
    own, other, failures = [], [], 0
    for call in range(repeats + 5):
        one = timed(lambda: ours.augment(batch, NO_CONTEXT))
        try:
            two, failed = timed(lambda: theirs(x)), 0
        except (RuntimeError, ValueError, TypeError):
            two, failed = float("nan"), 1
        if call >= 5:  # the first calls allocate
            own.append(one)
            other.append(two)
            failures += failed
    return float(np.mean(own)), float(np.mean(other)), failures


def step_share(timed: Clock, device: torch.device, repeats: int) -> tuple[float, float]:
    """Milliseconds of a plain training step, and the share of it that ``augment`` takes."""
    x = images(128, 3, 28).to(device)
    y = (torch.arange(128) % 2).to(device)
    torch.manual_seed(0)
    model = models.build("resnet18", Spec(128, 2, (3, 28, 28))).to(device)
    optimizer = torch.optim.Adam(model.parameters())
    ours, batch = RandAugment(n=2, m=9), batch_of(x)

    def step() -> None:
        loss = torch.nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    pairs = [
        (timed(step), timed(lambda: ours.augment(batch, NO_CONTEXT))) for _ in range(repeats + 2)
    ][2:]
    plain, augment = np.median(np.array(pairs), axis=0)
    return 1000 * float(plain), float(augment / plain)


def main() -> None:
    """Print the tables."""
    arguments = tyro.cli(Arguments, description=__doc__)
    warnings.simplefilter("ignore")  # kornia's own
    device = torch.device(arguments.device)
    timed = clock(device)
    print(
        f"{time.strftime('%Y-%m-%d')}, randaugment(n=2, m=9), "
        f"{describe_device(device)['name']}, torch {torch.__version__}, "
        f"Pillow {PIL.__version__}, kornia {kornia.__version__}, n = {arguments.repeats}, means"
    )
    body, shares = [], []
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for size, channels in ((28, 1), (28, 3), (32, 3)):
            torch.manual_seed(0)
            rate = pillow(images(PILLOW_IMAGES, channels, size), arguments.repeats) * threads
            for rows in arguments.batches:
                x = images(rows, channels, size).to(device)
                one, two, failures = measure(x, arguments.repeats, timed)
                ours, theirs = rows / one, rows / two
                body.append([threads, f"{size}x{size}x{channels}", rows, ours, rate, ours / rate])
                if failures:
                    body[-1] += [f"fails, {failures} of {arguments.repeats}", ""]
                else:
                    body[-1] += [f"{theirs:.0f}", ours / theirs]
        if arguments.step:
            plain, share = step_share(timed, device, max(arguments.repeats // 6, 3))
            shares.append(f"{100 * share:.2f} % of a step of {plain:.0f} ms on {threads} thread(s)")
    headers = ["threads", "images", "batch", "images/s", "Pillow", "ratio", "kornia", "ratio"]
    print(tabulate(body, headers=headers, floatfmt=("", "", "", ".0f", ".0f", ".1f", ".0f", ".1f")))
    print("Pillow: one image at a time, converted to a tensor, in one process, times threads.")
    print("kornia: one policy for a whole batch.")
    for line in shares:
        print(f"randaugment, batch 128, 28x28x3: {line} (plain ResNet-18, width 1; medians)")


if __name__ == "__main__":
    main()
