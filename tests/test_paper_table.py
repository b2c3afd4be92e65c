"""The table of a paper: chosen rows and columns, the report's numbers, the same in every format."""

import csv
import html as html_module
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import augbench
from analysis import records
from analysis.report.page import Options, report
from analysis.runs import Training
from benchmarks.cli import main
from benchmarks.cli.arguments import UsageError
from methods.naming import NamingError
from tests.made import compiled, make_run

SAFLEX = "saflex(upstream=randaugment)"
ROWS = f"none=No Aug, randaugment=RandAug, {SAFLEX}=SAFLEX (w/ RandAug)"
BOTH = "--benchmarks=blood=Blood,derma=Derma"
NUMBER = re.compile(r"\d+\.\d{2} ± \d+\.\d{2}")
SKILLS = {"none": 0.5, "randaugment": 1.0, SAFLEX: 1.2, "mixup": 0.7}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four rows and a control of four seeds on three data sets."""
    made = tmp_path_factory.mktemp("runs")
    for benchmark in ("bloodmnist", "dermamnist", "pathmnist"):
        for seed in range(4):
            given = {"benchmark": benchmark, "model": "resnet18(width=0.25)", "test_rows": 150}
            for method, skill in SKILLS.items():
                meta = 9 * (method == SAFLEX)
                make_run(made, method, seed, skill, meta=meta, **given)  # type: ignore[arg-type]
            make_run(made, "none", seed, 0.6, control="train", **given)  # type: ignore[arg-type]
    return made


def printed(capsys: pytest.CaptureFixture[str], root: Path, *options: str) -> str:
    assert main.run(["table", str(root), *options]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], root: Path, *options: str) -> str:
    assert main.run(["table", str(root), *options]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    return shown.err


def body(text: str) -> list[list[str]]:
    """The rows of a table in Markdown, without its head."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip("* ") for cell in line] for line in lines[2:]]


def test_rows_and_columns_stand_in_their_order_under_their_names(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = printed(capsys, root, "--rows", ROWS, BOTH, "--format", "md")
    (head,) = [line for line in text.splitlines() if line.startswith("|  |")]
    assert head == "|  | Blood accuracy ↑ | Blood AUC ↑ | Derma accuracy ↑ | Derma AUC ↑ |"
    assert [row[0] for row in body(text)] == ["No Aug", "RandAug", "SAFLEX (w/ RandAug)"]
    assert "Names in full: No Aug = none; RandAug = randaugment; SAFLEX (w/ RandAug) = " in text
    turned = printed(
        capsys, root, "--rows", f"{SAFLEX}=S,none", "--benchmarks", "derma,blood", "--format", "md",
        "--metrics", "auc",
    )  # fmt: skip
    assert "|  | dermamnist ↑ | bloodmnist ↑ |" in turned
    assert [row[0] for row in body(turned)] == ["S", "none"]
    assert body(turned)[0][1:] == [body(text)[2][4], body(text)[2][2]]


def test_numbers_are_those_of_the_report_in_every_format(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {
        kind: printed(capsys, root, "--rows", ROWS, BOTH, "--format", kind)
        for kind in ("text", "md", "tex", "csv", "html")
    }
    expected = NUMBER.findall(found["md"])
    assert len(expected) == 3 * 2 * 2
    for text in found.values():
        plain = re.sub(r"<[^>]+>|data-head=\"[^\"]*\"", "", html_module.unescape(text))
        assert NUMBER.findall(plain.replace(r"$\pm$", "±")) == expected
    report(Options(root, tmp_path / "out", ["csv"]))
    for place, metric in enumerate(("accuracy", "auc")):
        text = (tmp_path / "out" / "tables" / f"{metric}.csv").read_text(encoding="utf-8")
        lines = list(csv.reader(text.splitlines()))
        columns = [lines[0].index(f"{name}, % ↑") for name in ("bloodmnist", "dermamnist")]
        told = {line[1]: [NUMBER.findall(line[each])[0] for each in columns] for line in lines[1:]}
        for row, name in zip(body(found["md"]), ("none", "randaugment", SAFLEX), strict=True):
            assert [row[1 + place], row[3 + place]] == told[name]


def test_the_best_is_bold_and_what_is_not_told_from_it_is_marked(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report(Options(root, tmp_path / "out", ["csv"]))
    text = printed(capsys, root, "--metrics", "accuracy", "--format", "csv")
    lines = (tmp_path / "out" / "tables" / "accuracy.csv").read_text().splitlines()
    ours = {line[1]: line[2:] for line in csv.reader(text.splitlines()[1:])}
    theirs = {line[1]: line[3:6] for line in csv.reader(lines[1:])}
    assert ours == {name: theirs[name] for name in SKILLS}
    assert all(cell.endswith("(best)") for cell in ours[SAFLEX])
    assert not any("(" in cell for cell in ours["none"])
    control = printed(capsys, root, "--rows", f"none@train,none,{SAFLEX}", "--format", "csv")
    assert "(" not in control.splitlines()[1] and "without control rows" not in control
    told = printed(capsys, root, "--rows", f"none@train,none,{SAFLEX}", "--format", "md")
    assert "without control rows" in told and "Control rows show where" in told


def test_few_seeds_are_not_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in range(2):
        for method, skill in (("none", 0.2), ("mixup", 3.0)):
            make_run(tmp_path, method, seed, skill)
    text = printed(capsys, tmp_path)
    assert "(best)" not in text and "(tied)" not in text
    assert "No row has 3 seeds, so nothing is tested or marked: digits." in text
    make_run(tmp_path, "crop", 0, 1.0)
    assert re.search(r"crop +\d+\.\d\d \(n = 1\)", printed(capsys, tmp_path))


def test_nothing_is_marked_where_a_row_of_few_seeds_leads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in range(4):
        for benchmark in ("bloodmnist", "dermamnist"):
            make_run(tmp_path, "none", seed, 0.2, benchmark=benchmark)
            if seed < 2 or benchmark == "bloodmnist":
                make_run(tmp_path, "mixup", seed, 6.0, benchmark=benchmark)
    told = "Nothing is marked in a column if a row with fewer than 3 seeds has the highest mean"
    for kind, mark in (("text", "(best)"), ("md", "**"), ("tex", "\\textbf"), ("html", "<strong>")):
        text = printed(capsys, tmp_path, "--format", kind)
        assert told in " ".join(text.split())
        assert "dermamnist (accuracy): mixup (n = 2); dermamnist (AUC): mixup" in " ".join(
            text.split()
        )
        found = [line for line in text.splitlines() if re.search(r"\d\d\.\d\d", line)]
        assert sum(line.count(mark) for line in found) == (4 if kind == "md" else 2)
    assert "(" not in printed(capsys, tmp_path, "--rows=none,mixup", "--benchmarks=derma",
                              "--format=csv").splitlines()[1]  # fmt: skip


def test_the_caption_names_the_epochs_and_a_note_what_else_differs_between_data_sets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for benchmark, epochs, batch in (("digits", 2, 32), ("bloodmnist", 5, 64), ("octmnist", 5, 64)):
        training = Training(epochs=epochs, batch_size=batch)
        make_run(tmp_path, "none", benchmark=benchmark, epochs=epochs, training=training)
    text = " ".join(printed(capsys, tmp_path).split())
    assert "equal, 5 epochs (bloodmnist, octmnist), 2 epochs (digits), last epoch." in text
    assert "differs between data sets: batch_size 64 (bloodmnist, octmnist), 32 (digits)." in text
    one = " ".join(printed(capsys, tmp_path, "--benchmarks=digits").split())
    assert "protocol equal, 2 epochs, last epoch." in one and "differs" not in one


def test_average_and_mean_rank(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("--metrics", "accuracy", "--average", "--rank", "--format", "md")
    text = printed(capsys, root, "--rows", f"{SAFLEX},none@train,none", *given)
    assert "| average ↑ | mean rank ↓ |" in text
    rows = {row[0].replace("\\", ""): row[-2:] for row in body(text)}
    assert [rows[each][1] for each in (SAFLEX, "none", "none@train")] == ["1.00", "2.00", "n/a"]
    found = [each for each in records.scan(root)[0] if each.run.row == "none"]
    of = [
        np.mean([100 * each.metric("accuracy") for each in found if each.run.benchmark == name])
        for name in ("bloodmnist", "dermamnist", "pathmnist")
    ]
    assert rows["none"][0] == f"{np.mean(of):.2f}"
    one = printed(capsys, root, "--benchmarks", "blood", *given)
    assert "There is no mean rank" in one and all(row[-1] == "n/a" for row in body(one))


def test_metrics_without_a_test_are_bold_alone(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = printed(capsys, root, "--metrics", "nll,auprc", "--benchmarks", "blood")
    assert "NLL ↓" in text and "AUPRC ↑" in text and "Test NLL and AUPRC (%)" in text
    lines = {line.split("  ")[0]: line for line in text.splitlines()}
    values = {name: float(re.findall(r"(\d\.\d{3}) ±", lines[name])[0]) for name in SKILLS}
    (best,) = [name for name in SKILLS if re.search(r"\d\.\d{3} \(best\)", lines[name])]
    assert values[best] == min(values.values()) and "(tied)" not in text
    assert "Not tested, so nothing is in italics: NLL, AUPRC." in text


def test_published_rows_of_the_same_methods(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, root, "--rows", f"{SAFLEX}=S", BOTH, "--published", "--format", "md")
    rows = [row for row in body(text) if "table" in row[0]]
    assert [row[0].replace("\\", "") for row in rows] == [
        "saflex over randaugment [saflex, table 1]"
    ]
    assert rows[0][1:] == ["96.91 ± 0.15", "n/a", "76.69 ± 0.33", "n/a"]
    assert "so they are not tested against ours" in text
    every = printed(capsys, root, BOTH, "--published")
    assert "none [medmnist_v2, table 3]" in every and "mixup [saflex, table 1]" in every
    said = refused(capsys, root, "--published", "--metrics", "ece")
    assert "expected only accuracy and auc" in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--rows", "nine"), "unknown row 'nine'; did you mean 'none'? (known: mixup, none, none@"),
        (("--rows", "crop"), "unknown row 'crop' (known: mixup, none, none@train, randaugment, "),
        (("--benchmarks", "mnist"), "expected one, got 3: bloodmnist, dermamnist, pathmnist"),
        (("--benchmarks", "chest"), "unknown benchmark 'chest' (known: bloodmnist, "),
        (("--metrics", "acc"), "unknown metric 'acc'; did you mean 'mcc'?"),
        (("--metrics", ","), "metrics: expected some of accuracy, auc"),
        (("--rows", "none=A,mixup=A"), "got 'A' for none and mixup"),
        (("--rows", "none,none"), "rows: expected each name once, got none twice"),
        (("--rows", "none="), "expected NAME or NAME=LABEL, got 'none='"),
        (("--model", "mlp"), "unknown model 'mlp' (known: resnet18(width=0.25))"),
        (("--block", "2"), "block: expected 1 to 1, got 2"),
        (("--out", "x.pdf"), "out: expected a name in .txt, .md, .tex, .csv, .html"),
        (("--label", "a}b"), "label: expected letters, digits"),
        (("--study", "other"), "no study 'other'"),
    ],
)
def test_what_is_not_there_is_told(
    options: tuple[str, ...], said: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused(capsys, root, *options)


def test_a_row_in_any_spelling_and_a_label_with_signs(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = "saflex( upstream = randaugment(m=9), preset=published )=Author's, none='a, b=c', mixup"
    text = printed(capsys, root, "--rows", rows, "--format", "csv")
    assert [line[1] for line in csv.reader(text.splitlines()[1:])] == [
        "Author's",
        "a, b=c",
        "mixup",
    ]


def test_of_several_blocks_one_is_to_be_chosen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for model in ("small_cnn", "mlp"):
        for method in ("none", "mixup"):
            make_run(tmp_path, method, model=model, epochs=3)
            make_run(tmp_path, method, model=model, epochs=5)
    make_run(tmp_path, "crop", model="mlp", epochs=5)
    said = refused(capsys, tmp_path, "--rows", "none,mixup")
    assert "4 blocks have these rows and benchmarks" in said and "--block NUMBER" in said
    assert "small_cnn" in said and "epochs" in said
    said = refused(capsys, tmp_path, "--rows", "none", "--model", "mlp")
    numbers = re.findall(r"^(\d)  ", said, re.MULTILINE)
    assert len(numbers) == 2
    shown = printed(capsys, tmp_path, "--rows", "none", "--model", "mlp", "--block", numbers[0])
    assert "mlp, protocol equal" in shown
    assert "crop" in printed(capsys, tmp_path, "--rows", "crop,none"), "one block alone has it"
    said = refused(capsys, tmp_path, "--rows", "crop,none", "--model", "small_cnn")
    assert "no block matches every choice: block" in said
    other = "1" if numbers[0] != "1" else "3"
    assert "does not match model mlp" in refused(capsys, tmp_path, "--model=mlp", "--block", other)


def test_a_file_is_written_in_the_format_of_its_name(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for suffix, start in ((".tex", "% In"), (".md", "**"), (".csv", "group,"), (".html", "<!DOC")):
        out = tmp_path / "new" / f"main{suffix}"
        assert printed(capsys, root, "--out", str(out), "--caption", "A_b") == f"{out}\n"
        assert out.read_text().startswith(start)
    text = (tmp_path / "new" / "main.tex").read_text()
    assert r"\caption{A\_b}" in text and r"\label{tab:main}" in text
    assert r"\label{tab:x}" in printed(capsys, root, "--format", "tex", "--label", "tab:x")


def test_a_folder_without_results_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "expected a results folder" in refused(capsys, tmp_path / "none")
    assert "expected finished runs" in refused(capsys, tmp_path)
    make_run(tmp_path, "none", 0)
    hurt = make_run(tmp_path, "mixup", 0)
    make_run(tmp_path, "mixup", 1)
    (hurt / "predictions.npz").write_bytes(b"0" * (hurt / "predictions.npz").stat().st_size)
    assert main.run(["table", str(tmp_path)]) == 0


def test_the_numbers_as_a_data_frame(root: Path, tmp_path: Path) -> None:
    made = augbench.table(
        root, rows={"none": "No Aug", SAFLEX: "Ours, new"}, benchmarks=["blood"],
        out=tmp_path / "t.md",
    )  # fmt: skip
    assert list(made.index) == ["No Aug", "Ours, new"]
    assert list(made.columns)[:3] == [
        ("bloodmnist", "accuracy", each) for each in ("mean", "sd", "n")
    ]
    mean, sd, count = made.iloc[0].tolist()[:3]
    written = body((tmp_path / "t.md").read_text())[0][1]
    assert written == f"{mean:.2f} ± {sd:.2f}" and count == 4
    with pytest.raises(NamingError, match="unknown option 'row'"):
        augbench.table(root, row="none")
    with pytest.raises(UsageError, match="format"):
        augbench.table(root, format="pdf")


def test_labels_of_the_study_are_used(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "study.yaml").write_text("labels: {mixup: Mixup, bloodmnist: Blood}\n")
    try:
        text = printed(capsys, root, "--rows", "Mixup,none=N", "--benchmarks", "Blood")
        short = printed(capsys, root, "--rows", "Mixup,none=N", "--no-legend")
    finally:
        (root / "study.yaml").unlink()
    assert "Names in full: Mixup = mixup; N = none; Blood = bloodmnist." in text
    assert "Mixup" in short and "Names in full" not in short


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
@pytest.mark.parametrize("columns", ["onecolumn", "twocolumn"])
def test_latex_compiles_unedited_with_booktabs_alone(
    columns: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "main.tex"
    printed(capsys, root, "--rows", ROWS, "--out", str(out), "--average", "--rank", "--published")
    (tmp_path / "t.tex").write_text(
        f"\\documentclass[{columns}]{{article}}\n\\usepackage{{booktabs}}\n\\begin{{document}}\n"
        "\\input{main}\n\\end{document}\n"
    )
    log = compiled(tmp_path / "t.tex")
    assert "Missing character" not in log and "1 page" in log
