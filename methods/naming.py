"""The small language that names methods, models and benchmarks on the command line and in files.

A call, ``saflex(upstream=randaugment(n=2, m=9), preset=stable)``; a chain of upstreams,
``crop(pad=4)+flip+mixup``; or a bare name without parentheses. The syntax is Python's own, parsed
with ``ast``; nothing is evaluated.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import itertools
import keyword
import math
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

Scalar = bool | int | float | str | None
OWN = "py:"
"""Prefix of a name that refers to the user's own code."""
OWN_NAME = re.compile(r"py:([A-Za-z_][\w.]*):([A-Za-z_]\w*)", re.ASCII)
"""``py:module:name``; the groups are the module and the name."""
TIMM = "timm:"
"""Prefix of a network of the package timm: ``timm:NAME`` or ``timm:NAME.TAG``."""
MOST_NAMES = 10_000
"""More names in one text or list are surely a mistake, and would fill the memory."""


class NamingError(ValueError):
    """An invalid name or argument; the message says what is allowed."""


@dataclass(frozen=True)
class Call:
    """A name with keyword arguments; a bare name has none."""

    name: str
    arguments: tuple[tuple[str, Value], ...] = ()


@dataclass(frozen=True)
class Links:
    """Calls joined by ``+``, which run one after the other."""

    calls: tuple[Call, ...]


Value = Scalar | Call | Links | tuple[Any, ...]


def split(text: str, separator: str = ",") -> list[str]:
    """Split ``text`` at separators outside brackets and quotes."""
    parts, depth, quote, start = [], 0, "", 0
    for position, character in enumerate(text):
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"" and not text[:position][-1:].isalnum():  # otherwise an apostrophe
            quote = character
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        elif character == separator and depth == 0:
            parts.append(text[start:position].strip())
            start = position + 1
    parts.append(text[start:].strip())
    return [part for part in parts if part]


QUOTED = "a path is written in quotes, as is other text with spaces or signs"


def parse(text: str) -> Call | Links:
    """Parse ``text`` into an expression.

    Raises:
        NamingError: anything except names, calls with keywords, ``+`` and literals.
    """
    try:
        value = _value(ast.parse(_disguised(text.strip()), mode="eval").body, text)
    except NamingError:
        raise
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else ""
        if not re.search(r"'[][(){}]'", reason):  # Python names a bracket that has no partner
            reason = (
                "expected a name such as mixup, a call such as mixup(alpha=0.2), a chain such as "
                "crop+flip+mixup, or code of your own such as py:mine:Mine for Mine in mine.py; "
                f"{QUOTED}"
            )
        raise NamingError(f"cannot read {text!r}: {reason}") from error
    if not isinstance(value, Call | Links):
        raise NamingError(f"cannot read {text!r}: expected a name or a call, got {render(value)}")
    return value


_COLONS = re.compile(
    r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\""
    rf"|\b({OWN_NAME.pattern}|{TIMM}[A-Za-z]\w*(?:\.\w+)?)",
    re.ASCII,
)
# Two letters valid in Python identifiers that look like ":" and ".", which are not.
_DISGUISE = str.maketrans(":.", "\u02d0\u00b7")
_UNDISGUISE = str.maketrans("\u02d0\u00b7", ":.")


def _disguised(text: str) -> str:
    """Turn each ``py:module:name`` and ``timm:name`` outside quotes into one identifier."""
    return _COLONS.sub(
        lambda found: found[0] if found[1] is None else found[0].translate(_DISGUISE), text
    )


def _name(node: ast.Name) -> str:
    disguised = node.id.startswith((OWN.translate(_DISGUISE), TIMM.translate(_DISGUISE)))
    return node.id.translate(_UNDISGUISE) if disguised else node.id


def _value(node: ast.expr, text: str) -> Value:
    if isinstance(node, ast.Constant) and isinstance(node.value, Scalar):
        return node.value
    if isinstance(node, ast.Name):
        return Call(_name(node))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _value(node.operand, text)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.Tuple | ast.List):
        return tuple(_value(element, text) for element in node.elts)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        name = _name(node.func)
        if node.args:
            raise NamingError(
                f"in {text!r}: {name} takes keyword arguments only, such as {name}(name=value)"
            )
        names = [keyword.arg for keyword in node.keywords]
        if None in names or len(set(names)) < len(names):
            raise NamingError(f"in {text!r}: {name} has an argument twice, or one with **")
        return Call(
            name,
            tuple((str(word.arg), _value(word.value, text)) for word in node.keywords),
        )
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        calls: list[Call] = []
        for side in (_value(node.left, text), _value(node.right, text)):
            if isinstance(side, Links):
                calls.extend(side.calls)
            elif isinstance(side, Call):
                calls.append(side)
            else:
                raise NamingError(f"in {text!r}: + joins names and calls, got {side!r}")
        return Links(tuple(calls))
    path = f"; {QUOTED}" if isinstance(node, ast.Attribute | ast.BinOp) else ""
    raise NamingError(
        f"in {text!r}: {ast.unparse(node)!r} is not a name, a call or a literal{path}"
    )


def expand(text: str) -> list[str]:
    """Expand alternatives in braces: ``{breast|pneumonia}mnist`` is two names; braces may nest.

    Raises:
        NamingError: unbalanced braces, or more than ``MOST_NAMES`` names.
    """
    found = list(itertools.islice(_expanded(text), MOST_NAMES + 1))
    if len(found) > MOST_NAMES:
        raise NamingError(f"{text!r}: expected at most {MOST_NAMES:,} names, got more")
    return found


def _expanded(text: str) -> Iterator[str]:
    start = text.find("{")
    if start < 0:
        if "}" in text:
            raise NamingError(f"{text!r}: expected a {{ before the }}")
        yield text
        return
    depth, cuts = 0, [start]
    for place in range(start, len(text)):
        depth += (text[place] == "{") - (text[place] == "}")
        if text[place] == "|" and depth == 1:
            cuts.append(place)
        if depth == 0:
            cuts.append(place)
            break
    else:
        raise NamingError(f"{text!r}: expected a }} after the {{")
    head, rest = text[:start], text[cuts[-1] + 1 :]
    for one, other in itertools.pairwise(cuts):
        for middle in _expanded(text[one + 1 : other].strip()):
            for tail in _expanded(rest):
                yield head + middle + tail


def written_out(value: Any) -> tuple[str, ...]:
    """The unique names in a string or a list of strings, with braces expanded.

    Raises:
        NamingError: another type, or more than ``MOST_NAMES`` names.
    """
    found: dict[str, None] = {}
    for text in texts_in(value):
        found |= {name: None for part in split(text) for name in expand(part)}
        if len(found) > MOST_NAMES:
            raise NamingError(f"expected at most {MOST_NAMES:,} names, got more")
    return tuple(found)


def texts_in(value: Any) -> Iterator[str]:
    """A string, or the strings of a list; nested lists (YAML anchors) are flattened.

    Raises:
        NamingError: another type.
    """
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from texts_in(each)
    else:
        raise NamingError(f"expected a string such as mixup(alpha=0.2), got {value!r}")


def from_yaml(value: Any) -> Value:
    """Convert an argument from YAML."""
    if isinstance(value, list):
        return tuple(from_yaml(each) for each in value)
    value = number_of(value)
    if isinstance(value, str):
        try:
            return parse(value)
        except NamingError:
            return value
    return value


def number_of(value: Any) -> Any:
    """Convert a string such as ``1e-3``, which YAML 1.1 does not read as a number, to a float."""
    number = isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value)
    return float(value) if number else value


def nearest(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def unknown(what: str, name: str, known: Iterable[str]) -> NamingError:
    """The error for a name that is not among the known ones."""
    known = sorted(known)
    hint = nearest(name, known)
    return NamingError(f"unknown {what} {name!r}{hint or ''} (known: {', '.join(known)})")


@cache
def parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The arguments that a call can set: the keyword-only ones, with annotations resolved.

    Without an annotation, the type is that of the default if it is a string, a float or a boolean.
    """
    made = function.func if isinstance(function, partial) else function
    target = made.__init__ if inspect.isclass(made) else made
    try:
        hints = get_type_hints(target)
    except NameError as error:
        raise NamingError(
            f"the annotations of {target.__module__}:{target.__qualname__} cannot be resolved: "
            f"{error}; import it outside TYPE_CHECKING"
        ) from error
    return {
        each.name: each.replace(annotation=hints.get(each.name, _kind_of(each.default)))
        for each in inspect.signature(function).parameters.values()
        if each.kind is inspect.Parameter.KEYWORD_ONLY
    }


def _kind_of(default: Any) -> Any:
    return type(default) if isinstance(default, bool | float | str) else Any


def bind(
    call: Call,
    function: Callable[..., Any],
    what: str = "method",
    presets: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Check the arguments of ``call`` against the signature of ``function`` and return them.

    Values equal to their default are left out, so that the result is canonical; a method or chain
    as an argument stays an expression. With ``presets``, ``preset=NAME`` sets the arguments of that
    preset; arguments in ``call`` take precedence.

    Raises:
        NamingError: an unknown argument or preset, or a value that does not fit its annotation.
    """
    known = parameters(function)
    given = dict(call.arguments)
    if what == "method":
        _refuse_positional(call, function, known)
    bound: dict[str, Any] = {}
    takes = list(known)
    if presets:
        takes.append("preset")
        settings = _settings(function, presets)
        if "preset" in given:
            bound = settings[_preset_name(call.name, given.pop("preset"), presets)]
    bound = bound | _converted(given, known, takes, f"{what} {call.name!r}", call.name)
    missing = [
        name
        for name, each in known.items()
        if each.default is inspect.Parameter.empty and name not in bound
    ]
    if missing:
        raise NamingError(f"{what} {call.name!r} needs {', '.join(missing)}")
    return {
        name: bound[name] for name in sorted(bound) if not _same(bound[name], known[name].default)
    }


def _refuse_positional(call: Call, function: Callable[..., Any], known: Iterable[str]) -> None:
    there = inspect.signature(function).parameters.keys() - set(known)
    wrong = [name for name, _ in call.arguments if name in there]
    if wrong:
        raise NamingError(
            f"method {call.name!r}: {wrong[0]} must be keyword-only: write a * before it in the "
            f"signature, (*, {wrong[0]}=...)"
        )


def contract(
    call: Call, function: Callable[..., Any], presets: Mapping[str, Mapping[str, Any]]
) -> Call:
    """The canonical form of a call bound by ``bind``, with its preset.

    The preset is the one that leaves the fewest arguments, and on ties the one declared first. The
    first preset means the bare name and is left out.
    """
    if not presets:
        return call
    defaults = {name: each.default for name, each in parameters(function).items()}
    meant = defaults | dict(call.arguments)
    left = {
        preset: {
            name: meant[name]
            for name, value in (defaults | settings).items()
            if not _same(meant[name], value)
        }
        for preset, settings in _settings(function, presets).items()
    }
    chosen = min(left, key=lambda preset: len(left[preset]))
    named = {} if chosen == next(iter(presets)) else {"preset": chosen}
    return call_of(call.name, left[chosen] | named)


def _settings(
    function: Callable[..., Any], presets: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """What each preset sets, checked like the arguments of a call."""
    known = parameters(function)
    found = {}
    for preset, content in presets.items():
        where = f"preset {preset!r} of {function.__qualname__}"
        if content and not found:
            raise NamingError(
                f"{where}: expected no arguments, because the first preset means the bare name, "
                f"got {', '.join(content)}"
            )
        found[preset] = _converted(content, known, list(known), where, where)
    return found


def _preset_name(method: str, value: Value, presets: Mapping[str, Any]) -> str:
    fits, name = _fit(value, str)
    if not fits:
        expected = " or ".join(presets)
        raise NamingError(f"{method}: preset: expected {expected}, got {render(value)}")
    if name not in presets:
        raise unknown("preset", name, presets)
    return name


def _converted(
    arguments: Mapping[str, Any],
    known: Mapping[str, inspect.Parameter],
    takes: list[str],
    owner: str,
    where: str,
) -> dict[str, Any]:
    for name in arguments:
        if name not in known:
            listed = f"it takes {', '.join(takes)}" if takes else "it takes no arguments"
            raise NamingError(f"{owner} has no argument {name!r}{nearest(name, takes)} ({listed})")
    return {
        name: convert(value, known[name].annotation, f"{where}: {name}")
        for name, value in arguments.items()
    }


def _same(one: Any, other: Any) -> bool:
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def convert(value: Value, annotation: Any, where: str) -> Any:
    """Convert ``value`` to the type of ``annotation``, which also decides what a bare name means.

    Raises:
        NamingError: gives the field, what is allowed and what was got.
    """
    options = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else ()
    none_first = sorted(options or (annotation,), key=lambda option: option is not type(None))
    for option in none_first:
        fits, converted = _fit(value, option)
        if fits:
            return converted
    raise NamingError(f"{where}: expected {describe(annotation)}, got {render(value)}")


def _fit(value: Value, option: Any) -> tuple[bool, Any]:
    bare = value.name if isinstance(value, Call) and not value.arguments else None
    if option is Any:
        return True, value
    if get_origin(option) in (Union, types.UnionType):
        each = [_fit(value, inner) for inner in get_args(option)]
        return next((found for found in each if found[0]), (False, None))
    if option is type(None):
        return value is None or bare == "none", None
    if get_origin(option) is Literal:
        plain = bare if bare is not None else value
        return any(type(plain) is type(each) and plain == each for each in get_args(option)), plain
    if get_origin(option) is tuple:
        inner = get_args(option)
        if not isinstance(value, tuple) or (inner[-1] is not ... and len(inner) != len(value)):
            return False, None
        kinds = inner[:1] * len(value) if inner[-1] is ... else inner
        fitted = [_fit(each, kind) for each, kind in zip(value, kinds, strict=True)]
        return all(fits for fits, _ in fitted), tuple(each for _, each in fitted)
    if option is bool:
        if bare in ("true", "false"):
            return True, bare == "true"
        return isinstance(value, bool), value
    if option is int:
        return isinstance(value, int) and not isinstance(value, bool), value
    if option is float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False, None
        try:
            return math.isfinite(value), float(value)
        except OverflowError:  # a whole number above the largest float
            return False, None
    if option is str:
        return bare is not None or isinstance(value, str), bare if bare is not None else value
    return isinstance(value, Call | Links), value


def describe(annotation: Any) -> str:
    """An annotation in words, for errors and help."""
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(describe(option) for option in get_args(annotation))
    if get_origin(annotation) is Literal:
        return " or ".join(str(option) for option in get_args(annotation))
    if get_origin(annotation) is tuple:
        return f"a list of {describe(get_args(annotation)[0])}"
    if annotation is type(None):
        return "none"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}
    return names.get(annotation, "a method such as mixup(alpha=0.2)")


def render(value: Value) -> str:
    """The canonical text of an expression or a value."""
    if isinstance(value, Call):
        if not value.arguments:
            return value.name
        inner = ", ".join(f"{name}={render(each)}" for name, each in value.arguments)
        return f"{value.name}({inner})"
    if isinstance(value, Links):
        return "+".join(render(call) for call in value.calls)
    if isinstance(value, tuple):
        return "[" + ", ".join(render(each) for each in value) + "]"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        bare = value.isidentifier() and value.isascii() and not keyword.iskeyword(value)
        bare = bare or OWN_NAME.fullmatch(value) is not None
        return value if bare and value not in ("none", "true", "false") else repr(value)
    return "none" if value is None else repr(value)


PLAIN_PATH = re.compile(r"[\w./~ -]*[\w./-]")
"""Paths that need no quotes after ``folder:``."""


def with_path(name: str, path: str) -> str:
    """The name of a user's own data with its path: ``folder(size=64)`` as ``folder:DIR(size=64)``.

    The path is quoted if a list or braces could otherwise split it.
    """
    kind, bracket, arguments = name.partition("(")
    shown = path if PLAIN_PATH.fullmatch(path) else repr(path)
    return f"{kind}:{shown}{bracket}{arguments}"


def with_argument(name: str, argument: str, value: Any) -> str:
    """A name or call with this value for an argument."""
    call = parse(name)
    assert isinstance(call, Call), name
    return render(call_of(call.name, {**dict(call.arguments), argument: value}))


def call_of(name: str, arguments: Mapping[str, Any]) -> Call:
    """A call with these arguments in alphabetical order."""
    return Call(name, tuple(sorted(arguments.items())))
