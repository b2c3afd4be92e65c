"""``augbench pack`` and ``unpack``: what comes back, what is refused, and what is left behind."""

import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml

from analysis import inventory, packing, question, records, runs
from benchmarks.cli.main import run as cli
from benchmarks.running.codes import FAILURE, INTERRUPTED, USAGE
from tests.made import make_run

Shown = pytest.CaptureFixture[str]
OTHER = {"versions": {"augbench": "0.1.0", "torch": "2.14.1"}}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Runs of every ended state, a network beside one, an interrupted run, a copy, a study."""
    root = tmp_path / "a" / "runs"
    for seed in range(3):
        make_run(root, "none", seed, learned=True)
    kept = make_run(root, "mixup")
    (kept / "model.pt").write_bytes(b"weights")
    result = json.loads((kept / "result.json").read_text())
    result["files"]["model.pt"] = 7
    (kept / "result.json").write_text(json.dumps(result))
    make_run(root, "crop", status="failed", reason="no memory")
    make_run(root, "flip", status="skipped", reason="so")
    broken = make_run(root, "cutmix")
    (broken / "result.json").unlink()
    (broken / "checkpoint.pt").write_bytes(b"half")
    shutil.copytree(kept, root / "backup")
    study(root, "first", [each.name for each in runs.folders(root)])
    study(root, "second", ["0" * 16])
    (root / "study.yaml").write_text("question: why\n")
    return root


def study(root: Path, name: str, ids: list[str]) -> None:
    folder = root / "studies" / name
    (folder / "tensorboard").mkdir(parents=True)
    (folder / "tensorboard" / "events").write_text("many")
    (folder / "study.yaml").write_text(yaml.safe_dump({"question": "which", "runs": ids}))


def packed(root: Path, *options: str) -> Path:
    out = root.parent / "runs.tar.zst"
    assert cli(["pack", str(root), str(out), *options]) == 0
    return out


def unpacked(pack: Path, into: Path) -> int:
    return cli(["unpack", str(pack), "--into", str(into)])


def told(root: Path) -> dict[str, Any]:
    """What reports read of each run."""
    return {
        each.run.id: (
            each.run,
            each.recorded,
            {name: value for name, value in each.result.items() if name != "files"},
            each.lines,
            each.lines_of("timing.jsonl"),
            {name: value.tolist() for name, value in each.arrays("learned.npz").items()},
            {name: value.tolist() for name, value in each.arrays("predictions.npz").items()},
        )
        for each in records.scan(root)[0]
    }


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def rewritten(pack: Path, change: Any) -> Path:
    """The pack with other members: ``change`` takes and returns pairs of a TarInfo and bytes."""
    with (
        pa.CompressedInputStream(pa.OSFile(str(pack), "rb"), "zstd") as stream,
        tarfile.open(fileobj=io.BytesIO(stream.read())) as tar,
    ):
        members = [(each, (tar.extractfile(each) or io.BytesIO()).read()) for each in tar]
    out = pack.with_name("changed.tar.zst")
    with (
        pa.CompressedOutputStream(pa.OSFile(str(out), "wb"), "zstd") as stream,
        tarfile.open(fileobj=stream, mode="w|") as tar,  # type: ignore[call-overload]
    ):
        for member, content in change(members):
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return out


def test_what_reports_read_comes_back(root: Path, tmp_path: Path, capsys: Shown) -> None:
    pack = packed(root)
    text = capsys.readouterr().out
    assert text.startswith(f"Packed 6 runs into {pack}")
    assert text.endswith("Left out: 1 copy, 1 interrupted.\n")
    into = tmp_path / "b" / "runs"
    assert unpacked(pack, into) == 0
    assert capsys.readouterr().out == f"Unpacked 6 runs into {into}.\n"
    assert told(into) == told(root)
    assert {each.state for each in inventory.items(into)} == {"done", "failed", "skipped"}
    names = {Path(name).name for name in contents(into)}
    assert not names & {"model.pt", "samples.npz", "checkpoint.pt", "lock", "events"}
    assert "learned.npz" in names and "corruption.npz" in names
    assert [path.name for path in (into / "studies").iterdir()] == ["first"]
    assert question.read(into) == question.read(root)
    (into / "study.yaml").write_text("question: what\n")
    assert unpacked(pack, into) == 0
    assert "study.yaml exists, differs and was kept" in capsys.readouterr().err
    assert question.read(into).text == "what"
    assert not (into / ".unpack").exists()


def test_the_same_runs_give_the_same_bytes(root: Path, tmp_path: Path) -> None:
    first = packed(root).read_bytes()
    copy = shutil.copytree(root, tmp_path / "c" / "runs", copy_function=shutil.copyfile)
    assert packed(copy).read_bytes() == first
    into = tmp_path / "b" / "runs"
    unpacked(packed(root), into)
    assert packed(into).read_bytes() == first


def test_runs_are_chosen(root: Path, capsys: Shown) -> None:
    packed(root, "--where", "row=none,seed=1")
    assert capsys.readouterr().out.startswith("Packed 1 run into")
    packed(root, "--study", "first", "--where", "state=failed")
    assert capsys.readouterr().out.startswith("Packed 1 run into")
    for options in (["--study", "third"], ["--study", "second"], ["--where", "row=flop"]):
        assert cli(["pack", str(root), str(root.parent / "x"), *options]) == USAGE
    assert not (root.parent / "x").exists()


def test_folder_and_file_may_be_left_out(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: Shown
) -> None:
    monkeypatch.chdir(root.parent)
    assert root.name == "runs"
    for given, file in (
        ([], "runs.tar.zst"),
        (["other.tar.zst"], "other.tar.zst"),
        (["runs"], "runs.tar.zst"),
        (["runs", "one"], "one"),
    ):
        assert cli(["pack", *given]) == 0
        Path(file).unlink()
    capsys.readouterr()
    for given, told in (
        (["a", "b", "c"], "expected a results folder and a file, got 3 paths"),
        (["absent", "x"], "expected a results folder, got absent"),
        (["runs", "."], "expected a file to write, got the directory ."),
    ):
        assert cli(["pack", *given]) == USAGE
        assert capsys.readouterr().err == f"augbench: {told}\n"


def test_a_run_in_use_is_left_out(root: Path, capsys: Shown) -> None:
    with runs.locked(next(each.folder for each in records.scan(root)[0] if each.done)):
        packed(root)
    assert "Packed 5 runs" in (text := capsys.readouterr().out) and "1 running" in text


def test_pieces_in_any_order_or_the_first(
    root: Path, tmp_path: Path, capsys: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = packed(root).read_bytes()
    monkeypatch.setattr("benchmarks.cli.pack.MIB", 1000)
    out = packed(root, "--piece", "2")
    pieces = sorted(root.parent.glob("runs.tar.zst.*"))
    assert not out.exists() and len(pieces) > 2
    assert all(path.stat().st_size <= 2000 for path in pieces)
    assert b"".join(path.read_bytes() for path in pieces) == whole
    assert unpacked(pieces[0], tmp_path / "b") == 0
    given = [str(path) for path in reversed(pieces)]
    assert cli(["unpack", *given, "--into", str(tmp_path / "c")]) == 0
    assert told(tmp_path / "b") == told(tmp_path / "c") == told(root)
    for missing in (pieces[1], pieces[-1]):
        missing.rename(tmp_path / "away")
        capsys.readouterr()
        assert unpacked(pieces[0], tmp_path / "d") == FAILURE
        text = capsys.readouterr().err
        assert "missing" in text or "truncated" in text
        assert len(text.splitlines()) == 1 and not (tmp_path / "d").exists()
        (tmp_path / "away").rename(missing)
    packed(root)
    assert not list(root.parent.glob("runs.tar.zst.*"))


@pytest.mark.parametrize("place", [0, 0.3, 0.6, 0.9])
def test_a_flipped_byte_is_refused(root: Path, tmp_path: Path, place: float, capsys: Shown) -> None:
    pack = packed(root)
    content = bytearray(pack.read_bytes())
    content[int(len(content) * place)] ^= 1
    pack.write_bytes(content)
    assert unpacked(pack, tmp_path / "b") == FAILURE
    assert "nothing was unpacked" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_another_sum_is_refused(root: Path, tmp_path: Path, capsys: Shown) -> None:
    def change(members: list[tuple[tarfile.TarInfo, bytes]]) -> Any:
        *others, (last, content) = members
        return [*others, (last, content[:-1] + b"!")]

    assert unpacked(rewritten(packed(root), change), tmp_path / "b") == FAILURE
    assert "does not match its checksum" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    "name",
    [
        "../0123456789abcdef/run.json",
        "/tmp/run.json",
        "0123456789abcdef/../run.json",
        "0123456789abcdef/checkpoint.pt",
        "studies/../study.yaml",
        "studies/a/b/study.yaml",
        "0123456789ABCDEF/run.json",
        "other.yaml",
        "study.yaml/study.yaml",
    ],
)
@pytest.mark.parametrize("listed", [True, False])
def test_a_path_outside_is_refused(tmp_path: Path, name: str, listed: bool, capsys: Shown) -> None:
    def change(members: list[tuple[tarfile.TarInfo, bytes]]) -> Any:
        (first, content), *others = members
        manifest = json.loads(content)
        sums = {"sha256": packing.hashlib.sha256(b"x").hexdigest(), "size": 1}
        manifest["studies"] |= {name: sums} if listed else {}
        return [
            (first, json.dumps(manifest).encode()),
            *others,
            (tarfile.TarInfo(name), b"x"),
        ]

    make_run(tmp_path / "a" / "runs")
    before = contents(tmp_path)
    pack = rewritten(packed(tmp_path / "a" / "runs"), change)
    assert unpacked(pack, tmp_path / "b" / "runs") == FAILURE
    assert repr(name) in capsys.readouterr().err
    after = {each for each in contents(tmp_path) if not each.endswith(".zst")}
    assert after == set(before)


def test_a_link_is_refused(root: Path, tmp_path: Path, capsys: Shown) -> None:
    def change(members: list[tuple[tarfile.TarInfo, bytes]]) -> Any:
        member = members[1][0]
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        return [members[0], (member, b""), *members[2:]]

    assert unpacked(rewritten(packed(root), change), tmp_path / "b") == FAILURE
    assert "is not a file" in capsys.readouterr().err


def test_a_run_that_is_there_is_kept(root: Path, tmp_path: Path, capsys: Shown) -> None:
    pack, into = packed(root), tmp_path / "b"
    unpacked(pack, into)
    same = next(each.folder for each in records.scan(into)[0] if each.done)
    (same / "timing.jsonl").write_text("")
    result = json.loads((same / "result.json").read_text())
    result["files"]["timing.jsonl"] = 0
    (same / "result.json").write_text(json.dumps(result))
    before = contents(into)
    capsys.readouterr()
    assert unpacked(pack, into) == 0
    assert capsys.readouterr().out == f"Unpacked 0 runs into {into}; 6 there already.\n"
    assert contents(into) == before


@pytest.mark.parametrize("what", ["metrics", "predictions"])
def test_other_results_of_one_id_are_refused(
    root: Path, tmp_path: Path, what: str, capsys: Shown
) -> None:
    into = tmp_path / "b"
    other = make_run(into, "none", 1, learned=True)
    if what == "metrics":
        result = json.loads((other / "result.json").read_text())
        result["metrics"]["last"]["test"]["accuracy"] += 0.01
        (other / "result.json").write_text(json.dumps(result))
    else:
        arrays = runs.read_arrays(other / "predictions.npz")
        arrays["test_last_logits"][0, 0] += 1
        np.savez(other / "predictions.npz", **arrays)  # type: ignore[arg-type]
    before = contents(other)
    assert unpacked(packed(root), into) == FAILURE
    shown = capsys.readouterr()
    assert f"{other.name}: " in shown.err and "other results" in shown.err
    assert "Unpacked 5 runs" in shown.out and "1 refused" in shown.out
    assert contents(other) == before and len(told(into)) == 6


def test_runs_of_another_machine_go_beside(root: Path, tmp_path: Path, capsys: Shown) -> None:
    into, other = tmp_path / "b" / "runs", tmp_path / "c" / "runs"
    unpacked(packed(root), into)
    make_run(other, "none", 0, device="cuda")
    make_run(other, "none", 1, device="cuda", result=OTHER)
    make_run(other, "none", 7)
    before = contents(into)
    capsys.readouterr()
    assert unpacked(packed(other), into) == 0
    text = capsys.readouterr().err
    beside = [into.with_name(f"runs-cuda-torch2.{v}-augbench0.1.0") for v in (13, 14)]
    assert [len(told(each)) for each in (into, *beside)] == [7, 1, 1]
    assert before.items() <= contents(into).items()
    assert all(f"augbench report {each}" in text for each in beside)
    assert unpacked(packed(other), into) == 0  # again: all is there
    assert "3 there already" in capsys.readouterr().out


@pytest.mark.parametrize("held", [True, False])
def test_an_interrupted_run_is_replaced_unless_in_use(
    root: Path, tmp_path: Path, held: bool, capsys: Shown
) -> None:
    into = tmp_path / "b"
    half = make_run(into, "none", 2)
    (half / "result.json").unlink()
    (half / "checkpoint.pt").write_bytes(b"half")
    pack, before = packed(root), contents(half)
    if held:
        with runs.locked(half):
            assert unpacked(pack, into) == FAILURE
        assert "is held by" in capsys.readouterr().err
        assert contents(half) == before
    else:
        assert unpacked(pack, into) == 0
        assert told(into) == told(root) and not (half / "checkpoint.pt").exists()


@pytest.mark.parametrize("after", [0, 1, 4])
def test_an_interrupted_unpack_is_repeated(
    root: Path, tmp_path: Path, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack, into, move = packed(root), tmp_path / "b", packing.move_in
    moved: list[Path] = []

    def stopping(folder: Path, target: Path) -> str:
        if len(moved) == after:
            raise KeyboardInterrupt
        moved.append(folder)
        return move(folder, target)

    with monkeypatch.context() as patch:
        patch.setattr(packing, "move_in", stopping)
        assert unpacked(pack, into) == INTERRUPTED
    assert len(told(into)) == after and not (into / ".unpack").exists()
    left = into / ".unpack" / ("0" * 16)  # as a killed process leaves it
    left.mkdir(parents=True)
    assert unpacked(pack, into) == 0
    assert told(into) == told(root) and not (into / ".unpack").exists()


def test_an_interrupted_pack_leaves_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = packed(root)
    before = contents(root.parent)
    calls: list[int] = []

    def content(self: packing.Member) -> bytes:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return self.source.read_bytes()[: self.size].ljust(self.size)

    monkeypatch.setattr(packing.Member, "content", content)
    assert cli(["pack", str(root), str(out)]) == INTERRUPTED
    assert contents(root.parent) == before


def test_a_file_that_is_no_pack(tmp_path: Path, capsys: Shown) -> None:
    (tmp_path / "x.tar.zst").write_bytes(b"something else" * 100)
    (tmp_path / "empty.tar.zst").write_bytes(b"")
    for name in ("x.tar.zst", "empty.tar.zst", "none.tar.zst"):
        assert unpacked(tmp_path / name, tmp_path / "b") == FAILURE
        text = capsys.readouterr().err
        assert name in text and len(text.splitlines()) == 1
    assert not (tmp_path / "b").exists()
    assert cli(["unpack", "--into", str(tmp_path / "b")]) == USAGE
