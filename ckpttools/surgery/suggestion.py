# SPDX-License-Identifier: Apache-2.0
"""A suggested surgery as a value, and the sentence that says what it would lose."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp

from remattools.text import format_bytes

from ..spec.operations import Cast, Operation
from ..tree.records import parse_dtype

_MAX_NAMES = 4
"""Names of lost leaves in the first line of a suggestion."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suggestion:
    """Operations that would make a step fit, and what they lose; falsy if there are none.

    Attributes:
        operations: The operations.
        fresh_leaves: Leaves of the state that would keep their values, wholly or in part.
        fresh_bytes: Bytes of those values.
        fresh_keys: The typed random keys among `fresh_leaves`; where an array of keys grows, the stored ones stay.
        lost_leaves: Leaves on disk that would not be used, wholly or in part.
        lost_bytes: Bytes of the unused values.
        stored_bytes: Bytes of all leaves on disk of the state's items, without recomputed ones.
        ignored_leaves: Leaves on disk that are likely recomputed variables, such as attention caches: they are dropped,
            which is not a loss.
        reason: Why nothing is suggested, if nothing is.
        assumptions: What the names do not say and the caller has to check, each as a clause.
    """

    operations: tuple[Operation, ...] = ()
    fresh_leaves: tuple[str, ...] = ()
    fresh_bytes: int = 0
    fresh_keys: tuple[str, ...] = ()
    lost_leaves: tuple[str, ...] = ()
    lost_bytes: int = 0
    stored_bytes: int = 0
    ignored_leaves: tuple[str, ...] = ()
    reason: str = ""
    assumptions: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.operations)

    @property
    def verdict(self) -> str:
        """Return what the operations lose, as a clause that follows "this surgery"."""
        if not self.operations:
            return ""
        losses = []
        if self.lost_leaves:
            losses.append(
                f"throws away {format_bytes(self.lost_bytes)} of the {format_bytes(self.stored_bytes)} on disk, in "
                f"{list_leaf_names(self.lost_leaves)}"
            )
        if self.fresh_leaves:
            losses.append(
                f"leaves {format_bytes(self.fresh_bytes)} of the state as initialised, in "
                f"{list_leaf_names(self.fresh_leaves)}"
            )
            if self.fresh_keys:
                losses[-1] += f", with fresh random keys in {list_leaf_names(self.fresh_keys)}"
        ignored = list_leaf_names(self.ignored_leaves) if self.ignored_leaves else ""
        check = f"; recomputed variables are not state: {ignored}" if ignored else ""
        check += "".join(f"; check {each}" for each in self.assumptions)
        if not losses:
            rounded = [each for each in self.operations if isinstance(each, Cast) and _rounds(each)]
            note = (
                f", but values are rounded to {', '.join(sorted({each.to_dtype for each in rounded}))}"
                if rounded
                else ""
            )
            return f"fixes it: nothing on disk is lost and nothing in the state stays as initialised{note}{check}"
        kept = "" if self.lost_leaves else "keeps everything on disk and "
        return kept + " and ".join(losses) + check


def _rounds(cast: Cast) -> bool:
    try:
        before, after = (jnp.finfo(parse_dtype(name)) for name in (cast.from_dtype, cast.to_dtype))  # type: ignore[no-untyped-call]
    except ValueError:
        return False  # Between integers, or from one to the other: a value that does not fit is an error.
    return bool(before.nmant > after.nmant)


def list_leaf_names(names: Sequence[str]) -> str:
    """Return how many leaves there are, and the first few names."""
    rest = len(names) - _MAX_NAMES
    shown = ", ".join(names[:_MAX_NAMES]) + (f" and {rest:,} more" if rest > 0 else "")
    return f"{len(names):,} {'leaf' if len(names) == 1 else 'leaves'} ({shown})"
