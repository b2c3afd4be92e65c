"""A table under the harness, beside a plain loop: python -m benchmarks.speed.tables"""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from sklearn.metrics import roc_auc_score
from tabulate import tabulate
from torch.nn import functional as F

from analysis.runs import Run, Training
from benchmarks.data.names import parse_benchmark
from benchmarks.data.sources import default_root
from benchmarks.data.splits import Protocol, Splits, arrays_of, make_splits
from benchmarks.speed.loop import described
from benchmarks.training import models
from benchmarks.training.trainer import fit
from methods import build

METHODS = (
    "cell_swap",
    "tabular_cutmix",
    "saflex(preset=stable, upstream=cell_swap)",
    "saflex(beta=1.0, upstream=cell_swap)",
)


@dataclass
class Arguments:
    """Runs of a table that is in the data folder, in turn."""

    benchmark: str = "appetency(rows=20000, dedup=true)"
    """a table"""
    model: str = "mlp"
    """network"""
    epochs: int = 50
    """epochs per run"""
    repeats: int = 3
    """runs of each, in turn"""
    batch_size: int = 128
    """rows per step"""


def splits(name: str, needs_meta: bool) -> Splits:
    """Those of seed 0."""
    benchmark = parse_benchmark(name)
    arrays = arrays_of(benchmark, default_root())
    return make_splits(
        arrays, benchmark, Protocol(), needs_meta=needs_meta, seed=0, device=torch.device("cpu")
    )


def plain(model_name: str, made: Splits, epochs: int, batch_size: int) -> float:
    """CPU seconds of a simple hand-written loop: Adam, select AUC each epoch, test at the end."""
    start = time.process_time()
    torch.manual_seed(0)
    model = models.build(model_name, made.spec)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    x, y = made.train.inputs(torch.arange(len(made.train))), made.train.y.argmax(dim=1)
    for _ in range(epochs):
        model.train()
        for index in torch.randperm(len(x)).split(batch_size):
            loss = F.cross_entropy(model(x[index]), y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        _auc(model, made.select)
    _auc(model, made.test)
    return time.process_time() - start


def _auc(model: torch.nn.Module, rows: object) -> float:
    model.eval()
    with torch.no_grad():
        scores = model(rows.inputs(torch.arange(len(rows)))).softmax(1)[:, 1]  # type: ignore[attr-defined, arg-type]
    return float(roc_auc_score(rows.y.argmax(dim=1).numpy(), scores.numpy()))  # type: ignore[attr-defined]


def harness(arguments: Arguments, method: str, made: Splits) -> tuple[float, float]:
    """CPU seconds of a run under ``fit``, checkpoints and metrics included, and those charged."""
    start = time.process_time()
    training = Training(epochs=arguments.epochs, batch_size=arguments.batch_size)
    run = Run(benchmark="table", data="", model=arguments.model, method=method, training=training)
    with tempfile.TemporaryDirectory() as folder:
        fitted = fit(
            run, made, build(method), folder=Path(folder), checkpoint_every=arguments.epochs
        )
    return time.process_time() - start, fitted.result["cost"]["charged_seconds"]


def main() -> None:
    """Print both tables."""
    arguments = tyro.cli(Arguments, description=__doc__)
    torch.set_num_threads(1)
    made, with_meta = splits(arguments.benchmark, False), splits(arguments.benchmark, True)
    plain(arguments.model, made, 1, arguments.batch_size)
    gc.freeze()  # as a worker does
    pairs, charged = [], {name: list[float]() for name in ("none", *METHODS)}
    for _ in range(arguments.repeats):
        whole, step = harness(arguments, "none", made)
        pairs.append((whole, plain(arguments.model, made, arguments.epochs, arguments.batch_size)))
        charged["none"].append(step)
        for name in METHODS:
            data = with_meta if "saflex" in name else made
            charged[name].append(harness(arguments, name, data)[1])
    ratios = [one / other for one, other in pairs]
    steps = arguments.epochs * -(-made.pool // arguments.batch_size)
    print(
        f"{arguments.benchmark}, {len(made.train)} rows, {arguments.model}, batch "
        f"{arguments.batch_size}, {arguments.epochs} epochs, "
        f"{described('cpu', 1, arguments.repeats)}"
    )
    body = [
        ["harness", 1000 * statistics.median(one for one, _ in pairs) / steps,
         statistics.median(ratios)],
        ["plain loop", 1000 * statistics.median(other for _, other in pairs) / steps, 1.0],
    ]  # fmt: skip
    print(tabulate(body, headers=["", "ms a step, all in", "ratio"], floatfmt=".3f"))
    print(f"ratios {min(ratios):.3f} to {max(ratios):.3f}\n")
    body = [
        [name, 1000 * statistics.median(found) / steps,
         float(np.median([a / b for a, b in zip(found, charged["none"], strict=True)]))]
        for name, found in charged.items()
    ]  # fmt: skip
    print(tabulate(body, headers=["method", "charged ms a step", "plain steps"], floatfmt=".2f"))


if __name__ == "__main__":
    main()
