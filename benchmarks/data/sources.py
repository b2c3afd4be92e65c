"""From the name of a data set to its arrays as stored: official sets, npz files, folders.

Everything here is numpy; nothing is ever unpickled.
"""

import contextlib
import difflib
import hashlib
import json
import math
import os
import secrets
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from benchmarks.data.catalogue import (
    CATALOGUE,
    Entry,
    File,
    Kind,
)
from benchmarks.data.download import (
    DataError,
    by_hand,
    fetch,
    md5_of,
)

SPLITS = ("train", "val", "test")
SPLIT_SEED = 0
NUMBERED = "Number the classes from 0 without gaps."
FOLDER_SHARES = (0.6, 0.2, 0.2)
MADE = ("split 60/20/20", "validation split cut")
"""How a note begins that says how a split was made."""
GIB = 1 << 30
CHUNK = 4096  # rows looked at together, so that a memory-mapped set is not read as a whole
SIDECAR_BYTES = 256 << 20  # from here on a checksum takes long enough to be remembered
CIFAR_PIXELS = 3 * 32 * 32
DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, RuntimeError)
ROUNDING = 1e-6  # floats this far outside of [0, 1] are taken for rounding, and clipped


def default_root() -> Path:
    """The data folder: AUGBENCH_DATA, or ~/.cache/augbench."""
    return Path(os.environ.get("AUGBENCH_DATA") or "~/.cache/augbench").expanduser()


def load(
    name: str,
    *,
    size: int = 28,
    path: str | None = None,
    groups: int | str | None = None,
    root: Path,
    val_fraction: float = 0.1,
    allow_unverified: bool = False,
    memory_gib: float = 4.0,
    download: bool = True,
) -> "Arrays":
    """The arrays of a data set: a name of the catalogue, or "npz" or "folder" with its `path`.

    `size` is the edge in pixels: one that the set is published in, or what the images of a folder
    are resized to; sets of one size and npz files come as they are. A missing validation split is
    cut from train: `val_fraction` of it, stratified, the same for every run. A file under an
    official name with another MD5 is refused unless `allow_unverified`. Images that take more than
    `memory_gib` GiB are memory-mapped from an uncompressed copy below `root`.

    Raises DataError for everything that is wrong with the data, with the file and what to do.
    """
    if not 0 < val_fraction < 1:
        raise DataError(f"val_fraction is {val_fraction}, expected a number between 0 and 1.")
    if name in ("npz", "folder"):
        if path is None:
            raise DataError(f"{name} needs a path, e.g. {name}:PATH.")
        if name == "npz" and groups is None:
            return _load_npz(Path(path).expanduser(), root, val_fraction, memory_gib)
        if name == "folder":
            return _load_folder(Path(path).expanduser(), size, val_fraction, groups)
    if groups is not None:
        raise DataError(
            f"{name} takes no groups: a folder does; an npz file holds train_groups, test_groups."
        )
    entry = _entry(name)
    size = _size(entry, size)
    if name == "digits":
        return _load_digits(entry)
    paths = _present(entry, size, root, download)
    checksums = [_checksum(path, root) for path in paths]
    notes = _compare(entry.files[size], paths, checksums, allow_unverified)
    verified = not notes
    if entry.folder == "medmnist":
        raw = _read_npz(paths[0], root, checksums[0], memory_gib)
    elif entry.folder == "cifar":
        raw = _read_cifar(paths[0], entry)
    else:
        raw = _read_svhn(paths[0], paths[1])
    arrays = _assemble(raw, paths[0], name, val_fraction, entry)
    notes += _against_entry(arrays, raw, entry, size, paths[0], verified)
    return replace(
        arrays, checksum="+".join(checksums), verified=verified, notes=(*notes, *arrays.notes)
    )


def from_arrays(
    name: str,
    train: tuple[np.ndarray, np.ndarray],
    val: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    groups: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None,
) -> "Arrays":
    """A user's own (images, labels) of each split, checked as an npz file would be.

    `groups` of the same splits are equal for rows of one patient: numbers or text, (N,).

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
        raise DataError(f"{name}: groups of {len(groups)} splits, expected train, select and test.")
    for split, own in zip(SPLITS, groups, strict=True) if groups is not None else ():
        arrays[f"{split}_groups"] = np.asarray(own)
        digest.update(np.ascontiguousarray(own).tobytes())
    made = _assemble(_Raw(arrays, ()), Path(name), name, 0.1, None)
    return replace(made, checksum=digest.hexdigest())


def images_only(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """The images to predict, and their labels where the file has them.

    Reads `images` and `labels` of an npz, or else `test_images` and `test_labels`. Images are uint8
    or float32 in [0, 1], (N, H, W) or (N, H, W, C); labels int64 (N,) or uint8 (N, L).

    Raises DataError where the file or its arrays cannot be used.
    """
    path = path.expanduser()
    with _opened(path) as archive:
        members = _members(archive)
        prefix = next((p for p in ("", "test_") if f"{p}images" in members), None)
        if prefix is None:
            raise DataError(
                f"{path} has the keys {', '.join(members) or 'none'}: expected images "
                f"(or test_images)."
            )
        x, _ = _images(_member(archive, f"{prefix}images", path), f"{path}, {prefix}images")
        if f"{prefix}labels" not in members:
            return x, None
        y = _labels(_member(archive, f"{prefix}labels", path), f"{path}, {prefix}labels")
    if len(x) != len(y):
        raise DataError(f"{path} has {len(x)} images and {len(y)} labels: expected as many.")
    return x, y


def locate(entry: Entry, size: int, root: Path) -> list[Path | None]:
    """Where each file of a set lies on this machine, None where it does not.

    Looks in `<root>/<folder of the set>`, in `root`, and for MedMNIST in ~/.medmnist, in this
    order.
    """
    places = [root / entry.folder, root]
    if entry.folder == "medmnist":
        places.append(Path.home() / ".medmnist")
    return [
        next((place / file.name for place in places if (place / file.name).is_file()), None)
        for file in entry.files[_size(entry, size)]
    ]


def verify(entry: Entry, size: int, root: Path) -> list[tuple[File, Path | None, str | None, bool]]:
    """Each file of a set with its path, its MD5 read anew, and whether that is the official one."""
    found = []
    for file, path in zip(entry.files[_size(entry, size)], locate(entry, size, root), strict=True):
        md5 = None if path is None else md5_of(path)
        found.append((file, path, md5, md5 == file.md5))
    return found


def stratified_split(
    labels: np.ndarray, shares: Sequence[float], seed: int
) -> tuple[np.ndarray, ...]:
    """Disjoint rows for each share, sorted, that keep the share of every class.

    `labels` (N,) or, for combinations of labels, (N, L); `shares` are relative sizes: counts that
    add up to N are met exactly, all others after rounding by largest remainder. Within a part each
    class has its proportional number of rows, rounded down or up. A function of its arguments
    alone.
    """
    generator = np.random.default_rng(seed)
    _, group = np.unique(labels, axis=0, return_inverse=True)
    group = group.reshape(-1)
    rows = [generator.permutation(np.flatnonzero(group == g)) for g in range(group.max() + 1)]
    ties = generator.permutation(len(rows))
    exact = np.asarray(shares, dtype=np.float64) / math.fsum(shares) * len(group)
    # A count must not lose a row to the rounding of a division.
    exact = np.where(np.isclose(exact, np.rint(exact), rtol=0, atol=1e-6), np.rint(exact), exact)
    counts = _largest_remainder(exact, len(group), np.arange(len(exact)))
    parts = []
    for count in counts:
        left = np.array([len(r) for r in rows])
        quota = left * count / max(left.sum(), 1)
        take = _largest_remainder(quota, int(count), ties)
        parts.append(np.sort(np.concatenate([r[:t] for r, t in zip(rows, take, strict=True)])))
        rows = [r[t:] for r, t in zip(rows, take, strict=True)]
    return tuple(parts)


def grouped_split(
    labels: np.ndarray, groups: np.ndarray, shares: Sequence[float], seed: int
) -> tuple[np.ndarray, ...]:
    """Disjoint rows for each share, sorted, where all rows of a group are in one part.

    `labels` (N,) class numbers, or (N, L) of 0 and 1; `groups` (N,), equal for rows of one patient;
    `shares` are relative sizes. Sizes and classes come near the shares as far as groups allow: the
    largest groups go first (by powers of two of their rows, within these in random order), each to
    the part that lacks most of what it brings. A class is in every part where enough groups have
    it, and where too few have it, in the part of the largest share. No part is empty. A function of
    its arguments alone.

    Raises ValueError where there are fewer groups than shares.
    """
    names, group = np.unique(groups, return_inverse=True)
    group = group.reshape(-1)
    if len(names) < len(shares):
        raise ValueError(f"{len(names)} groups cannot fill {len(shares)} parts")
    if labels.ndim == 1:
        one_hot = np.unique(labels)[None] == labels[:, None]
    else:
        one_hot = labels[:, labels.any(0)] > 0
    # What a group brings: rows of each class, and rows at all.
    columns = np.column_stack([one_hot, np.ones(len(labels))])
    brings = np.zeros((len(names), columns.shape[1]))
    np.add.at(brings, group, columns)
    share = np.asarray(shares, dtype=np.float64) / math.fsum(shares)
    whole = brings.sum(0)
    wanted, have = share[:, None] * whole, np.zeros((len(share), len(whole)))
    weight = np.ones(len(whole))
    weight[-1] = max(1, len(whole) - 1)  # sizes count as much as all classes together
    left = (brings > 0).sum(0)  # groups to come that have rows of a class
    largest = np.arange(len(share)) == share.argmax()
    part = np.empty(len(names), np.int64)
    order = np.random.default_rng(seed).permutation(len(names))
    magnitude = np.frexp(brings[order, -1])[1]  # by exact size every seed would give one split
    for g in order[np.argsort(-magnitude, kind="stable")]:
        new = brings[g]
        lacks = have == 0
        # Where as few groups are left as parts lack the class, this one goes to one of those.
        last = lacks & (new > 0) & (left <= lacks.sum(0))
        distance = ((2 * new * (have - wanted) + new**2) / (wanted * whole)) @ weight
        urgent = (~last[:, -1], ~(largest & last.any(1)), -last.sum(1), distance.round(9))
        part[g] = np.lexsort(urgent[::-1])[0]
        have[part[g]] += new
        left -= new > 0
    return tuple(np.flatnonzero(part[group] == p) for p in range(len(share)))


def _largest_remainder(quota: np.ndarray, total: int, ties: np.ndarray) -> np.ndarray:
    """Integers that add up to `total`, each its quota rounded down or up."""
    base = np.floor(quota).astype(np.int64)
    order = np.lexsort((ties, -np.round(quota - base, 9)))
    base[order[: total - int(base.sum())]] += 1
    return base


def _entry(name: str) -> Entry:
    if name not in CATALOGUE:
        known = [*CATALOGUE, "npz", "folder"]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise DataError(f"no data set is named {name!r}.{hint} Known: {', '.join(known)}.")
    return CATALOGUE[name]


def _size(entry: Entry, size: int) -> int:
    """The size to use; 28, the default, stands for the only size of a set that has one."""
    if size in entry.sizes:
        return size
    if size == 28 and len(entry.sizes) == 1:
        return entry.sizes[0]
    allowed = ", ".join(map(str, entry.sizes))
    raise DataError(f"{entry.name} has no size {size}: expected one of {allowed}.")


def _present(entry: Entry, size: int, root: Path, download: bool) -> list[Path]:
    """The paths of all files of a set, after fetching those that are missing."""
    paths = []
    for file, path in zip(entry.files[size], locate(entry, size, root), strict=True):
        folder = root / entry.folder
        if path is None and not download:
            raise DataError(
                f"{file.name} is not in {folder}, and downloading is off. {by_hand(file, folder)}"
            )
        paths.append(fetch(file, folder) if path is None else path)
    return paths


def _checksum(path: Path, root: Path) -> str:
    """The MD5 of a file; that of a large one is remembered until its size or its time changes."""
    try:
        stat = path.stat()
        if stat.st_size < SIDECAR_BYTES:
            return md5_of(path)
        sidecar = root / "cache" / f"{path.name}.md5.json"
        seen = [str(path.resolve()), stat.st_size, stat.st_mtime_ns]
        # A missing or damaged sidecar only costs the time to read the file once more.
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            kept = json.loads(sidecar.read_text(encoding="utf-8"))
            if kept["file"] == seen:
                return kept["md5"]
        md5 = md5_of(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    with contextlib.suppress(OSError):
        sidecar.parent.mkdir(parents=True, exist_ok=True)
        with _replacing(sidecar) as handle:
            handle.write(json.dumps({"file": seen, "md5": md5}).encode())
    return md5


def _compare(
    files: Sequence[File], paths: Sequence[Path], checksums: Sequence[str], allow: bool
) -> list[str]:
    """A note for each file whose MD5 is not the official one; DataError unless they are allowed."""
    notes = []
    for file, path, got in zip(files, paths, checksums, strict=True):
        if got == file.md5:
            continue
        if not allow:
            raise DataError(
                f"{path} has MD5 {got}, the official {file.name} has {file.md5}: it is an altered "
                f"or damaged copy. Remove or rename it and fetch again, or pass "
                f"--allow-unverified (allow_unverified=True) to use it as it is."
            )
        notes.append(f"unverified file: {file.name} has MD5 {got}, the official one {file.md5}")
    return notes


def _load_digits(entry: Entry) -> "Arrays":
    """The digits of scikit-learn, 8x8 in 0..16, scaled once to 28x28 uint8."""
    from PIL import Image  # noqa: PLC0415
    from sklearn.datasets import load_digits  # noqa: PLC0415

    # The Bunch's attributes are dynamic: by key, they have a type that says nothing false.
    bunch: Mapping[str, np.ndarray] = load_digits()  # pyright: ignore[reportAssignmentType]
    small = np.rint(bunch["images"] * (255 / 16)).astype(np.uint8)
    edge = entry.sizes[0]
    x = np.stack(
        [
            np.asarray(Image.fromarray(image).resize((edge, edge), Image.Resampling.BILINEAR))
            for image in small
        ]
    )
    y = bunch["target"].astype(np.int64)
    parts = stratified_split(y, entry.counts, SPLIT_SEED)
    pieces = {
        f"{split}_{letter}": array[rows]
        for split, rows in zip(SPLITS, parts, strict=True)
        for letter, array in (("x", x), ("y", y))
    }
    digest = hashlib.md5(usedforsecurity=False)
    for array in pieces.values():
        digest.update(np.ascontiguousarray(array).tobytes())
    return Arrays(
        name=entry.name,
        kind=entry.kind,
        classes=entry.classes,
        **pieces,
        checksum=digest.hexdigest(),
        verified=True,
        caveats=entry.caveats,
        source=entry.source,
        notes=(),
    )


def _load_npz(path: Path, root: Path, val_fraction: float, memory_gib: float) -> "Arrays":
    """A user's own file in the keys of MedMNIST; an official file is known by its MD5."""
    with _opened(path):
        pass  # what is no archive at all is told before its checksum is taken
    md5 = _checksum(path, root)
    official = {
        file.md5: entry
        for entry in CATALOGUE.values()
        if entry.folder == "medmnist"
        for files in entry.files.values()
        for file in files
    }
    entry = official.get(md5)
    raw = _read_npz(path, root, md5, memory_gib, with_groups=True)
    arrays = _assemble(raw, path, f"npz:{path.stem}", val_fraction, entry)
    notes = arrays.notes
    names = {file.name for e in CATALOGUE.values() for fs in e.files.values() for file in fs}
    if entry is None and path.name in names:
        notes = (*notes, f"{path.name} is named like an official file, but its MD5 {md5} is not")
    # Once these keys were not read: with them it is another data set.
    checksum = md5 if arrays.train_groups is None else f"{md5}+groups"
    return _with_duplicates(replace(arrays, checksum=checksum, notes=notes), entry is None)


def _load_folder(path: Path, size: int, val_fraction: float, groups: int | str | None) -> "Arrays":
    """Images in one folder a class, below train/, test/ and perhaps val/, or below `path`."""
    from benchmarks.data.folders import read, shown  # noqa: PLC0415

    folder = read(path, size, groups)
    where = shown(path)
    rows = {part: np.flatnonzero(folder.part == k) for k, part in enumerate(folder.parts)}
    notes = folder.notes
    if "train" not in rows:
        if folder.groups is None:
            cut = stratified_split(folder.y, FOLDER_SHARES, SPLIT_SEED)
            how = "stratified"
        else:
            # Of equal shares the earlier one gets more where groups are few: the test split.
            train, test, val = _by_group(folder.y, folder.groups, FOLDER_SHARES, where)
            cut = train, val, test
            how = f"by group ({_counted(folder.groups)})"
        rows = dict(zip(SPLITS, cut, strict=True))
        if not all(map(len, cut)):
            raise DataError(
                f"{where}: {len(folder.y)} images are too few for three splits: add some, or put "
                f"them into train/, val/ and test/ yourself."
            )
        notes = (*notes, f"split 60/20/20 into train/val/test, {how}, split seed {SPLIT_SEED}")
    raw = {}
    for split, chosen in rows.items():
        raw[f"{split}_images"], raw[f"{split}_labels"] = folder.x[chosen], folder.y[chosen]
        if folder.groups is not None:
            raw[f"{split}_groups"] = folder.groups[chosen]
    arrays = _assemble(
        _Raw(raw, ()), where, f"folder:{shown(path.name)}", val_fraction, None, folder.classes
    )
    notes, caveats = (*notes, *arrays.notes), arrays.caveats
    if folder.subfolders and groups is None and not {"train", "val"} <= set(folder.parts):
        what = "train and val are split" if "train" in folder.parts else "split"
        hint = (
            f"{what} by image, although the classes have subfolders (patients?): images of one "
            f"subfolder may be on both sides; name it folder:DIR(groups=1) to keep them together, "
            f"or (groups=0) if images are independent"
        )
        notes, caveats = (*notes, hint), (*caveats, hint)
    return _with_duplicates(
        replace(arrays, checksum=folder.checksum, notes=notes, caveats=caveats), own=True
    )


def _counted(groups: np.ndarray) -> str:
    """``1 group``, ``3 groups``."""
    count = len(np.unique(groups))
    return f"{count} group{'s' if count > 1 else ''}"


def _by_group(
    labels: np.ndarray, groups: np.ndarray, shares: Sequence[float], where: object
) -> tuple[np.ndarray, ...]:
    try:
        return grouped_split(labels, groups, shares, SPLIT_SEED)
    except ValueError as error:
        raise DataError(
            f"{where}: {error}: expected at least as many patients as splits, or splits of your "
            f"own."
        ) from error


def _read_npz(
    path: Path, root: Path, md5: str, memory_gib: float, with_groups: bool = False
) -> "_Raw":
    """The arrays of an npz, its images memory-mapped where they are over the budget."""
    with _opened(path) as archive:
        members = _members(archive)
        wanted = [f"{s}_{what}" for s in SPLITS for what in ("images", "labels")]
        missing = [k for k in wanted if k not in members]
        if missing and not (missing == ["val_images", "val_labels"]):
            raise DataError(
                f"{path} lacks {', '.join(missing)}; it has {', '.join(members) or 'no keys'}. "
                f"Expected train_images, train_labels, test_images, test_labels and, where there "
                f"is one, the validation split in val_images and val_labels."
            )
        wanted = [k for k in wanted if k in members]
        if with_groups and any(f"{s}_groups" in members for s in SPLITS):
            keys = [k.replace("images", "groups") for k in wanted if k.endswith("images")]
            lacking = sorted({*keys} ^ {k for s in SPLITS if (k := f"{s}_groups") in members})
            if lacking:
                raise DataError(
                    f"{path}: {', '.join(lacking)} of {', '.join(keys)} lacks or has no images: "
                    f"expected groups of every split, or of none."
                )
            wanted += keys
        need = sum(archive.getinfo(f"{k}.npy").file_size for k in wanted)
        if need <= memory_gib * GIB:
            return _Raw({k: _member(archive, k, path) for k in wanted}, ())
        folder = root / "cache" / f"{path.stem}-{md5[:8]}"
        arrays = {
            k: _mapped(archive, k, path, folder)
            if k.endswith("images")
            else _member(archive, k, path)
            for k in wanted
        }
    images = ", ".join(k for k in wanted if k.endswith("images"))
    note = (
        f"{images} memory-mapped from {folder}: {need / GIB:.2g} GiB, over the memory budget of "
        f"{memory_gib:g} GiB"
    )
    return _Raw(arrays, (note,))


def _members(archive: zipfile.ZipFile) -> list[str]:
    return [n.removesuffix(".npy") for n in archive.namelist() if n.endswith(".npy")]


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """An npz as the zip archive that it is."""
    if not path.is_file():
        what = "is no file" if path.exists() else "does not exist"
        raise DataError(f"{path} {what}: expected an npz file.")
    try:
        archive = zipfile.ZipFile(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    except DAMAGED as error:
        with path.open("rb") as handle:
            cut = handle.read(4) == b"PK\x03\x04"
        what = "is truncated" if cut else "is no npz file (no zip archive)"
        raise DataError(
            f"{path} {what}: {error}. Copy or download it again; numpy.savez_compressed writes one."
        ) from error
    with archive:
        yield archive


def _member(archive: zipfile.ZipFile, key: str, path: Path) -> np.ndarray:
    try:
        with archive.open(f"{key}.npy") as handle:
            return np.lib.format.read_array(handle, allow_pickle=False)
    except DAMAGED as error:
        raise _unreadable(path, key, error) from error


def _mapped(archive: zipfile.ZipFile, key: str, path: Path, folder: Path) -> np.ndarray:
    """One member, memory-mapped copy-on-write from its uncompressed copy, made where missing."""
    copy = folder / f"{key}.npy"
    info = archive.getinfo(f"{key}.npy")
    try:
        if not copy.is_file() or copy.stat().st_size != info.file_size:
            folder.mkdir(parents=True, exist_ok=True)
            with archive.open(info) as member, _replacing(copy) as handle:
                shutil.copyfileobj(member, handle, 1 << 20)
        return np.load(copy, mmap_mode="c", allow_pickle=False)
    except DAMAGED as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise DataError(
                f"{key} of {path} cannot be unpacked into {folder}: {error}. It needs "
                f"{info.file_size / GIB:.2g} GiB there; free some space, choose another data "
                f"folder (AUGBENCH_DATA) or raise the memory budget."
            ) from error
        raise _unreadable(path, key, error) from error


def _unreadable(path: Path, key: str, error: Exception) -> DataError:
    if "Object arrays" in str(error) or "Python objects" in str(error):
        return DataError(
            f"{path}: {key} is pickled (an array of Python objects), which is never loaded. Save "
            f"it as an array of numbers, every image of the same shape."
        )
    return DataError(f"{path}: {key} is damaged ({error}). Copy or download the file again.")


@contextlib.contextmanager
def _replacing(target: Path) -> Iterator[BinaryIO]:
    """A file beside `target`, of this process alone, that takes its name once it is whole."""
    beside = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with beside.open("wb") as handle:
            yield handle
        beside.replace(target)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def _read_cifar(path: Path, entry: Entry) -> "_Raw":
    """A binary CIFAR archive: rows of one (10) or two (100: coarse, fine) labels and 3x32x32."""
    ten = entry.name == "cifar10"
    train = [f"data_batch_{i}.bin" for i in range(1, 6)] if ten else ["train.bin"]
    test = "test_batch.bin" if ten else "test.bin"
    labels = 1 if ten else 2
    blocks: dict[str, np.ndarray] = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                name = Path(member.name).name
                handle = archive.extractfile(member) if name in (*train, test) else None
                if handle is not None:
                    with handle:
                        blocks[name] = np.frombuffer(handle.read(), np.uint8)
    except (tarfile.TarError, *DAMAGED) as error:
        raise DataError(f"{path} is damaged ({error}): download it again.") from error
    for name in (*train, test):
        if name not in blocks:
            raise DataError(f"{path} lacks {name}: expected the binary version of {entry.name}.")
        if blocks[name].size % (labels + CIFAR_PIXELS):
            raise DataError(
                f"{path}: {name} has {blocks[name].size} bytes, expected a multiple of "
                f"{labels + CIFAR_PIXELS}: download it again."
            )
    arrays = {}
    for split, names in (("train", train), ("test", [test])):
        rows = np.concatenate([blocks[n].reshape(-1, labels + CIFAR_PIXELS) for n in names])
        planes = rows[:, labels:].reshape(-1, 3, 32, 32)
        arrays[f"{split}_images"] = np.ascontiguousarray(planes.transpose(0, 2, 3, 1))
        arrays[f"{split}_labels"] = rows[:, labels - 1]
    return _Raw(arrays, ())


def _read_svhn(train: Path, test: Path) -> "_Raw":
    """The cropped digits of SVHN: X (32, 32, 3, N), y (N, 1) with 10 for the digit 0."""
    from scipy.io import loadmat  # noqa: PLC0415
    from scipy.io.matlab import MatReadError  # noqa: PLC0415

    arrays = {}
    for split, path in (("train", train), ("test", test)):
        try:
            stored = loadmat(path, variable_names=["X", "y"])
            x, y = stored["X"], stored["y"]
        except (MatReadError, KeyError, TypeError, *DAMAGED) as error:
            raise DataError(f"{path} is damaged ({error}): download it again.") from error
        if x.ndim != 4:
            raise DataError(f"{path}: X has the shape {x.shape}, expected (32, 32, 3, N).")
        arrays[f"{split}_images"] = np.ascontiguousarray(x.transpose(3, 0, 1, 2))
        arrays[f"{split}_labels"] = np.where(y == 10, 0, y)
    return _Raw(arrays, ())


def _assemble(
    raw: "_Raw",
    path: Path | str,
    name: str,
    val_fraction: float,
    entry: Entry | None,
    classes: tuple[str, ...] | None = None,
) -> "Arrays":
    """Arrays from what a file held, after every check that does not need the official facts."""
    notes = list(raw.notes)
    pieces: dict[str, np.ndarray] = {}
    for split in SPLITS:
        if (key := f"{split}_images") in raw.arrays:
            pieces[f"{split}_x"], clipped = _images(raw.arrays[key], f"{path}, {key}")
            if clipped:
                notes.append(f"{key}: {clipped} values outside of [0, 1] by rounding are clipped")
        if (key := f"{split}_labels") in raw.arrays:
            pieces[f"{split}_y"] = _labels(raw.arrays[key], f"{path}, {key}")
    pieces |= _groups(raw.arrays, path)
    splits = [s for s in SPLITS if f"{s}_x" in pieces]
    for split in splits:
        x, y = pieces[f"{split}_x"], pieces[f"{split}_y"]
        if len(x) != len(y):
            raise DataError(
                f"{path} has {len(x)} {split}_images and {len(y)} {split}_labels: expected as many."
            )
        if len(pieces.get(f"{split}_g", x)) != len(x):
            raise DataError(
                f"{path} has {len(x)} {split}_images and {len(pieces[f'{split}_g'])} "
                f"{split}_groups: expected as many."
            )
        first = pieces["train_x"]
        if (x.shape[1:], x.dtype) != (first.shape[1:], first.dtype):
            raise DataError(
                f"{path}: {split}_images are {x.dtype} of shape {x.shape[1:]}, train_images "
                f"{first.dtype} of shape {first.shape[1:]}: expected the same in every split."
            )
        if y.shape[1:] != pieces["train_y"].shape[1:]:
            raise DataError(
                f"{path}: {split}_labels have the shape {y.shape}, train_labels "
                f"{pieces['train_y'].shape}: expected as many labels a row in every split."
            )
    names = entry.classes if entry else classes
    names = _classes(pieces, splits, path, names)
    y = pieces["train_y"]
    if y.ndim == 2 and all((pieces[f"{s}_y"].sum(1) == 1).all() for s in splits):
        notes.append(
            "multi-label by the shape of the labels, yet every row has exactly one: store class "
            "numbers (N,) if the classes exclude each other"
        )
    if "val" not in splits:
        if isinstance(pieces["train_x"], np.memmap):
            raise DataError(
                f"{path} has no val split and is over the memory budget: add val_images and "
                f"val_labels to it, or raise the budget."
            )
        shares, how = (1 - val_fraction, val_fraction), "stratified"
        if "train_g" in pieces:
            kept, cut = _by_group(y, pieces["train_g"], shares, path)
            how = f"by group ({_counted(pieces['train_g'][cut])})"
        else:
            kept, cut = stratified_split(y, shares, SPLIT_SEED)
        if not len(cut) or not len(kept):
            raise DataError(
                f"{path}: {val_fraction:g} of {len(y)} training rows leaves a split without rows: "
                f"add a val split, or change val_fraction."
            )
        for letter in (letter for letter in "xyg" if f"train_{letter}" in pieces):
            whole = pieces[f"train_{letter}"]
            pieces[f"train_{letter}"], pieces[f"val_{letter}"] = whole[kept], whole[cut]
        notes.append(
            f"validation split cut from train: {100 * val_fraction:g} %, {how}, split seed "
            f"{SPLIT_SEED}"
        )
    y = pieces["train_y"]
    seen = (y > 0).any(0) if y.ndim == 2 else np.isin(np.arange(len(names)), y)
    if not seen.all():
        absent = ", ".join(names[k] for k in np.flatnonzero(~seen)[:5])
        raise DataError(
            f"{path}: the train split has no row of {(~seen).sum()} of {len(names)} classes "
            f"({absent}): every class must occur in train. "
            + ("Add images, or remove the class." if classes else NUMBERED)
        )
    caveats = [*(entry.caveats if entry else ()), *_shared(pieces)]
    lacking = _lacking(pieces, names)
    notes += lacking
    kind: Kind = (
        entry.kind
        if entry
        else "multi-label"
        if y.ndim == 2
        else "binary-class"
        if len(names) == 2
        else "multi-class"
    )
    return Arrays(
        name=name,
        kind=kind,
        classes=names,
        train_x=pieces["train_x"],
        train_y=pieces["train_y"],
        val_x=pieces["val_x"],
        val_y=pieces["val_y"],
        test_x=pieces["test_x"],
        test_y=pieces["test_y"],
        checksum="",
        verified=True,
        caveats=(*caveats, *lacking),
        source=entry.source if entry else "the user's own data",
        notes=tuple(notes),
        **{f"{split}_groups": pieces.get(f"{split}_g") for split in SPLITS},
    )


def _groups(raw: Mapping[str, np.ndarray], path: Path | str) -> dict[str, np.ndarray]:
    """The groups of each split as int64 (N,), the same number for the same patient everywhere."""
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
                f"integers or text of shape (N,): the same for rows of one patient."
            )
        unknown = array == "" if array.dtype.kind == "U" else array < 0
        if unknown.any():
            raise DataError(
                f"{path}, {key}: {unknown.sum()} rows have no group (empty or below 0), the first "
                f"is row {unknown.argmax()}: give each of them a group of its own."
            )
        # One type for all: beside int64, numpy would make floats of uint64, and long ids equal.
        given[split] = array if array.dtype.kind == "U" else array.astype(np.uint64)
    if not given:
        return {}
    if len({array.dtype.kind == "U" for array in given.values()}) > 1:
        raise DataError(f"{path}: groups are text in one split and numbers in another.")
    _, numbers = np.unique(np.concatenate(list(given.values())), return_inverse=True)
    ends = np.cumsum([len(array) for array in given.values()])[:-1]
    parts = np.split(numbers.reshape(-1).astype(np.int64), ends)
    return {f"{split}_g": part for split, part in zip(given, parts, strict=True)}


def duplicates(arrays: "Arrays") -> list[str]:
    """For each pair of splits, in words, how many images of the later are in the earlier one too.

    Images are compared pixel for pixel, as stored or resized; rows are counted from 0.
    """
    marks = {
        split: [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in images]
        for split, images in zip(SPLITS, arrays.images, strict=True)
    }
    found = []
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        known = set(marks[one])
        twice = [row for row, mark in enumerate(marks[other]) if mark in known]
        if twice:
            found.append(
                f"{len(twice)} of {len(marks[other])} {other} images are in {one} too, pixel for "
                f"pixel (the first is row {twice[0]} of {other})"
            )
    return found


def _with_duplicates(arrays: "Arrays", own: bool) -> "Arrays":
    """With a caveat for images of a user's own data that are in two splits; GIBs are not read."""
    if not own or arrays.nbytes > GIB:
        return arrays
    return replace(arrays, caveats=(*arrays.caveats, *duplicates(arrays)))


def about_splits(arrays: "Arrays") -> list[str]:
    """The notes and caveats that hold for these splits alone, not for the images cut anew."""
    pieces = {
        f"{split}_{letter}": array
        for split in SPLITS
        for letter, what in (("y", "y"), ("g", "groups"))
        if (array := getattr(arrays, f"{split}_{what}")) is not None
    }
    twice = duplicates(arrays) if arrays.nbytes <= GIB else []
    made = [each for each in arrays.notes if each.startswith(MADE)]
    return [*_shared(pieces), *_lacking(pieces, arrays.classes), *twice, *made]


def _shared(pieces: Mapping[str, np.ndarray]) -> list[str]:
    """A caveat for each two splits that have images of the same patients."""
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
    """What cannot be said of a split without rows of some classes; train has all of them."""
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
    """Names as a list for people; where there are many, the first."""
    if len(some) > 5:
        return f"{', '.join(some[:4])} and {len(some) - 4} more classes"
    return " and ".join(filter(None, (", ".join(some[:-1]), some[-1])))


def _classes(
    pieces: Mapping[str, np.ndarray],
    splits: Sequence[str],
    path: Path | str,
    names: tuple[str, ...] | None,
) -> tuple[str, ...]:
    """The names of the classes, after no label was found outside of them."""
    y = pieces["train_y"]
    if y.ndim == 2:
        if names is not None and len(names) != y.shape[1]:
            raise DataError(f"{path}: {y.shape[1]} labels a row, expected {len(names)}.")
        return names or tuple(map(str, range(y.shape[1])))
    if names is None:
        limit, why = int(y.max()) + 1, "the largest of train_labels"
        if limit < 2:
            raise DataError(
                f"{path}: train_labels hold class 0 only: expected 2 classes or more, "
                f"numbered from 0."
            )
        # Names are made before the gaps in the numbers are looked for: a label that is far off,
        # 255 for "unknown" say, is told as a class without rows.
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


def _against_entry(
    arrays: "Arrays", raw: "_Raw", entry: Entry, size: int, path: Path, verified: bool
) -> list[str]:
    """Notes on where a file differs from the official facts; DataError where it may not."""
    shape = (size, size) if entry.channels == 1 else (size, size, entry.channels)
    if arrays.train_x.shape[1:] != shape:
        raise DataError(
            f"{path}: images have the shape {arrays.train_x.shape[1:]}, expected {shape} as "
            f"{entry.name} has."
        )
    multi = entry.kind == "multi-label"
    if (arrays.train_y.ndim == 2) != multi:
        raise DataError(f"{path}: labels have the wrong shape for {entry.name} ({entry.kind}).")
    got = tuple(len(raw.arrays.get(f"{s}_labels", ())) for s in SPLITS)
    if got == entry.counts:
        return []
    text = (
        f"{'/'.join(map(str, got))} rows in train/val/test, "
        f"officially {'/'.join(map(str, entry.counts))}"
    )
    if verified:
        raise DataError(f"{path}: {text}. Its MD5 is right: please report this.")
    return [text]


def _images(array: np.ndarray, what: str) -> tuple[np.ndarray, int]:
    """Images as they may be used, uint8 or float32 in [0, 1], and how many values were clipped."""
    if not array.size:
        raise DataError(f"{what}: the split is empty (shape {array.shape}): expected images.")
    if array.ndim not in (3, 4) or (array.ndim == 4 and array.shape[-1] not in (1, 3)):
        raise DataError(
            f"{what}: the shape is {array.shape}, expected (N, H, W) or (N, H, W, C) with C of 1 "
            f"or 3."
        )
    if array.dtype == np.uint8:
        return array, 0
    if array.dtype.kind != "f":
        raise DataError(f"{what}: the type is {array.dtype}, expected uint8 or floats in [0, 1].")
    bad, outside, low, high = 0, 0, array.dtype.type(math.inf), array.dtype.type(-math.inf)
    for start in range(0, len(array), CHUNK):
        chunk = array[start : start + CHUNK]
        finite = np.isfinite(chunk)
        bad += chunk.size - int(finite.sum())
        low = min(low, chunk.min(initial=math.inf, where=finite))
        high = max(high, chunk.max(initial=-math.inf, where=finite))
        outside += int(((chunk < 0) | (chunk > 1)).sum())
    if bad:
        raise DataError(f"{what}: {bad} of {array.size} values are NaN or infinite: remove them.")
    # A value computed in half precision is off by more.
    rounding = max(ROUNDING, 2 * float(np.finfo(array.dtype).eps))
    if low < -rounding or high > 1 + rounding:
        raise DataError(
            f"{what}: the values lie in [{_digits(low)}, {_digits(high)}], expected [0, 1]: scale "
            f"them, or store uint8."
        )
    if array.dtype != np.float32 and isinstance(array, np.memmap):
        raise DataError(
            f"{what}: the type is {array.dtype} and the set is over the memory budget: store "
            f"uint8 or float32, or raise the budget."
        )
    if outside and isinstance(array, np.memmap):  # copied on write: only where there is one
        for row in range(len(array)):
            if array[row].min() < 0 or array[row].max() > 1:
                np.clip(array[row], 0, 1, out=array[row])
    elif outside:
        array = np.clip(array, 0, 1)
    return array.astype(np.float32, copy=False), outside


def _digits(value: np.floating) -> str:
    """A number with all digits that tell it from its neighbours."""
    if abs(float(value)) < 1e9:
        return np.format_float_positional(value, trim="-")
    return np.format_float_scientific(value, trim="-")


def _labels(array: np.ndarray, what: str) -> np.ndarray:
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
                f"{what}: {array.shape[1]} labels a row with values from {low} to {high}, expected "
                f"0 and 1."
            )
        return array.astype(np.uint8)
    if low < 0 or high > np.iinfo(np.uint16).max:
        raise DataError(
            f"{what}: the labels run from {low} to {high} and are out of range: expected class "
            f"numbers from 0 up."
        )
    return array.reshape(-1).astype(np.int64)


@dataclass(frozen=True, eq=False)
class Arrays:
    """A data set in memory (or mapped into it), as stored, with what is known about it.

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
    train_x: np.ndarray
    train_y: np.ndarray
    val_x: np.ndarray
    val_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray
    checksum: str
    verified: bool
    caveats: tuple[str, ...]
    source: str
    notes: tuple[str, ...]
    train_groups: np.ndarray | None = None
    val_groups: np.ndarray | None = None
    test_groups: np.ndarray | None = None

    @property
    def images(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Those of train, val and test."""
        return self.train_x, self.val_x, self.test_x

    @property
    def nbytes(self) -> int:
        """Bytes that all images take."""
        return sum(images.nbytes for images in self.images)


@dataclass(frozen=True, eq=False)
class _Raw:
    """Arrays as a file holds them, by the keys of MedMNIST, and notes on how they were read."""

    arrays: dict[str, np.ndarray]
    notes: tuple[str, ...]
