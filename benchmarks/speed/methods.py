"""Time, passes and memory of a step under every method: python -m benchmarks.speed.methods"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import tyro
from tqdm import tqdm

import methods
from analysis import runs
from benchmarks.data.splits import NotApplicable, Splits
from benchmarks.running.together import Together
from benchmarks.speed import loop
from benchmarks.speed.loop import Loop

EPOCHS = 100
"""Of a run; the one in its middle is measured, after what warms up first."""
PATIENCE = 600.0
"""Seconds for the two epochs of a process whose memory is measured."""


@dataclass
class Arguments(loop.Arguments):
    """Images of random pixels, 28x28x3; their content does not matter here."""

    model: str = "resnet18(width=0.25)"
    """network"""
    batch_size: int = 128
    """rows per step"""
    steps: int = 8
    """steps of an epoch; a quarter as many batches hold the meta rows"""
    methods: list[str] = field(default_factory=list)
    """methods to measure; all if none is given"""
    json: Path | None = None
    """file to write as well"""


class Steps(Loop):
    """Epochs under one method: its own phase, then every step."""

    def __init__(self, arguments: Arguments, method: str, device: str) -> None:
        self.rows, self.batches = arguments.batch_size, arguments.steps
        super().__init__(
            method,
            arguments.model,
            random_rows(arguments, device),
            rows=self.rows,
            steps=self.batches,
            epochs=EPOCHS,
            device=device,
        )
        self.trained = 0

    def epoch(self) -> None:
        """The same epoch again."""
        self.ctx.forget()
        self.ctx.epoch = EPOCHS // 2
        self.ctx.step = self.ctx.epoch * self.batches
        with self.ctx.charged("begin_epoch"):
            self.method.begin_epoch(self.ctx)
        self.trained = self.train(self.order)

    def phases(self) -> dict[str, float]:
        """Charged seconds by phase since the last call."""
        return self.ctx.clock.take()

    def cycle(self) -> float:
        """Charged seconds of an epoch."""
        self.epoch()
        return self.charged()


def random_rows(arguments: Arguments, device: str) -> Splits:
    """As many training rows as an epoch takes, and a quarter as many meta rows."""
    count = round(1.25 * arguments.steps) * arguments.batch_size
    share = 1 - arguments.steps * arguments.batch_size / count
    return loop.random_splits(count, classes=2, meta_fraction=share, device=device)


class Cost(NamedTuple):
    """What a step under a method takes."""

    method: str
    milliseconds: float
    ratio: float
    """to the plain step of the same round; the median"""
    lowest: float
    highest: float
    forward: float
    """passes per drawn row"""
    backward: float
    """passes per drawn row, to the images or to a direction in the weights"""
    trained: float
    """rows trained on per drawn row"""
    more_mib: float
    """peak memory of a process above that of the plain steps"""
    declared: float
    """the ratio that the method's class declares"""


def timed(arguments: Arguments, names: Sequence[str]) -> tuple[list[Cost], list[str]]:
    """The costs of these methods without their memory, and why others have none."""
    loops: dict[str, Steps] = {}
    left_out = []
    for name in names:
        try:
            loops[name] = Steps(arguments, name, arguments.device)
        except NotApplicable as reason:
            left_out.append(f"{name}: {reason}")
    passes = {}
    for name, each in tqdm(loops.items(), desc="first epochs", disable=None):
        each.cycle()  # the first steps allocate
        each.ctx.counter.take()
        each.cycle()
        drawn = sum(map(len, each.order))
        passes[name] = [count / drawn for count in (*each.ctx.counter.take(), each.trained)]
    bar = tqdm(total=arguments.repeats * len(loops), desc="measured", disable=None)

    def measure(one: Steps) -> float:
        bar.update()
        return one.cycle()

    seconds = loop.measured(loops, arguments.repeats, measure)
    found = []
    for name, taken in seconds.items():
        ratios = loop.ratios(taken, seconds["none"])
        step = 1000 * statistics.median(taken) / arguments.steps
        found.append(
            Cost(
                name,
                step,
                statistics.median(ratios),
                min(ratios),
                max(ratios),
                *passes[name],
                more_mib=0.0,
                declared=methods.cost(name),
            )
        )
    return found, left_out


def with_memory(arguments: Arguments, costs: Sequence[Cost]) -> list[Cost]:
    """The same with the peak memory of a process of its own for each method."""
    peaks = []
    for each in tqdm(costs, desc="memory", disable=None):
        crowd = Together(arguments.device, loaded=["benchmarks.speed.loop"])
        try:
            make = partial(Steps, arguments, each.method)
            (rate,) = crowd.rates(make, 1, 0.0, time.monotonic() + PATIENCE)
            peaks.append(rate.memory_mib)
        finally:
            crowd.close()
    plain = peaks[[each.method for each in costs].index("none")]
    return [each._replace(more_mib=peak - plain) for each, peak in zip(costs, peaks, strict=True)]


def main(given: Sequence[str] | None = None) -> None:
    """Measure, print the table, write the file."""
    arguments = tyro.cli(Arguments, description=__doc__, args=given)
    torch.set_num_threads(arguments.threads)
    names = [methods.canonical(name) for name in arguments.methods] or loop.every_method()
    costs, left_out = timed(arguments, list(dict.fromkeys(["none", *names])))
    costs = with_memory(arguments, costs)
    body = [
        [
            each.method,
            f"{each.milliseconds:.0f}",
            f"{each.ratio:.2f}",
            f"{each.lowest:.2f}-{each.highest:.2f}",
            *(f"{value:.2f}" for value in (each.forward, each.backward, each.trained)),
            f"{each.more_mib:+.0f}",
            f"{each.declared:.1f}",
        ]
        for each in costs
    ]
    headers = ["ratio", "from-to", "forward", "backward", "trained", "MiB", "declared"]
    loop.show("Adam", arguments, headers, body)
    print(f"ms: {loop.clock(arguments.device)} by the run's clock (it stops during the audit).")
    print(
        f"An epoch of {arguments.steps} steps in the middle of a run, and the method's own phase.\n"
        "forward, backward: passes per drawn row; trained: rows trained on per drawn row.\n"
        "MiB: peak memory of the process above that of plain steps. declared: the class's costs."
    )
    for reason in left_out:
        print(f"not measured: {reason}")
    if arguments.json is not None:
        lines = [each._asdict() for each in costs]
        runs.write_text(arguments.json, runs.to_json({"costs": lines}) + "\n")


if __name__ == "__main__":
    main()
