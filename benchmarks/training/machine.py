"""The machine of a run: hardware, versions, memory."""

from __future__ import annotations

import ctypes
import errno
import gc
import platform
import resource
import sys
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def gpu_works() -> bool:
    """Whether CUDA still works in this process: after some errors every later call fails too."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return False
    return True


def reset_peak_memory(device: torch.device) -> None:
    """Reset the peak, if the system can, because a process may do many runs."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()  # other processes may need what an earlier run freed
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        # Memory that an earlier run freed in another thread stays with the process: glibc keeps
        # the pools of its threads, 64 MiB each, until they are trimmed.
        gc.collect()
        with suppress(AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)
        with suppress(OSError):  # a sandbox may forbid it; the peak is then the process's
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory(device: torch.device) -> float:
    """MiB: the device's peak on a GPU, else the largest resident set of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.partition("VmHWM:")[2].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def describe_device(device: torch.device) -> dict[str, Any]:
    """The hardware in words, recorded with every timing."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {"type": device.type, "name": name, "threads": torch.get_num_threads()}


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise
    return platform.processor() or platform.machine()


@cache
def installed_versions() -> dict[str, str]:
    """Versions of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for name in ("augbench", "torch", "numpy", "scipy", "scikit-learn", "pillow", "kornia"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
