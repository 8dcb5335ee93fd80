# SPDX-License-Identifier: Apache-2.0
"""Errors that say what is wrong, why it matters and how to mend it.

The lowest room: imports nothing of the package. `ckpttools.errors` builds on
`Explained` too, so that both packages speak in one form.
"""

import difflib
from collections.abc import Iterable


class ExplainedError(Exception):
    """An error in three parts, each also an attribute.

    Attributes:
        what: The offending value and where it stands.
        why: What would go wrong if it were accepted.
        fix: Something to paste or to do; the empty string if there is none.
    """

    def __init__(self, what: str, why: str = "", fix: str = "") -> None:
        self.what, self.why, self.fix = what, why, fix
        parts = [what, *(f"  {label}: {text}" for label, text in (("why", why), ("fix", fix)) if text)]
        super().__init__("\n".join(parts))

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions cross process boundaries; the default would call `cls(message)`.
        return (type(self), (self.what, self.why, self.fix), self.__dict__)


class RematError(ExplainedError):
    """Base of every error that remattools raises on purpose."""


class PatternError(RematError, ValueError):
    """A path pattern that cannot be read."""


class PolicyError(RematError, ValueError):
    """A policy that does not exist or cannot be combined."""


class RuleError(RematError, ValueError):
    """A rule, an action or a set of rules that cannot be honoured."""


class RuleFileError(RuleError):
    """A rule file that cannot be read; the message names file and line."""


class UnmatchedRuleError(RuleError, LookupError):
    """A rule whose pattern matches no module."""


class UnmatchedRuleWarning(UserWarning):
    """Said instead of `UnmatchedRuleError` where `strict=False`."""


class CallError(RematError, TypeError):
    """A call of a rematerialised module that cannot be traced."""


class MeasureError(RematError, ValueError):
    """A function or arguments that cannot be measured."""


class CacheWarning(UserWarning):
    """Said instead of an error where a measurement cannot be stored."""


class TargetError(RematError, ValueError):
    """A target to compile for that does not exist or is not installed."""


class BudgetError(RematError, ValueError):
    """A budget that cannot be read, or that no plan reaches."""


def suggest_names(name: str, choices: Iterable[str], *, limit: int = 3) -> str:
    """The closest of `choices` as a half sentence, or all of a few, or ""."""
    known = sorted(set(choices))
    close = difflib.get_close_matches(name, known, n=limit, cutoff=0.5)
    shown = close or known[: limit * 2]
    if not shown:
        return ""
    listing = ", ".join(map(repr, shown)) + ("" if close or len(known) == len(shown) else ", ...")
    return f"did you mean {listing}?" if close else f"there are {listing}."
