"""How a run reports its progress: a bar on a terminal, plain lines elsewhere, or nothing."""

from __future__ import annotations

import math
import sys
import time
from contextlib import AbstractContextManager, suppress
from typing import Any, Protocol


class Gone(RuntimeError):
    """Nothing listens to the run any more; it stops and keeps its checkpoint."""


class Progress(Protocol):
    """What the trainer calls while it works."""

    def begin(
        self, name: str, epochs: int, done: int, rows: int, selecting: tuple[str, str], unit: str
    ) -> None:
        """A run of ``epochs`` epochs of ``rows`` rows begins; ``done`` epochs are done.

        ``selecting``: the metric on the select split to be shown, and its name; ``unit``: what a
        row is called.
        """
        ...

    def advance(self, images: int, loss: float) -> None:
        """``images`` more rows were trained on; ``loss`` is the latest."""
        ...

    def epoch(self, number: int, line: dict[str, Any]) -> None:
        """An epoch ended, with its line of metrics.jsonl."""
        ...

    def note(self, text: str) -> None:
        """Something the user should know."""
        ...

    def end(self) -> None:
        """The run ended, for whatever reason."""
        ...


class Silent:
    """No output."""

    def begin(
        self, name: str, epochs: int, done: int, rows: int, selecting: tuple[str, str], unit: str
    ) -> None:
        """Nothing."""

    def advance(self, images: int, loss: float) -> None:
        """Nothing."""

    def epoch(self, number: int, line: dict[str, Any]) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def end(self) -> None:
        """Nothing."""


class Bar:
    """One bar per run, with images or rows per second and the time left."""

    def __init__(self) -> None:
        from tqdm import tqdm  # noqa: PLC0415 - a run without a terminal does not need it

        self._tqdm, self._bar = tqdm, None
        self._epochs, self._epoch, self._metric, self._selecting = 0, 0, "", ("", "")

    def begin(
        self, name: str, epochs: int, done: int, rows: int, selecting: tuple[str, str], unit: str
    ) -> None:
        """Open the bar at the current epoch."""
        self._epochs, self._epoch, self._metric, self._selecting = epochs, done, "", selecting
        with _unheard():
            self._bar = self._tqdm(
                total=epochs * rows,
                initial=done * rows,
                desc=name,
                unit=unit,
                unit_scale=True,
                dynamic_ncols=True,
            )

    def advance(self, images: int, loss: float) -> None:
        """Move the bar."""
        if self._bar is None:
            return
        with _unheard():
            self._bar.set_postfix_str(
                f"epoch {self._epoch + 1}/{self._epochs}, loss {loss:.4f}{self._metric}",
                refresh=False,
            )
            self._bar.update(images)

    def epoch(self, number: int, line: dict[str, Any]) -> None:
        """Show the select metric."""
        self._epoch = number
        self._metric = f", {_selected(line, self._selecting)}"

    def note(self, text: str) -> None:
        """Print above the bar."""
        with _unheard():
            self._tqdm.write(text, file=sys.stderr)

    def end(self) -> None:
        """Close the bar."""
        if self._bar is not None:
            with _unheard():
                self._bar.close()


class Lines:
    """One plain line per epoch, but at most one every ten seconds, and one at the end."""

    def __init__(self, seconds: float = 10.0) -> None:
        self._seconds, self._name, self._epochs = seconds, "", 0
        self._start = self._last = time.monotonic()
        self._images = self._first = 0
        self._selecting, self._unit = ("", ""), ""

    def begin(
        self, name: str, epochs: int, done: int, rows: int, selecting: tuple[str, str], unit: str
    ) -> None:
        """Remember the run."""
        self._name, self._epochs, self._first, self._images = name, epochs, done, 0
        self._selecting, self._unit = selecting, unit
        self._start = self._last = time.monotonic()

    def advance(self, images: int, loss: float) -> None:
        """Count."""
        self._images += images

    def epoch(self, number: int, line: dict[str, Any]) -> None:
        """Print the progress."""
        now = time.monotonic()
        if now - self._last < self._seconds and number < self._epochs:
            return
        self._last = now
        spent = max(now - self._start, 1e-9)
        left = spent / max(1, number - self._first) * (self._epochs - number)
        self.note(
            f"{self._name}: epoch {number}/{self._epochs}, loss {line['train_loss']:.4f}, "
            f"{_selected(line, self._selecting)}, {self._images / spent:,.0f} {self._unit}/s, "
            f"{left:,.0f} s left"
        )

    def note(self, text: str) -> None:
        """Print it."""
        say(text)

    def end(self) -> None:
        """Nothing."""


def say(text: str) -> None:
    """Print to standard error."""
    with _unheard():
        print(text, file=sys.stderr, flush=True)


def _unheard() -> AbstractContextManager[None]:
    """Keeps a run alive if nothing reads its output, or if the disk of a log is full."""
    return suppress(OSError)


def _selected(line: dict[str, Any], selecting: tuple[str, str]) -> str:
    name, shown = selecting
    return f"select {shown} {_number(line['select'][name])}"


def _number(value: float | None) -> str:
    return "n/a" if value is None or math.isnan(value) else f"{value:.4f}"


def for_terminal() -> Progress:
    """A bar if standard error is a terminal, else lines."""
    return Bar() if sys.stderr.isatty() else Lines()
