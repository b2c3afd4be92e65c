"""What a user reads of a data set before the first run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.cli import main
from benchmarks.data import dataset, facts, sources
from benchmarks.data.names import Benchmark, parse_benchmark
from benchmarks.running import local
from tests import sweeping

SAMPLES = {"train": 30, "val": 9, "test": 12}


def arrays(dtype: str = "uint8", labels: int = 0) -> dataset.Arrays:
    """Three classes (or several labels a row) in images of noise, none twice."""
    rng, pairs = np.random.default_rng(0), []
    for rows in SAMPLES.values():
        x = rng.integers(0, 200, (rows, 8, 8), dtype=np.uint8)
        x = x if dtype == "uint8" else (x / 255).astype(dtype)
        y = np.arange(rows) % 3
        pairs.append(
            (x, np.stack([(y == k) | (y == 0) for k in range(labels)], 1) if labels else y)
        )
    return dataset.from_arrays("arrays", *pairs)


def told(made: dataset.Arrays, **more: bool) -> str:
    return "\n".join(facts.lines(made, Benchmark(name="npz", path="/data/own.npz"), **more))


def rows_of(text: str) -> dict[str, list[str]]:
    """The lines of the table of counts, by their first word."""
    words = [line.split() for line in text.splitlines()]
    return {each[0]: each[1:] for each in words if len(each) == 4}


def test_classes_and_their_rows_in_each_split() -> None:
    text = told(arrays())
    assert text.startswith("Data: npz:/data/own.npz, multi-class, 3 classes\n")
    assert "images: 8x8 pixels, 1 channel, uint8 from 0 to 199" in text
    counts = rows_of(text)
    for name in "012":
        assert counts[name] == ["10", "3", "4"]
    assert counts["rows"] == ["30", "9", "12"]
    assert "split: as own.npz gives it" in text
    assert "exact duplicates between splits: none" in text


def test_labels_of_several_classes_are_counted_each() -> None:
    counts = rows_of(told(arrays(labels=2)))
    assert counts["0"] == ["10", "3", "4"] and counts["1"] == ["20", "6", "8"]
    assert counts["rows"] == ["30", "9", "12"]


def test_floats_are_told_with_their_range() -> None:
    assert "float32 from 0 to 0.780392" in told(arrays("float32"))


def test_images_in_two_splits_are_counted_and_the_first_is_named() -> None:
    made = arrays()
    made.test_x[5] = made.train_x[3]
    made.test_x[7] = made.train_x[3]
    made.val_x[2] = made.train_x[0]
    made.test_x[11] = made.val_x[8]
    assert dataset.duplicates(made) == [
        "1 of 9 val images are in train too, pixel for pixel (the first is row 2 of val)",
        "2 of 12 test images are in train too, pixel for pixel (the first is row 5 of test)",
        "1 of 12 test images are in val too, pixel for pixel (the first is row 11 of test)",
    ]


def test_copies_in_data_of_ones_own_are_a_caveat_of_every_table(tmp_path: Path) -> None:
    made = arrays()
    made.test_x[5] = made.train_x[3]
    for split, images, labels in (
        ("train", made.train_x, made.train_y),
        ("val", made.val_x, made.val_y),
        ("test", made.test_x, made.test_y),
    ):
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            path = tmp_path / "set" / split / f"class{label}" / f"{number:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    stored = {
        f"{split}_{what}": getattr(made, f"{split}_{letter}")
        for split in SAMPLES
        for what, letter in (("images", "x"), ("labels", "y"))
    }
    np.savez(tmp_path / "own.npz", allow_pickle=False, **stored)
    npz = sources.load("npz", path=str(tmp_path / "own.npz"), root=tmp_path)
    folder = sources.load("folder", path=str(tmp_path / "set"), size=8, root=tmp_path)
    assert any("1 of 12 test images are in train too" in each for each in npz.caveats)
    assert any("1 of 12 test images are in train too" in each for each in folder.caveats)
    assert set(dataset.duplicates(npz)) <= set(dataset.about_splits(npz))  # not said of folds


def test_a_pixel_makes_another_image() -> None:
    made = arrays()
    made.test_x[5] = made.train_x[3]
    made.test_x[5, 0, 0] ^= 1
    assert dataset.duplicates(made) == []


def test_many_classes_take_a_line() -> None:
    made = arrays()
    names = tuple(f"class {k}" for k in range(50))
    text = told(replace(made, classes=names))
    assert "each of 50 classes" in text and "0 to 10" in text and "class 7" not in text


def test_patients_are_counted() -> None:
    made = replace(arrays(), train_groups=np.arange(30) // 5, test_groups=np.arange(12) + 100)
    assert "patients: 6 in train, 12 in test" in told(made)
    assert "patients" not in told(arrays())


def test_notes_and_caveats_stand_in_the_long_form_alone() -> None:
    made = replace(
        arrays(), notes=("split 60/20/20 by us", "2 files left out"), caveats=("for research",)
    )
    text = told(made)
    assert "split: split 60/20/20 by us" in text and text.count("60/20/20") == 1
    assert "note: 2 files left out" in text and "caveat: for research" in text
    assert "left out" not in told(made, brief=True)


def test_what_the_name_does_besides_is_told() -> None:
    benchmark = parse_benchmark("digits(noise=0.4, rows_per_class=5)")
    text = "\n".join(facts.lines(arrays(), benchmark))
    assert "applied by each run: rows_per_class=5, noise=0.4" in text


def test_show_prints_each_set_and_downloads_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(["data", "show", "digits,digits(size=28)", "--data", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert shown.count("Data: digits, multi-class, 10 classes") == 2
    assert "caveat: 8x8 images scaled to 28x28" in shown
    assert main.run(["data", "show", "breastmnist", "--data", str(tmp_path)]) == 1
    assert "downloading is off" in capsys.readouterr().err
    assert main.run(["data", "show"]) == 2
    assert "expected data sets to show" in capsys.readouterr().err


def test_they_are_read_before_the_first_run_and_not_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = ["--benchmark", "digits(rows_per_class=5)", "--model", "small_cnn", "--epochs", "1"]
    compare = ["compare", *setting, "--methods", "none", "--jobs", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(local.Processes, "carry_out", sweeping.carry_out_here)
    assert main.run([*compare, "--seeds", "1"]) == 0
    assert "Data: digits(rows_per_class=5), multi-class" in capsys.readouterr().err
    assert main.run([*compare, "--seeds", "2"]) == 0
    assert "Data:" not in capsys.readouterr().err
