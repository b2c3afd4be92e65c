"""Cells recorded at an earlier commit: their ids stay, and on the same machine their bits.

A field, a preset or a check that is added leaves both as they are; what changes numbers on purpose
raises its version, which changes the ids here: then record these cells again, and say so.
``python -m tests.test_frozen`` prints them anew; ``tests/frozen.json`` holds what it printed.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from analysis import runs
from benchmarks.data import splits
from benchmarks.data.download import DataError
from benchmarks.data.names import parse_benchmark
from benchmarks.data.sources import default_root
from benchmarks.data.splits import Protocol
from benchmarks.running import disk
from benchmarks.running.disk import Options
from benchmarks.studies import cells
from benchmarks.studies.cells import Cell
from benchmarks.training import models
from benchmarks.training.machine import describe_device, installed_versions

FILE = Path(__file__).parent / "frozen.json"
DIGITS = "digits(rows_per_class=20)"
NOISY = "digits(noise=0.4, rows_per_class=20)"
FEW = "digits(labelled=4)"
FIVE = {"batch_size": 16, "steps_per_epoch": 5}


@dataclass(frozen=True, kw_only=True)
class Made:
    """A cell as a user writes it; short, so that all of them take a minute."""

    row: str
    benchmark: str = DIGITS
    model: str = "small_cnn(width=0.5)"
    protocol: Literal["equal", "paper"] = "equal"
    meta_fraction: float = 0.2
    crossfit: int = 1
    preset: str = "medmnist"
    training: dict[str, Any] = field(default_factory=dict)
    budget: str = "steps"
    seed: int = 0
    oracle_test: bool = False


CELLS = (
    Made(row="none"),
    Made(row="none", seed=1, training={"schedule": "cosine", "weight_decay": 1e-4}),
    Made(row="crop(pad=2)+flip+mixup(alpha=0.4)"),
    Made(row="cutmix", benchmark="digits(imbalance=10, imbalance_kind=stratified)"),
    Made(row="randaugment(n=1, m=5)", preset="autodo", training={"warmup_epochs": 1}),
    Made(row="trivialaugment", benchmark="digits(folds=3)", seed=2),
    Made(row="autoaugment(policy=svhn)"),
    Made(row="autoaugment(policy=faa_cifar10)"),
    Made(row="shuffled_policy(upstream=autoaugment(policy=faa_svhn))"),
    Made(row="soft_augmentation", oracle_test=True),
    Made(row="gce", benchmark="digits(noise=0.4, noise_kind=pair, rows_per_class=20)"),
    Made(row="saflex(upstream=mixup)"),
    Made(row="saflex(preset=stable, upstream=randaugment)"),
    Made(row="saflex(preset=fast)", crossfit=2),
    Made(row="saflex(upstream=mixup)", protocol="paper", benchmark="digits(rows_per_class=10)"),
    Made(row="mixup@train+meta", protocol="paper", benchmark="digits(rows_per_class=10)"),
    Made(row="l2rw", benchmark=NOISY),
    Made(row="l2rw@dirty", benchmark=NOISY),
    Made(row="meta_weight_net(upstream=flip)", benchmark=NOISY),
    Made(row="lilaw@dirty", benchmark=NOISY),
    Made(row="autodo", meta_fraction=0.3),
    Made(row="autodo(preset=exact)", benchmark=NOISY),
    Made(row="lpa3(warmup=1)"),
    Made(row="lpa3(preset=strict, warmup=1)", model="resnet18(width=0.125)"),
    Made(row="lpa3(preset=fast, warmup=1)"),
    Made(row="augmix(upstream=flip)"),
    Made(row="medaugment(level=4)"),
    Made(row="medmnistc_augment"),
    Made(row="none@train"),
    Made(row="none@meta", benchmark=NOISY),
    Made(row="none", budget="passes of saflex"),
    Made(row="shuffled_weights(upstream=saflex(preset=stable))"),
    Made(row="norm_noise(upstream=lpa3(warmup=1))"),
    Made(row="head_refit(upstream=flip)"),
    Made(row="entaugment(warmup=1)"),
    Made(row="sra(upstream=crop)"),
    Made(row="shuffled_strengths(upstream=entaugment(warmup=1))"),
    Made(row="mean_strength(upstream=sra)"),
    Made(row="isda(upstream=crop)"),
    Made(row="bsda"),
    Made(row="probe(upstream=crop)"),
    Made(row="isotropic_noise(upstream=bsda)"),
    Made(row="adaaug"),
    Made(row="madaug(preset=exact, tau=0.5, upstream=flip)"),
    Made(row="shuffled_policies(upstream=adaaug)"),
    Made(row="saflex(upstream=generated(data='npz:rows.npz', share=1.0))"),
    Made(row="none", benchmark="breastmnist", model="resnet18(width=0.125)"),
    Made(row="none", benchmark="pneumoniamnist(size=64, as_rgb=True)", model="resnet18"),
    Made(row="fixmatch(upstream=crop)", benchmark=FEW, training={**FIVE, "ema": 0.9}),
    Made(
        row="fixmatch(attack=lpa3(preset=code, ratio=0.9, warmup=1), threshold=0.2, "
        "attack_threshold=0.1)",
        benchmark=FEW,
        training=FIVE,
    ),
    Made(
        row="fixmatch(attack=lpa3(preset=fast, ratio=0.3, warmup=1), attack_sure=true, "
        "attack_threshold=0.1)",
        benchmark=FEW,
        training=FIVE,
    ),
    Made(row="pseudo_label(upstream=fixmatch(threshold=0.2))", benchmark=FEW, training=FIVE),
    Made(row="mixmatch(upstream=crop)", benchmark=FEW, training=FIVE),
    Made(row="mean_teacher(keep=0.9, upstream=crop)", benchmark=FEW, training=FIVE),
)
NOT_TRAINED = {"pneumoniamnist(size=64, as_rgb=True)"}
"""It is looked at for its id alone, which the catalogue's checksum gives."""
CHECKSUMS = {"pneumoniamnist(size=64, as_rgb=True)": "8f4eceb4ccffa70c672198ea285246c6"}


@contextmanager
def rows_beside(folder: Path) -> Iterator[None]:
    """In this folder, with the file of rows from elsewhere that a cell names."""
    given = np.arange(60 * 28 * 28, dtype=np.uint32)
    x = (given * 2654435761 >> 24).astype(np.uint8).reshape(60, 28, 28)  # Knuth's, of 32 bits
    np.savez(folder / "rows.npz", images=x, labels=np.arange(60) % 10)
    with chdir(folder):
        yield


@pytest.fixture(autouse=True)
def _beside(tmp_path: Path) -> Iterator[None]:
    with rows_beside(tmp_path):
        yield


def cell_of(made: Made) -> Cell:
    """The cell, with two epochs; a row of another budget has three."""
    benchmark = parse_benchmark(made.benchmark)
    protocol = Protocol(
        name=made.protocol, meta_fraction=made.meta_fraction, crossfit=made.crossfit
    )
    row = cells.parse_row(made.row, protocol)
    if made.budget != "steps":
        row = replace(row, budget=made.budget, epochs=3)
    training = {"epochs": 2, "batch_size": 64, "channels_last": False, **made.training}
    checksum = CHECKSUMS.get(made.benchmark)
    if checksum is None:
        checksum = splits.arrays_of(benchmark, default_root()).checksum
    return cells.make_cell(
        row,
        benchmark,
        models.canonical(made.model),
        cells.training_of(made.preset, training),
        protocol,
        made.seed,
        checksum=checksum,
        oracle_test=made.oracle_test,
        preset=made.preset,
    )


def trained(cell: Cell, root: Path) -> str:
    """A hash of all numbers of the run that the machine decides: lines and predictions."""
    options = Options(data_root=default_root())
    status = disk.execute(cell.run, cell.recorded, root, options, cell.benchmark)
    assert status.state == "done", status
    folder = runs.folder_of(root, cell.run)
    digest = hashlib.sha256((folder / "metrics.jsonl").read_bytes())
    for name, array in sorted(runs.read_arrays(folder / "predictions.npz").items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    metrics = runs.read_result(folder) or {}
    digest.update(runs.to_json(metrics["metrics"]).encode())
    return digest.hexdigest()[:32]


def machine() -> dict[str, str]:
    """What decides the bits beside the code: processor, kernels and libraries."""
    flags = ""
    path = Path("/proc/cpuinfo")
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines()
        flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    kernels = {
        name: os.environ.get(name, "") for name in ("OPENBLAS_CORETYPE", "ATEN_CPU_CAPABILITY")
    }
    versions = installed_versions()
    return {
        "system": platform.system(),
        "processor": describe_device(torch.device("cpu"))["name"],
        "flags": hashlib.sha256(flags.encode()).hexdigest()[:16],
        "kernels": torch.backends.cpu.get_cpu_capability(),
        **kernels,
        **{name: versions[name] for name in versions if name not in ("augbench", "python")},
    }


@cache
def recorded() -> dict[str, Any]:
    return json.loads(FILE.read_text(encoding="utf-8"))


def name_of(made: Made) -> str:
    default = Made(row="none")
    return ", ".join(
        str(value)
        for key, value in vars(made).items()
        if key == "row" or value != vars(default)[key]
    )


def available(made: Made) -> Cell:
    if "AUGBENCH_DATA" not in os.environ and not made.benchmark.startswith("digits"):
        pytest.skip("AUGBENCH_DATA is not set: this cell is of a real data set")
    try:
        return cell_of(made)
    except DataError as error:
        pytest.skip(str(error))


def test_the_file_holds_these_cells() -> None:
    assert list(recorded()["cells"]) == [name_of(made) for made in CELLS]


@pytest.mark.parametrize("made", CELLS, ids=name_of)
def test_the_id_is_that_of_the_recorded_commit(made: Made) -> None:
    assert available(made).run.id == recorded()["cells"][name_of(made)]["id"]


@pytest.mark.parametrize("made", [m for m in CELLS if m.benchmark not in NOT_TRAINED], ids=name_of)
def test_the_bits_are_those_of_the_recorded_commit(made: Made, tmp_path: Path) -> None:
    cell, here, there = available(made), machine(), recorded()["machine"]
    other = [
        f"{key} {here.get(key)!r}, recorded {there[key]!r}"
        for key in there
        if here.get(key) != there[key]
    ]
    if other:
        pytest.skip(f"recorded on another machine or with other versions: {'; '.join(other)}")
    assert trained(cell, tmp_path) == recorded()["cells"][name_of(made)]["bits"]


def record() -> dict[str, Any]:
    """All cells, carried out here and now."""
    torch.set_num_threads(1)
    found = {}
    for made in CELLS:
        with tempfile.TemporaryDirectory() as folder, rows_beside(Path(folder)):
            cell = cell_of(made)
            bits = "" if made.benchmark in NOT_TRAINED else trained(cell, Path(folder))
        found[name_of(made)] = {"id": cell.run.id, "bits": bits}
    return {"machine": machine(), "cells": found}


if __name__ == "__main__":
    print(json.dumps(record(), indent=1))
