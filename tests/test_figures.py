"""The forest plot and the records that a comparison leaves."""

import csv
import math
from dataclasses import replace
from pathlib import Path

import pytest

from analysis import records
from analysis.differences import RowRuns, difference
from analysis.report import figures
from analysis.report.figures import common_upstream, draw_forest
from analysis.report.plots import Bar
from tests.test_tables import record, row

LONG = "crop(pad=2)+gaussian_noise"


def drawn(monkeypatch: pytest.MonkeyPatch, rows: list[RowRuns], **arguments: str) -> list[Bar]:
    """The bars that would be drawn."""
    kept: list[Bar] = []
    monkeypatch.setattr(figures, "forest", lambda bars, **_: kept.extend(bars))
    draw_forest(rows, Path("unused.png"), **arguments)
    return kept


def failed(method: str) -> RowRuns:
    one = record(method, 0, 0.5)
    return RowRuns(method, "none", (replace(one, result={"status": "failed", "reason": "so"}),))


def test_bars_are_the_differences_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    base, ours = row("none", 6, 0.5), row("mixup", 6, 1.5)
    found = difference(ours, base, "accuracy")
    assert found is not None and found.training is not None and found.population is not None
    first, second = drawn(monkeypatch, [base, ours])
    assert math.isnan(first.difference) and first.training is None
    assert second.difference == found.estimate
    assert second.training == (found.training.low, found.training.high)
    assert second.population == (found.population.low, found.population.high)
    assert second.values == [100 * each.metric("accuracy") for each in ours.records]


def test_a_row_that_failed_is_left_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    bars = drawn(monkeypatch, [row("none", 4, 0.5), failed("mixup")])
    assert bars[1].values == [] and math.isnan(bars[1].difference)


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_a_figure_is_written_even_where_a_row_failed(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"forest.{suffix}"
    draw_forest([row("none", 5, 0.5), row("mixup", 5, 1.0), failed("crop")], path)
    assert path.stat().st_size > 5_000


def test_nothing_to_draw_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no run has ended"):
        draw_forest([failed("none")], tmp_path / "forest.png")


def test_a_long_upstream_of_several_rows_is_called_u(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [LONG, f"{LONG}@train", f"saflex(upstream={LONG})"]
    rows = [replace(row("none", 4, 0.5), name=name, upstream=LONG) for name in names]
    assert common_upstream(rows) == LONG
    assert [bar.name for bar in drawn(monkeypatch, rows)] == ["U", "U@train", "saflex(upstream=U)"]
    assert common_upstream([replace(each, upstream="crop") for each in rows]) == ""
    assert common_upstream(rows[:1]) == ""


def test_records_hold_a_line_a_run() -> None:
    rows = [row("none", 3, 0.5), failed("mixup")]
    lines = list(csv.DictReader(records.to_csv((r.name, r.records) for r in rows).splitlines()))
    assert [line["row"] for line in lines] == ["none"] * 3 + ["mixup"]
    assert [line["seed"] for line in lines] == ["0", "1", "2", "0"]
    for line, each in zip(lines, rows[0].records, strict=False):
        assert float(line["accuracy"]) == pytest.approx(each.metric("accuracy"), rel=1e-5)
        assert float(line["auc"]) == pytest.approx(each.metric("auc"), rel=1e-5)
        assert line["id"] == each.run.id and line["status"] == "done"
    assert lines[3]["status"] == "failed" and lines[3]["reason"] == "so"
    assert lines[3]["accuracy"] == "" and lines[3]["passes_per_row"] == ""


def test_records_tell_how_wrong_labels_were_found_where_some_were() -> None:
    def lines(rows: list[RowRuns]) -> list[dict[str, str]]:
        return list(csv.DictReader(records.to_csv((r.name, r.records) for r in rows).splitlines()))

    plain = row("none", 3, 0.5)
    assert "weight_auc" not in lines([plain])[0]
    found = {"weight_auc": 0.75, "corrected": 0.25, "spoiled": None}
    learned = [replace(each, result={**each.result, "detection": found}) for each in plain.records]
    plain, other = lines([plain, replace(plain, name="l", records=tuple(learned))])[2:4]
    assert [plain[name] for name in records.DETECTION] == ["", "", ""]
    assert [other[name] for name in records.DETECTION] == ["0.75", "0.25", ""]
