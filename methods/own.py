"""The user's own code, ``py:module:name``: imported, hashed by syntax tree, sent to workers.

Modules are found as Python finds them, and then in the current folder. A module's sources are its
own file and all files that it imports from the same folder. A YAML file that is named in a method,
``autoaugment(policy='mine.yaml')``, is treated alike: read once, hashed by content, sent.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import itertools
import json
import sys
import sysconfig
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.abc import MetaPathFinder, SourceLoader
from importlib.machinery import ModuleSpec
from importlib.util import resolve_name, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from methods.naming import OWN_NAME, NamingError, nearest

OURS = ("augbench", "methods", "analysis", "benchmarks")
INSTALLED = ("site-packages", "dist-packages")
YAML = (".yaml", ".yml")
_OPERATORS: list[Any] = []
"""Keeps the declarations alive: each one lasts as long as its object."""


class Source(NamedTuple):
    """A module's file as it was read."""

    path: str
    content: bytes
    package: bool
    root: str
    """The folder that it is imported from; empty for installed modules and for augbench's own."""


class _Loader(SourceLoader):
    """Loads a module from its source as it was read."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def get_filename(self, fullname: str) -> str:
        return self.source.path

    def get_data(self, path: str | bytes) -> bytes:
        return self.source.content


class Code(MetaPathFinder):
    """Imports the user's modules from their sources as they were first read."""

    def __init__(self, sources: Mapping[str, Source]) -> None:
        self._sources = dict(sources)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find a module whose source was read."""
        source = self._sources.get(fullname)
        if source is None or not source.root or fullname.endswith(YAML):
            return None
        places = [str(Path(source.path).parent)] if source.package else None
        return spec_from_file_location(
            fullname, source.path, loader=_Loader(source), submodule_search_locations=places
        )

    def file(self, name: str) -> Source | None:
        """A YAML file as it was first read; None if it cannot be read."""
        if name not in self._sources:
            path = Path(name).expanduser()
            try:
                content = path.read_bytes()
            except OSError:
                return None
            self._sources[name] = Source(str(path), content, False, str(path.parent))
        return self._sources[name]

    def sources(self, module: str) -> dict[str, Source]:
        """A module, its parent packages, and all that they import from the same folder."""
        found: dict[str, Source] = {}
        # Even if there is no such module, its parent packages are imported.
        left, root = [module] if self._read(module, None) else _packages(module), None
        while left:
            name = left.pop()
            source = self._read(name, root) if name not in found else None
            if source is None:
                continue
            root, found[name] = source.root, source
            if root:
                left += _packages(name)
                left += _imported(name, source)
        for name in [package for each in found if root for package in _packages(each)]:
            if name not in found:  # a folder without __init__.py
                path = Path(root or "", *name.split("."), "__init__.py")
                found[name] = self._sources[name] = Source(str(path), b"", True, root or "")
        return found

    def _read(self, name: str, root: str | None) -> Source | None:
        """A module's source if it is imported from this folder (from anywhere if root is None)."""
        if name not in self._sources:
            place = _place(name)
            if place is None or root not in (None, place[1]):
                return None
            try:
                content = place[0].read_bytes()
            except OSError:
                return None
            package = place[0].stem == "__init__"
            self._sources[name] = Source(str(place[0]), content, package, place[1])
        source = self._sources[name]
        return source if root in (None, source.root) else None


@contextmanager
def kept(sources: Mapping[str, Source] | None = None) -> Iterator[Code]:
    """Within the block, the user's code stays as first read, or as in ``sources``.

    So an edit during a comparison changes neither its numbers nor the ids of its runs.
    """
    active = next((each for each in sys.meta_path if isinstance(each, Code)), None)
    if active is not None and sources is None:
        yield active
        return
    code, here = Code(sources or {}), str(Path.cwd())
    added = here not in sys.path
    sys.meta_path.insert(0, code)
    if added:  # a console script does not search the current folder
        sys.path.append(here)
    importlib.invalidate_caches()  # a file may have been written a second ago
    try:
        yield code
    finally:
        sys.meta_path.remove(code)
        if added and here in sys.path:
            sys.path.remove(here)


def load(name: str, what: str) -> Any:
    """Load the object ``py:module:name``; errors call it ``what``, such as "method".

    Raises:
        NamingError: it cannot be imported; the message says where it fails.
    """
    module, attribute = _parts(name, what)
    with kept() as code:
        _forget_stale(module, code.sources(module))
        found = _imported_module(module, f"{what} {name!r}", code)
        place = _place(module)
    try:
        return getattr(found, attribute)
    except AttributeError as error:
        shown = _shown(str(place[0])) if place is not None else f"module {module!r}"
        hint = nearest(attribute, [each for each in vars(found) if not each.startswith("_")])
        if place is None or not place[1]:
            hint = f"; rename your own file, because {module!r} is found there first"
        raise NamingError(f"{what} {name!r}: {shown} has no {attribute!r}{hint}") from error


def version(module: str) -> int:
    """A hash of the syntax trees of a module's sources, without comments and docstrings.

    For an installed module it covers only the module's own file.
    """
    with kept() as code:
        found = code.sources(module)
    text = "".join(f"{name}\n{_tree(found[name].content)}\n" for name in sorted(found))
    return int(hashlib.sha256(text.encode()).hexdigest()[:12], 16)


def file(name: str) -> bytes | None:
    """The content of a YAML file that is named in a method; None if it is none, or is not there."""
    if not name.endswith(YAML):
        return None
    with kept() as code:
        source = code.file(name)
    return source.content if source is not None else None


def file_version(content: bytes) -> int:
    """A hash of what a YAML file says, without comments; of its bytes if it cannot be read."""
    import yaml  # noqa: PLC0415 - most commands need none

    try:
        text = json.dumps(yaml.safe_load(content), sort_keys=True).encode()
    except (yaml.YAMLError, ValueError, TypeError, RecursionError):
        text = content
    return int(hashlib.sha256(text).hexdigest()[:12], 16)


def sources(names: Iterable[str]) -> dict[str, Source]:
    """The sources that another machine needs to load these names: all except installed ones."""
    found: dict[str, Source] = {}
    with kept() as code:
        for name in names:
            given = code.file(name) if name.endswith(YAML) else None
            found |= code.sources(_parts(name, "code")[0]) if given is None else {name: given}
    return {module: source for module, source in found.items() if source.root}


def problems(carried: Mapping[str, Source]) -> list[str]:
    """Why modules sent to this machine cannot be imported here."""
    told = []
    with kept(carried) as code:
        for module in (name for name in carried if not name.endswith(YAML)):
            _forget_stale(module, code.sources(module))
            try:
                _imported_module(module, f"module {module!r}", code)
            except NamingError as error:
                told.append(str(error))
    return told


def said(error: BaseException) -> str:
    """An error in one line, with the place in the user's code where it was raised."""
    told = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {told[0]}" if told else type(error).__name__
    if isinstance(error, ImportError) and "no known parent package" in text:
        text += "; import a file of the same folder without the dot: from helper import name"
    if isinstance(error, SyntaxError) and error.filename is not None:
        return f"{_shown(error.filename)}, line {error.lineno}: SyntaxError: {error.msg}"
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        if isinstance(frame.f_globals.get("__loader__"), _Loader):
            return f"{_shown(frame.f_code.co_filename)}, line {line}: {text}"
    return text


def file_of(module: str) -> Path | None:
    """The file of a module, found without importing its parent packages."""
    spec = None
    for name in itertools.accumulate(module.split("."), "{}.{}".format):
        places = spec.submodule_search_locations if spec is not None else None
        if spec is not None and places is None:
            return None  # not a package
        finders = (finder.find_spec(name, places) for finder in sys.meta_path)
        loaded = sys.modules.get(name)
        known = None if loaded is None or _is_own(loaded) else loaded.__spec__
        spec = known or next(filter(None, finders), None)
        if spec is None:
            return None
    return Path(spec.origin) if spec is not None and spec.origin else None


def import_torchvision() -> Any:
    """Import torchvision even if its wheel was built for another torch.

    PyPI's wheel does not import with a CPU build of torch, because the operators of its C++ library
    are missing. In that case we declare two of them without an implementation: networks and
    transforms then work, and ``torchvision.ops.nms`` raises. Declaring them up front would collide
    with a working installation, so we do it only after the import has failed.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    import torch  # noqa: PLC0415 - takes a second

    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    _OPERATORS.append(torch.library.Library("torchvision", "DEF"))
    for name in ("nms", "qnms"):
        signature = f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        _OPERATORS[0].define(signature)
    return importlib.import_module("torchvision")


def _parts(name: str, what: str) -> tuple[str, str]:
    found = OWN_NAME.fullmatch(name)
    if found is None:
        raise NamingError(
            f"{what} {name!r}: expected py:MODULE:NAME, such as py:mine:Mine for Mine in mine.py"
        )
    return found[1], found[2]


def _imported_module(module: str, what: str, code: Code) -> ModuleType:
    try:
        try:
            return importlib.import_module(module)
        except RuntimeError as error:
            if "torchvision::" not in str(error):
                raise
        import_torchvision()  # it then stays importable
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        absent = error.name or ""
        if module != absent and not module.startswith(f"{absent}."):
            raise NamingError(f"{what}: {said(error)}") from error
        file = f"{module.removesuffix('.py').replace('.', '/')}.py"
        hint = (
            f"; write {module.removesuffix('.py')}, without .py" if module.endswith(".py") else ""
        )
        raise NamingError(
            f"{what}: no module {absent!r}, expected {file} in {Path.cwd()} or an installed "
            f"package{hint}"
        ) from error
    except (Exception, SystemExit) as error:  # a user's file may fail in any way
        raise NamingError(f"{what}: {said(error)}") from error


def _forget_stale(module: str, found: Mapping[str, Source]) -> None:
    """Forget imported modules if a file has changed since its import, or is gone."""
    loaded = {name: each for name, each in sys.modules.items() if _is_own(each)}
    stale = module in loaded and module not in found
    for name in found.keys() & loaded.keys():
        loader = loaded[name].__spec__.loader  # type: ignore[union-attr]
        stale |= isinstance(loader, _Loader) and loader.source != found[name]
    if stale:
        for name in loaded:
            del sys.modules[name]


def _is_own(module: ModuleType) -> bool:
    spec = getattr(module, "__spec__", None)
    return spec is not None and isinstance(spec.loader, _Loader)


def _shown(path: str) -> str:
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path


def _place(name: str) -> tuple[Path, str] | None:
    """The file of a module, and the folder that it is imported from if it is the user's own."""
    path = file_of(name)
    if path is None or not path.is_file():
        return None
    root = path.parents[name.count(".") + (path.stem == "__init__")]
    installed = name.partition(".")[0] in OURS or root.name in INSTALLED or str(root) in _library()
    own = path.suffix == ".py" and not installed
    return path, str(root) if own else ""


def _packages(name: str) -> list[str]:
    """The names of a module's parent packages."""
    return list(itertools.accumulate(name.split(".")[:-1], "{}.{}".format))


@cache
def _library() -> frozenset[str]:
    """The folders of Python's own modules."""
    return frozenset(map(sysconfig.get_path, ("stdlib", "platstdlib", "purelib", "platlib")))


DYNAMIC = {"importlib.import_module", "import_module", "__import__"}


def _imported(module: str, source: Source) -> list[str]:
    """The modules that a module may import; ``from a import b`` gives a and a.b."""
    try:
        tree = ast.parse(source.content)
    except (SyntaxError, ValueError):
        return []
    found = []
    package = module if source.package else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [each.name for each in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level > package.count(".") + bool(package):
                continue  # above the top-level package, which cannot be imported
            dots = "." * node.level + (node.module or "")
            base = resolve_name(dots, package) if node.level else dots
            found += [base, *(f"{base}.{each.name}" for each in node.names)]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in DYNAMIC:
            named = [each.value for each in node.args[:1] if isinstance(each, ast.Constant)]
            found += [each for each in named if isinstance(each, str) and each.strip(".") == each]
    return found


@cache
def _tree(content: bytes) -> str:
    """A hash of a file's syntax tree, or of its bytes if it cannot be parsed."""
    try:
        text = _plain(ast.parse(content)).encode()
    except (SyntaxError, ValueError, RecursionError):
        text = content
    return hashlib.sha256(text).hexdigest()


def _plain(node: Any) -> str:
    """A syntax tree as text, identical in every version of Python."""
    if isinstance(node, list):
        listed = [each for each in node if not _is_remark(each)]
        return f"[{','.join(map(_plain, listed))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [
        f"{name}={_plain(value)}"
        for name, value in ast.iter_fields(node)
        if value is not None and value != [] and name != "kind"
    ]
    return f"{type(node).__name__}({','.join(fields)})"


def _is_remark(node: Any) -> bool:
    """Whether a statement is just a string, such as a docstring."""
    value = node.value if isinstance(node, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)
