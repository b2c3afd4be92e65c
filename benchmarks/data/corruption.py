"""Wrong labels and rare classes, made on purpose, and what was made is kept."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.data.names import Benchmark
from benchmarks.data.seeding import seed_of


@dataclass(frozen=True, eq=False)
class Part:
    """Rows before they become tensors."""

    where: np.ndarray
    """(N,) rows of the train images; from their number on, of the val images"""
    clean: np.ndarray
    """labels as stored"""
    given: np.ndarray
    """labels as given to the run"""


def imbalanced(
    train: np.ndarray, labels: np.ndarray, classes: int, benchmark: Benchmark, seed: int
) -> np.ndarray:
    """Classes below K/2 stay; the other half is cut down by the ratio (AutoDO, 5.1).

    ``half``: floor(L / ratio) rows in total, drawn uniformly over the second half, L the rows of
    the first, as in AutoDO's code. ``stratified``: each class of the second half keeps floor(n /
    ratio), at least one.
    """
    if benchmark.imbalance <= 1:
        return train
    rng = np.random.default_rng(seed_of(seed, "imbalance"))
    rare = labels[train] >= classes / 2
    if benchmark.imbalance_kind == "half":
        wanted = int((~rare).sum() // benchmark.imbalance)
        kept = rng.permutation(train[rare])[:wanted]
    else:
        kept = np.concatenate(
            [
                rng.permutation(rows)[: max(1, int(len(rows) // benchmark.imbalance))]
                for label in np.unique(labels[train][rare])
                for rows in [train[labels[train] == label]]
            ]
        )
    return np.sort(np.concatenate([train[~rare], kept]))


def noisy_labels(
    labels: np.ndarray, classes: int, benchmark: Benchmark, share: float, seed: int, purpose: str
) -> np.ndarray:
    """Labels of which a share was replaced.

    ``symmetric``: round(share * N) rows get a label drawn from all K, the true one included, so
    that share * (K - 1) / K really change (AutoDO's recipe). ``pair``: in each class
    round(share * n) rows get the next label, k + 1 mod K.
    """
    if share <= 0:
        return labels
    rng = np.random.default_rng(seed_of(seed, purpose))
    noisy = labels.copy()
    if benchmark.noise_kind == "symmetric":
        rows = rng.permutation(len(labels))[: round(share * len(labels))]
        noisy[rows] = rng.integers(0, classes, len(rows))
    else:
        for label in range(classes):
            rows = rng.permutation(np.flatnonzero(labels == label))
            noisy[rows[: round(share * len(rows))]] = (label + 1) % classes
    return noisy


def changes(part: Part, origin: np.ndarray | None) -> dict[str, np.ndarray]:
    """What corruption.npz holds: stored rows that were trained on, and which labels changed."""
    rows = np.flatnonzero(part.clean != part.given)
    return {
        "stored_rows": part.where if origin is None else origin[part.where],
        "rows": rows,
        "before": part.clean[rows],
        "after": part.given[rows],
    }


def record(benchmark: Benchmark, classes: int, train: Part, meta: Part) -> dict[str, Any]:
    """Effective amounts for result.json; the rows themselves go to corruption.npz."""
    changed = np.flatnonzero(train.clean != train.given)
    meta_changed = int((meta.clean != meta.given).sum())
    identity = hashlib.md5(train.where.tobytes() + changed.tobytes(), usedforsecurity=False)
    return {
        "rows": len(train.where),
        "noise_requested": benchmark.noise,
        "noise_effective": len(changed) / max(1, len(train.where)),
        "rows_of_each_class_before_noise": np.bincount(train.clean, minlength=classes).tolist(),
        "meta_noise_requested": benchmark.meta_noise,
        "meta_noise_effective": meta_changed / max(1, len(meta.where)),
        "rows_md5": identity.hexdigest(),
    }
