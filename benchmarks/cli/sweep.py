"""``augbench sweep``: what it checks before anything runs, and what it prints. Needs no ray."""

from __future__ import annotations

import math
import os
import shlex
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from analysis import comparison, differences, question, records, runs
from analysis.numbers import bounds, count
from analysis.question import FILE, STUDIES, Prediction
from analysis.report import sentences
from analysis.studyfile import StudyError
from benchmarks.cli import arguments, hours, results
from benchmarks.cli.common import read_data
from benchmarks.data import sources
from benchmarks.running import capacity, executors, firstlook
from benchmarks.running.codes import FAILURE
from benchmarks.running.disk import Options
from benchmarks.running.driver import Outcomes
from benchmarks.running.executors import Where
from benchmarks.running.problems import Problem
from benchmarks.running.timelimit import limit_of
from benchmarks.studies import loading, rounds, schema, search, shipped
from benchmarks.studies.cells import Cell
from benchmarks.studies.ledger import Ledger
from benchmarks.studies.plan import Plan, chosen, label
from benchmarks.studies.rounds import RowSearch, Work
from benchmarks.studies.schema import Study
from benchmarks.studies.shards import Shard
from methods import own

MOST_TABLES = 4
"""The most tables that are printed at once."""
STATES = {
    "done": "done",
    "interrupted": "to do, resumes from its checkpoint",
    "new": "to do",
    "failed": "failed",
    "skipped": "skipped",
    "stopped": "stopped",
}
EQUAL_BUDGETS = "equal-budget rows are named once their methods are done"


@own.kept()
def carry_out(command: arguments.SweepCommand) -> int:
    """Run the study; return the exit code."""
    if command.file is None:
        raise arguments.UsageError(
            "file: expected a study file or the name of a shipped study (augbench sweep --list "
            "shows them; --init FILE writes a template), got none"
        )
    file = shipped.find(command.file)
    if file != command.file:
        print(f"Study file: {file}", file=sys.stderr)
    asked = loading.load(file, list(chain.from_iterable(command.settings)), command.tier)
    if command.workers is not None and command.workers < 1:
        raise StudyError(f"workers: expected 1 or more, got {command.workers}")
    root = (command.out or asked.out).expanduser().absolute()
    data_root = command.data or asked.data or sources.default_root()
    data_root = data_root.expanduser().absolute()
    plan = Plan(asked, data_root)
    plan.check_family()
    plan.check_labels()
    if asked.family and not plan.study.family:
        print(
            f"Tier {asked.tier} has no comparison of the family; every row is compared with its "
            "upstream.",
            file=sys.stderr,
        )
    if asked.tune is not None:
        rounds.check_search(plan, asked.tune, fetch=not command.dry_run)
    where = where_of(command, asked)
    ledger = Ledger(root, asked.retries, command.retry_failed)
    shard = Shard.of(command.shard)
    work = Work(plan, root, chosen(command.only), shard)
    work.foresee()
    wanted = work.cells()
    if command.only and not wanted:
        names = sorted(
            {label(cell) for experiment in plan.experiments for cell in experiment.cells()}
        )
        later = any(experiment.block.same for experiment in plan.experiments)
        raise StudyError(
            f"only: expected a pattern in the name of a run, such as {names[0]!r}, got "
            f"{command.only!r}" + (f" ({EQUAL_BUDGETS})" if later else "")
        )
    if len(wanted) > schema.MAX_RUNS:
        raise StudyError(f"the file names {len(wanted)} runs, expected at most {schema.MAX_RUNS:,}")
    if command.dry_run:
        return _dry_run(work, ledger, wanted, where)
    _remember(work)
    try:
        outcomes = _run(work, ledger, data_root, where)
    finally:  # more runs have a name by now: equal budgets, winners of a search
        work.foresee()
        _remember(work)
    return _told(plan, work, ledger, outcomes, command.verbose, shard)


def _remember(work: Work) -> None:
    """Store the study with its runs: what it asks, and which runs belong to it."""
    root, name = work.root, work.plan.study.name
    folder = root / STUDIES / name
    folder.mkdir(parents=True, exist_ok=True)
    own, file = work.whole(), folder / FILE
    asked = work.plan.study.asked()
    kept = question.read(root, name).predictions if file.is_file() else ()
    text = asked["prediction"].strip()
    if text and (not kept or kept[-1].text != text):
        states = [runs.status_of(runs.folder_of(root, cell.run)).state for cell in own]
        kept = (*kept, Prediction(text, time.strftime("%Y-%m-%d"), states.count("done")))
        if len(kept) > 1:
            print(
                f"The prediction was changed {kept[-1].when}; reports show both.", file=sys.stderr
            )
    if kept:  # a prediction made before the results keeps its date
        asked |= {"prediction": kept[0].text, "predictions": [asdict(each) for each in kept]}
    content = {**asked, "runs": sorted(cell.run.id for cell in own)}
    written = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=100)
    if not file.is_file() or file.read_text(encoding="utf-8") != written:
        runs.write_text(file, written, shared=True)


def _heading(asked: Study) -> list[str]:
    lines = [f"Study      {asked.name}"]
    others = [each for each in (*asked.tiers, schema.WHOLE) if each != asked.tier]
    lines += [f"Tier       {asked.tier}; also {', '.join(others)}"] if others else []
    lines += [f"Question   {' '.join(asked.question.split())}"] if asked.question else []
    lines += [f"Prediction {' '.join(asked.prediction.split())}"] if asked.prediction else []
    return lines


def _dry_run(work: Work, ledger: Ledger, wanted: Sequence[Cell], where: Where) -> int:
    """Print every run, what is done, what would run, and how long it would take."""
    plan, asked = work.plan, work.plan.study
    print("\n".join([*_heading(asked), ""]))
    left, states = [], Counter[str]()
    for cell in wanted:
        status = ledger.status(cell)
        text = STATES[status.state]
        if status.state == "failed" and ledger.to_do(cell):
            text = "to do, retry after: "
            text += status.reason
        elif status.reason:
            text += f": {status.reason}"
        if ledger.to_do(cell, status):
            left.append((cell, ledger.epochs(cell)))
        states[status.state] += 1
        print(f"{cell.run.id}  {label(cell)}: {text}")
    for experiment in plan.experiments:
        for name, reason in experiment.missing:
            print(f"{experiment.name}, {name}: not available: {reason}")
    unnamed = work.unnamed()
    left += [(cell, 0) for cell in unnamed]
    counted = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    if unnamed:
        counted += f", {len(unnamed)} in trials that are proposed once others have ended"
    print(f"\n{len(wanted) + len(unnamed)} runs: {counted or 'none'}; {len(left)} to do")
    if left:
        print(f"They take about as long as {hours.worth(left):.0f} runs of the method none")
    if asked.tune is not None:
        print("The winners' runs on fresh seeds are added once the search has found them.")
    if any(experiment.block.same for experiment in plan.experiments) and any(
        cell.run.budget == "steps" for cell, _ in left
    ):
        print(f"More runs follow: {EQUAL_BUDGETS}.")
    if not left:
        return 0
    print("\n".join(hours.lines(left, plan, ledger.root, where)))
    return 0


def where_of(command: arguments.SweepCommand, asked: Study) -> Where:
    """The executor; the command's address overrides RAY_ADDRESS, which overrides the file's.

    Raises:
        StudyError: the executor cannot do what is asked.
        NamingError: the time limit is no duration.
    """
    address = command.address
    if not address and command.executor == "ray":
        address = os.environ.get("RAY_ADDRESS", "") or asked.address
    workers = command.workers or asked.workers
    limit = limit_of(command.time_limit)
    where = Where(command.executor, "" if address == "local" else address, workers, limit)
    executors.check(asked, where)
    return where


def _run(work: Work, ledger: Ledger, data_root: Path, where: Where) -> Outcomes:
    """Run the rounds of the study."""
    asked = work.plan.study
    options = Options(
        device="",
        data_root=data_root,
        allow_unverified=asked.allow_unverified,
        memory_gib=asked.memory_gib,
        checkpoint_every=asked.checkpoint_every,
    )

    def begin(wanted: Sequence[Cell]) -> None:
        # augbench data show describes the others; reading all of them would take long.
        read_data([cell for cell in wanted if cell.benchmark.path], ledger, options)
        _, gpu = capacity.takes(asked, capacity.gpus())
        device = "cuda" if gpu and capacity.gpus() else "cpu"
        firstlook.look(wanted, ledger, options, device, fetch=not where.address)

    return executors.carry_out(work, ledger, options, where, begin)


def _told(
    plan: Plan,
    work: Work,
    ledger: Ledger,
    outcomes: Outcomes,
    verbose: bool,
    shard: Shard | None,
) -> int:
    """Print the results and the failures; return the exit code."""
    wanted = work.cells()
    absent = Counter(each for each in outcomes.values() if isinstance(each, Problem) and each.data)
    others = {name: each for name, each in outcomes.items() if each not in absent}
    problems = results.problems_of(others)
    statuses = {cell.run.id: ledger.status(cell) for cell in wanted}
    print("\n".join(_heading(plan.study)))
    if shard is not None:
        print(f"\n{shard.told(len(wanted))}")
    elif work.searches:
        _print_searches(work, ledger.root)
    else:
        _print_tables(work, problems, verbose)
        if plan.study.family:
            told = f"augbench report {shlex.quote(str(ledger.root))} --out report"
            print(f"\nVerdicts of the study's own {len(plan.study.family)} comparisons: {told}")
    bad = [
        (label(cell), problems.get(cell.run.id) or statuses[cell.run.id].reason)
        for cell in wanted
        if cell.run.id in problems or statuses[cell.run.id].state == "failed"
    ]
    missing = [
        (f"{t.name}, {name}", reason) for t in plan.experiments for name, reason in t.missing
    ]
    bad += [(f"{each.data}, {count(left, 'run')}", each.text) for each, left in absent.items()]
    print(f"\nResults: {ledger.root}")
    memory = _memory(wanted, ledger)
    if memory:
        print(memory)
    counts = Counter(status.state for status in statuses.values())
    listed = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
    print(f"Runs: {listed}", file=sys.stderr)
    for name, reason in [*bad, *missing]:
        print(f"not done: {name}: {reason}", file=sys.stderr)
    if any(statuses[cell.run.id].state == "failed" for cell in wanted):
        print("Run failed runs again with --retry-failed.", file=sys.stderr)
    return FAILURE if bad or missing else 0


def _memory(wanted: Sequence[Cell], ledger: Ledger) -> str:
    """The GPU memory that a run needs; empty on a CPU."""
    peaks = []
    for cell in wanted:
        result = runs.read_result(ledger.folder(cell)) or {}
        if result.get("status") == "done" and result["device"]["type"] == "cuda":
            peaks.append(result["cost"]["memory_mib"])
    return f"GPU memory per run: at most {max(peaks):,.0f} MiB" if peaks else ""


def _print_tables(work: Work, problems: dict[str, str], verbose: bool) -> None:
    shown = results.tables_of(work, problems)
    if len(shown) > MOST_TABLES:
        names = "\n".join(f"  {experiment.name}" for experiment, _ in shown)
        print(f"\n{len(shown)} tables; print one with --only NAME:\n{names}")
        return
    for _, read in shown:
        study = work.plan.study
        told = comparison.as_text(read, "last", study.margin, verbose, study.labelled())
        print(f"\n{told}")


def _print_searches(work: Work, root: Path) -> None:
    """Print the chosen values and their gain on fresh seeds; write all of it to search.json."""
    kept, read = [], work.outcomes()
    for each, outcomes, budget in zip(work.searches, read, work.budgets(read), strict=True):
        found = rounds.record(each, outcomes, budget)
        found["fresh"] = []
        kept.append(found)
        states = Counter(one.state for one in outcomes)
        counted = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
        print(f"\n{each.name}\n  {len(outcomes)} trials: {counted}; {found['passes']:,} passes")
        if not each.ended(outcomes):
            print("  not all trials have finished: nothing is chosen yet")
            continue
        best = search.winner(outcomes)
        if best is None:
            print("  no trial is complete: nothing is chosen")
            continue
        regret = found["regret"]
        given = "n/a, one trial is complete" if math.isnan(regret) else f"{regret:.4f}"
        print(f"  chosen: trial {best.number}, {sentences.settings(best.values)}")
        print(f"  select {each.tune.metric} {best.score:.4f}; regret on test {given}")
        compared = [("chosen against as written", best.values)]
        cheap = None if budget is None else search.winner(search.within(outcomes, budget))
        if budget is None:
            print("  at equal passes: not yet, another row has unfinished trials")
        elif cheap is not None and cheap.values != best.values:
            print(f"  at equal passes: trial {cheap.number}, {sentences.settings(cheap.values)}")
            compared.append(("at equal passes against as written", cheap.values))
        for name, values in compared:
            line, kept_line = _fresh(each, values, root)
            print(f"  {name}: {line}")
            found["fresh"].append({"what": name, **kept_line})
    folder = root / STUDIES / work.plan.study.name
    runs.write_text(folder / "search.json", runs.to_json(kept) + "\n", shared=True)
    print(f"\nSearch: {folder / 'search.json'}")


def _fresh(each: RowSearch, values: search.Values, root: Path) -> tuple[str, dict[str, Any]]:
    """A setting compared with the row as written, on seeds that the search has not seen."""
    if not values:
        return "the row as written won", {"difference": 0.0}
    read = [
        records.read(
            runs.folder_of(root, cell.run)
            for cell in search.finals(each.experiment, each.row, setting, each.tune)
        )
        for setting in (values, {})
    ]
    ours, theirs = (
        differences.RowRuns(name, "none", tuple(found))
        for name, found in zip(("chosen", "as written"), read, strict=True)
    )
    metric = each.tune.metric
    found = differences.difference(ours, theirs, metric)
    if found is None:
        return "no run on fresh seeds has ended", {"difference": math.nan}
    text = f"{found.estimate:+.2f} points of test {metric} over {found.seeds} fresh seeds"
    kept: dict[str, Any] = {"difference": found.estimate, "seeds": found.seeds}
    if found.interval is not None:
        text += f", 95 % CI {bounds(found.interval)}{' (few seeds)' if found.few else ''}"
    for name, interval in (("training", found.training), ("population", found.population)):
        if interval is not None:
            kept[name] = [interval.low, interval.high]
    return text, kept
