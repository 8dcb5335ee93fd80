# SPDX-License-Identifier: Apache-2.0
"""Rules that were compiled before, so that a later plan of the same model begins with them.

Sits on the measurements' cache. Only rules are remembered: their figures are looked up
by the program that they make now, so that a stale note can cost time but not be wrong.
"""

import hashlib
import json
from collections.abc import Callable, Iterable

from ...compiler.cache import Cache
from ...compiler.report import Measurement
from ...errors import RematError
from ...rules.ruleset import Rules
from ..model.outline import Outline


class RuleHistory:
    """The rules compiled for one outline and target.

    Args:
        cache: Where the measurements are; None remembers nothing.
        outline: The outline.
        target: Its name.
    """

    def __init__(self, cache: Cache | None, outline: Outline, target: str) -> None:
        self.cache = cache
        digest = hashlib.sha256(
            repr((target, outline.visits, outline.rules, outline.around.bytes)).encode()
        ).hexdigest()
        self.name = f"plan-{digest[:32]}.json"

    def load_measurements(
        self, measure_rules: Callable[[Rules, Cache], Measurement]
    ) -> list[tuple[Rules, Measurement]]:
        """What is remembered and still measured.

        Args:
            measure_rules: Measures rules with a cache.
        """
        if self.cache is None:
            return []
        try:
            texts = [
                text for text in json.loads((self.cache.directory / self.name).read_text()) if isinstance(text, str)
            ]
        except (OSError, ValueError, TypeError, RecursionError):
            return []
        found = []
        for text in texts:
            try:
                rules = Rules.from_toml(text)
                found.append((rules, measure_rules(rules, _ReadOnlyCache(self.cache.directory))))
            except (LookupError, RematError):  # of another program, or of another version's rules
                continue
        return found

    def remember(self, rules: Iterable[Rules]) -> None:
        """Store these rules."""
        if self.cache is not None:
            self.cache.write(self.name, json.dumps([one.to_toml() for one in rules]))


class _ReadOnlyCache(Cache):
    """Only what is stored: nothing is compiled."""

    def get(self, key: str) -> Measurement | None:
        found = super().get(key)
        if found is None:
            raise LookupError(key)
        return found
