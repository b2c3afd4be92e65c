"""RandAugment's operations, flip and cutout with gradients in their magnitudes and in the images.

Every row has its own operation and its own amount: a share of the operation's range, with a sign
where RandAugment draws one. In the forward pass the result is that of ``randaugment``, which is
Pillow's. The gradient is that of a smooth surrogate, which ``straight`` attaches to it:

- warps: the bilinear warp by the same matrix, before translations are truncated to pixels;
- brightness, contrast, color and sharpness: the blend without the final rounding;
- posterize: the line between the results with the next lower and the next higher number of bits;
- solarize: each level turns over within ``RAMP`` levels of the threshold;
- cutout: a square that covers the pixels at its edge in part;
- invert, autocontrast, equalize, flip and identity have no magnitude, and no gradient in it.

In the image, the histogram of equalize, the darkest and brightest level of autocontrast and what
posterize drops count as constants, and rounding as the identity.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from methods.functional import affine_warp, per_row, sent
from methods.randaugment import (
    AUTOCONTRAST,
    BRIGHTNESS,
    COLOR,
    CONTRAST,
    CUTOUT,
    EQUALIZE,
    FILL,
    FLIP,
    GREY,
    IDENTITY,
    INVERT,
    NAMES,
    OPERATIONS,
    POSTERIZE,
    ROTATE,
    SHARPNESS,
    SHEAR_X,
    SHEAR_Y,
    SOLARIZE,
    TRANSLATE_X,
    TRANSLATE_Y,
    Interpolation,
    Space,
    recolour,
)

WARPS = (SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y, ROTATE, FLIP)
COLOURS = tuple(range(POSTERIZE, SHARPNESS + 1))
RAMP = 32.0
"""Levels over which the surrogate of solarize turns a level over."""
SIDE = 0.2
"""Side of the largest cutout, as a share of the image's width."""


def straight(exact: Tensor, smooth: Tensor) -> Tensor:
    """The value of ``exact`` with the gradient of ``smooth``, of the same shape."""
    return exact.detach() + (smooth - smooth.detach())


def settings(amounts: Tensor, space: Space, height: int, width: int) -> Tensor:
    """(..., P) settings of all P operations at ``amounts`` (..., P), not rounded.

    Tangent, pixels, degrees, bits that are kept, first level that is inverted, factor, or side of
    the cutout in pixels. Amounts are in [0, 1]; those of warps and blends in [-1, 1].
    """
    zero, span = torch.zeros(2, len(NAMES), dtype=torch.float64, device="cpu").unbind()
    span[[SHEAR_X, SHEAR_Y]] = space.shear
    for code, edge in ((TRANSLATE_X, width), (TRANSLATE_Y, height)):
        span[code] = 150.0 / 331.0 * edge if space.translate is None else space.translate
    span[ROTATE] = space.rotate
    zero[POSTERIZE], span[POSTERIZE] = 8, -space.posterize
    zero[SOLARIZE], span[SOLARIZE] = 255, -255
    zero[BRIGHTNESS : SHARPNESS + 1], span[BRIGHTNESS : SHARPNESS + 1] = 1, space.blend
    span[CUTOUT] = SIDE * width
    exact = torch.float32 if amounts.device.type == "mps" else torch.float64
    lines = sent(torch.stack([zero, span]).to(exact), amounts.device)
    return lines[0] + lines[1] * amounts.to(exact)


def every(
    x: Tensor, given: Tensor, centres: Tensor, interpolation: Interpolation = "nearest"
) -> Tensor:
    """(B, P, C, H, W): images (B, C, H, W) in [0, 1] after each of all P operations.

    ``given`` (B, P) are their ``settings``. ``centres`` (B, 2), column and row in [0, 1), are where
    cutouts lie; as in Fast AutoAugment, at 1 or more pixels from the left and the top.
    """
    rows = len(x)
    codes = sent(torch.tensor(WARPS, device="cpu"), x.device).repeat_interleave(rows)
    # Slices, as an index of numbers would be copied to the device.
    own = torch.cat([given[:, SHEAR_X : ROTATE + 1], given[:, FLIP:]], dim=1).T.flatten()
    warped = _warped(x.repeat(len(WARPS), 1, 1, 1), codes, own, interpolation)
    found = dict(zip(WARPS, warped.unflatten(0, (len(WARPS), rows)), strict=True))
    found |= dict(zip(COLOURS, _coloured(x, given), strict=True))
    found |= {IDENTITY: x, CUTOUT: _cut(x, given[:, CUTOUT], centres)}
    return torch.stack([found[code] for code in range(len(NAMES))], dim=1)


def chosen(
    x: Tensor,
    codes: Tensor,
    given: Tensor,
    centres: Tensor,
    interpolation: Interpolation = "nearest",
) -> Tensor:
    """Images (B, C, H, W) in [0, 1], each after its own operation ``codes`` (B,), on the device.

    All operations are computed on all rows, so that no code has to be read; arguments as in
    ``every``.
    """
    own = given.gather(1, codes[:, None])[:, 0]
    warps = (codes > IDENTITY) & (codes <= ROTATE) | (codes == FLIP)
    out = torch.where(per_row(warps, x), _warped(x, codes, own, interpolation), x)
    out = torch.where(per_row(codes == CUTOUT, x), _cut(x, own, centres), out)
    colours = _coloured(x, given)
    place = (codes - POSTERIZE).clamp(0, len(COLOURS) - 1)
    row = torch.arange(len(x), device=x.device)
    coloured = (codes >= POSTERIZE) & (codes <= SHARPNESS)
    return torch.where(per_row(coloured, x), colours[place, row], out)


def _matrices(codes: Tensor, own: Tensor, height: int, width: int) -> Tensor:
    """(B, 2, 3) of each row's operation with the setting ``own`` (B,); the identity if no warp."""

    def only(code: int, value: Tensor | float, other: Tensor | float = 0.0) -> Tensor:
        return torch.where(codes == code, value, other)

    angle = own * (torch.pi / 180)
    # Rounded as in Pillow, so that a quarter turn has zeros.
    cos, sin = (straight(each.round(decimals=15), each) for each in (angle.cos(), angle.sin()))
    x, y = width / 2, height / 2
    one = torch.ones_like(own)
    xx = only(ROTATE, cos, only(FLIP, -one, one))
    xy = only(SHEAR_X, own, only(ROTATE, -sin))
    yx = only(SHEAR_Y, own, only(ROTATE, sin))
    yy = only(ROTATE, cos, one)
    right = only(ROTATE, cos * -x - sin * -y + x, only(TRANSLATE_X, -own, only(FLIP, width * one)))
    down = only(ROTATE, sin * -x + cos * -y + y, only(TRANSLATE_Y, -own))
    return torch.stack([torch.stack([xx, xy, right], 1), torch.stack([yx, yy, down], 1)], dim=1)


def _warped(x: Tensor, codes: Tensor, own: Tensor, interpolation: Interpolation) -> Tensor:
    """Each image after the warp ``codes`` (B,) with the setting ``own`` (B,)."""
    matrix = _matrices(codes, own, *x.shape[-2:])
    with torch.no_grad():
        shifts = (codes == TRANSLATE_X) | (codes == TRANSLATE_Y)
        whole = torch.where(shifts[:, None, None], matrix.trunc(), matrix)
        exact = affine_warp(x, whole, interpolation)
    return straight(exact, affine_warp(x, matrix, "bilinear")) if _followed(x, own) else exact


def _coloured(x: Tensor, given: Tensor) -> Tensor:
    """(n, B, C, H, W): each row after each of the n colour operations, with ``given`` (B, P)."""
    with torch.no_grad():
        levels = x.float().mul(255).round_()
        parameters = given[:, POSTERIZE : SHARPNESS + 1].T.clone()
        # As recolour takes them: posterize divides by a power of two, solarize and invert turn over
        # the levels above an integer.
        parameters[0].round_().neg_().add_(8).exp2_()
        parameters[SOLARIZE - POSTERIZE].ceil_().sub_(1)
        parameters[INVERT - POSTERIZE] = -1
        exact = _recoloured(levels, parameters)
    if not _followed(x, given):
        return exact.div_(255).to(x.dtype)
    with torch.no_grad():
        dull = _recoloured(levels, torch.zeros_like(parameters)).to(x.dtype)
    held = straight(levels.to(x.dtype), 255 * x)
    smooth = []
    for code, rest in zip(COLOURS, dull, strict=True):
        setting = per_row(given[:, code].to(x.dtype), x)
        if code in BLENDS:
            base = straight(rest, BLENDS[code](held))
            smooth.append((base + setting * (held - base)).clamp(0, 255))
        else:
            smooth.append(SURROGATES[code](held, setting))
    return straight(exact.to(x.dtype), torch.stack(smooth)) / 255


def _recoloured(levels: Tensor, parameters: Tensor) -> Tensor:
    """(n, B, C, H, W) levels, integers in float32, after the n colour operations."""
    rows = len(levels)
    made = levels.repeat(len(COLOURS), 1, 1, 1)
    sizes = [rows * (code in COLOURS) for code in range(len(OPERATIONS))]
    recolour(made, parameters.flatten().float(), sizes)
    return made.unflatten(0, (len(COLOURS), rows))


def _posterized(levels: Tensor, bits: Tensor) -> Tensor:
    """Linear between the neighbouring numbers of bits; what is dropped is constant in the image."""
    low, plain = bits.detach().floor().clamp_max(7), levels.detach()
    below, above = (plain.div(step).floor() * step for step in ((8 - low).exp2(), (7 - low).exp2()))
    return levels - plain + below + (above - below) * (bits - low)


def _solarized(levels: Tensor, start: Tensor) -> Tensor:
    """Each level turns over while the threshold passes the ``RAMP`` levels around it."""
    plain = levels.detach()
    over = ((plain - start) / RAMP + 0.5).clamp(0, 1)
    sign = torch.where(plain >= start.detach().ceil(), -1.0, 1.0)
    return sign * (levels - plain) + plain + (255 - 2 * plain) * over


def _stretched(levels: Tensor, _: Tensor) -> Tensor:
    """Autocontrast, as if the darkest and the brightest level were constants."""
    low, high = (
        reduce(levels.detach(), dim=(2, 3), keepdim=True) for reduce in (torch.amin, torch.amax)
    )
    return levels * torch.where(high > low, 255 / (high - low).clamp_min(1), 1.0)


def _luma(levels: Tensor) -> Tensor:
    """(B, C, H, W) grey values, without rounding."""
    if levels.shape[1] == 1:
        return levels
    weights = sent(torch.tensor((19595, 38470, 7471), device="cpu") / 65536, levels.device)
    grey = (levels * weights.to(levels.dtype).view(3, 1, 1)).sum(dim=1, keepdim=True)
    return grey.expand_as(levels)


def _mean(levels: Tensor) -> Tensor:
    return _luma(levels).mean(dim=(2, 3), keepdim=True).expand_as(levels)


def _smooth(levels: Tensor) -> Tensor:
    """Means over 3 x 3 pixels with weight 5 in the centre; borders are unchanged."""
    if min(levels.shape[-2:]) < 3:
        return levels
    inner = F.avg_pool2d(levels, 3, stride=1) * (9 / 13) + levels[..., 1:-1, 1:-1] * (4 / 13)
    return F.pad(inner - levels[..., 1:-1, 1:-1], (1, 1, 1, 1)) + levels


SURROGATES: dict[int, Callable[[Tensor, Tensor], Tensor]] = {
    POSTERIZE: _posterized,
    SOLARIZE: _solarized,
    INVERT: lambda levels, _: 255 - levels,
    AUTOCONTRAST: _stretched,
    EQUALIZE: lambda levels, _: levels,
}
"""Levels (B, C, H, W) and settings (B, 1, 1, 1) to levels."""
BLENDS: dict[int, Callable[[Tensor], Tensor]] = {
    BRIGHTNESS: torch.zeros_like,
    CONTRAST: _mean,
    COLOR: _luma,
    SHARPNESS: _smooth,
}
"""What a factor of 0 leaves of levels (B, C, H, W)."""


def _cut(x: Tensor, side: Tensor, centres: Tensor) -> Tensor:
    """Images with a square of ``side`` (B,) pixels painted over, in whole pixels as Pillow does."""
    side = side.to(x.dtype)
    across, down = (
        _covered(size, side, centres[:, axis].to(x.dtype))
        for axis, size in enumerate((x.shape[-1], x.shape[-2]))
    )
    colour = torch.tensor(FILL if x.shape[1] == 3 else (GREY,), device="cpu") / 255
    colour = sent(colour, x.device).to(x.dtype).view(-1, 1, 1)
    painted = []
    for rows, columns in zip(down, across, strict=True):
        share = (rows[:, :, None] * columns[:, None, :])[:, None]
        painted.append(x * (1 - share) + colour * share)
    exact, smooth = painted
    return straight(exact, smooth) if _followed(x, side) else exact


def _covered(size: int, side: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """(B, size) share of each pixel of a line that the square covers: 0 or 1, and smooth."""
    pixel = torch.arange(size, dtype=side.dtype, device=side.device)
    start = (size + (1 - size) * centre - side / 2).clamp_min(0)[:, None]
    end = (start + side[:, None]).clamp_max(size)
    smooth = (torch.minimum(end, pixel + 1) - torch.maximum(start, pixel)).clamp(0, 1)
    first = start.floor()
    last = (first + side[:, None]).clamp_max(size)
    inside = (pixel >= first) & (pixel <= last) & (side[:, None] > 0)
    return inside.to(side.dtype), smooth


def _followed(*given: Tensor) -> bool:
    """Whether a gradient may be asked for."""
    return torch.is_grad_enabled() and any(each.requires_grad for each in given)
