# SPDX-License-Identifier: Apache-2.0
"""Rules that were compiled earlier, so that a later plan of the same model starts with them.

Sits on the cache of measurements. Only rules are stored: their measurements are looked up by the program that they
produce now, so that a stale file costs time but cannot give wrong results.
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
        cache: The cache of measurements, in whose directory the rules are stored; None to store nothing.
        outline: The outline.
        target: The target's name.
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
        """Return the stored rules whose measurements are in the cache.

        Args:
            measure_rules: Measures rules with a cache.
        """
        if self.cache is None:
            return []
        try:
            stored = json.loads((self.cache.directory / self.name).read_text())
            rule_files = [text for text in stored if isinstance(text, str)]
        except (OSError, ValueError, TypeError, RecursionError):
            return []
        measurements = []
        for text in rule_files:
            try:
                rules = Rules.from_toml(text)
                measurements.append((rules, measure_rules(rules, _ReadOnlyCache(self.cache.directory))))
            except (LookupError, RematError):  # of another program, or of another version's rules
                continue
        return measurements

    def save(self, rules: Iterable[Rules]) -> None:
        """Store these rules in place of the stored ones."""
        if self.cache is not None:
            self.cache.write(self.name, json.dumps([one.to_toml() for one in rules]))


class _ReadOnlyCache(Cache):
    """A cache that raises `LookupError` for what it does not have, so that nothing is compiled."""

    def get(self, key: str) -> Measurement | None:
        measurement = super().get(key)
        if measurement is None:
            raise LookupError(key)
        return measurement
