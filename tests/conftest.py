"""What every test runs under, and in which order."""

import gc
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from benchmarks.training import trainer

# One thread, as a run has by default: on more, small work is slower.
torch.set_num_threads(1)
trainer.WRITE_SECONDS = 0.0  # epochs of tests are short, and each is to be kept
LONG = (
    "test_cli",
    "test_resume",
    "test_environment",
    "test_sweep",
    "test_report",
    "test_report_edges",
    "test_contract",
    "test_executors",
    "test_lpa3",
    "test_trainer",
    "test_saflex",
    "test_frozen",
    "test_show",
    "test_context",
    "test_plugin",
    "test_study",
)
"""Files that take long, which come first: two workers then end at about the same time."""
collect_ignore = [] if find_spec("hypothesis") else ["test_naming.py"]
"""A bare machine with a GPU may lack hypothesis, and runs all others."""
known: set[int] = set()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """``-m gpu`` reads the one file that has such tests: time on a GPU is dear."""
    others = collection_path.suffix == ".py" and collection_path.name != "test_gpu.py"
    return True if config.option.markexpr == "gpu" and others else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONG)))


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
