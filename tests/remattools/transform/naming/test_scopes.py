# SPDX-License-Identifier: Apache-2.0
"""Module paths in the name stacks of traced operations."""

import jax
import pytest

from remattools.jaxpr import jaxprs
from remattools.transform.naming import scopes
from tests.remattools.models import Tower, inputs


def trace(model, *, record):
    def run(x):
        if not record:
            return model(x)
        with scopes.record_paths([((), model)]):
            return model(x)

    return jaxprs.open_jaxpr(jax.make_jaxpr(run)(inputs()))


def find_paths(program):
    found = (scopes.find_path(str(equation.source_info.name_stack)) for equation in program.eqns)
    return {path for path in found if path is not None}


def test_operations_carry_the_path_of_their_module():
    paths = find_paths(trace(Tower(depth=2), record=True))
    assert {("layers", 1, "mlp"), ("layers", 0, "attention"), ("head",)} <= paths
    assert find_paths(trace(Tower(depth=2), record=False)) == set(), "control"


def test_classes_are_restored_also_after_an_error():
    model = Tower(depth=1)
    before = dict(vars(model))

    def fail():
        with scopes.record_paths([((), model)]):
            assert type(model) is not Tower
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert type(model) is Tower
    assert vars(model) == before


def test_name_stacks_are_read_from_the_outside_in():
    stack = "jvp(rt:layers.0)/rt:layers.0.mlp"
    assert scopes.find_paths(stack) == [("layers", 0), ("layers", 0, "mlp")]
    assert scopes.find_path(stack) == ("layers", 0, "mlp")
    assert scopes.find_path("jvp(other)") is None


def test_outputs_are_distinguished_from_the_users_names():
    assert scopes.parse_output("rt-out:layers.0#2") == (("layers", 0), 2)
    assert scopes.parse_output("qkv") is None
