# SPDX-License-Identifier: Apache-2.0
"""Pallas kernels are cut along axes of the grid whose steps are independent."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..cutting import check, describe, draw, find_equation, find_factors


def _multiply(x_ref, w_ref, o_ref):
    o_ref[...] = jnp.sin(x_ref[...]) @ w_ref[...]


def _multiply_by_place(x_ref, w_ref, o_ref):
    o_ref[...] = (x_ref[...] @ w_ref[...]) * pl.program_id(0)


def _call(kernel=_multiply, rows=None, scratch=(), semantics=None, index=lambda i, j: (i, j, 0)):
    def call(x, w):
        def run(x_ref, w_ref, o_ref, *_):
            kernel(x_ref, w_ref, o_ref)

        return pl.pallas_call(
            run,
            out_shape=jax.ShapeDtypeStruct((6, 8, 3), x.dtype),
            grid=(6 // (rows or 1), 2),
            in_specs=[pl.BlockSpec((rows, 4, 5), index), pl.BlockSpec((5, 3), lambda i, j: (0, 0))],
            out_specs=pl.BlockSpec((rows, 4, 3), lambda i, j: (i, j, 0)),
            scratch_shapes=scratch,
            compiler_params=None if semantics is None else pltpu.CompilerParams(dimension_semantics=semantics),
            interpret=True,
        )(x, w)

    return call


@pytest.mark.parametrize("rows", [None, 1])
def test_one_row_for_each_step_is_cut(rows):
    check(_call(rows=rows), draw((6, 8, 5)), draw((5, 3)), name="pallas_call", expected=["0 . -> 0"], gradients=False)


_SCRATCH = (pltpu.VMEM((4, 3), jnp.float32),)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        pytest.param(_call(_multiply_by_place), [], id="place-is-read"),
        pytest.param(_call(rows=2), [], id="several-rows-for-each-step"),
        pytest.param(_call(index=lambda i, j: (5 - i, j, 0)), [], id="rows-in-another-order"),
        pytest.param(_call(scratch=_SCRATCH), [], id="scratch-between-steps"),
        pytest.param(
            _call(scratch=_SCRATCH, semantics=("arbitrary", "arbitrary")), [], id="scratch-between-ordered-steps"
        ),
        pytest.param(
            _call(scratch=_SCRATCH, semantics=("parallel", "arbitrary")), ["0 . -> 0"], id="scratch-in-parallel-steps"
        ),
    ],
)
def test_what_the_block_specs_do_not_prove_is_not_cut(function, expected):
    equation, _ = find_equation(function, draw((6, 8, 5)), draw((5, 3)), name="pallas_call")
    assert [describe(factor) for factor in find_factors(equation)] == expected


def test_an_axis_that_vmap_added_is_cut_although_the_place_is_read():
    def call(x):
        def kernel(x_ref, o_ref):
            o_ref[...] = x_ref[...] * pl.program_id(0)

        return pl.pallas_call(
            kernel,
            out_shape=jax.ShapeDtypeStruct((2, 8), x.dtype),
            grid=(2,),
            in_specs=[pl.BlockSpec((1, 8), lambda i: (i, 0))],
            out_specs=pl.BlockSpec((1, 8), lambda i: (i, 0)),
            interpret=True,
        )(x)

    check(jax.vmap(call), draw((6, 2, 8)), name="pallas_call", expected=["0 -> 0"], gradients=False)
