"""MedAugment against Pillow and scipy; its draws against the rules of the authors' code."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

import methods
from benchmarks.training.tasks import MultiClass
from methods.base import Batch, Spec
from methods.medaugment import (
    IDLE,
    OPERATIONS,
    PIXEL,
    Drawn,
    MedAugment,
    perform,
    settings_of,
)
from methods.naming import NamingError

NO_CONTEXT: Any = None
HEIGHT, WIDTH = 20, 26
GAUSS = {3: [1, 2, 1], 5: [1, 4, 6, 4, 1], 7: [2, 7, 14, 18, 14, 7, 2]}
ROWS = 12_000


def image(channels: int = 3) -> np.ndarray:
    """(C, H, W) uint8: smooth, a ramp, noise."""
    rng = np.random.default_rng(0)
    down, right = np.mgrid[:HEIGHT, :WIDTH]
    smooth = 120 + 80 * np.sin(down / 5) * np.cos(right / 4)
    made = [smooth, 20 + 5 * right + 5 * down, rng.integers(0, 256, (HEIGHT, WIDTH))]
    return np.stack(made[-channels:]).astype(np.uint8)


def applied(x: np.ndarray, *steps: tuple[str, float]) -> np.ndarray:
    """Levels 0..255 of one image (C, H, W) after some operations."""
    codes = torch.tensor([[OPERATIONS.index(name)] for name, _ in steps])
    settings = torch.tensor([[setting] for _, setting in steps], dtype=torch.float64)
    given = torch.from_numpy(x[None] / 255)
    return 255 * perform(given, Drawn(codes, settings)).numpy()[0]


def pillow(x: np.ndarray) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(x[0] if len(x) == 1 else x.transpose(1, 2, 0)))


def of_pillow(picture: Image.Image) -> np.ndarray:
    array = np.asarray(picture).astype(float)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


class TestPixels:
    @pytest.mark.parametrize("channels", [1, 3])
    @pytest.mark.parametrize("factor", [0.8, 0.96, 1.2])
    @pytest.mark.parametrize(
        ("name", "enhance"),
        [("brightness", ImageEnhance.Brightness), ("contrast", ImageEnhance.Contrast)],
    )
    def test_blends_are_pillows_before_it_rounds_down(
        self, name: str, enhance: Any, factor: float, channels: int
    ) -> None:
        given = image(channels)
        above = applied(given, (name, factor)) - of_pillow(enhance(pillow(given)).enhance(factor))
        # Pillow also rounds the mean of contrast, by half a level at most.
        slack = 0.5 * abs(1 - factor) if name == "contrast" else 0
        assert above.min() >= -slack - 1e-4 and above.max() <= 1 + slack + 1e-4

    @pytest.mark.parametrize("bits", [4, 5, 6, 7])
    def test_posterize_equals_pillow(self, bits: int) -> None:
        wanted = of_pillow(ImageOps.posterize(pillow(image()), bits))
        assert np.abs(applied(image(), ("posterize", bits)) - wanted).max() < 1e-9

    @pytest.mark.parametrize("alpha", [0.04, 0.2, 0.5])
    def test_sharpen_is_a_convolution(self, alpha: float) -> None:
        kernel = np.full((3, 3), -alpha)
        kernel[1, 1] = 1 + 8 * alpha
        wanted = [
            scipy.ndimage.convolve(each, kernel, mode="mirror") for each in image().astype(float)
        ]
        got = applied(image(), ("sharpen", alpha))
        assert np.allclose(got, np.clip(wanted, 0, 255), rtol=0, atol=1e-9)

    @pytest.mark.parametrize("size", GAUSS)
    def test_blur_is_a_convolution(self, size: int) -> None:
        kernel = np.array(GAUSS[size]) / sum(GAUSS[size])
        wanted = image().astype(float)
        for axis in (1, 2):
            wanted = scipy.ndimage.correlate1d(wanted, kernel, axis=axis, mode="mirror")
        assert np.allclose(applied(image(), ("blur", size)), wanted, rtol=0, atol=1e-9)

    def test_noise_has_its_deviation_in_every_channel(self) -> None:
        torch.manual_seed(0)
        given = np.full((3, 200, 200), 128, dtype=np.uint8)
        found = applied(given, ("noise", 7 / 255)) - 128
        assert scipy.stats.kstest(found.ravel(), scipy.stats.norm(0, 7).cdf).pvalue > 0.001
        assert abs(np.corrcoef(found.reshape(3, -1)))[0, 1:].max() < 0.02


def linear(name: str, setting: float) -> np.ndarray:
    """3 x 3: where a position (column, row, 1), from the centre of the image, is moved to."""
    turn, made = math.radians(setting), np.eye(3)
    if name == "rotate":  # counter-clockwise, with rows downwards
        made[:2, :2] = [[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]]
    if name in ("flip_horizontal", "scale"):
        made[0, 0] = -1 if name == "flip_horizontal" else setting
    if name in ("flip_vertical", "scale"):
        made[1, 1] = -1 if name == "flip_vertical" else setting
    if name == "shear_x":  # the lower half to the right
        made[0, 1] = math.tan(turn)
    if name == "shear_y":  # the right half upwards
        made[1, 0] = -math.tan(turn)
    if name == "translate_x":
        made[0, 2] = setting * WIDTH
    if name == "translate_y":
        made[1, 2] = setting * HEIGHT
    return made


def warped(x: np.ndarray, moves: np.ndarray) -> np.ndarray:
    """The image with its pixels moved, black outside, by scipy."""
    centre = np.array([(WIDTH - 1) / 2, (HEIGHT - 1) / 2])
    inverse = np.linalg.inv(moves)
    matrix = inverse[:2, :2][::-1, ::-1]  # scipy counts rows first
    offset = (centre + inverse[:2, 2] - inverse[:2, :2] @ centre)[::-1]
    transform: Any = scipy.ndimage.affine_transform
    return np.stack(
        [transform(each, matrix, offset, order=1, mode="grid-constant") for each in x.astype(float)]
    )


MOVES = [
    ("rotate", 17.0), ("rotate", -4.0), ("flip_horizontal", 0.0), ("flip_vertical", 0.0),
    ("scale", 0.8), ("scale", 1.2), ("shear_x", 10.0), ("shear_y", 7.0), ("translate_x", 0.1),
    ("translate_y", 0.07),
]  # fmt: skip


@pytest.mark.parametrize(("name", "setting"), MOVES)
def test_spatial_operations_equal_scipys(name: str, setting: float) -> None:
    wanted = warped(image(), linear(name, setting))
    assert np.abs(wanted - image()).max() > 20
    assert np.allclose(applied(image(), (name, setting)), wanted, rtol=0, atol=1e-8)


def test_spatial_operations_in_a_row_are_one_warp_and_pixel_operations_part_them() -> None:
    steps = [("rotate", 12.0), ("shear_x", 5.0), ("translate_y", 0.05)]
    whole = np.eye(3)
    for step in steps:
        whole = linear(*step) @ whole
    assert np.allclose(applied(image(), *steps), warped(image(), whole), rtol=0, atol=1e-8)
    got = applied(image(), steps[0], ("posterize", 4), steps[1])
    turned = warped(image(), linear(*steps[0])).round().astype(np.uint8)
    posterized = of_pillow(ImageOps.posterize(pillow(turned), 4))
    assert np.allclose(got, warped(posterized, linear(*steps[1])), rtol=0, atol=1e-8)


def test_rows_do_not_touch_each_other() -> None:
    torch.manual_seed(0)
    method = MedAugment(level=4)
    x = torch.rand(40, 3, 12, 14, dtype=torch.float64)
    drawn = method.draw(40)
    quiet = drawn.codes.masked_fill(drawn.codes == OPERATIONS.index("noise"), IDLE)
    together = perform(x, Drawn(quiet, drawn.settings))
    for row in range(40):
        one = perform(x[[row]], Drawn(quiet[:, [row]], drawn.settings[:, [row]]))
        assert torch.allclose(together[row], one[0], rtol=0, atol=1e-12)
        if bool((quiet[:, row] == IDLE).all()):
            assert torch.equal(together[row], x[row])
    assert not torch.equal(together, x)


SPANS: dict[int, dict[str, tuple[float, float]]] = {
    1: {"posterize": (7, 7), "rotate": (-4, 4), "blur": (3, 5), "noise": (2, 10)},
    2: {"posterize": (6, 6), "rotate": (-8, 8), "blur": (3, 5), "noise": (4, 20)},
    3: {"posterize": (5, 5), "rotate": (-12, 12), "blur": (3, 7), "noise": (6, 30)},
    4: {"posterize": (4, 4), "rotate": (-16, 16), "blur": (3, 7), "noise": (8, 40)},
    5: {"posterize": (4, 4), "rotate": (-20, 20), "blur": (3, 7), "noise": (10, 50)},
}


class TestSettings:
    @pytest.mark.parametrize("level", SPANS)
    def test_ranges_grow_with_the_level(self, level: int) -> None:
        part = 0.04 * level
        expected = {
            **dict.fromkeys(("brightness", "contrast", "scale"), (1 - part, 1 + part)),
            **dict.fromkeys(("shear_x", "shear_y"), (0, 2 * level)),
            **dict.fromkeys(("translate_x", "translate_y"), (0, 0.02 * level)),
            "sharpen": (part, 0.1 * level),
            **SPANS[level],
        }
        uniform = torch.linspace(0, 1 - 1e-12, 101, dtype=torch.float64)
        for name, span in expected.items():
            found = settings_of(torch.full((101,), OPERATIONS.index(name)), uniform, level)
            if name == "noise":
                found = (255 * found).square()
            assert (float(found[0]), float(found[-1])) == pytest.approx(span, abs=1e-9), name
            if name != "blur":
                steps = found.diff()
                assert torch.allclose(steps, steps[0].expand(100), rtol=0, atol=1e-9), name

    @pytest.mark.parametrize(
        ("level", "shares"), [(2, {3: 1 / 3, 5: 2 / 3}), (5, {3: 0.2, 5: 0.4, 7: 0.4})]
    )
    def test_sizes_of_the_blur(self, level: int, shares: dict[int, float]) -> None:
        """An integer of the range is drawn, and an even one becomes the next odd one."""
        uniform = (torch.arange(300, dtype=torch.float64) + 0.5) / 300
        sizes = settings_of(torch.full((300,), OPERATIONS.index("blur")), uniform, level)
        assert Counter(sizes.tolist()) == {size: 300 * part for size, part in shares.items()}


def draws(seed: int = 0, unconstrained: bool = False, **settings: Any) -> Drawn:
    method = MedAugment(**settings)
    method.unconstrained = unconstrained
    torch.manual_seed(seed)
    return method.draw(ROWS)


def uniform(counts: Tensor) -> float:
    return float(scipy.stats.chisquare(counts.numpy()).pvalue)


def numbers(codes: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) pixel and spatial operations of each row."""
    pixel = (codes >= 0) & (codes < len(PIXEL))
    return pixel.sum(dim=0), (codes >= len(PIXEL)).sum(dim=0)


class TestDraws:
    def test_the_four_branches_are_equally_frequent(self) -> None:
        codes = draws(clean=0.0).codes
        pixel, spatial = numbers(codes)
        found = Counter(zip(pixel.tolist(), spatial.tolist(), strict=True))
        assert set(found) == {(1, 2), (0, 3), (0, 2), (1, 1)}
        assert uniform(torch.tensor(list(found.values()))) > 0.001

    def test_operations_are_uniform_and_not_repeated(self) -> None:
        codes = draws(clean=0.0).codes
        counts = torch.bincount(codes[codes >= 0], minlength=len(OPERATIONS))
        assert uniform(counts[: len(PIXEL)]) > 0.001
        assert uniform(counts[len(PIXEL) :]) > 0.001
        for one, other in ((0, 1), (0, 2), (1, 2)):
            assert not bool(((codes[one] == codes[other]) & (codes[one] >= 0)).any())

    def test_a_pixel_operation_may_come_first_or_last(self) -> None:
        codes = draws(clean=0.0).codes
        pixel, spatial = numbers(codes)
        three = codes[:, (pixel == 1) & (spatial == 2)]
        place = ((three >= 0) & (three < len(PIXEL))).int().argmax(dim=0)
        assert uniform(torch.bincount(place, minlength=3)) > 0.001

    def test_a_share_of_the_rows_is_clean(self) -> None:
        clean = int((draws().codes == IDLE).all(dim=0).sum())
        assert scipy.stats.binomtest(clean, ROWS, 0.2).pvalue > 0.001
        assert bool((draws(clean=1.0).codes == IDLE).all())

    @pytest.mark.parametrize("level", [1, 3])
    def test_each_operation_has_the_probability_of_its_level(self, level: int) -> None:
        done = sum(int(each.sum()) for each in numbers(draws(clean=0.0, level=level).codes))
        asked = sum(int(each.sum()) for each in numbers(draws(clean=0.0).codes))  # p = 1
        assert scipy.stats.binomtest(done, asked, 0.2 * level).pvalue > 0.001

    def test_settings_are_uniform(self) -> None:
        codes, settings = draws(clean=0.0)
        turns = settings[codes == OPERATIONS.index("rotate")].numpy()
        assert scipy.stats.kstest(turns, scipy.stats.uniform(-20, 40).cdf).pvalue > 0.001
        variances = (255 * settings[codes == OPERATIONS.index("noise")]).square().numpy()
        assert scipy.stats.kstest(variances, scipy.stats.uniform(10, 40).cdf).pvalue > 0.001

    def test_unconstrained_rows_have_as_many_operations_of_any_kind(self) -> None:
        own, free = draws().codes, draws(unconstrained=True).codes
        assert torch.equal((own == IDLE).sum(dim=0), (free == IDLE).sum(dim=0))
        assert int(numbers(own)[0].max()) == 1 and int(numbers(free)[0].max()) == 3
        counts = torch.bincount(free[free >= 0], minlength=len(OPERATIONS))
        assert uniform(counts) > 0.001
        three = free[:, (free >= 0).all(dim=0)]
        pixel = torch.bincount(numbers(three)[0], minlength=4)
        law: Any = scipy.stats.hypergeom(len(OPERATIONS), len(PIXEL), 3)
        wanted = law.pmf(range(4)) * len(three[0])
        assert scipy.stats.chisquare(pixel.numpy(), wanted).pvalue > 0.001


def batch_of(x: Tensor) -> Batch:
    rows = len(x)
    return Batch(x, torch.eye(rows), torch.full((rows,), 1 / rows), torch.arange(rows))


def test_the_control_differs_in_its_operations_alone() -> None:
    x = torch.rand(60, 1, 10, 10)
    control = methods.build("unconstrained(upstream=medaugment)")
    assert control.control
    outs = []
    for method in (control, MedAugment()):
        torch.manual_seed(5)
        outs.append(method.augment(batch_of(x), NO_CONTEXT))
    changed = [(out.x != x).flatten(1).any(dim=1) for out in outs]
    assert torch.equal(*changed), "the same rows are clean"
    assert 0 < int(changed[0].sum()) < 60 and not torch.equal(outs[0].x, outs[1].x)
    assert list(methods.controls_of("medaugment(level=2)")) == [
        "unconstrained(upstream=medaugment(level=2))"
    ]


def test_captions_name_what_was_done() -> None:
    method = MedAugment()
    assert method.captions() == []
    torch.manual_seed(0)
    method.augment(batch_of(torch.rand(300, 3, 8, 8)), NO_CONTEXT)
    told = method.captions()
    assert len(told) == 300 and "unchanged" in told
    text = ", ".join(told)
    assert all(name.replace("_", " ") in text for name in OPERATIONS)
    assert max(len(each.split(", ")) for each in told) == 3


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("level=0", "level: expected a whole number from 1 to 5"),
        ("level=6", "from 1 to 5, got 6"),
        ("clean=1.5", r"clean: expected a share in \[0, 1\]"),
    ],
)
def test_arguments_that_are_refused(argument: str, told: str) -> None:
    with pytest.raises(NamingError, match=told):
        methods.build(f"medaugment({argument})")


@pytest.mark.parametrize(
    ("name", "shape", "told"),
    [
        ("medaugment", (1, 3, 8), "needs images above 3 pixels"),
        ("medaugment", (2, 8, 8), "needs grey or RGB images"),
        ("unconstrained(upstream=crop)", (1, 8, 8), "unconstrained needs upstream=medaugment"),
        ("unconstrained", (1, 8, 8), "unconstrained needs upstream=medaugment"),
        ("medaugment", (1, 4, 4), ""),
    ],
)
def test_what_it_does_not_take(name: str, shape: tuple[int, ...], told: str) -> None:
    reason = methods.build(name).supports(MultiClass(), Spec(9, 3, shape))
    assert told in reason and bool(reason) == bool(told)


def test_the_smallest_images_are_blurred_too() -> None:
    codes = torch.tensor([[OPERATIONS.index("blur")]])
    settings = torch.tensor([[7.0]], dtype=torch.float64)
    x = torch.rand(1, 1, 4, 4)
    assert not torch.equal(perform(x, Drawn(codes, settings)), x)
