"""Rows cut into parts: stratified, or in whole groups."""

import math
from collections.abc import Sequence

import numpy as np


def stratified_split(
    labels: np.ndarray, shares: Sequence[float], seed: int
) -> tuple[np.ndarray, ...]:
    """Disjoint rows for each share, sorted, that keep the share of every class.

    `labels` (N,) or, for combinations of labels, (N, L); `shares` are relative sizes: counts that
    add up to N are met exactly, all others after rounding by largest remainder. Within a part each
    class has its proportional number of rows, rounded down or up. The result depends only on the
    arguments.
    """
    generator = np.random.default_rng(seed)
    _, group = np.unique(labels, axis=0, return_inverse=True)
    group = group.reshape(-1)
    rows = [generator.permutation(np.flatnonzero(group == g)) for g in range(group.max() + 1)]
    ties = generator.permutation(len(rows))
    exact = np.asarray(shares, dtype=np.float64) / math.fsum(shares) * len(group)
    # A count must not lose a row to the rounding of a division.
    exact = np.where(np.isclose(exact, np.rint(exact), rtol=0, atol=1e-6), np.rint(exact), exact)
    counts = _largest_remainder(exact, len(group), np.arange(len(exact)))
    parts = []
    for count in counts:
        left = np.array([len(r) for r in rows])
        quota = left * count / max(left.sum(), 1)
        take = _largest_remainder(quota, int(count), ties)
        parts.append(np.sort(np.concatenate([r[:t] for r, t in zip(rows, take, strict=True)])))
        rows = [r[t:] for r, t in zip(rows, take, strict=True)]
    return tuple(parts)


def grouped_split(
    labels: np.ndarray, groups: np.ndarray, shares: Sequence[float], seed: int
) -> tuple[np.ndarray, ...]:
    """Disjoint rows for each share, sorted, where all rows of a group are in one part.

    `labels` (N,) class numbers, or (N, L) of 0 and 1; `groups` (N,), equal for rows of one patient;
    `shares` are relative sizes. Sizes and classes match the shares as closely as groups allow: the
    largest groups are placed first (by powers of two of their rows, within these in random order),
    each in the part that most lacks its rows. A class is in every part if enough groups have it,
    otherwise in the part with the largest share. No part is empty. The result depends only on the
    arguments.

    Raises ValueError if there are fewer groups than shares.
    """
    names, group = np.unique(groups, return_inverse=True)
    group = group.reshape(-1)
    if len(names) < len(shares):
        raise ValueError(f"{len(names)} groups cannot fill {len(shares)} parts")
    if labels.ndim == 1:
        one_hot = np.unique(labels)[None] == labels[:, None]
    else:
        one_hot = labels[:, labels.any(0)] > 0
    # What a group contributes: rows of each class, and rows in total.
    columns = np.column_stack([one_hot, np.ones(len(labels))])
    brings = np.zeros((len(names), columns.shape[1]))
    np.add.at(brings, group, columns)
    share = np.asarray(shares, dtype=np.float64) / math.fsum(shares)
    whole = brings.sum(0)
    wanted, have = share[:, None] * whole, np.zeros((len(share), len(whole)))
    weight = np.ones(len(whole))
    weight[-1] = max(1, len(whole) - 1)  # sizes count as much as all classes together
    left = (brings > 0).sum(0)  # groups to come that have rows of a class
    largest = np.arange(len(share)) == share.argmax()
    part = np.empty(len(names), np.int64)
    order = np.random.default_rng(seed).permutation(len(names))
    magnitude = np.frexp(brings[order, -1])[1]  # by exact size every seed would give one split
    for g in order[np.argsort(-magnitude, kind="stable")]:
        new = brings[g]
        lacks = have == 0
        # If only as many groups are left as parts lack the class, this one goes to one of those.
        last = lacks & (new > 0) & (left <= lacks.sum(0))
        distance = ((2 * new * (have - wanted) + new**2) / (wanted * whole)) @ weight
        urgent = (~last[:, -1], ~(largest & last.any(1)), -last.sum(1), distance.round(9))
        part[g] = np.lexsort(urgent[::-1])[0]
        have[part[g]] += new
        left -= new > 0
    return tuple(np.flatnonzero(part[group] == p) for p in range(len(share)))


def _largest_remainder(quota: np.ndarray, total: int, ties: np.ndarray) -> np.ndarray:
    """Integers that add up to `total`, each its quota rounded down or up."""
    base = np.floor(quota).astype(np.int64)
    order = np.lexsort((ties, -np.round(quota - base, 9)))
    base[order[: total - int(base.sum())]] += 1
    return base
