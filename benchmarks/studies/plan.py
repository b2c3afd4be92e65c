"""The experiments of a study and their cells. Needs no ray."""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from pydantic.dataclasses import dataclass

import methods
from analysis import blocks, runs
from analysis.differences import advised
from analysis.facts import column_key
from analysis.question import OR, OVER
from analysis.runs import Training, row_parts
from analysis.studyfile import StudyError
from benchmarks.data import splits
from benchmarks.data.catalogue import CATALOGUE
from benchmarks.data.names import (
    Benchmark,
    canonical,
    check_seeds,
    parse_benchmark,
)
from benchmarks.data.preparing import prepared
from benchmarks.data.splits import Protocol
from benchmarks.studies import cells
from benchmarks.studies.cells import CORRUPTIONS, Cell, Row
from benchmarks.studies.schema import WHOLE, Block, Study, protocols_of
from benchmarks.training import models
from benchmarks.training.corrupted import settings_of
from methods.base import Input, Spec
from methods.naming import NamingError, unknown


@dataclass(frozen=True, kw_only=True)
class Source:
    """What the names of a data set's runs depend on."""

    checksum: str
    shape: tuple[int, ...]
    classes: int
    counts: tuple[int, int, int]
    """rows of train, val and test, as stored"""
    inputs: tuple[Input, ...] = ()
    """of a table, what a row is; runs that train on other rows may leave out columns"""

    @property
    def spec(self) -> Spec:
        """What is known of the data before they are cut."""
        if not self.inputs:
            return Spec(2, self.classes, self.shape)
        (one,) = self.inputs
        return Spec(2, self.classes, one.shape, one.kind, one.low, one.high, one.categories)


def source_of(benchmark: Benchmark, root: Path, study: Study) -> Source:
    """Facts about a data set, from the catalogue if its files are the official ones.

    Raises:
        DataError: a user's own file cannot be read.
    """
    entry = CATALOGUE.get(benchmark.name)
    official = entry is not None and any(entry.files.values()) and not benchmark.unlabelled
    if entry is not None and official and not study.allow_unverified:
        size = benchmark.size if benchmark.size in entry.sizes else min(entry.sizes)
        channels = 3 if benchmark.as_rgb else entry.channels
        return Source(
            checksum="+".join(file.md5 for file in entry.files[size]),
            shape=(channels, size, size),
            classes=len(entry.classes),
            counts=entry.counts,
        )
    arrays = splits.arrays_of(benchmark, root, study.allow_unverified, study.memory_gib)
    counts = (len(arrays.train_y), len(arrays.val_y), len(arrays.test_y))
    if arrays.table is not None:
        inputs = prepared(arrays, np.arange(counts[0]), benchmark.scale)[1]
        shape = inputs[0].shape
        return Source(
            checksum=arrays.checksum,
            shape=shape,
            classes=len(arrays.classes),
            counts=counts,
            inputs=inputs,
        )
    height, width = arrays.train_x.shape[1:3]
    grey = arrays.train_x.ndim == 3
    channels = (3 if benchmark.as_rgb else 1) if grey else arrays.train_x.shape[3]
    return Source(
        checksum=arrays.checksum,
        shape=(channels, height, width),
        classes=len(arrays.classes),
        counts=counts,
    )


def pool_of(benchmark: Benchmark, source: Source) -> float:
    """Approximate number of labelled rows per epoch, without reading the data."""
    rows = float(source.counts[0])
    if benchmark.folds:  # an eighth of the other folds is select
        rows = sum(source.counts) * (1 - 1 / benchmark.folds) * 7 / 8
    if benchmark.rows_per_class:
        rows = min(rows, benchmark.rows_per_class * source.classes)
    if benchmark.labelled:
        rows = min(rows, benchmark.labelled * source.classes)
    return rows / 2 * (1 + 1 / benchmark.imbalance)  # half of the classes are reduced


def evaluated(benchmark: Benchmark, source: Source) -> tuple[float, float]:
    """Approximate numbers of select rows, evaluated every epoch, and of test rows, at the end."""
    if benchmark.folds:
        test = sum(source.counts) / benchmark.folds
        return (sum(source.counts) - test) / 8, test
    return source.counts[1], source.counts[2]


@dataclass(frozen=True, config={"arbitrary_types_allowed": True})
class Experiment:
    """Rows over seeds on one benchmark, model and protocol: what one table compares."""

    benchmark: Benchmark
    model: str
    protocol: Protocol
    training: Training
    rows: tuple[Row, ...]
    """first those of the file, then their control rows"""
    seeds: tuple[int, ...]
    source: Source
    block: Block
    missing: tuple[tuple[str, str], ...] = ()
    """rows whose plug-in is unavailable, with the reason"""

    @property
    def name(self) -> str:
        """Its name in messages."""
        return f"{canonical(self.benchmark)}, {self.model}, {self.protocol.name}"

    def of(self, row: Row, training: Training | None = None) -> Callable[[int], Cell]:
        """A function that makes the cell of a row for a seed; shared work is done once."""
        first = cells.make_cell(
            row,
            self.benchmark,
            self.model,
            training or self.training,
            self.protocol,
            0,
            checksum=self.source.checksum,
            threads=self.block.threads,
            oracle_test=self.block.oracle_test,
            preset=self.block.preset,
        )
        if self.block.corruptions:
            asked = {CORRUPTIONS: self.block.corruptions}
            first = replace(first, recorded={**first.recorded, **asked})
        return lambda seed: replace(first, run=_with_seed(first.run, seed))

    def cells(self, rows: Iterable[Row] | None = None) -> list[Cell]:
        """The runs, seed by seed, so that an interrupted sweep has complete seeds."""
        makers = [self.of(row) for row in (self.rows if rows is None else rows)]
        return [make(seed) for seed in self.seeds for make in makers]


def _with_seed(run: runs.Run, seed: int) -> runs.Run:
    # replace() would validate all fields again, which takes most of the time of a dry run
    if seed == run.seed:
        return run
    made = object.__new__(runs.Run)
    made.__dict__.update(run.__dict__, seed=seed)
    return made


class Plan:
    """The experiments of a study."""

    def __init__(self, study: Study, root: Path, whole: bool = True) -> None:
        """``whole``: the seeds of a benchmark with folds must cover every fold equally often."""
        self.study, self.data_root, self._whole = study, root, whole
        self._sources: dict[tuple[object, ...], Source] = {}
        self._fits: set[tuple[str, Spec]] = set()

    def check_family(self) -> None:
        """Refuse a comparison that no table of the study can make; in a tier, leave it out.

        Raises:
            StudyError: names the row and the nearest one, or what is missing.
        """
        sides: dict[str, set[str]] = {}  # the rows of one table may come from several blocks
        for experiment in self.experiments:
            sides.setdefault(experiment.name, set()).update(self._names(experiment))
        absent = {name for experiment in self.experiments for name, _ in experiment.missing}
        made = []
        for entry, (row, base) in zip(self.study.family, self.study.pairs(), strict=True):
            reason = _unmade(row, base, sides, absent)
            if not reason:
                made.append(entry)
            elif self.study.tier == WHOLE:
                raise StudyError(f"family: {reason}")
        self.study = replace(self.study, family=tuple(made))

    def check_labels(self) -> None:
        """Refuse a label for what no table of the study has; in a tier, leave it out.

        Raises:
            StudyError: names it and the nearest row or data set.
        """
        known: set[str] = set()
        for each in self.experiments:
            known |= {column_key(canonical(each.benchmark), each.benchmark.path)}
            known |= self._names(each) | {name for name, _ in each.missing}
        try:
            absent = [name for name in self.study.labelled() if name not in known]
            if absent and self.study.tier == WHOLE:
                raise unknown("row or data set", absent[0], known)
        except NamingError as error:
            raise StudyError(f"labels: {error}") from error
        kept = {k: v for k, v in self.study.labels.items() if cells.label_key(k) not in absent}
        self.study = replace(self.study, labels=kept)

    def _names(self, experiment: Experiment) -> set[str]:
        """The rows that a table has, or will have once its equal-budget rows are known."""
        return {row.name for row in experiment.rows}.union(
            *(cells.equal_budget_names(experiment.rows, kind) for kind in experiment.block.same)
        )

    @cached_property
    def experiments(self) -> list[Experiment]:
        """One for each benchmark, model and protocol of each block."""
        return [experiment for block in self.study.blocks for experiment in self._of(block)]

    def _of(self, block: Block) -> Iterator[Experiment]:
        training = cells.training_of(block.preset, block.training)
        for name, model, protocol in itertools.product(
            block.benchmarks, block.models, protocols_of(block)
        ):
            benchmark, network = parse_benchmark(name), models.canonical(model)
            source = self.source(benchmark)
            self._check(network, source)
            rows, missing = rows_of(block.methods, protocol)
            if block.controls or protocol.name == "paper":  # paper requires them
                rows += cells.control_rows(rows, benchmark, protocol, block.controls)
            default = range(advised(source.counts[2], benchmark.folds))
            seeds = tuple(default if block.seeds is None else block.seeds)
            if benchmark.folds and self.study.tune is not None:
                raise NamingError(
                    f"tune: {canonical(benchmark)}: expected the official split, because rows "
                    "that choose a setting would be test rows of other folds"
                )
            if self._whole:
                check_seeds(benchmark, seeds)
            yield Experiment(
                benchmark=benchmark,
                model=network,
                protocol=protocol,
                training=training,
                rows=tuple(rows),
                seeds=seeds,
                source=source,
                block=block,
                missing=tuple(missing),
            )

    def own_names(self) -> list[str]:
        """The names of the user's own code, ``py:module:name``, each once."""
        found: dict[str, None] = {}
        for experiment in self.experiments:
            found |= dict.fromkeys(models.own_names(experiment.model))
            for row in experiment.rows:
                found |= dict.fromkeys(methods.own_names(row.method))
        return list(found)

    def source(self, benchmark: Benchmark) -> Source:
        """Facts about a data set, looked up once."""
        key = (*splits.stored(benchmark), benchmark.as_rgb)
        if key not in self._sources:
            self._sources[key] = source_of(benchmark, self.data_root, self.study)
        return self._sources[key]

    def _check(self, model: str, source: Source) -> None:
        """Refuse a network that cannot be built on these images, before anything runs."""
        key = model, source.spec
        if key not in self._fits:
            check_model(model, source.spec)
            self._fits.add(key)


def _unmade(row: str, base: str, sides: dict[str, set[str]], absent: set[str]) -> str:
    """Why no table compares these two rows, or ""; ``sides``: the row names of each table."""
    known = set().union(*sides.values())
    named = base.split(OR) if base else []
    for name in (row, *named):
        if name not in known | absent:
            return str(unknown("row", name, known))
    wanted = set(named) or set(blocks.bases(row_parts(row)[0])) - {row}
    there = wanted.issubset if named else wanted.intersection
    if ({row} | wanted) & absent or any(row in names and there(names) for names in sides.values()):
        return ""
    if base:
        return f"no table has both {row} and {base}"
    return f"{row} has no base; write {row}{OVER}ROW, or add none"


def checks(block: Block, whole: bool = True) -> list[tuple[str, Callable[[], object]]]:
    """Checks, by key, of what only the rest of augbench can know; they read no data.

    ``whole``: the seeds of a benchmark with folds must cover every fold equally often.
    A check raises ValueError, or ``methods.Unavailable`` for a row whose plug-in is unavailable.
    """
    seeds = block.seeds if block.seeds is not None and whole else ()
    return [
        ("preset", lambda: cells.training_of(block.preset, {})),
        ("training", lambda: cells.training_of(block.preset, block.training)),
        ("protocols", lambda: protocols_of(block)),
        *(("benchmarks", lambda name=name: parse_benchmark(name)) for name in block.benchmarks),
        *(
            ("seeds", lambda name=name: check_seeds(parse_benchmark(name), seeds))
            for name in block.benchmarks
        ),
        *(
            ("corruptions", lambda name=name: settings_of(block.corruptions, parse_benchmark(name)))
            for name in block.benchmarks
            if block.corruptions
        ),
        *(("models", lambda name=name: models.canonical(name)) for name in block.models),
        *(
            ("methods", lambda name=name: cells.parse_row(name, Protocol()))
            for name in block.methods
        ),
    ]


def check_model(model: str, spec: Spec) -> None:
    """Refuse a network that cannot be built.

    Raises:
        NamingError: the message gives the reason.
    """
    try:
        try:
            with torch.device("meta"):  # checks shapes without allocating values
                models.build(model, spec)
        except NamingError:
            raise
        except Exception:  # a user's own network may read values while it is built
            models.build(model, spec)
    except NamingError:
        raise
    except (Exception, SystemExit) as error:  # a user's own network may raise anything
        shape = " x ".join(map(str, spec.shape))
        raise NamingError(
            f"model: {model} cannot be built for {shape} images: {type(error).__name__}: {error}"
        ) from error


def rows_of(names: Sequence[str], protocol: Protocol) -> tuple[list[Row], list[tuple[str, str]]]:
    """The rows, and those whose plug-in is unavailable, with the reason."""
    rows: list[Row] = []
    missing = []
    for name in names:
        try:
            rows.append(cells.parse_row(name, protocol))
        except methods.Unavailable as reason:
            missing.append((name, str(reason)))
    return list(dict.fromkeys(rows)), missing


def label(cell: Cell) -> str:
    """The name of a run, which ``--only`` is matched against; the name of its table first."""
    run = cell.run
    return f"{run.benchmark}, {run.model}, {run.protocol}, {run.row}, seed {run.seed}"


def chosen(pattern: str) -> Callable[[Cell], bool]:
    """A test whether a run's label contains the pattern, with wildcards ``*`` and ``?``."""
    plain = pattern.replace("[", "[[]")  # names of rows have brackets
    return lambda cell: fnmatch.fnmatchcase(label(cell), f"*{plain}*") if pattern else True
