"""Intervals and tests for the difference between methods, over seeds, test images and data sets.

Everything is paired: a difference is method minus baseline for the same seed and, if it is per
image, for the same image. Standard deviations have ddof=1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

INFERENCE_SEEDS = 3
"""With fewer seeds there is no interval and no verdict: from three on both intervals have their
nominal coverage."""
FEW_SEEDS = 10
"""With fewer seeds a verdict is marked "few seeds": it may not hold with other seeds."""
ALPHA = 0.05
P_MIN = 1e-12
"""The smallest p-value that is reported."""
HALVINGS = 50
"""Bisection steps for the logarithm of a p-value: more digits than any table shows."""


@dataclass(frozen=True)
class Interval:
    """An estimate and its two-sided confidence interval, estimate -+ t(df) se."""

    estimate: float
    low: float
    high: float
    se: float
    df: float
    level: float


class Estimated(ABC):
    """A mean difference with intervals and p-values at any level."""

    estimate: float
    seeds: int

    @property
    @abstractmethod
    def se(self) -> float:
        """The standard error."""

    @abstractmethod
    def half(self, level: float) -> float:
        """The half-width of the interval at this level."""

    def interval(self, level: float = 0.95) -> Interval:
        """The interval at this level."""
        half, se = self.half(level), self.se
        df = _degrees(half / se, level) if se > 0 else self.seeds - 1.0
        return _interval(self.estimate, half, se, df, level)

    def excluded(self, distance: float) -> float:
        """1 - level of the widest interval whose half-width is at most ``distance``: a p-value."""
        if distance <= 0:
            return 1.0
        if not self.se > 0:
            return 0.0
        if self.half(1 - P_MIN) <= distance:
            return P_MIN
        low, high = np.log(P_MIN), 0.0
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            wide = self.half(-np.expm1(middle)) > distance
            low, high = (middle, high) if wide else (low, middle)
        return float(np.exp(low))

    def p_zero(self) -> float:
        """Two-sided p-value of no difference: the interval at level 1 - p ends at 0."""
        return self.excluded(abs(self.estimate))

    def p_equivalent(self, margin: float) -> float:
        """p-value of the two one-sided tests: the interval at 1 - 2p ends at -+margin.

        At most .05 where the 90 % interval lies within the margin (Schuirmann, 1987).
        """
        return self.excluded(margin - abs(self.estimate)) / 2


@dataclass(frozen=True)
class Crossed(Estimated):
    """Variances of a mean over crossed seeds and images, each as its share of the mean's variance.

    ``population_interval`` defines them and the half-width. With clusters of images, "item" means
    cluster.
    """

    estimate: float
    seeds: int
    images: int
    seed: float
    """V_seed, which includes the residual"""
    item: float
    """V_item, which includes the residual"""
    residual: float
    df_item: float
    clusters: int = 0
    """clusters of images (patients) that were sampled; 0 if each image is its own cluster"""

    @property
    def parts(self) -> tuple[float, float]:
        """A and B, whose sum is se^2."""
        return max(self.seed - self.residual, 0.0), max(self.item, self.residual)

    @property
    def se(self) -> float:
        """The standard error."""
        return float(np.sqrt(sum(self.parts)))

    def half(self, level: float) -> float:
        """The half-width of the interval at this level."""
        a, b = self.parts
        t_seed, t_item = _quantile(self.seeds - 1, level), _quantile(self.df_item, level)
        return float(np.sqrt(max(t_seed**2 * a + t_item**2 * b, t_seed**2 * self.seed)))


@dataclass(frozen=True)
class Resampled(Estimated):
    """The mean over the test folds of repeated cross-validation, with one seed per fold."""

    estimate: float
    seeds: int
    variance: float
    """of the mean, corrected for training sets that overlap"""

    @property
    def se(self) -> float:
        """The standard error."""
        return float(np.sqrt(self.variance))

    def half(self, level: float) -> float:
        """The half-width of the interval at this level."""
        return _quantile(self.seeds - 1, level) * self.se


def training_interval(differences: ArrayLike, level: float = 0.95) -> Interval:
    """The t interval of paired seed differences (S,), the test set held fixed.

    It generalises to other seeds on the same test images. Differences that are all equal give an
    interval of width 0.

    Raises:
        ValueError: fewer than two seeds, values that are not finite, or a level outside (0, 1).
    """
    d = np.asarray(differences, dtype=np.float64)
    _check(d, 1, "differences", "(S,)", level)
    se = float(d.std(ddof=1) / np.sqrt(len(d)))
    df = len(d) - 1
    return _interval(float(d.mean()), _quantile(df, level) * se, se, df, level)


def population_interval(
    values: ArrayLike,
    strata: ArrayLike | None = None,
    level: float = 0.95,
    clusters: ArrayLike | None = None,
) -> Interval:
    """The interval of the mean difference, for other seeds and other test images.

    values (S, N) holds the difference of each seed on each image, strata (N,) the class of each
    image; without strata the images are one sample. Seeds and images are crossed random effects,
    the class counts n_h are fixed: with w_h = n_h / N,

        d_shi = mu_h + a_sh + b_hi + e_shi,    estimate = sum_h w_h mean_h = the plain mean.

    Three mean squares, each as its share in the variance of the estimate, which is A + B:

        V_seed = var(seed means) / S                            expects A + R
        V_item = sum_h w_h^2 var(image means in h) / n_h        expects B, which includes R
        R      = sum_h w_h^2 var(residuals in h) / (n_h S)      seed x image, within classes

    so se^2 = max(V_seed - R, 0) + max(V_item, R): no variance component is negative, and se is
    below neither sqrt(V_seed) nor sqrt(V_item). In the textbook form for one stratum this is
    (MS_seed + MS_item - MS_residual) / (S N).

    The half-width adds the two sources in quadrature, each with its own t quantile, and is never
    below that of ``training_interval`` (more seeds and more images cannot be less uncertain than
    more seeds alone):

        half^2 = max(t(S-1)^2 A + t(df_item)^2 B, t(S-1)^2 V_seed)

    with A and B as estimated in se^2 and df_item by Welch and Satterthwaite over the strata. df is
    the one whose t quantile gives this half-width. A single Satterthwaite df for the whole sum was
    rejected: with few seeds that df is large exactly when V_seed is small by chance. With three
    seeds its coverage is .925 where seeds dominate. The coverage of this interval is .945 to .992
    in simulations with three seeds or more, normal effects and any mix of the three sources (.97
    and more if neither seeds nor images have an effect), and .95 to .99 for correct-or-wrong
    predictions.

    A stratum of one image has no variance: such strata are pooled into one, and a single one joins
    the smallest other stratum, which makes the interval wider. Values without any variance give
    an interval of width 0 with S - 1 degrees of freedom.

    clusters (N,) are equal for images of one patient, which are not independent: then the interval
    generalises to other clusters and other seeds, and V_item and R are those of ``_clustered``.
    Clusters of one image give the numbers above. With normal effects, three seeds or more and 8 to
    60 clusters within classes or across them, the coverage is .945 to .99 for equal sizes and .96
    to 1.00 for unequal ones (up to 1.00 for both if neither seeds nor clusters have an effect), and
    at least .93 if a class with half of the weight has only three of the clusters. An interval
    that ignores clusters covers .54 to .74 where their effect is largest.

    Raises:
        ValueError: fewer than two seeds, images or clusters, a wrong shape, values that are not
            finite, or a level outside (0, 1).

    Source: Searle, Casella and McCulloch, Variance Components, 1992 (crossed classification);
    Zou and Donner, Statistics in Medicine 27, 2008 (variances recovered from two intervals).
    """
    return crossed(values, strata, level, clusters).interval(level)


def crossed(
    values: ArrayLike,
    strata: ArrayLike | None = None,
    level: float = 0.95,
    clusters: ArrayLike | None = None,
) -> Crossed:
    """The variances behind ``population_interval``, with the same arguments and errors."""
    d = np.asarray(values, dtype=np.float64)
    _check(d, 2, "values", "(S, N)", level)
    if clusters is not None:
        return _clustered(d, strata, np.asarray(clusters))
    seeds, images = d.shape
    codes = _strata(strata, np.arange(images))
    v_item = v_item_squares = residual = 0.0
    for code in range(codes.max() + 1):
        part = d[:, codes == code]
        n = part.shape[1]
        image_means = part.mean(axis=0)
        rest = part - image_means - part.mean(axis=1, keepdims=True) + part.mean()
        # w_h^2 / n_h = n_h / N^2
        share = n / images**2 * float(image_means.var(ddof=1))
        v_item += share
        v_item_squares += share**2 / (n - 1)
        residual += n / images**2 * float((rest**2).sum()) / ((seeds - 1) * (n - 1)) / seeds
    return Crossed(
        estimate=float(d.mean()),
        seeds=seeds,
        images=images,
        seed=float(d.mean(axis=1).var(ddof=1)) / seeds,
        item=v_item,
        residual=residual,
        df_item=v_item**2 / v_item_squares if v_item_squares > 0 else images - codes.max() - 1,
    )


def _clustered(
    d: NDArray[np.float64], strata: ArrayLike | None, clusters: NDArray[np.generic]
) -> Crossed:
    """Variances if clusters of images are drawn, of any sizes n_c, with one class or several.

    The estimate is sum_h w_h mean_h with w_h fixed, so the variance is that of the sum over
    clusters of residuals from class means (post-stratified where clusters span classes):

        T_sc = sum_h sqrt(k_h) sum_{i in c, h} (d_si - mean_sh) / N
        V_item = sum_c (mean_s T_sc)^2
        R      = sum_c sum_s (T_sc - mean_s T_sc)^2 / ((S - 1) S)

    A large cluster pulls the mean of its class towards itself, so that residuals are too small;
    with p_c = n_ch / n_h,

        k_h = sum_c p_c^2 / sum_c p_c^2 (1 - 2 p_c + sum_b p_b^2)

    corrects this: V_item is unbiased if the images of a cluster are copies of each other, and too
    large otherwise. For equal sizes k_h is C_h / (C_h - 1) with C_h clusters in the class, and for
    clusters of one image these are the mean squares of ``population_interval``.

    df_item is 2 E(V)^2 / var(V), by Satterthwaite, for V_item if a cluster has one normal effect
    on all of its images, scaled in each class to the variance found there. For clusters within
    classes this is the df of Welch and Satterthwaite with C_h - 1 for equal sizes, and less if few
    clusters contain most of the images.

    Source: Bell and McCaffrey, Survey Methodology 28, 2002 (bias and degrees of freedom under a
    working model; theirs is of independent images). For the AUC the sums over clusters are those
    of Obuchowski, Biometrics 53, 1997.
    """
    seeds, images = d.shape
    if clusters.shape != (images,):
        raise ValueError(f"clusters have shape {clusters.shape}, expected {(images,)}")
    cluster = np.unique(clusters, return_inverse=True)[1]
    count = int(cluster.max()) + 1
    if count < 2:
        raise ValueError("the images are of 1 cluster, expected 2 or more")
    codes = _strata(strata, cluster)
    classes = int(codes.max()) + 1
    sizes = np.zeros((count, classes))
    np.add.at(sizes, (cluster, codes), 1)
    share = sizes / sizes.sum(axis=0)
    squares = (share**2).sum(axis=0)
    k = squares / (share**2 * (1 - 2 * share + squares)).sum(axis=0)
    totals, found = np.zeros((count, seeds)), np.zeros(classes)
    for code in range(classes):
        own, part = codes == code, np.zeros((count, seeds))
        rest = d[:, own] - d[:, own].mean(axis=1, keepdims=True)
        np.add.at(part, cluster[own], np.sqrt(k[code]) * rest.T / images)
        found[code] = (part.mean(axis=1) ** 2).sum()
        totals += part
    item = float((totals.mean(axis=1) ** 2).sum())
    return Crossed(
        estimate=float(d.mean()),
        seeds=seeds,
        images=images,
        seed=float(d.mean(axis=1).var(ddof=1)) / seeds,
        item=item,
        residual=float(totals.var(axis=1, ddof=1).sum()) / seeds,
        df_item=_satterthwaite(share * np.sqrt(k * found / squares), share)
        if item > 0
        else max(count - classes, 1),
        clusters=count,
    )


def _satterthwaite(weights: NDArray[np.float64], share: NDArray[np.float64]) -> float:
    """2 E(V)^2 / var(V) of V = |M b|^2 with M = diag(sum_h weights_h) - weights share'.

    b (C,) are independent normal effects of clusters, so M b are their totals over classes, each
    minus the mean of its class; weights, share (C, H). M'M (C, C) is never computed.
    """
    own = weights.sum(axis=1)
    # M'M = diag(own^2) - e share' - share e'
    e = own[:, None] * weights - share @ (weights.T @ weights) / 2
    mean = (own**2).sum() - 2 * (e * share).sum()
    between = e.T @ share
    square = (own**4).sum() - 4 * (own**2 * (e * share).sum(axis=1)).sum()
    square += 2 * ((e.T @ e) * (share.T @ share)).sum() + 2 * (between * between.T).sum()
    return float(mean**2 / square)


def smallest_detectable(se: float, df: float, power: float = 0.8, level: float = 0.95) -> float:
    """The smallest true difference, in the unit of se, found significant with this power.

    (t(1 - alpha/2, df) + t(power, df)) se with alpha = 1 - level: a two-sided test that takes se as
    the true standard error. It approximates the noncentral t: for 0.8 the power is .77 at df 2,
    .78 at 3, .79 at 4 and .80 from 9.

    Raises:
        ValueError: se below 0, df not above 0, or power or level outside (0, 1).
    """
    if not se >= 0:
        raise ValueError(f"se is {se}, expected at least 0")
    if not df > 0:
        raise ValueError(f"df is {df}, expected above 0")
    if not 0 < power < 1:
        raise ValueError(f"power is {power}, expected within (0, 1)")
    _check_level(level)
    return (_quantile(df, level) + _t(df, power)) * se


def holm(p: ArrayLike) -> NDArray[np.float64]:
    """p-values (m,), adjusted so that rejecting those up to alpha keeps the familywise error there.

    Source: Holm, Scandinavian Journal of Statistics 6, 1979.
    """
    values = np.asarray(p, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    steps = values[order] * np.arange(len(values), 0, -1)
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return adjusted


def wilcoxon(differences: ArrayLike) -> float:
    """Exact two-sided p-value of Wilcoxon's signed ranks over data sets (n,); 1 without any.

    Differences of 0 are dropped, ties share their mean rank, and all patterns of signs are equally
    likely, so the p-value is exact with ties too.

    Raises:
        ValueError: values that are not finite.
    """
    from scipy import stats  # noqa: PLC0415 - takes most of a second

    d = np.asarray(differences, dtype=np.float64)
    if bad := int((~np.isfinite(d)).sum()):
        raise ValueError(f"{bad} of {d.size} differences are not finite")
    d = d[d != 0]
    doubled = np.round(2 * stats.rankdata(np.abs(d))).astype(int)  # mean ranks are halves
    counts = np.ones(1)
    for rank in doubled:
        counts = np.pad(counts, (0, rank)) + np.pad(counts, (rank, 0))
    positive = int(doubled[d > 0].sum())
    tail = min(positive, int(doubled.sum()) - positive)
    return float(min(1.0, 2 * counts[: tail + 1].sum() / counts.sum()))


def wilcoxon_holm(differences: ArrayLike) -> tuple[NDArray[np.float64], str]:
    """Adjusted p-values (m,) of m comparisons over n data sets (m, n), or why there are none.

    The smallest exact p-value is 2^(1 - n), and Holm multiplies it by m.
    """
    d = np.asarray(differences, dtype=np.float64)
    comparisons, sets = d.shape
    least = comparisons * 2.0 ** (1 - sets)
    if least > ALPHA:
        more = int(np.ceil(1 + np.log2(comparisons / ALPHA)))
        return np.empty(0), (
            f"{comparisons} comparison{'s' * (comparisons > 1)} over {sets} data "
            f"set{'s' * (sets > 1)}: the smallest p-value that an exact Wilcoxon test with Holm's "
            f"correction could give is {min(least, 1):.3g}, above {ALPHA:g}; "
            f"{more} data sets are needed"
        )
    return holm([wilcoxon(row) for row in d]), ""


def win_tie_loss(differences: ArrayLike, margin: float) -> tuple[int, int, int]:
    """Data sets (n,) on which the difference is above the margin, within it, and below it."""
    d = np.asarray(differences, dtype=np.float64)
    wins, losses = int((d > margin).sum()), int((d < -margin).sum())
    return wins, len(d) - wins - losses, losses


def probability_of_improvement(ours: ArrayLike, theirs: ArrayLike) -> float:
    """The probability that a seed of ours (S,) scores above one of theirs (T,); ties count half."""
    x, y = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    return float((np.sign(x[:, None] - y[None]) / 2 + 0.5).mean())


@dataclass(frozen=True)
class Ranks:
    """Mean ranks of methods over data sets, 1 the best."""

    mean: NDArray[np.float64]
    friedman_p: float
    """of the hypothesis that all methods have equal ranks; nan for two methods"""
    critical_difference: float
    """mean ranks that are further apart differ significantly at .05 (Nemenyi)"""
    groups: tuple[tuple[int, ...], ...]
    """methods, best first, within a critical difference of each other; only the largest groups"""


def ranks(scores: ArrayLike) -> Ranks:
    """Ranks of scores (methods, data sets), higher better.

    Raises:
        ValueError: fewer than two methods or data sets.

    Source: Demšar, Journal of Machine Learning Research 7, 2006.
    """
    from scipy import stats  # noqa: PLC0415 - takes most of a second

    table = np.asarray(scores, dtype=np.float64)
    _check(table, 2, "scores", "(methods, data sets)", 0.95)
    methods, sets = table.shape
    mean = stats.rankdata(-table, axis=0).mean(axis=1)
    # The studentised range with infinite degrees of freedom, between two means.
    q = float(stats.studentized_range.ppf(1 - ALPHA, methods, np.inf)) / np.sqrt(2)
    apart = q * np.sqrt(methods * (methods + 1) / (6 * sets))
    differ = methods > 2 and bool((table != table[0]).any())
    friedman = float(stats.friedmanchisquare(*table).pvalue) if differ else np.nan
    return Ranks(mean, friedman, float(apart), _groups(mean, apart))


def _groups(mean: NDArray[np.float64], apart: float) -> tuple[tuple[int, ...], ...]:
    order = [int(each) for each in np.argsort(mean, kind="stable")]
    found: list[tuple[int, ...]] = []
    for start, first in enumerate(order):
        group = tuple(each for each in order[start:] if mean[each] - mean[first] <= apart)
        if len(group) > 1 and not any(set(group) <= set(other) for other in found):
            found.append(group)
    return tuple(found)


def resampled(differences: ArrayLike, folds: int, ratio: float) -> Resampled:
    """The mean of the differences (J,) on the J test folds of repeated cross-validation.

    Training sets overlap, so the plain variance is too small: it is multiplied by 1/J + n2/n1,
    where ``ratio`` is n2/n1, test rows per training row. J is a multiple of ``folds``. The result
    generalises to other training and test rows, not to the official split.

    Raises:
        ValueError: as ``training_interval``, or J is not a multiple of folds.

    Source: Nadeau and Bengio, Machine Learning 52, 2003.
    """
    d = np.asarray(differences, dtype=np.float64)
    _check(d, 1, "differences", "(J,)", 0.95)
    if folds < 2 or len(d) % folds:
        raise ValueError(f"{len(d)} differences, expected a multiple of {folds} folds (2 or more)")
    variance = float(d.var(ddof=1)) * (1 / len(d) + ratio)
    return Resampled(float(d.mean()), len(d), variance)


def mean_interval(intervals: Sequence[Sequence[Interval]]) -> Interval:
    """The interval of the mean over these data sets, with one value per group of data sets.

    Groups are independent, so their half-widths add in quadrature; those within a group are views
    of the same images, treated as fully dependent, so theirs are averaged. It generalises to other
    seeds and images of these data sets, not to other data sets.
    """
    estimates = [float(np.mean([each.estimate for each in group])) for group in intervals]
    halves = [float(np.mean([(each.high - each.low) / 2 for each in g])) for g in intervals]
    errors = [float(np.mean([each.se for each in group])) for group in intervals]
    half, se = (float(np.sqrt(np.square(each).sum()) / len(each)) for each in (halves, errors))
    level = intervals[0][0].level
    df = _degrees(half / se, level) if se > 0 else np.inf
    return _interval(float(np.mean(estimates)), half, se, df, level)


def _check(values: NDArray[np.float64], ndim: int, name: str, shape: str, level: float) -> None:
    if values.ndim != ndim:
        raise ValueError(f"{name} have shape {values.shape}, expected {shape}")
    if min(values.shape) < 2:
        raise ValueError(f"{name} have shape {values.shape}, expected at least 2 along each axis")
    if bad := int((~np.isfinite(values)).sum()):
        raise ValueError(f"{bad} of {values.size} {name} are not finite")
    _check_level(level)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level is {level}, expected within (0, 1)")


def _t(df: float, chance: float) -> float:
    """The value below which Student's t lies with this probability."""
    from scipy import special  # noqa: PLC0415 - takes a third of a second

    return float(special.stdtrit(df, chance))


def _quantile(df: float, level: float) -> float:
    return _t(df, (1 + level) / 2)


def _degrees(t: float, level: float) -> float:
    """The degrees of freedom for which ``t`` is the quantile."""
    from scipy import special  # noqa: PLC0415 - takes a third of a second

    return float(special.stdtridf((1 + level) / 2, t))


def _interval(estimate: float, half: float, se: float, df: float, level: float) -> Interval:
    return Interval(estimate, estimate - half, estimate + half, se, float(df), level)


def _strata(strata: ArrayLike | None, clusters: NDArray[np.intp]) -> NDArray[np.intp]:
    """Strata numbered from 0, each with two clusters or more; an image may be its own cluster."""
    images = len(clusters)
    if strata is None:
        return np.zeros(images, dtype=np.intp)
    given = np.asarray(strata)
    if given.shape != (images,):
        raise ValueError(f"strata have shape {given.shape}, expected {(images,)}")
    codes = np.unique(given, return_inverse=True)[1]
    code, cluster = np.divmod(np.unique(codes * images + clusters), images)
    sizes = np.bincount(code)
    pooled = sizes == 1
    if len(np.unique(cluster[pooled[code]])) == 1:
        pooled[np.where(pooled, images + 1, sizes).argmin()] = True
    codes = np.where(pooled[codes], len(sizes), codes)
    return np.unique(codes, return_inverse=True)[1]
