# SPDX-License-Identifier: Apache-2.0
"""A user's call as a pure function of its arrays, ready to be traced or compiled.

Sits on `bound_arguments`, `closed_over`, `call_errors` and `transform.capture`. Arguments may be nnx objects, pytrees,
arrays, abstract arrays and static values; models that the function closes over are passed like arguments. What the call
changes in its objects is part of its results.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..errors import MeasureError
from ..rules.paths import Path, format_path
from ..transform import region
from ..transform.capture import effects
from ..transform.capture.rebuild import rebuild
from ..transform.capture.walk import Capture, capture, get_node_content
from ..transform.naming import scopes
from . import bound_arguments, call_errors, closed_over
from .module_scopes import add_module_scopes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaf:
    """One array of a call.

    Attributes:
        path: Attribute names from the root of its model, or the argument's name and keys.
        position: Index in `Call.values` of the value that holds it.
        parameter: Whether it is the value of an `nnx.Param`.
    """

    path: Path
    position: int
    parameter: bool

    @property
    def label(self) -> str:
        """The path as a string."""
        return format_path(self.path)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """A function and its arguments, split into arrays and structure.

    Attributes:
        fn: The function, as given; of a partial that binds arrays, one that takes them as its last argument.
        values: The arguments, followed by the models that the function closes over.
        arity: Number of arguments, the dict of bound arrays included.
        spec: How to rebuild `values` from `leaves`.
        leaves: Arrays of `values` in order, concrete or abstract.
        leaf_infos: One for each leaf.
        roots: Where module paths start: a path and an index in `values`.
    """

    fn: Callable[..., Any]
    values: tuple[Any, ...]
    arity: int
    spec: Any
    leaves: list[Any]
    leaf_infos: tuple[Leaf, ...]
    roots: tuple[tuple[Path, int], ...]

    @property
    def models(self) -> list[Any]:
        """The models among the values: arguments first, then those closed over."""
        return [self.values[position] for _, position in self.roots]

    @property
    def differentiable_indices(self) -> tuple[int, ...]:
        """Indices of the leaves to differentiate: the first model's parameters, or else the first argument's floats."""
        first = self.roots[0][1] if self.roots else 0
        inside = [i for i, info in enumerate(self.leaf_infos) if info.position == first and is_float(self.leaves[i])]
        parameters = [i for i in inside if self.leaf_infos[i].parameter]
        return tuple(parameters or inside)

    def abstractify_leaves(self) -> list[Any]:
        """Return the shape, dtype and sharding of each leaf."""
        return [abstractify(leaf) for leaf in self.leaves]


def stage(fn: Any, args: Sequence[Any]) -> Call:
    """Split the call `fn(*args)` into arrays and structure, without changing any of its objects.

    Raises:
        MeasureError: If `fn` cannot be called with `args`.
    """
    if not callable(fn) and not call_errors.is_stage(fn):  # `check_call` says more of a program that is fixed already
        raise MeasureError(
            what=f"{fn!r} is not a function.",
            why="the program of a function call is measured; there is none without a function.",
            fix="pass the function first, then its arguments: measure(loss, model, batch).",
        )
    call_errors.check_call(fn, args)
    names = call_errors.get_argument_names(fn, len(args))
    fn, bound = bound_arguments.lift_bound_arrays(fn)
    if bound:
        args, names = (*args, bound), [*names, "bound"]
    models = closed_over.find_captured_models(fn)
    passed = tuple(_convert_numpy(value) for value in args)
    values = (*passed, *(value for _, value in models))
    captured = capture(values)
    names = [*names, *(name for name, _ in models)]
    holders = [i for i, value in enumerate(values) if _has_modules(value)]
    prefixes: list[Path] = [(name,) for name in names]
    if holders:
        prefixes[holders[0]] = ()
    return Call(
        fn=fn,
        values=values,
        arity=len(args),
        spec=captured.spec,
        leaves=captured.leaves,
        leaf_infos=_locate_leaves(captured, prefixes),
        roots=tuple((prefixes[i], i) for i in holders),
    )


def unwrap_jit(fn: Any) -> Any:
    """Return the Python function of a jitted one, so that JAX traces it again instead of using its cache."""
    return getattr(fn, "__wrapped__", fn) if callable(getattr(fn, "lower", None)) else fn


def make_pure(call: Call, *, differentiate: bool = False, with_scopes: bool = False) -> Callable[[list[Any]], Any]:
    """Return a function of the call's leaves that computes what the call computes.

    Args:
        call: From `stage`.
        differentiate: Replace the result, or the first of a tuple, by its gradients.
        with_scopes: Put module paths into the scopes of the operations, which changes no operation.
    """
    indices = call.differentiable_indices

    def run_plain(leaves: list[Any]) -> Any:
        return evaluate(call, leaves, with_scopes=with_scopes)[1]

    def compute_gradients(leaves: list[Any]) -> Any:
        def compute_loss(chosen: list[Any]) -> Any:
            return split_loss(evaluate(call, replace_leaves(leaves, indices, chosen), with_scopes=with_scopes))

        return jax.grad(compute_loss, has_aux=True)([leaves[i] for i in indices])

    return compute_gradients if differentiate else run_plain


def evaluate(
    call: Call, leaves: list[Any], *, with_paths: bool = False, with_scopes: bool = False
) -> tuple[Any, list[Any]]:
    """Run the call on other leaves.

    Args:
        call: From `stage`.
        leaves: Arrays to use instead of the call's own, in the same order.
        with_paths: Put module paths on the operations, also inside regions, and mark what modules return.
        with_scopes: Put module paths on the operations and mark nothing.

    Returns:
        What the function returned, and every array that it returned or changed.
    """
    objects: list[Any] = []
    rebuilt = rebuild(call.spec, leaves, objects)
    before = effects.snapshot(objects)
    replacements = {id(old): new for old, new in zip(call.values[call.arity :], rebuilt[call.arity :], strict=True)}
    fn = closed_over.replace_models(call.fn, replacements)
    roots = [(path, rebuilt[position]) for path, position in call.roots]
    with contextlib.ExitStack() as stack:
        if with_paths:
            stack.enter_context(region.record_region_paths())
            stack.enter_context(scopes.record_paths(roots))
        elif with_scopes:
            stack.enter_context(add_module_scopes(roots))
        stack.enter_context(explain_errors(call))
        out = fn(*rebuilt[: call.arity])
    return out, effects.collect_effects(objects, before, out)[0]


def explain_errors(call: Call) -> contextlib.AbstractContextManager[None]:
    """Add the call and its arguments to what the user's function raises inside the block.

    Raises:
        MeasureError: If the error comes from a model that is not where the function expects it.
    """
    positions = [position for _, position in call.roots if position < call.arity]
    return call_errors.explain_errors(call.fn, call.values[: call.arity], positions[0] if positions else None)


def replace_leaves(leaves: Sequence[Any], indices: Sequence[int], new_leaves: Sequence[Any]) -> list[Any]:
    """Return `leaves` with those at `indices` replaced."""
    new = list(leaves)
    for index, value in zip(indices, new_leaves, strict=True):
        new[index] = value
    return new


def split_loss(result: tuple[Any, list[Any]]) -> tuple[Any, list[Any]]:
    """Split a result into the scalar to differentiate and the other arrays.

    Raises:
        MeasureError: If the result, or the first of a tuple, is not a floating-point scalar.
    """
    out, leaves = result
    loss = out[0] if isinstance(out, tuple) and out else out
    shape, dtype = getattr(loss, "shape", None), getattr(loss, "dtype", None)
    if shape != () or dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        shown = f"{dtype}{list(shape)}" if shape is not None else repr(type(loss).__name__)
        raise MeasureError(
            what=f"the function returns {shown}, which has no gradient.",
            why="differentiate=True takes the gradient of a scalar loss: the result, or the first of a tuple.",
            fix="return a loss such as jnp.mean(model(x) ** 2), or pass a function that computes the gradient itself.",
        )
    return loss, [leaf for leaf in leaves if leaf is not loss]


def check_differentiable(call: Call) -> None:
    """Raise unless the call has a leaf to differentiate.

    Raises:
        MeasureError: If neither the first model nor the first argument holds floating-point arrays.
    """
    if not call.differentiable_indices:
        raise MeasureError(
            what="no argument of the function can be differentiated.",
            why="the gradient is taken with respect to the first model's parameters, or the first argument's floats.",
            fix="pass the model, or the array of parameters, as the first argument.",
        )


def abstractify(leaf: Any) -> Any:
    """Return the shape, dtype, weak type and, if there is one, sharding of an array."""
    sharding = getattr(leaf, "sharding", None)
    settled = isinstance(leaf, jax.ShapeDtypeStruct) or jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
    dtype = leaf.dtype if settled else jax.dtypes.canonicalize_dtype(leaf.dtype)
    return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding, weak_type=getattr(leaf, "weak_type", False))


def is_float(leaf: Any) -> bool:
    """Whether an array can be differentiated."""
    return bool(jnp.issubdtype(leaf.dtype, jnp.inexact))


def collect_arrays(value: Any) -> list[Any]:
    """Return all arrays in a result."""
    return capture(value).leaves


def _convert_numpy(value: Any) -> Any:
    """Convert numpy arrays, which are data here rather than constants, to JAX arrays."""
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        return jnp.asarray(value)
    if type(value) in (tuple, list):
        return type(value)(_convert_numpy(item) for item in value)
    if type(value) is dict:
        return {key: _convert_numpy(item) for key, item in value.items()}
    return value


def _has_modules(value: Any) -> bool:
    if isinstance(value, nnx.Module):
        return True
    if isinstance(value, tuple | list):
        return any(map(_has_modules, value))
    return isinstance(value, dict) and any(map(_has_modules, value.values()))


def _locate_leaves(captured: Capture, prefixes: Sequence[Path]) -> tuple[Leaf, ...]:
    """Describe each leaf, found in a rebuilt copy by the identity of a stand-in."""
    marks = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in captured.leaves]
    indices = {id(mark): index for index, mark in enumerate(marks)}
    infos: list[Leaf] = [Leaf(path=("?",), position=-1, parameter=False)] * len(marks)
    seen: set[int] = set()

    def visit(value: Any, path: Path, position: int, parameter: bool) -> None:
        index = indices.get(id(value))
        if index is not None:
            infos[index] = Leaf(path=path, position=position, parameter=parameter)
            return
        if id(value) in seen:
            return
        seen.add(id(value))
        for key, child in _get_children(value):
            visit(child, path if key is None else (*path, key), position, parameter or isinstance(value, nnx.Param))

    for position, value in enumerate(rebuild(captured.spec, marks, [])):
        visit(value, prefixes[position], position, False)
    return tuple(infos)


def _get_children(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, nnx.Variable):
        return [(None, value.get_raw_value())]
    if isinstance(value, nnx.Pytree):
        return [(key, child) for key, child in get_node_content(value).items() if not _is_private(key)]
    if isinstance(value, dict):
        return list(value.items())
    if isinstance(value, tuple | list):
        return list(enumerate(value))
    if isinstance(value, str | int | float | type(None) | jax.ShapeDtypeStruct):
        return []
    paths, _ = jax.tree_util.tree_flatten_with_path(value, is_leaf=lambda item: item is not value)
    return [(_unwrap_key(path), child) for path, child in paths if child is not value]


def _is_private(key: Any) -> bool:
    return isinstance(key, str) and key.startswith("_pytree__")


def _unwrap_key(path: Any) -> Any:
    entry = path[0]
    for field in ("key", "name", "idx"):
        if hasattr(entry, field):
            return getattr(entry, field)
    return str(entry)
