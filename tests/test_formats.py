"""Text from anybody appears as text, and a table has the same numbers in every format."""

import csv
import html as html_module
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from analysis import table
from analysis.table import Group, Table, TableCell
from tests.made import compiled

HOSTILE = (
    "<script>alert(1)</script>",
    "a|b",
    "snake_case_name",
    "100 % of $x$ & {y} ~ ^ # \\input{/etc/passwd}",
    "two\nlines\r\nand\ttabs",
    "*bold* _it_ `code` [link](http://x) ![i](y)",
    "μ ± σ → ü ß 日本 🙂",
    "\u202eesrever\x00\x1b[31m",
    "'quoted' \"twice\" -- dash",
    "[first",
)


def hostile() -> Table:
    rows = tuple(
        (
            TableCell(text),
            TableCell(f"{place}.25 ± 0.50", "best" if place == 3 else ""),
            TableCell(text, "tied"),
        )
        for place, text in enumerate(HOSTILE)
    )
    return Table("t", HOSTILE[0], ("", HOSTILE[1], HOSTILE[3]), (Group(HOSTILE[2], rows),), HOSTILE)


class Texts(HTMLParser):
    """The tags of a page, and its text."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: set[str] = set()
        self.cells: list[str] = []
        self.inside = False

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)
        if tag in ("td", "th", "p", "caption"):
            self.cells.append("")
            self.inside = True

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag not in ("td", "th", "p", "caption")

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.cells[-1] += data


def test_html_shows_every_text_and_acts_on_none() -> None:
    reader = Texts()
    reader.feed(str(table.html(hostile())))
    known = {"table", "caption", "thead", "tbody", "tr", "th", "td", "p", "strong", "em", "wbr"}
    assert reader.tags <= known
    for text in HOSTILE:
        assert table.plain(text) in reader.cells


def test_plain_text_has_one_line_of_signs_that_can_be_seen() -> None:
    assert table.plain(HOSTILE[4]) == "two lines and tabs"
    assert table.plain(HOSTILE[7]) == "[U+202E]esrever[U+0000][U+001B][31m"
    assert table.plain(HOSTILE[6]) == HOSTILE[6]


def test_markdown_keeps_the_table_and_escapes_what_acts() -> None:
    lines = table.markdown(hostile()).split("\n")
    body = [line for line in lines if line.startswith("| ")]
    assert len(body) == 1 + 1 + 1 + len(HOSTILE)
    for line in body:
        assert len(re.findall(r"(?<!\\)\|", line)) == 4
    text = "\n".join(lines)
    assert "<script" not in text and "&lt;script&gt;" in text
    for sign in "_`[]$~#":
        assert not re.findall(rf"(?<!\\){re.escape(sign)}", text), sign
    stars = re.sub(r"\\\*", "", text)  # what is left is our own emphasis
    assert stars.count("**") == 2 * 2 and len(re.findall(r"(?<!\*)\*(?!\*)", stars)) % 2 == 0
    shown = html_module.unescape(re.sub(r"\\(.)", r"\1", body[3].split(" | ")[0].strip("| ")))
    assert shown == HOSTILE[0]


def test_csv_comes_back_as_the_texts() -> None:
    made = hostile()
    head, *rows = csv.reader(table.comma_separated(made).splitlines())
    assert head[1:] == [table.plain(name) for name in (made.title, *made.head[1:])]
    assert [row[1] for row in rows] == [table.plain(text) for text in HOSTILE]
    assert rows[3][2] == "3.25 ± 0.50 (best)" and rows[0][3].endswith("(tied)")


def test_numbers_are_the_same_in_every_format() -> None:
    made = table.table("t", "T", ["", "a", "b"], [["x", "91.25 ± 0.50", "-1.20 to +0.35"]])
    every = [str(table.html(made)), table.markdown(made), table.comma_separated(made)]
    every.append(table.text(made))
    every.append(table.latex(made).replace(r"$\pm$", "±").replace("-{}", "-"))
    for text in every:
        numbers = re.findall(r"[+-]?\d+\.\d+", html_module.unescape(text))
        assert numbers == ["91.25", "0.50", "-1.20", "+0.35"]


def test_latex_escapes_every_sign_that_acts() -> None:
    assert table.latex_text("a_b % \\input{x} $1$ & # ~ ^") == (
        r"a\_b \% \textbackslash{}input\{x\} \$1\$ \& \# \textasciitilde{} \textasciicircum{}"
    )
    assert table.latex_text("日 ü") == r"\texttt{U+65E5} ü"
    made = table.table("t", "T", ["", "a"], [["[x]", "1"], ["*y*", "2"], ["z", "3"]])
    rows = [line for line in table.latex(made).split("\n") if " & " in line]
    assert rows[1:] == [r"{[x]} & 1 \\", r"{*y*} & 2 \\", r"z & 3 \\"]


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
def test_latex_compiles_with_text_from_anybody(tmp_path: Path) -> None:
    preamble = table.NEEDED.removeprefix("% ")
    source = "\n".join(
        [r"\documentclass{article}", preamble, r"\begin{document}", table.latex(hostile()),
         r"\end{document}"]
    )  # fmt: skip
    (tmp_path / "t.tex").write_text(source, encoding="utf-8")
    log = compiled(tmp_path / "t.tex")
    assert "Missing character" not in log and "not set up for use" not in log


def test_a_table_as_text() -> None:
    rows = ((TableCell("none"), TableCell("1.0")), (TableCell("mixup"), TableCell("2.0", "best")))
    groups = (Group("", rows[:1]), Group("Others", rows[1:]))
    made = Table("t", "Title", ("", "accuracy"), groups, ("word " * 30, "short"))
    title, head, rule, none, others, mixup, *notes = table.text(made).split("\n")
    assert (title, head, none) == ("Title", f"{'':8}{'accuracy':>10}", f"{'none':8}{'1.0':>10}")
    assert rule == "------  ----------" and others == "Others"
    assert mixup == f"{'mixup':8}{'2.0 (best)':>10}"
    assert [len(line) <= 100 for line in notes] == [True] * 3 and notes[1].startswith("  word")
