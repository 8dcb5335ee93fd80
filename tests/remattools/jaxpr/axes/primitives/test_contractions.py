# SPDX-License-Identifier: Apache-2.0
"""Products and convolutions are cut along what is independent, and along what they sum over."""

import jax.numpy as jnp
import pytest
from jax import lax

from ..cutting import check, draw


@pytest.mark.parametrize(
    ("formula", "shapes", "expected"),
    [
        pytest.param("td,dv->tv", [(4, 3), (3, 6)], ["0 . -> 0", ". 1 -> 1", "1 0 -> sum"], id="matmul"),
        pytest.param("td,vd->tv", [(4, 3), (6, 3)], ["0 . -> 0", ". 0 -> 1", "1 1 -> sum"], id="transposed"),
        pytest.param(
            "bqhd,bkhd->bhqk",
            [(2, 4, 3, 5), (2, 6, 3, 5)],
            ["0 0 -> 0", "2 2 -> 1", "1 . -> 2", ". 1 -> 3", "3 3 -> sum"],
            id="scores",
        ),
        pytest.param("abc,abc->c", [(2, 4, 3), (2, 4, 3)], ["2 2 -> 0", "0 0 -> sum", "1 1 -> sum"], id="two-sums"),
    ],
)
def test_matrix_products(formula, shapes, expected):
    check(lambda x, y: jnp.einsum(formula, x, y), *map(draw, shapes), name="dot_general", expected=expected)


@pytest.mark.parametrize(
    ("numbers", "shapes", "expected"),
    [
        pytest.param(
            lax.RaggedDotDimensionNumbers((((1,), (1,)), ((), ())), (0,), (0,)),
            [(6, 4), (2, 4, 3)],
            [". 2 . -> 1", "1 1 . -> sum"],
            id="rows-by-group",
        ),
        pytest.param(
            lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ()),
            [(6, 4), (6, 3)],
            ["1 . . -> 1", ". 1 . -> 2"],
            id="sums-by-group",
        ),
    ],
)
def test_ragged_products_are_not_cut_along_the_ragged_axis(numbers, shapes, expected):
    def multiply(x, y):
        return lax.ragged_dot_general(x, y, jnp.array([2, 4]), numbers)

    check(multiply, *map(draw, shapes), name="ragged_dot_general", expected=expected)


@pytest.mark.parametrize(
    ("shapes", "options", "expected"),
    [
        pytest.param([(3, 4, 7), (6, 4, 3)], {}, ["0 . -> 0", ". 0 -> 1", "1 1 -> sum"], id="plain"),
        pytest.param([(3, 4, 7), (4, 1, 3)], {"feature_group_count": 4}, ["0 . -> 0", "1 0 -> 1"], id="depthwise"),
        pytest.param([(3, 4, 7), (8, 1, 3)], {"feature_group_count": 4}, ["0 . -> 0", "1 0 -> 1"], id="multiplied"),
        pytest.param([(3, 4, 7), (6, 2, 3)], {"feature_group_count": 2}, ["0 . -> 0"], id="groups-of-several-features"),
        pytest.param([(4, 4, 7), (6, 4, 3)], {"batch_group_count": 2}, [], id="groups-of-a-batch"),
    ],
)
def test_convolutions_are_not_cut_along_space(shapes, options, expected):
    def convolve(x, y):
        return lax.conv_general_dilated(x, y, (1,), "SAME", **options)

    check(convolve, *map(draw, shapes), name="conv_general_dilated", expected=expected)
