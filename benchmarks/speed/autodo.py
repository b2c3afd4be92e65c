"""Time of AutoDO's phases as a ratio to a plain step: python -m benchmarks.speed.autodo"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import NamedTuple

import torch
import tyro

from benchmarks.data.splits import Splits
from benchmarks.speed import loop
from benchmarks.speed.loop import Loop
from methods import build
from methods.autodo import AutoDO
from methods.base import Spec

STEPS = 12
"""Inner steps per measurement, and outer steps per phase."""
MILLION = 1_000_000


@dataclass
class Arguments(loop.Arguments):
    """Images of random pixels, 28x28x3; their content does not matter here."""

    model: str = "resnet18(width=0.25)"
    """network"""
    batch_size: int = 128
    """rows of an inner and of an outer step"""
    meta_batches: int = 3
    """meta rows, in batches: a quarter of the twelve batches of training rows"""


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
            given = [way.arguments, "start=1", f"outer_batch={rows}"]
            text = f"autodo({', '.join(filter(None, given))})"
        steps = STEPS * (arguments.repeats + 1)
        super().__init__(
            text,
            arguments.model,
            splits,
            rows=rows,
            steps=steps,
            epochs=4,
            device=arguments.device,
        )

    def inner(self) -> float:
        """Charged seconds of the next steps."""
        self.ctx.forget()
        self.train(self.order[self.ctx.step : self.ctx.step + STEPS])
        return self.charged()

    def outer(self, features_alone: bool = False) -> float:
        """Charged seconds of an outer phase, or of the features of the meta rows in it."""
        self.ctx.forget()
        self.ctx.epoch = 1
        with self.ctx.charged("begin_epoch"):
            if features_alone and isinstance(self.method, AutoDO):
                self.ctx.model.eval()
                self.method.meta_features(self.ctx.model, self.ctx)  # type: ignore[arg-type]
                self.ctx.model.train()
            elif not features_alone:
                self.method.begin_epoch(self.ctx)
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
    rows = batches * arguments.batch_size
    splits = loop.random_splits(rows, classes=10, meta_fraction=share, device=arguments.device)
    loops = {way: Steps(way, splits, arguments) for way in WAYS}
    for each in loops.values():  # the first steps allocate
        each.inner()
        each.outer()
    times = loop.measured(
        loops,
        arguments.repeats,
        lambda each: (each.inner(), each.outer(), each.outer(features_alone=True)),
    )
    plain = [inner for inner, _, _ in times[WAYS[0]]]
    body = []
    for way, rounds in times.items():
        columns = (
            [inner for inner, _, _ in rounds],
            [outer for _, outer, _ in rounds],
            [outer - features for _, outer, features in rounds],
        )
        inner, outer, reused = (statistics.median(loop.ratios(column, plain)) for column in columns)
        phase = [f"{outer:.2f}", f"{reused:.2f}", f"{inner + outer:.2f}"]
        body.append(
            [
                way.name,
                loop.milliseconds(columns[0], STEPS),
                f"{inner:.2f}",
                *(["", "", f"{inner:.2f}"] if way.arguments is None else phase),
                *loop.against(outer, way.target),
            ]
        )
    what = f"{STEPS} batches of training and {arguments.meta_batches} of meta rows, Adam"
    loop.show(what, arguments, ["inner", "outer", "without meta", "epoch", *loop.AIM], body)
    print(f"ms: {loop.clock(arguments.device)} by the run's clock, of an inner step.")
    print("inner, outer: a step as a ratio to a plain step, including the features of the meta")
    print("rows, computed once per phase; without meta: without them; epoch: both phases.")
    print("target: of an outer step; other targets for A,W,S: 1.0 without meta, 2.2 per epoch.")
    print(memory())


if __name__ == "__main__":
    main()
