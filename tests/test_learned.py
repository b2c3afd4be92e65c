"""learned.npz, what a method learned of each training row in the order of the training split; and
samples.npz, some of the images that it trained on."""

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import methods
from analysis import runs
from benchmarks.data.names import parse_benchmark
from benchmarks.data.splits import Protocol, arrays_of, make_splits
from benchmarks.data.streams import chunks
from benchmarks.data.streams import training_order as order_of
from benchmarks.running.disk import Options, execute
from benchmarks.studies import cells
from benchmarks.training.errors import Interrupted
from benchmarks.training.progress import Silent

EPOCHS, BATCH = 3, 16
ROWS = (80, 40, 40)


@pytest.fixture(scope="module")
def npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng, made = np.random.default_rng(0), {}
    for split, count in zip(("train", "val", "test"), ROWS, strict=True):
        made[f"{split}_images"] = rng.integers(0, 256, (count, 12, 12)).astype(np.uint8)
        made[f"{split}_labels"] = rng.permutation(np.arange(count) % 4)
    path = tmp_path_factory.mktemp("data") / "small.npz"
    np.savez(path, **made)
    return path


def carry_out(
    npz: Path, out: Path, method: str, progress: Silent | None = None, *, seed: int = 0
) -> Path:
    """The directory of a run of the method."""
    benchmark = parse_benchmark(f"npz:{npz}")
    cell = cells.make_cell(
        cells.parse_row(method, Protocol()),
        benchmark,
        cells.model_name("small_cnn", 0.25),
        cells.training_of("medmnist", {"epochs": EPOCHS, "batch_size": BATCH}),
        Protocol(),
        seed,
        checksum="",
        threads=1,
        oracle_test=False,
        preset="medmnist",
    )
    out.mkdir(exist_ok=True)
    status = execute(cell.run, cell.recorded, out, Options(), benchmark, progress)
    folder = runs.folder_of(out, cell.run)
    assert status.state == "done", (runs.read_result(folder) or {}).get("traceback")
    return folder


def learned(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / "learned.npz", allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}


def scored(rows: int, method: str) -> np.ndarray:
    """(N,) how often each training row is among the scored ones of its batch."""
    weighted = methods.build(method).weighted
    steps, counts = len(chunks(ROWS[0], BATCH)), np.zeros(rows, int)
    for epoch in range(EPOCHS):
        for index in order_of(rows, (), BATCH, steps, epoch, 0, "train"):
            counts += np.bincount(index[: weighted(len(index))], minlength=rows)
    return counts


@pytest.mark.parametrize(
    "method", ["saflex", "saflex(preset=stable, upstream=mixup)", "l2rw(upstream=crop)"]
)
def test_rows_are_those_of_the_training_split(method: str, npz: Path, tmp_path: Path) -> None:
    folder = carry_out(npz, tmp_path, method)
    found = learned(folder)
    result = runs.read_result(folder)
    assert result is not None
    rows = result["data"]["rows"]["train"]
    assert rows == 60, "the meta rows are not among them"
    assert {name: value.shape for name, value in found.items()} == {
        "weight": (rows,),
        "label": (rows, 4),
        "seen": (rows,),
    }
    assert all(value.dtype == np.float32 for value in found.values())
    assert result["files"]["learned.npz"] == (folder / "learned.npz").stat().st_size
    learning = result["learning"]
    far = np.abs(found["weight"][found["seen"] > 0] - 1)
    assert learning["weight"] == pytest.approx(np.quantile(far, 0.5, method="lower"), abs=1e-5)
    assert (learning["label"] > 0.01) is (not method.startswith("l2rw")), "l2rw keeps labels"
    counts = scored(rows, method)
    np.testing.assert_array_equal(found["seen"], counts)
    assert counts.min() < counts.max(), "else this test sees no order"
    was = counts > 0
    assert found["weight"].std() > 0.1
    np.testing.assert_allclose(found["label"][was].sum(axis=1), 1, atol=1e-5)


def test_labels_that_are_kept_are_the_split_s_own(npz: Path, tmp_path: Path) -> None:
    folder = carry_out(npz, tmp_path, "saflex(labels=keep, weights=one, upstream=mixup)")
    result = runs.read_result(folder)
    assert result is not None and result["learning"] == pytest.approx({"weight": 0, "label": 0})
    found = learned(carry_out(npz, tmp_path, "saflex(labels=keep, weights=one)"))
    benchmark = parse_benchmark(f"npz:{npz}")
    splits = make_splits(
        arrays_of(benchmark, tmp_path),
        benchmark,
        Protocol(),
        needs_meta=True,
        seed=0,
        device=torch.device("cpu"),
    )
    was = found["seen"] > 0
    np.testing.assert_allclose(found["label"][was], splits.train.y.numpy()[was], atol=1e-6)
    np.testing.assert_allclose(found["weight"][was], 1, atol=1e-6)


@pytest.mark.parametrize("method", ["none", "crop+mixup"])
def test_what_learns_nothing_writes_none(method: str, npz: Path, tmp_path: Path) -> None:
    folder = carry_out(npz, tmp_path, method)
    assert not list(folder.glob("*learned*"))
    result = json.loads((folder / "result.json").read_text())
    assert "learned.npz" not in result["files"] and "learning" not in result


class Ends(Silent):
    """Asks the run to stop at the end of an epoch."""

    def __init__(self, number: int) -> None:
        self.number = number

    def epoch(self, number: int, line: dict[str, Any]) -> None:
        if number == self.number:
            signal.raise_signal(signal.SIGTERM)


def test_interrupted_and_resumed_is_the_same_file(npz: Path, tmp_path: Path) -> None:
    method = "saflex(upstream=randaugment)"
    whole = carry_out(npz, tmp_path / "whole", method)
    for number in range(1, EPOCHS):
        with pytest.raises(Interrupted):
            carry_out(npz, tmp_path / "parts", method, Ends(number))
    assert not list((tmp_path / "parts").rglob("learned.npz")), "nothing before the end"
    parts = carry_out(npz, tmp_path / "parts", method)
    result = runs.read_result(parts)
    assert result is not None and result["resumed"] == EPOCHS - 1
    for name in ("learned.npz", "samples.npz"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize("method", ["none", "flip(p=1.0)", "lpa3(warmup=1)"])
def test_images_of_the_last_epoch_are_kept_as_drawn_and_as_trained_on(
    method: str, npz: Path, tmp_path: Path
) -> None:
    folder = carry_out(npz, tmp_path, method)
    with np.load(folder / "samples.npz", allow_pickle=False) as stored:
        drawn, trained = stored["drawn"], stored["trained"]
    with np.load(npz) as stored:
        images = stored["train_images"].reshape(ROWS[0], *drawn.shape[1:])
    steps = len(chunks(ROWS[0], BATCH))
    first = order_of(ROWS[0], (), BATCH, steps, EPOCHS - 1, 0, "train")[0]
    assert drawn.shape == trained.shape and len(drawn) == 4 and drawn.dtype == np.uint8
    if method == "lpa3(warmup=1)":  # half of the batch, in its order
        places = [
            int(np.flatnonzero((images[first] == one).all(axis=(1, 2, 3)))[0]) for one in drawn
        ]
        assert places == sorted(places) and len(set(places)) == 4
        assert (trained != drawn).any(axis=(1, 2, 3)).all()
        return
    np.testing.assert_array_equal(drawn, images[first[:4]])
    np.testing.assert_array_equal(trained, drawn if method == "none" else drawn[:, :, ::-1])


def test_images_are_kept_of_the_first_seed_alone(npz: Path, tmp_path: Path) -> None:
    assert not list(carry_out(npz, tmp_path, "none", seed=1).glob("samples*"))


def test_a_file_cut_short_is_made_again(npz: Path, tmp_path: Path) -> None:
    path = carry_out(npz, tmp_path, "l2rw") / "learned.npz"
    content = path.read_bytes()
    path.write_bytes(content[:-10])
    assert runs.read_result(path.parent) is None
    carry_out(npz, tmp_path, "l2rw")
    assert path.read_bytes() == content
