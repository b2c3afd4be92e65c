"""Metrics against the official evaluator, scikit-learn, brute force and cases worked by hand."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest

from analysis import metrics
from analysis.metrics import (
    ITEMS,
    SHOWN,
    evaluate,
    item_values,
    probabilities,
    quick,
    to_test,
)
from analysis.tasks import TASKS, task_named

KINDS = tuple(TASKS)
CLASSES = {"multi-class": 5, "binary-class": 2, "ordinal-regression": 4, "multi-label": 6}
OFFICIAL = {kind: kind for kind in KINDS} | {"multi-label": "multi-label, binary-class"}


@pytest.fixture(scope="module")
def official():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the package's own imports, not its metrics
        from medmnist import evaluator
    return evaluator


def draw(kind, seed, n=157, ties=False):
    """Random logits and targets that agree somewhat; with ties, from a grid of five values."""
    generator = np.random.default_rng(seed)
    k = CLASSES[kind]
    if kind == "multi-label":
        targets = (generator.random((n, k)) < 0.3).astype(np.int64)
        signal = targets
    else:
        targets = generator.choice(k, n, p=np.arange(1, k + 1) / (k * (k + 1) / 2))
        signal = np.eye(k)[targets]
    logits = generator.normal(size=(n, k)) * 1.5 + signal
    return (np.clip(np.round(logits), -2, 2) if ties else logits).astype(np.float32), targets


def columns(logits, targets, kind):
    """The one-vs-rest (score, positive) pairs of the ranking metrics."""
    p = probabilities(logits, kind)
    if kind == "binary-class":
        return [(p[:, 1], targets == 1)]
    if kind == "multi-label":
        return [(p[:, k], targets[:, k] == 1) for k in range(p.shape[1])]
    return [(p[:, k], targets == k) for k in range(p.shape[1])]


def kernel(score, positive):
    """(m, n): 1 where a positive row is above a negative one, 1/2 where tied."""
    above, below = score[positive][:, None], score[~positive][None]
    return (above > below) + 0.5 * (above == below)


def logits_of(p):
    """Two-class logits whose softmax gives the probability p of class 1."""
    p = np.asarray(p, dtype=np.float64)
    return np.stack([np.zeros_like(p), np.log(p / (1 - p))], axis=1)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_auc_and_accuracy_are_the_official_ones(official, kind, seed, ties):
    logits, targets = draw(kind, seed, ties=ties)
    p = probabilities(logits, kind)
    got = evaluate(logits, targets, kind)
    assert got["auc"] == pytest.approx(official.getAUC(targets, p, OFFICIAL[kind]), abs=1e-14)
    assert got["accuracy"] == pytest.approx(official.getACC(targets, p, OFFICIAL[kind]), abs=1e-14)


def test_binary_accuracy_at_one_half_is_the_official_one(official):
    logits, targets = np.zeros((4, 2), np.float32), np.array([0, 0, 0, 1])
    p = probabilities(logits, "binary-class")
    assert evaluate(logits, targets, "binary-class")["accuracy"] == 0.75
    assert official.getACC(targets, p, "binary-class") == 0.75


@pytest.mark.parametrize("kind", KINDS)
def test_saturated_probabilities_tie_as_in_the_official_auc(official, kind):
    logits, targets = draw(kind, 4)
    p = probabilities(logits * 50, kind)
    assert (p == 1).sum() > 10
    got = evaluate(logits * 50, targets, kind)
    assert got["auc"] == pytest.approx(official.getAUC(targets, p, OFFICIAL[kind]), abs=1e-14)
    assert got["accuracy"] == pytest.approx(official.getACC(targets, p, OFFICIAL[kind]), abs=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_an_absent_class(official, kind):
    logits, targets = draw(kind, 1)
    k = CLASSES[kind] - 1
    if kind == "multi-label":
        targets[:, k] = 0
    else:
        targets[targets == k] = 0
    got = evaluate(logits, targets, kind)
    p = probabilities(logits, kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns, and gives nan
        assert math.isnan(official.getAUC(targets, p, OFFICIAL[kind]))
    assert got["accuracy"] == pytest.approx(official.getACC(targets, p, OFFICIAL[kind]), abs=1e-14)
    undefined = {
        name for name, value in got.items() if isinstance(value, float) and np.isnan(value)
    }
    expected = {"auc", "auprc"} | ({"sensitivity_at_95_specificity"} if k == 1 else set())
    assert undefined == expected
    recall = got["recall"]
    assert isinstance(recall, list)
    assert math.isnan(recall[k])
    assert not any(math.isnan(value) for value in recall[:k])
    assert np.isnan(item_values(logits, targets, kind, "auc")).all()


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_against_scikit_learn(kind, ties):
    from sklearn import metrics

    logits, targets = draw(kind, 7, ties=ties)
    got = evaluate(logits, targets, kind)
    p = probabilities(logits, kind)
    pairs = columns(logits, targets, kind)
    average = [metrics.average_precision_score(positive, score) for score, positive in pairs]
    area = [metrics.roc_auc_score(positive, score) for score, positive in pairs]
    labels = range(CLASSES[kind])
    if kind == "multi-label":
        both = list(zip(targets.T, (p > 0.5).T, strict=True))
        expected = {
            "balanced_accuracy": np.mean([metrics.balanced_accuracy_score(*b) for b in both]),
            "nll": np.mean([metrics.log_loss(y, q) for y, q in zip(targets.T, p.T, strict=True)]),
            "brier": np.mean(
                [metrics.brier_score_loss(y, q) for y, q in zip(targets.T, p.T, strict=True)]
            ),
            "recall": [metrics.recall_score(*b) for b in both],
        }
    else:
        predicted = p[:, 1] > 0.5 if kind == "binary-class" else p.argmax(axis=1)
        expected = {
            "balanced_accuracy": metrics.balanced_accuracy_score(targets, predicted),
            "nll": metrics.log_loss(targets, p, labels=labels),
            "brier": ((p - np.eye(len(labels))[targets]) ** 2).sum(axis=1).mean(),
            "recall": [(predicted[targets == label] == label).mean() for label in labels],
        }
        if kind == "ordinal-regression":
            expected["quadratic_kappa"] = metrics.cohen_kappa_score(
                targets, predicted, labels=labels, weights="quadratic"
            )
    expected |= {"auprc": np.mean(average), "auc": np.mean(area)}
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, rel=1e-12), name


def test_binary_brier_is_twice_that_of_one_class():
    from sklearn.metrics import brier_score_loss

    logits, targets = draw("binary-class", 2)
    half = brier_score_loss(targets, probabilities(logits, "binary-class")[:, 1])
    assert evaluate(logits, targets, "binary-class")["brier"] == pytest.approx(2 * half, rel=1e-12)


def test_balanced_accuracy_skips_absent_classes():
    logits = 4 * np.eye(3, dtype=np.float32)[[0, 1, 1, 2]]
    got = evaluate(logits, [0, 1, 0, 1], "multi-class")
    assert got["balanced_accuracy"] == 0.5  # recalls 1/2, 1/2, none


def test_kappa_counts_distances_between_classes_that_do_not_occur():
    logits = 4 * np.eye(4, dtype=np.float32)[[0, 0, 3, 3]]
    got = evaluate(logits, [0, 0, 3, 0], "ordinal-regression")
    # observed 9/4; expected: half the pairs (0 or 3, 0 or 3) differ, by 9 squared steps
    assert got["quadratic_kappa"] == pytest.approx(1 - (9 / 4) / (9 / 2))
    same = evaluate(logits[:2], [0, 0], "ordinal-regression")["quadratic_kappa"]
    assert isinstance(same, float)
    assert math.isnan(same)


def test_ece_by_hand():
    # top probabilities .9 (right, wrong), .7 (right): two bins of equal width
    got = evaluate(logits_of([0.9, 0.9, 0.3]), [1, 0, 0], "binary-class")
    assert got["ece"] == pytest.approx((2 * abs(0.5 - 0.9) + abs(1 - 0.7)) / 3)
    # in equal mass the tied pair stays together
    assert got["ece_equal_mass"] == pytest.approx((2 * abs(0.5 - 0.9) + abs(1 - 0.7)) / 3)


def test_ece_bins_close_at_their_upper_edge():
    # 0.8 = 12/15 is the upper edge of (11/15, 12/15], so it shares the bin of .74 and not of .81
    logits = np.log([[0.8, 0.2], [0.26, 0.74], [0.19, 0.81]])
    assert probabilities(logits, "binary-class")[0, 0] <= np.linspace(0, 1, 16)[12]
    got = evaluate(logits, [1, 1, 1], "binary-class")
    assert got["ece"] == pytest.approx((abs(1 - 0.8 - 0.74) + (1 - 0.81)) / 3)


def test_ece_in_bins_of_equal_mass_by_hand():
    # 30 rows, bins of two: rows 2i and 2i + 1 of ascending confidence; the first of each is wrong
    top = np.linspace(0.6, 0.99, 30)
    got = evaluate(logits_of(top), np.arange(30) % 2, "binary-class")
    pairs = top.reshape(15, 2)
    assert got["ece_equal_mass"] == pytest.approx(np.abs(1 - pairs.sum(axis=1)).sum() / 30)


def test_ece_of_all_tied_rows_is_one_gap():
    got = evaluate(logits_of(np.full(40, 0.9)), np.arange(40) % 2, "binary-class")
    assert got["ece"] == pytest.approx(0.4)
    assert got["ece_equal_mass"] == pytest.approx(0.4)


def test_multi_label_ece_is_the_mean_over_labels():
    p = np.array([[0.9, 0.2], [0.9, 0.2]])
    got = evaluate(np.log(p / (1 - p)), [[1, 0], [0, 0]], "multi-label")
    assert got["ece"] == pytest.approx((abs(0.5 - 0.9) + abs(1 - 0.8)) / 2)
    assert got["ece_equal_mass"] == pytest.approx((abs(0.5 - 0.9) + abs(1 - 0.8)) / 2)


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_rows_does_not_matter(kind):
    logits, targets = draw(kind, 5, ties=True)
    order = np.random.default_rng(0).permutation(len(logits))
    a, b = evaluate(logits, targets, kind), evaluate(logits[order], targets[order], kind)
    for name, value in a.items():
        assert b[name] == pytest.approx(value, abs=1e-12), name


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("n", [2, 19, 20, 21, 157, 400])
def test_sensitivity_at_95_specificity_by_brute_force(n, ties):
    logits, targets = draw("binary-class", n, n=n, ties=ties)
    targets[:2] = [0, 1]
    score = probabilities(logits, "binary-class")[:, 1]
    best = 0.0
    for threshold in np.concatenate([[-np.inf], score]):
        flagged = score > threshold
        if 100 * (~flagged[targets == 0]).sum() >= 95 * (targets == 0).sum():
            best = max(best, flagged[targets == 1].mean())
    got = evaluate(logits, targets, "binary-class")["sensitivity_at_95_specificity"]
    assert got == pytest.approx(best, abs=1e-15)


@pytest.mark.parametrize("gap", [-math.log(1e-7), 30.0, 50.0, 700.0])
def test_nll_is_exact_where_probabilities_round(gap):
    """At p = 1 / (1 + exp(-gap)), -log p is log1p(exp(-gap)), and that of the other class + gap."""
    single = np.array([[0, gap], [gap, 0]])
    for targets, expected in (([1, 0], 0.0), ([0, 1], gap)):
        got = evaluate(single, targets, "binary-class")["nll"]
        assert got == pytest.approx(expected + math.log1p(math.exp(-gap)), rel=1e-14, abs=0)
        got = evaluate(single[:, 1:] * 2 - gap, np.array(targets)[:, None], "multi-label")["nll"]
        assert got == pytest.approx(expected + math.log1p(math.exp(-gap)), rel=1e-14, abs=0)


def test_nll_at_one_minus_1e_7():
    logits = np.array([[0, math.log1p(-1e-7) - math.log(1e-7)]])
    assert probabilities(logits, "binary-class")[0, 1] == pytest.approx(1 - 1e-7, abs=1e-15)
    got = quick(logits, [1], "binary-class")["nll"]
    assert got == pytest.approx(-math.log1p(-1e-7), rel=1e-14, abs=0)


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_logits_stay_finite(kind):
    top = np.finfo(np.float32).max
    logits = np.full((3, CLASSES[kind]), -top, np.float32)
    logits[:, 0] = top
    targets = np.zeros((3, CLASSES[kind])) if kind == "multi-label" else np.zeros(3)
    p = probabilities(logits, kind)
    assert (p[:, 0] == 1).all()
    assert (p[:, 1:] == 0).all()
    got = evaluate(logits, targets, kind)
    expected = float(top) / CLASSES[kind] if kind == "multi-label" else 0
    assert got["nll"] == pytest.approx(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_probabilities(kind):
    logits, _ = draw(kind, 0)
    p = probabilities(logits, kind)
    z = logits.astype(np.float64)
    expected = 1 / (1 + np.exp(-z))
    if kind != "multi-label":
        expected = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(p, expected, rtol=1e-13)
    assert p.dtype == np.float64


@pytest.mark.parametrize("kind", KINDS)
def test_quick_gives_the_same_numbers(kind):
    logits, targets = draw(kind, 3)
    every = evaluate(logits, targets, kind)
    assert quick(logits, targets, kind) == {k: every[k] for k in ("auc", "accuracy", "nll")}


@pytest.mark.parametrize("kind", KINDS)
def test_one_row(kind):
    logits, targets = draw(kind, 3, n=1)
    got = evaluate(logits, targets, kind)
    assert got["accuracy"] == item_values(logits, targets, kind, "accuracy")[0]
    assert math.isnan(quick(logits, targets, kind)["auc"])


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("metric", ITEMS)
@pytest.mark.parametrize("kind", KINDS)
def test_item_values_average_to_the_metric(kind, metric, ties):
    logits, targets = draw(kind, 11, ties=ties)
    values = item_values(logits, targets, kind, metric)
    assert values.shape == (len(logits),)
    assert values.mean() == pytest.approx(evaluate(logits, targets, kind)[metric], abs=1e-12)


@pytest.mark.parametrize(
    ("counts", "leads"),
    [
        ((81, 19), "auc"),
        ((80, 20), "accuracy"),
        ((40, 60), "accuracy"),
        ((70, 25, 5), "auc"),
        ((100,) * 6, "accuracy"),
    ],
)
def test_auc_leads_where_a_class_has_less_than_two_fifths_of_its_share(counts, leads):
    labels = np.repeat(np.arange(len(counts)), counts)
    assert task_named("multi-class").leading(labels, len(counts)) == leads
    assert leads in SHOWN[leads] and leads in to_test(leads)


def test_what_stands_beside_auc_is_tested_where_its_spread_is_known():
    assert {"auc", "balanced_accuracy"} <= to_test("auc") and "auprc" not in to_test("auc")
    assert "balanced_accuracy" not in to_test("accuracy")


@pytest.mark.parametrize("ties", [False, True])
def test_item_values_have_delongs_variance(ties):
    logits, targets = draw("binary-class", 13, ties=ties)
    values = item_values(logits, targets, "binary-class", "auc")
    got = sum(
        (part.size / values.size) ** 2 * part.var(ddof=1) / part.size
        for part in (values[targets == 0], values[targets == 1])
    )
    wins = kernel(probabilities(logits, "binary-class")[:, 1], targets == 1)
    m, n = wins.shape
    expected = wins.mean(axis=1).var(ddof=1) / m + wins.mean(axis=0).var(ddof=1) / n
    assert got == pytest.approx(expected, rel=1e-12)


def test_item_values_have_delongs_covariance_of_two_models():
    """The paired variance of a difference of AUCs comes from the difference of the values."""
    (one, targets), (noise, _) = draw("binary-class", 17), draw("binary-class", 18)
    two = one + noise
    kernels = [kernel(probabilities(z, "binary-class")[:, 1], targets == 1) for z in (one, two)]
    wins = kernels[1] - kernels[0]
    m, n = wins.shape
    expected = wins.mean(axis=1).var(ddof=1) / m + wins.mean(axis=0).var(ddof=1) / n
    values = [item_values(z, targets, "binary-class", "auc") for z in (one, two)]
    d = values[1] - values[0]
    got = (m / d.size) ** 2 * d[targets == 1].var(ddof=1) / m
    got += (n / d.size) ** 2 * d[targets == 0].var(ddof=1) / n
    assert got == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", ["multi-class", "ordinal-regression", "multi-label"])
def test_item_values_of_a_macro_auc_are_its_structural_components(kind):
    logits, targets = draw(kind, 19, ties=True)
    expected = np.zeros(len(logits))
    pairs = columns(logits, targets, kind)
    for score, positive in pairs:
        wins = kernel(score, positive)
        auc, (m, n) = wins.mean(), wins.shape
        expected[positive] += auc + len(score) / m * (wins.mean(axis=1) - auc)
        expected[~positive] += auc + len(score) / n * (wins.mean(axis=0) - auc)
    got = item_values(logits, targets, kind, "auc")
    np.testing.assert_allclose(got, expected / len(pairs), rtol=1e-11, atol=1e-12)


def test_stratified_variance_of_a_macro_auc_is_its_sampling_variance():
    """Against the variance of the metric over samples with the same class counts."""
    generator = np.random.default_rng(0)
    targets = np.repeat(np.arange(3), [40, 25, 15])
    weights = np.bincount(targets) / targets.size**2
    aucs, variances = [], []
    for _ in range(600):
        logits = generator.normal(size=(80, 3)) + np.eye(3)[targets]
        values = item_values(logits, targets, "multi-class", "auc")
        aucs.append(values.mean())
        variances.append(
            sum(weights[k] * values[targets == k].var(ddof=1) for k in range(targets.max() + 1))
        )
    # 600 samples know a variance to 6 %; the structural components are biased up by a few percent
    assert np.mean(variances) == pytest.approx(np.var(aucs, ddof=1), rel=0.15)


@pytest.mark.parametrize(
    ("logits", "targets", "kind", "message"),
    [
        ([[0.0, 1.0]], [1], "multi-clas", "did you mean 'multi-class'"),
        ([0.0, 1.0], [1], "multi-class", r"shape \(2,\), expected \(N, K\)"),
        (np.zeros((0, 3)), np.zeros(0), "multi-class", "no row"),
        ([[0.0, np.nan], [np.inf, 0.0]], [0, 1], "multi-class", "2 of 4 logits are not finite"),
        ([[0.0, 0.0, 0.0]], [1], "binary-class", "3 columns, expected 2"),
        ([[0.0]], [0], "multi-class", "1 columns, too few"),
        ([[0.0, 1.0]], [[1]], "multi-class", r"targets have shape \(1, 1\), expected \(1,\)"),
        ([[0.0, 1.0]], [1], "multi-label", r"targets have shape \(1,\), expected \(1, 2\)"),
        ([[0.0, 1.0]] * 3, [0, 2, -1], "multi-class", "2 of 3 targets are not integers from 0 to"),
        ([[0.0, 1.0]] * 2, [0.5, np.nan], "binary-class", "2 of 2 targets"),
        ([[0.0, 1.0]], [[0, 2]], "multi-label", "1 of 2 targets are not integers from 0 to 1"),
    ],
)
def test_errors(logits, targets, kind, message):
    for function in (evaluate, quick):
        with pytest.raises(ValueError, match=message):
            function(logits, targets, kind)
    with pytest.raises(ValueError, match=message):
        item_values(logits, targets, kind, "auc")


def test_an_unknown_item_metric_is_an_error():
    with pytest.raises(ValueError, match="metric 'brier': expected one of accuracy, auc"):
        item_values([[0.0, 1.0]], [1], "multi-class", "brier")


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float32, bool])
def test_targets_of_any_dtype(dtype):
    logits, targets = draw("multi-label", 1)
    assert evaluate(logits, targets.astype(dtype), "multi-label") == evaluate(
        logits, targets, "multi-label"
    )


@pytest.mark.parametrize(
    ("kind", "classes"), [("multi-class", 4), ("binary-class", 2), ("multi-label", 3)]
)
def test_further_metrics_by_counting(kind: str, classes: int) -> None:
    """Against counts of true and false positives, and the covariance form of Matthews."""
    random = np.random.default_rng(3)
    logits = random.normal(size=(50, classes))
    several = kind == "multi-label"
    targets = random.integers(0, 2 if several else classes, (50, classes) if several else 50)
    truth = targets == 1 if several else targets[:, None] == np.arange(classes)
    made = logits > 0 if several else logits.argmax(1)[:, None] == np.arange(classes)
    hit, false = (truth & made).sum(0), (~truth & made).sum(0)
    missed, rejected = (truth & ~made).sum(0), (~truth & ~made).sum(0)
    shown = slice(1, None) if kind == "binary-class" else slice(None)
    expected = {
        "f1": 2 * hit / (2 * hit + false + missed),
        "precision": hit / (hit + false),
        "sensitivity": hit / (hit + missed),
        "specificity": rejected / (rejected + false),
    }
    found = metrics.further(logits, targets, kind)
    for name, each in expected.items():
        assert found[name] == pytest.approx(each[shown].mean(), abs=1e-12), name

    def correlation(x: np.ndarray, y: np.ndarray) -> float:
        def covariance(one: np.ndarray, other: np.ndarray) -> float:
            return float(((one - one.mean(0)) * (other - other.mean(0))).sum())

        return covariance(x, y) / np.sqrt(covariance(x, x) * covariance(y, y))

    x, y = truth.astype(float), made.astype(float)
    each = [correlation(a[:, None], b[:, None]) for a, b in zip(x.T, y.T, strict=True)]
    mcc = np.mean(each) if several else correlation(x, y)
    assert found["mcc"] == pytest.approx(mcc, abs=1e-12)
    assert set(found) == set(metrics.FURTHER)


def test_further_metrics_of_a_constant_prediction() -> None:
    found = metrics.further([[1.0, 0.0]] * 4, [0, 1, 0, 1], "binary-class")
    assert found == {"f1": 0, "precision": 0, "sensitivity": 0, "specificity": 1, "mcc": 0}


def test_further_metrics_with_a_class_that_has_no_rows() -> None:
    """It does not count, as in balanced accuracy; if it is predicted, only recall omits it."""
    logits = np.eye(4)[[0, 1, 2, 0, 1]] * 9
    targets = [0, 1, 2, 1, 1]
    found = metrics.further(logits, targets, "multi-class")
    whole = evaluate(logits, targets, "multi-class")
    assert found["sensitivity"] == pytest.approx(whole["balanced_accuracy"])
    assert found["f1"] == pytest.approx(np.mean([2 / 3, 4 / 5, 1]))
    logits[3] = np.eye(4)[3] * 9
    found = metrics.further(logits, targets, "multi-class")
    assert found["f1"] == pytest.approx(np.mean([1, 4 / 5, 1, 0]))
    assert found["sensitivity"] == pytest.approx(np.mean([1, 2 / 3, 1]))
