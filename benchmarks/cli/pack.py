"""``augbench pack`` and ``augbench unpack``: runs in one file; need neither torch nor ray."""

from __future__ import annotations

import shlex
import sys
import traceback
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from analysis import inventory, packing, question, records, runs
from benchmarks.cli.arguments import PackCommand, UnpackCommand, UsageError
from benchmarks.cli.runs import size_text
from benchmarks.running.codes import FAILURE, USAGE
from methods.naming import NamingError

MIB = 2**20
FOLDER, FILE = Path("runs"), Path("runs.tar.zst")


def carry_out(command: PackCommand | UnpackCommand) -> int:
    """Run the command; return the exit code."""
    try:
        return _pack(command) if isinstance(command, PackCommand) else _unpack(command)
    except BrokenPipeError:
        raise
    except (NamingError, UsageError, OSError, runs.Held) as error:
        if command.debug:
            traceback.print_exc()
        print(f"augbench: {error}", file=sys.stderr)
        return FAILURE if isinstance(error, OSError | runs.Held) else USAGE


def _pack(command: PackCommand) -> int:
    choice = inventory.choice(command.where)
    root, out = _folder_and_file(command.paths)
    if not root.is_dir():
        raise UsageError(f"expected a results folder, got {root}")
    if out.is_dir():
        raise UsageError(f"expected a file to write, got the directory {out}")
    if command.piece is not None and command.piece < 1:
        raise UsageError(f"piece: expected 1 MiB or more, got {command.piece}")
    studies = [command.study] if command.study else question.names(root)
    of_study = {study: question.read(root, study).runs for study in studies}
    found = [
        each
        for each in choice.of(inventory.items(root))
        if not command.study or each.id in of_study[command.study]
    ]
    chosen = [each for each in found if each.state in records.STATES and _is_own(each)]
    if not chosen:
        raise UsageError(f"runs: expected finished runs to pack, found none in {root}")
    ids = {each.id for each in chosen}
    studies = [study for study in studies if ids & of_study[study]]
    members = packing.members(root, [each.folder for each in chosen], studies, not command.study)
    with _bar(sum(each.size for each in members), "packing") as bar:
        piece = (command.piece or 0) * MIB
        try:
            written = packing.pack(members, out, piece, bar.update)
        except OSError as error:
            raise _named(error, out) from error
    size = sum(path.stat().st_size for path in written)
    where = f"{written[0]}" + (f" to {written[-1].name}" if len(written) > 1 else "")
    states = Counter(each.state for each in found if each.id not in ids)
    left = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    told = f" Left out: {left}." if left else ""
    print(f"Packed {_counted(len(chosen))} into {where} ({size_text(size)}).{told}")
    return 0


def _folder_and_file(paths: Sequence[Path]) -> tuple[Path, Path]:
    """The results folder and the file to write, either of which may be left out."""
    if len(paths) > 2:
        raise UsageError(f"expected a results folder and a file, got {len(paths)} paths")
    given = [path.expanduser() for path in paths]
    if len(given) == 1 and given[0].suffix == FILE.suffix:
        return FOLDER, given[0]
    folder, file, *_ = [*given, *(FOLDER, FILE)[len(given) :]]
    return folder, file


def _is_own(item: inventory.Item) -> bool:
    return item.run is not None and item.run.id == item.id


def _unpack(command: UnpackCommand) -> int:
    if not command.files:
        raise UsageError("files: expected a file written by augbench pack, got none")
    root = command.into.expanduser()
    if root.exists() and not root.is_dir():
        raise UsageError(f"into: expected a directory, found the file {command.into}")
    packs = packing.packs([path.expanduser() for path in command.files])
    there = root.is_dir()
    work = packing.workplace(root)
    try:
        with runs.locked(work):
            try:
                return _unpack_all(root, packs, work)
            finally:
                packing.empty(work)
    finally:
        with suppress(OSError):  # another process is unpacking there
            work.rmdir()
        if not there:
            with suppress(OSError):  # it contains runs
                root.rmdir()


def _unpack_all(root: Path, packs: Sequence[Sequence[Path]], work: Path) -> int:
    counts, whole = Counter[str](), root.resolve()
    beside: Counter[Path] = Counter()
    for files in packs:
        packing.empty(work)
        with _bar(sum(path.stat().st_size for path in files), "unpacking") as bar:
            try:
                ids = packing.extract(files, work, bar.update)
            except OSError as error:
                raise _named(error, root) from error
        placed = packing.places(whole, [work / name for name in ids])
        # the results folder first: its contents decide where other runs go
        order = sorted(placed.items(), key=lambda each: (each[1] != whole, each[0]))
        moved: dict[Path, set[str]] = {}
        for folder, place in order:
            try:
                outcome = packing.move_in(folder, place / folder.name)
            except (packing.PackError, runs.Held) as error:
                print(f"not unpacked: {folder.name}: {error}", file=sys.stderr)
                counts["refused"] += 1
                continue
            counts[outcome] += 1
            moved.setdefault(place, set()).add(folder.name)
            if place != whole:
                beside[place] += 1
        for place, own in moved.items():
            for kept in packing.move_studies(work, place, own):
                print(f"not unpacked: {kept} exists, differs and was kept", file=sys.stderr)
    refused = counts["refused"] > 0
    for place, count in sorted(beside.items()):
        again = shlex.join(["augbench", "report", str(place)])
        print(
            f"{_counted(count)} from another device or with other versions in {place}. "
            f"Report: {again}",
            file=sys.stderr,
        )
    told = f"Unpacked {_counted(counts['unpacked'])} into {root}"
    told += f"; {counts['there already']} there already" if counts["there already"] else ""
    print(f"{told}; {counts['refused']} refused." if refused else f"{told}.")
    return FAILURE if refused else 0


def _named(error: OSError, path: Path) -> OSError:
    """The error with the name of the file, which the error of a full disk lacks."""
    if error.errno is None or error.filename is not None:
        return error
    return runs.StorageError(error.errno, error.strerror, str(path))


def _bar(total: int, what: str) -> Any:
    """A progress bar, shown only on a terminal."""
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, leave=False, disable=None)


def _counted(count: int) -> str:
    return f"{count} run{'s' * (count != 1)}"
