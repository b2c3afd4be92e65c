"""The contents of a study, as typed objects that refuse invalid values."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator
from pydantic.dataclasses import dataclass

from analysis import runs
from analysis.question import OR, OVER, Asked, comparison
from analysis.runs import CONFIG
from benchmarks.data.names import canonical, listed, parse_benchmark
from benchmarks.data.splits import Protocol
from benchmarks.studies import cells
from benchmarks.training import models
from methods.naming import NamingError, unknown, written_out

WHOLE = "full"
"""The tier that is the whole file."""
MAX_RUNS = 100_000
"""More is probably a typing error, and would fill a disk with directories."""


def _listed(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else (value,)


def _seeds(value: Any) -> Any:
    """A number of seeds, counted from 0, or the list of them."""
    if isinstance(value, int) and not isinstance(value, bool):
        if not 1 <= value <= MAX_RUNS:
            raise ValueError(f"expected 1 to {MAX_RUNS:,}, or a list of seeds, got {value}")
        return tuple(range(value))
    return value


NAME = re.compile(r"\w[\w.-]*")
"""Names of studies and tiers, which become names of folders."""
Names = Annotated[tuple[str, ...], BeforeValidator(written_out)]
Benchmarks = Annotated[tuple[str, ...], BeforeValidator(listed)]
Listed = BeforeValidator(_listed)
Seeds = Annotated[tuple[int, ...], BeforeValidator(_seeds)]


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Resources:
    """What one run uses."""

    cpus: float | None = None
    """cores; default: the run's threads"""
    gpus: float | None = None
    """0 trains on the CPU"""
    trials_per_gpu: int | Literal["auto"] = 0
    """how many runs share a GPU: k is the same as gpus: 1/k, auto is measured; default: auto where
    there is a GPU and gpus is not given, else the CPU"""

    def __post_init__(self) -> None:
        if self.cpus is not None and not 0 < self.cpus < math.inf:
            raise ValueError(f"cpus: expected a number above 0, got {self.cpus}")
        if self.gpus is not None and not 0 <= self.gpus < math.inf:
            raise ValueError(f"gpus: expected 0 or more, got {self.gpus}")
        if self.trials_per_gpu != "auto" and self.trials_per_gpu < 0:
            raise ValueError(
                f"trials_per_gpu: expected auto, or 1 or more, got {self.trials_per_gpu}"
            )
        if self.trials_per_gpu and self.gpus is not None:
            raise ValueError("trials_per_gpu: expected either this or gpus, got both")

    @property
    def measured(self) -> bool:
        """Whether it is measured how many runs share a GPU, where there is one."""
        return self.trials_per_gpu == "auto" or (not self.trials_per_gpu and self.gpus is None)

    @property
    def gpu(self) -> float | None:
        """GPUs of one run, at most; None if the file does not say."""
        if self.trials_per_gpu == "auto":
            return 1.0
        return 1 / self.trials_per_gpu if self.trials_per_gpu else self.gpus


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Asha:
    """Successive halving: at each rung only the best share of a row's trials continues."""

    grace: int = 1
    """epochs before the first rung"""
    factor: int = 3
    """one trial in this many continues; the next rung is this many times further"""

    def __post_init__(self) -> None:
        if self.grace < 1:
            raise ValueError(f"grace: expected 1 epoch or more, got {self.grace}")
        if self.factor < 2:
            raise ValueError(f"factor: expected 2 or more, got {self.factor}")


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Tune:
    """A search for hyper-parameters on the select split, with equal trials for every row."""

    trials: int = 16
    search: Literal["random", "grid", "optuna"] = "random"
    metric: Literal["auc", "accuracy"] = "auc"
    """on the select split; test is never used"""
    seeds: int = 1
    """seeds per trial, whose scores are averaged; 3 or more if select is small"""
    final_seeds: int = 10
    """fresh seeds for the winner and the default"""
    asha: Asha | None = None
    common: dict[str, Any] = field(default_factory=dict)
    """what every row searches besides the spaces of its methods; name: [kind, ...]"""
    spaces: dict[str, dict[str, Any]] = field(default_factory=dict)
    """replaces a method's own space"""
    batch: int = 8
    """optuna: trials proposed at a time"""
    seed: int = 0
    """determines the list of trials"""

    def __post_init__(self) -> None:
        for name in ("trials", "seeds", "final_seeds", "batch"):
            if not 1 <= getattr(self, name) <= MAX_RUNS:
                got = getattr(self, name)
                raise ValueError(f"{name}: expected 1 to {MAX_RUNS:,}, got {got}")


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Block:
    """A product of benchmarks, models, methods and seeds under one training."""

    benchmarks: Benchmarks = ()
    models: Names = ("resnet18",)
    methods: Names = ()
    seeds: Seeds | None = None
    """default: 10, or 30 if test has fewer than 500 rows"""
    preset: str = "medmnist"
    training: dict[str, Any] = field(default_factory=dict)
    """fields that differ from the preset"""
    protocols: Annotated[tuple[Literal["equal", "paper"], ...], Listed] = ("equal",)
    meta_fraction: float = 0.2
    crossfit: int = 1
    controls: bool = False
    """the control rows of each method that learns or adapts (paper: always those for its labels)"""
    same: Annotated[tuple[Literal["passes", "time"], ...], Listed] = ()
    """each method's upstream with as many passes, or as much time"""
    threads: int = 1
    oracle_test: bool = False
    corruptions: str = ""
    """medmnist-c or common: also evaluate each network on corrupted test images"""

    def __post_init__(self) -> None:
        for name in ("benchmarks", "models", "methods", "protocols"):
            if not getattr(self, name):
                raise ValueError(f"{name}: expected at least one, got none")
        if self.threads < 1:
            raise ValueError(f"threads: expected 1 or more, got {self.threads}")
        if self.seeds is not None and (not self.seeds or min(self.seeds) < 0):
            raise ValueError(f"seeds: expected 0 or more each, got {list(self.seeds)}")

    @property
    def rows(self) -> int:
        """Rows of all tables together, without control rows."""
        axes = (self.benchmarks, self.models, self.protocols, self.methods)
        return math.prod(map(len, axes))


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Tier:
    """A part of a study: of each block, only what is also named here. An empty key keeps all."""

    benchmarks: Benchmarks = ()
    models: Names = ()
    methods: Names = ()
    protocols: Annotated[tuple[Literal["equal", "paper"], ...], Listed] = ()
    seeds: Seeds | None = None
    controls: bool = True
    """false leaves out the control rows that ``controls: true`` adds"""
    same: Annotated[tuple[Literal["passes", "time"], ...], Listed] | None = None
    """[] leaves out the equal-budget rows"""

    def of(self, block: Block) -> Block | None:
        """What it keeps of a block; None: nothing."""
        kept = {
            name: _shared(getattr(block, name), getattr(self, name), same)
            for name, same in SPELLED.items()
        }
        if self.seeds is not None:
            kept["seeds"] = _shared(block.seeds or self.seeds, self.seeds, int)
        if not all(kept.values()):
            return None
        same = block.same if self.same is None else _shared(block.same, self.same or ("",), str)
        controls = block.controls and self.controls
        return replace(block, **kept, same=same, controls=controls)

    def unknown(self, key: str, blocks: Sequence[Block]) -> tuple[str, list[str]] | None:
        """A name under a key that no block has, and the names that blocks have."""
        same = SPELLED[key]
        known = list(dict.fromkeys(name for block in blocks for name in getattr(block, key)))
        spelled = set(map(same, known))
        wrong = (name for name in getattr(self, key) if same(name) not in spelled)
        name = next(wrong, None)
        return None if name is None else (name, known)


def _shared(held: Sequence[Any], asked: Sequence[Any], same: Callable[[Any], Any]) -> Any:
    """Those of ``held`` that are in ``asked``; all of them if ``asked`` is empty."""
    wanted = set(map(same, asked))
    return tuple(each for each in held if same(each) in wanted) if wanted else held


SPELLED: dict[str, Callable[[str], str]] = {
    "benchmarks": lambda name: canonical(parse_benchmark(name)),
    "models": models.canonical,
    "methods": cells.row_name,
    "protocols": str,
}
"""The keys whose names a tier chooses from, each with the function that makes names canonical."""


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Study(Asked):
    """The contents of a study file, besides what it asks."""

    name: str
    blocks: tuple[Block, ...] = ()
    order: Literal["seeds", "benchmarks"] = "seeds"
    """which runs come first: a seed of every table, or all seeds of one benchmark"""
    resources: Resources = field(default_factory=Resources)
    workers: int | None = None
    """runs at a time; default: as many as fit"""
    address: str = ""
    """of a Ray cluster; RAY_ADDRESS and --address override it"""
    dashboard: bool = False
    out: Path = Path("runs")
    data: Path | None = None
    retries: int = 1
    """how often a failed run is tried again"""
    checkpoint_every: int = 1
    allow_unverified: bool = False
    memory_gib: float = 4.0
    tensorboard: bool = True
    wandb: dict[str, Any] | None = None
    """arguments of Ray's WandbLoggerCallback"""
    mlflow: dict[str, Any] | None = None
    """arguments of Ray's MLflowLoggerCallback"""
    tune: Tune | None = None
    tiers: dict[str, Tier] = field(default_factory=dict)
    """parts of the study by name, for ``--tier``"""
    tier: str = WHOLE
    """the selected part; not a key of the file"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers: expected 1 or more, got {self.workers}")
        for name, least in (("retries", 0), ("checkpoint_every", 1), ("memory_gib", 0)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name}: expected {least} or more, got {getattr(self, name)}")
        for block in self.blocks if self.tune is not None else ():
            if block.same:
                raise ValueError("same: expected none with tune, which has equal passes itself")
            if block.seeds is not None:
                raise ValueError("seeds: expected none with tune; see tune.seeds and final_seeds")
            if block.corruptions:
                raise ValueError("corruptions: expected none with tune; compare its winners")
        if self.tune is not None and any(tier.seeds is not None for tier in self.tiers.values()):
            raise ValueError("tiers: expected no seeds with tune; see tune.seeds and final_seeds")
        each = self.tune.trials * self.tune.seeds if self.tune is not None else 0
        count = sum(block.rows * (each or len(block.seeds or (0,))) for block in self.blocks)
        if count > MAX_RUNS:
            raise ValueError(f"expected at most {MAX_RUNS:,} runs, got {count:,}")
        for name in self.tiers:
            if name == WHOLE or not NAME.fullmatch(name):
                raise ValueError(
                    f"tiers: expected names of letters, digits, -, _ and . other than {WHOLE}, "
                    f"which is the whole file, got {name!r}"
                )
        if not NAME.fullmatch(self.name):
            raise ValueError(f"name: expected letters, digits, -, _ and ., got {self.name!r}")

    def of_tier(self, tier: str) -> Study:
        """A part of the study, NAME-TIER, whose runs are among those of the whole.

        Raises:
            NamingError: the tier is unknown or empty.
        """
        if tier == WHOLE:
            return self
        if tier not in self.tiers:
            raise unknown("tier", tier, (*self.tiers, WHOLE))
        kept = tuple(filter(None, map(self.tiers[tier].of, self.blocks)))
        if not kept:
            raise NamingError(f"tier {tier!r}: expected some runs of the file, got none")
        return replace(self, name=f"{self.name}-{tier}", blocks=kept, tier=tier)

    def pairs(self) -> list[tuple[str, str]]:
        """Row and base of each comparison of the family, under the names that runs have.

        Raises:
            NamingError: one of them is not a row.
        """
        found = [comparison(entry) for entry in self.family]
        return [
            (cells.row_name(row), base and OR.join(map(cells.row_name, base.split(OR))))
            for row, base in found
        ]

    def labelled(self) -> dict[str, str]:
        """The labels by the names that runs have.

        Raises:
            NamingError: a name is neither a row nor a benchmark, or is given in two spellings.
        """
        found: dict[str, str] = {}
        for name, label in self.labels.items():
            key = cells.label_key(name)
            if key in found:
                raise NamingError(f"expected one label for {key}, got {found[key]!r} and {label!r}")
            found[key] = label
        return found

    def asked(self) -> dict[str, Any]:
        """What the study asks, as a report reads it."""
        return {
            "question": self.question,
            "family": [OVER.join(filter(None, each)) for each in self.pairs()],
            "margin": self.margin,
            "prediction": self.prediction,
            **({"labels": self.labelled()} if self.labels else {}),
        }


PRODUCT = runs.field_names(Block)
"""The keys of a block; at the top of the file they are the defaults of every block."""
OF_STUDY = tuple(name for name in runs.field_names(Study) if name not in ("name", "tier"))


def protocols_of(block: Block) -> list[Protocol]:
    """The protocols of a block."""
    return [
        Protocol(name=name, meta_fraction=block.meta_fraction, crossfit=block.crossfit)
        if name == "equal"
        else Protocol(name=name)
        for name in block.protocols
    ]
