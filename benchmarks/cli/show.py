"""Figures of what a method does to images or rows of a table: draws, extreme weights, policies."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path
from typing import Literal, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import methods
from analysis.report.plots import (
    Band,
    Card,
    Shelf,
    augmentation_grid,
    heatmaps,
    sample_bands,
    shelves,
)
from analysis.runs import Run, Training
from analysis.tasks import task_named
from benchmarks.cli import arguments, inside
from benchmarks.cli.arguments import UsageError
from benchmarks.cli.cards import Cards
from benchmarks.cli.common import FIGURES, root_of
from benchmarks.data.elsewhere import rows_from, with_rows
from benchmarks.data.names import Benchmark, canonical, parse_benchmark
from benchmarks.data.seeding import generator, seed_global
from benchmarks.data.splits import NotApplicable, Protocol, Splits, arrays_of, make_splits, refitted
from benchmarks.data.streams import chunks, rows_from_tensors
from benchmarks.running import firstlook
from benchmarks.running.codes import FAILURE, INTERRUPTED
from benchmarks.training import errors, models, progress
from benchmarks.training.checks import check_batch, check_fits
from benchmarks.training.context import TrainingContext
from benchmarks.training.evaluation import strata_of
from benchmarks.training.progress import Progress, Silent
from benchmarks.training.schedule import make_optimizer
from benchmarks.training.tasks import task_of
from benchmarks.training.trainer import fit
from methods import own
from methods.base import ANYTHING, Batch, Context, Method
from methods.learner import Learner

DRAWS, DRAWS_OF_ROWS = 8, 3
"""of an image, and of a row of a table"""
POOL = 512
"""Number of augmented rows (at most one epoch) from which the extremes are drawn."""
SAME_WEIGHT, SAME_LABEL = 1e-3, 5e-3
"""Changes of a weight or target that are too small for a caption."""


@own.kept()
def carry_out(command: arguments.ShowCommand) -> int:
    """Draw the figure; return the exit code."""
    for name, least in (("rows", 1), ("draws", 1), ("epochs", 0), ("seed", 0)):
        given = getattr(command, name)
        if given is not None and given < least:
            raise UsageError(f"{name}: expected {least} or more, got {given}")
    if command.by in ("cam", "embedding") and not command.epochs:
        raise UsageError(
            f"epochs: expected 1 or more by {command.by}, which needs a trained network"
        )
    if command.out.suffix not in FIGURES:
        raise UsageError(f"out: expected a name in .png, .pdf or .svg, got {command.out}")
    if not command.out.parent.is_dir():  # before anything is trained
        raise UsageError(f"out: expected a name in a folder that exists, got {command.out}")
    try:
        show(
            parse_benchmark(command.benchmark),
            methods.canonical(command.method),
            models.canonical(command.model),
            root_of(command.data),
            command.out,
            rows=command.rows,
            draws=command.draws,
            seed=command.seed,
            epochs=command.epochs,
            by=command.by,
            progress=progress.for_terminal(),
        )
    except NotApplicable as reason:
        raise UsageError(f"method: {command.method} cannot be shown here: {reason}") from reason
    except errors.TrainingFailed as reason:
        print(f"augbench: {reason}", file=sys.stderr)
        return FAILURE
    except errors.Interrupted:  # unlike a run, it has no checkpoint
        print("\naugbench: stopped during training; nothing was saved", file=sys.stderr)
        return INTERRUPTED
    print(command.out)
    return 0


def show(
    benchmark: Benchmark,
    method_name: str,
    model_name: str,
    root: Path,
    path: Path,
    *,
    rows: int = 6,
    draws: int | None = None,
    seed: int = 0,
    epochs: int = 0,
    by: Literal["rows", "weight", "class", "cam", "embedding"] = "rows",
    progress: Progress | None = None,
) -> None:
    """Write the figure, by ``rows``, ``weight``, ``class``, ``cam`` or ``embedding``.

    ``rows``: a column of originals and ``draws`` draws of each, with captions of what was done; of
    a table, the cells of some rows that each draw changed. If the method adds rows, each added row
    once, next to its original, with their difference and the network's prediction for both.
    ``weight``: from a pool of augmented rows, ``draws`` rows with
    the highest and the lowest weight, and those whose label changed most. ``class``: the learned
    probability and magnitude of each operation, averaged over the training rows of each class.
    ``cam``: heat maps of the network on rows of the select split. ``embedding``: its features. The
    network first trains under the method for ``epochs`` epochs, as in a run; the first three show
    the next epoch. Without ``draws`` they are 8, of a table 3.

    Raises:
        NotApplicable: the method does not work on these data, changes no row, changes no weight or
        label (by weight), learns nothing about operations (by class), or adds no row yet.
        TrainingFailed: the network could not be trained.
        Interrupted: SIGINT or SIGTERM while it trained.
    """
    device = torch.device("cpu")
    method = methods.build(method_name)
    if isinstance(method, Learner):
        if not method.trains_network:
            raise NotApplicable("it trains no network and changes no row, so nothing can be drawn")
        raise NotApplicable("it takes the training steps itself; only methods can be drawn")
    needs_meta = "meta" in method.requires()
    arrays = arrays_of(benchmark, root)
    for part in methods.own_parts(method_name):
        firstlook.check(part, arrays, benchmark, model_name)
    splits = make_splits(
        arrays, benchmark, Protocol(), needs_meta=needs_meta, seed=seed, device=device
    )
    splits = with_rows(splits, rows_from(method, benchmark.name), root, benchmark)
    cards = Cards(refitted(arrays, benchmark, seed)) if arrays.table is not None else None
    if draws is None:
        draws = DRAWS if cards is None else DRAWS_OF_ROWS
    if by in ("cam", "embedding"):
        inside.check(by, models.build(model_name, splits.spec), splits)
    training = Training(epochs=max(1, epochs))
    task = task_of(splits.kind)
    if epochs:
        run = Run(
            benchmark=canonical(benchmark),
            data=arrays.checksum,
            model=model_name,
            method=method_name,
            training=training,
            seed=seed,
        )
        network, optimizer = _trained(run, splits, method, progress or Silent())
    else:
        seed_global(device, seed, "init")
        network = models.build(model_name, splits.spec, method.requires())
        check_fits(method_name, method, splits, network, model_name)
        optimizer = make_optimizer(network, training)
    shown = canonical(benchmark)
    if by in ("cam", "embedding"):
        title = f"{method_name} on {shown}, {model_name} after {epochs} epochs, seed {seed}"
        short = [_short(name) for name in splits.classes]
        if by == "embedding":
            inside.draw_embedding(network, splits, method.learned(), short, seed, title, path)
            return
        strata = strata_of(splits.select, splits)
        inside.draw_cam(network, splits, _in_turn(strata, rows, seed), short, title, path)
        return
    ctx = TrainingContext.of_splits(network, optimizer, task, splits, epochs=epochs + 1, seed=seed)
    if not epochs:
        ctx.enter("setup")
        method.setup(ctx)
    steps = training.steps_per_epoch or len(chunks(splits.pool, training.batch_size))
    ctx.epoch, ctx.step = epochs, epochs * steps
    network.train()
    ctx.enter("begin_epoch")
    method.begin_epoch(ctx)

    state = f"network after {epochs} epoch{'s' if epochs > 1 else ''}, " if epochs else ""
    if by == "rows":
        title = f"{method_name} on {shown}, training rows, {state}seed {seed}"
        if method.added() is not None:
            _draw_added(method, ctx, splits, rows, training.batch_size, seed, title, path, cards)
        elif cards is not None:
            _draw_changes(method, ctx, splits, cards, rows, draws, seed, title, path)
        else:
            _draw_rows(method, ctx, splits, rows, draws, seed, title, path)
        return
    if by == "class":
        state = state or "before the first epoch, "
        _draw_policy(method, splits, f"{method_name} on {shown}, {state}seed {seed}", path)
        return
    pool = _pool(method, ctx, method_name, training.batch_size)
    bands, note = _bands(pool, draws, splits.classes, splits.kind)
    state = state or "network as initialised, "
    title = (
        f"{method_name} on {shown}: {len(pool.x)} augmented training rows, {state}seed {seed}{note}"
    )
    if cards is None:
        sample_bands([_of_images(band, pool) for band in bands], title, [path])
    else:
        shelves([_of_cells(band, pool, ctx, cards) for band in bands], title, path)


class _Watched(Method):
    """Wraps an upstream; keeps the run's optimiser and the first batch of each step."""

    kinds = ANYTHING
    optimizer: Optimizer
    given: Batch | None = None

    def setup(self, ctx: Context) -> None:
        """Keep the optimiser: a method may read its state."""
        super().setup(ctx)
        self.optimizer = ctx.optimizer

    def augment(self, batch: Batch, ctx: Context) -> Batch:
        """The upstream's batch."""
        out = cast("Method", self.upstream).augment(batch, ctx)
        if self.given is None:
            self.given = replace(out, logits=None)
        return out


def _trained(
    run: Run, splits: Splits, method: Method, progress: Progress
) -> tuple[nn.Module, Optimizer]:
    """Train a run; return the network and its optimiser. ``method`` learns with them."""
    watched = _Watched(method)
    try:
        return fit(run, splits, watched, progress=progress).model, watched.optimizer
    finally:
        progress.end()


def _draw_rows(
    method: Method,
    ctx: TrainingContext,
    splits: Splits,
    rows: int,
    draws: int,
    seed: int,
    title: str,
    path: Path,
) -> None:
    """Write the grid of some rows and ``draws`` draws of each."""
    index = _of_each_class(splits, rows, seed)
    batch = ctx.train.rows(index)
    drawn, captions = [], []
    for _ in range(draws):
        ctx.enter("augment")
        out = method.augment(batch, ctx)
        drawn.append(_images(out.x[: len(index)]))
        captions.append(_captions(batch, out, method.captions(), splits.classes))
        ctx.step += 1
    labels = [_named(y, splits.classes) for y in batch.y]
    told = [list(texts) for texts in zip(*captions, strict=True)]
    augmentation_grid(_images(batch.x), np.stack(drawn, axis=1), labels, told, title, path)


def _draw_changes(
    method: Method,
    ctx: TrainingContext,
    splits: Splits,
    cards: Cards,
    rows: int,
    draws: int,
    seed: int,
    title: str,
    path: Path,
) -> None:
    """Draw the cells of some rows of a table that each of ``draws`` draws changed.

    The rows are the first of a whole batch, so that a method that mixes rows has others to mix.
    """
    batch = ctx.train.rows(_of_each_class(splits, max(rows, ctx.batch_size), seed))
    drawn: list[list[Card]] = []
    for _ in range(draws):
        ctx.enter("augment")
        out = method.augment(batch, ctx)
        own = out.index[:rows].clamp_min(0)  # a method may draw other rows
        told = _changes(batch, out, method.captions(), splits.classes, "label ")[:rows]
        for parts, new, old in zip(told, own.tolist(), batch.index.tolist(), strict=False):
            if new != old:
                parts.insert(0, f"row {new} instead")
        drawn.append(cards.of(ctx.train.rows(own).x, out.x[:rows], told))
        ctx.step += 1
    shelves(
        [
            Shelf(f"row {row}: {_named(y, splits.classes)}", [each[place] for each in drawn])
            for place, (row, y) in enumerate(
                zip(batch.index[:rows].tolist(), batch.y, strict=False)
            )
        ],
        title,
        path,
    )


def _draw_policy(method: Method, splits: Splits, title: str, path: Path) -> None:
    """Draw what was learned about each operation, class by class.

    Raises:
        NotApplicable: it learned nothing about operations.
    """
    learned = method.learned()
    names = next((part.operations for part in method.parts() if part.operations), ())
    found = [name for name in ("probability", "magnitude") if name in learned]
    if not found:
        raise NotApplicable(
            "by class: it learns no probability or magnitude of operations; --by rows draws the "
            f"augmented {'rows' if splits.inputs else 'images'}"
        )
    labels = strata_of(splits.train, splits)
    groups = [("all rows", np.arange(len(labels)))]
    if len(learned[found[0]]) == len(labels):
        members = [(name, np.flatnonzero(labels == k)) for k, name in enumerate(splits.classes)]
        groups = [(_short(name), rows) for name, rows in members if len(rows)]
    tables = [
        (f"{name}, mean", np.stack([_mean_of(learned[name], rows) for _, rows in groups]))
        for name in found
    ]
    heatmaps(
        tables,
        [f"{name} ({len(rows)})" for name, rows in groups],
        [name.replace("_", " ") for name in names],
        "training label (rows)" if len(groups) > 1 else "",
        title,
        path,
    )


def _mean_of(values: Tensor, rows: np.ndarray) -> np.ndarray:
    """(P,) mean over those rows; over all if the rows share one policy."""
    kept = values if len(values) == 1 else values[torch.from_numpy(rows)]
    return kept.detach().cpu().numpy().mean(axis=0)


def _draw_added(
    method: Method,
    ctx: TrainingContext,
    splits: Splits,
    rows: int,
    batch_size: int,
    seed: int,
    title: str,
    path: Path,
    cards: Cards | None,
) -> None:
    """Draw the rows that the method adds to a training batch, next to their originals.

    Raises:
        NotApplicable: it adds none.
    """
    ctx.enter("show")
    batch = next(ctx.train.batches(batch_size))
    ctx.enter("augment")
    method.augment(batch, ctx)
    added = method.added()
    if added is None or not len(added.x):
        raise NotApplicable(
            f"it adds no row in epoch {ctx.epoch + 1}: give --epochs its warm-up, or set warmup=0 "
            "(and ratio above 0)"
        )
    chosen = _in_turn(strata_of(rows_from_tensors(added.x, added.y), splits), rows, seed)
    origin, x, y = (each[chosen].detach() for each in added)
    with ctx.uncharged(), torch.no_grad():
        ctx.model.eval()
        told = [ctx.task.labels(ctx.model(each), 1.0) for each in (origin, x)]
    before, after = ([_likeliest(p, splits.classes) for p in each] for each in told)
    change = x - origin
    title = f"{title}; predictions in eval mode"
    if cards is not None:
        if not change.any():
            raise NotApplicable(
                "the rows that it adds differ in the embeddings of their categories, which are no "
                "cells that could be drawn"
            )
        told = [
            [
                f"label: {_named(each, splits.classes)}",
                f"predicted {one}",
                f"\u2192 {two}",
                f"norm {float(n):.2f} (scaled)",
            ]
            for each, one, two, n in zip(y, before, after, change.norm(dim=1), strict=True)
        ]
        made = cards.of(origin, x, told)
        shown = [
            Shelf("", made[start : start + DRAWS_OF_ROWS])
            for start in range(0, len(made), DRAWS_OF_ROWS)
        ]
        shelves(shown, title, path)
        return
    scale = 0.5 / max(float(change.abs().max()), 1e-6)
    drawn = np.stack([_images(x), _images((0.5 + scale * change).clamp(0, 1))], axis=1)
    norms = change.flatten(1).norm(dim=1)
    names = [_named(each, splits.classes) for each in y]
    augmentation_grid(
        _images(origin),
        drawn,
        [f"{name}\npredicted {said}" for name, said in zip(names, before, strict=True)],
        [
            [f"predicted {said}", f"norm {float(n):.2f}"]
            for said, n in zip(after, norms, strict=True)
        ],
        title,
        path,
        columns=("augmented", f"difference x {scale:.3g}"),
    )


def _likeliest(p: Tensor, classes: tuple[str, ...]) -> str:
    """The most probable class and its probability."""
    return f"{_short(classes[int(p.argmax())])}: {float(p.max()):.3f}"


@dataclass(frozen=True, eq=False)
class _Pool:
    """Augmented rows, with their targets and weights before and after the method."""

    x: Tensor
    """(n, *S)"""
    before: Tensor
    """(n, K) targets after the augmentation"""
    after: Tensor
    """(n, K) targets after the method"""
    factor: Tensor
    """(n,) weight after the method, relative to that after the augmentation"""
    captions: list[str]
    """n strings: what was done to each image"""
    index: Tensor
    """(n,) rows of the training split, -1 for others"""

    @property
    def moved(self) -> Tensor:
        """(n,) half the sum of what each target changed by: the total variation distance."""
        return (self.after - self.before).abs().sum(dim=1) / 2


def _pool(method: Method, ctx: TrainingContext, name: str, batch_size: int) -> _Pool:
    """Augmented rows of the coming epoch's batches: ``POOL`` of them, or one pass if that is less.

    The targets and weights before the method are those that its upstream returned (mixed targets
    for mixup). The upstream's first call in a step is assumed to be on the rows that the method
    refines, which come first in its batch. A method without an upstream is compared with the rows
    as drawn. Rows that the method does not weight, that bypass the upstream (the clean rows of
    SAFLEX) or that it adds are left out.

    Raises:
        NotApplicable: the method returns other rows than its upstream did.
    """
    watched = _watch(method)
    ctx.enter("show")
    kept: list[_Pool] = []
    for batch in ctx.train.batches(batch_size):
        if watched is not None:
            watched.given = None
        ctx.enter("augment")
        out = method.augment(batch, ctx)
        check_batch(out, ctx.spec, name)
        given = _as_drawn(out, batch, ctx) if watched is None else watched.given
        count = min(part.weighted(len(batch)) for part in method.parts())
        count = min(count, 0 if given is None else len(given))
        if given is None or not torch.equal(given.index[:count], out.index[:count]):
            raise NotApplicable(f"{name} returns other rows than its upstream did")
        old, new = given.w[:count], out.w[:count].detach()
        captions = method.captions()[:count]
        kept.append(
            _Pool(
                x=out.x[:count].detach(),
                before=given.y[:count].detach(),
                after=out.y[:count].detach(),
                factor=torch.where(old > 0, new / torch.where(old > 0, old, 1.0), 1.0),
                captions=captions + [""] * (count - len(captions)),
                index=out.index[:count],
            )
        )
        ctx.step += 1
        if sum(len(each.x) for each in kept) >= POOL:
            break
    return _Pool(
        x=torch.cat([each.x for each in kept])[:POOL],
        before=torch.cat([each.before for each in kept])[:POOL],
        after=torch.cat([each.after for each in kept])[:POOL],
        factor=torch.cat([each.factor for each in kept])[:POOL],
        captions=[text for each in kept for text in each.captions][:POOL],
        index=torch.cat([each.index for each in kept])[:POOL],
    )


def _watch(method: Method) -> _Watched | None:
    """Wrap the upstream of the innermost method that has one, to record what it returns.

    So head_refit or shuffled_weights over saflex show what saflex's own upstream gave.
    """
    while method.upstream is not None and _refines(method.upstream):
        method = method.upstream
    if method.upstream is None:
        return None
    watched = _Watched(method.upstream)
    method.upstream = watched
    return watched


def _refines(method: Method) -> bool:
    """Whether its own constructor takes an upstream, as that of an augmentation does not."""
    kind = type(method)
    return kind.__init__ is not Method.__init__ and "upstream" in signature(kind).parameters


def _as_drawn(out: Batch, batch: Batch, ctx: TrainingContext) -> Batch:
    """The rows of ``out`` as the training split has them, with the weights of the drawn batch."""
    targets = ctx.train.targets
    known = (out.index >= 0) & (out.index < len(targets))
    y = torch.where(known[:, None], targets[torch.where(known, out.index, 0)], out.y)
    w = torch.full_like(out.w, float(batch.w[0]))
    return replace(out, y=y, w=w, logits=None)


class _Picked(NamedTuple):
    """Rows of a pool that have something in common."""

    heading: str
    rows: Tensor
    captions: list[str]


def _of_images(band: _Picked, pool: _Pool) -> Band:
    return Band(band.heading, _images(pool.x[band.rows]), band.captions)


def _of_cells(band: _Picked, pool: _Pool, ctx: TrainingContext, cards: Cards) -> Shelf:
    """The rows of a table, with their cells that differ from those of the training row."""
    index = pool.index[band.rows]
    x = pool.x[band.rows]
    own = torch.where(index[:, None] >= 0, ctx.train.rows(index.clamp_min(0)).x, x)
    told = [
        [f"row {row}" if row >= 0 else "a row of its own", *text.split("\n")]
        for row, text in zip(index.tolist(), band.captions, strict=True)
    ]
    return Shelf(band.heading, cards.either(own, x, told))


def _bands(
    pool: _Pool, draws: int, classes: tuple[str, ...], kind: str
) -> tuple[list[_Picked], str]:
    """The bands of the figure, and a note for the title on those that are empty.

    Raises:
        NotApplicable: there are none.
    """
    rows, factor, moved = len(pool.x), pool.factor, pool.moved
    varied = float(factor.max() - factor.min()) > SAME_WEIGHT
    changed = int((moved > SAME_LABEL).sum())
    if not varied and not changed:
        raise NotApplicable(
            f"by weight: over {rows} augmented rows all weights are equal and no label changed; "
            f"--by rows draws the augmented {'images' if pool.x.dim() == 4 else 'rows'}"
        )
    chosen, notes = [], []
    if varied:
        # Taken from both ends of one order, so that no row is in both when many weights are equal.
        order = factor.argsort(stable=True)
        count = min(draws, rows // 2)
        none = int((factor < SAME_WEIGHT).sum())
        told = f" ({none} of {rows} rows have weight 0)" if none else ""
        chosen.append(("highest weight", order.flip(0)[:count]))
        chosen.append((f"lowest weight{told}", order[:count]))
    else:
        notes.append("all weights are equal")
    if changed:
        # Hard labels all change by 1: prefer rows that are not in the bands above.
        drawn = np.isin(np.arange(rows), [int(row) for _, index in chosen for row in index])
        order = torch.from_numpy(np.lexsort((drawn, -moved.numpy().round(3))))
        heading = f"label changed most ({changed} of {rows} labels changed)"
        chosen.append((heading, order[: min(draws, changed)]))
    else:
        notes.append("no label changed")
    several = not task_named(kind).exclusive
    bands = [
        _Picked(heading, index, [_told(pool, int(row), classes, several) for row in index])
        for heading, index in chosen
    ]
    return bands, "".join(f"; {note}" for note in notes)


def _told(pool: _Pool, row: int, classes: tuple[str, ...], several: bool) -> str:
    """The label, its new value if it changed, the factor of the weight, and the warp."""
    before, after = pool.before[row], pool.after[row]
    parts = [_named(before, classes)]
    if float(pool.moved[row]) > SAME_LABEL:
        if several:  # the entry that changed most
            most = int((after - before).abs().argmax())
            shown = f"{_short(classes[most])}: {float(before[most]):.2f}"
            parts.append(f"{shown} -> {float(after[most]):.2f}")
        else:
            parts = [f"{parts[0]} -> {_named(after, classes)}"]
    parts.append(f"weight x {float(pool.factor[row]):.2f}")
    return "\n".join(filter(None, [", ".join(parts[:-1]), parts[-1], pool.captions[row]]))


def _of_each_class(splits: Splits, rows: int, seed: int) -> Tensor:
    """Rows of the training split, class by class in turn; distinct, as many as there are."""
    return _in_turn(strata_of(splits.train, splits), rows, seed)


def _in_turn(strata: np.ndarray, rows: int, seed: int) -> Tensor:
    """Positions of some rows, taken from each stratum in turn; drawn by the seed."""
    order = torch.randperm(len(strata), generator=generator(seed, "show")).numpy()
    rank = np.empty(len(strata), int)
    for stratum in np.unique(strata):
        members = order[strata[order] == stratum]
        rank[members] = np.arange(len(members))
    chosen = np.lexsort((strata, rank))[:rows]
    return torch.from_numpy(chosen)


def _images(x: Tensor) -> np.ndarray:
    return x.detach().permute(0, 2, 3, 1).cpu().numpy()


def _captions(batch: Batch, out: Batch, told: list[str], classes: tuple[str, ...]) -> list[str]:
    """What the method reports, else the change of target and weight."""
    return [", ".join(parts) for parts in _changes(batch, out, told, classes)]


def _changes(
    batch: Batch, out: Batch, told: list[str], classes: tuple[str, ...], label: str = ""
) -> list[list[str]]:
    """The same, each in parts."""
    texts = []
    for row in range(len(batch)):
        parts = [told[row]] if row < len(told) and told[row] else []
        if not torch.allclose(out.y[row], batch.y[row], atol=1e-4):
            parts.append(f"{label}{_named(out.y[row], classes)}")
        change = float(out.w[row] / batch.w[row])
        if abs(change - 1) > 1e-3:
            parts.append(f"weight x {change:.2f}")
        texts.append(parts)
    return texts


def _named(y: Tensor, classes: tuple[str, ...]) -> str:
    """The class, or the two classes with the largest shares."""
    top = y.topk(min(2, len(y)))
    pairs = [(classes[int(k)], float(v)) for v, k in zip(*top, strict=True) if float(v) > 0.005]
    if not pairs:
        return "no label"
    short = [(_short(name), share) for name, share in pairs]
    if len(short) == 1 and short[0][1] > 0.995:
        return short[0][0]
    return ", ".join(f"{name}: {share:.2f}" for name, share in short)


def _short(name: str) -> str:
    return name if len(name) < 16 else name[:14] + "…"
