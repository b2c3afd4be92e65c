"""The listing of ``augbench list``; imports nothing slow."""

from __future__ import annotations

import ast
import textwrap
from pathlib import Path

import methods
from analysis import runs
from benchmarks.data import catalogue
from benchmarks.data.table_catalogue import TABLES

HEADINGS = {
    "upstream": "Upstreams",
    "method": "Methods",
    "control": "Controls",
    "plug-in": "Plug-ins",
}
INDENT = 21
WIDTH = 110


def lines(check: bool) -> tuple[list[str], bool]:
    """Return the listing, and whether all methods are available; ``check`` imports them."""
    shown, available = [], True
    kinds = {name: _kind(name, entry) for name, entry in methods.registry().items()}
    for kind, heading in HEADINGS.items():
        names = [name for name in kinds if kinds[name] == kind]
        if not names:
            continue
        shown.append(heading)
        for name in names:
            summary = methods.summary(name)
            reason = summary.reason
            if check and not reason:
                try:
                    needed = [each for each in summary.takes if each.endswith("=...")]
                    (methods.load if needed else methods.build)(name)
                except methods.NamingError as error:
                    reason = str(error)
            if reason:
                available = False
                shown.append(_line(name, f"unavailable: {reason}", ""))
            else:
                shown.append(_line(name, summary.first_line, summary.source))
                shown += _arguments(summary)
    shown.append("Your own")
    shown.append(_line("py:MODULE:NAME", "your own method, a class or factory in MODULE.py", ""))
    shown.append(_line("wrap(call=py:...)", "your own image transform, as an upstream", ""))
    shown.append("Benchmarks")
    for name, entry in catalogue.CATALOGUE.items():
        train, val, test = entry.counts
        counts = f"{train:,}/{val:,}/{test:,} rows" if val else f"{train:,}/{test:,} rows"
        sizes = "/".join(map(str, entry.sizes))
        text = f"{entry.kind}, {len(entry.classes)} classes, {sizes} px, {counts}"
        shown.append(_line(name, text, entry.source))
    for name, table in TABLES.items():
        text = f"table, {table.rows:,} rows, {table.features} features; {table.file}"
        shown.append(_line(name, text, table.source))
    shown.append(_line("csv:FILE", "your own table, csv:FILE(target=COLUMN)", ""))
    shown.append(_line("openml:ID", "a table of OpenML, by its number or name", ""))
    shown.append(_line("npz:FILE", "your own file with MedMNIST's keys", ""))
    shown.append(_line("folder:DIR", "your own images, one folder per class", ""))
    shown.append("Models")
    shown += [_line(name, text, source) for name, text, source in _models()]
    shown.append(_line("timm:NAME", "a network of timm (extra timm)", "docs/networks.md"))
    shown.append(_line("probe(backbone=...)", "a network, frozen except for its head", ""))
    shown.append(_line("py:MODULE:FACTORY", "your own network, made from the data's Spec", ""))
    shown.append("Training presets")
    for name, (source, training) in runs.PRESETS.items():
        text = (
            f"{training.optimizer} {training.learning_rate:g}, batch {training.batch_size}, "
            f"{training.epochs} epochs, {training.schedule}"
        )
        shown.append(_line(name, text, source))
    return shown, available


def _kind(name: str, entry: methods.Entry) -> str:
    declared = None if entry.kind else methods.declared(name)
    return declared.kind if declared is not None else entry.kind


def _arguments(summary: methods.Summary) -> list[str]:
    """The arguments, presets and costs of a method, on the lines below it."""
    costs = [f"{cost:g}" for cost in summary.costs]
    parts = (
        ("takes", summary.takes),
        ("presets", summary.presets),
        ("a step costs", (*costs[:-1], f"{costs[-1]} plain steps") if costs else ()),
    )
    told = "; ".join(f"{what} {', '.join(values)}" for what, values in parts if values)
    indent = " " * (INDENT + 2)
    return textwrap.wrap(told, WIDTH, initial_indent=indent, subsequent_indent=indent)


def _line(name: str, text: str, source: str) -> str:
    return f"  {name:<{INDENT - 3}} {text}{f'  [{source}]' if source else ''}"


def _models() -> list[tuple[str, str, str]]:
    """Name, first line and source of each model, read from the file: importing it loads torch."""
    folder = Path(__file__).parent.parent / "training"
    parsed = [
        ast.parse((folder / name).read_text(encoding="utf-8"))
        for name in ("networks.py", "tabular.py")
    ]
    functions = {
        node.name: node
        for tree in parsed
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
    }
    tree = parsed[0]
    table = next(
        node.value
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "MODELS"
    )
    found = []
    for key in table.keys if isinstance(table, ast.Dict) else []:
        name = ast.literal_eval(key) if key is not None else ""
        text = ast.get_docstring(functions[name]) or ""
        source = " ".join(text.partition("Source: ")[2].split()).rstrip(".")
        found.append((name, text.partition("\n")[0], source))
    return found
