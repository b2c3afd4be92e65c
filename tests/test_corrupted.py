"""Networks on corrupted test images: logits, scores, tables, and evaluation at a later time."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import augbench
from analysis import (
    comparison,
    corrupted,
    joined,
    metrics,
    packing,
    records,
    recordsfile,
    robustness,
    runs,
)
from analysis.differences import RowRuns, difference
from analysis.findings import Finding
from analysis.joined import Source
from analysis.numbers import p_value
from analysis.report import page
from benchmarks.cli import main
from benchmarks.data.names import parse_benchmark
from benchmarks.data.streams import rows_from_tensors
from benchmarks.studies import loading
from benchmarks.studies.cells import CORRUPTIONS, Cell
from benchmarks.studies.ledger import Ledger
from benchmarks.training import corrupted as evaluation
from benchmarks.training.errors import Interrupted
from benchmarks.training.progress import Silent
from benchmarks.training.tasks import MultiClass
from methods.medmnistc import REGISTRY, VERSION, corrupt
from methods.naming import NamingError
from tests.made import make_run

DIGITS = parse_benchmark("digits")
NAMES = ("gaussian_noise", "pixelate")


class Frozen(nn.Module):
    """A network whose backbone passes no gradient to its input."""

    def __init__(self, spec: Any) -> None:
        super().__init__()
        self.head = nn.Linear(int(np.prod(spec.shape)), spec.classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            inside = x.flatten(1).sqrt()
        return self.head(inside)


def never() -> bool:
    return False


def rows(count: int = 20) -> Any:
    rng = torch.Generator().manual_seed(0)
    x = torch.randint(256, (count, 1, 8, 8), generator=rng, dtype=torch.uint8)
    y = torch.eye(3)[torch.arange(count) % 3]
    return rows_from_tensors(x, y)


def linear() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))


def logits_on(network: nn.Module, of: Any, name: str = "common") -> dict[str, np.ndarray]:
    return evaluation.logits_on(network, of, MultiClass(), name, DIGITS, Silent(), never)


class TestLogits:
    def test_those_of_the_corrupted_images(self) -> None:
        network, of = linear(), rows()
        found = logits_on(network, of)
        assert [*found] == [
            "common:version", *(f"common:{name}" for name in REGISTRY["common"]), "common:fgsm",
        ]  # fmt: skip
        settings = torch.tensor([REGISTRY["common"]["pixelate"][3]] * 20, dtype=torch.float64)
        made = corrupt(of.inputs(torch.arange(20)), "common", "pixelate", settings)
        expected = network(made).detach().numpy()
        np.testing.assert_allclose(found["common:pixelate"][3], expected, rtol=1e-6)

    def test_every_network_sees_the_same_images_and_nothing_else_is_drawn(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Also where images are made batch by batch, and whatever was drawn before."""
        network, of = linear(), rows()
        torch.manual_seed(5)
        before = torch.get_rng_state()
        first = logits_on(network, of)
        assert torch.equal(torch.get_rng_state(), before)
        torch.rand(3)
        monkeypatch.setattr(evaluation, "KEPT", 0)
        second = logits_on(network, of)
        for key, logits in first.items():
            np.testing.assert_array_equal(logits, second[key])

    def test_fgsm_of_a_linear_network_is_its_closed_form(self) -> None:
        """The gradient of the loss is W^T (p - y), so x moves by epsilon times its sign."""
        network, of = linear(), rows(7)
        x, layer = of.inputs(torch.arange(7)), network[1]
        assert isinstance(layer, nn.Linear)
        slope = (network(x).softmax(dim=1) - of.y).detach() @ layer.weight.detach()
        found = logits_on(network, of)["common:fgsm"]
        for place, epsilon in enumerate(evaluation.EPSILONS):
            moved = (x + epsilon * slope.sign().view_as(x)).clamp(0, 1)
            expected = network(moved).detach().numpy()
            np.testing.assert_allclose(found[place], expected, rtol=1e-5, atol=1e-6)

    def test_the_network_stays_as_it_was(self) -> None:
        network = nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 3)
        )
        network.train()
        before = {name: each.clone() for name, each in network.state_dict().items()}
        logits_on(network, rows())
        assert network.training
        assert all(torch.equal(each, before[name]) for name, each in network.state_dict().items())
        assert all(each.grad is None for each in network.parameters())

    def test_it_stops_when_asked(self) -> None:
        calls = itertools.count()
        with pytest.raises(Interrupted, match="corrupted"):
            evaluation.logits_on(
                linear(), rows(), MultiClass(), "common", DIGITS, Silent(), lambda: next(calls) > 2
            )


class TestScores:
    @pytest.mark.parametrize("kind", ["multi-class", "binary-class", "multi-label"])
    def test_items_average_to_the_balanced_accuracy(self, kind: str) -> None:
        rng = np.random.default_rng(0)
        classes = 2 if kind == "binary-class" else 4
        logits = rng.normal(size=(50, classes)).astype(np.float32)
        targets = rng.choice(classes, 50, p=rng.dirichlet(np.ones(classes)))
        if kind == "multi-label":
            targets = (rng.random((50, classes)) < 0.3).astype(np.uint8)
            targets[:, 0] = 0  # a label that no row has
        expected = metrics.evaluate(logits, targets, kind)["balanced_accuracy"]
        values = metrics.item_values(logits, targets, kind, "balanced_accuracy")
        assert values.shape == (50,)
        assert values.mean() == pytest.approx(expected, abs=1e-12)

    @pytest.mark.parametrize("name", metrics.ON_CORRUPTED)
    def test_items_average_to_the_metric(self, name: str, tmp_path: Path) -> None:
        (record,) = records.read([made(tmp_path, "none", 0)])
        assert record.item_values(name).mean() == pytest.approx(record.metric(name), abs=1e-9)

    def test_by_hand(self, tmp_path: Path) -> None:
        (record,) = records.read([made(tmp_path, "none", 0)])
        stored, targets = record.arrays(corrupted.FILE), record.predictions["test_targets"]
        right = [
            np.mean([(stored[f"common:{name}"][s].argmax(1) == targets).mean() for s in range(5)])
            for name in NAMES
        ]
        assert record.metric("corrupted_accuracy") == pytest.approx(np.mean(right))
        recalls = [
            np.mean([
                np.mean([(stored[f"common:{name}"][s][targets == k].argmax(1) == k).mean()
                         for k in range(3)])
                for s in range(5)
            ])
            for name in NAMES
        ]  # fmt: skip
        error = 1 - np.mean(recalls)
        assert record.metric("corrupted_balanced_error") == pytest.approx(error)
        clean = 1 - record.metric("balanced_accuracy")
        assert record.metric("relative_balanced_error") == pytest.approx(error - clean)
        assert np.isnan(record.metric("corrupted_accuracy", when="selected"))

    def test_a_run_without_them_has_none(self, tmp_path: Path) -> None:
        (record,) = records.read([make_run(tmp_path)])
        assert all(np.isnan(record.metric(name)) for name in metrics.ON_CORRUPTED)


def made(root: Path, method: str, seed: int, skill: float = 1.0, of: str = "common") -> Path:
    """A made run with logits on two corruptions and under attack."""
    folder = make_run(root, method, seed, skill)
    stored = runs.read_arrays(folder / "predictions.npz")
    clean, targets = stored["test_last_logits"], stored["test_targets"]
    rng = np.random.default_rng([seed, len(method)])
    arrays = {f"{of}:version": np.array(VERSION)} | {
        f"{of}:{name}": np.stack([clean + s * rng.normal(size=clean.shape) for s in range(1, 6)])
        for name in (*NAMES, "fgsm")
    }
    save: Any = np.savez_compressed
    save(folder / corrupted.FILE, **arrays)
    result = json.loads((folder / "result.json").read_text())
    scores = corrupted.scores(arrays, of, targets, "multi-class")
    result["corrupted"] = {of: {"version": VERSION, "scores": scores}}
    result["files"][corrupted.FILE] = (folder / corrupted.FILE).stat().st_size
    (folder / "result.json").write_text(runs.to_json(result))
    return folder


def rows_of(root: Path) -> list[RowRuns]:
    return [
        RowRuns(name, "none", tuple(records.read(made(root, name, s, skill) for s in range(4))))
        for name, skill in (("none", 1.0), ("mixup", 2.0))
    ]


def row_of(root: Path, name: str, skill: float) -> RowRuns:
    return RowRuns(name, "none", tuple(records.read(made(root, name, s, skill) for s in range(4))))


class TestTables:
    def test_difference_is_the_paired_one_of_the_scores(self, tmp_path: Path) -> None:
        none, mixup = rows_of(tmp_path)
        found = robustness.compared(mixup, none, "corrupted_accuracy")
        assert found is not None
        own = [
            100 * (a.metric("corrupted_accuracy") - b.metric("corrupted_accuracy"))
            for a, b in zip(mixup.records, none.records, strict=True)
        ]
        assert found.estimate == pytest.approx(np.mean(own))
        assert found.population is not None
        assert found == difference(mixup, none, "corrupted_accuracy")

    def test_corrupted_accuracy_is_tested_over_rows_and_sets(self, tmp_path: Path) -> None:
        """By hand: Holm over two rows on two data sets, and no p-value for another metric."""
        pairs = []
        for place, column in enumerate(("one", "other")):
            none, mixup = rows_of(tmp_path / column)
            cutmix = row_of(tmp_path / column, "cutmix", 1.02 + place)
            for row in (mixup, cutmix):
                made = difference(row, none, "accuracy")
                pairs.append((Finding(row.name, "none", column, made, p=1.0), row, none))
        variances = [
            found.variances
            for _, row, none in pairs
            if (found := difference(row, none, "corrupted_accuracy")) and found.variances
        ]
        alone = [each.p_zero() for each in variances]
        order = np.argsort(alone)
        steps = np.maximum.accumulate([alone[p] * (4 - rank) for rank, p in enumerate(order)])
        expected = np.minimum(steps[np.argsort(order)], 1)
        assert (expected > alone).sum() >= 3
        judged = [each for each in robustness.on_corrupted(pairs, 0.5) if each is not None]
        assert [each.p for each in judged] == pytest.approx(expected)
        assert {each.verdict for each in judged} >= {"better"}
        table = robustness.differences_table(pairs, 0.5, "corrupted-differences")
        assert table is not None
        rows = [[cell.text for cell in row] for row in table.groups[0].rows]
        place = table.head.index("p (Holm)")
        for number, each in enumerate(judged):
            own, *others = rows[3 * number : 3 * number + 3]
            assert own[2] == "corrupted accuracy"
            assert (own[place], own[-1]) == (p_value(each.p), each.told)
            assert [(one[place], one[-1]) for one in others] == [("", "")] * 2
        assert "over 4 tested comparisons, a family apart from that of clean" in table.notes[0]

    def test_the_verdict_is_printed(self, tmp_path: Path) -> None:
        text = comparison.as_text([*rows_of(tmp_path), row_of(tmp_path, "cutmix", 1.0)])
        _, _, below = text.partition("Corrupted test images")
        (line,) = [each for each in below.splitlines() if each.startswith("mixup")]
        assert line.endswith(" better")
        assert "2 tested comparisons" in below.replace("\n  ", " ")

    def test_printed_below_the_scores(self, tmp_path: Path) -> None:
        text = comparison.as_text(rows_of(tmp_path), verbose=True)
        assert "Corrupted test images (common), last epoch, in per cent" in text
        assert "Balanced error under each corruption" in text
        assert "gaussian noise" in text
        assert "AlexNet" in text

    def test_a_comparison_without_them_says_nothing(self, tmp_path: Path) -> None:
        found = records.read([make_run(tmp_path, "none", 0), make_run(tmp_path, "none", 1)])
        assert "orrupted" not in comparison.as_text([RowRuns("none", "none", tuple(found))])

    def test_rows_on_other_corruptions_are_not_compared(self, tmp_path: Path) -> None:
        none, _ = rows_of(tmp_path)
        other = [made(tmp_path, "crop", s, of="medmnist-c") for s in range(4)]
        crop = RowRuns("crop", "none", tuple(records.read(other)))
        assert robustness.compared(crop, none, "corrupted_accuracy") is None

    def test_report_has_tables_and_figures(self, tmp_path: Path) -> None:
        rows_of(tmp_path / "runs")
        out = tmp_path / "report"
        page.report(page.Options(root=tmp_path / "runs", out=out, formats=("md", "csv")))
        text = (out / "report.md").read_text()
        assert "Corrupted test images" in text
        for name in ("corrupted", "corrupted-differences", "corruptions"):
            assert (out / "tables" / f"{name}.csv").is_file()
        for name in ("corruptions", "severities"):
            assert (out / "figures" / f"{name}.png").is_file()


class TestRecords:
    """Scores are where a user looks for those of clean images."""

    def test_lines_have_the_means_and_each_severity(self, tmp_path: Path) -> None:
        make_run(tmp_path, "none", 0)
        made(tmp_path, "mixup", 0)
        found, _ = records.scan(tmp_path)
        frame = records.frame(found)
        (record,) = [each for each in found if corrupted.set_of(each.result)]
        assert dict(zip(frame["id"], frame["corruptions"], strict=True)) == {
            each.run.id: "common" if each is record else "" for each in found
        }
        assert set(frame[frame["split"] == "common:pixelate:3"]["id"]) == {record.run.id}
        part = frame[(frame["when"] == "last") & (frame["id"] == record.run.id)]
        own = dict(zip(zip(part["split"], part["metric"], strict=True), part["value"], strict=True))
        for name in metrics.ON_CORRUPTED:
            assert own["test", name] == record.metric(name)
        stored, targets = record.arrays(corrupted.FILE), record.predictions["test_targets"]
        right = (stored["common:pixelate"][2].argmax(1) == targets).mean()
        assert own["common:pixelate:3", "accuracy"] == pytest.approx(right)
        assert {("common:fgsm:5", "auc"), ("common:gaussian_noise:1", "balanced_error")} <= {*own}

    def test_records_files(self, tmp_path: Path) -> None:
        make_run(tmp_path, "none", 0)
        made(tmp_path, "mixup", 0)
        found, _ = records.scan(tmp_path)
        recordsfile.write(found, tmp_path / "records.parquet")
        back = {each.run.id: each for each in recordsfile.read(tmp_path / "records.parquet")}
        text = records.to_csv([(each.run.method, [each]) for each in found])
        lines = {line["row"]: line for line in csv.DictReader(io.StringIO(text))}
        for each in found:
            line, robust = lines[each.run.method], corrupted.set_of(each.result)
            assert line["corruptions"] == robust
            for name in metrics.ON_CORRUPTED:
                value = each.metric(name)
                assert line[name] == (f"{value:.6g}" if robust else "")
                np.testing.assert_equal(back[each.run.id].metric(name), value)

    def test_a_table_shows_and_tests_them(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Runs on another set are not mixed with them."""
        rows = rows_of(tmp_path)
        made(tmp_path, "none", 4, skill=20.0, of="medmnist-c")
        asked = ["--metrics", "accuracy,corrupted_accuracy,relative_balanced_error"]
        assert main.run(["table", str(tmp_path), *asked]) == 0
        out = capsys.readouterr().out
        assert "corrupted accuracy ↑" in out and "relative balanced error ↓" in out
        assert "Corruptions of the test images: digits: common." in out
        assert "Not tested" not in out
        (line,) = [each for each in out.splitlines() if each.startswith("none")]
        mean = 100 * np.mean([each.metric("corrupted_accuracy") for each in rows[0].records])
        assert f"  {mean:.2f} ± " in line and "(n = 4)" in line
        numbers = augbench.table(tmp_path, metrics="corrupted_accuracy")
        counts = dict(zip(numbers.index, numbers["digits", "corrupted_accuracy", "n"], strict=True))
        assert counts == {"none": 4, "mixup": 4}

    def test_a_report_has_a_table_of_them_with_its_direction(self, tmp_path: Path) -> None:
        rows_of(tmp_path / "runs")
        out = tmp_path / "report"
        page.report(
            page.Options(
                root=tmp_path / "runs",
                out=out,
                formats=("csv",),
                metrics=("corrupted_balanced_error", "ece"),
            )
        )
        head = (out / "tables" / "corrupted_balanced_error.csv").read_text().splitlines()[0]
        assert "digits, % ↓" in head
        assert "digits ↓" in (out / "tables" / "ece.csv").read_text().splitlines()[0]


def versioned(folder: Path, version: int) -> Path:
    result = json.loads((folder / "result.json").read_text())
    for each in result["corrupted"].values():
        each["version"] = version
    (folder / "result.json").write_text(runs.to_json(result))
    return folder


class TestOneSet:
    """Tables hold one set of corruptions in one version."""

    def test_other_versions_are_not_paired(self, tmp_path: Path) -> None:
        none = RowRuns("none", "", tuple(records.read(made(tmp_path, "none", s) for s in range(4))))
        new = (versioned(made(tmp_path, "mixup", s), VERSION + 1) for s in range(4))
        mixup = RowRuns("mixup", "", tuple(records.read(new)))
        assert robustness.compared(mixup, none, "corrupted_accuracy") is None

    def test_seeds_of_two_sets_are_not_averaged(self, tmp_path: Path) -> None:
        found = [made(tmp_path, "none", s) for s in range(3)]
        found += [made(tmp_path, "none", s, of="medmnist-c") for s in (3, 4)]
        row = RowRuns("none", "", tuple(records.read(found)))
        (one,) = robustness.narrowed([row])
        assert robustness.sets_of([one]) == ["common"]
        assert [each.run.seed for each in robustness.evaluated(one)] == [0, 1, 2]
        table = robustness.brief_table([row], [], 0.5)
        assert table is not None and "(common)" in table.title
        mean = np.mean([100 * e.metric("corrupted_accuracy") for e in row.records[:3]])
        assert table.groups[0].rows[0][3].text.startswith(f"{mean:.1f}")

    def test_a_run_on_two_sets_is_compared_on_the_common_one(self, tmp_path: Path) -> None:
        both = made(tmp_path, "none", 0)
        other = made(tmp_path / "other", "none", 0, of="medmnist-c")
        result = json.loads((both / "result.json").read_text())
        result["corrupted"] |= json.loads((other / "result.json").read_text())["corrupted"]
        (both / "result.json").write_text(runs.to_json(result))
        none = RowRuns("none", "", tuple(records.read([both])))
        mixup = RowRuns("mixup", "", tuple(records.read([made(tmp_path, "mixup", 0)])))
        found = robustness.compared(mixup, none, "corrupted_accuracy")
        alone = records.read([made(tmp_path / "alone", "none", 0)])[0]
        assert found is not None and found.estimate == pytest.approx(
            100
            * (mixup.records[0].metric("corrupted_accuracy") - alone.metric("corrupted_accuracy"))
        )

    def test_scores_are_computed_anew(self, tmp_path: Path) -> None:
        folder = made(tmp_path, "none", 0)
        (before,) = records.read([folder])
        result = json.loads((folder / "result.json").read_text())
        result["corrupted"]["common"]["scores"]["pixelate"]["accuracy"] = [0.0] * 5
        (folder / "result.json").write_text(runs.to_json(result))
        (wrong,) = records.read([folder])
        assert wrong.metric("corrupted_accuracy") < before.metric("corrupted_accuracy")
        again = records.recomputed(wrong)
        assert again.metric("corrupted_accuracy") == before.metric("corrupted_accuracy")

    def test_pooled_runs_keep_them(self, tmp_path: Path) -> None:
        make_run(tmp_path / "a", "none", 0)
        made(tmp_path / "b", "none", 0)
        sources = [Source(tmp_path / n, *records.scan(tmp_path / n)) for n in "ab"]
        (kept,), _, told = joined.pooled(sources)
        assert "corrupted" in kept.result and not any("differ" in each for each in told)


def test_unknown_sets_and_benchmarks_without_a_set(tmp_path: Path) -> None:
    with pytest.raises(NamingError, match="expected medmnist-c or common, got 'medmnist'"):
        evaluation.settings_of("medmnist", DIGITS)
    with pytest.raises(NamingError, match="medmnist-c has none for digits, only for the twelve"):
        evaluation.settings_of("medmnist-c", DIGITS)
    assert evaluation.settings_of("medmnist-c", parse_benchmark("breastmnist"))[0] == "breastmnist"
    file = tmp_path / "study.yaml"
    file.write_text("corruptions: medmnist-c\nbenchmarks: digits\nmethods: none\nseeds: 1\n")
    with pytest.raises(ValueError, match="medmnist-c has none for digits"):
        loading.load(file)


BASE = [
    "run", "--benchmark", "digits(rows_per_class=5)", "--model", "small_cnn(width=0.25)",
    "--epochs", "1", "--device", "cpu",
]  # fmt: skip


def result_of(out: Path) -> tuple[Path, dict[str, Any]]:
    (folder,) = runs.folders(out)
    result = runs.read_result(folder)
    assert result is not None
    return folder, result


def test_with_the_training_or_later_from_the_saved_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    now, later = tmp_path / "now", tmp_path / "later"
    assert main.run([*BASE, "--out", str(now), "--corruptions", "common"]) == 0
    assert "test under common: corrupted_accuracy" in capsys.readouterr().out
    assert main.run([*BASE, "--out", str(later), "--save-model"]) == 0
    folder, before = result_of(later)
    times = (folder / "timing.jsonl").read_bytes()
    assert main.run([*BASE, "--out", str(later), "--corruptions", "common"]) == 0
    folder, after = result_of(later)
    assert (folder / "timing.jsonl").read_bytes() == times  # nothing was trained
    first, _ = result_of(now)
    assert first.name == folder.name
    one, other = (runs.read_arrays(each / corrupted.FILE) for each in (first, folder))
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[key], other[key]) for key in one)
    added = {"corrupted"}
    assert {*after} - {*before} == added
    assert corrupted.FILE in after["files"]
    assert corrupted.FILE in packing.FILES
    assert corrupted.has(folder, "common", VERSION)
    assert not corrupted.has(folder, "common", VERSION + 1)
    assert not corrupted.has(folder, "medmnist-c", VERSION)


def test_without_a_saved_network_it_is_trained_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run([*BASE, "--out", str(tmp_path)]) == 0
    folder, before = result_of(tmp_path)
    assert main.run([*BASE, "--out", str(tmp_path), "--corruptions", "common"]) == 0
    assert "so it is trained again" in capsys.readouterr().err
    folder, after = result_of(tmp_path)
    assert after["metrics"] == before["metrics"]
    assert (folder / corrupted.FILE).is_file()


def test_a_network_that_is_not_the_run_s_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run([*BASE, "--out", str(tmp_path), "--save-model"]) == 0
    folder, before = result_of(tmp_path)
    weights = torch.load(folder / "model.pt", weights_only=True)
    torch.save({name: torch.ones_like(each) for name, each in weights.items()}, folder / "model.pt")
    before["files"]["model.pt"] = (folder / "model.pt").stat().st_size
    (folder / "result.json").write_text(runs.to_json(before))
    assert main.run([*BASE, "--out", str(tmp_path), "--corruptions", "common"]) == 1
    assert "are not those of the run" in capsys.readouterr().err
    assert result_of(tmp_path)[1] == before


def with_network(name: str) -> list[str]:
    return [
        each.replace("small_cnn(width=0.25)", f"py:tests.test_corrupted:{name}") for each in BASE
    ]


def killed_at_the_last_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second result.json that is written kills the process."""
    written, own = [], runs.write_text

    def write(path: Path, text: str, shared: bool = False) -> None:
        if path.name == "result.json":
            written.append(path)
            if len(written) == 2:
                raise KeyboardInterrupt
        own(path, text, shared)

    monkeypatch.setattr(runs, "write_text", write)


def test_killed_before_the_result_is_written_it_is_evaluated_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main.run([*BASE, "--out", str(tmp_path), "--save-model"]) == 0
    with monkeypatch.context() as patched:
        killed_at_the_last_write(patched)
        main.run([*BASE, "--out", str(tmp_path), "--corruptions", "common"])
    folder, result = result_of(tmp_path)
    assert "corrupted" not in result and (folder / corrupted.FILE).is_file()
    assert not corrupted.has(folder, "common", VERSION)
    assert main.run([*BASE, "--out", str(tmp_path), "--corruptions", "common"]) == 0
    folder, result = result_of(tmp_path)
    assert corrupted.has(folder, "common", VERSION) and "common" in result["corrupted"]


def test_a_damaged_file_is_made_again(tmp_path: Path) -> None:
    command = [*BASE, "--out", str(tmp_path), "--corruptions", "common"]
    assert main.run([*command, "--save-model"]) == 0
    folder, before = result_of(tmp_path)
    (folder / corrupted.FILE).write_bytes(b"x")
    assert main.run(command) == 0
    assert result_of(tmp_path)[1]["corrupted"] == before["corrupted"]


def test_a_network_without_a_gradient_has_everything_but_the_attack(tmp_path: Path) -> None:
    base = [
        each.replace("small_cnn(width=0.25)", "py:tests.test_corrupted:Frozen") for each in BASE
    ]
    assert main.run([*base, "--out", str(tmp_path), "--corruptions", "common"]) == 0
    scores = result_of(tmp_path)[1]["corrupted"]["common"]["scores"]
    assert "pixelate" in scores and "fgsm" not in scores


def test_a_run_that_cannot_be_evaluated_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object) -> None:
        raise ValueError("no such thing")

    monkeypatch.setattr(evaluation, "logits_on", fails)
    command = [*BASE, "--out", str(tmp_path), "--corruptions", "common"]
    assert main.run(command) == 0
    folder, result = result_of(tmp_path)
    assert result["status"] == "done" and result["metrics"]["last"]["test"]["accuracy"] >= 0
    assert "no such thing" in result["corrupted_failed"]["common"]["reason"]
    assert "not evaluated under common, but done" in capsys.readouterr().err
    times = (folder / "timing.jsonl").stat().st_mtime_ns
    assert main.run(command) == 0
    assert (folder / "timing.jsonl").stat().st_mtime_ns == times, "it is not tried again"
    retried = [*command, "--retry-failed"]
    assert main.run(retried) == 0
    assert (folder / "timing.jsonl").stat().st_mtime_ns > times
    assert "no such thing" in result_of(tmp_path)[1]["corrupted_failed"]["common"]["reason"]
    monkeypatch.undo()
    assert main.run(retried) == 0
    result = result_of(tmp_path)[1]
    assert "common" in result["corrupted"] and not result.get("corrupted_failed")


def test_a_failed_evaluation_is_retried_once_by_a_command(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "none", 0)
    stored = json.loads((folder / "result.json").read_text())
    text = runs.to_json(stored | {corrupted.FAILED: {"common": {"version": VERSION, "reason": ""}}})
    (folder / "result.json").write_text(text)
    run, recorded = runs.read_run(folder)

    def cell(corruptions: str) -> Cell:
        return Cell(run, DIGITS, {**recorded, CORRUPTIONS: corruptions})

    asked, other = cell("common"), cell("")
    assert not Ledger(tmp_path, 0).to_do(asked)
    ledger = Ledger(tmp_path, 0, retry_failed=True)
    assert ledger.to_do(asked) and not ledger.to_do(other), "as a dry run says"
    ledger.begin([other])
    assert not Ledger(tmp_path, 0).to_do(asked)
    ledger = Ledger(tmp_path, 0, retry_failed=True)
    ledger.begin([asked])
    assert ledger.to_do(asked)
    (folder / "result.json").write_text(text)  # it fails again
    ledger.begin([asked])
    assert not ledger.to_do(asked)


def test_a_later_evaluation_builds_what_the_method_needed(tmp_path: Path) -> None:
    """Features of a network that is not ours are found when its method needs them."""
    base = with_network("plain")
    command = [*base, "--method", "isda", "--out", str(tmp_path)]
    assert main.run([*command, "--save-model"]) == 0
    assert main.run([*command, "--corruptions", "common"]) == 0
    assert "common" in result_of(tmp_path)[1]["corrupted"]


def test_training_again_keeps_the_sets_that_were_evaluated(tmp_path: Path) -> None:
    base = [each.replace("digits(rows_per_class=5)", "breastmnist") for each in BASE]
    if not (Path(os.environ.get("AUGBENCH_DATA", "")) / "medmnist").is_dir():
        pytest.skip("needs AUGBENCH_DATA with BreastMNIST")
    command = [*base, "--width", "0.1", "--out", str(tmp_path)]
    command[command.index("--model") + 1] = "small_cnn"
    for name in ("common", "medmnist-c"):
        assert main.run([*command, "--corruptions", name]) == 0
    assert set(result_of(tmp_path)[1]["corrupted"]) == {"common", "medmnist-c"}


def plain(spec: Any) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(spec.shape[0], 4, 3, stride=2), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, spec.classes),
    )  # fmt: skip
