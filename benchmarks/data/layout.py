"""The layout of a folder of images: its splits, its classes, and what is left out."""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

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
"""System folders, which contain no data; those with names starting with a dot do not either."""
SMALL = frozenset({"thumbnails", "thumbs"})
"""Folders below a class that contain copies of its images."""
SILENT = frozenset(
    {"thumbs.db", "desktop.ini", ".ds_store", ".gitkeep", ".gitignore", ".gitattributes"}
)
"""System files, which nobody takes for images."""
TEXTS = frozenset(
    {".txt", ".md", ".csv", ".tsv", ".json", ".xml", ".yaml", ".yml", ".html", ".log", ".ini"}
)
"""Suffixes of text files that may be among images; a note says how many are left out."""
UNSEEN = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
"""Characters that break a line or reverse the direction of text."""


def shown(path: str | Path) -> str:
    """A path on one line, with control characters and bytes that are not UTF-8 as escapes."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return UNSEEN.sub(lambda found: ascii(found[0])[1:-1], text)


def label(name: str) -> str:
    """A name for comparisons: accented letters are equal however they are stored."""
    return unicodedata.normalize("NFC", shown(name))


def _joined(*names: str) -> str:
    return "/".join(name for name in names if name)


def some(names: Sequence[str]) -> str:
    """The first of these names, and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(map(shown, names[:5])) + more


@dataclass(frozen=True)
class File:
    """A file in the folder of a class."""

    folder: str
    """of the class"""
    inside: str
    """its path from there"""
    part: str
    label: int

    @property
    def name(self) -> str:
        """Its path from the folder of the data."""
        return _joined(self.folder, self.inside)


@dataclass
class Listing:
    """The contents of a folder that may be data, by name."""

    folders: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)


class Walk:
    """A walk through a folder: what it finds and leaves out. Names are relative to it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.notes: list[str] = []
        self._hidden: list[str] = []
        self._dangling: list[str] = []
        self._visited: dict[tuple[int, int], str] = {}

    def listed(self, folder: str, below_class: bool = False) -> Listing:
        """The folders and files in a folder that may be data, sorted; links are followed."""
        hidden = HIDDEN | SMALL if below_class else HIDDEN
        found = Listing()
        where = self.root / folder if folder else self.root
        try:
            stat = where.stat()
            # Some network drives have no inode numbers.
            key = (stat.st_dev, stat.st_ino) if stat.st_ino else (-1, len(self._visited))
            before = self._visited.setdefault(key, folder)
            if before != folder:
                raise DataError(
                    f"{shown(where)} and {shown(self.root / before)} are the same folder because "
                    f"of a link, so its images would count twice. Remove the link."
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
                f"{shown(self.root / folder)} has the folders {some(here.folders)}: expected "
                f"splits above classes, as in train/CLASS/ and test/CLASS/."
            )
        for name in here.folders:
            for file in self.files_below(_joined(folder, name)):
                yield f"{name}/{file}"

    def raise_dangling(self) -> None:
        """Refuse broken links, because they mean missing images."""
        if self._dangling:
            first = self.root / min(self._dangling)
            raise DataError(
                f"{shown(self.root)} has {len(self._dangling)} broken links, the first "
                f"{shown(first)} -> {shown(first.readlink())}: fetch or mount what they point to, "
                f"or remove them."
            )

    def tell_beside(
        self, parts: Mapping[str, str], below: Mapping[str, Listing], top: Listing
    ) -> None:
        """Note what is not data because it is next to splits or classes, or hidden."""
        if "" not in parts:
            beside = [f"{name}/" for name in top.folders if name not in parts.values()]
            if beside:
                self.notes.append(
                    f"folders next to the splits are left out: {some(beside)} (only val/, valid/ "
                    f"and validation/ are a validation split)"
                )
        files = {
            _joined(folder, file) for part, folder in parts.items() for file in below[part].files
        }
        files.update(top.files)
        self.tell(
            sorted(file for file in files if Path(file).suffix.lower() not in TEXTS),
            "next to the class folders, so left out",
        )
        self.tell(sorted(self._hidden), "hidden or system files, so left out")

    def tell(self, names: Sequence[str], what: str) -> None:
        """Note how many files or folders there are, and the first."""
        if names:
            many = f"{len(names)}, the first " if len(names) > 1 else ""
            self.notes.append(f"{what}: {many}{shown(names[0])}")


def split_of(name: str) -> str | None:
    """The split that a folder's name means: train, Training, test_set, valid, ..."""
    word = re.fullmatch(r"([a-z]+?)(?:[ _-]?set)?", name.casefold())
    return SPLIT_WORDS.get(word[1]) if word else None


def splits_of(root: Path, top: Listing) -> dict[str, str]:
    """The folder of each split, in the order train, val, test; {"": ""} if there are none."""
    found: dict[str, str] = {}
    for name in top.folders:
        split = split_of(name)
        if split is None:
            continue
        if split in found:
            raise DataError(
                f"{shown(root)} has {found[split]}/ and {name}/, which both mean the {split} "
                f"split: "
                f"remove or rename one."
            )
        found[split] = name
    if "train" in found and "test" in found:
        return {s: found[s] for s in ("train", "val", "test") if s in found}
    if "train" in found:
        others = [f"{n}/" for n in top.folders if n != found["train"]]
        beside = f" (next to it: {some(others)})" if others else ""
        raise DataError(
            f"{shown(root)} has {found['train']}/ but no test/{beside}: add it, or rename the "
            f"test folder to test/; or, to have the images split, put the class folders directly "
            f"into {shown(root)}. A class named {found['train']} needs another name."
        )
    # Folders that only resemble splits would be taken for classes.
    words = {
        n: {SPLIT_WORDS.get(w) for w in re.findall("[a-z]+", n.casefold())} for n in top.folders
    }
    like = [n for n, w in words.items() if w - {None}]
    kinds = set().union(*(words[n] for n in like)) - {None}
    if like and (len(like) == len(top.folders) or ("train" in kinds and len(kinds) > 1)):
        raise DataError(
            f"{shown(root)} has the folders {some(top.folders)}, of which {some(like)} look like "
            f"splits: name them train/, test/ and val/ (if there is one), or rename the classes."
        )
    return {"": ""}


def classes_of(
    walk: Walk, parts: Mapping[str, str], below: Mapping[str, Listing], least: int = 2
) -> dict[str, dict[str, str]]:
    """For each class its folder in each split, sorted by the names as stored in train.

    Raises DataError for fewer than ``least`` classes, and for names that cannot be told apart.
    """
    first = next(iter(parts))
    classes: dict[str, dict[str, str]] = {}
    for part, folder in parts.items():
        where = shown(walk.root / folder)
        for stored in below[part].folders:
            name = label(stored)
            if part == first:
                classes.setdefault(name, {})
            elif name not in classes:
                like = [known for known in classes if known.casefold() == name.casefold()]
                hint = f"; it has {like[0]!r}: use one name" if like else ""
                raise DataError(f"{where} has the class {name!r}, which train/ lacks{hint}.")
            if part in classes[name]:
                raise DataError(
                    f"{where} has two folders for the class {name!r}, whose names differ only in "
                    f"how accented letters are stored: merge them."
                )
            classes[name][part] = _joined(folder, stored)
    if len(classes) < least:
        files = len(below[first].files)
        hint = f" (is {some(list(classes))} the one to name?)" if classes else ""
        hint = f"; it has {files} files" if files and not classes else hint
        raise DataError(
            f"{shown(walk.root / parts[first])} has {len(classes)} folders: expected {least} or "
            f"more, one per class, each with its images{hint}."
        )
    folded = Counter(name.casefold() for name in classes)
    alike = [name for name in classes if folded[name.casefold()] > 1]
    if alike:
        walk.notes.append(f"classes that differ only in upper and lower case: {some(alike)}")
    split = [name for name in classes if split_of(name)]
    if split and first == "":
        walk.notes.append(f"named like a split, but read as a class: {some(split)}")
    return classes
