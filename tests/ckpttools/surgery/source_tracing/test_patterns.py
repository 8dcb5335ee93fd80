# SPDX-License-Identifier: Apache-2.0
"""Patterns match the leaves that they are for and no others, and are as few as that allows."""

import pytest

from ckpttools.surgery.renaming import Parts, find_outermost_depth
from ckpttools.surgery.source_tracing.patterns import (
    find_covering_patterns,
    format_pattern,
    format_segment,
    make_patterns,
)


def split(*names):
    return [tuple(name.split(".")) for name in names]


def match(patterns, leaves):
    parts = Parts(leaves)
    return {leaf for leaf in leaves if any(find_outermost_depth(leaf, parts.match(each)) for each in patterns)}


@pytest.mark.parametrize(
    ("targets", "others", "expected"),
    [
        pytest.param(["m.a.x", "m.a.y"], ["m.b.x"], ["m.a"], id="a whole part"),
        pytest.param(["m.a.x"], ["m.a.y"], ["m.a.x"], id="control: a part of a part"),
        pytest.param(["m.x", "m.y"], ["n.x"], ["m.**"], id="a whole item"),
        pytest.param(["m.0.x", "m.1.x"], ["m.0.y", "m.1.y"], ["m.*.x"], id="in each layer"),
        pytest.param(["m.0.x", "m.1.x"], ["m.0.y", "m.1.y", "m.2.x"], ["m.0.x", "m.1.x"], id="control: not in each"),
        pytest.param(["m.a.bias", "n.c.bias"], ["m.a.w", "n.c.w"], ["bias"], id="at any depth"),
        pytest.param(["m.a.bias", "n.c.bias"], ["m.bias", "m.a.w", "n.c.w"], ["m.a.bias", "n.c.bias"], id="control"),
    ],
)
def test_patterns_cover_the_targets_and_no_other_leaf(targets, others, expected):
    found = find_covering_patterns(split(*targets), split(*others))
    assert found == expected
    assert match(found, split(*targets, *others)) == set(split(*targets))


def test_patterns_of_leaves_are_merged_where_only_numbers_differ():
    layers = [f"m.{number}.w" for number in range(3)]
    assert make_patterns(split(*layers), split("m.0.b")) == ["m.*.w"]
    assert make_patterns(split(*layers[:2]), split(layers[2])) == layers[:2], "control"


def test_a_name_of_one_segment_means_the_item_only():
    assert format_pattern(("m",)) == "m.**"
    assert match(["m.**"], split("m.w", "n.m")) == {("m", "w")}
    assert match(["m"], split("m.w", "n.m")) == {("m", "w"), ("n", "m")}, "control: it would match at any depth"


def test_special_characters_become_a_star():
    assert format_segment("b[0] {x}") == "b*0*x*"
    assert format_segment("layer_norm-1") == "layer_norm-1", "control"
