# SPDX-License-Identifier: Apache-2.0
"""Errors have three parts, survive pickling, and suggest names."""

import pickle

import pytest

import remattools as rt
from remattools.errors import ExplainedError, suggest_names

ERRORS = [value for name in rt.__all__ if isinstance(value := getattr(rt, name), type) and issubclass(value, Exception)]


def test_the_message_leaves_out_empty_parts():
    assert str(ExplainedError("what.", "why.", "fix.")) == "what.\n  why: why.\n  fix: fix."
    assert str(ExplainedError("what.", fix="fix.")) == "what.\n  fix: fix."
    assert str(ExplainedError("what.")) == "what."


@pytest.mark.parametrize("kind", [kind for kind in ERRORS if issubclass(kind, ExplainedError)])
def test_an_error_survives_pickling_with_its_parts_and_notes(kind):
    error = kind(what="what.", why="why.", fix="fix.")
    error.add_note("in worker 3")
    loaded = pickle.loads(pickle.dumps(error))
    assert type(loaded) is kind
    assert (loaded.what, loaded.why, loaded.fix, str(loaded)) == ("what.", "why.", "fix.", str(error))
    assert loaded.__notes__ == ["in worker 3"]


def test_every_error_has_the_base_or_is_a_warning():
    assert {kind for kind in ERRORS if not issubclass(kind, rt.RematError)} == {
        rt.CacheWarning,
        rt.UnmatchedRuleWarning,
    }
    assert issubclass(rt.RuleFileError, rt.RuleError)
    assert issubclass(rt.UnmatchedRuleError, LookupError)


@pytest.mark.parametrize(
    ("name", "choices", "expected"),
    [
        pytest.param("keeep", ["keep", "save"], "did you mean 'keep'?", id="one is close"),
        pytest.param("save", ["saved", "saves", "xyz"], "did you mean 'saves', 'saved'?", id="two are close"),
        pytest.param("zzz", ["b", "a", "a"], "there are 'a', 'b'.", id="none is close"),
        pytest.param("zzz", list("abcdefgh"), "there are 'a', 'b', 'c', 'd', 'e', 'f', ....", id="too many to list"),
        pytest.param("zzz", [], "", id="no choices"),
    ],
)
def test_names_are_suggested_by_likeness(name, choices, expected):
    assert suggest_names(name, choices) == expected
