"""The download, against a local server that fails in every way a real one does."""

import errno
import hashlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from benchmarks.data import download
from benchmarks.data.catalogue import File
from benchmarks.data.download import DataError, fetch, md5_of

BODY = np.random.default_rng(0).bytes(300_000)
MD5 = hashlib.md5(BODY, usedforsecurity=False).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves BODY; `script` holds one behaviour a request, then all goes well."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list[str] = []
        self.ranges: list[str | None] = []
        self.agents: set[str | None] = set()
        self.over = threading.Event()

    @property
    def file(self) -> File:
        return File("set.npz", f"http://127.0.0.1:{self.server_address[1]}/set.npz?download=1", MD5)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is part of these tests."""


class Handler(BaseHTTPRequestHandler):
    """One request, answered as the script of the server says."""

    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.ranges.append(wanted)
        self.server.agents.add(self.headers.get("User-Agent"))
        mode = self.server.script.pop(0) if self.server.script else "fine"
        body = bytes(len(BODY)) if mode == "wrong" else BODY
        if mode.isdigit():
            self.send_error(int(mode))
            return
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        if mode in ("no range", "no range, drop"):
            start = 0
        if start >= len(body):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            first = start + 1 if mode == "other range" else start
            self.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
        if mode != "no length":
            self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        rest = body[start:]
        if mode in ("drop", "no range, drop"):
            self.wfile.write(rest[: len(rest) // 2])
            return
        if mode == "stall":
            self.wfile.write(rest[:1000])
            self.wfile.flush()
            self.server.over.wait(5)
            return
        if mode == "slow":
            time.sleep(0.3)
        self.wfile.write(rest)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(download, "BACKOFF", 0.001)
    monkeypatch.setenv("no_proxy", "*")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.over.set()
        server.shutdown()
        thread.join()


def right(path: Path) -> bool:
    return path.read_bytes() == BODY and not path.with_name(f"{path.name}.part").exists()


def test_a_file_is_fetched_once(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "a" / "b"
    path = fetch(server.file, folder)
    assert path == folder / "set.npz" and right(path) and md5_of(path) == MD5
    assert server.agents == {"augbench/0.1 (+python-urllib)"}
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err == f"downloading set.npz from {server.file.url}\n"
    fetch(server.file, folder)
    assert server.ranges == [None]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("script", "requests"),
    [
        (["503", "503"], 3),
        (["drop"], 2),
        (["drop"] * 7, 8),  # each attempt brings something, so more than `retries` are made
        (["stall"], 2),
        (["stall", "no range"], 2),
        (["drop", "no range, drop", "429"], 4),
        (["drop", "other range"], 3),
        (["no length"], 1),
    ],
)
def test_a_flaky_server_is_got_the_better_of(
    server: Server, tmp_path: Path, script: list[str], requests: int
) -> None:
    server.script = script
    assert right(fetch(server.file, tmp_path, timeout=0.2, progress=False))
    assert len(server.ranges) == requests


def test_a_part_is_resumed(server: Server, tmp_path: Path) -> None:
    (tmp_path / "set.npz.part").write_bytes(BODY[:123_456])
    assert right(fetch(server.file, tmp_path))
    assert server.ranges == ["bytes=123456-"]


def test_a_part_that_is_complete_needs_no_server(server: Server, tmp_path: Path) -> None:
    (tmp_path / "set.npz.part").write_bytes(BODY)
    assert right(fetch(server.file, tmp_path))
    assert server.ranges == []


def test_a_part_that_is_too_long_starts_over(server: Server, tmp_path: Path) -> None:
    (tmp_path / "set.npz.part").write_bytes(BODY + b"more")
    assert right(fetch(server.file, tmp_path))
    assert len(server.ranges) == 2 and server.ranges[1] is None


def test_wrong_bytes_are_removed(server: Server, tmp_path: Path) -> None:
    server.script = ["wrong"]
    with pytest.raises(DataError, match=f"expected {MD5}; it was removed"):
        fetch(server.file, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert right(fetch(server.file, tmp_path))


def test_another_file_under_the_name_is_kept(server: Server, tmp_path: Path) -> None:
    (tmp_path / "set.npz").write_bytes(b"mine")
    with pytest.raises(DataError, match="Remove or rename it"):
        fetch(server.file, tmp_path)
    assert (tmp_path / "set.npz").read_bytes() == b"mine" and server.ranges == []


def test_what_is_not_there_is_not_asked_for_again(server: Server, tmp_path: Path) -> None:
    server.script = ["404"]
    with pytest.raises(DataError, match="HTTP Error 404"):
        fetch(server.file, tmp_path)
    assert len(server.ranges) == 1 and list(tmp_path.iterdir()) == []


def test_a_server_that_stays_down_leaves_a_part(server: Server, tmp_path: Path) -> None:
    server.script = ["drop"] + ["503"] * 3
    with pytest.raises(DataError, match="a further call resumes"):
        fetch(server.file, tmp_path, retries=2)
    assert len(server.ranges) == 4
    assert (tmp_path / "set.npz.part").read_bytes() == BODY[: len(BODY) // 2]
    assert right(fetch(server.file, tmp_path))
    assert server.ranges[-1] == f"bytes={len(BODY) // 2}-"


def test_offline_tells_how_to_do_it_by_hand(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(download, "BACKOFF", 0.001)
    monkeypatch.setenv("no_proxy", "*")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    file = File("set.npz", f"http://127.0.0.1:{port}/set.npz", MD5)
    with pytest.raises(DataError) as caught:
        fetch(file, tmp_path / "data", retries=1)
    text = str(caught.value)
    for part in (file.name, file.url, file.md5, str(tmp_path / "data"), "refused", "by hand"):
        assert part in text
    assert list((tmp_path / "data").iterdir()) == []


def test_two_at_once_fetch_it_once(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.script = ["slow"]
    paths: list[Path] = []
    # The lock belongs to the open file, so threads meet it as processes do.
    threads = [
        threading.Thread(target=lambda: paths.append(fetch(server.file, tmp_path)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 4 and all(map(right, paths)) and len(server.ranges) == 1
    assert "another process is downloading set.npz" in capsys.readouterr().err


def test_who_waited_for_attempts_in_vain_makes_one(server: Server, tmp_path: Path) -> None:
    server.script = ["503"] * 9
    caught: list[DataError] = []

    def wait() -> None:
        with pytest.raises(DataError) as error:
            fetch(server.file, tmp_path)
        caught.append(error.value)

    waiter = threading.Thread(target=wait)
    with download._locked(tmp_path / "set.npz.part"):
        waiter.start()
        time.sleep(0.2)
    waiter.join()
    assert len(caught) == len(server.ranges) == 1


def test_a_part_replaced_while_waiting_is_opened_anew(server: Server, tmp_path: Path) -> None:
    part = tmp_path / "set.npz.part"
    waiter = threading.Thread(target=lambda: fetch(server.file, tmp_path))
    with download._locked(part):
        waiter.start()
        time.sleep(0.2)
        part.unlink()
        part.write_bytes(BODY[:777])
    waiter.join()
    assert right(tmp_path / "set.npz") and server.ranges == ["bytes=777-"]


def breaking(error: BaseException) -> Callable[..., None]:
    """A _write that fails after the first block."""
    whole, blocks = download._write, []

    def write(handle: object, block: bytes) -> None:
        if blocks:
            raise error
        blocks.append(block)
        whole(handle, block)  # pyright: ignore[reportArgumentType]

    return write


@pytest.mark.parametrize("cause", ["interrupt", "disk full"])
def test_an_end_in_the_middle_leaves_a_part(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cause: str
) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    error = KeyboardInterrupt() if cause == "interrupt" else download._WriteError(full)
    monkeypatch.setattr(download, "BLOCK", 10_000)
    with monkeypatch.context() as patch:
        patch.setattr(download, "_write", breaking(error))
        if cause == "interrupt":
            with pytest.raises(KeyboardInterrupt):
                fetch(server.file, tmp_path)
        else:
            with pytest.raises(DataError, match=r"the disk is full.*run again to resume"):
                fetch(server.file, tmp_path)
    part = (tmp_path / "set.npz.part").read_bytes()
    assert 0 < len(part) <= 10_000 and BODY.startswith(part)
    assert right(fetch(server.file, tmp_path))
    assert server.ranges == [None, f"bytes={len(part)}-"]


def test_a_folder_that_cannot_be_made(server: Server, tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file")
    with pytest.raises(DataError, match="cannot be written into"):
        fetch(server.file, tmp_path / "data")
