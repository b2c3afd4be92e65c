"""Sentences made from numbers; none claims what its interval does not show."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from analysis.blocks import (
    CUT,
    Block,
    Column,
    bare,
    variant,
)
from analysis.contents import hardly_learned, hardly_told, one_class
from analysis.differences import Difference, advised, difference
from analysis.facts import NONE
from analysis.findings import Finding, Overall
from analysis.metrics import HEADLINE, MEASURES, SHOWN
from analysis.numbers import (
    MISSING,
    bounds,
    count,
    counted,
    listed,
    number,
    p_value,
    signed,
    starting,
)
from analysis.question import Question
from analysis.records import Record
from analysis.report.tables import folds_note, patients_note
from analysis.runs import (
    FLAGS,
    OPTIONS,
    PRESETS,
    row_name,
    row_parts,
)
from analysis.stats import ALPHA, INFERENCE_SEEDS, Interval
from analysis.table import Table, table
from analysis.words import led
from methods.naming import render, with_argument, with_path

RUNS = "runs"
"""The default results folder."""

VERDICTS = ("better", "worse", "equivalent", "undecided", "not tested")
MOST_NAMES = 6
"""The largest number of comparisons with one verdict that an answer names."""
MOST_SENTENCES = 16
"""The largest number of comparisons for which each has its own sentence."""

PROTOCOLS = {
    "equal": "Every row has the same labelled data; a method that learns from meta rows takes "
    "them from these, and the others train on all of them.",
    "paper": "The whole validation split is used as meta rows, in addition to the training split; "
    "the row @train+meta has as many labels as the methods.",
}


def settings(values: Mapping[str, Any]) -> str:
    """Hyper-parameters as text."""
    if not values:
        return "as written"
    return ", ".join(f"{key} {render(_hashable(value))}" for key, value in values.items())


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, list) else value


def points(value: float) -> str:
    """``+1.20 points``."""
    return f"{signed(value)} points"


def finding(each: Finding, margin: float, family: int) -> str:
    """A comparison in one to three sentences."""
    told = _compared(each, margin, family)
    return f"{told} {hardly_told(each.row)}" if each.hardly else told


def _compared(each: Finding, margin: float, family: int) -> str:
    start = f"{each.row} over {each.base} on {each.column}"
    made = each.difference
    if made is None:
        return f"{start}: no seed has a result for both."
    if made.population is None:
        return (
            f"{start}: {points(made.estimate)} over {count(made.seeds, 'seed')}; not tested, "
            f"because {made.untested}."
        )
    kind = f"repeated {made.folds}-fold" if made.folds else "population"
    told = (
        f"{start}: {points(made.estimate)}, 95 % CI {bounds(made.population)} ({kind}), "
        f"n = {count(made.seeds, 'seed')}, family of {family}, p {_equals(each.p)} after Holm; "
    )
    return told + _verdict(each, made, made.population, margin)


def statistics(found: Sequence[Finding], over: Sequence[Overall], margin: float) -> list[str]:
    """The findings in words: over all data sets first; if there are many, only decided ones."""
    family = sum(each.verdict != "not tested" for each in found)
    shown = list(found)
    if len(found) > MOST_SENTENCES:
        shown = [each for each in found if each.verdict not in ("undecided", "not tested")]
    told = [overall(each, margin) for each in over]
    told += [finding(each, margin, family) for each in shown]
    if len(shown) < len(found):
        told.append(
            f"{len(found) - len(shown)} of {len(found)} comparisons are undecided or not tested; "
            "they are in the table."
        )
    if not told:
        told = ["Nothing is compared: there is only one row, or no base for the others."]
    return told


def _verdict(each: Finding, made: Difference, interval: Interval, margin: float) -> str:
    if each.verdict == "equivalent" and made.variances is not None:
        other = ", though not 0" if each.p <= ALPHA else ""
        narrow = bounds(made.variances.interval(1 - 2 * ALPHA))
        return f"{each.told}: within the margin of {margin:g} (90 % CI {narrow}){other}."
    if each.verdict in ("better", "worse"):
        so = "beyond" if each.p_within <= ALPHA else "not shown to be beyond"
        return f"{each.told}, {so} the margin of {margin:g}."
    held = interval.low <= 0 <= interval.high
    why = "the interval includes 0" if held else "the interval excludes 0, but not after Holm"
    told = f"{each.told}: {why}, and equivalence within {margin:g} is not shown either."
    if math.isnan(made.detectable):
        return told
    return (
        f"{told} On its own, this comparison would find a difference of {made.detectable:.2f} "
        "points with 80 % power."
    )


def _equals(p: float) -> str:
    shown = p_value(p)
    return shown if shown.startswith("<") else f"= {shown}"


def overall(each: Overall, margin: float) -> str:
    """A comparison over all data sets in a sentence."""
    told = (
        f"{each.row} over {each.base}, mean of {each.sets} data sets (n = {counted(each.seeds)}): "
        f"{points(each.estimate)}"
        + (f", 95 % CI {bounds(each.interval)} (these data sets)" if each.interval else "")
        + f"; win/tie/loss {each.wins}/{each.ties}/{each.losses} at a margin of {margin:g}"
    )
    return f"{told}; P(improvement) {each.improvement:.2f}."


def answer(found: Sequence[Finding], metric: str) -> str:
    """Which comparisons of the leading metric had which verdict, each with its difference."""
    if not found:
        return "Nothing is compared."
    several = len({each.column for each in found}) > 1
    verdicts: dict[str, dict[str, list[str]]] = {}
    for each in sorted(found, key=lambda each: VERDICTS.index(each.verdict)):
        estimate = MISSING if each.difference is None else signed(each.difference.estimate)
        estimate += ", hardly learned" if each.hardly else ""
        where = f"{each.column} ({estimate})" if several else f"({estimate})"
        pairs = verdicts.setdefault(each.told, {})
        pairs.setdefault(f"{each.row} over {each.base}", []).append(where)
    name = MEASURES[metric].name
    told = [f"{count(len(found), 'comparison')} of test {name}, differences in points"]
    for verdict, pairs in verdicts.items():
        on = " on " if several else " "
        names = [f"{pair}{on}{', '.join(places)}" for pair, places in pairs.items()]
        more = [f"and {len(names) - MOST_NAMES} more"] if len(names) > MOST_NAMES else []
        told.append(f"{verdict.capitalize()}: {'; '.join([*names[:MOST_NAMES], *more])}")
    return f"{'. '.join(told)}."


def controls(
    block: Block, found: Sequence[Finding], margin: float, name: str
) -> tuple[list[str], Table | None]:
    """Whether control rows explain a gain, in words and as a table.

    A comparison in ``found``, the family of the study, is a gain if it is significant after Holm;
    one outside the family if its own interval shows it, and then the sentence says so. A gain is
    one of learning only if the row is above the control that takes all of its learning away, and
    above its upstream on the same labelled rows; the controls that take a part away narrow it. Of a
    method that does not learn, it is one of what its first control takes away.
    """
    rows, sentences = [], []
    family = {(each.row, each.base, each.column): each for each in found}
    for column in block.columns:
        for entry in block.compared:
            beside = block.controls_of(entry)
            # Without a row of the upstream on all labels, a gain is one over it on the same labels.
            base = block.baseline(entry) or block.alone(entry) if beside else ""
            gain = _gain(column, entry.name, base, family, block.leads) if base else ""
            explained, readings = [], dict[str, str]()
            few = False
            for control in beside:
                made = difference(column.rows[entry.name], column.rows[control], block.leads)
                if made is None:
                    continue
                read = reading(made, margin)
                rows.append(
                    [f"{entry.name} over {control}", column.name, made.seeds,
                     signed(made.estimate), bounds(made.population), number(made.detectable, 2),
                     f"{read} (few seeds)" if made.few and read in OF_SEEDS else read]
                )  # fmt: skip
                if control != base and not block.by_name[control].facts.dirty:
                    explained.append(_explained(control, read, margin, block.leads))
                    readings[control] = read
                    few |= made.few
            if gain and hardly_learned(column.rows[entry.name]):
                sentences.append(f"{column.name}: {gain}; {hardly_told(entry.name)}")
            elif gain:
                sentences += [f"{column.name}: {gain}; {told}" for told in explained]
                named = {
                    row: readings.pop(each.name, "") if each else ""
                    for row, each in block.without_learning(entry).items()
                }
                told = _of_learning(named, readings)
                sentences.append(f"{column.name}: {gain}; {told}{' (Few seeds.)' if few else ''}")
        column.forget()
    if not rows:
        return sentences, None
    if not sentences:
        sentences.append(
            "No method with control rows is shown to gain over its base (after Holm, or outside "
            "the family by its own population interval), so there is no gain to explain."
        )
    head = ["", "data set", "n", "difference, points ↑", "population 95 % CI",
            "detectable, points ↓", "reading"]  # fmt: skip
    notes = [
        "above, below: the interval, which is not corrected, excludes 0; same: the 90 % interval "
        f"lies within the margin of {margin:g} points.",
        *folds_note(block.columns),
        *patients_note(block.columns),
    ]
    name_of = MEASURES[block.leads].name
    title = f"Methods against their control rows, test {name_of}, last epoch"
    return sentences, table(name, title, head, rows, notes)


OF_SEEDS = ("above", "same", "below", "open")
"""Readings that depend on an interval, and so on the number of seeds."""


def reading(made: Difference, margin: float) -> str:
    """above, below, same, open, identical, or not tested."""
    if made.variances is not None and not made.variances.se > 0 and made.estimate == 0:
        return "identical"
    if made.population is None or made.variances is None:
        return "not tested"
    if made.variances.p_equivalent(margin) <= ALPHA:
        return "same"
    if made.population.low > 0:
        return "above"
    return "below" if made.population.high < 0 else "open"


def _gain(
    column: Column, row: str, base: str, family: Mapping[tuple[str, str, str], Finding], metric: str
) -> str:
    """That a row gains over its base, and how this is known; empty if it is not."""
    tested = family.get((row, base, column.name))
    if tested is not None:
        made, shown = tested.difference, tested.p <= ALPHA
        known = "after Holm, few seeds" if made is not None and made.few else "after Holm"
    else:
        made = difference(column.rows[row], column.rows[base], metric)
        shown = made is not None and made.population is not None and made.population.low > 0
        known = "by its own population interval, not corrected"
    gained = shown and made is not None and made.estimate > 0
    return f"{row} gains over {base} ({known})" if gained else ""


def _of_learning(named: Mapping[str, str], others: Mapping[str, str]) -> str:
    """Whether a gain is one of learning, or of what else a method's first control takes away.

    ``named`` are the readings against the controls that the method names, empty for those without a
    result; ``others`` those against its upstream on other labelled rows or with another budget.
    """
    first = next(iter(named), "frozen")
    learns = first.startswith("frozen")
    what = "learning" if learns else f"what {first} takes away"
    if not named.get(first):
        absent = first if named else "a row without its learning"
        return f"{absent} has no result, so this does not show that {what} helps."
    missed = [row for row, read in {first: named[first], **others}.items() if read != "above"]
    if missed:
        return f"it is not shown to be above {' and '.join(missed)}, so not to come from {what}."
    open_ = [row for row, read in named.items() if read and read != "above"]
    absent = [row for row, read in named.items() if not read]
    told = f"it is above {first}, so what that control takes away helps"
    if learns:
        told = f"it is above {first}, which takes all of its learning away, so learning helps"
    told += f", but it is not shown to be above {' and '.join(open_)}" if open_ else ""
    told += f"; {' and '.join(absent)} {'have' if len(absent) > 1 else 'has'} no result" * bool(
        absent
    )
    return f"{told}."


def _explained(control: str, read: str, margin: float, metric: str) -> str:
    alike = "is correct on the same test rows"
    if metric != HEADLINE:
        alike = f"has the same {MEASURES[metric].name} on the same rows"
    told = {
        "above": "scores lower, so it does not explain the whole gain",
        "same": f"is equivalent within the margin of {margin:g}, so the gain beyond that may not "
        "be due to the method",
        "below": "scores higher, so the gain may not be due to the method",
        "open": "is not significantly different, so whether it explains the gain is undecided",
        "identical": f"{alike} for every seed, so the gain is not due to the method",
        "not tested": "has too few seeds, only one test patient or no complete repeat of folds, so "
        "whether it explains the gain is unknown",
    }[read]
    return f"the control {control} {told}."


def advice(block: Block) -> list[str]:
    """Where there are too few seeds, and how many are recommended."""
    told: dict[str, list[str]] = {}
    for column in block.columns:
        counts = [len(row.by_seed()) for row in column.rows.values() if row.by_seed()]
        if not column.done:
            told.setdefault("no run has a result", []).append(column.name)
            continue
        rows = column.done[0].result["data"]["rows"]["test"]
        wanted = advised(rows, column.done[0].folds)
        if min(counts) < INFERENCE_SEEDS:
            text = (
                f"rows with {count(min(counts), 'seed')} have no interval and no verdict; "
                f"{wanted} seeds are recommended"
            )
        elif min(counts) < wanted:
            text = f"{count(min(counts), 'seed')}; {wanted} are recommended for {rows} test rows"
        else:
            continue
        told.setdefault(text, []).append(column.name)
    return [f"{', '.join(names)}: {text}." for text, names in told.items()]


def selection(block: Block) -> list[str]:
    """How epochs were chosen, and why the secondary choice is missing, if it is."""
    names = listed([MEASURES[each].name for each in SHOWN[block.leads]])
    told = [
        "Numbers are from the last epoch unless a table says otherwise, and nothing was chosen on "
        f"the test split. {starting(names)} are on the test split, the official one if there is "
        "one.",
        *(f"The leading metric is {why}." for why in led(block.leads)),
        *folds_note(block.columns),
    ]
    reasons: dict[str, list[str]] = {}
    for column in block.columns:
        rows: dict[str, list[str]] = {}
        for name, row in column.rows.items():
            for reason in sorted({_reason(record) for record in row.by_seed().values()}):
                rows.setdefault(reason, []).append(name)
        for reason, names in rows.items():
            place = column.name if len(rows) == 1 else f"{column.name} ({', '.join(names)})"
            if reason:
                reasons.setdefault(reason, []).append(place)
    told += [
        f"The epoch with the best select AUC is not available on {', '.join(names)}: {reason}."
        for reason, names in reasons.items()
    ]
    if block.setting["test metrics each epoch"] == "yes":
        told.append("Test metrics were recorded after each epoch, but not used to choose anything.")
    return told


def _reason(record: Record) -> str:
    return record.result.get("selection", {}).get("reason", "")


def caveats(block: Block) -> list[str]:
    """What a reader should know about the data sets, and about runs on several machines."""
    told = []
    for column in block.columns:
        told += [f"{column.name}, {text}." for text in one_class(column.rows.values())]
        for record in column.done:
            data = record.result["data"]
            told += [f"{column.name}: {text}." for text in (*data["caveats"], *data["notes"])]
            if not data["verified"]:
                told.append(
                    f"{column.name}: UNVERIFIED DATA, the file differs from the official one."
                )
            corruption = data["corruption"]
            if corruption is not None and record.run.seed == column.done[0].run.seed:
                told.append(
                    f"{column.name}: {100 * corruption['noise_effective']:.1f} % of the training "
                    f"labels are wrong (requested: {100 * corruption['noise_requested']:g} %)."
                )
    machines = {record.result["device"]["name"] for record in block.done}
    if len(machines) > 1:
        told.append(
            f"The runs come from several machines ({', '.join(sorted(machines))}), so costs cannot "
            "be compared."
        )
    versions = [entry.name for entry in block.entries if variant(entry.row)]
    if versions:
        told.append(
            f"Rows with the same name differ in the setting in braces: {', '.join(versions)}."
        )
    return list(dict.fromkeys(told))


def unmatched(blocks: Sequence[Block], question: Question) -> list[str]:
    """Comparisons of the study that no block can make."""
    return [
        f"The study's comparison of {row} over {base or 'its base'} has no runs."
        for row, base in question.family
        if not any(block.contrast(row, base) for block in blocks)
    ]


def commands(block: Block, column: Column, root: Path) -> list[str]:
    """The commands that repeat the runs of a column, or show them if they are done.

    One for each way in which meta rows are cut, and for each kind of equal budget. A line that
    starts with # says which other runs the next one makes.
    """
    cuts: dict[tuple[float, ...], list[Record]] = {}
    for record in (each for each in column.records if not each.origin):
        cuts.setdefault(tuple(getattr(record.run, name) for name in CUT), []).append(record)
    usual = cuts.get(tuple(CUT.values()), [])
    whole = [each for each in usual if _whole(each)]
    if len(cuts) > 1 and whole == usual != []:
        del cuts[tuple(CUT.values())]
    made = []
    for _, records in sorted(cuts.items()):
        # Rows on the whole pool do not depend on the cut.
        own = list({record.run.id: record for record in (*records, *whole)}.values())
        kinds = {r.run.budget.partition(" ")[0] for r in own} - {"steps"}
        for kind in sorted(kinds) or [""]:
            made += _command(block, column, own, kind, root)
    return made


def _whole(record: Record) -> bool:
    """Whether a run trains on the whole pool, without meta rows cut from it."""
    rows = record.result.get("data", {}).get("rows", {})
    return record.run.control == "all" and bool(rows) and not rows.get("meta", 0)


def _command(
    block: Block, column: Column, own: Sequence[Record], kind: str, root: Path
) -> list[str]:
    run, ids = own[0].run, {record.run.id for record in own}
    names = [
        bare(entry.row)
        for entry in block.entries
        if not entry.origin
        and any(record.run.id in ids for record in column.rows[entry.name].records)
    ]
    steps = [name for name in names if not row_parts(name)[2]]
    numbers = sorted({record.run.seed for record in own})
    words = ["augbench", "compare", "--benchmark", _benchmark(column), "--model", run.model]
    words += ["--methods", ",".join(dict.fromkeys(steps)), "--seeds", str(numbers[-1] + 1)]
    for name, default in (("protocol", "equal"), ("threads", 1), *CUT.items()):
        value = getattr(run, name)
        if value != default:
            words += [_option(name), f"{value:g}" if isinstance(value, float) else str(value)]
    words += ["--same", kind] if kind else []
    if run.oracle_test:
        words.append("--oracle-test")
    if root != Path(RUNS):
        words += ["--out", str(root)]
    told = []
    if len(numbers) <= numbers[-1]:
        listed = ", ".join(map(str, numbers))
        told.append(f"# runs all seeds from 0 to {numbers[-1]}; this report has {listed}")
    if more := sorted(_budgeted(block, steps, kind) - set(names)) if kind else []:
        told.append(f"# also runs: {', '.join(more)}")
    return [*told, shlex.join([*words, *_training(column, own[0].recorded.get("preset", ""))])]


def _budgeted(block: Block, names: Sequence[str], kind: str) -> set[str]:
    """The rows of an equal budget that a comparison of these rows makes."""
    made = set()
    for entry in block.compared:
        upstream = entry.facts.upstream if entry.facts.upstream in names else NONE
        if entry.facts.wraps and entry.method in names and upstream in names:
            made.add(row_name(upstream, budget=f"{kind} of {entry.method}"))
    return made


def samples(block: Block) -> list[str]:
    """The commands that draw what each row makes of training images of the first data set."""
    column = block.columns[0]
    start = ["augbench", "show", "--benchmark", _benchmark(column)]
    methods = dict.fromkeys(each.method for each in block.compared if each.method != NONE)
    return [
        shlex.join([*start, "--method", method, "--out", f"samples-{number}.png"])
        for number, method in enumerate(methods, start=1)
    ]


def _benchmark(column: Column) -> str:
    """The data set as a command line names it, with the paths of a user's own data."""
    recorded, name = column.records[0].recorded, column.benchmark
    if recorded.get("unlabelled"):
        name = with_argument(name, "unlabelled", recorded["unlabelled"])
    return with_path(name, recorded["path"]) if recorded.get("path") else name


def _training(column: Column, preset: str) -> list[str]:
    base: Mapping[str, object] = asdict(PRESETS[preset if preset in PRESETS else "medmnist"][1])  # type: ignore[call-overload]
    own = asdict(column.training)  # type: ignore[call-overload]
    words = ["--preset", preset] if preset in PRESETS and preset != "medmnist" else []
    for name in OPTIONS:
        if own[name] != base[name] and not (name == "momentum" and own["optimizer"] != "sgd"):
            value = own[name]
            words += [_option(name), f"{value:g}" if isinstance(value, float) else str(value)]
    changed = [name for name in FLAGS if own[name] != base[name]]
    return words + [_option(name if own[name] else f"no-{name}") for name in changed]


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
