"""Weights that were trained on ImageNet, from torchvision."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""What torchvision's networks normalise colours by."""
_OPERATORS: list[torch.library.Library] = []
"""A declaration lives as long as its object."""


def import_torchvision() -> Any:
    """torchvision, also where its wheel was built for another torch.

    PyPI's wheel does not import beside a CPU build of torch, because the operators of its C++
    library are not there. Two of them are then declared without an implementation, after which
    networks and transforms work and ``torchvision.ops.nms`` raises. Declaring them up front would
    collide with a working pair, so that is done only after the import has failed.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    _OPERATORS.append(torch.library.Library("torchvision", "DEF"))
    for name in ("nms", "qnms"):
        signature = f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        _OPERATORS[0].define(signature)
    return importlib.import_module("torchvision")


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
            raise RuntimeError(f"torchvision's {name} has other layers than ours")
        with torch.no_grad():
            for target, tensor in zip(wanted, given, strict=True):
                target.copy_(tensor)
