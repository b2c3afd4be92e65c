"""What every test runs under."""

import gc
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

# One thread, as a run has by default: on more, small work is slower.
torch.set_num_threads(1)
known: set[int] = set()


@pytest.fixture(autouse=True)
def modules_are_not_collected() -> None:
    """Hide the objects of imported modules and of collected tests from the garbage collector.

    Each run begins with a collection, and to look at all of them takes longer than a short run.
    """
    if len(sys.modules) not in known:
        gc.collect()
        gc.freeze()
        known.add(len(sys.modules))


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made from all that they read, and no file of them is drawn."""
    from analysis.report import plots

    def save(figure: object, paths: Sequence[Path]) -> None:
        for path in paths:
            path.write_text("a figure")

    monkeypatch.setattr(plots, "_save", save)
