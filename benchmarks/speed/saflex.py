"""Time of a SAFLEX step as a ratio to a plain step: python -m benchmarks.speed.saflex"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import tyro
from tabulate import tabulate
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.data.splits import Splits
from benchmarks.speed.loop import (
    Loop,
    clock,
    described,
    random_splits,
)
from methods.saflex import Saflex

CYCLE = 4
"""Steps of one measurement: as many as the presets keep a meta gradient."""
PLAIN = "plain"
PAPER = (
    "paper: 1.42 on average, 1.54 over RandAugment, 1.31 over mixup "
    "(wall clock, V100; Ding et al. 2024, appendix)"
)


@dataclass
class Arguments:
    """Images of random pixels, 28x28x3; their content does not matter here."""

    model: str = "resnet18"
    """network"""
    upstream: str = "none"
    """what augments the rows, with and without SAFLEX"""
    batch_size: int = 64
    """rows a step (B)"""
    repeats: int = 5
    """rounds, each of four steps of every row of the table"""
    threads: int = 1
    """CPU threads"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where network and rows are"""


class Way(NamedTuple):
    """A row of the table."""

    name: str
    arguments: str | None = None
    """SAFLEX's; None for the upstream alone"""
    target: float | None = None
    """ratio to the plain step"""
    batches: int = 1
    """rows a step, in batches"""


WAYS = [
    Way(PLAIN),
    Way("plain, twice the rows", batches=2),
    Way("published: dual, meta B, fresh", "", 3.1),
    Way("difference, meta B, fresh", "derivative=difference", 2.3),
    Way("difference, meta B/4, fresh", "derivative=difference, meta_batch=0.25", 1.65),
    Way("stable: difference, meta 2B, refresh 4", "preset=stable", 2.05),
    Way("stable, meta B, refresh 4", "meta_batch=1, preset=stable", 1.75),
    Way("fast: stable on the last stage", "preset=fast", 1.4),
]


class Steps(Loop):
    """The steps of a row of the table."""

    def __init__(self, way: Way, splits: Splits, arguments: Arguments, steps: int) -> None:
        text = arguments.upstream
        if way.arguments is not None:
            text = ", ".join(filter(None, [f"upstream={arguments.upstream}", way.arguments]))
            text = f"saflex({text})"
        rows = way.batches * arguments.batch_size
        super().__init__(
            text, arguments.model, splits, rows=rows, steps=steps, device=arguments.device
        )
        self.begin_epoch()

    def cycle(self) -> float:
        """Charged seconds of the next four steps."""
        self.ctx.forget()
        self.train(self.order[self.ctx.step : self.ctx.step + CYCLE])
        return self.charged()

    def count(self) -> tuple[int, int, int]:
        """Rows forward and backward and floating-point operations in the next four steps."""
        with FlopCounterMode(display=False) as operations:
            self.cycle()
        return *self.ctx.counter.take(), operations.get_total_flops()

    @property
    def partial(self) -> bool:
        """Whether it runs a part of the network alone, which the hooks at the trunk cannot see."""
        return isinstance(self.method, Saflex) and self.method.stages is not None


def main() -> None:
    """Print the table."""
    arguments = tyro.cli(Arguments, description=__doc__)
    torch.set_num_threads(arguments.threads)
    rows = 32 * arguments.batch_size
    splits = random_splits(rows, classes=2, meta_fraction=0.25, device=arguments.device)
    steps = CYCLE * (arguments.repeats + 2)
    loops = {way: Steps(way, splits, arguments, steps) for way in WAYS}
    counts = {}
    for way, loop in loops.items():
        loop.cycle()  # the first steps allocate, and the first one holds an audit
        counts[way] = loop.count()
    seconds: dict[Way, list[float]] = {way: [] for way in WAYS}
    for _ in range(arguments.repeats):
        for way, loop in loops.items():
            seconds[way].append(loop.cycle())
    plain = WAYS[0]
    body = []
    for way, loop in loops.items():
        forward, backward, operations = counts[way]
        passes = [rows / (CYCLE * arguments.batch_size) for rows in (forward, backward)]
        ratios = [one / other for one, other in zip(seconds[way], seconds[plain], strict=True)]
        ratio = statistics.median(ratios)
        body.append(
            [
                way.name,
                f"{1000 * statistics.median(seconds[way]) / CYCLE:.0f}",
                f"{ratio:.2f}",
                f"{min(ratios):.2f}-{max(ratios):.2f}",
                *(f"{each:.2f}" for each in passes),
                "" if loop.partial else f"{(passes[0] + 2 * passes[1]) / 3:.2f}",
                f"{operations / counts[plain][2]:.2f}",
                "" if way.target is None else f"{way.target:.2f}",
                "" if way.target is None else ("yes" if ratio <= 1.1 * way.target else "no"),
            ]
        )
    print(
        f"{time.strftime('%Y-%m-%d')}, {arguments.model}, upstream {arguments.upstream}, 28x28x3, "
        f"batch {arguments.batch_size} (B), Adam, "
        f"{described(arguments.device, arguments.threads, arguments.repeats)}"
    )
    headers = ["", "ms a step", "ratio", "from-to", "forward", "backward", "bound", "FLOPs"]
    headers += ["target", "within 10 %"]
    numbers = ("left", *["right"] * 9)
    print(tabulate(body, headers=headers, colalign=numbers, disable_numparse=True))
    print(
        f"ms: {clock(arguments.device)} by the run's clock (it stands still in the audit), "
        f"of {CYCLE} steps each."
    )
    print(
        "forward, backward: passes for each row of the plain step, a tangent counted as backward; "
        "bound: (forward + 2 backward) / 3."
    )
    print(
        "fast: a backward pass that ends early counts as whole and a pass of the last stage alone "
        "as none, so its bound is that of the operations (FLOPs, as a ratio)."
    )
    print(PAPER)


if __name__ == "__main__":
    main()
