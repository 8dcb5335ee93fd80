# SPDX-License-Identifier: Apache-2.0
"""Actions, rules, and their TOML."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import remattools as rt
from remattools.rules import rule_file
from tests.remattools.rules.test_policies import trees

segments = st.from_regex(r"[a-zA-Z_][a-zA-Z0-9_]{0,6}", fullmatch=True)
parts = st.one_of(segments, st.sampled_from(["*", "**", "[1:-1]"]), st.integers(0, 9).map(str))
patterns = st.one_of(
    segments,
    st.lists(parts, min_size=2, max_size=4).map(".".join),
    st.tuples(segments, segments).map(lambda pair: f"{pair[0]}*:{pair[1]}"),
    st.tuples(segments, segments).map(lambda pair: f"{{{pair[0]},{pair[1]}}}"),
)
names = st.lists(st.one_of(segments, segments.map("@{}".format), segments.map("{}:dot_general[1]".format)), max_size=3)


@st.composite
def actions(draw):
    if draw(st.booleans()) and draw(st.booleans()):
        return False
    every_n = draw(st.integers(1, 4))
    save = tuple(dict.fromkeys(draw(names)))
    return rt.Remat(
        policy=draw(st.one_of(st.none(), trees)),
        save=save,
        offload=tuple(name for name in dict.fromkeys(draw(names)) if name not in save),
        every_n=every_n,
        offset=draw(st.integers(0, every_n - 1)),
        group=draw(st.one_of(st.integers(1, 5), st.just("sqrt"))),
        methods=draw(st.sampled_from([("__call__",), ("encode", "decode")])),
        prevent_cse=draw(st.booleans()),
    )


rules = st.lists(st.tuples(patterns, actions()), max_size=4).map(rt.Rules)


@given(rules)
def test_toml_round_trip_is_exact(value):
    again = rt.Rules.from_toml(value.to_toml())
    assert again == value
    assert hash(again) == hash(value)
    assert eval(repr(value), {"Rules": rt.Rules, "Remat": rt.Remat}) == value


@given(rules, rules)
def test_layering_concatenates(a, b):
    assert tuple(a | b) == (*a, *b)
    assert len(a | b) == len(a) + len(b)


def test_the_plain_table_keeps_its_order():
    text = (
        '[remat.rules]\n"layers.*" = "dots_saveable"\n"layers.[-1]" = false\n"attn*" = { save = ["q"], every_n = 2 }\n'
    )
    expected = [("layers.*", "dots_saveable"), ("layers.[-1]", False), ("attn*", rt.Remat(save=("q",), every_n=2))]
    assert rt.Rules.from_toml(text) == rt.Rules(expected)


def test_other_tables_of_a_run_file_are_ignored(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('[checkpoint]\ndirectory = "x"\n[remat.rules]\n"a" = "dots_saveable"\n')
    assert rt.Rules.load(file) == rt.Rules.coerce(str(file)) == rt.Rules({"a": "dots_saveable"})


@pytest.mark.parametrize(
    ("text", "line", "part"),
    [
        ('[remat.rules]\n\n"a" = "dot_saveable"\n', 3, "dots_saveable"),
        ('[remat.rules]\n"a" = 3\n', 2, "nothing_saveable"),
        ('[remat.rules]\n"a" = "dots_saveable\n', 2, "TOML"),
        ("[remat]\nrulz = 1\n", 2, "rules"),
        ('[[remat.rule]]\npattern = "a"\n\nevry_n = 2\n', 4, "every_n"),
        ('[[remat.rule]]\npattern = "a"\noff = true\n\n[[remat.rule]]\npolicy = "dots_saveable"\n', 5, "pattern"),
        ('[[remat.rule]]\npattern = "a"\n', 1, "action"),
        ('[[remat.rule]]\npattern = "a"\noff = true\nsave = ["x"]\n', 2, "alone"),
        ('[[remat.rule]]\npattern = "a[0]"\noff = true\n', 2, "brackets"),
        ('[[remat.rule]]\npattern = "a"\nevery_n = 0\n', 2, "1 or more"),
        ('[[remat.rule]]\npattern = ["a"]\noff = true\n', 2, "string"),
        ('[[remat.rule]]\npattern = "a"\noff = 1\n', 2, "off = true"),
        ('[remat.rules]\n"a" = { save = { qkv = 1 } }\n', 2, "sequence"),
        ("remat = 1\n", 1, "table"),
        ("[remat]\nrules = 1\n", 2, "table"),
        ("[remat]\nrule = 1\n", 2, "array"),
        ('[remat.rules]\n"a" = "dots_saveable"\n"a" = "dots_saveable"\n', 3, "TOML"),
    ],
)
def test_errors_name_the_line(text, line, part):
    with pytest.raises(rt.RuleFileError) as caught:
        rt.Rules.from_toml(text, "train.toml")
    assert caught.value.what.startswith(f"train.toml, line {line}:")
    assert part in str(caught.value)


def test_an_integer_too_long_for_python_is_refused():
    with pytest.raises(rt.RuleFileError, match=r"train\.toml: not TOML: .*digits"):
        rt.Rules.from_toml(f'[remat.rules]\n"a" = {{ every_n = {"9" * 5000} }}\n', "train.toml")


def test_lines_are_searched_for_errors_only(monkeypatch):
    # A search reads the whole text: once for each rule, a long file would take minutes.
    monkeypatch.delattr(rule_file, "_find_line")
    assert len(rt.Rules.from_toml('[remat.rules]\n"a" = false\n[[remat.rule]]\npattern = "b"\noff = true\n')) == 2


def test_a_missing_file(tmp_path):
    with pytest.raises(rt.RuleFileError) as caught:
        rt.Rules.load(tmp_path / "none.toml")
    assert "none.toml" in caught.value.what


@pytest.mark.parametrize(
    "make",
    [
        lambda: rt.Remat(every_n=0),
        lambda: rt.Remat(every_n=True),
        lambda: rt.Remat(every_n=2, offset=2),
        lambda: rt.Remat(group=0),
        lambda: rt.Remat(group="all"),
        lambda: rt.Remat(save="attn"),
        lambda: rt.Remat(save=(3,)),
        lambda: rt.Remat(save=("a",), offload=("a",)),
        lambda: rt.Remat(methods=()),
        lambda: rt.Remat(methods=("not a name",)),
        lambda: rt.Remat(prevent_cse=1),
        lambda: rt.Rules({"a": True}),
        lambda: rt.Rules({"a": None}),
        lambda: rt.Rules.coerce("dots_saveable"),
        lambda: rt.Rules.coerce(3),
    ],
)
def test_what_cannot_be_honoured(make):
    with pytest.raises(rt.RuleError) as caught:
        make()
    assert caught.value.why
    assert caught.value.fix


def test_values_are_frozen_and_hashable():
    action = rt.Remat(policy="dots_saveable", save=["a"])
    assert action == rt.Remat(policy="checkpoint_dots", save=("a",))
    assert len({action, rt.Remat(policy="dots_saveable", save=("a",))}) == 1
    with pytest.raises(AttributeError):
        action.every_n = 3
