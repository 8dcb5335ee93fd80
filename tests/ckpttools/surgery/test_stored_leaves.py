# SPDX-License-Identifier: Apache-2.0
"""Operations rename, drop and cast stored leaves in order, and one that matches nothing raises."""

import jax.numpy as jnp
import pytest

import ckpttools as ct
from tests.ckpttools.surgery.plans import nested, plan, sources


def test_operations_are_applied_in_order():
    disk, state = nested("m.a", "m.b"), nested("m.a", "m.b")
    swap = [ct.Rename("m.a", "m.t"), ct.Rename("m.b", "m.a"), ct.Rename("m.t", "m.b")]
    assert sources(plan(disk, state, swap)) == {"m.a": "m.b", "m.b": "m.a"}


@pytest.mark.parametrize(
    "operation",
    [ct.Rename("m.encoder.w", "m.x"), ct.Drop("m.encodr"), ct.Cast("m.encodr", "int8", "int32"), ct.Reinit("m.encodr")],
    ids=lambda operation: type(operation).__name__,
)
def test_a_pattern_that_means_nothing_names_the_closest(operation):
    with pytest.raises(ct.StructureError, match="matches nothing") as caught:
        plan(nested("m.encode.k"), nested("m.encode.k"), [operation])
    assert "'m.encode" in caught.value.fix
    with pytest.raises(ct.StructureError, match=r"only='m\.x' matches nothing in the state"):
        plan(nested("m.y"), nested("m.y"), only=("m.x",))


def test_a_rename_loses_no_leaf():
    with pytest.raises(ct.StructureError, match=r"the name m.b: m.a and m.b|the name m.b: m.b and m.a") as caught:
        plan(nested("m.a", "m.b"), nested("m.b"), [ct.Rename("m.a", "m.b")])
    assert "ct.Drop" in caught.value.fix


def test_a_migration_passes_over_what_a_run_does_not_have():
    first = ct.Surgery([ct.Rename("ema", "average"), ct.Reinit("m.new.x"), ct.Rename("m.a", "m.b")])
    second = ct.Surgery([ct.Rename("m.b", "m.c"), ct.Rename("m.new", "m.newer")])
    state = {"m": {"c": jnp.ones(2), "newer": {"x": jnp.ones(3)}}}
    made = plan(nested("m.a"), state, migrations=(first, second))
    assert made.differences == ()
    assert sources(made) == {"m.c": "m.a", "m.newer.x": None}
