"""RandAugment and TrivialAugment, and what AutoAugment shares: drawn per row, computed per batch.

Operations equal Pillow's as torchvision calls them. Colour operations work on integer levels
0..255, as Pillow's do: they first round 255 x, so their results are multiples of 1/255; rows
without a colour operation are not rounded. Consecutive geometric operations of a row become one
warp by the product of their matrices (``affine_warp``): no pixel is rounded twice, and a later
operation may bring back what an earlier one moved out of the image. Outside pixels are black.
``interpolation`` applies to the warp: "nearest" is torchvision's default and equals Pillow's result
pixel for pixel; "bilinear" is that of ``grid_sample``, which fades to black over half a pixel,
where Pillow repeats the border. On single-channel images "color" is the identity by definition.

Draws come from the CPU's global generator even if the images are on another device: each row's
operations are known in advance, so nothing waits for the device. Magnitudes may be on the device,
where they are never read: operations alone decide which rows are computed together.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from itertools import accumulate, pairwise
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from methods.base import IMAGES, Batch, Context, Method, Spec, Task, named
from methods.functional import affine_warp, per_row, sent

Interpolation = Literal["nearest", "bilinear"]

OPERATIONS = (
    "identity",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "rotate",
    "posterize",
    "solarize",
    "invert",
    "autocontrast",
    "equalize",
    "brightness",
    "contrast",
    "color",
    "sharpness",
)
"""A code is an index into this tuple: geometric operations first, then colour, then blends."""
IDENTITY, SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y, ROTATE = range(6)
POSTERIZE, SOLARIZE, INVERT, AUTOCONTRAST, EQUALIZE, BRIGHTNESS, CONTRAST, COLOR, SHARPNESS = range(
    6, 15
)
NAMES = (*OPERATIONS, "cutout", "flip")
"""All operations of policies, by code."""
CUTOUT, FLIP = len(OPERATIONS), len(OPERATIONS) + 1
SIGNED = (SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y, ROTATE, *range(BRIGHTNESS, SHARPNESS + 1))
PUBLISHED = tuple(code for code, name in enumerate(OPERATIONS) if name != "invert")
"""The 14 operations of RandAugment and TrivialAugment."""
UNSIZED = (IDENTITY, INVERT, AUTOCONTRAST, EQUALIZE, FLIP)
"""Operations without a magnitude."""
COLOUR = (IDENTITY, AUTOCONTRAST, EQUALIZE, INVERT, COLOR, SHARPNESS)
"""AutoDO's subset: geometry is left to the learned warps."""


FILL = (125.0, 123.0, 114.0)
"""Levels of a cutout: the mean colour of ImageNet, as in Fast AutoAugment."""
GREY = 123.0
"""Its luma, the level in a grey image."""


class Space(NamedTuple):
    """The largest magnitude of each kind of operation. At the smallest, solarize inverts only level
    255 and all other operations are the identity."""

    shear: float
    """Tangent of the angle."""
    translate: float | None
    """Pixels; None: 150/331 of the edge."""
    rotate: float
    """Degrees."""
    blend: float
    """How far a factor is from 1."""
    posterize: int
    """Bits removed."""


STANDARD = Space(shear=0.3, translate=None, rotate=30.0, blend=0.9, posterize=4)
WIDE = Space(shear=0.99, translate=32.0, rotate=135.0, blend=0.99, posterize=6)


class Tables(NamedTuple):
    """Parameters of the operations for one image size, by sign, code and magnitude."""

    settings: Tensor
    """(2, operations, bins) float64: tangent, pixels, degrees, bits, level or factor."""
    matrices: Tensor
    """(2, operations, bins, 2, 3) float64, as ``affine_warp`` takes them."""


@cache
def tables_on(device: torch.device, space: Space, bins: int, height: int, width: int) -> Tables:
    """The same tables on a device; in float32 if it has no float64."""
    kind = torch.float32 if device.type == "mps" else torch.float64
    return Tables(*(sent(each.to(kind), device) for each in tables(space, bins, height, width)))


@cache
def tables(space: Space, bins: int, height: int, width: int) -> Tables:
    """Settings and matrices as torchvision computes them, on the CPU; index 1 has the negative
    sign."""
    reach_x = 150.0 / 331.0 * width if space.translate is None else space.translate
    reach_y = 150.0 / 331.0 * height if space.translate is None else space.translate

    def between(first: float, last: float) -> Tensor:  # torchvision's magnitudes are float32
        return torch.linspace(first, last, bins, dtype=torch.float32, device="cpu").double()

    steps = torch.arange(bins, dtype=torch.float32, device="cpu")
    one = torch.zeros(len(OPERATIONS), bins, dtype=torch.float64, device="cpu")
    one[[SHEAR_X, SHEAR_Y]] = between(0, space.shear)
    one[TRANSLATE_X] = between(0, reach_x).trunc()
    one[TRANSLATE_Y] = between(0, reach_y).trunc()
    one[ROTATE] = between(0, space.rotate)
    one[POSTERIZE] = 8 - (steps / ((bins - 1) / space.posterize)).round().double()
    one[SOLARIZE] = between(255, 0)
    one[BRIGHTNESS : SHARPNESS + 1] = between(0, space.blend)
    settings = torch.stack([one, one])
    settings[1, list(SIGNED)] *= -1
    settings[:, BRIGHTNESS : SHARPNESS + 1] += 1

    codes = torch.arange(len(OPERATIONS), device="cpu")[:, None]
    matrices = geometry(codes.expand_as(settings), settings, height, width)
    return Tables(settings, matrices)


def geometry(codes: Tensor, settings: Tensor, height: int, width: int) -> Tensor:
    """Matrices (*S, 2, 3) of operations ``codes`` (*S) with ``settings`` (*S), for ``affine_warp``.

    Float64, on the CPU. Those of operations that are not geometric are the identity.
    """

    def own(code: int) -> Tensor:
        return settings.masked_fill(codes != code, 0)

    angle = own(ROTATE) * (torch.pi / 180)
    # Rounded as in Pillow, so that a quarter turn has zeros; it turns counter-clockwise.
    cos, sin = angle.cos().round(decimals=15), angle.sin().round(decimals=15)
    x, y = width / 2, height / 2
    right = cos * -x - sin * -y + x - own(TRANSLATE_X)
    down = sin * -x + cos * -y + y - own(TRANSLATE_Y)
    flip = codes == FLIP
    xx, right = cos.masked_fill(flip, -1), right.masked_fill(flip, width)
    rows = [xx, own(SHEAR_X) - sin, right, sin + own(SHEAR_Y), cos, down]
    return torch.stack(rows, dim=-1).unflatten(-1, (2, 3))


def caption(code: int, setting: float) -> str:
    """An operation in words, such as "rotate -9.0°"."""
    name, setting = NAMES[code].replace("_", " "), setting + 0.0  # no -0.0
    if code == CUTOUT:
        return f"cutout {setting:.1f} px"
    if code in UNSIZED:
        return name
    if code in (SHEAR_X, SHEAR_Y):
        return f"{name} {setting:.2f}"
    if code in (TRANSLATE_X, TRANSLATE_Y):
        return f"{name} {setting:.0f} px"
    if code == ROTATE:
        return f"{name} {setting:.1f}°"
    if code == POSTERIZE:
        return f"{name} {setting:.0f} bits"
    if code == SOLARIZE:
        return f"{name} {setting:.0f}"
    return f"{name} {setting:.2f}"


def captions(codes: Tensor, settings: Tensor) -> list[str]:
    """The operations on each row, in order, from ``codes`` and ``settings`` (n, B)."""
    return [
        ", ".join(caption(*each) for each in zip(*pair, strict=True) if each[0] != IDENTITY)
        or "identity"
        for pair in zip(codes.T.tolist(), settings.T.tolist(), strict=True)
    ]


def no_picture(name: str, spec: Spec) -> str:
    """Why a method cannot work on data that are no grey or RGB images; else empty."""
    if spec.shape[0] not in (1, 3):
        return f"{name} needs grey or RGB images, but these have {spec.shape[0]} channels"
    return ""


class Drawn(NamedTuple):
    """The operations drawn for each row; all are (n, B) int64, in order."""

    codes: Tensor
    """On the CPU."""
    magnitude: Tensor
    """Index into the tables' magnitudes, on the CPU or with the images."""
    negative: Tensor
    """0 or 1, the sign, on the CPU."""


class PerRow(Method):
    """An augmentation that draws a sequence of operations per row."""

    kinds = IMAGES

    def __init__(
        self,
        space: Space,
        bins: int,
        interpolation: Interpolation,
        upstream: Method | None = None,
    ) -> None:
        super().__init__(upstream)
        self.magnitudes, self.bins = space, bins
        self.interpolation: Interpolation = interpolation
        self._last: tuple[Tensor, Tensor] | None = None

    @abstractmethod
    def draw(self, rows: int) -> Drawn:
        """Draw operations for ``rows`` images from the CPU's global generator."""

    def centres(self, drawn: Drawn) -> Tensor | None:
        """(2, n, B) in [0, 1), drawn too: column and row of the centre of a cutout, if there can
        be one."""
        return None

    def tables(self, device: torch.device, height: int, width: int) -> Tables:
        """What the operations do to images of this size."""
        return tables_on(device, self.magnitudes, self.bins, height, width)

    def supports(self, task: Task, spec: Spec) -> str:
        """Images of one or three channels."""
        return super().supports(task, spec) or no_picture(named(self), spec)

    def augment(self, batch: Batch, ctx: Context) -> Batch:
        """Apply each row's operations; targets stay. No gradient reaches the incoming images."""
        return replace(batch, x=self.applied(batch.x, self.draw(len(batch))))

    def applied(self, x: Tensor, drawn: Drawn) -> Tensor:
        """Images (B, C, H, W) after the operations drawn for them."""
        channels, height, width = x.shape[1:]
        centres = self.centres(drawn)
        codes, magnitude, negative = drawn
        if channels == 1:
            codes = codes.masked_fill(codes == COLOR, IDENTITY)
        all_settings, all_matrices = self.tables(magnitude.device, height, width)
        _, kinds, bins = all_settings.shape
        place = sent(negative * kinds + codes, magnitude.device) * bins + magnitude
        settings = all_settings.take(place)
        boxes = None if centres is None else boxes_of(centres, settings, height, width)
        stages = schedule(codes, settings, all_matrices.flatten(0, 2)[place], boxes)
        self._last = codes, settings
        return perform(x, stages, self.interpolation)

    def captions(self) -> list[str]:
        """The operations on each row of the last batch, "rotate -9.0°, posterize 7 bits"."""
        return [] if self._last is None else captions(*self._last)


class RandAugment(PerRow):
    """Apply ``n`` operations to each image, drawn uniformly, all with magnitude ``m`` of 30.

    ``ops`` "all" are the paper's 14 operations. "colour" are those that AutoDO combines with its
    learned geometry: identity, autocontrast, equalize, invert, color and sharpness.

    **Deviations.** Magnitudes are torchvision's, whose 31 steps span the paper's ranges: shears,
    rotations, translations (150/331 of the edge) and the factors of color, contrast, brightness and
    sharpness (from 1 to 0.1 or to 1.9) have a random sign. AutoDO's own code draws each magnitude
    uniformly up to m, and the factors of color and sharpness between 0.1 and 0.1 + 1.8 m / 30.
    """

    source = "Cubuk et al., RandAugment, NeurIPS 2020, arXiv:1909.13719"
    space: ClassVar[Mapping[str, Any]] = {"m": ("int", 1, 15)}

    def __init__(
        self,
        *,
        n: int = 2,
        m: int = 9,
        ops: Literal["all", "colour"] = "all",
        interpolation: Interpolation = "nearest",
    ) -> None:
        super().__init__(STANDARD, 31, interpolation)
        if n < 1:
            raise ValueError(f"n: expected 1 operation or more, got {n}")
        if not 0 <= m <= 30:
            raise ValueError(f"m: expected a magnitude from 0 to 30, got {m}")
        self.n, self.m = n, m
        self.ops = torch.tensor({"all": PUBLISHED, "colour": COLOUR}[ops], device="cpu")

    def draw(self, rows: int) -> Drawn:
        """Operations and signs."""
        codes = self.ops[torch.randint(len(self.ops), (self.n, rows), device="cpu")]
        negative = torch.randint(2, (self.n, rows), device="cpu")
        return Drawn(codes, torch.full_like(codes, self.m), negative)

    def as_policy(self, learned: Mapping[str, Any]) -> dict[str, Any]:
        """Each operation is a sub-policy, of which n are drawn."""
        draws = {"draws": self.n} if self.n > 1 else {}
        each = [[always(code, self.m)] for code in self.ops.tolist()]
        return {"ranges": "standard", **draws, "sub_policies": each}


class TrivialAugment(PerRow):
    """Apply one operation to each image, drawn uniformly, with a uniform magnitude from 0 to 30.

    ``space`` "wide" is the paper's wide space as in torchvision, "standard" is RandAugment's.

    **Deviations.** As in torchvision, translations in the wide space are up to 32 pixels whatever
    the image size.
    """

    source = "Müller & Hutter, TrivialAugment, ICCV 2021, arXiv:2103.10158"

    def __init__(
        self,
        *,
        space: Literal["wide", "standard"] = "wide",
        interpolation: Interpolation = "nearest",
    ) -> None:
        super().__init__({"wide": WIDE, "standard": STANDARD}[space], 31, interpolation)
        self.ranges = space
        self.ops = torch.tensor(PUBLISHED, device="cpu")

    def draw(self, rows: int) -> Drawn:
        """Operations, magnitudes and signs."""
        codes = self.ops[torch.randint(len(self.ops), (1, rows), device="cpu")]
        magnitude = torch.randint(31, (1, rows), device="cpu")
        negative = torch.randint(2, (1, rows), device="cpu")
        return Drawn(codes, magnitude, negative)

    def as_policy(self, learned: Mapping[str, Any]) -> dict[str, Any]:
        """Each operation with each magnitude is a sub-policy."""
        steps = {code: [0] if code in UNSIZED else range(31) for code in self.ops.tolist()}
        each = [[always(code, step)] for code, own in steps.items() for step in own]
        weights = [31 // len(own) for own in steps.values() for _ in own]
        return {"ranges": self.ranges, "sub_policies": each, "weights": weights}


def always(code: int, step: int) -> list[Any]:
    """An operation as policy files have it, with probability 1."""
    return [OPERATIONS[code], 1.0, *([] if code in UNSIZED else [step])]


class Warp(NamedTuple):
    """Rows that are warped together."""

    rows: Tensor
    matrix: Tensor
    """(R, 2, 3), as ``affine_warp`` takes it."""


class Colour(NamedTuple):
    """Rows with colour operations in one stage, grouped by operation."""

    rows: Tensor
    """(R,); the first stage lists the whole batch, rows without a colour operation first."""
    parameters: Tensor
    """(P,) float32 of the last P rows, those with a colour operation."""
    sizes: list[int]
    """Number of rows per operation, by code."""
    boxes: Tensor | None
    """(R, 4) of the last rows, those with a cutout; None if there is none."""


def boxes_of(centres: Tensor, side: Tensor, height: int, width: int) -> Tensor:
    """(n, B, 4) first and last column, first and last row of the boxes that cutout fills.

    ``centres`` (2, n, B) in [0, 1) and ``side`` (n, B) in pixels; a side of 0 gives an empty box.
    As in the code of Fast AutoAugment: the centre is at 1 or more pixels from the left and the top,
    the first pixel is rounded down, and a box has one pixel more than its side, rounded down.
    """
    size = torch.tensor([width, height], dtype=torch.float64, device="cpu").view(2, 1, 1)
    first = (size + (1 - size) * centres - side / 2).clamp_min(0).trunc()
    last = torch.minimum(first + side, size).trunc()
    last = torch.where(side > 0, last, -1.0)
    return torch.stack([first[0], last[0], first[1], last[1]], dim=-1).long()


def schedule(
    codes: Tensor, settings: Tensor, matrices: Tensor, boxes: Tensor | None = None
) -> list[Warp | Colour]:
    """Group the operations into stages that preserve the order within every row.

    ``codes`` and ``settings`` are (n, B), ``matrices`` (n, B, 2, 3): the identity if an operation
    is not geometric; ``boxes`` (n, B, 4), if there are cutouts. The first stage is a colour stage,
    if only to list the rows. Codes, boxes and the rows of a stage are on the CPU; settings and
    matrices may be elsewhere, and are not read.

    Two slots share one warp, after the colour operations of the first and before those of the
    second: it covers the geometric operations of both, and so every consecutive run within a row.
    """
    geometric = (codes > IDENTITY) & (codes <= ROTATE) | (codes == FLIP)
    colour = (codes > ROTATE) & ~geometric
    # Rows whose next operation after a slot, ignoring identities, is also geometric.
    goes_on = [torch.zeros_like(geometric[0])]
    for slot in range(len(codes) - 1, 0, -1):
        goes_on.append(geometric[slot] | (goes_on[-1] & ~colour[slot]))

    def colours(slot: int, rest: bool = False) -> Colour:
        return _colour(codes[slot], settings[slot], None if boxes is None else boxes[slot], rest)

    stages: list[Warp | Colour] = [colours(0, rest=True)]
    waiting, pending = geometric[0], matrices[0]
    for slot, later in enumerate(reversed(goes_on)):
        first = slot % 2 == 0
        if slot:
            if first:
                stages.append(colours(slot))
            composed = _compose(pending, matrices[slot])
            held = sent(waiting, matrices.device)[:, None, None]
            pending = torch.where(held, composed, matrices[slot])
            waiting = waiting | geometric[slot]
        if not first or slot == len(codes) - 1:
            now = (waiting & ~(later & ~colour[slot])).nonzero()[:, 0]
            stages.append(Warp(now, pending[sent(now, pending.device)]))
            waiting = waiting & later & ~colour[slot]
        if not first:
            stages.append(colours(slot))
    return [stage for stage in stages if len(stage.rows)]


def _compose(first: Tensor, second: Tensor) -> Tensor:
    """(B, 2, 3) for the operation ``first`` followed by ``second``."""
    product = first[..., :2] @ second
    product[..., 2] += first[..., 2]
    return product


def _colour(codes: Tensor, settings: Tensor, boxes: Tensor | None, rest: bool) -> Colour:
    codes = codes.masked_fill(codes == FLIP, IDENTITY)
    sizes = codes.bincount(minlength=CUTOUT + 1).tolist()
    idle = sum(sizes[:POSTERIZE])
    order = codes.argsort(stable=True)
    rows = order[idle:]
    parameters = settings[sent(rows, settings.device)]
    # Posterize divides by a power of two. Solarize inverts integer levels from its setting on, that
    # is, those above the largest integer below it; invert is the same with setting 0.
    posterize, solar = sizes[POSTERIZE], sum(sizes[POSTERIZE : INVERT + 1])
    parameters[:posterize].neg_().add_(8).exp2_()
    parameters[posterize:solar].ceil_().sub_(1)
    cut = boxes[order[len(order) - sizes[CUTOUT] :]] if boxes is not None else None
    return Colour(order if rest else rows, parameters.float(), sizes, cut)


def perform(x: Tensor, stages: list[Warp | Colour], interpolation: Interpolation) -> Tensor:
    """Images (B, C, H, W) in [0, 1] after the ``stages``, without a graph; ``x`` is unchanged."""
    # Every stage appends its rows to a pool: reading rows by index is fast, writing them is not.
    spans = list(pairwise(accumulate([len(stage.rows) for stage in stages], initial=0)))
    position = torch.arange(len(x), device="cpu")
    sources = []
    for stage, (start, end) in zip(stages, spans, strict=True):
        sources.append(position[stage.rows])
        position[stage.rows] = torch.arange(start, end, device="cpu")
    index = sent(torch.cat([*sources, position]), x.device)
    size = len(index) - len(x)
    with torch.inference_mode():  # a sixth faster than no_grad for some hundred small operations
        pool = x.new_empty(size, *x.shape[1:])
        for stage, (start, end) in zip(stages, spans, strict=True):
            rows, part = index[start:end], pool[start:end]
            source = pool[:start] if start else x
            if isinstance(stage, Warp):
                part.copy_(affine_warp(source.index_select(0, rows), stage.matrix, interpolation))
            else:
                torch.index_select(source, 0, rows, out=part)
                coloured = part[len(part) - len(stage.parameters) :]
                levels = coloured.float().mul_(255).round_()
                recolour(levels, sent(stage.parameters, x.device), stage.sizes)
                if stage.boxes is not None:
                    cut_out(levels[len(levels) - len(stage.boxes) :], sent(stage.boxes, x.device))
                coloured.copy_(levels).div_(255)
    return pool.index_select(0, index[size:])  # outside, so that it can be part of a graph


def recolour(levels: Tensor, parameters: Tensor, sizes: list[int]) -> None:
    """Apply colour operations in place to levels 0..255 (R, C, H, W), integers in float32.

    ``parameters`` (R,) and ``sizes`` are as in ``Colour``. The results equal Pillow's.
    """
    parameters = per_row(parameters, levels)

    def rows(first: int, last: int) -> slice:
        return slice(sum(sizes[POSTERIZE:first]), sum(sizes[POSTERIZE : last + 1]))

    def some(code: int) -> slice | None:
        return rows(code, code) if sizes[code] else None

    if where := some(POSTERIZE):
        levels[where].div_(parameters[where]).floor_().mul_(parameters[where])
    if sizes[SOLARIZE] + sizes[INVERT]:
        where = rows(SOLARIZE, INVERT)
        # |level - 255| where the level is above the parameter; torch.where takes ten times as long.
        above = (levels[where] - parameters[where]).clamp_(0, 1)
        levels[where].sub_(above.mul_(255)).abs_()
    if where := some(AUTOCONTRAST):
        _autocontrast(levels[where])
    if where := some(EQUALIZE):
        _equalize(levels[where])
    if not sum(sizes[BRIGHTNESS:CUTOUT]):
        return
    # Pillow's blend: dull + factor * (level - dull) in float32, clipped to 0..255, rounded down.
    dull: list[tuple[slice, Tensor]] = []
    if sizes[CONTRAST] + sizes[COLOR]:
        grey = _grey(levels[rows(CONTRAST, COLOR)])
        if where := some(CONTRAST):
            dull.append((where, _mean(grey[: sizes[CONTRAST]])))
        if where := some(COLOR):
            dull.append((where, grey[sizes[CONTRAST] :]))
    if where := some(SHARPNESS):
        dull.append((where, _smooth(levels[where])))
    for where, other in dull:
        levels[where].sub_(other)
    blends = rows(BRIGHTNESS, SHARPNESS)
    levels[blends].mul_(parameters[blends])
    for where, other in dull:
        levels[where].add_(other)
    levels[blends].clamp_(0, 255).floor_()


def cut_out(levels: Tensor, boxes: Tensor) -> None:
    """Fill boxes (R, 4), as ``boxes_of`` gives them, of levels (R, C, H, W) in place."""
    first_x, last_x, first_y, last_y = boxes.view(-1, 4, 1, 1, 1).unbind(dim=1)
    column = torch.arange(levels.shape[3], device=levels.device)
    row = torch.arange(levels.shape[2], device=levels.device).view(-1, 1)
    inside = (column >= first_x) & (column <= last_x) & (row >= first_y) & (row <= last_y)
    fill = torch.tensor(FILL if levels.shape[1] == 3 else (GREY,), dtype=levels.dtype, device="cpu")
    levels.copy_(torch.where(inside, sent(fill, levels.device).view(1, -1, 1, 1), levels))


def _grey(levels: Tensor) -> Tensor:
    """(R, 1, H, W) rounded luma, as Pillow's mode "L"; sums stay below 2^24, exact in float32."""
    if levels.shape[1] == 1:
        return levels.clone()
    red, green, blue = levels.split(1, dim=1)
    luma = (red * 19595).add_(green, alpha=38470).add_(blue, alpha=7471)
    return luma.add_(32768).mul_(2**-16).floor_()


def _mean(grey: Tensor) -> Tensor:
    """(R, 1, 1, 1) means, rounded half up."""
    count = grey.shape[-2] * grey.shape[-1]
    total = grey.sum(dim=(2, 3), keepdim=True).add_(count / 2)
    return total.div_(count, rounding_mode="floor")


def _smooth(levels: Tensor) -> Tensor:
    """Rounded means over 3 x 3 pixels with weight 5 in the centre; borders are unchanged."""
    smooth = levels.clone()
    height, width = levels.shape[-2:]
    if min(height, width) < 3:
        return smooth
    # Sums along the flat tensor are wrong only at the ends of lines, which are unused borders.
    flat = levels.view(-1)
    lines = (flat[: -2 * width] + flat[width:-width]).add_(flat[2 * width :])
    total = (lines[:-2] + lines[1:-1]).add_(lines[2:]).add_(flat[width + 1 : -width - 1], alpha=4)
    # A sum of integers is never 6.5 from a multiple of 13: no ties, however float32 rounds.
    total.add_(6.5).div_(13).floor_()
    inner = smooth[..., 1:-1, 1:-1]
    inner.copy_(total.as_strided(inner.shape, smooth.stride()))
    return smooth


def _autocontrast(levels: Tensor) -> None:
    """Stretch each channel to 0..255; a channel with a single level stays unchanged."""
    # Pillow rounds float64 results down, where a 255 may be 254.99999.
    exact = torch.float32 if levels.device.type == "mps" else torch.float64
    low = levels.amin(dim=(2, 3), keepdim=True).to(exact)
    high = levels.amax(dim=(2, 3), keepdim=True).to(exact)
    flat = low == high
    reach = (high - low).masked_fill_(flat, 255)
    scale = torch.full_like(reach, 255).div_(reach)  # scalar / tensor is rounded twice
    offset = low.masked_fill(flat, 0) * scale
    levels.copy_(levels.to(exact).mul_(scale).sub_(offset).clamp_(0, 255).floor_())


def _equalize(levels: Tensor) -> None:
    """Equalise each channel's histogram by Pillow's integer table; too few pixels: unchanged."""
    index = levels.flatten(2).int().long()  # in two steps, because long() alone is slower
    counts = levels.new_zeros(*index.shape[:2], 256)
    counts.scatter_add_(2, index, counts.new_ones(index.shape))
    others = index.shape[2] - counts.gather(2, index.amax(dim=2, keepdim=True))
    step = others.div_(255, rounding_mode="floor")
    below = counts.cumsum(dim=2).sub_(counts).add_(step.mul(0.5).floor_())
    table = below.div_(step.clamp_min(1)).floor_().clamp_max_(255)
    same = torch.arange(256, dtype=table.dtype, device=table.device)
    table.add_((same - table).mul_((step < 1).to(table.dtype)))
    levels.copy_(table.gather(2, index).view_as(levels))
