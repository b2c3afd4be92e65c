"""Search spaces, read from a file or from a method."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from methods.naming import NamingError, number_of, unknown

KINDS = ("choice", "uniform", "loguniform", "int")
GRID_POINTS = 3
"""Grid points per range."""
DIGITS = 4
"""Significant digits of a drawn number: enough, and they keep names short."""


@dataclass(frozen=True)
class Parameter:
    """One searched parameter: ``learning_rate``, or ``saflex.beta`` of a method."""

    key: str
    kind: str
    values: tuple[Any, ...]
    """the options of a choice, else the low and the high end"""

    def draw(self, rng: np.random.Generator) -> Any:
        """Draw a value."""
        if self.kind == "choice":
            return self.values[int(rng.integers(len(self.values)))]
        low, high = self.values
        if self.kind == "int":
            return int(rng.integers(low, high + 1))
        if self.kind == "uniform":
            return short(rng.uniform(low, high))
        return short(math.exp(rng.uniform(math.log(low), math.log(high))))

    def grid(self) -> tuple[Any, ...]:
        """Its points in a grid."""
        if self.kind == "choice":
            return self.values
        low, high = self.values
        shares = [place / (GRID_POINTS - 1) for place in range(GRID_POINTS)]
        if self.kind == "loguniform":
            return tuple(short(low * (high / low) ** share) for share in shares)
        points = [low + (high - low) * share for share in shares]
        if self.kind == "int":
            return tuple(dict.fromkeys(round(point) for point in points))
        return tuple(short(point) for point in points)


def short(value: float) -> float:
    """The number, rounded to the digits that names show."""
    return float(f"{value:.{DIGITS}g}")


def parameter(key: str, space: Any) -> Parameter:
    """The parameter that ``[kind, ...]`` defines.

    Raises:
        NamingError: an unknown kind, or values that are not a range.
    """
    shown = f"tune: {key}"
    if not isinstance(space, list | tuple) or not space or not isinstance(space[0], str):
        raise NamingError(f"{shown}: expected [kind, ...] such as [uniform, 0, 1], got {space!r}")
    kind, *rest = space
    if kind not in KINDS:
        raise NamingError(f"{shown}: {unknown('kind', kind, KINDS)}")
    if kind == "choice":
        options = rest[0] if len(rest) == 1 and isinstance(rest[0], list | tuple) else rest
        if not options:
            raise NamingError(f"{shown}: expected at least one option, got none")
        return Parameter(key, kind, tuple(number_of(each) for each in options))
    try:
        low, high = (float(each) for each in rest)
    except (TypeError, ValueError) as error:
        raise NamingError(f"{shown}: expected [{kind}, low, high], got {space!r}") from error
    if not -math.inf < low < high < math.inf or (kind == "loguniform" and low <= 0):
        above = "0 < " if kind == "loguniform" else ""
        raise NamingError(f"{shown}: expected {above}low < high, got {low:g} and {high:g}")
    if kind == "int":
        return Parameter(key, kind, (round(low), round(high)))
    return Parameter(key, kind, (low, high))
