"""A data set in memory or on disk, and the checks that the arrays of every source must pass."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from analysis.numbers import listed
from benchmarks.data.catalogue import Entry, Kind
from benchmarks.data.cutting import grouped_split, stratified_split
from benchmarks.data.download import DataError
from benchmarks.data.ondisk import GIB, OnDisk, Pixels, blocks, taken

SPLITS = ("train", "val", "test")
SPLIT_SEED = 0
NUMBERED = "Number the classes from 0 without gaps."
TWICE, TWICE_ROWS = "too, pixel for pixel", "too, cell for cell"
"""Part of a caveat about images, or rows of a table, that are in two splits."""
MADE = ("split 60/20/20", "validation split cut", "split 65/15/20")
"""How a note starts that says how splits were made: all three, or only val."""
ROUNDING = 1e-6  # floats up to this far outside [0, 1] count as rounding errors and are clipped


def from_arrays(
    name: str,
    train: tuple[np.ndarray, np.ndarray],
    val: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    groups: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None,
) -> "Arrays":
    """A user's own (images, labels) of each split, checked like an npz file.

    `groups` of the same splits are equal for rows of one patient: numbers or strings, (N,).

    Raises DataError for everything that is wrong with them.
    """
    pairs = dict(zip(SPLITS, (train, val, test), strict=True))
    arrays = {}
    digest = hashlib.md5(usedforsecurity=False)
    for split, (images, labels) in pairs.items():
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = images, labels
        digest.update(np.ascontiguousarray(images).tobytes())
        digest.update(np.ascontiguousarray(labels).tobytes())
    if groups is not None and len(groups) != len(SPLITS):
        raise DataError(
            f"{name}: expected groups for train, select and test, got {len(groups)} splits."
        )
    for split, own in zip(SPLITS, groups, strict=True) if groups is not None else ():
        arrays[f"{split}_groups"] = np.asarray(own)
        digest.update(np.ascontiguousarray(own).tobytes())
    made = assemble(Raw(arrays, ()), Path(name), name, 0.1, None)
    return replace(made, checksum=digest.hexdigest())


def counted(groups: np.ndarray) -> str:
    """``1 group``, ``3 groups``."""
    count = len(np.unique(groups))
    return f"{count} group{'s' if count > 1 else ''}"


def by_group(
    labels: np.ndarray, groups: np.ndarray, shares: Sequence[float], where: object
) -> tuple[np.ndarray, ...]:
    """``grouped_split`` with the seed of all splits; too few groups are a user's error."""
    try:
        return grouped_split(labels, groups, shares, SPLIT_SEED)
    except ValueError as error:
        raise DataError(
            f"{where}: {error}: expected at least as many patients as splits, or your own splits."
        ) from error


def assemble(
    raw: "Raw",
    path: Path | str,
    name: str,
    val_fraction: float,
    entry: Entry | None,
    classes: tuple[str, ...] | None = None,
) -> "Arrays":
    """Arrays from the contents of a file, after every check that needs no official facts."""
    pieces, clipped = _checked(raw.arrays, path)
    splits = [split for split in SPLITS if f"{split}_x" in pieces]
    _refuse_unlike_splits(pieces, splits, path)
    names = _classes(pieces, splits, path, entry.classes if entry else classes)
    notes = [*raw.notes, *clipped, *_one_label_each(pieces, splits)]
    if "val" not in splits:
        cut, note = _with_val(pieces, path, val_fraction)
        pieces |= cut
        notes.append(note)
    _refuse_absent_classes(pieces["train_y"], names, path, named=bool(classes))
    lacking = _lacking(pieces, names)
    return Arrays(
        name=name,
        kind=entry.kind if entry else _kind(pieces["train_y"], names),
        classes=names,
        train_x=pieces["train_x"],
        train_y=pieces["train_y"],
        val_x=pieces["val_x"],
        val_y=pieces["val_y"],
        test_x=pieces["test_x"],
        test_y=pieces["test_y"],
        checksum="",
        verified=True,
        caveats=(*(entry.caveats if entry else ()), *_shared(pieces), *lacking),
        source=entry.source if entry else "the user's own data",
        notes=(*notes, *lacking),
        **{f"{split}_groups": pieces.get(f"{split}_g") for split in SPLITS},
    )


def _checked(raw: Mapping[str, Any], path: Path | str) -> tuple[dict[str, Any], list[str]]:
    """Usable images, labels and groups, by split and x, y, g; with notes on them."""
    pieces: dict[str, Any] = {}
    notes = []
    for split in SPLITS:
        if (key := f"{split}_images") in raw:
            pieces[f"{split}_x"], clipped = checked_images(raw[key], f"{path}, {key}")
            if clipped:
                notes.append(clipped_note(key, clipped))
        if (key := f"{split}_labels") in raw:
            pieces[f"{split}_y"] = checked_labels(raw[key], f"{path}, {key}")
    return pieces | _groups(raw, path), notes


def clipped_note(key: str, values: int) -> str:
    """A note on values that were clipped."""
    return f"{key}: {values} values outside [0, 1] by rounding are clipped"


def _refuse_unlike_splits(
    pieces: Mapping[str, Any], splits: Sequence[str], path: Path | str
) -> None:
    """Refuse a split whose arrays differ in length, or that differs from train in shape or type."""
    first, first_y = pieces["train_x"], pieces["train_y"]
    for split in splits:
        x, y = pieces[f"{split}_x"], pieces[f"{split}_y"]
        if len(x) != len(y):
            raise DataError(
                f"{path} has {len(x)} {split}_images and {len(y)} {split}_labels: expected equal "
                f"numbers."
            )
        if len(pieces.get(f"{split}_g", x)) != len(x):
            raise DataError(
                f"{path} has {len(x)} {split}_images and {len(pieces[f'{split}_g'])} "
                f"{split}_groups: expected equal numbers."
            )
        if (x.shape[1:], x.dtype) != (first.shape[1:], first.dtype):
            raise DataError(
                f"{path}: {split}_images are {x.dtype} of shape {x.shape[1:]}, train_images "
                f"{first.dtype} of shape {first.shape[1:]}: expected the same in every split."
            )
        if y.shape[1:] != first_y.shape[1:]:
            raise DataError(
                f"{path}: {split}_labels have the shape {y.shape}, train_labels "
                f"{first_y.shape}: expected the same number of labels per row in every split."
            )


def _one_label_each(pieces: Mapping[str, np.ndarray], splits: Sequence[str]) -> list[str]:
    """A note if labels that allow several per row look like classes."""
    if pieces["train_y"].ndim < 2 or any((pieces[f"{s}_y"].sum(1) != 1).any() for s in splits):
        return []
    return [
        "multi-label by the shape of the labels, but every row has exactly one: store class "
        "numbers (N,) if the classes exclude each other"
    ]


def _with_val(
    pieces: Mapping[str, Any], path: Path | str, val_fraction: float
) -> tuple[dict[str, Any], str]:
    """Train cut into two parts, train and val, and a note on how it was cut."""
    y = pieces["train_y"]
    shares, how = (1 - val_fraction, val_fraction), "stratified"
    if "train_g" in pieces:
        kept, cut = by_group(y, pieces["train_g"], shares, path)
        how = f"by group ({counted(pieces['train_g'][cut])})"
    else:
        kept, cut = stratified_split(y, shares, SPLIT_SEED)
    if not len(cut) or not len(kept):
        raise DataError(
            f"{path}: a val_fraction of {val_fraction:g} of {len(y)} training rows leaves a split "
            f"without rows: add a val split, or change val_fraction."
        )
    parts = {
        f"{split}_{letter}": taken(pieces[f"train_{letter}"], rows)
        for letter in "xyg"
        if f"train_{letter}" in pieces
        for split, rows in (("train", kept), ("val", cut))
    }
    percent = 100 * val_fraction
    return parts, f"{MADE[1]} from train: {percent:g} %, {how}, split seed {SPLIT_SEED}"


def _refuse_absent_classes(
    y: np.ndarray, names: tuple[str, ...], path: Path | str, named: bool
) -> None:
    seen = (y > 0).any(0) if y.ndim == 2 else np.isin(np.arange(len(names)), y)
    if not seen.all():
        absent = ", ".join(names[k] for k in np.flatnonzero(~seen)[:5])
        raise DataError(
            f"{path}: the train split has no row of {(~seen).sum()} of {len(names)} classes "
            f"({absent}): every class must occur in train. "
            + ("Add images, or remove the class." if named else NUMBERED)
        )


def _kind(y: np.ndarray, names: tuple[str, ...]) -> Kind:
    if y.ndim == 2:
        return "multi-label"
    return "binary-class" if len(names) == 2 else "multi-class"


def _groups(raw: Mapping[str, np.ndarray], path: Path | str) -> dict[str, np.ndarray]:
    """The groups of each split as int64 (N,), with one number per patient in all splits."""
    given = {}
    for split in SPLITS:
        if (key := f"{split}_groups") not in raw:
            continue
        array = raw[key]
        if array.ndim == 2 and array.shape[1] == 1:
            array = array[:, 0]
        if array.ndim != 1 or array.dtype.kind not in "iuU":
            raise DataError(
                f"{path}, {key}: the type is {array.dtype} of shape {array.shape}, expected "
                f"integers or strings of shape (N,), equal for rows of one patient."
            )
        unknown = array == "" if array.dtype.kind == "U" else array < 0
        if unknown.any():
            raise DataError(
                f"{path}, {key}: {unknown.sum()} rows have no group (empty or below 0), the first "
                f"is row {unknown.argmax()}: give each of them its own group."
            )
        # One type for all: numpy turns int64 with uint64 into floats, which makes long ids equal.
        given[split] = array if array.dtype.kind == "U" else array.astype(np.uint64)
    if not given:
        return {}
    if len({array.dtype.kind == "U" for array in given.values()}) > 1:
        raise DataError(f"{path}: groups are strings in one split and numbers in another.")
    _, numbers = np.unique(np.concatenate(list(given.values())), return_inverse=True)
    ends = np.cumsum([len(array) for array in given.values()])[:-1]
    parts = np.split(numbers.reshape(-1).astype(np.int64), ends)
    return {f"{split}_g": part for split, part in zip(given, parts, strict=True)}


def duplicates(arrays: "Arrays") -> list[str]:
    """For each pair of splits, in words, how many images of the second are also in the first.

    Images are compared pixel for pixel, as stored or resized; rows are counted from 0.
    """
    marks = {split: _marks(images) for split, images in zip(SPLITS, arrays.images, strict=True)}
    found, what, how = [], "images", TWICE
    if arrays.table is not None:
        what, how = "rows", TWICE_ROWS
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        known = set(marks[one])
        twice = [row for row, mark in enumerate(marks[other]) if mark in known]
        if twice:
            found.append(
                f"{len(twice)} of {len(marks[other])} {other} {what} are in {one} {how} "
                f"(the first is row {twice[0]} of {other})"
            )
    return found


def _marks(images: Pixels) -> list[bytes]:
    """A hash of each image."""
    return [
        hashlib.blake2b(image.tobytes(), digest_size=16).digest()
        for block in blocks(images)
        for image in block
    ]


def tested(arrays: "Arrays", unlabelled: Pixels) -> list[str]:
    """A caveat if test images are among the unlabelled ones; skips more than a GiB."""
    if arrays.nbytes + unlabelled.nbytes > GIB:
        return []
    known = set(_marks(unlabelled))
    twice = sum(mark in known for mark in _marks(arrays.test_x))
    if not twice:
        return []
    return [f"{twice} of {len(arrays.test_x)} test images are among the unlabelled ones {TWICE}"]


def with_duplicates(arrays: "Arrays", own: bool) -> "Arrays":
    """Add a caveat if images of a user's own data are in two splits; skips more than a GiB."""
    if not own or arrays.nbytes > GIB:
        return arrays
    return replace(arrays, caveats=(*arrays.caveats, *duplicates(arrays)))


def about_splits(arrays: "Arrays") -> list[str]:
    """The notes and caveats that hold only for these splits, not if the images are split anew."""
    pieces = {
        f"{split}_{letter}": array
        for split in SPLITS
        for letter, what in (("y", "y"), ("g", "groups"))
        if (array := getattr(arrays, f"{split}_{what}")) is not None
    }
    twice = [
        each for each in arrays.caveats if TWICE in each or TWICE_ROWS in each
    ]  # found when read
    made = [each for each in arrays.notes if each.startswith(MADE)]
    return [*_shared(pieces), *_lacking(pieces, arrays.classes), *twice, *made]


def _shared(pieces: Mapping[str, np.ndarray]) -> list[str]:
    """A caveat for each pair of splits that have images of the same patients."""
    caveats = []
    for one, other in (("train", "test"), ("val", "test"), ("train", "val")):
        if f"{one}_g" in pieces:
            both = len(np.intersect1d(pieces[f"{one}_g"], pieces[f"{other}_g"]))
            if both:
                caveats.append(
                    f"{both} patient{'s have' if both > 1 else ' has'} images in {one} and {other}"
                )
    return caveats


def _lacking(pieces: Mapping[str, np.ndarray], names: tuple[str, ...]) -> list[str]:
    """Which metrics are undefined because a split lacks some classes; train has all of them."""
    sentences = []
    for split in ("val", "test"):
        y = pieces[f"{split}_y"]
        rows = y.sum(0) if y.ndim == 2 else np.bincount(y, minlength=len(names))
        seen = [name for name, count in zip(names, rows, strict=True) if count]
        absent = [name for name, count in zip(names, rows, strict=True) if not count]
        if absent:
            what = f"no row of {_and(absent)} in {split}: AUC is not defined"
            sentences.append(what if y.ndim == 2 else f"{what}, accuracy is over {_and(seen)}")
    return sentences


def _and(some: Sequence[str]) -> str:
    """Names joined with commas and "and"; of many, only the first."""
    if len(some) > 5:
        return f"{', '.join(some[:4])} and {len(some) - 4} more classes"
    return listed(some)


def _classes(
    pieces: Mapping[str, np.ndarray],
    splits: Sequence[str],
    path: Path | str,
    names: tuple[str, ...] | None,
) -> tuple[str, ...]:
    """The names of the classes, after checking that every label is one of them."""
    y = pieces["train_y"]
    if y.ndim == 2:
        if names is not None and len(names) != y.shape[1]:
            raise DataError(f"{path}: {y.shape[1]} labels per row, expected {len(names)}.")
        return names or tuple(map(str, range(y.shape[1])))
    if names is None:
        limit, why = int(y.max()) + 1, "the largest of train_labels"
        if limit < 2:
            raise DataError(
                f"{path}: train_labels contain only class 0: expected 2 classes or more, "
                f"numbered from 0."
            )
        # Names are made before gaps in the numbers are checked: a label that is far off, such as
        # 255 for "unknown", is then reported as a class without rows.
        names = tuple(map(str, range(limit)))
    else:
        limit, why = len(names), "the last class"
    for split in splits:
        top = int(pieces[f"{split}_y"].max())
        if top >= limit:
            raise DataError(
                f"{path}: {split}_labels are out of range: they hold {top}, expected 0 to "
                f"{limit - 1} ({why})."
            )
    return names


def checked_images(array: Pixels, what: str) -> tuple[Pixels, int]:
    """Images as they may be used, uint8 or float32 in [0, 1], and how many values were clipped."""
    refuse_shape(array.shape, array.dtype, what)
    if array.dtype == np.uint8 or isinstance(array, OnDisk):  # these were checked when written
        return array, 0
    values = Values(array.dtype)
    for block in blocks(array):
        values.add(block)
    values.refuse(what)
    clipped = np.clip(array, 0, 1) if values.outside else array
    return clipped.astype(np.float32, copy=False), values.outside


def refuse_shape(shape: tuple[int, ...], dtype: np.dtype, what: str) -> None:
    """Refuse what cannot be images, by its shape and type."""
    if not math.prod(shape):
        raise DataError(f"{what}: the split is empty (shape {shape}): expected images.")
    if len(shape) not in (3, 4) or (len(shape) == 4 and shape[-1] not in (1, 3)):
        raise DataError(
            f"{what}: the shape is {shape}, expected (N, H, W) or (N, H, W, C) with C of 1 or 3."
        )
    if dtype != np.uint8 and dtype.kind != "f":
        raise DataError(f"{what}: the type is {dtype}, expected uint8 or floats in [0, 1].")


@dataclass
class Values:
    """The values of floats, of which not all are in memory at once."""

    dtype: np.dtype
    size: int = 0
    bad: int = 0
    """not finite"""
    outside: int = 0
    """outside [0, 1]"""
    low: Any = math.inf
    high: Any = -math.inf

    def add(self, block: np.ndarray) -> None:
        """Count those of a block."""
        finite = np.isfinite(block)
        self.size += block.size
        self.bad += block.size - int(finite.sum())
        self.low = min(self.low, block.min(initial=math.inf, where=finite))
        self.high = max(self.high, block.max(initial=-math.inf, where=finite))
        self.outside += int(((block < 0) | (block > 1)).sum())

    def refuse(self, what: str) -> None:
        """Refuse values that are not finite, or further outside [0, 1] than by rounding."""
        if self.bad:
            raise DataError(
                f"{what}: {self.bad} of {self.size} values are NaN or infinite: remove them."
            )
        # A value computed in half precision is off by more.
        rounding = max(ROUNDING, 2 * float(np.finfo(self.dtype).eps))
        if self.low < -rounding or self.high > 1 + rounding:
            raise DataError(
                f"{what}: the values are in [{_digits(self.low)}, {_digits(self.high)}], expected "
                f"[0, 1]: scale them, or store uint8."
            )


def _digits(value: np.floating) -> str:
    """A number with all digits that tell it from its neighbours."""
    if abs(float(value)) < 1e9:
        return np.format_float_positional(value, trim="-")
    return np.format_float_scientific(value, trim="-")


def checked_labels(array: np.ndarray, what: str) -> np.ndarray:
    """Labels as they may be used: int64 (N,), or uint8 (N, L) of 0 and 1."""
    if not array.size:
        raise DataError(f"{what}: the split is empty (shape {array.shape}): expected labels.")
    if array.ndim not in (1, 2):
        raise DataError(f"{what}: the shape is {array.shape}, expected (N,), (N, 1) or (N, L).")
    if array.dtype.kind not in "iub":
        raise DataError(f"{what}: the type is {array.dtype}, expected integers: class numbers.")
    low, high = int(array.min()), int(array.max())
    if array.ndim == 2 and array.shape[1] > 1:
        if low < 0 or high > 1:
            raise DataError(
                f"{what}: {array.shape[1]} labels per row with values from {low} to {high}, "
                f"expected 0 and 1."
            )
        return array.astype(np.uint8)
    if low < 0 or high > np.iinfo(np.uint16).max:
        raise DataError(
            f"{what}: the labels run from {low} to {high} and are out of range: expected class "
            f"numbers from 0 up."
        )
    return array.reshape(-1).astype(np.int64)


class Column(NamedTuple):
    """A column: its name, and its values if they are categories."""

    name: str
    kind: Literal["number", "date", "category"]
    levels: tuple[str, ...] = ()
    """in the order of their codes"""


@dataclass(frozen=True)
class Table:
    """The columns of ``Arrays`` that hold a table: x is float64 (N, D), codes for categories, and
    nan where a value is missing."""

    columns: tuple[Column, ...]
    target: str
    """The column that holds the classes, which is not one of ``columns``."""

    @property
    def coded(self) -> np.ndarray:
        """(D,) which columns are categories."""
        return np.array([each.kind == "category" for each in self.columns], dtype=bool)


@dataclass(frozen=True, eq=False)
class Arrays:
    """A data set in memory, or its images on disk, as stored, with what is known about it.

    `*_x` are uint8, or float32 in [0, 1], (N, H, W) or (N, H, W, C) with C of 1 or 3; `*_y` int64
    class numbers (N,), or uint8 0/1 (N, L) for the kind "multi-label". `checksum` is the MD5 of the
    file (of several: joined by +), or of the arrays for digits, or of names and bytes for a folder.
    `*_groups` are int64 (N,), the same number for rows of one patient in every split, or None
    where nothing is known of patients. `verified` is False only for a file under an official name
    that has another MD5. `notes` are what the user is to be told about this copy.
    """

    name: str
    kind: Kind
    classes: tuple[str, ...]
    train_x: Pixels
    train_y: np.ndarray
    val_x: Pixels
    val_y: np.ndarray
    test_x: Pixels
    test_y: np.ndarray
    checksum: str
    verified: bool
    caveats: tuple[str, ...]
    source: str
    notes: tuple[str, ...]
    train_groups: np.ndarray | None = None
    val_groups: np.ndarray | None = None
    test_groups: np.ndarray | None = None
    table: Table | None = None
    """The columns, if the rows are those of a table: then `*_x` are float64 (N, D)."""
    unlabelled_x: Pixels | None = None
    """Images without labels, if they come from elsewhere."""

    @property
    def images(self) -> tuple[Pixels, Pixels, Pixels]:
        """Those of train, val and test."""
        return self.train_x, self.val_x, self.test_x

    @property
    def groups(self) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """Those of train, val and test; a reader knows those of all three or of none."""
        train, val, test = self.train_groups, self.val_groups, self.test_groups
        return None if train is None or val is None or test is None else (train, val, test)

    @property
    def nbytes(self) -> int:
        """Bytes that all images take."""
        return sum(images.nbytes for images in self.images)


@dataclass(frozen=True, eq=False)
class Raw:
    """Arrays as a file holds them, by the keys of MedMNIST, and notes on how they were read."""

    arrays: dict[str, Any]
    """images are arrays, or on disk"""
    notes: tuple[str, ...]
