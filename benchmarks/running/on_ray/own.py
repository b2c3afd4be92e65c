"""A Ray of our own, reachable only from this machine, that leaves nothing behind."""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
import os
import secrets
import shlex
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType

from analysis import runs
from analysis.studyfile import StudyError
from benchmarks.running import capacity, cleanup
from benchmarks.running.capacity import Capacity
from benchmarks.running.codes import FAILURE
from benchmarks.running.flag import LOOK_SECONDS, held
from benchmarks.studies.schema import Study

LOOPBACK = "127.0.0.1"
OBJECT_STORE_BYTES = 128 << 20
"""What workers share is a list of runs."""


def prepared(stack: ExitStack) -> Path:
    """A folder for Ray's files, removed at the end, and the environment that our Ray needs."""
    remove_stale()
    folder = cleanup.private_folder()
    stack.enter_context(cleanup.outlived(folder))
    stack.enter_context(held(folder / "owner"))
    # A token of this sweep's own, so that nothing is written to the home folder.
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    os.environ.update(without_proxy(os.environ))
    return folder


def start(ray: ModuleType, folder: Path, study: Study, workers: int | None) -> Capacity:
    """A Ray on this machine that only this machine can reach."""
    there = capacity.here(study, workers)
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
        num_cpus=math.ceil(there.workers * there.cpus),
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
    return there


@contextmanager
def watched() -> Iterator[None]:
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
                    f"memory? Resume from the checkpoints with: {again}",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(FAILURE)  # nothing of Ray answers any more, not even to be shut down

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        over.set()


def without_proxy(before: Mapping[str, str]) -> dict[str, str]:
    """Settings by which Ray's processes reach each other directly, and all else as before."""
    hosts = before.get("no_proxy") or before.get("NO_PROXY", "")
    if hosts.strip() != "*":  # which stands alone, for all hosts
        hosts = ",".join(filter(None, (hosts, LOOPBACK, "localhost")))
    return dict.fromkeys(("no_proxy", "NO_PROXY", "no_grpc_proxy"), hosts)


def remove_stale() -> None:
    """Remove the temporary folders of sweeps whose process is gone, cleaner and all."""
    for base in {tempfile.gettempdir(), "/tmp"}:
        for folder in Path(base).glob("augbench-*"):
            with contextlib.suppress(OSError, runs.Held), held(folder / "owner", new=False):
                cleanup.clean(folder)
