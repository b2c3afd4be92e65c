"""Images that do not fit in memory: decoded once into a file, and read from it row by row.

A set is a folder of ``<data folder>/cache``: per array a file of its rows, each (C, H, W), one of
their CRC-32, and about.json, which is written last: without it the set is not complete. A file
"made-by-augbench" is written first: a folder without one of the two is not listed or removed.

Rows are read with ``pread``, not mapped into memory: what was read does not stay in the process,
and a file that is cut short is an error instead of a signal.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import sys
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from analysis import runs
from benchmarks.data.download import DataError

FORMAT = 1
"""Raised when the files of a set, or what is written into them, change."""
ABOUT = "about.json"
MARK = "made-by-augbench"
GIB = 1 << 30
BLOCK = 64 << 20
"""Bytes that are read together where all rows are looked at."""
ADVICE = (
    "free some space (`augbench data list` shows streamed sets, `augbench data remove NAME` "
    "removes one), choose another data folder (AUGBENCH_DATA) or raise the memory budget "
    "(--memory-gib)"
)


class OnDisk:
    """Rows of images in files, like an array of which only what is asked for is read.

    ``shape`` is (N, H, W) or (N, H, W, C), as in ``Arrays``; ``images[rows]`` is an array of these
    rows, ``images.at(rows)`` the same rows, still in the file.
    """

    def __init__(self, files: Sequence[_File], rows: np.ndarray | None = None) -> None:
        self._files = tuple(files)
        self._ends = np.cumsum([len(each.checksums) for each in files])
        self._rows = np.arange(self._ends[-1]) if rows is None else rows
        self.dtype = files[0].dtype
        self.shape = (len(self._rows), *files[0].shape)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def ndim(self) -> int:
        """3, or 4 with channels."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that these rows take in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, key: slice | np.ndarray | int) -> np.ndarray:
        """The rows ``key``, as an array of such images."""
        where = np.arange(len(self))[key]
        found = self.planes(np.atleast_1d(where))
        found = found[:, 0] if self.ndim == 3 else found.transpose(0, 2, 3, 1)
        return found if np.ndim(where) else found[0]

    def at(self, rows: np.ndarray) -> OnDisk:
        """The rows ``rows`` (M,), of which none is read."""
        return OnDisk(self._files, self._rows[rows])

    def planes(self, where: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """The rows ``where`` (B,) as an array (B, C, H, W), or in ``out``, which is one.

        Raises:
            DataError: a file was cut short, or does not hold what was written into it.
        """
        rows = self._rows[where]
        if out is None:
            out = np.empty((len(rows), *self.planes_shape), self.dtype)
        bytes_of = out.reshape(-1).view(np.uint8).data
        size = out[:1].nbytes
        of_file = np.searchsorted(self._ends, rows, side="right")
        # Rows that follow each other are read at once, and all in the order of the file.
        breaks = np.flatnonzero((np.diff(rows) != 1) | (np.diff(of_file) != 0)) + 1
        starts = np.concatenate([[0], breaks]) if len(rows) else breaks
        ends = np.append(breaks, len(rows))
        for piece in np.argsort(rows[starts], kind="stable"):
            start, end = int(starts[piece]), int(ends[piece])
            number = int(of_file[start])
            file = self._files[number]
            first = int(rows[start]) - (int(self._ends[number - 1]) if number else 0)
            file.read_into(bytes_of[start * size : end * size], first, end - start)
        return out

    @property
    def planes_shape(self) -> tuple[int, int, int]:
        """(C, H, W)"""
        return _planes_shape(self.shape[1:])


Pixels = Any
"""An array of images, or those that are ``OnDisk``: both have a shape, a dtype and rows."""


def taken(images: Pixels, rows: np.ndarray) -> Pixels:
    """The rows ``rows`` (M,); of images on disk none is read."""
    return images.at(rows) if isinstance(images, OnDisk) else images[rows]


def blocks(images: Pixels) -> Iterator[np.ndarray]:
    """All rows as arrays that take at most BLOCK bytes each, or are one row."""
    step = max(1, BLOCK * len(images) // max(1, images.nbytes))
    for start in range(0, len(images), step):
        yield images[start : start + step]


def joined(some: Sequence[OnDisk]) -> OnDisk:
    """The rows of all, one after the other."""
    files = [file for each in some for file in each._files]
    starts = np.cumsum([0, *(int(each._ends[-1]) for each in some)])
    rows = [each._rows + start for each, start in zip(some, starts[:-1], strict=True)]
    return OnDisk(files, np.concatenate(rows))


class _File:
    """An open file of rows; each is checked when it is first read."""

    def __init__(
        self, path: Path, shape: tuple[int, ...], dtype: np.dtype, checksums: np.ndarray
    ) -> None:
        self.path, self.shape, self.dtype, self.checksums = path, shape, dtype, checksums
        self._size = math.prod(shape) * dtype.itemsize
        self._checked = np.zeros(len(checksums), bool)
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._descriptor)

    def read_into(self, out: memoryview, first: int, rows: int) -> None:
        """Read ``rows`` rows, from ``first`` on."""
        done, start = 0, first * self._size
        while done < len(out):
            try:
                count = os.preadv(self._descriptor, [out[done:]], start + done)
            except OSError as error:
                raise DataError(f"{self.path} cannot be read: {error.strerror}.") from error
            if not count:
                raise self._damaged("it was cut short")
            done += count
        for row in range(first, first + rows):
            if not self._checked[row]:
                at = (row - first) * self._size
                if zlib.crc32(out[at : at + self._size]) != self.checksums[row]:
                    raise self._damaged(f"row {row} is not what was written")
                self._checked[row] = True

    def _damaged(self, how: str) -> DataError:
        folder = self.path.parent
        return DataError(
            f"{self.path} is damaged ({how}): remove it with `augbench data remove {folder.name}` "
            f"and start again, which makes it anew."
        )


class Writer:
    """Writes rows of images one after the other into a set that is being made."""

    def __init__(self, folder: Path, key: str, shape: tuple[int, ...], dtype: Any) -> None:
        self.shape, self.dtype = shape, np.dtype(dtype).newbyteorder("<")
        self._folder, self._key = folder, key
        self._checksums: list[int] = []
        # Not truncated: without locks two processes would write the same bytes to the same places.
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self._descriptor = os.open(folder / f"{key}.raw", flags, 0o644)
        self._close = weakref.finalize(self, os.close, self._descriptor)

    def add(self, images: np.ndarray) -> None:
        """Append images (n, H, W) or (n, H, W, C)."""
        planes = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
        rows = np.ascontiguousarray(planes, self.dtype)
        self._checksums += [zlib.crc32(row) for row in rows]
        left = rows.reshape(-1).view(np.uint8).data
        while left:
            left = left[os.write(self._descriptor, left) :]

    def in_colour(self) -> Writer:
        """A writer of the same rows, grey until now, in three channels."""
        size, count = math.prod(self.shape) * self.dtype.itemsize, len(self._checksums)
        made = Writer(self._folder, f"{self._key}-colour", (*self.shape, 3), self.dtype)
        for row in range(count):
            grey = np.frombuffer(os.pread(self._descriptor, size, row * size), self.dtype)
            made.add(np.repeat(grey.reshape(1, *self.shape, 1), 3, -1))
        self._close()
        (self._folder / f"{self._key}.raw").unlink()
        return made

    def end(self) -> dict[str, Any]:
        """End the file; return what about.json says of it."""
        checksums = np.array(self._checksums, "<u4")
        size = len(checksums) * math.prod(self.shape) * self.dtype.itemsize
        os.ftruncate(self._descriptor, size)  # what was there before may have been longer
        os.fsync(self._descriptor)
        self._close()
        with (self._folder / f"{self._key}.crc").open("wb") as file:
            file.write(checksums.tobytes())
            file.flush()
            os.fsync(file.fileno())
        shape = [len(checksums), *self.shape]
        return {"file": self._key, "shape": shape, "dtype": self.dtype.str}


def _planes_shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    height, width, channels = (*shape, 1)[:3]
    return channels, height, width


def folder_of(root: Path, name: str, key: str) -> Path:
    """Where the set with this key lies; ``name`` is for people."""
    plain = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "_" for c in name)
    return root / "cache" / f"{plain.lstrip('.')[:60]}-{key[:12]}"


def kept(
    folder: Path, source: Path, make: Callable[[], Mapping[str, Any]]
) -> tuple[dict[str, Any], dict[str, OnDisk]]:
    """What about.json says, and the arrays of a set; ``make`` writes them if they are not there.

    ``make`` returns the contents of about.json: "arrays", by name what ``Writer.close`` returned,
    and what else the caller wants to know. One process makes a set, others wait for it; what is
    interrupted leaves nothing.

    Raises:
        DataError: it cannot be written, or ``make`` raised it.
    """
    found = _opened(folder)
    if found is not None:
        return found
    try:
        with runs.locked(
            folder, lambda holder: _say(f"{source.name} is being decoded by {holder}")
        ):
            found = _opened(folder)
            if found is not None:
                return found
            try:
                runs.write_text(folder / MARK, f"{source.resolve()}\n")
                about = {"format": FORMAT, "source": str(source.resolve()), **make()}
                runs.write_text(folder / ABOUT, json.dumps(about))
            except BaseException:
                _empty(folder)
                raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full" if full else f"{error}"
        raise DataError(f"{source} cannot be decoded into {folder}: {reason}; {ADVICE}.") from error
    found = _opened(folder)
    if found is None:
        raise DataError(f"{folder} was removed while it was written: start again.")
    return found


def amend(folder: Path, **more: Any) -> None:
    """Change what about.json says, where the folder can be written."""
    with suppress(OSError):
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        runs.write_text(folder / ABOUT, json.dumps(about | more), shared=True)


def refuse_full(folder: Path, need: int, source: Path) -> None:
    """Refuse what does not fit on the disk, before any of it is written."""
    free = shutil.disk_usage(folder).free
    if free < need:
        raise DataError(
            f"{source} takes {gib(need)} GiB decoded, and {folder.parent} has {gib(free)} GiB "
            f"free: {ADVICE}."
        )


def gib(size: int) -> str:
    """A number of bytes in GiB, as text."""
    return f"{size / GIB:.2g}" if size < 10 * GIB else f"{size / GIB:.0f}"


def _opened(folder: Path) -> tuple[dict[str, Any], dict[str, OnDisk]] | None:
    """A set as it lies on disk; None if it is not complete, or of another version."""
    try:
        about = _about(folder)
        if about is None or about["format"] != FORMAT:
            return None
        arrays = {}
        for key, array in about["arrays"].items():
            rows, *shape = array["shape"]
            dtype = np.dtype(array["dtype"])
            path = folder / f"{array['file']}.raw"
            checksums = np.fromfile(folder / f"{array['file']}.crc", "<u4")
            size = rows * math.prod(shape) * dtype.itemsize
            if path.stat().st_size != size or len(checksums) != rows:
                return None
            arrays[key] = OnDisk([_File(path, tuple(shape), dtype, checksums)])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError, AttributeError):  # about.json is damaged
        return None
    return about, arrays


def _about(folder: Path) -> dict[str, Any] | None:
    """What about.json says; None if there is none, or another program's."""
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        return about if {"format", "source", "arrays"} <= about.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def _files(folder: Path) -> list[Path]:
    """The files of a set, the mark last; other files in its folder are not ours."""
    names = ("*.raw", "*.crc", ABOUT, f".{ABOUT}*.part", f".{MARK}*.part", MARK)
    return [path for name in names for path in sorted(folder.glob(name)) if path.is_file()]


def _empty(folder: Path) -> None:
    for path in _files(folder):
        path.unlink(missing_ok=True)


class Set(NamedTuple):
    """A folder of the cache."""

    name: str
    size: int
    """bytes"""
    source: str
    """what it was made from; empty if it is not complete"""
    holder: str
    """the process that is making it, if one is"""


def sets(root: Path) -> Iterator[Set]:
    """The sets in the cache of a data folder, complete or not, by name."""
    cache = root / "cache"
    for folder in sorted(cache.iterdir()) if cache.is_dir() else ():
        if folder.is_symlink() or not folder.is_dir():
            continue
        about = _about(folder)
        if about is not None or (folder / MARK).is_file():
            size = sum(path.stat().st_size for path in _files(folder))
            source = "" if about is None else about["source"]
            yield Set(folder.name, size, source, runs.holder_of(folder))


def remove(root: Path, name: str) -> int:
    """Remove a set of the cache; the bytes that this frees.

    Raises:
        DataError: there is none of this name, or a process is making it.
    """
    known = {each.name: each for each in sets(root)}
    if name not in known:
        there = ", ".join(known) or "none"
        raise DataError(f"{root / 'cache'} has no streamed set {name!r}; it has {there}.")
    folder = root / "cache" / name
    try:
        with runs.locked(folder):
            (folder / ABOUT).unlink(missing_ok=True)  # first: what is left is not complete
            _empty(folder)
    except runs.Held as error:
        raise DataError(f"{error}: it is being written. Stop that first.") from error
    with suppress(OSError):
        folder.rmdir()
    return known[name].size


@contextmanager
def bar(what: str, rows: int, source: Path) -> Iterator[Callable[[int], object]]:
    """A progress bar on a terminal, else a line; yields what is told how many rows are done."""
    from tqdm import tqdm  # noqa: PLC0415  not needed if the files exist

    if not sys.stderr.isatty():
        _say(f"decoding {rows} images of {source} once, to be streamed from disk")
    with tqdm(desc=what, total=rows, unit=" images", disable=None) as shown:
        yield shown.update


def _say(text: str) -> None:
    print(text, file=sys.stderr)
