# SPDX-License-Identifier: Apache-2.0
"""The verdict of a suggestion counts what is lost, and what only looks like a loss."""

import pytest

import ckpttools as ct
from ckpttools.surgery.suggestion import Suggestion, list_leaf_names

RENAME = (ct.Rename("model.a", "model.b"),)


@pytest.mark.parametrize(
    ("losses", "texts"),
    [
        ({}, ["fixes it: nothing on disk is lost"]),
        ({"fresh_leaves": ("m.a",), "fresh_bytes": 8}, ["keeps everything on disk and leaves 8 B", "1 leaf (m.a)"]),
        ({"fresh_leaves": ("m.k",), "fresh_bytes": 8, "fresh_keys": ("m.k",)}, ["fresh random keys in 1 leaf (m.k)"]),
        ({"lost_leaves": ("m.a", "m.b"), "lost_bytes": 8, "stored_bytes": 16}, ["throws away 8 B of the 16 B"]),
        ({"ignored_leaves": ("m.cache",)}, ["fixes it", "recomputed variables are not state: 1 leaf (m.cache)"]),
        ({"assumptions": ("the order",)}, ["fixes it", "; check the order"]),
    ],
    ids=["nothing", "fresh", "keys", "lost", "recomputed", "assumption"],
)
def test_the_verdict_names_each_loss(losses, texts):
    verdict = Suggestion(operations=RENAME, **losses).verdict
    assert all(text in verdict for text in texts)
    assert ("fixes it" in verdict) is not bool({"fresh_leaves", "lost_leaves"} & losses.keys())


def test_rounding_is_said():
    cast = (ct.Cast("model", "float32", "bfloat16"),)
    assert "values are rounded to bfloat16" in Suggestion(operations=cast).verdict
    assert "rounded" not in Suggestion(operations=(ct.Cast("model", "bfloat16", "float32"),)).verdict, "control"


def test_without_operations_nothing_is_said():
    assert not Suggestion(reason="no source")
    assert Suggestion(reason="no source").verdict == ""


def test_only_the_first_names_are_listed():
    assert list_leaf_names([f"m.{n}" for n in range(6)]) == "6 leaves (m.0, m.1, m.2, m.3 and 2 more)"
