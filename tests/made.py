"""Run directories without a training, and what several tests do to a run or a figure."""

from __future__ import annotations

import json
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import methods
from analysis import facts, metrics, runs
from analysis.runs import Run, Training
from benchmarks.data.streams import Rows
from benchmarks.training import trainer

CLASSES = ("a", "b", "c")
PHASES = {"data": 0.1, "outer": 0.0, "augment": 0.3, "forward": 1.0, "backward": 1.6}


def declared(method: str) -> dict[str, Any]:
    """What is recorded of a row, from what its method declares."""
    run = Run(benchmark="digits", data="c", model="small_cnn", method=method)
    made = methods.build(method)
    own = facts.facts_of(
        run,
        methods.takes_upstream,
        made.control,
        "meta" in made.requires(),
        methods.controls_of(method),
    )
    return {facts.ROW: asdict(own)}  # type: ignore[call-overload]


def make_run(
    root: Path,
    method: str = "none",
    seed: int = 0,
    skill: float = 1.0,
    *,
    benchmark: str = "digits",
    test_rows: int = 60,
    cost: float = 1.0,
    epochs: int = 3,
    status: str = "done",
    reason: str = "",
    device: str = "cpu",
    recorded: dict[str, Any] | None = None,
    result: dict[str, Any] | None = None,
    learned: bool = False,
    selected: bool = False,
    meta: int = 0,
    folds: int = 0,
    leads: str = "",
    **changes: Any,
) -> Path:
    """The directory of a made run; ``changes`` are fields of the run."""
    given: dict[str, Any] = {
        "benchmark": benchmark,
        "data": f"checksum of {benchmark.partition('(')[0]}",
        "model": "small_cnn",
        "method": method,
        "seed": seed,
        "training": Training(epochs=epochs),
        "versions": {"trainer": 1, "model": 1},
    }
    run = Run(**{**given, **changes})
    folder = runs.folder_of(root, run)
    folder.mkdir(parents=True)
    beside = {"preset": "medmnist", "path": "", "budget": "", "of": "", **(recorded or {})}
    cell = {"id": run.id, "run": asdict(run), "recorded": beside}  # type: ignore[call-overload]
    (folder / "run.json").write_text(json.dumps(cell))
    if status != "done":
        ended = {"status": status, "reason": reason, "files": {}}
        (folder / "result.json").write_text(json.dumps(ended))
        return folder
    whens = ("last", "selected") if selected else ("last",)
    arrays, scores = _predictions(run, skill, test_rows, whens)
    np.savez(folder / "predictions.npz", **arrays)  # type: ignore[arg-type]
    lines = [
        {
            "epoch": epoch,
            "train_loss": 2 / epoch,
            "select": {"auc": 1 - 0.5 / epoch, "accuracy": 0.5},
        }
        for epoch in range(1, epochs + 1)
    ]
    times = [
        {"epoch": e, "charged_seconds": 3.0 * cost, "evaluation_seconds": 0.1}
        for e in range(1, epochs + 1)
    ]
    for name, objects in (("metrics", lines), ("timing", times)):
        text = "".join(f"{runs.to_json(each)}\n" for each in objects)
        (folder / f"{name}.jsonl").write_text(text)
    if learned:
        _learned(folder, seed)
    made = _result(scores, cost, epochs, device, test_rows) | (result or {})
    made["data"]["rows"]["meta"] = meta or made["data"]["rows"]["meta"]
    made["data"] |= {"folds": folds} if folds else {}
    made["data"] |= {"leads": leads} if leads else {}
    made["files"] = {
        path.name: path.stat().st_size
        for path in folder.iterdir()
        if path.name not in ("run.json", "result.json")
    }
    (folder / "result.json").write_text(runs.to_json(made))
    return folder


def _predictions(
    run: Run, skill: float, test_rows: int, whens: tuple[str, ...]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    arrays: dict[str, np.ndarray] = {}
    scores: dict[str, Any] = {when: {} for when in whens}
    for split, rows in (("select", 30), ("test", test_rows)):
        targets = np.arange(rows) % len(CLASSES)
        arrays[f"{split}_targets"] = targets
        for when in whens:
            name = [run.seed, *map(ord, f"{run.method}{run.control}{run.benchmark}{split}{when}")]
            logits = np.random.default_rng(name).normal(size=(rows, len(CLASSES)))
            logits = (logits + skill * np.eye(len(CLASSES))[targets]).astype(np.float32)
            arrays[f"{split}_{when}_logits"] = logits
            scores[when][split] = metrics.evaluate(logits, targets, "multi-class")
    return arrays, scores


def _learned(folder: Path, seed: int) -> None:
    """Weights and labels of 40 rows, eight of them mislabelled and found; of seed 0 some images."""
    rng = np.random.default_rng(seed)
    if seed == 0:
        drawn, trained = rng.integers(0, 256, (2, 4, 28, 28, 1), dtype=np.uint8)
        np.savez(folder / "samples.npz", drawn=drawn, trained=trained)
    before = np.arange(40) % len(CLASSES)
    wrong = np.arange(8)
    weight = rng.uniform(0.8, 1.2, 40)
    weight[wrong] = rng.uniform(0, 0.5, 8)
    label = 0.9 * np.eye(3)[before] + 0.1 / 3
    np.savez(folder / "learned.npz", weight=weight, label=label, seen=np.ones(40, int))
    given = (before[wrong] + 1) % 3
    np.savez(folder / "corruption.npz", rows=wrong, before=before[wrong], after=given)


def _result(
    scores: dict[str, Any], cost: float, epochs: int, device: str, test_rows: int
) -> dict[str, Any]:
    return {
        "status": "done",
        "metrics": scores,
        "selection": {"offered": "selected" in scores, "reason": "", "rule": "best select AUC"},
        "cost": {
            "epochs": epochs,
            "charged_seconds": 3.0 * cost * epochs,
            "phases": {name: value * cost * epochs for name, value in PHASES.items()},
            "seconds_per_epoch": 3.0 * cost,
            "passes_per_row": 2.0 * cost,
            "trained_per_drawn": 1.0,
            "evaluation_seconds": 0.3,
            "memory_mib": 100.0,
        },
        "device": {"type": device, "name": "a machine", "threads": 1},
        "versions": {"augbench": "0.1.0", "torch": "2.13.0"},
        "parameters": 1234,
        "data": {
            "checksum": "c",
            "verified": True,
            "caveats": [],
            "notes": [],
            "kind": "multi-class",
            "classes": list(CLASSES),
            "shape": [1, 28, 28],
            "rows": {"train": 40, "meta": 0, "select": 30, "test": test_rows},
            "corruption": None,
            "select_trained": False,
        },
    }


def compiled(source: Path) -> str:
    """The log of pdflatex, which must end well."""
    made = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape", source.name],
        cwd=source.parent,
        capture_output=True,
        check=False,
    )
    log = made.stdout.decode("latin-1")
    assert made.returncode == 0, log[-2000:]
    return log


def inputs_of(rows: Rows | None) -> Tensor:
    """The inputs of all rows, (N, ...)."""
    assert rows is not None
    return rows.inputs(torch.arange(len(rows)))


def same_state(one: nn.Module, other: nn.Module) -> None:
    """All parameters and buffers are equal bit for bit."""
    kept = other.state_dict()
    for name, value in one.state_dict().items():
        assert not isinstance(value, Tensor) or torch.equal(value, kept[name]), name


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupt training before this step from now on, once."""
    steps, real = iter(range(10**6)), trainer.train_step

    def dies(*arguments: Any) -> Any:
        if next(steps) == step:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(trainer, "train_step", dies)


def saved_figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved from now on."""
    figures: list[Figure] = []
    real = Figure.savefig

    def spy(figure: Figure, *given: Any, **more: Any) -> None:
        figures.append(figure)
        real(figure, *given, **more)

    monkeypatch.setattr(Figure, "savefig", spy)
    return figures
