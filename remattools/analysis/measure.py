# SPDX-License-Identifier: Apache-2.0
"""`measure`: compile a call for a target, and read the compiler's memory and cost report.

Sits on the room `compiler` (lower, compile, read, run) and on `timeline`, which names the
values of a program that runs out of memory.
"""

import dataclasses
import os
import time
from collections.abc import Callable
from typing import Any

import jax

from ..compiler import placement, stages
from ..compiler.cache import Cache, find_cache
from ..compiler.lower import LoweredCall, compute_program_key, lower
from ..compiler.refusal import is_main_memory, is_out_of_memory, make_refusal
from ..compiler.report import Measurement, read_measurement
from ..compiler.run import check_runnable, time_runs
from ..compiler.targets import Target
from ..errors import RematError
from ..tracing import call_errors, pure_call
from .timeline import timeline

_MAX_ALLOCATIONS = 8


def measure(
    fn: Callable[..., Any],
    *args: Any,
    target: str | Target | jax.Device | None = None,
    differentiate: bool = False,
    run: bool = False,
    repeats: int = 10,
    cache: Cache | str | os.PathLike[str] | None = None,
) -> Measurement:
    """Compile `fn(*args)` for a target and return the compiler's memory and cost report.

    A jitted function (`jax.jit`, `nnx.jit`) is compiled as it is, with its donation and
    shardings. Any other function is compiled as by `jax.jit`, except that models it closes
    over are arguments rather than constants. The caller's objects are not changed, even
    with `run=True`.

    Args:
        fn: What to measure: usually a train step, or a loss with `differentiate=True`. Or a program that is traced,
            lowered or compiled already, such as `jax.jit(f).lower(x)`, without arguments.
        *args: Its arguments: models, pytrees and arrays. Arrays may be `jax.ShapeDtypeStruct`, models abstract
            (`nnx.eval_shape`). Python scalars and strings are constants of the program. Shardings over more than one
            device move to the target's devices.
        target: `"cpu"`, `"gpu"`, `"tpu:v5e:2x2"`, or a device. None: the devices that hold the arguments, or JAX's
            default device if the arguments were not put on any.
        differentiate: Measure the gradient of the loss that `fn` returns, with respect to the parameters of the first
            model, or, without a model, to the floats of the first argument.
        run: Also run it, on a live target with real arguments, and time a step.
        repeats: Number of timed runs.
        cache: Directory or `Cache` of earlier measurements; a program found there is not compiled again. None: the
            directory in the environment variable REMATTOOLS_CACHE, if set. Not used with `run=True`.

    Returns:
        The measurement, per device. A program that runs out of memory is a result too, with `out_of_memory` set.

    Raises:
        TargetError: If the target does not exist or is not installed.
        MeasureError: If the function cannot be measured as asked, or its arguments are on different devices.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import remattools as rt
        >>> x = jax.ShapeDtypeStruct((256, 256), jnp.float32)
        >>> rt.measure(lambda x: jnp.sum(x @ x), x, target="cpu").argument_bytes
        262144
    """
    if call_errors.is_stage(fn):
        stages.check_stage_options(args, differentiate=differentiate, run=run)
        return stages.measure_stage(fn, target, find_cache(cache))
    call = pure_call.stage(fn, args)
    where = placement.choose_target(call, target)
    if differentiate:
        pure_call.check_differentiable(call)
    if run:
        check_runnable(where, call, repeats)
    program = lower(call, where, differentiate=differentiate)
    store = None if run else find_cache(cache)
    key = compute_program_key(program.lowered, where) if store is not None else ""
    cached = store.get(key) if store is not None else None
    if cached is not None:
        return cached
    measurement = _compile(program, call, where, repeats if run else 0, differentiate=differentiate)
    if store is not None:
        store.put(key, measurement)
    return measurement


def _compile(
    program: LoweredCall, call: pure_call.Call, target: Target, repeats: int, *, differentiate: bool
) -> Measurement:
    start = time.perf_counter()
    try:
        compiled = program.lowered.compile()
        measurement = read_measurement(compiled, target, time.perf_counter() - start)
        return time_runs(compiled, program, call, target, repeats, measurement) if repeats else measurement
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        refusal = make_refusal(error, program.lowered, target, time.perf_counter() - start)
        is_main = is_main_memory(error, target)
        return _add_largest_allocations(refusal, call, differentiate=differentiate) if is_main else refusal


def _add_largest_allocations(measurement: Measurement, call: pure_call.Call, *, differentiate: bool) -> Measurement:
    """Name the values that fill the memory, since the compiler's message does not."""
    reason = measurement.out_of_memory
    assert reason is not None  # only called on refusals
    try:
        live = timeline(call.fn, *call.values[: call.arity], differentiate=differentiate)
    except RematError:  # a program that only the compiler understands is a result without names
        return measurement
    largest = live.largest[:_MAX_ALLOCATIONS]
    return dataclasses.replace(measurement, out_of_memory=dataclasses.replace(reason, largest=largest))
