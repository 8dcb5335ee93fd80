# SPDX-License-Identifier: Apache-2.0
"""What a restore did: the step it used, and every candidate it tried."""

import dataclasses
import pathlib
from typing import Any, Literal

from ..surgery.altered_leaves import AlteredLeaf
from ..text import format_health

type CandidateVerdict = Literal["used", "incomplete", "corrupt", "rejected", "unverified", "empty", "unreachable"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """One step that a restore tried.

    Example:
        >>> import ckpttools as ct
        >>> ct.Candidate(step=500, verdict="used").as_dict()["verdict"]
        'used'

    Attributes:
        step: Its number.
        verdict: "used", or why it was not; "rejected" if it is intact and the run's validation rejects it.
        reason: Why it was not used; "" if it was.
        leaves: Damaged leaves, such as `model.layers.0.kernel`.
        files: Damaged files, relative to the step's directory.
        moved_to: Where the damaged step was moved; None if it was left in place.
        source: "local", or "mirror" for a copy that was fetched.
        branch: Name of the branch that the step belongs to; "" if unknown.
        superseded: Whether the step was superseded; restoring it returns to its branch.
        supersedes: Live steps that the next save supersedes, since it begins a branch after the step that was used.
    """

    step: int
    verdict: CandidateVerdict
    reason: str = ""
    leaves: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    moved_to: pathlib.Path | None = None
    source: Literal["local", "mirror"] = "local"
    branch: str = ""
    superseded: bool = False
    supersedes: tuple[int, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the candidate as plain data."""
        return {**dataclasses.asdict(self), "moved_to": str(self.moved_to) if self.moved_to else None}

    def __str__(self) -> str:
        where = " from the mirror" if self.source == "mirror" else ""
        health = format_health(self.step, self.verdict, self.reason, leaves=self.leaves, files=self.files, origin=where)
        lines = [health]
        lines += [f"    moved to: {self.moved_to}"] if self.moved_to else []
        lines += [f"    superseded: the run returns to branch {self.branch}"] if self.superseded else []
        if self.supersedes:
            lines.append(f"    the next save begins a branch and supersedes {', '.join(map(str, self.supersedes))}")
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RestoreReport:
    """What a restore did.

    Example:
        >>> import ckpttools as ct
        >>> print(ct.RestoreReport(step=None, state={}))
        nothing to restore

    Attributes:
        step: The restored step; None if the run has no steps.
        state: The whole state, items by name: live objects filled in place, the rest rebuilt. Without a restore, the
            state passed in.
        candidates: Every step that was tried, in that order.
        metrics: Metrics that were recorded with the restored step.
        seconds: Wall time of the restore, in seconds.
        mirror_error: Why the mirror could not be used; "" if it answered or there is none.
        altered: The leaves that surgery or a migration changed or kept; empty if the step fitted unchanged.
    """

    step: int | None
    state: Any = dataclasses.field(repr=False)
    candidates: tuple[Candidate, ...] = ()
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    mirror_error: str = ""
    altered: tuple[AlteredLeaf, ...] = ()

    @property
    def rejected(self) -> tuple[Candidate, ...]:
        """Return the candidates that were skipped."""
        return tuple(candidate for candidate in self.candidates if candidate.verdict != "used")

    @property
    def damaged(self) -> int:
        """Return how many steps were damaged, here or at the mirror."""
        return len({each.step for each in self.candidates if each.verdict in ("incomplete", "corrupt")})

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain data, without the state."""
        return {
            "step": self.step,
            "metrics": self.metrics,
            "seconds": self.seconds,
            "mirror_error": self.mirror_error,
            "candidates": [candidate.as_dict() for candidate in self.candidates],
            "altered": [leaf.as_dict() for leaf in self.altered],
        }

    def __str__(self) -> str:
        head = "nothing to restore" if self.step is None else f"restored step {self.step} in {self.seconds:.2f} s"
        tried = [f"  {line}" for each in self.candidates for line in str(each).splitlines()]
        return "\n".join([head, *tried, *(f"  {leaf}" for leaf in self.altered)])
