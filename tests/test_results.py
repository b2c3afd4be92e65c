"""The study that the README shows is what its committed records say."""

import re
from pathlib import Path

import pandas as pd
import pytest

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
        (ROOT / "README.md", ACCURACY, "accuracy"),
        (RESULTS / "learnable-small.md", ACCURACY, "accuracy"),
        (RESULTS / "learnable-small.md", AUC, "auc"),
    ],
    ids=["readme", "accuracy", "auc"],
)
def test_the_printed_means_are_those_of_the_records(page: Path, title: str, metric: str) -> None:
    assert printed(page, title) == measured(metric)


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
    prediction = file.split("prediction: >\n")[1].split("\nmodels:")[0]
    page = (RESULTS / "learnable-small.md").read_text(encoding="utf-8")
    quoted = " ".join(re.findall(r"^> (.*)$", page, re.MULTILINE))
    assert quoted.split() == prediction.split()
