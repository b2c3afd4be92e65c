"""Rows of a split as tensors: looked up, drawn by a method, and in the order of training."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from torch import Tensor

from analysis.tasks import task_named
from benchmarks.data.download import DataError
from benchmarks.data.ondisk import OnDisk, Pixels
from benchmarks.data.seeding import generator
from methods.base import Batch
from methods.functional import each_input, per_row, sent

AHEAD = 2
"""Batches that are read from disk before they are needed."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Some rows of a tensor of inputs, with their own targets."""

    x: Tensor | OnDisk | tuple[Tensor, ...]
    """(M, C, H, W) uint8 or float32, on the device; images on disk; vectors (M, D); a tuple where a
    row has several inputs"""
    where: Tensor
    """(N,) int64 rows of ``x``; on the CPU for images on disk"""
    y: Tensor
    """(N, K) float32 targets on the device."""
    channels: int
    """C, or 3 if grey images are shown as RGB; of vectors D."""
    more: Tensor | None = None
    """Images whose numbers in ``where`` follow those of ``x``."""

    def __len__(self) -> int:
        return len(self.where)

    def inputs(self, index: Tensor) -> Tensor:
        """(B, C, H, W) float32 in [0, 1] on the device, for positions ``index`` (B,)."""
        if isinstance(self.x, OnDisk):
            room = _room(self.x, len(index), self.y.device)
            return self._usable(_read(self.x, self.where[index.cpu()], room))
        if isinstance(self.x, tuple):
            return cast("Tensor", tuple(each[self.where[index]] for each in self.x))
        where = self.where[index].to(self.x.device)
        if self.more is None:
            x = self.x[where]
        else:
            rows = len(self.x)
            own = per_row(where < rows, self.x)
            x = self.x[where.clamp_max(rows - 1)]
            x = torch.where(own, x, self.more[(where - rows).clamp_min(0)])
        return self._usable(x)

    def ahead(self, order: Sequence[Tensor]) -> Generator[Tensor | None]:
        """For positions ``order``, on the CPU, one ``inputs`` after the other, of images on disk:
        the next ones are read while these are used. None for images in memory.
        """
        if not isinstance(self.x, OnDisk):
            yield from (None for _ in order)
            return
        with ThreadPoolExecutor(1) as reader:
            waiting: deque[Future[Tensor]] = deque()
            for index in order:
                # Made here: what one thread allocates and another frees piles up in the former.
                room = _room(self.x, len(index), self.y.device)
                waiting.append(reader.submit(_read, self.x, self.where[index], room))
                if len(waiting) > AHEAD:
                    yield self._usable(waiting.popleft().result())
            while waiting:
                yield self._usable(waiting.popleft().result())

    def _usable(self, x: Tensor) -> Tensor:
        """Stored values as float32 in [0, 1] on the device."""
        x = sent(x, self.y.device)
        x = x.float().div_(255) if x.dtype == torch.uint8 else x
        return x.expand(-1, self.channels, -1, -1) if x.shape[1] != self.channels else x


def _room(images: OnDisk, rows: int, device: torch.device) -> Tensor:
    """Where to read rows: in pinned memory for a GPU, so that sending them does not wait."""
    dtype = torch.from_numpy(np.empty(0, images.dtype)).dtype
    pinned = device.type == "cuda"
    return torch.empty(rows, *images.planes_shape, dtype=dtype, pin_memory=pinned)


def _read(images: OnDisk, where: Tensor, room: Tensor) -> Tensor:
    images.planes(where.numpy(), room.numpy())
    return room


def part_of(rows: Rows, index: Tensor) -> Rows:
    """The rows at the positions ``index`` (B,)."""
    index = index.to(rows.y.device)
    return replace(rows, where=rows.where[index.to(rows.where.device)], y=rows.y[index])


def tensor_of(images: np.ndarray, device: torch.device) -> Tensor:
    """(N, H, W[, C]) to (N, C, H, W), vectors (N, D) as they are; a user's own memory-mapped array
    stays where it is."""
    if images.ndim == 2:
        return torch.from_numpy(images).to(device)
    if isinstance(images, np.memmap):
        mapped = torch.from_numpy(images)
        return mapped[:, None] if mapped.dim() == 3 else mapped.permute(0, 3, 1, 2)
    shaped = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
    return torch.from_numpy(np.ascontiguousarray(shaped)).to(device)


def as_stored(images: Pixels, device: torch.device) -> Tensor | OnDisk:
    """As ``tensor_of``; images on disk stay there."""
    return images if isinstance(images, OnDisk) else tensor_of(images, device)


def shape_of(x: Tensor | OnDisk | tuple[Tensor, ...]) -> tuple[int, ...]:
    """(C, H, W) of one row; the shape of its first input if there are several."""
    if isinstance(x, OnDisk):
        return x.planes_shape
    return tuple((x[0] if isinstance(x, tuple) else x).shape[1:])


def targets_of(labels: np.ndarray, classes: int) -> Tensor:
    """(N, K) float32: labels as targets."""
    if labels.ndim == 2:
        return torch.from_numpy(labels.astype(np.float32))
    targets = torch.zeros(len(labels), classes)
    targets[torch.arange(len(labels)), torch.from_numpy(labels.astype(np.int64))] = 1
    return targets


def rows_from_tensors(x: Tensor, y: Tensor) -> Rows:
    """All rows of inputs (N, C, H, W) in [0, 1] or uint8, or others as they are, with targets
    (N, K), on one device."""
    return Rows(x, torch.arange(len(y), device=y.device), y, each_input(x)[0].shape[1])


def rows_of(images: Pixels, shape: tuple[int, ...], classes: int, device: torch.device) -> Rows:
    """Rows without labels, whose targets are 0: images (N, H, W[, C]) for a network of this shape.

    Raises:
        DataError: the images do not fit the network.
    """
    x = as_stored(images, device)
    found = shape_of(x)
    if found[1:] != shape[1:] or found[0] not in (shape[0], 1):
        raise DataError(
            f"images have the shape {found} (channels, height, width), the network "
            f"was trained on {shape}"
        )
    y = torch.zeros(len(x), classes, device=device)
    where = torch.arange(len(x), device="cpu" if isinstance(x, OnDisk) else device)
    return Rows(x, where, y, channels=shape[0])


def chunks(rows: int, size: int) -> list[tuple[int, int]]:
    """Start and end of each batch of one pass; a single left-over row joins the batch before."""
    ends = [*range(size, rows, size), rows]
    if size > 1 and len(ends) > 1 and ends[-1] - ends[-2] == 1:
        del ends[-2]
    return list(zip([0, *ends[:-1]], ends, strict=True))


class RowStream:
    """The rows of one split as a method sees them (``methods.base.Stream``).

    The k-th draw within a call is a function of (seed, name, place, k), where the place is the
    epoch, the step and the call; the loop sets it, so there is no state to save. ``Batch.index``
    counts from ``first``, or is -1 for rows that are not trained on (``in_training`` false).
    """

    def __init__(
        self,
        rows: Rows,
        seed: int,
        name: str,
        in_training: bool = True,
        kind: str = "multi-class",
        first: int = 0,
    ) -> None:
        self._rows, self._seed, self._name, self._task = rows, seed, name, task_named(kind)
        self._in_training, self._first = in_training, first
        self._place: tuple[int | str, ...] = ()
        self._draws = 0
        self._strata: Tensor | None = None
        self._active: Tensor | None = None
        self._active_on_host: Tensor | None = None

    @property
    def targets(self) -> Tensor:
        """(N, K) targets of all rows."""
        return self._rows.y

    @property
    def active(self) -> Tensor | None:
        """Positions that may be drawn, if not all may (crossfit)."""
        return self._active

    @active.setter
    def active(self, rows: Tensor | None) -> None:
        self._active = rows
        self._active_on_host = None if rows is None else rows.cpu()

    @property
    def index(self) -> Tensor:
        """(len,) rows that may be drawn in this epoch: all but those that crossfit holds out."""
        if self.active is not None:
            return self.active
        return torch.arange(len(self._rows), device=self._rows.y.device)

    def __len__(self) -> int:
        return len(self._rows) if self.active is None else len(self.active)

    def move_to(self, *place: int | str) -> None:
        """Begin another call: its draws are a function of ``place``."""
        self._place, self._draws = place, 0

    @contextmanager
    def rewound(self) -> Iterator[None]:
        """Draws inside do not affect the draws afterwards."""
        before = self._draws
        try:
            yield
        finally:
            self._draws = before

    def rows(self, index: Tensor) -> Batch:
        """The rows ``index`` (B,), each with w = 1/B; outside the training split index is -1."""
        return self._batch(index, self._rows.inputs(index))

    def _batch(self, index: Tensor, x: Tensor) -> Batch:
        w = torch.full((len(index),), 1 / max(1, len(index)), device=self._rows.y.device)
        own = index + self._first if self._first else index
        known = own if self._in_training else torch.full_like(index, -1)
        return Batch(x=x, y=self._rows.y[index], w=w, index=known)

    def draw(self, n: int, stratified: bool = False) -> Batch:
        """``n`` rows without replacement (all rows if the split has fewer)."""
        order = self._order()
        if stratified and n < len(order):
            order = self._stratified(order, n)
        return self._drawn(order[:n])

    def batches(self, n: int) -> Iterator[Batch]:
        """One shuffled pass in batches of ``n``; a single left-over row joins the one before."""
        order = self._order()
        for start, end in chunks(len(order), n):
            yield self._drawn(order[start:end])

    def _drawn(self, index: Tensor) -> Batch:
        """The rows ``index`` (B,) on the CPU, where images on disk are looked up."""
        there = sent(index, self._rows.y.device)
        if not isinstance(self._rows.x, OnDisk):
            return self.rows(there)
        return self._batch(there, self._rows.inputs(index))

    def _order(self) -> Tensor:
        """Positions on the CPU, so that drawing them does not wait for the device."""
        order = permutation(len(self), self._seed, self._name, *self._place, self._draws)
        self._draws += 1
        return order if self._active_on_host is None else self._active_on_host[order]

    def _stratified(self, order: Tensor, n: int) -> Tensor:
        """n rows of a shuffled order, still in order, with each class in its share.

        Shares are rounded by largest remainders.
        """
        if self._strata is None:
            labels = self._task.labels(self._rows.y.cpu().numpy())
            found = self._task.strata(labels, self._rows.y.shape[1])
            self._strata = torch.from_numpy(found)  # once a run
        strata = self._strata[order]
        share = torch.bincount(strata).double() * n / len(order)
        counts = share.floor().long()
        rest = torch.argsort(share - counts, descending=True, stable=True)
        counts[rest[: n - int(counts.sum())]] += 1
        taken = torch.zeros(len(order), dtype=torch.bool)
        for stratum, count in enumerate(counts.tolist()):
            taken[(strata == stratum).nonzero().flatten()[:count]] = True
        return order[taken]


def permutation(rows: int, *parts: int | str) -> Tensor:
    """(rows,) int64 on the CPU: an order that is a function of ``parts``."""
    return torch.randperm(rows, generator=generator(*parts))


def rows_of_epoch(fold: Tensor, rows: int, keep: str) -> Tensor:
    """Positions that are trained on: the fold ("meta"), or in order all others ("train")."""
    if keep == "meta":
        return fold
    others = torch.ones(rows, dtype=torch.bool, device=fold.device)
    others[fold] = False
    return others.nonzero().flatten()


def training_order(
    rows: int,
    folds: Sequence[Tensor],
    batch_size: int,
    steps: int,
    epoch: int,
    seed: int,
    keep: str,
    full: bool = False,
) -> list[Tensor]:
    """Positions in the training split of each batch of one epoch.

    Passes over the rows follow each other, each in a new order; an epoch takes the next ``steps``
    batches, wherever a pass ends. There the last batch is short, or with ``full`` filled from the
    next pass. With folds, each fold is counted separately, and ``keep`` says whether its rows
    ("meta") or all others ("train") are trained on.
    """
    fold = epoch % len(folds) if folds else 0
    active = rows_of_epoch(folds[fold].cpu(), rows, keep) if folds else torch.arange(rows)
    count = len(active)
    pieces = chunks(count, batch_size)
    first = epoch // max(1, len(folds)) * steps
    batches, orders = [], {}
    for step in range(first, first + steps):
        if full:
            start, end = step * batch_size, (step + 1) * batch_size
        else:
            number, place = divmod(step, len(pieces))
            start, end = (number * count + each for each in pieces[place])
        places = []
        for number in range(start // count, -(-end // count)):
            if number not in orders:
                orders[number] = permutation(count, seed, "order", fold, number)
            passed = number * count
            places.append(orders[number][max(0, start - passed) : end - passed])
        batches.append(active[torch.cat(places)])
    return batches
