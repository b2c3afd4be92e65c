"""What must hold on a GPU: ``pytest -m gpu``; where a test can, it also runs on the CPU in float32.

The truth of each comparison is float64 on the CPU.
"""

import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import methods
from analysis import runs
from analysis.runs import Run, Training
from benchmarks.cli import main
from benchmarks.contract import CHECKS, LOOKS, Case, Skipped, check, looks, splits
from benchmarks.running import local
from benchmarks.training import models
from benchmarks.training.errors import Interrupted
from benchmarks.training.tasks import MultiClass
from benchmarks.training.trainer import Fitted, fit
from methods.base import Model, Spec
from methods.functional import directional
from methods.implicit import Head, answers, series
from methods.lpa3 import Reference, judge, likelihood, look
from methods.saflex import Scores, score
from tests import sweeping
from tests.test_contract import NAMES

BOTH = [pytest.param("cpu"), pytest.param("gpu", marks=pytest.mark.gpu)]
MODEL = "resnet18(width=0.125, activation=celu)"
SPEC = Spec(rows=16, classes=5, shape=(3, 16, 16))


def gpu() -> str:
    """The GPU of this machine, without which the test is skipped."""
    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available():
        return "mps"
    pytest.skip("needs a GPU: neither CUDA nor MPS is available")


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    """Where a test runs; on a GPU algorithms of cuDNN repeat bit for bit, without TF32."""
    name = gpu() if getattr(request, "param", "gpu") == "gpu" else "cpu"
    backend: Any = torch.backends.cudnn
    before = backend.deterministic, backend.allow_tf32
    backend.deterministic, backend.allow_tf32 = True, False
    request.addfinalizer(lambda: setattr(backend, "deterministic", before[0]))
    request.addfinalizer(lambda: setattr(backend, "allow_tf32", before[1]))
    return name


@pytest.mark.gpu
@pytest.mark.parametrize("method", NAMES)
def test_every_method_keeps_the_contract(method: str, device: str) -> None:
    case = Case(3, device=device)

    def make() -> methods.Method:
        return methods.build(method)

    try:
        looks(make, case)
    except Skipped as reason:
        pytest.skip(str(reason))
    for name in CHECKS:
        if name not in LOOKS:
            assert check(name, make, case) == ""


# --- one oracle of each method --------------------------------------------------------------------


def images(rows: int, seed: int = 1) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.rand(rows, *SPEC.shape, generator=rng, dtype=torch.float64)


def targets(rows: int) -> Tensor:
    return F.one_hot(torch.arange(rows) % SPEC.classes, SPEC.classes).double()


def network(training: bool) -> Model:
    """In float64, after some steps of training, so that its gradients are not those of a start."""
    torch.manual_seed(0)
    model = models.build(MODEL, SPEC).double().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    x, y = images(32, seed=0), targets(32)
    for _ in range(3):
        optimizer.zero_grad()
        MultiClass().losses(model(x), y).mean().backward()
        optimizer.step()
    optimizer.zero_grad()
    return cast("Model", model.train(training))


def off(found: Tensor, true: Tensor) -> float:
    """The norm of the difference over the norm."""
    return float((found.cpu().double() - true).norm() / true.norm())


def there(device: str) -> Callable[[Tensor], Tensor]:
    """Sends a tensor to the device, in float32."""
    return lambda x: x.to(device, torch.float32)


def scores(model: Model, send: Callable[[Tensor], Tensor], how: Any) -> tuple[Tensor, Scores]:
    """The slope along the meta gradient, and SAFLEX's scores of a batch."""
    x, y, meta_x, meta_y = map(send, (images(16), targets(16), images(24, seed=2), targets(24)))
    task, other = MultiClass(), copy.deepcopy(model)
    named = dict(other.named_parameters())
    loss = task.losses(other(meta_x), meta_y).mean()
    found = torch.autograd.grad(loss, list(named.values()))
    tangent = dict(zip(named, found, strict=True))
    logits, slope = directional(model, x, tangent, how=how)
    return slope, score(task, logits, slope, y)


@pytest.mark.parametrize("device", BOTH, indirect=True)
@pytest.mark.parametrize(("how", "limit"), [("dual", 1e-4), ("difference", 0.02)])
def test_saflex_scores(how: str, limit: float, device: str) -> None:
    """A difference of norm 1e-3 keeps fewer digits of float32, but the order of its scores."""
    model = network(training=True)
    slope, true = scores(model, lambda x: x, "dual")
    rough, found = scores(cast("Model", model.to(device, torch.float32)), there(device), how)
    assert off(rough, slope) < limit
    assert off(found.labels, true.labels) < limit and off(found.gain, true.gain) < limit
    assert torch.equal((found.gain > 0).cpu(), true.gain > 0)


@pytest.mark.parametrize("device", BOTH, indirect=True)
def test_autodo_hypergradient(device: str) -> None:
    model = network(training=False)
    rng = torch.Generator().manual_seed(3)
    c, wrong = torch.rand(16, generator=rng).double(), torch.randn(16, 5, generator=rng).double()

    def hypergradient(model: Model, send: Callable[[Tensor], Tensor]) -> list[Tensor]:
        with torch.no_grad():
            h = model.embed(model.features(send(images(16))))
            meta = model.embed(model.features(send(images(24, seed=2))))
        head = cast("nn.Linear", model.head)
        log_p = head(meta).log_softmax(dim=1)
        (v,) = torch.autograd.grad(-(send(targets(24)) * log_p).sum(dim=1).mean(), head.weight)
        problem = Head(
            h=h,
            c=send(c / c.sum()),
            log_p=head(h).detach().log_softmax(dim=1),
            log_s=send(wrong).log_softmax(dim=1),
            decay=0.01,
        )
        solved = series(problem, v, 5, 0.05)
        return list(answers(problem, head.weight.detach(), solved))

    true = hypergradient(model, lambda x: x)
    found = hypergradient(cast("Model", model.to(device, torch.float32)), there(device))
    for one, other in zip(found, true, strict=True):
        assert off(one, other) < 1e-4


@pytest.mark.parametrize("device", BOTH, indirect=True)
def test_lpa3_margin_and_distance(device: str) -> None:
    model = network(training=False)
    x, y = images(16), targets(16)
    far = (x + 0.2 * (images(16, seed=4) - 0.5)).clamp(0, 1)

    @torch.no_grad()
    def judged(model: Model, send: Callable[[Tensor], Tensor]) -> list[Tensor]:
        seen = look(model, send(x))
        known = Reference(seen.phi, send(y), likelihood(seen.logits, send(y), True), seen.logits)
        return list(judge(look(model, send(far)), known, 0.001, True))

    true = judged(model, lambda x: x)
    found = judged(cast("Model", model.to(device, torch.float32)), there(device))
    assert bool((true[1] > 0).any()) and bool((true[1] < 0).any()), "on both sides of the margin"
    assert off(found[0], true[0]) < 1e-4 and off(found[1], true[1]) < 1e-3
    assert torch.equal(found[2].cpu(), true[2])


# --- runs -----------------------------------------------------------------------------------------


def trained(method: str, device: str, folder: Path, steps: int | None = None) -> Fitted:
    """A run of three epochs; with ``steps`` it is interrupted after so many."""
    left = iter(range(steps if steps is not None else 10**9))
    training = Training(epochs=3, batch_size=12)
    run = Run(benchmark="contract", data="", model="small_cnn(width=0.25)", method=method,
              training=training)  # fmt: skip
    made = methods.build(method)
    rows = splits(Case(3, device=device), "meta" in made.requires())
    return fit(run, rows, made, device=device, folder=folder, stop=lambda: next(left, None) is None)


@pytest.mark.parametrize("device", BOTH, indirect=True)
@pytest.mark.parametrize("method", ["randaugment", "autodo", "saflex(preset=stable)"])
def test_a_run_that_resumes_ends_as_an_undisturbed_one(
    method: str, device: str, tmp_path: Path
) -> None:
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    whole = trained(method, device, tmp_path / "whole")
    with pytest.raises(Interrupted):
        trained(method, device, tmp_path / "cut", steps=4)
    cut = trained(method, device, tmp_path / "cut")
    assert cut.result["resumed"] == 1
    one, other = (each.predictions["test_last_logits"] for each in (whole, cut))
    if device == "cpu":
        assert np.array_equal(one, other)
    else:  # some sums of a GPU come in another order each time
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_cost_is_that_of_the_gpu(device: str, tmp_path: Path) -> None:
    if device != "cuda":
        pytest.skip("events and peaks are CUDA's")
    begun = time.perf_counter()
    fitted = trained("randaugment", device, tmp_path)
    whole = time.perf_counter() - begun
    weights = sum(each.numel() * each.element_size() for each in fitted.model.parameters())
    cost = fitted.result["cost"]
    assert 3 * weights < cost["memory_mib"] * 2**20 <= torch.cuda.max_memory_allocated()
    for phase in ("data", "augment", "forward", "backward"):
        assert cost["phases"][phase] > 0
    assert 0 < cost["charged_seconds"] < whole
    assert fitted.result["device"]["name"] == torch.cuda.get_device_name()


HUNGRY = """
import torch
from torch import nn


class Hungry(nn.Module):
    def __init__(self, spec):
        super().__init__()
        self.head = nn.Linear(spec.shape[0] * spec.shape[1] * spec.shape[2], spec.classes)

    def forward(self, x):
        if self.training:
            x = x + torch.empty(1 << 48, device=x.device)[0]
        return self.head(x.flatten(1))
"""
STUDY = """
benchmarks: npz:{npz}
models: ["py:hungry:Hungry", small_cnn(width=0.25)]
methods: none
seeds: 1
training: {{epochs: 1, batch_size: 8}}
retries: 0
tensorboard: false
"""


@pytest.mark.parametrize("device", BOTH, indirect=True)
def test_no_memory_fails_one_run_and_not_the_sweep(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "mps":
        pytest.skip("a sweep does not use MPS")
    rng, arrays = np.random.default_rng(0), {}
    for split in ("train", "val", "test"):
        arrays[f"{split}_images"] = rng.integers(0, 255, (40, 8, 8), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.arange(40) % 2
    np.savez(tmp_path / "data.npz", **arrays)
    (tmp_path / "hungry.py").write_text(HUNGRY)
    (tmp_path / "study.yaml").write_text(STUDY.format(npz=tmp_path / "data.npz"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(local.Processes, "carry_out", sweeping.carry_out_here)
    on = ["--set", "resources.gpus=0"] if device == "cpu" else []
    given = ["sweep", "study.yaml", "--executor", "local", "--out", "out", *on]
    assert main.run(given) == 1
    out = tmp_path / "out"
    states = sweeping.statuses(out)
    assert states == {"py:hungry:Hungry none 0": "failed", "small_cnn(width=0.25) none 0": "done"}
    results = [json.loads((each / "result.json").read_text()) for each in runs.folders(out)]
    (reason,) = [each["reason"] for each in results if each["status"] == "failed"]
    assert "memory" in reason
    (done,) = [each for each in results if each["status"] == "done"]
    assert done["device"]["type"] == device
