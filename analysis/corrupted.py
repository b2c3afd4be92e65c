"""Scores on corrupted test images, from the logits of a run. Needs neither torch nor ray.

``corrupted.npz`` in a run's directory has, for each set of corruptions that the run was evaluated
on, "SET:CORRUPTION" (severities, N, K) float32 logits of the last epoch, in the order of the
targets in predictions.npz, and "SET:version" of the images.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from analysis import metrics, runs
from analysis.metrics import Floats

FILE = "corrupted.npz"
KEY, FAILED = "corrupted", "corrupted_failed"
"""In a run's result: by set, its version with the scores, or with why it was not evaluated."""
SETS = ("medmnist-c", "common")
ATTACK = "fgsm"
"""An attack on the network itself, stored as one more corruption, and never in a mean over them."""


def has(folder: Path, name: str, version: int) -> bool:
    """Whether a run was evaluated on a set of corruptions of this version, or could not be.

    By its result, which is written last: the file alone may be of an evaluation that was killed.
    """
    result = runs.read_result(folder) or {}
    if result.get(FAILED, {}).get(name, {}).get("version") == version:
        return True
    found = result.get(KEY, {}).get(name, {})
    return found.get("version") == version and FILE in result["files"]


def failed(folder: Path, name: str) -> bool:
    """Whether a run is done, but could not be evaluated on a set of corruptions."""
    return bool(name) and name in (runs.read_result(folder) or {}).get(FAILED, {})


def forget_failure(folder: Path, name: str) -> None:
    """Let a finished run be evaluated again on a set on which it could not be."""
    result = runs.read_result(folder)
    if result is not None and result.get(FAILED, {}).pop(name, None):
        runs.write_text(folder / "result.json", runs.to_json(result) + "\n")


def stored(folder: Path, version: int) -> dict[str, NDArray]:
    """The logits of a finished evaluation, on the sets of this version; empty if unreadable."""
    result = runs.read_result(folder) or {}
    kept = {name for name, each in result.get(KEY, {}).items() if each["version"] == version}
    if FILE not in result.get("files", {}):
        return {}
    try:
        arrays = runs.read_arrays(folder / FILE)
    except (*runs.UNREADABLE, EOFError, BadZipFile, zlib.error):
        return {}
    return {key: each for key, each in arrays.items() if key.partition(":")[0] in kept}


def scores(
    arrays: Mapping[str, NDArray], name: str, targets: NDArray, kind: str
) -> dict[str, dict[str, list[float]]]:
    """By corruption of a set, each score at each severity."""
    found: dict[str, dict[str, list[float]]] = {}
    for key, logits in arrays.items():
        of, _, corruption = key.partition(":")
        if of != name or corruption == "version":
            continue
        each = [metrics.evaluate(one, targets, kind) for one in logits]
        found[corruption] = {
            "accuracy": [_float(one["accuracy"]) for one in each],
            "auc": [_float(one["auc"]) for one in each],
            "balanced_error": [1 - _float(one["balanced_accuracy"]) for one in each],
        }
    return found


def _float(value: float | list[float]) -> float:
    return float(np.mean(value))


def set_of(result: Mapping[str, Any]) -> str:
    """The set of corruptions of a run; if there are two, the first of ``SETS``."""
    known = result.get(KEY, {})
    return next((name for name in SETS if name in known), "")


def rescored(result: Mapping[str, Any], arrays: Mapping[str, NDArray], targets: NDArray) -> Any:
    """The scores of a result, computed again from its logits."""
    kind = result["data"]["kind"]
    return {
        name: {**each, "scores": scores(arrays, name, targets, kind)}
        for name, each in result.get(KEY, {}).items()
    }


def table_of(result: Mapping[str, Any]) -> dict[str, dict[str, list[float]]]:
    """By corruption, each score at each severity; empty if the run has none."""
    name = set_of(result)
    return runs.with_nan(result[KEY][name]["scores"]) if name else {}


def lines(result: Mapping[str, Any]) -> Iterator[tuple[str, str, float]]:
    """Every score of every set: "SET:CORRUPTION:SEVERITY", the name of the score, and its value."""
    for of, stored in runs.with_nan(result.get(KEY, {})).items():
        for corruption, found in stored["scores"].items():
            for name, values in found.items():
                for severity, value in enumerate(values, start=1):
                    yield f"{of}:{corruption}:{severity}", name, float(value)


def mean(result: Mapping[str, Any], corruption: str, score: str) -> float:
    """A score under a corruption, over its severities; nan if the run has none."""
    found = table_of(result).get(corruption)
    return float(np.mean(found[score])) if found else float("nan")


def value(result: Mapping[str, Any], name: str) -> float:
    """A metric of ``ON_CORRUPTED``; nan if the run was not evaluated on corrupted images."""
    found = table_of(result)
    if name == "attacked_accuracy":
        return mean(result, ATTACK, "accuracy")
    names = [each for each in found if each != ATTACK]
    if not names:
        return float("nan")
    score = "balanced_error" if name.endswith("error") else name.removeprefix("corrupted_")
    average = float(np.mean([mean(result, each, score) for each in names]))
    return average - clean_error(result) if name == "relative_balanced_error" else average


def clean_error(result: Mapping[str, Any]) -> float:
    """The balanced error on the clean test images."""
    balanced = result["metrics"]["last"]["test"].get("balanced_accuracy")
    return float("nan") if balanced is None else 1 - float(balanced)


def item_values(
    arrays: Mapping[str, NDArray], result: Mapping[str, Any], clean: NDArray, targets: NDArray,
    name: str,
) -> Floats:  # fmt: skip
    """(N,) values of the test images whose mean is a metric of ``ON_CORRUPTED``.

    ``clean`` are the logits on clean images. An image's value is its mean over severities and
    corruptions, so that the images, not their corrupted copies, are what is sampled.

    Raises:
        KeyError: the file lacks a corruption of the result.
    """
    kind, of = result["data"]["kind"], set_of(result)
    attack = name == "attacked_accuracy"
    names = [each for each in table_of(result) if (each == ATTACK) == attack]
    made = []
    for each in names:
        logits = arrays[f"{of}:{each}"]
        made.append(np.mean([_items(one, targets, kind, name) for one in logits], axis=0))
    values = np.mean(made, axis=0)
    return values - _items(clean, targets, kind, name) if name.startswith("relative") else values


def _items(logits: NDArray, targets: NDArray, kind: str, name: str) -> Floats:
    if name.endswith("error"):
        return 1 - metrics.item_values(logits, targets, kind, "balanced_accuracy")
    return metrics.item_values(logits, targets, kind, name.rpartition("_")[2])
