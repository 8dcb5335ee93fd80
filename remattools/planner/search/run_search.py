# SPDX-License-Identifier: Apache-2.0
"""The loop of one search: compile what is proposed, until nothing promises an improvement or a limit is reached.

Sits on `exploration`, `minimum` and `history`.
"""

import dataclasses
import time
from collections.abc import Callable

from ..result import EndReason
from .exploration import Exploration
from .history import RuleHistory
from .minimum import Minimum

ProposeNext = Callable[[Exploration], int | None]


@dataclasses.dataclass(frozen=True)
class Limits:
    """When a search ends.

    Attributes:
        max_compiles: The most compiles, or the most points.
        count_cached: Whether points from the cache count.
        latest_s: Time after which no compile starts; None for no limit.
    """

    max_compiles: int
    count_cached: bool
    latest_s: float | None

    def is_late(self) -> bool:
        """Return whether no further compile may start."""
        return self.latest_s is not None and time.monotonic() > self.latest_s

    def count_remaining(self, search: Exploration, compiled: int) -> int:
        """Return how many compiles may follow `compiled` of them."""
        return self.max_compiles - (len(search.points) if self.count_cached else compiled)


def run_search(
    search: Exploration,
    minimum: Minimum,
    history: RuleHistory,
    choose: ProposeNext,
    is_within: Callable[[Exploration], bool],
    limits: Limits,
) -> EndReason:
    """Compile until nothing promises an improvement or a limit is reached, and return what ended it.

    Before the search ends without a point that `is_within` accepts, everything that saves nothing is compiled, beyond
    the most compiles if need be.

    Args:
        search: With the plain model and the points of earlier searches.
        minimum: What saves nothing.
        history: Where the compiled rules are stored.
        choose: Returns the assignment to compile next; None if none promises an improvement.
        is_within: Whether a compiled point is within the limits of the user.
        limits: When to end.
    """
    compiled = 1  # the plain model
    history.save(point.rules for point in search.points.values())
    while True:
        number = choose(search)
        remaining = limits.count_remaining(search, compiled)
        reason: EndReason | None = None
        if number is not None and (remaining <= 0 or limits.is_late()):
            reason = "max_compiles" if remaining <= 0 else "time_limit"
        if number is not None and reason is None:
            search.compile_assignment(number, remaining=remaining - 1)
        elif is_within(search) or limits.is_late() or not minimum.compile_next():
            return "time_limit" if limits.is_late() and not is_within(search) else reason or "converged"
        compiled += 1
        history.save(point.rules for point in search.points.values())
