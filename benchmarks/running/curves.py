"""TensorBoard files of a study, written from the metrics.jsonl of its runs."""

from __future__ import annotations

import importlib
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from analysis import runs
from analysis.question import STUDIES
from benchmarks.studies import search
from benchmarks.studies.cells import Cell
from benchmarks.studies.schema import Study


class Curves:
    """TensorBoard files, written from metrics.jsonl."""

    def __init__(self, writer: Any, folder: Path, root: Path) -> None:
        self._writer, self._folder, self._root = writer, folder, root
        self._last: dict[str, tuple[float, int]] = {}

    def extend(self, cells: Sequence[Cell]) -> None:
        """Add the epochs since the last time, which was half a minute ago or more."""
        now = time.monotonic()
        for cell in cells:
            when, epochs = self._last.get(cell.run.id, (-math.inf, 0))
            if now - when > 30:
                self._add(cell, epochs)

    def finish(self, cell: Cell) -> None:
        """Write the run's curves as a whole, in place of what was written so far."""
        shutil.rmtree(self._place(cell), ignore_errors=True)
        self._add(cell, 0)

    def _add(self, cell: Cell, since: int) -> None:
        lines = search.lines_of(runs.folder_of(self._root, cell.run))
        self._last[cell.run.id] = time.monotonic(), len(lines)
        if not lines[since:]:
            return
        writer = self._writer(logdir=str(self._place(cell)))
        for line in lines[since:]:
            scalars = {
                "train/loss": line["train_loss"],
                "train/learning_rate": line["learning_rate"],
            }
            scalars |= {f"select/{name}": value for name, value in line["select"].items()}
            scalars |= {f"log/{name}": value for name, value in line["log"].items()}
            for name, value in scalars.items():
                if isinstance(value, int | float):
                    writer.add_scalar(name, value, line["epoch"])
        writer.close()

    def _place(self, cell: Cell) -> Path:
        run = cell.run
        name = f"{run.benchmark} {run.model} {run.row} seed {run.seed} {run.id}"
        return self._folder / "".join(c if c.isalnum() or c in "-_.= " else "-" for c in name)


def curves_of(study: Study, root: Path) -> Curves | None:
    """The curves of a study; None where it wants none, or tensorboardX is not there."""
    if not study.tensorboard:
        return None
    try:
        writer = importlib.import_module("tensorboardX").SummaryWriter
    except ImportError:  # it comes with ray[tune], but a file of curves is not worth a sweep
        return None
    return Curves(writer, root / STUDIES / study.name / "tensorboard", root)
