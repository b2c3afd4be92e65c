"""The commands on tables: predictions of other rows, figures, data sets, wrong arguments."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text

from analysis import runs
from analysis.report import plots
from benchmarks.cli import main, show
from benchmarks.data import table_catalogue
from benchmarks.data.carving import cross_validated
from benchmarks.data.dataset import about_splits
from benchmarks.data.download import md5_of
from benchmarks.data.names import parse_benchmark
from benchmarks.data.splits import arrays_of
from benchmarks.data.table_catalogue import TABLES
from tests.made import saved_figures

Said = pytest.CaptureFixture[str]
ILL = "target=ill"


def patients(rows: int = 120) -> pd.DataFrame:
    """Numbers with gaps, a date, two texts, and a target of two."""
    rng = np.random.default_rng(0)
    ill = np.arange(rows) % 3 == 0
    return pd.DataFrame(
        {
            "age": np.where(rng.random(rows) < 0.2, "", (50 + 20 * ill).astype(str)),
            "bmi": [f"{value:.17g}" for value in rng.normal(size=rows) + ill],
            "sex": np.array(["f", "m"])[rng.integers(0, 2, rows)],
            "ward": np.array(["north", "south", "east"])[rng.integers(0, 3, rows)],
            "visit": [f"2020-01-{1 + k % 28:02}" for k in range(rows)],
            "ill": np.where(ill, "yes", "no"),
        }
    )


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "patients.csv"
    patients().to_csv(path, index=False)
    return path


def trained(table: Path, out: Path, *more: str, arguments: str = ILL, model: str = "mlp") -> Path:
    given = ["--benchmark", f"csv:{table}({arguments})", "--model", model, "--epochs", "2"]
    code = main.run(["run", *given, "--batch-size", "16", "--save-model", "--out", str(out), *more])
    assert code == 0
    (folder,) = runs.folders(out)
    return folder


@pytest.fixture(scope="module")
def kept(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(table, tmp_path_factory.mktemp("kept"), model="mlp(width=0.1)")


def failed(capsys: Said, *command: str) -> str:
    capsys.readouterr()
    assert main.run(list(command)) in (1, 2)
    text = capsys.readouterr().err
    assert "Traceback" not in text and text.startswith("augbench: ") and text.count("\n") == 1
    return text


class TestPredict:
    @pytest.mark.parametrize(
        ("arguments", "model", "seed"),
        [
            (ILL, "mlp(width=0.1)", 0),
            (f"{ILL}, scale=standard, rows_per_class=20", "mlp(width=0.1)", 1),
            (f"{ILL}, folds=3", "mlp(width=0.1)", 2),
            (ILL, "saint(width=4)", 0),
        ],
    )
    def test_the_run_s_own_test_rows_bit_for_bit(
        self, arguments: str, model: str, seed: int, table: Path, tmp_path: Path, capsys: Said
    ) -> None:
        folder = trained(table, tmp_path, "--seed", str(seed), arguments=arguments, model=model)
        arrays = arrays_of(parse_benchmark(f"csv:{table}({arguments})"), tmp_path)
        if "folds" in arguments:
            arrays, _ = cross_validated(arrays, 3, seed)
        made = patients()
        place = {float(value): row for row, value in enumerate(made["bmi"])}
        rows = [place[value] for value in np.asarray(arrays.test_x)[:, 1]]
        made.iloc[rows].to_csv(tmp_path / "new.csv", index=False)
        out = tmp_path / "p.npz"
        given = ["predict", str(folder), "--data", f"csv:{tmp_path / 'new.csv'}", "--out", str(out)]
        capsys.readouterr()
        assert main.run(given) == 0
        shown = capsys.readouterr().out
        kept = runs.read_arrays(folder / "predictions.npz")
        with np.load(out) as content:
            np.testing.assert_array_equal(content["logits"], kept["test_last_logits"])
        accuracy = (runs.read_result(folder) or {})["metrics"]["last"]["test"]["accuracy"]
        assert f"accuracy {accuracy:.4f}" in shown
        assert ("each of which depends on the others" in shown) == model.startswith("saint")

    def test_rows_without_classes_and_with_unknown_values(
        self, kept: Path, tmp_path: Path, capsys: Said
    ) -> None:
        """An unknown ward is what a missing one is not; columns in any order, more of them."""
        made = patients(4).drop(columns="ill").assign(doctor="A")
        made["ward"] = ["north", "west", "upper west", ""]
        made.loc[3, "visit"] = ""
        made[sorted(made)].to_csv(tmp_path / "new.csv", index=False)
        out = tmp_path / "p.csv"
        given = ["predict", str(kept), "--data", f"csv:{tmp_path / 'new.csv'}", "--out", str(out)]
        assert main.run(given) == 0
        assert capsys.readouterr().out == (
            f"4 rows predicted: {out}\n"
            "note: categories that the run's table does not have: ward 2\n"
        )
        found = pd.read_csv(out)
        assert list(found) == ["row", "no", "yes"] and np.allclose(
            found[["no", "yes"]].sum(axis=1), 1
        )

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"age": None}, "it has no column 'age', which the network was trained on"),
            ({"age": "old"}, "column 'age' holds numbers in the table of the run, but row 0 has"),
            ({"age": "inf"}, "but row 0 has 'inf'"),
            ({"visit": "in May"}, "column 'visit' holds dates in the table of the run"),
            ({"ill": "maybe"}, "row 0 has 'maybe' in the target 'ill': expected one of no, yes"),
            ({"ill": ["", "no", "yes"]}, "1 of 3 rows have no value in the target 'ill'"),
            ([], "it has no rows"),
        ],
    )
    def test_what_does_not_fit(
        self, change: Any, said: str, kept: Path, tmp_path: Path, capsys: Said
    ) -> None:
        made = patients(3)
        made = made[:0] if change == [] else made.assign(**change)
        made = made.drop(columns=[name for name, to in dict(change).items() if to is None])
        made.to_csv(tmp_path / "new.csv", index=False)
        data = f"csv:{tmp_path / 'new.csv'}"
        text = failed(capsys, "predict", str(kept), "--data", data, "--out", f"{tmp_path}/p.csv")
        assert said in text and not (tmp_path / "p.csv").exists()

    def test_the_table_of_the_run_is_needed(
        self, table: Path, tmp_path: Path, capsys: Said
    ) -> None:
        own = tmp_path / "own.csv"
        own.write_bytes(table.read_bytes())
        folder = trained(own, tmp_path / "runs", model="mlp(width=0.1)")
        given = ("predict", str(folder), "--out", f"{tmp_path}/p.csv", "--data")
        for other in ("npz:a.npz", f"csv:{table}(target=sex)", "qsar", f"folder:{tmp_path}"):
            text = failed(capsys, *given, other)
            assert "data: expected csv:FILE with the columns of csv(target=ill)" in text
        own.write_text(table.read_text().replace("north", "nord"))
        text = failed(capsys, *given, f"csv:{table}")
        assert f"but {own} has changed since: its MD5 is" in text
        own.unlink()
        text = failed(capsys, *given, f"csv:{table}")
        assert f"to prepare others as they were, but {own}: there is no such file" in text

    @pytest.mark.parametrize("verb", ["run", "compare"])
    def test_what_trains_no_network_saves_none(
        self, verb: str, table: Path, tmp_path: Path, capsys: Said
    ) -> None:
        option = "--method" if verb == "run" else "--methods"
        given = ["--benchmark", f"csv:{table}({ILL})", "--model", "mlp", "--epochs", "1"]
        given += ["--out", str(tmp_path / "runs"), option, "boosting"]
        text = failed(capsys, verb, *given, "--save-model")
        assert "save-model: boosting trains no network that could be saved" in text
        assert not (tmp_path / "runs").exists()
        if verb == "run":
            assert main.run(["run", *given]) == 0
            (folder,) = runs.folders(tmp_path / "runs")
            text = failed(capsys, "predict", str(folder), "--data", f"csv:{table}")
            assert "run: boosting trains no network that could predict" in text


class TestWrongArguments:
    @pytest.mark.parametrize(
        ("benchmark", "more", "said"),
        [
            ("csv:missing.csv", (), "missing.csv: there is no such file"),
            ("csv:{folder}(target=ill)", (), "it is no file: expected a table in a CSV file"),
            ("csv:{table}", (), "no target: name the column that holds the classes, such as 'csv:"),
            (
                "csv:{table}",
                (),
                "(target=ill)': one of age, bmi, sex, ward, visit, ill",
            ),
            ("{table}", (), "expected the kind of the file too, 'csv:"),
            ("scans.npz", (), "expected the kind of the file too, 'npz:scans.npz'"),
            ("csv:{table}(target=ill)", (), "for them there are mlp, saint (--model mlp)"),
            (
                "csv:{table}(target=ill)",
                ("--model", "mlp", "--corruptions", "common"),
                "they change images, but the rows of csv(target=ill) are those of a table",
            ),
        ],
    )
    def test_the_error_names_the_fix(
        self,
        benchmark: str,
        more: tuple[str, ...],
        said: str,
        table: Path,
        tmp_path: Path,
        capsys: Said,
    ) -> None:
        name = benchmark.format(table=table, folder=tmp_path)
        for verb in ("run", "compare"):
            out = str(tmp_path / "runs")
            assert said in failed(capsys, verb, "--benchmark", name, *more, "--out", out)
        assert not (tmp_path / "runs").exists()

    def test_a_table_is_no_data_folder(self, capsys: Said) -> None:
        text = failed(capsys, "compare", "--data", "csv:a.csv")
        assert "your own data are a benchmark, --benchmark 'csv:a.csv'" in text

    def test_width_and_policy(self, table: Path, tmp_path: Path, capsys: Said) -> None:
        folder = trained(table, tmp_path, "--width", "0.1")
        run, _ = runs.read_run(folder)
        assert run.model == "mlp(width=0.1)"
        text = failed(capsys, "policy", str(folder), "--out", str(tmp_path / "p.yaml"))
        assert "none on csv(target=ill) has no policy: a policy is made of operations" in text


class TestShow:
    @pytest.fixture
    def drawn(self, monkeypatch: pytest.MonkeyPatch) -> list[plots.Shelf]:
        found: list[plots.Shelf] = []
        real = plots.shelves

        def spy(rows: list[plots.Shelf], title: str, path: Path) -> None:
            found[:] = rows
            real(rows, title, path)

        monkeypatch.setattr(show, "shelves", spy)
        return found

    def given(self, table: Path, out: Path, method: str, *more: str) -> list[str]:
        first = ["show", "--benchmark", f"csv:{table}({ILL})", "--model", "mlp(width=0.1)"]
        return [*first, "--method", method, "--out", str(out), *more]

    @pytest.mark.parametrize(
        "method",
        [
            "none",
            "cell_swap(p=0.5)",
            "tabular_cutmix(alpha=1.0)",
            "saflex(upstream=cell_swap(p=0.5))",
            "isda",
            "balanced",
        ],
    )
    def test_rows_before_and_after(
        self, method: str, table: Path, tmp_path: Path, drawn: list[plots.Shelf]
    ) -> None:
        """Each cell is one of the file, in its units, and the row before is that of the file."""
        out = tmp_path / "rows.png"
        assert main.run(self.given(table, out, method, "--rows", "3", "--draws", "2")) == 0
        assert out.stat().st_size > 5000 and len(drawn) == 3
        made = patients()
        years = made["age"].replace("", np.nan).dropna().astype(float)
        number = {float(f"{float(value):.4g}") for value in made["bmi"]}
        known = {
            "age": {f"{value:.4g}" for value in [*years.unique(), years.median()]},
            "sex": {"f", "m"},
            "ward": {"north", "south", "east"},
            "visit": set(made["visit"]),
            "age missing": {"yes", "no"},
        }
        cells = [cell for shelf in drawn for card in shelf.cards for cell in card.cells]
        for name, old, new in cells:
            assert old != new
            for value in (old, new):
                assert float(value) in number if name == "bmi" else value in known[name]
        swaps = method.startswith(("cell", "tab", "saf"))
        assert bool(cells) == swaps and (len({name for name, *_ in cells}) > 3) == swaps
        assert all(shelf.heading.split(": ")[1] in ("no", "yes") for shelf in drawn)
        told = [line for shelf in drawn for card in shelf.cards for line in card.told]
        assert any("of another row" in line for line in told) == swaps
        if method.startswith("tabular"):
            assert any(line.startswith("label ") and ", " in line for line in told)
        if method.startswith("saflex"):
            assert any(line.startswith("weight x ") for line in told)

    def test_numbers_in_no_unit_of_the_file_are_scaled(
        self, tmp_path: Path, drawn: list[plots.Shelf]
    ) -> None:
        """Noise on a column of 0 and 1 changes what the network sees, but no value of the file."""
        rng = np.random.default_rng(0)
        columns = {f"flag {k}": rng.integers(0, 2, 90) for k in range(10)}
        pd.DataFrame({**columns, "ill": np.arange(90) % 2}).to_csv(tmp_path / "t.csv", index=False)
        out = tmp_path / "rows.svg"
        assert main.run(self.given(tmp_path / "t.csv", out, "gaussian_noise(sigma=0.1)")) == 0
        cards = [card for shelf in drawn for card in shelf.cards]
        assert len(drawn) == 6 and {len(shelf.cards) for shelf in drawn} == {3}
        assert all(len(card.cells) == 8 and card.more == "and 2 more" for card in cards)
        scaled = [cell for card in cards for cell in card.cells if cell[0].endswith(" (scaled)")]
        assert scaled and all(abs(float(old)) > 5 for _, old, _ in scaled)

    def test_added_rows(
        self, table: Path, tmp_path: Path, drawn: list[plots.Shelf], capsys: Said
    ) -> None:
        out = tmp_path / "rows.pdf"
        text = failed(capsys, *self.given(table, out, "lpa3(warmup=0)"))
        assert "differ in the embeddings of their categories, which are no cells" in text
        patients().drop(columns=["sex", "ward"]).to_csv(tmp_path / "t.csv", index=False)
        assert main.run(self.given(tmp_path / "t.csv", out, "lpa3(warmup=0)", "--rows", "5")) == 0
        assert [len(shelf.cards) for shelf in drawn] == [3, 2]
        for card in (card for shelf in drawn for card in shelf.cards):
            assert card.told[0] in ("label: no", "label: yes") and len(card.cells) >= 3
            assert card.told[1].startswith("predicted ") and card.told[3].startswith("norm ")

    @pytest.mark.parametrize("method", ["saflex(upstream=cell_swap(p=0.5))", "l2rw"])
    def test_extreme_weights(
        self, method: str, table: Path, tmp_path: Path, drawn: list[plots.Shelf]
    ) -> None:
        """Where nothing is augmented, the most unusual cells of a row are drawn."""
        out = tmp_path / "weight.png"
        given = self.given(table, out, method, "--by", "weight", "--epochs", "1")
        assert main.run(given) == 0 and out.exists()
        assert drawn[0].heading == "highest weight"
        cards = [card for shelf in drawn for card in shelf.cards]
        for card in cards:
            assert card.told[0].startswith("row ") and "weight x " in " ".join(card.told)
            assert bool(card.more) == (not card.cells[0][2])
        assert all(card.more.startswith("unchanged") for card in cards) == (method == "l2rw")

    def test_features(self, table: Path, tmp_path: Path) -> None:
        out = tmp_path / "features.png"
        given = self.given(table, out, "none", "--by", "embedding", "--epochs", "1")
        assert main.run(given) == 0 and out.exists()

    @pytest.mark.parametrize(
        ("method", "more", "said"),
        [
            ("boosting", (), "it trains no network and changes no row, so nothing can be drawn"),
            ("crop", (), "crop needs images, but the data are vectors"),
            ("mixup", (), "mixup needs numbers, but 2 of 6 columns are categories"),
            ("none", ("--by", "class"), "--by rows draws the augmented rows"),
            ("none", ("--by", "weight"), "--by rows draws the augmented rows"),
            ("none", ("--by", "cam", "--epochs", "1"), "heat maps lie over images"),
        ],
    )
    def test_what_cannot_be_shown(
        self, method: str, more: tuple[str, ...], said: str, table: Path, tmp_path: Path,
        capsys: Said,
    ) -> None:  # fmt: skip
        text = failed(capsys, *self.given(table, tmp_path / "x.png", method, *more))
        assert f"method: {method} cannot be shown here: " in text and said in text
        assert not list(tmp_path.iterdir())

    def test_no_text_lies_over_another(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        figures = saved_figures(monkeypatch)
        long = "a column whose name does not end $x$ 東京" * 3
        cells = [(long, long, long), ("age", "missing", "-1.235e+08"), (long, long, "")] * 2
        card = plots.Card(["5 cells of another row", long], cells, "and 33 more")
        shelves = [plots.Shelf(long, [card] * 3), plots.Shelf("", [plots.Card([], [], "")])]
        plots.shelves(shelves, long, tmp_path / "x.png")
        (figure,) = figures
        texts = [each for each in figure.findobj(Text) if each.get_text().strip()]  # type: ignore[attr-defined]
        boxes = [(each.get_text(), each.get_window_extent()) for each in texts]
        assert len(boxes) == 1 + 1 + 3 * (3 + 6 * 2 + 4 * 2) + 1
        for (one, box), (other, beside) in combinations(boxes, 2):
            flat = box.y0 + 2 >= beside.y1 or beside.y0 + 2 >= box.y1  # descenders of a line
            assert flat or box.x1 <= beside.x0 or beside.x1 <= box.x0, f"{one!r} over {other!r}"
        for text, box in boxes:
            assert box.x0 >= 0 and box.y0 >= 0, text
            assert box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, text


class TestDataSets:
    def test_lists_and_checks_the_files_of_tables(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Said
    ) -> None:
        (tmp_path / "tabular").mkdir()
        file = tmp_path / "tabular" / "biodeg.csv"
        patients().to_csv(file, index=False)
        place = ["--data", str(tmp_path)]
        assert main.run(["data", "list", *place]) == 0
        shown = capsys.readouterr().out
        assert re.search(r"qsar +on disk +CC BY 4.0\n", shown)
        assert re.search(r"credit +not on disk +DbCL 1.0\n", shown)
        assert main.run(["data", "list", "qsar", "openml:31", *place]) == 0
        shown = capsys.readouterr().out
        assert re.search(r"openml:31 +not on disk", shown) and "digits" not in shown
        for names in ((), ("qsar",)):
            assert main.run(["data", "verify", *names, *place]) == 1
            shown = capsys.readouterr().out
            assert "biodeg.csv: WRONG, MD5 " in shown and "credit" not in shown
            assert "expected 72bb5d19099965a38e0ca04565cb03c9" in shown
        entry = TABLES["qsar"]
        md5 = md5_of(file)
        monkeypatch.setitem(table_catalogue.TABLES, "qsar", replace(entry, md5=md5))  # type: ignore[arg-type]
        assert main.run(["data", "verify", *place]) == 0
        assert capsys.readouterr().out == f"biodeg.csv: correct ({file}), expected {md5}\n"
        assert main.run(["data", "verify", "credit", *place]) == 1
        assert "credit: not found; get creditcard.csv from https" in capsys.readouterr().out
        text = failed(capsys, "data", "remove", "qsar", *place)
        assert f"qsar is no streamed set, and only these are removed: its file is {file}" in text
        own = f"csv:{file}(target=ill)"
        text = failed(capsys, "data", "verify", own, *place)
        assert "expected an official data set" in text and "show describes your own" in text

    def test_doctor_names_them(self, tmp_path: Path, capsys: Said) -> None:
        (tmp_path / "tabular").mkdir()
        (tmp_path / "tabular" / "biodeg.csv").touch()
        (tmp_path / "openml").mkdir()
        (tmp_path / "openml" / "credit-g-2.json").touch()
        given = ["doctor", "--device", "cpu", "--data", str(tmp_path), "--out", str(tmp_path)]
        assert main.run(given) == 0
        shown = capsys.readouterr().out
        assert "digits (ships with scikit-learn), qsar, openml:credit-g(version=2)\n" in shown


class TestWording:
    def test_rows_are_no_images(self, table: Path, tmp_path: Path, capsys: Said) -> None:
        """From progress to report, of one's own sentences none speaks of images."""
        given = ["compare", "--benchmark", f"csv:{table}({ILL})", "--model", "mlp(width=0.1)"]
        given += ["--epochs", "1", "--seeds", "3", "--jobs", "1", "--methods", "none,cell_swap"]
        out = tmp_path / "runs"
        assert main.run([*given, "--out", str(out), "--verbose"]) == 0
        told = capsys.readouterr()
        assert "95 % CI: other seeds and test data." in told.out
        run = ["run", *given[1:7], "--out", str(tmp_path / "one")]
        assert main.run(run) == 0
        progress = capsys.readouterr().err
        assert re.search(r"epoch 1/1, loss .* rows/s, ", progress)
        assert main.run(["plan", str(out)]) == 0
        report = ["report", str(out), "--out", str(tmp_path / "report")]
        assert main.run([*report, "--format", "md,tex,csv"]) == 0
        plan = capsys.readouterr().out
        pages = [
            each.read_text()
            for each in (tmp_path / "report").rglob("*")
            if each.suffix in (".md", ".tex", ".csv")
        ]
        assert len(pages) > 10
        for text in (told.out, told.err, progress, plan, *pages):
            assert not re.search(r"\bimages?\b|img/s|pixel", text)

    def test_copies_are_the_same_cell_for_cell(self, tmp_path: Path, capsys: Said) -> None:
        twice = pd.concat([patients(30)] * 4)
        twice.to_csv(tmp_path / "t.csv", index=False)
        assert main.run(["data", "show", f"csv:{tmp_path / 't.csv'}({ILL})"]) == 0
        told = capsys.readouterr().out
        assert "test rows are in train too, cell for cell" in told and "pixel" not in told
        assert any(
            "cell for cell" in each
            for each in about_splits(
                arrays_of(parse_benchmark(f"csv:{tmp_path / 't.csv'}({ILL})"), tmp_path)
            )
        )
