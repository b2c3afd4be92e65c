"""The commands on tables: predictions of other rows, figures, data sets, wrong arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis import runs
from benchmarks.cli import main
from benchmarks.data import splits
from benchmarks.data.carving import cross_validated
from benchmarks.data.names import parse_benchmark
from benchmarks.data.splits import arrays_of

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
        sources_forget()
        text = failed(capsys, *given, f"csv:{table}")
        assert f"but {own} has changed since: its MD5 is" in text
        own.unlink()
        sources_forget()
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


def sources_forget() -> None:
    """A command reads its data once; here several are one process."""
    splits._arrays.cache_clear()


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
