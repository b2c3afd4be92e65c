"""Time of a FixMatch step, with LP-A3 in it, beside its passes:
python -m benchmarks.speed.semi_supervised"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import tyro

from benchmarks.data.splits import Splits
from benchmarks.speed import loop
from benchmarks.speed.loop import Loop

MU = 7
"""Unlabelled rows for a labelled one."""
PLAIN, FIXMATCH = "plain, 8 B rows", "fixmatch"
WAYS = {
    PLAIN: "none",
    FIXMATCH: f"fixmatch(mu={MU})",
    "as published, ratio .9": f"fixmatch(mu={MU}, attack=lpa3(ratio=0.9, warmup=0))",
    "attack_sure, ratio .2": (
        f"fixmatch(mu={MU}, attack=lpa3(ratio=0.2, warmup=0), attack_sure=true)"
    ),
    "attack_sure, fast, ratio .35": (
        f"fixmatch(mu={MU}, attack=lpa3(preset=fast, ratio=0.35, warmup=0), attack_sure=true)"
    ),
}


@dataclass
class Arguments(loop.Arguments):
    """Images of random pixels, 28x28x3; their content does not matter here."""

    model: str = "resnet18(width=0.25)"
    """network"""
    batch_size: int = 16
    """labelled rows per step (B)"""
    steps: int = 2
    """steps of a round"""


class Steps(Loop):
    """The steps of a row of the table, the same in each round."""

    def __init__(self, name: str, splits: Splits, arguments: Arguments) -> None:
        rows = arguments.batch_size * (1 + MU if name == PLAIN else 1)
        super().__init__(
            WAYS[name],
            arguments.model,
            splits,
            rows=rows,
            steps=arguments.steps,
            device=arguments.device,
        )
        self.begin_epoch()

    def cycle(self) -> float:
        """Charged seconds of a round."""
        self.ctx.forget()
        self.train(self.order)
        return self.charged()


def main() -> None:
    """Print the table."""
    arguments = tyro.cli(Arguments, description=__doc__)
    torch.set_num_threads(arguments.threads)
    rows = (1 + MU) * arguments.batch_size * arguments.steps
    splits = loop.random_splits(rows, classes=2, meta_fraction=0.0, device=arguments.device)
    loops = {name: Steps(name, splits, arguments) for name in WAYS}
    passes = {}
    for name, each in loops.items():
        each.cycle()  # the first steps allocate
        each.cycle()
        forward, backward = each.ctx.counter.take()
        passes[name] = (forward + backward, forward + 2 * backward)
    seconds = loop.measured(loops, arguments.repeats, Steps.cycle)
    body = []
    for name in WAYS:
        line = [name, loop.milliseconds(seconds[name], arguments.steps)]
        for base, place in ((PLAIN, 1), (FIXMATCH, 0)):
            ratio = loop.ratios(seconds[name], seconds[base])
            line += loop.spread(ratio)
            line.append(f"{passes[name][place] / passes[base][place]:.2f}")
        body.append(line)
    headers = ["of plain", "from-to", "bound", "of fixmatch", "from-to", "passes"]
    loop.show(f"Adam, {arguments.steps} steps a round", arguments, headers, body)
    print(
        f"ms: {loop.clock(arguments.device)} by the run's clock. B: labelled rows of a batch, "
        f"{MU} B are unlabelled.\n"
        "of plain: ratio to a plain step of as many rows as fixmatch trains on; bound: ratio of "
        "forward + 2 backward passes.\n"
        "of fixmatch: ratio to its step; passes: ratio of forward + backward passes, as tables "
        "count them."
    )


if __name__ == "__main__":
    main()
