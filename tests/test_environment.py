"""Environments that people have: files that bear our packages' names, backends, proxies, quotas."""

import json
import math
import os
import pickle
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
from ray import cloudpickle

import augbench
from benchmarks.running import capacity
from benchmarks.running.on_ray import own, tune
from benchmarks.running.on_ray.carried import carry

ROOT = Path(augbench.__file__).parent
OWN = 'raise SystemExit("a file of the user\'s own was executed: " + __file__)\n'
SMALL = "digits(rows_per_class=5)"
NETWORK = """\
from torch import nn


def make(spec):
    return nn.Sequential(nn.Flatten(), nn.Linear(784, spec.classes))
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder of the user's own, in which each of our names is taken."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "methods.py").write_text(OWN)
    (folder / "analysis").mkdir()
    (folder / "analysis" / "__init__.py").write_text(OWN)
    (folder / "benchmarks").mkdir()  # no package: a folder of data
    return folder


def call(
    arguments: list[str], cwd: Path, timeout: float = 120, **variables: str
) -> subprocess.CompletedProcess[str]:
    """A command where ours may be found only after what lies in the current folder."""
    path = os.pathsep.join([variables.pop("PYTHONPATH", "."), str(ROOT)])
    return subprocess.run(
        arguments,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path, **variables},
        check=False,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def python(code: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return call([sys.executable, "-c", code], cwd, 120, **variables)


class TestFilesOfTheUsersOwn:
    def test_compare_and_its_workers_find_ours(self, project: Path) -> None:
        (project / "network.py").write_text(NETWORK)
        command = ["compare", "--benchmark", SMALL, "--methods", "none,crop", "--epochs", "1"]
        more = ["--model", "py:network:make", "--seeds", "1", "--jobs", "1", "--out", "out"]
        script = str(Path(sys.executable).with_name("augbench"))
        done = call([script, *command, *more], project)
        assert done.returncode == 0, done.stderr
        assert len(list((project / "out").glob("*/predictions.npz"))) == 2

    @pytest.mark.parametrize("start", [["-m", "augbench"], ["-P", "-m", "augbench"]])
    def test_started_as_a_module(self, project: Path, start: list[str]) -> None:
        done = call([sys.executable, *start, "list"], project)
        assert done.returncode == 0, done.stderr
        assert "trivialaugment" in done.stdout

    def test_a_script_beside_them_keeps_its_own_path(self, project: Path) -> None:
        (project / "helpers.py").write_text("HELP = 'of my own'\n")
        code = (
            "import sys, augbench; before = list(sys.path)\n"
            "from augbench import Batch, Method, build\n"
            "print(type(build('none')).__name__, Method.__module__, sys.path == before)\n"
            "import helpers; print(helpers.HELP)"
        )
        done = python(code, project)
        assert done.stdout == "NoAugmentation methods.base True\nof my own\n", done.stderr

    def test_one_that_is_imported_already_is_named_with_ours(self, project: Path) -> None:
        (project / "methods.py").write_text("STAIN = 'HE'\n")
        done = python("import methods, augbench\naugbench.build('none')", project)
        said = done.stderr.strip().splitlines()[-1]
        assert said.startswith("ImportError: augbench needs its own package 'methods' in ")
        assert f"{ROOT / 'methods'}, but {project / 'methods.py'} was imported" in said
        (project / "analysis" / "__init__.py").write_text("")
        done = python("import analysis, augbench\naugbench.main()", project)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert done.stderr.startswith("augbench: augbench needs its own package 'analysis' in ")
        assert str(project / "analysis" / "__init__.py") in done.stderr

    def test_a_folder_without_a_module_is_named_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = ModuleType("benchmarks")
        folder.__path__ = ["/home/me/benchmarks"]
        monkeypatch.setitem(sys.modules, "benchmarks", folder)
        with pytest.raises(ImportError, match="but /home/me/benchmarks was imported under that"):
            augbench.bind()

    def test_importing_augbench_alone_touches_nothing(self, project: Path) -> None:
        (project / "methods.py").write_text("STAIN = 'HE'\n")
        done = python("import augbench, methods; print(methods.STAIN)", project)
        assert done.stdout == "HE\n", done.stderr

    def test_pytest_puts_the_users_folder_first(self, project: Path) -> None:
        (project / "conftest.py").write_text("")
        (project / "test_mine.py").write_text(
            "import augbench\n\n\ndef test_mine():\n"
            "    assert type(augbench.build('none')).__name__ == 'NoAugmentation'\n"
        )
        done = call([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"], project)
        assert done.returncode == 0, done.stdout


def test_a_sweep_in_a_hostile_place(project: Path, tmp_path: Path) -> None:
    """Files that hide ours and Python's, uv run, a proxy that answers nobody, a strange backend."""
    place = tmp_path / "place"  # of the command: Python looks there for a script, not for augbench
    place.mkdir()
    for name in filter(find_spec, sys.stdlib_module_names):
        (place / f"{name}.py").write_text(OWN)
    (place / "network.py").write_text(NETWORK)
    (place / "s.yaml").write_text(
        f"benchmarks: {SMALL}\nmodels: py:network:make\nmethods: [none, crop]\nseeds: 1\n"
        "training: {epochs: 1}\nresources: {cpus: 1}\n"
    )
    # Ray asks the processes above whether one is called "uv run".
    start = "import os, sys; sys.exit(os.spawnv(os.P_WAIT, sys.argv[1], sys.argv[1:]))"
    (place / "run").write_text(start)
    proxies = ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy")
    wrong = "http://127.0.0.1:9"
    there = {name: wrong for proxy in proxies for name in (proxy, proxy.upper())}
    script = str(Path(sys.executable).with_name("augbench"))
    done = subprocess.run(
        ["uv", "run", script, "sweep", "s.yaml", "--workers", "1", "--out", "out"],
        executable=sys.executable,
        cwd=place,
        env={
            **{name: value for name, value in os.environ.items() if "no_proxy" not in name.lower()},
            **there,
            "PYTHONPATH": os.pathsep.join([str(project), str(ROOT)]),
            "RAY_grpc_enable_http_proxy": "1",
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "1",
            "MPLBACKEND": "module://no.such",
        },
        check=False,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    results = [json.loads(path.read_text()) for path in (place / "out").glob("*/result.json")]
    assert [each["status"] for each in results] == ["done", "done"]


@pytest.mark.parametrize(("address", "first"), [("", "/driver"), ("auto", "/worker")])
def test_a_worker_of_our_own_ray_has_the_path_of_the_command(
    monkeypatch: pytest.MonkeyPatch, address: str, first: str
) -> None:
    monkeypatch.setattr(sys, "path", ["/driver", *sys.path])
    dumped = cloudpickle.dumps(carry(tune.death, address))  # type: ignore[attr-defined]
    carried = pickle.loads(dumped)
    monkeypatch.setattr(sys, "path", ["/worker", *sys.path[1:]])
    assert carried(packed=pickle.dumps(("a\nb",))) == ("b", False)
    assert sys.path[0] == first


@pytest.mark.parametrize(
    ("before", "hosts"),
    [
        ({}, "127.0.0.1,localhost"),
        ({"NO_PROXY": "intranet"}, "intranet,127.0.0.1,localhost"),
        ({"NO_PROXY": "other", "no_proxy": "intranet"}, "intranet,127.0.0.1,localhost"),
        ({"no_proxy": "*"}, "*"),
    ],
)
def test_who_needs_no_proxy_keeps_it(before: dict[str, str], hosts: str) -> None:
    found = own.without_proxy(before)
    assert found == {"no_proxy": hosts, "NO_PROXY": hosts, "no_grpc_proxy": hosts}


class TestBackend:
    DRAW = (
        "from analysis.report import plots; import numpy as np\n"
        "plots.augmentation_grid(np.zeros((1, 2, 2, 1)), np.zeros((1, 1, 2, 2, 1)), ['a'], [['b']],"
        " 'title', __import__('pathlib').Path('drawn.png'))\n"
        "import matplotlib, os; print(matplotlib.rcParams['backend'], os.environ['MPLBACKEND'])"
    )

    @pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "nonsense"])
    def test_one_that_is_not_installed_does_not_matter(self, tmp_path: Path, backend: str) -> None:
        done = python(self.DRAW, tmp_path, MPLBACKEND=backend)
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith(f" {backend}\n")
        assert (tmp_path / "drawn.png").stat().st_size > 1000

    def test_the_users_own_figures_keep_theirs(self, tmp_path: Path) -> None:
        done = python(self.DRAW, tmp_path, MPLBACKEND="svg")
        assert done.stdout == "svg svg\n", done.stderr
        first = "import matplotlib; matplotlib.use('pdf')\n"
        done = python(first + self.DRAW, tmp_path, MPLBACKEND="svg")
        assert done.stdout == "pdf svg\n", done.stderr


class TestQuota:
    @staticmethod
    def place(root: Path, told: str, files: dict[str, str]) -> float:
        (root / "proc" / "self").mkdir(parents=True)
        (root / "proc" / "self" / "cgroup").write_text(told)
        for name, text in files.items():
            path = root / "sys" / "fs" / "cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return capacity.quota(root)

    @pytest.mark.parametrize(
        ("told", "files", "cores"),
        [
            ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
            ("0::/\n", {"cpu.max": "max 100000\n"}, math.inf),
            ("0::/\n", {}, math.inf),
            ("0::/a/b\n", {"a/cpu.max": "200000 100000\n", "a/b/cpu.max": "max 100000\n"}, 2.0),
            ("0::/a/b\n", {"a/cpu.max": "max 100000\n", "a/b/cpu.max": "50000 100000\n"}, 0.5),
            ("0::/a\n", {"b/cpu.max": "50000 100000\n"}, math.inf),
            # a container that sees its name on the host, but its own files at the top
            ("0::/docker/1234\n", {"cpu.max": "300000 100000\n"}, 3.0),
            (
                "9:memory:/x\n3:cpu,cpuacct:/x\n1:name=systemd:/y\n",
                {
                    "cpu,cpuacct/x/cpu.cfs_quota_us": "250000\n",
                    "cpu,cpuacct/x/cpu.cfs_period_us": "100000\n",
                },
                2.5,
            ),
            (
                "3:cpuacct,cpu:/x\n0::/\n",
                {"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "200000\n"},
                2.0,
            ),
            (
                "3:cpu:/\n",
                {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"},
                math.inf,
            ),
            ("3:cpuset:/\n", {"cpuset/cpu.max": "50000 100000\n"}, math.inf),
        ],
    )
    def test_of_all_groups_above(
        self, tmp_path: Path, told: str, files: dict[str, str], cores: float
    ) -> None:
        assert self.place(tmp_path, told, files) == cores

    def test_where_there_are_no_groups(self, tmp_path: Path) -> None:
        assert capacity.quota(tmp_path) == math.inf

    @pytest.mark.parametrize(
        ("left", "count"), [(0.2, 1), (1.0, 1), (2.5, 3), (8.0, 4), (math.inf, 4)]
    )
    def test_decides_how_many_runs_fit(
        self, monkeypatch: pytest.MonkeyPatch, left: float, count: int
    ) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
        monkeypatch.setattr(capacity, "quota", lambda: left)
        assert capacity.cores() == count
