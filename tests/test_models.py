"""Networks: published sizes, parts that add up to the whole, stems, torchvision's weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest
import torch
from torch import Tensor, nn

from benchmarks.training.models import build, canonical
from benchmarks.training.networks import IMAGES, Normalize, Trunk
from methods.base import Model, Spec
from methods.branches import BranchedNorm, has_branches
from methods.naming import NamingError

ROOT = Path(__file__).parents[1]
NARROW = {"resnet18": 0.125, "resnet50": 0.0625, "wrn28_10": 0.05, "small_cnn": 0.25, "mlp": 0.25}
"""Networks for images, each with a width at which it runs in milliseconds."""


def spec(size: int = 28, channels: int = 3, classes: int = 9) -> Spec:
    return Spec(rows=100, classes=classes, shape=(channels, size, size))


def images(rows: int, of: Spec, seed: int = 0) -> Tensor:
    return torch.rand(rows, *of.shape, generator=torch.Generator().manual_seed(seed))


def skeleton(text: str, of: Spec) -> nn.Module:
    """The network without memory behind its parameters, to count them."""
    with torch.device("meta"):
        return build(text, of)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def narrow(name: str, of: Spec, seed: int = 0, **arguments: str) -> Model:
    words = {"width": str(NARROW[name]), **arguments}
    torch.manual_seed(seed)
    text = f"{name}({', '.join(f'{key}={value}' for key, value in words.items())})"
    model = build(text, of)
    assert isinstance(model, Model)
    return model


def convolutions(module: nn.Module) -> list[nn.Conv2d]:
    return [each for each in module.modules() if isinstance(each, nn.Conv2d)]


class TestParameters:
    @pytest.mark.parametrize(
        ("text", "of", "parameters"),
        [
            ("resnet18", spec(), 11_173_449),
            ("resnet50", spec(), 23_518_793),
            # 784 to 128 to 128 to 10, each with a bias.
            ("mlp", spec(28, 1, 10), 785 * 128 + 129 * 128 + 129 * 10),
            # CIFAR-10 and CIFAR-100, as the authors' tables round them: 36.5 million.
            ("wrn28_10", spec(32, classes=10), 36_479_194),
            ("wrn28_10", spec(32, classes=100), 36_479_194 + 90 * 641),
            # torchvision's own networks.
            ("resnet18", spec(224, classes=1000), 11_689_512),
            ("resnet50", spec(224, classes=1000), 25_557_032),
        ],
    )
    def test_as_published(self, text: str, of: Spec, parameters: int) -> None:
        assert count(skeleton(text, of)) == parameters

    @pytest.mark.parametrize("name", ["resnet18", "resnet50"])
    @pytest.mark.parametrize(("size", "kernel"), [(28, 3), (32, 3), (64, 7), (128, 7), (224, 7)])
    def test_a_channel_less_is_a_third_of_the_stem(self, name: str, size: int, kernel: int) -> None:
        colour, grey = (count(skeleton(name, spec(size, channels))) for channels in (3, 1))
        assert colour - grey == 2 * 64 * kernel**2

    @pytest.mark.parametrize("name", NARROW)
    def test_classes_change_the_head_only(self, name: str) -> None:
        two, nine = (skeleton(name, spec(classes=classes)) for classes in (2, 9))
        assert isinstance(two, Model)
        assert count(nine) - count(two) == 7 * (two.head.in_features + 1)
        assert two.head.out_features == 2

    @pytest.mark.parametrize("name", NARROW)
    def test_width_multiplies_the_channels(self, name: str) -> None:
        whole, half = (skeleton(f"{name}(width={width})", spec()) for width in (1, 0.5))
        assert isinstance(whole, Model)
        assert isinstance(half, Model)
        assert half.head.in_features * 2 == whole.head.in_features
        for one, other in zip(convolutions(whole)[1:], convolutions(half)[1:], strict=True):
            assert one.out_channels == 2 * other.out_channels
            assert one.stride == other.stride
        if name != "mlp":  # most of its weights are between pixels and the first layer
            assert 3.5 < count(whole) / count(half) < 4.1

    @pytest.mark.parametrize("name", NARROW)
    def test_a_tiny_width_keeps_a_channel(self, name: str) -> None:
        model = build(f"{name}(width=0.001)", spec(classes=2)).eval()
        assert model(images(2, spec())).shape == (2, 2)


class TestParts:
    @pytest.mark.parametrize("channels", [1, 3])
    @pytest.mark.parametrize("name", NARROW)
    @pytest.mark.parametrize("size", [28, 32, 64])
    def test_head_of_embed_of_features_is_the_model(
        self, name: str, channels: int, size: int
    ) -> None:
        of = spec(size, channels)
        model, x = narrow(name, of), images(3, of)
        for training in (True, False):
            model.train(training)
            with torch.no_grad():
                features = model.features(x)
                kept = [each.clone() for each in features]
                embedded = model.embed(features)
                logits = model.head(embedded)
                assert torch.equal(logits, model(x))
            assert all(torch.equal(a, b) for a, b in zip(features, kept, strict=True))
            assert embedded.shape == (3, model.head.in_features)
            assert logits.shape == (3, 9)
            assert logits.isfinite().all()
        assert len(features) == len(model.trunk.get_submodule("stages")._modules)

    @pytest.mark.parametrize("name", NARROW)
    def test_works_at_224(self, name: str) -> None:
        of = spec(224)
        model, x = narrow(name, of).eval(), images(1, of)
        with torch.no_grad():
            features = model.features(x)
            assert torch.equal(model.head(model.embed(features)), model(x))

    @pytest.mark.parametrize("name", NARROW)
    def test_works_on_images_that_are_not_square(self, name: str) -> None:
        of = Spec(rows=10, classes=4, shape=(1, 30, 70))
        assert narrow(name, of).eval()(images(2, of)).shape == (2, 4)

    @pytest.mark.parametrize(
        ("name", "size", "sides"),
        [
            ("resnet18", 28, [28, 14, 7, 4]),
            ("resnet50", 32, [32, 16, 8, 4]),
            ("resnet18", 64, [16, 8, 4, 2]),
            ("resnet50", 64, [16, 8, 4, 2]),
            ("resnet18", 224, [56, 28, 14, 7]),
            ("wrn28_10", 32, [32, 16, 8]),
            ("small_cnn", 28, [28, 14, 7]),
        ],
    )
    def test_stages_have_the_published_resolution(
        self, name: str, size: int, sides: list[int]
    ) -> None:
        of = spec(size)
        with torch.no_grad():
            features = narrow(name, of).eval().features(images(1, of))
        assert [each.shape[2:] for each in features] == [(side, side) for side in sides]

    @pytest.mark.parametrize("name", NARROW)
    def test_gradients_reach_every_parameter(self, name: str) -> None:
        for activation in ("relu", "celu"):
            model = narrow(name, spec(), activation=activation)
            model(images(4, spec())).square().sum().backward()
            for key, parameter in model.named_parameters():
                assert parameter.grad is not None, key
                assert parameter.grad.isfinite().all()
                assert parameter.grad.abs().max() > 0, key


class TestStructure:
    @pytest.mark.parametrize("name", NARROW)
    def test_inputs_are_normalised_inside(self, name: str) -> None:
        """[0, 1] to [-1, 1] before anything else: the trunk without it gets 2 x - 1."""
        model, x = narrow(name, spec()).eval(), images(2, spec())
        with torch.no_grad():
            expected = model(x)
            trunk = model.trunk
            assert isinstance(trunk, Trunk)
            trunk.normalize = Normalize((0.0,) * 3, (1.0,) * 3)
            assert torch.allclose(model(2 * x - 1), expected, atol=1e-6)
            assert not torch.allclose(model(x), expected, atol=1e-3)

    def test_normalisation_is_by_channel_and_saved(self) -> None:
        layer = Normalize((0.1, 0.2, 0.3), (1.0, 2.0, 4.0))
        x = torch.rand(2, 3, 4, 5)
        for channel, (mean, std) in enumerate([(0.1, 1.0), (0.2, 2.0), (0.3, 4.0)]):
            assert torch.allclose(layer(x)[:, channel], (x[:, channel] - mean) / std)
        assert layer.state_dict().keys() == {"mean", "std"}

    @pytest.mark.parametrize("name", NARROW)
    def test_celu_replaces_every_relu(self, name: str) -> None:
        for activation, wanted, other in (("relu", nn.ReLU, nn.CELU), ("celu", nn.CELU, nn.ReLU)):
            model = narrow(name, spec(64), activation=activation)
            kinds = [type(module) for module in model.modules()]
            assert wanted in kinds
            assert other not in kinds

    @pytest.mark.parametrize("name", ["resnet18", "resnet50"])
    def test_the_stem_goes_by_the_smaller_side(self, name: str) -> None:
        for shape, small in (((1, 63, 200), True), ((1, 64, 64), False), ((1, 28, 28), True)):
            stem = narrow(name, Spec(rows=1, classes=2, shape=shape)).trunk.get_submodule("stem")
            first = convolutions(stem)[0]
            assert first.kernel_size == ((3, 3) if small else (7, 7))
            assert first.stride == ((1, 1) if small else (2, 2))
            pools = [each for each in stem.modules() if isinstance(each, nn.MaxPool2d)]
            assert len(pools) == (0 if small else 1)

    @pytest.mark.parametrize("name", NARROW)
    def test_no_convolution_before_a_norm_has_a_bias(self, name: str) -> None:
        assert all(each.bias is None for each in convolutions(narrow(name, spec(64))))

    def test_wrn_is_pre_activated(self) -> None:
        """A block's output is a plain sum, so that its identity path stays open."""
        model = narrow("wrn28_10", spec()).eval()
        with torch.no_grad():
            features = model.features(images(2, spec()))
            assert all(each.min() < 0 for each in features)
            block = model.trunk.get_submodule("stages.0.1")
            for parameter in block.get_submodule("conv2").parameters():
                parameter.zero_()
            x = torch.randn(2, features[0].shape[1], 8, 8)
            assert torch.equal(block(x), x)

    @pytest.mark.parametrize("name", NARROW)
    def test_initialisation_is_a_function_of_the_global_seed(self, name: str) -> None:
        one, same, other = (narrow(name, spec(), seed).state_dict() for seed in (1, 1, 2))
        assert all(torch.equal(one[key], same[key]) for key in one)
        assert not torch.equal(one["head.weight"], other["head.weight"])


def own(of: Spec) -> nn.Module:
    """A network of one's own: logits only."""
    return nn.Sequential(nn.Flatten(), nn.Linear(of.shape[0] * of.shape[1], of.classes))


def number(of: Spec) -> int:
    return 3


def picky(of: Spec) -> nn.Module:
    raise ValueError("width: expected more")


class TestNames:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("resnet18", "resnet18"),
            ("resnet18()", "resnet18"),
            ("resnet18(width=1, activation='relu', weights=none)", "resnet18"),
            ("resnet18(width=0.25)", "resnet18(width=0.25)"),
            ("small_cnn(width=2, activation=celu)", "small_cnn(activation=celu, width=2.0)"),
            ("resnet50(weights=imagenet)", "resnet50(weights=imagenet)"),
            ("py:package.module:factory", "py:package.module:factory"),
        ],
    )
    def test_canonical(self, text: str, expected: str) -> None:
        assert canonical(text) == expected
        assert canonical(expected) == expected

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("resnet19", ["unknown model 'resnet19'", "did you mean 'resnet18'?", "wrn28_10"]),
            ("resnet18(widht=1)", ["model 'resnet18'", "'widht'", "did you mean 'width'?"]),
            ("resnet18(activation=gelu)", ["resnet18: activation", "relu or celu", "got gelu"]),
            ("resnet18(width=wide)", ["resnet18: width", "a number", "got wide"]),
            ("wrn28_10(weights=imagenet)", ["wrn28_10", "no argument 'weights'"]),
            ("resnet18+resnet50", ["expected a name or a call"]),
            ("resnet18(0.25)", ["keyword"]),
        ],
    )
    def test_an_error_says_what_is_allowed(self, text: str, words: list[str]) -> None:
        for act in (canonical, lambda name: build(name, spec())):
            with pytest.raises(NamingError) as caught:
                act(text)
            assert all(word in str(caught.value) for word in words)

    @pytest.mark.parametrize("name", NARROW)
    @pytest.mark.parametrize("width", ["0", "-1"])
    def test_a_width_is_above_zero(self, name: str, width: str) -> None:
        with pytest.raises(NamingError, match=rf"width: expected .* got {width}"):
            build(f"{name}(width={width})", spec())

    @pytest.mark.parametrize(
        ("text", "of"),
        [
            ("resnet18(weights=imagenet)", spec(28)),
            ("resnet18(weights=imagenet)", spec(64, channels=1)),
            ("resnet50(weights=imagenet, width=0.5)", spec(64)),
        ],
    )
    def test_imagenet_weights_need_what_they_were_trained_with(self, text: str, of: Spec) -> None:
        with pytest.raises(NamingError, match="weights=imagenet needs 3 channels"):
            build(text, of)

    def test_every_network_for_images_is_tested(self) -> None:
        assert set(NARROW) == IMAGES

    def test_vectors_are_refused(self) -> None:
        with pytest.raises(NamingError, match="needs images, but the data are vectors"):
            build("small_cnn", Spec(rows=1, classes=2, shape=(5,), kind="vector"))


class TestOwn:
    @pytest.fixture(autouse=True)
    def importable(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        code = "from tests_own_source import *\n"
        (tmp_path / "own_models.py").write_text(code, encoding="utf-8")
        monkeypatch.setitem(sys.modules, "tests_own_source", sys.modules[__name__])
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "own_models", raising=False)

    def test_a_factory_gets_the_spec(self) -> None:
        of = Spec(rows=1, classes=4, shape=(2, 3), kind="vector")
        model = build("py:own_models:own", of)
        assert model(torch.rand(5, 2, 3)).shape == (5, 4)
        assert not isinstance(model, Model)

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("py:no_such_module:own", ["no module 'no_such_module'", "no_such_module.py"]),
            ("py:own_models:absent", ["own_models.py has no 'absent'"]),
            ("py:own_models", ["expected py:MODULE:NAME"]),
            ("py:", ["expected py:MODULE:NAME"]),
            ("py:own_models:number", ["returned int", "nn.Module"]),
            ("py:own_models:picky", ["width: expected more"]),
            ("py:own_models:ROOT", ["ROOT", "callable"]),
        ],
    )
    def test_an_error_says_what_is_expected(self, text: str, words: list[str]) -> None:
        with pytest.raises(NamingError) as caught:
            build(text, spec())
        assert repr(text) in str(caught.value)
        assert all(word in str(caught.value) for word in words)


COMPARE = """
from functools import cache

import torch
from torch import nn
from benchmarks.training import imagenet, models
from methods.base import Spec

torchvision = imagenet.import_torchvision()
assert imagenet.import_torchvision() is torchvision, "a second call changes nothing"
torch.set_num_threads(1)
asked = []


def get_model(name, weights):
    asked.append((name, weights))
    return random_one(name)


@cache
def random_one(name):
    # Random weights, norms and buffers included, so that no two tensors are alike.
    generator = torch.Generator().manual_seed(7)
    with torch.device("meta"):
        donor = getattr(torchvision.models, name)(weights=None)
    donor.to_empty(device="cpu")
    with torch.no_grad():
        for key, tensor in donor.state_dict().items():
            if key.endswith("num_batches_tracked"):
                tensor.fill_(3)
            elif key.endswith("running_var") or (tensor.dim() == 1 and key.endswith("weight")):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
            elif tensor.dim() == 1:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) / 10)
            else:
                scale = (2 / tensor[0].numel()) ** 0.5
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)
    return donor


torchvision.models.get_model = get_model
mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
x = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
for name in ("resnet18", "resnet50"):
    torch.manual_seed(0)
    ours = models.build(f"{name}(weights=imagenet)", Spec(rows=1, classes=9, shape=(3, 64, 64)))
    assert asked.pop() == (name, "IMAGENET1K_V1")
    theirs = random_one(name)
    theirs.fc = nn.Identity()
    ours.eval(), theirs.eval()
    with torch.no_grad():
        got, wanted = ours.embed(ours.features(x)), theirs((x - mean) / std)
    assert wanted.std() > 1e-2, "the comparison says something"
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max(), (got - wanted).abs().max()
    assert ours.head.out_features == 9
    ours.train(), theirs.train()
    with torch.no_grad():
        got, wanted = ours.embed(ours.features(x)), theirs((x - mean) / std)
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max(), (got - wanted).abs().max()


def offline(name, weights):
    raise OSError("no network")


torchvision.models.get_model = offline
try:
    models.build("resnet18(weights=imagenet)", Spec(rows=1, classes=9, shape=(3, 64, 64)))
except models.NamingError as error:
    assert "cannot fetch torchvision's resnet18 weights: no network" in str(error)
else:
    raise AssertionError("no error without a network")
"""


def python(code: str) -> Any:
    """A process of its own: torchvision's operators are declared once and for all."""
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_imagenet_weights_make_torchvisions_networks() -> None:
    done = python(COMPARE)
    assert done.returncode == 0, done.stderr


class TestAuxiliaryNorm:
    """A second set of normalisation layers, beside a network that is else the same."""

    BRANCHED: ClassVar = ["resnet18", "resnet50", "wrn28_10", "small_cnn"]

    @staticmethod
    def both(name: str) -> tuple[Model, Model]:
        found = []
        for needs in (frozenset(), frozenset({"auxiliary_norm"})):
            torch.manual_seed(0)
            found.append(build(f"{name}(width={NARROW[name]})", spec(), needs))
        return cast("tuple[Model, Model]", tuple(found))

    @pytest.mark.parametrize("name", BRANCHED)
    def test_branch_0_is_the_network_bit_for_bit(self, name: str) -> None:
        plain, branched = self.both(name)
        assert not has_branches(plain) and has_branches(branched)
        renamed = {
            key.replace(".main.", "."): value
            for key, value in branched.state_dict().items()
            if ".auxiliary." not in key
        }
        assert list(renamed) == list(plain.state_dict())
        for key, value in plain.state_dict().items():
            assert torch.equal(value, renamed[key])
        x = images(4, spec())
        for training in (True, False):
            plain.train(training)
            branched.train(training)
            with torch.no_grad():
                assert torch.equal(plain(x), branched(x))
                assert torch.equal(plain(x), branched(x, branch=0))

    @pytest.mark.parametrize("name", BRANCHED)
    def test_branch_1_has_statistics_and_scales_of_its_own(self, name: str) -> None:
        _, model = self.both(name)
        x, norms = images(4, spec()), [m for m in model.modules() if isinstance(m, BranchedNorm)]
        of_each = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
        assert of_each == 2 * len(norms)
        model.train()
        model(x)
        assert all(int(norm.main.num_batches_tracked or 0) == 1 for norm in norms)
        assert all(int(norm.auxiliary.num_batches_tracked or 0) == 0 for norm in norms)
        before = [norm.main.running_mean.clone() for norm in norms]  # type: ignore[union-attr]
        loss = model(x, branch=1).square().sum()
        for norm, mean in zip(norms, before, strict=True):
            assert torch.equal(cast("Tensor", norm.main.running_mean), mean)
            assert int(norm.auxiliary.num_batches_tracked or 0) == 1
            assert norm.branch == 0
        loss.backward()
        for norm in norms:
            assert norm.main.weight.grad is None and norm.auxiliary.weight.grad is not None
        with torch.no_grad():
            norms[-1].auxiliary.weight.mul_(2.0)
            assert not torch.equal(model(x), model(x, branch=1))

    def test_the_branch_is_restored_where_a_forward_fails(self) -> None:
        _, model = self.both("small_cnn")
        with pytest.raises(RuntimeError):
            model(torch.rand(2, 5, 8, 8), branch=1)  # five channels
        assert all(m.branch == 0 for m in model.modules() if isinstance(m, BranchedNorm))

    def test_where_there_is_one_branch_only_another_is_refused(self) -> None:
        plain, branched = self.both("small_cnn")
        with pytest.raises(ValueError, match="one set of normalisation layers"):
            plain(images(2, spec()), branch=1)
        with pytest.raises(ValueError, match="branch: expected 0 or 1, got 2"):
            branched(images(2, spec()), branch=2)
        assert not has_branches(build("mlp", spec(), {"auxiliary_norm"}))

    @pytest.mark.parametrize("name", ["resnet18", "small_cnn"])
    def test_needed_by_no_method_nothing_changes(self, name: str) -> None:
        keys = list(narrow(name, spec()).state_dict())
        assert not [key for key in keys if ".main." in key or ".auxiliary." in key]
