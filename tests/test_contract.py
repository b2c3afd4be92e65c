"""Every registered method keeps the contract."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from torch import Tensor

import methods
from benchmarks.contract import (
    CASES,
    CHECKS,
    LOOKS,
    Case,
    Skipped,
    check,
    looks,
)
from benchmarks.training.errors import TrainingFailed
from methods.base import Batch, Context, Method
from tests.pipelines import OWN

NAMES = [
    *(name for name in methods.BUILTIN if name != "wrap"),
    *OWN,
    "crop+flip+mixup",
    "head_refit(upstream=crop+cutmix)",
    "saflex(upstream=mixup)",
    "saflex(upstream=randaugment)",
    "saflex(preset=stable)",
    "saflex(preset=stable, upstream=mixup)",
    "saflex(preset=fast, upstream=randaugment)",
    "l2rw(upstream=mixup)",
    "random_label(upstream=mixup)",
    "shuffled_weights(upstream=saflex(preset=stable, upstream=randaugment))",
    # A warm-up of 0, as the checks train for an epoch or two.
    "lpa3(warmup=0)",
    "lpa3(preset=strict, warmup=0)",
    "lpa3(preset=fast, refresh=2, warmup=0)",
    "lpa3(auxiliary_norm=true, warmup=0)",
    "norm_noise(upstream=lpa3(preset=fast, warmup=0))",
    "saflex(upstream=lpa3(warmup=0))",
    "saflex(preset=stable, upstream=lpa3(preset=strict, warmup=0))",
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("method", NAMES)
def test_looks(method: str, case: Case) -> None:
    """All checks that one method, set up once, stands one after the other."""
    try:
        looks(lambda: methods.build(method), case)
    except Skipped as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize("name", [name for name in CHECKS if name not in LOOKS])
def test_contract(name: str, method: str, case: Case) -> None:
    reason = check(name, lambda: methods.build(method), case)
    if reason:
        pytest.skip(reason)


def blinded(batch: Batch, ctx: Context) -> Batch:
    ctx.model.eval()
    return batch


FAULTS: dict[str, Callable[[Batch, Context], Batch]] = {
    "model_untouched": blinded,
    "shapes": lambda batch, ctx: replace(batch, index=batch.index.int()),
    "ranges": lambda batch, ctx: replace(batch, x=batch.x + 1),
    "weights": lambda batch, ctx: replace(batch, w=2 * batch.w),
    "mutation": lambda batch, ctx: replace(batch, x=batch.x.mul_(0.5)),
    "elsewhere": lambda batch, ctx: replace(batch, x=batch.x / (batch.index >= 0).any()),
    "gradients": lambda batch, ctx: batch,
}


class Faulty(Method):
    """It breaks what one check is there for."""

    def __init__(self, check: str) -> None:
        super().__init__()
        self.check = check

    def augment(self, batch: Batch, ctx: Context) -> Batch:
        return FAULTS[self.check](batch, ctx)

    def losses(self, logits: Tensor, batch: Batch, ctx: Context) -> Tensor:
        losses = super().losses(logits, batch, ctx)
        return losses.mean() if self.check == "gradients" else losses


@pytest.mark.parametrize("name", LOOKS)
def test_a_fault_is_found_by_its_check_alone_and_among_the_others(name: str) -> None:
    with pytest.raises((AssertionError, TrainingFailed)):
        check(name, lambda: Faulty(name), CASES[0])
    with pytest.raises((AssertionError, TrainingFailed)):
        looks(lambda: Faulty(name), CASES[0])
