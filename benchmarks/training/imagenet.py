"""ImageNet weights from torchvision."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

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
