"""The corruptions of MedMNIST-C, set by set, and the augmentation that its authors train with."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from methods.base import IMAGES, Batch, Context, Method, Spec, Task
from methods.corruptions import NOISES, OPERATIONS, least_edge, levels_of, luma
from methods.functional import per_row, sent
from methods.randaugment import no_picture

SEVERITIES = 5
VERSION = 1
"""Raised when the images that a corruption makes change; stored with what was computed on them."""
COMMON = "common"

Dataset = Literal[
    "common", "pathmnist", "bloodmnist", "dermamnist", "retinamnist", "tissuemnist", "octmnist",
    "breastmnist", "chestmnist", "pneumoniamnist", "organamnist", "organcmnist", "organsmnist",
]  # fmt: skip
Settings = tuple[tuple[float, ...], ...]
"""Five severities, each with the settings of its operation."""


def _each(*values: float) -> Settings:
    return tuple((value,) for value in values)


JPEG = _each(50, 30, 15, 10, 7)
UP, DOWN = _each(1.1, 1.2, 1.3, 1.4, 1.5), _each(0.9, 0.8, 0.7, 0.6, 0.5)
RAISED, LOWERED = _each(1.1, 1.2, 1.3, 1.4, 1.6), _each(0.9, 0.8, 0.7, 0.6, 0.4)
BLOCKS = _each(0.30, 0.25, 0.20, 0.15, 0.10)
GRAIN = {
    "gaussian_noise": _each(0.04, 0.08, 0.12, 0.18, 0.26),
    "speckle_noise": _each(0.05, 0.15, 0.2, 0.35, 0.45),
    "impulse_noise": _each(0.01, 0.03, 0.06, 0.09, 0.17),
    "shot_noise": _each(60, 25, 18, 10, 5),
}
ORGANS = {
    "pixelate": _each(0.7, 0.6, 0.5, 0.40, 0.35),
    "jpeg_compression": JPEG,
    "gaussian_noise": _each(0.04, 0.08, 0.12, 0.16, 0.20),
    "speckle_noise": _each(0.05, 0.10, 0.20, 0.30, 0.40),
    "impulse_noise": _each(0.01, 0.02, 0.03, 0.05, 0.08),
    "shot_noise": _each(200, 100, 50, 25, 15),
    "gaussian_blur": _each(11, 13, 15, 17, 21),
    "brightness_up": _each(1.2, 1.3, 1.4, 1.5, 1.6),
    "brightness_down": _each(0.8, 0.75, 0.7, 0.65, 0.60),
    "contrast_up": _each(1.3, 1.4, 1.6, 1.7, 1.8),
    "contrast_down": _each(0.8, 0.7, 0.6, 0.55, 0.5),
    "gamma_corr_up": _each(1.3, 1.4, 1.6, 1.8, 2.0),
    "gamma_corr_down": LOWERED,
}
X_RAY: dict[str, Settings] = {
    "gaussian_blur": _each(3, 5, 7, 9, 11),
    "brightness_up": UP,
    "brightness_down": DOWN,
    "contrast_up": RAISED,
    "contrast_down": LOWERED,
    "gamma_corr_up": RAISED,
    "gamma_corr_down": LOWERED,
}
"""Of the two sets of chest X-rays."""
REGISTRY: dict[str, dict[str, Settings]] = {
    COMMON: {
        "gaussian_noise": _each(0.04, 0.08, 0.12, 0.18, 0.26),
        "gaussian_smoothing": _each(0.01, 0.02, 0.03, 0.04, 0.06),
        "pixelate": _each(0.8, 0.6, 0.5, 0.4, 0.3),
        "jpeg_compression": JPEG,
        "brightness_up": UP,
        "brightness_down": DOWN,
        "contrast_down": LOWERED,
    },
    "pathmnist": {
        "pixelate": _each(0.8, 0.6, 0.40, 0.30, 0.25),
        "jpeg_compression": JPEG,
        "defocus_blur": ((3, 0.1), (4, 0.1), (5, 0.2), (6, 0.2), (7, 0.3)),
        "motion_blur": ((5, 5), (10, 5), (15, 5), (15, 8), (15, 12)),
        "brightness_up": _each(1.1, 1.15, 1.2, 1.22, 1.25),
        "brightness_down": _each(0.85, 0.80, 0.75, 0.72, 0.70),
        "contrast_up": RAISED,
        "contrast_down": _each(0.8, 0.7, 0.6, 0.55, 0.5),
        "saturate": _each(0.05, 0.10, 0.15, 0.20, 0.25),
    },
    "bloodmnist": {
        "pixelate": _each(0.6, 0.5, 0.40, 0.30, 0.25),
        "jpeg_compression": JPEG,
        "defocus_blur": ((2, 0.01), (3, 0.1), (4, 0.1), (5, 0.1), (6, 0.1)),
        "motion_blur": ((3, 3), (5, 5), (10, 5), (10, 7), (10, 9)),
        "brightness_up": _each(1.1, 1.2, 1.3, 1.35, 1.4),
        "brightness_down": DOWN,
        "contrast_up": _each(1.1, 1.15, 1.2, 1.25, 1.3),
        "contrast_down": DOWN,
        "saturate": _each(0.05, 0.10, 0.15, 0.17, 0.20),
    },
    "dermamnist": {
        "pixelate": _each(0.7, 0.5, 0.40, 0.30, 0.25),
        "jpeg_compression": _each(30, 20, 15, 10, 7),
        **GRAIN,
        "defocus_blur": ((4, 0.1), (5, 0.2), (6, 0.3), (7, 0.4), (8, 0.5)),
        "motion_blur": ((10, 5), (15, 5), (15, 8), (15, 12), (20, 15)),
        "zoom_blur": ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
        "brightness_up": UP,
        "brightness_down": DOWN,
        "contrast_up": RAISED,
        "contrast_down": _each(0.8, 0.7, 0.6, 0.5, 0.4),
        "black_corner": _each(1.10, 1.05, 1.00, 0.90, 0.95),
    },
    "retinamnist": {
        "pixelate": _each(0.8, 0.60, 0.50, 0.40, 0.35),
        "jpeg_compression": _each(30, 25, 20, 10, 5),
        "gaussian_noise": _each(0.04, 0.08, 0.12, 0.16, 0.20),
        "speckle_noise": _each(0.10, 0.15, 0.20, 0.25, 0.30),
        "defocus_blur": ((4, 0.1), (5, 0.2), (6, 0.3), (7, 0.4), (8, 0.5)),
        "motion_blur": ((8, 5), (15, 5), (15, 8), (15, 12), (20, 15)),
        "brightness_down": DOWN,
        "contrast_down": LOWERED,
    },
    "tissuemnist": {
        "pixelate": _each(0.40, 0.30, 0.20, 0.15, 0.10),
        "jpeg_compression": _each(25, 20, 15, 10, 7),
        "impulse_noise": _each(0.01, 0.015, 0.02, 0.025, 0.03),
        "gaussian_blur": _each(13, 15, 17, 21, 25),
        "brightness_up": _each(1.3, 1.4, 1.5, 1.6, 1.7),
        "brightness_down": _each(0.8, 0.7, 0.6, 0.5, 0.4),
        "contrast_up": RAISED,
        "contrast_down": LOWERED,
    },
    "octmnist": {
        "pixelate": BLOCKS,
        "jpeg_compression": _each(30, 15, 10, 7, 5),
        "speckle_noise": _each(0.15, 0.30, 0.40, 0.50, 0.60),
        "defocus_blur": ((0.5, 0.6), (1, 0.5), (1.5, 0.1), (2.0, 0.5), (2.5, 0.1)),
        "motion_blur": ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
        "contrast_down": _each(0.6, 0.4, 0.3, 0.2, 0.15),
    },
    "breastmnist": {
        "pixelate": BLOCKS,
        "jpeg_compression": JPEG,
        "speckle_noise": _each(0.10, 0.15, 0.20, 0.25, 0.30),
        "motion_blur": ((5, 5), (9, 7), (9, 10), (13, 10), (17, 12)),
        "brightness_up": _each(1.4, 1.5, 1.6, 1.8, 2.0),
        "brightness_down": _each(0.55, 0.5, 0.45, 0.4, 0.3),
        "contrast_down": LOWERED,
    },
    "chestmnist": {
        "pixelate": BLOCKS,
        "jpeg_compression": JPEG,
        **GRAIN,
        **X_RAY,
    },
    "pneumoniamnist": {
        "pixelate": _each(0.8, 0.7, 0.6, 0.5, 0.40),
        "jpeg_compression": JPEG,
        "gaussian_noise": _each(0.04, 0.05, 0.06, 0.07, 0.08),
        "speckle_noise": _each(0.05, 0.07, 0.10, 0.15, 0.20),
        "impulse_noise": _each(0.005, 0.01, 0.013, 0.017, 0.02),
        "shot_noise": _each(300, 200, 150, 100, 80),
        **X_RAY,
    },
    "organamnist": ORGANS,
    "organcmnist": ORGANS,
    "organsmnist": ORGANS,
}
"""Settings of each corruption of each set, by severity, as in ``medmnistc`` 0.1.0 (Apache-2.0).

Its stain_deposit, bubble and characters are left out; "common" is ours.
"""
STRONGEST = {"chestmnist": {"gaussian_blur": (13.0,)}, "pneumoniamnist": {"gaussian_blur": (13.0,)}}
"""Sixth settings, which the package uses for augmentation alone."""
COLOUR = ("pathmnist", "bloodmnist", "dermamnist", "retinamnist")
"""Sets of RGB images."""


def corrupt(x: Tensor, dataset: str, name: str, settings: Tensor) -> Tensor:
    """Images (B, C, H, W) in [0, 1] after a corruption with settings (B, P), on the CPU.

    Results are multiples of 1/255. As in the package, noise on a grey set is the luma of noise on
    three channels. Of a grey set, images with three equal channels keep them equal.
    """
    operation, levels = OPERATIONS[name], levels_of(x)
    grey = dataset in REGISTRY and dataset not in (*COLOUR, COMMON)
    if grey and x.shape[1] == 3:
        one = corrupt(x[:, :1], dataset, name, settings).expand_as(x)
        own = (operation(levels, settings) / 255).to(x.dtype)
        return torch.where(per_row((levels == levels[:, :1]).flatten(1).all(dim=1), x), one, own)
    if operation in NOISES and dataset != COMMON and levels.shape[1] == 1:
        made = luma(operation(levels.expand(-1, 3, -1, -1), settings))
    else:
        made = operation(levels, settings)
    return (made / 255).to(x.dtype).expand_as(x)


def smallest(dataset: str) -> int:
    """The smallest edge, in pixels, of images that all corruptions of a set work on."""
    return max(least_edge(name, each) for name, each in REGISTRY[dataset].items())


class Drawn(NamedTuple):
    """What is done to each row, on the CPU."""

    codes: Tensor
    """(B,) int64, a position in the set's list of corruptions; its length: nothing."""
    settings: Tensor
    """(B, 2) float64"""


class MedMNISTCAugment(Method):
    """Corrupt each image by one of the corruptions of MedMNIST-C for its data set, or leave it.

    For each row one of the set's n corruptions or the identity is drawn, each with probability
    1 / (n + 1), and its strength uniformly from that of severity 1 to that of severity 5 (of an
    operation with two settings, each apart). ``dataset`` names the set whose corruptions are used,
    such as breastmnist: a method does not know what it trains on. "common", the default, is the
    small set for any data.

    **Deviations.** From the authors' code, ``medmnistc`` 0.1.0 (C). Stain deposits, bubbles and
    characters are left out, so path and blood have 9 of 11 corruptions and derma 14 of 15. Of
    RetinaMNIST's defocus blur the radius ends at 8, in C at 9. Impulse noise is drawn afresh for
    each row; in C all images of a size share one pattern, from a fixed seed. Motion blur, which C
    cannot compute under NumPy 2, is as C writes it down.
    """

    kinds = IMAGES
    source = "Di Salvo et al., MedMNIST-C, arXiv:2406.17536"

    def __init__(self, *, dataset: Dataset = "common") -> None:
        super().__init__()
        self.dataset: Dataset = dataset
        self.names = tuple(REGISTRY[dataset])
        self._last: Drawn | None = None

    def supports(self, task: Task, spec: Spec) -> str:
        """Grey or RGB images that are large enough for every corruption of the set."""
        least = smallest(self.dataset)
        reason = super().supports(task, spec) or no_picture("medmnistc_augment", spec)
        if not reason and min(spec.shape[1:]) < least:
            return (
                f"medmnistc_augment(dataset={self.dataset}) needs images of {least} pixels or "
                f"more, but these have {spec.shape[1:]}"
            )
        return reason

    def draw(self, rows: int) -> Drawn:
        """Corruptions of ``rows`` images, from the CPU's global generator."""
        codes = torch.randint(len(self.names) + 1, (rows,), device="cpu")
        uniform = torch.rand(rows, 2, dtype=torch.float64, device="cpu")
        ends = torch.zeros(2, len(self.names) + 1, 2, dtype=torch.float64, device="cpu")
        for code, name in enumerate(self.names):
            for end, settings in enumerate(reach(self.dataset, name)):
                for column, value in enumerate(settings):
                    ends[end, code, column] = value
        low, high = ends[:, codes]
        settings = low + uniform * (high - low)
        if "gaussian_blur" in self.names:
            blurred = (codes == self.names.index("gaussian_blur"))[:, None]
            odd = settings.floor() - 1 + settings.floor() % 2
            settings = torch.where(blurred, odd, settings)
        return Drawn(codes, settings)

    @torch.no_grad()
    def augment(self, batch: Batch, ctx: Context) -> Batch:
        """Corrupt each row; targets stay. No gradient reaches the incoming images."""
        drawn = self._last = self.draw(len(batch))
        x = batch.x.clone()
        for code, name in enumerate(self.names):
            rows = (drawn.codes == code).nonzero()[:, 0]
            if len(rows):
                place = sent(rows, x.device)
                made = corrupt(x[place], self.dataset, name, drawn.settings[rows])
                x.index_copy_(0, place, made)
        return replace(batch, x=x)

    def captions(self) -> list[str]:
        """The corruption of each row of the last batch, "speckle noise 0.21"."""
        if self._last is None:
            return []
        pairs = zip(self._last.codes.tolist(), self._last.settings.tolist(), strict=True)
        return [
            "unchanged" if code == len(self.names) else caption(self.names[code], settings)
            for code, settings in pairs
        ]


def reach(dataset: str, name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The settings between which the augmentation draws."""
    settings = REGISTRY[dataset][name]
    if name == "zoom_blur":  # the limit from 1 to the largest factor, and the step
        steps = [each[1] for each in settings]
        return (1.0, steps[0]), (settings[-1][0] - 0.01, steps[-1])
    return settings[0], STRONGEST.get(dataset, {}).get(name, settings[-1])


def caption(name: str, settings: list[float]) -> str:
    """A corruption in words."""
    short = name.removesuffix("_compression").replace("_", " ")
    return f"{short} {int(settings[0])}" if short == "jpeg" else f"{short} {settings[0]:.2g}"
