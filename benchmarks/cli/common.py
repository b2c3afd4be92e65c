"""What the commands share: options and cells from what the command line says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from analysis import runs
from benchmarks.cli import arguments
from benchmarks.cli.arguments import UsageError
from benchmarks.data import facts, sources, splits
from benchmarks.data.download import DataError
from benchmarks.data.names import (
    Benchmark,
)
from benchmarks.data.splits import Protocol
from benchmarks.running import local
from benchmarks.running.codes import FAILURE, USAGE
from benchmarks.running.disk import Options
from benchmarks.studies import cells
from benchmarks.studies.cells import Cell, Row
from benchmarks.training import models, progress
from methods.base import Spec
from methods.naming import NamingError

FIGURES = (".png", ".pdf", ".svg")
"""What a figure's name may end in."""


def explain(error: Exception) -> tuple[int, str]:
    """Exit code and message of an error that a user can act on; an empty message for our own."""
    if isinstance(error, NamingError | UsageError):
        return USAGE, str(error)
    if isinstance(error, DataError | runs.Held | OSError):
        return FAILURE, local.said(error)
    return FAILURE, ""


def options_of(command: Any) -> Options:
    """How the runs of a command are carried out."""
    if command.checkpoint_every < 1:
        raise UsageError(f"checkpoint-every: expected 1 or more, got {command.checkpoint_every}")
    if not command.memory_gib >= 0:
        raise UsageError(f"memory-gib: expected 0 or more, got {command.memory_gib}")
    return Options(
        device=device_of(command.device),
        data_root=root_of(command.data),
        allow_unverified=command.allow_unverified,
        memory_gib=command.memory_gib,
        checkpoint_every=command.checkpoint_every,
        save_model=getattr(command, "save_model", False),
        retry_failed=command.retry_failed,
        wait=not getattr(command, "no_wait", False),
    )


def root_of(given: Path | None) -> Path:
    """The data folder that is meant."""
    return (given or sources.default_root()).expanduser().absolute()


def device_of(name: str) -> str:
    """The device that is meant, where it is there."""
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if name == "auto":
        return "cuda" if available["cuda"] else "mps" if available["mps"] else "cpu"
    if not available[name]:
        there = ", ".join(each for each, is_there in available.items() if is_there)
        raise UsageError(f"device: {name} is not available on this machine (there is: {there})")
    return name


def protocol_of(setting: arguments.Setting) -> Protocol:
    """The protocol that is meant."""
    try:
        return Protocol(
            name=setting.protocol, meta_fraction=setting.meta_fraction, crossfit=setting.crossfit
        )
    except ValueError as error:
        raise UsageError(str(error)) from error


def metric(name: str, value: Any) -> str:
    """A metric as a line shows it; of several classes one number each."""
    text = [f"{each:.3f}" for each in value] if isinstance(value, list) else f"{value:.4f}"
    return f"{name} {' '.join(text) if isinstance(text, list) else text}"


class Maker:
    """Makes the cells of one benchmark from what the command line says."""

    def __init__(self, setting: arguments.Setting, benchmark: Benchmark, options: Options) -> None:
        if setting.threads < 1:
            raise UsageError(f"threads: expected 1 or more, got {setting.threads}")
        self._setting, self.benchmark = setting, benchmark
        self._model = cells.model_name(setting.model, setting.width)
        self._training = cells.training_of(setting.preset, arguments.overrides(setting))
        self.protocol = protocol_of(setting)
        arrays = splits.arrays_of(
            benchmark, options.data_root, options.allow_unverified, options.memory_gib
        )
        self._checksum, self.test_rows = arrays.checksum, len(arrays.test_y)
        self._arrays, self._told = arrays, False
        channels = 3 if benchmark.as_rgb or arrays.train_x.ndim == 4 else 1
        channels = arrays.train_x.shape[3] if arrays.train_x.ndim == 4 else channels
        size = arrays.train_x.shape[1:3]
        # A model that cannot be built here is a mistake in the command, not a failed run.
        try:
            models.build(self._model, Spec(2, len(arrays.classes), (channels, *size)))
        except NamingError:
            raise
        except (Exception, SystemExit) as error:  # one of the user's own may raise anything
            shape = " x ".join(map(str, (channels, *size)))
            raise UsageError(
                f"model: {self._model} cannot be built for {shape} images: "
                f"{type(error).__name__}: {error}"
            ) from error

    def tell(self) -> None:
        """Print once what the data hold: read before anything is trained on them."""
        if self._told:
            return
        self._told = True
        progress.say("\n".join(facts.lines(self._arrays, self.benchmark, brief=True)))

    def cell(self, row: Row, seed: int) -> Cell:
        """The cell of a row and a seed."""
        if seed < 0:
            raise UsageError(f"seed: expected 0 or more, got {seed}")
        setting = self._setting
        return cells.make_cell(
            row,
            self.benchmark,
            self._model,
            self._training,
            self.protocol,
            seed,
            checksum=self._checksum,
            threads=setting.threads,
            oracle_test=setting.oracle_test,
            preset=setting.preset,
        )
