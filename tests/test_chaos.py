"""Sweeps that are killed, stopped and spread over machines: minutes, on a real Ray."""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from analysis import runs
from benchmarks.studies import ledger
from tests import sweeping

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc"),
]

TEXT = """\
models: small_cnn(width=0.25)
methods: [none, mixup, saflex]
seeds: 3
training: {epochs: 80}
workers: 2
retries: 9
"""
KILLS = ("driver", "worker", "raylet", "driver", "worker", "driver")
LINGER_SECONDS = 20.0
"""What is left of a sweep that was killed may take so long to end."""
STOP_SECONDS = 20.0


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sweeping.prepare(tmp_path_factory.mktemp("chaos"))


@pytest.fixture(scope="module")
def temporary() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ab", dir="/tmp") as name:
        yield Path(name)


@pytest.fixture(scope="module")
def undisturbed(place: Path) -> Path:
    """The same runs without a Ray, which takes as long to start as they take."""
    out = place / "undisturbed"
    path = sweeping.study(place, TEXT)
    code, _, errors = sweeping.finish(sweeping.start(path, out, place, "--executor", "local"))
    assert code == 0, errors
    assert len(sweeping.numbers(out)) == 9
    return out


def found(temporary: Path, sign: str) -> list[int]:
    """Processes of the sweep whose command line holds the sign."""
    numbers = []
    for text in sweeping.processes(temporary):
        number = int(text.split()[1])
        try:
            line = Path(f"/proc/{number}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if sign in line:
            numbers.append(number)
    return numbers


def strike(target: str, process: subprocess.Popen[str], temporary: Path) -> bool:
    """Kill it with SIGKILL; whether it was there."""
    signs = {"worker": "ray::ImplicitFunc", "raylet": "raylet/raylet"}
    victims = [process.pid] if target == "driver" else found(temporary, signs[target])
    if not victims or process.poll() is not None:
        return False
    os.kill(victims[0], signal.SIGKILL)
    return True


def work_goes_on(out: Path, process: subprocess.Popen[str]) -> None:
    """Wait until a run gets further than it was."""
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/metrics.jsonl")}
    limit = time.monotonic() + 300
    while process.poll() is None:
        assert time.monotonic() < limit
        for path in out.glob("*/metrics.jsonl"):
            try:
                if path.stat().st_mtime_ns != before.get(path):
                    return
            except FileNotFoundError:
                continue
        time.sleep(0.02)


def ended(out: Path) -> dict[str, int]:
    """When each run that is done was done."""
    return {path.parent.name: path.stat().st_mtime_ns for path in out.glob("*/result.json")}


def test_killed_at_random_moments_every_run_is_done_once_and_bit_for_bit(
    place: Path, temporary: Path, undisturbed: Path
) -> None:
    rng = random.Random(7)
    path, out = sweeping.study(place, TEXT), place / "chaos"
    out.mkdir()
    done: dict[str, int] = {}
    process = None
    for number, target in enumerate(KILLS):
        if process is None:
            process = sweeping.start(path, out, place, TMPDIR=str(temporary))
        if number == 3:  # while Ray starts
            time.sleep(rng.uniform(1, 5))
        else:
            work_goes_on(out, process)
            time.sleep(rng.uniform(0, 0.7))
        assert strike(target, process, temporary), f"no {target} to kill; is the sweep over?"
        now = ended(out)
        assert done.items() <= now.items(), "a run that was done was done again"
        done = now
        if target == "worker":
            continue  # the sweep goes on by itself
        code, _, errors = sweeping.finish(process)
        assert code == (-signal.SIGKILL if target == "driver" else 1), errors
        if target == "raylet":
            assert "Resume from the checkpoints with: " in errors
        process = None
        sweeping.wait_until_clean(out, temporary, LINGER_SECONDS)
    assert len(done) < 9, "the last kill came too late to disturb anything"
    code, _, errors = sweeping.finish(sweeping.start(path, out, place, TMPDIR=str(temporary)))
    assert code == 0, errors
    assert done.items() <= ended(out).items()
    assert set(sweeping.statuses(out).values()) == {"done"}
    assert sweeping.numbers(out) == sweeping.numbers(undisturbed)
    assert sweeping.left_behind(out, temporary) == []


LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}
"""As /proc writes 127.0.0.1, ::1, and the first within IPv6."""


@pytest.mark.parametrize(
    ("kind", "group", "ends"),
    [
        (signal.SIGINT, False, 130),
        (signal.SIGINT, True, 130),
        (signal.SIGTERM, False, 130),
        (signal.SIGUSR1, True, 3),
    ],
)
def test_stopped_and_started_again(
    kind: signal.Signals, group: bool, ends: int, place: Path, temporary: Path, undisturbed: Path
) -> None:
    """By a signal to the sweep, or to all processes, as from a terminal or SLURM."""
    path, out = sweeping.study(place, TEXT), place / f"{kind.name}-{group}"
    out.mkdir()
    process = sweeping.start(path, out, place, TMPDIR=str(temporary))
    work_goes_on(out, process)
    assert sweeping.listeners(temporary)
    assert sweeping.listeners(temporary) <= LOOPBACK
    assert any("RAY_USAGE_STATS_ENABLED=0" in each for each in sweeping.variables(temporary))
    assert not any("RAY_USAGE_STATS_ENABLED=1" in each for each in sweeping.variables(temporary))
    begin = time.monotonic()
    if group:
        os.killpg(process.pid, kind)
    else:
        process.send_signal(kind)
    code, _, errors = sweeping.finish(process)
    assert time.monotonic() - begin < STOP_SECONDS
    assert code == ends, errors
    assert "Resume with: augbench sweep" in errors
    assert "interrupted" in sweeping.statuses(out).values()
    left = set(sweeping.left_behind(out, temporary))
    assert left == {"checkpoint.pt"}
    code, _, errors = sweeping.finish(sweeping.start(path, out, place, TMPDIR=str(temporary)))
    assert code == 0, errors
    assert "resuming after epoch" in errors
    assert sweeping.numbers(out) == sweeping.numbers(undisturbed)


TWO_MACHINES = """\
import sys
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
other = cluster.add_node(num_cpus=1)
cluster.wait_for_nodes()
print(cluster.address, flush=True)
for line in sys.stdin:
    if line.strip() == "kill":
        cluster.remove_node(other, allow_graceful=False)
        print("killed", flush=True)
cluster.shutdown()
"""


BLUR = """\
import random


def blurred(image):
    return image.rotate(random.uniform(-5, 5))
"""


def test_on_a_cluster_a_machine_that_dies_leaves_its_runs_to_the_other(
    place: Path, temporary: Path
) -> None:
    where, out = place / "where", place / "cluster"
    where.mkdir()
    variables = {
        "BROKEN": "1",
        "WHERE": str(where),
        "SLEEP": "0.02",
        "RAY_TMPDIR": str(temporary),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "a token that both sides know",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    machines = subprocess.Popen(
        [sys.executable, "-c", TWO_MACHINES],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=sweeping.environment(place, **variables),
    )
    assert machines.stdin is not None
    assert machines.stdout is not None
    try:
        address = machines.stdout.readline().strip()
        mine = place / "mine"  # the current folder of the sweep alone
        mine.mkdir()
        code_of_mine = mine / "blur.py"
        code_of_mine.write_text(BLUR)
        variables["PYTHONPATH"] = sweeping.environment(place)["PYTHONPATH"]
        text = "models: 'py:broken:telling'\nmethods: wrap(call=py:blur:blurred)\nseeds: 10\n"
        text += "training: {epochs: 30}\n"
        path = sweeping.study(place, text + "retries: 0\n", "cluster.yaml")
        process = sweeping.start(path, out, mine, "--address", address, **variables)
        limit = time.monotonic() + 300
        while len(list(where.iterdir())) < 2:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < limit, "work landed on one machine only"
            time.sleep(0.05)
        code_of_mine.unlink()  # what was read at the start is carried to all
        machines.stdin.write("kill\n")
        machines.stdin.flush()
        assert machines.stdout.readline().strip() == "killed"
        code, _, errors = sweeping.finish(process)
        assert code == 0, errors
        assert "on 2 machines" in errors
        assert set(sweeping.statuses(out).values()) == {"done"}
        assert not list(out.glob(f"*/{ledger.FAILURES}")), "a lost machine is no failure of a run"
        assert machines.poll() is None, "a Ray that was there before is not stopped"
        code_of_mine.write_text(f"# as before\n{BLUR}")
        more = sweeping.start(
            path, out, mine, "--address", address, "--set", "seeds=11", **variables
        )
        code, _, errors = sweeping.finish(more)
        assert code == 0, errors
        assert "Runs: 1 to do, 10 done, 1 at a time on 1 machine" in errors
        big = sweeping.start(
            path, out, mine, "--address", address, "--set", "seeds=12", "resources.cpus=64",
            **variables
        )  # fmt: skip
        code, _, errors = sweeping.finish(big)
        assert code == 2, errors
        assert "64 cores" in errors
        assert sweeping.left_behind(out, temporary) == []
    finally:
        machines.stdin.close()
        machines.wait(timeout=60)
        machines.stdout.close()


def test_a_search_with_pruning(place: Path, temporary: Path) -> None:
    path, out = place / "tune.yaml", place / "tuned"
    path.write_text(
        """\
benchmarks: digits
models: small_cnn(width=0.25)
methods: [none, mixup]
training: {epochs: 9}
tune:
  trials: 16
  seeds: 3
  final_seeds: 4
  asha: {grace: 1, factor: 3}
""",
        encoding="utf-8",
    )
    code, shown, errors = sweeping.finish(
        sweeping.start(path, out, place, TMPDIR=str(temporary)), timeout=900
    )
    assert code == 0, errors
    kept = json.loads((out / "studies" / "tune" / "search.json").read_text())
    assert [row["row"] for row in kept] == ["none", "mixup"]
    for row in kept:
        assert len(row["trials"]) == 16
        states = {trial["state"] for trial in row["trials"]}
        assert states == {"done", "stopped"}
        assert {trial["rung"] for trial in row["trials"] if trial["state"] == "stopped"} <= {1, 3}
        chosen = row["trials"][row["winner"]]
        complete = [trial for trial in row["trials"] if trial["state"] == "done"]
        assert chosen["select"] == max(trial["select"] for trial in complete)
        assert row["regret"] >= 0
        assert row["expected"][-1]["trials"] == 16
        against = row["fresh"][0]
        assert row["winner"] == 0 or len(against["population"]) == 2
    assert shown.count("chosen: trial") == 2
    assert "fresh seeds" in shown
    for folder in runs.folders(out):
        status = runs.status_of(folder)
        if status.state == "stopped":
            assert status.reason.startswith("rung ")
            assert not (folder / "checkpoint.pt").exists()
    before = ended(out)
    begin = time.monotonic()
    code, again, errors = sweeping.finish(sweeping.start(path, out, place, TMPDIR=str(temporary)))
    assert time.monotonic() - begin < 60
    assert (code, again) == (0, shown)
    assert ended(out) == before, "pruned trials are never resumed"
