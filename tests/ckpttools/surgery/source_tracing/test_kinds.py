# SPDX-License-Identifier: Apache-2.0
"""Names that mean the same are paired; names that could mean several things are not."""

import pytest

from ckpttools.surgery.source_tracing.kinds import (
    Candidate,
    find_slots,
    list_numbers,
    mask_path,
    pair_candidates,
    split_words,
)


def candidates(*names, shape=(2, 3)):
    paths = [tuple(name.split(".")) for name in names]
    return [Candidate(path, ("array", "float32", shape), (path,)) for path in paths]


def pair(old, new, **options):
    found = pair_candidates(candidates(*old), candidates(*new), **options)
    return {".".join(source.path): ".".join(target.path) for source, target in found}


def test_synonyms_are_one_word():
    words = split_words(("model", "h_0", "attn", "q_proj", "weight"))
    assert words == split_words(("model", "layer", "3", "attention", "query", "kernel"))
    assert words != split_words(("model", "h_0", "attn", "q_proj", "bias")), "control"


def test_numbers_are_masked_and_listed():
    assert mask_path(("m", "h10", "1", "w2x3")) == ("m", "h#", "#", "w#x#")
    assert list_numbers(("m", "h10", "1", "w2x3")) == (10, 1, 2, 3)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param("m.h_0.attn.weight", "m.h.0.attention.kernel", id="the same words"),
        pytest.param("m.blocks.mlp.up", "m.stack.mlp.up", id="the same end"),
        pytest.param("m.mlp.wi_zero", "m.mlp.wi_null", id="the same parent"),
        pytest.param("m.projection_input.x", "n.projector_input.y", id="alike"),
    ],
)
def test_corresponding_names_are_paired(old, new):
    assert pair([old], [new]) == {old: new}


def test_only_leaves_of_one_form_are_paired():
    other = candidates("m.a.w", shape=(3, 2))
    assert pair_candidates(candidates("m.a.w"), other) == []
    assert pair(["m.a.w"], ["m.a.w"]) == {"m.a.w": "m.a.w"}, "control"


def test_strict_pairs_need_the_same_words():
    old, new = ["m.blocks.mlp.up"], ["m.stack.mlp.up"]
    assert pair(old, new, strict=True) == {}
    assert pair(old, ["m.layers.mlp.up"], strict=True) == {"m.blocks.mlp.up": "m.layers.mlp.up"}
    assert pair(old, new) == {"m.blocks.mlp.up": "m.stack.mlp.up"}, "control"


def test_layers_are_paired_by_their_numbers():
    old = [f"m.blocks.{number}.w" for number in (0, 2, 10)]
    assert pair(old, ["m.layers.10.w", "m.layers.2.w"]) == {
        "m.blocks.2.w": "m.layers.2.w",
        "m.blocks.10.w": "m.layers.10.w",
    }
    assert pair(old, [f"m.layers.{number}.w" for number in (5, 6, 7)]) == {
        "m.blocks.0.w": "m.layers.5.w",
        "m.blocks.2.w": "m.layers.6.w",
        "m.blocks.10.w": "m.layers.7.w",
    }, "as many on both sides keep their order"


def test_two_names_that_fit_equally_well_are_not_paired():
    assert pair(["m.a.x.w", "m.b.x.w"], ["m.c.x.w"]) == {}
    assert pair(["m.a.x.w"], ["m.c.x.w"]) == {"m.a.x.w": "m.c.x.w"}, "control"


def test_a_slot_is_not_the_source_of_another_slot():
    assert find_slots(("opt", "0", "mu", "w")) == {"mu"}
    assert find_slots(("mu", "w")) == set(), "the name of an item is not a slot"
    assert pair(["opt.mu.w"], ["opt.nu.w"]) == {}
    assert pair(["opt.mu.w"], ["adam.mu.w"]) == {"opt.mu.w": "adam.mu.w"}, "control"
