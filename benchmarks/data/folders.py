"""A folder of images as people have it: splits, classes, patients, and what is left out."""

import csv
import hashlib
import io
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.data import pictures
from benchmarks.data.download import DataError

SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
HIDDEN = frozenset(
    {"__macosx", "@eadir", "#recycle", "$recycle.bin", "lost+found", "system volume information"}
)
"""Folders of systems, which hold no data; so do all whose name begins with a dot."""
SMALL = frozenset({"thumbnails", "thumbs"})
"""Folders below a class that hold its images once more."""
SILENT = frozenset(
    {"thumbs.db", "desktop.ini", ".ds_store", ".gitkeep", ".gitignore", ".gitattributes"}
)
"""Files of systems of which nobody thinks that they are images."""
TEXTS = frozenset(
    {".txt", ".md", ".csv", ".tsv", ".json", ".xml", ".yaml", ".yml", ".html", ".log", ".ini"}
)
"""Ends of names that may lie beside images; what is left out is told."""
UNSEEN = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
"""Characters that break a line or turn the direction of what follows."""
IMAGE_COLUMNS = ("file", "image", "path", "filename")


@dataclass(frozen=True, eq=False)
class Folder:
    """The images of a folder, and what is known about them."""

    classes: tuple[str, ...]
    parts: tuple[str, ...]
    """the splits that it has, "" alone where it has none"""
    part: np.ndarray
    """(N,) the split of each image, a number in `parts`"""
    x: np.ndarray
    """uint8 (N, size, size) where all are grey, else (N, size, size, 3)"""
    y: np.ndarray
    """int64 (N,)"""
    groups: np.ndarray | None
    """(N,) names of the patients, or None where nothing is said of them"""
    subfolders: bool
    """whether the images of some class lie in several folders"""
    checksum: str
    notes: tuple[str, ...]


def read(path: Path, size: int, groups: int | str | None) -> Folder:
    """The images of a folder, one folder a class, below train/, test/ and perhaps val/, or not.

    `groups` says where the patients are named: a level of folders below the classes (1 the first),
    or FILE.csv or FILE.csv:COLUMN; 0 and None say nothing of them.

    Raises DataError for everything that is wrong, with the file and what to do.
    """
    if not path.is_dir():
        what = "is no folder" if path.exists() else "does not exist"
        raise DataError(f"{shown(path)} {what}: expected one folder a class, or train/ and test/.")
    if size < 1:
        raise DataError(f"size is {size}, expected the edge of the images in pixels.")
    walk = _Walk(path)
    top = walk.listed("")
    parts = _splits(path, top)
    below = {part: walk.listed(folder) if part else top for part, folder in parts.items()}
    classes = _classes(walk, parts, below)
    files = [
        _File(folder, file, part, k)
        for part in parts
        for k, name in enumerate(classes)
        for folder in [classes[name].get(part)]
        if folder
        for file in sorted(walk.files_below(folder))
    ]
    walk.raise_dangling()
    walk.tell_beside(parts, below, top)
    return _decoded(walk, tuple(classes), parts, files, size, groups)


def shown(path: str | Path) -> str:
    """A path as text of one line: bytes that are not UTF-8 and control characters by numbers."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return UNSEEN.sub(lambda found: ascii(found[0])[1:-1], text)


def _label(name: str) -> str:
    """A name as it is compared: a letter and its accent are one, however they are stored."""
    return unicodedata.normalize("NFC", shown(name))


def _joined(*names: str) -> str:
    return "/".join(name for name in names if name)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(map(shown, names[:5])) + more


@dataclass(frozen=True)
class _File:
    """A file in the folder of a class."""

    folder: str
    """of the class"""
    inside: str
    """its path from there"""
    part: str
    label: int

    @property
    def name(self) -> str:
        return f"{self.folder}/{self.inside}"


@dataclass
class _Listing:
    folders: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)


class _Walk:
    """The walk through a folder: what it comes by and leaves out. Names are relative to it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.notes: list[str] = []
        self._hidden: list[str] = []
        self._dangling: list[str] = []
        self._visited: dict[tuple[int, int], str] = {}

    def listed(self, folder: str, below_class: bool = False) -> _Listing:
        """The folders and files in a folder that may be data, sorted; links are followed."""
        hidden = HIDDEN | SMALL if below_class else HIDDEN
        found = _Listing()
        where = self.root / folder if folder else self.root
        try:
            stat = where.stat()
            # Some network drives number no files.
            key = (stat.st_dev, stat.st_ino) if stat.st_ino else (-1, len(self._visited))
            before = self._visited.setdefault(key, folder)
            if before != folder:
                raise DataError(
                    f"{shown(where)} and {shown(self.root / before)} are the same folder, by a "
                    f"link: its images would count twice. Remove the link."
                )
            with os.scandir(where) as entries:
                for entry in entries:
                    name = entry.name.lower()
                    if name in SILENT:
                        continue
                    if name.startswith(".") or name in hidden:
                        self._hidden.append(_joined(folder, entry.name))
                    elif entry.is_dir():
                        found.folders.append(entry.name)
                    elif entry.is_file():
                        found.files.append(entry.name)
                    elif entry.is_symlink():
                        self._dangling.append(_joined(folder, entry.name))
                    else:  # a socket, a pipe
                        self._hidden.append(_joined(folder, entry.name))
        except OSError as error:
            raise DataError(f"{shown(where)} cannot be listed: {error.strerror}.") from error
        found.folders.sort()
        found.files.sort()
        return found

    def files_below(self, folder: str) -> Iterator[str]:
        """The files below a folder at any depth, by their path from there."""
        here = self.listed(folder, below_class=True)
        yield from here.files
        kinds = {split_of(name) for name in here.folders} - {None}
        if "train" in kinds and len(kinds) > 1:
            raise DataError(
                f"{shown(self.root / folder)} has the folders {_some(here.folders)}: expected "
                f"the splits above the classes, as in train/CLASS/ and test/CLASS/."
            )
        for name in here.folders:
            for file in self.files_below(_joined(folder, name)):
                yield f"{name}/{file}"

    def raise_dangling(self) -> None:
        """Links to nothing stand for images that are missing: they are never passed over."""
        if self._dangling:
            first = self.root / min(self._dangling)
            raise DataError(
                f"{shown(self.root)} has {len(self._dangling)} links to nothing, the first "
                f"{shown(first)} -> {shown(first.readlink())}: fetch or mount what they point to, "
                f"or remove them."
            )

    def tell_beside(
        self, parts: Mapping[str, str], below: Mapping[str, _Listing], top: _Listing
    ) -> None:
        """Note what lies beside splits and classes, or is hidden, and so is no data."""
        if "" not in parts:
            beside = [f"{name}/" for name in top.folders if name not in parts.values()]
            if beside:
                self.notes.append(
                    f"folders beside the splits are left out: {_some(beside)} (only val/, valid/ "
                    f"and validation/ are a validation split)"
                )
        files = {
            _joined(folder, file) for part, folder in parts.items() for file in below[part].files
        }
        files.update(top.files)
        self.tell(
            sorted(file for file in files if Path(file).suffix.lower() not in TEXTS),
            "beside the folders of the classes, so left out",
        )
        self.tell(sorted(self._hidden), "hidden or of the system, so left out")

    def tell(self, names: Sequence[str], what: str) -> None:
        """Note how many files or folders there are, and the first."""
        if names:
            many = f"{len(names)}, the first " if len(names) > 1 else ""
            self.notes.append(f"{what}: {many}{shown(names[0])}")


def split_of(name: str) -> str | None:
    """The split that a folder's name stands for: train, Training, test_set, valid, ..."""
    word = re.fullmatch(r"([a-z]+?)(?:[ _-]?set)?", name.casefold())
    return SPLIT_WORDS.get(word[1]) if word else None


def _splits(root: Path, top: _Listing) -> dict[str, str]:
    """The folder of each split, in the order train, val, test; {"": ""} where there are none."""
    found: dict[str, str] = {}
    for name in top.folders:
        split = split_of(name)
        if split is None:
            continue
        if split in found:
            raise DataError(
                f"{shown(root)} has {found[split]}/ and {name}/, which are both the {split} split: "
                f"remove or rename one."
            )
        found[split] = name
    if "train" in found and "test" in found:
        return {s: found[s] for s in ("train", "val", "test") if s in found}
    if "train" in found:
        others = [f"{n}/" for n in top.folders if n != found["train"]]
        beside = f" (beside it: {_some(others)})" if others else ""
        raise DataError(
            f"{shown(root)} has {found['train']}/ but no test/{beside}: add it, or name the folder "
            f"that is it test/; or, to have them split, put the folders of the classes directly "
            f"into {shown(root)}. A class named {found['train']} needs another name."
        )
    # What only resembles splits would be taken for classes, and a network learn which is which.
    words = {
        n: {SPLIT_WORDS.get(w) for w in re.findall("[a-z]+", n.casefold())} for n in top.folders
    }
    like = [n for n, w in words.items() if w - {None}]
    kinds = set().union(*(words[n] for n in like)) - {None}
    if like and (len(like) == len(top.folders) or ("train" in kinds and len(kinds) > 1)):
        raise DataError(
            f"{shown(root)} has the folders {_some(top.folders)}, of which {_some(like)} look like "
            f"splits: name them train/, test/ and, where there is one, val/; or rename the classes."
        )
    return {"": ""}


def _classes(
    walk: _Walk, parts: Mapping[str, str], below: Mapping[str, _Listing]
) -> dict[str, dict[str, str]]:
    """Of each class its folder in each split, in the order of their names as stored in train."""
    first = next(iter(parts))
    classes: dict[str, dict[str, str]] = {}
    for part, folder in parts.items():
        where = shown(walk.root / folder)
        for stored in below[part].folders:
            name = _label(stored)
            if part == first:
                classes.setdefault(name, {})
            elif name not in classes:
                like = [known for known in classes if known.casefold() == name.casefold()]
                hint = f", but {like[0]!r}: make them one name" if like else ""
                raise DataError(f"{where} has the class {name!r}, which train/ has not{hint}.")
            if part in classes[name]:
                raise DataError(
                    f"{where} has two folders for the class {name!r}, whose names differ only in "
                    f"how letters with accents are stored: make them one."
                )
            classes[name][part] = _joined(folder, stored)
    if len(classes) < 2:
        files = len(below[first].files)
        hint = f" (is {_some(list(classes))} the one to name?)" if classes else ""
        hint = f"; it has {files} files" if files and not classes else hint
        raise DataError(
            f"{shown(walk.root / parts[first])} has {len(classes)} folders: expected one a class, "
            f"2 or more, with its images in it{hint}."
        )
    folded = Counter(name.casefold() for name in classes)
    alike = [name for name in classes if folded[name.casefold()] > 1]
    if alike:
        walk.notes.append(f"classes differ only in upper and lower case: {_some(alike)}")
    split = [name for name in classes if split_of(name)]
    if split and first == "":
        walk.notes.append(f"named like a split, but taken as a class: {_some(split)}")
    return classes


def _decoded(
    walk: _Walk,
    classes: tuple[str, ...],
    parts: Mapping[str, str],
    files: Sequence[_File],
    size: int,
    groups: int | str | None,
) -> Folder:
    """Every file read, with the checksum of all names and bytes."""
    digest = hashlib.md5(usedforsecurity=False)
    done: Counter[str] = Counter()
    images, taken, deep, texts, warned = [], [], [], [], []
    for file in files:
        data, picture = _picture(walk.root / file.name, size)
        if picture is None:
            texts.append(file.name)
            continue
        digest.update(os.fsencode(file.name) + f"\0{len(data)}\0".encode())
        digest.update(data)
        for word in pictures.ALTERED:
            if word in picture.done:
                digest.update(f"\0{word}\0".encode())
        done.update(picture.done)
        if picture.peak is not None:
            deep.append((picture.peak, file.name))
        if picture.warned:
            warned.append(f"{file.name} ({picture.warned})")
        images.append(picture.pixels)
        taken.append(file)
    for part, folder in parts.items():
        if all(file.part != part for file in taken):
            where = shown(walk.root / folder)
            raise DataError(f"{where} is empty: expected images in the folders of classes.")
    if deep and max(deep)[0] < pictures.FULL_RANGE:
        peak, name = max(deep)
        raise DataError(
            f"{shown(walk.root)} has {len(deep)} images of 16 bits in which no value exceeds "
            f"{peak} of 65535 ({shown(name)}): their range is unknown, perhaps 12 bits stored in "
            f"16. Convert them to 8 bits, or put values scaled to [0, 1] into an npz file."
        )
    walk.tell(texts, "texts among the images are left out")
    walk.tell(warned, "images that the reader complains of, used as it reads them")
    walk.notes.extend(pictures.told(done))
    names = _groups(walk.root, taken, groups)
    if names is not None:
        digest.update("\0".join(["groups", *names]).encode())
    if any(image.ndim == 3 for image in images):
        images = [np.repeat(i[..., None], 3, -1) if i.ndim == 2 else i for i in images]
    order = {part: k for k, part in enumerate(parts)}
    places: dict[int, set[str]] = {}
    for file in taken:
        places.setdefault(file.label, set()).add(os.path.dirname(file.inside))  # noqa: PTH120
    same = places[taken[0].label]
    if len(same) > 1 and "" not in same and all(each == same for each in places.values()):
        walk.notes.append(
            f"every class has the same subfolders ({_some(sorted(same))}): are those the classes?"
        )
    return Folder(
        classes=classes,
        parts=tuple(parts),
        part=np.array([order[file.part] for file in taken]),
        x=np.stack(images),
        y=np.array([file.label for file in taken], np.int64),
        groups=None if names is None else np.array(names),
        subfolders=any(len(of_class) > 1 for of_class in places.values()),
        checksum=digest.hexdigest(),
        notes=tuple(walk.notes),
    )


def _picture(path: Path, size: int) -> tuple[bytes, pictures.Picture | None]:
    """The bytes of a file and its image; None for a text that lies beside images."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{shown(path)} cannot be read: {error.strerror}.") from error
    try:
        return data, pictures.decode(data, size)
    except pictures.NotAnImage as error:
        if path.suffix.lower() in TEXTS:
            return data, None
        if str(error):
            raise DataError(
                f"{shown(path)} is {error}, which is not read: convert it to PNG, or put the "
                f"images as arrays into an npz file."
            ) from error
        raise DataError(
            f"{shown(path)} cannot be read as an image (no format that is known): repair it, or "
            f"remove it."
        ) from error
    except pictures.Refused as error:
        raise DataError(f"{shown(path)} cannot be used: {error}.") from error
    except ValueError as error:
        raise DataError(
            f"{shown(path)} cannot be read as an image ({error}): repair it, or remove it."
        ) from error


def _groups(root: Path, files: Sequence[_File], groups: int | str | None) -> list[str] | None:
    """The patient of each file, as text; the same in every class and split."""
    if not groups:
        return None
    if isinstance(groups, str):
        return _from_csv(root, groups, [_label(file.name) for file in files])
    names = []
    for file in files:
        *folders, _ = _label(file.inside).split("/")
        if len(folders) < groups:
            raise DataError(
                f"{shown(root / file.name)} lies {len(folders)} folders below its class, "
                f"groups={groups} expects {groups} or more: put it into the folder of its patient."
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
    prefix = f"{_label(str(root))}/"
    of_cell: dict[str, str] = {}
    for line, cell, group in table:
        key = cell.replace("\\", "/").removeprefix(prefix).removeprefix("./")
        if of_cell.setdefault(key, group) != group:
            raise DataError(
                f"{shown(path)}, line {line}: {cell!r} is of {group!r}, and above of "
                f"{of_cell[key]!r}: expected one group an image."
            )
    # An image may be named by its path or the end of it, with or without the format, where no
    # other image is meant by that.
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
            f"{missing[0]}: expected its path in {shown(root)}, or its file name where no other "
            f"image has it. The first line names the columns, here {', '.join(head)}."
        )
    return found


def _ends(file: str) -> dict[str, None]:
    """A path and all its ends, each with and without the format, longest first."""
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
            f"{shown(path)} cannot be read as CSV in UTF-8: {error}. Save it as that."
        ) from error
    names = [name.strip() for name in rows[0]] if rows else []
    image = next((k for k, name in enumerate(names) if name.lower() in IMAGE_COLUMNS), 0)
    others = [name for k, name in enumerate(names) if k != image]
    if not column and len(others) == 1:
        column = others[0]
    if others.count(column) != 1:
        what = f"has no column {column!r}" if column else "has not two columns"
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
