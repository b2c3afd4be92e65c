"""What a run records of its machine."""

import ctypes
import sys
from pathlib import Path
from threading import Thread

import pytest
import torch

from benchmarks.training.machine import peak_memory, reset_peak_memory

CPU = torch.device("cpu")


def peaks_are_reset() -> bool:
    """Whether the system forgets the peak of a process when it is asked to."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return hasattr(ctypes.CDLL(None), "malloc_trim")


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are those of the process elsewhere")
def test_a_peak_does_not_hold_what_an_earlier_thread_freed() -> None:
    if not peaks_are_reset():
        pytest.skip("this system does not let a process forget its peak, or has no malloc_trim")
    kept: list[bytearray] = []

    def a_run() -> None:
        blocks = [bytearray(60_000) for _ in range(4000)]
        kept.extend(blocks[::400])  # without these the pool is given back by itself

    thread = Thread(target=a_run)
    thread.start()
    thread.join()
    before = peak_memory(CPU)
    reset_peak_memory(CPU)
    assert before - peak_memory(CPU) > 0.8 * 4000 * 60_000 / 2**20
