"""Images from disk beside torchvision's loader, and memory: python -m benchmarks.speed.streaming

Epochs over a folder of JPEGs: streamed from the file into which they were decoded once, from
memory, and by torchvision's ImageFolder with a DataLoader, each to batches (B, 3, H, W) of float32.
With ``--memory`` instead the memory of a process that lists and decodes the folder and trains.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
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
from benchmarks.data.names import Benchmark
from benchmarks.data.sources import load
from benchmarks.data.splits import Protocol, Splits, make_splits
from benchmarks.data.streams import Rows, training_order
from benchmarks.speed import loop
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
    repeats: int = 3
    """rounds, each an epoch of every row of the table"""
    place: Path | None = None
    """folder for the files, on the disk that is to be measured; default: a temporary one"""
    memory: bool = False
    """measure memory, not time"""


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


def read(place: Path, size: int, memory_gib: float) -> Splits:
    """The folder's images, decoded once into a file if they exceed the budget."""
    arrays = load("folder", path=str(place / "set"), size=size, root=place, memory_gib=memory_gib)
    benchmark, device = Benchmark(name="folder"), torch.device("cpu")
    return make_splits(arrays, benchmark, Protocol(), needs_meta=False, seed=0, device=device)


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
    start = time.perf_counter()
    on_disk = read(place, arguments.size, 0).train
    once = time.perf_counter() - start
    start = time.perf_counter()
    read(place, arguments.size, 0)
    again = time.perf_counter() - start
    rows = {"streamed": on_disk, "in memory": read(place, arguments.size, 1024).train}
    count = len(on_disk)
    for batches in zip(*(ours(each, 64, 0) for each in rows.values()), strict=True):
        assert torch.equal(*batches), "streamed rows differ from those in memory"
    epochs: dict[str, tuple[Callable[[int], Iterable[Tensor]], int]] = {
        name: (lambda epoch, each=each: ours(each, arguments.batch_size, epoch), count)
        for name, each in rows.items()
    }
    for workers in arguments.workers:
        loader = torchvisions(place / "set" / "train", arguments, workers)
        name = f"torchvision, {workers} worker{'s' * (workers != 1)}"
        epochs[name] = (lambda _, loader=loader: (x for x, _ in loader), arguments.images)
    rates: dict[str, list[float]] = {name: [] for name in epochs}
    for number in range(arguments.repeats + 1):
        for name, (epoch, size) in epochs.items():
            rate = size / seconds(lambda epoch=epoch, number=number: epoch(number), size)
            if number:  # the first starts the workers
                rates[name].append(rate)
    theirs = [name for name in rates if name.startswith("torchvision")]
    body = [
        [name, f"{statistics.median(found):,.0f}"]
        + [" (".join(loop.spread(loop.ratios(found, rates[one]))) + ")" for one in theirs]
        for name, found in rates.items()
    ]
    print(_head(arguments, arguments.repeats))
    headers = ["", "images/s", *(f"ratio to {name}" for name in theirs)]
    columns = ("left", *["right"] * (len(headers) - 1))
    print(tabulate(body, headers=headers, colalign=columns, disable_numparse=True))
    print(
        f"decoded once, {_processes()} processes: {once:.1f} s, {arguments.images / once:,.0f} "
        f"images/s; the start of a later run: {again:.2f} s"
    )
    print("Streamed: one reading thread. Medians of the rounds, ranges of ratios.")


def _processes() -> int:
    return min(decoders.MOST, decoders.cores())


def _head(arguments: Arguments, repeats: int) -> str:
    return (
        f"{time.strftime('%Y-%m-%d')}, {arguments.images} JPEGs of {arguments.edge} pixels, used "
        f"at {arguments.size}, {loop.described('cpu', 1, repeats)}"
    )


class Tiny(nn.Module):
    """A network that costs next to nothing: what is measured is how its images come to it."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.head = nn.Linear(spec.shape[0] * 49, spec.classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, K)."""
        return self.head(F.adaptive_avg_pool2d(x, 7).flatten(1))


def trained(arguments: Arguments, place: Path) -> None:
    """Read the folder, train one epoch, evaluate; print the memory of this process after each."""
    torch.set_num_threads(1)
    told = {"at the start": _memory()}
    start = time.perf_counter()
    with _watched() as decoding:
        splits = read(place, arguments.size, 0)
    reading = time.perf_counter() - start
    told["listed and decoded"] = _memory()
    training = Training(epochs=1, batch_size=arguments.batch_size)
    run = Run(benchmark="folder", data="", model="own", method="none", training=training)
    start = time.perf_counter()
    fit(run, splits, methods.build("none"), model=Tiny)
    taken = time.perf_counter() - start
    told["trained on"] = _memory()
    print(_head(arguments, 1))
    body = [[name, *(f"{each[name]:,.0f}" for each in told.values())] for name in _memory()]
    print(tabulate(body, headers=["MiB", *told], disable_numparse=True))
    print(
        f"{arguments.images * 3 * arguments.size**2 / ondisk.GIB:.1f} GiB decoded in {reading:.0f} "
        f"s, trained on in {taken:.0f} s (a network of one layer); {len(decoding)} processes that "
        f"decode: {max(decoding.values(), default=0):.0f} MiB each"
    )


def _memory(process: str = "self") -> dict[str, float]:
    """MiB of a process (Linux)."""
    names = {"VmHWM": "peak resident", "RssAnon": "anonymous now", "RssFile": "of files now"}
    lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    found = {line.split(":")[0]: line.split() for line in lines}
    return {text: int(found[name][1]) / 1024 for name, text in names.items()}


@contextmanager
def _watched() -> Iterator[dict[str, float]]:
    """Peak MiB of each process that this one starts, looked at ten times a second."""
    found: dict[str, float] = {}
    over = threading.Event()
    listed = Path(f"/proc/self/task/{os.getpid()}/children")

    def look() -> None:
        while not over.wait(0.1):
            for process in listed.read_text(encoding="utf-8").split():
                with suppress(OSError, KeyError):  # it has ended
                    found[process] = _memory(process)["peak resident"]

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


def main(given: Sequence[str] | None = None) -> None:
    """Print a table."""
    arguments = tyro.cli(Arguments, description=__doc__, args=given)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="streaming-", dir=arguments.place) as folder:
        place = Path(folder)
        images(place / "set" / "train", arguments.images, arguments.edge)
        images(place / "set" / "test", CLASSES, arguments.edge)  # one row a class
        if not arguments.memory:
            compare(arguments, place)
            return
        # In a process of its own, so that writing does not count.
        own = multiprocessing.get_context("spawn").Process(target=trained, args=(arguments, place))
        own.start()
        own.join()
        if own.exitcode:
            raise SystemExit(own.exitcode)


if __name__ == "__main__":
    main()
