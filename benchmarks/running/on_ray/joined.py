"""A running Ray cluster: what it has, and whether its machines can do the runs."""

from __future__ import annotations

import logging
import math
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from analysis import numbers
from analysis.studyfile import StudyError
from benchmarks.data import sources, splits
from benchmarks.data.catalogue import CATALOGUE
from benchmarks.data.download import DataError
from benchmarks.running import capacity
from benchmarks.running.capacity import Capacity
from benchmarks.running.disk import Options
from benchmarks.running.flag import GO
from benchmarks.running.on_ray.carried import carry
from benchmarks.running.problems import said
from benchmarks.studies.cells import Cell
from benchmarks.studies.schema import Study
from benchmarks.training.errors import first_line
from methods import own

CLIENT = "ray://"
"""How the address of a cluster begins on which Tune's driver runs too."""


def join(ray: ModuleType, address: str, study: Study, workers: int | None) -> Capacity:
    """Join the Ray at an address.

    Raises:
        StudyError: none answers there, or no machine has what one run needs.
    """
    try:
        remote = address.startswith(CLIENT)
        ray.init(address=address, log_to_driver=remote, logging_level=logging.ERROR)
    except ImportError as error:
        raise StudyError(
            f"address: {address} needs packages that are not installed ({first_line(error)}): pip "
            "install 'augbench[client]', or give the address without ray://"
        ) from error
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise StudyError(
            f"address: no Ray cluster answers at {address} ({first_line(error)}); start one with "
            "'ray start --head', or leave the address out"
        ) from error
    machines = [node for node in ray.nodes() if node["Alive"]]
    has = [
        (node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0)) for node in machines
    ]
    cpus, gpu = capacity.takes(study, int(sum(gpus for _, gpus in has)), workers)
    fit = sum(int(min(cores / cpus, gpus / gpu if gpu else math.inf) + 1e-9) for cores, gpus in has)
    if not fit:
        largest = max(has)
        raise StudyError(
            f"resources: one run needs {cpus:g} cores and {gpu:g} GPU, but the largest of "
            f"{numbers.count(len(machines), 'machine')} at {address} has {largest[0]:g} cores and "
            f"{largest[1]:g} GPU: change resources in the file"
        )
    return Capacity(address, min(workers or fit, fit), cpus, gpu, len(machines))


def check_machines(
    ray: ModuleType, root: Path, flag: Path, options: Options, wanted: Sequence[Cell]
) -> None:
    """Every machine sees the results folder, may write there, and has the data or fetches them.

    Raises:
        DataError: names each machine and what is wrong there.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # noqa: PLC0415

    benchmarks = list({splits.stored(cell.benchmark): cell.benchmark for cell in wanted}.values())
    checks, packed = {}, pickle.dumps((str(root), flag.name, options, benchmarks))
    for node in ray.nodes():
        if node["Alive"]:
            where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            task = ray.remote(carry(check_here, "joined"))
            task = task.options(num_cpus=0, scheduling_strategy=where)
            name = f"{node['NodeManagerAddress']} ({node['NodeID'][:6]})"
            checks[name] = task.remote(packed=packed)
    problems = []
    for name, check in checks.items():
        try:
            problems += [f"machine {name}: {text}" for text in ray.get(check)]
        except Exception as error:  # whatever it is, it is that machine's
            problems.append(
                f"machine {name}: augbench cannot be imported there ({first_line(error)}): install "
                "the same version on every machine"
            )
    if problems:
        raise DataError("\n".join(problems))


def check_here(root: str, flag: str, options: Options, benchmarks: list[Any]) -> list[str]:
    """What is wrong on this machine; data sets that are missing are fetched."""
    problems = own.problems(options.code)
    folder = Path(root)
    probe = folder / f"{flag}.{os.uname().nodename}-{os.getpid()}"
    try:
        if (folder / flag).read_text(encoding="utf-8") != GO:
            raise FileNotFoundError
        probe.write_text("", encoding="utf-8")
        probe.unlink()
    except FileNotFoundError:
        problems.append(
            f"{root} is a different folder from that on the machine that started the sweep: put "
            f"the results "
            "on storage that all machines share, with out: in the file or --out"
        )
    except OSError as error:
        problems.append(f"the results folder cannot be written: {said(error)}")
    for benchmark in benchmarks:
        entry = CATALOGUE.get(benchmark.name)
        official = entry is not None and not benchmark.unlabelled
        if (
            entry is not None
            and official
            and None not in sources.locate(entry, benchmark.size, options.data_root)
        ):
            continue
        try:
            splits.arrays_of(
                benchmark, options.data_root, options.allow_unverified, options.memory_gib
            )
        except (DataError, OSError) as error:
            problems.append(f"data: {said(error)}")
    return problems
