"""A package of a third party, installed with an entry point: it works, and its faults are told."""

import importlib
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import methods
from benchmarks.cli import main

PLUGIN = Path(__file__).parent / "plugin"
PACKAGE = "augbench_example"
SETTING = ["--benchmark", "digits", "--model", "small_cnn(width=0.25)", "--epochs", "1"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as pip leaves it that has installed the example package."""
    folder = tmp_path_factory.mktemp("site")
    (folder / PACKAGE).symlink_to(PLUGIN / PACKAGE)
    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    told = folder / f"{PACKAGE}-{project['version']}.dist-info"
    told.mkdir()
    (told / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    points = project["entry-points"][methods.GROUP].items()
    lines = [f"[{methods.GROUP}]", *(f"{name} = {target}" for name, target in points)]
    (told / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def installed(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The package is found in this process, in an empty folder, until the test is over."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(site)
    methods.registry.cache_clear()
    yield
    monkeypatch.undo()
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
        del sys.modules[name]
    importlib.invalidate_caches()
    methods.registry.cache_clear()


@pytest.mark.usefixtures("installed")
def test_listed_with_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["list"]) == 0
    shown = capsys.readouterr().out
    plugins = shown.partition("Plug-ins\n")[2]
    assert "brighten           Raise the brightness of each image" in plugins
    assert shown.count("\n  none  ") == 1
    assert "  none  " not in plugins, "a plug-in must not take a built-in name"

    assert main.run(["list", "--check"]) == 1
    checked = capsys.readouterr().out
    assert "unavailable" in checked and "libmissing.so" in checked
    assert "returned NoMethod, expected a methods.base.Method" in checked
    assert "Raise the brightness" in checked


@pytest.mark.usefixtures("installed")
def test_compared_beside_faulty_ones(capfd: pytest.CaptureFixture[str]) -> None:
    """The faulty rows are shown with their reasons; the others are not touched by them."""
    rows = (
        "none,brighten(strength=0.1),fails_setup,fails_augment,wrong_shape,fails_file,leaves,"
        "fails_import,fails_init"
    )
    once = ["--seeds", "1", "--jobs", "1"]
    assert main.run(["compare", *SETTING, "--methods", rows, *once]) == 1
    table, errors = capfd.readouterr()
    assert "fails_setup: failed, seed 0: KeyError: 'no such table'" in table
    assert "fails_augment: failed, seed 0: ZeroDivisionError: division by zero in my" in table
    assert "augment returned y of shape (128, 9), expected (128, 10)" in table
    assert "fails_file: failed, seed 0: FileNotFoundError: " in table
    assert "leaves: failed, seed 0: SystemExit: 0" in table
    assert "fails_import: method 'fails_import' is unavailable: " in table
    assert "fails_init: method 'fails_init' cannot be built: SystemExit: 0" in table
    scores = [line for line in table.splitlines() if line.startswith("brighten(strength=0.1)")]
    assert len(scores) == 1 and "n/a" not in scores[0] and re.search(r"\d\.\d\d +[+-]\d", scores[0])
    assert "Traceback" not in errors


@pytest.mark.usefixtures("installed")
def test_import_error_is_a_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["run", *SETTING, "--method", "fails_import"]) == 2
    errors = capsys.readouterr().err
    assert "method 'fails_import' is unavailable" in errors
    assert "OSError: libmissing.so" in errors
    assert "Traceback" not in errors


def test_authors_own_contract_tests(site: Path, tmp_path: Path) -> None:
    """As their author runs them: in a process and a folder of their own."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            PLUGIN / "test_brighten.py",
        ],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(site), str(PLUGIN.parent.parent)])},
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout and "skipped" not in done.stdout
