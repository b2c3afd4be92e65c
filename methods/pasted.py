"""A policy as torchvision code that needs nothing of augbench."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from methods.autoaugment import (
    RANGES,
    SPACES,
    AutoAugment,
    Policy,
    policy_in,
    tables_of,
    warps_of,
)
from methods.randaugment import RandAugment, TrivialAugment, tables

DRAWN = """\
import math

import torch
from torchvision.transforms.v2 import functional as F


def apply(image, operation, value):
    \"\"\"One operation on a PIL image or a uint8 tensor (C, H, W).\"\"\"
    height, width = F.get_size(image)
    match operation:
        case "shear_x" | "shear_y":
            angle = math.degrees(math.atan(value))
            shear = [angle, 0.0] if operation == "shear_x" else [0.0, angle]
            return F.affine(image, 0.0, [0, 0], 1.0, shear, center=[0, 0])
        case "translate_x":
            return F.affine(image, 0.0, [@x, 0], 1.0, [0.0, 0.0])
        case "translate_y":
            return F.affine(image, 0.0, [0, @y], 1.0, [0.0, 0.0])
        case "rotate":
            return F.rotate(image, value)
        case "flip":
            return F.horizontal_flip(image)
        case "posterize":
            return F.posterize(image, int(value))
        case "solarize":
            return F.solarize(image, value)
        case "invert":
            return F.invert(image)
        case "autocontrast":
            return F.autocontrast(image)
        case "equalize":
            return F.equalize(image)
        case "brightness":
            return F.adjust_brightness(image, value)
        case "contrast":
            return F.adjust_contrast(image, value)
        case "color":
            return F.adjust_saturation(image, value)
        case "sharpness":
            return F.adjust_sharpness(image, value)
        case "cutout" if value > 0:
            side = value * width
            left = int(max(0, width - (width - 1) * float(torch.rand(())) - side / 2))
            top = int(max(0, height - (height - 1) * float(torch.rand(())) - side / 2))
            down = min(int(top + side) + 1, height) - top
            right = min(int(left + side) + 1, width) - left
            grey = [125, 123, 114] if F.get_num_channels(image) == 3 else [123]
            fill = torch.tensor(grey, dtype=torch.uint8)[:, None, None]
            return F.erase(image, top, left, down, right, fill)
    return image


class Policy:
    \"\"\"Applies @draws to each image, and each of its operations with its probability.

    The values of an operation are equally likely.
    \"\"\"

    def __init__(self, sub_policies, weights=None):
        self.sub_policies = sub_policies
        self.weights = torch.tensor(weights or [1.0] * len(sub_policies), dtype=torch.float)

    def __call__(self, image):
        for drawn in torch.multinomial(self.weights, @number, replacement=True).tolist():
            for operation, probability, values in self.sub_policies[drawn]:
                if float(torch.rand(())) < probability:
                    value = values[int(torch.randint(len(values), ()))]
                    image = apply(image, operation, value)
        return image

"""
WARPED = """\
import math

import torch

RANGES = torch.tensor([math.radians(30), 0.45, 0.45, 0.3, 0.3, math.log(1.5), math.log(1.5)])


class Policy:
    \"\"\"One warp per image, of float tensors (C, H, W) or (B, C, H, W).

    It is seven operations in one: rotate, translate_x, translate_y, shear_x, shear_y, scale_x and
    scale_y, each with its probability, by a normal amount whose standard deviation is its magnitude
    times its range. Put it after v2.ToDtype(torch.float32, scale=True).
    \"\"\"

    def __init__(self, probability, magnitude, weights=None):
        self.probability, self.magnitude = torch.tensor(probability), torch.tensor(magnitude)
        self.weights = torch.tensor(weights or [1.0] * len(probability), dtype=torch.float)

    def __call__(self, image):
        x = image if image.dim() == 4 else image[None]
        uniform, normal = torch.rand(len(x), 7), torch.randn(len(x), 7)
        drawn = torch.multinomial(self.weights, len(x), replacement=True)
        bit = uniform > 1 - self.probability[drawn]
        amounts = bit * self.magnitude[drawn] * normal * RANGES
        angle, right, down, shear_x, shear_y, log_x, log_y = amounts.unbind(1)
        cos, sin = angle.cos(), angle.sin()
        xx, xy = (cos - sin * shear_y) * log_x.exp(), (cos * shear_x - sin) * log_y.exp()
        yx, yy = (sin + cos * shear_y) * log_x.exp(), (sin * shear_x + cos) * log_y.exp()
        tall = x.shape[-2] / x.shape[-1]
        rows = [xx, xy * tall, 2 * right, yx / tall, yy, 2 * down]
        theta = torch.stack(rows, dim=1).view(-1, 2, 3)
        grid = torch.nn.functional.affine_grid(theta, list(x.shape), align_corners=False)
        x = torch.nn.functional.grid_sample(x, grid, align_corners=False)
        return x if image.dim() == 4 else x[0]

"""


def code(content: Mapping[str, Any]) -> str:
    """Python code that defines ``transform``, or ``transforms`` by class, from the content of a
    policy file."""
    known = _of_torchvision(content)
    if known:
        return f"from torchvision.transforms import v2\n\ntransform = {known}\n"
    policy = policy_in(content, "policy")
    write = _warps if policy.ranges == "autodo" else _sub_policies
    made = [write(policy, row) for row in range(max(1, policy.classes))]
    end = f"transform = {made[0]}\n"
    if policy.classes:
        inner = "".join(f"    {one},\n" for one in made)
        end = f"transforms = [  # by class: transforms[label](image)\n{inner}]\n"
    if policy.ranges == "autodo":
        return f"{WARPED}\n{end}"
    pixels = "value" if policy.ranges == "wide" else "value * @edge"
    pixels = f"int({pixels})" if policy.bins else pixels
    filled = {
        "@x": pixels.replace("@edge", "width"),
        "@y": pixels.replace("@edge", "height"),
        "@draws": "a sub-policy" if policy.draws == 1 else f"{policy.draws} sub-policies",
        "@number": str(policy.draws),
    }
    body = DRAWN
    for place, told in filled.items():
        body = body.replace(place, told)
    return f"{body}\n{end}"


def _of_torchvision(content: Mapping[str, Any]) -> str:
    """What torchvision has itself; empty if it is none of that."""
    if content == TrivialAugment().as_policy({}):
        return "v2.TrivialAugmentWide()"
    for name in ("cifar10", "svhn", "imagenet"):
        if content == AutoAugment(policy=name).as_policy({}):
            return f"v2.AutoAugment(v2.AutoAugmentPolicy.{name.upper()})"
    number = content.get("draws", 1)
    steps = {one[2] for each in content.get("sub_policies", ()) for one in each if len(one) > 2}
    for m in steps if len(steps) == 1 and content["ranges"] == "standard" else ():
        if content == RandAugment(n=number, m=m).as_policy({}):
            return f"v2.RandAugment(num_ops={number}, magnitude={m})"
    return ""


def _sub_policies(policy: Policy, row: int) -> str:
    """The call that makes the policy of a class."""
    space = SPACES.get(policy.ranges)
    settings = tables_of(policy.values, 1, 1).settings
    if space is not None:
        settings = tables(space, policy.bins, 1, 1).settings
    lines = []
    for column in _columns(policy, row):
        told = []
        for slot in policy.given[:, column].nonzero()[:, 0].tolist():
            code, index = int(policy.codes[slot, column]), int(policy.magnitude[slot, column])
            name, values = RANGES[policy.ranges][code], settings[:, code, index].tolist()
            if name.startswith("translate") and policy.ranges == "standard":
                share = 150 / 331 * index / (policy.bins - 1)  # in pixels it depends on the image
                values = [share, -share]
            shown = ", ".join(dict.fromkeys(f"{each + 0.0:.6g}" for each in values))
            shown = shown if policy.sized[slot, column] else "None"
            told.append(f'("{name}", {float(policy.probability[slot, column]):.6g}, [{shown}])')
        lines.append(f"    [{', '.join(told)}],\n")
    return f"Policy([\n{''.join(lines)}]{_weights(policy, row)})"


def _warps(policy: Policy, row: int) -> str:
    """The call that makes the policy of a class."""
    tables = (table[_columns(policy, row)].tolist() for table in warps_of(policy))
    told = (
        ", ".join(f"[{', '.join(f'{one:.6g}' for one in each)}]" for each in rows)
        for rows in tables
    )
    return f"Policy({', '.join(f'[{each}]' for each in told)}{_weights(policy, row)})"


def _columns(policy: Policy, row: int) -> list[int]:
    """The sub-policies of a class, without padding."""
    columns = range(row * policy.each, (row + 1) * policy.each)
    return [column for column in columns if policy.given[:, column].any()]


def _weights(policy: Policy, row: int) -> str:
    """The argument of that name, if the sub-policies of a class are not equally likely."""
    if policy.shares is None:
        return ""
    shares = policy.shares[row].tolist()
    each = [one - before for one, before in zip(shares, [0.0, *shares], strict=False)]
    kept = each[: len(_columns(policy, row))]
    return f", [{', '.join(f'{one:.6g}' for one in kept)}]"
