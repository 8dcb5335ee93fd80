# SPDX-License-Identifier: Apache-2.0
"""Decompositions, solvers and transforms are cut along their batch."""

import jax.numpy as jnp
import pytest
from jax import lax

from ..cutting import check, draw


@pytest.mark.parametrize(
    ("name", "function", "shape", "expected"),
    [
        pytest.param(
            "cholesky", lambda x: jnp.linalg.cholesky(x @ x.mT + 9 * jnp.eye(3)), (4, 3, 3), ["0 -> 0"], id="cholesky"
        ),
        pytest.param("eigh", lambda x: jnp.linalg.eigh(x @ x.mT), (4, 3, 3), ["0 -> 0 0"], id="eigh"),
        pytest.param("svd", jnp.linalg.svd, (4, 3, 3), ["0 -> 0 0 0"], id="svd"),
        pytest.param("lu", lax.linalg.lu, (4, 3, 3), ["0 -> 0 0 0"], id="lu"),
        pytest.param(
            "triangular_solve",
            lambda x: lax.linalg.triangular_solve(x + 9 * jnp.eye(3), x, left_side=True),
            (4, 3, 3),
            ["0 0 -> 0"],
            id="solve",
        ),
        pytest.param("fft", lambda x: jnp.fft.fft(x), (4, 3, 8), ["0 -> 0", "1 -> 1"], id="fft"),
        pytest.param("fft", lambda x: jnp.fft.rfft2(x), (4, 3, 8), ["0 -> 0"], id="fft-of-two-axes"),
        pytest.param("cholesky", lambda x: jnp.linalg.cholesky(x @ x.mT + 9 * jnp.eye(3)), (3, 3), [], id="one-matrix"),
    ],
)
def test_factors_and_pieces(name, function, shape, expected):
    check(function, draw(shape), name=name, expected=expected, gradients=name not in ("eigh", "svd", "fft"))
