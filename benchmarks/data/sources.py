"""From the name of a data set to its arrays as stored: official sets, npz files, folders.

Everything here is numpy; nothing is ever unpickled.
"""

import contextlib
import difflib
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.tasks import task_named
from benchmarks.data.archives import load_digits, read_cifar, read_svhn
from benchmarks.data.catalogue import CATALOGUE, Entry, File
from benchmarks.data.cutting import stratified_split
from benchmarks.data.dataset import (
    MADE,
    SPLIT_SEED,
    SPLITS,
    Arrays,
    Raw,
    assemble,
    by_group,
    counted,
    tested,
    with_duplicates,
)
from benchmarks.data.download import DataError, by_hand, fetch, md5_of
from benchmarks.data.layout import shown
from benchmarks.data.npz import images_alone, opened, read_npz, replacing
from benchmarks.data.ondisk import taken
from benchmarks.data.table_catalogue import Reading

if TYPE_CHECKING:
    from benchmarks.data.folders import Folder

FOLDER_SHARES = (0.6, 0.2, 0.2)
SIDECAR_BYTES = 256 << 20  # checksums of larger files take long enough to be cached


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
    reading: Reading | None = None,
) -> Arrays:
    """The arrays of a data set: a name of the catalogue, or "npz" or "folder" with its `path`.

    With `reading` the set is a table: a name of its catalogue, "openml", or "csv" with its `path`.

    `size` is the edge in pixels: one that the set is published in, or the one to which the images
    of a folder are resized; sets of one size and npz files are used as they are. A missing
    validation split is cut from train: `val_fraction` of it, stratified, the same for every run. A
    file under an official name with another MD5 is refused unless `allow_unverified`. Images that
    take more than `memory_gib` GiB are decoded once into a file below `root` and stay there.

    Raises DataError for everything that is wrong with the data, with the file and what to do.
    """
    if reading is not None:
        from benchmarks.data.tables import load_table  # noqa: PLC0415 - loads pandas

        return load_table(name, path or "", reading, root, download)
    if not 0 < val_fraction < 1:
        raise DataError(f"val_fraction is {val_fraction}, expected a number between 0 and 1.")
    if name in ("npz", "folder"):
        if path is None:
            raise DataError(f"{name} needs a path, e.g. {name}:PATH.")
        if name == "npz" and groups is None:
            return _load_npz(Path(path).expanduser(), root, val_fraction, memory_gib)
        if name == "folder":
            return _load_folder(
                Path(path).expanduser(), size, val_fraction, groups, root, memory_gib
            )
    if groups is not None:
        raise DataError(
            f"{name} takes no groups: only folders do; an npz file contains train_groups and "
            f"test_groups."
        )
    entry = _entry(name)
    size = _size(entry, size)
    if name == "digits":
        return load_digits(entry)
    paths = _present(entry, size, root, download)
    checksums = [_checksum(path, root) for path in paths]
    notes = _compare(entry.files[size], paths, checksums, allow_unverified)
    verified = not notes
    if entry.folder == "medmnist":
        raw = read_npz(paths[0], root, checksums[0], memory_gib)
    elif entry.folder == "cifar":
        raw = read_cifar(paths[0], entry)
    else:
        raw = read_svhn(paths[0], paths[1])
    arrays = assemble(raw, paths[0], name, val_fraction, entry)
    notes += _against_entry(arrays, raw, entry, size, paths[0], verified)
    return replace(
        arrays, checksum="+".join(checksums), verified=verified, notes=(*notes, *arrays.notes)
    )


def with_unlabelled(
    arrays: Arrays, where: str, as_rgb: bool, root: Path, memory_gib: float = 4.0
) -> Arrays:
    """The arrays with the images of `where`, folder:DIR or npz:FILE, as unlabelled rows.

    Those of a folder, at any depth, are resized to the images of the set; those of a file have
    their shape. Grey images are shown in colour where those of the set are.

    Raises DataError if they cannot be read, or have another shape.
    """
    kind, _, name = where.partition(":")
    path, notes = Path(name), []
    height, width = arrays.train_x.shape[1:3]
    if kind == "folder":
        from benchmarks.data.folders import images_alone as below  # noqa: PLC0415

        if height != width:
            raise DataError(
                f"unlabelled images of {shown(path)} would be resized to a square, and those of "
                f"{arrays.name} are {height} x {width}: put them into an npz file instead."
            )
        images, checksum, notes = below(path, height, root, memory_gib)
    else:
        images, checksum = images_alone(path, root, memory_gib), _checksum(path, root)
    colour, shape = images.ndim == 4 and images.shape[3] == 3, tuple(images.shape[1:3])
    if shape != (height, width):
        raise DataError(
            f"{shown(path)}: unlabelled images are {shape[0]} x {shape[1]}, expected "
            f"{height} x {width}, as those of {arrays.name}: resize them."
        )
    grey = arrays.train_x.ndim == 3 or arrays.train_x.shape[3] == 1
    if colour and grey and not as_rgb:
        raise DataError(
            f"{shown(path)}: unlabelled images are in colour, and those of {arrays.name} are "
            f"grey: convert them, or write as_rgb=true behind the benchmark."
        )
    told = f"{len(images):,} unlabelled images from {kind}:{shown(path.name)}"
    return replace(
        arrays,
        unlabelled_x=images,
        checksum=f"{arrays.checksum}+unlabelled:{checksum}",
        notes=(*arrays.notes, told, *(f"unlabelled images: {note}" for note in notes)),
        caveats=(*arrays.caveats, *tested(arrays, images)),
    )


def locate(entry: Entry, size: int, root: Path) -> list[Path | None]:
    """The path of each file of a set on this machine, or None if it is not there.

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
    """Each file of a set with its path, its recomputed MD5, and whether that is official."""
    found = []
    for file, path in zip(entry.files[_size(entry, size)], locate(entry, size, root), strict=True):
        md5 = None if path is None else md5_of(path)
        found.append((file, path, md5, md5 == file.md5))
    return found


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
        seen = [str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
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
        with replacing(sidecar) as handle:
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


def _load_npz(path: Path, root: Path, val_fraction: float, memory_gib: float) -> Arrays:
    """A user's own file in the keys of MedMNIST; an official file is known by its MD5."""
    with opened(path):
        pass  # a file that is not an archive is reported before its checksum is computed
    md5 = _checksum(path, root)
    official = {
        file.md5: entry
        for entry in CATALOGUE.values()
        if entry.folder == "medmnist"
        for files in entry.files.values()
        for file in files
    }
    entry = official.get(md5)
    raw = read_npz(path, root, md5, memory_gib, with_groups=True)
    arrays = assemble(raw, path, f"npz:{path.stem}", val_fraction, entry)
    notes = arrays.notes
    names = {file.name for e in CATALOGUE.values() for fs in e.files.values() for file in fs}
    if entry is None and path.name in names:
        notes = (*notes, f"{path.name} is named like an official file, but its MD5 {md5} is not")
    # Once these keys were not read: with them it is another data set.
    checksum = md5 if arrays.train_groups is None else f"{md5}+groups"
    return with_duplicates(replace(arrays, checksum=checksum, notes=notes), entry is None)


def _load_folder(
    path: Path,
    size: int,
    val_fraction: float,
    groups: int | str | None,
    root: Path,
    memory_gib: float,
) -> Arrays:
    """Images in one folder per class, below train/, test/ and perhaps val/, or below `path`."""
    from benchmarks.data.folders import read  # noqa: PLC0415

    folder = read(path, size, groups, root, memory_gib)
    where = shown(path)
    rows, made = _rows_of_splits(folder, where)
    raw: dict[str, Any] = {}
    for split, chosen in rows.items():
        raw[f"{split}_images"] = taken(folder.x, chosen)
        raw[f"{split}_labels"] = folder.y[chosen]
        if folder.groups is not None:
            raw[f"{split}_groups"] = folder.groups[chosen]
    arrays = assemble(
        Raw(raw, ()), where, f"folder:{shown(path.name)}", val_fraction, None, folder.classes
    )
    hints = _of_subfolders(folder) if groups is None else ()
    arrays = replace(
        arrays,
        checksum=folder.checksum,
        notes=(*folder.notes, *made, *arrays.notes, *hints),
        caveats=(*arrays.caveats, *hints),
    )
    return with_duplicates(arrays, own=True)


def _rows_of_splits(folder: "Folder", where: str) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """The rows of each split, cut here where the folder has none, and then a note on that."""
    if "train" in folder.parts:
        return {part: np.flatnonzero(folder.part == k) for k, part in enumerate(folder.parts)}, ()
    if folder.groups is None:
        cut = stratified_split(folder.y, FOLDER_SHARES, SPLIT_SEED)
        how = "stratified"
    else:
        # Of equal shares the earlier one gets more where groups are few: the test split.
        train, test, val = by_group(folder.y, folder.groups, FOLDER_SHARES, where)
        cut = train, val, test
        how = f"by group ({counted(folder.groups)})"
    if not all(map(len, cut)):
        raise DataError(
            f"{where}: {len(folder.y)} images are too few for three splits: add some, or put "
            f"them into train/, val/ and test/ yourself."
        )
    note = f"{MADE[0]} into train/val/test, {how}, split seed {SPLIT_SEED}"
    return dict(zip(SPLITS, cut, strict=True)), (note,)


def _of_subfolders(folder: "Folder") -> tuple[str, ...]:
    """A hint if images were split individually although subfolders may be patients."""
    if not folder.subfolders or {"train", "val"} <= set(folder.parts):
        return ()
    what = "train and val are split" if "train" in folder.parts else "split"
    return (
        f"{what} by image, although the classes have subfolders (patients?): images of one "
        f"subfolder may be on both sides; name it folder:DIR(groups=1) to keep them together, "
        f"or (groups=0) if images are independent",
    )


def _against_entry(
    arrays: Arrays, raw: Raw, entry: Entry, size: int, path: Path, verified: bool
) -> list[str]:
    """Notes on how a file differs from the official facts; DataError if it must not."""
    shape = (size, size) if entry.channels == 1 else (size, size, entry.channels)
    if arrays.train_x.shape[1:] != shape:
        raise DataError(
            f"{path}: images have the shape {arrays.train_x.shape[1:]}, expected {shape} for "
            f"{entry.name}."
        )
    if (arrays.train_y.ndim == 1) != task_named(entry.kind).exclusive:
        raise DataError(f"{path}: labels have the wrong shape for {entry.name} ({entry.kind}).")
    got = tuple(len(raw.arrays.get(f"{s}_labels", ())) for s in SPLITS)
    if got == entry.counts:
        return []
    text = (
        f"{'/'.join(map(str, got))} rows in train/val/test, "
        f"officially {'/'.join(map(str, entry.counts))}"
    )
    if verified:
        raise DataError(f"{path}: {text}. Its MD5 is correct: please report this.")
    return [text]
