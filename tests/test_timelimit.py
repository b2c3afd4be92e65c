"""Commands that stop in time, with checkpoints."""

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from analysis import runs
from benchmarks.cli import main
from benchmarks.running import local, timelimit
from benchmarks.running.timelimit import Limit, limit_of
from methods.naming import NamingError
from tests import sweeping


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sweeping.prepare(tmp_path_factory.mktemp("timelimit"))


@pytest.fixture(autouse=True)
def no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(timelimit.SLURM_END, raising=False)


@pytest.fixture
def waiting() -> Iterator[None]:
    """SIGUSR1 waits, as in a process of the command's own, and is taken away at the end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    yield
    if signal.SIGUSR1 in signal.sigpending():
        signal.sigwait({signal.SIGUSR1})
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def call() -> None:
    """Send SIGUSR1 to this thread: another one would end the process of the tests."""
    signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)


def given(place: Path, out: Path, *more: str) -> list[str]:
    return [
        "compare", "--benchmark", f"npz:{place / 'small.npz'}", "--model", "small_cnn(width=0.25)",
        "--methods", "none,flip", "--seeds", "1", "--epochs", "6", "--device", "cpu",
        "--out", str(out), *more,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("45m", 2700), ("3h50m", 13800), ("1d12h", 129600), ("1h0m5s", 3605)],
)
def test_a_duration(text: str, seconds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    limit = limit_of(text)
    assert limit == Limit(1000.0 + seconds) and limit.given and not limit.reached()
    assert limit.allows(seconds) and not limit.allows(seconds + 1)
    monkeypatch.setattr(time, "time", lambda: 1000.0 + seconds)
    assert limit.reached()


@pytest.mark.parametrize("text", ["3", "3.5h", "h", "50m3h", "-1h", "0s", "3 h", "1w", "03:50:00"])
def test_what_is_no_duration(text: str) -> None:
    said = f"time-limit: expected a duration such as 3h50m, 45m or 1d12h (d, h, m, s), got '{text}'"
    with pytest.raises(NamingError) as error:
        limit_of(text)
    assert str(error.value) == said


@pytest.mark.parametrize("verb", ["compare", "sweep"])
def test_a_wrong_limit_is_told_before_anything_is_read(
    verb: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = given(place, tmp_path / "runs")
    if verb == "sweep":
        path = sweeping.study(place, "models: small_cnn(width=0.25)\nmethods: none\nseeds: 1\n")
        arguments = ["sweep", str(path), "--out", str(tmp_path / "runs")]
    assert main.run([*arguments, "--time-limit", "soon"]) == 2
    assert "time-limit: expected a duration such as 3h50m" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_in_a_slurm_job_the_limit_is_before_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    assert limit_of("") == Limit() and not limit_of("").given
    monkeypatch.setenv(timelimit.SLURM_END, "5000")
    assert limit_of("") == Limit(5000 - timelimit.SLURM_SECONDS)
    assert limit_of("10s") == Limit(1010), "what is asked for comes first"
    for other in ("999", "0", "", "soon", "-5"):  # also a shell that outlived its job
        monkeypatch.setenv(timelimit.SLURM_END, other)
        assert limit_of("") == Limit()


def test_at_the_limit_runs_write_checkpoints_and_the_same_command_resumes(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, whole = tmp_path / "runs", tmp_path / "whole"
    monkeypatch.setattr(local.Processes, "carry_out", sweeping.carry_out_here)
    assert main.run(given(place, whole)) == 0
    arguments = given(place, out, "--time-limit", "2h")
    with monkeypatch.context() as patch:
        patch.setattr(Limit, "reached", lambda self: any(out.glob("*/checkpoint.pt")))
        capsys.readouterr()
        assert main.run(arguments) == 3
    shown = capsys.readouterr()
    assert shown.out == "" and "Time limit: runs stop at 20" in shown.err
    (line,) = [line for line in shown.err.splitlines() if "Resume with" in line]
    assert line.startswith(
        "augbench: time limit reached; 2 runs left, 1 with a checkpoint. Resume with: augbench "
    )
    assert line.endswith("--time-limit 2h")
    assert sorted(sweeping.statuses(out).values()) == ["interrupted"]
    assert main.run(arguments) == 0
    results = [runs.read_result(folder) or {} for folder in runs.folders(out)]
    assert sorted(each["resumed"] for each in results) == [0, 1]
    assert sweeping.numbers(out) == sweeping.numbers(whole)


def test_no_run_is_begun_that_cannot_finish_an_epoch(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the time of an epoch is known; else it is tried."""
    out = tmp_path / "runs"
    monkeypatch.setattr(local.Processes, "carry_out", sweeping.carry_out_here)
    one = [*given(place, out, "--time-limit", "10m"), "--methods", "none"]
    assert main.run(one) == 0, "nothing is known yet"
    (folder,) = runs.folders(out)
    result = runs.read_result(folder)
    assert result is not None
    result["cost"] |= {"charged_seconds": 6 * 700.0}
    runs.write_text(folder / "result.json", runs.to_json(result))
    capsys.readouterr()
    assert main.run([*one, "--seeds", "3"]) == 3
    said = capsys.readouterr().err
    assert said.count("Not started: runs that cannot finish an epoch before the time limit") == 1
    assert "time limit reached; 2 runs left, 0 with a checkpoint" in said
    assert len(list(runs.folders(out))) == 1
    assert main.run([*one, "--seeds", "2", "--time-limit", "12m"]) == 0, "there is time for one"


@pytest.mark.usefixtures("waiting")
def test_sigusr1_is_as_the_limit(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first run: none is begun."""
    call()
    assert Limit().given and Limit().reached()
    assert main.run(given(place, tmp_path / "runs")) == 3
    assert "time limit reached; 2 runs left, 0 with a checkpoint" in capsys.readouterr().err


def test_what_is_to_be_done_at_the_limit_is_done_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a driver that does not look at the clock itself, such as Ray's."""
    monkeypatch.setattr(timelimit, "LOOK_SECONDS", 0.001)
    done = threading.Event()
    calls: list[float] = []

    def act() -> None:
        calls.append(time.time())
        done.set()

    limit = Limit(time.time() + 0.05)
    with limit.watched(act):
        assert done.wait(30)
    assert len(calls) == 1 and calls[0] >= limit.until
    with Limit().watched(act):
        pass
    assert len(calls) == 1
