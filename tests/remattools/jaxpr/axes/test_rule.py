# SPDX-License-Identifier: Apache-2.0
"""Which rows of an axis belong to a piece."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from remattools.jaxpr.axes.factor import Piece
from remattools.jaxpr.axes.rule import is_padded, make_positions, mask_rows, put_on_axis


@pytest.mark.parametrize(("index", "expected"), [(0, [0, 1, 2, 3]), (1, [4, 5, 5, 5])])
def test_positions_beyond_the_end_are_those_of_the_last_row(index, expected):
    piece = Piece(index=index, rows=4, size=6)
    assert is_padded(piece)
    np.testing.assert_array_equal(make_positions(piece, 6), expected)


def test_positions_of_a_longer_axis_scale_with_it():
    np.testing.assert_array_equal(make_positions(Piece(index=1, rows=2, size=4), 8), [4, 5, 6, 7])


def test_positions_of_a_traced_piece():
    positions = jax.jit(lambda index: make_positions(Piece(index, 2, 4), 4))(jnp.int32(1))
    np.testing.assert_array_equal(positions, [2, 3])


def test_rows_beyond_the_end_become_zero_even_if_they_are_infinite():
    rows = jnp.array([[1.0, 2.0], [jnp.inf, jnp.nan]])
    np.testing.assert_array_equal(mask_rows(rows, 0, Piece(1, 2, 3), 3), [[1.0, 2.0], [0.0, 0.0]])
    np.testing.assert_array_equal(mask_rows(rows, 0, Piece(0, 2, 3), 3), rows)


def test_a_vector_is_put_on_one_of_several_axes():
    assert put_on_axis(jnp.arange(3), 1, 3).shape == (1, 3, 1)
