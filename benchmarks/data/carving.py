"""Splits that depend on a run's seed: meta rows, folds, and cross-validation over all rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from analysis import numbers
from analysis.tasks import task_named
from benchmarks.data.catalogue import PREVALENCE
from benchmarks.data.cutting import grouped_split
from benchmarks.data.dataset import Arrays, about_splits
from benchmarks.data.ondisk import GIB, OnDisk, Pixels, joined, taken
from benchmarks.data.seeding import seed_of

MIN_META_ROWS = 5
"""The fewest rows of each class in the meta split, and left to train on."""
SELECT_SHARE = 1 / 8
"""Of the rows outside the test fold: with five folds 70 % train, 10 % select and 20 % test."""


class NotApplicable(Exception):
    """A run that cannot be done on these data; the message is the reason that the user sees."""


def carve(
    strata: np.ndarray,
    fraction: float,
    seed: int,
    purpose: str = "meta",
    groups: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, str]:
    """Rows to train on, meta rows, and if that is impossible why; stratified and seeded.

    Each class gives round(fraction * n) rows, at least five, and five must be left to train on;
    otherwise all rows train. ``groups`` (N,) are kept whole, so the fraction is approximate.
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

    If the fraction gives too few rows of the rarest class, larger ones are tried, up to a half.
    """
    drawn = seed_of(seed, f"{purpose} rows")
    classes, counts = np.unique(strata, return_counts=True)
    places = np.searchsorted(classes, strata)
    several, short = len(np.unique(groups)) > 1, 0
    for least in (0, MIN_META_ROWS, 2 * MIN_META_ROWS) if several else ():
        share = max(fraction, min(0.5, least / counts.min()))
        kept, cut = grouped_split(strata, groups, (1 - share, share), drawn)
        found = np.bincount(places[cut], minlength=len(classes))
        fewest = np.minimum(found, counts - found)
        if fewest.min() >= MIN_META_ROWS:
            return kept, cut, ""
        short = int(fewest.argmin())
    held = len(np.unique(groups[places == short]))
    reason = (
        f"the {purpose} split takes {fraction:g} of each class, at least {MIN_META_ROWS} rows, and "
        f"leaves at least {MIN_META_ROWS} to train on, whole patients only; class "
        f"{classes[short]} has {counts[short]} rows of {numbers.count(held, 'patient')}"
    )
    return np.arange(len(strata)), np.empty(0, np.int64), reason


def stratified_folds(
    strata: np.ndarray, count: int, seed: int, purpose: str, groups: np.ndarray | None = None
) -> list[np.ndarray]:
    """``count`` stratified folds of positions; each class is spread evenly over them.

    Whole ``groups`` (N,) are spread as evenly as they allow.

    Raises:
        NotApplicable: a fold would have too few rows of a class.
    """
    if groups is not None:
        return _folds_of_groups(strata, count, seed, purpose, groups)
    rng = np.random.default_rng(seed_of(seed, f"{purpose} folds"))
    smallest = np.unique(strata, return_counts=True)[1].min()
    if smallest < count * MIN_META_ROWS:
        raise NotApplicable(
            f"{purpose}={count} needs {count * MIN_META_ROWS} rows per class, "
            f"{MIN_META_ROWS} in each fold; one has {smallest}"
        )
    fold = np.empty(len(strata), np.int64)
    shift = 0
    for stratum in np.unique(strata):
        rows = rng.permutation(np.flatnonzero(strata == stratum))
        fold[rows] = (np.arange(len(rows)) + shift) % count
        shift += len(rows)
    return [np.flatnonzero(fold == number) for number in range(count)]


def _folds_of_groups(
    strata: np.ndarray, count: int, seed: int, purpose: str, groups: np.ndarray
) -> list[np.ndarray]:
    needs = f"{purpose}={count} needs {MIN_META_ROWS} rows of each class in each fold"
    if (there := len(np.unique(groups))) < count:
        raise NotApplicable(f"{needs}, whole patients only; got {numbers.count(there, 'patient')}")
    drawn = seed_of(seed, f"{purpose} folds")
    folds = list(grouped_split(strata, groups, (1,) * count, drawn))
    for stratum in np.unique(strata):
        rows = [int((strata[fold] == stratum).sum()) for fold in folds]
        if min(rows) < MIN_META_ROWS:
            held = len(np.unique(groups[strata == stratum]))
            raise NotApplicable(
                f"{needs}, whole patients only; class {stratum} has {sum(rows)} rows of "
                f"{numbers.count(held, 'patient')}, which leaves {min(rows)} in one fold"
            )
    return folds


def cross_validated(
    arrays: Arrays, folds: int, seed: int, independent: bool = False
) -> tuple[Arrays, np.ndarray]:
    """All stored rows split anew: fold ``seed`` mod ``folds`` is test, an eighth of the others
    select.

    Also returns the stored rows of train and select, counted over the official train, val and test.
    Each ``folds`` seeds are one repeat, whose test folds are disjoint and contain every row. If
    groups are known, each is in one fold, and among the others in either train or select.
    """
    x = _all_images(arrays)
    y = np.concatenate([arrays.train_y, arrays.val_y, arrays.test_y])
    strata = task_named(arrays.kind).strata(y, len(arrays.classes))
    groups = None if arrays.groups is None else np.concatenate(arrays.groups)
    test = stratified_folds(strata, folds, seed // folds, "folds", groups)[seed % folds]
    rest = np.setdiff1d(np.arange(len(y)), test)
    within = None if groups is None else groups[rest]
    train, select, reason = carve(strata[rest], SELECT_SHARE, seed, "select", within)
    if reason:
        raise NotApplicable(reason)
    train, select = rest[train], rest[select]
    stale = {PREVALENCE, *about_splits(arrays)}
    cut = replace(
        arrays,
        train_x=taken(x, train),
        train_y=y[train],
        val_x=taken(x, select),
        val_y=y[select],
        test_x=taken(x, test),
        test_y=y[test],
        train_groups=None if groups is None else groups[train],
        val_groups=None if groups is None else groups[select],
        test_groups=None if groups is None else groups[test],
        caveats=(
            _about_folds(folds, len(y), groups is not None, independent),
            *(each for each in arrays.caveats if each not in stale),
        ),
        notes=tuple(each for each in arrays.notes if each not in stale),
    )
    return cut, np.concatenate([train, select])


def _all_images(arrays: Arrays) -> Pixels:
    """Those of train, val and test, one after the other; of images on disk none is copied."""
    parts = arrays.images
    on_disk = [each for each in parts if isinstance(each, OnDisk)]
    if on_disk:
        return joined(on_disk)
    if arrays.nbytes > GIB:
        raise NotApplicable(
            "folds copy images in memory, at most 1 GiB; these take "
            f"{arrays.nbytes / GIB:.1f}: --memory-gib 1 streams them from disk instead"
        )
    return np.concatenate([each for each in parts if not isinstance(each, OnDisk)])


def _about_folds(folds: int, rows: int, grouped: bool, independent: bool) -> str:
    """A caveat about scores over folds; shorter if images are declared independent."""
    text = (
        f"repeated stratified {folds}-fold cross-validation over all {rows} rows, not the "
        "official split: scores cannot be compared with published ones"
    )
    if grouped:
        return f"{text}; patients kept together"
    return text if independent else f"{text}, and images of one patient may be on both sides"
