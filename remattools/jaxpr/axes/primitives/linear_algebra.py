# SPDX-License-Identifier: Apache-2.0
"""Rules of primitives that work on each matrix or vector of a batch alone: decompositions, solvers, transforms."""

from collections.abc import Callable, Iterator
from typing import Any

from ..factor import Factor
from ..rule import Rule, get_operand_shapes, get_result_shapes


def _find_batch(rank: int) -> Callable[[Any], Iterator[Factor]]:
    """Return a function that yields the axes before the last `rank` of the first operand."""

    def find(equation: Any) -> Iterator[Factor]:
        operands, results = get_operand_shapes(equation), get_result_shapes(equation)
        batch = operands[0][: len(operands[0]) - rank]
        # A value without the batch, such as one matrix for many vectors, has no rule.
        if all(shape[: len(batch)] == batch for shape in (*operands, *results)):
            for axis in range(len(batch)):
                yield Factor((axis,) * len(operands), (axis,) * len(results))

    return find


def _find_fourier(equation: Any) -> Iterator[Factor]:
    yield from _find_batch(len(equation.params["fft_lengths"]))(equation)


_OF_MATRICES = (
    "cholesky",
    "eig",
    "eigh",
    "hessenberg",
    "householder_product",
    "lu",
    "qr",
    "schur",
    "svd",
    "triangular_solve",
    "tridiagonal",
)
RULES = {name: Rule(_find_batch(2)) for name in _OF_MATRICES} | {
    "fft": Rule(_find_fourier),
    "lu_pivots_to_permutation": Rule(_find_batch(1)),
    "tridiagonal_solve": Rule(_find_batch(1)),
}
