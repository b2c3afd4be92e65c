"""The description of a data set that is printed before its first run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tabulate import tabulate

from benchmarks.data.catalogue import CATALOGUE
from benchmarks.data.dataset import MADE, Arrays, duplicates
from benchmarks.data.names import Benchmark, canonical
from benchmarks.data.ondisk import GIB, Pixels, blocks
from methods.naming import with_path

SPLITS = {"train": "train", "select": "val", "test": "test"}
"""The names of the splits in a run, and in the arrays."""
MOST_CLASSES, MOST_COLUMNS = 40, 8
"""More are summarised in one line."""
CHANGED = frozenset(
    {
        "folds",
        "rows_per_class",
        "labelled",
        "unlabelled",
        "noise",
        "imbalance",
        "meta_noise",
        "dedup",
        "rows",
    }
)
"""Arguments of a benchmark that change its rows."""


def lines(arrays: Arrays, benchmark: Benchmark, brief: bool = False) -> list[str]:
    """Classes with their rows in each split, size, range, split, duplicates, notes and caveats.

    They describe the data as stored; one line says what the name's arguments change. ``brief`` is
    for the start of a run, which prints notes and caveats itself and must not wait: it leaves them
    out, and does not compare images that take more than a GiB.
    """
    name = canonical(benchmark)
    shown = with_path(name, benchmark.path) if benchmark.path else name
    large = brief and arrays.nbytes > GIB
    twice = "not checked: over 1 GiB of data" if large else "; ".join(duplicates(arrays))
    told = [
        f"Data: {shown}, {arrays.kind}, {len(arrays.classes)} classes",
        f"  {_described(arrays, benchmark, large)}",
        *_counts(arrays),
        f"  split: {_split(arrays, benchmark)}",
        f"  exact duplicates between splits: {twice or 'none'}",
    ]
    if any(each is not None for each in _groups(arrays).values()):
        told.append(f"  patients: {_patients(arrays)}")
    changed = [
        f"{key}={value}"
        for key, value in vars(benchmark).items()
        if key in CHANGED and value != getattr(Benchmark(name=""), key)
    ]
    if changed:
        told.append(f"  applied by each run: {', '.join(changed)}")
    if not brief:
        told += [f"  note: {each}" for each in arrays.notes if each not in _made(arrays)]
        told += [f"  caveat: {each}" for each in arrays.caveats]
    return told


def _images(arrays: Arrays, split: str) -> Pixels:
    return getattr(arrays, f"{SPLITS[split]}_x")


def _labels(arrays: Arrays, split: str) -> np.ndarray:
    return getattr(arrays, f"{SPLITS[split]}_y")


def _groups(arrays: Arrays) -> dict[str, np.ndarray | None]:
    return {split: getattr(arrays, f"{own}_groups") for split, own in SPLITS.items()}


def _described(arrays: Arrays, benchmark: Benchmark, large: bool) -> str:
    if arrays.table is None:
        return f"images: {_pixels(arrays, benchmark)}{'' if large else _range(arrays)}"
    columns = arrays.table.columns
    coded = [each for each in columns if each.kind == "category"]
    levels = ", ".join(f"{each.name} {len(each.levels)}" for each in coded[:MOST_COLUMNS])
    more = f", {len(coded) - MOST_COLUMNS} more" if len(coded) > MOST_COLUMNS else ""
    gaps = sum(int(np.isnan(np.asarray(each)).sum()) for each in arrays.images)
    told = [
        f"columns: {len(columns) - len(coded)} of numbers",
        f"{len(coded)} of categories{f' ({levels}{more})' if coded else ''}",
        f"{gaps} missing value{'' if gaps == 1 else 's'}",
        f"numbers scaled by {benchmark.scale}{'s' if benchmark.scale == 'quantile' else ' score'}",
    ]
    return ", ".join(told)


def _pixels(arrays: Arrays, benchmark: Benchmark) -> str:
    x = arrays.train_x
    channels = x.shape[3] if x.ndim == 4 else 1
    colours = f"{channels} channel{'s' if channels > 1 else ''}"
    if benchmark.as_rgb and channels == 1:
        colours += " (shown to the network as 3)"
    return f"{x.shape[1]}x{x.shape[2]} pixels, {colours}, {x.dtype}"


def _range(arrays: Arrays) -> str:
    low, high = np.inf, -np.inf
    for split in SPLITS:
        for block in blocks(_images(arrays, split)):
            low, high = min(low, block.min()), max(high, block.max())
    return f" from {low:g} to {high:g}"


def _counts(arrays: Arrays) -> list[str]:
    """A table with one line per class, and one for all rows."""
    columns = {}
    for split in SPLITS:
        y = _labels(arrays, split)
        size = len(arrays.classes)
        columns[split] = y.sum(0) if y.ndim == 2 else np.bincount(y, minlength=size)
    rows: list[list[object]] = [
        [name, *(int(columns[split][k]) for split in SPLITS)]
        for k, name in enumerate(arrays.classes)
    ]
    if len(rows) > MOST_CLASSES:
        rows = [
            [f"each of {len(arrays.classes)} classes", *(_span(columns[split]) for split in SPLITS)]
        ]
    rows.append(["rows", *(len(_labels(arrays, split)) for split in SPLITS)])
    text = tabulate(
        rows, headers=["", *SPLITS], disable_numparse=True, colalign=("left", *["right"] * 3)
    )
    return [f"  {line}" for line in text.splitlines()]


def _span(counts: np.ndarray) -> str:
    return f"{counts.min()} to {counts.max()}"


def _made(arrays: Arrays) -> list[str]:
    """The notes that say how splits were made."""
    return [each for each in arrays.notes if each.startswith(MADE)]


def _split(arrays: Arrays, benchmark: Benchmark) -> str:
    made = _made(arrays)
    if benchmark.name in CATALOGUE:
        made = made or ["official" if any(CATALOGUE[benchmark.name].files.values()) else "our own"]
    return "; ".join(made) or f"as {Path(benchmark.path).name} gives it"


def _patients(arrays: Arrays) -> str:
    told = []
    for split, groups in _groups(arrays).items():
        if groups is not None:
            told.append(f"{len(np.unique(groups))} in {split}")
    return ", ".join(told)
