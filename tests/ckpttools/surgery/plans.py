# SPDX-License-Identifier: Apache-2.0
"""States made of names, and plans for them: helpers of the surgery tests."""

import types

import jax
import jax.numpy as jnp

import ckpttools as ct
from ckpttools.surgery import make_plan
from ckpttools.surgery.plan import Changes
from ckpttools.tree import flatten
from ckpttools.tree.leaves import describe


def stored(state):
    items = {}
    for item, value in state.items():
        flat = flatten.flatten_item(value)
        records = tuple(describe(item, leaf) for leaf in flat.leaves)
        items[item] = types.SimpleNamespace(records=records, skeletons=flat.skeletons)
    return items


def plan(disk, state, operations=(), **options):
    templates = {item: flatten.flatten_item(value, template=True) for item, value in state.items()}
    return make_plan.make_restore_plan(stored(disk), templates, Changes(surgery=ct.Surgery(operations), **options))


def sources(made):
    names = {leaf.path: leaf.source and ".".join(leaf.source.stored_path) for leaf in made.placed_leaves}
    return {".".join(path): name for path, name in names.items()}


def leaf(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def nested(*paths, form=None):
    tree_of: dict = {}
    for path in paths:
        *parents, last = path.split(".")
        at = tree_of
        for name in parents:
            at = at.setdefault(name, {})
        at[last] = form or leaf(2)
    return tree_of
