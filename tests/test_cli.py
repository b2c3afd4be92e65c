"""The command line as a new user meets it: bad input, full disks, kills, nothing done twice."""

import hashlib
import os
import pickle
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import methods
from analysis import records, runs
from benchmarks.cli import main
from benchmarks.data import catalogue, download
from benchmarks.data.sources import load
from benchmarks.running import local
from benchmarks.training import progress, trainer
from tests import sweeping

SMALL = ["--model", "small_cnn(width=0.25)", "--device", "cpu"]
Arrays = dict[str, np.ndarray]


def arrays(rows: tuple[int, int, int] = (80, 40, 40), size: int = 12, classes: int = 4) -> Arrays:
    """Images with a bright corner that tells the class, in MedMNIST's keys."""
    rng, made, half = np.random.default_rng(0), {}, size // 2
    for split, count in zip(("train", "val", "test"), rows, strict=True):
        labels = np.arange(count) % classes
        images = rng.integers(0, 120, (count, size, size))
        for image, label in zip(images, labels, strict=True):
            top, left = label // 2 * half, label % 2 * half
            image[top : top + half, left : left + half] += 120
        made[f"{split}_images"], made[f"{split}_labels"] = images.astype(np.uint8), labels
    return made


def save(path: Path, **changes: np.ndarray | None) -> Path:
    np.savez(path, **{k: v for k, v in (arrays() | changes).items() if v is not None})  # type: ignore[arg-type]
    return path


@pytest.fixture(scope="module")
def npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("data") / "small.npz")


NETWORK = """\
import os
import time

from torch import nn


class Network(nn.Module):
    def __init__(self, spec):
        super().__init__()
        self.head = nn.Linear(spec.shape[1] * spec.shape[2], spec.classes)

    def forward(self, x):
        if self.training:
            time.sleep(float(os.environ.get("SLOW", "0")))
        return self.head(x.flatten(1))
"""


@pytest.fixture(scope="module")
def longer(npz: Path) -> Iterator[Path]:
    """The data again; beside them lies a network that takes as long a step as SLOW says."""
    folder = npz.parent
    (folder / "slowly.py").write_text(NETWORK)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        paths = [str(folder), os.environ.get("PYTHONPATH", "")]
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
        yield npz


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home folder, and no data folder of the user's."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("AUGBENCH_DATA", raising=False)
    return tmp_path / "home"


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of a comparison are done in this process: a worker takes seconds to import torch."""
    monkeypatch.setattr(local.Processes, "carry_out", sweeping.carry_out_here)


def on(path: Path, out: Path, *more: str, epochs: int = 2) -> list[str]:
    given = ["--benchmark", f"npz:{path}", *SMALL, "--epochs", str(epochs), "--out", str(out)]
    return [*given, *more]


def compare(path: Path, out: Path, *more: str, epochs: int = 2) -> list[str]:
    return ["compare", *on(path, out, "--jobs", "1", *more, epochs=epochs)]


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below a folder with its time and content."""
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def numbers(out: Path) -> dict[str, tuple[bytes, bytes]]:
    """What must not depend on how a run came about, by id."""
    return {
        folder.name: tuple((folder / n).read_bytes() for n in ("metrics.jsonl", "predictions.npz"))
        for folder in runs.folders(out)
    }  # type: ignore[return-value]


def left_behind(out: Path) -> set[str]:
    """Names of files that only stand for work that goes on."""
    passing = {"lock", "checkpoint.pt"}
    names = {path.name for path in out.rglob("*") if path.is_file()}
    return {name for name in names if name in passing or name.endswith(".part")}


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> tuple[int, str]:
    """Exit code and message of a command that prints no result and no traceback."""
    try:
        code = main.run(arguments)
    except SystemExit as stop:
        code = int(stop.code or 0)
    shown = capsys.readouterr()
    assert shown.out == "" and "Traceback" not in shown.err
    return code, " ".join(re.sub(r"[│╭╰─╮╯]", " ", shown.err).split())


# --- values ---------------------------------------------------------------------------------------

USAGE = {
    "--method mixpu": (
        "unknown method 'mixpu'; did you mean 'mixup'? (augbench list",
        "py:MODULE:NAME",
    ),
    "--method mixup(alfa=1)": ("mixup", "no argument 'alfa'; did you mean 'alpha'?"),
    "--method mixup(alpha=-1)": ("alpha: expected a number above 0, got -1.0",),
    "--method mixup(alpha=much)": ("mixup: alpha: expected a number, got much",),
    "--method ''": ("method: expected a name such as none", "got ''"),
    "--method @train": ("method: expected a name such as none", "got '@train'"),
    "--method none@trian": ("unknown control row 'trian'; did you mean 'train'?",),
    "--method head_refit@train": ("control rows are for methods without meta rows",),
    "--model resnet81": ("unknown model 'resnet81'; did you mean 'resnet18'?",),
    "--model small_cnn(widht=1)": ("no argument 'widht'; did you mean 'width'?",),
    "--model py:nowhere:net": ("py:nowhere:net", "no module 'nowhere', expected nowhere.py"),
    "--model py:os:getcwd": ("model: py:os:getcwd cannot be built for 1 x 12 x 12 images",),
    "--model py:os:getcwd --width 2": ("width: expected none with the network", "got 2.0"),
    "--model small_cnn(width=1) --width 2": ("width: expected it once", "got 'small_cnn(width=1)'"),
    "--model small_cnn --width 0": ("width: expected a multiplier above 0, got 0.0",),
    "--model small_cnn --width nan": ("width: expected a number, got nan",),
    "--benchmark digit": ("unknown benchmark 'digit'; did you mean 'digits'?",),
    "--benchmark pneumoniamnist(size=32)": ("size: expected one of 28, 64, 128, 224, got 32",),
    "--benchmark digits(noise=2)": ("noise: expected a number from 0 to 1, got 2.0",),
    "--benchmark npz:": ("expected a path after npz:",),
    "--preset medmist": ("unknown preset 'medmist'; did you mean 'medmnist'?", "known: autodo"),
    "--preset autodo": ("warmup_epochs: expected 0 to 1 (below epochs), got 5",),
    "--epochs 0": ("epochs: expected a number above 0, got 0",),
    "--epochs three": ("--epochs", "INT", "three"),
    "--epoch 3": ("Unrecognized options: --epoch", "Perhaps you meant: --epochs INT"),
    "--benchmrk digits": ("Unrecognized options: --benchmrk", "--benchmark STR"),
    "--batch-size 1": ("batch_size: expected 2 or more", "got 1"),
    "--learning-rate nan": ("learning_rate: expected a number above 0, got nan",),
    "--learning-rate -1": ("learning_rate: expected a number above 0, got -1.0",),
    "--weight-decay -1": ("weight_decay: expected 0 or more, got -1.0",),
    "--momentum 1": ("momentum: expected a number in [0, 1), got 1.0",),
    "--optimizer adamm": ("--optimizer", "'adamm'", "'adam'", "'sgd'"),
    "--device gpu": ("--device", "'gpu'", "'cpu', 'cuda'"),
    "--seed -1": ("seed: expected 0 or more, got -1",),
    "--threads 0": ("threads: expected 1 or more, got 0",),
    "--meta-fraction 1.5": ("meta_fraction: expected a share in (0, 1), got 1.5",),
    "--crossfit 0": ("crossfit: expected 1 (off) or a number of folds, got 0",),
    "--crossfit 3 --protocol paper": ("crossfit", "paper"),
    "--checkpoint-every 0": ("checkpoint-every: expected 1 or more, got 0",),
    "--memory-gib nan": ("memory-gib: expected 0 or more, got nan",),
    "stray": ("Unrecognized options: stray",),
}


@pytest.mark.parametrize("given", USAGE)
def test_a_bad_value_is_told_with_its_field_and_what_is_allowed(
    given: str, npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = refused(capsys, ["run", *on(npz, tmp_path / "out"), *shlex.split(given)])
    assert code == 2
    for part in USAGE[given]:
        assert part in text, text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ("--seeds 0", ("seeds: expected 1 or more, got 0",)),
        ("--seeds two", ("--seeds", "INT", "two")),
        ("--jobs 0", ("jobs: expected 1 or more, got 0",)),
        ("--methods ''", ("methods: expected names separated by commas, got none",)),
        ("--methods none,corp", ("unknown method 'corp'; did you mean 'crop'?",)),
        ("--benchmark ''", ("benchmark: expected a name, got none",)),
        ("--same steps", ("--same", "'steps'", "'passes'")),
    ],
)
def test_a_bad_value_of_compare(
    given: str,
    parts: tuple[str, ...],
    npz: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, text = refused(capsys, [*compare(npz, tmp_path / "out"), *shlex.split(given)])
    assert code == 2
    assert all(part in text for part in parts), text
    assert not (tmp_path / "out").exists()


def test_all_names_are_read_before_any_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = f"npz:{tmp_path / 'absent.npz'},digitz"
    code, text = refused(capsys, ["compare", "--benchmark", both, "--out", str(tmp_path / "out")])
    assert code == 2 and "unknown benchmark 'digitz'" in text


def test_an_unknown_command_lists_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = refused(capsys, ["rum"])
    assert (
        code == 2
        and "rum" in text
        and "list, run, compare, sweep, predict, show, generate, policy, report, table, plan, runs"
        in text
    )


@pytest.mark.parametrize(
    "command",
    ["list", "run", "compare", "sweep", "predict", "show", "policy", "report", "plan", "runs",
     "pack", "unpack", "data", "doctor"],
)  # fmt: skip
def test_help_shows_types_defaults_and_an_example(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main.run([command, "--help"])
    assert stop.value.code == 0
    text = " ".join(re.sub(r"[│╭╰─╮╯]", " ", capsys.readouterr().out).split())
    assert f"Example: augbench {command} " in text
    # What follows an option is its type or choices (a switch has none), its meaning, its default.
    options = re.split(r" (?=--[a-z])", text.partition("--help show this")[2])[1:]
    assert options
    for option in options:
        assert re.search(r"\((default: .+|required)\)", option), option
        assert "None" not in option, option
    if command in ("run", "compare"):
        assert "--epochs INT" in text and "--learning-rate FLOAT" in text
        assert "--schedule {multistep,cosine,constant}" in text and "--out PATH" in text
        assert "(default: the preset's)" in text and "(default: runs)" in text


def test_debug_shows_a_traceback_and_keeps_the_exit_code(
    npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = ["run", *on(npz, tmp_path / "out", epochs=0)]
    assert main.run([*bad, "--debug"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback") and "in training_of" in shown
    assert shown.endswith("augbench: epochs: expected a number above 0, got 0\n")

    lost = ["run", *on(npz, tmp_path / "out", "--optimizer", "sgd", "--learning-rate", "1e30")]
    assert main.run([*lost, "--debug"]) == 1
    assert "TrainingFailed" in capsys.readouterr().err


# --- data -----------------------------------------------------------------------------------------


def _truncated(path: Path) -> None:
    save(path)
    path.write_bytes(path.read_bytes()[:-2000])


def _altered(path: Path) -> None:
    save(path)
    content = bytearray(path.read_bytes())
    content[3000] ^= 255
    path.write_bytes(content)


def _not_a_number(path: Path) -> None:
    shown = {k: v / np.float32(255) for k, v in arrays().items() if k.endswith("images")}
    shown["train_images"][3, 2, 2] = np.nan
    save(path, **shown)


def _absent(path: Path) -> None:
    labels = arrays()["train_labels"]
    save(path, train_labels=np.where(labels == 2, 3, labels))


LABELS = arrays()["train_labels"]
IMAGES = arrays()["train_images"]
BAD_FILES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "missing": (lambda path: None, ("does not exist", "expected an npz file")),
    "empty": (lambda path: path.write_bytes(b""), ("is not an npz file",)),
    "pickle": (
        lambda path: path.write_bytes(pickle.dumps({"train_images": 1})),
        ("not an npz file",),
    ),
    "truncated": (_truncated, ("is truncated", "download it again")),
    "altered": (_altered, ("train_images is damaged", "CRC")),
    "pickled": (
        lambda path: save(path, train_images=np.array([1, "a", None] * 9, dtype=object)),
        ("train_images is pickled", "never loaded", "array of numbers"),
    ),
    "rank": (
        lambda path: save(path, train_images=IMAGES[:, None, :, :, None]),
        ("train_images", "(80, 1, 12, 12, 1)", "expected (N, H, W) or (N, H, W, C)"),
    ),
    "out of range": (
        lambda path: save(path, test_labels=arrays()["test_labels"] + 3),
        ("test_labels are out of range", "hold 6, expected 0 to 3"),
    ),
    "negative": (
        lambda path: save(path, train_labels=LABELS - 1),
        ("train_labels", "from -1 to 2", "out of range"),
    ),
    "class absent": (_absent, ("no row of 1 of 4 classes (2)", "must occur in train")),
    "empty split": (
        lambda path: save(path, test_images=IMAGES[:0], test_labels=LABELS[:0]),
        ("test_images", "the split is empty"),
    ),
    "not a number": (_not_a_number, ("train_images", "1 of 11520 values are NaN")),
    "no labels": (
        lambda path: save(path, train_labels=None),
        ("lacks train_labels", "it has train_images"),
    ),
    "fewer labels": (
        lambda path: save(path, train_labels=LABELS[:-3]),
        ("80 train_images and 77 train_labels", "expected equal numbers"),
    ),
}


@pytest.mark.parametrize("command", ["run", "compare"])
@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_file_is_refused_before_anything_is_written(
    kind: str, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, parts = BAD_FILES[kind]
    path = tmp_path / "bad.npz"
    make(path)
    before = path.read_bytes() if path.exists() else b""
    code, text = refused(capsys, [command, *on(path, tmp_path / "out")])
    assert code == 1 and str(path) in text
    assert all(part in text for part in parts), text
    assert not (tmp_path / "out").exists()
    assert (path.read_bytes() if path.exists() else b"") == before


def official(monkeypatch: pytest.MonkeyPatch, url: str, md5: str) -> str:
    """BreastMNIST with another address and MD5; the name of its file."""
    entry = catalogue.CATALOGUE["breastmnist"]
    file = replace(entry.files[28][0], url=url, md5=md5)
    changed = replace(entry, files={**entry.files, 28: (file,)}, counts=(80, 40, 40))
    monkeypatch.setitem(catalogue.CATALOGUE, "breastmnist", changed)
    return file.name


def test_without_a_network_the_error_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(download, "BACKOFF", 0.0)
    url, md5 = "http://127.0.0.1:1/breastmnist.npz", "0" * 32
    official(monkeypatch, url, md5)
    data = tmp_path / "data"
    for command in (
        ["run", "--benchmark", "breastmnist", "--out", str(tmp_path / "out")],
        ["data", "fetch", "breastmnist"],
    ):
        code, text = refused(capsys, [*command, "--data", str(data)])
        assert code == 1 and "breastmnist.npz could not be downloaded" in text
        assert url in text and md5 in text and str(data / "medmnist") in text
    assert not files(data) and not (tmp_path / "out").exists()


@pytest.mark.usefixtures("here")
def test_a_file_with_another_md5_is_refused_or_flagged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    (data / "medmnist").mkdir(parents=True)
    path = data / "medmnist" / "breastmnist.npz"
    np.savez(path, **arrays(size=28, classes=2))  # type: ignore[arg-type]
    md5 = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    given = ["compare", "--benchmark", "breastmnist", *SMALL, "--epochs", "1", "--seeds", "1"]
    given += ["--methods", "none", "--out", str(out), "--data", str(data)]

    code, text = refused(capsys, given)
    assert code == 1 and str(path) in text and md5 in text and "--allow-unverified" in text
    assert "750601b1f35ba3300ea97c75c52ff8f6" in text and not out.exists()
    verify = ["data", "verify", "breastmnist", "--data", str(data)]
    assert main.run(verify) == 1
    assert f"breastmnist.npz: WRONG, MD5 {md5} ({path})" in capsys.readouterr().out

    assert main.run([*given, "--allow-unverified"]) == 0
    table = capsys.readouterr().out
    assert "UNVERIFIED DATA" in table and md5 in table
    assert path.is_file()


def test_data_is_listed_fetched_and_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = tmp_path / "given.npz"
    np.savez(given, **arrays(size=28, classes=2))  # type: ignore[arg-type]
    md5 = hashlib.md5(given.read_bytes(), usedforsecurity=False).hexdigest()
    official(monkeypatch, given.as_uri(), md5)
    place = ["--data", str(tmp_path / "data")]

    assert main.run(["data", "list", *place]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"digits +ships with scikit-learn", shown)
    assert re.search(r"breastmnist +not on disk", shown)
    assert main.run(["data", "verify", *place]) == 0
    assert "Nothing to verify" in capsys.readouterr().out
    assert main.run(["data", "verify", "breastmnist", *place]) == 1
    assert "breastmnist.npz: not found" in capsys.readouterr().out

    code, text = refused(capsys, ["data", "fetch", "breastmnist", "brestmnist", *place])
    assert code == 2 and "did you mean 'breastmnist'?" in text
    assert not files(tmp_path / "data"), "nothing is fetched before all names are read"
    code, text = refused(capsys, ["data", "fetch", *place])
    assert code == 2 and "names: expected data sets to fetch" in text
    code, text = refused(capsys, ["data", "verify", f"npz:{given}", *place])
    assert code == 2 and "names: expected an official data set" in text

    assert main.run(["data", "fetch", "breastmnist", *place]) == 0
    assert f"80 training rows, MD5 {md5}" in capsys.readouterr().out
    assert (tmp_path / "data/medmnist/breastmnist.npz").read_bytes() == given.read_bytes()
    assert left_behind(tmp_path / "data") == set()
    given.unlink()
    assert main.run(["data", "fetch", "breastmnist", *place]) == 0, "what is there is not fetched"
    assert main.run(["data", "verify", *place]) == 0
    assert main.run(["data", "list", "breastmnist", *place]) == 0
    shown = capsys.readouterr().out
    assert "breastmnist.npz: correct" in shown and "on disk: 28 px" in shown
    assert "pneumoniamnist" not in shown


def test_streamed_sets_are_listed_and_removed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = ["--data", str(tmp_path / "data")]
    own = tmp_path / "own.npz"
    np.savez(own, **arrays(size=28, classes=2))  # type: ignore[arg-type]
    load("npz", path=str(own), root=tmp_path / "data", memory_gib=0)
    assert main.run(["data", "list", *place]) == 0
    streamed = re.search(r"(own-\w+) +[0-9.e-]+ GiB  decoded from (.*)", capsys.readouterr().out)
    assert streamed is not None and streamed[2] == str(own)
    code, text = refused(capsys, ["data", "remove", *place])
    assert code == 2 and "names: expected streamed sets to remove" in text
    code, text = refused(capsys, ["data", "remove", "other", *place])
    assert code == 1 and f"has no streamed set 'other'; it has {streamed[1]}" in text
    assert main.run(["data", "remove", streamed[1], *place]) == 0
    assert re.search(f"{streamed[1]}: [0-9.e-]+ GiB removed", capsys.readouterr().out)
    assert left_behind(tmp_path / "data") == set()


# --- tables: what is done is not done again -------------------------------------------------------


@pytest.mark.usefixtures("here")
def test_only_what_is_new_is_trained_and_the_table_is_the_same(
    npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(methods: str, *more: str) -> tuple[str, str]:
        code = main.run(compare(npz, tmp_path, "--methods", methods, "--seeds", *more))
        shown = capsys.readouterr()
        assert code == 0, shown.err
        return shown.out, shown.err

    first, told = call("none,crop", "1")
    assert "Runs: 2 to do, 0 done" in told and str(npz) in first
    before = files(tmp_path)
    assert call("none,crop", "1") == (first, "")
    assert files(tmp_path) == before

    _, told = call("none,crop", "2")
    assert "Runs: 2 to do, 2 done" in told and told.count("seed 1: done") == 2
    _, told = call("none,crop,flip", "2")
    assert "Runs: 2 to do, 4 done" in told and told.count(", flip, ") == 2
    third, told = call("none,crop,head_refit(upstream=crop)", "1", "--controls")
    assert "Runs: 2 to do, 2 done" in told and "crop@train, seed 0: done" in told
    assert third.count("\ncrop@train ") == 1
    again, told = call("none,crop,head_refit(upstream=crop)", "1", "--controls")
    assert (again, told) == (third, "")
    after = files(tmp_path)
    assert {name: after[name] for name in before} == before


def test_a_run_may_be_of_one_fold(npz: Path, tmp_path: Path) -> None:
    """A comparison is of whole repeats; the run is one of those that a comparison makes."""
    folds = f"npz:{npz}(folds=5)"
    given = ["--benchmark", folds, *SMALL, "--epochs", "1", "--out", str(tmp_path)]
    assert main.run(["run", *given, "--seed", "3"]) == 0
    assert main.run(["compare", *given, "--methods", "none", "--seeds", "1"]) == 2


def test_a_network_that_looks_at_numbers_while_it_is_built(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "depths.py").write_text(
        "import torch\nfrom torch import nn\n\n\ndef make(spec):\n"
        "    rates = [each.item() for each in torch.linspace(0, 0.1, 2)]\n"
        "    layers = nn.Dropout(rates[1]), nn.Flatten(), nn.Linear(144, spec.classes)\n"
        "    return nn.Sequential(*layers)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    given = on(npz, tmp_path / "out", "--model", "py:depths:make", epochs=1)
    assert main.run(["run", *given]) == 0


@pytest.mark.usefixtures("here")
def test_a_missing_first_row_lends_its_place_to_no_other(
    npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = methods.Entry("no_such_module:Method", "plug-in")
    monkeypatch.setitem(methods.registry(), "absent", entry)
    given = compare(npz, tmp_path, "--methods", "absent,flip,crop", "--seeds", "1", epochs=1)
    assert main.run(given) == 1
    shown = capsys.readouterr().out
    assert "points of accuracy over absent" in shown
    assert re.search(r"^crop +1 .* n/a +not tested +n/a$", shown, re.M)


PLUGIN = '''
import torch
from methods.base import Method

class Costly(Method):
    """One more forward pass a row."""

    def __init__(self) -> None:
        super().__init__(None)

    def augment(self, batch, ctx):
        with torch.no_grad():
            ctx.model(batch.x)
        return batch
'''


@pytest.fixture
def costly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A registered method that costs more than its upstream."""
    (tmp_path / "plugin").mkdir()
    (tmp_path / "plugin" / "costly_method.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path / "plugin")
    entry = methods.Entry("costly_method:Costly", "plug-in")
    monkeypatch.setitem(methods.registry(), "costly", entry)


def cost(out: Path, method: str, **given: float) -> None:
    """Write another cost into the results of a method: clocks differ, on a busy machine by far."""
    for folder in runs.folders(out):
        result = runs.read_result(folder)
        if result is not None and runs.read_run(folder)[0].method == method:
            result["cost"] |= given
            runs.write_text(folder / "result.json", runs.to_json(result))


@pytest.mark.usefixtures("here", "costly")
@pytest.mark.parametrize("same", ["passes", "time"])
def test_a_row_of_equal_budget_is_taken_once(
    same: str, npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    given = compare(npz, out, "--methods", "none,costly", "--seeds", "1")
    assert main.run(given) == 0
    cost(out, "none", seconds_per_epoch=2.0)
    cost(out, "costly", seconds_per_epoch=3.0)
    capsys.readouterr()

    given += ["--same", same, "--verbose"]
    assert main.run(given) == 0
    shown = capsys.readouterr()
    assert "Runs: 1 to do, 0 done" in shown.err
    found = re.search(
        rf"^none \[{same} of costly\]: (\d+) epochs, ratio ([\d.]+) of", shown.out, re.M
    )
    assert found and (found[1], found[2]) == ("3", "1.5")
    before = files(out)
    assert main.run(given) == 0
    again = capsys.readouterr()
    assert (again.out, again.err) == (shown.out, "") and files(out) == before

    # Another cost of the same runs, as a further seed or a busy machine brings it.
    cost(out, "costly", seconds_per_epoch=9.0, passes_per_row=9.0)
    assert main.run(given) == 0
    again = capsys.readouterr()
    assert found[0] in again.out and again.err == "", "the number of epochs is taken once"


@pytest.mark.usefixtures("here")
def test_no_row_of_equal_budget_where_none_costs_an_epoch_more(
    npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = compare(npz, tmp_path, "--methods", "none,head_refit", "--seeds", "1")
    assert main.run([*given, "--same", "passes"]) == 0
    shown = capsys.readouterr()
    assert "No row exceeds its upstream by an epoch of passes" in shown.err
    assert "passes of" not in shown.out


@pytest.mark.usefixtures("here")
def test_too_few_rows_for_the_meta_split_is_a_row_that_was_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "few.npz"
    np.savez(path, **arrays((24, 40, 40)))  # type: ignore[arg-type]
    out = tmp_path / "out"
    reason = "the meta split takes 0.2 of each class, at least 5 rows"
    assert main.run(["run", *on(path, out, "--method", "head_refit")]) == 0
    assert f"skipped: {reason}" in capsys.readouterr().out

    assert main.run(compare(path, out, "--methods", "none,head_refit", "--seeds", "2")) == 0
    table = capsys.readouterr().out
    assert f"head_refit: skipped, seed 0: {reason}" in table
    assert "class 0 has 6 rows (and 1 more seed)" in table
    scores = dict(re.findall(r"^(none|head_refit) +(\d+) ", table, re.M))
    assert scores["none"] == "2" and re.search(r"^head_refit +0 +n/a", table, re.M)
    assert main.run(compare(path, out, "--methods", "head_refit", "--seeds", "1")) == 0
    assert capsys.readouterr().out.startswith("No run has a result.\nhead_refit: skip")


@pytest.mark.usefixtures("here")
def test_a_lost_run_is_shown_beside_the_others_and_redone_on_request(
    npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rate that is too high fails every run, so one that went well is put in from elsewhere."""
    hot = ["--optimizer", "sgd", "--learning-rate", "1e30", "--batch-size", "8"]
    given = compare(npz, tmp_path, "--methods", "none,crop", "--seeds", "1", *hot)
    reason = r"loss is (nan|inf) at epoch 1, step \d+, learning rate 1e\+30"
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "learning_rate", lambda training, epoch: 1e-3)
        alone = compare(npz, tmp_path, "--methods", "none", "--seeds", "1", *hot)
        assert main.run(alone) == 0
    capsys.readouterr()

    assert main.run(given) == 1
    shown = capsys.readouterr()
    assert re.search(rf"^crop: failed, seed 0: {reason}$", shown.out, re.M), shown.out
    assert re.search(r"^none +1 +\d+\.\d+ ", shown.out, re.M), "the other row is still there"
    assert re.search(r"^crop +0 +n/a ", shown.out, re.M)
    assert re.search(rf"\[1/1\].*crop, seed 0: failed: {reason}", shown.err)

    before = files(tmp_path)
    assert main.run(given) == 1
    again = capsys.readouterr()
    assert (again.out, again.err) == (shown.out, "") and files(tmp_path) == before

    assert main.run([*given, "--retry-failed"]) == 1
    redone = capsys.readouterr()
    assert "Runs: 1 to do, 1 done" in redone.err and redone.out == shown.out
    changed = {name for name, content in files(tmp_path).items() if before[name] != content}
    assert len({name.partition("/")[0] for name in changed}) == 1


def test_a_run_that_fails_is_redone_on_request(
    npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hot = ["--optimizer", "sgd", "--learning-rate", "1e30", "--batch-size", "8"]
    given = ["run", *on(npz, tmp_path, *hot)]
    assert main.run(given) == 1
    shown = capsys.readouterr().out
    assert re.search(r"failed: loss is \w+ at epoch 1, step \d+, learning rate 1e\+30\n", shown)
    assert left_behind(tmp_path) == set()
    before = files(tmp_path)
    assert main.run(given) == 1
    assert capsys.readouterr().out == shown and files(tmp_path) == before
    assert main.run([*given, "--retry-failed"]) == 1
    assert capsys.readouterr().out == shown and files(tmp_path) != before


@pytest.mark.usefixtures("here")
def test_why_the_selected_epoch_is_not_offered(
    npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = compare(npz, tmp_path, "--methods", "none", "--seeds", "1", "--selection", "selected")
    assert main.run(given) == 0
    assert "Selection  not available, the select split has 40 rows" in capsys.readouterr().out


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("name", ["run.json", "result.json", "metrics.jsonl", "predictions.npz"])
def test_a_directory_that_was_cut_short_is_redone(
    name: str, npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = compare(npz, tmp_path, "--methods", "none", "--seeds", "1")
    assert main.run(given) == 0
    capsys.readouterr()
    (folder,) = runs.folders(tmp_path)
    truth = (folder / name).read_bytes()
    (folder / name).write_bytes(truth[: len(truth) // 2])
    assert main.run(given) == 0
    assert "Runs: 1 to do, 0 done" in capsys.readouterr().err
    assert name == "result.json" or (folder / name).read_bytes() == truth


# --- predict --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kept(npz: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with its network."""
    out = tmp_path_factory.mktemp("kept")
    assert main.run(["run", *on(npz, out, "--save-model")]) == 0
    (folder,) = runs.folders(out)
    return folder


def test_predict_writes_what_the_run_predicted(
    kept: Path, npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, stored = tmp_path / "new" / "scans.csv", tmp_path / "scans.npz"
    for out in (table, stored):
        given = ["predict", str(kept), "--data", f"npz:{npz}", "--out", str(out)]
        assert main.run([*given, "--device", "cpu"]) == 0
        shown = capsys.readouterr().out
        assert f"40 rows predicted: {out}" in shown and "accuracy 0." in shown
    logits = runs.read_arrays(kept / "predictions.npz")["test_last_logits"]
    with np.load(stored) as content:
        np.testing.assert_array_equal(content["logits"], logits)
        probabilities = content["probabilities"]
    lines = table.read_text().splitlines()
    assert lines[0] == "row,0,1,2,3" and len(lines) == 41
    read = np.array([[float(cell) for cell in line.split(",")] for line in lines[1:]])
    np.testing.assert_array_equal(read[:, 0], np.arange(40))
    np.testing.assert_array_equal(read[:, 1:], probabilities)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)


def test_predict_takes_a_network_with_a_second_set_of_norms(npz: Path, tmp_path: Path) -> None:
    given = ["--method", "lpa3(auxiliary_norm=true, warmup=0)", "--save-model"]
    assert main.run(["run", *on(npz, tmp_path / "runs", *given)]) == 0
    (folder,) = runs.folders(tmp_path / "runs")
    out = tmp_path / "p.npz"
    assert main.run(["predict", str(folder), "--data", f"npz:{npz}", "--out", str(out)]) == 0
    with np.load(out) as content:
        logits = runs.read_arrays(folder / "predictions.npz")["test_last_logits"]
        np.testing.assert_array_equal(content["logits"], logits)


def test_predict_takes_images_without_labels(
    kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "new.npz", images=IMAGES[:7])
    out = tmp_path / "p.csv"
    given = ["predict", str(kept), "--data", f"npz:{tmp_path / 'new.npz'}", "--out", str(out)]
    assert main.run(given) == 0
    assert capsys.readouterr().out == f"7 rows predicted: {out}\n"


def test_predict_takes_a_folder_of_images(tmp_path: Path) -> None:
    for place, image in enumerate(np.random.default_rng(0).integers(0, 256, (36, 9, 12), np.uint8)):
        split, name = ("train", "test")[place % 3 == 2], "abc"[place % 4 % 3]
        (tmp_path / "set" / split / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "set" / split / name / f"{place}.png")
    data = f"folder:{tmp_path / 'set'}(size=12)"
    given = ["--model", "small_cnn", "--width", "0.25", "--epochs", "1", "--batch-size", "8"]
    out = tmp_path / "runs"
    assert main.run(["run", "--benchmark", data, *given, "--out", str(out), "--save-model"]) == 0
    (folder,) = runs.folders(out)
    table, stored = tmp_path / "p.csv", tmp_path / "p.npz"
    for file, size in ((table, ""), (stored, "(size=12)")):
        images = f"folder:{tmp_path / 'set' / 'test'}{size}"
        assert main.run(["predict", str(folder), "--data", images, "--out", str(file)]) == 0
    logits = runs.read_arrays(folder / "predictions.npz")["test_last_logits"]
    with np.load(stored) as content:
        np.testing.assert_array_equal(content["logits"], logits)
        files = content["files"].tolist()
    lines = table.read_text().splitlines()
    assert lines[0] == "file,a,b,c" and [line.split(",")[0] for line in lines[1:]] == files
    assert sorted(files) == files and files[0] == "a/11.png"


def test_data_is_the_folder_for_data_sets(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = refused(capsys, ["compare", "--data", "folder:scans"])
    assert code == 2 and "--benchmark 'folder:scans'" in text


@pytest.mark.parametrize(
    ("made", "code", "parts"),
    [
        ({"images": IMAGES[:, :8]}, 1, ("(1, 8, 12)", "network was trained on (1, 12, 12)")),
        ({"images": np.zeros((2, 12, 12, 3), np.uint8)}, 1, ("(3, 12, 12)", "(1, 12, 12)")),
        ({"images": IMAGES, "labels": LABELS + 9}, 1, ("labels do not fit", "0 to 3")),
        ({"images": IMAGES, "labels": LABELS[:5]}, 1, ("80 images and 5 labels",)),
        ({"pictures": IMAGES}, 1, ("has the keys pictures", "expected images")),
        (None, 1, ("is not a folder: expected one of images",)),
    ],
)
def test_predict_refuses_what_does_not_fit(
    made: Arrays | None,
    code: int,
    parts: tuple[str, ...],
    kept: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "new.npz"
    if made is not None:
        np.savez(path, **made)  # type: ignore[arg-type]
    data = f"npz:{path}" if made is not None else f"folder:{path}"
    out = tmp_path / "p.csv"
    out.write_text("earlier")
    got, text = refused(capsys, ["predict", str(kept), "--data", data, "--out", str(out)])
    assert got == code and all(part in text for part in parts), text
    assert out.read_text() == "earlier"


def test_predict_says_what_a_run_lacks(
    npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(["run", *on(npz, tmp_path / "out")]) == 0
    capsys.readouterr()
    (folder,) = runs.folders(tmp_path / "out")
    data = ["--data", f"npz:{npz}", "--out", str(tmp_path / "p.csv")]
    code, text = refused(capsys, ["predict", str(folder), *data])
    assert code == 2 and str(folder) in text and "augbench run --save-model" in text
    for other in (tmp_path, npz, tmp_path / "absent"):
        code, text = refused(capsys, ["predict", str(other), *data])
        assert code == 2 and f"run: {other} is not a run directory" in text
    code, text = refused(capsys, ["predict", str(folder), "--data", "npz:x", "--out", "p.txt"])
    assert code == 2
    assert main.run(["run", *on(npz, tmp_path / "out", "--save-model")]) == 0
    capsys.readouterr()
    code, text = refused(capsys, ["predict", str(folder), *data[:2], "--out", "p.txt"])
    assert code == 2 and "out: expected a name ending in .csv or .npz, got p.txt" in text
    assert main.run(["predict", str(folder), *data]) == 0


# --- disks ----------------------------------------------------------------------------------------


@contextmanager
def mounted(folder: Path, *options: str) -> Iterator[Path]:
    folder.mkdir()
    done = subprocess.run(
        ["mount", *options, str(folder)], check=False, capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_results_folder_below_a_file(
    npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for out in (file, file / "below"):
        for command in ("run", "compare"):
            code, text = refused(capsys, [command, *on(npz, out)])
            assert code == 1 and f"{out}: " in text and "expected a directory, found a file" in text
    assert file.read_text() == "mine"


def test_a_results_folder_that_is_read_only(
    npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with mounted(tmp_path / "closed", "-t", "tmpfs", "-o", "ro", "tmpfs") as out:
        for place in (out, out / "below"):
            code, text = refused(capsys, ["run", *on(npz, place)])
            assert code == 1 and str(place) in text and "Read-only file system" in text
            assert "choose another folder with --out" in text


def grow(folder: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)


@pytest.mark.parametrize("kib", [4, 16, 28, 40, 60, 100])
def test_a_full_disk_loses_nothing(
    kib: int, npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At these sizes the disk is full at the lock, in the checkpoint, and after it."""
    assert main.run(["run", *on(npz, tmp_path / "whole")]) == 0
    with mounted(tmp_path / "full", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs") as out:
        capsys.readouterr()
        assert main.run(["run", *on(npz, out)]) == 1
        shown = capsys.readouterr()
        assert shown.out == "" and "Traceback" not in shown.err
        assert re.search(
            rf"augbench: {out}/\S+: No space left on device; free some space", shown.err
        ), shown.err
        assert left_behind(out) <= {"checkpoint.pt"}
        grow(out, "4m")
        assert main.run(["run", *on(npz, out)]) == 0
        assert numbers(out) == numbers(tmp_path / "whole") and left_behind(out) == set()


def test_predictions_on_a_full_disk_leave_the_earlier_ones(
    kept: Path, npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with mounted(tmp_path / "full", "-t", "tmpfs", "-o", "size=8k", "tmpfs") as folder:
        (folder / "p.csv").write_text("earlier")
        given = ["predict", str(kept), "--data", f"npz:{npz}", "--out", str(folder / "p.csv")]
        (folder / "more").write_bytes(bytes(4096))
        code, text = refused(capsys, given)
        assert code == 1 and f"{folder / 'p.csv'}: No space left on device" in text
        assert (folder / "p.csv").read_text() == "earlier" and left_behind(folder) == set()


def test_a_comparison_on_a_full_disk_goes_on_when_there_is_room(
    npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With workers of its own: a full disk is nobody's failed run."""
    rows = ["--methods", "none,crop", "--seeds", "1"]
    for method in ("none", "crop"):
        assert main.run(["run", *on(npz, tmp_path / "whole", "--method", method)]) == 0
    with mounted(tmp_path / "full", "-t", "tmpfs", "-o", "size=40k", "tmpfs") as out:
        capsys.readouterr()
        assert main.run(compare(npz, out, *rows)) == 1
        shown = capsys.readouterr()
        for row in ("none", "crop"):
            assert re.search(
                rf"^{row}: not done, seed 0: {out}/\S+: No space left on device; free some",
                shown.out,
                re.M,
            ), shown.out
        assert "failed" not in shown.out and "Traceback" not in shown.err
        grow(out, "4m")
        monkeypatch.setattr(local.Processes, "carry_out", sweeping.carry_out_here)
        assert main.run(compare(npz, out, *rows)) == 0
        assert "not done" not in capsys.readouterr().out
        assert numbers(out) == numbers(tmp_path / "whole") and left_behind(out) == set()


# --- processes ------------------------------------------------------------------------------------

EPOCHS = 10
SLOW = "0.3"
"""Seconds of a step: of an epoch, as the data are one batch."""
SLOWLY = ["--model", "py:slowly:Network"]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    """The command in a process group of its own, as a shell starts it."""
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"SLOW": SLOW},
    )


def wait_for(what: Callable[[], object], seconds: float = 60) -> None:
    limit = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < limit, "it takes too long"
        time.sleep(0.01)


def checkpoints(out: Path) -> list[Path]:
    return list(out.glob("*/checkpoint.pt"))


def group_is_gone(pid: int) -> bool:
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return True
    return False


def workers_of(parent: int) -> list[int]:
    """Process ids of the workers, read from /proc."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status = (folder / "stat").read_text().rpartition(")")[2].split()
            command = (folder / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(status[1]) == parent and status[0] != "Z" and b"spawn_main" in command:
            found.append(int(folder.name))
    return found


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="there is no /proc")


@pytest.fixture(scope="module")
def undisturbed(longer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results that every run that was stopped and went on must have."""
    out = tmp_path_factory.mktemp("undisturbed")
    for method in ("none", "crop"):
        assert main.run(["run", *on(longer, out, *SLOWLY, "--method", method, epochs=EPOCHS)]) == 0
    return out


def test_one_works_and_the_other_waits_or_says_who(
    longer: Path, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["run", *on(longer, tmp_path, *SLOWLY, epochs=EPOCHS)]
    with start(given) as other:
        wait_for(lambda: checkpoints(tmp_path))
        code, text = refused(capsys, [*given, "--no-wait"])
        assert code == 1 and f"is held by process {other.pid} on " in text
        assert str(tmp_path) in text
        assert main.run(given) == 0, "waits for the other, then shows its result"
        assert other.wait(60) == 0
        theirs = other.stdout.read() if other.stdout else ""
    ours = capsys.readouterr()
    assert f"none, seed 0: waiting, held by process {other.pid}" in ours.err
    assert ours.out == theirs
    assert f"epoch {EPOCHS}/{EPOCHS}" not in ours.err, "the run was done once"
    truth = numbers(undisturbed)
    assert numbers(tmp_path).items() <= truth.items() and left_behind(tmp_path) == set()


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(("sign", "code"), [(signal.SIGINT, 130), (signal.SIGUSR1, 3)])
def test_compare_is_stopped_and_goes_on(
    sign: signal.Signals,
    code: int,
    longer: Path,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The signal reaches every process of the group, as from a terminal and from SLURM."""
    given = compare(
        longer, tmp_path, *SLOWLY, "--methods", "none,crop", "--seeds", "1", epochs=EPOCHS
    )
    with start(given) as process:
        wait_for(lambda: checkpoints(tmp_path))
        os.killpg(process.pid, sign)
        shown, errors = process.communicate(timeout=30)
    assert process.returncode == code and shown == "" and "Traceback" not in errors
    again = errors.rpartition("Resume with: augbench ")[2].strip()
    assert shlex.split(again) == given
    wait_for(lambda: group_is_gone(process.pid), 10)
    assert left_behind(tmp_path) == {"checkpoint.pt"}

    monkeypatch.setattr(local.Processes, "carry_out", sweeping.carry_out_here)
    assert main.run(shlex.split(again)) == 0
    assert numbers(tmp_path) == numbers(undisturbed) and left_behind(tmp_path) == set()
    result = [runs.read_result(folder) for folder in runs.folders(tmp_path)]
    assert sorted(each["resumed"] for each in result if each is not None) == [0, 1]


@contextmanager
def meanwhile(act: Callable[[], None]) -> Iterator[None]:
    """Does it in a thread while the block runs; what it raises is raised here."""
    errors: list[BaseException] = []

    def safely() -> None:
        try:
            act()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=safely)
    thread.start()
    yield
    thread.join(90)
    if errors:
        raise errors[0]


@contextmanager
def heeded(sign: signal.Signals) -> Iterator[None]:
    """The signal is taken by the program inside; the handler from before is put back."""

    def unheeded(number: int, frame: object) -> None:
        raise AssertionError(f"{sign.name} is not heeded")

    before = signal.signal(sign, unheeded)
    try:
        yield
    finally:
        assert signal.signal(sign, before) is unheeded, "the handler is put back"


def test_sigterm_on_compare(
    longer: Path,
    undisturbed: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = compare(longer, tmp_path, *SLOWLY, "--methods", "crop", "--seeds", "1", epochs=EPOCHS)

    def stop() -> None:
        wait_for(lambda: checkpoints(tmp_path))
        os.kill(os.getpid(), signal.SIGTERM)

    with heeded(signal.SIGTERM), meanwhile(stop), monkeypatch.context() as patch:
        patch.setenv("SLOW", SLOW)
        code = main.run(given)
    shown = capsys.readouterr()
    assert code == 130 and shown.out == ""
    assert shlex.join(["augbench", *given]) in shown.err
    assert not workers_of(os.getpid()) and left_behind(tmp_path) == {"checkpoint.pt"}
    monkeypatch.setattr(local.Processes, "carry_out", sweeping.carry_out_here)
    assert main.run(given) == 0
    (folder,) = runs.folders(tmp_path)
    assert (runs.read_result(folder) or {})["resumed"] == 1
    assert numbers(tmp_path).items() <= numbers(undisturbed).items()
    assert left_behind(tmp_path) == set()


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_a_run_is_stopped_and_goes_on(
    sign: signal.Signals,
    longer: Path,
    undisturbed: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = ["run", *on(longer, tmp_path, *SLOWLY, "--checkpoint-every", "7", epochs=EPOCHS)]

    class Stops(progress.Silent):
        def epoch(self, number: int, line: dict[str, Any]) -> None:
            if number == 5:
                os.kill(os.getpid(), sign)

    with heeded(sign), monkeypatch.context() as patch:
        patch.setattr(progress, "for_terminal", Stops)
        assert main.run(given) == 130
    shown = capsys.readouterr()
    assert shown.out == "" and "stopped in epoch 6; finished epochs kept: 5." in shown.err
    assert shlex.join(["augbench", *given]) in shown.err
    assert left_behind(tmp_path) == {"checkpoint.pt"}, "also what no checkpoint was due for"
    assert main.run(given) == 0
    assert f"resuming after epoch 5 of {EPOCHS}" in capsys.readouterr().err
    assert numbers(tmp_path).items() <= numbers(undisturbed).items()
    assert left_behind(tmp_path) == set()


@needs_proc
def test_a_worker_that_is_killed_takes_no_other_run_with_it(
    longer: Path,
    undisturbed: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = compare(
        longer, tmp_path, *SLOWLY, "--methods", "none,crop", "--seeds", "1", epochs=EPOCHS
    )

    def kill() -> None:
        wait_for(lambda: checkpoints(tmp_path))
        (worker,) = workers_of(os.getpid())
        blocked = Path(f"/proc/{worker}/status").read_text().partition("SigBlk:\t")[2][:16]
        assert int(blocked, 16) & 1 << signal.SIGINT - 1, "Ctrl-C is the parent's alone"
        os.kill(worker, signal.SIGKILL)

    with meanwhile(kill), monkeypatch.context() as patch:
        patch.setenv("SLOW", SLOW)
        assert main.run(given) == 1
    shown = capsys.readouterr()
    reason = "its process was ended by SIGKILL; out of memory?; rerun the same command to resume"
    assert f"none, seed 0: not done: {reason}" in shown.err and "crop, seed 0: done" in shown.err
    assert f"none: not done, seed 0: {reason}" in shown.out
    assert re.search(r"^crop +1 +\d+\.\d+ ", shown.out, re.M), "the other row is there"

    monkeypatch.setattr(local.Processes, "carry_out", sweeping.carry_out_here)
    assert main.run(given) == 0
    shown = capsys.readouterr()
    assert "Runs: 1 to do, 1 done" in shown.err and "not done" not in shown.out
    assert numbers(tmp_path) == numbers(undisturbed) and left_behind(tmp_path) == set()


@needs_proc
@pytest.mark.usefixtures("here")
def test_workers_end_by_themselves_when_the_parent_is_killed(
    longer: Path, undisturbed: Path, tmp_path: Path
) -> None:
    given = compare(
        longer, tmp_path, *SLOWLY, "--methods", "none,crop", "--seeds", "1", epochs=EPOCHS
    )
    with start(given) as process:
        wait_for(lambda: checkpoints(tmp_path))
        assert workers_of(process.pid)
        process.kill()
        process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL
    wait_for(lambda: group_is_gone(process.pid), 20)
    states = [runs.status_of(folder).state for folder in runs.folders(tmp_path)]
    assert states == ["interrupted"], "the worker did not go on to the end"
    assert main.run(given) == 0
    assert numbers(tmp_path) == numbers(undisturbed) and left_behind(tmp_path) == set()


@pytest.mark.parametrize("command", ["report", "plan"])
def test_a_reader_of_results_that_is_stopped_begins_anew(
    command: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stopped(_: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(records, "scan", stopped)
    given = [command, str(tmp_path), *(["--detect", "1"] if command == "plan" else [])]
    assert main.run(given) == 130
    again = shlex.join(["augbench", *given])
    told = capsys.readouterr().err
    assert told == f"\naugbench: stopped. Start again with: {again}\n"


@pytest.mark.parametrize("command", ["list", "--help", "run --help"])
@pytest.mark.parametrize("lines", [0, 1])
def test_a_reader_that_goes_away_sees_no_traceback(command: str, lines: int) -> None:
    line = f"{shlex.quote(sys.executable)} -m benchmarks {command} | head -n {lines}"
    done = subprocess.run(line, shell=True, check=False, capture_output=True, text=True)
    assert done.stderr == "" and len(done.stdout.splitlines()) == lines


def test_a_sign_that_the_terminal_does_not_have_is_replaced() -> None:
    code = (
        r"import benchmarks.cli.main as cli; cli.run = lambda _: print('1 \xb1 2') or 0; cli.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        check=False,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "1 ? 2\n", "")


def test_a_network_in_the_current_folder_is_found(npz: Path, tmp_path: Path) -> None:
    """The installed command has its own folder on Python's path, not the current one."""
    (tmp_path / "mynet.py").write_text(
        "from torch import nn\n"
        "def make(spec):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(144, spec.classes))\n"
    )
    given = ["run", *on(npz, tmp_path / "out"), "--model", "py:mynet:make"]
    code = f"import sys, benchmarks.cli.main as cli; sys.argv[1:] = {given!r}; cli.main()"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(main.__file__).parent.parent)},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "py:mynet:make, none, seed 0" in done.stdout


def test_list_loads_nothing_that_takes_long() -> None:
    code = (
        "import sys, benchmarks.cli.main as cli; assert cli.run(['list']) == 0; "
        "heavy = {'torch', 'torchvision', 'kornia', 'sklearn', 'scipy', 'pandas', 'matplotlib', "
        "'ray', 'PIL', 'tqdm'}; print(heavy & {*sys.modules}, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stderr == "set()\n"
    for heading in ("Upstreams", "Controls", "Benchmarks", "Models", "Training presets"):
        assert f"{heading}\n" in done.stdout
    assert re.search(r"^  mixup .*\[Zhang et al\., .*arXiv:1710\.09412\]$", done.stdout, re.M)
