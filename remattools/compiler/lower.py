# SPDX-License-Identifier: Apache-2.0
"""Lower a call for a target: the program that a compiler takes, and its key in the cache."""

import dataclasses
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax

from .. import compat
from ..jaxpr import jaxprs
from ..tracing import pure_call
from ..tracing.module_scopes import add_module_scopes
from ..tracing.origins import check_no_gradient, select_loss_or_floats, trace_with_paths
from ..transform.capture.rebuild import rebuild
from .cache import compute_key
from .targets import Target


@dataclasses.dataclass(frozen=True)
class LoweredCall:
    """A lowered call.

    Attributes:
        lowered: The lowered stage of `jax.jit` or `nnx.jit`.
        make_inputs: Builds the compiled program's arguments from the call's leaves.
        add_scopes: Opens a block in which these arguments are what the program was traced with, module paths included.
    """

    lowered: Any
    make_inputs: Callable[[list[Any]], tuple[Any, ...]]
    add_scopes: Callable[[tuple[Any, ...]], AbstractContextManager[None]]


def compute_program_key(lowered: Any, target: Target, *, has_scopes: bool = True) -> str:
    """Return the key of a lowered program in the cache.

    Args:
        lowered: The lowered stage of `jax.jit` or `nnx.jit`.
        target: What it is compiled for.
        has_scopes: Whether it was traced with module paths: the program is the same, the report has other names.
    """
    options = (*compat.get_compiler_options(lowered), *(() if has_scopes else ("no scopes",)))
    return compute_key(lowered.as_text(), target.name, target.devices[0], options)


def lower(call: pure_call.Call, target: Target, *, differentiate: bool) -> LoweredCall:
    """Lower a call for a target; nothing is computed.

    Args:
        call: The staged call; its leaves may be abstract.
        target: What to lower for. Shardings of the leaves move to its devices.
        differentiate: Lower the gradient of the loss instead.

    Raises:
        MeasureError: With `differentiate`, if the function takes a gradient itself.
    """
    abstract = call.abstractify_leaves()
    leaves = [
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding, weak_type=leaf.weak_type)
        for leaf, sharding in zip(abstract, target.placements([leaf.sharding for leaf in abstract]), strict=True)
    ]

    def rebuild_inputs(leaves: list[Any]) -> tuple[Any, ...]:
        rebuilt: tuple[Any, ...] = rebuild(call.spec, leaves, [])[: call.arity]
        return rebuilt

    make_inputs: Callable[[list[Any]], tuple[Any, ...]] = rebuild_inputs
    if not differentiate and _is_jitted(call.fn):
        fn: Any = call.fn
    elif not differentiate and _is_plain(call):
        fn = jax.jit(call.fn)
    else:
        fn = jax.jit(pure_call.make_pure(call, differentiate=differentiate, with_scopes=True))
        make_inputs = lambda leaves: (leaves,)  # noqa: E731
    inputs = make_inputs(leaves)
    add_scopes = functools.partial(_add_scopes, call) if fn is call.fn else lambda _: nullcontext()
    with pure_call.explain_errors(call), add_scopes(inputs):
        traced = fn.trace(*inputs)
    if differentiate and _has_nested_gradient(traced.jaxpr):
        check_no_gradient(
            trace_with_paths(call, select_loss_or_floats),
            "differentiate=True takes the gradient of a loss; leave it out to measure a whole step (CLI: --as-is).",
        )
    lowered = traced.lower(lowering_platforms=(_get_lowering_platform(target),))
    return LoweredCall(lowered, make_inputs, add_scopes)


def _add_scopes(call: pure_call.Call, inputs: tuple[Any, ...]) -> AbstractContextManager[None]:
    """Put module paths into the trace of the user's jitted function; other functions are traced on rebuilt modules."""
    values = (*inputs, *call.values[call.arity :])
    return add_module_scopes([(path, values[position]) for path, position in call.roots])


def _has_nested_gradient(jaxpr: Any, outer_stack: str = "") -> bool:
    """Whether the differentiated program contains a backward pass; nested programs start a new name stack."""
    for equation in jaxprs.open_jaxpr(jaxpr).eqns:
        stack = f"{outer_stack}/{equation.source_info.name_stack}"
        if 0 <= stack.find("jvp(") < stack.find("transpose("):
            return True
        if any(_has_nested_gradient(inner, stack) for _, inner in jaxprs.find_subjaxprs(equation)):
            return True
    return False


def _get_lowering_platform(target: Target) -> str:
    # A live GPU's platform is called gpu, but lowering rules are registered by vendor.
    if target.platform != "gpu":
        return target.platform
    return "rocm" if "rocm" in str(target.devices[0].client.platform_version).lower() else "cuda"


def _is_jitted(fn: Any) -> bool:
    return callable(getattr(fn, "trace", None)) and callable(getattr(fn, "lower", None))


def _is_plain(call: pure_call.Call) -> bool:
    """Whether `jax.jit` takes the arguments as they are: arrays in plain containers only."""
    if len(call.values) != call.arity or call.roots:
        return False
    leaves = jax.tree.leaves(call.values)
    return len(leaves) == len(call.leaves) and all(a is b for a, b in zip(leaves, call.leaves, strict=True))
