"""The comparison of rows on one benchmark, as ``augbench compare`` prints it."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, replace

from analysis import robustness, words
from analysis.contents import (
    ATTACKS,
    DETECTED,
    attacks,
    budgets,
    cost,
    detected,
    difference_cells,
    learning_told,
    one_class,
    patients_told,
)
from analysis.differences import RowRuns, advised, cost_ratio, difference
from analysis.findings import Finding, of_rows
from analysis.labels import Labels, labelled, legend
from analysis.metrics import MEASURES, SHOWN, to_test
from analysis.numbers import MISSING, POINTS, estimated, mean_sd, number, p_value
from analysis.question import MARGIN
from analysis.records import Record, leading
from analysis.runs import PRESETS
from analysis.stats import FEW_SEEDS, INFERENCE_SEEDS
from analysis.table import WIDTH, table, text, wrapped

NAMES = 24
"""Width to which the names of rows are folded if a table would be too wide."""
LONG = 30
"""A footnote does not repeat a name that is longer than this."""
INDENT = 11
"""of the text in the lines above the table"""


def as_text(
    rows: Sequence[RowRuns],
    when: str = "last",
    margin: float = MARGIN,
    verbose: bool = False,
    labels: Labels | None = None,
) -> str:
    """The comparison of rows on one benchmark: scores, differences, verdicts and costs.

    All records are of one benchmark, model, protocol and training. ``margin``, in points: what
    counts as equivalent. ``verbose`` adds everything that a report says about these rows.
    ``labels`` are labels of rows, in addition to those that methods declare.

    Raises:
        NamingError: two rows have the same label.
    """
    full, rows = rows, labelled(rows, labels or {})
    done = [record for row in rows for record in row.records if record.done]
    if not done:
        return "No run has a result.\n" + "\n".join(_reasons(rows))
    leads = leading(done)
    names = legend((row.name, one.name) for row, one in zip(rows, full, strict=True))
    shown = {one.name: row.name for row, one in zip(rows, full, strict=True)}
    found = [
        replace(each, row=shown[each.row], base=shown[each.base])
        for each in of_rows(full, margin, when)
    ]
    blocks = [
        _heading(rows, done, when),
        "\n".join([_scores(rows, found, when, leads), *_footnotes(found, done, margin, leads)]),
        _on_corrupted(rows, found, margin),
        "\n".join(wrapped(told) for row in rows if (told := learning_told(row))),
        "\n".join([*_reasons(rows), *_not_tested(found), *map(wrapped, names)]),
    ]
    if verbose:
        further = {
            "more": [_more(rows, when)],
            "differences": [
                _differences(rows, found, metric, when, leads)
                for metric in SHOWN[leads]
                if metric in to_test(leads)
            ],
            "labels-found": [_detection(rows)],
            "attacked-rows": [_attacks(rows)],
            "corrupted": _more_on_corrupted(rows, found, margin),
        }
        blocks += [each for listed in further.values() for each in listed]
        shown = {name for name, listed in further.items() if any(listed)}
        defined = words.of({"cost", *shown, *words.about([leads])}, [leads])
        told = [f"{word}: {meaning}" for word, meaning in defined.items()]
        blocks.append("\n".join(map(wrapped, [*_remarks(rows, done), *told])))
    return "\n\n".join(block for block in blocks if block)


def _heading(rows: Sequence[RowRuns], done: Sequence[Record], when: str) -> str:
    record = done[0]
    run, training, data = record.run, record.run.training, record.result["data"]
    optimiser = (
        f"{training.optimizer} {training.learning_rate:g}, batch {training.batch_size}, "
        f"{training.schedule}, {training.epochs} epochs ({_preset(record)})"
    )
    epoch = "last epoch" if when == "last" else "best epoch on select"
    protocol = run.protocol
    cut = [r.run for r in done if r.result["data"]["rows"].get("meta") or r.run.control != "all"]
    if protocol == "equal" and cut:
        share = f"meta rows {100 * cut[0].meta_fraction:g} % of the pool"
        protocol += f" ({f'crossfit {cut[0].crossfit}' if cut[0].crossfit > 1 else share})"
    path = record.recorded.get("path")
    name = f"{run.benchmark} {path}" if path else run.benchmark
    devices = {f"{r.result['device']['name']}, {_threads(r.run.threads)} per run" for r in done}
    lines = [
        f"Benchmark  {name}: {data['rows']['select']} select and {data['rows']['test']} test rows, "
        f"{len(data['classes'])} classes",
        f"Model      {run.model}, {record.result['parameters']:,} parameters",
        f"Training   {optimiser}",
        f"Protocol   {protocol}; {epoch}; equal steps unless a row says otherwise",
        f"Hardware   {'; '.join(sorted(devices))}",
        *(f"Seeds      {told}" for told in _seeds(rows, record)),
        *(f"Patients   {told}" for told in patients_told(record)),
        *(f"Selection  {told}" for told in _not_offered(done, when)),
        *(f"Leading    {told}" for told in words.led(leading(done))),
        *(f"Labels     {told}" for told in _corrupted(record)),
        *(f"Caveat     {told}" for told in (*one_class(rows), *data["caveats"])),
        *(f"Data       {told}" for told in data["notes"]),
    ]
    if not all(each.result["data"]["verified"] for each in done):
        lines.append("Data       UNVERIFIED DATA: the file differs from the official one")
    return "\n".join(
        textwrap.fill(
            line, WIDTH, subsequent_indent=" " * INDENT, break_long_words=False,
            break_on_hyphens=False,
        )
        for line in lines
    )  # fmt: skip


def _threads(count: int) -> str:
    return "1 CPU thread" if count == 1 else f"{count} CPU threads"


def _preset(record: Record) -> str:
    """The preset, and the fields not shown elsewhere in which the training differs from it."""
    name, training = record.recorded.get("preset"), asdict(record.run.training)  # type: ignore[call-overload]
    if name not in PRESETS:
        return ", ".join(f"{field} {value}" for field, value in training.items())
    base = asdict(PRESETS[name][1])  # type: ignore[call-overload]
    shown = ("optimizer", "learning_rate", "batch_size", "schedule", "epochs")
    other = [f"{k} {v}" for k, v in training.items() if v != base[k] and k not in shown]
    return ", ".join([f"preset {name}", *other])


def _seeds(rows: Sequence[RowRuns], record: Record) -> list[str]:
    """A note if there are fewer seeds than recommended; otherwise empty."""
    counts = [len(row.by_seed()) for row in rows if not row.origin and row.by_seed()]
    if not counts:
        return []
    fewest = min(counts)
    test = record.result["data"]["rows"]["test"]
    wanted = advised(test, record.folds)
    if fewest >= wanted:
        return []
    start = "" if fewest >= INFERENCE_SEEDS else f"; intervals need at least {INFERENCE_SEEDS}"
    return [f"{fewest}{start}; {wanted} are recommended for {test} test rows"]


def _not_offered(done: Sequence[Record], when: str) -> list[str]:
    if when != "selected":
        return []
    reasons = {record.result.get("selection", {}).get("reason") for record in done}
    return sorted(f"not available, {reason}" for reason in reasons if reason)


def _corrupted(record: Record) -> list[str]:
    corruption = record.result["data"]["corruption"]
    if corruption is None:
        return []
    counts = corruption["rows_of_each_class_before_noise"]
    empty = ", ".join(str(place) for place, count in enumerate(counts) if not count)
    return [
        f"{100 * corruption['noise_effective']:.1f} % of the training labels are wrong (requested: "
        f"{100 * corruption['noise_requested']:g} %)",
        *([f"class {empty} has no training rows left"] if empty else []),
    ]


def _scores(rows: Sequence[RowRuns], found: Sequence[Finding], when: str, leads: str) -> str:
    """The table: each row with its scores, its difference from its base, verdict and cost."""
    names, against = {row.name: row for row in rows}, {each.row: each for each in found}
    body = []
    for row in rows:
        records = list(row.by_seed().values())
        base = names.get(row.upstream) or names.get(f"{row.upstream}@train")
        scores = [
            mean_sd([POINTS * each.metric(metric, when=when) for each in records], 2)
            for metric in SHOWN[leads]
        ]
        ratio = number(cost_ratio(row, base) if base is not None else math.nan, 2)
        body.append([row.name, str(len(records)), *scores, *_judged(against.get(row.name)), ratio])
    head = ["", "n", *(_headed(MEASURES[name].name) for name in SHOWN[leads]),
            "difference [95 % CI]", "verdict", "cost"]  # fmt: skip
    which = "last epoch" if when == "last" else "best epoch on select"
    title = f"Test scores, {which}: mean ± standard deviation over n seeds"
    return _fitting(title, head, body)


def _headed(name: str) -> str:
    """The heading of a column of scores, a word a line."""
    return "\n".join(f"{name}, %".split(" ", name.count(" ")))


def _judged(found: Finding | None) -> tuple[str, str]:
    if found is None:
        return "", ""
    made = found.difference
    if made is None:
        return MISSING, found.told
    return estimated(made.estimate, made.interval), found.told


def _fitting(title: str, head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """The table as text; if it is too wide, verdicts and then names are folded."""

    def over(made: str) -> int:
        return max(map(len, made.splitlines())) - WIDTH

    def written() -> str:
        return text(table("scores", title, head, body))

    if over(written()) > 0:
        body = [[*row[:-2], _broken(row[-2]), row[-1]] for row in body]
    if (beyond := over(written())) > 0:
        width = max(NAMES, max(len(row[0]) for row in body) - beyond)
        body = [[folded(row[0], width), *row[1:]] for row in body]
    return written()


def folded(name: str, width: int) -> str:
    """A row's name on lines of this width, broken at natural places."""
    pieces = re.findall(r".+?(?:[ +]|$)", name)
    lines = [""]
    for piece in pieces if max(map(len, pieces)) <= width else re.findall(r".+?(?:[ +(]|$)", name):
        if lines[-1].strip() and len(lines[-1]) + len(piece.rstrip()) > width:
            lines.append("  ")
        lines[-1] += piece
    return "\n".join(line.rstrip() for line in lines)


def _footnotes(
    found: Sequence[Finding], done: Sequence[Record], margin: float, leads: str
) -> list[str]:
    """What the columns mean, in three lines."""
    folds, patients = done[0].folds, done[0].patients
    over = "other seeds and test data"
    if folds:
        over = f"repeated {folds}-fold cross-validation"
    elif patients:
        over = "other seeds only" if patients == 1 else "other seeds and patients"
    lines = []
    if found:
        of = MEASURES[leads].name
        lines.append(f"difference: points of {of} over {_bases(found)}; 95 % CI: {over}.")
    tested = [each for each in found if each.verdict != "not tested"]
    if tested:
        level = "5 % level" + (f" after Holm over {len(tested)} rows" if len(tested) > 1 else "")
        few = f"; few seeds: under {FEW_SEEDS}" if any(" (" in each.told for each in tested) else ""
        lines.append(f"verdict: {level}; equivalent: within {margin:g} points{few}.")
    elif found:
        lines.append(f"verdict: needs at least {INFERENCE_SEEDS} seeds.")
    return [
        *lines,
        "cost: training time relative to the upstream alone. Definitions: docs/reports.md; more: "
        "--verbose.",
    ]


def _bases(found: Sequence[Finding]) -> str:
    """The base of the differences, in words."""
    bases = list(dict.fromkeys(each.base for each in found))
    if len(bases) > 1:
        alone = {each.base for each in found if each.fallback}
        return f"the upstream (or {next(iter(alone), 'none')})"
    return bases[0] if len(bases[0]) <= LONG else "the row without one"


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
    """Each reason once, with how many more seeds have it."""
    texts: dict[str, list[str]] = {}
    for reason in reasons:
        texts.setdefault(reason.partition(": ")[2], []).append(reason)
    return [(same[0], _others(len(same) - 1)) for same in texts.values()]


def _others(count: int) -> str:
    return f" (and {count} more seed{'s' if count > 1 else ''})" if count else ""


def _not_tested(found: Sequence[Finding]) -> list[str]:
    """Why rows have no verdict, unless the number of seeds or the heading already says so."""
    made = [(each.row, each.difference) for each in found if each.difference is not None]
    return [
        f"{name}: not tested, because {each.untested}"
        for name, each in made
        if each.untested and each.seeds >= INFERENCE_SEEDS and each.patients != 1
    ]


def _more(rows: Sequence[RowRuns], when: str) -> str:
    body = []
    for row in rows:
        records = list(row.by_seed().values())
        body.append(
            [
                row.name,
                mean_sd([each.metric("ece", when=when) for each in records], 3),
                _selecting(records, when),
                cost(row, "seconds_per_epoch", 2),
                cost(row, "passes_per_row", 2),
            ]
        )
    names = {each.selecting[1] for row in rows for each in row.records if each.done}
    chosen = f"select {' or '.join(sorted(names))}, % ↑"
    head = ["", "test ECE ↓", chosen, "s/epoch ↓", "passes/row"]
    return text(table("more", "Calibration, selection and cost", head, body))


def _selecting(records: Sequence[Record], when: str) -> str:
    if any(r.result["data"].get("select_trained") for r in records):
        return "trained on it"
    return mean_sd([POINTS * r.metric(r.selecting[0], "select", when) for r in records], 2)


def _differences(
    rows: Sequence[RowRuns], found: Sequence[Finding], metric: str, when: str, leads: str
) -> str:
    """Each difference with both intervals; p-values only for the metric of the verdicts."""
    names = {row.name: row for row in rows}
    headline = metric == leads
    body = []
    for each in found:
        made = each.difference if headline else difference(
            names[each.row], names[each.base], metric, when
        )  # fmt: skip
        told = [f"{each.row} over {each.base}", *difference_cells(made)]
        body.append([*told, p_value(each.p)] if headline else told)
    head = ["", "n", "difference", "training 95 % CI", "population 95 % CI", "detectable"]
    head += ["p (Holm)"] if headline else []
    title = f"Differences in test {MEASURES[metric].name}, in points, paired by seed"
    return text(table(metric, title, head, body)) if body else ""


def _detection(rows: Sequence[RowRuns]) -> str:
    """How well the rows identified corrupted labels; empty if no label was corrupted."""
    body = [[row.name, *own] for row in rows if (own := detected(row, 2))]
    return text(table("labels-found", "Wrong labels found", ["", *DETECTED], body)) if body else ""


def _attacks(rows: Sequence[RowRuns]) -> str:
    """What became of attacked rows; empty where no method attacks any."""
    body = [[row.name, *own] for row in rows if (own := attacks(row))]
    return text(table("attacked-rows", "Attacked rows", ["", *ATTACKS], body)) if body else ""


def _on_corrupted(rows: Sequence[RowRuns], found: Sequence[Finding], margin: float) -> str:
    """Scores on corrupted test images; empty if no run was evaluated on any."""
    made = robustness.brief_table(rows, found, margin)
    if made is None:
        return ""
    if max(map(len, text(made).splitlines())) > WIDTH:
        body = [[each.text for each in row] for group in made.groups for row in group.rows]
        body = [[folded(row[0], NAMES), *map(_broken, row[1:])] for row in body]
        made = table(made.name, made.title, [*map(_broken, made.head)], body, made.notes)
    return text(made)


def _broken(told: str) -> str:
    """A text with a line break before what is in brackets."""
    return re.sub(r" (?=[(\[])", "\n", told)


def _more_on_corrupted(
    rows: Sequence[RowRuns], found: Sequence[Finding], margin: float
) -> list[str]:
    """Differences, and the balanced error under each corruption; empty without evaluated runs."""
    names = {row.name: row for row in robustness.narrowed(rows)}
    pairs = [(each, names[each.row], names[each.base]) for each in found]
    made = [
        robustness.differences_table(pairs, margin, "corrupted-differences"),
        robustness.kinds_table([("", row) for row in rows], "corruptions"),
    ]
    return [text(each) for each in made if each is not None]


def _remarks(rows: Sequence[RowRuns], done: Sequence[Record]) -> list[str]:
    """How long rows of an equal budget trained, folds, and classes before noise."""
    lines, folds = budgets(rows), done[0].folds
    if folds:
        lines.append(f"Seed s tests on fold s mod {folds}, so the test data are not fixed.")
    corruption = done[0].result["data"]["corruption"]
    if corruption is not None:
        counts = corruption["rows_of_each_class_before_noise"]
        lines.append(
            f"Training rows per class before label noise, seed {done[0].run.seed}: {counts}."
        )
    return lines
