"""Numbers published in papers; they are never mixed with ours."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

from analysis.blocks import Block, Entry
from analysis.facts import NONE, call_in, outer

SIZE = re.compile(r"(.+?)(?:_(64|128|224))?")
"""A network, and the pixels of its images if these are not 28."""
FOLDER = "folder:"
"""Of images that everybody brings; its name is that of the data."""
FOLDS = re.compile(r"\(folds=\d+\)")
"""All arguments of a benchmark that is only cut into folds."""
UNSTATED = "unstated"
"""The metric of tables that do not say which one they show, and how they split the rows."""


@dataclass(frozen=True)
class Printed:
    """A number from a paper's table; an accuracy or AUC is in points."""

    source: str
    table: str
    dataset: str
    model: str
    name: str
    """method over upstream"""
    mean: float
    std: float
    """nan if the paper prints none"""
    note: str
    """how its epoch was selected, and where the paper took it from"""
    split: bool = True
    """Whether the paper says which rows are for testing: if not, any split of ours stands beside"""


def read(metric: str) -> list[Printed]:
    """Every published accuracy or AUC; an error of e % is converted to 100 - e.

    A metric that the paper does not state counts as AUC, which fits its numbers best.
    """
    text = resources.files("analysis.report").joinpath("published.csv").read_text(encoding="utf-8")
    found = []
    for line in csv.DictReader(text.splitlines()):
        kind, _, unit = line["metric"].partition("_")
        if {"error": "accuracy", UNSTATED: "auc"}.get(kind, kind) != metric:
            continue
        mean = float(line["mean"]) * (1 if unit else 100)
        note = f"epoch: {line['selection']}"
        if kind == "error":
            mean, note = 100 - mean, f"{note}; printed as an error"
        if kind == UNSTATED:
            note += "; metric and splits not stated, AUC is the likeliest"
        if line["copied_from"]:
            note += f"; copied from {line['copied_from']}"
        over = f" over {line['upstream']}" if line["method"] not in ("none", "baseline") else ""
        plain = line["upstream"] if not over else line["method"]
        found.append(
            Printed(
                line["source"],
                line["table"],
                _dataset(line["dataset"], line["setting"]),
                line["model"],
                plain if over in ("", " over none") else plain + over,
                mean,
                float(line["std"]) * (1 if unit else 100) if line["std"] else math.nan,
                note,
                kind != UNSTATED,
            )
        )
    return found


def _dataset(name: str, setting: str) -> str:
    """``svhn`` with ``ir-nr=100-0.1`` is ``svhn(imbalance=100, noise=0.1)`` in our notation."""
    if not setting:
        return name
    imbalance, noise = setting.removeprefix("ir-nr=").split("-")
    given = [f"imbalance={imbalance}"] * (imbalance != "1")
    given += [f"noise={float(noise):g}"] * (float(noise) > 0)
    return f"{name}({', '.join(given)})" if given else name


def beside(
    block: Block, metric: str, only: Sequence[Entry] | None = None
) -> list[tuple[str, list[Printed | None]]]:
    """Rows of published numbers on the data sets of a block, with a value or None per column.

    They are for the same network, whatever its width, and for data sets of the same name, size and
    corruption, whose folds count only where the paper says how it splits; a row is one method of
    one table. ``only`` restricts them to methods and upstreams of the same names as these rows,
    whatever their arguments.
    """
    names = None if only is None else {_name(entry) for entry in only}
    told = [_known(column.key) for column in block.columns]
    uncut = [FOLDS.sub("", each) for each in told]
    network = outer(block.setting["model"])
    rows: dict[tuple[str, str, str], list[Printed | None]] = {}
    for each in read(metric):
        if names is not None and each.name not in names:
            continue
        name, size = SIZE.fullmatch(each.model).groups()  # type: ignore[union-attr]
        dataset = each.dataset + (f"@{size}" if size else "")
        wanted = told if each.split else uncut
        if name == network and dataset in wanted:
            row = rows.setdefault((each.source, each.table, each.name), [None] * len(wanted))
            for place, known in enumerate(wanted):
                row[place] = each if known == dataset else row[place]
    return [
        (f"{name} [{source}, table {table}]", values)
        for (source, table, name), values in rows.items()
    ]


def _name(entry: Entry) -> str:
    """A row as published numbers name it: ``saflex over mixup``."""
    upstream = outer(entry.facts.upstream) if entry.facts.wraps else NONE
    return outer(entry.method) + ("" if upstream == NONE else f" over {upstream}")


def _known(benchmark: str) -> str:
    """The benchmark as published numbers name it: arguments in order, pixels as a suffix."""
    own = FOLDER if benchmark.startswith(FOLDER) else ""
    call = call_in(benchmark.removeprefix(own))
    if call is None:
        return benchmark
    given = dict(call.arguments)
    size = given.pop("size", 28)
    kept = {key: value for key, value in given.items() if key != "as_rgb"}
    told = ", ".join(f"{key}={value:g}" for key, value in sorted(kept.items()) if _is_number(value))
    if any(not _is_number(value) for value in kept.values()):
        return benchmark
    return own + call.name + (f"({told})" if told else "") + ("" if size == 28 else f"@{size}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def notes(rows: Sequence[tuple[str, list[Printed | None]]]) -> list[str]:
    """How the epochs of published rows were selected, and where copied rows come from."""
    told: dict[str, list[str]] = {}
    for name, values in rows:
        for each in values:
            if each is not None and name not in told.setdefault(each.note, []):
                told[each.note].append(name)
    return [f"Published, {', '.join(names)}: {note}." for note, names in told.items()]
