"""Derivatives along a direction of the parameters against two independent truths, in float64."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.training import models
from benchmarks.training.context import OwnLoop, own_loop
from methods.base import Spec
from methods.functional import buffers_of, directional, evaluate

ROWS, CLASSES, EDGE = 7, 4, 8


class Counting(TorchDispatchMode):
    """Counts the calls of each operator."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.name().partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


class Tied(nn.Module):
    """Two layers that share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(9, 9), nn.Linear(9, 9), nn.Linear(9, CLASSES)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(
            torch.tanh(self.second(torch.tanh(self.first(x[:, 0, :3, :3].flatten(1)))))
        )


class PartlyUsed(nn.Module):
    """A network of which one layer does nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def dense(*layers: nn.Module, width: int = 16) -> nn.Sequential:
    """Linear layers with what is given after each of the two hidden ones."""
    ends = nn.Linear(EDGE**2, width), nn.Linear(width, width), nn.Linear(width, CLASSES)
    return nn.Sequential(
        nn.Flatten(), ends[0], *copy.deepcopy(layers), ends[1], *copy.deepcopy(layers), ends[2]
    )


def conv(norm: nn.Module, activation: nn.Module) -> nn.Sequential:
    """Two convolutions, each with a normalisation of its own, and a pooling by the maximum."""
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 3, padding=1), copy.deepcopy(norm), copy.deepcopy(activation)),
        *(nn.MaxPool2d(2), nn.Conv2d(6, 6, 3, padding=1), norm, activation),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, CLASSES)),
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "tanh": lambda: dense(nn.Tanh()),
    "relu": lambda: dense(nn.ReLU()),
    "layer norm, gelu": lambda: dense(nn.LayerNorm(16), nn.GELU()),
    "dropout": lambda: dense(nn.Tanh(), nn.Dropout(0.4)),
    "conv, batch norm": lambda: conv(nn.BatchNorm2d(6), nn.ReLU(inplace=True)),
    "conv, group norm, silu": lambda: conv(nn.GroupNorm(2, 6), nn.SiLU()),
    "batch norm, dropout": lambda: dense(nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3)),
    "tied": Tied,
    "small_cnn": lambda: models.build(
        "small_cnn(width=0.25)", Spec(rows=ROWS, classes=CLASSES, shape=(1, EDGE, EDGE))
    ),
}


@pytest.fixture(params=list(NETWORKS))
def network(request: pytest.FixtureRequest) -> nn.Module:
    return built(request.param)


def built(name: str) -> nn.Module:
    """A network in float64 and in train mode."""
    torch.manual_seed(3)
    return NETWORKS[name]().double().train()


def images(rows: int = ROWS, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.rand(rows, 1, EDGE, EDGE, generator=rng, dtype=torch.float64)


def direction(model: nn.Module, seed: int = 1) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(each.shape, generator=rng, dtype=each.dtype)
        for name, each in model.named_parameters()
    }


def loop_of(model: nn.Module) -> OwnLoop:
    """A real context, as a training loop of one's own has it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rows = [(images(), torch.arange(ROWS) % CLASSES)]
    ctx = own_loop(model, optimizer, classes=CLASSES, train=rows)
    ctx.begin_epoch(0)
    ctx.batch(*rows[0])
    return ctx


def double_backward(model: nn.Module, z: Tensor, tangent: Mapping[str, Tensor]) -> Tensor:
    """J v of logits with graph: the derivative of u (J' u) v by u, which does not enter else."""
    named = {name: each for name, each in model.named_parameters() if name in tangent}
    u = torch.zeros_like(z, requires_grad=True)
    pulled = torch.autograd.grad(z, list(named.values()), u, create_graph=True, allow_unused=True)
    total = z.new_zeros(())
    for name, part in zip(named, pulled, strict=True):
        if part is not None:
            total = total + (part * tangent[name]).sum()
    return torch.autograd.grad(total, u)[0]


def shifted(model: nn.Module, x: Tensor, tangent: Mapping[str, Tensor], by: float) -> Tensor:
    """Logits of a copy whose parameters were moved in place."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, each in other.named_parameters():
            each.add_(by * tangent.get(name, torch.zeros(())))
        return other(x)


class TestTruth:
    def test_dual_is_double_backward_through_the_training_forward(self, network: nn.Module) -> None:
        """With the context's replay also the dropout masks are those of its forward."""
        ctx, x, tangent = loop_of(network), images(), direction(network)
        with ctx.replay():
            logits, slope = directional(network, x, tangent)
        z = ctx.forward(x)
        torch.testing.assert_close(logits, z.detach(), rtol=1e-12, atol=1e-13)
        truth = double_backward(network, z, tangent)
        assert float(truth.abs().max()) > 0.1
        torch.testing.assert_close(slope, truth, rtol=1e-10, atol=1e-11)

    def test_dual_is_the_central_difference(self, network: nn.Module) -> None:
        ctx, x, tangent = loop_of(network), images(), direction(network)
        with ctx.replay():
            _, slope = directional(network, x, tangent)
        ends = []
        for by in (1e-6, -1e-6):
            with ctx.replay():
                ends.append(shifted(network, x, tangent, by))
        torch.testing.assert_close(slope, (ends[0] - ends[1]) / 2e-6, rtol=1e-6, atol=1e-7)

    def test_difference_is_the_secant_to_a_point_at_the_step(self, network: nn.Module) -> None:
        ctx, x, tangent = loop_of(network), images(), direction(network)
        norm = float(torch.cat([each.flatten() for each in tangent.values()]).norm())
        with ctx.replay():
            far = shifted(network, x, tangent, 0.001 / norm)
        with ctx.replay():
            logits, slope = directional(network, x, tangent, how="difference")
        z = ctx.forward(x).detach()
        torch.testing.assert_close(logits, z, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(slope, (far - z) / (0.001 / norm), rtol=1e-9, atol=1e-10)
        with ctx.replay():
            shared = directional(network, x, tangent, how="difference", primal=z)
        assert shared[0] is z
        torch.testing.assert_close(shared[1], slope, rtol=1e-9, atol=1e-10)

    @pytest.mark.parametrize("name", ["tanh", "layer norm, gelu", "dropout"])
    def test_the_error_of_a_difference_falls_with_its_step(self, name: str) -> None:
        network, x = built(name), images()
        tangent = direction(network)
        found = []
        for step in (1e-2, 1e-3, 1e-4):
            torch.manual_seed(5)
            exact = directional(network, x, tangent)[1]
            torch.manual_seed(5)
            near = directional(network, x, tangent, how="difference", step=step)[1]
            found.append(float((near - exact).norm() / exact.norm()))
        assert found[0] < 0.02
        assert found[1] == pytest.approx(found[0] / 10, rel=0.1)
        assert found[2] == pytest.approx(found[0] / 100, rel=0.1)

    def test_the_length_of_a_direction_only_scales_the_result(self) -> None:
        network, x = built("tanh"), images()
        tangent = direction(network)
        longer = {name: 1e6 * each for name, each in tangent.items()}
        for how in ("dual", "difference"):
            slopes = [directional(network, x, each, how=how)[1] for each in (tangent, longer)]
            torch.testing.assert_close(slopes[1], 1e6 * slopes[0], rtol=1e-8, atol=1e-3)

    @pytest.mark.parametrize("how", ["dual", "difference"])
    def test_no_direction_gives_no_slope(self, how: Any) -> None:
        network, x = built("conv, batch norm"), images()
        still = {name: torch.zeros_like(each) for name, each in direction(network).items()}
        logits, slope = directional(network, x, still, how=how)
        assert torch.equal(slope, torch.zeros_like(logits))
        unused = PartlyUsed().double()
        inputs = torch.rand(3, 2, dtype=torch.float64)
        only = {"unused.weight": torch.ones(2, 2, dtype=torch.float64)}
        assert torch.equal(directional(unused, inputs, only, how=how)[1], torch.zeros_like(inputs))

    @pytest.mark.parametrize("how", ["dual", "difference"])
    def test_parameters_without_a_direction_stand_still(self, how: Any) -> None:
        network, x = built("conv, batch norm"), images()
        whole = direction(network)
        part = {name: each for name, each in whole.items() if name.startswith("4.")}
        padded = {name: each * float(name in part) for name, each in whole.items()}
        assert 0 < len(part) < len(whole)
        for one, other in zip(
            directional(network, x, part, how=how),
            directional(network, x, padded, how=how),
            strict=True,
        ):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)

    @pytest.mark.parametrize("how", ["dual", "difference"])
    def test_inputs_may_be_a_list(self, how: Any) -> None:
        class Product(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

            def forward(self, x: list[Tensor]) -> Tensor:
                return self.scale * x[0] @ x[1].T

        one, other = torch.rand(2, 3, 5, dtype=torch.float64)
        tangent = {"scale": torch.tensor(3.0, dtype=torch.float64)}
        logits, slope = directional(Product(), [one, other], tangent, how=how)
        torch.testing.assert_close(logits, 2 * one @ other.T)
        torch.testing.assert_close(slope, 3 * one @ other.T)


class TestNothingMoves:
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("how", ["dual", "difference"])
    def test_model_and_its_mode_stay(self, network: nn.Module, how: Any, training: bool) -> None:
        network.train(training)
        first = next(network.children())
        first.train(not training)  # each module keeps a mode of its own
        next(network.parameters()).requires_grad_(False)
        before = copy.deepcopy(network.state_dict())
        flags = [each.requires_grad for each in network.parameters()]
        modes = [module.training for module in network.modules()]
        kept = [id(each) for each in (*network.parameters(), *network.buffers())]
        x, tangent = images(), direction(network)
        logits, slope = directional(network, x, tangent, how=how)
        assert not logits.requires_grad and not slope.requires_grad
        assert all(torch.equal(before[name], each) for name, each in network.state_dict().items())
        assert kept == [id(each) for each in (*network.parameters(), *network.buffers())]
        assert flags == [each.requires_grad for each in network.parameters()]
        assert modes == [module.training for module in network.modules()]
        assert all(each.grad is None for each in network.parameters())
        assert torch.equal(x, images())

    @pytest.mark.parametrize("how", ["dual", "difference"])
    def test_the_mode_decides_which_statistics_are_read(self, how: Any) -> None:
        network, x = built("conv, batch norm"), images()
        with torch.no_grad():
            for seed in range(5):
                network(images(seed=seed) * 3 - 1)
        tangent, found = direction(network), []
        for training in (True, False):
            network.train(training)
            logits, slope = directional(network, x, tangent, how=how, step=1e-5)
            truth = copy.deepcopy(network)
            z = truth(x)
            torch.testing.assert_close(logits, z.detach())
            wanted = double_backward(truth, z, tangent)
            near = 1e-10 if how == "dual" else 1e-2
            torch.testing.assert_close(slope, wanted, rtol=near, atol=near / 10)
            found.append(slope)
        assert float((found[0] - found[1]).abs().max()) > 0.1

    def test_without_a_primal_both_forwards_draw_the_same_masks(self) -> None:
        network, x = built("dropout"), images()
        tangent = direction(network)
        torch.manual_seed(11)
        exact = directional(network, x, tangent)
        torch.manual_seed(11)
        near = directional(network, x, tangent, how="difference", step=1e-5)
        torch.testing.assert_close(near[0], exact[0], rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(near[1], exact[1], rtol=1e-3, atol=1e-4)


class Doubled(torch.autograd.Function):
    """Twice its input, without a forward-mode derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        return 2 * grad_outputs[0]


class Attention(nn.Module):
    """Self-attention over the lines of an image, by torch's fused kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.head = nn.Linear(EDGE, 3 * EDGE), nn.Linear(EDGE, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.project(x).chunk(3, dim=-1)
        return self.head(F.scaled_dot_product_attention(query, key, value).mean(dim=(1, 2)))


class Custom(nn.Module):
    """Batch normalisation, then a function without a forward-mode derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm2d(1), nn.Linear(EDGE**2, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return cast("Tensor", Doubled.apply(self.head(self.norm(x).flatten(1))))


class TestUnsupported:
    @pytest.mark.parametrize("make", [Attention, Custom])
    def test_dual_says_so_and_leaves_nothing_behind(self, make: Callable[[], nn.Module]) -> None:
        torch.manual_seed(0)
        network, x = make().double().train(), images()
        before, tangent = copy.deepcopy(network.state_dict()), direction(network)
        with pytest.raises(NotImplementedError):
            directional(network, x, tangent)
        assert all(torch.equal(before[name], each) for name, each in network.state_dict().items())
        with forward_ad.dual_level():  # no level is open, or this would raise
            pass
        other = built("tanh")
        directional(other, x, direction(other))

    @pytest.mark.parametrize("make", [Attention, Custom])
    def test_difference_works_there(self, make: Callable[[], nn.Module]) -> None:
        torch.manual_seed(0)
        network, x = make().double().train(), images()
        tangent = direction(network)
        slope = directional(network, x, tangent, how="difference", step=1e-6)[1]
        truth = copy.deepcopy(network)
        ends = [shifted(truth, x, tangent, by) for by in (1e-5, -1e-5)]
        torch.testing.assert_close(slope, (ends[0] - ends[1]) / 2e-5, rtol=1e-4, atol=1e-4)


class TestEvaluate:
    def test_given_parameters_replace_the_models_own(self, network: nn.Module) -> None:
        x, tangent = images(), direction(network)
        names = list(tangent)[: len(tangent) // 2]
        given = {name: tangent[name].clone().requires_grad_() for name in names}
        other = copy.deepcopy(network)
        with torch.no_grad():
            for name, each in other.named_parameters():
                if name in given:
                    each.copy_(given[name])
        torch.manual_seed(2)
        logits = evaluate(network, given, x)
        torch.manual_seed(2)
        truth = other(x)
        torch.testing.assert_close(logits, truth, rtol=1e-12, atol=1e-13)
        own = [each for name, each in network.named_parameters() if name not in given]
        found = torch.autograd.grad(logits.square().sum(), [*given.values(), *own])
        named = dict(other.named_parameters())
        order = [named[name] for name in names]
        order += [each for name, each in named.items() if name not in given]
        for one, wanted in zip(
            found, torch.autograd.grad(truth.square().sum(), order), strict=True
        ):
            torch.testing.assert_close(one, wanted, rtol=1e-10, atol=1e-11)

    def test_buffers_are_copied_together(self) -> None:
        """One launch for each dtype on a GPU, and each copy with a version of its own."""
        network = models.build("resnet18(width=0.125)", Spec(8, 3, (1, 28, 28)))
        network.register_buffer("flag", torch.tensor([True, False]))
        own = dict(network.named_buffers())
        with Counting() as seen:
            made = buffers_of(network)
        assert seen.counts["aten::_foreach_mul"] == 2, "float32 and int64"
        assert seen.counts["aten::clone"] == 1, "the flag"
        assert list(made) == list(own) and len(own) > 60
        for name, copied in made.items():
            assert copied.dtype == own[name].dtype and torch.equal(copied, own[name])
            assert copied.data_ptr() != own[name].data_ptr()
        versions = [each._version for each in made.values()]
        made["trunk.stem.1.running_mean"].add_(1)
        assert [each._version for each in made.values()].count(versions[0] + 1) == 1

    def test_statistics_are_read_as_the_mode_has_it_and_never_move(self) -> None:
        network = built("conv, batch norm")
        with torch.no_grad():
            network(images(seed=4) * 5)
        before = {name: each.clone() for name, each in network.named_buffers()}
        logits = {}
        for training in (True, False):
            network.train(training)
            logits[training] = evaluate(network, {}, images())
            for name, each in network.named_buffers():
                assert torch.equal(each, before[name])
        assert not torch.allclose(logits[True], logits[False])
        with torch.no_grad():
            copied = copy.deepcopy(network).train(False)
            torch.testing.assert_close(logits[False], copied(images()))
            torch.testing.assert_close(logits[True], functional_call(copied.train(), {}, images()))
