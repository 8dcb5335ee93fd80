# SPDX-License-Identifier: Apache-2.0
"""A call as a pure function of its arrays, which a compiler can be given.

Sits on `closures` and `transform.capture`. Arguments may be nnx objects, pytrees,
arrays, abstract arrays and statics; models that the function closes over are passed
like arguments. What the call changes in its objects is part of its results.
"""

import contextlib
import dataclasses
import inspect
import reprlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..errors import MeasureError, RematError
from ..rules.paths import Path, format_path
from ..transform import region
from ..transform.capture import effects
from ..transform.capture import walk as cap
from ..transform.naming import scopes
from . import closed_over


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaf:
    """One array of a call.

    Attributes:
        path: Where it lies: attributes from the root of its model, or the argument's name and keys.
        position: Which argument holds it.
        parameter: Whether it is the value of an `nnx.Param`.
    """

    path: Path
    position: int
    parameter: bool

    @property
    def label(self) -> str:
        """The path as text."""
        return format_path(self.path)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """A function and its arguments, taken apart.

    Attributes:
        fn: The function, as given.
        values: All arguments, followed by the models that the function closes over.
        arity: How many of `values` are arguments.
        spec: How to rebuild `values`.
        leaves: Their arrays, in order; abstract or real.
        leaf_infos: What each leaf is.
        roots: Module paths start here: a path and a position in `values`.
        differentiable_indices: Indices of the leaves that a gradient is taken of.
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
        """The models among the values, passed ones first."""
        return [self.values[position] for _, position in self.roots]

    @property
    def differentiable_indices(self) -> tuple[int, ...]:
        """Parameters of the first model; without one, the floats of the first argument."""
        first = self.roots[0][1] if self.roots else 0
        inside = [i for i, info in enumerate(self.leaf_infos) if info.position == first and is_float(self.leaves[i])]
        parameters = [i for i in inside if self.leaf_infos[i].parameter]
        return tuple(parameters or inside)

    def abstractify_leaves(self) -> list[Any]:
        """Shape, dtype and sharding of each leaf."""
        return [abstractify(leaf) for leaf in self.leaves]


def stage(fn: Any, args: Sequence[Any]) -> Call:
    """Take a call apart; the caller's objects are only looked at.

    Raises:
        MeasureError: If `fn` cannot be called.
    """
    if not callable(fn):
        raise MeasureError(
            what=f"{fn!r} is no function.",
            why="what is measured is the program that a call computes.",
            fix="measure(loss, model, batch): the function first, then its arguments.",
        )
    _check_call(fn, args)
    models = closed_over.find_captured_models(fn)
    passed = tuple(_convert_numpy(value) for value in args)
    values = (*passed, *(value for _, value in models))
    captured = cap.capture(values)
    names = [*_get_argument_names(fn, len(args)), *(name for name, _ in models)]
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
    """The Python function behind a jitted one: to be traced afresh, past JAX's cache of traces."""
    return getattr(fn, "__wrapped__", fn) if callable(getattr(fn, "lower", None)) else fn


def make_pure(call: Call, *, differentiate: bool = False) -> Callable[[list[Any]], Any]:
    """A function of the call's leaves that computes what the call computes.

    Args:
        call: From `stage`.
        differentiate: Compute the gradients of the (first) result instead, and the rest as it is.
    """
    indices = call.differentiable_indices

    def run_plain(leaves: list[Any]) -> Any:
        return evaluate(call, leaves)[1]

    def compute_gradients(leaves: list[Any]) -> Any:
        def compute_loss(chosen: list[Any]) -> Any:
            return split_loss(evaluate(call, replace_leaves(leaves, indices, chosen)))

        return jax.grad(compute_loss, has_aux=True)([leaves[i] for i in indices])

    return compute_gradients if differentiate else run_plain


def evaluate(call: Call, leaves: list[Any], *, with_paths: bool = False) -> tuple[Any, list[Any]]:
    """Run the call on other leaves: what it returned, and all arrays that it returned or changed.

    Args:
        call: From `stage`.
        leaves: In the place of the call's own.
        with_paths: Put module paths on the operations, inside regions too.
    """
    objects: list[Any] = []
    rebuilt = cap.rebuild(call.spec, leaves, objects)
    before = effects.snapshot(objects)
    replacements = {id(old): new for old, new in zip(call.values[call.arity :], rebuilt[call.arity :], strict=True)}
    fn = closed_over.replace_models(call.fn, replacements)
    with contextlib.ExitStack() as stack:
        if with_paths:
            stack.enter_context(region.record_region_paths())
            stack.enter_context(scopes.record_paths((path, rebuilt[position]) for path, position in call.roots))
        stack.enter_context(explain_errors(call))
        out = fn(*rebuilt[: call.arity])
    return out, effects.collect_effects(objects, before, out)[0]


@contextlib.contextmanager
def explain_errors(call: Call) -> Iterator[None]:
    """What the user's function raises says with what it was called.

    Raises:
        MeasureError: If a model is not the first argument, and is missed where it was expected.
    """
    try:
        yield
    except RematError:
        raise
    except Exception as error:
        args = call.values[: call.arity]
        shown = f"{_get_name(call.fn)}({_format_arguments(call.fn, args)})"
        misplaced = _find_misplaced_function(call.fn, args)
        if misplaced is not None:
            raise misplaced from error
        if _is_swapped(call, error):
            raise MeasureError(
                what=f"{shown} raised {type(error).__name__}: {error}",
                why="an array stands where the function expects the model.",
                fix=f"give the arguments in the function's own order: {_get_name(call.fn)}{_get_signature(call.fn) or ''}.",
            ) from error
        note = f"remattools traced the call {shown}."
        if note not in getattr(error, "__notes__", ()):
            error.add_note(note)
        raise


def _is_swapped(call: Call, error: Exception) -> bool:
    passed = [position for _, position in call.roots if position < call.arity]
    if not passed or passed[0] == 0:
        return False
    missed = isinstance(error, AttributeError) or (isinstance(error, TypeError) and "not callable" in str(error))
    return missed and ("Tracer" in str(error) or "JitWrapped" in str(error))


def _find_misplaced_function(fn: Any, args: Sequence[Any]) -> MeasureError | None:
    """For a model that was given first, and the function after it."""
    functions = [value for value in args if inspect.isroutine(value) or hasattr(value, "__wrapped__")]
    if not isinstance(fn, nnx.Module) or not functions:
        return None
    return MeasureError(
        what=f"the model {type(fn).__name__} stands in the place of the function, {_get_name(functions[0])} after it.",
        why="what is looked at is the call of a function; the function comes first.",
        fix=f"({_get_name(functions[0])}, model, batch), in this order.",
    )


def _check_call(fn: Any, args: Sequence[Any]) -> None:
    """Refuse what the function's signature does not take, before anything is traced."""
    signature = _get_signature(fn)
    if signature is None:
        return
    try:
        signature.bind(*args)
    except TypeError as error:
        raise _find_misplaced_function(fn, args) or MeasureError(
            what=f"{_get_name(fn)}{signature} cannot be called with ({_format_arguments(fn, args)}): {error}.",
            why="the function is called with the arguments that follow it, in their order.",
            fix="give all of its arguments, each by itself; functools.partial(fn, key=value) sets those with a name.",
        ) from error


def _get_signature(fn: Any) -> inspect.Signature | None:
    try:
        return inspect.signature(fn)
    except (TypeError, ValueError):  # written in C
        return None


def _get_name(fn: Any) -> str:
    return str(getattr(fn, "__name__", type(fn).__name__))


def _format_arguments(fn: Any, values: Sequence[Any]) -> str:
    names = _get_argument_names(fn, len(values))
    return ", ".join(f"{name}={_format_value(value)}" for name, value in zip(names, values, strict=True))


def _format_value(value: Any) -> str:
    """A short text: the type and size of arrays, the class of other objects."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype}[{','.join(map(str, value.shape))}]"
    return reprlib.repr(value) if isinstance(value, str | int | float | type(None)) else type(value).__name__


def replace_leaves(leaves: Sequence[Any], indices: Sequence[int], new_leaves: Sequence[Any]) -> list[Any]:
    """The leaves with those at `indices` replaced."""
    new = list(leaves)
    for index, value in zip(indices, new_leaves, strict=True):
        new[index] = value
    return new


def split_loss(result: tuple[Any, list[Any]]) -> tuple[Any, list[Any]]:
    """Split a result into the scalar to differentiate and the other arrays.

    Raises:
        MeasureError: If there is no such scalar.
    """
    out, leaves = result
    loss = out[0] if isinstance(out, tuple) and out else out
    shape, dtype = getattr(loss, "shape", None), getattr(loss, "dtype", None)
    if shape != () or dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        shown = f"{dtype}{list(shape)}" if shape is not None else repr(type(loss).__name__)
        raise MeasureError(
            what=f"the function returns {shown}, which has no gradient.",
            why="differentiate=True takes the gradient of a scalar loss, the result or the first of a tuple.",
            fix="return the loss, such as jnp.mean(model(x) ** 2); or pass the gradient's function itself.",
        )
    return loss, [leaf for leaf in leaves if leaf is not loss]


def check_differentiable(call: Call) -> None:
    """Raise if there is nothing to differentiate with respect to.

    Raises:
        MeasureError: If no argument holds floating-point arrays.
    """
    if not call.differentiable_indices:
        raise MeasureError(
            what="no argument of the function can be differentiated.",
            why="a gradient is taken of the parameters of the first model, or of the floats of the first argument.",
            fix="pass the model, or the array of parameters, first.",
        )


def abstractify(leaf: Any) -> Any:
    """Shape, dtype and, if it has one, sharding."""
    sharding = getattr(leaf, "sharding", None)
    settled = isinstance(leaf, jax.ShapeDtypeStruct) or jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
    dtype = leaf.dtype if settled else jax.dtypes.canonicalize_dtype(leaf.dtype)
    return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding, weak_type=getattr(leaf, "weak_type", False))


def is_float(leaf: Any) -> bool:
    """Whether a gradient can be taken of it."""
    return bool(jnp.issubdtype(leaf.dtype, jnp.inexact))


def collect_arrays(value: Any) -> list[Any]:
    """All arrays in a result."""
    return cap.capture(value).leaves


def _convert_numpy(value: Any) -> Any:
    """numpy arrays are data here, not constants."""
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        return jnp.asarray(value)
    if type(value) in (tuple, list):
        return type(value)(_convert_numpy(item) for item in value)
    if type(value) is dict:
        return {key: _convert_numpy(item) for key, item in value.items()}
    return value


def _get_argument_names(fn: Any, count: int) -> list[str]:
    signature = _get_signature(fn)
    names = [
        parameter.name
        for parameter in (signature.parameters.values() if signature is not None else ())
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    return [names[i] if i < len(names) else f"arg{i}" for i in range(count)]


def _has_modules(value: Any) -> bool:
    if isinstance(value, nnx.Module):
        return True
    if isinstance(value, tuple | list):
        return any(map(_has_modules, value))
    return isinstance(value, dict) and any(map(_has_modules, value.values()))


def _locate_leaves(captured: cap.Capture, prefixes: Sequence[Path]) -> tuple[Leaf, ...]:
    """Where each leaf lies, seen on a rebuilt copy whose leaves are recognised by identity."""
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

    for position, value in enumerate(cap.rebuild(captured.spec, marks, [])):
        visit(value, prefixes[position], position, False)
    return tuple(infos)


def _get_children(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, nnx.Variable):
        return [(None, value.get_raw_value())]
    if isinstance(value, nnx.Pytree):
        return [(key, child) for key, child in cap.get_node_content(value).items() if not _is_private(key)]
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
