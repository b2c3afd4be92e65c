"""One run on disk: done once, resumed where it stopped, with a record of how it ended."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

import methods
from analysis import metrics, runs
from analysis.runs import Run, Status
from benchmarks.data.download import DataError
from benchmarks.data.names import Benchmark
from benchmarks.data.splits import NotApplicable, Protocol, Splits, arrays_of, make_splits
from benchmarks.studies.ledger import UNFINISHED, unfinished
from benchmarks.training.checkpoint import write_lines
from benchmarks.training.errors import (
    Interrupted,
    NoMemory,
    TrainingFailed,
    first_line,
    out_of_memory,
)
from benchmarks.training.evaluation import labels_of
from benchmarks.training.progress import Gone, Progress, Silent
from benchmarks.training.trainer import Fitted, fit
from methods.own import Source


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a run is executed; nothing here changes its numbers on one kind of machine."""

    device: str = "cpu"
    """empty: what the executor has"""
    data_root: Path = field(default_factory=Path)
    allow_unverified: bool = False
    memory_gib: float = 4.0
    checkpoint_every: int = 1
    save_model: bool = False
    retry_failed: bool = False
    wait: bool = True
    shares_gpu: bool = False
    """other runs use its GPU now: if its memory does not suffice, the run has not failed"""
    code: Mapping[str, Source] = field(default_factory=dict)
    """code of the user's own, for workers: as it was when the command began"""


def execute(
    run: Run,
    recorded: dict[str, Any],
    root: Path,
    options: Options,
    benchmark: Benchmark,
    progress: Progress | None = None,
    stop: Callable[[], bool] | None = None,
) -> Status:
    """Do one run on disk unless it is done; afterwards its directory records how it ended.

    ``stop`` is asked before every step whether to end there.

    Raises:
        Interrupted: SIGINT, SIGTERM or ``stop``; the same call resumes from the checkpoint.
        DataError: the data are unavailable; nothing is recorded.
        OSError: the results cannot be written (no room, no permission); nothing is recorded.
        runs.Held: another process works on it and ``options.wait`` is off.
        NoMemory: it shares a GPU whose memory did not suffice; the same call resumes it.
    """
    progress = progress or Silent()
    folder = runs.folder_of(root, run)
    status = runs.status_of(folder)
    if _ended(status, folder, options):
        return status

    def say_who(holder: str) -> None:
        progress.note(f"{run.row}, seed {run.seed}: waiting, held by {holder}")

    with runs.locked(folder, say_who if options.wait else None):
        status = runs.status_of(folder)
        if _ended(status, folder, options):
            return status
        if status.state != "done":
            for name in ("result.json", "metrics.jsonl", "timing.jsonl"):
                (folder / name).unlink(missing_ok=True)
        _write_cell(run, recorded, folder)
        try:
            status = _attempt(run, folder, options, benchmark, progress, stop)
        except NotApplicable as reason:
            status = _conclude(folder, {"status": "skipped", "reason": str(reason)})
        except (Interrupted, Gone, DataError, runs.StorageError):
            raise
        except (Exception, SystemExit) as error:  # a method or network of others may do anything
            if options.shares_gpu and out_of_memory(error):
                raise NoMemory(first_line(error)) from None
            reason = str(error) if isinstance(error, TrainingFailed) else first_line(error)
            text = traceback.format_exc()
            failure = {"status": "failed", "reason": reason, "traceback": text}
            status = _conclude(folder, failure)
        finally:
            progress.end()
        (folder / "checkpoint.pt").unlink(missing_ok=True)
        return status


def _ended(status: Status, folder: Path, options: Options) -> bool:
    if status.state == "failed":
        return not options.retry_failed
    return not unfinished(status, folder, options.save_model)


def conclude(
    run: Run,
    recorded: dict[str, Any],
    root: Path,
    state: Literal["failed", "stopped"],
    reason: str,
) -> Status:
    """Record how a run ended that could not do so itself; its checkpoint is kept.

    A run that has ended meanwhile keeps its own record.

    Raises:
        OSError: the results cannot be written.
        runs.Held: a process works on it.
    """
    folder = runs.folder_of(root, run)
    with runs.locked(folder):
        status = runs.status_of(folder)
        if status.state not in UNFINISHED:
            return status
        _write_cell(run, recorded, folder)
        status = _conclude(folder, {"status": state, "reason": reason})
        if state == "stopped":
            (folder / "checkpoint.pt").unlink(missing_ok=True)
        return status


def _write_cell(run: Run, recorded: dict[str, Any], folder: Path) -> None:
    cell = {"id": run.id, "run": asdict(run), "recorded": recorded}  # type: ignore[call-overload]
    runs.write_text(folder / "run.json", json.dumps(cell, indent=1) + "\n")


def _attempt(
    run: Run,
    folder: Path,
    options: Options,
    benchmark: Benchmark,
    progress: Progress,
    stop: Callable[[], bool] | None,
) -> Status:
    device = torch.device(options.device)
    arrays = arrays_of(benchmark, options.data_root, options.allow_unverified, options.memory_gib)
    method = methods.build(run.method)
    protocol = Protocol(name=run.protocol, meta_fraction=run.meta_fraction, crossfit=run.crossfit)
    splits = make_splits(
        arrays,
        benchmark,
        protocol,
        needs_meta="meta" in method.requires(),
        seed=run.seed,
        device=device,
        control=run.control,
    )
    for note in splits.notes:
        progress.note(f"{run.benchmark}: {note}")
    fitted = fit(
        run,
        splits,
        method,
        device=device,
        progress=progress,
        folder=folder,
        checkpoint_every=options.checkpoint_every,
        stop=stop,
    )
    learned = {
        name: value.detach().cpu().numpy() for name, value in fitted.method.learned().items()
    }
    _write(folder, fitted, learned, splits, options)
    result = fitted.result
    if splits.corrupted is not None and splits.kind != "multi-label" and learned:
        given = labels_of(splits.train, splits.kind)
        clean = given.copy()
        clean[splits.corrupted["rows"]] = splits.corrupted["before"]
        result["detection"] = metrics.detection(learned, given, clean)
    result["data"] = {
        "checksum": arrays.checksum,
        "verified": arrays.verified,
        "folds": benchmark.folds,
        "caveats": list(splits.caveats),
        "notes": list(splits.notes),
        "kind": splits.kind,
        "classes": list(splits.classes),
        "shape": list(splits.spec.shape),
        "rows": {
            "train": len(splits.train),
            "meta": len(splits.meta) if splits.meta is not None else 0,
            "select": len(splits.select),
            "test": len(splits.test),
        },
        "corruption": splits.corruption,
        "select_trained": splits.select_trained,
    }
    if splits.groups is not None:
        result["data"]["groups"] = splits.groups
    return _conclude(folder, {"status": "done", **result})


def _write(
    folder: Path,
    fitted: Fitted,
    learned: dict[str, np.ndarray],
    splits: Splits,
    options: Options,
) -> None:
    write_lines(folder, fitted.state)
    _write_arrays(folder / "predictions.npz", fitted.predictions)
    if learned:
        _write_arrays(folder / "learned.npz", learned)
    if fitted.samples:
        _write_arrays(folder / "samples.npz", fitted.samples)
    if splits.corrupted is not None:
        _write_arrays(folder / "corruption.npz", splits.corrupted)
    if options.save_model:
        weights = fitted.model.state_dict()
        runs.write_atomically(folder / "model.pt", lambda file: torch.save(weights, file))


def _write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    # numpy's stub takes any keyword for allow_pickle; the arrays are numbers, so nothing is pickled
    save: Callable[..., None] = np.savez_compressed
    runs.write_atomically(path, lambda file: save(file, **arrays))


def _conclude(folder: Path, result: dict[str, Any]) -> Status:
    """Write result.json, last and atomically, with the sizes of the files beside it."""
    names = (
        "metrics.jsonl",
        "timing.jsonl",
        "predictions.npz",
        "learned.npz",
        "samples.npz",
        "corruption.npz",
        "model.pt",
    )
    done = result["status"] == "done"
    present = [folder / name for name in names if done and (folder / name).exists()]
    result["files"] = {path.name: path.stat().st_size for path in present}
    result["finished"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    runs.write_text(folder / "result.json", runs.to_json(result) + "\n")
    return Status(result["status"], result.get("reason", ""))
