"""Choosing what one table shows of the runs in a folder: block, rows and data sets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from analysis.blocks import Block, Column, Entry, bare
from analysis.facts import outer
from analysis.question import written
from methods.naming import NamingError, unknown

Kind = TypeVar("Kind", Entry, Column)
Spelling = Callable[[str], str]
"""From a name as a user writes it to the name that runs have."""


@dataclass(frozen=True)
class Choice:
    """Rows and data sets by name, each with its label (empty: the name); none: all."""

    rows: Sequence[tuple[str, str]] = ()
    benchmarks: Sequence[tuple[str, str]] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    """values that a block's setting must have, such as the model"""
    number: int = 0
    """of the block, from 1; 0: the only one that matches"""

    def of(self, blocks: Sequence[Block], spell: Spelling) -> tuple[list[int], Block | None]:
        """The numbers of the blocks that match, and if there is only one, its chosen part.

        Raises:
            NamingError: no block matches, or a row or data set does not exist.
        """
        if self.number and not 1 <= self.number <= len(blocks):
            raise NamingError(f"block: expected 1 to {len(blocks)}, got {self.number}")
        numbers = [self.number] if self.number else range(1, len(blocks) + 1)
        there = [number for number in numbers if self._fits(blocks[number - 1], blocks)]
        if not there:
            told = ", ".join(f"{key} {value}" for key, value in self.settings.items())
            raise NamingError(f"block: block {self.number} does not match {told}")
        made, reasons = {}, {}
        for number in there:
            try:
                made[number] = self._chosen(blocks[number - 1], spell)
            except NamingError as error:
                reasons[number] = str(error)
        if not made and len(there) == 1:
            raise NamingError(reasons[there[0]])
        if not made:
            told = "; ".join(f"block {number}: {reason}" for number, reason in reasons.items())
            raise NamingError(f"no block matches every choice: {told}")
        only = next(iter(made.values())) if len(made) == 1 else None
        return list(made), only

    def _fits(self, block: Block, blocks: Sequence[Block]) -> bool:
        for key, value in self.settings.items():
            known = {each.setting[key] for each in blocks}
            meant = {value} & known or {each for each in known if outer(each) == value}
            if not meant:
                raise unknown(key, value, known)
            if block.setting[key] not in meant:
                return False
        return True

    def _chosen(self, block: Block, spell: Spelling) -> Block:
        rows = [(_entry(block, name, spell), label) for name, label in self.rows]
        columns = [(_column(block, name), label) for name, label in self.benchmarks]
        rows = rows or [(entry, "") for entry in block.compared]
        columns = columns or [(column, "") for column in block.columns if column.done]
        _once("rows", [entry.name for entry, _ in rows])
        _once("benchmarks", [column.name for column, _ in columns])
        return block.chosen(
            [(entry, label or entry.name) for entry, label in rows],
            [(column, label or column.name) for column, label in columns],
        )


def on_benchmarks(blocks: Sequence[Block], names: Sequence[str]) -> list[Block]:
    """The blocks, reduced to these data sets and the rows with runs on them; no names: all.

    Raises:
        NamingError: no block has a data set of that name, or several of one block match.
    """
    if not names:
        return list(blocks)
    made, errors = [], {}
    for block in blocks:
        found: dict[str, Column] = {}
        for name in names:
            try:
                column = _column(block, name)
            except NamingError as error:
                errors.setdefault(name, []).append(error)
            else:
                found[column.name] = column
        columns = tuple(found.values())
        kept = [e for e in block.entries if any(each.rows[e.name].records for each in columns)]
        if kept:
            made.append(replace(block, entries=tuple(kept), columns=columns))
    for told in errors.values():
        if len(told) == len(blocks):
            raise told[0]
    return made


def _once(where: str, names: Sequence[str]) -> None:
    twice = next((name for name in names if names.count(name) > 1), "")
    if twice:
        raise NamingError(f"{where}: expected each name once, got {twice} twice")


def _entry(block: Block, text: str, spell: Spelling) -> Entry:
    """The row with this name or label, or with another spelling of the name."""
    for name in _spellings(text, spell):
        found = [each for each in block.entries if name in (each.row, each.name)]
        found = found or [each for each in block.entries if bare(each.row) == name]
        if found:
            return _only("row", text, found, [each.name for each in found])
    raise unknown("row", text, [each.row for each in block.entries])


def _spellings(text: str, spell: Spelling) -> Iterable[str]:
    """A text, and the names that runs may have for it; the last may take seconds to resolve."""
    yield text
    for way in (written, spell):
        try:
            yield way(text)
        except NamingError:
            continue


def _column(block: Block, text: str) -> Column:
    """The data set with this name or label; an unambiguous part of it is enough."""
    low = text.lower()
    named = {column.name: (column.key.lower(), column.name.lower()) for column in block.columns}
    by_name = {column.name: column for column in block.columns}
    tests: tuple[Callable[[str], bool], ...] = (
        lambda name: name == low.replace(" ", "") or name == low,
        lambda name: name.startswith(low),
        lambda name: low in name,
    )
    for test in tests:
        found = [name for name, both in named.items() if any(map(test, both))]
        if found:
            return _only("benchmark", text, [by_name[each] for each in found], found)
    raise unknown("benchmark", text, [column.key for column in block.columns])


def _only(what: str, text: str, found: Sequence[Kind], names: Sequence[str]) -> Kind:
    if len(found) > 1:
        raise NamingError(f"{what} {text!r}: expected one, got {len(found)}: {', '.join(names)}")
    return found[0]
