"""Augmentations without learning: batched, drawn per row, on the batch's device."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from methods.base import ANYTHING, IMAGES, Batch, Context, Method, Spec, Task
from methods.functional import beta, numbers, per_row


class _Told:
    """What a method did to each row of the last batch, kept as tensors until it is read."""

    def __init__(self) -> None:
        self._values: tuple[Tensor, ...] = ()

    def remember(self, *values: Tensor) -> None:
        """Keep tensors (B,)."""
        self._values = values

    def rows(self, say: Callable[..., str]) -> list[str]:
        """``say`` applied to the values of each row."""
        return [say(*row) for row in zip(*(part.tolist() for part in self._values), strict=True)]


class NoAugmentation(Method):
    """The batch as drawn: the baseline of every comparison."""

    kinds = ANYTHING

    def augment(self, batch: Batch, ctx: Context) -> Batch:
        """The batch itself."""
        return batch


class Flip(Method):
    """Mirror each image left to right with probability ``p``."""

    kinds = IMAGES
    source = "Krizhevsky et al., ImageNet Classification with Deep CNNs, NeurIPS 2012"

    def __init__(self, *, p: float = 0.5) -> None:
        super().__init__()
        if not 0 <= p <= 1:
            raise ValueError(f"p: expected a probability in [0, 1], got {p}")
        self.p = p
        self._told = _Told()

    def captions(self) -> list[str]:
        """Which rows of the last batch were mirrored."""
        return self._told.rows(lambda mirrored: "mirrored" if mirrored else "")

    def augment(self, batch: Batch, ctx: Context) -> Batch:
        """Rows are mirrored independently; targets stay."""
        mirrored = torch.rand(len(batch), device=batch.x.device) < self.p
        self._told.remember(mirrored)
        return replace(batch, x=torch.where(per_row(mirrored, batch.x), batch.x.flip(-1), batch.x))


class Rotate90(Method):
    """Turn each image by a random multiple of 90 degrees."""

    kinds = IMAGES

    def __init__(self) -> None:
        super().__init__()
        self._told = _Told()

    def supports(self, task: Task, spec: Spec) -> str:
        """Square images only: a quarter turn changes the shape of any other image."""
        reason = super().supports(task, spec)
        if not reason and spec.shape[1] != spec.shape[2]:
            return f"rotate90 needs square images, but the images have size {spec.shape[1:]}"
        return reason

    def captions(self) -> list[str]:
        """How far each row of the last batch was turned, counter-clockwise."""
        return self._told.rows(lambda turns: f"turned {90 * turns}°" if turns else "")

    def augment(self, batch: Batch, ctx: Context) -> Batch:
        """Each row draws 0 to 3 quarter turns, uniformly; targets stay."""
        turns = torch.randint(0, 4, (len(batch),), device=batch.x.device)
        self._told.remember(turns)
        odd, half = per_row(turns % 2 == 1, batch.x), per_row(turns >= 2, batch.x)
        x = torch.where(odd, batch.x.rot90(1, (-2, -1)), batch.x)
        return replace(batch, x=torch.where(half, x.rot90(2, (-2, -1)), x))


class Crop(Method):
    """Pad each image and cut out a window of the original size at a random position."""

    kinds = IMAGES
    source = "He et al., Deep Residual Learning for Image Recognition, CVPR 2016, arXiv:1512.03385"
    space: ClassVar[Mapping[str, Any]] = {"pad": ("int", 1, 6)}

    def __init__(self, *, pad: int = 4, mode: Literal["zeros", "reflect"] = "zeros") -> None:
        super().__init__()
        if not 1 <= pad <= 512:
            raise ValueError(f"pad: expected 1 to 512 pixels, got {pad}")
        self.pad, self.mode = pad, mode
        self._told = _Told()

    def captions(self) -> list[str]:
        """The offset of each row's window in the last batch, right and down."""
        return self._told.rows(
            lambda down, right: f"crop {right - self.pad:+d} {down - self.pad:+d} px"
        )

    def supports(self, task: Task, spec: Spec) -> str:
        """Images only; reflection needs images larger than the padding."""
        return super().supports(task, spec) or self._too_small(spec.shape)

    def augment(self, batch: Batch, ctx: Context) -> Batch:
        """Each row draws its own offset, uniformly over the (2 pad + 1)^2 positions."""
        rows, channels, height, width = batch.x.shape
        if reason := self._too_small(batch.x.shape[1:]):
            raise ValueError(reason)
        kind = "constant" if self.mode == "zeros" else "reflect"
        padded = torch.nn.functional.pad(batch.x, [self.pad] * 4, mode=kind)
        offset = torch.randint(0, 2 * self.pad + 1, (2, rows, 1), device=batch.x.device)
        self._told.remember(offset[0, :, 0], offset[1, :, 0])
        down = offset[0] + torch.arange(height, device=batch.x.device)
        right = offset[1] + torch.arange(width, device=batch.x.device)
        row = torch.arange(rows, device=batch.x.device).view(-1, 1, 1, 1)
        channel = torch.arange(channels, device=batch.x.device).view(1, -1, 1, 1)
        x = padded[row, channel, down[:, None, :, None], right[:, None, None, :]]
        return replace(batch, x=x)

    def _too_small(self, shape: tuple[int, ...]) -> str:
        size = tuple(shape[1:])
        if self.mode == "zeros" or min(size) > self.pad:
            return ""
        return f"crop(mode=reflect) needs images above {self.pad} pixels, got {size}"


class Mixup(Method):
    """Mix each row with a partner: inputs and targets, by a share drawn from Beta(alpha, alpha).

    **Deviations.** The share is drawn per row; the paper's own code draws one per batch.
    """

    kinds = frozenset({"image", "vector", "labels"})
    source = "Zhang et al., mixup: Beyond Empirical Risk Minimization, ICLR 2018, arXiv:1710.09412"
    mixes_rows = True
    space: ClassVar[Mapping[str, Any]] = {"alpha": ("loguniform", 0.1, 2.0)}

    def __init__(self, *, alpha: float = 0.2) -> None:
        super().__init__()
        if alpha <= 0:
            raise ValueError(f"alpha: expected a number above 0, got {alpha}")
        self.alpha = alpha

    def augment(self, batch: Batch, ctx: Context) -> Batch:
        """x' = r x + (1 - r) x[partner], likewise y (Eq. 1); partners are a permutation."""
        partner = torch.randperm(len(batch), device=batch.x.device)
        share = beta(self.alpha, len(batch), batch.x)
        return replace(
            batch,
            x=_blend(batch.x, batch.x[partner], per_row(share, batch.x)),
            y=_blend(batch.y, batch.y[partner], share[:, None]),
        )


class CutMix(Method):
    """Paste a rectangle of a partner into each image; targets mix by the area that is left.

    The rectangle covers a share 1 - r of the image with r ~ Beta(alpha, alpha). Its centre is
    uniform, and it is clipped at the border; targets mix by the area actually pasted.
    """

    kinds = IMAGES
    source = "Yun et al., CutMix: Regularization Strategy, ICCV 2019, arXiv:1905.04899"
    mixes_rows = True
    space: ClassVar[Mapping[str, Any]] = {"alpha": ("loguniform", 0.1, 2.0)}

    def __init__(self, *, alpha: float = 1.0) -> None:
        super().__init__()
        if alpha <= 0:
            raise ValueError(f"alpha: expected a number above 0, got {alpha}")
        self.alpha = alpha

    def augment(self, batch: Batch, ctx: Context) -> Batch:
        """One rectangle per row; partners are a permutation of the batch."""
        rows, _, height, width = batch.x.shape
        partner = torch.randperm(rows, device=batch.x.device)
        side = (1 - beta(self.alpha, rows, batch.x)).clamp_min(0).sqrt()
        inside = _interval(side, height)[:, :, None] & _interval(side, width)[:, None, :]
        kept = 1 - inside.to(batch.y.dtype).mean(dim=(1, 2))
        return replace(
            batch,
            x=torch.where(inside[:, None], batch.x[partner], batch.x),
            y=_blend(batch.y, batch.y[partner], kept[:, None]),
        )


def _interval(share: Tensor, length: int) -> Tensor:
    """(B, length) mask of an interval of ``share * length`` pixels around a uniform centre."""
    size = (share * length).floor()
    start = (torch.rand_like(share) * length).floor() - (size / 2).floor()
    place = torch.arange(length, device=share.device)
    return (place >= start[:, None]) & (place < (start + size)[:, None])


def _blend(one: Tensor, other: Tensor, share: Tensor) -> Tensor:
    return one * share + other * (1 - share)


class SoftAugmentation(Method):
    """Crop far beyond the image; the less of the image is left, the softer the label.

    Offsets are normal with ``sigma`` times the edge as standard deviation, truncated at the edge.
    With v the share of the image that is left, the label keeps p = 1 - (1 - 1/K) (1 - v)^k, the
    other classes share the rest, and with ``reweight`` the row's weight is multiplied by p.

    ``sigma`` 0.3 and ``k`` 2 are the paper's; the released CIFAR commands use 12 of 32 pixels.

    **Deviations.** Pixels outside the image are filled with the per-channel mean of (up to 4,096
    of) the training rows; the authors add a normal number times 0.01, after normalisation.
    ``background`` "random" is uniform in [0, 1] per row and channel. The total weight of a batch
    stays the same, an option in the authors' code. What the classes of a soft target lose is spread
    in the same way.
    """

    kinds = frozenset({"image"})
    source = "Liu et al., Soft Augmentation for Image Classification, CVPR 2023, arXiv:2211.04625"
    space: ClassVar[Mapping[str, Any]] = {"sigma": ("uniform", 0.1, 0.5)}

    def __init__(
        self,
        *,
        sigma: float = 0.3,
        k: float = 2.0,
        reweight: bool = True,
        background: Literal["mean", "random"] = "mean",
    ) -> None:
        super().__init__()
        if sigma <= 0:
            raise ValueError(f"sigma: expected a number above 0, got {sigma}")
        if k <= 0:
            raise ValueError(f"k: expected a number above 0, got {k}")
        self.sigma, self.k, self.reweight = sigma, k, reweight
        self.background = background
        self._told = _Told()

    def setup(self, ctx: Context) -> None:
        """Compute the per-channel mean of the training rows."""
        super().setup(ctx)
        mean = ctx.train.draw(4096).x.mean(dim=(0, 2, 3)).view(1, -1, 1, 1)
        self.register_buffer("mean", mean, persistent=False)

    def captions(self) -> list[str]:
        """The offset of each row's window in the last batch, right and down."""
        return self._told.rows(lambda down, right: f"shift {int(right):+d} {int(down):+d} px")

    def augment(self, batch: Batch, ctx: Context) -> Batch:
        """Each row draws its own offset; y stays on the simplex."""
        rows, _, height, width = batch.x.shape
        down = self._offset(rows, height, batch.x)
        right = self._offset(rows, width, batch.x)
        self._told.remember(down, right)
        background = self.get_buffer("mean").to(batch.x.dtype)
        if self.background == "random":
            background = torch.rand_like(batch.x[:, :, :1, :1])
        seen = (height - down.abs()) * (width - right.abs()) / (height * width)
        shifted = _shifted(batch.x, down, right, background)
        trust = 1 - (1 - 1 / ctx.spec.classes) * (1 - seen) ** self.k
        trust = trust.to(batch.y.dtype)
        others = (1 - batch.y) / (ctx.spec.classes - 1)
        y = _blend(batch.y, others, trust[:, None])
        w = batch.w
        if self.reweight:
            w = batch.w * trust
            w = w * (batch.w.sum() / w.sum().clamp_min(torch.finfo(w.dtype).tiny))
        return replace(batch, x=shifted, y=y, w=w)

    def _offset(self, rows: int, edge: int, like: Tensor) -> Tensor:
        """(rows,) whole pixels, from a normal truncated to [-edge, edge] (by inversion)."""
        limit = (1 + math.erf(1 / (self.sigma * math.sqrt(2)))) / 2
        uniform = torch.rand(rows, device=like.device) * (2 * limit - 1) + (1 - limit)
        normal = torch.special.ndtri(uniform.clamp(1e-7, 1 - 1e-7))
        return (normal * self.sigma * edge).trunc().clamp(-edge, edge)


def _shifted(x: Tensor, down: Tensor, right: Tensor, background: Tensor) -> Tensor:
    """x (B, C, H, W) read ``down`` and ``right`` pixels further; background outside the image."""
    rows, channels, height, width = x.shape
    line = torch.arange(height, device=x.device) + down[:, None].long()
    column = torch.arange(width, device=x.device) + right[:, None].long()
    inside = ((line >= 0) & (line < height))[:, :, None] & ((column >= 0) & (column < width))[
        :, None
    ]
    row = torch.arange(rows, device=x.device).view(-1, 1, 1, 1)
    channel = torch.arange(channels, device=x.device).view(1, -1, 1, 1)
    line, column = line.clamp(0, height - 1), column.clamp(0, width - 1)
    read = x[row, channel, line[:, None, :, None], column[:, None, None, :]]
    return torch.where(inside[:, None], read, background)


class RandomErasing(Method):
    """Overwrite a rectangle of each image with noise, with probability ``p``.

    The rectangle's area is uniform in [0.02, 0.4] of the image and its aspect ratio (height to
    width) log-uniform in [0.3, 1 / 0.3]. The first of ten draws that fits is used; if none fits,
    the row stays unchanged.

    **Deviations.** The paper draws the ratio uniformly; most later code draws it log-uniformly.
    """

    kinds = IMAGES
    source = "Zhong et al., Random Erasing Data Augmentation, AAAI 2020, arXiv:1708.04896"
    tries = 10

    def __init__(self, *, p: float = 0.5, fill: Literal["noise", "zero"] = "noise") -> None:
        super().__init__()
        if not 0 <= p <= 1:
            raise ValueError(f"p: expected a probability in [0, 1], got {p}")
        self.p, self.fill = p, fill
        self._told = _Told()

    def captions(self) -> list[str]:
        """The erased rectangle of each row in the last batch, height by width."""
        return self._told.rows(
            lambda erased, tall, wide: f"erased {tall:.0f} x {wide:.0f} px" if erased else ""
        )

    def augment(self, batch: Batch, ctx: Context) -> Batch:
        """Rows are erased independently; targets stay."""
        rows, _, height, width = batch.x.shape
        device = batch.x.device
        area = (0.02 + 0.38 * torch.rand(rows, self.tries, device=device)) * height * width
        ratio = (math.log(0.3) * (2 * torch.rand(rows, self.tries, device=device) - 1)).exp()
        tall = (area * ratio).sqrt().round()
        wide = (area / ratio).sqrt().round()
        fits = (tall < height) & (wide < width)
        first = fits.to(torch.int8).argmax(dim=1, keepdim=True)
        erased = fits.any(dim=1) & (torch.rand(rows, device=device) < self.p)
        tall, wide = tall.gather(1, first)[:, 0], wide.gather(1, first)[:, 0]
        self._told.remember(erased, tall, wide)
        inside = _placed(tall, height)[:, :, None] & _placed(wide, width)[:, None, :]
        inside = inside & erased[:, None, None]
        value = torch.rand_like(batch.x) if self.fill == "noise" else torch.zeros_like(batch.x)
        return replace(batch, x=torch.where(inside[:, None], value, batch.x))


def _placed(size: Tensor, length: int) -> Tensor:
    """(B, length) mask of ``size`` (B,) pixels at a uniform position fully inside."""
    start = (torch.rand_like(size) * (length - size + 1)).floor()
    place = torch.arange(length, device=size.device)
    return (place >= start[:, None]) & (place < (start + size)[:, None])


class GaussianNoise(Method):
    """Add normal noise of standard deviation ``sigma`` to every value, kept in the data's range.

    Columns of categories stay.
    """

    kinds = frozenset({"image", "vector", "categories", "labels"})
    source = "Bishop, Training with Noise is Equivalent to Tikhonov Regularization, 1995"
    space: ClassVar[Mapping[str, Any]] = {"sigma": ("loguniform", 0.01, 0.3)}

    def __init__(self, *, sigma: float = 0.1) -> None:
        super().__init__()
        if sigma < 0:
            raise ValueError(f"sigma: expected a number of 0 or more, got {sigma}")
        self.sigma = sigma

    def augment(self, batch: Batch, ctx: Context) -> Batch:
        """Values stay in the data's range; targets stay."""
        noise = self.sigma * torch.randn_like(batch.x)
        if any(ctx.spec.categories):
            noise = noise * numbers(ctx.spec, batch.x)
        noisy = batch.x + noise
        return replace(batch, x=noisy.clamp(ctx.spec.low, ctx.spec.high))
