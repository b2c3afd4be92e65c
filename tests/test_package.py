"""What an installed augbench offers: its module, its version, the shipped studies, its needs."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

import augbench
from analysis.report.page import NoRuns
from benchmarks.cli import main
from benchmarks.cli.arguments import UsageError
from benchmarks.running import local
from benchmarks.studies import loading, shipped
from methods.naming import NamingError
from tests import sweeping

ROOT = Path(__file__).parent.parent
SMALL = {"benchmark": "digits(rows_per_class=5)", "model": "small_cnn(width=0.25)", "epochs": 1}


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs."""
    out = tmp_path_factory.mktemp("compared") / "runs"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(local.Processes, "carry_out", sweeping.carry_out_here)
        frame = augbench.compare(methods=["none", "crop"], seeds=2, jobs=1, out=out, **SMALL)
    assert list(frame["row"]) == ["none", "none", "crop", "crop"]
    assert list(frame["seed"]) == [0, 1, 0, 1]
    assert list(frame["status"]) == ["done"] * 4
    assert frame["accuracy"].between(0, 1).all() and frame["auc"].between(0, 1).all()
    return out


def test_the_printed_numbers_are_those_of_the_frame(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local.Processes, "carry_out", sweeping.carry_out_here)
    options: dict[str, Any] = {**SMALL, "seeds": 3, "jobs": 1, "out": tmp_path}
    frame = augbench.compare(methods=["none", "crop"], **options)
    shown = capsys.readouterr().out
    by_row = dict(list(frame.groupby("row")))
    differences = [
        100 * (ours - theirs)
        for ours, theirs in zip(
            *(by_row[name].sort_values("seed")["accuracy"] for name in ("crop", "none")),
            strict=True,
        )
    ]
    for name, own in by_row.items():
        scores = (100 * own[metric] for metric in ("accuracy", "auc"))
        told = " +".join(f"{each.mean():.2f} ± {each.std(ddof=1):.2f}" for each in scores)
        assert re.search(rf"^{name} +3 +{told}", shown, re.M)
    (line,) = re.findall("^crop .*", shown, re.M)
    assert f" {sum(differences) / 3:+.2f} [" in line and line.count("(few seeds)") == 1
    capsys.readouterr()
    augbench.compare(methods=["none", "crop"], verbose=True, **options)
    assert capsys.readouterr().out.startswith(shown.partition("\nResults:")[0].rstrip())


class TestModule:
    def test_offers_what_it_lists(self) -> None:
        assert dir(augbench) == sorted(augbench.__all__)
        assert augbench.__doc__ is not None
        for name in augbench.__all__:
            assert getattr(augbench, name) is not None
            assert f"``{name}``" in augbench.__doc__
        with pytest.raises(AttributeError, match="no attribute 'nothing'"):
            augbench.nothing  # noqa: B018

    def test_its_classes_are_those_of_the_packages(self) -> None:
        from analysis import runs
        from benchmarks import contract
        from methods import base

        assert augbench.Method is base.Method
        assert augbench.Run is runs.Run
        assert augbench.contract is contract

    def test_is_loaded_at_once(self) -> None:
        code = "import sys, augbench; print(len({m.partition('.')[0] for m in sys.modules} & {x}))"
        heavy = {"torch", "numpy", "pandas", "pydantic", "methods", "benchmarks", "analysis"}
        code = code.replace("{x}", repr(heavy))
        assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT) == "0\n"


class TestFunctions:
    def test_records_of_folders(self, compared: Path, capsys: pytest.CaptureFixture[str]) -> None:
        long = augbench.records(compared, compared)
        last = long.query("metric == 'accuracy' and split == 'test' and when == 'last'")
        wide = augbench.records(compared, each="run")
        assert len(last) == len(wide) == 4
        assert dict(zip(last["id"], last["value"], strict=True)) == dict(
            zip(wide["id"], wide["accuracy"], strict=True)
        )
        assert capsys.readouterr().err == ""
        (compared / ("0" * 16)).mkdir()
        (compared / ("0" * 16) / "run.json").write_text("{")
        augbench.records(compared)
        assert "left out: " in capsys.readouterr().err

    def test_what_is_compared_is_not_done_again(
        self, compared: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        frame = augbench.compare(methods="crop", seeds=1, out=str(compared), **SMALL)
        assert list(frame["row"]) == ["crop"]
        assert "to do" not in capsys.readouterr().err

    def test_report_gives_the_page(self, compared: Path, tmp_path: Path) -> None:
        page = augbench.report(compared, tmp_path / "page", format="html")
        assert page == tmp_path / "page" / "report.html" and page.is_file()

    @pytest.mark.parametrize(
        ("options", "part"),
        [
            ({"epoch": 1}, "unknown option 'epoch'; did you mean 'epochs'?"),
            ({"debug": True}, "unknown option 'debug'"),
            ({"epochs": "many"}, "epochs: .*got 'many'"),
            ({"device": "gpu"}, "device: .*got 'gpu'"),
            ({"benchmark": "nothing"}, "unknown benchmark 'nothing'"),
            ({"methods": ["mixed"]}, "unknown method 'mixed'; did you mean 'mixup'"),
            ({"methods": []}, "methods: expected names"),
            ({"seeds": 0}, "seeds: expected 1 or more"),
        ],
    )
    def test_a_wrong_option_is_a_value_error(self, options: dict[str, object], part: str) -> None:
        with pytest.raises(ValueError, match=part):
            augbench.compare(**options)  # type: ignore[arg-type]

    def test_wrong_studies_and_folders_are_value_errors(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="did you mean 'quickstart'"):
            augbench.sweep("quikstart")
        with pytest.raises(ValueError, match=r"training\.epoch"):
            augbench.sweep("quickstart", settings=["training.epoch=1"], out=tmp_path)
        with pytest.raises(UsageError, match="expected a results folder"):
            augbench.records(tmp_path / "nothing")
        with pytest.raises(UsageError, match="with finished runs"):
            augbench.records(tmp_path)
        with pytest.raises(UsageError, match="each: expected metric or run, got 'seed'"):
            augbench.records(tmp_path, each="seed")  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="records: expected paths of results folders"):
            augbench.records([tmp_path])  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="methods: expected names of rows"):
            augbench.compare("digits", [augbench.build("mixup")])  # type: ignore[list-item]
        with pytest.raises(NoRuns):
            augbench.report(tmp_path, tmp_path / "page")


class TestCommandLine:
    def test_version(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main.run(["--version"]) == 0
        assert capsys.readouterr().out == f"augbench {version('augbench')}\n"

    def test_shipped_studies_are_listed_with_their_costs(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main.run(["sweep", "--list"]) == 0
        shown = capsys.readouterr().out
        for path in (ROOT / "ray_configs").glob("*.yaml"):
            part = shown.partition(f"\n{path.stem}\n")[2] or shown.partition(f"{path.stem}\n")[2]
            lines = part.splitlines()
            assert lines[0].strip().endswith(".") or len(lines[0]) > 90
            assert lines[1].startswith("  Cost: ") or lines[2].startswith("  Cost: ")

    def test_a_shipped_study_goes_by_its_name(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert main.run(["sweep", "quickstart", "--dry-run"]) == 0
        shown = capsys.readouterr()
        assert "35 runs" in shown.out
        assert str(Path("ray_configs") / "quickstart.yaml") in shown.err
        assert main.run(["sweep", "quikstart"]) == 2
        assert "did you mean 'quickstart'?" in capsys.readouterr().err
        assert main.run(["sweep", "studies/quickstart.yaml"]) == 2
        assert "the shipped study is called quickstart" in capsys.readouterr().err
        assert main.run(["sweep", "nothing.yaml"]) == 2
        assert "No such file" in capsys.readouterr().err

    def test_a_file_that_exists_wins(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        Path("quickstart").mkdir()  # a results folder, say
        assert shipped.find(Path("quickstart")) == ROOT / "ray_configs" / "quickstart.yaml"
        Path("quickstart").rmdir()
        for name in ("quickstart", "quickstart.yaml"):
            assert shipped.find(Path(name)) == ROOT / "ray_configs" / "quickstart.yaml"
            Path(name).write_text("")
            assert shipped.find(Path(name)) == Path(name)

    def test_plan_knows_them_too(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "runs").mkdir()
        assert main.run(["plan", "quickstart"]) == 2
        assert "no study 'quickstart' in runs" in capsys.readouterr().err

    def test_a_new_study_can_be_carried_out(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = tmp_path / "my study.yaml"
        assert main.run(["sweep", "--init", str(file)]) == 0
        again = capsys.readouterr().out.rpartition(": ")[2].strip()
        assert again == f"augbench sweep '{file}' --dry-run"
        assert loading.load(file).family == ("mixup",)
        assert main.run(["sweep", str(file), "--dry-run", "--out", str(tmp_path / "runs")]) == 0
        assert "6 runs: 6 new; 6 to do" in capsys.readouterr().out
        assert f"augbench sweep '{file}' " in file.read_text()

        file.write_text("mine")
        assert main.run(["sweep", "--init", str(file)]) == 2
        assert "already exists" in capsys.readouterr().err
        assert file.read_text() == "mine"
        assert main.run(["sweep", "--init", str(tmp_path / "none" / "s.yaml")]) == 2
        assert "a folder that exists" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "arguments", [[], ["s.yaml", "--list"], ["--list", "--init", "new.yaml"]]
    )
    def test_one_thing_is_asked_of_a_sweep(
        self,
        arguments: list[str],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert main.run(["sweep", *arguments]) == 2
        assert "expected a study" in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []


class TestBesideATorch:
    """Installed with a constraint, an older torch stays: none of our ranges asks for more."""

    @pytest.mark.parametrize(
        ("torch", "torchvision"),
        [("2.4.0", "0.19.0"), ("2.6.0+cu124", "0.21.0+cu124"), ("2.9.1", "0.24.1")],
    )
    def test_ranges_take_it(self, torch: str, torchvision: str) -> None:
        given = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
        ranges = {each.name: each.specifier for each in map(Requirement, given)}
        assert torch in ranges["torch"] and torchvision in ranges["torchvision"]
        assert version("torch") in ranges["torch"]
        assert version("torchvision") in ranges["torchvision"]

    def test_a_package_that_pins_another_is_not_needed(self) -> None:
        given = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
        for each in map(Requirement, given):
            assert all(one.operator == ">=" for one in each.specifier), each


def test_a_name_that_is_no_study_is_told() -> None:
    with pytest.raises(NamingError, match="neither a file nor shipped"):
        shipped.find(Path("some"))
