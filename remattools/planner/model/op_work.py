# SPDX-License-Identifier: Apache-2.0
"""How much one operation computes, and whether compilers fuse it; counted from its equation, for any target.

Lowest file of `planner.model`. A `Step` is one operation of a program, an `Access` is what it does in memory. `time`
turns work into cycles of a target; `dataflow_graph` needs the kinds to know which values exist only inside fused
operations.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import jax

from ...jaxpr import jaxprs, random_bits

WorkKind = Literal["matrix", "reduction", "elementwise", "free", "random", "other"]

# Shape changes that the compilers fold into the operations that read them.
_FREE_PRIMITIVES = frozenset(
    {"broadcast_in_dim", "reshape", "squeeze", "iota", "stop_gradient", "copy", "name", "expand_dims", "pvary"}
)
_REDUCTION_PRIMITIVES = frozenset(
    {"reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "argmax", "argmin", "reduce_and", "reduce_or"}
)
_MATRIX_PRIMITIVES = frozenset({"dot_general", "conv_general_dilated", "ragged_dot", "ragged_dot_general"})
# Neither matrix products nor fused: they write their results to memory.
_OTHER_PRIMITIVES = frozenset(
    {
        *("sort", "top_k", "gather", "scatter", "scatter-add", "dynamic_slice", "dynamic_update_slice"),
        *("cumsum", "cumlogsumexp", "fft", "reduce_window_max", "reduce_window_sum", "select_and_scatter_add"),
        *("random_bits", "threefry2x32", "rng_bit_generator", "plan_block"),
    }
)
# Element-wise, but so slow that XLA's CPU compiler computes them once for several readers, as its programs show. It
# computes `sin`, `cos` and `tan` within each reader.
_COSTLY_PRIMITIVES = frozenset(
    """
    acos acosh asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt cosh digamma div erf erf_inv erfc exp exp2 expm1
    igamma igammac lgamma log log1p logistic polygamma pow rem rsqrt sinh sqrt tanh zeta
    """.split()  # noqa: SIM905 (one name a line would be thirty lines)
)
# Operations for 32 bits of threefry: 20 rounds of an addition, a rotation and an exclusive or, and the key's schedule.
_THREEFRY_FLOPS = 110.0


@dataclasses.dataclass(frozen=True)
class Work:
    """The work of one operation.

    Attributes:
        kind: "matrix" (a product or convolution), "reduction", "elementwise" (fused where possible), "free" (a change
            of shape), "random" (bits drawn from threefry keys) or "other" (never fused).
        flops: Floating-point operations; one for each element where the primitive has no formula.
        is_narrowing: Whether it is a product that leaves the precision of its operands to the target.
        is_costly: Whether it is element-wise, but takes many cycles for each element.
    """

    kind: WorkKind
    flops: float
    is_narrowing: bool = False
    is_costly: bool = False


@dataclasses.dataclass(frozen=True)
class Step:
    """One operation.

    Attributes:
        reads: Numbers of the values that it takes.
        writes: Numbers of the values that it computes.
        work: Its kind and arithmetic.
        tag: For a block with a backward pass, "forward" or "backward" and the number of the visit; else None.
        label: Its name for people.
        iterations: How often it runs: the product of the lengths of the loops around it.
        copied: Operands that a CPU copies, since a product needs their axes in another order.
        broadcast: Operands of an element-wise operation that have fewer elements than its result.
    """

    reads: tuple[int, ...]
    writes: tuple[int, ...]
    work: Work
    tag: Any = None
    label: str = ""
    iterations: int = 1
    copied: tuple[int, ...] = ()
    broadcast: tuple[int, ...] = ()


class Access(NamedTuple):
    """What one step reads from memory and writes to it.

    Attributes:
        reads: Numbers of values.
        writes: Numbers of values.
        overwritable: Those that it reads and may write a result over, where nothing reads them later.
    """

    reads: frozenset[int]
    writes: tuple[int, ...]
    overwritable: frozenset[int] = frozenset()


def estimate_work(equation: Any) -> Work:
    """Return the work of an equation, including that of the jaxprs inside it."""
    name = equation.primitive.name
    if name in _FREE_PRIMITIVES:
        return Work("free", 0.0)
    if name == "dot_general":
        ((contracted, _), _) = equation.params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        depth = math.prod(shape[axis] for axis in contracted)
        return Work("matrix", 2.0 * depth * _count_elements(equation.outvars), _is_narrowing(equation))
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        features = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
        return Work(
            "matrix",
            2.0 * math.prod(kernel) / max(features, 1) * _count_elements(equation.outvars),
            _is_narrowing(equation),
        )
    inside = [_sum_flops(jaxpr) for _, jaxpr in jaxprs.find_subjaxprs(equation)]
    if inside:
        iterations = equation.params.get("length", 1) if name == "scan" else 1
        return Work("other", iterations * sum(inside))
    if name in _REDUCTION_PRIMITIVES:
        return Work("reduction", float(_count_elements(equation.invars)))
    if random_bits.find_implementation(equation) == "threefry":
        return Work("random", _THREEFRY_FLOPS * _count_elements(equation.outvars))
    if name in _MATRIX_PRIMITIVES or name in _OTHER_PRIMITIVES:
        return Work("matrix" if name in _MATRIX_PRIMITIVES else "other", float(_count_elements(equation.outvars)))
    return Work("elementwise", float(_count_elements(equation.outvars)), is_costly=name in _COSTLY_PRIMITIVES)


def divide_work(work: Work, sizes: Iterable[tuple[int, int]]) -> Work:
    """Return the part of an operation's work that one device of a mesh has.

    Args:
        work: Of the whole operation.
        sizes: For each operand and result its bytes on one device and those of the whole array. The one that is split
            most says how the operation is: a sum over a split axis has a whole result.
    """
    share = min((part / whole for part, whole in sizes if whole), default=1.0)
    return work if share == 1.0 else dataclasses.replace(work, flops=work.flops * share)


def _is_narrowing(equation: Any) -> bool:
    precision = equation.params.get("precision")
    each = precision if isinstance(precision, tuple) else (precision,)
    return all(one in (None, jax.lax.Precision.DEFAULT) for one in each)


def _sum_flops(jaxpr: Any) -> float:
    return sum(estimate_work(equation).flops for equation in jaxprs.open_jaxpr(jaxpr).eqns)


def _count_elements(atoms: Any) -> int:
    return max((math.prod(atom.aval.shape) for atom in atoms if jaxprs.is_array(atom.aval)), default=0)
