# SPDX-License-Identifier: Apache-2.0
"""How far a mirror is behind its run."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class MirrorStatus:
    """What a mirror holds and lacks.

    Example:
        >>> import ckpttools as ct
        >>> print(ct.MirrorStatus(url="s3://bucket/run", copied=(1, 2), pending=(3,)))
        s3://bucket/run: 2 step(s) copied; pending 3

    Attributes:
        url: Its address.
        copied: Steps that are complete at the mirror, as of the last contact.
        pending: Steps that are not copied yet.
        missed: Steps that the run deleted before they could be copied.
        damaged: Steps that were not copied because their local files are damaged.
        error: The store's last error; "" if it answered.
        failures: How many attempts in a row have failed.
    """

    url: str
    copied: tuple[int, ...] = ()
    pending: tuple[int, ...] = ()
    missed: tuple[int, ...] = ()
    damaged: tuple[int, ...] = ()
    error: str = ""
    failures: int = 0

    @property
    def ok(self) -> bool:
        """Return whether the store answers and no step is missing or damaged."""
        return not (self.error or self.pending or self.missed or self.damaged)

    def as_dict(self) -> dict[str, Any]:
        """Return the status as plain data."""
        return {"ok": self.ok, **dataclasses.asdict(self)}

    def __str__(self) -> str:
        parts = [f"{self.url}: {len(self.copied)} step(s) copied"]
        for name in ("pending", "missed", "damaged"):
            steps = getattr(self, name)
            parts += [f"{name} {', '.join(map(str, steps))}"] if steps else []
        return "; ".join([*parts, *([self.error] if self.error else [])])
