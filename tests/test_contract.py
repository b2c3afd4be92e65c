"""Every registered method keeps the contract."""

import pytest

import methods
from benchmarks.contract import (
    CASES,
    CHECKS,
    Case,
    check,
)

NAMES = [
    *methods.BUILTIN,
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
@pytest.mark.parametrize("name", CHECKS)
def test_contract(name: str, method: str, case: Case) -> None:
    reason = check(name, lambda: methods.build(method), case)
    if reason:
        pytest.skip(reason)
