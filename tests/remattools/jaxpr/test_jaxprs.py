# SPDX-License-Identifier: Apache-2.0
"""Jaxprs are searched, named and split, and still compute the same values."""

import itertools

import jax
import jax.numpy as jnp
import pytest
from jax.ad_checkpoint import checkpoint_name

from remattools.jaxpr import jaxprs

X = jnp.linspace(0.1, 1.0, 6).reshape(2, 3)


def last_equation(function, *args):
    return jax.make_jaxpr(function)(*args).eqns[-1]


def scan(x):
    return jax.lax.scan(lambda carry, row: (carry + row.sum(), row * carry), 0.0, x)


@jax.custom_jvp
def custom(x):
    return jnp.sin(x)


custom.defjvp(lambda primals, tangents: (custom(*primals), tangents[0]))


@pytest.mark.parametrize(
    ("function", "is_region", "is_opaque", "count"),
    [
        pytest.param(jnp.sin, False, False, 0, id="sin"),
        pytest.param(jax.jit(jnp.sin), False, False, 1, id="jit"),
        pytest.param(scan, False, False, 1, id="scan"),
        pytest.param(lambda x: jax.lax.switch(0, [jnp.sin, jnp.cos, jnp.exp], x), False, False, 3, id="switch"),
        pytest.param(jax.checkpoint(jnp.sin), True, False, 1, id="checkpoint"),
        pytest.param(custom, False, True, 1, id="custom_jvp"),
    ],
)
def test_nested_jaxprs_are_found_and_classified(function, is_region, is_opaque, count):
    equation = last_equation(function, X)
    assert jaxprs.is_region(equation) is is_region
    assert jaxprs.is_opaque(equation) is is_opaque
    assert len(list(jaxprs.find_subjaxprs(equation))) == count


def test_one_branch_can_be_replaced():
    equation = last_equation(lambda x: jax.lax.switch(1, [jnp.sin, jnp.cos], x), X)
    (first, sin), (second, cos) = jaxprs.find_subjaxprs(equation)
    swapped = jaxprs.replace_subjaxprs(equation, {first: cos})
    assert [program for _, program in jaxprs.find_subjaxprs(swapped)] == [cos, cos]
    assert dict(jaxprs.find_subjaxprs(equation)) == {first: sin, second: cos}  # the original is unchanged


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.complex64])
def test_a_name_changes_no_value(dtype):
    program = jax.make_jaxpr(lambda x: jnp.sin(x) + 1)(X.astype(dtype))
    first, *rest = program.eqns
    named = jaxprs.replace_equations(program, [*jaxprs.add_checkpoint_name(first, "sine"), *rest])
    names = [jaxprs.get_checkpoint_name(equation) for equation in named.eqns]
    # JAX cannot save complex values by name, so both parts have it.
    assert names.count("sine") == (2 if dtype == jnp.complex64 else 1)
    assert jnp.array_equal(*jaxprs.run(named, [X.astype(dtype)]), *jaxprs.run(program, [X.astype(dtype)]))
    assert jaxprs.get_checkpoint_name(first) is None


def test_a_name_can_be_replaced():
    equation = last_equation(lambda x: checkpoint_name(x, "before"), X)
    (renamed,) = jaxprs.replace_checkpoint_name(equation, "after")
    assert [jaxprs.get_checkpoint_name(one) for one in (equation, renamed)] == ["before", "after"]
    assert (renamed.invars, renamed.outvars) == (equation.invars, equation.outvars)


@pytest.mark.parametrize("splits", [(), (1,), (1, 1), (1, 2, 3)], ids=str)
def test_a_program_run_in_segments_gives_equal_results(splits):
    def function(x):
        y = jnp.sin(x)
        z = jnp.cos(y)
        return y * z, X @ z.T  # y is read across segments, X is a constant

    program = jax.make_jaxpr(function)(X)
    edges = [0, *splits, len(program.eqns)]
    seen = []

    def make(piece):
        seen.append(len(piece.eqns))
        return lambda *leaves: jaxprs.run(piece, list(leaves))

    results = jaxprs.run_segments(program, [X], [(range(a, b), make) for a, b in itertools.pairwise(edges)])
    assert sum(seen) == len(program.eqns)
    assert 0 not in seen  # an empty segment is skipped
    for result, expected in zip(results, function(X), strict=True):
        assert jnp.allclose(result, expected)


def test_a_scan_is_taken_apart():
    weight = jnp.ones(3)
    equation = last_equation(lambda x: jax.lax.scan(lambda c, row: (c + row, row * weight), X[0], x, reverse=True), X)
    found = jaxprs.parse_scan(equation)
    assert found is not None
    assert (found.num_consts, found.num_carry, found.length, found.reverse, found.unroll) == (1, 1, 2, True, 1)
    assert len(found.body.jaxpr.invars) == 3
    assert jaxprs.parse_scan(last_equation(jnp.sin, X)) is None


@pytest.mark.parametrize(
    ("value", "size"), [(X, 24), (X.astype(jnp.bfloat16), 12), (jnp.float32(1), 4), (jax.random.key(0), 8)], ids=str
)
def test_bytes_of_an_abstract_value(value, size):
    assert jaxprs.count_aval_bytes(jax.typeof(value)) == size


def test_a_token_is_not_an_array():
    (token,) = jax.make_jaxpr(jax.lax.create_token)(X).out_avals
    assert not jaxprs.is_array(token)
    assert jaxprs.count_aval_bytes(token) == 0
    assert jaxprs.is_array(jax.typeof(X))


def test_variables_are_collected_once_and_without_literals():
    program = jax.make_jaxpr(lambda x, y: x * y + x * 2.0)(X, X)
    atoms = [atom for equation in program.eqns[:2] for atom in equation.invars]
    assert jaxprs.collect_variables(atoms) == list(program.jaxpr.invars)
