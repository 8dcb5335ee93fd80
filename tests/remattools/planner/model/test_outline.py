# SPDX-License-Identifier: Apache-2.0
"""An outline has one problem for each kind of block, in a time that hardly grows with depth."""

import time

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import remattools as rt
from remattools.planner.model.outline import Outline, build_outline
from remattools.planner.model.time import get_rates

from ...models import Tower, loss
from ..search.test_to_rules import Mixed

X = jax.ShapeDtypeStruct((2, 16, 16), jnp.float32)


def outlined(make: object) -> Outline:
    return build_outline(loss, nnx.eval_shape(make), (X,), get_rates("tpu:v5e:2x2"))


def test_equal_blocks_share_a_problem_and_different_ones_do_not() -> None:
    assert len(outlined(lambda: Tower(8, 16)).problems) == 1
    assert len(outlined(Mixed).problems) == 2


def test_the_plain_program_takes_more_cycles_than_its_blocks() -> None:
    shallow, deep = outlined(lambda: Tower(2, 16)), outlined(lambda: Tower(4, 16))
    blocks = 2 * shallow.problems[0].total_cycles
    assert deep.count_plain_cycles() - shallow.count_plain_cycles() == pytest.approx(blocks, rel=0.2)
    assert shallow.count_plain_cycles() > blocks


def test_a_function_without_the_model_is_refused() -> None:
    with pytest.raises(rt.MeasureError, match="no block of the model runs") as caught:
        build_outline(lambda model, x: x.sum(), nnx.eval_shape(Tower), (X,), get_rates("cpu"))
    assert "pass a loss" in caught.value.fix


def test_planning_time_hardly_grows_with_depth() -> None:
    def seconds(depth: int) -> float:
        start = time.process_time()
        assert outlined(lambda: Tower(depth, 16)).problems  # differentiated on first use, a part of planning
        return time.process_time() - start

    seconds(2)  # what JAX sets up once
    small, large = (min(seconds(depth) for _ in range(2)) for depth in (4, 32))
    assert large < 10
    assert large < 6 * small  # eight times as deep
