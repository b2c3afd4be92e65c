"""From a data set to the splits that a run trains and is judged on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from benchmarks.data import sources
from benchmarks.data.catalogue import PREVALENCE
from benchmarks.data.download import DataError
from benchmarks.data.names import Benchmark
from benchmarks.data.seeding import generator, seed_of
from benchmarks.data.sources import GIB, Arrays
from methods.base import Batch, Spec

Control = Literal["all", "train", "train+meta", "meta"]
"""Which labelled rows a run trains on; all but "all" are control rows."""

MIN_META_ROWS = 5
"""Rows of each class that the meta split, and what is left to train on, need at least."""
SELECT_SHARE = 1 / 8
"""Of the rows that a fold leaves: with five folds 70 % train, 10 % select and 20 % test."""


class NotApplicable(Exception):
    """A run that cannot be done on these data; the message is the reason that the user sees."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Some rows of a tensor of inputs, with targets of their own."""

    x: Tensor
    """(M, C, H, W) uint8 or float32; on the device, or memory-mapped on the CPU."""
    where: Tensor
    """(N,) int64 rows of ``x``."""
    y: Tensor
    """(N, K) float32 targets on the device."""
    channels: int
    """C, or 3 where grey images are shown as RGB."""
    more: Tensor | None = None
    """Images that ``where`` counts behind those of ``x``."""

    def __len__(self) -> int:
        return len(self.where)

    def inputs(self, index: Tensor) -> Tensor:
        """(B, C, H, W) float32 in [0, 1] on the device, for positions ``index`` (B,)."""
        where = self.where[index].to(self.x.device)
        if self.more is None:
            x = self.x[where]
        else:
            own = where < len(self.x)
            x = self.x.new_empty((len(where), *self.x.shape[1:]))
            x[own], x[~own] = self.x[where[own]], self.more[where[~own] - len(self.x)]
        x = x.to(self.y.device)
        x = x.float().div_(255) if x.dtype == torch.uint8 else x
        return x.expand(-1, self.channels, -1, -1) if x.shape[1] != self.channels else x


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
        arrays = sources.from_arrays("arrays", train, select, test, groups)
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


def strata_of(labels: np.ndarray, classes: int) -> np.ndarray:
    """(N,) int: the class; for MultiLabel the rarest label that a row has, K for none."""
    if labels.ndim == 1:
        return labels
    order = np.argsort(labels.sum(axis=0), kind="stable")
    strata = np.full(len(labels), classes)
    for label in order[::-1]:
        strata[labels[:, label] > 0] = label
    return strata


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
    train = _imbalanced(train, labels, classes, benchmark, seed)

    def noisy(clean: np.ndarray, share: float, purpose: str) -> np.ndarray:
        return _noisy(clean, classes, benchmark, share, seed, purpose)

    train_part = _Part(kept[train], labels[train], noisy(labels[train], benchmark.noise, "noise"))
    if protocol.name == "paper":
        where, clean = len(arrays.train_y) + np.arange(len(arrays.val_y)), arrays.val_y
    else:
        where, clean = kept[meta], labels[meta]
    meta_part = _Part(where, clean, noisy(clean, benchmark.meta_noise, "meta noise"))
    whole = train_part if protocol.name == "paper" else _joined(train_part, meta_part)

    images = _tensor(arrays.train_x, device), _tensor(arrays.val_x, device)
    channels = 3 if benchmark.as_rgb else images[0].shape[1]

    def rows(part: _Part) -> Rows:
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
    test_part = _Part(test, arrays.test_y, arrays.test_y)
    test_images = _tensor(arrays.test_x, device)
    return Splits(
        train=train_rows,
        meta=meta_rows,
        select=rows(_Part(len(arrays.train_y) + every, arrays.val_y, arrays.val_y)),
        test=_rows(test_part, (test_images, test_images), channels, classes, device),
        kind=arrays.kind,
        classes=arrays.classes,
        pool=len(whole.where),
        folds=folds,
        select_trained=protocol.name == "paper" and (needs_meta or "meta" in control),
        corruption=_record(benchmark, classes, train_part, meta_part) if corrupts else None,
        corrupted=_changes(trained, origin) if corrupts else None,
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


@dataclass(frozen=True, eq=False)
class _Part:
    """Rows before they become tensors."""

    where: np.ndarray
    """(N,) rows of the train images; from their number on, of the val images"""
    clean: np.ndarray
    """labels as stored"""
    given: np.ndarray
    """labels as given to the run"""


def _joined(one: _Part, other: _Part) -> _Part:
    """Both, in the order of the stored rows: what is trained on does not tell how it was cut."""
    where = np.concatenate([one.where, other.where])
    order = np.argsort(where, kind="stable")
    clean, given = (
        np.concatenate(pair)[order] for pair in ((one.clean, other.clean), (one.given, other.given))
    )
    return _Part(where[order], clean, given)


def _rows(
    part: _Part, images: tuple[Tensor, Tensor], channels: int, classes: int, device: torch.device
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
    y = _targets(part.given, classes).to(device)
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
    stale = {PREVALENCE, *sources.about_splits(arrays)}
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
        kept, cut = sources.grouped_split(strata, groups, (1 - share, share), drawn)
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
    folds = list(sources.grouped_split(strata, groups, (1,) * count, drawn))
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


def _imbalanced(
    train: np.ndarray, labels: np.ndarray, classes: int, benchmark: Benchmark, seed: int
) -> np.ndarray:
    """Classes below K/2 stay; the other half is cut down by the ratio (AutoDO, section 4).

    ``half``: floor(L / ratio) rows in total, drawn uniformly over the second half, L the rows of
    the first. ``stratified``: each class of the second half keeps floor(n / ratio), at least one.
    """
    if benchmark.imbalance <= 1:
        return train
    rng = np.random.default_rng(seed_of(seed, "imbalance"))
    rare = labels[train] >= classes / 2
    if benchmark.imbalance_kind == "half":
        wanted = int((~rare).sum() // benchmark.imbalance)
        kept = rng.permutation(train[rare])[:wanted]
    else:
        kept = np.concatenate(
            [
                rng.permutation(rows)[: max(1, int(len(rows) // benchmark.imbalance))]
                for label in np.unique(labels[train][rare])
                for rows in [train[labels[train] == label]]
            ]
        )
    return np.sort(np.concatenate([train[~rare], kept]))


def _noisy(
    labels: np.ndarray, classes: int, benchmark: Benchmark, share: float, seed: int, purpose: str
) -> np.ndarray:
    """Labels of which a share was replaced.

    ``symmetric``: round(share * N) rows get a label drawn from all K, the true one included, so
    that share * (K - 1) / K really change (AutoDO's recipe). ``pair``: in each class
    round(share * n) rows get the next label, k + 1 mod K.
    """
    if share <= 0:
        return labels
    rng = np.random.default_rng(seed_of(seed, purpose))
    noisy = labels.copy()
    if benchmark.noise_kind == "symmetric":
        rows = rng.permutation(len(labels))[: round(share * len(labels))]
        noisy[rows] = rng.integers(0, classes, len(rows))
    else:
        for label in range(classes):
            rows = rng.permutation(np.flatnonzero(labels == label))
            noisy[rows[: round(share * len(rows))]] = (label + 1) % classes
    return noisy


def _changes(part: _Part, origin: np.ndarray | None) -> dict[str, np.ndarray]:
    """What corruption.npz holds: stored rows that were trained on, and which labels changed."""
    rows = np.flatnonzero(part.clean != part.given)
    return {
        "stored_rows": part.where if origin is None else origin[part.where],
        "rows": rows,
        "before": part.clean[rows],
        "after": part.given[rows],
    }


def _record(benchmark: Benchmark, classes: int, train: _Part, meta: _Part) -> dict[str, Any]:
    """Effective amounts for result.json; the rows themselves go to corruption.npz."""
    changed = np.flatnonzero(train.clean != train.given)
    meta_changed = int((meta.clean != meta.given).sum())
    identity = hashlib.md5(train.where.tobytes() + changed.tobytes(), usedforsecurity=False)
    return {
        "rows": len(train.where),
        "noise_requested": benchmark.noise,
        "noise_effective": len(changed) / max(1, len(train.where)),
        "rows_of_each_class_before_noise": np.bincount(train.clean, minlength=classes).tolist(),
        "meta_noise_requested": benchmark.meta_noise,
        "meta_noise_effective": meta_changed / max(1, len(meta.where)),
        "rows_md5": identity.hexdigest(),
    }


def _tensor(images: np.ndarray, device: torch.device) -> Tensor:
    """(N, H, W[, C]) to (N, C, H, W); a memory-mapped array stays where it is."""
    if isinstance(images, np.memmap):
        mapped = torch.from_numpy(images)
        return mapped[:, None] if mapped.dim() == 3 else mapped.permute(0, 3, 1, 2)
    shaped = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
    return torch.from_numpy(np.ascontiguousarray(shaped)).to(device)


def _targets(labels: np.ndarray, classes: int) -> Tensor:
    if labels.ndim == 2:
        return torch.from_numpy(labels.astype(np.float32))
    targets = torch.zeros(len(labels), classes)
    targets[torch.arange(len(labels)), torch.from_numpy(labels.astype(np.int64))] = 1
    return targets


def rows_from_tensors(x: Tensor, y: Tensor) -> Rows:
    """All rows of inputs (N, C, H, W) in [0, 1] or uint8 with targets (N, K), on one device."""
    return Rows(x, torch.arange(len(x), device=y.device), y, x.shape[1])


def rows_of(images: np.ndarray, shape: tuple[int, ...], classes: int, device: torch.device) -> Rows:
    """Rows without labels, for prediction: images (N, H, W[, C]) for a network of this shape.

    Raises:
        DataError: the images do not fit the network.
    """
    x = _tensor(images, device)
    if tuple(x.shape[2:]) != shape[1:] or (x.shape[1] != shape[0] and x.shape[1] != 1):
        raise DataError(
            f"images have the shape {tuple(x.shape[1:])} (channels, height, width), the network "
            f"was trained on {shape}"
        )
    y = torch.zeros(len(x), classes, device=device)
    return replace(rows_from_tensors(x, y), channels=shape[0])


def chunks(rows: int, size: int) -> list[tuple[int, int]]:
    """Start and end of each batch of one pass; a single left-over row joins the batch before."""
    ends = [*range(size, rows, size), rows]
    if size > 1 and len(ends) > 1 and ends[-1] - ends[-2] == 1:
        del ends[-2]
    return list(zip([0, *ends[:-1]], ends, strict=True))


class RowStream:
    """The rows of one split as a method sees them (``methods.base.Stream``).

    The k-th draw within a call is a function of (seed, name, place, k), where the place is the
    epoch, the step and the call; the loop sets it, so there is no state to save.
    """

    def __init__(self, rows: Rows, seed: int, name: str, in_training: bool = True) -> None:
        self._rows, self._seed, self._name = rows, seed, name
        self._in_training = in_training
        self._place: tuple[int | str, ...] = ()
        self._draws = 0
        self._strata: Tensor | None = None
        self.active: Tensor | None = None
        """Positions that may be drawn, where not all may (crossfit)."""

    @property
    def targets(self) -> Tensor:
        """(N, K) targets of all rows."""
        return self._rows.y

    @property
    def index(self) -> Tensor:
        """(len,) rows that may be drawn in this epoch: all but those that crossfit holds out."""
        if self.active is not None:
            return self.active
        return torch.arange(len(self._rows), device=self._rows.y.device)

    def __len__(self) -> int:
        return len(self._rows) if self.active is None else len(self.active)

    def move_to(self, *place: int | str) -> None:
        """Begin another call: its draws are a function of ``place``."""
        self._place, self._draws = place, 0

    @contextmanager
    def rewound(self) -> Iterator[None]:
        """What is drawn inside does not move what is drawn afterwards."""
        before = self._draws
        try:
            yield
        finally:
            self._draws = before

    def rows(self, index: Tensor) -> Batch:
        """The rows ``index`` (B,), each with w = 1/B; outside the training split index is -1."""
        x = self._rows.inputs(index)
        w = torch.full((len(index),), 1 / max(1, len(index)), device=x.device)
        known = index if self._in_training else torch.full_like(index, -1)
        return Batch(x=x, y=self._rows.y[index], w=w, index=known)

    def draw(self, n: int, stratified: bool = False) -> Batch:
        """``n`` rows without replacement (all rows where the split has fewer)."""
        order = self._order()
        if stratified and n < len(order):
            order = self._stratified(order, n)
        return self.rows(order[:n])

    def batches(self, n: int) -> Iterator[Batch]:
        """One shuffled pass in batches of ``n``; a single left-over row joins the one before."""
        order = self._order()
        for start, end in chunks(len(order), n):
            yield self.rows(order[start:end])

    def _order(self) -> Tensor:
        order = permutation(len(self), self._seed, self._name, *self._place, self._draws)
        self._draws += 1
        order = order.to(self._rows.y.device)
        return order if self.active is None else self.active[order]

    def _stratified(self, order: Tensor, n: int) -> Tensor:
        """n rows of a shuffled order, still in order, with each class in its share.

        Shares are rounded by largest remainders.
        """
        if self._strata is None:
            self._strata = torch.from_numpy(_strata_of_targets(self._rows.y)).to(order.device)
        strata = self._strata[order]
        share = torch.bincount(strata).double() * n / len(order)
        counts = share.floor().long()
        rest = torch.argsort(share - counts, descending=True, stable=True)
        counts[rest[: n - int(counts.sum())]] += 1
        taken = torch.zeros(len(order), dtype=torch.bool, device=order.device)
        for stratum, count in enumerate(counts.tolist()):
            taken[(strata == stratum).nonzero().flatten()[:count]] = True
        return order[taken]


def _strata_of_targets(targets: Tensor) -> np.ndarray:
    values = targets.cpu().numpy()
    single = bool(np.all(values.sum(axis=1) == 1) and np.all((values == 0) | (values == 1)))
    return strata_of(values.argmax(axis=1) if single else values > 0.5, values.shape[1])


def permutation(rows: int, *parts: int | str) -> Tensor:
    """(rows,) int64 on the CPU: an order that is a function of ``parts``."""
    return torch.randperm(rows, generator=generator(*parts))


def rows_of_epoch(fold: Tensor, rows: int, keep: str) -> Tensor:
    """Positions that are trained on: the fold ("meta"), or in order all others ("train")."""
    if keep == "meta":
        return fold
    others = torch.ones(rows, dtype=torch.bool, device=fold.device)
    others[fold] = False
    return others.nonzero().flatten()


def training_order(
    rows: int,
    folds: Sequence[Tensor],
    batch_size: int,
    steps: int,
    epoch: int,
    seed: int,
    keep: str,
) -> list[Tensor]:
    """Positions in the training split of each batch of one epoch.

    Rows are passed over again and again, each time in a new order; an epoch takes the next
    ``steps`` batches wherever a pass ends. With folds, each fold has a count of its own, and
    ``keep`` tells whether its rows ("meta") or all others ("train") are trained on.
    """
    fold = epoch % len(folds) if folds else 0
    active = rows_of_epoch(folds[fold].cpu(), rows, keep) if folds else torch.arange(rows)
    pieces = chunks(len(active), batch_size)
    first = epoch // max(1, len(folds)) * steps
    batches, orders = [], {}
    for step in range(first, first + steps):
        number, place = divmod(step, len(pieces))
        if number not in orders:
            orders[number] = permutation(len(active), seed, "order", fold, number)
        start, end = pieces[place]
        batches.append(active[orders[number][start:end]])
    return batches
