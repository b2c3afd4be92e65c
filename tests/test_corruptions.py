"""Corruptions of test images, against what medmnistc 0.1.0 makes of real images."""

from __future__ import annotations

import importlib.util
import io
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage, stats
from torch import Tensor

import methods
from methods import corruptions, medmnistc
from methods.base import Batch, Spec
from methods.corruptions import NOISES, OPERATIONS, luma
from methods.jpeg import jpeg
from methods.medmnistc import COMMON, REGISTRY, SEVERITIES, corrupt
from methods.naming import NamingError
from tests import record_medmnistc as record

NO_CONTEXT: Any = None
NO_TASK: Any = None
SPEC = Spec(rows=10, classes=3, shape=(1, 8, 8))
EXACT = {*OPERATIONS} - {"gaussian_blur", "defocus_blur", "motion_blur", "zoom_blur"}
"""The others may differ by one level, where a value is at the edge of rounding."""


RECORDED = (
    "only tests/medmnistc.npz is compared, which python -m tests.record_medmnistc made with "
    "medmnistc 0.1.0 from test images of MedMNIST and a photo of scikit-learn"
)


@cache
def stored() -> dict[str, np.ndarray]:
    with np.load(record.FILE) as file:
        return {name: file[name] for name in file.files}


def tensor_of(images: np.ndarray) -> Tensor:
    """(N, C, H, W) levels in float64."""
    grey = images.ndim == 3
    shaped = images[:, None] if grey else images.transpose(0, 3, 1, 2)
    return torch.from_numpy(shaped.astype(np.float64))


def settings_of(dataset: str, name: str, place: int, rows: int) -> Tensor:
    return torch.tensor([REGISTRY[dataset][name][place]] * rows, dtype=torch.float64)


def ours(dataset: str, name: str, place: int) -> np.ndarray:
    """Our levels, with the noise that the package drew."""
    levels = tensor_of(stored()[dataset])
    settings = settings_of(dataset, name, place, len(levels))
    operation = OPERATIONS[name]
    if name == "motion_blur":
        angle = np.random.RandomState(record.SEED).uniform(-45, 45)
        turned = torch.full((len(levels),), angle, dtype=torch.float64)
        return corruptions.motion_blur(levels, settings, turned).numpy()
    if operation not in NOISES:
        return operation(levels, settings).numpy()
    grey = levels.shape[1] == 1
    wide = levels.expand(-1, 3, -1, -1)
    made = [noisy(name, each[None], settings[:1]) for each in wide]
    both = torch.cat(made)
    return (luma(both) if grey else both).numpy()


def noisy(name: str, levels: Tensor, settings: Tensor) -> Tensor:
    """One RGB image; each image of the record has its own start of the generator."""
    old, new = np.random.RandomState(record.SEED), np.random.default_rng(record.SEED)
    shape = levels[0].permute(1, 2, 0).shape
    if name == "impulse_noise":
        drawn = np.stack([new.random(shape), new.random(shape)])
    elif name == "shot_noise":
        unit = levels[0].permute(1, 2, 0).numpy() / 255
        drawn = old.poisson(unit * float(settings[0, 0])).astype(float)
    else:
        drawn = old.normal(size=shape)
    noise = torch.from_numpy(drawn).movedim(-1, -3).unsqueeze(-4)
    operation = {each.__name__: each for each in NOISES}[name]
    return operation(levels, settings, noise)


@pytest.mark.parametrize("key", [key for key in stored() if "." in key])
def test_equal_to_the_package(key: str) -> None:
    dataset, name = key.split(".")
    for number, place in enumerate(record.PLACES):
        expected = tensor_of(stored()[key][number]).numpy()
        far = np.abs(ours(dataset, name, place) - expected)
        assert far.max() <= (0 if name in EXACT else 1), f"severity {place + 1}"
        assert (far > 0).mean() < 0.01


def test_every_operation_of_the_registry_is_in_the_record() -> None:
    known = {key.split(".")[1] for key in stored() if "." in key}
    used = {name for dataset, each in REGISTRY.items() if dataset != COMMON for name in each}
    assert known == used == {*OPERATIONS} - {"gaussian_smoothing"}


def test_the_record_is_what_the_package_makes() -> None:
    for name in ("medmnistc", "cv2", "wand"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: {RECORDED}")
    made = record.recorded()
    assert made.keys() == stored().keys()
    assert all(np.array_equal(made[key], stored()[key]) for key in made)


def test_registry_is_the_package_s() -> None:
    if importlib.util.find_spec("medmnistc") is None:
        pytest.skip(f"medmnistc is not installed: {RECORDED}")
    package = record.medmnistc()
    left_out = {"stain_deposit", "bubble", "characters"}
    assert {*package.CORRUPTIONS_DS} == {*REGISTRY} - {COMMON}
    assert {name for name, rgb in package.DATASET_RGB.items() if rgb} == {*medmnistc.COLOUR}
    for dataset, known in package.CORRUPTIONS_DS.items():
        assert {*known} - left_out == {*REGISTRY[dataset]}
        for name, settings in REGISTRY[dataset].items():
            theirs = known[name].severity_params[:SEVERITIES]
            if name == "zoom_blur":
                ours = [np.arange(1, *each) for each in settings]
                assert all(np.array_equal(*pair) for pair in zip(ours, theirs, strict=True))
                continue
            assert [tuple(np.atleast_1d(each)) for each in theirs] == list(settings)
            if len(known[name].severity_params) > SEVERITIES and name == "gaussian_blur":
                sixth = known[name].severity_params[SEVERITIES]
                assert medmnistc.STRONGEST[dataset][name] == (sixth,)


@pytest.mark.parametrize("dataset", REGISTRY)
def test_five_severities_in_range_and_repeatable(dataset: str) -> None:
    channels = 3 if dataset in medmnistc.COLOUR else 1
    x = torch.rand(4, channels, 28, 28, generator=torch.Generator().manual_seed(0))
    before = x.clone()
    for name, each in REGISTRY[dataset].items():
        assert len(each) == SEVERITIES
        for place in range(SEVERITIES):
            settings = settings_of(dataset, name, place, len(x))
            torch.manual_seed(place)
            made = corrupt(x, dataset, name, settings)
            torch.manual_seed(place)
            again = corrupt(x, dataset, name, settings)
            assert torch.equal(made, again)
            assert made.shape == x.shape
            assert made.dtype == x.dtype
            assert float(made.min()) >= 0
            assert float(made.max()) <= 1
            assert not torch.equal(made, x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dataset", ["breastmnist", "dermamnist", COMMON])
def test_settings_are_each_row_s_own(dataset: str) -> None:
    """A batch of all severities gives the rows that batches of one severity give."""
    channels = 3 if dataset == "dermamnist" else 1
    one = torch.rand(1, channels, 28, 28, generator=torch.Generator().manual_seed(1))
    for name, each in REGISTRY[dataset].items():
        if OPERATIONS[name] in NOISES or name == "motion_blur":
            continue
        settings = torch.tensor(each, dtype=torch.float64)
        together = corrupt(one.expand(SEVERITIES, -1, -1, -1), dataset, name, settings)
        for place in range(SEVERITIES):
            alone = corrupt(one, dataset, name, settings[place : place + 1])
            assert torch.equal(together[place], alone[0]), name


def test_motion_per_row() -> None:
    levels = torch.randint(256, (3, 3, 28, 28), generator=torch.Generator().manual_seed(2)).double()
    settings = torch.tensor([[3, 3], [9, 7], [20, 15]], dtype=torch.float64)
    angle = torch.tensor([-45.0, 3.0, 44.0], dtype=torch.float64)
    together = corruptions.motion_blur(levels, settings, angle)
    for row in range(3):
        part = slice(row, row + 1)
        alone = corruptions.motion_blur(levels[part], settings[part], angle[part])
        assert torch.equal(together[part], alone)


@pytest.mark.parametrize("edge", [9, 28, 61])
def test_defocus_is_the_sum_over_its_taps(edge: int) -> None:
    """Of every setting of the registry; constant areas too, where rounding down is delicate."""
    known = {each for of in REGISTRY.values() for each in of.get("defocus_blur", ())}
    settings = torch.tensor(sorted(known), dtype=torch.float64)
    rng = torch.Generator().manual_seed(0)
    levels = torch.randint(256, (len(settings), 3, edge, edge), generator=rng).double()
    levels[..., : edge // 3, :], levels[..., : edge // 3] = 255, 0
    made = corruptions.defocus_blur(levels, settings)
    for row, (radius, sigma) in enumerate(settings.numpy()):
        steps = np.arange(-corruptions.DISK, corruptions.DISK + 1)
        disk = (steps[:, None] ** 2 + steps**2 <= radius**2).astype(float)
        weights = np.exp(-0.5 * np.array([-1, 0, 1]) ** 2 / sigma**2)
        weights /= weights.sum()
        kernel = ndimage.correlate1d(disk / disk.sum(), weights, 0, mode="mirror")
        kernel = ndimage.correlate1d(kernel, weights, 1, mode="mirror").astype(np.float32)
        for channel, image in zip(made[row].numpy(), levels[row].numpy() / 255, strict=True):
            expected = ndimage.correlate(image, kernel.astype(float), mode="mirror")
            assert np.array_equal(channel, np.floor(255 * expected.clip(0, 1)))


@pytest.mark.parametrize("name", [each.__name__ for each in NOISES])
def test_noise_is_distributed_as_numpy_s(name: str) -> None:
    """Values of 300 images, ours with torch's noise and with NumPy's; a draw of its own per row."""
    operation = {each.__name__: each for each in NOISES}[name]
    levels = torch.full((300, 3, 8, 8), 100.0, dtype=torch.float64)
    setting = {"impulse_noise": 0.17, "shot_noise": 25.0}.get(name, 0.3)
    settings = torch.full((300, 1), setting, dtype=torch.float64)
    torch.manual_seed(0)
    made = operation(levels, settings)
    rng = np.random.default_rng(0)
    shape = tuple(levels.shape)
    drawn = {
        "impulse_noise": lambda: rng.random((2, *shape)),
        "shot_noise": lambda: rng.poisson(100 / 255 * setting, shape).astype(float),
    }.get(name, lambda: rng.standard_normal(shape))()
    theirs = operation(levels, settings, torch.from_numpy(drawn))
    levels_made, counts = np.unique(np.concatenate([made, theirs]), return_inverse=True)
    table = [
        np.bincount(part, minlength=len(levels_made))
        for part in np.split(counts.reshape(600, -1), 2)
        for part in [part.ravel()]
    ]
    table = np.array(table)[:, np.sum(table, axis=0) >= 20]
    tested: Any = stats.chi2_contingency(table)
    assert tested.pvalue > 0.001
    assert not torch.equal(made[0], made[1])


def test_jpeg_of_each_row_s_quality_is_pillow_s() -> None:
    rng = np.random.default_rng(3)
    photo = rng.integers(0, 256, (6, 27, 21, 3), dtype=np.uint8)
    photo[3:] = np.asarray(
        [np.kron(each, np.ones((9, 7, 1))) for each in rng.integers(0, 256, (3, 3, 3, 3))]
    )
    qualities = [1, 20, 49, 50, 75, 100]
    made = jpeg(tensor_of(photo), torch.tensor(qualities))
    for image, quality, ours in zip(photo, qualities, made, strict=True):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality)
        theirs = np.array(Image.open(file))
        assert np.array_equal(ours.permute(1, 2, 0).numpy(), theirs), quality


def test_too_small_images_are_refused() -> None:
    assert methods.build("medmnistc_augment").supports(NO_TASK, SPEC) == ""
    reason = methods.build("medmnistc_augment(dataset=tissuemnist)").supports(NO_TASK, SPEC)
    assert "tissuemnist) needs images of 13 pixels or more" in reason
    with pytest.raises(ValueError, match="leaves no pixel of images of 8 x 8"):
        corrupt(torch.rand(1, 1, 8, 8), "breastmnist", "pixelate", torch.tensor([[0.1]]))


def test_unknown_set() -> None:
    with pytest.raises(
        NamingError, match=r"dataset: expected .* or breastmnist or .*, got breastmnst"
    ):
        methods.build("medmnistc_augment(dataset=breastmnst)")


def test_upstream_draws_as_its_authors_do() -> None:
    """One of n corruptions or nothing, uniformly; strengths uniform between the end severities."""
    method = medmnistc.MedMNISTCAugment(dataset="pneumoniamnist")
    torch.manual_seed(0)
    drawn = method.draw(28_000)
    counts = torch.bincount(drawn.codes, minlength=14)
    assert stats.chisquare(counts).pvalue > 0.001
    for code, name in enumerate(method.names):
        own = drawn.settings[drawn.codes == code, 0].numpy()
        (low, *_), (high, *_) = medmnistc.reach("pneumoniamnist", name)
        if name == "gaussian_blur":  # int(U(3, 13)), even numbers minus 1
            sizes, found = np.unique(own, return_counts=True)
            assert sizes.tolist() == [3, 5, 7, 9, 11]
            assert stats.chisquare(found).pvalue > 0.001
            continue
        assert stats.kstest((own - low) / (high - low), "uniform").pvalue > 0.001, name


def test_upstream_applies_what_it_drew() -> None:
    method = medmnistc.MedMNISTCAugment(dataset="breastmnist")
    torch.manual_seed(0)
    x = torch.randint(256, (64, 1, 28, 28)).float() / 255
    batch = Batch(x, torch.zeros(64, 2), torch.full((64,), 1 / 64), torch.arange(64))
    made = method.augment(batch, NO_CONTEXT)
    drawn = method._last
    assert drawn is not None
    same = (made.x == batch.x).flatten(1).all(dim=1)
    assert torch.equal(same, drawn.codes == len(method.names))
    for row in (drawn.codes == method.names.index("pixelate")).nonzero()[:, 0].tolist():
        part = slice(row, row + 1)
        alone = corrupt(batch.x[part], "breastmnist", "pixelate", drawn.settings[part])
        assert torch.equal(made.x[part], alone)
    assert "unchanged" in method.captions()


def test_a_grey_set_on_colours() -> None:
    """Equal channels stay equal; others are corrupted each."""
    grey = torch.rand(2, 1, 28, 28).expand(-1, 3, -1, -1).clone()
    colour = torch.stack([torch.full((28, 28), v) for v in (0.0, 0.5, 1.0)])[None]
    settings = torch.tensor(REGISTRY["breastmnist"]["brightness_up"][0], dtype=torch.float64)
    made = corrupt(
        torch.cat([grey, colour]), "breastmnist", "brightness_up", settings.expand(3, -1)
    )
    alone = corrupt(grey[:, :1], "breastmnist", "brightness_up", settings.expand(2, -1))
    assert torch.equal(made[:2], alone.expand(-1, 3, -1, -1))
    assert made[2, 0].max() < made[2, 1].min() < made[2, 2].min()
