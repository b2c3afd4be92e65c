"""``augbench doctor``: what a run would use, and whether a step on this device is right."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from benchmarks.cli import doctor, main
from benchmarks.running import agreement, capacity

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same check on a network that takes a tenth of a second."""
    monkeypatch.setattr(agreement, "MODEL", "resnet18(width=0.125, activation=celu)")
    monkeypatch.setattr(capacity, "cores", lambda: 4)


def told(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """What was printed, by the first word of its line."""
    lines = capsys.readouterr().out.splitlines()
    return {line.split()[0]: " ".join(line.split()[1:]) for line in lines}


def asked(folder: Path, *more: str) -> list[str]:
    out, data = str(folder / "runs"), str(folder / "data")
    return ["doctor", "--device", "cpu", "--out", out, "--data", data, *more]


def rounded(x: Tensor) -> Tensor:
    """float32 to the 10 bits that TF32 keeps of a mantissa, to nearest."""
    bits = x.detach().contiguous().view(torch.int32)
    return x + ((bits + 0x1000 & ~0x1FFF).view(torch.float32) - x).detach()


def tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions of float32 as a GPU computes them that takes TF32."""
    exact = nn.Conv2d._conv_forward

    def forward(self: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if x.dtype == torch.float32:
            x, weight = rounded(x), rounded(weight)
        return exact(self, x, weight, bias)

    monkeypatch.setattr(nn.Conv2d, "_conv_forward", forward)


def test_it_tells_what_a_run_would_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data" / "medmnist").mkdir(parents=True)
    (tmp_path / "data" / "medmnist" / "breastmnist.npz").touch()
    assert main.run(asked(tmp_path, "--threads", "2")) == 0
    found = told(capsys)
    assert f"torch {torch.__version__}" in found["Versions"]
    assert found["Device"].startswith("cpu: ")
    assert found["Precision"] == "float32; --precision auto would be float32"
    assert found["CPU"] == "4 cores; 2 runs at a time with 2 threads each"
    assert "breastmnist" in found["Data"] and "pneumoniamnist" not in found["Data"]
    assert found["Results"].endswith("GiB free") and found["Ray"]
    assert found["Step"].startswith("float32 (there is no GPU) agrees with float64 on the CPU")
    assert "Warning:" not in found and "Wrong:" not in found
    assert not (tmp_path / "runs").exists()


def test_more_threads_than_cores_are_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(asked(tmp_path, "--threads", "2", "--jobs", "4")) == 0
    assert "4 runs at a time with 2 threads each use 8 cores" in told(capsys)["Warning:"]


@pytest.mark.parametrize("what", ["data", "runs"])
def test_a_file_in_the_place_of_a_folder_is_wrong(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / what).touch()
    assert main.run(asked(tmp_path)) == 1
    assert told(capsys)["Wrong:"].endswith(f"{tmp_path / what}: expected a directory, found a file")


def test_a_step_in_tf32_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = agreement.look(CPU)
    tf32(monkeypatch)
    wrong = agreement.look(CPU)
    assert right.right and not wrong.right
    assert right.gradient < agreement.LIMIT / 10 and wrong.gradient > 10 * agreement.LIMIT
    assert main.run(asked(tmp_path)) == 1
    found = told(capsys)
    assert "does NOT agree" in found["Step"]
    assert found["Wrong:"] == "a training step on cpu does not agree with the CPU"


def test_a_step_that_raises_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def raises(self: nn.Conv2d, *parts: Tensor) -> Tensor:
        raise RuntimeError("no kernel image is available for execution on the device\nmore")

    monkeypatch.setattr(nn.Conv2d, "_conv_forward", raises)
    assert main.run(asked(tmp_path)) == 1
    assert told(capsys)["Step"] == (
        "raised RuntimeError: no kernel image is available for execution on the device"
    )


def test_the_generator_is_left_as_it_was() -> None:
    before = torch.random.get_rng_state()
    agreement.look(CPU)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_each_card_has_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(name="A card", total_memory=80 * 2**30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: card)
    assert doctor._devices(torch.device("cuda")) == [
        f"cuda:{number}: A card, 80.0 GiB, compute capability 9.0" for number in range(2)
    ]
