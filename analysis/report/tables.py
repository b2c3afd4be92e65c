"""The tables of a report, from the runs of a block."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from analysis.blocks import (
    Block,
    Column,
    Entry,
    trained_apart,
)
from analysis.contents import (
    ATTACKS,
    DETECTED,
    LEARNED,
    attacks,
    budgets,
    cost,
    detected,
    difference_cells,
    hardly_told,
    learning_cells,
    patients_told,
)
from analysis.differences import cost_ratio
from analysis.facts import NONE, call_in
from analysis.findings import (
    Finding,
    Overall,
    mean_ranks,
    scores,
)
from analysis.metrics import MEASURES
from analysis.numbers import (
    MISSING,
    bounds,
    count,
    counted,
    listed,
    mean_sd,
    number,
    p_value,
    signed,
)
from analysis.records import Record, Unread
from analysis.stats import INFERENCE_SEEDS
from analysis.table import Group, Table, cells, table
from methods.naming import Call, render

LABELS = {"type": "device", "name": "hardware"}


def ratio(block: Block, column: Column, entry: Entry) -> float:
    """The cost as a ratio to the upstream alone; nan if that was not run."""
    base = block.alone(entry)
    return cost_ratio(column.rows[entry.name], column.rows[base]) if base else math.nan


def trainings(columns: Sequence[Column]) -> list[str]:
    """How the networks were trained; data sets with the same training share a line."""
    alike: dict[str, list[str]] = {}
    for column in columns:
        alike.setdefault(training_text(column), []).append(column.name)
    return [f"{', '.join(names)}: {text}." for text, names in alike.items()]


def folds_note(columns: Sequence[Column]) -> list[str]:
    """How cross-validation changes the meaning of the terms in a report."""
    names = [column.name for column in columns if column.done and column.done[0].folds]
    if not names:
        return []
    return [
        f"{', '.join(names)}: repeated cross-validation. Each seed tests on its own fold, not on "
        "the official split; the population interval is that of Nadeau and Bengio (2003), and "
        "there is no training interval."
    ]


def patients_note(columns: Sequence[Column]) -> list[str]:
    """How known patients affect the intervals of a report."""
    told: dict[str, list[str]] = {}
    for column in columns:
        for text in patients_told(column.done[0]) if column.done else ():
            told.setdefault(text, []).append(column.name)
    return [f"{', '.join(names)}: {text}." for text, names in told.items()]


def names_table(block: Block, name: str) -> Table | None:
    """The full names behind labels; None if there are no labels."""
    pairs = [(entry.name, entry.row) for entry in block.entries]
    pairs += [(column.name, column.key) for column in block.columns]
    rows = [pair for pair in pairs if len(set(pair)) > 1]
    return table(name, "Names in full", ["", "in full"], rows) if rows else None


def training_text(column: Column) -> str:
    """How the networks of a column were trained, and on how many rows."""
    training = column.training
    text = (
        f"{training.optimizer} {training.learning_rate:g}, batch {training.batch_size}, "
        f"{training.schedule}, {training.epochs} epochs"
    )
    if column.done:
        rows = column.done[0].result["data"]["rows"]
        text += f"; {rows['select']} select and {rows['test']} test rows"
    return text


def differences_table(found: Sequence[Finding], name: str, margin: float, metric: str) -> Table:
    """Every comparison with both intervals, the test and its verdict; of the leading metric."""
    rows = []
    for each in found:
        *told, detectable = difference_cells(each.difference)
        label = f"{each.row} over {each.base}"
        rows.append([label, each.column, *told, p_value(each.p), detectable, each.told])
    head = ["", "data set", "n", "difference, points ↑", "training 95 % CI", "population 95 % CI",
            "p (Holm)", "detectable, points ↓", "verdict"]  # fmt: skip
    tested = sum(not math.isnan(each.p) for each in found)
    folds = sorted({each.difference.folds for each in found if each.difference} - {0})
    cut = f"With folds ({', '.join(map(str, folds))}), the population interval is that of Nadeau "
    cut += "and Bengio (2003); the test data are not fixed."
    notes = [
        f"p-values and verdicts: with Holm's correction over {count(tested, 'tested comparison')}; "
        f"intervals are not corrected. Equivalent: within the margin of {margin:g} points.",
        *([cut] if folds else []),
        *chosen_note(found),
        *hardly_note(found),
    ]
    title = f"Differences in test {MEASURES[metric].name}, last epoch"
    return table(name, title, head, rows, notes)


def chosen_note(found: Sequence[Finding]) -> list[str]:
    """Which row stands for a base that was chosen on the select split, on each data set."""
    told: dict[str, dict[str, str]] = {}
    for each in found:
        if each.chosen:
            told.setdefault(each.base, {})[each.column] = each.chosen
    return [
        f"{base}: the row with the higher mean select AUC at the last epoch, which is "
        f"{listed([f'{row} on {column}' for column, row in places.items()])}."
        for base, places in told.items()
    ]


def hardly_note(found: Sequence[Finding]) -> list[str]:
    """Which rows hardly learned, and where."""
    places: dict[str, list[str]] = {}
    for each in found:
        if each.hardly and each.column not in places.setdefault(each.row, []):
            places[each.row].append(each.column)
    return [hardly_told(row, f"on {listed(columns)}") for row, columns in places.items()]


def overall_table(block: Block, found: Sequence[Overall], reason: str, name: str) -> Table:
    """Comparisons over all data sets."""
    columns = block.columns
    rows = [
        [
            f"{each.row} over {each.base}",
            each.sets,
            counted(each.seeds),
            signed(each.estimate),
            bounds(each.interval),
            f"{each.wins}/{each.ties}/{each.losses}",
            number(each.improvement, 2),
            p_value(each.p),
        ]
        for each in found
    ]
    head = ["", "data sets", "n", "mean difference, points ↑", "population 95 % CI", "win/tie/loss",
            "P(improvement) ↑", "Wilcoxon p (Holm)"]  # fmt: skip
    notes = [*folds_note(columns), *patients_note(columns)]
    if reason:
        notes.append(f"No Wilcoxon test: {reason}.")
    title = f"Differences in test {MEASURES[block.leads].name} over all data sets, last epoch"
    return table(name, title, head, rows, notes)


def cost_table(block: Block, name: str) -> Table:
    """What each row costs on each data set."""
    rows = []
    for column in block.columns:
        for entry in block.entries:
            own = column.rows[entry.name]
            if own.by_seed():
                rows.append(
                    [
                        entry.name,
                        column.name,
                        len(own.by_seed()),
                        cost(own, "seconds_per_epoch", 2),
                        number(ratio(block, column, entry), 2),
                        cost(own, "charged_seconds", 1),
                        cost(own, "evaluation_seconds", 1),
                        cost(own, "passes_per_row", 2),
                        cost(own, "trained_per_drawn", 2),
                        cost(own, "memory_mib", 0),
                    ]
                )
    head = ["", "data set", "n", "s/epoch ↓", "ratio ↓", "charged s ↓", "evaluation s",
            "passes/row", "trained/drawn", "peak MiB ↓"]  # fmt: skip
    notes = [
        f"{column.name}: {text}"
        for column in block.columns
        for text in budgets(column.rows.values())
    ]
    return table(name, "Training cost, medians over seeds", head, rows, notes)


def detection_table(block: Block, name: str) -> Table | None:
    """How well wrong labels were found; None if there are none or nothing was learned."""
    rows = [
        [entry.name, column.name, *told]
        for column in block.columns
        for entry in block.entries
        if (told := detected(column.rows[entry.name], 1))
    ]
    if not rows:
        return None
    head = ["", "data set", *DETECTED]
    return table(name, "Wrong labels found", head, rows)


def learning_table(block: Block, name: str) -> Table | None:
    """How far learning went; None if no row says it."""
    rows = [
        [entry.name, column.name, str(len(column.rows[entry.name].by_seed())), *told]
        for column in block.columns
        for entry in block.entries
        if (told := learning_cells(column.rows[entry.name]))
    ]
    head = ["", "data set", "n", *LEARNED.values(), "moved"]
    title = "Outer steps, and how far what is learned moved from its start, medians"
    return table(name, title, head, rows) if rows else None


def attack_table(block: Block, name: str) -> Table | None:
    """Statistics of attacked rows; None if no method attacks any."""
    rows = [
        [entry.name, column.name, *told]
        for column in block.columns
        for entry in block.entries
        if (told := attacks(column.rows[entry.name]))
    ]
    head = ["", "data set", *ATTACKS]
    return table(name, "Attacked rows", head, rows) if rows else None


def variants(block: Block) -> dict[tuple[str, str], list[tuple[Entry, dict[str, str]]]]:
    """Rows of one method over one upstream that differ in arguments, with those arguments."""
    families: dict[tuple[str, str], list[tuple[Entry, dict[str, str]]]] = {}
    for entry in block.entries:
        call = _call(entry)
        if call is None or entry.control:
            continue
        given = {key: _text(value) for key, value in call.arguments if key != "upstream"}
        families.setdefault((call.name, entry.facts.wraps or NONE), []).append((entry, given))
    return {key: rows for key, rows in families.items() if len(rows) > 1}


def _call(entry: Entry) -> Call | None:
    # Control rows, other budgets and other versions differ in more than an argument.
    return call_in(entry.method) if entry.row == entry.method else None


def _text(value: object) -> str:
    return render(value) if isinstance(value, Call) else str(value)


def ablation_table(block: Block, name: str) -> Table | None:
    """Rows of one method that differ in arguments, side by side; None if there are none."""
    families = variants(block)
    if not families:
        return None
    keys = list(dict.fromkeys(key for rows in families.values() for _, g in rows for key in g))
    groups = []
    for (method, upstream), rows in families.items():
        body = [
            cells(
                [
                    entry.name,
                    *(given.get(key, "default") for key in keys),
                    *(mean_sd(scores(c.rows[entry.name], block.leads), 2) for c in block.columns),
                ]
            )
            for entry, given in rows
        ]
        groups.append(Group(f"{method} over {upstream}", tuple(body)))
    head = ("", *keys, *(f"{column.name}, % ↑" for column in block.columns))
    note = "default: not given, so the default of the method or of its preset."
    title = f"Test {MEASURES[block.leads].name} by argument, last epoch"
    return Table(name, title, head, tuple(groups), (note,))


def ranks_table(block: Block, name: str) -> Table | None:
    """Mean ranks over data sets; None without two sets, or two rows with three seeds on each."""
    found = mean_ranks(block, block.leads)
    if found is None:
        return None
    names, ranks, sets = found
    order = np.argsort(ranks.mean, kind="stable")
    rows = [[names[each], number(float(ranks.mean[each]), 2)] for each in order]
    notes = [
        f"{len(names)} rows over {sets} data sets; critical difference "
        f"{ranks.critical_difference:.2f} (Nemenyi, 5 %); Friedman p "
        f"{p_value(ranks.friedman_p)}."
    ]
    left = [entry.name for entry in block.compared if entry.name not in names]
    if left:
        notes.append(
            f"Left out, with fewer than {INFERENCE_SEEDS} seeds on a data set: {', '.join(left)}."
        )
    title = f"Mean ranks by test {MEASURES[block.leads].name}, last epoch, 1 is best"
    return table(name, title, ["", "mean rank ↓"], rows, notes)


def failures_table(records: Sequence[Record], unread: Sequence[Unread], name: str) -> Table | None:
    """Runs without metrics, grouped by reason; None if all are done."""
    found: dict[tuple[str, str, str, str], list[int]] = {}
    for record in records:
        status = record.result["status"]
        if status in ("done", "stopped"):
            continue
        run = record.run
        key = (run.row, f"{run.benchmark}, {run.model}", status, record.result.get("reason", ""))
        found.setdefault(key, []).append(run.seed)
    rows: list[list[object]] = [
        [row, where, _seeds(seeds), status, reason]
        for (row, where, status, reason), seeds in sorted(found.items())
    ]
    for each in unread:
        cell: list[object] = [MISSING, MISSING, MISSING]
        if run := each.run:
            cell = [run.row, f"{run.benchmark}, {run.model}", run.seed]
        rows.append([*cell, "no result", f"{each.folder.name}: {each.reason}"])
    head = ["", "where", "seeds", "status", "reason"]
    return table(name, "Runs without a result", head, rows) if rows else None


def _seeds(seeds: Sequence[int]) -> str:
    kept = sorted(set(seeds))
    if len(kept) > 2 and kept == list(range(kept[0], kept[-1] + 1)):
        return f"{kept[0]} to {kept[-1]}"
    return ", ".join(map(str, kept))


def blocks_table(numbered: Sequence[tuple[int, Block]]) -> Table:
    """What differs between blocks, so that nobody compares them unknowingly."""
    made = [block for _, block in numbered]
    differ = [key for key in made[0].setting if len({block.setting[key] for block in made}) > 1]
    trainings = trained_apart(made)
    rows = []
    for place, block in numbered:
        own = [asdict(column.training) for column in block.columns]  # type: ignore[call-overload]
        rows.append(
            [
                place,
                ", ".join(column.name for column in block.columns),
                *(block.setting[key] for key in differ),
                *(", ".join(dict.fromkeys(str(each[key]) for each in own)) for key in trainings),
                len(block.done),
            ]
        )
    head = ["block", "data sets", *differ, *trainings, "runs"]
    return table("blocks", "What differs between the blocks", head, rows)


def versions_table(block: Block, name: str) -> Table:
    """Libraries and machines of the runs that are done."""
    told = [{**each.result["device"], **each.result.get("versions", {})} for each in block.done]
    keys = [key for key in dict.fromkeys(k for each in told for k in each) if key != "threads"]
    rows = []
    for key in keys:
        counts = Counter(str(each.get(key, "?")) for each in told)
        values = (f"{value} ({count(n, 'run')})" for value, n in counts.items())
        rows.append([LABELS.get(key, key), "; ".join(values)])
    return table(name, "Versions and hardware", ["", "value"], rows)
