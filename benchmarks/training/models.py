"""Networks by name: ours, timm's, and a user's own by the name of its factory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Set
from functools import partial
from importlib import metadata
from typing import Any

from torch import nn

from benchmarks.training import borrowed, weights
from benchmarks.training.hooked import NO_HEAD, staged
from benchmarks.training.networks import IMAGES, MODELS, VECTORS
from methods import own
from methods.base import PLURAL, Model, Spec
from methods.branches import add_branch
from methods.naming import (
    OWN,
    TIMM,
    Call,
    NamingError,
    Value,
    bind,
    call_of,
    parameters,
    parse,
    render,
    unknown,
)
from methods.probe import frozen_trunk

VERSION = 1
"""Increased whenever a network's results change; part of a run's id."""
NEEDS = frozenset({"auxiliary_norm", "features", "frozen_trunk"})
"""Needs of a method for which ``build`` changes the network."""
STARTS = frozenset({"weights", "pretrained"})
"""Arguments that say from which weights a network starts."""
PROBE = "probe"
KNOWN = (*MODELS, PROBE, f"{TIMM}NAME", f"{OWN}MODULE:NAME")


def canonical(text: str) -> str:
    """The canonical spelling of a model.

    ``py:package.module:factory`` names a user's own factory, called with the Spec; ``timm:NAME`` a
    network of timm, whose arguments are ours and those of ``timm.create_model``;
    ``probe(backbone=MODEL)`` a network of which only the head is trained (see ``methods.probe``).

    Raises:
        NamingError: an unknown name or argument, or a value that is not allowed.
    """
    if text.startswith(OWN):
        return text
    return render(_canonical(_call(text)))


def build(text: str, spec: Spec, needs: Set[str] = frozenset()) -> nn.Module:
    """A new network on the CPU, initialised from the global generator.

    If a method's ``needs`` contain "auxiliary_norm", a network with batch normalisation gets a
    second set of it; its other weights stay the same. With "features" the stages and the head of a
    user's own network are looked for; with "frozen_trunk" only its head is trained.

    Raises:
        NamingError: an unknown name or argument, or a value that does not fit the data.
    """
    if text.startswith(OWN):
        model = _own_network(text, spec, needs)
    else:
        model = _built(_canonical(_call(text)), spec, needs)
    return fitted(model, needs)


def fitted(model: nn.Module, needs: Set[str]) -> nn.Module:
    """A network as a method needs it: with "frozen_trunk" only its head is trained."""
    if "frozen_trunk" in needs and isinstance(model, Model):
        return frozen_trunk(model)
    return model


def version_of(text: str) -> int:
    """The version of a model in a run's id: ours, or a hash of the user's own code or weights.

    Raises:
        NamingError: a file of weights cannot be read, or the user's own code cannot be imported.
    """
    if text.startswith(OWN):
        _own(text)
        return own.version(text.split(":")[1])
    call = _call(text)
    try:
        parts = [*_contents(call)]
    except ValueError as error:
        raise NamingError(f"model {text!r}: {error}") from error
    if not parts:
        return VERSION
    digest = hashlib.sha256("\n".join([str(VERSION), *parts]).encode()).hexdigest()
    return int(digest[:12], 16)


def bare(text: str) -> str:
    """The model without the weights that it starts from, for weights that replace them all."""
    return text if text.startswith(OWN) else render(_bare(_call(text)))


def check_files(text: str, version: int) -> None:
    """Refuse weights that are not those that the version of a run was made from.

    Raises:
        NamingError: the file was changed since, or is another one on this machine.
    """
    if text.startswith(OWN):
        return
    given = {name for each in _calls(_call(text)) for name, _ in each.arguments}
    if not given & STARTS:
        return
    if version_of(text) != version:
        raise NamingError(
            f"model {text!r}: its weights are not those that the run was planned with: they were "
            "changed since, or are others on this machine; start the command again"
        )


def own_names(text: str) -> list[str]:
    """The names of the user's own code in a model."""
    if text.startswith(OWN):
        return [text]
    return [each.name for each in _calls(_call(text)) if each.name.startswith(OWN)]


def packages(text: str) -> dict[str, str]:
    """Versions of the packages, beside those of every run, that a network is from."""
    if text.startswith(OWN) or not any(c.name.startswith(TIMM) for c in _calls(_call(text))):
        return {}
    return {"timm": metadata.version("timm")}


def takes_width(text: str) -> bool:
    """Whether a network takes the argument ``width``."""
    if text.startswith(OWN):
        return False
    factory = MODELS.get(_call(text).name)
    return factory is not None and "width" in parameters(factory)


def _bare(call: Call) -> Call:
    if call.name == PROBE:
        return call_of(PROBE, {"backbone": _bare(_backbone(call))})
    return Call(call.name, tuple(each for each in call.arguments if each[0] not in STARTS))


def _call(text: str) -> Call:
    call = parse(text)
    if not isinstance(call, Call):
        raise NamingError(f"model {text!r}: expected a name or a call such as resnet18(width=0.25)")
    _check_name(call.name)
    return call


def _check_name(name: str) -> None:
    if name not in (*MODELS, PROBE) and not name.startswith((TIMM, OWN)):
        raise unknown("model", name, KNOWN)


def _calls(call: Call) -> Iterator[Call]:
    """A model and its backbone, if it has one."""
    yield call
    if call.name == PROBE:
        yield from _calls(_backbone(call))


def _backbone(call: Call) -> Call:
    """The backbone of a probe, as a call.

    Raises:
        NamingError: it has none, other arguments too, or names no network.
    """
    given = dict(call.arguments)
    inner = given.pop("backbone", None)
    if given or inner is None:
        got = ", ".join(given) or "none"
        raise NamingError(f"probe takes backbone=MODEL, such as resnet18, and no more; got {got}")
    found = parse(inner) if isinstance(inner, str) else inner
    if not isinstance(found, Call):
        raise NamingError(f"probe: backbone: expected a network, got {render(found)}")
    _check_name(found.name)
    if found.name == PROBE:
        raise NamingError("probe: backbone: expected a network, got another probe")
    return found


def _canonical(call: Call) -> Call:
    if call.name == PROBE:
        return call_of(PROBE, {"backbone": _canonical(_backbone(call))})
    if call.name.startswith(OWN):
        if call.arguments:
            raise NamingError(f"model {call.name!r} takes no arguments, it is called with the Spec")
        return call
    if call.name.startswith(TIMM):
        return call_of(call.name, {**_bound(call), **_others(call)})
    return call_of(call.name, _bound(call))


def _bound(call: Call) -> dict[str, Any]:
    """The arguments that we know, without those at their default."""
    if not call.name.startswith(TIMM):
        return bind(call, MODELS[call.name], "model")
    known = _of_timm()
    ours = Call(call.name, tuple(each for each in call.arguments if each[0] in known))
    return bind(ours, borrowed.timm_network, "model")


def _others(call: Call) -> dict[str, Any]:
    """The arguments that ``timm.create_model`` gets."""
    return {n: _plain(each) for n, each in call.arguments if n not in _of_timm()}


def _of_timm() -> set[str]:
    return parameters(borrowed.timm_network).keys() - {"others"}


def _plain(value: Value) -> Any:
    if isinstance(value, tuple):
        return tuple(_plain(each) for each in value)
    if isinstance(value, Call) and not value.arguments:
        return {"true": True, "false": False, "none": None}.get(value.name, value.name)
    return value


def _built(call: Call, spec: Spec, needs: Set[str]) -> nn.Module:
    text = render(call)
    _check_kind(call.name, spec)
    if call.name == PROBE:
        inner = _backbone(call)
        model = _built(inner, spec, needs | {"features"})
        if not isinstance(model, Model):
            raise NamingError(
                f"model {text!r}: no head to train was found in {render(inner)}: {NO_HEAD}"
            )
        return frozen_trunk(model)
    if call.name.startswith(OWN):
        return _own_network(call.name, spec, needs)
    try:
        if call.name.startswith(TIMM):
            name = call.name.removeprefix(TIMM)
            given, others = _bound(call), _others(call)
            return borrowed.timm_network(name, spec, needs, **given, others=others)
        model = partial(MODELS[call.name], **_bound(call))(spec)
    except ValueError as error:
        raise NamingError(f"model {text!r}: {error}") from error
    if "auxiliary_norm" in needs:
        add_branch(model)
    return model


def _check_kind(name: str, spec: Spec) -> None:
    """Refuse a network that takes other inputs.

    Raises:
        NamingError: names those that take these.
    """
    if name.startswith(OWN) or name == PROBE:
        return
    taken = {"image": IMAGES, "vector": VECTORS}
    kinds = [each.kind for each in spec.inputs]
    fits = taken.get(kinds[0], frozenset()) if len(kinds) == 1 else frozenset()
    if name not in fits and not (name.startswith(TIMM) and kinds == ["image"]):
        data = " and ".join(PLURAL[kind] for kind in kinds)
        needs = " or ".join(PLURAL[kind] for kind, names in taken.items() if name in names)
        known = "write your own (py:)"
        if fits:
            known = f"for them there are {', '.join(sorted(fits))} (--model {min(fits)})"
        raise NamingError(
            f"model {name!r} needs {needs or 'images'}, but the data are {data}; {known}"
        )


def _contents(call: Call) -> Iterator[str]:
    """Hashes of what a model reads: files of weights, and the user's own code."""
    for each in _calls(call):
        if each.name.startswith(OWN):
            _own(each.name)
            yield str(own.version(each.name.split(":")[1]))
            continue
        given = _bound(each) if each.name != PROBE else {}
        named = given.get("weights", "none")
        if named not in ("none", "imagenet"):
            yield weights.checksum(named)
        if given.get("pretrained"):
            yield weights.checksum(str(borrowed.cached(each.name.removeprefix(TIMM))))


def _own_network(text: str, spec: Spec, needs: Set[str]) -> nn.Module:
    try:
        model = _own(text)(spec)
    except ValueError as error:
        raise NamingError(f"model {text!r}: {error}") from error
    if not isinstance(model, nn.Module):
        raise NamingError(f"model {text!r} returned {type(model).__name__}, expected a nn.Module")
    if "auxiliary_norm" in needs:
        add_branch(model)
    if "features" in needs and not isinstance(model, Model):
        return staged(nn.Identity(), model, spec.shape, spec.classes) or model
    return model


def _own(text: str) -> Callable[[Spec], Any]:
    factory = own.load(text, "model")
    if not callable(factory):
        raise NamingError(f"model {text!r} is not callable, it is {factory!r}")
    return factory
