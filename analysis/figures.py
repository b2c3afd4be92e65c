"""From the rows of a comparison to its figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from analysis.plots import Bar, forest
from analysis.stats import Interval
from analysis.tables import POINTS, Row, difference

LONG = 12
"""Letters from which on an upstream's name is written as U."""


def draw_forest(rows: Sequence[Row], path: Path, when: str = "last") -> None:
    """Draw test accuracy of rows on one benchmark, and their differences to the first row.

    A long upstream that several rows share is called U.

    Raises:
        ValueError: no run has ended with a result.
    """
    done = [record for row in rows for record in row.records if record.done]
    if not done:
        raise ValueError("no run has ended with a result")
    upstream = common_upstream(rows)
    names = [row.name.replace(upstream, "U") if upstream else row.name for row in rows]
    bars = []
    for row, name in zip(rows, names, strict=True):
        found = difference(row, rows[0], "accuracy", when) if row is not rows[0] else None
        accuracies = [
            POINTS * each.metric("accuracy", when=when) for each in row.by_seed().values()
        ]
        bars.append(
            Bar(
                name=name,
                values=[value for value in accuracies if not math.isnan(value)],
                difference=math.nan if found is None else found.estimate,
                training=_ends(found.training) if found is not None else None,
                population=_ends(found.population) if found is not None else None,
            )
        )
    run = done[0].run
    seeds = len({record.run.seed for record in done})
    forest(
        bars,
        base=names[0],
        title=f"{run.benchmark}, {run.model}, {run.training.epochs} epochs, protocol "
        f"{run.protocol}, {seeds} seeds",
        note=f"U = {upstream}" if upstream else "",
        axis_name="test accuracy, %",
        path=path,
    )


def common_upstream(rows: Sequence[Row]) -> str:
    """The long upstream that stands in most of the names, or an empty text."""
    names = [row.name for row in rows]
    counts = {
        row.upstream: sum(row.upstream in name for name in names)
        for row in rows
        if len(row.upstream) >= LONG
    }
    best = max(counts, key=lambda upstream: counts[upstream], default="")
    return best if counts.get(best, 0) > 1 else ""


def _ends(interval: Interval | None) -> tuple[float, float] | None:
    return None if interval is None else (interval.low, interval.high)
