"""One run on disk: done once, resumed where it stopped, with a record of how it ended."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

import methods
from analysis import metrics, runs
from analysis.corrupted import FAILED, FILE, KEY, has, scores, stored
from analysis.runs import MODEL, Run, Status
from analysis.tasks import task_named
from benchmarks.data.dataset import Arrays
from benchmarks.data.download import DataError
from benchmarks.data.elsewhere import check_version, with_rows
from benchmarks.data.names import Benchmark
from benchmarks.data.splits import NotApplicable, Protocol, Splits, arrays_of, make_splits
from benchmarks.studies.cells import corruptions_of
from benchmarks.studies.ledger import (
    UNFINISHED,
    only_corruptions,
    unfinished,
)
from benchmarks.training import corrupted, models
from benchmarks.training.checkpoint import write_lines
from benchmarks.training.errors import (
    Interrupted,
    NoMemory,
    TrainingFailed,
    first_line,
    out_of_memory,
)
from benchmarks.training.evaluation import caveats_of, labels_of, logits_of
from benchmarks.training.progress import Gone, Progress, Silent
from benchmarks.training.saved import network_of
from benchmarks.training.tasks import task_of
from benchmarks.training.trainer import Fitted, fit, threads
from methods.base import Method
from methods.medmnistc import VERSION
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
        NamingError: the network's weights, or rows from elsewhere, are not those that the run was
            planned with; nothing is recorded.
        runs.Held: another process works on it and ``options.wait`` is off.
        NoMemory: it shares a GPU whose memory did not suffice; the same call resumes it.
    """
    progress = progress or Silent()
    folder = runs.folder_of(root, run)
    status, asked = runs.status_of(folder), corruptions_of(recorded)
    if _ended(status, folder, options, asked):
        return status

    def say_who(holder: str) -> None:
        progress.note(f"{run.row}, seed {run.seed}: waiting, held by {holder}")

    with runs.locked(folder, say_who if options.wait else None):
        status = runs.status_of(folder)
        if _ended(status, folder, options, asked):
            return status
        if only_corruptions(status, folder, options.save_model):
            return _corrupt(run, folder, options, benchmark, asked, progress, stop)
        if "model" in run.versions:
            models.check_files(run.model, run.versions["model"])
        source = recorded.get("rows_from", "")
        if source:
            check_version(source, run.versions["rows_from"])
        # A run that is trained again keeps the sets that it had been evaluated on.
        ended = runs.read_result(folder) if status.state == "done" else None
        known: list[str] = [] if ended is None else list(ended.get(KEY, {}))
        sets = [*known, *([asked] if asked and asked not in known else [])]
        if status.state == "done" and asked and not has(folder, asked, VERSION):
            progress.note(
                f"{run.row}, seed {run.seed}: is done, but has neither a saved network "
                f"(--save-model) nor scores under {asked}, so it is trained again"
            )
        if status.state != "done":
            for name in ("result.json", "metrics.jsonl", "timing.jsonl"):
                (folder / name).unlink(missing_ok=True)
        _write_cell(run, recorded, folder)
        try:
            status = _attempt(run, folder, options, benchmark, source, sets, progress, stop)
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


def _ended(status: Status, folder: Path, options: Options, corruptions: str) -> bool:
    if status.state == "failed":
        return not options.retry_failed
    return not unfinished(status, folder, options.save_model, corruptions)


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
    source: str,
    corruptions: Sequence[str],
    progress: Progress,
    stop: Callable[[], bool] | None,
) -> Status:
    device = torch.device(options.device)
    arrays = arrays_of(benchmark, options.data_root, options.allow_unverified, options.memory_gib)
    method = methods.build(run.method)
    splits = _splits(run, arrays, method, benchmark, device)
    splits = with_rows(splits, source, options.data_root, benchmark, options.memory_gib)
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
    result = fitted.result
    robust = _on_corrupted(
        run, fitted.model, splits, benchmark, corruptions, progress, stop, result
    )
    _write(folder, fitted, learned, splits, options)
    _write_corrupted(folder, result, robust, splits)
    if found := _detection(splits, learned):
        result["detection"] = found
    result["data"] = {
        "checksum": arrays.checksum,
        "verified": arrays.verified,
        "folds": benchmark.folds,
        "caveats": [*splits.caveats, *caveats_of(fitted.model, splits.test)],
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
    for name, rows in splits.more.items():
        result["data"]["rows"][name] = len(rows)
    if arrays.table is not None:
        # of the stored test rows, not of a fold, so that it is the same for every run
        leads = task_named(arrays.kind).leading(arrays.test_y, len(arrays.classes))
        if leads != metrics.HEADLINE:
            result["data"]["leads"] = leads
    if splits.groups is not None:
        result["data"]["groups"] = splits.groups
    return _conclude(folder, {"status": "done", **result})


def _detection(splits: Splits, learned: dict[str, np.ndarray]) -> dict[str, float]:
    """How well wrong labels were found: of rows from elsewhere if theirs are known, or else of
    training rows; empty if nothing was learned of them."""
    if not learned or not task_named(splits.kind).exclusive:
        return {}
    if splits.generated is not None and splits.truth is not None:
        given, clean = labels_of(splits.generated, splits.kind), splits.truth
        first = splits.spec.rows - len(given)
    elif splits.corrupted is not None:
        given, first = labels_of(splits.train, splits.kind), 0
        clean = given.copy()
        clean[splits.corrupted["rows"]] = splits.corrupted["before"]
    else:
        return {}
    of_rows = {
        name: learned[name][first : first + len(given)]
        for name in ("weight", "label", "seen")
        if name in learned
    }
    return metrics.detection(of_rows, given, clean)


def _splits(
    run: Run, arrays: Arrays, method: Method, benchmark: Benchmark, device: torch.device
) -> Splits:
    protocol = Protocol(name=run.protocol, meta_fraction=run.meta_fraction, crossfit=run.crossfit)
    return make_splits(
        arrays,
        benchmark,
        protocol,
        needs_meta="meta" in method.requires(),
        seed=run.seed,
        device=device,
        control=run.control,
    )


def _corrupt(
    run: Run,
    folder: Path,
    options: Options,
    benchmark: Benchmark,
    corruptions: str,
    progress: Progress,
    stop: Callable[[], bool] | None,
) -> Status:
    """Evaluate the saved network of a finished run on a set of corruptions.

    Raises:
        OSError: it cannot be evaluated, or the results cannot be written; the run stays done.
    """
    device = torch.device(options.device)
    result = runs.read_result(folder) or {}
    arrays = arrays_of(benchmark, options.data_root, options.allow_unverified, options.memory_gib)
    try:
        splits = _splits(run, arrays, methods.build(run.method), benchmark, device)
        network = network_of(folder, run, result, splits.spec, device)
        known = stored(folder, VERSION)
        clean = runs.read_arrays(folder / "predictions.npz")["test_last_logits"]
        if not np.allclose(logits_of(network, splits.test), clean, rtol=1e-2, atol=1e-2):
            raise ValueError("its predictions on the test images are not those of the run")
        robust = known | _on_corrupted(
            run, network, splits, benchmark, [corruptions], progress, stop, result
        )
    except (Interrupted, Gone, OSError):
        raise
    except (Exception, SystemExit) as error:  # a network of others may do anything
        reason = f"its saved network cannot be evaluated ({first_line(error)})"
        raise runs.StorageError(None, reason, str(folder)) from error
    # result.json names the sizes of files: it must be true whenever this is interrupted.
    result["files"].pop(FILE, None)
    result.pop(KEY, None)
    runs.write_text(folder / "result.json", runs.to_json(result) + "\n")
    _write_corrupted(folder, result, robust, splits)
    if robust:
        result["files"][FILE] = (folder / FILE).stat().st_size
    runs.write_text(folder / "result.json", runs.to_json(result) + "\n")
    return Status("done")


def _on_corrupted(
    run: Run,
    network: torch.nn.Module,
    splits: Splits,
    benchmark: Benchmark,
    asked: Sequence[str],
    progress: Progress,
    stop: Callable[[], bool] | None,
    result: dict[str, Any],
) -> dict[str, np.ndarray]:
    """Logits on the asked sets of corruptions; the result gets the time that it took, which is not
    charged. A set on which the network cannot be evaluated is named in the result with the reason:
    the run itself is done."""
    start, made = time.perf_counter(), dict[str, np.ndarray]()
    for name in asked:
        try:
            with threads(run.threads):
                made |= corrupted.logits_on(
                    network,
                    splits.test,
                    task_of(splits.kind),
                    name,
                    benchmark,
                    progress,
                    stop or (lambda: False),
                )
            result.get(FAILED, {}).pop(name, None)
        except (Interrupted, Gone):
            raise
        except Exception as error:  # a network of others may do anything
            if out_of_memory(error):
                raise
            reason = str(error) if isinstance(error, NotApplicable) else first_line(error)
            result.setdefault(FAILED, {})[name] = {"version": VERSION, "reason": reason}
            progress.note(
                f"{run.row}, seed {run.seed}: not evaluated under {name}, but done: {reason} "
                "(--retry-failed tries it again)"
            )
    if asked:
        result["cost"]["corrupted_seconds"] = time.perf_counter() - start
    return made


def _write_corrupted(
    folder: Path, result: dict[str, Any], robust: dict[str, np.ndarray], splits: Splits
) -> None:
    """Write the logits, and add their scores to the result."""
    if not robust:
        (folder / FILE).unlink(missing_ok=True)  # of a network that is replaced
        return
    write_arrays(folder / FILE, robust)
    targets = labels_of(splits.test, splits.kind)
    names = {key.partition(":")[0] for key in robust}
    result[KEY] = {
        name: {
            "version": int(robust[f"{name}:version"]),
            "scores": scores(robust, name, targets, splits.kind),
        }
        for name in sorted(names)
    }


def _write(
    folder: Path,
    fitted: Fitted,
    learned: dict[str, np.ndarray],
    splits: Splits,
    options: Options,
) -> None:
    write_lines(folder, fitted.state)
    write_arrays(folder / "predictions.npz", fitted.predictions)
    if learned:
        write_arrays(folder / "learned.npz", learned)
    if fitted.samples:
        write_arrays(folder / "samples.npz", fitted.samples)
    if splits.corrupted is not None:
        write_arrays(folder / "corruption.npz", splits.corrupted)
    if options.save_model:
        weights = fitted.model.state_dict()
        runs.write_atomically(folder / MODEL, lambda file: torch.save(weights, file))


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Replace the npz file atomically."""
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
        FILE,
        MODEL,
    )
    done = result["status"] == "done"
    present = [folder / name for name in names if done and (folder / name).exists()]
    result["files"] = {path.name: path.stat().st_size for path in present}
    result["finished"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    runs.write_text(folder / "result.json", runs.to_json(result) + "\n")
    return Status(result["status"], result.get("reason", ""))
