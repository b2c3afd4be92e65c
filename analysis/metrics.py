"""Metrics of a classifier from its logits and targets: accuracy, ranking, likelihood, calibration.

Logits are (N, K) and computed in float64. Targets are int labels (N,) in [0, K), for
"multi-label" 0 or 1 (N, K). Accuracy and AUC are those of ``medmnist.evaluator`` given
``probabilities(logits, kind)``. A ranking metric is nan if a class has no row or every row.

Rankings use the probabilities, so rows are tied if their float64 probabilities are equal: beyond
log-odds of about 36.7 every probability is 1.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

KINDS = ("multi-class", "binary-class", "ordinal-regression", "multi-label")
BINS = 15


class Measure(NamedTuple):
    """How a metric is written in a table."""

    name: str
    percent: bool = True
    """whether tables show it in per cent"""
    lower: bool = False
    """whether lower is better"""

    @property
    def digits(self) -> int:
        """number of decimals in tables"""
        return 2 if self.percent else 3


MEASURES = {
    "accuracy": Measure("accuracy"),
    "auc": Measure("AUC"),
    "balanced_accuracy": Measure("balanced accuracy"),
    "auprc": Measure("AUPRC"),
    "nll": Measure("NLL", percent=False, lower=True),
    "brier": Measure("Brier score", percent=False, lower=True),
    "ece": Measure("ECE", percent=False, lower=True),
    "ece_equal_mass": Measure("ECE (equal mass)", percent=False, lower=True),
    "sensitivity_at_95_specificity": Measure("sensitivity at 95 % specificity"),
    "quadratic_kappa": Measure("quadratic kappa", percent=False),
    "f1": Measure("F1"),
    "precision": Measure("precision"),
    "sensitivity": Measure("sensitivity"),
    "specificity": Measure("specificity"),
    "mcc": Measure("MCC", percent=False),
    "corrupted_accuracy": Measure("corrupted accuracy"),
    "corrupted_auc": Measure("corrupted AUC"),
    "corrupted_balanced_error": Measure("corrupted balanced error", lower=True),
    "relative_balanced_error": Measure("relative balanced error", lower=True),
    "attacked_accuracy": Measure("accuracy under attack"),
}
"""Metrics that are one number, as tables write them: those of ``evaluate``, then ``further``, then
those on corrupted test images (``ON_CORRUPTED``)."""
FURTHER = ("f1", "precision", "sensitivity", "specificity", "mcc")
"""Metrics that no run stores; they are computed from predictions when a table asks for them."""
SHOWN = {name: MEASURES[name].name for name in ("accuracy", "auc")}
"""Metrics with a main table, and their names there; ``item_values`` gives the spread of each."""
ON_CORRUPTED = (
    "corrupted_accuracy",
    "corrupted_auc",
    "corrupted_balanced_error",
    "relative_balanced_error",
    "attacked_accuracy",
)
"""Metrics of a run on corrupted test images, last epoch: means over severities, then over
corruptions. ``corrupted.value`` computes them, ``corrupted.item_values`` gives their spread."""
TESTED = (*SHOWN, *ON_CORRUPTED)
"""Metrics with a known spread, whose differences can be tested."""


def probabilities(logits: ArrayLike, kind: str) -> Floats:
    """Probabilities (N, K) in [0, 1]: softmax over the classes, or a sigmoid per label.

    Raises:
        ValueError: unknown kind, a wrong shape, no row, or logits that are not finite.
    """
    return _probabilities(_checked_logits(logits, kind), kind)


def evaluate(logits: ArrayLike, targets: ArrayLike, kind: str) -> dict[str, float | list[float]]:
    """Every metric by name.

    One prediction per row: the class with the highest probability, in a tie the first;
    "binary-class" predicts class 1 if its probability is above 0.5. "multi-label" predicts each
    label whose probability is above 0.5.

    * accuracy: share of rows predicted correctly; multi-label: mean over labels.
    * balanced_accuracy: mean recall of the classes that have rows; multi-label: for each label the
      mean of sensitivity and specificity (or the one that exists), then the mean over labels.
    * auc: mean over classes of one-vs-rest AUC, ties 1/2; binary: of the last class; multi-label:
      mean over labels.
    * auprc: average precision (no interpolation), over the same columns as auc.
    * nll: mean over rows of -log p of the target, in nats; multi-label: mean binary cross-entropy
      over rows and labels. Computed from the logits, so exact even if p rounds to 0 or 1.
    * brier: mean over rows of the squared error summed over classes, in [0, 2]; multi-label: mean
      over rows and labels of (p - y)^2, in [0, 1].
    * ece: calibration error of the top probability in 15 bins (lower, upper] of equal width;
      multi-label: of max(p, 1 - p) for each label, then the mean over labels.
    * ece_equal_mass: the same in 15 bins of N/15 rows by ascending top probability; tied rows
      share the bin of the first of them, so the order of rows does not matter.
    * recall: for each class the share of its rows predicted correctly, nan without rows;
      multi-label: sensitivity of each label.
    * sensitivity_at_95_specificity (binary only): the highest sensitivity of a threshold
      "score > t" that keeps at least 95 % of class 0 negative; ties are not split.
    * quadratic_kappa (ordinal only): Cohen's kappa with weights (i - j)^2; nan if all predictions
      and targets are the same class.

    Raises:
        ValueError: unknown kind, a wrong shape, no row, logits that are not finite, or targets out
            of range.
    """
    z, truth = _checked(logits, targets, kind)
    p = _probabilities(z, kind)
    predicted = _predicted(p, kind)
    right = _right(predicted, truth, kind)
    recall = _recall(predicted, truth)
    if kind == "multi-label":
        balanced = float(np.nanmean([recall, _recall(~predicted, ~truth)], axis=0).mean())
        top = np.maximum(p, 1 - p)
        squared_error = ((p - truth) ** 2).mean()
        tops_and_rights = list(zip(top.T, (predicted == truth).T, strict=True))
    else:
        balanced = float(np.nanmean(recall))
        squared_error = ((p - truth) ** 2).sum(axis=1).mean()
        tops_and_rights = [(p.max(axis=1), right)]
    scores, positive = _rankings(p, truth, kind)
    result: dict[str, float | list[float]] = {
        "accuracy": float(right.mean()),
        "balanced_accuracy": balanced,
        "auc": _auc(scores, positive),
        "auprc": _average_precision(scores, positive),
        "nll": _nll(z, truth, kind),
        "brier": float(squared_error),
        "ece": float(np.mean([_ece(t, r, _equal_width(t)) for t, r in tops_and_rights])),
        "ece_equal_mass": float(np.mean([_ece(t, r, _equal_mass(t)) for t, r in tops_and_rights])),
        "recall": recall.tolist(),
    }
    if kind == "binary-class":
        result["sensitivity_at_95_specificity"] = _sensitivity(scores[:, 0], positive[:, 0])
    if kind == "ordinal-regression":
        result["quadratic_kappa"] = _quadratic_kappa(predicted.argmax(1), truth.argmax(1))
    return result


def quick(logits: ArrayLike, targets: ArrayLike, kind: str) -> dict[str, float]:
    """The auc, accuracy and nll of ``evaluate``, cheap enough for every epoch.

    Raises:
        ValueError: as ``evaluate``.
    """
    z, truth = _checked(logits, targets, kind)
    p = _probabilities(z, kind)
    return {
        "auc": _auc(*_rankings(p, truth, kind)),
        "accuracy": float(_right(_predicted(p, kind), truth, kind).mean()),
        "nll": _nll(z, truth, kind),
    }


def further(logits: ArrayLike, targets: ArrayLike, kind: str) -> dict[str, float]:
    """The metrics of ``FURTHER``, from scikit-learn's confusion matrix of what ``evaluate`` counts.

    * f1, precision, sensitivity, specificity: with two classes those of class 1; else the mean over
      the classes (or labels), each against all others. As for the recall of ``evaluate``, a class
      without rows does not count for the sensitivity, nor for the others if it is never predicted
      either; one that has rows and is never predicted has a precision of 0.
    * mcc: Matthews' correlation over all classes at once, 0 if all predictions or all targets are
      of one class; multi-label: the mean over labels.

    Raises:
        ValueError: as ``evaluate``.
    """
    from sklearn import metrics as scored  # noqa: PLC0415 - takes a second that few tables need

    z, truth = _checked(logits, targets, kind)
    predicted = _predicted(_probabilities(z, kind), kind)
    counts = scored.multilabel_confusion_matrix(truth, predicted).astype(float)
    counts = counts[1:] if kind == "binary-class" else counts
    (rejected, false), (missed, hit) = np.moveaxis(counts, 0, 2)
    known = hit + missed + false > 0
    pairs = [(truth.argmax(axis=1), predicted.argmax(axis=1))]
    if kind == "multi-label":
        pairs = list(zip(truth.T, predicted.T, strict=True))

    def mean(part: Floats, whole: Floats, counting: Bools) -> float:
        share = np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)
        return float(share[counting].mean()) if counting.any() else float("nan")

    return {
        "f1": mean(2 * hit, 2 * hit + false + missed, known),
        "precision": mean(hit, hit + false, known),
        "sensitivity": mean(hit, hit + missed, hit + missed > 0),
        "specificity": mean(rejected, rejected + false, known & (rejected + false > 0)),
        "mcc": float(np.mean([scored.matthews_corrcoef(*pair) for pair in pairs])),
    }


def item_values(logits: ArrayLike, targets: ArrayLike, kind: str, metric: str) -> Floats:
    """Values (N,), one per row, whose mean is the metric and whose spread gives its variance.

    * accuracy: 1 if the row is predicted correctly, else 0; multi-label: mean over labels.
    * auc: with m positive and n negative rows, A + (N / m) (V10 - A) for a positive row and
      A + (N / n) (V01 - A) for a negative one, where V10 and V01 are the structural components:
      the share of negatives below the positive row, of positives above the negative row, ties 1/2.
      Averaged over the columns of auc. All nan if auc is.

    With class counts n_h and the variance var_h (ddof=1) of the values within each class,
    sum_h (n_h / N)^2 var_h / n_h is the sampling variance of the metric; for a binary AUC it is
    DeLong's var(V10) / m + var(V01) / n. Multi-label rows have no class: for them the plain
    var / N is used, which for a label with m positive rows is smaller by about (m - 1) / m.

    Raises:
        ValueError: unknown metric, and as ``evaluate``.

    Source: DeLong, DeLong and Clarke-Pearson, Biometrics 44, 1988.
    """
    if metric not in SHOWN:
        raise ValueError(f"metric {metric!r}: expected one of {', '.join(SHOWN)}")
    z, truth = _checked(logits, targets, kind)
    p = _probabilities(z, kind)
    if metric == "accuracy":
        return _right(_predicted(p, kind), truth, kind)
    scores, positive = _rankings(p, truth, kind)
    columns = zip(scores.T, positive.T, strict=True)
    return np.mean([_auc_values(score, of_class) for score, of_class in columns], axis=0)


def detection(
    learned: Mapping[str, NDArray], given: NDArray[np.intp], clean: NDArray[np.intp]
) -> dict[str, float]:
    """How well the learned weights or labels of training rows identify corrupted labels.

    ``learned`` contains "weight" (N,), "label" (N, K) or both, and may contain "seen" (N,): rows
    never seen are left out. ``given`` and ``clean`` (N,) are the classes trained on and those
    before the corruption. ``weight_auc`` is the probability that a corrupted row has a lower weight
    than a clean one (ties count half), ``corrected`` the share of corrupted rows whose learned
    label is the clean class, ``spoiled`` the share of clean rows whose learned label is another
    class. Nan if there is no such row.
    """
    seen = learned["seen"] > 0 if "seen" in learned else np.ones(len(given), bool)
    wrong = (given != clean)[seen]
    found: dict[str, float] = {}
    if "weight" in learned:
        found["weight_auc"] = _auc(-learned["weight"][seen, None].astype(float), wrong[:, None])
    if "label" in learned:
        right = learned["label"][seen].argmax(axis=1) == clean[seen]
        found["corrected"] = float(right[wrong].mean()) if wrong.any() else float("nan")
        found["spoiled"] = float((~right[~wrong]).mean()) if (~wrong).any() else float("nan")
    return found


def _checked_logits(logits: ArrayLike, kind: str) -> Floats:
    if kind not in KINDS:
        close = difflib.get_close_matches(kind, KINDS, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"kind {kind!r}: expected one of {', '.join(KINDS)}{hint}")
    z = np.asarray(logits, dtype=np.float64)
    if z.ndim != 2:
        raise ValueError(f"logits have shape {z.shape}, expected (N, K)")
    if len(z) == 0:
        raise ValueError("logits have no rows, expected at least one")
    classes = z.shape[1]
    if kind == "binary-class" and classes != 2:
        raise ValueError(f"logits have {classes} columns, expected 2 for binary-class")
    if classes < (1 if kind == "multi-label" else 2):
        raise ValueError(f"logits have {classes} columns, too few for {kind}")
    if bad := int((~np.isfinite(z)).sum()):
        raise ValueError(f"{bad} of {z.size} logits are not finite")
    return z


def _checked(logits: ArrayLike, targets: ArrayLike, kind: str) -> tuple[Floats, Bools]:
    """Logits (N, K) in float64, and targets (N, K): one True per row, or one for each label."""
    z = _checked_logits(logits, kind)
    y = np.asarray(targets)
    expected = z.shape if kind == "multi-label" else z.shape[:1]
    if y.shape != expected:
        raise ValueError(f"targets have shape {y.shape}, expected {expected} for {kind}")
    top = 1 if kind == "multi-label" else z.shape[1] - 1
    if bad := int((~((y >= 0) & (y <= top) & (y == np.floor(y)))).sum()):
        raise ValueError(f"{bad} of {y.size} targets are not integers from 0 to {top}")
    return z, y == 1 if kind == "multi-label" else y[:, None] == np.arange(z.shape[1])


def _probabilities(z: Floats, kind: str) -> Floats:
    if kind == "multi-label":
        small = np.exp(-np.abs(z))
        return np.where(z >= 0, 1.0, small) / (1 + small)
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def _predicted(p: Floats, kind: str) -> Bools:
    if kind == "multi-label":
        return p > 0.5
    label = p[:, 1] > 0.5 if kind == "binary-class" else p.argmax(axis=1)
    return label[:, None] == np.arange(p.shape[1])


def _right(predicted: Bools, truth: Bools, kind: str) -> Floats:
    if kind == "multi-label":
        return np.asarray((predicted == truth).mean(axis=1), dtype=np.float64)
    return np.asarray((predicted & truth).any(axis=1), dtype=np.float64)


def _recall(predicted: Bools, truth: Bools) -> Floats:
    rows = truth.sum(axis=0)
    return np.divide(
        (predicted & truth).sum(axis=0), rows, out=np.full(len(rows), np.nan), where=rows > 0
    )


def _nll(z: Floats, truth: Bools, kind: str) -> float:
    if kind == "multi-label":
        return float(np.logaddexp(0, np.where(truth, -z, z)).mean())
    shifted = z - z.max(axis=1, keepdims=True)
    rest = np.exp(shifted)
    # log1p of the others, not log of the sum: the sum rounds to 1 where the top probability does
    rest[np.arange(len(z)), z.argmax(axis=1)] = 0
    return float((np.log1p(rest.sum(axis=1)) - shifted[truth]).mean())


def _rankings(p: Floats, truth: Bools, kind: str) -> tuple[Floats, Bools]:
    """The columns (N, C) of scores and positives over which ranking metrics are averaged."""
    return (p[:, -1:], truth[:, -1:]) if kind == "binary-class" else (p, truth)


def _wins(score: Floats, positive: Bools) -> NDArray[np.int64]:
    """For each positive row twice the negatives below it plus those tied with it."""
    # Sorted queries use the cache well: a third of the time at 23,000 rows.
    negatives, queries = np.sort(score[~positive]), score[positive]
    order = np.argsort(queries)
    wins = np.empty(len(queries), dtype=np.int64)
    queries = queries[order]
    wins[order] = np.searchsorted(negatives, queries) + np.searchsorted(negatives, queries, "right")
    return wins


def _auc(scores: Floats, positive: Bools) -> float:
    values = []
    for score, of_class in zip(scores.T, positive.T, strict=True):
        m, n = int(of_class.sum()), int((~of_class).sum())
        values.append(int(_wins(score, of_class).sum()) / (2 * m * n) if m and n else np.nan)
    return float(np.mean(values))


def _auc_values(score: Floats, positive: Bools) -> Floats:
    rows, m, n = len(score), int(positive.sum()), int((~positive).sum())
    if not (m and n):
        return np.full(rows, np.nan)
    wins = _wins(score, positive)
    auc = int(wins.sum()) / (2 * m * n)
    values = np.empty(rows)
    values[positive] = auc + rows / m * (wins / (2 * n) - auc)
    values[~positive] = auc + rows / n * (_wins(-score, ~positive) / (2 * m) - auc)
    return values


def _average_precision(scores: Floats, positive: Bools) -> float:
    """Mean over classes of the mean, over positive rows, of the precision at the row's score."""
    values = []
    for score, of_class in zip(scores.T, positive.T, strict=True):
        if of_class.all() or not of_class.any():
            return float("nan")
        own = np.sort(score[of_class])
        true = len(own) - np.searchsorted(own, own)
        every = len(score) - np.searchsorted(np.sort(score), own)
        values.append((true / every).mean())
    return float(np.mean(values))


def _equal_width(top: Floats) -> NDArray[np.intp]:
    return np.searchsorted(np.linspace(0, 1, BINS + 1), top) - 1


def _equal_mass(top: Floats) -> NDArray[np.intp]:
    return np.searchsorted(np.sort(top), top) * BINS // len(top)


def _ece(top: Floats, right: NDArray, bins: NDArray[np.intp]) -> float:
    return float(np.abs(np.bincount(bins, weights=right - top)).sum() / len(top))


def _sensitivity(score: Floats, positive: Bools) -> float:
    if positive.all() or not positive.any():
        return float("nan")
    negatives = np.sort(score[~positive])
    kept = -(-95 * len(negatives) // 100)  # 0.95 n rounded up, free of rounding errors
    return float((score[positive] > negatives[kept - 1]).mean())


def _quadratic_kappa(predicted: NDArray[np.intp], label: NDArray[np.intp]) -> float:
    # the mean of (i - j)^2 over all pairs of a prediction and a label of independent rows
    expected = predicted.var() + label.var() + (predicted.mean() - label.mean()) ** 2
    observed = ((predicted - label) ** 2).mean()
    return float(1 - observed / expected) if expected > 0 else float("nan")
