"""``augbench show``: the figure holds what the method made, and says so."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.text import Text
from PIL import Image
from torch import Tensor

import methods
from analysis.report import plots
from analysis.report.plots import Band
from analysis.runs import Run, Training
from benchmarks.cli import main
from benchmarks.cli import show as drawing
from benchmarks.data.splits import NotApplicable
from benchmarks.training import errors, trainer
from benchmarks.training.context import TrainingContext
from methods.base import Batch, Chain, Context, Method
from tests.made import saved_figures
from tests.pipelines import OWN

SMALL = ["--model", "small_cnn(width=0.25)"]


def show(out: Path, *arguments: str) -> int:
    return main.run(["show", "--out", str(out), *arguments])


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What reaches the figure; with ``drawn["picture"] = True`` it is drawn too."""
    seen: dict[str, Any] = {"picture": False}
    real = plots.augmentation_grid

    def spy(
        originals: Any, draws: Any, labels: Any, captions: Any, title: str, path: Path, **more: Any
    ) -> None:
        seen.update(originals=originals, draws=draws, labels=labels, captions=captions, title=title)
        seen.update(more)
        if seen["picture"]:
            real(originals, draws, labels, captions, title, path, **more)

    monkeypatch.setattr(drawing, "augmentation_grid", spy)
    return seen


PICTURES = {"none", "mixup", "lpa3", "crop+flip+randaugment(n=3)"}
"""No caption, mixed labels, added rows, many operations: the pictures that look different."""
WHOLE = {
    "frozen": "frozen(upstream=autodo)",
    "isotropic_noise": "isotropic_noise(upstream=isda)",
    "lpa3": "lpa3(warmup=0)",  # its first epochs are a warm-up
    "mean_strength": "mean_strength(upstream=entaugment)",
    "no_consistency": "no_consistency(upstream=augmix)",
    "norm_noise": "norm_noise(upstream=lpa3(warmup=0))",
    "one_chain": "one_chain(upstream=augmix)",
    "shuffled_policies": "shuffled_policies(upstream=adaaug)",
    "shuffled_policy": "shuffled_policy(upstream=autoaugment)",
    "shuffled_strengths": "shuffled_strengths(upstream=entaugment)",
    "shuffled_weights": "shuffled_weights(upstream=saflex)",
    "unconstrained": "unconstrained(upstream=medaugment)",
    "wrap": OWN[1],
}
"""Methods that need arguments to be shown, mostly controls of another method."""
TABLES = ("cell_swap", "tabular_cutmix", "boosting", "logistic")
"""Methods for tables only."""
FEW_LABELS = ("fixmatch", "pseudo_label", "mixmatch", "mean_teacher")
"""Methods that need unlabelled rows."""
SHOWN = [
    name for name in methods.BUILTIN if name not in (*TABLES, *FEW_LABELS, "generated")
]  # the last needs rows from elsewhere


@pytest.mark.parametrize("method", [*SHOWN, "crop+flip+randaugment(n=3)", OWN[0]])
def test_every_method_is_shown(method: str, drawn: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "show.png"
    drawn["picture"] = method in PICTURES
    method = WHOLE.get(method, method)
    assert show(out, "--method", method, "--rows", "3", "--draws", "2") == 0
    if drawn["picture"]:
        with Image.open(out) as picture:
            assert picture.width > 400 and picture.height > 300
            assert len(np.unique(np.asarray(picture.convert("L")))) > 20
    assert drawn["draws"].shape == (3, 2, 28, 28, 1)
    assert drawn["draws"].min() >= 0 and drawn["draws"].max() <= 1
    assert len(drawn["captions"]) == 3 and all(len(row) == 2 for row in drawn["captions"])
    texts = [text for row in drawn["captions"] for text in row]
    assert "$" not in " ".join([*texts, *drawn["labels"], drawn["title"]]), "drawn as mathematics"
    names = [label.partition("\n")[0] for label in drawn["labels"]]
    assert sorted(names) == ["0", "1", "2"], "a row of each class in turn"


def test_nothing_is_said_where_nothing_was_done(drawn: dict[str, Any], tmp_path: Path) -> None:
    assert show(tmp_path / "show.svg", "--method", "none", "--draws", "2") == 0
    assert {text for row in drawn["captions"] for text in row} == {""}
    assert np.array_equal(drawn["draws"][:, 0], drawn["originals"])


def test_operations_mixed_labels_and_weights_are_told(
    drawn: dict[str, Any], tmp_path: Path
) -> None:
    assert show(tmp_path / "show.png", "--method", "randaugment", "--rows", "10") == 0
    texts = " ".join(text for row in drawn["captions"] for text in row)
    assert "rotate" in texts and "°" in texts and "translate x" in texts and "px" in texts
    assert show(tmp_path / "show.png", "--method", "mixup(alpha=1.0)", "--rows", "4") == 0
    assert any(text.count("0.") == 2 for row in drawn["captions"] for text in row)
    assert show(tmp_path / "show.png", "--method", "soft_augmentation", "--rows", "4") == 0
    assert any("weight x" in text for row in drawn["captions"] for text in row)


def test_each_link_of_a_chain_fits_on_a_line(drawn: dict[str, Any], tmp_path: Path) -> None:
    assert show(tmp_path / "show.png", "--method", "crop+random_erasing(p=1.0)+randaugment") == 0
    texts = [text for row in drawn["captions"] for text in row]
    parts = [part for text in texts for part in text.split(", ")]
    assert any(part.startswith("crop ") for part in parts)
    assert any(part.startswith("erased ") for part in parts)
    assert max(map(len, parts)) < plots.CAPTION_WIDTH


@pytest.mark.parametrize(
    "method",
    [
        "lpa3(preset=strict, warmup=1)",
        "norm_noise(upstream=lpa3(preset=strict, warmup=1))",
        "crop+lpa3(auxiliary_norm=true, warmup=0)",
    ],
)
def test_added_rows_stand_beside_their_originals_with_difference_and_confidence(
    method: str, drawn: dict[str, Any], tmp_path: Path
) -> None:
    arguments = ["--method", method, "--rows", "5", "--epochs", "1", *SMALL]
    assert show(tmp_path / "show.png", *arguments) == 0
    originals, draws = drawn["originals"], drawn["draws"]
    assert originals.shape == (5, 28, 28, 1) and draws.shape == (5, 2, 28, 28, 1)
    assert drawn["columns"][0] == "augmented"
    scale = float(drawn["columns"][1].removeprefix("difference x "))
    change = draws[:, 0] - originals
    assert np.abs(change).max() * scale == pytest.approx(0.5, rel=0.01)
    np.testing.assert_allclose(draws[:, 1], 0.5 + scale * change, atol=0.005)
    for label, (said, norm), one in zip(drawn["labels"], drawn["captions"], change, strict=True):
        name, before = label.split("\n")
        assert name in "0123456789"
        classes, shares = zip(
            *(text.removeprefix("says ").split(": ") for text in (before, said)), strict=True
        )
        if method.startswith("lpa3(preset=strict"):
            assert classes[0] == classes[1], "strict keeps the prediction"
        assert all(0.1 <= float(share) <= 1 for share in shares)
        assert norm == f"norm {np.linalg.norm(one):.2f}"
    assert "in eval mode" in drawn["title"] and "network after 1 epoch" in drawn["title"]


def test_a_method_that_adds_no_row_yet_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert show(tmp_path / "show.png", "--method", "lpa3") == 2
    told = capsys.readouterr().err
    assert "adds no row in epoch 1: give --epochs its warm-up, or set warmup=0" in told


def test_the_same_seed_draws_the_same(drawn: dict[str, Any], tmp_path: Path) -> None:
    found = []
    for seed in ("3", "3", "4"):
        assert show(tmp_path / "show.png", "--method", "crop", "--seed", seed) == 0
        found.append(drawn["draws"])
    assert np.array_equal(found[0], found[1]) and not np.array_equal(found[0], found[2])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rows", "0"], "rows: expected 1 or more, got 0"),
        (["--epochs", "-1"], "epochs: expected 0 or more, got -1"),
        (["--seed", "-1"], "seed: expected 0 or more, got -1"),
        (["--out", "nowhere/x.png"], "expected a name in a folder that exists, got nowhere/x.png"),
        (["--out", "x.bmp"], "expected a name in .png, .pdf or .svg"),
        (["--method", "mixupp"], "did you mean 'mixup'"),
        (["--benchmark", "digit"], "did you mean 'digits'"),
        (["--method", "crop(pad=40, mode=reflect)"], "cannot be shown here"),
    ],
)
def test_bad_input(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert show(tmp_path / "show.png", *arguments) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_captions_of_a_chain_never_break_within_an_operation() -> None:
    parts = ["crop -3 +1 px", "erased 11 x 27 px", "shift -5 -12 px", "pneumonia: 0.95"]
    wrapped = plots._wrapped(", ".join(parts)).replace("\u00a0", " ")
    assert wrapped.split("\n") == [f"{part}," for part in parts[:-1]] + parts[-1:]


def test_captions_break_between_operations() -> None:
    wrapped = plots._wrapped("translate y -3 px, shear x -0.09")
    assert [line.replace("\u00a0", " ") for line in wrapped.split("\n")] == [
        "translate y -3 px,",
        "shear x -0.09",
    ]


# --- by weight ------------------------------------------------------------------------------------


@pytest.fixture
def banded(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What reaches the figure of bands, by the start of the heading; drawn as ``drawn`` is."""
    seen: dict[str, Any] = {"picture": False}
    real = plots.sample_bands

    def spy(bands: Sequence[Band], title: str, paths: Sequence[Path]) -> None:
        seen.update(title=title, headings=[band.heading for band in bands])
        seen["bands"] = {band.heading.partition(" (")[0]: band for band in bands}
        if seen["picture"]:
            real(bands, title, paths)

    monkeypatch.setattr(drawing, "sample_bands", spy)
    return seen


class Graded(Method):
    """Weights and moves of labels that follow from the row; clean rows would be the extremes."""

    def __init__(self, upstream: Method | None = None) -> None:
        super().__init__(upstream)
        self.seen: list[tuple[Batch, Batch]] = []
        """Of each call the scored rows, before and after."""
        self.places: list[tuple[int, int, int]] = []
        self.ctx: Any = None
        self.calls: list[str] = []

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        self.calls.append("setup")

    def begin_epoch(self, ctx: Context) -> None:
        super().begin_epoch(ctx)
        self.calls.append(f"epoch {ctx.epoch}")

    def weighted(self, rows: int) -> int:
        return rows // 2

    def augment(self, batch: Batch, ctx: Context) -> Batch:
        self.ctx = ctx
        self.places.append((ctx.epoch, ctx.epochs, ctx.step))
        count = self.weighted(len(batch.x))
        parts = [
            replace(batch, x=batch.x[s], y=batch.y[s], w=batch.w[s], index=batch.index[s])
            for s in (slice(count), slice(count, None))
        ]
        part, clean = parts
        if self.upstream is not None:
            part = self.upstream.augment(part, ctx)
            if len(self.seen) % 2:  # what it asks of its upstream later is not what it refines
                self.upstream.augment(clean, ctx)
        share = part.index / ctx.spec.rows
        move = (part.index * 7919 % ctx.spec.rows / ctx.spec.rows)[:, None]
        goal = torch.eye(ctx.spec.classes)[(part.index + 3) % ctx.spec.classes]
        new = replace(part, y=(1 - move) * part.y + move * goal, w=part.w * (0.5 + share))
        self.seen.append((part, new))
        return Batch(
            x=torch.cat([new.x, clean.x]),
            y=torch.cat([new.y, 1 - clean.y]),
            w=torch.cat([new.w, clean.w * (1000 if len(self.seen) % 2 else 0)]),
            index=torch.cat([new.index, clean.index]),
        )

    def pool(self) -> tuple[np.ndarray, Tensor, Tensor, Tensor]:
        """Images, targets before and after, and factors of the weights of all scored rows."""
        before, after = zip(*self.seen, strict=True)
        x = torch.cat([each.x for each in after]).permute(0, 2, 3, 1).numpy()
        factor = torch.cat([b.w / a.w for a, b in self.seen])
        return x, torch.cat([b.y for b in before]), torch.cat([a.y for a in after]), factor


def graded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, upstream: Method | None, *more: str
) -> Graded:
    made = Graded(upstream)
    monkeypatch.setattr(methods, "build", lambda name: made)
    assert show(tmp_path / "show.png", "--by", "weight", *more) == 0
    return made


UPSTREAMS = {
    "none": lambda: None,
    "mixup": lambda: methods.build("mixup(alpha=1.0)"),
    "weights and mixes": lambda: Chain(
        [methods.build("soft_augmentation"), methods.build("mixup(alpha=1.0)")]
    ),
    "draws rows": lambda: methods.build("balanced"),
}


@pytest.mark.parametrize("name", UPSTREAMS)
def test_bands_hold_the_extremes(
    name: str, banded: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = graded(monkeypatch, tmp_path, UPSTREAMS[name](), "--draws", "5")
    x, before, after, factor = method.pool()
    rows = len(x)
    assert rows == 300, "all but the clean rows of one pass over 600 rows, in batches of 128"
    assert f"{rows} augmented training rows, network as initialised, seed 0" in banded["title"]
    moved = (after - before).abs().sum(dim=1) / 2
    expected = {
        "highest weight": (factor, True),
        "lowest weight": (factor, False),
        "label changed most": (moved, True),
    }
    assert list(banded["bands"]) == list(expected)
    for heading, (values, falls) in expected.items():
        band = banded["bands"][heading]
        order = values.argsort(descending=falls)
        assert len(band.images) == len(band.captions) == 5
        for place, (image, text) in enumerate(zip(band.images, band.captions, strict=True)):
            same = [
                row
                for row in np.flatnonzero((x == image).all(axis=(1, 2, 3)))
                if abs(values[row] - values[order[place]]) < 2e-3
            ]
            assert same, f"{heading}: the image at place {place} is another"
            assert "\n".join(text.split("\n")[:2]) in {
                told(before[row], after[row], factor[row]) for row in same
            }


def told(before: Tensor, after: Tensor, factor: Tensor) -> str:
    one, other = (drawing._named(each, tuple("0123456789")) for each in (before, after))
    moved = float((after - before).abs().sum()) / 2 > 0.005
    return f"{one} -> {other}\nweight x {factor:.2f}" if moved else f"{one}\nweight x {factor:.2f}"


def test_what_the_upstream_gave_is_what_it_gives_again_at_the_same_place(
    banded: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``enter`` seeds anew, so a replay on the scored rows must find the rows that were watched."""
    kept: list[drawing._Pool] = []
    contexts: list[TrainingContext] = []
    real = drawing._pool

    def spy(method: Method, ctx: TrainingContext, name: str, batch_size: int) -> drawing._Pool:
        contexts.append(ctx)
        kept.append(real(method, ctx, name, batch_size))
        return kept[-1]

    monkeypatch.setattr(drawing, "_pool", spy)
    name = "saflex(upstream=mixup(alpha=1.0))"
    assert show(tmp_path / "show.png", "--by", "weight", "--method", name) == 0
    (pool,), (ctx,) = kept, contexts
    ctx.step = 0
    ctx.enter("show")
    again, upstream = [], methods.build("mixup(alpha=1.0)")
    for batch in ctx.train.batches(128):
        ctx.enter("augment")
        count = methods.build(name).weighted(len(batch.x))
        again.append(
            upstream.augment(
                Batch(batch.x[:count], batch.y[:count], batch.w[:count], batch.index[:count]), ctx
            )
        )
        ctx.step += 1
    assert torch.equal(pool.before, torch.cat([each.y for each in again]))
    assert torch.equal(pool.x, torch.cat([each.x for each in again]))
    assert len(pool.x) == 240 and not bool((pool.before == 1).any(dim=1).all())


@pytest.mark.parametrize(
    ("method", "bands", "note"),
    [
        ("l2rw(upstream=mixup)", ["highest weight", "lowest weight"], "; no label changed"),
        ("saflex(labels=keep, upstream=mixup)", ["highest weight", "lowest weight"], "; no label"),
        ("saflex(weights=one)", ["label changed most"], "; all weights are equal"),
        ("random_label(upstream=mixup)", ["label changed most"], "; all weights are equal"),
        ("saflex", ["highest weight", "lowest weight", "label changed most"], ""),
        ("shuffled_weights(upstream=saflex(labels=keep))", ["highest weight", "lowest weight"], ""),
        ("head_refit(upstream=l2rw)", ["highest weight", "lowest weight"], "; no label changed"),
    ],
)
def test_what_there_is_not_is_left_out_and_said(
    method: str, bands: list[str], note: str, banded: dict[str, Any], tmp_path: Path
) -> None:
    banded["picture"] = method == "saflex"  # all three bands
    arguments = ["--by", "weight", "--method", method, "--draws", "3", *SMALL]
    assert show(tmp_path / "show.png", *arguments) == 0
    assert list(banded["bands"]) == bands
    if "lowest weight" in bands:
        assert " rows have weight 0)" in banded["headings"][1]
        assert not banded["bands"]["highest weight"].captions[0].endswith("weight x 1.00")
    assert note in banded["title"]
    assert note or ";" not in banded["title"].replace("; no label changed", "")
    if banded["picture"]:
        assert (tmp_path / "show.png").stat().st_size > 5000


@pytest.mark.parametrize("method", ["none", "crop+randaugment", "balanced"])
def test_by_weight_needs_weights_or_labels(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert show(tmp_path / "show.png", "--by", "weight", "--method", method) == 2
    said = capsys.readouterr().err
    assert f"method: {method} cannot be shown here" in said
    assert "all weights are equal and no label changed" in said
    assert not list(tmp_path.iterdir())


def test_other_rows_than_the_upstream_s_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Turned(Graded):
        def augment(self, batch: Batch, ctx: Context) -> Batch:
            out = super().augment(batch, ctx)
            return replace(out, index=out.index.flip(0))

    mixup = methods.build("mixup")
    monkeypatch.setattr(methods, "build", lambda name: Turned(mixup))
    assert show(tmp_path / "show.png", "--by", "weight") == 2
    assert "returns other rows than its upstream did" in capsys.readouterr().err


def pool_of(
    factor: Sequence[float], before: Sequence[Sequence[float]], after: Sequence[Sequence[float]]
) -> drawing._Pool:
    rows = len(factor)
    x = torch.arange(rows).view(-1, 1, 1, 1) / rows  # the grey value tells the row
    told = [f"turned {row}" if row % 2 else "" for row in range(rows)]
    old, new, weights = (torch.tensor(each) for each in (before, after, factor))
    return drawing._Pool(x, old, new, weights, told, torch.arange(rows))


def rows_of(band: Any) -> list[int]:
    return band.rows.tolist()


def test_no_row_is_in_two_bands_where_many_are_equal() -> None:
    same = [[1.0, 0.0]] * 6
    pool = pool_of([1.2, 0.0, 1.2, 1.2, 1.2, 1.2], same, same)
    bands, note = drawing._bands(pool, 8, ("a", "b"), "multi-class")
    assert note == "; no label changed"
    assert bands[1].heading == "lowest weight (1 of 6 rows have weight 0)"
    highest, lowest = rows_of(bands[0]), rows_of(bands[1])
    assert len(highest) == len(lowest) == 3 and not set(highest) & set(lowest)
    assert lowest[0] == 1 and 1 not in highest
    turned = [[0.0, 1.0]] * 6  # labels all moved as far: what is not in the bands above comes first
    pool = pool_of([1.2, 0, 1, 1, 1, 1], same, turned)
    bands, _ = drawing._bands(pool, 2, ("a", "b"), "multi-class")
    assert not set(rows_of(bands[2])) & {*rows_of(bands[0]), *rows_of(bands[1])}
    (first, second) = rows_of(bands[2])
    assert bands[2].captions[0] == "a -> b\nweight x 1.00" + f"\nturned {first}" * (first % 2)
    assert bands[2].captions[1] == "a -> b\nweight x 1.00" + f"\nturned {second}" * (second % 2)
    assert {first % 2, second % 2} == {0, 1}
    assert bands[2].heading == "label changed most (6 of 6 labels changed)"


def test_of_several_labels_the_one_that_moved_most_is_told() -> None:
    before = [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]
    after = [[1.0, 0.1, 0.3], [0.0, 0.004, 0.0], [1.0, 0.0, 0.0]]
    bands, note = drawing._bands(
        pool_of([1, 1, 1], before, after), 3, ("a", "b", "c"), "multi-label"
    )
    assert note == "; all weights are equal"
    assert bands[0].captions == ["a: 1.00, c: 1.00, c: 1.00 -> 0.30\nweight x 1.00"]
    with pytest.raises(NotApplicable, match="over 2 augmented rows all weights are equal"):
        drawing._bands(pool_of([1, 1], before[1:], after[1:]), 3, ("a", "b", "c"), "multi-label")


def test_the_pool_ends_where_it_is_full(
    banded: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawing, "POOL", 100)
    method = graded(monkeypatch, tmp_path, None)
    assert len(method.seen) == 2 and "100 augmented training rows" in banded["title"]
    assert len({text for band in banded["bands"].values() for text in band.captions}) > 8


# --- learned policies -----------------------------------------------------------------------------


class Policy(Method):
    """Knows a probability and a magnitude of two operations for each row."""

    operations = ("turn", "grow_x")

    shared = False

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        self.classes = ctx.train.targets.argmax(dim=1).float()

    def augment(self, batch: Batch, ctx: Context) -> Batch:
        return batch

    def learned(self) -> dict[str, Tensor]:
        odd = torch.arange(len(self.classes)) % 2
        chance = torch.stack([self.classes / 10, odd.float()], dim=1)
        found = {"probability": chance, "magnitude": 1 - chance}
        return {name: value[:1] for name, value in found.items()} if self.shared else found


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("around", [lambda made: made, lambda made: Chain([Graded(None), made])])
def test_policies_are_drawn_class_by_class(
    around: Any, shared: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def spy(tables: Any, rows: Any, columns: Any, name: str, title: str, path: Path) -> None:
        seen.update(tables=dict(tables), rows=rows, columns=columns, title=title)
        plots.heatmaps(tables, rows, columns, name, title, path)

    made = Policy()
    monkeypatch.setattr(drawing, "heatmaps", spy)
    monkeypatch.setattr(methods, "build", lambda name: around(made))
    made.shared = shared
    assert show(tmp_path / "policy.png", "--by", "class", "--seed", "2") == 0
    with Image.open(tmp_path / "policy.png") as picture:
        assert picture.width > 400 and picture.height > 200
    assert seen["columns"] == ["turn", "grow x"]
    assert "before the first epoch, seed 2" in seen["title"]
    probability, magnitude = seen["tables"].values()
    np.testing.assert_allclose(probability + magnitude, 1, atol=1e-6)
    if shared:
        assert seen["rows"] == [f"all rows ({len(made.classes)})"]
        np.testing.assert_allclose(probability, made.learned()["probability"].numpy())
        return
    labels = made.classes.numpy()
    assert seen["rows"] == [f"{k} ({(labels == k).sum()})" for k in range(10)]
    wanted = [np.flatnonzero(labels == k) % 2 for k in range(10)]
    np.testing.assert_allclose(probability[:, 0], np.arange(10) / 10, atol=1e-6)
    np.testing.assert_allclose(probability[:, 1], [each.mean() for each in wanted], atol=1e-6)


def test_without_a_policy_there_is_nothing_to_draw_by_class(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for method in ("randaugment", "autodo(augment=false)"):
        assert show(tmp_path / "policy.png", "--by", "class", "--method", method) == 2
        assert "learns no probability or magnitude" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# --- a network that has trained -------------------------------------------------------------------


@pytest.mark.parametrize("by", ["rows", "weight"])
def test_the_network_is_that_of_a_run(
    by: str,
    drawn: dict[str, Any],
    banded: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fitted: list[tuple[Run, trainer.Fitted]] = []

    def spy(run: Run, splits: Any, method: Method, **more: Any) -> trainer.Fitted:
        fitted.append((run, trainer.fit(run, splits, method, **more)))
        return fitted[-1][1]

    monkeypatch.setattr(drawing, "fit", spy)
    made = Graded(methods.build("mixup"))
    monkeypatch.setattr(methods, "build", lambda name: made)
    more = ["--by", by, "--draws", "2", "--seed", "3"]
    assert show(tmp_path / "show.png", *more, "--epochs", "2") == 0
    ((run, result),) = fitted
    assert run.training == Training(epochs=2) and run.seed == 3 and run.model == "small_cnn"
    steps = 5
    assert made.places[: 2 * steps] == [(step // steps, 2, step) for step in range(2 * steps)]
    after = made.places[2 * steps :]
    assert after == [(2, 3, 2 * steps + number) for number in range(len(after))]
    assert made.calls == ["setup", "epoch 0", "epoch 1", "epoch 2"]
    assert made.ctx.model is result.model and made.ctx.model.training
    state = made.ctx.optimizer.state
    assert {int(each["step"]) for each in state.values()} == {2 * steps}
    assert "epoch 2/2" in capsys.readouterr().err, "progress is shown"
    title = (drawn if by == "rows" else banded)["title"]
    assert "network after 2 epochs, seed 3" in title


def test_without_epochs_nothing_is_trained(
    banded: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawing, "fit", None)
    method = graded(monkeypatch, tmp_path, None)
    assert not method.ctx.optimizer.state and method.places[0] == (0, 1, 0)
    assert method.calls == ["setup", "epoch 0"]


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (
            errors.Interrupted("stopped in epoch 1"),
            130,
            "stopped during training; nothing was saved",
        ),
        (errors.TrainingFailed("loss is nan"), 1, "augbench: loss is nan"),
        (NotApplicable("too few rows"), 2, "cannot be shown here: too few rows"),
    ],
)
def test_a_training_that_does_not_end(
    error: Exception,
    code: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fit(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(drawing, "fit", fit)
    assert show(tmp_path / "show.png", "--epochs", "1") == code
    shown = capsys.readouterr()
    assert said in shown.err and "Traceback" not in shown.err and shown.out == ""
    assert not list(tmp_path.iterdir())


# --- the figures ----------------------------------------------------------------------------------

LONG = "abcdefghijklmn…"


@pytest.mark.parametrize("count", [1, 8])
def test_no_text_lies_over_another_or_is_cut(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = saved_figures(monkeypatch)
    captions = [
        f"{LONG}: 0.70, {LONG}: 0.30 -> {LONG}: 0.80, {LONG}: 0.20\nweight x 128.00",
        "pneumonia: 0.70, normal: 0.30 -> pneumonia: 0.95, normal: 0.05\nweight x 0.00",
    ] * 4
    image = np.zeros((8, 9, 9, 1))
    headings = ("highest weight", "lowest weight (512 of 512 rows have weight 0)", "label changed")
    bands = [Band(text, image[:count], captions[:count]) for text in headings]
    title = "saflex(preset=stable, upstream=crop+flip) on x: " * 4
    plots.sample_bands(bands, title, [tmp_path / "x.png"])
    (figure,) = figures
    texts = [
        each for each in figure.findobj(Text) if each.get_text().strip() and each.get_visible()
    ]  # type: ignore[attr-defined]
    boxes = [(each.get_text(), each.get_window_extent()) for each in texts]
    assert len(boxes) == 3 * count + 3 + 1
    assert sum(text in headings for text, _ in boxes) == 3
    for (one, box), (other, beside) in combinations(boxes, 2):
        apart = (
            box.x1 <= beside.x0 or beside.x1 <= box.x0 or box.y1 <= beside.y0 or beside.y1 <= box.y0
        )
        assert apart, f"{one!r} lies over {other!r}"
    pictures = [axis.get_window_extent() for axis in figure.axes if axis.images]
    assert len(pictures) == 3 * count
    assert min(box.width for box in pictures) > 0.9 * figure.dpi, "an inch with its margin"
    for text, box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0, text
        assert box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, text


def test_captions_break_before_an_arrow_and_a_share_that_has_no_room() -> None:
    def lines(text: str) -> list[str]:
        return plots._wrapped(text).replace("\u00a0", " ").split("\n")

    assert lines("3 -> 8: 0.62\nweight x 1.93") == ["3 -> 8: 0.62", "weight x 1.93"]
    assert lines("normal -> pneumonia: 0.62") == ["normal", "-> pneumonia: 0.62"]
    assert lines(f"{LONG}: 0.62, a: 0.38") == [f"{LONG}:", "0.62, a: 0.38"]
