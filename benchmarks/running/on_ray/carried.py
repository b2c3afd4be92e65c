"""Functions of ours as Ray carries them to a worker."""

from __future__ import annotations

import importlib
import pickle
import sys
from collections.abc import Callable
from typing import Any

import augbench


def carry(function: Callable[..., Any], address: str) -> Callable[..., Any]:
    """A function as Ray carries it to a worker, some of its arguments packed.

    Ray puts the current folder first on a worker's path, where files of the user's own may bear the
    names of our packages. What is nested goes by value: it runs before anything of ours is found.
    A worker of our own Ray has the path of this process.
    """
    module, name = function.__module__, function.__name__
    here, path = str(augbench.HERE), [] if address else list(sys.path)

    def carried(*arguments: Any, packed: bytes) -> Any:
        before = sys.path[:]
        sys.path[:] = [here, *before]
        ours = importlib.import_module("augbench")
        sys.path[:] = path or before
        ours.bind()
        return ours.call(module, name, *arguments, *pickle.loads(packed))

    return carried
