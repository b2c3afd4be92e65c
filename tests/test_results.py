"""The study that README and docs tell of is what its committed records say."""

import re
from pathlib import Path

import pandas as pd
import pytest
import yaml

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"
RECORDS = RESULTS / "learnable-small.parquet"
ACCURACY = "Test accuracy, %, mean ± standard deviation over n seeds; last epoch"
AUC = "Test AUC, %, mean ± standard deviation over n seeds; last epoch"


def printed(page: Path, title: str) -> dict[tuple[str, str], str]:
    """The cells of the table under a title of a page, by row and data set."""
    text = page.read_text(encoding="utf-8").partition(title)[2]
    (table, *_) = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    head, _, *rows = [
        [plain(cell) for cell in line.strip("|").split("|")] for line in table.splitlines()
    ]
    return {
        (row[0], name.removesuffix(", % ↑")): value
        for row in rows
        for name, value in zip(head, row, strict=True)
        if name.endswith("% ↑") and value
    }


def plain(cell: str) -> str:
    """The text of a cell without Markdown's marks."""
    return re.sub(r"\\(.)|\*", r"\1", cell.strip())


def measured(metric: str) -> dict[tuple[str, str], str]:
    """What the records say of the test split at the last epoch, written as the tables write it."""
    frame = pd.read_parquet(RECORDS).query("`when` == 'last' and split == 'test'")
    table = frame[frame["metric"] == metric].pivot_table(
        "value", ["row", "benchmark"], aggfunc=["mean", "std"], observed=True
    )
    return {
        (row, benchmark): f"{100 * mean:.2f} ± {100 * std:.2f}"
        for (row, benchmark), mean, std in table.itertuples(name=None)
    }


@pytest.mark.parametrize(
    ("page", "title", "metric"),
    [
        (RESULTS / "learnable-small.md", ACCURACY, "accuracy"),
        (RESULTS / "learnable-small.md", AUC, "auc"),
    ],
    ids=["accuracy", "auc"],
)
def test_the_printed_means_are_those_of_the_records(page: Path, title: str, metric: str) -> None:
    assert printed(page, title) == measured(metric)


def differences() -> dict[tuple[str, str], str]:
    """Difference, interval and verdict of each comparison, as other pages write them."""
    page = (RESULTS / "learnable-small.md").read_text(encoding="utf-8")
    text = page.partition("### Differences in test accuracy, last epoch")[2]
    (table, *_) = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    found = {}
    for line in table.splitlines()[2:]:
        row, column, _, change, _, interval, *_, verdict = map(plain, line.strip("|").split("|"))
        low, high = (end.removeprefix("+") for end in interval.split(" to "))
        found[row, column] = f"{change} ({low} to {high}) {verdict}"
    return found


def test_the_differences_are_those_of_the_records() -> None:
    frame = pd.read_parquet(RECORDS).query("`when` == 'last' and split == 'test'")
    table = frame[frame["metric"] == "accuracy"].pivot_table(
        "value", ["benchmark", "seed"], "row", observed=True
    )
    for (name, column), told in differences().items():
        row, base = name.split(" over ")
        change = 100 * (table.loc[column, row] - table.loc[column, base]).mean()
        assert told.startswith(f"{change:+.2f} (")


@pytest.mark.parametrize("page", ["README.md", "docs/faq.md"])
def test_other_pages_quote_the_differences(page: str) -> None:
    quoted = re.findall(
        r"[+-]\d+\.\d\d \(-?\d+\.\d\d to -?\d+\.\d\d\),? ?\w*",
        (ROOT / page).read_text(encoding="utf-8"),
    )
    assert quoted
    for each in quoted:
        assert any(
            told.startswith(each.replace(",", "").strip()) for told in differences().values()
        )


def test_every_row_has_ten_runs_on_every_set() -> None:
    runs = pd.read_parquet(RECORDS).drop_duplicates("id")
    counted = runs.groupby(["row", "benchmark"], observed=True)["seed"].agg(["count", "nunique"])
    assert len(runs) == 540
    assert set(runs["status"]) == {"done"}
    assert len(counted) == 18 * 3
    assert (counted.to_numpy() == 10).all()
    assert RECORDS.stat().st_size < 2e6


def test_the_page_quotes_the_prediction_of_the_file() -> None:
    file = (ROOT / "ray_configs" / "learnable_small.yaml").read_text(encoding="utf-8")
    prediction = yaml.safe_load(file)["prediction"]
    page = (RESULTS / "learnable-small.md").read_text(encoding="utf-8")
    if "This page is of the study's first version" in page:
        pytest.skip("the page is of the study's first version, with the prediction of that time")
    quoted = " ".join(re.findall(r"^> (.*)$", page, re.MULTILINE))
    assert quoted.split() == prediction.split()
