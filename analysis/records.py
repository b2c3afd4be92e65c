"""Runs read back from disk, for tables and statistics. Needs neither torch nor ray."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import metrics, runs
from benchmarks.runs import Run


@dataclass(frozen=True)
class Record:
    """A run that has ended: its cell, its result, and where its files lie."""

    run: Run
    recorded: dict[str, Any]
    result: dict[str, Any]
    folder: Path

    @property
    def done(self) -> bool:
        """Whether it has metrics."""
        return self.result["status"] == "done"

    @cached_property
    def predictions(self) -> dict[str, np.ndarray]:
        """Logits and targets, read once."""
        return runs.read_predictions(self.folder)

    def metric(self, name: str, split: str = "test", when: str = "last") -> float:
        """A metric of the stored result; nan where it is undefined or the epoch not offered."""
        value = self.result["metrics"].get(when, {}).get(split, {}).get(name)
        return float("nan") if value is None else float(value)

    def detection(self, name: str) -> float:
        """How well wrong labels were found (``metrics.detection``); nan where it was not asked."""
        value = self.result.get("detection", {}).get(name)
        return float("nan") if value is None else float(value)

    def item_values(self, name: str, when: str = "last") -> np.ndarray:
        """(N,) values of the test rows whose mean is the metric."""
        logits = self.predictions[f"test_{when}_logits"]
        return metrics.item_values(logits, self.predictions["test_targets"], self.kind, name)

    @property
    def kind(self) -> str:
        """MedMNIST's word for the task."""
        return self.result["data"]["kind"]


def read(folders: Iterable[Path]) -> list[Record]:
    """The records of these run directories; what has not ended is left out."""
    records = []
    for folder in folders:
        result = runs.read_result(folder)
        if result is not None:
            run, recorded = runs.read_run(folder)
            records.append(Record(run, recorded, result, folder))
    return records


DETECTION = ("weight_auc", "corrected", "spoiled")


def to_csv(rows: Iterable[tuple[str, Iterable[Record]]]) -> str:
    """A line a run, under the name of its row of the table: what a study leaves behind.

    Accuracy, AUC, nll and ECE are of the test split at the last epoch, as shares and nats; seconds
    are charged ones. Where labels were corrupted, three more columns tell how well they were found.
    """
    rows = [(name, list(records)) for name, records in rows]
    detected = any("detection" in each.result for _, records in rows for each in records)
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["benchmark", "model", "protocol", "row", "seed", "id", "status", "reason", "epochs",
         "accuracy", "auc", "nll", "ece", "seconds_per_epoch", "passes_per_row"]
        + (list(DETECTION) if detected else [])
    )  # fmt: skip
    for name, records in rows:
        for record in records:
            run, cost = record.run, record.result.get("cost", {})
            values = [""] * 6
            if record.done:
                names = ("accuracy", "auc", "nll", "ece")
                values = [f"{record.metric(each):.6g}" for each in names]
                values += [f"{cost[each]:.4g}" for each in ("seconds_per_epoch", "passes_per_row")]
            if detected:
                found = [record.detection(each) for each in DETECTION]
                values += ["" if math.isnan(value) else f"{value:.6g}" for value in found]
            ended = [record.result["status"], record.result.get("reason", "")]
            cell = [run.benchmark, run.model, run.protocol, name, run.seed, run.id]
            writer.writerow([*cell, *ended, run.training.epochs, *values])
    return text.getvalue()
