# SPDX-License-Identifier: Apache-2.0
"""How bytes reach the disk and how they are verified."""

import dataclasses
import re
from typing import Literal

from ..errors import SpecError
from .checks import require_choice, require_positive

_FREE_FORM = re.compile(r"(\d+(?:\.\d+)?)x")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Storage:
    """How bytes reach the disk.

    Attributes:
        asynchronous: Whether `step` and `save` return once the state is copied, and write in the background.
        compression: Whether arrays are compressed (zstd). On float weights it saved 7.7 % of the disk and took 2.4
            to 3.5 times as long, which is why it is off.
        min_free: Space that must be free before a save: "2x" is twice the size of that save, an int is in bytes.
        when_full: If space is short, "raise" at once, or "prune" first what the retention does not keep.
        timeout_s: Longest wait for one save, in seconds; a longer wait raises.

    Example:
        >>> import ckpttools as ct
        >>> ct.Storage(min_free="1.5x").compute_required_bytes(1000)
        1500
    """

    asynchronous: bool = True
    compression: bool = False
    min_free: str | int = "2x"
    when_full: Literal["raise", "prune"] = "raise"
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        for field in ("asynchronous", "compression"):
            if not isinstance(getattr(self, field), bool):
                raise SpecError(
                    what=f"Storage({field}={getattr(self, field)!r}) is not a bool.",
                    why=f"{field} is switched on or off.",
                    fix=f"Storage({field}=True)",
                )
        legal_bytes = type(self.min_free) is int and self.min_free >= 0
        legal_factor = isinstance(self.min_free, str) and _FREE_FORM.fullmatch(self.min_free)
        if not (legal_bytes or legal_factor):
            raise SpecError(
                what=f"Storage(min_free={self.min_free!r}) cannot be read.",
                why='it is a factor of the next save such as "2x", or a number of bytes.',
                fix='Storage(min_free="2x")',
            )
        require_choice("Storage", "when_full", self.when_full, ("raise", "prune"))
        require_positive("Storage", "timeout_s", self.timeout_s)

    def compute_required_bytes(self, save_bytes: int) -> int:
        """Return the free bytes that a save of `save_bytes` requires; at least the size of the save itself."""
        if isinstance(self.min_free, int):
            return max(self.min_free, save_bytes)
        return int(max(1.0, float(self.min_free[:-1])) * save_bytes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Integrity:
    """How a step is verified.

    Attributes:
        digest: "xxh3" finds damage at memory speed; "sha256" also finds changes made on purpose, at about an eighth
            of the speed.
        verify: "digest" compares digests when a step is read. "readback" also reads each step back from the disk
            before it is committed, which about doubles the time of a save.

    Example:
        >>> import ckpttools as ct
        >>> ct.CheckpointSpec(directory="runs/exp1", integrity=ct.Integrity(digest="sha256")).integrity.verify
        'digest'
    """

    digest: Literal["xxh3", "sha256"] = "xxh3"
    verify: Literal["digest", "readback"] = "digest"

    def __post_init__(self) -> None:
        require_choice("Integrity", "digest", self.digest, ("xxh3", "sha256"))
        require_choice("Integrity", "verify", self.verify, ("digest", "readback"))
