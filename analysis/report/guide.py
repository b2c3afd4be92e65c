"""What to try on N images, from the studies' pages: python -m analysis.report.guide

It reads the tables of every page in docs/results that has its records beside it, and writes
docs/what_to_try.md; run it in the repository's folder.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from analysis.numbers import count, listed

RESULTS = Path("docs/results")
PAGE = Path("docs/what_to_try.md")
TAKEN = "frozen"
"""In the name of a row without learning."""
DIFFERENCES = "### Differences in test accuracy, last epoch"
OTHERS = re.compile(r"^### Differences in test (?!accuracy)", re.MULTILINE)
"""On the page of a study on tables, where AUC leads on some: it says nothing of images."""
SCORES = "### Test accuracy, %, mean ± standard deviation over n seeds; last epoch"
MOVED = "### Outer steps, and how far what is learned moved from its start, medians"
NAMES = "### Names in full"
"""Of rows that the page shortens: what a user types."""
VERDICTS = ("better", "equivalent", "undecided", "worse", "not tested")
IMAGES = {
    "breastmnist": "breast ultrasound",
    "bloodmnist": "blood cells under a microscope",
    "chestmnist": "chest X-rays",
    "cifar10": "photographs",
    "cifar100": "photographs",
    "dermamnist": "dermatoscopy of skin lesions",
    "digits": "handwritten digits",
    "octmnist": "optical coherence tomography of the retina",
    "organamnist": "abdominal CT",
    "organcmnist": "abdominal CT",
    "organsmnist": "abdominal CT",
    "pathmnist": "colon pathology",
    "pneumoniamnist": "chest X-rays of children",
    "retinamnist": "fundus photographs",
    "svhn": "house numbers",
    "tissuemnist": "kidney cells under a microscope",
}


class Result(NamedTuple):
    """One comparison on one data set."""

    row: str
    base: str
    change: float
    """points of accuracy"""
    interval: str
    detectable: float
    verdict: str
    cost: str
    """training time of the row as a ratio to its upstream, the median over the study's data sets;
    empty if it is not on the page"""


@dataclass(frozen=True)
class DataSet:
    """A data set, and what one study or several found on it."""

    name: str
    rows: int
    """training rows"""
    classes: int
    test_rows: int
    settings: tuple[str, ...]
    """how networks were trained, by study"""
    pages: tuple[str, ...]
    results: tuple[Result, ...]
    hardly: tuple[str, ...] = ()
    """rows that hardly learned"""

    @property
    def images(self) -> str:
        """What they show."""
        return IMAGES.get(self.name.partition("(")[0], self.name)


def of_pages(folder: Path) -> list[DataSet]:
    """The data sets of all studies whose page stands beside its records."""
    pages = sorted(path.with_suffix(".md") for path in folder.glob("*.parquet"))
    return merged([each for page in pages for each in read(page)])


def merged(sets: Sequence[DataSet]) -> list[DataSet]:
    """Each data set once; of a comparison that several studies make, that of the first."""
    found: dict[str, DataSet] = {}
    for each in sets:
        known = found.setdefault(each.name, each)
        if known is not each:
            there = {(one.row, one.base) for one in known.results}
            more = tuple(one for one in each.results if (one.row, one.base) not in there)
            found[each.name] = replace(
                known,
                settings=tuple(dict.fromkeys(known.settings + each.settings)),
                pages=known.pages + each.pages,
                results=known.results + more,
                hardly=tuple(dict.fromkeys(known.hardly + each.hardly)),
            )
    return list(found.values())


def read(page: Path) -> list[DataSet]:
    """The data sets of a study's page; none if it is about tables, or has no row ``none``, so that
    it cannot tell whether to do anything.

    Raises:
        ValueError: the page has no table of differences.
    """
    text = page.read_text(encoding="utf-8")
    if OTHERS.search(text):
        return []
    records: Any = pd.read_parquet(page.with_suffix(".parquet"))
    records = records[records["searched"].fillna("") == ""]  # a search has its own tables
    if "none" not in set(records["row"]):
        return []
    names = {line[""]: line["in full"] for line in table(text, NAMES)}
    hardly = [(line["data set"], line[""]) for line in table(text, MOVED) if line["moved"]]
    costs = {line[""]: line["cost ratio"] for line in table(text, SCORES)}
    lines = table(text, DIFFERENCES)
    if not lines:
        raise ValueError(f"{page}: expected a table under {DIFFERENCES!r}, found none")
    found = []
    for name in dict.fromkeys(line["data set"] for line in lines):
        own = records[records["benchmark"] == name]
        first = own.iloc[0]
        results = []
        for line in (each for each in lines if each["data set"] == name):
            row, _, base = line[""].partition(" over ")
            change, detectable = (
                float(line[key].replace("n/a", "nan"))
                for key in ("difference, points", "detectable, points")
            )
            interval, verdict = line["population 95 % CI"], line["verdict"]
            cost = costs.get(row, "")
            row, base = names.get(row, row), names.get(base, base)
            results.append(Result(row, base, change, interval, detectable, verdict, cost))
        found.append(
            DataSet(
                name,
                rows=int(own["train_rows"].max()),
                classes=int(own["class"].max()) + 1,
                test_rows=int(first["test_rows"]),
                settings=(
                    f"{first['model']}, {first['epochs']} epochs, batch {first['batch_size']}, "
                    f"{count(int(own['seed'].nunique()), 'seed')}",
                ),
                pages=(page.name,),
                results=tuple(results),
                hardly=tuple(names.get(row, row) for where, row in hardly if where == name),
            )
        )
    return found


def table(text: str, title: str) -> list[dict[str, str]]:
    """The lines of the first table under a title, by column, without marks and arrows."""
    after = text.partition(f"{title}\n")[2]
    tables = re.findall(r"(?:^\|.*\n)+", after, re.MULTILINE)
    if not tables:
        return []
    rows = [
        [plain(cell) for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]
        for line in tables[0].splitlines()
    ]
    heads = [head.rstrip("↑↓ ") for head in rows[0]]
    return [dict(zip(heads, row, strict=True)) for row in rows[2:]]


def plain(cell: str) -> str:
    """A cell without Markdown's marks."""
    return re.sub(r"\\(.)|\*", r"\1", cell.strip())


def written(sets: Sequence[DataSet]) -> str:
    """The page."""
    sets = sorted(sets, key=lambda each: (each.rows, each.name))
    pages = list(dict.fromkeys(page for each in sets for page in each.pages))
    parts = [
        "# You have N labelled images: what to try",
        filled(
            "Written by `python -m analysis.report.guide` from the tables of "
            + linked(pages)
            + "; edit those, not this page. Verdicts are the studies' own: *better* and *worse* "
            "are significant at 5 % after Holm's correction over the study's comparisons, "
            "*equivalent* is within its margin, *undecided* is none of these, which is not "
            "*equal*. Intervals, uncorrected, are for other seeds and test images; *detectable* is "
            "the smallest true difference that one comparison finds with 80 % power."
        ),
        "## In short",
        short(sets),
        filled(learning(sets) + hardly_learned(sets)),
        "## Limits",
        filled(limits(sets)),
        "## Over all sizes",
        'Points of test accuracy over what stands after "over".',
        overview(sets),
        *(part for each in sets for part in section(each)),
    ]
    return "\n\n".join(parts) + "\n"


def linked(pages: Sequence[str]) -> str:
    """The names of pages, with links."""
    return listed([f"[{page.removesuffix('.md')}](results/{page})" for page in pages])


def short(sets: Sequence[DataSet]) -> str:
    """A line for each kind of outcome over the data sets."""
    outcomes: dict[str, list[tuple[DataSet, str]]] = {}
    for each in sets:
        for result in each.results:
            outcomes.setdefault(named(result), []).append((each, word(result)))
    alike: dict[str, list[str]] = {}
    lines = []
    for name, found in outcomes.items():
        places = {
            verdict: [f"{each.rows:,} rows" for each, own in found if own == verdict]
            for verdict in dict.fromkeys(own for _, own in found)
        }
        if len(places) == 1 and len(found) == len(sets):
            alike.setdefault(found[0][1], []).append(name)
            continue
        where = "; ".join(f"{verdict} on {listed(rows)}" for verdict, rows in places.items())
        lines.append(f"- {name}: {where}.")
    everywhere = [
        f"- {verdict.capitalize()} on {'all' if len(sets) > 1 else 'the'} "
        f"{count(len(sets), 'training set')}: {listed(names)}."
        for verdict, names in alike.items()
    ]
    return "\n".join(filled(line, "  ") for line in [*everywhere, *lines])


def named(result: Result) -> str:
    """``row`` over ``base``."""
    return f"`{result.row}` over `{result.base}`"


def learning(sets: Sequence[DataSet]) -> str:
    """Whether a comparison tells what learning adds."""
    if any(TAKEN in one.base for each in sets for one in each.results):
        return (
            "A method over its upstream shows what the method as a whole adds; what its *learning* "
            "adds is shown only over the same method without it (a row that is frozen, or another "
            "control that the method's page names)."
        )
    return (
        "None of these comparisons takes a method's learning away, so none shows what *learning* "
        "adds: a method over its upstream also has its own fixed transformations, losses and rows."
    )


def hardly_learned(sets: Sequence[DataSet]) -> str:
    """Which rows hardly learned, and where."""
    found = [
        f"`{row}` on {each.rows:,} rows ({each.images})" for each in sets for row in each.hardly
    ]
    if not found:
        return ""
    return (
        f" Differences of {listed(found)} say nothing about a learned policy: probabilities and "
        "magnitudes moved by less than 5 % of their range."
    )


def filled(text: str, indent: str = "") -> str:
    """Lines of at most 140 characters; all but the first are indented."""
    return textwrap.fill(
        text, 140, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def word(result: Result) -> str:
    """The verdict without the note on few seeds."""
    return result.verdict.partition(" (")[0]


def limits(sets: Sequence[DataSet]) -> str:
    """What these results do not cover."""
    settings = dict.fromkeys(setting for each in sets for setting in each.settings)
    return (
        f"{count(len(sets), 'training set')} of {min(each.rows for each in sets):,} to "
        f"{max(each.rows for each in sets):,} rows, with these networks and "
        f"lengths of training: {'; '.join(settings)}; no row has settings that a search changed. "
        "Names and settings are those of a study's page, which may be older than the code. "
        "Other networks, longer training and other data may turn an order around: run "
        "`augbench compare` on your own images before you decide."
    )


def overview(sets: Sequence[DataSet]) -> str:
    """Comparisons by data sets."""
    pairs = list(dict.fromkeys((one.row, one.base) for each in sets for one in each.results))
    heads = ["", *(f"{each.rows:,} rows, {each.images}" for each in sets)]
    lines = []
    for row, base in pairs:
        cells = [f"`{row}` over `{base}`"]
        for each in sets:
            found = [one for one in each.results if (one.row, one.base) == (row, base)]
            cells.append(f"{found[0].change:+.2f} {found[0].verdict}" if found else "")
        lines.append(cells)
    return markdown(heads, lines)


def section(each: DataSet) -> list[str]:
    """What was found on one data set, the best verdict first."""
    order = sorted(each.results, key=lambda one: (VERDICTS.index(word(one)), -one.change))
    lines = [
        [
            named(one),
            f"{one.change:+.2f} ({one.interval.replace('+', '')})",
            one.verdict,
            "" if math.isnan(one.detectable) else f"{one.detectable:.2f}",
            one.cost,
        ]
        for one in order
    ]
    heads = ["", "points (95 % interval)", "verdict", "detectable", "cost ratio, all sets"]
    return [
        f"## {each.rows:,} rows: {each.images}",
        filled(
            f"`{each.name}`: {each.classes} classes, {each.test_rows:,} test images; "
            f"{'; '.join(each.settings)}; {linked(each.pages)}."
        ),
        markdown(heads, lines),
    ]


def markdown(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table."""
    rows = [heads, [":--", *["--:"] * (len(heads) - 1)], *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    """Write the page."""
    PAGE.write_text(written(of_pages(RESULTS)), encoding="utf-8")


if __name__ == "__main__":
    main()
