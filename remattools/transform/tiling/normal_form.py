# SPDX-License-Identifier: Apache-2.0
"""Rewrite a traced program so that its large values can be cut: jits inlined, slices and reshapes moved up.

Sits on `program`. `f(x)[:, :-1]` is `f(x[:, :-1])` where `f` is independent along that axis, and
`(x @ w).reshape(-1, n)` is `x.reshape(-1, d) @ w`: a loss that shifts its logits by one, or merges batch and sequence,
would otherwise need the logits whole.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.extend import core

from ... import compat
from ...jaxpr import jaxprs
from ...jaxpr.axes.factor import Factor, Piece
from ...jaxpr.axes.pieces import run_piece
from .program import Program, count_bytes, is_variable


def normalize(jaxpr: Any) -> Program:
    """Return a closed jaxpr as a program in which slices and reshapes of large values come before their computation."""
    opened = jaxprs.open_jaxpr(jaxpr)
    consts = dict(zip(opened.constvars, jaxpr.consts, strict=True))
    inlined = jaxprs.inline_calls(opened, consts)
    program = Program(inlined, inlined.eqns, consts)
    floor = program.measure_floor()
    while (moved := _move_one(program, floor)) is not None:
        program = moved
    return program


def _move_one(program: Program, floor: int) -> Program | None:
    for number, equation in enumerate(program.nodes):
        if equation.primitive.name not in ("slice", "reshape") or not is_variable(equation.invars[0]):
            continue
        (var,) = equation.invars
        producer = program.producers.get(var)
        if producer is None or count_bytes(var) < floor or var in program.results or len(program.readers[var]) > 1:
            continue
        move = _move_slice if equation.primitive.name == "slice" else _move_reshape
        new = move(program, producer, equation)
        if new is not None:
            nodes = [node for index, node in enumerate(program.nodes) if index != producer]
            at = number - 1  # the producer came before
            return program.replace_nodes([*nodes[:at], *new, *nodes[at + 1 :]])
    return None


def _move_slice(program: Program, producer: int, slicing: Any) -> list[Any] | None:
    """Return the equations of `f(x[a:b])` for `f(x)[a:b]`; None if `f` is not independent along that axis."""
    whole, part = slicing.invars[0].aval.shape, slicing.outvars[0].aval.shape
    axes = [axis for axis, length in enumerate(whole) if part[axis] != length]
    equation = program.nodes[producer]
    is_dense = all(stride == 1 for stride in slicing.params["strides"] or ())
    if len(axes) != 1 or not is_dense or len(equation.outvars) != 1 or not part[axes[0]]:
        return None
    axis = axes[0]
    factor = next((f for f in program.find_factors(producer) if f.kind == "map" and f.results == (axis,)), None)
    if factor is None or all(position is None for position in factor.operands):
        return None
    operands = [(atom.aval.shape, position) for atom, position in zip(equation.invars, factor.operands, strict=True)]
    if any(position is not None and shape[position] != whole[axis] for shape, position in operands):
        return None
    start, limit = slicing.params["start_indices"][axis], slicing.params["limit_indices"][axis]
    piece = Piece(0, part[axis], whole[axis])

    def compute(*values: Any) -> Any:
        sliced = [
            value if position is None else jax.lax.slice_in_dim(value, start, limit, axis=position)
            for value, position in zip(values, factor.operands, strict=True)
        ]
        return run_piece(equation, factor, sliced, piece)

    return _trace_replacement(compute, equation, slicing.outvars)


def _move_reshape(program: Program, producer: int, reshaping: Any) -> list[Any] | None:
    """Return the equations of `f(x.reshape(...))` for `f(x).reshape(...)` where axes merge; None if they differ."""
    whole, merged = reshaping.invars[0].aval.shape, tuple(reshaping.outvars[0].aval.shape)
    equation = program.nodes[producer]
    if reshaping.params.get("dimensions") is not None or not _is_merging(whole, merged) or len(equation.outvars) != 1:
        return None
    if equation.primitive.name == "dot_general":
        shapes = _reshape_contraction(equation, whole, merged)
    elif _is_pointwise(equation, program.find_factors(producer)):
        shapes = [merged if atom.aval.shape else None for atom in equation.invars]
    else:
        return None
    if shapes is None:
        return None
    params = dict(equation.params)
    if equation.primitive.name == "dot_general":
        (_, right), batch = params["dimension_numbers"]
        params["dimension_numbers"] = (((len(shapes[0]) - 1,), right), batch)

    def compute(*values: Any) -> Any:
        reshaped = [v if s is None else jax.lax.reshape(v, s) for v, s in zip(values, shapes, strict=True)]
        return compat.bind(equation, reshaped, params)

    return _trace_replacement(compute, equation, reshaping.outvars)


def _is_merging(whole: Sequence[int], merged: Sequence[int]) -> bool:
    return len(merged) < len(whole) and [n for n in whole if n != 1] != [n for n in merged if n != 1]


def _is_pointwise(equation: Any, factors: Sequence[Factor]) -> bool:
    """Whether each element of the result is computed from the same element of each operand that is not a scalar."""
    shape = equation.outvars[0].aval.shape
    if any(atom.aval.shape not in ((), shape) for atom in equation.invars) or jaxprs.is_opaque(equation):
        return False
    found = {factor.results[0]: factor.operands for factor in factors if factor.kind == "map"}
    return all(
        found.get(axis) == tuple(axis if atom.aval.shape and is_variable(atom) else None for atom in equation.invars)
        for axis in range(len(shape))
    ) and any(is_variable(atom) and atom.aval.shape for atom in equation.invars)


def _reshape_contraction(equation: Any, whole: Sequence[int], merged: tuple[int, ...]) -> list[Any] | None:
    """Return the new shape of each operand of a product whose left free axes merge, None for the right one."""
    (left_contracted, right_contracted), (left_batch, _) = equation.params["dimension_numbers"]
    left, right = equation.invars
    free = len(right.aval.shape) - len(right_contracted)
    if left_batch or tuple(left_contracted) != (len(left.aval.shape) - 1,) or equation.params.get("out_sharding"):
        return None
    kept, merged_left = len(whole) - free, len(merged) - free
    if merged_left < 1 or tuple(whole[kept:]) != merged[merged_left:]:
        return None
    if math.prod(whole[:kept]) != math.prod(merged[:merged_left]):
        return None
    return [(*merged[:merged_left], left.aval.shape[-1]), None]


def _trace_replacement(compute: Any, equation: Any, outvars: Sequence[Any]) -> list[Any]:
    """Return the equations of `compute`, reading what `equation` reads and computing `outvars`."""
    variables = jaxprs.collect_variables(equation.invars)

    def run(*values: Any) -> Any:
        known = dict(zip(variables, values, strict=True))
        return compute(*(jaxprs.read_atom(atom, known) for atom in equation.invars))

    traced = jaxprs.open_jaxpr(jax.make_jaxpr(run)(*(compat.make_abstract(var.aval) for var in variables)))
    inlined = jaxprs.inline_calls(traced)
    same: dict[Any, Any] = dict(zip(inlined.invars, variables, strict=True))
    same.update(zip(inlined.outvars, outvars, strict=True))
    made = []
    for one in inlined.eqns:
        same.update((var, core.Var(var.aval)) for var in one.outvars if var not in same)
        invars = [same.get(atom, atom) if isinstance(atom, core.Var) else atom for atom in one.invars]
        made.append(one.replace(invars=invars, outvars=[same[var] for var in one.outvars]))
    return made
