# SPDX-License-Identifier: Apache-2.0
"""Errors of a user's function: what it was called with, and arguments in the wrong order.

Lowest file of `tracing`. Most failures of `measure(fn, *args)` are a wrong order of the arguments; these are
recognised before the trace by the signature, or after it by the error.
"""

import contextlib
import inspect
import reprlib
from collections.abc import Iterator, Sequence
from typing import Any

from flax import nnx

from ..errors import MeasureError, RematError


@contextlib.contextmanager
def explain_errors(fn: Any, args: Sequence[Any], model_position: int | None) -> Iterator[None]:
    """Add the call and its arguments to what `fn` raises inside the block.

    Args:
        fn: The user's function.
        args: Its arguments.
        model_position: Index of the first argument with a model, or None.

    Raises:
        MeasureError: If the error comes from a model that is not where the function expects it.
    """
    try:
        yield
    except RematError:
        raise
    except Exception as error:
        call = f"{_get_name(fn)}({_format_arguments(fn, args)})"
        misplaced = _find_misplaced_function(fn, args)
        if misplaced is not None:
            raise misplaced from error
        if model_position and _is_array_used_as_model(error):
            raise MeasureError(
                what=f"{call} raised {type(error).__name__}: {error}",
                why="the function was passed an array where it expects the model.",
                fix=f"pass the arguments in the function's order: {_get_name(fn)}{_get_signature(fn) or ''}.",
            ) from error
        note = f"remattools traced the call {call}."
        if note not in getattr(error, "__notes__", ()):
            error.add_note(note)
        raise


def is_stage(fn: Any) -> bool:
    """Whether it is a traced, lowered or compiled program (`jax.jit(f).lower(x)`) instead of a function."""
    is_program = hasattr(fn, "in_avals") and (hasattr(fn, "compile") or hasattr(fn, "lower"))
    return not isinstance(fn, type) and (is_program or is_compiled(fn))


def is_compiled(stage: Any) -> bool:
    """Whether a stage is compiled already."""
    return callable(getattr(stage, "memory_analysis", None))


def check_call(fn: Any, args: Sequence[Any]) -> None:
    """Raise, before anything is traced, if `fn` is fixed already or its signature does not accept `args`."""
    if is_stage(fn):
        raise MeasureError(
            what=f"a {type(fn).__name__.lower()} program was passed instead of a function.",
            why="rules take effect and modules get their names while a function is traced; this program is fixed.",
            fix="pass the function itself, jitted or not, and its arguments; measure(program) measures it as it is.",
        )
    signature = _get_signature(fn)
    if signature is None:
        return
    try:
        signature.bind(*args)
    except TypeError as error:
        raise _find_misplaced_function(fn, args) or MeasureError(
            what=f"{_get_name(fn)}{signature} cannot be called with ({_format_arguments(fn, args)}): {error}.",
            why="the function is called with the positional arguments that follow it.",
            fix="pass every argument by position; set keyword arguments with functools.partial(fn, key=value).",
        ) from error


def _is_array_used_as_model(error: Exception) -> bool:
    missing = isinstance(error, AttributeError) or (isinstance(error, TypeError) and "not callable" in str(error))
    return missing and ("Tracer" in str(error) or "JitWrapped" in str(error))


def _find_misplaced_function(fn: Any, args: Sequence[Any]) -> MeasureError | None:
    """The error for a model that was passed before the function, or None."""
    functions = [value for value in args if inspect.isroutine(value) or hasattr(value, "__wrapped__")]
    if not isinstance(fn, nnx.Module) or not functions:
        return None
    name = _get_name(functions[0])
    return MeasureError(
        what=f"the model {type(fn).__name__} was passed as the function, and {name} as its argument.",
        why="the first argument is the function to call.",
        fix=f"({name}, model, batch), in this order.",
    )


def _get_signature(fn: Any) -> inspect.Signature | None:
    try:
        return inspect.signature(fn)
    except (TypeError, ValueError):  # written in C
        return None


def _get_name(fn: Any) -> str:
    return str(getattr(fn, "__name__", type(fn).__name__))


def _format_arguments(fn: Any, values: Sequence[Any]) -> str:
    names = get_argument_names(fn, len(values))
    return ", ".join(f"{name}={_format_value(value)}" for name, value in zip(names, values, strict=True))


def _format_value(value: Any) -> str:
    """Format dtype and shape of an array, a short constant, or the class of any other object."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype}[{','.join(map(str, value.shape))}]"
    return reprlib.repr(value) if isinstance(value, str | int | float | type(None)) else type(value).__name__


def get_argument_names(fn: Any, count: int) -> list[str]:
    """Return the names of the first `count` positional parameters of `fn`, `arg0` and so on where it has none."""
    signature = _get_signature(fn)
    names = [
        parameter.name
        for parameter in (signature.parameters.values() if signature is not None else ())
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    return [names[i] if i < len(names) else f"arg{i}" for i in range(count)]
