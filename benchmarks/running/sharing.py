"""How many runs share a GPU: as many as memory and cores allow, while more of them train faster."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

from analysis import numbers, runs
from analysis.runs import Run
from benchmarks.running import capacity, mps
from benchmarks.running.probe import Plain, Setting, rows_like
from benchmarks.running.together import LATE, NotMeasured, Rate, Together
from benchmarks.studies.cells import Cell
from benchmarks.studies.plan import Plan
from benchmarks.studies.schema import Resources, Study
from benchmarks.training.progress import say
from methods.base import Input
from methods.naming import OWN

GROWTH = 1.1
"""More runs are tried while all of them together train at least so many times the images."""
SAFE = 4.0
"""A run is taken to need so many times the memory of a plain step. Counted by tensors, in bfloat16
with a ResNet-18 and batches of 128: AutoDO 2.6, SAFLEX 1.9, LP-A3 1.3; evaluation takes batches of
512, which small batches of training make dear."""
PROCESS_MIB = 1024.0
"""What a process takes of a GPU besides its tensors: CUDA's context, and what torch keeps free."""
SECONDS = 1.0
"""For which each number of runs is measured, once all have begun."""
PATIENCE_SECONDS = 120.0
"""For all measurements of a sweep together."""
SETTINGS = 8
"""Networks and shapes of which the one that takes the most memory is looked for."""
MPS, TURNS = "MPS", "time-sliced"
"""How runs share a GPU."""
FILE = "gpu_sharing.json"
"""In the data folder: what was measured, by card and setting."""


@dataclass(frozen=True)
class Reached:
    """What so many runs reached together."""

    images_per_second: float
    step_mib: float
    """of a plain step of one run"""
    used_mib: float
    total_mib: float
    """of the whole GPU"""

    @classmethod
    def of(cls, rates: Sequence[Rate]) -> Reached:
        """From what each of them reached."""
        return cls(
            sum(each.images_per_second for each in rates),
            max(each.memory_mib for each in rates),
            rates[0].used_mib,
            rates[0].total_mib,
        )


Measure = Callable[[int], Reached]
"""Raises NotMeasured, also where so many do not fit."""


def best(measure: Measure, most: int, data_mib: float = 0.0) -> tuple[int, dict[int, Reached]]:
    """How many runs should share a GPU, and what was measured, by the number of runs.

    Twice as many are tried, at most ``most`` and what the memory holds, until that gains less than
    a tenth. ``data_mib`` are the images that each run keeps on the GPU.

    Raises:
        NotMeasured: not even one run could be measured.
    """
    found, count = {1: measure(1)}, 1
    most = min(most, fits(found[1], data_mib))
    while count < most:
        more = min(2 * count, most)
        try:
            found[more] = measure(more)
        except NotMeasured:  # its memory is full, or it takes too long
            break
        if found[more].images_per_second < GROWTH * found[count].images_per_second:
            break
        count = more
    return count, found


def fits(alone: Reached, data_mib: float) -> int:
    """Runs of any method whose memory a GPU has, by what is used while one plain step is trained.

    What other processes use of it counts as used.
    """
    rest = (SAFE - 1) * alone.step_mib + data_mib
    free = alone.total_mib - alone.used_mib - rest
    return 1 + max(0, int(free / (alone.step_mib + rest + PROCESS_MIB)))


def remembered(measure: Measure, file: Path, key: str) -> Measure:
    """The same, but what a file holds under the key is not measured again."""

    def asked(count: int) -> Reached:
        kept = _read(file).get(key, {}).get(str(count))
        with suppress(TypeError):  # of another version
            if kept is not None:
                return Reached(**kept)
        found = measure(count)
        content = _read(file)
        content[key] = {**content.get(key, {}), str(count): asdict(found)}
        with suppress(OSError):  # a data folder that is closed to us
            runs.write_text(file, runs.to_json(content) + "\n", shared=True)
        return found

    return asked


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@dataclass(frozen=True)
class Plainly:
    """Makes plain steps of a run in a process of their own."""

    run: Run
    shape: tuple[int, ...]
    """(C, H, W), or (D,) of a table"""
    classes: int
    inputs: tuple[Input, ...] = ()

    def __call__(self, device: str) -> Plain:
        """On a device."""
        torch.set_num_threads(self.run.threads)
        size = self.run.training.batch_size
        place = torch.device(device)
        made = rows_like(size, self.shape, self.classes, place, self.inputs)
        return Plain(self.run, made)


@contextmanager
def shared(
    plan: Plan,
    wanted: Sequence[Cell],
    memory_gib: float,
    workers: int | None,
    joins: bool,
    patience: float = PATIENCE_SECONDS,
) -> Iterator[Study]:
    """The study with the number of runs that share a GPU, and MPS for them where it is there.

    Nothing is measured where the study or ``workers`` says how many, or where there is no GPU here.
    ``joins``: the runs go to a cluster, which has its own MPS, and GPUs such as those here.
    ``patience``: the most seconds to measure.
    """
    study, own = plan.study, capacity.gpus()
    most = _most(plan, wanted, workers)
    _, gpu = capacity.takes(study, own, workers)
    if not own or (most == 1 and not 0 < gpu < 1):
        yield study
        return
    with ExitStack() as stack:
        under, variables = TURNS, {}
        if not joins:
            try:
                variables = stack.enter_context(mps.started())
            except mps.NoMPS as reason:
                under = f"{TURNS}: {reason}"
            else:
                under = "under MPS" if variables else "under the MPS already running here"
                stack.enter_context(_environment(variables))
        if most == 1:
            say(f"Runs that share a GPU are {under}.")
        else:
            say(
                "Measuring how many runs should share a GPU; this takes "
                f"{patience:.0f} seconds at most ..."
            )
            until = time.monotonic() + patience
            count = _measured(plan, wanted, memory_gib, most, under, variables, until)
            if count == 1:
                stack.close()
            resources = Resources(cpus=study.resources.cpus, trials_per_gpu=count)
            study = replace(study, resources=resources)
        yield study


def known(
    plan: Plan, wanted: Sequence[Cell], memory_gib: float, workers: int | None
) -> tuple[int, float] | None:
    """How many runs would share a GPU by what was measured before, and how many times the images of
    one run they train together; None: it is yet to be measured, or not to be.
    """
    most = _most(plan, wanted, workers)

    def measure(make: Plainly, count: int) -> Reached:
        raise NotMeasured("not yet")

    for how in (MPS, TURNS) if most > 1 else ():
        with suppress(NotMeasured):
            count, found = _choice(plan, wanted, memory_gib, most, how, measure)
            return count, found[count].images_per_second / found[1].images_per_second
    return None


def _most(plan: Plan, wanted: Sequence[Cell], workers: int | None) -> int:
    """Runs for which a GPU of this machine has cores, if it is to be measured how many share it."""
    own = capacity.gpus()
    timed = any("time" in block.same for block in plan.study.blocks)  # neighbours would count
    if not plan.study.resources.measured or not own or timed or workers is not None:
        return 1
    cpus, _ = capacity.takes(plan.study, own)
    cores = int(capacity.cores() / cpus + 1e-9)
    return min(math.ceil(len(wanted) / own), max(1, cores // own), mps.CLIENTS)


def _measured(
    plan: Plan,
    wanted: Sequence[Cell],
    memory_gib: float,
    most: int,
    under: str,
    variables: Mapping[str, str],
    until: float,
) -> int:
    """How many runs share a GPU, by measurements that are told; 1 where there are none."""
    together = Together("cuda", variables)

    def measure(make: Plainly, count: int) -> Reached:
        if time.monotonic() > until - SECONDS:
            raise NotMeasured(LATE)
        return Reached.of(together.rates(make, count, SECONDS, until))

    how = TURNS if under.startswith(TURNS) else MPS
    try:
        count, found = _choice(plan, wanted, memory_gib, most, how, measure)
    except NotMeasured as reason:
        say(
            f"Could not measure how many runs should share a GPU: {reason}. Each run gets its "
            "own GPU."
        )
        return 1
    finally:
        together.close()
    say(told(count, found, under))
    return count


def _choice(
    plan: Plan,
    wanted: Sequence[Cell],
    memory_gib: float,
    most: int,
    how: str,
    measure: Callable[[Plainly, int], Reached],
) -> tuple[int, dict[int, Reached]]:
    """As ``best``, for the network, shape and batch whose plain step takes the most memory.

    What was measured before, with runs that share a GPU ``how``, is not measured again.

    Raises:
        NotMeasured: of none even one run could be measured.
    """
    made: dict[Setting, Plainly] = {}
    for cell in wanted:
        source = plan.source(cell.benchmark)
        if len(made) < SETTINGS:
            setting = Setting.of(cell.run, source.shape, source.inputs)
            plainly = Plainly(cell.run, source.shape, source.classes, source.inputs)
            made.setdefault(setting, plainly)
    where = f"{_card()}, {capacity.cores()} cores, {how}"
    alone: list[tuple[float, Measure]] = []
    problem = ""
    for setting, make in made.items():
        measuring = partial(measure, make)
        if OWN not in setting.model:  # its code may change
            key = f"{where}: {', '.join(map(str, setting))}"
            measuring = remembered(measuring, plan.data_root / FILE, key)
        measuring = cache(measuring)
        try:
            alone.append((measuring(1).step_mib, measuring))
        except NotMeasured as reason:
            problem = str(reason)
    if not alone:
        raise NotMeasured(problem)
    _, heaviest = max(alone, key=itemgetter(0))
    sources = [plan.source(each) for each in {cell.benchmark for cell in wanted}]
    data = max(sum(source.counts) * math.prod(source.shape) for source in sources)
    # larger data sets stay on the CPU
    return best(heaviest, most, min(data / 2**20, 1024 * memory_gib))


def _card() -> str:
    card = torch.cuda.get_device_properties(0)
    return f"{card.name}, {card.total_memory >> 20} MiB, torch {torch.__version__}"


def told(count: int, found: Mapping[int, Reached], under: str) -> str:
    """The choice, and what it rests on."""
    rates = ", ".join(
        f"{each.images_per_second:,.0f} for {numbers.count(runs, 'run')}"
        for runs, each in found.items()
    )
    text = f"{count} runs share a GPU, {under}" if count > 1 else "Each run gets its own GPU"
    return f"{text}. Measured images/s: {rates}."


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Processes that are started within have these variables."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
