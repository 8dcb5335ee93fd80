# SPDX-License-Identifier: Apache-2.0
"""How long a piece is."""

import pytest

from remattools.jaxpr.axes.factor import Piece


def test_axes_that_are_longer_by_a_factor_have_longer_pieces():
    piece = Piece(index=0, rows=4, size=6)
    assert [piece.measure(length) for length in (6, 12, 600)] == [4, 8, 400]


def test_an_axis_that_has_no_such_part_is_refused():
    with pytest.raises(AssertionError, match="an axis of 7 cannot be cut into parts of 4 of 6"):
        Piece(index=0, rows=4, size=6).measure(7)
