"""RandAugment and its kin against Pillow, image by image; their draws against what is published."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

from benchmarks.training.imagenet import import_torchvision
from benchmarks.training.tasks import MultiClass
from methods import randaugment
from methods.autoaugment import AutoAugment
from methods.base import Batch, Spec
from methods.functional import affine_warp
from methods.randaugment import (
    COLOUR,
    OPERATIONS,
    PUBLISHED,
    ROTATE,
    STANDARD,
    WIDE,
    Drawn,
    PerRow,
    RandAugment,
    Space,
    TrivialAugment,
    perform,
    schedule,
    tables,
)

import_torchvision()
from torchvision.transforms import InterpolationMode, autoaugment  # noqa: E402

NO_CONTEXT: Any = None
REAL = os.environ.get("AUGBENCH_DATA")
METHODS = {
    "rand": lambda **given: RandAugment(n=3, **given),
    "rand colour": lambda **given: RandAugment(n=2, m=20, ops="colour", **given),
    "trivial": TrivialAugment,
    "trivial standard": lambda **given: TrivialAugment(space="standard", **given),
    "cifar10": AutoAugment,
    "svhn": lambda **given: AutoAugment(policy="svhn", **given),
    "imagenet": lambda **given: AutoAugment(policy="imagenet", **given),
}
SPACES = {"rand": (STANDARD, 31), "wide": (WIDE, 31), "auto": (STANDARD, 10)}


def torchvision_name(code: int) -> str:
    """The operation's name in torchvision: "TranslateX" for "translate_x"."""
    name = "".join(word.capitalize() for word in OPERATIONS[code].split("_"))
    return {"Autocontrast": "AutoContrast"}.get(name, name)


@cache
def torchvision_space(space: str, size: tuple[int, int]) -> dict[str, tuple[Tensor, bool]]:
    match space:
        case "rand":
            return autoaugment.RandAugment()._augmentation_space(31, size)
        case "wide":
            return autoaugment.TrivialAugmentWide()._augmentation_space(31)
        case _:
            return autoaugment.AutoAugment()._augmentation_space(10, size)


@cache
def torchvision_setting(
    space: str, code: int, step: int, negative: int, size: tuple[int, int]
) -> float:
    known = torchvision_space(space, size)
    values, signed = known.get(torchvision_name(code), (torch.tensor(0.0), False))
    value = float(values[step]) if values.ndim else 0.0
    return -value if signed and negative else value


@cache
def made(channels: int, height: int = 28, width: int = 28) -> np.ndarray:
    """(N, C, H, W) uint8: digits, noise, gradients, constants, few levels, one odd pixel."""
    rng = np.random.default_rng(0)
    data: Any = load_digits()
    digits = data.images[:3] / 16 * 255
    digits = digits.repeat(-(-height // 8), 1).repeat(-(-width // 8), 2)[:, :height, :width]
    ramp = np.linspace(0, 255, height * width).reshape(height, width)
    grey = [*digits, ramp, ramp.T.reshape(height, width), ramp / 3 + 90]
    grey += [np.full((height, width), level) for level in (0, 128, 255)]
    odd = np.full((height, width), 7)
    odd[height // 2, width // 3] = 200
    grey += [odd, rng.choice([40, 180], (height, width)), rng.integers(0, 256, (height, width))]
    images = np.stack(grey)[:, None].repeat(channels, 1)
    if channels == 3:
        images[3:6, 1] = 255 - images[3:6, 1]
        images[:3, 2] = images[:3, 2] // 2
        noise = rng.integers(0, 256, (3, channels, height, width))
        images = np.concatenate([images, noise, noise // 2 + 60])
    return images.astype(np.uint8)


@cache
def images(source: str) -> np.ndarray:
    if source.startswith("made"):
        return made(int(source[-1]))
    name = {"pneumonia": "medmnist/pneumoniamnist.npz", "cifar": "cifar/cifar10_subset.npz"}[source]
    if not REAL or not (Path(REAL) / name).exists():
        pytest.skip(f"no real images: AUGBENCH_DATA is not set or has no {name}")
    with np.load(Path(REAL) / name) as file:
        found = file["train_images"][:6]
    return found[:, None] if found.ndim == 3 else found.transpose(0, 3, 1, 2)


def to_pillow(image: np.ndarray) -> Image.Image:
    return Image.fromarray(
        np.ascontiguousarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))
    )


def of_pillow(image: Image.Image) -> np.ndarray:
    array = np.asarray(image)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def levels(x: Tensor) -> np.ndarray:
    """Whole levels; the values are those of the levels."""
    rounded = (x * 255).round()
    assert torch.allclose(x, rounded / 255, rtol=0, atol=1e-6)
    return rounded.numpy().astype(int)


def unit(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.astype(np.float32)) / 255


def apply(
    x: Tensor, drawn: Drawn, space: Space, bins: int, interpolation: Any = "nearest"
) -> Tensor:
    settings, matrices = tables(space, bins, *x.shape[-2:])
    where = (drawn.negative, drawn.codes, drawn.magnitude)
    return perform(x, schedule(drawn.codes, settings[where], matrices[where]), interpolation)


def pillow_op(image: Any, code: int, setting: float) -> Any:
    name = torchvision_name(code)
    return autoaugment._apply_op(image, name, setting, InterpolationMode.NEAREST, None)


def batch_of(x: Tensor) -> Batch:
    rows = len(x)
    return Batch(x, torch.eye(rows), torch.full((rows,), 1 / rows), torch.arange(rows))


def noise(rows: int, channels: int = 3, height: int = 12, width: int = 10) -> Tensor:
    return torch.rand(rows, channels, height, width, generator=torch.Generator().manual_seed(0))


def test_bilinear_agrees_with_pillow_inside() -> None:
    """Away from the border, where Pillow repeats it, within the level that Pillow cuts off."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (30, 40), dtype=np.uint8)
    x = torch.from_numpy(image)[None, None].double() / 255
    inside = 0
    for turn in np.linspace(-0.6, 0.6, 9):
        c, s = np.cos(turn), np.sin(turn)
        rows = [[c, -s, 20 - 20 * c + 15 * s + 0.3], [s, c, 15 - 20 * s - 15 * c - 0.7]]
        ours = 255 * affine_warp(x, torch.tensor([rows], dtype=torch.float64), "bilinear")[0, 0]
        data = [value for row in rows for value in row]
        transform, bilinear = Image.Transform.AFFINE, Image.Resampling.BILINEAR
        theirs = np.asarray(Image.fromarray(image).transform((40, 30), transform, data, bilinear))
        down, right = np.mgrid[0.5:30, 0.5:40]
        across = rows[0][0] * right + rows[0][1] * down + rows[0][2]
        along = rows[1][0] * right + rows[1][1] * down + rows[1][2]
        here = (across > 0.5) & (across < 39.5) & (along > 0.5) & (along < 29.5)
        assert np.abs(ours.numpy() - theirs)[here].max() <= 1 + 1e-9
        inside += int(here.sum())
    assert inside > 5000


class TestOperations:
    @pytest.mark.parametrize("source", ["made 1", "made 3", "pneumonia", "cifar"])
    @pytest.mark.parametrize("space", SPACES)
    @pytest.mark.parametrize("code", range(len(OPERATIONS)), ids=OPERATIONS)
    def test_every_magnitude_and_sign_equals_pillow(
        self, code: int, space: str, source: str
    ) -> None:
        """Geometric ones at every pixel; colour within a level, and but for rounding at all."""
        given = images(source)
        bins = SPACES[space][1]
        cells = [(s, n, i) for s in range(bins) for n in (0, 1) for i in range(len(given))]
        step, negative, which = torch.tensor(cells).T
        drawn = Drawn(torch.full((1, len(cells)), code), step[None], negative[None])
        got = levels(apply(unit(given[which.numpy()]), drawn, *SPACES[space]))
        pictures = [to_pillow(image) for image in given]
        size = (given.shape[-2], given.shape[-1])
        settings = [torchvision_setting(space, code, s, n, size) for s, n, _ in cells]
        asked = [(i, setting) for (_, _, i), setting in zip(cells, settings, strict=True)]
        theirs = {(i, each): of_pillow(pillow_op(pictures[i], code, each)) for i, each in {*asked}}
        wanted = np.stack([theirs[each] for each in asked])
        difference = np.abs(got - wanted.astype(int))
        assert difference.max() <= (0 if code <= ROTATE else 1)
        assert (difference > 0).mean() < 1e-3

    @pytest.mark.parametrize("code", [6, 7, 8, 9, 10, 11, 12, 13, 14], ids=OPERATIONS[6:])
    def test_values_between_levels_count_as_the_nearest_level(self, code: int) -> None:
        x = unit(made(3))
        off = (torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) - 0.5) * 0.98 / 255
        drawn = Drawn(*(torch.full((1, len(x)), each) for each in (code, 20, 1)))
        between = (x + off).clamp(0, 1)
        assert torch.equal(apply(between, drawn, WIDE, 31), apply(x, drawn, WIDE, 31))

    @pytest.mark.parametrize("size", [(1, 1), (2, 5), (3, 2), (1, 9)])
    def test_tiny_images_equal_pillow(self, size: tuple[int, int]) -> None:
        given = np.random.default_rng(0).integers(0, 256, (4, 3, *size)).astype(np.uint8)
        for code in range(len(OPERATIONS)):
            drawn = Drawn(*(torch.full((1, 4), each) for each in (code, 15, 1)))
            got = levels(apply(unit(given), drawn, STANDARD, 31))
            setting = torchvision_setting("rand", code, 15, 1, size)
            wanted = [of_pillow(pillow_op(to_pillow(image), code, setting)) for image in given]
            assert np.abs(got - np.stack(wanted)).max() <= 1, OPERATIONS[code]

    def test_rows_without_a_colour_operation_are_not_rounded(self) -> None:
        x = noise(6)
        codes = torch.tensor([[0, 3, 0, 5, 0, 0]])
        out = apply(x, Drawn(codes, torch.zeros_like(codes), torch.zeros_like(codes)), STANDARD, 31)
        assert torch.equal(out, x)


class TestWarp:
    @pytest.mark.parametrize("size", [(28, 28), (9, 17), (40, 13)])
    def test_nearest_equals_pillow_at_every_pixel(self, size: tuple[int, int]) -> None:
        rng = np.random.default_rng(0)
        matrices = np.eye(2, 3) + rng.normal(0, [0.4, 0.4, 4], (60, 2, 3))
        matrices[:10, [0, 1], [1, 0]] = 0  # Pillow has a path of its own where nothing turns
        given = rng.integers(1, 256, (60, 3, *size)).astype(np.uint8)
        got = levels(affine_warp(unit(given), torch.from_numpy(matrices)))
        for row, matrix in enumerate(matrices):
            assert np.array_equal(got[row], of_pillow(warped(to_pillow(given[row]), matrix)))

    def test_bilinear_equals_four_weighted_neighbours(self) -> None:
        rng = np.random.default_rng(1)
        x, matrices = rng.random((5, 2, 6, 9)), np.eye(2, 3) + rng.normal(0, 0.5, (5, 2, 3))
        got = affine_warp(torch.from_numpy(x), torch.from_numpy(matrices), "bilinear")
        padded = np.pad(x, [(0, 0), (0, 0), (1, 1), (1, 1)])
        for row, v, u in np.ndindex(5, 6, 9):
            across, down = matrices[row] @ [u + 0.5, v + 0.5, 1] + 0.5  # in the padded image
            left, top = int(np.floor(across)), int(np.floor(down))
            wanted = np.zeros(2)
            for i, j in np.ndindex(2, 2):
                if 0 <= top + i < 8 and 0 <= left + j < 11:
                    weight = (1 - abs(across - left - j)) * (1 - abs(down - top - i))
                    wanted += weight * padded[row, :, top + i, left + j]
            assert got[row, :, v, u].numpy() == pytest.approx(wanted, abs=1e-12)

    def test_bilinear_has_gradients_for_the_image_and_the_matrix(self) -> None:
        x = noise(2, 2, 5, 4).double().requires_grad_()
        matrix = (
            torch.eye(2, 3, dtype=torch.float64).repeat(2, 1, 1) + 0.1 * noise(2, 1, 2, 3)[:, 0]
        )
        warp = torch.autograd.gradcheck(
            lambda x, matrix: affine_warp(x, matrix, "bilinear"), (x, matrix.requires_grad_())
        )
        assert warp

    def test_operations_that_follow_each_other_are_one_warp(self) -> None:
        """With identities between them too; a colour operation parts them."""
        names = [
            ["rotate", "shear_x", "translate_y", "identity"],
            ["rotate", "identity", "identity", "shear_y"],
            ["identity", "translate_x", "rotate", "rotate"],
            ["invert", "translate_x", "shear_y", "invert"],
            ["shear_x", "invert", "identity", "translate_y"],
        ]
        codes = torch.tensor([[OPERATIONS.index(name) for name in row] for row in names]).T
        magnitude, negative = torch.full_like(codes, 20), torch.tensor([0, 1, 1, 0]).repeat(5, 1).T
        settings, matrices = tables(STANDARD, 31, 28, 28)
        where = (negative, codes, magnitude)
        stages = schedule(codes, settings[where], matrices[where])
        warps = [s.rows.tolist() for s in stages if isinstance(s, randaugment.Warp)]
        assert sorted(row for rows in warps for row in rows) == [0, 1, 2, 3, 4, 4]
        x = unit(made(3)[-5:])
        got = apply(x, Drawn(codes, magnitude, negative), STANDARD, 31)
        full = torch.eye(3, dtype=torch.float64).repeat(4, 5, 1, 1)
        full[..., :2, :] = matrices[where]
        whole = full[0] @ full[1] @ full[2] @ full[3]
        assert torch.equal(got[:3], affine_warp(x[:3], whole[:3, :2]))
        assert np.array_equal(
            levels(got[3]), levels(affine_warp(1 - x[3:4], whole[3:4, :2]).neg() + 1)[0]
        )


class TestOrder:
    @pytest.mark.parametrize("channels", [1, 3])
    @pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
    def test_each_row_equals_pillow_one_operation_after_the_other(
        self, n: int, channels: int
    ) -> None:
        method = RandAugment(n=n, m=20)
        given = np.tile(made(channels, 20, 26), (12, 1, 1, 1))
        torch.manual_seed(n)
        got = levels(method.augment(batch_of(unit(given)), NO_CONTEXT).x)
        torch.manual_seed(n)
        self.check(got, given, method.draw(len(given)), "rand")

    @pytest.mark.parametrize("name", list(METHODS)[1:])
    def test_so_do_the_other_methods(self, name: str) -> None:
        method = METHODS[name]()
        given = np.tile(made(3), (12, 1, 1, 1))
        space = "wide" if name == "trivial" else "rand" if method.bins == 31 else "auto"
        torch.manual_seed(3)
        got = levels(method.augment(batch_of(unit(given)), NO_CONTEXT).x)
        torch.manual_seed(3)
        self.check(got, given, method.draw(len(given)), space)

    @staticmethod
    def check(got: np.ndarray, given: np.ndarray, drawn: Drawn, space: str) -> None:
        size = given.shape[-2:]
        _, matrices = tables(*SPACES[space], *size)
        for row, image in enumerate(given):
            picture = to_pillow(image)
            whole = np.eye(3)
            for code, step, negative in zip(
                *(part[:, row].tolist() for part in drawn), strict=True
            ):
                if 0 < code <= ROTATE:
                    one = np.eye(3)
                    one[:2] = matrices[negative, code, step]
                    whole = whole @ one
                elif code and not (OPERATIONS[code] == "color" and len(image) == 1):
                    setting = torchvision_setting(space, code, step, negative, size)
                    picture = pillow_op(warped(picture, whole), code, setting)
                    whole = np.eye(3)
            difference = np.abs(got[row] - of_pillow(warped(picture, whole)).astype(int))
            assert difference.max() <= 1, [OPERATIONS[code] for code in drawn.codes[:, row]]


def warped(picture: Image.Image, matrix: np.ndarray) -> Image.Image:
    entries = tuple(matrix[:2].ravel())
    return picture.transform(
        picture.size, Image.Transform.AFFINE, entries, Image.Resampling.NEAREST
    )


def uniform(values: Tensor, kinds: int) -> float:
    counts = torch.bincount(values.flatten(), minlength=kinds)
    assert len(counts) == kinds
    return float(scipy.stats.chisquare(counts.numpy()).pvalue)


def independent(one: Tensor, other: Tensor) -> float:
    table = np.zeros((int(one.max()) + 1, int(other.max()) + 1))
    np.add.at(table, (one.numpy(), other.numpy()), 1)
    table = table[table.any(1)][:, table.any(0)]
    found: Any = scipy.stats.chi2_contingency(table)
    return float(found.pvalue)


class TestDraws:
    def test_operations_are_uniform_and_independent(self) -> None:
        torch.manual_seed(0)
        codes, magnitude, negative = RandAugment(n=3, m=9).draw(20_000)
        place = torch.full((15,), -1)
        place[list(PUBLISHED)] = torch.arange(14)
        assert bool((magnitude == 9).all())
        for slot in range(3):
            assert uniform(place[codes[slot]], 14) > 0.001
            assert uniform(negative[slot], 2) > 0.001
            assert independent(codes[slot], codes[slot - 1]) > 0.001
            assert independent(codes[slot], negative[slot]) > 0.001
            assert independent(codes[slot][1:], codes[slot][:-1]) > 0.001
            assert independent(negative[slot][1:], negative[slot][:-1]) > 0.001

    def test_the_colour_subset_has_no_geometry(self) -> None:
        torch.manual_seed(0)
        codes = RandAugment(ops="colour").draw(6_000).codes
        assert set(codes.flatten().tolist()) == set(COLOUR)
        named = {"identity", "autocontrast", "equalize", "invert", "color", "sharpness"}
        assert {OPERATIONS[code] for code in COLOUR} == named
        place = torch.full((15,), -1)
        place[list(COLOUR)] = torch.arange(6)
        assert uniform(place[codes], 6) > 0.001

    @pytest.mark.parametrize("space", ["wide", "standard"])
    def test_trivial_augment_draws_magnitudes_uniformly(self, space: Any) -> None:
        torch.manual_seed(1)
        codes, magnitude, negative = TrivialAugment(space=space).draw(20_000)
        assert len(codes) == 1
        assert uniform(magnitude, 31) > 0.001
        assert uniform(negative, 2) > 0.001
        assert independent(codes[0], magnitude[0]) > 0.001

    @pytest.mark.parametrize("name", ["cifar10", "svhn", "imagenet"])
    def test_the_policies_are_torchvisions(self, name: str) -> None:
        theirs = autoaugment.AutoAugment(autoaugment.AutoAugmentPolicy(name)).policies
        policy = METHODS[name]().policy
        ours = [
            tuple(
                (torchvision_name(int(policy.codes[slot, i])), policy.probability[slot, i].item(),
                 int(policy.magnitude[slot, i]))
                for slot in (0, 1)
            )
            for i in range(policy.codes.shape[1])
        ]  # fmt: skip
        assert len(ours) == 25
        for mine, their in zip(ours, theirs, strict=True):
            for one, (operation, chance, step) in zip(mine, their, strict=True):
                assert one == (operation, pytest.approx(chance), step or 0)

    @pytest.mark.parametrize("name", ["cifar10", "svhn", "imagenet"])
    def test_auto_augment_keeps_the_probabilities(self, name: str) -> None:
        """Of every pair of operations, done or not, in 40,000 rows."""
        method, rows = METHODS[name](), 40_000
        torch.manual_seed(2)
        codes, _, negative = method.draw(rows)
        got, wanted = np.zeros((15, 15)), np.zeros((15, 15))
        np.add.at(got, tuple(codes.numpy()), 1)
        for pair in autoaugment.AutoAugment(autoaugment.AutoAugmentPolicy(name)).policies:
            (one, p, _), (two, q, _) = pair
            names = [torchvision_name(code) for code in range(15)]
            i, j = names.index(one), names.index(two)
            np.add.at(
                wanted,
                ([i, i, 0, 0], [j, 0, j, 0]),
                np.array([p * q, p * (1 - q), (1 - p) * q, (1 - p) * (1 - q)]) * rows / 25,
            )
        assert not got[wanted < 1e-9].any()
        some = wanted > 1e-9
        fit: Any = scipy.stats.chisquare(got[some], wanted[some])
        assert fit.pvalue > 0.001
        assert uniform(negative, 2) > 0.001


class TestMethods:
    @pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
    @pytest.mark.parametrize("channels", [1, 3])
    @pytest.mark.parametrize("name", METHODS)
    def test_range_shape_and_nothing_in_place(
        self, name: str, channels: int, interpolation: str
    ) -> None:
        method = METHODS[name](interpolation=interpolation)
        for rows, dtype in ((1, torch.float32), (64, torch.float32), (64, torch.float64)):
            x = noise(rows, channels).to(dtype)
            batch = batch_of(x.clone())
            out = method.augment(batch, NO_CONTEXT)
            assert torch.equal(batch.x, x)
            assert out.x.shape == x.shape and out.x.dtype == dtype
            assert out.x.data_ptr() != batch.x.data_ptr()
            assert out.x.min() >= 0 and out.x.max() <= 1
            assert out.y is batch.y and out.w is batch.w and out.index is batch.index
        assert not torch.equal(out.x, x)
        assert not out.x.is_inference()

    @pytest.mark.parametrize("name", METHODS)
    def test_the_same_seed_gives_the_same_batch_in_any_memory_format(self, name: str) -> None:
        method, x = METHODS[name](), noise(64)
        outs = []
        for seed, given in ((4, x), (4, x.to(memory_format=torch.channels_last)), (5, x)):
            torch.manual_seed(seed)
            outs.append(method.augment(batch_of(given), NO_CONTEXT).x)
        assert torch.equal(outs[0], outs[1])
        assert not torch.equal(outs[0], outs[2])

    def test_an_augmented_batch_can_be_trained_on(self) -> None:
        out = RandAugment().augment(batch_of(noise(8)), NO_CONTEXT).x
        weight = torch.rand(4, 3, 3, 3, requires_grad=True)
        torch.nn.functional.conv2d(out, weight).sum().backward()
        assert weight.grad is not None

    @pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
    @pytest.mark.parametrize("channels", [1, 3])
    @pytest.mark.parametrize("name", METHODS)
    def test_nothing_waits_for_the_images(
        self, name: str, channels: int, interpolation: str
    ) -> None:
        """On "meta" there are no values: whatever reads one, or needs one for a shape, raises."""
        x = torch.empty(256, channels, 9, 11, device="meta")
        with pytest.raises((RuntimeError, NotImplementedError)):
            (x > 0).nonzero()
        with pytest.raises(RuntimeError):
            x.sum().item()
        out = METHODS[name](interpolation=interpolation).augment(batch_of(x), NO_CONTEXT)
        assert out.x.device.type == "meta" and out.x.shape == x.shape

    def test_on_grey_images_color_is_the_identity(self) -> None:
        class Color(PerRow):
            def draw(self, rows: int) -> Drawn:
                codes = torch.full((1, rows), OPERATIONS.index("color"))
                return Drawn(codes, torch.full_like(codes, 30), torch.zeros_like(codes))

        method = Color(STANDARD, 31, "nearest")
        x = noise(4, 1)
        assert torch.equal(method.augment(batch_of(x), NO_CONTEXT).x, x)
        assert method.captions() == ["identity"] * 4
        assert not torch.equal(method.augment(batch_of(noise(4)), NO_CONTEXT).x, noise(4))

    def test_captions_say_what_was_done(self) -> None:
        method = RandAugment(n=2, m=9)
        assert method.captions() == []
        torch.manual_seed(0)
        method.augment(batch_of(noise(200, 3, 28, 28)), NO_CONTEXT)
        torch.manual_seed(0)
        codes, _, negative = method.draw(200)
        words = {
            "identity": "", "rotate": "rotate {}9.0°", "shear_x": "shear x {}0.09",
            "shear_y": "shear y {}0.09", "translate_x": "translate x {}3 px",
            "translate_y": "translate y {}3 px", "posterize": "posterize 7 bits",
            "solarize": "solarize 178", "autocontrast": "autocontrast", "equalize": "equalize",
        }  # fmt: skip
        for row, caption in enumerate(method.captions()):
            parts = []
            for slot in (0, 1):
                name, minus = OPERATIONS[int(codes[slot, row])], bool(negative[slot, row])
                blend = f"{name} {'0.73' if minus else '1.27'}"
                parts.append(words.get(name, blend).format("-" if minus else ""))
            assert caption == (", ".join(filter(None, parts)) or "identity")
        method.augment(batch_of(noise(3)), NO_CONTEXT)
        assert len(method.captions()) == 3

    @pytest.mark.parametrize("name", METHODS)
    def test_other_data_are_refused_with_a_reason(self, name: str) -> None:
        method, task = METHODS[name](), MultiClass()
        assert method.supports(task, Spec(9, 2, (1, 8, 8))) == ""
        assert method.supports(task, Spec(9, 2, (3, 8, 8))) == ""
        assert "4 channels" in method.supports(task, Spec(9, 2, (4, 8, 8)))
        assert "vectors" in method.supports(task, Spec(9, 2, (5,), kind="vector"))

    def test_arguments_out_of_range_are_refused(self) -> None:
        with pytest.raises(ValueError, match="n: expected 1"):
            RandAugment(n=0)
        for m in (-1, 31):
            with pytest.raises(ValueError, match="m: expected a magnitude from 0 to 30"):
                RandAugment(m=m)
