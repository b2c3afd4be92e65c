"""``records.parquet``: the runs of a report in one file, which other reports and tables can join.

It has the lines of ``records.frame``, one per metric of each run. The first line of each run also
has its cell and its result, as in ``run.json`` and ``result.json`` but with every metric, and which
test rows its last epoch predicts correctly, so that accuracy is paired by image. Logits are not in
it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis import records, runs
from analysis.metrics import FURTHER
from analysis.records import Items, Record
from analysis.runs import Run, Training
from analysis.tasks import task_named

if TYPE_CHECKING:
    from pandas import DataFrame

COLUMNS = ("run", "right", "targets", "groups")
"""What the first line of each run has beside the columns of ``records.frame``."""


def write(found: Sequence[Record], path: Path) -> None:
    """Write the runs to a Parquet file.

    Raises:
        Damaged: predictions cannot be read.
        StorageError: the file cannot be written.
    """
    frame = records.frame(found)
    first = frame.index[~frame["id"].duplicated()]
    made = [_kept(record) for record in found]
    for name in COLUMNS:
        frame[name] = None
        frame.loc[first, name] = np.array([each[name] for each in made] + [None], object)[:-1]
    runs.write_atomically(path, lambda file: _write(frame, file))


def _write(frame: DataFrame, file: Any) -> None:
    frame.to_parquet(file, compression="zstd")


def _kept(record: Record) -> dict[str, str | bytes | None]:
    if record.done and not record.filed:
        _ = record.predictions  # read once for all that follows
    cell = asdict(record.run)  # type: ignore[call-overload]
    stored = {"run": cell, "recorded": record.recorded, "result": _with_further(record)}
    made: dict[str, str | bytes | None] = {**dict.fromkeys(COLUMNS), "run": runs.to_json(stored)}
    items = _items(record)
    if items is not None:
        made["right"] = np.packbits(items.right).tobytes()
        made["targets"] = items.targets.astype("<u2").tobytes()
        if items.groups is not None:
            made["groups"] = items.groups.astype("<i8").tobytes()
    record.forget()
    return made


def _with_further(record: Record) -> dict[str, Any]:
    """The result with the metrics that are otherwise computed from predictions."""
    if not record.done or record.filed:
        return record.result
    made = {
        when: {
            split: {**values, **{name: record.metric(name, split, when) for name in FURTHER}}
            for split, values in splits.items()
        }
        for when, splits in record.result["metrics"].items()
    }
    return {**record.result, "metrics": made}


def _items(record: Record) -> Items | None:
    """None for runs without metrics, and for several labels per row."""
    if not record.done or not task_named(record.kind).exclusive or record.filed:
        return record.items
    right, targets = record.item_values("accuracy") > 0, record.targets
    return Items(right, targets, record.groups)


def read(path: Path) -> list[Record]:
    """The runs of a file that ``write`` wrote, as records without predictions.

    Raises:
        OSError: it is not such a file.
    """
    import pyarrow.parquet as pq  # noqa: PLC0415 - only where runs are joined
    from pyarrow import ArrowException  # noqa: PLC0415

    try:
        names = pq.read_schema(path).names
        if missing := [name for name in COLUMNS if name not in names]:
            raise OSError(
                f"{path}: expected a records.parquet with whole runs, got one without the column "
                f"{missing[0]!r}: it was written by an older augbench report, or by something else"
            )
        table = pq.read_table(path, columns=list(COLUMNS)).to_pylist()
        found = [_record(line, path) for line in table if line["run"] is not None]
    except (ArrowException, *records.UNREADABLE) as error:
        if isinstance(error, OSError) and str(path) in str(error):
            raise
        raise OSError(
            f"{path}: expected a records.parquet of this or an older augbench report "
            f"({records.first_line(error)})"
        ) from error
    for record in found:
        if missing := records.missing(record):
            raise OSError(f"{path}: {missing} is missing in the result of {record.run.id}")
    return found


def _record(line: dict[str, Any], path: Path) -> Record:
    stored = json.loads(line["run"])
    cell = dict(stored["run"])
    run = Run(**{**cell, "training": Training(**cell["training"])})
    result = stored["result"]
    items = None
    if line["right"] is not None:
        targets = np.frombuffer(line["targets"], "<u2").astype(np.int64)
        bits = np.unpackbits(np.frombuffer(line["right"], np.uint8), count=len(targets))
        groups = None if line["groups"] is None else np.frombuffer(line["groups"], "<i8")
        items = Items(bits.astype(bool), targets, groups)
    return Record(run, stored["recorded"], result, path / run.id, filed=True, items=items)
