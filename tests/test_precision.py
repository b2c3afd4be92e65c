"""Each precision of a run, with the TF32 of a GPU emulated on the CPU."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from analysis.runs import Run, Training
from benchmarks.contract import Case, splits
from benchmarks.studies import cells
from benchmarks.training import models, precision
from benchmarks.training.context import TrainingContext
from benchmarks.training.errors import Interrupted
from benchmarks.training.tasks import task_of
from benchmarks.training.trainer import Fitted, fit, make_optimizer, train_step
from methods import build
from methods.learner import learner_of
from methods.naming import NamingError

aten = torch.ops.aten
PRODUCTS: dict[Any, Any] = {
    aten.mm.default: torch.backends.cuda.matmul,
    aten.addmm.default: torch.backends.cuda.matmul,
    aten.bmm.default: torch.backends.cuda.matmul,
    aten.convolution.default: torch.backends.cudnn,
    aten.convolution_backward.default: torch.backends.cudnn,
}
"""What a GPU may compute in TF32, and the switch that allows it."""


def rounded(x: Tensor) -> Tensor:
    """Float32 with the 10 bits of mantissa that TF32 keeps, to the nearest."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + (1 << 12)) & ~((1 << 13) - 1)).view(torch.float32)


class Gpu(TorchDispatchMode):
    """Products round their inputs as a GPU does where its switch allows TF32."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        switch = PRODUCTS.get(func)
        if switch is not None and switch.allow_tf32:
            args = tuple(
                rounded(each) if isinstance(each, Tensor) and each.dtype == torch.float32 else each
                for each in args
            )
        return func(*args, **(kwargs or {}))


def trained(method: str, epochs: int = 2, **training: Any) -> Fitted:
    run = Run(
        benchmark="contract",
        data="",
        model="small_cnn(width=0.25)",
        method=method,
        training=Training(epochs=epochs, batch_size=12, **training),
    )
    made = build(method)
    return fit(run, splits(Case(3), "meta" in made.needs), made)


def weights(fitted: Fitted) -> Tensor:
    return torch.cat([each.detach().flatten() for each in fitted.model.parameters()])


LEARNED = [
    "saflex(preset=stable)",
    "saflex(upstream=mixup)",
    "saflex(preset=fast)",
    "l2rw",
    "meta_weight_net",
    "lilaw",
    "autodo",
    "autodo(preset=exact)",
    "lpa3(warmup=0)",
    "lpa3(preset=strict, warmup=0)",
]


@pytest.fixture(autouse=True)
def as_torch_begins() -> Any:
    """On a GPU, torch allows TF32 in convolutions unless it is told otherwise."""
    with precision.tf32(False):
        torch.backends.cudnn.allow_tf32 = True
        yield


def test_the_emulation_rounds_what_it_should() -> None:
    x = torch.tensor([1 + 2**-10, 1 + 2**-11 + 2**-20, 1 + 2**-12, -3.0])
    assert rounded(x).tolist() == [1 + 2**-10, 1 + 2**-10, 1.0, -3.0]
    a = torch.rand(8, 8)
    with Gpu(), precision.tf32(True):
        product = a @ a
    assert torch.equal(product, rounded(a) @ rounded(a))
    assert not torch.equal(product, a @ a)


@pytest.mark.parametrize("method", ["none", *LEARNED])
def test_float32_means_it(method: str) -> None:
    with Gpu():
        emulated = trained(method)
    with Gpu(), precision.tf32(False):
        exact = trained(method)
    assert torch.equal(weights(emulated), weights(exact))
    assert torch.backends.cudnn.allow_tf32, "what the process had set before is left as it was"


def test_tf32_is_in_forward_and_backward() -> None:
    with Gpu():
        emulated = trained("none", precision="tf32")
    exact = trained("none")
    assert not torch.equal(weights(emulated), weights(exact))
    torch.testing.assert_close(weights(emulated), weights(exact), rtol=0, atol=0.02)


class Bench:
    """A network, a method before it, and one batch."""

    def __init__(self, method: str, kind: str, model: str) -> None:
        self.method = build(method)
        data = splits(Case(3), "meta" in self.method.needs)
        torch.manual_seed(0)
        network = models.build(model, data.spec, self.method.requires())
        training = Training(epochs=4, batch_size=12, precision=kind)  # type: ignore[arg-type]
        self.rows = data.train
        self.ctx = TrainingContext.of_splits(
            network, make_optimizer(network, training), task_of(data.kind), data,
            epochs=4, seed=0, training=training,
        )  # fmt: skip
        with self.ctx.charged("setup"):
            self.method.setup(self.ctx)
        network.train()

    def step(self, place: int) -> tuple[Tensor, Tensor, Tensor]:
        """What a step trains on: inputs, targets and weights of its rows."""
        self.ctx.step = place
        if place % 3 == 0:
            self.ctx.epoch = place // 3
            with self.ctx.charged("begin_epoch"):
                self.method.begin_epoch(self.ctx)
        index = torch.arange(12) + place % 3
        _, out = train_step(learner_of(self.method), self.ctx, self.rows, index)
        return out.x.detach(), out.y.detach(), out.w.detach()


def paired(method: str, model: str, leave: bool = False) -> list[tuple[Tensor, Tensor]]:
    """Of the first step and of one after training: what a TF32 run trains on, and a float32 run.

    Both begin from the same network; before the later step the second takes over the weights and
    the state of the first. ``leave`` leaves TF32 on all the time.
    """
    one, other = Bench(method, "tf32", model), Bench(method, "float32", model)
    found: list[tuple[Tensor, Tensor]] = []
    for place in range(7):
        if place:
            # An optimiser takes over the tensors of a state themselves, not copies of them.
            for part in ("model", "optimizer"):
                state = copy.deepcopy(getattr(one.ctx, part).state_dict())
                getattr(other.ctx, part).load_state_dict(state)
            other.method.load_state_dict(one.method.state_dict())
        with Gpu(), precision.tf32(leave):
            taken = one.step(place)
        with Gpu(), precision.tf32(False):
            exact = other.step(place)
        if place in (0, 6):
            found += list(zip(taken, exact, strict=True))
    return found


@pytest.mark.parametrize(
    "model",
    ["resnet18(width=0.125)", pytest.param("resnet18", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("method", LEARNED)
def test_what_a_method_computes_is_float32_in_a_tf32_run(method: str, model: str) -> None:
    for taken, exact in paired(method, model):
        torch.testing.assert_close(taken, exact, rtol=1e-4, atol=1e-5)


def test_left_on_tf32_would_ruin_a_difference() -> None:
    method = "saflex(preset=stable, derivative=difference)"
    pairs = paired(method, "resnet18(width=0.125)", leave=True)
    assert max(float((taken - exact).abs().max()) for taken, exact in pairs) > 1e-3


class TestFloat16:
    def test_it_trains_in_scaled_float16(self) -> None:
        fitted = trained("none", precision="float16")
        exact = trained("none")
        assert not torch.equal(weights(fitted), weights(exact))
        torch.testing.assert_close(weights(fitted), weights(exact), rtol=0, atol=0.05)
        logs = [json.loads(line)["log"] for line in fitted.state.metric_lines]
        assert [log["steps_skipped"] for log in logs] == [0, 0]

    def test_a_step_whose_gradients_overflow_is_not_taken(self) -> None:
        arithmetic = precision.Arithmetic("float16", torch.device("cpu"))
        weight = torch.nn.Parameter(torch.ones(2))
        optimizer = torch.optim.SGD([weight], lr=1.0)
        arithmetic.backward(weight.sum() * torch.tensor(1e38))
        assert arithmetic.update(optimizer) == 1
        assert weight.tolist() == [1, 1]
        scale = arithmetic.state_dict()["scale"]
        assert scale == 2**15
        optimizer.zero_grad()
        arithmetic.backward(weight.sum())
        assert arithmetic.update(optimizer) == 0
        assert weight.tolist() == [0, 0]

    def test_it_resumes_bit_for_bit(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(precision, "GROWTH", 2)  # the scale changes within an epoch
        run = Run(
            benchmark="contract", data="", model="small_cnn(width=0.25)", method="mixup",
            training=Training(epochs=3, batch_size=12, precision="float16"),
        )  # fmt: skip
        data = splits(Case(3), False)
        whole = fit(run, data, build("mixup"))
        asked = 0

        def stop() -> bool:
            nonlocal asked
            asked += 1
            return asked > 5

        with pytest.raises(Interrupted):
            fit(run, data, build("mixup"), folder=tmp_path, stop=stop)
        resumed = fit(run, data, build("mixup"), folder=tmp_path)
        assert resumed.result["resumed"] == 1
        assert torch.equal(weights(resumed), weights(whole))


def test_auto_is_what_this_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    def made() -> str:
        return cells.training_of("medmnist", {"precision": "auto"}).precision

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert made() == "float32"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, kind in (((9, 0), "bfloat16"), ((8, 0), "bfloat16"), ((7, 5), "float16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda which=capability: which)
        assert made() == kind
    with pytest.raises(NamingError, match="precision"):
        cells.training_of("medmnist", {"precision": "float8"})
