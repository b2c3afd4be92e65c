"""``augbench doctor``: what a run would use on this machine, and whether its steps are correct."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from analysis.numbers import count
from benchmarks.cli import arguments
from benchmarks.cli.arguments import UsageError
from benchmarks.cli.common import device_of, root_of
from benchmarks.data import sources, tables
from benchmarks.data.catalogue import CATALOGUE
from benchmarks.data.table_catalogue import TABLES
from benchmarks.running import agreement, capacity
from benchmarks.running.codes import FAILURE
from benchmarks.running.problems import IN_THE_WAY
from benchmarks.training.errors import first_line
from benchmarks.training.machine import describe_device
from benchmarks.training.precision import automatic
from benchmarks.training.trainer import threads

OPTIONAL = ("timm", "torchcam", "optuna", "tensorboard", "wandb", "mlflow")
LOW_GIB = 1.0
"""Free space for results below which there is a warning."""


def carry_out(command: arguments.DoctorCommand) -> int:
    """Print what was found; return the exit code."""
    for name in ("threads", "jobs"):
        value = getattr(command, name)
        if value is not None and value < 1:
            raise UsageError(f"{name}: expected 1 or more, got {value}")
    device = torch.device(device_of(command.device))
    has = capacity.cores()
    jobs = command.jobs or (1 if device.type != "cpu" else max(1, has // command.threads))
    shared = device.type == "cuda" and command.jobs is None
    data, out = root_of(command.data), command.out.expanduser().absolute()
    bad, warnings = [], []
    _say("Versions", f"augbench {version('augbench')}, torch {torch.__version__}, "
         f"Python {platform.python_version()}")  # fmt: skip
    for line in _devices(device):
        _say("Device", line)
    _say("Precision", f"float32; --precision auto would be {automatic()}")
    at_once = "as many runs as measured to be fastest" if shared else count(jobs, "run")
    each = count(command.threads, "thread")
    _say("CPU", f"{count(has, 'core')}; {at_once} at a time with {each} each")
    warnings.append(capacity.crowded(jobs, command.threads))
    unusable = _unusable(data, write=False)
    _say("Data", f"{data}: {unusable or _sets(data)}")
    if unusable:
        bad.append(f"the data folder cannot be used: {data}: {unusable}")
    unusable = _unusable(out, write=True)
    if unusable:
        bad.append(f"the results folder cannot be used: {out}: {unusable}")
        _say("Results", f"{out}: {unusable}")
    else:
        free = shutil.disk_usage(_existing(out)).free / 2**30
        _say("Results", f"{out}: {free:,.1f} GiB free")
        if free < LOW_GIB:
            warnings.append(f"only {free:.2f} GiB are free for results in {out}")
    ray = _version("ray")
    _say("Ray", ray or "not installed: use --executor local")
    found = {name: _version(name) for name in OPTIONAL}
    _say("Optional", ", ".join(f"{name} {there or 'no'}" for name, there in found.items()))
    with threads(command.threads):
        told, right = _step(device)
    _say("Step", told)
    if not right:
        bad.append(f"a training step on {device.type} does not agree with the CPU")
    for text in filter(None, warnings):
        print(f"Warning: {text}")
    for text in bad:
        print(f"Wrong: {text}")
    return FAILURE if bad else 0


def _say(what: str, text: str) -> None:
    print(f"{what:<10} {text}", flush=True)


def _devices(device: torch.device) -> list[str]:
    """A line for each GPU, or one for the CPU."""
    if device.type == "cuda":
        lines = []
        for number in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(number)
            lines.append(
                f"cuda:{number}: {card.name}, {card.total_memory / 2**30:.1f} GiB, compute "
                f"capability {card.major}.{card.minor}"
            )
        return lines
    name = describe_device(device)["name"]
    if device.type == "cpu" and not torch.cuda.is_available():
        built = torch.version.cuda
        why = "no GPU was found" if built else "no GPU: this torch is built without CUDA"
        return [f"cpu: {name}; {why}"]
    return [f"{device.type}: {name}"]


def _existing(path: Path) -> Path:
    """A folder, or the nearest one above it that exists."""
    return next(each for each in (path, *path.parents) if each.exists())


def _unusable(folder: Path, write: bool) -> str:
    """Why a folder, which is created if missing, cannot be read or written; else ""."""
    there = _existing(folder)
    if not there.is_dir():
        return IN_THE_WAY
    write = write or there != folder
    if not os.access(there, os.R_OK | os.X_OK | (os.W_OK if write else 0)):
        return f"no permission to {'write to' if write else 'read'} {there}"
    return ""


def _sets(root: Path) -> str:
    """The data sets on disk, by name and size; their contents are not read."""
    found = []
    for name, entry in CATALOGUE.items():
        if not any(entry.files.values()):
            found.append(f"{name} (ships with scikit-learn)")
            continue
        sizes = [size for size in entry.sizes if None not in sources.locate(entry, size, root)]
        if sizes:
            text = "" if sizes == [28] else f" ({', '.join(map(str, sizes))} px)"
            found.append(f"{name}{text}")
    found += [name for name, entry in TABLES.items() if tables.located(entry, root)]
    found += tables.fetched(root)
    return ", ".join(found)


def _version(package: str) -> str:
    """The version of a package; empty if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _step(device: torch.device) -> tuple[str, bool]:
    """The result of a step on the device, and whether it is correct."""
    try:
        found = agreement.look(device)
    except RuntimeError as error:
        return f"raised {first_line(error)}", False
    compared = f"{device.type}, float32" if device.type != "cpu" else "float32 (there is no GPU)"
    verdict = "agrees" if found.right else "does NOT agree"
    return (
        f"{compared} {verdict} with float64 on the CPU: loss off by {found.loss:.1e}, gradient by "
        f"{found.gradient:.1e} (limit {agreement.LIMIT:.0e})",
        found.right,
    )
