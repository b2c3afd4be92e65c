"""From a data set to the splits that a run trains and is judged on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from benchmarks.data import cutting, dataset, sources
from benchmarks.data.catalogue import PREVALENCE
from benchmarks.data.corruption import Part, changes, imbalanced, noisy_labels, record
from benchmarks.data.dataset import GIB, Arrays
from benchmarks.data.names import Benchmark
from benchmarks.data.seeding import seed_of
from benchmarks.data.streams import Rows, strata_of, targets_of, tensor_of
from methods.base import Spec

Control = Literal["all", "train", "train+meta", "meta"]
"""Which labelled rows a run trains on; all but "all" are control rows."""
MIN_META_ROWS = 5
"""Rows of each class that the meta split, and what is left to train on, need at least."""
SELECT_SHARE = 1 / 8
"""Of the rows that a fold leaves: with five folds 70 % train, 10 % select and 20 % test."""


class NotApplicable(Exception):
    """A run that cannot be done on these data; the message is the reason that the user sees."""


@dataclass(frozen=True, eq=False)
class Splits:
    """What one run sees: the rows it trains on, its meta rows, and those that judge it."""

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
    """Whether rows of the select split trained anything."""
    corruption: dict[str, Any] | None = None
    corrupted: dict[str, np.ndarray] | None = None
    """``rows`` (positions in train), ``before`` and ``after`` (labels) of the noisy ones, and
    ``stored_rows``, the rows of the official train split (behind them the val split, with
    folds the test split too) trained on."""
    caveats: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    test_groups: np.ndarray | None = None
    """(N,) int64, equal for test rows of one patient; None where nothing is known of patients"""
    groups: dict[str, int] | None = None
    """How many there are in train, meta, select and test, for result.json"""

    @property
    def spec(self) -> Spec:
        """What a method may know of the data."""
        shape = (self.train.channels, *self.train.x.shape[2:])
        return Spec(rows=len(self.train), classes=len(self.classes), shape=shape)

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

        ``groups`` of train, select and test (N,) are equal for images of one patient, be they
        numbers or text. With ``meta_fraction`` that share of the training rows becomes the meta
        split, of whole groups where they are given.

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
    """Which labelled rows every row of a table may use (design: equal labels)."""

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
            raise ValueError("crossfit: the paper protocol has its meta rows fixed; use equal")


def arrays_of(
    benchmark: Benchmark,
    root: Path,
    allow_unverified: bool = False,
    memory_gib: float = 4.0,
    download: bool = True,
) -> Arrays:
    """The data set as stored; read once in a process.

    Raises:
        DataError: it is not there, not what it should be, or cannot be read.
    """
    return _arrays(*stored(benchmark), root, allow_unverified, memory_gib, download)


def stored(benchmark: Benchmark) -> tuple[str, int, str, int | str | None]:
    """What decides the arrays of a benchmark as stored: two that agree in it share them."""
    return benchmark.name, benchmark.size, benchmark.path, benchmark.groups


@lru_cache(maxsize=2)
def _arrays(
    name: str,
    size: int,
    path: str,
    groups: int | str | None,
    root: Path,
    allow_unverified: bool,
    memory_gib: float,
    download: bool,
) -> Arrays:
    return sources.load(
        name,
        size=size,
        path=path or None,
        groups=groups,
        root=root,
        allow_unverified=allow_unverified,
        memory_gib=memory_gib,
        download=download,
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
    classes = len(arrays.classes)
    origin = None
    if benchmark.folds:
        independent = benchmark.groups == 0
        arrays, origin = _cross_validated(arrays, benchmark.folds, seed, independent)
    kept = _subset(arrays, benchmark.rows_per_class)
    labels = arrays.train_y[kept]
    groups = None if arrays.train_groups is None else arrays.train_groups[kept]
    corrupts = benchmark.corrupts
    if corrupts and labels.ndim > 1:
        raise NotApplicable("label noise and imbalance are not defined for several labels a row")
    uses_meta = needs_meta or control in ("train", "meta")
    if protocol.name == "paper":
        train, meta = np.arange(len(kept)), np.empty(0, np.int64)
    elif protocol.crossfit > 1:
        if corrupts:
            raise NotApplicable("crossfit trains on every row, so its meta rows cannot stay clean")
        train, meta = np.arange(len(kept)), np.empty(0, np.int64)
    else:
        strata = strata_of(labels, classes)
        train, meta, reason = carve(strata, protocol.meta_fraction, seed, groups=groups)
        if reason and uses_meta:
            raise NotApplicable(reason)
    train = imbalanced(train, labels, classes, benchmark, seed)

    def noisy(clean: np.ndarray, share: float, purpose: str) -> np.ndarray:
        return noisy_labels(clean, classes, benchmark, share, seed, purpose)

    train_part = Part(kept[train], labels[train], noisy(labels[train], benchmark.noise, "noise"))
    if protocol.name == "paper":
        where, clean = len(arrays.train_y) + np.arange(len(arrays.val_y)), arrays.val_y
    else:
        where, clean = kept[meta], labels[meta]
    meta_part = Part(where, clean, noisy(clean, benchmark.meta_noise, "meta noise"))
    whole = train_part if protocol.name == "paper" else _joined(train_part, meta_part)

    images = tensor_of(arrays.train_x, device), tensor_of(arrays.val_x, device)
    channels = 3 if benchmark.as_rgb else images[0].shape[1]

    def rows(part: Part) -> Rows:
        return _rows(part, images, channels, classes, device)

    folds: tuple[Tensor, ...] = ()
    if protocol.crossfit > 1 and uses_meta:
        strata = strata_of(labels, classes)
        folds = tuple(
            torch.from_numpy(fold).to(device)
            for fold in _folds(strata, protocol.crossfit, seed, "crossfit", groups)
        )
    if control == "all":
        trained = train_part if needs_meta else whole
    elif control == "train+meta":
        trained = _joined(train_part, meta_part)
    else:
        trained = meta_part if control == "meta" and not folds else train_part
    train_rows = rows(trained)
    meta_rows = (train_rows if folds else rows(meta_part)) if needs_meta else None
    meta_where = (trained if folds else meta_part).where if needs_meta else np.empty(0, np.int64)
    every = np.arange(len(arrays.val_y))
    test = np.arange(len(arrays.test_y))
    test_part = Part(test, arrays.test_y, arrays.test_y)
    test_images = tensor_of(arrays.test_x, device)
    return Splits(
        train=train_rows,
        meta=meta_rows,
        select=rows(Part(len(arrays.train_y) + every, arrays.val_y, arrays.val_y)),
        test=_rows(test_part, (test_images, test_images), channels, classes, device),
        kind=arrays.kind,
        classes=arrays.classes,
        pool=len(whole.where),
        folds=folds,
        select_trained=protocol.name == "paper" and (needs_meta or "meta" in control),
        corruption=record(benchmark, classes, train_part, meta_part) if corrupts else None,
        corrupted=changes(trained, origin) if corrupts else None,
        caveats=arrays.caveats,
        notes=arrays.notes,
        test_groups=arrays.test_groups,
        groups=_counted(arrays, trained.where, meta_where),
    )


def _counted(arrays: Arrays, train: np.ndarray, meta: np.ndarray) -> dict[str, int] | None:
    """Groups among these rows of train and behind them val, in val and in test, where known."""
    stored = _stored_groups(arrays)
    if stored is None:
        return None
    of_train, of_val, of_test = stored
    both = np.concatenate([of_train, of_val])
    sides = {"train": both[train], "meta": both[meta], "select": of_val, "test": of_test}
    return {name: len(np.unique(each)) for name, each in sides.items()}


def _stored_groups(arrays: Arrays) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Groups of train, val and test; a reader knows those of all three or of none."""
    train, val, test = arrays.train_groups, arrays.val_groups, arrays.test_groups
    return None if train is None or val is None or test is None else (train, val, test)


def _joined(one: Part, other: Part) -> Part:
    """Both, in the order of the stored rows: what is trained on does not tell how it was cut."""
    where = np.concatenate([one.where, other.where])
    order = np.argsort(where, kind="stable")
    clean, given = (
        np.concatenate(pair)[order] for pair in ((one.clean, other.clean), (one.given, other.given))
    )
    return Part(where[order], clean, given)


def _rows(
    part: Part, images: tuple[Tensor, Tensor], channels: int, classes: int, device: torch.device
) -> Rows:
    """Rows of the train images, of the val images, or of both without a copy of either."""
    x, other = images
    where = torch.from_numpy(np.ascontiguousarray(part.where, dtype=np.int64))
    more = None
    if x is not other and len(where) and int(where.max()) >= len(x):
        if int(where.min()) >= len(x):
            x, where = other, where - len(x)
        else:
            more = other
    y = targets_of(part.given, classes).to(device)
    return Rows(x, where.to(device), y, channels, more)


def _cross_validated(
    arrays: Arrays, folds: int, seed: int, independent: bool = False
) -> tuple[Arrays, np.ndarray]:
    """All stored rows cut anew: fold ``seed`` mod ``folds`` tests, an eighth of the others selects.

    With them the stored rows of train and select, counted over the official train, val and test.
    Each ``folds`` seeds are one repeat, whose test folds are disjoint and hold every row. Where
    groups are known, each is whole in one fold, and within the others in train or in select.
    """
    size = arrays.train_x.nbytes + arrays.val_x.nbytes + arrays.test_x.nbytes
    if size > GIB:
        raise NotApplicable(
            f"folds are for small data, at most 1 GiB of images; these have {size / GIB:.1f}"
        )
    x = np.concatenate([arrays.train_x, arrays.val_x, arrays.test_x])
    y = np.concatenate([arrays.train_y, arrays.val_y, arrays.test_y])
    strata = strata_of(y, len(arrays.classes))
    stored = _stored_groups(arrays)
    groups = None if stored is None else np.concatenate(stored)
    test = _folds(strata, folds, seed // folds, "folds", groups)[seed % folds]
    rest = np.setdiff1d(np.arange(len(y)), test)
    within = None if groups is None else groups[rest]
    train, select, reason = carve(strata[rest], SELECT_SHARE, seed, "select", within)
    if reason:
        raise NotApplicable(reason)
    train, select = rest[train], rest[select]
    caveat = (
        f"repeated stratified {folds}-fold cross-validation over all {len(y)} rows, not the "
        "official split: scores do not compare with published ones"
        + (
            "; patients kept together"
            if groups is not None
            else ""
            if independent
            else ", and images of one patient may be on both sides"
        )
    )
    stale = {PREVALENCE, *dataset.about_splits(arrays)}
    cut = replace(
        arrays,
        train_x=x[train],
        train_y=y[train],
        val_x=x[select],
        val_y=y[select],
        test_x=x[test],
        test_y=y[test],
        train_groups=None if groups is None else groups[train],
        val_groups=None if groups is None else groups[select],
        test_groups=None if groups is None else groups[test],
        caveats=(caveat, *(each for each in arrays.caveats if each not in stale)),
        notes=tuple(each for each in arrays.notes if each not in stale),
    )
    return cut, np.concatenate([train, select])


def carve(
    strata: np.ndarray,
    fraction: float,
    seed: int,
    purpose: str = "meta",
    groups: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, str]:
    """Rows to train on, meta rows, and why not (then all rows train): stratified, seeded.

    Each class gives round(fraction * n) rows, at least five; five must be left to train on. Whole
    ``groups`` (N,) come near the fraction, with the same least numbers.
    """
    if groups is not None:
        return _carve_groups(strata, groups, fraction, seed, purpose)
    rng = np.random.default_rng(seed_of(seed, f"{purpose} rows"))
    meta, short = [], []
    for stratum, count in zip(*np.unique(strata, return_counts=True), strict=True):
        rows = np.flatnonzero(strata == stratum)
        take = max(MIN_META_ROWS, round(fraction * count))
        if count - take < MIN_META_ROWS:
            short.append(f"class {stratum} has {count}")
        meta.append(rng.permutation(rows)[:take])
    if short:
        reason = (
            f"the {purpose} split takes {fraction:g} of each class, at least {MIN_META_ROWS} rows, "
            f"and leaves at least {MIN_META_ROWS} to train on; {short[0]} rows"
        )
        return np.arange(len(strata)), np.empty(0, np.int64), reason
    chosen = np.sort(np.concatenate(meta))
    return np.setdiff1d(np.arange(len(strata)), chosen), chosen, ""


def _carve_groups(
    strata: np.ndarray, groups: np.ndarray, fraction: float, seed: int, purpose: str
) -> tuple[np.ndarray, np.ndarray, str]:
    """``carve`` in whole groups.

    Where the fraction gives too few rows of the rarest class a larger one is tried, up to a half.
    """
    drawn = seed_of(seed, f"{purpose} rows")
    classes, counts = np.unique(strata, return_counts=True)
    places = np.searchsorted(classes, strata)
    several, short = len(np.unique(groups)) > 1, 0
    for least in (0, MIN_META_ROWS, 2 * MIN_META_ROWS) if several else ():
        share = max(fraction, min(0.5, least / counts.min()))
        kept, cut = cutting.grouped_split(strata, groups, (1 - share, share), drawn)
        found = np.bincount(places[cut], minlength=len(classes))
        fewest = np.minimum(found, counts - found)
        if fewest.min() >= MIN_META_ROWS:
            return kept, cut, ""
        short = int(fewest.argmin())
    held = len(np.unique(groups[places == short]))
    reason = (
        f"the {purpose} split takes {fraction:g} of each class, at least {MIN_META_ROWS} rows, and "
        f"leaves at least {MIN_META_ROWS} to train on, whole patients only; class "
        f"{classes[short]} has {counts[short]} rows of {held} patient(s) (groups)"
    )
    return np.arange(len(strata)), np.empty(0, np.int64), reason


def _folds(
    strata: np.ndarray, count: int, seed: int, purpose: str, groups: np.ndarray | None = None
) -> list[np.ndarray]:
    """``count`` stratified folds of positions; each class is spread evenly over them.

    Whole ``groups`` (N,) are spread as evenly as they allow.
    """
    if groups is not None:
        return _grouped_folds(strata, count, seed, purpose, groups)
    rng = np.random.default_rng(seed_of(seed, f"{purpose} folds"))
    smallest = np.unique(strata, return_counts=True)[1].min()
    if smallest < count * MIN_META_ROWS:
        raise NotApplicable(
            f"{purpose}={count} needs {count * MIN_META_ROWS} rows a class, "
            f"{MIN_META_ROWS} in each fold; one has {smallest}"
        )
    fold = np.empty(len(strata), np.int64)
    shift = 0
    for stratum in np.unique(strata):
        rows = rng.permutation(np.flatnonzero(strata == stratum))
        fold[rows] = (np.arange(len(rows)) + shift) % count
        shift += len(rows)
    return [np.flatnonzero(fold == number) for number in range(count)]


def _grouped_folds(
    strata: np.ndarray, count: int, seed: int, purpose: str, groups: np.ndarray
) -> list[np.ndarray]:
    needs = f"{purpose}={count} needs {MIN_META_ROWS} rows of each class in each fold"
    if (there := len(np.unique(groups))) < count:
        raise NotApplicable(f"{needs}, whole patients only; there are {there} patient(s) (groups)")
    drawn = seed_of(seed, f"{purpose} folds")
    folds = list(cutting.grouped_split(strata, groups, (1,) * count, drawn))
    for stratum in np.unique(strata):
        rows = [int((strata[fold] == stratum).sum()) for fold in folds]
        if min(rows) < MIN_META_ROWS:
            held = len(np.unique(groups[strata == stratum]))
            raise NotApplicable(
                f"{needs}, whole patients only; class {stratum} has {sum(rows)} rows of {held} "
                f"patient(s) (groups), which leaves {min(rows)} in one fold"
            )
    return folds


def _subset(arrays: Arrays, rows_per_class: int) -> np.ndarray:
    """Training rows that are used, in their order; the same for every run, but for folds."""
    if not rows_per_class:
        return np.arange(len(arrays.train_y))
    if arrays.train_y.ndim > 1:
        raise NotApplicable("rows_per_class is not defined for several labels a row")
    rng = np.random.default_rng(seed_of(0, "rows per class"))
    counts = np.bincount(arrays.train_y, minlength=len(arrays.classes))
    if counts.min() < rows_per_class:
        raise NotApplicable(
            f"rows_per_class={rows_per_class}: class {counts.argmin()} has {counts.min()} rows"
        )
    chosen = [
        rng.permutation(np.flatnonzero(arrays.train_y == label))[:rows_per_class]
        for label in range(len(counts))
    ]
    return np.sort(np.concatenate(chosen))
