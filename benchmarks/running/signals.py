"""SIGINT and SIGTERM: the first stops the runs of other processes, the second this process."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

ASKED = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def heard(act: Callable[[], None]) -> Iterator[Callable[[], bool]]:
    """Whether one of them has come while the block runs; ``act`` is called when it does."""
    if threading.current_thread() is not threading.main_thread():  # which alone hears signals
        yield lambda: False
        return
    before = {each: signal.getsignal(each) for each in ASKED}
    stopping = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal stopping
        for each in ASKED:
            signal.signal(each, signal.default_int_handler)
        stopping = True
        act()
        print("\naugbench: stopping; runs are writing their checkpoints", file=sys.stderr)

    for each in ASKED:
        signal.signal(each, ask)
    try:
        yield lambda: stopping
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
