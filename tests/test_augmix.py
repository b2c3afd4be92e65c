"""AugMix against Pillow and the formulas of the paper, in float64."""

from __future__ import annotations

import math
from typing import cast

import numpy as np
import pytest
import scipy.stats
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

import methods
from benchmarks.contract import Bench, Case, bench
from benchmarks.training.tasks import MultiClass, MultiLabel
from methods.augmix import OPERATIONS, AugMix, Mixtures, divergence, mixed, settings_of
from methods.base import Batch, Spec
from methods.naming import NamingError
from methods.randaugment import (
    AUTOCONTRAST,
    EQUALIZE,
    IDENTITY,
    POSTERIZE,
    ROTATE,
    SHEAR_X,
    SHEAR_Y,
    SOLARIZE,
    TRANSLATE_X,
    TRANSLATE_Y,
)
from methods.randaugment import OPERATIONS as NAMES

BILINEAR = Image.Resampling.BILINEAR
SIZE = 24, 30
RGB = Case(3)


def ready(name: str, case: Case = RGB) -> Bench:
    return bench(lambda: methods.build(name), case)


def built(name: str) -> AugMix:
    return cast("AugMix", methods.build(name))


def images(channels: int = 3) -> np.ndarray:
    """(4, C, H, W) uint8: smooth ones, noise, and one with few levels."""
    rng = np.random.default_rng(0)
    down, right = np.mgrid[: SIZE[0], : SIZE[1]]
    smooth = 120 + 80 * np.sin(down / 5) * np.cos(right / 4)
    made = [smooth, 60 + 3 * right + 2 * down, rng.integers(0, 256, SIZE), 40 + 90 * (down > right)]
    found = np.stack(made)[:, None].repeat(channels, 1)
    found[:, channels // 2] = 255 - found[:, channels // 2]
    return found.clip(0, 255).astype(np.uint8)


def pillow(image: Image.Image, code: int, level: float, negative: bool) -> Image.Image:
    """The operation on one image as in the authors' code; a positive sign moves right and down."""
    width, height = image.size
    sign = -1 if negative else 1
    if code == AUTOCONTRAST:
        return ImageOps.autocontrast(image)
    if code == EQUALIZE:
        return ImageOps.equalize(image)
    if code == POSTERIZE:
        return ImageOps.posterize(image, 4 - int(level * 4 / 10))
    if code == SOLARIZE:
        return ImageOps.solarize(image, 256 - int(level * 256 / 10))
    if code == ROTATE:
        return image.rotate(sign * int(level * 30 / 10), resample=BILINEAR)
    shear, data = sign * level * 0.3 / 10, [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    if code == SHEAR_X:
        data[1] = shear
    if code == SHEAR_Y:
        data[3] = shear
    if code == TRANSLATE_X:
        data[2] = -sign * int(level * width / 3 / 10)
    if code == TRANSLATE_Y:
        data[5] = -sign * int(level * height / 3 / 10)
    return image.transform(image.size, Image.Transform.AFFINE, tuple(data), resample=BILINEAR)


def alone(code: int, level: float, negative: bool, rows: int) -> Mixtures:
    """One chain of this operation, of weight 1."""
    codes = torch.full((1, 1, rows), code)
    levels = torch.full((1, 1, rows), level, dtype=torch.float64)
    settings = settings_of(codes, levels, torch.full((1, 1, rows), int(negative)), *SIZE)
    return Mixtures(codes, settings, torch.ones(1, rows, dtype=torch.float64))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("code", OPERATIONS, ids=[NAMES[code] for code in OPERATIONS])
def test_operations_equal_pillow(code: int, channels: int) -> None:
    """Within a level; geometric ones where no pixel from outside is read."""
    given = images(channels)
    x = torch.from_numpy(given).double() / 255
    white = torch.ones_like(x)
    for level in (0.1, 1.0, 2.9, 6.3, 9.99):
        for negative in (False, True):
            mixtures = alone(code, level, negative, len(x))
            got = 255 * mixed(x, mixtures).numpy()
            inside = np.ones(x.shape, dtype=bool)
            if code in (ROTATE, SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y):
                inside = mixed(white, mixtures).numpy() > 1 - 1e-9
                assert inside.mean() > 0.5
            for row, image in enumerate(given):
                picture = Image.fromarray(
                    np.ascontiguousarray(image[0] if channels == 1 else image.transpose(1, 2, 0))
                )
                wanted = np.asarray(pillow(picture, code, level, negative)).astype(float)
                wanted = wanted[None] if channels == 1 else wanted.transpose(2, 0, 1)
                assert np.abs(got[row] - wanted)[inside[row]].max() <= 1 + 1e-6


def random_mixtures(rows: int, **settings: float) -> Mixtures:
    torch.manual_seed(1)
    return AugMix(**settings).draw(rows, *SIZE)  # type: ignore[arg-type]


def test_a_view_is_the_weighted_sum_of_its_chains_and_the_row() -> None:
    x = torch.from_numpy(images()).double() / 255
    codes, settings, share = random_mixtures(len(x), severity=8.0)
    one = torch.ones(1, len(x), dtype=torch.float64)
    wanted = (1 - share.sum(dim=0))[:, None, None, None] * x
    for i in range(3):
        chain = mixed(x, Mixtures(codes[:, [i]], settings[:, [i]], one))
        wanted = wanted + share[i][:, None, None, None] * chain
    got = mixed(x, Mixtures(codes, settings, share))
    assert torch.allclose(got, wanted, rtol=0, atol=1e-14)
    assert float((got - x).abs().flatten(1).amax(dim=1).min()) > 0.01, "each row is changed"


def test_mixing_pixels_is_mixing_normalised_pixels() -> None:
    """The authors mix after normalisation, which is affine, and the weights sum to 1."""
    x = torch.from_numpy(images()).double() / 255
    codes, settings, share = random_mixtures(len(x))
    one = torch.ones(1, len(x), dtype=torch.float64)
    mean = torch.tensor([0.49, 0.48, 0.45], dtype=torch.float64)[:, None, None]
    sd = torch.tensor([0.2, 0.3, 0.25], dtype=torch.float64)[:, None, None]
    m = share.sum(dim=0)[:, None, None, None]
    theirs = (1 - m) * (x - mean) / sd
    for i in range(3):
        chain = mixed(x, Mixtures(codes[:, [i]], settings[:, [i]], one))
        theirs = theirs + share[i][:, None, None, None] * (chain - mean) / sd
    ours = (mixed(x, Mixtures(codes, settings, share)) - mean) / sd
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-13)


def test_consecutive_geometric_operations_of_a_chain_are_one_warp() -> None:
    x = torch.rand(1, 1, 20, 20, dtype=torch.float64)
    codes = torch.tensor([[[TRANSLATE_X]], [[TRANSLATE_X]], [[IDENTITY]]])
    settings = torch.tensor([[[4.0]], [[-4.0]], [[0.0]]], dtype=torch.float64)
    one = torch.ones(1, 1, dtype=torch.float64)
    assert torch.allclose(mixed(x, Mixtures(codes, settings, one)), x, rtol=0, atol=1e-12)


class TestDraws:
    ROWS = 8_000

    def test_operations_depths_and_signs_are_uniform(self) -> None:
        codes, settings, _ = random_mixtures(self.ROWS)
        assert codes.shape == settings.shape == (3, 3, self.ROWS)
        depth = (codes != IDENTITY).sum(dim=0)
        assert bool((codes[0] != IDENTITY).all()), "what is idle comes last"
        assert bool((codes[2] == IDENTITY)[codes[1] == IDENTITY].all())
        counts = torch.bincount(depth.flatten())[1:]
        assert len(counts) == 3 and scipy.stats.chisquare(counts.numpy()).pvalue > 0.001
        for chain in range(3):
            counts = torch.bincount(codes[0, chain], minlength=15)[list(OPERATIONS)]
            assert int(counts.sum()) == self.ROWS
            assert scipy.stats.chisquare(counts.numpy()).pvalue > 0.001
        for code in (SHEAR_X, ROTATE):
            below = int((settings[codes == code] < 0).sum())
            zero = int((settings[codes == code] == 0).sum())
            total = int((codes == code).sum()) - zero
            assert scipy.stats.binomtest(below, total).pvalue > 0.001

    def test_levels_are_uniform(self) -> None:
        codes, settings, _ = random_mixtures(self.ROWS, severity=5.0)
        level = settings[codes == SHEAR_X].abs().numpy() * 10 / 0.3
        assert scipy.stats.kstest(level, scipy.stats.uniform(0.1, 4.9).cdf).pvalue > 0.001

    @pytest.mark.parametrize("alpha", [1.0, 3.0])
    def test_weights_are_those_of_dirichlet_and_beta(self, alpha: float) -> None:
        share = random_mixtures(self.ROWS, alpha=alpha, width=4).share
        kept = share.sum(dim=0)
        assert scipy.stats.kstest(kept.numpy(), scipy.stats.beta(alpha, alpha).cdf).pvalue > 0.001
        marginal = scipy.stats.beta(alpha, 3 * alpha)  # of one of four Dirichlet weights
        for one in share / kept:
            assert scipy.stats.kstest(one.numpy(), marginal.cdf).pvalue > 0.001

    def test_a_fixed_depth_is_kept(self) -> None:
        codes = random_mixtures(50, depth=5, width=2).codes
        assert codes.shape == (5, 2, 50) and bool((codes != IDENTITY).all())

    def test_the_two_views_of_a_row_are_drawn_apart(self) -> None:
        case = ready("augmix")
        out = case.augment(case.batch(rows=8))
        _, one, other = out.x.unflatten(0, (3, 8))
        assert float((one - other).abs().flatten(1).amax(dim=1).min()) > 0


def distributions(logits: Tensor, one: bool) -> np.ndarray:
    """(V, B, parts, outcomes) probabilities."""
    if one:
        return logits.softmax(dim=2)[:, :, None].numpy()
    p = logits.sigmoid()
    return torch.stack([p, 1 - p], dim=3).numpy()


@pytest.mark.parametrize("one", [True, False])
@pytest.mark.parametrize("views", [2, 3])
def test_divergence_equals_its_definition(views: int, one: bool) -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(views, 5, 4, dtype=torch.float64)
    got = divergence(logits, one).numpy()
    for row, p in enumerate(distributions(logits, one).swapaxes(0, 1)):
        each = [
            np.mean([scipy.stats.entropy(view[part], p[:, part].mean(0)) for view in p])
            for part in range(p.shape[1])
        ]
        assert got[row] == pytest.approx(np.mean(each), abs=1e-14)
    assert (got > 0).all() and (got < math.log(views)).all()


def test_divergence_of_one_label_is_that_of_two_classes() -> None:
    z = torch.randn(3, 6, 1, dtype=torch.float64)
    pair = torch.cat([z, torch.zeros_like(z)], dim=2)
    assert torch.allclose(divergence(z, False), divergence(pair, True), rtol=0, atol=1e-14)


@pytest.mark.parametrize("one", [True, False])
def test_divergence_is_finite_for_certain_predictions(one: bool) -> None:
    logits = torch.tensor([[[500.0, -500.0]], [[-500.0, 500.0]], [[0.0, 0.0]]], requires_grad=True)
    found = divergence(logits, one)
    found.sum().backward()
    assert logits.grad is not None and bool(torch.isfinite(logits.grad).all())
    mean, certain = np.array([0.5, 0.5]), np.array([1.0, 0.0])
    wanted = 2 / 3 * scipy.stats.entropy(certain, mean)
    assert float(found.detach()) == pytest.approx(wanted, abs=1e-6)
    assert float(divergence(torch.zeros(3, 2, 4), one).abs().max()) == 0


def published(logits: Tensor, y: Tensor, w: Tensor, weight: float) -> Tensor:
    """Eq. 1 of the paper, row by row, with torch's own Kullback-Leibler divergence."""
    clean, first, second = logits.chunk(3)
    total = torch.zeros((), dtype=logits.dtype)
    for row in range(len(clean)):
        p = [each[row].softmax(dim=0) for each in (clean, first, second)]
        mean = ((p[0] + p[1] + p[2]) / 3).log()
        apart = sum(F.kl_div(mean, each, reduction="sum") for each in p) / 3
        own = F.cross_entropy(clean[row], y[row])
        total = total + w[row] * (own + weight * apart)
    return total


def made(rows: int) -> tuple[Tensor, Batch]:
    """Logits (3B, K) with a gradient, and their batch, of unequal weights, in float64."""
    torch.manual_seed(2)
    logits = (2 * torch.randn(3 * rows, 4, dtype=torch.float64)).requires_grad_()
    y = torch.softmax(torch.randn(rows, 4, dtype=torch.float64), dim=1)
    w = torch.rand(rows, dtype=torch.float64)
    w = w / w.sum()
    x, index = torch.zeros(3 * rows, 1, 2, 2), torch.arange(3 * rows)
    return logits, Batch(x, y.repeat(3, 1), w.repeat(3), index)


@pytest.mark.parametrize("weight", [12.0, 0.5, 0.0])
def test_the_step_minimises_the_loss_of_the_paper(weight: float) -> None:
    """To float64 precision, and so is its gradient."""
    ctx = ready("none").ctx
    logits, batch = made(5)
    method = AugMix(weight=weight)
    ours = batch.w @ method.losses(logits, batch, ctx)
    theirs = published(logits, batch.y[:5], batch.w[:5], weight)
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-14)
    (mine,) = torch.autograd.grad(ours, logits)
    (their,) = torch.autograd.grad(theirs, logits)
    assert torch.allclose(mine, their, rtol=0, atol=1e-15)
    assert bool((mine[5:] != 0).any()) == (weight > 0), "views have no loss but the divergence"


def test_the_rows_keep_the_loss_of_the_upstream() -> None:
    ctx = ready("none").ctx
    logits, batch = made(4)
    own = built("augmix(upstream=gce(q=0.6))").losses(logits, batch, ctx)
    plain = methods.build("gce(q=0.6)").losses(logits[:4], Batch(
        batch.x[:4], batch.y[:4], batch.w[:4], batch.index[:4]
    ), ctx)  # fmt: skip
    assert torch.equal(own[:4], plain)
    assert torch.equal(own[4:], built("augmix").losses(logits, batch, ctx)[4:])


@pytest.mark.parametrize("name", ["augmix", "no_consistency(upstream=augmix)"])
def test_views_come_after_the_rows_with_their_targets_and_weights(name: str) -> None:
    case = ready(name)
    batch = case.batch(rows=6)
    out = case.augment(batch)
    assert torch.equal(out.x[:6], batch.x) and torch.equal(out.index[:6], batch.index)
    assert bool((out.index[6:] == -1).all())
    assert torch.equal(out.y, batch.y.repeat(3, 1)) and torch.equal(out.w, batch.w.repeat(3))
    added = case.method.added()
    assert added is not None and torch.equal(added.x, out.x[6:])
    assert torch.equal(added.origin, batch.x.repeat(2, 1, 1, 1))
    assert out.logits is not None and torch.equal(added.y, out.y[6:])


def test_without_consistency_only_the_loss_of_the_views_differs() -> None:
    one, other = ready("augmix"), ready("no_consistency(upstream=augmix)")
    first, second = one.augment(one.batch()), other.augment(other.batch())
    for name in ("x", "y", "w", "index", "logits"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    assert first.logits is not None and second.logits is not None
    own = one.method.losses(first.logits, first, one.ctx)
    plain = other.method.losses(second.logits, second, other.ctx)
    assert torch.equal(plain, MultiClass().losses(second.logits, second.y))
    assert torch.equal(own[:8], plain[:8]) and bool((own[8:] != plain[8:]).all())


def test_views_of_one_chain_are_the_first_chains_of_the_same_draws() -> None:
    one, other = AugMix(), AugMix()
    other.one_chain = True
    torch.manual_seed(3)
    full = one.draw(40, *SIZE)
    torch.manual_seed(3)
    first = other.draw(40, *SIZE)
    assert torch.equal(first.codes, full.codes[:, :1])
    assert torch.equal(first.settings, full.settings[:, :1])
    assert torch.equal(first.share, torch.ones(1, 40, dtype=torch.float64))
    case = ready("one_chain(upstream=augmix)")
    out = case.augment(case.batch())
    plain = ready("augmix")
    assert bool((out.x[8:] != plain.augment(plain.batch()).x[8:]).any())
    assert torch.equal(out.x[:8], plain.batch().x)


def test_without_jsd_one_view_replaces_each_row() -> None:
    case = ready("augmix(jsd=false, upstream=flip)")
    batch = case.batch()
    out = case.augment(batch)
    assert out.logits is None and out.x.shape == batch.x.shape
    assert bool((out.x != batch.x).flatten(1).any(dim=1).all())
    for name in ("y", "w", "index"):
        assert torch.equal(getattr(out, name), getattr(batch, name))
    logits = torch.randn(8, 3)
    assert torch.equal(
        case.method.losses(logits, out, case.ctx), MultiClass().losses(logits, out.y)
    )
    assert case.method.added() is None
    told = case.method.captions()
    assert len(told) == 8 and any(text.startswith("mirrored, ") for text in told)
    parts = [float(part.split(" ")[0]) for part in told[0].removeprefix("mirrored, ").split(" + ")]
    assert len(parts) == 3 and 0 < sum(parts) < 1.02


def test_several_labels_share_the_scale_of_their_loss() -> None:
    case = ready("augmix", Case(1, "multi-label"))
    out = case.augment(case.batch())
    assert out.logits is not None
    losses = case.method.losses(out.logits, out, case.ctx)
    assert torch.equal(losses[:8], MultiLabel().losses(out.logits[:8], out.y[:8]))
    p = out.logits.double().sigmoid().unflatten(0, (3, 8))
    mean = p.mean(dim=0)
    apart = torch.zeros(8, dtype=torch.float64)
    for view in p:
        yes, no = view * (view / mean).log(), (1 - view) * ((1 - view) / (1 - mean)).log()
        apart += (yes + no).mean(dim=1) / 3
    assert torch.allclose(losses[8:16].double(), 6 * apart, rtol=1e-4, atol=1e-6)
    assert torch.equal(losses[8:16], losses[16:])


@pytest.mark.parametrize(
    ("name", "controls"),
    [
        ("augmix", ["no_consistency(upstream=augmix)", "one_chain(upstream=augmix)"]),
        ("augmix(jsd=false)", ["one_chain(upstream=augmix(jsd=false))"]),
        (
            "augmix(upstream=crop+flip, severity=1.0)",
            [
                "no_consistency(upstream=augmix(severity=1.0, upstream=crop+flip))",
                "one_chain(upstream=augmix(severity=1.0, upstream=crop+flip))",
            ],
        ),
    ],
)
def test_controls(name: str, controls: list[str]) -> None:
    assert list(methods.controls_of(methods.canonical(name))) == controls
    assert all(methods.build(control).control for control in controls)


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("severity=0.0", "severity: expected a number above 0.1"),
        ("severity=11.0", "at most 10, got 11.0"),
        ("width=0", "width: expected 1 chain or more"),
        ("depth=0", "depth: expected random, or 1 operation or more"),
        ("alpha=0.0", "alpha: expected a number above 0"),
        ("weight=-1.0", "weight: expected a number of 0 or more"),
    ],
)
def test_arguments_that_are_refused(argument: str, told: str) -> None:
    with pytest.raises(NamingError, match=told):
        methods.build(f"augmix({argument})")


def test_nothing_may_come_between_the_views_and_their_loss() -> None:
    with pytest.raises(NamingError, match="must be the last link"):
        methods.build("augmix+mixup")
    methods.build("augmix(jsd=false)+mixup")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("saflex(upstream=augmix)", "which its upstream has already run"),
        ("lpa3(upstream=augmix)", "forward pass"),
        ("augmix(upstream=self_distil)", "which its upstream has already run"),
        ("no_consistency(upstream=augmix(jsd=false))", "no_consistency needs upstream=augmix"),
        ("no_consistency", "no_consistency needs upstream=augmix"),
        ("one_chain(upstream=crop)", "one_chain needs upstream=augmix"),
    ],
)
def test_what_it_does_not_take(name: str, told: str) -> None:
    spec = Spec(rows=9, classes=3, shape=(1, 8, 8))
    assert told in methods.build(name).supports(MultiClass(), spec)


def test_images_of_other_kinds_are_refused() -> None:
    method = AugMix()
    assert "grey or RGB" in method.supports(MultiClass(), Spec(9, 3, (4, 8, 8)))
    assert "needs images" in method.supports(MultiClass(), Spec(9, 3, (8,), "vector"))
