"""The script that measures a GPU runs here on the CPU, with narrow networks."""

import json
import math
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import methods
from benchmarks.running.together import NotMeasured, Trainer
from benchmarks.speed import gpu, loop, streaming
from benchmarks.speed import methods as costs


def numbers(node: Any) -> list[float]:
    """All numbers below a node of the file but those that a CPU has not."""
    if isinstance(node, dict):
        return [
            each for name, value in node.items() if name != "used_mib" for each in numbers(value)
        ]
    if isinstance(node, list):
        return [each for value in node for each in numbers(value)]
    return [node] if isinstance(node, float) else []


def test_the_whole_script_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "speed.json"
    gpu.main(["--device", "cpu", "--tiny", "--json", str(file)])
    found = json.loads(file.read_text())
    assert "not_measured" not in file.read_text()
    what = ["harness", "plain loop", "harness", "harness, batch 2", "harness, batch 2, 2 runs"]
    assert [line["what"] for line in found["rates"]] == what
    assert all(line["images_per_second"] > 0 for line in found["rates"])
    assert found["rates"][0]["tflops"] > 0 and "share" not in found["rates"][0]
    assert [line["runs"] for line in found["packed"]] == [1, 2]
    assert [line["method"] for line in found["methods"]] == list(gpu.TINY)
    for line in found["methods"]:
        assert line["alone"]["runs"] == 1 and line["packed"]["runs"] == 2
        assert line["alone"]["ratio"] > 0 and line["packed"]["ratio"] > 0
    assert all(math.isfinite(each) for each in numbers(found))
    outer = {line["method"]: line["alone"]["phases"]["outer"] for line in found["methods"]}
    assert outer["autodo"] > 0
    shown = capsys.readouterr().out
    assert "randaugment: " in shown and "autodo: outer step " in shown


def test_what_no_time_is_left_for_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "speed.json"
    gpu.main(["--device", "cpu", "--tiny", "--seconds", "0", "--json", str(file)])
    lines = json.loads(file.read_text())
    assert {line["not_measured"] for line in lines["rates"] + lines["packed"]} == {"out of time"}
    shown = capsys.readouterr().out
    assert "not measured: out of time: harness of small_cnn(width=0.25)" in shown
    assert "randaugment alone" in shown and "autodo packed" in shown


def test_a_worker_that_fails_answers_the_next_question() -> None:
    measured = gpu.Measurements(gpu.Arguments(device="cpu", tiny=True))
    try:
        with pytest.raises(NotMeasured, match="unknown model"):
            measured.together(measured.setting(model="resnet19"), 1)
        first = measured.crowd.workers[0].process.pid
        (rate,) = measured.together(measured.setting(), 1)
        assert rate.images_per_second > 0 and measured.crowd.workers[0].process.pid == first
        measured.deadline = time.monotonic() + 2 * measured.span + 0.05
        with pytest.raises(NotMeasured, match="out of time"):
            measured.together(measured.setting(model="resnet50", batches=1000), 1)
        assert measured.crowd.workers == []
    finally:
        measured.crowd.close()


NO_STEPS = {"boosting", "logistic"}
"""They fit a classifier of scikit-learn once."""


def test_every_method_and_preset_is_measured() -> None:
    texts = loop.every_method()
    assert {text.partition("(")[0] for text in texts} == set(methods.BUILTIN) - {"wrap", *NO_STEPS}
    presets = {
        f"{name}(preset={preset})"
        for name in methods.BUILTIN
        for preset in methods.summary(name).presets[1:]
    }
    assert presets <= set(texts) and len(texts) == len(set(texts))


def test_costs_of_methods(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "costs.json"
    given = ["--model", "small_cnn(width=0.25)", "--batch-size", "8", "--steps", "8"]
    given += ["--repeats", "1", "--json", str(file)]
    costs.main([*given, "--methods", "saflex(refresh=4)", "norm_noise(upstream=none)"])
    plain, saflex = json.loads(file.read_text())["costs"]
    assert [plain["method"], saflex["method"]] == ["none", "saflex(refresh=4)"]
    assert [plain[name] for name in ("ratio", "forward", "backward", "trained")] == [1, 1, 1, 1]
    # Eight steps have two meta gradients, and a tangent each, which counts as a backward pass.
    assert saflex["forward"] == 2 + 2 / 8 and saflex["backward"] == 2 + 2 / 8
    assert saflex["trained"] == 1 and saflex["ratio"] > 0 and saflex["declared"] == 3.0
    assert "not measured: norm_noise: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("card", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("Tesla T4", 65.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA H200", 989.5),
        ("NVIDIA H100 NVL", 0.0),
        ("NVIDIA H200 NVL", 0.0),
        ("Tesla V100-SXM2-16GB", 125.0),
        ("Tesla V100-PCIE-32GB", 112.0),
        ("NVIDIA A10G", 0.0),
        ("a card of next year", 0.0),
    ],
)
def test_the_peak_is_that_of_the_card(card: str, peak: float) -> None:
    assert gpu.peak(card) == 1e12 * peak


def test_a_card_is_measured_in_its_own_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "automatic", lambda: "float16")
    setting = gpu.Measurements(gpu.Arguments(device="cuda")).setting()
    assert setting.precision == "float16" and setting.form == "float16, channels_last"
    small = {"model": "small_cnn(width=0.25)", "batch_size": 8, "batches": 8}
    for plain in (False, True):
        trainer = Trainer("cpu")
        trainer.prepare(partial(gpu.Plain if plain else gpu.Harness, replace(setting, **small)))
        assert trainer.measure(0.0, 0.0).images_per_second > 0


def test_the_memory_of_streaming_is_that_of_listing_decoding_and_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = streaming.Arguments(images=60, edge=16, size=24, batch_size=16, memory=True)
    for split in ("train", "test"):
        streaming.images(tmp_path / "set" / split, arguments.images, arguments.edge)
    streaming.trained(arguments, tmp_path)
    shown = capsys.readouterr().out
    (peak,) = [line for line in shown.splitlines() if line.startswith("peak resident")]
    start, decoded, trained = (float(each.replace(",", "")) for each in peak.split()[2:])
    # The run resets the peak, so in a process that has held more before it may be the lower one.
    assert 0 < start <= decoded and trained > 0
    assert "listed and decoded" in shown and "60 JPEGs of 16 pixels, used at 24" in shown
