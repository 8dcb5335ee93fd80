# SPDX-License-Identifier: Apache-2.0
"""A user's program: what `@rt.remat` decorates keeps its type."""

from collections.abc import Callable
from typing import assert_type

import jax
import jax.numpy as jnp
from flax import nnx

import remattools as rt


@rt.remat
class Bare(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs) -> None:
        self.width = width

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        return x


@rt.remat(policy="dots_saveable", every_n=2)
class WithOptions(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs) -> None:
        self.width = width

    def __call__(self, x: jax.Array) -> jax.Array:
        return x


class WithMethods(nnx.Module):
    @rt.remat
    def encode(self, x: jax.Array, *, train: bool = False) -> tuple[jax.Array, int]:
        return x, 1

    @rt.remat(policy="nothing_saveable", save=("attn",))
    def decode(self, x: jax.Array) -> jax.Array:
        return x


@rt.remat
def scale(x: jax.Array, factor: float = 2.0) -> jax.Array:
    return jnp.sin(x) * factor


@rt.remat(policy="nothing_saveable")
def split[T](x: jax.Array, tag: T) -> tuple[jax.Array, T]:
    return x, tag


def use(x: jax.Array, rngs: nnx.Rngs) -> None:
    assert_type(Bare(4, rngs=rngs), Bare)
    assert_type(Bare(4, rngs=rngs).width, int)
    assert_type(Bare(4, rngs=rngs)(x, train=True), jax.Array)
    assert_type(WithOptions(4, rngs=rngs), WithOptions)
    assert_type(WithOptions(4, rngs=rngs)(x), jax.Array)
    assert_type(WithMethods().encode(x, train=True), tuple[jax.Array, int])
    assert_type(WithMethods().decode(x), jax.Array)
    assert_type(scale(x, factor=3.0), jax.Array)
    assert_type(split(x, "a"), tuple[jax.Array, str])
    accept_scale(scale)
    accept_class(Bare)


def accept_scale(fn: Callable[[jax.Array, float], jax.Array]) -> None: ...


def accept_class(cls: type[nnx.Module]) -> None: ...


def use_apply(model: Bare) -> None:
    assert_type(rt.apply(model, {"**": "nothing_saveable"}), Bare)
    assert_type(rt.revert(model), Bare)
    with rt.applied(model, "nothing_saveable", on="**") as same:
        assert_type(same, Bare)
