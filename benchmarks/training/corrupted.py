"""The logits of a trained network on corrupted test images. Evaluation only: nothing is charged.

Corrupted images are made on the CPU from seeds of their own, so they are the same for every run
and on every device. FGSM is made from the network that is evaluated.

Source of FGSM: Goodfellow, Shlens and Szegedy, ICLR 2015, arXiv:1412.6572.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from analysis.corrupted import ATTACK, SETS
from benchmarks.data.names import Benchmark, canonical
from benchmarks.data.seeding import preserved, seed_global
from benchmarks.data.splits import NotApplicable
from benchmarks.data.streams import Rows
from benchmarks.training.errors import Interrupted, TrainingFailed
from benchmarks.training.evaluation import EVALUATION_BATCH, EVALUATION_VALUES
from benchmarks.training.precision import tf32
from benchmarks.training.progress import Progress
from methods.base import Task
from methods.medmnistc import COMMON, REGISTRY, VERSION, Settings, corrupt, smallest
from methods.naming import NamingError

KEPT = 2**28
"""Bytes of corrupted images that a process keeps for its next run; of more, none are kept."""
EPSILONS = tuple(step / 255 for step in (1, 2, 4, 8, 16))
"""Largest change of a value by FGSM, by severity."""
SAID = 10_000_000
"""Values of corrupted images from which on a note tells that the evaluation takes long."""


def settings_of(name: str, benchmark: Benchmark) -> tuple[str, dict[str, Settings]]:
    """The data set of the registry, and its corruptions, for a set and a benchmark.

    Raises:
        NamingError: the set is unknown, or has nothing for this benchmark.
    """
    if name not in SETS:
        raise NamingError(f"corruptions: expected {' or '.join(SETS)}, got {name!r}")
    if benchmark.is_table:
        raise NamingError(
            f"corruptions: they change images, but the rows of {canonical(benchmark)} are those of "
            "a table: leave them out"
        )
    if name == "common":
        return COMMON, REGISTRY[COMMON]
    if benchmark.name == COMMON or benchmark.name not in REGISTRY:
        raise NamingError(
            f"corruptions: medmnist-c has none for {canonical(benchmark)}, only for the twelve 2D "
            "sets of MedMNIST; common has some for any images"
        )
    return benchmark.name, REGISTRY[benchmark.name]


@dataclass(frozen=True)
class Test:
    """Test images (N, C, H, W) float32 on the CPU, known by their content."""

    digest: str
    x: Tensor = field(compare=False, hash=False)


def logits_on(
    network: nn.Module,
    rows: Rows,
    task: Task,
    name: str,
    benchmark: Benchmark,
    progress: Progress,
    stop: Callable[[], bool],
) -> dict[str, np.ndarray]:
    """By "SET:CORRUPTION", (severities, N, K) float32 logits on a set; and "SET:version".

    Raises:
        NotApplicable: the images are too small.
        TrainingFailed: the logits are not finite.
        Interrupted: ``stop`` returned true.
    """
    dataset, corruptions = settings_of(name, benchmark)
    shape = rows.inputs(torch.arange(1, device=rows.y.device)).shape[1:]
    if min(shape[1:]) < smallest(dataset):
        raise NotApplicable(
            f"corruptions: {name} needs images of {smallest(dataset)} pixels or more, but these "
            f"have {tuple(shape[1:])}"
        )
    size = len(rows) * shape.numel() * sum(map(len, corruptions.values()))
    if size > SAID:
        progress.note(f"evaluating {len(rows)} test images under {len(corruptions)} corruptions")
    found: dict[str, np.ndarray] = {f"{name}:version": np.array(VERSION)}
    kept = _images(_test_of(rows), dataset) if size <= KEPT else None
    device = rows.y.device
    with tf32(False), preserved(device):
        for corruption, settings in corruptions.items():
            made = []
            for place in range(len(settings)):
                if stop():
                    raise Interrupted("stopped while evaluating corrupted images")
                parts = (
                    kept[corruption][place].split(EVALUATION_BATCH)
                    if kept is not None
                    else _parts(rows, dataset, corruption, place)
                )
                made.append(_logits(network, parts, device))
            found[f"{name}:{corruption}"] = np.stack(made)
        attacked = _attacked(network, rows, task)
        if attacked is not None:
            found[f"{name}:{ATTACK}"] = attacked
    for key, logits in found.items():
        if not np.isfinite(logits).all():
            raise TrainingFailed(f"the network's logits are not finite under {key}")
    return found


def _batches(rows: Rows) -> Iterator[Tensor]:
    """Positions, fewer at a time of images above 64 pixels. Random draws depend on these."""
    one = rows.inputs(torch.arange(1, device=rows.y.device))
    size = max(1, min(EVALUATION_BATCH, EVALUATION_VALUES // one.numel()))
    yield from torch.arange(len(rows), device=rows.y.device).split(size)


def _test_of(rows: Rows) -> Test:
    x = torch.cat([rows.inputs(index).cpu() for index in _batches(rows)])
    return Test(hashlib.sha256(x.numpy().tobytes()).hexdigest(), x)


@lru_cache(maxsize=1)
def _images(test: Test, dataset: str) -> dict[str, list[Tensor]]:
    """By corruption, the images (N, C, H, W) uint8 at each severity."""
    return {
        corruption: [
            torch.cat(
                [
                    (255 * _made(x, dataset, corruption, place, part)).round().to(torch.uint8)
                    for part, x in enumerate(test.x.split(EVALUATION_BATCH))
                ]
            )
            for place in range(len(settings))
        ]
        for corruption, settings in REGISTRY[dataset].items()
    }


def _parts(rows: Rows, dataset: str, corruption: str, place: int) -> Iterator[Tensor]:
    for part, index in enumerate(_batches(rows)):
        yield _made(rows.inputs(index).cpu(), dataset, corruption, place, part)


def _made(x: Tensor, dataset: str, corruption: str, place: int, part: int) -> Tensor:
    """Images on the CPU, with random draws that depend on their place among the test rows alone."""
    seed_global(x.device, "corruption", dataset, corruption, place, part)
    settings = torch.tensor(REGISTRY[dataset][corruption][place], dtype=torch.float64)
    return corrupt(x, dataset, corruption, settings.expand(len(x), -1))


def _logits(
    network: nn.Module, parts: Iterator[Tensor] | tuple[Tensor, ...], device: torch.device
) -> np.ndarray:
    training, made = network.training, []
    network.eval()
    with torch.no_grad():
        for part in parts:
            x = part.to(device)
            x = x.float().div_(255) if x.dtype == torch.uint8 else x
            made.append(network(x).float().cpu())
    network.train(training)
    return torch.cat(made).numpy()


def _attacked(network: nn.Module, rows: Rows, task: Task) -> np.ndarray | None:
    """Logits under FGSM: a step of epsilon along the sign of the gradient of each row's loss; None
    if the network passes no gradient to its input."""
    training = network.training
    made: list[list[Tensor]] = [[] for _ in EPSILONS]
    network.eval()
    for index in _batches(rows):
        x = rows.inputs(index).detach().clone().requires_grad_()
        loss = task.losses(network(x).float(), rows.y[index]).sum()
        slope = torch.autograd.grad(loss, x, allow_unused=True)[0] if loss.requires_grad else None
        if slope is None:
            network.train(training)
            return None
        with torch.no_grad():
            for each, epsilon in zip(made, EPSILONS, strict=True):
                moved = (x + epsilon * slope.sign()).clamp(0, 1)
                each.append(network(moved).float().cpu())
    network.train(training)
    return torch.stack([torch.cat(each) for each in made]).numpy()
