"""Classifiers that are not trained by gradient descent, on the same rows, for orientation."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from methods.base import Batch, Context
from methods.learner import Learner

SMALLEST = 1e-7
"""Probabilities below it are raised to it, so that their logarithms are finite."""


class Fitted(nn.Module):
    """A fitted classifier of scikit-learn as a network: inputs (B, D) to log-probabilities."""

    def __init__(self, classifier: Any, classes: int) -> None:
        super().__init__()
        self._classifier, self._classes = classifier, classes

    def forward(self, x: Tensor) -> Tensor:
        """(B, K); classes that were not seen have the smallest probability."""
        found = np.full((len(x), self._classes), SMALLEST)
        found[:, self._classifier.classes_] = self._classifier.predict_proba(x.cpu().numpy())
        return torch.from_numpy(np.log(found.clip(SMALLEST))).to(x.device, torch.float32)


class Orientation(Learner):
    """Fits a classifier once, before the first step, and takes no step."""

    kinds = frozenset({"vector", "categories"})
    control = True
    trains_network = False

    def __init__(self) -> None:
        super().__init__()
        self._fitted: Fitted | None = None
        self._loss = torch.zeros(())

    @abstractmethod
    def classifier(self, categories: tuple[int, ...]) -> Any:
        """A new one, for a table with so many values of each column, 0 for numbers."""

    def setup(self, ctx: Context) -> None:
        """Fit it to the training rows, each with the class of its target."""
        super().setup(ctx)
        rows = ctx.train.rows(ctx.train.index)
        made = self.classifier(ctx.spec.categories)
        made.fit(rows.x.cpu().numpy(), rows.y.argmax(dim=1).cpu().numpy())
        self._fitted = Fitted(made, ctx.spec.classes)
        self._loss = ctx.task.losses(self._fitted(rows.x), rows.y).mean()

    def step(self, batch: Batch, ctx: Context) -> tuple[Tensor, Batch]:
        """The batch, and the loss of all training rows: nothing is learned from batches."""
        return self._loss, batch

    def predictor(self, ctx: Context) -> nn.Module:
        """The fitted classifier."""
        if self._fitted is None:
            raise RuntimeError("setup fits the classifier, and was not called")
        return self._fitted


class Boosting(Orientation):
    """Gradient boosting of trees on the same rows, for orientation: it trains no network.

    scikit-learn's HistGradientBoostingClassifier with its defaults, categories as categories where
    a column has at most 255 of them.
    """

    source = "Ke et al., LightGBM, NeurIPS 2017; Pedregosa et al., scikit-learn, JMLR 12, 2011"

    def classifier(self, categories: tuple[int, ...]) -> Any:
        """A new one, with a fixed seed."""
        from sklearn.ensemble import HistGradientBoostingClassifier  # noqa: PLC0415 - a second

        coded: Any = [0 < count <= 255 for count in categories] or None  # its own limit
        return HistGradientBoostingClassifier(categorical_features=coded, random_state=0)


class Logistic(Orientation):
    """Logistic regression on the same rows, for orientation: it trains no network.

    scikit-learn's LogisticRegression, categories as one column for each value.
    """

    source = "Pedregosa et al., scikit-learn, JMLR 12, 2011"

    def __init__(self, *, c: float = 1.0) -> None:
        super().__init__()
        if c <= 0:
            raise ValueError(f"c: expected a number above 0, got {c}")
        self.c = c

    def classifier(self, categories: tuple[int, ...]) -> Any:
        """A new one, with an inverse penalty of ``c``."""
        from sklearn.compose import ColumnTransformer  # noqa: PLC0415
        from sklearn.linear_model import LogisticRegression  # noqa: PLC0415
        from sklearn.pipeline import make_pipeline  # noqa: PLC0415
        from sklearn.preprocessing import OneHotEncoder  # noqa: PLC0415

        coded = [place for place, count in enumerate(categories) if count]
        columns = ColumnTransformer(
            [("codes", OneHotEncoder(handle_unknown="ignore"), coded)], remainder="passthrough"
        )
        return make_pipeline(columns, LogisticRegression(C=self.c, max_iter=1000))
