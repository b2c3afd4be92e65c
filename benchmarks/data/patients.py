"""The patients of the images in a folder, from its subfolders or from a table."""

import csv
import io
import os
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from benchmarks.data.download import DataError
from benchmarks.data.layout import File, label, shown

IMAGE_COLUMNS = ("file", "image", "path", "filename")


def of_files(root: Path, files: Sequence[File], groups: int | str | None) -> list[str] | None:
    """The patient of each file, as a string that is the same in every class and split.

    `groups` as for `folders.read`. Raises DataError if a file has none.
    """
    if not groups:
        return None
    if isinstance(groups, str):
        return _from_csv(root, groups, [label(file.name) for file in files])
    names = []
    for file in files:
        *folders, _ = label(file.inside).split("/")
        if len(folders) < groups:
            raise DataError(
                f"{shown(root / file.name)} is {len(folders)} folders below its class, but "
                f"groups={groups} needs {groups} or more: put it into the folder of its patient."
            )
        names.append("/".join(folders[:groups]))
    return names


def _from_csv(root: Path, groups: str, files: Sequence[str]) -> list[str]:
    """The patient of each file from a table FILE.csv:COLUMN, whose first line names the columns."""
    name, column = groups, ""
    if not (root / name).is_file() and ":" in groups:
        name, _, column = groups.rpartition(":")
    path = root / name
    head, table = _table(path, column)
    prefix = f"{label(str(root))}/"
    of_cell: dict[str, str] = {}
    for line, cell, group in table:
        key = cell.replace("\\", "/").removeprefix(prefix).removeprefix("./")
        if of_cell.setdefault(key, group) != group:
            raise DataError(
                f"{shown(path)}, line {line}: {cell!r} has the group {group!r}, but above "
                f"{of_cell[key]!r}: expected one group per image."
            )
    # An image may be named by its path or the end of it, with or without the suffix, if that is
    # unambiguous.
    ends = [_ends(file) for file in files]
    meant = Counter(end for of_file in ends for end in of_file)
    found = [
        next((of_cell[end] for end in of_file if meant[end] == 1 and end in of_cell), "")
        for of_file in ends
    ]
    missing = [file for file, group in zip(files, found, strict=True) if not group]
    if missing:
        raise DataError(
            f"{shown(path)} names no group for {len(missing)} of {len(files)} images, the first "
            f"{missing[0]}: expected its path in {shown(root)}, or its file name if no other "
            f"image has it. The first line names the columns, here {', '.join(head)}."
        )
    return found


def _ends(file: str) -> dict[str, None]:
    """A path and all its ends, each with and without the suffix, longest first."""
    parts = file.split("/")
    whole = ["/".join(parts[k:]) for k in range(len(parts))]
    return dict.fromkeys(each for end in whole for each in (end, os.path.splitext(end)[0]))  # noqa: PTH122


def _table(path: Path, column: str) -> tuple[list[str], list[tuple[int, str, str]]]:
    """The names of the columns; line number, image and group of each row of a CSV file."""
    try:
        text = unicodedata.normalize("NFC", path.read_text(encoding="utf-8-sig"))
        head = text.partition("\n")[0]
        rows = list(
            csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=head.count))
        )
    except FileNotFoundError as error:
        raise DataError(f"{shown(path)} does not exist: groups expects a CSV file.") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"{shown(path)} cannot be read as CSV in UTF-8: {error}. Save it in that format."
        ) from error
    names = [name.strip() for name in rows[0]] if rows else []
    image = next((k for k, name in enumerate(names) if name.lower() in IMAGE_COLUMNS), 0)
    others = [name for k, name in enumerate(names) if k != image]
    if not column and len(others) == 1:
        column = others[0]
    if others.count(column) != 1:
        what = f"has no column {column!r}" if column else "does not have two columns"
        raise DataError(
            f"{shown(path)} {what}: expected a first line that names the columns, and the one of "
            f"the groups as FILE.csv:COLUMN; it has {', '.join(names) or 'none'}."
        )
    group = next(k for k, name in enumerate(names) if name == column and k != image)
    table = []
    for line, row in enumerate(rows[1:], start=2):
        if not any(row):
            continue
        if len(row) <= max(image, group):
            raise DataError(
                f"{shown(path)}, line {line} has {len(row)} columns, expected {len(names)}."
            )
        table.append((line, row[image].strip(), row[group].strip()))
    return names, table
