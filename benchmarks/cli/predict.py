"""``augbench predict``: predicts the images of a file or folder with a saved network."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from analysis import metrics, runs
from benchmarks.cli import arguments
from benchmarks.cli.arguments import UsageError
from benchmarks.cli.common import (
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
from benchmarks.running import disk
from benchmarks.training import evaluation
from benchmarks.training.saved import network_of
from methods.base import Spec


def carry_out(command: arguments.PredictCommand) -> int:
    """Write the predictions, and print scores if there are labels; return the exit code."""
    folder = command.run
    try:
        run, _ = runs.read_run(folder)
    except runs.UNREADABLE as error:
        raise UsageError(f"run: {folder} is not a run directory ({error})") from error
    result = runs.read_result(folder)
    if result is None or result["status"] != "done" or not (folder / runs.MODEL).exists():
        raise UsageError(
            f"run: {folder} has no saved network; run it again with augbench run --save-model ..."
        )
    shape = tuple(result["data"]["shape"])
    asked = parse_benchmark(command.data)
    of_folder = Benchmark(name="folder", path=asked.path)
    if asked not in (of_folder, replace(of_folder, size=shape[1]), replace(of_folder, name="npz")):
        raise UsageError(f"data: expected npz:FILE or folder:DIR, got {command.data!r}")
    if command.out.suffix not in (".csv", ".npz"):
        raise UsageError(f"out: expected a name ending in .csv or .npz, got {command.out}")
    path, names, labels = Path(asked.path).expanduser(), None, None
    if asked.name == "npz":
        images, labels = npz.images_only(path, root_of(None))
    else:
        images, names = folders.images_only(path, shape[1], root_of(None))
    classes = tuple(result["data"]["classes"])
    rows = streams.rows_of(images, shape, len(classes), torch.device(device_of(command.device)))
    spec = Spec(rows=len(rows), classes=len(classes), shape=shape)
    network = network_of(folder, run, result, spec, rows.y.device)
    logits = evaluation.logits_of(network, rows)
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
    if scores:
        print(", ".join(metric(name, value) for name, value in scores.items()))
    return 0
