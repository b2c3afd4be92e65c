"""Control rows: what keeps everything of a method except what it learns."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import methods
from analysis.runs import Run, Training
from benchmarks.contract import Case, splits
from benchmarks.data.names import parse_benchmark
from benchmarks.data.splits import Protocol, arrays_of, make_splits
from benchmarks.studies.cells import Row, control_rows
from benchmarks.training.tasks import MultiClass
from benchmarks.training.trainer import Fitted, fit
from methods.base import Spec

DIGITS = parse_benchmark("digits(rows_per_class=20)")
EQUAL = Protocol()


def trained(row: str, epochs: int = 3) -> Fitted:
    """A run of a row such as ``crop@train`` on 200 digits."""
    method, _, control = row.partition("@")
    built = methods.build(method)
    given: Any = {"control": control or "all", "needs_meta": "meta" in built.requires()}
    arrays, cpu = arrays_of(DIGITS, Path()), torch.device("cpu")
    data = make_splits(arrays, DIGITS, EQUAL, seed=0, device=cpu, **given)
    run = Run(
        benchmark="digits", data="c", model="small_cnn(width=0.25)", method=method,
        training=Training(epochs=epochs, batch_size=32),
    )  # fmt: skip
    return fit(run, data, built)


def logits(fitted: Fitted) -> np.ndarray:
    return fitted.predictions["test_last_logits"]


def test_saflex_that_never_learns_is_its_upstream_on_the_same_rows() -> None:
    """Bit for bit, if no clean rows bypass the upstream."""
    frozen = trained("frozen(upstream=saflex(clean_fraction=0.0, upstream=crop))")
    assert (logits(frozen) == logits(trained("crop@train"))).all()
    assert (logits(frozen) != logits(trained("crop"))).any(), "meta rows are set aside"
    assert (frozen.method.learned()["weight"].unique() == 1).all()
    assert (logits(frozen) != logits(trained("saflex(clean_fraction=0.0, upstream=crop)"))).any()


def test_autodo_that_never_learns_is_its_start() -> None:
    frozen, late = trained("frozen(upstream=autodo)"), trained("autodo(start=3)")
    assert (logits(frozen) == logits(late)).all(), "as if the outer phase came after the last epoch"
    found = frozen.method.learned()
    assert float((found["probability"] - 0.25).abs().max()) < 1e-6
    assert (found["magnitude"] == 0.5).all() and float((found["weight"] - 1).abs().max()) < 1e-6
    assert (logits(frozen) != logits(trained("autodo"))).any()


def test_the_warps_of_autodo_alone_are_its_start_without_its_loss() -> None:
    row = "frozen(upstream=autodo(label=false, symmetric=never, weight=false))"
    assert np.allclose(logits(trained(row)), logits(trained("warp@train")), atol=1e-4)


@pytest.mark.parametrize("name", ["random_label", "self_distil"])
def test_labels_without_learning_train_on_the_rows_of_the_method(name: str) -> None:
    """By construction: the meta rows are set aside, whoever writes the row."""
    assert "meta" in methods.build(f"{name}(upstream=crop)").requires()
    ours = trained(f"{name}(upstream=crop, clean_fraction=0.0)", 1).result["cost"]["rows"]["drawn"]
    assert ours == trained("saflex(upstream=crop)", 1).result["cost"]["rows"]["drawn"]


CONTROLS = {
    "saflex(upstream=crop)": [
        "frozen(upstream=saflex(upstream=crop))",
        "shuffled_weights(upstream=saflex(upstream=crop))",
        "random_label(upstream=crop)",
        "head_refit(upstream=frozen(upstream=saflex(upstream=crop)))",
    ],
    "saflex(preset=stable)": [
        "frozen(upstream=saflex(clean_fraction=0.0))",
        "shuffled_weights(upstream=saflex(preset=stable))",
        "self_distil(clean_fraction=0.0)",
        "head_refit(upstream=frozen(upstream=saflex(clean_fraction=0.0)))",
    ],
    "saflex(labels=keep)": [
        "frozen(upstream=saflex)",
        "shuffled_weights(upstream=saflex(labels=keep))",
        "head_refit(upstream=frozen(upstream=saflex))",
    ],
    "saflex(weights=one)": [
        "frozen(upstream=saflex)",
        "random_label",
        "head_refit(upstream=frozen(upstream=saflex))",
    ],
    "l2rw(upstream=mixup)": [
        "frozen(upstream=saflex(clean_fraction=0.0, upstream=mixup))",
        "shuffled_weights(upstream=l2rw(upstream=mixup))",
        "head_refit(upstream=frozen(upstream=saflex(clean_fraction=0.0, upstream=mixup)))",
    ],
    "meta_weight_net(learning_rate=0.01, hidden=50, upstream=crop)": [
        "frozen(upstream=meta_weight_net(hidden=50, upstream=crop))",
        "shuffled_weights(upstream=meta_weight_net(hidden=50, learning_rate=0.01, upstream=crop))",
        "head_refit(upstream=frozen(upstream=meta_weight_net(hidden=50, upstream=crop)))",
    ],
    "lilaw(learning_rate=0.01)": [
        "frozen(upstream=lilaw)",
        "shuffled_weights(upstream=lilaw(learning_rate=0.01))",
        "head_refit(upstream=frozen(upstream=lilaw))",
    ],
    "autodo(preset=exact)": [
        "frozen(upstream=autodo)",
        "shuffled_weights(upstream=autodo(preset=exact))",
        "head_refit(upstream=frozen(upstream=autodo))",
    ],
    "autodo(shared=true, weight=false, upstream=flip)": [
        "frozen(upstream=autodo(shared=true, upstream=flip, weight=false))",
        "head_refit(upstream=frozen(upstream=autodo(shared=true, upstream=flip, weight=false)))",
    ],
    "adaaug(preset=exact)": [
        "frozen(upstream=adaaug)",
        "shuffled_policies(upstream=adaaug(preset=exact))",
        "head_refit(upstream=frozen(upstream=adaaug))",
    ],
    "madaug(alpha=0.5, tau=0.2, n=1, upstream=crop)": [
        "frozen(upstream=madaug(n=1, tau=0.2, upstream=crop))",
        "shuffled_policies(upstream=madaug(alpha=0.5, n=1, tau=0.2, upstream=crop))",
        "head_refit(upstream=frozen(upstream=madaug(n=1, tau=0.2, upstream=crop)))",
    ],
    "lpa3(warmup=1)": ["norm_noise(upstream=lpa3(warmup=1))"],
    "isda(upstream=crop)": ["isotropic_noise(upstream=isda(upstream=crop))"],
    "bsda": ["frozen(upstream=bsda)", "isotropic_noise(upstream=bsda)"],
    "crop+mixup": [],
    "crop+lpa3(warmup=1)": ["crop+norm_noise(upstream=lpa3(warmup=1))"],
    "frozen(upstream=autodo)": [],
}


@pytest.mark.parametrize(("row", "expected"), CONTROLS.items())
def test_what_a_method_declares(row: str, expected: list[str]) -> None:
    assert list(methods.controls_of(methods.canonical(row))) == expected
    assert {control.method for control in control_rows([Row(row)], DIGITS, EQUAL)} >= {*expected}


def test_without_learning_controls_only_those_for_labels_are_added() -> None:
    rows = [Row("autodo")]
    added = control_rows(rows, DIGITS, EQUAL, learning=False)
    assert added == [Row("none"), Row("none", "train")]
    assert set(control_rows(rows, DIGITS, EQUAL)) - set(added) == {
        Row(name) for name in CONTROLS["autodo(preset=exact)"][::2]
    } | {Row("shuffled_weights(upstream=autodo)")}


@pytest.mark.parametrize("row", ["frozen", "frozen(upstream=crop)", "frozen(upstream=lpa3)"])
def test_what_has_no_start_cannot_be_frozen(row: str) -> None:
    spec = Spec(rows=9, classes=3, shape=(1, 8, 8))
    reason = methods.build(row).supports(MultiClass(), spec)
    assert reason.startswith("frozen needs upstream=, a method that learns")


def test_a_method_is_frozen_only_inside_its_control() -> None:
    assert methods.build("frozen(upstream=autodo)").upstream.frozen  # type: ignore[union-attr]
    assert not methods.build("autodo").frozen


def test_frozen_rows_of_several_labels_keep_them() -> None:
    method = methods.build("frozen(upstream=saflex(clean_fraction=0.0))")
    run = Run(
        benchmark="digits", data="c", model="small_cnn(width=0.25)", method="so",
        training=Training(epochs=1, batch_size=8),
    )  # fmt: skip
    fit(run, splits(Case(1, "multi-label"), meta=True), method)
    found = method.learned()
    seen = found["seen"] > 0
    made = splits(Case(1, "multi-label"), meta=True)
    assert torch.allclose(found["label"][seen], made.train.y[seen])
