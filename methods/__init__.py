"""Methods by name: ``build("crop+mixup(alpha=0.2)")``; importing this package loads nothing heavy.

A third party adds a method through the entry-point group ``augbench.methods``: a name, and
"module:callable" that returns a ``methods.base.Method``. Your own code needs no package: name it
``py:module:callable``.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cache, partial
from inspect import signature
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

from methods import own
from methods.naming import (
    OWN,
    Call,
    Links,
    NamingError,
    bind,
    call_of,
    contract,
    nearest,
    parameters,
    parse,
    render,
)

if TYPE_CHECKING:
    from methods.base import Method

GROUP = "augbench.methods"
SOURCE = "Source: "
UPSTREAM = "upstream"
"""A class with this argument is a method; one without it is an upstream."""
OURS = "methods."


class Entry(NamedTuple):
    """Where to find a method."""

    target: str
    """ "module:callable" """
    kind: str = ""
    """plug-in; empty for a built-in method, which is listed as the kind that it declares"""


BUILTIN = {
    "none": Entry("methods.classic:NoAugmentation"),
    "flip": Entry("methods.classic:Flip"),
    "rotate90": Entry("methods.classic:Rotate90"),
    "crop": Entry("methods.classic:Crop"),
    "mixup": Entry("methods.classic:Mixup"),
    "cutmix": Entry("methods.classic:CutMix"),
    "soft_augmentation": Entry("methods.classic:SoftAugmentation"),
    "random_erasing": Entry("methods.classic:RandomErasing"),
    "gaussian_noise": Entry("methods.classic:GaussianNoise"),
    "cell_swap": Entry("methods.columns:CellSwap"),
    "tabular_cutmix": Entry("methods.columns:TabularCutMix"),
    "warp": Entry("methods.autodo:Warp"),
    "randaugment": Entry("methods.randaugment:RandAugment"),
    "trivialaugment": Entry("methods.randaugment:TrivialAugment"),
    "autoaugment": Entry("methods.autoaugment:AutoAugment"),
    "label_smoothing": Entry("methods.labels:LabelSmoothing"),
    "balanced": Entry("methods.labels:Balanced"),
    "logit_adjustment": Entry("methods.labels:LogitAdjustment"),
    "gce": Entry("methods.labels:GeneralisedCrossEntropy"),
    "saflex": Entry("methods.saflex:Saflex"),
    "l2rw": Entry("methods.saflex:l2rw"),
    "meta_weight_net": Entry("methods.weighting:MetaWeightNet"),
    "lilaw": Entry("methods.weighting:Lilaw"),
    "probe": Entry("methods.probe:Probe"),
    "autodo": Entry("methods.autodo:AutoDO"),
    "lpa3": Entry("methods.lpa3:Lpa3"),
    "fixmatch": Entry("methods.semi_supervised:FixMatch"),
    "pseudo_label": Entry("methods.semi_supervised:PseudoLabel"),
    "mixmatch": Entry("methods.semi_supervised:MixMatch"),
    "mean_teacher": Entry("methods.semi_supervised:MeanTeacher"),
    "generated": Entry("methods.generated:Generated"),
    "entaugment": Entry("methods.strength:EntAugment"),
    "sra": Entry("methods.strength:Sra"),
    "isda": Entry("methods.feature_noise:Isda"),
    "bsda": Entry("methods.feature_noise:Bsda"),
    "adaaug": Entry("methods.policy_net:AdaAug"),
    "madaug": Entry("methods.policy_net:MADAug"),
    "frozen": Entry("methods.controls:Frozen"),
    "random_label": Entry("methods.controls:RandomLabel"),
    "self_distil": Entry("methods.controls:SelfDistil"),
    "shuffled_weights": Entry("methods.controls:ShuffledWeights"),
    "norm_noise": Entry("methods.controls:NormNoise"),
    "shuffled_strengths": Entry("methods.strength:ShuffledStrengths"),
    "mean_strength": Entry("methods.strength:MeanStrength"),
    "isotropic_noise": Entry("methods.feature_noise:IsotropicNoise"),
    "shuffled_policies": Entry("methods.policy_net:ShuffledPolicies"),
    "boosting": Entry("methods.orientation:Boosting"),
    "logistic": Entry("methods.orientation:Logistic"),
    "head_refit": Entry("methods.controls:HeadRefit"),
    "augmix": Entry("methods.augmix:AugMix"),
    "no_consistency": Entry("methods.augmix:NoConsistency"),
    "one_chain": Entry("methods.augmix:OneChain"),
    "medaugment": Entry("methods.medaugment:MedAugment"),
    "unconstrained": Entry("methods.medaugment:Unconstrained"),
    "medmnistc_augment": Entry("methods.medmnistc:MedMNISTCAugment"),
    "shuffled_policy": Entry("methods.autoaugment:ShuffledPolicy"),
    "wrap": Entry("methods.wrap:Wrap"),
}


class Unavailable(NamingError):
    """A method that is registered but cannot be imported."""


@cache
def registry() -> dict[str, Entry]:
    """All methods by name; a plug-in cannot take a built-in name."""
    found = {
        point.name: Entry(point.value, "plug-in")
        for point in importlib.metadata.entry_points(group=GROUP)
    }
    return {**BUILTIN, **{name: found[name] for name in sorted(found) if name not in BUILTIN}}


def known(name: str) -> bool:
    """Whether a name is registered, or refers to the user's own code."""
    return name.startswith(OWN) or name in registry()


def _target(name: str) -> str:
    return name.removeprefix(OWN) if name.startswith(OWN) else registry()[name].target


def load(name: str) -> Callable[..., Method]:
    """The callable behind a name.

    Raises:
        NamingError: the name is not registered, or the user's own code cannot be used.
        Unavailable: a plug-in's module cannot be imported; the message gives the reason.
    """
    if name.startswith(OWN):
        return _load_own(name)
    if name not in registry():
        raise NamingError(
            f"unknown method {name!r}{nearest(name, registry())} (augbench list shows all; code of "
            "your own is py:MODULE:NAME, such as py:mine:Mine for Mine in mine.py)"
        )
    module, _, attribute = _target(name).partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
        if not callable(found):
            raise TypeError(f"{attribute} is not callable")
        return cast("Callable[..., Method]", found)
    except (Exception, SystemExit) as error:  # a plug-in may fail in any way
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise Unavailable(f"method {name!r} is unavailable: {_target(name)}: {reason}") from error


def _load_own(name: str) -> Callable[..., Method]:
    found = own.load(name, "method")
    from methods.base import Part  # noqa: PLC0415 - imports torch

    made = found.func if isinstance(found, partial) else found
    if isinstance(made, type) and issubclass(made, Part):
        return cast("Callable[..., Method]", found)
    if isinstance(made, FunctionType):
        for each in signature(found).parameters.values():
            if each.kind is each.POSITIONAL_OR_KEYWORD and each.default is each.empty:
                raise NamingError(
                    f"method {name!r} has the positional argument {each.name}, expected a function "
                    f"that returns a method and takes keyword arguments only{_wrapped(name)}"
                )
        return cast("Callable[..., Method]", found)
    what = (
        "a class but not a Method" if isinstance(made, type) else f"of type {type(made).__name__}"
    )
    raise NamingError(
        f"method {name!r} is {what}, expected a subclass of augbench.Method or a function that "
        f"returns one{_wrapped(name) if callable(made) else ''}"
    )


def _wrapped(name: str) -> str:
    return f"; if it transforms images, write wrap(call={name})"


def takes_upstream(name: str) -> bool:
    """Whether a method takes an upstream, that is, has an argument of that name.

    Raises:
        NamingError: the name is not registered, or its module cannot be imported.
    """
    return UPSTREAM in parameters(load(name))


def canonical(text: str) -> str:
    """The canonical name of a method: arguments sorted, defaults left out.

    Arguments that match a preset are replaced by that preset.

    Raises:
        NamingError: an unknown name, argument or preset, or a value that is not allowed.
    """
    return render(_canonical(parse(text)))


def _canonical(expression: Call | Links) -> Call | Links:
    if isinstance(expression, Links):
        calls = [_canonical(call) for call in expression.calls]
        kept = [call for call in calls if isinstance(call, Call) and call != Call("none")]
        return Links(tuple(kept)) if len(kept) > 1 else (kept or [Call("none")])[0]
    function = load(expression.name)
    presets = _presets(function)
    bound = bind(expression, function, presets=presets)
    inner = call_of(expression.name, {k: _canonical_value(v) for k, v in bound.items()})
    # Bind again, because upstream=none+none has only now become a default.
    return contract(call_of(inner.name, bind(inner, function)), function, presets)


def _canonical_value(value: Any) -> Any:
    return _canonical(value) if isinstance(value, Call | Links) else value


def _presets(function: Callable[..., Method]) -> Mapping[str, Mapping[str, Any]]:
    from methods.base import Part  # noqa: PLC0415 - imports torch

    if isinstance(function, type) and issubclass(function, Part):
        return function.presets
    return {}


def build(text: str) -> Method:
    """Build a new method, or learner, from its name.

    Raises:
        NamingError: an unknown name, argument or preset, or a value that is not allowed.
    """
    return _build(_canonical(parse(text)))


def _refuse_learners(given: Iterable[Any], text: str) -> None:
    from methods.learner import Learner  # noqa: PLC0415 - imports torch

    for each in given:
        if isinstance(each, Learner):
            raise NamingError(
                f"{text!r}: {each.called} takes the steps of a run itself, so it cannot be part of "
                "a method"
            )


def _build(expression: Call | Links) -> Method:
    from methods.base import Chain, Part  # noqa: PLC0415 - imports torch

    if isinstance(expression, Links):
        links = [_build(call) for call in expression.calls]
        _refuse_learners(links, render(expression))
        try:
            return Chain(links)
        except ValueError as error:
            raise NamingError(f"{render(expression)!r}: {error}") from error
    function = load(expression.name)
    arguments = {
        name: _build(value) if isinstance(value, Call | Links) else value
        for name, value in bind(expression, function, presets=_presets(function)).items()
    }
    _refuse_learners(arguments.values(), render(expression))
    try:
        method = function(**arguments)
    except NamingError:
        raise
    except (Exception, SystemExit) as error:  # third-party code may fail in any way
        whose = f"method {render(expression)!r}"
        if expression.name.startswith(OWN):
            raise NamingError(f"{whose} cannot be built: {own.said(error)}") from error
        if isinstance(error, TypeError | ValueError):
            raise NamingError(f"{whose}: {error}") from error
        raise Unavailable(f"{whose} cannot be built: {type(error).__name__}: {error}") from error
    whose = f"method {expression.name!r} ({_target(expression.name)})"
    if not isinstance(method, Part):
        hint = _wrapped(expression.name) if expression.name.startswith(OWN) else ""
        raise NamingError(
            f"{whose} returned {type(method).__name__}, expected a methods.base.Method{hint}"
        )
    method.called = expression.name
    if isinstance(method.controls, str):
        raise NamingError(
            f"{whose} has controls = {method.controls!r}, expected a tuple of control rows such as "
            "('frozen(upstream={self})',); a method that is a control itself sets control = True"
        )
    return cast("Method", method)


@cache
@cache
def controls_of(text: str) -> tuple[str, ...]:
    """The canonical names of a method's control rows, as the method declares them.

    Raises:
        NamingError: one of the names is not valid, or the method cannot be built.
    """
    expression = _canonical(parse(text))
    if isinstance(expression, Links):
        chains = []
        for place, call in enumerate(expression.calls):
            before, after = expression.calls[:place], expression.calls[place + 1 :]
            chains += [(*before, parse(each), *after) for each in controls_of(render(call))]
        return tuple(canonical("+".join(map(render, chain))) for chain in chains)
    upstream = dict(expression.arguments).get(UPSTREAM, Call("none"))
    names = {"self": render(expression), "upstream": render(upstream)}
    return tuple(canonical(each.format_map(names)) for each in _build(expression).controls)


@cache
def cost(text: str) -> float:
    """Time of a training step with a method, in plain steps, as its classes declare it.

    A method that is unavailable or declares no cost counts as a plain step; a learner that trains
    no network takes no steps, and costs 0.
    """
    from methods.learner import Learner  # noqa: PLC0415 - imports torch

    total = 1.0
    with suppress(NamingError):
        for call in _calls(_canonical(parse(text))):
            made = _build(call)
            if isinstance(made, Learner) and not made.trains_network:
                return 0.0
            costs = made.costs
            preset = str(dict(call.arguments).get("preset", ""))
            total += costs.get(preset, next(iter(costs.values()), 1.0)) - 1
    return total


def label(text: str) -> str:
    """A method's name with the short names of its classes; empty if none has a short name.

    Raises:
        NamingError: an unknown name, argument or preset, or a value that is not allowed.
    """
    expression = _canonical(parse(text))
    labelled = render(_labelled(expression))
    return labelled if labelled != render(expression) else ""


def _labelled(expression: Call | Links) -> Call | Links:
    if isinstance(expression, Links):
        return Links(tuple(Call(render(_labelled(call))) for call in expression.calls))
    name = getattr(load(expression.name), "short_name", "") or expression.name
    inner = {
        key: _labelled(value) if isinstance(value, Call | Links) else value
        for key, value in expression.arguments
    }
    return Call(name, tuple(inner.items()))


def versions(text: str) -> dict[str, int]:
    """Version of every class in the chain and hash of every preset, by name.

    They are part of a run's id, so that changing a preset changes the id. For third-party classes
    the hash covers the code too, as nobody raises a version at every edit.

    Raises:
        NamingError: an unknown name, argument or preset, or a value that is not allowed.
    """
    expression = _canonical(parse(text))
    found = {_qualified(type(part)): _version(part) for part in _build(expression).parts()}
    found |= {name: _own_version(name) for name in _own_names(expression)}
    for call in _calls(expression):
        function = load(call.name)
        if isinstance(function, FunctionType) and not function.__module__.startswith(OURS):
            found[_qualified(function)] = _content(function, "")
        presets, preset = _presets(function), dict(call.arguments).get("preset")
        if presets and preset is not None:
            content = json.dumps(dict(presets[str(preset)]), sort_keys=True)
            digest = hashlib.sha256(content.encode()).hexdigest()
            found[f"{_qualified(function)}.{preset}"] = int(digest[:12], 16)
    return found


def own_names(text: str) -> list[str]:
    """Names of the user's own code, ``wrap(call=py:mine:pipe)``, and YAML files in a method."""
    return _own_names(parse(text))


def own_parts(text: str) -> list[str]:
    """The calls in a method that are the user's own code or take a file; inner calls first."""
    calls = _calls(_canonical(parse(text)))
    found = [render(call) for call in calls if _own_names(Call(call.name, tuple(_texts(call))))]
    return list(dict.fromkeys(reversed(found)))


def _texts(call: Call) -> Iterator[tuple[str, str]]:
    return ((name, value) for name, value in call.arguments if isinstance(value, str))


def _own_names(expression: Call | Links) -> list[str]:
    texts = [
        text
        for call in _calls(expression)
        for text in (call.name, *(value for _, value in _texts(call)))
    ]
    unique = dict.fromkeys(texts)
    return [text for text in unique if text.startswith(OWN) or own.file(text) is not None]


def _own_version(name: str) -> int:
    content = own.file(name)
    return own.version(name.split(":")[1]) if content is None else own.file_version(content)


def _version(part: Method) -> int:
    kind = type(part)
    ours = kind.__module__.startswith(OURS)
    return part.version if ours else _content(kind, f"{part.version}")


def _content(made: Callable[..., Method], version: str) -> int:
    """A hash of the version and the code of a third-party class or function."""
    text = f"{version}\n{own.version(made.__module__)}"
    return int(hashlib.sha256(text.encode()).hexdigest()[:12], 16)


def _calls(expression: Call | Links) -> Iterator[Call]:
    calls = expression.calls if isinstance(expression, Links) else (expression,)
    for call in calls:
        yield call
        for _, value in call.arguments:
            if isinstance(value, Call | Links):
                yield from _calls(value)


def _qualified(kind: Callable[..., Method]) -> str:
    ours = kind.__module__.startswith(OURS)
    return kind.__qualname__ if ours else f"{kind.__module__}.{kind.__qualname__}"


class Declared(NamedTuple):
    """What decides whether a method is an upstream, a method or a control."""

    takes_upstream: bool
    control: bool = False

    @property
    def kind(self) -> Literal["upstream", "method", "control"]:
        """A control says so; a method takes an upstream."""
        if self.control:
            return "control"
        return "method" if self.takes_upstream else "upstream"


def declared(name: str) -> Declared | None:
    """What a method declares, read from its file without importing anything.

    None if the name is not registered or the class is defined in another file.
    """
    if not known(name):
        return None
    module, _, attribute = _target(name).partition(":")
    with own.kept():  # searches the current folder
        path = own.file_of(module)
    return _declared(path, attribute) if path is not None else None


@cache
def _declared(path: Path, attribute: str) -> Declared | None:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return None
    node = _defined(attribute, tree)
    if node is None:
        return None
    takes = any(each.partition("=")[0] == UPSTREAM for each in _takes(node, tree))
    values = (_value_in(each, "control") for each in _lineage(node, tree))
    value = next(filter(None, values), None)
    return Declared(takes, isinstance(value, ast.Constant) and value.value is True)


class Summary(NamedTuple):
    """What ``augbench list`` shows of a method, read without importing it."""

    first_line: str
    source: str
    reason: str
    """Empty, or why the method is unavailable."""
    takes: tuple[str, ...] = ()
    """Its arguments with their defaults, ``beta=0.0``, if they are defined in the same file."""
    presets: tuple[str, ...] = ()
    costs: tuple[float, ...] = ()
    """Time of a training step in plain steps, by preset."""


def summary(name: str) -> Summary:
    """Summary of a method (docstring, source, arguments, costs), read from its file."""
    target = registry()[name].target
    module, _, attribute = target.partition(":")
    if not name.isidentifier():
        return Summary("", "", f"{target}: {name!r} is not an identifier, so no call can name it")
    try:
        found = importlib.util.find_spec(module)
    except (Exception, SystemExit) as error:  # find_spec imports a plug-in's parent package
        return Summary("", "", f"{target}: {type(error).__name__}: {error}")
    if found is None or found.origin is None:
        return Summary("", "", f"{target}: module {module!r} not found")
    try:
        tree = ast.parse(Path(found.origin).read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError) as error:
        return Summary("", "", f"{target}: {type(error).__name__}: {error}")
    node = _defined(attribute, tree)
    if node is None:
        return Summary(f"defined elsewhere, loaded through {target}", "", "")
    told = ast.get_docstring(node) or ""
    source = _source_in(node) or _source_told(told)
    takes, presets = _takes(node, tree), _presets_in(node)
    return Summary(told.partition("\n")[0], source, "", takes, presets, _costs_in(node))


def _defined(name: str, tree: ast.Module) -> ast.ClassDef | ast.FunctionDef | None:
    """The class or function of this name in a file; None if the file only imports it."""
    found = (each for each in tree.body if isinstance(each, ast.ClassDef | ast.FunctionDef))
    return next((each for each in found if each.name == name), None)


def _source_in(node: ast.ClassDef | ast.FunctionDef) -> str:
    value = _value_in(node, "source")
    return str(value.value) if isinstance(value, ast.Constant) else ""


def _presets_in(node: ast.ClassDef | ast.FunctionDef) -> tuple[str, ...]:
    value = _value_in(node, "presets")
    keys = value.keys if isinstance(value, ast.Dict) else []
    return tuple(str(key.value) for key in keys if isinstance(key, ast.Constant))


def _costs_in(node: ast.ClassDef | ast.FunctionDef) -> tuple[float, ...]:
    value = _value_in(node, "costs")
    try:
        costs = ast.literal_eval(value) if value is not None else {}
        return tuple(float(cost) for cost in costs.values())
    except (ValueError, TypeError, AttributeError):  # not a literal, or not a mapping
        return ()


def _value_in(node: ast.ClassDef | ast.FunctionDef, name: str) -> ast.expr | None:
    """The value that a class body gives a name, or a function body an attribute of that name."""
    for statement in node.body:
        if isinstance(statement, ast.Assign | ast.AnnAssign):
            goals = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            if any(isinstance(goal, ast.Name) and goal.id == name for goal in goals):
                return statement.value
            if any(isinstance(goal, ast.Attribute) and goal.attr == name for goal in goals):
                return statement.value
    return None


def _takes(node: ast.ClassDef | ast.FunctionDef, tree: ast.Module) -> tuple[str, ...]:
    """Keyword arguments with their defaults; for a class, those of its constructor or a base's."""
    made: ast.FunctionDef | None = node if isinstance(node, ast.FunctionDef) else None
    if isinstance(node, ast.ClassDef):
        inside = (each for kind in _lineage(node, tree) for each in kind.body)
        functions = (each for each in inside if isinstance(each, ast.FunctionDef))
        made = next((each for each in functions if each.name == "__init__"), None)
    if made is None:
        return ()
    pairs = zip(made.args.kwonlyargs, made.args.kw_defaults, strict=True)
    return tuple(f"{each.arg}={_default(value)}" for each, value in pairs)


def _lineage(
    node: ast.ClassDef | ast.FunctionDef, tree: ast.Module
) -> Iterator[ast.ClassDef | ast.FunctionDef]:
    """A class and those of its bases that are defined in the same file; or a function alone."""
    yield node
    for base in node.bases if isinstance(node, ast.ClassDef) else ():
        found = _defined(base.id, tree) if isinstance(base, ast.Name) else None
        if found is not None and found is not node:
            yield from _lineage(found, tree)


def _default(value: ast.expr | None) -> str:
    """A default value as a method's name writes it."""
    if value is None:
        return "..."
    try:
        return render(ast.literal_eval(value))
    except (ValueError, TypeError, NamingError):  # a named constant, or a value no name can hold
        return ast.unparse(value)


def _source_told(docstring: str) -> str:
    """The line of a function's docstring that gives the source."""
    lines = (line.strip() for line in docstring.splitlines())
    return next((line.removeprefix(SOURCE) for line in lines if line.startswith(SOURCE)), "")
