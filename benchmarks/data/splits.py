"""From a data set to the splits that a run is trained and evaluated on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from analysis.tasks import task_named
from benchmarks.data import dataset, sources
from benchmarks.data.carving import (
    NotApplicable,
    carve,
    cross_validated,
    stratified_folds,
)
from benchmarks.data.corruption import Part, changes, imbalanced, noisy_labels, record
from benchmarks.data.dataset import Arrays
from benchmarks.data.download import stamp_of
from benchmarks.data.names import Benchmark
from benchmarks.data.ondisk import OnDisk, joined
from benchmarks.data.preparing import Fitted, fit, prepared
from benchmarks.data.seeding import seed_of
from benchmarks.data.streams import Rows, as_stored, rows_of, shape_of, targets_of
from benchmarks.data.table_catalogue import Reading
from methods.base import Input, Spec

Control = Literal["all", "train", "train+meta", "meta"]
"""Which labelled rows a run trains on; all but "all" are control rows."""


@dataclass(frozen=True, eq=False)
class Splits:
    """The data of one run: training rows, meta rows, and rows for evaluation."""

    train: Rows
    meta: Rows | None
    select: Rows
    test: Rows
    kind: str
    classes: tuple[str, ...]
    pool: int
    """Rows of the whole labelled pool; they set the steps of an epoch."""
    folds: tuple[Tensor, ...] = ()
    """Crossfit: positions in ``train`` that are meta, or held out, in epoch e mod K."""
    select_trained: bool = False
    """Whether rows of the select split were used for training."""
    corruption: dict[str, Any] | None = None
    corrupted: dict[str, np.ndarray] | None = None
    """``rows`` (positions in train), ``before`` and ``after`` (labels) of the noisy ones, and
    ``stored_rows``, the rows of the official train split (behind them the val split, with
    folds the test split too) trained on."""
    caveats: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    test_groups: np.ndarray | None = None
    """(N,) int64, equal for test rows of one patient; None if patients are unknown"""
    groups: dict[str, int] | None = None
    """How many there are in train, meta, select and test, for result.json"""
    inputs: tuple[Input, ...] = ()
    """What a row consists of; empty for images"""
    unlabelled: Rows | None = None
    """Rows whose targets are all 0: their labels are not even here"""
    generated: Rows | None = None
    """Rows from elsewhere"""
    truth: np.ndarray | None = None
    """(N,) int64, the class that each row from elsewhere really shows, where it is known"""

    @property
    def more(self) -> dict[str, Rows]:
        """Rows beside the training rows that have numbers of their own, in their order."""
        found = {"unlabelled": self.unlabelled, "generated": self.generated}
        return {name: rows for name, rows in found.items() if rows is not None}

    @property
    def spec(self) -> Spec:
        """What a method may know about the data."""
        rows = len(self.train) + sum(map(len, self.more.values()))
        classes = len(self.classes)
        if not self.inputs:
            shape = (self.train.channels, *shape_of(self.train.x)[1:])
            return Spec(rows=rows, classes=classes, shape=shape)
        first, more = self.inputs[0], self.inputs[1:]
        return Spec(
            rows, classes, first.shape, first.kind, first.low, first.high, first.categories, more
        )

    @staticmethod
    def from_arrays(
        train: tuple[np.ndarray, np.ndarray],
        select: tuple[np.ndarray, np.ndarray],
        test: tuple[np.ndarray, np.ndarray],
        *,
        groups: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None,
        meta_fraction: float = 0.0,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> Splits:
        """Splits of a user's own (images, labels): uint8 (N, H, W) or (N, H, W, C), int (N,).

        ``groups`` of train, select and test (N,), numbers or strings, are equal for images of one
        patient. With ``meta_fraction`` that share of the training rows becomes the meta split, in
        whole groups if they are given.

        Raises:
            DataError: labels, groups or shapes that do not fit together.
            NotApplicable: too few rows of a class for the meta split.
        """
        arrays = dataset.from_arrays("arrays", train, select, test, groups)
        protocol = Protocol(meta_fraction=meta_fraction or 0.2)
        return make_splits(
            arrays,
            Benchmark(name="arrays"),
            protocol,
            needs_meta=meta_fraction > 0,
            seed=seed,
            device=torch.device(device),
        )


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Which labelled images every row of a table may use."""

    name: Literal["equal", "paper"] = "equal"
    meta_fraction: float = 0.2
    crossfit: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.meta_fraction < 1:
            raise ValueError(f"meta_fraction: expected a share in (0, 1), got {self.meta_fraction}")
        if self.crossfit < 1:
            raise ValueError(
                f"crossfit: expected 1 (off) or a number of folds, got {self.crossfit}"
            )
        if self.crossfit > 1 and self.name == "paper":
            raise ValueError("crossfit: meta rows are fixed in the protocol paper; use equal")


def arrays_of(
    benchmark: Benchmark,
    root: Path,
    allow_unverified: bool = False,
    memory_gib: float = 4.0,
    download: bool = True,
) -> Arrays:
    """The data set as stored; read once in a process, a user's own again where they have changed.

    Raises:
        DataError: it is missing, damaged, or cannot be read.
    """
    own = [path for path in (benchmark.path, benchmark.unlabelled.partition(":")[2]) if path]
    stamp = "".join(stamp_of(Path(path)) for path in own)
    return _arrays(*stored(benchmark), stamp, root, allow_unverified, memory_gib, download)


Stored = tuple[str, int, str, int | str | None, Reading | None, tuple[str, bool] | None]
"""Name, size, path, groups and reading of a data set, and where unlabelled images come from."""


def stored(benchmark: Benchmark) -> Stored:
    """What determines the stored arrays of a benchmark; benchmarks that agree in it share them."""
    reading = benchmark.reading if benchmark.is_table else None
    more = (benchmark.unlabelled, benchmark.as_rgb) if benchmark.unlabelled else None
    return benchmark.name, benchmark.size, benchmark.path, benchmark.groups, reading, more


@lru_cache(maxsize=2)
def _arrays(
    name: str,
    size: int,
    path: str,
    groups: int | str | None,
    reading: Reading | None,
    unlabelled: tuple[str, bool] | None,
    stamp: str,
    root: Path,
    allow_unverified: bool,
    memory_gib: float,
    download: bool,
) -> Arrays:
    if unlabelled is not None:
        more = (stamp, root, allow_unverified, memory_gib, download)
        arrays = _arrays(name, size, path, groups, reading, None, *more)
        return sources.with_unlabelled(arrays, *unlabelled, root, memory_gib)
    return sources.load(
        name,
        size=size,
        path=path or None,
        groups=groups,
        root=root,
        allow_unverified=allow_unverified,
        memory_gib=memory_gib,
        download=download,
        reading=reading,
    )


def make_splits(
    arrays: Arrays,
    benchmark: Benchmark,
    protocol: Protocol,
    *,
    needs_meta: bool,
    seed: int,
    device: torch.device,
    control: Control = "all",
) -> Splits:
    """The splits of one run; a function of the seed, never of the method.

    Where the arrays have groups, all rows of a patient are on one side of every cut made here.

    Raises:
        NotApplicable: too few rows or patients of a class for the meta split, or a corruption that
            is not defined for the task; the message is the reason.
    """
    classes, inputs = len(arrays.classes), ()
    arrays, origin, kept = _cut(arrays, benchmark, seed)
    if arrays.table is not None:
        arrays, inputs = prepared(arrays, kept, benchmark.scale)
    uses_meta = needs_meta or control in ("train", "meta")
    pool = _pool(arrays, kept, benchmark, protocol, seed, uses_meta)
    trained = pool.trained(control, needs_meta)
    meta = (trained if pool.shared else pool.meta) if needs_meta else None

    images = as_stored(arrays.train_x, device), as_stored(arrays.val_x, device)
    test_images = as_stored(arrays.test_x, device)
    channels = 3 if benchmark.as_rgb else shape_of(images[0])[0]

    def rows(part: Part, images: tuple[Tensor | OnDisk, ...] = images) -> Rows:
        return _rows(part, images, channels, classes, device)

    train_rows = rows(trained)
    meta_rows = None if meta is None else train_rows if pool.shared else rows(meta)
    select_part = _untouched(arrays.val_y, len(arrays.train_y))
    notes, unlabelled = arrays.notes, None
    if arrays.unlabelled_x is not None:
        shape = (channels, *shape_of(images[0])[1:])
        unlabelled = rows_of(arrays.unlabelled_x, shape, classes, device)
    elif benchmark.labelled:
        nothing = np.zeros(len(pool.unlabelled), np.int64)
        blind = rows(Part(pool.unlabelled, nothing, nothing))
        unlabelled = replace(blind, y=torch.zeros_like(blind.y))
    if benchmark.labelled:
        few = _few(arrays.val_y, benchmark.labelled, seed_of(seed, "select rows"))
        select_part = Part(*(each[few] for each in vars(select_part).values()))
        told = (
            f"{len(trained.where)} labelled rows, {len(unlabelled or ()):,} unlabelled; the select "
            f"split is cut to {len(few)} rows, as many of each class as are labelled"
        )
        notes = (*notes, told)
    elif benchmark.rows_per_class and protocol.name == "equal":
        notes = (*notes, *_more_to_select(select_part.given, pool.whole.given, classes))
    corrupts = benchmark.corrupts
    return Splits(
        train=train_rows,
        meta=meta_rows,
        select=rows(select_part),
        test=rows(_untouched(arrays.test_y), (test_images, test_images)),
        kind=arrays.kind,
        classes=arrays.classes,
        pool=len(pool.whole.where),
        folds=tuple(torch.from_numpy(fold).to(device) for fold in pool.folds),
        select_trained=protocol.name == "paper" and (needs_meta or "meta" in control),
        corruption=record(benchmark, classes, pool.train, pool.meta) if corrupts else None,
        corrupted=changes(trained, origin) if corrupts else None,
        caveats=arrays.caveats,
        notes=notes,
        test_groups=arrays.test_groups,
        groups=_counted(arrays, trained, meta, select_part),
        inputs=inputs,
        unlabelled=unlabelled,
    )


def _cut(
    arrays: Arrays, benchmark: Benchmark, seed: int
) -> tuple[Arrays, np.ndarray | None, np.ndarray]:
    """The arrays with the folds of a seed, the stored rows then, and the train rows used."""
    origin = None
    if benchmark.folds:
        arrays, origin = cross_validated(arrays, benchmark.folds, seed, benchmark.groups == 0)
    return arrays, origin, _subset(arrays, benchmark.rows_per_class)


def left_over(arrays: Arrays, benchmark: Benchmark) -> tuple[np.ndarray, np.ndarray]:
    """The training images that ``rows_per_class`` leaves out, as stored, and their labels."""
    others = np.setdiff1d(np.arange(len(arrays.train_y)), _subset(arrays, benchmark.rows_per_class))
    return np.asarray(arrays.train_x[others]), arrays.train_y[others]


def refitted(arrays: Arrays, benchmark: Benchmark, seed: int) -> Fitted:
    """The preprocessing of a table as in the runs of a seed."""
    arrays, _, kept = _cut(arrays, benchmark, seed)
    assert arrays.table is not None
    return fit(arrays.train_x[kept], arrays.table, benchmark.scale)


@dataclass(frozen=True, eq=False)
class _Pool:
    """The labelled rows of a table, in the parts of which its rows are made."""

    train: Part
    """what is trained on beside meta rows"""
    meta: Part
    whole: Part
    """what a method without meta rows trains on"""
    folds: list[np.ndarray]
    """crossfit: positions in ``train``"""
    unlabelled: np.ndarray
    """stored rows whose labels are not used"""

    @property
    def shared(self) -> bool:
        """Whether meta rows are those trained on: in crossfit, and where few rows have labels."""
        return bool(self.folds or len(self.unlabelled))

    def trained(self, control: Control, needs_meta: bool) -> Part:
        if control == "all" or len(self.unlabelled):
            return self.train if needs_meta else self.whole
        if control == "train+meta":
            return _joined(self.train, self.meta)
        return self.meta if control == "meta" and not self.folds else self.train


def _pool(
    arrays: Arrays,
    kept: np.ndarray,
    benchmark: Benchmark,
    protocol: Protocol,
    seed: int,
    uses_meta: bool,
) -> _Pool:
    """The labelled rows of a seed, cut and corrupted."""
    classes, task = len(arrays.classes), task_named(arrays.kind)
    labels = arrays.train_y[kept]
    groups = None if arrays.train_groups is None else arrays.train_groups[kept]
    if benchmark.corrupts and not task.exclusive:
        raise NotApplicable("label noise and imbalance are not defined for multi-label data")
    if benchmark.corrupts and protocol.crossfit > 1:
        raise NotApplicable("crossfit trains on every row, so its meta rows cannot stay clean")
    if benchmark.labelled:
        return _few_labels(labels, kept, benchmark.labelled, protocol, task.exclusive, seed)
    strata = task.strata(labels, classes)
    train, meta = np.arange(len(kept)), np.empty(0, np.int64)
    if protocol.name == "equal" and protocol.crossfit == 1:
        train, meta, reason = carve(strata, protocol.meta_fraction, seed, groups=groups)
        if reason and uses_meta:
            raise NotApplicable(reason)
    train = imbalanced(train, labels, classes, benchmark, seed)

    def noisy(clean: np.ndarray, share: float, purpose: str) -> np.ndarray:
        return noisy_labels(clean, classes, benchmark, share, seed, purpose)

    train_part = Part(kept[train], labels[train], noisy(labels[train], benchmark.noise, "noise"))
    where, clean = kept[meta], labels[meta]
    if protocol.name == "paper":
        where, clean = len(arrays.train_y) + np.arange(len(arrays.val_y)), arrays.val_y
    meta_part = Part(where, clean, noisy(clean, benchmark.meta_noise, "meta noise"))
    whole = train_part if protocol.name == "paper" else _joined(train_part, meta_part)
    folds = []
    if protocol.crossfit > 1 and uses_meta:
        folds = stratified_folds(strata, protocol.crossfit, seed, "crossfit", groups)
    return _Pool(train_part, meta_part, whole, folds, np.empty(0, np.int64))


def _few_labels(
    labels: np.ndarray, kept: np.ndarray, count: int, protocol: Protocol, exclusive: bool, seed: int
) -> _Pool:
    """A pool of which ``count`` rows of each class have labels, drawn by the run's seed.

    All methods train on these and on no other labels, so meta rows are the same rows.
    """
    if not exclusive:
        raise NotApplicable("labelled is not defined for multi-label data")
    if protocol.name == "paper" or protocol.crossfit > 1:
        raise NotApplicable("labelled: meta rows are the labelled rows, so it has no protocols")
    found = np.unique(labels, return_counts=True)[1]
    if found.min() <= count:
        raise NotApplicable(
            f"labelled={count}: a class has {found.min()} rows, and one or more must be unlabelled"
        )
    chosen = _few(labels, count, seed_of(seed, "labelled rows"))
    part = Part(kept[chosen], labels[chosen], labels[chosen])
    return _Pool(part, part, part, [], np.delete(kept, chosen))


def _few(labels: np.ndarray, count: int, drawn: int) -> np.ndarray:
    """Positions of ``count`` rows of each class, all rows of a class that has fewer; seeded."""
    rng = np.random.default_rng(drawn)
    found = (np.flatnonzero(labels == label) for label in np.unique(labels))
    return np.sort(np.concatenate([rng.permutation(rows)[:count] for rows in found]))


def _more_to_select(select: np.ndarray, pool: np.ndarray, classes: int) -> list[str]:
    """A note if the select split has more rows of a class than the labelled pool."""
    ours, theirs = (np.bincount(labels, minlength=classes) for labels in (pool, select))
    if not (theirs > ours).any():
        return []
    label = int((theirs - ours).argmax())
    return [
        f"the select split has {theirs[label]} rows of a class of which the pool has "
        f"{ours[label]}: it chooses epochs and hyper-parameters by more labels than there are to "
        "learn from (with labelled=N in place of rows_per_class=N it is cut)"
    ]


def _untouched(labels: np.ndarray, behind: int = 0) -> Part:
    """All rows of a split as stored, counted behind so many others."""
    return Part(behind + np.arange(len(labels)), labels, labels)


def _counted(arrays: Arrays, train: Part, meta: Part | None, select: Part) -> dict[str, int] | None:
    """Groups among these rows of train and behind them val, and in test, where known."""
    if arrays.groups is None:
        return None
    of_train, of_val, of_test = arrays.groups
    both = np.concatenate([of_train, of_val])
    of_meta = both[:0] if meta is None else both[meta.where]
    of_select = both[select.where]
    sides = {"train": both[train.where], "meta": of_meta, "select": of_select, "test": of_test}
    return {name: len(np.unique(each)) for name, each in sides.items()}


def _joined(one: Part, other: Part) -> Part:
    """Both, in the order of the stored rows: what is trained on does not tell how it was cut."""
    where = np.concatenate([one.where, other.where])
    order = np.argsort(where, kind="stable")
    clean, given = (
        np.concatenate(pair)[order] for pair in ((one.clean, other.clean), (one.given, other.given))
    )
    return Part(where[order], clean, given)


def _rows(
    part: Part,
    images: tuple[Tensor | OnDisk, ...],
    channels: int,
    classes: int,
    device: torch.device,
) -> Rows:
    """Rows of the train images, of the val images, or of both without a copy of either."""
    x, other = images
    where = torch.from_numpy(np.ascontiguousarray(part.where, dtype=np.int64))
    more = None
    if x is not other and len(where) and int(where.max()) >= len(x):
        if int(where.min()) >= len(x):
            x, where = other, where - len(x)
        elif isinstance(x, OnDisk) and isinstance(other, OnDisk):
            x = joined([x, other])
        elif isinstance(other, Tensor):
            more = other
    y = targets_of(part.given, classes).to(device)
    where = where if isinstance(x, OnDisk) else where.to(device)
    return Rows(x, where, y, channels, more)


def _subset(arrays: Arrays, rows_per_class: int) -> np.ndarray:
    """Training rows that are used, in their order; the same for every run, but for folds."""
    if not rows_per_class:
        return np.arange(len(arrays.train_y))
    if not task_named(arrays.kind).exclusive:
        raise NotApplicable("rows_per_class is not defined for multi-label data")
    counts = np.bincount(arrays.train_y, minlength=len(arrays.classes))
    if counts.min() < rows_per_class:
        raise NotApplicable(
            f"rows_per_class={rows_per_class}: class {counts.argmin()} has {counts.min()} rows"
        )
    return _few(arrays.train_y, rows_per_class, seed_of(0, "rows per class"))
