# SPDX-License-Identifier: Apache-2.0
"""Which parts a pattern matches, and which name a rename gives each leaf."""

import pytest

import ckpttools as ct
from ckpttools.surgery.renaming import Parts, find_outermost_depth, rename_leaf, rename_part
from tests.ckpttools.surgery.plans import nested, plan, sources


@pytest.mark.parametrize(
    ("old", "new", "operation"),
    [
        pytest.param("m.enc.w", "m.dec.w", ct.Rename("m.enc", "m.dec"), id="a part above"),
        pytest.param("m.enc.w", "m.dec.w", ct.Rename("enc", "dec"), id="at any depth"),
        pytest.param("m.0.q.w", "m.0.attn.q.w", ct.Rename("q", "attn.q"), id="one more level"),
        pytest.param("m.b.3.q.w", "m.layers.3.wq", ct.Rename("m.b.*.q.w", "m.layers.*.wq"), id="a star"),
        pytest.param("m.x.y.q", "m.z.x.y.q", ct.Rename("m.**.q", "m.z.**.q"), id="two stars"),
        pytest.param("m.q", "m.z.q", ct.Rename("m.**.q", "m.z.**.q"), id="two stars of nothing"),
        pytest.param("m.v_proj", "m.attn.v", ct.Rename("m.{q,v}_proj", "m.attn.*"), id="braces"),
        pytest.param("m.h12.w", "m.h.12.w", ct.Rename("m.h*", "m.h.*"), id="inside a segment"),
        pytest.param("m.w", "n.w", ct.Rename("m.**", "n.**"), id="an item"),
        pytest.param("m.a.a.w", "m.b.a.w", ct.Rename("a", "b"), id="the outermost"),
        pytest.param("m.a.w", "n.w", ct.Rename("m.a", "n"), id="a part becomes an item"),
    ],
)
def test_a_rename_applies_to_everything_below(old, new, operation):
    made = plan(nested(old), nested(new), [operation])
    assert made.differences == ()
    assert sources(made) == {new: old}
    assert plan(nested(old), nested(new)).differences  # the control


def test_slices_count_integer_segments():
    disk, state = nested("m.l.0.w", "m.l.1.w", "m.l.2.w"), nested("m.l.0.w", "m.l.1.w", "m.top.2.w")
    assert sources(plan(disk, state, [ct.Rename("m.l.[-1]", "m.top.*")]))["m.top.2.w"] == "m.l.2.w"


def test_a_pattern_matches_nodes_and_not_only_leaves():
    parts = Parts([("m", "enc", "w"), ("m", "enc", "b"), ("m", "dec", "w")])
    assert parts.match("m.enc") == {("m", "enc")}
    assert parts.match("w") == {("m", "enc", "w"), ("m", "dec", "w")}
    assert parts.match("m.encoder") == frozenset()


def test_the_outermost_part_counts():
    parts = frozenset({("m", "a"), ("m", "a", "a")})
    assert find_outermost_depth(("m", "a", "a", "w"), parts) == 2
    assert find_outermost_depth(("m", "b"), parts) == 0


def test_a_leaf_that_does_not_match_keeps_its_name():
    operation, leaf = ct.Rename("m.enc", "m.dec"), ("m", "enc", "w")
    assert rename_leaf(operation, leaf, frozenset()) == leaf
    assert rename_leaf(operation, leaf, frozenset({("m", "enc")})) == ("m", "dec", "w"), "control"


@pytest.mark.parametrize(
    ("pattern", "new", "part", "expected"),
    [
        ("q", "attn.q", "m.0.q", "m.0.attn.q"),
        ("m.h*", "m.h.*", "m.h12", "m.h.12"),
        ("m.{q,v}_proj", "m.attn.*", "m.v_proj", "m.attn.v"),
        ("m.{a.b,c}.w", "m.*.w", "m.a.b.w", "m.a.b.w"),
        ("**.w", "n.**.w", "m.a.w", "n.m.a.w"),
        ("m.[0].w", "m.first.*.w", "m.0.w", "m.first.0.w"),
        ("m.a+b", "m.c", "m.a+b", "m.c"),
    ],
)
def test_wildcards_carry_over_to_the_new_name(pattern, new, part, expected):
    assert rename_part(ct.Rename(pattern, new), tuple(part.split("."))) == tuple(expected.split("."))
