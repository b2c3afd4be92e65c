"""What a row is, is declared beside its method, resolved when the run is made, and read from it."""

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

import methods
from analysis import blocks, facts, records, runs
from analysis.blocks import Block
from analysis.facts import ROW, Facts
from analysis.question import Question
from analysis.report import figures
from analysis.report.page import Options, report
from benchmarks.cli import main
from benchmarks.running import local
from tests import sweeping
from tests.made import make_run

ROOT = Path(__file__).parent.parent
THEIRS = '''
import torch
from augbench import Batch, Context, Method


class Weigher(Method):
    """Weigh rows by a number that is learned from meta rows."""

    needs = frozenset({"meta"})
    controls = ("beside(upstream={upstream})", "every(upstream={upstream})")

    def __init__(self, *, upstream: Method | None = None, rate: float = 0.5) -> None:
        super().__init__(upstream)
        self.rate = rate

    def augment(self, batch: Batch, ctx: Context) -> Batch:
        with torch.no_grad():
            ctx.model(ctx.meta.draw(128).x)  # a pass more, so that there is an equal budget
        return self.upstream.augment(batch, ctx) if self.upstream is not None else batch


class Around(Weigher):
    """What the method that it is put around gains, without what that learned."""

    control = True
    controls = ()


class Beside(Weigher):
    """Weights at random."""

    control = True
    controls = ()
    needs = frozenset()

    def augment(self, batch: Batch, ctx: Context) -> Batch:
        return batch


class Every(Weigher):
    """What any method gains that has seen meta rows."""

    control = True
    controls = ()


class Typing(Weigher):
    """A slip: a name that is no tuple."""

    controls = "weigher"
'''
NAMES = ("weigher", "around", "beside", "every", "typing")
WEIGHER = "weigher(upstream=flip)"
BASE = "flip"
BESIDE = ("beside(upstream=flip)", "every(upstream=flip)")
ROWS = {
    "flip": ("upstream", ()),
    WEIGHER: ("method", BESIDE),
    "weigher(rate=0.9, upstream=flip)": ("method", BESIDE),
    f"around(upstream={WEIGHER})": ("control", ()),
    "beside(upstream=flip)": ("control", ()),
    "every(upstream=flip)": ("control", ()),
    "flip@train": ("control", ()),
    "flip@meta": ("control", ()),
    f"{WEIGHER}@dirty": ("control", ()),
    "weigher(rate=0.9, upstream=flip)@dirty": ("control", ()),
    f"flip [passes of {WEIGHER}]": ("control", ()),
}
"""Rows of the study: what is named, and what stands beside it, with kind and control rows."""


def install(folder: Path) -> None:
    """A package of others, as pip leaves it."""
    (folder / "their_package").mkdir(parents=True)
    (folder / "their_package" / "__init__.py").write_text("raise ImportError('not to be read')\n")
    (folder / "their_methods.py").write_text(THEIRS)
    told = folder / "their_package-1.0.dist-info"
    told.mkdir()
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
    points = "".join(f"{name} = their_methods:{name.capitalize()}\n" for name in NAMES)
    points += "lost = their_package:Lost\nabsent = their_package.deep:Lost\n"
    (told / "entry_points.txt").write_text(f"[{methods.GROUP}]\n{points}")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    install(folder)
    return folder


@pytest.fixture
def installed(theirs: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The package of others, until the test calls ``remove``."""
    monkeypatch.syspath_prepend(theirs)
    importlib.invalidate_caches()
    methods.registry.cache_clear()
    yield
    monkeypatch.undo()
    remove()


def remove() -> None:
    """The package is installed no longer."""
    sys.path[:] = [each for each in sys.path if not (Path(each) / "their_methods.py").exists()]
    sys.modules.pop("their_methods", None)
    importlib.invalidate_caches()
    methods.registry.cache_clear()


@pytest.fixture(scope="module")
def swept(theirs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Their rows and what stands beside them, trained on real data."""
    out = tmp_path_factory.mktemp("runs")
    sys.path.insert(0, str(theirs))
    methods.registry.cache_clear()
    named = ",".join(list(ROWS)[:6])
    arguments = ["--benchmark", "digits(noise=0.4, rows_per_class=20)"]
    arguments += ["--model", "small_cnn(width=0.25)"]
    arguments += ["--epochs", "2", "--methods", named, "--seeds", "1", "--same", "passes"]
    arguments += ["--controls", "--jobs", "1", "--out", str(out)]
    try:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(local.Processes, "carry_out", sweeping.carry_out_here)
            assert main.run(["compare", *arguments]) == 0
    finally:
        remove()
    return out


def told(root: Path, out: Path) -> str:
    """The page of these runs, without its figures and the place of its runs."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(figures, "draw_all", lambda *_: [])
        report(Options(root, out, ["md"]))
    return (out / "report.md").read_text(encoding="utf-8").replace(str(root), "ROOT")


def forgotten(root: Path, copy: Path) -> Path:
    """The same runs, as they were written when a run did not say what its row is."""
    for folder in runs.folders(root):
        (copy / folder.name).mkdir(parents=True)
        for path in folder.iterdir():
            (copy / folder.name / path.name).write_bytes(path.read_bytes())
        text = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        del text["recorded"][ROW]
        (copy / folder.name / "run.json").write_text(json.dumps(text))
    return copy


def block_in(root: Path) -> Block:
    (block,) = blocks.split(records.scan(root)[0])
    return block


def test_rows_of_others_are_what_they_declare(swept: Path) -> None:
    """The package is not there any more: all stands in the runs."""
    assert "weigher" not in methods.registry()
    block = block_in(swept)
    found = {entry.name: (entry.facts.kind, entry.facts.controls) for entry in block.entries}
    assert found.items() >= ROWS.items()
    assert {entry.name for entry in block.compared} == set(list(ROWS)[:3])
    by_name = {name: entry.facts for name, entry in block.by_name.items()}
    assert (by_name[WEIGHER].wraps, by_name[WEIGHER].upstream) == (BASE, BASE)
    around = by_name[f"around(upstream={WEIGHER})"]
    assert (around.wraps, around.upstream) == (WEIGHER, BASE)
    assert by_name[WEIGHER].needs_meta and not by_name[BASE].needs_meta
    assert by_name[f"{WEIGHER}@dirty"].dirty and not by_name[WEIGHER].dirty
    assert by_name[f"flip [passes of {WEIGHER}]"].budget_of == WEIGHER


def test_rows_of_others_have_families_and_control_rows(swept: Path) -> None:
    block = block_in(swept)
    faster = "weigher(rate=0.9, upstream=flip)"
    assert set(block.contrasts(Question())) == {(WEIGHER, BASE), (faster, BASE)}
    every = "every(upstream=flip)"
    beside = {"beside(upstream=flip)", every, "flip@train", "flip@meta"}
    own = {row: {f"flip [passes of {row}]", f"{row}@dirty"} for row in (WEIGHER, faster)}
    around = f"around(upstream={WEIGHER})"
    own[WEIGHER] |= {around}
    for row in (WEIGHER, faster):
        assert set(block.controls_of(block.by_name[row])) == beside | own[row]
    assert block.controls_of(block.by_name[BASE]) == []


def test_the_page_needs_neither_the_package_nor_what_the_run_says(
    swept: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    page = told(swept, tmp_path / "out")
    assert "**Control rows**" in page or "*Control rows*" in page
    assert f"| {WEIGHER} over every" in page.replace("\\", "")
    old = forgotten(swept, tmp_path / "old" / swept.name)
    assert told(old, tmp_path / "out") != page, "nobody knows what their methods are"
    request.getfixturevalue("installed")
    assert told(swept, tmp_path / "out") == page
    assert f"{WEIGHER} over around" in told(old, tmp_path / "out"), "the package says what it is"
    assert "their_methods" not in sys.modules, "a page imports no method"


OURS = (
    "none", "mixup", "crop+mixup", "saflex(upstream=mixup)", "l2rw", "l2rw(upstream=mixup)",
    "autodo", "lpa3", "lpa3(upstream=mixup)", "norm_noise(upstream=lpa3(upstream=mixup))",
    "shuffled_weights(upstream=saflex(upstream=mixup))", "frozen(upstream=autodo)",
    "saflex(upstream=lpa3(upstream=mixup))", "saflex(beta=2.0, upstream=mixup)",
)  # fmt: skip
"""Every kind of row, without the controls that only the method names."""


def write_facts(folder: Path) -> None:
    """What ``make_cell`` writes into run.json, but for the control rows that a method names."""
    text = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    run, _ = runs.read_run(folder)
    method = methods.build(run.method)
    meta = "meta" in method.requires()
    own = facts.facts_of(run, methods.takes_upstream, method.control, meta)
    text["recorded"][ROW] = asdict(own)  # type: ignore[call-overload]
    (folder / "run.json").write_text(json.dumps(text))


def test_runs_of_before_give_the_same_page(tmp_path: Path) -> None:
    root, noisy = tmp_path / "runs", "digits(noise=0.4)"
    made = []
    for method in OURS:
        meta = 9 * ("meta" in methods.build(method).requires())
        made += [make_run(root, method, seed, 1.0 + meta / 9, meta=meta) for seed in range(4)]
    for method in ("none", "mixup"):
        made += [make_run(root, method, control="train"), make_run(root, method, control="meta")]
    of = runs.read_run(made[3 * 4])[0].id
    budget = {"budget": "passes of saflex(upstream=mixup)", "epochs": 9, "recorded": {"of": of}}
    made.append(make_run(root, "mixup", **budget))
    for benchmark in (noisy, "digits(meta_noise=0.4, noise=0.4)"):
        made.append(make_run(root, "saflex(upstream=mixup)", benchmark=benchmark, meta=9))
    made.append(make_run(root, "mixup", benchmark=noisy))
    made.append(make_run(root, "autodo", 9, status="failed", reason="so"))
    before = told(root, tmp_path / "out")
    for folder in made:
        write_facts(folder)
    assert all(ROW in each.recorded for each in records.scan(root)[0])
    assert told(root, tmp_path / "out") == before


def test_the_kinds_of_our_methods() -> None:
    """What a file declares is what the class is."""
    declared = {name: methods.declared(name) for name in methods.BUILTIN}
    kinds = {name: each.kind for name, each in declared.items() if each is not None}
    assert {name for name, kind in kinds.items() if kind == "method"} == {
        "saflex", "l2rw", "meta_weight_net", "lilaw", "autodo", "lpa3", "entaugment", "sra",
        "isda", "bsda", "augmix", "adaaug", "madaug", "probe", "fixmatch", "mixmatch",
        "mean_teacher",
    }  # fmt: skip
    assert {name for name, kind in kinds.items() if kind == "control"} == {
        "frozen", "random_label", "self_distil", "shuffled_weights", "norm_noise", "head_refit",
        "shuffled_strengths", "mean_strength", "isotropic_noise", "shuffled_policy",
        "no_consistency", "one_chain", "unconstrained", "shuffled_policies",
        "boosting", "logistic", "pseudo_label",
    }  # fmt: skip
    for name in methods.BUILTIN:
        made = methods.build(name if name != "wrap" else "wrap(call=py:tests.pipelines:turned)")
        own = methods.Declared(methods.takes_upstream(name), made.control)
        assert declared[name] == own


def test_facts_of_runs_load_no_torch_and_no_method() -> None:
    code = (
        "import sys, methods; from analysis import facts\n"
        "for name in methods.BUILTIN: facts.put_around(name)\n"
        "heavy = {'torch', 'methods.base', 'methods.classic'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.usefixtures("installed")
def test_what_cannot_be_read_is_not_known_and_nothing_is_imported() -> None:
    for name in ("lost", "absent", "not registered"):
        assert methods.declared(name) is None
    assert methods.declared("beside") == methods.Declared(True, True)
    assert not {"their_package", "their_methods"} & set(sys.modules)
    with pytest.raises(
        methods.NamingError, match=r"controls = 'weigher', expected a tuple of control rows"
    ):
        methods.build("typing")


@pytest.mark.parametrize("stored", [{"kind": "other"}, {"wraps": ""}, [], "so", {"more": 1}])
def test_facts_of_another_version_are_made_anew(stored: object, tmp_path: Path) -> None:
    folder = make_run(tmp_path, "saflex(upstream=mixup)", recorded={ROW: stored}, meta=9)
    (record,) = records.read([folder])
    assert record.facts == Facts(kind="method", wraps="mixup", upstream="mixup", needs_meta=True)
