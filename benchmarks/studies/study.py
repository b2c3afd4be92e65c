"""A study file: YAML to a typed study, and from there to the cells that it names. Needs no ray."""

from __future__ import annotations

import fnmatch
import importlib.util
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import field, is_dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from pydantic import AfterValidator, BeforeValidator, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

import methods
from analysis import blocks, runs
from analysis.comparison import advised
from analysis.question import OVER, as_name, comparison
from analysis.runs import CONFIG, Training, row_parts
from benchmarks.data import splits
from benchmarks.data.catalogue import CATALOGUE
from benchmarks.data.names import (
    Benchmark,
    canonical,
    check_seeds,
    listed,
    parse_benchmark,
)
from benchmarks.data.splits import Protocol
from benchmarks.studies import cells
from benchmarks.studies.cells import Cell, Row
from benchmarks.studies.space import parameter
from benchmarks.training import models
from methods.base import Spec
from methods.naming import (
    NamingError,
    convert,
    from_yaml,
    nearest,
    unknown,
    written_out,
)
from methods.naming import parameters as arguments_of

MAX_RUNS = 100_000
"""More than this is a slip of the pen, and would fill a disk with directories."""


Keys = tuple[str | int, ...]
"""Keys and places from the top of a file."""


class StudyError(NamingError):
    """A study file that cannot be used; names the file, the line, and what is allowed there."""


def _comparisons(value: tuple[str, ...]) -> tuple[str, ...]:
    for entry in value:
        comparison(entry)
    return value


def _listed(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else (value,)


def _seeds(value: Any) -> Any:
    """A number of seeds, counted from 0, or the list of them."""
    if isinstance(value, int) and not isinstance(value, bool):
        if not 1 <= value <= MAX_RUNS:
            raise ValueError(f"expected 1 to {MAX_RUNS:,}, or a list of seeds, got {value}")
        return tuple(range(value))
    return value


Names = Annotated[tuple[str, ...], BeforeValidator(written_out)]
Benchmarks = Annotated[tuple[str, ...], BeforeValidator(listed)]
Family = Annotated[Names, AfterValidator(_comparisons)]
Listed = BeforeValidator(_listed)
Seeds = Annotated[tuple[int, ...], BeforeValidator(_seeds)]


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Resources:
    """What one run takes."""

    cpus: float | None = None
    """cores; the run's threads unless given"""
    gpus: float | None = None
    """0 trains on the CPU; one unless given, where there are any"""
    trials_per_gpu: int = 0
    """so many runs share a GPU; the same as gpus: 1/k"""

    def __post_init__(self) -> None:
        if self.cpus is not None and not 0 < self.cpus < math.inf:
            raise ValueError(f"cpus: expected a number above 0, got {self.cpus}")
        if self.gpus is not None and not 0 <= self.gpus < math.inf:
            raise ValueError(f"gpus: expected 0 or more, got {self.gpus}")
        if self.trials_per_gpu < 0:
            raise ValueError(f"trials_per_gpu: expected 1 or more, got {self.trials_per_gpu}")
        if self.trials_per_gpu and self.gpus is not None:
            raise ValueError("trials_per_gpu: expected either this or gpus, got both")

    @property
    def gpu(self) -> float | None:
        """GPUs of one run; None where the file does not say."""
        return 1 / self.trials_per_gpu if self.trials_per_gpu else self.gpus


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Asha:
    """Successive halving: at each rung only the best share of a row's trials goes on."""

    grace: int = 1
    """epochs before the first rung"""
    factor: int = 3
    """one in so many goes on, and the next rung is so many times as far"""

    def __post_init__(self) -> None:
        if self.grace < 1:
            raise ValueError(f"grace: expected 1 epoch or more, got {self.grace}")
        if self.factor < 2:
            raise ValueError(f"factor: expected 2 or more, got {self.factor}")


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Tune:
    """A search of hyper-parameters on the select split; every row gets as many trials."""

    trials: int = 16
    search: Literal["random", "grid", "optuna"] = "random"
    metric: Literal["auc", "accuracy"] = "auc"
    """of the select split; test is never seen"""
    seeds: int = 1
    """a trial's score is the mean over so many seeds; 3 or more where select is small"""
    final_seeds: int = 10
    """fresh seeds on which the winner and the default run"""
    asha: Asha | None = None
    common: dict[str, Any] = field(default_factory=dict)
    """what every row searches beside the spaces of the methods in it; name: [kind, ...]"""
    spaces: dict[str, dict[str, Any]] = field(default_factory=dict)
    """replaces a method's own space"""
    batch: int = 8
    """optuna: so many trials are asked for at a time"""
    seed: int = 0
    """decides the list of trials"""

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
    """10, and 30 where test has under 500 rows"""
    preset: str = "medmnist"
    training: dict[str, Any] = field(default_factory=dict)
    """fields that differ from the preset"""
    protocols: Annotated[tuple[Literal["equal", "paper"], ...], Listed] = ("equal",)
    meta_fraction: float = 0.2
    crossfit: int = 1
    controls: bool = False
    """the control rows of each method that learns from meta rows (paper: always)"""
    same: Annotated[tuple[Literal["passes", "time"], ...], Listed] = ()
    """each method's upstream with as many passes, or as much time"""
    threads: int = 1
    oracle_test: bool = False

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
        """Rows of all tables together, control rows apart."""
        axes = (self.benchmarks, self.models, self.protocols, self.methods)
        return math.prod(map(len, axes))


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Study:
    """What a study file says."""

    name: str
    question: str = ""
    family: Family = ()
    """comparisons tested together: a row, meant against its own baseline, or ``row over base``"""
    margin: float = 0.5
    """points of accuracy within which two rows count as equal"""
    prediction: str = ""
    """written before the first run"""
    blocks: tuple[Block, ...] = ()
    resources: Resources = field(default_factory=Resources)
    workers: int | None = None
    """runs at a time; as many as fit unless given"""
    address: str = ""
    """of a Ray cluster; RAY_ADDRESS and --address go before it"""
    dashboard: bool = False
    out: Path = Path("runs")
    data: Path | None = None
    retries: int = 1
    """how often a run that failed is tried again"""
    checkpoint_every: int = 1
    allow_unverified: bool = False
    memory_gib: float = 4.0
    tensorboard: bool = True
    wandb: dict[str, Any] | None = None
    """arguments of Ray's WandbLoggerCallback"""
    mlflow: dict[str, Any] | None = None
    """arguments of Ray's MLflowLoggerCallback"""
    tune: Tune | None = None

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers: expected 1 or more, got {self.workers}")
        for name, least in (("retries", 0), ("checkpoint_every", 1), ("memory_gib", 0)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name}: expected {least} or more, got {getattr(self, name)}")
        if not 0 <= self.margin < math.inf:
            raise ValueError(f"margin: expected points of 0 or more, got {self.margin}")
        for block in self.blocks if self.tune is not None else ():
            if block.same:
                raise ValueError("same: expected none beside tune, which has equal passes itself")
            if block.seeds is not None:
                raise ValueError("seeds: expected none beside tune; see tune.seeds and final_seeds")
        each = self.tune.trials * self.tune.seeds if self.tune is not None else 0
        count = sum(block.rows * (each or len(block.seeds or (0,))) for block in self.blocks)
        if count > MAX_RUNS:
            raise ValueError(f"expected at most {MAX_RUNS:,} runs, got {count:,}")
        if not re.fullmatch(r"\w[\w.-]*", self.name):
            raise ValueError(f"name: expected letters, digits, -, _ and ., got {self.name!r}")

    def pairs(self) -> list[tuple[str, str]]:
        """Row and base of each comparison of the family, in the names that runs have.

        Raises:
            NamingError: one of them is no row.
        """
        found = [comparison(entry) for entry in self.family]
        return [(cells.row_name(row), base and cells.row_name(base)) for row, base in found]

    def asked(self) -> dict[str, Any]:
        """What the study asks, as a report reads it."""
        return {
            "question": self.question,
            "family": [OVER.join(filter(None, each)) for each in self.pairs()],
            "margin": self.margin,
            "prediction": self.prediction,
        }


PRODUCT = runs.field_names(Block)
"""What a block may say; at the top of the file it is the default of every block."""
OF_STUDY = tuple(name for name in runs.field_names(Study) if name != "name")


class _Loader(yaml.SafeLoader):
    """Plain YAML, nothing of Python's."""


MERGE, TEXT = "tag:yaml.org,2002:merge", "tag:yaml.org,2002:str"


def _check_keys(node: yaml.Node | None, seen: set[int], above: tuple[int, ...] = ()) -> None:
    """Refuse a key that is no text or is given twice, and an anchor that holds itself."""
    if node is None or isinstance(node, yaml.ScalarNode):
        return
    if id(node) in above:
        raise yaml.constructor.ConstructorError(
            None, None, "an anchor holds itself", node.start_mark
        )
    if id(node) in seen:
        return
    seen.add(id(node))
    keys: set[str] = set()
    for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
        if key.tag not in (TEXT, MERGE):
            got = key.value if isinstance(key, yaml.ScalarNode) else f"a {key.id}"
            text = f"expected a text as a key, in quotes where it reads as more, got {got}"
            raise yaml.constructor.ConstructorError(None, None, text, key.start_mark)
        if key.value in keys and key.tag == TEXT:
            text = f"the key {key.value!r} is given twice"
            raise yaml.constructor.ConstructorError(None, None, text, key.start_mark)
        keys.add(key.value)
    for each in node.value:
        inner = each[1] if isinstance(node, yaml.MappingNode) else each
        _check_keys(inner, seen, (*above, id(node)))


def load(path: Path, settings: Sequence[str] = ()) -> Study:
    """The study in a file, with ``settings`` such as ``training.epochs=5`` put over it.

    Raises:
        StudyError: it cannot be read, a key is not known, or a value is not allowed.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        there = sorted(each.name for each in path.parent.glob("*.y*ml"))
        hint = f" (there is: {', '.join(there)})" if there else ""
        raise StudyError(f"study {path}: {error.strerror}{hint}") from error
    except UnicodeDecodeError as error:
        raise StudyError(f"study {path}: expected UTF-8 text, {error.reason}") from error
    try:
        node = yaml.compose(text, Loader=_Loader)
        _check_keys(node, set())
        content = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise StudyError(f"study {path}{where}: {error.problem}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise StudyError(f"study {path}: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict) or not isinstance(node, yaml.MappingNode):
        raise StudyError(f"study {path}: expected a mapping such as methods: [none, mixup]")
    given: dict[tuple[str, ...], str] = {}
    for setting in settings:
        keys, value = _setting(setting)
        for place in _places(content, keys[0]):
            content = _put(content, (*place, *keys), value, setting)
        given[keys] = setting
    file = _File(path, node, given)
    made = file.typed(content)
    for place, block in enumerate(made.blocks):
        file.checked(block, ("blocks", place) if "blocks" in content else ())
        if made.tune is not None:
            file.searched(made.tune, block)
    for extra in ("wandb", "mlflow"):
        if getattr(made, extra) is not None and importlib.util.find_spec(extra) is None:
            text = f"it is not installed: pip install 'augbench[{extra}]', or leave it out"
            raise file.error((extra,), text)
    return made


def _setting(text: str) -> tuple[tuple[str, ...], Any]:
    key, sign, value = text.partition("=")
    keys = tuple(part.strip() for part in key.split("."))
    if not sign or not all(keys):
        raise StudyError(f"--set {text}: expected key=value, such as training.epochs=5")
    try:
        return keys, yaml.load(value, Loader=_Loader)
    except yaml.YAMLError as error:
        raise StudyError(f"--set {text}: the value cannot be read as YAML") from error


def _places(content: dict[str, Any], key: str) -> list[tuple[str, ...]]:
    """Where a key is set: at the top, and in each block that would else go before that."""
    blocks = content.get("blocks") if key in PRODUCT else None
    listed = blocks if isinstance(blocks, list) else []
    held = [place for place, block in enumerate(listed) if isinstance(block, dict) and key in block]
    return [(), *(("blocks", str(place)) for place in held)]


def _put(content: Any, keys: tuple[str, ...], value: Any, setting: str) -> Any:
    """A copy of a mapping or a list, with the value put in; anchors may share the original."""
    if not keys:
        return value
    key, *rest = keys
    if isinstance(content, list):
        if not key.isdigit() or int(key) >= len(content):
            raise StudyError(
                f"--set {setting}: expected a number from 0 to {len(content) - 1} in the place of "
                f"{key!r}, as the file has a list of {len(content)} there"
            )
        place = int(key)
        inner = _put(content[place], tuple(rest), value, setting)
        return [*content[:place], inner, *content[place + 1 :]]
    held = content if isinstance(content, dict) else {}
    if key.isdigit():
        raise StudyError(f"--set {setting}: the file has no list in which {key} could be a place")
    return {**held, key: _put(held.get(key), tuple(rest), value, setting)}


@dataclass(frozen=True, config={"arbitrary_types_allowed": True})
class _File:
    """A file with the lines of its keys, for errors."""

    path: Path
    node: yaml.MappingNode
    given: dict[tuple[str, ...], str]

    def typed(self, content: dict[str, Any]) -> Study:
        own = content.get("name", as_name(self.path.stem))
        product = {key: value for key, value in content.items() if key in PRODUCT}
        rest = {key: value for key, value in content.items() if key not in PRODUCT}
        unknown = [key for key in rest if key not in OF_STUDY and key != "name"]
        if unknown:
            raise self._unknown((str(unknown[0]),), (*PRODUCT, *OF_STUDY))
        listed = rest.pop("blocks", None)
        if listed is not None and (not isinstance(listed, list) or not listed):
            raise self.error(("blocks",), "expected a list of blocks", listed)
        where: list[Keys] = [()]
        blocks = [product]
        if listed is not None:
            where = [("blocks", place) for place in range(len(listed))]
            blocks = []
            for place, block in enumerate(listed):
                if not isinstance(block, dict):
                    raise self.error(("blocks", place), "expected a mapping", block)
                own_training = self._mapping(block, ("blocks", place), "training")
                training = {**self._mapping(product, (), "training"), **own_training}
                blocks.append({**product, **block, "training": training})
        made = tuple(
            self._made(Block, block, path) for block, path in zip(blocks, where, strict=True)
        )
        return self._made(Study, {**rest, "name": own, "blocks": made}, ())

    def _mapping(self, content: dict[str, Any], where: Keys, key: str) -> dict[str, Any]:
        found = content.get(key, {})
        if not isinstance(found, dict):
            raise self.error((*where, key), "expected a mapping", found)
        return found

    def _made(self, kind: type, content: Any, where: Keys) -> Any:
        try:
            made = TypeAdapter(kind).validate_python(content)
            self._check_flags(content, made, where)
            return made
        except NamingError as error:
            raise StudyError(f"study {self.path}: {error}") from error
        except ValidationError as error:
            first = error.errors()[0]
            path = (*where, *first["loc"])
            if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
                known = _fields(kind, first["loc"][:-1])
                raise self._unknown(path, known) from error
            text = first["msg"].removeprefix("Value error, ")
            key, colon, rest = text.partition(": ")  # a check of the whole names its key itself
            if colon and key in (*_fields(kind, first["loc"]), *(PRODUCT if kind is Study else ())):
                path, text = (*path, key), rest
            raise self.error(path, text, first["input"]) from error

    def _check_flags(self, content: dict[str, Any], made: Any, where: Keys) -> None:
        """Refuse true where a number is meant: pydantic would take it for 1."""
        for key, value in content.items():
            read = getattr(made, key)
            if isinstance(value, bool) and not isinstance(read, bool):
                raise self.error((*where, key), "expected a number", value)
            if isinstance(value, dict) and is_dataclass(read):
                self._check_flags(value, read, (*where, key))

    def checked(self, block: Block, where: Keys) -> None:
        """Refuse what only the rest of augbench can tell to be wrong."""
        known = runs.field_names(Training)
        for key in block.training:
            if key not in known:
                raise self._unknown((*where, "training", key), known)
        flags = {key for key in known if isinstance(getattr(Training(), key), bool)}
        for key, value in block.training.items():
            if isinstance(value, bool) and key not in flags:
                raise self.error((*where, "training", key), "expected a number", value)
        checks: list[tuple[str, Callable[[], Any]]] = [
            ("preset", lambda: cells.training_of(block.preset, {})),
            ("training", lambda: cells.training_of(block.preset, block.training)),
            ("protocols", lambda: _protocols(block)),
            *(("benchmarks", lambda name=name: parse_benchmark(name))
              for name in block.benchmarks),
            *(("seeds", lambda name=name: check_seeds(
                parse_benchmark(name), block.seeds or ())) for name in block.benchmarks),
            *(("models", lambda name=name: models.canonical(name)) for name in block.models),
            *(("methods", lambda name=name: cells.parse_row(name, Protocol()))
              for name in block.methods),
        ]  # fmt: skip
        for key, check in checks:
            try:
                check()
            except methods.Unavailable:  # a row of the table that says why, not a slip
                continue
            except ValueError as error:
                raise StudyError(f"study {self.path}{self._line((*where, key))}: {error}") from None

    def searched(self, tune: Tune, block: Block) -> None:
        """Refuse a space that no row can search."""
        known = runs.field_names(Training)
        for key, space in tune.common.items():
            where = ("tune", "common", key)
            if key not in known:
                raise self._unknown(where, known)
            if key == "epochs":
                raise self.error(where, "expected none, as every trial has equal passes")
            try:
                for value in parameter(key, space).grid():
                    cells.training_of(block.preset, {**block.training, key: value})
            except NamingError as error:
                raise self.error(where, _less(str(error), key)) from error
        for name, spaces in tune.spaces.items():
            where = ("tune", "spaces", name)
            if name not in methods.registry():
                raise self._unknown(where, methods.registry())
            try:
                takes = arguments_of(methods.load(name))
            except methods.Unavailable:  # a row of the table that says why
                continue
            for key, space in spaces.items():
                if key not in takes:
                    raise self._unknown((*where, key), takes)
                try:
                    for value in parameter(key, space).grid():
                        convert(from_yaml(value), takes[key].annotation, key)
                except NamingError as error:
                    raise self.error((*where, key), _less(str(error), key)) from error

    def _unknown(self, path: Keys, known: Iterable[str]) -> StudyError:
        listed = sorted(known)
        name = str(path[-1])
        return StudyError(
            f"study {self.path}{self._line(path)}: unknown key {name!r}{nearest(name, listed)} "
            f"(known: {', '.join(listed)})"
        )

    def error(self, path: Keys, text: str, got: Any = None) -> StudyError:
        """What is wrong at a place of the file."""
        key = ".".join(str(part) for part in path if not isinstance(part, int))
        shown = f", got {got!r}" if isinstance(got, str | int | float | bool | list) else ""
        shown = "" if ", got " in text else shown
        return StudyError(
            f"study {self.path}{self._line(path)}: {key + ': ' if key else ''}{text}{shown}"
        )

    def _line(self, path: Keys) -> str:
        """``, line 12``: of the deepest part of the path that the file has."""
        told = tuple(map(str, path))
        for setting_path, setting in self.given.items():
            inner = told[2:] if told[:1] == ("blocks",) and setting_path[0] in PRODUCT else told
            if setting_path == inner[: len(setting_path)]:
                return f", --set {setting}"
        node: yaml.Node = self.node
        mark = node.start_mark
        for place, part in enumerate(path):
            found = _inner(node, part)
            if found is None and place >= 2 and path[0] == "blocks":  # told at the top of the file
                return self._line(path[place:])
            if found is None:
                break
            mark, node = found
        return f", line {mark.line + 1}"


def _less(text: str, key: str) -> str:
    """An error without the key, which the place in the file tells."""
    return text.removeprefix("tune: ").removeprefix(f"{key}: ")


def _inner(node: yaml.Node, part: str | int) -> tuple[yaml.Mark, yaml.Node] | None:
    if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
        return node.value[part].start_mark, node.value[part]
    if isinstance(node, yaml.MappingNode):
        merged = []
        for key, value in node.value:
            if key.value == str(part):
                return key.start_mark, value
            if key.tag == MERGE:
                merged += value.value if isinstance(value, yaml.SequenceNode) else [value]
        return next(filter(None, (_inner(each, part) for each in merged)), None)
    return None


def _fields(kind: type, path: Keys) -> tuple[str, ...]:
    """The keys that are known at a place below a dataclass."""
    inner = {"resources": Resources, "tune": Tune, "asha": Asha}
    named = [part for part in path if part in inner]
    return runs.field_names(inner[str(named[-1])] if named else kind)


def _protocols(block: Block) -> list[Protocol]:
    return [
        Protocol(name=name, meta_fraction=block.meta_fraction, crossfit=block.crossfit)
        if name == "equal"
        else Protocol(name=name)
        for name in block.protocols
    ]


@dataclass(frozen=True, kw_only=True)
class Source:
    """What must be known of a data set to name its runs."""

    checksum: str
    shape: tuple[int, int, int]
    classes: int
    test_rows: int


def source_of(benchmark: Benchmark, root: Path, study: Study) -> Source:
    """Facts about a data set, from the catalogue where its files are the official ones.

    Raises:
        DataError: a file of one's own cannot be read.
    """
    entry = CATALOGUE.get(benchmark.name)
    if entry is not None and any(entry.files.values()) and not study.allow_unverified:
        size = benchmark.size if benchmark.size in entry.sizes else min(entry.sizes)
        channels = 3 if benchmark.as_rgb else entry.channels
        return Source(
            checksum="+".join(file.md5 for file in entry.files[size]),
            shape=(channels, size, size),
            classes=len(entry.classes),
            test_rows=entry.counts[2],
        )
    arrays = splits.arrays_of(benchmark, root, study.allow_unverified, study.memory_gib)
    grey = arrays.train_x.ndim == 3
    channels = (3 if benchmark.as_rgb else 1) if grey else arrays.train_x.shape[3]
    return Source(
        checksum=arrays.checksum,
        shape=(channels, *arrays.train_x.shape[1:3]),
        classes=len(arrays.classes),
        test_rows=len(arrays.test_y),
    )


@dataclass(frozen=True, config={"arbitrary_types_allowed": True})
class Table:
    """All runs of one benchmark, model and protocol: what one table compares."""

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
    """rows whose plug-in cannot be had, with the reason"""

    @property
    def name(self) -> str:
        """How it is called in messages."""
        return f"{canonical(self.benchmark)}, {self.model}, {self.protocol.name}"

    def of(self, row: Row, training: Training | None = None) -> Callable[[int], Cell]:
        """Makes the cell of a row for a seed; what is the same for all seeds is done once."""
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
        return lambda seed: replace(first, run=_with_seed(first.run, seed))

    def cells(self, rows: Iterable[Row] | None = None) -> list[Cell]:
        """The runs, seed by seed, so that a sweep cut short has whole seeds."""
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
    """The tables of a study."""

    def __init__(self, study: Study, root: Path) -> None:
        self.study, self.data_root = study, root
        self._sources: dict[tuple[object, ...], Source] = {}
        self._fits: set[tuple[str, tuple[int, ...], int]] = set()

    def check_family(self) -> None:
        """Refuse a comparison that no table of the study can make.

        Raises:
            StudyError: names the row and the nearest one, or what is missing beside it.
        """
        sides: dict[str, set[str]] = {}  # blocks may hold rows of one table between them
        for table in self.tables:
            sides.setdefault(table.name, set()).update(self._names(table))
        known = set().union(*sides.values())
        absent = {name for table in self.tables for name, _ in table.missing}
        for row, base in self.study.pairs():
            for name in filter(None, (row, base)):
                if name not in known | absent:
                    raise StudyError(f"family: {unknown('row', name, known)}")
            wanted = {base} if base else set(blocks.bases(row_parts(row)[0])) - {row}
            if not ({row} | wanted) & absent and not any(
                row in names and wanted & names for names in sides.values()
            ):
                told = f"{row} has no baseline; write {row}{OVER}ROW, or add none"
                if base:
                    told = f"{row} and {base} stand in no table together"
                raise StudyError(f"family: {told}")

    def _names(self, table: Table) -> set[str]:
        """The rows that a table has, or will have once those of an equal budget are known."""
        return {row.name for row in table.rows}.union(
            *(cells.equal_budget_names(table.rows, kind) for kind in table.block.same)
        )

    @cached_property
    def tables(self) -> list[Table]:
        """One for each benchmark, model and protocol of each block."""
        return [table for block in self.study.blocks for table in self._of(block)]

    def _of(self, block: Block) -> Iterator[Table]:
        training = cells.training_of(block.preset, block.training)
        for name, model, protocol in itertools.product(
            block.benchmarks, block.models, _protocols(block)
        ):
            benchmark, network = parse_benchmark(name), models.canonical(model)
            source = self.source(benchmark)
            self._check(network, source)
            rows, missing = rows_of(block.methods, protocol)
            if block.controls or protocol.name == "paper":  # there they are compulsory
                rows += cells.control_rows(rows, benchmark, protocol)
            default = range(advised(source.test_rows, benchmark.folds))
            seeds = tuple(default if block.seeds is None else block.seeds)
            if benchmark.folds and self.study.tune is not None:
                raise NamingError(
                    f"tune: {canonical(benchmark)}: expected the official split, as rows that "
                    "choose a setting would be test rows of other folds"
                )
            check_seeds(benchmark, seeds)
            yield Table(
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

    def source(self, benchmark: Benchmark) -> Source:
        """Facts about a data set, looked up once."""
        key = (*splits.stored(benchmark), benchmark.as_rgb)
        if key not in self._sources:
            self._sources[key] = source_of(benchmark, self.data_root, self.study)
        return self._sources[key]

    def _check(self, model: str, source: Source) -> None:
        """Refuse a network that cannot be built on these images, before anything runs."""
        key = model, source.shape, source.classes
        if key not in self._fits:
            check_model(model, Spec(2, source.classes, source.shape))
            self._fits.add(key)


def check_model(model: str, spec: Spec) -> None:
    """Refuse a network that cannot be built.

    Raises:
        NamingError: the message holds the reason.
    """
    try:
        with torch.device("meta"):  # shapes are checked, and nothing is filled with numbers
            models.build(model, spec)
    except NamingError:
        raise
    except (Exception, SystemExit) as error:  # one of the user's own may raise anything
        shape = " x ".join(map(str, spec.shape))
        raise NamingError(
            f"model: {model} cannot be built for {shape} images: {type(error).__name__}: {error}"
        ) from error


def rows_of(names: Sequence[str], protocol: Protocol) -> tuple[list[Row], list[tuple[str, str]]]:
    """The rows, and those whose plug-in cannot be had, with the reason."""
    rows: list[Row] = []
    missing = []
    for name in names:
        try:
            rows.append(cells.parse_row(name, protocol))
        except methods.Unavailable as reason:
            missing.append((name, str(reason)))
    return list(dict.fromkeys(rows)), missing


def label(cell: Cell) -> str:
    """A run in words, the name of its table first: what ``--only`` is compared with."""
    run = cell.run
    return f"{run.benchmark}, {run.model}, {run.protocol}, {run.row}, seed {run.seed}"


def chosen(pattern: str) -> Callable[[Cell], bool]:
    """Whether a run's label holds the pattern; ``*`` and ``?`` stand for any letters."""
    plain = pattern.replace("[", "[[]")  # names of rows have brackets
    return lambda cell: fnmatch.fnmatchcase(label(cell), f"*{plain}*") if pattern else True


@dataclass(frozen=True)
class Estimate:
    """Seconds of one run at a time; of some runs nothing is known."""

    seconds: float
    unknown: int


class Costs:
    """Seconds of a run, foreseen from the runs that lie in the results folder."""

    def __init__(self, device: str = "") -> None:
        self._device = device
        self._exact: dict[str, list[float]] = {}
        self._alike: dict[str, list[float]] = {}

    def saw(self, run: runs.Run, result: Mapping[str, Any]) -> None:
        """Remember what a run that is done has taken, if it was on such a device."""
        cost = result.get("cost")
        if not cost or (self._device and result["device"]["type"] != self._device):
            return
        seconds = (cost["charged_seconds"] + cost["evaluation_seconds"]) / cost["epochs"]
        self._exact.setdefault(self._key(run), []).append(seconds)
        self._alike.setdefault(self._key(run, own=False), []).append(seconds)

    def of(self, run: runs.Run, done: int = 0) -> float | None:
        """Mean of the other seeds; else of other rows on the same data and network; else None.

        Of a run of which so many epochs are ``done`` it is the rest.
        """
        for seconds in (
            self._exact.get(self._key(run)),
            self._alike.get(self._key(run, own=False)),
        ):
            if seconds:
                return sum(seconds) / len(seconds) * (run.training.epochs - done)
        return None

    def total(self, left: Iterable[tuple[runs.Run, int]]) -> Estimate:
        """Of all these runs, one after the other; with each the epochs of it that are done."""
        known = [self.of(run, done) for run, done in left]
        return Estimate(
            seconds=sum(each for each in known if each is not None),
            unknown=sum(each is None for each in known),
        )

    @staticmethod
    def _key(run: runs.Run, own: bool = True) -> str:
        training = run.training
        parts = [run.benchmark, run.model, str(training.batch_size), training.precision]
        parts.append(str(run.threads))
        return "|".join([*parts, run.method, run.control] if own else parts)
