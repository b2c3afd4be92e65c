"""A check of the user's own code on images of the benchmark, before its first run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import median

import numpy as np
import torch

import methods
from analysis.runs import Run
from benchmarks import contract
from benchmarks.contract import Case, Skipped
from benchmarks.data.dataset import Arrays
from benchmarks.data.download import DataError
from benchmarks.data.names import Benchmark
from benchmarks.data.preparing import prepared
from benchmarks.data.seeding import generator, seed_global
from benchmarks.data.splits import Splits, arrays_of
from benchmarks.data.streams import Rows, targets_of, tensor_of
from benchmarks.running.disk import Options
from benchmarks.studies.cells import Cell
from benchmarks.studies.ledger import Ledger
from benchmarks.training import models
from benchmarks.training.context import TrainingContext
from benchmarks.training.errors import TrainingFailed
from benchmarks.training.progress import say
from benchmarks.training.schedule import make_optimizer
from benchmarks.training.tasks import task_of
from benchmarks.training.trainer import threads, train_step
from methods import own
from methods.base import Method, overrides
from methods.learner import learner_of
from methods.naming import NamingError
from methods.wrap import Wrap

ROWS = 384
"""Training rows that are looked at, of which a third are meta rows."""
TIMED_STEPS, LONG_SECONDS = 5, 2.0
"""Steps that are timed after a first one; none follows one that takes longer."""
CPU_BATCH = 32
"""Rows of a timed step on the CPU, where time grows as the rows do."""


def look(
    wanted: Sequence[Cell], ledger: Ledger, options: Options, device: str, fetch: bool = True
) -> None:
    """Check each method of the user's own on each benchmark and network without finished runs.

    What was found and how long it takes is said. Without ``fetch`` a data set that is not on this
    machine is left to the machines that have it.

    Raises:
        NamingError: one cannot be used; the message says why.
        DataError: the data cannot be had.
    """
    found: dict[tuple[str, Benchmark, str], Run] = {}
    done = set()
    for cell in wanted:
        for name in (
            methods.own_parts(cell.run.method) if methods.own_names(cell.run.method) else ()
        ):
            key = name, replace(cell.benchmark, noise=0, imbalance=1, meta_noise=0), cell.run.model
            found.setdefault(key, cell.run)
            if ledger.status(cell).state == "done":
                done.add(key)
    for key, run in found.items():
        if key in done:
            continue
        name, benchmark, _ = key
        try:
            arrays = arrays_of(
                benchmark, options.data_root, options.allow_unverified, options.memory_gib, fetch
            )
        except DataError:
            if fetch:
                raise
            continue
        remarks = check(name, arrays, benchmark, run.model)
        if remarks is not None:
            remarks.append(_cost(name, arrays, benchmark, run, torch.device(device)))
            say(f"{name} on {run.benchmark}: {'; '.join(remarks)}")


def check(name: str, arrays: Arrays, benchmark: Benchmark, model: str) -> list[str] | None:
    """What is to be said of a method, tried on training rows; None where it does not apply.

    Raises:
        NamingError: it breaks the contract, or raises; the message says how.
    """
    needs_meta = "meta" in methods.build(name).requires()
    made = _rows(arrays, benchmark, needs_meta, torch.device("cpu"))
    case = Case(made.train.channels, made.kind)  # of the rows only their kind of task is read

    def bench() -> contract.Bench:
        return contract.set_up(methods.build(name), made, model, case)

    try:
        one, other, third = bench(), bench(), bench()
        before = {name: each.detach().clone() for name, each in one.method.named_parameters()}
        for each in (contract.shapes, contract.ranges, contract.mutation):
            each(third)
        contract.repeats(one, other)
        contract.pass_state(one.method, other.method)
    except Skipped:  # the run says so, and why
        return None
    except (AssertionError, TrainingFailed, NamingError) as error:
        text = str(error).removeprefix("the method: ")
        raise NamingError(f"method {name!r}: {text}") from error
    except (Exception, SystemExit) as error:  # code of the user's own may fail in any way
        raise NamingError(f"method {name!r}: {own.said(error)}") from error
    remarks = [
        text for part in one.method.parts() if isinstance(part, Wrap) for text in part.remarks
    ]
    after = dict(one.method.named_parameters())
    still = [name for name, each in before.items() if torch.equal(each, after[name])]
    if still and not overrides(one.method, "begin_epoch"):
        remarks.append(
            f"nothing updated {', '.join(still)} in a trial: a method updates its own parameters "
            "(docs/extending.md)"
        )
    return remarks


def _rows(arrays: Arrays, benchmark: Benchmark, needs_meta: bool, device: torch.device) -> Splits:
    """Some training rows of a benchmark, drawn at random, as splits of their own."""
    order = torch.randperm(len(arrays.train_y), generator=generator("first look")).numpy()
    chosen, inputs = np.sort(order[:ROWS]), ()
    if arrays.table is not None:
        arrays, inputs = prepared(arrays, np.arange(len(arrays.train_y)), benchmark.scale)
    images = tensor_of(np.asarray(arrays.train_x[chosen]), device)
    targets = targets_of(arrays.train_y[chosen], len(arrays.classes)).to(device)
    channels = 3 if benchmark.as_rgb else images.shape[1]

    def rows(start: int, end: int) -> Rows:
        where = torch.arange(start, end, device=device)
        return Rows(images, where, targets[start:end], channels)

    cut = len(chosen) - len(chosen) // 3
    held = rows(cut, len(chosen))
    return Splits(
        train=rows(0, cut),
        meta=held if needs_meta else None,
        select=held,
        test=held,
        kind=arrays.kind,
        classes=arrays.classes,
        pool=cut,
        inputs=inputs,
    )


def _cost(name: str, arrays: Arrays, benchmark: Benchmark, run: Run, device: torch.device) -> str:
    """How much longer a training step takes under a method than without."""
    size = run.training.batch_size if device.type != "cpu" else CPU_BATCH
    needs_meta = "meta" in methods.build(name).requires()
    made = _rows(arrays, benchmark, needs_meta, device)
    with threads(run.threads):
        plain, ours = _seconds([methods.build("none"), methods.build(name)], made, run, size)
    rows = min(size, len(made.train))
    what = "images" if arrays.table is None else "rows"
    return (
        f"a step of {rows} {what} takes {1000 * ours:.3g} ms, a plain one {1000 * plain:.3g}: "
        f"{ours / plain:.2g} times the cost"
    )


def _seconds(rivals: Sequence[Method], made: Splits, run: Run, size: int) -> list[float]:
    """What is charged for a training step under each method; their steps alternate."""
    contexts = [context_of(method, made, run) for method in rivals]
    learners = [learner_of(method) for method in rivals]
    index = torch.arange(min(size, len(made.train)))
    found: list[list[float]] = []
    for _ in range(1 + TIMED_STEPS):  # the first is left out where there are others
        found.append([])
        for learner, ctx in zip(learners, contexts, strict=True):
            train_step(learner, ctx, made.train, index)
            ctx.step += 1
            found[-1].append(sum(ctx.clock.take().values()))
        if sum(found[-1]) > LONG_SECONDS:
            break
    return [median(each) for each in zip(*(found[1:] or found), strict=True)]


def context_of(method: Method, made: Splits, run: Run) -> TrainingContext:
    """A method set up in front of a network of the run, ready for a step."""
    device, training = made.train.y.device, replace(run.training, compile=False)
    seed_global(device, run.seed, "init")
    network = models.build(run.model, made.spec, method.requires()).to(device)
    ctx = TrainingContext.of_splits(
        network,
        make_optimizer(network, training),
        task_of(made.kind),
        made,
        epochs=training.epochs,
        seed=run.seed,
        training=training,
    )
    method.to(device)
    network.train()
    ctx.enter("setup")
    method.setup(ctx)
    ctx.enter("begin_epoch")
    method.begin_epoch(ctx)
    ctx.clock.take()
    return ctx
