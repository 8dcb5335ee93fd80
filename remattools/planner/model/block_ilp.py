# SPDX-License-Identifier: Apache-2.0
"""What one block should save: an integer linear program for the cheapest recomputation within a number of bytes.

Sits on `memory` and `time`; solved exactly by HiGHS. Recomputing a value means recomputing everything that it depends
on, up to the saved values, so that a chain costs as much as all of its operations.
"""

import dataclasses
import functools
from collections.abc import Container, Iterable, Sequence

import numpy as np
import scipy  # loads its submodules on first use: importing the solver takes a second

from ...terminal.native_output import redirect_native_stdout
from .dataflow_graph import Graph
from .dominated_names import find_undominated_names
from .memory import compute_live_bytes, find_materialized_residuals
from .op_work import Step
from .time import Rates, count_cycles, count_total_cycles

WORK_KINDS = ("matrix", "reduction", "elementwise", "other")
# The limit that stops the solver is a count, so that plans do not depend on the machine's load; the time limit is for
# giant blocks only.
_NODES, _SOLVER_S = 2000, 30.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """What a block saves, and the memory and recomputation that follow from it.

    Attributes:
        names: The saved values, as rules name them; None for a block without a region.
        saved_bytes: Bytes saved from the forward to the backward pass, the block's inputs apart.
        forward_bytes: The most bytes that its forward pass needs in addition.
        backward_bytes: The most bytes that its backward pass needs, recomputed and saved values included.
        cycles: Cycles of recomputation by kind of work, in the order of `WORK_KINDS`.
        output_cycles: Cycles of recomputing the block's outputs in addition, for a block of the same group that reads
            them.
    """

    names: tuple[str, ...] | None
    saved_bytes: int
    forward_bytes: int
    backward_bytes: int
    cycles: tuple[float, ...]
    output_cycles: float = 0.0

    @property
    def total_cycles(self) -> float:
        """Cycles of all recomputation."""
        return sum(self.cycles)


class BlockProblem:
    """The choices of one block.

    Args:
        graph: The block's graph, from `build_block_graph`.
        rates: Of the target.
        stacked: Whether a loop stacks what the block saves.

    Attributes:
        graph: The graph, as the target's compiler runs it.
        stacked: Whether a loop stacks what the block saves.
        costs: Cycles of each forward step.
        backward_cycles: Cycles of the whole backward pass.
        total_cycles: Cycles of both passes.
        steps: Numbers of the forward steps that a backward pass could have to recompute.
        names: For each name that a rule can use, the numbers of its values.
        bytes: For each name, the bytes that saving it takes.
        masks: The names of dropout masks.
        saved_masks: Those that choices save unless told otherwise, since drawing their bits again can take many times
            their memory.
    """

    def __init__(self, graph: Graph, rates: Rates, *, stacked: bool = False) -> None:
        graph = graph.fuse_products() if rates.fuses_products else graph
        self.graph = graph = graph.use_cpu_kernels() if rates.has_cpu_kernels else graph
        self.stacked = stacked
        self.costs = [count_cycles(graph, step, rates) for step in graph.forward]
        self.backward_cycles = sum(count_cycles(graph, step, rates) for step in graph.backward)
        self.total_cycles = count_total_cycles(graph, rates)
        self.steps = self._find_recomputed_steps(())
        used = {v for number in self.steps for v in (*graph.forward[number].reads, *graph.forward[number].writes)}
        self.names: dict[str, list[int]] = {}
        self.bytes: dict[str, int] = {}
        for candidate in graph.candidates:
            if candidate.value in used:
                self.names.setdefault(candidate.name, []).append(candidate.value)
                self.bytes[candidate.name] = self.bytes.get(candidate.name, 0) + candidate.bytes
        masks = dict.fromkeys(candidate.name for candidate in graph.candidates if candidate.is_dropout_mask)
        self.masks = tuple(name for name in masks if name in self.names)
        self._redraw_buffers = rates.redraw_buffers
        self.saved_masks = self.masks if rates.redraw_buffers and self._find_redrawn_bytes(self.steps) else ()
        self._choices: dict[tuple[str, ...], Choice] = {}

    @functools.cached_property
    def plain_choice(self) -> Choice:
        """The choice without a region: everything that the backward pass reads is saved."""
        graph = self.graph
        if self.stacked:  # compilers recompute nothing across two loops
            return self._make_plain_choice(graph.residuals)
        if graph.fuses_products or graph.has_cpu_kernels:
            return self._make_plain_choice(find_materialized_residuals(graph))
        # A compiler recomputes fused values from others rather than save them, but never a matrix product.
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
            cycles=(0.0,) * len(WORK_KINDS),
        )

    def make_choice(self, names: Iterable[str]) -> Choice:
        """Return the choice that saves these names, without those that nothing reads then.

        Args:
            names: Keys of `self.names`.
        """
        requested = tuple(dict.fromkeys(names))
        if requested not in self._choices:  # many prices and limits lead to the same names
            self._choices[requested] = self._make_choice(requested)
        return self._choices[requested]

    def _make_choice(self, requested: tuple[str, ...]) -> Choice:
        graph = self.graph
        saved = {value for name in requested for value in self.names[name]}
        recomputed = self._find_recomputed_steps(saved)
        # JAX does not save what nothing reads, whatever the rule says.
        read = graph.residuals.union(*(graph.forward[number].reads for number in recomputed))
        saved_names = tuple(name for name in requested if read.intersection(self.names[name]))
        saved &= read
        cycles = dict.fromkeys(WORK_KINDS, 0.0)
        for number in recomputed:
            kind = graph.forward[number].work.kind
            cycles[kind if kind in cycles else "other"] += self.costs[number]
        return Choice(
            names=saved_names,
            saved_bytes=sum(self.bytes[name] for name in saved_names),
            forward_bytes=self._compute_forward_bytes(saved),
            backward_bytes=max(compute_live_bytes(graph, self._order_backward(saved), live_at_start=saved), default=0)
            + self._redraw_buffers * self._find_redrawn_bytes(recomputed),
            cycles=tuple(cycles.values()),
            output_cycles=sum(
                self.costs[number]
                for number in self._find_recomputed_steps(saved, outputs=True)
                if number not in recomputed
            ),
        )

    def find_unread_names(self, names: Iterable[str]) -> list[str]:
        """Return the names of values that nothing reads once these names are saved: JAX does not save them.

        Args:
            names: Keys of `self.names`.
        """
        graph = self.graph
        recomputed = self._find_recomputed_steps({value for name in names for value in self.names[name]})
        read = graph.residuals.union(*(graph.forward[number].reads for number in recomputed))
        values: dict[str, list[int]] = {}
        for candidate in graph.candidates:
            values.setdefault(candidate.name, []).append(candidate.value)
        return [name for name, numbers in values.items() if read.isdisjoint(numbers)]

    def find_cheapest(self, price: float, limit_bytes: float = np.inf, *, draws_masks: bool = False) -> Choice:
        """Return the choice that minimises recomputation cycles plus `price` times the saved bytes.

        Args:
            price: Cycles that a saved byte is worth.
            limit_bytes: The most bytes that may be saved beside `saved_masks`; no limit by default.
            draws_masks: Whether it may draw `saved_masks` again.
        """
        saved = () if draws_masks else self.saved_masks
        return self.make_choice((*saved, *self._find_cheapest_names(self.costs, price, limit_bytes, saved)))

    def _find_redrawn_bytes(self, steps: Iterable[int]) -> int:
        """Return the bytes of the largest draw of random bits from threefry keys among these forward steps."""
        drawn = (self.graph.forward[number] for number in steps)
        return max((self.graph.count_bytes(step.writes) for step in drawn if step.work.kind == "random"), default=0)

    def _find_cheapest_names(
        self, costs: Sequence[float], price: float, limit_bytes: float, saved: Sequence[str] = ()
    ) -> list[str]:
        names, steps = self._undominated_names, list(self.steps)
        if not names or not steps:
            return []
        rows = self._constraints
        # What is saved in any case costs nothing more.
        sizes = np.array([0 if name in saved else self.bytes[name] for name in names], float)
        # Cycles and bytes differ by orders of magnitude between models; the solver's tolerances do not.
        scale = max(max(costs[number] for number in steps), 1.0)
        weights = np.concatenate([price * sizes + 1e-6 * scale, [costs[number] for number in steps]]) / scale
        constraints = [scipy.optimize.LinearConstraint(rows[0], lb=rows[1])]
        if np.isfinite(limit_bytes):
            total = max(sizes.sum(), 1.0)
            budget = np.concatenate([sizes / total, np.zeros(len(steps))])[None]
            budget_row = scipy.sparse.csr_array(budget)
            constraints.append(scipy.optimize.LinearConstraint(budget_row, ub=[limit_bytes / total]))
        with redirect_native_stdout():  # HiGHS prints to it now and then, and has no switch
            found = scipy.optimize.milp(
                weights,
                constraints=constraints,
                integrality=np.concatenate([np.ones(len(names)), np.zeros(len(steps))]),
                bounds=scipy.optimize.Bounds(0, 1),
                options={"node_limit": _NODES, "time_limit": _SOLVER_S, "mip_rel_gap": 1e-4},
            )
        if found.x is None:  # stopped without a solution: saving nothing is one
            return []
        return [name for name, taken in zip(names, found.x, strict=False) if taken > 0.5]

    @functools.cached_property
    def _undominated_names(self) -> list[str]:
        found = {*find_undominated_names(self.graph, self.steps, self.costs, self.names), *self.masks}
        return [name for name in self.names if name in found]

    @functools.cached_property
    def _constraints(self) -> "tuple[scipy.sparse.csr_array, list[float]]":
        """Rows that say: if a step runs, each value that it reads is saved or recomputed."""
        names, steps = self._undominated_names, self.steps
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
        """Return the forward steps that run again if only `saved` is saved, in order; with `outputs` also for these."""
        graph = self.graph
        results = {value for value in graph.outputs if value in graph.producers} if outputs else set()
        needed = [value for value in graph.residuals | results if value not in saved]
        found: set[int] = set()
        while needed:
            number = graph.producers[needed.pop()]
            if number not in found:
                found.add(number)
                needed += [v for v in graph.forward[number].reads if v in graph.producers and v not in saved]
        return tuple(sorted(found))

    def _order_backward(self, saved: Container[int]) -> list[Step]:
        """Return the steps of the backward pass, with recomputed forward steps where they are first needed."""
        graph, order = self.graph, list[Step]()
        waiting = set(self._find_recomputed_steps(saved))
        for step in graph.backward:
            needed, found = list(step.reads), set[int]()
            while needed:
                number = graph.producers.get(needed.pop())
                if number in waiting:
                    waiting.remove(number)
                    found.add(number)
                    needed += graph.forward[number].reads
            order += [*(graph.forward[number] for number in sorted(found)), step]
        return [
            dataclasses.replace(step, writes=tuple(v for v in step.writes if v not in saved))
            if any(v in saved for v in step.writes)
            else step
            for step in order
        ]

    def _compute_forward_bytes(self, saved: Iterable[int]) -> int:
        return max(compute_live_bytes(self.graph, self.graph.forward, live_at_end=saved), default=0)
