"""Workers of ``compare`` and ``sweep --executor local`` as threads of the test's own process.

What they are handed, do and report is the same. For tests of what is trained and told: a process
takes seconds to import torch. Tests of processes, of their ends and of signals have real ones.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from threading import Thread
from typing import Any

import pytest

from benchmarks.running import local


class _Worker(Thread):
    """A worker as ``local`` knows it; its end of the pipe is a copy, as that of a process is."""

    exitcode = 0

    def __init__(self, target: Callable[..., Any], args: tuple[Any, ...], daemon: bool) -> None:
        module, name, theirs, *more = args
        self._connection = Connection(os.dup(theirs.fileno()))
        super().__init__(target=target, args=(module, name, self._connection, *more), daemon=daemon)

    def run(self) -> None:
        try:
            super().run()
        finally:
            self._connection.close()


class _Threads:
    """What ``local`` asks of ``multiprocessing``."""

    Process = _Worker
    Pipe = staticmethod(multiprocessing.Pipe)

    def get_context(self, method: str) -> _Threads:
        return self


@contextmanager
def workers_as_threads() -> Iterator[None]:
    """Workers that are started within are threads."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(local, "multiprocessing", _Threads())
        yield
