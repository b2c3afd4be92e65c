"""Saves and restores the progress of a run."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from analysis import runs
from benchmarks.training.context import TrainingContext
from benchmarks.training.errors import first_line
from benchmarks.training.progress import Progress
from methods.learner import Learner


@dataclass
class State:
    """The progress of a run after an epoch; with the modules, all that resuming needs."""

    epoch: int = 0
    metric_lines: list[str] = field(default_factory=list)
    timing_lines: list[str] = field(default_factory=list)
    best_score: float = -math.inf
    best_epoch: int = 0
    best_model: dict[str, Tensor] | None = None
    resumed: int = 0


def write_lines(folder: Path, state: State) -> None:
    """Write metrics.jsonl and timing.jsonl up to the current epoch."""
    for name, lines in (
        ("metrics.jsonl", state.metric_lines),
        ("timing.jsonl", state.timing_lines),
    ):
        runs.write_text(folder / name, "".join(f"{line}\n" for line in lines))


def snapshot(state: State, ctx: TrainingContext, learner: Learner, clone: bool) -> dict[str, Any]:
    """All that resuming needs; ``clone`` if training continues before it is written."""
    content = {
        "state": {name: getattr(state, name) for name in runs.field_names(State)},
        "model": ctx.model.state_dict(),
        "optimizer": ctx.optimizer.state_dict(),
        "learner": learner.state_dict(),
        "loss_scale": ctx.arithmetic.state_dict(),
    }
    return copy.deepcopy(content) if clone else content


def write_checkpoint(folder: Path, content: dict[str, Any]) -> None:
    """Replace the checkpoint with this snapshot."""
    runs.write_atomically(folder / "checkpoint.pt", lambda file: torch.save(content, file))


def restore(
    folder: Path | None, ctx: TrainingContext, learner: Learner, progress: Progress, name: str
) -> State:
    """The state in the checkpoint, or a new one; a truncated checkpoint is ignored."""
    path = folder / "checkpoint.pt" if folder is not None else None
    if path is None or not path.exists():
        return State()
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        state = State(**content["state"])  # fails for one of another version of augbench
    except OSError as error:
        raise runs.StorageError(error.errno, error.strerror, str(path)) from error
    except Exception as error:  # torch raises many kinds for a damaged file
        progress.note(f"{path} cannot be read ({first_line(error)}); the run starts over")
        return State()
    ctx.model.load_state_dict(content["model"])
    ctx.optimizer.load_state_dict(content["optimizer"])
    learner.load_state_dict(content["learner"])
    ctx.arithmetic.load_state_dict(content.get("loss_scale", {}))
    state.resumed += 1
    progress.note(f"{name}: resuming after epoch {state.epoch} of {ctx.epochs}")
    return state


def cpu_copy(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights as they are now, on the CPU."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in weights.items()}
