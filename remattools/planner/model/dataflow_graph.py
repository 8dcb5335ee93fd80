# SPDX-License-Identifier: Apache-2.0
"""The dataflow graph of a function and its gradient: operations over numbered values, and which of these are fused.

Sits on `cpu_kernels`; `memory` and `time` count on it. A compiler computes some values only inside the operations that
read them: those take no memory and cause no traffic. Values are numbers, so that JAX is not needed once a graph is
built.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from jax.extend import core

from ... import compat
from ...compiler.partition import WHOLE_ARRAYS, DeviceSizes
from ...jaxpr import forward_rules, jaxprs
from ...rules.paths import Path
from ...tracing.origins import locate
from ...transform.naming import marking, names
from . import cpu_kernels
from .op_work import Step, divide_work, estimate_work

_CANDIDATE_PREFIX = "plan:"

# Bytes of a value, from its type and the equation that computes it (None for an argument).
CountBytes = Callable[[Any, Any], int]


def count_whole_bytes(aval: Any, equation: Any) -> int:
    """Return the bytes of a value on one device that has all of it."""
    del equation
    return jaxprs.count_aval_bytes(aval)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A value that a rule can name.

    Attributes:
        name: As a rule names it, with its index.
        value: Its number.
        bytes: What saving it takes.
        is_dropout_mask: Whether it is a mask that is computed from random bits.
    """

    name: str
    value: int
    bytes: int
    is_dropout_mask: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Graph:
    """The forward and the backward pass of a function.

    Attributes:
        forward: Steps of the forward pass in the program's order.
        backward: Steps of the backward pass in the program's order.
        bytes: Size of each value in bytes, by its number.
        inputs: Numbers of the arguments.
        outputs: Numbers of the results of both passes.
        residuals: Values that the backward pass takes from the forward pass, arguments apart.
        candidates: Values that a rule can name.
        float32_values: Values of dtype float32.
        fuses_products: Whether the compiler fuses a product, and what is computed between two products, into the one
            product that reads it.
        has_cpu_kernels: Whether `cpu_kernels` says what is fused, and in which order the steps run.
    """

    forward: tuple[Step, ...]
    backward: tuple[Step, ...]
    bytes: tuple[int, ...]
    inputs: frozenset[int]
    outputs: frozenset[int]
    residuals: frozenset[int]
    candidates: tuple[Candidate, ...] = ()
    float32_values: frozenset[int] = frozenset()
    fuses_products: bool = False
    has_cpu_kernels: bool = False

    @functools.cached_property
    def producers(self) -> dict[int, int]:
        """Return for each value the number of the forward step that computes it."""
        return {value: number for number, step in enumerate(self.forward) for value in step.writes}

    @functools.cached_property
    def _readers(self) -> dict[int, list[Step]]:
        readers: dict[int, list[Step]] = {}
        for step in (*self.forward, *self.backward):
            for value in step.reads:
                readers.setdefault(value, []).append(step)
        return readers

    @functools.cached_property
    def fused_values(self) -> frozenset[int]:
        """Return the values that exist only inside fused operations, if nothing is recomputed."""
        order = (*self.forward, *self.backward)
        if self.has_cpu_kernels:
            return cpu_kernels.find_fused_values(order, self.bytes, self.outputs, num_forward=len(self.forward))
        return self.find_fused_values(order)

    def find_fused_values(self, order: Sequence[Step], materialized: Iterable[int] = ()) -> frozenset[int]:
        """Return the values that exist only inside fused operations when these steps run.

        Args:
            order: The steps as they run.
            materialized: Values that are in memory in any case.
        """
        materialized = self.outputs.union(materialized)
        if self.has_cpu_kernels:
            return cpu_kernels.find_fused_values(order, self.bytes, materialized)
        readers: dict[int, list[int]] = {}
        for number, step in enumerate(order):
            for value in step.reads:
                readers.setdefault(value, []).append(number)
        found: set[int] = set()
        roots: dict[int, frozenset[int]] = {}  # for each step those inside which it runs
        for number in reversed(range(len(order))):
            step = order[number]
            below = [reader for value in step.writes for reader in readers.get(value, ())]
            kinds = {order[reader].work.kind for reader in below}
            within = frozenset[int]().union(*(roots[reader] for reader in below))
            inside = step.work.kind == "free" or (step.work.kind == "elementwise" and not kinds & {"matrix", "other"})
            if self.fuses_products and len(within) == 1 and "other" not in kinds:
                inside |= step.work.kind == "elementwise"
                inside |= step.work.kind == "matrix" and "matrix" not in kinds
            if materialized.intersection(step.writes):
                inside = False
            roots[number] = within if inside else frozenset((number,))
            if inside:
                found.update(step.writes)
        return frozenset(found)

    def fuse_products(self) -> "Graph":
        """Return the graph as a compiler for matrix units runs it.

        Such compilers fuse products into each other. Values that only products read are stored in the precision of the
        matrix units, in half the bytes.
        """
        narrow: set[int] = set()
        for step in reversed((*self.forward, *self.backward)):
            for value in step.writes:
                readers = self._readers.get(value, ())
                narrowed = all(
                    reader.work.is_narrowing or (reader.work.kind == "free" and narrow.issuperset(reader.writes))
                    for reader in readers
                )
                if value in self.float32_values and value not in self.outputs and readers and narrowed:
                    narrow.add(value)
        sizes = tuple(size // 2 if value in narrow else size for value, size in enumerate(self.bytes))
        candidates = tuple(dataclasses.replace(one, bytes=sizes[one.value]) for one in self.candidates)
        return dataclasses.replace(self, bytes=sizes, candidates=candidates, fuses_products=True)

    def use_cpu_kernels(self) -> "Graph":
        """Return the graph as XLA's CPU compiler runs it, with the copies that it makes."""
        sizes, broadcasts = list(self.bytes), dict[tuple[int, int], int]()
        forward, backward = (
            tuple(cpu_kernels.add_copies(steps, sizes, broadcasts)) for steps in (self.forward, self.backward)
        )
        return dataclasses.replace(self, forward=forward, backward=backward, bytes=tuple(sizes), has_cpu_kernels=True)

    def count_bytes(self, values: Iterable[int]) -> int:
        """Return the bytes of these values together."""
        return sum(self.bytes[value] for value in values)

    @functools.cached_property
    def memory_sources(self) -> dict[int, frozenset[int]]:
        """Return for each value what has to be read from memory to have it: itself, unless it is fused."""
        found: dict[int, frozenset[int]] = {}
        for value in self.inputs:
            found[value] = frozenset((value,))
        for step in (*self.forward, *self.backward):
            below = frozenset[int]().union(*(found.get(value, frozenset((value,))) for value in step.reads))
            if step.work.kind == "matrix":  # read once, by the product
                below = frozenset()
            found.update((value, below if value in self.fused_values else frozenset((value,))) for value in step.writes)
        return found


def run_inlined(jaxpr: Any, leaves: Sequence[Any]) -> list[Any]:
    """Evaluate a jaxpr with its jits inlined, so that one flat list of operations is traced.

    Args:
        jaxpr: The jaxpr, open or closed.
        leaves: Its arguments.
    """
    inner = jaxprs.open_jaxpr(jaxpr)
    values: dict[Any, Any] = dict(zip(inner.constvars, getattr(jaxpr, "consts", ()), strict=False))
    values.update(zip(inner.invars, leaves, strict=True))
    for equation in inner.eqns:
        args = [jaxprs.read_atom(atom, values) for atom in equation.invars]
        if forward_rules.has_forward_rule(equation):  # traced when it is differentiated
            equation = forward_rules.replace_forward_rule(equation, jaxprs.inline_calls)
        nested = [below for _, below in jaxprs.find_subjaxprs(equation)]
        if equation.primitive.name in jaxprs.CALL_PRIMITIVES and len(nested) == 1:
            out = run_inlined(nested[0], args)
        else:
            closed = core.Jaxpr(
                constvars=[],
                invars=list(dict.fromkeys(v for v in equation.invars if isinstance(v, core.Var))),
                outvars=list(equation.outvars),
                eqns=[equation],
                effects=equation.effects,
                debug_info=inner.debug_info._replace(arg_names=None, result_paths=None),
            )
            out = jaxprs.run(core.ClosedJaxpr(closed, []), [values[v] for v in closed.invars])  # type: ignore[attr-defined]  # public, but not in its stub
        values.update(zip(equation.outvars, out, strict=True))
    return [jaxprs.read_atom(atom, values) for atom in inner.outvars]


def build_graph(
    run: Callable[[list[Any]], list[Any]],
    avals: Sequence[Any],
    labels: Mapping[str, str],
    gradient_mask: Sequence[bool] | None = None,
    count_bytes: CountBytes = count_whole_bytes,
) -> Graph:
    """Return the graph of a function of arrays and of its gradient with respect to its floats.

    Args:
        run: A function from arrays to arrays; candidates are marked in it by `checkpoint_name`s.
        avals: Shapes and dtypes of its arguments.
        labels: From the marks to the names that rules use.
        gradient_mask: For each float argument whether its gradient is computed; None for all.
        count_bytes: Bytes of a value, from its type and the equation that computes it (None for an argument).
    """
    floats = [i for i, aval in enumerate(avals) if jax.numpy.issubdtype(aval.dtype, jax.numpy.inexact)]
    if gradient_mask is not None:
        floats = [i for i, needed in zip(floats, gradient_mask, strict=True) if needed]
    counts: list[int] = []

    def run_both_passes(leaves: list[Any]) -> Any:
        def run_forward(chosen: list[Any]) -> list[Any]:
            new = list(leaves)
            for index, value in zip(floats, chosen, strict=True):
                new[index] = value
            out = run(new)
            return [leaf for leaf in out if jax.numpy.issubdtype(leaf.dtype, jax.numpy.inexact)]

        out, backward = jax.vjp(run_forward, [leaves[i] for i in floats])
        residuals = jax.tree.leaves(backward)
        counts.append(len(residuals))
        return residuals, out, backward([jax.numpy.ones_like(value) for value in out])

    shapes = list(map(compat.make_abstract, avals))
    program = jaxprs.open_jaxpr(jax.make_jaxpr(run_both_passes)(shapes))
    return _convert_jaxpr(program, counts[0], labels, count_bytes)


def build_block_graph(
    jaxpr: Any,
    gradient_mask: Sequence[bool] | None = None,
    *,
    path: Path = (),
    sizes: DeviceSizes = WHOLE_ARRAYS,
) -> Graph:
    """Return the graph of a block, with all values that a rule can name.

    Args:
        jaxpr: The block's forward pass, open or closed.
        gradient_mask: For each float argument whether its gradient is computed; None for all.
        path: Path of a block with this forward pass.
        sizes: Sizes on one device.
    """
    values = [value for value in names.find_named_values(jaxpr) if value.reachable and value.kind in ("op", "user")]
    marks = {position: f"{_CANDIDATE_PREFIX}{n}" for n, value in enumerate(values) for position in value.where}
    labels = {f"{_CANDIDATE_PREFIX}{n}": f"{value.label}[{value.index}]" for n, value in enumerate(values)}
    marked = marking.mark_equations(jaxpr, marks)
    avals = [var.aval for var in jaxprs.open_jaxpr(jaxpr).invars]

    def count_bytes(aval: Any, equation: Any) -> int:
        if not sizes.shapes or equation is None:
            return sizes.count_any_bytes(aval)
        inside = locate([str(equation.source_info.name_stack)])[0]
        return sizes.count_any_bytes(aval, (*path, *inside), equation.primitive.name)

    graph = build_graph(lambda leaves: run_inlined(marked, leaves), avals, labels, gradient_mask, count_bytes)
    masks = {labels[marks[value.where[0]]] for value in values if value.is_dropout_mask}
    candidates = (dataclasses.replace(one, is_dropout_mask=one.name in masks) for one in graph.candidates)
    return dataclasses.replace(graph, candidates=tuple(candidates))


def _convert_jaxpr(jaxpr: Any, num_residuals: int, labels: Mapping[str, str], count_bytes: CountBytes) -> Graph:
    numbers: dict[Any, int] = {}
    sizes: list[int] = []
    whole_sizes: list[int] = []
    single: set[int] = set()

    def get_number(var: Any, equation: Any = None) -> int:
        if var not in numbers:
            numbers[var] = len(sizes)
            if is_float32(var.aval):
                single.add(len(sizes))
            sizes.append(count_bytes(var.aval, equation))
            whole_sizes.append(jaxprs.count_aval_bytes(var.aval))
        return numbers[var]

    inputs = frozenset(get_number(var) for var in jaxpr.invars)
    forward: list[Step] = []
    backward: list[Step] = []
    candidates = []
    residuals = {var for var in jaxpr.outvars[:num_residuals] if isinstance(var, core.Var)}
    for equation in jaxpr.eqns:
        name = jaxprs.get_checkpoint_name(equation)
        if name is not None:
            # A mark is another name of the value that it marks.
            (source,), (target,) = equation.invars, equation.outvars
            if isinstance(source, core.Var):
                numbers[target] = get_number(source)
                if name in labels:
                    candidates.append(Candidate(labels[name], numbers[target], sizes[numbers[target]]))
            continue
        reads = tuple(dict.fromkeys(get_number(atom) for atom in equation.invars if isinstance(atom, core.Var)))
        writes = tuple(get_number(var, equation) for var in equation.outvars)
        step = Step(
            reads=reads,
            writes=writes,
            work=divide_work(estimate_work(equation), [(sizes[n], whole_sizes[n]) for n in (*reads, *writes)]),
            label=equation.primitive.name,
            copied=tuple(map(get_number, cpu_kernels.find_copied_operands(equation))),
            broadcast=tuple(map(get_number, cpu_kernels.find_broadcast_operands(equation))),
        )
        late = "transpose(" in str(equation.source_info.name_stack)
        (backward if late else forward).append(step)
    made = {value for step in forward for value in step.writes}
    read_back = {value for step in backward for value in step.reads}
    needed = ({numbers[var] for var in residuals if var in numbers} | (read_back & made)) & made
    outputs = {numbers[var] for var in jaxpr.outvars[num_residuals:] if isinstance(var, core.Var) and var in numbers}
    return Graph(
        forward=tuple(forward),
        backward=tuple(backward),
        bytes=tuple(sizes),
        inputs=inputs,
        outputs=frozenset(outputs),
        residuals=frozenset(needed & (read_back | outputs)) if backward else frozenset(),
        candidates=_prefer_authors_names(candidates),
        float32_values=frozenset(single),
    )


def _prefer_authors_names(candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """Return the candidates without those that name the same values as a `checkpoint_name` in the model does."""
    values: dict[str, tuple[int, ...]] = {}
    for each in candidates:
        values[each.name] = (*values.get(each.name, ()), each.value)
    named = {numbers for name, numbers in values.items() if name.startswith("@")}
    return tuple(each for each in candidates if each.name.startswith("@") or values[each.name] not in named)


def is_float32(aval: Any) -> bool:
    """Return whether a value is an array of float32."""
    return jaxprs.is_array(aval) and aval.dtype == jax.numpy.float32
