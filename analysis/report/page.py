"""One page from a folder of runs: HTML in one file, Markdown, and the tables as LaTeX and CSV."""

from __future__ import annotations

import base64
import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

from jinja2 import Environment
from markupsafe import Markup

from analysis import blocks, findings, question, records, runs, table, versions
from analysis.blocks import Block
from analysis.metrics import SHOWN
from analysis.question import Question
from analysis.report import (
    figures,
    results,
    searches,
    sentences,
    tables,
)
from analysis.report.figures import Figure
from analysis.table import Table, markdown_text

FORMATS = ("html", "md", "tex", "csv")
TABLES = (
    *SHOWN, "selected", "names", "differences", "overall", "controls", "cost", "labels-found",
    "attacked-rows", "arguments", "ranks", "versions",
)  # fmt: skip
"""Names of the files of tables, those of searches apart."""
MAIN_FIGURES = 3
WIDE = 7
"""Columns from which on a table is set smaller."""


class NoRuns(ValueError):
    """A folder in which there is nothing to report."""


@dataclass(frozen=True)
class Part:
    """What a report says of one block."""

    folder: str
    """below figures and tables; empty where there is one block alone"""
    title: str
    advice: list[str]
    main: list[Table]
    figures: list[Figure]
    sentences: list[str]
    mechanism: list[str]
    tables: list[Table]
    protocol: list[str]
    commands: list[list[str]]
    """for each data set"""
    samples: list[str]
    """commands that draw augmented images, which takes the data and the network"""
    outcome: str


@dataclass(frozen=True)
class Report:
    """A whole report, before it is written in a format."""

    title: str
    summary: str
    question: str
    prediction: str
    outcomes: list[str]
    remarks: list[str]
    apart: Table | None
    """what differs between blocks"""
    parts: list[Part]
    searches: list[tuple[list[Table], list[Figure]]]
    failures: Table | None
    command: str


def report(
    root: Path,
    out: Path,
    wanted: Collection[str] = FORMATS,
    with_published: bool = False,
    recompute: bool = False,
    study: str = "",
    all_versions: bool = False,
) -> list[Path]:
    """Write the report of the runs in ``root``, or of one study there, into ``out``.

    A row that was run with several versions of its code is shown in the newest, or in all of them.
    Returns the files that a reader opens.

    Raises:
        NoRuns: the folder holds no run with a result.
        StudyError: its study file cannot be used.
    """
    asked = question.read(root, study)
    found, unread, older = versions.newest(*asked.own(*records.scan(root)), all_versions)
    command = _again(root, out, with_published, recompute, study, all_versions)
    while any(record.done for record in found):
        try:
            whole = _made(
                root,
                out,
                wanted,
                with_published,
                recompute,
                study,
                asked,
                found,
                unread,
                older,
                command,
            )
        except records.Damaged as damaged:  # found where predictions are read: the rest is told
            (hurt,) = (record for record in found if record.folder == damaged.folder)
            found.remove(hurt)
            unread.append(records.Unread(damaged.folder, damaged.reason, hurt.run))
        else:
            return _written(whole, out, wanted)
    raise NoRuns(
        f"{root}: expected run directories with results, got {len(found)} run(s) without "
        f"metrics and {len(unread)} that have not ended; make some with augbench compare"
    )


def _made(
    root: Path,
    out: Path,
    wanted: Collection[str],
    with_published: bool,
    recompute: bool,
    study: str,
    asked: Question,
    found: Sequence[records.Record],
    unread: Sequence[records.Unread],
    older: str,
    command: str,
) -> Report:
    """The report of these runs, whose figures and records are then in ``out``."""
    if recompute:
        found = [records.recomputed(record) for record in found]
    out.mkdir(parents=True, exist_ok=True)
    _clear(out, wanted)
    records.frame(found).to_parquet(out / "records.parquet")
    suffixes = _figures_wanted(wanted)
    plain = [record for record in found if not record.searched]
    made = [block for block in blocks.split(plain, asked.labels) if block.done]
    parts = [
        _part(
            root, block, str(number) if len(made) > 1 else "", asked, out, suffixes, with_published
        )
        for number, block in enumerate(made, start=1)
    ]
    return Report(
        title=f"augbench report: {root.resolve().name}",
        summary=_counts(found, len(unread)),
        question=asked.text or f"none is given: {_no_file(root)}.",
        prediction=asked.predicted or "none was written down.",
        outcomes=[
            *_interim(asked.missing(found, unread), len(asked.runs)),
            *(f"{part.title}. {part.outcome}" for part in parts),
        ],
        remarks=[
            *_remarks(root, asked, len(found) - len(plain), older),
            *sentences.unmatched(made, asked),
        ],
        apart=tables.blocks_table(list(enumerate(made, start=1))) if len(made) > 1 else None,
        parts=parts,
        searches=_searches(root, study, out, suffixes),
        failures=tables.failures_table(found, unread, "failures"),
        command=command,
    )


def _figures_wanted(wanted: Collection[str]) -> list[str]:
    """Suffixes of the files of a figure."""
    pages = [".png", ".svg"] if {"html", "md"} & set(wanted) else []
    return pages + ([".pdf"] if "tex" in wanted else [])


def _clear(out: Path, wanted: Collection[str]) -> None:
    """Remove tables and figures of an earlier report, of the kinds that are written anew.

    Nobody should take a number of other runs for one of these.
    """
    tables = [f".{each}" for each in ("tex", "csv") if each in wanted]
    kinds = {"figures": (figures.MAKERS, _figures_wanted(wanted)), "tables": (TABLES, tables)}
    for folder, (names, suffixes) in kinds.items():
        for path in (*(out / folder).glob("*.*"), *(out / folder).glob("*/*.*")):
            own = path.stem in names or path.stem.startswith(searches.PREFIX)
            if own and path.suffix in suffixes and path.is_file():
                path.unlink()


def _interim(missing: int, planned: int) -> list[str]:
    """That a study has not ended, in one sentence; none where it has."""
    if not missing:
        return []
    return [
        f"An interim look: {missing} of the study's {planned} runs have no result yet. The family "
        "of tested comparisons grows with them, so that a verdict may still change."
    ]


def _counts(found: Sequence[records.Record], unread: int) -> str:
    counts: dict[str, int] = {}
    for record in found:
        counts[record.result["status"]] = counts.get(record.result["status"], 0) + 1
    told = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    return f"{len(found) + unread} runs: {told}" + (
        f", {unread} not ended, damaged or copied." if unread else "."
    )


def _no_file(root: Path) -> str:
    """Why no study file was read."""
    swept = question.names(root)
    if swept:
        return f"no --study names one of those that were swept there ({', '.join(swept)})"
    return "there is no study file beside the runs"


def _remarks(root: Path, asked: Question, searched: int, older: str) -> list[str]:
    """Where the question comes from, and which runs no table sets beside others."""
    swept = question.names(root)
    if asked.source:
        told = [f"Question, family, margin and prediction are those of {asked.source}."]
    else:
        told = [
            f"As {_no_file(root)}, the margin is the usual {asked.margin:g} points, and the family "
            "is every method against its upstream and every upstream against none."
        ]
    if swept and not asked.runs:
        told.append(
            f"All runs of the folder are told, whatever study they are of ({', '.join(swept)}); "
            "--study NAME tells those of one."
        )
    if searched:
        told.append(f"{searched} run(s) of searches are told in the tables of the search alone.")
    return [*told, older] if older else told


def _searches(
    root: Path, study: str, out: Path, suffixes: Sequence[str]
) -> list[tuple[list[Table], list[Figure]]]:
    """Tables and figures of each search."""
    made = []
    for search in searches.read(root, study):
        drawn = []
        if suffixes:
            place = out / "figures"
            place.mkdir(parents=True, exist_ok=True)
            drawn.append(searches.draw(search, place, suffixes))
        made.append((searches.tables(search), drawn))
    return made


def _again(
    root: Path, out: Path, with_published: bool, recompute: bool, study: str, all_versions: bool
) -> str:
    flags = ["--published"] * with_published + ["--recompute"] * recompute
    flags += ["--all-versions"] * all_versions
    flags += ["--study", study] if study else []
    return shlex.join(["augbench", "report", str(root), "--out", str(out), *flags])


def _part(
    root: Path,
    block: Block,
    folder: str,
    asked: Question,
    out: Path,
    suffixes: Sequence[str],
    with_published: bool,
) -> Part:
    found = findings.findings(block, asked)
    over, reason = findings.overall(block, found, asked.margin)
    mechanism, beside = sentences.controls(block, found, asked.margin, "controls")
    drawn: list[Figure] = []
    if suffixes:
        place = out / "figures" / folder
        place.mkdir(parents=True, exist_ok=True)
        drawn = figures.draw_all(block, found, asked.margin, place, suffixes)
    main = [results.main_table(block, metric, metric, with_published, "last") for metric in SHOWN]
    offered = [
        column
        for column in block.columns
        if any("selected" in record.result["metrics"] for record in column.done)
    ]
    if offered:
        chosen = replace(block, columns=tuple(offered))
        main.append(results.main_table(chosen, "accuracy", "selected", False, "selected"))
    more = [
        tables.names_table(block, "names"),
        tables.differences_table(found, "differences", asked.margin) if found else None,
        tables.overall_table(block.columns, over, reason, "overall", asked.margin)
        if over
        else None,
        beside,
        tables.cost_table(block, "cost"),
        tables.detection_table(block, "labels-found"),
        tables.attack_table(block, "attacked-rows"),
        tables.ablation_table(block, "arguments"),
        tables.ranks_table(block, "ranks"),
        tables.versions_table(block, "versions"),
    ]
    return Part(
        folder=folder,
        title=_title(block),
        advice=sentences.advice(block),
        main=main,
        figures=drawn,
        sentences=[
            *sentences.statistics(found, over, asked.margin),
            *([f"No test over data sets: {reason}."] if found and not over else []),
        ],
        mechanism=mechanism,
        tables=[each for each in more if each is not None],
        protocol=[
            f"Protocol {(name := block.setting['protocol'])}. {sentences.PROTOCOLS[name]}",
            *sentences.selection(block),
            *sentences.caveats(block),
        ],
        commands=[sentences.commands(block, column, root) for column in block.columns],
        samples=sentences.samples(block),
        outcome=sentences.outcome(found),
    )


def _title(block: Block) -> str:
    setting = block.setting
    epochs = sorted({column.training.epochs for column in block.columns})
    told = f"{epochs[0]} epochs" if len(epochs) == 1 else f"{epochs[0]} to {epochs[-1]} epochs"
    if any(record.run.budget != "steps" for record in block.done):
        told += " (more in rows of an equal budget)"
    return f"{setting['model']}, protocol {setting['protocol']}, {told}, {setting['device']}"


SAMPLES = "More of what the rows make of training images is drawn from the data, not from runs:"
APART = (
    "These runs are of {count} settings that no table may mix. Each is a block with tables, a "
    "family and figures of its own, in this order:"
)


def _written(whole: Report, out: Path, wanted: Collection[str]) -> list[Path]:
    made = []
    if {"tex", "csv"} & set(wanted):
        (out / "tables").mkdir(parents=True, exist_ok=True)
    if "html" in wanted:
        _write(out / "report.html", html(whole))
        made.append(out / "report.html")
    if "md" in wanted:
        _write(out / "report.md", markdown(whole, out))
        made.append(out / "report.md")
    writers = {"tex": table.latex, "csv": table.comma_separated}
    for suffix in (each for each in ("tex", "csv") if each in wanted):
        for part in whole.parts:
            place = out / "tables" / part.folder
            place.mkdir(parents=True, exist_ok=True)
            for each in (*part.main, *part.tables):
                _write(place / f"{each.name}.{suffix}", writers[suffix](each))
        for each in (each for made_of, _ in whole.searches for each in made_of):
            _write(out / "tables" / f"{each.name}.{suffix}", writers[suffix](each))
        made.append(out / "tables")
    return list(dict.fromkeys([*made, out / "records.parquet"]))


def _write(path: Path, text: str) -> None:
    # A report can be made again, so that nothing waits for the disk.
    path.write_text(text, encoding="utf-8", newline="\n")


def html(whole: Report) -> str:
    """The page in one file: figures inside, no script, nothing from a network."""
    text = resources.files("analysis.report").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=_seen)

    def shown(listed: Sequence[Table]) -> list[Markup]:
        return [table.html(each, wide=len(each.head) >= WIDE) for each in listed]

    page = {
        **{name: getattr(whole, name) for name in runs.field_names(Report)},
        "apart": shown([whole.apart])[0] if whole.apart else "",
        "samples_text": SAMPLES,
        "apart_text": APART.format(count=len(whole.parts)),
        "searches": [
            (shown(listed), [_embedded(each) for each in drawn]) for listed, drawn in whole.searches
        ],
        "failures": shown([whole.failures])[0] if whole.failures else "",
        "parts": [
            {
                **{name: getattr(part, name) for name in runs.field_names(Part)},
                "main": shown(part.main),
                "tables": shown(part.tables),
                "figures": [_embedded(each) for each in part.figures],
            }
            for part in whole.parts
        ],
    }
    return environment.from_string(text).render(page=page)


def _seen(value: object) -> object:
    """Text without signs that cannot be seen; what is HTML already was made of such text."""
    return table.plain(value) if type(value) is str else value


def _embedded(figure: Figure) -> dict[str, str]:
    path = next(path for path in figure.paths if path.suffix == ".svg")
    coded = base64.b64encode(path.read_bytes()).decode()
    data = f"data:image/svg+xml;base64,{coded}"
    return {"title": figure.title, "caption": figure.caption, "data": data}


def markdown(whole: Report, out: Path) -> str:
    """The page as Markdown, with the figures as files beside it."""
    lines = [f"# {markdown_text(whole.title)}", "", markdown_text(whole.summary), ""]
    lines += [f"**Question.** {markdown_text(whole.question)}", ""]
    lines += [f"**Prediction.** {markdown_text(whole.prediction)}", ""]
    for line in whole.outcomes:
        lines += [f"**{markdown_text(line)}**", ""]
    lines += _list(whole.remarks)
    if whole.apart is not None:
        lines += [APART.format(count=len(whole.parts)), "", table.markdown(whole.apart)]
    for part in whole.parts:
        lines += [f"## {markdown_text(part.title)}", "", *_list(part.advice)]
        lines += [table.markdown(each) for each in part.main]
        lines += _images(part.figures[:MAIN_FIGURES], out)
        lines += ["### Statistics in words", "", *_list(part.sentences)]
        if part.mechanism:
            lines += ["### Do controls explain the gains?", "", *_list(part.mechanism)]
        lines += [table.markdown(each) for each in part.tables]
        lines += ["### Protocol and selection", "", *_list(part.protocol)]
        if part.figures[MAIN_FIGURES:]:
            lines += ["### More figures", "", *_images(part.figures[MAIN_FIGURES:], out)]
        lines += ["### The runs again", ""]
        lines += [line for each in part.commands for line in _code(*each)]
        if part.samples:
            lines += [SAMPLES, "", *_code(*part.samples)]
    for listed, drawn in whole.searches:
        lines += ["## Search of hyper-parameters", ""]
        lines += [table.markdown(each) for each in listed] + _images(drawn, out)
    lines += ["## Runs without a result", ""]
    lines.append(
        table.markdown(whole.failures)
        if whole.failures
        else "None: every run has ended with a result.\n"
    )
    lines += ["## This page again", "", *_code(whole.command)]
    return "\n".join(lines).rstrip() + "\n"


def _list(texts: Sequence[str]) -> list[str]:
    return [*(f"- {markdown_text(text)}" for text in texts), ""] if texts else []


def _images(drawn: Sequence[Figure], out: Path) -> list[str]:
    lines = []
    for figure in drawn:
        path = next(path for path in figure.paths if path.suffix == ".png")
        lines += [
            f"![{markdown_text(figure.title)}]({path.relative_to(out).as_posix()})",
            "",
            f"*{markdown_text(figure.title)}.* {markdown_text(figure.caption)}",
            "",
        ]
    return lines


def _code(*commands: str) -> list[str]:
    """Commands as a code block whose fence is longer than any in them."""
    lines = [table.plain(command) for command in commands]
    fence = "```"
    while any(fence in line for line in lines):
        fence += "`"
    return [f"{fence}sh", *lines, fence, ""]
