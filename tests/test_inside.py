"""Heat maps of trained networks, and their features in the plane."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.cli import inside
from benchmarks.cli.inside import Tapped, heat_maps
from benchmarks.cli.main import run
from benchmarks.training import models
from methods.base import Model, Spec

SPEC = Spec(rows=10, classes=3, shape=(1, 16, 16))


def score_cam(model: Model, image: Tensor, which: int, place: int) -> Tensor:
    """(h, w): the definition, Eqs. 3 to 6 of Wang et al., channel by channel; torchcam scales each
    map to [0, 1] before it enlarges it, not after."""
    with torch.no_grad():
        maps = model.features(image[None])[place][0]
        scores = []
        for each in maps:
            scaled = (each - each.min()) / (each.max() - each.min()).clamp_min(1e-12)
            mask = F.interpolate(scaled[None, None], size=image.shape[1:], mode="bilinear")[0, 0]
            base = model(image[None])[0, which]
            scores.append(model((image * mask)[None])[0, which] - base)
        found = F.relu((torch.stack(scores).softmax(0)[:, None, None] * maps).sum(0))
        return found


@pytest.mark.parametrize("name", ["small_cnn(width=0.25)", "resnet18(width=0.05)"])
def test_heat_maps_are_score_cam(name: str) -> None:
    torch.manual_seed(0)
    model = models.build(name, SPEC).eval()
    assert isinstance(model, Model)
    x = torch.rand(3, 1, 16, 16)
    made = heat_maps(model, x, [0, 1, 2])
    place = inside._last_with_places(model, x[:1])
    for image, which, found in zip(x, range(3), made, strict=True):
        own = score_cam(model, image, which, place)
        own = (own - own.min()) / (own.max() - own.min())
        large = F.interpolate(own[None, None], size=(16, 16), mode="bilinear")[0, 0]
        assert found == pytest.approx((large / large.max()).numpy(), abs=1e-4)
        assert found.min() >= 0 and found.max() == pytest.approx(1)


def test_a_tapped_network_is_the_network() -> None:
    torch.manual_seed(0)
    model = models.build("resnet18(width=0.05)", SPEC).eval()
    assert isinstance(model, Model)
    x = torch.rand(4, 1, 16, 16)
    assert torch.equal(Tapped(model, 3)(x), model(x))


class Dark(Model):
    """Sees only the brightness of the upper half."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Identity()
        self.head = nn.Linear(1, 2, bias=False)
        self.head.weight.data = torch.tensor([[8.0], [-8.0]])

    def features(self, x: Tensor) -> list[Tensor]:
        upper = torch.zeros_like(x)
        upper[:, :, :8] = x[:, :, :8]
        return [torch.cat([upper, x - upper], dim=1)]

    def embed(self, features: list[Tensor]) -> Tensor:
        return features[-1][:, :1].mean(dim=(1, 2, 3))[:, None]


def test_a_heat_map_lies_where_the_network_looks() -> None:
    image = torch.rand(1, 1, 16, 16) * 0.2 + 0.8
    (found,) = heat_maps(Dark(), image, [0])
    assert found[:8].mean() > 2 * found[8:].mean()


@pytest.mark.parametrize("by", ["cam", "embedding"])
def test_show_trains_and_draws(by: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / f"{by}.png"
    given = ["show", "--by", by, "--benchmark", "digits(rows_per_class=12)", "--epochs", "1"]
    given += ["--model", "small_cnn(width=0.1)", "--method", "autodo", "--out", str(out)]
    assert run(given) == 0
    assert out.read_bytes()[:4] == b"\x89PNG"
    assert str(out) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--by", "cam"), "epochs: expected 1 or more by cam, which needs a trained network"),
        (("--by", "cam", "--epochs", "1", "--model", "mlp"), "no stage of the network has places"),
    ],
)
def test_what_cannot_be_drawn_is_told_before_training(
    options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(["show", *options, "--out", str(tmp_path / "x.png")]) == 2
    told = capsys.readouterr().err
    assert message in told and "epoch 1/1" not in told


def test_without_torchcam(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchcam.methods", None)
    monkeypatch.setitem(sys.modules, "torchcam", None)
    with pytest.raises(inside.UsageError, match="pip install torchcam"):
        heat_maps(models.build("small_cnn(width=0.1)", SPEC), torch.rand(1, 1, 16, 16), [0])


def test_points_are_of_the_features_before_the_head() -> None:
    torch.manual_seed(0)
    model = models.build("small_cnn(width=0.25)", SPEC).eval()
    assert isinstance(model, Model)
    from benchmarks.data.streams import rows_from_tensors

    x, y = torch.rand(20, 1, 16, 16), torch.eye(3)[torch.arange(20) % 3]
    index = np.array([1, 5, 7])
    features, said = inside._embedded(model, rows_from_tensors(x, y), index)
    with torch.no_grad():
        assert features == pytest.approx(model.embed(model.features(x[index])).numpy())
        assert np.array_equal(said, model(x[index]).argmax(1).numpy())
