# SPDX-License-Identifier: Apache-2.0
"""The work of operations is counted from their shapes."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from remattools.planner.model.op_work import Work, estimate_work


def work_of(fn: Any, *shapes: tuple[int, ...]) -> Work:
    """Work of the last equation of a function."""
    jaxpr = jax.make_jaxpr(fn)(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
    return estimate_work(jaxpr.eqns[-1])


@pytest.mark.parametrize(
    ("fn", "shapes", "kind", "flops"),
    [
        pytest.param(jnp.matmul, [(3, 4), (4, 5)], "matrix", 2 * 3 * 4 * 5, id="product"),
        pytest.param(jnp.sin, [(3, 4)], "elementwise", 12, id="element-wise"),
        pytest.param(lambda x: x.sum(), [(3, 4)], "reduction", 12, id="reduction"),
        pytest.param(lambda x: x.reshape(4, 3), [(3, 4)], "free", 0, id="change of shape"),
        pytest.param(jnp.cumsum, [(12,)], "other", 12, id="never fused"),
        pytest.param(
            lambda x: jax.lax.scan(lambda c, _: (jnp.sin(c), None), x, length=5)[0], [(3, 4)], "other", 60, id="scan"
        ),
    ],
)
def test_work_has_a_kind_and_flops(fn: Any, shapes: Any, kind: str, flops: float) -> None:
    found = work_of(fn, *shapes)
    assert (found.kind, found.flops) == (kind, flops)


def test_a_product_narrows_unless_its_precision_is_given() -> None:
    assert work_of(jnp.matmul, (3, 4), (4, 5)).is_narrowing
    assert not work_of(lambda a, b: jnp.matmul(a, b, precision="highest"), (3, 4), (4, 5)).is_narrowing
