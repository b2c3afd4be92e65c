"""A study file: what it means, what it refuses and where; its runs are those of compare."""

import itertools
import json
import re
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import methods
from analysis import question, runs
from analysis.studyfile import StudyError
from benchmarks.cli import main, sweep
from benchmarks.data import catalogue
from benchmarks.data.download import DataError
from benchmarks.data.names import parse_benchmark
from benchmarks.running import capacity, local
from benchmarks.studies import cells, loading, plan, schema, search
from benchmarks.studies.cells import Cell
from benchmarks.studies.costs import Costs
from benchmarks.studies.plan import Plan, chosen, label
from benchmarks.studies.rounds import Round, Work
from benchmarks.studies.schema import Study
from benchmarks.training.tasks import task_of
from methods.naming import NamingError, expand
from tests.sweeping import data_beside, weights_beside

SHIPPED = sorted((Path(__file__).parent.parent / "ray_configs").glob("*.yaml"))


def write(folder: Path, text: str, name: str = "some.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def load(folder: Path, text: str, *settings: str) -> Study:
    return loading.load(write(folder, text), settings)


def refused(folder: Path, text: str, *settings: str) -> str:
    with pytest.raises(StudyError) as caught:
        load(folder, text, *settings)
    return str(caught.value)


SMALL = """\
benchmarks: digits
models: small_cnn
methods: [none, mixup]
seeds: 2
"""


SEARCH = SMALL.replace("seeds: 2\n", "")


def ids(made: Study, root: Path) -> list[str]:
    return [
        cell.run.id for experiment in Plan(made, root).experiments for cell in experiment.cells()
    ]


def test_an_id_does_not_depend_on_what_else_a_study_names(tmp_path: Path) -> None:
    for name in "ab":
        for patient in range(6):
            for number in range(2):
                path = tmp_path / "set" / name / f"{name}{patient}" / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.full((8, 8), 20 * patient + number, np.uint8)).save(path)
    plain = f"folder:{tmp_path / 'set'}"
    named = (plain, f"{plain}(groups=1)", f"{plain}(groups=1, size=8)")
    alone = {}
    for each in named:
        text = SMALL.replace("digits", json.dumps([each]))
        alone[each] = ids(load(tmp_path, text), tmp_path)
    for order in itertools.permutations(named):
        text = SMALL.replace("digits", json.dumps(order))
        assert ids(load(tmp_path, text), tmp_path) == [run for each in order for run in alone[each]]
    text = SMALL.replace("digits", json.dumps([plain, f"{plain}(groups='none.csv')"]))
    with pytest.raises(DataError, match="does not exist: groups expects a CSV file"):
        ids(load(tmp_path, text), tmp_path)


def test_a_small_file(tmp_path: Path) -> None:
    made = load(tmp_path, SMALL)
    assert made.name == "some"
    (experiment,) = Plan(made, tmp_path).experiments
    assert [row.method for row in experiment.rows] == ["none", "mixup"]
    assert experiment.seeds == (0, 1)
    assert [(c.run.method, c.run.seed) for c in experiment.cells()] == [
        ("none", 0),
        ("mixup", 0),
        ("none", 1),
        ("mixup", 1),
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("none", ["none"]),
        ("{breast|pneumonia}mnist", ["breastmnist", "pneumoniamnist"]),
        ("resnet{18|50}(width={0.25|1})", ["resnet18(width=0.25)", "resnet18(width=1)",
                                           "resnet50(width=0.25)", "resnet50(width=1)"]),
        ("{none|saflex(upstream={mixup|crop})}",
         ["none", "saflex(upstream=mixup)", "saflex(upstream=crop)"]),
        ("mixup(alpha={0.2 | 0.4})", ["mixup(alpha=0.2)", "mixup(alpha=0.4)"]),
        ("{|flip+}crop", ["crop", "flip+crop"]),
    ],
)  # fmt: skip
def test_products(text: str, expected: list[str]) -> None:
    assert expand(text) == expected


def test_a_product_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NamingError, match="at most 10,000 names"):
        expand("{none|crop}" * 26)
    many = (
        "["
        + ", ".join(
            ["&a0 [none, mixup, crop]"] + [f"&a{k} [*a{k - 1}, *a{k - 1}]" for k in range(1, 12)]
        )
        + "]"
    )
    assert load(tmp_path, SMALL.replace("[none, mixup]", many)).blocks[0].methods == (
        "none",
        "mixup",
        "crop",
    )


@pytest.mark.parametrize("text", ["{a|b", "a}", "{a|{b}", "}{"])
def test_a_brace_without_its_partner(text: str) -> None:
    with pytest.raises(NamingError, match="expected a"):
        expand(text)


def test_a_mapping_that_is_merged_may_be_anchored_below(tmp_path: Path) -> None:
    """Its own key goes before the merged one, which is no key given twice."""
    text = "training: {<<: &base {epochs: 2}, epochs: 3}\nblocks:\n- training: {<<: *base}\n"
    made = load(
        tmp_path, SMALL + text + "- training: &t {<<: *base, epochs: 4}\n- {training: *t}\n"
    )
    assert [block.training["epochs"] for block in made.blocks] == [2, 4, 4]
    text = "blocks: [{training: &t {<<: {epochs: 2}, epochs: 3}}]\ntraining: {<<: *t}\n"
    assert load(tmp_path, SMALL + text).blocks[0].training["epochs"] == 3


@pytest.mark.parametrize(
    ("file", "name"),
    [("my study.yaml", "my-study"), ("é (2).yaml", "é-2-"), ("-x.yaml", "x"), ("a.b.yaml", "a.b")],
)
def test_a_study_without_a_name_has_that_of_its_file(tmp_path: Path, file: str, name: str) -> None:
    assert loading.load(write(tmp_path, SMALL, file)).name == name


def test_names_as_text_list_and_product_are_the_same_runs(tmp_path: Path) -> None:
    head = "benchmarks: digits\nmodels: small_cnn\nseeds: 1\n"
    texts = [
        'methods: [none, "saflex(upstream=mixup(alpha=0.4), preset=stable)"]',
        'methods: "none, saflex(preset=stable,upstream=mixup(alpha=0.4))"',
        "methods:\n- none\n- saflex(upstream=mixup(alpha=0.4), preset=stable)",
        'methods: "{none|saflex(preset=stable,upstream=mixup(alpha=0.4))}"',
    ]
    found = [ids(load(tmp_path, head + text), tmp_path) for text in texts]
    assert found[0] == found[1] == found[2] == found[3]


def test_anchors_and_blocks(tmp_path: Path) -> None:
    made = load(
        tmp_path,
        """\
preset: medmnist
training: &short {epochs: 4}
seeds: 2
methods: &rows [none, crop]
benchmarks: digits
blocks:
- models: small_cnn
- models: mlp
  methods: [*rows, mixup]
  training: {batch_size: 64}
- <<: {models: small_cnn}
  seeds: [7, 9]
""",
    )
    one, two, three = Plan(made, tmp_path).experiments
    assert (one.model, two.model, three.model) == ("small_cnn", "mlp", "small_cnn")
    assert (one.training.epochs, two.training.epochs, two.training.batch_size) == (4, 4, 64)
    assert [row.method for row in two.rows] == ["none", "crop", "mixup"]
    assert three.seeds == (7, 9)


def test_the_runs_are_those_of_compare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same ids as augbench compare makes, control rows included, for both protocols."""
    made: list[Cell] = []

    def collect(self: object, work: Round, *rest: Any) -> dict[str, Any]:
        made.extend(cell for job in work.jobs for cell in job.cells)
        raise KeyboardInterrupt

    monkeypatch.setattr(local.Processes, "carry_out", collect)
    rows = "none,saflex(upstream=mixup)"
    for protocol in ("equal", "paper"):
        main.run(
            ["compare", "--benchmark", "digits(noise=0.2)", "--model", "small_cnn", "--methods",
             rows, "--epochs", "3", "--seeds", "2", "--controls", "--protocol", protocol,
             "--out", str(tmp_path / "runs"), "--device", "cpu", "--threads", "2"]
        )  # fmt: skip
    text = f"""\
benchmarks: digits(noise=0.2)
models: small_cnn
methods: "{rows}"
protocols: [equal, paper]
training: {{epochs: 3}}
seeds: 2
controls: true
threads: 2
"""
    wanted = load(tmp_path, text)
    assert sorted(ids(wanted, tmp_path)) == sorted(cell.run.id for cell in made)
    assert len(set(ids(wanted, tmp_path))) >= 16


def test_official_facts_are_those_of_the_files() -> None:
    """What a dry run takes from the catalogue is what loading the files gives."""
    from benchmarks.data.sources import default_root, locate

    for name in ("breastmnist", "pneumoniamnist", "retinamnist"):
        entry = catalogue.CATALOGUE[name]
        if None in locate(entry, 28, default_root()):
            continue
        for text in (name, f"{name}(as_rgb=true)"):
            benchmark = parse_benchmark(text)
            told = plan.source_of(benchmark, default_root(), Study(name="x"))
            read = plan.source_of(benchmark, default_root(), Study(name="x", allow_unverified=True))
            assert told == read


def test_the_family_is_told_in_the_names_of_the_rows(tmp_path: Path) -> None:
    text = SMALL.replace("[none, mixup]", "[none, mixup, saflex(upstream=mixup)]\ncontrols: true")
    family = 'family: ["saflex(upstream=mixup, preset=published) over mixup @train", mixup]\n'
    made = load(tmp_path, text + family)
    Plan(made, tmp_path).check_family()
    assert made.asked()["family"] == ["saflex(upstream=mixup) over mixup@train", "mixup"]
    either = load(tmp_path, text + "family: [none over mixup or mixup @train]\n")
    Plan(either, tmp_path).check_family()
    assert either.asked()["family"] == ["none over mixup or mixup@train"]
    absent = load(tmp_path, text + "family: [none over mixup or mixup(alpha=2.0)]\n")
    with pytest.raises(StudyError, match=r"family: unknown row 'mixup\(alpha=2.0\)'"):
        Plan(absent, tmp_path).check_family()
    label = "labels: {mixup: one or two}\n"
    assert "a label without ' or ' and ' over ', got 'one or two'" in refused(
        tmp_path, text + label
    )
    other = load(tmp_path, text + "family: [mixup over saflex]\n")
    with pytest.raises(StudyError, match=r"family: unknown row 'saflex' \(known: frozen"):
        Plan(other, tmp_path).check_family()
    assert "line 5: family: cannot read 'mixup('" in refused(tmp_path, SMALL + "family: 'mixup('\n")


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("mixup", "mixup has no base; write mixup over ROW, or add none"),
        ("saflex(upstream=crop)", ""),
        ("mixup over crop", ""),
        ("crop over flip", "no table has both crop and flip"),
    ],
)
def test_a_comparison_that_no_table_can_make_is_refused(
    entry: str, expected: str, tmp_path: Path
) -> None:
    text = (
        "benchmarks: digits\nmodels: small_cnn\nblocks:\n"
        "- methods: [mixup, crop, saflex(upstream=crop)]\n- methods: [flip]\n"
        f"  benchmarks: digits(noise=0.1)\nfamily: ['{entry}']\n"
    )
    plan = Plan(load(tmp_path, text), tmp_path)
    if not expected:
        plan.check_family()
        return
    with pytest.raises(StudyError, match=f"family: {expected}"):
        plan.check_family()


def test_rows_of_an_equal_budget_stand_in_a_family(tmp_path: Path) -> None:
    text = SMALL.replace("[none, mixup]", "[none, head_refit, saflex(upstream=mixup), mixup]")
    text += "same: passes\n"
    family = (
        "family: ['none [passes of  head_refit] over head_refit', "
        "'mixup [passes of saflex(preset=published, upstream=mixup)]']\n"
    )
    made = load(tmp_path, text + family)
    Plan(made, tmp_path).check_family()
    assert made.asked()["family"] == [
        "none [passes of head_refit] over head_refit",
        "mixup [passes of saflex(upstream=mixup)]",
    ]
    for row in ("none [time of head_refit]", "none [passes of mixup(alpha=3.0)]"):
        other = load(tmp_path, text + f"family: ['{row}']\n")
        with pytest.raises(StudyError, match="family: unknown row"):
            Plan(other, tmp_path).check_family()


@pytest.mark.parametrize("name", ["../out", "a/b", "", ".hidden", "two words"])
def test_a_name_is_that_of_a_folder(name: str, tmp_path: Path) -> None:
    assert "line 5: name: expected letters" in refused(tmp_path, f"{SMALL}name: {name!r}\n")


def test_a_search_over_a_preset(tmp_path: Path) -> None:
    """A bare word among the arguments is no method whose space is searched."""
    text = SMALL.replace("[none, mixup]", '["saflex(preset=stable, upstream=mixup)"]')
    (experiment,) = Plan(load(tmp_path, text), tmp_path).experiments
    found = search.parameters(experiment.rows[0], experiment.training, schema.Tune())
    names = {each.key.partition(".")[0] for each in found}
    assert names == {"learning_rate", "weight_decay", "saflex", "mixup"}


def test_seeds_follow_the_size_of_the_test_split(tmp_path: Path) -> None:
    text = "benchmarks: [breastmnist, pneumoniamnist]\nmethods: none\nmodels: small_cnn\n"
    few, many = Plan(load(tmp_path, text), tmp_path).experiments
    assert (len(few.seeds), len(many.seeds)) == (30, 10)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (SMALL + "metods: none\n", ["line 5", "'metods'", "did you mean 'methods'"]),
        (SMALL + "training: {epoch: 3}\n", ["line 5", "'epoch'", "did you mean 'epochs'"]),
        (SMALL + "resources: {cpu: 2}\n", ["line 5", "'cpu'", "did you mean 'cpus'"]),
        (SMALL + "tune: {trial: 2}\n", ["line 5", "'trial'", "did you mean 'trials'"]),
        (SMALL + "tune:\n  asha:\n    grase: 2\n", ["line 7", "'grase'", "'grace'"]),
        (SMALL + "tune: {trials: many}\n", ["line 5", "tune.trials", "integer"]),
        (SMALL + "blocks:\n- seeds: 3\n- sedes: 3\n", ["line 7", "'sedes'", "'seeds'"]),
        (SMALL + "training: {epochs: -3}\n", ["line 5", "epochs", "above 0"]),
        (SMALL + "resources: {gpus: 1, trials_per_gpu: 2}\n", ["line 5", "either"]),
        (SMALL + "seeds: 3\n", ["line 5", "'seeds'", "twice"]),
        (SMALL + "preset: medmist\n", ["line 5", "did you mean 'medmnist'"]),
        (SMALL + "protocols: [equal, papers]\n", ["line 5", "'equal' or 'paper'"]),
        (SMALL + "crossfit: 0\n", ["crossfit"]),
        (SMALL + "threads: 0\n", ["threads", "1 or more"]),
        (SMALL + "workers: 0\n", ["workers", "1 or more"]),
        (SMALL.replace("mixup", "mixu"), ["line 3", "did you mean 'mixup'"]),
        (SMALL.replace("digits", "digit"), ["line 1", "did you mean 'digits'"]),
        (SMALL.replace("small_cnn", "small_cn"), ["line 2", "did you mean 'small_cnn'"]),
        (SMALL.replace("mixup", '"saflex(upstream={mixup"'), ["line", "expected a }"]),
        (SMALL.replace("seeds: 2", "seeds: 0"), ["line 4", "1 to 100,000"]),
        (SMALL.replace("methods: [none, mixup]\n", ""), ["methods", "at least one"]),
        ("methods: [none\n", ["line"]),
        ("- none\n", ["expected a mapping"]),
        ("", ["expected a mapping"]),
        (SMALL + "training: 5\nblocks:\n- seeds: 3\n", ["line 5", "training", "mapping, got 5"]),
        (SMALL + "blocks:\n- training: 5\n", ["line 6", "training", "mapping, got 5"]),
        (SMALL + "? [a]\n: 3\n", ["line 5", "expected a string as a key", "a sequence"]),
        (SMALL + "on: 3\n", ["line 5", "expected a string as a key", "got on"]),
        (SMALL + "training: &t {<<: *t}\n", ["line 5", "contains itself"]),
        (SMALL.replace("seeds: 2", "seeds: 1000000000"), ["line 4", "1 to 100,000"]),
        (SMALL + "tune: {trials: 1000000000}\n", ["line 5", "1 to 100,000"]),
        (SMALL.replace("mixup", '"' + "{none|crop}" * 26 + '"'), ["line 3", "at most 10,000"]),
        (SMALL.replace("seeds: 2", "seeds: 60000"), ["at most 100,000 runs, got 120,000"]),
        (SEARCH + "tune: {trials: 100000}\n", ["at most 100,000 runs, got 200,000"]),
        (SMALL + "training: {epochs: true}\n", ["line 5", "epochs: expected a number, got True"]),
        (SMALL + "retries: true\n", ["line 5", "retries: expected a number, got True"]),
        (SEARCH + "tune: {trials: true}\n", ["line 4", "trials: expected a number, got True"]),
        (SMALL + "mlflow: {experiment_name: x}\n", ["line 5", "mlflow: it is not installed"]),
        (SMALL + "x: !!python/object/apply:os.getcwd []\n", ["line 5", "python"]),
    ],
)
def test_what_is_refused_and_where(tmp_path: Path, text: str, parts: list[str]) -> None:
    said = refused(tmp_path, text)
    assert all(part in said for part in ["some.yaml", *parts]), said


def test_nothing_of_a_file_is_run(tmp_path: Path) -> None:
    mark = tmp_path / "made"
    text = f"{SMALL}question: !!python/object/apply:pathlib.Path.touch [{mark}]\n"
    refused(tmp_path, text)
    assert not mark.exists()


def test_settings_go_before_the_file(tmp_path: Path) -> None:
    made = load(tmp_path, SMALL, "training.epochs=3", "seeds=[4, 5]", "methods=[crop]")
    (experiment,) = Plan(made, tmp_path).experiments
    assert experiment.training.epochs == 3
    assert experiment.seeds == (4, 5)
    assert [row.method for row in experiment.rows] == ["crop"]
    text = SMALL + "blocks:\n- {seeds: 5, training: {epochs: 7}}\n- models: mlp\n"
    for settings, expected in (
        (("seeds=3", "training.epochs=2"), [(3, 2), (3, 2)]),
        (("blocks.0.seeds=3", "blocks.1.training.epochs=2"), [(3, 7), (2, 2)]),
    ):
        experiments = Plan(load(tmp_path, text, *settings), tmp_path).experiments
        assert [(len(each.seeds), each.training.epochs) for each in experiments] == expected
    assert "a number from 0 to 1" in refused(tmp_path, text, "blocks.2.seeds=3")
    assert "expected a key, got 0" in refused(tmp_path, SMALL, "blocks.0.seeds=3")
    assert "--set seeds=0: blocks.seeds: expected 1 to" in refused(tmp_path, text, "seeds=0")
    assert "training.epoch=3" in refused(tmp_path, SMALL, "training.epoch=3")
    assert "key=value" in refused(tmp_path, SMALL, "training.epochs")


@pytest.mark.parametrize(
    "given",
    [
        ["--set", "seeds=1", "--set", "methods=[none]"],
        ["--set", "seeds=1", "methods=[none]"],
        ["--set", "seeds=1", "--set", "methods=[none]", "name=other"],
    ],
)
def test_settings_are_given_at_once_or_one_after_the_other(
    tmp_path: Path, given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, SMALL)
    code = main.run(["sweep", str(path), "--dry-run", "--out", str(tmp_path / "runs"), *given])
    assert code == 0
    assert "1 runs: 1 new" in capsys.readouterr().out


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    write(tmp_path, SMALL, "other.yaml")
    with pytest.raises(StudyError, match=r"there is: other\.yaml"):
        loading.load(tmp_path / "some.yaml")


def test_a_network_that_does_not_fit_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tiny.npz"
    made: dict[str, Any] = {}
    for split in ("train", "val", "test"):
        made[f"{split}_images"] = np.zeros((30, 8, 8), np.uint8)
        made[f"{split}_labels"] = np.arange(30) % 2
    np.savez(path, **made)

    def make(spec: Any) -> None:
        raise RuntimeError("too small")

    module = type(sys)("too_small")
    vars(module).update(make=make, __file__=__file__)
    monkeypatch.setitem(sys.modules, "too_small", module)
    text = f"benchmarks: npz:{path}\nmodels: py:too_small:make\nmethods: none\n"
    with pytest.raises(NamingError, match="cannot be built for 1 x 8 x 8 images"):
        _ = Plan(load(tmp_path, text), tmp_path).experiments


def test_only(tmp_path: Path) -> None:
    made = load(tmp_path, SMALL)
    (experiment,) = Plan(made, tmp_path).experiments

    def left(pattern: str) -> list[str]:
        return [label(each) for each in experiment.cells() if chosen(pattern)(each)]

    assert len(left("")) == 4
    assert left("mixup, seed 1") == ["digits, small_cnn, equal, mixup, seed 1"]
    assert len(left("none")) == len(left("digits*none")) == 2
    assert left("cifar") == []
    assert len(left(experiment.name)) == 4, "a table's name, as it is printed, is that of its runs"


def finish(cell: Cell, root: Path, passes: float = 1.0, device: str = "cpu") -> None:
    """The run as done, with what it has cost."""
    folder = runs.folder_of(root, cell.run)
    folder.mkdir(parents=True)
    text = json.dumps({"run": asdict(cell.run), "recorded": cell.recorded})  # type: ignore[call-overload]
    (folder / "run.json").write_text(text)
    epochs = cell.run.training.epochs
    cost = {"passes_per_row": passes, "seconds_per_epoch": 2.0, "charged_seconds": 2.0 * epochs,
            "evaluation_seconds": 0.0, "epochs": epochs}  # fmt: skip
    told = {"status": "done", "files": {}, "cost": cost, "device": {"name": "m", "type": device}}
    (folder / "result.json").write_text(json.dumps(told))


def dry(path: Path, root: Path, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    assert main.run(["sweep", str(path), "--dry-run", "--out", str(root), *more]) == 0
    return capsys.readouterr().out


def test_rows_of_an_equal_budget_are_foreseen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = SMALL.replace("[none, mixup]", "[none, head_refit]") + "same: passes\n"
    path, root = write(tmp_path, text), tmp_path / "runs"
    only = ["--only", "none [passes of"]
    assert "More runs follow: equal-budget rows" in dry(path, root, capsys)
    assert main.run(["sweep", str(path), "--dry-run", "--out", str(root), *only]) == 2
    assert "are named once their methods are done" in capsys.readouterr().err
    (experiment,) = Plan(loading.load(path), tmp_path).experiments
    for cell in experiment.cells():
        finish(cell, root, {"none": 2.0, "head_refit": 5.0}[cell.run.method])
    shown = dry(path, root, capsys)
    assert shown.count("none [passes of head_refit], seed") == 2
    assert "6 runs: 4 done, 2 new; 2 to do" in shown
    assert "on top" not in shown
    assert "2 runs: 2 new; 2 to do" in dry(path, root, capsys, *only)


def test_the_time_that_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only runs on such a device tell it, and of an interrupted run only the rest counts."""
    text = SMALL + "training: {epochs: 10}\nresources: {gpus: 0}\nworkers: 1\n"
    path, root = write(tmp_path, text), tmp_path / "runs"
    (experiment,) = Plan(loading.load(path), tmp_path).experiments
    one, two, three = experiment.cells()[:3]
    finish(one, root, device="cuda")
    assert "3 runs from a probe of this machine" in dry(path, root, capsys)
    finish(two, root)
    assert "About 40 s, estimated for 2 runs from the results folder\n" in dry(path, root, capsys)
    folder = runs.folder_of(root, three.run)
    folder.mkdir()
    (folder / "checkpoint.pt").touch()
    (folder / "metrics.jsonl").write_text("{}\n" * 7)
    assert "About 26 s" in dry(path, root, capsys)
    assert "About 26 s" in dry(path, root, capsys, "--set", "threads=1")
    shown = dry(path, root, capsys, "--set", "threads=2", "resources.cpus=1")
    assert "4 runs from a probe of this machine" in shown


def test_the_first_prediction_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A later one stands beside it, with the day and the runs that were done by then."""
    root = tmp_path / "runs"
    plan = Plan(load(tmp_path, SMALL), tmp_path)
    sweep._remember(Work(plan, root, chosen("")))
    assert question.read(root, "some").predictions == ()
    for text, done in (("crop wins", 0), ("crop wins", 1), ("mixup wins", 1)):
        plan = Plan(load(tmp_path, SMALL + f"prediction: {text}\n"), tmp_path)
        if done and not any(root.glob("*/result.json")):
            finish(plan.experiments[0].cells()[0], root)
        sweep._remember(Work(plan, root, chosen("")))
    asked = question.read(root, "some")
    assert asked.prediction == "crop wins"
    assert [(each.text, each.runs) for each in asked.predictions] == [
        ("crop wins", 0),
        ("mixup wins", 1),
    ]
    today = time.strftime("%Y-%m-%d")
    assert asked.predictions[1].when == f"on {today}, after 1 run"
    assert "The prediction was changed" in capsys.readouterr().err


def test_a_dry_run_refuses_what_the_sweep_would(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    path, root = write(tmp_path, SMALL), tmp_path / "runs"
    monkeypatch.setattr(capacity, "gpus", lambda: 0)
    monkeypatch.setattr(capacity, "cores", lambda: 4)
    for setting, part in (
        ("resources.cpus=64", "needs 64 cores, but this machine has 4"),
        (
            "resources.trials_per_gpu=2",
            "has 0: train on the CPU with --set resources.trials_per_gpu=0",
        ),
        ("tune.trials=2", "set tune.seeds to 3"),
    ):
        arguments = ["sweep", str(path), "--dry-run", "--out", str(root), "--set", setting]
        if setting.startswith("tune"):
            path.write_text(SEARCH)
        is_refused = setting.startswith("tune")  # what the machine lacks is said, with the hours
        assert main.run(arguments) == 2 * is_refused
        told = capsys.readouterr()
        assert part in (told.err if is_refused else told.out)
    path.write_text(SMALL)
    cluster = dry(path, root, capsys, "--address", "auto", "--set", "resources.cpus=64")
    assert "On the cluster, as many" in cluster
    monkeypatch.setattr(capacity, "gpus", lambda: 2)
    assert "4 at a time" in dry(path, root, capsys, "--set", "resources.trials_per_gpu=2")
    assert "2 at a time" in dry(path, root, capsys, "--workers", "2")


def test_a_thousand_runs_are_looked_at_a_few_times_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a dry run and a sweep with nothing to do cost is counted, not timed."""
    path, root = write(tmp_path, SMALL.replace("seeds: 2", "seeds: 500")), tmp_path / "runs"
    looked: Counter[str] = Counter()
    status_of, make = runs.status_of, cells.make_cell

    def status(folder: Path) -> runs.Status:
        looked["status"] += 1
        return status_of(folder)

    def made(*given: Any, **more: Any) -> Cell:
        looked["cells"] += 1
        return make(*given, **more)

    monkeypatch.setattr(runs, "status_of", status)
    monkeypatch.setattr(cells, "make_cell", made)
    assert "1000 runs: 1000 new" in dry(path, root, capsys)
    assert looked["status"] <= 2 * 1000
    assert looked["cells"] <= 10, "one for each row, whatever the number of seeds"


def test_times_are_foreseen_from_runs_that_are_done(tmp_path: Path) -> None:
    (experiment,) = Plan(load(tmp_path, SMALL), tmp_path).experiments
    none, mixup, other = experiment.cells()[:3]
    costs = Costs()
    assert costs.of(none.run) is None
    costs.saw(other.run, {"cost": {"charged_seconds": 8.0, "evaluation_seconds": 2.0, "epochs": 5}})
    epochs = none.run.training.epochs
    assert costs.of(none.run) == pytest.approx(2.0 * epochs)
    assert costs.of(mixup.run) == pytest.approx(2.0 * epochs), "other rows stand in"
    costs.saw(mixup.run, {"cost": {"charged_seconds": 5.0, "evaluation_seconds": 0, "epochs": 1}})
    assert costs.of(mixup.run) == pytest.approx(5.0 * epochs)
    assert costs.of(mixup.run, epochs - 1) == pytest.approx(5.0)
    assert costs.of(none.run) == pytest.approx(2.0 * epochs)
    boosting = replace(none.run, method="boosting")
    costs.saw(boosting, {"cost": {"charged_seconds": 1e6, "evaluation_seconds": 0, "epochs": 1}})
    assert costs.of(none.run) == pytest.approx(2.0 * epochs), "it takes no steps"
    assert costs.of(replace(none.run, method="logistic")) == 0


def test_a_dry_run_starts_nothing_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, SMALL + "question: Which?\n")
    before = set(tmp_path.rglob("*"))
    code = main.run(["sweep", str(path), "--dry-run", "--out", str(tmp_path / "runs")])
    shown = capsys.readouterr().out
    assert code == 0
    assert set(tmp_path.rglob("*")) == before
    assert shown.count(": to do") == 4
    assert "4 runs: 4 new; 4 to do" in shown
    assert "Which?" in shown
    main.run(["sweep", str(path), "--dry-run", "--out", str(tmp_path / "runs"), "--only", "mixup"])
    assert "2 runs: 2 new" in capsys.readouterr().out


def test_usage_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, SMALL)
    for arguments, part in (
        (["--only", "nothing of this name"], "expected a pattern"),
        (["--workers", "0"], "1 or more"),
        (["--set", "sedes=3"], "'seeds'"),
    ):
        assert main.run(["sweep", str(path), "--out", str(tmp_path), *arguments]) == 2
        assert part in capsys.readouterr().err


def test_a_plug_in_that_cannot_be_had_is_a_row_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = methods.Entry("no_such_module_anywhere:Thing", "plug-in")
    monkeypatch.setattr(methods, "registry", lambda: {**methods.BUILTIN, "thing": entry})
    path = write(tmp_path, SMALL.replace("mixup", "thing"))
    assert main.run(["sweep", str(path), "--dry-run", "--out", str(tmp_path / "runs")]) == 0
    shown = capsys.readouterr().out
    assert "thing: not available: " in shown
    assert shown.count(": to do") == 2


def test_the_help_and_a_plan_need_no_ray() -> None:
    code = (
        "import sys, benchmarks.cli.sweep, benchmarks.studies.rounds, benchmarks.studies.search;"
        "print([m for m in ('ray', 'tensorboardX', 'optuna') if m in sys.modules])"
    )
    shown = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert shown.strip() == "[]"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_studies_fit_the_constructors(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every row is built and every network is, on the shapes of every data set."""
    weights_beside(monkeypatch, tmp_path, path.stem)
    data_beside(monkeypatch)
    lines = path.read_text(encoding="utf-8").splitlines()
    header = list(itertools.takewhile(lambda line: line.startswith("#"), lines))
    for word in ("Reproduces", "Cost", "Deviations"):
        assert sum(line.startswith(f"# {word} ") for line in header) == 1
    made = loading.load(path)
    deviations = "\n".join(header).partition("# Deviations")[2]
    low = {block.training.get("precision") == "bfloat16" for block in made.blocks}
    assert low == {"bfloat16" in deviations}
    assert made.question
    assert made.prediction
    assert made.family
    assert made.margin > 0
    plan = Plan(made, tmp_path)
    rows = {row.method for experiment in plan.experiments for row in experiment.rows}
    plan.check_family()
    for row in rows:
        built, reasons = methods.build(row), set()
        for experiment in plan.experiments:
            entry = catalogue.CATALOGUE.get(experiment.benchmark.name)
            task = task_of(entry.kind if entry else "multi-class")
            reasons.add(built.supports(task, experiment.source.spec))
        assert "" in reasons, f"{row} runs nowhere: {reasons}"
    if made.tune is not None:
        from benchmarks.studies.search import listed

        for experiment in plan.experiments:
            for row in experiment.rows:
                assert len(listed(row, experiment.training, made.tune)) > 1
    assert (
        sum(len(experiment.rows) * len(experiment.seeds) for experiment in plan.experiments)
        < schema.MAX_RUNS
    )
    told = {int(count) for count in re.findall(r"\b(\d+) rows (?:of|with)", "\n".join(header))}
    assert told <= {len(experiment.rows) for experiment in plan.experiments}


def test_every_method_on_corrupted_images_has_its_first_control(tmp_path: Path) -> None:
    """In the whole study and in the tier fair, whose rows have the same labels."""
    (path,) = [each for each in SHIPPED if each.stem == "medmnist_corruptions"]
    for tier in ("full", "fair"):
        for experiment in Plan(loading.load(path, [], tier), tmp_path).experiments:
            rows = {row.name for row in experiment.rows}
            assert tier == "full" or len(rows) == 11
            for row in experiment.rows:
                controls = methods.controls_of(row.method)[:1]
                assert {*controls} <= rows
                upstream = cells.upstream_of(row.method)
                assert not row.needs_meta or f"{upstream}@train" in rows


def test_autodo_stands_beside_its_frozen_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every shipped study; the page of learnable_tuned, whose rows are tuned, says why not."""
    data_beside(monkeypatch)
    found = set()
    for path in SHIPPED:
        if path.stem == "medmnist_pretrained":  # it has no AutoDO, and needs weights to be planned
            assert "autodo" not in path.read_text(encoding="utf-8")
            continue
        experiments = Plan(loading.load(path), tmp_path).experiments
        rows = {row.name for experiment in experiments for row in experiment.rows}
        if any(name.startswith("autodo") for name in rows):
            found.add(path.stem)
            frozen = any(name.startswith("frozen(upstream=autodo") for name in rows)
            assert frozen == (path.stem != "learnable_tuned"), path.stem
    assert {"quickstart", "learnable_small", "medmnist_small", "autodo_tables"} <= found


def test_studies_are_shipped() -> None:
    assert {path.stem for path in SHIPPED} == {
        "quickstart",
        "generated_rows",
        "learnable_small",
        "learnable_tuned",
        "rivals_small",
        "rivals_tuned",
        "medmnist_corruptions",
        "saflex_upstreams",
        "saflex_table1",
        "saflex_table2",
        "saflex_table3",
        "few_labels",
        "lpa3_small",
        "lpa3_table1",
        "lpa3_table3",
        "autodo_tables",
        "medmnist_small",
        "medmnist_all",
        "medmnist_gpu",
        "medmnist_pretrained",
        "tune_saflex",
    }


def test_folds_have_whole_repeats_and_no_search(tmp_path: Path) -> None:
    text = "benchmarks: digits(folds=5)\nmodels: small_cnn(width=0.25)\nmethods: none\n"
    (experiment,) = Plan(loading.load(write(tmp_path, text)), tmp_path).experiments
    assert experiment.seeds == tuple(range(30))
    with pytest.raises(StudyError, match=r"line 4.*whole repeats of 5"):
        loading.load(write(tmp_path, text + "seeds: 7\n"))
    searched = loading.load(write(tmp_path, text + "tune: {trials: 4, seeds: 3, final_seeds: 5}\n"))
    with pytest.raises(NamingError, match=r"tune: .* expected the official split"):
        _ = Plan(searched, tmp_path).experiments
