"""Decodes many images, in order, with one process for each core."""

from __future__ import annotations

import json
import math
import os
import queue
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import IO

import numpy as np

from benchmarks.data import pictures
from benchmarks.data.download import DataError
from benchmarks.data.pictures import Picture

FEWEST = 500
"""Images from which on the start of processes is worth it."""
MOST = 32
"""Processes: one thread here reads, checks and writes what they decode."""
PER_PROCESS = 4
"""Images that are in work or wait, for each process."""
ERRORS = {each.__name__: each for each in (pictures.NotAnImage, pictures.Refused, ValueError)}


def cores() -> int:
    """Cores that this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def decoded(
    files: Iterable[bytes], count: int, size: int, processes: int | None = None
) -> Iterator[tuple[bytes, Picture | ValueError]]:
    """Of each file its bytes, and its image as ``pictures.decode`` returns it or the error that it
    raises. ``count`` is about how many there are.
    """
    most = min(MOST, cores()) if processes is None else processes
    if most < 2 or count < FEWEST:
        for data in files:
            yield data, _here(data, size)
        return
    with _started(most) as idle, ThreadPoolExecutor(most) as threads:
        waiting: deque[tuple[bytes, Future[Picture | ValueError]]] = deque()
        try:
            for data in files:
                waiting.append((data, threads.submit(_there, idle, data, size)))
                if len(waiting) > PER_PROCESS * most:
                    first, found = waiting.popleft()
                    yield first, found.result()
            while waiting:
                first, found = waiting.popleft()
                yield first, found.result()
        finally:
            threads.shutdown(cancel_futures=True)


def _here(data: bytes, size: int) -> Picture | ValueError:
    try:
        return pictures.decode(data, size)
    except ValueError as error:
        return error


Idle = queue.SimpleQueue["subprocess.Popen[bytes]"]


@contextmanager
def _started(count: int) -> Iterator[Idle]:
    """Processes that decode; they end when their input does, however this process ends."""
    command = [sys.executable, "-P", pictures.__file__]
    # In a session of their own: Ctrl-C is for us, who then close their input.
    started = [
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        for _ in range(count)
    ]
    idle: Idle = queue.SimpleQueue()
    for each in started:
        idle.put(each)
    try:
        yield idle
    finally:
        for each in started:
            each.kill()
        for each in started:
            with each:
                pass  # closes its pipes and waits


def _there(idle: Idle, data: bytes, size: int) -> Picture | ValueError:
    """The image, decoded by the process that is idle first."""
    process = idle.get()
    try:
        into, out = process.stdin, process.stdout
        assert into is not None and out is not None
        try:
            into.write(pictures.HEAD.pack(size, len(data)) + data)
            into.flush()
            told = json.loads(out.readline())
            if "error" in told:
                return ERRORS[told["error"]](told["text"])
            pixels = np.frombuffer(_exactly(out, math.prod(told["shape"])), np.uint8)
        except (OSError, ValueError) as error:
            raise DataError("a process that decodes images has died: out of memory?") from error
        return Picture(
            pixels.reshape(told["shape"]), frozenset(told["done"]), told["peak"], told["warned"]
        )
    finally:
        idle.put(process)


def _exactly(out: IO[bytes], size: int) -> bytes:
    data = out.read(size)
    if len(data) < size:
        raise EOFError
    return data
