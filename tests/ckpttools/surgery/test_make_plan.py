# SPDX-License-Identifier: Apache-2.0
"""Which leaf goes where, from names, shapes and dtypes alone."""

import jax
import jax.numpy as jnp

import ckpttools as ct
from tests.ckpttools.surgery.plans import leaf, nested, plan


def test_what_is_dropped_or_kept_is_not_read():
    disk, state = nested("m.enc.w", "m.old.w", "m.head.w"), nested("m.enc.w", "m.head.k", "m.lora.a")
    state = {"m": jax.tree.map(lambda each: jnp.ones(each.shape), state["m"])}
    made = plan(disk, state, [ct.Drop("m.old"), ct.Reinit("{head,lora}")])
    assert made.differences == ()
    assert [record.path for record in made.collect_records()["m"]] == [("enc", "w")]
    assert {".".join(source.stored_path) for source in made.dropped_leaves} == {"m.old.w", "m.head.w"}


def test_only_looks_at_nothing_else():
    disk, state = nested("m.enc.w", "m.old.w"), nested("m.enc.w", "m.new.w", "opt.mu.w")
    made = plan(disk, state, only=("m.enc",))
    assert (made.differences, list(made.collect_records())) == ((), ["m"])
    lacking = plan(disk, nested("m.enc.w", "m.enc.b"), only=("m.enc",))
    assert [str(each) for each in lacking.differences] == ["m.enc.b: not on disk"]


def test_a_cast_is_allowed_for_that_very_dtype():
    disk, state = (
        {"m": {"w": leaf(2), "n": leaf(dtype=jnp.int32)}},
        {"m": {"w": leaf(2, dtype=jnp.bfloat16), "n": leaf()}},
    )
    cast = ct.Cast("m", "float32", "bfloat16")
    assert [str(each) for each in plan(disk, state, [cast]).differences] == ["m.n: int32[] on disk, float32[] here"]
    assert len(plan(disk, state, [ct.Cast("m", "float16", "bfloat16")]).differences) == 2
