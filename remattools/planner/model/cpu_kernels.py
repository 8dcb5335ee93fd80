# SPDX-License-Identifier: Apache-2.0
"""How XLA's CPU compiler turns operations into kernels: what it copies, fuses, stores and runs first.

Sits on `op_work`; `dataflow_graph` and `memory` ask it where a target is a CPU. Read from compiled programs (jax 0.12)
and from the rules of XLA's `InstructionFusion`, and the same on one device and on each device of a mesh:

-   A product reads its operands with the contracted axes last (left) or first (right). An operand of more than two
    axes in another order is copied: the gradient of a layer's weights copies the layer's cotangent.
-   An element-wise value with several readers is computed within each of them if it is cheap, but only once and stored
    if it is costly (`exp`, `tanh`, a division).
-   A cheap one of several large operands is stored as well if one of its readers has another operand that depends on
    it through memory. In a plain block each cotangent depends on the block's results, so what both passes read is
    stored; in a region, what is recomputed is not.
-   A reduction is a call of a library. What it alone reads is computed inside; all else is stored for it, and so is an
    operand that is broadcast.
-   A kernel runs as soon as its operands are computed, whatever the program's order, and an element-wise one may write
    its result over an operand that nothing reads afterwards.
"""

import collections
import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence, Set
from typing import Any

from jax.extend import core

from .op_work import Access, Step, Work, estimate_work

_COPY_LABEL = "copy of an operand"  # no primitive's name
_BROADCASTS = frozenset({"broadcast_in_dim", "iota"})
# An operand is large if it has more than this share of the result's bytes: a mask of float64 values has an eighth.
_LARGE_SHARE = 0.12
# Their operands are smaller than their results, but are not broadcast.
_JOINING_PRIMITIVES = frozenset({"pad", "concatenate"})


def find_copied_operands(equation: Any) -> list[Any]:
    """Return the operands of a product that a CPU copies since their axes have another order."""
    if equation.primitive.name != "dot_general":
        return []
    contracted, batch = equation.params["dimension_numbers"]
    found = []
    for side, atom in enumerate(equation.invars):
        axes = range(len(atom.aval.shape))
        free = [axis for axis in axes if axis not in (*contracted[side], *batch[side])]
        needed = [*batch[side], *(free, contracted[side])[side], *(contracted[side], free)[side]]
        # Products of matrices read either of them transposed.
        if len(axes) > 2 and needed != list(axes) and isinstance(atom, core.Var):
            found.append(atom)
    return found


def find_broadcast_operands(equation: Any) -> list[Any]:
    """Return the operands of an element-wise operation that have fewer elements than its result, scalars apart."""
    is_joining = equation.primitive.name in _JOINING_PRIMITIVES
    if is_joining or len(equation.outvars) != 1 or estimate_work(equation).kind != "elementwise":
        return []
    count = _count_elements(equation.outvars[0])
    return [atom for atom in equation.invars if isinstance(atom, core.Var) and 1 < _count_elements(atom) < count]


def _count_elements(atom: Any) -> int:
    return math.prod(atom.aval.shape)


def add_copies(steps: Iterable[Step], sizes: list[int], broadcasts: dict[tuple[int, int], int]) -> Iterator[Step]:
    """Yield steps with the copies and broadcasts of their operands before them, as steps and values of their own.

    Args:
        steps: The steps.
        sizes: Bytes of each value by its number; grows by the new values.
        broadcasts: The values that were broadcast, by their numbers and the bytes of the result; grows.
    """
    for step in steps:
        replaced: dict[int, int] = {}
        for value in step.copied:
            replaced[value] = len(sizes)
            sizes.append(sizes[value])
            yield Step((value,), (replaced[value],), Work("elementwise", 0.0), label=_COPY_LABEL)
        for value in step.broadcast:
            size = sizes[step.writes[0]]
            if (value, size) not in broadcasts:
                broadcasts[value, size] = len(sizes)
                sizes.append(size)
                yield Step((value,), (broadcasts[value, size],), Work("free", 0.0), label="broadcast_in_dim")
            replaced[value] = broadcasts[value, size]
        yield dataclasses.replace(step, reads=tuple(replaced.get(value, value) for value in step.reads))


@dataclasses.dataclass(frozen=True)
class _Reach:
    """The later steps that depend on one step, as sets in the bits of an integer.

    Attributes:
        direct: Those that read its results; where these are reshaped, those that read the new shape.
        all: All of them.
        apart: Those that depend on it through memory.
    """

    direct: int = 0
    all: int = 0
    apart: int = 0


def find_fused_values(
    order: Sequence[Step], sizes: Sequence[int], materialized: Set[int], num_forward: int = 0
) -> frozenset[int]:
    """Return the values that exist only inside kernels when these steps run.

    Args:
        order: The steps as the program has them.
        sizes: Bytes of each value by its number.
        materialized: Values that are in memory in any case.
        num_forward: How many steps are a forward pass whose results the others, its backward pass, depend on; 0 where
            the steps are not both passes of one function.
    """
    readers: dict[int, list[int]] = {}
    for number, step in enumerate(order):
        for value in step.reads:
            readers.setdefault(value, []).append(number)
    broadcasts = {value for step in order if step.label in _BROADCASTS for value in step.writes}
    backward = (1 << len(order)) - (1 << num_forward) if num_forward else 0
    found: set[int] = set()
    kernels: dict[int, frozenset[int]] = {}  # for each step those in whose kernels it runs
    reaches: dict[int, _Reach] = {}
    for number in reversed(range(len(order))):
        step = order[number]
        is_result = not materialized.isdisjoint(step.writes)
        reach = _Reach(0, backward, backward) if is_result and number < num_forward else _Reach()
        below = {reader for value in step.writes for reader in readers.get(value, ())}
        for reader in below:
            after, is_inside = reaches[reader], bool(order[reader].writes) and found.issuperset(order[reader].writes)
            is_reshape = is_inside and order[reader].work.kind == "free"
            reach = _Reach(
                direct=reach.direct | (after.direct if is_reshape else 1 << reader),
                all=reach.all | after.all | 1 << reader,
                apart=reach.apart | (after.apart if is_inside else after.all),
            )
        reaches[number] = reach
        within = frozenset[int]().union(*(kernels[reader] for reader in below))
        kinds = {order[kernel].work.kind for kernel in within}
        is_unary = sum(value not in broadcasts and _is_large(value, step, sizes) for value in step.reads) < 2
        if step.work.kind == "free":
            inside = not (step.label in _BROADCASTS and step.reads and "reduction" in kinds)
        elif step.work.kind != "elementwise" or kinds & {"matrix", "other"}:
            inside = False
        elif len(within) > 1:
            is_shared = "reduction" in kinds or step.work.is_costly
            inside = not is_shared and (is_unary or not reach.direct & reach.apart)
        else:
            inside = True
        inside &= not is_result
        kernels[number] = within if inside else frozenset((number,))
        if inside:
            found.update(step.writes)
    return frozenset(found)


def _is_large(value: int, step: Step, sizes: Sequence[int]) -> bool:
    return sizes[value] > _LARGE_SHARE * min(sizes[written] for written in step.writes)


def arrange_kernels(order: Sequence[Step], accesses: Sequence[Access]) -> list[Access]:
    """Return the kernels of these steps in the order in which they run.

    Args:
        order: The steps as the program has them.
        accesses: What each of them reads and writes; fused ones nothing.
    """
    kept = {value for step in order if step.work.kind != "matrix" and step.label != _COPY_LABEL for value in step.reads}
    sources: dict[int, frozenset[int]] = {}
    kernels = []
    for step, access in zip(order, accesses, strict=True):
        if not access.reads and not access.writes:
            continue
        is_copy, is_elementwise = step.label == _COPY_LABEL, step.work.kind == "elementwise"
        reads = access.reads
        if is_copy and step.reads[0] not in kept:
            reads = sources.get(step.reads[0], reads)  # computed a second time, in the other order
        if is_elementwise and not step.work.is_costly:
            sources.update(dict.fromkeys(step.writes, reads))
        overwritable = reads if is_elementwise and not is_copy else frozenset[int]()
        kernels.append(Access(reads, access.writes, overwritable))
    return [kernels[number] for number in _order_breadth_first(kernels)]


def _order_breadth_first(kernels: Sequence[Access]) -> list[int]:
    """Return the numbers of kernels: first those that wait for nothing, then each as soon as its operands are there."""
    producers = {value: number for number, kernel in enumerate(kernels) for value in kernel.writes}
    readers: dict[int, list[int]] = {}
    waiting = []
    for number, kernel in enumerate(kernels):
        needed = {producers[value] for value in kernel.reads if value in producers} - {number}
        waiting.append(len(needed))
        for producer in needed:
            readers.setdefault(producer, []).append(number)
    ready = collections.deque(number for number, count in enumerate(waiting) if not count)
    order = []
    while ready:
        order.append(ready.popleft())
        for reader in readers.get(order[-1], ()):
            waiting[reader] -= 1
            if not waiting[reader]:
                ready.append(reader)
    return order
