"""Downloads published files: resumable, with time-outs and retries; the MD5 is checked."""

import contextlib
import errno
import hashlib
import http.client
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from analysis.runs import is_at
from benchmarks.data.catalogue import File

# Some servers answer 403 to urllib's own name and to a bare browser name.
USER_AGENT = "augbench/0.1 (+python-urllib)"
BLOCK = 1 << 20
BACKOFF = 1.0  # seconds before the first retry, doubled for each further one
LONGEST_WAIT = 30.0
TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})


def md5_of(path: Path) -> str:
    """The MD5 of a file, 32 lower-case hex digits, read in blocks.

    Raises OSError if the file cannot be read.
    """
    with path.open("rb") as handle:
        return _digest(handle).hexdigest()


def stamp_of(path: Path) -> str:
    """A hash of what changes with a file, or with a file in a folder, without reading any.

    Of a path that does not exist too, so that whoever reads it says so.
    """
    digest = hashlib.md5(usedforsecurity=False)
    below = (Path(top) / name for top, _, names in os.walk(path) for name in names)
    for file in [path, *sorted(below)]:
        with contextlib.suppress(OSError):
            stat = file.stat()
            told = f"\0{stat.st_size}\0{stat.st_mtime_ns}\0{stat.st_ctime_ns}\0"
            digest.update(os.fsencode(file) + told.encode())
    return digest.hexdigest()


def by_hand(file: File, folder: Path) -> str:
    """The sentence that tells a user how to put a file in place without our download."""
    return f"Download {file.url} (MD5 {file.md5}) by hand and put it into {folder} as {file.name}."


def fetch(
    file: File, folder: Path, *, timeout: float = 30, retries: int = 4, progress: bool = True
) -> Path:
    """The path of `file` in `folder`, downloaded unless it is there already.

    What was received is kept in `<name>.part`, so that the next call resumes an interrupted
    download (a lost connection, a full disk, Ctrl-C); the file gets its name only after its MD5 was
    verified. Two processes that fetch the same file take turns: the second finds it complete, or
    tries once.
    `timeout` is in seconds, for connecting and for each read; `retries` counts consecutive attempts
    that received nothing new.

    Raises DataError if the file is unavailable (the message says how to get it by hand), if its
    MD5 is wrong (the part is removed), if another file has its name, and if the disk is full.
    """
    target = folder / file.name
    if _is_there(file, target):
        return target
    part = folder / f"{file.name}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(part) as (handle, waited):
            if _is_there(file, target):
                part.unlink()
                return target
            if waited:  # the process before has just made the other attempts
                retries = 0
            _complete(handle, file, folder, timeout, retries, progress)
            os.fsync(handle.fileno())
            part.replace(target)
    except OSError as error:
        reason = "the disk is full" if _is_full(error) else str(error)
        kept = " What was received is kept; run again to resume." if part.exists() else ""
        raise DataError(
            f"{file.name} cannot be written into {folder}: {reason}.{kept} Free some space or "
            f"choose another data folder (AUGBENCH_DATA)."
        ) from error
    return target


def _is_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def _is_there(file: File, target: Path) -> bool:
    """Whether the file already exists; DataError if another file has its name."""
    if not target.exists():
        return False
    got = md5_of(target)
    if got != file.md5:
        raise DataError(
            f"{target} has MD5 {got}, the official {file.name} has {file.md5}. "
            f"Remove or rename it, then fetch again."
        )
    return True


@contextlib.contextmanager
def _locked(part: Path) -> Iterator[tuple[BinaryIO, bool]]:
    """The part file, open for reading and writing and locked by this process, and whether another
    process had locked it before."""
    import fcntl  # noqa: PLC0415 - absent on Windows

    waited = False
    while True:
        # Unbuffered: each block is on disk before the next is read, whatever ends the process.
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        with os.fdopen(descriptor, "rb+", buffering=0) as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(
                    f"another process is downloading {part.stem}: waiting for it", file=sys.stderr
                )
                fcntl.flock(handle, fcntl.LOCK_EX)
                waited = True
            # The holder before us may have renamed or removed the file that we opened.
            if is_at(handle, part):
                yield handle, waited
                return


def _complete(
    handle: BinaryIO, file: File, folder: Path, timeout: float, retries: int, progress: bool
) -> None:
    """Complete the open part file and check it."""
    attempt, furthest = 0, os.fstat(handle.fileno()).st_size
    if progress and not sys.stderr.isatty():
        print(f"downloading {file.name} from {file.url}", file=sys.stderr)
    while True:
        try:
            got = _transfer(handle, file, timeout, progress)
            break
        except _WriteError as error:
            raise error.cause from error
        except (OSError, http.client.HTTPException) as error:
            final = isinstance(error, urllib.error.HTTPError) and error.code not in TRANSIENT
            cause = f"{type(error).__name__}: {error}"
            if isinstance(error, urllib.error.HTTPError):
                error.close()
            size = os.fstat(handle.fileno()).st_size
            attempt, furthest = (0, size) if size > furthest else (attempt + 1, furthest)
            if final or attempt > retries:
                kept = f" ({size} bytes are kept, a further call resumes)" if size else ""
                if not size:
                    (folder / f"{file.name}.part").unlink()
                raise DataError(
                    f"{file.name} could not be downloaded: {cause}{kept}. {by_hand(file, folder)}"
                ) from error
            pause = min(BACKOFF * 2 ** max(attempt - 1, 0), LONGEST_WAIT)
            print(f"{file.name}: {cause}; retrying in {pause:.0f} s", file=sys.stderr)
            time.sleep(pause)
    if got != file.md5:
        size = os.fstat(handle.fileno()).st_size
        (folder / f"{file.name}.part").unlink()
        raise DataError(
            f"what {file.url} sent for {file.name} ({size} bytes) has MD5 {got}, expected "
            f"{file.md5}; it was removed. Fetch again; if this repeats, something between you and "
            f"the server alters the file. {by_hand(file, folder)}"
        )


def _transfer(handle: BinaryIO, file: File, timeout: float, progress: bool) -> str:
    """One attempt: the MD5 of the part file after reading from the server to the end.

    Raises OSError or HTTPException if the connection fails, _WriteError if the disk does.
    """
    from tqdm import tqdm  # noqa: PLC0415  not needed if the files exist

    handle.seek(0)
    digest = _digest(handle)
    start = handle.tell()
    if start and digest.hexdigest() == file.md5:
        return file.md5
    headers = {"User-Agent": USER_AGENT} | ({"Range": f"bytes={start}-"} if start else {})
    request = urllib.request.Request(file.url, headers=headers)
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE or not start:
            raise
        # The part is at least as long as the file but differs from it, so it is useless.
        error.close()
        handle.truncate(0)
        raise ConnectionError("the part file was longer than the file: starting over") from error
    with response:
        resumed = response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
        if start and not (response.status == http.HTTPStatus.PARTIAL_CONTENT and resumed):
            handle.seek(0)
            handle.truncate(0)
            digest, start = hashlib.md5(usedforsecurity=False), 0
            if response.status == http.HTTPStatus.PARTIAL_CONTENT:
                raise ConnectionError(
                    "the server sent a different range than requested: starting over"
                )
        length = response.headers.get("Content-Length", "")
        total = start + int(length) if length.isdigit() else None
        with tqdm(
            desc=file.name,
            total=total,
            initial=start,
            unit="B",
            unit_scale=True,
            disable=None if progress else True,
        ) as bar:
            size = start
            # read1 returns what has arrived; read would lose up to a block at a time-out.
            while block := response.read1(BLOCK):
                _write(handle, block)
                digest.update(block)
                size += len(block)
                bar.update(len(block))
    # http.client ends silently if the server hangs up in the middle of a body.
    if total is not None and size < total:
        raise ConnectionError(f"the connection ended after {size} of {total} bytes")
    return digest.hexdigest()


def _write(handle: BinaryIO, block: bytes) -> None:
    view = memoryview(block)
    while view:
        try:
            view = view[handle.write(view) :]
        except OSError as error:
            raise _WriteError(error) from error


def _digest(handle: BinaryIO) -> "hashlib._Hash":
    digest = hashlib.md5(usedforsecurity=False)
    while block := handle.read(BLOCK):
        digest.update(block)
    return digest


class DataError(Exception):
    """Data that are missing or cannot be used; the message says what is wrong and what to do."""


class _WriteError(Exception):
    """A failure of the disk, as opposed to the network, whose failures are retried."""

    def __init__(self, cause: OSError) -> None:
        super().__init__(str(cause))
        self.cause = cause
