"""Short names of rows and data sets for tables and figures, with a legend of the full names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from analysis.differences import RowRuns
from analysis.records import Record
from analysis.runs import row_name, row_parts
from methods.naming import NamingError

Labels = Mapping[str, str]
"""From the name of a row or a data set to its label."""
VARIANT = " {"
"""Separates the name of a row from what sets it apart from others of that name, in braces."""


def label_of(row: str, labels: Labels) -> str:
    """The label of a row; without one its name, with the label of its method in it.

    So ``mixup@train`` is ``Mixup@train`` where ``mixup`` has the label ``Mixup``.
    """
    plain, brace, apart = row.partition(VARIANT)
    if plain in labels:
        return labels[plain] + brace + apart
    method, control, budget = row_parts(plain)
    kind, of, costly = budget.partition(" of ")
    if method not in labels and costly not in labels:
        return row
    budget = kind + of + labels.get(costly, costly)
    return row_name(labels.get(method, method), control, budget) + brace + apart


def all_labels(records: Iterable[Record], given: Labels) -> Labels:
    """The labels that methods declare for their rows, and those given, which take precedence."""
    return {each.run.method: each.facts.label for each in records if each.facts.label} | {**given}


def check(names: Iterable[tuple[str, str]], where: str = "labels: ") -> None:
    """Check that no label is used twice, in pairs of a label and the full name.

    Raises:
        NamingError: it names both.
    """
    seen: dict[str, str] = {}
    for label, full in names:
        if label in seen:
            raise NamingError(
                f"{where}expected a different label for each name, got {label!r} for "
                f"{seen[label]} and {full}"
            )
        seen[label] = full


def legend(names: Iterable[tuple[str, str]]) -> list[str]:
    """The full names behind labels as a note below a table; empty if there are no labels."""
    told = [f"{label} = {full}" for label, full in names if label != full]
    return [f"Names in full: {'; '.join(told)}."] if told else []


def labelled(rows: Sequence[RowRuns], given: Labels) -> list[RowRuns]:
    """Rows of one table under their labels.

    Raises:
        NamingError: two have the same label.
    """
    labels = all_labels((record for row in rows for record in row.records), given)
    made = [
        replace(row, name=label_of(row.name, labels), upstream=label_of(row.upstream, labels))
        for row in rows
    ]
    check((new.name, old.name) for new, old in zip(made, rows, strict=True))
    return made
