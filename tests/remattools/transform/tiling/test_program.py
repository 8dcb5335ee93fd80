# SPDX-License-Identifier: Apache-2.0
"""Programs as graphs: who computes, who reads, and a stretch in place of its equations."""

import jax
import jax.numpy as jnp
import pytest

from remattools.transform.tiling.program import Program, Stretch

X = jax.ShapeDtypeStruct((8, 4), jnp.float32)


def _trace(fn):
    jaxpr = jax.make_jaxpr(fn)(X).jaxpr
    return Program(jaxpr, jaxpr.eqns, {})


def _branch(x):
    a = jnp.sin(x)
    b = jnp.cos(a)
    c = jnp.tan(x)
    return jnp.exp(b) + jnp.exp(c)


def _make_stretch(program, numbers):
    members = [program.nodes[number] for number in numbers]
    made = {var for equation in members for var in equation.outvars}
    inputs = {var: None for equation in members for var in equation.invars if var not in made}
    outputs = [
        (var, 0) for var in made if var in program.results or not set(numbers).issuperset(program.readers.get(var, ()))
    ]
    return Stretch(
        size=8,
        pieces=2,
        members=tuple(members),
        factors=(None,) * len(members),
        inputs=tuple((var, 0) for var in inputs),
        outputs=tuple(outputs),
        vanished=(),
        seed=members[0].outvars[0],
        axis=0,
    )


def test_producers_and_readers_are_followed_both_ways():
    program = _trace(_branch)
    assert program.find_ancestors([1]) == {0}
    assert program.find_descendants([0]) == {1, 3, 5}
    assert program.find_producers(5) == [3, 4]


def test_a_stretch_stands_where_all_that_it_reads_is_known():
    program = _trace(_branch)
    names = [node.primitive.name for node in program.nodes]
    assert names == ["sin", "cos", "tan", "exp", "exp", "add"]
    replaced = program.replace_by_stretch(_make_stretch(program, [3, 4, 5]), [3, 4, 5])
    assert [getattr(node, "primitive", "stretch").__str__() for node in replaced.nodes] == [
        "sin",
        "cos",
        "tan",
        "stretch",
    ]
    known = set(program.jaxpr.invars)
    for node in replaced.nodes:
        assert known.issuperset(node.invars)
        known.update(node.outvars)


def test_a_stretch_that_depends_on_itself_is_refused():
    program = _trace(_branch)
    with pytest.raises(AssertionError, match="depends on itself"):
        program.replace_by_stretch(_make_stretch(program, [0, 3]), [0, 3])  # cos lies between


def test_the_last_piece_may_be_shorter():
    program = _trace(_branch)
    stretch = _make_stretch(program, [0])
    assert (stretch.rows, stretch.rows * stretch.pieces) == (4, 8)
