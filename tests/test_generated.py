"""Rows from elsewhere: their draws, state, labels and files; and the generators that make some."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import methods
from analysis import metrics, runs
from analysis.runs import Run, Training
from benchmarks.cli import main
from benchmarks.contract import ROWS, Case, bench, splits
from benchmarks.data import elsewhere, generators
from benchmarks.data.carving import NotApplicable
from benchmarks.data.download import DataError
from benchmarks.data.names import parse_benchmark
from benchmarks.data.splits import Protocol, Splits, arrays_of, left_over, make_splits
from benchmarks.running import disk
from benchmarks.running.disk import Options
from benchmarks.studies import cells
from benchmarks.training.trainer import fit
from methods.generated import Generated
from methods.naming import NamingError
from tests.made import interrupt_at, saved_figures

IMAGES = Case(1)
DIGITS = "digits(rows_per_class=10)"
OF = parse_benchmark(DIGITS)


def write(path: Path, x: np.ndarray, y: Any, **more: Any) -> str:
    np.savez(path, images=x, labels=np.asarray(y), **more)
    return f"npz:{path}"


@pytest.fixture
def source(tmp_path: Path) -> str:
    """30 rows for the digits; every fifth is labelled one class too high."""
    rng, truth = np.random.default_rng(0), np.arange(30) % 10
    y = np.where(np.arange(30) % 5 == 0, (truth + 1) % 10, truth)
    x = rng.integers(0, 256, (30, 28, 28), dtype=np.uint8)
    return write(tmp_path / "rows.npz", x, y, true_labels=truth)


def digits(text: str = DIGITS) -> Splits:
    benchmark = parse_benchmark(text)
    arrays, cpu = arrays_of(benchmark, Path()), torch.device("cpu")
    return make_splits(arrays, benchmark, Protocol(), needs_meta=True, seed=0, device=cpu)


def cell_of(method: str, seed: int = 0) -> cells.Cell:
    training = Training(epochs=3, batch_size=8)
    row, benchmark = cells.parse_row(method, Protocol()), parse_benchmark(DIGITS)
    model = "small_cnn(width=0.25)"
    return cells.make_cell(row, benchmark, model, training, Protocol(), seed, checksum="c")


def execute(cell: cells.Cell, root: Path) -> dict[str, Any]:
    disk.execute(cell.run, cell.recorded, root, Options(), cell.benchmark)
    result = runs.read_result(runs.folder_of(root, cell.run))
    assert result is not None and result["status"] == "done"
    return result


class TestDraws:
    @pytest.mark.parametrize(("share", "new"), [(0.5, 4), (0.3, 2), (0.9, 7), (1.0, 8)])
    def test_a_share_of_the_batch_is_replaced(self, share: float, new: int) -> None:
        made = bench(lambda: Generated(share=share), IMAGES)
        batch = made.batch()
        out = made.augment(batch)
        kept = len(batch) - new
        for name in ("x", "y", "index"):
            assert torch.equal(getattr(out, name)[:kept], getattr(batch, name)[:kept])
        assert torch.equal(out.w, batch.w)
        rows = out.index[kept:] - ROWS
        assert made.ctx.generated is not None and len(set(rows.tolist())) == new
        known = made.ctx.generated.rows(rows)
        assert torch.equal(out.x[kept:], known.x) and torch.equal(out.y[kept:], known.y)
        assert made.method.captions() == [""] * kept + ["from elsewhere"] * new
        made.ctx.step = 1
        assert not torch.equal(made.augment(batch, step=1).index, out.index)

    def test_every_row_has_a_state_of_its_own(self) -> None:
        """Also behind unlabelled rows; and weights are learned for rows from elsewhere."""
        run = Run(
            benchmark="contract", data="", model="small_cnn(width=0.25)", method="own",
            training=Training(epochs=6, batch_size=8),
        )  # fmt: skip
        given = splits(IMAGES, True, unlabelled=True, generated=True)
        assert given.generated is not None and given.unlabelled is not None
        first = ROWS + len(given.unlabelled)
        assert given.spec.rows == first + len(given.generated)
        fitted = fit(run, given, methods.build("meta_weight_net(upstream=generated)"))
        seen = fitted.method.learned()["seen"]
        assert seen[:ROWS].sum() == seen[first:].sum() > 0 and not seen[ROWS:first].any()
        assert (seen[first:] > 0).sum() > 10
        assert fitted.method.learned()["weight"][first:].unique().numel() > 10

    @pytest.mark.parametrize(("name", "clean"), [("l2rw", 0), ("saflex", 4)])
    def test_shuffled_weights_stay_among_the_weighed_rows(self, name: str, clean: int) -> None:
        """The control over rows from elsewhere: the same rows and labels, each weight once."""
        chain = f"{name}(upstream=generated(share={1.0 if clean else 0.5}))"
        own, other = (
            bench(lambda text=text: methods.build(text), IMAGES)
            for text in (chain, f"shuffled_weights(upstream={chain})")
        )
        moved = False
        for step in range(4):
            out, shuffled = (
                each.augment(each.batch(step=step), step=step) for each in (own, other)
            )
            weighed = len(out) - clean
            assert int((out.index >= ROWS).sum()) == 4
            for field in ("x", "y", "index"):
                assert torch.equal(getattr(out, field), getattr(shuffled, field)), field
            assert torch.equal(out.w[weighed:], shuffled.w[weighed:])
            pairs = (each.w[:weighed].sort().values for each in (out, shuffled))
            assert torch.equal(*pairs)
            moved |= not torch.equal(out.w, shuffled.w)
        assert moved

    def test_without_rows_from_elsewhere_it_says_what_to_write(self) -> None:
        run = Run(benchmark="c", data="", model="small_cnn(width=0.25)", method="own")
        with pytest.raises(NotApplicable, match=r"write generated\(data='npz:FILE'\)"):
            fit(run, splits(IMAGES, False), Generated())

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ("data='rows.npz'", "expected 'npz:FILE' or 'folder:DIR', got 'rows.npz'"),
            ("data='npz:'", "expected 'npz:FILE'"),
            ("share=0", "share: expected a share"),
            ("share=1.5", "share: expected a share"),
        ],
    )
    def test_wrong_arguments_are_refused(self, arguments: str, message: str) -> None:
        with pytest.raises(NamingError, match=message):
            methods.build(f"generated({arguments})")

    def test_a_folder_of_files_is_read_by_the_name_of_the_data_set(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        method = methods.build("crop")
        assert elsewhere.rows_from(method, "digits") == ""
        method.rows_from = "npz:made"
        assert elsewhere.rows_from(method, "digits") == f"npz:{tmp_path / 'made'}"
        (tmp_path / "made").mkdir()
        assert elsewhere.rows_from(method, "digits") == f"npz:{tmp_path / 'made' / 'digits.npz'}"
        method.rows_from = "folder:made"
        assert elsewhere.rows_from(method, "digits") == f"folder:{tmp_path / 'made'}"

    def test_two_sources_are_refused(self) -> None:
        method = methods.build("saflex(upstream=generated(data='npz:a'))")
        method.rows_from = "npz:b"
        with pytest.raises(DataError, match=r"rows come from npz:a and npz:b"):
            elsewhere.rows_from(method, "digits")


class TestRead:
    def test_an_npz(self, source: str) -> None:
        made = elsewhere.with_rows(digits(), source, Path(), OF)
        assert made.generated is not None and made.truth is not None
        assert made.generated.y.argmax(dim=1)[:6].tolist() == [1, 1, 2, 3, 4, 6]
        assert made.truth[:6].tolist() == [0, 1, 2, 3, 4, 5]
        with np.load(source.removeprefix("npz:"), allow_pickle=False) as stored:
            expected = stored["images"].astype(np.float32) / 255
        x = made.generated.inputs(torch.arange(30))
        assert np.array_equal(x.numpy()[:, 0], expected)
        assert (
            made.notes[-1]
            == "30 rows from rows.npz, 6 of them known to have a wrong label; none of class 0, 5"
        )

    def test_test_images_among_them_are_called_out(self, tmp_path: Path) -> None:
        made = digits()
        x = (255 * made.test.inputs(torch.arange(4))).round().to(torch.uint8)[:, 0].numpy()
        x[3, 0, 0] ^= 1
        given = elsewhere.with_rows(made, write(tmp_path / "a.npz", x, [0, 1, 2, 3]), Path(), OF)
        told = "3 of 897 test images are among the rows from a.npz too, pixel for pixel"
        assert given.caveats == (*made.caveats, told)
        x = (255 * made.select.inputs(torch.arange(2))).round().to(torch.uint8)[:, 0].numpy()
        given = elsewhere.with_rows(made, write(tmp_path / "b.npz", x, [0, 1]), Path(), OF)
        assert "2 of " in given.caveats[-1] and "select images" in given.caveats[-1]

    def test_what_made_them_may_have_seen_more_than_a_run(
        self, source: str, tmp_path: Path
    ) -> None:
        def caveats(benchmark: str) -> tuple[str, ...]:
            return elsewhere.with_rows(digits(), source, Path(), parse_benchmark(benchmark)).caveats

        path, before = tmp_path / "rows.json", digits().caveats
        assert caveats(DIGITS) == before
        assert "may be made from test images" in caveats("digits(folds=5)")[-1]
        assert "with labelled the labelled rows differ" in caveats("digits(labelled=4)")[-1]
        path.write_text(json.dumps({"benchmark": DIGITS}))
        assert caveats(DIGITS) == before
        told = f"made from the training rows of {DIGITS}, not of digits"
        for other in ("digits", "digits(folds=5)", "digits(rows_per_class=10, labelled=4)"):
            assert told in caveats(other)[-1]
        for broken in ("{", "[1]", '{"benchmark": 3}'):
            path.write_text(broken)
            assert caveats(DIGITS) == before

    def test_a_folder_by_the_names_of_the_classes(self, tmp_path: Path) -> None:
        """In whatever order they are listed; grey images in colour where the data are."""
        for name, level in (("7", 70), ("3", 30)):
            (tmp_path / name).mkdir()
            Image.new("L", (28, 28), level).save(tmp_path / name / "a.png")
        made = elsewhere.with_rows(
            digits("digits(rows_per_class=10, as_rgb=true)"), f"folder:{tmp_path}", Path(), OF
        )
        assert made.generated is not None and made.truth is None
        levels = (255 * made.generated.inputs(torch.arange(2))).round()
        assert levels.shape == (2, 3, 28, 28)
        found = dict(zip(made.generated.y.argmax(dim=1).tolist(), levels[:, 2, 5, 5], strict=True))
        assert found == {3: 30, 7: 70}
        told = made.notes[-1]
        assert (
            told.startswith("2 rows from ") and "; none of class 0, 1, 2, 4, 5 and 3 more" in told
        )
        shutil.rmtree(tmp_path / "3")
        made = elsewhere.with_rows(digits(), f"folder:{tmp_path}", Path(), OF)
        assert made.generated is not None
        assert made.generated.y.argmax(dim=1).tolist() == [7], "a generator of one class"

    @pytest.mark.parametrize(
        ("x", "y", "more", "message"),
        [
            ((5, 14, 14), [0] * 5, {}, r"shape \(1, 14, 14\) .*those of the data \(1, 28, 28\)"),
            ((5, 28, 28, 3), [0] * 5, {}, r"shape \(3, 28, 28\)"),
            ((5, 28, 28), [0, 1, 2, 3, 10], {}, "from 0 to 9, got 10"),
            ((5, 28, 28), np.eye(5, 10, dtype=int), {}, "one class number per row"),
            ((5, 28, 28), [0] * 4, {}, "5 images and 4 labels"),
            ((5, 28, 28), [0] * 5, {"true_labels": [0] * 4}, "5 labels and 4 true_labels"),
            ((5, 28, 28), [0] * 5, {"true_labels": [11] * 5}, "from 0 to 9, got 11"),
            ((5, 28, 28), [0.5] * 5, {}, "expected integers"),
        ],
    )
    def test_what_does_not_fit_is_refused(
        self, x: tuple[int, ...], y: Any, more: dict[str, Any], message: str, tmp_path: Path
    ) -> None:
        path = write(tmp_path / "rows.npz", np.zeros(x, np.uint8), y, **more)
        with pytest.raises((NotApplicable, DataError), match=message):
            elsewhere.with_rows(digits(), path, Path(), OF)

    def test_other_files_are_refused(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "a.npz", images=np.zeros((5, 28, 28), np.uint8))
        with pytest.raises(DataError, match="has no labels"):
            elsewhere.with_rows(digits(), f"npz:{tmp_path / 'a.npz'}", Path(), OF)
        for name in ("one", "two"):
            (tmp_path / "own" / name).mkdir(parents=True)
            Image.new("L", (28, 28)).save(tmp_path / "own" / name / "a.png")
        with pytest.raises(NotApplicable, match="its folder 'one' is no class of the data"):
            elsewhere.with_rows(digits(), f"folder:{tmp_path / 'own'}", Path(), OF)
        for name in ("train", "test"):
            (tmp_path / "cut" / name).mkdir(parents=True)
            for each in ("3", "4"):
                (tmp_path / "cut" / name / each).mkdir()
                Image.new("L", (28, 28)).save(tmp_path / "cut" / name / each / "a.png")
        with pytest.raises(DataError, match="has splits"):
            elsewhere.with_rows(digits(), f"folder:{tmp_path / 'cut'}", Path(), OF)
        for kind in ("npz", "folder"):
            with pytest.raises(DataError, match=r"none does not exist: .*augbench generate makes"):
                elsewhere.version_of(f"{kind}:{tmp_path / 'none'}")
        with pytest.raises(DataError, match="is not a folder"):
            elsewhere.version_of(f"folder:{tmp_path / 'a.npz'}")
        several = replace(digits(), kind="multi-label")
        with pytest.raises(NotApplicable, match="images with one label"):
            elsewhere.with_rows(several, f"npz:{tmp_path / 'a.npz'}", Path(), OF)


class TestRuns:
    def test_the_id_is_that_of_the_content(
        self, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        before = cell_of("generated(data='npz:rows.npz')")
        assert before.recorded["rows_from"] == source  # wherever a worker stands
        assert "rows_from" not in cell_of("none").recorded
        assert before.run.versions["rows_from"] and "rows_from" not in cell_of("none").run.versions
        write(tmp_path / "rows.npz", np.zeros((9, 28, 28), np.uint8), [0] * 9)
        after = cell_of("generated(data='npz:rows.npz')")
        assert after.run.method == before.run.method and after.run.id != before.run.id
        with pytest.raises(NamingError, match="has changed since the run was planned"):
            execute(before, tmp_path / "runs")

    def test_of_a_folder_every_name_and_byte_counts(self, tmp_path: Path) -> None:
        def version() -> int:
            return elsewhere.version_of(f"folder:{tmp_path}")

        (tmp_path / "1").mkdir()
        (tmp_path / "1" / "a").write_bytes(b"abc")
        seen = [version()]
        assert version() == seen[0]
        (tmp_path / "1" / "a").write_bytes(b"abd")
        seen.append(version())
        (tmp_path / "1" / "a").rename(tmp_path / "1" / "b")
        seen.append(version())
        assert len(set(seen)) == 3

    def test_an_interrupted_run_ends_as_if_it_never_stopped(
        self, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cell = cell_of(f"saflex(upstream=generated(data='{source}'))")
        whole = execute(cell, tmp_path / "one")
        with monkeypatch.context() as patched:
            interrupt_at(20, patched)
            with pytest.raises(KeyboardInterrupt):
                execute(cell, tmp_path / "two")
        resumed = execute(cell, tmp_path / "two")
        assert resumed["resumed"] and not whole["resumed"]
        for name in ("predictions.npz", "learned.npz"):
            one, other = (
                runs.read_arrays(runs.folder_of(tmp_path / each, cell.run) / name)
                for each in ("one", "two")
            )
            assert one.keys() == other.keys()
            for key, values in one.items():
                assert np.array_equal(values, other[key], equal_nan=True), key
        assert whole["detection"] == resumed["detection"]

    def test_wrong_rows_are_found_among_those_from_elsewhere(
        self, source: str, tmp_path: Path
    ) -> None:
        """The true classes reach no method: with others, a run is the same but for what is told."""
        cell = cell_of(f"saflex(upstream=generated(data='{source}'))")
        result = execute(cell, tmp_path / "runs")
        learned = runs.read_arrays(runs.folder_of(tmp_path / "runs", cell.run) / "learned.npz")
        made = elsewhere.with_rows(digits(), source, Path(), OF)
        assert made.generated is not None and made.truth is not None
        first = len(made.train)
        assert learned["weight"].shape == (first + 30,)
        given = made.generated.y.argmax(dim=1).numpy()
        of_rows = {name: learned[name][first:] for name in ("weight", "label", "seen")}
        assert result["detection"] == metrics.detection(of_rows, given, made.truth)
        assert result["data"]["rows"]["generated"] == 30
        with np.load(source.removeprefix("npz:"), allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        np.savez(tmp_path / "poisoned.npz", **arrays | {"true_labels": arrays["labels"]})
        other = cell_of(f"saflex(upstream=generated(data='npz:{tmp_path / 'poisoned.npz'}'))")
        execute(other, tmp_path / "runs")
        for name in ("predictions.npz", "learned.npz"):
            one, two = (
                runs.read_arrays(runs.folder_of(tmp_path / "runs", each.run) / name)
                for each in (cell, other)
            )
            assert all(np.array_equal(one[key], two[key], equal_nan=True) for key in one)


class TestGenerators:
    def test_mixtures_keep_the_mean_and_covariance_of_a_class(self) -> None:
        """And stay in the span of its rows. Of one Gaussian, as the BIC finds."""
        rng = np.random.default_rng(0)
        basis = np.linalg.qr(rng.normal(size=(16, 3)))[0].T * [[0.06], [0.04], [0.02]]
        y = np.repeat([0, 1], 2000)
        flat = 0.5 + 0.1 * y[:, None] + rng.normal(size=(4000, 3)) @ basis
        x = flat.reshape(-1, 1, 4, 4)
        classes = np.arange(4000) % 2
        made = generators.mixtures(x, y, classes, 0).reshape(-1, 16)
        for name in (0, 1):
            own, real = made[classes == name], flat[y == name]
            assert np.abs(own.mean(0) - real.mean(0)).max() < 0.01
            spread = basis.T @ basis
            assert np.abs(np.cov(own.T) - spread).max() < 0.1 * spread.max()
            apart = own - real.mean(0)
            outside = apart - apart @ np.linalg.pinv(basis) @ basis
            assert np.abs(outside).max() < 6e-3  # a variance of 1e-6 is added

    def test_mixtures_draw_each_class_afresh(self) -> None:
        rng = np.random.default_rng(0)
        x = rng.normal(size=(40, 1, 3, 3))
        twice = np.concatenate([0.5 + 0.05 * x] * 2)  # two classes with the same images
        classes = np.repeat([0, 1], 40)
        made = generators.mixtures(twice, classes, classes, 0).reshape(2, 40, 9)
        apart = np.abs(made[0][:, None] - made[1][None]).max(axis=2)
        assert apart.min() > 1e-3

    def test_mixtures_find_the_parts_of_a_class(self) -> None:
        rng = np.random.default_rng(1)
        part = np.repeat([0.2, 0.8], [30, 90])
        x = (part[:, None] + 0.01 * rng.normal(size=(120, 9))).reshape(-1, 1, 3, 3)
        made = generators.mixtures(x, np.zeros(120, int), np.zeros(400, int), 0)
        means = made.mean(axis=(1, 2, 3))
        assert ((np.abs(means - 0.2) < 0.03) | (np.abs(means - 0.8) < 0.03)).all()
        assert 0.15 < (means < 0.5).mean() < 0.35
        assert (means[:200] < 0.5).mean() > 0.1  # not Gaussian by Gaussian

    def test_the_bound_is_that_of_the_paper(self) -> None:
        """-ELBO = KL(q(z|x, y) || N(0, I)) - E log p(x|z, y), at the code that the seed draws."""
        torch.manual_seed(0)
        network = generators.Autoencoder(6, 2).double()
        x, y = torch.rand(5, 6, dtype=torch.float64).round(), torch.eye(2).double()[[0, 1, 1, 0, 1]]
        torch.manual_seed(3)
        found = network.loss(x, y)
        hidden = network.encoder(torch.cat([x, y], dim=1))
        mean, scale = network.mean(hidden), (network.log_variance(hidden) / 2).exp()
        q = torch.distributions.Normal(mean, scale)
        prior = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
        apart = torch.distributions.kl_divergence(q, prior).sum(dim=1)
        torch.manual_seed(3)
        z = mean + scale * torch.randn_like(mean)
        likely = torch.distributions.Bernoulli(logits=network.decode(z, y)).log_prob(x).sum(dim=1)
        assert torch.allclose(found, (apart - likely).mean(), rtol=1e-12)

    def test_an_autoencoder_learns_the_classes(self) -> None:
        """And leaves the generators of the process as they were."""
        rng, y = np.random.default_rng(0), np.arange(80) % 2
        x = np.clip(0.1 + 0.8 * y[:, None] + 0.02 * rng.normal(size=(80, 16)), 0, 1)
        state, told = torch.get_rng_state(), []
        made, again = (
            generators.autoencoded(
                x.reshape(-1, 1, 4, 4),
                y,
                np.arange(40) % 2,
                5,
                150,
                lambda *each: told.append(each),
            )
            for _ in range(2)
        )
        assert torch.equal(torch.get_rng_state(), state)
        assert np.array_equal(made, again) and made.shape == (40, 1, 4, 4)
        means = made.mean(axis=(1, 2, 3))
        assert np.abs(means[0::2] - 0.1).max() < 0.1 and np.abs(means[1::2] - 0.9).max() < 0.1
        assert [epoch for epoch, _ in told[:150]] == list(range(1, 151))
        assert told[149][1] < told[0][1]

    def test_large_images_are_left_to_others(self) -> None:
        x = np.zeros((2, 3, 65, 64), np.float32)
        with pytest.raises(ValueError, match="use kind pca, or a generator of your own"):
            generators.autoencoded(x, np.arange(2), np.arange(2), 0, 1, print)

    def test_labels(self) -> None:
        y = np.repeat([0, 1, 2], [50, 30, 20])
        classes = generators.classes_like(y, 100, 0)
        assert np.bincount(classes).tolist() == [50, 30, 20]
        counts = np.bincount(generators.classes_like(y, 250, 0))
        assert counts.sum() == 250 and np.abs(counts - [125, 75, 50]).max() <= 25
        truth = np.arange(3000) % 3
        given = generators.mislabelled(truth, 3, 0.2, 0)
        wrong = given != truth
        assert wrong.sum() == 600
        share = (((given - truth) % 3)[wrong] == 1).mean()
        assert abs(share - 0.5) < 4 * np.sqrt(0.25 / 600)
        assert np.array_equal(generators.mislabelled(truth, 3, 0.0, 0), truth)
        assert not np.array_equal(given, generators.mislabelled(truth, 3, 0.2, 1))


class TestCommand:
    def test_rows_for_the_digits(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        figures = saved_figures(monkeypatch)
        out = tmp_path / "made"
        asked = ["--benchmark", "digits(rows_per_class=8)", "--wrong", "0.25", "--out", str(out)]
        assert main.run(["generate", *asked]) == 0
        told = capsys.readouterr().out
        assert "80 images, 20 of them with a wrong label" in told
        with np.load(out / "digits.npz", allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        assert arrays["images"].shape == (80, 28, 28) and arrays["images"].dtype == np.uint8
        assert np.bincount(arrays["true_labels"]).tolist() == [8] * 10
        assert (arrays["labels"] != arrays["true_labels"]).sum() == 20
        about = json.loads((out / "digits.json").read_text())
        assert about["benchmark"] == "digits(rows_per_class=8)" and about["wrong"] == 0.25
        assert len(figures) == 1 and (out / "digits.png").exists()
        captions = {text.get_text() for axis in figures[0].axes for text in axis.texts}
        captions |= {axis.get_xlabel() for axis in figures[0].axes}
        assert any("labelled" in text for text in captions)
        method = told.partition('--methods "')[2].partition('"')[0]
        made = elsewhere.with_rows(
            digits(), elsewhere.rows_from(methods.build(method), "digits"), Path(), OF
        )
        assert made.generated is not None and len(made.generated) == 80

    def test_a_generator_sees_the_training_rows_alone(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Other select and test images, and training images that no run has, change nothing."""
        from benchmarks.cli import generate

        benchmark = parse_benchmark("digits(rows_per_class=8)")
        arrays = arrays_of(benchmark, Path())
        others = np.setdiff1d(np.arange(len(arrays.train_y)), _used(arrays, benchmark))
        poisoned = replace(
            arrays,
            train_x=_inverted(np.asarray(arrays.train_x), others),
            val_x=255 - np.asarray(arrays.val_x),
            test_x=255 - np.asarray(arrays.test_x),
        )
        found = []
        for name, given in (("clean", arrays), ("poisoned", poisoned)):
            monkeypatch.setattr(generate, "arrays_of", lambda *_, given=given: given)
            for kind in ("pca", "vae"):
                out = tmp_path / name / kind
                asked = ["--benchmark", "digits(rows_per_class=8)", "--out", str(out)]
                assert main.run(["generate", *asked, "--kind", kind, "--epochs", "2"]) == 0
                found.append(runs.read_arrays(out / "digits.npz")["images"])
        assert np.array_equal(found[0], found[2]) and np.array_equal(found[1], found[3])
        assert not np.array_equal(found[0], found[1])

    def test_real_rows_are_those_that_no_run_has(self, tmp_path: Path) -> None:
        asked = ["--benchmark", DIGITS, "--kind", "real", "--out", str(tmp_path)]
        assert main.run(["generate", *asked]) == 0
        made = runs.read_arrays(tmp_path / "digits.npz")
        benchmark = parse_benchmark(DIGITS)
        x, y = left_over(arrays_of(benchmark, Path()), benchmark)
        known = {image.tobytes(): label for image, label in zip(x, y, strict=True)}
        assert [known[image.tobytes()] for image in made["images"]] == made["labels"].tolist()
        ours = (255 * digits().train.inputs(torch.arange(8))).round().to(torch.uint8).numpy()
        assert not {image.tobytes() for image in ours} & known.keys()
        assert len(x) == 600 - 100
        assert np.bincount(made["labels"]).tolist() == [10] * 10, "the shares of what they replace"

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("digits(folds=5)",), "got folds"),
            (("digits(labelled=4)",), "got labelled"),
            (("digits(noise=0.2)",), "got noise or imbalance"),
            (
                ("digits", "--kind", "real"),
                "of class 0 that it leaves out, there are 0: set rows_per_class",
            ),
            (("digits(rows_per_class=3)",), "class 0 has 3 rows: expected 4 or more"),
            (("digits", "--wrong", "1.5"), "wrong: expected a share"),
            (("digits", "--rows", "0"), "rows: expected 1 or more"),
            (("digitz",), "did you mean 'digits'"),
            (("digits,digits(rows_per_class=10)",), "data sets of different names"),
        ],
    )
    def test_what_it_refuses(
        self,
        arguments: tuple[str, ...],
        message: str,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        out = tmp_path / "out"
        assert main.run(["generate", "--out", str(out), "--benchmark", *arguments]) == 2
        assert message in capsys.readouterr().err and not out.exists()


def _used(arrays: Any, benchmark: Any) -> np.ndarray:
    cpu = torch.device("cpu")
    made = make_splits(arrays, benchmark, Protocol(), needs_meta=False, seed=0, device=cpu)
    return made.train.where.numpy()


def _inverted(x: np.ndarray, rows: np.ndarray) -> np.ndarray:
    x = x.copy()
    x[rows] = 255 - x[rows]
    return x


def test_the_figure_of_weights_knows_rows_from_elsewhere(source: str, tmp_path: Path) -> None:
    method = f"saflex(upstream=generated(data='{source}'))"
    out = tmp_path / "show.png"
    given = ["--benchmark", DIGITS, "--method", method, "--model", "small_cnn(width=0.25)"]
    for by in (["--by", "rows"], ["--by", "weight", "--epochs", "2"]):
        assert main.run(["show", *given, *by, "--out", str(out)]) == 0
        assert out.exists()
        out.unlink()
