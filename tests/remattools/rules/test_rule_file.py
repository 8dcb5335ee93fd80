# SPDX-License-Identifier: Apache-2.0
"""Rules survive TOML, and an error names the line that is wrong."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import remattools as rt
from remattools.rules import rule_file
from tests.remattools.rules.sample_policies import trees

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
    parsed = rt.Rules.from_toml(value.to_toml())
    assert parsed == value
    assert hash(parsed) == hash(value)
    assert eval(repr(value), {"Rules": rt.Rules, "Remat": rt.Remat}) == value


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


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(rt.RuleFileError) as caught:
        rt.Rules.load(tmp_path / "none.toml")
    assert "none.toml" in caught.value.what
