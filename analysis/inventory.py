"""Every run in a results folder: its state, version and size, and which runs conditions select."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from analysis import records, runs, versions
from analysis.facts import column_key
from analysis.question import as_written
from analysis.runs import Extent, Run
from methods.naming import NamingError, nearest, split, unknown

STATES = (*records.STATES, "interrupted", "running", "unreadable", "copy")
VERSIONS = ("newest", "outdated")
UNKNOWN = "?"


@dataclass(frozen=True)
class Item:
    """A run directory."""

    folder: Path
    run: Run | None
    """None where run.json cannot be read"""
    benchmark: str
    """for a user's own file with its name"""
    state: str
    """one of STATES; running: a live process has locked it"""
    reason: str
    """why it failed, was skipped or cannot be read; which process runs it"""
    version: str
    """newest, or outdated if later runs made its row with newer code"""
    searched: bool
    """whether it is a trial of a search"""
    extent: Extent

    @property
    def id(self) -> str:
        """The name of its directory."""
        return self.folder.name

    def field(self, name: str) -> str:
        """A field of the run as text."""
        return UNKNOWN if self.run is None else str(getattr(self.run, name))


def items(root: Path) -> list[Item]:
    """Every run in a results folder, sorted by the names of their directories."""
    found, unread = records.scan(root)
    old = versions.outdated(found, unread)

    def item(
        folder: Path, run: Run | None, recorded: Mapping[str, Any], state: str, reason: str
    ) -> Item:
        name = run.benchmark if run else UNKNOWN
        holder = runs.holder_of(folder)
        return Item(
            folder=folder,
            run=run,
            benchmark=column_key(name, recorded.get("path")),
            state="running" if holder else state,
            reason=holder or reason,
            version=VERSIONS[folder in old],
            searched="searched" in recorded,
            extent=runs.extent_of(folder),
        )

    made = []
    for each in found:
        status, reason = each.result["status"], each.result.get("reason", "")
        made.append(item(each.folder, each.run, each.recorded, status, reason))
    for each in unread:
        made.append(item(each.folder, each.run, each.recorded, each.state, each.reason))
    return sorted(made, key=lambda each: each.folder)


KEYS: Mapping[str, Callable[[Item], str]] = {
    "benchmark": lambda item: item.benchmark,
    "id": lambda item: item.id,
    "model": lambda item: item.field("model"),
    "protocol": lambda item: item.field("protocol"),
    "row": lambda item: item.field("row"),
    "searched": lambda item: "yes" if item.searched else "no",
    "seed": lambda item: item.field("seed"),
    "state": lambda item: item.state,
    "version": lambda item: item.version,
}
OLDER = "older"
CLOSED: Mapping[str, Sequence[str]] = {
    "searched": ("yes", "no"),
    "state": STATES,
    "version": VERSIONS,
}
"""Keys with a fixed set of values."""
UNITS = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


class Choice(NamedTuple):
    """Conditions: each key has one of these values, and nothing was written for this long."""

    values: Mapping[str, Sequence[str]]
    seconds: float

    def of(self, found: Iterable[Item]) -> list[Item]:
        """The runs that meet all conditions."""
        before = time.time() - self.seconds
        return [
            each
            for each in found
            if each.extent.changed <= before
            and all(matches(KEYS[key](each), given) for key, given in self.values.items())
        ]

    def why_none(self, found: Sequence[Item]) -> str:
        """The first condition that no run meets; empty if only the combination leaves none."""
        for key, given in self.values.items():
            there = sorted({KEYS[key](each) for each in found})
            if there and not any(matches(each, given) for each in there):
                listed = "; ".join(there[:SHOWN]) + ("; ..." if len(there) > SHOWN else "")
                hint = nearest(given[0], there)
                return f"no run has the {key} {' or '.join(given)}{hint} (there are: {listed})"
        return ""


SHOWN = 10


def choice(texts: Iterable[str]) -> Choice:
    """The conditions in texts such as ``state=failed,older=30d``.

    Raises:
        NamingError: not of the form KEY=VALUE, an unknown key, or a value that the key cannot have.
    """
    values: dict[str, list[str]] = {}
    seconds = 0.0
    for condition in (each for text in texts for each in split(text)):
        key, equals, value = (part.strip() for part in condition.partition("="))
        if key not in (*KEYS, OLDER):
            raise unknown("key", key, (*KEYS, OLDER))
        if not equals or not value:
            raise NamingError(f"where: expected {key}=VALUE, got {condition!r}")
        if key == OLDER:
            seconds = max(seconds, _seconds(value))
            continue
        known = CLOSED.get(key, ())
        if known and not any(matches(each, [value]) for each in known):
            raise unknown(key, value, known)
        values.setdefault(key, []).append(as_written(value))
    return Choice(values, seconds)


def _seconds(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([mhdw])", text)
    if found is None:
        raise NamingError(
            f"where: {OLDER}: expected a number of minutes, hours, days or weeks such as 30d "
            f"(m, h, d, w), got {text!r}"
        )
    return float(found[1]) * UNITS[found[2]]


def matches(text: str, patterns: Iterable[str]) -> bool:
    """Whether a text matches one of these patterns with the wildcards ``*`` and ``?``."""
    made = (re.escape(each).replace(r"\*", ".*").replace(r"\?", ".") for each in patterns)
    return any(re.fullmatch(each, text, re.DOTALL) for each in made)


def settings(found: Sequence[Item]) -> dict[str, str]:
    """By id, how a run differs from others of its benchmark, network and row, seed and version
    aside: ``protocol paper, epochs 3``; empty for trials of a search."""
    plain = [each for each in found if not each.searched]
    told = {each.id: _setting(each.run) for each in plain if each.run is not None}
    values: dict[tuple[str, ...], dict[str, set[str]]] = {}
    for each in plain:
        for name, value in told.get(each.id, {}).items():
            values.setdefault(_name(each), {}).setdefault(name, set()).add(value)
    return {
        each.id: ", ".join(
            f"{name} {value}"
            for name, value in told.get(each.id, {}).items()
            if len(values[_name(each)][name]) > 1
        )
        for each in found
    }


def _name(item: Item) -> tuple[str, ...]:
    return (item.benchmark, item.field("model"), item.field("row"))


SETTING = ("protocol", "meta_fraction", "crossfit", "threads", "oracle_test")


def _setting(run: Run) -> dict[str, str]:
    training: Any = run.training
    return {
        **{name: str(getattr(run, name)) for name in SETTING},
        "data": run.data[:8],
        **{name: str(getattr(training, name)) for name in records.TRAINING},
    }
