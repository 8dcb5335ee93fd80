# SPDX-License-Identifier: Apache-2.0
"""`explain`: what rules do to a model, module by module, and what can be named in a call of it.

Sits on `transform.explain` (the table) and `tracing` (the call). Without a call the modules alone are looked at; with
one, such as a loss and its arguments, the call is traced once, but not run.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from ..errors import MeasureError, RuleError
from ..rules.ruleset import Rules
from ..tracing import call_errors, pure_call
from ..tracing.origins import check_no_gradient, has_gradient, select_loss_or_floats, trace_with_paths
from ..transform import functions, region
from ..transform.capture import effects
from ..transform.capture.walk import capture
from ..transform.derive import get_base_class
from ..transform.explain import Explanation, explain_model
from ..transform.tiling import evaluate
from ..transform.tiling.report import TiledStretch, UncutValue, describe_programs
from .ruled_call import find_model, use_rules


def explain(
    model: Any,
    *positional: Any,
    rules: Any = None,
    names: bool = False,
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> Explanation:
    """Explain what `rules` would do to a model, or which actions are in force on it.

    Two forms: `explain(model, rules)` looks at the modules, and with `args` or `kwargs` also at a call of the model;
    `explain(loss, model, batch, rules=rules)` looks at a call of a loss, of a method, or of any other function.

    Args:
        model: An nnx module, or a pytree of modules; or a function that is passed one or closes over one, such as a
            loss, `Model.method` or `model.method`. Concrete or abstract.
        *positional: After a model, its rules. After a function, its positional arguments.
        rules: `Rules`, a mapping of patterns to actions, or the path of a rule file; None for the actions that are in
            force.
        names: List the values that `save` and `offload` can name in each region, with index, shape, dtype and bytes;
            needs a call.
        args: Positional arguments of the call, arrays or `jax.ShapeDtypeStruct`. With a call the model is traced once,
            which finds side effects and random operations inside regions.
        kwargs: Keyword arguments of the call.

    Returns:
        An `Explanation`: `str()` is a table, `.rows` is data.

    Raises:
        UnmatchedRuleError: If a rule matches no module that can be called.
        RuleError: If `model` holds no modules, or `names=True` without a call.
        MeasureError: If the call does not work, or no model is found in it.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> import remattools as rt
        >>> model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
        >>> print(rt.explain(model, {".": "dots_saveable"}))
        module  class   action         rule  shadowed  shared by
        .       Linear  dots_saveable  .               1
        >>> loss = lambda model, x: jnp.sum(model(x) ** 2)
        >>> x = jax.ShapeDtypeStruct((8, 2), jnp.float32)
        >>> explanation = rt.explain(loss, model, x, rules={".": "dots_saveable"}, names=True)
        >>> [value.label for value in explanation.rows[0].values]
        ['.:input', '.:dot_general', '.:reshape', '.:add']
    """
    is_function = call_errors.is_stage(model) or (callable(model) and not isinstance(model, nnx.Module))
    if not is_function or args is not None:
        rules = _take_rules(positional, rules)
    if is_function:
        call_args = positional if args is None else tuple(args)
        return _explain_call(_bind(model, kwargs), call_args, rules, names=names)
    if args is None and kwargs is None:
        if names:
            raise RuleError(
                what="explain(names=True) was called without args.",
                why="names belong to traced values, and a trace needs the shapes of the inputs.",
                fix="explain(model, rules, names=True, args=(jax.ShapeDtypeStruct((batch, seq), jnp.int32),)), or "
                "explain(loss, model, batch, rules=rules, names=True).",
            )
        return explain_model(model, rules)
    _check_model_call(model, tuple(args or ()), dict(kwargs or {}))
    return _explain_call(_bind(_call_model, kwargs), (model, *(args or ())), rules, names=names)


def _take_rules(positional: tuple[Any, ...], rules: Any) -> Any:
    """Return the rules of `explain(model, rules)`."""
    if len(positional) + (rules is not None) > 1:
        raise RuleError(
            what=f"explain was given {len(positional) + (rules is not None)} sets of rules.",
            why="after a model there is one argument by position, its rules.",
            fix="explain(model, rules, args=(x,)), or explain(loss, model, x, rules=rules) for a function.",
        )
    return positional[0] if positional else rules


def _call_model(model: Any, *args: Any, **kwargs: Any) -> Any:
    return model(*args, **kwargs)


def _bind(fn: Callable[..., Any], kwargs: Mapping[str, Any] | None) -> Callable[..., Any]:
    return functools.partial(fn, **kwargs) if kwargs else fn


def _explain_call(fn: Any, args: tuple[Any, ...], rules: Any, *, names: bool) -> Explanation:
    call = pure_call.stage(pure_call.unwrap_jit(fn), args)
    model = find_model(fn, args)
    explanation = explain_model(model, rules, program=trace_call(call), names=names)
    tiles, uncut = _explain_tiles(fn, args, model, rules, explanation)
    return dataclasses.replace(explanation, tiles=tiles, uncut=uncut)


def _explain_tiles(
    fn: Any, args: tuple[Any, ...], model: Any, rules: Any, explanation: Explanation
) -> tuple[tuple[TiledStretch, ...], tuple[UncutValue, ...]]:
    """Trace a call under its rules, and describe what is computed in pieces."""
    coerced = None if rules is None else Rules.coerce(rules)
    with use_rules(model, coerced, fn) as ruled_fn:
        is_tiled = functions.get_function_action(ruled_fn) is not None
        if not is_tiled and not any(row.action is not None and row.action.tile is not None for row in explanation.rows):
            return (), ()
        call = pure_call.stage(pure_call.unwrap_jit(ruled_fn), args)

        def run(leaves: list[Any]) -> list[Any]:
            return pure_call.evaluate(call, leaves, with_paths=True)[1]

        with effects.restore_objects(capture(call.values).objects), evaluate.record_tiles() as programs:
            jax.make_jaxpr(run)(call.abstractify_leaves())
        return describe_programs(programs)


def trace_call(call: pure_call.Call) -> Any:
    """Trace a call without regions, with module paths on its operations and marks on what its modules return.

    Args:
        call: From `pure_call.stage`. Its objects stay as they are.

    Returns:
        The closed jaxpr.

    Raises:
        MeasureError: If the function computes a gradient: the names of its regions belong to the loss.
    """

    def run_plain(leaves: list[Any]) -> list[Any]:
        return pure_call.evaluate(call, leaves, with_paths=True)[1]

    # A plain object without arrays is not copied: the trace changes the caller's.
    with effects.restore_objects(capture(call.values).objects), region.disable_regions():
        program = jax.make_jaxpr(run_plain)(call.abstractify_leaves())
        if has_gradient(program):
            check_no_gradient(
                trace_with_paths(call, select_loss_or_floats),
                "names are those of the forward pass that a region runs, and a train step holds both passes.",
            )
    return program


def _check_model_call(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise if a model cannot be called like this; the fix names the method or the keywords."""
    cls = get_base_class(type(model))
    if not callable(model):
        methods = _find_public_methods(cls)
        shown = f"{cls.__name__}.{methods[0]}" if methods else "loss"
        raise MeasureError(
            what=f"{cls.__name__} has no __call__.",
            why="explain(model, rules, args=...) calls the model itself"
            + (f"; it has the methods {', '.join(methods)}." if methods else "."),
            fix=f"explain({shown}, model, x, rules=rules, names=True): any method or loss, with its arguments.",
        )
    try:
        signature = inspect.signature(model)
    except (TypeError, ValueError):  # written in C
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        required = [
            parameter.name
            for parameter in signature.parameters.values()
            if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty
        ]
        keywords = ", ".join(f'"{name}": ...' for name in required)
        raise MeasureError(
            what=f"{cls.__name__}{signature} cannot be called with {len(args)} arguments by position"
            + (f" and the keywords {', '.join(kwargs)}" if kwargs else "")
            + f": {error}.",
            why="explain(model, rules, args=..., kwargs=...) calls the model with these.",
            fix=f"explain(model, rules, names=True, kwargs={{{keywords}}})."
            if required
            else "args=(...) and kwargs={...} as the model is called, or explain(loss, model, batch, rules=rules).",
        ) from error


def _find_public_methods(cls: type) -> list[str]:
    library = dir(nnx.Module)
    functions = [name for name, _ in inspect.getmembers(cls, inspect.isfunction)]
    return [name for name in functions if not name.startswith("_") and name not in library]
