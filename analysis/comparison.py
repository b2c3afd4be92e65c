"""The comparison of rows on one benchmark, as ``augbench compare`` prints it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict

from analysis.contents import (
    ATTACKED,
    ATTACKS,
    DETECTED,
    attacks,
    budgets,
    cost,
    detected,
    difference_cells,
    patients_told,
)
from analysis.differences import RowRuns, advised, cost_ratio, difference
from analysis.labels import Labels, labelled, legend
from analysis.numbers import POINTS, mean_sd, number
from analysis.records import Record
from analysis.runs import PRESETS
from analysis.stats import INFERENCE_SEEDS
from analysis.table import table, text, wrapped


def as_text(rows: Sequence[RowRuns], when: str = "last", labels: Labels | None = None) -> str:
    """The comparison of rows on one benchmark: scores, differences to the first row, costs.

    All records are of one benchmark, model, protocol and training. ``labels`` are those of rows,
    beside those that methods declare.

    Raises:
        NamingError: two rows have one label.
    """
    full, rows = rows, labelled(rows, labels or {})
    done = [record for row in rows for record in row.records if record.done]
    if not done:
        return "No run has ended with a result.\n" + "\n".join(_reasons(rows))
    names = legend((row.name, one.name) for row, one in zip(rows, full, strict=True))
    blocks = [
        _heading(done, when),
        _scores(rows, when),
        _differences(rows, "accuracy", "accuracy", when),
        _differences(rows, "auc", "AUC", when),
        _detection(rows),
        _attacks(rows),
        "\n".join([*_reasons(rows), *map(wrapped, [*names, *_remarks(rows, done, when)])]),
    ]
    return "\n\n".join(block for block in blocks if block)


def _heading(done: Sequence[Record], when: str) -> str:
    record = done[0]
    run, training = record.run, record.run.training
    rows = record.result["data"]["rows"]
    optimiser = (
        f"{training.optimizer} {training.learning_rate:g}, batch {training.batch_size}, "
        f"{training.schedule}, {training.epochs} epochs ({_preset(record)})"
    )
    epoch = "last epoch" if when == "last" else "best epoch by select AUC"
    protocol = run.protocol
    cut = [r.run for r in done if r.result["data"]["rows"].get("meta") or r.run.control != "all"]
    if protocol == "equal" and cut:
        share = f"meta rows {100 * cut[0].meta_fraction:g} % of the pool"
        protocol += f" ({f'crossfit {cut[0].crossfit}' if cut[0].crossfit > 1 else share})"
    path = record.recorded.get("path")
    name = f"{run.benchmark} {path}" if path else run.benchmark
    return "\n".join(
        [
            f"Benchmark  {name}: {rows['select']} select and {rows['test']} test rows, "
            f"{len(record.result['data']['classes'])} classes",
            f"Model      {run.model}, {record.result['parameters']:,} parameters",
            f"Training   {optimiser}",
            f"Protocol   {protocol}; {epoch}; equal steps unless a row says otherwise",
        ]
    )


def _preset(record: Record) -> str:
    """The preset, and every other field in which the training differs from it."""
    name, training = record.recorded.get("preset"), asdict(record.run.training)  # type: ignore[call-overload]
    if name not in PRESETS:
        return ", ".join(f"{field} {value}" for field, value in training.items())
    base = asdict(PRESETS[name][1])  # type: ignore[call-overload]
    shown = ("optimizer", "learning_rate", "batch_size", "schedule", "epochs")
    other = [f"{k} {v}" for k, v in training.items() if v != base[k] and k not in shown]
    return ", ".join([f"preset {name}", *other])


def _scores(rows: Sequence[RowRuns], when: str) -> str:
    names = {row.name: row for row in rows}
    body = []
    for row in rows:
        records = list(row.by_seed().values())
        base = names.get(row.upstream)
        body.append(
            [
                row.name,
                len(records),
                mean_sd([r.metric("auc", when=when) for r in records], 4),
                mean_sd([POINTS * r.metric("accuracy", when=when) for r in records], 2),
                mean_sd([r.metric("ece", when=when) for r in records], 3),
                _select_auc(records, when),
                cost(row, "seconds_per_epoch", 2),
                number(cost_ratio(row, base) if base is not None else math.nan, 2),
                cost(row, "passes_per_row", 2),
            ]
        )
    head = ["", "n", "test AUC ↑", "test accuracy, % ↑", "test ECE ↓", "select AUC ↑",
            "s/epoch ↓", "ratio ↓", "passes/row"]  # fmt: skip
    return text(table("scores", "Mean ± standard deviation over n seeds", head, body))


def _select_auc(records: Sequence[Record], when: str) -> str:
    if any(r.result["data"].get("select_trained") for r in records):
        return "trained on it"
    return mean_sd([r.metric("auc", "select", when) for r in records], 4)


def _differences(rows: Sequence[RowRuns], metric: str, label: str, when: str) -> str:
    first = rows[0]
    body = [[row.name, *difference_cells(difference(row, first, metric, when))] for row in rows[1:]]
    head = ["", "n", "difference", "training 95 % CI", "population 95 % CI", "detectable"]
    title = f"Test {label} against {first.name}, in points, paired by seed"
    return text(table(metric, title, head, body)) if body else ""


def _detection(rows: Sequence[RowRuns]) -> str:
    """What the rows learned of the corrupted labels; empty where nothing was corrupted."""
    body = [[row.name, *own] for row in rows if (own := detected(row, 2))]
    title = (
        "Wrong labels found: AUC, the chance that a mislabelled training row weighs less than a "
        "right one (ties half); corrected, mislabelled rows whose learned label is the true class; "
        "spoiled, right ones whose learned label is another class"
    )
    return text(table("labels-found", wrapped(title), ["", *DETECTED], body)) if body else ""


def _attacks(rows: Sequence[RowRuns]) -> str:
    """What became of attacked rows; empty where no method attacks any."""
    body = [[row.name, *own] for row in rows if (own := attacks(row))]
    return text(table("attacked-rows", wrapped(ATTACKED), ["", *ATTACKS], body)) if body else ""


def _reasons(rows: Sequence[RowRuns]) -> list[str]:
    lines = []
    for row in rows:
        stated = [
            f"{record.result['status']}, seed {record.run.seed}: {record.result['reason']}"
            for record in row.records
            if not record.done
        ]
        for reason, seeds in _grouped([*stated, *row.reasons]):
            lines.append(f"{row.name}: {reason}{seeds}")
    return lines


def _grouped(reasons: Sequence[str]) -> list[tuple[str, str]]:
    """Equal reasons once, with the number of the others."""
    texts: dict[str, list[str]] = {}
    for reason in reasons:
        texts.setdefault(reason.partition(": ")[2], []).append(reason)
    return [(same[0], _others(len(same) - 1)) for same in texts.values()]


def _others(count: int) -> str:
    return f" (and {count} more seed{'s' if count > 1 else ''})" if count else ""


def _remarks(rows: Sequence[RowRuns], done: Sequence[Record], when: str) -> list[str]:
    counts = [len(row.by_seed()) for row in rows if row.by_seed()]
    test = done[0].result["data"]["rows"]["test"]
    folds = done[0].folds
    wanted = advised(test, folds)
    intervals = (
        f"population: repeated {folds}-fold cross-validation, seed s on fold s mod {folds}, so "
        "that no test images are fixed (interval of Nadeau and Bengio, 2003)."
        if folds
        else "training: other seeds on these test images; population: other seeds and other "
        f"{'patients' if done[0].patients else 'images'}."
    )
    lines = [
        f"{intervals} detectable: the smallest true difference found with 80 % power "
        "(population). Intervals are not corrected for the number of rows.",
        "s/epoch: charged seconds (augmentation, outer steps, forward, backward; on a CPU its own "
        "seconds), without evaluation, median; ratio: to the same upstream without the method, "
        "with an equal budget of whole runs. passes/row: forward plus backward passes for each row "
        "drawn.",
    ]
    if min(counts) < INFERENCE_SEEDS:
        lines.append(
            f"With {min(counts)} seed(s) this is a smoke test, not evidence; {wanted} "
            "seeds are advised."
        )
    elif min(counts) < wanted:
        lines.append(f"{min(counts)} seeds; {wanted} are advised for {test} test rows.")
    for row in rows if folds else ():
        if set(Counter(seed // folds for seed in row.by_seed()).values()) - {folds}:
            lines.append(
                f"{row.name}: a repeat of the {folds} folds is not whole, so nothing is inferred."
            )
    lines += [f"Patients: {told}." for told in patients_told(done[0])]
    lines += budgets(rows)
    if when == "selected":
        choices = [record.result.get("selection", {}) for record in done]
        lines += sorted(
            {f"selected: not offered, {each['reason']}." for each in choices if each.get("reason")}
        )
    corruption = done[0].result["data"]["corruption"]
    if corruption is not None:
        lines.append(
            f"Corrupted: {100 * corruption['noise_effective']:.1f} % of the training labels really "
            f"differ (asked for {100 * corruption['noise_requested']:g} %); rows of each class "
            f"before noise {corruption['rows_of_each_class_before_noise']} (seed "
            f"{done[0].run.seed})."
        )
        counts = corruption["rows_of_each_class_before_noise"]
        lines += [f"Class {k} has no training row left." for k, n in enumerate(counts) if not n]
    lines += [f"Caveat: {text}." for text in done[0].result["data"]["caveats"]]
    lines += [f"Data: {text}." for text in done[0].result["data"]["notes"]]
    if not all(record.result["data"]["verified"] for record in done):
        lines.append("UNVERIFIED DATA: the file differs from the official one.")
    devices = sorted(
        {f"{r.result['device']['name']}, {r.run.threads} CPU thread(s) a run" for r in done}
    )
    lines.append(f"Hardware: {'; '.join(devices)}.")
    return [line.replace("..", ".") for line in lines]
