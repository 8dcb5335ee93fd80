# SPDX-License-Identifier: Apache-2.0
"""A mismatch suggests the surgery that fixes it and touches nothing else."""

import jax
import jax.numpy as jnp
import pytest

import ckpttools as ct
from ckpttools.spec.operations import as_code
from ckpttools.surgery import suggest
from tests.ckpttools.surgery.plans import leaf, nested, plan


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
