# SPDX-License-Identifier: Apache-2.0
"""Factors: how one axis of an equation's results lies in its operands.

The term is that of sharding rules (as in Shardy): an equation has a factor for each axis along which it can be cut.
What has no factor is needed whole; it is never a guess.
"""

import dataclasses
from typing import Any, Literal

# Position of an axis in one operand or result; None if that value does not have the axis.
type Axis = int | None


@dataclasses.dataclass(frozen=True)
class Factor:
    """One axis along which an equation can be cut.

    Attributes:
        operands: Where the axis is in each operand; an operand with None is needed whole. Literals have None.
        results: Where the axis is in each result. None only if the kind is "sum".
        kind: "map" if rows of the results are computed from the same rows of the operands; "sum" if the axis is summed
            over, so that each piece gives a part of every result and the parts are added.
    """

    operands: tuple[Axis, ...]
    results: tuple[Axis, ...]
    kind: Literal["map", "sum"] = "map"


@dataclasses.dataclass(frozen=True)
class Piece:
    """Which rows of an axis are computed: those from `index * rows` on, `rows` of them.

    An axis may be longer than `size` by a whole factor, because axes merge in a reshape: then a piece is longer by the
    same factor. The last piece may go beyond the end; its rows there are copies of the last row.

    Attributes:
        index: Number of the piece; an int or a traced int32 scalar.
        rows: Rows in each piece.
        size: Rows in all pieces together, without those beyond the end.
    """

    index: Any
    rows: int
    size: int

    def measure(self, length: int) -> int:
        """Return how long a piece of an axis of this length is."""
        if length * self.rows % self.size:
            raise AssertionError(f"an axis of {length} cannot be cut into parts of {self.rows} of {self.size}")
        return length * self.rows // self.size
