"""The shipped studies, found by name, and the template of a new one."""

from __future__ import annotations

import shlex
import textwrap
from pathlib import Path

import augbench
from methods.naming import NamingError, nearest, unknown

# Not by importlib.resources: it finds no folder without a module in an editable install.
FOLDER = augbench.HERE / "ray_configs"
SUFFIXES = ("", ".yaml", ".yml")
WIDTH = 110
NEW = """\
# A study to edit: what it asks, what it runs, and where the results go.
#
# augbench sweep {name} --dry-run    prints every run and what it costs
# augbench sweep {name}              runs it; after an interruption, the same command resumes
# augbench report runs --study {study}
question: Does mixup help on small images of handwritten digits?
prediction: >              # written before the first run; the report shows it with the outcome
  Mixup is equivalent to no augmentation within half a point.
margin: 0.5                # points of accuracy within which two rows count as equal
family: [mixup]            # comparisons that are tested: a row over its upstream, or "a over b"

benchmarks: digits         # augbench list shows them; a folder of your own images: folder:DIR
models: small_cnn          # or resnet18(width=0.25), py:package.module:factory
methods: [none, mixup]     # rows; "{{crop|mixup}}" applies one after the other
controls: false            # true: also the control rows of methods that learn
seeds: 3                   # 0, 1 and 2; ten are recommended
preset: medmnist           # training preset; the next line overrides it
training: {{epochs: 20}}     # also batch_size, learning_rate, optimizer, schedule, ...
protocols: equal           # paper: methods learn from the validation split

out: runs                  # results folder
resources: {{cpus: 1}}       # of one run; also gpus, trials_per_gpu
"""


def names() -> list[str]:
    """Names of the shipped studies."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def find(file: Path) -> Path:
    """The file itself if it exists, else the shipped study of that name.

    Raises:
        NamingError: no shipped study has that name; or the path does not exist, but a shipped
            study has that file name.
    """
    if file.is_file() or file.suffix not in SUFFIXES:
        return file
    known = names()
    if str(file) == file.name:
        if file.stem in known:
            return FOLDER / f"{file.stem}.yaml"
        if not file.suffix or nearest(file.stem, known):
            raise unknown("study, neither a file nor shipped:", str(file), known)
    elif file.stem in known:
        raise NamingError(f"study {file}: no such file; the shipped study is called {file.stem}")
    return file


def lines() -> list[str]:
    """What ``augbench sweep --list`` shows: each study with its first line, source and cost."""
    shown = []
    for name in names():
        text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
        first, parts = _comment(text)
        shown.append(name)
        for part in (first, *(f"{key}: {parts[key]}" for key in ("Cost",) if key in parts)):
            shown += textwrap.wrap(part, WIDTH, initial_indent="  ", subsequent_indent="    ")
    shown += ["", f"Files: {FOLDER}", "Start one by its name, such as: augbench sweep quickstart"]
    return shown


def _comment(text: str) -> tuple[str, dict[str, str]]:
    """The first line of the comment at the top of a file, and its parts such as Cost."""
    first, *more = [line[1:] for line in text[: text.find("\nquestion:")].splitlines()]
    parts: dict[str, str] = {}
    key = ""
    for line in more:
        word, _, rest = line.removeprefix(" ").partition(" ")
        if word:
            key = word
            parts[key] = rest
        elif key:
            parts[key] += f" {rest}"
    return first.strip(), {name: " ".join(said.split()) for name, said in parts.items()}


def write_new(file: Path) -> None:
    """Write a commented template study.

    Raises:
        NamingError: the file exists, or its folder does not.
    """
    from analysis.question import as_name  # noqa: PLC0415 - the list does not need numpy

    if not file.parent.is_dir():
        raise NamingError(f"init: expected a name in a folder that exists, got {file}")
    try:
        with file.open("x", encoding="utf-8", errors="backslashreplace") as new:
            new.write(NEW.format(name=shlex.quote(str(file)), study=as_name(file.stem)))
    except FileExistsError as error:
        raise NamingError(f"init: {file} already exists: choose another name") from error
