"""Tiers of a study: which part of the file each is, and in which order its runs are done."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

import augbench
import methods
from analysis import runs
from analysis.studyfile import StudyError
from benchmarks.cli import hours, main
from benchmarks.running import capacity, probe
from benchmarks.running.display import duration
from benchmarks.running.probe import Setting
from benchmarks.studies import loading, schema, shipped
from benchmarks.studies.cells import Cell
from benchmarks.studies.costs import SHIPPED
from benchmarks.studies.costs import shipped as shipped_cost
from benchmarks.studies.plan import Plan, chosen
from benchmarks.studies.rounds import Work
from benchmarks.studies.schema import Study
from benchmarks.studies.shards import Shard
from methods.base import Input, Spec
from methods.naming import NamingError
from tests.sweeping import data_beside, weights_beside
from tests.test_study import finish

TEXT = """\
benchmarks: "digits{|(rows_per_class=20)}"
models: [small_cnn, "resnet18(width=0.125)"]
methods: [none, randaugment, head_refit(upstream=randaugment)]
protocols: [equal, paper]
seeds: 4
training: {epochs: 1}
same: passes
family: [randaugment, head_refit(upstream=randaugment)]
labels: {randaugment: RA, head_refit(upstream=randaugment): Refit}
tiers:
  quick: {benchmarks: digits, models: small_cnn, methods: "{none|randaugment(m=9)}", seeds: 2,
          protocols: equal, same: []}
  plain: {methods: none}
  other: {seeds: [7]}
"""


def load(folder: Path, text: str, tier: str = "full", *settings: str) -> Study:
    path = folder / "some.yaml"
    path.write_text(text, encoding="utf-8")
    return loading.load(path, settings, tier)


def planned(study: Study, folder: Path) -> tuple[Plan, list[Cell]]:
    plan = Plan(study, folder)
    plan.check_family()
    plan.check_labels()
    return plan, Work(plan, folder / "runs", chosen("")).whole()


def test_a_tier_is_a_part_of_the_file(tmp_path: Path) -> None:
    whole = load(tmp_path, TEXT)
    _, every = planned(whole, tmp_path)
    assert (whole.name, len(every)) == ("some", 2 * 2 * (3 + 4) * 4), "with compulsory controls"
    plan, cells = planned(load(tmp_path, TEXT, "quick"), tmp_path)
    assert plan.study.name == "some-quick"
    assert {cell.run.id for cell in cells} < {cell.run.id for cell in every}
    assert Counter(cell.run.row for cell in cells) == {"none": 2, "randaugment": 2}
    assert {(cell.run.benchmark, cell.run.model) for cell in cells} == {("digits", "small_cnn")}
    assert plan.study.family == ("randaugment",), "what is left of the family"
    assert plan.study.labels == {"randaugment": "RA"}
    assert not plan.study.blocks[0].same


def test_a_study_is_swept_under_the_name_of_its_tier(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load(tmp_path, TEXT)
    arguments = ["sweep", str(tmp_path / "some.yaml"), "--dry-run", "--out", str(tmp_path / "runs")]
    assert main.run([*arguments, "--tier", "plain", "--set", "seeds=1"]) == 0
    shown = capsys.readouterr()
    assert "Study      some-plain\nTier       plain; also quick, other, full\n" in shown.out
    assert "8 runs: 8 new" in shown.out
    assert "Tier plain has no comparison of the family" in shown.err
    assert main.run([*arguments, "--tier", "quikc"]) == 2
    assert "unknown tier 'quikc'; did you mean 'quick'?" in capsys.readouterr().err
    assert main.run([*arguments, "--tier", "other"]) == 2
    assert "tier 'other': expected some runs of the file" in capsys.readouterr().err


def test_python_takes_a_tier(tmp_path: Path) -> None:
    load(tmp_path, TEXT)
    with pytest.raises(NamingError, match="did you mean 'plain'"):
        augbench.sweep(tmp_path / "some.yaml", tier="plian")


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        (
            "methods: none}",
            "methods: mixup}",
            "plain.methods: expected a name from a block of the file",
        ),
        ("methods: none}", "methods: randagment}", "unknown method 'randagment'; did you mean"),
        ("benchmarks: digits, m", "benchmarks: digit, m", "quick.benchmarks: unknown benchmark"),
        ("models: small_cnn, m", "models: resnet18, m", "got 'resnet18'; did you mean 'resnet18("),
        ("  other:", "  full:", "other than full, which is the whole file"),
        ("  other:", "  'a/b':", "expected names of letters"),
        ("  other: {seeds", "  other: {sedes", "'sedes'"),
        ("  other: {seeds: [7]}", "  other: {protocols: fair}", "other.protocols"),
    ],
)
def test_a_tier_that_cannot_be_is_refused(tmp_path: Path, old: str, new: str, part: str) -> None:
    assert old in TEXT
    with pytest.raises(StudyError) as error:
        load(tmp_path, TEXT.replace(old, new))
    assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_a_setting_may_take_what_a_tier_names(tmp_path: Path) -> None:
    more = ("methods=[none, crop]", "family=[crop]", "labels={}", "same=[]")
    assert load(tmp_path, TEXT, "full", *more).blocks[0].methods == ("none", "crop")
    assert load(tmp_path, TEXT, "quick", *more).blocks[0].methods == ("none",)


def test_every_beginning_of_a_sweep_is_a_balanced_table(tmp_path: Path) -> None:
    work = Work(Plan(load(tmp_path, TEXT), tmp_path), tmp_path / "runs", chosen(""))
    first = next(work.rounds())
    offered = [job.first.run for job in first.jobs]
    assert [run.seed for run in offered] == sorted(run.seed for run in offered)
    rows = {(run.benchmark, run.model, run.protocol, run.row) for run in offered}
    for seeds in range(1, 5):
        begun = offered[: seeds * len(rows)]
        counts = Counter((run.benchmark, run.model, run.protocol, run.row) for run in begun)
        assert set(counts) == rows
        assert set(counts.values()) == {seeds}


def test_one_benchmark_may_come_after_the_other(tmp_path: Path) -> None:
    study = loading.load(shipped.find(Path("medmnist_gpu")))
    _, cells = planned(study, tmp_path)
    sets = ["breastmnist", "retinamnist", "pneumoniamnist"]
    assert [(cell.run.benchmark, cell.run.seed) for cell in cells] == [
        (name, seed) for name in sets for seed in range(10) for _ in range(16)
    ]
    work = Work(Plan(study, tmp_path), tmp_path, chosen(""))
    assert [job.first.run.id for job in next(work.rounds()).jobs] == [c.run.id for c in cells]
    _, others = planned(replace(study, order="seeds"), tmp_path)
    assert {cell.run.id for cell in others} == {cell.run.id for cell in cells}
    for count in (2, 3, 7):
        sizes = [len(Shard(each, count).of_cells(cells)) for each in range(1, count + 1)]
        assert sum(sizes) == 480 and max(sizes) - min(sizes) <= 2


@pytest.mark.parametrize("name", shipped.names())
def test_shipped_tiers_plan_without_data_at_hand(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights_beside(monkeypatch, tmp_path, name)
    data_beside(monkeypatch)
    path = shipped.find(Path(name))
    whole = loading.load(path)
    assert {"paper", "fair"} <= set(whole.tiers)
    _, every = planned(whole, tmp_path)
    for tier in whole.tiers:
        plan, cells = planned(loading.load(path, (), tier), tmp_path)
        assert {cell.run.id for cell in cells} <= {cell.run.id for cell in every}
        if tier == "fair":
            assert {cell.run.protocol for cell in cells} == {"equal"}
            rows = {row for each in plan.experiments for row in each.rows}
            learns = any(  # where few rows are labelled, meta rows are those trained on
                row.needs_meta and not each.benchmark.labelled
                for each in plan.experiments
                for row in each.rows
            )
            assert plan.study.family
            assert plan.study.tune or not learns or {row.control for row in rows} > {"all"}


def test_the_first_table_of_saflex_is_27_plain_runs_a_data_set(tmp_path: Path) -> None:
    study = loading.load(shipped.find(Path("saflex_table1")), (), "paper")
    plan, cells = planned(study, tmp_path)
    assert len(plan.experiments) == 8
    named = [cell for cell in cells if cell.run.control == "all"]
    control = [cell for cell in cells if cell.run.control != "all"]
    assert {cell.run.row for cell in control} == {"randaugment@train+meta", "mixup@train+meta"}
    assert {cell.run.seed for cell in cells} == {0, 1, 2}
    assert {cell.run.protocol for cell in cells} == {"paper"}
    assert hours.worth([(cell, 0) for cell in named]) == pytest.approx(8 * 27)
    assert hours.worth([(cell, 0) for cell in control]) == pytest.approx(8 * 6)


SMALL = """\
benchmarks: digits
models: small_cnn
methods: [none, saflex]
seeds: 2
training: {epochs: 10}
resources: {gpus: 0}
workers: 1
"""


def dry(folder: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, str, str]:
    load(folder, SMALL)
    before = set(folder.rglob("*"))
    arguments = ["sweep", str(folder / "some.yaml"), "--dry-run", "--out", str(folder / "runs")]
    code = main.run([*arguments, *more])
    assert set(folder.rglob("*")) == before, "nothing is written"
    told = capsys.readouterr()
    return code, told.out, told.err


def test_hours_by_a_probe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time of a plain step, times the images of an epoch, epochs, seeds and cost; an image that
    is evaluated takes a third of it.
    """
    monkeypatch.setattr(probe, "_steps", lambda run, made, limit: [9.0, 0.32, 0.32])
    code, shown, _ = dry(tmp_path, capsys)
    assert code == 0
    assert "They take about as long as 8 runs of the method none" in shown
    train, select, test = Plan(load(tmp_path, SMALL), tmp_path).experiments[0].source.counts
    seconds = 0.01 * (train * 10 * 8 + 4 * (select * 10 + test) / 3)
    assert f"About {duration(seconds)}, estimated for 4 runs from a probe" in shown


def test_a_probe_takes_real_steps_and_is_over_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    (cell, *_) = Plan(loading.load(shipped.find(Path("quickstart"))), Path()).experiments[0].cells()
    one = Setting.of(cell.run, (1, 8, 8))
    wanted = {one: (cell.run, 10), one._replace(model="mlp"): (cell.run, 10)}
    found = probe.seconds(wanted, "cpu")
    assert set(found) == set(wanted)
    assert all(each > 0 for each in found.values())
    monkeypatch.setattr(probe, "SECONDS", 0.0)
    assert probe.seconds(wanted, "cpu") == {}, "the table stands in"


@pytest.mark.parametrize(("inputs", "rows"), [((), 32), ((Input("vector", (9,), -5.0, 5.0),), 128)])
def test_a_probe_takes_whole_batches_of_a_table(
    inputs: tuple[Input, ...], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU too: a step on rows of a table takes about as long whatever their number."""
    (cell, *_) = Plan(loading.load(shipped.find(Path("quickstart"))), Path()).experiments[0].cells()
    run = replace(cell.run, training=replace(cell.run.training, batch_size=128))
    shape = (9,) if inputs else (1, 8, 8)
    setting = Setting.of(run, shape, inputs)
    taken: list[int] = []
    monkeypatch.setattr(
        probe, "_steps", lambda run, made, limit: taken.append(len(made.train)) or [1.0]
    )
    assert probe.seconds({setting: (run, 2)}, "cpu") == {setting: 1 / rows}
    assert taken == [rows]


def test_hours_by_the_shipped_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the runs go to another machine, or to a GPU that this one has not."""
    monkeypatch.setattr(capacity, "gpus", lambda: 0)
    monkeypatch.setattr(probe, "seconds", lambda *_: pytest.fail("nothing is probed"))
    code, shown, _ = dry(tmp_path, capsys, "--address", "auto")
    assert code == 0
    assert "4 runs from the shipped table (one core, measured, docs/performance.md)" in shown
    code, shown, error = dry(tmp_path, capsys, "--set", "resources.gpus=1")
    assert (code, error) == (0, ""), "a dry run may be of another machine's runs"
    assert "The time is for 1 at a time on another machine\nAbout " in shown
    assert "This machine cannot do these runs: resources: one run needs 1 GPU, but" in shown
    assert (
        "4 runs from the shipped table (a GPU at 10,000 images a second in resnet18, not" in shown
    )


def test_hours_by_runs_that_are_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of the same row; of another one what a plain run takes, times the cost."""
    (experiment,) = Plan(load(tmp_path, SMALL), tmp_path).experiments
    first = experiment.cells()[0]
    finish(first, tmp_path / "runs")  # 20 seconds
    _, shown, _ = dry(tmp_path, capsys)
    assert (
        f"About {duration(20 + 2 * 3 * 20)}, estimated for 3 runs from the results folder\n"
        in shown
    )


def test_the_shipped_table_goes_by_operations() -> None:
    small = Spec(rows=1, classes=9, shape=(3, 28, 28))
    plain = shipped_cost("resnet18", small, "cpu")
    assert plain == pytest.approx(SHIPPED["cpu"].seconds, rel=0.01)
    narrow = shipped_cost("resnet18(width=0.25)", small, "cpu")
    assert plain / narrow == pytest.approx(16, rel=0.05), "a quarter of the width, inside and out"
    gmac = 5.2 / 0.457  # of wrn28_10 at 32 x 32 and of resnet18 at 28 x 28
    wide = shipped_cost("wrn28_10", Spec(1, 10, (3, 32, 32)), "cpu")
    assert wide / plain == pytest.approx(gmac, rel=0.03)


@pytest.mark.parametrize(
    ("method", "line"),
    [
        ("saflex", "published: dual, meta B, fresh "),
        ("saflex(preset=stable)", "stable: difference, meta 2B, refresh 4 "),
        ("saflex(preset=fast)", "fast: stable on the last stage "),
        ("lpa3", "paper, ratio 0.5 "),
        ("lpa3(preset=code)", "code, ratio 0.5 "),
        ("lpa3(preset=strict)", "strict, ratio 0.5 "),
        ("lpa3(preset=fast)", "fast, ratio 0.5 "),
        ("autodo", "published, A,W,S "),
        ("autodo(preset=exact)", "exact, A,W,S "),
    ],
)
def test_declared_costs_are_those_that_were_measured(method: str, line: str) -> None:
    text = (Path(__file__).parent.parent / "docs" / "performance.md").read_text(encoding="utf-8")
    (found,) = [each for each in text.splitlines() if each.startswith(line)]
    numbers = found.removeprefix(line).split()
    measured = numbers[-3] if method.startswith("autodo") else numbers[1]
    assert methods.cost(method) == pytest.approx(float(measured), abs=0.05)


def test_costs_of_what_is_put_together() -> None:
    assert methods.cost("crop+randaugment") == 1
    assert methods.cost("saflex(upstream=randaugment)") == 3
    assert methods.cost("l2rw") == 3.2, "a function that makes a Saflex declares its own"
    assert methods.cost("shuffled_weights(upstream=saflex(preset=stable, beta=1.0))") == 1.9
    assert methods.cost("lpa3(warmup=1)") == methods.cost("lpa3")
    assert methods.cost("boosting") == methods.cost("logistic") == 0, "they take no steps"


@pytest.mark.parametrize(
    ("heading", "kind"),
    [
        ("a study", schema.Study),
        ("a block", schema.Block),
        ("a tier", schema.Tier),
        ("`resources`", schema.Resources),
        ("`tune`", schema.Tune),
        ("`asha`", schema.Asha),
    ],
)
def test_every_key_of_a_study_file_is_in_the_docs(heading: str, kind: type) -> None:
    text = (Path(__file__).parent.parent / "docs" / "studies.md").read_text(encoding="utf-8")
    part = text.partition(f"\n## Keys of {heading}\n")[2].partition("\n## ")[0]
    told = [line.split("`")[1] for line in part.splitlines() if line.startswith("| `")]
    assert sorted(told) == sorted(set(runs.field_names(kind)) - {"tier"})
