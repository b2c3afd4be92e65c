"""What a sweep leaves when it is killed: a small process that outlives it ends and removes that.

Ray's own processes end with the driver, but for two agents that linger for a minute, and nobody
removes its folder. Runs on the standard library alone: python cleanup.py FOLDER DRIVER, with a pipe
as standard input that ends when the process DRIVER does.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PATIENCE_SECONDS = 10.0
"""How long processes may take to end after they were killed."""
LONGEST_FOLDER = 20
"""Letters of the folder of temporary files: the path of a Unix socket has at most 107."""


def private_folder() -> Path:
    """A new folder whose path leaves room for the names of sockets."""
    base = tempfile.gettempdir()
    base = base if len(base) <= LONGEST_FOLDER else "/tmp"
    return Path(tempfile.mkdtemp(prefix="augbench-", dir=base))


@contextmanager
def outlived(folder: Path) -> Iterator[None]:
    """Remove the folder and every process that uses it, when the block or this process ends."""
    watcher = subprocess.Popen(
        [sys.executable, "-I", str(Path(__file__).absolute()), str(folder), str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C and the end of a terminal are for the driver
    )
    try:
        yield
    finally:
        watcher.communicate()


def users(folder: Path, spared: int) -> list[int]:
    """Processes but one that have a file below the folder open (none are found but on Linux)."""
    return [
        int(process.name)
        for process in Path("/proc").glob("[0-9]*")
        if int(process.name) not in (spared, os.getpid()) and any(_opened(process, f"{folder}/"))
    ]


def _opened(process: Path, prefix: str) -> Iterator[bool]:
    with contextlib.suppress(OSError):  # it ended while we look, or is closed to us
        for entry in os.scandir(process / "fd"):
            with contextlib.suppress(OSError):
                yield str(Path(entry.path).readlink()).startswith(prefix)


def clean(folder: Path, spared: int = 0) -> None:
    """End the processes that use the folder, but for one, and remove it."""
    limit = time.monotonic() + PATIENCE_SECONDS
    while left := users(folder, spared):
        for number in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        if time.monotonic() > limit:
            break
        time.sleep(0.05)
    shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """Wait until the driver is gone, then clean."""
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    sys.stdin.buffer.read()
    clean(Path(sys.argv[1]), int(sys.argv[2]))


if __name__ == "__main__":
    main()
