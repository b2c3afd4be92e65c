"""Weights from a file: read, told apart by content, and copied into a network if they fit."""

from __future__ import annotations

import hashlib
import importlib
import pickle
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from analysis import runs

SHOWN = 3
"""Tensors that an error names."""
FROZEN = "trunk.backbone."
"""Where a network with a frozen trunk has the rest of itself."""
FIRST, SECOND = ".main.", ".auxiliary."
"""Where a ``BranchedNorm`` has its norms."""
OPTIONAL = ("num_batches_tracked", "normalize.mean", "normalize.std")
"""Ends of names that a file may lack."""
INSIDE = ("state_dict", "model")
"""Under which names a checkpoint may hold the weights beside other things."""


def checksum(file: str) -> str:
    """A hash of the tensors in a file, whatever its path and format.

    Raises:
        ValueError: it cannot be read.
    """
    told = _path(file).stat()
    return _digest(file, told.st_mtime_ns, told.st_size)


@cache
def _digest(file: str, changed: int, size: int) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(read(file).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _path(file: str) -> Path:
    path = Path(file).expanduser()
    if not path.is_file():
        raise ValueError(f"weights: no file {file!r} in {Path.cwd()}")
    return path


def read(file: str) -> dict[str, Tensor]:
    """The tensors by name in a .safetensors file, or in one that ``torch.save`` wrote.

    Raises:
        ValueError: it cannot be read, or holds something else.
    """
    path = _path(file)
    if path.suffix == ".safetensors":
        try:
            safetensors = importlib.import_module("safetensors.torch")  # comes with timm
        except ModuleNotFoundError as error:
            raise ValueError(
                f"weights: {file!r} needs the package safetensors: pip install safetensors"
            ) from error
        try:
            return safetensors.load_file(path)
        except safetensors.SafetensorError as error:
            raise ValueError(f"weights: {file!r} is no safetensors file: {error}") from error
    try:
        with torch.device("cpu"):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        raise ValueError(
            f"weights: {file!r} cannot be read as a dict of tensors that torch.save(model."
            f"state_dict(), FILE) writes: {str(error).strip().partition(chr(10))[0]}"
        ) from error
    return _tensors(found, file)


def _tensors(found: Any, file: str) -> dict[str, Tensor]:
    for name in INSIDE:
        if isinstance(found, Mapping) and isinstance(found.get(name), Mapping):
            found = found[name]
    if not isinstance(found, Mapping) or not all(isinstance(v, Tensor) for v in found.values()):
        raise ValueError(f"weights: expected tensors by name in {file!r}, as in a state_dict")
    return {str(name).removeprefix("module."): value for name, value in found.items()}


def plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights as a network has them that no method changed, from a saved one of a frozen trunk or
    of two sets of norms; of these it is the first, with which predictions are made."""
    second = {name for name in state if SECOND in name and name.replace(SECOND, FIRST) in state}
    first = {name.replace(SECOND, FIRST) for name in second}
    return {
        (name.replace(FIRST, ".") if name in first else name).replace(FROZEN, "", 1): tensor
        for name, tensor in state.items()
        if name not in second
    }


def copy_into(network: nn.Module, state: Mapping[str, Tensor], head: str, file: str) -> bool:
    """Copy weights by name; ``head`` is left as it is if the file's has another shape, or none.

    The answer is whether the head was copied.

    Raises:
        ValueError: names the first tensors that are missing, unexpected or of another shape.
    """
    own, given = network.state_dict(), dict(state)
    of_head = [name for name in (f"{head}.weight", f"{head}.bias") if name in own]
    fits = all(name in given and given[name].shape == own[name].shape for name in of_head)
    if not fits:
        for name in of_head:
            own.pop(name)
            given.pop(name, None)
    missing = [name for name in own if name not in given and not name.endswith(OPTIONAL)]
    unknown = [name for name in given if name not in own]
    shapes = [
        f"{name} is {_shape(given[name])} instead of {_shape(own[name])}"
        for name in own
        if name in given and given[name].shape != own[name].shape
    ]
    told = [
        _told(len(listed), what, listed)
        for what, listed in (
            ("missing", missing),
            ("unexpected", unknown),
            ("of another shape", shapes),
        )
        if listed
    ]
    if told:
        raise ValueError(
            f"weights: {file!r} does not fit this network: {'; '.join(told)}{_whose(_path(file))}"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            if name in given:
                tensor.copy_(given[name])
    return fits


def _whose(path: Path) -> str:
    """Of the network of a run, the name that it fits."""
    if path.name != runs.MODEL or not (path.parent / "run.json").is_file():
        return ""
    run, _ = runs.read_run(path.parent)
    return f"; it is of a run with the network {run.model}, whose weights fit that alone"


def _told(number: int, what: str, listed: list[str]) -> str:
    shown = ", ".join(listed[:SHOWN]) + (", ..." if number > SHOWN else "")
    return f"{number} {'tensor' if number == 1 else 'tensors'} {what} ({shown})"


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"
