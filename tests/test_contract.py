"""Every registered method keeps the contract."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
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
    "frozen(upstream=saflex(upstream=mixup))",
    "frozen(upstream=autodo)",
    "autoaugment(policy=faa_cifar10)",
    "shuffled_policy(upstream=autoaugment(policy=faa_svhn))",
    "saflex(upstream=mixup)",
    "saflex(upstream=randaugment)",
    "saflex(preset=stable)",
    "saflex(preset=stable, upstream=mixup)",
    "saflex(preset=fast, upstream=randaugment)",
    "l2rw(upstream=mixup)",
    "meta_weight_net(upstream=mixup)",
    "frozen(upstream=meta_weight_net)",
    # A warm-up of 0, as the checks train for an epoch or two.
    "lilaw(upstream=mixup, warmup=0)",
    "shuffled_weights(upstream=lilaw(through=false, warmup=0))",
    "random_label(upstream=mixup)",
    "shuffled_weights(upstream=saflex(preset=stable, upstream=randaugment))",
    "lpa3(warmup=0)",
    "lpa3(preset=strict, warmup=0)",
    "lpa3(preset=fast, refresh=2, warmup=0)",
    "lpa3(auxiliary_norm=true, warmup=0)",
    "norm_noise(upstream=lpa3(preset=fast, warmup=0))",
    "isotropic_noise(upstream=isda(upstream=label_smoothing))",
    "isotropic_noise(upstream=bsda(upstream=mixup))",
    "frozen(upstream=bsda(upstream=lpa3(warmup=0)))",
    "saflex(upstream=lpa3(warmup=0))",
    "saflex(preset=stable, upstream=lpa3(preset=strict, warmup=0))",
    "entaugment(entloss=1.0, upstream=crop, warmup=0)",
    "shuffled_strengths(upstream=entaugment(warmup=0))",
    "mean_strength(upstream=sra)",
    "augmix(jsd=false)",
    "augmix(upstream=mixup)",
    "no_consistency(upstream=augmix)",
    "one_chain(upstream=augmix)",
    "saflex(upstream=medaugment)",
    "unconstrained(upstream=medaugment(level=3))",
    "adaaug(preset=exact, upstream=mixup)",
    "madaug(preset=exact, upstream=crop)",
    "shuffled_policies(upstream=madaug)",
    "fixmatch(mu=1, attack=lpa3(warmup=0))",
    "fixmatch(mu=1, attack=lpa3(preset=fast, warmup=0), attack_sure=true)",
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
@pytest.mark.parametrize("name", [name for name in CHECKS if name not in (*LOOKS, "waits")])
def test_contract(name: str, method: str, case: Case) -> None:
    reason = check(name, lambda: methods.build(method), case)
    if reason:
        pytest.skip(reason)


@pytest.mark.parametrize(
    "method",
    [
        *NAMES,
        "autodo(preset=exact)",
        "l2rw(derivative=difference)",
        "meta_weight_net(derivative=difference, precondition=true)",
    ],
)
@pytest.mark.parametrize("case", [Case(3), Case(6, inputs="table")], ids=str)
def test_no_step_waits_for_the_device(method: str, case: Case) -> None:
    reason = check("waits", lambda: methods.build(method), case)
    if reason:
        pytest.skip(reason)


def test_what_waits_for_the_device_says_so() -> None:
    said = {name for name in NAMES if any(part.waits for part in build_or_none(name))}
    wraps = {name for name in NAMES if name.startswith("wrap(")}
    stored = {"lpa3(preset=fast, refresh=2, warmup=0)", "fixmatch(mu=1, attack=lpa3(warmup=0))"}
    assert said == {*wraps, *stored}


def build_or_none(name: str) -> list[Method]:
    """The parts of a method; none where its name lacks an upstream that it needs."""
    try:
        return list(methods.build(name).parts())
    except ValueError:
        return []


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


WAITING: dict[str, Callable[[Batch], object]] = {
    "item": lambda batch: float(batch.w[0]),
    "condition": lambda batch: 1 if (batch.w > 0).all() else 0,
    "list": lambda batch: batch.y.tolist(),
    "copy from it": lambda batch: batch.x.cpu(),
    "copy to it": lambda batch: torch.ones(3).to(batch.x.device),
    "nonzero": lambda batch: (batch.index >= 0).nonzero(),
    "mask": lambda batch: batch.x[batch.index >= 0],
}


class Waiting(Method):
    """It does something at every step that waits for the device."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def augment(self, batch: Batch, ctx: Context) -> Batch:
        WAITING[self.what](batch)
        return batch


@pytest.mark.parametrize("what", WAITING)
def test_waiting_is_found_unless_it_is_declared(what: str) -> None:
    class Declared(Waiting):
        waits = "it is what this test is about"

    with pytest.raises(AssertionError, match="waits for the device"):
        check("waits", lambda: Waiting(what), CASES[0])
    assert check("waits", lambda: Declared(what), CASES[0]) == ""


def test_a_declaration_without_need_is_found() -> None:
    class Declared(Method):
        waits = "it never does"

        def augment(self, batch: Batch, ctx: Context) -> Batch:
            return batch

    with pytest.raises(AssertionError, match="no step waits"):
        check("waits", Declared, CASES[0])


@pytest.mark.parametrize("name", LOOKS)
def test_a_fault_is_found_by_its_check_alone_and_among_the_others(name: str) -> None:
    with pytest.raises((AssertionError, TrainingFailed)):
        check(name, lambda: Faulty(name), CASES[0])
    with pytest.raises((AssertionError, TrainingFailed)):
        looks(lambda: Faulty(name), CASES[0])
