"""What a method sees of a run, and the same for your own training loop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from analysis.runs import Training
from benchmarks.data.seeding import preserved, seed_global
from benchmarks.data.splits import Splits
from benchmarks.data.streams import Rows, RowStream, rows_from_tensors, shape_of
from benchmarks.training.charging import Clock, PassCounter
from benchmarks.training.checks import check_batch
from benchmarks.training.errors import TrainingFailed
from benchmarks.training.precision import Arithmetic, Precision
from benchmarks.training.tasks import task_of
from methods.base import Batch, Method, Spec, Task, named
from methods.functional import buffers_kept, widened


class TrainingContext:
    """``methods.base.Context``: all that a method may see of a run."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        task: Task,
        spec: Spec,
        train: RowStream,
        meta: RowStream | None,
        *,
        epochs: int,
        batch_size: int,
        seed: int,
        device: torch.device,
        precision: Precision = "float32",
        channels_last: bool = False,
        compiled: nn.Module | None = None,
        unlabelled: RowStream | None = None,
        generated: RowStream | None = None,
    ) -> None:
        self.model, self.optimizer, self.task, self.spec = model, optimizer, task, spec
        self.train, self.meta = train, meta
        self.unlabelled, self.generated = unlabelled, generated
        self.epoch, self.epochs, self.step = 0, epochs, 0
        self.batch_size = batch_size
        self.drawn: Tensor | None = None
        self.clock, self.counter = Clock(device), PassCounter(model)
        self._run = model if compiled is None else compiled
        self._seed, self.device = seed, device
        self.arithmetic = Arithmetic(precision, device)
        self._channels_last = channels_last
        self._forwarded = False
        self._sums: dict[str, tuple[float, int]] = {}

    @classmethod
    def of_splits(
        cls,
        model: nn.Module,
        optimizer: Optimizer,
        task: Task,
        splits: Splits,
        *,
        epochs: int,
        seed: int,
        training: Training | None = None,
    ) -> TrainingContext:
        """The context of a run, without select and test rows."""
        training = training or Training()
        meta, first = None, len(splits.train)
        more: dict[str, RowStream] = {}
        for name, rows in splits.more.items():
            more[name] = RowStream(rows, seed, name, True, splits.kind, first)
            first += len(rows)
        if splits.meta is not None:
            # With crossfit the meta rows of an epoch are rows of the training split.
            meta = RowStream(splits.meta, seed, "meta", bool(splits.folds), splits.kind)
        return cls(
            model,
            optimizer,
            task,
            splits.spec,
            RowStream(splits.train, seed, "train", True, splits.kind),
            meta,
            epochs=epochs,
            batch_size=training.batch_size,
            seed=seed,
            device=splits.train.y.device,
            precision=training.precision,
            channels_last=training.channels_last,
            compiled=cast("nn.Module", torch.compile(model)) if training.compile else None,
            **more,
        )

    @property
    def streams(self) -> dict[str, RowStream | None]:
        """All rows that may be drawn, by name; None where there are none."""
        return {
            "train": self.train,
            "meta": self.meta,
            "unlabelled": self.unlabelled,
            "generated": self.generated,
        }

    def enter(self, call: str) -> None:
        """Begin a call of the method: seeds generators and draws by epoch, step and call."""
        self._forwarded = False
        self._seed_global(call)
        for stream in self.streams.values():
            if stream is not None:
                stream.move_to(self.epoch, self.step, call)

    @contextmanager
    def charged(self, call: str) -> Iterator[None]:
        """A call of the method outside its steps, charged as a separate phase."""
        self.enter(call)
        self.clock.switch("outer")
        yield
        self.clock.switch("")

    def forward(self, x: Tensor) -> Tensor:
        """The training forward of this step: logits (B, K) with graph; at most once a step.

        Raises:
            RuntimeError: called a second time in a step.
        """
        if self._forwarded:
            raise RuntimeError("ctx.forward was called twice in one step; return its logits")
        self._forwarded = True
        phase = self.clock.switch("forward")
        self._seed_global("forward")
        if self._channels_last and isinstance(x, Tensor) and x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        with self.arithmetic.forward():
            logits = self._run(x)
        self.clock.switch(phase)
        return widened(logits)

    def applied(self, method: Method, batch: Batch) -> Batch:
        """The method's batch: its draws seeded, its time charged, its shapes checked."""
        self.clock.switch("augment")
        self.enter("augment")
        out = method.augment(batch, self)
        if out is not batch:
            check_batch(out, self.spec, named(method))
        return out

    def update(self, losses: Tensor, w: Tensor) -> Tensor:
        """A step of the optimiser down ``w @ losses``, both (B,); returns the loss.

        Raises:
            TrainingFailed: the losses are not one for each row.
        """
        if losses.shape != w.shape:
            raise TrainingFailed(
                f"losses returned shape {tuple(losses.shape)}, expected {tuple(w.shape)}"
            )
        self.clock.switch("forward")
        loss = w @ losses
        self.clock.switch("backward")
        self.optimizer.zero_grad(set_to_none=True)
        self.arithmetic.backward(loss)
        skipped = self.arithmetic.update(self.optimizer)
        if self.arithmetic.precision == "float16":
            self.log(steps_skipped=skipped)
        self.clock.switch("")
        return loss.detach()

    @contextmanager
    def replay(self) -> Iterator[None]:
        """Generators as ``forward`` gets them in this step, so that dropout masks are the same."""
        with preserved(self.device):
            self._seed_global("forward")
            yield

    @property
    def repeatable(self) -> bool:
        """Whether the model called under ``replay`` equals ``forward`` to rounding."""
        return self.arithmetic.is_float32 and self._run is self.model

    @contextmanager
    def uncharged(self) -> Iterator[None]:
        """Diagnostics: stops the clock, restores generators, draws, buffers and training mode."""
        phase = self.clock.switch("")
        counting, self.counter.counting = self.counter.counting, False
        modes = [(module, module.training) for module in self.model.modules()]
        try:
            with preserved(self.device), buffers_kept(self.model), ExitStack() as streams:
                for stream in self.streams.values():
                    if stream is not None:
                        streams.enter_context(stream.rewound())
                yield
        finally:
            for module, training in modes:
                module.training = training
            self.counter.counting = counting
            self.clock.switch(phase)

    def log(self, **scalars: float) -> None:
        """Values to be averaged over the epoch and written to metrics.jsonl."""
        for name, value in scalars.items():
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = (total + float(value), count + 1)

    def take_log(self) -> dict[str, float]:
        """Return the epoch's averages and clear them."""
        means = {name: total / count for name, (total, count) in sorted(self._sums.items())}
        self._sums.clear()
        return means

    def forget(self) -> None:
        """Drop what was timed, counted and logged so far."""
        self.clock.take()
        self.counter.take()
        self.take_log()

    def hold_out(self, fold: Tensor, others: Tensor) -> None:
        """Crossfit: in this epoch the meta rows are the fold, the training rows ``others``."""
        self.train.active = others
        if self.meta is not None:
            self.meta.active = fold

    def _seed_global(self, call: str) -> None:
        seed_global(self.device, self._seed, call, self.epoch, self.step)


class OwnLoop(TrainingContext):
    """A context for your own training loop; made by ``own_loop``."""

    _batches = 0

    def batch(self, x: Tensor, y: Tensor, index: Tensor | None = None) -> Batch:
        """The next step's batch: inputs (B, *S) in [0, 1], labels (B,) int or targets (B, K)."""
        self.step = self._batches
        self._batches += 1
        self.enter("augment")
        y = _as_targets(y, self.spec.classes).to(x.device)
        w = torch.full((len(x),), 1 / len(x), device=x.device)
        if index is None:
            index = torch.full((len(x),), -1, device=x.device)
        return Batch(x=x, y=y, w=w, index=index)

    def begin_epoch(self, epoch: int) -> None:
        """Set the epoch that comes next, counted from 0."""
        self.epoch, self.step = epoch, self._batches
        self.enter("begin_epoch")
        self.clock.take()  # nothing reads it here, and it would grow


def own_loop(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    classes: int,
    train: Iterable[tuple[Tensor, Tensor]],
    meta: Iterable[tuple[Tensor, Tensor]] | None = None,
    epochs: int = 1,
    seed: int = 0,
    multi_label: bool = False,
) -> OwnLoop:
    """A context for your own loop, from a model, an optimiser and loaders of (inputs, labels).

    The loaders are read once; inputs (B, C, H, W) in [0, 1], labels (B,) int or targets (B, K). The
    first batch of ``train`` gives the size of a training batch.

    Raises:
        ValueError: a loader is empty.
    """
    device = next(model.parameters()).device
    kind = "multi-label" if multi_label else "multi-class"
    rows, batch_size = _rows(train, classes, device)
    held = None if meta is None else _rows(meta, classes, device)[0]
    spec = Spec(rows=len(rows), classes=classes, shape=shape_of(rows.x))
    ctx = OwnLoop(
        model,
        optimizer,
        task_of(kind),
        spec,
        RowStream(rows, seed, "train", True, kind),
        None if held is None else RowStream(held, seed, "meta", False, kind),
        epochs=epochs,
        batch_size=batch_size,
        seed=seed,
        device=device,
    )
    ctx.enter("setup")
    return ctx


def _rows(
    loader: Iterable[tuple[Tensor, Tensor]], classes: int, device: torch.device
) -> tuple[Rows, int]:
    """All rows of a loader, and how many are in its first batch."""
    parts = [(x, _as_targets(y, classes)) for x, y in loader]
    if not parts:
        raise ValueError("the loader is empty: expected batches of (inputs, labels)")
    x = torch.cat([x for x, _ in parts]).to(device)
    y = torch.cat([y for _, y in parts]).to(device)
    return rows_from_tensors(x, y), len(parts[0][0])


def _as_targets(y: Tensor, classes: int) -> Tensor:
    if y.dim() == 1:
        return torch.nn.functional.one_hot(y.long(), classes).float()
    return y.float()
