"""A method's steps as the trainer makes them, for the scripts that time them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

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


class Loop:
    """The trainer's own steps under one method, with network, optimiser and order of their own.

    ``rows`` is the size of a batch, ``steps`` how many of them ``order`` holds.
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
    ) -> None:
        self.method, self.name, self.splits = build(method), canonical(method), splits
        self.order = training_order(len(splits.train), (), rows, steps, 0, 0, "train")
        place = torch.device(device)
        seed_global(place, 0, "init")
        network = models.build(model, splits.spec, self.method.requires()).to(place)
        check_fits(self.name, self.method, splits, network, model)
        training = Training(epochs=epochs, batch_size=rows)
        self.ctx = TrainingContext.of_splits(
            network,
            make_optimizer(network, training),
            task_of(splits.kind),
            splits,
            epochs=epochs,
            seed=0,
            training=training,
        )
        self.method.to(place)
        self.ctx.enter("setup")
        self.method.setup(self.ctx)
        network.train()

    def begin_epoch(self) -> None:
        """What the method does before an epoch."""
        self.ctx.enter("begin_epoch")
        self.method.begin_epoch(self.ctx)

    def train(self, batches: Iterable[torch.Tensor]) -> int:
        """A step for each of these batches of indices; returns the rows that were trained on."""
        trained = 0
        for index in batches:
            _, out = train_step(self.method, self.ctx, self.splits.train, index, self.name)
            trained += len(out.x)
            self.ctx.step += 1
        return trained

    def charged(self) -> float:
        """Charged seconds since the last call: the clock stands still in the audit."""
        return sum(self.ctx.clock.take().values())


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
