"""Runs read back from disk, for tables and statistics. Needs neither torch nor ray."""

from __future__ import annotations

import csv
import io
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from zipfile import BadZipFile

import numpy as np

from analysis import corrupted, metrics, runs
from analysis.facts import Facts, facts_in
from analysis.runs import Run

if TYPE_CHECKING:
    from pandas import DataFrame


class Damaged(OSError):
    """A file of a run that cannot be read."""

    def __init__(self, folder: Path, name: str, error: Exception) -> None:
        self.folder, self.reason = folder, f"{name} cannot be read ({first_line(error)})"
        super().__init__(f"{folder}: {self.reason}; repeat the run")


UNREADABLE = (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile, zlib.error)
"""What reading a damaged file raises."""


class Items(NamedTuple):
    """What a records file keeps of the predictions of a run."""

    right: np.ndarray
    """(N,) whether each test row is predicted correctly at the last epoch"""
    targets: np.ndarray
    """(N,) classes of the test rows"""
    groups: np.ndarray | None
    """(N,) their patients, if known"""


@dataclass(frozen=True)
class Record:
    """A run that has ended: its cell, its result and the folder of its files."""

    run: Run
    recorded: dict[str, Any]
    result: dict[str, Any]
    folder: Path
    origin: str = ""
    """the file or folder that it was joined from; empty for the runs that a table is about"""
    filed: bool = False
    """whether it comes from a records file, which has no predictions"""
    items: Items | None = None
    """of a run from a records file; None with several labels per row"""

    @property
    def done(self) -> bool:
        """Whether it has metrics."""
        return self.result["status"] == "done"

    @property
    def searched(self) -> bool:
        """Whether it is a trial of a search or its winner, which no table mixes with other rows."""
        return "searched" in self.recorded

    @cached_property
    def facts(self) -> Facts:
        """What kind of row it belongs to."""
        return facts_in(self.run, self.recorded, self.result)

    def compares(self, metric: str, when: str = "last") -> bool:
        """Whether it has values of single test rows of this metric, to be paired with others."""
        return not self.filed or (
            self.items is not None and metric == "accuracy" and when == "last"
        )

    @cached_property
    def predictions(self) -> dict[str, np.ndarray]:
        """Logits (N, C) and targets, read once.

        Raises:
            Damaged: the file is missing or damaged; the message names it.
        """
        try:
            arrays = runs.read_arrays(self.folder / "predictions.npz")
            for when, splits in self.result["metrics"].items():
                for split in splits:
                    logits, targets = arrays[f"{split}_{when}_logits"], arrays[f"{split}_targets"]
                    if logits.ndim != 2 or len(logits) != len(targets):
                        raise ValueError(f"{split}: logits {logits.shape}, {len(targets)} targets")
                    if not np.isfinite(logits).all():
                        raise ValueError(f"{split}: logits that are not finite")
            groups, rows = arrays.get("test_groups"), len(arrays["test_targets"])
            if groups is not None and groups.shape != (rows,):
                raise ValueError(f"test: groups {groups.shape}, {rows} targets")
        except UNREADABLE as error:
            raise Damaged(self.folder, "predictions.npz", error) from error
        return arrays

    def forget(self) -> None:
        """Free the memory of the predictions; they are read again when needed."""
        self.__dict__.pop("predictions", None)

    def metric(self, name: str, split: str = "test", when: str = "last") -> float:
        """A metric of the stored result; nan where it is undefined or the epoch unavailable.

        Those on corrupted images (``metrics.ON_CORRUPTED``) are of test and the last epoch.
        """
        if name in metrics.ON_CORRUPTED:
            there = (split, when) == ("test", "last")
            return corrupted.value(self.result, name) if there else math.nan
        values = self.result["metrics"].get(when, {}).get(split, {})
        if name in metrics.FURTHER and values and not self.filed:
            values = self._further(split, when)
        value = values.get(name)
        return float("nan") if value is None else float(value)

    def _further(self, split: str, when: str) -> dict[str, float]:
        """The metrics that are not stored, computed once; predictions are kept if they were."""
        known: dict[tuple[str, str], dict[str, float]] = self.__dict__.setdefault("further", {})
        if (split, when) not in known:
            read = "predictions" in self.__dict__
            logits = self.predictions[f"{split}_{when}_logits"]
            targets = self.predictions[f"{split}_targets"]
            known[split, when] = metrics.further(logits, targets, self.kind)
            if not read:
                self.forget()
        return known[split, when]

    def detection(self, name: str) -> float:
        """How well wrong labels were found (``metrics.detection``); nan if not measured."""
        value = self.result.get("detection", {}).get(name)
        return float("nan") if value is None else float(value)

    def logged(self, name: str) -> float:
        """Mean over epochs of a value that the method logged; nan if it logged none.

        Epochs without the value, such as a warm-up, are left out.
        """
        values = [line["log"][name] for line in self.lines if name in line.get("log", {})]
        return float(np.mean(values)) if values else math.nan

    @cached_property
    def lines(self) -> list[dict[str, Any]]:
        """metrics.jsonl, one line per epoch; empty if the file does not exist."""
        return self.lines_of("metrics.jsonl")

    def lines_of(self, name: str) -> list[dict[str, Any]]:
        """The objects of a .jsonl file; empty if it does not exist.

        Raises:
            Damaged: the file is damaged.
        """
        path = self.folder / name
        try:
            return runs.read_lines(path) if path.is_file() else []
        except UNREADABLE as error:
            raise Damaged(self.folder, name, error) from error

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """The arrays of a .npz file; empty if it does not exist.

        Raises:
            Damaged: the file is damaged.
        """
        path = self.folder / name
        try:
            return runs.read_arrays(path) if path.is_file() else {}
        except UNREADABLE as error:
            raise Damaged(self.folder, name, error) from error

    def item_values(self, name: str, when: str = "last") -> np.ndarray:
        """(N,) values of the test rows whose mean is the metric."""
        if self.items is not None:
            return self.items.right.astype(float)
        logits = self.predictions[f"test_{when}_logits"]
        if name in metrics.ON_CORRUPTED:
            arrays, targets = self.arrays(corrupted.FILE), self.predictions["test_targets"]
            try:
                return corrupted.item_values(arrays, self.result, logits, targets, name)
            except UNREADABLE as error:
                raise Damaged(self.folder, corrupted.FILE, error) from error
        return metrics.item_values(logits, self.predictions["test_targets"], self.kind, name)

    @property
    def targets(self) -> np.ndarray:
        """(N,) classes of the test rows, or (N, K) labels."""
        return self.predictions["test_targets"] if self.items is None else self.items.targets

    @property
    def groups(self) -> np.ndarray | None:
        """(N,) patients of the test rows; None if unknown."""
        if self.items is not None:
            return self.items.groups
        return self.predictions.get("test_groups")

    @property
    def folds(self) -> int:
        """Folds of a repeated cross-validation, one per seed; 0 on the official split."""
        return self.result["data"].get("folds", 0)

    @property
    def patients(self) -> int:
        """Groups of test rows, such as patients; 0 if unknown."""
        return self.result["data"].get("groups", {}).get("test", 0)

    @property
    def kind(self) -> str:
        """The kind of task, as MedMNIST calls it."""
        return self.result["data"]["kind"]

    @property
    def leads(self) -> str:
        """The metric of differences, verdicts and figures on its data set."""
        return self.result.get("data", {}).get("leads", metrics.HEADLINE)

    @property
    def selecting(self) -> tuple[str, str]:
        """The metric on the select split by which epochs are chosen, and its name."""
        return metrics.selecting(self.kind)


def leading(records: Iterable[Record]) -> str:
    """The metric that leads on the data set of these runs; those without a result do not say it."""
    told = (record.leads for record in records)
    return next((name for name in told if name != metrics.HEADLINE), metrics.HEADLINE)


def read(folders: Iterable[Path]) -> list[Record]:
    """The records of these run directories; runs that have not ended are left out."""
    records = []
    for folder in folders:
        result = runs.read_result(folder)
        if result is not None:
            run, recorded = runs.read_run(folder)
            records.append(Record(run, recorded, result, folder))
    return records


class Unread(NamedTuple):
    """A run directory without a readable result, the reason, and its cell if that is known."""

    folder: Path
    reason: str
    run: Run | None = None
    state: Literal["interrupted", "unreadable", "copy"] = "unreadable"
    recorded: Mapping[str, Any] = MappingProxyType({})


def scan(root: Path) -> tuple[list[Record], list[Unread]]:
    """The records of every run directory below ``root``, and the directories without a record.

    A directory is named by its run's id; copies under other names are left out.
    """
    found: list[Record] = []
    unread: list[Unread] = []
    for folder in runs.folders(root):
        try:
            own = read([folder])
        except UNREADABLE as error:
            reason = f"run.json is not a run of this version ({first_line(error)})"
            unread.append(Unread(folder, reason))
            continue
        if not own:
            unread.append(_unended(folder))
        elif lacking := missing(own[0]):
            reason = f"result.json is not a result of this version ({lacking} is missing)"
            unread.append(Unread(folder, reason, own[0].run, recorded=own[0].recorded))
        else:
            found += own
    return _without_copies(found, unread)


def _without_copies(found: list[Record], unread: list[Unread]) -> tuple[list[Record], list[Unread]]:
    """Each run once, from the directory named by its id if there is one."""
    kept: dict[str, Path] = {}
    named = [(each.run, each.folder) for each in (*found, *unread) if each.run is not None]
    for run, folder in sorted(named, key=lambda each: each[1].name != each[0].id):
        kept.setdefault(run.id, folder)

    def copied(run: Run | None, folder: Path) -> bool:
        return run is not None and kept[run.id] != folder

    told = [
        each._replace(reason=f"a copy of {kept[each.run.id].name}", state="copy")
        if each.run is not None and copied(each.run, each.folder)
        else each
        for each in unread
    ]
    own = [each for each in found if not copied(each.run, each.folder)]
    told += [
        Unread(each.folder, f"a copy of {kept[each.run.id].name}", each.run, "copy", each.recorded)
        for each in found
        if copied(each.run, each.folder)
    ]
    return own, told


STATES = ("done", "failed", "skipped", "stopped")
NEEDED = (
    *(("metrics", "last", "test", name) for name in ("accuracy", "auc", "recall")),
    *(
        ("cost", name)
        for name in ("epochs", "charged_seconds", "evaluation_seconds", "phases",
                     "seconds_per_epoch", "passes_per_row")
    ),
    *(("device", name) for name in ("type", "name")),
    *(("data", "rows", name) for name in ("select", "test")),
    *(
        ("data", name)
        for name in ("kind", "classes", "corruption", "caveats", "notes", "verified")
    ),
)  # fmt: skip
"""What tables and figures read from the result of a run that is done."""


def missing(record: Record) -> str:
    """The first thing that a result lacks; empty if it is complete."""
    if record.result.get("status") not in STATES:
        return "status"
    for path in NEEDED if record.done else ():
        value: Any = record.result
        for name in path:
            if not isinstance(value, dict) or name not in value:
                return ".".join(path)
            value = value[name]
    return ""


def _unended(folder: Path) -> Unread:
    try:
        run, recorded = runs.read_run(folder)
    except UNREADABLE:
        run, recorded = None, {}
    if (folder / "result.json").exists():
        return Unread(
            folder, "result.json, or a file that it names, is incomplete", run, recorded=recorded
        )
    if run is None:
        return Unread(folder, "unfinished")
    lines = folder / "metrics.jsonl"
    ended = lines.read_text(encoding="utf-8").count("\n") if lines.is_file() else 0
    reason = f"unfinished ({ended} of {run.training.epochs} epochs)"
    return Unread(folder, reason, run, "interrupted", recorded)


def first_line(error: Exception) -> str:
    """The type of an error and the first line of its message."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def recomputed(record: Record) -> Record:
    """The record with metrics recomputed from the stored logits."""
    if not record.done or record.filed:
        return record
    arrays, made = record.predictions, {}
    for when in record.result["metrics"]:
        made[when] = {
            split: metrics.evaluate(
                arrays[f"{split}_{when}_logits"], arrays[f"{split}_targets"], record.kind
            )
            for split in record.result["metrics"][when]
        }
    result = {**record.result, "metrics": runs.with_nan(made)}
    if corrupted.KEY in result:
        logits = record.arrays(corrupted.FILE)
        result[corrupted.KEY] = corrupted.rescored(result, logits, arrays["test_targets"])
    record.forget()
    return replace(record, result=result)


def frame(records: Sequence[Record]) -> DataFrame:
    """One line per metric of each run; a run without metrics has one line, with its reason.

    ``when`` is last or selected, ``split`` select or test, ``class`` the class of a recall and -1
    for other metrics. Cost and versions are repeated in every line of their run. Of a run that was
    evaluated on corrupted test images, ``corruptions`` names the set of the means over them
    (``metrics.ON_CORRUPTED``), and further splits, such as "common:pixelate:3", are the test images
    under one corruption at one severity.
    """
    import pandas as pd  # noqa: PLC0415 - takes half a second that a comparison does not need

    cells = pd.DataFrame([_cell(record) for record in records])
    for name in cells.columns:
        if cells[name].dtype == object or isinstance(cells[name].dtype, pd.StringDtype):
            cells[name] = cells[name].astype("category")
    lines = [(place, *line) for place, each in enumerate(records) for line in _lines(each)]
    names = ["place", "when", "split", "metric", "class", "value"]
    long = pd.DataFrame(lines, columns=names)
    for name in ("when", "split", "metric"):
        long[name] = long[name].astype("category")
    long["class"] = long["class"].astype("int16")
    wide = cells.take(long.pop("place").to_numpy()).reset_index(drop=True)
    return pd.concat([wide, long], axis=1)


def _cell(record: Record) -> dict[str, Any]:
    run, result = record.run, record.result
    cost, device = result.get("cost", {}), result.get("device", {})
    rows = result.get("data", {}).get("rows", {})
    libraries = result.get("versions", {})
    cell = {
        "id": run.id,
        "benchmark": run.benchmark,
        "data": run.data,
        "model": run.model,
        "row": run.row,
        "method": run.method,
        "control": run.control,
        "protocol": run.protocol,
        "meta_fraction": run.meta_fraction,
        "crossfit": run.crossfit,
        "budget": run.budget,
        "searched": runs.to_json(record.recorded["searched"]) if record.searched else "",
        "oracle_test": run.oracle_test,
        "seed": run.seed,
        "threads": run.threads,
        **{name: _plain(getattr(run.training, name)) for name in TRAINING},
        "code": runs.to_json(run.versions),
        "status": result["status"],
        "reason": result.get("reason", ""),
        "corruptions": corrupted.set_of(result),
        "train_rows": rows.get("train", 0),
        "meta_rows": rows.get("meta", 0),
        "select_rows": rows.get("select", 0),
        "test_rows": rows.get("test", 0),
        "device": device.get("type", ""),
        "hardware": device.get("name", ""),
        "augbench": libraries.get("augbench", ""),
        "torch": libraries.get("torch", ""),
        "charged_seconds": cost.get("charged_seconds", math.nan),
        "seconds_per_epoch": cost.get("seconds_per_epoch", math.nan),
        "passes_per_row": cost.get("passes_per_row", math.nan),
        "memory_mib": cost.get("memory_mib", math.nan),
        **{name: record.detection(name) for name in DETECTION},
    }
    # File names may contain bytes that are not UTF-8, which Python keeps as surrogates.
    return {
        key: value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value
        for key, value in cell.items()
    }


def _plain(value: Any) -> Any:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else value


def _lines(record: Record) -> Iterator[tuple[str, str, str, int, float]]:
    """when, split, metric, class and value of each metric of a run."""
    if not record.done:
        yield "", "", "", -1, math.nan
        return
    for when, splits in record.result["metrics"].items():
        for split, values in splits.items():
            for name, value in values.items():
                each = value if isinstance(value, list) else [value]
                first = 0 if isinstance(value, list) else -1
                for number, one in enumerate(each, start=first):
                    yield when, split, name, number, math.nan if one is None else float(one)
    for name in metrics.ON_CORRUPTED if corrupted.set_of(record.result) else ():
        yield "last", "test", name, -1, record.metric(name)
    for split, name, value in corrupted.lines(record.result):
        yield "last", split, name, -1, value


TRAINING = runs.field_names(runs.Training)
DETECTION = ("weight_auc", "corrected", "spoiled")
ATTACK = (
    "attack_selected",
    "attack_margin_kept",
    "attack_prediction_kept",
    "attack_unmoved",
    "attack_harder",
    "attack_distance",
    "attack_noise_distance",
)
"""What a method that adds attacked rows logs about them."""


def to_csv(rows: Iterable[tuple[str, Iterable[Record]]]) -> str:
    """CSV with one line per run, under the name of its row in the table.

    Accuracy, AUC, nll and ECE are of the test split at the last epoch, as fractions and nats;
    seconds are charged. If labels were corrupted, three more columns say how well they were found;
    if rows were attacked, seven more describe the attacks; if test images were corrupted, six more
    have the set of corruptions and the metrics on them, as fractions.
    """
    rows = [(name, list(records)) for name, records in rows]
    every = [each for _, records in rows for each in records if each.done]
    detection = DETECTION if any("detection" in each.result for each in every) else ()
    attack = ATTACK if any(not math.isnan(each.logged(ATTACK[0])) for each in every) else ()
    robust = metrics.ON_CORRUPTED if any(corrupted.set_of(each.result) for each in every) else ()
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["benchmark", "model", "protocol", "row", "seed", "id", "status", "reason", "epochs",
         "accuracy", "auc", "nll", "ece", "seconds_per_epoch", "passes_per_row",
         *detection, *attack, *(["corruptions", *robust] if robust else [])]
    )  # fmt: skip
    for name, records in rows:
        for record in records:
            run, cost = record.run, record.result.get("cost", {})
            values = [""] * (6 + len(detection) + len(attack) + len(robust) + bool(robust))
            if record.done:
                names = ("accuracy", "auc", "nll", "ece")
                values = [f"{record.metric(each):.6g}" for each in names]
                values += [f"{cost[each]:.4g}" for each in ("seconds_per_epoch", "passes_per_row")]
                found = [record.detection(each) for each in detection]
                found += [record.logged(each) for each in attack]
                values += ["" if math.isnan(value) else f"{value:.6g}" for value in found]
                scores = [record.metric(each) for each in robust]
                values += [corrupted.set_of(record.result)] if robust else []
                values += ["" if math.isnan(value) else f"{value:.6g}" for value in scores]
            ended = [record.result["status"], record.result.get("reason", "")]
            cell = [run.benchmark, run.model, run.protocol, name, run.seed, run.id]
            writer.writerow([*cell, *ended, run.training.epochs, *values])
    return text.getvalue()
