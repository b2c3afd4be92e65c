"""A fixed share of a study's runs, for machines that share no folder."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from analysis.numbers import count
from analysis.studyfile import StudyError
from benchmarks.studies.cells import Cell
from benchmarks.studies.plan import Plan


@dataclass(frozen=True)
class Shard:
    """One of several shares of about equal size, over which the rows are rotated."""

    number: int
    """counted from 1"""
    count: int

    @classmethod
    def of(cls, text: str) -> Shard | None:
        """Parse ``3/8``; None for an empty string.

        Raises:
            StudyError: the message says what is expected.
        """
        if not text:
            return None
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
        made = cls(*map(int, found.groups())) if found else cls(0, 0)
        if not 1 <= made.number <= made.count:
            raise StudyError(f"shard: expected I/N with I from 1 to N, such as 3/8, got {text!r}")
        return made

    def check(self, plan: Plan) -> None:
        """Refuse a study whose list of runs is not known, or not the same, on every machine.

        Raises:
            StudyError: the message says what depends on other results or on this machine.
        """
        if plan.study.tune is not None:
            raise StudyError(
                "shard: expected a study without tune, because its later runs depend on the "
                "results of all others"
            )
        if any(block.same for block in plan.study.blocks):
            raise StudyError(
                "shard: expected a study without equal-budget rows (same), because their budgets "
                "depend on the results of others"
            )
        for experiment in plan.experiments:
            for name, reason in experiment.missing:
                raise StudyError(
                    f"shard: expected rows that are available on every machine, {name} is not on "
                    f"this one: {reason}"
                )

    def of_cells(self, cells: Sequence[Cell]) -> list[Cell]:
        """Its runs among those of a study, whose runs of one seed follow each other.

        A row moves to the next shard from seed to seed, so that costly rows are spread.
        """
        return [
            cell
            for turn, (_, seed) in enumerate(itertools.groupby(cells, lambda each: each.run.seed))
            for place, cell in enumerate(seed)
            if (place + turn) % self.count == self.number - 1
        ]

    def told(self, runs: int) -> str:
        """What is printed at the end instead of tables."""
        return (
            f"Shard {self.number} of {self.count}: {count(runs, 'run')}. To combine the shards, "
            "pack each results folder (augbench pack) and add the packs to one folder (augbench "
            "unpack); the same command without --shard then prints the tables."
        )
