# SPDX-License-Identifier: Apache-2.0
"""The pattern language."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import remattools as rt
from remattools.rules.paths import NamePattern, Pattern, find_closest, format_path, make_natural_key, match, parse_path

PATHS = [
    (),
    ("layers",),
    *[("layers", i) for i in range(5)],
    *[("layers", i, "attn") for i in range(5)],
    *[("layers", i, "attn", "q_proj") for i in range(5)],
    ("head",),
]
CLASSES = [("Model",), ("List",), *[("Block",)] * 5, *[("Attention", "Base")] * 5, *[("Linear",)] * 5, ("Linear",)]


def hits(text):
    return [format_path(PATHS[i]) for i in match(Pattern.parse(text), PATHS, CLASSES)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (".", ["."]),
        ("layers.*", [f"layers.{i}" for i in range(5)]),
        ("layers.[:-1]", [f"layers.{i}" for i in range(4)]),
        ("layers.[-1]", ["layers.4"]),
        ("layers.[::2].attn", [f"layers.{i}.attn" for i in (0, 2, 4)]),
        ("[1]", ["layers.1"]),
        ("q_proj", [f"layers.{i}.attn.q_proj" for i in range(5)]),
        ("q_*", [f"layers.{i}.attn.q_proj" for i in range(5)]),
        ("**.attn", [f"layers.{i}.attn" for i in range(5)]),
        ("layers.*.attn", [f"layers.{i}.attn" for i in range(5)]),
        ("layers.3.**", ["layers.3", "layers.3.attn", "layers.3.attn.q_proj"]),
        ("{head,layers.{0,4}}", ["layers.0", "layers.4", "head"]),
        ("layers.*.**:Linear", [f"layers.{i}.attn.q_proj" for i in range(5)]),
        (":Linear", [*[f"layers.{i}.attn.q_proj" for i in range(5)], "head"]),
        ("**:Base", [f"layers.{i}.attn" for i in range(5)]),
        ("layers.[1:3]:Block", ["layers.1", "layers.2"]),
        ("layers.*:Linear", []),
        ("ayers.*", []),
    ],
)
def test_patterns(text, expected):
    assert hits(text) == expected


def test_two_stars_match_everything():
    assert len(hits("**")) == len(PATHS)


@pytest.mark.parametrize(
    "text", ["", " a", "a..b", "[0", "a[0]", "{a", "a}", ":", "a:", "a.[::0]", "a**", "a.[x]", "[]", "a\nb"]
)
def test_a_string_that_is_not_a_pattern_raises(text):
    with pytest.raises(rt.PatternError) as caught:
        Pattern.parse(text)
    assert repr(text) in caught.value.what
    assert caught.value.why


def test_braces_are_bounded():
    with pytest.raises(rt.PatternError):
        Pattern.parse("{a,b}" * 20)


bound = st.one_of(st.just(""), st.integers(-12, 12).map(str))


@given(bound, bound, st.one_of(st.just(""), st.sampled_from(["1", "2", "3", "-1", "-2"])), st.integers(1, 10))
def test_slices_are_pythons(start, stop, step, length):
    paths = [("layers", i) for i in range(length)]
    found = [paths[i][1] for i in match(Pattern.parse(f"layers.[{start}:{stop}:{step}]"), paths)]
    part = slice(*(int(text) if text else None for text in (start, stop, step)))
    assert found == sorted(range(length)[part])


segment = st.from_regex(r"[a-z_][a-z0-9_]{0,5}", fullmatch=True)


@given(st.lists(st.one_of(segment, st.integers(0, 99)), max_size=5).map(tuple))
def test_paths_round_trip_and_match_themselves(path):
    assert parse_path(format_path(path)) == path
    if len(path) != 1:
        assert match(Pattern.parse(format_path(path)), [path]) == (0,)
        assert match(Pattern.parse("**"), [path]) == (0,)
        assert match(Pattern.parse(format_path(path)), [("other", *path)]) == ()


def test_natural_order():
    names = ["layer10", "layer2", "layer1", "head"]
    assert sorted(names, key=lambda name: make_natural_key((name,))) == ["head", "layer1", "layer2", "layer10"]


def test_closest_real_paths():
    assert find_closest(Pattern.parse("layers.*.atn"), PATHS)[0] == "layers.0.attn"
    assert find_closest(Pattern.parse("q_prj"), PATHS)[0].endswith("q_proj")


@pytest.mark.parametrize(
    ("text", "value", "expected"),
    [
        ("attn", ("module", ("attn",), "", 0), True),
        ("attn", ("module", ("mlp", "attn"), "", 3), True),
        ("norm[1]", ("module", ("norm",), "", 1), True),
        ("norm[1]", ("module", ("norm",), "", 0), False),
        ("attn", ("op", ("attn",), "exp", 0), False),
        ("attn:exp", ("op", ("attn",), "exp", 5), True),
        ("attn:exp[5]", ("op", ("attn",), "exp", 5), True),
        ("attn:exp[4]", ("op", ("attn",), "exp", 5), False),
        ("attn:*", ("op", ("attn",), "dot_general", 0), True),
        (":exp", ("op", (), "exp", 0), True),
        (".:exp", ("op", ("attn",), "exp", 0), False),
        ("experts.[0:2]:exp", ("op", ("experts", 1), "exp", 0), True),
        ("experts.[1]", ("module", ("experts", 1), "", 7), True),
        ("@q*", ("user", ("attn",), "qkv", 0), True),
        ("@q*", ("module", ("qkv",), "", 0), False),
    ],
)
def test_names(text, value, expected):
    assert NamePattern.parse(text).is_match(*value) is expected


@pytest.mark.parametrize("text", ["", "attn:", "a[0]b", "@{", 3])
def test_a_string_that_is_not_a_name_raises(text):
    with pytest.raises(rt.PatternError):
        NamePattern.parse(text)
