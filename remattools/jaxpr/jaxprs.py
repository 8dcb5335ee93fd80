# SPDX-License-Identifier: Apache-2.0
"""Jaxprs: find nested ones, name values in them, replace equations, split and evaluate.

Uses public JAX only (`jax.make_jaxpr`, `jax.extend.core`). Jaxprs are treated as immutable: every function
returns a new one that shares the equations it did not change.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core

# Calls of a function, which do nothing else.
CALL_PRIMITIVES = frozenset({"jit", "pjit", "closed_call", "core_call"})
# Primitives that are transparent to policies: their partial evaluation asks the policy for every nested equation.
_TRANSPARENT_PRIMITIVES = CALL_PRIMITIVES | {"scan", "cond", "shard_map", "while", "xla_call"}
REGION_PRIMITIVES = frozenset({"remat2", "checkpoint", "remat", "remat3"})

Place = tuple[str, int]  # a parameter's name, and the index in it if the parameter is a tuple of jaxprs, else -1
# Where an equation is: its index in each nested program from the outside in, with the place of that program.
Position = tuple[tuple[int, Place] | int, ...]


def is_jaxpr(value: Any) -> bool:
    """Return whether `value` is a jaxpr, open or closed."""
    return hasattr(value, "eqns") or hasattr(getattr(value, "jaxpr", None), "eqns")


def find_subjaxprs(equation: Any) -> Iterator[tuple[Place, Any]]:
    """Yield the jaxprs among the parameters of an equation, each with its place."""
    for key, value in equation.params.items():
        if is_jaxpr(value):
            yield (key, -1), value
        elif isinstance(value, tuple) and value and all(map(is_jaxpr, value)):
            for index, item in enumerate(value):
                yield (key, index), item
    primitive = equation.params.get("_prim")  # how jax_remat3 stages a region
    if primitive is not None and is_jaxpr(getattr(primitive, "jaxpr", None)):
        yield ("_prim", -1), primitive.jaxpr


def is_region(equation: Any) -> bool:
    """Return whether an equation is a rematerialised region: a `jax.checkpoint` under either implementation."""
    return equation.primitive.name in REGION_PRIMITIVES or type(equation.params.get("_prim")).__name__ == "RematTraced"


def is_opaque(equation: Any) -> bool:
    """Return whether an equation hides a jaxpr from policies: a custom derivative, a kernel or a callback."""
    if equation.primitive.name in _TRANSPARENT_PRIMITIVES or is_region(equation):
        return False
    return any(True for _ in find_subjaxprs(equation))


def open_jaxpr(jaxpr: Any) -> Any:
    """Return the jaxpr that holds the equations: `jaxpr`, or the open jaxpr inside it if it is a closed one."""
    return jaxpr if hasattr(jaxpr, "eqns") else jaxpr.jaxpr


def get_checkpoint_name(equation: Any) -> str | None:
    """Return the name if an equation is a `checkpoint_name`, else None."""
    if equation.primitive.name == "name":
        return str(equation.params["name"])
    primitive = equation.params.get("_prim")
    if type(primitive).__name__ in ("CheckpointName", "CheckpointNameFwd"):
        return str(primitive.name)
    return None


def add_checkpoint_name(equation: Any, name: str, results: Sequence[Any] | None = None) -> list[Any]:
    """Return an equation followed by a `checkpoint_name` for each of its array results.

    Args:
        equation: The equation.
        name: The name.
        results: Variables for the named results; None to reuse those of the equation, so that every later reader
            reads the named value.
    """
    return add_checkpoint_names(equation, dict.fromkeys(range(len(equation.outvars)), name), results)


def add_checkpoint_names(equation: Any, names: Mapping[int, str], results: Sequence[Any] | None = None) -> list[Any]:
    """Return an equation followed by `checkpoint_name`s for some of its array results.

    Args:
        equation: The equation.
        names: Names by the number of the result.
        results: Variables for the named results; None to reuse those of the equation.
    """
    targets = equation.outvars if results is None else results
    named = {index for index in names if is_array(equation.outvars[index].aval)}
    fresh = [core.Var(var.aval) if index in named else var for index, var in enumerate(equation.outvars)]
    marks = [
        mark
        for index in sorted(named)
        for mark in make_name_equations(fresh[index], targets[index], names[index], equation)
    ]
    return [equation.replace(outvars=fresh), *marks]


def replace_checkpoint_name(equation: Any, name: str) -> list[Any]:
    """Return the equations of a `checkpoint_name` with another name."""
    (source,), (target,) = equation.invars, equation.outvars
    return make_name_equations(source, target, name, equation)


def make_name_equations(source: Any, target: Any, name: str, like: Any) -> list[Any]:
    """Return the equations of a `checkpoint_name`.

    Args:
        source: The variable to name.
        target: The variable for the named value.
        name: The name.
        like: An equation whose place in the source code they take.
    """
    aval = target.aval
    # JAX cannot save complex values by name, so their real and imaginary parts are named, which costs no memory.
    in_parts = jax.numpy.issubdtype(aval.dtype, jax.numpy.complexfloating) and not is_placed(aval)
    template = _trace_name(aval.shape, aval.dtype, name, in_parts, bool(getattr(jax.config, "jax_remat3", False)))
    same = {template.invars[0]: source, template.outvars[0]: target}
    # The template serves every value of this type: what lies between its equations gets variables of its own.
    same |= {var: core.Var(var.aval) for one in template.eqns for var in one.outvars if var not in same}
    made = []
    for one in template.eqns:
        params = one.params
        if "_prim" in params and not in_parts:
            # Under jax_remat3 the primitive holds the full type, which inside shard_map is more than shape and dtype.
            params = {**params, "_prim": type(params["_prim"])(name, aval)}
        made.append(
            one.replace(
                invars=[same.get(atom, atom) if isinstance(atom, core.Var) else atom for atom in one.invars],
                outvars=[same.get(var, var) for var in one.outvars],
                params=params,
                source_info=like.source_info,
                ctx=like.ctx,
            )
        )
    return made


@functools.lru_cache(maxsize=4096)
def _trace_name(shape: tuple[int, ...], dtype: Any, name: str, in_parts: bool, is_remat3: bool) -> Any:
    """Return a jaxpr that names its argument; JAX builds it, because its form differs under jax_remat3."""
    del is_remat3  # a part of the key

    def add_name(x: Any) -> Any:
        if in_parts:
            return jax.lax.complex(checkpoint_name(jax.lax.real(x), name), checkpoint_name(jax.lax.imag(x), name))
        return checkpoint_name(x, name)

    return open_jaxpr(jax.make_jaxpr(add_name)(jax.ShapeDtypeStruct(shape, dtype)))


def is_placed(aval: Any) -> bool:
    """Return whether a type refers to axes of a mesh: manual ones (inside `shard_map`) or explicit ones."""
    mesh = getattr(getattr(aval, "sharding", None), "mesh", None)
    return mesh is not None and any(kind != jax.sharding.AxisType.Auto for kind in mesh.axis_types)


def is_array(aval: Any) -> bool:
    """Return whether an abstract value is an array rather than a token or a reference."""
    return isinstance(aval, jax.core.ShapedArray)


def count_aval_bytes(aval: Any) -> int:
    """Return the bytes of an array with this shape and dtype; 0 for tokens and references."""
    if not is_array(aval):
        return 0
    size = 1
    for length in aval.shape:
        size *= int(length)
    # Extended dtypes may have no item size; a key of the default implementation is two 32-bit words.
    return size * int(getattr(aval.dtype, "itemsize", 8))


def replace_equations(jaxpr: Any, equations: list[Any], outvars: list[Any] | None = None) -> Any:
    """Return a jaxpr with other equations and, if given, other results."""
    inner = open_jaxpr(jaxpr)
    new = inner.replace(eqns=equations, outvars=inner.outvars if outvars is None else outvars)
    return new if jaxpr is inner else jaxpr.replace(jaxpr=new)


def replace_subjaxprs(equation: Any, subjaxprs: dict[Place, Any]) -> Any:
    """Return an equation with some of its nested jaxprs replaced, by their places."""
    params = dict(equation.params)
    for (key, index), program in subjaxprs.items():
        if index < 0:
            params[key] = program
        else:
            params[key] = (*params[key][:index], program, *params[key][index + 1 :])
    return equation.replace(params=params)


def inline_calls(jaxpr: Any, consts: dict[Any, Any] | None = None) -> Any:
    """Return an open jaxpr with the equations of calls, such as jits, in place of the calls.

    Equations keep the scopes of the calls around them. A call that also places its arguments or results stays.

    Args:
        jaxpr: An open jaxpr.
        consts: Gets the values of the constants of inlined calls, by new variables; None to leave such calls.
    """
    equations: list[Any] = []
    same: dict[Any, Any] = {}

    def resolve(atom: Any) -> Any:
        return same.get(atom, atom) if isinstance(atom, core.Var) else atom

    for equation in jaxpr.eqns:
        equation = equation.replace(invars=[resolve(atom) for atom in equation.invars])
        nested = [below for _, below in find_subjaxprs(equation)]
        inner = open_jaxpr(nested[0]) if equation.primitive.name in CALL_PRIMITIVES and len(nested) == 1 else None
        if inner is None or (inner.constvars and consts is None) or _is_placing(equation):
            equations.append(equation)
            continue
        values = dict(zip(inner.constvars, getattr(nested[0], "consts", ()), strict=True))
        inner = inline_calls(inner, None if consts is None else values)
        # A function that is called twice has one jaxpr, so its variables are renamed.
        local: dict[Any, Any] = dict(zip(inner.invars, equation.invars, strict=True))
        for var, value in values.items():
            local[var] = core.Var(var.aval)
            if consts is not None:
                consts[local[var]] = value
        for one in inner.eqns:
            local.update((var, core.Var(var.aval)) for var in one.outvars)
            invars = [local[atom] if isinstance(atom, core.Var) else atom for atom in one.invars]
            scopes = equation.source_info.name_stack + one.source_info.name_stack
            source = one.source_info.replace(name_stack=scopes)
            equations.append(
                one.replace(invars=invars, outvars=[local[var] for var in one.outvars], source_info=source)
            )
        results = [local[atom] if isinstance(atom, core.Var) else atom for atom in inner.outvars]
        same.update(zip(equation.outvars, results, strict=True))
    return jaxpr.replace(eqns=equations, outvars=[resolve(atom) for atom in jaxpr.outvars]) if same else jaxpr


def _is_placing(equation: Any) -> bool:
    """Whether a jit has shardings of its own."""
    shardings = (*equation.params.get("in_shardings", ()), *equation.params.get("out_shardings", ()))
    return any(type(sharding).__name__ != "UnspecifiedValue" for sharding in shardings)


def run(jaxpr: Any, leaves: list[Any]) -> list[Any]:
    """Evaluate a closed jaxpr on its flat arguments."""
    results: list[Any] = core.jaxpr_as_fun(jaxpr)(*leaves)
    return results


def run_segments(jaxpr: Any, leaves: Sequence[Any], segments: Sequence[tuple[range, Callable[[Any], Any]]]) -> Any:
    """Evaluate a closed jaxpr segment by segment.

    Args:
        jaxpr: The closed jaxpr.
        leaves: Its flat arguments.
        segments: Consecutive ranges that together cover all equations, each with a transformation: a function from
            the segment's closed jaxpr to the callable that evaluates it, such as one under `jax.checkpoint`.

    Returns:
        The results of the jaxpr, as a list.
    """
    inner = open_jaxpr(jaxpr)
    values: dict[Any, Any] = dict(zip(inner.constvars, jaxpr.consts, strict=True))
    values.update(zip(inner.invars, leaves, strict=True))
    used_later = _find_last_reads(inner)
    for span, make in segments:
        equations = inner.eqns[span.start : span.stop]
        if not equations:
            continue
        defined = {var for equation in equations for var in equation.outvars}
        reads = collect_variables(atom for equation in equations for atom in equation.invars)
        inputs = [var for var in reads if var not in defined]
        outputs = [var for var in defined if used_later.get(var, -1) >= span.stop]
        piece = core.Jaxpr(
            constvars=[],
            invars=inputs,
            outvars=outputs,
            eqns=equations,
            effects=frozenset().union(*(equation.effects for equation in equations)),
            debug_info=inner.debug_info._replace(arg_names=None, result_paths=None),
        )
        results = make(_close_jaxpr(piece))(*(values[var] for var in inputs))
        values.update(zip(outputs, results, strict=True))
    return [read_atom(atom, values) for atom in inner.outvars]


def read_atom(atom: Any, values: Mapping[Any, Any]) -> Any:
    """Return the value of a variable or a literal."""
    return values[atom] if isinstance(atom, core.Var) else atom.val


def _close_jaxpr(piece: Any) -> Any:
    return core.ClosedJaxpr(piece, [])  # type: ignore[attr-defined]  # public, but not in its stub


def _find_last_reads(inner: Any) -> dict[Any, int]:
    """Return the index of the last equation that reads each variable; results count as read at the end."""
    last: dict[Any, int] = {}
    for number, equation in enumerate(inner.eqns):
        last.update(dict.fromkeys(collect_variables(equation.invars), number))
    last.update(dict.fromkeys(collect_variables(inner.outvars), len(inner.eqns)))
    return last


def collect_variables(atoms: Iterable[Any]) -> list[Any]:
    """Return the variables among `atoms`, without duplicates and literals, in order."""
    return list(dict.fromkeys(atom for atom in atoms if isinstance(atom, core.Var)))


@dataclasses.dataclass(frozen=True)
class Scan:
    """The parts of a `scan` equation.

    Attributes:
        body: Closed jaxpr of one iteration; its arguments are constants, the carry, and a slice of each scanned array.
        num_consts: Number of constants, its first arguments.
        num_carry: Number of carried values, which follow; the other arguments are slices.
        length: Number of iterations.
        reverse: Whether the iterations run from the last slice to the first.
        unroll: As in `jax.lax.scan`.
    """

    body: Any
    num_consts: int
    num_carry: int
    length: int
    reverse: bool
    unroll: int


def parse_scan(equation: Any) -> Scan | None:
    """Return the parts of a `scan` equation; None for any other."""
    if equation.primitive.name != "scan":
        return None
    params = equation.params
    if "ft_in" in params:  # since jax 0.11; earlier releases have the counts as parameters
        consts, carry = (len(list(part)) for part in params["ft_in"].unpack()[:2])
    else:
        consts, carry = params["num_consts"], params["num_carry"]
    return Scan(params["jaxpr"], consts, carry, params["length"], params["reverse"], params["unroll"])
