# SPDX-License-Identifier: Apache-2.0
"""Load the call that a command is about, from `module:factory` or `file.py:factory`.

The factory is a function without arguments that returns `(fn, args)`, such as a loss with
an abstract model and batch, or `(model, inputs)`.
"""

import dataclasses
import importlib
import importlib.util
import inspect
import os
import pathlib
import sys
import traceback
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax.numpy as jnp
from flax import nnx

from ..errors import MeasureError, suggest_names
from ..tracing import pure_call

_FACTORY_EXAMPLE = "def factory(): return loss, (nnx.eval_shape(build), jax.ShapeDtypeStruct((8, 512), jnp.int32))"


@dataclasses.dataclass(frozen=True)
class Subject:
    """The call that a command is about.

    Attributes:
        fn: The function. If the factory returned a model, the sum of the model's float outputs.
        args: Its arguments.
        inputs: Arguments of the model's `__call__` if the factory returned a model, else None.
    """

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    inputs: tuple[Any, ...] | None = None


def load_subject(spec: str, *, allow_model: bool = False) -> Subject:
    """Import the module, call the factory and return the call.

    Args:
        spec: `module:function` or `file.py:function`.
        allow_model: Accept a model without inputs, since the command does not call it.

    Raises:
        MeasureError: If the factory does not exist, raises, or returns something else.
    """
    module_name, _, name = spec.partition(":")
    if not module_name or not name:
        raise MeasureError(
            what=f"{spec!r} does not name a factory.",
            why="a command needs a module, and a function in it that builds the call.",
            fix="my_package.my_module:factory, or train.py:factory.",
        )
    module = _import(module_name)
    factory = getattr(module, name, None)
    if not callable(factory):
        functions = {key: value for key, value in vars(module).items() if inspect.isfunction(value)}
        names = [key for key, value in functions.items() if value.__module__ == module.__name__]
        raise MeasureError(
            what=f"{module_name} has no function {name!r}.",
            why="the factory builds the function and its arguments.",
            fix=suggest_names(name, names) or _FACTORY_EXAMPLE,
        )
    try:
        result = factory()
    except (Exception, SystemExit) as error:  # the exit code of SystemExit would look like an answer
        raise MeasureError(
            what=f"the factory {spec} raised {_describe_error(error)}",
            why="a command calls the factory first.",
            fix=f"run it alone: {_format_command(module_name, name)}",
        ) from error
    if allow_model and isinstance(result, nnx.Module):
        return Subject(_sum_outputs, (result,))
    return _make_subject(spec, result)


def _import(name: str) -> ModuleType:
    """Import a file, or a module by name, also from the working directory."""
    try:
        if name.endswith(".py"):
            return _import_file(pathlib.Path(name))
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise MeasureError(
            what=f"{name} cannot be imported: {_describe_error(error)}",
            why="it should contain the factory.",
            fix="run the command where `import` finds the module, with the packages that it needs installed.",
        ) from error


def _import_file(path: pathlib.Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    sys.path.insert(0, str(path.parent.resolve()))
    spec.loader.exec_module(module)
    return module


def _describe_error(error: BaseException) -> str:
    """Format type, message and location of an error."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<frozen")]
    location = (
        f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames and frames[-1].filename != __file__ else ""
    )
    return f"{type(error).__name__}: {error}{location}"


def _format_command(module: str, name: str) -> str:
    if module.endswith(".py"):
        return f"python -c \"import runpy; runpy.run_path('{module}')['{name}']()\""
    return f'python -c "import {module}; {module}.{name}()"'


def _make_subject(spec: str, result: Any) -> Subject:
    if isinstance(result, tuple) and len(result) == 2 and callable(result[0]):
        first, second = result
        args = second if isinstance(second, tuple) else (second,)
        if isinstance(first, nnx.Module):
            return Subject(_sum_outputs, (first, *args), args)
        return Subject(first, args)
    items = (
        f"({', '.join(type(item).__name__ for item in result)})" if isinstance(result, tuple) else type(result).__name__
    )
    raise MeasureError(
        what=f"the factory {spec} returned {items}, not a function and its arguments.",
        why="a factory returns a pair: a function and the tuple of its arguments, or a model and its inputs.",
        fix=_suggest_fix(result),
    )


def _suggest_fix(result: Any) -> str:
    if isinstance(result, nnx.Module):
        return "return model, (x,) with the inputs of its call; explain without --names takes a model alone."
    return "return fn, (model, batch)" if isinstance(result, tuple) and len(result) > 2 else _FACTORY_EXAMPLE


def _sum_outputs(model: Any, *inputs: Any) -> Any:
    floats = [leaf for leaf in pure_call.collect_arrays(model(*inputs)) if pure_call.is_float(leaf)]
    return sum((jnp.sum(leaf, dtype=jnp.float32) for leaf in floats), start=jnp.zeros(()))
