"""The name of a benchmark: a data set and what is done to it. Needs no torch.

``digits``, ``pneumoniamnist(size=64, noise=0.4)``, and a user's own data by their path:
``npz:FILE``, ``folder:DIR``, with arguments behind it if need be. A path may stand in quotes,
``folder:"a, b"(size=64)``; without them the reading is meant whose path exists.
"""

from __future__ import annotations

import ast
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import KW_ONLY, asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from benchmarks.data.catalogue import CATALOGUE
from benchmarks.data.table_catalogue import TABLES, Reading
from methods.naming import (
    Call,
    NamingError,
    bind,
    call_of,
    parse,
    render,
    split,
    texts_in,
    unknown,
    written_out,
)

OWN = ("npz", "folder", "csv")
"""Kinds of a user's own data."""
OPENML = "openml"
MOST_FOLDS = 20
GROUPED = {"chestmnist", "organamnist", "organcmnist", "organsmnist", "pathmnist"}
"""Sets with many images of one patient, scan or slide."""


@dataclass(frozen=True)
class Benchmark:
    """A data set and what is done to it; the fields after the path are arguments of its name."""

    name: str
    path: str = ""
    _: KW_ONLY
    size: int = 28
    as_rgb: bool = False
    folds: int = 0
    rows_per_class: int = 0
    labelled: int = 0
    """Labelled rows of each class; the other rows of the pool are unlabelled. 0: all are."""
    unlabelled: str = ""
    """folder:DIR or npz:FILE of unlabelled images, instead of those of the pool."""
    noise: float = 0.0
    noise_kind: Literal["symmetric", "pair"] = "symmetric"
    imbalance: float = 1.0
    imbalance_kind: Literal["half", "stratified"] = "half"
    meta_noise: float = 0.0
    groups: int | str | None = None
    """For a folder: the level below the classes whose folders are patients, or FILE.csv:COLUMN."""
    target: str | int = ""
    """For a table: the column that holds the classes, by its name, or its number from 0."""
    categorical: tuple[str | int, ...] = ()
    """For a table: columns of categories that would be read as numbers."""
    drop: tuple[str | int, ...] = ()
    """For a table: columns to leave out."""
    header: bool = True
    """For a table: whether its first line names the columns."""
    dedup: bool = False
    """For a table: leave out copies of rows."""
    rows: int = 0
    """For a table: use so many of its rows, stratified."""
    scale: Literal["quantile", "standard"] = "quantile"
    """For a table: how numbers are scaled."""
    id: str | int = ""
    """For openml: the number or name of the set."""
    version: int = 1
    """For openml, by name: its version."""

    @property
    def is_table(self) -> bool:
        """Whether its rows are those of a table."""
        return self.name in ("csv", OPENML) or self.name in TABLES

    @property
    def reading(self) -> Reading:
        """How its table is read."""
        categorical, drop = (tuple(map(str, each)) for each in (self.categorical, self.drop))
        return Reading(
            str(self.target), categorical, drop, self.header, self.dedup, self.rows,
            str(self.id), self.version,
        )  # fmt: skip

    @property
    def corrupts(self) -> bool:
        """Whether labels or class shares are corrupted."""
        return self.noise > 0 or self.imbalance > 1 or self.meta_noise > 0


def parse_benchmark(text: str) -> Benchmark:
    """The benchmark that ``text`` names.

    Raises:
        NamingError: an unknown name or argument, a value that is not allowed, or an ambiguous path.
    """
    call, path = _call_and_path(text)
    if call.name not in (*CATALOGUE, *TABLES, OPENML) and not path:
        known = [*CATALOGUE, *TABLES, "npz:FILE", "folder:DIR", "csv:FILE", "openml:ID"]
        raise unknown("benchmark", call.name, known)
    given = Benchmark(call.name, path, **bind(call, Benchmark, "benchmark"))
    benchmark = replace(
        given, size=_size(given), groups=_groups(given), unlabelled=_unlabelled(given)
    )
    _within(call.name, "size", benchmark.size, 8, 1024)
    if benchmark.folds:
        _within(call.name, "folds", benchmark.folds, 2, MOST_FOLDS)
        if call.name in GROUPED:
            raise NamingError(
                f"{call.name}: folds: expected none, because its official splits keep images of "
                "one patient, scan or slide together, and folds would not"
            )
    _check_table(benchmark, {name for name, _ in call.arguments})
    _within(call.name, "rows_per_class", benchmark.rows_per_class, 0, 10**9)
    _within(call.name, "labelled", benchmark.labelled, 0, 10**9)
    if benchmark.labelled and benchmark.corrupts:
        raise NamingError(
            f"{call.name}: labelled: expected none of noise, meta_noise and imbalance with it"
        )
    _within(call.name, "noise", benchmark.noise, 0, 1)
    _within(call.name, "meta_noise", benchmark.meta_noise, 0, 1)
    _within(call.name, "imbalance", benchmark.imbalance, 1, 10**6)
    return benchmark


def _check_table(benchmark: Benchmark, given: set[str]) -> None:
    """Refuse arguments of images for tables, and of tables for images."""
    name, of_images = benchmark.name, {"size", "as_rgb", "groups", "unlabelled"}
    of_tables = {"target", "categorical", "drop", "header", "dedup", "rows", "scale"}
    if name in TABLES:  # the catalogue knows its columns
        of_tables = {"dedup", "rows", "scale"}
        of_images |= {"target", "categorical", "drop", "header"}
    wrong = of_images if benchmark.is_table else of_tables | {"id", "version"}
    if name != OPENML:
        wrong = wrong | {"id", "version"}
    if refused := sorted(given & wrong):
        what = "tables" if benchmark.is_table else "images"
        takes = ", ".join(sorted(of_tables)) if benchmark.is_table else "size, as_rgb"
        raise NamingError(
            f"{name}: {refused[0]}: expected none, because its rows are those of {what}, which "
            f"take {takes}"
        )
    if name == OPENML and not str(benchmark.id):
        raise NamingError("openml: expected a number or name, such as openml:31(target=class)")
    _within(name, "rows", benchmark.rows, 0, 10**9)


def _call_and_path(text: str) -> tuple[Call, str]:
    """The name with its arguments, and for a user's own data their path."""
    kind, colon, rest = text.strip().partition(":")
    if colon and kind == OPENML:
        which = re.match(r"\s*([\w.+-]+)\s*(\(.*\))?$", rest, re.DOTALL)
        call = parse(f"{OPENML}{which[2] or ''}") if which else None
        if which is None or not isinstance(call, Call):
            raise NamingError(f"benchmark {text!r}: expected openml:ID or openml:NAME(version=1)")
        number = int(which[1]) if which[1].isdigit() else which[1]
        return Call(OPENML, (*call.arguments, ("id", number))), ""
    if not colon or kind not in OWN:
        file = Path(text.partition("(")[0].strip(" \"'"))
        if file.suffix in (".csv", ".tsv", ".npz"):
            own = f"npz:{file}" if file.suffix == ".npz" else f"csv:{file}(target=COLUMN)"
            raise NamingError(f"benchmark {text!r}: expected the kind of the file too, '{own}'")
        call = parse(text)
        if not isinstance(call, Call):
            raise NamingError(f"benchmark {text!r}: expected one name or call, not a chain")
        return call, ""
    path, arguments = _path_and_arguments(kind, rest)
    slip = re.search(r"\(\s*[a-z_]+\s*=[^()]*\)?$", path)
    if slip and not arguments and not _exists(path) and rest.strip()[-1:] not in "\"'":
        parse(f"{kind}{path[slip.start() :]}")  # its error says what cannot be read
    call = parse(f"{kind}{arguments}")
    assert isinstance(call, Call)  # a name, and perhaps parentheses
    return call, _absolute(kind, path)


def _size(benchmark: Benchmark) -> int:
    """The size, if the set has it; for a set with only one size, the default means that one."""
    name, size = benchmark.name, benchmark.size
    sizes = CATALOGUE[name].sizes if name in CATALOGUE else ()
    if sizes and size not in (*sizes, Benchmark.size):
        known = ", ".join(map(str, sizes))
        raise NamingError(f"{name}: size: expected one of {known}, got {size}")
    return Benchmark.size if len(sizes) == 1 else size


def _groups(benchmark: Benchmark) -> int | str | None:
    """Where the patients of a folder are named, in canonical form."""
    name, groups = benchmark.name, benchmark.groups
    if groups is not None and name != "folder":
        raise NamingError(
            f"{name}: groups: expected none, because this argument is only for folders (an npz "
            f"file contains train_groups and test_groups), got {groups!r}"
        )
    if isinstance(groups, int):
        _within(name, "groups", groups, 0, 9)
    if not isinstance(groups, str):
        return groups
    if groups.strip()[:1] in ("", "/", "~"):
        raise NamingError(  # it is part of a run's id, which must not depend on a machine's paths
            f"{name}: groups: expected a file by its path from the folder, such as "
            f"patients.csv or ../patients.csv:id, got {groups!r}"
        )
    return os.path.normpath(groups)


def _unlabelled(benchmark: Benchmark) -> str:
    """Where the unlabelled images are, with their whole path."""
    kind, colon, path = benchmark.unlabelled.partition(":")
    if not benchmark.unlabelled:
        return ""
    if kind not in ("folder", "npz") or not colon or not path.strip():
        raise NamingError(
            f"{benchmark.name}: unlabelled: expected 'folder:DIR' or 'npz:FILE' in quotes, got "
            f"{benchmark.unlabelled!r}"
        )
    return f"{kind}:{_absolute(kind, path.strip())}"


def _absolute(kind: str, path: str) -> str:
    try:
        return str(Path(path).expanduser().absolute())
    except RuntimeError as error:
        raise NamingError(f"{kind}: {path}: there is no such home directory") from error


def _path_and_arguments(kind: str, text: str) -> tuple[str, str]:
    """The path of a user's own data, and the arguments after it with their parentheses, or ""."""
    text = text.strip()
    quoted = re.match(r"""("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')\s*(\(.*\))?$""", text, re.DOTALL)
    readings = [(text, "")]
    if quoted:
        readings.append((_unquoted(quoted[1]), quoted[2] or ""))
    else:
        readings += [(text[:start].rstrip(), text[start:]) for start in _calls_at(kind, text)]
    there = [each for each in readings if each[0] and _exists(each[0])]
    if len(there) > 1:
        shown = " or ".join(f"{kind}:{path!r}{arguments}" for path, arguments in there)
        raise NamingError(f"benchmark {kind}:{text}: both paths exist; write {shown}")
    path, arguments = (there or readings[-1:])[0]
    if not path:
        raise NamingError(f"benchmark {kind + ':' + text!r}: expected a path after {kind}:")
    return path, arguments


def _unquoted(text: str) -> str:
    try:
        return str(ast.literal_eval(text))
    except (SyntaxError, ValueError) as error:
        raise NamingError(f"cannot read {text}: expected a path in quotes") from error


def _calls_at(kind: str, text: str) -> list[int]:
    """Where arguments may start: at parentheses that, up to the end of the text, form a call."""
    if not text.endswith(")"):
        return []
    for start in reversed([each.start() for each in re.finditer(r"\(", text)]):
        try:
            parse(f"{kind}{text[start:]}")
        except NamingError:
            continue
        return [start]
    return []


def _exists(path: str) -> bool:
    try:
        return Path(path).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # too long, a null byte, an unknown home folder
        return False


def names_in(text: str) -> list[str]:
    """The benchmarks in a text, separated by commas; an existing path may contain commas too."""
    found, rest = [], text
    while rest := rest.lstrip(", \t\n"):
        end = _own_end(rest)
        if not end:
            end = len(split(rest)[0])
        found.append(rest[:end].strip())
        rest = rest[end:]
    return found


def _own_end(text: str) -> int:
    """Where the first name ends if it is an existing path of a user's data: as late as possible."""
    kind, colon, _ = text.partition(":")
    if not colon or kind not in OWN:
        return 0
    for end in (len(text), *reversed([each.start() for each in re.finditer(",", text)])):
        path, _ = _path_and_arguments(kind, text[len(kind) + 1 : end])
        if _exists(path):
            return end
    return 0


def listed(value: Any) -> tuple[str, ...]:
    """The unique benchmarks in a study file's value, with braces expanded.

    A path that exists is taken literally, even if it contains braces.

    Raises:
        NamingError: something that does not name a benchmark.
    """
    found: dict[str, None] = {}
    for text in texts_in(value):
        for name in names_in(text):
            found |= dict.fromkeys([name] if _own_end(name) == len(name) else written_out(name))
    return tuple(found)


def check_seeds(benchmark: Benchmark, seeds: Iterable[int]) -> None:
    """Folds are tested in whole repeats: seeds 0 to 4 are one of five folds, 5 to 9 the next.

    Raises:
        NamingError: an incomplete repeat, for which there is no interval.
    """
    if benchmark.folds:
        repeats = Counter(seed // benchmark.folds for seed in set(seeds))
        if set(repeats.values()) - {benchmark.folds}:
            raise NamingError(
                f"{canonical(benchmark)}: expected seeds in whole repeats of {benchmark.folds} "
                f"(0 to {benchmark.folds - 1} and so on), got {sum(repeats.values())} seeds"
            )


def _within(name: str, field: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise NamingError(f"{name}: {field}: expected a number from {low} to {high}, got {value}")


def canonical(benchmark: Benchmark) -> str:
    """The benchmark's name with its arguments, without a path: that part of a run's id.

    Of unlabelled images it has the name of the folder or file.
    """
    defaults = asdict(Benchmark(name=""))
    arguments = {k: v for k, v in asdict(benchmark).items() if v != defaults[k]}
    if benchmark.unlabelled:
        kind, _, path = benchmark.unlabelled.partition(":")
        arguments["unlabelled"] = f"{kind}:{Path(path).name}"
    silent = {"name", "path"}  # and arguments without effect
    if benchmark.is_table:
        silent.add("size")
    if str(benchmark.id).isdigit():
        silent.add("version")
    if benchmark.noise == 0 and benchmark.meta_noise == 0:
        silent.add("noise_kind")
    if benchmark.imbalance == 1:
        silent.add("imbalance_kind")
    if benchmark.name == "npz":
        silent.add("size")
    if benchmark.name in CATALOGUE and CATALOGUE[benchmark.name].channels == 3:
        silent.add("as_rgb")
    arguments = {k: v for k, v in arguments.items() if k not in silent}
    return render(call_of(benchmark.name, arguments))
