"""The contract of every method, as checks that the author of a plug-in can run.

In your own test file::

    import pytest
    from benchmarks.contract import CASES, CHECKS, check

    @pytest.mark.parametrize("case", CASES, ids=str)
    @pytest.mark.parametrize("name", CHECKS)
    def test_contract(name, case):
        check(name, lambda: MyMethod(strength=0.3), case)
"""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from analysis.numbers import count
from analysis.runs import Run, Training
from analysis.tasks import task_named
from benchmarks.data.ondisk import OnDisk
from benchmarks.data.seeding import generator
from benchmarks.data.splits import NotApplicable, Splits
from benchmarks.data.streams import Rows, rows_from_tensors, shape_of
from benchmarks.training import models
from benchmarks.training.checks import check_batch, check_fits
from benchmarks.training.context import TrainingContext
from benchmarks.training.errors import TrainingFailed, first_line
from benchmarks.training.schedule import make_optimizer
from benchmarks.training.tasks import task_of
from benchmarks.training.trainer import Fitted, fit, train_step
from methods.base import Batch, Input, Method, Model, Part, Spec
from methods.functional import each_input, inputs_at
from methods.learner import Learner, learner_of

ROWS, META_ROWS, CLASSES, BATCH = 36, 18, 3, 8
META = torch.device("meta")
aten = torch.ops.aten


@dataclass(frozen=True)
class Case:
    """The data of a check: channels of the images or columns, kind of task, device and inputs."""

    channels: int
    kind: str = "multi-class"
    device: str = "cpu"
    inputs: Literal["image", "vector", "table", "pair"] = "image"
    """``table``: a vector of which half of the columns are categories; ``pair``: an image and a
    text"""

    def __str__(self) -> str:
        place = "" if self.device == "cpu" else f", {self.device}"
        of = "channel" if self.inputs in ("image", "pair") else "column"
        shown = "" if self.inputs == "image" else f"{self.inputs}, "
        return f"{shown}{count(self.channels, of)}, {self.kind}{place}"


CASES = (
    Case(1),
    Case(3),
    Case(1, "multi-label"),
    Case(6, inputs="vector"),
    Case(6, inputs="table"),
    Case(1, inputs="pair"),
)
LEVELS, WORDS, LENGTH = 4, 9, 5
"""Values of a category; different words, and words of a text."""


class Skipped(Exception):
    """The method does not support the case; the message says why."""


@dataclass(frozen=True)
class Bench:
    """A method that has been set up with a small network."""

    method: Method
    ctx: TrainingContext
    case: Case

    def batch(self, rows: int = BATCH, elsewhere: int = 0, step: int = 0) -> Batch:
        """Rows of the training split; the last ``elsewhere`` have index -1."""
        count = len(self.ctx.train.targets)
        index = torch.randperm(count, generator=generator("contract batch", step))[:rows]
        index = index.to(self.ctx.device)
        batch = self.ctx.train.rows(index)
        if elsewhere:
            index = index.clone()
            index[-elsewhere:] = -1
        return replace(batch, index=index)

    def augment(self, batch: Batch, epoch: int = 0, step: int = 0) -> Batch:
        """The method's batch, with random draws seeded as the trainer seeds them at this place."""
        self.ctx.epoch, self.ctx.step = epoch, step
        self.ctx.enter("augment")
        return self.method.augment(batch, self.ctx)

    def begin_epoch(self, epoch: int = 0) -> None:
        """The method's own phase, as the trainer calls it."""
        self.ctx.epoch, self.ctx.step = epoch, epoch * 100
        self.ctx.enter("begin_epoch")
        self.method.begin_epoch(self.ctx)


def splits(case: Case, meta: bool, unlabelled: bool = False, generated: bool = False) -> Splits:
    """Random images whose labels can be learned, the same at every call and on every device."""
    rng = generator("contract data", case.channels, case.kind)
    count = 2 * (ROWS + META_ROWS)
    labels = torch.arange(count) % CLASSES
    bright = torch.rand(count, case.channels, 8, 8, generator=rng) * 0.5
    bright[torch.arange(count), :, labels, :] += 0.4
    y = torch.nn.functional.one_hot(labels, CLASSES).float()
    if not task_named(case.kind).exclusive:
        y = (torch.rand(count, CLASSES, generator=rng) < 0.5).float()
    places = [0, ROWS, ROWS + META_ROWS, 2 * ROWS + META_ROWS, count]
    x, y = _inputs(case, bright, labels), y.to(case.device)
    parts = [rows_from_tensors(inputs_at(x, slice(a, b)), y[a:b]) for a, b in pairwise(places)]
    return Splits(
        train=parts[0],
        meta=parts[1] if meta else None,
        select=parts[2],
        test=parts[3],
        kind=case.kind,
        classes=tuple("abc"),
        pool=ROWS,
        inputs=_described(case),
        unlabelled=replace(parts[3], y=torch.zeros_like(parts[3].y)) if unlabelled else None,
        generated=parts[3] if generated else None,
    )


def splits_for(method: Part, case: Case) -> Splits:
    """Those with the rows that a method needs."""
    needs = method.requires()
    return splits(case, "meta" in needs, "unlabelled" in needs, "generated" in needs)


def _inputs(case: Case, bright: Tensor, labels: Tensor) -> Tensor:
    """What the rows of a case are, from images (N, C, 8, 8) in which row k tells class k."""
    device = case.device
    if case.inputs == "image":
        return bright.to(device)
    if case.inputs == "pair":
        words = (torch.arange(LENGTH) + labels[:, None]) % WORDS
        return cast("Tensor", (bright.to(device), words.to(device)))
    numbers = 2 * bright[:, :, 0].mean(dim=2) - 1 + labels[:, None] * 0.5
    if case.inputs == "table":
        coded = (labels[:, None] + torch.arange(case.channels)) % LEVELS
        numbers = torch.where(torch.tensor(_levels(case)) > 0, coded.float(), numbers)
    return numbers.to(device)


def _levels(case: Case) -> tuple[int, ...]:
    return tuple(LEVELS * (place % 2) for place in range(case.channels))


def _described(case: Case) -> tuple[Input, ...]:
    image = Input("image", (case.channels, 8, 8), 0.0, 1.0)
    if case.inputs in ("image", "pair"):
        words = Input("tokens", (LENGTH,), 0, WORDS - 1)
        return (image, words) if case.inputs == "pair" else (image,)
    levels = _levels(case) if case.inputs == "table" else ()
    return (Input("vector", (case.channels,), -math.inf, math.inf, levels),)


class PairNetwork(Model):
    """A small network for images and texts: each as a vector, side by side."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.trunk = _PairTrunk(spec.shape[0])
        self.head = nn.Linear(16, spec.classes)

    def embed(self, features: list[Tensor]) -> Tensor:
        """(B, 16)"""
        return features[-1].flatten(1)


class _PairTrunk(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.image, self.words = nn.Linear(channels * 64, 8), nn.Embedding(WORDS, 8)

    def forward(self, x: tuple[Tensor, Tensor]) -> list[Tensor]:
        image, words = x
        both = [self.image(image.flatten(1)), self.words(words).mean(dim=1)]
        return [torch.cat(both, dim=1).tanh()]


def network_for(case: Case) -> str | Callable[[Spec], nn.Module]:
    """A small network for the inputs of a case: its name, or what makes it."""
    if case.inputs == "pair":
        return PairNetwork
    return "small_cnn(width=0.25)" if case.inputs == "image" else "mlp(width=0.0625)"


def bench(make: Callable[[], Method], case: Case, *, epochs: int = 4) -> Bench:
    """A new method, set up with a new network.

    Raises:
        Skipped: the method does not support the case.
    """
    method = make()
    if isinstance(method, Learner):
        raise Skipped("it takes the steps of a run itself, and makes no batches")
    made = splits_for(method, case)
    return set_up(method, made, network_for(case), case, epochs)


def set_up(
    method: Method,
    made: Splits,
    model: str | Callable[[Spec], nn.Module],
    case: Case,
    epochs: int = 4,
    context: type[TrainingContext] = TrainingContext,
) -> Bench:
    """A method, set up on these rows with a new network.

    Raises:
        Skipped: the method does not support the data or the network.
    """
    task = task_of(made.kind)
    torch.manual_seed(0)
    device = made.train.y.device
    if isinstance(model, str):
        network, name = models.build(model, made.spec, method.requires()), model
    else:
        network, name = models.fitted(model(made.spec), method.requires()), "the network"
    network.to(device)
    method.to(device)
    try:
        check_fits("the method", method, made, network, name)
    except NotApplicable as reason:
        raise Skipped(str(reason)) from reason
    ctx = context.of_splits(
        network, make_optimizer(network, Training()), task, made, epochs=epochs, seed=0
    )
    network.train()
    ctx.enter("setup")
    method.setup(ctx)
    ready = Bench(method, ctx, case)
    ready.begin_epoch()
    return ready


def shapes(ready: Bench) -> None:
    """x, y, w and index have matching shapes, at several batch sizes."""
    for step, rows in enumerate((BATCH, 5, 2)):
        out = ready.augment(ready.batch(rows, step=step), step=step)
        check_batch(out, ready.ctx.spec, "the method")
        assert out.index.dtype == torch.int64, f"index is {out.index.dtype}, expected int64"
        known = (out.index >= -1) & (out.index < ready.ctx.spec.rows)
        assert bool(known.all()), f"index {out.index.tolist()}: expected -1 or a training row"


def ranges(ready: Bench) -> None:
    """Inputs are in [0, 1], targets valid, weights not negative, and all values finite."""
    for step in range(4):
        out = ready.augment(ready.batch(step=step), step=step)
        for name, tensor in _tensors(out).items():
            assert bool(torch.isfinite(tensor).all()), f"{name} is not finite"
        for x, of in zip(each_input(out.x), ready.ctx.spec.inputs, strict=True):
            low, high = float(x.min()), float(x.max())
            assert low >= of.low - 1e-6 and high <= of.high + 1e-6, (
                f"x is in [{low}, {high}], expected [{of.low:g}, {of.high:g}]"
            )
            _check_codes(x, of)
        assert float(out.w.min()) >= 0, f"a weight is {float(out.w.min())}, expected 0 or more"
        low, high = float(out.y.min()), float(out.y.max())
        assert low >= -1e-6 and high <= 1 + 1e-6, f"y is in [{low}, {high}], expected [0, 1]"
        if task_named(ready.case.kind).exclusive:
            error = float((out.y.sum(dim=1) - 1).abs().max())
            assert error < 1e-5, f"the sums of the rows of y differ from 1 by up to {error}"


def _tensors(batch: Batch) -> dict[str, Tensor]:
    """The tensors of a batch, without logits, by name."""
    inputs = each_input(batch.x)
    names = ["x"] if len(inputs) == 1 else [f"x[{place}]" for place in range(len(inputs))]
    given = dict(zip(names, inputs, strict=True))
    return {**given, "y": batch.y, "w": batch.w, "index": batch.index}


def _check_codes(x: Tensor, of: Input) -> None:
    for place, levels in enumerate(of.categories):
        codes = x[:, place]
        known = (codes == codes.round()) & (codes >= 0) & (codes < levels)
        assert not levels or bool(known.all()), (
            f"column {place} of x has {codes[~known].tolist()}, expected codes below {levels}"
        )


def weights(ready: Bench) -> None:
    """The drawn rows keep their total weight; only added rows add weight."""
    batch = ready.batch()
    out = ready.augment(batch)
    added = len(out.w) - len(batch.w)
    assert added >= 0, f"{-added} rows were lost"
    total = float(out.w[: len(batch.w)].sum())
    if added == 0:
        assert math.isclose(total, 1, rel_tol=1e-5), f"weights sum to {total}, expected 1"


def mutation(ready: Bench) -> None:
    """``augment`` does not change its input in place."""
    batch = ready.batch()
    before = {name: each.clone() for name, each in _tensors(batch).items()}
    ready.augment(batch)
    for name, each in _tensors(batch).items():
        assert torch.equal(each, before[name]), f"augment changed {name} of its input in place"


def model_untouched(ready: Bench) -> None:
    """``augment`` leaves parameters, requires_grad, training modes and the optimiser alone.

    Buffers may change only if the method called ``ctx.forward``, the trainer's own forward.
    """
    model, state = ready.ctx.model, ready.ctx.optimizer.state_dict()
    old = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    modes = [module.training for module in model.modules()]
    buffers = [buffer.clone() for buffer in model.buffers()]
    out = ready.augment(ready.batch())
    announced = out.logits is None or ready.method.hands(ready.ctx.spec)
    assert announced, "augment returns logits, but hands_logits is False"
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, old[name]), f"augment changed the parameter {name}"
        assert parameter.grad is None, f"augment left a gradient in {name}"
    assert flags == [parameter.requires_grad for parameter in model.parameters()], "requires_grad"
    assert modes == [module.training for module in model.modules()], (
        "augment changed a training mode"
    )
    assert str(state) == str(ready.ctx.optimizer.state_dict()), "augment stepped the optimiser"
    if out.logits is None:
        moved = [not torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True)]
        assert not any(moved), "augment changed buffers of the network outside ctx.forward"


def deterministic(make: Callable[[], Method], case: Case) -> None:
    """The same place (epoch, step) gives the same batch, whatever was drawn before."""
    repeats(bench(make, case), bench(make, case))


def repeats(one: Bench, other: Bench) -> None:
    """Two equal methods with the same setup give the same batch at the same place."""
    torch.rand(7)
    first = one.augment(one.batch(), step=1)
    torch.rand(3)
    second = other.augment(other.batch(), step=1)
    for name, each in _tensors(first).items():
        assert torch.equal(each, _tensors(second)[name]), (
            f"augment returned two different {name} for the same batch and step: draw from "
            f"torch's global generators, as torch.rand does; they are seeded before each call"
        )


def elsewhere(ready: Bench) -> None:
    """Rows with index -1 are accepted; a method with state per row passes them unchanged."""
    batch = ready.batch(elsewhere=3)
    out = ready.augment(batch)
    check_batch(out, ready.ctx.spec, "the method")
    everything = ready.augment(replace(batch, index=torch.full_like(batch.index, -1)), step=1)
    check_batch(everything, ready.ctx.spec, "the method")
    for name, each in _tensors(everything).items():
        assert bool(torch.isfinite(each).all()), f"{name} is not finite for rows from elsewhere"


def gradients(ready: Bench) -> None:
    """The step's loss is finite and gives every trained parameter a finite gradient."""
    ctx, method = ready.ctx, ready.method
    out = ready.augment(ready.batch())
    logits = ctx.forward(out.x) if out.logits is None else out.logits
    losses = method.losses(logits, out, ctx)
    assert losses.shape == out.w.shape, f"losses have shape {tuple(losses.shape)}"
    (out.w @ losses).backward()
    for name, parameter in ctx.model.named_parameters():
        if not parameter.requires_grad:  # of a frozen trunk
            continue
        assert parameter.grad is not None, f"{name} got no gradient"
        assert bool(torch.isfinite(parameter.grad).all()), f"the gradient of {name} is not finite"


def state_round_trip(make: Callable[[], Method], case: Case) -> None:
    """After construction, setup and load_state_dict, the method continues as if never stopped."""
    one = bench(make, case)
    for step in range(3):
        one.augment(one.batch(step=step), step=step)
    weights = copy.deepcopy(one.ctx.model.state_dict())
    other = bench(make, case)
    other.ctx.model.load_state_dict(weights)
    pass_state(one.method, other.method)
    for ready in (one, other):
        ready.begin_epoch(1)
    first = one.augment(one.batch(step=9), epoch=1, step=100)
    second = other.augment(other.batch(step=9), epoch=1, step=100)
    for name, each in _tensors(first).items():
        same = torch.equal(each, _tensors(second)[name])
        assert same, f"{name} differs after the state was saved and loaded"


def pass_state(one: Method, other: Method) -> None:
    """Copy one method's state to another as a checkpoint does."""
    file = io.BytesIO()
    try:
        torch.save(one.state_dict(), file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
    except Exception as error:  # pickle cannot write it, or torch refuses to read it
        raise AssertionError(
            f"its state cannot be saved in a checkpoint ({first_line(error)}): expected tensors, "
            "numbers and strings"
        ) from error
    other.load_state_dict(state)


def train(
    make: Callable[[], Method],
    case: Case,
    epochs: int = 3,
    batch_size: int = BATCH,
    **arguments: object,
) -> Fitted:
    """A short run of the real trainer.

    Raises:
        Skipped: the method does not support the case.
    """
    method = make()
    training, network = Training(epochs=epochs, batch_size=batch_size), network_for(case)
    name, maker = (network, None) if isinstance(network, str) else ("own", network)
    run = Run(benchmark="contract", data="", model=name, method="own", training=training)
    made = splits_for(method, case)
    try:
        return fit(run, made, method, device=case.device, model=maker, **arguments)  # type: ignore[arg-type]
    except NotApplicable as reason:
        raise Skipped(str(reason)) from reason


def trains(make: Callable[[], Method], case: Case) -> None:
    """A short run ends with finite losses and logits, and repeats bit for bit."""
    one, other = (train(make, case, batch_size=2 * BATCH) for _ in range(2))
    assert one.state.metric_lines == other.state.metric_lines, "two identical runs differ"
    for name, array in one.predictions.items():
        assert np.array_equal(array, other.predictions[name]), (
            f"{name} differs between two identical runs"
        )


class _OnMeta(TorchDispatchMode):
    """What a GPU does that the meta device does not: it samples, and is waited for by copies."""

    def __init__(self) -> None:
        super().__init__()
        self.copies = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Count copies to the device that do not return at once."""
        kwargs = kwargs or {}
        if func is aten._sample_dirichlet.default:  # there is none for the meta device
            return torch.empty_like(args[0])
        if func is aten._to_copy.default and args[0].is_cpu and not kwargs.get("non_blocking"):
            self.copies += kwargs.get("device", args[0].device) == META
        return func(*args, **kwargs)


class _Unread(TrainingContext):
    """A context in which diagnostics may read values: they do not raise on the meta device."""

    @contextmanager
    def uncharged(self) -> Iterator[None]:
        """What raises is left out."""
        with suppress(RuntimeError), super().uncharged():
            yield


def waits(make: Callable[[], Method], case: Case) -> None:
    """A step never waits for the device, unless the method says why in ``waits``.

    It runs on the meta device, whose tensors have no values: what would read one raises. Not seen
    is ``torch.tensor(values, device=...)``, a copy that waits too.
    """
    method = make()
    made = splits_for(method, case)
    ready = set_up(method, made, network_for(case), case, context=_Unread)
    reason = next((part.waits for part in method.parts() if part.waits), "")
    found = _on_meta(ready, made)
    assert reason or not found, (
        f"a step waits for the device ({found}): work with tensors that stay on it, or say in the "
        "attribute waits why it has to"
    )
    assert found or not reason, f"waits says {reason!r}, but no step waits for the device"


def _on_meta(ready: Bench, made: Splits) -> str:
    """Why two steps do not run on the meta device; "" where they do."""
    method, ctx = ready.method, ready.ctx
    rows = _moved(made.train)
    given = {"train": made.train, "meta": made.meta, **made.more}
    for name, stream in ctx.streams.items():
        own = given.get(name)
        if stream is not None and own is not None:
            stream.draw(1, stratified=True)  # which looks at the targets once a run
            stream._rows = _moved(own)
    ctx.device = META
    method.to(META)
    learner = learner_of(method)
    ctx.optimizer = make_optimizer(ctx.model.to(META), Training())
    for parameter in ctx.model.parameters():  # a method may read what the optimiser remembers
        parameter.grad = torch.zeros_like(parameter)
    ctx.optimizer.step()
    with _OnMeta() as seen:
        for step in range(2):
            ctx.step = step
            index = torch.arange(BATCH) + step
            try:
                train_step(learner, ctx, rows, index)
            except TrainingFailed:
                raise
            except RuntimeError as error:  # NotImplementedError is one
                return first_line(error)
    return f"{seen.copies} copies to it that are not non_blocking" if seen.copies else ""


def _moved(rows: Rows) -> Rows:
    x = rows.x
    if isinstance(x, OnDisk):
        x = torch.empty(len(x), *shape_of(x), dtype=torch.uint8)
    moved = tuple(each.to(META) for each in each_input(x))
    x = moved if isinstance(x, tuple) else moved[0]
    return replace(rows, x=x, where=rows.where.to(META), y=rows.y.to(META))


LOOKS: dict[str, Callable[[Bench], None]] = {
    each.__name__: each
    for each in (model_untouched, shapes, ranges, weights, mutation, elsewhere, gradients)
}
"""Checks that share one method; each leaves it usable for the next.

The first must see what the method's first call changes; the last leaves gradients.
"""


def looks(make: Callable[[], Method], case: Case) -> None:
    """All LOOKS, on one method that is set up once."""
    ready = bench(make, case)
    for look in LOOKS.values():
        look(ready)


def _alone(look: Callable[[Bench], None]) -> Callable[[Callable[[], Method], Case], None]:
    return lambda make, case: look(bench(make, case))


CHECKS: dict[str, Callable[[Callable[[], Method], Case], None]] = {
    **{name: _alone(look) for name, look in LOOKS.items()},
    "deterministic": deterministic,
    "state_round_trip": state_round_trip,
    "trains": trains,
    "waits": waits,
}
"""What the author of a plug-in runs; each check sets up a new method."""


def check(name: str, make: Callable[[], Method], case: Case) -> str:
    """Run one check; return the reason if the method does not support the case, else "".

    Raises:
        AssertionError: the method breaks the contract; the message says how.
    """
    try:
        CHECKS[name](make, case)
    except Skipped as reason:
        return str(reason)
    return ""
