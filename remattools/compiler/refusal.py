# SPDX-License-Identifier: Apache-2.0
"""The measurement of a program that runs out of memory: what the compiler says, and what the program takes anyway.

Sits on `lower` and `out_of_memory`. The TPU compiler names a total and a limit; the size of arguments and results is
known from the lowered program, so what is left are temporaries.
"""

import collections
from collections.abc import Iterable
from typing import Any

from .. import compat
from .out_of_memory import parse_out_of_memory
from .report import Measurement
from .targets import Target

_UNKNOWN_RESULTS_NOTE = (
    "the compiler had not yet divided the results among the devices: they count as temporaries here."
)


def is_out_of_memory(error: Exception) -> bool:
    """Whether a compiler or an allocator raised this error for lack of memory."""
    return "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower()


def is_main_memory(error: Exception, target: Target) -> bool:
    """Whether the main memory is full, not another one such as the scratch memory of a kernel."""
    return target.platform != "tpu" or "hbm" in str(error).lower()


def make_refusal(error: Exception, lowered: Any, target: Target, compile_s: float) -> Measurement:
    """Return the measurement of a program that runs out of memory; bytes are per device.

    Args:
        error: What the compiler or the allocator raised.
        lowered: The lowered stage of `jax.jit` or `nnx.jit`.
        target: What it was compiled for.
        compile_s: Seconds until it was refused.
    """
    reason = parse_out_of_memory(str(error))
    program = compat.read_lowered(lowered)
    one_device = len(program.devices) <= 1
    results = [result for result in program.results if one_device or result.sharding is not None]
    argument_bytes, output_bytes = sum(map(_count_bytes, program.arguments)), sum(map(_count_bytes, results))
    alias_bytes = _count_alias_bytes(program.arguments, results)
    needed = reason.needed_bytes or 0
    besides = argument_bytes + output_bytes - alias_bytes if is_main_memory(error, target) else 0
    return Measurement(
        target=target.name,
        argument_bytes=argument_bytes,
        output_bytes=output_bytes,
        alias_bytes=alias_bytes,
        temp_bytes=max(needed - besides, 0),
        peak_bytes=needed,
        compile_s=compile_s,
        out_of_memory=reason,
        notes=() if len(results) == len(program.results) else (_UNKNOWN_RESULTS_NOTE,),
    )


def _count_bytes(array: compat.LoweredArray) -> int:
    """Return the bytes of an array on one device."""
    shape = array.shape if array.sharding is None else array.sharding.shard_shape(array.shape)
    count = 1
    for size in shape:
        count *= int(size)
    return count * int(getattr(array.dtype, "itemsize", 8))


def _count_alias_bytes(arguments: Iterable[compat.LoweredArray], results: Iterable[compat.LoweredArray]) -> int:
    """Return the bytes of the results that fit into donated arguments, as JAX pairs them: by shape and dtype."""
    donated = collections.Counter((a.shape, str(a.dtype)) for a in arguments if a.donated)
    total = 0
    for result in results:
        key = (result.shape, str(result.dtype))
        if donated[key]:
            donated[key] -= 1
            total += _count_bytes(result)
    return total
