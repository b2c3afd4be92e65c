"""Time of a plain step by memory layout and precision: python -m benchmarks.speed.layouts"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import torch
import tyro

from benchmarks.speed import loop
from benchmarks.speed.loop import Loop


@dataclass
class Arguments(loop.Arguments):
    """Images of random pixels, 28x28x3; their content does not matter here."""

    model: str = "resnet18(width=0.125)"
    """network"""
    batch_size: int = 128
    """rows per step"""
    steps: int = 5
    """steps per measurement"""
    compile: bool = False
    """compiled networks as well; compiling takes a minute or two"""


def settings(arguments: Arguments) -> dict[str, dict[str, Any]]:
    """The rows of the table; the first is what the others are compared with."""
    rows: dict[str, dict[str, Any]] = {
        "contiguous": {"channels_last": False},
        "channels_last": {"channels_last": True},
        "contiguous, bfloat16": {"channels_last": False, "precision": "bfloat16"},
        "channels_last, bfloat16": {"channels_last": True, "precision": "bfloat16"},
    }
    if arguments.compile:
        rows["contiguous, compiled"] = {"channels_last": False, "compile": True}
        rows["channels_last, compiled"] = {"channels_last": True, "compile": True}
    return rows


def main() -> None:
    """Print the table."""
    arguments = tyro.cli(Arguments, description=__doc__)
    torch.set_num_threads(arguments.threads)
    rows, steps = arguments.batch_size, arguments.steps
    # 4 steps an epoch suffice; the method none trains on all rows.
    splits = loop.random_splits(4 * rows, classes=2, meta_fraction=0, device=arguments.device)

    def started(training: dict[str, Any]) -> Loop:
        made = Loop(
            "none",
            arguments.model,
            splits,
            rows=rows,
            steps=steps * (arguments.repeats + 1),
            device=arguments.device,
            **training,
        )
        made.begin_epoch()
        timed(made)  # the first steps allocate and compile
        return made

    def timed(one: Loop) -> float:
        one.ctx.forget()
        one.train(one.order[one.ctx.step : one.ctx.step + steps])
        return one.charged()

    loops = {name: started(training) for name, training in settings(arguments).items()}
    seconds = loop.measured(loops, arguments.repeats, timed)
    plain = next(iter(seconds.values()))
    body = []
    for name, found in seconds.items():
        image = 1e6 * statistics.median(found) / (steps * rows)
        ratios = loop.spread(loop.ratios(found, plain))
        body.append([name, loop.milliseconds(found, steps), f"{image:,.0f}", *ratios])
    loop.show("Adam", arguments, ["microseconds / image", "ratio", "from-to"], body)
    print(f"ms: {loop.clock(arguments.device)} by the run's clock, of {steps} steps each.")


if __name__ == "__main__":
    main()
