"""MedAugment: two or three operations per image, at most one of them on its values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from methods.base import ANYTHING, IMAGES, Batch, Context, Method, Spec, Task
from methods.functional import affine_warp, per_row, sent
from methods.randaugment import no_picture

PIXEL = ("brightness", "contrast", "posterize", "sharpen", "blur", "noise")
SPATIAL = (
    "rotate", "flip_horizontal", "flip_vertical", "scale", "shear_x", "shear_y", "translate_x",
    "translate_y",
)  # fmt: skip
OPERATIONS = PIXEL + SPATIAL
"""A code is an index into this tuple."""
(ROTATE, FLIP_HORIZONTAL, FLIP_VERTICAL, SCALE, SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y) = range(
    len(PIXEL), len(OPERATIONS)
)
BLUR, NOISE = PIXEL.index("blur"), PIXEL.index("noise")
IDLE = -1
STRATEGY = ((1, 2), (0, 3), (0, 2), (1, 1))
"""Pixel and spatial operations of each branch."""
MOST = 3
"""Operations of a row."""
KERNELS = (
    (0, 0, 16, 32, 16, 0, 0),
    (0, 4, 16, 24, 16, 4, 0),
    (2, 7, 14, 18, 14, 7, 2),
)
"""Gaussian kernels of OpenCV with 3, 5 and 7 pixels, times 64."""
REACH = 3
"""Pixels that the largest kernel reads beyond its own."""


class Drawn(NamedTuple):
    """The operations of each row, in order, on the CPU; both are (3, B)."""

    codes: Tensor
    """int64, or IDLE"""
    settings: Tensor
    """float64: a factor, bits, alpha, pixels, standard deviation, degrees or share of the edge"""


def ranges(level: int) -> Tensor:
    """(14, 2) float64: the smallest and largest setting of each operation at a level of 1 to 5.

    Of noise it is the variance in squared levels of 255, of blur the kernel size.
    """
    part = 0.04 * level
    made = {
        "brightness": (1 - part, 1 + part),
        "contrast": (1 - part, 1 + part),
        "posterize": (math.floor(8 - 0.8 * level),) * 2,
        "sharpen": (part, 0.1 * level),
        "blur": (3, 2 * (math.ceil(3 + 0.8 * level) // 2) + 1),
        "noise": (2 * level, 10 * level),
        "rotate": (-4 * level, 4 * level),
        "flip_horizontal": (0, 0),
        "flip_vertical": (0, 0),
        "scale": (1 - part, 1 + part),
        "shear_x": (0, 2 * level),
        "shear_y": (0, 2 * level),
        "translate_x": (0, 0.02 * level),
        "translate_y": (0, 0.02 * level),
    }
    rows = [made[name] for name in OPERATIONS]
    return torch.tensor(rows, dtype=torch.float64, device="cpu")


def settings_of(codes: Tensor, uniform: Tensor, level: int) -> Tensor:
    """Settings (*S) of operations ``codes`` (*S) from uniform numbers in [0, 1) (*S)."""
    low, high = ranges(level)[codes.clamp_min(0)].unbind(-1)
    made = low + uniform * (high - low)
    # An integer from low to high; the even ones become the odd ones above them.
    size = low + (uniform * (high - low + 1)).floor()
    made = torch.where(codes == BLUR, 2 * (size / 2).floor() + 1, made)
    return torch.where(codes == NOISE, made.sqrt() / 255, made)


def matrices_of(codes: Tensor, settings: Tensor, height: int, width: int) -> Tensor:
    """(*S, 3, 3) maps from output to input positions, as ``affine_warp`` takes the upper two rows.

    All but translations keep the centre of the image. Those of pixel operations are the identity.
    """

    def own(code: int) -> Tensor:
        return settings.masked_fill(codes != code, 0)

    angle, one = own(ROTATE) * (torch.pi / 180), torch.ones_like(settings)
    zoom = 1 / torch.where(codes == SCALE, settings, one)
    across = zoom * angle.cos() * torch.where(codes == FLIP_HORIZONTAL, -one, one)
    along = zoom * angle.cos() * torch.where(codes == FLIP_VERTICAL, -one, one)
    lean = -angle.sin() - (own(SHEAR_X) * (torch.pi / 180)).tan()
    rise = angle.sin() + (own(SHEAR_Y) * (torch.pi / 180)).tan()
    x, y = width / 2, height / 2
    right = x - across * x - lean * y - own(TRANSLATE_X) * width
    down = y - rise * x - along * y - own(TRANSLATE_Y) * height
    zero = torch.zeros_like(one)
    entries = [across, lean, right, rise, along, down, zero, zero, one]
    return torch.stack(entries, dim=-1).unflatten(-1, (3, 3))


def brightness(x: Tensor, factor: Tensor) -> Tensor:
    """Images (R, C, H, W) times a factor (R,)."""
    return x * per_row(factor, x)


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Distances from the image's mean grey value times a factor (R,)."""
    grey = x
    if x.shape[1] == 3:
        grey = 0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]
    mean = grey.mean(dim=(1, 2, 3), keepdim=True)
    return mean + per_row(factor, x) * (x - mean)


def posterize(x: Tensor, bits: Tensor) -> Tensor:
    """The highest ``bits`` (R,) of 8, of values rounded to 255 levels."""
    step = per_row((8 - bits).exp2(), x)
    return ((x * 255).round() / step).floor() * step / 255


def sharpen(x: Tensor, alpha: Tensor) -> Tensor:
    """Minus alpha (R,) times the Laplacian over eight neighbours, mirrored at the border."""
    neighbours = F.avg_pool2d(F.pad(x, [1] * 4, mode="reflect"), 3, stride=1) * 9
    return x + per_row(alpha, x) * (9 * x - neighbours)


def blur(x: Tensor, size: Tensor) -> Tensor:
    """Blur with a Gaussian kernel of ``size`` (R,) pixels, mirrored at the border."""
    bank = torch.tensor(KERNELS, dtype=x.dtype, device="cpu") / 64
    kernel = sent(bank, x.device)[((size - 3) / 2).long()]
    height, width = x.shape[-2:]
    padded = F.pad(x, [REACH] * 4, mode="reflect")
    taps = [(k, per_row(each, x)) for k, each in enumerate(kernel.unbind(1))]
    lines = torch.stack([tap * padded[:, :, k : k + height] for k, tap in taps]).sum(dim=0)
    return torch.stack([tap * lines[..., k : k + width] for k, tap in taps]).sum(dim=0)


def noise(x: Tensor, sigma: Tensor) -> Tensor:
    """Normal noise of standard deviation sigma (R,) in every value."""
    return x + per_row(sigma, x) * torch.randn_like(x)


ADJUST: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    brightness, contrast, posterize, sharpen, blur, noise,
)  # fmt: skip
"""By code; the results may leave [0, 1]."""


@torch.no_grad()
def perform(x: Tensor, drawn: Drawn) -> Tensor:
    """Images (B, C, H, W) in [0, 1] after the operations of each row; ``x`` is unchanged.

    Spatial operations that follow each other are one bilinear warp; outside is 0.
    """
    x = x.clone()
    maps = matrices_of(*drawn, *x.shape[-2:])
    pending = torch.eye(3, dtype=torch.float64, device="cpu").expand(len(x), 3, 3)
    moved = torch.zeros(len(x), dtype=torch.bool, device="cpu")

    def warp(rows: Tensor) -> None:
        if len(rows):
            place = sent(rows, x.device)
            warped = affine_warp(x[place], pending[rows, :2], "bilinear")
            x.index_copy_(0, place, warped)

    for codes, settings, matrix in zip(*drawn, maps, strict=True):
        pixel = (codes > IDLE) & (codes < ROTATE)
        warp((moved & pixel).nonzero()[:, 0])
        for code, adjust in enumerate(ADJUST):
            rows = (codes == code).nonzero()[:, 0]
            if len(rows):
                place, setting = sent(rows, x.device), sent(settings[rows].to(x.dtype), x.device)
                x.index_copy_(0, place, adjust(x[place], setting).clamp(0, 1))
        pending = torch.where(pixel[:, None, None], matrix, pending @ matrix)
        moved = (moved & ~pixel) | (codes >= ROTATE)
    warp(moved.nonzero()[:, 0])
    return x


def caption(code: int, setting: float) -> str:
    """An operation in words, such as "rotate -9.0°"; empty if it is idle."""
    if code == IDLE:
        return ""
    name = OPERATIONS[code].replace("_", " ")
    units = {
        "posterize": f" {setting:.0f} bits",
        "blur": f" {setting:.0f} px",
        "noise": f" {255 * setting:.1f} levels",
        "flip horizontal": "",
        "flip vertical": "",
        "rotate": f" {setting:.1f}°",
        "shear x": f" {setting:.1f}°",
        "shear y": f" {setting:.1f}°",
        "translate x": f" {100 * setting:.0f} %",
        "translate y": f" {100 * setting:.0f} %",
    }
    return name + units.get(name, f" {setting:.2f}")


class MedAugment(Method):
    """Apply two or three of 14 operations to each image, at most one of them to its values.

    Each row takes one of four branches at random: one pixel and two spatial operations, three
    spatial ones, two spatial ones, or one of each, drawn without replacement and in random order.
    Pixel operations are brightness, contrast, posterize, sharpen, Gaussian blur and noise; spatial
    ones are rotation, both flips, scaling, and shears and translations along x and y. ``level`` l
    from 1 to 5 sets how far all of them go (``ranges``), and the probability of each, 0.2 l: at 5
    all are applied. A share ``clean`` of the rows stays as it is.

    **Deviations.** From the authors' code at commit ac717b3 (C), read with albumentations 1.3.1. C
    writes four augmented copies of each training image, one by each branch, and the image itself to
    disk once, and trains on these files, in epochs five times as long; here each row is drawn
    afresh at every visit, ``clean`` is the share of unchanged files and the steps are those of
    every other row. (The authors' later online version, for segmentation, has no clean images.) C
    rounds to 255 levels after every operation, rounding down after brightness, contrast and noise,
    and interpolates in every spatial one; here nothing but posterize rounds, and consecutive
    spatial operations are one bilinear warp. C reads channels in the order blue, green, red, so its
    mean grey value weighs blue as red. C reads grey images as three channels with noise of their
    own; here a grey image has one.
    """

    kinds = IMAGES
    source = "Liu et al., MedAugment, arXiv:2306.17466"
    controls = ("unconstrained(upstream={self})",)
    space: ClassVar[Mapping[str, Any]] = {"level": ("int", 1, 5)}
    unconstrained: bool
    """Draw the operations from all 14; set by the control unconstrained."""

    def __init__(self, *, level: int = 5, clean: float = 0.2) -> None:
        super().__init__()
        if not 1 <= level <= 5:
            raise ValueError(f"level: expected a whole number from 1 to 5, got {level}")
        if not 0 <= clean <= 1:
            raise ValueError(f"clean: expected a share in [0, 1], got {clean}")
        self.level, self.clean, self.unconstrained = level, clean, False
        self._last: Drawn | None = None

    def supports(self, task: Task, spec: Spec) -> str:
        """Grey or RGB images that are large enough for the blur."""
        reason = super().supports(task, spec) or no_picture("medaugment", spec)
        if not reason and min(spec.shape[1:]) <= REACH:
            return f"medaugment needs images above {REACH} pixels, but these have {spec.shape[1:]}"
        return reason

    def draw(self, rows: int) -> Drawn:
        """Operations for ``rows`` images, from the CPU's global generator."""
        branch = torch.randint(len(STRATEGY), (rows,), device="cpu")
        pixel, spatial = torch.tensor(STRATEGY, device="cpu")[branch].T
        chance = torch.rand(len(OPERATIONS), rows, device="cpu")
        order = torch.rand(MOST, rows, device="cpu").argsort(dim=0)
        uniform = torch.rand(MOST, rows, dtype=torch.float64, device="cpu")
        applied = torch.rand(MOST, rows, device="cpu") < 0.2 * self.level
        changed = torch.rand(rows, device="cpu") >= self.clean
        if self.unconstrained:
            codes = chance.argsort(dim=0)[:MOST]
        else:
            of_pixel = chance[: len(PIXEL)].argsort(dim=0)
            of_space = chance[len(PIXEL) :].argsort(dim=0) + len(PIXEL)
            codes = torch.where(
                pixel > 0, torch.cat([of_pixel[:1], of_space[: MOST - 1]]), of_space[:MOST]
            )
        place = torch.arange(MOST, device="cpu")[:, None]
        codes = codes.masked_fill(place >= pixel + spatial, IDLE).gather(0, order)
        codes = codes.masked_fill(~(applied & changed), IDLE)
        return Drawn(codes, settings_of(codes, uniform, self.level))

    def augment(self, batch: Batch, ctx: Context) -> Batch:
        """Apply each row's operations; targets stay. No gradient reaches the incoming images."""
        self._last = self.draw(len(batch))
        return replace(batch, x=perform(batch.x, self._last))

    def captions(self) -> list[str]:
        """The operations on each row of the last batch, "rotate -9.0°, posterize 4 bits"."""
        if self._last is None:
            return []
        pairs = zip(*(part.T.tolist() for part in self._last), strict=True)
        return [
            ", ".join(filter(None, (caption(*each) for each in zip(*pair, strict=True))))
            or "unchanged"
            for pair in pairs
        ]


class Unconstrained(Method):
    """Draw as many operations as medaugment, but from all of its 14, pixel and spatial alike.

    Where medaugment beats this row, it gains by the rule of one pixel operation per image at most,
    or by more spatial and fewer pixel operations: with ``clean=0`` at level 5 a row here has on
    average 15/14 pixel operations (medaugment: 1/2) and 10/7 spatial ones (2), and 10 rows of 91
    have no spatial one (none). Branches, strengths and the share of clean rows are those of
    ``upstream``.
    """

    kinds = ANYTHING
    control = True

    def __init__(self, *, upstream: Method | None = None) -> None:
        super().__init__(upstream)
        if isinstance(upstream, MedAugment):
            upstream.unconstrained = True

    def supports(self, task: Task, spec: Spec) -> str:
        """Only medaugment."""
        if not isinstance(self.upstream, MedAugment):
            return "unconstrained needs upstream=medaugment, or medaugment(...) with its settings"
        return super().supports(task, spec)

    def augment(self, batch: Batch, ctx: Context) -> Batch:
        """The upstream's batch."""
        return self.upstream.augment(batch, ctx) if self.upstream is not None else batch
