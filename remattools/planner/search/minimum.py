# SPDX-License-Identifier: Apache-2.0
"""The rules that save nothing: compiled before a budget is called unreachable, whatever was predicted of them.

Sits on `exploration`. Saving nothing on every block comes first, then the same in groups, then on the outermost
sequences of the model where the planner chose other modules as its blocks.
"""

from typing import Any

from ...errors import RuleError
from ...rules.policies import dropout_masks_saveable
from ...rules.ruleset import Rules
from ...transform import apply as application
from .assignments import Assignment
from .exploration import Exploration
from .to_rules import write_rules


class Minimum:
    """What saves nothing in one search, and which of it is not compiled yet.

    Args:
        search: The search.
        model: The model.
    """

    def __init__(self, search: Exploration, model: Any) -> None:
        self._search = search
        space = search.space
        depth = len(space.members)
        least = space.full_remat.first
        groups = [a for a in space.assignments if a.group > 1 and a.first == a.rest == least and a.split == depth]
        # Large groups save least where a model is deep, so they come first.
        ordered = [space.full_remat, *sorted(groups, key=lambda assignment: -assignment.group)]
        # Where masks are kept, the model may be so deep that to draw them again takes less.
        ordered += [Assignment(0, 0, 0)] if least else []
        self._numbers = [space.assignments.index(assignment) for assignment in ordered]
        natural = Rules(dict.fromkeys(application.find_outermost_sequences(model), "nothing_saveable"))
        if any(problem.saved_masks for problem in space.outline.problems):
            natural = natural.add_policy(dropout_masks_saveable)
        known = _get_patterns(write_rules(space, space.full_remat))
        self._rules = natural if len(natural) and _get_patterns(natural) != known else None

    @property
    def is_compiled(self) -> bool:
        """Whether everything that saves nothing was compiled, or is not possible with this program."""
        return self._find_next() is None

    def compile_next(self) -> bool:
        """Compile the next of them; False if there is none left."""
        following = self._find_next()
        if following is None:
            return False
        if isinstance(following, int):
            self._search.compile_assignment(following)
            return True
        try:
            self._search.compile_rules(following)
        except RuleError:  # not every model allows regions on these modules
            self._rules = None
        return True

    def _find_next(self) -> int | Rules | None:
        search = self._search
        following = [n for n in self._numbers if n not in search.points and n not in search.rejected]
        if following:
            return following[0]
        return self._rules if self._rules is not None and self._rules not in search.others else None


def _get_patterns(rules: Rules) -> frozenset[str]:
    return frozenset(pattern.text for pattern, _ in rules)
