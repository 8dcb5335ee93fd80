# SPDX-License-Identifier: Apache-2.0
"""TOML is written so that it reads back, and an error names file and line."""

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

import remattools as rt
from remattools import toml

# TOML has no lone surrogates, and its integers have 64 bits.
strings = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
scalars = st.one_of(strings, st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False))
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(strings, inner, max_size=3)),
    max_leaves=6,
)


@given(st.dictionaries(strings, values, max_size=4))
def test_what_is_written_reads_back(entries):
    assert tomllib.loads(toml.format_tables([("[run]", entries)])) == {"run": entries}


def test_a_list_of_tables_has_one_a_line():
    text = toml.format_tables([("[a]", {"keep": [{"latest": 3}, {"every": 100}]}), ("[[b]]", {"x y": (1, True)})])
    assert text.splitlines() == [
        "[a]",
        "keep = [",
        "    { latest = 3 },",
        "    { every = 100 },",
        "]",
        "",
        "[[b]]",
        '"x y" = [1, true]',
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        pytest.param('a = 1\nb = "x\n', 2, id="open string"),
        pytest.param("a = 1\na = 2\n", 2, id="repeated key"),
        pytest.param("a = [1,\n", 1, id="end of document"),
    ],
)
def test_a_syntax_error_names_source_and_line(text, line):
    with pytest.raises(rt.RuleFileError) as caught:
        toml.parse_toml(text, source="run.toml", error_type=rt.RuleFileError)
    assert caught.value.what.startswith(f"run.toml, line {line}: not TOML")
    assert "(at " not in caught.value.what
    assert toml.parse_toml("a = 1\n", source="run.toml", error_type=rt.RuleFileError) == {"a": 1}  # control


@pytest.mark.parametrize("content", [None, b"\xff\xfe"], ids=["missing", "not UTF-8"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, content):
    path = tmp_path / "run.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(rt.BudgetError) as caught:
        toml.read_text(path, description="the budget", error_type=rt.BudgetError)
    assert str(path) in caught.value.what
    assert "the budget" in caught.value.why
    path.write_text("a = 'ü'", encoding="utf-8")
    assert toml.read_text(path, description="the budget", error_type=rt.BudgetError) == "a = 'ü'"
