"""Imports point down, from layer to layer; what takes long is loaded only where it is needed."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = (
    ("augbench", "benchmarks.__main__"),
    ("benchmarks.speed",),
    ("benchmarks.api",),
    ("benchmarks.cli",),
    ("benchmarks.running",),
    ("benchmarks.studies",),
    ("benchmarks.contract",),
    ("benchmarks.training",),
    ("benchmarks.data",),
    ("analysis.report",),
    ("analysis",),
    ("methods",),
)
"""From the top down: a module imports what stands in its own line or below, and nothing above."""
EXCEPTIONS = {
    ("benchmarks.running.local", "augbench"),
    ("benchmarks.running.on_ray.carried", "augbench"),
    ("benchmarks.running.together", "augbench"),
    ("benchmarks.studies.shipped", "augbench"),
}
"""Workers begin at ``augbench``, which finds our packages; the shipped studies lie beside it."""
ALONE = {
    "methods.base": (),
    "methods.naming": (),
    "methods.functional": ("methods.base",),
    "analysis.runs": (),
    "analysis.measures": (),
    "analysis.tasks": ("analysis.measures",),
    "analysis.metrics": ("analysis.measures", "analysis.tasks"),
    "analysis.stats": (),
}
"""What these may import of ours."""
HEAVY = {
    "ray": ("benchmarks.running.on_ray",),
    "matplotlib": ("analysis.report.plots",),
    "tyro": ("benchmarks.cli", "benchmarks.speed"),
}
"""Who may import these packages, at any time."""


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {
    name_of(path): path
    for path in [
        ROOT / "augbench.py",
        *(p for top in ("methods", "benchmarks", "analysis") for p in (ROOT / top).rglob("*.py")),
    ]
}


@cache
def imports(module: str) -> tuple[tuple[str, bool], ...]:
    """Every imported module of a file, and whether it is imported with the file."""
    return tuple(_imports(module))


def _imports(module: str) -> Iterator[tuple[str, bool]]:
    tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
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
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) not in late) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (
                (full if (full := f"{node.module}.{alias.name}") in FILES else node.module,
                 id(node) not in late)
                for alias in node.names
            )  # fmt: skip


def floor(module: str) -> int:
    """The layer of a module of ours, 0 the top: of the longest name that fits; -1 for others."""
    fits = [
        (len(name), place)
        for place, names in enumerate(LAYERS)
        for name in names
        if module == name or module.startswith(f"{name}.")
    ]
    return max(fits)[1] if fits else -1


def within(module: str, places: tuple[str, ...]) -> bool:
    return any(module == place or module.startswith(f"{place}.") for place in places)


def test_every_module_has_a_layer_and_every_layer_a_module() -> None:
    placed = {module: floor(module) for module in FILES if module not in ("benchmarks",)}
    assert [module for module, place in placed.items() if place < 0] == []
    assert set(placed.values()) == set(range(len(LAYERS)))


@pytest.mark.parametrize("module", FILES)
def test_imports_point_down(module: str) -> None:
    found = {name for name, _ in imports(module) if floor(name) >= 0}
    up = [
        name for name in found if floor(name) < floor(module) and (module, name) not in EXCEPTIONS
    ]
    assert up == []
    if module in ALONE:
        assert all(within(name, ALONE[module]) for name in found), found
    if module.startswith("analysis"):  # a report needs no torch, and no method's code
        light = {"methods", "methods.naming"}
        assert {name for name in found if name.startswith("methods")} <= light
        assert set(re.findall(r"\bmethods\.(\w+)\(", FILES[module].read_text())) <= {"declared"}
        assert not {name for name, _ in imports(module) if name.split(".")[0] in ("torch", "ray")}
    for package, places in HEAVY.items():
        heavy = [name for name, _ in imports(module) if name.split(".")[0] == package]
        assert not heavy or within(module, places), heavy


def test_there_is_no_circle_of_imports_at_import_time() -> None:
    early = {
        module: {name for name, soon in imports(module) if soon and name in FILES} - {module}
        for module in FILES
    }
    left = dict(early)
    while left:
        free = [module for module, needs in left.items() if not needs & left.keys()]
        assert free, f"a circle among {sorted(left)}"
        for module in free:
            del left[module]


@pytest.mark.parametrize("module", FILES)
def test_torchvision_is_never_imported_at_import_time(module: str) -> None:
    assert not [name for name, soon in imports(module) if soon and name.startswith("torchvision")]


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
        ("analysis.facts", ("torch", "ray", "methods.base")),
        ("benchmarks.cli.listing", ("torch", "sklearn", "scipy")),
        ("analysis.comparison", ("torch", "ray", "matplotlib", "torchvision")),
        ("benchmarks.cli.table", ("torch", "ray", "pandas", "torchvision", "kornia")),
        ("benchmarks.cli.report", ("torch", "ray", "torchvision", "kornia")),
        ("benchmarks.cli.pack", ("torch", "ray", "pandas", "matplotlib", "sklearn", "scipy")),
        ("benchmarks.cli.runs", ("torch", "ray", "pandas", "matplotlib", "sklearn", "scipy")),
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
