# SPDX-License-Identifier: Apache-2.0
"""Budgets: what a user may write, and the bytes that it means.

Bytes, a text with a unit, a fraction of what the plain model takes, or "fit".
"""

import re
from typing import Any, Literal

from ..errors import BudgetError, did_you_mean
from ..measure.measurement import Measurement
from ..measure.targets import Target

Of = Literal["peak", "temp"]

_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
# Main memory of one device by the vendors' data sheets, in bytes; the compilers reserve a part of it.
_TPU_BYTES = {"v4": 32 * 2**30, "v5e": 16 * 2**30, "v5p": 95 * 2**30, "v6e": 32 * 2**30}
_MARGIN = 0.94


def bytes_of(measured: Measurement, of: Of) -> int:
    """The figure that a budget is about: the total (an upper bound of the peak on every target), or temporaries."""
    if not measured.fits and measured.out_of_memory is not None:
        return measured.out_of_memory.needed_bytes or 2**62
    return measured.total_bytes if of == "peak" else measured.temp_bytes


def is_fraction(budget: Any) -> bool:
    """Whether the plain model has to be known."""
    return isinstance(budget, float) and 0 < budget <= 1


def budget_bytes(budget: Any, *, target: Target, plain_bytes: int) -> int:
    """The bytes that a budget means.

    Args:
        budget: As in `plan`.
        target: For "fit".
        plain_bytes: What the plain model takes, for fractions.

    Raises:
        BudgetError: If it is none.
    """
    if is_fraction(budget):
        return int(budget * plain_bytes)
    if budget == "fit":
        return int(_MARGIN * _memory(target))
    if isinstance(budget, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", budget.lower())
        if found is None or (found[2] or "b") not in _UNITS:
            known = ["fit", "12GiB", "800MB"]
            raise BudgetError(
                what=f"{budget!r} is no budget.",
                why="a plan is made for a number of bytes.",
                fix=did_you_mean(budget, known) or f"one of {known}.",
            )
        return int(float(found[1]) * _UNITS[found[2] or "b"])
    if type(budget) not in (int, float) or budget <= 0:
        raise BudgetError(
            what=f"budget={budget!r} is no budget.",
            why="it is bytes, a text with a unit, a fraction of the plain model (up to 1.0), or 'fit'.",
            fix='budget="12GiB", budget=0.5, or budget="fit".',
        )
    return int(budget)


def _memory(target: Target) -> int:
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
