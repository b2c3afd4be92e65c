"""The training loop: ``fit`` a network under a method."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from analysis import metrics, runs
from analysis.runs import Run
from benchmarks.data.seeding import seed_global
from benchmarks.data.splits import Splits
from benchmarks.data.streams import Rows, chunks, part_of, rows_of_epoch, training_order
from benchmarks.training import models
from benchmarks.training.checkpoint import (
    State,
    cpu_copy,
    restore,
    snapshot,
    write_checkpoint,
    write_lines,
)
from benchmarks.training.checks import check_finite, check_fits
from benchmarks.training.context import TrainingContext
from benchmarks.training.errors import Interrupted, TrainingFailed
from benchmarks.training.evaluation import judge, quick_scores, selection_offered
from benchmarks.training.machine import (
    describe_device,
    installed_versions,
    peak_memory,
    reset_peak_memory,
)
from benchmarks.training.precision import tf32
from benchmarks.training.progress import Progress, Silent
from benchmarks.training.schedule import learning_rate, make_optimizer
from benchmarks.training.tasks import task_of
from methods.base import Batch, Method, Spec
from methods.branches import has_branches
from methods.functional import sent
from methods.learner import Learner, learner_of

MEMORISED = 0.1
"""Share of the select loss below which the loss on crossfit's meta rows is warned of."""
CHECK_EVERY = 50
"""Steps between two checks of the losses, because each check waits for the device."""
WRITE_SECONDS = 1.0
"""Progress is written no more often than this: of a table an epoch takes a hundredth of it."""
SAMPLES = 4
"""Rows that are kept as samples, as drawn and as trained on."""


@dataclass(frozen=True, eq=False)
class Fitted:
    """What ``fit`` returns."""

    model: nn.Module
    """the network that makes the predictions"""
    method: Method | Learner
    state: State
    result: dict[str, Any]
    predictions: dict[str, np.ndarray]
    samples: dict[str, np.ndarray]
    """of the first seed: rows of the last epoch as they were drawn and as they were trained on"""


def fit(
    run: Run,
    splits: Splits,
    method: Method | Learner,
    *,
    device: torch.device | str = "cpu",
    model: Callable[[Spec], nn.Module] | None = None,
    progress: Progress | None = None,
    folder: Path | None = None,
    checkpoint_every: int = 1,
    stop: Callable[[], bool] | None = None,
) -> Fitted:
    """Train and evaluate one network; ``model`` makes your own network from the Spec.

    With ``folder`` it resumes from the checkpoint there and writes one every
    ``checkpoint_every`` epochs. ``stop`` is called before every step; true ends the run there.

    Raises:
        NotApplicable: the method does not work on this task, data or network.
        TrainingFailed: the loss is not finite, or the method returned an invalid batch.
        Interrupted: SIGINT or SIGTERM, or ``stop`` returned true.
    """
    progress, device = progress or Silent(), torch.device(device)
    with threads(run.threads), tf32(False):
        network = _network(run, splits, method, device, model)
        _tell_settings(run, progress)
        ctx = TrainingContext.of_splits(
            network,
            make_optimizer(network, run.training),
            task_of(splits.kind),
            splits,
            epochs=run.training.epochs,
            seed=run.seed,
            training=run.training,
        )
        learner = learner_of(method, run.training.ema).to(device)
        reset_peak_memory(device)
        with _signals() as asked:
            ends = asked if stop is None else lambda: asked() or stop()
            job = _Job(run, splits, method, learner, ctx, progress, folder, checkpoint_every, ends)
            state, samples = _train(job)
        predictor = learner.predictor(ctx)
        result, predictions = judge(run, splits, predictor, state, method)
        ctx.counter.close()
        result["resumed"] = state.resumed
        result["device"] = describe_device(device)
        named = models.packages(run.model) if model is None else {}
        result["versions"] = installed_versions() | named
        result["auxiliary_norm"] = has_branches(network)
        result["network_needs"] = sorted(models.NEEDS & method.requires())
        result["parameters"] = sum(parameter.numel() for parameter in network.parameters())
    return Fitted(predictor, method, state, result, predictions, samples)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Sets torch's number of threads for the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _network(
    run: Run,
    splits: Splits,
    method: Method | Learner,
    device: torch.device,
    model: Callable[[Spec], nn.Module] | None,
) -> nn.Module:
    """The network, initialised from the run's seed, on the training device."""
    seed_global(device, run.seed, "init")
    if model is None:
        made = models.build(run.model, splits.spec, method.requires())
    else:
        made = models.fitted(model(splits.spec), method.requires())
    network = made.to(device)
    check_fits(run.method, method, splits, network, run.model)
    if run.training.channels_last:
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


def _tell_settings(run: Run, progress: Progress) -> None:
    training = run.training
    for name, on in (
        (training.precision, training.precision != "float32"),
        ("torch.compile", training.compile),
    ):
        if on:
            progress.note(f"{run.method}: {name} is on")


@dataclass
class _Pace:
    """How fast epochs are, and when their progress was written."""

    begun: float = 0.0
    written: float = -math.inf
    short: bool = False
    """whether the last epoch was, so that a run which is asked to stop ends the one it is in"""

    def begin(self) -> None:
        """An epoch begins."""
        self.begun = time.monotonic()

    def end(self) -> bool:
        """An epoch ended; whether its progress is to be written."""
        now = time.monotonic()
        self.short = now - self.begun < WRITE_SECONDS
        if now - self.written < WRITE_SECONDS:
            return False
        self.written = now
        return True


@dataclass(frozen=True, eq=False)
class _Job:
    """A run in training: its parts, its progress display and its folder."""

    run: Run
    splits: Splits
    method: Method | Learner
    """as it was given: without a learner of its own it is learned from by supervised learning"""
    learner: Learner
    ctx: TrainingContext
    progress: Progress
    folder: Path | None
    checkpoint_every: int
    stop: Callable[[], bool]
    told: list[str] = field(default_factory=list)
    """warnings that were given"""
    pace: _Pace = field(default_factory=_Pace)

    @property
    def keep(self) -> str:
        """Which rows are trained on if there are folds."""
        return "meta" if self.run.control == "meta" else "train"

    @property
    def is_last_epoch(self) -> bool:
        return self.ctx.epoch + 1 == self.run.training.epochs


@dataclass(eq=False)
class _Epoch:
    """What one epoch trains on, and the results of its steps."""

    rate: float
    order: list[Tensor]
    losses: list[Tensor] = field(default_factory=list)
    drawn: int = 0
    trained: int = 0
    samples: dict[str, np.ndarray] = field(default_factory=dict)


def _train(job: _Job) -> tuple[State, dict[str, np.ndarray]]:
    """Train the remaining epochs; return the state and the samples of the last epoch."""
    run, ctx = job.run, job.ctx
    state = _set_up(job)
    offered, _ = selection_offered(job.splits, job.method)
    epochs, steps = run.training.epochs, run.training.steps_per_epoch
    pool = steps * run.training.batch_size or job.splits.pool
    selecting = metrics.selecting(job.splits.kind)
    unit = "rows" if job.splits.inputs else "img"
    job.progress.begin(f"{run.method} seed {run.seed}", epochs, state.epoch, pool, selecting, unit)
    held: dict[str, Any] | None = None
    samples: dict[str, np.ndarray] = {}
    for number in range(state.epoch, epochs):
        job.pace.begin()
        epoch = _begin_epoch(job, number)
        try:
            _take_steps(job, epoch)
        except Interrupted:  # the run ends where the last epoch ended
            if job.folder is not None and held is not None:
                write_checkpoint(job.folder, held)
            raise
        samples = epoch.samples
        if job.is_last_epoch:
            with ctx.charged("finish"):
                job.learner.finish(ctx)
        _record(job, state, epoch, offered)
        job.progress.epoch(state.epoch, json.loads(state.metric_lines[-1]))
        due = job.pace.end()
        stops = job.pace.short and state.epoch < epochs and job.stop()
        if due or stops or job.is_last_epoch:
            held = _kept(job, state, stops)
        if stops:
            raise Interrupted(f"stopped after epoch {state.epoch}")
    return state, samples


def _set_up(job: _Job) -> State:
    """Set up the method, and restore the progress of the run."""
    run, learner, ctx = job.run, job.learner, job.ctx
    with ctx.charged("setup"):
        learner.setup(ctx)
    for network in learner.networks():
        ctx.counter.watch(network)
    state = restore(job.folder, ctx, learner, job.progress, f"{run.row}, seed {run.seed}")
    if state.resumed:  # setup was timed and logged when the run began
        ctx.forget()
    if state.resumed and job.folder is not None:  # they show its progress if it stops again
        write_lines(job.folder, state)
    return state


def _begin_epoch(job: _Job, number: int) -> _Epoch:
    """All that comes before the first step: the rate, the order of rows, the method's own phase."""
    run, splits, ctx = job.run, job.splits, job.ctx
    rows, folds, batch_size = len(splits.train), splits.folds, run.training.batch_size
    asked = run.training.steps_per_epoch
    steps = asked or len(chunks(splits.pool, batch_size))
    ctx.epoch, ctx.step = number, number * steps
    rate = learning_rate(run.training, number)
    for optimizer in (ctx.optimizer, *job.learner.optimizers()):
        for group in optimizer.param_groups:
            group["lr"] = rate
    order = training_order(
        rows, folds, batch_size, steps, number, run.seed, job.keep, full=asked > 0
    )
    if folds:  # fold e mod K is meta in epoch e
        fold = folds[number % len(folds)]
        ctx.hold_out(fold, rows_of_epoch(fold, rows, job.keep))
    ctx.model.train()
    with ctx.charged("begin_epoch"):
        job.learner.begin_epoch(ctx)
    return _Epoch(rate, order)


def _take_steps(job: _Job, epoch: _Epoch) -> None:
    """Every step of an epoch.

    Raises:
        Interrupted: the run was asked to stop.
    """
    ctx, rows = job.ctx, job.splits.train
    shown = job.is_last_epoch and job.run.seed == 0
    steps = len(epoch.order)
    with closing(rows.ahead(epoch.order)) as inputs:
        for place, index in enumerate(epoch.order):
            if not job.pace.short and job.stop():
                raise Interrupted(
                    f"stopped in epoch {ctx.epoch + 1}; finished epochs kept: {ctx.epoch}"
                )
            loss, out = train_step(job.learner, ctx, rows, index, next(inputs))
            epoch.losses.append(loss)
            epoch.drawn += len(index)
            epoch.trained += len(out)
            if shown and place == 0:
                epoch.samples = _samples(rows, job.learner, out)
            del out  # its logits hold the graph of the step
            ctx.step += 1
            if (place + 1) % CHECK_EVERY == 0 or place + 1 == steps:
                since = place // CHECK_EVERY * CHECK_EVERY
                last = check_finite(epoch.losses[since:], ctx.epoch, since, epoch.rate)
                done = sum(len(each) for each in epoch.order[since : place + 1])
                job.progress.advance(done, last)


def _kept(job: _Job, state: State, now: bool = False) -> dict[str, Any] | None:
    """Write the progress; return the snapshot if its checkpoint is not yet due, nor wanted now."""
    if job.folder is None:
        return None
    write_lines(job.folder, state)
    if state.epoch == job.run.training.epochs:
        return None
    due = now or state.epoch % job.checkpoint_every == 0
    content = snapshot(state, job.ctx, job.learner, clone=not due)
    if not due:
        return content
    write_checkpoint(job.folder, content)
    return None


def train_step(
    learner: Learner, ctx: TrainingContext, rows: Rows, index: Tensor, x: Tensor | None = None
) -> tuple[Tensor, Batch]:
    """One training step; its loss on the device, and the batch that was trained on.

    ``x``: the inputs of these rows, where they were read ahead.
    """
    ctx.clock.switch("data")
    index = ctx.drawn = sent(index, rows.y.device)
    x = rows.inputs(index) if x is None else x
    w = torch.full((len(index),), 1 / len(index), device=rows.y.device)
    ctx.enter("step")
    return learner.step(Batch(x=x, y=rows.y[index], w=w, index=index), ctx)


def _samples(rows: Rows, learner: Learner, batch: Batch) -> dict[str, np.ndarray]:
    """The first rows of a batch, as they were drawn and as trained on: uint8 images (n, H, W, C),
    or vectors (n, D).

    If rows were added, the added ones and those that they were made from.
    """
    if isinstance(batch.x, tuple):
        return {}
    added = learner.added()
    if added is not None and len(added.x):
        drawn, made = added.origin[:SAMPLES], added.x[:SAMPLES]
    else:
        ours = (batch.index >= 0) & (batch.index < len(rows))  # behind them are others
        known = ours.nonzero()[:SAMPLES, 0]
        drawn, made = rows.inputs(batch.index[known]), batch.x[known]
    return {"drawn": _pixels(drawn), "trained": _pixels(made)} if len(made) else {}


def _pixels(x: Tensor) -> np.ndarray:
    if x.dim() != 4:
        return x.detach().float().cpu().numpy()
    levels = (255 * x.detach().float().clamp(0, 1)).round().to(torch.uint8)
    return levels.permute(0, 2, 3, 1).cpu().numpy()


def _record(job: _Job, state: State, epoch: _Epoch, offered: bool) -> None:
    """Evaluate the network after an epoch and add the results to the state."""
    ctx = job.ctx
    forward, backward = ctx.counter.take()
    seconds = ctx.clock.take()
    charged = sum(seconds.values())
    start = time.perf_counter()
    scores = _scores(job, epoch)
    _tell_memorised(job, scores)
    state.epoch += 1
    line = {
        "epoch": state.epoch,
        "learning_rate": epoch.rate,
        "train_loss": float(torch.stack(epoch.losses).double().mean()),
        **scores,
        "rows": {
            "drawn": epoch.drawn,
            "trained": epoch.trained,
            "forward": forward,
            "backward": backward,
        },
        "log": ctx.take_log(),
    }
    state.metric_lines.append(runs.to_json(line))
    if job.run.training.compile and state.epoch == 1:
        _tell_compiled(job, 2 * epoch.trained, forward + backward)
    timing = {
        "epoch": state.epoch,
        "charged_seconds": charged,
        "phases": seconds,
        "images_per_second": epoch.drawn / charged if charged else math.nan,
        "evaluation_seconds": time.perf_counter() - start,
        "memory_mib": peak_memory(ctx.device),
    }
    state.timing_lines.append(runs.to_json(timing))
    score = scores["select"][metrics.selecting(job.splits.kind)[0]]
    if offered and score > state.best_score:
        state.best_score, state.best_epoch = score, state.epoch
        state.best_model = cpu_copy(job.learner.predictor(ctx).state_dict())


def _tell_memorised(job: _Job, scores: dict[str, dict[str, float]]) -> None:
    """Warn once if crossfit's meta rows, which are trained on in other epochs, are memorised."""
    loss, unseen = (scores.get(name, {}).get("nll", math.nan) for name in ("meta", "select"))
    if loss < MEMORISED * unseen and not job.told:
        job.told.append("memorised")
        job.progress.note(
            f"{job.run.method}: crossfit: after epoch {job.ctx.epoch + 1} the loss on meta rows is "
            f"{loss:.2g}, on select {unseen:.2g}: the network has memorised the meta rows, so the "
            "gradient from which the method learns has faded"
        )


def _tell_compiled(job: _Job, compiled: int, passes: int) -> None:
    """Note the share of an epoch's passes that are compiled, if not all of them are."""
    if compiled < passes:
        job.progress.note(
            f"{job.run.method}: {compiled / passes:.0%} of the passes through the network are "
            "compiled; the others are the method's own"
        )


def _scores(job: _Job, epoch: _Epoch) -> dict[str, dict[str, float]]:
    """Quick scores by split; their passes are not counted.

    Raises:
        TrainingFailed: the network's logits are not finite.
    """
    ctx, splits = job.ctx, job.splits
    judged = {"select": splits.select}
    if job.run.oracle_test:
        judged["test"] = splits.test
    if splits.folds and splits.meta is not None:
        judged["meta"] = part_of(splits.train, splits.folds[ctx.epoch % len(splits.folds)])
    ctx.counter.counting = False
    try:
        scores = {
            split: quick_scores(job.learner.predictor(ctx), rows, splits.kind)
            for split, rows in judged.items()
        }
    except TrainingFailed as error:
        raise TrainingFailed(
            f"{error}, after epoch {ctx.epoch + 1}, learning rate {epoch.rate:g}"
        ) from error
    ctx.counter.counting = True
    return scores


@contextmanager
def _signals() -> Iterator[Callable[[], bool]]:
    """SIGINT and SIGTERM ask the loop to stop; a second one stops at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    handlers = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    before = {each: known for each, known in handlers.items() if known is not signal.SIG_IGN}

    def ask(number: int, frame: object) -> None:
        asked.set()
        for each, handler in before.items():
            signal.signal(each, handler)

    for each in before:
        signal.signal(each, ask)
    try:
        yield asked.is_set
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
