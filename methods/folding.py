"""Folds batch normalisation with running statistics into the convolution before it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from methods.base import Model
from methods.branches import on_branch
from methods.functional import mode


class Pair(NamedTuple):
    """Names of a convolution and of the normalisation layer after it."""

    conv: str
    norm: str

    def layers(self, model: nn.Module) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
        """The two layers in ``model``."""
        conv, norm = model.get_submodule(self.conv), model.get_submodule(self.norm)
        return cast("nn.Conv2d", conv), cast("nn.BatchNorm2d", norm)


@contextmanager
def folded(model: nn.Module, pairs: list[Pair]) -> Iterator[None]:
    """Fold each pair of ``model``, in eval mode, into one convolution; restored even on error.

    The convolution takes over the layer's scale and shift at the time the context is entered, and
    the layer becomes the identity. No gradient reaches the weights.
    """
    layers = [pair.layers(model) for pair in pairs]
    own = [(conv, conv.weight, conv.bias) for conv, _ in layers]
    try:
        for conv, norm in layers:
            with torch.no_grad():
                mean, var = cast("Tensor", norm.running_mean), cast("Tensor", norm.running_var)
                weight, bias = fuse_conv_bn_weights(
                    conv.weight, conv.bias, mean, var, norm.eps, norm.weight, norm.bias
                )
            conv.weight, conv.bias = weight.requires_grad_(False), bias.requires_grad_(False)
            vars(norm)["forward"] = _pass  # the layer's other attributes stay readable
        yield
    finally:
        for conv, weight, bias in own:
            conv.weight, conv.bias = weight, bias
        for _, norm in layers:
            vars(norm).pop("forward", None)


def _pass(x: Tensor) -> Tensor:
    return x


def foldable(model: Model) -> list[Pair]:
    """Pairs of ``model``, on its first branch, that can be folded in eval mode.

    They come from the graph of its operations: the convolution's output goes only to the
    normalisation layer, both are called once, and both are plain layers without hooks. A network
    that ``torch.fx`` cannot trace, because its operations depend on values, has no such pairs.
    """
    with mode(model, training=False), on_branch(model, 0):
        try:
            graph = fx.Tracer().trace(_Looked(model))
        except Exception:  # a user's forward may fail in any way under tracing
            return []
        modules = dict(model.named_modules())
        return [
            pair
            for pair in _adjacent(graph)
            if _is_plain(modules[pair.conv], nn.Conv2d)
            and _is_plain(modules[pair.norm], nn.BatchNorm2d)
        ]


def _adjacent(graph: fx.Graph) -> Iterator[Pair]:
    """Pairs of modules where only the second one uses the output of the first."""
    calls = Counter(str(node.target) for node in graph.nodes)
    read = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    for node in graph.nodes:
        before = node.args[0] if len(node.args) == 1 else None
        if not isinstance(before, fx.Node) or {node.op, before.op} != {"call_module"}:
            continue
        names = [str(before.target), str(node.target)]
        once = all(calls[name] == 1 for name in names)
        if set(before.users) == {node} and once and names[0] not in read:
            yield Pair(*(name.removeprefix("model.") for name in names))


class _Looked(nn.Module):
    """A network that returns everything an attack uses."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> list[Tensor]:
        """Stage outputs, then logits."""
        features = self.model.features(x)
        return [*features, self.model.head(self.model.embed(features))]


def _is_plain(layer: nn.Module, kind: type[nn.Conv2d | nn.BatchNorm2d]) -> bool:
    """Whether a layer in eval mode does just what its class does, with its own weights."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks)
    if type(layer) is not kind or any(hooks) or "forward" in vars(layer):
        return False
    if isinstance(layer, nn.BatchNorm2d):
        return layer.running_mean is not None and not layer.training
    return isinstance(layer.weight, nn.Parameter)  # otherwise computed before each call
