# SPDX-License-Identifier: Apache-2.0
"""Programs that the user already traced, lowered or compiled: `jax.jit(f).lower(x)` and the same of `nnx.jit`.

Such a program is fixed: it has its devices, and no rule changes it any more. It can be measured; `tracing.call_errors`
refuses it wherever a function is traced under rules.
"""

import time
from typing import Any

import jax

from .. import compat
from ..errors import MeasureError
from ..tracing.call_errors import is_compiled
from .cache import Cache
from .lower import compute_program_key
from .refusal import is_out_of_memory, make_refusal
from .report import Measurement, read_measurement
from .targets import Target, find_target, make_target


def measure_stage(stage: Any, target: str | Target | jax.Device | None, cache: Cache | None) -> Measurement:
    """Compile a program if it is not compiled yet, and read the compiler's report on it.

    Args:
        stage: A traced, lowered or compiled program.
        target: What the user asked for; None for the program's devices.
        cache: Earlier measurements; None for none.

    Returns:
        The measurement; running out of memory is a result.

    Raises:
        MeasureError: If the user asked for a target other than the program's.
    """
    if callable(getattr(stage, "lower", None)):  # traced
        stage = stage.lower()
    where = _find_target(stage, target)
    if is_compiled(stage):
        return read_measurement(stage, where, 0.0)
    key = compute_program_key(stage, where, has_scopes=False) if cache is not None else ""
    measurement = cache.get(key) if cache is not None else None
    if measurement is not None:
        return measurement
    start = time.perf_counter()
    try:
        compiled = stage.compile()
        measurement = read_measurement(compiled, where, time.perf_counter() - start)
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        measurement = make_refusal(error, stage, where, time.perf_counter() - start)
    if cache is not None:
        cache.put(key, measurement)
    return measurement


def _find_target(stage: Any, target: str | Target | jax.Device | None) -> Target:
    devices = _get_devices(stage)
    if target is None:
        return make_target(devices) if devices else find_target(None)
    where = find_target(target)
    if devices and not set(devices) <= set(where.devices):
        raise MeasureError(
            what=f"the program was lowered for {make_target(devices).name}, and target={where.name} was asked for.",
            why="a lowered program has its devices already, and another compiler cannot take it.",
            fix="pass the function and its arguments, measure(fn, *args, target=...), or leave target out.",
        )
    return where


def check_stage_options(args: tuple[Any, ...], *, differentiate: bool, run: bool) -> None:
    """Raise for options of `measure` that a fixed program cannot follow.

    Raises:
        MeasureError: If arguments are passed, or its gradient or a run is asked for.
    """
    asked = "arguments" if args else "differentiate=True" if differentiate else "run=True" if run else ""
    if asked:
        raise MeasureError(
            what=f"{asked} with a program that is lowered already.",
            why="it is compiled as it is: its arguments are part of it, and it is not differentiated or called here.",
            fix="measure(lowered) alone, or pass the function: measure(fn, *args).",
        )


def _get_devices(stage: Any) -> tuple[Any, ...]:
    if not is_compiled(stage):
        return compat.read_lowered(stage).devices
    shardings = jax.tree.leaves((stage.input_shardings, stage.output_shardings))
    devices = {device for sharding in shardings for device in getattr(sharding, "device_set", ())}
    return tuple(sorted(devices, key=lambda device: int(device.id)))
