# SPDX-License-Identifier: Apache-2.0
"""Control: mistakes around `@rt.remat` that both checkers must report."""

from typing import assert_type

import jax
from flax import nnx

import remattools as rt


@rt.remat
class Block(nnx.Module):
    def __init__(self, width: int) -> None:
        self.width = width

    def __call__(self, x: jax.Array) -> jax.Array:
        return x

    @rt.remat(policy="dots_saveable")
    def encode(self, x: jax.Array) -> jax.Array:
        return x


@rt.remat
def scale(x: jax.Array, factor: float = 2.0) -> jax.Array:
    return x * factor


def use(x: jax.Array) -> None:
    Block("wide")  # error
    Block(4)(x, train=True)  # error
    assert_type(Block(4), nnx.Module)  # error
    Block(4).encode()  # error
    scale("x")  # error
    assert_type(scale(x), int)  # error
    rt.remat("nothing_saveable")  # error
    rt.remat(polcy="nothing_saveable")  # error
