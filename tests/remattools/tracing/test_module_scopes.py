# SPDX-License-Identifier: Apache-2.0
"""Module paths in a measured trace change neither the program nor what the user traces later."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import remattools as rt
from remattools.compiler.lower import lower
from remattools.tracing import pure_call
from remattools.tracing.module_scopes import add_module_scopes
from tests.remattools.models import Tower, inputs, loss

X = inputs(8, 8)


CPU = rt.find_target("cpu")


def _lower_both(fn, model):
    """Lower a gradient as `measure` does, and without scopes."""
    call = pure_call.stage(fn, (model, X))
    shardings = CPU.placements([None] * len(call.leaves))
    leaves = [
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding, weak_type=leaf.weak_type)
        for leaf, sharding in zip(call.abstractify_leaves(), shardings, strict=True)
    ]
    plain = jax.jit(pure_call.make_pure(call, differentiate=True)).lower(leaves)
    return lower(call, CPU, differentiate=True).lowered, plain


@pytest.mark.parametrize(
    "rules",
    [
        pytest.param({}, id="plain"),
        pytest.param({"layers.*": "nothing_saveable"}, id="region"),
        pytest.param({"layers.*": "everything_saveable"}, id="policy that saves names"),
        pytest.param({"layers.*": rt.Remat(save=("mlp.up",))}, id="names"),
        pytest.param({"layers.*": rt.Remat(group=2)}, id="groups"),
        pytest.param({"layers.*": "nothing_saveable", "mlp": "dots_saveable"}, id="regions inside regions"),
    ],
)
def test_the_measured_program_is_the_program_without_scopes(rules):
    model = nnx.eval_shape(Tower)
    if rules:
        rt.apply(model, rules)
    measured, plain = _lower_both(loss, model)
    assert measured.as_text() == plain.as_text()
    assert "rt:layers.1" in measured.compile().as_text()
    if not rules:
        assert "rt:layers.1" not in plain.compile().as_text()  # control


def test_a_hand_written_policy_sees_no_new_names():
    def hand_loss(model, x):
        policy = jax.checkpoint_policies.save_anything_except_these_names("nothing")
        graphdef, state = nnx.split(model)
        run = jax.checkpoint(lambda state, x: jnp.mean(nnx.merge(graphdef, state)(x) ** 2), policy=policy)
        return run(state, x)

    measured, plain = _lower_both(hand_loss, nnx.eval_shape(Tower))
    assert measured.as_text() == plain.as_text()


@pytest.mark.parametrize("jit", [pytest.param(nnx.jit, id="nnx.jit"), pytest.param(jax.jit, id="jax.jit")])
def test_a_jitted_function_keeps_its_own_traces(jit):
    model = Tower()
    classes = [type(module) for _, module in nnx.iter_modules(model)]
    traces = []

    def forward(model, x):
        traces.append(type(model))
        return model(x)

    jitted = jit(forward)
    measured = rt.measure(jitted, model, X, target="cpu")
    assert any(row.path.startswith("layers") for row in measured.live)
    jitted(model, X)
    assert traces[-1] is Tower
    assert "rt:" not in jitted.lower(model, X).as_text(debug_info=True)
    assert [type(module) for _, module in nnx.iter_modules(model)] == classes


def test_classes_are_restored_after_an_error():
    model, seen = Tower(), []

    def fail():
        with add_module_scopes([((), model)]):
            seen.append(type(model))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert seen != [Tower]
    assert type(model) is Tower
