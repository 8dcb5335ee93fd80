# SPDX-License-Identifier: Apache-2.0
"""Tile: the action that computes large values in pieces.

A pure value, validated when it is built.
"""

import dataclasses
from typing import Any, Literal

from ..errors import RuleError

_DEFAULT_PIECES = 8
_DTYPES = ("float32", "float64")


@dataclasses.dataclass(frozen=True, init=False)
class Tile:
    """Compute the largest values in pieces along an axis, so that they never exist whole.

    In the traced program, the equations around each large value that are independent along one axis (of logits, of
    attention scores, of an MLP's hidden layer) are computed piece by piece, and again piece by piece in the backward
    pass. What is computed does not change; sums over the axis are added in another order.

    Args:
        pieces: Number of pieces; an int of at least 2, 8 if neither `pieces` nor `rows` is given.
        rows: Length of a piece along the axis, instead of `pieces`; an int of at least 1.
        axis: Axis of the large values, as a position in their shape; None to choose the one along which most bytes
            vanish; "batch" to compute everything in pieces along the leading axis of the arrays that are passed, which
            for a loss is gradient accumulation.
        accumulate: Dtype in which gradients of values that all pieces read, such as weights, are added: "float32",
            "float64", or None for their own. Never narrower than their own.
        keep_rows: Whether each row's maximum, sum and the like are kept for the backward pass rather than computed
            again.

    Raises:
        RuleError: If an argument is invalid.

    Example:
        >>> Tile(rows=512)
        Tile(rows=512)
        >>> Tile(8) == Tile()
        True
    """

    pieces: int | None = None
    _: dataclasses.KW_ONLY
    rows: int | None = None
    axis: int | Literal["batch"] | None = None
    accumulate: Literal["float32", "float64"] | None = "float32"
    keep_rows: bool = True

    def __init__(
        self,
        pieces: int | None = None,
        *,
        rows: int | None = None,
        axis: int | Literal["batch"] | None = None,
        accumulate: Literal["float32", "float64"] | None = "float32",
        keep_rows: bool = True,
    ) -> None:
        if pieces is None and rows is None:
            pieces = _DEFAULT_PIECES
        values = {"pieces": pieces, "rows": rows, "axis": axis, "accumulate": accumulate, "keep_rows": keep_rows}
        for field, value in values.items():
            object.__setattr__(self, field, value)
        self._check()

    def _check(self) -> None:
        if self.pieces is not None and self.rows is not None:
            raise RuleError(
                what=f"pieces={self.pieces!r} and rows={self.rows!r} are both given.",
                why="the axis is cut into a number of pieces, or into pieces of some length.",
                fix=f"Tile({self.pieces!r}), or Tile(rows={self.rows!r}).",
            )
        for field, least in (("pieces", 2), ("rows", 1)):
            value = getattr(self, field)
            if value is not None and (type(value) is not int or value < least):
                raise RuleError(
                    what=f"{field}={value!r} is not a count.",
                    why="the axis is cut into pieces." if field == "pieces" else "it is the length of a piece.",
                    fix=f"an int of {least} or more; without a Tile nothing is cut.",
                )
        if self.axis is not None and self.axis != "batch" and (type(self.axis) is not int or self.axis < 0):
            raise RuleError(
                what=f"axis={self.axis!r} is not an axis.",
                why="it is a position in the shape of the large values, counted from 0.",
                fix='an int such as 1, "batch", or None to choose it by the bytes that vanish.',
            )
        if self.accumulate is not None and self.accumulate not in _DTYPES:
            raise RuleError(
                what=f"accumulate={self.accumulate!r} is not a dtype for sums.",
                why="gradients of weights are added over the pieces in it.",
                fix='"float32", "float64", or None for the dtype of the weights.',
            )
        if type(self.keep_rows) is not bool:
            raise RuleError(
                what=f"keep_rows={self.keep_rows!r} is not a bool.",
                why="it decides whether each row's maximum and sum are kept for the backward pass.",
                fix="True or False.",
            )

    def count_pieces(self, size: int) -> int:
        """Return into how many pieces an axis of this length is cut; 1 if it is too short to be cut."""
        if self.rows is not None:
            return -(-size // self.rows)
        assert self.pieces is not None
        rows = -(-size // min(self.pieces, size))
        return -(-size // rows)

    def __repr__(self) -> str:
        parts = [] if self.pieces is None else [f"{self.pieces}" if self.pieces != _DEFAULT_PIECES else ""]
        for field in ("rows", "axis", "accumulate", "keep_rows"):
            default: Any = next(f.default for f in dataclasses.fields(self) if f.name == field)
            if getattr(self, field) != default:
                parts.append(f"{field}={getattr(self, field)!r}")
        return f"Tile({', '.join(filter(None, parts))})"
