# SPDX-License-Identifier: Apache-2.0
"""What one block should keep: the cheapest recomputation for a number of bytes.

Sits on `graph`. An integer program, solved exactly by HiGHS. Recomputing a value takes
everything it depends on, up to what is kept: chains are priced as chains.
"""

import dataclasses
import functools
from collections.abc import Container, Iterable, Sequence

import numpy as np
import scipy  # its submodules come when they are first used: importing the solver takes a second

from .graph import Graph, Step, compute_live_bytes
from .op_cost import Rates

_WORK_KINDS = ("matrix", "reduction", "elementwise", "other")
# The solver is stopped by its own count, so that a busy machine gives no other plan; the time is for giants only.
_NODES, _SOLVER_S = 2000, 30.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """What a block keeps, and what follows from it.

    Attributes:
        names: Values kept, as rules name them; None for a block without a region.
        saved_bytes: From forward to backward, the block's inputs apart.
        forward_bytes: The most that its forward pass needs besides.
        backward_bytes: The most that its backward pass needs, recomputation included, what is kept included.
        cycles: Of recomputation, by kind of operation: matrix, reduction, elementwise, other.
        output_cycles: Of recomputing the block's outputs besides, for a block of the same group that reads them.
    """

    names: tuple[str, ...] | None
    saved_bytes: int
    forward_bytes: int
    backward_bytes: int
    cycles: tuple[float, ...]
    output_cycles: float = 0.0

    @property
    def total_cycles(self) -> float:
        """Of all recomputation."""
        return sum(self.cycles)


class BlockProblem:
    """The choices of one block.

    Args:
        graph: The block's graph, from `block_graph`.
        rates: Of the target.
        stacked: Whether a loop stacks what it keeps.
    """

    def __init__(self, graph: Graph, rates: Rates, *, stacked: bool = False) -> None:
        self.graph = graph = graph.adapt_to(rates)
        self.stacked = stacked
        self.costs = [graph.count_cycles(step, rates) for step in graph.forward]
        self.steps = self._find_recomputed_steps(())  # what a backward pass could have to recompute
        used = {v for number in self.steps for v in (*graph.forward[number].reads, *graph.forward[number].writes)}
        self.names: dict[str, list[int]] = {}
        self.bytes: dict[str, int] = {}
        for candidate in graph.candidates:
            if candidate.value in used:
                self.names.setdefault(candidate.name, []).append(candidate.value)
                self.bytes[candidate.name] = self.bytes.get(candidate.name, 0) + candidate.bytes

    @functools.cached_property
    def plain_choice(self) -> Choice:
        """No region: everything that the backward pass reads is kept."""
        graph = self.graph
        if self.stacked:  # between two loops no compiler makes anything again
            return self._make_plain_choice(graph.residuals)
        if graph.fuses_products:
            return self._make_plain_choice(graph.materialized_residuals)
        # A compiler makes fused values again from others rather than keep them, but repeats no matrix product.
        fusible = [graph.forward[number].work.kind in ("elementwise", "free") for number in range(len(self.costs))]
        costs = [1e-3 * cost if fuses else cost for cost, fuses in zip(self.costs, fusible, strict=True)]
        return self._make_plain_choice(
            {v for name in self._find_cheapest_names(costs, 1e-4, np.inf) for v in self.names[name]}
        )

    def _make_plain_choice(self, saved: Iterable[int]) -> Choice:
        graph, saved = self.graph, set(saved)
        return Choice(
            names=None,
            saved_bytes=graph.count_bytes(saved),
            forward_bytes=self._compute_forward_bytes(saved),
            backward_bytes=max(compute_live_bytes(graph, self._order_backward(saved), live_at_start=saved), default=0),
            cycles=(0.0,) * len(_WORK_KINDS),
        )

    def make_choice(self, names: Iterable[str]) -> Choice:
        """What follows from keeping these; names of values that are not read then are left out."""
        graph, given = self.graph, tuple(dict.fromkeys(names))
        kept = {value for name in given for value in self.names[name]}
        again = self._find_recomputed_steps(kept)
        # What nobody reads any more is not kept, whatever the rule says: JAX drops it.
        read = graph.residuals.union(*(graph.forward[number].reads for number in again))
        kept_names = tuple(name for name in given if read.intersection(self.names[name]))
        kept &= read
        cycles = dict.fromkeys(_WORK_KINDS, 0.0)
        for number in again:
            kind = graph.forward[number].work.kind
            cycles[kind if kind in cycles else "other"] += self.costs[number]
        return Choice(
            names=kept_names,
            saved_bytes=sum(self.bytes[name] for name in kept_names),
            forward_bytes=self._compute_forward_bytes(kept),
            backward_bytes=max(compute_live_bytes(graph, self._order_backward(kept), live_at_start=kept), default=0),
            cycles=tuple(cycles.values()),
            output_cycles=sum(
                self.costs[number] for number in self._find_recomputed_steps(kept, outputs=True) if number not in again
            ),
        )

    def find_cheapest(self, price: float, limit_bytes: float = np.inf) -> Choice:
        """The choice with the least of recomputation cycles plus `price` times the kept bytes.

        Args:
            price: Cycles that a kept byte is worth.
            limit_bytes: The most that may be kept.
        """
        return self.make_choice(self._find_cheapest_names(self.costs, price, limit_bytes))

    def _find_cheapest_names(self, costs: Sequence[float], price: float, limit_bytes: float) -> list[str]:
        names, steps = list(self.names), list(self.steps)
        if not names or not steps:
            return []
        rows = self._build_constraints(names, steps)
        sizes = np.array([self.bytes[name] for name in names], float)
        # Cycles and bytes differ by orders of magnitude between models; the solver's tolerances do not.
        scale = max(max(costs[number] for number in steps), 1.0)
        weights = np.concatenate([price * sizes + 1e-6 * scale, [costs[number] for number in steps]]) / scale
        constraints = [scipy.optimize.LinearConstraint(rows[0], lb=rows[1])]
        if np.isfinite(limit_bytes):
            total = max(sizes.sum(), 1.0)
            budget = np.concatenate([sizes / total, np.zeros(len(steps))])[None]
            budget_row = scipy.sparse.csr_array(budget)
            constraints.append(scipy.optimize.LinearConstraint(budget_row, ub=[limit_bytes / total]))
        found = scipy.optimize.milp(
            weights,
            constraints=constraints,
            integrality=np.concatenate([np.ones(len(names)), np.zeros(len(steps))]),
            bounds=scipy.optimize.Bounds(0, 1),
            options={"node_limit": _NODES, "time_limit": _SOLVER_S, "mip_rel_gap": 1e-4},
        )
        if found.x is None:  # stopped without any solution: nothing kept is one
            return []
        return [name for name, taken in zip(names, found.x, strict=False) if taken > 0.5]

    def _build_constraints(
        self, names: Sequence[str], steps: Sequence[int]
    ) -> "tuple[scipy.sparse.csr_array, list[float]]":
        """For each value that is read: kept, or made again, if its reader runs."""
        by_value: dict[int, list[int]] = {}
        for column, name in enumerate(names):
            for value in self.names[name]:
                by_value.setdefault(value, []).append(column)
        column_of = {number: len(names) + place for place, number in enumerate(steps)}
        entries: list[tuple[int, int, float]] = []
        lower: list[float] = []

        def require(value: int, reader: int | None) -> None:
            row = len(lower)
            entries.extend((row, column, 1.0) for column in by_value.get(value, ()))
            entries.append((row, column_of[self.graph.producers[value]], 1.0))
            if reader is not None:
                entries.append((row, column_of[reader], -1.0))
            lower.append(1.0 if reader is None else 0.0)

        for value in self.graph.residuals:
            require(value, None)
        for number in steps:
            for value in self.graph.forward[number].reads:
                if value in self.graph.producers:
                    require(value, number)
        row_numbers, columns, data = zip(*entries, strict=True)
        matrix = scipy.sparse.csr_array((data, (row_numbers, columns)), shape=(len(lower), len(names) + len(steps)))
        return matrix, lower

    def _find_recomputed_steps(self, saved: Container[int], *, outputs: bool = False) -> tuple[int, ...]:
        """Forward steps that have to run again if only `saved` is there, in order; those for the outputs if asked."""
        graph = self.graph
        made = {value for value in graph.outputs if value in graph.producers} if outputs else set()
        wanted = [value for value in graph.residuals | made if value not in saved]
        found: set[int] = set()
        while wanted:
            number = graph.producers[wanted.pop()]
            if number not in found:
                found.add(number)
                wanted += [v for v in graph.forward[number].reads if v in graph.producers and v not in saved]
        return tuple(sorted(found))

    def _order_backward(self, saved: Container[int]) -> list[Step]:
        """The backward pass, and forward steps made again where they are first needed."""
        graph, order = self.graph, list[Step]()
        waiting = set(self._find_recomputed_steps(saved))
        for step in graph.backward:
            wanted, found = list(step.reads), set[int]()
            while wanted:
                number = graph.producers.get(wanted.pop())
                if number in waiting:
                    waiting.remove(number)
                    found.add(number)
                    wanted += graph.forward[number].reads
            order += [*(graph.forward[number] for number in sorted(found)), step]
        return [dataclasses.replace(step, writes=tuple(v for v in step.writes if v not in saved)) for step in order]

    def _compute_forward_bytes(self, saved: Iterable[int]) -> int:
        return max(compute_live_bytes(self.graph, self.graph.forward, live_at_end=saved), default=0)
