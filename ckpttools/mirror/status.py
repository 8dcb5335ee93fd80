# SPDX-License-Identifier: Apache-2.0
"""How far a mirror is behind its run."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class MirrorStatus:
    """How far the mirror is.

    Attributes:
        url: Its address.
        copied: Steps that are complete there, as far as is known.
        pending: Steps that are still to be copied.
        missed: Steps that the run deleted before they could be copied.
        damaged: Steps that were not copied because their local files are damaged.
        error: What the store said last; "" if it answered.
        failures: How many tries in a row have failed.
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
        """Whether the store answers and nothing is missing there."""
        return not (self.error or self.pending or self.missed or self.damaged)

    def as_dict(self) -> dict[str, Any]:
        """The status as plain data."""
        return {"ok": self.ok, **dataclasses.asdict(self)}

    def __str__(self) -> str:
        parts = [f"{self.url}: {len(self.copied)} step(s) copied"]
        for name in ("pending", "missed", "damaged"):
            steps = getattr(self, name)
            parts += [f"{name} {', '.join(map(str, steps))}"] if steps else []
        return "; ".join([*parts, *([self.error] if self.error else [])])
