"""Operations that corrupt images, each with settings per row.

They work on levels: images (B, C, H, W), whole numbers 0..255 in float64 (float32 where a device
has no float64), in grey or RGB. Settings are (B, P) float64 on the CPU, so what depends on them is
prepared there and nothing waits for a device. Noise comes from the global generator of the device
of the images, the angle of the motion from the CPU's.

All but ``gaussian_smoothing`` do what ``medmnistc`` 0.1.0 does, with Pillow, OpenCV, ImageMagick,
scikit-image and torchvision: docs/corruptions.md says how exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from methods import jpeg as compression
from methods.functional import per_row, sent

BITS = 22
"""Fractional bits of Pillow's weights when it resizes."""
DISK = 8
"""Pixels that the kernel of ``defocus_blur`` reads beyond its own; also its largest radius."""


def levels_of(x: Tensor) -> Tensor:
    """Levels 0..255 of images in [0, 1]."""
    kind = torch.float32 if x.device.type == "mps" else torch.float64
    return (255 * x.to(kind)).round()


def luma(levels: Tensor) -> Tensor:
    """The grey levels (B, 1, H, W) of RGB, as Pillow computes them."""
    red, green, blue = levels.split(1, dim=1)
    return ((19595 * red + 38470 * green + 7471 * blue + 2.0**15) / 2**16).floor()


def _on(settings: Tensor, like: Tensor) -> Tensor:
    """One setting per row (B,), as (B, 1, 1, 1) on the device of ``like``."""
    return sent(per_row(settings[:, 0].to(like.dtype), like), like.device)


def _ended(unit: Tensor) -> Tensor:
    """Levels of images in [0, 1] in which rounding down ends an operation of the package."""
    return (unit.clamp(0, 1) * 255).floor()


# Digital -----------------------------------------------------------------------------------------


def pixelate(levels: Tensor, settings: Tensor) -> Tensor:
    """Shrink to a share of the size by box filters, and enlarge again."""
    height, width = levels.shape[-2:]
    sizes = [[int(edge * share) for edge in (height, width)] for share in settings[:, 0].tolist()]
    if not all(min(size) for size in sizes):
        raise ValueError(f"pixelate leaves no pixel of images of {height} x {width}")
    across = _boxes([size[1] for size in sizes], width)
    along = _boxes([size[0] for size in sizes], height)
    for down_x, down_y in zip(across, along, strict=True):
        x, y = (sent(each[:, None].to(levels.dtype), levels.device) for each in (down_x, down_y))
        levels = ((levels @ x.mT + 2.0 ** (BITS - 1)) / 2**BITS).floor().clamp(0, 255)
        levels = ((y @ levels + 2.0 ** (BITS - 1)) / 2**BITS).floor().clamp(0, 255)
    return levels


def _boxes(sizes: list[int], edge: int) -> tuple[Tensor, Tensor]:
    """Weights (B, most, edge) that shrink an edge to a size per row, and (B, edge, most) back."""
    most = max(sizes)
    known = {size: (_box(edge, size), _box(size, edge)) for size in set(sizes)}
    down = np.zeros((len(sizes), most, edge))
    back = np.zeros((len(sizes), edge, most))
    for row, size in enumerate(sizes):
        down[row, :size], back[row, :, :size] = known[size]
    return torch.from_numpy(down), torch.from_numpy(back)


def _box(old: int, new: int) -> np.ndarray:
    """(new, old) weights of Pillow's box filter, in 22 fractional bits."""
    scale = old / new
    reach = max(scale, 1.0)
    weights = np.zeros((new, old))
    for place in range(new):
        centre = (place + 0.5) * scale
        first = max(0, int(centre - reach / 2 + 0.5))
        last = min(old, int(centre + reach / 2 + 0.5))
        offsets = (np.arange(first, last) - centre + 0.5) / reach
        inside = ((offsets > -0.5) & (offsets <= 0.5)).astype(float)
        weights[place, first:last] = np.floor(0.5 + inside / inside.sum() * 2**BITS)
    return weights


def jpeg_compression(levels: Tensor, settings: Tensor) -> Tensor:
    """JPEG of a quality."""
    return compression.jpeg(levels, settings[:, 0].floor())


# Noise -------------------------------------------------------------------------------------------


def gaussian_noise(levels: Tensor, settings: Tensor, noise: Tensor | None = None) -> Tensor:
    """Normal noise of a standard deviation; ``noise`` (B, C, H, W) is standard normal."""
    noise = torch.randn_like(levels) if noise is None else noise
    return _ended(levels / 255 + noise * _on(settings, levels))


def speckle_noise(levels: Tensor, settings: Tensor, noise: Tensor | None = None) -> Tensor:
    """Normal noise in proportion to the value; ``noise`` is standard normal."""
    noise, unit = torch.randn_like(levels) if noise is None else noise, levels / 255
    return _ended(unit + unit * (noise * _on(settings, levels)))


def impulse_noise(levels: Tensor, settings: Tensor, noise: Tensor | None = None) -> Tensor:
    """A share of the values becomes 0 or 1; ``noise`` (2, B, C, H, W) is uniform: which, what."""
    if noise is None:
        noise = torch.rand(2, *levels.shape, dtype=levels.dtype, device=levels.device)
    hit, white = noise[0] <= _on(settings, levels), noise[1] <= 0.5
    return _ended(torch.where(hit, white.to(levels.dtype), levels / 255))


def shot_noise(levels: Tensor, settings: Tensor, noise: Tensor | None = None) -> Tensor:
    """Poisson counts of so many photons at full white; ``noise`` (B, C, H, W) are the counts."""
    photons = _on(settings, levels)
    counts = torch.poisson(levels / 255 * photons) if noise is None else noise
    return _ended(counts / photons)


NOISES = (gaussian_noise, speckle_noise, impulse_noise, shot_noise)


# Blur --------------------------------------------------------------------------------------------


def gaussian_blur(levels: Tensor, settings: Tensor) -> Tensor:
    """A Gaussian of an odd number of pixels k and sigma 0.15 k + 0.35, mirrored at the border.

    torchvision's: it rounds to the nearest level.
    """
    size = settings[:, :1]
    return _smooth(levels, 0.15 * size + 0.35, size)


def gaussian_smoothing(levels: Tensor, settings: Tensor) -> Tensor:
    """A Gaussian of a sigma that is a share of the longer edge, mirrored at the border.

    The kernel ends after three sigma, and where the mirror does.
    """
    edge = max(levels.shape[-2:])
    sigma = settings[:, :1] * edge
    return _smooth(levels, sigma, 2 * (3 * sigma).ceil() + 1)


def _smooth(levels: Tensor, sigma: Tensor, size: Tensor) -> Tensor:
    """Gaussians of ``size`` (B, 1) pixels; no more than the mirror has."""
    most = 2 * min(levels.shape[-2:]) - 1
    reach = int(size.clamp_max(most).max()) // 2
    steps = torch.arange(-reach, reach + 1, dtype=torch.float64, device="cpu")
    kernel = (-0.5 * (steps / sigma) ** 2).exp() * (steps.abs() <= (size - 1) / 2)
    kernel = sent((kernel / kernel.sum(dim=1, keepdim=True)).to(levels.dtype), levels.device)
    height, width = levels.shape[-2:]
    padded = F.pad(levels, [reach] * 4, mode="reflect")
    lines, made = padded.new_zeros(()), padded.new_zeros(())
    for tap, weight in enumerate(kernel.unbind(1)):
        lines = lines + per_row(weight, levels) * padded[..., tap : tap + height, :]
    for tap, weight in enumerate(kernel.unbind(1)):
        made = made + per_row(weight, levels) * lines[..., tap : tap + width]
    return made.round()


def defocus_blur(levels: Tensor, settings: Tensor) -> Tensor:
    """A disk of a radius, its edge smoothed by a sigma, mirrored at the border.

    By Fourier transforms: 289 taps of each pixel would take forty times as long.
    """
    radius, sigma = settings[:, :1, None], settings[:, 1:, None]
    steps = torch.arange(-DISK, DISK + 1, dtype=torch.float64, device="cpu")
    disk = (steps[:, None] ** 2 + steps**2 <= radius.clamp_max(DISK) ** 2).to(torch.float64)
    disk = disk / disk.sum(dim=(1, 2), keepdim=True)
    side = (-0.5 / sigma**2).exp()
    middle, side = 1 / (1 + 2 * side), side / (1 + 2 * side)
    padded = F.pad(disk[:, None], [1] * 4, mode="reflect")[:, 0]
    disk = middle * padded[:, 1:-1] + side * (padded[:, :-2] + padded[:, 2:])
    disk = middle * disk[..., 1:-1] + side * (disk[..., :-2] + disk[..., 2:])
    kernel = sent(disk.float().to(levels.dtype), levels.device)[:, None]
    padded = F.pad(levels / 255, [DISK] * 4, mode="reflect")
    size = padded.shape[-2:]
    product = torch.fft.rfft2(padded) * torch.fft.rfft2(kernel, s=size)
    return _ended(torch.fft.irfft2(product, s=size)[..., 2 * DISK :, 2 * DISK :])


def motion_blur(levels: Tensor, settings: Tensor, angle: Tensor | None = None) -> Tensor:
    """A trail of a radius and a sigma, in a direction of -45 to 45 degrees, the border repeated.

    ImageMagick's: half a Gaussian along a line of whole pixels. ``angle`` (B,) in degrees is
    drawn unless it is given.
    """
    rows = len(levels)
    if angle is None:
        angle = 90 * torch.rand(rows, dtype=torch.float64, device="cpu") - 45
    taps = 2 * settings[:, :1].ceil() + 1
    steps = torch.arange(int(taps.max()), dtype=torch.float64, device="cpu")
    weights = (-0.5 * (steps / settings[:, 1:]) ** 2).exp() * (steps < taps)
    weights = sent((weights / weights.sum(dim=1, keepdim=True)).to(levels.dtype), levels.device)
    turned = torch.deg2rad(angle)[:, None]
    moved = [(steps * part - 0.5).ceil().long() for part in (turned.cos(), turned.sin())]
    right, down = (sent(each, levels.device) for each in moved)
    height, width = levels.shape[-2:]
    column = torch.arange(width, device=levels.device)
    line = torch.arange(height, device=levels.device)[:, None]
    flat, made = levels.flatten(2), torch.zeros_like(levels)
    for tap in range(len(steps)):
        x = (column + right[:, tap, None, None]).clamp(0, width - 1)
        y = (line + down[:, tap, None, None]).clamp(0, height - 1)
        place = (y * width + x).flatten(1)[:, None].expand_as(flat)
        made = made + per_row(weights[:, tap], levels) * flat.gather(2, place).view_as(levels)
    # ImageMagick rounds to 16 bits, and these down to 8.
    return ((257 * made + 0.5).floor() / 257).floor().clamp(0, 255)


def zoom_blur(levels: Tensor, settings: Tensor) -> Tensor:
    """The mean of the image and of its enlargements by 1, 1 + step, ... below a limit."""
    limit, step = settings.T
    counts = ((limit - 1) / step).ceil().clamp_min(0)
    height, width = levels.shape[-2:]
    unit = levels / 255
    total = torch.zeros_like(unit)
    for place in range(int(counts.max())):
        factor = 1 + place * ((1 + step) - 1)
        y, x = (
            sent(_zoom(edge, factor)[:, None].to(levels.dtype), levels.device)
            for edge in (height, width)
        )
        used = _on((place < counts)[:, None].double(), levels)
        total = total + used * (y @ unit @ x.mT)
    return _ended((unit + total) / (1 + _on(counts[:, None], levels)))


def _zoom(edge: int, factor: Tensor) -> Tensor:
    """(B, edge, edge) weights of the middle of an edge enlarged by a factor (B,), linearly."""
    kept = (edge / factor).ceil()
    first = ((edge - kept) / 2).floor()
    size = (kept * factor).round()
    off = ((size - edge) / 2).floor()
    place = torch.arange(edge, dtype=torch.float64, device="cpu")
    step = ((kept - 1) / (size - 1)).nan_to_num()
    at = first[:, None] + (place + off[:, None]) * step[:, None]
    return (1 - (at[..., None] - place).abs()).clamp_min(0)


# Colour ------------------------------------------------------------------------------------------


def brightness(levels: Tensor, settings: Tensor) -> Tensor:
    """Values times a factor."""
    return _blended(torch.zeros_like(levels), levels, settings)


def contrast(levels: Tensor, settings: Tensor) -> Tensor:
    """Distances from the mean grey level times a factor."""
    grey = luma(levels) if levels.shape[1] == 3 else levels
    mean = (grey.mean(dim=(1, 2, 3), keepdim=True) + 0.5).floor()
    return _blended(mean.expand_as(levels), levels, settings)


def _blended(first: Tensor, second: Tensor, settings: Tensor) -> Tensor:
    """Pillow's blend, in float32, rounded down."""
    share = _on(settings, second).float()
    made = first.float() + share * (second - first).float()
    return made.clamp(0, 255).floor().to(second.dtype)


def gamma_correction(levels: Tensor, settings: Tensor) -> Tensor:
    """Values to a power."""
    return (255.999 * (levels / 255) ** _on(settings, levels)).floor()


def saturate(levels: Tensor, settings: Tensor) -> Tensor:
    """Saturation plus an amount; grey images stay as they are."""
    if levels.shape[1] == 1:
        return levels
    unit = levels / 255
    value, low = unit.amax(dim=1, keepdim=True), unit.amin(dim=1, keepdim=True)
    spread = value - low
    red, green, blue = unit.split(1, dim=1)
    safe = torch.where(spread > 0, spread, 1)
    hue = torch.where(red == value, (green - blue) / safe, 0)
    hue = torch.where(green == value, 2 + (blue - red) / safe, hue)
    hue = torch.where(blue == value, 4 + (red - green) / safe, hue)
    hue = torch.where(spread > 0, (hue / 6) % 1, 0)
    amount = torch.where(spread > 0, spread / torch.where(value > 0, value, 1), 0)
    amount = (amount + _on(settings, levels)).clamp(0, 1)
    sector = (hue * 6).floor()
    part = hue * 6 - sector
    p, q, t = value * (1 - amount), value * (1 - part * amount), value * (1 - (1 - part) * amount)
    sorts = [
        (value, t, p), (q, value, p), (p, value, t), (p, q, value), (t, p, value), (value, p, q),
    ]  # fmt: skip
    made = unit
    for number, sort in enumerate(sorts):
        made = torch.where(sector % 6 == number, torch.cat(sort, dim=1), made)
    return _ended(made)


def black_corner(levels: Tensor, settings: Tensor) -> Tensor:
    """Black outside a circle of a radius in halves of the shorter edge."""
    height, width = levels.shape[-2:]
    middle = min(width // 2, height // 2, width - width // 2, height - height // 2)
    radii = [int(middle * share) for share in settings[:, 0].tolist()]
    known = {radius: _circle(radius, height, width) for radius in set(radii)}
    inside = torch.from_numpy(np.stack([known[radius] for radius in radii]))
    return torch.where(sent(inside, levels.device)[:, None], levels, 0)


def _circle(radius: int, height: int, width: int) -> np.ndarray:
    """Bool (H, W): the filled circle about the middle pixel that OpenCV draws."""
    half = np.zeros(radius + 1, dtype=int)
    across, along, error = radius, 0, 0
    while across >= along:  # the midpoint algorithm, an octant at a time
        half[along] = max(half[along], across)
        half[across] = max(half[across], along)
        error += 2 * along + 1
        along += 1
        if error > 0:
            error -= 2 * across - 1
            across -= 1
    y, x = np.abs(np.arange(height) - height // 2), np.abs(np.arange(width) - width // 2)
    return (y[:, None] <= radius) & (x <= half[np.minimum(y, radius)][:, None])


OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "pixelate": pixelate,
    "jpeg_compression": jpeg_compression,
    "gaussian_noise": gaussian_noise,
    "speckle_noise": speckle_noise,
    "impulse_noise": impulse_noise,
    "shot_noise": shot_noise,
    "gaussian_blur": gaussian_blur,
    "gaussian_smoothing": gaussian_smoothing,
    "defocus_blur": defocus_blur,
    "motion_blur": motion_blur,
    "zoom_blur": zoom_blur,
    "brightness_up": brightness,
    "brightness_down": brightness,
    "contrast_up": contrast,
    "contrast_down": contrast,
    "gamma_corr_up": gamma_correction,
    "gamma_corr_down": gamma_correction,
    "saturate": saturate,
    "black_corner": black_corner,
}
"""By name; those that go up and down differ in their settings."""


def least_edge(name: str, settings: Iterable[Sequence[float]]) -> int:
    """The smallest edge, in pixels, of images that an operation with these settings works on."""
    first = [each[0] for each in settings]
    if name == "defocus_blur":
        return DISK + 1
    if name == "gaussian_blur":
        return int(max(first)) // 2 + 1
    if name == "pixelate":
        return math.ceil(1 / min(first))
    return 2
