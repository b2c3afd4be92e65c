"""Studies that reproduce a paper are held to it, line by line, by the table in the file's head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import methods
from analysis.facts import column_key
from analysis.runs import Training, row_name
from benchmarks.data.names import Benchmark, canonical, parse_benchmark
from benchmarks.studies import cells, loading, shipped
from benchmarks.studies.cells import Row
from benchmarks.studies.plan import Experiment, Plan
from methods.naming import Call, Links, bind, call_of, parameters, parse, render, written_out
from tests.sweeping import data_beside

HEADING = "# setting | paper | here | why"
STUDIES = (
    "autodo_tables",
    "lpa3_table1",
    "lpa3_table3",
    "medmnist_all",
    "medmnist_gpu",
    "medmnist_small",
    "saflex_table1",
    "saflex_table2",
    "saflex_table3",
)
ALWAYS = {
    *("models", "benchmarks", "protocols", "seeds", "epochs", "batch_size", "optimizer"),
    *("learning_rate", "weight_decay", "schedule", "precision"),
}
"""Settings that a table has even at their defaults."""
SPEED = {"channels_last", "compile"}
"""Fields of a training that change its speed, not what is trained."""


class Line(NamedTuple):
    """A setting, what the paper says of it, and what it is in tier ``paper``."""

    setting: str
    of: str
    """beginning of the names of the benchmarks that it is about"""
    paper: str
    here: frozenset[str]


def table(path: Path) -> list[Line]:
    """The lines below the heading, up to the first that has other columns."""
    texts = path.read_text(encoding="utf-8").splitlines()
    found = []
    for text in texts[texts.index(HEADING) + 1 :]:
        parts = [part.strip() for part in f"{text} ".removeprefix("#").split(" | ")]
        if len(parts) != 4:
            break
        setting, _, of = parts[0].partition(" (")
        found.append(Line(setting, of.rstrip(")"), parts[1], frozenset(told(setting, parts[2]))))
    return found


def told(setting: str, here: str) -> Iterator[str]:
    """The values in a cell, spelled as those of a run."""
    for value in written_out(here):
        if setting.startswith("row ") or setting.endswith(".upstream"):
            yield cells.row_name(value)
        else:
            yield key_of(parse_benchmark(value)) if setting == "benchmarks" else value


def key_of(benchmark: Benchmark) -> str:
    """Its name, of a user's own data with that of the folder, as in tables."""
    return column_key(canonical(benchmark), benchmark.path)


def spelled(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return render(value) if isinstance(value, Call | Links | bool) else str(value)


def resolved(line: Line, made: Sequence[Experiment], apart: set[str]) -> set[str]:
    """The values of a setting in these experiments; rows without the upstream of ``apart``."""
    key, found = line.setting, set[str]()
    for each in made:
        if key.startswith("row "):
            found |= {bare(row, apart) for row in each.rows}
        elif "." in key:
            found |= set(arguments(key, each.rows))
        elif key != "meta_fraction" or each.protocol.crossfit == 1:
            values = {
                **asdict(each.training),  # type: ignore[call-overload]
                **asdict(each.protocol),
                "protocols": each.protocol.name,
                "benchmarks": key_of(each.benchmark),
                "as_rgb": each.benchmark.as_rgb,
                "models": each.model,
                "seeds": len(each.seeds),
                "oracle_test": each.block.oracle_test,
            }
            found.add(spelled(values[key]))
    return found


def arguments(key: str, rows: Sequence[Row]) -> Iterator[str]:
    """The values of METHOD.ARGUMENT in the rows of that method."""
    name, _, argument = key.partition(".")
    made = methods.load(name)
    for call in (parse(row.method) for row in rows):
        if isinstance(call, Call) and call.name == name:
            bound = bind(call, made, presets=getattr(made, "presets", {}))
            yield spelled(bound.get(argument, parameters(made)[argument].default))


def bare(row: Row, apart: set[str]) -> str:
    """The name of a row, without its upstream if another line of the table tells it."""
    call = parse(row.method)
    if not isinstance(call, Call) or call.name not in apart:
        return row.name
    kept = {name: value for name, value in call.arguments if name != "upstream"}
    return row_name(render(call_of(call.name, kept)), "" if row.control == "all" else row.control)


def differences(path: Path, *settings: str) -> list[str]:
    """What the table of a study tells otherwise than tier ``paper`` has it."""
    lines, found = table(path), []
    plan = Plan(loading.load(path, settings, "paper"), Path())
    apart = {line.setting.partition(".")[0] for line in lines if line.setting.endswith(".upstream")}
    for line in lines:
        made = [
            each
            for each in plan.experiments
            if key_of(each.benchmark).removeprefix("folder:").startswith(line.of)
        ]
        values = resolved(line, made, apart)
        same = line.here <= values if line.setting.startswith("row ") else line.here == values
        if not (same and line.paper):
            found.append(f"{line.setting} ({line.of}): {sorted(line.here)}, not {sorted(values)}")
    rows = {bare(row, apart) for each in plan.experiments for row in each.rows}
    return found + sorted(rows.difference(*(line.here for line in lines)))


def untold(experiments: Sequence[Experiment], lines: Sequence[Line]) -> set[str]:
    """The settings that the table should have for these experiments of tier ``paper``, and lacks.

    All that a reader needs to repeat a run, and what is not the default.
    """
    missing = set()
    for each in experiments:
        plain, training = asdict(Training()), asdict(each.training)  # type: ignore[call-overload]
        changed = {name for name, value in training.items() if value != plain[name]}
        asked = ALWAYS | changed.difference(SPEED)
        asked |= {"momentum"} if each.training.optimizer == "sgd" else set()
        where = key_of(each.benchmark).removeprefix("folder:")
        there = {line.setting for line in lines if where.startswith(line.of)}
        missing |= {f"{setting} ({where})" for setting in asked.difference(there)}
    return missing


@pytest.mark.parametrize("name", STUDIES)
def test_a_table_tells_every_setting(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data_beside(monkeypatch)
    path = shipped.find(Path(name))
    experiments = Plan(loading.load(path, (), "paper"), Path()).experiments
    lines = table(path)
    assert not untold(experiments, lines)
    for setting in ALWAYS:
        assert untold(experiments, [each for each in lines if each.setting != setting])


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_is_what_its_table_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data_beside(monkeypatch)
    assert not differences(shipped.find(Path(name)))


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("blocks.3.training.learning_rate=0.1", "learning_rate (svhn)"),
        ("seeds=3", "seeds ()"),
        ("models=wrn28_10", "models ()"),
    ],
)
def test_a_changed_setting_is_found(setting: str, line: str) -> None:
    found = differences(shipped.find(Path("autodo_tables")), setting)
    assert [text.partition(":")[0] for text in found] == [line]
