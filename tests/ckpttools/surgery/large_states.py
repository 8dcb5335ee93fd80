# SPDX-License-Identifier: Apache-2.0
"""States of many leaves, to show that finding a suggestion takes time in proportion to them."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import ckpttools as ct
from ckpttools.spec.operations import Operation
from ckpttools.surgery.make_plan import make_restore_plan
from ckpttools.surgery.plan import Changes, RestorePlan
from ckpttools.surgery.suggest import find_suggestion
from ckpttools.tree import flatten
from tests.ckpttools.surgery.plans import stored

type Make = Callable[[int], dict[str, Any]]


def _leaf(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _make_block() -> dict[str, Any]:
    linear = {"kernel": _leaf(8, 8), "bias": _leaf(8)}
    return {"attn": {name: dict(linear) for name in "qkvo"}, "norm": {"scale": _leaf(8)}, "step": _leaf()}


def _make_layers(count: int) -> dict[str, Any]:
    return {str(n): _make_block() for n in range(max(1, count // 30))}


def _make_adam(layers: Any, prefix: Sequence[str]) -> dict[str, Any]:
    state: Any = {"mu": layers, "nu": layers, "count": _leaf(dtype=jnp.int32)}
    for name in reversed(prefix):
        state = {name: state}
    return {"opt_state": state}


def _make_run(prefix: Sequence[str], key: str = "layers") -> Make:
    def make(count: int) -> dict[str, Any]:
        layers = {key: _make_layers(count)}
        return {"model": layers, "optimizer": _make_adam(layers, prefix)}

    return make


def _make_scan(count: int) -> dict[str, Any]:
    depth = max(1, count // 30)
    layers = {"layers": jax.tree.map(lambda each: _leaf(depth, *each.shape), _make_block())}
    return {"model": layers, "optimizer": _make_adam(layers, ["0"])}


def _make_distinct(prefix: str) -> Make:
    """Return a maker of leaves of which no two have a kind in common."""

    def make(count: int) -> dict[str, Any]:
        names = ["".join(chr(97 + int(digit)) for digit in str(n)) for n in range(count)]
        return {"model": {f"{prefix}{name}": {"kernel": _leaf(4)} for name in names}}

    return make


def list_large_states() -> list[tuple[str, Make, Make]]:
    """Return changes by name, each with makers of the old and the new state for a number of leaves."""
    plain = _make_run(["0"])
    return [
        ("clipping added", plain, _make_run(["1", "0"])),
        ("layers renamed", plain, _make_run(["0"], "blocks")),
        ("scan on", plain, _make_scan),
        ("scan off", _make_scan, plain),
        ("nothing alike, no two names of one kind", _make_distinct("x"), _make_distinct("y")),
    ]


def time_suggestion(old: dict[str, Any], new: dict[str, Any]) -> tuple[float, int, int]:
    """Return the processor seconds to find a suggestion, the number of leaves, and that of operations."""
    templates = {item: flatten.flatten_item(value, template=True) for item, value in new.items()}
    records = stored(old)

    def replan(operations: Sequence[Operation]) -> RestorePlan:
        return make_restore_plan(records, templates, Changes(surgery=ct.Surgery(operations)))

    plan = replan(())  # Without surgery it is needed, too.
    began = time.process_time()
    suggestion = find_suggestion(plan, replan)
    seconds = time.process_time() - began
    count = max(len(plan.state_records), len(plan.sources))
    return seconds, count, len(suggestion.operations)
