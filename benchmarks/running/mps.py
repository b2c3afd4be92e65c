"""NVIDIA's Multi-Process Service (MPS): processes use a GPU side by side instead of in turn."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress

from benchmarks.running import cleanup
from benchmarks.training.errors import first_line

PROGRAM = "nvidia-cuda-mps-control"
FOLDERS: tuple[str, ...] = ("CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY")
TRIED = "import torch; torch.ones(1, device='cuda').add_(1).item()"
CLIENTS = 48
"""Processes that one GPU takes under MPS (NVIDIA's guide, from Volta on)."""
CONTROL_SECONDS, TRY_SECONDS = 10.0, 60.0


class NoMPS(RuntimeError):
    """Why it is not used."""


@contextmanager
def started() -> Iterator[dict[str, str]]:
    """A control daemon with folders of its own; the variables by which a process joins it.

    It is stopped at the end of the block, also when this process is killed. One that runs already
    is used as it is, without variables, and never stopped.

    Raises:
        NoMPS: it is not installed, does not start, or a process cannot use a GPU under it.
    """
    program = shutil.which(PROGRAM)
    if program is None:
        raise NoMPS(f"{PROGRAM} is not installed")
    if _answers(program):
        yield {}
        return
    folder = cleanup.private_folder()
    with ExitStack() as stack:
        stack.enter_context(cleanup.outlived(folder))
        variables = {name: str(folder) for name in FOLDERS}
        environment = {**os.environ, **variables}
        # The daemon would number the GPUs that are named here anew, unlike its clients.
        environment.pop("CUDA_VISIBLE_DEVICES", None)
        stack.callback(_quit, program, environment)
        try:
            _control(program, environment, "-d")
        except (OSError, subprocess.SubprocessError) as error:
            raise NoMPS(f"MPS did not start: {first_line(error)}") from error
        if problem := problem_under(variables):
            raise NoMPS(f"MPS started, but a process could not use the GPU under it: {problem}")
        yield variables


def problem_under(variables: Mapping[str, str]) -> str:
    """Why a process with these variables cannot compute on the first GPU; else ""."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", TRIED],
            env={**os.environ, **variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TRY_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"no answer for {TRY_SECONDS:.0f} seconds"
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return last if done.returncode else ""


def _answers(program: str) -> bool:
    """Whether one runs already, in the folder that the environment names or the default one."""
    try:
        told = _control(program, os.environ, told="get_server_list\n")
    except (OSError, subprocess.SubprocessError):
        return False
    return "cannot find" not in told.lower()


def _quit(program: str, environment: Mapping[str, str]) -> None:
    with suppress(OSError, subprocess.SubprocessError):  # then it is killed
        _control(program, environment, told="quit\n")


def _control(program: str, environment: Mapping[str, str], *arguments: str, told: str = "") -> str:
    """What the control program answers.

    Raises:
        OSError, SubprocessError: it cannot be started, fails, or does not answer.
    """
    done = subprocess.run(
        [program, *arguments],
        env=environment,
        input=told,
        # a daemon may keep the output open for good, and then nobody can read it to its end
        stdout=subprocess.PIPE if told else subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=CONTROL_SECONDS,
        check=True,
    )
    return done.stdout or ""
