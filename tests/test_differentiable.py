"""Operations with gradients: their values against RandAugment's and Pillow's, their gradients
against finite differences of the surrogates, written out here a second time in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from methods import differentiable
from methods.differentiable import (
    COLOURS,
    CUTOUT,
    FILL,
    FLIP,
    GREY,
    NAMES,
    RAMP,
    WARPS,
    chosen,
    every,
    settings,
    straight,
)
from methods.functional import affine_warp
from methods.randaugment import (
    AUTOCONTRAST,
    BRIGHTNESS,
    COLOR,
    CONTRAST,
    EQUALIZE,
    IDENTITY,
    INVERT,
    OPERATIONS,
    POSTERIZE,
    ROTATE,
    SHARPNESS,
    SHEAR_X,
    SHEAR_Y,
    SIGNED,
    SOLARIZE,
    STANDARD,
    TRANSLATE_X,
    TRANSLATE_Y,
    WIDE,
    Space,
    perform,
    schedule,
    tables,
)

BINS = 31
ROWS, HEIGHT, WIDTH = 5, 12, 10


def images(channels: int = 3, dtype: torch.dtype = torch.float32, levels: int = 256) -> Tensor:
    """Noise, a ramp, a constant and an image of few levels; whole levels."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randint(0, levels, (ROWS, channels, HEIGHT, WIDTH), generator=rng)
    x[1] = torch.linspace(0, 255, HEIGHT * WIDTH).view(HEIGHT, WIDTH).round().long()
    x[2] = 90
    x[3] = x[3] // 64 * 40 + 20
    return x.to(dtype) / 255


def spread(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rounded(given: Tensor) -> Tensor:
    """Settings as RandAugment has them: whole pixels and bits."""
    made, shifts = given.clone(), [TRANSLATE_X, TRANSLATE_Y]
    made[:, shifts] = made[:, shifts].trunc()
    made[:, POSTERIZE] = made[:, POSTERIZE].round()
    made[:, [IDENTITY, INVERT, AUTOCONTRAST, EQUALIZE]] = 0
    return made


@pytest.mark.parametrize("space", [STANDARD, WIDE], ids=["standard", "wide"])
@pytest.mark.parametrize("followed", [False, True], ids=["plain", "with gradients"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
def test_the_value_is_that_of_randaugment(
    interpolation: Any, channels: int, followed: bool, space: Space
) -> None:
    """At all 31 magnitudes, with both signs, to the last bit; its settings are float32."""
    cells = [(s, n, i) for s in range(BINS) for n in (0, 1) for i in range(ROWS)]
    step, negative, which = torch.tensor(cells).T
    x = images(channels)[which]
    amounts = (step.double() / (BINS - 1))[:, None].repeat(1, len(NAMES))
    amounts[:, list(SIGNED)] *= (1 - 2 * negative)[:, None]
    given = settings(amounts, space, HEIGHT, WIDTH)
    known, matrices = tables(space, BINS, HEIGHT, WIDTH)
    theirs = known[negative, :, step]
    away = (rounded(given[:, : len(OPERATIONS)]) - theirs).abs()
    # In float32, half of 32 pixels is just below 16, and so 15.
    away[:, [TRANSLATE_X, TRANSLATE_Y]] *= (step != 15)[:, None]
    assert float(away.max()) < 1e-4
    given = torch.cat([theirs, given[:, len(OPERATIONS) :]], dim=1).requires_grad_(followed)
    ours = every(x, given, torch.zeros(len(x), 2), interpolation).detach()
    for code in range(len(OPERATIONS)):
        codes = torch.full((1, len(x)), code)
        stages = schedule(codes, theirs[None, :, code], matrices[negative, code, step][None])
        truth = perform(x, stages, interpolation)
        if interpolation == "bilinear" and code in WARPS:
            assert torch.allclose(ours[:, code], truth, rtol=0, atol=2e-6)
        else:
            assert torch.equal(ours[:, code], truth), NAMES[code]


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
@pytest.mark.parametrize("followed", [False, True])
def test_a_chosen_operation_is_that_of_all(interpolation: Any, followed: bool) -> None:
    codes = torch.arange(len(NAMES)).repeat(2)
    x = spread((len(codes), 3, HEIGHT, WIDTH), dtype=torch.float32)
    amounts = (2 * spread((len(codes), len(NAMES)), 1) - 1).requires_grad_(followed)
    given, centres = settings(amounts, STANDARD, HEIGHT, WIDTH), spread((len(codes), 2), 2)
    one = chosen(x, codes, given, centres, interpolation)
    all_of_them = every(x, given, centres, interpolation)
    assert torch.equal(one, all_of_them[torch.arange(len(codes)), codes])
    if followed:
        towards = spread(tuple(x.shape), 3, torch.float32)
        (ours,) = torch.autograd.grad((one * towards).sum(), amounts, retain_graph=True)
        picked = all_of_them[torch.arange(len(codes)), codes]
        (theirs,) = torch.autograd.grad((picked * towards).sum(), amounts)
        assert torch.allclose(ours, theirs)
        assert (ours.abs().sum(dim=1) > 0).sum() > len(codes) / 2


def test_flip_and_cutout_equal_pillow() -> None:
    x = images(3, levels=250)
    size = 255 * x
    sides = torch.linspace(0, 1, 7, dtype=torch.float64)
    for amount in sides:
        for seed in range(6):
            centres = spread((ROWS, 2), seed)
            given = settings(amount.expand(ROWS, len(NAMES)), STANDARD, HEIGHT, WIDTH)
            ours = (every(x, given, centres) * 255).round()
            for row in range(ROWS):
                array = size[row].round().to(torch.uint8).permute(1, 2, 0).numpy()
                mirrored = np.asarray(ImageOps.mirror(Image.fromarray(array))).copy()
                assert torch.equal(ours[row, FLIP], torch.from_numpy(mirrored).permute(2, 0, 1))
                image, side = Image.fromarray(array), float(given[row, CUTOUT])
                if side > 0:
                    edges = torch.tensor([WIDTH, HEIGHT])
                    across, down = (edges + (1 - edges) * centres[row]).tolist()
                    left, top = (int(max(0, each - side / 2)) for each in (across, down))
                    corner = min(WIDTH, left + side), min(HEIGHT, top + side)
                    fill = tuple(map(int, FILL))
                    ImageDraw.Draw(image).rectangle((left, top, *corner), fill)
                drawn = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
                assert torch.equal(ours[row, CUTOUT], drawn.float()), (side, centres[row])


def test_cutout_in_a_grey_image_has_the_luma_of_its_colour() -> None:
    assert Image.new("RGB", (1, 1), tuple(map(int, FILL))).convert("L").getpixel((0, 0)) == GREY
    given = settings(torch.ones(ROWS, len(NAMES)), STANDARD, HEIGHT, WIDTH)
    cut = every(images(1), given, torch.full((ROWS, 2), 0.5))[:, CUTOUT]
    assert float(255 * cut[0, 0, HEIGHT // 2, WIDTH // 2]) == pytest.approx(GREY)


def test_straight_has_the_value_of_one_and_the_gradient_of_the_other() -> None:
    a = (1e4 * spread((50,), dtype=torch.float32)).requires_grad_()
    exact = a.round()
    made = straight(exact, a.sin())
    assert torch.equal(made, exact)
    (gradient,) = torch.autograd.grad(made.sum(), a)
    assert torch.equal(gradient, a.detach().cos())


# The surrogates, written a second time: level images (C, H, W) in 0..255 and one setting each.


def blend(dull: Callable[[Tensor], Tensor]) -> Callable[[Tensor, float], Tensor]:
    return lambda level, f: (dull(level) + f * (level - dull(level))).clamp(0, 255)


def luma(level: Tensor) -> Tensor:
    if len(level) == 1:
        return level
    red, green, blue = level.long()
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) // 65536).double()[None]


def smoothed(level: Tensor) -> Tensor:
    out = level.clone()
    for row in range(1, HEIGHT - 1):
        for column in range(1, WIDTH - 1):
            part = level[:, row - 1 : row + 2, column - 1 : column + 2]
            total = part.sum(dim=(1, 2)) + 4 * level[:, row, column]
            out[:, row, column] = (total / 13 + 0.5).floor()
    return out


def kept(level: Tensor, bits: int) -> Tensor:
    return (level.long() >> (8 - bits) << (8 - bits)).double()


def posterized(level: Tensor, bits: float) -> Tensor:
    low = min(int(bits), 7)
    return kept(level, low) + (bits - low) * (kept(level, low + 1) - kept(level, low))


def solarized(level: Tensor, start: float) -> Tensor:
    over = ((level - start + RAMP / 2) / RAMP).clamp(0, 1)
    return (1 - over) * level + over * (255 - level)


SETTING: dict[int, Callable[[float], float]] = {
    SHEAR_X: lambda a: 0.3 * a,
    SHEAR_Y: lambda a: 0.3 * a,
    TRANSLATE_X: lambda a: 150 / 331 * WIDTH * a,
    TRANSLATE_Y: lambda a: 150 / 331 * HEIGHT * a,
    ROTATE: lambda a: 30 * a,
    POSTERIZE: lambda a: 8 - 4 * a,
    SOLARIZE: lambda a: 255 * (1 - a),
    **dict.fromkeys((BRIGHTNESS, CONTRAST, COLOR, SHARPNESS), lambda a: 1 + 0.9 * a),
    CUTOUT: lambda a: 0.2 * WIDTH * a,
}
SMOOTH: dict[int, Callable[[Tensor, float], Tensor]] = {
    BRIGHTNESS: blend(torch.zeros_like),
    CONTRAST: blend(lambda level: (luma(level).mean() + 0.5).floor()),
    COLOR: blend(luma),
    SHARPNESS: blend(smoothed),
    POSTERIZE: posterized,
    SOLARIZE: solarized,
}
MATRICES: dict[int, Callable[[float], list[list[float]]]] = {
    SHEAR_X: lambda s: [[1, s, 0], [0, 1, 0]],
    SHEAR_Y: lambda s: [[1, 0, 0], [s, 1, 0]],
    TRANSLATE_X: lambda s: [[1, 0, -s], [0, 1, 0]],
    TRANSLATE_Y: lambda s: [[1, 0, 0], [0, 1, -s]],
    ROTATE: lambda s: turned(np.deg2rad(s)),
}


def turned(angle: float) -> list[list[float]]:
    """A turn about the centre, as Pillow's own formula has it."""
    c, s, x, y = np.cos(angle), np.sin(angle), WIDTH / 2, HEIGHT / 2
    return [[c, -s, x - c * x + s * y], [s, c, y - s * x - c * y]]


def surrogate(code: int, x: Tensor, setting: float, centre: Tensor) -> Tensor:
    """(C, H, W) in [0, 1] of one image."""
    if code in MATRICES:
        matrix = torch.tensor([MATRICES[code](setting)], dtype=x.dtype)
        return affine_warp(x[None], matrix, "bilinear")[0]
    if code == CUTOUT:
        parts = []
        for at, size in zip(centre.tolist(), (WIDTH, HEIGHT), strict=True):
            start = max(0.0, size + (1 - size) * at - setting / 2)
            end = min(float(size), start + setting)
            lengths = [max(0.0, min(end, p + 1) - max(start, p)) for p in range(size)]
            parts.append(torch.tensor(lengths, dtype=x.dtype))
        share = parts[1][:, None] * parts[0]
        colour = torch.tensor(FILL if len(x) == 3 else (GREY,), dtype=x.dtype).view(-1, 1, 1) / 255
        return x + share * (colour - x)
    return SMOOTH[code]((255 * x).round(), setting) / 255


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("code", [*MATRICES, *SMOOTH, CUTOUT], ids=lambda code: NAMES[code])
def test_the_gradient_is_that_of_the_surrogate(
    code: int, channels: int, interpolation: Any
) -> None:
    x, towards = images(channels, torch.float64), spread((ROWS, channels, HEIGHT, WIDTH), 5)
    amounts = (0.37 + 0.1 * spread((ROWS, len(NAMES)), 6)).requires_grad_()
    centres = 0.2 + 0.6 * spread((ROWS, 2), 7)
    made = every(x, settings(amounts, STANDARD, HEIGHT, WIDTH), centres, interpolation)
    (gradient,) = torch.autograd.grad((made[:, code] * towards).sum(), amounts)
    step, truth = 1e-6, torch.zeros(ROWS, dtype=torch.float64)
    for row in range(ROWS):
        for sign in (1, -1):
            setting = SETTING[code](float(amounts[row, code].detach()) + sign * step)
            image = surrogate(code, x[row], setting, centres[row])
            truth[row] += sign * (image * towards[row]).sum() / (2 * step)
    assert torch.allclose(gradient[:, code], truth, rtol=1e-5, atol=1e-6)
    assert (channels == 1 and code == COLOR) or float(truth.abs().max()) > 1e-3
    gradient[:, code] = 0
    assert not gradient.any(), "an operation depends on its own amount alone"


def test_what_has_no_magnitude_has_no_gradient_in_it() -> None:
    amounts = spread((ROWS, len(NAMES))).requires_grad_()
    given = settings(amounts, STANDARD, HEIGHT, WIDTH)
    made = every(images(), given, torch.zeros(ROWS, 2))
    without = [IDENTITY, INVERT, AUTOCONTRAST, EQUALIZE, FLIP]
    (gradient,) = torch.autograd.grad(made[:, without].sum(), amounts)
    assert not gradient.any()


def through(code: int, x: Tensor, amount: float, towards: Tensor, interpolation: Any) -> Tensor:
    """Gradient in the image of one operation."""
    leaf = x.clone().requires_grad_()
    amounts = torch.full((len(x), len(NAMES)), amount, dtype=torch.float64)
    given = settings(amounts, STANDARD, *x.shape[-2:])
    made = every(leaf, given, torch.full((len(x), 2), 0.4), interpolation)[:, code]
    (gradient,) = torch.autograd.grad((made * towards).sum(), leaf)
    return gradient


@pytest.mark.parametrize("code", [*MATRICES, *SMOOTH, CUTOUT], ids=lambda code: NAMES[code])
def test_what_is_linear_or_rounded_passes_its_gradient_to_the_image(code: int) -> None:
    """By finite differences of the exact operation, over many levels, so that rounding averages
    out; a factor below 1, so that nothing is cut off; posterize is the identity by definition."""
    amount = -0.4 if code in SIGNED else 0.3
    x, towards = images(3, torch.float64), spread((ROWS, 3, HEIGHT, WIDTH), 5)
    if code == POSTERIZE:
        assert torch.allclose(through(code, x, amount, towards, "bilinear"), towards)
        return
    along = 0.3 * (spread(tuple(x.shape), 8) - 0.5)
    x = 0.3 + 0.4 * x
    gradient = through(code, x, amount, towards, "bilinear")
    if code == SOLARIZE:  # which pixels turn over stays
        over = (255 * x).round() >= 255 * 0.7
        assert torch.allclose(gradient, torch.where(over, -towards, towards))
        return
    if code in SMOOTH:
        dull = {
            BRIGHTNESS: lambda v: 0 * v,
            CONTRAST: lambda v: flat(v).mean(dim=(2, 3), keepdim=True),
            COLOR: flat,
            SHARPNESS: soft,
        }[code]
        f = 1 + STANDARD.blend * amount

        def exact(v: Tensor) -> Tensor:
            return dull(v) + f * (v - dull(v))
    else:

        def exact(v: Tensor) -> Tensor:
            centre = torch.tensor([0.4, 0.4])
            return torch.stack([surrogate(code, each, SETTING[code](amount), centre) for each in v])

    change = (exact(x + along) - exact(x - along)) / 2  # linear in the image
    assert float((gradient * along).sum()) == pytest.approx(float((change * towards).sum()))


def flat(v: Tensor) -> Tensor:
    return (v * torch.tensor([19595, 38470, 7471]).view(3, 1, 1) / 65536).sum(1, keepdim=True)


def soft(v: Tensor) -> Tensor:
    out, sums = v.clone(), 4 * v[..., 1:-1, 1:-1]
    for down in range(3):
        for right in range(3):
            sums = sums + v[..., down : HEIGHT - 2 + down, right : WIDTH - 2 + right]
    out[..., 1:-1, 1:-1] = sums / 13
    return out


def test_autocontrast_and_equalize_pass_gradients_straight_through() -> None:
    x, towards = images(3, torch.float64), spread((ROWS, 3, HEIGHT, WIDTH), 5)
    assert torch.allclose(through(EQUALIZE, x, 0.3, towards, "nearest"), towards)
    assert torch.allclose(through(INVERT, x, 0.3, towards, "nearest"), -towards)
    reach = x.amax(dim=(2, 3), keepdim=True) - x.amin(dim=(2, 3), keepdim=True)
    scale = torch.where(reach > 0, 1 / reach.clamp_min(1e-9), 1.0)
    stretched = through(AUTOCONTRAST, x, 0.3, towards, "nearest")
    assert torch.allclose(stretched, scale * towards)


def test_every_operation_is_computed_once() -> None:
    assert sorted([IDENTITY, *WARPS, *COLOURS, CUTOUT]) == list(range(len(NAMES)))
    assert set(COLOURS) == {*differentiable.SURROGATES, *differentiable.BLENDS}
