"""How long a training step takes on this machine, tried on random images for some seconds."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from statistics import median
from typing import NamedTuple

import torch

import methods
from analysis.runs import Run
from benchmarks.data.splits import Splits
from benchmarks.data.streams import Rows
from benchmarks.running.firstlook import CPU_BATCH, context_of
from benchmarks.training.trainer import threads, train_step
from methods.base import Input
from methods.learner import learner_of

SECONDS = 10.0
"""For all settings together; a step that has begun is finished."""
STEPS = 20
"""More are not needed where they are short."""


class Setting(NamedTuple):
    """What decides the time of a step without a method."""

    model: str
    shape: tuple[int, ...]
    """(C, H, W), or (D,) of a table"""
    batch_size: int
    precision: str
    channels_last: bool
    threads: int
    inputs: tuple[Input, ...] = ()
    """of a table, what a row is"""

    @classmethod
    def of(cls, run: Run, shape: tuple[int, ...], inputs: tuple[Input, ...] = ()) -> Setting:
        """That of a run on images (C, H, W), or on the rows of a table."""
        training = run.training
        return cls(
            run.model,
            shape,
            training.batch_size,
            training.precision,
            training.channels_last,
            run.threads,
            inputs,
        )


def seconds(wanted: Mapping[Setting, tuple[Run, int]], device: str) -> dict[Setting, float]:
    """Seconds of a plain step for each image, of settings with a run and a number of classes.

    Data are not needed, and nothing is written. A setting is left out where the time is over, or
    where its network raises.
    """
    found: dict[Setting, float] = {}
    begun = time.perf_counter()
    for place, (setting, (run, classes)) in enumerate(wanted.items()):
        left = SECONDS - (time.perf_counter() - begun)
        if left <= 0:
            break
        # rows of a table are small, and a step is mostly what does not depend on their number
        small = device == "cpu" and not setting.inputs
        size = min(run.training.batch_size, CPU_BATCH if small else 10**9)
        try:
            with threads(run.threads):
                made = rows_like(size, setting.shape, classes, torch.device(device), setting.inputs)
                steps = _steps(run, made, left / (len(wanted) - place))
        except (Exception, SystemExit):  # a network of the user's own may fail in any way
            continue
        found[setting] = median(steps) / size
    return found


class Plain:
    """Plain steps of a run, all on the same rows."""

    batches = 8

    def __init__(self, run: Run, made: Splits) -> None:
        self.rows, self._made = len(made.train), made
        plain = methods.build("none")
        self._learner, self._ctx = learner_of(plain), context_of(plain, made, run)
        self._index = torch.arange(self.rows)

    def step(self) -> None:
        """Take one."""
        train_step(self._learner, self._ctx, self._made.train, self._index)
        self._ctx.step += 1

    def epoch(self) -> None:
        """Take some."""
        for _ in range(self.batches):
            self.step()

    def phases(self) -> dict[str, float]:
        """Charged seconds by phase since the last call; waits for the device."""
        return self._ctx.clock.take()


def rows_like(
    size: int,
    shape: tuple[int, ...],
    classes: int,
    device: torch.device,
    inputs: tuple[Input, ...] = (),
) -> Splits:
    """A batch of random images with random labels, or rows of a table, as splits."""
    if inputs:
        levels = torch.tensor(inputs[0].categories or [0] * shape[0])
        codes = (torch.rand(size, *shape) * levels).floor()
        x = torch.where(levels > 0, codes, torch.randn(size, *shape)).to(device)
    else:
        x = torch.randint(256, (size, *shape), dtype=torch.uint8, device=device)
    targets = torch.eye(classes, device=device)[torch.randint(classes, (size,), device=device)]
    rows = Rows(x, torch.arange(size, device=device), targets, shape[0])
    return Splits(
        train=rows,
        meta=None,
        select=rows,
        test=rows,
        kind="multi-class",
        classes=tuple(map(str, range(classes))),
        pool=size,
        inputs=inputs,
    )


def _steps(run: Run, made: Splits, limit: float) -> Sequence[float]:
    """Seconds of each step, the first left out where there are others."""
    begun = time.perf_counter()
    plain = Plain(run, made)
    found: list[float] = []
    while len(found) <= STEPS and (not found or time.perf_counter() - begun < limit):
        plain.step()
        found.append(sum(plain.phases().values()))
    return found[1:] or found
