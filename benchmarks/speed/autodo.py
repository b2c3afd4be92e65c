"""Time of AutoDO's phases as a ratio to a plain step: python -m benchmarks.speed.autodo"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import NamedTuple

import torch
import tyro
from tabulate import tabulate

from benchmarks.data.splits import Splits
from benchmarks.speed.loop import (
    Loop,
    clock,
    described,
    random_splits,
)
from methods import build
from methods.autodo import AutoDO
from methods.base import Spec

STEPS = 12
"""Steps of one measurement, and outer steps of one phase."""
MILLION = 1_000_000


@dataclass
class Arguments:
    """Images of random pixels, 28x28x3; their content does not matter here."""

    model: str = "resnet18(width=0.25)"
    """network"""
    batch_size: int = 128
    """rows of an inner and of an outer step"""
    meta_batches: int = 3
    """meta rows, in batches: a quarter of the twelve batches of training rows"""
    repeats: int = 5
    """rounds, each of twelve steps of every row of the table"""
    threads: int = 1
    """CPU threads"""


class Way(NamedTuple):
    """A row of the table."""

    name: str
    arguments: str | None
    """AutoDO's; None for the plain step"""
    target: float | None = None
    """outer step as a ratio to a plain step"""


WAYS = [
    Way("plain", None),
    Way("published, A,W,S", "", 1.4),
    Way("exact, A,W,S", "preset=exact", 1.4),
    Way("published, W,S", "augment=false", 0.5),
    Way("exact, W,S", "augment=false, preset=exact", 0.5),
    Way("published, A shared", "shared=true, weight=false, label=false"),
]


class Steps(Loop):
    """The inner steps and outer phases of a row of the table."""

    def __init__(self, way: Way, splits: Splits, arguments: Arguments) -> None:
        text, rows = "none", arguments.batch_size
        if way.arguments is not None:
            given = [way.arguments, "start=1.0", f"outer_batch={rows}"]
            text = f"autodo({', '.join(filter(None, given))})"
        steps = STEPS * (arguments.repeats + 1)
        super().__init__(text, arguments.model, splits, rows=rows, steps=steps, epochs=4)

    def inner(self) -> float:
        """Charged seconds of the next steps."""
        self.ctx.forget()
        self.train(self.order[self.ctx.step : self.ctx.step + STEPS])
        return self.charged()

    def outer(self, features_alone: bool = False) -> float:
        """Charged seconds of an outer phase, or of the features of the meta rows in it."""
        self.ctx.forget()
        self.ctx.epoch = 1
        self.ctx.enter("begin_epoch")
        self.ctx.clock.switch("outer")
        if features_alone and isinstance(self.method, AutoDO):
            self.ctx.model.eval()
            self.method.meta_features(self.ctx.model, self.ctx)  # type: ignore[arg-type]
            self.ctx.model.train()
        elif not features_alone:
            self.method.begin_epoch(self.ctx)
        self.ctx.clock.switch("")
        return self.charged()


def memory() -> str:
    """MiB that the hyper-parameters of a million rows with ten classes take, with their state."""
    method = build("autodo")

    class Data:
        spec = Spec(MILLION, 10, (3, 28, 28))

        class train:
            targets = torch.zeros(MILLION, 10)

    method.setup(Data)  # type: ignore[arg-type]
    held = sum(each.numel() * each.element_size() for each in method.buffers())
    return (
        f"A,W,S of 1,000,000 rows, 10 classes, with the optimiser's state: {held / 2**20:.0f} MiB"
    )


def main() -> None:
    """Print the table."""
    arguments = tyro.cli(Arguments, description=__doc__)
    torch.set_num_threads(arguments.threads)
    batches = STEPS + arguments.meta_batches
    share = arguments.meta_batches / batches
    splits = random_splits(batches * arguments.batch_size, classes=10, meta_fraction=share)
    loops = {way: Steps(way, splits, arguments) for way in WAYS}
    for loop in loops.values():  # the first steps allocate
        loop.inner()
        loop.outer()
    times: dict[Way, list[tuple[float, float, float]]] = {way: [] for way in WAYS}
    for _ in range(arguments.repeats):
        for way, loop in loops.items():
            times[way].append((loop.inner(), loop.outer(), loop.outer(features_alone=True)))
    plain = [inner for inner, _, _ in times[WAYS[0]]]
    body = []
    for way, measured in times.items():
        inner, outer, reused = (
            statistics.median(one / base for one, base in zip(column, plain, strict=True))
            for column in (
                [each[0] for each in measured],
                [each[1] for each in measured],
                [each[1] - each[2] for each in measured],
            )
        )
        rests = way.arguments is None
        body.append(
            [
                way.name,
                f"{1000 * statistics.median(each[0] for each in measured) / STEPS:.0f}",
                f"{inner:.2f}",
                *(["", "", f"{inner:.2f}"] if rests else
                  [f"{outer:.2f}", f"{reused:.2f}", f"{inner + outer:.2f}"]),
                "" if way.target is None else f"{way.target:.2f}",
                "" if way.target is None else ("yes" if outer <= 1.1 * way.target else "no"),
            ]
        )  # fmt: skip
    print(
        f"{time.strftime('%Y-%m-%d')}, {arguments.model}, 28x28x3, batch {arguments.batch_size}, "
        f"{STEPS} batches of training and {arguments.meta_batches} of meta rows, Adam, "
        f"{described('cpu', arguments.threads, arguments.repeats)}"
    )
    headers = ["", "ms a step", "inner", "outer", "without meta", "epoch", "target", "within 10 %"]
    print(tabulate(body, headers=headers, colalign=("left", *["right"] * 7), disable_numparse=True))
    print(f"ms: {clock('cpu')} by the run's clock, of an inner step.")
    print("inner, outer: a step as a ratio to a plain step, the features of the meta rows, made")
    print("once a phase, included; without meta: without them; epoch: inner and outer phase.")
    print("target: of an outer step; 1.0 without meta for A,W,S, and 2.2 for an epoch, are others.")
    print(memory())


if __name__ == "__main__":
    main()
