"""Networks whose normalisations are folded into the convolutions before them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from benchmarks.contract import Case, bench
from benchmarks.training import models
from methods import build
from methods.base import Model, Spec
from methods.branches import add_branch, on_branch
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
        pairs = foldable(model)
        with frozen(model):
            plain = seen(model, x)
            (slope,) = torch.autograd.grad(plain[-1].logsumexp(dim=1).sum(), x)
            with folded(model, pairs):
                passed = [vars(pair.layers(model)[1])["forward"] for pair in pairs]
                found = seen(model, x)
                (other,) = torch.autograd.grad(found[-1].logsumexp(dim=1).sum(), x)
        assert len(pairs) == len(passed) == convolutions(model) - apart
        compared = list(zip(plain, found, strict=True))
        if dtype == torch.float64:  # in float32 a ReLU's input near 0 may change its sign
            compared.append((slope, other))
        for one, another in compared:
            scale = float(one.detach().abs().max())
            torch.testing.assert_close(another, one, rtol=0, atol=bound * scale)

    def test_leave_the_network_as_it_was(self, name: str, apart: int, activation: str) -> None:
        model = network(f"{name}, activation={activation})").train()
        before = state(model)
        pairs = foldable(model)
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


class Trunk(nn.Module):
    """Two convolutions with a norm behind each; the first pair is ordinary, the second one odd."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.one = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.one(self.first(x)).relu()
        return [x, self.odd(x)]

    def odd(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class Whole(Model):
    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk, self.head = trunk, nn.Linear(4, 3)

    def embed(self, features: list[Tensor]) -> Tensor:
        return features[-1].mean(dim=(2, 3))


class UsedTwice(Trunk):
    """What is hidden by a scale of zero until the network has trained."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(1))

    def odd(self, x: Tensor) -> Tensor:
        out = self.conv(x)
        return x + self.scale * self.norm(out) * out.sigmoid()


class Stage(Trunk):
    def forward(self, x: Tensor) -> list[Tensor]:
        out = self.conv(self.one(self.first(x)).relu())
        return [out, self.norm(out)]


class CalledTwice(Trunk):
    def odd(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(self.norm(self.conv(x))))


class Moved(UsedTwice):
    """Its output is changed in place before the norm sees it."""

    def odd(self, x: Tensor) -> Tensor:
        out = self.conv(x)
        out += self.scale
        return self.norm(out)


class WeightRead(Trunk):
    def odd(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + self.conv.weight.mean()


class Gate(nn.BatchNorm2d):
    def __init__(self) -> None:
        super().__init__(4)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + self.gate * input


class Gated(Trunk):
    """Its norm is of another class, whose operations depend on the input's dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = Gate()


class Untracked(Trunk):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4, track_running_stats=False)


class Lively(Trunk):
    """Its second norm stays in train mode."""

    def train(self, mode: bool = True) -> Lively:
        super().train(mode)
        self.norm.train()
        return self


class Observed(Trunk):
    def __init__(self) -> None:
        super().__init__()
        self.conv.register_forward_hook(lambda _, __, out: out.mul(2))


class Computed(Trunk):
    def __init__(self, norm: Any) -> None:
        super().__init__()
        norm(self.conv)


class Keyword(Trunk):
    def odd(self, x: Tensor) -> Tensor:
        return self.norm(input=self.conv(x))


class Names(Trunk):
    """It reads its norm beside calling it: that can be folded."""

    def odd(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) * self.norm.num_features + self.norm.weight.mean()


class Branching(Trunk):
    """Its operations depend on values: nothing of it can be folded."""

    def odd(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x if x.sum() > 0 else -x))


FIRST, SECOND = ("trunk.first", "trunk.one"), ("trunk.conv", "trunk.norm")


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize(
    ("make", "names"),
    [
        (Trunk, [FIRST, SECOND]),
        (Names, [FIRST, SECOND]),
        (UsedTwice, [FIRST]),
        (Stage, [FIRST]),
        (CalledTwice, [FIRST]),
        (Moved, [FIRST]),
        (WeightRead, [FIRST]),
        (Gated, []),
        (Untracked, [FIRST]),
        (Lively, [FIRST]),
        (Observed, [FIRST]),
        (partial(Computed, parametrizations.weight_norm), [FIRST]),
        (partial(Computed, nn.utils.weight_norm), [FIRST]),
        (Keyword, [FIRST]),
        (Branching, []),
    ],
)
def test_a_network_of_ones_own_stays_the_same_function(
    make: Callable[[], Trunk], names: list[tuple[str, str]]
) -> None:
    """Also after it has trained, as what is 0 at first need not stay so."""
    torch.manual_seed(0)
    model = Whole(make()).double()
    pairs = foldable(model)
    assert [tuple(pair) for pair in pairs] == names
    with torch.no_grad():
        for each in model.parameters():
            each.add_(0.3 * torch.randn_like(each))
        for _ in range(5):
            model(torch.rand(16, *SPEC.shape, dtype=torch.float64))
    model.eval()
    x = torch.rand(3, *SPEC.shape, dtype=torch.float64)
    with torch.no_grad():
        plain = seen(model, x)
        with folded(model, pairs):
            found = seen(model, x)
    for one, other in zip(plain, found, strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-12)


class TestAttack:
    def test_is_the_same_attack(self) -> None:
        model = network("resnet18(width=0.125)")
        torch.manual_seed(3)
        x = torch.rand(8, *SPEC.shape, dtype=torch.float64)
        y = F.one_hot(torch.arange(8) % 4, 4).double()
        pairs, rules = foldable(model), Rules(radius=0.02, lagrange=100.0, best=True)
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
        passed: list[int] = []
        model.trunk.register_forward_hook(
            lambda *_: passed.append(sum("forward" in vars(layer) for layer in model.modules()))
        )
        ready.augment(ready.batch())
        assert len(method._pairs) == 3 and set(passed) == {3}
        assert ready.ctx.take_log()["attack_folded"] == 3
        with torch.no_grad():
            for each in [*model.parameters(), *model.buffers()]:
                if each.is_floating_point():
                    each.add_(0.1)
        passed.clear()
        x = ready.batch().x
        with torch.no_grad(), mode(model, training=False):
            plain = look(model, x)
        assert passed == [0]
        with torch.no_grad(), method._still(model):
            now = look(model, x)
        for one, other in zip(plain, now, strict=True):
            torch.testing.assert_close(other, one, rtol=0, atol=1e-5 * float(one.abs().max()))

    def test_finding_the_pairs_counts_and_draws_nothing(self) -> None:
        generator = torch.random.manual_seed(0).get_state()
        ready = bench(lambda: build("lpa3(preset=fast, warmup=0)"), Case(3))
        ready.ctx.forget()
        torch.set_rng_state(generator)
        ready.method.setup(ready.ctx)
        assert ready.ctx.counter.take() == (0, 0)
        assert torch.equal(torch.get_rng_state(), generator)

    def test_a_network_of_two_branches_is_folded_on_the_first(self) -> None:
        model = network("small_cnn(width=0.25)")
        add_branch(model)
        with torch.no_grad(), on_branch(model, 1):
            model.train()(torch.rand(16, *SPEC.shape, dtype=torch.float64))
            pairs = foldable(model)
        model.eval()
        x = torch.rand(3, *SPEC.shape, dtype=torch.float64)
        with torch.no_grad():
            plain = model(x)
            with folded(model, pairs):
                torch.testing.assert_close(model(x), plain, rtol=0, atol=1e-12)
        assert len(pairs) == 3

    def test_batch_statistics_cannot_be_folded(self) -> None:
        with pytest.raises(ValueError, match="fold: batch statistics differ from attack to attack"):
            Lpa3(fold=True)
