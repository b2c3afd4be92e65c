"""What one run of a study needs, and how many runs fit on this machine. Needs no ray."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.numbers import count
from analysis.studyfile import StudyError

if TYPE_CHECKING:
    from benchmarks.studies.schema import Study


@dataclass(frozen=True)
class Capacity:
    """Where the runs are executed, and how many fit there."""

    address: str
    """of a Ray that is joined; empty: this machine alone"""
    workers: int
    """runs at a time"""
    cpus: float
    gpu: float
    """of one run"""
    machines: int

    @property
    def device(self) -> str:
        """What the runs train on."""
        return "cuda" if self.gpu else "cpu"


def cores() -> int:
    """Of this machine, as far as this process may use them: its affinity and its container's quota.

    A quota of 2.5 cores counts as three: two would leave a fifth of it unused.
    """
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    return max(1, math.ceil(min(count, quota())))


def quota(root: Path = Path("/")) -> float:
    """Cores that the control groups of this process leave it (docker --cpus); inf where none says.

    Its own group and all groups above count, in version 2 (``cpu.max``) and in version 1
    (``cpu.cfs_quota_us``). ``root`` is where ``proc`` and ``sys`` lie. A container may see its
    group's name on the host, but only its own files, at the top: so the top is looked at too.
    """
    told = root / "proc/self/cgroup"
    least = math.inf
    for line in told.read_text(encoding="utf-8").splitlines() if told.is_file() else ():
        _, controllers, name = line.split(":", 2)
        if not controllers:
            top = root / "sys/fs/cgroup"
        elif "cpu" in controllers.split(","):
            top = root / "sys/fs/cgroup" / controllers
            top = top if top.is_dir() else root / "sys/fs/cgroup/cpu"
        else:
            continue
        group = top / name.strip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(top):
                least = min(least, _quota_of(folder))
    return least


def _quota_of(group: Path) -> float:
    """Cores of one control group."""
    both = group / "cpu.max"
    apart = [group / f"cpu.cfs_{what}_us" for what in ("quota", "period")]
    if both.is_file():
        quota, period = both.read_text(encoding="ascii").split()
    elif all(each.is_file() for each in apart):
        quota, period = (each.read_text(encoding="ascii").strip() for each in apart)
    else:
        return math.inf
    return math.inf if quota in ("max", "-1") else int(quota) / int(period)


def crowded(workers: int, threads: int) -> str:
    """A warning if these runs and threads take more cores than there are, else ""."""
    has, needs = cores(), workers * threads
    if needs <= has:
        return ""
    return (
        f"{count(workers, 'run')} at a time with {count(threads, 'thread')} each use {needs} "
        f"cores, but this machine has {has}: each run may take many times as long; use fewer runs "
        "or threads"
    )


def gpus() -> int:
    """Of this machine."""
    import torch  # noqa: PLC0415 - takes a second, which counting cores does not need

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def takes(study: Study, gpus: int, workers: int | None = None) -> tuple[float, float]:
    """Cores and GPUs of one run, where there are so many GPUs.

    How many share one, where the study leaves that open: ``workers`` at a time share all of them;
    else each has one, until it is measured (``packing``).
    """
    threads = max(block.threads for block in study.blocks)
    cpus = study.resources.cpus if study.resources.cpus is not None else float(threads)
    if study.resources.measured and gpus:
        return cpus, 1 / math.ceil((workers or 1) / gpus)
    gpu = study.resources.gpu
    return cpus, gpu or 0.0


def here(study: Study, workers: int | None) -> Capacity:
    """This machine, with as many runs at a time as are asked for or fit.

    Raises:
        StudyError: it lacks what one run needs, or the GPUs for so many runs.
    """
    has, own = cores(), gpus()
    cpus, gpu = takes(study, own, workers)
    if gpu > own:
        key = "gpus" if study.resources.gpus is not None else "trials_per_gpu"
        raise StudyError(
            f"resources: one run needs {gpu:g} GPU, but this machine has {own}: train on the CPU "
            f"with --set resources.{key}=0, or name a cluster with --address"
        )
    if cpus > has:
        raise StudyError(
            f"resources: one run needs {cpus:g} cores, but this machine has {has}: set cpus to "
            f"{has} or less"
        )
    fit = int(has / cpus + 1e-9)
    if not gpu:
        return Capacity("", workers or fit, cpus, gpu, 1)
    on_gpus = math.floor(1 / gpu + 1e-9) * own if gpu < 1 else int(own / gpu)
    fitting = workers or min(fit, on_gpus)
    if fitting > on_gpus:
        raise StudyError(
            f"workers: expected at most {on_gpus}, because each run takes {gpu:g} GPU and this "
            f"machine has {own}, got {fitting}"
        )
    return Capacity("", fitting, cpus, gpu, 1)
