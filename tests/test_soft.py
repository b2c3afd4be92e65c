"""Soft augmentation, random erasing and noise against their definitions, row by row."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from benchmarks.training.context import OwnLoop, own_loop
from methods.base import Batch
from methods.classic import Crop, Flip, GaussianNoise, RandomErasing, SoftAugmentation

EDGE = 12


def context(classes: int = 4, channels: int = 1) -> OwnLoop:
    x = torch.rand(8, channels, EDGE, EDGE)
    size = channels * EDGE * EDGE
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(size, classes))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return own_loop(model, optimizer, classes=classes, train=[(x, torch.arange(8) % classes)])


def batch(ctx: OwnLoop, rows: int = 64, channels: int = 1) -> Batch:
    torch.manual_seed(1)
    drawn = ctx.batch(torch.rand(rows, channels, EDGE, EDGE), torch.arange(rows) % ctx.spec.classes)
    torch.manual_seed(2)
    return drawn


def soft(ctx: OwnLoop, **arguments: Any) -> SoftAugmentation:
    method = SoftAugmentation(**arguments)
    method.setup(ctx)
    return method


def offset_of(original: np.ndarray, shifted: np.ndarray) -> tuple[int, int]:
    """The one offset (down, right) under which the overlap is equal, found by trying them all."""
    fits = []
    for down in range(-EDGE + 1, EDGE):
        for right in range(-EDGE + 1, EDGE):
            here = shifted[
                :, max(0, -down) : EDGE - max(0, down), max(0, -right) : EDGE - max(0, right)
            ]
            there = original[
                :, max(0, down) : EDGE + min(0, down), max(0, right) : EDGE + min(0, right)
            ]
            if np.array_equal(here, there):
                fits.append((down, right, here.size))
    return max(fits, key=lambda fit: fit[2])[:2] if fits else (EDGE, EDGE)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("k", [1.0, 2.0, 4.0])
def test_soft_augmentation_trusts_the_label_by_what_is_left(channels: int, k: float) -> None:
    ctx = context(channels=channels)
    drawn = batch(ctx, channels=channels)
    out = soft(ctx, sigma=0.3, k=k, reweight=False).augment(drawn, ctx)
    labels = drawn.y.argmax(1)
    assert torch.equal(out.w, drawn.w)
    seen_any_shift = 0
    for row in range(64):
        down, right = offset_of(drawn.x[row].numpy(), out.x[row].numpy())
        visible = (EDGE - abs(down)) * (EDGE - abs(right)) / EDGE**2
        trust = 1 - 0.75 * (1 - visible) ** k
        expected = torch.full((4,), (1 - trust) / 3)
        expected[labels[row]] = trust
        torch.testing.assert_close(out.y[row], expected)
        seen_any_shift += (down, right) != (0, 0)
    assert seen_any_shift > 50
    assert out.x.min() >= 0 and out.x.max() <= 1


@pytest.mark.parametrize("background", ["mean", "random"])
def test_soft_augmentation_fills_with_one_value_a_channel(background: str) -> None:
    ctx = context()
    drawn = batch(ctx)
    out = soft(ctx, sigma=0.5, background=background).augment(drawn, ctx)
    mean = float(ctx.train.draw(8).x.mean())
    for row in range(64):
        down, right = offset_of(drawn.x[row].numpy(), out.x[row].numpy())
        outside = np.ones((EDGE, EDGE), bool)
        outside[max(0, -down) : EDGE - max(0, down), max(0, -right) : EDGE - max(0, right)] = False
        if outside.any() and (down, right) != (EDGE, EDGE):
            filled = out.x[row].numpy()[:, outside]
            assert (np.ptp(filled, axis=1) == 0).all()
            assert (abs(float(filled[0, 0]) - mean) < 1e-6) == (background == "mean")


def test_soft_augmentation_offsets_are_a_truncated_normal() -> None:
    method = SoftAugmentation(sigma=0.3)
    torch.manual_seed(0)
    edge = 10_000  # so that whole pixels do not matter
    offsets = method._offset(4000, edge, torch.zeros(1)).numpy() / edge
    truth = stats.truncnorm(-1 / 0.3, 1 / 0.3, scale=0.3)
    assert stats.kstest(offsets, truth.cdf).pvalue > 0.01
    assert np.abs(offsets).max() <= 1


def test_soft_augmentation_weighs_by_trust_and_keeps_the_total() -> None:
    ctx = context()
    drawn = batch(ctx)
    drawn = replace(drawn, w=torch.rand(64))
    out = soft(ctx, sigma=0.4).augment(drawn, ctx)
    trust = out.y.gather(1, drawn.y.argmax(1, keepdim=True))[:, 0]
    torch.testing.assert_close(out.w / drawn.w / trust, (out.w / drawn.w / trust)[:1].expand(64))
    torch.testing.assert_close(out.w.sum(), drawn.w.sum())


def test_soft_augmentation_of_a_batch_without_weight() -> None:
    ctx = context()
    drawn = replace(batch(ctx), w=torch.zeros(64))
    assert torch.equal(soft(ctx).augment(drawn, ctx).w, drawn.w)


@pytest.mark.parametrize("fill", ["noise", "zero"])
def test_random_erasing_overwrites_one_rectangle(fill: str) -> None:
    ctx = context()
    drawn = batch(ctx, rows=400, channels=3)
    method = RandomErasing(p=0.7, fill=fill)  # type: ignore[arg-type]
    out = method.augment(drawn, ctx)
    shares = []
    for before, after in zip(drawn.x, out.x, strict=True):
        changed = (before != after).any(0).numpy()
        if not changed.any():
            continue
        lines, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        box = np.zeros_like(changed)
        box[lines[0] : lines[-1] + 1, columns[0] : columns[-1] + 1] = True
        assert np.array_equal(changed, box)
        if fill == "zero":
            assert float(after[:, torch.from_numpy(box)].abs().max()) == 0
        tall, wide = len(lines), len(columns)
        assert tall < EDGE and wide < EDGE
        shares.append(tall * wide / EDGE**2)
    # Ten tries leave almost every row with a rectangle that fits: binomial(400, 0.7).
    assert stats.binomtest(len(shares), 400, 0.7).pvalue > 0.001
    assert min(shares) >= 0.005 and max(shares) <= 0.45
    assert torch.equal(out.y, drawn.y) and torch.equal(out.w, drawn.w)


def test_captions_tell_what_was_done() -> None:
    ctx = context()
    drawn = batch(ctx)
    shift = soft(ctx)
    out = shift.augment(drawn, ctx)
    for row, text in enumerate(shift.captions()):
        down, right = offset_of(drawn.x[row].numpy(), out.x[row].numpy())
        assert (down, right) == (EDGE, EDGE) or text == f"shift {right:+d} {down:+d} px"
    erase = RandomErasing()
    out = erase.augment(drawn, ctx)
    for before, after, text in zip(drawn.x, out.x, erase.captions(), strict=True):
        changed = (before != after)[0].numpy()
        size = f"erased {changed.any(1).sum()} x {changed.any(0).sum()} px"
        assert text == (size if changed.any() else "")
    crop, flip = Crop(pad=2), Flip()
    out = crop.augment(drawn, ctx)
    for row, text in enumerate(crop.captions()):
        down, right = offset_of(drawn.x[row].numpy(), out.x[row].numpy())
        assert text == f"crop {right:+d} {down:+d} px"
    out = flip.augment(drawn, ctx)
    mirrored = (out.x != drawn.x).flatten(1).any(1).tolist()
    assert flip.captions() == ["mirrored" if each else "" for each in mirrored]


def test_random_erasing_never_and_always() -> None:
    ctx = context()
    drawn = batch(ctx)
    assert torch.equal(RandomErasing(p=0.0).augment(drawn, ctx).x, drawn.x)
    changed = (RandomErasing(p=1.0).augment(drawn, ctx).x != drawn.x).flatten(1).any(1)
    assert float(changed.float().mean()) > 0.98


def test_gaussian_noise_is_normal_before_it_is_cut_off() -> None:
    ctx = context()
    drawn = replace(batch(ctx, rows=100), x=torch.full((100, 1, EDGE, EDGE), 0.5))
    noise = (GaussianNoise(sigma=0.05).augment(drawn, ctx).x - 0.5).flatten().numpy() / 0.05
    assert stats.kstest(noise, "norm").pvalue > 0.01
    loud = GaussianNoise(sigma=3.0).augment(drawn, ctx).x
    assert float(loud.min()) == 0 and float(loud.max()) == 1
