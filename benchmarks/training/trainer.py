"""The one loop that trains: ``fit`` a network under a method."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from analysis import runs
from analysis.runs import Run
from benchmarks.data.seeding import seed_global
from benchmarks.data.splits import NotApplicable, Splits
from benchmarks.data.streams import Rows, chunks, rows_of_epoch, training_order
from benchmarks.training import models
from benchmarks.training.checkpoint import (
    State,
    cpu_copy,
    restore,
    snapshot,
    write_checkpoint,
    write_lines,
)
from benchmarks.training.context import TrainingContext
from benchmarks.training.errors import Interrupted, TrainingFailed
from benchmarks.training.evaluation import judge, quick_scores, selection_offered
from benchmarks.training.machine import (
    describe_device,
    installed_versions,
    peak_memory,
    reset_peak_memory,
)
from benchmarks.training.progress import Progress, Silent
from benchmarks.training.schedule import learning_rate, make_optimizer
from benchmarks.training.tasks import task_of
from methods.base import Batch, Method, Model, Spec
from methods.branches import has_branches

CHECK_EVERY = 50
"""Steps between two looks at the losses: each look waits for the device."""
SAMPLES = 4
"""Rows of which it is kept what they were trained on as."""


@dataclass(frozen=True, eq=False)
class Fitted:
    """What ``fit`` hands back."""

    model: nn.Module
    method: Method
    state: State
    result: dict[str, Any]
    predictions: dict[str, np.ndarray]
    samples: dict[str, np.ndarray]
    """of the first seed: rows of the last epoch as they were drawn and as they were trained on"""


def fit(
    run: Run,
    splits: Splits,
    method: Method,
    *,
    device: torch.device | str = "cpu",
    model: Callable[[Spec], nn.Module] | None = None,
    progress: Progress | None = None,
    folder: Path | None = None,
    checkpoint_every: int = 1,
    stop: Callable[[], bool] | None = None,
) -> Fitted:
    """Train one network and judge it; ``model`` makes a network of one's own from the Spec.

    With ``folder`` it goes on from the checkpoint there and writes one every
    ``checkpoint_every`` epochs. ``stop`` is asked before every step whether to end here.

    Raises:
        NotApplicable: the method does not work on this task, data or network.
        TrainingFailed: the loss is not finite, or the method handed back a wrong batch.
        Interrupted: SIGINT or SIGTERM, or ``stop`` said so.
    """
    progress, device = progress or Silent(), torch.device(device)
    threads = torch.get_num_threads()
    torch.set_num_threads(run.threads)
    try:
        return _fit(run, splits, method, device, model, progress, folder, checkpoint_every, stop)
    finally:
        torch.set_num_threads(threads)


def _fit(
    run: Run,
    splits: Splits,
    method: Method,
    device: torch.device,
    model: Callable[[Spec], nn.Module] | None,
    progress: Progress,
    folder: Path | None,
    checkpoint_every: int,
    stop: Callable[[], bool] | None,
) -> Fitted:
    training, task, spec = run.training, task_of(splits.kind), splits.spec
    seed_global(device, run.seed, "init")
    made = model(spec) if model is not None else models.build(run.model, spec, method.requires())
    network = made.to(device)
    check_fits(run.method, method, splits, network, run.model)
    if training.channels_last:
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for name, on in (
        ("bfloat16 autocast", training.precision == "bfloat16"),
        ("channels_last", training.channels_last),
        ("torch.compile", training.compile),
    ):
        if on:
            progress.note(f"{run.method}: {name} is on")
    optimizer = make_optimizer(network, training)
    ctx = TrainingContext.of_splits(
        network,
        optimizer,
        task,
        splits,
        epochs=training.epochs,
        seed=run.seed,
        training=training,
    )
    method.to(device)
    reset_peak_memory(device)
    with _signals() as asked:
        ends = asked if stop is None else lambda: asked() or stop()
        state, samples = _loop(run, splits, method, ctx, progress, folder, checkpoint_every, ends)
    result, predictions = judge(run, splits, network, state, method)
    ctx.counter.close()
    result["resumed"] = state.resumed
    result["device"] = describe_device(device)
    result["versions"] = installed_versions()
    result["auxiliary_norm"] = has_branches(network)
    result["parameters"] = sum(parameter.numel() for parameter in network.parameters())
    return Fitted(network, method, state, result, predictions, samples)


def check_fits(
    name: str, method: Method, splits: Splits, network: nn.Module, model_name: str
) -> None:
    """Refuse a method that does not work on this task, data or network.

    Raises:
        NotApplicable: the message is the reason.
    """
    needs, spec = method.requires(), splits.spec
    if "features" in needs and not isinstance(network, Model):
        raise NotApplicable(
            f"{name} needs the stages of a methods.base.Model, {model_name} gives logits only"
        )
    if "auxiliary_norm" in needs and not has_branches(network):
        raise NotApplicable(
            f"{name} needs a second set of batch normalisation, {model_name} has none: take one of "
            "our networks that has batch normalisation, such as resnet18"
        )
    if "image" in needs and spec.kind != "image":
        raise NotApplicable(f"{name} needs images, the data are {spec.kind}s")
    reason = method.supports(task_of(splits.kind), spec)
    if reason:
        raise NotApplicable(reason)
    if len(splits.train) < 2:
        raise NotApplicable(f"{len(splits.train)} training rows; at least 2 are needed")


def _loop(
    run: Run,
    splits: Splits,
    method: Method,
    ctx: TrainingContext,
    progress: Progress,
    folder: Path | None,
    checkpoint_every: int,
    stop: Callable[[], bool],
) -> tuple[State, dict[str, np.ndarray]]:
    training, epochs, folds = run.training, run.training.epochs, splits.folds
    keep = "meta" if run.control == "meta" else "train"
    steps = len(chunks(splits.pool, training.batch_size))
    ctx.enter("setup")
    ctx.clock.switch("outer")
    method.setup(ctx)
    ctx.clock.switch("")
    state = restore(folder, ctx, method, progress, f"{run.row}, seed {run.seed}")
    if state.resumed:  # what setup cost and told was counted when the run began
        ctx.forget()
    if state.resumed and folder is not None:  # these tell how far it is, also if it stops again
        write_lines(folder, state)
    offered, _ = selection_offered(splits, method)
    progress.begin(f"{run.method} seed {run.seed}", epochs, state.epoch, splits.pool)
    held: dict[str, Any] | None = None
    samples: dict[str, np.ndarray] = {}
    for epoch in range(state.epoch, epochs):
        ctx.epoch, ctx.step = epoch, epoch * steps
        rate = learning_rate(training, epoch)
        for group in ctx.optimizer.param_groups:
            group["lr"] = rate
        order = training_order(
            len(splits.train), folds, training.batch_size, steps, epoch, run.seed, keep
        )
        if folds:  # fold e mod K is meta in epoch e
            fold = folds[epoch % len(folds)]
            ctx.hold_out(fold, rows_of_epoch(fold, len(splits.train), keep))
        ctx.model.train()
        ctx.enter("begin_epoch")
        ctx.clock.switch("outer")
        method.begin_epoch(ctx)
        ctx.clock.switch("")
        losses: list[Tensor] = []
        drawn = trained = 0
        for place, index in enumerate(order):
            if stop():
                _leave(folder, state, held, epoch)
            loss, out = _step(method, ctx, splits.train, index, run.method)
            losses.append(loss)
            drawn, trained = drawn + len(index), trained + len(out.x)
            if epoch + 1 == epochs and place == 0 and run.seed == 0 and ctx.spec.kind == "image":
                samples = _samples(splits.train, method, out)
            del out  # its logits hold the graph of the step
            ctx.step += 1
            if (place + 1) % CHECK_EVERY == 0 or place + 1 == steps:
                since = place // CHECK_EVERY * CHECK_EVERY
                last = _check_finite(losses[since:], epoch, since, rate)
                progress.advance(sum(len(each) for each in order[since : place + 1]), last)
        if epoch + 1 == epochs:
            ctx.enter("finish")
            ctx.clock.switch("outer")
            method.finish(ctx)
            ctx.clock.switch("")
        _end_epoch(run, splits, ctx, state, losses, drawn, trained, rate, offered)
        progress.epoch(state.epoch, json.loads(state.metric_lines[-1]))
        if folder is not None:
            write_lines(folder, state)
        if folder is not None and state.epoch < epochs:
            due = state.epoch % checkpoint_every == 0
            held = snapshot(state, ctx, method, clone=not due)
            if due:
                write_checkpoint(folder, held)
                held = None
    return state, samples


def _step(
    method: Method, ctx: TrainingContext, rows: Rows, index: Tensor, name: str
) -> tuple[Tensor, Batch]:
    """One training step; its loss on the device, and the batch that was trained on."""
    ctx.clock.switch("data")
    index = index.to(rows.y.device)
    x = rows.inputs(index)
    w = torch.full((len(index),), 1 / len(index), device=x.device)
    batch = Batch(x=x, y=rows.y[index], w=w, index=index)
    ctx.clock.switch("augment")
    ctx.enter("augment")
    out = method.augment(batch, ctx)
    check_batch(out, ctx.spec, name)
    logits = ctx.forward(out.x) if out.logits is None else out.logits
    ctx.clock.switch("forward")
    losses = method.losses(logits, out, ctx)
    if losses.shape != out.w.shape:
        raise TrainingFailed(
            f"{name}: losses returned shape {tuple(losses.shape)}, expected {tuple(out.w.shape)}"
        )
    loss = out.w @ losses
    ctx.clock.switch("backward")
    ctx.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    ctx.optimizer.step()
    ctx.clock.switch("")
    return loss.detach(), out


def _samples(rows: Rows, method: Method, batch: Batch) -> dict[str, np.ndarray]:
    """The first rows of a batch, uint8 (n, H, W, C), as they were drawn and as trained on.

    Of a method that adds rows, the added ones beside those that they were made from.
    """
    added = method.added()
    if added is not None and len(added.x):
        drawn, made = added.origin[:SAMPLES], added.x[:SAMPLES]
    else:
        known = (batch.index >= 0).nonzero()[:SAMPLES, 0]
        drawn, made = rows.inputs(batch.index[known]), batch.x[known]
    return {"drawn": _pixels(drawn), "trained": _pixels(made)} if len(made) else {}


def _pixels(x: Tensor) -> np.ndarray:
    levels = (255 * x.detach().float().clamp(0, 1)).round().to(torch.uint8)
    return levels.permute(0, 2, 3, 1).cpu().numpy()


def check_batch(batch: Batch, spec: Spec, name: str) -> None:
    """Refuse a batch whose parts do not fit together.

    Raises:
        TrainingFailed: names the method, the part, its shape and the shape that was expected.
    """
    if not isinstance(batch, Batch):
        raise TrainingFailed(
            f"{name}: augment returned {type(batch).__name__}, expected a methods.base.Batch"
        )
    rows = len(batch.x)
    expected = {
        "x": (rows, *spec.shape),
        "y": (rows, spec.classes),
        "w": (rows,),
        "index": (rows,),
        "logits": (rows, spec.classes),
    }
    for part, shape in expected.items():
        tensor = getattr(batch, part)
        if tensor is not None and tuple(tensor.shape) != shape:
            raise TrainingFailed(
                f"{name}: augment returned {part} of shape {tuple(tensor.shape)}, expected {shape}"
            )


def _check_finite(losses: list[Tensor], epoch: int, since: int, rate: float) -> float:
    """The last of these losses.

    Raises:
        TrainingFailed: one of them is nan or infinite.
    """
    values = torch.stack(losses)
    finite = torch.isfinite(values)
    if not bool(finite.all()):
        first = int((~finite).nonzero()[0])
        raise TrainingFailed(
            f"loss is {float(values[first])} at epoch {epoch + 1}, step {since + first + 1}, "
            f"learning rate {rate:g}"
        )
    return float(values[-1])


def _end_epoch(
    run: Run,
    splits: Splits,
    ctx: TrainingContext,
    state: State,
    losses: list[Tensor],
    drawn: int,
    trained: int,
    rate: float,
    offered: bool,
) -> None:
    forward, backward = ctx.counter.take()
    seconds = ctx.clock.take()
    charged = sum(seconds.values())
    start = time.perf_counter()
    ctx.counter.counting = False
    try:
        scores = {"select": quick_scores(ctx.model, splits.select, splits.kind)}
        if run.oracle_test:
            scores["test"] = quick_scores(ctx.model, splits.test, splits.kind)
    except TrainingFailed as error:
        raise TrainingFailed(
            f"{error}, after epoch {state.epoch + 1}, learning rate {rate:g}"
        ) from error
    ctx.counter.counting = True
    state.epoch += 1
    line = {
        "epoch": state.epoch,
        "learning_rate": rate,
        "train_loss": float(torch.stack(losses).double().mean()),
        **scores,
        "rows": {"drawn": drawn, "trained": trained, "forward": forward, "backward": backward},
        "log": ctx.take_log(),
    }
    state.metric_lines.append(runs.to_json(line))
    state.timing_lines.append(
        runs.to_json(
            {
                "epoch": state.epoch,
                "charged_seconds": charged,
                "phases": seconds,
                "images_per_second": drawn / charged if charged else math.nan,
                "evaluation_seconds": time.perf_counter() - start,
                "memory_mib": peak_memory(ctx.device),
            }
        )
    )
    auc = scores["select"]["auc"]
    if offered and auc > state.best_auc:
        state.best_auc, state.best_epoch = auc, state.epoch
        state.best_model = cpu_copy(ctx.model.state_dict())


def _leave(
    folder: Path | None,
    state: State,
    held: dict[str, Any] | None,
    epoch: int,
) -> None:
    """End the run where the last epoch ended."""
    if folder is not None and held is not None:
        write_checkpoint(folder, held)
    raise Interrupted(f"stopped in epoch {epoch + 1}; {state.epoch} finished before are kept")


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
