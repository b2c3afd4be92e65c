"""The cells of a comparison, made from what a user writes."""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal, cast, get_args

import methods
from analysis import facts, runs
from analysis.facts import column_key
from analysis.runs import Run, Training
from benchmarks.data.elsewhere import rows_from, version_of
from benchmarks.data.names import Benchmark, canonical, parse_benchmark
from benchmarks.data.splits import Control, Protocol
from benchmarks.training import models, precision
from methods.naming import Call, NamingError, call_of, parse, render, split, unknown

DIRTY = "dirty"
"""``method@dirty``: its meta rows have the label noise of the training rows."""


CORRUPTIONS = "corruptions"
"""In what is recorded with a cell: the set of corruptions that it is to be evaluated on."""


def corruptions_of(recorded: Mapping[str, Any]) -> str:
    """The set of corruptions in what was recorded with a cell; empty if there is none."""
    return recorded.get(CORRUPTIONS, "")


@dataclass(frozen=True)
class Cell:
    """A run, with what is needed to execute and to show it."""

    run: Run
    benchmark: Benchmark
    recorded: dict[str, Any]
    """Stored in run.json with the cell, not hashed."""

    @property
    def corruptions(self) -> str:
        """The set of corruptions that the run is to be evaluated on; empty if there is none."""
        return corruptions_of(self.recorded)


@dataclass(frozen=True)
class Row:
    """A row of a table, without a seed: a method, the rows it trains on, its budget."""

    method: str
    control: Control = "all"
    dirty: bool = False
    budget: str = "steps"
    epochs: int = 0
    """0: as in the training preset"""
    detail: str = ""
    """how the number of epochs was derived"""
    of: str = ""
    """id, at seed 0, of the run that sets the budget"""

    @property
    def name(self) -> str:
        """Its name in tables, without the budget."""
        dirty = f"@{DIRTY}" if self.dirty else ""
        control = "" if self.control == "all" else f"@{self.control}"
        return f"{self.method}{control}{dirty}"

    @property
    def needs_meta(self) -> bool:
        """Whether the method learns from meta rows."""
        return "meta" in methods.build(self.method).requires()


def parse_row(text: str, protocol: Protocol) -> Row:
    """``method`` or ``method@train``, ``@train+meta``, ``@meta``, ``@dirty``.

    Raises:
        NamingError: an unknown method or control, or a control that does not apply.
    """
    name, *rest = split(text, "@") or [""]
    if not name or text.strip().startswith("@"):
        raise NamingError(f"method: expected a name such as none or mixup@train, got {text!r}")
    method = methods.canonical(name)
    control = rest[0].replace(" ", "") if rest else "all"
    needs_meta = "meta" in methods.build(method).requires()
    known = [*get_args(Control)[1:], DIRTY]
    if len(rest) > 1 or control not in (*known, "all"):
        raise unknown("control row", "@".join(rest), known)
    if control == DIRTY:
        if not needs_meta:
            raise NamingError(f"{text}: {method} learns from no meta rows, so none can be dirty")
        return Row(method, "all", dirty=True)
    if control != "all" and needs_meta:
        raise NamingError(
            f"{text}: control rows are for methods without meta rows, but {method} needs them"
        )
    # These name the same labelled rows as the method alone.
    alias = "train" if protocol.name == "paper" else "train+meta"
    return Row(method, "all" if control == alias else cast("Control", control))


def row_name(text: str) -> str:
    """The name of the row that a text such as ``mixup(alpha=0.2)@train`` means.

    Raises:
        NamingError: the method is unknown, or cannot be built with these arguments.
    """
    method, control, budget = runs.row_parts(text)
    kind, of, costly = budget.partition(" of ")
    try:
        budget = kind + of + (methods.canonical(costly) if costly else "")
        return runs.row_name(methods.canonical(method), control, budget)
    except methods.Unavailable:  # its row in the table gives the reason
        return text


def label_key(text: str) -> str:
    """The row or data set that a key of ``labels`` means, spelled as in tables.

    Raises:
        NamingError: it is neither a benchmark nor a row.
    """
    try:
        benchmark = parse_benchmark(text)
    except NamingError:
        return row_name(text)
    return column_key(canonical(benchmark), benchmark.path)


def model_name(text: str, width: float | None) -> str:
    """The canonical model, with ``--width`` applied."""
    if width is None:
        return models.canonical(text)
    if not models.takes_width(text):
        raise NamingError(f"width: expected none with the network {text!r}, got {width}")
    call = parse(text)
    if not isinstance(call, Call) or "width" in dict(call.arguments):
        raise NamingError(f"width: expected it once, as --width or in the model, got {text!r}")
    return models.canonical(render(call_of(call.name, {**dict(call.arguments), "width": width})))


def control_rows(
    rows: Iterable[Row], benchmark: Benchmark, protocol: Protocol, learning: bool = True
) -> list[Row]:
    """The control rows that design and protocol require in addition to ``rows``, each once.

    For a method that needs meta rows, over an upstream U: ``U@train`` (the pool without the meta
    rows; under ``paper`` U itself) and under ``paper`` ``U@train+meta``; on corrupted labels
    ``U@meta`` and the method with dirty meta rows. With ``learning`` also the rows that a method
    declares, which take its learning away.
    """
    found: list[Row] = []
    for row in rows:
        if learning:
            found += map(Row, methods.controls_of(row.method))
        if not row.needs_meta:
            continue
        upstream = upstream_of(row.method)
        wanted = [Row(upstream)]
        if protocol.name == "equal":
            wanted.append(Row(upstream, "train"))
        else:
            wanted.append(Row(upstream, "train+meta"))
        if benchmark.corrupts:
            wanted.append(Row(upstream, "meta"))
        if benchmark.noise > 0 and benchmark.meta_noise != benchmark.noise:
            wanted.append(replace(row, dirty=True))
        found += wanted
    return [row for row in dict.fromkeys(found) if row not in rows]


def upstream_of(method: str) -> str:
    """The canonical upstream of a canonical method: its ``upstream`` argument, or ``none``.

    For a control around the method that it controls, or around one that learns from meta rows, it
    is the upstream of that method.
    """
    expression = parse(method)
    given = dict(expression.arguments) if isinstance(expression, Call) else {}
    upstream = given.get("upstream")
    if upstream is None:
        return "none"
    name = methods.canonical(render(upstream))
    around = _controls_upstream(method) or Row(name).needs_meta
    return upstream_of(name) if around else name


def _controls_upstream(method: str) -> bool:
    """Whether a method is a control that is put around the method that it controls."""
    expression = parse(method)
    given = dict(expression.arguments) if isinstance(expression, Call) else {}
    inner = given.get("upstream")
    return inner is not None and method in methods.controls_of(render(inner))


def make_cell(
    row: Row,
    benchmark: Benchmark,
    model: str,
    training: Training,
    protocol: Protocol,
    seed: int,
    *,
    checksum: str,
    threads: int = 1,
    oracle_test: bool = False,
    preset: str = "",
) -> Cell:
    """The cell of one row and seed; ``model`` is canonical."""
    method = methods.build(row.method)
    needs_meta = "meta" in method.requires()
    if row.dirty and benchmark.noise == 0:
        raise NamingError(
            f"{row.method}@{DIRTY}: {canonical(benchmark)} has no noise for its meta rows"
        )
    if row.dirty:
        benchmark = replace(benchmark, meta_noise=benchmark.noise)
    if row.epochs:
        training = replace(training, epochs=row.epochs)
    versions = {
        "trainer": runs.VERSION,
        "model": models.version_of(model),
        **methods.versions(row.method),
    }
    source = rows_from(method, benchmark.name)
    if source:
        versions["rows_from"] = version_of(source)
    # Only what affects a result is part of the id: these rows are the pool, however it is split.
    plain = row.control == "all" and not needs_meta and not benchmark.corrupts
    if protocol.name == "paper" or plain:
        protocol = Protocol(name=protocol.name)
    run = Run(
        benchmark=canonical(benchmark),
        data=checksum,
        model=model,
        method=row.method,
        control=row.control,
        protocol=protocol.name,
        meta_fraction=protocol.meta_fraction,
        crossfit=protocol.crossfit,
        training=training,
        seed=seed,
        threads=threads,
        budget=row.budget,
        oracle_test=oracle_test,
        versions=versions,
    )
    told = facts.facts_of(
        run,
        methods.takes_upstream,
        method.control,
        needs_meta,
        methods.controls_of(row.method),
        methods.label(row.method),
    )
    recorded = {
        "preset": preset,
        "path": benchmark.path,
        "budget": row.detail,
        "of": row.of,
        **({"rows_from": source} if source else {}),
        facts.ROW: asdict(told),  # type: ignore[call-overload]
    }
    if benchmark.unlabelled:
        recorded["unlabelled"] = benchmark.unlabelled
    return Cell(run, benchmark, recorded)


def cheaper_than(method: str, rows: Container[str]) -> str:
    """What gets the passes or time of a canonical method: of these rows the method without its
    extras, else its upstream, else ``none``.
    """
    expression, extras = parse(method), methods.build(method).extras
    if extras and isinstance(expression, Call):
        kept = {name: value for name, value in expression.arguments if name not in extras}
        bare = methods.canonical(render(call_of(expression.name, kept)))
        if bare != method and bare in rows:
            return bare
    upstream = upstream_of(method)
    return upstream if upstream in rows else "none"


def equal_budget_names(rows: Iterable[Row], kind: str) -> list[str]:
    """The names that the equal-budget rows for ``rows`` may have."""
    plain = {row.method for row in rows if row.control == "all" and not row.dirty}
    found = []
    for method in plain:
        upstream = cheaper_than(method, plain)
        if upstream in plain - {method} and not _controls_upstream(method):
            found.append(runs.row_name(upstream, budget=f"{kind} of {method}"))
    return found


Taken = Sequence[tuple[Run, dict[str, Any]]]
"""Equal-budget runs, and what was recorded with them."""


def equal_budgets_in(root: Path) -> Taken:
    """The equal-budget runs in a results folder."""
    found = []
    for folder in runs.folders(root):
        try:
            # most runs have none, and reading a whole run takes ten times as long
            if json.loads((folder / "run.json").read_bytes())["run"]["budget"] != "steps":
                found.append(runs.read_run(folder))
        except runs.UNREADABLE:
            continue
    return found


def equal_budget_rows(
    cells: Iterable[Cell],
    root: Path,
    kind: Literal["passes", "time"],
    taken: Taken | None = None,
) -> list[Row]:
    """For each method that costs more than its upstream (``cheaper_than``), that one with as many
    passes or as much time: an explicit number of epochs, computed once and then read back from
    disk.

    Only finished runs count; no cell may have dirty meta rows. Control rows, controls of a method
    and rows of another budget get none. ``taken``: the equal-budget runs in ``root``, if the
    caller has read them.
    """
    plain = {
        (cell.run.method, cell.run.seed): cell
        for cell in cells
        if cell.run.control == "all" and cell.run.budget == "steps"
    }
    costs: dict[str, dict[int, float]] = {}
    hardware = ""
    for (method, seed), cell in plain.items():
        result = runs.read_result(runs.folder_of(root, cell.run))
        if result is not None and result["status"] == "done":
            cost = result["cost"]
            value = cost["passes_per_row"] if kind == "passes" else cost["seconds_per_epoch"]
            costs.setdefault(method, {})[seed] = value
            hardware = result["device"]["name"]
    taken = equal_budgets_in(root) if taken is None else taken
    rows: list[Row] = []
    for method, own in costs.items():
        upstream = cheaper_than(method, costs)
        seeds = sorted(own.keys() & costs.get(upstream, {}).keys())
        if method == upstream or not seeds or _controls_upstream(method):
            continue
        budget = f"{kind} of {method}"
        baseline = plain[upstream, seeds[0]].run
        base = baseline.training.epochs
        costly = plain[method, seeds[0]].run
        of = replace(costly, seed=0, oracle_test=False).id
        epochs, detail = _taken_before(baseline, budget, of, taken)
        if not epochs:
            ratio = median(own[seed] / costs[upstream][seed] for seed in seeds)
            ratio = round(ratio, 1) if kind == "time" else ratio
            epochs = round(base * ratio)
            detail = f"ratio {ratio:.3g} of {kind} over {len(seeds)} seeds on {hardware}"
        if epochs > base:
            rows.append(Row(upstream, budget=budget, epochs=epochs, detail=detail, of=of))
    return rows


def _taken_before(baseline: Run, budget: str, of: str, taken: Taken) -> tuple[int, str]:
    """Epochs and detail of an earlier run with this budget, otherwise as ``baseline``; or 0.

    ``of`` is the id, at seed 0, of the run that sets the budget.
    """

    def setting(each: Run) -> str:
        kept = asdict(each)  # type: ignore[call-overload]
        for name in ("seed", "budget", "oracle_test"):
            del kept[name]
        del kept["training"]["epochs"]
        return json.dumps(kept, sort_keys=True)

    for other, recorded in taken:
        same = other.budget == budget and setting(other) == setting(baseline)
        if same and recorded.get("of") == of:
            return other.training.epochs, recorded["budget"]
    return 0, ""


def training_of(preset: str, overrides: dict[str, Any]) -> Training:
    """A preset, overridden by the given fields; precision "auto" becomes that of this machine.

    Raises:
        NamingError: an unknown preset, or a value that is not allowed.
    """
    if preset not in runs.PRESETS:
        raise unknown("preset", preset, runs.PRESETS)
    base = asdict(runs.PRESETS[preset][1])  # type: ignore[call-overload]
    if overrides.get("precision") == "auto":
        overrides = {**overrides, "precision": precision.automatic()}
    try:
        made = Training(**{**base, **overrides})
    except ValueError as error:
        raise NamingError(plain(error)) from error
    unused = set() if made.optimizer == "sgd" else {"momentum"}
    if made.schedule != "multistep":
        unused |= {"milestones", "gamma"}
    defaults = asdict(Training())  # type: ignore[call-overload]
    return replace(made, **{name: defaults[name] for name in unused})


def plain(error: ValueError) -> str:
    """The message of a pydantic error, without what surrounds it."""
    listed = getattr(error, "errors", None)
    if listed is None:
        return str(error)
    texts = []
    for each in listed():
        field = ".".join(str(part) for part in each["loc"])
        text = each["msg"].removeprefix("Value error, ")
        texts.append(f"{field}: {text}, got {each['input']!r}" if field else text)
    return "; ".join(texts)
