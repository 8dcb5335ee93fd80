# SPDX-License-Identifier: Apache-2.0
"""Which stretches are found, along which axis, and what is said of values that stay whole."""

import jax
import jax.numpy as jnp
import pytest

from remattools import Tile
from remattools.transform.tiling.normal_form import normalize
from remattools.transform.tiling.program import Stretch
from remattools.transform.tiling.stretches import find_stretches


def _find(fn, *shapes, tile=None, **options):
    program = normalize(jax.make_jaxpr(fn)(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)))
    program, uncut = find_stretches(program, tile or Tile(4), **options)
    return [node for node in program.nodes if isinstance(node, Stretch)], uncut


def _attend(q, k, v):
    return jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k)) @ v.swapaxes(1, 2)


HEADS = (2, 64, 8, 4)


def test_attention_is_cut_along_queries_by_default():
    (stretch,), _ = _find(_attend, HEADS, HEADS, HEADS)
    assert (stretch.axis, stretch.size, stretch.pieces) == (2, 64, 4)
    assert stretch.seed in stretch.vanished


def test_an_axis_can_be_given():
    (stretch,), _ = _find(_attend, HEADS, HEADS, HEADS, tile=Tile(4, axis=1))
    assert (stretch.axis, stretch.size) == (1, 8)


def test_an_axis_too_short_for_the_pieces_comes_last():
    (stretch,), _ = _find(lambda x, w: jnp.exp(x @ w).sum(), (2, 16, 4), (4, 64))
    assert stretch.axis != 0


def test_equal_parts_become_stretches_of_their_own():
    def twice(q, k, v):
        return _attend(q, _attend(q, k, v).swapaxes(1, 2), v)

    stretches, _ = _find(twice, HEADS, HEADS, HEADS, tile=Tile(4, axis=2))
    assert len(stretches) == 2


def test_what_is_not_wanted_stays():
    stretches, _ = _find(_attend, HEADS, HEADS, HEADS, is_wanted=lambda equation: False)
    assert stretches == []


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        pytest.param(lambda x: jnp.linalg.eigh(x)[1].sum(), "eigh needs it", id="needed whole"),
        pytest.param(lambda x: jnp.exp(jnp.linalg.qr(x)[0]).sum(), "qr has no axis", id="no rule"),
    ],
)
def test_a_value_that_stays_whole_has_a_reason(fn, reason):
    _, uncut = _find(fn, (64, 64))
    assert uncut
    assert any(reason in value.reason for value in uncut)


def test_values_of_the_results_size_are_not_large():
    stretches, uncut = _find(lambda x: jnp.exp(jnp.sin(x)), (64, 64))
    assert (stretches, uncut) == ([], [])
