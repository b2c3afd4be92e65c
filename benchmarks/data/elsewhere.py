"""Rows from elsewhere, which a method names in ``rows_from``: read, and put beside the splits."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from analysis.tasks import task_named
from benchmarks.data import folders, npz
from benchmarks.data.carving import NotApplicable
from benchmarks.data.dataset import TWICE, checked_labels
from benchmarks.data.download import DataError, md5_of, stamp_of
from benchmarks.data.layout import some
from benchmarks.data.names import Benchmark, canonical
from benchmarks.data.ondisk import OnDisk, Pixels
from benchmarks.data.splits import Splits
from benchmarks.data.streams import Rows, as_stored, shape_of, targets_of
from methods.base import Part
from methods.naming import NamingError

TRUTH = "true_labels"
"""Array of an npz file: the class that each image really shows, where it is known."""


class Elsewhere(NamedTuple):
    """Images and their labels."""

    x: Pixels
    y: np.ndarray
    """(N,) int64"""
    classes: tuple[str, ...]
    """their names, where they have any"""
    truth: np.ndarray | None


def rows_from(method: Part, dataset: str) -> str:
    """The data from elsewhere that a method draws from, with an absolute path; "" if there is none.

    Where npz names a folder, it is the file in it that is named as the data set is.

    Raises:
        DataError: it draws from several.
    """
    named = list(dict.fromkeys(part.rows_from for part in method.parts() if part.rows_from))
    if not named:
        return ""
    if len(named) > 1:
        raise DataError(f"rows come from {' and '.join(named)}: expected one of them")
    kind, _, path = named[0].partition(":")
    place = Path(path).expanduser().absolute()
    if kind == "npz" and place.is_dir():
        place = place / f"{dataset}.npz"
    return f"{kind}:{place}"


def version_of(source: str) -> int:
    """A hash of the data's files, names and bytes: part of a run's id.

    Raises:
        DataError: they cannot be read.
    """
    return _version_of(source, stamp_of(Path(source.partition(":")[2])))


@lru_cache(maxsize=8)
def _version_of(source: str, stamp: str) -> int:
    """Likewise, read once in a process as long as ``stamp`` is the same."""
    kind, _, path = source.partition(":")
    place = Path(path)
    if not place.exists():
        raise DataError(
            f"{path} does not exist: expected rows from elsewhere, as augbench generate "
            "makes them. The head of a shipped study has the command for its rows."
        )
    if kind == "npz":
        with npz.opened(place):
            return int(md5_of(place)[:12], 16)
    if not place.is_dir():
        raise DataError(f"{path} is not a folder: expected one folder per class.")
    digest = hashlib.md5(usedforsecurity=False)
    try:
        for file in sorted(each for each in place.rglob("*") if each.is_file()):
            digest.update(os.fsencode(file.relative_to(place)) + b"\0" + file.read_bytes())
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}.") from error
    return int(digest.hexdigest()[:12], 16)


def check_version(source: str, version: int) -> None:
    """Refuse data from elsewhere that are not those that a run was planned with.

    Raises:
        NamingError: they are others.
        DataError: they cannot be read.
    """
    if version_of(source) != version:
        raise NamingError(f"{source} has changed since the run was planned: start again")


@lru_cache(maxsize=2)
def _read(source: str, version: int, size: int, root: Path, memory_gib: float) -> Elsewhere:
    """The rows, read once in a process as long as ``version`` is the same."""
    kind, _, path = source.partition(":")
    if kind == "folder":
        found = folders.read(Path(path), size, None, root, memory_gib, least=1)
        if found.parts != ("",):
            raise DataError(f"{path} has splits: expected one folder per class, and no others.")
        return Elsewhere(found.x, found.y, found.classes, None)
    x, y = npz.images_only(Path(path), root, memory_gib)
    if y is None:
        raise DataError(f"{path} has no labels: expected the arrays images and labels.")
    truth = npz.array_in(Path(path), TRUTH)
    if truth is not None:
        truth = checked_labels(truth, f"{path}, {TRUTH}")
        if len(truth) != len(y):
            raise DataError(f"{path} has {len(y)} labels and {len(truth)} {TRUTH}.")
    return Elsewhere(x, y, (), truth)


def with_rows(
    splits: Splits, source: str, root: Path, benchmark: Benchmark, memory_gib: float = 4.0
) -> Splits:
    """The splits of a run on ``benchmark``, and the rows of ``source`` (npz:FILE or folder:DIR).

    Raises:
        DataError: the rows cannot be read.
        NotApplicable: they do not fit the splits: other shapes or classes.
    """
    if not source:
        return splits
    if splits.inputs or not task_named(splits.kind).exclusive:
        raise NotApplicable("rows from elsewhere are images with one label")
    channels, height, width = splits.spec.shape
    path = source.partition(":")[2]
    if source.startswith("folder:") and height != width:
        raise NotApplicable(f"{path}: images of a folder are square, these are {height} x {width}")
    found = _read(source, version_of(source), width, root, memory_gib)
    device = splits.train.y.device
    x = as_stored(found.x, device)
    shape = shape_of(x)
    if shape[1:] != (height, width) or shape[0] not in (1, channels):
        raise NotApplicable(
            f"{path}: its images have the shape {shape} (channels, height, width), those of the "
            f"data {splits.spec.shape}: convert them, or write as_rgb=true or size=N behind the "
            "name of the data"
        )
    y, truth = (_numbered(each, found, splits.classes, path) for each in (found.y, found.truth))
    assert y is not None
    where = torch.arange(len(y), device="cpu" if isinstance(x, OnDisk) else device)
    rows = Rows(x, where, targets_of(y, len(splits.classes)).to(device), channels)
    name = Path(path).name
    caveats = (*splits.caveats, *_held_out(splits, x, name), *_learned_from(path, benchmark))
    told = f"{len(y):,} rows from {name}"
    if truth is not None:
        told = f"{told}, {int((truth != y).sum()):,} of them known to have a wrong label"
    if absent := [each for number, each in enumerate(splits.classes) if number not in y]:
        told = f"{told}; none of class {some(absent)}"
    return replace(
        splits, generated=rows, truth=truth, caveats=caveats, notes=(*splits.notes, told)
    )


def _held_out(splits: Splits, x: Tensor | OnDisk, name: str) -> Iterator[str]:
    """Caveats if test or select images are among those from elsewhere; skips what is not in
    memory."""
    for split, held in (("test", splits.test), ("select", splits.select)):
        rows, where = held.x, held.where
        if not isinstance(x, Tensor) or not isinstance(rows, Tensor) or x.dtype != rows.dtype:
            continue
        known = {image.tobytes() for image in x.cpu().numpy()}
        twice = sum(image.tobytes() in known for image in rows[where].cpu().numpy())
        if twice:
            yield f"{twice} of {len(where)} {split} images are among the rows from {name} {TWICE}"


def _learned_from(path: str, benchmark: Benchmark) -> Iterator[str]:
    """A caveat if what made the rows may have seen more than the training rows of this run."""
    name, own = Path(path).name, canonical(benchmark)
    source = _made_from(Path(path))
    if source and source != own:
        yield (
            f"the rows from {name} were made from the training rows of {source}, not of {own}: "
            "test images, or labels that this run does not have, may be among those"
        )
    elif not source and (benchmark.folds or benchmark.labelled):
        differs = "folds" if benchmark.folds else "labelled"
        yield (
            f"the rows from {name} may be made from test images or from labels that this run does "
            f"not have: with {differs} the labelled rows differ from run to run"
        )


def _made_from(path: Path) -> str:
    """The benchmark that augbench generate names beside its rows; "" if it did not make them."""
    try:
        told = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    made = told.get("benchmark") if isinstance(told, dict) else None
    return made if isinstance(made, str) else ""


def _numbered(
    labels: np.ndarray | None, found: Elsewhere, classes: tuple[str, ...], path: str
) -> np.ndarray | None:
    """Labels as class numbers of the data, by the names of their classes if they have any."""
    if labels is None:
        return None
    if labels.ndim != 1 or (not found.classes and int(labels.max()) >= len(classes)):
        raise NotApplicable(
            f"{path}: expected one class number per row, from 0 to {len(classes) - 1}, got "
            f"{labels.shape[1:] or int(labels.max())}"
        )
    if not found.classes:
        return labels
    known = {name: number for number, name in enumerate(classes)}
    strange = [name for name in found.classes if name not in known]
    if strange:
        raise NotApplicable(
            f"{path}: its folder {strange[0]!r} is no class of the data, which are "
            f"{some(list(classes))}"
        )
    return np.array([known[name] for name in found.classes])[labels]
