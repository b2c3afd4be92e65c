"""Images from disk beside torchvision's loader, and memory: python -m benchmarks.speed.streaming

Epochs over a folder of JPEGs: streamed from the file into which they were decoded once, from
memory, and by torchvision's ImageFolder with a DataLoader, each to batches (B, 3, H, W) of float32.
With ``--memory ROWS`` instead the memory of a process that trains on so many synthetic images.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from PIL import Image
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F

import methods
from analysis.runs import Run, Training
from benchmarks.data import decoders, ondisk
from benchmarks.data.dataset import Arrays
from benchmarks.data.names import Benchmark
from benchmarks.data.ondisk import OnDisk
from benchmarks.data.sources import load
from benchmarks.data.splits import Protocol, make_splits
from benchmarks.data.streams import Rows, training_order
from benchmarks.training.machine import describe_device
from benchmarks.training.trainer import fit
from methods.base import Spec
from methods.own import import_torchvision

CLASSES = 10


@dataclass
class Arguments:
    """Colour images of smooth noise."""

    images: int = 2000
    """JPEGs in the folder"""
    edge: int = 256
    """of these files, in pixels"""
    size: int = 224
    """of the images that are trained on"""
    batch_size: int = 128
    """rows per batch"""
    workers: tuple[int, ...] = (1, 2)
    """of torchvision's loader, in turn"""
    rounds: int = 3
    """each an epoch of every row of the table"""
    place: Path | None = None
    """folder for the files, on the disk that is to be measured; default: a temporary one"""
    memory: int = 0
    """rows of the set whose memory is measured"""
    measured: bool = False
    """as the process that is measured"""


def images(place: Path, count: int, edge: int) -> None:
    """A folder of classes with JPEGs: smooth noise, about as large as photographs of this size."""
    generator = np.random.default_rng(0)
    for number in range(count):
        coarse = generator.integers(0, 256, (edge // 8, edge // 8, 3), np.uint8)
        smooth = Image.fromarray(coarse).resize((edge, edge), Image.Resampling.BICUBIC)
        grain = generator.integers(-6, 7, (edge, edge, 1))
        pixels = (np.asarray(smooth) + grain).clip(0, 255).astype(np.uint8)
        path = place / str(number % CLASSES) / f"{number:06}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, quality=90)


def seconds(epoch: Callable[[], Iterable[Tensor]], rows: int) -> float:
    """Wall seconds of an epoch; every batch is read."""
    start, seen = time.perf_counter(), 0
    for x in epoch():
        seen += len(x)
        assert x.dtype == torch.float32 and x.shape[1] == 3
    assert seen == rows, f"{seen} rows, expected {rows}"
    return time.perf_counter() - start


def ours(rows: Rows, size: int, epoch: int) -> Iterable[Tensor]:
    """One epoch as in training."""
    steps = -(-len(rows) // size)
    order = training_order(len(rows), (), size, steps, epoch, 0, "train")
    for index, x in zip(order, rows.ahead(order), strict=True):
        yield rows.inputs(index) if x is None else x


def torchvisions(place: Path, arguments: Arguments, workers: int) -> Iterable[Any]:
    """ImageFolder with the same resize, its usual transform, and workers that stay."""
    torchvision = import_torchvision()
    from torchvision import transforms  # noqa: PLC0415 - the wheel may be for another torch

    steps = [transforms.Resize((arguments.size, arguments.size)), transforms.ToTensor()]
    folder = torchvision.datasets.ImageFolder(str(place), transforms.Compose(steps))
    return torch.utils.data.DataLoader(
        folder,
        arguments.batch_size,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )


def compare(arguments: Arguments, place: Path) -> None:
    """Print images per second of each, and the ratio to each of torchvision's loaders."""
    folder = place / "set"
    images(folder / "train", arguments.images, arguments.edge)
    images(folder / "test", CLASSES, arguments.edge)  # splits of its own: one row a class is test

    def read(memory_gib: float) -> Arrays:
        given: dict[str, Any] = {"path": str(folder), "size": arguments.size}
        return load("folder", **given, root=place, memory_gib=memory_gib)

    start = time.perf_counter()
    on_disk = read(0)
    once = time.perf_counter() - start
    start = time.perf_counter()
    read(0)
    again = time.perf_counter() - start
    rows = {
        name: make_splits(
            arrays,
            Benchmark(name="folder"),
            Protocol(),
            needs_meta=False,
            seed=0,
            device=torch.device("cpu"),
        ).train
        for name, arrays in (("streamed", on_disk), ("in memory", read(1024)))
    }
    count = len(rows["streamed"])
    for batches in zip(*(ours(each, 64, 0) for each in rows.values()), strict=True):
        assert torch.equal(*batches), "streamed rows differ from those in memory"
    epochs: dict[str, tuple[Callable[[int], Iterable[Tensor]], int]] = {
        name: (lambda epoch, each=each: ours(each, arguments.batch_size, epoch), count)
        for name, each in rows.items()
    }
    for workers in arguments.workers:
        loader = torchvisions(folder / "train", arguments, workers)
        name = f"torchvision, {workers} worker{'s' * (workers != 1)}"
        epochs[name] = (lambda _, loader=loader: (x for x, _ in loader), arguments.images)
    rates: dict[str, list[float]] = {name: [] for name in epochs}
    for number in range(arguments.rounds + 1):
        for name, (epoch, size) in epochs.items():
            rate = size / seconds(lambda epoch=epoch, number=number: epoch(number), size)
            if number:  # the first starts the workers
                rates[name].append(rate)
    theirs = [name for name in rates if name.startswith("torchvision")]
    body = [
        [name, f"{statistics.median(found):,.0f}", *(_ratio(found, rates[one]) for one in theirs)]
        for name, found in rates.items()
    ]
    print(_head(f"{arguments.images} JPEGs of {arguments.edge} pixels, used at {arguments.size}"))
    headers = ["", "images/s", *(f"ratio to {name}" for name in theirs)]
    columns = ("left", *["right"] * (len(headers) - 1))
    print(tabulate(body, headers=headers, colalign=columns, disable_numparse=True))
    processes = min(decoders.MOST, decoders.cores())
    print(
        f"decoded once, {processes} processes: {once:.1f} s, {arguments.images / once:,.0f} "
        f"images/s; the start of a later run: {again:.2f} s"
    )
    print(f"Streamed: one reading thread. Medians of {arguments.rounds} rounds, ranges of ratios.")


def _ratio(ours: list[float], theirs: list[float]) -> str:
    found = [one / other for one, other in zip(ours, theirs, strict=True)]
    return f"{statistics.median(found):.2f} ({min(found):.2f}-{max(found):.2f})"


def _head(what: str) -> str:
    return (
        f"{time.strftime('%Y-%m-%d')}, {what}, {torch.get_num_threads()} thread(s), "
        f"{describe_device(torch.device('cpu'))['name']}, torch {torch.__version__}"
    )


class Tiny(nn.Module):
    """A network that costs next to nothing: what is measured is how its images come to it."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.head = nn.Linear(spec.shape[0] * 49, spec.classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, K)."""
        return self.head(F.adaptive_avg_pool2d(x, 7).flatten(1))


def write(place: Path, rows: int, size: int) -> OnDisk:
    """A set of synthetic images."""
    folder = ondisk.folder_of(place, "synthetic", f"{rows}x{size:08}")

    def make() -> dict[str, Any]:
        ondisk.refuse_full(folder, rows * 3 * size**2, Path("the synthetic set"))
        generator = np.random.default_rng(0)
        writer = ondisk.Writer(folder, "images", (size, size, 3), np.uint8)
        left = rows
        while left:
            writer.add(generator.integers(0, 256, (min(left, 100), size, size, 3), np.uint8))
            left -= min(left, 100)
        return {"arrays": {"images": writer.end()}}

    return ondisk.kept(folder, Path("synthetic"), make)[1]["images"]


def trained(arguments: Arguments, place: Path) -> None:
    """Train one epoch on 80 % of the rows, evaluate on the others, print this process's memory."""
    x = write(place, arguments.memory, arguments.size)
    before = _memory()
    labels = np.arange(len(x)) % CLASSES
    parts = np.split(np.arange(len(x)), [8 * len(x) // 10, 9 * len(x) // 10])
    pieces: dict[str, Any] = {
        f"{split}_{letter}": array
        for split, part in zip(("train", "val", "test"), parts, strict=True)
        for letter, array in (("x", x.at(part)), ("y", labels[part]))
    }
    arrays = Arrays(
        name="synthetic",
        kind="multi-class",
        classes=tuple(map(str, range(CLASSES))),
        **pieces,
        checksum="",
        verified=True,
        caveats=(),
        source="",
        notes=(),
    )
    splits = make_splits(
        arrays,
        Benchmark(name="synthetic"),
        Protocol(),
        needs_meta=False,
        seed=0,
        device=torch.device("cpu"),
    )
    training = Training(epochs=1, batch_size=arguments.batch_size)
    run = Run(benchmark="synthetic", data="", model="own", method="none", training=training)
    start = time.perf_counter()
    fit(run, splits, methods.build("none"), model=Tiny)
    taken = time.perf_counter() - start
    size = len(x) * 3 * arguments.size**2 / ondisk.GIB
    print(_head(f"{len(x)} images of {arguments.size} pixels ({size:.1f} GiB)"))
    now = _memory()
    body = [[name, f"{before[name]:,.0f}", f"{now[name]:,.0f}"] for name in now]
    print(tabulate(body, headers=["MiB", "before", "after one epoch"], disable_numparse=True))
    print(f"{taken:.0f} s for {len(x)} rows trained on or evaluated (a network of one layer)")


def _memory() -> dict[str, float]:
    """MiB of this process (Linux)."""
    names = {"VmHWM": "peak resident", "RssAnon": "anonymous now", "RssFile": "of files now"}
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    found = {line.split(":")[0]: line.split() for line in lines}
    return {text: int(found[name][1]) / 1024 for name, text in names.items()}


def main() -> None:
    """Print a table."""
    arguments = tyro.cli(Arguments, description=__doc__)
    torch.set_num_threads(1)
    place = Path(tempfile.mkdtemp(prefix="streaming-", dir=arguments.place))
    if arguments.measured:
        assert arguments.place is not None
        place.rmdir()
        trained(arguments, arguments.place)
        return
    try:
        if not arguments.memory:
            compare(arguments, place)
            return
        write(place, arguments.memory, arguments.size)
        # In a process of its own, so that writing does not count.
        again = [sys.executable, "-m", "benchmarks.speed.streaming", *sys.argv[1:]]
        subprocess.run([*again, "--measured", "--place", str(place)], check=True)
    finally:
        shutil.rmtree(place)


if __name__ == "__main__":
    main()
