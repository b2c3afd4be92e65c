"""How many seeds would show a difference, given the variances of finished runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import special

from analysis import blocks, chosen, findings
from analysis.blocks import Block, Column
from analysis.findings import Finding
from analysis.metrics import HEADLINE, MEASURES
from analysis.numbers import number
from analysis.question import Question
from analysis.records import Record
from analysis.stats import ALPHA, INFERENCE_SEEDS, Crossed
from analysis.table import table, text

MOST_SEEDS = 1000
VERY_MANY = 10**9
"""With this many seeds only the choice of images matters."""
ALL = 10**6
"""Degrees of freedom that count as infinite."""
SEED_SCALES, ITEM_SCALES = 16, 4
"""Number of quantiles of the variances of seeds and images over which a power is averaged."""
GRID = (np.arange(200) + 0.5) / 200
"""Quantiles for the mean over the standard error; scipy's noncentral t fails for large effects."""
HOUR = 3600


def with_seeds(variances: Crossed, seeds: int) -> Crossed:
    """The expected variances with this many seeds on the same test images.

    V_seed and the residual fall with the number of seeds; in V_item, only its residual does.
    """
    ratio = variances.seeds / seeds
    images = max(variances.item - variances.residual, 0.0)
    return replace(
        variances,
        seeds=seeds,
        seed=variances.seed * ratio,
        residual=variances.residual * ratio,
        item=images + variances.residual * ratio,
    )


def power(variances: Crossed, effect: float, level: float = 0.95) -> float:
    """The probability that the population interval at this level excludes 0, given a true effect.

    This is the power of a noncentral t with the interval's own degrees of freedom, those whose
    quantile gives its half-width: the normal power, averaged over the estimated standard error.
    """
    interval = variances.interval(level)
    if not interval.se > 0:
        return 1.0 if effect else 1 - level
    critical, shift = variances.half(level) / interval.se, abs(effect) / interval.se
    scale = np.sqrt(special.chdtri(interval.df, GRID) / interval.df) if interval.df < ALL else 1.0
    beyond = special.ndtr(shift - critical * scale) + special.ndtr(-shift - critical * scale)
    return float(np.mean(beyond))


def plausible(variances: Crossed) -> list[Crossed]:
    """Equally likely values of the true variances, given those estimated from few seeds.

    The mean squares of seeds and of images are scaled by quantiles of df / chi^2(df). The residual
    counts as known: it has about S - 1 times the degrees of freedom of the images.
    """
    return [
        replace(variances, seed=variances.seed * seed, item=variances.item * item)
        for seed in _scales(variances.seeds - 1, SEED_SCALES)
        for item in _scales(variances.df_item, ITEM_SCALES)
    ]


def _scales(df: float, count: int) -> NDArray[np.float64]:
    return df / special.chdtri(df, (np.arange(count) + 0.5) / count)


def assured(variances: Crossed, seeds: int, effect: float, level: float) -> float:
    """The power with this many seeds, averaged over plausible true variances.

    Using the estimates themselves would be too optimistic with few seeds: a variance that is
    underestimated costs more power than one that is overestimated by as much adds.

    Source: Julious and Owen, Statistics in Medicine 25, 2006 (sample size from a pilot).
    """
    powers = [power(with_seeds(each, seeds), effect, level) for each in plausible(variances)]
    return float(np.mean(powers))


def seeds_needed(variances: Crossed, effect: float, wanted: float, level: float) -> int | None:
    """The fewest seeds with which an effect is found; None if a thousand do not suffice."""
    if assured(variances, MOST_SEEDS, effect, level) < wanted:
        return None
    low, high = INFERENCE_SEEDS - 1, MOST_SEEDS
    while high - low > 1:
        middle = (low + high) // 2
        if assured(variances, middle, effect, level) >= wanted:
            high = middle
        else:
            low = middle
    return high


def resolvable(variances: Crossed, effect: float, wanted: float, level: float) -> bool | None:
    """Whether any number of seeds, however large, finds an effect on these test data.

    False if it would not even with the smallest plausible variance of images (one-sided, 95 %);
    None if the runs do not tell.
    """
    if assured(variances, VERY_MANY, effect, level) >= wanted:
        return True
    least = replace(variances, item=variances.item * _least(variances.df_item))
    return None if power(with_seeds(least, VERY_MANY), effect, level) >= wanted else False


def _least(df: float) -> float:
    """The factor on an estimated variance below which the true one lies with 5 % probability."""
    return df / float(special.chdtri(df, ALPHA))


def images_needed(variances: Crossed, effect: float, wanted: float, level: float) -> int:
    """Test images with which very many seeds find an effect, all classes growing in proportion.

    If patients are known, it is the number of patients.
    """
    images = max(variances.item - variances.residual, 0.0)
    quantiles = special.ndtri((1 + level) / 2) + special.ndtri(wanted)
    drawn = variances.clusters or variances.images
    return math.ceil(drawn * images * (quantiles / effect) ** 2)


@dataclass(frozen=True)
class Need:
    """What a comparison on one data set needs."""

    row: str
    base: str
    column: str
    variances: Crossed
    alone: int | None
    """seeds for this comparison alone; None if a thousand do not suffice"""
    together: int | None
    """seeds if Holm divides .05 by the whole family, its worst case"""
    ever: tuple[bool | None, bool | None]
    """whether any number suffices, alone and together; None if the runs do not tell"""
    images: int
    """or patients, if these are known"""
    hours: float
    """for the seeds that are missing for ``together``, one run at a time"""


def needs(block: Block, found: Sequence[Finding], effect: float, wanted: float) -> list[Need]:
    """The needs of the comparisons of a family, as far as two or more seeds give a variance.

    Cross-validation is left out: its variance is not that of seeds and images.
    """
    made = []
    columns = {column.name: column for column in block.columns}
    strict = 1 - ALPHA / max(len(found), 1)
    for each in found:
        variances = each.difference.variances if each.difference is not None else None
        if not isinstance(variances, Crossed) or not variances.se > 0:
            continue
        together = seeds_needed(variances, effect, wanted, strict)
        missing = max((together or 0) - variances.seeds, 0)
        made.append(
            Need(
                each.row,
                each.base,
                each.column,
                variances,
                seeds_needed(variances, effect, wanted, 1 - ALPHA),
                together,
                (
                    resolvable(variances, effect, wanted, 1 - ALPHA),
                    resolvable(variances, effect, wanted, strict),
                ),
                images_needed(variances, effect, wanted, 1 - ALPHA),
                missing * _seconds(columns[each.column], (each.row, each.base)) / HOUR,
            )
        )
    return made


def _seconds(column: Column, names: Sequence[str]) -> float:
    """Seconds per seed for these rows, evaluation included, as medians."""
    total = 0.0
    for name in names:
        costs = [record.result["cost"] for record in column.row(name).by_seed().values()]
        total += float(
            np.median([each["charged_seconds"] + each["evaluation_seconds"] for each in costs])
        )
    return total


def plan(
    found: Sequence[Record],
    question: Question,
    effect: float,
    wanted: float,
    benchmarks: Sequence[str] = (),
) -> str:
    """The seeds and hours that each comparison needs to show ``effect`` points, as text.

    Raises:
        NamingError: one of the ``benchmarks`` does not exist, or several match.
    """
    made = [block for block in blocks.split(found, question.labels) if block.done]
    made = chosen.on_benchmarks(made, benchmarks)
    texts = [_of_block(block, question, effect, wanted) for block in made]
    return "\n\n\n".join(texts)


def _of_block(block: Block, question: Question, effect: float, wanted: float) -> str:
    setting = block.setting
    head = f"{setting['model']}, protocol {setting['protocol']}, {setting['device']}"
    found = findings.findings(block, question)
    listed = needs(block, found, effect, wanted)
    if not listed:
        return (
            f"{head}\nNo variance can be estimated yet: a comparison needs at least two seeds "
            "with different predictions on the same test data (of at least two patients, if "
            "known)."
        )
    body = [
        [
            f"{each.row} over {each.base}",
            each.column,
            each.variances.seeds,
            number(math.sqrt(each.variances.seed * each.variances.seeds), 2),
            number(math.sqrt(max(each.variances.item - each.variances.residual, 0)), 2),
            _seeds(each.alone, each.ever[0]),
            _seeds(each.together, each.ever[1]),
            "" if each.together is None else number(each.hours, 1),
        ]
        for each in listed
    ]
    columns = ["", "data set", "n", "seed sd", "test se", "seeds, alone",
               f"seeds, family of {len(found)}", "more hours"]  # fmt: skip
    of = "" if block.leads == HEADLINE else f" of {MEASURES[block.leads].name}"
    title = (
        f"Seeds needed to show a true difference of {_points(effect)}{of} with {100 * wanted:g} % "
        "power (population interval)"
    )
    remarks = [*_remarks(listed, effect), *_left_out(listed, found)]
    return f"{head}\n{text(table('seeds', title, columns, body, remarks))}"


def _points(effect: float) -> str:
    return "1 point" if effect == 1 else f"{effect:g} points"


def _seeds(count: int | None, ever: bool | None) -> str:
    if count is None:
        return {True: f"over {MOST_SEEDS}", False: "no number", None: "unknown"}[ever]
    return str(count)


def _left_out(listed: Sequence[Need], found: Sequence[Finding]) -> list[str]:
    there = {(each.row, each.base, each.column) for each in listed}
    left = [
        f"{each.row} over {each.base} on {each.column}"
        for each in found
        if (each.row, each.base, each.column) not in there
    ]
    if not left:
        return []
    return [
        "Left out because the variance cannot be estimated (fewer than two seeds, equal "
        f"predictions, one test patient, or folds): {', '.join(left)}."
    ]


def _remarks(listed: Sequence[Need], effect: float) -> list[str]:
    lines = []
    if never := [each for each in listed if each.ever[0] is False]:
        lines.append(
            f"no number: more seeds cannot show {_points(effect)} on these test data. It would "
            f"take about: {'; '.join(map(_images, never))}."
        )
    if any(each.ever[0] is None for each in listed):
        lines.append(
            f"unknown: with the seeds so far, the test se is too uncertain to tell whether more "
            f"seeds can show {_points(effect)} on these test data."
        )
    hours = sum(each.hours for each in listed)
    if any(each.together is not None for each in listed):
        lines.append(f"The missing seeds take at most {hours:.1f} hours, one run at a time.")
    few = min(each.variances.seeds for each in listed)
    low, high = (math.sqrt((few - 1) / special.chdtri(few - 1, q)) for q in (0.025, 0.975))
    of = " (of patients, where known)" if any(each.variances.clusters for each in listed) else ""
    return [
        *lines,
        f"n: seeds so far. seed sd: standard deviation over seeds of the paired difference, in "
        f"points; the true value may be {low:.1f} to {high:.1f} times that of {few} seeds (95 %), "
        "and the power is averaged over that range. test se: standard error due to the choice of "
        f"test data{of}, which more seeds do not reduce. family: the level is 0.05 divided by "
        "the number of comparisons, the worst case of Holm's correction, so fewer seeds may do.",
    ]


def _images(need: Need) -> str:
    """The test rows or patients that a comparison would need, and has."""
    of = need.variances
    what, there = ("patients", of.clusters) if of.clusters else ("test rows", of.images)
    return f"{need.row} over {need.base} on {need.column} {need.images} {what} (has {there})"
