# SPDX-License-Identifier: Apache-2.0
"""Budgets: what a user may write, and the bytes that it means.

Bytes, a text with a unit, a fraction of what the plain model takes, or "fit".
"""

import re
from typing import Any, Literal

import numpy as np

from ..compiler.report import Measurement
from ..compiler.targets import Target
from ..errors import BudgetError

BudgetKind = Literal["peak", "temp"]

_UNIT_BYTES = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
# Main memory of one device by the vendors' data sheets, in bytes; the compilers reserve a part of it.
_TPU_BYTES = {"v4": 32 * 2**30, "v5e": 16 * 2**30, "v5p": 95 * 2**30, "v6e": 32 * 2**30}
_MARGIN = 0.94
# Above this a number of bytes is a slip.
_MAX_BYTES = 2**62


def select_bytes(measurement: Measurement, of: BudgetKind) -> int:
    """The figure that a budget is about: all that main memory has to hold, or the temporaries."""
    if not measurement.fits and measurement.out_of_memory is not None:
        return measurement.out_of_memory.needed_bytes or 2**62
    return measurement.total_bytes if of == "peak" else measurement.temp_bytes


def _convert_numpy(budget: Any) -> Any:
    """NumPy's numbers as Python's; everything else as it is."""
    return budget.item() if isinstance(budget, np.number) else budget


def require_positive(name: str, value: Any, unit: str, example: str, *, or_zero: bool = False) -> None:
    """Refuse a limit that is no number of something.

    Raises:
        BudgetError: If it is none.
    """
    number = _convert_numpy(value)
    if type(number) not in (int, float) or not (0 < number < float("inf") or (or_zero and number == 0)):
        raise BudgetError(
            what=f"{name}={value!r} is no limit.",
            why=f"it is a finite number of {unit}, {'not below' if or_zero else 'above'} zero.",
            fix=f"{name}={example}, or leave it out for no limit.",
        )


def is_fraction(budget: Any) -> bool:
    """Whether the plain model has to be known."""
    return isinstance(budget, float) and 0 < budget <= 1


def require_budget(budget: Any) -> None:
    """Refuse what no model and no target could make a budget of, before anything is compiled.

    Raises:
        BudgetError: If it is none.
    """
    budget, given = _convert_numpy(budget), budget
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
                what=f"budget={budget!r} is no budget.",
                why="a text is a number of bytes with a unit: B, kB, MB, GB, KiB, MiB or GiB; or 'fit'.",
                fix='budget="12GiB", budget="fit"; for a share of the plain model a number, budget=0.5.',
            )
    # A float is a share, unless nobody can mean one: 12e9.
    elif type(budget) not in (int, float) or not (
        is_fraction(budget) or (1 <= budget <= _MAX_BYTES and _is_bytes(budget))
    ):
        raise BudgetError(
            what=f"budget={given!r} is no budget.",
            why="it is whole bytes, a text with a unit, a share of the plain model (a float up to 1.0), or 'fit'.",
            fix='budget="12GiB", budget=0.5, or budget="fit".',
        )


def _is_bytes(budget: float) -> bool:
    return isinstance(budget, int) or (budget >= 1024 and budget.is_integer())


def _split_units(text: str) -> tuple[str, str]:
    """Number and unit of a text; the unit is "?" if it cannot be read."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    return (found[1], found[2]) if found else ("0", "?")


def compute_budget_bytes(budget: Any, *, target: Target, plain_bytes: int) -> int:
    """The bytes that a budget means.

    Args:
        budget: As in `plan`.
        target: For "fit".
        plain_bytes: What the plain model takes, for fractions.

    Raises:
        BudgetError: If it is none.
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
            what=f'budget="fit", but how much memory {target.name} has is not known.',
            why="the budget would be the device's memory less a margin.",
            fix='the bytes: budget="12GiB".',
        )
    return _TPU_BYTES[generation]
