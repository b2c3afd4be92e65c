"""The seeds that a plan asks for, against simulated studies and cases worked by hand."""

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from analysis import (
    blocks,
    findings,
    plan,
    records,
)
from analysis.plan import (
    assured,
    plausible,
    power,
    seeds_needed,
    with_seeds,
)
from analysis.question import Question
from analysis.stats import Crossed, crossed, population_interval
from benchmarks.cli import main
from tests.made import make_run
from tests.test_stats import study


def variances(seed_sd: float, item_sd: float, rest_sd: float, seeds: int, images: int) -> Crossed:
    """The expected variances of a study of these standard deviations."""
    rest = rest_sd**2 / (images * seeds)
    return Crossed(
        estimate=0.0,
        seeds=seeds,
        images=images,
        seed=seed_sd**2 / seeds + rest,
        item=item_sd**2 / images + rest,
        residual=rest,
        df_item=images - 1,
    )


def test_more_seeds_change_the_variances_as_the_model_says() -> None:
    few, many = (variances(0.02, 0.3, 0.4, seeds, 200) for seeds in (4, 12))
    got = with_seeds(few, 12)
    for name in ("seed", "item", "residual"):
        assert getattr(got, name) == pytest.approx(getattr(many, name))
    assert got.seeds == 12


def test_without_images_the_power_is_that_of_the_t_test() -> None:
    given = variances(2.0, 0.0, 0.0, 8, 100)
    shift, critical = 1.5 / (2 / math.sqrt(8)), stats.t.ppf(0.975, 7)
    expected = stats.nct.sf(critical, 7, shift) + stats.nct.cdf(-critical, 7, shift)
    assert power(given, 1.5) == pytest.approx(expected, abs=1e-4)


def test_with_very_many_seeds_the_power_is_that_of_the_normal_test_over_images() -> None:
    given = with_seeds(variances(2.0, 30.0, 10.0, 8, 4000), 10**6)
    shift = 1.2 / (30 / math.sqrt(4000))
    expected = stats.norm.sf(1.96 - shift) + stats.norm.sf(1.96 + shift)
    assert power(given, 1.2) == pytest.approx(expected, abs=2e-3)


def test_the_fewest_seeds_or_none() -> None:
    given = variances(1.5, 10.0, 20.0, 10, 2000)
    count = seeds_needed(given, 1.0, 0.8, 0.95)
    assert count is not None
    assert assured(given, count, 1.0, 0.95) >= 0.8 > assured(given, count - 1, 1.0, 0.95)
    # more than the estimates themselves would ask for, as they are those of ten seeds
    assert power(with_seeds(given, count), 1.0) > 0.82
    assert seeds_needed(given, 50.0, 0.8, 0.95) == 3
    # 30 / sqrt(156) = 2.4 points from the images alone
    few_images = variances(1.5, 30.0, 20.0, 10, 156)
    assert seeds_needed(few_images, 1.0, 0.8, 0.95) is None
    images = plan.images_needed(few_images, 1.0, 0.8, 0.95)
    assert images == math.ceil(900 * (1.959964 + 0.841621) ** 2)
    enough = replace(few_images, item=900 / images, residual=0.0, images=images, df_item=images)
    assert power(with_seeds(enough, 10**6), 1.0) == pytest.approx(0.8, abs=5e-3)


def test_what_takes_very_many_seeds_is_not_called_impossible() -> None:
    """2.8 x 1.5 / 0.1 squared is 1,766 seeds, and the images do not matter."""
    given = variances(1.5, 0.0, 0.0, 10, 200)
    assert seeds_needed(given, 0.1, 0.8, 0.95) is None
    assert plan.resolvable(given, 0.1, 0.8, 0.95) is True
    assert power(with_seeds(given, 1766), 0.1) == pytest.approx(0.8, abs=2e-3)
    assert plan.resolvable(variances(1.5, 30.0, 20.0, 10, 156), 1.0, 0.8, 0.95) is False


def test_what_the_runs_do_not_tell_is_not_called_impossible() -> None:
    """The part of the images is estimated as 0.7 points and may be 0.32, of which 0.36 would do."""
    given = variances(1.0, 8.7, 34.0, 4, 156)
    assert power(with_seeds(given, 10**9), 1.0) < 0.5
    assert plan.resolvable(given, 1.0, 0.8, 0.95) is None
    least = replace(given, item=given.item * 155 / stats.chi2.ppf(0.95, 155))
    assert power(with_seeds(least, 10**9), 1.0) >= 0.8


def test_what_the_true_variances_may_be() -> None:
    """Their chances are those of chi-squared: half of them are above the median's share."""
    given = variances(1.0, 4.0, 6.0, 4, 156)
    made = plausible(given)
    shares = np.array([each.seed / given.seed for each in made])
    assert np.mean(shares > 3 / stats.chi2.ppf(0.5, 3)) == 0.5
    assert np.mean(shares > 1) == pytest.approx(stats.chi2.cdf(3, 3), abs=1 / 16)
    assert {each.residual for each in made} == {given.residual}


def attained_from_pilots(
    sds: tuple[float, float, float], images: int, pilot: int, repeats: int
) -> float:
    """The mean power of studies of as many seeds as a pilot of few asks for, by the true model."""
    generator, powers = np.random.default_rng([pilot, images]), []
    truth = variances(*sds, 10, images)
    for _ in range(repeats):
        found = crossed(study(generator, pilot, [images], *sds))
        count = seeds_needed(found, 1.0, 0.8, 0.95)
        if count is not None:
            powers.append(power(with_seeds(truth, count), 1.0))
    assert len(powers) > 0.8 * repeats
    return float(np.mean(powers))


def test_a_pilot_of_five_seeds_promises_no_more_than_is_attained() -> None:
    assert attained_from_pilots((1.5, 10.0, 20.0), 2000, 5, 24) >= 0.75


@pytest.mark.slow
@pytest.mark.parametrize("pilot", [4, 5, 10])
@pytest.mark.parametrize(
    ("sds", "images"), [((1.0, 4.0, 6.0), 156), ((1.5, 10.0, 20.0), 2000), ((1.5, 6.0, 10.0), 624)]
)
def test_pilots_attain_the_promised_power_within_five_points(
    sds: tuple[float, float, float], images: int, pilot: int
) -> None:
    assert attained_from_pilots(sds, images, pilot, 200) == pytest.approx(0.8, abs=0.05)


def test_the_family_of_a_plan_is_that_of_the_report(tmp_path: Path) -> None:
    """A comparison without a variance yet will be tested as well, and is not passed over."""
    for seed in range(4):
        make_run(tmp_path, "none", seed, 1.0)
        make_run(tmp_path, "mixup", seed, 1.2)
    make_run(tmp_path, "crop")
    text = plan.plan(records.scan(tmp_path)[0], Question(), 4.0, 0.8)
    assert "seeds, family of 2" in text
    assert "one test patient, or folds): crop over none on digits." in " ".join(text.split())


def attained(given: Crossed, sds: tuple[float, float, float], effect: float, repeats: int) -> float:
    """How often the interval of a study of this size leaves out 0."""
    generator, found = np.random.default_rng(5), 0
    for _ in range(repeats):
        x = effect + study(generator, given.seeds, [given.images], *sds)
        got = population_interval(x)
        found += got.low > 0 or got.high < 0
    return found / repeats


def test_of_several_studies_in_a_folder_it_says_so_and_takes_the_benchmarks_that_are_chosen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(command: str, *options: str) -> str:
        code = main.run([command, str(tmp_path), *options])
        shown = capsys.readouterr()
        assert code == (2 if "augbench:" in shown.err else 0)
        return " ".join(f"{shown.out} {shown.err}".split())

    for seed in range(3):
        for benchmark, method in (("digits", "mixup"), ("bloodmnist", "crop")):
            make_run(tmp_path, "none", seed, 1.0, benchmark=benchmark)
            make_run(tmp_path, method, seed, 1.2, benchmark=benchmark)
    mixed = "whether they belong to a study (quick) or not. To choose: --study NAME, --benchmarks"
    assert "To choose" not in said("plan")
    folder = tmp_path / "studies" / "quick"
    folder.mkdir(parents=True)
    (folder / "study.yaml").write_text("runs: [a]\n")
    every, one = said("plan"), said("plan", "--benchmarks", "blood")
    assert f"{mixed}." in every and "mixup over none" in every
    assert "To choose" not in one and "mixup" not in one
    assert "crop over none bloodmnist 3" in one and "seeds, family of 1 " in one
    assert "unknown benchmark 'chest'" in said("plan", "--benchmarks", "blood,chest")
    assert f"{mixed}, --rows." in said("table")
    assert "To choose" not in said("table", "--rows=none,crop") + said("table", "--benchmarks=dig")


def test_the_promised_power_is_attained_in_a_small_simulation() -> None:
    sds = (1.0, 4.0, 6.0)
    given = with_seeds(variances(*sds, 10, 156), 6)
    assert attained(given, sds, 2.0, 400) == pytest.approx(power(given, 2.0), abs=0.08)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sds", "images"),
    [((1.0, 3.0, 6.0), 156), ((1.0, 20.0, 40.0), 5000), ((0.3, 8.0, 8.0), 1000)],
)
def test_the_promised_power_is_attained_within_five_points(
    sds: tuple[float, float, float], images: int
) -> None:
    for effect in (1.0, 2.0):
        count = seeds_needed(variances(*sds, 10, images), effect, 0.8, 0.95)
        assert count is not None
        given = with_seeds(variances(*sds, 10, images), count)
        promised = power(given, effect)
        assert promised >= 0.8
        assert attained(given, sds, effect, 2000) == pytest.approx(promised, abs=0.05)


def test_the_plan_of_runs_at_hand(tmp_path: Path) -> None:
    for seed in range(5):
        make_run(tmp_path, "none", seed, 1.0, test_rows=300, cost=60)
        make_run(tmp_path, "mixup", seed, 1.2, test_rows=300, cost=120)
    found, _ = records.scan(tmp_path)
    text = plan.plan(found, Question(), 4.0, 0.8)
    line = next(line for line in text.split("\n") if line.startswith("mixup over none"))
    name, column, *numbers = re.split(r"\s{2,}", line)
    values = {record.run.method: [] for record in found}
    for record in sorted(found, key=lambda each: each.run.seed):
        values[record.run.method].append(record.item_values("accuracy"))
    d = 100 * (np.array(values["mixup"]) - np.array(values["none"]))
    got = crossed(d, np.arange(300) % 3)
    expected = seeds_needed(got, 4.0, 0.8, 0.95)
    assert (name, column, numbers[0]) == ("mixup over none", "digits", "5")
    assert float(numbers[1]) == pytest.approx(d.mean(axis=1).std(ddof=1), abs=0.006)
    assert expected is not None and numbers[3] == numbers[4] == str(expected)
    # 3 epochs of 180 and of 360 charged seconds, and 0.3 s of evaluation each
    assert expected > 5
    assert float(numbers[5]) == pytest.approx((expected - 5) * 1620.6 / 3600, abs=0.051)


def test_what_no_seeds_resolve_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(4):
        make_run(tmp_path, "none", seed, 1.0)
        make_run(tmp_path, "mixup", seed, 1.2)
    found, _ = records.scan(tmp_path)
    # Made predictions are as hard for one image as for another: seeds alone matter.
    text = plan.plan(found, Question(), 0.1, 0.8)
    assert "unknown" in text and "no number" not in text and " images would be" not in text
    assert "too uncertain to tell whether more seeds can show 0.1 points" in " ".join(text.split())
    (one,) = findings.findings(blocks.split(found)[0], Question())
    assert one.difference is not None
    few_images = variances(1.5, 30.0, 20.0, 10, 156)
    hard = replace(one, difference=replace(one.difference, variances=few_images))
    monkeypatch.setattr(findings, "findings", lambda *_: [hard])
    easy = replace(one, difference=replace(one.difference, variances=variances(1.5, 0, 0, 10, 200)))
    with monkeypatch.context() as patch:
        patch.setattr(findings, "findings", lambda *_: [easy])
        assert "over 1000" in plan.plan(found, Question(), 0.1, 0.8)
    text = " ".join(plan.plan(found, Question(), 1.0, 0.8).split())
    images = plan.images_needed(few_images, 1.0, 0.8, 0.95)
    assert (
        "more seeds cannot show 1 point on these test data. It would take about: "
        f"mixup over none on digits {images} test rows (has 156)." in text
    )
    monkeypatch.undo()
    one = [record for record in found if record.run.seed == 0]
    assert "No variance can be estimated" in plan.plan(one, Question(), 1.0, 0.8)
