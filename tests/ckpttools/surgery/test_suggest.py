# SPDX-License-Identifier: Apache-2.0
"""A mismatch suggests the surgery that fixes it and touches nothing else."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import pytest

import ckpttools as ct
from ckpttools.spec.operations import as_code
from ckpttools.surgery import make_plan, suggest
from ckpttools.surgery.plan import Changes
from ckpttools.tree import flatten
from tests.ckpttools.surgery.large_states import list_large_states, time_suggestion
from tests.ckpttools.surgery.plans import leaf, nested, plan, stored


def mismatch(disk, state, asked=()):
    with pytest.raises(ct.StructureError) as caught:
        suggest.require_match(3, plan(disk, state, asked), lambda more: plan(disk, state, [*asked, *more]), asked)
    return caught.value


BLOCKS = [f"m.blocks.{n}.{part}" for n in range(12) for part in ("attn.q", "attn.k", "mlp.up", "mlp.down")]


LAYERS = [name.replace("blocks", "layers") for name in BLOCKS]


@pytest.mark.parametrize(
    ("disk", "state", "expected"),
    [
        pytest.param(nested(*BLOCKS), nested(*LAYERS), ['ct.Rename("m.blocks", "m.layers")'], id="a part above"),
        pytest.param(
            nested(*BLOCKS),
            nested(*[name.replace("attn", "attention") for name in BLOCKS]),
            ['ct.Rename("m.blocks.*.attn", "m.blocks.*.attention")'],
            id="in every block",
        ),
        pytest.param(
            nested(*BLOCKS),
            nested(*[name.replace("attn", "attention") for name in LAYERS]),
            ['ct.Rename("m.blocks", "m.layers")', 'ct.Rename("m.blocks.*.attn", "m.layers.*.attention")'],
            id="a part and what is below it",
        ),
        pytest.param(
            nested("m.enc.w", "m.dec.w", "m.dec.b"), nested("m.enc.w"), ['ct.Drop("m.dec")'], id="a part too much"
        ),
        pytest.param(
            nested(*BLOCKS),
            nested(*BLOCKS, *[f"m.blocks.{n}.lora.{part}" for n in range(12) for part in "ab"]),
            ['ct.Reinit("m.blocks.*.lora")'],
            id="additions",
        ),
        pytest.param(
            {"m": {"enc": {"emb": leaf(10, 4), "k": leaf(3)}}},
            {"m": {"net": {"emb": leaf(12, 4), "k": leaf(3)}}},
            ['ct.Pad("m.net.emb")', 'ct.Rename("m.enc", "m.net")'],
            id="another name and longer",
        ),
        pytest.param(
            nested("m.emb", form=leaf(10, 4)), nested("m.emb", form=leaf(12, 4)), ['ct.Pad("m.emb")'], id="longer"
        ),
        pytest.param(
            nested("m.emb", form=leaf(10, 4)),
            nested("m.emb", form=leaf(8, 6)),
            ['ct.Pad("m.emb")', 'ct.Slice("m.emb")'],
            id="longer and shorter",
        ),
        pytest.param(
            nested(*BLOCKS),
            nested(*BLOCKS, form=leaf(2, dtype=jnp.bfloat16)),
            ['ct.Cast("m.**", "float32", "bfloat16")'],
            id="another dtype",
        ),
        pytest.param(
            nested("m.0.norm_a", "m.1.norm_a", "m.2.norm_a"),
            nested("m.0.norm_b", "m.1.norm_b", "m.2.other", "m.2.more"),
            ['ct.Drop("m.2")', 'ct.Reinit("m.2")', 'ct.Rename("m.*.norm_a", "m.*.norm_b")'],
            id="more is renamed than is missing",
        ),
        pytest.param(
            {"m": {"w": leaf(4), "b": leaf(3)}},
            {"m": {"w": leaf(2, 2), "b": leaf(3)}},
            ['ct.Reinit("m.w")'],
            id="rank",
        ),
        pytest.param(
            nested("params.w", "params.b"), nested("m.w", "m.b"), ['ct.Rename("params.**", "m.**")'], id="item"
        ),
        pytest.param(nested("m.w"), nested("m.w", "opt.mu", "opt.nu"), ['ct.Reinit("opt.**")'], id="no such item"),
        pytest.param(
            nested("m.a.w", "m.a.keep"), nested("m.b.w", "m.a.keep"), ['ct.Rename("m.a.w", "m.b.w")'], id="not the rest"
        ),
        pytest.param(
            {"m": {"a": {"x": leaf(2)}, "b": {"y": leaf(3)}}},
            {"m": {"a": {"y": leaf(3)}, "b": {"x": leaf(2)}}},
            ['ct.Rename("m.a.x", "m.b.x")', 'ct.Rename("m.b.y", "m.a.y")'],
            id="names that cross",
        ),
        pytest.param(
            nested("m.w", form=leaf(2, 3)), nested("m.w", form=leaf(3, 2)), ['ct.Transpose("m.w")'], id="turned"
        ),
        pytest.param(
            nested("m.w", form=leaf(2, dtype=jnp.int4)),
            nested("m.w", form=leaf(2, dtype=jnp.int8)),
            ['ct.Cast("m.**", "int4", "int8")'],
            id="a rare dtype",
        ),
        pytest.param(
            {"m": {"a.b": leaf(2), "c": leaf(3)}},
            {"m": {"a.c": leaf(2), "c": leaf(3)}},
            ['ct.Rename("m.a*b", "m.a*c")'],
            id="dots in names",
        ),
        pytest.param(
            {"m": {"b[0]": leaf(3), "k": leaf(1)}}, {"m": {"k": leaf(1)}}, ['ct.Drop("m.b*0*")'], id="brackets in names"
        ),
    ],
)
def test_the_suggested_surgery_fits(disk, state, expected):
    state = jax.tree.map(lambda each: jnp.ones(each.shape, each.dtype), state)
    error = mismatch(disk, state)
    assert sorted(map(as_code, error.surgery)) == sorted(expected)
    assert all(line in error.fix for line in expected)
    assert plan(disk, state, error.surgery).differences == ()


def test_no_surgery_is_suggested_that_would_touch_what_fits():
    """`m.a*` also means `m.ab`, which came back as it should; no pattern means the one alone."""
    error = mismatch({"m": {"a*": leaf(2), "ab": leaf(2)}}, {"m": {"ab": jnp.ones(2)}})
    assert error.surgery == ()
    assert "surgery=" not in error.fix
    assert error.mismatches == ("m.a*: on disk, not in the state passed in",)


def test_a_suggestion_goes_on_from_what_was_asked_for():
    disk, state = nested("m.enc.w", "m.old.w"), nested("m.net.w")
    state = jax.tree.map(lambda each: jnp.ones(each.shape, each.dtype), state)
    error = mismatch(disk, state, [ct.Rename("m.enc", "m.net")])
    assert list(map(as_code, error.surgery)) == ['ct.Rename("m.enc", "m.net")', 'ct.Drop("m.old")']
    assert plan(disk, state, error.surgery).differences == ()


def test_the_first_line_counts_what_is_lost():
    disk = {"m": {"w": leaf(4, 4), "head": leaf(4, 10), "old": leaf(3)}}
    state = {"m": {"w": jnp.ones((4, 4)), "head": jnp.ones((4, 6)), "new": jnp.ones((2, 2))}}
    error = mismatch(disk, state)
    first = error.fix.partition("\n")[0]
    assert "throws away 76 B of the 236 B on disk, in 2 leaves (m.head, m.old)" in first
    assert "leaves 16 B of the state as initialised, in 1 leaf (m.new)" in first
    assert "fixes it" not in error.fix


def test_a_surgery_that_loses_nothing_is_called_a_fix():
    error = mismatch({"m": {"enc": {"k": leaf(2)}}}, {"m": {"net": {"k": jnp.ones(2)}}})
    assert error.fix.startswith("this surgery fixes it")


def test_additions_are_counted_though_nothing_is_lost():
    error = mismatch({"m": {"a": leaf(2)}}, {"m": {"a": jnp.ones(2), "lora": {"a": jnp.ones((2, 3))}}})
    assert "keeps everything on disk and leaves 24 B of the state as initialised, in 1 leaf (m.lora.a)" in error.fix


def test_what_keeps_nothing_of_an_item_is_not_suggested():
    error = mismatch({"m": {"a": leaf(2, 3)}}, {"m": {"z": jnp.ones(7)}})
    assert error.surgery == ()
    assert "no leaf on disk is a likely source of 'm'" in error.fix


def test_a_list_that_nobody_would_read_is_not_suggested():
    names = ["".join(chr(97 + int(digit)) for digit in str(n)) for n in range(300)]
    disk = {"m": {"keep": leaf(1)} | {name: leaf(2) for name in names}}
    state = {"m": {"keep": jnp.ones(1)} | {name: jnp.ones((2, 2)) for name in names}}
    error = mismatch(disk, state)
    assert (error.surgery, "more than 200 operations" in error.fix) == ((), True)


def test_a_copy_that_is_dropped_is_not_lost():
    """Two leaves with one digest: a tied embedding that was saved twice."""
    record = [types.SimpleNamespace(records=tuple(each.records), skeletons={}) for each in stored(TIED).values()]
    same = tuple(dataclasses.replace(each, digest="xxh3:1") for each in record[0].records)
    templates = {"m": flatten.flatten_item({"embed": jnp.ones((4, 2))}, template=True)}

    def replan(operations):
        items = {"m": types.SimpleNamespace(records=same, skeletons={})}
        return make_plan.make_restore_plan(items, templates, Changes(surgery=ct.Surgery(operations)))

    assert suggest.find_suggestion(replan(()), replan).lost_leaves == ()


TIED = {"m": {"embed": leaf(4, 2), "head": leaf(4, 2)}}


@pytest.mark.parametrize("name", [name for name, _, _ in list_large_states()])
def test_the_time_grows_with_the_leaves_and_not_their_pairs(name):
    old, new = next((old, new) for each, old, new in list_large_states() if each == name)
    time_suggestion(old(300), new(300))  # Imports and caches.
    few, many = (time_suggestion(old(count), new(count)) for count in (600, 4_800))
    assert many[0] / max(few[0], 0.05) < 20, (few, many)  # 8 if it is linear, 64 if it is quadratic


def offered(disk, state):
    error = mismatch({"m": disk}, {"m": state})
    return list(map(as_code, error.surgery)), error.fix.partition("\n")[0]


@pytest.mark.parametrize(
    ("pieces", "fused", "merged", "is_assumed"),
    [
        ("qkv", "qkv", "q,k,v", False),
        ("qkv", "kqv", "k,q,v", False),
        ("qkv", "query_key_value", "q,k,v", False),
        (("gate", "up"), "up_gate", "up,gate", False),
        (("key", "value"), "value_key", "value,key", False),
        (("q_proj", "k_proj", "v_proj"), "vqk_proj", "v_proj,q_proj,k_proj", False),
        ("qkv", "in_kernel", "q,k,v", True),
    ],
)
def test_pieces_are_fused_in_the_order_of_the_fused_name(pieces, fused, merged, is_assumed):
    parts, whole = {name: leaf(4, 4) for name in pieces}, {fused: leaf(4, 4 * len(pieces))}
    operations, verdict = offered(parts, whole)
    assert operations[0].startswith(f'ct.Merge("m.{{{merged}}}"')
    assert ("check that {" in verdict) is is_assumed
    operations, verdict = offered(whole, parts)
    assert f'"m.{{{merged}}}"' in operations[0]
    assert operations[0].startswith("ct.Split(")
    assert ("check that {" in verdict) is is_assumed


def test_pieces_of_other_sizes_keep_their_sizes(tmp_path):
    parts = {"q": leaf(4, 8), "k": leaf(4, 2), "v": leaf(4, 3)}
    operations, _ = offered({"kqv": leaf(4, 13)}, parts)
    assert "{k,q,v}" in operations[0]
    assert "sizes=(2, 8, 3)" in operations[0]


def test_no_cast_from_complex_to_real_is_offered():
    assert offered({"s": leaf(2, dtype=jnp.complex64)}, {"s": leaf(2)})[0] == []
    assert offered({"s": leaf(2)}, {"s": leaf(2, dtype=jnp.complex64)})[0] != [], "control"


LONG = ("query", "key", "value", "out")


@pytest.mark.parametrize("short", ["qkvo", ("q_proj", "k_proj", "v_proj", "o_proj"), ("wq", "wk", "wv", "wo")], ids=str)
@pytest.mark.parametrize("below", ["", "kernel"])
def test_an_abbreviated_name_is_the_source_of_the_long_one(short, below):
    def build(names):
        return {name: {below: leaf(4, 4)} if below else leaf(4, 4) for name in names}

    operations, verdict = offered({"attn": build(short)}, {"attn": build(LONG)})
    assert "nothing on disk is lost" in verdict
    for old, new in zip(short, LONG):
        assert any(f"m.attn.{old}" in each and f"m.attn.{new}" in each for each in operations)


def test_an_abbreviation_of_two_names_says_nothing():
    operations, verdict = offered(
        {"k": leaf(4, 4), "s": leaf(3)}, {"key": leaf(4, 4), "kernel": leaf(4, 4), "s": leaf(3)}
    )
    assert "fixes it" not in verdict or not operations


def test_a_square_weight_of_pytorch_is_said_to_need_a_check():
    disk = {name: {"weight": leaf(4, 4), "bias": leaf(4)} for name in ("a", "b")}
    state = {name: {"kernel": leaf(4, 4), "bias": leaf(4)} for name in ("a", "b")}
    assert "check whether 2 leaves (m.a.weight, m.b.weight) must be transposed" in offered(disk, state)[1]
    disk["a"]["weight"], state["a"]["kernel"] = leaf(4, 6), leaf(6, 4)  # control: this one shows it
    operations, verdict = offered(disk, state)
    assert any("Transpose" in each for each in operations)
    assert "check" not in verdict
