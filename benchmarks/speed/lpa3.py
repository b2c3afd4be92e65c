"""Time of a step under LP-A3 as a ratio to a plain one: python -m benchmarks.speed.lpa3"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import tyro
from tabulate import tabulate

from benchmarks import models
from benchmarks.context import TrainingContext
from benchmarks.data import Splits, training_order
from benchmarks.machine import describe_device
from benchmarks.runs import Training
from benchmarks.seeding import seed_global
from benchmarks.speed.saflex import splits_of
from benchmarks.tasks import task_of
from benchmarks.trainer import _step, check_fits, make_optimizer
from methods import build, canonical

CODE = "released code, supervised script: 9.0 by its passes, every row attacked"


@dataclass
class Arguments:
    """Images of random pixels, 28x28x3; their content does not matter here."""

    model: str = "resnet18"
    """network"""
    batch_size: int = 64
    """rows a step"""
    repeats: int = 5
    """rounds, each of some steps of every row of the table"""
    steps: int = 1
    """steps of an epoch"""
    threads: int = 1
    """CPU threads"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where network and rows are"""


class Way(NamedTuple):
    """A row of the table."""

    name: str
    arguments: str | None = None
    """LP-A3's; None for the plain step"""
    target: float | None = None
    """ratio to the plain step"""
    rows: float = 1
    """rows a step, in batches"""
    epochs: int = 1
    """epochs of one measurement, each over the same rows"""


WAYS = [
    Way("plain"),
    Way("plain, 1.5 times the rows", rows=1.5),
    Way("ratio 0", "ratio=0.0", 1.0),
    Way("published, ratio 1", "ratio=1.0", 8.0),
    Way("published, ratio 0.5", ""),
    Way("strict, ratio 1", "preset=strict, ratio=1.0"),
    Way("strict, ratio 0.5", "preset=strict", 3.6),
    Way("fast, ratio 0.5", "preset=fast", 2.7),
    Way("fast, ratio 0.5, refresh 2", "preset=fast, refresh=2", 2.7, epochs=2),
    Way("published, ratio 0.5, auxiliary norm", "auxiliary_norm=true"),
]


class Loop:
    """The trainer's own steps under one method, with network, optimiser and order of their own."""

    def __init__(self, way: Way, splits: Splits, arguments: Arguments) -> None:
        text = "none"
        if way.arguments is not None:
            text = f"lpa3({', '.join(filter(None, [way.arguments, 'warmup=0']))})"
        self.method, self.name, self.way = build(text), canonical(text), way
        self.splits, self.trained = splits, 0
        device, rows = torch.device(arguments.device), round(way.rows * arguments.batch_size)
        self.order = training_order(len(splits.train), (), rows, arguments.steps, 0, 0, "train")
        seed_global(device, 0, "init")
        network = models.build(arguments.model, splits.spec, self.method.requires()).to(device)
        check_fits(self.name, self.method, splits, network, arguments.model)
        training = Training(epochs=1, batch_size=rows, optimizer="adam")
        self.ctx = TrainingContext.of_splits(
            network,
            make_optimizer(network, training),
            task_of(splits.kind),
            splits,
            epochs=1,
            seed=0,
            training=training,
        )
        self.method.to(device)
        self.ctx.enter("setup")
        self.method.setup(self.ctx)
        network.train()
        self.ctx.enter("begin_epoch")
        self.method.begin_epoch(self.ctx)

    def cycle(self) -> float:
        """Charged seconds of the next epochs: the clock stands still in the audit."""
        self.ctx.forget()
        self.trained = 0
        for _ in range(self.way.epochs):
            for index in self.order:
                _, out = _step(self.method, self.ctx, self.splits.train, index, self.name)
                self.trained += len(out.x)
                self.ctx.step += 1
            self.ctx.epoch += 1
        return sum(self.ctx.clock.take().values())

    def count(self) -> tuple[int, int, int]:
        """Rows forward, backward and trained on in the next epochs."""
        self.cycle()
        return *self.ctx.counter.take(), self.trained


def main() -> None:
    """Print the table."""
    arguments = tyro.cli(Arguments, description=__doc__)
    torch.set_num_threads(arguments.threads)
    splits = splits_of(arguments.batch_size, arguments.device)
    loops = {way: Loop(way, splits, arguments) for way in WAYS}
    counts = {}
    for way, loop in loops.items():
        loop.cycle()  # the first steps allocate, and hold an audit
        counts[way] = loop.count()
    seconds: dict[Way, list[float]] = {way: [] for way in WAYS}
    for _ in range(arguments.repeats):
        for way, loop in loops.items():
            seconds[way].append(loop.cycle())
    plain, body = WAYS[0], []
    for way, counted in counts.items():
        steps = way.epochs * arguments.steps
        passes = [rows / (steps * arguments.batch_size) for rows in counted]
        pairs = zip(seconds[way], seconds[plain], strict=True)
        ratios = [one / (way.epochs * other) for one, other in pairs]
        ratio = statistics.median(ratios)
        body.append(
            [
                way.name,
                f"{1000 * statistics.median(seconds[way]) / steps:.0f}",
                f"{ratio:.2f}",
                f"{min(ratios):.2f}-{max(ratios):.2f}",
                *(f"{each:.2f}" for each in passes),
                f"{sum(passes) / 3:.2f}",
                "" if way.target is None else f"{way.target:.2f}",
                "" if way.target is None else ("yes" if ratio <= 1.1 * way.target else "no"),
            ]
        )
    device = torch.device(arguments.device)
    clock = "events" if device.type == "cuda" else "CPU seconds of the process"
    print(
        f"{time.strftime('%Y-%m-%d')}, {arguments.model}, 28x28x3, batch {arguments.batch_size}, "
        f"Adam, {arguments.threads} thread(s), {describe_device(device)['name']}, torch "
        f"{torch.__version__}, n = {arguments.repeats}, medians"
    )
    headers = ["", "ms a step", "ratio", "from-to", "forward", "backward", "trained"]
    headers += ["bound", "target", "within 10 %"]
    print(tabulate(body, headers=headers, colalign=("left", *["right"] * 9), disable_numparse=True))
    print(f"ms: {clock} by the run's clock (it stands still in the audit).")
    print(
        "forward, backward: passes for each row drawn; trained: rows whose backward pass goes to\n"
        "the weights too, a pass more; bound: their sum over that of the plain step, which is 3.\n"
        "refresh: the mean of an epoch that attacks anew and one that goes on from it."
    )
    print(CODE)


if __name__ == "__main__":
    main()
