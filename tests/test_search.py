"""The search of hyper-parameters: trials, rungs, the winner, what is recorded. Without ray."""

import importlib.util
import itertools
import json
import math
import sys
import types
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis import runs
from analysis.report import searches, sentences
from analysis.studyfile import StudyError
from benchmarks.cli import main, sweep
from benchmarks.running.disk import conclude
from benchmarks.studies import loading, plan, rounds, search
from benchmarks.studies.cells import Cell
from benchmarks.studies.ledger import Ledger
from benchmarks.studies.plan import Plan
from benchmarks.studies.rounds import Job, Work
from benchmarks.studies.schema import Asha, Study, Tune
from benchmarks.studies.search import Ladder, Outcome
from benchmarks.studies.space import Parameter, parameter
from methods.naming import NamingError

HEAD = """\
benchmarks: digits
models: small_cnn
methods: [none, saflex, saflex(upstream=randaugment), mixup]
training: {epochs: 9}
"""


def made(folder: Path, text: str = "", *settings: str) -> Study:
    path = folder / "searching.yaml"
    path.write_text(HEAD + text, encoding="utf-8")
    return loading.load(path, settings)


def settings_of(study_: Study, folder: Path) -> dict[str, list[Mapping[str, Any]]]:
    tune = study_.tune
    assert tune is not None
    (experiment,) = Plan(study_, folder).experiments
    return {row.method: search.listed(row, experiment.training, tune) for row in experiment.rows}


def checked(study_: Study, folder: Path) -> None:
    assert study_.tune is not None
    rounds.check_search(Plan(study_, folder), study_.tune)


@pytest.mark.parametrize(
    ("space", "part"),
    [
        (["unifrm", 0, 1], "did you mean 'uniform'"),
        (["uniform", 1, 0], "low < high"),
        (["uniform", 0], "expected"),
        (["loguniform", 0, 1], "0 < low < high"),
        (["loguniform", "x", 1], "expected"),
        (["choice"], "at least one option"),
        (0.3, "expected [kind, ...]"),
    ],
)
def test_spaces_that_are_refused(space: Any, part: str) -> None:
    with pytest.raises(NamingError, match=part.replace("[", r"\[").replace("]", r"\]")):
        parameter("x", space)


def test_draws_stay_within_their_space() -> None:
    rng = np.random.default_rng(0)
    log = parameter("x", ["loguniform", "1e-4", "1e-2"])  # as YAML reads them
    drawn = [log.draw(rng) for _ in range(2000)]
    assert 1e-4 <= min(drawn) <= max(drawn) <= 1e-2
    below = np.mean(np.array(drawn) < 1e-3)
    assert 0.45 < below < 0.55, "the median of a log-uniform is the geometric mean"
    whole = parameter("x", ("int", 2, 4))
    assert {whole.draw(rng) for _ in range(200)} == {2, 3, 4}
    assert {parameter("x", ("choice", [1, "a"])).draw(rng) for _ in range(100)} == {1, "a"}
    assert parameter("x", ("loguniform", 1e-3, 1e-1)).grid() == (0.001, 0.01, 0.1)
    assert parameter("x", ("int", 1, 2)).grid() == (1, 2)
    assert parameter("x", ("uniform", 0, 4)).grid() == (0.0, 2.0, 4.0)


def test_every_row_searches_the_common_space_and_its_own(tmp_path: Path) -> None:
    study_ = made(tmp_path, "tune: {trials: 12}\n")
    found = settings_of(study_, tmp_path)
    assert {len(settings) for settings in found.values()} == {12}, "equal trials"
    keys = {name: set(settings[1]) for name, settings in found.items()}
    common = {"learning_rate", "weight_decay"}
    assert keys["none"] == common
    assert keys["mixup"] == common | {"mixup.alpha"}
    own = {key for key in keys["saflex"] if key.startswith("saflex.")}
    assert len(own) >= 5
    assert keys["saflex"] == common | own
    assert keys["saflex(upstream=randaugment)"] == common | own | {"randaugment.m"}
    for number in range(1, 12):  # what two rows share, they draw alike
        for one, other in itertools.combinations(found.values(), 2):
            shared = one[number].keys() & other[number].keys()
            assert all(one[number][key] == other[number][key] for key in shared)
    assert found["none"][0] == {}, "the first trial is the row as written"


def test_the_list_of_trials_is_a_function_of_the_file(tmp_path: Path) -> None:
    text = "tune: {trials: 6}\n"
    one, other = (settings_of(made(tmp_path, text), tmp_path) for _ in range(2))
    assert one == other
    assert one != settings_of(made(tmp_path, text, "tune.seed=1"), tmp_path)
    longer = settings_of(made(tmp_path, text, "tune.trials=9"), tmp_path)
    assert all(longer[name][:6] == settings for name, settings in one.items())


def test_a_grid(tmp_path: Path) -> None:
    text = """\
tune:
  search: grid
  trials: 100
  common: {learning_rate: [choice, 0.1, 0.01], weight_decay: [choice, 0, 0.001]}
  spaces: {saflex: {beta: [uniform, 0, 1]}, randaugment: {}, mixup: {}}
"""
    found = settings_of(made(tmp_path, text), tmp_path)
    rates, decays, betas = (0.1, 0.01), (0, 0.001), (0.0, 0.5, 1.0)
    assert [tuple(each.values()) for each in found["none"][1:]] == list(
        itertools.product(rates, decays)
    )
    assert len(found["saflex"]) == 1 + len(rates) * len(decays) * len(betas)
    with pytest.raises(StudyError, match=r"trials: expected 5 or less, .*equal, none has 4 points"):
        checked(made(tmp_path, text), tmp_path)
    most = made(tmp_path, text, "tune.trials=5", "tune.seeds=3")
    checked(most, tmp_path)
    assert {len(each) for each in settings_of(most, tmp_path).values()} == {5}


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("common: {learning_rat: [uniform, 0, 1]}", "did you mean 'learning_rate'"),
        ("common: {learning_rate: [unifrm, 0, 1]}", "learning_rate: unknown kind 'unifrm'"),
        (
            "common: {epochs: [int, 1, 3]}",
            "epochs: expected none, because all trials have equal passes",
        ),
        ("common: {batch_size: [int, 1, 3]}", r"batch_size: expected 2 or more .*, got 1"),
        ("common: {batch_size: [uniform, 2, 3]}", r"batch_size: .*integer.* got 2\.5"),
        ("spaces: {saflx: {beta: [uniform, 0, 1]}}", "did you mean 'saflex'"),
        ("spaces: {saflex: {bta: [uniform, 0, 1]}}", "did you mean 'beta'"),
        ("spaces: {saflex: {beta: [uniform, 1, 0]}}", "beta: expected low < high"),
        ("spaces: {saflex: {beta: [choice, 1, many]}}", "beta: expected a number, got many"),
        ("spaces: {saflex: [beta]}", "spaces.saflex: .*valid dictionary"),
    ],
)
def test_what_a_search_draws_from_is_checked_with_its_line(
    tmp_path: Path, text: str, part: str
) -> None:
    with pytest.raises(StudyError, match=f"line 6: .*{part}"):
        made(tmp_path, f"tune:\n  {text}\n")


def test_a_number_with_an_exponent_is_no_text(tmp_path: Path) -> None:
    """YAML 1.1 reads 1e-1 as one."""
    text = "tune: {spaces: {saflex: {beta: [choice, 1e-1, 2]}}, trials: 30}\n"
    found = settings_of(made(tmp_path, text), tmp_path)
    assert {values["saflex.beta"] for values in found["saflex"][1:]} == {0.1, 2}


@pytest.mark.parametrize("key", ["same: passes", "seeds: 3"])
def test_what_a_search_decides_itself_is_refused_beside_it(tmp_path: Path, key: str) -> None:
    with pytest.raises(StudyError, match=rf"line 6: {key.partition(':')[0]}: expected none with"):
        made(tmp_path, f"tune: {{trials: 3}}\n{key}\n")


def test_a_trial_is_a_run_like_any_other(tmp_path: Path) -> None:
    study_ = made(tmp_path, "tune: {trials: 3, seeds: 2, final_seeds: 4}\n")
    (experiment,) = Plan(study_, tmp_path).experiments
    tune, row = study_.tune, experiment.rows[2]
    assert tune is not None
    values = {"learning_rate": 0.005, "saflex.beta": 2.0, "randaugment.m": 5}
    trial = search.trial_of(experiment, row, 1, values, tune)
    run = trial.cells[0].run
    assert run.method == "saflex(beta=2.0, upstream=randaugment(m=5))"
    assert run.training.learning_rate == 0.005
    assert run.training.epochs == 9
    fresh = search.finals(experiment, row, values, tune)
    assert not {cell.run.seed for cell in trial.cells} & {cell.run.seed for cell in fresh}
    assert [cell.run.seed for cell in fresh] == [0, 1, 2, 3]
    default = search.finals(experiment, row, {}, tune)
    plain = [cell for cell in experiment.cells() if cell.run.method == row.method]
    assert [cell.run.id for cell in default] == [cell.run.id for cell in plain][:4]


def test_rungs() -> None:
    assert search.rungs(None, 100) == ()
    assert search.rungs(Asha(grace=1, factor=3), 100) == (1, 3, 9, 27, 81)
    assert search.rungs(Asha(grace=2, factor=2), 9) == (2, 4, 8)
    assert search.rungs(Asha(grace=4, factor=3), 4) == ()


def test_at_a_rung_the_best_share_goes_on() -> None:
    ladder = Ladder(3)
    scores = [0.5, 0.9, 0.4, 0.8, math.nan, 0.95]
    going = []
    for trial, score in enumerate(scores):
        ladder.seen("row", 1, trial, score)
        going.append(ladder.goes_on("row", 1, trial))
    # of 1, 2, 3 the best one, of 4 to 6 the best two; what is not finite never
    assert going == [True, True, False, True, False, True]
    ladder.seen("other row", 1, 0, 0.1)
    assert ladder.goes_on("other row", 1, 0), "rows do not compete"
    ladder.seen("row", 3, 1, 0.2)
    assert ladder.goes_on("row", 3, 1), "rungs do not compete"
    everyone = Ladder(4)
    for trial in range(64):
        everyone.seen("row", 1, trial, float(trial))
    assert sum(everyone.goes_on("row", 1, trial) for trial in range(64)) == 16


def outcome(
    number: int, score: float, test: float, state: str = "done", passes: int = 10
) -> Outcome:
    rung = 3 if state == "stopped" else 0
    return Outcome(number, {"x": number} if number else {}, state, rung, score, passes, test)


def test_the_winner_is_chosen_on_select_alone() -> None:
    trials = [
        outcome(0, 0.80, 0.90),
        outcome(1, 0.85, 0.70),
        outcome(2, 0.85, 0.99),
        outcome(3, 0.99, math.nan, "stopped"),
        outcome(4, math.nan, 0.99),
    ]
    best = search.winner(trials)
    assert best is not None
    assert best.number == 1, "of equals the first, whatever test says; a pruned one never"
    assert search.regret(trials) == pytest.approx(0.29)
    assert search.winner(trials[3:]) is None
    assert math.isnan(search.regret(trials[3:]))
    assert math.isnan(search.regret([trials[0], trials[3]])), "one trial leaves nothing to choose"


def test_the_expected_score_is_that_of_all_subsets() -> None:
    rng = np.random.default_rng(3)
    trials = [
        outcome(k, float(rng.random()), float(rng.random()), "stopped" if k in (2, 5) else "done")
        for k in range(7)
    ]
    for told in search.expected(trials):
        n = int(told["trials"])
        best = [search.winner(subset) for subset in itertools.combinations(trials, n)]
        chosen = [each for each in best if each is not None]
        assert told["select"] == pytest.approx(np.mean([each.score for each in chosen]))
        assert told["test"] == pytest.approx(np.mean([each.test for each in chosen]))
        assert told["share"] == pytest.approx(len(chosen) / len(best))
    assert [told["trials"] for told in search.expected(trials)] == list(range(1, 8))


def test_equal_passes() -> None:
    cheap = [outcome(k, 0.1 * k, 0.5, passes=10) for k in range(4)]
    costly = [outcome(k, 0.1 * k, 0.5, passes=25) for k in range(4)]
    budget = sum(each.passes for each in cheap)
    assert search.within(cheap, budget) == cheap
    assert search.within(costly, budget) == costly[:1]
    assert search.within(costly, 50) == costly[:2]
    assert search.within([], 50) == []


@pytest.mark.parametrize(
    ("rows", "rarest", "protocol", "seeds", "part"),
    [
        (500, 100, "equal", 1, ""),
        (120, 40, "equal", 1, "120 rows"),
        (500, 10, "equal", 2, "10 of its rarest"),
        (120, 10, "equal", 3, ""),
        (500, 100, "paper", 5, "meta rows too"),
    ],
)
def test_where_select_is_small_a_score_is_a_mean_over_seeds(
    rows: int, rarest: int, protocol: str, seeds: int, part: str
) -> None:
    reason = search.refused(rows, rarest, protocol, Tune(seeds=seeds))
    assert (part in reason) if part else not reason


def test_a_search_that_would_choose_noise_is_refused(tmp_path: Path) -> None:
    study_ = made(tmp_path, "tune: {trials: 2}\n")
    assert study_.tune is not None
    with pytest.raises(StudyError, match=r"digits.*set tune\.seeds to 3"):
        rounds.check_search(Plan(study_, tmp_path), study_.tune)


def pretend(cell: Cell, root: Path, epochs: int, score: float, test: float) -> None:
    """Write a run as it stands after so many epochs."""
    folder = runs.folder_of(root, cell.run)
    folder.mkdir(parents=True, exist_ok=True)
    told = {"id": cell.run.id, "run": asdict(cell.run), "recorded": cell.recorded}  # type: ignore[call-overload]
    (folder / "run.json").write_text(json.dumps(told))
    lines = [
        {
            "epoch": epoch,
            "select": {"auc": score * epoch / cell.run.training.epochs, "accuracy": 0.5},
            "test": {"auc": 99.0},
            "rows": {"forward": 10, "backward": 10},
        }
        for epoch in range(1, epochs + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if epochs == cell.run.training.epochs:
        result = {"status": "done", "files": {}, "metrics": {"last": {"test": {"auc": test}}}}
        (folder / "result.json").write_text(json.dumps(result))


def planted(cell: Cell) -> float:
    """A synthetic trainable's score: best at a rate of 0.003."""
    rate = cell.run.training.learning_rate
    return 1.0 - 0.2 * abs(math.log10(rate) - math.log10(0.003))


def carry_out(jobs: list[Job], ladder: Ladder | None, ledger: Ledger) -> None:
    """What the workers do, with the synthetic trainable."""
    for job in jobs:
        if not any(ledger.to_do(cell) for cell in job.cells):
            continue
        for until in (*job.rungs, job.first.run.training.epochs):
            for cell in job.cells:
                pretend(cell, ledger.root, until, planted(cell), 1 - planted(cell))
            if ladder is None or until not in job.rungs:
                continue
            folders = [ledger.folder(cell) for cell in job.cells]
            ladder.seen(job.group, until, job.trial, search.score_at(folders, until, job.metric))
            if not ladder.goes_on(job.group, until, job.trial):
                for cell in job.cells:
                    conclude(cell.run, cell.recorded, ledger.root, "stopped", f"rung {until}")
                break


@pytest.mark.parametrize("asha", ["", "\n  asha: {grace: 1, factor: 3}"])
def test_the_search_finds_a_planted_optimum(tmp_path: Path, asha: str) -> None:
    """On select; test, planted to be worst there, chooses nothing. Again, nothing is to do."""
    text = f"tune:\n  trials: 24\n  seeds: 3\n  final_seeds: 2{asha}\n"
    study_ = made(tmp_path, text, "methods=[none]")
    root = tmp_path / "runs"
    root.mkdir()
    ledger = Ledger(root, retries=0)
    work = Work(Plan(study_, tmp_path), root, lambda cell: True)
    for each in work.rounds():
        carry_out(each.jobs, each.ladder, ledger)
    (only,) = work.searches
    outcomes = only.outcomes(root)
    best = search.winner(outcomes)
    assert best is not None
    # an unpruned search takes the best of the list; a pruned one too, as ranks here do not change
    nearest = max(only.trials, key=lambda trial: planted(trial.cells[0]))
    assert best.number == nearest.number
    assert abs(math.log10(best.values["learning_rate"]) - math.log10(0.003)) < 0.15
    stopped = [each for each in outcomes if each.state == "stopped"]
    assert bool(stopped) == bool(asha)
    assert all(each.rung in (1, 3) for each in stopped)
    assert {cell.run.seed for trial in only.trials for cell in trial.cells} == {1000, 1001, 1002}
    searched = [trial.cells[0].recorded["searched"] for trial in only.trials]
    assert searched == [dict(trial.values) for trial in only.trials], "the row as written too"
    finals = [search.finals(only.experiment, only.row, v, only.tune) for v in ({}, best.values)]
    assert ["searched" in cells[0].recorded for cells in finals] == [False, True]
    again = Work(Plan(study_, tmp_path), root, lambda cell: True)
    left = [
        cell
        for each in again.rounds()
        for job in each.jobs
        for cell in job.cells
        if ledger.to_do(cell)
    ]
    assert left == [], "pruned trials are never resumed, and nothing is done twice"
    (budget,) = work.budgets([outcomes])
    found = rounds.record(only, outcomes, budget)
    assert found["winner"] == best.number
    assert found["regret"] > 0
    assert len(found["trials"]) == 24
    assert json.loads(runs.to_json(found))["equal_passes"] == found["passes"] > 0


def test_a_search_that_has_not_ended_has_no_winner(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So no run on fresh seeds but those of the row as written, and no equal passes."""
    text = "tune: {trials: 3, seeds: 3, final_seeds: 2}\n"
    study_ = made(tmp_path, text, "methods=[none, mixup]")
    root = tmp_path / "runs"
    ledger = Ledger(root, retries=0)
    only = Work(Plan(study_, tmp_path), root, plan.chosen("none"))
    for each in only.rounds():
        carry_out(each.jobs, each.ladder, ledger)
    none, mixup = only.searches
    assert none.ended(none.outcomes(root))
    assert not mixup.ended(mixup.outcomes(root))
    assert only.budgets(only.outcomes()) == [None, None]
    for cell in mixup.trials[1].cells:
        pretend(cell, root, 9, 0.9, 0.9)
    whole = Work(Plan(study_, tmp_path), root, plan.chosen(""))
    whole.foresee()
    fresh = [cell for cell in whole.cells() if cell.run.seed < 1000]
    assert {cell.run.row for cell in fresh if "mixup" in cell.run.row} == {"mixup"}
    *_, last = whole.rounds()
    assert {job.first.run.method for job in last.jobs} == {"none"}
    monkeypatch.setattr(sweep, "_fresh", lambda *given: ("as good", {"difference": 0.0}))
    (root / "studies" / "searching").mkdir(parents=True)
    sweep._print_searches(whole, root)
    shown = capsys.readouterr().out
    assert "at equal passes: not yet" in shown
    assert "not all trials have finished: nothing is chosen yet" in shown
    kept = json.loads((root / "studies" / "searching" / "search.json").read_text())
    assert [row["equal_passes"] for row in kept] == [None, None]
    assert [row["winner"] is None for row in kept] == [False, True]
    assert [len(row["chosen"]) > 0 for row in kept] == [True, False]
    assert set(kept[0]["chosen"] + kept[1]["written"]) <= {cell.run.id for cell in fresh}
    (read,) = searches.read(root)
    searches.tables(read)


def test_trials_that_are_proposed_later_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that were proposed before are replayed from disk."""
    monkeypatch.setitem(sys.modules, "optuna", types.ModuleType("optuna"))

    def asked(row: Any, training: Any, tune: Any, seen: list[Any], count: int) -> list[Any]:
        return [{"learning_rate": 1 / (2 + len(seen) + place)} for place in range(count)]

    monkeypatch.setattr(search, "asked", asked)
    text = "tune: {trials: 9, search: optuna, seeds: 3, batch: 4, final_seeds: 1}\n"
    study_ = made(tmp_path, text, "methods=[none]")
    path, root = tmp_path / "searching.yaml", tmp_path / "runs"
    arguments = ["sweep", str(path), "--dry-run", "--out", str(root), "--set", "methods=[none]"]
    assert main.run(arguments) == 0
    assert "28 runs: 13 new, 15 in trials that are proposed once" in capsys.readouterr().out
    work = Work(Plan(study_, tmp_path), root, lambda cell: True)
    carry_out(next(work.rounds()).jobs, None, Ledger(root, retries=0))
    assert main.run(arguments) == 0
    shown = capsys.readouterr().out
    assert "28 runs: 12 done, 13 new, 3 in trials that are proposed once" in shown


def test_after_a_restart_the_rungs_are_read_from_disk(tmp_path: Path) -> None:
    text = "tune:\n  trials: 6\n  seeds: 3\n  asha: {grace: 1, factor: 3}\n"
    study_ = made(tmp_path, text, "methods=[none]")
    work = Work(Plan(study_, tmp_path), tmp_path, lambda cell: True)
    first = next(work.rounds())
    assert first.ladder is not None
    (only,) = work.searches
    for number, trial in enumerate(only.trials[:4]):
        for cell in trial.cells:
            pretend(cell, tmp_path, 3, float(number), 0.0)
    again = Work(Plan(study_, tmp_path), tmp_path, lambda cell: True)
    ladder = next(again.rounds()).ladder
    assert ladder is not None
    name = again.searches[0].name
    ladder.seen(name, 3, 5, 0.1)
    assert not ladder.goes_on(name, 3, 5), "two of four are better there"
    ladder.seen(name, 3, 4, 9.0)
    assert ladder.goes_on(name, 3, 4)


def test_a_parameter_is_told_in_words() -> None:
    assert sentences.settings({}) == "as written"
    assert sentences.settings({"a.b": [1, 2], "c": 0.5}) == "a.b [1, 2], c 0.5"
    assert Parameter("x", "choice", ((1, 2), "a")).grid() == ((1, 2), "a")


@pytest.mark.skipif(importlib.util.find_spec("optuna") is None, reason="optuna is an extra")
def test_optuna_is_fed_what_is_on_disk(tmp_path: Path) -> None:
    text = "tune: {trials: 20, search: optuna, seeds: 3, batch: 5, final_seeds: 1}\n"
    study_ = made(tmp_path, text, "methods=[none]")
    found = []
    for name in ("one", "other"):
        root = tmp_path / name
        root.mkdir()
        ledger = Ledger(root, retries=0)
        work = Work(Plan(study_, tmp_path), root, lambda cell: True)
        rounds_ = 0
        for each in work.rounds():
            carry_out(each.jobs if name == "one" else each.jobs[::-1], each.ladder, ledger)
            rounds_ += 1
        assert rounds_ == 5, "four times five trials, and the fresh seeds"
        found.append([trial.values for trial in work.searches[0].trials])
    assert found[0] == found[1], "whatever order the runs end in"
    assert len(found[0]) == 20
    rates = [values["learning_rate"] for values in found[0][1:]]
    early, late = rates[:9], rates[9:]
    distance = [
        np.mean([abs(math.log10(rate) - math.log10(0.003)) for rate in part])
        for part in (early, late)
    ]
    assert distance[1] < distance[0], "it learns where the optimum lies"


@pytest.mark.skipif(importlib.util.find_spec("optuna") is not None, reason="optuna is installed")
def test_without_optuna_the_search_says_what_to_do(tmp_path: Path) -> None:
    study_ = made(tmp_path, "tune: {search: optuna, seeds: 3}\n")
    assert study_.tune is not None
    with pytest.raises(StudyError, match=r"pip install 'augbench\[optuna\]'"):
        rounds.check_search(Plan(study_, tmp_path), study_.tune)
