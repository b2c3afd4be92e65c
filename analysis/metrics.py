"""Metrics of a classifier from its logits and targets: accuracy, ranking, likelihood, calibration.

Logits are (N, K) and computed in float64. Targets are as the task stores them (``analysis.tasks``):
int labels (N,) in [0, K), or 0 and 1 (N, K) for several labels per row. Accuracy and AUC are those
of ``medmnist.evaluator`` given ``probabilities(logits, kind)``. A ranking metric is nan if a class
has no row or every row.

Rankings use the probabilities, so rows are tied if their float64 probabilities are equal: beyond
log-odds of about 36.7 every probability is 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from analysis import measures
from analysis.measures import Bools, Floats
from analysis.tasks import Scoring, task_named


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
HEADLINE = "accuracy"
"""The metric that leads, unless the runs on a data set name another: differences, verdicts and
figures are of this metric."""
SHOWN: Mapping[str, tuple[str, ...]] = {
    HEADLINE: (HEADLINE, "auc"),
    "auc": ("auc", "auprc", "balanced_accuracy"),
}
"""Metrics with a main table, by the one that leads."""
ON_CORRUPTED = (
    "corrupted_accuracy",
    "corrupted_auc",
    "corrupted_balanced_error",
    "relative_balanced_error",
    "attacked_accuracy",
)
"""Metrics of a run on corrupted test images, last epoch: means over severities, then over
corruptions. ``corrupted.value`` computes them, ``corrupted.item_values`` gives their spread."""
ITEMS = ("accuracy", "auc", "balanced_accuracy")
"""Metrics that are means over rows, with the values of ``item_values``."""


def to_test(leads: str) -> frozenset[str]:
    """The metrics whose differences are tested where this one leads: their spread is known."""
    main = {*SHOWN[HEADLINE], *SHOWN[leads]}
    return frozenset({*main.intersection(ITEMS), *ON_CORRUPTED})


def selecting(kind: str) -> tuple[str, str]:
    """The metric on the select split by which epochs and settings are chosen, and its name."""
    name = task_named(kind).selects
    return name, MEASURES[name].name


def probabilities(logits: ArrayLike, kind: str) -> Floats:
    """Probabilities (N, K) in [0, 1]: softmax over the classes, or a sigmoid per label.

    Raises:
        ValueError: unknown kind, a wrong shape, no row, or logits that are not finite.
    """
    task = task_named(kind)
    return task.probabilities(_checked_logits(logits, task))


class _Scored(NamedTuple):
    """Predictions of a task, checked, in float64."""

    task: Scoring
    z: Floats
    truth: Bools
    p: Floats
    predicted: Bools


def _scored(logits: ArrayLike, targets: ArrayLike, kind: str) -> _Scored:
    task = task_named(kind)
    z = _checked_logits(logits, task)
    truth = task.truth(targets, *z.shape)
    p = task.probabilities(z)
    return _Scored(task, z, truth, p, task.predicted(p))


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
    task, z, truth, p, predicted = _scored(logits, targets, kind)
    confidence = task.confidence(p, predicted, truth)
    scores, positive = task.rankings(p, truth)

    def calibration(bins: Callable[[Floats], NDArray[np.intp]]) -> float:
        each = [measures.calibration_error(top, right, bins(top)) for top, right in confidence]
        return float(np.mean(each))

    return {
        "accuracy": float(task.right(predicted, truth).mean()),
        "balanced_accuracy": task.balanced(predicted, truth),
        "auc": measures.auc(scores, positive),
        "auprc": measures.average_precision(scores, positive),
        "nll": task.nll(z, truth),
        "brier": task.brier(p, truth),
        "ece": calibration(measures.equal_width),
        "ece_equal_mass": calibration(measures.equal_mass),
        "recall": measures.recalls(predicted, truth).tolist(),
        **task.own(p, predicted, truth),
    }


def quick(logits: ArrayLike, targets: ArrayLike, kind: str) -> dict[str, float]:
    """The auc, accuracy and nll of ``evaluate``, and the metric that selects; cheap enough for
    every epoch.

    Raises:
        ValueError: as ``evaluate``.
    """
    task, z, truth, p, predicted = _scored(logits, targets, kind)
    found = {
        "auc": measures.auc(*task.rankings(p, truth)),
        "accuracy": float(task.right(predicted, truth).mean()),
        "nll": task.nll(z, truth),
    }
    return found if task.selects in found else found | task.own(p, predicted, truth)


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

    task, _, truth, _, predicted = _scored(logits, targets, kind)
    counts = task.asked(scored.multilabel_confusion_matrix(truth, predicted).astype(float))
    (rejected, false), (missed, hit) = np.moveaxis(counts, 0, 2)
    known = hit + missed + false > 0
    pairs = task.pairs(predicted, truth)

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
    * balanced_accuracy: of K classes with rows, n_k of N in class k, a correct row of class k
      counts N / (K n_k); multi-label: the mean over labels, each with two classes.
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
    if metric not in ITEMS:
        raise ValueError(f"metric {metric!r}: expected one of {', '.join(ITEMS)}")
    task, _, truth, p, predicted = _scored(logits, targets, kind)
    if metric == "accuracy":
        return task.right(predicted, truth)
    if metric == "balanced_accuracy":
        return task.balanced_values(predicted, truth)
    columns = zip(*(each.T for each in task.rankings(p, truth)), strict=True)
    return np.mean([measures.auc_values(score, of_class) for score, of_class in columns], axis=0)


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
        found["weight_auc"] = measures.auc(
            -learned["weight"][seen, None].astype(float), wrong[:, None]
        )
    if "label" in learned:
        right = learned["label"][seen].argmax(axis=1) == clean[seen]
        found["corrected"] = float(right[wrong].mean()) if wrong.any() else float("nan")
        found["spoiled"] = float((~right[~wrong]).mean()) if (~wrong).any() else float("nan")
    return found


def _checked_logits(logits: ArrayLike, task: Scoring) -> Floats:
    z = np.asarray(logits, dtype=np.float64)
    if z.ndim != 2:
        raise ValueError(f"logits have shape {z.shape}, expected (N, K)")
    if len(z) == 0:
        raise ValueError("logits have no rows, expected at least one")
    classes, (least, most) = z.shape[1], task.columns
    if classes > most:
        raise ValueError(f"logits have {classes} columns, expected {most} for {task.name}")
    if classes < least:
        raise ValueError(f"logits have {classes} columns, too few for {task.name}")
    if bad := int((~np.isfinite(z)).sum()):
        raise ValueError(f"{bad} of {z.size} logits are not finite")
    return z
