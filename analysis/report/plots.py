"""Figures as files in one style, readable in grey and by the colour-blind; opens no window."""

from __future__ import annotations

import math
import os
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


def _import_matplotlib() -> None:
    """Import it whatever MPLBACKEND says: no window is opened, so its backend is not needed.

    A notebook sets the variable for every command that it starts. It is applied afterwards, for
    anything else that this process draws.
    """
    asked = os.environ.pop("MPLBACKEND", "")
    try:
        import matplotlib  # noqa: PLC0415

        if asked:
            with suppress(ValueError):  # an invalid backend fails when the user draws, too
                matplotlib.rcParams["backend"] = asked
    finally:
        if asked:
            os.environ["MPLBACKEND"] = asked


if "matplotlib" not in sys.modules:
    _import_matplotlib()

from matplotlib import font_manager, rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from analysis.exchange import Worth
from analysis.table import plain

CAPTION_WIDTH, CAPTION_SIZE = 19, 6.5
"""Characters per line and font size of the text under an image."""
CELL, LINE = 1.15, 0.14
"""Inches: the width of an image with its margin, and the height of a line under it."""


class Band(NamedTuple):
    """Images that have something in common, side by side."""

    heading: str
    images: np.ndarray
    """(n, H, W, C) in [0, 1]"""
    captions: Sequence[str]
    """n texts"""


def _wrapped(text: str) -> str:
    """Lines that break after a comma or before an arrow, unless one part is too long for a line."""
    return "\n".join(map(_filled, text.split("\n")))


def _filled(line: str) -> str:
    parts = []
    for part in re.split(r"(?<=,) | (?=-> )", line):
        glued = part.replace(" ", "\u00a0")
        # A long name leaves no room for its share, which goes on the next line.
        parts.append(glued.replace(":\u00a0", ": ") if len(part) > CAPTION_WIDTH else glued)
    return textwrap.fill(" ".join(parts), CAPTION_WIDTH, break_on_hyphens=False)


def augmentation_grid(
    originals: np.ndarray,
    draws: np.ndarray,
    labels: Sequence[str],
    captions: Sequence[Sequence[str]],
    title: str,
    path: Path,
    columns: Sequence[str] = ("draws",),
) -> None:
    """A row for each image: the original, then its augmented versions, each with its caption.

    originals (R, H, W, C) and draws (R, D, H, W, C) in [0, 1]; labels R texts, captions R x D;
    ``columns`` are the headings, starting at the first draw.
    """
    rows, count = draws.shape[:2]
    wrapped = [[_wrapped(text) for text in row] for row in captions]
    heights = [_height([label, *row]) for label, row in zip(labels, wrapped, strict=True)]
    figure, axes = _cells(count + 1, heights, title)
    for row in range(rows):
        cells = [(originals[row], labels[row])]
        cells += [(draws[row, column], wrapped[row][column]) for column in range(count)]
        for axis, (image, text) in zip(axes[row], cells, strict=True):
            _picture(axis, image, text)
    axes[0, 0].set_title("original", fontsize=8)
    for axis, heading in zip(axes[0, 1:], columns, strict=False):
        axis.set_title(heading, fontsize=8, loc="left")
    for axis in axes[:, 0]:
        for side in axis.spines.values():
            side.set_linewidth(1.5)
    figure.savefig(path)


def sample_bands(bands: Sequence[Band], title: str, paths: Sequence[Path]) -> None:
    """A row for each band: its heading, then its images from the left, each with its caption."""
    columns = max(3, *(len(band.images) for band in bands))  # so that a heading has room
    wrapped = [[_wrapped(text) for text in band.captions] for band in bands]
    heights = [_height(row) + 0.3 for row in wrapped]
    figure, axes = _cells(columns, heights, title)
    for row, band, texts in zip(axes, bands, wrapped, strict=True):
        row[0].set_title(" ", fontsize=8)  # makes room for the heading, whose width is ignored
        row[0].annotate(
            _drawn(band.heading), (0, 1), (0, 6), "axes fraction", "offset points", fontsize=8
        ).set_in_layout(False)
        for axis, image, text in zip(row, band.images, texts, strict=False):
            _picture(axis, image, text)
        for axis in row[len(texts) :]:
            axis.set_axis_off()
    _save(figure, paths)


class Card(NamedTuple):
    """A row of a table: lines on it, its cells, and a last line."""

    told: Sequence[str]
    cells: Sequence[tuple[str, str, str]]
    """a column, its value, and the new one, or nothing"""
    more: str


class Shelf(NamedTuple):
    """Cards that have something in common, side by side, perhaps under a heading."""

    heading: str
    cards: Sequence[Card]


CARD, CARD_LINE, CARD_SIZE = 3.0, 0.135, 7.0
"""Inches of a card's width with its margin and of a line, and its font size."""
NAMES, OLD, NEW = 0.1, 1.98, 2.2
"""Inches from the left of a card: where names start, where values end, where new ones start."""


def shelves(rows: Sequence[Shelf], title: str, path: Path) -> None:
    """A line of cards for each shelf; an arrow and bold type, not a colour, mark what changed."""
    width = CARD * max(2, *(len(shelf.cards) for shelf in rows)) + 0.1
    shown = textwrap.fill(_drawn(title), int(13 * width), break_on_hyphens=False)
    top = 0.2 + 0.16 * (shown.count("\n") + 1)
    heights = [CARD_LINE * (0.8 + max(map(_lines, shelf.cards))) for shelf in rows]
    spaces = [0.36 if shelf.heading else 0.14 for shelf in rows]
    height = top + sum(heights) + sum(spaces)
    figure = Figure(figsize=(width, height), dpi=150)
    FigureCanvasAgg(figure)
    axis = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axis.set_axis_off()
    axis.text(width / 2, 0.1, shown, size=9, ha="center", va="top", parse_math=False)
    for shelf, tall, space in zip(rows, heights, spaces, strict=True):
        _fitting(axis, NAMES, top + 0.16, shelf.heading, width - 2 * NAMES, size=8, weight="bold")
        for place, card in enumerate(shelf.cards):
            _put(axis, card, place * CARD + 0.05, top + space - 0.12, tall)
        top += space + tall
    _save(figure, [path])


def _lines(card: Card) -> int:
    return len(card.told) + max(1, len(card.cells)) + bool(card.more)


def _put(axis: Axes, card: Card, left: float, top: float, tall: float) -> None:
    axis.add_patch(Rectangle((left, top), CARD - 0.1, tall, fill=False, ec="0.7", lw=0.7))
    y, whole = top + CARD_LINE, CARD - 2 * NAMES - 0.05
    for line in card.told:
        _fitting(axis, left + NAMES, y, line, whole, style="italic")
        y += CARD_LINE
    for number, (name, old, new) in enumerate(card.cells):
        if number % 2 == 0:
            place = (left + 0.03, y - 0.73 * CARD_LINE)
            axis.add_patch(Rectangle(place, CARD - 0.16, CARD_LINE, fc="0.94", lw=0))
        _fitting(axis, left + NAMES, y, name, 1.12)
        end = OLD if new else CARD - 2 * NAMES
        _fitting(axis, left + end, y, old, end - 1.27, ha="right", color="0.25")
        if new:
            axis.text(left + (OLD + NEW) / 2, y, "\u2192", size=CARD_SIZE, ha="center")
            _fitting(axis, left + NEW, y, new, CARD - 0.15 - NEW, weight="bold")
        y += CARD_LINE
    if not card.cells:
        _fitting(axis, left + NAMES, y, "no cell changed", whole, color="0.25")
        y += CARD_LINE
    if card.more:
        _fitting(axis, left + NAMES, y, card.more, whole, color="0.25")


def _fitting(axis: Axes, x: float, y: float, text: str, width: float, **how: Any) -> None:
    """A text on one line, cut where it is wider than so many inches."""
    shown, figure = _drawn(text), axis.get_figure(root=True)
    label = axis.text(x, y, shown, parse_math=False, **{"size": CARD_SIZE, **how})
    assert figure is not None and isinstance(figure.canvas, FigureCanvasAgg)
    canvas, room = figure.canvas, width * figure.dpi
    while (wide := label.get_window_extent(canvas.get_renderer()).width) > room and len(shown) > 1:
        shown = shown[: max(1, min(len(shown) - 1, int(len(shown) * room / wide)))]
        label.set_text(f"{shown.rstrip()}…")


def heatmaps(
    tables: Sequence[tuple[str, np.ndarray]],
    rows: Sequence[str],
    columns: Sequence[str],
    rows_name: str,
    title: str,
    path: Path,
) -> None:
    """Tables (R, C) of values in [0, 1] side by side, each with its heading."""
    width, height = 1.6 + 0.48 * len(columns) * len(tables), 1.6 + 0.27 * len(rows)
    shown = textwrap.fill(title, int(13 * width), break_on_hyphens=False)
    size = (width, height + 0.15 * shown.count("\n"))
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(shown, fontsize=9)
    axes = figure.subplots(1, len(tables), sharey=True, squeeze=False)[0]
    for axis, (heading, values) in zip(axes, tables, strict=True):
        axis.imshow(values, cmap="cividis", vmin=0, vmax=1, aspect="auto")
        for (row, column), value in np.ndenumerate(values):
            dark = "black" if value > 0.55 else "white"
            axis.text(column, row, f"{value:.2f}", ha="center", va="center", size=7, color=dark)
        axis.set_title(heading, fontsize=8)
        axis.set_xticks(range(len(columns)), columns, fontsize=7, rotation=40, ha="right")
        axis.set_yticks(range(len(rows)), rows, fontsize=7)
        axis.tick_params(length=0)
        for side in axis.spines.values():
            side.set_visible(False)
    axes[0].set_ylabel(rows_name, fontsize=7.5)
    figure.savefig(path)


def heat_grid(
    images: np.ndarray, maps: np.ndarray, captions: Sequence[str], title: str, path: Path
) -> None:
    """Images (N, H, W, C) in [0, 1], and under each the same with its map (N, H, W) over it."""
    columns = max(3, len(images))
    wrapped = [_wrapped(text) for text in captions]
    figure, axes = _cells(columns, [_height([""]), _height(wrapped)], title)
    for place, (image, heat) in enumerate(zip(images, maps, strict=True)):
        _picture(axes[0, place], image, "")
        _picture(axes[1, place], image, wrapped[place])
        axes[1, place].imshow(heat, cmap="plasma", vmin=0, vmax=1, alpha=0.3 + 0.4 * heat)
    for axis in axes[:, len(images) :].ravel():
        axis.set_axis_off()
    figure.savefig(path)


class Cloud(NamedTuple):
    """A panel of points: a grey background, and groups in colours."""

    heading: str
    behind: np.ndarray | None
    """(n, 2)"""
    groups: Sequence[tuple[str, np.ndarray]]
    """a name (empty: coloured by value) and (n, 2)"""


def clouds(panels: Sequence[Cloud], values: np.ndarray | None, title: str, path: Path) -> None:
    """Points in the plane; ``values`` (n,) colour the group without a name."""
    with rc_context(STYLE):
        figure = Figure(figsize=(3.5 * len(panels), 4.4), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(textwrap.fill(title, int(3.5 * 13 * len(panels))), fontsize=9)
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axis, panel in zip(axes, panels, strict=True):
            if panel.behind is not None:
                axis.scatter(*panel.behind.T, s=4, color="0.85", lw=0)
            few = len(panel.groups) <= len(COLOURS)
            for place, (name, points) in enumerate(panel.groups):
                if name:
                    axis.scatter(
                        *points.T, s=9, lw=0.4, label=_drawn(name),
                        color=COLOURS[place % len(COLOURS)],
                        marker=MARKERS[place if few else place // len(COLOURS) % len(MARKERS)],
                    )  # fmt: skip
                else:
                    drawn = axis.scatter(*points.T, s=9, lw=0, c=values, cmap="cividis")
                    place_of_bar = axis.inset_axes((0.1, -0.06, 0.8, 0.03))
                    bar = figure.colorbar(drawn, cax=place_of_bar, orientation="horizontal")
                    bar.ax.tick_params(labelsize=7)
            axis.set_title(panel.heading, fontsize=8)
            axis.set_xticks([])
            axis.set_yticks([])
            if any(name for name, _ in panel.groups):
                axis.legend(
                    loc="upper center", bbox_to_anchor=(0.5, -0.01), fontsize=7, frameon=False,
                    ncols=min(5, len(panel.groups)), handletextpad=0.1, columnspacing=0.8,
                )  # fmt: skip
        _save(figure, [path])


def _cells(columns: int, heights: Sequence[float], title: str) -> tuple[Figure, np.ndarray]:
    """A figure with its title and axes (rows, columns) of these heights in inches."""
    width = CELL * columns + 0.2
    shown = textwrap.fill(title, int(13 * width), break_on_hyphens=False)
    height = sum(heights) + 0.5 + 0.15 * shown.count("\n")
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(shown, fontsize=9)
    return figure, figure.subplots(len(heights), columns, squeeze=False, height_ratios=heights)


def _height(texts: Sequence[str]) -> float:
    """Inches of a row of images with these texts under them."""
    return 1.0 + LINE * max(1, *(text.count("\n") + 1 for text in texts))


def _picture(axis: Axes, image: np.ndarray, text: str) -> None:
    grey = image.shape[-1] == 1
    axis.imshow(image[..., 0] if grey else image, cmap="gray" if grey else None, vmin=0, vmax=1)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_xlabel(text, fontsize=CAPTION_SIZE, labelpad=2)


class Bar(NamedTuple):
    """A row of a forest plot, in points."""

    name: str
    values: Sequence[float]
    """one of each seed"""
    difference: float
    """nan where there is none"""
    training: tuple[float, float] | None
    """interval"""
    population: tuple[float, float] | None


def forest(
    bars: Sequence[Bar],
    title: str,
    note: str,
    axis_name: str,
    path: Path,
) -> None:
    """Seeds and means of each row, and its difference from its base with both intervals."""
    longest = max(len(bar.name) for bar in bars)
    size = (5.2 + 0.068 * longest, 1.5 + 0.27 * len(bars) + 0.14 * note.count("\n"))
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=9)
    left, right = figure.subplots(1, 2, sharey=True)
    places = range(len(bars))
    for place, bar in zip(places, bars, strict=True):
        left.plot(bar.values, [place] * len(bar.values), "o", ms=3, mfc="none", mec="0.55", mew=0.7)
        if bar.values:
            left.plot(float(np.mean(bar.values)), place, "D", ms=4.5, color="#0072b2")
        _whiskers(right, place, Span(bar.difference, bar.training, bar.population))
    left.set_yticks(list(places), [bar.name for bar in bars], fontsize=7)
    left.invert_yaxis()
    left.set_xlabel(f"{axis_name}; circles: seeds, diamond: mean", fontsize=7.5)
    right.set_xlabel(
        "difference from the upstream (or none), points; 95 % intervals:\n"
        "thick: other seeds, thin: other seeds and test data",
        fontsize=7.5,
    )
    right.axvline(0, lw=0.8, ls="--", color="0.4")
    for axis in (left, right):
        axis.tick_params(axis="x", labelsize=7)
        axis.grid(axis="y", lw=0.4, color="0.9")
        axis.set_axisbelow(True)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    if note:
        figure.supxlabel(note, fontsize=7)
    figure.savefig(path)


COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's palette, distinct for the colour-blind; yellow is too pale for lines."""
MARKERS, DASHES = "osD^vP*X<>", ("-", "--", ":", "-.")
STYLE: dict[Any, Any] = {
    "text.parse_math": False,
    "svg.hashsalt": "augbench",
    "axes.axisbelow": True,
}
"""Dollar signs in a name do not start a formula, and the same figure gives the same file."""
PANEL, PANELS_A_ROW = (2.7, 2.2), 4
"""Size in inches of one of several panels, and the number of panels per row."""
NAME_WIDTH, SIDE_WIDTH = 64, 46
"""Characters per line of a legend, and of names next to an axis."""
MAP_WIDTH, MAP_CELL = 8.0, 0.46
"""Inches of a row of coloured numbers, and of one number."""
LETTERS = 13
"""Characters of small type per inch."""
BANDS = 6
"""The largest number of curves in a panel with bands: more would hide each other."""
WIDE_RANGE = 8
"""An axis of positive values that spans more than this factor is logarithmic."""


class Point(NamedTuple):
    """A method as a point, with the standard deviation of y over seeds (nan: one seed)."""

    name: str
    x: float
    y: float
    sd: float


class Front(NamedTuple):
    """A panel of points; those that no other point beats in both are joined."""

    heading: str
    points: Sequence[Point]
    best: Sequence[int]
    """points on the front, from the left"""


class Mark(NamedTuple):
    """What a row adds to an upstream, against what that upstream does on its own."""

    name: str
    upstream: str
    x: Span
    y: Span


class Span(NamedTuple):
    """A difference with its intervals, each of which may be missing."""

    estimate: float
    training: tuple[float, float] | None
    population: tuple[float, float] | None


class Curve(NamedTuple):
    """A line with a band around it; low and high are equal if there is none."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


class Panel(NamedTuple):
    """Curves over one pair of axes."""

    heading: str
    x_name: str
    y_name: str
    curves: Sequence[Curve]
    ticks: Sequence[str] = ()
    """labels at x = 0, 1, ... instead of numbers"""
    diagonal: bool = False
    """a line from (0, 0) to (1, 1)"""


class Stack(NamedTuple):
    """Stacked bars: for each part, a value for each name."""

    heading: str
    parts: Mapping[str, Sequence[float]]


class Shares(NamedTuple):
    """Samples whose histograms overlap."""

    heading: str
    x_name: str
    samples: dict[str, np.ndarray]


def fronts(
    panels: Sequence[Front],
    names: Sequence[str],
    axes_names: tuple[str, str],
    paths: Sequence[Path],
) -> None:
    """Points of each name in each panel, whiskers of one standard deviation, and the front."""
    with rc_context(STYLE):
        figure, axes = _panels(len(panels), names)
        for axis, panel in zip(axes, panels, strict=True):
            for point in panel.points:
                place = names.index(point.name)
                axis.errorbar(
                    point.x,
                    point.y,
                    yerr=None if math.isnan(point.sd) else point.sd,
                    fmt=MARKERS[place % len(MARKERS)],
                    color=COLOURS[place % len(COLOURS)],
                    ms=5,
                    lw=0.8,
                    mfc="none" if place >= len(COLOURS) else None,
                )
            front = [panel.points[each] for each in panel.best]
            axis.plot([p.x for p in front], [p.y for p in front], "-", color="0.6", lw=1, zorder=0)
            _spread(axis, [point.x for point in panel.points])
            _labelled(axis, panel.heading, *axes_names)
        _legend(figure, names, marked=True)
        _save(figure, paths)


def intervals(
    panels: Sequence[tuple[str, Sequence[Span | None]]],
    names: Sequence[str],
    margin: float,
    x_name: str,
    paths: Sequence[Path],
) -> None:
    """Differences of each name in each panel with both intervals, and the margin as a grey band."""
    shown = _side(names)
    columns = min(len(panels), PANELS_A_ROW)
    rows = -(-len(panels) // columns)
    size = (0.6 + shown.width + (1.9 if columns > 1 else 3.6) * columns,
            0.75 + rows * (0.55 + 0.16 * shown.lines))  # fmt: skip
    with rc_context(STYLE):
        figure = _figure(size)
        axes = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        heights = np.array([name.count("\n") + 1.4 for name in shown.names])
        places = np.cumsum(heights) - heights / 2
        for axis, (heading, spans) in zip(axes, panels, strict=False):
            axis.axvspan(-margin, margin, color="0.92", lw=0, zorder=0)
            axis.axvline(0, lw=0.8, ls="--", color="0.4")
            for place, span in zip(places, spans, strict=True):
                if span is not None:
                    _whiskers(axis, float(place), span)
            _labelled(axis, heading, x_name, "")
            axis.grid(axis="y", lw=0)
        axes[0].set_yticks(places, shown.names, fontsize=7)
        axes[0].set_ylim(heights.sum() + 0.2, -0.2)
        _save(figure, paths)


NEAR = 0.03
"""Share of an axis within which two letters would overlap."""


def gains(
    panels: Sequence[tuple[str, Sequence[Mark]]],
    names: Sequence[str],
    axes_names: tuple[str, str],
    paths: Sequence[Path],
) -> None:
    """A point with two intervals for each mark, its upstream written at its top, and two lines:
    no change, and what gives back all that the upstream costs."""
    with rc_context(STYLE):
        figure, axes = _panels(len(panels), names)
        for axis, (heading, marks) in zip(axes, panels, strict=True):
            axis.axhline(0, lw=0.8, ls="--", color="0.4", zorder=0)
            axis.axline((0, 0), slope=-1, lw=0.8, ls=":", color="0.4", zorder=0)
            for mark in marks:
                place = names.index(mark.name)
                axis.errorbar(
                    mark.x.estimate, mark.y.estimate, xerr=_beside(mark.x), yerr=_beside(mark.y),
                    fmt=MARKERS[place % len(MARKERS)], color=COLOURS[place % len(COLOURS)],
                    ms=5, lw=0.8, mfc="none" if place >= len(COLOURS) else None,
                )  # fmt: skip
            tops = {mark.upstream: mark.x.estimate for mark in marks}
            low, high = axis.get_xlim()
            for x, told in _together(tops, NEAR * (high - low)):
                axis.text(
                    x, 1.01, told, transform=axis.get_xaxis_transform(), fontsize=7,
                    ha="center", va="bottom",
                )  # fmt: skip
            _labelled(axis, "", *axes_names)
            axis.set_title(heading, fontsize=7.5, loc="left", pad=16)
        _legend(figure, names, marked=True)
        _save(figure, paths)


def _together(places: Mapping[str, float], near: float) -> Iterator[tuple[float, str]]:
    """The names from left to right, those that would overlap in one text between their places."""
    groups = list[list[str]]()
    for name in sorted(places, key=places.__getitem__):
        if groups and places[name] - places[groups[-1][-1]] < near:
            groups[-1].append(name)
        else:
            groups.append([name])
    for group in groups:
        yield sum(places[name] for name in group) / len(group), ", ".join(group)


def _beside(span: Span) -> list[list[float]] | None:
    """How far the interval reaches to both sides, population if there is one."""
    ends = span.population or span.training
    return None if ends is None else [[span.estimate - ends[0]], [ends[1] - span.estimate]]


def _whiskers(axis: Axes, place: float, span: Span) -> None:
    if span.population is not None:
        axis.plot(span.population, [place, place], "-", lw=1, color="black")
    if span.training is not None:
        axis.plot(
            span.training, [place, place], "-", lw=3.5, color=COLOURS[0], alpha=0.55,
            solid_capstyle="butt",
        )  # fmt: skip
    axis.plot(span.estimate, place, "D", ms=4, color="black")


def curves(panels: Sequence[Panel], names: Sequence[str], paths: Sequence[Path]) -> None:
    """Lines with bands, with a colour and dash style for each name."""
    with rc_context(STYLE):
        figure, axes = _panels(len(panels), names)
        for axis, panel in zip(axes, panels, strict=True):
            for curve in panel.curves:
                place = names.index(curve.name)
                colour, dash = COLOURS[place % len(COLOURS)], DASHES[place // len(COLOURS) % 4]
                mark = "o" if len(curve.x) < 8 else ""
                axis.plot(curve.x, curve.y, dash, marker=mark, ms=3, lw=1.2, color=colour)
                if len(panel.curves) <= BANDS:
                    axis.fill_between(
                        curve.x, curve.low, curve.high, color=colour, alpha=0.15, lw=0
                    )
            if all(float(x).is_integer() for curve in panel.curves for x in curve.x):
                axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            if panel.diagonal:
                axis.plot([0, 1], [0, 1], "-", lw=0.8, color="0.6", zorder=0)
            _labelled(axis, panel.heading, panel.x_name, panel.y_name)
            if panel.ticks:
                axis.set_xticks(range(len(panel.ticks)), [_cut(_drawn(t), 14) for t in panel.ticks])
                axis.set_xlim(-0.3, len(panel.ticks) - 0.7)
        _legend(figure, names, marked=False)
        _save(figure, paths)


def exchange(
    panels: Sequence[tuple[str, Mapping[str, Sequence[Worth]]]],
    names: Sequence[str],
    axes_names: tuple[str, str],
    paths: Sequence[Path],
) -> None:
    """Labelled rows against as many of the base, on logarithmic axes, with the line of no worth.

    What is beyond the rows of the base is drawn as a triangle at the edge.
    """
    with rc_context(STYLE):
        figure, axes = _panels(len(panels), names)
        for axis, (heading, lines) in zip(axes, panels, strict=True):
            rows = [each.rows for line in lines.values() for each in line]
            low, high = min(rows), max(rows)
            edges = low / 1.4, high * 1.4
            for number, (name, line) in enumerate(lines.items()):
                place = names.index(name)
                colour = COLOURS[place % len(COLOURS)]
                aside = 1.035 ** (number - (len(lines) - 1) / 2)
                x = [each.rows * aside for each in line]
                y = [float(np.clip(each.equal, *edges)) for each in line]
                axis.plot(x, y, DASHES[place // len(COLOURS) % 4], lw=1.2, color=colour)
                for here, there, each in zip(x, y, line, strict=True):
                    beyond = "^" if there == edges[1] else "v" if there == edges[0] else ""
                    axis.plot(here, there, beyond or "o", ms=6 if beyond else 4, color=colour)
                    if not math.isnan(each.low):
                        ends = np.clip([each.low, each.high], *edges)
                        axis.plot([here] * 2, ends, "-", lw=0.8, color=colour)
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.plot(edges, edges, "-", lw=0.8, color="0.6", zorder=0)
            axis.set_ylim(edges[0] / 1.1, edges[1] * 1.1)
            ticks = sorted(set(rows))
            for side in (axis.xaxis, axis.yaxis):
                side.set_major_locator(FixedLocator(ticks))
                side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                side.set_minor_locator(NullLocator())
            _labelled(axis, heading, *axes_names)
        _legend(figure, names, marked=False)
        _save(figure, paths)


def critical_difference(
    names: Sequence[str],
    ranks: Sequence[float],
    apart: float,
    groups: Sequence[Sequence[int]],
    title: str,
    paths: Sequence[Path],
) -> None:
    """Mean ranks, best on top, and bars over rows within a critical difference."""
    order = [int(each) for each in np.argsort(ranks, kind="stable")]
    shown = _side([names[each] for each in order])
    with rc_context(STYLE):
        figure = _figure((4 + shown.width, 1.3 + 0.17 * shown.even))
        axis = figure.subplots()
        places = {each: row for row, each in enumerate(order)}
        for each in order:
            axis.plot([1, ranks[each]], [places[each]] * 2, "-", lw=0.6, color="0.8")
            axis.plot(ranks[each], places[each], "D", ms=4.5, color=COLOURS[0])
        for number, group in enumerate(groups):
            middle = len(names) + 0.3 + number * 0.5
            ends = [min(ranks[each] for each in group), max(ranks[each] for each in group)]
            axis.plot(ends, [middle] * 2, "-", lw=3, color="0.35", solid_capstyle="butt")
        axis.plot([1, 1 + apart], [-1] * 2, "-|", lw=1, color="black")
        told = f"critical difference {apart:.2f}"
        axis.text(1 + apart / 2, -1.3, told, ha="center", va="bottom", size=7)
        axis.set_yticks(range(len(order)), shown.names, fontsize=7)
        axis.set_ylim(len(names) + 0.3 + 0.5 * len(groups), -1.9)
        axis.set_xlim(0.8, max(len(names), 1 + apart) + 0.2)
        told = "mean rank, 1 is best; grey bars: not significantly different"
        _labelled(axis, title, told if groups else "mean rank, 1 is best", "")
        axis.grid(axis="y", lw=0)
        _save(figure, paths)


def maps(
    tables: Sequence[tuple[str, Sequence[str], np.ndarray]],
    rows: Sequence[str],
    paths: Sequence[Path],
    shares: bool = False,
) -> None:
    """Tables (R, C) of the same rows with their headings and columns, as coloured numbers.

    Changes in points, below 0 orange and above it purple; with ``shares`` values in [0, 1].
    """
    shown = _side(rows)
    widest = max(len(columns) for _, columns, _ in tables)
    beside = min(len(tables), PANELS_A_ROW, max(1, int(MAP_WIDTH / (MAP_CELL * max(widest, 3)))))
    below = -(-len(tables) // beside)
    letters = int(LETTERS * MAP_CELL * max(widest, 4))
    size = (1 + shown.width + (0.2 + MAP_CELL * max(widest, 4)) * beside,
            below * (0.85 + 0.2 * shown.even))  # fmt: skip
    with rc_context(STYLE):
        figure = _figure(size)
        axes = figure.subplots(below, beside, sharey=True, squeeze=False).ravel()
        for axis in axes[len(tables) :]:
            axis.set_axis_off()
        for axis, (heading, columns, values) in zip(axes, tables, strict=False):
            most = 1.0 if shares else max(float(np.nanmax(np.abs(values), initial=0)), 1.0)
            colours = "cividis" if shares else "PuOr"
            axis.imshow(values, cmap=colours, vmin=0 if shares else -most, vmax=most, aspect="auto")
            for (row, column), value in np.ndenumerate(values):
                if not math.isnan(value):
                    light = value < 0.55 if shares else abs(value) > 0.65 * most
                    written = f"{value:.2f}" if shares else f"{round(value, 1) + 0:+.1f}"
                    axis.text(
                        column, row, written, ha="center", va="center", size=6.5,
                        color="white" if light else "black",
                    )  # fmt: skip
            axis.set_title(_filled_name(_drawn(heading), letters), fontsize=7, loc="left")
            long = max(map(len, columns)) > 3
            axis.set_xticks(
                range(len(columns)), [_cut(_drawn(name), 18) for name in columns], fontsize=6.5,
                rotation=35 if long else 0, ha="right" if long else "center",
            )  # fmt: skip
            axis.tick_params(length=0, labelsize=7)
            for side in axis.spines.values():
                side.set_visible(False)
        axes[0].set_yticks(range(len(rows)), shown.names)
        _save(figure, paths)


def stacks(
    panels: Sequence[Stack], names: Sequence[str], x_name: str, paths: Sequence[Path]
) -> None:
    """A stacked bar for each name, a panel per data set; parts differ in colour and hatch."""
    shown = _side(names)
    columns = min(len(panels), PANELS_A_ROW)
    rows = -(-len(panels) // columns)
    parts = list(dict.fromkeys(part for panel in panels for part in panel.parts))
    hatches = ("", "////", "", "....", "", "xxxx", "")
    size = (0.6 + shown.width + (2.1 if columns > 1 else 4) * columns,
            0.95 + rows * (0.5 + 0.19 * shown.even))  # fmt: skip
    with rc_context({**STYLE, "hatch.linewidth": 0.4}):
        figure = _figure(size)
        axes = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        for axis, panel in zip(axes, panels, strict=False):
            left = np.zeros(len(names))
            for place, part in enumerate(parts):
                values = np.nan_to_num(np.asarray(panel.parts.get(part, left * 0), dtype=float))
                axis.barh(
                    range(len(names)), values, 0.7, left, color=COLOURS[place % len(COLOURS)],
                    hatch=hatches[place % len(hatches)], edgecolor="white", lw=0.3,
                    label=part if axis is axes[0] else None,
                )  # fmt: skip
                left = left + values
            _labelled(axis, panel.heading, x_name, "")
            axis.grid(axis="y", lw=0)
        axes[0].set_yticks(range(len(names)), shown.names, fontsize=7)
        axes[0].invert_yaxis()
        figure.legend(loc="outside lower center", ncols=len(parts), fontsize=7, frameon=False)
        _save(figure, paths)


def histograms(panels: Sequence[Shares], paths: Sequence[Path]) -> None:
    """Overlapping step histograms, each as shares of its own sample."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.samples))
    with rc_context(STYLE):
        figure, axes = _panels(len(panels), names)
        for axis, panel in zip(axes, panels, strict=True):
            every = np.concatenate(list(panel.samples.values()))
            ends = np.histogram_bin_edges(every, 24).tolist()
            for name, values in panel.samples.items():
                place = names.index(name)
                axis.hist(
                    values, ends, weights=np.full(len(values), 1 / max(len(values), 1)),
                    histtype="step", lw=1.3, color=COLOURS[place % len(COLOURS)],
                    ls=DASHES[place % 4],
                )  # fmt: skip
            _labelled(axis, panel.heading, panel.x_name, "share of rows")
        _legend(figure, names, marked=False, dashed=True)
        _save(figure, paths)


class _Side(NamedTuple):
    """Names next to an axis, wrapped if they are long, and the room that they take."""

    names: list[str]
    width: float
    """inches"""
    lines: int

    @property
    def even(self) -> float:
        """Total lines if every name has the same room and no two neighbours touch."""
        own = [name.count("\n") + 1 for name in self.names]
        pairs = [(one + other) / 2 for one, other in pairwise(own)]
        return len(own) * max(pairs or own)


def _side(names: Sequence[str]) -> _Side:
    shown = [_filled_name(_drawn(name), SIDE_WIDTH) for name in names]
    longest = max(len(line) for name in shown for line in name.split("\n"))
    return _Side(shown, 0.066 * longest, sum(name.count("\n") + 1 for name in shown))


def _figure(size: tuple[float, float]) -> Figure:
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _panels(count: int, names: Sequence[str]) -> tuple[Figure, list[Axes]]:
    """A figure with ``count`` panels and room for a legend of these names below."""
    columns = min(count, PANELS_A_ROW)
    rows = -(-count // columns)
    alone = (6.4, 3.4) if len(names) > BANDS else (4.6, 3.0)
    wide, high = alone if count == 1 else (3.4, 2.7) if count == 2 else PANEL
    figure = _figure((wide * columns, high * rows + 0.2 * _legend_lines(names, wide * columns)))
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[count:]:
        axis.set_axis_off()
    return figure, list(axes[:count])


def _legend_lines(names: Sequence[str], width: float) -> int:
    lines = sum(_filled_name(name, NAME_WIDTH).count("\n") + 1 for name in names)
    return -(-lines // _legend_columns(names, width)) + 1


def _legend_columns(names: Sequence[str], width: float) -> int:
    longest = max((min(len(name), NAME_WIDTH) for name in names), default=1)
    return max(1, min(len(names), int(width / (0.55 + 0.062 * longest))))


def _legend(figure: Figure, names: Sequence[str], marked: bool, dashed: bool = False) -> None:
    handles = []
    for place, name in enumerate(names):
        dash = DASHES[(place if dashed else place // len(COLOURS)) % 4]
        handles.append(
            Line2D(
                [], [], color=COLOURS[place % len(COLOURS)], lw=1.3,
                ls="" if marked else dash,
                marker=MARKERS[place % len(MARKERS)] if marked else "",
                ms=5, mfc="none" if marked and place >= len(COLOURS) else None,
                label=_filled_name(_drawn(name), NAME_WIDTH),
            )
        )  # fmt: skip
    columns = _legend_columns(names, figure.get_figwidth())
    figure.legend(
        handles=handles, loc="outside lower center", ncols=columns, fontsize=7, frameon=False
    )


def _spread(axis: Axes, values: Sequence[float]) -> None:
    """A logarithmic axis with plain numbers if positive values span a wide range."""
    known = [value for value in values if value > 0]
    if len(known) == len(values) and known and max(known) > WIDE_RANGE * min(known):
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.xaxis.set_minor_formatter(lambda value, _: "")


def _labelled(axis: Axes, heading: str, x_name: str, y_name: str) -> None:
    axis.set_title(_filled_name(_drawn(heading), 30), fontsize=7.5, loc="left")
    axis.set_xlabel(x_name, fontsize=7.5)
    axis.set_ylabel(y_name, fontsize=7.5)
    axis.tick_params(labelsize=7)
    axis.grid(lw=0.4, color="0.9")
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _filled_name(name: str, width: int) -> str:
    """A method's name, wrapped after a comma, a bracket or a plus."""
    parts = re.split(r"(?<=[,(+]) ?", name)
    lines = [""]
    for part in parts:
        space = " " if lines[-1].endswith(",") else ""
        if lines[-1] and len(lines[-1]) + len(space) + len(part) > width:
            lines.append(part)
        else:
            lines[-1] += space + part
    return "\n".join(piece for line in lines for piece in textwrap.wrap(line, width) or [""])


def _drawn(text: str) -> str:
    """The text, with characters that the font lacks written as code points."""
    font = font_manager.get_font(font_manager.findfont("DejaVu Sans"))
    return "".join(
        sign if font.get_char_index(ord(sign)) else f"[U+{ord(sign):04X}]" for sign in plain(text)
    )


def _cut(text: str, letters: int) -> str:
    return text if len(text) <= letters else f"{text[: letters - 1]}…"


def _save(figure: Figure, paths: Sequence[Path]) -> None:
    for path in paths:
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, metadata=metadata)
        figure.set_layout_engine("none")  # the layout is computed once for all files
