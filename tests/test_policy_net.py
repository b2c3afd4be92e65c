"""AdaAug and MADAug: gradients against finite differences in float64, draws against exact
probabilities, the optimiser against torch's, and what the controls keep."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor, nn

import methods
from benchmarks.contract import Case, bench
from benchmarks.training import models
from benchmarks.training.context import OwnLoop, own_loop
from benchmarks.training.tasks import MultiClass
from methods import policy_net
from methods.autoaugment import policy_in
from methods.base import Batch, Model, Spec
from methods.differentiable import CUTOUT, FLIP, NAMES, every, settings
from methods.policy_net import (
    COUNT,
    DECAY,
    AdaAug,
    MADAug,
    Policy,
    amounts_of,
    chances,
    drawn,
    embedded,
    lookahead,
    noise_for,
    outputs_of,
)
from methods.randaugment import (
    BRIGHTNESS,
    EQUALIZE,
    IDENTITY,
    INVERT,
    POSTERIZE,
    ROTATE,
    SHARPNESS,
    SHEAR_X,
    SHEAR_Y,
    SOLARIZE,
    STANDARD,
    TRANSLATE_X,
    TRANSLATE_Y,
)
from tests.test_controls import logits, trained

ROWS, CLASSES, EDGE, WIDTH = 6, 3, 8, 5


class Trunk(nn.Module):
    """Two convolutions with BatchNorm, smooth, so that finite differences meet no corner."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, WIDTH, 3, stride=2)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = torch.tanh(self.norm(self.first(x)))
        return [x, nn.functional.silu(self.second(x))]


class Smooth(Model):
    """A network with dropout, in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.drop = Trunk(), nn.Dropout(0.5)
        self.head = nn.Linear(WIDTH, CLASSES)
        self.unused = nn.Linear(2, 2)

    def embed(self, features: list[Tensor]) -> Tensor:
        return self.drop(features[-1].mean(dim=(2, 3)))


def labelled(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    x = torch.rand(rows, 1, EDGE, EDGE, generator=rng, dtype=torch.float64)
    return x, torch.arange(rows) % CLASSES


def loop(rows: int = ROWS) -> OwnLoop:
    """A real context with a network in training mode, whose running statistics have moved."""
    torch.manual_seed(0)
    model = Smooth().double()
    for _ in range(3):
        model(labelled(rows, 9)[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    data = [labelled(rows, 1)]
    return own_loop(model, optimizer, classes=CLASSES, train=data, meta=[labelled(4 * rows, 2)])


def ready(method: Any, ctx: OwnLoop) -> Any:
    """The method, set up, with its policy in float64 and outputs that differ between rows."""
    method.setup(ctx)
    method.policy.double()
    method.policy.values.mul_(5)
    ctx.begin_epoch(0)
    return method


def check(ours: Tensor, loss: Callable[[Tensor], Tensor], at: Tensor, step: float) -> None:
    """The gradient against central differences along directions, each with all entries."""
    rng = torch.Generator().manual_seed(7)
    for _ in range(6):
        along = torch.randn(at.shape, generator=rng, dtype=at.dtype)
        with torch.no_grad():
            truth = float(loss(at + step * along) - loss(at - step * along)) / (2 * step)
        assert abs(truth) > 1e-5
        assert float((ours * along).sum()) == pytest.approx(truth, rel=1e-5)


def smooth(x: Tensor, magnitude: Tensor, derivative: str) -> Tensor:
    """A stand-in for the operations, whose values change with the magnitude as gradients say."""
    power = torch.linspace(-1, 2, COUNT, dtype=x.dtype).view(1, -1, 1, 1, 1)
    return x[:, None] * (1 + magnitude[..., None, None, None]) ** power


def real(x: Tensor, start: Tensor) -> Callable[..., Tensor]:
    """The operations at the magnitudes ``start``, from which every pixel moves by 1."""
    noise = noise_for(len(x), 1, x.device)
    given = settings(amounts_of(start, noise.mirror[:, 0]), STANDARD, EDGE, EDGE)
    images = every(x, given, noise.centres[:, 0])
    return lambda x, magnitude, derivative: images + (magnitude - start)[..., None, None, None]


def ours_of(method: Any, batch: Batch, ctx: OwnLoop) -> Tensor:
    """Its gradient in the policy's values, in eval mode as in a step."""
    ctx.enter("augment")
    ctx.model.eval()
    return method.gradient(batch, ctx.model, ctx)


def some(ctx: OwnLoop) -> Batch:
    batch = ctx.train.rows(torch.arange(ROWS))
    w = torch.linspace(1, 2, ROWS, dtype=torch.float64)
    return replace(batch, y=batch.y.double(), w=w / w.sum())


@pytest.mark.parametrize("operations", ["smooth", "real"])
def test_adaaug_descends_the_meta_loss_of_mixed_features(
    operations: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ctx = loop()
    method = ready(AdaAug(meta_batch=1.0), ctx)
    images: Callable[..., Tensor] = smooth
    if operations == "smooth":
        monkeypatch.setattr(policy_net, "tried", smooth)
    ours = ours_of(method, some(ctx), ctx)
    ctx.enter("augment")
    model: Any = ctx.model
    assert ctx.meta is not None
    meta = ctx.meta.draw(ROWS)
    with torch.no_grad():
        features = embedded(model, meta.x)
        if operations == "real":
            start = outputs_of(method.policy.values, features)[:, :COUNT].sigmoid()
            images = real(meta.x, start)

    def loss(values: Tensor) -> Tensor:
        outputs = features @ values[:, :-1].T + values[:, -1]
        mu, p = outputs[:, :COUNT].sigmoid(), outputs[:, COUNT:].softmax(dim=1)
        made = images(meta.x, mu, "one")
        total = torch.zeros((), dtype=torch.float64)
        for row in range(ROWS):
            z = model.head(p[row] @ embedded(model, made[row]))
            total += z.logsumexp(0) - z[meta.y[row].argmax()]
        return total / ROWS

    check(ours, loss, method.policy.values, 1e-6)


def test_meta_rows_are_tried_in_parts_that_do_not_matter() -> None:
    ctx = loop(rows=24)
    method = ready(AdaAug(meta_batch=1.0, derivative="operation"), ctx)
    whole = []
    for size in (24, 24 * COUNT):  # 15 and 9 rows; all at once
        ctx.enter("augment")
        ctx.model.eval()
        ctx.batch_size = size
        method.meta_batch = 24 / size
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(policy_net, "tried", smooth)
            whole.append(method.gradient(some(ctx), ctx.model, ctx))
    assert torch.allclose(*whole, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("operations", ["smooth", "real"])
def test_madaug_descends_the_meta_loss_after_a_step_on_its_mixed_images(
    operations: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole chain: perturb the policy, mix anew, step anew, evaluate anew."""
    ctx = loop()
    method = ready(MADAug(meta_batch=1.0, alpha=0.3), ctx)
    images: Callable[..., Tensor] = smooth
    if operations == "smooth":
        monkeypatch.setattr(policy_net, "tried", smooth)
    batch = some(ctx)
    ours = ours_of(method, batch, ctx)
    ctx.enter("augment")
    model: Any = ctx.model
    assert ctx.meta is not None
    meta = ctx.meta.draw(ROWS)
    own = dict(model.named_parameters())
    with torch.no_grad():
        features = embedded(model, batch.x)
        if operations == "real":
            start = outputs_of(method.policy.values, features)[:, :COUNT].sigmoid()
            images = real(batch.x, start)

    def loss(values: Tensor) -> Tensor:
        outputs = features @ values[:, :-1].T + values[:, -1]
        mu, p = outputs[:, :COUNT].sigmoid(), outputs[:, COUNT:].softmax(dim=1)
        made = images(batch.x, mu, "one")
        mixed = torch.stack(
            [(p[row, :, None, None, None] * made[row]).sum(0) for row in range(ROWS)]
        )
        with torch.enable_grad():
            inner = batch.w @ MultiClass().losses(model(mixed), batch.y)
            slopes = torch.autograd.grad(inner, list(own.values()), allow_unused=True)
        ahead = {
            name: each if slope is None else each - 0.3 * slope
            for (name, each), slope in zip(own.items(), slopes, strict=True)
        }
        z = torch.func.functional_call(model, ahead, (meta.x,))
        return MultiClass().losses(z, meta.y).mean()

    check(ours, loss, method.policy.values, 1e-5)
    assert all(torch.equal(each, own[name]) for name, each in model.named_parameters())


def test_the_hypergradient_holds_in_a_network_with_corners() -> None:
    """ReLU and pooling by the maximum: in the image alone, for a step that crosses no corner."""
    torch.manual_seed(1)
    spec = Spec(rows=ROWS, classes=CLASSES, shape=(1, EDGE, EDGE))
    model: Any = models.build("small_cnn(width=0.25)", spec, frozenset({"features"})).double()
    ctx = loop()
    ctx.model = model.eval()
    batch, method = some(ctx), MADAug()
    x, y = labelled(ROWS, 4)
    meta = replace(batch, x=x, y=nn.functional.one_hot(y, CLASSES).double())
    ours = lookahead(model, batch.x, batch, meta, 0.2, method, ctx)
    along = torch.randn(batch.x.shape, dtype=torch.float64)
    own = dict(model.named_parameters())

    def loss(x: Tensor) -> float:
        inner = batch.w @ MultiClass().losses(model(x), batch.y)
        slopes = torch.autograd.grad(inner, list(own.values()))
        ahead = {n: p - 0.2 * s for (n, p), s in zip(own.items(), slopes, strict=True)}
        z = torch.func.functional_call(model, ahead, (meta.x,))
        return float(MultiClass().losses(z, meta.y).mean().detach())

    step = 1e-7
    truth = (loss(batch.x + step * along) - loss(batch.x - step * along)) / (2 * step)
    assert float((ours * along).sum()) == pytest.approx(truth, rel=1e-4)


def test_the_policy_is_trained_by_adam() -> None:
    torch.manual_seed(0)
    policy = Policy(WIDTH, torch.device("cpu")).double()
    assert policy.values.shape == (2 * COUNT, WIDTH + 1)
    assert 0.9 / math.sqrt(WIDTH) < float(policy.values.abs().max()) <= 1 / math.sqrt(WIDTH)
    weight = policy.values.clone().requires_grad_()
    adam = torch.optim.Adam([weight], lr=0.01, weight_decay=DECAY)
    for step in range(5):
        gradient = torch.randn(weight.shape, dtype=torch.float64) * 10.0 ** (-step)
        policy.step(gradient, 0.01)
        weight.grad = gradient
        adam.step()
        assert torch.allclose(policy.values, weight.detach(), rtol=1e-12, atol=0)
    assert int(policy.steps) == 5 and not torch.equal(policy.start, policy.values)


def test_operations_are_drawn_without_replacement() -> None:
    """Ordered pairs against p_i p_j / (1 - p_i)."""
    torch.manual_seed(0)
    logits = torch.tensor([1.5, 0.0, -1.0, 0.4])
    rows = 40_000
    gumbel = noise_for(rows, 2, torch.device("cpu")).gumbel[:, :4]
    first, second = drawn(logits.expand(rows, 4), gumbel, 2).T
    p = logits.double().softmax(0)
    pairs = list(itertools.permutations(range(4), 2))
    counts = np.bincount((4 * first + second).numpy(), minlength=16)
    expected = [rows * float(p[i] * p[j] / (1 - p[i])) for i, j in pairs]
    assert counts.sum() == sum(counts[4 * i + j] for i, j in pairs), "none twice"
    assert scipy.stats.chisquare([counts[4 * i + j] for i, j in pairs], expected).pvalue > 0.01


def test_magnitudes_are_levels_between_the_ends_of_a_range() -> None:
    """level (high - low) + low, as in the authors' code."""
    levels = torch.linspace(0, 1, 9, dtype=torch.float64)
    magnitude = levels[:, None].expand(-1, COUNT)
    ends: dict[int, tuple[float, float]] = {
        SHEAR_X: (-0.3, 0.3),
        SHEAR_Y: (-0.3, 0.3),
        TRANSLATE_X: (-150 / 331 * 20, 150 / 331 * 20),
        TRANSLATE_Y: (-150 / 331 * 10, 150 / 331 * 10),
        ROTATE: (-30, 30),
        POSTERIZE: (4, 8),
        SOLARIZE: (0, 255),
        **dict.fromkeys(range(BRIGHTNESS, SHARPNESS + 1), (0.1, 1.9)),
        CUTOUT: (0, 0.2 * 20),
    }
    for sign in (1.0, -1.0):
        mirror = torch.full_like(magnitude, sign)
        given = settings(amounts_of(magnitude, mirror), STANDARD, 10, 20)
        for code, (low, high) in ends.items():
            turned = sign if code <= ROTATE else 1.0
            truth = turned * (levels * (high - low) + low)
            assert torch.allclose(given[:, code], truth), NAMES[code]


@pytest.mark.parametrize("name", ["adaaug", "madaug(tau=0.01)"])
def test_each_row_is_augmented_by_its_own_policy(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all of the probability on one operation per row, and nothing random left."""
    one = bench(lambda: methods.build(name), Case(3))
    method: Any = one.method
    method.n, method.delta, method.frozen = 1, 0.0, True
    batch, row = one.batch(), torch.arange(8)
    codes = torch.tensor([BRIGHTNESS, POSTERIZE, SOLARIZE, SHARPNESS, INVERT, EQUALIZE, 0, FLIP])
    levels = torch.linspace(0.2, 0.9, 8)
    said = torch.zeros(8, 2 * COUNT)
    said[:, :COUNT] = levels.logit()[:, None]
    said[row, COUNT + codes] = 1e3
    monkeypatch.setattr(policy_net, "outputs_of", lambda values, features: said)
    out = one.augment(batch, epoch=1)
    magnitude = said[:, :COUNT].sigmoid()
    given = settings(amounts_of(magnitude, torch.ones(8, COUNT)), STANDARD, 8, 8)
    assert torch.equal(out.x, every(batch.x, given, torch.zeros(8, 2))[row, codes])
    assert torch.equal(method.learned()["magnitude"][batch.index], magnitude)
    told = [text.split(" ")[0] for text in method.captions()]
    assert told == [NAMES[code] for code in codes.tolist()]


def test_madaug_augments_a_growing_share() -> None:
    method = MADAug(tau=0.25)
    ctx = loop()
    ctx.epochs = 40
    shares = []
    for epoch in range(40):
        ctx.epoch = epoch
        shares.append(method.augmented(1000, ctx))
    assert shares[0] == 10
    assert shares[10] == int(1000 * (math.tanh(1) + 0.01))
    assert shares == sorted(shares) and shares[-1] == 1000
    one = bench(lambda: MADAug(tau=1.0), Case(3), epochs=4)
    batch = one.batch()
    out = one.augment(batch, epoch=2)
    count = int((math.tanh(0.5) + 0.01) * len(batch.x))
    assert torch.equal(out.x[count:], batch.x[count:])
    assert not torch.equal(out.x[:count], batch.x[:count])
    assert one.method.captions()[count:] == [""] * (len(batch.x) - count)


@pytest.mark.parametrize("name", ["adaaug", "madaug"])
def test_frozen_is_the_method_at_a_rate_of_nothing(name: str) -> None:
    """Bit for bit: the same rows, the same draws, the start's policy of the features of today."""
    frozen = trained(f"frozen(upstream={name})", 2)
    still: Any = trained(f"{name}(learning_rate=1e-30)", 2)
    assert (logits(frozen) == logits(still)).all()
    method: Any = frozen.method.upstream
    assert torch.equal(method.policy.start, method.policy.values)
    assert method.learning() == {"outer_steps": 0.0, "probability": 0.0, "magnitude": 0.0}
    learnt: Any = trained(name, 2)
    assert (logits(learnt) != logits(frozen)).any()
    found = learnt.method.learning()
    assert found["outer_steps"] > 0 and 0 < found["probability"] < 1 and found["magnitude"] > 0


@pytest.mark.parametrize("name", ["adaaug", "madaug"])
def test_shuffled_policies_change_who_gets_which(name: str) -> None:
    plain, shuffled = (
        bench(lambda text=text: methods.build(text), Case(1))
        for text in (name, f"shuffled_policies(upstream={name})")
    )
    for same in (True, False):
        batch = plain.batch()
        if same:
            batch = replace(batch, x=batch.x[:1].expand_as(batch.x).contiguous())
        one, other = (each.augment(batch, epoch=3) for each in (plain, shuffled))
        assert torch.equal(one.x, other.x) == same, "rows that are equal have equal policies"
    inner: Any = shuffled.method.upstream
    for mine, theirs in zip(plain.method.buffers(), inner.buffers(), strict=True):
        assert torch.equal(mine, theirs), "it learns and records as without the shuffling"


def test_what_was_learned_is_that_of_each_row_at_its_last_visit() -> None:
    one = bench(lambda: AdaAug(temperature=2.0, learning_rate=0.1), Case(3))
    method: Any = one.method
    batch = one.batch(elsewhere=3)
    for step in range(3):
        one.augment(batch, step=step)
    found = method.learned()
    assert found["probability"].shape == found["magnitude"].shape == (36, COUNT)
    known = batch.index[:-3]
    assert found["seen"].sum() == 3 * len(known) and (found["seen"][known] == 3).all()
    model: Any = one.ctx.model
    model.eval()
    with torch.no_grad():
        features = embedded(model, batch.x)[:-3]
    now = chances(outputs_of(method.policy.values, features), 2.0)
    assert torch.allclose(found["probability"][known], now.probability, atol=1e-6)
    assert torch.allclose(found["magnitude"][known], now.magnitude, atol=1e-6)
    moved = now.magnitude - chances(outputs_of(method.policy.start, features), 2.0).magnitude
    assert method.learning()["magnitude"] == pytest.approx(float(moved.abs().median()), rel=1e-4)
    assert float(found["probability"].sum(dim=1).sub(1).abs().max()) < 1e-6


class Brightness(Model):
    """It tells two classes by their brightness, as surely as ``slope``."""

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.trunk, self.head = Pixels(), nn.Linear(1, 2)
        with torch.no_grad():
            self.head.weight.copy_(torch.tensor([[-slope], [slope]]))
            self.head.bias.copy_(torch.tensor([slope, -slope]) / 2)

    def embed(self, features: list[Tensor]) -> Tensor:
        return features[0].flatten(1).mean(dim=1, keepdim=True)


class Pixels(nn.Module):
    def forward(self, x: Tensor) -> list[Tensor]:
        return [x]


@pytest.mark.parametrize(
    "method",
    [AdaAug(meta_batch="full"), MADAug(alpha=1.0, meta_batch="full")],
    ids=["adaaug", "madaug"],
)
def test_what_harms_becomes_less_likely_first(method: Any) -> None:
    """Dark and bright images: inverted, they look like those of the other class.

    AdaAug has a network that can tell them; MADAug one that a step could teach it.
    """
    torch.manual_seed(0)
    x = 0.15 + 0.1 * torch.rand(40, 1, EDGE, EDGE)
    y = torch.arange(40) % 2
    x = torch.where(y[:, None, None, None] > 0, 1 - x, x)
    model = Brightness(4.0 if isinstance(method, AdaAug) else 0.0)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    ctx = own_loop(model, sgd, classes=2, train=[(x[:20], y[:20])], meta=[(x[20:], y[20:])])
    method.setup(ctx)
    method.policy.values.zero_()  # all operations are equally probable
    slope = method.gradient(ctx.train.rows(torch.arange(20)), model, ctx)[COUNT:, -1]
    assert slope.argmax() == INVERT and float(slope[IDENTITY]) < 0


@pytest.mark.parametrize("n", [1, 2])
def test_a_policy_file_draws_as_the_mean_policy_does(n: int) -> None:
    """Each sequence of operations against the rule for draws without replacement; magnitudes and
    ranges as the method's."""
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(COUNT), size=2)
    levels = rng.random((2, COUNT))
    content = AdaAug(n=n).as_policy({"probability": p, "magnitude": levels})
    policy = policy_in(content, "here")
    assert policy.classes == 2 and policy.ranges == "fast_autoaugment"
    for own, magnitude, part in zip(p, levels, content["classes"], strict=True):
        for sequence, weight in zip(part["sub_policies"], part["weights"], strict=True):
            codes = [NAMES.index(name) for name, *_ in sequence]
            truth = own[codes[0]]
            if n == 2:
                truth *= own[codes[1]] / (1 - own[codes[0]])
            assert weight == pytest.approx(truth)
            for code, (_, probability, *level) in zip(codes, sequence, strict=True):
                assert probability == 1 and level in ([], [magnitude[code]])
        assert sum(part["weights"]) == pytest.approx(1)
    alone = AdaAug().as_policy({"probability": p[:1], "magnitude": levels[:1]})
    assert policy_in(alone, "here").classes == 0
    assert AdaAug(n=3).as_policy({"probability": p, "magnitude": levels}) == {}
    assert AdaAug().as_policy({}) == {}


@pytest.mark.parametrize("n", [1, 2])
def test_a_policy_file_of_a_certain_operation(n: int) -> None:
    """Where one operation has probability 1, it is first, and any other follows alike."""
    p, hot = np.zeros((1, COUNT)), 3
    p[0, hot] = 1
    content = AdaAug(n=n).as_policy({"probability": p, "magnitude": np.full((1, COUNT), 0.5)})
    policy_in(content, "here")
    for sequence, weight in zip(content["sub_policies"], content["weights"], strict=True):
        first = sequence[0][0] == NAMES[hot]
        assert weight == pytest.approx(first / (1 if n == 1 else COUNT - 1))


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("n=0", "n: expected 1 to 17 operations, got 0"),
        ("n=18", "n: expected 1 to 17 operations, got 18"),
        ("refresh=0", "refresh: expected 1 or more"),
        ("temperature=0.0", "temperature: expected a number above 0"),
        ("learning_rate=-1.0", "learning_rate: expected a number above 0"),
        ("delta=1.5", r"delta: expected a number in \[0, 1\]"),
        ("meta_batch=0.0", "meta_batch: expected full or a multiple"),
    ],
)
@pytest.mark.parametrize("name", ["adaaug", "madaug"])
def test_arguments_are_checked(name: str, given: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        methods.build(f"{name}({given})")


def test_what_is_not_supported_is_said() -> None:
    with pytest.raises(ValueError, match="tau: expected a share of the epochs above 0, got 0"):
        MADAug(tau=0.0)
    task = MultiClass()
    images = Spec(rows=10, classes=3, shape=(3, 8, 8))
    for name in ("adaaug", "madaug"):
        method = methods.build(name)
        assert method.supports(task, images) == ""
        said = method.supports(task, replace(images, shape=(2, 8, 8)))
        assert said == f"{name} needs grey or RGB images, but these have 2 channels"
        vectors = replace(images, kind="vector", shape=(8,))
        assert method.supports(task, vectors) == f"{name} needs images, but the data are vectors"
        handed = methods.build(f"{name}(upstream=saflex)")
        assert handed.supports(task, images).endswith("which its upstream has already run")
    said = methods.build("shuffled_policies(upstream=autodo)").supports(task, images)
    assert said.startswith("shuffled_policies needs upstream=, a method with a policy network")
