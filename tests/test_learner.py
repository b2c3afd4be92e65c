"""Learners: the default step, means of weights, classifiers for orientation, and other tasks."""

from __future__ import annotations

import ast
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import cohen_kappa_score
from sklearn.preprocessing import OneHotEncoder
from torch import Tensor, nn
from torch.nn import functional as F

import methods
from analysis import metrics, runs, tasks
from analysis.measures import Bools, Floats
from analysis.metrics import MEASURES, Measure
from analysis.runs import Run, Training
from benchmarks.contract import Case, network_for, splits
from benchmarks.data.splits import NotApplicable
from benchmarks.training import tasks as losses_of_tasks
from benchmarks.training import trainer
from benchmarks.training.errors import Interrupted
from benchmarks.training.trainer import fit
from methods.base import Batch, Context
from methods.learner import Learner, Supervised, follow
from methods.naming import NamingError
from tests.made import inputs_of, interrupt_at

ROOT = Path(__file__).parent.parent
IMAGES, TABLE = Case(1), Case(6, inputs="table")


def a_run(case: Case = IMAGES, method: str = "none", **training: Any) -> Run:
    settings = {"epochs": 3, "batch_size": 8, **training}
    return Run(
        benchmark="test", data="", model=str(network_for(case)), method=method,
        training=Training(**settings),
    )  # fmt: skip


def same(one: Any, other: Any) -> None:
    assert one.state.metric_lines == other.state.metric_lines
    for name, array in one.predictions.items():
        assert np.array_equal(array, other.predictions[name]), name


class TestMeans:
    def test_they_are_those_of_the_formula(self) -> None:
        """Predictions are those of means that are kept by hand beside the same training."""
        made, keep, mean = splits(Case(1), False), 0.8, {}

        class Watched(Supervised):
            def step(self, batch: Batch, ctx: Context) -> tuple[Tensor, Batch]:
                now = {name: each.clone() for name, each in ctx.model.state_dict().items()}
                if not mean:
                    mean.update(now)
                found = super().step(batch, ctx)
                for name, each in ctx.model.named_parameters():
                    mean[name] = keep * mean[name] + (1 - keep) * each.detach()
                for name, each in ctx.model.named_buffers():
                    mean[name] = each.clone()
                return found

        fitted = fit(a_run(ema=keep), made, Watched(methods.build("none"), keep))
        assert mean
        for name, each in fitted.model.state_dict().items():
            torch.testing.assert_close(each, mean[name], rtol=1e-4, atol=1e-6)
        plain = fit(a_run(), made, methods.build("none"))
        assert fitted.state.metric_lines != plain.state.metric_lines
        same(fit(a_run(ema=keep), made, methods.build("none")), fitted)

    def test_a_share_of_0_changes_nothing_not_even_the_id(self) -> None:
        assert a_run(ema=0.0).id == a_run().id != a_run(ema=0.5).id
        with pytest.raises(ValueError, match="ema: expected a share"):
            Training(ema=1.0)

    def test_the_method_may_change_the_network_of_the_means(self) -> None:
        made = splits(Case(1), True)
        fitted = fit(a_run(ema=0.5), made, methods.build("head_refit"))
        plain = fit(a_run(ema=0.5), made, methods.build("none"))
        head = {name for name in plain.model.state_dict() if name.startswith("head.")}
        for name, each in fitted.model.state_dict().items():
            assert torch.equal(each, plain.model.state_dict()[name]) == (name not in head), name

    def test_resumes_bit_for_bit(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        made, run = splits(Case(1), True), a_run(ema=0.9)
        name = "saflex(upstream=crop)"
        whole = fit(run, made, methods.build(name))
        interrupt_at(8, monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            fit(run, made, methods.build(name), folder=tmp_path)
        again = fit(run, made, methods.build(name), folder=tmp_path)
        assert again.state.resumed == 1
        same(again, whole)

    def test_follow(self) -> None:
        mean, model = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
        with torch.no_grad():
            model.weight.fill_(3.0)
            model.running_mean.fill_(7.0)  # type: ignore[union-attr]
        follow(mean, model, 0.75)
        assert mean.weight.tolist() == [1.5, 1.5] and mean.running_mean.tolist() == [7.0, 7.0]  # type: ignore[union-attr]


class Two(Learner):
    """Two networks that take turns; the second has an optimiser of its own."""

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        self.other = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
        self.own = torch.optim.SGD(self.other.parameters(), lr=0.1)

    def networks(self) -> Iterator[nn.Module]:
        yield self.other

    def optimizers(self) -> Iterator[torch.optim.Optimizer]:
        yield self.own

    def get_extra_state(self) -> dict[str, Any]:
        return self.own.state_dict()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.own.load_state_dict(state)

    def step(self, batch: Batch, ctx: Context) -> tuple[Tensor, Batch]:
        loss = ctx.update(ctx.task.losses(ctx.forward(batch.x), batch.y), batch.w)
        self.own.zero_grad()
        (batch.w @ ctx.task.losses(self.other(batch.x), batch.y)).backward()
        self.own.step()
        return loss, batch

    def predictor(self, ctx: Context) -> nn.Module:
        return self.other


def test_a_learner_with_two_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, run = splits(Case(1), False), a_run(schedule="constant", learning_rate=0.05)
    whole = fit(run, made, Two())
    cost = whole.result["cost"]
    assert cost["passes_per_row"] == 4  # forward and backward, of both
    assert [each.shape for each in whole.model.parameters()] == [(3, 64), (3,)]
    assert whole.method.own.param_groups[0]["lr"] == 0.05  # type: ignore[union-attr]
    by_hand = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    by_hand.load_state_dict(whole.model.state_dict())
    stored = whole.predictions["test_last_logits"]
    x = made.test.inputs(torch.arange(len(made.test)))
    np.testing.assert_allclose(stored, by_hand(x).detach().numpy(), rtol=1e-5, atol=1e-6)

    interrupt_at(7, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        fit(run, made, Two(), folder=tmp_path)
    same(fit(run, made, Two(), folder=tmp_path), whole)


class TestOrientation:
    def test_boosting_is_scikit_learn_s(self) -> None:
        made = splits(TABLE, False)
        fitted = fit(a_run(TABLE), made, methods.build("boosting"))
        coded: Any = [False, True] * 3
        theirs = HistGradientBoostingClassifier(categorical_features=coded, random_state=0)
        theirs.fit(inputs_of(made.train).numpy(), made.train.y.argmax(1).numpy())
        expected = theirs.predict_proba(inputs_of(made.test).numpy())
        found = metrics.probabilities(fitted.predictions["test_last_logits"], "multi-class")
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
        assert fitted.result["cost"]["passes_per_row"] == 0

    def test_logistic_is_scikit_learn_s_on_indicators(self) -> None:
        made = splits(TABLE, False)
        fitted = fit(a_run(TABLE), made, methods.build("logistic(c=0.5)"))

        def columns(x: np.ndarray) -> np.ndarray:
            return np.column_stack([np.asarray(coder.transform(x[:, 1::2])), x[:, ::2]])

        train = inputs_of(made.train).numpy()
        coder = OneHotEncoder(handle_unknown="ignore", sparse_output=False).fit(train[:, 1::2])
        theirs = LogisticRegression(C=0.5, max_iter=1000)
        theirs.fit(columns(train), made.train.y.argmax(1).numpy())
        found = metrics.probabilities(fitted.predictions["test_last_logits"], "multi-class")
        expected = theirs.predict_proba(columns(inputs_of(made.test).numpy()))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)

    def test_they_are_no_part_of_a_method(self) -> None:
        for text in ("saflex(upstream=boosting)", "boosting+mixup"):
            with pytest.raises(NamingError, match="boosting takes the steps of a run itself"):
                methods.build(text)
        with pytest.raises(NamingError, match="c: expected a number above 0"):
            methods.build("logistic(c=0.0)")
        with pytest.raises(NotApplicable, match="boosting needs vectors, but the data are images"):
            fit(a_run(method="boosting"), splits(Case(1), False), methods.build("boosting"))


class Ordered(tasks.Scoring):
    """Ordered classes: chosen by kappa, and judged by the mean distance too."""

    name: ClassVar[str] = "ordered"
    selects: ClassVar[str] = "quadratic_kappa"

    def own(self, p: Floats, predicted: Bools, truth: Bools) -> dict[str, float]:
        """Kappa and mean absolute error."""
        given, found = truth.argmax(axis=1), predicted.argmax(axis=1)
        kappa = tasks.measures.quadratic_kappa(found, given)
        return {"quadratic_kappa": kappa, "mae": float(np.abs(given - found).mean())}


class OrderedLosses:
    """The expected squared distance between classes; affine in the target."""

    def losses(self, logits: Tensor, y: Tensor) -> Tensor:
        place = torch.arange(logits.shape[1], device=logits.device, dtype=logits.dtype)
        far = (place[:, None] - place).square()
        return ((logits.softmax(dim=1) @ far) * y).sum(dim=1)

    def labels(self, scores: Tensor, temperature: float = 1.0) -> Tensor:
        return torch.softmax(scores / temperature, dim=1)


@pytest.fixture
def ordered(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(tasks.TASKS, "ordered", Ordered())
    monkeypatch.setitem(losses_of_tasks.TASKS, "ordered", OrderedLosses())
    monkeypatch.setitem(MEASURES, "mae", Measure("MAE", percent=False, lower=True))
    return "ordered"


class TestTasks:
    def test_both_halves_have_the_same_names(self) -> None:
        assert set(tasks.TASKS) == set(losses_of_tasks.TASKS)

    def test_a_third_task(self, ordered: str) -> None:
        """Ordinal, by two classes of a dozen lines: trained, selected, stored and judged by it."""
        made = replace(splits(Case(1), True), kind=ordered)
        wide = torch.arange(240)
        y = F.one_hot(wide % 3, 3).float()
        from benchmarks.data.streams import rows_from_tensors

        made = replace(made, select=rows_from_tensors(torch.rand(240, 1, 8, 8), y))
        run = a_run(epochs=6, learning_rate=0.01)
        fitted = fit(run, made, methods.build("saflex(upstream=flip)"))
        chosen = fitted.result["selection"]
        assert chosen["rule"] == "best select quadratic kappa, ties to the earliest epoch"
        lines = [json.loads(line) for line in fitted.state.metric_lines]
        kappas = [line["select"]["quadratic_kappa"] for line in lines]
        assert chosen["epoch"] == 1 + int(np.argmax(kappas)) and len(set(kappas)) > 1
        stored = fitted.predictions
        scores = metrics.evaluate(stored["test_last_logits"], stored["test_targets"], ordered)
        assert json.loads(runs.to_json(scores)) == json.loads(
            runs.to_json(fitted.result["metrics"]["last"]["test"])
        )
        found = stored["test_last_logits"].argmax(axis=1)
        given = stored["test_targets"]
        assert scores["mae"] == np.abs(found - given).mean()
        expected = cohen_kappa_score(given, found, weights="quadratic")
        assert scores["quadratic_kappa"] == pytest.approx(expected)

    def test_nothing_else_knows_them(self) -> None:
        """No name of a task is compared with anything outside the two halves."""
        names = set(tasks.TASKS)
        halves = {ROOT / "analysis" / "tasks.py", ROOT / "benchmarks" / "training" / "tasks.py"}
        for path in ROOT.glob("*/**/*.py"):
            if path in halves or path.parts[len(ROOT.parts)] not in (
                "analysis", "benchmarks", "methods",
            ):  # fmt: skip
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Compare):
                    sides = [node.left, *node.comparators]
                    found = [each.value for each in sides if isinstance(each, ast.Constant)]
                    assert not names & {str(each) for each in found}, f"{path}:{node.lineno}"

    def test_inputs_are_known_where_they_are_read_or_built(self) -> None:
        """Kinds of inputs are compared only by what reads, shows or takes them."""
        known = re.compile(
            r"""(kind|inputs)\s*(==|!=|in)\s*\(?["'](image|vector|tokens|table)["']"""
        )
        found = set()
        for folder in ("analysis", "benchmarks", "methods"):
            for path in (ROOT / folder).glob("**/*.py"):
                if known.search(path.read_text(encoding="utf-8")):
                    found.add(path.relative_to(ROOT).as_posix())
        assert found <= {"benchmarks/contract.py", "benchmarks/training/networks.py"}


class Unlabelled(Learner):
    """Draws unlabelled rows and remembers what it saw of them; trains on the labelled ones."""

    needs = frozenset({"unlabelled"})

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        self.register_buffer("seen", torch.zeros(ctx.spec.rows, dtype=torch.int64))
        self.poisoned = 0.0

    def step(self, batch: Batch, ctx: Context) -> tuple[Tensor, Batch]:
        assert ctx.unlabelled is not None
        more = ctx.unlabelled.draw(3)
        assert not more.y.any()
        for each in (batch, more):
            self.get_buffer("seen").index_add_(0, each.index, torch.ones_like(each.index))
        return ctx.update(ctx.task.losses(ctx.forward(batch.x), batch.y), batch.w), batch


def test_unlabelled_rows_have_numbers_of_their_own() -> None:
    made = splits(Case(1), True)
    assert made.meta is not None
    blind = replace(made.meta, y=torch.zeros_like(made.meta.y))
    made = replace(made, unlabelled=blind, meta=None)
    rows = len(made.train)
    assert made.spec.rows == rows + len(blind)
    one, other = (fit(a_run(), made, Unlabelled()) for _ in range(2))
    seen = one.method.get_buffer("seen")
    assert seen[:rows].tolist() == [3] * rows and int(seen[rows:].sum()) == 3 * 5 * 3
    assert int((seen[rows:] > 0).sum()) > 10
    same(one, other)
    with pytest.raises(NotApplicable, match="needs unlabelled rows, and these data have none"):
        fit(a_run(), splits(Case(1), False), Unlabelled())


def test_steps_per_epoch() -> None:
    made = splits(Case(1), False)
    assert a_run(steps_per_epoch=0).id == a_run().id != a_run(steps_per_epoch=7).id
    fitted = fit(a_run(epochs=2, steps_per_epoch=7), made, methods.build("none"))
    lines = [json.loads(line) for line in fitted.state.metric_lines]
    assert [line["rows"]["drawn"] for line in lines] == [7 * 8] * 2  # 36 rows; every batch is full
    whole = fit(a_run(epochs=2), made, methods.build("none"))
    lines = [json.loads(line) for line in whole.state.metric_lines]
    assert [line["rows"]["drawn"] for line in lines] == [36] * 2
    with pytest.raises(ValueError, match="steps_per_epoch: expected 0 or more"):
        Training(steps_per_epoch=-1)


def test_short_epochs_are_written_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a run that is asked to stop ends the epoch that it is in, and loses nothing."""
    monkeypatch.setattr(trainer, "WRITE_SECONDS", 60.0)
    made, run = splits(Case(1), False), a_run(epochs=6)
    written: list[int] = []
    real = trainer.write_lines

    def write(folder: Path, state: Any) -> None:
        written.append(state.epoch)
        real(folder, state)

    monkeypatch.setattr(trainer, "write_lines", write)
    (tmp_path / "whole").mkdir()
    (tmp_path / "again").mkdir()
    whole = fit(run, made, methods.build("none"), folder=tmp_path / "whole")
    assert written == [1, 6]
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    assert lines == whole.state.metric_lines and len(lines) == 6
    asked, folder = itertools.count(1), tmp_path / "again"
    with pytest.raises(Interrupted, match="stopped after epoch 4"):  # asked at the 5 steps of the
        fit(run, made, methods.build("none"), folder=folder, stop=lambda: next(asked) >= 9)  # first
    again = fit(run, made, methods.build("none"), folder=folder)
    assert again.state.resumed == 1
    same(again, whole)
