"""Short names of rows and data sets: in every table and figure, with the full names in a legend."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import ClassVar

import pytest
import yaml

import methods
from analysis import blocks, facts, findings, question, records, runs
from analysis.comparison import as_text
from analysis.differences import RowRuns
from analysis.labels import label_of
from analysis.question import Question
from analysis.report import figures, sentences, tables
from analysis.report.page import Options, report
from analysis.studyfile import StudyError
from benchmarks.cli import main
from benchmarks.data.names import parse_benchmark
from benchmarks.data.splits import Protocol
from benchmarks.studies import cells
from benchmarks.studies.plan import Plan
from methods import BUILTIN, Entry
from methods.base import Batch, Context, Method
from tests.made import make_run
from tests.test_study import SMALL, load, refused

SAFLEX = "saflex(upstream=mixup)"
LABELS = {"none": "No Aug", "mixup": "Mixup", SAFLEX: "SAFLEX (w/ Mixup)", "digits": "Digits"}


class Mine(Method):
    """A method of somebody else that has a short name."""

    short_name: ClassVar[str] = "My Aug"

    def __init__(self, *, upstream: Method | None = None, rate: float = 0.5) -> None:
        super().__init__(upstream)
        self.rate = rate

    def augment(self, batch: Batch, ctx: Context) -> Batch:
        return batch


@pytest.fixture
def mine(monkeypatch: pytest.MonkeyPatch) -> None:
    """That method under the name mine."""
    own = {"mine": Entry(f"{__name__}:Mine", "plug-in")}
    monkeypatch.setattr(methods, "registry", lambda: {**BUILTIN, **own})


@pytest.mark.parametrize(
    ("row", "label"),
    [
        ("none", "No Aug"),
        (SAFLEX, "SAFLEX (w/ Mixup)"),
        ("mixup@train", "Mixup@train"),
        ("mixup {crossfit 5}", "Mixup {crossfit 5}"),
        (f"none [passes of {SAFLEX}]", "No Aug [passes of SAFLEX (w/ Mixup)]"),
        (f"crop [time of {SAFLEX}]", "crop [time of SAFLEX (w/ Mixup)]"),
        (f"{SAFLEX}@dirty", "SAFLEX (w/ Mixup)@dirty"),
        ("mixup(alpha=0.2)", "mixup(alpha=0.2)"),
        (f"shuffled_weights(upstream={SAFLEX})", f"shuffled_weights(upstream={SAFLEX})"),
    ],
)
def test_the_label_of_a_row(row: str, label: str) -> None:
    assert label_of(row, LABELS) == label


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four rows and a control of four seeds on two data sets, and no study file."""
    made = tmp_path_factory.mktemp("runs")
    for benchmark in ("digits", "digits(noise=0.4)"):
        for seed in range(4):
            make_run(made, "none", seed, 0.2, benchmark=benchmark)
            make_run(made, "mixup", seed, 1.0, benchmark=benchmark, cost=2.0)
            make_run(made, SAFLEX, seed, 2.0, benchmark=benchmark, cost=6.0, meta=9)
            make_run(made, "mixup", seed, 0.5, benchmark=benchmark, control="train")
            of = {"budget": f"passes of {SAFLEX}", "epochs": 9}
            make_run(made, "mixup", seed, 0.5, benchmark=benchmark, **of)  # type: ignore[arg-type]
    return made


def test_labels_change_names_alone(root: Path) -> None:
    found = records.scan(root)[0]
    (plain,), (block,) = blocks.split(found), blocks.split(found, LABELS)
    assert [(each.name, each.row) for each in block.compared] == [
        ("No Aug", "none"), ("Mixup", "mixup"), ("SAFLEX (w/ Mixup)", SAFLEX),
    ]  # fmt: skip
    assert [each.name for each in block.columns] == ["Digits", "digits(noise=0.4)"]
    names = {entry.row: entry.name for entry in block.entries}
    for one, other in zip(plain.entries, block.entries, strict=True):
        assert (one.row, one.facts) == (other.row, other.facts)
        base = plain.baseline(one)
        assert block.baseline(other) == names.get(base, "")
        assert block.controls_of(other) == [names[each] for each in plain.controls_of(one)]
    asked = Question(family=((SAFLEX, "mixup"), ("mixup", "")))
    before, after = findings.findings(plain, asked), findings.findings(block, asked)
    assert [(names[f.row], names[f.base], f.difference, f.verdict) for f in before] == [
        (f.row, f.base, f.difference, f.verdict) for f in after
    ]
    over, reason = findings.overall(block, after, 0.5)
    assert reason == findings.overall(plain, before, 0.5)[1]
    assert over == findings.overall(block, after, 0.5)[0] == []  # sizes and corruptions are one set


@pytest.mark.usefixtures("undrawn")
def test_a_report_names_rows_by_their_labels_and_tells_the_full_names(
    root: Path, tmp_path: Path
) -> None:
    study = {"labels": {**LABELS, "saflex( upstream = mixup )": "SAFLEX (w/ Mixup)"}}
    del study["labels"][SAFLEX]
    (root / "study.yaml").write_text(yaml.safe_dump(study))
    try:
        report(Options(root, tmp_path / "out", ["md", "tex", "csv"]))
    finally:
        (root / "study.yaml").unlink()
    report(Options(root, tmp_path / "plain", ["md", "tex", "csv"]))
    for folder in ("out", "plain"):
        assert (tmp_path / folder / "tables" / "accuracy.csv").is_file()
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    shown = text.split("## small", 1)[1].split("## Runs without a result")[0]
    names, rest = shown.split("**Names in full**")[1].split("\n\n**", 1)
    assert "saflex(upstream=mixup)" in names and "No Aug [passes of" not in names
    before = shown.split("**Names in full**")[0]
    for part in (before, rest):
        assert "SAFLEX (w/ Mixup)" in part and "saflex(upstream" not in part
        assert "Mixup@train" in part and "mixup@train" not in part
    (plain,) = (tmp_path / "plain").glob("tables/accuracy.csv")
    labelled = (tmp_path / "out" / "tables" / "accuracy.csv").read_text()
    for row in ("none", "mixup", SAFLEX):
        (ours,) = [x for x in plain.read_text().splitlines() if x.startswith(f",{row},")]
        assert ours.replace(f",{row},", f",{LABELS[row]},", 1) in labelled.splitlines()
    assert not (tmp_path / "plain" / "tables" / "names.csv").exists()


def test_commands_are_those_of_the_rows_themselves(root: Path) -> None:
    (block,) = blocks.split(records.scan(root)[0], LABELS)
    (command,) = sentences.commands(block, block.columns[0], root)
    assert "--benchmark digits" in command and "No Aug" not in command
    assert f"none,mixup,'{SAFLEX}',mixup@train" in command.replace('"', "'") or SAFLEX in command


def test_a_labelled_data_set_heads_its_levels_of_corruption(root: Path) -> None:
    (block,) = blocks.split(records.scan(root)[0], LABELS)
    ((heading, parameter, levels),) = figures.corrupted(block.columns)
    assert (heading, parameter) == ("Digits", "noise")
    assert [(level, column.name) for level, column in levels] == [
        (0.0, "Digits"), (0.4, "digits(noise=0.4)"),
    ]  # fmt: skip


@pytest.mark.parametrize("label", ["mixup", "No Aug"])
def test_one_label_for_two_rows_is_refused(
    label: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = records.scan(root)[0]
    with pytest.raises(methods.NamingError, match=f"got '{label}' for "):
        blocks.split(found, {"none": label, SAFLEX: "No Aug"})
    (root / "study.yaml").write_text(yaml.safe_dump({"labels": {"none": "A", "mixup": "A"}}))
    try:
        assert main.run(["report", str(root), "--out", str(tmp_path)]) == 2
    finally:
        (root / "study.yaml").unlink()
    said = capsys.readouterr().err
    assert (
        "line 1: labels: expected a different label for each name, got 'A' for mixup and none"
        in said
    )


def test_a_study_takes_labels_for_rows_and_benchmarks(tmp_path: Path) -> None:
    text = SMALL.replace("[none, mixup]", "[none, mixup, saflex(upstream=mixup)]\ncontrols: true")
    spelled = "labels: {'saflex(preset=published, upstream = mixup)': SAFLEX, digits: Digits}\n"
    made = load(tmp_path, text + spelled)
    Plan(made, tmp_path).check_labels()
    assert made.asked()["labels"] == {SAFLEX: "SAFLEX", "digits": "Digits"}
    assert "labels" not in load(tmp_path, text).asked()
    place = tmp_path / "study.yaml"
    place.write_text(yaml.safe_dump(made.asked()))
    assert question.read(tmp_path).labels == {SAFLEX: "SAFLEX", "digits": "Digits"}
    plain = load(tmp_path, text)
    of = [
        [c.run.id for e in Plan(m, tmp_path).experiments for c in e.cells()] for m in (made, plain)
    ]
    assert of[0] == of[1], "a label is no part of an id"


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ("{mixupp: M}", "labels: unknown method 'mixupp'; did you mean 'mixup'"),
        ("{crop: C}", "labels: unknown row or data set 'crop'"),
        ("{breastmnist: B}", "labels: unknown row or data set 'breastmnist'"),
        ("{mixup: M, 'mixup( )': N}", "labels: expected one label for mixup, got 'M' and 'N'"),
    ],
)
def test_a_label_of_nothing_is_refused(labels: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(StudyError) as caught:
        Plan(load(tmp_path, f"{SMALL}labels: {labels}\n"), tmp_path).check_labels()
    assert said in str(caught.value)


def test_labels_that_are_no_texts_are_refused_with_their_line(tmp_path: Path) -> None:
    assert "line 5: labels: expected a label for mixup, got none" in refused(
        tmp_path, f"{SMALL}labels: {{mixup: ' '}}\n"
    )
    assert "line 5: labels" in refused(tmp_path, f"{SMALL}labels: [mixup]\n")
    assert "line 5: labels.mixup" in refused(tmp_path, f"{SMALL}labels: {{mixup: 5}}\n")


@pytest.mark.usefixtures("mine")
def test_a_method_declares_its_label(tmp_path: Path) -> None:
    assert methods.label("mine") == "My Aug"
    assert methods.label("mine(rate=0.2)") == "My Aug(rate=0.2)"
    assert methods.label("crop+mine(rate=0.2)") == "crop+My Aug(rate=0.2)"
    assert methods.label("saflex(upstream=mine)") == "saflex(upstream=My Aug)"
    assert methods.label("mixup") == methods.label("crop+flip") == ""
    row = cells.parse_row("mine(rate=0.2)", Protocol())
    training = cells.training_of("medmnist", {})
    made = cells.make_cell(
        row, parse_benchmark("digits"), "small_cnn", training, Protocol(), 0, checksum="c"
    )
    assert made.recorded[facts.ROW]["label"] == "My Aug(rate=0.2)"
    for method in ("none", "mine(rate=0.2)"):
        run = runs.Run(benchmark="digits", data="c", model="small_cnn", method=method)
        told = facts.facts_of(run, methods.takes_upstream, False, False, (), methods.label(method))
        for seed in range(2):
            recorded = {facts.ROW: asdict(told)}  # type: ignore[call-overload]
            make_run(tmp_path, method, seed, recorded=recorded)
    found = records.scan(tmp_path)[0]
    (block,) = blocks.split(found)
    assert [entry.name for entry in block.entries] == ["none", "My Aug(rate=0.2)"]
    (other,) = blocks.split(found, {"mine(rate=0.2)": "Ours"})
    assert [entry.name for entry in other.entries] == ["none", "Ours"]
    rows = [
        RowRuns(e.row, "none", tuple(block.columns[0].rows[e.name].records)) for e in block.entries
    ]
    text = as_text(rows)
    assert "My Aug(rate=0.2)" in text.split("Names in full")[0]
    assert "mine(" not in text.split("Names in full")[0]
    assert "Names in full: My Aug(rate=0.2) = mine(rate=0.2)." in text


def test_a_printed_comparison_has_the_labels_of_its_study(root: Path) -> None:
    (block,) = blocks.split(records.scan(root)[0])
    rows = list(block.columns[0].rows.values())
    text = as_text(rows, labels=LABELS)
    body, legend = text.split("Names in full: ")
    assert "SAFLEX (w/ Mixup)" in body and "saflex(" not in body
    assert legend.startswith("No Aug = none; Mixup = mixup; SAFLEX (w/ Mixup) = saflex(")
    plain = as_text(rows)
    # the ratio to the upstream, which is labelled too, and all else is as without labels
    assert body.count("3.00") == plain.count("3.00") > 0
    with pytest.raises(methods.NamingError, match="got 'mixup' for none and mixup"):
        as_text(rows, labels={"none": "mixup"})


def test_the_legend_is_a_table_of_names_alone(root: Path) -> None:
    found = records.scan(root)[0]
    (plain,), (block,) = blocks.split(found), blocks.split(found, LABELS)
    assert tables.names_table(plain, "names") is None
    made = tables.names_table(block, "names")
    assert made is not None
    told = {row[0].text: row[1].text for row in made.groups[0].rows}
    assert told["Digits"] == "digits" and told["Mixup@train"] == "mixup@train"
    assert json.dumps(told).count("digits(noise") == 0
