"""What a method is worth in labelled rows: with how many its base would be as accurate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import isotonic_regression

ROUNDING = 1e-9
LEVELS = 3
"""Fewest numbers of labelled rows from which a curve of the base is drawn."""


class Worth(NamedTuple):
    """A row at one number of labelled rows, and the rows that its base needs for as much."""

    rows: float
    equal: float
    """infinite above the accuracy that the base reaches with all rows, 0 below that with fewest"""
    low: float
    high: float
    """ends of the 95 % interval, each likewise; nan without an interval"""


def equal_rows(
    rows: Sequence[float],
    scores: Sequence[float],
    at: int,
    gain: float,
    weights: Sequence[float] | None = None,
) -> float:
    """The labelled rows with which a base scores ``gain`` more than with ``rows[at]``.

    ``rows`` rise, and ``scores`` are those of the base, each with its weight. The curve is their
    isotonic regression (more rows never hurt), linear in the logarithm of the rows between them;
    the gain is added to the curve. Infinite above its last score, 0 below its first; on a plateau
    the value nearest ``rows[at]``.
    """
    x, y = np.log(rows), isotonic_regression(scores, weights=weights).x
    wanted = y[at] + gain
    nearest = y[np.abs(y - wanted).argmin()]
    wanted = nearest if abs(wanted - nearest) < ROUNDING else wanted  # scores are shares of rows
    if wanted > y[-1]:
        return float("inf")
    if wanted < y[0]:
        return 0.0
    # The plateau at this score, of width 0 where the curve rises through it.
    last = int(np.searchsorted(y, wanted, "right")) - 1
    first = int(np.searchsorted(y, wanted, "left"))
    if first <= last:
        return float(np.exp(np.clip(x[at], x[first], x[last])))
    share = (wanted - y[last]) / (y[first] - y[last])
    return float(np.exp(x[last] + share * (x[first] - x[last])))


def worth(
    rows: Sequence[float],
    base: Sequence[float],
    gains: Sequence[tuple[float, tuple[float, float] | None] | None],
    weights: Sequence[float] | None = None,
) -> list[Worth]:
    """For each number of labelled rows what the row's gain over its base there is worth.

    A gain is the difference with the ends of its interval, or None where there is none. The
    interval is that of the difference; the base's curve is taken as it was measured.
    """
    made = []
    for at, gain in enumerate(gains):
        if gain is not None:
            difference, ends = gain
            low, high = (
                (float("nan"),) * 2
                if ends is None
                else (equal_rows(rows, base, at, end, weights) for end in ends)
            )
            equal = equal_rows(rows, base, at, difference, weights)
            made.append(Worth(rows[at], equal, low, high))
    return made
