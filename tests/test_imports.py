"""Imports go one way, and what takes long is loaded only where it is needed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("methods", "benchmarks", "analysis")
    for path in (ROOT / folder).rglob("*.py")
)


def imports(path: str) -> list[tuple[str, bool]]:
    """Every imported module of a file, and whether it is imported with the file."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    late = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for inner in ast.walk(node)
    }
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) not in late) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [(f"{node.module}.{alias.name}", id(node) not in late) for alias in node.names]
    return found


def tops(path: str) -> set[str]:
    return {name.partition(".")[0] for name, _ in imports(path)}


def test_there_are_files() -> None:
    assert len(FILES) > 15


@pytest.mark.parametrize("path", FILES)
def test_imports_go_one_way(path: str) -> None:
    names = {name for name, _ in imports(path)}
    if path.startswith(("methods/", "analysis/")):
        assert "augbench" not in tops(path)
    if path.startswith("methods/"):
        assert not tops(path) & {"benchmarks", "analysis"}
    if path.startswith("analysis/"):
        readers = ("analysis.runs", "analysis.metrics")
        ours = [name for name in names if name.startswith("benchmarks")]
        assert all(name.startswith(readers) for name in ours), ours
        assert not tops(path) & {"torch", "ray"}
        ours = [name for name in names if name.startswith("methods")]
        assert all(name.startswith("methods.naming") for name in ours), ours
    if path == "methods/base.py":
        assert not any(name.startswith("methods") for name in names)
    if path == "methods/functional.py":
        ours = [name for name in names if name.startswith("methods")]
        assert all(name.startswith("methods.base") for name in ours), ours
    if path == "benchmarks/training/trainer.py":
        assert not any("cli" in name or "sweep" in name for name in names)
    if path != "benchmarks/running/cluster.py":
        assert "ray" not in tops(path)
    if path != "analysis/report/plots.py":
        assert "matplotlib" not in tops(path)


@pytest.mark.parametrize("path", FILES)
def test_torchvision_is_never_imported_at_import_time(path: str) -> None:
    assert not [name for name, early in imports(path) if early and name.startswith("torchvision")]


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("augbench", ("torch", "numpy", "pydantic", "methods", "benchmarks", "analysis")),
        ("methods", ("torch", "numpy", "scipy", "sklearn")),
        ("benchmarks.cli.main", ("torch", "numpy", "pydantic", "sklearn")),
        ("benchmarks.api", ("torch", "pandas", "ray", "matplotlib")),
        ("benchmarks.running.capacity", ("torch", "ray")),
        ("benchmarks.studies.shipped", ("torch", "numpy", "pydantic")),
        ("analysis.runs", ("torch", "ray", "sklearn")),
        ("benchmarks.cli.listing", ("torch", "sklearn", "scipy")),
        ("analysis.comparison", ("torch", "ray", "matplotlib", "torchvision")),
        ("benchmarks.cli.report", ("torch", "ray", "torchvision", "kornia")),
        (
            "benchmarks.running.disk",
            ("torchvision", "ray", "pandas", "matplotlib", "kornia", "sklearn"),
        ),
    ],
)
def test_what_is_not_needed_is_not_loaded(module: str, absent: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print([m for m in {absent!r} if m in sys.modules])"
    shown = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT)
    assert shown.strip() == "[]"
