"""Networks whose normalisations are folded into the convolutions before them."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from benchmarks import models
from benchmarks.contract import Case, bench
from methods import build
from methods.base import Model, Spec
from methods.folding import foldable, folded
from methods.functional import frozen, mode, row_norms
from methods.lpa3 import Lpa3, Reference, Rules, attack, likelihood, look

SPEC = Spec(rows=16, classes=4, shape=(3, 16, 16))


def network(text: str, dtype: torch.dtype = torch.float64) -> Model:
    """With scales, shifts and statistics that some batches and a draw have moved, in eval mode."""
    torch.manual_seed(0)
    model = cast("Model", models.build(text, SPEC)).to(dtype)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    with torch.no_grad():
        for _ in range(5):
            model(torch.rand(16, *SPEC.shape, dtype=dtype))
    return model.eval()


def seen(model: Model, x: Tensor) -> list[Tensor]:
    features = model.features(x)
    return [*features, model.head(model.embed(features))]


def convolutions(model: nn.Module) -> int:
    return sum(isinstance(module, nn.Conv2d) for module in model.modules())


@pytest.mark.parametrize("activation", ["relu", "celu"])
@pytest.mark.parametrize(
    ("name", "apart"),
    [
        ("small_cnn(width=0.25", 0),
        ("resnet18(width=0.125", 0),
        ("resnet50(width=0.125", 0),
        ("wrn28_10(width=0.1", 15),  # of each block the last one, both shortcuts, and the stem
        ("wrn28_10(width=0.2", 15),  # three shortcuts, so that the stem goes to a norm alone
        ("mlp(width=1.0", 0),
    ],
)
class TestNetworks:
    """A folded network is the same network; every convolution before a norm is folded."""

    @pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
    def test_stages_logits_and_their_gradient(
        self, name: str, apart: int, activation: str, dtype: torch.dtype, bound: float
    ) -> None:
        model = network(f"{name}, activation={activation})", dtype)
        x = torch.rand(5, *SPEC.shape, dtype=dtype, requires_grad=True)
        pairs = foldable(model, x.detach()[:2])
        with frozen(model):
            plain = seen(model, x)
            (slope,) = torch.autograd.grad(plain[-1].logsumexp(dim=1).sum(), x)
            with folded(model, pairs):
                norms = [each for each in model.modules() if isinstance(each, nn.BatchNorm2d)]
                found = seen(model, x)
                (other,) = torch.autograd.grad(found[-1].logsumexp(dim=1).sum(), x)
        before = [each for each in model.modules() if isinstance(each, nn.BatchNorm2d)]
        assert len(pairs) == convolutions(model) - apart
        assert len(norms) == len(before) - len(pairs)
        compared = list(zip(plain, found, strict=True))
        if dtype == torch.float64:  # in float32 a ReLU's input near 0 may change its sign
            compared.append((slope, other))
        for one, another in compared:
            scale = float(one.detach().abs().max())
            torch.testing.assert_close(another, one, rtol=0, atol=bound * scale)

    def test_leave_the_network_as_it_was(self, name: str, apart: int, activation: str) -> None:
        model = network(f"{name}, activation={activation})").train()
        before = state(model)
        pairs = foldable(model, torch.rand(2, *SPEC.shape, dtype=torch.float64))
        same(before, state(model))
        with pytest.raises(KeyError), folded(model, pairs):
            raise KeyError
        same(before, state(model))


def state(model: nn.Module) -> list[Any]:
    return [
        [(name, id(each), each.detach().clone()) for name, each in model.state_dict().items()],
        [(id(each), each.requires_grad) for each in model.parameters()],
        [(name, id(each), each.training) for name, each in model.named_modules()],
        [len(each._forward_hooks) for each in model.modules()],
    ]


def same(before: list[Any], after: list[Any]) -> None:
    assert before[1:] == after[1:]
    for one, other in zip(before[0], after[0], strict=True):
        assert one[0] == other[0]
        assert torch.equal(one[2], other[2])


class Odd(Model):
    """Four convolutions before a norm, of which only the first can be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = OddTrunk()
        self.head = nn.Linear(4, 3)

    def embed(self, features: list[Tensor]) -> Tensor:
        return features[-1].mean(dim=(2, 3))


class OddTrunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3 if n == 0 else 4, 4, 3, padding=1) for n in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3))
        self.untracked = nn.BatchNorm2d(4, track_running_stats=False)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.norms[0](self.convs[0](x)).relu()
        used_twice = self.convs[1](x)
        x = self.norms[1](used_twice) + used_twice
        called_twice = self.norms[2](self.convs[2](x))
        x = self.norms[2](self.convs[2](called_twice))
        return [called_twice, self.untracked(self.convs[3](x))]


def test_only_what_computes_the_same_is_folded() -> None:
    torch.manual_seed(0)
    model = Odd().double().eval()  # fresh statistics: folding any of them changes next to nothing
    pairs = foldable(model, torch.rand(2, *SPEC.shape, dtype=torch.float64))
    assert [pair.conv for pair in pairs] == [model.trunk.convs[0]]  # type: ignore[union-attr]


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("norm", [parametrizations.weight_norm, nn.utils.weight_norm])
def test_weights_that_are_computed_are_left_alone(norm: Any) -> None:
    model = network("small_cnn(width=0.25)")
    stage = cast("nn.Sequential", cast("Any", model.trunk).stages[1])
    norm(stage[0])
    pairs = foldable(model, torch.rand(2, *SPEC.shape, dtype=torch.float64))
    assert len(pairs) == 2
    assert stage[1] not in [pair.norm for pair in pairs]


class TestAttack:
    def test_is_the_same_attack(self) -> None:
        model = network("resnet18(width=0.125)")
        torch.manual_seed(3)
        x = torch.rand(8, *SPEC.shape, dtype=torch.float64)
        y = F.one_hot(torch.arange(8) % 4, 4).double()
        pairs, rules = foldable(model, x[:2]), Rules(radius=0.02, lagrange=100.0, best=True)
        found = []
        for these in ([], pairs):
            with frozen(model), folded(model, these):
                with torch.no_grad():
                    clean = look(model, x)
                kept = Reference(clean.phi, y, likelihood(clean.logits, y, True), clean.logits)
                see = partial(look, model)
                found.append(attack(see, x, x.clamp(0.01, 0.99), kept, rules, True, SPEC))
        moved = row_norms(found[0] - x) > 0
        assert int(moved.sum()) >= 4
        torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-8)

    def test_runs_on_the_weights_and_statistics_of_its_step(self) -> None:
        """The attack follows the network as it trains; only in the attack is it folded."""
        ready = bench(lambda: build("lpa3(preset=fast, warmup=0)"), Case(3))
        method, model = cast("Lpa3", ready.method), cast("Model", ready.ctx.model)
        norms: list[int] = []
        model.trunk.register_forward_hook(
            lambda *_: norms.append(sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()))
        )
        ready.augment(ready.batch())
        assert len(method._pairs) == 3 and set(norms) == {0}
        with torch.no_grad():
            for each in [*model.parameters(), *model.buffers()]:
                if each.is_floating_point():
                    each.add_(0.1)
        norms.clear()
        x = ready.batch().x
        with torch.no_grad(), mode(model, training=False):
            plain = look(model, x)
        assert norms == [3]
        with torch.no_grad(), method._still(model):
            now = look(model, x)
        for one, other in zip(plain, now, strict=True):
            torch.testing.assert_close(other, one, rtol=0, atol=1e-5 * float(one.abs().max()))

    def test_batch_statistics_cannot_be_folded(self) -> None:
        with pytest.raises(ValueError, match="fold: batch statistics differ from attack to attack"):
            Lpa3(fold=True)
