"""How long the runs of a dry run take, from runs on disk, a probe of this machine, or the table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import methods
from analysis.numbers import count
from analysis.studyfile import StudyError
from benchmarks.running import capacity, probe, sharing
from benchmarks.running.display import duration
from benchmarks.running.executors import Where
from benchmarks.running.probe import Setting
from benchmarks.studies.cells import Cell
from benchmarks.studies.costs import SHIPPED, Costs, costs_in, method_of, shipped
from benchmarks.studies.plan import Plan, evaluated, pool_of
from benchmarks.studies.schema import Resources
from benchmarks.training.corrupted import settings_of

PASSES = 3
"""Forward passes that take as long as a plain training step."""
Left = Sequence[tuple[Cell, int]]
"""Runs, each with the number of epochs that are done."""


def worth(left: Left) -> float:
    """How many whole runs without a method would take as long, by the costs of the methods."""
    return sum(
        methods.cost(method_of(cell.run)) * (1 - done / cell.run.training.epochs)
        for cell, done in left
    )


def lines(left: Left, plan: Plan, root: Path, where: Where) -> list[str]:
    """What is printed about the time, and why this machine cannot do the runs, if so."""
    asked, refused = plan.study, ""
    _, gpu = capacity.takes(asked, gpus=0)
    at_once, gain = where.workers or max(1, int(1 / gpu if gpu else 1)), 1.0
    if where.address:
        said = f"On the cluster, as many at a time as fit; the time is for {at_once}"
    else:
        known = sharing.known(plan, [cell for cell, _ in left], asked.memory_gib, where.workers)
        if known is not None:
            shared, gain = known
            resources = Resources(cpus=asked.resources.cpus, trials_per_gpu=shared)
            asked = replace(asked, resources=resources)
        try:
            there = capacity.here(asked, where.workers)
            at_once, gpu = there.workers, there.gpu
            said = f"{at_once} at a time on this machine"
            if gpu and asked.resources.measured and not where.workers:
                said += ", or more if sharing a GPU is measured to be faster"
        except StudyError as error:
            refused = f"This machine cannot do these runs: {error}"
            said = f"The time is for {at_once} at a time on another machine"
    device = "cuda" if gpu else "cpu"
    costs = costs_in(root, "" if where.address else device)
    here = not (where.address or refused)
    seconds, sources = _seconds(left, plan, costs, device, here, gain * min(1.0, gpu or 1.0))
    told = ", ".join(f"{count(runs, 'run')} from {source}" for source, runs in sources.items())
    time = _hours(seconds / min(at_once, len(left)))
    return [*filter(None, [refused]), said, f"About {time}, estimated for {told}"]


def _hours(seconds: float) -> str:
    return duration(seconds) if seconds < 36000 else f"{seconds / 3600:,.0f} h"


def _seconds(
    left: Left, plan: Plan, costs: Costs, device: str, here: bool, share: float
) -> tuple[float, Counter[str]]:
    """Seconds for all these runs, one after the other, and how many runs have which source.

    Each has its ``share`` of the speed that a run has alone on a GPU.
    """
    measured = [costs.of(cell.run, done) for cell, done in left]
    wanted = {}
    for (cell, _), known in zip(left, measured, strict=True):
        if known is None:
            source = plan.source(cell.benchmark)
            setting = Setting.of(cell.run, source.shape, source.inputs)
            wanted.setdefault(setting, (cell.run, source.classes))
    probed = probe.seconds(wanted, device) if here else {}
    total, sources = 0.0, Counter[str]()
    for (cell, done), known in zip(left, measured, strict=True):
        corrupted = costs.corrupted(cell.run) if cell.corruptions else 0.0
        total += corrupted or 0.0
        if known is not None:
            total += known
            sources["the results folder"] += 1
            continue
        run, source = cell.run, plan.source(cell.benchmark)
        each = probed.get(Setting.of(run, source.shape, source.inputs))
        if each is None:
            each = shipped(run.model, source.spec, device) / run.threads
            sources[f"the shipped table ({SHIPPED[device].where})"] += 1
        else:
            sources["a probe of this machine"] += 1
        epochs = run.training.epochs - done
        steps = run.training.steps_per_epoch * run.training.batch_size
        pool = steps or pool_of(cell.benchmark, source)
        trained = pool * epochs * methods.cost(run.method)
        select, test = evaluated(cell.benchmark, source)
        if corrupted is None:
            _, listed = settings_of(cell.corruptions, cell.benchmark)
            test *= 1 + sum(map(len, listed.values()))
        total += each * (trained + (select * epochs + test) / PASSES) / share
    return total, sources
