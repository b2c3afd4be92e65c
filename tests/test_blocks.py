"""Which runs come into one table, which are set apart, and what the comparisons find."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats as scipy_stats

import methods
from analysis import blocks, findings, records
from analysis.blocks import Block
from analysis.differences import difference
from analysis.facts import put_around
from analysis.findings import Finding, judged
from analysis.question import Question, comparison
from analysis.report import results, tables
from analysis.runs import Training
from analysis.stats import population_interval
from benchmarks.studies import cells
from tests.made import declared, make_run

SAFLEX = "saflex(upstream=mixup)"


def read(root: Path) -> list[Block]:
    return blocks.split(records.scan(root)[0])


def names(block: Block) -> list[str]:
    return [entry.name for entry in block.entries]


def test_data_sets_are_columns_of_one_block_even_if_trained_differently(tmp_path: Path) -> None:
    for benchmark, epochs in (("digits", 3), ("breastmnist", 5)):
        for method in ("none", "mixup"):
            make_run(tmp_path, method, benchmark=benchmark, epochs=epochs)
    (block,) = read(tmp_path)
    assert [(c.name, c.training.epochs) for c in block.columns] == [
        ("breastmnist", 5),
        ("digits", 3),
    ]
    assert all(list(column.rows) == ["none", "mixup"] for column in block.columns)


@pytest.mark.parametrize(
    "other",
    [
        {"model": "mlp"},
        {"protocol": "paper"},
        {"threads": 2},
        {"device": "cuda"},
        {"versions": {"trainer": 2, "model": 1}},
        {"versions": {"trainer": 1, "model": 2}},
        {"oracle_test": True},
        {"epochs": 4},
        {"training": Training(epochs=3, learning_rate=0.1)},
        {"result": {"versions": {"augbench": "0.2.0"}}},
    ],
    ids=str,
)
def test_what_must_not_be_mixed_is_another_block(other: dict, tmp_path: Path) -> None:
    make_run(tmp_path, "none")
    make_run(tmp_path, "mixup", **other)
    found = read(tmp_path)
    assert sorted(map(names, found)) == [["mixup"], ["none"]]
    one, two = found
    assert one.setting != two.setting or one.columns[0].training != two.columns[0].training


def test_a_data_set_that_another_metric_leads_on_is_another_block(tmp_path: Path) -> None:
    for method in ("none", "mixup"):
        make_run(tmp_path, method)
        make_run(tmp_path, method, benchmark="a", leads="auc")
    make_run(tmp_path, "crop", benchmark="a", status="failed", reason="so")
    images, table = read(tmp_path)
    assert [column.name for column in images.columns] == ["digits"] and images.leads == "accuracy"
    assert [column.name for column in table.columns] == ["a"] and table.leads == "auc"
    assert names(table) == ["none", "crop", "mixup"] and names(images) == ["none", "mixup"]
    apart = tables.blocks_table([(1, images), (2, table)])
    assert "leading metric" in apart.head


def test_other_versions_of_a_method_and_other_data_are_named(tmp_path: Path) -> None:
    make_run(tmp_path, "mixup", versions={"trainer": 1, "model": 1, "Mixup": 1})
    make_run(tmp_path, "mixup", versions={"trainer": 1, "model": 1, "Mixup": 2})
    make_run(tmp_path, SAFLEX, meta_fraction=0.1)
    make_run(tmp_path, SAFLEX, meta_fraction=0.2)
    (block,) = read(tmp_path)
    assert names(block) == [
        "mixup {version of Mixup 1}",
        "mixup {version of Mixup 2}",
        f"{SAFLEX} {{meta_fraction 0.1}}",
        f"{SAFLEX} {{meta_fraction 0.2}}",
    ]
    make_run(tmp_path / "b", "none", data="abcdefgh1")
    make_run(tmp_path / "b", "none", data="ijklmnop2")
    (block,) = read(tmp_path / "b")
    assert [c.name for c in block.columns] == ["digits [data abcdefgh]", "digits [data ijklmnop]"]


def test_how_the_pool_is_cut_names_rows_only_where_it_decides_a_number(tmp_path: Path) -> None:
    """On clean labels a row without meta rows is one run, whatever the others' meta fraction."""
    noisy = "digits(noise=0.4)"
    for method, clean in (("none", 0.2), ("mixup", 0.2), (SAFLEX, 0.5)):
        make_run(tmp_path, method, meta_fraction=clean)
        make_run(tmp_path, method, meta_fraction=0.5, benchmark=noisy)
    (block,) = read(tmp_path)
    assert names(block) == ["none", "mixup", SAFLEX]
    assert block.contrasts(Question()) == [("mixup", "none"), (SAFLEX, "mixup")]
    for method in ("mixup", SAFLEX):
        make_run(tmp_path, method, meta_fraction=0.1, benchmark=noisy)
    (block,) = read(tmp_path)
    few, many = "{meta_fraction 0.1}", "{meta_fraction 0.5}"
    assert names(block) == ["none", "mixup", *(f"mixup {each}" for each in (few, many)),
                            *(f"{SAFLEX} {each}" for each in (few, many))]  # fmt: skip
    assert block.contrasts(Question()) == [
        ("mixup", "none"),
        (f"mixup {few}", "none"),
        (f"mixup {many}", "none"),
        (f"{SAFLEX} {few}", f"mixup {few}"),
        (f"{SAFLEX} {many}", f"mixup {many}"),
    ]


def test_failed_runs_stand_beside_those_of_their_setting(tmp_path: Path) -> None:
    make_run(tmp_path, "none", device="cuda")
    make_run(tmp_path, "mixup", status="failed", reason="so")
    (block,) = read(tmp_path)
    assert names(block) == ["none", "mixup"] and block.setting["device"] == "cuda"
    assert len(block.columns[0].done) == 1 and len(block.columns[0].records) == 2


def test_a_row_of_equal_budget_stands_beside_the_row_whose_budget_it_has(tmp_path: Path) -> None:
    of = make_run(tmp_path, SAFLEX).name
    make_run(tmp_path, "mixup")
    make_run(tmp_path, "mixup", budget=f"passes of {SAFLEX}", epochs=9, recorded={"of": of})
    (block,) = read(tmp_path)
    assert names(block) == ["mixup", SAFLEX, f"mixup [passes of {SAFLEX}]"]
    assert [entry.name for entry in block.controls] == [f"mixup [passes of {SAFLEX}]"]
    assert block.columns[0].training.epochs == 3


@pytest.mark.parametrize("row", ["entaugment", "sra(upstream=crop)", "crop+sra"])
def test_a_method_without_meta_rows_stands_beside_the_controls_that_it_names(
    row: str, tmp_path: Path
) -> None:
    base, own = "crop" if "(" in row else "none", methods.controls_of(row)
    of = make_run(tmp_path, row, recorded=declared(row)).name
    for name in ("crop", "none", *own, f"random_label(upstream={row})"):
        make_run(tmp_path, name, recorded=declared(name))
    longer = {**declared(base), "of": of}
    longer["row"] = {**longer["row"], "kind": "control", "budget_of": row}
    make_run(tmp_path, base, budget=f"passes of {row}", epochs=4, recorded=longer)
    (block,) = read(tmp_path)
    entry = block.by_name[row]
    assert block.baseline(entry) == base and not entry.control and len(own) == 2
    assert set(block.controls_of(entry)) == {*own, f"{base} [passes of {row}]"}, (
        "random_label is a control of SAFLEX on this method, and trains on fewer rows"
    )
    assert list(block.without_learning(entry)) == list(own)
    assert block.controls_of(block.by_name["none"]) == []


def test_an_equal_budget_may_be_other_epochs_on_another_data_set(tmp_path: Path) -> None:
    """So that a comparison with it can be made over all of them."""
    for benchmark, epochs in (("digits", 9), ("breastmnist", 10)):
        of = make_run(tmp_path, SAFLEX, benchmark=benchmark).name
        make_run(tmp_path, "none", benchmark=benchmark)
        budget = {"budget": f"passes of {SAFLEX}", "recorded": {"of": of}}
        make_run(tmp_path, "none", benchmark=benchmark, epochs=epochs, **budget)
    (block,) = read(tmp_path)
    row = f"none [passes of {SAFLEX}]"
    assert names(block) == ["none", SAFLEX, row]
    assert block.contrasts(Question(family=((row, SAFLEX), (row, "")))) == [
        (row, SAFLEX),
        (row, "none"),
    ]


def test_dirty_meta_rows_are_a_row_of_the_same_data_set(tmp_path: Path) -> None:
    noisy = "digits(noise=0.4)"
    make_run(tmp_path, SAFLEX, benchmark=noisy)
    make_run(tmp_path, SAFLEX, benchmark="digits(meta_noise=0.4, noise=0.4)")
    make_run(tmp_path, SAFLEX, benchmark="digits(meta_noise=0.1, noise=0.4)")
    (block,) = read(tmp_path)
    assert [c.name for c in block.columns] == ["digits(meta_noise=0.1, noise=0.4)", noisy]
    assert names(block) == [SAFLEX, f"{SAFLEX}@dirty"]
    assert [entry.name for entry in block.controls] == [f"{SAFLEX}@dirty"]


def test_a_file_of_the_users_own_is_named_by_its_name(tmp_path: Path) -> None:
    make_run(tmp_path, benchmark="npz(noise=0.4)", recorded={"path": "/some/where/scans.npz"})
    assert read(tmp_path)[0].columns[0].name == "npz:scans.npz(noise=0.4)"


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("none", ("", "none")),
        ("crop+mixup", ("", "crop+mixup")),
        (SAFLEX, ("mixup", "mixup")),
        ("saflex(upstream=crop+mixup)", ("crop+mixup", "crop+mixup")),
        (f"shuffled_weights(upstream={SAFLEX})", (SAFLEX, "mixup")),
        ("norm_noise(upstream=lpa3(upstream=crop))", ("lpa3(upstream=crop)", "crop")),
        ("random_label(upstream=crop)", ("crop", "crop")),
        ("lpa3", ("none", "none")),
        ("head_refit", ("none", "none")),
    ],
)
def test_what_a_method_is_put_around(method: str, expected: tuple[str, str]) -> None:
    assert put_around(method) == put_around(method, methods.takes_upstream) == expected
    if expected[0]:
        assert cells.upstream_of(method) == expected[1]


def test_baselines_and_the_family(tmp_path: Path) -> None:
    shuffled = f"shuffled_weights(upstream={SAFLEX})"
    for method in ("none", "mixup", SAFLEX, "autodo", shuffled, "saflex(upstream=crop)"):
        make_run(tmp_path, method)
    make_run(tmp_path, "mixup", control="train")
    (block,) = read(tmp_path)
    assert [entry.name for entry in block.controls] == ["mixup@train", shuffled]
    assert set(block.contrasts(Question())) == {
        ("mixup", "none"),
        (SAFLEX, "mixup"),
        ("autodo", "none"),
        ("saflex(upstream=crop)", "none"),  # its own upstream has no run
    }
    asked = Question(family=((SAFLEX, ""), (SAFLEX, "mixup@train"), ("cutmix", "none")))
    assert block.contrasts(asked) == [(SAFLEX, "mixup"), (SAFLEX, "mixup@train")]


def study(root: Path, **skills: float) -> Block:
    for benchmark in ("digits", "breastmnist"):
        for method, skill in skills.items():
            for seed in range(6):
                make_run(root, method, seed, skill, benchmark=benchmark, test_rows=90)
    (block,) = read(root)
    return block


def test_findings_are_paired_differences_with_holm_over_the_family(tmp_path: Path) -> None:
    block = study(tmp_path, none=1.0, mixup=2.0, crop=1.0)
    found = findings.findings(block, Question())
    assert [(f.row, f.base, f.column) for f in found] == [
        (row, "none", column) for column in ("breastmnist", "digits") for row in ("crop", "mixup")
    ]
    plain = []
    for each in found:
        rows = block.columns[["breastmnist", "digits"].index(each.column)].rows
        right = [
            np.array([r.item_values("accuracy") for r in rows[name].records])
            for name in (each.row, each.base)
        ]
        truth = population_interval(100 * (right[0] - right[1]), np.arange(90) % 3)
        assert each.difference is not None and each.difference.population == truth
        # the interval at level 1 - p ends at 0
        p = each.difference.variances.p_zero()  # type: ignore[union-attr]
        plain.append(p)
        again = population_interval(100 * (right[0] - right[1]), np.arange(90) % 3, 1 - p)
        assert min(abs(again.low), abs(again.high)) < 1e-4
    order = np.sort(plain)
    least = min(found, key=lambda each: each.p)
    assert least.p == pytest.approx(4 * order[0]) and least.verdict == "better"
    for each in found:
        assert each.verdict == ("better" if each.p <= 0.05 else "undecided")
    assert {each.verdict for each in found if each.row == "mixup"} == {"better"}


def test_a_cost_is_a_ratio_to_the_upstream_alone_or_to_nothing(tmp_path: Path) -> None:
    make_run(tmp_path, SAFLEX, cost=3.0)
    make_run(tmp_path, "saflex(upstream=crop)", cost=4.0)
    make_run(tmp_path, "crop", cost=2.0)

    def ratios() -> dict[str, str]:
        (block,) = read(tmp_path)
        table = results.main_table(block, "accuracy", "accuracy", False, "last")
        found = {row[0].text: row[-1].text for group in table.groups for row in group.rows}
        cost = tables.cost_table(block, "cost")
        place = cost.head.index("ratio ↓")
        assert found == {row[0].text: row[place].text for row in cost.groups[0].rows}
        return found

    # neither mixup nor none was run: no row is a ratio to itself
    assert ratios() == {"crop": "n/a", SAFLEX: "n/a", "saflex(upstream=crop)": "2.00"}
    make_run(tmp_path, "none", cost=1.0)
    # none is not what saflex(upstream=mixup) is without saflex
    expected = {"none": "1.00", "crop": "2.00", SAFLEX: "n/a", "saflex(upstream=crop)": "2.00"}
    assert ratios() == expected


def made(estimate: float, sd: float, seeds: int = 10) -> Finding:
    """A comparison on 400 images of which each seed and image is off by chance."""
    from analysis import differences, stats

    rng = np.random.default_rng(0)
    d = rng.normal(0, sd, (seeds, 400))
    d += estimate - d.mean()
    variances = stats.crossed(d)
    interval = variances.interval() if seeds >= 3 else None
    one = differences.Difference(estimate, seeds, interval, interval, 1.0, variances)
    return Finding("a", "b", "digits", one)


def test_verdicts() -> None:
    few = made(5, 1, seeds=2)
    listed = [made(2, 5), made(-2, 5), made(0.1, 0.5), made(0.4, 30), made(0.45, 0.05), few]
    got = judged(listed, 0.5)
    expected = ["better", "worse", "equivalent", "undecided", "equivalent", "not tested"]
    assert [each.verdict for each in got] == expected
    # of the fifth also p says that it differs from 0: a difference, but within the margin
    assert got[4].p < 0.05 and np.isnan(got[5].p)
    missing = replace(few, difference=None)
    assert judged([missing], 0.5) == [missing]


@pytest.mark.parametrize(
    ("seeds", "told"),
    [(2, "not tested"), (3, "better (few seeds)"), (9, "better (few seeds)"), (10, "better")],
)
def test_a_verdict_of_few_seeds_says_so(seeds: int, told: str) -> None:
    (got,) = judged([made(5, 1, seeds)], 0.5)
    assert got.told == told


def test_over_data_sets(tmp_path: Path) -> None:
    block = study(tmp_path, none=1.0, mixup=3.0)
    found = findings.findings(block, Question())
    (one,), reason = findings.overall(block, found, 0.5)
    assert one.sets == 2 and (one.wins, one.ties, one.losses) == (2, 0, 0)
    means = [
        np.mean([r.metric("accuracy") for r in column.rows[name].records])
        for column in block.columns
        for name in ("mixup", "none")
    ]
    assert one.estimate == pytest.approx(100 * (means[0] - means[1] + means[2] - means[3]) / 2)
    assert "2 data sets" in reason and np.isnan(one.p)
    halves = [(f.difference.population.high - f.difference.estimate) for f in found]  # type: ignore[union-attr]
    assert one.interval is not None
    assert one.interval.high - one.estimate == pytest.approx(math.hypot(*halves) / 2)
    chances = []
    for column in block.columns:
        ours, theirs = (
            [record.metric("accuracy") for record in column.rows[name].records]
            for name in ("mixup", "none")
        )
        chances.append(scipy_stats.mannwhitneyu(ours, theirs)[0] / 36)
    assert one.improvement == pytest.approx(np.mean(chances))


def test_with_few_seeds_nothing_is_inferred_over_data_sets_either(tmp_path: Path) -> None:
    """Eight data sets would do for Wilcoxon's test and for ranks: two seeds do not."""
    for number in range(8):
        for method, skill in (("none", 0.2), ("mixup", 3.0), ("crop", 3.0)):
            for seed in range(2 if method == "mixup" else 4):
                make_run(tmp_path, method, seed, skill, benchmark=f"npz{number}")
        make_run(tmp_path, "flip", benchmark=f"npz{number}")
    make_run(tmp_path, "none", benchmark="nothing", status="failed", reason="no room")
    (block,) = read(tmp_path)
    asked = Question(family=(("crop", ""), ("mixup", "")))
    over, reason = findings.overall(block, findings.findings(block, asked), 0.5)
    assert len(over) == 2 and all(np.isnan(each.p) for each in over)
    assert reason == (
        "some comparison is not tested (fewer than 3 seeds, an incomplete repeat of folds, only "
        "one test patient, or equal predictions)"
    )
    alone = Question(family=(("crop", ""),))
    (crop,), reason = findings.overall(block, findings.findings(block, alone), 0.5)
    assert crop.p <= 0.05 and reason == ""
    ranked = findings.mean_ranks(block, "accuracy")
    assert ranked is not None and ranked[0] == ("none", "crop") and ranked[2] == 8
    table = tables.ranks_table(block, "ranks")
    assert table is not None
    assert table.notes[-1] == "Left out, with fewer than 3 seeds on a data set: flip, mixup."


def test_views_of_the_same_scans_are_one_data_set(tmp_path: Path) -> None:
    for benchmark in ("organamnist", "organcmnist", "organsmnist", "digits"):
        for method, skill in (("none", 1.0), ("mixup", 2.0), ("crop", 1.5)):
            for seed in range(4):
                make_run(tmp_path, method, seed, skill, benchmark=benchmark)
    (block,) = read(tmp_path)
    found = findings.findings(block, Question())
    over, _ = findings.overall(block, found, 0.5)
    assert {each.sets for each in over} == {2}
    of = {f.column: f.difference.estimate for f in found if f.row == "mixup" and f.difference}
    organs = np.mean([value for name, value in of.items() if name != "digits"])
    mixup = next(each for each in over if each.row == "mixup")
    assert mixup.estimate == pytest.approx((organs + of["digits"]) / 2)
    ranked = findings.mean_ranks(block, "accuracy")
    assert ranked is not None and ranked[2] == 2


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        ("digits(noise=0.4)", "digits"),
        ("breastmnist(size=64)", "breastmnist"),
        ("breastmnist [data 01234567]", "breastmnist"),
        ("organcmnist(size=64)", "organs"),
        ("npz:scans.npz(noise=0.1)", "npz:scans.npz"),
        ("npz:scans (1).npz(noise=0.1)", "npz:scans (1).npz"),
        ("npz:scans.npz(noise=0.1) [data 0a1b2c3d]", "npz:scans.npz [data 0a1b2c3d]"),
        ("breastmnist [data 0a1b2c3d]", "breastmnist"),
    ],
)
def test_what_counts_as_one_data_set(column: str, expected: str) -> None:
    assert findings.data_set(column) == expected


def test_the_best_and_what_is_tied_with_it(tmp_path: Path) -> None:
    block = study(tmp_path, none=0.2, mixup=3.0, crop=3.0)
    for column in block.columns:
        top, tied, untested, detectable = findings.best(
            column, ["none", "mixup", "crop"], "accuracy"
        )
        assert {top, *tied} == {"mixup", "crop"} and not untested
        others = sorted({"none", "mixup", "crop"} - {top})
        made = [difference(column.rows[each], column.rows[top], "accuracy") for each in others]
        assert sorted(detectable) == sorted(each.detectable for each in made if each)
    few = replace(
        block.columns[0],
        rows={n: replace(r, records=r.records[:2]) for n, r in block.columns[0].rows.items()},
    )
    top, tied, untested, _ = findings.best(few, ["none", "mixup", "crop"], "accuracy")
    assert not tied and {top, *untested} == {"none", "mixup", "crop"}
    assert findings.best(few, [], "accuracy") == ("", frozenset(), frozenset(), ())


def test_a_row_of_few_seeds_is_not_tested_and_if_it_leads_nothing_is_marked(
    tmp_path: Path,
) -> None:
    block = study(tmp_path, none=0.2, mixup=3.0, crop=3.0, flip=3.0)
    digits = next(column for column in block.columns if column.name == "digits")
    top = findings.best(digits, ["none", "mixup", "crop"], "accuracy").top
    short = replace(digits.rows["flip"], records=digits.rows["flip"].records[:2])
    rows = {**digits.rows, "flip": short}
    made_of = {
        column.name: replace(digits, rows=rows) if column is digits else column
        for column in block.columns
    }
    for record in short.records:
        record.result["metrics"]["last"]["test"]["accuracy"] = 0.1
    found = findings.best(made_of["digits"], ["none", "mixup", "crop", "flip"], "accuracy")
    assert found.untested == {"flip"} and {found.top, *found.tied} == {"mixup", "crop"}
    assert found.top == top
    short_block = replace(block, columns=tuple(made_of.values()))
    table = results.main_table(short_block, "accuracy", "accuracy", False, "last")
    (line,) = (note for note in table.notes if note.startswith("Not tested"))
    assert line.endswith("repeat of folds: flip on digits.")
    assert any("italics (tied): not significantly different" in note for note in table.notes)
    for record in short.records:
        record.result["metrics"]["last"]["test"]["accuracy"] = 1.0
    assert findings.best(made_of["digits"], ["none", "mixup", "crop", "flip"], "accuracy") == (
        "flip", frozenset(), {"none", "mixup", "crop"}, ()
    )  # fmt: skip
    table = results.main_table(short_block, "accuracy", "accuracy", False, "last")
    place = table.head.index("digits, % ↑")
    marks = [row[place].mark for group in table.groups for row in group.rows]
    assert len(marks) == 4 and not any(marks)
    (line,) = (note for note in table.notes if note.startswith("Nothing is marked"))
    assert line.endswith("fewer than 3 seeds has the highest mean: digits: flip (n = 2).")


def test_a_base_is_chosen_on_select_for_each_data_set(tmp_path: Path) -> None:
    """The better of two rows on select is not the better one on test."""
    strong = "randaugment(m=20)"
    better = {("digits", "randaugment"): 3.0, ("breastmnist", strong): 3.0}
    for benchmark in ("digits", "breastmnist"):
        for seed in range(3):
            make_run(tmp_path, SAFLEX, seed, benchmark=benchmark)
            for row in ("randaugment", strong):
                skill = better.get((benchmark, row), 0.5)
                make_run(tmp_path, row, seed, skill, benchmark=benchmark)
    for folder in tmp_path.iterdir():  # on test, the other row is the best
        told = json.loads((folder / "result.json").read_text())
        select = told["metrics"]["last"]["select"]["auc"]
        told["metrics"]["last"]["test"]["accuracy"] = 1 - select
        (folder / "result.json").write_text(json.dumps(told))
    (block,) = read(tmp_path)
    asked = Question(family=(comparison(f"{SAFLEX} over randaugment or randaugment( m=20 )"),))
    base = f"randaugment or {strong}"
    assert block.contrasts(asked) == [(SAFLEX, base)]
    found = {each.column: each for each in findings.findings(block, asked)}
    assert {each.base for each in found.values()} == {base}
    chosen = {"digits": "randaugment", "breastmnist": strong}
    assert {name: each.chosen for name, each in found.items()} == chosen
    for column in block.columns:
        own = difference(column.rows[SAFLEX], column.rows[chosen[column.name]], "accuracy")
        assert found[column.name].difference == own
    ((over,), _) = findings.overall(block, list(found.values()), 0.5)
    assert (over.base, over.sets) == (base, 2)
    notes = tables.differences_table(list(found.values()), "differences", 0.5, "accuracy").notes
    told = f"randaugment on digits and {strong} on breastmnist."
    other = f"{strong} on breastmnist and randaugment on digits."
    assert notes[-1].startswith(f"{base}: ") and notes[-1].endswith((told, other))
    absent = Question(family=(comparison(f"{SAFLEX} over randaugment or mixup"),))
    assert block.contrasts(absent) == []
