"""A run: its cell, its id, its directory and its state on disk. Needs neither torch nor ray."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, field, fields
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import numpy as np
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

VERSION = 1
"""Raised whenever the trainer's numbers or the run format change; part of a run's id."""

MODEL = "model.pt"
"""In a run's directory: the network, if it was saved."""
CONFIG = ConfigDict(extra="forbid")

UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError)
"""What reading a damaged file of a run raises."""


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Training:
    """How a network is trained; every field can override that of a preset."""

    epochs: int = 100
    batch_size: int = 128
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    momentum: float = 0.9
    """sgd only; Nesterov momentum if above 0"""
    schedule: Literal["multistep", "cosine", "constant"] = "multistep"
    milestones: tuple[float, ...] = (0.5, 0.75)
    """multistep: fractions of the epochs after which the rate falls"""
    gamma: float = 0.1
    """multistep: the factor"""
    warmup_epochs: int = 0
    """epochs over which the rate rises from a tenth"""
    precision: Literal["float32", "tf32", "bfloat16", "float16"] = "float32"
    channels_last: bool = False
    compile: bool = False
    ema: float = 0.0
    """predict with running means of the parameters, which keep this share at each step; 0: off"""
    steps_per_epoch: int = 0
    """where an epoch of the labelled rows says nothing: so many full batches; 0: one pass"""

    def __post_init__(self) -> None:
        positive = ("epochs", "batch_size", "learning_rate", "gamma")
        for name in positive:
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a number above 0, got {getattr(self, name)}")
        if self.batch_size < 2:
            raise ValueError(f"batch_size: expected 2 or more (BatchNorm), got {self.batch_size}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay: expected 0 or more, got {self.weight_decay}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema: expected a share in [0, 1), got {self.ema}")
        if self.steps_per_epoch < 0:
            raise ValueError(f"steps_per_epoch: expected 0 or more, got {self.steps_per_epoch}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum: expected a number in [0, 1), got {self.momentum}")
        if not all(0 < milestone < 1 for milestone in self.milestones):
            raise ValueError(f"milestones: expected shares in (0, 1), got {self.milestones}")
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(
                f"warmup_epochs: expected 0 to {self.epochs - 1} (below epochs), got "
                f"{self.warmup_epochs}; set --warmup-epochs with few epochs"
            )


LATER = ("ema", "steps_per_epoch")
"""Fields that are part of a run's id only where they are set."""
OPTIONS = (
    "epochs",
    "batch_size",
    "optimizer",
    "learning_rate",
    "weight_decay",
    "momentum",
    "schedule",
    "warmup_epochs",
    "precision",
    "ema",
    "steps_per_epoch",
)
FLAGS = ("channels_last", "compile")
"""Fields of a training that the command line can set."""

PRESETS: dict[str, tuple[str, Training]] = {
    "medmnist": (
        "Yang et al., MedMNIST v2, Sci. Data 2023, arXiv:2110.14795",
        Training(channels_last=True),
    ),
    "autodo": (
        "Gudovskiy et al., AutoDO, CVPR 2021, arXiv:2103.05863",
        Training(
            epochs=200,
            batch_size=256,
            optimizer="sgd",
            learning_rate=0.1,
            weight_decay=1e-4,
            schedule="cosine",
            warmup_epochs=5,
            channels_last=True,
        ),
    ),
}


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Run:
    """One cell of a comparison: everything that determines its numbers, and nothing else."""

    benchmark: str
    data: str
    """checksum of the data"""
    model: str
    method: str
    control: Literal["all", "train", "train+meta", "meta"] = "all"
    """labelled rows trained on; anything but "all" makes it a control row"""
    protocol: Literal["equal", "paper"] = "equal"
    meta_fraction: float = 0.2
    crossfit: int = 1
    training: Training = field(default_factory=Training)
    seed: int = 0
    threads: int = 1
    budget: str = "steps"
    """"steps", or "passes of METHOD" or "time of METHOD" if epochs were set to match it"""
    oracle_test: bool = False
    """record test metrics each epoch, to compare with papers that choose their epoch on test"""
    versions: dict[str, int] = field(default_factory=dict)
    """of method, model and trainer"""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed: expected 0 or more, got {self.seed}")
        if self.threads < 1:
            raise ValueError(f"threads: expected 1 or more, got {self.threads}")

    @cached_property
    def id(self) -> str:
        """Sixteen hexadecimal digits, a hash of exactly these fields."""
        fields = asdict(self)  # type: ignore[call-overload]
        for name in LATER:
            if not fields["training"][name]:  # ids of earlier runs lack it
                del fields["training"][name]
        text = json.dumps(fields, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def row(self) -> str:
        """The row's name in a table: ``none``, ``none@train``, ``none [passes of saflex]``."""
        control = "" if self.control == "all" else self.control
        return row_name(self.method, control, "" if self.budget == "steps" else self.budget)


def row_name(method: str, control: str = "", budget: str = "") -> str:
    """The name of a row from its parts."""
    return method + (f"@{control}" if control else "") + (f" [{budget}]" if budget else "")


def row_parts(name: str) -> tuple[str, str, str]:
    """Method, control and budget, the last two possibly empty: the inverse of ``row_name``."""
    found = re.fullmatch(r"(.*\S)\s*\[((?:passes|time) of .+)\]", name.strip())
    row, budget = (found[1], found[2]) if found else (name.strip(), "")
    method, _, control = row.partition("@")
    return method.strip(), control.replace(" ", ""), budget


class Status(NamedTuple):
    """The state of a run directory."""

    state: Literal["new", "interrupted", "done", "failed", "skipped", "stopped"]
    reason: str = ""


def folder_of(root: Path, run: Run) -> Path:
    """The run's directory under the results folder."""
    return root / run.id


def status_of(folder: Path) -> Status:
    """The state of a run directory; with truncated files it counts as interrupted."""
    result = read_result(folder)
    if result is not None:
        return Status(result["status"], result.get("reason", ""))
    if (folder / "checkpoint.pt").exists():
        return Status("interrupted")
    return Status("new")


def read_result(folder: Path) -> dict[str, Any] | None:
    """result.json, or None if it or a file that it names is missing or truncated."""
    try:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        json.loads((folder / "run.json").read_text(encoding="utf-8"))
        sizes = result["files"]
        intact = all((folder / name).stat().st_size == size for name, size in sizes.items())
    except UNREADABLE:
        return None
    return result if intact else None


def read_run(folder: Path) -> tuple[Run, dict[str, Any]]:
    """The cell in run.json and what was recorded with it.

    Raises:
        ValueError: the file is not a run of this format.
        OSError: it cannot be read.
    """
    text = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    cell = dict(text["run"])
    cell["training"] = Training(**cell["training"])
    if not isinstance(text["recorded"], dict):
        raise ValueError("recorded is not an object")
    return Run(**cell), text["recorded"]


def folders(root: Path) -> Iterator[Path]:
    """Every run directory under the results folder, in order of id."""
    if root.is_dir():
        yield from sorted(path.parent for path in root.glob("*/run.json"))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file; null becomes nan."""
    text = path.read_text(encoding="utf-8")
    return [with_nan(json.loads(line)) for line in text.splitlines()]


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a .npz file, such as predictions.npz with its logits and targets."""
    with np.load(path, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}


def to_json(value: Any) -> str:
    """JSON on one line; numbers that are not finite become null."""
    return json.dumps(_finite(value), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def with_nan(value: Any) -> Any:
    """The reverse of ``to_json`` for metrics: null becomes nan."""
    if isinstance(value, dict):
        return {key: with_nan(each) for key, each in value.items()}
    if isinstance(value, list):
        return [with_nan(each) for each in value]
    return math.nan if value is None else value


class StorageError(OSError):
    """A result that could not be written; ``filename`` says which."""


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any], shared: bool = False) -> None:
    """Write a temporary file and rename it, so that ``path`` is complete or does not exist.

    ``shared``: several processes may write it at once, and the last one wins.

    Raises:
        StorageError: it names ``path``; nothing is left behind.
    """
    own = f".{secrets.token_hex(8)}" if shared else ""  # else what a killed process left is reused
    partial = path.with_name(f".{path.name}{own}.part")
    try:
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        # On a full disk torch.save raises its own error, with the OSError as its context.
        hidden = error.__context__ if isinstance(error, RuntimeError) else None
        cause = hidden if isinstance(hidden, OSError) else error
        if isinstance(cause, OSError):
            raise StorageError(cause.errno, cause.strerror, str(path)) from error
        raise


def write_text(path: Path, text: str, shared: bool = False) -> None:
    """Write a text file atomically."""
    write_atomically(path, lambda file: file.write(text.encode()), shared)


NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)
"""What ``flock`` answers where the file system has no locks."""


def locks_hold(folder: Path) -> bool:
    """Whether a lock on a file of this folder keeps a second one out on this machine."""
    path = folder / f".lock-{secrets.token_hex(8)}"
    try:
        with path.open("a+", encoding="utf-8") as one, path.open("a+", encoding="utf-8") as other:
            flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            return False
    finally:
        path.unlink(missing_ok=True)


def flock(file: IO[Any], how: int) -> None:
    """Lock an open file; do nothing where the file system has no locks.

    Raises:
        BlockingIOError: another holds it, and ``how`` says not to wait.
    """
    try:
        fcntl.flock(file, how)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise


class Held(RuntimeError):
    """Another live process is working on the run; the message says which."""


@contextmanager
def locked(folder: Path, wait: Callable[[str], None] | None = None) -> Iterator[None]:
    """Lock the run's directory, creating it if needed; the kernel frees the lock of a process that
    died.

    With ``wait``, this waits for the lock and calls ``wait`` once with the holder's name.

    Raises:
        Held: another process holds the lock and ``wait`` is None.
    """
    path = folder / "lock"
    while True:
        folder.mkdir(parents=True, exist_ok=True)  # the former holder may have deleted it
        file = path.open("a+", encoding="utf-8")
        try:
            _acquire(file, wait)
            # The former holder removes the file: a lock on a removed file protects nothing.
            if is_at(file, path):
                break
        except BaseException:
            file.close()
            raise
        file.close()
    try:
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        holder = f"process {os.getpid()} on {socket.gethostname()} since {since}"
        with suppress(OSError):  # on a full disk the lock works without naming its holder
            file.truncate(0)
            os.write(file.fileno(), holder.encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()


def holder_of(folder: Path) -> str:
    """The live process that has locked a run's directory; empty if none has."""
    try:
        with (folder / "lock").open(encoding="utf-8") as file:
            flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return ""
    except BlockingIOError:
        return _holder_in(folder / "lock")
    return ""


def _holder_in(path: Path) -> str:
    with suppress(FileNotFoundError):
        return path.read_text(encoding="utf-8").strip() or "another process"
    return ""  # it has ended in the meantime


class Extent(NamedTuple):
    """The size of a run's files, and when one of them was last written."""

    size: int
    """bytes"""
    changed: float
    """seconds since 1970"""


def extent_of(folder: Path) -> Extent:
    """The extent of a run's directory without its lock and files deleted in the meantime."""
    files: list[os.stat_result] = []
    with suppress(FileNotFoundError), os.scandir(folder) as found:
        for each in found:
            if each.name != "lock":
                with suppress(FileNotFoundError):
                    files.append(each.stat(follow_symlinks=False))
    sizes = (each.st_size for each in files)
    return Extent(sum(sizes), max((each.st_mtime for each in files), default=0.0))


def delete(folder: Path, expected: Extent) -> None:
    """Delete a run's directory unless it has changed.

    If interrupted, this leaves an unfinished run, which can be resumed or deleted again:
    result.json is deleted first, and run.json last.

    Raises:
        Held: a live process is working on it.
        OSError: it has changed, contains directories, or a file cannot be deleted.
    """
    first, last = "result.json", "run.json"
    with locked(folder):
        if extent_of(folder) != expected:
            raise OSError(f"{folder} has changed in the meantime")
        paths = [path for path in folder.iterdir() if path.name not in (first, last, "lock")]
        if folders := [path for path in paths if path.is_dir() and not path.is_symlink()]:
            raise OSError(f"expected only files, got the directory {folders[0]}")
        for path in (folder / first, *paths, folder / last):
            path.unlink(missing_ok=True)
    folder.rmdir()


def is_at(file: IO[Any], path: Path) -> bool:
    """Whether the open file is still the one at ``path``, neither removed nor replaced."""
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(file.fileno()), there)


def _acquire(file: IO[str], wait: Callable[[str], None] | None) -> None:
    try:
        flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
    if wait is None:
        raise Held(f"{Path(file.name).parent} is held by {holder}")
    wait(holder)
    flock(file, fcntl.LOCK_EX)


def field_names(kind: type) -> tuple[str, ...]:
    """Names of the fields of a dataclass."""
    return tuple(each.name for each in fields(kind))
