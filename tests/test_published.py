"""Published numbers: marked, cited, and beside the right data sets only."""

from functools import partial
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


def test_numbers_of_few_labels_stand_beside_as_many_labels_of_each_class(tmp_path: Path) -> None:
    """LP-A3's Table 1, by labels of each class."""
    for labels in ("", "(labelled=4)", "(labelled=25)"):
        make_run(tmp_path, benchmark=f"cifar10{labels}", model="wrn28_10(width=0.2)")
    (block,) = blocks.split(records.scan(tmp_path)[0])
    assert [each.key for each in block.columns][1:] == [
        "cifar10(labelled=25)",
        "cifar10(labelled=4)",
    ]
    found = {
        name: [each and (each.mean, each.std) for each in values[1:]]
        for name, values in published.beside(block, "accuracy")
        if name.endswith("[lpa3, table 1]")
    }
    assert found == {
        "fixmatch [lpa3, table 1]": [(93.81, 0.29), (89.51, 3.14)],
        "fixmatch(attack=lpa3) [lpa3, table 1]": [(94.03, 0.31), (92.39, 1.21)],
    }


def test_a_metric_that_is_not_stated_stands_beside_auc_on_any_split(tmp_path: Path) -> None:
    """SAFLEX's Table 2; the 42 numbers, digit for digit, by method over the sets in its order."""
    sets = ("appetency", "arrhythmia", "click", "credit", "qsar", "shrutime", "volkert")
    table = {
        ("mlp", "none"): "49.03 81.53 52.54 66.91 91.84 86.27 61.14",
        ("mlp", "cutmix"): "48.98 81.57 52.59 73.68 91.87 86.39 61.20",
        ("mlp", "saflex over cutmix"): "51.04 83.02 52.81 74.61 92.69 86.90 61.51",
        ("saint", "none"): "78.90 83.90 65.72 79.49 98.18 87.53 66.82",
        ("saint", "cutmix"): "81.05 85.32 65.77 79.71 98.61 87.61 68.23",
        ("saint", "saflex over cutmix"): "81.33 85.27 66.12 79.93 98.59 87.93 68.91",
    }
    found = {
        (each.model, each.name, each.dataset): each.mean
        for each in published.read("auc")
        if (each.source, each.table) == ("saflex", "2")
    }
    assert found == {
        (model, name, dataset): float(number)
        for (model, name), numbers in table.items()
        for dataset, number in zip(sets, numbers.split(), strict=True)
    }
    assert not any((p.source, p.table) == ("saflex", "2") for p in published.read("accuracy"))
    names = ("click", "qsar(folds=5)", "appetency(dedup=true, rows=20000)", "breastmnist(folds=5)")
    for benchmark in names:
        make_run(tmp_path, benchmark=benchmark, model="mlp(dropout=0.2)")
    beside = {}
    for block in blocks.split(records.scan(tmp_path)[0]):
        columns = [column.benchmark for column in block.columns]
        rows = dict(published.beside(block, "auc"))
        for name, numbers in rows.items():
            for column, each in zip(columns, numbers, strict=True):
                beside[name, column] = each and each.mean
    saflex = {name: beside["saflex over cutmix [saflex, table 2]", name] for name in names}
    assert saflex == dict(zip(names, (52.81, 92.69, None, None), strict=True))


def test_numbers_of_images_that_everybody_brings_stand_beside_folders_of_their_name(
    tmp_path: Path,
) -> None:
    """SAFLEX's Table 3; the 18 numbers, digit for digit, in the order of its columns."""
    names = (
        "none", "randaugment", "text2img", "instructpix2pix", "saflex over instructpix2pix",
        "img2img", "saflex over img2img", "img2img_finetuned", "saflex over img2img_finetuned",
    )  # fmt: skip
    table = {
        "cub": "68.60 71.26 69.68 71.38 72.34 71.25 73.22 72.01 73.61",
        "iwildcam": "57.19 61.34 64.53 67.29 69.92 70.65 72.61 70.49 72.83",
    }
    found = {
        (each.dataset, each.name): each.mean
        for each in published.read("accuracy")
        if (each.source, each.table) == ("saflex", "3")
    }
    assert found == {
        (f"folder:{dataset}", name): float(number)
        for dataset, numbers in table.items()
        for name, number in zip(names, numbers.split(), strict=True)
    }
    make = partial(make_run, benchmark="folder(size=224)", model="resnet50(weights=imagenet)")
    for name in ("cub", "other"):
        make(tmp_path, data=name, recorded={"path": f"/data/{name}"})
    beside = {}
    for block in blocks.split(records.scan(tmp_path)[0]):
        rows = dict(published.beside(block, "accuracy"))
        for place, column in enumerate(block.columns):
            beside[column.key] = rows["saflex over img2img [saflex, table 3]"][place]
    assert {key: each and each.mean for key, each in beside.items()} == {
        "folder:cub(size=224)": 73.22, "folder:other(size=224)": None,
    }  # fmt: skip
