"""Reads files of arrays, unpacked once if they are large; nothing is unpickled."""

import contextlib
import hashlib
import math
import os
import secrets
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np

from benchmarks.data import ondisk
from benchmarks.data.dataset import (
    SPLITS,
    Raw,
    Values,
    checked_images,
    checked_labels,
    clipped_note,
    refuse_shape,
)
from benchmarks.data.download import DataError, md5_of
from benchmarks.data.ondisk import BLOCK, GIB, Pixels

DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, RuntimeError)


def images_only(
    path: Path, root: Path, memory_gib: float = 4.0
) -> tuple[Pixels, np.ndarray | None]:
    """The images to predict, and their labels if the file has them; larger ones as in `read_npz`.

    Reads `images` and `labels` of an npz, or else `test_images` and `test_labels`. Images are uint8
    or float32 in [0, 1], (N, H, W) or (N, H, W, C); labels int64 (N,) or uint8 (N, L).

    Raises DataError if the file or its arrays cannot be used.
    """
    path = path.expanduser()
    with opened(path) as archive:
        x, key = _images(archive, path, root, memory_gib, "test_images")
        labels = key.replace("images", "labels")
        if labels not in _members(archive):
            return x, None
        y = checked_labels(_member(archive, labels, path), f"{path}, {labels}")
    if len(x) != len(y):
        raise DataError(f"{path} has {len(x)} images and {len(y)} labels: expected equal numbers.")
    return x, y


def images_alone(path: Path, root: Path, memory_gib: float = 4.0) -> Pixels:
    """`images` of an npz, or else its `train_images`; whether it has labels does not matter.

    Raises DataError if the file or the array cannot be used.
    """
    with opened(path) as archive:
        return _images(archive, path, root, memory_gib, "train_images")[0]


def _images(
    archive: zipfile.ZipFile, path: Path, root: Path, memory_gib: float, other: str
) -> tuple[Pixels, str]:
    """The array `images` or an `other` one, and which of them."""
    members = _members(archive)
    key = next((each for each in ("images", other) if each in members), None)
    if key is None:
        raise DataError(
            f"{path} has the keys {', '.join(members) or 'none'}: expected images (or {other})."
        )
    if archive.getinfo(f"{key}.npy").file_size > memory_gib * GIB:
        return _on_disk(archive, [key], path, root, md5_of(path))[0][key], key
    return checked_images(_member(archive, key, path), f"{path}, {key}")[0], key


def array_in(path: Path, key: str) -> np.ndarray | None:
    """An array of an npz, or None if it has none of that name.

    Raises DataError if it cannot be used.
    """
    with opened(path) as archive:
        return _member(archive, key, path) if key in _members(archive) else None


def read_npz(path: Path, root: Path, md5: str, memory_gib: float, with_groups: bool = False) -> Raw:
    """The arrays of an npz; its images stay on disk if they exceed the budget."""
    with opened(path) as archive:
        wanted = _wanted(_members(archive), path, with_groups)
        need = sum(archive.getinfo(f"{k}.npy").file_size for k in wanted)
        if need <= memory_gib * GIB:
            return Raw({k: _member(archive, k, path) for k in wanted}, ())
        keys = [k for k in wanted if k.endswith("images")]
        images, clipped, folder = _on_disk(archive, keys, path, root, md5)
        rest = {k: _member(archive, k, path) for k in wanted if k not in images}
    note = (
        f"{', '.join(keys)} streamed from {folder}: {need / GIB:.2g} GiB exceed the memory budget "
        f"of {memory_gib:g} GiB"
    )
    return Raw(images | rest, (note, *clipped))


def _wanted(members: list[str], path: Path, with_groups: bool) -> list[str]:
    """The keys to read: images and labels of every split, and groups if there are any."""
    wanted = [f"{split}_{what}" for split in SPLITS for what in ("images", "labels")]
    missing = [key for key in wanted if key not in members]
    if missing and missing != ["val_images", "val_labels"]:
        raise DataError(
            f"{path} lacks {', '.join(missing)}; it has {', '.join(members) or 'no keys'}. "
            f"Expected train_images, train_labels, test_images, test_labels and, if there is a "
            f"validation split, val_images and val_labels."
        )
    wanted = [key for key in wanted if key in members]
    given = {key for split in SPLITS if (key := f"{split}_groups") in members}
    if not with_groups or not given:
        return wanted
    groups = [key.replace("images", "groups") for key in wanted if key.endswith("images")]
    lacking = sorted({*groups} ^ given)
    if lacking:
        raise DataError(
            f"{path}: {', '.join(lacking)} is missing, or its images are: expected groups for "
            f"every split or for none."
        )
    return wanted + groups


def _members(archive: zipfile.ZipFile) -> list[str]:
    return [n.removesuffix(".npy") for n in archive.namelist() if n.endswith(".npy")]


@contextlib.contextmanager
def opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """An npz file, opened as a zip archive."""
    if not path.is_file():
        what = "is not a file" if path.exists() else "does not exist"
        raise DataError(f"{path} {what}: expected an npz file.")
    try:
        archive = zipfile.ZipFile(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    except DAMAGED as error:
        with path.open("rb") as handle:
            cut = handle.read(4) == b"PK\x03\x04"
        what = "is truncated" if cut else "is not an npz file (not a zip archive)"
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


def _on_disk(
    archive: zipfile.ZipFile, keys: Sequence[str], path: Path, root: Path, md5: str
) -> tuple[dict[str, Pixels], list[str], Path]:
    """Images of an npz as rows in files, made if they are missing; notes, and where they are."""
    wanted = " ".join([md5, *keys])  # predictions and training take other arrays of one file
    key = hashlib.md5(wanted.encode(), usedforsecurity=False).hexdigest()
    folder = ondisk.folder_of(root, path.resolve().stem, key)

    def make() -> dict[str, Any]:
        headers = {key: _header(archive, key, path) for key in keys}
        need = sum(math.prod(shape) * _kept(dtype).itemsize for shape, dtype in headers.values())
        ondisk.refuse_full(folder, need, path)
        arrays, clipped = {}, {}
        with ondisk.bar(path.name, sum(shape[0] for shape, _ in headers.values()), path) as done:
            for key, (shape, dtype) in headers.items():
                writer = ondisk.Writer(folder, key, shape[1:], _kept(dtype))
                values = Values(dtype)
                for block in _blocks(archive, key, path):
                    if dtype == np.uint8:
                        writer.add(block)
                    else:
                        values.add(block)
                        writer.add(np.clip(block, 0, 1).astype(np.float32))
                    done(len(block))
                arrays[key] = writer.end()
                if dtype != np.uint8:
                    values.refuse(f"{path}, {key}")
                clipped[key] = values.outside
        return {"arrays": arrays, "clipped": clipped}

    about, images = ondisk.kept(folder, path, make)
    notes = [clipped_note(key, count) for key, count in about["clipped"].items() if count]
    return dict(images), notes, folder


def _kept(dtype: np.dtype) -> np.dtype:
    """The type in which images are used."""
    return np.dtype(np.uint8 if dtype == np.uint8 else np.float32)


def _header(archive: zipfile.ZipFile, key: str, path: Path) -> tuple[tuple[int, ...], np.dtype]:
    """The shape and type of a member, refused if it cannot be read row by row."""
    try:
        with archive.open(f"{key}.npy") as member:
            shape, columns, dtype = _read_header(member)
    except DAMAGED as error:
        raise _unreadable(path, key, error) from error
    refuse_shape(shape, dtype, f"{path}, {key}")
    if columns:
        raise DataError(
            f"{path}: {key} is in Fortran order and exceeds the memory budget: save "
            f"numpy.ascontiguousarray of it, or raise the budget (--memory-gib)."
        )
    return shape, dtype


def _read_header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(member)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in read:
        raise ValueError(f"version {version} of the npy format")
    shape, columns, dtype = read[version](member)
    if dtype.hasobject:
        raise ValueError("Object arrays cannot be loaded")
    return shape, columns, dtype


def _blocks(archive: zipfile.ZipFile, key: str, path: Path) -> Iterator[np.ndarray]:
    """The rows of a member, some at a time; its checksum is verified at its end."""
    try:
        with archive.open(f"{key}.npy") as member:
            shape, _, dtype = _read_header(member)
            size = math.prod(shape[1:]) * dtype.itemsize
            step = max(1, BLOCK // size)
            for start in range(0, shape[0], step):
                rows = min(step, shape[0] - start)
                data = member.read(rows * size)
                if len(data) < rows * size:
                    raise EOFError(f"it ends after {start + len(data) // size} of {shape[0]} rows")
                yield np.frombuffer(data, dtype).reshape(rows, *shape[1:])
            member.read(1)
    except DAMAGED as error:
        raise _unreadable(path, key, error) from error


def _unreadable(path: Path, key: str, error: Exception) -> DataError:
    if "Object arrays" in str(error) or "Python objects" in str(error):
        return DataError(
            f"{path}: {key} is pickled (an array of Python objects), which is never loaded. Save "
            f"it as an array of numbers, every image of the same shape."
        )
    return DataError(f"{path}: {key} is damaged ({error}). Copy or download the file again.")


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[BinaryIO]:
    """A temporary file that replaces `target` once it is complete."""
    beside = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with beside.open("wb") as handle:
            yield handle
        beside.replace(target)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
