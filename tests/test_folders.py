"""Folders of images as people have them: what is read, left out and told, or refused."""

import hashlib
import os
import struct
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.data.dataset import Arrays
from benchmarks.data.download import DataError
from benchmarks.data.layout import split_of
from benchmarks.data.sources import load


def read(folder: Path, size: int = 4, groups: int | str | None = None) -> Arrays:
    return load("folder", path=str(folder), size=size, groups=groups, root=folder / "none")


def picture(path: Path, level: int = 100, edge: int = 4) -> None:
    """A grey image, as a file whose bytes depend on no library."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"P5 %d %d 255\n" % (edge, edge) + bytes([level]) * edge * edge)


def fill(folder: Path, *classes: str, n: int = 5, first: int = 0) -> None:
    """Images 0.pgm, ... of all levels different, in the folder of each class."""
    for k, name in enumerate(classes):
        for i in range(n):
            picture(folder / name / f"{i}.pgm", first + n * k + i)


def counts(a: Arrays) -> tuple[int, int, int]:
    return len(a.train_y), len(a.val_y), len(a.test_y)


def caveats(a: Arrays) -> tuple[str, ...]:
    """Those of the folder's shape: the images of a patient here are all the same."""
    return tuple(each for each in a.caveats if "pixel for pixel" not in each)


def levels(a: Arrays) -> list[list[int]]:
    """The level of each image of train, val and test."""
    return [x[:, 0, 0].tolist() for x in (a.train_x, a.val_x, a.test_x)]


# ---------------------------------------------------------------- as before


def chunk(name: bytes, content: bytes) -> bytes:
    return (
        struct.pack(">I", len(content))
        + name
        + content
        + struct.pack(">I", zlib.crc32(name + content))
    )


def png(image: np.ndarray, depth: int, colour: int, *more: tuple[bytes, bytes]) -> bytes:
    """A PNG that is not compressed, so that its bytes are the same with every zlib."""
    rows = b"".join(b"\0" + row.tobytes() for row in image)
    head = struct.pack(">IIBBBBB", 8, len(image), depth, colour, 0, 0, 0)
    block = struct.pack("<BHH", 1, len(rows), len(rows) ^ 0xFFFF) + rows
    data = b"\x78\x01" + block + struct.pack(">I", zlib.adler32(rows))
    chunks = [(b"IHDR", head), *more, (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*c) for c in chunks)


def ordinary(folder: Path, colour: bool) -> None:
    """Images of 8x8 in formats that were always read right: names, splits and a folder deeper."""
    for split, n in (("train", 12), ("val", 4), ("test", 6)):
        for k, name in enumerate(("Zebra", "ant", "öl")):
            for i in range(n):
                grey = ((np.arange(64) * (2 * i + 3) + 50 * k) % 256).astype(np.uint8).reshape(8, 8)
                deep = (grey.astype(np.uint16) * 256 + 77).astype(">u2")
                rgb = np.stack([grey, 255 - grey, grey // 2], -1)
                opaque = np.concatenate([rgb, np.full((8, 8, 1), 255, np.uint8)], -1)
                made = [
                    ("a.pgm", b"P5 8 8 255\n" + grey.tobytes()),
                    ("b.png", png(grey, 8, 0)),
                    ("c.png", png(grey[:, :1], 1, 0)),
                    ("d.png", png(deep, 16, 0)),
                ]
                if colour:
                    made = [
                        *made,
                        ("e.png", png(rgb, 8, 2)),
                        ("f.png", png(grey % 4, 8, 3, (b"PLTE", bytes(range(12))))),
                        ("g.png", png(opaque, 8, 6)),
                        ("h.ppm", b"P6 8 8 255\n" + rgb.tobytes()),
                    ]
                file, data = made[i % len(made)]
                where = folder / split / name / ("deeper" if i == 5 else "")
                where.mkdir(parents=True, exist_ok=True)
                (where / f"{i}{file}").write_bytes(data)


EXPECTED = {  # what version 122b67d gave: checksum of the folder, MD5 of its arrays
    False: ("771d46973180da9d79fd39e508310eaa", "49585b3b48b69fa81062bb632c34b3bd"),
    True: ("40af589adb4e0af5675c878db42091d8", "97311fa853da840087e9c21d29127844"),
}


@pytest.mark.parametrize("colour", [False, True])
def test_what_was_read_right_keeps_its_checksum_and_its_pixels(
    tmp_path: Path, colour: bool
) -> None:
    ordinary(tmp_path, colour)
    a = read(tmp_path, size=8)
    digest = hashlib.md5(usedforsecurity=False)
    for array in (a.train_x, a.train_y, a.val_x, a.val_y, a.test_x, a.test_y):
        digest.update(array.tobytes())
    assert a.classes == ("Zebra", "ant", "öl")
    assert (a.checksum, digest.hexdigest()) == EXPECTED[colour]


def noise(path: Path, mode: str = "L", seed: int = 0, edge: int = 12) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (edge, edge) if mode == "L" else (edge, edge, 3)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8)).save(path)


def test_a_folder_with_splits(tmp_path: Path) -> None:
    for split, n in (("train", 20), ("test", 4)):
        for k, name in enumerate(("cat", "ant")):
            for i in range(n):
                noise(tmp_path / "set" / split / name / f"{i:02}.png", seed=100 * k + i)
    (tmp_path / "set" / "train" / "cat" / ".DS_Store").write_bytes(b"?")
    path = str(tmp_path / "set")
    a = load("folder", path=path, size=8, root=tmp_path)
    assert a.classes == ("ant", "cat") and a.name == "folder:set" and a.kind == "binary-class"
    assert a.train_x.shape == (36, 8, 8) and a.val_x.shape == (4, 8, 8)
    assert np.array_equal(a.test_y, [0] * 4 + [1] * 4)
    assert a.notes == ("validation split cut from train: 10 %, stratified, split seed 0",)
    with Image.open(tmp_path / "set" / "test" / "ant" / "00.png") as image:
        small = np.asarray(image.resize((8, 8), Image.Resampling.BILINEAR))
    assert np.array_equal(a.test_x[0], small)
    assert a.checksum == load("folder", path=path, size=9, root=tmp_path).checksum
    noise(tmp_path / "set" / "val" / "cat" / "x.png", mode="RGB", seed=7)
    noise(tmp_path / "set" / "val" / "ant" / "y.png", mode="RGB", seed=8)
    b = load("folder", path=path, size=8, root=tmp_path)
    assert b.train_x.shape == (40, 8, 8, 3) and b.val_x.shape == (2, 8, 8, 3)
    assert b.checksum != a.checksum and b.notes == ()
    assert np.array_equal(b.test_x, np.repeat(a.test_x[..., None], 3, -1))
    bad = tmp_path / "set" / "val" / "cat" / "bad.png"
    bad.write_bytes((tmp_path / "set" / "val" / "cat" / "x.png").read_bytes()[:100])
    with pytest.raises(DataError, match=r"bad\.png cannot be read as an image"):
        load("folder", path=path, size=8, root=tmp_path)
    bad.unlink()
    noise(tmp_path / "set" / "val" / "dog" / "x.png")
    with pytest.raises(DataError, match="has the class 'dog', which train/ lacks"):
        load("folder", path=path, size=8, root=tmp_path)


def test_a_folder_without_splits(tmp_path: Path) -> None:
    for k, name in enumerate("abc"):
        for i in range(10):
            noise(tmp_path / "set" / name / f"{i}.jpg", seed=100 * k + i)
    a = load("folder", path=str(tmp_path / "set"), root=tmp_path)
    assert a.train_x.shape == (18, 28, 28)
    assert all(np.array_equal(np.bincount(y), [2, 2, 2]) for y in (a.val_y, a.test_y))
    assert a.notes == ("split 60/20/20 into train/val/test, stratified, split seed 0",)
    again = load("folder", path=str(tmp_path / "set"), root=tmp_path)
    assert np.array_equal(a.train_x, again.train_x) and np.array_equal(a.test_y, again.test_y)


def test_bad_folders(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    with pytest.raises(DataError, match="does not exist"):
        load("folder", path=str(folder), root=tmp_path)
    noise(folder / "train" / "a" / "0.png")
    with pytest.raises(DataError, match="has train/ but no test/"):
        load("folder", path=str(folder), root=tmp_path)
    (folder / "test").mkdir()
    with pytest.raises(DataError, match="has 1 folders: expected 2 or more, one per class"):
        load("folder", path=str(folder), root=tmp_path)
    (folder / "train" / "b").mkdir()
    with pytest.raises(DataError, match="is empty"):
        load("folder", path=str(folder), root=tmp_path)
    noise(folder / "test" / "a" / "0.png")
    with pytest.raises(DataError, match="a split without rows"):
        load("folder", path=str(folder), root=tmp_path)
    with pytest.raises(DataError, match="size is 0"):
        load("folder", path=str(folder), size=0, root=tmp_path)


def test_files_whose_pixels_are_others_now_change_the_checksum(tmp_path: Path) -> None:
    fill(tmp_path, "a", "b")
    image = Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4))
    exif = Image.Exif()
    exif[0x0112] = 3
    image.save(tmp_path / "a" / "turned.png", exif=exif)
    image.putalpha(100)
    image.save(tmp_path / "b" / "clear.png")

    def checksum(*words: str) -> str:
        """The MD5 of names and bytes, with the words behind the files that have one."""
        digest = hashlib.md5(usedforsecurity=False)
        for file in sorted(tmp_path.glob("?/*")):
            data = file.read_bytes()
            name = file.relative_to(tmp_path).as_posix()
            digest.update(f"{name}\0{len(data)}\0".encode() + data)
            if words and file.suffix == ".png":
                digest.update(f"\0{words[file.stem == 'clear']}\0".encode())
        return digest.hexdigest()

    assert read(tmp_path).checksum == checksum("turned", "ground") != checksum()
    for file in tmp_path.glob("?/*.png"):
        file.unlink()
    assert read(tmp_path).checksum == checksum()


# ---------------------------------------------------------------- splits


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("train", "val", "test"),
        ("Training", "Validation", "Testing"),
        ("TRAIN", "valid", "Test"),
        ("training_set", "val set", "testset"),
    ],
)
def test_splits_by_their_usual_names(tmp_path: Path, train: str, val: str, test: str) -> None:
    for split, n in ((train, 5), (val, 2), (test, 3)):
        fill(tmp_path / split, "a", "b", n=n)
    a = read(tmp_path)
    assert a.classes == ("a", "b") and counts(a) == (10, 4, 6) and a.notes == ()
    assert levels(a) == [[*range(10)], [*range(4)], [*range(6)]]


def test_names_that_stand_for_a_split() -> None:
    assert [split_of(n) for n in ("valid", "Train-Set", "TEST")] == ["val", "train", "test"]
    for name in ("invalid", "trains", "test1", "dev", "pretrain", "set", ""):
        assert split_of(name) is None


def test_two_folders_for_one_split_are_refused(tmp_path: Path) -> None:
    for split in ("train", "Training", "test"):
        fill(tmp_path / split, "a", "b")
    with pytest.raises(
        DataError, match="has Training/ and train/, which both mean the train split"
    ):
        read(tmp_path)


def test_a_train_folder_without_a_test_folder_names_what_lies_beside_it(tmp_path: Path) -> None:
    fill(tmp_path / "train", "a", "b")
    fill(tmp_path / "other", "a", "b")
    with pytest.raises(DataError, match=r"has train/ but no test/ \(next to it: other/\): add it"):
        read(tmp_path)


@pytest.mark.parametrize(
    "names", [("seg_train", "seg_test", "seg_pred"), ("train2017", "val2017"), ("test", "val")]
)
def test_folders_that_only_look_like_splits_are_never_classes(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    fill(tmp_path, *names)
    with pytest.raises(DataError, match="look like splits: name them train/, test/"):
        read(tmp_path)


def test_a_class_may_be_named_like_a_split_where_there_is_no_train_folder(tmp_path: Path) -> None:
    fill(tmp_path, "valid", "invalid")
    a = read(tmp_path)
    assert a.classes == ("invalid", "valid")
    assert "named like a split, but read as a class: valid" in a.notes


def test_splits_below_classes_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        fill(tmp_path / name, "train", "test")
    with pytest.raises(DataError, match="expected splits above classes"):
        read(tmp_path)


def test_a_folder_in_a_folder_is_named(tmp_path: Path) -> None:
    fill(tmp_path / "set" / "train", "a", "b")
    with pytest.raises(
        DataError, match=r"has 1 folders: expected 2 or more, one per class, .* \(is set the one"
    ):
        read(tmp_path)


def test_what_lies_beside_splits_and_classes_is_told(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        fill(tmp_path / split, "a", "b", n=2)
    fill(tmp_path, "masks")
    picture(tmp_path / "train" / "lost.pgm")
    picture(tmp_path / "found.pgm")
    (tmp_path / "README.txt").write_text("a text beside splits is no image that is missed")
    a = read(tmp_path)
    assert counts(a) == (4, 4, 4)
    assert a.notes == (
        "folders next to the splits are left out: masks/ (only val/, valid/ and validation/ are "
        "a validation split)",
        "next to the class folders, so left out: 2, the first found.pgm",
    )


# ---------------------------------------------------------------- hidden, links


def test_hidden_folders_and_those_of_systems_hold_no_data(tmp_path: Path) -> None:
    fill(tmp_path, "a", "b")
    checksum = read(tmp_path).checksum
    for folder in (".ipynb_checkpoints", "@eaDir", "lost+found", ".git"):
        fill(tmp_path / "a", folder)
        fill(tmp_path / "b" / "deep", folder)
    for folder in ("__MACOSX", "$RECYCLE.BIN", ".cache"):
        fill(tmp_path, folder)
    for name in ("._0.pgm", "Thumbs.db", "desktop.ini", ".DS_Store", "thumbs.DB"):
        (tmp_path / "a" / name).write_bytes(b"\0\5\26\7")
    a = read(tmp_path)
    assert counts(a) == (6, 2, 2) and a.classes == ("a", "b") and a.checksum == checksum
    assert "hidden or system files, so left out: 12, the first $RECYCLE.BIN" in a.notes


def test_links_are_followed(tmp_path: Path) -> None:
    fill(tmp_path / "store", "a", "b", "c")
    fill(tmp_path / "set", "a")
    (tmp_path / "set" / "b").symlink_to(tmp_path / "store" / "b")
    (tmp_path / "set" / "a" / "more").symlink_to(tmp_path / "store" / "c")
    (tmp_path / "set" / "a" / "one.pgm").symlink_to(tmp_path / "store" / "a" / "3.pgm")
    assert sum(counts(read(tmp_path / "set"))) == 16


def test_a_folder_that_is_reached_twice_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, "a", "b")
    (tmp_path / "a" / "again").symlink_to(tmp_path / "b")
    with pytest.raises(DataError, match=r"a/again and .*b are|b and .*a/again are the same folder"):
        read(tmp_path)
    (tmp_path / "a" / "again").unlink()
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    with pytest.raises(DataError, match="are the same folder because of a link"):
        read(tmp_path)


def test_links_to_nothing_are_counted_and_named(tmp_path: Path) -> None:
    fill(tmp_path, "a", "b")
    for i in range(3):
        (tmp_path / "b" / f"x{i}.pgm").symlink_to(f"/not-mounted/b/x{i}.pgm")
    with pytest.raises(
        DataError, match=r"has 3 broken links, the first .*b/x0\.pgm -> /not-mounted/b/x0\.pgm"
    ):
        read(tmp_path)


# ---------------------------------------------------------------- files that are no images


def test_texts_beside_images_are_left_out_and_told(tmp_path: Path) -> None:
    fill(tmp_path, "a", "b")
    checksum = read(tmp_path).checksum
    (tmp_path / "a" / "README.txt").write_text("taken in May")
    (tmp_path / "b" / "labels.csv").write_text("file,label\n")
    a = read(tmp_path)
    assert sum(counts(a)) == 10 and a.checksum == checksum
    assert "text files among the images are left out: 2, the first a/README.txt" in a.notes


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x.dcm", bytes(128) + b"DICM", r"x\.dcm is a DICOM file, which is not read: convert it"),
        ("x.npy", b"\x93NUMPY", r"x\.npy is a numpy array, which is not read"),
        ("x.png", b"", r"x\.png cannot be read as an image \(it is empty, 0 bytes\)"),
        ("x.bin", b"?", r"x\.bin cannot be read as an image \(no format that is known\): repair"),
        ("x.txt", b"", r"x\.txt cannot be read as an image \(it is empty"),
    ],
)
def test_other_files_are_refused_by_name(
    tmp_path: Path, name: str, data: bytes, message: str
) -> None:
    fill(tmp_path, "a", "b")
    (tmp_path / "a" / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        read(tmp_path)


def test_what_is_done_to_images_is_counted(tmp_path: Path) -> None:
    fill(tmp_path, "a", "b")
    for i in range(3):
        Image.new("RGBA", (4, 5), (1, 2, 3, 0)).save(tmp_path / "a" / f"{i}.png")
    notes = read(tmp_path).notes
    assert "3 images with transparency composited on black" in notes
    assert "3 images that are not square squeezed to a square" in notes


# ---------------------------------------------------------------- sixteen bits


def deep(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4), value, np.uint16)).save(path)


def test_sixteen_bits_that_use_their_range_are_scaled_dark_images_too(tmp_path: Path) -> None:
    for name, value in (("a", 900), ("b", 40000)):
        for i in range(5):
            deep(tmp_path / name / f"{i}.png", value)
    a = read(tmp_path)
    assert a.train_x.ndim == 3 and set(np.unique(a.train_x)) == {900 >> 8, 40000 >> 8}
    assert "10 images of more than 8 bits per channel reduced to 8" in a.notes


def test_sixteen_bits_of_which_no_image_uses_the_range_are_refused(tmp_path: Path) -> None:
    fill(tmp_path, "a")
    for i in range(5):
        deep(tmp_path / "b" / f"{i}.png", 4000 + i)
    with pytest.raises(
        DataError,
        match=r"has 5 images of 16 bits in which no value exceeds 4004 .*b/4\.png.*8 bits",
    ):
        read(tmp_path)


# ---------------------------------------------------------------- names


def test_an_accent_stored_apart_is_the_same_class(tmp_path: Path) -> None:
    composed, apart = (unicodedata.normalize(form, "né") for form in ("NFC", "NFD"))
    for split, name in (("train", apart), ("test", composed)):
        fill(tmp_path / split, name, "b", n=10)
    a = read(tmp_path)
    assert a.classes == ("b", composed) and counts(a) == (18, 2, 20)
    fill(tmp_path / "test", apart)
    with pytest.raises(DataError, match=f"two folders for the class '{composed}'"):
        read(tmp_path)


def test_a_name_is_one_line_of_text(tmp_path: Path) -> None:
    fill(tmp_path, "new\nline", "\u202eolleh")
    assert read(tmp_path).classes == (r"new\nline", r"\u202eolleh")


def test_images_without_folders_of_classes_are_counted(tmp_path: Path) -> None:
    for i in range(3):
        picture(tmp_path / f"{i}.pgm")
    with pytest.raises(
        DataError, match=r"has 0 folders: expected 2 or more, one per class, .*; it has 3 files"
    ):
        read(tmp_path)


def test_names_that_differ_in_case_are_told(tmp_path: Path) -> None:
    fill(tmp_path, "Cat", "cat")
    assert "classes that differ only in upper and lower case: Cat, cat" in read(tmp_path).notes
    for split, names in (("train", ("Cat", "dog")), ("test", ("cat", "dog"))):
        fill(tmp_path / "set" / split, *names)
    with pytest.raises(DataError, match="has the class 'cat', which train/ lacks; it has 'Cat'"):
        read(tmp_path / "set")


def test_names_that_are_not_utf_8(tmp_path: Path) -> None:
    name = os.fsdecode(b"gr\xfcn")
    try:
        fill(tmp_path / name, name, "rot")
    except OSError:
        pytest.skip("this file system takes no such names")
    picture(tmp_path / name / name / os.fsdecode(b"M\xfcller.pgm"))
    a = read(tmp_path / name)
    assert a.classes == (r"gr\xfcn", "rot") and a.name == r"folder:gr\xfcn"
    assert sum(counts(a)) == 11
    (tmp_path / name / name / os.fsdecode(b"\xff.png")).write_bytes(b"")
    with pytest.raises(DataError) as caught:
        read(tmp_path / name)
    assert r"gr\xfcn/gr\xfcn/\xff.png" in str(caught.value).encode("utf-8").decode()


# ---------------------------------------------------------------- classes of few images


def test_classes_that_a_split_lacks_are_named(tmp_path: Path) -> None:
    for name, n in (("a", 30), ("b", 30), ("c", 2), ("d", 1)):
        fill(tmp_path, name, n=n)
    a = read(tmp_path)
    sentence = "no row of c and d in test: AUC is not defined, accuracy is over a and b"
    assert sentence in a.notes and sentence in a.caveats


# ---------------------------------------------------------------- patients


def patients(folder: Path, classes: tuple[str, ...] = ("a", "b"), n: int = 10) -> None:
    """Four images of each of n patients a class, of a level that is the patient's alone."""
    for k, name in enumerate(classes):
        for p in range(n):
            for i in range(4):
                picture(folder / name / f"{name}{p}" / f"{i}.pgm", n * k + p)


def test_subfolders_without_groups_are_told(tmp_path: Path) -> None:
    patients(tmp_path)
    a = read(tmp_path)
    (caveat,) = caveats(a)
    assert "split by image, although the classes have subfolders (patients?)" in caveat
    assert "(groups=1)" in caveat and caveat in a.notes and a.train_groups is None
    assert set(levels(a)[0]) & set(levels(a)[2])  # indeed
    silent = read(tmp_path, groups=0)
    assert caveats(silent) == () and silent.checksum == a.checksum


def test_subfolders_of_splits_by_the_user_are_theirs(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        patients(tmp_path / split, n=3)
    assert caveats(read(tmp_path)) == ()
    (tmp_path / "val").rename(tmp_path / "rest")
    (caveat,) = caveats(read(tmp_path))
    assert caveat.startswith("train and val are split by image")


def test_one_folder_below_each_class_says_nothing(tmp_path: Path) -> None:
    fill(tmp_path / "a", "images")
    fill(tmp_path / "b", "pictures")
    assert caveats(read(tmp_path)) == ()


def test_patients_are_kept_whole(tmp_path: Path) -> None:
    patients(tmp_path)
    a, plain = read(tmp_path, groups=1), read(tmp_path)
    assert counts(a) == (48, 16, 16) and caveats(a) == () and a.checksum != plain.checksum
    train, val, test = (set(part) for part in levels(a))
    assert not train & val and not train & test and not val & test
    assert all(np.array_equal(np.bincount(y), [8, 8]) for y in (a.val_y, a.test_y))
    assert "split 60/20/20 into train/val/test, by group (20 groups), split seed 0" in a.notes
    assert a.train_groups is not None and a.train_groups.dtype == np.int64
    of_level = {(level, g) for level, g in zip(levels(a)[0], a.train_groups.tolist(), strict=True)}
    assert len(of_level) == len(train)


def test_a_patient_of_two_classes_is_one(tmp_path: Path) -> None:
    for name in ("a", "b"):
        fill(tmp_path / name, *(f"p{p}" for p in range(10)), n=2)
    a = read(tmp_path, groups=1)
    for x in levels(a):
        assert sorted(x) == sorted(2 * [*set(x)])  # each level is there once in a and once in b


def test_a_level_further_down(tmp_path: Path) -> None:
    for name in ("a", "b"):
        for hospital in ("x", "y"):
            fill(tmp_path / name / hospital, *(f"{p}" for p in range(6)), n=2)
    a = read(tmp_path, groups=2)
    groups = (a.train_groups, a.val_groups, a.test_groups)
    assert len({int(v) for g in groups if g is not None for v in g}) == 12
    assert sum(counts(a)) == 48


def test_an_image_above_the_level_is_named(tmp_path: Path) -> None:
    patients(tmp_path)
    picture(tmp_path / "b" / "stray.pgm")
    with pytest.raises(DataError, match=r"b/stray\.pgm is 0 folders below .*groups=1 needs 1"):
        read(tmp_path, groups=1)


def test_too_few_patients_for_three_splits(tmp_path: Path) -> None:
    patients(tmp_path, n=1)
    with pytest.raises(DataError, match="2 groups cannot fill 3 parts: expected at least as many"):
        read(tmp_path, groups=1)


def test_a_missing_val_split_is_cut_by_patient(tmp_path: Path) -> None:
    for split in ("train", "test"):
        patients(tmp_path / split)
    a = read(tmp_path, groups=1)
    assert counts(a) == (72, 8, 80) and not set(levels(a)[0]) & set(levels(a)[1])
    assert "validation split cut from train: 10 %, by group (2 groups), split seed 0" in a.notes
    assert caveats(a) == (
        "18 patients have images in train and test",
        "2 patients have images in val and test",
    )


TABLES = {
    "paths": ("image,patient", "{folder}/{name}.pgm"),
    "without the format": ("patient_id;Path;age", "{folder}/{name}"),
    "file names": ("file,patient", "{name}.pgm"),
    "stems": ("name\tpatient", "{name}"),
    "backslashes": ("image,patient", ".\\{folder}\\{name}.pgm"),
}


@pytest.mark.parametrize("kind", TABLES)
def test_patients_from_a_table(tmp_path: Path, kind: str) -> None:
    head, form = TABLES[kind]
    folder = tmp_path / "set"
    lines = [head]
    for k, name in enumerate(("a", "b")):
        for i in range(20):
            picture(folder / name / f"{name}{i}.pgm", 20 * k + i)
            cells = [form.format(folder=name, name=f"{name}{i}"), f"p{(20 * k + i) // 4}"]
            lines.append(
                f"{cells[1]};{cells[0]};44"
                if ";" in head
                else ("\t" if "\t" in head else ",").join(cells)
            )
    (folder / "who.csv").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b"\r\n\r\n")
    asked = "who.csv:patient_id" if ";" in head else "who.csv"
    a = read(folder, groups=asked)
    assert sum(counts(a)) == 40
    parts = [{level // 4 for level in part} for part in levels(a)]
    assert sum(map(len, parts)) == 10 == len(set.union(*parts))
    assert a.checksum == read(folder, groups=f"{folder}/{asked}").checksum != read(folder).checksum


BAD_TABLES = {
    "no file": (None, "who.csv", "does not exist: groups expects a CSV file"),
    "a column that is not there": ("file,who,b\n", "who.csv:patient", "has no column 'patient'"),
    "which column": ("file,who,b\n", "who.csv", r"as FILE\.csv:COLUMN; it has file, who, b"),
    "not UTF-8": (b"file,who\n\xff,1\n", "who.csv", "cannot be read as CSV in UTF-8"),
    "empty": ("", "who.csv", "does not have two columns: .* it has none"),
    "a short line": ("file,who\n0.pgm\n", "who.csv", "line 2 has 1 columns, expected 2"),
    "two groups": (
        "file,who\na/0.pgm,x\na/0.pgm,y\n",
        "who.csv",
        "line 3: 'a/0.pgm' has the group 'y', but above 'x'",
    ),
    "missing": (
        "file,who\na/0.pgm,x\na/1.pgm,\n",
        "who.csv",
        r"names no group for 9 of 10 images, the first a/1\.pgm",
    ),
    "ambiguous": (
        "file,who\n" + "".join(f"{i}.pgm,{i}\n" for i in range(5)),
        "who.csv",
        "names no group for 10 of 10 images.* if no other image has it",
    ),
}


@pytest.mark.parametrize("kind", BAD_TABLES)
def test_bad_tables(tmp_path: Path, kind: str) -> None:
    content, asked, message = BAD_TABLES[kind]
    fill(tmp_path, "a", "b")
    if content is not None:
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "who.csv").write_bytes(data)
    with pytest.raises(DataError, match=message):
        read(tmp_path, groups=asked)


def test_thumbnail_folders_below_a_class_are_left_out(tmp_path: Path) -> None:
    fill(tmp_path, "a", "thumbs")
    fill(tmp_path / "a", "thumbnails", first=50)
    a = read(tmp_path)
    assert a.classes == ("a", "thumbs") and sum(counts(a)) == 10
    assert "hidden or system files, so left out: a/thumbnails" in a.notes


def test_splits_below_classes_are_refused_without_a_test_split_too(tmp_path: Path) -> None:
    for name in ("a", "b"):
        fill(tmp_path / name, "train", "val")
    with pytest.raises(DataError, match=r"expected splits above classes"):
        read(tmp_path)


def test_the_same_subfolders_everywhere_are_asked_about(tmp_path: Path) -> None:
    for fold in ("fold1", "fold2"):
        fill(tmp_path / fold, "a", "b")
    notes = read(tmp_path).notes
    assert "every class has the same subfolders (a, b): are those the classes?" in notes
    fill(tmp_path / "fold2", "c")
    assert not any("are those the classes" in each for each in read(tmp_path).notes)


def test_few_patients_go_to_test_before_val(tmp_path: Path) -> None:
    for name in ("a", "b"):
        fill(tmp_path / name, *(f"p{patient}" for patient in range(8)), n=3)
    a = read(tmp_path, groups=1)
    groups = (a.train_groups, a.val_groups, a.test_groups)
    assert [len(set(each.tolist())) for each in groups if each is not None] == [5, 1, 2]


def test_images_too_few_for_three_splits(tmp_path: Path) -> None:
    fill(tmp_path, "a", "b", n=1)
    with pytest.raises(DataError, match="2 images are too few for three splits: add some"):
        read(tmp_path)


def test_a_class_without_images_is_no_matter_of_numbers(tmp_path: Path) -> None:
    fill(tmp_path, "a", "b")
    (tmp_path / "c").mkdir()
    with pytest.raises(DataError, match=r"1 of 3 classes \(c\).* Add images, or remove the class"):
        read(tmp_path)


def test_a_table_without_names_of_columns_shows_what_it_took_for_them(tmp_path: Path) -> None:
    fill(tmp_path / "set", "a", "b")
    lines = [f"{name}/{i}.pgm,p{i}" for name in "ab" for i in range(5)]
    (tmp_path / "set" / "who.csv").write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"names the columns, here a/0\.pgm, p0"):
        read(tmp_path / "set", groups="who.csv")
