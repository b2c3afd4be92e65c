"""JPEG compression of a batch of images, as libjpeg computes it, with a quality per row.

Everything is linear algebra on whole numbers in float64, where it is exact, so the result equals
Pillow's bit for bit (baseline JPEG, its default tables, chroma halved in both directions). Entropy
coding loses nothing and is left out.

Source: ITU-T T.81 (tables, blocks), and of libjpeg 6b its "islow" transforms, which round to 13
fractional bits, its conversion of colours with 16, and its triangle filter for chroma.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from methods.functional import sent

LUMA = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMA = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 8,) * 4,
)
"""Quantisation tables of T.81, annex K."""
EDGE = 8
"""of a block"""


def jpeg(levels: Tensor, quality: Tensor) -> Tensor:
    """Levels 0..255 (B, C, H, W) after compression with a whole quality of 1 to 100 (B,).

    One channel is a grey JPEG, three are RGB. ``quality`` may be on the CPU.
    """
    quality = quality.to(torch.float64)
    scale = torch.where(quality < 50, (5000 / quality).floor(), 200 - 2 * quality)
    plain = torch.tensor([LUMA, CHROMA], dtype=torch.float64, device=scale.device)
    tables = ((plain[:, None] * scale.view(-1, 1, 1) + 50) / 100).floor().clamp(1, 255)
    luma, chroma = sent(tables.to(levels.dtype), levels.device)
    if levels.shape[1] == 1:
        return _coded(levels, luma)
    height, width = levels.shape[-2:]
    y, cb, cr = _ycc(levels).unbind(1)
    y = _coded(y[:, None], luma)
    halved = _coded(_halved(torch.stack([cb, cr], dim=1)), chroma)
    halved = halved[..., : -(-height // 2), : -(-width // 2)]
    return _rgb(y[:, 0], *_doubled(halved)[..., :height, :width].unbind(1))


def _ycc(levels: Tensor) -> Tensor:
    """RGB to luma and chroma (B, 3, H, W), in 16 fractional bits."""
    red, green, blue = levels.unbind(1)
    half = 2.0**15
    y = (19595 * red + 38470 * green + 7471 * blue + half) / 2**16
    middle = 128 * 2**16 + half - 1
    cb = (-11059 * red - 21709 * green + 32768 * blue + middle) / 2**16
    cr = (32768 * red - 27439 * green - 5329 * blue + middle) / 2**16
    return torch.stack([y, cb, cr], dim=1).floor()


def _rgb(y: Tensor, blue: Tensor, red: Tensor) -> Tensor:
    """The inverse (B, 3, H, W)."""
    blue, red, half = blue - 128, red - 128, 2.0**15
    parts = [
        y + ((91881 * red + half) / 2**16).floor(),
        y + ((-22554 * blue - 46802 * red + half) / 2**16).floor(),
        y + ((116130 * blue + half) / 2**16).floor(),
    ]
    return torch.stack(parts, dim=1).clamp(0, 255)


def _halved(x: Tensor) -> Tensor:
    """Means of 2 x 2 pixels, rounded up and down in turn along a row, to whole blocks in width.

    Blocks are filled by the image's last column and, in height, by the last of these means.
    """
    height, width = x.shape[-2:]
    grown = F.pad(x, [0, -width % (2 * EDGE), 0, height % 2], mode="replicate")
    sums = (4 * F.avg_pool2d(grown, 2)).round()
    bias = torch.arange(sums.shape[-1], device=x.device) % 2 + 1
    return ((sums + bias) / 4).floor()


def _doubled(x: Tensor) -> Tensor:
    """Twice the size by the triangle filter: three quarters of the nearer sample."""
    padded = F.pad(x, [1, 1, 1, 1], mode="replicate")
    near, above, below = padded[..., 1:-1, :], padded[..., :-2, :], padded[..., 2:, :]
    lines = torch.stack([3 * near + above, 3 * near + below], dim=-2).flatten(-3, -2)
    near, left, right = lines[..., 1:-1], lines[..., :-2], lines[..., 2:]
    pairs = [((3 * near + left + 8) / 16).floor(), ((3 * near + right + 7) / 16).floor()]
    return torch.stack(pairs, dim=-1).flatten(-2)


def _coded(x: Tensor, table: Tensor) -> Tensor:
    """Channels (B, C, H, W) after transform, quantisation by ``table`` (B, 8, 8), and back."""
    height, width = x.shape[-2:]
    grown = F.pad(x, [0, -width % EDGE, 0, -height % EDGE], mode="replicate") - 128
    blocks = grown.unflatten(-1, (-1, EDGE)).unflatten(-3, (-1, EDGE))  # (B, C, h, 8, w, 8)
    blocks = blocks.transpose(-3, -2)
    forward, inverse = (sent(each.to(x.dtype), x.device) for each in (_forward(), _inverse()))
    rows = ((blocks @ forward.T + 2.0**10) / 2**11).floor()
    found = ((forward @ rows + 2.0**14) / 2**15).floor()
    step = 8 * table[:, None, None, None]
    found = found.sign() * ((found.abs() + step / 2) / step).floor()
    found = found * step / 8
    columns = ((inverse @ found + 2.0**10) / 2**11).floor()
    made = ((columns @ inverse.T + 2.0**17) / 2**18).floor()
    made = (made + 128).clamp(0, 255).transpose(-3, -2)
    return made.flatten(-4, -3).flatten(-2)[..., :height, :width]


@cache
def _forward() -> Tensor:
    """(8, 8) float64: 2^13 sqrt 8 times the cosine transform, as libjpeg's flow graph has it.

    Its multipliers are rounded to 13 bits, and the entries are sums of these.
    """
    even = (
        (8192, 8192, 8192, 8192),
        (10703, 4433, -4433, -10703),
        (8192, -8192, -8192, 8192),
        (4433, -10704, 10704, -4433),
    )
    odd = (
        (11363, 9633, 6437, 2260),
        (9633, -2259, -11362, -6436),
        (6437, -11362, 2261, 9633),
        (2260, -6436, 9633, -11363),
    )
    rows = [
        row
        for symmetric, other in zip(even, odd, strict=True)
        for row in (
            [*symmetric, *symmetric[::-1]],
            [*other, *(-each for each in other[::-1])],
        )
    ]
    return torch.tensor(rows, dtype=torch.float64, device="cpu")


@cache
def _inverse() -> Tensor:
    """(8, 8) float64: its transpose, which the inverse flow graph computes."""
    return _forward().T.contiguous()
