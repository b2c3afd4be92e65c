"""Time of a step under LP-A3 as a ratio to a plain one: python -m benchmarks.speed.lpa3"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import NamedTuple

import torch
import tyro

from benchmarks.data.splits import Splits
from benchmarks.speed import loop
from benchmarks.speed.loop import Loop

CODE = "released code, supervised script: 9.0 by its passes, every row attacked"


@dataclass
class Arguments(loop.Arguments):
    """Images of random pixels, 28x28x3; their content does not matter here."""

    steps: int = 1
    """steps of an epoch"""


class Way(NamedTuple):
    """A row of the table."""

    name: str
    arguments: str | None = None
    """LP-A3's; None for the plain step"""
    target: float | None = None
    """ratio to the plain step"""
    rows: float = 1
    """rows per step, in batches"""
    epochs: int = 1
    """epochs of one measurement, each over the same rows"""


WAYS = [
    Way("plain"),
    Way("plain, 1.5 times the rows", rows=1.5),
    Way("ratio 0", "ratio=0.0", 1.0),
    Way("paper, ratio 1", "ratio=1.0", 8.0),
    Way("paper, ratio 0.5", ""),
    Way("strict, ratio 1", "preset=strict, ratio=1.0"),
    Way("strict, ratio 0.5", "preset=strict", 3.6),
    Way("fast, ratio 0.5", "preset=fast", 2.7),
    Way("fast, ratio 0.5, refresh 2", "preset=fast, refresh=2", 2.7, epochs=2),
    Way("code, ratio 0.5", "preset=code"),
]


class Steps(Loop):
    """The steps of a row of the table."""

    def __init__(self, way: Way, splits: Splits, arguments: Arguments) -> None:
        text = "none"
        if way.arguments is not None:
            text = f"lpa3({', '.join(filter(None, [way.arguments, 'warmup=0']))})"
        super().__init__(
            text,
            arguments.model,
            splits,
            rows=round(way.rows * arguments.batch_size),
            steps=arguments.steps,
            device=arguments.device,
        )
        self.epochs, self.trained = way.epochs, 0
        self.begin_epoch()

    def cycle(self) -> float:
        """Charged seconds of the next epochs."""
        self.ctx.forget()
        self.trained = 0
        for _ in range(self.epochs):
            self.trained += self.train(self.order)
            self.ctx.epoch += 1
        return self.charged()

    def count(self) -> tuple[int, int, int]:
        """Rows forward, backward and trained on in the next epochs."""
        self.cycle()
        return *self.ctx.counter.take(), self.trained


def main() -> None:
    """Print the table."""
    arguments = tyro.cli(Arguments, description=__doc__)
    torch.set_num_threads(arguments.threads)
    rows = 32 * arguments.batch_size
    splits = loop.random_splits(rows, classes=2, meta_fraction=0.25, device=arguments.device)
    loops = {way: Steps(way, splits, arguments) for way in WAYS}
    counts = {}
    for way, each in loops.items():
        each.cycle()  # the first steps allocate, and hold an audit
        counts[way] = each.count()
    seconds = loop.measured(loops, arguments.repeats, Steps.cycle)
    plain, body = WAYS[0], []
    for way, counted in counts.items():
        steps = way.epochs * arguments.steps
        passes = [rows / (steps * arguments.batch_size) for rows in counted]
        ratios = loop.ratios(seconds[way], [way.epochs * each for each in seconds[plain]])
        body.append(
            [
                way.name,
                loop.milliseconds(seconds[way], steps),
                *loop.spread(ratios),
                *(f"{each:.2f}" for each in passes),
                f"{sum(passes) / 3:.2f}",
                *loop.against(statistics.median(ratios), way.target),
            ]
        )
    headers = ["ratio", "from-to", "forward", "backward", "trained", "bound", *loop.AIM]
    loop.show("Adam", arguments, headers, body)
    print(f"ms: {loop.clock(arguments.device)} by the run's clock (it stops during the audit).")
    print(
        "forward, backward: passes per drawn row; trained: rows whose backward pass also reaches\n"
        "the weights, one more pass; bound: their sum divided by that of the plain step, 3.\n"
        "refresh: the mean of an epoch with new attacks and one that reuses them."
    )
    print(CODE)


if __name__ == "__main__":
    main()
