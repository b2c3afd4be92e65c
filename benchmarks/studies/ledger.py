"""What is done and what is left of a study, read from its results folder."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from analysis import corrupted, runs
from analysis.runs import MODEL, Status
from benchmarks.studies import search
from benchmarks.studies.cells import Cell
from methods.medmnistc import VERSION

FAILURES = "failures.jsonl"
"""In a run's directory: one line per failure, with the reason."""
UNFINISHED = ("new", "interrupted")


def unfinished(
    status: Status, folder: Path, save_model: bool = False, corruptions: str = ""
) -> bool:
    """Whether a run has not ended, or lacks the network that it should save, or its evaluation on
    a set of corruptions."""
    if status.state == "done":
        unsaved = save_model and not (folder / MODEL).exists()
        return unsaved or bool(corruptions and not corrupted.has(folder, corruptions, VERSION))
    return status.state in UNFINISHED


def only_corruptions(status: Status, folder: Path, save_model: bool = False) -> bool:
    """Whether a run that is unfinished lacks only corruptions, and has its network."""
    return (
        status.state == "done"
        and not unfinished(status, folder, save_model)
        and ((folder / MODEL).exists())
    )


class Ledger:
    """The state of the results folder, read again at every call."""

    def __init__(
        self, root: Path, retries: int, retry_failed: bool = False, save_model: bool = False
    ) -> None:
        self.root, self.retries = root, retries
        self._retry_failed, self._save_model = retry_failed, save_model
        self._forgiven: set[str] = set()

    def folder(self, cell: Cell) -> Path:
        """The run's directory."""
        return runs.folder_of(self.root, cell.run)

    def status(self, cell: Cell) -> Status:
        """The state of the run."""
        return runs.status_of(self.folder(cell))

    def epochs(self, cell: Cell) -> int:
        """The epoch from which an unfinished run resumes; 0 if it starts over."""
        status = self.status(cell)
        if only_corruptions(status, self.folder(cell), self._save_model):
            return cell.run.training.epochs
        return len(search.lines_of(self.folder(cell))) if status.state == "interrupted" else 0

    def failures(self, cell: Cell) -> list[str]:
        """The reasons for its failures."""
        try:
            lines = (self.folder(cell) / FAILURES).read_text(encoding="utf-8").splitlines()
            return [json.loads(line)["reason"] for line in lines]
        except runs.UNREADABLE:
            return []

    def failed(self, cell: Cell, reason: str) -> None:
        """Record a failure."""
        folder = self.folder(cell)
        folder.mkdir(parents=True, exist_ok=True)
        line = {"reason": reason, "when": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        with (folder / FAILURES).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def to_do(self, cell: Cell, status: Status | None = None) -> bool:
        """Whether to start the run; a failed one only if it has tries left."""
        status = status or self.status(cell)
        if status.state != "failed":
            folder = self.folder(cell)
            again = self._retry_failed and cell.run.id not in self._forgiven
            if again and corrupted.failed(folder, cell.corruptions):
                return True
            return unfinished(status, folder, self._save_model, cell.corruptions)
        forgiven = cell.run.id not in self._forgiven or not self.failures(cell)
        return (self._retry_failed and forgiven) or self.tries_left(cell)

    def tries_left(self, cell: Cell) -> bool:
        """Whether to try a failed run again; one that failed elsewhere counts as one failure."""
        return max(1, len(self.failures(cell))) <= self.retries

    def begin(self, wanted: Sequence[Cell]) -> None:
        """With --retry-failed, forget the failures before this command, also those of evaluations
        on corrupted images."""
        for cell in wanted if self._retry_failed else ():
            if cell.run.id not in self._forgiven:
                folder = self.folder(cell)
                if self.status(cell).state == "failed":
                    (folder / FAILURES).unlink(missing_ok=True)
                elif corrupted.failed(folder, cell.corruptions):
                    with suppress(runs.Held), runs.locked(folder):  # else it is being worked on
                        corrupted.forget_failure(folder, cell.corruptions)
                self._forgiven.add(cell.run.id)
