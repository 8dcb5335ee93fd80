# SPDX-License-Identifier: Apache-2.0
"""Random module trees under random rules: loss, gradients and state stay exact."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import remattools as rt
from tests.remattools.exactness import assert_exact
from tests.remattools.models import loss

WIDTH = 4


@dataclasses.dataclass(frozen=True)
class Spec:
    """A module: what it does before and after its children, and how it holds and calls them."""

    before: tuple[str, ...]
    children: "tuple[Spec, ...]"
    holding: str
    shared: bool
    flag: bool


class Node(nnx.Module):
    """Built from a `Spec`; reads and writes a cache that is passed along, as decoders do."""

    def __init__(self, spec: Spec, rngs: nnx.Rngs) -> None:
        self.before, self.flag = spec.before, spec.flag
        self.config = {"scale": [0.5, 1.5], "names": list(spec.before)}
        if "linear" in spec.before:
            self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        if "norm" in spec.before:
            self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)
        if "dropout" in spec.before:
            self.dropout = nnx.Dropout(0.3, rngs=rngs)
        children = [Node(child, rngs) for child in spec.children]
        if spec.shared and children:
            children.append(children[0])
        self.names = tuple(f"part{i}" for i in range(len(children))) if spec.holding == "attributes" else ()
        self.parts = nnx.List([] if self.names else children)
        for name, child in zip(self.names, children, strict=False):
            setattr(self, name, child)

    def __call__(self, x: jax.Array, cache: dict[str, Any], training: bool = True) -> jax.Array:
        for step in self.before:
            x = self.apply(step, x, training)
        for part in [*self.parts, *(getattr(self, name) for name in self.names)]:
            x = x + part(x, cache, training=self.flag)
        cache["seen"] = cache.get("seen", 0) + x.mean()
        return x * self.config["scale"][self.flag]

    def apply(self, step: str, x: jax.Array, training: bool) -> jax.Array:
        if step in ("linear", "norm"):
            return getattr(self, step)(x)
        if step == "dropout":
            return self.dropout(x, deterministic=not training)
        return {"sin": jnp.sin, "softmax": jax.nn.softmax, "relu": jax.nn.relu}[step](x)


class Root(nnx.Module):
    def __init__(self, spec: Spec) -> None:
        self.body = Node(spec, nnx.Rngs(0))

    def __call__(self, x: jax.Array) -> Any:
        cache: dict[str, Any] = {}
        return self.body(x, cache), cache["seen"]


steps = st.lists(st.sampled_from(["linear", "norm", "dropout", "sin", "softmax", "relu"]), min_size=1, max_size=3)


def specs(depth: int) -> st.SearchStrategy[Spec]:
    children = st.just(()) if depth == 0 else st.lists(specs(depth - 1), max_size=3).map(tuple)
    return st.builds(
        Spec,
        before=steps.map(lambda found: tuple(dict.fromkeys(found))),
        children=children,
        holding=st.sampled_from(["list", "attributes"]),
        shared=st.booleans(),
        flag=st.booleans(),
    )


patterns = st.sampled_from(
    [".", "body", "**.parts.*", "body.parts.[::2]", "part*", "linear", "**:Node", "norm", "body.part0.**", "dropout"]
)
acts = st.one_of(
    st.just(False),
    st.sampled_from(["nothing_saveable", "dots_saveable", "everything_saveable", "~dots_saveable"]),
    st.builds(lambda policy: rt.Remat(policy=policy), st.sampled_from(["nothing_saveable", "dots_saveable"])),
    st.builds(lambda name: rt.Remat(save=(name,)), st.sampled_from([".:mul", "**:mul"])),
    st.builds(lambda group: rt.Remat(group=group), st.sampled_from([2, "sqrt"])),
)
pairs = st.lists(st.tuples(patterns, acts), min_size=1, max_size=3)


def check(spec: Spec, rules: list[tuple[str, Any]]) -> None:
    x = jax.random.normal(jax.random.key(3), (3, WIDTH))
    ruled = Root(spec)
    fitting: list[tuple[str, Any]] = []
    for rule in rules:
        if _fits(spec, [*fitting, rule]):
            fitting.append(rule)
    if fitting:
        rt.apply(ruled, rt.Rules(fitting))
    assert_exact(loss, Root(spec), ruled, x)


def _fits(spec: Spec, rules: list[tuple[str, Any]]) -> bool:
    """Whether all rules say something about this tree; rules that say nothing have tests of their own.

    Together, because a region inside another takes names away from it.
    """
    try:
        graphdef, state = nnx.split(rt.apply(Root(spec), rt.Rules(rules)))
        # Names and groups are only resolved when a region is traced.
        jax.make_jaxpr(lambda s, x: loss(nnx.merge(graphdef, s, copy=True), x))(state, jnp.ones((3, WIDTH)))
    except rt.RuleError:
        return False
    return True


SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]


@settings(max_examples=5, deadline=None, suppress_health_check=SLOW, derandomize=True)
@given(specs(2), pairs)
def test_random_trees_and_rules(spec, rules):
    check(spec, rules)


@pytest.mark.long
@settings(max_examples=200, deadline=None, suppress_health_check=SLOW)
@given(specs(2), pairs)
def test_two_hundred_random_trees_and_rules(spec, rules):
    check(spec, rules)
