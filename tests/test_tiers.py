"""Tiers of a study: which part of the file each is, and in which order its runs are done."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

import augbench
from analysis.studyfile import StudyError
from benchmarks.cli import main
from benchmarks.studies import loading, shipped
from benchmarks.studies.cells import Cell
from benchmarks.studies.plan import Plan, chosen
from benchmarks.studies.rounds import Work
from benchmarks.studies.schema import Study
from methods.naming import NamingError

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
        ("methods: none}", "methods: mixup}", "plain.methods: expected what a block of the file"),
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


TIERED = [name for name in shipped.names() if name != "quickstart"]


@pytest.mark.parametrize("name", TIERED)
def test_shipped_tiers_plan_without_data_at_hand(name: str, tmp_path: Path) -> None:
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
            learns = any(row.needs_meta for row in rows)
            assert plan.study.family
            assert name == "tune_saflex" or not learns or {row.control for row in rows} > {"all"}
