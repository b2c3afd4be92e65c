"""Every command, study and snippet of README and docs is read by what would read it in earnest."""

import ast
import importlib
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tyro

import methods
from analysis.runs import Run, Training
from benchmarks import contract
from benchmarks.cli import arguments, main
from benchmarks.cli.common import study_of
from benchmarks.contract import CASES, CHECKS, check
from benchmarks.data.names import parse_benchmark
from benchmarks.running import local
from benchmarks.speed import gpu
from benchmarks.studies import loading, shipped
from benchmarks.studies.plan import Plan, chosen
from benchmarks.training import models
from benchmarks.training.trainer import fit
from methods import own
from methods.base import Method, Spec
from tests import sweeping

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "AGENTS.md", "CONTRIBUTING.md", "ray_configs/README.md"]
PAGES += sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md"))
EXTENDING = "docs/extending.md"
POLICIES = "docs/methods/policies.md"
SHELL = r"""
augbench() { printf '%s\0' "$@"; printf '\n\0'; }
command_not_found_handle() {
    while [ $# -gt 0 ] && [ "$1" != augbench ]; do shift; done
    [ $# -gt 0 ] && "$@"
    true
}
"""
"""Prints the arguments of each call of augbench, also behind another command, and runs nothing."""


@cache
def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


@cache
def blocks(page: str, *kinds: str) -> tuple[str, ...]:
    found = re.findall(r"^ *```(\w+)\n(.*?)^ *```$", text(page), re.DOTALL | re.MULTILINE)
    return tuple(content for kind, content in found if kind in kinds)


def prose(page: str) -> str:
    """A page without its blocks."""
    return re.sub(r"^ *```.*?^ *```$", "", text(page), flags=re.DOTALL | re.MULTILINE)


@cache
def commands(page: str) -> list[list[str]]:
    """The command lines of a page: those of its blocks, and those within its sentences."""
    # a verb alone is a word, not a command line
    inline = [
        " ".join(each.split()) for each in re.findall(r"`(augbench \w+ [^`|]*)`", prose(page))
    ]
    inline = [each for each in inline if not re.search(r"\b[A-Z]{3,}\b|\.\.\.", each)]
    script = "\n".join([*blocks(page, "sh", "bash"), *inline])
    told = subprocess.run(
        [shutil.which("bash") or "bash", "-c", SHELL + script],
        env={"PATH": "/nonexistent", "HOME": "/home/you", "SLURM_ARRAY_TASK_ID": "3"},
        capture_output=True,
        text=True,
        check=False,
    )
    *calls, rest = told.stdout.split("\n\0")
    assert not rest
    return [call.rstrip("\0").split("\0") for call in calls]


def checked(given: list[str]) -> None:
    """Read a command line as augbench does, with every name in it."""
    command = main.read(given)
    match command:
        case arguments.RunCommand():
            study_of(command, command.method, (command.seed,), whole=False)
        case arguments.CompareCommand():
            same = command.same or ()
            study_of(command, command.methods, command.seeds, controls=command.controls, same=same)
        case arguments.SweepCommand(file=Path() as file):
            found = shipped.find(file)
            assert found.is_file() or file.suffix == ".yaml"
            if found.is_file():
                settings = [setting for each in command.settings for setting in each]
                study = loading.load(found, settings, command.tier)
                if command.only:
                    study = loading.load(found, [*settings, "seeds=1"])
                    wanted = chosen(command.only)
                    cells = [e.cells() for e in Plan(study, Path("data")).experiments]
                    assert any(wanted(cell) for each in cells for cell in each), command.only
        case arguments.PlanCommand() | arguments.ReportCommand():
            tiers = {f"{name}-{tier}" for name in shipped.names() for tier in ("paper", "fair")}
            assert command.study in {"", "study", *shipped.names(), *tiers}
        case arguments.ShowCommand():
            parse_benchmark(command.benchmark)
            methods.canonical(command.method)
            models.canonical(command.model)
        case arguments.DataCommand():
            for name in command.names:
                parse_benchmark(name)
        case _:
            pass


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of somebody who has written the files that the docs show, and installed them."""
    for page in (EXTENDING, "README.md"):
        for block in blocks(page, "python"):
            if named := re.match(r"# (\w+\.py)\n", block):
                (tmp_path / named[1]).write_text(block)
    (tmp_path / "policy.yaml").write_text(blocks(POLICIES, "yml")[0])
    (block,) = blocks(EXTENDING, "toml")
    points = tomllib.loads(block)["project"]["entry-points"]
    told = tmp_path / "yours-1.dist-info"
    told.mkdir()
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: yours\nVersion: 1\n")
    lines = [
        line
        for group, named in points.items()
        for line in (f"[{group}]", *(f"{name} = {target}" for name, target in named.items()))
    ]
    (told / "entry_points.txt").write_text("\n".join(lines) + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    methods.registry.cache_clear()
    yield tmp_path
    monkeypatch.undo()
    for file in tmp_path.glob("*.py"):
        sys.modules.pop(file.stem, None)
    importlib.invalidate_caches()
    methods.registry.cache_clear()


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize("page", PAGES)
def test_commands_can_be_read(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    for given in commands(page):
        try:
            checked(given)
        except (SystemExit, ValueError) as error:
            pytest.fail(f"augbench {given}: {error} {capsys.readouterr().err}")


@pytest.mark.parametrize("page", PAGES)
def test_scripts_can_be_parsed(page: str) -> None:
    for script in blocks(page, "sh", "bash"):
        parsed(script)
        named = re.findall(r"^#SBATCH (.*)$", script, re.MULTILINE)
        assert all(re.fullmatch(r"--[a-z-]+(=\S+)?", each) for each in named), named


def parsed(script: str) -> None:
    bash = shutil.which("bash") or "bash"
    subprocess.run([bash, "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize("page", PAGES)
def test_what_is_not_augbench_takes_its_arguments_too(page: str) -> None:
    joined = "\n".join(blocks(page, "sh", "bash")).replace("\\\n", " ")
    for given in re.findall(r"ray symmetric-run (.*)", joined):
        before, _, command = given.partition(" -- ")
        assert command.split()[0] == "augbench", command
        ray_run = importlib.import_module("ray.scripts.symmetric_run")
        left = ray_run.curate_and_validate_ray_start_args(shlex.split(before))
        started = importlib.import_module("ray.scripts.scripts").start
        assert "--address" in before and started.make_context("start", [*left, "--head"])
    for given in re.findall(r"python -m benchmarks.speed.gpu (.*)", joined):
        tyro.cli(gpu.Arguments, args=shlex.split(given, comments=True))


def test_the_container_has_what_is_installed() -> None:
    text_of = dict(re.findall(r"^%(\w+)\n(.*?)(?=^%|\Z)", text("docs/augbench.def"), re.S | re.M))
    copied = [line.split() for line in text_of["files"].splitlines() if line.strip()]
    for source, target in copied:
        place = "/opt/augbench" + (f"/{source}" if (ROOT / source).is_file() else "")
        assert (ROOT / source).exists() and target == place
    told = tomllib.loads(text("pyproject.toml"))
    packages = [
        each.rstrip("*") for each in told["tool"]["setuptools"]["packages"]["find"]["include"]
    ]
    modules = [f"{each}.py" for each in told["tool"]["setuptools"]["py-modules"]]
    read = [told["project"]["readme"], *told["project"]["license-files"]]
    needed = {"pyproject.toml", "constraints.txt", *packages, *modules, *read}
    assert {source for source, _ in copied} == needed
    for name in ("post", "environment", "runscript"):
        parsed(text_of[name])


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        file, _, heading = link.partition("#")
        if "://" in file:
            continue
        target = (ROOT / page).parent / file if file else ROOT / page
        assert target.exists(), link
        if heading:
            assert heading in headings(target), link


def headings(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    found = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in found}


STUDIES = [(page, block) for page in PAGES for block in blocks(page, "yaml")]


@pytest.mark.parametrize(("page", "block"), STUDIES, ids=[page for page, _ in STUDIES])
def test_studies_can_be_loaded(page: str, block: str, tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(block)
    study = loading.load(file)
    if study.family:
        Plan(study, tmp_path).check_family()


SNIPPETS = [(page, block) for page in PAGES for block in blocks(page, "python")]


@pytest.mark.parametrize(("page", "block"), SNIPPETS, ids=[page for page, _ in SNIPPETS])
def test_snippets_import_what_is_there(page: str, block: str) -> None:
    own.import_torchvision()  # whose wheel may be for another torch
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom) and node.module != "my_package":
            module = importlib.import_module(node.module or "")
            for name in node.names:
                whole = f"{node.module}.{name.name}"
                assert hasattr(module, name.name) or importlib.util.find_spec(whole), whole


def snippet(page: str, holds: str) -> str:
    (found,) = [block for block in blocks(page, "python") if holds in block]
    return found


def test_the_loop_runs_and_learns(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    exec(snippet(EXTENDING, "own_loop"), {})
    accuracy = float(capsys.readouterr().out.strip().rpartition(" ")[2])
    assert accuracy > 0.85


def test_the_method_keeps_the_contract() -> None:
    scope: dict[str, Any] = {}
    exec(snippet(EXTENDING, "class Invert"), scope)
    made = scope["Invert"]
    assert issubclass(made, Method)
    for case in CASES[:3]:
        for name in CHECKS:
            assert check(name, made, case) == ""


def test_the_method_that_learns_keeps_the_contract_and_learns() -> None:
    scope: dict[str, Any] = {}
    exec(snippet(EXTENDING, "class Harder"), scope)
    made = scope["Harder"]
    for case in CASES[:3]:
        for name in CHECKS:
            assert check(name, made, case) == ""
    ready = contract.bench(made, CASES[0])
    factors = []
    for step in range(3):
        ready.augment(ready.batch(step=step), step=step)
        factors.append(ready.method.learned()["brightness"])
    assert bool((factors[0] != 1).all()), "each class moves at the first step"
    assert torch.allclose((factors[0] - 1).abs(), torch.full_like(factors[0], 0.02))
    frozen = contract.bench(lambda: made(rate=0.0), CASES[0])
    frozen.augment(frozen.batch())
    assert bool((frozen.method.learned()["brightness"] == 1).all())


def test_the_learner_trains_both_networks() -> None:
    scope: dict[str, Any] = {}
    exec(snippet(EXTENDING, "class Pair"), scope)
    run = Run(
        benchmark="test", data="", model="small_cnn(width=0.25)", method="pair",
        training=Training(epochs=3, batch_size=8, learning_rate=0.01),
    )  # fmt: skip
    fitted = fit(run, contract.splits(CASES[0], False), scope["Pair"]())
    assert fitted.result["cost"]["passes_per_row"] == 4
    losses = [json.loads(line)["select"]["nll"] for line in fitted.state.metric_lines]
    assert losses[-1] < losses[0]
    one, other = (fitted.model.get_submodule(f"pair.{k}") for k in (0, 1))
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    assert all(not torch.equal(a, b) for a, b in pairs)


def test_a_table_in_three_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    rng = np.random.default_rng(0)
    ill = np.arange(80) % 2
    lines = ["age,group,ill"]
    lines += [
        f"{rng.normal() + 2 * each:.2f},{'abc'[rng.integers(3)]},{['no', 'yes'][each]}"
        for each in ill
    ]
    (tmp_path / "patients.csv").write_text("\n".join(lines) + "\n")
    monkeypatch.chdir(tmp_path)
    three = commands("docs/tables.md")[:3]
    assert [given[0] for given in three] == ["data", "compare", "report"]
    for given in three:
        quick = ["--epochs", "2", "--seeds", "1", "--jobs", "1", "--device", "cpu"]
        assert main.run([*given, *(quick if given[0] == "compare" else [])]) == 0
    told = capsys.readouterr().out
    assert "1 of categories (group 3)" in told and "boosting" in told
    assert (tmp_path / "report" / "report.html").exists()


@pytest.mark.usefixtures("reader")
def test_the_network_is_built() -> None:
    network = models.build("py:my_networks:small", Spec(4, 3, (1, 8, 8)))
    assert network(torch.zeros(2, 1, 8, 8)).shape == (2, 3)


def test_the_comparison_runs_as_a_script(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    block = snippet(EXTENDING, "augbench.compare")
    script.write_text(block.replace("epochs=5, seeds=4", "epochs=1, seeds=1, jobs=1, width=0.25"))
    shown = subprocess.check_output([sys.executable, str(script)], text=True, cwd=tmp_path)
    assert re.search(r"row +\nmixup +0\.\d+ +0\.\d+\nnone +0\.\d+ +0\.\d+\n", shown)
    assert (tmp_path / shown.splitlines()[-1]).name == "report.html"


def test_your_own_arrays_give_an_accuracy() -> None:
    scope: dict[str, Any] = {}
    exec(snippet(EXTENDING, "Splits.from_arrays"), scope)
    rng = np.random.default_rng(0)

    def part(rows: int) -> tuple[np.ndarray, np.ndarray]:
        return rng.integers(0, 256, (rows, 28, 28), np.uint8), np.arange(rows) % 2

    assert 0 <= scope["accuracy"](part(32), part(8), part(8)) <= 1


class Notebook:
    """The code cells of a notebook, run here; ``!augbench ...`` is carried out in this process."""

    def __init__(self, path: Path, given: str) -> None:
        """``given`` goes into the place of the cell with the tag "parameters"."""
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        self.scope: dict[str, Any] = {}
        self.cells = [
            given if "parameters" in cell["metadata"].get("tags", ()) else "".join(cell["source"])
            for cell in cells
            if cell["cell_type"] == "code"
        ]

    def run(self, cell: str) -> None:
        """Run a cell: Python, lines that begin with !, or a file that it writes.

        Raises:
            AssertionError: a command failed.
        """
        if cell.startswith("%%writefile "):
            name, _, content = cell.partition("\n")
            Path(name.removeprefix("%%writefile ")).write_text(content)
            return
        lines = [
            f"assert run(split(f'''{line[1:]}''')[1:]) == 0" if line.startswith("!") else line
            for line in cell.replace("\\\n", " ").splitlines()
        ]
        self.scope |= {"run": main.run, "split": shlex.split}
        exec("\n".join(lines), self.scope)


def test_the_first_hour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undrawn: None) -> None:
    notebook = Notebook(
        ROOT / "docs" / "first_hour.ipynb",
        'setting = "--model small_cnn(width=0.25) --batch-size 32 --epochs 1 --seeds 1 --jobs 1"',
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(local.Processes, "carry_out", sweeping.carry_out_here)
    try:
        for cell in notebook.cells:
            notebook.run(cell)
    finally:
        sys.modules.pop("mine", None)  # Python's own import of it would shadow another test's file
    assert (tmp_path / "report" / "report.html").is_file()


LINES = 150
"""README is read in three minutes; what does not fit stands in docs."""


def test_the_readme_is_short() -> None:
    assert len(text("README.md").splitlines()) <= LINES


def test_the_readme_has_every_method_once() -> None:
    table = text("README.md").partition("## Methods")[2].partition("\n## ")[0]
    first = [line.split("|")[1] for line in table.splitlines() if line.startswith("| ")][1:]
    named = [name for cell in first for name in re.findall(r"`(\w+)`", cell)]
    assert sorted(named) == sorted(methods.registry())


def test_the_readme_has_the_costs_that_the_methods_declare() -> None:
    table = text("README.md").partition("## Methods")[2].partition("\n## ")[0]
    for line in [line for line in table.splitlines() if line.startswith("| ")][1:]:
        cells = line.strip("| ").split(" | ")
        told = [float(each) for each in re.findall(r"\d+(?:\.\d+)?", cells[-1])]
        names = re.findall(r"`(\w+)`", cells[0])
        declared = [cost for name in names for cost in methods.summary(name).costs or (1.0,)]
        assert told in ([], declared) or (told == [1.0] and set(declared) == {1.0}), line
