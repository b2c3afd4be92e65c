"""Figures: one style, readable in grey and to the colour-blind, as files (no window is opened)."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

CAPTION_WIDTH, CAPTION_SIZE = 19, 6.5
"""Letters a line and points of the text under an image."""
CELL, LINE = 1.15, 0.14
"""Inches: the width of an image with its margin, and the height of a line under it."""


class Band(NamedTuple):
    """Images that have something in common, beside each other."""

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
        # A long name leaves no room for its share: that goes on the next line.
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
    """A row for each image: the original, then what was drawn from it, each with its caption.

    originals (R, H, W, C) and draws (R, D, H, W, C) in [0, 1]; labels R texts, captions R x D;
    ``columns`` are the headings from the first draw on.
    """
    rows, count = draws.shape[:2]
    wrapped = [[_wrapped(text) for text in row] for row in captions]
    heights = [_height(row) for row in wrapped]
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


def sample_bands(bands: Sequence[Band], title: str, path: Path) -> None:
    """A row for each band: its heading, then its images from the left, each with its caption."""
    columns = max(3, *(len(band.images) for band in bands))  # so that a heading has room
    wrapped = [[_wrapped(text) for text in band.captions] for band in bands]
    heights = [_height(row) + 0.3 for row in wrapped]
    figure, axes = _cells(columns, heights, title)
    for row, band, texts in zip(axes, bands, wrapped, strict=True):
        row[0].set_title(" ", fontsize=8)  # room for the heading, whose width must not count
        row[0].annotate(
            band.heading, (0, 1), (0, 6), "axes fraction", "offset points", fontsize=8
        ).set_in_layout(False)
        for axis, image, text in zip(row, band.images, texts, strict=False):
            _picture(axis, image, text)
        for axis in row[len(texts) :]:
            axis.set_axis_off()
    figure.savefig(path)


def heatmaps(
    tables: Sequence[tuple[str, np.ndarray]],
    rows: Sequence[str],
    columns: Sequence[str],
    rows_name: str,
    title: str,
    path: Path,
) -> None:
    """Tables (R, C) of values in [0, 1] beside each other, each with its heading."""
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
    bars: Sequence[Bar], base: str, title: str, note: str, axis_name: str, path: Path
) -> None:
    """Seeds and means of each row, and its difference to ``base`` with both intervals."""
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
        if bar.population is not None:
            right.plot(bar.population, [place, place], "-", lw=1, color="black")
        if bar.training is not None:
            right.plot(
                bar.training,
                [place, place],
                "-",
                lw=3.5,
                color="#0072b2",
                alpha=0.55,
                solid_capstyle="butt",
            )
        right.plot(bar.difference, place, "D", ms=4, color="black")
    left.set_yticks(list(places), [bar.name for bar in bars], fontsize=7)
    left.invert_yaxis()
    left.set_xlabel(f"{axis_name}; circles: seeds, diamond: mean", fontsize=7.5)
    right.set_xlabel(
        f"difference to {base}, points; 95 %:\nthick: other seeds, thin: and other images",
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
