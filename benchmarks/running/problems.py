"""Why a run could not be carried out, in words for a user."""

from __future__ import annotations

import errno
from dataclasses import dataclass

GOES_ON = "rerun the same command to resume from its checkpoint"
NO_ROOM = "free some space, then rerun the same command to resume from the last checkpoint"
IN_THE_WAY = "expected a directory, found a file"
CLOSED = "choose another folder with --out"
HINTS = {
    errno.ENOSPC: NO_ROOM,
    errno.EDQUOT: NO_ROOM,
    errno.EEXIST: IN_THE_WAY,
    errno.ENOTDIR: IN_THE_WAY,
    errno.EACCES: CLOSED,
    errno.EPERM: CLOSED,
    errno.EROFS: CLOSED,
}


@dataclass(frozen=True)
class Problem:
    """A run that could not be carried out for a reason that is not its own; nothing is recorded."""

    text: str
    data: str = ""
    """the data set that is not available, and with it all of its runs"""


def said(error: Exception) -> str:
    """An error in words for a user: of one of the system's also the file and what to do."""
    if isinstance(error, OSError) and error.strerror:
        hint = f"; {HINTS[error.errno]}" if error.errno in HINTS else ""
        return f"{error.filename or 'output'}: {error.strerror}{hint}"
    return str(error).strip() or type(error).__name__
