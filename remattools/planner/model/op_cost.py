# SPDX-License-Identifier: Apache-2.0
"""What an operation costs on a target: a model, used to search and never reported as a measurement.

Lowest file of `plan`. An operation takes the longer of its arithmetic and its traffic,
and an overhead. Fused element-wise operations move nothing; what they compute still
counts. The planner scales the three parts by what the compiler says of the programs
that it compiled.
"""

import dataclasses
import functools
import math
from typing import Any

import jax

from ...jaxpr import jaxprs

# Shape changes that the compilers fold into what reads them.
_FREE_PRIMITIVES = frozenset(
    {"broadcast_in_dim", "reshape", "squeeze", "iota", "stop_gradient", "copy", "name", "expand_dims"}
)
_REDUCTION_PRIMITIVES = frozenset(
    {"reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "argmax", "argmin", "reduce_and", "reduce_or"}
)
_MATRIX_PRIMITIVES = frozenset({"dot_general", "conv_general_dilated", "ragged_dot", "ragged_dot_general"})
# Neither matrix products nor fused: they write what they compute.
_OTHER_PRIMITIVES = frozenset(
    {
        *("sort", "top_k", "gather", "scatter", "scatter-add", "dynamic_slice", "dynamic_update_slice"),
        *("cumsum", "cumlogsumexp", "fft", "reduce_window_max", "reduce_window_sum", "select_and_scatter_add"),
        *("random_bits", "threefry2x32", "rng_bit_generator", "plan_block"),
    }
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates:
    """What a machine does in one cycle.

    Attributes:
        matrix_flops: Of its matrix units.
        vector_flops: Of everything else.
        traffic_bytes: To and from its main memory.
        overhead: Cycles to start an operation.
        link_bytes: To the host's memory, and as much from it; 0 where there is no memory of a host.
        fuses_products: Whether the compiler computes what a single product reads within that product, and keeps in half
            the bytes what only products read, as the matrix units take float32 as bfloat16 by default.
    """

    matrix_flops: float
    vector_flops: float
    traffic_bytes: float
    overhead: float
    link_bytes: float = 0.0
    fuses_products: bool = False


# Peak rates of one chip by the vendors' data sheets, divided by its clock. Of the link to the host they say nothing:
# taken is what PCIe 3.0 (TPUs) and 5.0 (GPUs) with 16 lanes carry, 15.75e9 and 63e9 bytes a second.
_make_tpu_rates = functools.partial(Rates, overhead=300, fuses_products=True)
_TPU_RATES = {
    "v4": _make_tpu_rates(matrix_flops=262_144, vector_flops=8_192, traffic_bytes=1_143, link_bytes=15.0),
    "v5e": _make_tpu_rates(matrix_flops=131_072, vector_flops=4_096, traffic_bytes=546, link_bytes=10.5),
    "v5p": _make_tpu_rates(matrix_flops=262_144, vector_flops=8_192, traffic_bytes=1_580, link_bytes=9.0),
    "v6e": _make_tpu_rates(matrix_flops=524_288, vector_flops=8_192, traffic_bytes=937, link_bytes=9.0),
}
_GPU_RATES = Rates(matrix_flops=500_000, vector_flops=34_000, traffic_bytes=1_900, overhead=3_000, link_bytes=36.0)
_CPU_RATES = Rates(matrix_flops=64, vector_flops=16, traffic_bytes=8, overhead=500)


def get_rates(target_name: str) -> Rates:
    """Rates of a target by its name; an unknown TPU is taken for a v5e."""
    platform, _, topology = target_name.partition(":")
    if platform == "tpu":
        return _TPU_RATES.get(topology.partition(":")[0], _TPU_RATES["v5e"])
    return _GPU_RATES if platform == "gpu" else _CPU_RATES


@dataclasses.dataclass(frozen=True)
class Work:
    """What an operation does.

    Attributes:
        kind: "matrix", "reduction", "elementwise", "free" or "other".
        flops: Arithmetic.
        is_narrowing: Whether it is a product that leaves the precision of its operands to the target.
    """

    kind: str
    flops: float
    is_narrowing: bool = False


def estimate_work(equation: Any) -> Work:
    """What an equation does, programs inside included."""
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
    inside = [_sum_flops(program) for _, program in jaxprs.find_subjaxprs(equation)]
    if inside:
        turns = equation.params.get("length", 1) if name == "scan" else 1
        return Work("other", turns * sum(inside))
    if name in _REDUCTION_PRIMITIVES:
        return Work("reduction", float(_count_elements(equation.invars)))
    if name in _MATRIX_PRIMITIVES or name in _OTHER_PRIMITIVES:
        return Work("matrix" if name in _MATRIX_PRIMITIVES else "other", float(_count_elements(equation.outvars)))
    return Work("elementwise", float(_count_elements(equation.outvars)))


def _is_narrowing(equation: Any) -> bool:
    precision = equation.params.get("precision")
    each = precision if isinstance(precision, tuple) else (precision,)
    return all(one in (None, jax.lax.Precision.DEFAULT) for one in each)


def _sum_flops(jaxpr: Any) -> float:
    return sum(estimate_work(equation).flops for equation in jaxprs.open_jaxpr(jaxpr).eqns)


def _count_elements(atoms: Any) -> int:
    return max((math.prod(atom.aval.shape) for atom in atoms if jaxprs.is_array(atom.aval)), default=0)
