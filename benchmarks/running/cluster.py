"""The runs of a study on Ray Tune: the only module that imports ray.

Ray says which worker does what; what is done stands on disk, and nowhere else. So every run is a
trial of its own that reads its directory, and Tune's own checkpoints and restoring are not used.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
import os
import pickle
import secrets
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import augbench
from analysis import runs
from analysis.question import STUDIES
from analysis.runs import Status
from benchmarks.data import sources, splits
from benchmarks.data.catalogue import CATALOGUE
from benchmarks.data.download import DataError
from benchmarks.running import capacity, cleanup, disk
from benchmarks.running.capacity import Cluster
from benchmarks.running.codes import FAILURE
from benchmarks.running.disk import Options
from benchmarks.running.display import Board
from benchmarks.running.local import (
    GOES_ON,
    GRACE_SECONDS,
    Problem,
    said,
)
from benchmarks.studies import search
from benchmarks.studies.cells import Cell
from benchmarks.studies.costs import costs_in
from benchmarks.studies.ledger import UNFINISHED, Ledger
from benchmarks.studies.plan import label
from benchmarks.studies.rounds import Job, Round
from benchmarks.studies.schema import Study, StudyError
from benchmarks.studies.search import Ladder
from benchmarks.training.errors import Interrupted, first_line
from benchmarks.training.progress import Gone, Silent

REPORT_SECONDS = 1.0
"""Between two reports of a run: each waits for the driver."""
LOOK_SECONDS = 0.3
"""Between two looks at the flag that ends the runs."""
GO, STOP = "go", "stop"
CLIENT = "ray://"
LOOPBACK = "127.0.0.1"
OBJECT_STORE_BYTES = 128 << 20
"""What workers share is a list of runs."""
LONGEST_FOLDER = 20
"""Letters of the folder of temporary files: the path of a Unix socket has at most 107."""
LOST_MACHINES = 10
"""How often a run may lose its machine before it counts as failed."""
LOST_MACHINE = (
    "node died",
    "node failure",
    "node was terminated",
    "node is dead",
    "nodediederror",
    "temporarily unavailable",
)
"""How Ray says that a worker went with its machine, or cannot be reached any more."""
SETTINGS = {
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # uv run: would pack the current folder, data and all
    "RAY_worker_niceness": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",
    "TUNE_WARN_THRESHOLD_S": "1000000",
}


@dataclass(frozen=True)
class Place:
    """What a worker must know beside its job; none of it changes a number."""

    jobs: tuple[Job, ...]
    root: Path
    options: Options
    flag: Path


@dataclass(frozen=True)
class _Task:
    """A round as the driver of Tune needs it."""

    jobs: tuple[Job, ...]
    ladder: Ladder | None
    ledger: Ledger
    options: Options
    study: Study
    cluster: Cluster
    flag: Path
    folder: Path
    """for Tune's own files"""


class Sweep:
    """A Ray that carries out rounds of jobs, from ``opened`` on."""

    def __init__(self, ray: ModuleType, cluster: Cluster, flag: Path, folder: Path) -> None:
        self.cluster = cluster
        self._ray, self._flag, self._folder = ray, flag, folder
        self._stopping = False

    def carry_out(
        self, work: Round, ledger: Ledger, options: Options, study: Study
    ) -> dict[str, Status | Problem]:
        """Do the jobs that are left; the outcome of each run by its id.

        Raises:
            KeyboardInterrupt: after SIGINT or SIGTERM, when the workers have stopped.
        """
        jobs = tuple(job for job in work.jobs if any(ledger.to_do(cell) for cell in job.cells))
        if not jobs:
            return {}
        folder = self._folder / f"round-{secrets.token_hex(4)}"
        task = _Task(jobs, work.ladder, ledger, options, study, self.cluster, self._flag, folder)
        with self._signals():
            if self.cluster.address.startswith(CLIENT):  # there Tune's driver runs on the cluster
                there = self._ray.remote(_carried(_round, self.cluster.address))
                there = there.options(num_cpus=0, max_retries=0)
                outcomes = self._ray.get(there.remote(packed=pickle.dumps((task,))))
            else:
                outcomes = _round(task)
        if self._stopping:
            kept = sum(ledger.status(job.first).state == "interrupted" for job in jobs)
            raise KeyboardInterrupt(f"stopped; {kept} run(s) stand at their checkpoints")
        return outcomes

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """The first SIGINT or SIGTERM stops the runs, the second this process."""
        asked = (signal.SIGINT, signal.SIGTERM)
        before = {each: signal.getsignal(each) for each in asked}

        def ask(number: int, frame: FrameType | None) -> None:
            for each in asked:
                signal.signal(each, signal.default_int_handler)
            self._stopping = True
            _write(self._flag, STOP)
            print("\naugbench: stopping, the runs write their checkpoints", file=sys.stderr)

        for each in asked:
            signal.signal(each, ask)
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)


def _round(task: _Task) -> dict[str, Status | Problem]:
    """Tune's driver: hands the jobs to workers until none is left or the flag says stop."""
    from ray import tune  # noqa: PLC0415 - takes a second

    os.environ.update(SETTINGS)
    cluster, ledger = task.cluster, task.ledger
    # A trial that waits keeps the worker of one that ends, which takes seconds to start.
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(2 * cluster.workers)
    left = [cell for job in task.jobs for cell in job.cells if ledger.to_do(cell)]
    board = Board(len(left), cluster.workers, costs_in(ledger.root, cluster.device))
    board.begin(left, {cell.run.id: ledger.epochs(cell) for cell in left})
    state = _State(task, board)
    place = Place(task.jobs, ledger.root, task.options, task.flag)
    resources = {"cpu": cluster.cpus, "gpu": cluster.gpu}
    work = tune.with_parameters(_carried(_work, cluster.address), packed=pickle.dumps((place,)))
    tuner = tune.Tuner(
        tune.with_resources(work, resources),
        tune_config=tune.TuneConfig(
            search_alg=_offering(state),
            scheduler=_halving(state),
            num_samples=-1,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=task.folder.name,
            storage_path=str(task.folder.parent),
            callbacks=[_watching(state), *_loggers(task.study)],
            stop=_ending(state),
            failure_config=tune.FailureConfig(max_failures=0),
            verbose=0,
        ),
    )
    try:
        tuner.fit()
    finally:
        board.close()
    return state.outcomes


@contextmanager
def opened(
    study: Study,
    root: Path,
    options: Options,
    address: str,
    workers: int | None,
    wanted: list[Cell],
) -> Iterator[Sweep]:
    """A Ray of our own, or a running one that is joined; of our own nothing is left behind.

    Raises:
        StudyError: no machine has what one run takes.
        DataError: data or results folder cannot be used on a machine.
    """
    joined = address not in ("", "local")
    before = dict(os.environ)
    with ExitStack() as stack:
        stack.callback(_restore_environment, before)
        os.environ.update(SETTINGS)
        if joined:
            folder = root / f".tune-{secrets.token_hex(4)}"  # every machine must see it
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
        else:
            remove_stale()
            folder = _private_folder()
            stack.enter_context(cleanup.outlived(folder))
            stack.enter_context(_held(folder / "owner"))
            # A token of this sweep's own, so that nothing is written to the home folder.
            os.environ["RAY_AUTH_MODE"] = "token"
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
            os.environ.update(_without_proxy(os.environ))
        flag = stack.enter_context(_flag(root))
        ray = importlib.import_module("ray")
        _loggers(study)  # what they refuse is told before Ray starts
        stack.callback(ray.shutdown)
        _silence()
        handler = signal.getsignal(signal.SIGTERM)
        if joined:
            cluster = _join(ray, address, study, workers)
        else:
            cluster = _start(ray, folder, study, workers)
            stack.enter_context(_watched())
        signal.signal(signal.SIGTERM, handler)  # Ray sets its own, that ends without a word
        if joined:
            check_machines(ray, root, flag, options, wanted)
        yield Sweep(ray, cluster, flag, folder)


@contextmanager
def _watched() -> Iterator[None]:
    """End this process when Ray's own are gone: it would wait for them, and then die untold."""
    node = importlib.import_module("ray._private.worker")._global_node
    started = [
        each.process
        for name in ("raylet", "gcs_server")
        for each in node.all_processes.get(name, ())
    ]
    over = threading.Event()

    def watch() -> None:
        while not over.wait(LOOK_SECONDS):
            if any(process.poll() is not None for process in started) and not over.is_set():
                again = shlex.join(["augbench", *sys.argv[1:]])
                print(
                    "\naugbench: Ray's processes on this machine were ended from outside; out of "
                    f"memory? The same command goes on from the checkpoints: {again}",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(FAILURE)  # nothing of Ray answers any more, not even to be shut down

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _carried(function: Callable[..., Any], address: str) -> Callable[..., Any]:
    """A function of this module as Ray carries it to a worker, some of its arguments packed.

    Ray puts the current folder first on a worker's path, where files of the user's own may bear the
    names of our packages. What is nested goes by value: it runs before anything of ours is found.
    A worker of our own Ray has the path of this process.
    """
    module, name = function.__module__, function.__name__
    here, path = str(augbench.HERE), [] if address else list(sys.path)

    def carried(*arguments: Any, packed: bytes) -> Any:
        before = sys.path[:]
        sys.path[:] = [here, *before]
        ours = importlib.import_module("augbench")
        sys.path[:] = path or before
        ours.bind()
        return ours.call(module, name, *arguments, *pickle.loads(packed))

    return carried


def _restore_environment(before: dict[str, str]) -> None:
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


def _without_proxy(before: Mapping[str, str]) -> dict[str, str]:
    """Settings by which Ray's processes reach each other directly, and all else as before."""
    hosts = before.get("no_proxy") or before.get("NO_PROXY", "")
    if hosts.strip() != "*":  # which stands alone, for all hosts
        hosts = ",".join(filter(None, (hosts, LOOPBACK, "localhost")))
    return dict.fromkeys(("no_proxy", "NO_PROXY", "no_grpc_proxy"), hosts)


def _private_folder() -> Path:
    base = tempfile.gettempdir()
    base = base if len(base) <= LONGEST_FOLDER else "/tmp"
    return Path(tempfile.mkdtemp(prefix="augbench-", dir=base))


def remove_stale() -> None:
    """Remove the temporary folders of sweeps whose process is gone, cleaner and all."""
    for base in {tempfile.gettempdir(), "/tmp"}:
        for folder in Path(base).glob("augbench-*"):
            with contextlib.suppress(OSError, runs.Held), _held(folder / "owner", new=False):
                cleanup.clean(folder)


@contextmanager
def _held(path: Path, new: bool = True) -> Iterator[None]:
    """Hold a file as long as this process lives; the kernel frees it."""
    import fcntl  # noqa: PLC0415

    with path.open("a" if new else "r+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise runs.Held(f"{path} is held by a sweep") from error
        yield


@contextmanager
def _flag(root: Path) -> Iterator[Path]:
    """The file that tells the runs of this sweep to go on; its removal ends them too."""
    for old in root.glob(".sweep-*"):  # of a sweep that was killed
        with contextlib.suppress(OSError, runs.Held), _held(old, new=False):
            old.unlink(missing_ok=True)
    path = root / f".sweep-{secrets.token_hex(8)}"
    try:
        _write(path, GO)
        with _held(path):
            yield path
    finally:
        path.unlink(missing_ok=True)


def _write(path: Path, text: str) -> None:
    """In place: a file that is renamed over another would not be the one that is held."""
    path.write_text(text, encoding="utf-8")


def _silence() -> None:
    """Ray prints the deaths of workers on standard output, where our tables go."""
    for name in ("ray", "ray.tune", "ray.data"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    worker = importlib.import_module("ray._private.worker")
    vars(worker)["print_to_stdstream"] = lambda *_, **__: None


def _start(ray: ModuleType, folder: Path, study: Study, workers: int | None) -> Cluster:
    """A Ray on this machine that only this machine can reach."""
    cluster = capacity.here(study, workers)
    if study.dashboard:
        try:
            importlib.import_module("ray.dashboard.optional_deps")
        except ImportError as error:
            raise StudyError(
                "dashboard: its packages are not installed: pip install 'ray[default]', or leave "
                "it out"
            ) from error
    # Ray turns a loopback address into that of the network unless it takes itself for a laptop's.
    constants = importlib.import_module("ray._private.ray_constants")
    vars(constants)["ENABLE_RAY_CLUSTER"] = False
    context = ray.init(
        address="local",
        # Ray would put the current folder first on the path of its workers, before Python's own.
        job_config=importlib.import_module("ray.job_config").JobConfig(_client_job=True),
        num_cpus=math.ceil(cluster.workers * cluster.cpus),
        num_gpus=capacity.gpus(),
        include_dashboard=study.dashboard,
        object_store_memory=OBJECT_STORE_BYTES,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _temp_dir=str(folder / "ray"),  # which Ray opens to everyone; the folder above is closed
        _node_ip_address=LOOPBACK,
    )
    bound = {node["NodeManagerAddress"] for node in ray.nodes()}
    if bound != {LOOPBACK}:
        raise StudyError(
            f"Ray listens on {', '.join(sorted(bound))} instead of {LOOPBACK}, where others may "
            "reach it: use another release of ray, and report it"
        )
    if study.dashboard:
        token = os.environ["RAY_AUTH_TOKEN"]
        print(f"Dashboard: http://{context.dashboard_url}, token {token}", file=sys.stderr)
    return cluster


def _join(ray: ModuleType, address: str, study: Study, workers: int | None) -> Cluster:
    try:
        remote = address.startswith(CLIENT)
        ray.init(address=address, log_to_driver=remote, logging_level=logging.ERROR)
    except ImportError as error:
        raise StudyError(
            f"address: {address} needs packages that are not installed ({first_line(error)}): pip "
            "install 'augbench[client]', or give the address without ray://"
        ) from error
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise StudyError(
            f"address: no Ray cluster answers at {address} ({first_line(error)}); start one with "
            "'ray start --head', or leave the address out"
        ) from error
    machines = [node for node in ray.nodes() if node["Alive"]]
    has = [
        (node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0)) for node in machines
    ]
    cpus, gpu = capacity.takes(study, any(gpus for _, gpus in has))
    fit = sum(int(min(cores / cpus, gpus / gpu if gpu else math.inf) + 1e-9) for cores, gpus in has)
    if not fit:
        largest = max(has)
        raise StudyError(
            f"resources: one run takes {cpus:g} cores and {gpu:g} GPU, and the largest of "
            f"{len(machines)} machine(s) at {address} has {largest[0]:g} cores and {largest[1]:g} "
            "GPU: change resources in the file"
        )
    return Cluster(address, min(workers or fit, fit), cpus, gpu, len(machines))


def check_machines(
    ray: ModuleType, root: Path, flag: Path, options: Options, wanted: Sequence[Cell]
) -> None:
    """Every machine sees the results folder, may write there, and has the data or fetches them.

    Raises:
        DataError: names each machine and what is wrong there.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # noqa: PLC0415

    benchmarks = list({splits.stored(cell.benchmark): cell.benchmark for cell in wanted}.values())
    checks, packed = {}, pickle.dumps((str(root), flag.name, options, benchmarks))
    for node in ray.nodes():
        if node["Alive"]:
            where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            task = ray.remote(_carried(check_here, "joined"))
            task = task.options(num_cpus=0, scheduling_strategy=where)
            name = f"{node['NodeManagerAddress']} ({node['NodeID'][:6]})"
            checks[name] = task.remote(packed=packed)
    problems = []
    for name, check in checks.items():
        try:
            problems += [f"machine {name}: {text}" for text in ray.get(check)]
        except Exception as error:  # whatever it is, it is that machine's
            problems.append(
                f"machine {name}: augbench cannot be imported there ({first_line(error)}): install "
                "the same version on every machine"
            )
    if problems:
        raise DataError("\n".join(problems))


def check_here(root: str, flag: str, options: Options, benchmarks: list[Any]) -> list[str]:
    """What is wrong on this machine; data sets that are missing are fetched."""
    problems = []
    folder = Path(root)
    probe = folder / f"{flag}.{os.uname().nodename}-{os.getpid()}"
    try:
        if (folder / flag).read_text(encoding="utf-8") != GO:
            raise FileNotFoundError
        probe.write_text("", encoding="utf-8")
        probe.unlink()
    except FileNotFoundError:
        problems.append(
            f"{root} is another folder than on the machine that started the sweep: put the results "
            "on storage that all machines share, with out: in the file or --out"
        )
    except OSError as error:
        problems.append(f"the results folder cannot be written: {said(error)}")
    for benchmark in benchmarks:
        entry = CATALOGUE.get(benchmark.name)
        if entry is not None and None not in sources.locate(
            entry, benchmark.size, options.data_root
        ):
            continue
        try:
            splits.arrays_of(
                benchmark, options.data_root, options.allow_unverified, options.memory_gib
            )
        except (DataError, OSError) as error:
            problems.append(f"data: {said(error)}")
    return problems


class _State:
    """What the driver knows of the jobs of a round; Tune's hooks below all work on it."""

    def __init__(self, task: _Task, board: Board) -> None:
        self.jobs, self.ladder, self.ledger = task.jobs, task.ladder, task.ledger
        self.board, self.curves = board, _curves(task.study, task.ledger.root)
        self.stopping = _stopped(task.flag)
        self.outcomes: dict[str, Status | Problem] = {}
        self._cluster = task.cluster
        self._waiting = deque(range(len(task.jobs)))
        self._offered: dict[str, tuple[int, set[str]]] = {}
        """by trial: the job's place, and the ids of its runs that are to be done"""
        self._running: set[str] = set()
        self._lost: dict[int, int] = {}

    @property
    def over(self) -> bool:
        """Whether nothing is left to offer or to come back."""
        return self.stopping() or not (self._waiting or self._offered)

    @property
    def idle(self) -> bool:
        """Whether no worker is at work."""
        return not self._running

    def offer(self, trial: str) -> dict[str, Any] | None:
        """The next job for a worker, as Tune's and other loggers' configuration of a trial."""
        cluster = self._cluster
        most = cluster.workers if cluster.address else 2 * cluster.workers
        if not self._waiting or len(self._offered) >= most:
            return None
        place = self._waiting.popleft()
        job = self.jobs[place]
        run = job.first.run
        left = {cell.run.id for cell in job.cells if self.ledger.to_do(cell)}
        self._offered[trial] = place, left
        return {
            "job": place,
            "runs": sorted(left),
            "benchmark": run.benchmark,
            "model": run.model,
            "protocol": run.protocol,
            "row": run.row,
            "seed": run.seed,
            **asdict(run.training),  # type: ignore[call-overload]
        }

    def started(self, trial: str) -> None:
        """A worker begins."""
        self._running.add(trial)
        self.board.started(self._job(trial).first)

    def reported(self, trial: str, result: dict[str, Any]) -> None:
        """A run goes on, or ends."""
        for note in result.get("notes", ()):
            self.board.note(note)
        self.board.tick()
        job = self._job(trial)
        if self.curves is not None and "epoch" in result:
            self.curves.extend(job.cells)

    def goes_on(self, trial: str, result: dict[str, Any]) -> bool:
        """Whether a trial of a search earned its way past a rung; else its runs are ended."""
        if self.ladder is None or "rung" not in result:
            return True
        job = self._job(trial)
        rung, score = result["rung"], result["score"]
        self.ladder.seen(job.group, rung, job.trial, score)
        if self.ladder.goes_on(job.group, rung, job.trial):
            return True
        for cell in job.cells:
            reason = f"rung {rung}: select {job.metric} {score:.4f} is not among the best there"
            disk.conclude(cell.run, cell.recorded, self.ledger.root, "stopped", reason)
        return False

    def ended(self, trial: str) -> None:
        """The worker returned: the runs' directories say how."""
        self._end(trial, "")

    def problem(self, trial: str, text: str) -> None:
        """The worker could not do it for a reason that is not the run's; nothing is recorded."""
        for cell in self._job(trial).cells:
            if self.ledger.status(cell).state in UNFINISHED:
                self._tell(cell, Problem(text))

    def died(self, trial: str, reason: str, machine: bool) -> None:
        """The worker's process is gone, or raised what no run may raise."""
        self._end(trial, "" if machine else reason)

    def _job(self, trial: str) -> Job:
        return self.jobs[self._offered[trial][0]]

    def _end(self, trial: str, death: str) -> None:
        place, left = self._offered.pop(trial)
        self._running.discard(trial)
        if self.stopping():
            return
        job, again = self.jobs[place], False
        cells = [c for c in job.cells if c.run.id in left and c.run.id not in self.outcomes]
        if not death and any(self.ledger.status(cell).state in UNFINISHED for cell in cells):
            self._lost[place] = self._lost.get(place, 0) + 1
            again = self._lost[place] <= LOST_MACHINES
            death = "" if again else "it was lost with its machine too often"
        for cell in cells:
            status = self.ledger.status(cell)
            if status.state in UNFINISHED and not death:
                continue
            if status.state in (*UNFINISHED, "failed"):
                reason = status.reason if status.state == "failed" else death
                self.ledger.failed(cell, reason)
                if self.ledger.tries_left(cell):
                    self.board.again(cell, reason)
                    again = True
                    continue
            if status.state in UNFINISHED:
                text = f"{death} (tried {len(self.ledger.failures(cell))} time(s))"
                root = self.ledger.root
                status = disk.conclude(cell.run, cell.recorded, root, "failed", text)
            self._tell(cell, status)
        if again:
            self.board.paused(job.first)
            self._waiting.append(place)

    def _tell(self, cell: Cell, outcome: Status | Problem) -> None:
        self.outcomes[cell.run.id] = outcome
        done = not isinstance(outcome, Problem) and outcome.state == "done"
        if self.curves is not None and done:
            self.curves.finish(cell)
        self.board.ended(
            cell, outcome, runs.read_result(self.ledger.folder(cell)) if done else None
        )


def _offering(state: _State) -> Any:
    """Tune's searcher: hands out the jobs."""
    from ray.tune.search import Searcher  # noqa: PLC0415

    class Offering(Searcher):
        def suggest(self, trial_id: str) -> Any:
            return Searcher.FINISHED if state.over else state.offer(trial_id)

        def on_trial_complete(
            self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
        ) -> None:
            pass

        def save(self, checkpoint_path: str) -> None:
            pass

        def restore(self, checkpoint_path: str) -> None:
            pass

    return Offering(metric="epoch", mode="max")


def _halving(state: _State) -> Any:
    """Tune's scheduler: first come, first served; at a rung the ladder decides."""
    from ray.tune.schedulers import FIFOScheduler, TrialScheduler  # noqa: PLC0415

    class Halving(FIFOScheduler):
        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
            going = state.goes_on(trial.trial_id, result)
            return TrialScheduler.CONTINUE if going else TrialScheduler.STOP

    return Halving()


def _watching(state: _State) -> Any:
    """Tune's callback: tells the state what happens to the trials, in place of Tune's own lines."""
    from ray.tune.progress_reporter import TrialProgressCallback  # noqa: PLC0415

    class Watching(TrialProgressCallback):
        def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
            state.board.tick()

        def on_trial_start(
            self, iteration: int, trials: list[Any], trial: Any, **info: Any
        ) -> None:
            state.started(trial.trial_id)

        def on_trial_result(
            self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
        ) -> None:
            state.reported(trial.trial_id, result)
            if "problem" in result:
                state.problem(trial.trial_id, result["problem"])

        def on_trial_complete(
            self, iteration: int, trials: list[Any], trial: Any, **info: Any
        ) -> None:
            state.ended(trial.trial_id)

        def on_trial_error(
            self, iteration: int, trials: list[Any], trial: Any, **info: Any
        ) -> None:
            path = Path(trial.error_file or "")
            text, machine = _death(path.read_text(encoding="utf-8") if path.is_file() else "")
            state.died(trial.trial_id, text, machine)

    return Watching()


def _ending(state: _State) -> Any:
    """Tune's stopper: after Ctrl-C, once the workers have stopped or had their time."""
    from ray.tune import Stopper  # noqa: PLC0415

    class Ending(Stopper):
        since = math.inf

        def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
            return False

        def stop_all(self) -> bool:
            if not state.stopping():
                return False
            self.since = min(self.since, time.monotonic())
            return state.idle or time.monotonic() - self.since > GRACE_SECONDS

    return Ending()


def _death(text: str) -> tuple[str, bool]:
    """Why a worker is gone, from what Ray wrote of it, and whether its whole machine is."""
    lower = text.lower()
    if any(sign in lower for sign in LOST_MACHINE):
        return "its machine is gone", True
    if "memory pressure" in lower or "outofmemoryerror" in lower:
        return f"its process was ended because memory ran out, use fewer workers; {GOES_ON}", False
    if "worker died" in lower or "actordiederror" in lower or "actor died" in lower:
        return f"its process was ended from outside; out of memory? {GOES_ON}", False
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "its process ended without a word", False


class _Told(Silent):
    """Progress of a run in a worker: an epoch now and then, and the end, to the driver."""

    def __init__(self, report: Callable[[dict[str, Any]], None], until: int) -> None:
        self._report, self._until, self._done = report, until, 0
        self._last = time.monotonic()
        self._kept: dict[str, Any] = {}
        """of the last epoch, where it is not told yet"""

    @property
    def arrived(self) -> bool:
        """Whether the rung is reached."""
        return bool(self._until) and self._done >= self._until

    def begin(self, name: str, epochs: int, done: int, images: int) -> None:
        """The run stands here."""
        self._done = done

    def epoch(self, number: int, line: dict[str, Any]) -> None:
        """Tell the driver, but not more than once a second: the run waits for its answer."""
        self._done = number
        scores = {f"select_{name}": value for name, value in line["select"].items()}
        self._kept = {"epoch": number, "train_loss": line["train_loss"], **scores}
        now = time.monotonic()
        if now - self._last >= REPORT_SECONDS:
            self._last = now
            self._tell()

    def note(self, text: str) -> None:
        """Tell it at once: the run may wait, or have no other epoch."""
        self._tell(notes=[text])

    def over(self, result: dict[str, Any] | None) -> None:
        """Tell the last epoch and, of a run that is done, its metrics on test."""
        done = result is not None and result["status"] == "done"
        scores = result["metrics"]["last"]["test"] if result is not None and done else {}
        final = {f"test_{name}": value for name, value in scores.items()}
        if self._kept or final:
            self._tell(**({"epoch": self._done} | final))

    def _tell(self, **more: Any) -> None:
        told, self._kept = {**self._kept, **more}, {}
        try:
            self._report(told)
        except SystemExit as error:  # how Tune ends the thread of a trial
            raise Gone from error


def _stopped(flag: Path) -> Callable[[], bool]:
    """Whether the sweep ends, looked up now and then."""
    looked, ends = -math.inf, False

    def ask() -> bool:
        nonlocal looked, ends
        now = time.monotonic()
        if not ends and now - looked > LOOK_SECONDS:
            looked = now
            try:
                ends = flag.read_text(encoding="utf-8") != GO
            except OSError:
                ends = True
        return ends

    return ask


def _work(config: dict[str, Any], place: Place) -> None:
    """A worker does one job; Tune runs it in a thread of a process that does many."""
    from ray import tune  # noqa: PLC0415

    job = place.jobs[config["job"]]
    options = replace(place.options, retry_failed=True)  # only these runs are to be done
    cells = [cell for cell in job.cells if cell.run.id in config["runs"]]
    ends = _stopped(place.flag)
    folders = [runs.folder_of(place.root, cell.run) for cell in job.cells]
    try:
        for until in (*job.rungs, 0):
            if until and min(len(search.lines_of(folder)) for folder in folders) > until:
                continue  # it has earned its way on before
            for cell in cells:
                if ends():
                    return
                _leg(cell, place, options, until, ends, tune.report)
            if until:
                score = search.score_at(folders, until, job.metric)
                tune.report({"epoch": until, "rung": until, "score": score})
    except (Interrupted, Gone):
        return
    except (DataError, OSError) as error:
        tune.report({"problem": said(error)})


def _leg(
    cell: Cell,
    place: Place,
    options: Options,
    until: int,
    ends: Callable[[], bool],
    report: Callable[[dict[str, Any]], None],
) -> None:
    """Train a run to its end, or to a rung, where it waits on disk."""
    folder = runs.folder_of(place.root, cell.run)
    if until and runs.status_of(folder).state == "interrupted":
        reached = len(search.lines_of(folder))
        if reached >= until and (folder / "checkpoint.pt").exists():
            return
    told = _Told(report, until)
    waiting = False
    while True:
        try:
            disk.execute(
                cell.run,
                cell.recorded,
                place.root,
                replace(options, wait=False),
                cell.benchmark,
                told,
                lambda: told.arrived or ends(),
            )
            break
        except Interrupted:
            if not told.arrived:
                raise
            break
        except runs.Held as held:  # waited for here, where the flag is looked at too
            if not waiting:
                told.note(f"{label(cell)}: waiting, {held}")
            waiting = True
            time.sleep(LOOK_SECONDS)
            if ends():
                raise Interrupted from held
    told.over(runs.read_result(folder))


def _loggers(study: Study) -> list[Any]:
    """Ray's own callbacks that the file names.

    Raises:
        StudyError: one of them does not take what the file gives it.
    """
    found = []
    for extra, package, name in (
        ("wandb", "ray.air.integrations.wandb", "WandbLoggerCallback"),
        ("mlflow", "ray.air.integrations.mlflow", "MLflowLoggerCallback"),
    ):
        arguments = getattr(study, extra)
        if arguments is not None:
            try:
                found.append(getattr(importlib.import_module(package), name)(**arguments))
            except (TypeError, ValueError, RuntimeError) as error:
                raise StudyError(f"{extra}: {first_line(error)}") from error
    return found


class _Curves:
    """TensorBoard files, written from metrics.jsonl."""

    def __init__(self, writer: Any, folder: Path, root: Path) -> None:
        self._writer, self._folder, self._root = writer, folder, root
        self._last: dict[str, tuple[float, int]] = {}

    def extend(self, cells: Sequence[Cell]) -> None:
        """Add the epochs since the last time, which was half a minute ago or more."""
        now = time.monotonic()
        for cell in cells:
            when, epochs = self._last.get(cell.run.id, (-math.inf, 0))
            if now - when > 30:
                self._add(cell, epochs)

    def finish(self, cell: Cell) -> None:
        """Write the run's curves as a whole, in place of what was written so far."""
        shutil.rmtree(self._place(cell), ignore_errors=True)
        self._add(cell, 0)

    def _add(self, cell: Cell, since: int) -> None:
        lines = search.lines_of(runs.folder_of(self._root, cell.run))
        self._last[cell.run.id] = time.monotonic(), len(lines)
        if not lines[since:]:
            return
        writer = self._writer(logdir=str(self._place(cell)))
        for line in lines[since:]:
            scalars = {
                "train/loss": line["train_loss"],
                "train/learning_rate": line["learning_rate"],
            }
            scalars |= {f"select/{name}": value for name, value in line["select"].items()}
            scalars |= {f"log/{name}": value for name, value in line["log"].items()}
            for name, value in scalars.items():
                if isinstance(value, int | float):
                    writer.add_scalar(name, value, line["epoch"])
        writer.close()

    def _place(self, cell: Cell) -> Path:
        run = cell.run
        name = f"{run.benchmark} {run.model} {run.row} seed {run.seed} {run.id}"
        return self._folder / "".join(c if c.isalnum() or c in "-_.= " else "-" for c in name)


def _curves(study: Study, root: Path) -> _Curves | None:
    if not study.tensorboard:
        return None
    try:
        writer = importlib.import_module("tensorboardX").SummaryWriter
    except ImportError:  # it comes with ray[tune], but a file of curves is not worth a sweep
        return None
    return _Curves(writer, root / STUDIES / study.name / "tensorboard", root)
