"""From names to arrays: facts, splits, parsers, and every bad input as a clear error."""

import io
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from benchmarks.data import catalogue, dataset, sources
from benchmarks.data.catalogue import CATALOGUE, File
from benchmarks.data.cutting import grouped_split, stratified_split
from benchmarks.data.dataset import Arrays
from benchmarks.data.download import DataError
from benchmarks.data.npz import images_only
from benchmarks.data.ondisk import OnDisk
from benchmarks.data.sources import load, locate, verify

REAL = os.environ.get("AUGBENCH_DATA")


def real(name: str) -> Path:
    """A file of the data root, or a skip with its reason."""
    if not REAL:
        pytest.skip("AUGBENCH_DATA is not set: no real data to read")
    path = Path(REAL) / name
    if not path.is_file():
        pytest.skip(f"AUGBENCH_DATA has no {name}")
    return path


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home, so that nothing is found in the tester's own ~/.medmnist."""
    folder = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(folder))
    return folder


def example(
    n: int = 60, classes: int = 3, shape: tuple[int, ...] = (8, 8)
) -> dict[str, np.ndarray]:
    """A small valid set in the keys of MedMNIST."""
    generator = np.random.default_rng(0)
    arrays = {}
    for split, rows in (("train", n), ("val", n // 3), ("test", n // 2)):
        arrays[f"{split}_images"] = generator.integers(0, 256, (rows, *shape), np.uint8)
        arrays[f"{split}_labels"] = (np.arange(rows) % classes).astype(np.uint8)[:, None]
    return arrays


def saved(folder: Path, arrays: dict[str, np.ndarray], name: str = "own.npz") -> str:
    path = folder / name
    np.savez(path, **arrays)  # pyright: ignore[reportArgumentType]
    return str(path)


def same(a: Arrays, b: Arrays) -> bool:
    return all(
        np.array_equal(getattr(a, k)[:], getattr(b, k)[:])
        for k in ("train_x", "train_y", "val_x", "val_y", "test_x", "test_y")
    )


# ---------------------------------------------------------------- the catalogue


def test_the_catalogue_equals_medmnist() -> None:
    script = "import json, medmnist; print(json.dumps(medmnist.INFO))"
    # In a process of its own: the import takes seconds and makes a folder in the home.
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True
    )
    import json

    info = {k: v for k, v in json.loads(run.stdout).items() if not k.endswith("3d")}
    ours = {k: e for k, e in CATALOGUE.items() if e.folder == "medmnist"}
    assert list(info) == list(ours) and len(ours) == 12
    for name, facts in info.items():
        entry = ours[name]
        assert entry.name == name
        assert entry.kind == facts["task"].removesuffix(", binary-class")
        assert list(entry.classes) == list(facts["label"].values())
        assert [str(k) for k in range(len(entry.classes))] == list(facts["label"])
        assert entry.channels == facts["n_channels"]
        assert entry.counts == tuple(facts["n_samples"][s] for s in ("train", "val", "test"))
        assert entry.licence == facts["license"]
        assert entry.sizes == (28, 64, 128, 224) == tuple(entry.files)
        for size, files in entry.files.items():
            end = "" if size == 28 else f"_{size}"
            assert files == (File(f"{name}{end}.npz", facts[f"url{end}"], facts[f"MD5{end}"]),)


def test_the_other_entries() -> None:
    assert [len(CATALOGUE[n].classes) for n in ("digits", "cifar10", "cifar100", "svhn")] == [
        *(10, 10, 100, 10)
    ]
    assert list(CATALOGUE["cifar100"].classes) == sorted(set(CATALOGUE["cifar100"].classes))
    for entry in CATALOGUE.values():
        assert set(entry.files) == set(entry.sizes)
        for files in entry.files.values():
            assert all(len(f.md5) == 32 and f.url.startswith("http") for f in files)
    assert "not for clinical use" in CATALOGUE["breastmnist"].caveats
    assert "the same lesion in train and test" in CATALOGUE["dermamnist"].caveats


def test_the_catalogue_imports_nothing_heavy() -> None:
    script = "import sys, benchmarks.data.catalogue; print({'numpy', 'torch'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
    script = (
        "import sys, benchmarks.data.sources, benchmarks.data.download;"
        "print({'torch', 'sklearn', 'scipy', 'PIL', 'tqdm'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


# ---------------------------------------------------------------- splits


def test_a_split_is_exact_proportional_and_disjoint() -> None:
    labels = np.random.default_rng(1).choice(7, 1797, p=[0.4, 0.3, 0.1, 0.1, 0.05, 0.04, 0.01])
    for shares in ((600, 300, 897), (0.9, 0.1), (0.6, 0.2, 0.2), (7, 2, 1)):
        parts = stratified_split(labels, shares, 0)
        assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(1797))
        for part, share in zip(parts, shares, strict=True):
            assert np.array_equal(part, np.sort(part))
            whole = 1797 * share / sum(shares)
            assert abs(len(part) - whole) < 1
            ideal = np.bincount(labels, minlength=7) * len(part) / 1797
            assert np.abs(np.bincount(labels[part], minlength=7) - ideal).max() < 1.5
    assert [len(p) for p in stratified_split(labels, (600, 300, 897), 0)] == [600, 300, 897]


def test_a_split_is_a_function_of_its_seed() -> None:
    labels = np.arange(200) % 4
    first, again, other = (stratified_split(labels, (0.8, 0.2), s) for s in (3, 3, 4))
    assert all(map(np.array_equal, first, again))
    assert not np.array_equal(first[1], other[1])


def test_a_split_of_label_combinations() -> None:
    labels = np.random.default_rng(2).integers(0, 2, (500, 3))
    kept, cut = stratified_split(labels, (0.9, 0.1), 0)
    assert (len(kept), len(cut)) == (450, 50)
    assert np.abs(labels[cut].mean(0) - labels.mean(0)).max() < 0.05


def test_a_rare_class_stays_in_train() -> None:
    labels = np.array([0] * 99 + [1])
    kept, _ = stratified_split(labels, (0.9, 0.1), 0)
    assert 1 in labels[kept]


def split_by_group(
    labels: np.ndarray, groups: np.ndarray, shares: tuple[float, ...], seed: int = 0
) -> tuple[np.ndarray, ...]:
    """The parts, after it was checked that they are one, and that no group is in two of them."""
    parts = grouped_split(labels, groups, shares, seed)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(labels)))
    assert all(p.dtype == np.int64 and np.array_equal(p, np.sort(p)) and len(p) for p in parts)
    assert sum(len(set(groups[p].tolist())) for p in parts) == len(set(groups.tolist()))
    return parts


@pytest.mark.parametrize("shares", [(0.6, 0.2, 0.2), (0.9, 0.1), (1, 1, 1, 1, 1)])
def test_groups_are_kept_whole_and_parts_come_near_their_shares(shares: tuple[float, ...]) -> None:
    generator = np.random.default_rng(4)
    groups = (generator.random(4000) ** 3 * 300).astype(int)
    assert np.bincount(groups).max() > 500  # of 4000
    labels = generator.choice(4, 4000, p=[0.5, 0.3, 0.15, 0.05])
    for part, share in zip(split_by_group(labels, groups, shares), shares, strict=True):
        assert len(part) / 4000 == pytest.approx(share / sum(shares), abs=0.002)
        mean = np.bincount(labels[part], minlength=4) / len(part)
        assert mean == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)


def test_groups_of_one_class_are_shared_out_class_by_class() -> None:
    groups = np.repeat(np.arange(23), 8)
    labels = np.where(groups < 10, 0, np.where(groups < 20, 1, 2))
    parts = split_by_group(labels, groups, (0.6, 0.2, 0.2))
    assert [np.bincount(labels[p]).tolist() for p in parts] == [
        [48, 48, 8],
        [16, 16, 8],
        [16, 16, 8],
    ]
    rare = np.where(groups == 3, 1, 0)  # one group has all rows of a class: it is trained on
    assert set(rare[split_by_group(rare, groups, (0.9, 0.1))[0]]) == {0, 1}
    assert set(rare[split_by_group(rare, groups, (0.1, 0.9))[1]]) == {0, 1}


def test_a_split_by_group_is_a_function_of_its_seed() -> None:
    groups = np.arange(400) // 4
    labels = groups % 3
    first, again, other = (split_by_group(labels, groups, (0.8, 0.2), s) for s in (3, 3, 4))
    assert all(map(np.array_equal, first, again))
    assert not np.array_equal(first[1], other[1])
    names = np.array([f"patient {g}" for g in groups])
    assert len(split_by_group(labels, names, (0.8, 0.2))[1]) == 80


def test_as_many_groups_as_parts_fill_each_and_fewer_are_refused() -> None:
    groups = np.repeat([0, 1, 2], [50, 3, 1])
    parts = split_by_group(np.arange(54) % 2, groups, (0.6, 0.2, 0.2))
    assert [len(p) for p in parts] == [50, 3, 1]
    with pytest.raises(ValueError, match="2 groups cannot fill 3 parts"):
        grouped_split(np.arange(54) % 2, np.minimum(groups, 1), (0.6, 0.2, 0.2), 0)


def test_a_split_by_group_of_label_combinations() -> None:
    generator = np.random.default_rng(2)
    labels = generator.integers(0, 2, (600, 5)) * generator.integers(0, 2, (600, 1))
    kept, cut = split_by_group(labels, np.arange(600) // 3, (0.8, 0.2))
    assert len(cut) == pytest.approx(120, abs=3)
    assert labels[cut].mean(0) == pytest.approx(labels.mean(0), abs=0.02)
    assert labels[kept].any(0).all()


# ---------------------------------------------------------------- digits


def test_digits(tmp_path: Path) -> None:
    a, b = load("digits", root=tmp_path), load("digits", root=tmp_path, val_fraction=0.3)
    assert same(a, b) and a.checksum == b.checksum and len(a.checksum) == 32 and a.verified
    assert a.train_x.shape == (600, 28, 28) and a.train_x.dtype == np.uint8
    assert a.val_x.shape == (300, 28, 28) and a.test_x.shape == (897, 28, 28)
    assert a.train_x.max() == 255 and a.train_y.dtype == np.int64
    whole = sum(np.bincount(y, minlength=10) for y in (a.train_y, a.val_y, a.test_y))
    for y in (a.train_y, a.val_y, a.test_y):
        assert np.abs(np.bincount(y, minlength=10) - whole * len(y) / 1797).max() < 1.5
    assert list(tmp_path.iterdir()) == []


def test_digits_at_another_size(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="digits has no size 64: expected one of 28"):
        load("digits", size=64, root=tmp_path)


# ---------------------------------------------------------------- npz


def test_npz_as_stored(tmp_path: Path) -> None:
    arrays = example() | {"patient": np.arange(5)}
    a = load("npz", path=saved(tmp_path, arrays), root=tmp_path)
    assert np.array_equal(a.train_x, arrays["train_images"]) and a.train_x.dtype == np.uint8
    assert np.array_equal(a.val_y, arrays["val_labels"][:, 0]) and a.val_y.dtype == np.int64
    assert (a.name, a.kind, a.classes) == ("npz:own", "multi-class", ("0", "1", "2"))
    assert a.verified and a.notes == () and len(a.checksum) == 32


@pytest.mark.parametrize("shape", [(8, 8), (8, 6, 1), (6, 8, 3)])
@pytest.mark.parametrize("kind", [np.uint8, np.float32, np.float64])
def test_npz_shapes_and_types(tmp_path: Path, shape: tuple[int, ...], kind: type) -> None:
    arrays = example(shape=shape)
    for key in arrays:
        if key.endswith("images") and kind is not np.uint8:
            arrays[key] = (arrays[key] / 255).astype(kind)
        if key.endswith("labels"):
            arrays[key] = arrays[key][:, 0].astype(np.int32)
    a = load("npz", path=saved(tmp_path, arrays), root=tmp_path)
    assert a.train_x.shape[1:] == shape
    assert a.test_x.dtype == (np.uint8 if kind is np.uint8 else np.float32)


def test_npz_binary_and_multi_label(tmp_path: Path) -> None:
    path = saved(tmp_path, example(classes=2))
    assert load("npz", path=path, root=tmp_path).kind == "binary-class"
    arrays = example()
    generator = np.random.default_rng(0)
    for key in ("train_labels", "val_labels", "test_labels"):
        arrays[key] = generator.integers(0, 2, (len(arrays[key]), 4))
    a = load("npz", path=saved(tmp_path, arrays), root=tmp_path)
    assert a.kind == "multi-label" and a.train_y.shape == (60, 4) and a.train_y.dtype == np.uint8
    assert len(a.classes) == 4 and a.notes == ()
    for key in ("train_labels", "val_labels", "test_labels"):
        arrays[key] = np.eye(3, dtype=np.uint8)[np.arange(len(arrays[key])) % 3]
    (note,) = load("npz", path=saved(tmp_path, arrays), root=tmp_path).notes
    assert "every row has exactly one" in note


def test_npz_without_val_is_cut(tmp_path: Path) -> None:
    arrays = {k: v for k, v in example().items() if not k.startswith("val")}
    path = saved(tmp_path, arrays)
    a = load("npz", path=path, root=tmp_path, val_fraction=0.2)
    assert same(a, load("npz", path=path, root=tmp_path, val_fraction=0.2))
    assert a.notes == ("validation split cut from train: 20 %, stratified, split seed 0",)
    assert np.array_equal(np.bincount(a.val_y), [4, 4, 4]) and len(a.train_y) == 48
    joined = np.concatenate([a.train_x, a.val_x]).reshape(60, -1)
    whole = arrays["train_images"].reshape(60, -1)
    assert np.array_equal(joined[np.lexsort(joined.T)], whole[np.lexsort(whole.T)])
    b = load("npz", path=path, root=tmp_path / "root", val_fraction=0.2, memory_gib=0)
    assert isinstance(b.val_x, OnDisk) and same(a, b) and b.notes[1:] == a.notes
    with pytest.raises(DataError, match="a split without rows"):
        load("npz", path=path, root=tmp_path, val_fraction=0.001)
    with pytest.raises(DataError, match="val_fraction is 1, expected"):
        load("npz", path=path, root=tmp_path, val_fraction=1)


def change(**arrays: object) -> Callable[[dict], dict]:
    """A change that sets keys, each to an array or to a function of the old one."""

    def apply(old: dict) -> dict:
        return old | {k: v(old[k]) if callable(v) else v for k, v in arrays.items()}

    return apply


def drop(*keys: str) -> Callable[[dict], dict]:
    return lambda old: {k: v for k, v in old.items() if k not in keys}


def spoil(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def apply(x: np.ndarray) -> np.ndarray:
        x = (x / 255).astype(np.float32)
        x[3, 2, :2] = value
        return x

    return apply


BAD = {
    "no test": (drop("test_images", "test_labels"), "lacks test_images, test_labels"),
    "no train labels": (drop("train_labels"), "lacks train_labels"),
    "half a val": (drop("val_labels"), "lacks val_labels"),
    "pickled images": (
        change(train_images=np.array([np.zeros(3), np.zeros(4)], dtype=object)),
        "train_images is pickled",
    ),
    "pickled labels": (change(test_labels=lambda y: y.astype(object)), "test_labels is pickled"),
    "empty split": (
        change(val_images=lambda x: x[:0], val_labels=lambda y: y[:0]),
        "val_images: the split is empty",
    ),
    "images of rank 2": (change(train_images=lambda x: x[0]), r"train_images: the shape is \(8, 8"),
    "images of rank 5": (change(test_images=lambda x: x[..., None, None]), "expected .N, H, W."),
    "two channels": (change(test_images=lambda x: np.stack([x, x], -1)), "with C of 1"),
    "channels first": (change(test_images=lambda x: np.stack([x] * 3, 1)), "with C of 1"),
    "other N": (change(test_labels=lambda y: y[1:]), "30 test_images and 29 test_labels"),
    "other shape": (change(val_images=lambda x: x[:, 1:]), "the same in every split"),
    "other type": (change(val_images=spoil(0.5)), "the same in every split"),
    "16 bits": (change(val_images=lambda x: x.astype(np.uint16)), "the type is uint16, expected"),
    "NaN": (change(train_images=spoil(np.nan)), "train_images: 2 of 3840 values are NaN"),
    "infinite": (change(train_images=spoil(-np.inf)), "2 of 3840 values are NaN or infinite"),
    "not scaled": (change(train_images=spoil(255)), r"values are in \[0, 255\], expected \[0, 1\]"),
    "below 0": (change(train_images=spoil(-1)), r"are in \[-1, 1\]"),
    "float labels": (change(train_labels=lambda y: y / 2), "train_labels: the type is float64"),
    "text labels": (change(test_labels=lambda y: y.astype(str)), "expected integers"),
    "negative label": (change(val_labels=lambda y: y.astype(int) - 1), "run from -1 to 1"),
    "huge label": (change(val_labels=lambda y: y.astype(int) + 2**40), "out of range"),
    "test label above": (change(test_labels=lambda y: y + 1), "they hold 3, expected 0 to 2"),
    "val label above": (change(val_labels=lambda y: y + 4), "val_labels are out of range"),
    "class absent": (
        change(train_labels=lambda y: np.where(y == 1, 0, y)),
        r"no row of 1 of 3 classes \(1\)",
    ),
    "gap": (change(train_labels=lambda y: np.where(y == 2, 255, y)), "no row of 253 of 256"),
    "one class": (
        change(**{f"{s}_labels": lambda y: y * 0 for s in ("train", "val", "test")}),
        "only class 0",
    ),
    "labels of rank 3": (change(train_labels=lambda y: y[..., None]), "expected .N,., .N, 1."),
    "multi-label values": (
        change(train_labels=lambda y: np.hstack([y, y])),
        "2 labels per row with values from 0 to 2",
    ),
    "labels differ in rank": (
        change(test_labels=lambda y: np.hstack([y, y]) % 2),
        "the same number of labels per row",
    ),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("memory_gib", [4, 0])
def test_bad_npz(tmp_path: Path, case: str, memory_gib: float) -> None:
    alter, message = BAD[case]
    path = saved(tmp_path, alter(example()))
    with pytest.raises(DataError, match=message) as caught:
        load("npz", path=path, root=tmp_path / "root", memory_gib=memory_gib)
    assert str(caught.value).startswith(path)


def test_a_label_without_positives(tmp_path: Path) -> None:
    arrays = example()
    for key in ("train_labels", "val_labels", "test_labels"):
        arrays[key] = np.zeros((len(arrays[key]), 2), np.uint8)
        arrays[key][::2, 0] = 1
    with pytest.raises(DataError, match=r"no row of 1 of 2 classes \(1\)"):
        load("npz", path=saved(tmp_path, arrays), root=tmp_path)


def test_files_that_are_no_npz(tmp_path: Path) -> None:
    whole = Path(saved(tmp_path, example())).read_bytes()
    middle = bytearray(whole)
    at = whole.index(b"NUMPY") + 200
    middle[at : at + 50] = bytes(50)
    array = io.BytesIO()
    np.save(array, np.zeros(3))
    for content, message in (
        (whole[: len(whole) // 2], "is truncated"),
        (whole[:-10], "is truncated"),
        (b"", "is not an npz file"),
        (b"<html>404</html>", "is not an npz file"),
        (b"\x80\x04\x95.", "is not an npz file"),
        (array.getvalue(), "is not an npz file"),
        (bytes(middle), "train_images is damaged"),
    ):
        path = tmp_path / "bad.npz"
        path.write_bytes(content)
        for memory_gib in (4, 0):
            with pytest.raises(DataError, match=message):
                load("npz", path=str(path), root=tmp_path / "root", memory_gib=memory_gib)
    with pytest.raises(DataError, match="does not exist"):
        load("npz", path=str(tmp_path / "none.npz"), root=tmp_path)
    with pytest.raises(DataError, match="is not a file"):
        load("npz", path=str(tmp_path), root=tmp_path)
    with pytest.raises(DataError, match="npz needs a path"):
        load("npz", root=tmp_path)


def test_an_unknown_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Did you mean breastmnist"):
        load("brestmnist", root=tmp_path)


# ---------------------------------------------------------------- large files


def test_the_checksum_of_a_large_file_is_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path, example())
    first = load("npz", path=path, root=tmp_path).checksum
    monkeypatch.setattr(sources, "SIDECAR_BYTES", 0)
    assert load("npz", path=path, root=tmp_path).checksum == first
    with monkeypatch.context() as patch:
        patch.setattr(sources, "md5_of", lambda path: "never asked for")
        assert load("npz", path=path, root=tmp_path).checksum == first
    saved(tmp_path, example(n=30))
    assert load("npz", path=path, root=tmp_path).checksum != first
    (tmp_path / "cache" / "own.npz.md5.json").write_text("[]")
    assert load("npz", path=path, root=tmp_path).checksum != first


# ---------------------------------------------------------------- rounding, groups, few rows


def floats(high: float, low: float = 0, kind: type = np.float32) -> dict[str, np.ndarray]:
    """A valid set of floats whose train images hold one value `high` and one `low`."""
    arrays = example()
    for split in dataset.SPLITS:
        arrays[f"{split}_images"] = (arrays[f"{split}_images"] / 256).astype(kind)
    arrays["train_images"][3, 2, 0], arrays["train_images"][4, 0, 0] = high, low
    return arrays


@pytest.mark.parametrize("memory_gib", [4, 0])
@pytest.mark.parametrize(
    ("high", "low", "kind"),
    [(1 + 1.2e-7, -1e-9, np.float32), (1 + 5e-7, -5e-7, np.float32), (1.001, -1e-3, np.float16)],
)
def test_rounding_beyond_one_is_clipped_and_told(
    tmp_path: Path, high: float, low: float, kind: type, memory_gib: float
) -> None:
    arrays = floats(high, low, kind)
    path = saved(tmp_path, arrays)
    a = load("npz", path=path, root=tmp_path / "root", memory_gib=memory_gib)
    x = a.train_x[:]
    assert x.dtype == np.float32 and x.max() == 1 and x.min() == 0
    assert np.array_equal(x, np.clip(arrays["train_images"], 0, 1).astype(np.float32))
    assert "train_images: 2 values outside [0, 1] by rounding are clipped" in a.notes
    stored = load("npz", path=path, root=tmp_path / "root", memory_gib=memory_gib)
    assert same(a, stored)  # the copy on disk was not written to


@pytest.mark.parametrize(
    ("high", "low", "kind", "shown"),
    [
        (1.000002, 0, np.float32, r"\[0, 1\.000002\]"),
        (1 + 1.2e-5, -0.0001, np.float32, r"\[-0\.0001, 1\.000012\]"),
        (1.0000012345, -2e-6, np.float64, r"\[-0\.000002, 1\.0000012345\]"),
        (1.004, 0, np.float16, r"\[0, 1\.004\]"),
        (3e30, 0, np.float32, r"\[0, 3e\+30\]"),
    ],
)
def test_what_is_more_than_rounding_is_refused_with_all_digits(
    tmp_path: Path, high: float, low: float, kind: type, shown: str
) -> None:
    path = saved(tmp_path, floats(high, low, kind))
    with pytest.raises(DataError, match=f"train_images: the values are in {shown}, expected"):
        load("npz", path=path, root=tmp_path)


def test_a_users_own_array_is_not_written_to() -> None:
    arrays = floats(1 + 1.2e-7)
    before = arrays["train_images"].copy()
    train, val, test = (
        (arrays[f"{split}_images"], arrays[f"{split}_labels"]) for split in dataset.SPLITS
    )
    a = dataset.from_arrays("own", train, val, test)
    assert a.train_x.max() == 1 and np.array_equal(arrays["train_images"], before)


def grouped(per_group: int = 4, *, text: bool = False) -> dict[str, np.ndarray]:
    """A valid set without val split in which each few rows are of one patient."""
    arrays = {k: v for k, v in example().items() if not k.startswith("val")}
    for split, first in (("train", 0), ("test", 100)):
        numbers = first + np.arange(len(arrays[f"{split}_labels"])) // per_group
        arrays[f"{split}_groups"] = np.char.add("p", numbers.astype(str)) if text else numbers
    return arrays


@pytest.mark.parametrize("memory_gib", [4, 0])
def test_groups_of_an_npz(tmp_path: Path, memory_gib: float) -> None:
    arrays = example()
    for k, split in enumerate(dataset.SPLITS):
        arrays[f"{split}_groups"] = 100 * k + np.arange(len(arrays[f"{split}_labels"])) // 2
    path = saved(tmp_path, arrays)
    a = load("npz", path=path, root=tmp_path / "root", memory_gib=memory_gib)
    assert a.train_groups is not None and a.train_groups.dtype == np.int64
    assert a.val_groups is not None and a.test_groups is not None
    assert np.array_equal(a.train_groups, np.arange(60) // 2)
    assert len(set(a.val_groups)) == 10 and not set(a.val_groups) & set(a.test_groups)
    assert a.checksum.endswith("+groups") and a.caveats == ()
    with pytest.raises(DataError, match="npz takes no groups: only folders do"):
        load("npz", path=path, root=tmp_path, groups=1)


@pytest.mark.parametrize("text", [False, True])
def test_a_val_split_is_cut_by_group(tmp_path: Path, text: bool) -> None:
    a = load("npz", path=saved(tmp_path, grouped(text=text)), root=tmp_path, val_fraction=0.2)
    assert a.train_groups is not None and a.val_groups is not None
    assert not set(a.train_groups) & set(a.val_groups) and len(a.val_y) == 12
    assert a.notes == ("validation split cut from train: 20 %, by group (3 groups), split seed 0",)


def test_patients_in_two_splits_are_counted(tmp_path: Path) -> None:
    arrays = grouped()
    arrays["test_groups"][:9] = 3, 3, 3, 4, 4, 5, 0, 0, 0
    a = load("npz", path=saved(tmp_path, arrays), root=tmp_path)
    in_val = len({3, 4, 5, 0} & set(a.val_groups if a.val_groups is not None else ()))
    in_train = 4 - in_val
    assert any(c.startswith(f"{in_train} patient") and "train and test" in c for c in a.caveats)


BAD_GROUPS = {
    "of one split": (
        drop("test_groups"),
        "test_groups .*expected groups for every split or for none",
    ),
    "of no images": (
        change(val_groups=np.arange(3)),
        "val_groups .*expected groups for every split or for none",
    ),
    "other N": (change(test_groups=lambda g: g[1:]), "30 test_images and 29 test_groups"),
    "floats": (change(train_groups=lambda g: g / 2), "train_groups: the type is float64 of shape"),
    "of rank 2": (change(train_groups=lambda g: np.stack([g, g], 1)), r"of shape \(60, 2\)"),
    "objects": (change(train_groups=lambda g: g.astype(object)), "train_groups is pickled"),
    "unknown": (
        change(train_groups=lambda g: np.where(g == 2, -1, g)),
        "4 rows have no group .*, the first is row 8: give each of them its own group",
    ),
    "text and numbers": (
        change(test_groups=lambda g: g.astype(str)),
        "groups are strings in one split and numbers in another",
    ),
    "one patient": (
        change(train_groups=lambda g: g * 0),
        "1 groups cannot fill 2 parts: expected at least as many patients",
    ),
}


@pytest.mark.parametrize("case", BAD_GROUPS)
def test_bad_groups(tmp_path: Path, case: str) -> None:
    alter, message = BAD_GROUPS[case]
    path = saved(tmp_path, alter(grouped()))
    with pytest.raises(DataError, match=message) as caught:
        load("npz", path=path, root=tmp_path)
    assert str(caught.value).startswith(path)


def test_classes_without_rows_are_named_in_notes_and_caveats(tmp_path: Path) -> None:
    arrays = example()
    arrays["test_labels"] = np.minimum(arrays["test_labels"], 1)
    arrays["val_labels"] *= 0
    a = load("npz", path=saved(tmp_path, arrays), root=tmp_path)
    sentences = (
        "no row of 1 and 2 in val: AUC is not defined, accuracy is over 0",
        "no row of 2 in test: AUC is not defined, accuracy is over 0 and 1",
    )
    assert a.notes == a.caveats == sentences
    several = example()
    for split in dataset.SPLITS:
        several[f"{split}_labels"] = np.eye(3, dtype=np.uint8)[several[f"{split}_labels"][:, 0]]
        several[f"{split}_labels"][0] = 1
    several["test_labels"][:, 1] = 0
    a = load("npz", path=saved(tmp_path, several), root=tmp_path)
    assert a.caveats == ("no row of 1 in test: AUC is not defined",)


def test_of_many_classes_without_rows_the_first_are_named(tmp_path: Path) -> None:
    arrays = example(classes=10)
    arrays["test_labels"] = np.minimum(arrays["test_labels"], 2)
    (sentence,) = load("npz", path=saved(tmp_path, arrays), root=tmp_path).caveats
    assert sentence.startswith("no row of 3, 4, 5, 6 and 3 more classes in test")


# ---------------------------------------------------------------- official sets, made small


def test_nothing_there_and_no_download(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load("bloodmnist", size=64, root=tmp_path, download=False)
    (file,) = CATALOGUE["bloodmnist"].files[64]
    for part in (file.name, file.url, file.md5, str(tmp_path / "medmnist")):
        assert part in str(caught.value)
    with pytest.raises(DataError, match="no size 32: expected one of 28, 64, 128, 224"):
        load("bloodmnist", size=32, root=tmp_path)


def test_where_files_are_looked_for(tmp_path: Path, home: Path) -> None:
    entry = CATALOGUE["breastmnist"]
    assert locate(entry, 28, tmp_path) == [None]
    assert verify(entry, 28, tmp_path) == [(entry.files[28][0], None, None, False)]
    for folder in (home / ".medmnist", tmp_path, tmp_path / "medmnist"):
        folder.mkdir(exist_ok=True)
        (folder / "breastmnist.npz").write_bytes(b"not it")
        assert locate(entry, 28, tmp_path) == [folder / "breastmnist.npz"]
    ((_, path, md5, ok),) = verify(entry, 28, tmp_path)
    assert path == tmp_path / "medmnist" / "breastmnist.npz" and md5 and not ok
    assert locate(CATALOGUE["digits"], 28, tmp_path) == []


def archive(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def rows(n: int, classes: int, coarse: bool) -> tuple[bytes, np.ndarray, np.ndarray]:
    """A binary CIFAR file, its images (n, 32, 32, 3) and its labels, written row by row."""
    generator = np.random.default_rng(n)
    images = generator.integers(0, 256, (n, 32, 32, 3), np.uint8)
    labels = np.arange(n) % classes
    content = b""
    for image, label in zip(images, labels, strict=True):
        content += (bytes([label // 5]) if coarse else b"") + bytes([label])
        content += b"".join(image[:, :, c].tobytes() for c in range(3))
    return content, images, labels


def test_cifar10_binary(tmp_path: Path) -> None:
    files = {f"data_batch_{i}.bin": rows(20 + 10 * i, 10, False) for i in range(1, 6)}
    test = rows(10, 10, False)
    members = {f"cifar-10-batches-bin/{k}": v[0] for k, v in reversed(files.items())}
    path = tmp_path / "cifar" / "cifar-10-binary.tar.gz"
    archive(path, {"cifar-10-batches-bin/test_batch.bin": test[0], **members})
    with pytest.raises(DataError, match=r"the official cifar-10-binary\.tar\.gz has c32"):
        load("cifar10", root=tmp_path)
    a = load("cifar10", root=tmp_path, allow_unverified=True)
    assert not a.verified and "unverified file" in a.notes[0]
    assert "250/0/10 rows in train/val/test, officially 50000/0/10000" in a.notes
    assert "validation split cut from train: 10 %, stratified, split seed 0" in a.notes
    whole = np.concatenate([v[1] for v in files.values()])
    labels = np.concatenate([v[2] for v in files.values()])
    kept, cut = stratified_split(labels, (0.9, 0.1), 0)
    assert np.array_equal(a.train_x, whole[kept]) and np.array_equal(a.val_x, whole[cut])
    assert np.array_equal(a.train_y, labels[kept]) and np.array_equal(a.test_y, test[2])
    assert np.array_equal(a.test_x, test[1]) and a.classes[0] == "airplane"


def test_cifar100_binary_has_fine_labels(tmp_path: Path) -> None:
    train, test = rows(300, 100, True), rows(100, 100, True)
    path = tmp_path / "cifar-100-binary.tar.gz"
    archive(path, {"cifar-100-binary/train.bin": train[0], "cifar-100-binary/test.bin": test[0]})
    a = load("cifar100", size=32, root=tmp_path, allow_unverified=True)
    assert np.array_equal(a.test_x, test[1]) and np.array_equal(a.test_y, test[2])
    assert np.array_equal(np.sort(np.concatenate([a.train_y, a.val_y])), np.sort(train[2]))
    for members, message in (
        ({"x/train.bin": train[0]}, "lacks test.bin"),
        ({"x/train.bin": train[0][1:], "x/test.bin": test[0]}, "expected a multiple of 3074"),
        ({"x/train.bin": b"", "x/test.bin": test[0]}, "the split is empty"),
    ):
        archive(path, members)
        with pytest.raises(DataError, match=message):
            load("cifar100", root=tmp_path, allow_unverified=True)
    for content in (path.read_bytes()[:500], b"no archive", b""):
        path.write_bytes(content)
        with pytest.raises(DataError, match="is damaged"):
            load("cifar100", root=tmp_path, allow_unverified=True)


def test_svhn(tmp_path: Path) -> None:
    from scipy.io import savemat

    generator = np.random.default_rng(0)
    made = {}
    (tmp_path / "svhn").mkdir()
    for split, n in (("train", 200), ("test", 50)):
        x = generator.integers(0, 256, (32, 32, 3, n), np.uint8)
        y = (np.arange(n) % 10 + 1).astype(np.uint8)[:, None]
        savemat(tmp_path / "svhn" / f"{split}_32x32.mat", {"X": x, "y": y}, do_compression=True)
        made[split] = x, y
    a = load("svhn", root=tmp_path, allow_unverified=True)
    x, y = made["test"]
    assert all(np.array_equal(a.test_x[i], x[..., i]) for i in range(50))
    assert np.array_equal(a.test_y, y[:, 0] % 10) and len(a.val_y) == 20
    assert len(a.checksum) == 65 and not a.verified and len(a.notes) == 4
    path = tmp_path / "svhn" / "test_32x32.mat"
    for content in (path.read_bytes()[:-500], b"no mat", b""):
        path.write_bytes(content)
        with pytest.raises(DataError, match="is damaged"):
            load("svhn", root=tmp_path, allow_unverified=True)
    savemat(path, {"X": np.zeros((3, 3))})
    with pytest.raises(DataError, match="is damaged"):
        load("svhn", root=tmp_path, allow_unverified=True)


def test_an_official_name_over_other_content(tmp_path: Path) -> None:
    arrays = example(classes=2, shape=(28, 28))
    path = saved(tmp_path, arrays, "breastmnist.npz")
    with pytest.raises(DataError, match=r"has MD5 .*has 750601b1.*--allow-unverified"):
        load("breastmnist", root=tmp_path)
    a = load("breastmnist", root=tmp_path, allow_unverified=True)
    assert not a.verified and a.classes == ("malignant", "normal, benign")
    assert "60/20/30 rows in train/val/test, officially 546/78/156" in a.notes
    (note,) = load("npz", path=path, root=tmp_path).notes
    assert "named like an official file" in note
    for alter, message in (
        (change(test_labels=lambda y: y + 1), "they hold 2, expected 0 to 1"),
        (change(**{f"{s}_images": lambda x: x[:, 1:] for s in dataset.SPLITS}), "expected .28, 28"),
        (
            change(
                **{f"{s}_labels": lambda y: np.eye(2, dtype=int)[y[:, 0]] for s in dataset.SPLITS}
            ),
            "wrong shape for breastmnist",
        ),
    ):
        saved(tmp_path, alter(arrays), "breastmnist.npz")
        with pytest.raises(DataError, match=message):
            load("breastmnist", root=tmp_path, allow_unverified=True)


# ---------------------------------------------------------------- prediction


def test_images_only(tmp_path: Path) -> None:
    arrays = example()
    x, y = images_only(Path(saved(tmp_path, arrays)), tmp_path)
    assert np.array_equal(x, arrays["test_images"]) and y is not None
    assert np.array_equal(y, arrays["test_labels"][:, 0])
    mapped, _ = images_only(Path(saved(tmp_path, arrays)), tmp_path / "root", memory_gib=0)
    assert isinstance(mapped, OnDisk) and np.array_equal(mapped[:], x)
    x, y = images_only(Path(saved(tmp_path, {"images": arrays["val_images"]})), tmp_path)
    assert np.array_equal(x, arrays["val_images"]) and y is None
    for bad, message in (
        ({"x": np.zeros(3)}, "expected images"),
        ({"images": np.zeros((2, 3))}, r"images: the shape is \(2, 3\)"),
        ({"images": arrays["val_images"], "labels": np.zeros(3, int)}, "20 images and 3 labels"),
    ):
        with pytest.raises(DataError, match=message):
            images_only(Path(saved(tmp_path, bad)), tmp_path)


# ---------------------------------------------------------------- real files


@pytest.mark.parametrize("name", ["breastmnist", "pneumoniamnist"])
def test_real_medmnist(tmp_path: Path, name: str) -> None:
    path = real(f"medmnist/{name}.npz")
    root = path.parent.parent
    entry = CATALOGUE[name]
    assert verify(entry, 28, root) == [(entry.files[28][0], path, entry.files[28][0].md5, True)]
    a = load(name, root=root, download=False)
    assert (len(a.train_y), len(a.val_y), len(a.test_y)) == entry.counts
    assert a.verified and a.notes == () and a.checksum == entry.files[28][0].md5
    assert a.caveats == entry.caveats and a.kind == "binary-class"
    shutil.copy(path, tmp_path)
    b = load(name, root=tmp_path, download=False, memory_gib=0)
    assert same(a, b) and isinstance(b.test_x, OnDisk) and len(b.notes) == 1
    c = load("npz", path=str(path), root=tmp_path)
    assert same(a, c) and c.classes == entry.classes and c.caveats == entry.caveats


def test_an_altered_copy_is_refused(tmp_path: Path) -> None:
    with np.load(real("medmnist/pneumoniamnist.npz"), allow_pickle=False) as stored:
        arrays = {k: v[:3882] for k, v in stored.items()}
    saved(tmp_path, arrays, "pneumoniamnist.npz")
    with pytest.raises(DataError, match="altered or damaged copy"):
        load("pneumoniamnist", root=tmp_path)
    a = load("pneumoniamnist", root=tmp_path, allow_unverified=True)
    assert not a.verified and len(a.train_y) == 3882
    assert a.notes[0].startswith("unverified file: pneumoniamnist.npz has MD5")
    assert a.notes[1] == "3882/524/624 rows in train/val/test, officially 4708/524/624"


def test_real_cifar_subset_as_npz(tmp_path: Path) -> None:
    path = real("cifar/cifar10_subset.npz")
    a = load("npz", path=str(path), root=tmp_path)
    assert a.train_x.shape == (10800, 32, 32, 3) and len(a.val_y) == 1200
    assert len(a.test_y) == 3000 and len(a.classes) == 10
    assert catalogue.CATALOGUE["cifar10"].kind == a.kind


def test_long_numbers_of_patients_stay_apart_whatever_their_type(tmp_path: Path) -> None:
    arrays = example()
    for split, kind in (("train", np.int64), ("val", np.uint64), ("test", np.int64)):
        rows = len(arrays[f"{split}_labels"])
        arrays[f"{split}_groups"] = (1234567890123456789 + np.arange(rows)).astype(kind)
    a = load("npz", path=saved(tmp_path, arrays), root=tmp_path)
    for split in ("train", "val", "test"):
        groups = getattr(a, f"{split}_groups")
        assert len(np.unique(groups)) == len(arrays[f"{split}_labels"])
