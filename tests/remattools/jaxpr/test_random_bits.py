# SPDX-License-Identifier: Apache-2.0
"""Dropout masks and random bits are found in a program, however they are written."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from remattools.jaxpr import jaxprs
from remattools.jaxpr.random_bits import find_dropout_masks, find_random_bits

KEY = jax.random.key(0)
X = jnp.ones((4, 8), jnp.bfloat16)


def find_masks(function: Callable[..., Any], *args: Any, deeper: bool = False) -> list[str]:
    """Return primitive and type of each mask, in the order of the program."""
    program = jax.make_jaxpr(function)(*args)
    found = []
    for position in sorted(find_dropout_masks(program, deeper=deeper), key=str):
        below: Any = program
        for step in position:
            number, place = (step, None) if isinstance(step, int) else step
            equation = jaxprs.open_jaxpr(below).eqns[number]
            if place is not None:
                below = dict(jaxprs.find_subjaxprs(equation))[place]
        found.append(f"{equation.primitive.name} {equation.outvars[0].aval.str_short(short_dtypes=True)}")
    return found


def draw(key: Any, x: Any) -> Any:
    return jnp.where(jax.random.bernoulli(key, 0.9, x.shape), x / 0.9, 0)


@pytest.mark.parametrize(
    ("function", "masks"),
    [
        pytest.param(draw, ["lt bool[4,8]"], id="bernoulli"),
        pytest.param(jax.jit(draw), ["lt bool[4,8]"], id="jit"),
        pytest.param(lambda k, x: jax.random.bernoulli(k, 0.9, x.shape, mode="high") * x, ["lt bool[4,8]"], id="high"),
        pytest.param(
            lambda k, x: jnp.where(jax.random.uniform(k, x.shape) >= 0.1, x, 0), ["ge bool[4,8]"], id="uniform"
        ),
        pytest.param(lambda k, x: x * jnp.greater(0.9, jax.random.uniform(k, x.shape)), ["gt bool[4,8]"], id="turned"),
        pytest.param(
            lambda k, x: x * (jax.random.bits(k, x.shape, jnp.uint8) < 230).astype(x.dtype), ["lt bool[4,8]"], id="bits"
        ),
        pytest.param(lambda k, x: x * jnp.floor(0.9 + jax.random.uniform(k, (4, 1))), ["floor f32[4,1]"], id="floor"),
        pytest.param(
            lambda k, x: x * jax.random.randint(k, x.shape, 0, 2).astype(bool),
            ["convert_element_type bool[4,8]"],
            id="ints",
        ),
        pytest.param(
            lambda k, x: x * (jax.random.uniform(k, x.shape) < jnp.linspace(0, 1, 4)[:, None]),
            ["lt bool[4,8]"],
            id="rates",
        ),
        pytest.param(
            lambda k, x: jax.vmap(draw)(jax.random.split(k, 3), jnp.ones((3, *x.shape))), ["lt bool[3,4,8]"], id="vmap"
        ),
        pytest.param(
            lambda k, x: jax.lax.scan(lambda c, k: (draw(k, c), None), x, jax.random.split(k, 3))[0],
            ["lt bool[4,8]"],
            id="scan",
        ),
        pytest.param(lambda k, x: jax.lax.cond(x[0, 0] > 0, draw, lambda k, x: x, k, x), ["lt bool[4,8]"], id="branch"),
        pytest.param(
            lambda k, x: (jax.debug.print("{}", jax.random.uniform(k, x.shape)), draw(k, x))[1],
            ["lt bool[4,8]"],
            id="print",
        ),
        # Not masks: data compared with data, random floats, what is computed from a mask.
        pytest.param(lambda k, x: jnp.where(x > 0, x, 0), [], id="no-random"),
        pytest.param(lambda k, x: jnp.maximum(x + jax.random.normal(k, x.shape), 0), [], id="noise"),
        pytest.param(lambda k, x: jnp.where(x + jax.random.normal(k, x.shape) > 0, x, 0), [], id="noisy-data"),
        pytest.param(
            lambda k, x: jnp.where((jax.random.uniform(k, x.shape) < 0.9) & (x > 0), x, 0), ["lt bool[4,8]"], id="and"
        ),
        pytest.param(jax.checkpoint(draw), [], id="region"),
    ],
)
@pytest.mark.parametrize("implementation", ["threefry2x32", "rbg"])
def test_masks_are_found_however_they_are_written(
    function: Callable[..., Any], masks: list[str], implementation: str
) -> None:
    assert find_masks(function, jax.random.key(0, impl=implementation), X) == masks


def test_keys_of_raw_words_are_found() -> None:
    assert find_masks(draw, jax.random.PRNGKey(0), X) == ["lt bool[4,8]"]
    (bits,) = find_random_bits(jax.make_jaxpr(draw)(jax.random.PRNGKey(0), X))
    assert bits.implementation == "threefry"


def test_a_region_decides_on_its_own_masks() -> None:
    assert find_masks(jax.checkpoint(draw), KEY, X) == []
    assert find_masks(jax.checkpoint(draw), KEY, X, deeper=True) == ["lt bool[4,8]"]


@pytest.mark.parametrize(
    ("implementation", "name"), [("threefry2x32", "threefry"), ("rbg", "rbg"), ("unsafe_rbg", "unsafe_rbg")]
)
def test_bits_are_found_with_implementation_and_size(implementation: str, name: str) -> None:
    def run(key: Any, x: Any) -> Any:
        return jax.lax.scan(lambda c, k: (jax.jit(draw)(k, c), None), x, jax.random.split(key, 3))[0]

    (bits,) = find_random_bits(jax.make_jaxpr(run)(jax.random.key(0, impl=implementation), X))
    assert (bits.implementation, bits.shape, bits.bytes, bits.iterations) == (name, (4, 8), 128, 3)
    assert list(find_random_bits(jax.make_jaxpr(jnp.sin)(X))) == []
