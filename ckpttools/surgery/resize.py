# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of `Pad` and `Slice`: which shapes they give, and where the block stands that both shapes share.

Everything that resizes reads it here: the plan of a restore, the arrays themselves, reports, and suggested surgery.
"""

from collections.abc import Sequence

from ..errors import StructureError
from ..spec.operations import Operation, Pad, Slice, as_code

type Shape = tuple[int, ...]


def needs_pad(shape: Shape, target_shape: Shape) -> bool:
    """Return whether an array is smaller than its target along some axis; both have one rank."""
    return any(old < new for old, new in zip(shape, target_shape, strict=True))


def needs_slice(shape: Shape, target_shape: Shape) -> bool:
    """Return whether an array is larger than its target along some axis; both have one rank."""
    return any(old > new for old, new in zip(shape, target_shape, strict=True))


def compute_resized_shape(operation: Pad | Slice, shape: Shape, target_shape: Shape) -> Shape:
    """Return the shape after one operation: `Pad` only grows axes, `Slice` only shrinks them."""
    bound = max if isinstance(operation, Pad) else min
    return tuple(map(bound, shape, target_shape))


def locate_block(operation: Pad | Slice, shape: Shape, resized_shape: Shape) -> tuple[slice, ...]:
    """Return the place of the smaller array in the larger one, axis by axis; `start` is 0 where it says nothing."""
    start = (*operation.start, *(0 for _ in shape))
    return tuple(slice(at, at + size) for at, size in zip(start, map(min, shape, resized_shape)))


def compute_shape(name: str, operations: Sequence[Operation], shape: Shape, target_shape: Shape) -> Shape:
    """Return the shape of an array after all `Pad` and `Slice` among its operations.

    Args:
        name: Name of the leaf, for errors.
        operations: All operations on this leaf.
        shape: Shape on disk.
        target_shape: Shape in the state; if its rank differs, `shape` is returned unchanged.

    Raises:
        StructureError: If a block would not lie inside the larger array.
    """
    if len(shape) != len(target_shape):
        return shape
    for operation in operations:
        if isinstance(operation, Pad | Slice):
            resized = compute_resized_shape(operation, shape, target_shape)
            if resized != shape:
                _require_inside(name, operation, shape, resized)
            shape = resized
    return shape


def _require_inside(name: str, operation: Pad | Slice, shape: Shape, resized: Shape) -> None:
    small, large = (shape, resized) if isinstance(operation, Pad) else (resized, shape)
    block = locate_block(operation, shape, resized)
    if len(operation.start) > len(shape) or any(part.stop > size for part, size in zip(block, large)):
        start = tuple(part.start for part in block)
        raise StructureError(
            what=f"{as_code(operation)} on {name}: a block of {small} at {start} exceeds an array of {large}.",
            why="values outside the larger array would be lost.",
            fix=f"start={tuple(big - little for big, little in zip(large, small))} is the last position that fits.",
        )
