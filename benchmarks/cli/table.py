"""``augbench table``: chosen rows, data sets and metrics; needs neither torch nor ray."""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from analysis import blocks, joined, question, records, table, versions
from analysis.blocks import Block
from analysis.chosen import Choice
from analysis.metrics import MEASURES, SHOWN
from analysis.question import Question
from analysis.records import Record, Unread
from analysis.report import results, tables
from analysis.report.page import NoRuns
from analysis.runs import write_text
from analysis.table import Table, wrapped
from benchmarks.cli.arguments import TableCommand, UsageError
from benchmarks.cli.report import metrics_in
from benchmarks.running.codes import FAILURE, USAGE
from methods.naming import NamingError, split

if TYPE_CHECKING:
    from pandas import DataFrame

NAME = "results"
"""Label of a table that is not written to a file."""
WRITERS: dict[str, Callable[[Table], str]] = {
    "text": lambda made: f"{table.text(made)}\n",
    "md": table.markdown,
    "tex": table.latex,
    "csv": table.comma_separated,
    "html": table.page,
}
SUFFIXES = {".txt": "text", ".md": "md", ".tex": "tex", ".csv": "csv", ".html": "html"}
LABEL = re.compile(r"[\w:./+-]+", re.ASCII)
Made = TypeVar("Made")


def carry_out(command: TableCommand) -> int:
    """Run the command; return the exit code."""
    try:
        made = written(command)
    except (NamingError, UsageError, NoRuns, OSError) as error:
        if command.debug:
            traceback.print_exc()
        print(f"augbench: {error}", file=sys.stderr)
        return FAILURE if isinstance(error, OSError) else USAGE
    print(made, end="")
    return 0


def written(command: TableCommand) -> str:
    """The table as text, or the name of the file that it was written to.

    Raises:
        UsageError, NamingError: an invalid value.
        NoRuns: a folder without results.
    """
    kind, metrics = _format(command), _metrics(command)
    if command.label and not LABEL.fullmatch(command.label):
        raise UsageError(f"label: expected letters, digits and :./+-_, got {command.label!r}")
    name = question.as_name(command.out.stem) if command.out is not None else NAME
    options = results.Options(
        caption=command.caption,
        label=command.label,
        average=command.average,
        rank=command.rank,
        published=command.published,
        only=bool(command.rows),
        legend=not command.no_legend,
    )
    made = _of_block(
        command,
        lambda block: results.paper_table(
            block, metrics or SHOWN[block.leads], name, command.selection, options
        ),
    )
    text = WRITERS[kind](made)
    if command.out is None:
        return text
    out = command.out.expanduser()
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, text)
    return f"{out}\n"


def numbers(command: TableCommand) -> DataFrame:
    """The numbers of the table; also writes the file that the command names."""
    metrics = _metrics(command)
    if command.out is not None:
        written(command)
    return _of_block(
        command,
        lambda block: results.frame(block, metrics or SHOWN[block.leads], command.selection),
    )


def _format(command: TableCommand) -> str:
    if command.format is not None:
        return command.format
    if command.out is None:
        return "text"
    if command.out.suffix not in SUFFIXES:
        expected = ", ".join(SUFFIXES)
        raise UsageError(f"out: expected a name in {expected}, or --format, got {command.out}")
    return SUFFIXES[command.out.suffix]


def _metrics(command: TableCommand) -> list[str]:
    """The metrics that the command names; none: those of a report's main tables."""
    wanted = metrics_in(command.metrics)
    if command.metrics and not wanted:
        raise UsageError(f"metrics: expected some of {', '.join(MEASURES)}, got none")
    if command.published and (more := [each for each in wanted if not MEASURES[each].percent]):
        raise UsageError(f"published: expected only accuracy and auc with it, got {more[0]}")
    return wanted


def named(text: str) -> list[tuple[str, str]]:
    """Names with their labels: ``none=No Aug, mixup`` is none under a label, and mixup.

    Raises:
        UsageError: a label without a name, or none after the sign.
    """
    found = []
    for part in split(text):
        name, *label = split(part, "=")
        told = part[len(name) :].strip()
        if part.startswith("=") or (told and not label):
            raise UsageError(f"expected NAME or NAME=LABEL, got {part!r}")
        shown = told.removeprefix("=").strip()
        quoted = len(shown) > 1 and shown[0] == shown[-1] and shown[0] in "'\""
        found.append((name, shown[1:-1] if quoted else shown))
    return found


def _of_block(command: TableCommand, make: Callable[[Block], Made]) -> Made:
    """What ``make`` returns for the chosen block, without runs whose predictions are damaged."""
    root = command.runs.expanduser()
    if not root.is_dir():
        raise UsageError(f"runs: expected a results folder, got {command.runs}")
    asked = question.read(root, command.study)
    found, unread, older = versions.newest(*asked.own(*records.scan(root)), command.all_versions)
    found = [record for record in found if not record.searched]
    if older:
        print(older, file=sys.stderr)
    with joined.opened(command.beside) as sources:
        kinds = ("upstream", "method") if not command.rows else ("upstream", "method", "control")
        more, told = joined.beside(
            found, sources, command.all_versions, lambda each: each.facts.kind in kinds
        )
        for each in told:
            print(wrapped(each), file=sys.stderr)
        return _made(command, root, asked, [*found, *more], unread, make)


def _made(
    command: TableCommand,
    root: Path,
    asked: Question,
    found: list[Record],
    unread: Sequence[Unread],
    make: Callable[[Block], Made],
) -> Made:
    mixed = question.covers(root, asked, "--study NAME, --benchmarks, --rows")
    if mixed and not (command.rows or command.benchmarks):
        print(wrapped(mixed), file=sys.stderr)
    if unread:
        runs = "1 run" if len(unread) == 1 else f"{len(unread)} runs"
        print(
            f"left out: {runs} without a result, perhaps still running (see augbench runs)",
            file=sys.stderr,
        )
    while any(record.done and not record.origin for record in found):
        try:
            return make(_block(command, root, found, asked.labels))
        except records.Damaged as damaged:
            found = [record for record in found if record.folder != damaged.folder]
            print(f"left out: {damaged}", file=sys.stderr)
    raise NoRuns(f"{root}: expected finished runs")


def _block(
    command: TableCommand, root: Path, found: Sequence[Record], labels: blocks.Labels
) -> Block:
    made = [block for block in blocks.split(found, labels) if block.done]
    settings = {"model": command.model, "protocol": command.protocol}
    choice = Choice(
        named(command.rows),
        named(command.benchmarks),
        {key: value for key, value in settings.items() if value},
        command.block or 0,
    )
    numbers, chosen = choice.of(made, _spelled)
    if chosen is not None:
        return chosen
    listed = tables.blocks_table([(number, made[number - 1]) for number in numbers])
    names = ", ".join(question.names(root))
    study = f" or --study NAME ({names})" if names and not command.study else ""
    raise UsageError(
        f"{len(numbers)} blocks have these rows and benchmarks, and a table cannot mix blocks; "
        f"choose one with --model, --protocol, --block NUMBER{study}\n{table.text(listed)}"
    )


def _spelled(text: str) -> str:
    """A row as ``compare`` names it, with presets and defaults; loads torch."""
    from benchmarks.studies import cells  # noqa: PLC0415 - only if runs have no such name

    return cells.row_name(text)
