"""The study that README and docs tell of is what its committed records say."""

import re
from pathlib import Path

import pandas as pd
import pytest
import yaml

from analysis.report import guide

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"
LAST = "`when` == 'last' and split == 'test' and searched == ''"
"""Rows of the records; trials of a search have their settings in ``searched``."""
PAGES = ("learnable-small", "saflex-upstreams", "learnable-tuned")
ACCURACY = "Test accuracy, %, mean ± standard deviation over n seeds; last epoch"
AUC = "Test AUC, %, mean ± standard deviation over n seeds; last epoch"


def printed(page: Path, title: str) -> dict[tuple[str, str], str]:
    """The cells of the table under a title of a page, by row and data set."""
    text = page.read_text(encoding="utf-8")
    names = in_full(text)
    return {
        (names.get(line[""], line[""]), name.removesuffix(", %")): value
        for line in guide.table(text, f"### {title}")
        for name, value in line.items()
        if name.endswith(", %") and value not in ("", "n/a")
    }


def in_full(text: str) -> dict[str, str]:
    """The full names of the rows that a page shortens."""
    return {line[""]: line["in full"] for line in guide.table(text, guide.NAMES)}


def measured(name: str, metric: str) -> dict[tuple[str, str], str]:
    """What the records say of the test split at the last epoch, written as the tables write it."""
    frame = records_of(name).query(LAST)
    table = frame[frame["metric"] == metric].pivot_table(
        "value", ["row", "benchmark"], aggfunc=["mean", "std"], observed=True
    )
    return {
        (row, benchmark): f"{100 * mean:.2f} ± {100 * std:.2f}"
        for (row, benchmark), mean, std in table.itertuples(name=None)
    }


def records_of(name: str) -> pd.DataFrame:
    return pd.read_parquet(RESULTS / f"{name}.parquet")


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize(("title", "metric"), [(ACCURACY, "accuracy"), (AUC, "auc")])
def test_the_printed_means_are_those_of_the_records(name: str, title: str, metric: str) -> None:
    assert printed(RESULTS / f"{name}.md", title) == measured(name, metric)


def differences(name: str = "learnable-small") -> dict[tuple[str, str], str]:
    """Difference, interval and verdict of each comparison, as other pages write them."""
    text = (RESULTS / f"{name}.md").read_text(encoding="utf-8")
    names = in_full(text)
    found = {}
    for line in guide.table(text, guide.DIFFERENCES):
        row = " over ".join(names.get(each, each) for each in line[""].split(" over "))
        interval = line["population 95 % CI"].replace("+", "")
        found[row, line["data set"]] = (
            f"{line['difference, points']} ({interval}) {line['verdict']}"
        )
    return found


@pytest.mark.parametrize(("study", "count"), [*zip(PAGES, (45, 30, 14), strict=True)])
def test_the_differences_are_those_of_the_records(study: str, count: int) -> None:
    frame = records_of(study).query(LAST)
    table = frame[frame["metric"] == "accuracy"].pivot_table(
        "value", ["benchmark", "seed"], "row", observed=True
    )
    assert len(differences(study)) == count
    for (name, column), told in differences(study).items():
        row, base = name.split(" over ")
        change = 100 * (table.loc[column, row] - table.loc[column, base]).mean()
        assert told.startswith(f"{change:+.2f} (")


def test_the_chosen_settings_are_those_of_the_records() -> None:
    """Their means on fresh seeds and their differences from each other, as the page has them."""
    page = (RESULTS / "learnable-tuned.md").read_text(encoding="utf-8")
    frame = records_of("learnable-tuned").query(
        "`when` == 'last' and split == 'test' and metric == 'accuracy' and seed < 1000"
    )
    keys = [frame["benchmark"], frame["row"].map(first_name), frame["searched"], frame["seed"]]
    values = 100 * frame["value"].groupby(keys, observed=True).first().unstack()
    head = "### Search learnable\\_tuned: "
    chosen: dict[tuple[str, str], pd.Series] = {}
    benchmark = ""
    lines = guide.table(page, f"{head}test accuracy with fresh seeds, last epoch")
    for line in lines:
        if not line["n"]:
            benchmark = line[""].strip("*").partition(",")[0]
            continue
        known = values.loc[benchmark, first_name(line[""])]
        told = {f"{row.mean():.2f} ± {row.std():.2f}": row for _, row in known.iterrows()}
        written = known.loc[""]
        assert line["as written"] == f"{written.mean():.2f} ± {written.std():.2f}"
        chosen[benchmark, first_name(line[""])] = told[line["chosen"]]
    assert len(chosen) == 12
    title = f"{head}differences in test accuracy between chosen settings, fresh seeds, last epoch"
    found = guide.table(page, title)
    assert len(found) == 14
    for line in found:
        row, base = map(first_name, line[""].split(" over "))
        benchmark = line["data set"].partition(",")[0]
        change = (chosen[benchmark, row] - chosen[benchmark, base]).mean()
        assert line["difference, points"] == f"{change:+.2f}"


def first_name(row: str) -> str:
    """The method of a row, without arguments."""
    return row.partition("(")[0]


README_ROWS = {
    "RandAugment over none": "randaugment over none",
    "SAFLEX over RandAugment": "saflex(upstream=randaugment) over randaugment",
    "SAFLEX over itself without learning": (
        "saflex(upstream=randaugment) over frozen(upstream=saflex(upstream=randaugment))"
    ),
    "AutoDO over none": "autodo over none",
    "AutoDO over itself without learning": "autodo over frozen(upstream=autodo)",
    "LP-A3 over none": "lpa3(warmup=1) over none",
    "LP-A3 over noise of the same size": (
        "lpa3(warmup=1) over norm_noise(upstream=lpa3(warmup=1))"
    ),
}
README_SETS = {
    "BreastMNIST": "breastmnist",
    "digits, 200 images": "digits(rows_per_class=20)",
    "PneumoniaMNIST": "pneumoniamnist",
}


def test_the_readme_quotes_the_differences() -> None:
    """Each number stands in its row and column, and there are no others of this form."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    known = differences()
    lines = guide.table(text, "10 seeds):\n")
    assert len(lines) == len(README_ROWS)
    for line in lines:
        row = README_ROWS[re.sub(r" \(from [^)]*\)", "", line[""])]
        for column, name in README_SETS.items():
            assert line[column] == known[row, name]
    quoted = re.findall(r"[+-]\d+\.\d\d \(-?\d+\.\d\d to -?\d+\.\d\d\)", text)
    assert len(quoted) == len(README_ROWS) * len(README_SETS)


def test_what_to_try_is_what_the_pages_say() -> None:
    page = ROOT / "docs" / "what_to_try.md"
    assert page.read_text(encoding="utf-8") == guide.written(guide.of_pages(RESULTS))


STUDY = """
### Test accuracy, %, mean ± standard deviation over n seeds; last epoch

|  | n | a, % ↑ | cost ratio ↓ |
| :-- | --: | --: | --: |
| saflex\\_x | 3 | **80.00 ± 1.00** | 3.10 |

### Differences in test accuracy, last epoch

|  | data set | n | difference, points ↑ | population 95 % CI | detectable, points ↓ | verdict |
| :-- | --: | --: | --: | --: | --: | --: |
| saflex\\_x over frozen(upstream=saflex) | a | 3 | +0.10 | -0.20 to +0.40 | 0.30 | equivalent |
| saflex\\_x over none | a | 3 | -1.00 | -1.20 to -0.80 | 0.30 | worse (few seeds) |
| saflex\\_x over none | b(noise=0.4) | 3 | +1.00 | – | n/a | not tested |
"""


def test_what_to_try_of_another_study(tmp_path: Path) -> None:
    (tmp_path / "one.md").write_text(STUDY)
    common = {"model": "mlp", "epochs": 5, "batch_size": 8}
    sets = [("a", 20, 100), ("b(noise=0.4)", 3000, 50)]
    pd.DataFrame(
        [
            {"benchmark": name, "train_rows": rows, "test_rows": test, "seed": seed, **common}
            | {"class": 3, "row": row, "searched": searched}
            for name, rows, test in sets
            for row in ("none", "saflex_x")
            for seed, searched in ((0, None), (1, None), (2, None), (1000, "{}"))
        ]
    ).to_parquet(tmp_path / "one.parquet")
    text = guide.written(guide.of_pages(tmp_path))
    lines = text.splitlines()
    assert "- `saflex_x` over `frozen(upstream=saflex)`: equivalent on 20 rows." in lines
    assert "- `saflex_x` over `none`: worse on 20 rows; not tested on 3,000 rows." in lines
    assert "| `saflex_x` over `none` | -1.00 worse (few seeds) | +1.00 not tested |" in lines
    equivalent = "| `saflex_x` over `frozen(upstream=saflex)` | +0.10 (-0.20 to 0.40) | equivalent"
    assert f"{equivalent} | 0.30 | 3.10 |" in lines
    assert "| `saflex_x` over `none` | +1.00 (–) | not tested |  | 3.10 |" in lines
    assert "## 3,000 rows: b(noise=0.4)" in lines
    assert "batch 8, 3 seeds" in " ".join(text.split())
    assert "without it (a row that is frozen" in " ".join(text.split())
    for suffix in ("md", "parquet"):  # another study of the same sets
        (tmp_path / f"two.{suffix}").write_bytes((tmp_path / f"one.{suffix}").read_bytes())
    (tmp_path / "two.md").write_text(STUDY.replace("over none", "over mixup"))
    text = guide.written(guide.of_pages(tmp_path))
    assert text.count("## 3,000 rows") == 1 and "2 training sets" in text
    assert text.count("| `saflex_x` over `frozen(upstream=saflex)` |") == 2  # overview, section
    assert "[one](results/one.md) and [two](results/two.md)" in text
    moved = f"\n{guide.MOVED}\n\n|  | data set | moved |\n| :-- | --: | --: |\n"
    rows = "| saflex\\_x | a | hardly learned |\n| saflex\\_x | b(noise=0.4) |  |\n"
    (tmp_path / "two.md").write_text(STUDY + moved + rows)
    text = " ".join(guide.written(guide.of_pages(tmp_path)).split())
    assert "Differences of `saflex_x` on 20 rows (a) say nothing about a learned policy" in text
    assert text.count("on 20 rows (a)") == 1 and "3,000 rows (b" not in text
    frame = pd.read_parquet(tmp_path / "one.parquet")
    frame[frame["row"] != "none"].to_parquet(tmp_path / "two.parquet")
    assert "two.md" not in guide.written(guide.of_pages(tmp_path))  # not over doing nothing
    frame.to_parquet(tmp_path / "two.parquet")
    (tmp_path / "two.md").write_text(STUDY.replace("test accuracy", "test AUC"))
    assert "two.md" not in guide.written(guide.of_pages(tmp_path))  # of a table, not of images
    (tmp_path / "one.md").write_text("no table")
    with pytest.raises(ValueError, match="found none"):
        guide.of_pages(tmp_path)


@pytest.mark.parametrize(
    ("name", "rows", "seeds"),
    [*zip(PAGES, (18 * 2 + 24, 31, 6 * 2), (10, 10, 5), strict=True)],
)
def test_every_row_has_all_its_runs_on_every_set(name: str, rows: int, seeds: int) -> None:
    runs = records_of(name).query("searched == ''").drop_duplicates("id")
    counted = runs.groupby(["row", "benchmark"], observed=True)["seed"].agg(["count", "nunique"])
    assert len(runs) == seeds * rows
    assert set(runs["status"]) == {"done"}
    assert len(counted) == rows
    assert (counted.to_numpy() == seeds).all()
    assert (RESULTS / f"{name}.parquet").stat().st_size < 2e6


@pytest.mark.parametrize(
    "name",
    [
        "few_labels",
        "generated_rows",
        "learnable_small",
        "learnable_tuned",
        "saflex_table2",
        "saflex_upstreams",
    ],
)
def test_the_page_quotes_the_prediction_of_the_file(name: str) -> None:
    file = (ROOT / "ray_configs" / f"{name}.yaml").read_text(encoding="utf-8")
    prediction = yaml.safe_load(file)["prediction"]
    page = (RESULTS / f"{name.replace('_', '-')}.md").read_text(encoding="utf-8")
    quoted = " ".join(re.findall(r"^> (.*)$", page, re.MULTILINE))
    assert quoted.split() == prediction.split()
