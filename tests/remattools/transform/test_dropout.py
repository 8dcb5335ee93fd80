# SPDX-License-Identifier: Apache-2.0
"""`dropout_masks_saveable`: regions keep the masks, draw no bits again, and compute the same."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import remattools as rt
from remattools.jaxpr import jaxprs, random_bits
from tests.remattools.exactness import assert_same_values, gradients
from tests.remattools.models import Tower, inputs, loss

MASKS = "dropout_masks_saveable"


class Dropped(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.up, self.drop = nnx.Linear(width, width, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.drop(jnp.sin(self.up(x)))


class Handwritten(nnx.Module):
    """Draws its masks itself, in two ways."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.up, self.rngs = nnx.Linear(width, width, rngs=rngs), rngs.fork()

    def __call__(self, x: jax.Array) -> jax.Array:
        h = jnp.sin(self.up(x))
        h = jnp.where(jax.random.bernoulli(self.rngs.dropout(), 0.9, h.shape), h / 0.9, 0)
        h = jnp.cos(self.up(h))
        return x + h * (jax.random.uniform(self.rngs.dropout(), h.shape) < 0.8) / 0.8


class Attended(nnx.Module):
    """The attention of flax, with dropout on its weights."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.attention = nnx.MultiHeadAttention(
            2, width, dropout_rate=0.5, broadcast_dropout=False, decode=False, deterministic=False, rngs=rngs
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.attention(x)


class Dry(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.up = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + jnp.sin(self.up(x))


class Stacked(nnx.Module):
    """Layers in a scan."""

    def __init__(self, rngs: nnx.Rngs, depth: int = 3) -> None:
        self.layers = nnx.vmap(lambda rngs: Dropped(8, rngs))(rngs.split(depth))

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)


def build(block: Any, implementation: str = "threefry2x32") -> Tower:
    with jax.default_prng_impl(implementation):
        return Tower(2, 8, block=block)


def find_recomputed_bits(model: Any, x: Any) -> list[tuple[int, ...]]:
    """Return the shapes of the random bits that the backward pass draws again."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def compute_loss(params: Any) -> Any:
        return loss(nnx.merge(graphdef, params, rest, copy=True), x)

    def walk(program: Any, inside: bool) -> Iterator[tuple[int, ...]]:
        for equation in jaxprs.open_jaxpr(program).eqns:
            for _, nested in jaxprs.find_subjaxprs(equation):
                yield from walk(nested, inside or jaxprs.is_region(equation))
            if inside and equation.primitive.name == "random_bits":
                yield equation.outvars[0].aval.shape

    return list(walk(jax.make_jaxpr(jax.grad(compute_loss))(params), False))


RULES = {
    "alone": ("layers.*", MASKS, MASKS),
    "nothing": ("layers.*", f"nothing_saveable | {MASKS}", "nothing_saveable"),
    "dots": ("layers.*", f"dots_saveable | {MASKS}", "dots_saveable"),
    "both": ("layers.*", f"save_from_both_policies(dots_saveable, {MASKS})", "dots_saveable"),
    "names": ("layers.*", f"save_only_these_names('mine') | {MASKS}", "save_only_these_names('mine')"),
}


@pytest.mark.parametrize("implementation", ["threefry2x32", "rbg"])
@pytest.mark.parametrize("block", [Dropped, Handwritten, Attended])
@pytest.mark.parametrize("rule", RULES)
def test_masks_are_kept_and_nothing_is_drawn_again(rule: str, block: Any, implementation: str) -> None:
    pattern, policy, without = RULES[rule]
    x = inputs()
    ruled = rt.apply(build(block, implementation), {pattern: policy})
    assert find_recomputed_bits(ruled, x) == []
    if rule != "alone":  # control: without the masks the bits are drawn again
        assert find_recomputed_bits(rt.apply(build(block, implementation), {pattern: without}), x)


@pytest.mark.parametrize("implementation", ["threefry2x32", "rbg"])
@pytest.mark.parametrize("block", [Dropped, Handwritten, Attended])
def test_values_gradients_and_counters_stay_the_same(block: Any, implementation: str) -> None:
    x = inputs()
    plain, ruled = build(block, implementation), build(block, implementation)
    rt.apply(ruled, {"layers.*": f"dots_saveable | {MASKS}"})
    assert_same_values(gradients(loss, ruled, x), gradients(loss, plain, x))
    assert_same_values(nnx.to_pure_dict(nnx.state(ruled)), nnx.to_pure_dict(nnx.state(plain)))


class Whole(nnx.Module):
    """Computes in small whole numbers, so that no order of additions rounds."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.w = nnx.Param(jax.random.randint(rngs.params(), (width, width), -1, 2).astype(jnp.float32))
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.drop((x @ self.w[...]) * x)


@pytest.mark.parametrize("implementation", ["threefry2x32", "rbg"])
@pytest.mark.parametrize("policy", [MASKS, f"dots_saveable | {MASKS}", "nothing_saveable"])
def test_masks_and_gradients_are_the_same_bits_as_without_rules(policy: str, implementation: str) -> None:
    x = jnp.round(inputs())

    def compute(model: Any) -> Any:
        return nnx.jit(lambda m, x: (m.layers[0](x), nnx.grad(loss)(m, x)))(model, x)

    results = (
        compute(build(Whole, implementation)),
        compute(rt.apply(build(Whole, implementation), {"layers.*": policy})),
    )
    assert jnp.any(results[0][0] == 0)
    assert jnp.any(results[0][0] != 0)
    jax.tree.map(np.testing.assert_array_equal, *map(jax.tree.leaves, results))


@pytest.mark.parametrize("save", ["up", "up:dot_general", "drop:lt"])
def test_masks_add_to_saved_and_offloaded_names(save: str) -> None:
    x = inputs()
    for names in ({"save": (save,)}, {"offload": (save,)}):
        ruled = rt.apply(build(Dropped), {"layers.*": rt.Remat(MASKS, **names)})
        assert find_recomputed_bits(ruled, x) == []
    only = rt.apply(build(Dropped), {"layers.*": rt.Remat(save=(save,))})
    assert bool(find_recomputed_bits(only, x)) is (save != "drop:lt")  # control


def test_masks_are_kept_in_scanned_layers_and_under_vmap() -> None:
    x = inputs()
    for policy, drawn in ((f"nothing_saveable | {MASKS}", False), ("nothing_saveable", True)):
        ruled = rt.apply(Stacked(nnx.Rngs(0)), {"layers": policy})
        assert bool(find_recomputed_bits(ruled, x)) is drawn
    assert_same_values(
        gradients(loss, rt.apply(Stacked(nnx.Rngs(0)), {"layers": MASKS}), x),
        gradients(loss, Stacked(nnx.Rngs(0)), x),
    )

    def loss_of_rows(key: Any, x: Any) -> Any:
        @functools.partial(rt.remat, policy=policy)
        def drop(key: Any, x: Any) -> Any:
            return jnp.where(jax.random.bernoulli(key, 0.5, x.shape), jnp.sin(x), 0)

        return jax.vmap(drop)(jax.random.split(key, len(x)), x).sum()

    for policy in (MASKS, "nothing_saveable"):
        program = jax.make_jaxpr(jax.grad(loss_of_rows, argnums=1))(jax.random.key(0), x)
        regions = [e for e in program.eqns if jaxprs.is_region(e)]
        drawn = any(True for region in regions for _ in random_bits.find_random_bits(region.params["jaxpr"]))
        assert drawn is (policy != MASKS)


@pytest.mark.parametrize("group", [1, 2])
def test_masks_are_kept_in_groups(group: int) -> None:
    x = inputs()
    ruled = rt.apply(build(Dropped), {"layers.*": rt.Remat(MASKS, group=group)})
    assert find_recomputed_bits(ruled, x) == []
    assert find_recomputed_bits(rt.apply(build(Dropped), {"layers.*": rt.Remat(group=group)}), x)  # control


@pytest.mark.parametrize("policy", ["nothing_saveable", "dots_saveable"])
def test_without_random_numbers_the_program_is_that_of_the_other_policy(policy: str) -> None:
    x = inputs()

    def lower(policy: str) -> str:
        graphdef, state = nnx.split(rt.apply(build(Dry), {"layers.*": policy}))
        return jax.jit(jax.grad(lambda s: loss(nnx.merge(graphdef, s, copy=True), x))).lower(state).as_text()

    assert lower(f"{policy} | {MASKS}") == lower(policy)


def _make_stacked() -> nnx.Module:
    return Stacked(nnx.Rngs(0))


def _make_list() -> nnx.Module:
    return build(Dropped)


@pytest.mark.parametrize(
    ("make", "pattern", "group"),
    [(_make_list, "layers.*", 1), (_make_list, "layers.*", 2), (_make_stacked, "layers", 1)],
)
def test_masks_are_kept_under_the_new_remat(make: Any, pattern: str, group: int) -> None:
    x = inputs()

    def count_draws(policy: str) -> int:
        rules = {pattern: rt.Remat(policy, group=group)}
        graphdef, params, rest = nnx.split(rt.apply(make(), rules), nnx.Param, ...)
        gradient = jax.grad(lambda params: loss(nnx.merge(graphdef, params, rest, copy=True), x))
        return jax.jit(gradient).lower(params).compile().as_text().count("threefry")

    before = jax.config.jax_remat3
    jax.config.update("jax_remat3", True)
    try:
        least = count_draws("everything_saveable")
        assert [count_draws(policy) for policy in (MASKS, f"dots_saveable | {MASKS}")] == [least, least]
        assert count_draws("dots_saveable") > least  # control
    finally:
        jax.config.update("jax_remat3", before)


def test_a_rule_file_holds_the_policy() -> None:
    rules = rt.Rules({"layers.*": f"dots_saveable | {MASKS}", "head": MASKS})
    assert rt.Rules.from_toml(rules.to_toml()) == rules
    assert 'policy = "dots_saveable | dropout_masks_saveable"' in rules.to_toml()
