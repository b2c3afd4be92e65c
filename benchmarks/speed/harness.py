"""Time of a run under the harness as a ratio to a plain loop: python -m benchmarks.speed.harness"""

from __future__ import annotations

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
from benchmarks.data.splits import Splits
from benchmarks.speed.loop import described
from benchmarks.training import models
from benchmarks.training.trainer import fit
from methods import build
from methods.base import Spec

Pair = tuple[np.ndarray, np.ndarray]


@dataclass
class Arguments:
    """As many random images as PneumoniaMNIST has; their content does not matter here."""

    model: str = "resnet18(width=0.25)"
    """network"""
    epochs: int = 2
    """epochs per run"""
    repeats: int = 5
    """runs of each loop, in turn"""
    threads: int = 1
    """CPU threads"""
    batch_size: int = 128
    """rows per step"""


def plain(model_name: str, sets: list[Pair], epochs: int, batch_size: int) -> float:
    """Seconds of a simple hand-written loop: Adam, select AUC each epoch, test at the end."""
    start = time.perf_counter()
    torch.manual_seed(0)
    tensors = [(torch.from_numpy(x)[:, None], torch.from_numpy(y)) for x, y in sets]
    (x, y), select, test = tensors
    model = models.build(model_name, Spec(len(x), 2, (1, 28, 28)))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(epochs):
        model.train()
        for index in torch.randperm(len(x)).split(batch_size):
            loss = F.cross_entropy(model(x[index].float() / 255), y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        _auc(model, select)
    _auc(model, test)
    return time.perf_counter() - start


def _auc(model: torch.nn.Module, pair: tuple[torch.Tensor, torch.Tensor]) -> float:
    model.eval()
    with torch.no_grad():
        parts = [model(part.float() / 255).softmax(1)[:, 1] for part in pair[0].split(512)]
    return float(roc_auc_score(pair[1].numpy(), torch.cat(parts).numpy()))


def harness(model_name: str, sets: list[Pair], training: Training, threads: int) -> float:
    """Seconds of the same under ``fit``, checkpoints and metrics included."""
    start = time.perf_counter()
    run = Run(
        benchmark="random",
        data="",
        model=model_name,
        method="none",
        training=training,
        threads=threads,
    )
    with tempfile.TemporaryDirectory() as folder:
        fit(run, Splits.from_arrays(*sets), build("none"), folder=Path(folder))
    return time.perf_counter() - start


def main() -> None:
    """Print the table."""
    arguments = tyro.cli(Arguments, description=__doc__)
    torch.set_num_threads(arguments.threads)
    rng = np.random.default_rng(0)
    sets = [
        (rng.integers(0, 256, (rows, 28, 28), dtype=np.uint8), np.arange(rows) % 2)
        for rows in (4708, 524, 624)
    ]
    training = Training(epochs=arguments.epochs, batch_size=arguments.batch_size)
    plain(arguments.model, sets, 1, arguments.batch_size)
    pairs = []
    for _ in range(arguments.repeats):
        one = harness(arguments.model, sets, training, arguments.threads)
        other = plain(arguments.model, sets, arguments.epochs, arguments.batch_size)
        pairs.append((one, other))
    ratios = [one / other for one, other in pairs]
    body = [
        ["harness", statistics.median(one for one, _ in pairs), statistics.median(ratios)],
        ["plain loop", statistics.median(other for _, other in pairs), 1.0],
    ]
    print(
        f"{arguments.model}, 4708 x 28x28x1, batch {arguments.batch_size}, {arguments.epochs} "
        f"epochs, {described('cpu', arguments.threads, arguments.repeats)}"
    )
    print(tabulate(body, headers=["", "seconds", "ratio"], floatfmt=".3f"))
    print(f"ratios {min(ratios):.3f} to {max(ratios):.3f}")


if __name__ == "__main__":
    main()
