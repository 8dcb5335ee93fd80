# SPDX-License-Identifier: Apache-2.0
"""Each leaf that a state lacks is traced to its likely source, and what fits stays where it is."""

import jax.numpy as jnp
import pytest

from ckpttools.surgery.source_tracing.kinds import PLACE
from ckpttools.surgery.source_tracing.tracing import trace_leaves
from tests.ckpttools.surgery.plans import leaf, nested, plan


def trace(disk, state):
    return trace_leaves(plan(disk, state))


def show(traces):
    return {
        (each.how, ".".join(each.old).replace(PLACE, "*"), ".".join(each.new).replace(PLACE, "*")) for each in traces
    }


def layers(count):
    return {str(number): {"w": leaf(2, 3)} for number in range(count)}


@pytest.mark.parametrize(
    ("disk", "state", "expected"),
    [
        pytest.param(nested("m.enc.w"), nested("m.net.w"), {("rename", "m.enc.w", "m.net.w")}, id="rename"),
        pytest.param(
            {"m": {"layers": layers(4)}},
            {"m": {"layers": {"w": leaf(4, 2, 3)}}},
            {("stack", "m.layers.*.w", "m.layers.w")},
            id="stack",
        ),
        pytest.param(
            {"m": {"layers": {"w": leaf(4, 2, 3)}}},
            {"m": {"layers": layers(4)}},
            {("unstack", "m.layers.w", "m.layers.*.w")},
            id="unstack",
        ),
        pytest.param(
            {"m": {"attn": {name: leaf(4, 5) for name in "qkv"}}},
            {"m": {"attn": {"qkv": leaf(4, 15)}}},
            {("merge", "m.attn.*", "m.attn.qkv")},
            id="merge",
        ),
        pytest.param(
            {"m": {"attn": {"qkv": leaf(4, 15)}}},
            {"m": {"attn": {name: leaf(4, 5) for name in "qkv"}}},
            {("split", "m.attn.qkv", "m.attn.*")},
            id="split",
        ),
        pytest.param(
            {"m": {"embed": leaf(8, 4), "w": leaf(2)}},
            {"m": {"embed": leaf(8, 4), "w": leaf(2), "head": leaf(4, 8)}},
            {("copy", "m.embed", "m.head")},
            id="untied head",
        ),
        pytest.param(
            nested("m.a", "m.b"),
            nested("m.a", "m.b", "ema.a", "ema.b"),
            {("copy", "m.a", "ema.a"), ("copy", "m.b", "ema.b")},
            id="average",
        ),
        pytest.param(
            nested("m.enc.w"),
            nested("m.net.w", form=leaf(2, dtype=jnp.bfloat16)),
            {("rename", "m.enc.w", "m.net.w")},
            id="another dtype",
        ),
        pytest.param(
            nested("m.a.w", "m.a.b"),
            {"m": {"a": {"w": leaf(2), "b": leaf(2), "new": leaf(7)}}},
            set(),
            id="control: nothing has that form",
        ),
    ],
)
def test_a_leaf_is_traced_to_its_source(disk, state, expected):
    assert show(trace(disk, state)) == expected


def test_leaves_that_fit_have_no_trace():
    assert trace(nested("m.a.w", "m.b.w"), nested("m.a.w", "m.b.w")) == []
    assert show(trace(nested("m.a.w", "m.b.w"), nested("m.a.w", "m.c.w"))) == {("rename", "m.b.w", "m.c.w")}, "control"


def test_a_stored_leaf_is_renamed_to_one_leaf_only():
    state = nested("m.encoder.w", "m.decoder.w")
    assert show(trace(nested("m.enc.w"), state)) == {("rename", "m.enc.w", "m.encoder.w")}
    both = {("rename", "m.enc.w", "m.encoder.w"), ("rename", "m.dec.w", "m.decoder.w")}
    assert show(trace(nested("m.enc.w", "m.dec.w"), state)) == both, "control"


def test_a_sequence_keeps_its_order_when_layers_are_inserted():
    """Layer 2 fits by its name, but it is the third layer on disk and the second of the state."""

    def trace_layers(old, new):
        found = trace(nested(*[f"m.layers.{n}.w" for n in old]), nested(*[f"m.layers.{n}.w" for n in new]))
        return {int(each.old[2]): int(each.new[2]) for each in found if each.old != each.new}

    assert trace_layers((0, 1, 2), (0, 2, 4)) == {1: 2, 2: 4}
    assert trace_layers((0, 1, 2), (0, 1, 2, 3)) == {}, "control: a layer at the end moves none"


def test_square_matrices_are_transposed_with_those_of_their_name():
    disk = {"m": {"up": {"weight": leaf(6, 4)}, "mix": {"weight": leaf(4, 4)}}}
    state = {"m": {"up": {"kernel": leaf(4, 6)}, "mix": {"kernel": leaf(4, 4)}}}
    assert {each.axes for each in trace(disk, state)} == {(1, 0)}
    plain = {"m": {"up": {"kernel": leaf(6, 4)}, "mix": {"kernel": leaf(4, 4)}}}
    assert {each.axes for each in trace(disk, plain)} == {()}, "control"


def test_a_leaf_of_another_size_follows_the_part_that_moved():
    disk = {"m": {"enc": {"emb": leaf(10, 4), "k": leaf(3)}}}
    grown = {"m": {"net": {"emb": leaf(12, 4), "k": leaf(3)}}}
    assert ("rename", "m.enc.emb", "m.net.emb") in show(trace(disk, grown))
    elsewhere = {"m": {"net": {"k": leaf(3)}, "far": {"emb": leaf(12, 4)}}}
    assert show(trace(disk, elsewhere)) == {("rename", "m.enc.k", "m.net.k")}, "control"
