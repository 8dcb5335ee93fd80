# SPDX-License-Identifier: Apache-2.0
"""The schedule of a whole traced program: its operations in order, with blocks as single steps, and its loops.

Sits on `dataflow_graph` and `block_primitive`. The body of a loop appears once, between a step that allocates all that
the loop stacks and a step that ends the loop; each step says how often it runs.
"""

import dataclasses
import math
from typing import Any

from jax.extend import core

from ...compiler.partition import WHOLE_ARRAYS, DeviceSizes
from ...errors import MeasureError
from ...jaxpr import jaxprs
from ...rules.paths import format_path
from ...tracing.origins import locate
from ...transform.author_regions import AuthorRegion, describe_region
from .block_primitive import BLOCK_PRIMITIVE, Block
from .dataflow_graph import Graph, is_float32
from .op_work import Step, Work, divide_work, estimate_work

BLOCK_LABEL = "block"  # the label of the steps that are blocks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Visit:
    """One call of a block with its backward pass.

    Attributes:
        block: The block.
        forward: Number of the step of its forward pass.
        backward: Number of the step of its backward pass.
        first: The step that allocates what it saves: `forward`, or the first step of a loop.
        last: The step that reads it last: `backward`, or the last step of a loop.
        copies: How many copies are saved: the iterations of the loops that end between both passes; 0 inside a region
            that the user's code makes.
        iterations: How often the backward pass runs.
        gradient_mask: For each float argument of the block, whether anything reads its gradient.
        author_region: The region in the model's code that its backward pass runs in; None outside of all.
    """

    block: Block
    forward: int
    backward: int
    first: int
    last: int
    copies: int
    iterations: int
    gradient_mask: tuple[bool, ...] = ()
    author_region: AuthorRegion | None = None


@dataclasses.dataclass(eq=False)
class _Loop:
    first: int
    iterations: int
    last: int = -1


@dataclasses.dataclass(frozen=True)
class _Call:
    """A block at a step, inside these loops and perhaps inside a region that the user's code makes."""

    block: Block
    step: int
    loops: tuple[_Loop, ...]
    region: AuthorRegion | None


def build_schedule(jaxpr: Any, sizes: DeviceSizes = WHOLE_ARRAYS) -> tuple[Graph, tuple[Visit, ...]]:
    """Return the steps of a program with its blocks as single steps, and the calls of blocks with a backward pass.

    Args:
        jaxpr: The program, traced with a `BlockTracer`.
        sizes: Sizes on one device.

    Raises:
        MeasureError: If a block runs inside a loop or a call that the planner has no model of.
    """
    walk = _ScheduleBuilder(sizes)
    inner = jaxprs.open_jaxpr(jaxpr)
    inputs = [walk.add_value(var.aval) for var in (*inner.constvars, *inner.invars)]
    for value, count in zip(inputs[len(inner.constvars) :], sizes.leaf_bytes, strict=False):
        walk.sizes[value] = count
    results = walk.walk(inner, inputs)
    visits = sorted((_make_visit(*pair) for pair in walk.pairs), key=lambda visit: visit.forward)
    used = {value for step in walk.steps for value in step.reads} | set(results)
    steps = list(walk.steps)
    for number, visit in enumerate(visits):
        visits[number] = dataclasses.replace(
            visit, gradient_mask=tuple(v in used for v in steps[visit.backward].writes)
        )
        for place, tag in ((visit.forward, "forward"), (visit.backward, "backward")):
            # Compilers remove what nothing reads, such as the gradient of the batch; a block alone cannot know that.
            writes = tuple(value for value in steps[place].writes if value in used)
            steps[place] = dataclasses.replace(steps[place], writes=writes, tag=(tag, number))
    graph = Graph(
        forward=tuple(steps),
        backward=(),
        bytes=tuple(walk.sizes),
        inputs=frozenset(inputs),
        outputs=frozenset(results),
        residuals=frozenset(),
        float32_values=frozenset(walk.float32_values),
    )
    return graph, tuple(visits)


class _ScheduleBuilder:
    def __init__(self, sizes: DeviceSizes) -> None:
        self.device_sizes = sizes
        self._stacks: tuple[str, ...] = ()
        self.steps: list[Step] = []
        self.sizes: list[int] = []
        self.whole_sizes: list[int] = []
        self.float32_values: set[int] = set()
        self.pairs: list[tuple[_Call, _Call]] = []
        self._loops: tuple[_Loop, ...] = ()
        self._region: AuthorRegion | None = None
        # Calls without their backward pass yet; the last call that ran has the first backward pass.
        self._open_calls: dict[int, list[_Call]] = {}
        # By the id of a jaxpr; the jaxprs are stored as well, so that no other one gets the same id.
        self._block_memo: dict[int, tuple[bool, Any]] = {}

    def add_value(self, aval: Any, operation: str = "") -> int:
        """Return a number for a new value, the result of an operation in the equation that is walked."""
        path = locate(list(self._stacks))[0] if self.device_sizes.shapes else None
        self.sizes.append(self.device_sizes.count_any_bytes(aval, path, operation))
        self.whole_sizes.append(jaxprs.count_aval_bytes(aval))
        if is_float32(aval):
            self.float32_values.add(len(self.sizes) - 1)
        return len(self.sizes) - 1

    def add_step(self, reads: Any, writes: Any, work: Work, label: str) -> None:
        """Append a step."""
        iterations = math.prod(loop.iterations for loop in self._loops)
        self.steps.append(Step(tuple(dict.fromkeys(reads)), tuple(writes), work, None, label, iterations))

    def has_blocks(self, jaxpr: Any) -> bool:
        """Return whether a block runs somewhere in a jaxpr."""
        inner = jaxprs.open_jaxpr(jaxpr)
        if id(inner) not in self._block_memo:
            found = any(
                equation.primitive is BLOCK_PRIMITIVE
                or any(self.has_blocks(inside) for _, inside in jaxprs.find_subjaxprs(equation))
                for equation in inner.eqns
            )
            self._block_memo[id(inner)] = (found, inner)
        return self._block_memo[id(inner)][0]

    def walk(self, jaxpr: Any, arguments: list[int]) -> list[int]:
        """Append the steps of an open jaxpr, and return the numbers of its results."""
        values: dict[Any, int] = dict(zip((*jaxpr.constvars, *jaxpr.invars), arguments, strict=True))

        def get_number(atom: Any) -> int:
            if not isinstance(atom, core.Var):
                return self.add_value(atom.aval)
            if atom not in values:
                values[atom] = self.add_value(atom.aval)
            return values[atom]

        outer = self._stacks
        for equation in jaxpr.eqns:
            self._stacks = (*outer, str(equation.source_info.name_stack))
            operands = [get_number(atom) for atom in equation.invars]
            if jaxprs.get_checkpoint_name(equation) is not None:  # another name of the value that it marks
                results = operands
            elif equation.primitive is BLOCK_PRIMITIVE:
                results = self._add_block(equation, operands)
            else:
                results = self._walk_equation(equation, operands)
            values.update(zip(equation.outvars, results, strict=True))
        self._stacks = outer
        return [get_number(atom) for atom in jaxpr.outvars]

    def _walk_equation(self, equation: Any, operands: list[int]) -> list[int]:
        name = equation.primitive.name
        nested = [jaxprs.open_jaxpr(inside) for _, inside in jaxprs.find_subjaxprs(equation)]
        with_blocks = [inside for inside in nested if self.has_blocks(inside)]
        is_call = len(nested) == 1 and len(nested[0].constvars) + len(nested[0].invars) == len(operands)
        if is_call and name != "scan" and (with_blocks or name in jaxprs.CALL_PRIMITIVES):
            before = self._region
            if before is None and jaxprs.is_region(equation):
                self._region = describe_region(equation, locate(list(self._stacks))[0])
            results = self.walk(nested[0], operands)
            self._region = before
            return results
        if not with_blocks:
            results = [self.add_value(var.aval, name) for var in equation.outvars]
            sizes = [(self.sizes[value], self.whole_sizes[value]) for value in (*operands, *results)]
            self.add_step(operands, results, divide_work(estimate_work(equation), sizes), name)
            return results
        if name == "scan":
            scan = jaxprs.parse_scan(equation)
            assert scan is not None  # the primitive is scan
            body = jaxprs.open_jaxpr(scan.body)
            return self._walk_loop(
                equation, body, operands[: scan.num_consts], operands[scan.num_consts :], scan.length, scan.num_carry
            )
        if name == "while" and with_blocks == [jaxprs.open_jaxpr(equation.params["body_jaxpr"])]:
            # The number of iterations is unknown: the body counts once. A while loop has no backward pass of its own.
            skipped, consts = equation.params["cond_nconsts"], equation.params["body_nconsts"]
            start = operands[skipped + consts :]
            return self._walk_loop(equation, with_blocks[0], operands[skipped:][:consts], start, 1, len(start))
        if name == "cond":
            # Either branch may run: what both save is counted.
            ends = [end for branch in nested for end in self.walk(branch, operands[1:])]
            results = [self.add_value(var.aval) for var in equation.outvars]
            self.add_step((*ends, *operands), results, Work("elementwise", 0.0), name)
            return results
        raise MeasureError(
            what=f"{self._find_block_path(with_blocks[0])} runs inside a {name}, which the planner does not support.",
            why="the traced program does not show what a block in it saves, nor how often.",
            fix='compare rules by hand: compare(..., candidates={"none": None, "all": "nothing_saveable"}).',
        )

    def _walk_loop(
        self, equation: Any, body: Any, consts: list[int], operands: list[int], iterations: int, carry: int
    ) -> list[int]:
        results = [self.add_value(var.aval) for var in equation.outvars]
        stacked = operands[carry:]
        loop = _Loop(len(self.steps), iterations)
        self.add_step(operands, results, Work("other", 0.0), equation.primitive.name)
        outer, self._loops = self._loops, (*self._loops, loop)
        slices = [self.add_value(var.aval) for var in body.invars[len(consts) + carry :]]
        self.add_step(stacked, slices, Work("free", 0.0), "slices")
        ends = self.walk(body, [*consts, *results[:carry], *slices])
        self._loops = outer
        loop.last = len(self.steps)
        self.add_step((*ends, *consts, *operands, *results), (), Work("free", 0.0), "end of the loop")
        return results

    def _add_block(self, equation: Any, operands: list[int]) -> list[int]:
        block: Block = equation.params["block"]
        is_backward: bool = equation.params["is_backward"]
        here = len(self.steps)
        results = [self.add_value(var.aval) for var in equation.outvars]
        self.add_step(operands, results, Work("other", 0.0), BLOCK_LABEL)
        open_calls = self._open_calls.setdefault(block.number, [])
        if not is_backward:
            open_calls.append(_Call(block, here, self._loops, self._region))
        elif open_calls:
            self.pairs.append((open_calls.pop(), _Call(block, here, self._loops, self._region)))
        return results

    def _find_block_path(self, jaxpr: Any) -> str:
        for equation in jaxpr.eqns:
            if equation.primitive is BLOCK_PRIMITIVE:
                return format_path(equation.params["block"].path)
            for _, below in jaxprs.find_subjaxprs(equation):
                if self.has_blocks(below):
                    return self._find_block_path(jaxprs.open_jaxpr(below))
        return "a block"


def _make_visit(forward: _Call, backward: _Call) -> Visit:
    shared = sum(a is b for a, b in zip(forward.loops, backward.loops, strict=False))
    there, back = forward.loops[shared:], backward.loops[shared:]
    return Visit(
        block=forward.block,
        forward=forward.step,
        backward=backward.step,
        first=there[0].first if there else forward.step,
        last=back[0].last if back else backward.step,
        # Inside the user's own remat no rule saves anything.
        copies=0 if backward.region is not None else math.prod(loop.iterations for loop in there),
        iterations=math.prod(loop.iterations for loop in backward.loops),
        author_region=backward.region,
    )
