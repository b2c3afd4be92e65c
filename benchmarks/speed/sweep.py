"""What a sweep costs beyond its runs: python -m benchmarks.speed.sweep"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor, nn

from benchmarks.data.names import parse_benchmark
from benchmarks.data.splits import Protocol, arrays_of
from benchmarks.running.disk import Options, execute
from benchmarks.studies.cells import Row, make_cell, training_of
from methods.base import Spec

ROWS, BATCH = 40, 4
STEPS = ROWS // BATCH
MODEL = "py:benchmarks.speed.sweep:sleeper"


@dataclass
class Arguments:
    """Runs that sleep, so that the figure does not depend on how fast the machine trains."""

    runs: int = 40
    """runs of the sweep"""
    seconds: float = 5.0
    """how long a run sleeps"""
    workers: int = 2
    """runs at a time"""
    planned: int = 1000
    """runs of the dry run"""


class Sleeper(nn.Module):
    """A network that sleeps in training."""

    def __init__(self, spec: Spec, seconds: float) -> None:
        super().__init__()
        self.head = nn.Linear(int(np.prod(spec.shape)), spec.classes)
        self._seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K)."""
        if self.training:
            time.sleep(self._seconds)
        return self.head(x.flatten(1))


def sleeper(spec: Spec) -> nn.Module:
    """The network of these runs; the seconds of a run are read from the environment."""
    return Sleeper(spec, float(os.environ.get("AUGBENCH_SLEEP", "0")) / STEPS)


def study(folder: Path, runs: int) -> Path:
    """A study of ``runs`` runs on random pixels."""
    rng, data = np.random.default_rng(0), folder / "pixels.npz"
    arrays = {}
    for split in ("train", "val", "test"):
        arrays[f"{split}_images"] = rng.integers(0, 255, (ROWS, 8, 8), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.arange(ROWS) % 2
    np.savez(data, **arrays)
    path = folder / f"study{runs}.yaml"
    path.write_text(
        f"benchmarks: npz:{data}\nmodels: {MODEL}\nmethods: none\nseeds: {runs}\n"
        f"training: {{epochs: 1, batch_size: {BATCH}}}\ntensorboard: false\n",
        encoding="utf-8",
    )
    return path


def alone(folder: Path) -> float:
    """Seconds of one run in a process that has done another before."""
    benchmark = parse_benchmark(f"npz:{folder / 'pixels.npz'}")
    training = training_of("medmnist", {"epochs": 1, "batch_size": BATCH})
    taken = []
    for seed in (0, 1):
        checksum = arrays_of(benchmark, folder).checksum
        row = Row("none")
        cell = make_cell(row, benchmark, MODEL, training, Protocol(), seed, checksum=checksum)
        start = time.perf_counter()
        options = Options(data_root=folder)
        execute(cell.run, cell.recorded, folder / "alone", options, cell.benchmark)
        taken.append(time.perf_counter() - start)
    return taken[-1]


def sweep(path: Path, out: Path, *more: str) -> float:
    """Seconds of the command."""
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "benchmarks", "sweep", str(path), "--out", str(out), *more],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    arguments = tyro.cli(Arguments, description=__doc__)
    torch.set_num_threads(1)
    os.environ["AUGBENCH_SLEEP"] = str(arguments.seconds)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path, out = study(folder, arguments.runs), folder / "runs"
        single = alone(folder)
        began = time.time()
        whole = sweep(path, out, "--workers", str(arguments.workers))
        first = min(each.stat().st_mtime for each in out.glob("*/run.json"))
        last = max(each.stat().st_mtime for each in out.glob("*/result.json"))
        again = sweep(path, out, "--workers", str(arguments.workers))
        planned = sweep(study(folder, arguments.planned), out, "--dry-run")
        ideal = arguments.runs * single / arguments.workers
        load = os.getloadavg()[0]
        print(f"one run alone                      {single:8.2f} s")
        print(f"ideal, {arguments.runs} runs on {arguments.workers} workers     {ideal:8.2f} s")
        print(f"first run's start to last's end    {last - first:8.2f} s")
        print(f"ratio                              {(last - first) / ideal:8.3f}   target 1.15")
        print(f"start-up, command to first run     {first - began:8.2f} s target 12")
        print(f"the whole command                  {whole:8.2f} s")
        print(f"again, nothing to do               {again:8.2f} s target 10")
        print(f"dry run of {arguments.planned} runs              {planned:8.2f} s target 3")
        print(f"load of the machine at the end     {load:8.2f}   on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
