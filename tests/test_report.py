"""The report: complete, self-contained, and claiming nothing that an interval does not show."""

import csv
import itertools
import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from analysis import (
    blocks,
    contents,
    findings,
    question,
    records,
    words,
)
from analysis.comparison import as_text
from analysis.findings import Finding
from analysis.question import Question
from analysis.report import (
    figures,
    plots,
    results,
    searches,
    sentences,
    tables,
)
from analysis.report.page import TABLES, NoRuns, Options, report
from analysis.report.plots import Point
from analysis.studyfile import StudyError
from benchmarks.cli import main
from benchmarks.running import disk
from tests.made import declared, make_run
from tests.test_blocks import SAFLEX, made
from tests.test_cli import SMALL, save

HOSTILE = "<script>alert('m')</script>|_%$x$\n日本"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four rows of four seeds, one of them failed, and a study file; and the report of it."""
    root = tmp_path_factory.mktemp("runs")
    for seed in range(4):
        make_run(root, "none", seed, 0.2)
        make_run(root, "mixup", seed, 3.0)
        make_run(root, SAFLEX, seed, 3.0, cost=2.0, learned=True, meta=9)
        make_run(root, "mixup", seed, 3.0, control="train")
        make_run(root, HOSTILE, seed, status="failed", reason=HOSTILE)
    study = {"question": HOSTILE, "margin": 1.5, "prediction": "mixup is better"}
    (root / "study.yaml").write_text(json.dumps({**study, "benchmarks": ["digits"]}))
    report(Options(root, root / "out", published=True))
    return root / "out"


def test_the_page_is_one_file_without_script_or_network(small: Path) -> None:
    text = (small / "report.html").read_text(encoding="utf-8")
    assert "<script" not in text
    for found in re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')>\s]+)""", text):
        assert found.startswith("data:image/svg+xml;base64,")
    assert "&lt;script&gt;alert(&#39;m&#39;)&lt;/script&gt;|_%$x$ 日本" in text
    assert text.count("<img") == len(list((small / "figures").glob("*.svg"))) >= 6


def test_markdown_names_its_figures_and_shows_the_same_numbers(small: Path) -> None:
    text = (small / "report.md").read_text(encoding="utf-8")
    named = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert named and all((small / name).stat().st_size > 3000 for name in named)
    page = (small / "report.html").read_text(encoding="utf-8")
    cells = re.findall(r"\d\d\.\d\d ± \d+\.\d\d", text)
    assert len(cells) >= 6 and sorted(cells) == sorted(re.findall(r"\d\d\.\d\d ± \d+\.\d\d", page))
    for name, mark in (("accuracy.tex", r" $\pm$ "), ("accuracy.csv", " ± ")):
        own = re.findall(r"\d\d\.\d\d ± \d+\.\d\d",
                         (small / "tables" / name).read_text().replace(mark, " ± "))  # fmt: skip
        assert own == cells[: len(own)] and len(own) == 4
    assert "<script" not in re.sub(r"(?s)```sh\n.*?```", "", text)  # a code block acts on nothing


def test_what_a_reader_is_told(small: Path) -> None:
    text = (small / "report.md").read_text(encoding="utf-8")
    assert "**Prediction.** mixup is better" in text
    assert "**Answer. 3 comparisons of test accuracy, differences in points. Better" in text
    assert re.search(r"\. Better \(few seeds\): mixup over none \(\+\d+\.\d\d\)\. ", text)
    assert "mixup over none on digits: +" in text and "family of 2" in text
    assert re.search(r"beyond the margin of 1\.5", text)
    assert "20 runs: 16 done, 4 failed" in text
    assert "a machine (16 runs)" in text and "2.13.0 (16 runs)" in text
    assert "4 seeds; 30 are recommended for 60 test rows" in text
    assert (
        "augbench compare --benchmark digits --model small\\_cnn" not in text
    )  # no escapes in code
    assert "augbench compare --benchmark digits --model small_cnn" in text
    row = next(line for line in text.split("\n") if "alert" in line and "failed" in line)
    assert "0 to 3" in row


def test_answer_tables_and_figures_come_first_and_definitions_last_and_once(small: Path) -> None:
    text = (small / "report.md").read_text(encoding="utf-8").replace("\\", "")
    page = (small / "report.html").read_text(encoding="utf-8")
    for shown in (text, page):
        order = ["Question.", "Answer.", "Prediction.", "Test accuracy, %, mean", "Test AUC, %",
                 "Paired differences in test accuracy", "Differences in test accuracy, last epoch",
                 "Training cost, medians", "Do controls explain the gains?", "Learning curves",
                 "Runs without a result", "Protocol equal.", "Versions and hardware",
                 "Reproducing the runs", "Definitions", "Reproducing this report"]  # fmt: skip
        places = [shown.index(part) for part in order]
        assert places == sorted(places)
        for told in words.WORDS["differences"].values():
            assert shown.count(told.replace("'", "&#39;") if shown is page else told) == 1


DOCS = Path(__file__).parent.parent / "docs" / "reports.md"


def test_the_docs_define_the_terms_as_reports_do() -> None:
    text = DOCS.read_text(encoding="utf-8")
    for name in words.WORDS:
        listed = "".join(f"- **{term}**: {told}\n" for term, told in words.of([name]).items())
        assert f"\n\n{listed}\n" in text, name


def test_the_docs_explain_every_table_and_figure() -> None:
    text = DOCS.read_text(encoding="utf-8")
    for names, heading in ((TABLES, "Tables"), (figures.MAKERS, "Figures")):
        listed = text.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
        told = set(re.findall(r"`([\w-]+)`(?=[^|]*\|[^|]+\|\n)", listed))
        assert told == {*names} | {each for each in told if each.startswith("search-")}, heading


def test_every_column_of_a_table_is_defined(small: Path) -> None:
    defined = {
        each for terms in words.WORDS.values() for term in terms for each in term.split(", ")
    }
    paths = (small / "tables").glob("*.csv")
    heads = {path.stem: path.read_text(encoding="utf-8").splitlines()[0] for path in paths}
    assert heads.keys() >= {"accuracy", "auc", "differences", "cost", "controls", "versions"}
    found = {name for head in heads.values() for name in next(csv.reader([head]))[2:]}
    found |= {*contents.DETECTED, *contents.ATTACKS}
    search = searches.Search("tuned", [search_row("none", stopped=True)])
    found |= {name for each in searches.tables(search) for name in each.head if name}
    found -= {"data set", "digits, % ↑"}
    plain = {re.sub(r" [↑↓]|, (%|points)", "", name) for name in found}
    assert plain <= defined, plain - defined


def test_every_figure_is_whole_in_every_format(small: Path) -> None:
    names = {path.stem for path in (small / "figures").iterdir()}
    expected = {"differences", "cost", "learning", "recall", "calibration", "phases"}
    assert names >= expected | {"weights", "labels", "samples"}
    for name, suffix in itertools.product(names, (".png", ".svg", ".pdf")):
        assert (small / "figures" / f"{name}{suffix}").stat().st_size > 3000
    drawing = ElementTree.parse(small / "figures" / "cost.svg")
    assert drawing.getroot().tag.endswith("svg")


def test_one_seed_invents_no_interval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for method in ("none", "mixup"):
        make_run(tmp_path, method)
    drawn: list[plots.Span | None] = []
    points: list[Point] = []
    monkeypatch.setattr(
        figures.plots, "intervals", lambda panels, *_: drawn.extend(s for _, x in panels for s in x)
    )
    monkeypatch.setattr(
        figures.plots,
        "fronts",
        lambda panels, *_: points.extend(p for f in panels for p in f.points),
    )
    report(Options(tmp_path, tmp_path / "out", ["md"]))
    assert [(span.training, span.population) for span in drawn if span] == [(None, None)]
    assert len(points) == 2 and all(np.isnan(point.sd) for point in points)
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "not tested, because there are fewer than 3 seeds" in text
    assert " ± " not in text.replace("mean ± standard deviation", "")
    assert not re.search(r"95 % CI [+-]", text) and "not tested" in text


@pytest.mark.usefixtures("undrawn")
def test_runs_that_must_not_be_mixed_are_told_apart(tmp_path: Path) -> None:
    for epochs in (3, 5):
        for method in ("none", "mixup"):
            make_run(tmp_path, method, epochs=epochs)
    report(Options(tmp_path, tmp_path / "out", ["md", "csv"]))
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "These runs have 2 different settings, which are never mixed in one table" in text
    assert re.search(r"\| block \| data sets \| epochs \|", text)
    assert text.count("Test accuracy, %, mean") == 2
    commands = [line for line in text.split("\n") if line.startswith("augbench compare")]
    # elsewhere than in ./runs they would find none of these runs
    assert len(commands) == 2 and all(f"--out {tmp_path} --epochs" in line for line in commands)
    assert {path.name for path in (tmp_path / "out" / "tables").iterdir()} == {"1", "2"}


@pytest.mark.usefixtures("undrawn")
def test_a_training_that_differs_between_data_sets_alone_sets_no_blocks_apart(
    tmp_path: Path,
) -> None:
    for protocol in ("equal", "paper"):
        make_run(tmp_path, benchmark="digits", epochs=3, protocol=protocol)
        make_run(tmp_path, benchmark="breastmnist", epochs=5, protocol=protocol)
    report(Options(tmp_path, tmp_path / "out", ["md"]))
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "| block | data sets | protocol | runs |" in text


def test_a_table_with_a_rare_class_is_reported_by_auc(tmp_path: Path) -> None:
    for name in ("a", "b"):
        for seed in range(3):
            for method, skill in (("none", 0.2), ("mixup", 3.0), ("crop", 1.0)):
                make_run(tmp_path, method, seed, skill, benchmark=name, leads="auc", selected=True)
            for argument in (0.1, 0.5):
                method = f"mixup(alpha={argument})"
                make_run(tmp_path, method, seed, 2.0, benchmark=name, leads="auc")
    report(Options(tmp_path, tmp_path / "out", ("md", "csv")))
    page = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    stems = {path.stem for path in (tmp_path / "out" / "tables").glob("*.csv")}
    assert stems >= {"auc", "auprc", "balanced_accuracy", "selected", "ranks", "arguments"}
    assert "accuracy" not in stems
    body, definitions = page.split("## Definitions")
    assert set(re.findall(r".*accuracy", body)) == {
        line for line in re.findall(r".*accuracy", body) if "balanced accuracy" in line
    }
    assert "comparisons of test AUC, differences in points" in body
    for title in ("Differences in test AUC, last epoch", "AUC against charged time",
                  "Differences in test AUC over all data sets", "Test AUC by argument",
                  "Mean ranks by test AUC", "Paired differences in test AUC"):  # fmt: skip
        assert title in body, title
    assert "leading metric" in definitions and "by mean test AUC, over data sets" in definitions
    (block,) = blocks.split(records.scan(tmp_path)[0])
    (over, *_), _ = findings.overall(block, findings.findings(block, Question()), 0.5)
    means = [
        np.mean([findings.scores(column.rows[row], "auc") for column in block.columns])
        for row in (over.row, over.base)
    ]
    assert over.estimate == pytest.approx(means[0] - means[1])


def test_formats_are_those_asked_for(tmp_path: Path) -> None:
    make_run(tmp_path / "runs")
    out = tmp_path / "out"
    assert report(Options(tmp_path / "runs", out, ["csv"])) == [
        out / "tables",
        out / "records.parquet",
    ]
    assert not (out / "figures").exists() and not list(out.glob("report.*"))
    assert {path.suffix for path in (out / "tables").iterdir()} == {".csv"}


def test_recompute_takes_the_stored_logits(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "runs")
    changed = json.loads((folder / "result.json").read_text())
    changed["metrics"]["last"]["test"]["accuracy"] = 0.12345
    (folder / "result.json").write_text(json.dumps(changed))
    for recompute, shown in ((False, True), (True, False)):
        report(Options(tmp_path / "runs", tmp_path / "out", ["csv"], recompute=recompute))
        text = (tmp_path / "out" / "tables" / "accuracy.csv").read_text()
        assert ("12.35" in text or "12.34" in text) == shown


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.usefixtures("undrawn")
def test_damaged_predictions_are_told_and_stop_nothing(recompute: bool, tmp_path: Path) -> None:
    for seed in range(4):
        make_run(tmp_path, "mixup", seed, 2.0)
    hurt = [make_run(tmp_path, "none", seed) for seed in range(4)][-1] / "predictions.npz"
    hurt.write_bytes(hurt.read_bytes()[::-1])
    report(Options(tmp_path, tmp_path / "out", ["md"], recompute=recompute))
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "8 runs: 7 done, 1 unfinished, damaged or copied." in text
    assert "n = 3 seeds" in text
    (line,) = (line for line in text.splitlines() if "predictions.npz cannot be read" in line)
    assert (
        line.startswith("| none | digits, ") and f"| 3 | no result | {hurt.parent.name}: " in line
    )


def test_nothing_to_report_is_an_error(tmp_path: Path) -> None:
    make_run(tmp_path, status="failed", reason="so")
    with pytest.raises(NoRuns, match=r"got 1 run without metrics"):
        report(Options(tmp_path, tmp_path / "out"))


def test_sentences_of_every_verdict() -> None:
    listed = findings.judged(
        [made(2, 5), made(-2, 5), made(0.005, 0.5), made(0.4, 30), made(0.45, 0.05), made(0.6, 5)],
        0.5,
    )
    told = [sentences.finding(each, 0.5, 6) for each in listed]
    assert told[0].endswith("better, beyond the margin of 0.5.")
    assert told[1].endswith("worse, beyond the margin of 0.5.")
    assert re.search(r"equivalent: within the margin of 0\.5 \(90 % CI \S+ to \S+\)\.$", told[2])
    assert "undecided: the interval includes 0" in told[3]
    assert told[4].endswith("), though not 0.")
    assert told[5].endswith("better, not shown to be beyond the margin of 0.5.")
    for each, text in zip(listed, told, strict=True):
        population = each.difference.population  # type: ignore[union-attr]
        assert population is not None
        assert f"{population.low:+.2f} to {population.high:+.2f}" in text
        # what is said of the margin holds for the interval, and for the family
        outside = population.low > 0.5 or population.high < -0.5
        if ", beyond" in text:
            assert outside and each.p_within <= 0.05
        assert outside or not each.p_within <= 0.05
    left_out = replace(listed[0], p=0.2, verdict="undecided")
    assert "the interval excludes 0, but not after Holm" in sentences.finding(left_out, 0.5, 6)
    assert told[3].endswith(
        "On its own, this comparison would find a difference of 1.00 points with 80 % power."
    )
    assert listed[3].difference is not None
    unknown = replace(listed[3], difference=replace(listed[3].difference, detectable=np.nan))
    assert sentences.finding(unknown, 0.5, 6).endswith(
        "equivalence within 0.5 is not shown either."
    )
    nothing = Finding("a", "b", "digits", None)
    assert (
        sentences.finding(nothing, 0.5, 0) == "a over b on digits: no seed has a result for both."
    )


def test_control_rows_of_a_method(tmp_path: Path) -> None:
    shuffled = f"shuffled_weights(upstream={SAFLEX})"
    lpa3 = "lpa3(upstream=mixup)"
    noise = f"norm_noise(upstream={lpa3})"
    random = "random_label(upstream=mixup)"
    frozen = f"frozen(upstream={SAFLEX})"
    refit = f"head_refit(upstream={frozen})"
    for method in ("none", "mixup", lpa3, shuffled, noise, frozen, refit, random):
        make_run(tmp_path, method)
    make_run(tmp_path, "head_refit(upstream=mixup)")
    make_run(tmp_path, SAFLEX, meta=9, recorded=declared(SAFLEX))
    make_run(tmp_path, "mixup", control="train")
    make_run(tmp_path, "none", control="train")
    make_run(tmp_path, "mixup", budget=f"passes of {SAFLEX}", epochs=3)
    (block,) = blocks.split(records.scan(tmp_path)[0])
    of = {entry.name: set(block.controls_of(entry)) for entry in block.compared}
    labels = {frozen, refit, "mixup@train", random}
    assert of["none"] == of["mixup"] == set()
    assert of[SAFLEX] == labels | {shuffled, f"mixup [passes of {SAFLEX}]"}
    assert of[lpa3] == {noise}, "it takes no meta rows: other labels explain nothing of it"


def test_whether_a_control_explains_a_gain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shuffled = f"shuffled_weights(upstream={SAFLEX})"
    for seed in range(6):
        for method, skill in (("mixup", 0.2), (SAFLEX, 2.0), (shuffled, 0.2)):
            make_run(tmp_path, method, seed, skill, test_rows=150, meta=9 * (method != "mixup"))
        make_run(tmp_path, "mixup", seed, 40.0, test_rows=150, control="train")
    (block,) = blocks.split(records.scan(tmp_path)[0])
    found = findings.findings(block, Question())
    controls, table = sentences.controls(block, found, 0.5, "controls")
    assert controls == [
        f"digits: {SAFLEX} gains over mixup (after Holm, few seeds); the control mixup@train "
        "scores higher, so the gain may not be due to the method.",
        f"digits: {SAFLEX} gains over mixup (after Holm, few seeds); the control {shuffled} "
        "scores lower, so it does not explain the whole gain.",
        f"digits: {SAFLEX} gains over mixup (after Holm, few seeds); a row without its learning "
        "has no result, so this does not show that learning helps. (Few seeds.)",
    ]
    assert table is not None and len(table.groups[0].rows) == 2
    lost = [replace(each, p=0.2) for each in found]
    (none,) = sentences.controls(block, lost, 0.5, "controls")[0]
    assert none.startswith("No method with control rows is shown to gain over its base")
    alone = sentences.controls(block, [], 0.5, "controls")[0]
    assert "gains over mixup (by its own population interval, not corrected);" in alone[0]
    monkeypatch.setattr(sentences, "reading", lambda *_: "same")
    told = sentences.controls(block, found, 0.5, "controls")[0]
    assert told[0].endswith(
        "mixup@train is equivalent within the margin of 0.5, so the gain beyond that may not be "
        "due to the method."
    )


@pytest.mark.parametrize(
    ("named", "others", "expected"),
    [
        ({}, {}, "a row without its learning has no result, so this does not show"),
        ({"frozen": "", "part": "above"}, {}, "frozen has no result, so this does not show"),
        ({"frozen": "open"}, {}, "not shown to be above frozen, so not to come from learning."),
        ({"frozen": "above"}, {"U@train": "below"}, "above U@train, so not to come from learning."),
        ({"frozen": "above"}, {"U@train": "above"}, "all of its learning away, so learning helps."),
        ({"frozen": "above", "part": "same"}, {}, "helps, but it is not shown to be above part."),
        ({"frozen": "above", "a": "", "b": ""}, {}, "so learning helps; a and b have no result."),
        ({"noise": "above"}, {}, "it is above noise, so what that control takes away helps."),
        ({"noise": "same"}, {}, "above noise, so not to come from what noise takes away."),
        ({"noise": ""}, {}, "noise has no result, so this does not show that what noise takes"),
    ],
)
def test_what_is_said_of_learning(
    named: dict[str, str], others: dict[str, str], expected: str
) -> None:
    assert expected in sentences._of_learning(named, others)


def test_rows_that_differ_in_how_meta_rows_are_cut_keep_family_controls_and_commands(
    tmp_path: Path,
) -> None:
    shuffled = f"shuffled_weights(upstream={SAFLEX})"
    make_run(tmp_path, "mixup")
    for fraction in (0.1, 0.3):
        for method, control in ((SAFLEX, "all"), (shuffled, "all"), ("mixup", "train")):
            make_run(tmp_path, method, control=control, meta_fraction=fraction, meta=9)
    (block,) = blocks.split(records.scan(tmp_path)[0])
    rows = {fraction: f"{SAFLEX} {{meta_fraction {fraction:g}}}" for fraction in (0.1, 0.3)}
    asked = Question(family=((SAFLEX, ""),))
    assert block.contrasts(asked) == [(row, "mixup") for row in rows.values()]
    assert not sentences.unmatched([block], asked)
    for fraction, row in rows.items():
        own = set(block.controls_of(block.by_name[row]))
        braces = f" {{meta_fraction {fraction:g}}}"
        assert own == {f"mixup@train{braces}", f"{shuffled}{braces}"}
    told = sentences.commands(block, block.columns[0], tmp_path)
    for fraction, line in zip(("0.1", "0.3"), told, strict=True):
        given = shlex.split(line)
        assert given[given.index("--meta-fraction") + 1] == fraction
        assert given[given.index("--methods") + 1] == f"mixup,{SAFLEX},mixup@train,{shuffled}"


def test_a_command_that_makes_more_than_these_runs_says_so(tmp_path: Path) -> None:
    lpa3 = "lpa3(upstream=mixup)"
    for seed in (3, 5):
        for method in ("none", "mixup", SAFLEX):
            make_run(tmp_path, method, seed)
        of = {"of": make_run(tmp_path, lpa3, seed).name}
        make_run(tmp_path, "mixup", seed, budget=f"passes of {lpa3}", epochs=9, recorded=of)
    (block,) = blocks.split(records.scan(tmp_path)[0])
    seeds, rows, line = sentences.commands(block, block.columns[0], Path("runs"))
    assert seeds == "# runs all seeds from 0 to 5; this report has 3, 5"
    assert rows == f"# also runs: mixup [passes of {SAFLEX}]"
    assert "--seeds 6 --same passes" in line


@pytest.mark.usefixtures("undrawn")
def test_rows_of_an_equal_budget_tell_their_epochs_and_the_cost_of_whole_runs(
    tmp_path: Path,
) -> None:
    make_run(tmp_path, "none", cost=1.0, epochs=3)
    of = make_run(tmp_path, "lpa3", cost=4.0, epochs=3).name
    detail = "ratio 5 of passes over 1 seeds on a machine"
    make_run(
        tmp_path, "none", cost=1.0, epochs=15, budget="passes of lpa3",
        recorded={"budget": detail, "of": of},
    )  # fmt: skip
    report(Options(tmp_path, tmp_path / "out", ["csv", "md"]))
    (block,) = blocks.split(records.scan(tmp_path)[0])
    table = results.main_table(block, "accuracy", "accuracy", False, "last")
    ratios = {row[0].text: row[-1].text for group in table.groups for row in group.rows}
    row = "none [passes of lpa3]"
    assert ratios == {"none": "1.00", "lpa3": "4.00", row: "5.00"}
    notes = tables.cost_table(block, "cost").notes
    assert notes == (f"digits: {row}: 15 epochs, {detail}.",)


def test_equal_predictions_infer_nothing(tmp_path: Path) -> None:
    for seed in range(4):
        one, other = (make_run(tmp_path, method, seed, 2.0) for method in ("none", "crop"))
        for name in ("predictions.npz", "result.json"):
            shutil.copy(one / name, other / name)
    (block,) = blocks.split(records.scan(tmp_path)[0])
    (found,) = findings.findings(block, Question())
    assert found.difference is not None and found.difference.estimate == 0
    assert found.difference.population is None and found.difference.training is None
    assert found.verdict == "not tested" and np.isnan(found.p)
    assert sentences.finding(found, 0.5, 1) == (
        "crop over none on digits: +0.00 points over 4 seeds; not tested, because their "
        "predictions are identical or differ by a constant."
    )
    assert findings.best(block.columns[0], ["none", "crop"], "accuracy").tied


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            "question: Does it help?\nmargin: 1\nfamily:\n- saflex( upstream = mixup )\n"
            "- mixup over none @train\nseeds: 10\n",
            Question(
                "Does it help?", ((SAFLEX, ""), ("mixup", "none@train")), 1.0, "", "study.yaml"
            ),
        ),
        (
            "family: '{crop|mixup} over none, crop over mixup'",
            Question(
                family=(("crop", "none"), ("mixup", "none"), ("crop", "mixup")),
                source="study.yaml",
            ),
        ),
        (
            "family: ['saflex(upstream=mixup)', none]",
            Question(family=((SAFLEX, ""), ("none", "")), source="study.yaml"),
        ),
        ("prediction: |\n  none wins\n", Question(prediction="none wins", source="study.yaml")),
        ("- a list", "expected a mapping"),
        ("margin: -1", "margin: expected points of 0 or more, got -1"),
        ("margin: [", "study.yaml, line 1, column 10: expected the node content"),
        ("family: 3", "family: expected a string such as"),
        ("family: ['{crop|mixup']", "family: '{crop|mixup': expected a }"),
        ("family: ['saflex(']", "family: cannot read"),
        ("question: 3", "line 1: question: Input should be a valid string, got 3"),
    ],
)
def test_a_study_file_beside_the_runs(
    content: str, expected: Question | str, tmp_path: Path
) -> None:
    assert question.read(tmp_path) == Question()
    (tmp_path / "study.yaml").write_text(content)
    if isinstance(expected, Question):
        assert question.read(tmp_path) == expected
        return
    with pytest.raises(StudyError, match=re.escape(expected)):
        question.read(tmp_path)


def test_the_order_of_arguments_does_not_count() -> None:
    budget = question.comparison("none [passes of  saflex(b=1, a=2)] over saflex(b=1,a=2)")
    assert budget == ("none [passes of saflex(a=2, b=1)]", "saflex(a=2, b=1)")
    told = question.comparison(
        "saflex( upstream=mixup(b=1, a=2)+crop , preset = stable)@ train over b"
    )
    assert told == ("saflex(preset=stable, upstream=mixup(a=2, b=1)+crop)@train", "b")


def swept(root: Path, name: str, content: str) -> None:
    folder = root / "studies" / name
    folder.mkdir(parents=True)
    (folder / "study.yaml").write_text(content)


def test_the_question_is_that_of_the_only_study_or_of_the_named_one(tmp_path: Path) -> None:
    first = make_run(tmp_path).name
    swept(tmp_path, "one", f"question: First?\nruns: [{first}, b]\n")
    alone = question.read(tmp_path)
    assert (alone.text, alone.source) == ("First?", "studies/one/study.yaml")
    assert alone.runs == {first, "b"}
    make_run(tmp_path, "mixup")
    assert question.read(tmp_path) == Question(), "other runs are there too"
    assert question.read(tmp_path, "one") == alone
    swept(tmp_path, "two", "question: Second?\nruns: [b, c]\n")
    assert question.read(tmp_path) == Question(), "neither is that of the folder"
    assert question.read(tmp_path, "two").runs == {"b", "c"}
    assert question.read(tmp_path, "two").text == "Second?"
    (tmp_path / "study.yaml").write_text("question: Third?\n")
    assert question.read(tmp_path).text == "Third?"
    with pytest.raises(StudyError, match=r"no study 'tw'.*did you mean 'two'.*one, two"):
        question.read(tmp_path, "tw")


@pytest.mark.usefixtures("undrawn")
def test_a_folder_of_several_studies_names_them(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    make_run(root, "none")
    report(Options(root, tmp_path / "plain"))
    plain = (tmp_path / "plain" / "report.md").read_text(encoding="utf-8")
    assert "Because there is no study file beside the runs, the margin is" in plain
    for name in ("one", "two"):
        swept(root, name, "question: Which?\nfamily: [mixup]\n")
    report(Options(root, tmp_path / "out"))
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "no study file" not in text.lower()
    assert "no --study was chosen (there are: one, two)" in text


PREDICTIONS = """\
prediction: crop wins
predictions:
- {text: crop wins, written: '2026-11-20', runs: 0}
- {text: mixup wins, written: '2026-11-21', runs: 12}
"""


@pytest.mark.usefixtures("undrawn")
def test_a_prediction_that_was_changed_is_told_with_the_day(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    make_run(root, "none")
    swept(root, "one", PREDICTIONS)
    assert question.read(root).prediction == "crop wins"
    report(Options(root, tmp_path / "out"))
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8").replace("\\", "")
    assert (
        "**Prediction.** crop wins (written on 2026-11-20, before the first run) "
        "Changed on 2026-11-21, after 12 runs, to: mixup wins" in text
    )
    swept(root, "two", "predictions: [{text: 3, runs: 1}]")
    with pytest.raises(StudyError, match=r"two/study\.yaml, line 1: predictions"):
        question.read(root, "two")


def search_row(row: str, *, stopped: bool) -> dict[str, object]:
    """What a sweep writes of a row: two trials, the second one the winner."""
    trial = {"runs": ["x"], "rung": 0, "passes": 500, "test": 0.7}
    return {
        "table": "digits, small_cnn, equal",
        "row": row,
        "metric": "auc",
        "trials": [
            {**trial, "number": 0, "values": {}, "state": "stopped" if stopped else "done",
             "select": 0.75},
            {**trial, "number": 1, "values": {"mixup.alpha": 0.25, "a|b": [1, None]},
             "state": "done", "select": 0.8125},
        ],
        "passes": 1000,
        "winner": 1,
        "regret": 0.015,
        "expected": [{"trials": 1, "share": 1.0, "select": 0.78, "test": 0.7},
                     {"trials": 2, "share": 1.0, "select": 0.8125, "test": None}],
        "fresh": [
            {"what": "chosen against as written", "difference": 1.25, "seeds": 4,
             "training": [0.5, 2.0], "population": [-0.5, 3.0]},
            {"what": "at equal passes against as written", "difference": 0.0},
        ],
    }  # fmt: skip


def test_a_search_has_tables_of_its_own_and_its_runs_no_other(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    root = tmp_path / "runs"
    mine = [make_run(root, "none", seed).name for seed in range(2)]
    mine += [make_run(root, "mixup", seed).name for seed in range(2)]
    values = {"learning_rate": 0.01}
    better = [make_run(root, "mixup(alpha=0.3)", seed, 4.0, recorded={"searched": values}).name
              for seed in range(2)]  # fmt: skip
    mine += better
    for seed in (1000, 1001):
        mine.append(make_run(root, "none", seed, recorded={"searched": {}}).name)
    make_run(root, "cutmix", 0)
    swept(root, "tuned", f"question: Tuned?\nfamily: [mixup over none]\nruns: {json.dumps(mine)}\n")
    rows = [
        {**search_row("none", stopped=True), "written": mine[:2], "chosen": mine[:2]},
        {**search_row("mixup", stopped=False), "written": mine[2:4], "chosen": better},
    ]
    (root / "studies" / "tuned" / "search.json").write_text(json.dumps(rows))
    report(Options(root, tmp_path / "out", study="tuned"))
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "8 runs: 8 done." in text and "cutmix" not in text
    assert "4 runs of searches appear only in the tables of the search" in text
    assert re.search(r"\| none \| 2 \| 1 \| 0 \| mixup.alpha 0.25, a\\\|b \\\[1, none\\\] \| "
                     r"0\.8125 \| 1\.50 \| 1,000 \|", text)  # fmt: skip
    assert (
        "| mixup: chosen against as written | 4 | +1.25 | +0.50 to +2.00 | -0.50 to +3.00 |" in text
    )
    assert "at equal passes against as written | 0 | the row as written won | – | – |" in text
    assert re.search(r"\| none \| 2 \| .* \| the row as written won \| – \| – \|", text)
    chosen = text.partition("Search tuned: test accuracy with fresh seeds")[2]
    told = re.search(r"\| mixup \| 2 \| (\S+) ± \S+ \| (\S+) ± \S+ \| (\S+) \|", chosen)
    base = re.search(r"\| none \| 2 \| (\S+) ±", chosen)
    over = re.search(r"\| mixup over none \| digits, small\\_cnn, equal \| 2 \| (\S+) \|", chosen)
    assert told and base and over and float(told[3]) > 5
    assert float(told[2]) - float(told[1]) == pytest.approx(float(told[3]), abs=0.011)
    assert float(told[2]) - float(base[1]) == pytest.approx(float(over[1]), abs=0.011)
    assert "augbench report" in text and "--study tuned" in text
    for name in ("search-tuned", "search-tuned-differences"):
        assert (tmp_path / "out" / "figures" / f"{name}.png").stat().st_size > 3000
    assert (tmp_path / "out" / "tables" / "search-tuned.csv").is_file()
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "Search for hyper-parameters" in page
    (accuracy,) = re.findall(r"\| mixup \| (\d) \|", text.partition("Test AUC")[0])
    assert accuracy == "2", "the trials are no seeds of the row"
    request.getfixturevalue("undrawn")
    report(Options(root, tmp_path / "all"))
    whole = (tmp_path / "all" / "report.md").read_text(encoding="utf-8")
    assert "9 runs: 9 done." in whole and "cutmix" in whole and "--study NAME" in whole


@pytest.mark.usefixtures("undrawn")
def test_a_search_that_cannot_be_read_is_told_with_its_file(tmp_path: Path) -> None:
    swept(tmp_path, "some", "margin: 1\n")
    make_run(tmp_path)
    row = search_row("none", stopped=False)
    del row["regret"]
    (tmp_path / "studies" / "some" / "search.json").write_text(json.dumps([row]))
    with pytest.raises(StudyError, match=r"search.json: not a search of this version.*regret"):
        report(Options(tmp_path, tmp_path / "out"))


def test_how_far_learning_went_and_that_it_hardly_did(tmp_path: Path) -> None:
    """Medians over seeds; the reading of a policy that is no control; no claim of learning."""
    moves = {
        "autodo": {"probability": 0.03, "magnitude": 0.04, "weight": 0.3},
        "autodo(start=1)": {"probability": 0.03, "magnitude": 0.06},
        "frozen(upstream=autodo)": {"probability": 0.0, "magnitude": 0.0},
        "saflex": {"weight": 0.01, "label": 0.02},
    }
    for seed in range(6):
        make_run(tmp_path, "none", seed, 0.2, test_rows=150)
        for method, moved in moves.items():
            steps = {"outer_steps": 150} if "autodo" in method else {}
            # one seed of six is far away and leaves the median
            told = steps | {
                name: 9 * value if seed == 5 else value for name, value in moved.items()
            }
            make_run(tmp_path, method, seed, 2.0, test_rows=150, meta=9,
                     recorded=declared(method), result={"learning": told})  # fmt: skip
    (block,) = blocks.split(records.scan(tmp_path)[0])
    table = tables.learning_table(block, "moved")
    assert table is not None
    lines = {line[0].text: [cell.text for cell in line[3:]] for line in table.groups[0].rows}
    assert lines["autodo"] == ["150", "3.0", "4.0", "30.0", "n/a", "hardly learned"]
    assert lines["autodo(start=1)"] == ["150", "3.0", "6.0", "n/a", "n/a", ""]
    assert lines["frozen(upstream=autodo)"][-1] == lines["saflex"][-1] == ""
    assert lines["saflex"] == ["n/a", "n/a", "n/a", "1.0", "2.0", ""] and "none" not in lines
    found = findings.findings(block, Question())
    hardly = {each.row for each in found if each.hardly}
    assert hardly == {"autodo"}
    notes = tables.differences_table(found, "differences", 0.5, block.leads).notes
    assert notes[-1].startswith(f"autodo hardly learned on {block.columns[0].name} (prob")
    assert " ".join(notes).count("hardly learned") == 1
    said = sentences.controls(block, found, 0.5, "controls")[0]
    (told,) = (each for each in said if ": autodo gains" in each)
    assert "autodo hardly learned there" in told
    assert told.endswith("nothing about a learned policy.")
    assert not any("learning" in each for each in said if "autodo gains" in each and each != told)
    for each in found:
        says = "hardly learned there" in sentences.finding(each, 0.5, 3)
        assert says is each.hardly
    assert sentences.answer(found, block.leads).count("hardly learned") == 1
    text = " ".join(as_text(list(block.columns[0].rows.values())).split())
    assert (
        "autodo: 150 outer steps; moved in the median by probability 3.0 %, magnitude 4.0 %, "
        "weight 30.0 % of its range: hardly learned." in text
    )
    assert text.count("hardly learned") == 1
    assert "saflex: moved in the median by weight 1.0 %, label 2.0 % of its range." in text


def test_runs_that_say_nothing_of_learning_show_nothing(tmp_path: Path) -> None:
    for method in ("none", "autodo"):
        make_run(tmp_path, method)
    (block,) = blocks.split(records.scan(tmp_path)[0])
    assert tables.learning_table(block, "moved") is None
    assert "moved" not in as_text(list(block.columns[0].rows.values()))


def test_what_became_of_attacked_rows_has_a_table(tmp_path: Path) -> None:
    for seed in range(2):
        make_run(tmp_path, "none", seed)
        make_run(tmp_path, "lpa3", seed)
    (block,) = blocks.split(records.scan(tmp_path)[0])
    for seed, record in block.columns[0].rows["lpa3"].by_seed().items():
        log = {"attack_selected": 0.5, "attack_prediction_kept": 0.75 + 0.25 * seed}
        record.__dict__["lines"] = [{"log": log}]
    made = tables.attack_table(block, "attacked")
    assert made is not None
    (line,) = made.groups[0].rows
    told = dict(zip(made.head, [cell.text for cell in line], strict=True))
    assert told[""] == "lpa3" and told["data set"] == "digits" and told["n"] == "2"
    assert told["prediction kept, %"] == "87.5" and told["margin kept, %"] == "n/a"
    assert tables.attack_table(replace(block, entries=block.entries[:1]), "x") is None


def test_comparisons_without_runs_are_named(tmp_path: Path) -> None:
    make_run(tmp_path)
    read = blocks.split(records.scan(tmp_path)[0])
    told = sentences.unmatched(read, Question(family=((SAFLEX, ""),)))
    assert told == [f"The study's comparison of {SAFLEX} over its base has no runs."]
    for method in ("mixup", SAFLEX):
        make_run(tmp_path, method)
    read = blocks.split(records.scan(tmp_path)[0])
    asked = Question(family=((SAFLEX, ""), (SAFLEX, "mixup"), (SAFLEX, "mixup@train")))
    told = sentences.unmatched(read, asked)
    assert told == [f"The study's comparison of {SAFLEX} over mixup@train has no runs."]
    assert read[0].contrasts(asked) == [(SAFLEX, "mixup")], "named twice, it is one test"


def test_the_front_holds_what_nothing_cheaper_beats() -> None:
    points = [Point("a", 1, 5, 0), Point("b", 2, 4, 0), Point("c", 3, 9, 0), Point("d", 3, 8, 0)]
    points.append(Point("e", 1, 3, 0))
    beaten = [
        any(o.x <= p.x and o.y >= p.y and (o.x, o.y) != (p.x, p.y) for o in points) for p in points
    ]
    assert figures.pareto(points) == [k for k, worse in enumerate(beaten) if not worse] == [0, 2]


def test_corruptions_are_lined_up_by_their_strength(tmp_path: Path) -> None:
    for name in ("digits(noise=0.4)", "digits", "digits(noise=0.1)", "digits(imbalance=10)"):
        make_run(tmp_path, benchmark=name)
    (block,) = blocks.split(records.scan(tmp_path)[0])
    got = {
        (heading, kind): [level for level, _ in levels]
        for heading, kind, levels in figures.corrupted(block.columns)
    }
    assert got == {("digits", "noise"): [0, 0.1, 0.4], ("digits", "imbalance"): [1, 10]}
    for name in ("folder", "folder(noise=0.2)", "folder(as_rgb=True, noise=0.2)"):
        make_run(tmp_path / "own", benchmark=name, recorded={"path": "/my/scans"})
    (block,) = blocks.split(records.scan(tmp_path / "own")[0])
    ((heading, kind, levels),) = figures.corrupted(block.columns)
    assert (heading, kind, [level for level, _ in levels]) == ("folder:scans", "noise", [0, 0.2])


@pytest.mark.usefixtures("undrawn")
def test_the_command_of_a_report_makes_its_runs_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = save(tmp_path / "my scans.npz")
    asked = ["--benchmark", f"npz:{data}(noise=0.25)", *SMALL, "--epochs", "2", "--seeds", "1"]
    asked += ["--batch-size", "40", "--jobs", "1"]
    rows = "none,none@train,saflex(upstream=flip),saflex(upstream=flip)@dirty"
    assert main.run(["compare", *asked, "--methods", rows]) == 0
    capsys.readouterr()
    assert main.run(["report", "runs", "--format", "md"]) == 0
    assert capsys.readouterr().out.split() == ["report/report.md", "report/records.parquet"]
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    (line,) = (line for line in text.split("\n") if line.startswith("augbench compare"))
    monkeypatch.setattr(disk, "fit", lambda *_, **__: pytest.fail("a run was made"))
    assert main.run([*shlex.split(line)[1:], "--device", "cpu", "--jobs", "1"]) == 0
    assert "done" not in capsys.readouterr().err
    assert main.run(["plan", "runs", "--detect", "5"]) == 0
    assert "No variance can be estimated" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["report", "nowhere"], 2, "runs: expected a results folder, got nowhere"),
        (["report", ".", "--format", "docx"], 2, "format: expected some of html, md, tex, csv"),
        (["report", "."], 2, "expected run directories with results"),
        (["plan", ".", "--detect", "0"], 2, "detect: expected points above 0, got 0"),
        (["plan", ".", "--detect", "inf"], 2, "detect: expected points above 0, got inf"),
        (["plan", ".", "--power", "80"], 2, "power: expected a number in (0, 1), got 80"),
        (["plan", "study.yaml"], 2, "expected a results folder or a study file, got study.yaml"),
        (
            ["report", ".", "--study", "mine"],
            2,
            "no study 'mine' in . (there are: none)",
        ),
        (["plan", "."], 2, "expected finished runs"),
        (["plan", "here.yaml"], 2, "expected a results folder or a study file, got runs"),
        (["plan", "here.yaml", "--out", "."], 2, "no study 'mine' in . "),
        (["plan", "here.yaml", "--study", "x"], 2, "study: expected no --study with a study file"),
    ],
)
def test_wrong_use_is_told(
    arguments: list[str],
    code: int,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("here.yaml").write_text("name: mine\nbenchmarks: digits\n")
    assert main.run(arguments) == code
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("methods", "sets"), [(2, 1), (2, 8), (12, 1), (12, 8)])
def test_figures_of_few_and_many(methods: int, sets: int, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    many(root, methods, sets)
    report(Options(root, tmp_path / "out"))
    for path in (tmp_path / "out" / "figures").iterdir():
        assert path.stat().st_size > 3000


def many(root: Path, methods: int, sets: int) -> None:
    """A study of so many rows and data sets, with control rows and a failed run."""
    plain = ["none", "crop", "randaugment(magnitude=9, n=2)", "trivialaugment", "mixup(alpha=0.2)"]
    wrapped = [f"{m}(upstream={u})" for m in ("saflex", "lpa3") for u in (plain[2], plain[4])]
    wrapped += ["autodo", "saflex(preset=stable, upstream=crop)", "l2rw(upstream=crop)"]
    names = [*plain, *wrapped] if methods > 2 else ["none", wrapped[0]]
    for place in range(sets):
        benchmark = ("breastmnist", "digits(noise=0.4)", "digits", "organamnist", "organcmnist",
                     "organsmnist", "pneumoniamnist", "bloodmnist")[place]  # fmt: skip
        for number, name in enumerate(names[:methods]):
            for seed in range(4):
                skill = 0.5 + 0.1 * number + 0.2 * place
                learned = "saflex" in name
                make_run(root, name, seed, skill, benchmark=benchmark, cost=1 + number,
                         learned=learned)  # fmt: skip
        if methods > 2:
            make_run(root, "none", 0, 1.0, benchmark=benchmark, control="train")
            make_run(root, "cutmix", 0, benchmark=benchmark, status="failed", reason="so")
