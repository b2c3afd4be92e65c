"""Definitions of the terms in tables: at the end of every report, and in ``docs/reports.md``."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from analysis.metrics import HEADLINE, MEASURES

WORDS: Mapping[str, Mapping[str, str]] = {
    "scores": {
        "n": "number of seeds with a result. Each seed is a complete training run.",
        "accuracy, AUC": "on the test split at the last epoch, in percent: mean ± standard "
        "deviation over the seeds. If there are several labels, the mean over them.",
        "best, tied": "the best mean of a column (bold), and what is not significantly different "
        "from it (italics; population interval, 5 % level, corrected for all pairs of rows of the "
        "column). Control rows and rows with fewer than three seeds are not marked. If a row with "
        "fewer than three seeds has the best mean, nothing in the column is marked.",
        "cost, cost ratio, ratio": "training time per epoch relative to the same upstream without "
        "the method (for an upstream, relative to none), median over seeds. For a row with an "
        "equal budget, the time of whole runs.",
        "control rows": "keep everything of a method except one part, to show where a gain comes "
        "from. Some train on different labelled rows: @train on the pool without the meta rows, "
        "@train+meta on both, @meta on the meta rows alone.",
        "[passes of X], [time of X]": "the row trained for longer, with as many forward and "
        "backward passes, or as much training time, as X: an equal budget instead of equal steps.",
    },
    "leading": {
        "leading metric": "the metric of differences, verdicts, ranks and figures: accuracy, but "
        "AUC on a table with a rare class: of K classes one has less than 0.4/K of the test rows. "
        "The main tables are then AUC, AUPRC (average precision, which is not tested) and balanced "
        "accuracy (mean of the recalls of all classes).",
    },
    "metrics": {
        "F1, precision, sensitivity, specificity": "with two classes, of the second class; "
        "else the mean over the classes (or labels), each against all others.",
        "MCC, quadratic kappa": "agreement of predictions and labels beyond chance, 1 at most: "
        "Matthews' correlation, and Cohen's kappa with squared distances between ordered classes.",
        "balanced accuracy": "mean of the recalls of all classes.",
        "AUPRC": "area under the precision-recall curve (average precision), mean over classes.",
        "sensitivity at 95 % specificity": "the highest sensitivity of a threshold with at least "
        "this specificity; only with two classes.",
        "NLL, Brier score": "negative log-likelihood, and squared error of the probabilities.",
        "corrupted accuracy, corrupted AUC, corrupted balanced error, relative balanced error, "
        "accuracy under attack": "of runs that were also evaluated on corrupted test images.",
        "ECE, ECE (equal mass)": "expected calibration error: how far confidence is from accuracy, "
        "in 15 bins of equal width or of equal size.",
    },
    "names": {"in full": "the full name of the row or data set."},
    "differences": {
        "base": "the row that a row is compared with: for a method, its upstream alone; for an "
        "upstream, none.",
        "difference": "test accuracy (or AUC) of the row minus that of its base, in percentage "
        "points, paired by seed.",
        "population 95 % CI": "accounts for other seeds and other test data (other patients, "
        "where patients are known; with cross-validation folds, the interval of Nadeau and Bengio, "
        "2003). Verdicts use it, and a single interval is always this one.",
        "training 95 % CI": "accounts for other seeds on the same test data (a t interval).",
        "p (Holm)": "p-value of no difference, from the population interval, with Holm's "
        "correction over the family: in a report all comparisons that the study tests, in a "
        "printed table its rows. Intervals are not corrected.",
        "verdict": "better, worse, equivalent, undecided or not tested.",
        "better, worse": "the corrected p-value is at most 0.05, and the two are not equivalent.",
        "equivalent": "the difference lies within the margin (0.5 points unless the study says "
        "otherwise) by two one-sided tests with Holm's correction, whether or not it is 0.",
        "undecided": "neither a difference nor equivalence is shown. This does not mean that the "
        "two are equal.",
        "few seeds": "the verdict rests on fewer than ten seeds: its interval is valid, but wide.",
        "not tested": "fewer than three seeds in common, an incomplete repeat of cross-validation, "
        "only one test patient, or predictions that are the same or differ by the same amount for "
        "every seed and test row.",
        "detectable": "the smallest true difference that this comparison, on its own, would find "
        "with 80 % power.",
    },
    "overall": {
        "data sets": "number of data sets that both rows share. Sizes and corruptions of one set "
        "count once, as do OrganA, OrganC and OrganS, which are views of the same scans.",
        "mean difference": "over data sets. Its interval accounts for other seeds and test "
        "data of these sets, not for other data sets.",
        "win/tie/loss": "number of data sets with a difference above, within and below the margin.",
        "P(improvement)": "probability that a seed of the row scores above a seed of its base.",
        "Wilcoxon p (Holm)": "exact signed-rank test over data sets, shown where it can reach 0.05 "
        "after Holm's correction.",
    },
    "cost": {
        "s/epoch, charged s": "seconds of training per epoch and per run: drawing, augmentation, "
        "outer steps, forward and backward. Evaluation and start-up are not counted. On a CPU, CPU "
        "seconds. All costs are medians over seeds.",
        "evaluation s": "seconds of evaluation per run.",
        "passes/row": "forward plus backward passes per row drawn; plain training has 2.",
        "trained/drawn": "rows trained on per row drawn.",
        "peak MiB": "peak memory of the GPU, or of the process on a CPU.",
    },
    "controls": {
        "reading": "how a method compares with its control: above or below, the interval excludes "
        "0; same, the 90 % interval lies within the margin; open, neither; identical, correct on "
        "the same test rows for every seed. Intervals are not corrected.",
    },
    "moved": {
        "outer steps": "number of steps in which a method updated what it learns.",
        "probability, magnitude, weight, label": "how far what was learned is from its start at "
        "the end of training: the median over training rows (and operations), then over seeds. "
        "Probability and magnitude from 0 to 1; weight relative to 1, which means unchanged; label "
        "by the share of its mass that moved (total variation), or with several labels "
        "the mean difference.",
        "moved": "hardly learned: probabilities and magnitudes both moved by less than 5 % of "
        "their range, so a difference says nothing about a learned policy. Of other methods and "
        "of control rows only the distances are given.",
    },
    "labels-found": {
        "AUC by weight": "probability that a mislabelled training row has a lower weight than a "
        "correctly labelled one (ties count half).",
        "corrected, spoiled": "mislabelled rows whose learned label is the true class, and "
        "correctly labelled rows whose learned label is another class.",
    },
    "corrupted": {
        "clean": "accuracy on the test images as they are, of the runs that were also evaluated on "
        "corrupted ones.",
        "corrupted": "accuracy on corrupted test images: the mean over five severities, and then "
        "over corruptions. The AUC beside it likewise.",
        "BE": "balanced error on corrupted test images, 1 minus the mean recall of the classes; "
        "the same mean.",
        "rBE": "BE minus the balanced error of the same run on clean images. MedMNIST-C divides "
        "both errors by those of AlexNet, which is not done here.",
        "FGSM": "accuracy under an attack of one step on the network itself, the mean over five "
        "strengths; it is in no mean over corruptions.",
        "metric": "the metric of a difference: accuracy or balanced error on corrupted images, or "
        "accuracy under attack. Only corrupted accuracy has p-values and verdicts; its comparisons "
        "are those of clean accuracy, and Holm's correction counts them as a family of their own.",
    },
    "attacked-rows": {
        "selected": "share of the drawn rows that were attacked, warm-up included. Methods log "
        "this and the next columns on the first attack of each epoch and on every 25th; means over "
        "epochs with an attack and over seeds.",
        "margin kept, prediction kept, unmoved, harder": "share of attacked rows that stay within "
        "the margin of label preservation; that keep the predicted class of the clean row; that "
        "did not change; and whose label became less likely. These are judged by the attacked "
        "network itself and by the given label, which may be wrong.",
        "distance, of noise": "perceptual distance of the attacked row from the clean one, and "
        "that of uniform noise of the same norm.",
    },
    "arguments": {
        "default": "the argument is not given: it has the default of the method or of its preset."
    },
    "ranks": {
        "mean rank": "by mean test {leads}, over data sets; 1 is best. Ranks closer than the "
        "critical difference (Nemenyi, 5 %) are not significantly different.",
    },
    "more": {
        "test ECE": "expected calibration error on the test split: how far confidence is from "
        "accuracy.",
        "select AUC": "AUC on the select split, which is used to choose epochs and "
        "hyper-parameters.",
    },
    "versions": {"value": "each version or machine, with its number of runs."},
    "search": {
        "trials, stopped early, failed": "hyper-parameter settings tried, and how many of them "
        "were stopped by the search or failed.",
        "chosen": "the trial with the best score on the select split.",
        "select accuracy": "score (accuracy or AUC) of the chosen trial on the select split. It is "
        "optimistic, because the trial was chosen by it; the fresh seeds show what the setting is "
        "worth.",
        "regret": "test score of the trial that is best on test minus that of the chosen one. Test "
        "scores are not used for choosing.",
        "passes": "forward plus backward passes, summed over rows and trials.",
    },
    "failures": {
        "where": "data set and network.",
        "seeds": "seeds of the runs that ended in the same way.",
        "status, reason": "how these runs ended, and why.",
    },
    "blocks": {
        "block": "runs that can be compared in one table: same network, protocol and training.",
        "runs": "number of runs with a result.",
    },
}
"""By table, in the order of a report."""


def about(leads: Sequence[str]) -> tuple[str, ...]:
    """Whose terms say which metric leads, unless it is accuracy everywhere."""
    return () if {*leads} <= {HEADLINE} else ("leading",)


def led(leads: str) -> list[str]:
    """That another metric than accuracy leads, and why; may be empty."""
    if leads == HEADLINE:
        return []
    return [
        f"{MEASURES[leads].name}, because a class is rare: of K classes it has less than 0.4/K of "
        "the test rows"
    ]


def of(tables: Collection[str], leads: Sequence[str] = (HEADLINE,)) -> dict[str, str]:
    """The terms of these tables with their definitions, in the order of a report; ``leads`` are the
    metrics that lead in them."""
    names = " or ".join(MEASURES[name].name for name in dict.fromkeys(leads))
    return {
        word: meaning.replace("{leads}", names)
        for name, words in WORDS.items()
        if name in tables
        for word, meaning in words.items()
    }
