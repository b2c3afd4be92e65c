"""Tables: how files are read, what is fitted to them, their networks and augmentations."""

from __future__ import annotations

import csv
import hashlib
import http.server
import json
import math
import re
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.preprocessing import QuantileTransformer, StandardScaler
from torch import Tensor, nn
from torch.func import functional_call

import methods
from analysis import runs
from benchmarks.cli import main
from benchmarks.contract import Case, bench, splits
from benchmarks.data import sources, tables
from benchmarks.data.carving import NotApplicable
from benchmarks.data.dataset import Arrays
from benchmarks.data.download import DataError
from benchmarks.data.names import canonical, parse_benchmark
from benchmarks.data.preparing import fit, prepared
from benchmarks.data.splits import Protocol, arrays_of, make_splits
from benchmarks.data.table_catalogue import TABLES
from benchmarks.running import disk
from benchmarks.studies import cells
from benchmarks.training import models
from benchmarks.training.evaluation import EVALUATION_BATCH
from benchmarks.training.tabular import Columns, saint
from benchmarks.training.tasks import MultiClass
from methods.base import Model, Spec
from methods.functional import directional
from methods.naming import NamingError
from methods.saflex import score
from tests.made import inputs_of

TABLE = Case(6, inputs="table")
CPU = torch.device("cpu")
EVERY: Any = None
"""rows, where scikit-learn's annotation has numbers only"""


def frame(rows: int = 60, seed: int = 0) -> pd.DataFrame:
    """Two numbers, one of them with gaps, a text of three values, and a target of two."""
    rng = np.random.default_rng(seed)
    label = np.arange(rows) % 2
    made = pd.DataFrame(
        {
            "size": rng.normal(size=rows) + label,
            "gaps": np.where(np.arange(rows) % 5 == 0, "", rng.integers(0, 9, rows).astype(str)),
            "colour": np.array(["red", "green", "blue"])[rng.integers(0, 3, rows)],
            "ill": np.where(label == 1, "yes", "no"),
        }
    )
    return made.astype(str)


def written(folder: Path, made: pd.DataFrame | str, name: str = "table.csv") -> Path:
    path = folder / name
    if isinstance(made, str):
        path.write_text(made, encoding="utf-8")
    else:
        made.to_csv(path, index=False)
    return path


def read(path: Path, arguments: str = "target=ill") -> Arrays:
    return arrays_of(parse_benchmark(f"csv:{path}({arguments})"), path.parent)


class TestReading:
    def test_types_are_inferred_and_splits_are_stratified(self, tmp_path: Path) -> None:
        arrays = read(written(tmp_path, frame()))
        assert arrays.table is not None and arrays.kind == "binary-class"
        assert [(each.name, each.kind) for each in arrays.table.columns] == [
            ("size", "number"), ("gaps", "number"), ("colour", "category"),
        ]  # fmt: skip
        assert arrays.table.columns[2].levels == ("blue", "green", "red")
        assert arrays.classes == ("no", "yes")
        assert [len(each) for each in arrays.images] == [39, 9, 12]
        for y in (arrays.train_y, arrays.val_y, arrays.test_y):
            assert abs(np.bincount(y)[0] - len(y) / 2) <= 0.5

    def test_cells_are_those_of_the_file(self, tmp_path: Path) -> None:
        made = frame()
        arrays = read(written(tmp_path, made))
        assert arrays.table is not None
        stored = np.concatenate(arrays.images)
        shown = {tuple(row) for row in tables.as_text(stored, arrays.table)}
        expected = {
            (f"{float(a):g}", f"{float(b):g}" if b else "", c)
            for a, b, c in made[["size", "gaps", "colour"]].itertuples(index=False)
        }
        assert shown == expected

    @pytest.mark.parametrize(
        ("arguments", "text"),
        [
            ("header=true", "no target: name the column that holds the classes"),
            ("target=sick", "target: no column is named 'sick': it has size, gaps, colour, ill"),
            ("target=ill, drop=[x]", "drop: no column is named 'x'"),
            ("target=ill, drop=[ill]", "is the target, so it cannot be dropped"),
            ("target=size", "60 different values: expected classes"),
            ("target=ill, rows=100", "rows=100: it has 60 rows"),
            ("target=ill, drop=[size, gaps, colour]", "no column is left beside the target"),
        ],
    )
    def test_wrong_arguments(self, arguments: str, text: str, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.setattr(tables, "MOST_CLASSES", 20)
        with pytest.raises(DataError, match=text):
            read(written(tmp_path, frame()), arguments)

    def test_bad_tables_are_refused_in_a_sentence(self, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.setattr(tables, "MOST_LEVELS", 20)
        good, rows = frame(), 60

        def refused(text: str, arguments: str = "target=ill", **columns: Any) -> None:
            with pytest.raises(DataError, match=text):
                read(written(tmp_path, good.assign(**columns)), arguments)

        refused("has one value, 'no': expected two", ill="no")
        refused("1 of 60 rows have no value in the target 'ill', the first is row 7",
                ill=["" if k == 7 else v for k, v in enumerate(good["ill"])])  # fmt: skip
        refused("1 of 60 cells are text, the first 'ten' in row 3",
                size=["ten" if k == 3 else v for k, v in enumerate(good["size"])])  # fmt: skip
        refused("60 of 60 cells are text, the first '0,1' in row 0: write numbers such as 1.5",
                size=[f"{k},1" for k in range(rows)])  # fmt: skip
        refused("50 of 60 cells are text, the first '1 %'", size=(["1 %"] * 5 + ["2"]) * 10)
        refused("has 60 categories: expected at most 20", "target=ill, categorical=[id]",
                id=[f"p{k}" for k in range(rows)])  # fmt: skip
        refused("looks like dates, such as '1.2.2020'", day=["1.2.2020", "3.4.2021"] * 30)
        refused(
            "looks like dates, such as '2020-02-30' in row 1",
            day=["2020-02-01"] + ["2020-02-30"] * 59,
        )
        for large in ("inf", "1e39"):
            refused("infinite values, or some above 3.4e", size=[large] * 2 + ["1"] * 58)
        for count, split in ((1, "val"), (3, "test")):
            refused(f"class 'maybe' has {count} rows?, and none of them is in {split}",
                    ill=["maybe"] * count + list(good["ill"][count:]))  # fmt: skip
        with pytest.raises(DataError, match="several columns are named 'a'"):
            read(written(tmp_path, "a,a,ill\n1,2,no\n3,4,yes\n"))
        with pytest.raises(DataError, match="it has no rows"):
            read(written(tmp_path, "a,ill\n"))
        with pytest.raises(DataError, match="there is no such file"):
            read(tmp_path / "none.csv")
        with pytest.raises(DataError, match="cannot be read as a CSV file"):
            read(written(tmp_path, 'a,ill\n1,no,3\n2,"yes'))
        path = written(tmp_path, good)
        path.write_text("größe,ill\n1,no\n", encoding="latin-1")
        with pytest.raises(DataError, match=r"no text in UTF-8 .*: save it as CSV in UTF-8"):
            read(path)
        with pytest.raises(DataError, match=r"\(target='is ill'\)"):
            read(written(tmp_path, good.rename(columns={"ill": "is ill"})), "header=true")

    def test_what_is_odd_is_said(self, tmp_path: Path) -> None:
        made = frame().assign(
            day=[f"2020-01-{1 + k % 28:02}" for k in range(60)],
            same=["1", "1.0", ".1e1"] * 20,
            copy=frame()["size"],
            number=[str(k) for k in range(60)],
            name=[f"patient {k}" for k in range(60)],
        )
        arrays = read(written(tmp_path, made))
        told = " | ".join(arrays.notes)
        assert "column 'day' holds dates: used as days since 1970" in told
        assert "column 'same' has one value and is left out" in told
        assert "columns 'size' and 'copy' are equal in every row" in told
        assert "column 'number' numbers the rows (an identifier?): drop=[number]" in told
        assert "column 'name' has 60 different texts in 60 rows (an identifier?)" in told
        assert arrays.table is not None
        names = [each.name for each in arrays.table.columns]
        assert names == ["size", "gaps", "colour", "day", "copy", "number"]
        days = np.concatenate(arrays.images)[:, 3]
        assert days.min() == 18262  # 2020-01-01

    def test_copies_are_dropped_and_rows_are_drawn(self, tmp_path: Path) -> None:
        twice = pd.concat([frame(), frame()])
        path = written(tmp_path, twice)
        arrays = read(path, "target=ill, dedup=true")
        assert sum(map(len, arrays.images)) == 60
        assert "60 copies of other rows are left out (dedup)" in arrays.notes
        assert any("rows are in" in each for each in read(path).caveats)
        numbered = written(tmp_path, twice.assign(id=range(120)))
        assert sum(map(len, read(numbered, "target=ill, dedup=true, drop=[id]").images)) == 60
        some = read(path, "target=ill, rows=40")
        assert sum(map(len, some.images)) == 40

    def test_what_spreadsheets_write(self, tmp_path: Path) -> None:
        """Quoted separators, an empty line in front, spaces behind commas, and an index."""
        made = frame().rename(columns={"size": "size, in cm, or\nfeet"}).to_csv(sep=";")
        spaced = "\n" + frame().to_csv(index=False, quoting=csv.QUOTE_ALL).replace(",", ", ")
        for text in (made, spaced):
            arrays = read(written(tmp_path, text, f"{len(text)}.csv"))
            assert arrays.table is not None and arrays.classes == ("no", "yes")
            assert [each.kind for each in arrays.table.columns] == ["number"] * 2 + ["category"]
            shown = {tuple(row) for row in tables.as_text(arrays.test_x, arrays.table)}
            assert {row[2] for row in shown} <= {"red", "green", "blue"}
            index = "a column without a name (an index?) is left out; a name keeps it"
            assert (index in arrays.notes) == (text == made)

    def test_words_for_infinity_among_others_are_words(self, tmp_path: Path) -> None:
        arrays = read(written(tmp_path, frame().assign(dose=["low", "infinity", "high"] * 20)))
        assert arrays.table is not None and "infinity" in arrays.table.columns[3].levels

    def test_semicolons_no_header_and_a_mark_in_front(self, tmp_path: Path) -> None:
        text = "\ufeff" + frame().to_csv(index=False, header=False, sep=";")
        arrays = read(written(tmp_path, text), "target=3, header=false")
        assert arrays.table is not None
        assert [each.name for each in arrays.table.columns] == ["0", "1", "2"]


class TestNames:
    def test_canonical(self) -> None:
        made = parse_benchmark("csv:a.csv(target=ill, rows=0, categorical=[b, a])")
        assert canonical(made) == "csv(categorical=[b, a], target=ill)"
        assert canonical(parse_benchmark("openml:31")) == "openml(id=31)"
        assert parse_benchmark("openml(id=31)") == parse_benchmark("openml:31")
        assert canonical(parse_benchmark("openml:credit-g(version=2)")) == (
            "openml(id='credit-g', version=2)"
        )
        assert canonical(parse_benchmark("qsar(folds=5)")) == "qsar(folds=5)"

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("digits(target=a)", "digits: target: expected none"),
            ("qsar(size=64)", "qsar: size: expected none, because its rows are those of tables"),
            ("qsar(target=a)", "qsar: target: expected none"),
            ("csv:a.csv(id=3)", "csv: id: expected none"),
            ("openml", "expected a number or name"),
            ("openml:a b", "expected openml:ID"),
            ("csv:a.csv(scale=log)", "scale: expected quantile or standard"),
        ],
    )
    def test_refused(self, text: str, said: str) -> None:
        with pytest.raises(NamingError, match=said):
            parse_benchmark(text)


def stored(
    arrays: Arrays, seed: int = 0, needs_meta: bool = False, text: str = "csv:a(target=ill)"
):
    return make_splits(
        arrays, parse_benchmark(text), Protocol(), needs_meta=needs_meta, seed=seed, device=CPU
    )


class TestPreparing:
    @pytest.mark.parametrize("scale", ["quantile", "standard"])
    def test_equals_scikit_learn_column_by_column(self, scale: Any, tmp_path: Path) -> None:
        arrays = read(written(tmp_path, frame(400)))
        made, (of,) = prepared(arrays, np.arange(len(arrays.train_y)), scale)
        assert of.shape == (4,) and of.categories == (0, 0, 0, 4)
        for number in (0, 1):
            train, test = arrays.train_x[:, number], arrays.test_x[:, number]
            middle = np.nanmedian(train)
            train, test = (np.where(np.isnan(x), middle, x)[:, None] for x in (train, test))
            theirs = StandardScaler() if scale == "standard" else QuantileTransformer(
                n_quantiles=len(train), output_distribution="normal", subsample=EVERY
            )  # fmt: skip
            expected = np.asarray(theirs.fit(train).transform(test))[:, 0]
            np.testing.assert_allclose(made.test_x[:, number], expected, rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(made.test_x[:, 2], np.isnan(arrays.test_x[:, 1]))
        np.testing.assert_array_equal(made.test_x[:, 3], arrays.test_x[:, 2] + 1)

    def test_nothing_of_test_or_select_leaks(self, tmp_path: Path) -> None:
        arrays = read(written(tmp_path, frame(200)))
        poisoned = arrays.test_x * 1e6, arrays.val_x - 1e6
        poisoned[0][:, 2], poisoned[1][:, 2] = -2, -2  # categories that train does not have
        other = Arrays(**{**vars(arrays), "test_x": poisoned[0], "val_x": poisoned[1]})
        one, two = stored(arrays, needs_meta=True), stored(other, needs_meta=True)
        assert torch.equal(inputs_of(one.train), inputs_of(two.train)) and one.inputs == two.inputs
        assert one.meta is not None and two.meta is not None
        assert torch.equal(one.meta.inputs(torch.arange(5)), two.meta.inputs(torch.arange(5)))
        assert (inputs_of(two.test)[:, 3] == 0).all() and not torch.equal(
            inputs_of(one.test), inputs_of(two.test)
        )

    def test_all_rows_of_a_table_see_the_same_inputs(self, tmp_path: Path) -> None:
        arrays = read(written(tmp_path, frame(200)))
        one, two = stored(arrays), stored(arrays, needs_meta=True)
        assert torch.equal(inputs_of(one.test), inputs_of(two.test))

    def test_constant_columns_of_the_training_rows_are_left_out(self, tmp_path: Path) -> None:
        arrays = read(written(tmp_path, frame(200)))
        arrays.train_x[:, 0] = 1.0
        made, (of,) = prepared(arrays, np.arange(len(arrays.train_y)), "standard")
        assert of.categories == (0, 0, 4)
        assert made.notes[-1] == "constant in the training rows, so left out: 1 column (size)"
        arrays.train_x[:] = 1.0
        with pytest.raises(NotApplicable, match="no column of the table varies"):
            prepared(arrays, np.arange(len(arrays.train_y)), "standard")

    def test_a_number_that_is_only_missing_or_one_value(self, tmp_path: Path) -> None:
        arrays = read(written(tmp_path, frame(200)))
        assert arrays.table is not None
        x = arrays.train_x.copy()
        x[:, 1] = np.where(np.isnan(x[:, 1]), np.nan, 3.0)
        fitted = fit(x, arrays.table, "standard")
        assert fitted.input.categories == (0, 0, 4)  # size, whether gaps is missing, colour
        np.testing.assert_array_equal(fitted.apply(x)[:, 1], np.isnan(x[:, 1]))

    def test_folds_are_prepared_one_by_one(self, tmp_path: Path) -> None:
        arrays = read(written(tmp_path, frame(200)))
        text = "csv:a(target=ill, folds=5, scale=standard)"
        for seed in (0, 1):
            made = stored(arrays, seed, text=text)
            assert abs(float(inputs_of(made.train)[:, 0].mean())) < 1e-5


@pytest.mark.parametrize("name", ["arrhythmia", "click", "qsar", "appetency"])
def test_the_published_counts_are_those_of_our_files(name: str) -> None:
    root, entry = sources.default_root(), TABLES[name]
    if not (root / "tabular" / entry.file).exists():
        pytest.skip(f"{entry.file} is not in AUGBENCH_DATA/tabular")
    arrays = arrays_of(parse_benchmark(name), root)
    assert arrays.verified and arrays.table is not None
    y = np.concatenate([arrays.train_y, arrays.val_y, arrays.test_y])
    assert (len(y), int(y.sum())) == (entry.published.rows, entry.published.positives)
    assert len(y) == entry.rows
    constant = sum("has one value and is left out" in each for each in arrays.notes)
    assert len(arrays.table.columns) + constant == entry.features
    assert name != "arrhythmia" or constant == 17


def test_a_table_that_is_not_here_says_where_it_is(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="it is not downloaded by itself; get it from https:"):
        arrays_of(parse_benchmark("shrutime"), tmp_path)


@pytest.fixture
def openml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A server with one set, as OpenML's is asked by scikit-learn."""
    made, asked = frame(), {"count": 0, "frame": None}
    asked["frame"] = made

    def arff() -> str:
        columns = ["@ATTRIBUTE size REAL", "@ATTRIBUTE gaps REAL",
                   "@ATTRIBUTE colour {red, green, blue}", "@ATTRIBUTE ill {no, yes}"]  # fmt: skip
        rows = [",".join(cell or "?" for cell in row) for row in made.itertuples(index=False)]
        return "\n".join(["@RELATION t", *columns, "@DATA", *rows]) + "\n"

    features = [
        {"index": str(k), "name": name, "data_type": kind, "is_target": str(name == "ill").lower(),
         "is_ignore": "false", "is_row_identifier": "false", "number_of_missing_values": "0"}
        for k, (name, kind) in enumerate(
            [("size", "numeric"), ("gaps", "numeric"), ("colour", "nominal"), ("ill", "nominal")]
        )
    ]  # fmt: skip

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked["count"] += 1
            about = {
                "id": "7",
                "name": "t",
                "description": "made for a test",
                "version": "1",
                "file_id": "9",
                "status": "active",
                "format": "ARFF",
                "url": f"{here}/data/v1/download/9/t.arff",
                "default_target_attribute": "ill",
                "md5_checksum": hashlib.md5(arff().encode(), usedforsecurity=False).hexdigest(),
            }
            answers = {
                "/api/v1/json/data/7": {"data_set_description": about},
                "/api/v1/json/data/features/7": {"data_features": {"feature": features}},
                "/api/v1/json/data/qualities/7": {"data_qualities": {"quality": []}},
            }
            if self.path in answers:
                body = json.dumps(answers[self.path]).encode()
            elif self.path.startswith("/data/v1/download/9"):
                body = arff().encode()
            else:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Silent."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    here = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    from sklearn.datasets import _openml

    for name in ("_DATA_INFO", "_DATA_FEATURES", "_DATA_QUALITIES"):
        there = getattr(_openml, name).replace("https://www.openml.org", here)
        monkeypatch.setattr(_openml, name, there)
    yield asked
    server.shutdown()
    server.server_close()


def test_openml_against_a_local_server(
    openml: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arrays = arrays_of(parse_benchmark("openml:7"), tmp_path)
    assert arrays.table is not None and arrays.classes == ("no", "yes")
    assert [each.kind for each in arrays.table.columns] == ["number", "number", "category"]
    before = openml["count"]
    again = sources.load("openml", reading=parse_benchmark("openml:7").reading, root=tmp_path)
    assert again.checksum == arrays.checksum and openml["count"] == before  # from its cache
    place = ["--data", str(tmp_path)]
    assert main.run(["data", "list", *place]) == main.run(["data", "verify", *place]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"openml:7 +on disk", shown)
    assert f"openml:7: correct, as when it was first read, MD5 {arrays.checksum}" in shown
    assert main.run(["data", "verify", "openml:8", *place]) == 1
    assert capsys.readouterr().out == "openml:8: not found\n"
    assert main.run(["data", "remove", "openml:7", *place]) == 2
    assert f"only these are removed: it is in {tmp_path / 'openml'}" in capsys.readouterr().err
    kept = next((tmp_path / "openml").glob("*.json"))
    kept.write_text(json.dumps({"md5": "0"}))
    with pytest.raises(DataError, match="is not what it was when it was first read"):
        sources.load("openml", reading=parse_benchmark("openml:7").reading, root=tmp_path)
    with pytest.raises(DataError, match="downloading is off"):
        sources.load(
            "openml", reading=parse_benchmark("openml:8").reading, root=tmp_path, download=False
        )
    with pytest.raises(DataError, match="cannot be fetched"):
        sources.load("openml", reading=parse_benchmark("openml:8").reading, root=tmp_path)


class TestMethods:
    def test_cell_swap_swaps_the_share_p_with_one_partner_a_row(self) -> None:
        ready = bench(lambda: methods.build("cell_swap(p=0.4)"), TABLE)
        batch = ready.batch(36)
        changed = []
        for step in range(60):
            out = ready.augment(batch, step=step)
            assert torch.equal(out.y, batch.y)
            for row, old in zip(out.x, batch.x, strict=True):
                moved = row != old
                fits = [(row[moved] == other[moved]).all() for other in batch.x]
                assert any(fits)
            changed.append(ready.method.captions())
        counts = [int(each.split()[0]) if each else 0 for some in changed for each in some]
        assert np.mean(counts) / 6 == pytest.approx(0.4, abs=0.02)
        other = bench(lambda: methods.build("cell_swap(p=0.4)"), TABLE)
        assert torch.equal(ready.augment(batch).x, other.augment(batch).x)

    def test_tabular_cutmix_by_hand(self) -> None:
        ready = bench(lambda: methods.build("tabular_cutmix(alpha=1.0)"), TABLE)
        batch = ready.batch(36)
        kept = set()
        for step in range(30):
            out = ready.augment(batch, step=step)
            share = (out.x == batch.x).float().mean(dim=1)
            for row in range(36):
                mine = share[row] * batch.y[row]
                rest = out.y[row] - mine  # what a partner of one class brings
                assert float(rest.sum()) == pytest.approx(float(1 - share[row]), abs=1e-6)
                assert (rest > 1e-6).sum() <= 1
            taken = {int(each.split()[0]) if each else 0 for each in ready.method.captions()}
            assert len(taken) == 1  # int(r D) columns are kept in every row of a batch
            kept |= {6 - each for each in taken}
        assert len(kept) > 3

    @pytest.mark.parametrize("text", ["mixup", "crop", "randaugment", "autodo"])
    def test_what_does_not_apply_refuses(self, text: str) -> None:
        spec = splits(TABLE, True).spec
        assert (
            methods.build(text).supports(MultiClass(), spec)
            == {
                "mixup": "mixup needs numbers, but 3 of 6 columns are categories",
                "crop": "crop needs images, but the data are vectors",
                "randaugment": "randaugment needs images, but the data are vectors",
                "autodo": "autodo needs images, but the data are vectors",
            }[text]
        )
        text = "autodo(augment=false)"
        assert methods.build(text).supports(MultiClass(), spec) == ""

    def test_noise_leaves_categories_alone(self) -> None:
        ready = bench(lambda: methods.build("gaussian_noise(sigma=1.0)"), TABLE)
        batch = ready.batch()
        out = ready.augment(batch)
        coded = torch.tensor(ready.ctx.spec.categories) > 0
        assert torch.equal(out.x[:, coded], batch.x[:, coded])
        assert (out.x[:, ~coded] != batch.x[:, ~coded]).all()

    def test_scores_of_saflex_on_categories_are_those_of_a_finite_difference(self) -> None:
        """A small step towards (row, class) lowers the meta loss by the score, in float64."""
        made = splits(TABLE, True)
        torch.manual_seed(0)
        model = models.build("mlp(width=0.03)", made.spec).double()
        assert made.meta is not None
        x, y = made.train.inputs(torch.arange(6)).double(), made.train.y[:6].double()
        far, goal = made.meta.inputs(torch.arange(12)).double(), made.meta.y[:12].double()
        task, named = MultiClass(), dict[str, Tensor](model.named_parameters())
        meta_loss = task.losses(model(far), goal).mean()
        gradient = dict(
            zip(named, torch.autograd.grad(meta_loss, list(named.values())), strict=True)
        )
        z, dz = directional(model, x, gradient)
        found = score(task, z, dz, y).labels
        for row in range(6):
            for label in range(3):
                target = torch.eye(3, dtype=torch.float64)[label][None]
                loss = task.losses(model(x[row : row + 1]), target).sum()
                step = torch.autograd.grad(loss, list(named.values()), allow_unused=True)

                def after(size: float, step: Any = step) -> float:
                    moved = {
                        name: each if move is None else each - size * move
                        for (name, each), move in zip(named.items(), step, strict=True)
                    }
                    with torch.no_grad():
                        return float(
                            task.losses(functional_call(model, moved, (far,)), goal).mean()
                        )

                slope = (after(-1e-5) - after(1e-5)) / 2e-5
                assert float(found[row, label]) == pytest.approx(slope, rel=1e-5, abs=1e-9)

    def test_lpa3_attacks_numbers_and_embeddings(self) -> None:
        ready = bench(lambda: methods.build("lpa3(warmup=0, ratio=1.0, margin=0.1)"), TABLE)
        assert ready.method.hands(ready.ctx.spec) and not ready.method.hands_logits
        batch = ready.batch()
        out = ready.augment(batch)
        model: Any = ready.ctx.model
        assert torch.equal(out.x[len(batch) :], batch.x) and out.logits is not None
        clean, attacked = out.logits.split(len(batch))
        assert torch.allclose(clean, model(batch.x)) and not torch.allclose(attacked, clean)
        (out.w @ ready.method.losses(out.logits, out, ready.ctx)).backward()
        assert all(each.grad is not None for each in model.trunk.stem.parameters())
        refused = methods.build("saflex(upstream=lpa3)").supports(MultiClass(), ready.ctx.spec)
        assert refused == (
            "saflex works on rows before this step's forward pass, which its upstream has already "
            "run"
        )
        numbers = bench(
            lambda: methods.build("lpa3(warmup=0, ratio=1.0)"), Case(6, inputs="vector")
        )
        made = numbers.augment(numbers.batch())
        assert made.logits is None and not torch.equal(made.x[8:], made.x[:8])


def spec_of(categories: tuple[int, ...] = (0, 3, 0, 5)) -> Spec:
    return Spec(4, 3, (4,), "vector", -math.inf, math.inf, categories)


def a_batch(rows: int = 7) -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 4, generator=rng)
    x[:, 1] = torch.randint(3, (rows,), generator=rng).float()
    x[:, 3] = torch.randint(5, (rows,), generator=rng).float()
    return x


class TestNetworks:
    def test_columns_are_numbers_then_embeddings(self) -> None:
        columns, x = Columns((0, 3, 0, 5), 4), a_batch()
        made = columns(x)
        assert made.shape == (7, 2 + 2 + 3) and torch.equal(made[:, :2], x[:, [0, 2]])
        tables_of = [each.weight for each in columns.embeddings if isinstance(each, nn.Embedding)]
        assert torch.equal(made[:, 2:4], tables_of[0][x[:, 1].long()])
        assert torch.equal(columns(made), made)

    def test_mlp_is_the_paper_s_on_a_table(self) -> None:
        model = models.build("mlp", spec_of(()))
        count = sum(each.numel() for each in model.parameters())
        assert count == 5 * 256 + 257 * 256 + 257 * 3
        with pytest.raises(NamingError, match="'resnet18' needs images, but the data are vec"):
            models.build("resnet18", spec_of())
        with pytest.raises(NamingError, match="'saint' needs vectors, but the data are images"):
            models.build("saint", Spec(4, 3, (1, 8, 8)))
        for text in ("mlp(layers=0)", "mlp(dropout=1.0)", "saint(depth=0)", "saint(dropout=-1.0)"):
            with pytest.raises(NamingError, match="expected"):
                models.build(text, spec_of())

    def test_saint_against_its_equations(self) -> None:
        """Written out row by row, head by head, from the weights alone, in float64."""
        torch.manual_seed(0)
        model = saint(spec_of(), depth=2, width=6, heads=2).double().eval()
        x = a_batch(5).double()
        w = {name: each.detach() for name, each in model.named_parameters()}

        def norm(v: torch.Tensor, name: str) -> torch.Tensor:
            centred = v - v.mean()
            scale = (centred.square().mean() + 1e-5).sqrt()
            return centred / scale * w[f"{name}.weight"] + w[f"{name}.bias"]

        def linear(v: torch.Tensor, name: str, bias: bool = True) -> torch.Tensor:
            return w[f"{name}.weight"] @ v + (w[f"{name}.bias"] if bias else 0)

        def attended(rows: list[torch.Tensor], name: str, each: int) -> list[torch.Tensor]:
            asked = [linear(row, f"{name}.into", bias=False) for row in rows]
            inner = 2 * each
            out = []
            for one in asked:
                parts = []
                for head in range(2):
                    at = slice(head * each, (head + 1) * each)
                    q = one[:inner][at]
                    k = [other[inner : 2 * inner][at] for other in asked]
                    v = [other[2 * inner :][at] for other in asked]
                    share = torch.stack([q @ other / each**0.5 for other in k]).softmax(0)
                    parts.append(sum(a * b for a, b in zip(share, v, strict=True)))
                out.append(linear(torch.cat(parts), f"{name}.out"))
            return out

        def block(rows: list[torch.Tensor], name: str, each: int) -> list[torch.Tensor]:
            even = [norm(row, f"{name}.norms.0") for row in rows]
            rows = [
                a + b for a, b in zip(attended(even, f"{name}.attention", each), even, strict=True)
            ]
            even = [norm(row, f"{name}.norms.1") for row in rows]
            out = []
            for row in even:
                value, gate = linear(row, f"{name}.feed.into").chunk(2)
                gated = value * 0.5 * gate * (1 + torch.erf(gate / math.sqrt(2)))
                out.append(linear(gated, f"{name}.feed.out") + row)
            return out

        rows = []
        for row in x:
            code = {1: 0, 3: 3}  # the second category begins behind the 3 values of the first
            tokens = [w["trunk.stem.whole"][0, 0]]
            for place in range(4):
                if place in code:
                    tokens.append(w["trunk.stem.embedding.weight"][int(row[place]) + code[place]])
                    continue
                number = 0 if place == 0 else 1
                first, second = w["trunk.stem.first"][number], w["trunk.stem.second"][number]
                tokens.append(
                    torch.relu(row[place] * first[0] + first[1]) @ second[:-1] + second[-1]
                )
            rows.append(tokens)
        for stage in range(0, 4, 2):
            rows = [block(tokens, f"trunk.stages.{stage}", 16) for tokens in rows]
            long = block([torch.cat(tokens) for tokens in rows], f"trunk.stages.{stage + 1}", 64)
            rows = [list(one.split(6)) for one in long]
        for row, logits in zip(rows, model(x), strict=True):
            hidden = torch.relu(linear(row[0], "hidden"))
            torch.testing.assert_close(logits, linear(hidden, "head"), rtol=1e-9, atol=1e-9)

    def test_a_row_of_saint_depends_on_those_beside_it(self) -> None:
        torch.manual_seed(0)
        model = saint(spec_of(), width=6).eval()
        assert isinstance(model, Model) and not model.rows_apart
        x = a_batch()
        assert not torch.allclose(model(x)[:3], model(x[:3]), atol=1e-6)
        entered = model.entered(x)
        assert torch.equal(model(entered), model(x))

    @pytest.mark.parametrize("make", [saint, partial(models.build, "mlp(norm=true)")])
    def test_forward_mode_is_exact(self, make: Any) -> None:
        torch.manual_seed(0)
        model = (make(spec_of(), width=6) if make is saint else make(spec_of())).double().eval()
        x, rng = a_batch().double(), torch.Generator().manual_seed(1)
        tangent = {
            name: torch.randn(each.shape, generator=rng, dtype=torch.float64)
            for name, each in model.named_parameters()
        }
        _, slope = directional(model, x, tangent)
        named = dict(model.named_parameters())

        def at(size: float) -> torch.Tensor:
            moved = {name: each + size * tangent[name] for name, each in named.items()}
            return functional_call(model, moved, (x,))

        expected = (at(1e-6) - at(-1e-6)) / 2e-6
        torch.testing.assert_close(slope, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("every", "leads"), [(2, None), (10, "auc")])
@pytest.mark.parametrize("model", ["mlp(width=0.1)", "saint(width=4)"])
def test_a_run_says_which_metric_leads_and_whether_rows_are_apart(
    every: int, leads: str | None, model: str, tmp_path: Path
) -> None:
    made = frame(200)
    made["ill"] = np.where(np.arange(len(made)) % every, "no", "yes")
    benchmark = parse_benchmark(f"csv:{written(tmp_path, made)}(target=ill)")
    protocol = Protocol()
    cell = cells.make_cell(
        cells.parse_row("none", protocol),
        benchmark,
        models.canonical(model),
        cells.training_of("medmnist", {"epochs": 1}),
        protocol,
        0,
        checksum=arrays_of(benchmark, tmp_path).checksum,
    )
    options = disk.Options(data_root=tmp_path)
    status = disk.execute(cell.run, cell.recorded, tmp_path, options, cell.benchmark)
    assert status.state == "done", status
    data = (runs.read_result(runs.folder_of(tmp_path, cell.run)) or {})["data"]
    assert data.get("leads") == leads
    told = [each for each in data["caveats"] if "test rows are not independent" in each]
    assert len(told) == model.startswith("saint")
    assert all(f"in batches of {EVALUATION_BATCH} in the order" in each for each in told)
