"""When a command stops in time: its own limit, the end of its SLURM job, or SIGUSR1."""

from __future__ import annotations

import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from methods.naming import NamingError

SLURM_END = "SLURM_JOB_END_TIME"
SLURM_SECONDS = 120
"""Before the end of a SLURM job, for checkpoints and the exit."""
YEAR = 366 * 86400
"""The longest limit that is told as a date."""
LOOK_SECONDS = 1.0
"""Between two looks at the clock."""
DURATION = r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?"


class OutOfTime(KeyboardInterrupt):
    """The time limit is reached and runs are left; the same command resumes them."""


@dataclass(frozen=True)
class Limit:
    """A time at which runs write their checkpoints and stop."""

    until: float = math.inf
    """seconds since 1970"""

    @property
    def given(self) -> bool:
        """Whether there is one, or SIGUSR1 has come."""
        return self.until < math.inf or _called()

    def reached(self) -> bool:
        """Whether it is over, or SIGUSR1 has come."""
        return time.time() >= self.until or _called()

    def left(self) -> float:
        """Seconds, at least 0."""
        return max(0.0, self.until - time.time())

    def allows(self, seconds: float) -> bool:
        """Whether so many seconds are left."""
        return time.time() + seconds <= self.until

    @contextmanager
    def watched(self, act: Callable[[], None]) -> Iterator[None]:
        """Call ``act``, in a thread, once the limit is reached while the block runs."""
        over = threading.Event()

        def watch() -> None:
            while not over.wait(LOOK_SECONDS):
                if self.reached():
                    tell()
                    act()
                    return

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def limit_of(text: str) -> Limit:
    """The limit of a command that starts now: ``3h50m``, else the end of its SLURM job.

    Raises:
        NamingError: it is no duration.
    """
    if text:
        found = re.fullmatch(DURATION, text)
        parts = [int(each or 0) for each in found.groups()] if found else [0]
        seconds = sum(a * b for a, b in zip(parts, (86400, 3600, 60, 1), strict=False))
        if not seconds:
            raise NamingError(
                "time-limit: expected a duration such as 3h50m, 45m or 1d12h (d, h, m, s), got "
                f"{text!r}"
            )
        return Limit(time.time() + min(seconds, YEAR))
    end = os.environ.get(SLURM_END, "")
    # A shell that outlived its job still has the variable.
    if end.isdecimal() and int(end) > time.time():
        return Limit(int(end) - SLURM_SECONDS)
    return Limit()


def tell() -> None:
    """Say that the limit is reached."""
    print("\naugbench: time limit reached; runs are writing their checkpoints", file=sys.stderr)


def block() -> None:
    """Let SIGUSR1 wait, here and in every process started from here, until ``Limit`` asks for it.

    SLURM sends it to each process of a job step; by default it would end them.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})


def _called() -> bool:
    return signal.SIGUSR1 in signal.sigpending()
