"""From the columns of a table to what a network sees, fitted on the training rows of a run."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from benchmarks.data.carving import NotApplicable
from benchmarks.data.dataset import Arrays, Column, Table
from methods.base import Input

if TYPE_CHECKING:
    from sklearn.compose import ColumnTransformer

MOST_QUANTILES = 1000
Scale = Literal["quantile", "standard"]


def prepared(arrays: Arrays, kept: np.ndarray, scale: Scale) -> tuple[Arrays, tuple[Input, ...]]:
    """The arrays of a table as float32 (N, D'), and what its columns are.

    Everything is fitted on the rows ``kept`` of the train split, labels unseen. Numbers: the median
    for missing values, then a normal distribution by quantiles, or mean 0 and standard deviation 1.
    Behind them a column of 0 and 1 for each that has missing values. Then categories, as codes from
    1, missing values one of them, 0 for those that do not occur in ``kept``. Columns that are
    constant in ``kept`` are left out.
    """
    assert arrays.table is not None
    fitted = fit(arrays.train_x[kept], arrays.table, scale)
    parts = [fitted.apply(np.asarray(each)) for each in arrays.images]
    inputs = (fitted.input,)
    notes = (*arrays.notes, *fitted.notes)
    train, val, test = parts
    return replace(arrays, train_x=train, val_x=val, test_x=test, notes=notes), inputs


class Fitted:
    """Preprocessing that was fitted on some rows of a table."""

    def __init__(
        self,
        steps: ColumnTransformer,
        table: Table,
        levels: tuple[int, ...],
        left_out: list[str],
    ):
        self._steps, self._table, self._levels = steps, table, levels
        self.notes: tuple[str, ...] = ()
        if left_out:
            shown = ", ".join(left_out[:5]) + (", ..." if len(left_out) > 5 else "")
            self.notes = (
                f"constant in the training rows, so left out: {len(left_out)} "
                f"column{'s' if len(left_out) > 1 else ''} ({shown})",
            )

    @property
    def input(self) -> Input:
        """What a row is: a vector, its categories by column."""
        categories = self._levels if any(self._levels) else ()
        return Input("vector", (len(self._levels),), -math.inf, math.inf, categories)

    def apply(self, x: np.ndarray) -> np.ndarray:
        """float32 (N, D') of stored rows (N, D)."""
        made = np.asarray(self._steps.transform(x), dtype=np.float64)
        coded = np.array(self._levels) > 0
        made[:, coded] += 1  # 0 is for unknown ones
        return made.astype(np.float32)

    @property
    def names(self) -> list[str]:
        """Of the columns D'."""
        columns = [
            (part, self._table.columns[place].name)
            for part, _, places in self._steps.transformers_
            if part in PARTS
            for place in places
        ]
        return [f"{name} missing" if part == "gaps" else name for part, name in columns]

    def cells(self, x: np.ndarray) -> list[list[str]]:
        """Prepared rows (N, D') in the units of the table: numbers, dates, names of categories."""
        columns: list[list[str]] = []
        for part, step, places in self._steps.transformers_:
            if part not in PARTS:
                continue
            inner = x[:, len(columns) : len(columns) + len(places)].astype(np.float64)
            values = step[-1].inverse_transform(inner) if part == "numbers" else inner
            for place, column in enumerate(places):
                told = self._table.columns[column]
                known = step[-1].categories_[place] if part == "codes" else np.empty(0)
                columns.append([_cell(part, value, told, known) for value in values[:, place]])
        return [list(row) for row in zip(*columns, strict=True)]


PARTS = ("numbers", "gaps", "codes")
"""The prepared columns, in their order."""


def _cell(part: str, value: float, column: Column, known: np.ndarray) -> str:
    """A value as people read it; ``known`` are the codes of the categories, -1 a missing one."""
    if part == "gaps":
        return {0.0: "no", 1.0: "yes"}.get(value, f"{value:.3g}")
    if part == "codes":
        code = known[int(value) - 1] if value >= 1 else np.nan
        return "unknown" if np.isnan(code) else "missing" if code < 0 else column.levels[int(code)]
    if column.kind == "date":
        return str(np.datetime64("1970-01-01") + np.timedelta64(round(value), "D"))
    return f"{value:.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"


def fit(x: np.ndarray, table: Table, scale: Scale) -> Fitted:
    """Fit the preprocessing of stored rows (N, D)."""
    from sklearn.compose import ColumnTransformer  # noqa: PLC0415 - slow, and only for tables
    from sklearn.impute import MissingIndicator, SimpleImputer  # noqa: PLC0415
    from sklearn.pipeline import make_pipeline  # noqa: PLC0415
    from sklearn.preprocessing import (  # noqa: PLC0415
        OrdinalEncoder,
        QuantileTransformer,
        StandardScaler,
    )

    varied = np.array([len(np.unique(column)) > 1 for column in x.T])  # nan is one value
    missing = np.isnan(x).any(axis=0) & varied
    numbers = np.flatnonzero(varied & ~table.coded)
    # A column that is the same but for missing values tells no more than that they are missing.
    told = np.array([len(np.unique(each[~np.isnan(each)])) > 1 for each in x.T], dtype=bool)
    numbers, gaps = numbers[told[numbers]], numbers[missing[numbers]]
    coded = np.flatnonzero(varied & table.coded)
    if scale == "quantile":
        every: Any = None  # rows: the annotation of scikit-learn has numbers only
        count = min(MOST_QUANTILES, len(x))
        scaler = QuantileTransformer(
            n_quantiles=count, output_distribution="normal", subsample=every
        )
    else:
        scaler = StandardScaler()
    codes = OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=-1)
    filled = SimpleImputer(strategy="constant", fill_value=-1.0)
    parts = [
        (PARTS[0], make_pipeline(SimpleImputer(strategy="median"), scaler), numbers),
        (PARTS[1], MissingIndicator(features="all"), gaps),
        (PARTS[2], make_pipeline(filled, codes), coded),
    ]
    steps = ColumnTransformer([part for part in parts if len(part[2])], sparse_threshold=0)
    if not steps.transformers:
        raise NotApplicable("no column of the table varies in the training rows")
    steps.fit(x)
    known = [len(np.unique(np.where(np.isnan(c), -1, c))) + 1 for c in x[:, coded].T]
    levels = (*[0] * (len(numbers) + len(gaps)), *known)
    left_out = [each.name for each, keep in zip(table.columns, varied, strict=True) if not keep]
    return Fitted(steps, table, levels, left_out)
