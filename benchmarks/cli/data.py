"""``augbench data``: lists, describes, fetches and verifies data sets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.cli import arguments
from benchmarks.cli.arguments import UsageError
from benchmarks.cli.common import (
    root_of,
)
from benchmarks.data import facts, ondisk, sources, splits, tables
from benchmarks.data.catalogue import CATALOGUE
from benchmarks.data.download import DataError, md5_of
from benchmarks.data.names import (
    OPENML,
    OWN,
    Benchmark,
    names_in,
    parse_benchmark,
)
from benchmarks.data.ondisk import gib
from benchmarks.data.table_catalogue import TABLES
from benchmarks.running.codes import FAILURE


def carry_out(command: arguments.DataCommand) -> int:
    """Run the command; return the exit code."""
    root = root_of(command.data)
    if command.action == "remove":
        return _remove(root, command.names)
    names = [name for text in command.names for name in names_in(text)]
    benchmarks = [parse_benchmark(text) for text in names or CATALOGUE]
    if command.action == "show":
        return _show(root, benchmarks if names else [])
    for text, benchmark in zip(names, benchmarks, strict=False):
        if benchmark.path:
            own = "; augbench data show describes your own" if benchmark.is_table else ""
            raise UsageError(f"names: expected an official data set, got {text!r}{own}")
    if not names:
        benchmarks += map(parse_benchmark, [*TABLES, *tables.fetched(root)])
    if command.action == "list":
        _list(root, benchmarks)
        return 0 if names else _list_streamed(root)
    if command.action == "verify":
        return _verify(root, benchmarks, given=bool(names))
    if not names:
        raise UsageError("names: expected data sets to fetch, such as breastmnist")
    for text, benchmark in zip(names, benchmarks, strict=True):
        arrays = splits.arrays_of(benchmark, root)
        print(f"{text}: {len(arrays.train_y)} training rows, MD5 {arrays.checksum}")
    return 0


def _show(root: Path, benchmarks: Sequence[Benchmark]) -> int:
    """Print the contents of each data set, without downloading anything."""
    if not benchmarks:
        raise UsageError("names: expected data sets to show, such as breastmnist or folder:DIR")
    for benchmark in benchmarks:
        print("\n".join(facts.lines(splits.arrays_of(benchmark, root, download=False), benchmark)))
    return 0


def _list(root: Path, benchmarks: Sequence[Benchmark]) -> None:
    print(f"Data folder: {root}")
    for benchmark in benchmarks:
        if benchmark.is_table:
            name, there, licence = _table(root, benchmark)
            print(f"  {name:<16} {'on disk' if there else 'not on disk':<24} {licence}")
            continue
        name, entry = benchmark.name, CATALOGUE[benchmark.name]
        there = [f"{size}" for size in entry.sizes if None not in sources.locate(entry, size, root)]
        state = f"on disk: {', '.join(there)} px" if there else "not on disk"
        state = state if any(entry.files.values()) else "ships with scikit-learn"
        print(f"  {name:<16} {state:<24} {entry.licence}")


def _table(root: Path, benchmark: Benchmark) -> tuple[str, Path | None, str]:
    """The name of a table, its file if it is there (that of a checksum for OpenML), its licence."""
    if benchmark.name in TABLES:
        entry = TABLES[benchmark.name]
        return entry.name, tables.located(entry, root), entry.licence
    kept, version = tables.remembered(benchmark.reading, root), benchmark.version
    name = f"{OPENML}:{benchmark.id}{f'(version={version})' if version > 1 else ''}"
    return name, kept if kept.exists() else None, "see https://www.openml.org"


def _list_streamed(root: Path) -> int:
    """What was decoded once, to be streamed from disk."""
    found = list(ondisk.sets(root))
    if found:
        print(f"Streamed from {root / 'cache'} (augbench data remove NAME deletes one):")
    for each in found:
        state = f"decoded from {each.source}" if each.source else "not complete"
        state = f"being written by {each.holder}" if each.holder else state
        print(f"  {each.name:<40} {gib(each.size):>7} GiB  {state}")
    return 0


def _remove(root: Path, names: Sequence[str]) -> int:
    """Delete streamed sets."""
    if not names:
        raise UsageError("names: expected streamed sets to remove; augbench data list shows them")
    for name in names:
        if name.startswith(tuple(f"{kind}:" for kind in (*OWN, OPENML))) or name in TABLES:
            _refuse_removal(root, name)
        print(f"{name}: {gib(ondisk.remove(root, name))} GiB removed")
    return 0


def _refuse_removal(root: Path, name: str) -> None:
    """Say where a set is that is not streamed."""
    benchmark = parse_benchmark(name)
    where = Path(benchmark.path) if benchmark.path else _table(root, benchmark)[1]
    told = "it is not on disk"
    if where is not None:
        is_openml = benchmark.name == OPENML
        told = f"it is in {where.parent}" if is_openml else f"its file is {where}"
    raise UsageError(f"names: {name} is no streamed set, and only these are removed: {told}")


def _verify_table(root: Path, benchmark: Benchmark) -> bool:
    """Print whether the file of a table is the one that we know; whether it is."""
    name, path, _ = _table(root, benchmark)
    if path is None:
        entry = TABLES.get(benchmark.name)
        print(f"{name}: not found{f'; get {entry.file} from {entry.where}' if entry else ''}")
        return False
    if benchmark.name == OPENML:
        try:
            md5 = tables.openml(benchmark.reading, root, download=False)[2]
        except DataError as error:
            print(error)
            return False
        print(f"{name}: correct, as when it was first read, MD5 {md5}")
        return True
    entry, md5 = TABLES[benchmark.name], md5_of(path)
    right = not entry.md5 or entry.md5 == md5
    state = "correct" if right else f"WRONG, MD5 {md5}"
    if not entry.md5:
        state = f"no checksum is known of it, MD5 {md5}"
    print(f"{path.name}: {state} ({path}){f', expected {entry.md5}' if entry.md5 else ''}")
    return right


def _verify(root: Path, benchmarks: Sequence[Benchmark], given: bool) -> int:
    seen = bad = 0
    for benchmark in benchmarks:
        if benchmark.is_table:
            if given or _table(root, benchmark)[1] is not None:
                seen, bad = seen + 1, bad + (not _verify_table(root, benchmark))
            continue
        entry = CATALOGUE[benchmark.name]
        for size in (benchmark.size,) if given else entry.sizes:
            for file, path, md5, right in sources.verify(entry, size, root):
                if path is None and not given:
                    continue
                state = "correct" if right else "not found" if path is None else f"WRONG, MD5 {md5}"
                print(f"{file.name}: {state}{f' ({path})' if path else ''}, expected {file.md5}")
                seen, bad = seen + 1, bad + (not right)
    if not seen:
        print(f"Nothing to verify: no file of these data sets is in {root}.")
    return FAILURE if bad else 0
