# SPDX-License-Identifier: Apache-2.0
"""Primitives that move elements are cut where rows stay together."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from ..cutting import check, draw


@pytest.mark.parametrize(
    ("name", "function", "shapes", "expected"),
    [
        pytest.param(
            "broadcast_in_dim",
            lambda x: lax.broadcast_in_dim(x, (5, 4, 3), (1, 2)),
            [(4, 1)],
            [". -> 0", "0 -> 1", ". -> 2"],
            id="broadcast",
        ),
        pytest.param("broadcast_in_dim", lambda x: jnp.zeros((4, 3)) + x, [()], [". -> 0", ". -> 1"], id="zeros"),
        pytest.param("reshape", lambda x: x.reshape(24, 5), [(4, 6, 5)], ["0 -> 0", "2 -> 1"], id="merge"),
        pytest.param("reshape", lambda x: x.reshape(4, 6, 5), [(24, 5)], ["0 -> 0", "1 -> 2"], id="split"),
        pytest.param(
            "reshape", lambda x: x.reshape(4, 3, 2, 5), [(4, 6, 5)], ["0 -> 0", "1 -> 1", "2 -> 3"], id="heads"
        ),
        pytest.param("reshape", lambda x: x.reshape(3, 2, 5), [(2, 3, 5)], ["2 -> 2"], id="lengths-that-do-not-divide"),
        pytest.param("reshape", lambda x: x.reshape(6, 1, 4), [(1, 6, 4)], ["1 -> 0", "2 -> 2"], id="axes-of-one"),
        pytest.param("reshape", lambda x: x.reshape(0, 4), [(4, 0)], [], id="empty"),
        pytest.param("reshape", lambda x: lax.reshape(x, (24,), (1, 0)), [(4, 6)], [], id="with-a-transpose"),
        pytest.param(
            "transpose", lambda x: x.transpose(2, 0, 1), [(4, 3, 6)], ["2 -> 0", "0 -> 1", "1 -> 2"], id="transpose"
        ),
        pytest.param("squeeze", lambda x: lax.squeeze(x, (1,)), [(4, 1, 6)], ["0 -> 0", "2 -> 1"], id="squeeze"),
        pytest.param("slice", lambda x: x[:, :3, ::2], [(4, 6, 5)], ["0 -> 0"], id="slice"),
        pytest.param("slice", lambda x: x[:, :1], [(4, 6)], ["0 -> 0"], id="slice-of-one"),
        pytest.param("pad", lambda x: lax.pad(x, 0.0, [(0, 0, 0), (1, 2, 0)]), [(4, 6)], ["0 . -> 0"], id="pad"),
        pytest.param(
            "concatenate", lambda x, y: lax.concatenate([x, y], 1), [(4, 6), (4, 3)], ["0 0 -> 0"], id="concatenate"
        ),
        pytest.param("rev", lambda x: lax.rev(x, (1,)), [(4, 6)], ["0 -> 0"], id="rev"),
        pytest.param("split", lambda x: lax.split(x, (2, 4), axis=1), [(4, 6)], ["0 -> 0 0"], id="split-in-parts"),
        pytest.param(
            "stack", lambda x, y: jnp.stack([x, y], 1), [(4, 6), (4, 6)], ["0 0 -> 0", "1 1 -> 2"], id="stack"
        ),
        pytest.param("unstack", lambda x: jnp.unstack(x, axis=1), [(4, 2, 6)], ["0 -> 0 0", "2 -> 1 1"], id="unstack"),
        pytest.param("tile", lambda x: lax.tile(x, (1, 2)), [(4, 6)], ["0 -> 0"], id="tile"),
        pytest.param(
            "dynamic_slice",
            lambda x: lax.dynamic_slice(x, (1, 2), (4, 3)),
            [(4, 6)],
            ["0 . . -> 0"],
            id="dynamic_slice",
        ),
        pytest.param(
            "dynamic_update_slice",
            lambda x, y: lax.dynamic_update_slice(x, y, (0, 2)),
            [(4, 6), (4, 3)],
            ["0 0 . . -> 0"],
            id="dynamic_update_slice",
        ),
    ],
)
def test_factors_and_pieces(name, function, shapes, expected):
    check(function, *(draw(shape) for shape in shapes), name=name, expected=expected)


def test_uninitialized_values_have_factors_for_each_axis():
    equation = jax.make_jaxpr(lambda: lax.empty((4, 6), jnp.float32))().eqns[0]
    assert equation.primitive.name == "empty"
    check(lambda: lax.empty((4, 6), jnp.int32), name="empty", expected=["-> 0", "-> 1"], gradients=False)
