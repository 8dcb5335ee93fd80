# SPDX-License-Identifier: Apache-2.0
"""Run a compiled program on its device: the step time, and the allocator's peak."""

import dataclasses
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from ..errors import MeasureError
from ..tracing import pure_call
from . import placement
from .lower import LoweredCall
from .report import Measurement
from .targets import Target

_WARMUP_RUNS = 2


def check_runnable(target: Target, call: pure_call.Call, repeats: int) -> None:
    """Check that a call can be run on a target.

    Raises:
        MeasureError: If the target has no device here, an argument is abstract, deleted or on another device, or
            `repeats` is not a positive int.
    """
    if not target.live:
        raise MeasureError(
            what=f"run=True, but {target.name} is a topology without a device.",
            why="timing a step needs a device to run it on.",
            fix="leave run out and compare estimated_cycles, or name a live target.",
        )
    placement.check_placement(call, target)
    abstract = [
        info.label
        for leaf, info in zip(call.leaves, call.leaf_infos, strict=True)
        if isinstance(leaf, jax.ShapeDtypeStruct)
    ]
    if abstract:
        raise MeasureError(
            what=f"run=True, but {len(abstract)} arguments are abstract, such as {abstract[0]}.",
            why="a program runs on values; a jax.ShapeDtypeStruct has none.",
            fix="build the model and the batch, or leave run out.",
        )
    deleted = [
        info.label
        for leaf, info in zip(call.leaves, call.leaf_infos, strict=True)
        if isinstance(leaf, jax.Array) and leaf.is_deleted()
    ]
    if deleted:
        raise MeasureError(
            what=f"run=True, but {len(deleted)} arrays are deleted, such as {deleted[0]}.",
            why="an earlier step donated them, so their memory is gone.",
            fix="pass what that step returned, or leave run out: the shapes are still there.",
        )
    if type(repeats) is not int or repeats < 1:
        raise MeasureError(
            what=f"repeats={repeats!r} gives no step time.",
            why="the step time is the median over the runs.",
            fix="repeats=10.",
        )


def time_runs(
    compiled: Any, program: LoweredCall, call: pure_call.Call, target: Target, repeats: int, measurement: Measurement
) -> Measurement:
    """Run a compiled program and add the step time and the allocator's peak to its measurement.

    Args:
        compiled: The compiled program.
        program: The lowered program it was compiled from.
        call: The staged call, with real leaves.
        target: The live target it was compiled for.
        repeats: Number of timed runs, after two that are not timed.
        measurement: What the compiler reported.
    """
    shardings = target.placements([getattr(leaf, "sharding", None) for leaf in call.leaves])
    leaves = [jax.device_put(leaf, sharding) for leaf, sharding in zip(call.leaves, shardings, strict=True)]
    device = target.devices[0]
    peak_before = _read_allocator_peak(device)
    seconds = []
    for number in range(_WARMUP_RUNS + repeats):
        # Copies, since a step may donate its arguments or change the objects around them.
        inputs = program.make_inputs([jnp.copy(leaf) for leaf in leaves] if measurement.alias_bytes else leaves)
        jax.block_until_ready(leaves)
        with program.add_scopes(inputs):
            start = time.perf_counter()
            jax.block_until_ready(jax.tree.leaves(compiled(*inputs)))
            stop = time.perf_counter()
        if number >= _WARMUP_RUNS:
            seconds.append(stop - start)
    peak = _read_allocator_peak(device)
    notes = measurement.notes
    if peak is not None and peak == peak_before:
        notes += ("the allocator reached its peak before this run, so it is an upper bound; use a fresh process.",)
    quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [seconds[0]] * 3
    return dataclasses.replace(
        measurement,
        step_s=statistics.median(seconds),
        step_spread_s=quartiles[2] - quartiles[0],
        allocator_peak_bytes=peak,
        notes=notes,
    )


def _read_allocator_peak(device: jax.Device) -> int | None:
    stats = device.memory_stats()  # None where the allocator does not count
    return stats.get("peak_bytes_in_use") if stats else None
