"""Formats of numbers in tables and sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from analysis.stats import Interval

MISSING = "n/a"
POINTS = 100
P_SHOWN = 0.001


def mean_sd(values: Sequence[float], digits: int) -> str:
    """Mean ± standard deviation; a single value has no deviation."""
    if not len(values) or any(math.isnan(value) for value in values):
        return MISSING
    mean = f"{np.mean(values):.{digits}f}"
    return f"{mean} ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else mean


def number(value: float, digits: int) -> str:
    """A number with this many decimals; n/a for nan."""
    return MISSING if math.isnan(value) else f"{value:.{digits}f}"


def signed(value: float) -> str:
    """Points with their sign."""
    return f"{value:+.2f}"


def bounds(interval: Interval | None) -> str:
    """The ends of an interval with their signs."""
    return "–" if interval is None else f"{interval.low:+.2f} to {interval.high:+.2f}"


def estimated(value: float, interval: Interval | None) -> str:
    """``-8.92 [-10.05, -7.80]``: an estimate with its interval, if there is one."""
    ends = "" if interval is None else f" [{signed(interval.low)}, {signed(interval.high)}]"
    return signed(value) + ends


def p_value(p: float) -> str:
    """A p-value with three decimals, or ``< 0.001``."""
    if math.isnan(p):
        return MISSING
    return "< 0.001" if p < P_SHOWN else f"{p:.3f}"


def counted(counts: Sequence[int]) -> str:
    """``10``, or ``1 to 10`` if they differ."""
    if not counts:
        return "0"
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"


def median(values: Sequence[float]) -> float:
    """The median; nan if there is no value."""
    return float(np.median(values)) if len(values) else math.nan


def count(number: int, what: str) -> str:
    """``1 seed``, ``10 seeds``."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def starting(text: str) -> str:
    """The text with a capital letter, to start a sentence."""
    return text[:1].upper() + text[1:]


def listed(words: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))
