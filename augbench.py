"""Compare learnable augmentation methods under equal conditions. The public API:

================  ================================================================================
``compare``       train methods over seeds on a data set and compare them: a DataFrame of the runs
``sweep``         run a study file, or a shipped study: a DataFrame of its runs
``records``       read the runs of results folders into a DataFrame
``report``        write the report on a results folder
``table``         make a table for a paper, as a DataFrame and as a file
``build``         make a method by name: ``build("crop+mixup(alpha=0.2)")``
``own_loop``      make the context that a method needs in your own training loop
``fit``           train one run on splits, in memory or with checkpoints on disk
``Splits``        training, select and test rows: ``Splits.from_arrays(train, select, test)``
``Run``           what is trained: benchmark, network, method, training, seed
``Training``      epochs, batch size, optimiser and the other training settings
``Method``        the base class of every method, built-in or your own
``Learner``       the base class of what takes the steps of a run itself
``Batch``         the rows, soft labels and weights that a method takes and returns
``Context``       what a method may see of the training
``contract``      checks for the tests of your own method
``transforms``    RandAugment and others as modules from tensor to tensor, for any loop
================  ================================================================================

For the command line, see ``augbench --help``. Each name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from analysis.runs import Run, Training
    from benchmarks import contract
    from benchmarks.api import (
        compare,
        records,
        report,
        sweep,
        table,
    )
    from benchmarks.data.splits import Splits
    from benchmarks.training.context import own_loop
    from benchmarks.training.trainer import fit
    from methods import build, transforms
    from methods.base import Batch, Context, Method
    from methods.learner import Learner

__all__ = [
    "Batch",
    "Context",
    "Learner",
    "Method",
    "Run",
    "Splits",
    "Training",
    "build",
    "compare",
    "contract",
    "fit",
    "own_loop",
    "records",
    "report",
    "sweep",
    "table",
    "transforms",
]

HERE = Path(__file__).resolve().parent
"""The folder of our packages: a checkout or site-packages."""
PACKAGES = ("methods", "analysis", "benchmarks")
_PLACES = {
    "Batch": "methods.base",
    "Context": "methods.base",
    "Learner": "methods.learner",
    "Method": "methods.base",
    "Run": "analysis.runs",
    "Splits": "benchmarks.data.splits",
    "Training": "analysis.runs",
    "build": "methods",
    "compare": "benchmarks.api",
    "contract": "benchmarks.contract",
    "fit": "benchmarks.training.trainer",
    "own_loop": "benchmarks.training.context",
    "records": "benchmarks.api",
    "report": "benchmarks.api",
    "sweep": "benchmarks.api",
    "table": "benchmarks.api",
    "transforms": "methods.transforms",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    bind()
    module = importlib.import_module(_PLACES[name])
    return module if _PLACES[name].endswith(f".{name}") else getattr(module, name)


def __dir__() -> list[str]:
    return __all__


def main() -> None:
    """Entry point of ``augbench`` and ``python -m augbench``."""
    try:
        bind()
    except ImportError as error:
        sys.exit(f"augbench: {error}")
    call("benchmarks.cli.main", "main")


def call(module: str, name: str, *arguments: Any) -> Any:
    """Call a function of ours after ``bind``; workers start here, with their own ``sys.path``."""
    bind()
    return getattr(importlib.import_module(module), name)(*arguments)


def bind() -> None:
    """Import our three packages from the folder of this file, whatever else has their names.

    The user's ``methods.py``, ``analysis.py`` or folder ``benchmarks`` may come first on
    ``sys.path``. The path is not changed, so all other imports work as they would without us; only
    these three names are ours from then on, in this process.

    Raises:
        ImportError: another module has been imported under one of these names.
    """
    for name in PACKAGES:
        if name not in sys.modules:
            spec = PathFinder.find_spec(name, [str(HERE)])
            if spec is None or spec.loader is None:
                raise ImportError(f"{HERE / name} is missing: reinstall augbench")
            sys.modules[name] = module_from_spec(spec)
            spec.loader.exec_module(sys.modules[name])
        elif _folder(sys.modules[name]) != (HERE / name).resolve():
            raise ImportError(
                f"augbench needs its own package {name!r} in {HERE / name}, but "
                f"{_file(sys.modules[name])} was imported under that name: rename it"
            )


def _file(module: ModuleType) -> str:
    return getattr(module, "__file__", None) or next(iter(module.__path__))


def _folder(module: ModuleType) -> Path:
    return Path(_file(module)).resolve().parent


if __name__ == "__main__":
    main()
