"""What a GPU does, in one command of three minutes: python -m benchmarks.speed.gpu --json FILE"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from tabulate import tabulate
from torch.amp import GradScaler
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from analysis import runs
from benchmarks.running import mps
from benchmarks.running.together import LATE, NotMeasured, Rate, Together, Trainer
from benchmarks.speed.loop import Loop, every_method, random_splits
from benchmarks.training import models
from benchmarks.training.machine import describe_device, installed_versions
from benchmarks.training.precision import LOW, Precision, automatic
from methods.base import Spec

PEAKS = {
    "H200": 989.5,
    "H100 PCIe": 756.5,
    "H100 HBM3": 989.5,
    "A100": 312.0,
    "A10": 125.0,
    "L40S": 362.0,
    "L4": 121.0,
    "V100 SXM2": 125.0,
    "V100 PCIE": 112.0,
    "T4": 65.0,
}
"""Dense TFLOP/s of the tensor cores in bfloat16, or float16 where a card lacks it (V100, T4).

By NVIDIA's data sheets (half of what they print "with sparsity"). HBM3 is in the name of the SXM
form of the H100.
"""
CLASSES = 2
EPOCHS = 100
"""Of a run; the one in its middle is measured, after what warms up first."""
LOADED = ["benchmarks.speed.loop", "torch.utils.flop_counter"]
"""What all workers need is imported once."""
AIMS = """\
Aims on an H100 or H200: harness at most 1.05 times the plain loop; one run at least 20,000
images/s; a packed GPU at least 60,000 (goal 95,000); RandAugment at most 5 % of a step and at least
500,000 images/s."""


@dataclass
class Arguments:
    """Images of random pixels, 28x28x3; their content does not matter here."""

    device: Literal["cuda", "cpu"] = "cuda"
    """where network and rows are"""
    json: Path | None = None
    """file to write as well"""
    seconds: float = 170.0
    """for everything; what does not fit is "not measured: out of time", the last first"""
    tiny: bool = False
    """narrow networks, two processes and four methods, to try the script itself"""


@dataclass(frozen=True)
class Setting:
    """What a worker trains."""

    model: str = "resnet18"
    method: str = "none"
    batch_size: int = 128
    precision: Precision = "bfloat16"
    channels_last: bool = True
    compile: bool = False
    graphs: bool = False
    """CUDA graphs, in a compiled network: a step is one launch for each of its passes"""
    plain: bool = False
    """a loop as one would write it, without the harness"""
    batches: int = 24
    """steps of an epoch; a quarter as many hold the meta rows"""

    @property
    def form(self) -> str:
        """Precision, memory format and compilation in words."""
        parts = [self.precision, "channels_last" * self.channels_last, "compiled" * self.compile]
        return ", ".join(filter(None, [*parts, "CUDA graphs" * self.graphs]))


class Harness(Loop):
    """The trainer's own steps."""

    def __init__(self, setting: Setting, device: str) -> None:
        self.rows, self.batches = setting.batch_size, setting.batches
        if setting.compile:
            # What mode="reduce-overhead" of torch.compile sets; this process measures, no more.
            from torch._inductor import config  # noqa: PLC0415 - takes seconds

            config.triton.cudagraphs = setting.graphs
        rows, meta = setting.batch_size, setting.batches // 4
        count, share = (setting.batches + meta) * rows, meta / (setting.batches + meta)
        super().__init__(
            setting.method,
            setting.model,
            random_splits(count, classes=CLASSES, meta_fraction=share, device=device),
            rows=rows,
            steps=setting.batches,
            epochs=EPOCHS,
            device=device,
            precision=setting.precision,
            channels_last=setting.channels_last,
            compile=setting.compile,
        )

    def epoch(self) -> None:
        """The method's own phase, then every step; always the same epoch."""
        self.ctx.epoch = EPOCHS // 2
        self.ctx.step = self.ctx.epoch * len(self.order)
        with self.ctx.charged("begin_epoch"):
            self.method.begin_epoch(self.ctx)
        self.train(self.order)

    def phases(self) -> dict[str, float]:
        """Charged seconds by phase since the last call."""
        found = self.ctx.clock.take()
        self.ctx.forget()
        return found


class Plain:
    """The same steps without the harness: Adam on rows that lie on the device."""

    def __init__(self, setting: Setting, device: str) -> None:
        self.rows, self.batches = setting.batch_size, setting.batches
        self.place, self.setting = torch.device(device), setting
        self.format = torch.channels_last if setting.channels_last else torch.contiguous_format
        torch.manual_seed(0)
        count = setting.batches * setting.batch_size
        model = models.build(setting.model, Spec(count, CLASSES, (3, 28, 28))).to(self.place)
        self.model = model.to(memory_format=self.format)  # type: ignore[call-overload]
        self.optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        self.scaler = GradScaler(self.place.type, enabled=setting.precision == "float16")
        self.x = torch.randint(256, (count, 3, 28, 28), dtype=torch.uint8, device=self.place)
        self.y = torch.arange(count, device=self.place) % CLASSES

    def epoch(self) -> None:
        """A pass over the rows in a new order."""
        low = LOW.get(self.setting.precision)
        order = torch.randperm(len(self.x), device=self.place)
        for index in order.split(self.setting.batch_size):
            x = (self.x[index].float() / 255).contiguous(memory_format=self.format)
            with torch.autocast(self.place.type, low, enabled=low is not None):
                loss = F.cross_entropy(self.model(x).float(), self.y[index])
            self.optimizer.zero_grad()
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()

    def phases(self) -> dict[str, float]:
        """None: it has no clock."""
        if self.place.type == "cuda":
            torch.cuda.synchronize()
        return {}


class Counted(Trainer):
    """What a worker does here; it also counts operations."""

    def flops(self) -> float:
        """Floating-point operations of a training step for each image."""
        assert self.steps is not None
        with FlopCounterMode(display=False) as counter:
            self.steps.epoch()
        self.steps.phases()
        return counter.get_total_flops() / (self.steps.batches * self.steps.rows)


class Measurements:
    """All that is measured within the time that is given, and what was not."""

    def __init__(self, arguments: Arguments) -> None:
        self.arguments, self.device = arguments, arguments.device
        self.deadline = time.monotonic() + arguments.seconds
        self.span = 0.1 if arguments.tiny else 1.0
        self.crowd = Together(self.device, trainer=Counted, loaded=LOADED)
        tiny = arguments.tiny
        self.counts = (1, 2) if tiny else (1, 2, 4, 8, 16)
        # On a CPU, where the script is only tried, the arithmetic of most GPUs.
        self.precision: Precision = automatic() if self.device == "cuda" else "bfloat16"
        self.size: dict[str, Any] = {"batch_size": 8, "batches": 8} if tiny else {}
        self.model = "small_cnn(width=0.25)" if tiny else "resnet18"
        self.found: dict[str, list[dict[str, Any]]] = {"rates": [], "packed": [], "methods": []}
        self.flops: dict[str, float] = {}

    def setting(self, **more: Any) -> Setting:
        """The setting that is measured unless something else is said."""
        return Setting(**{"model": self.model, "precision": self.precision, **self.size, **more})

    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    def together(self, setting: Setting, count: int) -> list[Rate]:
        """So many processes at once.

        Raises:
            NotMeasured: one of them failed, or the time is over.
        """
        if self.left() < 2 * self.span:
            raise NotMeasured(LATE)
        make = partial(Plain if setting.plain else Harness, setting)
        return self.crowd.rates(make, count, self.span, self.deadline)

    def count_flops(self, setting: Setting) -> None:
        """Of a model whose setting the first worker has just been measured with."""
        self.crowd.workers[0].ask("flops")
        self.flops[setting.model] = self.crowd.workers[0].answer(self.deadline)

    # --- what is measured, the most important first -----------------------------------------------

    def rate(self, name: str, setting: Setting, count: int = 1) -> None:
        """A plain step, of one run or of so many together."""
        if setting.batch_size != self.setting().batch_size:
            name += f", batch {setting.batch_size}"
        name += f", {count} runs" if count > 1 else ""
        line: dict[str, Any] = {"what": name, "form": setting.form, **asdict(setting)}
        self.found["rates"].append(line)
        try:
            rates = self.together(setting, count)
            if not setting.plain and not setting.compile and setting.model not in self.flops:
                self.count_flops(setting)
        except NotMeasured as reason:
            line["not_measured"] = str(reason)
            return
        total = sum(each.images_per_second for each in rates)
        line |= asdict(rates[0]) | {"images_per_second": total} | self.share(setting, total)

    def share(self, setting: Setting, images_per_second: float) -> dict[str, float]:
        """Achieved TFLOP/s, and their share of the card's peak where it is known."""
        if setting.model not in self.flops:
            return {}
        reached = images_per_second * self.flops[setting.model] / 1e12
        known = peak(describe_device(torch.device(self.device))["name"])
        low = setting.precision != "float32"
        return {"tflops": reached} | ({"share": reached / known} if known and low else {})

    def pack(self, sharing: str) -> None:
        """1, 2, 4 ... runs together; ``sharing``: how they share the card."""
        for count in self.counts:
            line: dict[str, Any] = {"runs": count, "sharing": sharing}
            self.found["packed"].append(line)
            try:
                rates = self.together(self.setting(), count)
            except NotMeasured as reason:
                line["not_measured"] = str(reason)
                continue
            total = sum(each.images_per_second for each in rates)
            line["images_per_second"] = total
            line["memory_mib"] = max(each.memory_mib for each in rates)
            line["used_mib"] = rates[0].used_mib
            line |= self.share(self.setting(), total)

    def pack_under_mps(self) -> None:
        """The same with a control daemon of our own."""
        try:
            with mps.started() as variables:
                self.crowd.close()
                self.crowd.variables = variables
                self.pack("MPS")
                self.crowd.close()
        except mps.NoMPS as reason:
            self.found["packed"].append({"sharing": "MPS", "not_measured": str(reason)})
        self.crowd.variables = {}

    def method(self, name: str, count: int) -> None:
        """A method's step, ``count`` runs together."""
        lines = self.found["methods"]
        if name not in (each["method"] for each in lines):
            lines.append({"method": name})
        line = next(each for each in lines if each["method"] == name)
        kind = "alone" if count == 1 else "packed"
        try:
            rates = self.together(self.setting(method=name), count)
        except NotMeasured as reason:
            line[kind] = {"not_measured": str(reason)}
            return
        charged = statistics.median(sum(each.phases.values()) for each in rates)
        line[kind] = {
            "runs": count,
            "images_per_second": sum(each.images_per_second for each in rates),
            "charged_step": charged,
            "memory_mib": max(each.memory_mib for each in rates),
            "phases": rates[0].phases,
        }
        plain = next(each.get(kind, {}) for each in lines if each["method"] == "none")
        if "charged_step" in plain:
            line[kind]["ratio"] = charged / plain["charged_step"]

    def best(self) -> int:
        """How many runs together trained the most images."""
        done = [each for each in self.found["packed"] if "images_per_second" in each]
        together = [each for each in done if each["runs"] > 1]
        most = max(together, key=lambda each: each["images_per_second"], default=None)
        return most["runs"] if most else self.counts[1]

    def everything(self, report: Callable[[], None]) -> None:
        """All of it; ``report`` is called after each part."""
        names = TINY if self.arguments.tiny else every_method()
        eager = {"precision": "float32", "channels_last": False}
        parts: list[Callable[[], None]] = [
            lambda: self.rate("harness", self.setting()),
            lambda: self.rate("plain loop", self.setting(plain=True)),
            lambda: self.rate("harness", self.setting(**eager)),
            lambda: self.pack("time-sliced" if self.device == "cuda" else "cores"),
            *(lambda name=name: self.method(name, 1) for name in names),
        ]
        if self.device == "cuda":
            parts.append(self.pack_under_mps)
        if not self.arguments.tiny:
            parts += [
                lambda: self.rate("harness", self.setting(model="resnet50")),
                lambda: self.rate("harness", self.setting(model="resnet50", **eager)),
            ]
        small = {"batch_size": self.setting().batch_size // 4}
        parts += [
            lambda: self.rate("harness", self.setting(**small)),
            lambda: self.rate("harness", self.setting(**small), self.best()),
        ]
        parts += [lambda name=name: self.method(name, self.best()) for name in names]
        if not self.arguments.tiny:  # to compile takes a minute
            graphs = {"compile": True, "graphs": True}
            parts += [
                lambda: self.rate("harness", self.setting(compile=True)),
                lambda: self.rate("harness", self.setting(**small, **graphs)),
                lambda: self.rate("harness", self.setting(**graphs)),
                lambda: self.rate("harness", self.setting(model="resnet50", compile=True)),
            ]
        for part in parts:
            part()
            report()


TINY = ("none", "randaugment", "saflex(preset=stable)", "autodo")


def peak(card: str) -> float:
    """FLOP/s of the tensor cores; 0 of a card that is not in the table."""
    words = set(card.replace("-", " ").split())
    if "NVL" in words:  # slower than the SXM form of the same name
        return 0.0
    found = (1e12 * value for name, value in PEAKS.items() if words.issuperset(name.split()))
    return next(found, 0.0)


# --- what is printed ------------------------------------------------------------------------------


def number(line: Mapping[str, Any], name: str, form: str, factor: float = 1.0) -> str:
    """A value of a line; empty where it has none."""
    value = line.get(name, math.nan)
    return "" if math.isnan(value) else format(factor * value, form)


def tables(found: Mapping[str, Sequence[dict[str, Any]]]) -> list[str]:
    """Plain steps, runs together, methods."""
    plain = next((e for e in found["rates"] if e["plain"]), {}).get("step_seconds")
    body = [
        [
            line["what"],
            line["model"],
            line["form"],
            number(line, "images_per_second", ",.0f"),
            number(line, "step_seconds", ".2f", 1000),
            f"{line['step_seconds'] / plain:.3f}"
            if plain and "step_seconds" in line and place == 0
            else "",
            number(line, "tflops", ".3g"),
            number(line, "share", ".1f", 100),
            number(line, "memory_mib", ",.0f"),
        ]
        for place, line in enumerate(found["rates"])
    ]
    heads = ["plain step", "network", "form", "images/s", "ms a step", "to the plain loop"]
    heads += ["TFLOP/s", "% of peak", "MiB"]
    told = [table(heads, body)]
    body = [
        [
            line["sharing"],
            str(line.get("runs", "")),
            number(line, "images_per_second", ",.0f"),
            number(line, "tflops", ".3g"),
            number(line, "share", ".1f", 100),
            number(line, "memory_mib", ",.0f"),
            number(line, "used_mib", ",.0f"),
        ]
        for line in found["packed"]
    ]
    heads = ["sharing", "runs", "images/s", "TFLOP/s", "% of peak", "MiB a run", "MiB of the GPU"]
    told.append(table(heads, body))
    body = []
    for line in found["methods"]:
        row = [line["method"]]
        for kind in ("alone", "packed"):
            one = line.get(kind, {})
            row += [number(one, "ratio", ".2f"), number(one, "images_per_second", ",.0f")]
        row.append(number(line.get("alone", {}), "memory_mib", ",.0f"))
        body.append(row)
    heads = ["method", "ratio alone", "images/s", "ratio packed", "images/s", "MiB alone"]
    return [*told, table(heads, body)]


def missing(found: Mapping[str, Sequence[dict[str, Any]]]) -> list[str]:
    """A line for each reason for which something was not measured."""
    reasons: dict[str, list[str]] = {}
    for line in found["rates"]:
        name = f"{line['what']} of {line['model']} ({line['form']})"
        reasons.setdefault(line.get("not_measured", ""), []).append(name)
    for line in found["packed"]:
        name = f"{line.get('runs', 'any')} run(s) together ({line['sharing']})"
        reasons.setdefault(line.get("not_measured", ""), []).append(name)
    for line in found["methods"]:
        for kind in ("alone", "packed"):
            reason = line.get(kind, {}).get("not_measured", "")
            reasons.setdefault(reason, []).append(f"{line['method']} {kind}")
    reasons.pop("", None)
    return [f"not measured: {reason}: {'; '.join(names)}" for reason, names in reasons.items()]


def notes(found: Mapping[str, Sequence[dict[str, Any]]]) -> list[str]:
    """What the phases of RandAugment and AutoDO say, by the run's clock."""
    alone = {line["method"]: line.get("alone", {}).get("phases", {}) for line in found["methods"]}
    told, whole = [], sum(alone.get("none", {}).values())
    given = alone.get("randaugment", {})
    if given:
        own, step = given["augment"], sum(given.values())
        batch = found["rates"][0]["batch_size"]
        told.append(
            f"randaugment: {100 * own / step:.1f} % of its step, {batch / own:,.0f} images/s"
        )
    for name, phases in alone.items():
        if name.startswith("autodo") and phases and whole:
            outer, inner = phases["outer"], sum(phases.values()) - phases["outer"]
            told.append(
                f"{name}: outer step {1000 * outer:.2f} ms, {outer / whole:.2f} of a plain step; "
                f"inner step {inner / whole:.2f}"
            )
    return told


def table(heads: list[str], body: list[list[str]]) -> str:
    """Words to the left, numbers to the right."""
    words = sum(head in ("plain step", "network", "form", "sharing", "method") for head in heads)
    aligned = ("left",) * words + ("right",) * (len(heads) - words)
    return tabulate(body, headers=heads, colalign=aligned if body else None, disable_numparse=True)


def main(given: Sequence[str] | None = None) -> None:
    """Measure, print the tables, write the file."""
    arguments = tyro.cli(Arguments, description=__doc__, args=given)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA GPU was found; --device cpu --tiny tries the script itself")
    measured = Measurements(arguments)
    head = {
        "date": time.strftime("%Y-%m-%d"),
        "device": describe_device(torch.device(arguments.device)),
        "cores": os.cpu_count(),
        "versions": installed_versions(),
        "tiny": arguments.tiny,
    }

    def report() -> None:
        if arguments.json is not None:
            runs.write_text(arguments.json, runs.to_json({**head, **measured.found}) + "\n")

    try:
        measured.everything(report)
    finally:
        measured.crowd.close()
    print(
        f"{head['date']}, {head['device']['name']}, {head['cores']} cores, torch "
        f"{torch.__version__}, 28x28x3, batch {measured.setting().batch_size}, Adam"
    )
    print("\n\n".join(tables(measured.found)))
    print("\n".join(["", *notes(measured.found), *missing(measured.found), AIMS]))


if __name__ == "__main__":
    main()
