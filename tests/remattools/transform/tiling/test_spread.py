# SPDX-License-Identifier: Apache-2.0
"""One axis of one value spreads to all that is independent along it."""

import jax
import jax.numpy as jnp

from remattools.transform.tiling.normal_form import normalize
from remattools.transform.tiling.program import SUM
from remattools.transform.tiling.spread import spread_axis


def _spread(fn, shapes, name, axis, excluded=()):
    program = normalize(jax.make_jaxpr(fn)(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)))
    seed = next(node.outvars[0] for node in program.nodes if node.primitive.name == name)
    return program, spread_axis(program, [(seed, axis)], excluded)


def _list_names(program, spread):
    return [program.nodes[number].primitive.name for number in sorted(spread.factors)]


def test_it_goes_up_and_down_until_the_axis_is_summed():
    program, spread = _spread(lambda x, w: jnp.tanh(jnp.sin(x) @ w).sum(), [(8, 4), (4, 16)], "dot_general", 0)
    assert _list_names(program, spread) == ["sin", "dot_general", "tanh", "reduce_sum"]
    assert spread.places[program.jaxpr.invars[0]] == 0
    assert program.jaxpr.invars[1] not in spread.places  # weights are needed whole
    assert spread.places[program.nodes[-1].outvars[0]] == SUM


def test_what_needs_all_rows_ends_it():
    program, spread = _spread(lambda x: jnp.exp(jnp.cumsum(jnp.sin(x), axis=0)), [(8, 4)], "sin", 0)
    assert _list_names(program, spread) == ["sin"]
    other = _spread(lambda x: jnp.exp(jnp.cumsum(jnp.sin(x), axis=0)), [(8, 4)], "sin", 1)
    assert _list_names(*other) == ["sin", "cumsum", "exp"]


def test_a_value_that_meets_itself_on_another_axis_is_whole_there():
    program, spread = _spread(lambda x: jnp.sin(x) @ jnp.sin(x).T, [(8, 4)], "dot_general", 0)
    (product,) = [n for n, node in enumerate(program.nodes) if node.primitive.name == "dot_general"]
    assert sorted(spread.factors[product].operands, key=str) == [0, None]


def test_excluded_equations_stay_whole():
    program, spread = _spread(lambda x: jnp.exp(jnp.tanh(jnp.sin(x))), [(8, 4)], "sin", 0, excluded={1})
    assert _list_names(program, spread) == ["sin"]
