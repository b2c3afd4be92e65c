"""The small language: grammar, canonical form, types, errors, plug-ins, and that nothing runs."""

from __future__ import annotations

import importlib.metadata
import math
import re
import string
import subprocess
import sys
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import methods
from methods import BUILTIN, Unavailable, build, canonical
from methods.base import Chain, Method, Part
from methods.naming import (
    Call,
    Links,
    NamingError,
    bind,
    call_of,
    convert,
    from_yaml,
    parse,
    render,
    split,
    written_out,
)

BARE = [name for name in BUILTIN if name != "wrap"]
"""Methods whose name alone is a call."""
ROOT = Path(__file__).parents[1]


def sample(
    *,
    upstream: Method | None = None,
    kind: Literal["symmetric", "pair"] = "symmetric",
    flag: bool = False,
    n: int = 1,
    rate: float = 1,
    text: str = "plain",
    label: str | None = None,
    sizes: tuple[int, ...] = (1, 2),
    pair: tuple[int, float] = (1, 0.5),
    limit: float | None = None,
) -> None:
    """One argument of every kind that the language knows."""


def bound(text: str) -> dict[str, Any]:
    call = parse(text)
    assert isinstance(call, Call)
    return bind(call, sample)


class TestGrammar:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("mixup", Call("mixup")),
            ("mixup()", Call("mixup")),
            (" mixup ", Call("mixup")),
            ("mixup(alpha=0.2)", Call("mixup", (("alpha", 0.2),))),
            ("f(a=1, b=-2, c=+3)", Call("f", (("a", 1), ("b", -2), ("c", 3)))),
            ("f(a=1e-3)", Call("f", (("a", 0.001),))),
            ("f(a=True, b=None)", Call("f", (("a", True), ("b", None)))),
            ("f(a=true)", Call("f", (("a", Call("true")),))),
            ("f(a='x y', b=\"it's\")", Call("f", (("a", "x y"), ("b", "it's")))),
            ("f(a=[1, 2], b=(3,))", Call("f", (("a", (1, 2)), ("b", (3,))))),
            ("f(a=[], b=[[1], [x]])", Call("f", (("a", ()), ("b", ((1,), (Call("x"),)))))),
            ("a+b", Links((Call("a"), Call("b")))),
            ("a+(b+c)+d", Links((Call("a"), Call("b"), Call("c"), Call("d")))),
            (
                "saflex(upstream=randaugment(n=2, m=9)+flip, preset=stable)",
                Call(
                    "saflex",
                    (
                        (
                            "upstream",
                            Links((Call("randaugment", (("n", 2), ("m", 9))), Call("flip"))),
                        ),
                        ("preset", Call("stable")),
                    ),
                ),
            ),
        ],
    )
    def test_reads(self, text: str, expected: Call | Links) -> None:
        assert parse(text) == expected

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "   ",
            "3",
            "'mixup'",
            "[mixup]",
            "mixup(",
            "mixup)",
            "mixup(0.2)",
            "mixup(alpha=0.2, alpha=0.3)",
            "mixup(**{'alpha': 0.2})",
            "mixup(*[1])",
            "mixup+3",
            "mixup+'flip'",
            "mixup-flip",
            "mixup(alpha=1+2)",
            "mixup(alpha=--x)",
            "mixup(alpha=-true)",
            "mixup(alpha=-True)",
            "mixup(alpha=1j)",
            "mixup(alpha=b'x')",
            "mixup(alpha=...)",
            "mixup(alpha={'a': 1})",
            "mixup(alpha={1})",
            "mixup; flip",
            "mixup\nflip",
            "mixup\0",
            "x = 1",
        ],
    )
    def test_refuses(self, text: str) -> None:
        with pytest.raises(NamingError):
            parse(text)

    @pytest.mark.parametrize("text", ["+".join(["a"] * 20000), "(" * 5000, "f(a=" * 500])
    def test_refuses_what_is_too_deep(self, text: str) -> None:
        with pytest.raises(NamingError):
            parse(text)

    @pytest.mark.parametrize(
        "value",
        [
            "__import__('os')",
            "__import__('pathlib').Path('PATH').touch()",
            "open('PATH', 'w')",
            "os.system('touch PATH')",
            "lambda: open('PATH', 'w')",
            "[open('PATH', 'w') for x in [1]]",
            "(x := open('PATH', 'w'))",
            'f\'{open("PATH", "w")}\'',
            "open('PATH', 'w') if 1 else 2",
            "[open('PATH', 'w')][0]",
            "open('PATH', 'w') or 1",
            "not open('PATH', 'w')",
            "1 < 2",
            "a.b",
            "a[0]",
            "a().b()",
        ],
    )
    @pytest.mark.parametrize("frame", ["{}", "mixup(alpha={})", "mixup+{}"])
    def test_evaluates_nothing(self, frame: str, value: str, tmp_path: Path) -> None:
        path = tmp_path / "touched"
        with pytest.raises(NamingError):
            canonical(frame.format(value.replace("PATH", str(path))))
        assert not path.exists()

    def test_split_cuts_outside_brackets_and_quotes_only(self) -> None:
        text = "none, crop(pad=4, mode=zeros)+flip ,f(a=[1,2], b='x,(y'),, none@train+meta"
        assert split(text) == [
            "none",
            "crop(pad=4, mode=zeros)+flip",
            "f(a=[1,2], b='x,(y')",
            "none@train+meta",
        ]
        assert split("a+f(b=c+d)+e", "+") == ["a", "f(b=c+d)", "e"]
        assert split("") == []


class TestCanonicalForm:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("none", "none"),
            ("mixup(alpha=0.2)", "mixup"),
            ("mixup(alpha=1)", "mixup(alpha=1.0)"),
            ("mixup(alpha=2e-1)", "mixup"),
            ("crop(pad=4, mode='zeros')", "crop"),
            ("crop(pad=2, mode='reflect')", "crop(mode=reflect, pad=2)"),
            ("crop(mode=reflect, pad=2)", "crop(mode=reflect, pad=2)"),
            ("crop + flip( p = 0.5 )+mixup( )", "crop+flip+mixup"),
            ("flip+crop", "flip+crop"),
            ("none+crop+none", "crop"),
            ("none+none", "none"),
            ("head_refit(upstream=none)", "head_refit"),
            ("head_refit(upstream=None)", "head_refit"),
            ("head_refit(upstream=none+none)", "head_refit"),
            ("head_refit(upstream=none+(none+none()))", "head_refit"),
            ("head_refit(upstream=none+mixup(alpha=0.2))", "head_refit(upstream=mixup)"),
            (
                "head_refit(steps=10, upstream=flip(p=0.5)+crop(pad=3))",
                "head_refit(steps=10, upstream=flip+crop(pad=3))",
            ),
            (
                "head_refit(upstream=head_refit(upstream=none, steps=200))",
                "head_refit(upstream=head_refit)",
            ),
        ],
    )
    def test_of_a_method(self, text: str, expected: str) -> None:
        assert canonical(text) == expected
        assert canonical(expected) == expected

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("s(rate=1)", "s"),
            ("s(rate=1.0)", "s"),
            ("s(rate=2)", "s(rate=2.0)"),
            ("s(n=1)", "s"),
            ("s(flag=false)", "s"),
            ("s(flag=False)", "s"),
            ("s(flag=True)", "s(flag=true)"),
            ("s(sizes=(1, 2))", "s"),
            ("s(sizes=[1])", "s(sizes=[1])"),
            ("s(sizes=[])", "s(sizes=[])"),
            ("s(pair=[1, 0.5])", "s"),
            ("s(pair=[1, 2])", "s(pair=[1, 2.0])"),
            ("s(limit=none)", "s"),
            ("s(limit=0)", "s(limit=0.0)"),
            ("s(text=plain)", "s"),
            ("s(text='plain')", "s"),
            ("s(text='two words')", "s(text='two words')"),
            ("s(text='class')", "s(text='class')"),
            ("s(text='')", "s(text='')"),
            ("s(label='none')", "s(label='none')"),
            ("s(label='true')", "s(label='true')"),
            ("s(label=none)", "s"),
            ("s(text='\N{LATIN SMALL LIGATURE FI}')", "s(text='\N{LATIN SMALL LIGATURE FI}')"),
        ],
    )
    def test_of_every_kind_of_argument(self, text: str, expected: str) -> None:
        for once in (text, expected):
            assert render(call_of("s", bound(once))) == expected

    def test_is_one_id_for_one_cell(self) -> None:
        """What differs in canonical form builds a different method, and the other way round."""
        same = ["head_refit(steps=3, weight_decay=1)", "head_refit( weight_decay = 1.0,steps=3)"]
        assert len({canonical(text) for text in same}) == 1
        built = [build(text) for text in same]
        assert [(m.steps, m.weight_decay) for m in built] == [(3, 1.0)] * 2  # type: ignore[attr-defined]
        assert isinstance(built[0].weight_decay, float)

    def test_a_chain_keeps_its_order(self) -> None:
        chain = build("crop+none+flip+mixup")
        assert isinstance(chain, Chain)
        assert [type(part).__name__ for part in chain.parts()] == ["Crop", "Flip", "Mixup"]
        assert type(build("none+none")).__name__ == "NoAugmentation"
        assert type(build("none+flip")).__name__ == "Flip"


class TestTypes:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("s(kind=pair)", {"kind": "pair"}),
            ("s(kind='pair')", {"kind": "pair"}),
            ("s(flag=true)", {"flag": True}),
            ("s(n=-3)", {"n": -3}),
            ("s(rate=3)", {"rate": 3.0}),
            ("s(text=bare)", {"text": "bare"}),
            ("s(text='a b')", {"text": "a b"}),
            ("s(label=bare)", {"label": "bare"}),
            ("s(sizes=[])", {"sizes": ()}),
            ("s(sizes=[3, 4, 5])", {"sizes": (3, 4, 5)}),
            ("s(pair=(2, 1))", {"pair": (2, 1.0)}),
            ("s(limit=2)", {"limit": 2.0}),
            ("s(upstream=mixup)", {"upstream": Call("mixup")}),
            ("s(upstream=a+b)", {"upstream": Links((Call("a"), Call("b")))}),
        ],
    )
    def test_a_value_becomes_what_its_annotation_says(
        self, text: str, expected: dict[str, Any]
    ) -> None:
        got = bound(text)
        assert got == expected
        assert [type(value) for value in got.values()] == [type(v) for v in expected.values()]

    def test_arguments_come_sorted(self) -> None:
        assert list(bound("s(text=x, n=3, flag=true)")) == ["flag", "n", "text"]
        assert call_of("s", {"b": 1, "a": 2}) == Call("s", (("a", 2), ("b", 1)))

    @pytest.mark.parametrize(
        ("text", "field", "got", "allowed"),
        [
            ("s(kind=pear)", "kind", "pear", ["symmetric", "pair"]),
            ("s(flag=1)", "flag", "1", ["true or false"]),
            ("s(flag=yes)", "flag", "yes", ["true or false"]),
            ("s(n=1.5)", "n", "1.5", ["whole number"]),
            ("s(n=true)", "n", "true", ["whole number"]),
            ("s(n=True)", "n", "true", ["whole number"]),
            ("s(n=1.0)", "n", "1.0", ["whole number"]),
            ("s(rate='0.2')", "rate", "'0.2'", ["a number"]),
            ("s(rate=true)", "rate", "true", ["a number"]),
            ("s(rate=1e999)", "rate", "inf", ["a number"]),
            ("s(rate=none)", "rate", "none", ["a number"]),
            ("s(text=3)", "text", "3", ["a string"]),
            ("s(text=a+b)", "text", "a+b", ["a string"]),
            ("s(sizes=3)", "sizes", "3", ["a list of a whole number"]),
            ("s(sizes=[1, x])", "sizes", "[1, x]", ["a list of a whole number"]),
            ("s(pair=[1])", "pair", "[1]", ["a list"]),
            ("s(pair=[1, 2, 3])", "pair", "[1, 2, 3]", ["a list"]),
            ("s(limit=fast)", "limit", "fast", ["a number", "none"]),
            ("s(upstream=3)", "upstream", "3", ["a method", "none"]),
            ("s(upstream='mixup')", "upstream", "mixup", ["a method", "none"]),
        ],
    )
    def test_an_error_names_the_field_what_was_got_and_what_is_allowed(
        self, text: str, field: str, got: str, allowed: list[str]
    ) -> None:
        with pytest.raises(NamingError) as caught:
            bound(text)
        message = str(caught.value)
        assert message.startswith(f"s: {field}: expected ")
        assert message.endswith(f"got {got}")
        assert all(word in message for word in allowed)

    def test_a_whole_number_too_large_for_a_float_is_an_error(self) -> None:
        with pytest.raises(NamingError, match="rate: expected a number"):
            bound(f"s(rate={10**400})")

    def test_a_literal_is_matched_by_type_too(self) -> None:
        assert convert(1, Literal[1, 2], "x") == 1
        for value in (True, 1.0):
            with pytest.raises(NamingError, match="x: expected 1 or 2"):
                convert(value, Literal[1, 2], "x")

    def test_an_unknown_argument_suggests_the_nearest(self) -> None:
        with pytest.raises(NamingError) as caught:
            bound("s(limt=3)")
        message = str(caught.value)
        assert "'limt'" in message
        assert "did you mean 'limit'?" in message
        assert "it takes upstream, kind, flag" in message

    def test_an_unknown_method_suggests_the_nearest(self) -> None:
        for text in ("mixpu", "crop+mixpu", "head_refit(upstream=mixpu)"):
            with pytest.raises(NamingError) as caught:
                canonical(text)
            assert "unknown method 'mixpu'; did you mean 'mixup'?" in str(caught.value)
            assert "(augbench list shows all; code of your own is py:MODULE:NAME" in str(
                caught.value
            )

    def test_a_name_like_no_other_gets_no_suggestion(self) -> None:
        with pytest.raises(NamingError) as caught:
            canonical("zzzzqqqq")
        assert "did you mean" not in str(caught.value)

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("mixup(alpha=0.2", "'(' was never closed"),
            ("saflex(upstream=mixup(alpha=0.2)", "'(' was never closed"),
            ("mixup)", "unmatched ')'"),
            ("mixup alpha", "expected a name such as mixup, a call such as"),
        ],
    )
    def test_a_bracket_without_its_partner_is_named(self, text: str, reason: str) -> None:
        with pytest.raises(NamingError, match=re.escape(f"cannot read {text!r}: {reason}")):
            parse(text)

    def test_no_argument_at_all(self) -> None:
        with pytest.raises(NamingError, match="it takes no arguments"):
            canonical("none(p=1)")

    def test_an_argument_without_default_is_asked_for(self) -> None:
        def needs(*, rate: float, other: int = 1) -> None: ...

        with pytest.raises(NamingError, match="method 'f' needs rate"):
            bind(Call("f"), needs)

    @pytest.mark.parametrize(
        ("text", "word"),
        [
            ("mixup(alpha=0)", "alpha"),
            ("mixup(alpha=-1)", "alpha"),
            ("cutmix(alpha=0)", "alpha"),
            ("flip(p=1.5)", "p: expected"),
            ("crop(pad=0)", "pad"),
            ("head_refit(steps=0)", "steps"),
            ("crop+flip(p=2)", "p: expected"),
            ("head_refit(upstream=flip(p=2))", "p: expected"),
        ],
    )
    def test_a_value_out_of_range_is_an_error_of_the_same_kind(self, text: str, word: str) -> None:
        with pytest.raises(NamingError, match=word) as caught:
            build(text)
        assert "got" in str(caught.value)


class TestFiles:
    """How a study file writes names, and the values of arguments that a search tries."""

    @pytest.mark.parametrize(
        ("value", "names"),
        [
            ("none, crop+mixup(alpha=0.3)", ["none", "crop+mixup(alpha=0.3)"]),
            (["none", "crop(pad=2, mode=zeros)"], ["none", "crop(pad=2, mode=zeros)"]),
            (["none,crop", "crop"], ["none", "crop"]),
            ([["none", ["crop"]], "mixup"], ["none", "crop", "mixup"]),
            (["{crop|{mixup|cutmix}}", "none"], ["crop", "mixup", "cutmix", "none"]),
            ("f(a={1, b=2|3})", ["f(a=1, b=2)", "f(a=3)"]),
            ([], []),
            ("", []),
        ],
    )
    def test_names_written_out(self, value: Any, names: list[str]) -> None:
        assert list(written_out(value)) == names

    @pytest.mark.parametrize("value", [3, None, {}, {"mixup": {"alpha": 0.2}}, ["crop", 3]])
    def test_what_is_no_text_is_refused_with_what_was_got(self, value: Any) -> None:
        with pytest.raises(NamingError, match=r"expected a string such as .* got "):
            written_out(value)

    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            ("1e-3", 0.001),
            ("2E1", 20.0),
            (0.3, 0.3),
            (True, True),
            (None, None),
            ("reflect", Call("reflect")),
            ("crop+flip", Links((Call("crop"), Call("flip")))),
            ("mixup(alpha=1)", Call("mixup", (("alpha", 1),))),
            ("two words", "two words"),
            ([1, "x", [2]], (1, Call("x"), (2,))),
        ],
    )
    def test_a_value(self, value: Any, expected: Any) -> None:
        assert from_yaml(value) == expected
        assert type(from_yaml(value)) is type(expected)


IDENTIFIERS = st.text(string.ascii_letters + string.digits + "_", min_size=1, max_size=9).filter(
    lambda name: parse_or_none(name) == Call(name)
)
"""All names but Python's own words (``class``, ``None``, ...)."""


def parse_or_none(text: str) -> Call | Links | None:
    try:
        return parse(text)
    except NamingError:
        return None


def is_read_as_a_name(text: str) -> bool:
    """Whether a text without quotes stands for itself: then the bare name is its one form."""
    return text.isascii() and text.isidentifier()


NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
TEXTS = st.text().filter(lambda text: not is_read_as_a_name(text)) | st.sampled_from(
    ["class", "None", "True", "lambda", "none", "true", "false"]
)


def expressions(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    calls = st.builds(
        lambda name, arguments: Call(name, tuple(arguments.items())),
        IDENTIFIERS,
        st.dictionaries(IDENTIFIERS, values, max_size=3),
    )
    links = st.lists(calls, min_size=2, max_size=3).map(lambda found: Links(tuple(found)))
    return calls | links


VALUES = st.recursive(  # true, false and none are bare names until an annotation is there
    NUMBERS | TEXTS | IDENTIFIERS.map(Call),
    lambda inner: st.lists(inner, max_size=3).map(tuple) | expressions(inner),
    max_leaves=8,
)
QUICK = settings(max_examples=150, deadline=None, derandomize=True, database=None)


class TestRoundTrip:
    @QUICK
    @given(expressions(VALUES))
    def test_parse_undoes_render(self, expression: Call | Links) -> None:
        again = parse(render(expression))
        assert again == expression
        assert render(again) == render(expression)

    @QUICK
    @given(
        st.fixed_dictionaries(
            {},
            optional={
                "kind": st.sampled_from(["symmetric", "pair"]),
                "flag": st.booleans(),
                "n": st.integers(),
                "rate": st.floats(allow_nan=False, allow_infinity=False),
                "text": st.text(),
                "label": st.none() | st.text(),
                "sizes": st.lists(st.integers(), max_size=3).map(tuple),
                "limit": st.none() | st.floats(allow_nan=False, allow_infinity=False),
            },
        )
    )
    def test_bound_arguments_survive_their_text(self, arguments: dict[str, Any]) -> None:
        """Whatever a constructor may get, its canonical text gives back, unless it is a default."""
        first = bind(Call("s", tuple(arguments.items())), sample)
        again = bound(render(call_of("s", first)))
        assert again == first
        defaults = {name: each.default for name, each in signature(sample).parameters.items()}
        assert {**defaults, **again} == {**defaults, **arguments}

    @QUICK
    @given(st.text(max_size=30))
    def test_any_text_is_read_or_refused(self, text: str) -> None:
        try:
            found = parse(text)
        except NamingError:
            return
        assert parse(render(found)) == found


class Patched:
    """Entry points of our group replaced; ``registry`` forgets them afterwards."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self._monkeypatch, self._folder = monkeypatch, folder
        monkeypatch.syspath_prepend(folder)
        self._real = importlib.metadata.entry_points

    def __call__(self, points: dict[str, str], **files: str) -> None:
        for name, text in files.items():
            (self._folder / f"{name}.py").write_text(text, encoding="utf-8")
            self._monkeypatch.delitem(sys.modules, name, raising=False)

        def entry_points(**chosen: str) -> Any:
            if chosen.get("group") != methods.GROUP:
                return self._real(**chosen)
            return [
                importlib.metadata.EntryPoint(name, value, methods.GROUP)
                for name, value in points.items()
            ]

        self._monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
        methods.registry.cache_clear()


@pytest.fixture
def plug_ins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    yield Patched(monkeypatch, tmp_path)
    monkeypatch.undo()
    methods.registry.cache_clear()


GOOD = '''
from methods.base import Batch, Context, Method


class Twice(Method):
    """Train on the batch as it is.

    More.
    """

    source = "Nobody, 2026"

    def __init__(self, *, rate: float = 1) -> None:
        super().__init__()
        self.rate = rate

    def augment(self, batch: Batch, ctx: Context) -> Batch:
        return batch


def preset(*, rate: float = 2.0) -> Method:
    """Twice, faster."""
    return Twice(rate=rate)


def wrong() -> int:
    return 3


not_callable = 3
'''


class TestPlugIns:
    def test_a_plug_in_is_a_method_like_any_other(self, plug_ins: Patched) -> None:
        plug_ins({"twice": "pkg_good:Twice", "faster": "pkg_good:preset"}, pkg_good=GOOD)
        assert list(methods.registry()) == [*BUILTIN, "faster", "twice"]
        assert methods.registry()["twice"].kind == "plug-in"
        told = ("Train on the batch as it is.", "Nobody, 2026", "", ("rate=1",), (), ())
        assert methods.summary("twice") == told
        assert methods.summary("faster")[:3] == ("Twice, faster.", "", "")
        assert "pkg_good" not in sys.modules, "a summary imports nothing"
        assert canonical("twice(rate=1)+crop") == "twice+crop"
        chain = build("crop+twice(rate=3)")
        assert [type(part).__name__ for part in chain.parts()] == ["Crop", "Twice"]
        assert build("faster").rate == 2.0  # type: ignore[attr-defined]

    @pytest.mark.parametrize(
        "line",
        [
            "raise ImportError('no such library')",
            "raise RuntimeError('no such library')",
            "import sys; sys.exit('no such library')",
            "assert False, 'no such library'",
        ],
    )
    def test_one_that_fails_at_import_is_unavailable_and_alone(
        self, plug_ins: Patched, line: str
    ) -> None:
        plug_ins(
            {"broken": "pkg_broken:Twice", "twice": "pkg_good:Twice"},
            pkg_good=GOOD,
            pkg_broken=f"{line}\n{GOOD}",
        )
        for act in (methods.load, canonical, build):
            with pytest.raises(Unavailable) as caught:
                act("broken")
            assert "'broken' is unavailable: pkg_broken:Twice: " in str(caught.value)
            assert "no such library" in str(caught.value)
        for name in ("twice", *BARE):
            assert canonical(name) == name
            assert isinstance(build(name), Part)
            assert methods.summary(name).reason == ""

    @pytest.mark.parametrize(
        ("target", "files", "reason"),
        [
            ("pkg_absent:Twice", {}, "pkg_absent"),
            ("pkg_absent.deep:Twice", {}, "pkg_absent"),
            ("pkg_good.deep:Twice", {"pkg_good": "raise OSError('disk on fire')"}, "disk on fire"),
            ("pkg_good:Twice", {"pkg_good": "class Twice(:\n"}, "SyntaxError"),
        ],
    )
    def test_what_cannot_be_found_has_a_reason(
        self, plug_ins: Patched, target: str, files: dict[str, str], reason: str
    ) -> None:
        plug_ins({"lost": target}, **files)
        summary = methods.summary("lost")
        assert summary.reason.startswith(f"{target}: ")
        assert reason in summary.reason
        with pytest.raises(Unavailable, match=reason):
            methods.load("lost")
        assert all(not methods.summary(name).reason for name in BUILTIN)

    def test_what_its_module_only_passes_on_is_available(self, plug_ins: Patched) -> None:
        """A package shows its class where a reader of its file finds an import, not a class."""
        plug_ins(
            {"twice": "pkg_front:Twice", "other": "pkg_front:Other", "third": "pkg_front:THIRD"},
            pkg_good=GOOD,
            pkg_front="from pkg_good import Twice, Twice as Other\nTHIRD = Twice\n",
        )
        for name in ("twice", "other", "third"):
            found = methods.summary(name)
            assert found.reason == ""
            assert found.first_line.endswith(methods.registry()[name].target)
            assert isinstance(build(name), Method)

    def test_what_its_module_does_not_have_is_unavailable(self, plug_ins: Patched) -> None:
        plug_ins({"lost": "pkg_good:Thrice"}, pkg_good=GOOD)
        with pytest.raises(Unavailable, match=r"pkg_good:Thrice: AttributeError: .*Thrice"):
            methods.load("lost")

    def test_a_built_in_name_cannot_be_taken(self, plug_ins: Patched) -> None:
        plug_ins({"mixup": "pkg_good:Twice", "zebra": "pkg_good:Twice"}, pkg_good=GOOD)
        assert methods.registry()["mixup"] == BUILTIN["mixup"]
        assert type(build("mixup")).__name__ == "Mixup"

    @pytest.mark.parametrize("name", ["wrong", "not_callable"])
    def test_what_is_no_method_is_refused(self, plug_ins: Patched, name: str) -> None:
        plug_ins({"odd": f"pkg_good:{name}"}, pkg_good=GOOD)
        with pytest.raises(NamingError, match="odd"):
            build("odd")

    def test_annotations_that_cannot_be_resolved_are_told(self, plug_ins: Patched) -> None:
        text = GOOD.replace("rate: float = 1)", "rate: Rate = 1)")
        plug_ins(
            {"twice": "pkg_hidden:Twice"}, pkg_hidden=f"from __future__ import annotations\n{text}"
        )
        with pytest.raises(NamingError, match="Rate"):
            canonical("twice")

    def test_a_chain_of_two_losses_is_refused_as_a_name(self, plug_ins: Patched) -> None:
        losses = "\n    def losses(self, logits, batch, ctx):\n        return logits.sum(1)\n"
        text = GOOD.replace("\n\n\ndef preset", f"\n{losses}\n\ndef preset")
        plug_ins({"own": "pkg_own:Twice"}, pkg_own=text)
        assert isinstance(build("own+crop"), Chain)
        with pytest.raises(NamingError, match="loss"):
            build("own+own")


class TestSummary:
    def test_of_every_built_in_without_importing_anything_heavy(self) -> None:
        code = (
            "import sys, methods\n"
            "for name in methods.registry():\n"
            "    found = methods.summary(name)\n"
            "    assert not found.reason, found\n"
            "    assert len(found.first_line) > 10 and found.first_line[-1] in '.:', found\n"
            "heavy = {'torch', 'numpy', 'kornia', 'scipy', 'pandas', 'ray'} & set(sys.modules)\n"
            "assert not heavy, heavy\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr

    @pytest.mark.parametrize("name", BUILTIN)
    def test_says_what_the_class_says(self, name: str) -> None:
        summary, found = methods.summary(name), methods.load(name)
        assert (found.__doc__ or "").startswith(summary.first_line)
        if isinstance(found, type):
            assert summary.source == vars(found).get("source", "")
        else:
            assert summary.source and f"Source: {summary.source}" in (found.__doc__ or "")
        assert summary.presets == tuple(getattr(found, "presets", ()))
        if name != "wrap":  # which needs an argument
            assert summary.costs == tuple(build(name).costs.values())
        defaults = {
            each.name: render(each.default)
            for each in signature(found).parameters.values()
            if each.kind is each.KEYWORD_ONLY and each.default is not each.empty
        }
        needed = {"call": "..."} if name == "wrap" else {}
        assert dict(each.split("=", 1) for each in summary.takes) == defaults | needed

    @pytest.mark.parametrize("name", BARE)
    def test_every_default_is_its_own_canonical_form(self, name: str) -> None:
        assert canonical(name) == name
        assert isinstance(build(name), Part)

    def test_versions_name_every_class_of_a_chain(self) -> None:
        found = methods.versions("head_refit(upstream=crop+mixup)")
        assert set(found) == {"Crop", "Mixup", "HeadRefit"}
        assert all(version >= 1 for version in found.values())

    def test_an_edit_of_a_method_of_others_is_another_version(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = tmp_path / "their_method.py"
        text = (
            "from methods.base import Method\n\n\nclass Theirs(Method):\n"
            "    def __init__(self, *, p: float = 0.5) -> None:\n        super().__init__()\n\n"
            "    def augment(self, batch, ctx):\n        return batch\n\n\n"
            "def made(*, p: float = 0.5) -> Theirs:\n    return Theirs(p=p)\n"
        )
        file.write_text(text)
        monkeypatch.syspath_prepend(str(tmp_path))
        entries = {
            name: methods.Entry(f"their_method:{target}", "plug-in")
            for name, target in (("theirs", "Theirs"), ("made", "made"))
        }
        monkeypatch.setattr(methods, "registry", lambda: {**BUILTIN, **entries})
        first = methods.versions("theirs")
        file.write_text(f"# of mine\n{text}")
        assert methods.versions("theirs") == first, "a comment changes no number"
        assert first == methods.versions("theirs(p=0.5)") and set(first) == {"their_method.Theirs"}
        assert set(methods.versions("made")) == {"their_method.Theirs", "their_method.made"}
        file.write_text(text.replace("return batch", "return 1 * batch"))
        assert methods.versions("theirs") != first
        file.write_text(text)
        assert methods.versions("theirs") == first
        monkeypatch.setattr(methods.load("theirs"), "version", 2)
        assert methods.versions("theirs") != first


def test_numbers_are_written_so_that_nothing_is_lost() -> None:
    for value in (0.1 + 0.2, 1e-300, math.pi, 1e22, -5e-324):
        read: Callable[[str], Call | Links] = parse
        again = read(f"f(a={render(value)})")
        assert isinstance(again, Call)
        assert again.arguments == (("a", value),)
