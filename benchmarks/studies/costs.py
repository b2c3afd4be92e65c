"""What runs cost, estimated from finished runs, else from the shipped table."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

import methods
from analysis import runs
from benchmarks.training import models
from methods.base import Spec
from methods.naming import NamingError


class Shipped(NamedTuple):
    """The time of a training step without a method on one kind of device."""

    seconds: float
    """per 28 x 28 x 3 image in resnet18; other networks in proportion to their operations"""
    where: str


USUAL = Spec(2, 10, (3, 28, 28))
SHIPPED = {
    "cpu": Shipped(0.0133, "one core, measured, docs/performance.md"),
    "cuda": Shipped(0.0001, "a GPU at 10,000 images a second in resnet18, not measured"),
}


def shipped(model: str, spec: Spec, device: str) -> float:
    """Seconds per row of a plain training step, from the shipped table."""
    return SHIPPED[device].seconds * _operations(model, spec) / _operations()


@cache
def _operations(model: str = "resnet18", spec: Spec = USUAL) -> float:
    """Operations of a forward pass of one row; resnet18's if they cannot be counted."""
    try:
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            models.build(model, spec)(torch.zeros(2, *spec.shape))
    except NamingError:
        raise
    except (Exception, SystemExit):  # a user's own network may read values
        return _operations()
    return counter.get_total_flops() / 2


def method_of(run: runs.Run) -> str:
    """The method that sets a run's cost: its own, or the one whose budget it gets."""
    return run.budget.partition(" of ")[2] or run.method


class Costs:
    """Estimated seconds of a run, from the runs in the results folder."""

    def __init__(self, device: str = "") -> None:
        self._device = device
        self._exact: dict[tuple[object, ...], list[float]] = {}
        self._alike: dict[tuple[object, ...], list[float]] = {}
        self._corrupted: dict[tuple[object, ...], list[float]] = {}

    def saw(self, run: runs.Run, result: Mapping[str, Any]) -> None:
        """Record what a finished run took, if it ran on this kind of device."""
        cost = result.get("cost")
        if not cost or (self._device and result["device"]["type"] != self._device):
            return
        seconds = (cost["charged_seconds"] + cost["evaluation_seconds"]) / cost["epochs"]
        self._exact.setdefault(_exactly(run), []).append(seconds)
        if steps := methods.cost(run.method):
            self._alike.setdefault(alike(run), []).append(seconds / steps)
        if "corrupted_seconds" in cost:
            self._corrupted.setdefault(alike(run), []).append(cost["corrupted_seconds"])

    def of(self, run: runs.Run, done: int = 0) -> float | None:
        """Mean over other seeds; else over other rows on the same data and network; else None.

        Other rows are scaled by the cost of their method. Epochs that are ``done`` do not count.
        """
        for seconds, cost in (
            (self._exact.get(_exactly(run)), 1.0),
            (self._alike.get(alike(run)), methods.cost(run.method)),
        ):
            if seconds:
                return sum(seconds) / len(seconds) * cost * (run.training.epochs - done)
        return None

    def corrupted(self, run: runs.Run) -> float | None:
        """Mean seconds of the evaluation on corrupted images of runs on the same data and network;
        None if there was none."""
        seconds = self._corrupted.get(alike(run))
        return sum(seconds) / len(seconds) if seconds else None


def alike(run: runs.Run) -> tuple[object, ...]:
    """What runs share if their epochs differ only by the costs of their methods."""
    training = run.training
    return (run.benchmark, run.model, training.batch_size, training.precision, run.threads)


def _exactly(run: runs.Run) -> tuple[object, ...]:
    return (*alike(run), run.method, run.control)


def costs_in(root: Path, device: str = "") -> Costs:
    """What the runs in a results folder took, on one kind of device or on any."""
    costs = Costs(device)
    for folder in runs.folders(root):
        result = runs.read_result(folder)
        if result is not None and result["status"] == "done":
            try:
                run, _ = runs.read_run(folder)
            except runs.UNREADABLE:
                continue
            costs.saw(run, result)
    return costs
