# SPDX-License-Identifier: Apache-2.0
"""The private parts of JAX behave as this package assumes."""

import jax
import jax.numpy as jnp
import pytest
from jax.ad_checkpoint import checkpoint_name

from remattools import compat


def test_offloading_answers_are_those_of_jaxs_policies():
    policy = jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host")
    (equation,) = jax.make_jaxpr(jnp.dot)(jnp.ones((2, 2)), jnp.ones((2, 2))).eqns
    answer = policy(equation.primitive, *(var.aval for var in equation.invars), **equation.params)
    assert answer == compat.make_offloadable("device", "pinned_host")
    assert compat.parse_offload(answer) == ("device", "pinned_host")


@pytest.mark.parametrize("answer", [True, False, compat.SAVEABLE, compat.RECOMPUTE])
def test_other_answers_are_not_parsed_as_offloading(answer):
    assert compat.parse_offload(answer) is None


@pytest.mark.parametrize(("answer", "recomputes"), [(compat.SAVEABLE, False), (compat.RECOMPUTE, True)])
def test_jax_understands_the_answers(answer, recomputes):
    region = jax.checkpoint(lambda x: jnp.sin(jnp.cos(x)), policy=lambda *_, **__: answer)
    program = str(jax.make_jaxpr(lambda x: jax.vjp(region, x)[1](x))(1.0))
    assert (program.count(" cos ") > 2) is recomputes


def test_the_name_primitive_is_that_of_checkpoint_name():
    primitives = [e.primitive for e in jax.make_jaxpr(lambda x: checkpoint_name(jnp.sin(x), "a"))(1.0).eqns]
    assert [primitive is compat.NAME_PRIMITIVE for primitive in primitives] == [False, True]


def test_compiler_options_of_a_jit_are_found():
    options = {"xla_cpu_enable_fast_math": False}
    lowered = jax.jit(jnp.sin, compiler_options=options).lower(1.0)
    assert dict(compat.get_compiler_options(lowered)) == options
    assert compat.get_compiler_options(jax.jit(jnp.sin).lower(1.0)) == ()
    assert compat.get_compiler_options(object()) == ()


def test_each_call_of_a_transformation_has_its_own_trace():
    traces = []

    def function(x):
        traces.append(compat.get_current_trace())
        return jnp.sin(x)

    outside = compat.get_current_trace()
    assert compat.get_current_trace() == outside
    jax.grad(function)(1.0)
    assert traces[0]() is None  # it ended with the call
    jax.make_jaxpr(lambda x: function(x) + function(x))(1.0)
    assert traces[1] == traces[2]
    assert traces[1] is not traces[0]


def test_a_bound_equation_has_the_names_of_its_place_and_its_own():
    @jax.named_scope("inner")
    def function(x):
        return jnp.sin(x)

    (equation,) = jax.make_jaxpr(function)(1.0).eqns

    @jax.named_scope("outer")
    def bind(x):
        return compat.bind(equation, [x], equation.params)

    (bound,) = jax.make_jaxpr(bind)(jnp.ones(3)).eqns
    assert str(bound.source_info.name_stack) == "outer/inner"
    assert str(bound.source_info.traceback) == str(equation.source_info.traceback)


@pytest.mark.parametrize(
    ("function", "count"),
    [
        pytest.param(jnp.sin, 1, id="one-result"),
        pytest.param(lambda x: jax.lax.split(x, (1, 2)), 2, id="several-results"),
        pytest.param(jax.nn.relu, 1, id="custom-derivative"),
    ],
)
def test_results_of_a_bound_equation_are_a_list(function, count):
    (equation,) = jax.make_jaxpr(function)(jnp.ones(3)).eqns
    results = compat.bind(equation, [jnp.ones(3)], equation.params)
    assert isinstance(results, list)
    assert len(results) == count


def test_a_bound_equation_keeps_its_own_configuration():
    with jax.threefry_partitionable(False):
        equations = jax.make_jaxpr(lambda key: jax.random.bits(key, (3,)))(jax.random.key(0)).eqns
        expected = jax.random.bits(jax.random.key(0), (3,))
    (equation,) = [each for each in equations if each.primitive.name == "random_bits"]
    (bits,) = compat.bind(equation, [jax.random.key(0)], equation.params)
    assert bits.tolist() == expected.tolist()
    assert bits.tolist() != jax.random.bits(jax.random.key(0), (3,)).tolist(), "control"
