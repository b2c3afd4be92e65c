"""Batch normalisation by running statistics as part of the convolution before it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from methods.base import Model
from methods.functional import buffers_kept, mode


class Pair(NamedTuple):
    """A convolution, and the normalisation that its output goes to."""

    conv: nn.Conv2d
    norm: nn.BatchNorm2d

    @property
    def statistics(self) -> tuple[Tensor, Tensor]:
        """Running mean and variance (C,)."""
        return cast("Tensor", self.norm.running_mean), cast("Tensor", self.norm.running_var)


@contextmanager
def folded(model: nn.Module, pairs: list[Pair]) -> Iterator[None]:
    """``model`` in eval mode with each pair as one convolution; restored afterwards, also on error.

    Scale and shift of a normalisation become those of its convolution's weights, as they stand
    when the context is entered, and the layer is passed over. No gradient reaches the weights.
    """
    norms = {pair.norm for pair in pairs}
    places = [
        (module, name, child)
        for module in model.modules()
        for name, child in module.named_children()
        if child in norms
    ]
    own = [(pair.conv, pair.conv.weight, pair.conv.bias) for pair in pairs]
    try:
        for pair in pairs:
            conv, norm = pair
            with torch.no_grad():
                weight, bias = fuse_conv_bn_weights(
                    conv.weight, conv.bias, *pair.statistics, norm.eps, norm.weight, norm.bias
                )
            conv.weight, conv.bias = weight.requires_grad_(False), bias.requires_grad_(False)
        for module, name, _ in places:
            setattr(module, name, nn.Identity().eval())
        yield
    finally:
        for conv, weight, bias in own:
            conv.weight, conv.bias = weight, bias
        for module, name, norm in places:
            setattr(module, name, norm)


@torch.no_grad()
def foldable(model: Model, x: Tensor) -> list[Pair]:
    """Pairs of ``model`` that may be one convolution each: stages and logits stay the same.

    They are looked for in a forward of rows ``x`` (B, *S), and kept where it comes out the same
    with them folded, at statistics drawn at random: so a convolution whose output also goes
    elsewhere is left alone.
    """
    with buffers_kept(model), mode(model, training=False):
        pairs = _adjacent(model, x)
        generator = torch.Generator().manual_seed(0)
        for pair in pairs:
            mean, variance = pair.statistics
            mean.copy_(torch.rand(len(mean), generator=generator) - 0.5)
            variance.copy_(torch.rand(len(mean), generator=generator) + 0.5)
        plain = _outputs(model, x)

        def same(these: list[Pair]) -> bool:
            with folded(model, these):
                pieces = zip(plain, _outputs(model, x), strict=True)
                return all(_close(one, other) for one, other in pieces)

        return pairs if same(pairs) else [pair for pair in pairs if same([pair])]


def _outputs(model: Model, x: Tensor) -> list[Tensor]:
    """Stages and logits; copies, as a later layer may work in place."""
    features = model.features(x)
    return [*(each.clone() for each in features), model.head(model.embed(features))]


def _close(one: Tensor, other: Tensor) -> bool:
    """Whether they differ by rounding alone, on the scale of the first."""
    scale = one.abs().max().clamp_min(torch.finfo(one.dtype).tiny)
    return bool((one - other).abs().max() <= 1e-4 * scale)


def _adjacent(model: Model, x: Tensor) -> list[Pair]:
    """Convolutions, and the normalisation whose input is their output; each called once."""
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []

    def record(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        calls.append((module, inputs[0], output))

    layers = [each for each in model.modules() if isinstance(each, nn.Conv2d | nn.BatchNorm2d)]
    handles = [layer.register_forward_hook(record) for layer in layers]
    try:
        _outputs(model, x)
    finally:
        for handle in handles:
            handle.remove()
    times = Counter(layer for layer, _, _ in calls)
    return [
        Pair(conv, norm)
        for conv, _, output in calls
        for norm, seen, _ in calls
        if type(conv) is nn.Conv2d and isinstance(conv.weight, nn.Parameter)  # not computed itself
        if isinstance(norm, nn.BatchNorm2d) and norm.track_running_stats
        if seen is output and times[conv] == times[norm] == 1
    ]
