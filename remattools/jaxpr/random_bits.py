# SPDX-License-Identifier: Apache-2.0
"""Random bits in a program, and the dropout masks that are computed from them.

Sits on `jaxprs`; `transform.naming.names` saves the masks, `analysis.random_bits` names what bits cost. Facts that
shaped it:

-   A mask is the first value of a chain that is not random bits any more: `uniform(key) < rate`. It has 1 byte for each
    element, and every value before it has 4. After it comes data, which depends on the model.
-   JAX draws bits by `random_bits` for each implementation of keys; only the key's dtype, such as `key<fry>` for
    threefry, says which one. Keys of raw words are wrapped first.
"""

import dataclasses
import enum
import math
from collections.abc import Iterator, Sequence
from typing import Any

from jax.extend import core

from . import jaxprs

_DRAWING_PRIMITIVES = frozenset({"random_bits", "threefry2x32", "rng_bit_generator", "rng_uniform"})
# `floor(keep_rate + uniform)` is a mask of zeros and ones.
_ROUNDINGS = frozenset({"floor", "ceil", "round"})
_KEY_NAMES = {"fry": "threefry", "rbg": "rbg", "urbg": "unsafe_rbg"}


class _Kind(enum.IntEnum):
    """What a value is computed from."""

    SCALAR = 0  # one element, or copies of one
    RANDOM = 1  # random bits and scalars alone
    DATA = 2


@dataclasses.dataclass(frozen=True)
class RandomBits:
    """One operation that draws random bits.

    Attributes:
        implementation: Of the keys: "threefry", "rbg", "unsafe_rbg", or another's short name.
        shape: Of the bits.
        bytes: Size of the bits.
        iterations: How often it runs: the product of the lengths of the scans around it.
        equation: The equation.
        stacks: The name stacks of the equations around it and of itself, outermost first.
    """

    implementation: str
    shape: tuple[int, ...]
    bytes: int
    iterations: int
    equation: Any
    stacks: tuple[str, ...]


def find_random_bits(jaxpr: Any, iterations: int = 1, stacks: tuple[str, ...] = ()) -> Iterator[RandomBits]:
    """Yield the operations of a program that draw random bits, also in programs inside it.

    Args:
        jaxpr: The program, open or closed.
        iterations: How often it runs.
        stacks: Name stacks around it.
    """
    for equation in jaxprs.open_jaxpr(jaxpr).eqns:
        inside = (*stacks, str(equation.source_info.name_stack))
        if equation.primitive.name in _DRAWING_PRIMITIVES:
            aval = equation.outvars[-1].aval
            size = sum(jaxprs.count_aval_bytes(var.aval) for var in equation.outvars)
            implementation = find_implementation(equation) or ""
            yield RandomBits(implementation, tuple(aval.shape), size, iterations, equation, inside)
        length = equation.params["length"] if equation.primitive.name == "scan" else 1
        for _, nested in jaxprs.find_subjaxprs(equation):
            yield from find_random_bits(nested, iterations * length, inside)


def find_implementation(equation: Any) -> str | None:
    """Return the implementation of the keys that an equation draws bits from; None if it draws none."""
    if equation.primitive.name not in _DRAWING_PRIMITIVES:
        return None
    if equation.primitive.name == "threefry2x32":
        return "threefry"
    dtype = str(equation.invars[0].aval.dtype) if equation.primitive.name == "random_bits" else "key<rbg>"
    name = dtype.removeprefix("key<").removesuffix(">")
    return _KEY_NAMES.get(name, name)


def find_dropout_masks(jaxpr: Any, *, deeper: bool = False) -> frozenset[jaxprs.Position]:
    """Return the positions of the equations that compute dropout masks.

    Args:
        jaxpr: The program, open or closed.
        deeper: Also look inside regions, which decide for themselves what they save.
    """
    found: set[jaxprs.Position] = set()
    inner = jaxprs.open_jaxpr(jaxpr)
    if next(find_random_bits(inner), None) is not None:
        _walk(inner, [_classify_argument(var.aval) for var in inner.invars], (), found, deeper)
    return frozenset(found)


def _walk(
    jaxpr: Any, kinds: Sequence[_Kind], prefix: jaxprs.Position, found: set[jaxprs.Position], deeper: bool
) -> list[_Kind]:
    """Add the masks of a program to `found`, and return the kinds of its results."""
    inner = jaxprs.open_jaxpr(jaxpr)
    known: dict[Any, _Kind] = {var: _classify_argument(var.aval) for var in inner.constvars}
    known.update(zip(inner.invars, kinds, strict=True))

    def get_kind(atom: Any) -> _Kind:
        return _Kind.SCALAR if not isinstance(atom, core.Var) else known[atom]

    for number, equation in enumerate(inner.eqns):
        operands = [get_kind(atom) for atom in equation.invars]
        nested = [*jaxprs.find_subjaxprs(equation)]
        if not nested:
            results = _classify_results(equation, operands)
            if _is_mask(equation, operands):
                found.add((*prefix, number))
        elif jaxprs.is_opaque(equation) or (jaxprs.is_region(equation) and not deeper):
            results = [_Kind.DATA] * len(equation.outvars)
        else:
            results = _walk_nested(equation, nested, operands, (*prefix,), number, found, deeper)
        known.update(zip(equation.outvars, results, strict=True))
    return [get_kind(atom) for atom in inner.outvars]


def _walk_nested(
    equation: Any,
    nested: Sequence[tuple[Any, Any]],
    operands: Sequence[_Kind],
    prefix: jaxprs.Position,
    number: int,
    found: set[jaxprs.Position],
    deeper: bool,
) -> list[_Kind]:
    """Walk the programs inside an equation; what differs between their results is data."""
    num_results = len(equation.outvars)
    merged = [_Kind.SCALAR] * num_results
    for place, below in nested:
        invars = jaxprs.open_jaxpr(below).invars
        arguments = list(operands[len(operands) - len(invars) :]) if len(invars) <= len(operands) else []
        scan = jaxprs.parse_scan(equation)
        if scan is not None:  # a carried value of a later iteration is the body's result
            start, stop = scan.num_consts, scan.num_consts + scan.num_carry
            arguments[start:stop] = [_classify_argument(var.aval) for var in invars[start:stop]]
        elif equation.primitive.name == "while" or len(arguments) != len(invars):
            arguments = [_classify_argument(var.aval) for var in invars]
        results = _walk(below, arguments, (*prefix, (number, place)), found, deeper)
        same = len(results) == num_results
        merged = [max(pair) for pair in zip(merged, results, strict=True)] if same else [_Kind.DATA] * num_results
    return merged


def _classify_argument(aval: Any) -> _Kind:
    return _Kind.SCALAR if math.prod(getattr(aval, "shape", ())) == 1 else _Kind.DATA


def _classify_results(equation: Any, operands: Sequence[_Kind]) -> list[_Kind]:
    if equation.primitive.name in _DRAWING_PRIMITIVES:
        return [_Kind.RANDOM] * len(equation.outvars)
    if _is_mask(equation, operands) or _Kind.DATA in operands:
        return [_Kind.DATA] * len(equation.outvars)
    # Constants of full size, such as an iota, are computed from nothing; so are those of operations on scalars.
    return [max(operands, default=_Kind.SCALAR)] * len(equation.outvars)


def _is_mask(equation: Any, operands: Sequence[_Kind]) -> bool:
    is_bool = any(str(getattr(var.aval, "dtype", "")) == "bool" for var in equation.outvars)
    return _Kind.RANDOM in operands and (is_bool or equation.primitive.name in _ROUNDINGS)
