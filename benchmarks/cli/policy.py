"""``augbench policy``: what a run learned, as a policy file and as code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

import methods
from analysis import runs
from analysis.runs import Run
from benchmarks.cli import arguments
from benchmarks.cli.arguments import UsageError
from benchmarks.cli.common import benchmark_of, root_of
from benchmarks.data.splits import Protocol, arrays_of, make_splits
from benchmarks.training.evaluation import strata_of
from methods import own
from methods.autoaugment import written
from methods.base import Chain, Method
from methods.controls import Frozen, ShuffledWeights
from methods.naming import Call, Links, call_of, parse, render
from methods.pasted import code
from methods.policy_net import ShuffledPolicies

OF_OPERATIONS = ("probability", "magnitude")
"""The arrays of learned.npz that are a policy."""
OF_LEARNING = (Frozen, ShuffledPolicies, ShuffledWeights)
"""Controls of what their upstream learns; they refuse autoaugment, which learns nothing."""


@own.kept()
def carry_out(command: arguments.PolicyCommand) -> int:
    """Write the policy file, and print how to use it; return the exit code."""
    folder, out = command.run, command.out
    if out is None and not command.torchvision:
        out = Path("policy.yaml")
    if out is not None:
        _check_place(out)
    try:
        run, recorded = runs.read_run(folder)
    except runs.UNREADABLE as error:
        raise UsageError(f"run: {folder} is not a run directory ({error})") from error
    result = runs.read_result(folder)
    if result is None or result["status"] != "done":
        raise UsageError(f"run: expected a run that is done, {folder} is not")
    if len(result["data"]["shape"]) == 1:
        raise UsageError(
            f"run: {run.row} on {run.benchmark} has no policy: a policy is made of operations on "
            "images"
        )
    _check_files(run)
    learned, arrays, how = {}, {}, ""
    if (folder / "learned.npz").exists():
        arrays = runs.read_arrays(folder / "learned.npz")
        learned = {name: arrays[name] for name in OF_OPERATIONS if name in arrays}
    classes = tuple(result["data"]["classes"])
    if any(len(each) > 1 for each in learned.values()):
        groups = _groups(command, run, recorded, len(classes), len(next(iter(learned.values()))))
        if "seen" in arrays:
            groups = visited(groups, arrays["seen"])
        learned = {
            name: np.stack([each[rows].mean(axis=0, dtype=np.float64) for rows in groups])
            for name, each in learned.items()
        }
        how = "mean over training rows" if len(groups) == 1 else "mean over each class's rows"
    method = methods.build(run.method)
    part, content = _found(method, learned, run.row)
    head = [f"{run.row} on {run.benchmark}, seed {run.seed}, run {run.id}{how and f'; {how}'}"]
    if "classes" in content:
        head.append(f"classes, from 0: {', '.join(classes)}")
    if out is not None:
        _write(out, written(content, head))
    if command.torchvision:
        print(code(content), end="")
    elif out is not None:
        print(f"{out}: {_told(content)}{how and f', {how}'}")
        print(f"Use it: {instead(run.method, method, part, out)}")
    return 0


def _check_place(out: Path) -> None:
    if out.suffix not in own.YAML:
        raise UsageError(f"out: expected a name ending in .yaml or .yml, got {out}")
    if not out.parent.is_dir():
        raise UsageError(f"out: expected a name in a folder that exists, got {out}")


def _write(out: Path, text: str) -> None:
    """Write the file, unless another one is there: it may be the only copy of a policy."""
    if out.exists() and not (out.is_file() and out.read_bytes() == text.encode()):
        raise UsageError(
            f"out: {out} exists with other content; give another name with --out, or delete it"
        )
    runs.write_text(out, text)


def _check_files(run: Run) -> None:
    """Refuse a run whose policy files are others now: it was not trained with what they say."""
    names = [name for name in methods.own_names(run.method) if name.endswith(own.YAML)]
    now = methods.versions(run.method) if names else {}
    for name in names:
        if now[name] != run.versions.get(name):
            raise UsageError(
                f"run: {name} has changed since the run, or is another file in {Path.cwd()}; "
                "expected what the run was trained with: restore it, or train again"
            )


def _groups(
    command: arguments.PolicyCommand,
    run: Run,
    recorded: dict[str, Any],
    classes: int,
    count: int,
) -> list[np.ndarray]:
    """Which of ``count`` rows to average over, for each policy."""
    everything = np.arange(count)
    if command.by == "all":
        return [everything]
    if count == classes:  # learned by class
        return list(everything[:, None])
    benchmark = benchmark_of(run, recorded)
    arrays = arrays_of(benchmark, root_of(command.data))
    if arrays.checksum != run.data:
        raise UsageError(f"run: {run.benchmark} has other data now than those of the run")
    protocol = Protocol(name=run.protocol, meta_fraction=run.meta_fraction, crossfit=run.crossfit)
    splits = make_splits(
        arrays,
        benchmark,
        protocol,
        needs_meta="meta" in methods.build(run.method).requires(),
        seed=run.seed,
        device=torch.device("cpu"),
        control=run.control,
    )
    labels = strata_of(splits.train, splits)
    groups = [np.flatnonzero(labels == number) for number in range(classes)]
    return [rows if len(rows) else everything for rows in groups]


def visited(groups: list[np.ndarray], seen: np.ndarray) -> list[np.ndarray]:
    """The rows of each group that have been visited; all if none has, as they are at the start."""
    return [rows[seen[rows] > 0] if (seen[rows] > 0).any() else rows for rows in groups]


def _found(
    method: Method, learned: dict[str, np.ndarray], row: str
) -> tuple[Method, dict[str, Any]]:
    """The part of a method that has a policy, and the policy; what learned comes first."""
    parts = list(method.parts())
    learning = [part for part in parts if part.operations and learned]
    found = [(part, part.as_policy(learned)) for part in learning or parts]
    found = [(part, content) for part, content in found if content]
    if len(found) == 1:
        return found[0]
    if not found:
        raise UsageError(
            f"run: {row} has no policy: expected a method that learned one, such as autodo, or "
            "randaugment, trivialaugment or autoaugment"
        )
    names = " and ".join(type(part).__name__ for part, _ in found)
    raise UsageError(f"run: {row} has several policies, of {names}; expected a run with one")


def instead(text: str, method: Method, part: Method, out: Path) -> str:
    """How to train with the file in the place of the part that has the policy."""
    given = {"policy": str(out)}
    if getattr(part, "interpolation", "nearest") != "nearest":
        given["interpolation"] = "bilinear"
    use = call_of("autoaugment", given)
    expression = parse(text)
    replaced = _replaced(expression, method, part, use)
    if replaced == expression:  # the part is made within code of the user's
        return f"{render(use)} in the place of {type(part).__name__} in {text}"
    return f"--methods {_quoted(render(replaced))}"


def _replaced(
    expression: Call | Links, method: Method | None, part: Method, use: Call
) -> Call | Links:
    """The expression of ``method`` with ``use`` in the place of ``part``, after its upstream."""
    if isinstance(expression, Links):
        inside = method.links if isinstance(method, Chain) else ()
        links = [link for link in inside if isinstance(link, Method)]
        if len(links) != len(expression.calls):
            return expression
        pairs = zip(expression.calls, links, strict=True)
        return _joined(*(_replaced(call, link, part, use) for call, link in pairs))
    arguments = dict(expression.arguments)
    upstream = arguments.get("upstream")
    inner = [upstream] if isinstance(upstream, Call | Links) else []
    if method is part:
        return _joined(*inner, use)
    if method is None or not inner:
        return expression
    replaced = _replaced(inner[0], method.upstream, part, use)
    if isinstance(method, OF_LEARNING) and method.upstream is part:
        return replaced
    return Call(expression.name, tuple((arguments | {"upstream": replaced}).items()))


def _joined(*expressions: Call | Links) -> Call | Links:
    calls: list[Call] = []
    for each in expressions:
        calls += each.calls if isinstance(each, Links) else [each]
    return calls[0] if len(calls) == 1 else Links(tuple(calls))


def _quoted(text: str) -> str:
    return f'"{text}"'


def _told(content: dict[str, Any]) -> str:
    """What a policy file has, in words."""
    if "classes" in content:
        return f"a policy for each of {len(content['classes'])} classes"
    count = len(content["sub_policies"])
    return f"a policy of {count} sub-polic{'y' if count == 1 else 'ies'}"
