"""Scores of a trained network, and the selection of an epoch."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import numpy as np
import torch
from torch import nn

from analysis import metrics
from analysis.runs import Run
from analysis.tasks import task_named
from benchmarks.data.splits import Splits
from benchmarks.data.streams import Rows, shape_of
from benchmarks.training.checkpoint import State
from benchmarks.training.errors import TrainingFailed
from benchmarks.training.precision import tf32
from methods.base import Model, Part, overrides

EVALUATION_BATCH = 512
EVALUATION_VALUES = EVALUATION_BATCH * 3 * 64 * 64
"""The most pixel values in a batch: of images of 224 pixels 512 would take gigabytes."""
MIN_SELECT_ROWS, MIN_SELECT_CLASS = 200, 30


def quick_scores(model: nn.Module, rows: Rows, kind: str) -> dict[str, float]:
    """Scores that are cheap enough for every epoch."""
    return metrics.quick(logits_of(model, rows), labels_of(rows, kind), kind)


def selection_offered(splits: Splits, method: Part) -> tuple[bool, str]:
    """Whether the best epoch on the select split is offered as a secondary result, else why not."""
    labels = labels_of(splits.select, splits.kind)
    rarest = int(task_named(splits.kind).counts(labels, len(splits.classes)).min())
    if splits.select_trained:
        return False, "rows of the select split were used for training"
    if len(labels) < MIN_SELECT_ROWS or rarest < MIN_SELECT_CLASS:
        return False, (
            f"the select split has {len(labels)} rows, {rarest} of its rarest class; "
            f"{MIN_SELECT_ROWS} and {MIN_SELECT_CLASS} are needed"
        )
    if overrides(method, "finish"):
        return False, "the method changes the network after the last epoch"
    return True, ""


def judge(
    run: Run, splits: Splits, network: nn.Module, state: State, method: Part
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Metrics and logits of the last epoch and, if it is offered, of the selected epoch."""
    offered, reason = selection_offered(splits, method)
    predictions = {
        "select_targets": labels_of(splits.select, splits.kind),
        "test_targets": labels_of(splits.test, splits.kind),
    }
    if splits.test_groups is not None:
        predictions["test_groups"] = splits.test_groups
    judged = {"last": network}
    if offered and state.best_model is not None:
        judged["selected"] = copy.deepcopy(network)
        judged["selected"].load_state_dict(state.best_model)
    scores: dict[str, Any] = {when: {} for when in judged}
    for when, each in judged.items():
        for split, rows in (("select", splits.select), ("test", splits.test)):
            logits = logits_of(each, rows)
            predictions[f"{split}_{when}_logits"] = logits
            targets = predictions[f"{split}_targets"]
            scores[when][split] = metrics.evaluate(logits, targets, splits.kind)
    shown = metrics.selecting(splits.kind)[1]
    lines = [json.loads(line) for line in state.metric_lines]
    timing = [json.loads(line) for line in state.timing_lines]
    result = {
        "metrics": scores,
        "selection": {
            "offered": offered,
            "reason": reason,
            "epoch": state.best_epoch if offered else None,
            "rule": f"best select {shown}, ties to the earliest epoch",
        },
        "cost": _cost(lines, timing),
    }
    learning = method.learning()
    if learning:
        result["learning"] = learning
    if run.oracle_test:
        best = max(lines, key=lambda line: line["test"]["accuracy"] or -math.inf)
        result["oracle_test"] = {"epoch": best["epoch"], **best["test"]}
    return result, predictions


def _cost(lines: list[dict[str, Any]], timing: list[dict[str, Any]]) -> dict[str, Any]:
    total = {
        name: sum(line["rows"][name] for line in lines)
        for name in ("drawn", "trained", "forward", "backward")
    }
    phases: dict[str, float] = {}
    for line in timing:
        for name, seconds in line["phases"].items():
            phases[name] = phases.get(name, 0.0) + seconds
    return {
        "epochs": len(lines),
        "charged_seconds": sum(phases.values()),
        "phases": phases,
        "seconds_per_epoch": float(np.median([line["charged_seconds"] for line in timing])),
        "rows": total,
        "passes_per_row": (total["forward"] + total["backward"]) / max(1, total["drawn"]),
        "trained_per_drawn": total["trained"] / max(1, total["drawn"]),
        "evaluation_seconds": sum(line["evaluation_seconds"] for line in timing),
        "memory_mib": max(line["memory_mib"] for line in timing),
    }


def labels_of(rows: Rows, kind: str) -> np.ndarray:
    """The labels of rows as their task stores them."""
    return task_named(kind).labels(rows.y.cpu().numpy())


def strata_of(rows: Rows, splits: Splits) -> np.ndarray:
    """(N,) int: the group of each row in a stratified draw, below K, or K for none."""
    task = task_named(splits.kind)
    return task.strata(labels_of(rows, splits.kind), len(splits.classes))


def batch_of(rows: Rows) -> int:
    """How many rows are evaluated at once."""
    values = rows.channels * math.prod(shape_of(rows.x)[1:])
    return min(EVALUATION_BATCH, max(1, EVALUATION_VALUES // values))


def caveats_of(model: nn.Module, rows: Rows) -> tuple[str, ...]:
    """What a reader should know about how a network predicts rows."""
    if not isinstance(model, Model) or model.rows_apart:
        return ()
    return (
        f"the network predicts rows in batches of {batch_of(rows)} in the order of the split, and "
        "the prediction of a row depends on the others of its batch: test rows are not independent",
    )


def logits_of(model: nn.Module, rows: Rows) -> np.ndarray:
    """float32 logits (N, K) in eval mode and float32; the mode of the network is restored.

    Raises:
        TrainingFailed: the logits are not finite.
    """
    training = model.training
    # One tensor for all: many small ones between large batches would keep the freed memory apart.
    logits = torch.empty(0)
    model.eval()
    with torch.no_grad(), tf32(False):
        order = torch.arange(len(rows)).split(batch_of(rows))
        for index, read in zip(order, rows.ahead(order), strict=True):
            x = rows.inputs(index.to(rows.y.device)) if read is None else read
            found = model(x)
            if not len(logits):
                logits = torch.empty(len(rows), *found.shape[1:])
            logits[index] = found.float().cpu()
    model.train(training)
    if not bool(torch.isfinite(logits).all()):
        bad = int((~torch.isfinite(logits).all(dim=1)).sum())
        raise TrainingFailed(f"the network's logits are not finite for {bad} of {len(logits)} rows")
    return logits.numpy()
