"""A method's steps as in the trainer, timed in turn, for the scripts that compare them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from tabulate import tabulate

import methods
from analysis.runs import Training
from benchmarks.data.seeding import seed_global
from benchmarks.data.splits import Splits
from benchmarks.data.streams import training_order
from benchmarks.training import models
from benchmarks.training.checks import check_fits
from benchmarks.training.context import TrainingContext
from benchmarks.training.machine import describe_device
from benchmarks.training.schedule import make_optimizer
from benchmarks.training.tasks import task_of
from benchmarks.training.trainer import train_step
from methods import build, canonical
from methods.learner import learner_of

Key = TypeVar("Key")
Timed = TypeVar("Timed", bound="Loop")
Measure = TypeVar("Measure")


@dataclass
class Arguments:
    """Images of random pixels, 28x28x3; their content does not matter here."""

    model: str = "resnet18"
    """network"""
    batch_size: int = 64
    """rows per step"""
    repeats: int = 5
    """rounds, each of some steps of every row of the table"""
    threads: int = 1
    """CPU threads"""
    device: Literal["cpu", "cuda"] = "cpu"
    """device of the network and the rows"""


class Loop:
    """The trainer's steps under one method, with their own network, optimiser and order.

    ``rows`` is the size of a batch, ``steps`` the number of batches in ``order``, ``training``
    further fields of a run's training, such as its precision; channels_last as in the presets.
    """

    def __init__(
        self,
        method: str,
        model: str,
        splits: Splits,
        *,
        rows: int,
        steps: int,
        epochs: int = 1,
        device: str = "cpu",
        **training: Any,
    ) -> None:
        self.method, self.name = build(method), canonical(method)
        if "unlabelled" in self.method.requires():
            blind = replace(splits.train, y=torch.zeros_like(splits.train.y))
            splits = replace(splits, unlabelled=blind)
        if "generated" in self.method.requires():
            splits = replace(splits, generated=splits.train)
        self.splits = splits
        self.order = training_order(len(splits.train), (), rows, steps, 0, 0, "train")
        place = torch.device(device)
        seed_global(place, 0, "init")
        network = models.build(model, splits.spec, self.method.requires()).to(place)
        check_fits(self.name, self.method, splits, network, model)
        asked = Training(**{"channels_last": True, **training}, epochs=epochs, batch_size=rows)
        if asked.channels_last:
            network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.ctx = TrainingContext.of_splits(
            network,
            make_optimizer(network, asked),
            task_of(splits.kind),
            splits,
            epochs=epochs,
            seed=0,
            training=asked,
        )
        self.method.to(place)
        self.learner = learner_of(self.method)
        self.ctx.enter("setup")
        self.method.setup(self.ctx)
        network.train()

    def begin_epoch(self) -> None:
        """What the method does before an epoch."""
        self.ctx.enter("begin_epoch")
        self.method.begin_epoch(self.ctx)

    def train(self, batches: Iterable[torch.Tensor]) -> int:
        """Take a step for each of these batches of indices; return the rows trained on."""
        trained = 0
        for index in batches:
            _, out = train_step(self.learner, self.ctx, self.splits.train, index)
            trained += len(out)
            self.ctx.step += 1
        return trained

    def charged(self) -> float:
        """Charged seconds since the last call: the clock stops during the audit."""
        return sum(self.ctx.clock.take().values())


def measured(
    loops: Mapping[Key, Timed], repeats: int, measure: Callable[[Timed], Measure]
) -> dict[Key, list[Measure]]:
    """The results of ``measure`` for each loop, in turn, round by round."""
    found: dict[Key, list[Measure]] = {key: [] for key in loops}
    for _ in range(repeats):
        for key, loop in loops.items():
            found[key].append(measure(loop))
    return found


def ratios(seconds: Sequence[float], plain: Sequence[float]) -> list[float]:
    """Ratios to the plain step of the same round."""
    return [one / other for one, other in zip(seconds, plain, strict=True)]


def spread(found: Sequence[float]) -> list[str]:
    """Two columns: the median, and the range."""
    return [f"{statistics.median(found):.2f}", f"{min(found):.2f}-{max(found):.2f}"]


def milliseconds(seconds: Sequence[float], steps: int) -> str:
    """The median milliseconds of a step."""
    return f"{1000 * statistics.median(seconds) / steps:.0f}"


AIM = ("target", "within 10 %")
"""Headers of the columns of ``against``."""


def against(ratio: float, target: float | None) -> list[str]:
    """Two columns: the target, and whether the ratio is within a tenth of it."""
    if target is None:
        return ["", ""]
    return [f"{target:.2f}", "yes" if ratio <= 1.1 * target else "no"]


def show(what: str, arguments: Arguments, headers: Sequence[str], body: list[list[str]]) -> None:
    """Print a table under the date, the setting and the machine."""
    print(
        f"{time.strftime('%Y-%m-%d')}, {arguments.model}, 28x28x3, batch {arguments.batch_size}, "
        f"{what}, {described(arguments.device, arguments.threads, arguments.repeats)}"
    )
    columns = ["", "ms / step", *headers]
    numbers = ("left", *["right"] * (len(columns) - 1))
    print(tabulate(body, headers=columns, colalign=numbers, disable_numparse=True))


def random_splits(train: int, *, classes: int, meta_fraction: float, device: str = "cpu") -> Splits:
    """Splits of random 28x28x3 images, with ``train`` labelled rows, meta rows among them."""
    rng = np.random.default_rng(0)
    drawn = [
        (rng.integers(0, 256, (rows, 28, 28, 3), dtype=np.uint8), np.arange(rows) % classes)
        for rows in (train, 32, 32)
    ]
    return Splits.from_arrays(*drawn, meta_fraction=meta_fraction, device=device)


def described(device: str, threads: int, repeats: int) -> str:
    """The machine and the number of rounds, for the head of a table."""
    return (
        f"{threads} thread(s), {describe_device(torch.device(device))['name']}, torch "
        f"{torch.__version__}, n = {repeats}, medians"
    )


def clock(device: str) -> str:
    """What the run's clock counts on a device."""
    return "CPU seconds of the process" if device == "cpu" else "events"


def every_method() -> list[str]:
    """The plain step, then learned methods with their presets, all others, and their controls.

    A control stands once, on the first method that names it.
    """
    learned, others, controls = [], [], {}
    for name in methods.BUILTIN:
        kind = methods.declared(name)
        if name in ("none", "wrap") or (kind is not None and kind.control):
            continue
        found = methods.summary(name).presets
        texts = [name, *(f"{name}(preset={preset})" for preset in found[1:])]
        (learned if found else others).extend(texts)
    for text in (*learned, *others):
        for control in methods.controls_of(text):
            controls.setdefault(control.partition("(")[0], control)
    first = ["none", "randaugment"]
    rest = (each for each in others if each not in first)
    return [*first, *learned, *rest, *controls.values()]
