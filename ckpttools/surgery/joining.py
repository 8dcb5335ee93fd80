# SPDX-License-Identifier: Apache-2.0
"""Join, split, copy and transpose stored leaves: the operations that change the set of leaves or their axes.

Handles names and shapes only; `plan.SourceLeaf` records the steps, which are applied to the arrays once they are read.
`Pad` and `Slice` depend on the leaf of the state, so on one leaf they come after all operations of this file.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence

from ..errors import StructureError
from ..spec.operations import Copy, Join, Merge, Operation, Pad, Slice, Split, Stack, Transpose, Unstack, as_code
from ..tree.leaf_paths import Names
from ..tree.records import Kind
from .array_operations import ArrayStep, PermuteStep, TakeStep
from .plan import SourceLeaf
from .renaming import find_outermost_depth, get_joined_place, rename_leaf, rename_part
from .resize import Shape

Restructuring = Copy | Transpose | Stack | Unstack | Merge | Split
"""The operations of this file."""


def restructure(
    sources: Iterable[SourceLeaf], operation: Restructuring, matches: frozenset[Names]
) -> Iterator[SourceLeaf]:
    """Yield the leaves after one operation.

    Args:
        sources: All leaves on disk.
        operation: The operation.
        matches: The parts that its pattern matches.

    Raises:
        StructureError: If the operation cannot be applied to a leaf that it matches.
    """
    joined: dict[Names, list[tuple[Names, SourceLeaf]]] = {}
    for source in sources:
        depth = find_outermost_depth(source.path, matches)
        if not depth:
            yield source
            continue
        _require_changeable(source, operation)
        part, rest = source.path[:depth], source.path[depth:]
        if isinstance(operation, Copy):
            yield source
            copied = ("copied", *source.actions)
            yield dataclasses.replace(source, path=rename_leaf(operation, source.path, matches), actions=copied)
        elif isinstance(operation, Transpose):
            yield _transpose(source, operation)
        elif isinstance(operation, Stack | Merge):
            joined.setdefault((*rename_part(operation, part), *rest), []).append((part, source))
        else:
            pieces = _unstack(source, operation) if isinstance(operation, Unstack) else _split(source, operation)
            for piece, taken in pieces:
                yield dataclasses.replace(taken, path=(*rename_part(operation, part, piece), *rest))
    if isinstance(operation, Stack | Merge) and joined:
        yield from _join_all(operation, joined)


def _require_changeable(source: SourceLeaf, operation: Operation) -> None:
    name, why = ".".join(source.path), ""
    if source.opaque:
        why = "belongs to an object with get_state, whose leaves only that object understands"
    elif source.record.kind == "value" and not isinstance(operation, Copy):
        why = "is a plain value, not an array"
    elif any(isinstance(each, Pad | Slice) for each in source.operations) and not isinstance(operation, Copy):
        why = "an earlier operation pads or slices to a shape that only the leaf of the state determines"
    if why:
        raise StructureError(
            what=f"{as_code(operation)} matches {name}, which {why}.",
            why="the leaf would be wrong, or lost.",
            fix="use a pattern that does not match that leaf; on one leaf, ct.Pad and ct.Slice come last.",
        )


def _add_step(source: SourceLeaf, step: ArrayStep, shape: Shape, action: str) -> SourceLeaf:
    actions = (*source.actions, action)
    return dataclasses.replace(source, operations=(*source.operations, step), shape=shape, actions=actions)


def _transpose(source: SourceLeaf, operation: Transpose) -> SourceLeaf:
    rank = len(source.shape)
    axes = operation.axes or tuple(reversed(range(rank)))
    if not operation.axes and rank < 2:
        return source  # A part may contain biases beside its kernels.
    if len(axes) != rank:
        raise StructureError(
            what=f"{as_code(operation)} matches {'.'.join(source.path)} of shape {source.shape}.",
            why=f"axes has {len(axes)} entries, and the array has {rank} axes.",
            fix="use a pattern that matches only arrays of that rank, such as one that ends in the kernel's name.",
        )
    return _add_step(source, PermuteStep(axes), tuple(source.shape[axis] for axis in axes), "transposed")


def _resolve_axis(source: SourceLeaf, operation: Stack | Unstack | Merge | Split, rank: int) -> int:
    """Return the axis of an operation, not negative, for an array of `rank` axes."""
    if not -rank <= operation.axis < rank:
        raise StructureError(
            what=f"{as_code(operation)} matches {'.'.join(source.path)} of shape {source.shape}.",
            why=f"axis {operation.axis} does not exist.",
            fix="use an axis that every matched array has, or a pattern that matches fewer arrays.",
        )
    return operation.axis % rank


def _unstack(source: SourceLeaf, operation: Unstack) -> Iterator[tuple[str, SourceLeaf]]:
    axis = _resolve_axis(source, operation, len(source.shape))
    shape = (*source.shape[:axis], *source.shape[axis + 1 :])
    for index in range(source.shape[axis]):
        yield str(index), _add_step(source, TakeStep(axis, index), shape, "unstacked")


def _split(source: SourceLeaf, operation: Split) -> Iterator[tuple[str, SourceLeaf]]:
    axis, names = _resolve_axis(source, operation, len(source.shape)), operation.piece_names
    total = source.shape[axis]
    sizes = operation.sizes or (total // len(names),) * len(names)
    if sum(sizes) != total:
        raise StructureError(
            what=f"{as_code(operation)} matches {'.'.join(source.path)} of shape {source.shape}.",
            why=f"pieces of {', '.join(map(str, sizes))} do not add up to the {total} of axis {axis}.",
            fix="pass sizes=(...) that add up, or a pattern that matches only arrays of that size.",
        )
    start = 0
    for index, (name, size) in enumerate(zip(names, sizes)):
        at = slice(index, None, len(names)) if operation.interleaved else slice(start, start + size)
        shape = (*source.shape[:axis], size, *source.shape[axis + 1 :])
        yield name, _add_step(source, TakeStep(axis, at), shape, "split")
        start += size


def _join_all(operation: Join, joined: dict[Names, list[tuple[Names, SourceLeaf]]]) -> Iterator[SourceLeaf]:
    expected: dict[Names, list[tuple[object, ...]]] = {}
    for path, members in joined.items():
        members.sort(key=lambda each: get_joined_place(operation, each[0]))
        places = [get_joined_place(operation, part) for part, _ in members]
        # Joined parts must have the same leaves: a layer without a bias would shift all layers after it.
        depth = len(rename_part(operation, members[0][0]))
        group = path[:depth]
        if expected.setdefault(group, places) != places:
            raise StructureError(
                what=f"{as_code(operation)}: {'.'.join(path)} would be joined from {len(members)} leaves, and other "
                f"leaves of {'.'.join(group)} from {len(expected[group])}.",
                why="one of the joined parts lacks that leaf, so values would be assigned to the wrong part.",
                fix="use several operations, each for parts with the same leaves.",
            )
        yield _join(operation, path, [source for _, source in members])


def _join(operation: Join, path: Names, parts: Sequence[SourceLeaf]) -> SourceLeaf:
    first = parts[0]
    is_stack = isinstance(operation, Stack)
    axis = _resolve_axis(first, operation, len(first.shape) + is_stack)
    for part in parts[1:]:
        alike = len(part.shape) == len(first.shape)
        sizes = zip(part.shape, first.shape)
        free = None if is_stack or (isinstance(operation, Merge) and operation.interleaved) else axis
        if not alike or any(a != b for at, (a, b) in enumerate(sizes) if at != free) or part.dtype != first.dtype:
            raise StructureError(
                what=f"{as_code(operation)} joins {'.'.join(first.path)}, {first.dtype}{list(first.shape)}, and "
                f"{'.'.join(part.path)}, {part.dtype}{list(part.shape)}.",
                why="joined arrays must have one dtype and equal sizes along all other axes.",
                fix="put a ct.Cast before it, or use a pattern that matches only such arrays.",
            )
    if is_stack:
        shape = (*first.shape[:axis], len(parts), *first.shape[axis:])
    else:
        shape = (*first.shape[:axis], sum(part.shape[axis] for part in parts), *first.shape[axis + 1 :])
    kind: Kind = "key" if first.record.kind == "key" else "array" if math.prod(shape) else "empty"
    record = dataclasses.replace(
        first.record, kind=kind, shape=shape, dtype=first.dtype, digest="", value=None, slices=(), scalar=""
    )
    return SourceLeaf(
        path=path,
        item=first.item,
        record=record,
        dtype=first.dtype,
        shape=shape,
        parts=tuple(parts),
        join=(operation, axis),
        actions=("stacked" if is_stack else "merged",),
    )
