"""ImageNet weights from torchvision, and weights in its layout."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from methods.own import import_torchvision

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""The colour normalisation of torchvision's networks."""


def load_imagenet(stem: nn.Module, stages: Iterable[nn.Module], name: str) -> None:
    """Copy torchvision's ImageNet weights, all but the head, into a stem and its stages.

    Both networks define their layers in the same order within each part, so tensors are matched
    by order, and every shape is checked.
    """
    torchvision = import_torchvision()
    try:
        donor = torchvision.models.get_model(name, weights="IMAGENET1K_V1")
    except OSError as error:
        raise ValueError(f"cannot fetch torchvision's {name} weights: {error}") from error
    groups = [([donor.conv1, donor.bn1], stem)]
    layers = (donor.layer1, donor.layer2, donor.layer3, donor.layer4)
    groups += [([layer], stage) for layer, stage in zip(layers, stages, strict=True)]
    for sources, goal in groups:
        given = [tensor for source in sources for tensor in source.state_dict().values()]
        wanted = list(goal.state_dict().values())
        if [tensor.shape for tensor in given] != [tensor.shape for tensor in wanted]:
            raise RuntimeError(f"torchvision's {name} has different layers from ours")
        with torch.no_grad():
            for target, tensor in zip(wanted, given, strict=True):
                target.copy_(tensor)


RENAMED = (
    (r"^conv1\.", "trunk.stem.0."),
    (r"^bn1\.", "trunk.stem.1."),
    (r"^fc\.", "head."),
    (r"^layer(\d)\.", lambda found: f"trunk.stages.{int(found[1]) - 1}."),
    (r"\.bn(\d)\.", r".norm\1."),
    (r"\.downsample\.", ".shortcut."),
)
"""Names in torchvision's ResNets, and in ours."""


def from_torchvision(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a torchvision ResNet by our names; empty if it is in another layout."""
    if "conv1.weight" not in state:
        return {}
    named = {}
    for name, tensor in state.items():
        for theirs, ours in RENAMED:
            name = re.sub(theirs, ours, name)  # noqa: PLW2901 - one after the other
        named[name] = tensor
    return named
