"""AdaAug and MADAug: a policy network from an image's features to operations and magnitudes."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from itertools import permutations
from typing import Any, ClassVar, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from methods.base import ANYTHING, IMAGES, Batch, Context, Method, Model, Spec, Task, named
from methods.differentiable import CUTOUT, FLIP, NAMES, chosen, every, settings
from methods.functional import check_meta_batch, evaluate, frozen, meta_rows, mode
from methods.randaugment import (
    BRIGHTNESS,
    IDENTITY,
    POSTERIZE,
    ROTATE,
    SHARPNESS,
    SHEAR_X,
    SOLARIZE,
    STANDARD,
    TRANSLATE_X,
    TRANSLATE_Y,
    UNSIZED,
    caption,
    no_picture,
)

COUNT = len(NAMES)
DECAY = 1e-3
"""Weight decay of the policy network."""
BETAS = 0.9, 0.999
POLICY = "probability", "magnitude"
CHUNK = 256
"""Images per pass, if a training batch has fewer."""
Derivative = Literal["one", "operation"]


class Policy(nn.Module):
    """A linear layer from features (B, D) to 2 P outputs, and the Adam that trains it.

    The first P outputs are the magnitudes before the sigmoid, the others the logits of the
    operations. All of its state is in buffers.
    """

    values: Tensor
    """(2 P, D + 1) weights, the last column the biases."""
    start: Tensor
    mean: Tensor
    square: Tensor
    steps: Tensor

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__()
        shape = 2 * COUNT, width + 1
        bound = 1 / math.sqrt(width)  # as nn.Linear does
        self.register_buffer("values", torch.empty(shape, device=device).uniform_(-bound, bound))
        self.register_buffer("start", self.values.clone())
        self.register_buffer("mean", torch.zeros(shape, device=device))
        self.register_buffer("square", torch.zeros(shape, device=device))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=device))

    @torch.no_grad()
    def step(self, gradient: Tensor, rate: float) -> None:
        """One step of Adam with L2 weight decay."""
        gradient = gradient + DECAY * self.values
        first, second = BETAS
        self.steps += 1
        self.mean.lerp_(gradient, 1 - first)
        self.square.lerp_(gradient.square(), 1 - second)
        steps = self.steps.to(gradient.dtype)
        size = (self.square / (1 - second**steps)).sqrt() + 1e-8
        self.values -= rate * self.mean / (1 - first**steps) / size


def outputs_of(values: Tensor, features: Tensor) -> Tensor:
    """(B, 2 P) outputs of a policy with these ``values`` (2 P, D + 1) for features (B, D)."""
    return F.linear(features, values[:, :-1], values[:, -1])


class Chances(NamedTuple):
    """What a policy says about each row."""

    magnitude: Tensor
    """(B, P) in [0, 1], from one end of an operation's range to the other."""
    probability: Tensor
    """(B, P), of sum 1."""


def chances(outputs: Tensor, temperature: float) -> Chances:
    """Magnitudes and probabilities from outputs (B, 2 P)."""
    magnitude, logits = outputs.split(COUNT, dim=-1)
    return Chances(magnitude.sigmoid(), (logits / temperature).softmax(dim=-1))


def amounts_of(magnitude: Tensor, mirror: Tensor) -> Tensor:
    """Amounts for ``settings`` from magnitudes (..., P) and the signs ``mirror`` (..., P), 1 or -1.

    A magnitude goes from one end of the range to the other: geometric operations and blends are the
    identity at 1/2, solarize and posterize at 1, cutout at 0. Only geometric ones are mirrored.
    """
    code = torch.arange(COUNT, device=magnitude.device)
    geometric = (code >= SHEAR_X) & (code <= ROTATE)
    blend = (code >= BRIGHTNESS) & (code <= SHARPNESS)
    falling = (code == POSTERIZE) | (code == SOLARIZE)
    twice = 2 * magnitude - 1
    amounts = torch.where(falling, 1 - magnitude, torch.where(code == CUTOUT, magnitude, 0.0))
    return torch.where(geometric, twice * mirror, torch.where(blend, twice, amounts))


class Noise(NamedTuple):
    """The random part of operations on B rows, in n slots one after the other."""

    gumbel: Tensor
    """(B, P) which operations are drawn."""
    shift: Tensor
    """(B, n, 1) in [-1, 1], of the magnitudes."""
    mirror: Tensor
    """(B, n, P) 1 or -1."""
    centres: Tensor
    """(B, n, 2) of cutouts."""


def noise_for(rows: int, slots: int, device: torch.device) -> Noise:
    """Draw it from the device's global generator."""
    wait = torch.empty(rows, COUNT, device=device).exponential_()
    return Noise(
        -wait.clamp_min(torch.finfo(wait.dtype).tiny).log(),
        2 * torch.rand(rows, slots, 1, device=device) - 1,
        1 - 2 * (torch.rand(rows, slots, COUNT, device=device) < 0.5).to(wait.dtype),
        torch.rand(rows, slots, 2, device=device),
    )


def drawn(logits: Tensor, gumbel: Tensor, n: int) -> Tensor:
    """(B, n) operations drawn from softmax(logits) (B, P) without replacement, in this order.

    The largest of logits plus Gumbel noise are such draws; nothing is read, as multinomial does.
    """
    return (logits + gumbel).topk(n, dim=1).indices


def tried(x: Tensor, magnitude: Tensor, derivative: Derivative) -> Tensor:
    """(B, P, C, H, W): each operation on each image (B, C, H, W), with gradients in ``magnitude``.

    ``derivative`` "one": every pixel changes by 1 with the magnitude, whatever the operation.
    """
    noise = noise_for(len(x), 1, x.device)
    given = settings(amounts_of(magnitude, noise.mirror[:, 0]), STANDARD, *x.shape[-2:])
    if derivative == "operation":
        return every(x, given, noise.centres[:, 0])
    with torch.no_grad():
        images = every(x, given, noise.centres[:, 0])
    return images + (magnitude - magnitude.detach())[..., None, None, None]


def embedded(model: Model, x: Tensor) -> Tensor:
    """(B, D) what the head sees of images (B, C, H, W)."""
    return model.embed(model.features(x))


class PolicyNet(Method):
    """What AdaAug and MADAug share: the policy, how it augments, and what is recorded of it."""

    needs = frozenset({"meta", "features"})
    kinds = IMAGES
    before_forward = True
    operations = NAMES
    space: ClassVar[Mapping[str, Any]] = {
        "temperature": ("choice", [1.0, 2.0, 3.0]),
        "delta": ("uniform", 0.0, 0.4),
        "learning_rate": ("loguniform", 1e-4, 1e-2),
    }
    shuffled = False
    """Whether rows swap their policies at random; set by ``shuffled_policies``."""
    policy: Policy
    outputs: Tensor
    """(N + 1, 2 P) of each training row at its last visit; the last row is for rows from
    elsewhere."""
    first: Tensor
    """The same by the policy as it started, from the same features."""
    seen: Tensor
    """(N + 1,) visits."""

    def __init__(
        self,
        upstream: Method | None,
        n: int,
        temperature: float,
        delta: float,
        refresh: int,
        meta_batch: float | Literal["full"],
        learning_rate: float,
        derivative: Derivative,
    ) -> None:
        super().__init__(upstream)
        if not 1 <= n <= COUNT:
            raise ValueError(f"n: expected 1 to {COUNT} operations, got {n}")
        if refresh < 1:
            raise ValueError(f"refresh: expected 1 or more steps, got {refresh}")
        for name, value in (("temperature", temperature), ("learning_rate", learning_rate)):
            if value <= 0:
                raise ValueError(f"{name}: expected a number above 0, got {value}")
        if not 0 <= delta <= 1:
            raise ValueError(f"delta: expected a number in [0, 1], got {delta}")
        self.n, self.temperature, self.delta = n, temperature, delta
        self.refresh, self.meta_batch = refresh, check_meta_batch(meta_batch)
        self.learning_rate = learning_rate
        self.derivative: Derivative = derivative
        self._steps = 0  # of this epoch
        self._last = torch.zeros(2, 0, n)
        self._rows = 0

    def supports(self, task: Task, spec: Spec) -> str:
        """Grey or RGB images; an upstream that leaves the forward pass to the trainer."""
        return super().supports(task, spec) or no_picture(named(self), spec)

    def setup(self, ctx: Context) -> None:
        """Make the policy, and allocate what is recorded of each row."""
        super().setup(ctx)
        if not isinstance(ctx.model, Model):
            raise TypeError("a policy network needs a methods.base.Model, whose features it sees")
        device, rows = ctx.train.targets.device, ctx.spec.rows + 1
        self.policy = Policy(ctx.model.head.in_features, device)
        for name in ("outputs", "first"):
            self.register_buffer(name, torch.zeros(rows, 2 * COUNT, device=device))
        self.register_buffer("seen", torch.zeros(rows, device=device))

    def begin_epoch(self, ctx: Context) -> None:
        """Log the policy's steps, and its entropy as a share of that of equal probabilities."""
        super().begin_epoch(ctx)
        self._steps = 0
        ctx.log(outer_steps=int(self.policy.steps))
        now, _ = self._visited()
        if len(now.probability):
            entropy = torch.special.entr(now.probability).sum(dim=1).mean()
            ctx.log(policy_entropy=float(entropy) / math.log(COUNT))

    def augment(self, batch: Batch, ctx: Context) -> Batch:
        """Update the policy every ``refresh`` steps; then augment rows, each by its own policy."""
        if self.upstream is not None:
            batch = self.upstream.augment(batch, ctx)
        if batch.logits is not None:
            raise ValueError("the upstream has already run this step's forward pass")
        model, rows = cast("Model", ctx.model), self.augmented(len(batch), ctx)
        noise = noise_for(rows, self.n, batch.x.device)  # first, so that controls draw the same
        with mode(model, training=False):
            if not self.frozen and self._steps % self.refresh == 0:
                self.policy.step(self.gradient(batch, model, ctx), self.learning_rate)
            with torch.no_grad():
                features = embedded(model, batch.x[:rows]) if rows else None
        self._steps += 1
        self._rows, self._last = len(batch), torch.zeros(2, 0, self.n)
        if features is None:
            return batch
        outputs = outputs_of(self.policy.values, features)
        self._remember(batch.index[:rows], outputs, features)
        if self.shuffled:
            outputs = outputs[torch.randperm(rows, device=outputs.device)]
        made = self._applied(batch.x[:rows], outputs, noise)
        return replace(batch, x=torch.cat([made, batch.x[rows:]]))

    def augmented(self, count: int, ctx: Context) -> int:
        """How many of ``count`` rows are augmented, from the first on."""
        return count

    @abstractmethod
    def gradient(self, batch: Batch, model: Model, ctx: Context) -> Tensor:
        """Gradient of the meta loss in the policy's values (2 P, D + 1); ``model`` is in eval mode.

        ``batch`` are the rows of this step, before they are augmented.
        """

    def captions(self) -> list[str]:
        """What the upstream did to each row of the last batch, then the row's operations."""
        told = []
        for codes, given in zip(*self._last.tolist(), strict=True):
            pairs = [(int(code), setting) for code, setting in zip(codes, given, strict=True)]
            told.append(", ".join(filter(None, (_told(*pair) for pair in pairs))) or "identity")
        told += [""] * (self._rows - len(told))
        before = super().captions()
        if not before:
            return told
        return [", ".join(filter(None, texts)) for texts in zip(before, told, strict=True)]

    def learned(self) -> dict[str, Tensor]:
        """Per training row at its last visit: each operation's probability and magnitude.

        Magnitudes are from one end of the range to the other. ``seen`` counts the visits; a row
        without any has equal probabilities and magnitudes of 1/2.
        """
        now = chances(self.outputs[:-1], self.temperature)
        own = {"probability": now.probability, "magnitude": now.magnitude, "seen": self.seen[:-1]}
        return {**super().learned(), **own}

    def as_policy(self, learned: Mapping[str, Any]) -> dict[str, Any]:
        """Sub-policies of all orders of ``n`` operations, for each class or for all; n up to 2.

        The shifts of magnitudes are left out.
        """
        if not learned or self.n > 2:
            return {}
        parts = [
            _sub_policies(p, levels, self.n)
            for p, levels in zip(*(learned[name] for name in POLICY), strict=True)
        ]
        return {
            "ranges": "fast_autoaugment",
            **(parts[0] if len(parts) == 1 else {"classes": parts}),
        }

    def learning(self) -> dict[str, float]:
        """Outer steps, and how far the policy is from what it said of the same features at first.

        Medians over the rows that were visited: of the total variation distance of the
        probabilities, and, over operations too, of the distance of the magnitudes.
        """
        found = {"outer_steps": float(self.policy.steps)}
        now, before = self._visited()
        if len(now.probability):
            moved = (now.probability - before.probability).abs().sum(dim=1) / 2
            found["probability"] = float(moved.median())
            found["magnitude"] = float((now.magnitude - before.magnitude).abs().median())
        return {**super().learning(), **found}

    def _visited(self) -> tuple[Chances, Chances]:
        """What the policy said of the rows that it has seen, and what it would have at first."""
        was = self.seen[:-1] > 0
        now, before = (
            chances(each[:-1][was], self.temperature) for each in (self.outputs, self.first)
        )
        return now, before

    def _remember(self, index: Tensor, outputs: Tensor, features: Tensor) -> None:
        """Record the outputs for training rows; rows from elsewhere share the last place."""
        place = torch.where(index >= 0, index, len(self.seen) - 1)
        self.outputs[place] = outputs
        self.first[place] = outputs_of(self.policy.start, features)
        self.seen[place] += 1

    def _applied(self, x: Tensor, outputs: Tensor, noise: Noise) -> Tensor:
        """Images (B, C, H, W) after n operations drawn without replacement, one after the other."""
        magnitude, logits = outputs.split(COUNT, dim=1)
        codes = drawn(logits / self.temperature, noise.gumbel, self.n)
        given = []
        for slot, code in enumerate(codes.unbind(dim=1)):
            moved = (magnitude.sigmoid() + self.delta * noise.shift[:, slot]).clamp(0, 1)
            now = settings(amounts_of(moved, noise.mirror[:, slot]), STANDARD, *x.shape[-2:])
            x = chosen(x, code, now, noise.centres[:, slot])
            given.append(now.gather(1, code[:, None]))
        self._last = torch.stack([codes.to(given[0].dtype), torch.cat(given, dim=1)])
        return x

    def _meta(self, ctx: Context) -> Batch:
        name = type(self).__name__.lower()
        return meta_rows(name, ctx, self.meta_batch, ctx.batch_size, stratified=False)


def _sub_policies(p: Any, levels: Any, n: int) -> dict[str, Any]:
    """Sequences of n operations drawn without replacement, with p (P,) and levels (P,) given."""
    single = [
        [NAMES[code], 1.0, *([] if code in UNSIZED else [float(level)])]
        for code, level in zip(range(len(p)), levels, strict=False)
    ]
    shares = [float(each) / float(sum(p)) for each in p]
    weights, found = [], []
    for codes in permutations(range(len(p)), n):
        rest, weight = list(range(len(p))), 1.0
        for code in codes:
            left = sum(shares[each] for each in rest)
            # Nothing is left where one operation has probability 1: the others are equally likely.
            weight *= shares[code] / left if left > 0 else 1 / len(rest)
            rest.remove(code)
        weights.append(weight)
        found.append([single[code] for code in codes])
    return {"sub_policies": found, "weights": weights}


def _controls(start: str) -> tuple[str, ...]:
    """The controls of a method that begins as ``start``, a name without how it learns."""
    still = f"frozen(upstream={start})"
    return still, "shuffled_policies(upstream={self})", f"head_refit(upstream={still})"


class AdaAug(PolicyNet):
    """Learn operations for each image from its features, by mixing what they make of meta rows.

    A linear layer maps the embedding of an image (the input of the network's head, in eval mode) to
    a logit and a magnitude mu in [0, 1] of each of 17 operations: RandAugment's with invert, cutout
    and flip. **Exploitation**, at every step: each image gets ``n`` different operations, one after
    the other, drawn from p = softmax(logits / ``temperature``), each with its mu plus a uniform
    shift of up to ``delta`` (cut off at 0 and 1). **Exploration**, every ``refresh`` steps: all 17
    operations with their mu are applied to each of ``meta_batch`` training batches of meta rows,
    their embeddings are mixed, sum_k p_k h_k with p at temperature 1, and the policy takes a step
    of Adam with the learning rate ``learning_rate`` (weight decay 1e-3) down the mean loss of the
    head on the mixtures. The network itself learns nothing from meta rows.

    mu goes from one end of a range to the other: 0 and 1 are the strongest shear, translation and
    rotation, with a random sign, and the smallest and largest factor of brightness, contrast, color
    and sharpness; solarize and posterize are the identity at 1, cutout at 0. ``derivative`` is that
    of an image in mu: ``one`` (published) in every pixel, whatever the operation; ``operation``
    that of the operation, through ``methods.differentiable``.

    ``preset=exact`` is our variant: the operations' own derivatives.

    **Deviations.** The text of the paper was not at hand; from the authors' code at commit 7c02c4b
    (C): one run of one network, as in C's search, where C afterwards trains a second network from
    the start by the final policy and the first network's features; exploitation has the settings of
    that second training on CIFAR-10 throughout (C searches with one operation, temperature 1 and
    delta 0); exploration precedes a step instead of following it; meta rows are the run's own share
    of the pool (C: 45,744 images beside 4,256 training images of CIFAR-10, 72,257 beside 1,000 of
    SVHN) and do not pass the upstream (C crops and flips them), there is no cutout besides, and
    gradients are not clipped;
    ``derivative=one`` holds for pixels in [0, 1] (C: for normalised ones; Adam hides the factor);
    ranges of translation, solarize and posterize as in RandAugment (C: 0.45 of the edge, 256, and
    bits rounded down); on grey images color is the identity, and cutout fills with the luma.
    """

    source = "Cheung & Yeung, AdaAug, ICLR 2022"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "published": {},
        "exact": {"derivative": "operation"},
    }
    costs: Mapping[str, float] = {"published": 2.3, "exact": 2.5}

    def __init__(
        self,
        *,
        upstream: Method | None = None,
        n: int = 2,
        temperature: float = 3.0,
        delta: float = 0.3,
        refresh: int = 3,
        meta_batch: float | Literal["full"] = 0.25,
        learning_rate: float = 1e-3,
        derivative: Derivative = "one",
    ) -> None:
        super().__init__(
            upstream, n, temperature, delta, refresh, meta_batch, learning_rate, derivative
        )
        start = f"delta={delta}, n={n}, temperature={temperature}, upstream={{upstream}}"
        self.controls = _controls(f"adaaug({start})")

    def gradient(self, batch: Batch, model: Model, ctx: Context) -> Tensor:
        """By exploration on meta rows, a part of them at a time."""
        meta = self._meta(ctx)
        values = self.policy.values.detach().requires_grad_()
        total, size = torch.zeros_like(values), max(CHUNK, ctx.batch_size) // COUNT
        for x, y in zip(meta.x.split(size), meta.y.split(size), strict=True):
            with torch.no_grad():
                features = embedded(model, x)
            with torch.enable_grad(), frozen(model):
                now = chances(outputs_of(values, features), 1.0)
                images = tried(x, now.magnitude, self.derivative)
                each = embedded(model, images.flatten(0, 1)).unflatten(0, images.shape[:2])
                logits = model.head((now.probability[..., None] * each).sum(dim=1))
                loss = ctx.task.losses(logits, y).sum() / len(meta)
                total += torch.autograd.grad(loss, values)[0]
        return total


class MADAug(PolicyNet):
    """Learn AdaAug's policy through a step of the network, for a growing share of the images.

    The policy and its use are those of ``adaaug``. Every ``refresh`` steps the images that 17
    operations make of each row of the batch are mixed, x_i = sum_k p_ik x_ik (p at temperature 1),
    the network takes an SGD step on the mixtures, theta' = theta - ``alpha`` dL(theta, x) / dtheta,
    and the policy a step of Adam down the mean loss of theta' on ``meta_batch`` training batches of
    meta rows. The hypergradient is exact: - alpha times the
    gradient in x of <v, dL(theta, x) / dtheta>, v the meta gradient at theta', and from there
    through p and mu. The step on the mixtures is then forgotten. The network is in eval mode.

    In epoch t of T a share min(1, tanh(t / (``tau`` T)) + 0.01) of each batch is augmented, its
    first rows; the others stay as the upstream made them.

    ``preset=exact`` is our variant: the operations' own derivatives in place of 1 in each pixel.

    **Deviations.** The text of the paper was not at hand; from the authors' code at commit 279b60a
    (C): the policy learns from the first step (C: after epoch 300 by default, of its 240); the step
    on the mixtures is plain SGD with a rate of its own (C: the optimiser's, 0.1 at first, with
    momentum and weight decay), and no gradient passes through the features that the policy sees;
    the task's loss (main_higher.py at 00fc274 smooths labels in the step, the meta loss and the
    network's training); tau is the same share of the epochs as C's 40 of 240; no cutout besides, no
    clipping; operations and the source of meta rows as in ``adaaug``.
    """

    source = "Hou et al., MADAug, ICCV 2023, arXiv:2309.04747"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "published": {},
        "exact": {"derivative": "operation"},
    }
    costs: Mapping[str, float] = {"published": 3.0, "exact": 3.1}

    def __init__(
        self,
        *,
        upstream: Method | None = None,
        n: int = 2,
        temperature: float = 3.0,
        delta: float = 0.3,
        tau: float = 0.167,
        alpha: float = 0.1,
        refresh: int = 3,
        meta_batch: float | Literal["full"] = 0.125,
        learning_rate: float = 1e-3,
        derivative: Derivative = "one",
    ) -> None:
        super().__init__(
            upstream, n, temperature, delta, refresh, meta_batch, learning_rate, derivative
        )
        if tau <= 0:
            raise ValueError(f"tau: expected a share of the epochs above 0, got {tau}")
        if alpha <= 0:
            raise ValueError(f"alpha: expected a learning rate above 0, got {alpha}")
        self.tau, self.alpha = tau, alpha
        start = f"delta={delta}, n={n}, tau={tau}, temperature={temperature}, upstream={{upstream}}"
        self.controls = _controls(f"madaug({start})")

    def augmented(self, count: int, ctx: Context) -> int:
        """The share of this epoch."""
        share = math.tanh(ctx.epoch / (self.tau * ctx.epochs)) + 0.01
        return int(min(1.0, share) * count)

    def gradient(self, batch: Batch, model: Model, ctx: Context) -> Tensor:
        """Through one step of SGD on the mixed images of this batch."""
        with torch.no_grad():
            features = embedded(model, batch.x)
        values = self.policy.values.detach().requires_grad_()
        with torch.enable_grad():
            now = chances(outputs_of(values, features), 1.0)
            images = tried(batch.x, now.magnitude, self.derivative)
            mixed = torch.einsum("bp,bpchw->bchw", now.probability, images)
        towards = lookahead(model, mixed.detach(), batch, self._meta(ctx), self.alpha, self, ctx)
        return torch.autograd.grad(mixed, values, towards)[0]


def lookahead(
    model: Model,
    x: Tensor,
    batch: Batch,
    meta: Batch,
    alpha: float,
    method: Method,
    ctx: Context,
) -> Tensor:
    """(B, C, H, W) gradient in the images ``x`` of the meta loss after an SGD step on them.

    ``alpha`` is the learning rate of the step, labels and weights are those of ``batch``. Exact, by
    a second backward pass through the gradient of the step; BatchNorm and dropout follow the mode
    of ``model``.
    """
    here = {
        name: each.detach().requires_grad_()
        for name, each in model.named_parameters()
        if each.requires_grad
    }
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        losses = method.losses(evaluate(model, here, x), replace(batch, x=x), ctx)
        slopes = torch.autograd.grad(
            batch.w @ losses, list(here.values()), create_graph=True, materialize_grads=True
        )
        ahead = {
            name: (each - alpha * slope).detach().requires_grad_()
            for (name, each), slope in zip(here.items(), slopes, strict=True)
        }
        loss = ctx.task.losses(evaluate(model, ahead, meta.x), meta.y).mean()
        towards = torch.autograd.grad(loss, list(ahead.values()), materialize_grads=True)
        along = torch.stack([(a * b).sum() for a, b in zip(slopes, towards, strict=True)]).sum()
        (found,) = torch.autograd.grad(along, x)
    return -alpha * found


class ShuffledPolicies(Method):
    """Shuffle the policies that ``upstream`` learned among the rows of each batch.

    Where the method beats this row, the gain comes from which row has which policy, not from what
    the policies have in common. ``upstream`` is adaaug or madaug; it learns as without this row.
    """

    kinds = ANYTHING
    control = True

    def __init__(self, *, upstream: Method | None = None) -> None:
        super().__init__(upstream)
        if isinstance(upstream, PolicyNet):
            upstream.shuffled = True

    def supports(self, task: Task, spec: Spec) -> str:
        """A method with a policy network."""
        if not isinstance(self.upstream, PolicyNet):
            return (
                "shuffled_policies needs upstream=, a method with a policy network, such as "
                "shuffled_policies(upstream=adaaug)"
            )
        return super().supports(task, spec)

    def augment(self, batch: Batch, ctx: Context) -> Batch:
        """The upstream's batch, in which rows swapped policies."""
        return self.upstream.augment(batch, ctx) if self.upstream is not None else batch


def _told(code: int, setting: float) -> str:
    """An operation in words; empty for identity."""
    if code in (TRANSLATE_X, TRANSLATE_Y):
        setting = math.trunc(setting)
    if code in (IDENTITY, FLIP):
        return NAMES[code] if code else ""
    return caption(code, setting)
