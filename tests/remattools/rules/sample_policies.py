# SPDX-License-Identifier: Apache-2.0
"""One policy of each kind, random combinations of them, and a function whose operations they decide about."""

import jax
import jax.numpy as jnp
from hypothesis import strategies as st
from jax.ad_checkpoint import checkpoint_name

from remattools.rules import policies
from remattools.rules.policy_types import Decision, Policy


def function(x: jax.Array) -> jax.Array:
    """Named and unnamed values, and matrix products with and without batch dimensions."""
    y = checkpoint_name(jnp.sin(x @ x), "first")
    z = checkpoint_name(jnp.cos(y @ y), "second")
    return jnp.tanh(jnp.einsum("bij,bjk->bik", z[None], z[None])).sum()


EQUATIONS = jax.make_jaxpr(function)(jnp.ones((3, 3))).eqns

LEAVES = [
    policies.everything_saveable,
    policies.nothing_saveable,
    policies.dots_saveable,
    policies.dots_with_no_batch_dims_saveable,
    policies.dropout_masks_saveable,
    policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
    policies.save_only_these_names("first"),
    policies.save_any_names_but_these("first"),
    policies.save_anything_except_these_names("second"),
    policies.save_and_offload_only_these_names(
        names_which_can_be_saved=["first"], names_which_can_be_offloaded=["second"]
    ),
]
trees = st.recursive(
    st.sampled_from(LEAVES),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda p: p[0] | p[1]),
        st.tuples(inner, inner).map(lambda p: p[0] & p[1]),
        inner.map(lambda p: ~p),
    ),
    max_leaves=5,
)


def decide_all(policy: Policy) -> list[Decision]:
    """Return the decision of `policy` on each operation of `function`."""
    return [policy.decide(e.primitive, *(v.aval for v in e.invars), **e.params) for e in EQUATIONS]
