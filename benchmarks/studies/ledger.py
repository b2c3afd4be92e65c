"""What a study has done and has left, as its results folder says."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

from analysis import runs
from analysis.runs import Status
from benchmarks.studies import search
from benchmarks.studies.cells import Cell

FAILURES = "failures.jsonl"
"""In a run's directory: a line for each time that it failed, with the reason."""
UNFINISHED = ("new", "interrupted")


def unfinished(status: Status, folder: Path, save_model: bool = False) -> bool:
    """Whether a run has not ended, or lacks the network that is to be kept of it."""
    if status.state == "done" and save_model:
        return not (folder / "model.pt").exists()
    return status.state in UNFINISHED


class Ledger:
    """What lies in the results folder, read anew whenever it is asked."""

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
        """How the run stands."""
        return runs.status_of(self.folder(cell))

    def epochs(self, cell: Cell) -> int:
        """Epochs of an unfinished run from which it goes on; 0 where it begins anew."""
        interrupted = self.status(cell).state == "interrupted"
        return len(search.lines_of(self.folder(cell))) if interrupted else 0

    def failures(self, cell: Cell) -> list[str]:
        """The reasons of its failures."""
        try:
            lines = (self.folder(cell) / FAILURES).read_text(encoding="utf-8").splitlines()
            return [json.loads(line)["reason"] for line in lines]
        except runs.UNREADABLE:
            return []

    def failed(self, cell: Cell, reason: str) -> None:
        """Count a failure."""
        folder = self.folder(cell)
        folder.mkdir(parents=True, exist_ok=True)
        line = {"reason": reason, "when": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        with (folder / FAILURES).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def to_do(self, cell: Cell, status: Status | None = None) -> bool:
        """Whether the run is to be started; one that failed, as often as its tries allow."""
        status = status or self.status(cell)
        if status.state != "failed":
            return unfinished(status, self.folder(cell), self._save_model)
        forgiven = cell.run.id not in self._forgiven or not self.failures(cell)
        return (self._retry_failed and forgiven) or self.tries_left(cell)

    def tries_left(self, cell: Cell) -> bool:
        """Whether a run that failed is tried again; one that failed elsewhere failed once."""
        return max(1, len(self.failures(cell))) <= self.retries

    def begin(self, wanted: Sequence[Cell]) -> None:
        """With --retry-failed what failed before this command is forgotten."""
        for cell in wanted if self._retry_failed else ():
            if cell.run.id not in self._forgiven:
                if self.status(cell).state == "failed":
                    (self.folder(cell) / FAILURES).unlink(missing_ok=True)
                self._forgiven.add(cell.run.id)
