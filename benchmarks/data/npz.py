"""Reads files of arrays, memory-mapped if they are large; nothing is unpickled."""

import contextlib
import os
import secrets
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from benchmarks.data.dataset import GIB, SPLITS, Raw, checked_images, checked_labels
from benchmarks.data.download import DataError

DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, RuntimeError)


def images_only(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """The images to predict, and their labels if the file has them.

    Reads `images` and `labels` of an npz, or else `test_images` and `test_labels`. Images are uint8
    or float32 in [0, 1], (N, H, W) or (N, H, W, C); labels int64 (N,) or uint8 (N, L).

    Raises DataError if the file or its arrays cannot be used.
    """
    path = path.expanduser()
    with opened(path) as archive:
        members = _members(archive)
        prefix = next((p for p in ("", "test_") if f"{p}images" in members), None)
        if prefix is None:
            raise DataError(
                f"{path} has the keys {', '.join(members) or 'none'}: expected images "
                f"(or test_images)."
            )
        x, _ = checked_images(_member(archive, f"{prefix}images", path), f"{path}, {prefix}images")
        if f"{prefix}labels" not in members:
            return x, None
        y = checked_labels(_member(archive, f"{prefix}labels", path), f"{path}, {prefix}labels")
    if len(x) != len(y):
        raise DataError(f"{path} has {len(x)} images and {len(y)} labels: expected equal numbers.")
    return x, y


def read_npz(path: Path, root: Path, md5: str, memory_gib: float, with_groups: bool = False) -> Raw:
    """The arrays of an npz; its images are memory-mapped if they exceed the budget."""
    with opened(path) as archive:
        wanted = _wanted(_members(archive), path, with_groups)
        need = sum(archive.getinfo(f"{k}.npy").file_size for k in wanted)
        if need <= memory_gib * GIB:
            return Raw({k: _member(archive, k, path) for k in wanted}, ())
        folder = root / "cache" / f"{path.stem}-{md5[:8]}"
        arrays = {
            k: _mapped(archive, k, path, folder)
            if k.endswith("images")
            else _member(archive, k, path)
            for k in wanted
        }
    images = ", ".join(k for k in wanted if k.endswith("images"))
    note = (
        f"{images} memory-mapped from {folder}: {need / GIB:.2g} GiB exceed the memory budget of "
        f"{memory_gib:g} GiB"
    )
    return Raw(arrays, (note,))


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


def _mapped(archive: zipfile.ZipFile, key: str, path: Path, folder: Path) -> np.ndarray:
    """One member, memory-mapped copy-on-write from an uncompressed copy, made if missing."""
    copy = folder / f"{key}.npy"
    info = archive.getinfo(f"{key}.npy")
    try:
        if not copy.is_file() or copy.stat().st_size != info.file_size:
            folder.mkdir(parents=True, exist_ok=True)
            with archive.open(info) as member, replacing(copy) as handle:
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
