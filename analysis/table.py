"""Tables and external text, written as plain text, Markdown, LaTeX, CSV and HTML."""

from __future__ import annotations

import csv
import io
import re
import textwrap
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, zip_longest
from typing import Literal

from markupsafe import Markup, escape

Mark = Literal["", "best", "tied"]


@dataclass(frozen=True)
class TableCell:
    """A text with its mark: the best of a column is bold, those tied with it are in italics."""

    text: str
    mark: Mark = ""


@dataclass(frozen=True)
class Group:
    """Rows of a table under a common heading, which may be empty."""

    heading: str
    rows: tuple[tuple[TableCell, ...], ...]


@dataclass(frozen=True)
class Table:
    """A table with its title, column headings and notes."""

    name: str
    """of its files"""
    title: str
    head: tuple[str, ...]
    groups: tuple[Group, ...]
    notes: tuple[str, ...] = ()
    above: tuple[str, ...] = ()
    """for each column, the heading of its group of columns, shared by equal neighbours; may be
    empty"""
    label: str = ""
    """for references in LaTeX; by default made from the name"""

    @property
    def heads(self) -> tuple[str, ...]:
        """The heading of each column on one line, with that of its group."""
        return tuple(
            " ".join(filter(None, pair)) for pair in zip(self._above, self.head, strict=True)
        )

    @property
    def spans(self) -> list[tuple[str, int]]:
        """The headings of groups of columns with their widths, from left to right."""
        return [(text, len(list(same))) for text, same in groupby(self._above)]

    @property
    def _above(self) -> tuple[str, ...]:
        return self.above or ("",) * len(self.head)


def cells(values: Sequence[object]) -> tuple[TableCell, ...]:
    """A row of plain texts."""
    return tuple(
        value if isinstance(value, TableCell) else TableCell(str(value)) for value in values
    )


def table(
    name: str,
    title: str,
    head: Sequence[str],
    rows: Sequence[Sequence[object]],
    notes: Sequence[str] = (),
) -> Table:
    """A table of one group."""
    body = tuple(cells(row) for row in rows)
    return Table(name, title, tuple(head), (Group("", body),), tuple(notes))


def plain(text: str) -> str:
    """The text on one line; invisible characters are written as their code points."""
    line = re.sub(r"\s+", " ", text).strip()
    return "".join(
        f"[U+{ord(sign):04X}]" if unicodedata.category(sign) in UNSEEN else sign for sign in line
    )


UNSEEN = ("Cc", "Cf", "Cs", "Co", "Cn")
"""Unicode categories: control, format (which may reverse text), surrogate, private, unassigned."""


def markdown_text(text: str) -> str:
    """Text escaped for Markdown and HTML."""
    line = plain(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]#|~$])", r"\\\1", line)


LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "_": r"\_",
    "%": r"\%",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\char34{}",  # \textquotedbl needs T1
    "'": r"\textquotesingle{}",
    "`": r"\textasciigrave{}",
    "-": r"-{}",  # so that two hyphens do not become a dash
    "±": r"$\pm$",
    "×": r"$\times$",
    "−": r"$-$",
    "–": "--",
    "—": "---",
    "…": r"\ldots{}",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "≈": r"$\approx$",
    "→": r"$\rightarrow$",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "α": r"$\alpha$",
    "β": r"$\beta$",
    "γ": r"$\gamma$",
    "λ": r"$\lambda$",
    "μ": r"$\mu$",
    "σ": r"$\sigma$",
    "τ": r"$\tau$",
}
LATIN = re.compile("[\u0020-\u007e\u00a1-\u00ac\u00ae-\u00ff\u0152\u0153\u0160\u0161\u017d\u017e]")
"""Characters that pdflatex can set with T1 and UTF-8."""


def latex_text(text: str) -> str:
    """Text for pdflatex; a character that its fonts lack is written as its code point."""
    return "".join(
        LATEX.get(sign) or (sign if LATIN.fullmatch(sign) else rf"\texttt{{U+{ord(sign):04X}}}")
        for sign in plain(text)
    )


WIDTH = 100
"""Characters per line in a terminal."""


def wrapped(text: str) -> str:
    """A note, wrapped to the width of a terminal."""
    return textwrap.fill(
        text, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


def text(made: Table) -> str:
    """The table for a terminal, the first column left-aligned and the others right-aligned."""
    body: list[list[str]] = []
    for group in made.groups:
        body += [[group.heading]] if group.heading else []
        body += [[_in_words(cell) for cell in row] for row in group.rows]
    head = made.head
    if any(made.above):
        head = [f"{above}\n{name}" for above, name in zip(made.above, head, strict=True)]
    return "\n".join([wrapped(made.title), *_grid(head, body), *map(wrapped, made.notes)])


def _grid(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """Lines of columns as wide as necessary; a cell may have several lines."""
    full = [[*row, *[""] * (len(head) - len(row))] for row in (head, *body)]
    widths = [
        max(len(line) for cell in column for line in cell.split("\n"))
        for column in zip(*full, strict=True)
    ]

    def lines(row: Sequence[str]) -> Iterator[str]:
        for parts in zip_longest(*(cell.split("\n") for cell in row), fillvalue=""):
            first, *others = zip(parts, widths, strict=True)
            texts = [first[0].ljust(first[1]), *(part.rjust(width) for part, width in others)]
            yield "  ".join(texts).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return [*lines(full[0]), rule, *(line for row in full[1:] for line in lines(row))]


def _in_words(cell: TableCell) -> str:
    return f"{cell.text} ({cell.mark})" if cell.mark else cell.text


def markdown(made: Table) -> str:
    """The table in GitHub's Markdown, with its notes as a list below."""
    lines = [f"**{markdown_text(made.title)}**", ""]
    lines.append(_line([markdown_text(name) for name in made.heads]))
    lines.append(_line([":--", *["--:"] * (len(made.head) - 1)]))
    for group in made.groups:
        if group.heading:
            lines.append(_line([f"*{markdown_text(group.heading)}*", *[""] * (len(made.head) - 1)]))
        for row in group.rows:
            lines.append(_line([_starred(cell) for cell in row]))
    lines += ["", *(f"- {markdown_text(note)}" for note in made.notes)]
    return "\n".join(lines).rstrip() + "\n"


def _line(texts: Sequence[str]) -> str:
    return f"| {' | '.join(texts)} |"


def _starred(cell: TableCell) -> str:
    stars = {"best": "**", "tied": "*", "": ""}[cell.mark]
    return f"{stars}{markdown_text(cell.text)}{stars}"


SHORT = 22
"""The longest text that stays on one line in a cell of an HTML table."""
NEEDED = r"% \usepackage{booktabs}"
BESIDE = r"% graphicx shrinks a table that is too wide; [T1]{fontenc} sets accented letters"
ONE_COLUMN = 56
"""Characters per line of a table that fits one column of a two-column page."""


def latex(made: Table) -> str:
    """The table for LaTeX with booktabs; if it is too wide for a column, it spans both.

    If graphicx is loaded, a table wider than the line is shrunk to its width.
    """
    width = len(made.head)
    body = [made.heads, *([cell.text for cell in row] for g in made.groups for row in g.rows)]
    letters = sum(max(map(len, column)) + 2 for column in zip(*body, strict=True))
    star = "*" if letters > ONE_COLUMN else ""
    lines = [
        "% In the preamble:",
        NEEDED,
        BESIDE,
        rf"\begin{{table{star}}}",
        r"\centering",
        rf"\caption{{{latex_text(made.title)}}}",
        rf"\label{{{made.label or f'tab:{made.name}'}}}",
        r"\providecommand{\resizebox}[3]{#3}%",
        r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
        rf"\begin{{tabular}}{{l{'r' * (width - 1)}}}",
        r"\toprule",
        *_heads_above(made.spans),
        _ampersands([latex_text(name) for name in made.head]),
    ]
    for group in made.groups:
        lines.append(r"\midrule")
        if group.heading:
            heading = rf"\emph{{{latex_text(group.heading)}}}"
            lines.append(rf"\multicolumn{{{width}}}{{l}}{{{heading}}} \\")
        lines += [_ampersands([_set(cell) for cell in row]) for row in group.rows]
    lines += [r"\bottomrule", r"\end{tabular}}"]
    if made.notes:
        lines.append(r"\par\smallskip\footnotesize\raggedright")
        lines += [latex_text(note) + r"\par" for note in made.notes]
    return "\n".join([*lines, rf"\end{{table{star}}}", ""])


def _heads_above(spans: Sequence[tuple[str, int]]) -> list[str]:
    """The headings of groups of columns and the rules below them; empty without any."""
    if not any(text for text, _ in spans):
        return []
    texts, rules, place = [], [], 1
    for text, width in spans:
        texts.append(rf"\multicolumn{{{width}}}{{c}}{{{latex_text(text)}}}" if text else "")
        texts += [""] * (0 if text else width - 1)
        rules += [rf"\cmidrule(lr){{{place}-{place + width - 1}}}"] if text else []
        place += width
    return [_ampersands(texts), "".join(rules)]


def _ampersands(texts: Sequence[str]) -> str:
    # The braces keep a bracket or star at the start of a row from being read with the \\ before it.
    acting = ("[", "*")
    return " & ".join(f"{{{text}}}" if text.startswith(acting) else text for text in texts) + r" \\"


def _set(cell: TableCell) -> str:
    command = {"best": r"\textbf", "tied": r"\textit", "": ""}[cell.mark]
    text = latex_text(cell.text)
    return f"{command}{{{text}}}" if command else text


def comma_separated(made: Table) -> str:
    """The table as CSV, with the group in a separate column and marks in words.

    The column with the names of rows, which has no heading elsewhere, gets the table's title.
    """
    file = io.StringIO(newline="")
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["group", *(plain(name or made.title) for name in made.heads)])
    for group in made.groups:
        for row in group.rows:
            marked = map(_in_words, row)
            writer.writerow([plain(each) for each in (group.heading, *marked)])
    return file.getvalue()


def html(made: Table, wide: bool = False) -> Markup:
    """The table with every text escaped; cells name their column, for narrow screens."""
    start = '<table class="wide">' if wide else "<table>"
    lines: list[str] = [start, f"<caption>{_shown(made.title)}</caption>", "<thead>"]
    if any(made.above):
        heads = "".join(
            f'<th colspan="{width}" scope="colgroup">{_shown(text)}</th>' if text
            else f'<td colspan="{width}"></td>'
            for text, width in made.spans
        )  # fmt: skip
        lines.append(f'<tr class="above">{heads}</tr>')
    lines.append("<tr>")
    words = [_has_words(made, column) for column in range(len(made.head))]
    for name, text in zip(made.head, words, strict=True):
        kind = ' class="text"' if text else ""
        lines.append(f'<th scope="col"{kind}>{_shown(name)}</th>')
    lines.append("</tr></thead>")
    for group in made.groups:
        lines.append("<tbody>")
        if group.heading:
            heading = _shown(group.heading)
            lines.append(
                f'<tr class="group"><th colspan="{len(made.head)}" scope="rowgroup">{heading}'
                "</th></tr>"
            )
        for row in group.rows:
            # A long name may break at natural places.
            name = re.sub(r"([(,+=])", r"\1<wbr>", _emphasised(row[0]))
            lines.append(f'<tr><th scope="row">{name}</th>')
            for name, cell, text in zip(made.heads[1:], row[1:], words[1:], strict=True):
                kinds = [*(["short"] * (len(cell.text) <= SHORT)), *(["text"] * text)]
                kind = f' class="{" ".join(kinds)}"' if kinds else ""
                lines.append(f'<td{kind} data-head="{_shown(name)}">{_emphasised(cell)}</td>')
            lines.append("</tr>")
        lines.append("</tbody>")
    lines.append("</table>")
    lines += [f'<p class="note">{_shown(note)}</p>' for note in made.notes]
    return Markup("\n".join(lines))  # every text in it went through escape


def _has_words(made: Table, column: int) -> bool:
    """Whether a column contains words, which are left-aligned; numbers are right-aligned."""
    texts = [row[column].text for group in made.groups for row in group.rows]
    return not any(re.match(r"[-+]?\.?\d", text) for text in texts)


def page(made: Table) -> str:
    """The table as an HTML file for a browser."""
    title = _shown(made.title)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{title}</title>'
        f"</head>\n<body>\n{html(made)}\n</body>\n</html>\n"
    )


def _shown(text: str) -> Markup:
    return escape(plain(text))


def _emphasised(cell: TableCell) -> str:
    tag = {"best": "strong", "tied": "em", "": ""}[cell.mark]
    text = str(_shown(cell.text))
    return f"<{tag}>{text}</{tag}>" if tag else text
