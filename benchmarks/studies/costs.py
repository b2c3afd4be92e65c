"""What runs cost, foreseen from those that are done."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic.dataclasses import dataclass

from analysis import runs


@dataclass(frozen=True)
class Estimate:
    """Seconds of one run at a time; of some runs nothing is known."""

    seconds: float
    unknown: int


class Costs:
    """Seconds of a run, foreseen from the runs that lie in the results folder."""

    def __init__(self, device: str = "") -> None:
        self._device = device
        self._exact: dict[str, list[float]] = {}
        self._alike: dict[str, list[float]] = {}

    def saw(self, run: runs.Run, result: Mapping[str, Any]) -> None:
        """Remember what a run that is done has taken, if it was on such a device."""
        cost = result.get("cost")
        if not cost or (self._device and result["device"]["type"] != self._device):
            return
        seconds = (cost["charged_seconds"] + cost["evaluation_seconds"]) / cost["epochs"]
        self._exact.setdefault(self._key(run), []).append(seconds)
        self._alike.setdefault(self._key(run, own=False), []).append(seconds)

    def of(self, run: runs.Run, done: int = 0) -> float | None:
        """Mean of the other seeds; else of other rows on the same data and network; else None.

        Of a run of which so many epochs are ``done`` it is the rest.
        """
        for seconds in (
            self._exact.get(self._key(run)),
            self._alike.get(self._key(run, own=False)),
        ):
            if seconds:
                return sum(seconds) / len(seconds) * (run.training.epochs - done)
        return None

    def total(self, left: Iterable[tuple[runs.Run, int]]) -> Estimate:
        """Of all these runs, one after the other; with each the epochs of it that are done."""
        known = [self.of(run, done) for run, done in left]
        return Estimate(
            seconds=sum(each for each in known if each is not None),
            unknown=sum(each is None for each in known),
        )

    @staticmethod
    def _key(run: runs.Run, own: bool = True) -> str:
        training = run.training
        parts = [run.benchmark, run.model, str(training.batch_size), training.precision]
        parts.append(str(run.threads))
        return "|".join([*parts, run.method, run.control] if own else parts)


def costs_in(root: Path, device: str = "") -> Costs:
    """What the runs in a results folder have taken, on one kind of device or on any."""
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
