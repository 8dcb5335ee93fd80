# SPDX-License-Identifier: Apache-2.0
"""Forward rules of custom_vjp functions: read, replaced, named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from remattools.jaxpr import forward_rules, jaxprs


@jax.custom_vjp
def scale(x, k):
    return jnp.sin(x) * k


def _forward(x, k):
    y = jnp.sin(x) * k
    return y, (y, jnp.cos(x), k)


scale.defvjp(_forward, lambda residuals, g: (g * residuals[1] * residuals[2], jnp.sum(g * residuals[0]) / residuals[2]))


def _equation(fn, *args):
    program = jaxprs.open_jaxpr(jax.make_jaxpr(fn)(*args))
    return next(equation for equation in program.eqns if "fwd_jaxpr_thunk" in equation.params)


def test_the_rule_has_residuals_and_then_results():
    rule = forward_rules.trace_forward_rule(_equation(scale, jnp.ones(3), jnp.float32(2)))
    assert [equation.primitive.name for equation in rule.eqns].count("cos") == 1
    assert rule.outvars[0] is rule.outvars[-1]  # y is a residual and the result


@pytest.mark.parametrize(
    "fn",
    [
        pytest.param(lambda x: jnp.sin(x), id="not-a-custom-vjp"),
        pytest.param(lambda x: jax.nn.relu(x), id="custom-jvp"),
    ],
)
def test_other_equations_have_no_rule(fn):
    program = jaxprs.open_jaxpr(jax.make_jaxpr(fn)(jnp.ones(3)))
    assert all(forward_rules.trace_forward_rule(equation) is None for equation in program.eqns)


def test_integer_functions_and_failing_rules_have_no_rule():
    @jax.custom_vjp
    def broken(x):
        return x + 1

    def fail(x):
        raise RuntimeError("never differentiated")

    broken.defvjp(fail, lambda _, g: (g,))
    assert forward_rules.trace_forward_rule(_equation(broken, jnp.ones(3, jnp.int32))) is None
    assert forward_rules.trace_forward_rule(_equation(broken, jnp.ones(3))) is None


def test_named_results_name_residuals_that_are_results():
    equation = _equation(scale, jnp.ones(3), jnp.float32(2))
    rule, named = forward_rules.name_results(forward_rules.trace_forward_rule(equation), {0: "mine"}, 1)
    assert named == {0}
    assert rule.outvars[0] is rule.outvars[-1]
    made = next(one for one in rule.eqns if jaxprs.get_checkpoint_name(one) == "mine")
    assert made.outvars[0] is rule.outvars[0]


def test_results_that_are_arguments_are_not_named_in_the_rule():
    @jax.custom_vjp
    def same(x):
        return x

    same.defvjp(lambda x: (x, ()), lambda _, g: (g,))
    rule = forward_rules.trace_forward_rule(_equation(same, jnp.ones(3)))
    assert forward_rules.name_results(rule, {0: "mine"}, 1) == (rule, frozenset())


@pytest.mark.parametrize("argnums", [0, 1, (0, 1)], ids=str)
def test_a_replaced_rule_runs_for_any_differentiated_arguments(argnums):
    seen = []

    def transform(rule):
        seen.append(rule)
        return rule

    args = (jnp.arange(3.0), jnp.float32(2))
    program = jax.make_jaxpr(scale)(*args)
    equations = [
        forward_rules.replace_forward_rule(one, transform) if "fwd_jaxpr_thunk" in one.params else one
        for one in jaxprs.open_jaxpr(program).eqns
    ]
    new = jaxprs.replace_equations(program, equations)
    expected = jax.grad(lambda *a: scale(*a).sum(), argnums)(*args)
    found = jax.grad(lambda *a: jaxprs.run(new, list(a))[0].sum(), argnums)(*args)
    jax.tree.map(np.testing.assert_array_equal, expected, found)
    assert len(seen) == 1
