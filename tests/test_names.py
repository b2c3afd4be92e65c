"""Names of benchmarks: paths as people have them, in lists, in study files, and printed back."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.data.names import (
    canonical,
    listed,
    names_in,
    parse_benchmark,
)
from methods.naming import NamingError, with_path

NAMES = (
    "set (1)",
    "a,b",
    "lr=0.1",
    "x|y",
    "{a}",
    "{a",
    "a}b",
    "-dash",
    "Ünï côde",
    "it's",
    'say "hi"',
    "100% #2",
    "set(size=64)",
    "run(folds=5) [v2]",
    "a, b, c",
    "back\\slash",
    "new\nline",
    "'quoted'",
    '"quoted"',
    "gr\udcfcn",
)
"""Folder names as browsers, sweeps and people make them; the last holds a byte of Latin-1."""


@pytest.fixture(params=NAMES, ids=ascii)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    made = tmp_path / request.param
    made.mkdir()
    return made


def test_a_folder_that_exists_is_named_by_its_path(folder: Path) -> None:
    found = parse_benchmark(f"folder:{folder}")
    assert (found.path, canonical(found)) == (str(folder), "folder")


def test_arguments_stand_behind_any_path(folder: Path) -> None:
    found = parse_benchmark(f"folder:{folder}(size=64, folds=5)")
    assert (found.path, found.size, found.folds) == (str(folder), 64, 5)


def test_a_list_holds_a_path_with_any_sign(folder: Path) -> None:
    text = f"folder:{folder}(size=64)"
    for given in (f"digits, {text} ,breastmnist(size=64)", f"digits,{text},breastmnist(size=64)"):
        assert names_in(given) == ["digits", text, "breastmnist(size=64)"]
    assert listed([f"folder:{folder}", "{breast|path}mnist"]) == (
        f"folder:{folder}",
        "breastmnist",
        "pathmnist",
    )


def test_quotes_say_the_path_whether_it_exists_or_not(folder: Path) -> None:
    for path in (folder, Path(f"{folder} elsewhere")):
        for text in (f"folder:{str(path)!r}", with_path("folder", str(path))):
            assert parse_benchmark(text).path == str(path)
            found = names_in(f"{text},digits")
            assert [parse_benchmark(each).path for each in found] == [str(path), ""]


def test_what_is_printed_is_read_back(folder: Path) -> None:
    found = parse_benchmark(f"folder:{folder}(size=64, groups=1)")
    printed = with_path(canonical(found), found.path)
    assert parse_benchmark(printed) == found
    assert listed([printed, "digits"]) == (printed, "digits")


def test_a_plain_path_needs_no_quotes() -> None:
    assert with_path("npz(noise=0.4)", "/data/my scans.npz") == "npz:/data/my scans.npz(noise=0.4)"
    assert with_path("folder", "/data/a,b") == "folder:'/data/a,b'"


def test_two_readings_that_both_exist_are_asked_for(tmp_path: Path) -> None:
    for name in ("set", "set(size=64)"):
        (tmp_path / name).mkdir()
    with pytest.raises(NamingError) as caught:
        parse_benchmark(f"folder:{tmp_path}/set(size=64)")
    text = str(caught.value)
    assert "both paths exist" in text
    assert (
        f"folder:'{tmp_path}/set(size=64)'" in text and f"folder:'{tmp_path}/set'(size=64)" in text
    )
    assert parse_benchmark(f"folder:'{tmp_path}/set'(size=64)").size == 64
    assert parse_benchmark(f"folder:'{tmp_path}/set(size=64)'").size == 28


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("folder:", ["expected a path after folder:"]),
        ("npz:''", ["expected a path after npz:"]),
        ("folder:/nowhere(sise=64)", ["no argument 'sise'", "did you mean 'size'"]),
        ("folder:/nowhere(size=)", ["cannot read", "(size=)"]),
        ("folder:/nowhere(size=64", ["cannot read"]),
        ("folder:'/nowhere\\x'", ["cannot read", "a path in quotes"]),
        ("npz:/nowhere(groups=1)", ["groups: expected none", "train_groups"]),
        ("folder:/nowhere(groups='/a/b.csv')", ["groups: expected a file by its path from the"]),
        ("folder:/nowhere(groups='')", ["groups: expected a file by its path", "got ''"]),
        ("folder:/nowhere(groups='~/b.csv')", ["groups: expected a file by its path"]),
        ("folder:~nobody-here/x", ["there is no such home directory"]),
        ("folder:/nowhere(groups=-1)", ["groups: expected a number from 0 to 9", "got -1"]),
    ],
)
def test_what_cannot_be_read_is_told(text: str, words: list[str]) -> None:
    with pytest.raises(NamingError) as caught:
        parse_benchmark(text)
    assert all(word in str(caught.value) for word in words), caught.value


def test_commas_of_arguments_end_no_name(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, other = f"folder:{tmp_path}/b", f"folder:{tmp_path}/a(size=64, folds=5)"
    for texts in ((one, other), (other, one), (one, "digits(noise=0.2, folds=5)")):
        assert names_in(", ".join(texts)) == list(texts)
        assert listed(", ".join(texts)) == texts
    assert parse_benchmark("folder:/nowhere(size=64, folds=5)").path == "/nowhere"


def test_a_file_of_patients_has_one_spelling() -> None:
    spelled = [parse_benchmark(f"folder:/x(groups='{t}p.csv:id')") for t in ("", "./", "a/../")]
    assert {canonical(each) for each in spelled} == {"folder(groups='p.csv:id')"}


def test_paths_that_do_not_exist_are_cut_as_names_are() -> None:
    assert names_in("folder:/no/a,folder:/no/b(size=64),digits") == [
        "folder:/no/a",
        "folder:/no/b(size=64)",
        "digits",
    ]
    assert listed("folder:/no/{a|b}, digits") == ("folder:/no/a", "folder:/no/b", "digits")
    assert names_in(" ,digits,, ") == ["digits"]
    assert names_in("") == []
