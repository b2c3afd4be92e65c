"""Reads a folder of images: pixels, labels, patients, and notes on it."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL

from benchmarks.data import decoders, ondisk, patients, pictures
from benchmarks.data.download import DataError
from benchmarks.data.layout import TEXTS, File, Walk, classes_of, shown, some, splits_of
from benchmarks.data.ondisk import GIB, Pixels

VERSION = 1
"""Raised when other pixels are read from the same files: images on disk are then decoded anew."""


@dataclass(frozen=True, eq=False)
class Folder:
    """The images of a folder, and what is known about them."""

    classes: tuple[str, ...]
    parts: tuple[str, ...]
    """the splits that it has; only "" if it has none"""
    part: np.ndarray
    """(N,) the split of each image, a number in `parts`"""
    x: Pixels
    """uint8 (N, size, size) if all are grey, else (N, size, size, 3)"""
    y: np.ndarray
    """int64 (N,)"""
    groups: np.ndarray | None
    """(N,) names of the patients, or None if they are not declared"""
    subfolders: bool
    """whether the images of some class are in several folders"""
    checksum: str
    notes: tuple[str, ...]


def read(
    path: Path,
    size: int,
    groups: int | str | None,
    root: Path,
    memory_gib: float = 4.0,
    least: int = 2,
) -> Folder:
    """The images of a folder, one folder per class, below train/, test/ and perhaps val/, or not.

    If they may exceed `memory_gib` GiB, each counted as a colour image, they are decoded once into
    a file below `root`.

    `groups` says where the patients are named: a level of folders below the classes (1 is the
    first), or FILE.csv or FILE.csv:COLUMN; with 0 and None they are not. `least`: the fewest
    classes.

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
    classes = classes_of(walk, parts, below, least)
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
    images = _images_of(walk, files, size, root, memory_gib)
    _refuse_empty_splits(path, parts, images.files)
    _refuse_unknown_range(path, images.deep)
    walk.tell(images.texts, "text files among the images are left out")
    walk.tell(images.warned, "images with warnings from the reader, used as read")
    walk.notes.extend(pictures.told(images.done))
    names = patients.of_files(path, images.files, groups)
    subfolders = _subfolders(images.files)
    walk.notes.extend(_swapped(subfolders))
    order = {part: number for number, part in enumerate(parts)}
    return Folder(
        classes=tuple(classes),
        parts=tuple(parts),
        part=np.array([order[file.part] for file in images.files]),
        x=images.x,
        y=np.array([file.label for file in images.files], np.int64),
        groups=None if names is None else np.array(names),
        subfolders=any(len(of_class) > 1 for of_class in subfolders.values()),
        checksum=_checksum(path, images, names),
        notes=tuple(walk.notes),
    )


def images_only(
    path: Path, size: int, root: Path, memory_gib: float = 4.0
) -> tuple[Pixels, list[str]]:
    """The images at any depth below a folder, read as in `read`, and their paths from there.

    Raises DataError if there are none, or one cannot be read.
    """
    images = _images_below(Walk(path), size, root, memory_gib)
    return images.x, [shown(file.name) for file in images.files]


def images_alone(
    path: Path, size: int, root: Path, memory_gib: float = 4.0
) -> tuple[Pixels, str, list[str]]:
    """The same images, their checksum, and notes; names of folders mean nothing.

    Raises DataError likewise.
    """
    walk = Walk(path)
    images = _images_below(walk, size, root, memory_gib)
    walk.tell(images.texts, "text files among the images are left out")
    walk.tell(images.warned, "images with warnings from the reader, used as read")
    return images.x, _checksum(path, images, None), [*walk.notes, *pictures.told(images.done)]


def _images_below(walk: Walk, size: int, root: Path, memory_gib: float) -> "_Images":
    if not walk.root.is_dir():
        raise DataError(f"{shown(walk.root)} is not a folder: expected one of images.")
    files = [File("", file, "", 0) for file in sorted(walk.files_below(""))]
    walk.raise_dangling()
    images = _images_of(walk, files, size, root, memory_gib)
    if not images.files:
        raise DataError(f"{shown(walk.root)} contains no image.")
    _refuse_unknown_range(walk.root, images.deep)
    return images


@dataclass
class _Images:
    """The files of a folder that are images, and what was found while reading them."""

    x: Pixels = field(default_factory=lambda: np.empty(0, np.uint8))
    files: list[File] = field(default_factory=list)
    altered: list[list[str]] = field(default_factory=list)
    """words of ``pictures.ALTERED`` for each of them"""
    digest: "hashlib._Hash | None" = field(
        default_factory=partial(hashlib.md5, usedforsecurity=False)
    )
    """of their names and bytes, and of what was done to their pixels; None: to be computed"""
    done: Counter[str] = field(default_factory=Counter)
    deep: list[tuple[int, str]] = field(default_factory=list)
    """largest value and name of those whose range is not known"""
    texts: list[str] = field(default_factory=list)
    warned: list[str] = field(default_factory=list)
    folder: Path = Path()
    """where images on disk are"""
    checksums: dict[str, str] = field(default_factory=dict)
    """of images on disk, by the MD5 of their groups"""


def _images_of(
    walk: Walk, files: Sequence[File], size: int, root: Path, memory_gib: float
) -> _Images:
    """In memory, or on disk if they may exceed the budget, which is noted."""
    need = len(files) * 3 * size**2
    if need <= memory_gib * GIB:
        return _in_memory(walk.root, files, size)
    images = _on_disk(walk.root, files, size, root)
    walk.notes.append(
        f"images streamed from {images.folder}: up to {need / GIB:.2g} GiB exceed the memory "
        f"budget of {memory_gib:g} GiB"
    )
    return images


def _in_memory(root: Path, files: Sequence[File], size: int) -> _Images:
    found = _Images()
    pixels = list(_pixels(root, files, size, found, processes=1))
    found.x = _stacked(pixels) if pixels else found.x
    return found


def _on_disk(path: Path, files: Sequence[File], size: int, root: Path) -> _Images:
    """The images in a file of rows, made unless there is one of these very files."""
    folder = ondisk.folder_of(root, f"{path.resolve().name}-{size}", _key(path, files, size))

    def make() -> dict[str, Any]:
        found = _Images()
        writer = None
        with ondisk.bar(path.name, len(files), path) as done:
            for pixels in _pixels(path, files, size, found):
                if writer is None:
                    ondisk.refuse_full(folder, len(files) * pixels.nbytes, path)
                    writer = ondisk.Writer(folder, "images", pixels.shape, np.uint8)
                if pixels.ndim > len(writer.shape):
                    ondisk.refuse_full(folder, len(files) * pixels.nbytes, path)
                    writer = writer.in_colour()
                writer.add(_like(pixels, len(writer.shape))[None])
                done(1)
        if writer is None:  # only text files
            return {"arrays": {}, **_told(found, files)}
        return {"arrays": {"images": writer.end()}, **_told(found, files)}

    about, arrays = ondisk.kept(folder, path, make)
    texts = set(about["texts"])
    return _Images(
        x=arrays.get("images", np.empty(0, np.uint8)),
        files=[file for number, file in enumerate(files) if number not in texts],
        altered=about["altered"],
        digest=None,
        done=Counter(about["done"]),
        deep=[(peak, name) for peak, name in about["deep"]],
        texts=[files[number].name for number in about["texts"]],
        warned=about["warned"],
        folder=folder,
        checksums=about["checksums"],
    )


def _key(path: Path, files: Sequence[File], size: int) -> str:
    """What the decoded images depend on: the files, by name, size and time, and how they are read.

    Computed without reading them, so that a run can start at once.
    """
    digest = hashlib.md5(usedforsecurity=False)
    digest.update(json.dumps([VERSION, size, PIL.__version__, str(path.resolve())]).encode())
    for file in files:
        try:
            stat = (path / file.name).stat()
        except OSError as error:
            raise _unreadable(path / file.name, error) from error
        # Of the two times the second also changes where a program sets the first back.
        told = f"\0{stat.st_size}\0{stat.st_mtime_ns}\0{stat.st_ctime_ns}\0"
        digest.update(os.fsencode(file.name) + told.encode())
    return digest.hexdigest()


def _told(found: _Images, files: Sequence[File]) -> dict[str, Any]:
    """What about.json keeps of the images, so that they need not be decoded again."""
    assert found.digest is not None
    texts = set(found.texts)
    return {
        "altered": found.altered,
        "done": found.done,
        "deep": found.deep,
        "texts": [number for number, file in enumerate(files) if file.name in texts],
        "warned": found.warned,
        "checksums": {"": found.digest.hexdigest()},
    }


def _pixels(
    root: Path, files: Sequence[File], size: int, found: _Images, processes: int | None = None
) -> Iterator[np.ndarray]:
    """The pixels of each image in turn; all else is noted in ``found``."""
    read = (_bytes(root / file.name) for file in files)
    pictured = decoders.decoded(read, len(files), size, processes)
    for file, (data, picture) in zip(files, pictured, strict=True):
        if not isinstance(picture, pictures.Picture):
            if not _is_text(root / file.name, picture):
                raise _cannot(root / file.name, picture) from picture
            found.texts.append(file.name)
            continue
        altered = [word for word in pictures.ALTERED if word in picture.done]
        assert found.digest is not None
        _add(found.digest, file, data, altered)
        found.altered.append(altered)
        found.done.update(picture.done)
        if picture.peak is not None:
            found.deep.append((picture.peak, file.name))
        if picture.warned:
            found.warned.append(f"{file.name} ({picture.warned})")
        found.files.append(file)
        yield picture.pixels


def _add(digest: "hashlib._Hash", file: File, data: bytes, altered: Sequence[str]) -> None:
    digest.update(os.fsencode(file.name) + f"\0{len(data)}\0".encode())
    digest.update(data)
    for word in altered:
        digest.update(f"\0{word}\0".encode())


def _checksum(root: Path, images: _Images, names: Sequence[str] | None) -> str:
    """The MD5 of names, bytes, changes and groups; for images on disk it is kept there."""
    added = b"" if names is None else "\0".join(["groups", *names]).encode()
    key = hashlib.md5(added, usedforsecurity=False).hexdigest() if added else ""
    if key in images.checksums:
        return images.checksums[key]
    digest = images.digest
    if digest is None:  # of images on disk, with groups for which they were not asked before
        digest = hashlib.md5(usedforsecurity=False)
        for file, altered in zip(images.files, images.altered, strict=True):
            _add(digest, file, _bytes(root / file.name), altered)
    digest.update(added)
    if images.checksums:
        images.checksums[key] = digest.hexdigest()
        ondisk.amend(images.folder, checksums=images.checksums)
    return digest.hexdigest()


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
    most = max(image.ndim for image in images)
    return np.stack([_like(image, most) for image in images])


def _like(image: np.ndarray, ndim: int) -> np.ndarray:
    """A grey image in colour, if ``ndim`` is 3."""
    return np.repeat(image[..., None], 3, -1) if image.ndim < ndim else image


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{shown(path)} cannot be read: {error.strerror}.")


def _is_text(path: Path, error: ValueError) -> bool:
    """Whether what is no image is a text file among images."""
    return isinstance(error, pictures.NotAnImage) and path.suffix.lower() in TEXTS


def _cannot(path: Path, error: ValueError) -> DataError:
    """Why a file of the images is not used, in words."""
    if isinstance(error, pictures.NotAnImage):
        if str(error):
            return DataError(
                f"{shown(path)} is {error}, which is not read: convert it to PNG, or put the "
                f"images as arrays into an npz file."
            )
        return DataError(
            f"{shown(path)} cannot be read as an image (no format that is known): repair it, or "
            f"remove it."
        )
    if isinstance(error, pictures.Refused):
        return DataError(f"{shown(path)} cannot be used: {error}.")
    return DataError(
        f"{shown(path)} cannot be read as an image ({error}): repair it, or remove it."
    )
