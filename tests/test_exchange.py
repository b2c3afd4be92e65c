"""What a method is worth in labelled rows."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from analysis import blocks, findings, records
from analysis.exchange import equal_rows, worth
from analysis.question import Question
from analysis.report import figures
from analysis.report.page import Options, report
from tests.made import make_run

ROWS = (100.0, 200.0, 400.0)


@pytest.mark.parametrize(
    ("scores", "at", "gain", "expected"),
    [
        ((80.0, 84.0, 88.0), 0, 4.0, 200.0),  # as accurate as with the next number
        ((80.0, 84.0, 88.0), 0, 2.0, 100 * math.sqrt(2)),  # halfway in the logarithm
        ((80.0, 84.0, 88.0), 1, -4.0, 100.0),
        ((80.0, 84.0, 88.0), 1, 0.0, 200.0),
        ((80.0, 84.0, 88.0), 1, 5.0, math.inf),
        ((80.0, 84.0, 88.0), 1, -5.0, 0.0),
        ((80.0, 80.0, 88.0), 1, 0.0, 200.0),  # a plateau: no gain is worth no row
        ((80.0, 80.0, 88.0), 0, 0.0, 100.0),
        ((84.0, 80.0, 88.0), 0, 0.0, 100.0),  # 82 and 82 after isotonic regression
        ((84.0, 80.0, 88.0), 0, 3.0, 200 * math.sqrt(2)),
        ((80.0, 84.0, 84.0), 0, 4.0, 200.0),  # of the plateau the nearest
    ],
)
def test_rows_with_which_the_base_is_as_good(
    scores: tuple[float, ...], at: int, gain: float, expected: float
) -> None:
    assert equal_rows(ROWS, scores, at, gain) == pytest.approx(expected)


def test_intervals_are_carried_through_the_curve() -> None:
    (one, other) = worth(ROWS, (80, 84, 88), [(2.0, (0.0, 4.0)), None, (0.0, None)])
    assert (one.rows, one.low, one.high) == pytest.approx((100, 100, 200))
    assert other.equal == pytest.approx(400) and math.isnan(other.low) and math.isnan(other.high)


def runs_by_labels(root: Path, levels: tuple[int, ...], seeds: int = 4) -> None:
    for place, level in enumerate(levels):
        for seed in range(seeds):
            for method, more in (("none", 0.0), ("mixup", 0.6), ("cutmix", -0.3)):
                folder = make_run(
                    root, method, seed, 0.8 + 0.6 * place + more, test_rows=300,
                    benchmark=f"digits(rows_per_class={level})",
                )  # fmt: skip
                path = folder / "result.json"
                result = json.loads(path.read_text())
                result["data"]["rows"]["train"] = 10 * level
                path.write_text(json.dumps(result))


def test_the_figure_of_a_report(tmp_path: Path) -> None:
    runs_by_labels(tmp_path / "runs", (10, 20, 40))
    (block,) = blocks.split(records.scan(tmp_path / "runs")[0])
    found = findings.findings(block, Question())
    line = figures._worth(block.columns, "mixup", "none", "accuracy")
    assert [each.rows for each in line] == [100, 200, 400]
    means = {
        (column.benchmark, row): np.mean(findings.scores(column.rows[row], "accuracy"))
        for column in block.columns
        for row in ("none", "mixup")
    }
    first, second = (f"digits(rows_per_class={level})" for level in (10, 20))
    rise = (means[first, "mixup"] - means[first, "none"]) / (
        means[second, "none"] - means[first, "none"]
    )
    assert line[0].equal == pytest.approx(100 * 2**rise) and 0 < rise < 2
    drawn = {each.name: each for each in figures.draw_all(block, found, 0.5, tmp_path, [".png"])}
    assert "exchange" in drawn and drawn["exchange"].paths[0].is_file()


def test_two_numbers_of_labels_are_too_few(tmp_path: Path) -> None:
    runs_by_labels(tmp_path / "runs", (10, 20))
    report(Options(tmp_path / "runs", tmp_path / "out", ["md"]))
    assert not list((tmp_path / "out" / "figures").rglob("exchange*"))
