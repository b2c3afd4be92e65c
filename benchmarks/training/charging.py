"""What a run costs: charged seconds by phase, and rows that pass through its network."""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.hooks import RemovableHandle

from methods.base import Model

PHASES = ("data", "outer", "augment", "forward", "backward")
"""Where charged time goes: drawing rows, a method's own phases, its ``augment``, the step."""


class Clock:
    """Charged time by phase: events on a GPU; on a CPU the process's CPU seconds per thread.

    CPU seconds leave out other work of the machine, so that runs at the same time can be compared;
    on an idle machine they equal wall seconds.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._time = time.process_time if device.type == "cpu" else time.perf_counter
        self._threads = torch.get_num_threads() if device.type == "cpu" else 1
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []
        self._phase = ""

    def switch(self, phase: str) -> str:
        """Enter a phase ("" is uncharged) and return the one that was left."""
        left, self._phase = self._phase, phase
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((phase, event))
        else:
            self._marks.append((phase, self._time() / self._threads))
        return left

    def take(self) -> dict[str, float]:
        """Seconds of each phase since the last call; the clock must be outside all phases."""
        seconds: dict[str, float] = dict.fromkeys(map(str, PHASES), 0.0)
        if self._cuda:
            torch.cuda.synchronize()
        for (phase, start), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            if phase:
                if isinstance(start, float) and isinstance(end, float):
                    seconds[phase] += end - start
                elif isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
                    seconds[phase] += start.elapsed_time(end) / 1000
        self._marks.clear()
        return seconds


class PassCounter:
    """Rows that went forward and backward through networks, counted by hooks at their trunks."""

    def __init__(self, model: nn.Module) -> None:
        self.forward = self.backward = 0
        self.counting = True
        self._handles: list[RemovableHandle] = []
        self.watch(model)

    def watch(self, model: nn.Module) -> None:
        """Count the passes of another network too."""
        place = model.trunk if isinstance(model, Model) else model
        self._handles.append(place.register_forward_hook(self._passed))

    def _passed(self, module: nn.Module, inputs: tuple[Tensor, ...], output: object) -> None:
        last = output[-1] if isinstance(output, list | tuple) else output
        if not self.counting or not isinstance(last, Tensor):
            return
        rows = len(last)
        self.forward += rows
        if forward_ad.unpack_dual(last).tangent is not None:
            self.backward += rows  # forward-mode differentiation costs what a backward pass does
        if last.requires_grad:
            last.register_hook(lambda grad: self._returned(rows))

    def _returned(self, rows: int) -> None:
        if self.counting:
            self.backward += rows

    def take(self) -> tuple[int, int]:
        """Rows forward and backward since the last call."""
        counted = self.forward, self.backward
        self.forward = self.backward = 0
        return counted

    def close(self) -> None:
        """Remove the hooks from the networks."""
        for handle in self._handles:
            handle.remove()
