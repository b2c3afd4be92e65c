"""What each command does; ``cli`` reads the command line and calls this."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import methods
from analysis import comparison, metrics, records, runs
from benchmarks.cli import arguments, sweep
from benchmarks.cli.arguments import UsageError
from benchmarks.data import facts, sources, splits
from benchmarks.data.catalogue import CATALOGUE
from benchmarks.data.download import DataError
from benchmarks.data.names import (
    Benchmark,
    check_seeds,
    names_in,
    parse_benchmark,
)
from benchmarks.data.splits import Protocol
from benchmarks.running import capacity, disk, local
from benchmarks.running.disk import Options
from benchmarks.studies import cells
from benchmarks.studies.cells import Cell, Row
from benchmarks.training import models, progress, trainer
from methods.base import Spec
from methods.naming import NamingError, split

FIGURES = (".png", ".pdf", ".svg")


def carry_out(command: Any) -> int:
    """Do what the command says; the exit code."""
    actions = {
        arguments.RunCommand: _run,
        arguments.CompareCommand: _compare,
        arguments.SweepCommand: sweep.carry_out,
        arguments.PredictCommand: _predict,
        arguments.ShowCommand: _show,
        arguments.DataCommand: _data,
    }
    return actions[type(command)](command)


def explain(error: Exception) -> tuple[int, str]:
    """Exit code and message of an error that a user can act on; an empty message for our own."""
    if isinstance(error, NamingError | UsageError):
        return arguments.USAGE, str(error)
    if isinstance(error, DataError | runs.Held | OSError):
        return arguments.FAILURE, local.said(error)
    return arguments.FAILURE, ""


def _options(command: Any) -> Options:
    if command.checkpoint_every < 1:
        raise UsageError(f"checkpoint-every: expected 1 or more, got {command.checkpoint_every}")
    if not command.memory_gib >= 0:
        raise UsageError(f"memory-gib: expected 0 or more, got {command.memory_gib}")
    return Options(
        device=_device(command.device),
        data_root=_root(command.data),
        allow_unverified=command.allow_unverified,
        memory_gib=command.memory_gib,
        checkpoint_every=command.checkpoint_every,
        save_model=getattr(command, "save_model", False),
        retry_failed=command.retry_failed,
        wait=not getattr(command, "no_wait", False),
    )


def _root(given: Path | None) -> Path:
    return (given or sources.default_root()).expanduser().absolute()


def _device(name: str) -> str:
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if name == "auto":
        return "cuda" if available["cuda"] else "mps" if available["mps"] else "cpu"
    if not available[name]:
        there = ", ".join(each for each, is_there in available.items() if is_there)
        raise UsageError(f"device: {name} is not available on this machine (there is: {there})")
    return name


def _protocol(setting: arguments.Setting) -> Protocol:
    try:
        return Protocol(
            name=setting.protocol, meta_fraction=setting.meta_fraction, crossfit=setting.crossfit
        )
    except ValueError as error:
        raise UsageError(str(error)) from error


class _Maker:
    """Makes the cells of one benchmark from what the command line says."""

    def __init__(self, setting: arguments.Setting, benchmark: Benchmark, options: Options) -> None:
        if setting.threads < 1:
            raise UsageError(f"threads: expected 1 or more, got {setting.threads}")
        self._setting, self.benchmark = setting, benchmark
        self._model = cells.model_name(setting.model, setting.width)
        self._training = cells.training_of(setting.preset, arguments.overrides(setting))
        self.protocol = _protocol(setting)
        arrays = splits.arrays_of(
            benchmark, options.data_root, options.allow_unverified, options.memory_gib
        )
        self._checksum, self.test_rows = arrays.checksum, len(arrays.test_y)
        self._arrays, self._told = arrays, False
        channels = 3 if benchmark.as_rgb or arrays.train_x.ndim == 4 else 1
        channels = arrays.train_x.shape[3] if arrays.train_x.ndim == 4 else channels
        size = arrays.train_x.shape[1:3]
        # A model that cannot be built here is a mistake in the command, not a failed run.
        try:
            models.build(self._model, Spec(2, len(arrays.classes), (channels, *size)))
        except NamingError:
            raise
        except (Exception, SystemExit) as error:  # one of the user's own may raise anything
            shape = " x ".join(map(str, (channels, *size)))
            raise UsageError(
                f"model: {self._model} cannot be built for {shape} images: "
                f"{type(error).__name__}: {error}"
            ) from error

    def tell(self) -> None:
        """Print once what the data hold: read before anything is trained on them."""
        if self._told:
            return
        self._told = True
        print("\n".join(facts.lines(self._arrays, self.benchmark, brief=True)), file=sys.stderr)

    def cell(self, row: Row, seed: int) -> Cell:
        """The cell of a row and a seed."""
        if seed < 0:
            raise UsageError(f"seed: expected 0 or more, got {seed}")
        setting = self._setting
        return cells.make_cell(
            row,
            self.benchmark,
            self._model,
            self._training,
            self.protocol,
            seed,
            checksum=self._checksum,
            threads=setting.threads,
            oracle_test=setting.oracle_test,
            preset=setting.preset,
        )


def _run(command: arguments.RunCommand) -> int:
    options = _options(command)
    benchmark = parse_benchmark(command.benchmark)
    row = cells.parse_row(command.method, _protocol(command))
    maker = _Maker(command, benchmark, options)
    cell = maker.cell(row, command.seed)
    root = command.out.expanduser().absolute()
    root.mkdir(parents=True, exist_ok=True)
    if runs.status_of(runs.folder_of(root, cell.run)).state == "new":
        maker.tell()
    try:
        status = disk.execute(
            cell.run, cell.recorded, root, options, benchmark, progress.for_terminal()
        )
    except trainer.Interrupted as stop:
        raise KeyboardInterrupt(str(stop)) from stop
    folder = runs.folder_of(root, cell.run)
    print(f"{cell.run.benchmark}, {cell.run.model}, {cell.run.row}, seed {cell.run.seed}")
    if status.state != "done":
        print(f"{status.state}: {status.reason}\n{_shown(folder)}")
        if command.debug and status.state == "failed":
            print((runs.read_result(folder) or {})["traceback"], file=sys.stderr)
        return arguments.FAILURE if status.state == "failed" else 0
    result = runs.with_nan(runs.read_result(folder))
    for when, scores in result["metrics"].items():
        for part, values in scores.items():
            text = ", ".join(_metric(name, value) for name, value in values.items())
            print(f"{when} epoch, {part}: {text}")
    if not result["selection"]["offered"]:
        print(f"selected epoch: not offered, {result['selection']['reason']}")
    cost = result["cost"]
    print(
        f"cost: {cost['charged_seconds']:.1f} s charged, {cost['seconds_per_epoch']:.2f} s an "
        f"epoch, {cost['passes_per_row']:.2f} passes a row, {cost['memory_mib']:.0f} MiB"
    )
    print(_shown(folder))
    return 0


def _metric(name: str, value: Any) -> str:
    text = [f"{each:.3f}" for each in value] if isinstance(value, list) else f"{value:.4f}"
    return f"{name} {' '.join(text) if isinstance(text, list) else text}"


def _shown(folder: Path) -> str:
    here = Path.cwd()
    return f"results: {folder.relative_to(here) if folder.is_relative_to(here) else folder}"


def _compare(command: arguments.CompareCommand) -> int:
    return compare(command)[0]


def compare(command: arguments.CompareCommand) -> tuple[int, list[comparison.Row]]:
    """Do and print the comparison; the exit code, and its rows with what has ended of them."""
    options = _options(command)
    root = command.out.expanduser().absolute()
    if command.records is not None and command.records.suffix != ".csv":
        raise UsageError(f"records: expected a name that ends in .csv, got {command.records}")
    if command.figure is not None and command.figure.suffix not in FIGURES:
        raise UsageError(f"figure: expected a name in .png, .pdf or .svg, got {command.figure}")
    names = split(command.methods)
    if not names:
        raise UsageError("methods: expected names separated by commas, got none")
    if command.seeds is not None and command.seeds < 1:
        raise UsageError(f"seeds: expected 1 or more, got {command.seeds}")
    if command.jobs is not None and command.jobs < 1:
        raise UsageError(f"jobs: expected 1 or more, got {command.jobs}")
    protocol = _protocol(command)
    rows, missing = _rows(names, protocol)
    benchmarks = [parse_benchmark(name) for name in names_in(command.benchmark)]
    if not benchmarks:
        raise UsageError("benchmark: expected a name, got none")
    if command.figure is not None and len(benchmarks) > 1:
        raise UsageError(f"figure: expected one benchmark, got {len(benchmarks)}")
    for path in filter(None, (command.records, command.figure)):
        path.parent.mkdir(parents=True, exist_ok=True)  # before hours of runs, not after them
    makers = [_Maker(command, benchmark, options) for benchmark in benchmarks]
    root.mkdir(parents=True, exist_ok=True)
    code, shown = 0, []
    kept: list[comparison.Row] = []
    for maker in makers:
        default = comparison.advised(maker.test_rows, maker.benchmark.folds)
        seeds = range(command.seeds if command.seeds is not None else default)
        check_seeds(maker.benchmark, seeds)
        asked = list(rows)
        if command.controls or protocol.name == "paper":  # there they are compulsory (design, 2)
            asked += cells.control_rows(rows, maker.benchmark, protocol)
        problems = _carry_out(maker, asked, seeds, root, options, command)
        if command.same is not None:
            plain = [maker.cell(row, seed) for row in asked if not row.dirty for seed in seeds]
            extra = cells.equal_budget_rows(plain, root, command.same)
            problems |= _carry_out(maker, extra, seeds, root, options, command)
            if not extra:
                print(
                    f"No row costs so much more {command.same} than its upstream that it makes an "
                    "epoch: none is added.",
                    file=sys.stderr,
                )
            asked += extra
        read = [_table_row(maker, row, seeds, root, problems) for row in asked]
        for place, row in missing:
            read.insert(place, row)
        shown.append(comparison.comparison(read, command.selection))
        kept += read
        failed = any(r.result["status"] == "failed" for row in read for r in row.records)
        code = arguments.FAILURE if problems or failed or missing else code
    print("\n\n\n".join(shown))
    print(f"\nResults: {root}")
    if command.records is not None:
        text = records.to_csv((row.name, row.records) for row in kept)
        runs.write_text(command.records, text)
        print(f"Records: {command.records}")
    if command.figure is not None and any(each.done for row in kept for each in row.records):
        from analysis.report import figures  # noqa: PLC0415 - loads matplotlib

        figures.draw_forest(kept, command.figure, command.selection)
        print(f"Figure: {command.figure}")
    return code, kept


def _rows(
    names: Sequence[str], protocol: Protocol
) -> tuple[list[Row], list[tuple[int, comparison.Row]]]:
    """The rows, and with their places those whose plug-in cannot be had, with the reason."""
    rows: list[Row] = []
    missing = []
    for place, name in enumerate(dict.fromkeys(names)):
        try:
            rows.append(cells.parse_row(name, protocol))
        except methods.Unavailable as reason:
            missing.append((place, comparison.Row(name, "none", (), (str(reason),))))
    if not rows:
        raise UsageError("; ".join(row.reasons[0] for _, row in missing))
    return list(dict.fromkeys(rows)), missing


def _carry_out(
    maker: _Maker,
    rows: Sequence[Row],
    seeds: range,
    root: Path,
    options: Options,
    command: arguments.CompareCommand,
) -> dict[str, str]:
    """Do what is not done; why runs could not be carried out, by id."""
    wanted = [maker.cell(row, seed) for seed in seeds for row in rows]
    states = ("new", "interrupted", *(("failed",) if options.retry_failed else ()))
    left = [
        cell for cell in wanted if runs.status_of(runs.folder_of(root, cell.run)).state in states
    ]
    if not left:
        return {}
    jobs = command.jobs
    if jobs is None:
        jobs = max(1, capacity.cores() // command.threads) if options.device == "cpu" else 1
    done = len(wanted) - len(left)
    if not done:  # who has runs of these data has read it
        maker.tell()
    print(f"Runs: {len(left)} to do, {done} done, {jobs} at a time", file=sys.stderr)
    reporter = local.Reporter(sum(cell.run.training.epochs for cell in left), len(left))
    try:
        outcomes = local.run_all(left, root, options, jobs, reporter)
    finally:
        reporter.close()
    return {
        name: outcome.text
        for name, outcome in outcomes.items()
        if isinstance(outcome, local.Problem)
    }


def _table_row(
    maker: _Maker, row: Row, seeds: range, root: Path, problems: dict[str, str]
) -> comparison.Row:
    wanted = [maker.cell(row, seed) for seed in seeds]
    name = wanted[0].run.row + (f"@{cells.DIRTY}" if row.dirty else "")
    upstream = cells.upstream_of(row.method)
    return comparison.row_of(name, upstream, [cell.run for cell in wanted], root, problems)


def _predict(command: arguments.PredictCommand) -> int:
    folder = command.run
    try:
        run, _ = runs.read_run(folder)
    except runs.UNREADABLE as error:
        raise UsageError(f"run: {folder} is not a run directory ({error})") from error
    result = runs.read_result(folder)
    if result is None or result["status"] != "done" or not (folder / "model.pt").exists():
        raise UsageError(
            f"run: {folder} holds no network; make it again with augbench run --save-model ..."
        )
    asked = parse_benchmark(command.data)
    if asked != Benchmark(name="npz", path=asked.path):
        raise UsageError(f"data: expected npz:FILE, got {command.data!r}")
    if command.out.suffix not in (".csv", ".npz"):
        raise UsageError(f"out: expected a name that ends in .csv or .npz, got {command.out}")
    images, labels = sources.images_only(Path(asked.path))
    classes = tuple(result["data"]["classes"])
    shape = tuple(result["data"]["shape"])
    rows = splits.rows_of(images, shape, len(classes), torch.device(_device(command.device)))
    spec = Spec(rows=len(rows), classes=len(classes), shape=shape)
    needs = {"auxiliary_norm"} if result.get("auxiliary_norm") else set()
    network = models.build(run.model, spec, needs).to(rows.y.device)
    weights = torch.load(folder / "model.pt", map_location=rows.y.device, weights_only=True)
    network.load_state_dict(weights)
    logits = trainer.logits_of(network, rows)
    kind = result["data"]["kind"]
    probabilities = metrics.probabilities(logits, kind)
    try:
        scores = metrics.evaluate(logits, labels, kind) if labels is not None else {}
    except ValueError as error:
        raise DataError(f"{command.data}: the labels do not fit the network: {error}") from error
    command.out.parent.mkdir(parents=True, exist_ok=True)
    if command.out.suffix == ".npz":
        runs.write_atomically(
            command.out,
            lambda file: np.savez_compressed(file, probabilities=probabilities, logits=logits),
        )
    else:
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow(["row", *classes])
        writer.writerows([number, *row] for number, row in enumerate(probabilities.tolist()))
        runs.write_text(command.out, text.getvalue())
    print(f"{len(logits)} rows predicted: {command.out}")
    if scores:
        print(", ".join(_metric(name, value) for name, value in scores.items()))
    return 0


def _show(command: arguments.ShowCommand) -> int:
    from benchmarks.cli import show  # noqa: PLC0415 - loads matplotlib

    for name, least in (("rows", 1), ("draws", 1), ("epochs", 0), ("seed", 0)):
        if getattr(command, name) < least:
            raise UsageError(f"{name}: expected {least} or more, got {getattr(command, name)}")
    if command.out.suffix not in FIGURES:
        raise UsageError(f"out: expected a name in .png, .pdf or .svg, got {command.out}")
    if not command.out.parent.is_dir():  # said before anything is trained
        raise UsageError(f"out: expected a name in a folder that exists, got {command.out}")
    try:
        show.show(
            parse_benchmark(command.benchmark),
            methods.canonical(command.method),
            models.canonical(command.model),
            _root(command.data),
            command.out,
            rows=command.rows,
            draws=command.draws,
            seed=command.seed,
            epochs=command.epochs,
            by=command.by,
            progress=progress.for_terminal(),
        )
    except splits.NotApplicable as reason:
        raise UsageError(f"method: {command.method} cannot be shown here: {reason}") from reason
    except trainer.TrainingFailed as reason:
        print(f"augbench: {reason}", file=sys.stderr)
        return arguments.FAILURE
    except trainer.Interrupted:  # unlike a run, nothing was written to go on from
        print("\naugbench: stopped in training; nothing is kept", file=sys.stderr)
        return arguments.INTERRUPTED
    print(command.out)
    return 0


def _data(command: arguments.DataCommand) -> int:
    root = _root(command.data)
    names = [name for text in command.names for name in names_in(text)]
    benchmarks = [parse_benchmark(text) for text in names or CATALOGUE]
    if command.action == "show":
        return _data_show(root, benchmarks if names else [])
    for text, benchmark in zip(names, benchmarks, strict=False):
        if benchmark.path:
            raise UsageError(f"names: expected an official data set, got {text!r}")
    if command.action == "list":
        return _data_list(root, [benchmark.name for benchmark in benchmarks])
    if command.action == "verify":
        return _data_verify(root, benchmarks, given=bool(names))
    if not names:
        raise UsageError("names: say which data sets to fetch, such as breastmnist")
    for text, benchmark in zip(names, benchmarks, strict=True):
        arrays = splits.arrays_of(benchmark, root)
        print(f"{text}: {len(arrays.train_y)} training rows, MD5 {arrays.checksum}")
    return 0


def _data_show(root: Path, benchmarks: Sequence[Benchmark]) -> int:
    """What each data set holds; nothing is downloaded for it."""
    if not benchmarks:
        raise UsageError("names: say which data sets to show, such as breastmnist or folder:DIR")
    for benchmark in benchmarks:
        print("\n".join(facts.lines(splits.arrays_of(benchmark, root, download=False), benchmark)))
    return 0


def _data_list(root: Path, names: Sequence[str]) -> int:
    print(f"Data folder: {root}")
    for name in names:
        entry = CATALOGUE[name]
        there = [f"{size}" for size in entry.sizes if None not in sources.locate(entry, size, root)]
        state = f"on disk: {', '.join(there)} px" if there else "not on disk"
        state = state if any(entry.files.values()) else "ships with scikit-learn"
        print(f"  {name:<16} {state:<24} {entry.licence}")
    return 0


def _data_verify(root: Path, benchmarks: Sequence[Benchmark], given: bool) -> int:
    seen = bad = 0
    for benchmark in benchmarks:
        entry = CATALOGUE[benchmark.name]
        for size in (benchmark.size,) if given else entry.sizes:
            for file, path, md5, right in sources.verify(entry, size, root):
                if path is None and not given:
                    continue
                state = "right" if right else "not found" if path is None else f"WRONG, MD5 {md5}"
                print(f"{file.name}: {state}{f' ({path})' if path else ''}, expected {file.md5}")
                seen, bad = seen + 1, bad + (not right)
    if not seen:
        print(f"Nothing to verify: no file of these data sets is in {root}.")
    return arguments.FAILURE if bad else 0
