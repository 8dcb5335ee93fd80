# SPDX-License-Identifier: Apache-2.0
"""What random bits cost a compiled program whose regions draw them again, and what helps.

Sits on `jaxpr.random_bits` (the traced program) and `compiler.report` (the compiled one). Two facts shaped this file:

-   The TPU compiler can hold about 30 buffers of the size of the bits while a region draws them again from threefry
    keys. Whether it does depends on its fusions, so only the compiled program tells. Bits of rbg keys take one buffer.
-   In the compiled program, some of those buffers are named after operations of the first pass, so all phases count.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from ..compiler.report import Measurement
from ..jaxpr import jaxprs
from ..jaxpr.random_bits import RandomBits, find_random_bits
from ..rules.fold_paths import merge_rows
from ..rules.paths import format_path
from ..text import format_bytes
from ..tracing import pure_call
from ..tracing.origins import locate, trace_with_paths
from .residuals import linearize_call

# The policy that saves masks, and how it is added to the rules that a user has.
SAVE_MASKS = 'rules.add_policy("dropout_masks_saveable") (in a rule file: policy = "... | dropout_masks_saveable")'
CHANGE_KEYS = (
    'jax.config.update("jax_default_prng_impl", "rbg") before the model is built, or '
    'nnx.Rngs(jax.random.key(0, impl="rbg")): keys whose bits are cheap to draw again (other random numbers)'
)
# Segments of an operation's name that belong to drawing; a saved mask, a bool, is not counted.
_DRAWING = ("_uniform", "_bernoulli", "random_bits", "threefry", "_normal", "_randint")
# A smaller share of the temporaries is not worth a remark.
_MIN_SHARE = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Redrawn:
    """Random bits that regions draw again in the backward pass of a traced program.

    Attributes:
        path: Path of the modules that draw them, equal layers merged.
        shape: Dtype and shape of the bits of one draw, of the whole array.
        bytes: Size of one draw.
        count: How many draws of that size there are.
    """

    path: str
    shape: str
    bytes: int
    count: int


def find_redrawn(program: Any) -> tuple[Redrawn, ...]:
    """Return the bits of threefry keys that a program's regions draw again, the largest draws first.

    Args:
        program: A program with both passes, traced with module paths.
    """
    rows = [
        Redrawn(
            path=format_path(locate(list(bits.stacks))[0]),
            shape=bits.equation.outvars[-1].aval.str_short(short_dtypes=True),
            bytes=bits.bytes,
            count=bits.iterations,
        )
        for bits in _walk_regions(program)
        if bits.implementation == "threefry"
    ]
    merged = merge_rows(
        rows,
        lambda row: row.shape,
        bytes=lambda group: group[0].bytes,  # of one draw: they may follow each other
        count=lambda group: sum(row.count for row in group),
    )
    return tuple(merged)


def find_redrawn_in_call(fn: Any, args: tuple[Any, ...], *, differentiate: bool) -> tuple[Redrawn, ...]:
    """Return the bits of threefry keys that the regions of a call draw again, the largest draws first.

    Args:
        fn: A loss, or with `differentiate=False` a whole step, jitted or not.
        args: Its arguments.
        differentiate: Whether `fn` is a loss, whose gradient is looked at.
    """
    call = pure_call.stage(pure_call.unwrap_jit(fn), args)
    if differentiate:
        return find_redrawn(linearize_call(call)[0])
    return find_redrawn(trace_with_paths(call, lambda evaluated: evaluated[1]))


def _walk_regions(program: Any, iterations: int = 1, stacks: tuple[str, ...] = ()) -> Iterator[RandomBits]:
    """Yield the random bits in what a backward pass computes again."""
    for equation in jaxprs.open_jaxpr(program).eqns:
        inside = (*stacks, str(equation.source_info.name_stack))
        count = iterations * (equation.params["length"] if equation.primitive.name == "scan" else 1)
        for _, nested in jaxprs.find_subjaxprs(equation):
            # The pass that comes first has the region's operations without the region, or as one not differentiated.
            if jaxprs.is_region(equation) and equation.params.get("differentiated", True):
                yield from find_random_bits(nested, count, inside)
            else:
                yield from _walk_regions(nested, count, inside)


def count_random_bytes(measurement: Measurement) -> int:
    """Return the bytes at the peak of a compiled program that random bits and what they are drawn with take."""
    return sum(
        row.bytes
        for row in measurement.live
        if not row.shape.startswith("pred")
        and (row.shape.startswith("u") or any(name in row.operation for name in _DRAWING))
    )


def may_be_costly(measurement: Measurement) -> bool:
    """Return whether random bits are a part of a TPU's peak that is worth a remark, or its peak is not known."""
    if not measurement.target.startswith("tpu") or measurement.refusal is not None:
        return False
    if measurement.out_of_memory is not None:
        return True
    return count_random_bytes(measurement) > _MIN_SHARE * measurement.temp_bytes


def describe_cost(measurement: Measurement, redrawn: Iterable[Redrawn]) -> str:
    """Return sentences on the cost of random bits, without what helps; "" if they cost little.

    Args:
        measurement: Of the program.
        redrawn: What its regions draw again, from `find_redrawn`.
    """
    first = next(iter(redrawn), None)
    if first is None or not may_be_costly(measurement):
        return ""
    times = f" {first.count} times" if first.count > 1 else ""
    cost = "a TPU takes up to 30 times their size on a device while it draws them"
    if measurement.out_of_memory is None:
        taken, temp = format_bytes(count_random_bytes(measurement)), format_bytes(measurement.temp_bytes)
        cost = f"{taken} of {temp} at the peak of the compiled program are random bits and what they are drawn with"
    return (
        f"the regions draw the random bits of {first.path}, {first.shape} ({format_bytes(first.bytes)}),{times} again "
        f"from threefry keys: {cost}."
    )


def describe_cures() -> str:
    """Return what helps against the cost of random bits."""
    return f"save the masks, 1 byte for each element: {SAVE_MASKS}; or change the keys: {CHANGE_KEYS}."
