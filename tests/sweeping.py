"""What the tests of sweeps share: studies, networks that fail, and what is left behind."""

import contextlib
import importlib
import itertools
import os
import subprocess
import sys
import time
import zlib
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from analysis import runs
from benchmarks.data.names import Benchmark
from benchmarks.data.table_catalogue import TABLES
from benchmarks.running.driver import Driver, Outcomes
from benchmarks.running.worker import work
from benchmarks.studies import cells, plan
from benchmarks.studies.ledger import Ledger
from benchmarks.studies.rounds import Round
from benchmarks.studies.schema import Study
from benchmarks.training import networks
from benchmarks.training.errors import Interrupted
from benchmarks.training.progress import Gone
from methods import own
from methods.base import Input


def carry_out_here(self: Any, round_: Round, ledger: Ledger, study: Study) -> Outcomes:
    """In the place of ``local.Processes.carry_out``: in this process, as a worker's torch takes
    seconds to import."""
    ends = self.limit.reached
    driver = Driver(round_, ledger, study, self.capacity, ends, self.limit)
    name = ""

    def report(told: dict[str, Any]) -> None:
        driver.reported(name, told)
        if not driver.goes_on(name, told):
            raise Gone

    for number in itertools.count():
        if driver.over:
            break
        name = str(number)
        offered = driver.offer(name)
        if offered is None:
            time.sleep(0.05)  # other processes hold what is left
            continue
        driver.started(name)
        job, wanted, again = driver.jobs[offered["job"]], offered["runs"], offered["again"]
        options = replace(self._options, shares_gpu=offered["shares"])
        with contextlib.suppress(Gone, Interrupted):
            work(job, wanted, again, ledger.root, options, ends, report)
        driver.ended(name)
    driver.display.close()
    return driver.outcomes


NETWORKS = '''\
"""Networks that go wrong while BROKEN is set, and one that tells where it runs."""

import os
import signal
import time
from pathlib import Path

import torch
from torch import nn


class Network(nn.Module):
    def __init__(self, spec, wrong):
        super().__init__()
        self.head = nn.Linear(spec.shape[0] * spec.shape[1] * spec.shape[2], spec.classes)
        self.wrong = wrong

    def forward(self, x):
        if self.training and os.environ.get("BROKEN"):
            self.wrong()
        logits = self.head(x.flatten(1))
        late = self.training and os.environ.get("BROKEN")
        return logits * float("nan") if self.wrong is divides and late else logits


def raises():
    raise RuntimeError("a network of one's own")


def divides():
    pass


def dies():
    os.kill(os.getpid(), signal.SIGKILL)


def tells():
    import ray

    if not ray.is_initialized():  # a first look, before Ray is there
        return
    node = ray.get_runtime_context().get_node_id()
    (Path(os.environ["WHERE"]) / node).touch()
    time.sleep(float(os.environ.get("SLEEP", "0")))


def poisons():
    """As a GPU that is in error: whatever comes after it in this process fails as well."""
    from benchmarks.training import machine, trainer

    def fails(*arguments, **options):
        raise RuntimeError("CUDA error: device-side assert triggered")

    machine.gpu_works = lambda: False
    trainer.train_step = fails
    fails()


def poisoning(spec):
    return Network(spec, poisons)


def raising(spec):
    return Network(spec, raises)


def nan(spec):
    return Network(spec, divides)


def killed(spec):
    return Network(spec, dies)


def telling(spec):
    return Network(spec, tells)
'''


def prepare(folder: Path) -> Path:
    """A folder with the networks and a small data set; it belongs on PYTHONPATH."""
    (folder / "broken.py").write_text(NETWORKS, encoding="utf-8")
    rng, arrays = np.random.default_rng(0), {}
    for split, rows in (("train", 400), ("val", 60), ("test", 60)):
        labels = np.arange(rows) % 4
        images = rng.integers(0, 120, (rows, 12, 12))
        images[:, :6] += 100 * (labels // 2)[:, None, None]
        images[:, :, :6] += 30 * (labels % 2)[:, None, None]
        arrays[f"{split}_images"] = images.astype(np.uint8)
        arrays[f"{split}_labels"] = labels
    np.savez(folder / "small.npz", **arrays)
    return folder


def study(folder: Path, text: str, name: str = "some.yaml") -> Path:
    """A study file on that data set."""
    path = folder / name
    path.write_text(f"benchmarks: npz:{folder / 'small.npz'}\n{text}", encoding="utf-8")
    return path


def environment(folder: Path, **more: str) -> dict[str, str]:
    """The environment of a sweep: our source, the networks, and a short folder for sockets."""
    source = Path(runs.__file__).parent.parent
    paths = [str(source), str(folder), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **more}


def command(path: Path, out: Path, *more: str) -> list[str]:
    """The sweep as a command line."""
    return [sys.executable, "-m", "benchmarks", "sweep", str(path), "--out", str(out), *more]


def start(
    path: Path, out: Path, folder: Path, *more: str, **variables: str
) -> subprocess.Popen[str]:
    """A sweep that runs."""
    return subprocess.Popen(
        command(path, out, *more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env=environment(folder, **variables),
        start_new_session=True,  # a group of its own, as a terminal makes it
    )


def finish(process: subprocess.Popen[str], timeout: float = 900) -> tuple[int, str, str]:
    """Exit code, output and errors."""
    try:
        shown, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        _, errors = process.communicate()
        raise AssertionError(f"not over after {timeout} s:\n{errors}") from None
    except BaseException:  # Ctrl-C does not reach a group of its own
        process.terminate()
        raise
    return process.returncode, shown, errors


def statuses(out: Path) -> dict[str, str]:
    """State of each run, by the name of its network, row and seed."""
    found = {}
    for folder in runs.folders(out):
        run, _ = runs.read_run(folder)
        found[f"{run.model} {run.row} {run.seed}"] = runs.status_of(folder).state
    return found


def numbers(out: Path) -> dict[str, tuple[bytes, bytes]]:
    """What must not depend on how a run came about, by id."""
    found = {}
    for folder in runs.folders(out):
        if (folder / "predictions.npz").exists():
            metrics, predictions = folder / "metrics.jsonl", folder / "predictions.npz"
            found[folder.name] = (metrics.read_bytes(), predictions.read_bytes())
    return found


def left_behind(out: Path, temporary: Path) -> list[str]:
    """Files that stand for work that goes on, folders of Ray, and processes that use them."""
    passing = {"lock", "checkpoint.pt"}
    found = [
        path.name
        for path in out.rglob("*")
        if path.name in passing or path.name.endswith(".part") or path.name.startswith(".sweep-")
    ]
    found += [path.name for path in temporary.glob("augbench-*")]
    return found + processes(temporary)


def processes(temporary: Path) -> list[str]:
    """Processes of Ray whose files lie below a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            links = [str(link.readlink()) for link in (process / "fd").iterdir()]
        except OSError:
            continue
        if any(link.startswith(f"{temporary}/augbench-") for link in links):
            found.append(f"process {process.name}")
    return found


def listeners(temporary: Path) -> set[str]:
    """Hexadecimal addresses on which the processes of a sweep accept connections."""
    own = set()
    for name in processes(temporary):
        for link in Path(f"/proc/{name.removeprefix('process ')}/fd").iterdir():
            with contextlib.suppress(OSError):
                own.add(str(link.readlink()))
    found = set()
    for table in ("tcp", "tcp6"):
        for entry in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = entry.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in own:
                found.add(words[1].partition(":")[0])
    return found


def variables(temporary: Path) -> list[set[str]]:
    """The environment of each process of a sweep."""
    found = []
    for name in processes(temporary):
        path = Path(f"/proc/{name.removeprefix('process ')}/environ")
        with contextlib.suppress(OSError):
            found.append(set(path.read_bytes().decode(errors="replace").split("\0")))
    return found


def wait_until_clean(out: Path, temporary: Path, seconds: float) -> float:
    """Seconds until nothing of a sweep that was killed is left but its runs."""
    begin = time.monotonic()
    while left := [*processes(temporary), *(path.name for path in temporary.glob("augbench-*"))]:
        assert time.monotonic() - begin < seconds, left
        time.sleep(0.1)
    return time.monotonic() - begin


def weights_beside(monkeypatch: pytest.MonkeyPatch, folder: Path, study: str) -> None:
    """For the study that needs them: random weights in the current folder, or skip without timm."""
    if study != "medmnist_pretrained":
        return
    if find_spec("timm") is None:
        pytest.skip("timm is not installed")
    own.import_torchvision()
    network = importlib.import_module("timm").create_model("tf_efficientnet_lite0")
    torch.save(network.state_dict(), folder / "lite0.pt")
    monkeypatch.chdir(folder)


FOLDERS = {"cub": (200, (4994, 1000, 5794)), "iwildcam": (7, (6052, 2826, 8483))}
"""Classes and rows of the folders of saflex_table3."""


def data_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """For studies of what may not be at hand, the tables of SAFLEX, folders, rows from elsewhere
    and ImageNet's weights: what a plan has to know of them."""
    read = plan.source_of
    monkeypatch.setattr(cells, "version_of", lambda source: zlib.crc32(Path(source).name.encode()))
    monkeypatch.setattr(networks, "load_imagenet", lambda *_: None)

    def told(benchmark: Benchmark, root: Path, study: Study) -> plan.Source:
        if benchmark.name == "folder" and Path(benchmark.path).name in FOLDERS:
            classes, counts = FOLDERS[Path(benchmark.path).name]
            shape = (3, benchmark.size, benchmark.size)
            name = Path(benchmark.path).name
            return plan.Source(checksum=name, shape=shape, classes=classes, counts=counts)
        entry = TABLES.get(benchmark.name)
        if entry is None:
            return read(benchmark, root, study)
        rows = benchmark.rows or entry.rows
        counts = (rows * 65 // 100, rows * 15 // 100, rows * 20 // 100)
        coded = tuple(9 * (place < len(entry.categorical)) for place in range(entry.features))
        one = Input("vector", (entry.features,), -5.0, 5.0, coded if any(coded) else ())
        return plan.Source(
            checksum=entry.md5, shape=one.shape, classes=2, counts=counts, inputs=(one,)
        )

    monkeypatch.setattr(plan, "source_of", told)
