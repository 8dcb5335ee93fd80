# SPDX-License-Identifier: Apache-2.0
"""Elementwise primitives are cut along every axis."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ..cutting import check, describe, draw, find_equation, find_factors


@pytest.mark.parametrize(
    ("name", "function", "shapes", "expected"),
    [
        pytest.param("exp", jnp.exp, [(4, 6)], ["0 -> 0", "1 -> 1"], id="one-operand"),
        pytest.param("add", lax.add, [(4, 6), (4, 6)], ["0 0 -> 0", "1 1 -> 1"], id="two-operands"),
        pytest.param("mul", jnp.multiply, [(4, 1), (1, 6)], ["0 . -> 0", ". 1 -> 1"], id="stretched-operands"),
        pytest.param("mul", lambda x: x * 2.0, [(4, 1)], ["0 . -> 0"], id="literal-and-axis-of-one"),
        pytest.param("clamp", lambda x: lax.clamp(0.0, x, 1.0), [(4,)], [". 0 . -> 0"], id="scalar-limits"),
        pytest.param(
            "select_n",
            lambda x, y: lax.select_n(x > 0, x, y),
            [(4, 6), (4, 6)],
            ["0 0 0 -> 0", "1 1 1 -> 1"],
            id="select",
        ),
        pytest.param("name", lambda x: checkpoint_name(x, "a"), [(4,)], ["0 -> 0"], id="checkpoint_name"),
        pytest.param("convert_element_type", lambda x: x.astype(jnp.int32), [(4,)], ["0 -> 0"], id="cast"),
        pytest.param(
            "reduce_precision", lambda x: lax.reduce_precision(x, 8, 7), [(4,)], ["0 -> 0"], id="reduce_precision"
        ),
        pytest.param(
            "bitcast_convert_type",
            lambda x: lax.bitcast_convert_type(x, jnp.int32),
            [(4, 6)],
            ["0 -> 0", "1 -> 1"],
            id="bitcast-narrower",
        ),
        pytest.param(
            "bitcast_convert_type",
            lambda x: lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.int64).astype(jnp.int32), jnp.int64),
            [(4, 2)],
            ["0 -> 0", "1 -> 1"],
            id="bitcast-same",
        ),
        pytest.param(
            "optimization_barrier", lambda *x: lax.optimization_barrier(x), [(4,), (4,)], ["0 0 -> 0 0"], id="barrier"
        ),
        pytest.param(
            "optimization_barrier", lambda *x: lax.optimization_barrier(x), [(4,), (6,)], [], id="barrier-of-two-shapes"
        ),
        pytest.param("sin", jnp.sin, [(1,)], [], id="control-nothing-to-cut"),
    ],
)
def test_factors_and_pieces(name, function, shapes, expected):
    check(function, *(draw(shape) for shape in shapes), name=name, expected=expected)


def test_a_constraint_has_factors_along_axes_that_are_not_sharded():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec(None, "data"))
    check(
        lambda x: lax.with_sharding_constraint(x, sharding),
        draw((4, 6, 2)),
        name="sharding_constraint",
        expected=["0 -> 0", "2 -> 2"],
        gradients=False,
    )


def test_an_axis_sharded_on_an_explicit_mesh_has_no_factor():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        x = jax.device_put(draw((4, 6)), NamedSharding(mesh, PartitionSpec("data", None)))
        equation, _ = find_equation(jnp.sin, x, name="sin")
        assert [describe(factor) for factor in find_factors(equation)] == ["1 -> 1"]
