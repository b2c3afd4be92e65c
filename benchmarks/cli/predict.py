"""``augbench predict``: predicts images, or rows of a table, with a saved network."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import methods
from analysis import metrics, runs
from analysis.runs import Run
from benchmarks.cli import arguments
from benchmarks.cli.arguments import UsageError
from benchmarks.cli.common import (
    benchmark_of,
    device_of,
    metric,
    root_of,
)
from benchmarks.data import folders, npz, streams
from benchmarks.data.download import DataError
from benchmarks.data.names import (
    Benchmark,
    parse_benchmark,
)
from benchmarks.data.splits import arrays_of, refitted
from benchmarks.data.streams import Rows
from benchmarks.running import disk
from benchmarks.training import evaluation
from benchmarks.training.saved import network_of
from benchmarks.training.trainer import threads
from methods.base import Model, Spec
from methods.learner import learner_of
from methods.naming import NamingError


@dataclass(frozen=True, eq=False)
class _Given:
    """What is to be predicted."""

    rows: Rows
    spec: Spec
    labels: np.ndarray | None
    names: list[str] | None
    """of images in a folder"""
    note: str = ""


def carry_out(command: arguments.PredictCommand) -> int:
    """Write the predictions, and print scores if there are labels; return the exit code."""
    folder = command.run
    try:
        run, recorded = runs.read_run(folder)
    except runs.UNREADABLE as error:
        raise UsageError(f"run: {folder} is not a run directory ({error})") from error
    result = runs.read_result(folder)
    if result is None or result["status"] != "done" or not (folder / runs.MODEL).exists():
        with suppress(NamingError, methods.Unavailable):  # code that is not here
            if not learner_of(methods.build(run.method)).trains_network:
                raise UsageError(f"run: {run.method} trains no network that could predict")
        raise UsageError(
            f"run: {folder} has no saved network; run it again with augbench run --save-model ..."
        )
    if command.out.suffix not in (".csv", ".npz"):
        raise UsageError(f"out: expected a name ending in .csv or .npz, got {command.out}")
    device = torch.device(device_of(command.device))
    table = len(result["data"]["shape"]) == 1
    made = (
        _table(command, run, recorded, device) if table else _images(command.data, result, device)
    )
    classes, names, labels = tuple(result["data"]["classes"]), made.names, made.labels
    network = network_of(folder, run, result, made.spec, device)
    with threads(run.threads):
        logits = evaluation.logits_of(network, made.rows)
    kind = result["data"]["kind"]
    probabilities = metrics.probabilities(logits, kind)
    try:
        scores = metrics.evaluate(logits, labels, kind) if labels is not None else {}
    except ValueError as error:
        raise DataError(f"{command.data}: the labels do not fit the network: {error}") from error
    command.out.parent.mkdir(parents=True, exist_ok=True)
    if command.out.suffix == ".npz":
        arrays = {"probabilities": probabilities, "logits": logits}
        disk.write_arrays(
            command.out, arrays | ({} if names is None else {"files": np.array(names)})
        )
    else:
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow(["row" if names is None else "file", *classes])
        named = range(len(logits)) if names is None else names
        writer.writerows(
            [name, *row] for name, row in zip(named, probabilities.tolist(), strict=True)
        )
        runs.write_text(command.out, text.getvalue())
    print(f"{len(logits)} rows predicted: {command.out}")
    if made.note:
        print(f"note: {made.note}")
    if isinstance(network, Model) and not network.rows_apart:
        print(
            f"note: {run.model} predicts {evaluation.EVALUATION_BATCH} rows at a time, each of "
            "which depends on the others"
        )
    if scores:
        print(", ".join(metric(name, value) for name, value in scores.items()))
    return 0


def _images(data: str, result: Mapping[str, Any], device: torch.device) -> _Given:
    """The images of a file or folder, as the network of a result takes them."""
    shape, classes = tuple(result["data"]["shape"]), len(result["data"]["classes"])
    asked = parse_benchmark(data)
    of_folder = Benchmark(name="folder", path=asked.path)
    if asked not in (of_folder, replace(of_folder, size=shape[1]), replace(of_folder, name="npz")):
        raise UsageError(f"data: expected npz:FILE or folder:DIR, got {data!r}")
    path, names, labels = Path(asked.path).expanduser(), None, None
    if asked.name == "npz":
        images, labels = npz.images_only(path, root_of(None))
    else:
        images, names = folders.images_only(path, shape[1], root_of(None))
    rows = streams.rows_of(images, shape, classes, device)
    return _Given(rows, Spec(rows=len(rows), classes=classes, shape=shape), labels, names)


def _table(
    command: arguments.PredictCommand, run: Run, recorded: dict[str, Any], device: torch.device
) -> _Given:
    """The rows of a CSV file, prepared by what is fitted anew to the rows the run trained on.

    Raises:
        DataError: the table of the run is not here, or is another one now.
    """
    from benchmarks.data.tables import UNKNOWN, rows_of_file  # noqa: PLC0415 - loads pandas

    own, asked = benchmark_of(run, recorded), parse_benchmark(command.data)
    of_file = Benchmark(name="csv", path=asked.path)
    if asked not in (of_file, replace(own, name="csv", path=asked.path)):
        raise UsageError(
            f"data: expected csv:FILE with the columns of {run.benchmark}, on which the network "
            f"was trained, got {command.data!r}"
        )
    why = "the rows that the run was trained on are needed, to prepare others as they were"
    try:
        arrays = arrays_of(own, root_of(None), allow_unverified=True)
    except DataError as error:
        raise DataError(f"{why}, but {error}") from error
    if arrays.checksum != run.data:
        raise DataError(
            f"{why}, but {own.path or run.benchmark} has changed since: its MD5 is "
            f"{arrays.checksum}, that of the run's was {run.data}."
        )
    assert arrays.table is not None
    stored, labels = rows_of_file(Path(asked.path), own.reading, own.name, arrays)
    fitted = refitted(arrays, own, run.seed)
    x = torch.from_numpy(fitted.apply(stored)).to(device)
    of, classes = fitted.input, len(arrays.classes)
    unseen = (stored == UNKNOWN).sum(axis=0)
    told = [f"{c.name} {n}" for c, n in zip(arrays.table.columns, unseen, strict=True) if n]
    return _Given(
        rows=streams.rows_from_tensors(x, torch.zeros(len(x), classes, device=device)),
        spec=Spec(len(x), classes, of.shape, of.kind, of.low, of.high, of.categories),
        labels=labels,
        names=None,
        note=f"categories that the run's table does not have: {', '.join(told)}" if told else "",
    )
