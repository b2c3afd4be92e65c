"""The one loop: same start and same batches for every method, schedules, costs, failures."""

import copy
import json
import math
import time
import types
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import methods
from analysis import metrics, runs
from analysis.runs import PRESETS, Run, Training
from benchmarks.contract import CASES, Case, network_for, splits, splits_for
from benchmarks.data.seeding import seed_global
from benchmarks.data.splits import NotApplicable, Splits
from benchmarks.data.streams import rows_from_tensors
from benchmarks.training import errors, models, trainer
from benchmarks.training.errors import TrainingFailed
from benchmarks.training.schedule import learning_rate, make_optimizer
from benchmarks.training.tasks import task_of
from benchmarks.training.trainer import fit
from methods.base import Batch, Context, Method, Spec
from methods.branches import BranchedNorm
from tests.made import interrupt_at, same_state
from tests.pipelines import OWN

CPU = torch.device("cpu")


def a_run(method: str = "none", *, seed: int = 0, **training: object) -> Run:
    settings = {"epochs": 2, "batch_size": 8, **training}
    return Run(
        benchmark="test",
        data="",
        model="small_cnn(width=0.25)",
        method=method,
        seed=seed,
        training=Training(**settings),
    )


class Watched(Method):
    """Records the batches that reach its upstream and the network's first weights."""

    def __init__(self, upstream: Method) -> None:
        super().__init__(upstream)
        self.needs = upstream.requires()  # type: ignore[misc]
        self.indices: list[list[int]] = []
        self.pixels: list[torch.Tensor] = []
        self.start: dict[str, torch.Tensor] = {}

    def augment(self, batch: Batch, ctx: Context) -> Batch:
        if not self.start:
            self.start = copy.deepcopy(ctx.model.state_dict())
        self.indices.append(batch.index.tolist())
        self.pixels.append(batch.x)
        assert self.upstream is not None
        return self.upstream.augment(batch, ctx)


@cache
def watched(name: str, seed: int = 0) -> Watched:
    method = Watched(methods.build(name))
    fit(a_run(name, seed=seed), splits(Case(1), "meta" in method.requires()), method)
    return method


@pytest.mark.parametrize("name", ["flip", "crop", "mixup", "cutmix", "crop+flip+mixup"])
def test_same_seed_same_start_same_batches_whatever_the_method(name: str) -> None:
    one, other = watched("none"), watched(name)
    assert one.indices == other.indices
    assert all(torch.equal(a, b) for a, b in zip(one.pixels, other.pixels, strict=True))
    assert one.start.keys() == other.start.keys()
    assert all(torch.equal(one.start[key], other.start[key]) for key in one.start)


def test_another_seed_gives_another_start_and_another_order() -> None:
    one, other = watched("none"), watched("none", seed=1)
    assert one.indices != other.indices
    assert any(not torch.equal(one.start[key], other.start[key]) for key in one.start)


class Greedy(Method):
    """Draws all it can: from the global generator, numpy, the streams."""

    def augment(self, batch: Batch, ctx: Context) -> Batch:
        torch.rand(17)
        np.random.rand(5)  # noqa: NPY002 - what a careless author may do
        ctx.train.draw(5)
        with ctx.uncharged():
            torch.rand(3)
            ctx.model(batch.x)
        return batch


def test_what_a_method_draws_does_not_move_the_run() -> None:
    plain = fit(a_run(), splits(Case(1), False), methods.build("none"))
    greedy = fit(a_run(), splits(Case(1), False), Greedy())
    assert plain.state.metric_lines == greedy.state.metric_lines


def test_equals_a_loop_written_by_hand() -> None:
    """Plain training under the harness is Adam on the cross-entropy of these very batches."""
    run, made = a_run(epochs=3), splits(Case(3), False)
    watcher = Watched(methods.build("none"))
    fitted = fit(run, made, watcher)

    seed_global(CPU, run.seed, "init")
    model = models.build(run.model, made.spec)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    labels = made.train.y.argmax(dim=1)
    rates = {0: 1e-3, 1: 1e-3, 2: 1e-4}  # milestones at 1.5 and 2.25 of 3 epochs
    steps = len(watcher.indices) // 3
    model.train()
    for number, index in enumerate(watcher.indices):
        optimizer.param_groups[0]["lr"] = rates[number // steps]
        loss = F.cross_entropy(model(made.train.inputs(torch.tensor(index))), labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    ours = fitted.model.state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(
    "name",
    [
        *(name for name in methods.BUILTIN if name != "wrap"),
        *OWN,
        "head_refit(upstream=crop+mixup)",
        "lpa3(preset=fast, refresh=2, warmup=0)",
        "lpa3(auxiliary_norm=true, warmup=1)",
        "fixmatch(mu=2, threshold=0.0, attack_threshold=0.0, attack=lpa3(warmup=1, ratio=0.5))",
        "pseudo_label(upstream=fixmatch(mu=2, threshold=0.0))",
        "saflex(upstream=fixmatch(mu=2, threshold=0.0))",
    ],
)
def test_resumes_bit_for_bit(
    name: str, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the middle of an epoch, and of the next, a run redoes them as if undisturbed."""
    if reason := methods.build(name).supports(task_of(case.kind), splits(case, False).spec):
        pytest.skip(reason)
    made = splits_for(methods.build(name), case)
    network = network_for(case)
    run = replace(a_run(name, epochs=3), model=network if isinstance(network, str) else "own")
    model = None if isinstance(network, str) else network
    try:
        whole = fit(run, made, methods.build(name), model=model)
    except NotApplicable as error:
        pytest.skip(str(error))

    class Killed(BaseException):
        """Not an Exception, so that nothing on the way can swallow it."""

    steps, real = iter(range(10**6)), trainer.train_step
    per_epoch = 5  # 36 rows in batches of 8
    first = per_epoch + 2
    deaths = (first, first + 1 + per_epoch + 2)  # in the second epoch, and in the third

    def dies(*arguments: Any) -> Any:
        if next(steps) in deaths:
            raise Killed
        return real(*arguments)

    monkeypatch.setattr(trainer, "train_step", dies)
    for _ in deaths:
        with pytest.raises(Killed):
            fit(run, made, methods.build(name), folder=tmp_path, model=model)
    again = fit(run, made, methods.build(name), folder=tmp_path, model=model)

    assert again.state.resumed == 2 and next(steps) == first + 1 + per_epoch + 3 + per_epoch
    assert again.state.metric_lines == whole.state.metric_lines
    assert again.predictions.keys() == whole.predictions.keys()
    for key, array in whole.predictions.items():
        assert np.array_equal(array, again.predictions[key]), key
    same_state(whole.method, again.method)


def test_multistep_rates_are_those_of_the_protocol() -> None:
    training = PRESETS["medmnist"][1]
    rates = [learning_rate(training, epoch) for epoch in range(100)]
    model = nn.Linear(1, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [50, 75], gamma=0.1)
    for rate in rates:
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        schedule.step()


def test_cosine_rates_fall_to_a_thousandth_after_a_warm_up() -> None:
    training = PRESETS["autodo"][1]
    rates = [learning_rate(training, epoch) for epoch in range(200)]
    assert rates[0] == pytest.approx(0.01)
    steps = np.diff(rates)
    assert (steps[:5] > 0).all() and (steps[5:] < 0).all()
    assert learning_rate(training, 200) == pytest.approx(1e-4)
    middle = 1e-4 + (0.1 - 1e-4) * (1 + math.cos(math.pi * 0.5)) / 2
    assert rates[100] == pytest.approx(middle)


@pytest.mark.parametrize("kind", ["adam", "adamw", "sgd"])
def test_optimisers_are_what_they_are_called(kind: str) -> None:
    training = replace(Training(), optimizer=kind, weight_decay=0.01, momentum=0.8)
    made = make_optimizer(nn.Linear(2, 2), training)
    names = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    assert type(made) is names[kind]
    assert made.param_groups[0]["weight_decay"] == 0.01
    if kind == "sgd":
        assert made.param_groups[0]["nesterov"] and made.param_groups[0]["momentum"] == 0.8


def test_passes_are_counted() -> None:
    """A plain step is one pass forward and one backward; diagnostics count for nothing."""

    class Twice(Method):
        def augment(self, batch: Batch, ctx: Context) -> Batch:
            ctx.model(batch.x).sum().backward()
            ctx.optimizer.zero_grad()
            with torch.no_grad():
                ctx.model(batch.x[:3])
            with ctx.uncharged():
                ctx.model(batch.x).sum().backward()
                ctx.optimizer.zero_grad()
            return batch

    plain = fit(a_run(), splits(Case(1), False), methods.build("none")).result["cost"]
    assert plain["rows"] == {"drawn": 72, "trained": 72, "forward": 72, "backward": 72}
    assert plain["passes_per_row"] == 2
    twice = fit(a_run(), splits(Case(1), False), Twice()).result["cost"]
    assert twice["rows"]["backward"] == 2 * 72
    assert twice["rows"]["forward"] == 2 * 72 + 3 * 10


def work(seconds: float) -> None:
    """Keep the processor busy for so many CPU seconds."""
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_charged_time_leaves_out_diagnostics_and_evaluation() -> None:
    class Slow(Method):
        def begin_epoch(self, ctx: Context) -> None:
            work(0.05)

        def augment(self, batch: Batch, ctx: Context) -> Batch:
            work(0.01)
            with ctx.uncharged():
                work(0.1)
            return batch

    cost = fit(a_run(epochs=1), splits(Case(1), False), Slow()).result["cost"]
    assert 0.05 <= cost["phases"]["outer"] < 0.1
    assert 0.05 <= cost["phases"]["augment"] < 0.1  # five steps of 0.01 s, not of 0.11 s
    assert cost["charged_seconds"] == pytest.approx(sum(cost["phases"].values()))


def test_uncharged_restores_generators_buffers_and_modes() -> None:
    seen = []

    class Peeks(Method):
        def augment(self, batch: Batch, ctx: Context) -> Batch:
            before = [buffer.clone() for buffer in ctx.model.buffers()]
            state = torch.get_rng_state()
            with ctx.uncharged():
                ctx.model.eval()
                torch.rand(3)
                ctx.model.train()(batch.x)
                ctx.model.eval()
            seen.append(
                torch.equal(state, torch.get_rng_state())
                and ctx.model.training
                and all(torch.equal(a, b) for a, b in zip(before, ctx.model.buffers(), strict=True))
            )
            return batch

    fit(a_run(epochs=1), splits(Case(1), False), Peeks())
    assert seen and all(seen)


def test_loss_is_the_weighted_sum_of_row_losses() -> None:
    """Rows of weight zero do not count: the run equals one without what they hold."""

    class HalfNoise(Method):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.scale = scale

        def augment(self, batch: Batch, ctx: Context) -> Batch:
            w = batch.w.clone()
            w[::2] = 0
            y = batch.y.clone()
            y[::2] = self.scale
            return replace(batch, w=w, y=y)

    one = fit(a_run(), splits(Case(1), False), HalfNoise(0.0))
    other = fit(a_run(), splits(Case(1), False), HalfNoise(5.0))
    assert one.state.metric_lines == other.state.metric_lines


def test_logits_handed_over_save_the_forward() -> None:
    class HandsOver(Method):
        def augment(self, batch: Batch, ctx: Context) -> Batch:
            return replace(batch, logits=ctx.forward(batch.x))

    handed = fit(a_run(), splits(Case(1), False), HandsOver())
    plain = fit(a_run(), splits(Case(1), False), methods.build("none"))
    assert handed.state.metric_lines == plain.state.metric_lines


def test_a_second_forward_in_a_step_is_refused() -> None:
    class Twice(Method):
        def augment(self, batch: Batch, ctx: Context) -> Batch:
            ctx.forward(batch.x)
            ctx.forward(batch.x)
            return batch

    with pytest.raises(RuntimeError, match="twice in one step"):
        fit(a_run(), splits(Case(1), False), Twice())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_epoch_step_and_rate(bad: float) -> None:
    class Breaks(Method):
        def augment(self, batch: Batch, ctx: Context) -> Batch:
            return replace(batch, w=batch.w * (bad if ctx.step == 7 else 1))

    with pytest.raises(TrainingFailed, match=r"epoch 2, step 3, learning rate 0\.0001"):
        fit(a_run(epochs=2), splits(Case(1), False), Breaks())


@pytest.mark.parametrize("part", ["x", "y", "w", "index"])
def test_a_wrong_batch_names_method_part_and_shapes(part: str) -> None:
    class Wrong(Method):
        def augment(self, batch: Batch, ctx: Context) -> Batch:
            return replace(batch, **{part: getattr(batch, part)[..., 1:]})

    with pytest.raises(
        TrainingFailed, match=rf"wrong: augment returned {part} of shape .*expected"
    ):
        fit(a_run("wrong"), splits(Case(1), False), Wrong())


def test_select_and_test_rows_cannot_be_reached_from_the_context() -> None:
    made = splits(Case(1), True)
    own, *others = made.train.x, made.select.x, made.test.x
    assert isinstance(own, torch.Tensor)
    hidden = {each.data_ptr() for each in others if isinstance(each, torch.Tensor)}
    assert len(hidden) == 2
    found: list[int] = []

    def walk(value: object, depth: int, seen: set[int]) -> None:
        if id(value) in seen or depth > 8:
            return
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            found.append(value.data_ptr())
        elif isinstance(value, dict):
            for each in value.values():
                walk(each, depth + 1, seen)
        elif isinstance(value, list | tuple | set):
            for each in value:
                walk(each, depth + 1, seen)
        elif hasattr(value, "__dict__") and not isinstance(
            value, type | types.ModuleType | types.FunctionType
        ):
            walk(vars(value), depth + 1, seen)
        else:
            for name in getattr(type(value), "__slots__", ()):
                walk(getattr(value, name, None), depth + 1, seen)

    class Looks(Method):
        needs = frozenset({"meta"})

        def augment(self, batch: Batch, ctx: Context) -> Batch:
            walk(ctx, 0, set())
            return batch

    fit(a_run(epochs=1), made, Looks())
    assert own.data_ptr() in found, "the walk must reach the training rows"
    assert not hidden & set(found)


def test_meta_rows_are_seen_only_by_a_method_that_needs_them() -> None:
    class Looks(Method):
        def augment(self, batch: Batch, ctx: Context) -> Batch:
            assert ctx.meta is None
            return batch

    fit(a_run(epochs=1), splits(Case(1), False), Looks())


def test_a_network_of_ones_own_needs_only_logits() -> None:
    def mine(spec: Spec) -> nn.Module:
        size = math.prod(spec.shape)
        return nn.Sequential(nn.Flatten(), nn.Linear(size, spec.classes))

    fitted = fit(a_run("mixup"), splits(Case(1), False), methods.build("mixup"), model=mine)
    assert fitted.result["cost"]["passes_per_row"] == 2
    with pytest.raises(NotApplicable, match="none were found"):
        made = splits(Case(1), True)
        fit(a_run("head_refit"), made, methods.build("head_refit"), model=mine)


def test_metrics_come_from_the_stored_logits() -> None:
    for case in CASES[:3]:
        fitted = fit(a_run(), splits(case, False), methods.build("none"))
        stored = fitted.predictions
        assert stored["test_last_logits"].dtype == np.float32
        again = metrics.evaluate(stored["test_last_logits"], stored["test_targets"], case.kind)
        assert json.loads(runs.to_json(again)) == json.loads(
            runs.to_json(fitted.result["metrics"]["last"]["test"])
        )


def larger_select(rows: int) -> Splits:
    made = splits(Case(1), False)
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(rows) % 3
    y = F.one_hot(labels, 3).float()
    return replace(made, select=rows_from_tensors(torch.rand(rows, 1, 8, 8, generator=rng), y))


def test_selected_epoch_is_the_earliest_best_by_select_auc() -> None:
    fitted = fit(a_run(epochs=6), larger_select(240), methods.build("none"))
    lines = [json.loads(line) for line in fitted.state.metric_lines]
    aucs = [line["select"]["auc"] for line in lines]
    assert fitted.result["selection"]["offered"]
    assert fitted.result["selection"]["epoch"] == aucs.index(max(aucs)) + 1
    best = fitted.result["metrics"]["selected"]["select"]["auc"]
    assert best == pytest.approx(max(aucs), abs=1e-9)


@pytest.mark.parametrize(
    ("rows", "method", "trained", "reason"),
    [
        (199, "none", False, "199 rows"),
        (210, "none", True, "were used for training"),
        (210, "head_refit", False, "changes the network"),
    ],
)
def test_selected_epoch_is_not_offered(rows: int, method: str, trained: bool, reason: str) -> None:
    made = replace(larger_select(rows), select_trained=trained, meta=splits(Case(1), True).meta)
    fitted = fit(a_run(method), made, methods.build(method))
    assert not fitted.result["selection"]["offered"]
    assert reason in fitted.result["selection"]["reason"]
    assert "selected" not in fitted.result["metrics"]
    assert not any("selected" in name for name in fitted.predictions)


def test_bfloat16_says_that_it_is_on() -> None:
    notes: list[str] = []

    class Notes(trainer.Silent):
        def note(self, text: str) -> None:
            notes.append(text)

    run = a_run(precision="bfloat16", channels_last=True)
    fitted = fit(run, splits(Case(3), False), methods.build("none"), progress=Notes())
    assert any("bfloat16 is on" in note for note in notes)
    assert all(p.dtype == torch.float32 for p in fitted.model.parameters())


COMPILED = {
    "none": "",
    "saflex(preset=fast)": "% of the passes through the network are compiled",
    "lpa3(preset=fast, warmup=0)": "% of the passes through the network are compiled",
}
EVERY = (
    *(name for name in methods.BUILTIN if name not in (*COMPILED, "wrap", "lpa3")),
    "saflex(preset=stable)",
    "lpa3(warmup=0)",
    "lpa3(preset=strict, warmup=0)",
    "autodo(preset=exact)",
)


def distance(one: trainer.Fitted, other: trainer.Fitted) -> float:
    """Between their logits, in roundings of float32 of the largest of the first."""
    pairs = [
        (one.predictions[key], other.predictions[key])
        for key in ("select_last_logits", "test_last_logits")
    ]
    eps = float(np.finfo(np.float32).eps)
    return max(float(np.abs(b - a).max() / (eps * np.abs(a).max())) for a, b in pairs)


def shaken(seed: int, spec: Spec) -> nn.Module:
    """The network of ``a_run``, whose initial weights differ by one rounding."""
    made, rng = models.build("small_cnn(width=0.25)", spec), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weights in made.parameters():
            signs = 2 * torch.randint(2, weights.shape, generator=rng) - 1
            weights.mul_(1 + torch.finfo(torch.float32).eps * signs)
    return made


CHAOTIC = ("lpa3(warmup=0)",)
"""Its step divides by a change of the likelihood that may be tiny, which amplifies rounding: one
rounding of the initial weights moves the logits by thousands after two epochs."""


def compiled_alike(name: str) -> tuple[trainer.Fitted, list[str]]:
    """A compiled run, whose logits after two epochs differ from those of an eager one by 100
    roundings of float32 at most, or as one rounding of the initial weights moves them; its notes.
    """
    notes: list[str] = []

    class Notes(trainer.Silent):
        def note(self, text: str) -> None:
            notes.append(text)

    needs = methods.build(name).requires()
    made = splits(
        Case(3),
        "meta" in needs,
        unlabelled="unlabelled" in needs,
        generated="generated" in needs,
    )
    plain = fit(a_run(name), made, methods.build(name))
    compiled = fit(a_run(name, compile=True), made, methods.build(name), progress=Notes())
    assert any("torch.compile is on" in note for note in notes)
    allowed = 100.0
    if name in CHAOTIC:
        again = [
            fit(a_run(name), made, methods.build(name), model=partial(shaken, seed))
            for seed in range(4)
        ]
        allowed = max(distance(plain, each) for each in again)
        assert allowed > 100, "it is not chaotic: take it out of CHAOTIC"
    assert distance(plain, compiled) <= allowed
    return compiled, notes


# torch's own compiler looks at the gradient of a tensor that has none, and uses torch.jit.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
class TestCompiled:
    @pytest.mark.parametrize("name", COMPILED)
    @pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
    def test_a_network_trains_alike(
        self, backend: str, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """``eager`` runs what was captured, so that no C++ compiler is needed."""
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
        compiled, notes = compiled_alike(name)
        assert any(COMPILED[name] in note for note in notes)
        assert len(notes) == 1 + bool(COMPILED[name])
        if name == "none":
            assert compiled.result["cost"]["passes_per_row"] == 2

    @pytest.mark.slow
    @pytest.mark.parametrize("name", EVERY)
    def test_every_method_trains_alike_under_inductor(self, name: str) -> None:
        if reason := methods.build(name).supports(
            task_of("multi-class"), splits(Case(3), False).spec
        ):
            pytest.skip(reason)
        compiled_alike(name)


def test_the_callers_threads_are_restored() -> None:
    torch.set_num_threads(2)
    fit(a_run(epochs=1), splits(Case(1), False), methods.build("none"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert threads == 2


def test_checkpoints_every_k_epochs_and_an_interrupt_keeps_the_last_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With k = 3 and a stop in epoch 3, the state after epoch 2 is written on the way out."""
    whole = fit(a_run(epochs=4), splits(Case(1), False), methods.build("none"))
    calls = iter(range(10**6))

    class Stops:
        def __enter__(self) -> object:
            return lambda: next(calls) >= 2 * 5 + 3

        def __exit__(self, *error: object) -> None:
            pass

    real = trainer._signals
    monkeypatch.setattr(trainer, "_signals", Stops)
    with pytest.raises(errors.Interrupted, match="finished epochs kept: 2"):
        fit(
            a_run(epochs=4),
            splits(Case(1), False),
            methods.build("none"),
            folder=tmp_path,
            checkpoint_every=3,
        )
    monkeypatch.setattr(trainer, "_signals", real)
    again = fit(a_run(epochs=4), splits(Case(1), False), methods.build("none"), folder=tmp_path)
    assert again.state.resumed == 1
    assert again.state.metric_lines == whole.state.metric_lines


def test_a_checkpoint_that_cannot_be_read_is_not_the_runs_fault(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pt").mkdir()
    with pytest.raises(runs.StorageError, match="directory"):
        fit(a_run(), splits(Case(1), False), methods.build("none"), folder=tmp_path)


def test_lines_are_there_while_a_run_goes_and_after_it_failed(tmp_path: Path) -> None:
    seen = []

    class Breaks(Method):
        def augment(self, batch: Batch, ctx: Context) -> Batch:
            path = tmp_path / "metrics.jsonl"
            seen.append(len(runs.read_lines(path)) if path.exists() else 0)
            return replace(batch, w=batch.w * (math.nan if ctx.step == 12 else 1))

    with pytest.raises(TrainingFailed):
        made = splits(Case(1), False)
        fit(a_run(epochs=4), made, Breaks(), folder=tmp_path, checkpoint_every=9)
    assert seen == [0] * 5 + [1] * 5 + [2] * 5
    assert len(runs.read_lines(tmp_path / "timing.jsonl")) == 2


def test_what_setup_costs_is_counted_once_also_in_a_resumed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Looks(Method):
        def setup(self, ctx: Context) -> None:
            with torch.no_grad():
                ctx.model(ctx.train.draw(7).x)
            ctx.log(looked=1.0)

        def augment(self, batch: Batch, ctx: Context) -> Batch:
            return batch

    made = splits(Case(1), False)
    whole = fit(a_run(epochs=3), made, Looks())
    assert json.loads(whole.state.metric_lines[0])["rows"]["forward"] == 36 + 7
    interrupt_at(7, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        fit(a_run(epochs=3), made, Looks(), folder=tmp_path)
    again = fit(a_run(epochs=3), made, Looks(), folder=tmp_path)
    assert again.state.resumed == 1
    assert again.state.metric_lines == whole.state.metric_lines


@pytest.mark.parametrize("control", ["train", "meta"])
def test_crossfit_lets_a_method_draw_what_is_trained_on(control: Any) -> None:
    folds = tuple(torch.arange(36)[start::3] for start in range(3))
    made = replace(splits(Case(1), False), folds=folds)

    class Looks(Method):
        def augment(self, batch: Batch, ctx: Context) -> Batch:
            fold = set(folds[ctx.epoch % 3].tolist())
            wanted = fold if control == "meta" else set(range(36)) - fold
            assert set(ctx.train.index.tolist()) == wanted
            assert set(batch.index.tolist()) <= wanted
            return batch

    fitted = fit(replace(a_run(epochs=4), control=control), made, Looks())
    assert fitted.state.epoch == 4


@pytest.mark.parametrize("memorised", [True, False])
def test_crossfit_tells_the_loss_on_meta_rows_and_warns_where_they_are_memorised(
    memorised: bool,
) -> None:
    """The labels of select are of other classes, or the right ones."""
    made = splits(Case(1), meta=True)
    y = made.select.y.roll(1, dims=1) if memorised else made.select.y
    folds = tuple(torch.arange(36)[start::2] for start in range(2))
    made = replace(made, folds=folds, meta=made.train, select=replace(made.select, y=y))
    notes: list[str] = []

    class Notes(trainer.Silent):
        def note(self, text: str) -> None:
            notes.append(text)

    run = a_run("l2rw", epochs=12, learning_rate=0.02)
    fitted = fit(run, made, methods.build("l2rw"), progress=Notes())
    lines = [json.loads(line) for line in fitted.state.metric_lines]
    assert all({"auc", "accuracy", "nll"} == line["meta"].keys() for line in lines)
    faded = [line["meta"]["nll"] < 0.1 * line["select"]["nll"] for line in lines]
    assert any(faded) == memorised
    told = [note for note in notes if "has memorised the meta rows" in note]
    assert len(told) == int(memorised)
    last, fold = fitted.model.eval(), folds[11 % 2]
    with torch.no_grad():
        logits = last(made.train.inputs(fold))
    loss = torch.nn.functional.cross_entropy(logits, made.train.y[fold])
    assert lines[-1]["meta"]["nll"] == pytest.approx(float(loss), rel=1e-4)


def test_a_damaged_checkpoint_starts_the_run_again(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(b"PK\x03\x04 cut short")
    fitted = fit(a_run(), splits(Case(1), False), methods.build("none"), folder=tmp_path)
    assert fitted.state.resumed == 0 and fitted.state.epoch == 2


@pytest.mark.parametrize("batch_size", [36, 12])
def test_attacked_rows_train_the_second_set_of_norms_and_clean_rows_the_first(
    batch_size: int,
) -> None:
    method = "lpa3(auxiliary_norm=true, ratio=1.0, warmup=0)"
    plain, fitted = (
        fit(
            a_run(each, epochs=1, batch_size=batch_size),
            splits(Case(1), False),
            methods.build(each),
        )
        for each in ("none", method)
    )
    alone = [each for each in plain.model.modules() if isinstance(each, nn.BatchNorm2d)]
    norms = [each for each in fitted.model.modules() if isinstance(each, BranchedNorm)]
    for norm in norms:
        for each in (norm.main, norm.auxiliary):
            assert int(each.num_batches_tracked or 0) == 36 // batch_size
            assert not torch.equal(each.weight, torch.ones_like(each.weight))
        means = [each.state_dict()["running_mean"] for each in (norm.main, norm.auxiliary)]
        assert not torch.equal(*means)
    assert fitted.result["auxiliary_norm"] and not plain.result["auxiliary_norm"]
    more = sum(2 * norm.main.num_features for norm in norms)
    assert fitted.result["parameters"] == plain.result["parameters"] + more
    # After one step the statistics are those of the clean rows, which plain training has seen too.
    same = [
        torch.equal(one.state_dict()["running_mean"], norm.main.state_dict()["running_mean"])
        for one, norm in zip(alone, norms, strict=True)
    ]
    assert all(same) == (batch_size == 36)


@pytest.mark.parametrize("model", ["mlp", "small_cnn"])
def test_a_network_without_a_second_set_is_skipped_with_the_reason(model: str) -> None:
    """mlp has no normalisation, and a network that fit is given is taken as it is."""
    text = "lpa3(auxiliary_norm=true)"
    own = partial(models.build, model) if model == "small_cnn" else None
    with pytest.raises(
        NotApplicable, match=f"second set of batch normalisation layers, {model} has none"
    ):
        fit(
            replace(a_run(text), model=model),
            splits(Case(1), False),
            methods.build(text),
            model=own,
        )
