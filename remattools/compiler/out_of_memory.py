# SPDX-License-Identifier: Apache-2.0
"""A program that runs out of memory, as a value read from the compiler's or the allocator's message."""

import dataclasses
import re

# The wordings of the TPU compiler and of the allocators of live devices.
_NEEDED_BYTES = re.compile(
    r"total memory required[^(]*\(([\d.]+)([KMGT]?)\)|Used ([\d.]+)([KMGT]?)(?:iB)? of|"
    r"(?:allocat\w+|request\w*) (?:of )?([\d.]+)\s*([KMGT]?)(?:iB| ?bytes|B)?"
)
_LIMIT_BYTES = re.compile(r"available HBM \(([\d.]+)([KMGT]?)\)|Used [\d.]+[KMGT]?(?:iB)? of ([\d.]+)([KMGT]?)")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Allocation:
    """One of the values that fill the memory at its peak.

    Attributes:
        path: Path of the module that computes it; "." if no module does.
        name: Primitive that computes it, or an argument's path.
        shape: Dtype and shape, such as `bfloat16[8,128]`.
        bytes: Size of all `count` values.
        count: Number of equal values in this row.
    """

    path: str
    name: str
    shape: str
    bytes: int
    count: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutOfMemory:
    """Why a program was refused: the compiler or the device has too little memory for it.

    Attributes:
        needed_bytes: Bytes the program needs, rounded by the compiler; None if the message does not say.
        limit_bytes: Bytes the device has; None if the message does not say.
        message: The compiler's message.
        largest: The largest values live at the peak, from the traced program (before the compiler's fusions).
    """

    needed_bytes: int | None
    limit_bytes: int | None
    message: str
    largest: tuple[Allocation, ...] = ()

    @property
    def excess_bytes(self) -> int | None:
        """Bytes above the limit; None if the message does not say."""
        if self.needed_bytes is None or self.limit_bytes is None:
            return None
        return self.needed_bytes - self.limit_bytes


def parse_out_of_memory(message: str) -> OutOfMemory:
    """Read the needed bytes and the limit from an out-of-memory message."""
    return OutOfMemory(
        needed_bytes=_parse_bytes(_NEEDED_BYTES, message),
        limit_bytes=_parse_bytes(_LIMIT_BYTES, message),
        message=message.strip(),
    )


def _parse_bytes(pattern: re.Pattern[str], message: str) -> int | None:
    match = pattern.search(message)
    if match is None:
        return None
    number, unit = [group for group in match.groups() if group is not None][:2]
    return int(float(number) * _UNITS[unit])
