# SPDX-License-Identifier: Apache-2.0
"""Report differences by leaf path, and suggest the surgery that would fix them.

The suggestion is a guess and is never applied without a request. Renames are found by kinds of names (`layers.0` and
`layers.7` are one kind). Where a missing and an unexpected kind have the same shape and dtype, the part of their names
that differs becomes a rule; the rule that fixes most leaves comes first.

Before it is shown, a suggestion is tried on the names: it must leave no difference, and every leaf that already fitted
must stay where it was. Names that contain pattern characters (`a*`, `b[0]`) cannot always be distinguished.
"""

import collections
import dataclasses
import difflib
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from ..errors import CheckpointError, StructureError
from ..spec.operations import DTYPES, Cast, Drop, Operation, Pad, Reinit, Rename, Slice, as_code, find_wildcards
from ..tree.leaf_paths import Names
from ..tree.match import Difference, is_transposed, mask_numbers
from ..tree.records import format_form
from .plan import RestorePlan
from .renaming import Parts, find_outermost_depth, rename_leaf
from .resize import needs_pad, needs_slice

type Replan = Callable[[Sequence[Operation]], RestorePlan]
"""Returns the plan with more operations after the requested ones."""

_MAX_LINES = 100
"""Above this number, leaves are grouped by kind."""
_MAX_KINDS = 300
"""With more kinds of names than this on either side, no renames are guessed."""


def require_match(
    step: int,
    plan: RestorePlan,
    state_names: Sequence[Names],
    replan: Replan,
    requested_operations: Sequence[Operation] = (),
) -> None:
    """Raise `StructureError` if there are differences.

    Args:
        step: The step's number.
        plan: What the restore would do.
        state_names: Names of all leaves of the state.
        replan: Makes the plan with more operations.
        requested_operations: The requested operations; the suggestion begins with them.
    """
    differences = plan.differences
    if not differences:
        return
    operations = find_fix(plan, state_names, replan)
    if operations:
        operations = (*requested_operations, *operations)
    shown = "".join(f"\n    {line}" for line in format_differences(differences))
    surgery = "".join(f"\n    {as_code(each)}," for each in operations)
    offer = f"surgery=[{surgery}\n  ] fixes it, if that is what you mean; or " if operations else ""
    error = StructureError(
        what=f"step {step} does not fit the state passed in, in {len(differences)} place(s):{shown}",
        why="restoring part of it, or casting, would silently change the model. Nothing was restored or lost.",
        fix=f"{offer}build the state as it was when the step was saved, or leave the item out of the state.",
    )
    error.mismatches = tuple(map(str, differences))
    error.surgery = operations
    raise error


def format_differences(differences: Sequence[Difference]) -> list[str]:
    """Return one line for each difference, or for each kind if there are more than `_MAX_LINES`."""
    if len(differences) <= _MAX_LINES:
        return list(map(str, differences))
    kinds: dict[tuple[Names, str], list[Difference]] = {}
    for each in differences:
        kinds.setdefault((mask_numbers(each.path), each.text.partition(";")[0]), []).append(each)
    shown = []
    for (_, text), same in kinds.items():
        first = ".".join(same[0].path)
        more = f" (and {len(same) - 1} more of its kind, to {'.'.join(same[-1].path)})" if len(same) > 1 else ""
        shown.append(f"{first}: {text}{more}")
    rest = len(shown) - _MAX_LINES
    tail = [f"... and {rest} more kinds; all are in the error's mismatches"] if rest > 0 else []
    return [*shown[:_MAX_LINES], *tail]


def find_fix(plan: RestorePlan, state_names: Sequence[Names], replan: Replan) -> tuple[Operation, ...]:
    """Return operations that remove all differences and change nothing else; empty if none are found.

    Args:
        plan: What the restore would do.
        state_names: Names of all leaves of the state.
        replan: Makes the plan with more operations.
    """
    for allow_parts in (True, False):
        operations = suggest_operations(
            plan.differences, state_names, [each.path for each in plan.sources], allow_parts=allow_parts
        )
        if operations and _is_fix(operations, plan, replan):
            return operations
    return ()


def _is_fix(operations: Sequence[Operation], plan: RestorePlan, replan: Replan) -> bool:
    try:
        after = replan(operations)
    except CheckpointError:
        return False
    unfit = {each.path for each in plan.differences}
    sources = {leaf.path: leaf.source and leaf.source.stored_path for leaf in after.placed_leaves}
    return not after.differences and all(
        sources.get(leaf.path) == (leaf.source and leaf.source.stored_path)
        for leaf in plan.placed_leaves
        if leaf.path not in unfit
    )


def suggest_operations(
    differences: Sequence[Difference],
    state_names: Iterable[Names],
    stored_names: Iterable[Names],
    *,
    allow_parts: bool = True,
) -> tuple[Operation, ...]:
    """Return operations that should remove the differences.

    Args:
        differences: What does not fit.
        state_names: Names of all leaves of the state.
        stored_names: Names of all leaves on disk.
        allow_parts: Whether whole parts may be renamed, and not only leaves.
    """
    missing = {each.path: each for each in differences if each.kind == "missing"}
    extra = {each.path: each for each in differences if each.kind == "unexpected"}
    taken = set(stored_names)
    items = _find_renamed_items(differences, set(state_names), taken)
    found: list[Operation] = list(items)
    for item in items:
        missing.pop((item.new.removesuffix(".**"),), None)
    resizing: list[tuple[Names, str, Operation]] = []
    for rule in _find_renames(missing, extra, Parts(taken), allow_parts=allow_parts):
        matched = Parts(extra).match(rule.pattern)
        moved = {path: rename_leaf(rule, path, matched) for path in extra if find_outermost_depth(path, matched)}
        collide = set(moved.values()) & (taken - moved.keys()) or len(set(moved.values())) < len(moved)
        if collide or not missing.keys() & set(moved.values()):
            continue
        found.append(rule)
        taken = (taken - moved.keys()) | set(moved.values())
        for path, new in moved.items():
            old, match = extra.pop(path), missing.pop(new, None)
            if match is None:
                extra[new] = dataclasses.replace(old, path=new)  # Another leaf of the part; the state lacks it.
            elif old.stored is not None and match.expected is not None:
                both = Difference(kind="reshaped", path=new, expected=match.expected, stored=old.stored)
                resizing += [(new, type(each).__name__, each) for each in _suggest_leaf_operations(both)]
    for each in differences:
        if each.kind in ("reshaped", "recast", "other"):
            resizing += [
                (each.path, type(operation).__name__, operation) for operation in _suggest_leaf_operations(each)
            ]
    found += [Drop(pattern) for pattern in _find_covering_patterns(extra, taken, kept_names=set(state_names))]
    grouped: dict[tuple[str, ...], list[Names]] = {}
    for path, kind, operation in resizing:
        dtypes = (operation.from_dtype, operation.to_dtype) if isinstance(operation, Cast) else ()
        grouped.setdefault((kind, *dtypes), []).append(path)
    kinds: dict[str, type[Any]] = {"Cast": Cast, "Pad": Pad, "Slice": Slice, "Reinit": Reinit}
    for (kind, *rest), paths in grouped.items():
        # A cast applies to leaves of its own dtype only, so its pattern may name a whole part.
        patterns = (
            _find_covering_patterns(paths, set(state_names), kept_names=set())
            if kind == "Cast"
            else _make_patterns(paths, set(state_names))
        )
        found += [kinds[kind](pattern, *rest) for pattern in patterns]
    found += [
        Reinit(pattern) for pattern in _find_covering_patterns(missing, set(state_names), kept_names=taken - set(extra))
    ]
    return tuple(found)


def _suggest_leaf_operations(difference: Difference) -> list[Operation]:
    here, stored = difference.expected, difference.stored
    kinds = {record.kind for record in (here, stored) if record is not None}
    if here is None or stored is None or not kinds <= {"array", "empty"}:
        return (
            []
            if here is not None and stored is not None and format_form(here) == format_form(stored)
            else [Reinit("**")]
        )
    operations: list[Operation] = []
    if here.dtype != stored.dtype:
        if not {here.dtype, stored.dtype} <= set(DTYPES):
            return [Reinit("**")]
        operations.append(Cast("**", stored.dtype, here.dtype))
    if here.shape != stored.shape:
        if len(here.shape) != len(stored.shape) or is_transposed(stored.shape, here.shape):
            return [Reinit("**")]
        operations += [Pad("**")] if needs_pad(stored.shape, here.shape) else []
        operations += [Slice("**")] if needs_slice(stored.shape, here.shape) else []
    return operations


def _find_renamed_items(
    differences: Sequence[Difference], state_names: set[Names], stored_names: set[Names]
) -> list[Rename]:
    """Return a rename for each item on disk that has another name and mostly the same leaves."""
    found, used = [], {path[0] for path in state_names}
    for each in differences:
        if each.kind != "missing" or len(each.path) > 1:
            continue
        leaves = {path[1:] for path in state_names if path[0] == each.path[0]}
        shared: collections.Counter[str] = collections.Counter(path[0] for path in stored_names if path[1:] in leaves)
        best = next(
            (item for item, count in shared.most_common() if item not in used and 2 * count > len(leaves)), None
        )
        if best is not None:
            used.add(best)
            found.append(Rename(f"{best}.**", f"{each.path[0]}.**"))
    return found


def _find_renames(
    missing: dict[Names, Difference], extra: dict[Names, Difference], stored_parts: Parts, *, allow_parts: bool
) -> list[Rename]:
    """Return rules that give unexpected leaves the names of missing ones, in the order of their application."""
    lacking, unused = _group_by_kind(missing), _group_by_kind(extra)
    if not lacking or not unused or max(len(lacking), len(unused)) > _MAX_KINDS:
        return []

    @functools.cache
    def match_leaves(pattern: str) -> frozenset[Names]:
        """Return the leaves on disk at or below what a pattern matches."""
        matched = stored_parts.match(pattern)
        return frozenset(leaf for leaf in stored_parts.leaves if find_outermost_depth(leaf, matched))

    likeness = []
    for new in lacking:
        for old in unused:
            if new[1] == old[1]:
                ratio = difflib.SequenceMatcher(None, ".".join(old[0]), ".".join(new[0])).ratio()
                if ratio >= 0.4 or new[0][-1] == old[0][-1]:
                    likeness.append((ratio, old, new))
    rules: collections.Counter[tuple[str, str]] = collections.Counter()
    done = set[tuple[str, Names, str]]()
    # Each kind is paired with the most similar kind.
    for _, old, new in sorted(likeness, key=lambda each: each[0], reverse=True):
        if ("old", *old) in done or ("new", *new) in done:
            continue
        done |= {("old", *old), ("new", *new)}
        sides = _generate_rules(old[0], new[0], allow_parts=allow_parts)
        rule = next((rule for rule in sides if match_leaves(rule[0]) <= extra.keys()), None)
        if rule is not None:
            rules[rule] += len(lacking[new])
    # Deeper rules first: afterwards a part above can be renamed as a whole.
    ordered = sorted(rules, key=lambda rule: (-rule[0].count("."), -rules[rule], rule))
    return [Rename(*rule) for rule in ordered]


def _group_by_kind(differences: dict[Names, Difference]) -> dict[tuple[Names, str], list[Names]]:
    kinds: dict[tuple[Names, str], list[Names]] = {}
    for path, each in differences.items():
        record = each.expected or each.stored
        if record is not None:
            kinds.setdefault((mask_numbers(path), format_form(record)), []).append(path)
    return kinds


def _generate_rules(old: Names, new: Names, *, allow_parts: bool) -> Iterator[tuple[str, str]]:
    """Yield the differing parts of two kinds of names as the two sides of a rename, without their common end first."""
    end = 0
    while allow_parts and end < min(len(old), len(new)) - 1 and old[-1 - end] == new[-1 - end]:
        end += 1
    for left in range(end, -1, -1):
        sides = _format_pattern(old[: len(old) - left]), _format_pattern(new[: len(new) - left])
        if find_wildcards(sides[0]) == find_wildcards(sides[1]):
            yield sides


def _format_pattern(path: Names) -> str:
    """Return a name as a pattern; special characters and masked numbers become a star."""
    parts = [re.sub(r"[#\[\]{}:.*\s]+", "*", part) for part in path]
    # A single segment would match that name at any depth.
    return ".".join(parts) if len(parts) > 1 else f"{parts[0]}.**"


def _find_covering_patterns(targets: Iterable[Names], all_names: set[Names], *, kept_names: set[Names]) -> list[str]:
    """Return patterns that cover the target names and nothing else; a part that is covered whole gets one pattern."""
    targets = list(targets)
    others = (all_names | kept_names) - set(targets)
    blocked = {other[:depth] for other in others for depth in range(1, len(other) + 1)}
    parts: dict[Names, list[Names]] = {}
    for path in targets:
        depth = next((depth for depth in range(1, len(path)) if path[:depth] not in blocked), len(path))
        parts.setdefault(path[:depth], []).append(path)
    return _make_patterns(list(parts), others)


def _make_patterns(paths: list[Names], other_names: set[Names]) -> list[str]:
    """Return patterns for names: one for each kind if it matches nothing else, otherwise one for each name."""
    kinds: dict[Names, list[Names]] = {}
    for path in paths:
        kinds.setdefault(mask_numbers(path), []).append(path)
    patterns: list[str] = []
    parts = Parts([*other_names, *paths]) if any(len(same) > 1 for same in kinds.values()) else None
    for kind, same in kinds.items():
        if parts is not None and len(same) > 1 and parts.match(_format_pattern(kind)) == set(same):
            patterns.append(_format_pattern(kind))
        else:
            patterns += [_format_pattern(path) for path in same]
    return patterns
