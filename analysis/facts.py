"""What the row of a run is: an upstream, a method or a control of something, and what it needs.

This is resolved once, when the run is made, and stored in run.json under ``recorded["row"]``. For
runs that were written without it, it is what methods of these names declare now.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic.dataclasses import dataclass

import methods
from analysis.runs import CONFIG, Run
from methods.naming import Call, NamingError, call_of, parse, render, with_path

ROW = "row"
"""The key in ``recorded``."""
NONE = "none"
Takes = Callable[[str], bool]
"""Whether the method of this name takes an upstream."""


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Facts:
    """What kind of row it is, and how it relates to others."""

    kind: Literal["upstream", "method", "control"]
    wraps: str
    """the method or upstream that it wraps; empty for an upstream"""
    upstream: str
    """the innermost upstream; ``none`` for an upstream itself"""
    controls: tuple[str, ...] = ()
    """of a method that learns, the names of its control rows, as in ``Method.controls``"""
    needs_meta: bool = False
    dirty: bool = False
    """whether meta rows have the label noise of the training rows"""
    budget_of: str = ""
    """the method whose passes or time it has; empty if steps are equal"""
    label: str = ""
    """of its method, if that declares one"""

    @property
    def bases(self) -> tuple[str, ...]:
        """What it is compared with if no base is named: the first of these that exists.

        For a method its upstream alone, for an upstream ``none``.
        """
        return (self.wraps, self.upstream, NONE) if self.wraps else (NONE,)


def facts_of(
    run: Run,
    takes: Takes,
    control: bool,
    needs_meta: bool,
    controls: tuple[str, ...] = (),
    label: str = "",
) -> Facts:
    """The facts of a run, from what its method declares."""
    wraps, inner = put_around(run.method, takes)
    dirty, budget_of = undirty(run.benchmark)[1], run.budget.partition(" of ")[2]
    control = control or dirty or run.control != "all" or bool(budget_of)
    return Facts(
        kind="control" if control else "method" if wraps else "upstream",
        wraps=wraps,
        upstream=inner if wraps else NONE,
        controls=() if control else controls,
        needs_meta=needs_meta,
        dirty=dirty,
        budget_of=budget_of,
        label=label,
    )


def facts_in(run: Run, recorded: Mapping[str, Any], result: Mapping[str, Any]) -> Facts:
    """The facts stored in a run's files, or else those that follow from its names."""
    try:
        return Facts(**recorded[ROW])
    except (KeyError, TypeError, ValueError):  # written by another version, which names no facts
        call = call_in(run.method)
        declared = methods.declared(call.name) if call is not None else None
        meta = result.get("data", {}).get("rows", {}).get("meta", 0) > 0
        return facts_of(run, takes_upstream, declared is not None and declared.control, meta)


def takes_upstream(name: str) -> bool:
    """Whether a method takes an upstream, as its file declares; false if it is unknown."""
    declared = methods.declared(name)
    return declared is not None and declared.takes_upstream


def put_around(method: str, takes: Takes = takes_upstream) -> tuple[str, str]:
    """What a method wraps, and the innermost upstream: both ``none`` unless given.

    For an upstream itself the first is empty and the second its own name.
    """
    call = call_in(method)
    if call is None:
        return "", method
    inner = dict(call.arguments).get(methods.UPSTREAM)
    if inner is None:
        return (NONE, NONE) if takes(call.name) else ("", method)
    text = render(inner)
    return text, put_around(text, takes)[1]


def outer(method: str) -> str:
    """The name of a method without its arguments; a chain is its own name."""
    return method.partition("(")[0] if "+" not in method.partition("(")[0] else method


def call_in(text: str) -> Call | None:
    """The call in a name; None for a chain, and for text that is not a name."""
    try:
        expression = parse(text)
    except NamingError:  # runs may come from another version, or from anybody
        return None
    return expression if isinstance(expression, Call) else None


def undirty(benchmark: str) -> tuple[str, bool]:
    """A benchmark without ``meta_noise`` if that equals ``noise``, and whether it did."""
    if "meta_noise" not in benchmark:
        return benchmark, False
    call = call_in(benchmark)
    given = dict(call.arguments) if call is not None else {}
    if call is None or given.get("meta_noise") != given.get("noise"):
        return benchmark, False
    return render(call_of(call.name, {k: v for k, v in given.items() if k != "meta_noise"})), True


def column_key(benchmark: str, path: str | None) -> str:
    """The name of a data set, for a user's own with the name of its file."""
    return with_path(benchmark, Path(path).name) if path else benchmark
