"""The file that tells the runs of a sweep on Ray, wherever they are, to go on or to end."""

from __future__ import annotations

import contextlib
import fcntl
import math
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from analysis import runs

LOOK_SECONDS = 0.3
"""Between two looks at the flag that ends the runs."""
GO, STOP = "go", "stop"


@contextmanager
def raised(root: Path) -> Iterator[Path]:
    """The file that tells the runs of this sweep to go on; its removal ends them too."""
    for old in root.glob(".sweep-*"):  # of a sweep that was killed
        with contextlib.suppress(OSError, runs.Held), held(old, new=False):
            old.unlink(missing_ok=True)
    path = root / f".sweep-{secrets.token_hex(8)}"
    try:
        write(path, GO)
        with held(path):
            yield path
    finally:
        path.unlink(missing_ok=True)


def write(path: Path, text: str) -> None:
    """In place: a file that is renamed over another would not be the one that is held."""
    path.write_text(text, encoding="utf-8")


def lowered(flag: Path) -> Callable[[], bool]:
    """Whether the sweep ends, looked up now and then."""
    looked, ends = -math.inf, False

    def ask() -> bool:
        nonlocal looked, ends
        now = time.monotonic()
        if not ends and now - looked > LOOK_SECONDS:
            looked = now
            try:
                ends = flag.read_text(encoding="utf-8") != GO
            except OSError:
                ends = True
        return ends

    return ask


@contextmanager
def held(path: Path, new: bool = True) -> Iterator[None]:
    """Hold a file as long as this process lives; the kernel frees it."""
    with path.open("a" if new else "r+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise runs.Held(f"{path} is held by a sweep") from error
        yield
