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
    """Base of every error that remattools raises on purpose.

    Example:
        >>> import remattools as rt
        >>> try:
        ...     rt.Remat(every_n=0)
        ... except rt.RematError as error:
        ...     print(error.fix)
        an int of 1 or more; to exclude a module, use False as its action.
    """


class PatternError(RematError, ValueError):
    """A path pattern with a syntax error.

    Example:
        >>> import remattools as rt
        >>> try:
        ...     rt.Rules({"layers.[0": "nothing_saveable"})
        ... except rt.PatternError as error:
        ...     print(error)
        'layers.[0' is not a pattern: '[0' is not a slice.
          why: as written it would match nothing.
          fix: "[0]", "[-1]", "[:-2]" or "[::2]" as a whole segment.
    """


class PolicyError(RematError, ValueError):
    """A policy that does not exist, or that its arguments do not define.

    Example:
        >>> import remattools as rt
        >>> try:
        ...     rt.Remat("dots_savable")
        ... except rt.PolicyError as error:
        ...     print(error)
        the policy 'dots_savable' does not exist.
          why: a misspelt policy would otherwise save nothing, or everything.
          fix: did you mean 'dots_saveable', 'nothing_saveable', 'dropout_masks_saveable'?
    """


class RuleError(RematError, ValueError):
    """A rule, an action or a set of rules that is invalid.

    Example:
        >>> import remattools as rt
        >>> try:
        ...     rt.Remat(every_n=0)
        ... except rt.RuleError as error:
        ...     print(error)
        every_n=0 is not a count.
          why: every n-th module of a sequence is selected.
          fix: an int of 1 or more; to exclude a module, use False as its action.
    """


class RuleFileError(RuleError):
    """A rule file that cannot be read or holds an invalid rule; the message names file and line.

    Example:
        >>> import remattools as rt
        >>> try:
        ...     rt.Rules.from_toml('[remat.rules]\\n"layers.*" = 3', "train.toml")
        ... except rt.RuleFileError as error:
        ...     print(error)
        train.toml, line 2: 3 is not an action.
          why: it does not say what to save.
          fix: "nothing_saveable", { save = ["qkv"] }, or false.
    """


class UnmatchedRuleError(RuleError, LookupError):
    """A rule whose pattern matches no module.

    Example:
        >>> from flax import nnx
        >>> import remattools as rt
        >>> model = nnx.eval_shape(lambda: nnx.Dict(head=nnx.Linear(2, 2, rngs=nnx.Rngs(0))))
        >>> try:
        ...     rt.apply(model, {"haed": "nothing_saveable"})
        ... except rt.UnmatchedRuleError as error:
        ...     print(error)
        the rule 'haed' matches no module of this model.
          why: it would silently do nothing, and memory would not change.
          fix: the closest paths are head.
    """


class UnmatchedRuleWarning(UserWarning):
    """Issued instead of an `UnmatchedRuleError` if `strict=False`.

    Example:
        >>> import warnings
        >>> from flax import nnx
        >>> import remattools as rt
        >>> model = nnx.eval_shape(lambda: nnx.Dict(head=nnx.Linear(2, 2, rngs=nnx.Rngs(0))))
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     model = rt.apply(model, {"haed": "nothing_saveable"}, strict=False)
        >>> [warning.category.__name__ for warning in caught]
        ['UnmatchedRuleWarning']
    """


class MeasureError(RematError, ValueError):
    """A function or arguments that cannot be measured.

    Example:
        >>> import remattools as rt
        >>> try:
        ...     rt.measure("not a function")
        ... except rt.MeasureError as error:
        ...     print(error)
        'not a function' is not a function.
          why: the program of a function call is measured; there is none without a function.
          fix: pass the function first, then its arguments: measure(loss, model, batch).
    """


class CacheWarning(UserWarning):
    """Issued if a measurement cannot be stored in the cache; the measurement itself is valid."""


class TargetError(RematError, ValueError):
    """A compile target that does not exist, or whose compiler is not installed.

    Example:
        >>> import remattools as rt
        >>> try:
        ...     rt.find_target("tpuu")
        ... except rt.TargetError as error:
        ...     print(error.what)
        unknown target 'tpuu'.
    """


class BudgetError(RematError, ValueError):
    """A memory budget that cannot be parsed, or that no plan meets.

    Example:
        >>> import remattools as rt
        >>> import jax.numpy as jnp
        >>> try:
        ...     rt.plan(jnp.sum, jnp.ones(3), budget="12 GB of HBM", target="cpu")
        ... except rt.BudgetError as error:
        ...     print(error.what)
        budget='12 GB of HBM' is not a valid budget.
    """


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
