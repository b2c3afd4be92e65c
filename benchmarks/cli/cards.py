"""Rows of a table as cards: which of their cells a method changed, in the units of the table."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from analysis.report.plots import Card
from benchmarks.data.preparing import Fitted
from methods.base import Input

MOST = 8
"""Cells of a row that are drawn: those that changed most."""
SAME = 1e-6
"""Relative changes of a number that are rounding."""


class Cards:
    """Cards of the rows that a run sees, prepared by ``fitted``."""

    def __init__(self, fitted: Fitted) -> None:
        self._fitted, self._names = fitted, fitted.names
        of: Input = fitted.input
        self._coded = np.array(of.categories or [0] * of.shape[0]) > 0

    def of(self, before: Tensor, after: Tensor, told: Sequence[Sequence[str]]) -> list[Card]:
        """A card for each row (N, D'), with the lines ``told``: the cells that changed."""
        old, new = (each.detach().cpu().numpy() for each in (before, after))
        return [self._card(*row) for row in zip(old, new, told, strict=True)]

    def either(self, before: Tensor, after: Tensor, told: Sequence[Sequence[str]]) -> list[Card]:
        """The same, but a row that did not change has its most unusual cells."""
        cards = self.of(before, after, told)
        rows = after.detach().cpu().numpy()
        return [
            card if card.cells else self._plain(row, lines)
            for card, row, lines in zip(cards, rows, told, strict=True)
        ]

    def _card(self, old: np.ndarray, new: np.ndarray, told: Sequence[str]) -> Card:
        """Where both texts are the same, the numbers that the network sees tell the difference."""
        change = np.abs(new - old)
        change[change <= SAME * (1 + np.abs(old))] = 0
        change[self._coded & (change > 0)] = 1  # like a standard deviation of a number
        chosen, more = _largest(change)
        texts = self._fitted.cells(np.stack([old, new]))
        cells = []
        for place in chosen:
            name, (first, second) = self._names[place], (row[place] for row in texts)
            if first == second:
                name = f"{name} (scaled)"
                first, second = (f"{row[place]:.4g}" for row in (old, new))
            cells.append((name, first, second))
        return Card(told, cells, f"and {more} more" if more else "")

    def _plain(self, row: np.ndarray, told: Sequence[str]) -> Card:
        chosen, _ = _largest(np.where(self._coded, 0.0, np.abs(row)), all_of_them=True)
        texts = self._fitted.cells(row[None])[0]
        cells = [(self._names[place], texts[place], "") for place in chosen]
        more = len(row) - len(chosen)
        return Card(told, cells, f"unchanged; {more} more cells" if more else "unchanged")


def _largest(sizes: np.ndarray, all_of_them: bool = False) -> tuple[list[int], int]:
    """The places of the largest in their order, and how many others are above 0."""
    order = np.argsort(-sizes, kind="stable")[:MOST]
    chosen = sorted(int(place) for place in order if all_of_them or sizes[place] > 0)
    return chosen, int((sizes > 0).sum()) - len(chosen)
