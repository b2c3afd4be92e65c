"""Code of the user's own: ``py:`` methods and networks, wrapped transforms, ids, faults."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import methods
from analysis import runs
from benchmarks.cli import main
from benchmarks.contract import CASES, Bench, bench
from benchmarks.running import firstlook, local
from benchmarks.training import models
from methods import own
from methods.base import Batch
from methods.naming import NamingError
from tests import sweeping

MINE = '''\
"""A method of mine."""

from dataclasses import replace

import torch
from augbench import Method

from helpers import darker


class Mine(Method):
    """Darken some images."""

    def __init__(self, *, p=0.2):
        super().__init__()
        self.p = p

    def augment(self, batch, ctx):
        dark = torch.rand(len(batch.x)) < self.p
        return replace(batch, x=torch.where(dark[:, None, None, None], darker(batch.x), batch.x))


class Around(Mine):
    """A method around an upstream."""

    def __init__(self, *, upstream: Method | None = None):
        super().__init__()
        self.upstream = upstream

    control = True


def made(*, p: float = 0.5) -> Method:
    return Mine(p=p)


def net(spec):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, spec.classes))


def pipeline(image):
    import random

    return image.rotate(random.uniform(-10, 10))
'''
HELPERS = "def darker(x):\n    return x / 2\n"
SMALL = ["--benchmark", "digits(rows_per_class=5)", "--model", "small_cnn(width=0.25)"]
ONCE = ["--seeds", "1", "--epochs", "1", "--jobs", "1", "--out", "out"]
NAMES = ("py:mine:Mine", "wrap(call=py:mine:pipeline)")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the files of a user in it."""
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "helpers.py").write_text(HELPERS)
    (tmp_path / "other.py").write_text("OTHER = 1\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are done in this process, and no step is timed."""
    monkeypatch.setattr(local.Processes, "carry_out", sweeping.carry_out_here)
    monkeypatch.setattr(firstlook, "_cost", lambda *_: "not timed")


def compare(rows: str) -> int:
    return main.run(["compare", *SMALL, *ONCE, "--methods", rows])


@pytest.mark.parametrize(
    "name",
    [
        "py:mine:Mine(p=0.3)",
        "crop+py:mine:Mine",
        "saflex(upstream=py:mine:Mine(p=0.3))",
        "py:mine:Around(upstream=wrap(call=py:mine:pipeline, takes=image))",
        "py:mine:made(p=0.1)",
    ],
)
def test_a_name_is_its_own_canonical_form(here: Path, name: str) -> None:
    assert methods.canonical(name) == name
    assert methods.build(name)
    assert methods.canonical(name.replace("p=0.3", "p = 3e-1")) == name


def test_defaults_and_quotes_are_left_out(here: Path) -> None:
    assert methods.canonical("py:mine:Mine(p=0.2)") == "py:mine:Mine"
    assert methods.canonical("wrap(call='py:mine:pipeline', takes=auto)") == NAMES[1]
    assert methods.own_names(f"{NAMES[0]}+{NAMES[1]}") == ["py:mine:Mine", "py:mine:pipeline"]


def test_what_it_is_stands_in_its_file(here: Path) -> None:
    assert methods.declared("py:mine:Around") == methods.Declared(True, True)
    assert methods.declared("py:mine:Mine") == methods.Declared(False)
    assert methods.declared("py:nowhere:Mine") is None


def ids() -> dict[str, int]:
    return {
        **{key: value for name in NAMES for key, value in methods.versions(name).items()},
        "network": models.version_of("py:mine:net"),
    }


def changed(before: dict[str, int]) -> set[str]:
    return {name for name, value in ids().items() if value != before[name]}


def test_an_id_holds_code_and_no_remark(here: Path) -> None:
    before = ids()
    ours = set(before) - {"Wrap"}
    edits: list[tuple[str, str, str, set[str]]] = [
        ("mine.py", '"""Darken some images."""', '"""Darken a few."""', set()),
        ("mine.py", "        self.p = p\n", "        self.p = p  # a share\n\n", set()),
        ("mine.py", "import torch\n", "import torch\n\n# of mine\n", set()),
        ("other.py", "1", "2", set()),
        ("mine.py", "p=0.2", "p=0.25", ours),
        ("helpers.py", "x / 2", "x / 3", ours),
        ("helpers.py", "def darker", "import other\n\n\ndef darker", ours),
    ]
    for file, old, new, expected in edits:
        text = (here / file).read_text()
        assert old in text
        (here / file).write_text(text.replace(old, new, 1))
        assert changed(before) == expected, (file, new)
        (here / file).write_text(text)
    assert ids() == before


def test_files_are_followed_through_packages(here: Path) -> None:
    (here / "pack").mkdir()
    (here / "pack" / "__init__.py").write_text("")
    (here / "pack" / "one.py").write_text("from . import two\nfrom .three import f\nimport torch\n")
    (here / "pack" / "two.py").write_text("import os, other\n")
    (here / "pack" / "three.py").write_text(
        "import importlib as i\nfrom pack.one import missing\nf = __import__('plain.five')\n"
    )
    (here / "pack" / "four.py").write_text("")
    (here / "plain").mkdir()
    (here / "plain" / "five.py").write_text("")
    found = own.sources(["py:pack.one:f"])
    reached = {"pack", "pack.one", "pack.two", "pack.three", "other", "plain", "plain.five"}
    assert set(found) == reached
    assert set(own.sources(["py:plain.five:f"])) == {"plain", "plain.five"}
    assert own.sources(["py:json:loads"]) == {}, "what is installed is there already"


@pytest.mark.usefixtures("in_process")
def test_an_edited_comment_keeps_a_run_and_edited_code_makes_a_new_one(here: Path) -> None:
    assert compare(", ".join(("none", *NAMES))) == 0
    first = list(runs.folders(here / "out"))
    times = {each: (each / "result.json").stat().st_mtime_ns for each in first}
    assert len(first) == 3
    (here / "mine.py").write_text(MINE.replace("of mine", "of my own") + "# the end\n")
    assert compare(", ".join(("none", *NAMES))) == 0
    assert {p: (p / "result.json").stat().st_mtime_ns for p in runs.folders(here / "out")} == times
    (here / "helpers.py").write_text(HELPERS.replace("2", "4"))
    assert compare(", ".join(("none", *NAMES))) == 0
    assert len(list(runs.folders(here / "out"))) == 5


@pytest.mark.usefixtures("in_process")
def test_in_a_study_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "study.yaml").write_text(
        "benchmarks: digits(rows_per_class=5)\nmodels: py:mine:net\nseeds: 1\n"
        "methods:\n  - none\n  - py:mine:Mine\n  - saflex(upstream=py:mine:Mine(p=0.3))\n"
        "training: {epochs: 1}\ntensorboard: false\n"
    )
    arguments = ["sweep", "study.yaml", "--executor", "local", "--workers", "1", "--out", "out"]
    assert main.run(arguments) == 0
    told = capsys.readouterr().out
    assert "py:mine:Mine" in told and "saflex(upstream=py:mine:Mine(p=0.3))" in told


def test_code_is_carried_to_where_its_files_are_not(here: Path, tmp_path: Path) -> None:
    found = own.sources(["py:mine:Mine"])
    assert set(found) == {"mine", "helpers"}
    with own.kept(found):
        methods.build("py:mine:Mine")
    for file in ("mine.py", "helpers.py"):
        (here / file).unlink()
    with pytest.raises(NamingError, match=r"no module 'mine', expected mine\.py in "):
        methods.build("py:mine:Mine")
    with own.kept(found):
        assert type(methods.build("py:mine:Mine")).__name__ == "Mine"
    assert own.problems(found) == []
    lacking = found["helpers"]._replace(content=b"import no_such_library\n")
    told = own.problems({**found, "helpers": lacking})
    assert all("helpers.py, line 1: ModuleNotFoundError: No module named" in each for each in told)
    assert len(told) == 2


def test_an_edit_while_it_runs_changes_nothing(here: Path) -> None:
    with own.kept():
        before = ids()
        (here / "mine.py").write_text(MINE.replace("0.2", "0.9"))
        assert ids() == before
        assert vars(methods.build("py:mine:Mine"))["p"] == 0.2
    assert vars(methods.build("py:mine:Mine"))["p"] == 0.9


@pytest.mark.parametrize("slip", ["py:mine.py:Mine", "py:mine.sub:Mine"])
def test_an_edit_after_a_slip_in_the_name_is_seen(here: Path, slip: str) -> None:
    with pytest.raises(NamingError, match="no module"):
        methods.build(slip)
    (here / "mine.py").write_text(MINE.replace("0.2", "0.9"))
    assert vars(methods.build("py:mine:Mine"))["p"] == 0.9


METHOD = """
from dataclasses import replace
import random
import numpy
from augbench import Method

class Bad(Method):
    def augment(self, batch, ctx):
        {0}
"""
FUNCTION = "import random\nimport numpy as np\nrng = np.random.default_rng(0)\n"
BROKEN: dict[str, tuple[str, str]] = {
    "py:bad:Bad(q=1)": (METHOD.format("return batch"), "has no argument 'q'"),
    "py:bad:Bed": (METHOD.format("return batch"), "bad.py has no 'Bed'; did you mean 'Bad'?"),
    "py:bat:Bad": ("", "no module 'bat', expected bat.py in "),
    "py:bad.py:Bad": ("", "write bad, without .py"),
    "py:bad": ("", "cannot read 'py:bad'"),
    "py:bad:Syntax": ("x = 1\ndef f(:\n", "bad.py, line 2: SyntaxError: "),
    "py:bad:Dot": ("from .helpers import f\n", "without the dot: from helper import name"),
    "py:bad:Raises": ("x = 1\n1 / 0\n", "bad.py, line 2: ZeroDivisionError: division by zero"),
    "py:bad:Class": ("class Class:\n    pass\n", "is a class but not a Method"),
    "py:bad:three": ("three = 3\n", "is of type int, expected a subclass of augbench.Method"),
    "py:bad:other": ("def other():\n    return 3\n", "returned int, expected a methods.base."),
    "py:bad:image": ("def image(x):\n    pass\n", "write wrap(call=py:bad:image)"),
    "py:bad:Bad": (
        METHOD.format("pass\n    def __init__(self):\n        raise OSError('no file')"),
        "cannot be built: bad.py, line 11: OSError: no file",
    ),
}  # fmt: skip
FAULTY: dict[str, tuple[str, str]] = {
    "return replace(batch, x=batch.x[..., 1:])": ("py:bad:Bad", "augment returned x of shape"),
    "return replace(batch, x=batch.x.mul_(0.5))": ("py:bad:Bad", "changed x of its input in place"),
    "return replace(batch, x=batch.x * random.random())": ("py:bad:Bad", "two different x"),
    "return replace(batch, x=batch.x * numpy.random.rand())": ("py:bad:Bad", "two different x"),
    "return replace(batch, x=batch.x + 1)": ("py:bad:Bad", "expected [0, 1]"),
    "return replace(batch, x=batch.x * float('nan'))": ("py:bad:Bad", "x is not finite"),
    "return batch.x": ("py:bad:Bad", "augment returned Tensor"),
    "return {}['a']": ("py:bad:Bad", "bad.py, line 9: KeyError: 'a'"),
    "return batch\n    def get_extra_state(self):\n        return lambda: 0": (
        "py:bad:Bad", "its state cannot be saved in a checkpoint"),
    "lambda i: i.resize((20, 20))": ("", "of shape 1 x 20 x 20, expected 1 x 28 x 28"),
    "lambda i: i.convert('RGB')": ("", "of shape 3 x 28 x 28, expected 1 x 28 x 28"),
    "lambda i: np.asarray(i).astype(int)": ("", "returned an array of int64, expected uint8"),
    "lambda i: np.asarray(i.convert('L')) / 1": ("", ", expected [0, 1]: clip them"),
    "lambda i: np.asarray(i) * np.nan": ("", "returned values that are not finite"),
    "lambda i: (np.asarray(i) * rng.random()).astype(np.uint8)": ("", "returned two results for"),
    "lambda i: (i + np.random.rand(*i.shape) / 9).clip(0, 1)": ("", "seems to expect floats in "),
    "lambda i: (np.asarray(i) > 0.5) * 1.0": ("", "seems to expect floats in [0, 1]"),
    "lambda i: None": ("", "returned None, expected an image"),
    "lambda i: 1 / 0": ("", "it raised bad.py, line 4: ZeroDivisionError"),
    "int": ("", "is a class: create an instance"),
    "3": ("", "expected a function of images, py:bad:function is 3"),
}  # fmt: skip


UNLEARNED = """
    def __init__(self):
        super().__init__()
        self.b = torch.nn.Parameter(torch.zeros(()))
"""


@pytest.mark.parametrize("learns", [False, True])
def test_parameters_that_nothing_updates_are_named(
    here: Path, in_process: None, capsys: pytest.CaptureFixture[str], learns: bool
) -> None:
    update = "self.b.data = self.b.data + 0.1; " if learns else ""
    body = f"{update}return replace(batch, x=batch.x * (1 - self.b.detach()).clamp(0, 1))"
    Path("bad.py").write_text(f"import torch\n{METHOD.format(body)}{UNLEARNED}")
    assert compare("none, py:bad:Bad") == 0
    assert ("nothing updated b in a trial" in capsys.readouterr().err) != learns


def refused(row: str, content: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence in which a row is refused before anything runs."""
    Path("bad.py").write_text(content)
    assert compare(f"none, {row}") == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("augbench: ")]
    assert len(told) == 1 and "Traceback" not in told[0]
    assert not Path("out").exists()
    return told[0]


@pytest.mark.usefixtures("here", "in_process")
@pytest.mark.parametrize("row", BROKEN)
def test_what_cannot_be_used_is_told_in_a_sentence(
    row: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content, words = BROKEN[row]
    assert words in refused(row, content, capsys)


@pytest.mark.usefixtures("here", "in_process")
@pytest.mark.parametrize("body", FAULTY)
def test_what_breaks_the_contract_is_told_before_the_first_run(
    body: str, capsys: pytest.CaptureFixture[str]
) -> None:
    row, words = FAULTY[body]
    content = METHOD.format(body) if row else f"{FUNCTION}function = {body}\n"
    row = row or "saflex(upstream=wrap(call=py:bad:function))"
    assert words in refused(row, content, capsys)


FORMS = {
    "image": "i.rotate(random.uniform(-20, 20))",
    "array": "(i[:, ::-1] * np.random.uniform(0.5, 1)).astype(np.uint8) if i.ndim == 3 else 0",
    "tensor": "(i.flip(-1) * torch.rand(())).clamp(0, 1) if i.dim() == 3 else 0",
    "batch": "i.roll(int(torch.randint(3, ())), -1) if i.dim() == 4 else 0",
}


def wrapped(form: str, takes: str = "auto", case: int = 1) -> Bench:
    text = f"import random\nimport numpy as np\nimport torch\nfunction = lambda i: {FORMS[form]}\n"
    Path("forms.py").write_text(text)
    name = f"wrap(call=py:forms:function, takes={takes})"
    return bench(lambda: methods.build(name), CASES[case])


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("case", [0, 1])
@pytest.mark.parametrize("form", FORMS)
def test_what_a_function_takes_is_found_out(form: str, case: int) -> None:
    ready = wrapped(form, case=case)
    remarks = vars(ready.method)["remarks"]
    kind = {"image": "a PIL", "array": "a numpy", "tensor": "a tensor", "batch": "a batch"}
    assert remarks[0].startswith(f"takes {kind[form]}")
    batch = ready.batch()
    told = wrapped(form, form, case)
    assert torch.equal(ready.augment(batch).x, told.augment(batch).x)
    assert not torch.equal(ready.augment(batch).x, batch.x)


def augmented(ready: Bench, index: list[int], step: int = 0) -> Tensor:
    return ready.augment(ready.ctx.train.rows(torch.tensor(index)), step=step).x


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("form", ["image", "array", "tensor"])
def test_a_row_is_seeded_by_its_place_alone(form: str) -> None:
    ready = wrapped(form)
    whole = augmented(ready, [3, 5, 8, 13])
    assert torch.equal(augmented(ready, [13, 3]), whole[[3, 0]])
    assert not torch.equal(augmented(ready, [3, 5, 8, 13], step=1), whole)
    twice = augmented(ready, [5, 5])
    assert torch.equal(twice[0], whole[1]) and not torch.equal(twice[0], twice[1])


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("form", FORMS)
def test_generators_are_as_before(form: str) -> None:
    ready = wrapped(form)
    draws: tuple[Callable[[], float], ...] = (random.random, np.random.rand)  # type: ignore[assignment]
    for draw, seed in zip(draws, (random.seed, np.random.seed), strict=True):
        seed(7)
        expected = draw()
        seed(7)
        ready.augment(ready.batch())
        assert draw() == expected


def test_transforms_that_share_a_state_draw_apart() -> None:
    """Two flips of albumentations must not always come together."""
    method = methods.build("wrap(call=py:tests.pipelines:composed)")
    rows = torch.arange(400)
    x = torch.zeros(400, 1, 8, 8)
    x[..., :4] = 0.5
    ready = bench(lambda: method, CASES[0])
    made = method.augment(Batch(x=x, y=x[:, 0, 0], w=x[:, 0, 0, 0], index=rows), ready.ctx).x
    share = float((made[..., -1].mean((1, 2)) > 0.25).float().mean())
    assert 0.4 < share < 0.6
    assert len({each.numpy().tobytes() for each in made}) == 400


def test_torchvision_of_both_kinds(here: Path) -> None:
    (here / "transforms.py").write_text(
        "import torch\nfrom torchvision import transforms as v1\n"
        "from torchvision.transforms import v2\n"
        "old = v1.Compose([v1.RandomAffine(10), v1.ToTensor()])\n"
        "new = v2.Compose([v2.RandomHorizontalFlip(), v2.ToImage(),\n"
        "    v2.ToDtype(torch.float32, scale=True)])\n"
        "normal = v1.Compose([v1.ToTensor(), v1.Normalize([0.5], [0.5])])\n"
    )
    for name in ("old", "new"):
        ready = bench(lambda name=name: methods.build(f"wrap(call=py:transforms:{name})"), CASES[1])
        assert vars(ready.method)["remarks"] == ("takes a PIL image",)
    with pytest.raises(NamingError, match="leave out normalisation"):
        bench(lambda: methods.build("wrap(call=py:transforms:normal)"), CASES[1])


def test_what_torchvision_passes_by_is_not_taken_for_a_form_that_works(here: Path) -> None:
    """Its transforms return an array unchanged, without a word."""
    (here / "transforms.py").write_text(
        "from torchvision.transforms import v2\n"
        "noise = v2.Compose([v2.RandomHorizontalFlip(), v2.GaussianNoise(sigma=0.1)])\n"
        "rare = v2.RandomApply([v2.GaussianNoise(sigma=0.1)], p=0.1)\n"
        "cropped = v2.Compose([v2.CenterCrop(20)])\n"
        "idle = v2.RandomHorizontalFlip(p=0)\n"
    )

    def remarks(name: str) -> tuple[str, ...]:
        ready = bench(lambda: methods.build(f"wrap(call=py:transforms:{name})"), CASES[1])
        return vars(ready.method)["remarks"]

    assert remarks("noise") == remarks("rare") == ("takes a tensor (C, H, W) in [0, 1]",)
    with pytest.raises(NamingError, match="cropped, given a PIL image, returned a PIL image of"):
        remarks("cropped")
    assert remarks("idle") == ("takes a PIL image", "changed none of 8 images in 16 draws of each")


@pytest.mark.usefixtures("in_process")
def test_a_function_that_works_in_place_is_told_and_works(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "cut.py").write_text("def cut(a):\n    a[:4] = 0\n    return a\n")
    assert compare("none, wrap(call=py:cut:cut)") == 0
    assert (
        "takes a numpy array (H, W, C) of uint8; changes its input in place, which is a copy"
        in (capsys.readouterr().err)
    )


def test_its_cost_is_told(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["run", *SMALL, "--epochs", "1", "--out", "out", "--method", NAMES[1]]
    assert main.run(arguments) == 0
    told = capsys.readouterr().err
    assert "takes a PIL image; a step of 32 images takes " in told and "times the cost" in told


def test_shown(here: Path) -> None:
    shutil.copy("mine.py", "again.py")
    for name in ("py:again:Mine", NAMES[1]):
        out = ["--out", "show.png", "--rows", "2", "--draws", "2"]
        assert main.run(["show", "--benchmark", "digits", "--method", name, *out]) == 0
    (here / "bad.py").write_text(METHOD.format("return {}['a']"))
    assert main.run(["show", "--benchmark", "digits", "--method", "py:bad:Bad", *out]) == 2
