# SPDX-License-Identifier: Apache-2.0
"""Budgets: what a user may pass, and the bytes that it means.

A budget is bytes, a string with a unit, a fraction of what the plain model takes, or "fit".
"""

import re
from typing import Any, Literal

import numpy as np

from ..compiler.report import Measurement
from ..compiler.targets import Target
from ..errors import BudgetError

BudgetKind = Literal["peak", "temp"]

_UNIT_BYTES = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
# Bytes of main memory of one chip, from the vendors' data sheets. The compilers reserve a part of it: hence the margin.
_TPU_BYTES = {"v4": 32 * 2**30, "v5e": 16 * 2**30, "v5p": 95 * 2**30, "v6e": 32 * 2**30}
_MARGIN = 0.94
# A larger number of bytes is a typing error.
_MAX_BYTES = 2**62


def select_bytes(measurement: Measurement, of: BudgetKind) -> int:
    """Return the bytes that a budget is about.

    Args:
        measurement: Of one compiled program.
        of: "peak" for all that main memory has to hold, "temp" for the temporaries.
    """
    if measurement.out_of_memory is not None and not measurement.out_of_memory.needed_bytes:
        return _MAX_BYTES  # the compiler does not say
    return measurement.total_bytes if of == "peak" else measurement.temp_bytes


def _convert_numpy(budget: Any) -> Any:
    """Return NumPy's numbers as Python's, everything else unchanged."""
    return budget.item() if isinstance(budget, np.number) else budget


def require_positive(name: str, value: Any, unit: str, example: str, *, or_zero: bool = False) -> None:
    """Raise an error for a limit that is not a positive number.

    Args:
        name: The name of the argument.
        value: Its value.
        unit: What it counts, for the message.
        example: A value that the message suggests.
        or_zero: Whether 0 is allowed.

    Raises:
        BudgetError: If `value` is not a finite int or float above zero.
    """
    number = _convert_numpy(value)
    if type(number) not in (int, float) or not (0 < number < float("inf") or (or_zero and number == 0)):
        raise BudgetError(
            what=f"{name}={value!r} is not a valid limit.",
            why=f"it has to be a finite number of {unit}, {'zero or more' if or_zero else 'above zero'}.",
            fix=f"{name}={example}, or leave it out for no limit.",
        )


def is_fraction(budget: Any) -> bool:
    """Return whether a budget is a fraction of what the plain model takes."""
    return isinstance(budget, float) and 0 < budget <= 1


def require_budget(budget: Any) -> None:
    """Raise an error, before anything is compiled, for what cannot be a budget of any model.

    Args:
        budget: What the user passed.

    Raises:
        BudgetError: If `budget` is not bytes, a string with a unit, a fraction, or "fit".
    """
    budget, original = _convert_numpy(budget), budget
    if isinstance(budget, str):
        if budget == "fit":
            return
        number, unit = _split_units(budget)
        if (
            unit not in _UNIT_BYTES
            or ("." in number and not unit)
            or not 1 <= _UNIT_BYTES[unit] * float(number) <= _MAX_BYTES
        ):
            raise BudgetError(
                what=f"budget={budget!r} is not a valid budget.",
                why="a string has to be a number with a unit (B, kB, MB, GB, KiB, MiB or GiB), or 'fit'.",
                fix='budget="12GiB" or budget="fit"; for a fraction of the plain model a float, budget=0.5.',
            )
    # A float is a fraction, unless it is clearly a number of bytes: 12e9.
    elif type(budget) not in (int, float) or not (
        is_fraction(budget) or (1 <= budget <= _MAX_BYTES and _is_bytes(budget))
    ):
        raise BudgetError(
            what=f"budget={original!r} is not a valid budget.",
            why="it has to be an int of bytes, a string with a unit, a fraction of the plain model (a float up to "
            "1.0), or 'fit'.",
            fix='budget="12GiB", budget=0.5, or budget="fit".',
        )


def _is_bytes(budget: float) -> bool:
    return isinstance(budget, int) or (budget >= 1024 and budget.is_integer())


def _split_units(text: str) -> tuple[str, str]:
    """Return number and unit of a string; the unit is "?" if it cannot be parsed."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    return (found[1], found[2]) if found else ("0", "?")


def compute_budget_bytes(budget: Any, *, target: Target, plain_bytes: int) -> int:
    """Return a budget in bytes.

    Args:
        budget: Bytes, a string with a unit, a fraction, or "fit".
        target: The target whose memory "fit" means.
        plain_bytes: What the plain model takes, for fractions.

    Raises:
        BudgetError: If `budget` is not valid, or is "fit" and the memory of the target is unknown.
    """
    require_budget(budget)
    budget = _convert_numpy(budget)
    if budget == "fit":
        return int(_MARGIN * _get_memory_bytes(target))
    if isinstance(budget, str):
        number, unit = _split_units(budget)
        return int(float(number) * _UNIT_BYTES[unit])
    return int(budget * plain_bytes) if is_fraction(budget) else int(budget)


def _get_memory_bytes(target: Target) -> int:
    device = target.devices[0]
    statistics = device.memory_stats() if target.live else None
    if statistics and statistics.get("bytes_limit"):
        return int(statistics["bytes_limit"])
    generation = target.name.split(":")[1] if target.name.startswith("tpu:") else ""
    if generation not in _TPU_BYTES:
        raise BudgetError(
            what=f'budget="fit" is not available: the memory of {target.name} is unknown.',
            why='"fit" means the memory of the device minus a margin.',
            fix='pass the bytes: budget="12GiB".',
        )
    return _TPU_BYTES[generation]
