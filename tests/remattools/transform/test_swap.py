# SPDX-License-Identifier: Apache-2.0
"""Actions on instances: set, read, replaced and removed in place."""

import jax.numpy as jnp
import pytest
from flax import nnx

import remattools as rt
from remattools.transform import swap
from tests.remattools.models import Block, Tower
from tests.remattools.transform.hosts import Layer, check_exact

ACTION = rt.Remat("dots_saveable")


def test_swap_and_unswap_change_only_the_class_and_the_action():
    block = Block(8, nnx.Rngs(0))
    before = dict(vars(block))
    swap.swap(block, ACTION)
    assert swap.get_action(block) == ACTION
    assert type(block) is not Block
    assert isinstance(block, Block)
    swap.unswap(block)
    assert type(block) is Block
    assert vars(block) == before
    assert swap.get_action(block) is None


def test_instances_with_other_actions_share_one_class():
    one, other = Block(8, nnx.Rngs(0)), Block(8, nnx.Rngs(1))
    swap.swap(one, ACTION)
    swap.swap(other, rt.Remat("nothing_saveable"))
    assert type(one) is type(other)
    assert swap.get_action(one) != swap.get_action(other)


def test_a_module_without_the_method_stays_unchanged():
    block = Block(8, nnx.Rngs(0))
    with pytest.raises(rt.RuleError, match="Block has no method 'decode'"):
        swap.swap(block, rt.Remat(methods=("decode",)))
    assert type(block) is Block


def test_only_public_methods_of_the_user_are_found():
    class Coder(Tower):
        def encode(self, x):
            return x

        def _prepare(self, x):
            return x

    assert set(swap.find_methods(Coder)) == {"__call__", "encode"}
    assert swap.find_holder_methods(Coder) == ("__call__",)


def test_a_class_that_another_library_swapped_already():
    class Quantised(Layer):
        def __call__(self, x):
            return jnp.round(jnp.sin(self.proj(x)) * 64) / 64 + 0 * x

    class Plainly(Layer):
        def __init__(self, width, rngs):
            super().__init__(width, rngs)
            self.__class__ = type("Static", (Quantised,), {})

    check_exact(Plainly, lambda m, x: m.layers[1](m.layers[0](x)))
