"""``augbench generate``: makes images of a data set, for the method generated."""

from __future__ import annotations

import json
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from analysis import runs
from analysis.report.plots import Band, sample_bands
from analysis.tasks import task_named
from benchmarks.cli import arguments
from benchmarks.cli.arguments import UsageError
from benchmarks.cli.common import root_of
from benchmarks.data import elsewhere, generators
from benchmarks.data.generators import Made
from benchmarks.data.names import Benchmark, canonical, names_in, parse_benchmark
from benchmarks.data.splits import Protocol, Splits, arrays_of, left_over, make_splits
from benchmarks.running import disk
from methods.naming import NamingError

SECONDS = 2.0
"""Between two lines of progress."""
SHOWN, BANDS = 8, 12
"""Images of a class in the figure, and classes."""


def carry_out(command: arguments.GenerateCommand) -> int:
    """For each data set write the images, what made them, and a figure; return the exit code."""
    for name, least in (("rows", 1), ("epochs", 1), ("seed", 0)):
        given = getattr(command, name)
        if given is not None and given < least:
            raise UsageError(f"{name}: expected {least} or more, got {given}")
    if not 0 <= command.wrong <= 1:
        raise UsageError(f"wrong: expected a share in [0, 1], got {command.wrong}")
    try:
        asked = [parse_benchmark(name) for name in names_in(command.benchmark)]
    except NamingError as error:
        raise UsageError(str(error)) from error
    if not asked or len({each.name for each in asked}) < len(asked):
        raise UsageError("benchmark: expected data sets of different names")
    for benchmark in asked:
        refuse(benchmark)
    for benchmark in asked:
        _generate(command, benchmark)
    print(f"Train on them: --methods \"generated(data='npz:{command.out}')\"")
    return 0


def _generate(command: arguments.GenerateCommand, benchmark: Benchmark) -> None:
    """Write the images of one data set."""
    arrays = arrays_of(benchmark, root_of(command.data))
    if not task_named(arrays.kind).exclusive:
        raise UsageError(f"benchmark: {canonical(benchmark)} has several labels per row")
    cpu = torch.device("cpu")
    splits = make_splits(arrays, benchmark, Protocol(), needs_meta=False, seed=0, device=cpu)
    try:
        made = _made(command, splits, benchmark, left_over(arrays, benchmark))
    except ValueError as error:
        raise UsageError(f"kind: {canonical(benchmark)}: {error}") from error
    path = _write(command, made, splits, benchmark, arrays.checksum)
    wrong = int((made.y != made.truth).sum())
    print(
        f"{path}: {len(made.y):,} images, {wrong:,} of them with a wrong label; drawn in "
        f"{path.with_suffix('.png').name}"
    )


def refuse(benchmark: Benchmark) -> None:
    """Refuse data sets whose training rows are not the same, or not all labelled, in every run.

    Raises:
        UsageError: names the argument.
    """
    wrong = {
        "folds": benchmark.folds,
        "labelled": benchmark.labelled,
        "noise or imbalance": benchmark.corrupts,
    }
    if found := [name for name, given in wrong.items() if given]:
        raise UsageError(
            f"benchmark: expected none of {', '.join(wrong)}, because a generator is to learn from "
            f"the rows of every run, got {found[0]}"
        )
    if benchmark.is_table:
        raise UsageError("benchmark: expected images, got a table")


def _made(
    command: arguments.GenerateCommand,
    splits: Splits,
    benchmark: Benchmark,
    others: tuple[np.ndarray, np.ndarray],
) -> Made:
    """The images of the kind asked for.

    Raises:
        ValueError: there are too few rows, or the images are too large.
    """
    rows, classes = splits.train, len(splits.classes)
    y = task_named(splits.kind).labels(rows.y.numpy())
    count = len(y) if command.rows is None else command.rows
    truth = generators.classes_like(y, count, command.seed)
    if command.kind == "real":
        order = generators.drawn_like(truth, others[1], command.seed)
        x = others[0][order]
    else:
        known = rows.inputs(torch.arange(len(y))).numpy()
        if command.kind == "pca":
            x = generators.mixtures(known, y, truth, command.seed)
        else:
            x = generators.autoencoded(
                known, y, truth, command.seed, command.epochs, _Told(command.epochs)
            )
        x = np.round(255 * x).astype(np.uint8).transpose(0, 2, 3, 1)
        x = x[..., 0] if x.shape[-1] == 1 else x
    given = generators.mislabelled(truth, classes, command.wrong, command.seed)
    return Made(x, given, truth)


class _Told:
    """Prints the progress of a training now and then."""

    def __init__(self, epochs: int) -> None:
        self._epochs, self._last = epochs, time.monotonic()

    def __call__(self, epoch: int, loss: float) -> None:
        """An epoch ended."""
        if time.monotonic() - self._last >= SECONDS or epoch == self._epochs:
            self._last = time.monotonic()
            print(f"epoch {epoch} of {self._epochs}, loss {loss:.1f} nats", flush=True)


def _write(
    command: arguments.GenerateCommand,
    made: Made,
    splits: Splits,
    benchmark: Benchmark,
    checksum: str,
) -> Path:
    """Write the npz, the json and the png; the path of the first."""
    command.out.mkdir(parents=True, exist_ok=True)
    path = command.out / f"{benchmark.name}.npz"
    disk.write_arrays(path, {"images": made.x, "labels": made.y, elsewhere.TRUTH: made.truth})
    told = {
        "benchmark": canonical(benchmark),
        "data": checksum,
        "kind": command.kind,
        "rows": len(made.y),
        "wrong": command.wrong,
        "seed": command.seed,
        **({"epochs": command.epochs} if command.kind == "vae" else {}),
        "augbench": version("augbench"),
    }
    runs.write_text(path.with_suffix(".json"), json.dumps(told, indent=1) + "\n")
    bands = []
    for number, name in enumerate(splits.classes[:BANDS]):
        rows = np.flatnonzero(made.truth == number)[:SHOWN]
        captions = [
            "" if made.y[row] == number else f"labelled {splits.classes[made.y[row]]}"
            for row in rows
        ]
        if len(rows):
            shown = made.x[rows].astype(np.float64) / 255
            bands.append(Band(name, shown.reshape(len(rows), *shown.shape[1:3], -1), captions))
    title = f"{told['benchmark']}: images of kind {command.kind}, seed {command.seed}, by class"
    sample_bands(bands, title, [path.with_suffix(".png")])
    return path
