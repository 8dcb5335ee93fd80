# SPDX-License-Identifier: Apache-2.0
"""The border of a stretch: what has to exist whole, against what is computed again."""

import itertools

import jax
import jax.numpy as jnp
import pytest

from remattools.transform.tiling import border
from remattools.transform.tiling.program import Program, count_bytes
from remattools.transform.tiling.spread import spread_axis


def _head(x, w, v):
    hidden = jnp.tanh(x @ w)
    logits = hidden @ v
    return (jnp.exp(logits - logits.max(-1, keepdims=True))).sum()


def _attention(x, w, v):
    q, k = x @ w, jnp.tanh(x) @ w
    scores = jnp.exp(q @ k.T)
    return ((scores / scores.sum(-1, keepdims=True)) @ (x @ v)).sum()


def _chain(x, w, v):
    y = jnp.exp(jnp.sin(x) @ v)
    return jnp.cos(y).sum() + (x @ w).sum()


SHAPES = (64, 8), (8, 8), (8, 256)


def _select(fn, axis=0, shapes=SHAPES):
    jaxpr = jax.make_jaxpr(fn)(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).jaxpr
    program = Program(jaxpr, jaxpr.eqns, {})
    values = [var for node in program.nodes for var in node.outvars if var not in program.results]
    seed = max(values, key=count_bytes)
    spread = spread_axis(program, [(seed, axis)])
    return program, spread, seed, border.select_members(program, spread, seed)


def _score(program, spread, seed, members):
    worth = sum(border.estimate_worth(var, seed) for var in border.find_vanished(program, spread, members))
    return worth - sum(border._estimate_work(program.nodes[number]) for number in members)


def _is_valid(program, spread, members):
    inside = set(members)
    between = program.find_descendants(inside) & program.find_ancestors(inside)
    if between - inside:
        return False
    made = {var for number in inside for var in program.nodes[number].outvars}
    for number in inside:
        for atom, axis in zip(program.nodes[number].invars, spread.factors[number].operands, strict=True):
            if axis is None and atom in made:
                return False
    summed = {n for n in inside if spread.factors[n].kind == "sum"}
    return not (program.find_descendants(summed) & inside)


@pytest.mark.parametrize("fn", [_head, _attention, _chain])
def test_no_other_stretch_around_the_value_is_better(fn):
    program, spread, seed, members = _select(fn)
    seed_number = program.producers[seed]
    others = sorted(set(spread.factors) - {seed_number})
    assert len(others) <= 14
    best = max(
        _score(program, spread, seed, chosen)
        for count in range(len(others) + 1)
        for picked in itertools.combinations(others, count)
        for chosen in [frozenset((*picked, seed_number))]
        if _is_valid(program, spread, chosen)
    )
    assert _is_valid(program, spread, members)
    # Capacities are rounded to a part in 2^20 of the largest value for each equation.
    assert _score(program, spread, seed, members) == pytest.approx(best, abs=len(others) * count_bytes(seed) / 2**18)


def test_a_small_layer_before_large_logits_is_not_computed_again():
    program, _, _, members = _select(_head)
    products = [number for number in members if program.nodes[number].primitive.name == "dot_general"]
    assert [program.nodes[number].outvars[0].aval.shape for number in products] == [(64, 256)]


def test_work_that_costs_nothing_is_taken_in(monkeypatch):
    monkeypatch.setattr(border, "_WORK", {})
    program, _, _, members = _select(_head)
    assert sum(program.nodes[number].primitive.name == "dot_general" for number in members) == 2


def test_keys_and_values_stay_whole():
    program, _, seed, members = _select(_attention, shapes=((64, 8), (8, 8), (8, 8)))
    assert seed.aval.shape == (64, 64)
    computed = {program.nodes[number].outvars[0] for number in members}
    for number in members:
        node = program.nodes[number]
        if node.primitive.name == "dot_general" and node.outvars[0].aval.shape == (64, 64):
            assert node.invars[1] not in computed
