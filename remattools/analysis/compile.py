# SPDX-License-Identifier: Apache-2.0
"""Compile a call for a target, and read the compiler's own figures.

Sits on `staging` (the call as a program), `targets`, `cache` and `hlo`. Nothing is
estimated here: a figure is the compiler's, the clock's or the allocator's.
"""

import dataclasses
import os
import re
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .. import compat
from ..compiler import placement
from ..compiler.cache import Cache, compute_key, find_cache
from ..compiler.hlo_cycles import estimate_cycles
from ..compiler.measurement import Measurement, OutOfMemory
from ..compiler.targets import Target
from ..errors import MeasureError
from ..jaxpr import jaxprs
from ..tracing import pure_call
from ..tracing.origins import check_no_gradient, select_loss_or_floats, trace_with_paths
from ..transform.capture import walk as cap
from .timeline import timeline

# As the TPU compiler and the allocators of live devices put it.
_NEEDED_BYTES = re.compile(
    r"total memory required[^(]*\(([\d.]+)([KMGT]?)\)|Used ([\d.]+)([KMGT]?)(?:iB)? of|"
    r"(?:allocat\w+|request\w*) (?:of )?([\d.]+)\s*([KMGT]?)(?:iB| ?bytes|B)?"
)
_LIMIT_BYTES = re.compile(r"available HBM \(([\d.]+)([KMGT]?)\)|Used [\d.]+[KMGT]?(?:iB)? of ([\d.]+)([KMGT]?)")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_WARMUP_RUNS = 2
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
    """Compile `fn(*args)` for a target and read what the compiler says of it.

    A jitted function (`jax.jit`, `nnx.jit`) is compiled as it is, with its donation and
    shardings; any other as `jax.jit` would, where models that it closes over are
    arguments, not constants. Nothing of the caller is changed, `run=True` included.

    Args:
        fn: What to measure: usually a train step, or a loss with `differentiate=True`.
        *args: Its arguments: models, pytrees, arrays; arrays may be `jax.ShapeDtypeStruct`, models abstract
            (`nnx.eval_shape`). Python scalars and strings are constants of the program. Shardings over more than one
            device are carried over to the target's devices.
        target: `"cpu"`, `"gpu"`, `"tpu:v5e:2x2"`, a device, or None: where the arguments were put, or JAX's
            default device.
        differentiate: Measure the gradient of the loss that `fn` returns, with respect to the parameters of the first
            model, or the floats of the first argument.
        run: Also run it, on a live target with real arguments.
        repeats: How often it is run.
        cache: A folder, or a `Cache`, to find the measurement in if the same program was compiled before; by default
            the folder named by the environment variable REMATTOOLS_CACHE, if any. Not used with `run=True`.

    Returns:
        The figures; a program that does not fit is a result too (`out_of_memory`).

    Raises:
        TargetError: If there is no such target, with what to install.
        MeasureError: If the function cannot be measured as asked, or its arguments were put on different devices.

    Examples:
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
        _check_runnable(where, call, repeats)
    program = _lower(call, where, differentiate=differentiate)
    store = None if run else find_cache(cache)
    key = _compute_program_key(program, where) if store is not None else ""
    known = store.get(key) if store is not None else None
    if known is not None:
        return known
    measured = _compile(program, call, where, repeats if run else 0, differentiate=differentiate)
    if store is not None:
        store.put(key, measured)
    return measured


@dataclasses.dataclass(frozen=True)
class _LoweredCall:
    """A lowered call.

    Attributes:
        lowered: JAX's (or nnx's) lowered stage.
        make_inputs: From leaves to the arguments that the compiled program is called with.
    """

    lowered: Any
    make_inputs: Callable[[list[Any]], tuple[Any, ...]]


def _compute_program_key(program: _LoweredCall, target: Target) -> str:
    options = compat.get_compiler_options(program.lowered)
    return compute_key(program.lowered.as_text(), target.name, target.devices[0], options)


def _lower(call: pure_call.Call, target: Target, *, differentiate: bool) -> _LoweredCall:
    abstract = call.abstractify_leaves()
    leaves = [
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding, weak_type=leaf.weak_type)
        for leaf, sharding in zip(abstract, target.placements([leaf.sharding for leaf in abstract]), strict=True)
    ]

    def rebuild_inputs(leaves: list[Any]) -> tuple[Any, ...]:
        rebuilt: tuple[Any, ...] = cap.rebuild(call.spec, leaves, [])[: call.arity]
        return rebuilt

    if not differentiate and _is_jitted(call.fn):
        fn: Any = call.fn
        inputs: Callable[[list[Any]], tuple[Any, ...]] = rebuild_inputs
    elif not differentiate and _is_plain(call):
        fn, inputs = jax.jit(call.fn), rebuild_inputs
    else:
        fn, inputs = jax.jit(pure_call.make_pure(call, differentiate=differentiate)), lambda leaves: (leaves,)
    with pure_call.explain_errors(call):
        traced = fn.trace(*inputs(leaves))
    if differentiate and _has_nested_gradient(traced.jaxpr):
        check_no_gradient(
            trace_with_paths(call, select_loss_or_floats),
            "differentiate=True takes the gradient of a loss; leave it out to measure a whole step (CLI: --as-is).",
        )
    lowered = traced.lower(lowering_platforms=(_get_lowering_platform(target),))
    return _LoweredCall(lowered, inputs)


def _has_nested_gradient(jaxpr: Any, outer_stack: str = "") -> bool:
    """Whether a way back lies inside of what is differentiated; name stacks start afresh in nested programs."""
    for equation in jaxprs.open_jaxpr(jaxpr).eqns:
        stack = f"{outer_stack}/{equation.source_info.name_stack}"
        if 0 <= stack.find("jvp(") < stack.find("transpose("):
            return True
        if any(_has_nested_gradient(inner, stack) for _, inner in jaxprs.find_subjaxprs(equation)):
            return True
    return False


def _get_lowering_platform(target: Target) -> str:
    # A live GPU's platform is called gpu, the lowering rules are registered by vendor.
    if target.platform != "gpu":
        return target.platform
    return "rocm" if "rocm" in str(target.devices[0].client.platform_version).lower() else "cuda"


def _is_jitted(fn: Any) -> bool:
    return callable(getattr(fn, "trace", None)) and callable(getattr(fn, "lower", None))


def _is_plain(call: pure_call.Call) -> bool:
    """Arrays in plain containers only: what `jax.jit` takes as it is."""
    if len(call.values) != call.arity or call.roots:
        return False
    leaves = jax.tree.leaves(call.values)
    return len(leaves) == len(call.leaves) and all(a is b for a, b in zip(leaves, call.leaves, strict=True))


def _compile(
    program: _LoweredCall, call: pure_call.Call, target: Target, repeats: int, *, differentiate: bool
) -> Measurement:
    start = time.perf_counter()
    try:
        compiled = program.lowered.compile()
        measured = _read_measurement(compiled, target, time.perf_counter() - start)
        if not repeats:
            return measured
        return dataclasses.replace(measured, **_run(compiled, program, call, target, repeats, measured))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "out of memory" not in str(error).lower():
            raise
        refused = _make_refusal(str(error), program, target, time.perf_counter() - start)
        # Other memories than the main one (a kernel's scratch) are not filled by the program's values.
        in_main_memory = target.platform != "tpu" or "hbm" in str(error).lower()
        return _add_largest_allocations(refused, call, differentiate=differentiate) if in_main_memory else refused


def _read_measurement(compiled: Any, target: Target, compile_s: float) -> Measurement:
    memory = compiled.memory_analysis()
    costs = _read_costs(compiled)
    cycles = estimate_cycles(compiled.as_text()) if target.platform == "tpu" else None
    notes: tuple[str, ...] = ()
    if cycles is not None and cycles.unknown_loops:
        notes = (f"the trip counts of the loops {', '.join(cycles.unknown_loops)} are unknown; each body counts once.",)
    return Measurement(
        target=target.name,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        peak_bytes=memory.peak_memory_in_bytes,
        host_temp_bytes=memory.host_temp_size_in_bytes,
        flops=costs.get("flops"),
        bytes_accessed=costs.get("bytes accessed"),
        estimated_cycles=None if cycles is None else cycles.total,
        compile_s=compile_s,
        notes=notes,
    )


def _read_costs(compiled: Any) -> dict[str, float]:
    costs = compiled.cost_analysis()
    return dict(costs[0] if isinstance(costs, list) else costs or {})


def _make_refusal(message: str, program: _LoweredCall, target: Target, compile_s: float) -> Measurement:
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


def parse_out_of_memory(message: str) -> OutOfMemory:
    """What the words of a compiler or an allocator say of a program that does not fit."""
    return OutOfMemory(
        needed_bytes=_parse_bytes(_NEEDED_BYTES, message),
        limit_bytes=_parse_bytes(_LIMIT_BYTES, message),
        message=message.strip(),
    )


def _add_largest_allocations(measurement: Measurement, call: pure_call.Call, *, differentiate: bool) -> Measurement:
    """Name the values that fill the memory; the compiler's message does not."""
    reason = measurement.out_of_memory
    assert reason is not None  # only called on refusals
    alive = timeline(call.fn, *call.values[: call.arity], differentiate=differentiate)
    largest = alive.largest[:_MAX_ALLOCATIONS]
    return dataclasses.replace(measurement, out_of_memory=dataclasses.replace(reason, largest=largest))


def _count_total_bytes(tree: Any) -> int:
    leaves = [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "shape")]
    return sum(int(getattr(leaf.dtype, "itemsize", 8)) * leaf.size for leaf in leaves)


def _parse_bytes(pattern: re.Pattern[str], message: str) -> int | None:
    found = pattern.search(message)
    if found is None:
        return None
    number, unit = [group for group in found.groups() if group is not None][:2]
    return int(float(number) * _UNITS[unit])


def _check_runnable(target: Target, call: pure_call.Call, repeats: int) -> None:
    if not target.live:
        raise MeasureError(
            what=f"run=True, but {target.name} is compiled for without a device.",
            why="a step time needs a step.",
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
            why="a step that donated its arguments has taken their memory.",
            fix="pass what that step returned, or leave run out: shapes are still known.",
        )
    if type(repeats) is not int or repeats < 1:
        raise MeasureError(
            what=f"repeats={repeats!r} gives no step time.", why="the median is taken over the runs.", fix="repeats=10."
        )


def _run(
    compiled: Any, program: _LoweredCall, call: pure_call.Call, target: Target, repeats: int, measurement: Measurement
) -> dict[str, Any]:
    places = target.placements([getattr(leaf, "sharding", None) for leaf in call.leaves])
    leaves = [jax.device_put(leaf, place) for leaf, place in zip(call.leaves, places, strict=True)]
    device = target.devices[0]
    before = _read_allocator_peak(device)
    seconds = []
    for turn in range(_WARMUP_RUNS + repeats):
        # Copies, since a step may donate its arguments or change the objects around them.
        inputs = program.make_inputs([jnp.copy(leaf) for leaf in leaves] if measurement.alias_bytes else leaves)
        jax.block_until_ready(leaves)
        start = time.perf_counter()
        jax.block_until_ready(jax.tree.leaves(compiled(*inputs)))
        if turn >= _WARMUP_RUNS:
            seconds.append(time.perf_counter() - start)
    peak = _read_allocator_peak(device)
    notes = measurement.notes
    if peak is not None and peak == before:
        notes += (
            "the allocator's peak was reached before this run: it is an upper bound; measure in a fresh process.",
        )
    quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [seconds[0]] * 3
    return {
        "step_s": statistics.median(seconds),
        "step_spread_s": quartiles[2] - quartiles[0],
        "allocator_peak_bytes": peak,
        "notes": notes,
    }


def _read_allocator_peak(device: Any) -> int | None:
    counted = device.memory_stats()  # None where the allocator does not count
    return counted.get("peak_bytes_in_use") if counted else None
