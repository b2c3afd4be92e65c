"""Networks by name, and a user's own by the name of its factory."""

from __future__ import annotations

from collections.abc import Callable, Set
from functools import partial
from typing import Any

from torch import nn

from benchmarks.training.networks import MODELS, StagedModel
from methods import own
from methods.base import Spec
from methods.branches import add_branch
from methods.naming import OWN, Call, NamingError, bind, call_of, parse, render, unknown

VERSION = 1
"""Increased whenever a network's results change; part of a run's id."""


def canonical(text: str) -> str:
    """The canonical spelling of a model.

    ``py:package.module:factory`` names a user's own factory, called with the Spec.

    Raises:
        NamingError: an unknown name or argument, or a value that is not allowed.
    """
    if text.startswith(OWN):
        return text
    call = _call(text)
    return render(call_of(call.name, bind(call, MODELS[call.name], "model")))


def build(text: str, spec: Spec, needs: Set[str] = frozenset()) -> nn.Module:
    """A new network on the CPU, initialised from the global generator.

    If a method's ``needs`` contain "auxiliary_norm", a network with batch normalisation gets a
    second set of it; its other weights stay the same.

    Raises:
        NamingError: an unknown name or argument, or a value that does not fit the data.
    """
    factory = _own(text) if text.startswith(OWN) else None
    if factory is None:
        if spec.kind != "image":
            raise NamingError(f"model {text!r} needs images, but the data are {spec.kind}s")
        call = _call(text)
        factory = partial(MODELS[call.name], **bind(call, MODELS[call.name], "model"))
    try:
        model = factory(spec)
    except ValueError as error:
        raise NamingError(f"model {text!r}: {error}") from error
    if not isinstance(model, nn.Module):
        raise NamingError(f"model {text!r} returned {type(model).__name__}, expected a nn.Module")
    if "auxiliary_norm" in needs and isinstance(model, StagedModel):
        add_branch(model)
    return model


def version_of(text: str) -> int:
    """The version of a model in a run's id: ours, or a hash of the user's own code."""
    if not text.startswith(OWN):
        return VERSION
    _own(text)
    return own.version(text.split(":")[1])


def _call(text: str) -> Call:
    call = parse(text)
    if not isinstance(call, Call):
        raise NamingError(f"model {text!r}: expected a name or a call such as resnet18(width=0.25)")
    if call.name not in MODELS:
        raise unknown("model", call.name, MODELS)
    return call


def _own(text: str) -> Callable[[Spec], Any]:
    factory = own.load(text, "model")
    if not callable(factory):
        raise NamingError(f"model {text!r} is not callable, it is {factory!r}")
    return factory
