"""Modules from tensor to tensor draw and compute what the methods of the same names do."""

import inspect
import math
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from torch import Tensor, nn

import methods
from methods import transforms
from methods.base import Batch, Context

MODULES = {
    "randaugment": transforms.RandAugment,
    "trivialaugment": transforms.TrivialAugment,
    "autoaugment": transforms.AutoAugment,
    "crop": transforms.Crop,
}
GIVEN: dict[str, dict[str, Any]] = {
    "randaugment": {"n": 3, "m": 20, "ops": "colour"},
    "trivialaugment": {"space": "standard", "interpolation": "bilinear"},
    "autoaugment": {"policy": "svhn"},
    "crop": {"pad": 2, "mode": "reflect"},
}


def images(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def by_the_method(name: str, x: Tensor) -> Tensor:
    batch = Batch(x, torch.zeros(len(x), 2), torch.ones(len(x)), torch.arange(len(x)))
    torch.manual_seed(1)
    return methods.build(name).augment(batch, cast("Context", None)).x


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", MODULES)
def test_it_draws_what_the_method_draws(name: str, channels: int) -> None:
    x = images(16, channels, 12, 12)
    for arguments in ({}, GIVEN[name]):
        module = MODULES[name](**arguments)
        torch.manual_seed(1)
        out = module(x)
        assert torch.equal(out, by_the_method(module.name, x)) and not torch.equal(out, x)
    assert torch.equal(x, images(16, channels, 12, 12))


@pytest.mark.parametrize("name", MODULES)
def test_it_takes_what_the_method_takes(name: str) -> None:
    def arguments(made: Any) -> dict[str, Any]:
        found = inspect.signature(made).parameters.values()
        return {each.name: each.default for each in found}

    assert arguments(MODULES[name]) == arguments(methods.load(name))


@pytest.mark.parametrize("name", MODULES)
def test_levels_go_in_and_out(name: str) -> None:
    module = MODULES[name]()
    levels = (images(8, 3, 10, 10) * 255).round().to(torch.uint8)
    out = []
    for x in (levels, levels / 255):
        torch.manual_seed(2)
        out.append(module(x))
    assert out[0].dtype == torch.uint8 and out[1].dtype == torch.float32
    assert torch.equal(out[0], (out[1] * 255).round().to(torch.uint8))


@pytest.mark.parametrize("name", MODULES)
def test_a_single_image_is_a_batch_of_one(name: str) -> None:
    module, x = MODULES[name](), images(3, 10, 10)
    torch.manual_seed(3)
    alone = module(x)
    torch.manual_seed(3)
    assert torch.equal(alone, module(x[None])[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_dtype_stays(dtype: torch.dtype) -> None:
    x = images(4, 1, 8, 8).to(dtype)
    assert transforms.RandAugment()(x).dtype == dtype


def test_memory_format_and_gradients_do_not_matter() -> None:
    x, module = images(6, 3, 9, 9), transforms.TrivialAugment()
    torch.manual_seed(4)
    plain = module(x)
    torch.manual_seed(4)
    other = module(x.to(memory_format=torch.channels_last).requires_grad_())
    assert torch.equal(plain, other) and not other.requires_grad


class Twice(nn.Module):
    """Two draws for the same images; its weight makes a compiler trace a backward pass too."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.weight * self.module(x), self.weight * self.module(x)


@pytest.mark.parametrize("name", MODULES)
def test_compiled_into_one_graph_it_draws_the_same(name: str) -> None:
    module, x = Twice(MODULES[name]()), images(32, 3, 10, 10)
    x = x.to(memory_format=torch.channels_last)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    found = []
    for each in (module, compiled):
        torch.manual_seed(5)
        found.append(each(x))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert not torch.equal(*found[1])  # the two calls are not merged into one


def test_it_can_be_pickled() -> None:  # as a DataLoader sends it to its workers
    module = pickle.loads(pickle.dumps(transforms.RandAugment(m=5)))
    assert str(module) == "RandAugment(randaugment(m=5))"


@pytest.mark.parametrize(
    ("x", "told"),
    [
        (torch.zeros(2, 3, 4, 4, dtype=torch.int64), "uint8 or floating point, got torch.int64"),
        (torch.zeros(4, 4), r"got \(4, 4\)"),
        (torch.zeros(2, 4, 4, 3), r"got \(2, 4, 4, 3\); channels come first"),
        (torch.full((1, 4, 4), 255.0), "got 255 to 255; augment before you normalise"),
        (torch.full((1, 4, 4), -0.5), "got -0.5 to -0.5"),
        (torch.full((1, 4, 4), float("nan")), "got nan to nan"),
    ],
)
def test_what_is_no_image_is_refused(x: Tensor, told: str) -> None:
    with pytest.raises((TypeError, ValueError), match=told):
        transforms.Crop(pad=1)(x)


def test_a_wrong_argument_is_refused_as_by_the_method() -> None:
    with pytest.raises(ValueError, match="from 0 to 30, got 31"):
        transforms.RandAugment(m=31)


def test_entaugment_is_as_strong_as_the_method_with_these_strengths() -> None:
    x, strength = images(40, 3, 12, 12), images(40) * 1.2 - 0.1
    made, module = methods.build("entaugment(warmup=0)"), transforms.EntAugment()
    made.register_buffer("strength", torch.cat([strength.clamp(0, 1), -torch.ones(1)]))
    batch = Batch(x, torch.zeros(40, 2), torch.ones(40), torch.arange(40))
    context = cast("Context", SimpleNamespace(epoch=0))
    torch.manual_seed(1)
    expected = made.augment(batch, context).x
    found = []
    for augment in (module, torch.compile(module, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(1)
        found.append(augment(x, strength))
    assert all(torch.equal(each, expected) for each in found)
    torch.manual_seed(2)
    alone = module(x[0], strength[0])
    torch.manual_seed(2)
    assert torch.equal(alone, module(x[:1], strength[:1])[0])
    with pytest.raises(ValueError, match=r"a strength for each image, \(40,\), got \(3,\)"):
        module(x, strength[:3])


def test_a_policy_may_be_a_file(tmp_path: Path) -> None:
    file = tmp_path / "a policy.yaml"
    file.write_text("ranges: standard\nsub_policies: [[[invert, 1.0]]]\n")
    x = images(4, 1, 6, 6)
    levels = (255 * x).round() / 255
    assert torch.allclose(transforms.AutoAugment(policy=str(file))(x), 1 - levels)


def test_strengths_are_one_less_the_normalised_entropy() -> None:
    logits = 3 * torch.randn(9, 4, generator=torch.Generator().manual_seed(0)).double()
    p = logits.softmax(dim=1).numpy()
    expected = 1 - entropy(p, axis=1, base=4)
    assert np.allclose(transforms.strengths(logits).numpy(), expected, rtol=1e-12, atol=0)
    assert transforms.strengths(torch.full((2, 3), math.nan)).tolist() == [0, 0]
