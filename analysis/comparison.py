"""The comparison of rows on one benchmark, as text."""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from tabulate import tabulate

from analysis.records import ATTACK, Record, read
from analysis.runs import PRESETS, Run, folder_of
from analysis.stats import (
    INFERENCE_SEEDS,
    Estimated,
    Interval,
    crossed,
    resampled,
    smallest_detectable,
    training_interval,
)

POINTS = 100
WIDTH = 110
"""Letters a line of the remarks below a table."""
SMALL_TEST, SMALL_TEST_SEEDS, SEEDS = 500, 30, 10


@dataclass(frozen=True)
class Difference:
    """A row against the first one, in points, paired by seed."""

    estimate: float
    seeds: int
    training: Interval | None
    """None below four seeds: three are a smoke test; with folds, which have no fixed test; and
    where all seeds differ equally, which tells no variance"""
    population: Interval | None
    """over folds that of Nadeau and Bengio; None where a repeat of the folds is not whole, where
    predictions are equal everywhere, which tells no variance, and with one test patient alone"""
    detectable: float
    """Smallest difference found with 80 % power, population; nan where no variance is known."""
    variances: Estimated | None = None
    """behind the population interval; None with one seed, and with one test patient alone"""
    folds: int = 0
    patients: int = 0
    """of the test split, whose images are not independent; 0 where nothing is known of them"""


@dataclass(frozen=True)
class Row:
    """All runs of one row of a table."""

    name: str
    upstream: str
    """the row that costs are a ratio to"""
    records: tuple[Record, ...]
    reasons: tuple[str, ...] = ()
    """why runs of this row are missing"""

    def by_seed(self) -> dict[int, Record]:
        """The runs with metrics."""
        return {record.run.seed: record for record in self.records if record.done}


def row_of(
    name: str, upstream: str, wanted: Sequence[Run], root: Path, problems: Mapping[str, str]
) -> Row:
    """The row of these runs, those that have ended; ``problems`` says by id why others have not."""
    missing = (run for run in wanted if run.id in problems)
    reasons = (f"not done, seed {run.seed}: {problems[run.id]}" for run in missing)
    found = read([folder_of(root, run) for run in wanted])
    return Row(name, upstream, tuple(found), tuple(reasons))


def difference(row: Row, base: Row, metric: str, when: str = "last") -> Difference | None:
    """``row`` minus ``base`` in points, over the seeds that both have; None where there is none.

    The population interval speaks of other seeds and other test images, or other patients where
    these are known; the training interval of other seeds on these images (design: two intervals,
    named).
    """
    ours, theirs = row.by_seed(), base.by_seed()
    seeds = [
        seed
        for seed in sorted(ours.keys() & theirs.keys())
        if not math.isnan(ours[seed].metric(metric, when=when))
        and not math.isnan(theirs[seed].metric(metric, when=when))
    ]
    if not seeds:
        return None
    per_seed = np.array(
        [ours[s].metric(metric, when=when) - theirs[s].metric(metric, when=when) for s in seeds]
    )
    estimate = POINTS * float(per_seed.mean())
    first = ours[seeds[0]]
    blank = Difference(estimate, len(seeds), None, None, math.nan, patients=first.patients)
    if len(seeds) < 2:
        return blank
    folds = first.folds
    blank = replace(blank, folds=folds)
    if folds and set(Counter(seed // folds for seed in seeds).values()) != {folds}:
        return blank
    training = None
    if not folds and len(seeds) >= INFERENCE_SEEDS:
        training = training_interval(POINTS * per_seed)
        training = training if training.se > 0 else None
    if folds:
        cuts = [ours[s].result["data"]["rows"] for s in (seeds if first.patients else seeds[:1])]
        test, select = (float(np.mean([cut[name] for cut in cuts])) for name in ("test", "select"))
        variances = resampled(POINTS * per_seed, folds, test / ((folds - 1) * test - select))
    elif first.patients == 1:
        return replace(blank, training=training)
    else:
        targets = first.predictions["test_targets"]
        items = np.stack(
            [ours[s].item_values(metric, when) - theirs[s].item_values(metric, when) for s in seeds]
        )
        variances = crossed(
            POINTS * items,
            targets if targets.ndim == 1 else None,
            clusters=first.predictions.get("test_groups"),
        )
    population = variances.interval()
    if not population.se > 0:
        return replace(blank, variances=variances)
    detectable = smallest_detectable(population.se, population.df)
    made = replace(blank, variances=variances, detectable=detectable)
    if len(seeds) < INFERENCE_SEEDS:
        return made
    return replace(made, training=training, population=population)


def cost_ratio(row: Row, base: Row) -> float:
    """Median over seeds of charged seconds an epoch, as a ratio to ``base``.

    Of a row with an equal budget, which takes epochs of its own, that of whole runs.
    """
    ours, theirs = row.by_seed(), base.by_seed()
    own = any(record.run.budget != "steps" for record in ours.values())
    key = "charged_seconds" if own else "seconds_per_epoch"
    ratios = [
        ours[s].result["cost"][key] / theirs[s].result["cost"][key]
        for s in ours.keys() & theirs.keys()
    ]
    return float(np.median(ratios)) if ratios else math.nan


def comparison(rows: Sequence[Row], when: str = "last") -> str:
    """The comparison of rows on one benchmark: scores, differences to the first row, costs.

    All records are of one benchmark, model, protocol and training.
    """
    done = [record for row in rows for record in row.records if record.done]
    if not done:
        return "No run has ended with a result.\n" + "\n".join(_reasons(rows))
    blocks = [
        _heading(done, when),
        _scores(rows, when),
        _differences(rows, "accuracy", "accuracy", when),
        _differences(rows, "auc", "AUC", when),
        _detection(rows),
        _attacks(rows),
        "\n".join([*_reasons(rows), *map(wrapped, _remarks(rows, done, when))]),
    ]
    return "\n\n".join(block for block in blocks if block)


def wrapped(text: str) -> str:
    """A remark on lines of a width that can be read."""
    return textwrap.fill(
        text, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


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


def _scores(rows: Sequence[Row], when: str) -> str:
    names = {row.name: row for row in rows}
    body = []
    for row in rows:
        records = list(row.by_seed().values())
        costs = [record.result["cost"] for record in records]
        base = names.get(row.upstream)
        ratio = cost_ratio(row, base) if base is not None else math.nan
        body.append(
            [
                row.name,
                len(records),
                mean_sd([r.metric("auc", when=when) for r in records], 4),
                mean_sd([POINTS * r.metric("accuracy", when=when) for r in records], 2),
                mean_sd([r.metric("ece", when=when) for r in records], 3),
                _select_auc(records, when),
                number(_median([cost["seconds_per_epoch"] for cost in costs]), 2),
                number(ratio, 2),
                number(_median([cost["passes_per_row"] for cost in costs]), 2),
            ]
        )
    head = ["", "n", "test AUC ↑", "test accuracy, % ↑", "test ECE ↓", "select AUC ↑",
            "s/epoch ↓", "ratio ↓", "passes/row"]  # fmt: skip
    return "Mean ± standard deviation over n seeds\n" + grid(head, body)


def _select_auc(records: Sequence[Record], when: str) -> str:
    if any(r.result["data"].get("select_trained") for r in records):
        return "trained on it"
    return mean_sd([r.metric("auc", "select", when) for r in records], 4)


def _differences(rows: Sequence[Row], metric: str, label: str, when: str) -> str:
    first, body = rows[0], []
    for row in rows[1:]:
        found = difference(row, first, metric, when)
        if found is None:
            body.append([row.name, 0, "n/a", "n/a", "n/a", "n/a"])
            continue
        body.append(
            [
                row.name,
                found.seeds,
                signed(found.estimate),
                bounds(found.training),
                bounds(found.population),
                number(found.detectable, 2),
            ]
        )
    if not body:
        return ""
    head = ["", "n", "difference", "training 95 % CI", "population 95 % CI", "detectable"]
    return f"Test {label} against {first.name}, in points, paired by seed\n" + grid(head, body)


def _detection(rows: Sequence[Row]) -> str:
    """What the rows learned of the corrupted labels; empty where nothing was corrupted."""
    body = []
    for row in rows:
        records = [each for each in row.by_seed().values() if each.result.get("detection")]
        if not records:
            continue
        shares = [
            [POINTS * r.detection(name) for r in records] for name in ("corrected", "spoiled")
        ]
        auc = mean_sd([r.detection("weight_auc") for r in records], 3)
        body.append([row.name, len(records), auc, *(mean_sd(each, 2) for each in shares)])
    if not body:
        return ""
    head = ["", "n", "AUC by weight ↑", "corrected, % ↑", "spoiled, % ↓"]
    told = (
        "Wrong labels found: AUC, the chance that a mislabelled training row weighs less than a "
        "right one (ties half); corrected, mislabelled rows whose learned label is the true class; "
        "spoiled, right ones whose learned label is another class"
    )
    return f"{wrapped(told)}\n{grid(head, body)}"


ATTACKS = ("n", "selected, %", "margin kept, %", "prediction kept, %", "unmoved, %", "harder, %",
           "distance", "of noise")  # fmt: skip
ATTACKED = (
    "Attacked rows, by the methods' own logs (the first attack of each epoch and every 25th, mean "
    "over epochs with an attack and over seeds): selected, of the rows drawn, warm-up included; "
    "kept and harder by the network that attacked, with its label, which need not be the true one; "
    "unmoved, left as they were; harder, less likely than the clean row; distance, perceptual, and "
    "that of uniform noise of the same norm"
)


def attacks(row: Row) -> list[str]:
    """What became of a row's attacked rows, under ``ATTACKS``; empty where none are made."""
    records = [each for each in row.by_seed().values() if not math.isnan(each.logged(ATTACK[0]))]
    if not records:
        return []
    means = [float(np.mean([each.logged(name) for each in records])) for name in ATTACK]
    shares, distances = means[:5], means[5:]
    told = [number(POINTS * value, 1) for value in shares]
    return [str(len(records)), *told, *(number(value, 3) for value in distances)]


def _attacks(rows: Sequence[Row]) -> str:
    """What became of attacked rows; empty where no method attacks any."""
    body = [[row.name, *told] for row in rows if (told := attacks(row))]
    return f"{wrapped(ATTACKED)}\n{grid(['', *ATTACKS], body)}" if body else ""


def _reasons(rows: Sequence[Row]) -> list[str]:
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


def advised(test_rows: int, folds: int = 0) -> int:
    """The seeds that a comparison on so many test rows should have; of folds whole repeats."""
    count = SMALL_TEST_SEEDS if folds or test_rows < SMALL_TEST else SEEDS
    return -(-count // folds) * folds if folds else count


def _remarks(rows: Sequence[Row], done: Sequence[Record], when: str) -> list[str]:
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
            f"With {min(counts)} seed(s) this is a smoke test and no inference is drawn; {wanted} "
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
    lines += budgets(done)
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


def patients_told(record: Record) -> list[str]:
    """What known patients make of the intervals; empty where nothing is known, and over folds."""
    if not record.patients or record.folds:
        return []
    if record.patients == 1:
        return [
            "all test images are of one patient, so nothing is inferred of others: there is no "
            "population interval"
        ]
    rows = record.result["data"]["rows"]["test"]
    return [
        f"the {rows} test images are of {record.patients} patients, whose images are not "
        "independent: they are the units of the population interval"
    ]


def budgets(done: Sequence[Record]) -> list[str]:
    """How long each row with an equal budget trained, and by what that was measured."""
    lines = []
    for name, record in {record.run.row: record for record in done}.items():
        if record.run.budget != "steps":
            detail = record.recorded.get("budget")
            epochs = f"{record.run.training.epochs} epochs"
            lines.append(f"{name}: {epochs}, {detail}." if detail else f"{name}: {epochs}.")
    return lines


def grid(head: Sequence[str], body: Sequence[Sequence[object]]) -> str:
    """A table as text, the first column to the left and the others to the right."""
    align = ["left", *["right"] * (len(head) - 1)]
    return tabulate(body, headers=head, tablefmt="simple", colalign=align, disable_numparse=True)


def _median(values: Sequence[float]) -> float:
    return float(np.median(values)) if len(values) else math.nan


def mean_sd(values: Sequence[float], digits: int) -> str:
    """Mean ± standard deviation; one value alone has no deviation."""
    if not len(values) or any(math.isnan(value) for value in values):
        return "n/a"
    mean = f"{np.mean(values):.{digits}f}"
    return f"{mean} ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else mean


def number(value: float, digits: int) -> str:
    """A number with so many digits, where there is one."""
    return "n/a" if math.isnan(value) else f"{value:.{digits}f}"


def signed(value: float) -> str:
    """Points with their sign."""
    return f"{value:+.2f}"


def bounds(interval: Interval | None) -> str:
    """The ends of an interval with their signs."""
    return "–" if interval is None else f"{interval.low:+.2f} to {interval.high:+.2f}"
