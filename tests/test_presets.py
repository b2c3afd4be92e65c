"""Presets in the language: their meaning, their one written form, errors, their place in ids."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import pytest

import methods
from analysis.runs import Run
from benchmarks.data.names import parse_benchmark
from benchmarks.data.splits import Protocol
from benchmarks.studies.cells import make_cell, parse_row, training_of
from methods import BUILTIN, Entry, build, canonical
from methods.base import Batch, Chain, Context, Method
from methods.naming import Call, NamingError, parse


class Sample(Method):
    """A method with presets: one sets what another sets, two are equal, one holds whole numbers."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "published": {},
        "stable": {"labels": "prox", "refresh": 4},
        "fast": {"labels": "prox", "refresh": 4, "flag": True},
        "twin": {"refresh": 4, "labels": "prox"},
        "wide": {"limit": 2, "beta": 3, "refresh": 2},
    }

    def __init__(
        self,
        *,
        upstream: Method | None = None,
        labels: Literal["keep", "prox"] = "keep",
        beta: float = 1.0,
        refresh: int = 1,
        flag: bool = False,
        limit: float | None = None,
    ) -> None:
        super().__init__(upstream)
        self.labels, self.beta, self.refresh = labels, beta, refresh
        self.flag, self.limit = flag, limit

    def augment(self, batch: Batch, ctx: Context) -> Batch:
        return batch if self.upstream is None else self.upstream.augment(batch, ctx)


class Strict(Method):
    """A method with a preset and an argument that has no default."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"plain": {}, "low": {"rate": 0.5}}

    def __init__(self, *, rate: float) -> None:
        super().__init__()
        if rate < 0:
            raise ValueError(f"rate: expected a number of 0 or more, got {rate}")
        self.rate = rate

    def augment(self, batch: Batch, ctx: Context) -> Batch:
        return batch


def wrapped(*, preset: str = "soft") -> Method:
    """A registered function, whose ``preset`` is an argument like any other."""
    return Sample(beta=2.0 if preset == "hard" else 1.0)


DEFAULTS = {"labels": "keep", "beta": 1.0, "refresh": 1, "flag": False, "limit": None}


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The methods above under the names sample, strict and wrapped."""
    own = {
        "sample": Entry(f"{__name__}:Sample", "plug-in"),
        "strict": Entry(f"{__name__}:Strict", "plug-in"),
        "wrapped": Entry(f"{__name__}:wrapped", "plug-in"),
    }
    monkeypatch.setattr(methods, "registry", lambda: {**BUILTIN, **own})


def settings_of(method: Method) -> dict[str, Any]:
    assert isinstance(method, Sample)
    return {name: getattr(method, name) for name in DEFAULTS}


def sample(text: str) -> dict[str, Any]:
    return settings_of(build(text))


class TestMeaning:
    @pytest.mark.parametrize(
        ("text", "changed"),
        [
            ("sample", {}),
            ("sample(preset=published)", {}),
            ("sample(preset=stable)", {"labels": "prox", "refresh": 4}),
            ("sample(preset='stable')", {"labels": "prox", "refresh": 4}),
            ("sample(preset=stable, beta=2)", {"labels": "prox", "refresh": 4, "beta": 2.0}),
            ("sample(refresh=7, preset=stable)", {"labels": "prox", "refresh": 7}),
            ("sample(preset=stable, labels=keep)", {"refresh": 4}),
            ("sample(preset=fast, flag=false, refresh=1)", {"labels": "prox"}),
            ("sample(preset=wide)", {"limit": 2.0, "beta": 3.0, "refresh": 2}),
            ("sample(preset=wide, limit=none)", {"beta": 3.0, "refresh": 2}),
        ],
    )
    def test_a_preset_sets_arguments_and_explicit_ones_win(
        self, text: str, changed: dict[str, Any]
    ) -> None:
        got = sample(text)
        assert got == DEFAULTS | changed
        assert type(got["beta"]) is float
        assert type(got["limit"]) in (float, type(None))

    def test_inside_other_methods_and_in_chains(self) -> None:
        nested = build("head_refit(upstream=sample(preset=stable, upstream=sample(preset=fast)))")
        inner, middle, _ = nested.parts()
        assert settings_of(inner) == sample("sample(preset=fast)")
        assert settings_of(middle) == sample("sample(preset=stable)")
        chain = build("crop+sample(preset=stable)+sample(preset=published)")
        assert isinstance(chain, Chain)
        _, first, second = chain.parts()
        assert settings_of(first) == sample("sample(preset=stable)")
        assert settings_of(second) == DEFAULTS

    def test_a_preset_may_give_what_has_no_default(self) -> None:
        assert canonical("strict(rate=0.5)") == canonical("strict(preset=low)")
        assert canonical("strict(preset=low, rate=2)") == "strict(rate=2.0)"
        assert vars(build("strict(preset=low)"))["rate"] == 0.5
        for text in ("strict", "strict(preset=plain)"):
            with pytest.raises(NamingError, match="method 'strict' needs rate"):
                canonical(text)

    def test_of_a_function_preset_is_an_argument_like_any_other(self) -> None:
        assert canonical("wrapped(preset=soft)") == "wrapped"
        assert canonical("wrapped(preset=hard)") == "wrapped(preset=hard)"
        assert sample("wrapped(preset=hard)")["beta"] == 2.0
        found = methods.versions("wrapped(preset=hard)")
        assert set(found) == {f"{__name__}.Sample", f"{__name__}.{wrapped.__qualname__}"}


class TestCanonicalForm:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("sample(preset=published)", "sample"),
            ("sample(preset='published', beta=1)", "sample"),
            ("sample(preset=stable)", "sample(preset=stable)"),
            ("sample(preset='stable')", "sample(preset=stable)"),
            ("sample(preset=twin)", "sample(preset=stable)"),
            ("sample(refresh=4, labels=prox)", "sample(preset=stable)"),
            ("sample(labels=prox)", "sample(labels=prox)"),
            ("sample(preset=stable, labels=prox, beta=1.0)", "sample(preset=stable)"),
            ("sample(preset=stable, labels=keep)", "sample(refresh=4)"),
            ("sample(preset=stable, flag=true)", "sample(preset=fast)"),
            ("sample(preset=fast, flag=false)", "sample(preset=stable)"),
            ("sample(preset=fast, labels=keep)", "sample(labels=keep, preset=fast)"),
            (
                "sample(preset=stable, refresh=5, beta=2)",
                "sample(beta=2.0, preset=stable, refresh=5)",
            ),
            ("sample(preset=fast, beta=2)", "sample(beta=2.0, preset=fast)"),
            ("sample(beta=3, limit=2, refresh=2)", "sample(preset=wide)"),
            ("sample(preset=wide, limit=none)", "sample(limit=none, preset=wide)"),
            ("sample(preset=wide, beta=1, limit=none)", "sample(refresh=2)"),
            ("sample(preset=stable, upstream=none+none)", "sample(preset=stable)"),
            (
                "sample(upstream=crop(pad=4)+sample(preset=published), preset=twin)",
                "sample(preset=stable, upstream=crop+sample)",
            ),
            (
                "head_refit(upstream=sample(labels=prox, refresh=4))",
                "head_refit(upstream=sample(preset=stable))",
            ),
            (
                "flip+sample(refresh=4, labels=prox)+none+sample(preset=published)",
                "flip+sample(preset=stable)+sample",
            ),
        ],
    )
    def test_is_the_preset_that_leaves_the_fewest_arguments(self, text: str, expected: str) -> None:
        assert canonical(text) == expected
        assert canonical(expected) == expected

    def test_a_preset_that_repeats_a_default_is_the_bare_name(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        same = {"published": {}, "same": {"beta": 1, "labels": "keep"}}
        monkeypatch.setattr(Sample, "presets", same)
        assert canonical("sample(preset=same)") == "sample"
        assert canonical("sample(preset=same, flag=true)") == "sample(flag=true)"

    def test_a_name_that_is_no_word_is_quoted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        named = {"published": {}, "as in 2.1": {"flag": True}, "none": {"beta": 2.0}}
        monkeypatch.setattr(Sample, "presets", named)
        assert canonical("sample(flag=true)") == "sample(preset='as in 2.1')"
        assert canonical("sample(preset='as in 2.1')") == "sample(preset='as in 2.1')"
        assert canonical("sample(preset=none)") == "sample(preset='none')"
        assert sample("sample(preset='none')")["beta"] == 2.0

    def test_is_one_for_one_meaning_and_as_short_as_can_be(self) -> None:
        """Every setting of four arguments, under every preset, against a dictionary's union."""
        choices: dict[str, dict[str, Any]] = {
            "preset": {"": {}, **{name: dict(made) for name, made in Sample.presets.items()}},
            "labels": {"": None, "keep": "keep", "prox": "prox"},
            "refresh": {"": None, "1": 1, "2": 2, "4": 4},
            "flag": {"": None, "true": True, "False": False},
            "limit": {"": None, "none": None, "2": 2.0},
        }
        meanings: dict[str, dict[str, Any]] = {}
        for words in itertools.product(*choices.values()):
            given = {name: word for name, word in zip(choices, words, strict=True) if word}
            text = f"sample({', '.join(f'{name}={word}' for name, word in given.items())})"
            explicit = {name: choices[name][word] for name, word in given.items()}
            meaning = DEFAULTS | explicit.pop("preset", {}) | explicit
            written = canonical(text)
            assert sample(text) == meaning, text
            if written in meanings:
                assert meanings[written] == meaning, f"{written} has two meanings"
                continue
            assert canonical(written) == written
            assert sample(written) == meaning
            assert meaning not in meanings.values(), f"{text} has two canonical forms"
            meanings[written] = meaning
            call = parse(written)
            assert isinstance(call, Call)
            fewest = min(
                sum(meaning[name] != value for name, value in (DEFAULTS | dict(made)).items())
                for made in Sample.presets.values()
            )
            assert len([name for name, _ in call.arguments if name != "preset"]) == fewest
        assert len(meanings) == 2 * 3 * 2 * 2 * 2, "beta is 1 or, in wide, 3"


class TestErrors:
    def test_an_unknown_preset_suggests_the_nearest(self) -> None:
        for text in ("sample(preset=stabel)", "crop+head_refit(upstream=sample(preset='stabel'))"):
            for act in (canonical, build, methods.versions):
                with pytest.raises(NamingError) as caught:
                    act(text)
                assert str(caught.value) == (
                    "unknown preset 'stabel'; did you mean 'stable'? "
                    "(known: fast, published, stable, twin, wide)"
                )

    @pytest.mark.parametrize("value", ["3", "true+stable", "[stable]", "stable(a=1)", "None"])
    def test_what_is_no_name_is_told_what_is_expected(self, value: str) -> None:
        with pytest.raises(NamingError) as caught:
            canonical(f"sample(preset={value})")
        message = str(caught.value)
        assert message.startswith(
            "sample: preset: expected published or stable or fast or twin or wide, got "
        )

    def test_a_method_without_presets_does_not_know_the_argument(self) -> None:
        with pytest.raises(NamingError) as caught:
            canonical("mixup(preset=stable)")
        assert str(caught.value) == "method 'mixup' has no argument 'preset' (it takes alpha)"
        with pytest.raises(NamingError) as caught:
            canonical("mixup(alhpa=1)")
        assert "preset" not in str(caught.value)

    def test_an_unknown_argument_lists_preset_among_the_known(self) -> None:
        with pytest.raises(NamingError) as caught:
            canonical("sample(pre_set=stable)")
        assert str(caught.value) == (
            "method 'sample' has no argument 'pre_set'; did you mean 'preset'? "
            "(it takes upstream, labels, beta, refresh, flag, limit, preset)"
        )

    @pytest.mark.parametrize(
        ("broken", "message"),
        [
            (
                {"published": {}, "stable": {"refesh": 4}},
                "preset 'stable' of Sample has no argument 'refesh'; did you mean 'refresh'? "
                "(it takes upstream, labels, beta, refresh, flag, limit)",
            ),
            (
                {"published": {}, "stable": {"refresh": 0.5}},
                "preset 'stable' of Sample: refresh: expected a whole number, got 0.5",
            ),
            (
                {"published": {}, "stable": {"preset": "published"}},
                "preset 'stable' of Sample has no argument 'preset'",
            ),
            (
                {"stable": {"refresh": 4}, "published": {}},
                "preset 'stable' of Sample: expected no arguments, because the first preset "
                "means the bare name, got refresh",
            ),
        ],
    )
    @pytest.mark.parametrize("text", ["sample", "sample(preset=stable)"])
    def test_a_faulty_preset_is_told_with_class_and_name(
        self,
        broken: dict[str, dict[str, Any]],
        message: str,
        text: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(Sample, "presets", broken)
        with pytest.raises(NamingError) as caught:
            build(text)
        assert str(caught.value).startswith(message)

    def test_an_error_of_the_constructor_names_the_call_as_it_is_written(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Strict, "presets", {"plain": {}, "low": {"rate": -1.0}})
        with pytest.raises(NamingError) as caught:
            build("strict(rate=-1)")
        assert str(caught.value) == (
            "method 'strict(preset=low)': rate: expected a number of 0 or more, got -1.0"
        )


def hashed(content: Mapping[str, Any]) -> int:
    text = json.dumps(dict(content), sort_keys=True).encode()
    return int(hashlib.sha256(text).hexdigest()[:12], 16)


def identity(text: str) -> str:
    row = parse_row(text, Protocol())
    training = training_of("medmnist", {})
    cell = make_cell(
        row, parse_benchmark("digits"), "small_cnn", training, Protocol(), 0, checksum="abc"
    )
    return cell.run.id


class TestVersions:
    STABLE = f"{__name__}.Sample.stable"
    FAST = f"{__name__}.Sample.fast"

    def test_hold_a_hash_of_every_preset_in_the_expression(self) -> None:
        own = methods.versions("sample")  # a class that is not ours: its version, and its code
        assert set(own) == {f"{__name__}.Sample"}
        stable, fast = (hashed(Sample.presets[name]) for name in ("stable", "fast"))
        assert hashed({"refresh": 4, "labels": "prox"}) == stable
        for text, expected in {
            "sample": own,
            "sample(preset=published)": own,
            "sample(labels=prox)": own,
            "sample(preset=stable)": own | {self.STABLE: stable},
            "sample(refresh=4, labels=prox)": own | {self.STABLE: stable},
            "sample(beta=2.0, preset=stable)": own | {self.STABLE: stable},
            "crop+sample(preset=fast)": own | {"Crop": 1, self.FAST: fast},
            "sample(preset=stable, upstream=crop+sample(preset=fast))": (
                own | {"Crop": 1, self.STABLE: stable, self.FAST: fast}
            ),
        }.items():
            assert methods.versions(text) == expected, text
        # printf '{"labels": "prox", "refresh": 4}' | sha256sum | cut -c1-12
        assert stable == 0x81CC4FDE9393

    def test_without_presets_are_what_they_always_were(self) -> None:
        """A run of an earlier release must find its directory again."""
        for text, versions, identifier in (
            ("none", {"NoAugmentation": 1}, "719387dea7f5abae"),
            ("crop+mixup(alpha=0.3)", {"Crop": 1, "Mixup": 1}, "01e195db87a48152"),
        ):
            assert methods.versions(text) == versions
            run = Run(
                benchmark="digits",
                data="abc",
                model="small_cnn",
                method=canonical(text),
                versions={"trainer": 1, "model": 1, **methods.versions(text)},
            )
            assert run.id == identifier

    def test_a_run_is_another_one_where_its_preset_has_other_content(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        texts = [
            "sample",
            "sample(beta=2)",
            "sample(preset=fast)",
            "sample(preset=stable)",
            "head_refit(upstream=sample(preset=stable))",
            "crop+sample(preset=stable, beta=2)",
        ]
        before = [identity(text) for text in texts]
        assert len(set(before)) == len(before)
        assert before == [identity(text) for text in texts]
        changed = dict(Sample.presets) | {"stable": {"labels": "prox", "refresh": 3}}
        monkeypatch.setattr(Sample, "presets", changed)
        same = [one == identity(text) for one, text in zip(before, texts, strict=True)]
        assert same == [True, True, True, False, False, False]
