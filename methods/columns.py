"""Augmentations of the rows of a table: cells of another row, with and without its label."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from methods.base import Batch, Context, Method
from methods.functional import beta

TABLES = frozenset({"vector", "categories", "labels"})


class CellSwap(Method):
    """Replace each cell with probability ``p`` by that of another row; labels stay.

    The other row is the same for all cells of a row: rows are paired by a permutation of the batch.

    Source: the CutMix of Somepalli et al., SAINT, section 4; p is .1 in its authors' code.
    """

    kinds = TABLES
    source = "Somepalli et al., SAINT, NeurIPS 2022 workshop, arXiv:2106.01342"
    space: ClassVar[Mapping[str, Any]] = {"p": ("uniform", 0.05, 0.5)}

    def __init__(self, *, p: float = 0.1) -> None:
        super().__init__()
        if not 0 <= p <= 1:
            raise ValueError(f"p: expected a probability in [0, 1], got {p}")
        self.p = p
        self._swapped = torch.zeros(0, 0, dtype=torch.bool)

    def augment(self, batch: Batch, ctx: Context) -> Batch:
        """Cells are drawn independently; targets stay."""
        partner = torch.randperm(len(batch), device=batch.x.device)
        self._swapped = torch.rand_like(batch.x) < self.p
        return replace(batch, x=torch.where(self._swapped, batch.x[partner], batch.x))

    def captions(self) -> list[str]:
        """How many cells of each row of the last batch were replaced."""
        return _told(self._swapped)


class TabularCutMix(Method):
    """Mix each row with another: some columns are the other's, and the label by the equal cells.

    With r ~ Beta(alpha, alpha), once a batch, each row keeps int(r D) of its D columns, drawn for
    each row, and takes the others from its partner. The share of a row in its target is that of the
    cells of the new row that equal its own, wherever they come from.

    **Deviations** from the authors' code (somaonishi/MTR at f27fe77): none known. alpha .1 is its
    default; its experiments search .1 to 2.
    """

    kinds = TABLES
    source = "Onishi and Meguro, Data Augmentation for Tabular Data, 2023, arXiv:2305.10308"
    mixes_rows = True
    space: ClassVar[Mapping[str, Any]] = {"alpha": ("loguniform", 0.1, 2.0)}

    def __init__(self, *, alpha: float = 0.1) -> None:
        super().__init__()
        if alpha <= 0:
            raise ValueError(f"alpha: expected a number above 0, got {alpha}")
        self.alpha = alpha
        self._taken = torch.zeros(0, 0, dtype=torch.bool)

    def augment(self, batch: Batch, ctx: Context) -> Batch:
        """Rows are paired by a permutation of the batch."""
        rows, columns = batch.x.shape
        partner = torch.randperm(rows, device=batch.x.device)
        kept = (beta(self.alpha, 1, batch.x) * columns).floor()
        place = torch.rand_like(batch.x).argsort(dim=1).argsort(dim=1)
        self._taken = place >= kept
        x = torch.where(self._taken, batch.x[partner], batch.x)
        share = (x == batch.x).to(batch.y.dtype).mean(dim=1, keepdim=True)
        return replace(batch, x=x, y=share * batch.y + (1 - share) * batch.y[partner])

    def captions(self) -> list[str]:
        """How many cells of each row of the last batch were taken from another row."""
        return _told(self._taken)


def _told(cells: Tensor) -> list[str]:
    counts = cells.sum(dim=1).tolist()
    return [f"{n} cell{'s' * (n > 1)} of another row" if n else "" for n in counts]
