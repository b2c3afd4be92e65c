"""Reasons why training ends early."""

from __future__ import annotations


class TrainingFailed(RuntimeError):
    """A run that cannot continue; the message is the reason in result.json."""


class Interrupted(RuntimeError):
    """The run was stopped by SIGINT, SIGTERM or its caller; its checkpoint is on disk."""


class NoMemory(RuntimeError):
    """The memory of a GPU that other runs use too did not suffice; nothing is recorded of it."""


NO_MEMORY = ("outofmemoryerror", "out of memory", "alloc_failed", "status_not_initialized")
"""Signs of it: libraries of CUDA that cannot allocate their own memory say the last two."""


def out_of_memory(error: BaseException) -> bool:
    """Whether a GPU lacked memory, by an error or by one that led to it.

    Other libraries of CUDA have no error of their own for it: what they say tells.
    """
    text = f"{type(error).__name__}: {error}".lower()
    if any(sign in text for sign in NO_MEMORY):
        return True
    earlier = error.__cause__ or error.__context__
    return earlier is not None and out_of_memory(earlier)


def first_line(error: BaseException) -> str:
    """An error on one line: its kind, and the first line of its text."""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
