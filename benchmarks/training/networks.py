"""Networks that take images in [0, 1] and normalise inside; every part is open to methods."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.training import weights as files
from benchmarks.training.imagenet import MEAN, STD, from_torchvision, load_imagenet
from benchmarks.training.tabular import Columns, saint
from methods.base import Model, Spec
from methods.branches import on_branch

Activation = Literal["relu", "celu"]
NORMALISATION = ("mean", "std")
"""Buffers of ``Normalize``."""


class Normalize(nn.Module):
    """Shift and scale images from [0, 1]: (x - mean) / std, channel by channel.

    Both are saved with the weights. Weights that were saved without them leave them as they are.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *others: Any, **more: Any
    ) -> None:
        for name in NORMALISATION:
            state_dict.setdefault(prefix + name, self.get_buffer(name))
        super()._load_from_state_dict(state_dict, prefix, *others, **more)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        return (x - self.mean) / self.std


class Trunk(nn.Module):
    """Normalisation, a stem, and stages one after the other."""

    def __init__(self, normalize: nn.Module, stem: nn.Module, stages: list[nn.Module]) -> None:
        super().__init__()
        self.normalize = normalize
        self.stem = stem
        self.stages = nn.ModuleList(stages)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Output of each stage for images (B, C, H, W) in [0, 1]."""
        x = self.stem(self.normalize(x))
        outputs = []
        for stage in self.stages:
            x = stage(x)
            outputs.append(x)
        return outputs


class StagedModel(Model):
    """A trunk, what follows its last stage, average pooling and a linear head."""

    def __init__(self, trunk: Trunk, head: nn.Linear, last: nn.Module | None = None) -> None:
        super().__init__()
        self.trunk = trunk
        self.last = last or nn.Identity()
        self.head = head

    def forward(self, x: Tensor, branch: int = 0) -> Tensor:
        """Logits (B, K); ``branch`` 1 uses the second set of normalisation layers, if any."""
        if branch == 0:
            return super().forward(x)
        with on_branch(self, branch):
            return super().forward(x)

    def embed(self, features: list[Tensor]) -> Tensor:
        """(B, D): the last stage, averaged over the image."""
        return F.adaptive_avg_pool2d(self.last(features[-1]), 1).flatten(1)


class Perceptron(Model):
    """Fully connected layers and a linear head."""

    def __init__(self, trunk: Trunk, head: nn.Linear) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head

    def entered(self, x: Tensor) -> Tensor:
        """Columns of categories as their embeddings; images as they are."""
        stem = self.trunk.get_submodule("stem")
        return stem(x) if isinstance(stem, Columns) else x

    def embed(self, features: list[Tensor]) -> Tensor:
        """(B, D): the last layer."""
        return features[-1]


def _act(activation: Activation) -> nn.Module:
    return nn.ReLU(inplace=True) if activation == "relu" else nn.CELU(inplace=True)


def _conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016, Fig. 2)."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, activation: Activation) -> None:
        super().__init__()
        self.conv1, self.norm1 = _conv(inputs, width, 3, stride), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = _conv(width, width, 3), nn.BatchNorm2d(width)
        self.act = _act(activation)
        self.shortcut = _shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, width, H / stride, W / stride)."""
        out = self.act(self.norm1(self.conv1(x)))
        return self.act(self.norm2(self.conv2(out)) + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut, four times as wide at the end (Fig. 5)."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, activation: Activation) -> None:
        super().__init__()
        self.conv1, self.norm1 = _conv(inputs, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = _conv(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.norm3 = _conv(width, 4 * width, 1), nn.BatchNorm2d(4 * width)
        self.act = _act(activation)
        self.shortcut = _shortcut(inputs, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, 4 width, H / stride, W / stride)."""
        out = self.act(self.norm1(self.conv1(x)))
        out = self.act(self.norm2(self.conv2(out)))
        return self.act(self.norm3(self.conv3(out)) + self.shortcut(x))


class PreActivationBlock(nn.Module):
    """Normalise, activate, convolve, twice (Zagoruyko and Komodakis 2016, Fig. 1)."""

    def __init__(self, inputs: int, width: int, stride: int, activation: Activation) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), _conv(inputs, width, 3, stride)
        self.norm2, self.conv2 = nn.BatchNorm2d(width), _conv(width, width, 3)
        self.act = _act(activation)
        changes = stride != 1 or inputs != width
        self.shortcut = _conv(inputs, width, 1, stride) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, width, H / stride, W / stride)."""
        out = self.act(self.norm1(x))
        short = x if self.shortcut is None else self.shortcut(out)
        return self.conv2(self.act(self.norm2(self.conv1(out)))) + short


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


def _stages(
    block: Callable[..., nn.Module],
    expansion: int,
    inputs: int,
    widths: list[int],
    depths: list[int],
    activation: Activation,
) -> list[nn.Module]:
    stages = []
    for number, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        blocks = []
        for position in range(depth):
            stride = 2 if number and not position else 1
            blocks.append(block(inputs, width, stride, activation))
            inputs = width * expansion
        stages.append(nn.Sequential(*blocks))
    return stages


def _width(base: int, width: float) -> int:
    if width <= 0:
        raise ValueError(f"width: expected a multiplier above 0, got {width}")
    return max(1, round(base * width))


def half(channels: int) -> Normalize:
    """[0, 1] to [-1, 1], MedMNIST's own normalisation."""
    return Normalize((0.5,) * channels, (0.5,) * channels)


def _resnet(
    depths: list[int],
    block: type[BasicBlock] | type[Bottleneck],
    spec: Spec,
    *,
    width: float = 1.0,
    activation: Activation = "relu",
    weights: str = "none",
) -> StagedModel:
    channels, size = spec.shape[0], min(spec.shape[1:])
    widths = [_width(base, width) for base in (64, 128, 256, 512)]
    small = size < 64
    stem = [_conv(channels, widths[0], 3) if small else _conv(channels, widths[0], 7, 2)]
    stem += [nn.BatchNorm2d(widths[0]), _act(activation)]
    stem += [] if small else [nn.MaxPool2d(3, stride=2, padding=1)]
    stages = _stages(block, block.expansion, widths[0], widths, depths, activation)
    trunk = Trunk(half(channels), nn.Sequential(*stem), stages)
    model = StagedModel(trunk, nn.Linear(widths[-1] * block.expansion, spec.classes))
    if weights == "imagenet":
        if small or width != 1 or channels != 3:
            raise ValueError(
                "weights=imagenet needs 3 channels, images of 64 pixels or more and width 1, got "
                f"{channels} channels, {size} pixels, width {width}"
            )
        load_imagenet(trunk.stem, trunk.stages, "resnet18" if block is BasicBlock else "resnet50")
        trunk.normalize = Normalize(MEAN, STD)
    elif weights != "none":
        given = files.plain(files.read(weights))
        translated = from_torchvision(given)
        files.copy_into(model, translated or given, "head", weights)
        if translated and channels == 3:
            trunk.normalize = Normalize(MEAN, STD)
    return model


def resnet18(
    spec: Spec,
    *,
    width: float = 1.0,
    activation: Activation = "relu",
    weights: str = "none",
) -> StagedModel:
    """ResNet-18; 3x3 stem below 64 pixels, ImageNet's stem at 64 and above.

    ``weights``: ``imagenet`` fetches torchvision's; a file is in torchvision's layout, whose
    normalisation it then has, or in that of ``--save-model``, with its own. A head of other classes
    is left out.

    Source: He et al., CVPR 2016, arXiv:1512.03385; the small stem as in MedMNIST's experiments.
    """
    depths = [2, 2, 2, 2]
    return _resnet(depths, BasicBlock, spec, width=width, activation=activation, weights=weights)


def resnet50(
    spec: Spec,
    *,
    width: float = 1.0,
    activation: Activation = "relu",
    weights: str = "none",
) -> StagedModel:
    """ResNet-50; 3x3 stem below 64 pixels, ImageNet's stem at 64 and above.

    ``weights`` as in ``resnet18``.

    Source: He et al., CVPR 2016, arXiv:1512.03385; the small stem as in MedMNIST's experiments.
    """
    depths = [3, 4, 6, 3]
    return _resnet(depths, Bottleneck, spec, width=width, activation=activation, weights=weights)


def wrn28_10(spec: Spec, *, width: float = 1.0, activation: Activation = "relu") -> StagedModel:
    """WRN-28-10, pre-activation, no dropout; ``width`` multiplies the factor of ten.

    Source: Zagoruyko and Komodakis, Wide Residual Networks, BMVC 2016, arXiv:1605.07146.
    """
    channels = spec.shape[0]
    widths = [_width(base, width) for base in (160, 320, 640)]
    stages = _stages(PreActivationBlock, 1, 16, widths, [4, 4, 4], activation)
    trunk = Trunk(half(channels), _conv(channels, 16, 3), stages)
    last = nn.Sequential(nn.BatchNorm2d(widths[-1]), _act(activation))
    return StagedModel(trunk, nn.Linear(widths[-1], spec.classes), last)


def small_cnn(spec: Spec, *, width: float = 1.0, activation: Activation = "relu") -> StagedModel:
    """Three 3x3 convolutions (32, 64, 128 channels) with BatchNorm, for quick studies on a CPU.

    Source: ours.
    """
    channels, stages = spec.shape[0], []
    inputs = channels
    for number, base in enumerate((32, 64, 128)):
        outputs = _width(base, width)
        layers = [_conv(inputs, outputs, 3, 2 if number else 1), nn.BatchNorm2d(outputs)]
        stages.append(nn.Sequential(*layers, _act(activation)))
        inputs = outputs
    return StagedModel(
        Trunk(half(channels), nn.Identity(), stages), nn.Linear(inputs, spec.classes)
    )


def mlp(
    spec: Spec,
    *,
    layers: int = 2,
    width: float = 1.0,
    dropout: float = 0.0,
    norm: bool = False,
    activation: Activation = "relu",
) -> Perceptron:
    """Hidden layers of 128 on the pixels of an image, of 256 on the columns of a table.

    ``norm`` adds batch normalisation to each, ``dropout`` drops a share of their values. Categories
    have embeddings.

    Source: ours; two layers of 256 on tables as in Ding et al., SAFLEX, ICLR 2024, section 5.
    """
    if layers < 1:
        raise ValueError(f"layers: expected a whole number above 0, got {layers}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: expected a number in [0, 1), got {dropout}")
    inputs, stem, base = math.prod(spec.shape), nn.Flatten(), 128
    normalize: nn.Module = nn.Identity()
    if spec.kind == "image":
        normalize = half(spec.shape[0])
    else:
        stem, base = Columns(spec.categories, inputs), 256
        inputs = stem.width
    stages: list[nn.Module] = []
    for _ in range(layers):
        outputs = _width(base, width)
        parts = [nn.Linear(inputs, outputs)]
        parts += [nn.BatchNorm1d(outputs)] if norm else []
        parts += [_act(activation)]
        parts += [nn.Dropout(dropout)] if dropout else []
        stages.append(nn.Sequential(*parts))
        inputs = outputs
    trunk = Trunk(normalize, stem, stages)
    return Perceptron(trunk, nn.Linear(inputs, spec.classes))


MODELS: dict[str, Callable[..., Model]] = {
    "resnet18": resnet18,
    "resnet50": resnet50,
    "wrn28_10": wrn28_10,
    "small_cnn": small_cnn,
    "mlp": mlp,
    "saint": saint,
}
VECTORS = frozenset({"mlp", "saint"})
"""The networks that take tables."""
IMAGES = frozenset(MODELS) - {"saint"}
"""The networks that take images."""
