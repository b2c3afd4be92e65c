"""What the commands share: options and a study from the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

import methods
from analysis import runs
from benchmarks.cli import arguments
from benchmarks.cli.arguments import UsageError
from benchmarks.data import facts, sources, splits
from benchmarks.data.download import DataError
from benchmarks.data.names import OPENML, OWN, Benchmark, names_in, parse_benchmark
from benchmarks.data.splits import Protocol
from benchmarks.running import capacity
from benchmarks.running.codes import FAILURE, USAGE
from benchmarks.running.disk import Options
from benchmarks.running.problems import said
from benchmarks.studies import cells
from benchmarks.studies.cells import Cell
from benchmarks.studies.ledger import Ledger
from benchmarks.studies.plan import checks
from benchmarks.studies.schema import Block, Resources, Study
from benchmarks.training import progress
from methods import Unavailable
from methods.learner import learner_of
from methods.naming import NamingError, split, with_argument, with_path

FIGURES = (".png", ".pdf", ".svg")
"""Suffixes of figures."""


def explain(error: Exception) -> tuple[int, str]:
    """Exit code and message of an error that a user can act on; no message for our own errors."""
    if isinstance(error, NamingError | UsageError):
        return USAGE, str(error)
    if isinstance(error, DataError | runs.Held | OSError):
        return FAILURE, said(error)
    return FAILURE, ""


def options_of(command: Any) -> Options:
    """How the runs of a command are executed."""
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
    """The data folder, by default that of AUGBENCH_DATA.

    Raises:
        UsageError: it is the name of a benchmark.
    """
    if given is not None and str(given).startswith(tuple(f"{kind}:" for kind in (*OWN, OPENML))):
        raise UsageError(
            f"data: expected the folder for data sets, got {str(given)!r}: your own data are a "
            f"benchmark, --benchmark {str(given)!r}"
        )
    return (given or sources.default_root()).expanduser().absolute()


def benchmark_of(run: runs.Run, recorded: Mapping[str, Any]) -> Benchmark:
    """The benchmark of a run on disk, with the paths that were recorded."""
    name, path = run.benchmark, recorded.get("path")
    if recorded.get("unlabelled"):
        name = with_argument(name, "unlabelled", recorded["unlabelled"])
    return parse_benchmark(with_path(name, path) if path else name)


def check_saved(names: Sequence[str]) -> None:
    """Refuse to save the networks of methods that train none.

    Raises:
        UsageError: names the first one.
    """
    for name in names:
        if not learner_of(methods.build(name)).trains_network:
            raise UsageError(
                f"save-model: {name} trains no network that could be saved: run it in a command "
                "without --save-model"
            )


def device_of(name: str) -> str:
    """The device, if it is available."""
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if name == "auto":
        return "cuda" if available["cuda"] else "mps" if available["mps"] else "cpu"
    if not available[name]:
        there = ", ".join(each for each, is_there in available.items() if is_there)
        raise UsageError(f"device: {name} is not available on this machine (available: {there})")
    return name


def protocol_of(setting: arguments.Setting) -> Protocol:
    """The protocol of these settings."""
    try:
        return Protocol(
            name=setting.protocol, meta_fraction=setting.meta_fraction, crossfit=setting.crossfit
        )
    except ValueError as error:
        raise UsageError(str(error)) from error


def metric(name: str, value: Any) -> str:
    """A metric as text; one number per class for metrics by class."""
    text = [f"{each:.3f}" for each in value] if isinstance(value, list) else f"{value:.4f}"
    return f"{name} {' '.join(text) if isinstance(text, list) else text}"


def study_of(
    command: arguments.RunCommand | arguments.CompareCommand,
    methods: str,
    seeds: int | tuple[int, ...] | None,
    whole: bool = True,
    **more: Any,
) -> Study:
    """The study of one block that a command asks for; ``more`` are fields of the block.

    ``whole``: seeds of a benchmark with folds must be whole repeats of them.

    Raises:
        NamingError, UsageError: a value that is not allowed; no data have been read.
    """
    if not names_in(command.benchmark):
        raise UsageError("benchmark: expected a name, got none")
    on_gpu = device_of(command.device) == "cuda"
    given = {
        "benchmarks": command.benchmark,
        "models": cells.model_name(command.model, command.width),
        "methods": split(methods),
        "seeds": seeds,
        "preset": command.preset,
        "training": arguments.overrides(command),
        "protocols": command.protocol,
        "meta_fraction": command.meta_fraction,
        "crossfit": command.crossfit,
        "threads": command.threads,
        "oracle_test": command.oracle_test,
        "corruptions": command.corruptions,
        **more,
    }
    try:
        protocol_of(command)
        block = TypeAdapter(Block).validate_python(given)
        for _, check in checks(block, whole):
            with suppress(Unavailable):  # a row of the table that says why
                check()
        return Study(
            name="compare",
            blocks=(block,),
            resources=Resources(
                cpus=min(command.threads, capacity.cores()),
                gpus=None if on_gpu else 0,
            ),
            retries=0,
            allow_unverified=command.allow_unverified,
            memory_gib=command.memory_gib,
            tensorboard=False,
        )
    except (NamingError, UsageError):
        raise
    except ValueError as error:
        raise UsageError(cells.plain(error)) from error


def read_data(wanted: Sequence[Cell], ledger: Ledger, options: Options) -> None:
    """Read the data of these runs, and describe each set unless one of its runs is done.

    Raises:
        DataError: they are unavailable; nothing has been written.
    """
    seen = {cell.benchmark for cell in wanted if ledger.status(cell).state == "done"}
    left = dict.fromkeys(cell.benchmark for cell in wanted if ledger.to_do(cell))
    for benchmark in left:
        arrays = splits.arrays_of(
            benchmark, options.data_root, options.allow_unverified, options.memory_gib
        )
        if benchmark not in seen:
            progress.say("\n".join(facts.lines(arrays, benchmark, brief=True)))
