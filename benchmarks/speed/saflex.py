"""Time of a SAFLEX step as a ratio to a plain step: python -m benchmarks.speed.saflex"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import NamedTuple

import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.data.splits import Splits
from benchmarks.speed import loop
from benchmarks.speed.loop import Loop
from methods.saflex import Saflex

CYCLE = 4
"""Steps per measurement: as many as the presets reuse a meta gradient for."""
PLAIN = "plain"
PAPER = (
    "paper: 1.42 on average, 1.54 over RandAugment, 1.31 over mixup "
    "(wall clock, V100; Ding et al. 2024, appendix)"
)


@dataclass
class Arguments(loop.Arguments):
    """Images of random pixels, 28x28x3; their content does not matter here."""

    upstream: str = "none"
    """what augments the rows, with and without SAFLEX"""


class Way(NamedTuple):
    """A row of the table."""

    name: str
    arguments: str | None = None
    """SAFLEX's; None for the upstream alone"""
    target: float | None = None
    """ratio to the plain step"""
    batches: int = 1
    """rows per step, in batches"""


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
        """Whether it runs only a part of the network, which the hooks at the trunk cannot see."""
        return isinstance(self.method, Saflex) and self.method.stages is not None


def main() -> None:
    """Print the table."""
    arguments = tyro.cli(Arguments, description=__doc__)
    torch.set_num_threads(arguments.threads)
    rows = 32 * arguments.batch_size
    splits = loop.random_splits(rows, classes=2, meta_fraction=0.25, device=arguments.device)
    steps = CYCLE * (arguments.repeats + 2)
    loops = {way: Steps(way, splits, arguments, steps) for way in WAYS}
    counts = {}
    for way, each in loops.items():
        each.cycle()  # the first steps allocate, and the first one holds an audit
        counts[way] = each.count()
    seconds = loop.measured(loops, arguments.repeats, Steps.cycle)
    plain, body = WAYS[0], []
    for way, each in loops.items():
        forward, backward, operations = counts[way]
        passes = [rows / (CYCLE * arguments.batch_size) for rows in (forward, backward)]
        ratios = loop.ratios(seconds[way], seconds[plain])
        body.append(
            [
                way.name,
                loop.milliseconds(seconds[way], CYCLE),
                *loop.spread(ratios),
                *(f"{each:.2f}" for each in passes),
                "" if each.partial else f"{(passes[0] + 2 * passes[1]) / 3:.2f}",
                f"{operations / counts[plain][2]:.2f}",
                *loop.against(statistics.median(ratios), way.target),
            ]
        )
    headers = ["ratio", "from-to", "forward", "backward", "bound", "FLOPs", *loop.AIM]
    loop.show(f"upstream {arguments.upstream}, Adam", arguments, headers, body)
    print(
        f"ms: {loop.clock(arguments.device)} by the run's clock (it stops during the audit), "
        f"of {CYCLE} steps each."
    )
    print(
        "B: rows of a batch; forward, backward: passes per row of the plain step, a tangent "
        "counted as backward; bound: (forward + 2 backward) / 3."
    )
    print(
        "fast: a backward pass that ends early counts as a full pass, and a pass of only the last "
        "stage as none, so its bound is that of the operations (FLOPs, as a ratio)."
    )
    print(PAPER)


if __name__ == "__main__":
    main()
