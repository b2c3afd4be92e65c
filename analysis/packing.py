"""Runs in one file, as ``augbench pack`` writes it and ``augbench unpack`` reads it.

A pack is a tar file compressed by zstd. Its first member, ``pack.json``, lists every other member
with its size and SHA-256. The same runs give the same bytes. A pack may be cut into pieces,
``NAME.001`` and so on, which are read one after the other.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import re
import shutil
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa

from analysis import question, records, runs

FORMAT = 1
MANIFEST = "pack.json"
LAST = ("run.json", "result.json")
"""Moved in last, in this order: a run with a result.json has ended."""
FILES = (
    "metrics.jsonl", "timing.jsonl", "predictions.npz", "learned.npz", "corruption.npz",
    "corrupted.npz", *LAST,
)  # fmt: skip
"""Files of a run that are packed if they exist; networks, checkpoints and samples are not."""
STUDY_FILES = (question.FILE, "search.json")
MOST = 2**28
"""Largest size of a manifest in bytes: a million files take less."""

Tick = Callable[[int], object]
"""Called with the number of bytes that are done."""


class PackError(OSError):
    """A pack that cannot be written or read; says which file and why."""


class Member(NamedTuple):
    """A file of a pack, and where its bytes are."""

    name: str
    source: Path
    sha256: str
    size: int

    def content(self) -> bytes:
        """The bytes, as they were when the member was made.

        Raises:
            PackError: the file has changed.
        """
        content = _content(self.source)
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise PackError(f"{self.source} changed while it was being packed; pack again")
        return content


def _content(path: Path) -> bytes:
    """The bytes of a file as packed: result.json does not list files that are left out."""
    content = path.read_bytes()
    if path.name != "result.json":
        return content
    result = json.loads(content)
    kept = {name: size for name, size in result["files"].items() if name in FILES}
    if kept == result["files"]:
        return content
    return f"{runs.to_json({**result, 'files': kept})}\n".encode()


def members(
    root: Path, folders: Sequence[Path], studies: Sequence[str], asked: bool = True
) -> list[Member]:
    """The contents of a pack of these runs and studies, sorted by name; ``asked``: with the study
    file beside the runs."""
    paths = [root / question.FILE] if asked else []
    paths += [folder / name for folder in folders for name in FILES]
    paths += [root / question.STUDIES / study / name for study in studies for name in STUDY_FILES]
    made = []
    for path in sorted(each for each in paths if each.is_file()):
        content = _content(path)
        name = path.relative_to(root).as_posix()
        made.append(Member(name, path, hashlib.sha256(content).hexdigest(), len(content)))
    return made


def pack(
    found: Sequence[Member], out: Path, piece: int = 0, tick: Tick | None = None
) -> list[Path]:
    """Write a pack, in pieces of ``piece`` bytes if that is above 0; returns the files written.

    Files of an earlier pack of this name are replaced once the new one is complete.

    Raises:
        PackError: a file has changed since its member was made.
        OSError: a file cannot be read or written; nothing is left behind.
    """
    runs_in: dict[str, dict[str, Any]] = {}
    others: dict[str, Any] = {}
    for each in found:
        folder, _, name = each.name.partition("/")
        is_study = folder in (question.STUDIES, question.FILE)
        place = others if is_study else runs_in.setdefault(folder, {})
        place[each.name if is_study else name] = {"sha256": each.sha256, "size": each.size}
    manifest = {"format": FORMAT, "runs": runs_in, "studies": others}
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as partial:
        pieces = _Pieces(Path(partial), piece)
        with (
            pa.CompressedOutputStream(pa.PythonFile(pieces, mode="w"), "zstd") as stream,
            tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT) as tar,  # type: ignore[call-overload]
        ):
            _add(tar, MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
            for each in found:
                _add(tar, each.name, each.content())
                if tick is not None:
                    tick(each.size)
        pieces.close()
        old = {out, *_beside(out)}
        named = [out.with_name(out.name + written.suffix) for written in pieces.paths]
        named = named if piece else [out]
        for written, path in zip(pieces.paths, named, strict=True):
            written.replace(path)
        for path in old - set(named):
            path.unlink(missing_ok=True)
    return named


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # time, owner and group are 0
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


class _Pieces:
    """An output file that is split into files of at most ``size`` bytes, if that is above 0."""

    closed = False

    def __init__(self, folder: Path, size: int) -> None:
        self.paths: list[Path] = []
        self._folder, self._size, self._room = folder, size, 0
        self._file: IO[bytes] | None = None

    def write(self, content: bytes) -> int:
        left = memoryview(content)
        while left:
            if self._file is None or (self._size and not self._room):
                self.close()
                self.paths.append(self._folder / f"pack.{len(self.paths) + 1:03}")
                self._file, self._room = self.paths[-1].open("wb"), self._size
            count = min(len(left), self._room) if self._size else len(left)
            self._file.write(left[:count])
            left, self._room = left[count:], self._room - count
        return len(content)

    def flush(self) -> None:
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None


class _Joined:
    """Files read as one."""

    closed = False

    def __init__(self, paths: Sequence[Path], tick: Tick | None) -> None:
        self._left, self._tick = list(paths), tick
        self._file: IO[bytes] | None = None

    def read(self, size: int) -> bytes:
        while self._file is not None or self._left:
            self._file = self._file or self._left.pop(0).open("rb")
            if content := self._file.read(size):
                if self._tick is not None:
                    self._tick(len(content))
                return content
            self.close()
        return b""

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None


PIECE = re.compile(r"(.+)\.(\d{3,})")


def _beside(out: Path) -> list[Path]:
    """The pieces of a pack that exist."""
    found = (PIECE.fullmatch(each.name) for each in out.parent.iterdir())
    return [out.parent / each[0] for each in found if each is not None and each[1] == out.name]


def packs(given: Sequence[Path]) -> list[list[Path]]:
    """The files of each pack; any piece stands for the whole pack, whose pieces lie beside it.

    Raises:
        PackError: a file or a piece is missing.
    """
    found: dict[Path, list[Path]] = {}
    for path in given:
        if not path.is_file():
            raise PackError(f"{path}: expected a file written by augbench pack, found none")
        piece = PIECE.fullmatch(path.name)
        whole = path.with_name(piece[1]) if piece else path
        if whole in found:
            continue
        pieces = {int(each.name.rpartition(".")[2]): each for each in _beside(whole)}
        for number in range(1, max(pieces, default=0) + 1) if piece else ():
            if number not in pieces:
                raise PackError(f"{whole}.{number:03} is missing: expected every piece of the pack")
        found[whole] = [pieces[number] for number in sorted(pieces)] if piece else [path]
    return list(found.values())


def extract(files: Sequence[Path], into: Path, tick: Tick | None = None) -> list[str]:
    """Extract a pack into a new directory and check every file; returns the ids of its runs.

    Raises:
        PackError: the pack is damaged, incomplete or not a pack, or it contains other paths.
        OSError: a file cannot be read or written.
    """
    name = f"{files[0]}" + (f" to {files[-1].name}" if len(files) > 1 else "")
    try:
        with (
            pa.CompressedInputStream(pa.PythonFile(_Joined(files, tick), mode="r"), "zstd") as raw,
            tarfile.open(fileobj=raw, mode="r|") as tar,  # type: ignore[call-overload]
        ):
            return _extract(tar, into)
    except (OSError, EOFError, tarfile.TarError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = (
            str(error)
            if isinstance(error, PackError)
            else f"damaged, truncated or not a pack ({error})"
        )
        raise PackError(f"{name}: {reason}; nothing was unpacked from it") from error


def _extract(tar: tarfile.TarFile, into: Path) -> list[str]:
    first = tar.next()
    if first is None or first.name != MANIFEST or not first.isreg() or first.size > MOST:
        raise PackError(f"expected a pack, in which the first member is {MANIFEST}")
    try:
        manifest = json.loads(_read(tar, first))
        if manifest["format"] != FORMAT:
            raise PackError(
                f"expected a pack of format {FORMAT}, got {manifest['format']}: "
                "it was written by another version of augbench"
            )
        expected = {
            f"{run}/{name}": (str(each["sha256"]), int(each["size"]))
            for run, listed in manifest["runs"].items()
            for name, each in listed.items()
        } | {
            name: (str(each["sha256"]), int(each["size"]))
            for name, each in manifest["studies"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PackError(f"{MANIFEST} cannot be read") from error
    for name in expected:
        _check(name)
    left = dict(expected)
    while (member := tar.next()) is not None:
        if not member.isreg() or member.name not in left:
            raise PackError(f"{member.name!r} is not a file that {MANIFEST} lists once")
        sha256, size = left.pop(member.name)
        content = _read(tar, member) if member.size == size else b""
        if len(content) != size or hashlib.sha256(content).hexdigest() != sha256:
            raise PackError(f"{member.name} does not match its checksum in {MANIFEST}")
        path = into / member.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    if left:
        raise PackError(f"{min(left)} is missing: the file is truncated, or lacks its last piece")
    return sorted(manifest["runs"])


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return b"" if file is None else file.read()


def _check(name: str) -> None:
    """Reject every name that ``members`` would not make, and so every path outside."""
    files, studies = "|".join(map(re.escape, FILES)), "|".join(map(re.escape, STUDY_FILES))
    study = rf"{question.STUDIES}/[^./\\\0][^/\\\0]*/({studies})"
    if not re.fullmatch(rf"[0-9a-f]{{16}}/({files})|{study}|study\.yaml", name):
        raise PackError(f"{name!r} is not the name of a file of a run or a study")


class Machine(NamedTuple):
    """What numbers depend on but ids do not include; the runs of one folder share it."""

    device: str
    torch: str
    """release without patch"""
    augbench: str

    @property
    def suffix(self) -> str:
        """The suffix of a folder's name: ``cuda-torch2.13-augbench0.1.0``."""
        text = f"{self.device}-torch{self.torch}-augbench{self.augbench}"
        return re.sub(r"[^\w.+-]", "_", text)

    def __str__(self) -> str:
        return f"{self.device}, torch {self.torch}, augbench {self.augbench}"


def machine_of(folder: Path) -> Machine | None:
    """The machine of a run that is done; None for others, which do not record it."""
    result = runs.read_result(folder)
    if result is None or result["status"] != "done":
        return None
    versions = result.get("versions", {})
    torch = ".".join(str(versions.get("torch", "?")).split(".")[:2])
    device = str(result.get("device", {}).get("type", "unknown"))
    return Machine(device, torch, str(versions.get("augbench", "?")))


def places(root: Path, folders: Sequence[Path]) -> dict[Path, Path]:
    """Where each unpacked run goes: the results folder, or one beside it for another machine.

    A folder without runs takes those of the most frequent machine. Runs that do not record their
    machine go with these.
    """
    there = {found for each in runs.folders(root) if (found := machine_of(each)) is not None}
    told = {folder: machine_of(folder) for folder in folders}
    counted = Counter(each for each in told.values() if each is not None)
    usual = min(counted, key=lambda each: (-counted[each], each), default=None)
    there = there or {usual}

    def place(machine: Machine | None) -> Path:
        own = machine or usual
        if own is None or own in there:
            return root
        return root.with_name(f"{root.name}-{own.suffix}")

    return {folder: place(machine) for folder, machine in told.items()}


def move_in(folder: Path, target: Path) -> str:
    """Move an unpacked run to its place; returns ``unpacked`` or ``there already``.

    An existing run is replaced if it has not ended or failed.

    Raises:
        PackError: it is not a run, or one with other results exists; that one is kept.
        runs.Held: a live process is working on the existing run.
        OSError: it cannot be moved.
    """
    try:
        known = runs.read_run(folder)[0].id == folder.name
    except runs.UNREADABLE as error:
        raise PackError("its run.json is not a run of this version") from error
    new = runs.status_of(folder).state
    if not known or new not in records.STATES:
        raise PackError("its files are not those of a run that has ended")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.rename(target)  # also replaces an empty directory
        return "unpacked"
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    with runs.locked(target):
        old = runs.status_of(target).state
        if old in records.STATES and (old != "failed" or new == "failed"):
            if new != "failed" and not same_results(folder, target):
                raise PackError(f"{target} has other results and was kept")
            return "there already"
        for name in ("checkpoint.pt", "result.json", *FILES):
            (target / name).unlink(missing_ok=True)
        for path in sorted(folder.iterdir(), key=lambda path: FILES.index(path.name)):
            path.rename(target / path.name)
    return "unpacked"


def same_results(one: Path, other: Path) -> bool:
    """Whether two directories of a run hold equal predictions and metrics; times may differ."""
    first, second = ((runs.read_result(each) or {}) for each in (one, other))
    if any(first.get(key) != second.get(key) for key in ("status", "metrics")):
        return False
    lines = [each / "metrics.jsonl" for each in (one, other)]
    texts = [each.read_bytes() if each.is_file() else b"" for each in lines]
    if texts[0] != texts[1]:
        return False
    stored = [each / "predictions.npz" for each in (one, other)]
    if not any(each.is_file() for each in stored):
        return True
    try:
        left, right = (runs.read_arrays(each) for each in stored)
    except records.UNREADABLE:
        return False
    return left.keys() == right.keys() and all(
        np.array_equal(left[name], right[name]) and left[name].dtype == right[name].dtype
        for name in left
    )


def move_studies(folder: Path, root: Path, ids: set[str]) -> Iterator[Path]:
    """Move the study file, and those of the studies that have some of these runs; yields the
    existing files that differ.

    Existing files are kept, so that recorded predictions are not replaced.
    """
    names = [question.FILE]
    for study in question.names(folder):
        if ids & question.read(folder, study).runs:
            names += [f"{question.STUDIES}/{study}/{name}" for name in STUDY_FILES]
    for source, target in ((folder / name, root / name) for name in names):
        if not source.is_file():
            continue
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            runs.write_text(target, source.read_text(encoding="utf-8"))
        elif source.read_bytes() != target.read_bytes():
            yield target


def workplace(root: Path) -> Path:
    """The directory in a results folder in which a pack is unpacked; it is not a run."""
    return root / ".unpack"


def empty(work: Path) -> None:
    """Empty a workplace, except for its lock."""
    with suppress(FileNotFoundError):
        for path in work.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != "lock":
                path.unlink()
