"""Published numbers: marked, cited, and beside the right data sets only."""

from pathlib import Path

import pytest

from analysis import blocks, records
from analysis.report import published, results
from analysis.table import markdown
from tests.made import make_run


def test_numbers_are_those_of_the_papers() -> None:
    found = {(p.source, p.table, p.dataset, p.model, p.name): p for p in published.read("accuracy")}
    one = found["saflex", "1", "pathmnist", "resnet18", "saflex over randaugment"]
    assert (one.mean, one.std) == (95.11, 0.14) and "not stated" in one.note
    copied = found["saflex", "1", "pathmnist", "resnet18", "none"]
    assert "copied from lpa3 table 3" in copied.note
    share = found["medmnist_v2", "3", "breastmnist", "resnet18", "none"]
    assert share.mean == pytest.approx(86.3) and "best validation AUC" in share.note
    error = found["autodo", "1", "svhn(imbalance=100, noise=0.1)", "wrn28_10", "none"]
    assert error.mean == pytest.approx(100 - 20.0)
    assert "printed as an error" in error.note and "best test epoch" in error.note
    assert any(p.dataset == "breastmnist" for p in published.read("auc"))


def test_they_stand_beside_the_same_data_and_network_alone(tmp_path: Path) -> None:
    for benchmark in ("pathmnist", "breastmnist", "breastmnist(size=64)", "pathmnist(noise=0.4)"):
        make_run(tmp_path, benchmark=benchmark, model="resnet18(width=0.25)")
    (block,) = blocks.split(records.scan(tmp_path)[0])
    assert next(c.name for c in block.columns) == "breastmnist"
    rows = dict(published.beside(block, "accuracy"))
    mnist = rows["none [medmnist_v2, table 3]"]
    assert [each is not None for each in mnist] == [True, False, True, False]
    saflex = rows["saflex over randaugment [saflex, table 1]"]
    assert [each is not None for each in saflex] == [False, False, True, False]
    table = results.main_table(block, "accuracy", "accuracy", True, "last")
    text = markdown(table)
    assert "Published numbers, not ours" in text and "95.11 ± 0.14" in text
    assert "epoch: best validation AUC" in text and "copied from lpa3 table 3" in text


def test_other_networks_have_none(tmp_path: Path) -> None:
    make_run(tmp_path, benchmark="pathmnist", model="small_cnn")
    (block,) = blocks.split(records.scan(tmp_path)[0])
    assert published.beside(block, "accuracy") == []
    table = results.main_table(block, "accuracy", "accuracy", True, "last")
    assert "No published accuracy with this network on these data sets." in table.notes


def test_numbers_at_64_and_224_pixels_stand_beside_those_sizes_alone(tmp_path: Path) -> None:
    for size in (28, 64, 224):
        name = "breastmnist" if size == 28 else f"breastmnist(size={size})"
        make_run(tmp_path, benchmark=name, model="resnet18(width=0.25)")
    (block,) = blocks.split(records.scan(tmp_path)[0])
    by_size = {"breastmnist": 28, "breastmnist(size=64)": 64, "breastmnist(size=224)": 224}
    sizes = [by_size[column.key] for column in block.columns]
    rows = dict(published.beside(block, "accuracy"))
    doerrich = dict(zip(sizes, rows["none [doerrich2025, table of results]"], strict=True))
    assert {size: each and each.mean for size, each in doerrich.items()} == {
        28: 83.97, 64: 83.33, 224: 87.18,
    }  # fmt: skip
    bsda = dict(zip(sizes, rows["bsda [bsda, table of results]"], strict=True))
    assert bsda[28] is bsda[64] is None
    assert bsda[224] is not None and (bsda[224].mean, bsda[224].std) == (86.1, 1.5)
    assert "best validation AUC" in bsda[224].note and "lowest validation loss" in str(doerrich[64])
