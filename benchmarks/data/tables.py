"""Tables: a CSV file, a set of OpenML or one of the catalogue, its columns and what they hold."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from analysis.numbers import count
from benchmarks.data.cutting import stratified_split
from benchmarks.data.dataset import (
    MADE,
    SPLIT_SEED,
    SPLITS,
    Arrays,
    Column,
    Table,
    with_duplicates,
)
from benchmarks.data.download import DataError, md5_of
from benchmarks.data.layout import shown
from benchmarks.data.npz import replacing
from benchmarks.data.table_catalogue import TABLES, Reading, TableEntry
from methods.naming import render

if TYPE_CHECKING:
    import pandas as pd

FOLDER, OPENML = "tabular", "openml"
"""below the data folder"""
SHARES = (0.65, 0.15, 0.2)
"""of train, val and test, as SAINT's authors cut (somepago/saint)"""
MISSING = ("", "?", "na", "n/a", "nan", "null")
"""Cells that hold no value, in any case."""
MOST_CLASSES, MOST_LEVELS = 200, 100_000
UNKNOWN = -2
"""Code of categories that a table does not have."""
LARGEST = float(np.finfo(np.float32).max)
"""Networks compute in float32."""
ISO = re.compile(r"\d{4}-\d{2}-\d{2}([T ]\d{2}:\d{2}.*)?")
DATE = re.compile(r"\d{1,4}[./-]\d{1,2}[./-]\d{1,4}([T ].*)?")
NUMBER = re.compile(r"[-+]?\d+([.,]\d+)* ?%?")
"""What people take for a number: also 1,5 and 5 %."""
TOP = 1 << 16
"""Characters of a file in which its first row is looked for."""


def load_table(name: str, path: str, reading: Reading, root: Path, download: bool) -> Arrays:
    """A table as stored, split 65/15/20, stratified, the same for every run.

    Raises:
        DataError: the file or a column cannot be used; the message says what to do.
    """
    if name == OPENML:
        frame, reading, checksum = openml(reading, root, download)
        where, title, entry = f"openml:{reading.id}", f"openml:{reading.id}", None
    else:
        entry = TABLES.get(name)
        file = _file_of(entry, root) if entry else Path(path).expanduser()
        where = str(shown(file))
        frame, checksum = _frame(file, reading, entry), md5_of(file)
        title = name if entry else f"csv:{shown(file.name)}"
    if entry is not None:
        reading = reading._replace(
            target=entry.target, categorical=entry.categorical, drop=entry.drop
        )
    arrays = _arrays(frame, reading, where, title, entry)
    verified = entry is None or not entry.md5 or entry.md5 == checksum
    notes = arrays.notes
    if entry is not None:
        notes = (*notes, *_beside_paper(arrays, entry, checksum))
    made = replace(arrays, checksum=checksum, verified=verified, notes=notes)
    return with_duplicates(made, own=entry is None)


def located(entry: TableEntry, root: Path) -> Path | None:
    """The file of a table on this machine, or None if it is not there."""
    places = (place / entry.file for place in (root / FOLDER, root))
    return next((place for place in places if place.is_file()), None)


def fetched(root: Path) -> list[str]:
    """The sets of OpenML that were fetched, by the names of their benchmarks."""
    found = []
    for path in sorted((root / OPENML).glob("*.json")):
        which, _, version = path.stem.rpartition("-")
        plain = which.isdigit() or version == "1"
        found.append(f"{OPENML}:{which}{'' if plain else f'(version={version})'}")
    return found


def remembered(reading: Reading, root: Path) -> Path:
    """The file that remembers the checksum of a set of OpenML, once it is fetched."""
    return root / OPENML / f"{reading.id}-{reading.version}.json"


def _file_of(entry: TableEntry, root: Path) -> Path:
    found = located(entry, root)
    if found is not None:
        return found
    raise DataError(
        f"{entry.name}: {entry.file} is not in {root / FOLDER}: it is not downloaded by itself; "
        f"get it from {entry.where} and put it there ({entry.licence})."
    )


def _frame(path: Path, reading: Reading, entry: TableEntry | None) -> pd.DataFrame:
    """The cells of a file as text, by column."""
    import pandas as pd  # noqa: PLC0415 - only where tables are read

    if not path.is_file():
        said = "it is no file" if path.exists() else "there is no such file"
        raise DataError(f"{path}: {said}: expected a table in a CSV file.")
    try:
        with (gzip.open if path.suffix == ".gz" else open)(
            path, "rt", encoding="utf-8-sig", newline=""
        ) as file:
            top = file.read(TOP)
        frame = pd.read_csv(
            path,
            header=None,
            sep=_separator(top),
            dtype=str,
            keep_default_na=False,
            encoding="utf-8-sig",
            skipinitialspace=True,
        )
    except pd.errors.EmptyDataError as error:
        raise DataError(f"{path}: it has no rows.") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is no text in UTF-8 ({error}): save it as CSV in UTF-8."
        ) from error
    except (OSError, ValueError) as error:  # pandas' errors are ValueErrors
        raise DataError(f"{path} cannot be read as a CSV file: {_line(error)}.") from error
    if entry.header if entry else reading.header:
        names = [str(each).strip() for each in frame.iloc[0]]
        frame = frame.iloc[1:].reset_index(drop=True)
        if not len(frame):
            raise DataError(f"{path}: it has no rows.")
    else:
        names = list(entry.names if entry else ()) or [str(k) for k in range(frame.shape[1])]
    if len(names) != frame.shape[1]:
        raise DataError(f"{path}: {frame.shape[1]} columns: expected {len(names)}.")
    twice = sorted({each for each in names if names.count(each) > 1})
    if twice:
        raise DataError(f"{path}: several columns are named {', '.join(map(repr, twice))}.")
    frame.columns = names
    return frame


def _separator(top: str) -> str:
    """What separates the cells: that which cuts the first row into most of them."""

    def cells(mark: str) -> int:
        rows = csv.reader(io.StringIO(top, newline=""), delimiter=mark, skipinitialspace=True)
        return len(next(filter(None, rows), ()))

    return max(",;\t", key=cells)


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")


def openml(reading: Reading, root: Path, download: bool) -> tuple[pd.DataFrame, Reading, str]:
    """The cells of a set of OpenML as text, its default target, and a checksum that is kept.

    Raises:
        DataError: it cannot be fetched, or is not what it was when it was first read.
    """
    from sklearn.datasets import fetch_openml  # noqa: PLC0415 - slow, and only for these

    number = reading.id.isdigit()
    asked: dict[str, Any] = {"name": reading.id, "version": reading.version}
    if number:
        asked = {"data_id": int(reading.id)}
    place, kept = root / OPENML, remembered(reading, root)
    if not download and not kept.exists():
        raise DataError(f"openml:{reading.id} is not in {place}, and downloading is off.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its retries; the error says what it was
            found: Any = fetch_openml(**asked, data_home=str(place), as_frame=True, parser="pandas")
    except (OSError, ValueError) as error:
        raise DataError(
            f"openml:{reading.id} cannot be fetched ({_line(error)}): check the number at "
            f"https://www.openml.org and the connection, or use a CSV file."
        ) from error
    frame = found.frame
    types = {name: str(frame[name].dtype) for name in frame.columns}
    coded = tuple(name for name, kind in types.items() if kind in ("category", "object", "bool"))
    text = frame.astype(object).where(frame.notna(), "").astype(str)
    digest = hashlib.md5(text.to_csv(index=False).encode(), usedforsecurity=False).hexdigest()
    if kept.exists():
        before = json.loads(kept.read_text(encoding="utf-8"))["md5"]
        if before != digest:
            raise DataError(
                f"openml:{reading.id}: its content is not what it was when it was first read "
                f"({digest}, then {before}): remove {kept} to use it as it is now."
            )
    else:
        place.mkdir(parents=True, exist_ok=True)
        with replacing(kept) as handle:
            handle.write(json.dumps({"md5": digest}).encode())
    targets = list(found.target_names) if found.target_names else []
    target = reading.target or (targets[0] if len(targets) == 1 else "")
    coded = tuple(name for name in coded if name != target)
    categorical = tuple(dict.fromkeys([*reading.categorical, *coded]))
    return text, reading._replace(target=target, categorical=categorical), digest


def _arrays(
    frame: pd.DataFrame, reading: Reading, where: str, title: str, entry: TableEntry | None
) -> Arrays:
    """The columns of a table as numbers and codes, its classes, and its splits."""
    known = list(frame.columns)
    _check_named(reading, known, where)
    notes: list[str] = []
    if reading.dedup:
        whole = len(frame)
        used = frame.drop(columns=list(reading.drop))
        frame = frame.loc[~used.duplicated()].reset_index(drop=True)
        notes.append(f"{whole - len(frame)} copies of other rows are left out (dedup)")
    y, classes = _labels(_cells(frame, reading.target), reading.target, where, entry)
    if reading.rows:
        frame, y = _subset(frame, y, reading.rows, where)
        notes.append(f"{len(y)} of its rows, stratified, split seed {SPLIT_SEED}")
    splits = stratified_split(y, SHARES, SPLIT_SEED)
    _refuse_absent(y, splits, classes, where)
    columns, values = [], []
    for name in known:
        if name == reading.target or name in reading.drop:
            continue
        if not name:
            notes.append("a column without a name (an index?) is left out; a name keeps it")
            continue
        made = _column(_cells(frame, name), name, name in reading.categorical, where)
        if isinstance(made, str):
            notes.append(made)
            continue
        column, numbers, said = made
        notes += said
        columns.append(column)
        values.append(numbers)
    if not columns:
        raise DataError(f"{where}: no column is left beside the target: expected at least one.")
    x = np.column_stack(values)
    notes += _alike(x, columns)
    train, val, test = splits
    notes.append(f"{MADE[2]} into train/val/test, stratified, split seed {SPLIT_SEED}")
    return Arrays(
        name=title,
        kind="binary-class" if len(classes) == 2 else "multi-class",
        classes=classes,
        train_x=x[train],
        train_y=y[train],
        val_x=x[val],
        val_y=y[val],
        test_x=x[test],
        test_y=y[test],
        checksum="",
        verified=True,
        caveats=entry.caveats if entry else (),
        source=entry.source if entry else "the user's own data",
        notes=tuple(notes),
        table=Table(tuple(columns), reading.target),
    )


def _refuse_absent(
    y: np.ndarray, splits: Sequence[np.ndarray], classes: tuple[str, ...], where: str
) -> None:
    """Refuse a class of which a split has no row: nothing could be said of it there."""
    for split, rows in zip(SPLITS, splits, strict=True):
        absent = np.flatnonzero(np.bincount(y[rows], minlength=len(classes)) == 0)
        if len(absent):
            found = int((y == absent[0]).sum())
            raise DataError(
                f"{where}: class {classes[absent[0]]!r} has {count(found, 'row')}, and none of "
                f"them is in {split}: merge it with another class, or leave it out."
            )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")


def _check_named(reading: Reading, known: Sequence[str], where: str) -> None:
    listed = _some(known)
    if not reading.target:
        kind = "" if reading.id else "csv:"
        raise DataError(
            f"{where}: no target: name the column that holds the classes, such as "
            f"'{kind}{where}(target={render(known[-1])})': one of {listed}."
        )
    for what, names in (
        ("target", (reading.target,)),
        ("categorical", reading.categorical),
        ("drop", reading.drop),
    ):
        for name in names:
            if name not in known:
                raise DataError(f"{where}: {what}: no column is named {name!r}: it has {listed}.")
    if reading.target in (*reading.categorical, *reading.drop):
        raise DataError(
            f"{where}: {reading.target!r} is the target, so it cannot be dropped or "
            "named in categorical."
        )


def _cells(frame: pd.DataFrame, name: str) -> pd.Series:
    return cast("pd.Series", frame[name])


def _missing(cells: pd.Series) -> np.ndarray:
    return cells.str.strip().str.lower().isin(MISSING).to_numpy()


def _labels(
    cells: pd.Series, name: str, where: str, entry: TableEntry | None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Classes as int64 (N,), and their names: sorted, numbers by their size."""
    text = cells.str.strip()
    empty = _missing(text)
    if empty.any():
        raise DataError(
            f"{where}: {empty.sum()} of {len(text)} rows have no value in the target {name!r}, the "
            f"first is row {int(empty.argmax())}: remove these rows."
        )
    if entry is not None and entry.positives:
        return text.isin(entry.positives).to_numpy().astype(np.int64), entry.classes
    found = sorted(text.unique(), key=_by_size)
    if len(found) < 2:
        raise DataError(f"{where}: the target {name!r} has one value, {found[0]!r}: expected two.")
    if len(found) > MOST_CLASSES:
        raise DataError(
            f"{where}: the target {name!r} has {len(found)} different values: expected classes, at "
            f"most {MOST_CLASSES}; to predict a number, cut it into classes first."
        )
    number = {value: place for place, value in enumerate(found)}
    return text.map(number).to_numpy().astype(np.int64), tuple(found)


def _by_size(value: str) -> tuple[int, float, str]:
    try:
        return 0, float(value), value
    except ValueError:
        return 1, 0.0, value


def _subset(
    frame: pd.DataFrame, y: np.ndarray, rows: int, where: str
) -> tuple[pd.DataFrame, np.ndarray]:
    if rows > len(y):
        raise DataError(f"{where}: rows={rows}: it has {len(y)} rows.")
    if rows == len(y):
        return frame, y
    kept = stratified_split(y, (rows, len(y) - rows), SPLIT_SEED)[0]
    return frame.iloc[kept].reset_index(drop=True), y[kept]


def _column(
    cells: pd.Series, name: str, categorical: bool, where: str
) -> tuple[Column, np.ndarray, list[str]] | str:
    """A column, its values (N,) and notes on it; or why it is left out."""

    text = cells.str.strip()
    empty = _missing(text)
    full, numbers = text[~empty], _numbers(text, empty)
    known = ~np.isnan(numbers) & ~empty
    other = np.flatnonzero(~known & ~empty)
    plain = not categorical and not len(other)
    if (len(np.unique(numbers[known])) if plain else full.nunique()) < 2:  # .0 and 0.0 are one
        what = "is empty" if not len(full) else "has one value"
        return f"column {name!r} {what} and is left out"
    if categorical:
        return *_codes(text, empty, name, where), []
    if plain:
        if np.abs(numbers[known]).max() > LARGEST:
            raise DataError(
                f"{where}: column {name!r} has infinite values, or some above {LARGEST:.2g}: "
                "remove them, or leave the column out (drop=)."
            )
        return Column(name, "number"), numbers, _numbering(numbers, name)
    if full.str.fullmatch(DATE).mean() > 0.9:
        days = _days(text)
        odd = np.flatnonzero(np.isnan(days) & ~empty)
        if len(odd):
            raise DataError(
                f"{where}: column {name!r} looks like dates, such as {text.iloc[odd[0]]!r} in row "
                f"{odd[0]}: write them as YYYY-MM-DD, or leave the column out (drop=)."
            )
        return Column(name, "date"), days, [f"column {name!r} holds dates: used as days since 1970"]
    if 2 * (known | text.str.fullmatch(NUMBER).to_numpy(dtype=bool)).sum() > len(full):
        raise DataError(
            f"{where}: column {name!r} holds numbers, but {len(other)} of {len(full)} cells are "
            f"text, the first {text.iloc[other[0]]!r} in row {other[0]}: write numbers such as "
            "1.5, or name the column in categorical= or drop=."
        )
    if full.nunique() > max(50, len(full) / 2):
        return (
            f"column {name!r} has {full.nunique()} different texts in {len(full)} rows (an "
            "identifier?) and is left out; categorical= keeps it"
        )
    return *_codes(text, empty, name, where), []


def _days(text: pd.Series) -> np.ndarray:
    """Days since 1970 of dates YYYY-MM-DD, nan where there is none."""
    import pandas as pd  # noqa: PLC0415

    iso = text.where(text.str.fullmatch(ISO).to_numpy(dtype=bool))
    days = pd.to_datetime(iso, errors="coerce", utc=True, format="ISO8601")
    since = (days - pd.Timestamp("1970-01-01", tz="UTC")) / pd.Timedelta(days=1)
    return since.to_numpy(dtype=np.float64)


def _numbers(text: pd.Series, empty: np.ndarray) -> np.ndarray:
    """Numbers (N,) as float64, nan where there is none."""
    import pandas as pd  # noqa: PLC0415

    numbers = cast("pd.Series", pd.to_numeric(text.where(~empty), errors="coerce"))
    return numbers.to_numpy(dtype=np.float64)


def _numbering(numbers: np.ndarray, name: str) -> list[str]:
    """A note on a column that seems to number the rows."""
    steps = np.diff(numbers)
    if len(steps) > 20 and (steps == 1).all():
        drop = f"drop={render((name,))}"
        return [f"column {name!r} numbers the rows (an identifier?): {drop} leaves it out"]
    return []


def _codes(text: pd.Series, empty: np.ndarray, name: str, where: str) -> tuple[Column, np.ndarray]:
    levels = sorted(set(text[~empty]), key=_by_size)
    if len(levels) > MOST_LEVELS:
        raise DataError(
            f"{where}: column {name!r} has {len(levels)} categories: expected at most "
            f"{MOST_LEVELS}; group them, or leave the column out (drop=)."
        )
    number = {value: place for place, value in enumerate(levels)}
    codes = text.where(~empty).map(number).to_numpy(dtype=np.float64)
    return Column(name, "category", tuple(levels)), codes


def _alike(x: np.ndarray, columns: Sequence[Column]) -> list[str]:
    """A note on columns that are equal in every row."""
    seen: dict[bytes, str] = {}
    notes = []
    for column, values in zip(columns, x.T, strict=True):
        key = hashlib.blake2b(np.ascontiguousarray(values).tobytes()).digest()
        if key in seen and column.kind == "number":
            notes.append(f"columns {seen[key]!r} and {column.name!r} are equal in every row")
        seen.setdefault(key, column.name)
    return notes


def _beside_paper(arrays: Arrays, entry: TableEntry, checksum: str) -> list[str]:
    """What the file holds beside what the paper prints, and whether it is the file we know."""
    y = np.concatenate([arrays.train_y, arrays.val_y, arrays.test_y])
    assert arrays.table is not None
    coded = int(arrays.table.coded.sum())
    positives = f", {int((y == 1).sum()):,} positive" if entry.positives else ""
    printed = entry.published
    theirs = f", {printed.positives:,} positive" if printed.positives else ""
    notes = [
        f"{len(y):,} rows{positives}, {len(arrays.table.columns)} features, {coded} of them "
        f"categories; SAFLEX's Table 5 has {printed.rows:,} rows{theirs}, {printed.features} "
        "features"
    ]
    if entry.md5 and checksum != entry.md5:
        notes.append(f"unverified file: {entry.file} has MD5 {checksum}, ours had {entry.md5}")
    elif not entry.md5:
        notes.append(f"{entry.file} (MD5 {checksum}) was never seen by us: check the numbers above")
    return notes


def rows_of_file(
    path: Path, reading: Reading, name: str, arrays: Arrays
) -> tuple[np.ndarray, np.ndarray | None]:
    """Rows (N, D) of another file with the columns of a table, and their classes if it has them.

    It is read as the table ``name`` itself is. Categories that the table does not have get the code
    ``UNKNOWN``.

    Raises:
        DataError: it has no rows, a column is missing, holds text where the table has numbers, or
            a class is not one of the table's.
    """
    entry = TABLES.get(name)
    assert arrays.table is not None
    frame = _frame(path, reading, entry)
    values = []
    for column in arrays.table.columns:
        if column.name not in frame:
            raise DataError(
                f"{path}: it has no column {column.name!r}, which the network was trained on: it "
                f"has {_some(list(frame.columns))}."
            )
        text = _cells(frame, column.name).str.strip()
        empty = _missing(text)
        if column.kind == "category":
            number = {value: place for place, value in enumerate(column.levels)}
            found = text.map(number).fillna(UNKNOWN).to_numpy(dtype=np.float64)
        elif column.kind == "date":
            found = _days(text)
        else:
            found = _numbers(text, empty)
        wrong = ~(np.abs(found) <= LARGEST) & ~empty
        if wrong.any():
            raise DataError(
                f"{path}: column {column.name!r} holds {column.kind}s in the table of the run, but "
                f"row {int(wrong.argmax())} has {text.iloc[int(wrong.argmax())]!r}."
            )
        values.append(np.where(empty, np.nan, found))
    return np.column_stack(values), _known_classes(frame, arrays, path, entry)


def _known_classes(
    frame: pd.DataFrame, arrays: Arrays, path: Path, entry: TableEntry | None
) -> np.ndarray | None:
    """Classes (N,) of another file's rows, as the table numbers them; None if it has none."""
    target = arrays.table.target if arrays.table else ""
    if target not in frame or _missing(_cells(frame, target)).all():
        return None
    text = _cells(frame, target).str.strip()
    empty = _missing(text)
    if empty.any():
        raise DataError(
            f"{path}: {empty.sum()} of {len(text)} rows have no value in the target {target!r}, "
            f"the first is row {int(empty.argmax())}: fill them, or leave the column out."
        )
    if entry is not None and entry.positives:
        return text.isin(entry.positives).to_numpy().astype(np.int64)
    unknown = ~text.isin(arrays.classes).to_numpy()
    if unknown.any():
        raise DataError(
            f"{path}: row {int(unknown.argmax())} has {text.iloc[int(unknown.argmax())]!r} in the "
            f"target {target!r}: expected one of {_some(arrays.classes)}, or no such column."
        )
    return text.map({c: k for k, c in enumerate(arrays.classes)}).to_numpy(np.int64)


def as_text(rows: np.ndarray, table: Table) -> list[list[str]]:
    """Stored rows (N, D) as they stand in the file, for people."""
    shown_rows = []
    for row in rows:
        cells = []
        for value, column in zip(row, table.columns, strict=True):
            if np.isnan(value):
                cells.append("")
            else:
                cells.append(column.levels[int(value)] if column.levels else f"{value:g}")
        shown_rows.append(cells)
    return shown_rows
