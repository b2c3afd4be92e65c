"""What one run of a study takes, and how many runs fit on this machine. Needs no ray."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import torch

from benchmarks.study import Study, StudyError


@dataclass(frozen=True)
class Cluster:
    """Where the runs go."""

    address: str
    """empty: a Ray of our own on this machine"""
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
    """Of this machine, as far as this process may use them."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def gpus() -> int:
    """Of this machine."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def takes(study: Study, gpus: bool) -> tuple[float, float]:
    """Cores and GPUs of one run; a GPU of its own where there are any and the file says nothing."""
    threads = max(block.threads for block in study.blocks)
    cpus = study.resources.cpus if study.resources.cpus is not None else float(threads)
    gpu = study.resources.gpu
    return cpus, (1.0 if gpus else 0.0) if gpu is None else gpu


def here(study: Study, workers: int | None) -> Cluster:
    """This machine, with as many runs at a time as are asked for or fit.

    Raises:
        StudyError: it has not what one run takes, or not the GPUs for so many.
    """
    has, own = cores(), gpus()
    cpus, gpu = takes(study, own > 0)
    if gpu > own:
        key = "gpus" if study.resources.gpus is not None else "trials_per_gpu"
        raise StudyError(
            f"resources: one run takes {gpu:g} GPU, and this machine has {own}: train on the CPU "
            f"with --set resources.{key}=0, or name a cluster with --address"
        )
    if cpus > has:
        raise StudyError(
            f"resources: one run takes {cpus:g} cores, and this machine has {has}: set cpus to "
            f"{has} or less"
        )
    fit = int(has / cpus + 1e-9)
    if gpu:
        fit = min(fit, math.floor(1 / gpu + 1e-9) * own if gpu < 1 else int(own / gpu))
    count = workers or fit
    if gpu and count > fit:
        raise StudyError(f"workers: {fit} run(s) of {gpu:g} GPU fit on {own} GPU(s), got {count}")
    return Cluster("", count, cpus, gpu, 1)
