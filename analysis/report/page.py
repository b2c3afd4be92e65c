"""One page from a folder of runs: HTML in one file, Markdown, and the tables as LaTeX and CSV."""

from __future__ import annotations

import base64
import shlex
from collections.abc import Collection, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from importlib import resources
from pathlib import Path

from jinja2 import Environment

from analysis import (
    blocks,
    findings,
    joined,
    question,
    records,
    recordsfile,
    robustness,
    runs,
    table,
    versions,
    words,
)
from analysis.blocks import Block
from analysis.findings import Finding
from analysis.joined import Source
from analysis.metrics import MEASURES, SHOWN
from analysis.numbers import count
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
    *MEASURES, "selected", "names", "differences", "overall", "moved", "controls", "cost",
    "labels-found", "attacked-rows", "arguments", "ranks", "versions", "corrupted",
    "corrupted-differences", "corruptions",
)  # fmt: skip
"""Names of the files of tables, except those of searches."""
OF_COSTS = ("cost", "phases")
"""Figures next to the table of costs."""
OF_CORRUPTIONS = ("corruptions", "severities")
"""Figures next to the tables of scores on corrupted images."""
WIDE = 7
"""Number of columns from which a table is set in smaller type."""


class NoRuns(ValueError):
    """A folder with nothing to report."""


@dataclass(frozen=True)
class Section:
    """A heading and what follows it, in this order."""

    heading: str = ""
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    texts: Sequence[str] = ()
    commands: Sequence[Sequence[str]] = ()
    """blocks of command lines"""


@dataclass(frozen=True)
class Part:
    """The part of a report on one block."""

    folder: str
    """below figures and tables; empty if there is only one block"""
    title: str
    answer: str
    sections: list[Section]
    protocol: list[Section]
    """at the end of the page"""


@dataclass(frozen=True)
class Report:
    """A whole report, before it is written in a format."""

    title: str
    question: str
    answers: list[str]
    prediction: str
    summary: str
    remarks: list[str]
    apart: Table | None
    """what differs between blocks"""
    parts: list[Part]
    searches: list[Section]
    closing: list[Section]
    """failures, protocol"""
    words: dict[str, str]
    command: str

    @property
    def tables(self) -> list[tuple[str, Table]]:
        """Every table that has its own file, with the folder of the file."""
        sections = [("", each) for each in self.searches]
        for part in self.parts:
            sections += [(part.folder, each) for each in (*part.sections, *part.protocol)]
        return [(folder, each) for folder, section in sections for each in section.tables]


@dataclass(frozen=True)
class Options:
    """Which report to make, and where."""

    root: Path
    out: Path
    formats: Collection[str] = FORMATS
    _: KW_ONLY
    published: bool = False
    """Show published numbers next to ours."""
    recompute: bool = False
    """Compute metrics from stored predictions with the current code."""
    study: str = ""
    all_versions: bool = False
    """Show rows in every version of their code, not only in the newest."""
    others: Sequence[Path] = ()
    """More results folders and packs, whose runs count as if they were in the first."""
    beside: Sequence[Path] = ()
    """Folders, packs and records files whose runs are shown beside these where they compare."""
    metrics: Sequence[str] = ()
    """Metrics with a main table of their own, in addition to those of every report."""

    @property
    def suffixes(self) -> list[str]:
        """The suffixes of the files of a figure."""
        pages = [".png", ".svg"] if {"html", "md"} & set(self.formats) else []
        return pages + ([".pdf"] if "tex" in self.formats else [])

    @property
    def command(self) -> str:
        """The command that makes this report."""
        flags = ["--published"] * self.published + ["--recompute"] * self.recompute
        flags += ["--all-versions"] * self.all_versions
        flags += ["--study", self.study] if self.study else []
        flags += ["--metrics", ",".join(self.metrics)] if self.metrics else []
        flags += ["--with", *map(str, self.beside)] if self.beside else []
        places = [str(each) for each in (self.root, *self.others)]
        return shlex.join(["augbench", "report", *places, "--out", str(self.out), *flags])


def report(options: Options) -> list[Path]:
    """Write the report of the runs in a folder, or of one study there.

    Returns the files to open.

    Raises:
        NoRuns: the folder contains no run with a result.
        StudyError: its study file cannot be used.
        OSError: another folder, pack or records file cannot be read.
    """
    with joined.opened(options.others) as others, joined.opened(options.beside) as around:
        return _report(options, others, around)


def _report(options: Options, others: Sequence[Source], around: Sequence[Source]) -> list[Path]:
    asked = question.read(options.root, options.study)
    sources = [Source(options.root, *records.scan(options.root)), *others]
    found, unread, told = joined.pooled(sources)
    found, unread, older = versions.newest(*asked.own(found, unread), options.all_versions)
    more, of_others = joined.beside(found, around, options.all_versions)
    found = [*found, *more]
    told = [*of_others, *told, *([older] if older else [])]
    while any(record.done and not record.origin for record in found):
        try:
            whole = _made(options, asked, found, unread, told)
        except records.Damaged as damaged:  # found when predictions are read: report the rest
            (hurt,) = (record for record in found if record.folder == damaged.folder)
            found.remove(hurt)
            unread.append(records.Unread(damaged.folder, damaged.reason, hurt.run))
        else:
            return _written(whole, options.out, options.formats)
    raise NoRuns(
        f"{options.root}: expected run directories with results, got {count(len(found), 'run')} "
        f"without metrics and {len(unread)} unfinished; make some with augbench compare"
    )


def _made(
    options: Options,
    asked: Question,
    found: Sequence[records.Record],
    unread: Sequence[records.Unread],
    told: Sequence[str],
) -> Report:
    """The report of these runs; writes its figures and records to the output folder."""
    root, out = options.root, options.out
    if options.recompute:
        found = [records.recomputed(record) for record in found]
    out.mkdir(parents=True, exist_ok=True)
    _clear(options)
    recordsfile.write([each for each in found if not each.origin], out / "records.parquet")
    plain = [record for record in found if not record.searched]
    made = [block for block in blocks.split(plain, asked.labels) if block.done]
    several = len(made) > 1
    parts = [
        _part(options, asked, block, str(number) if several else "")
        for number, block in enumerate(made, start=1)
    ]
    found_searches = _searches(options, asked, found)
    leads = [block.leads for block in made]
    names = {each.name for part in parts for section in part.sections for each in section.tables}
    return Report(
        title=f"augbench report: {root.resolve().name}",
        question=asked.text or f"none given, because {_no_file(root)}.",
        answers=[
            *_interim(asked.missing(found, unread), len(asked.runs)),
            *(f"{part.title}. {part.answer}" if several else part.answer for part in parts),
        ],
        prediction=asked.predicted or "none was recorded.",
        summary=_counts(found, len(unread)),
        remarks=[
            *sentences.unmatched(made, asked),
            *_remarks(root, asked, len(found) - len(plain)),
            *told,
        ],
        apart=tables.blocks_table(list(enumerate(made, start=1))) if several else None,
        parts=parts,
        searches=found_searches,
        closing=[
            _failures(found, unread),
            Section("Protocol", texts=_of_study(root, asked)),
            *(each for part in parts for each in part.protocol),
        ],
        words=words.of(
            {
                "scores",
                *names,
                *(["metrics"] if options.metrics else []),
                *(["search"] if found_searches else []),
                *words.about(leads),
            },
            leads,
        ),
        command=options.command,
    )


def _failures(found: Sequence[records.Record], unread: Sequence[records.Unread]) -> Section:
    made = tables.failures_table(found, unread, "failures")
    if made is None:
        return Section("Runs without a result", texts=["None: every run has ended with a result."])
    return Section("Runs without a result", tables=[made])


def _clear(options: Options) -> None:
    """Remove tables and figures of an earlier report, of the kinds that are written now.

    Otherwise numbers of other runs could be mistaken for those of this report.
    """
    tables = [f".{each}" for each in ("tex", "csv") if each in options.formats]
    kinds = {"figures": (figures.MAKERS, options.suffixes), "tables": (TABLES, tables)}
    for folder, (names, suffixes) in kinds.items():
        place = options.out / folder
        for path in (*place.glob("*.*"), *place.glob("*/*.*")):
            own = path.stem in names or path.stem.startswith(searches.PREFIX)
            if own and path.suffix in suffixes and path.is_file():
                path.unlink()


def _interim(missing: int, planned: int) -> list[str]:
    """A sentence that says that a study has not ended; none if it has."""
    if not missing:
        return []
    return [
        f"Interim: {missing} of the study's {planned} runs {'has' if missing == 1 else 'have'} no "
        "result yet. The family of tested comparisons grows with them, so verdicts may still "
        "change."
    ]


def _counts(found: Sequence[records.Record], unread: int) -> str:
    counts: dict[str, int] = {}
    for record in found:
        counts[record.result["status"]] = counts.get(record.result["status"], 0) + 1
    told = ", ".join(f"{number} {status}" for status, number in sorted(counts.items()))
    return f"{count(len(found) + unread, 'run')}: {told}" + (
        f", {unread} unfinished, damaged or copied." if unread else "."
    )


def _no_file(root: Path) -> str:
    """Why no study file was read."""
    swept = question.names(root)
    if swept:
        return f"no --study was chosen (there are: {', '.join(swept)})"
    return "there is no study file beside the runs"


def _of_study(root: Path, asked: Question) -> list[str]:
    """Where the question comes from."""
    if asked.source:
        return [f"Question, family, margin and prediction come from {asked.source}."]
    return [
        f"Because {_no_file(root)}, the margin is the default of {asked.margin:g} points, and the "
        "family is every method against its upstream and every upstream against none."
    ]


def _remarks(root: Path, asked: Question, searched: int) -> list[str]:
    """Which runs appear in no table with others."""
    told = list(filter(None, [question.covers(root, asked, "--study NAME")]))
    if searched:
        appear = "appears" if searched == 1 else "appear"
        told.append(
            f"{count(searched, 'run')} of searches {appear} only in the tables of the search."
        )
    return told


def _searches(options: Options, asked: Question, found: Sequence[records.Record]) -> list[Section]:
    """Tables and figures of each search."""
    made = []
    for search in searches.read(options.root, options.study):
        compared = searches.compared(search, found, asked)
        drawn = []
        if options.suffixes:
            place = options.out / "figures"
            place.mkdir(parents=True, exist_ok=True)
            given = (place, options.suffixes)
            pairs = searches.draw_compared(search, compared, asked.margin, *given)
            drawn = [*filter(None, [pairs]), searches.draw(search, *given)]
        listed = [*searches.tables(search), *compared.tables]
        made.append(Section("Search for hyper-parameters", listed, drawn))
    return made


def _part(options: Options, asked: Question, block: Block, folder: str) -> Part:
    found = findings.findings(block, asked)
    over, reason = findings.overall(block, found, asked.margin)
    mechanism, beside = sentences.controls(block, found, asked.margin, "controls")
    drawn: list[Figure] = []
    if options.suffixes:
        place = options.out / "figures" / folder
        place.mkdir(parents=True, exist_ok=True)
        drawn = figures.draw_all(block, found, asked.margin, place, options.suffixes)
    main = [
        results.main_table(block, metric, metric, options.published, "last")
        for metric in dict.fromkeys((*SHOWN[block.leads], *options.metrics))
    ]
    offered = [
        column
        for column in block.columns
        if any("selected" in record.result["metrics"] for record in column.done)
    ]
    chosen = replace(block, columns=tuple(offered))
    selected = results.main_table(chosen, block.leads, "selected", False, "selected")
    further = [
        selected if offered else None,
        tables.detection_table(block, "labels-found"),
        tables.attack_table(block, "attacked-rows"),
        tables.ablation_table(block, "arguments"),
        tables.ranks_table(block, "ranks"),
    ]
    compared = [
        tables.differences_table(found, "differences", asked.margin, block.leads)
        if found
        else None,
        tables.overall_table(block, over, reason, "overall") if over else None,
    ]
    moved = tables.learning_table(block, "moved")
    names = tables.names_table(block, "names")
    first = [each for each in drawn if each.name == "differences"]
    costs = [each for each in drawn if each.name in OF_COSTS]
    corrupted = _corrupted(block, found, asked.margin)
    robust = [e for e in drawn if e.name in OF_CORRUPTIONS]
    sections = [
        Section(
            tables=[*main, names] if names else main,
            figures=first,
            texts=[*sentences.advice(block), *sentences.caveats(block)],
        ),
        Section(
            "Differences",
            tables=_there(compared),
            texts=[
                *sentences.statistics(found, over, asked.margin),
                *([f"No test over data sets: {reason}."] if found and not over else []),
            ],
        ),
        Section("Corrupted test images", tables=corrupted, figures=robust),
        Section("How far learning went", tables=_there([moved])),
        Section("Costs", tables=[tables.cost_table(block, "cost")], figures=costs),
        Section("Do controls explain the gains?", tables=_there([beside]), texts=mechanism),
        Section(
            "More tables and figures",
            tables=_there(further),
            figures=[each for each in drawn if each not in (*first, *costs, *robust)],
        ),
    ]
    return Part(
        folder=folder,
        title=_title(block),
        answer=sentences.answer(found, block.leads),
        sections=[each for each in sections if each.tables or each.figures or each.texts],
        protocol=_protocol(options.root, block, _title(block) if folder else ""),
    )


def _corrupted(block: Block, found: Sequence[Finding], margin: float) -> list[Table]:
    """The tables of scores on corrupted test images; none if no run was evaluated on any."""
    rows = [
        (column.name, column.rows[entry.name])
        for column in block.columns
        for entry in block.entries
        if entry.name in column.rows
    ]
    columns = {column.name: column for column in robustness.of_block(block).columns}
    pairs = [
        (each, columns[each.column].row(each.row), columns[each.column].row(each.base))
        for each in found
    ]
    return _there(
        [
            robustness.scores_table(rows, "corrupted"),
            robustness.differences_table(pairs, margin, "corrupted-differences"),
            robustness.kinds_table(rows, "corruptions"),
        ]
    )


def _there(listed: Sequence[Table | None]) -> list[Table]:
    return [each for each in listed if each is not None]


def _protocol(root: Path, block: Block, title: str) -> list[Section]:
    """How the runs of a block were made, and how to repeat them."""
    name = block.setting["protocol"]
    return [
        Section(
            title,
            texts=[
                f"Protocol {name}. {sentences.PROTOCOLS[name]}",
                *tables.trainings(block.columns),
                *sentences.selection(block),
            ],
        ),
        Section(tables=[tables.versions_table(block, "versions")]),
        Section(
            "Reproducing the runs",
            texts=[AGAIN],
            commands=[sentences.commands(block, column, root) for column in block.columns],
        ),
        *(
            [Section(texts=[SAMPLES], commands=[samples])]
            if (samples := sentences.samples(block))
            else []
        ),
    ]


def _title(block: Block) -> str:
    setting = block.setting
    epochs = sorted({column.training.epochs for column in block.columns})
    told = f"{epochs[0]} epochs" if len(epochs) == 1 else f"{epochs[0]} to {epochs[-1]} epochs"
    if any(record.run.budget != "steps" for record in block.done):
        told += " (more in rows with an equal budget)"
    return f"{setting['model']}, protocol {setting['protocol']}, {told}, {setting['device']}"


AGAIN = "Each command does the missing runs of one data set and prints the numbers of all its runs."
SAMPLES = "These commands draw more augmented training data for each row, without any training:"
DEFINITIONS = "Terms of this report; docs/reports.md of augbench explains every table and figure."
APART = (
    "These runs have {count} different settings, which are never mixed in one table. Each setting "
    "is a block with its own tables, figures and family of comparisons, in this order:"
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
        for folder, each in whole.tables:
            place = out / "tables" / folder
            place.mkdir(parents=True, exist_ok=True)
            _write(place / f"{each.name}.{suffix}", writers[suffix](each))
        made.append(out / "tables")
    return list(dict.fromkeys([*made, out / "records.parquet"]))


def _write(path: Path, text: str) -> None:
    # A report can be made again, so there is no need to wait for the disk.
    path.write_text(text, encoding="utf-8", newline="\n")


def html(whole: Report) -> str:
    """The page in one file: figures embedded, no scripts, nothing from a network."""
    text = resources.files("analysis.report").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=_seen)

    def shown(sections: Sequence[Section]) -> list[dict[str, object]]:
        return [
            {
                "heading": each.heading,
                "tables": [table.html(one, wide=len(one.head) >= WIDE) for one in each.tables],
                "figures": [_embedded(one) for one in each.figures],
                "texts": each.texts,
                "commands": each.commands,
            }
            for each in sections
        ]

    page = {
        **{name: getattr(whole, name) for name in runs.field_names(Report)},
        "apart": table.html(whole.apart) if whole.apart else "",
        "apart_text": APART.format(count=len(whole.parts)),
        "definitions": DEFINITIONS,
        "parts": [{"title": part.title, "sections": shown(part.sections)} for part in whole.parts],
        "searches": shown(whole.searches),
        "closing": shown(whole.closing),
    }
    return environment.from_string(text).render(page=page)


def _seen(value: object) -> object:
    """Text without invisible characters; HTML was already made from such text."""
    return table.plain(value) if type(value) is str else value


def _embedded(figure: Figure) -> dict[str, str]:
    path = next(path for path in figure.paths if path.suffix == ".svg")
    coded = base64.b64encode(path.read_bytes()).decode()
    data = f"data:image/svg+xml;base64,{coded}"
    return {"title": figure.title, "caption": figure.caption, "data": data}


def markdown(whole: Report, out: Path) -> str:
    """The page as Markdown, with the figures as files beside it."""
    lines = [f"# {markdown_text(whole.title)}", ""]
    lines += [f"**Question.** {markdown_text(whole.question)}", ""]
    for answer in whole.answers:
        lines += [f"**Answer. {markdown_text(answer)}**", ""]
    lines += [f"**Prediction.** {markdown_text(whole.prediction)}", ""]
    lines += [markdown_text(whole.summary), "", *_list(whole.remarks)]
    if whole.apart is not None:
        lines += [APART.format(count=len(whole.parts)), "", table.markdown(whole.apart)]
    for part in whole.parts:
        lines += [f"## {markdown_text(part.title)}", ""]
        lines += [line for each in part.sections for line in _section(each, "###", out)]
    for each in (*whole.searches, *whole.closing):
        lines += _section(each, "##", out)
    lines += ["## Definitions", "", DEFINITIONS, ""]
    lines += [f"- **{markdown_text(word)}**: {markdown_text(t)}" for word, t in whole.words.items()]
    lines += ["", "## Reproducing this report", "", *_code(whole.command)]
    return "\n".join(lines).rstrip() + "\n"


def _section(section: Section, level: str, out: Path) -> list[str]:
    lines = [f"{level} {markdown_text(section.heading)}", ""] if section.heading else []
    lines += [table.markdown(each) for each in section.tables]
    lines += _images(section.figures, out)
    lines += _list(section.texts)
    return [*lines, *(line for each in section.commands for line in _code(*each))]


def _list(texts: Sequence[str]) -> list[str]:
    """One text as a paragraph, several as a list."""
    sign = "- " if len(texts) > 1 else ""
    return [*(f"{sign}{markdown_text(text)}" for text in texts), ""] if texts else []


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
