# SPDX-License-Identifier: Apache-2.0
"""Errors that say what is wrong, why it matters and how to fix it.

The lowest room: it imports nothing from the package. `ckpttools.errors` builds on
`ExplainedError` too, so that the errors of both packages have one form.
"""

import difflib
from collections.abc import Iterable


class ExplainedError(Exception):
    """An error in three parts, each also an attribute.

    Attributes:
        what: The offending value and where it is.
        why: What would go wrong if it were accepted; "" if that is obvious.
        fix: Something to paste or to do; "" if there is none.

    Example:
        >>> print(ExplainedError("n=0 is not a count.", "nothing would be saved.", "n=1"))
        n=0 is not a count.
          why: nothing would be saved.
          fix: n=1
    """

    def __init__(self, what: str, why: str = "", fix: str = "") -> None:
        self.what, self.why, self.fix = what, why, fix
        parts = [what, *(f"  {label}: {text}" for label, text in (("why", why), ("fix", fix)) if text)]
        super().__init__("\n".join(parts))

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions cross process boundaries, and the default would call `cls(message)`.
        return (type(self), (self.what, self.why, self.fix), self.__dict__)


class RematError(ExplainedError):
    """Base of every error that remattools raises on purpose."""


class PatternError(RematError, ValueError):
    """A path pattern with a syntax error."""


class PolicyError(RematError, ValueError):
    """A policy that does not exist, or that its arguments do not define."""


class RuleError(RematError, ValueError):
    """A rule, an action or a set of rules that is invalid."""


class RuleFileError(RuleError):
    """A rule file that cannot be read or holds an invalid rule; the message names file and line."""


class UnmatchedRuleError(RuleError, LookupError):
    """A rule whose pattern matches no module."""


class UnmatchedRuleWarning(UserWarning):
    """Issued instead of an `UnmatchedRuleError` if `strict=False`."""


class CallError(RematError, TypeError):
    """A call of a rematerialised module that cannot be traced."""


class MeasureError(RematError, ValueError):
    """A function or arguments that cannot be measured."""


class CacheWarning(UserWarning):
    """Issued if a measurement cannot be stored in the cache; the measurement itself is valid."""


class TargetError(RematError, ValueError):
    """A compile target that does not exist, or whose compiler is not installed."""


class BudgetError(RematError, ValueError):
    """A memory budget that cannot be parsed, or that no plan meets."""


def suggest_names(name: str, choices: Iterable[str], *, limit: int = 3) -> str:
    """Return a sentence that suggests names for a misspelt one, for the `fix` of an error.

    Args:
        name: The misspelt name.
        choices: The names that exist.
        limit: How many close names to suggest; if none is close, twice as many of all.

    Returns:
        The sentence; "" without choices.

    Example:
        >>> suggest_names("keeep", ["keep", "save"])
        "did you mean 'keep'?"
    """
    names = sorted(set(choices))
    close = difflib.get_close_matches(name, names, n=limit, cutoff=0.5)
    shown = close or names[: limit * 2]
    if not shown:
        return ""
    listing = ", ".join(map(repr, shown)) + ("" if close or len(names) == len(shown) else ", ...")
    return f"did you mean {listing}?" if close else f"there are {listing}."
