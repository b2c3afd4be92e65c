"""The one loop that trains: ``fit`` a network under a method."""

from __future__ import annotations

import copy
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from analysis import metrics, runs
from analysis.runs import Run, Training
from benchmarks.data.seeding import seed_global
from benchmarks.data.splits import (
    NotApplicable,
    Rows,
    Splits,
    chunks,
    rows_of_epoch,
    training_order,
)
from benchmarks.training import models
from benchmarks.training.context import TrainingContext
from benchmarks.training.machine import (
    describe_device,
    installed_versions,
    peak_memory,
    reset_peak_memory,
)
from benchmarks.training.progress import Progress, Silent
from benchmarks.training.tasks import task_of
from methods.base import Batch, Method, Model, Spec, overrides
from methods.branches import has_branches

CHECK_EVERY = 50
"""Steps between two looks at the losses: each look waits for the device."""
EVALUATION_BATCH = 512
MIN_SELECT_ROWS, MIN_SELECT_CLASS = 200, 30
SAMPLES = 4
"""Rows of which it is kept what they were trained on as."""


class TrainingFailed(RuntimeError):
    """A run that cannot go on; the message is the reason in result.json."""


class Interrupted(RuntimeError):
    """The run was told to end, by SIGINT, SIGTERM or its caller; its checkpoint is on disk."""


@dataclass
class State:
    """What a run has reached at the end of an epoch; with the modules, all that resuming needs."""

    epoch: int = 0
    metric_lines: list[str] = field(default_factory=list)
    timing_lines: list[str] = field(default_factory=list)
    best_auc: float = -math.inf
    best_epoch: int = 0
    best_model: dict[str, Tensor] | None = None
    resumed: int = 0


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


def write_lines(folder: Path, state: State) -> None:
    """Write metrics.jsonl and timing.jsonl as far as the run has come."""
    for name, lines in (
        ("metrics.jsonl", state.metric_lines),
        ("timing.jsonl", state.timing_lines),
    ):
        runs.write_text(folder / name, "".join(f"{line}\n" for line in lines))


def first_line(error: BaseException) -> str:
    """An error on one line: its kind, and the first line of its text."""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


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
    result, predictions = _judge(run, splits, network, state, method)
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
    state = _restore(folder, ctx, method, progress, f"{run.row}, seed {run.seed}")
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
            held = _snapshot(state, ctx, method, clone=not due)
            if due:
                _write_checkpoint(folder, held)
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
        scores = {"select": _quick(ctx.model, splits.select, splits.kind)}
        if run.oracle_test:
            scores["test"] = _quick(ctx.model, splits.test, splits.kind)
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
        state.best_model = _cpu_copy(ctx.model.state_dict())


def _quick(model: nn.Module, rows: Rows, kind: str) -> dict[str, float]:
    return metrics.quick(logits_of(model, rows), labels_of(rows, kind), kind)


def selection_offered(splits: Splits, method: Method) -> tuple[bool, str]:
    """Whether the best epoch by select AUC is offered as a secondary result, else why not."""
    labels = labels_of(splits.select, splits.kind)
    if labels.ndim == 1:
        rarest = int(np.bincount(labels, minlength=len(splits.classes)).min())
    else:
        rarest = int(labels.sum(axis=0).min())
    if splits.select_trained:
        return False, "rows of the select split trained something"
    if len(labels) < MIN_SELECT_ROWS or rarest < MIN_SELECT_CLASS:
        return False, (
            f"the select split has {len(labels)} rows, {rarest} of its rarest class; "
            f"{MIN_SELECT_ROWS} and {MIN_SELECT_CLASS} are needed"
        )
    if overrides(method, "finish"):
        return False, "the method changes the network after the last epoch"
    return True, ""


def _judge(
    run: Run, splits: Splits, network: nn.Module, state: State, method: Method
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Metrics and logits of the last and, where it is offered, of the selected epoch."""
    offered, reason = selection_offered(splits, method)
    predictions = {
        "select_targets": labels_of(splits.select, splits.kind),
        "test_targets": labels_of(splits.test, splits.kind),
    }
    if splits.test_groups is not None:
        predictions["test_groups"] = splits.test_groups
    scores: dict[str, Any] = {}
    whens: list[tuple[str, dict[str, Tensor] | None]] = [("last", None)]
    if offered and state.best_model is not None:
        whens.append(("selected", state.best_model))
    for when, weights in whens:
        judged = network
        if weights is not None:
            judged = copy.deepcopy(network)
            judged.load_state_dict(weights)
        scores[when] = {}
        for split, rows in (("select", splits.select), ("test", splits.test)):
            logits = logits_of(judged, rows)
            predictions[f"{split}_{when}_logits"] = logits
            targets = predictions[f"{split}_targets"]
            scores[when][split] = metrics.evaluate(logits, targets, splits.kind)
    lines = [json.loads(line) for line in state.metric_lines]
    timing = [json.loads(line) for line in state.timing_lines]
    result = {
        "metrics": scores,
        "selection": {
            "offered": offered,
            "reason": reason,
            "epoch": state.best_epoch if offered else None,
            "rule": "best select AUC, ties to the earliest epoch",
        },
        "cost": _cost(lines, timing),
    }
    if run.oracle_test:
        best = max(lines, key=lambda line: line["test"]["accuracy"] or -math.inf)
        result["oracle_test"] = {"epoch": best["epoch"], **best["test"]}
    return result, predictions


def _cost(lines: list[dict[str, Any]], timing: list[dict[str, Any]]) -> dict[str, Any]:
    total = {
        name: sum(line["rows"][name] for line in lines)
        for name in ("drawn", "trained", "forward", "backward")
    }
    phases: dict[str, float] = {}
    for line in timing:
        for name, seconds in line["phases"].items():
            phases[name] = phases.get(name, 0.0) + seconds
    return {
        "epochs": len(lines),
        "charged_seconds": sum(phases.values()),
        "phases": phases,
        "seconds_per_epoch": float(np.median([line["charged_seconds"] for line in timing])),
        "rows": total,
        "passes_per_row": (total["forward"] + total["backward"]) / max(1, total["drawn"]),
        "trained_per_drawn": total["trained"] / max(1, total["drawn"]),
        "evaluation_seconds": sum(line["evaluation_seconds"] for line in timing),
        "memory_mib": max(line["memory_mib"] for line in timing),
    }


def labels_of(rows: Rows, kind: str) -> np.ndarray:
    """int64 (N,) classes, or uint8 (N, K) for MultiLabel."""
    if kind == "multi-label":
        return rows.y.cpu().numpy().astype(np.uint8)
    return rows.y.argmax(dim=1).cpu().numpy()


def logits_of(model: nn.Module, rows: Rows) -> np.ndarray:
    """float32 logits (N, K) in eval mode and float32; the mode of the network is restored.

    Raises:
        TrainingFailed: the logits are not finite.
    """
    training, parts = model.training, []
    model.eval()
    with torch.no_grad():
        for start in range(0, len(rows), EVALUATION_BATCH):
            end = min(start + EVALUATION_BATCH, len(rows))
            index = torch.arange(start, end, device=rows.y.device)
            parts.append(model(rows.inputs(index)).float().cpu())
    model.train(training)
    logits = torch.cat(parts)
    if not bool(torch.isfinite(logits).all()):
        bad = int((~torch.isfinite(logits).all(dim=1)).sum())
        raise TrainingFailed(f"the network's logits are not finite for {bad} of {len(logits)} rows")
    return logits.numpy()


def make_optimizer(model: nn.Module, training: Training) -> Optimizer:
    """The optimiser that ``training`` names, over all parameters."""
    rate, decay = training.learning_rate, training.weight_decay
    if training.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), lr=rate, weight_decay=decay)
    if training.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay)
    momentum = training.momentum
    return torch.optim.SGD(
        model.parameters(), lr=rate, weight_decay=decay, momentum=momentum, nesterov=momentum > 0
    )


def learning_rate(training: Training, epoch: int) -> float:
    """The rate of an epoch, counted from 0.

    ``multistep`` falls by ``gamma`` at each milestone; ``cosine`` falls to a thousandth; with a
    warm-up the rate first rises in a line from a tenth to what the schedule then has.
    """
    if epoch < training.warmup_epochs:
        goal = _scheduled(training, training.warmup_epochs)
        start = training.learning_rate / 10
        return start + (goal - start) * epoch / training.warmup_epochs
    return _scheduled(training, epoch)


def _scheduled(training: Training, epoch: int) -> float:
    rate, epochs = training.learning_rate, training.epochs
    if training.schedule == "multistep":
        passed = sum(epoch >= milestone * epochs for milestone in training.milestones)
        return rate * training.gamma**passed
    if training.schedule == "cosine":
        floor = rate / 1000
        return floor + (rate - floor) * (1 + math.cos(math.pi * epoch / epochs)) / 2
    return rate


def _snapshot(state: State, ctx: TrainingContext, method: Method, clone: bool) -> dict[str, Any]:
    """All that resuming needs; ``clone`` where training goes on before it is written."""
    content = {
        "state": {name: getattr(state, name) for name in runs.field_names(State)},
        "model": ctx.model.state_dict(),
        "optimizer": ctx.optimizer.state_dict(),
        "method": method.state_dict(),
    }
    return copy.deepcopy(content) if clone else content


def _write_checkpoint(folder: Path, content: dict[str, Any]) -> None:
    runs.write_atomically(folder / "checkpoint.pt", lambda file: torch.save(content, file))


def _restore(
    folder: Path | None, ctx: TrainingContext, method: Method, progress: Progress, name: str
) -> State:
    """The state in the checkpoint, or a new one; a checkpoint that was cut short is dropped."""
    path = folder / "checkpoint.pt" if folder is not None else None
    if path is None or not path.exists():
        return State()
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise runs.StorageError(error.errno, error.strerror, str(path)) from error
    except Exception as error:  # torch raises many kinds for a damaged file
        progress.note(f"{path} cannot be read ({first_line(error)}); the run starts again")
        return State()
    state = State(**content["state"])
    ctx.model.load_state_dict(content["model"])
    ctx.optimizer.load_state_dict(content["optimizer"])
    method.load_state_dict(content["method"])
    state.resumed += 1
    progress.note(f"{name}: going on after epoch {state.epoch} of {ctx.epochs}")
    return state


def _leave(
    folder: Path | None,
    state: State,
    held: dict[str, Any] | None,
    epoch: int,
) -> None:
    """End the run where the last epoch ended."""
    if folder is not None and held is not None:
        _write_checkpoint(folder, held)
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


def _cpu_copy(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in weights.items()}
