"""``augbench runs``: lists and deletes runs; needs neither torch nor ray."""

from __future__ import annotations

import csv
import json
import re
import sys
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from analysis import inventory, question, runs
from analysis.inventory import Item
from analysis.table import plain
from benchmarks.cli.arguments import RunsCommand, UsageError
from benchmarks.running.codes import FAILURE, USAGE
from methods.naming import NamingError

TRIALS = "(trials of a search)"
"""Shown instead of their rows, because each trial has a different row."""
RIGHT = ("runs", "seed", "size")
"""Columns of numbers."""


def carry_out(command: RunsCommand) -> int:
    """Run the command; return the exit code."""
    try:
        return _carry_out(command)
    except BrokenPipeError:
        raise
    except (NamingError, UsageError, OSError) as error:
        if command.debug:
            traceback.print_exc()
        print(f"augbench: {error}", file=sys.stderr)
        return FAILURE if isinstance(error, OSError) else USAGE


def _carry_out(command: RunsCommand) -> int:
    choice = inventory.choice(command.where)
    if command.delete and not command.where:
        raise UsageError(
            "delete: expected --where with the runs to delete (--where 'row=*' for all)"
        )
    if command.yes and not command.delete:
        raise UsageError("yes: expected --delete with it")
    if command.delete and not command.yes and not sys.stdin.isatty():
        raise UsageError("delete: expected a terminal for the confirmation, or --yes")
    root = command.folder.expanduser()
    if not root.is_dir():
        raise UsageError(f"folder: expected a results folder, got {command.folder}")
    found = inventory.items(root)
    chosen = choice.of(found)
    if not chosen and command.format == "text":
        why = choice.why_none(found)
        count = (
            f"None of the {len(found)} runs in {root} matches" if found else f"No runs in {root}"
        )
        print(f"{count}: {why}" if why else f"{count}.")
        return 0
    lines = _each(chosen) if command.each else _together(chosen)
    if command.format == "json":
        print(json.dumps(lines, indent=1))
    elif command.format == "csv":
        writer = csv.DictWriter(sys.stdout, HEAD[command.each], lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _flat(value) for name, value in line.items()} for line in lines)
    else:
        print(_text(lines))
        states = Counter(each.state for each in chosen)
        told = ", ".join(f"{states[state]} {state}" for state in inventory.STATES if states[state])
        print(f"\n{_counted(chosen)}: {told}")
    sys.stdout.flush()
    return _delete(root, chosen, command.yes) if command.delete else 0


HEAD = {
    False: ("runs", "state", "version", "seeds", "size", "changed", "benchmark", "model",
            "setting", "row"),
    True: ("id", "state", "version", "seed", "size", "changed", "benchmark", "model", "setting",
           "row", "reason"),
}  # fmt: skip
"""Columns of the listing by run (True), or by runs that differ only in seed."""


def _each(chosen: Sequence[Item]) -> list[dict[str, Any]]:
    """One line per run; sizes in bytes."""
    settings = inventory.settings(chosen)
    lines = []
    for each in sorted(chosen, key=lambda each: (_place(each, settings), _seed(each), each.id)):
        seed = None if each.run is None else each.run.seed
        size, changed = each.extent.size, _iso(each.extent.changed)
        what = (each.benchmark, each.field("model"), settings[each.id], each.field("row"))
        values = (each.id, each.state, each.version, seed, size, changed, *what, each.reason)
        lines.append(dict(zip(HEAD[True], values, strict=True)))
    return lines


def _together(chosen: Sequence[Item]) -> list[dict[str, Any]]:
    """One line for runs that differ only in seed; sizes in bytes."""
    settings = inventory.settings(chosen)
    groups: dict[tuple[str, ...], list[Item]] = {}
    for each in sorted(chosen, key=lambda each: _place(each, settings)):
        groups.setdefault(_place(each, settings), []).append(each)
    lines = []
    for (benchmark, model, row, setting, version, state), own in groups.items():
        seeds = sorted({each.run.seed for each in own if each.run is not None})
        size = sum(each.extent.size for each in own)
        changed = _iso(max(each.extent.changed for each in own))
        what = (benchmark, model, setting, row)
        values = (len(own), state, version, seeds, size, changed, *what)
        lines.append(dict(zip(HEAD[False], values, strict=True)))
    return lines


def _place(item: Item, settings: dict[str, str]) -> tuple[str, ...]:
    row = TRIALS if item.searched else item.field("row")
    model = item.field("model")
    return item.benchmark, model, row, settings[item.id], item.version, item.state


def _seed(item: Item) -> int:
    return -1 if item.run is None else item.run.seed


def _iso(when: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(when))


def _flat(value: Any) -> Any:
    return _ranges(value) if isinstance(value, list) else value


def _text(lines: Sequence[dict[str, Any]]) -> str:
    """The lines as a table, with the row last because it may be long."""
    shown = [{name: _shown(name, value) for name, value in line.items()} for line in lines]
    head = [name for name in shown[0] if any(line[name] for line in shown)]
    align = ["right" if name in RIGHT else "left" for name in head]
    body = [[line[name] for name in head] for line in shown]
    return tabulate(body, head, tablefmt="simple", colalign=align, disable_numparse=True)


def _shown(name: str, value: Any) -> str:
    if name == "size":
        return size_text(value)
    if name == "seeds":
        return _ranges(value)
    if name == "changed":
        return value[:16].replace("T", " ")
    return inventory.UNKNOWN if value is None else plain(str(value))


def _ranges(seeds: Sequence[int]) -> str:
    """``0-9, 12``."""
    found: list[list[int]] = []
    for seed in seeds:
        if found and seed == found[-1][-1] + 1:
            found[-1] = [found[-1][0], seed]
        else:
            found.append([seed])
    return ", ".join("-".join(map(str, each)) for each in found)


def size_text(size: float) -> str:
    """``12.3 MB``."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} GB" if size < 1000 else f"{size:,.0f} GB"


def _counted(chosen: Sequence[Item]) -> str:
    count = len(chosen)
    return f"{count} run{'s' * (count != 1)}, {size_text(sum(each.extent.size for each in chosen))}"


def _delete(root: Path, chosen: Sequence[Item], yes: bool) -> int:
    """Delete these runs after asking; return the exit code."""
    kept = {each.id: reason for each in chosen if (reason := _kept(each))}
    going = [each for each in chosen if each.id not in kept]
    for name, reason in kept.items():
        print(f"not deleted: {name}: {reason}", file=sys.stderr)
    for line in _referred(root, going):
        print(line, file=sys.stderr)
    if not going:
        print("Nothing to delete.", file=sys.stderr)
        return FAILURE if kept else 0
    if not yes and not _agreed(f"Delete {_counted(going)}? [y/N] "):
        print("Nothing deleted.", file=sys.stderr)
        return 0
    deleted: list[Item] = []
    try:
        for each in going:
            try:
                runs.delete(each.folder, each.extent)
                deleted.append(each)
            except (OSError, runs.Held) as error:
                kept[each.id] = str(error)
                print(f"not deleted: {each.id}: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"stopped; deleted {_counted(deleted)} of {_counted(going)}"
        ) from None
    print(f"Deleted {_counted(deleted)}.", file=sys.stderr)
    return FAILURE if kept else 0


def _agreed(text: str) -> bool:
    print(text, end="", file=sys.stderr, flush=True)
    try:
        return input().strip().lower() in ("y", "yes")
    except EOFError:
        return False
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; nothing deleted") from None


def _kept(item: Item) -> str:
    """Why a run is not deleted; empty if it may be."""
    if item.state == "running":
        return f"in use by {item.reason}"
    if item.folder.is_symlink():
        return "a symbolic link"
    if item.run is None and not re.fullmatch("[0-9a-f]{16}", item.id):
        return "it may not be a run"
    return ""


def _referred(root: Path, going: Sequence[Item]) -> list[str]:
    """Name the studies that these runs belong to."""
    told = []
    for name in question.names(root):
        own = [each for each in going if each.id in question.read(root, name).runs]
        if own:
            search = root / question.STUDIES / name / "search.json"
            kept = any(each.searched for each in own) and search.is_file()
            told.append(
                f"{len(own)} of them belong to the study {name}: its next sweep runs them again"
                + (f"; the result of its search stays in {search}" if kept else "")
            )
    return told
