# SPDX-License-Identifier: Apache-2.0
"""A traced program as a graph of nodes: equations, and stretches that are computed in pieces.

Sits on `jaxpr`. The graph is built from a jaxpr whose jits are inlined. A stretch that was found takes the place of its
equations as one node, so that what is found later cannot depend on it in both directions.
"""

import dataclasses
import heapq
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Literal

from jax.extend import core

from ...jaxpr import jaxprs
from ...jaxpr.axes.factor import Factor
from ...jaxpr.axes.rules import find_factors

# A value is large if it takes more than this many times what the program returns, or else this share of its largest.
_LARGE_TO_RESULT = 2
_LARGE_TO_LARGEST = 1 / 16
# In place of an axis: the pieces' results are added.
SUM: Final = "sum"
type Place = int | Literal["sum"]


@dataclasses.dataclass(frozen=True, eq=False)
class Stretch:
    """Equations that are computed together, piece by piece along one axis.

    Attributes:
        size: Length of the axis.
        pieces: Number of pieces; the last one may be shorter.
        members: Equations in the order they run; those without a factor are views of whole inputs.
        factors: The factor of each member, None for views.
        inputs: Variables that it reads, with their axis; None if a variable is needed whole.
        outputs: Variables that others read, with their axis, or `SUM`.
        vanished: Variables that no longer exist whole.
        seed: The largest of these, from which it was found.
        axis: The axis of the seed.
    """

    size: int
    pieces: int
    members: tuple[Any, ...]
    factors: tuple[Factor | None, ...]
    inputs: tuple[tuple[Any, int | None], ...]
    outputs: tuple[tuple[Any, Place], ...]
    vanished: tuple[Any, ...]
    seed: Any
    axis: int

    @property
    def invars(self) -> list[Any]:
        """The variables that it reads."""
        return list(dict.fromkeys(var for var, _ in self.inputs))

    @property
    def outvars(self) -> list[Any]:
        """The variables that it computes for others."""
        return [var for var, _ in self.outputs]

    @property
    def cut_members(self) -> list[tuple[Any, Factor]]:
        """The members without views, each with its factor."""
        pairs = zip(self.members, self.factors, strict=True)
        return [(equation, factor) for equation, factor in pairs if factor is not None]

    @property
    def rows(self) -> int:
        """Rows of the axis in one piece."""
        return -(-self.size // self.pieces)


# An equation of a jaxpr, or a stretch.
type Node = Any


class Program:
    """Nodes with who computes and who reads each variable.

    Attributes:
        jaxpr: The open jaxpr, for its arguments and results.
        consts: Values of constants.
        nodes: Equations and stretches in an order in which they can run.
        producers: Number of the node that computes a variable.
        readers: Numbers of the nodes that read a variable, ascending.
        results: Variables that the program returns.
    """

    def __init__(self, jaxpr: Any, nodes: Sequence[Node], consts: Mapping[Any, Any]) -> None:
        self.jaxpr = jaxpr
        self.consts = consts
        self.nodes = list(nodes)
        self.results = set(jaxprs.collect_variables(jaxpr.outvars))
        self.producers: dict[Any, int] = {}
        self.readers: dict[Any, list[int]] = {}
        for number, node in enumerate(self.nodes):
            self.producers.update(dict.fromkeys(node.outvars, number))
            for var in jaxprs.collect_variables(node.invars):
                self.readers.setdefault(var, []).append(number)
        self._factors: dict[int, tuple[Factor, ...]] = {}

    def replace_nodes(self, nodes: Sequence[Node]) -> "Program":
        """Return the program with other nodes."""
        return Program(self.jaxpr, nodes, self.consts)

    def measure_floor(self) -> int:
        """Return from which size in bytes a value is large."""
        returned = max(map(count_bytes, self.results), default=0)
        largest = max((count_bytes(var) for var in self.producers if var not in self.results), default=0)
        return max(_LARGE_TO_RESULT * returned + 1, int(largest * _LARGE_TO_LARGEST))

    def find_factors(self, number: int) -> tuple[Factor, ...]:
        """Return the factors of a node; a stretch has none."""
        if number not in self._factors:
            node = self.nodes[number]
            self._factors[number] = () if isinstance(node, Stretch) else find_factors(node)
        return self._factors[number]

    def find_producers(self, number: int) -> list[int]:
        """Return the numbers of the nodes whose results a node reads."""
        found = (self.producers.get(var) for var in jaxprs.collect_variables(self.nodes[number].invars))
        return list(dict.fromkeys(producer for producer in found if producer is not None))

    def find_readers(self, number: int) -> list[int]:
        """Return the numbers of the nodes that read a node's results."""
        return list(dict.fromkeys(reader for var in self.nodes[number].outvars for reader in self.readers.get(var, ())))

    def find_ancestors(self, numbers: Iterable[int]) -> set[int]:
        """Return the nodes that `numbers` depend on, without `numbers` themselves."""
        return _follow(numbers, self.find_producers)

    def find_descendants(self, numbers: Iterable[int]) -> set[int]:
        """Return the nodes that depend on `numbers`, without `numbers` themselves."""
        return _follow(numbers, self.find_readers)

    def replace_by_stretch(self, stretch: Stretch, numbers: Iterable[int]) -> "Program":
        """Return the program with one stretch in place of the equations `numbers`, in an order in which it can run."""
        gone = set(numbers)
        first = min(gone)
        nodes = [(number, node) for number, node in enumerate(self.nodes) if number not in gone]
        nodes.append((first, stretch))
        return self.replace_nodes(_sort(nodes))


def _follow(numbers: Iterable[int], step: Any) -> set[int]:
    start = set(numbers)
    seen: set[int] = set()
    remaining = list(start)
    while remaining:
        for other in step(remaining.pop()):
            if other not in seen and other not in start:
                seen.add(other)
                remaining.append(other)
    return seen


def _sort(nodes: Sequence[tuple[int, Node]]) -> list[Node]:
    """Return nodes in an order in which they can run, close to that of their keys."""
    producers = {var: index for index, (_, node) in enumerate(nodes) for var in node.outvars}
    waiting: list[set[int]] = []
    users: dict[int, list[int]] = {}
    for index, (_, node) in enumerate(nodes):
        needed = {producers[var] for var in jaxprs.collect_variables(node.invars) if var in producers}
        waiting.append(needed)
        for producer in needed:
            users.setdefault(producer, []).append(index)
    ready = [(key, index) for index, (key, _) in enumerate(nodes) if not waiting[index]]
    heapq.heapify(ready)
    order = []
    while ready:
        _, index = heapq.heappop(ready)
        order.append(nodes[index][1])
        for user in users.get(index, ()):
            waiting[user].discard(index)
            if not waiting[user]:
                heapq.heappush(ready, (nodes[user][0], user))
    if len(order) != len(nodes):
        raise AssertionError("a stretch depends on itself")
    return order


def count_bytes(var: Any) -> int:
    """Return the size of a variable or literal."""
    return jaxprs.count_aval_bytes(var.aval)


def is_variable(atom: Any) -> bool:
    """Whether an operand is a variable, not a literal."""
    return isinstance(atom, core.Var)
