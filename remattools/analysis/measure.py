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

from ..compiler import placement
from ..compiler.cache import Cache, find_cache
from ..compiler.lower import LoweredCall, compute_program_key, lower
from ..compiler.out_of_memory import parse_out_of_memory
from ..compiler.report import Measurement, read_measurement
from ..compiler.run import check_runnable, time_runs
from ..compiler.targets import Target
from ..tracing import pure_call
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
        fn: What to measure: usually a train step, or a loss with `differentiate=True`.
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
    call = pure_call.stage(fn, args)
    where = placement.choose_target(call, target)
    if differentiate:
        pure_call.check_differentiable(call)
    if run:
        check_runnable(where, call, repeats)
    program = lower(call, where, differentiate=differentiate)
    store = None if run else find_cache(cache)
    key = compute_program_key(program, where) if store is not None else ""
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
        if "RESOURCE_EXHAUSTED" not in str(error) and "out of memory" not in str(error).lower():
            raise
        refusal = _make_refusal(str(error), program, target, time.perf_counter() - start)
        # The program's values fill the main memory only, not others such as a kernel's scratch memory.
        in_main_memory = target.platform != "tpu" or "hbm" in str(error).lower()
        return _add_largest_allocations(refusal, call, differentiate=differentiate) if in_main_memory else refusal


def _make_refusal(message: str, program: LoweredCall, target: Target, compile_s: float) -> Measurement:
    reason = parse_out_of_memory(message)
    arguments = _count_total_bytes(program.lowered.in_avals) if hasattr(program.lowered, "in_avals") else 0
    return Measurement(
        target=target.name,
        argument_bytes=arguments,
        output_bytes=_count_total_bytes(program.lowered.out_info),
        alias_bytes=0,
        temp_bytes=reason.needed_bytes or 0,
        peak_bytes=reason.needed_bytes or 0,
        compile_s=compile_s,
        out_of_memory=reason,
    )


def _add_largest_allocations(measurement: Measurement, call: pure_call.Call, *, differentiate: bool) -> Measurement:
    """Name the values that fill the memory, since the compiler's message does not."""
    reason = measurement.out_of_memory
    assert reason is not None  # only called on refusals
    live = timeline(call.fn, *call.values[: call.arity], differentiate=differentiate)
    largest = live.largest[:_MAX_ALLOCATIONS]
    return dataclasses.replace(measurement, out_of_memory=dataclasses.replace(reason, largest=largest))


def _count_total_bytes(tree: Any) -> int:
    leaves = [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "shape")]
    return sum(int(getattr(leaf.dtype, "itemsize", 8)) * leaf.size for leaf in leaves)
