"""Policies: the published ones against Pillow, files, ids, what ``augbench policy`` writes."""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
import yaml
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from torch import Tensor

import methods
from analysis import runs
from benchmarks.cli import main
from benchmarks.cli.policy import instead, visited
from benchmarks.contract import Case, bench, check
from benchmarks.running import firstlook, local
from benchmarks.training.tasks import MultiClass, MultiLabel
from methods import own
from methods.autoaugment import (
    FOLDER,
    RANGES,
    SHIPPED,
    AutoAugment,
    Policy,
    policy_in,
    shuffled,
    tables_of,
    written,
)
from methods.autodo import AutoDO
from methods.base import Batch, Spec
from methods.naming import NamingError
from methods.pasted import code
from methods.randaugment import (
    CUTOUT,
    NAMES,
    OPERATIONS,
    ROTATE,
    UNSIZED,
    RandAugment,
    TrivialAugment,
    boxes_of,
    perform,
    schedule,
)
from tests import sweeping

NO_CONTEXT: Any = None
ROOT = Path(__file__).parent.parent
SMALL = ["--benchmark", "digits(rows_per_class=10)", "--model", "small_cnn(width=0.25)"]
LIMITS = {
    "shear_x": (-0.3, 0.3), "shear_y": (-0.3, 0.3), "translate_x": (-0.45, 0.45),
    "translate_y": (-0.45, 0.45), "rotate": (-30, 30), "solarize": (0, 256), "posterize": (4, 8),
    "contrast": (0.1, 1.9), "color": (0.1, 1.9), "brightness": (0.1, 1.9), "sharpness": (0.1, 1.9),
    "cutout": (0, 0.2),
}  # fmt: skip
"""What a magnitude of 0 and of 1 mean in the code of Fast AutoAugment and DADA."""


@cache
def images(channels: int) -> np.ndarray:
    """(N, C, H, W) uint8 of 28 x 24 pixels."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 255, 28 * 24).reshape(28, 24)
    grey = [ramp, 255 - ramp / 2, *rng.integers(0, 256, (3, 28, 24))]
    images = np.stack(grey)[:, None].repeat(channels, 1)
    if channels == 3:
        images[:, 1] = 255 - images[:, 1]
        images[:, 2] = images[:, 2] // 2 + rng.integers(0, 100, (5, 28, 24))
    return images.astype(np.uint8)


def to_pillow(image: np.ndarray) -> Image.Image:
    whole = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
    return Image.fromarray(np.ascontiguousarray(whole))


def of_pillow(image: Image.Image) -> np.ndarray:
    array = np.asarray(image)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def unit(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.astype(np.float32)) / 255


def batch_of(x: Tensor, labels: Tensor | None = None, classes: int = 3) -> Batch:
    rows = len(x)
    labels = torch.arange(rows) % classes if labels is None else labels
    y = torch.nn.functional.one_hot(labels, classes).float()
    return Batch(x, y, torch.full((rows,), 1 / rows), torch.arange(rows))


def by_pillow(image: Any, name: str, value: float, at: tuple[float, float]) -> Any:
    """An operation as these repositories define it; ``at`` are two draws from [0, 1)."""
    width, height = image.size
    affine = Image.Transform.AFFINE
    if name == "shear_x":
        return image.transform(image.size, affine, (1, value, 0, 0, 1, 0))
    if name == "shear_y":
        return image.transform(image.size, affine, (1, 0, 0, value, 1, 0))
    if name == "translate_x":
        return image.transform(image.size, affine, (1, 0, value * width, 0, 1, 0))
    if name == "translate_y":
        return image.transform(image.size, affine, (1, 0, 0, 0, 1, value * height))
    if name == "rotate":
        return image.rotate(value)
    if name == "posterize":
        return ImageOps.posterize(image, int(value))
    if name == "solarize":
        return ImageOps.solarize(image, value)  # type: ignore[arg-type]
    if name == "flip":
        return ImageOps.mirror(image)
    if name in ("invert", "autocontrast", "equalize"):
        return getattr(ImageOps, name)(image)
    if name != "cutout":
        return getattr(ImageEnhance, name.capitalize())(image).enhance(value)
    side = value * width
    if side <= 0:
        return image
    # numpy.random.uniform(n) draws between n and 1
    x, y = width + (1 - width) * at[0], height + (1 - height) * at[1]
    x, y = int(max(0, x - side / 2)), int(max(0, y - side / 2))
    image = image.copy()
    grey = (125, 123, 114) if image.mode == "RGB" else 123
    box = (x, y, min(width, x + side), min(height, y + side))
    ImageDraw.Draw(image).rectangle(box, grey)
    return image


class TestOperations:
    @pytest.mark.parametrize("channels", [1, 3])
    @pytest.mark.parametrize("name", NAMES[1:])
    def test_any_magnitude_equals_pillow(self, name: str, channels: int) -> None:
        """Geometry and cutout at every pixel, colour within a level of rounding."""
        given, code = images(channels), NAMES.index(name)
        rng = np.random.default_rng(code)
        magnitudes = (0.0, 0.25, 0.5, 1.0, *rng.random(40))
        cells = [(m, n, i) for m in range(44) for n in (0, 1) for i in range(len(given))]
        index, negative, which = torch.tensor(cells).T
        settings, matrices = tables_of(magnitudes, 28, 24)
        codes = torch.full((1, len(cells)), code)
        at = torch.from_numpy(rng.random((2, 1, len(cells))))
        setting = settings[negative, codes[0], index][None]
        boxes = boxes_of(at, setting, 28, 24) if code == CUTOUT else None
        stages = schedule(codes, setting, matrices[negative, codes[0], index][None], boxes)
        got = perform(unit(given[which.numpy()]), stages, "nearest") * 255
        assert torch.allclose(got, got.round(), rtol=0, atol=1e-4)
        if channels == 1 and name == "color":
            return
        low, high = LIMITS.get(name, (0, 1))
        wanted = []
        for column, (m, n, i) in enumerate(cells):
            value = magnitudes[m] * (high - low) + low
            # The sign is random; a translation reads from where the others go to.
            mirrored = n != name.startswith("translate")
            value = -value if code <= ROTATE and mirrored else value
            place = (float(at[0, 0, column]), float(at[1, 0, column]))
            wanted.append(of_pillow(by_pillow(to_pillow(given[i]), name, value, place)))
        difference = np.abs(got.round().numpy().astype(int) - np.stack(wanted))
        assert difference.max() <= (0 if code <= ROTATE or code == CUTOUT else 1)
        assert (difference > 0).mean() < 1e-3
        if name in LIMITS:
            assert not np.array_equal(wanted[3], wanted[33]), "from 0 to 1, on noise"

    def test_a_flip_is_a_warp_among_others(self) -> None:
        """In the order of the operations; colour operations part them."""
        turned = {True: -30, False: 30}
        content = {
            "ranges": "fast_autoaugment",
            "sub_policies": [[["flip", 1.0], ["rotate", 1.0, 1.0], ["solarize", 1.0, 0.4]]],
        }
        method, given = method_of(content), np.tile(images(3), (6, 1, 1, 1))
        torch.manual_seed(5)
        got = (255 * method.augment(batch_of(unit(given)), NO_CONTEXT).x).round().numpy()
        torch.manual_seed(5)
        negative = method.draw(30).negative[1].tolist()
        for row, image in enumerate(given):
            picture = ImageOps.mirror(to_pillow(image)).rotate(turned[bool(negative[row])])
            assert np.array_equal(got[row], of_pillow(ImageOps.solarize(picture, 103)))
        assert method.captions()[0].startswith("flip, rotate ")

    def test_cutout_takes_its_place_among_the_others(self) -> None:
        """Before a rotation it is rotated, after an inversion it is not inverted."""
        content = {
            "ranges": "fast_autoaugment",
            "sub_policies": [
                [["invert", 1.0], ["cutout", 1.0, 0.9], ["rotate", 1.0, 1.0], ["invert", 1.0]]
            ],
        }
        method, given = method_of(content), np.tile(images(3), (6, 1, 1, 1))
        torch.manual_seed(5)
        got = (255 * method.augment(batch_of(unit(given)), NO_CONTEXT).x).round().numpy()
        torch.manual_seed(5)
        drawn = method.draw(30)
        centres = method.centres(drawn)
        assert centres is not None
        for row, image in enumerate(given):
            at = (float(centres[0, 1, row]), float(centres[1, 1, row]))
            picture = by_pillow(ImageOps.invert(to_pillow(image)), "cutout", 0.18, at)
            picture = picture.rotate(-30 if drawn.negative[2, row] else 30)
            assert np.array_equal(got[row], of_pillow(ImageOps.invert(picture)))
        assert "cutout 4.3 px" in method.captions()[0]


def method_of(content: dict[str, Any], **given: Any) -> AutoAugment:
    """A method whose policy file has this content."""
    file = own.Source("mine.yaml", written(content).encode(), False, ".")
    with own.kept({"mine.yaml": file}):
        return AutoAugment(policy="mine.yaml", **given)


class TestPublished:
    @pytest.mark.parametrize(
        ("name", "count"),
        [("faa_cifar10", 493), ("faa_svhn", 497), ("faa_imagenet", 498), ("cifar10", 25),
         ("svhn", 25), ("imagenet", 25)],
    )  # fmt: skip
    def test_all_pairs_are_there(self, name: str, count: int) -> None:
        policy = AutoAugment(policy=name).policy
        assert policy.codes.shape == (2, count) and bool(policy.given.all())
        assert policy.shares is None and policy.classes == 0 and policy.draws == 1

    def test_the_package_has_them_with_their_licences(self) -> None:
        told = tomllib.loads((ROOT / "pyproject.toml").read_text())
        (pattern,) = told["tool"]["setuptools"]["package-data"]["methods"]
        files = {path.name for path in (ROOT / "methods").glob(pattern)}
        assert files == {f"{name}.yaml" for name in SHIPPED} | {"NOTICE", "APACHE-2.0.txt"}
        notice = (FOLDER / "NOTICE").read_text()
        assert "Copyright (c) 2019 Ildoo Kim" in notice and "Copyright 2019 Kakao Brain" in notice

    def test_none_is_left_out(self) -> None:
        assert len(SHIPPED) == 6
        for name in SHIPPED:
            assert methods.build(f"autoaugment(policy={name})")

    def test_numbers_are_those_of_the_sources(self) -> None:
        """Entries read in the repositories, of the first and the last sub-policies."""
        for name, place, wanted in (
            ("faa_cifar10", 0, [["contrast", 0.8320659688593578, 0.49884310562180767],
                                ["translate_x", 0.41849883971249136, 0.394023086494538]]),
            ("faa_cifar10", -1, [["cutout", 0.7550520024859294, 0.08982367300605598],
                                 ["shear_x", 0.5844942417320858, 0.36051195083380105]]),
            ("faa_imagenet", 0, [["shear_y", 0.14143816458479197, 0.513124791615952],
                                 ["sharpness", 0.9290316227291179, 0.9788406212603302]]),
            ("faa_imagenet", -1, [["autocontrast", 0.5404508567155423, 0.7472387762067986],
                                  ["equalize", 0.05649876539221024, 0.5628180219887216]]),
            ("faa_svhn", -1, [["contrast", 0.9932891064746089, 0.46930062926732646],
                              ["posterize", 0.9033014136780437, 0.5745902253320527]]),
            ("faa_svhn", -2, [["contrast", 0.529508728421701, 0.36477855845285007],
                              ["color", 0.7145481740509138, 0.2950794787786947]]),
        ):  # fmt: skip
            assert AutoAugment(policy=name).as_policy({})["sub_policies"][place] == wanted

    @pytest.mark.parametrize("name", ["faa_cifar10", "faa_svhn"])
    def test_probabilities_are_kept(self, name: str) -> None:
        """Of every pair of operations, done or not, in 40,000 rows."""
        method, rows = AutoAugment(policy=name), 40_000
        torch.manual_seed(1)
        codes = method.draw(rows).codes
        got, wanted = np.zeros((16, 16)), np.zeros((16, 16))
        np.add.at(got, tuple(codes.numpy()), 1)
        pairs = method.as_policy({})["sub_policies"]
        for (one, p, _), (two, q, _) in pairs:
            i, j = NAMES.index(one), NAMES.index(two)
            share = np.array([p * q, p * (1 - q), (1 - p) * q, (1 - p) * (1 - q)])
            np.add.at(wanted, ([i, i, 0, 0], [j, 0, j, 0]), share * rows / len(pairs))
        assert not got[wanted < 1e-9].any()
        some = wanted > 1
        fit: Any = scipy.stats.chisquare(
            np.append(got[some], got[~some].sum() + 1),
            np.append(wanted[some], wanted[~some].sum() + 1),
        )
        assert fit.pvalue > 0.001

    def test_centres_of_cutouts_are_uniform_in_the_image(self) -> None:
        method = AutoAugment(policy="faa_imagenet")
        torch.manual_seed(0)
        centres = method.centres(method.draw(4000))
        assert centres is not None and centres.dtype == torch.float64
        fit: Any = scipy.stats.kstest(centres.flatten().numpy(), "uniform")
        assert fit.pvalue > 0.001
        assert AutoAugment(policy="svhn").centres(method.draw(2)) is None


COUNTED = {
    "ranges": "standard",
    "sub_policies": [[["rotate", 1.0, 3]], [["invert", 1.0]], [["equalize", 1.0]]],
    "weights": [1, 0, 3.5],
}
BY_CLASS = {
    "ranges": "standard",
    "classes": [
        {"sub_policies": [[["invert", 1.0]]]},
        {"sub_policies": [[["rotate", 1.0, 9], ["equalize", 1.0]], [["solarize", 1.0, 30]]]},
        {"sub_policies": [[["posterize", 1.0, 5]], [["identity", 1.0]]], "weights": [3, 1]},
    ],
}


class TestFiles:
    def test_weights_are_shares(self) -> None:
        torch.manual_seed(0)
        found = Counter(method_of(COUNTED).draw(20_000).codes[0].tolist())
        assert set(found) == {OPERATIONS.index(name) for name in ("rotate", "equalize")}
        chance = scipy.stats.binomtest(found[ROTATE], 20_000, 1 / 4.5).pvalue
        assert chance > 0.001

    def test_several_draws_follow_each_other(self) -> None:
        """Each of them is a sub-policy of its own, in the order of its operations."""
        content = {
            "ranges": "standard",
            "draws": 3,
            "sub_policies": [[["rotate", 1.0, 4], ["invert", 0.5]], [["equalize", 1.0]]],
        }
        torch.manual_seed(0)
        codes, magnitude, _ = method_of(content).draw(8000)
        assert codes.shape == (6, 8000)
        rotate, equalize, invert = (OPERATIONS.index(n) for n in ("rotate", "equalize", "invert"))
        for slot in (0, 2, 4):
            first = codes[slot] == rotate
            assert bool((first | (codes[slot] == equalize)).all())
            assert bool((magnitude[slot][first] == 4).all())
            assert bool((codes[slot + 1][~first] == 0).all()), "the shorter one is padded"
            assert set(codes[slot + 1].tolist()) == {0, invert}
            assert scipy.stats.binomtest(int(first.sum()), 8000).pvalue > 0.001
        table = np.zeros((2, 2))
        np.add.at(table, ((codes[0] == rotate).numpy() * 1, (codes[2] == rotate).numpy() * 1), 1)
        found: Any = scipy.stats.chi2_contingency(table)
        assert found.pvalue > 0.001

    def test_a_row_has_the_policy_of_its_label(self) -> None:
        method, x = method_of(BY_CLASS), torch.rand(3000, 1, 6, 6)
        labels = torch.arange(3000) % 3
        torch.manual_seed(0)
        method.augment(batch_of(x, labels), NO_CONTEXT)
        first = [caption.split()[0] for caption in method.captions()]
        assert set(first[0::3]) == {"invert"} and set(first[2::3]) == {"posterize", "identity"}
        assert set(first[1::3]) == {"rotate", "solarize"}
        torch.manual_seed(0)
        codes = method.draw(3000, labels).codes
        named = [{OPERATIONS[c] for c in codes[0, labels == k].tolist()} for k in range(3)]
        assert named == [{"invert"}, {"rotate", "solarize"}, {"posterize", "identity"}]
        equal = int((codes[0, labels == 1] == ROTATE).sum())
        assert scipy.stats.binomtest(equal, 1000).pvalue > 0.001
        often = int((codes[0, labels == 2] > 0).sum())
        assert scipy.stats.binomtest(often, 1000, 0.75).pvalue > 0.001
        plain = batch_of(x[:3], labels[:3])
        mixed = replace(plain, y=0.6 * plain.y + 0.4 * plain.y.roll(1, 1))
        torch.manual_seed(0)
        method.augment(mixed, NO_CONTEXT)
        assert method.captions()[0] == "invert"

    def test_a_policy_by_class_fits_its_data_only(self, file: Path) -> None:
        file.write_text(written(BY_CLASS))
        method = methods.build("autoaugment(policy='mine.yaml')")
        assert method.supports(MultiClass(), Spec(9, 3, (1, 8, 8))) == ""
        assert "3 classes, but the data have 4" in method.supports(
            MultiClass(), Spec(9, 4, (1, 8, 8))
        )
        assert "one label per row" in method.supports(MultiLabel(), Spec(9, 3, (1, 8, 8)))
        assert "label" in method.waits and not methods.build("autoaugment").waits

    @pytest.mark.parametrize("name", ["counted", "by class", "normal", "normal by class"])
    def test_the_contract(self, file: Path, name: str) -> None:
        file.write_text(written({"counted": COUNTED, "by class": BY_CLASS, **NORMAL}[name]))
        made = "shuffled_policy(upstream=autoaugment(policy='mine.yaml'))"
        for look in ("shapes", "ranges", "elsewhere", "deterministic", "state_round_trip", "waits"):
            assert check(look, lambda: methods.build(made), Case(3)) == ""

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("- 1", r"expected a mapping with ranges, bins, draws, .*, got \[1\]"),
            ("ranges: [", "cannot be read as YAML"),
            ("ranges: faa\nsub_policies: [[[invert, 1]]]", "ranges: expected standard or wide or"),
            ("ranges: wide\nsubpolicies: []", "did you mean 'sub_policies'.*got 'subpolicies'"),
            ("ranges: wide", "expected either sub_policies or classes"),
            ("ranges: wide\nsub_policies: []", "expected a list of at least one sub-policy"),
            ("ranges: wide\nsub_policies: [[invert, 1]]", r"sub-policy 1: expected a list of oper"),
            ("ranges: wide\nsub_policies: [[[invert]]]", r"expected \[operation, probability\] or"),
            ("ranges: wide\nsub_policies: [[[inver, 1]]]", "did you mean 'invert'"),
            ("ranges: wide\nsub_policies: [[[cutout, 1, 3]]]", "expected an operation of identity"),
            ("ranges: wide\nsub_policies: [[[invert, 1.2]]]", "invert, probability: expected a n"),
            ("ranges: wide\nsub_policies: [[[invert, yes]]]", "from 0 to 1, got True"),
            ("ranges: wide\nsub_policies: [[[rotate, 1]]]", "expected a magnitude after the prob"),
            ("ranges: wide\nsub_policies: [[[rotate, 1, 31]]]", "a step from 0 to 30"),
            ("ranges: wide\nsub_policies: [[[rotate, 1, 0.5]]]", "a whole number of 0 or more"),
            ("ranges: wide\nbins: 1\nsub_policies: [[[rotate, 1, 0]]]", "bins: expected a whole"),
            ("ranges: wide\ndraws: 0\nsub_policies: [[[invert, 1]]]", "draws: expected a whole"),
            ("ranges: autodo\ndraws: 2\nsub_policies: [[[rotate, 1, 1]]]", "draws: expected 1"),
            ("ranges: autodo\nbins: 9\nsub_policies: [[[rotate, 1, 1]]]", "bins: expected none"),
            ("ranges: autodo\nsub_policies: [[[rotate, 1, 2]]]", "from 0 to 1, got 2"),
            ("ranges: autodo\nsub_policies: [[[rotate, 1, 1], [rotate, 1, 1]]]", "operation once"),
            ("ranges: wide\nsub_policies: [[[invert, 1]]]\nweights: [1, 2]", "a list of 1, one"),
            ("ranges: wide\nsub_policies: [[[invert, 1]]]\nweights: [0]", "at least one above 0"),
            ("ranges: wide\nsub_policies: [[[invert, 1]]]\nweights: [-1]", "0 or more, got -1"),
            ("ranges: wide\nsub_policies: [[[invert, 1]]]\nweights: [.inf]", "a finite .*got inf"),
            ("ranges: wide\nsub_policies: [[[invert, 1]]]\nweights: [.nan]", "a finite .*got nan"),
            (f"ranges: wide\nsub_policies: [[[invert, 1]]]\nweights: [{9**400}]", "a finite numb"),
            ("ranges: wide\nsub_policies: [[[invert, 1]], [[invert, 1]]]\n"
             "weights: [1.0e+308, 1.0e+308]", "weights: expected numbers whose sum is finite"),
            (f"ranges: wide\nsub_policies: [[[invert, {9**400}]]]", "a number from 0 to 1"),
            ("ranges: [standard]", r"ranges: expected standard or .*got \['standard'\]"),
            ("ranges: {standard: 1}", "ranges: expected standard or .*got {'standard': 1}"),
            (f"ranges: wide\nbins: {10**20}\nsub_policies: [[[rotate, 1, 0]]]", "from 2 to 1000"),
            (f"ranges: wide\ndraws: {10**20}\nsub_policies: [[[invert, 1]]]", "from 1 to 1000"),
            ("ranges: wide\nclasses: [{sub_policies: [[[invert, 1]]]}]", "a policy for each class"),
            ("ranges: wide\nweights: [1]\nclasses: [{}, {}]", "weights: expected them within each"),
            ("ranges: wide\nclasses: [{}, {}]", r"class 0 \(from 0\), sub_policies: expected a li"),
            ("ranges: wide\nclasses: [{sub_policies: [[[invert, 1]]]}, {draws: 2}]", "class 1"),
        ],
    )  # fmt: skip
    def test_what_is_wrong_is_told(self, file: Path, text: str, message: str) -> None:
        file.write_text(text)
        with pytest.raises(NamingError, match=f"policy 'mine.yaml'.*{message}"):
            methods.build("autoaugment(policy='mine.yaml')")

    def test_unknown_names_are_told(self, file: Path) -> None:
        with pytest.raises(NamingError, match=r"did you mean 'faa_cifar10'.*named with its suffix"):
            methods.build("autoaugment(policy=faa_cifar)")
        with pytest.raises(NamingError, match=r"found no 'yours.yaml' in .*augbench policy writes"):
            methods.build("autoaugment(policy='yours.yaml')")

    def test_the_example_of_the_page_is_read(self) -> None:
        page = (ROOT / "docs/methods/policies.md").read_text()
        examples = re.findall(r"^```yml\n(.*?)^```$", page, re.S | re.M)
        assert len(examples) == 3
        for each in examples:
            assert isinstance(policy_in(yaml.safe_load(each), "example"), Policy)

    def test_the_page_makes_files_of_another_list(self, file: Path) -> None:
        Path("genotype.py").write_text(
            "A = a = [[('TranslateX', 0.5, 0.25), ('AutoContrast', 1.0, 0.5)], "
            "[('ShearY', 0.0, 1.01), ('Cutout', 0.5, 0.5)]]\n\n# B = b = []\n"
        )
        page = (ROOT / "docs/methods/policies.md").read_text()
        (snippet,) = re.findall(r"^```python\n(.*?)^```$", page, re.S | re.M)
        exec(snippet, {})
        assert AutoAugment(policy="dada_a.yaml").as_policy({}) == {
            "ranges": "fast_autoaugment",
            "sub_policies": [
                [["translate_x", 0.5, 0.25], ["autocontrast", 1.0, 0.5]],
                [["shear_y", 0.0, 1.0], ["cutout", 0.5, 0.5]],
            ],
        }

    def test_what_is_written_is_read_again(self) -> None:
        for content in (COUNTED, BY_CLASS, *NORMAL.values()):
            assert yaml.safe_load(written(content, ["a remark"])) == content
        tiny = {"ranges": "autodo", "sub_policies": [[["rotate", 1e-05, 2.5e-07]]]}
        assert yaml.safe_load(written(tiny)) == tiny


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A policy file in the current folder."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine.yaml"
    path.write_text(written(COUNTED))
    return path


class TestIds:
    NAME = "autoaugment(policy='mine.yaml')"

    def test_an_id_holds_what_the_file_says(self, file: Path) -> None:
        assert methods.canonical(self.NAME) == self.NAME
        assert methods.own_names(f"crop+{self.NAME}") == ["mine.yaml"]
        first = methods.versions(f"saflex(upstream={self.NAME})")
        assert set(first) == {"Saflex", "AutoAugment", "mine.yaml"}
        file.write_text("# a remark\n" + file.read_text())
        assert methods.versions(f"saflex(upstream={self.NAME})") == first
        file.write_text(file.read_text().replace("3.5", "3.25"))
        changed = methods.versions(f"saflex(upstream={self.NAME})")
        assert changed["mine.yaml"] != first["mine.yaml"]
        assert "mine.yaml" not in methods.versions("autoaugment(policy=svhn)")

    def test_a_worker_has_the_file_as_it_was(
        self, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with own.kept():
            version = methods.versions(self.NAME)
            carried = own.sources(["mine.yaml"])
            file.write_text(written(BY_CLASS))
            assert methods.versions(self.NAME) == version, "read once"
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        monkeypatch.chdir(elsewhere)
        assert own.problems(carried) == []
        with own.kept(carried):
            method = methods.build(self.NAME)
            assert isinstance(method, AutoAugment) and method.policy.classes == 0
            assert methods.versions(self.NAME) == version
        with pytest.raises(NamingError, match="found no 'mine\\.yaml'"):
            methods.build(self.NAME)

    def test_a_comparison_runs_with_it(
        self, file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(local.Processes, "carry_out", sweeping.carry_out_here)
        monkeypatch.setattr(firstlook, "_cost", lambda *_: "not timed")
        asked = ["compare", *SMALL, "--seeds", "1", "--epochs", "1", "--jobs", "1", "--out", "out"]
        asked += ["--controls", "--methods", self.NAME]
        assert main.run(asked) == 0
        made = {path.name for path in runs.folders(Path("out"))}
        rows = {runs.read_run(Path("out") / name)[0].method for name in made}
        assert rows == {self.NAME, f"shuffled_policy(upstream={self.NAME})"}
        assert main.run(asked) == 0
        assert {path.name for path in runs.folders(Path("out"))} == made
        file.write_text(file.read_text().replace("3.5", "2"))
        assert main.run(asked) == 0
        assert len(list(runs.folders(Path("out")))) == 4
        assert "2 runs of older versions" not in capsys.readouterr().err


class TestShuffled:
    def test_operations_stay_and_values_move(self) -> None:
        before = AutoAugment(policy="faa_svhn").policy
        torch.manual_seed(0)
        after = shuffled(before)
        assert torch.equal(after.codes, before.codes)
        assert not torch.equal(after.probability, before.probability)
        for name in ("probability", "magnitude"):
            one, other = getattr(before, name), getattr(after, name)
            assert torch.equal(one.flatten().sort().values, other.flatten().sort().values)
        sized = [code not in UNSIZED for code in before.codes.flatten().tolist()]
        assert before.sized.flatten().tolist() == sized
        one, other = before.magnitude[before.sized], after.magnitude[before.sized]
        assert torch.equal(one.sort().values, other.sort().values)
        assert float((one != other).float().mean()) > 0.9
        assert bool((after.magnitude[~before.sized] == before.magnitude[~before.sized]).all())

    def test_padding_takes_no_part(self) -> None:
        before = policy_in(BY_CLASS, "policy")
        torch.manual_seed(0)
        after = shuffled(before)
        assert bool((after.probability[~before.given] == 0).all())
        assert bool((after.probability[before.given] == 1).all())

    def test_what_is_never_drawn_takes_no_part(self) -> None:
        """The values of what is drawn stay among themselves."""
        told = [[["rotate", k / 10, k], ["solarize", k / 20, 2 * k]] for k in range(1, 9)]
        weights = [0, 1, 2, 0, 0.5, 3, 1, 0]
        content = {"ranges": "wide", "sub_policies": told, "weights": weights}
        before = policy_in(content, "policy")
        drawn = torch.tensor(weights) > 0
        assert torch.equal(before.drawn, drawn)
        torch.manual_seed(0)
        after = shuffled(before)
        for name in ("probability", "magnitude"):
            one, other = getattr(before, name), getattr(after, name)
            assert torch.equal(one[:, ~drawn], other[:, ~drawn])
            assert not torch.equal(one, other)
            sorts = [each[:, drawn].flatten().sort().values for each in (one, other)]
            assert torch.equal(*sorts)
        equal = policy_in({**content, "weights": [1] * 8}, "policy")
        plain = policy_in({k: v for k, v in content.items() if k != "weights"}, "policy")
        torch.manual_seed(1)
        one = shuffled(equal)
        torch.manual_seed(1)
        assert torch.equal(one.probability, shuffled(plain).probability)

    def test_it_is_drawn_once_per_run(self) -> None:
        """By the seed of the run: the contract's bench has one, and sets up twice."""

        def made() -> AutoAugment:
            control = bench(lambda: methods.build("shuffled_policy(upstream=autoaugment)"), Case(1))
            control.augment(control.batch())
            assert isinstance(control.method.upstream, AutoAugment)
            return control.method.upstream

        one, other, plain = made().policy, made().policy, AutoAugment().policy
        assert torch.equal(one.probability, other.probability)
        assert torch.equal(one.magnitude, other.magnitude)
        assert not torch.equal(one.probability, plain.probability)
        assert methods.build("autoaugment").as_policy({})
        assert made().as_policy({}) == {}

    def test_a_second_setup_shuffles_the_policy_itself(self) -> None:
        method = AutoAugment(policy="svhn")
        method.shuffle = True
        found = []
        for _ in range(2):
            torch.manual_seed(3)
            method.setup(NO_CONTEXT)
            found.append(method.policy.probability)
        assert torch.equal(*found)

    def test_what_it_controls(self) -> None:
        name = "crop+autoaugment(policy=faa_svhn)+flip"
        wanted = "crop+shuffled_policy(upstream=autoaugment(policy=faa_svhn))+flip"
        assert methods.controls_of(name) == (wanted,)
        spec = Spec(9, 3, (1, 8, 8))
        reason = methods.build("shuffled_policy(upstream=crop)").supports(MultiClass(), spec)
        assert reason.startswith("shuffled_policy needs upstream=autoaugment")
        assert methods.declared("shuffled_policy") == methods.Declared(True, True)


WARPS: tuple[str, ...] = (
    "rotate",
    "translate_x",
    "translate_y",
    "shear_x",
    "shear_y",
    "scale_x",
    "scale_y",
)
NORMAL: dict[str, Any] = {
    "normal": {
        "ranges": "autodo",
        "sub_policies": [
            [["scale_x", 0.5, 0.4], ["rotate", 0.9, 1.0]],
            [["shear_y", 1.0, 0.25]],
        ],
        "weights": [1, 2],
    },
    "normal by class": {
        "ranges": "autodo",
        "classes": [
            {"sub_policies": [[["rotate", 1.0, 0.5]]]},
            {"sub_policies": [[["scale_x", 1.0, 0.5]]]},
            {"sub_policies": [[["identity", 1.0, 0.5]]]},
        ],
    },
}
NORMAL["normal by class"]["classes"][2]["sub_policies"] = [[["translate_y", 0.0, 0.5]]]


def warps(method: AutoAugment, batch: Batch) -> Tensor:
    """(B, 7) the amounts that a policy of warps draws for a batch."""
    method.augment(batch, NO_CONTEXT)
    assert method._amounts is not None
    return method._amounts


class TestWarps:
    def test_amounts_are_normal_with_their_probability(self, file: Path) -> None:
        file.write_text(written(NORMAL["normal"]))
        method = AutoAugment(policy="mine.yaml")
        torch.manual_seed(0)
        amounts = warps(method, batch_of(torch.rand(30_000, 1, 2, 2)))
        used: dict[str, Tensor] = dict(zip(WARPS, amounts.T, strict=True))
        assert {name for name, each in used.items() if each.any()} == {
            "rotate",
            "scale_x",
            "shear_y",
        }
        for name, share, scale in (
            ("rotate", 0.9 / 3, np.radians(30)),
            ("scale_x", 0.5 / 3, 0.4 * np.log(1.5)),
            ("shear_y", 2 / 3, 0.25 * 0.3),
        ):
            applied = used[name][used[name] != 0]
            assert scipy.stats.binomtest(len(applied), 30_000, share).pvalue > 0.001
            fit: Any = scipy.stats.kstest(applied.numpy(), "norm", (0, scale))
            assert fit.pvalue > 0.001
        assert not bool((used["shear_y"] * used["rotate"]).any()), "of different sub-policies"

    def test_a_class_has_its_own(self, file: Path) -> None:
        file.write_text(written(NORMAL["normal by class"]))
        method, x = AutoAugment(policy="mine.yaml"), torch.rand(300, 1, 5, 4)
        labels = torch.arange(300) % 3
        amounts = warps(method, batch_of(x, labels))
        assert [amounts[labels == k].any(dim=0).nonzero().tolist() for k in range(3)] == [
            [[0]], [[5]], []
        ]  # fmt: skip
        assert method.waits == "" and len(method.captions()) == 300


def autodo_of(name: str, probability: Tensor, magnitude: Tensor) -> Any:
    """AutoDO, set up, with these probabilities and magnitudes."""
    ready = bench(lambda: methods.build(name), Case(1))
    method: Any = ready.method
    method.chance.values.copy_(probability.logit())
    method.spread.values.copy_(magnitude.logit())
    return ready


class TestRoundTrip:
    @pytest.mark.parametrize("n", [1, 2, 3])
    @pytest.mark.parametrize("ops", ["all", "colour"])
    def test_randaugment_and_its_policy_draw_the_same(self, n: int, ops: Any) -> None:
        """By the same random numbers, bit for bit."""
        one = RandAugment(n=n, m=11, ops=ops, interpolation="bilinear")
        other = method_of(through_yaml(one.as_policy({})), interpolation="bilinear")
        batch = batch_of(unit(np.tile(images(3), (20, 1, 1, 1))))
        outs = []
        for method in (one, other):
            torch.manual_seed(n)
            outs.append(method.augment(batch, NO_CONTEXT).x)
        assert torch.equal(*outs) and not torch.equal(outs[0], batch.x)

    @pytest.mark.parametrize("space", ["wide", "standard"])
    def test_trivialaugment_and_its_policy_are_equal_in_distribution(self, space: Any) -> None:
        """Exactly: the share of every operation, magnitude and sign."""
        content = through_yaml(TrivialAugment(space=space).as_policy({}))
        policy = policy_in(content, "policy")
        assert policy.shares is not None and policy.certain and content["ranges"] == space
        shares = np.diff(policy.shares[0].numpy(), prepend=0)
        got: Counter[tuple[int, int]] = Counter()
        columns = zip(policy.codes[0].tolist(), policy.magnitude[0].tolist(), shares, strict=True)
        for operation, step, share in columns:
            got[operation, step] += share
        wanted = {
            (operation, step): 1 / 14 if operation in UNSIZED else 1 / 434
            for operation in range(15)
            for step in (range(1) if operation in UNSIZED else range(31))
            if OPERATIONS[operation] != "invert"
        }
        assert dict(got) == pytest.approx(wanted)
        method = method_of(content)
        one, other = (
            each.tables(torch.device("cpu"), 20, 30)
            for each in (method, TrivialAugment(space=space))
        )
        assert torch.equal(one.settings, other.settings)

    @pytest.mark.parametrize("shared", [True, False])
    def test_autodo_and_its_policy_warp_the_same(self, file: Path, shared: bool) -> None:
        """By the same random numbers, whether all rows share a policy or those of a class do."""
        torch.manual_seed(3)
        count = 1 if shared else 3
        probability, magnitude = torch.rand(2, count, 7).clamp(0.05, 0.95)
        row = "autodo(weight=false, label=false, symmetric=never" + ", shared=true" * shared + ")"
        rows = slice(None) if shared else torch.arange(36) % 3  # labels of the contract's rows
        ready = autodo_of(row, probability[rows], magnitude[rows])
        learned = {name: each.numpy() for name, each in ready.method.learned().items()}
        if not shared:
            learned = {name: each[:3] for name, each in learned.items()}
        file.write_text(written(ready.method.as_policy(learned)))
        other = AutoAugment(policy="mine.yaml")
        assert bool(other.policy.classes) != shared
        for step in range(20):
            batch = ready.batch(rows=36, step=step)
            torch.manual_seed(step)
            wanted = ready.method.augment(batch, ready.ctx).x
            torch.manual_seed(step)
            got = other.augment(batch, ready.ctx).x
            assert torch.allclose(got, wanted, rtol=0, atol=1e-5)
            assert not torch.equal(got, batch.x)

    def test_only_learned_warps_are_a_policy(self) -> None:
        method = methods.build("autodo(augment=false)")
        assert method.as_policy({}) == {}
        assert methods.build("crop").as_policy({}) == {}


def through_yaml(content: dict[str, Any]) -> dict[str, Any]:
    return yaml.safe_load(written(content))


def pasted(content: dict[str, Any]) -> dict[str, Any]:
    """What the code for torchvision defines."""
    own.import_torchvision()
    scope: dict[str, Any] = {}
    exec(code(through_yaml(content)), scope)
    return scope


class TestCode:
    def test_what_torchvision_has_is_named(self) -> None:
        own.import_torchvision()
        from torchvision.transforms import v2

        made = pasted(RandAugment(n=3, m=4).as_policy({}))["transform"]
        assert isinstance(made, v2.RandAugment) and (made.num_ops, made.magnitude) == (3, 4)
        assert isinstance(
            pasted(TrivialAugment().as_policy({}))["transform"], v2.TrivialAugmentWide
        )
        made = pasted(AutoAugment(policy="svhn").as_policy({}))["transform"]
        assert isinstance(made, v2.AutoAugment) and made.policy == v2.AutoAugmentPolicy.SVHN

    @pytest.mark.parametrize("name", NAMES[1:])
    @pytest.mark.parametrize("ranges", ["standard", "wide", "fast_autoaugment"])
    def test_every_operation_is_ours(self, ranges: str, name: str) -> None:
        """Both signs occur, and each result is one of our two, on PIL images."""
        if name not in RANGES[ranges]:
            return
        size = [] if NAMES.index(name) in UNSIZED else [0.8 if ranges[0] == "f" else 20]
        content = {"ranges": ranges, "sub_policies": [[[name, 1.0, *size]]]}
        transform, image = pasted(content)["transform"], images(3)[4]
        method = method_of(content)
        torch.manual_seed(0)
        batch = batch_of(unit(np.stack([image] * 64)))
        ours = (255 * method.augment(batch, NO_CONTEXT).x).round().numpy().astype(int)
        theirs = [of_pillow(transform(to_pillow(image))).astype(int) for _ in range(64)]
        if name == "cutout":
            areas = [
                [int((each != image).any(0).sum()) for each in part] for part in (ours, theirs)
            ]
            fit: Any = scipy.stats.ks_2samp(areas[0], areas[1])
            assert fit.pvalue > 0.001 and max(areas[0]) == max(areas[1])
            return
        kinds = [np.unique(np.stack(list(part)), axis=0) for part in (ours, theirs)]
        assert len(kinds[0]) == len(kinds[1])
        for one, other in zip(*kinds, strict=True):
            apart = np.abs(one - other)
            assert apart.max() <= (1 if NAMES.index(name) > ROTATE else 0)

    def test_weights_and_draws_are_kept(self) -> None:
        content = {**COUNTED, "draws": 2}
        made = pasted(content)["transform"]
        assert made.weights.tolist() == pytest.approx([1 / 4.5, 0, 3.5 / 4.5], abs=1e-5)
        torch.manual_seed(0)
        image = to_pillow(images(1)[2])
        twice = ImageOps.equalize(ImageOps.equalize(image))
        turned = sum(made(image) != twice for _ in range(300))
        assert scipy.stats.binomtest(turned, 300, 1 - (3.5 / 4.5) ** 2).pvalue > 0.001

    def test_by_class_there_is_one_each(self) -> None:
        made = pasted(BY_CLASS)["transforms"]
        assert [len(each.sub_policies) for each in made] == [1, 2, 2]
        assert made[2].weights.tolist() == pytest.approx([0.75, 0.25])
        image = to_pillow(images(1)[2])
        assert np.array_equal(of_pillow(made[0](image)), 255 - images(1)[2])

    def test_warps_are_ours_by_the_same_random_numbers(self, file: Path) -> None:
        content = {"ranges": "autodo", "sub_policies": [[[n, 0.6, 0.3] for n in WARPS]]}
        file.write_text(written(content))
        made, method = pasted(content)["transform"], AutoAugment(policy="mine.yaml")
        x = torch.rand(40, 3, 11, 17)
        torch.manual_seed(1)
        theirs = made(x)
        torch.manual_seed(1)
        ours = method.augment(batch_of(x), NO_CONTEXT).x
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-4)
        assert made(x[0]).shape == x[0].shape
        by_class = pasted(NORMAL["normal by class"])["transforms"]
        assert len(by_class) == 3 and by_class[1].magnitude.tolist()[0][5] == 0.5


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run directories by method."""
    out = tmp_path_factory.mktemp("trained")
    found: dict[str, Path] = {}
    for name in (
        "autodo(start=1, upstream=crop)",
        "autodo(start=1, shared=true)",
        "crop+randaugment(m=7, interpolation=bilinear)",
        "randaugment+trivialaugment",
        "mixup",
    ):
        asked = ["run", *SMALL, "--epochs", "2", "--batch-size", "16", "--out", str(out)]
        assert main.run([*asked, "--method", name]) == 0
        new = set(runs.folders(out)) - {*found.values()}
        found[name] = new.pop()
    return found


POLICIES = (AutoAugment, AutoDO, RandAugment)


class TestCommand:
    def test_rows_that_were_never_seen_do_not_count(self) -> None:
        groups = [np.array([0, 2]), np.array([1, 3])]
        kept = visited(groups, np.array([0, 0, 3, 0]))
        assert [rows.tolist() for rows in kept] == [[2], [1, 3]], "of a class without any, all do"

    def test_by_class_it_is_the_mean_of_the_rows(
        self, trained: dict[str, Path], file: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run = trained["autodo(start=1, upstream=crop)"]
        assert main.run(["policy", str(run), "--out", "p.yaml"]) == 0
        shown = capsys.readouterr().out
        assert "p.yaml: a policy for each of 10 classes, mean over each class's rows" in shown
        use = "crop+autoaugment(policy='p.yaml')"
        assert shown.splitlines()[-1] == f'Use it: --methods "{use}"'
        content = yaml.safe_load(Path("p.yaml").read_text())
        learned = runs.read_arrays(run / "learned.npz")
        # the labels that it learned are still those that were given
        labels = learned["label"].argmax(axis=1)
        assert len(content["classes"]) == 10
        for number, each in enumerate(content["classes"]):
            ((names, *values),) = [list(zip(*one, strict=True)) for one in each["sub_policies"]]
            assert names == WARPS
            for name, got in zip(("probability", "magnitude"), values, strict=True):
                mean = learned[name][labels == number].mean(axis=0)
                assert got == pytest.approx(mean, abs=1e-6)
        assert methods.build(use)

        assert main.run(["policy", str(run), "--out", "all.yaml", "--by", "all"]) == 0
        one = yaml.safe_load(Path("all.yaml").read_text())["sub_policies"]
        assert len(one) == 1
        got = [probability for _, probability, _ in one[0]]
        assert got == pytest.approx(learned["probability"].mean(axis=0), abs=1e-6)

    def test_a_shared_one_is_exact(
        self, trained: dict[str, Path], file: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run = trained["autodo(start=1, shared=true)"]
        assert main.run(["policy", str(run)]) == 0
        policy = AutoAugment(policy="policy.yaml").policy
        learned = runs.read_arrays(run / "learned.npz")
        assert np.array_equal(policy.probability[:, 0].numpy(), learned["probability"][0])
        values = np.array(policy.values)[policy.magnitude[:, 0].numpy()]
        assert np.array_equal(values.astype(np.float32), learned["magnitude"][0])
        capsys.readouterr()
        Path("policy.yaml").unlink()
        assert main.run(["policy", str(run), "--torchvision"]) == 0
        assert not Path("policy.yaml").exists(), "written only with --out"
        scope: dict[str, Any] = {}
        exec(capsys.readouterr().out, scope)
        assert scope["transform"](torch.rand(1, 9, 9)).shape == (1, 9, 9)
        assert main.run(["policy", str(run), "--torchvision", "--out", "both.yaml"]) == 0
        assert AutoAugment(policy="both.yaml").policy.ranges == "autodo"

    def test_another_file_stays(
        self, trained: dict[str, Path], file: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run, before = str(trained["autodo(start=1, shared=true)"]), file.read_text()
        for more in ([], ["--torchvision"]):
            assert main.run(["policy", run, "--out", "mine.yaml", *more]) == 2
            assert "mine.yaml exists with other content; give another" in capsys.readouterr().err
        assert file.read_text() == before
        for _ in range(2):  # the same content may be written again
            assert main.run(["policy", run, "--out", "new.yaml"]) == 0
        Path("folder.yaml").mkdir()
        assert main.run(["policy", run, "--out", "folder.yaml"]) == 2

    def test_a_file_that_has_changed_since_the_run_is_refused(
        self, file: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        method = "crop+autoaugment(policy='mine.yaml')"
        asked = ["run", *SMALL, "--epochs", "1", "--out", "out", "--method", method]
        assert main.run(asked) == 0
        (run,) = map(str, runs.folders(Path("out")))
        file.write_text("# a remark\n" + file.read_text())
        assert main.run(["policy", run, "--out", "p.yaml"]) == 0
        assert yaml.safe_load(Path("p.yaml").read_text()) == COUNTED
        file.write_text(file.read_text().replace("3.5", "3.25"))
        capsys.readouterr()
        for more in (["--out", "q.yaml"], ["--torchvision"]):
            assert main.run(["policy", run, *more]) == 2
            shown = capsys.readouterr()
            assert "run: mine.yaml has changed since the run" in shown.err and not shown.out
        assert not Path("q.yaml").exists()

    @pytest.mark.parametrize(
        ("method", "wanted"),
        [
            ("randaugment", "USE"),
            ("crop+randaugment+flip", "crop+USE+flip"),
            ("saflex(upstream=crop+randaugment)", "saflex(upstream=crop+USE)"),
            ("lilaw(upstream=autoaugment)", "lilaw(upstream=USE)"),
            ("lilaw(upstream=crop+autoaugment+flip)", "lilaw(upstream=crop+USE+flip)"),
            ("autodo(upstream=crop)", "crop+USE"),
            ("autodo(shared=true, upstream=crop+flip)", "crop+flip+USE"),
            ("shuffled_weights(upstream=autodo(upstream=crop))", "crop+USE"),
            ("frozen(upstream=autodo)", "USE"),
            ("head_refit(upstream=frozen(upstream=autodo(upstream=crop)))",
             "head_refit(upstream=crop+USE)"),
            ("shuffled_weights(upstream=saflex(upstream=crop+randaugment))",
             "shuffled_weights(upstream=saflex(upstream=crop+USE))"),
        ],
    )  # fmt: skip
    def test_the_line_to_use_keeps_everything_else(
        self, file: Path, method: str, wanted: str
    ) -> None:
        name = methods.canonical(method)
        built = methods.build(name)
        (part,) = (each for each in built.parts() if isinstance(each, POLICIES))
        use = wanted.replace("USE", "autoaugment(policy='mine.yaml')")
        assert instead(name, built, part, Path("mine.yaml")) == f'--methods "{use}"'
        assert methods.canonical(use) == use
        spec = Spec(20, 3, (1, 8, 8))
        file.write_text(written(RandAugment().as_policy({})))
        assert methods.build(use).supports(MultiClass(), spec) == ""

    def test_a_link_of_a_chain_has_one(
        self, trained: dict[str, Path], file: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run = trained["crop+randaugment(m=7, interpolation=bilinear)"]
        assert main.run(["policy", str(run), "--out", "p.yml"]) == 0
        shown = capsys.readouterr().out
        assert "14 sub-policies" in shown
        use = "crop+autoaugment(interpolation=bilinear, policy='p.yml')"
        assert shown.splitlines()[-1] == f'Use it: --methods "{use}"'
        content = yaml.safe_load(Path("p.yml").read_text())
        assert content == RandAugment(m=7).as_policy({})

    def test_what_cannot_be_written_is_told(
        self, trained: dict[str, Path], file: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run = trained["mixup"]
        for asked, message in (
            ([str(run)], "mixup has no policy: expected a method that learned one"),
            ([str(trained["randaugment+trivialaugment"])], "several policies, of RandAugment and"),
            ([str(run.parent)], "is not a run directory"),
            ([str(run), "--out", "p.txt"], "expected a name ending in .yaml"),
            ([str(run), "--out", "none/p.yaml"], "a folder that exists"),
        ):
            assert main.run(["policy", *asked]) == 2
            assert message in capsys.readouterr().err
        assert not Path("policy.yaml").exists()
