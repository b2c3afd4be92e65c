"""Cells: what an id holds and what not, control rows, equal budgets."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from analysis import runs
from analysis.runs import Training
from benchmarks.data.dataset import from_arrays
from benchmarks.data.names import Benchmark, parse_benchmark
from benchmarks.data.splits import Protocol, make_splits
from benchmarks.data.streams import training_order
from benchmarks.studies import cells
from benchmarks.studies.cells import (
    Cell,
    Row,
    control_rows,
    equal_budget_names,
    equal_budget_rows,
    make_cell,
    parse_row,
)
from benchmarks.training import models
from methods.base import Spec
from methods.naming import NamingError

EQUAL, PAPER = Protocol(), Protocol(name="paper")
DIGITS = parse_benchmark("digits")


def cell(
    row: str | Row = "none",
    benchmark: Benchmark = DIGITS,
    protocol: Protocol = EQUAL,
    seed: int = 0,
    **overrides: Any,
) -> Cell:
    row = parse_row(row, protocol) if isinstance(row, str) else row
    training = cells.training_of("medmnist", overrides)
    return make_cell(row, benchmark, "small_cnn", training, protocol, seed, checksum="abc")


def identity(*arguments: Any, **overrides: Any) -> str:
    return cell(*arguments, **overrides).run.id


def test_what_decides_no_number_is_not_part_of_the_id() -> None:
    plain = identity()
    assert plain == identity("none+none")
    assert plain == identity(protocol=Protocol(meta_fraction=0.1))
    assert plain == identity(protocol=Protocol(crossfit=5))
    assert plain == identity(momentum=0.5), "Adam has no momentum"
    assert identity(schedule="constant") == identity(schedule="constant", gamma=0.5)
    assert identity(protocol=PAPER) == identity(protocol=Protocol(name="paper", meta_fraction=0.1))
    assert identity("mixup") == identity("mixup(alpha=0.2)")
    path = parse_benchmark("pathmnist")
    assert identity(benchmark=path) == identity(benchmark=parse_benchmark("pathmnist(as_rgb=true)"))


def test_what_decides_a_number_is_part_of_the_id() -> None:
    noisy = parse_benchmark("digits(noise=0.4)")
    less = Protocol(meta_fraction=0.1)
    ids = [
        identity(),
        identity(seed=1),
        identity(protocol=PAPER),
        identity("none@train"),
        identity("none@train", protocol=less),
        identity("none@meta"),
        identity("head_refit"),
        identity("head_refit", protocol=less),
        identity("head_refit", protocol=Protocol(crossfit=2)),
        identity(benchmark=noisy),
        identity(benchmark=noisy, protocol=less),
        identity("head_refit", benchmark=noisy),
        identity("head_refit@dirty", benchmark=noisy),
        identity(optimizer="sgd"),
        identity(optimizer="sgd", momentum=0.5),
        identity(gamma=0.5),
        identity(Row("none", budget="passes of x", epochs=200)),
        identity(benchmark=parse_benchmark("dermamnist")),
        identity(benchmark=parse_benchmark("octmnist(as_rgb=true)")),
    ]
    assert len(set(ids)) == len(ids)


def test_the_whole_pool_trains_alike_however_it_is_cut() -> None:
    """The baseline's batches are a function of its rows, not of the protocol around it."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (120, 8, 8), dtype=np.uint8)
    pair = images, np.arange(120) % 3
    arrays = from_arrays("test", pair, pair, pair)
    seen = []
    for protocol in (EQUAL, Protocol(meta_fraction=0.4), Protocol(crossfit=3), PAPER):
        test, cpu = Benchmark(name="test"), torch.device("cpu")
        made = make_splits(arrays, test, protocol, needs_meta=False, seed=0, device=cpu)
        order = training_order(len(made.train), made.folds, 16, 8, 0, 0, "train")
        assert len(made.train) == made.pool == 120
        seen.append(torch.cat([made.train.inputs(index) for index in order]))
    assert all(torch.equal(seen[0], other) for other in seen[1:])


def test_training_on_both_official_splits_copies_no_image() -> None:
    rng = np.random.default_rng(0)
    train = rng.integers(0, 256, (30, 8, 8), dtype=np.uint8), np.arange(30) % 3
    val = rng.integers(0, 256, (12, 8, 8), dtype=np.uint8), np.arange(12) % 3
    arrays = from_arrays("test", train, val, val)
    made = make_splits(
        arrays, Benchmark(name="test"), PAPER, needs_meta=False, seed=0,
        device=torch.device("cpu"), control="train+meta",
    )  # fmt: skip
    x, other = made.train.x, made.select.x
    assert isinstance(x, torch.Tensor) and isinstance(other, torch.Tensor)
    assert x.data_ptr() != other.data_ptr()
    assert made.train.more is not None
    assert made.train.more.data_ptr() == other.data_ptr()
    both = np.concatenate([train[0], val[0]])
    index = torch.tensor([3, 41, 0, 29, 30])
    torch.testing.assert_close(
        made.train.inputs(index)[:, 0], torch.from_numpy(both[index.numpy()]).float() / 255
    )
    labels = np.concatenate([train[1], val[1]])
    assert made.train.y.argmax(1).tolist() == labels.tolist()


def test_control_rows() -> None:
    noisy = parse_benchmark("digits(noise=0.4)")
    rows = [Row("mixup"), Row("head_refit(upstream=mixup)")]
    assert control_rows(rows, DIGITS, EQUAL) == [Row("mixup", "train")]
    assert control_rows(rows, DIGITS, PAPER) == [Row("mixup", "train+meta")]
    assert control_rows(rows, noisy, EQUAL) == [
        Row("mixup", "train"),
        Row("mixup", "meta"),
        Row("head_refit(upstream=mixup)", dirty=True),
    ]
    assert control_rows([Row("head_refit")], DIGITS, EQUAL) == [Row("none"), Row("none", "train")]
    assert control_rows([Row("mixup")], noisy, EQUAL) == []


@pytest.mark.parametrize(
    ("text", "protocol", "same"),
    [("none@train+meta", EQUAL, "none"), ("none@train", PAPER, "none")],
)
def test_names_for_the_same_rows_are_one(text: str, protocol: Protocol, same: str) -> None:
    assert parse_row(text, protocol) == Row(same)


@pytest.mark.parametrize(
    "text", ["none@trian", "none@meta@train", "head_refit@train", "none@dirty"]
)
def test_a_control_that_says_nothing_is_refused(text: str) -> None:
    with pytest.raises(NamingError):
        parse_row(text, EQUAL)


def test_dirty_rows_need_noise() -> None:
    with pytest.raises(NamingError, match="no noise for its meta rows"):
        cell("head_refit@dirty")


def finish(root: Path, made: Cell, passes: float) -> None:
    """The run as done, with a cost."""
    folder = runs.folder_of(root, made.run)
    folder.mkdir(parents=True)
    text = json.dumps({"run": asdict(made.run), "recorded": made.recorded})  # type: ignore[call-overload]
    (folder / "run.json").write_text(text)
    result = {
        "status": "done",
        "files": {},
        "cost": {"passes_per_row": passes, "seconds_per_epoch": passes},
        "device": {"name": "a machine"},
    }
    (folder / "result.json").write_text(json.dumps(result))


@pytest.mark.parametrize("kind", ["passes", "time"])
def test_equal_budgets_are_taken_once(tmp_path: Path, kind: Any) -> None:
    made = [
        cell(method, seed=seed) for seed in (0, 1) for method in ("none", "head_refit", "mixup")
    ]
    for each in made[:3]:
        finish(tmp_path, each, {"none": 2.0, "head_refit": 5.06, "mixup": 2.0}[each.run.method])
    (row,) = equal_budget_rows(made, tmp_path, kind)
    assert row.method == "none" and row.budget == f"{kind} of head_refit"
    assert row.epochs == (253 if kind == "passes" else 250)  # a ratio of time is rounded to 0.1
    assert "a machine" in row.detail

    finish(tmp_path, cell(row), 2.0)
    for each in made[3:]:
        finish(tmp_path, each, 20.0 if each.run.method == "head_refit" else 2.0)
    assert equal_budget_rows(made, tmp_path, kind) == [row], "another seed must not move it"


def test_what_a_method_does_in_addition_is_left_out_at_equal_passes(tmp_path: Path) -> None:
    """FixMatch gets the passes of LP-A3 in it; where that is no row, their upstream does."""
    attacked = "fixmatch(attack=lpa3(ratio=0.9), attack_threshold=0.8, upstream=crop)"
    passes = {"crop": 2.0, "fixmatch(upstream=crop)": 20.0, attacked: 140.0}
    made = [cell(name) for name in passes]
    for each in made:
        finish(tmp_path, each, passes[each.run.method])
    found = {
        (row.method, row.budget): row.epochs for row in equal_budget_rows(made, tmp_path, "passes")
    }
    assert found == {
        ("crop", "passes of fixmatch(upstream=crop)"): 1000,
        ("fixmatch(upstream=crop)", f"passes of {attacked}"): 700,
    }
    (row,) = equal_budget_rows([made[0], made[2]], tmp_path, "passes")
    assert (row.method, row.epochs) == ("crop", 7000)
    names = equal_budget_names([Row(name) for name in passes], "passes")
    assert f"fixmatch(upstream=crop) [passes of {attacked}]" in names


def test_equal_budgets_of_another_comparison_are_its_own(tmp_path: Path) -> None:
    for epochs, passes in ((100, 5.0), (40, 8.0)):
        made = [cell(method, epochs=epochs) for method in ("none", "head_refit")]
        finish(tmp_path, made[0], 2.0)
        finish(tmp_path, made[1], passes)
        (row,) = equal_budget_rows(made, tmp_path, "passes")
        assert row.epochs == round(epochs * passes / 2)
        finish(tmp_path, cell(row, epochs=epochs), 2.0)


def test_equal_budgets_of_another_cut_of_the_pool_are_their_own(tmp_path: Path) -> None:
    """The baseline is one run for both, the method is not."""
    for fraction, passes in ((0.1, 3.0), (0.5, 4.0)):
        protocol = Protocol(meta_fraction=fraction)
        made = [cell(method, protocol=protocol) for method in ("none", "head_refit")]
        for each, cost in zip(made, (2.0, passes), strict=True):
            if not runs.folder_of(tmp_path, each.run).exists():
                finish(tmp_path, each, cost)
        (row,) = equal_budget_rows(made, tmp_path, "passes")
        assert row.epochs == round(100 * passes / 2)
        finish(tmp_path, cell(row, protocol=protocol), 2.0)


def test_a_dirty_row_that_is_the_same_run_is_not_added() -> None:
    dirty = parse_benchmark("digits(noise=0.4, meta_noise=0.4)")
    assert control_rows([Row("none"), Row("head_refit")], dirty, EQUAL) == [
        Row("none", "train"),
        Row("none", "meta"),
    ]


def test_ones_own_network_is_known_by_its_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = (
        "import torch\n\ndef make(spec):\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(spec.classes))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "mynet_one.py").write_text(source)
    (tmp_path / "mynet_two.py").write_text(source + "# changed\n")
    one, two = (models.version_of(f"py:mynet_{name}:make") for name in ("one", "two"))
    (tmp_path / "mynet_three.py").write_text(
        source + "import functools\nmake = functools.partial(make)\n"
    )
    assert models.version_of("py:mynet_three:make") not in (one, two)
    assert one != two and models.version_of("resnet18") == models.VERSION
    network = models.build("py:mynet_one:make", Spec(2, 3, (1, 8, 8)))
    assert network(torch.rand(2, 1, 8, 8)).shape == (2, 3)


def test_width_goes_into_the_model() -> None:
    assert cells.model_name("resnet18", 0.25) == "resnet18(width=0.25)"
    assert cells.model_name("resnet18(activation=celu)", 1.0) == "resnet18(activation=celu)"
    with pytest.raises(NamingError, match="width"):
        cells.model_name("resnet18(width=0.5)", 0.25)


def test_presets_and_overrides() -> None:
    assert cells.training_of("medmnist", {}) == Training(channels_last=True)
    sgd = cells.training_of("autodo", {"epochs": 30})
    assert sgd == replace(runs.PRESETS["autodo"][1], epochs=30)
    with pytest.raises(NamingError, match="did you mean 'medmnist'"):
        cells.training_of("medmist", {})
    with pytest.raises(NamingError, match="warmup_epochs: expected 0 to 2"):
        cells.training_of("autodo", {"epochs": 3})
