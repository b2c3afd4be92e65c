"""Images on disk equal those in memory bit for bit; what is interrupted or damaged is found."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import methods
from analysis import runs
from analysis.runs import Run, Training
from benchmarks.data import decoders, facts, ondisk, pictures
from benchmarks.data.dataset import Arrays
from benchmarks.data.download import DataError
from benchmarks.data.names import parse_benchmark
from benchmarks.data.ondisk import OnDisk, blocks, joined, remove, sets, taken
from benchmarks.data.sources import load
from benchmarks.data.splits import Protocol, Splits, make_splits
from benchmarks.data.streams import RowStream
from benchmarks.training.trainer import fit

CPU = torch.device("cpu")
ARRAYS = ("train_x", "train_y", "val_x", "val_y", "test_x", "test_y")


def image(path: Path, seed: int, mode: str = "L", edge: int = 12) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (edge, edge) if mode == "L" else (edge, edge, 3)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    pixels[: edge // 2] //= 2 if seed % 2 else 1  # so that there is something to learn
    Image.fromarray(pixels).save(path)


def folder(where: Path, rows: int = 40, colour: bool = False, splits: bool = False) -> Path:
    """Two classes in folders of patients, one image in colour, a text file among them."""
    for split in ("train", "test") if splits else ("",):
        for k, name in enumerate(("ant", "cat")):
            for i in range(rows):
                mode = "RGB" if colour and (k, i) == (1, 3) else "L"
                path = where / split / name / f"p{i // 4}" / f"{i:03}.png"
                image(path, 1000 * len(split) + 2 * i + k, mode)
    (where / ("train" if splits else "") / "ant" / "p0" / "notes.txt").write_text("words")
    return where


def npz(where: Path, val: bool = True, rows: int = 60, floats: bool = False) -> Path:
    generator = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}
    for split, n in (("train", rows), *([("val", rows // 2)] if val else []), ("test", rows // 2)):
        labels = np.arange(n) % 3
        pixels = generator.integers(0, 200, (n, 8, 9, 3)) + 25 * labels[:, None, None, None]
        whole = pixels.astype(np.uint8)
        arrays[f"{split}_images"] = (whole / np.float32(255)) if floats else whole
        arrays[f"{split}_labels"] = labels
        arrays[f"{split}_groups"] = 100 * len(split) + np.arange(n) // 2
    np.savez_compressed(where, **arrays)  # pyright: ignore[reportArgumentType]
    return where


def both(tmp_path: Path, kind: str, path: Path, **more: object) -> tuple[Arrays, Arrays]:
    """A set in memory, and on disk."""
    root = tmp_path / "root"
    given = {"path": str(path), "root": root, **more}
    return load(kind, **given), load(kind, **given, memory_gib=0)  # type: ignore[arg-type]


def equal(a: Arrays, b: Arrays) -> bool:
    """All that does not say where the images are."""
    same = all(np.array_equal(getattr(a, k)[:], getattr(b, k)[:]) for k in ARRAYS)
    types = all(getattr(a, k).dtype == getattr(b, k).dtype for k in ARRAYS)
    groups = all(np.array_equal(x, y) for x, y in zip(a.groups or (), b.groups or (), strict=True))
    notes = [each for each in b.notes if "streamed from" not in each]
    told = (a.checksum, a.classes, a.caveats, a.name) == (b.checksum, b.classes, b.caveats, b.name)
    return same and types and groups and told and notes == list(a.notes)


# ---------------------------------------------------------------- rows of a file


@pytest.fixture
def written(tmp_path: Path) -> tuple[np.ndarray, OnDisk]:
    """Rows of an array, and the same in two files of a set."""
    array = np.random.default_rng(1).integers(0, 256, (50, 3, 4, 3), np.uint8)

    def make() -> dict[str, object]:
        arrays = {}
        for key, part in (("one", array[:20]), ("two", array[20:])):
            writer = ondisk.Writer(tmp_path / "set", key, (3, 4, 3), np.uint8)
            for start in range(0, len(part), 7):
                writer.add(part[start : start + 7])
            arrays[key] = writer.end()
        return {"arrays": arrays}

    (tmp_path / "set").mkdir()
    _, found = ondisk.kept(tmp_path / "set", tmp_path / "source", make)
    return array, joined([found["one"], found["two"]])


def test_rows_are_those_of_the_array(written: tuple[np.ndarray, OnDisk]) -> None:
    array, images = written
    assert images.shape == array.shape and images.dtype == array.dtype and len(images) == 50
    assert images.nbytes == array.nbytes and images.ndim == 4 and images.planes_shape == (3, 3, 4)
    generator = np.random.default_rng(2)
    for _ in range(20):
        rows = generator.integers(0, 50, generator.integers(0, 40))  # with repeats, in any order
        assert np.array_equal(images[rows], array[rows])
        assert np.array_equal(images.planes(rows), array[rows].transpose(0, 3, 1, 2))
        part = taken(images, rows)
        assert isinstance(part, OnDisk) and len(part) == len(rows)
        within = generator.permutation(len(rows))
        assert np.array_equal(part[within], array[rows][within])
        assert np.array_equal(joined([part, images])[:], np.concatenate([array[rows], array]))
    assert np.array_equal(images[3], array[3]) and np.array_equal(images[-1], array[-1])
    assert np.array_equal(images[5:45:3], array[5:45:3]) and len(images[:0]) == 0


def test_blocks_are_all_rows(
    written: tuple[np.ndarray, OnDisk], monkeypatch: pytest.MonkeyPatch
) -> None:
    array, images = written
    monkeypatch.setattr(ondisk, "BLOCK", 36 * 7)
    for each in (array, images):
        found = list(blocks(each))
        assert [len(block) for block in found] == [*[7] * 7, 1]
        assert np.array_equal(np.concatenate(found), array)


def test_damage_is_found_when_a_row_is_read(tmp_path: Path, written: tuple) -> None:
    array, images = written
    path = tmp_path / "set" / "two.raw"
    assert np.array_equal(images[np.array([22])], array[[22]])
    with path.open("r+b") as file:
        file.seek(10 * 36 + 5)
        file.write(bytes([array[30].transpose(2, 0, 1).reshape(-1)[5] ^ 1]))
    assert np.array_equal(images[np.array([31])], array[[31]])
    with pytest.raises(DataError, match=r"two.raw is damaged \(row 10 is not what was written\)"):
        images[np.array([30])]
    os.truncate(path, 100)
    with pytest.raises(DataError, match=r"cut short.*augbench data remove set"):
        images[np.array([49])]


# ---------------------------------------------------------------- equal to memory


@pytest.mark.parametrize("val", [True, False])
@pytest.mark.parametrize("floats", [False, True])
def test_an_npz_is_the_same(tmp_path: Path, val: bool, floats: bool) -> None:
    a, b = both(tmp_path, "npz", npz(tmp_path / "own.npz", val, floats=floats))
    assert isinstance(b.train_x, OnDisk) and isinstance(a.train_x, np.ndarray) and equal(a, b)
    (note, *_) = b.notes
    assert "_images streamed from" in note and "exceed the memory budget of 0 GiB" in note
    known = facts.lines(b, parse_benchmark(f"npz:{tmp_path / 'own.npz'}"))
    assert set(facts.lines(a, parse_benchmark(f"npz:{tmp_path / 'own.npz'}"))) <= set(known)


@pytest.mark.parametrize("splits", [True, False])
@pytest.mark.parametrize("groups", [None, 0, 1])
@pytest.mark.parametrize("colour", [False, True])
def test_a_folder_is_the_same(
    tmp_path: Path, splits: bool, groups: int | None, colour: bool
) -> None:
    path = folder(tmp_path / "set", 12, colour, splits)
    a, b = both(tmp_path, "folder", path, size=9, groups=groups)
    assert isinstance(b.test_x, OnDisk) and equal(a, b)
    assert a.train_x.shape[3:] == ((3,) if colour else ())
    assert "text files among the images are left out" in str(b.notes)


def test_other_groups_and_times_need_no_second_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder(tmp_path / "set", 12)
    both(tmp_path, "folder", path, size=9)
    monkeypatch.setattr(decoders, "decoded", None)  # never asked again
    root = tmp_path / "root"
    for groups in (None, 1, 0, 1):
        load("folder", path=str(path), size=9, groups=groups, root=root, memory_gib=0)
    (one,) = sets(root)
    about = json.loads((root / "cache" / one.name / "about.json").read_text())
    assert len(about["checksums"]) == 2 and one.source == str(path)
    with pytest.raises(TypeError):  # another edge, other pixels
        load("folder", path=str(path), size=10, root=root, memory_gib=0)


@pytest.mark.parametrize("how", ["bytes", "name", "more"])
def test_a_changed_folder_is_decoded_anew(tmp_path: Path, how: str) -> None:
    path = folder(tmp_path / "set", 12)
    before, _ = both(tmp_path, "folder", path, size=12)
    changed = path / "ant" / "p0" / "001.png"
    if how == "bytes":  # of the same length, with the time set back
        stat = changed.stat()
        pixels = np.zeros((12, 12), np.uint8)
        Image.fromarray(pixels).save(changed)
        data = changed.read_bytes()
        changed.write_bytes(data + bytes(stat.st_size - len(data)))
        os.utime(changed, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert changed.stat().st_size == stat.st_size
    elif how == "name":
        changed.rename(changed.with_name("b.png"))
    else:
        image(path / "cat" / "p9" / "new.png", 5)
    a, b = both(tmp_path, "folder", path, size=12)
    assert equal(a, b) and b.checksum != before.checksum
    assert len(list(sets(tmp_path / "root"))) == 2


def test_processes_decode_as_we_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder(tmp_path / "set", 12, colour=True)
    (path / "cat" / "p0" / "deep.tif").write_bytes(b"")
    files = [*sorted(path.rglob("*.png")), path / "ant" / "p0" / "notes.txt"]
    read = [each.read_bytes() for each in files] + [b"", b"\x89PNG\r\n\x1a\n damaged"]
    monkeypatch.setattr(decoders, "FEWEST", 1)
    for processes in (1, 3):
        found = list(decoders.decoded(iter(read), len(read), 7, processes))
        assert [data for data, _ in found] == read
        for data, one in found:
            try:
                here = pictures.decode(data, 7)
            except ValueError as error:
                assert (type(one), str(one)) == (type(error), str(error))
            else:
                assert isinstance(one, pictures.Picture)
                assert np.array_equal(one.pixels, here.pixels) and one[1:] == here[1:]


def test_a_file_that_is_no_image_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder(tmp_path / "set", 12)
    (path / "cat" / "p1" / "005.png").write_bytes(b"\x89PNG\r\n\x1a\n damaged")
    monkeypatch.setattr(decoders, "FEWEST", 1)
    monkeypatch.setattr(decoders, "cores", lambda: 2)
    messages = []
    for memory_gib in (0, 4):
        with pytest.raises(DataError, match=r"005.png cannot be read as an image") as caught:
            load("folder", path=str(path), root=tmp_path / "root", memory_gib=memory_gib)
        messages.append(str(caught.value))
    assert messages[0] == messages[1] and not list(sets(tmp_path / "root"))


# ---------------------------------------------------------------- runs


def trained(arrays: Arrays, benchmark: str, method: str, **more: Any) -> tuple[object, ...]:
    """What a run of two epochs leaves: logits, lines, and what it learned."""
    built = methods.build(method)
    made = make_splits(
        arrays,
        parse_benchmark(benchmark),
        Protocol(**more),
        needs_meta="meta" in built.requires(),
        seed=0,
        device=CPU,
    )
    run = Run(
        benchmark=benchmark,
        method=method,
        model="small_cnn",
        training=Training(epochs=2, batch_size=16),
        seed=0,
        data=arrays.checksum,
    )
    fitted = fit(run, made, built)
    values = [*fitted.predictions.values(), *fitted.samples.values()]
    values += [each.numpy() for each in fitted.method.learned().values()]
    return run.id, fitted.state.metric_lines, [each.tobytes() for each in values]


@pytest.mark.parametrize(
    ("arguments", "method", "more"),
    [
        ("", "none", {}),
        ("(noise=0.4)", "randaugment", {}),
        ("(folds=3)", "crop", {}),
        ("", "autodo", {}),
        ("", "l2rw", {"name": "paper"}),
        ("", "l2rw", {"crossfit": 2}),
    ],
)
def test_runs_are_the_same(tmp_path: Path, arguments: str, method: str, more: dict) -> None:
    path = npz(tmp_path / "own.npz", val=False)
    a, b = both(tmp_path, "npz", path)
    name = f"npz:{path}{arguments}"
    assert trained(a, name, method, **more) == trained(b, name, method, **more)


def test_draws_are_the_same(tmp_path: Path) -> None:
    a, b = both(tmp_path, "npz", npz(tmp_path / "own.npz"))
    found: list[Splits] = [
        make_splits(
            each, parse_benchmark("digits"), Protocol(), needs_meta=True, seed=1, device=CPU
        )
        for each in (a, b)
    ]
    one, other = (RowStream(each.train, 0, "train") for each in found)
    pairs = zip(*([each.draw(7), *each.batches(9)] for each in (one, other)), strict=True)
    for first, second in pairs:
        assert torch.equal(first.x, second.x) and torch.equal(first.index, second.index)
        assert first.x.is_contiguous() and second.x.is_contiguous()
    order = [torch.arange(5), torch.tensor([3, 0, 3]), torch.arange(20), torch.arange(2)]
    for index, ahead in zip(order, found[1].train.ahead(order), strict=True):
        assert ahead is not None and torch.equal(ahead, found[0].train.inputs(index))
    assert list(found[0].train.ahead(order)) == [None] * 4


# ---------------------------------------------------------------- interruption, disks, two at once


DECODE = """
import signal, sys, time
from pathlib import Path
from benchmarks.data import decoders, folders, pictures
from benchmarks.data.sources import load

decoders.FEWEST, decoders.cores = 1, lambda: 2
real, place = folders._add, Path(sys.argv[1])

def slow(digest, file, data, altered):
    (place / "begun").touch()
    with (place / "decoded").open("a") as told:
        told.write(f"{file.name}\\n")
    time.sleep(float(sys.argv[2]))
    return real(digest, file, data, altered)

signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it in the background
folders._add = slow
arrays = load("folder", path=str(place / "set"), size=9, root=place / "root", memory_gib=0)
print(arrays.checksum)
"""


def decoding(place: Path, pause: float) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", DECODE, str(place), str(pause)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(path: Path) -> None:
    until = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < until, f"{path} never came"
        time.sleep(0.02)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_what_is_interrupted_is_not_there(tmp_path: Path, sent: signal.Signals) -> None:
    folder(tmp_path / "set", 12)
    process = decoding(tmp_path, 5)
    wait_for(tmp_path / "begun")
    process.send_signal(sent)
    process.communicate(timeout=60)  # the processes that decode have ended, too: its pipes close
    left = list(sets(tmp_path / "root"))
    assert all(not each.source and not each.holder for each in left)
    if sent == signal.SIGINT:
        assert not left
    a, b = both(tmp_path, "folder", tmp_path / "set", size=9)
    assert equal(a, b)
    (made,) = sets(tmp_path / "root")
    assert made.source


def test_two_at_once_decode_once(tmp_path: Path) -> None:
    folder(tmp_path / "set", 12)
    started = [decoding(tmp_path, 0.05) for _ in range(2)]
    told = [process.communicate(timeout=120) for process in started]
    assert all(process.returncode == 0 for process in started), told
    assert len({out for out, _ in told}) == 1
    assert len((tmp_path / "decoded").read_text().splitlines()) == 24
    assert sum("is being decoded by process" in err for _, err in told) <= 1


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder(tmp_path / "set", 12)
    own = npz(tmp_path / "own.npz")

    def refused(message: str) -> None:
        for kind, source in (("folder", path), ("npz", own)):
            with pytest.raises(DataError, match=message):
                load(kind, path=str(source), root=tmp_path / "root", memory_gib=0)
        assert not list(sets(tmp_path / "root"))

    with monkeypatch.context() as patch:
        usage = ondisk.shutil.disk_usage(tmp_path)
        patch.setattr(ondisk.shutil, "disk_usage", lambda path: usage._replace(free=100))
        refused(r"GiB decoded, and .* has 9.3e-08 GiB free: free some space .*AUGBENCH_DATA")

    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ondisk.os, "write", full)
        refused("cannot be decoded into .*the disk is full; free some space")
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(DataError, match="cannot be decoded into"):
        load("npz", path=str(own), root=tmp_path / "file", memory_gib=0)


@pytest.mark.parametrize("how", ["short", "long", "about", "crc", "version"])
def test_a_set_that_is_not_whole_is_made_again(tmp_path: Path, how: str) -> None:
    path = npz(tmp_path / "own.npz")
    a, b = both(tmp_path, "npz", path)
    (one,) = sets(tmp_path / "root")
    place = tmp_path / "root" / "cache" / one.name
    about = place / "about.json"
    if how == "short":
        os.truncate(place / "train_images.raw", 1000)
    elif how == "long":
        with (place / "train_images.raw").open("ab") as file:
            file.write(b"more")
    elif how == "about":
        about.write_text(about.read_text()[:50])
    elif how == "crc":
        os.truncate(place / "val_images.crc", 4)
    else:
        about.write_text(about.read_text().replace('"format": 1', '"format": 0'))
    assert equal(a, load("npz", path=str(path), root=tmp_path / "root", memory_gib=0))
    assert equal(a, b)  # what was open before


def test_a_set_in_which_bytes_changed_is_refused(tmp_path: Path) -> None:
    both(tmp_path, "npz", npz(tmp_path / "own.npz"))
    (one,) = sets(tmp_path / "root")
    path = tmp_path / "root" / "cache" / one.name / "train_images.raw"
    data = bytearray(path.read_bytes())
    data[1234] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="is damaged"):  # by the look for duplicates
        load("npz", path=str(tmp_path / "own.npz"), root=tmp_path / "root", memory_gib=0)
    remove(tmp_path / "root", one.name)
    assert equal(*both(tmp_path, "npz", tmp_path / "own.npz"))


def test_sets_are_listed_and_removed(tmp_path: Path) -> None:
    root = tmp_path / "root"
    assert list(sets(root)) == []
    _, b = both(tmp_path, "npz", npz(tmp_path / "own.npz"))
    (root / "cache" / "own.npz.md5.json").write_text("{}")
    old = root / "cache" / "killed-12345678"
    old.mkdir()
    (old / ondisk.MARK).touch()
    (old / "train_images.raw").write_bytes(bytes(10))
    one, other = sets(root)
    size = sum(each.nbytes for each in b.images) + 4 * sum(map(len, b.images))
    assert other.name.startswith("own-") and other.source == str(tmp_path / "own.npz")
    assert size < other.size < size + 1000
    assert (one.name, one.size, one.source) == (old.name, 10, "")
    for name in ("..", "own.npz.md5.json", "none", ""):
        with pytest.raises(DataError, match="has no streamed set"):
            remove(root, name)
    with runs.locked(old), pytest.raises(DataError, match="it is being written"):
        remove(root, old.name)
    assert remove(root, old.name) == 10 and remove(root, other.name) == other.size
    assert list(sets(root)) == [] and len(b.train_x[:]) == 60  # open files can still be read


def test_what_another_program_wrote_is_not_ours(tmp_path: Path) -> None:
    """Its folders, and its files in a folder of ours."""
    root = tmp_path / "root"
    both(tmp_path, "npz", npz(tmp_path / "own.npz"))
    (own,) = sets(root)
    theirs = [root / "cache" / name for name in ("theirs", "about", "empty")]
    for each in theirs:
        each.mkdir()
    (theirs[0] / "weights.raw").write_bytes(bytes(10))
    (theirs[1] / "about.json").write_text('{"source": "elsewhere"}')
    note = root / "cache" / own.name / "notes" / "mine.txt"
    note.parent.mkdir()
    note.write_text("words")
    assert list(sets(root)) == [own]
    for each in theirs:
        with pytest.raises(DataError, match=f"no streamed set '{each.name}'; it has {own.name}"):
            remove(root, each.name)
    assert remove(root, own.name) == own.size and list(sets(root)) == []
    assert note.read_text() == "words" and (theirs[0] / "weights.raw").is_file()
    assert [path.name for path in note.parent.parent.iterdir()] == ["notes"]


def test_a_set_of_several_spellings_is_decoded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, file = folder(tmp_path / "set", 12), npz(tmp_path / "own.npz")
    (tmp_path / "link").symlink_to(path)
    (tmp_path / "link.npz").symlink_to(file)
    root = tmp_path / "root"
    monkeypatch.chdir(path)
    for spelled in (str(path), ".", "../set", "../link", "../set/cat/.."):
        load("folder", path=spelled, size=9, root=root, memory_gib=0)
    for spelled in (str(file), "../own.npz", "../link.npz"):
        load("npz", path=spelled, root=root, memory_gib=0)
    assert [each.source for each in sets(root)] == [str(file), str(path)]


@pytest.mark.parametrize("bad", ["order", "cut"])
def test_an_npz_that_cannot_be_read_row_by_row(tmp_path: Path, bad: str) -> None:
    path = npz(tmp_path / "own.npz")
    with np.load(path) as archive:
        arrays = {key: archive[key] for key in archive}
    if bad == "order":
        arrays["val_images"] = np.asfortranarray(arrays["val_images"])
        np.savez(path, **arrays)
        message = "val_images is in Fortran order"
    else:
        np.savez(path, **arrays)
        data = path.read_bytes()
        place = data.index(arrays["test_images"].tobytes())
        path.write_bytes(data[: place + 3] + bytes([data[place + 3] ^ 1]) + data[place + 4 :])
        message = "test_images is damaged"
    with pytest.raises(DataError, match=message):
        load("npz", path=str(path), root=tmp_path / "root", memory_gib=0)
    assert not list(sets(tmp_path / "root"))


def test_the_checksum_of_a_row_is_its_crc(tmp_path: Path) -> None:
    _, b = both(tmp_path, "npz", npz(tmp_path / "own.npz"))
    (one,) = sets(tmp_path / "root")
    found = np.fromfile(tmp_path / "root" / "cache" / one.name / "test_images.crc", "<u4")
    rows = np.ascontiguousarray(b.test_x[:].transpose(0, 3, 1, 2))
    assert found.tolist() == [zlib.crc32(row) for row in rows]
