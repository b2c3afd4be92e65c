"""Reads a folder of images: pixels, labels, patients, and notes on it."""

import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.data import patients, pictures
from benchmarks.data.download import DataError
from benchmarks.data.layout import TEXTS, File, Walk, classes_of, shown, some, splits_of


@dataclass(frozen=True, eq=False)
class Folder:
    """The images of a folder, and what is known about them."""

    classes: tuple[str, ...]
    parts: tuple[str, ...]
    """the splits that it has; only "" if it has none"""
    part: np.ndarray
    """(N,) the split of each image, a number in `parts`"""
    x: np.ndarray
    """uint8 (N, size, size) if all are grey, else (N, size, size, 3)"""
    y: np.ndarray
    """int64 (N,)"""
    groups: np.ndarray | None
    """(N,) names of the patients, or None if they are not declared"""
    subfolders: bool
    """whether the images of some class are in several folders"""
    checksum: str
    notes: tuple[str, ...]


def read(path: Path, size: int, groups: int | str | None) -> Folder:
    """The images of a folder, one folder per class, below train/, test/ and perhaps val/, or not.

    `groups` says where the patients are named: a level of folders below the classes (1 is the
    first), or FILE.csv or FILE.csv:COLUMN; with 0 and None they are not.

    Raises DataError for everything that is wrong, with the file and what to do.
    """
    if not path.is_dir():
        what = "is not a folder" if path.exists() else "does not exist"
        raise DataError(
            f"{shown(path)} {what}: expected one folder per class, or train/ and test/."
        )
    if size < 1:
        raise DataError(f"size is {size}, expected the edge of the images in pixels.")
    walk = Walk(path)
    top = walk.listed("")
    parts = splits_of(path, top)
    below = {part: walk.listed(folder) if part else top for part, folder in parts.items()}
    classes = classes_of(walk, parts, below)
    files = [
        File(folder, file, part, number)
        for part in parts
        for number, name in enumerate(classes)
        for folder in [classes[name].get(part)]
        if folder
        for file in sorted(walk.files_below(folder))
    ]
    walk.raise_dangling()
    walk.tell_beside(parts, below, top)
    images = _decoded(path, files, size)
    _refuse_empty_splits(path, parts, images.files)
    _refuse_unknown_range(path, images.deep)
    walk.tell(images.texts, "text files among the images are left out")
    walk.tell(images.warned, "images with warnings from the reader, used as read")
    walk.notes.extend(pictures.told(images.done))
    names = patients.of_files(path, images.files, groups)
    if names is not None:
        images.digest.update("\0".join(["groups", *names]).encode())
    subfolders = _subfolders(images.files)
    walk.notes.extend(_swapped(subfolders))
    order = {part: number for number, part in enumerate(parts)}
    return Folder(
        classes=tuple(classes),
        parts=tuple(parts),
        part=np.array([order[file.part] for file in images.files]),
        x=_stacked(images.pixels),
        y=np.array([file.label for file in images.files], np.int64),
        groups=None if names is None else np.array(names),
        subfolders=any(len(of_class) > 1 for of_class in subfolders.values()),
        checksum=images.digest.hexdigest(),
        notes=tuple(walk.notes),
    )


@dataclass
class _Images:
    """The files of a folder that are images, and what was found while reading them."""

    files: list[File] = field(default_factory=list)
    pixels: list[np.ndarray] = field(default_factory=list)
    digest: "hashlib._Hash" = field(default_factory=partial(hashlib.md5, usedforsecurity=False))
    """of their names and bytes, and of what was done to their pixels"""
    done: Counter[str] = field(default_factory=Counter)
    deep: list[tuple[int, str]] = field(default_factory=list)
    """largest value and name of those whose range is not known"""
    texts: list[str] = field(default_factory=list)
    warned: list[str] = field(default_factory=list)


def _decoded(root: Path, files: Sequence[File], size: int) -> _Images:
    found = _Images()
    for file in files:
        data, picture = _picture(root / file.name, size)
        if picture is None:
            found.texts.append(file.name)
            continue
        found.digest.update(os.fsencode(file.name) + f"\0{len(data)}\0".encode())
        found.digest.update(data)
        for word in pictures.ALTERED:
            if word in picture.done:
                found.digest.update(f"\0{word}\0".encode())
        found.done.update(picture.done)
        if picture.peak is not None:
            found.deep.append((picture.peak, file.name))
        if picture.warned:
            found.warned.append(f"{file.name} ({picture.warned})")
        found.pixels.append(picture.pixels)
        found.files.append(file)
    return found


def _refuse_empty_splits(root: Path, parts: Mapping[str, str], files: Sequence[File]) -> None:
    for part, folder in parts.items():
        if all(file.part != part for file in files):
            where = shown(root / folder)
            raise DataError(f"{where} is empty: expected images in the folders of the classes.")


def _refuse_unknown_range(root: Path, deep: Sequence[tuple[int, str]]) -> None:
    if deep and max(deep)[0] < pictures.FULL_RANGE:
        peak, name = max(deep)
        raise DataError(
            f"{shown(root)} has {len(deep)} images of 16 bits in which no value exceeds "
            f"{peak} of 65535 ({shown(name)}): their range is unknown, perhaps 12 bits stored in "
            f"16. Convert them to 8 bits, or put values scaled to [0, 1] into an npz file."
        )


def _subfolders(files: Sequence[File]) -> dict[int, set[str]]:
    """For each class, the folders below its own that contain its images."""
    found: dict[int, set[str]] = {}
    for file in files:
        found.setdefault(file.label, set()).add(os.path.dirname(file.inside))  # noqa: PTH120
    return found


def _swapped(subfolders: Mapping[int, set[str]]) -> list[str]:
    """A note if the classes look like subfolders, and the subfolders like classes."""
    first = next(iter(subfolders.values()))
    alike = all(of_class == first for of_class in subfolders.values())
    if len(first) < 2 or "" in first or not alike:
        return []
    return [f"every class has the same subfolders ({some(sorted(first))}): are those the classes?"]


def _stacked(images: list[np.ndarray]) -> np.ndarray:
    """All images; grey ones are converted to colour if others are in colour."""
    if any(image.ndim == 3 for image in images):
        images = [np.repeat(i[..., None], 3, -1) if i.ndim == 2 else i for i in images]
    return np.stack(images)


def _picture(path: Path, size: int) -> tuple[bytes, pictures.Picture | None]:
    """The bytes of a file and its image; None for a text file among images."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{shown(path)} cannot be read: {error.strerror}.") from error
    try:
        return data, pictures.decode(data, size)
    except pictures.NotAnImage as error:
        if path.suffix.lower() in TEXTS:
            return data, None
        if str(error):
            raise DataError(
                f"{shown(path)} is {error}, which is not read: convert it to PNG, or put the "
                f"images as arrays into an npz file."
            ) from error
        raise DataError(
            f"{shown(path)} cannot be read as an image (no format that is known): repair it, or "
            f"remove it."
        ) from error
    except pictures.Refused as error:
        raise DataError(f"{shown(path)} cannot be used: {error}.") from error
    except ValueError as error:
        raise DataError(
            f"{shown(path)} cannot be read as an image ({error}): repair it, or remove it."
        ) from error
