"""Reasons why training ends early."""

from __future__ import annotations


class TrainingFailed(RuntimeError):
    """A run that cannot continue; the message is the reason in result.json."""


class Interrupted(RuntimeError):
    """The run was stopped by SIGINT, SIGTERM or its caller; its checkpoint is on disk."""


def first_line(error: BaseException) -> str:
    """An error on one line: its kind, and the first line of its text."""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
